"""Improving Language Understanding by Generative Pre-Training (Radford et al., 2018) in one file.

New against its parent, the Transformer of Vaswani et al. (2017):
- a decoder alone, trained as a left-to-right language model on unlabelled books (§3.1, Eq. 1, 2);
- learned position embeddings (§4.1), added once at the bottom; no scaling by sqrt(D) (code);
- GELU in place of ReLU, weights drawn from N(0, 0.02) (§4.1); a bias on every projection (code);
- dropout 0.1 on embeddings, residual branches and attention probabilities (§4.1);
- Adam with decoupled weight decay, 2000 updates of warm-up, then a cosine to zero (§4.1).
Kept: the norm stands after each residual sum (post-norm), and none follows the last block.
"Code" and "released" mean openai/finetune-transformer-lm; pre-training itself was never released.

Map: Eq. 1 objective | Eq. 2 GPT1, Block | §4.1 PRESETS["paper"], init_weights, build_optimizer,
learning_rate, standardize (the cleaning of text), get_batch (the sequences of 512 tokens).
Legend: B batch, T positions, D width, H heads, E = D / H, F hidden width, V vocabulary.
Conventions: T + 1 tokens make T inputs and T targets; loss in nats per target; target -100 is none.

Run: python gpt1.py                         # a laptop: the preset demo
     torchrun --nproc_per_node=8 gpt1.py    # GPUs: the preset small
     torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
         gpt1.py --preset paper --data books/ --tokenizer ranks.tiktoken --out /shared/gpt1
Expect: in a minute on two CPU cores the demo's held-out bits per byte fall from 7.68 to 2.34
(lzma needs 2.06), and it writes lines that look like Python.
"""

import argparse
import base64
import contextlib
import dataclasses
import functools
import glob
import hashlib
import importlib.util
import inspect
import itertools
import json
import lzma
import math
import os
import re
import resource
import shutil
import sys
import sysconfig
import time
from datetime import timedelta
from pathlib import Path
from signal import SIGINT, SIGTERM, signal
from typing import Literal, get_args

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record

# ---------------------------------------- Config ----------------------------------------

@dataclasses.dataclass
class Config:
    """The run. Every field is a flag of the command line, and its comment is the flag's help."""

    # Model, §4.1 "Model specifications"
    vocab_size: int = 0  # V, entries of the vocabulary; 0: as many as the tokenizer has
    context: int = 512  # positions that the model can see
    dim: int = 768  # D, width of the residual stream
    n_layers: int = 12  # blocks
    n_heads: int = 12  # H, attention heads
    hidden_dim: int = 3072  # F, width of the feed-forward layer
    dropout: float = 0.1  # on embeddings, residual branches and attention probabilities
    # Data
    data: str = ""  # text, token shards, or a directory of either; empty: Python's own library
    tokenizer: str = ""  # bytes, gpt2, cl100k_base, o200k_base, or a rank file; empty: bytes
    standardize: bool = False  # clean text as the paper does: spaced punctuation, lower case
    seq_len: int = 0  # T, tokens of a training sequence; 0: the context
    # Optimization, §4.1
    batch_size: int = 64  # sequences of one update, over all ranks
    micro_batch: int = 0  # sequences of one forward pass on one rank, at most; 0: the rank's share
    epochs: float = 100.0  # passes over the training windows, where steps is 0
    steps: int = 0  # updates; 0: as many as epochs needs
    lr: float = 2.5e-4  # largest learning rate
    warmup_steps: int = 2000  # updates of linear warm-up
    adam: Literal["torch", "released"] = "torch"  # torch's AdamW, or the released code's Adam
    weight_decay: float = 0.01  # decoupled, on matrices and embeddings
    clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    seed: int = 0  # of weights, data order and dropout
    # Machine
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    compile: bool = False  # compile each block
    recompute: Literal["none", "block"] = "none"  # block: keep only its input for the backward pass
    timeout: int = 600  # seconds until a collective gives up on a lost rank
    dry_run: bool = False  # print what the run would need, and exit
    world_size: int = 1  # ranks that dry_run plans for
    # Reports and files
    log_every: int = 10  # updates between log lines
    val_every: int = 1000  # updates between validations
    val_batches: int = 16  # held-out batches of one validation, at most
    prompt: str = ""  # text that the sample continues; empty: the start of the held-out text
    out: str = ""  # directory for checkpoints, metrics.jsonl, config.json; empty: none are written
    save_every: int = 1000  # updates between checkpoints
    resume: bool = False  # go on from the newest checkpoint in out
    init: str = ""  # Hugging Face checkpoint directory to start from
    export: str = ""  # directory to write the model to as a Hugging Face checkpoint
    write_tokens: str = ""  # directory to write the data to as token shards; then exit

PRESETS = {
    # A CPU, a minute. Shallow, since deep post-norm is slow at first; no dropout in a run shorter
    # than one pass over its corpus; 24 sequences, for 1, 2, 3, 4, 6 or 8 ranks.
    "demo": dict(
        context=128, dim=96, n_layers=2, n_heads=3, hidden_dim=384, dropout=0.0, batch_size=24,
        steps=1200, lr=6e-3, warmup_steps=100, log_every=50,
    ),
    # A GPU of 24 GB or a node of them, minutes: the paper's shape, over bytes.
    "small": dict(micro_batch=16, steps=1500, warmup_steps=200, compile=True, val_every=500),
    # §4.1: 12 blocks of width 768, context 512, batch 64, 100 epochs; 116,534,784 parameters.
    "paper": dict(vocab_size=40478, standardize=True, micro_batch=16, compile=True),
}  # fmt: skip
BEGIN, END = "", "<|endoftext|>"  # tokens around each document of a stream; BEGIN may be none
SPECIALS = (END,)
PATTERN = (  # how GPT-4 and Llama 3 split text into words, for files of ranks
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# ---------------------------------------- Model ----------------------------------------

class CausalSelfAttention(nn.Module):
    """softmax(q kᵀ / sqrt(E)) v over present and past, [B, T, D] -> [B, T, D], with dropout on
    the probabilities and on the output (§4.1)."""

    def __init__(self, dim, n_heads, dropout):
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_heads, D // self.n_heads)  # [B, T, 3, H, E]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, T, E] each
        p = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)  # [B, H, T, E]
        x = self.out(x.transpose(1, 2).reshape(B, T, D))  # [B, T, D]
        return F.dropout(x, self.dropout, self.training)

class MLP(nn.Module):
    """GELU(x W_fc + b_fc) W_pr + b_pr, [B, T, D] -> [B, T, D] (§4.1)."""

    # Undisclosed: the form of GELU. The released code of GPT and GPT-2 has the tanh form.

    def __init__(self, dim, hidden_dim, dropout):
        super().__init__()
        self.dropout = dropout
        self.up = nn.Linear(dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        x = F.gelu(self.up(x), approximate="tanh")  # [B, T, F]
        return F.dropout(self.down(x), self.dropout, self.training)  # [B, T, D]

class Block(nn.Module):
    """transformer_block of Eq. 2, [B, T, D] -> [B, T, D]; the norm follows each residual sum (eps
    as released)."""

    def __init__(self, cfg):
        super().__init__()
        self.attn = CausalSelfAttention(cfg.dim, cfg.n_heads, cfg.dropout)
        self.norm1 = nn.LayerNorm(cfg.dim, eps=1e-5)
        self.mlp = MLP(cfg.dim, cfg.hidden_dim, cfg.dropout)
        self.norm2 = nn.LayerNorm(cfg.dim, eps=1e-5)

    def forward(self, x):
        n = self.norm1(x + self.attn(x))
        return self.norm2(n + self.mlp(n))

class GPT1(nn.Module):
    """Eq. 2, tokens [B, T] -> logits [B, T, V]; the softmax shares W_e with the token embedding."""

    def __init__(self, cfg):
        super().__init__()
        self.dropout, self.recompute = cfg.dropout, cfg.recompute
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.dim)  # W_e
        self.position_embedding = nn.Embedding(cfg.context, cfg.dim)  # W_p
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))

    def forward(self, tokens):
        positions = self.position_embedding.weight[: tokens.shape[1]]  # [T, D]
        x = self.token_embedding(tokens) + positions  # Eq. 2, h_0 = U W_e + W_p: [B, T, D]
        # Undisclosed: what embedding dropout drops. The released fine-tuning code drops entries of
        # both tables, the softmax's included; here, as in every later model, it drops their sum.
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:  # Eq. 2, h_l = transformer_block(h_{l-1})
            if self.recompute == "block" and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return F.linear(x, self.token_embedding.weight)  # Eq. 2, h_n W_eᵀ: [B, T, V]

def init_weights(model, cfg):
    """§4.1: N(0, 0.02) for matrices and embeddings, biases 0, gains 1. A parameter is drawn from
    (seed, its name), so that every layout starts from the same numbers."""
    for name, p in model.named_parameters():
        if re.search(r"(_embedding|qkv|out|up|down)\.weight$", name):
            generator = torch.Generator().manual_seed(stable_hash(cfg.seed, name))
            p.data.copy_(torch.empty(p.shape).normal_(0.0, 0.02, generator=generator))
        elif re.search(r"(qkv|out|up|down|norm[12])\.bias$", name):
            nn.init.zeros_(p)
        elif re.search(r"norm[12]\.weight$", name):
            nn.init.ones_(p)
        else:
            raise ValueError(f"no rule initialises {name}")

def count_parameters(model):
    """(total, activated) parameters; the tied softmax counts once, a dense model activates all."""
    total = sum(p.numel() for p in model.parameters())
    return total, total

def flops_per_token(cfg):
    """Training FLOPs per token: 2 per weight of a matrix product forward, twice that backward.
    Attention counts as causal, (T + 1) / 2 keys a query, half of what the full square gives."""
    weights = cfg.n_layers * (4 * cfg.dim**2 + 2 * cfg.dim * cfg.hidden_dim)
    attention = cfg.n_layers * 2 * cfg.dim * ((cfg.seq_len or cfg.context) + 1) / 2  # q kᵀ, A v
    return 6 * (weights + attention + cfg.vocab_size * cfg.dim)

# ---------------------------------------- Data ----------------------------------------

def standardize(text):
    """Clean text as §4.1 mentions and the released text_utils does: plain quotes and dashes,
    spaces around runs of punctuation (backslash is missed there too), single spaces, lower case."""
    # Departure: of ftfy only the quotes, and no spaCy, which are packages of their own; tiktoken's
    # byte-level BPE, not 40,000 merges of characters: the paper's perplexity 18.4 does not compare.
    plain = ("'", "'", '"', '"', "-", "-", "-", "...", "'")
    text = text.translate(dict(zip(map(ord, "‘’“”—–―…´"), plain)))
    runs = r'(-+|~+|!+|"+|;+|\?+|\++|,+|\)+|\(+|/+|\*+|\[+|\]+|}+|{+|\|+|_+)'
    text = re.sub(r"\s*\n\s*", " \n ", re.sub(runs, r" \1 ", text))
    return re.sub(r"[^\S\n]+", " ", text).strip().lower()

def get_batch(corpus, first, n, cfg):
    """Sequences first ... first + n - 1 of the run, whatever the ranks or the moment: tokens and
    targets [n, T], and the counts n_targets and n_bytes (of the targets' text)."""
    # Undisclosed: how the "randomly sampled, contiguous sequences" lie. Here they are a grid whose
    # phase and order change each epoch, drawn without replacement; T + 1 tokens give T targets (the
    # released code scores T - 1 of T); one across a border of books keeps its longest piece: each
    # sequence is text of one book, and no token, which the vocabulary lacks, marks the border.
    tokens = np.zeros((n, cfg.seq_len or cfg.context), np.int64)
    targets = np.full_like(tokens, -100)
    for row in range(n):
        window = corpus.window(first + row, tokens.shape[1], cfg.seed)  # [T + 1]
        ends = np.flatnonzero(np.concatenate(([True], window == corpus.separator, [True])))
        i = np.diff(ends).argmax()
        piece = window[ends[i] : ends[i + 1] - 1]
        length = max(len(piece) - 1, 0)
        tokens[row, :length], targets[row, :length] = piece[:-1], piece[1:]
    scored = targets[targets >= 0]
    counts = {"n_targets": scored.size, "n_bytes": int(corpus.token_bytes[scored].sum())}
    return {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets), **counts}

# ---------------------------------------- Objective ----------------------------------------

def objective(model, batch, cfg):
    """Eq. 1 as a loss, with metrics: the sum of -log P(u_i | u_{i-k} ... u_{i-1}) over the batch's
    targets, divided by batch["n_targets"], the count of the whole global batch."""
    with torch.autocast(batch["tokens"].device.type, torch.bfloat16, cfg.precision == "bf16"):
        logits = model(batch["tokens"]).float().flatten(0, 1)  # [B * T, V]
    nats = F.cross_entropy(logits, batch["targets"].flatten(), reduction="sum")  # Eq. 1, -L1
    return nats / max(batch["n_targets"], 1), {}

# ---------------------------------------- Optimizer ----------------------------------------

class ReleasedAdam(torch.optim.Optimizer):
    """Adam as the released code has it: against torch's AdamW, eps joins the uncorrected sqrt(v),
    and the bias correction multiplies the decoupled decay too."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state.update(t=torch.tensor(0), m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["t"] += 1
                t = state["t"].item()
                m = state["m"].lerp_(p.grad, 1 - beta1)
                v = state["v"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                update = m / (v.sqrt() + group["eps"]) + group["weight_decay"] * p
                p.sub_(update, alpha=group["lr"] * math.sqrt(1 - beta2**t) / (1 - beta1**t))

def build_optimizer(model, cfg):
    """§4.1: Adam, with the "modified L2" of Loshchilov and Hutter on all weights that are neither
    bias nor gain, embeddings included."""
    groups = [
        dict(params=[p for p in model.parameters() if p.ndim > 1], weight_decay=cfg.weight_decay),
        dict(params=[p for p in model.parameters() if p.ndim <= 1], weight_decay=0.0),
    ]
    # Undisclosed: betas, eps and clipping; these and --clip 1 are from the released fine-tuning.
    settings = dict(lr=cfg.lr, betas=(0.9, 0.999), eps=1e-8)
    if cfg.adam == "released":
        return ReleasedAdam(groups, settings)
    # Departure: torch's AdamW by default, which is fused, and differs as ReleasedAdam says.
    return torch.optim.AdamW(groups, **settings, fused=True)

def learning_rate(step, cfg):
    """§4.1: linear from 0, then a cosine to 0; step counts the updates made before."""
    # Undisclosed: the cosine's span. As in the released code it is the whole run, not what follows
    # the warm-up, which therefore meets it just below the peak.
    if step <= cfg.warmup_steps:
        return cfg.lr * step / max(cfg.warmup_steps, 1)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * step / cfg.steps))

# ---------------------------------------- Precision ----------------------------------------

# Parameters, gradients and Adam's moments are fp32. Under bf16, autocast (in objective) runs matrix
# products and attention in bf16; norms, residual sums and the loss stay fp32.
# Undisclosed: the paper's precision. The released code is fp32 throughout: --precision fp32.

PEAK_FLOPS = {  # dense bf16, by the device's exact name; a device not listed gets no MFU
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA B200": 2250e12,
}  # fmt: skip

# ---------------------------------------- Parallelism ----------------------------------------

def parallelize(model, cfg, mesh):
    """Synchronous data parallelism, as released: each rank has a copy, gradients are averaged."""
    if cfg.compile:
        for block in model.blocks:
            block.compile()
    if mesh.size() == 1:
        return model
    steps, _ = split_batch(cfg, mesh.size())
    return nn.parallel.DistributedDataParallel(
        model, process_group=mesh.get_group(), gradient_as_bucket_view=True,
        static_graph=steps == 1,  # it is faster, and wrong under the no_sync() of accumulation
    )  # fmt: skip

def memory_per_rank(cfg):
    """Bytes on one rank of cfg.world_size as an eager backward pass begins, by kind."""
    with torch.device("meta"):
        n, _ = count_parameters(GPT1(cfg))
    positions = split_batch(cfg, cfg.world_size)[1] * (cfg.seq_len or cfg.context)
    # Kept per position and block: inputs of both norms (fp32); inputs of the four products, q, k, v
    # and GELU's input (in the products' precision); a byte an entry of a GPU's two dropout masks.
    size = 2 if cfg.precision == "bf16" else 4
    block = 8 * cfg.dim + size * (6 * cfg.dim + 2 * cfg.hidden_dim)
    block += 2 * cfg.dim * (cfg.dropout > 0)
    if cfg.recompute == "block":  # every block's input, and one block at a time in full
        block = 4 * cfg.dim + block / cfg.n_layers
    head = size * cfg.dim + 4 * cfg.vocab_size  # last product's input, loss's softmax
    activations = int(positions * (cfg.n_layers * block + head))
    return {"parameters": 4 * n, "gradients": 4 * n, "optimizer": 8 * n, "activations": activations}

# ---------------------------------------- Checkpoint ----------------------------------------

HF_CONFIG = {  # ours: Hugging Face's
    "vocab_size": "vocab_size", "context": "n_positions", "dim": "n_embd", "n_layers": "n_layer",
    "n_heads": "n_head",
}  # fmt: skip
HF_NAMES = {
    "token_embedding": "tokens_embed", "position_embedding": "positions_embed", "blocks": "h",
    "attn.qkv": "attn.c_attn", "attn.out": "attn.c_proj", "norm1": "ln_1", "norm2": "ln_2",
    "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
}  # fmt: skip

def hf_tensors(model):
    """(Hugging Face's name, our tensor seen in Hugging Face's layout) of each parameter."""
    for name, p in model.named_parameters():
        for ours, theirs in HF_NAMES.items():
            name = name.replace(ours, theirs)
        yield name, p.data.T if ".c_" in name and p.ndim == 2 else p.data  # Conv1D is [in, out]

def from_hf(path):
    """(model, cfg) from the directory of an OpenAIGPTLMHeadModel: config.json, *.safetensors."""
    from safetensors.torch import load_file

    try:
        theirs = json.loads((Path(path) / "config.json").read_text())
        cfg = Config(**{ours: theirs[name] for ours, name in HF_CONFIG.items()})
        cfg.hidden_dim, tensors = 4 * cfg.dim, {}
        for file in Path(path).glob("*.safetensors"):
            tensors.update({k.removeprefix("transformer."): v for k, v in load_file(file).items()})
        model = GPT1(cfg)
        for name, tensor in hf_tensors(model):
            tensor.copy_(tensors[name].view_as(tensor))
    except Exception as error:
        raise ValueError(f"{path} holds no OpenAIGPTLMHeadModel: {error!r}") from error
    return model, cfg

def to_hf(model, cfg, path):
    """Writes model to the directory path as an OpenAIGPTLMHeadModel."""
    from safetensors.torch import save_file

    config = {theirs: getattr(cfg, ours) for ours, theirs in HF_CONFIG.items()}
    config |= dict(architectures=["OpenAIGPTLMHeadModel"], model_type="openai-gpt", afn="gelu")
    config |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), cfg.dropout)
    tensors = {f"transformer.{k}": v.cpu().contiguous() for k, v in hf_tensors(model)}
    Path(path).mkdir(parents=True, exist_ok=True)
    (Path(path) / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, Path(path) / "model.safetensors", metadata={"format": "pt"})

def save_checkpoint(out, model, optimizer, state):
    """Writes model, optimizer and state to out/step_N, of which the two newest stay. The name comes
    with a rename at the end, so that a process killed at any moment leaves whole checkpoints."""
    final = Path(out) / f"step_{state['step']:09d}"
    partial = final.with_suffix(".tmp")
    if dist.get_rank() == 0:
        for remains in Path(out).glob("step_*.tmp"):
            shutil.rmtree(remains)
    dist.barrier()
    weights, moments = get_state_dict(model, optimizer)
    try:
        dcp.save({"model": weights, "optimizer": moments, "state": state}, checkpoint_id=partial)
    except dcp.api.CheckpointException as error:  # which is no Exception
        raise OSError(f"cannot save {final}: {next(iter(error.failures.values()))[0]}") from error
    if dist.get_rank() == 0:
        partial.rename(final)
        for old in sorted(Path(out).glob("step_*[0-9]"))[:-2]:
            shutil.rmtree(old)
    dist.barrier()

def load_checkpoint(out, resume, steps, model, optimizer, state):
    """Fills model, optimizer and state from the newest checkpoint in out if --resume or a restart
    by torchrun asks for it; ValueError if there is none, or one that nobody asked for."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    listing = [sorted(Path(out).glob("step_*[0-9]"))]
    dist.broadcast_object_list(listing)  # rank 0's, since network file systems show ranks old ones
    (found,) = listing
    if not found and resume and not restarted:
        raise ValueError(f"--resume: {out} has no checkpoint")
    if found and not resume and not restarted:
        raise ValueError(f"{out} has checkpoints: --resume goes on, another --out starts anew")
    if found:
        path = found[-1]
        settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        weights, moments = get_state_dict(model, optimizer)
        loaded = {"model": weights, "optimizer": moments, "state": dict(state)}
        try:
            dcp.load(loaded, checkpoint_id=path)
        except dcp.api.CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise ValueError(f"{path} does not fit or is damaged: {cause}") from error
        if loaded["state"]["seed"] != state["seed"] or loaded["state"]["step"] > steps:
            raise ValueError(f"{path} has --seed {loaded['state']['seed']} or is beyond --steps")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        for group, setting in zip(optimizer.param_groups, settings):
            group.update(setting)  # the flags count, not what they were
        state.update(loaded["state"])
    log = Path(out) / "metrics.jsonl"
    if dist.get_rank() == 0 and log.exists():  # what lies behind the checkpoint comes again
        rows = [row for row in log.read_text().splitlines(True) if row.endswith("}\n")]
        log.write_text("".join(row for row in rows if json.loads(row)["step"] <= state["step"]))

# ---------------------------------------- Training ----------------------------------------

def split_batch(cfg, ranks):
    """(steps, micro) such that batch_size = ranks x steps of accumulation x micro sequences."""
    share = cfg.batch_size // ranks
    micro = min(cfg.micro_batch or share, share)
    return share // max(micro, 1), micro

def sum_over_ranks(*numbers, device):
    """The numbers, each summed over all ranks, as floats."""
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()

def next_batches(corpus, first, stop, cfg, device, rank, ranks):
    """The micro-batches of data-parallel rank `rank` of `ranks` of the global batch that begins at
    sequence `first`, on the device; their counts (n_...) are those of the global batch. None if
    any rank was told to stop."""
    steps, micro = split_batch(cfg, ranks)
    first += rank * steps * micro
    batches = [get_batch(corpus, first + i * micro, micro, cfg) for i in range(steps)]
    names = [name for name in batches[0] if name.startswith("n_")]
    sums = (sum(batch.pop(name) for batch in batches) for name in names)
    stop, *sums = sum_over_ranks(stop, *sums, device=device)
    if stop:
        return None
    copies = dist.get_world_size() // ranks  # ranks of other kinds of parallelism: the same counts
    counts = {name: count / copies for name, count in zip(names, sums)}
    return [{k: v.to(device) for k, v in batch.items()} | counts for batch in batches]

def accumulate_gradients(model, batches, cfg):
    """Adds the global batch's gradient to the parameters; returns this rank's part of the loss."""
    total, ranks = 0.0, dist.get_world_size()
    for i, batch in enumerate(batches):
        alone = ranks > 1 and i < len(batches) - 1  # ranks meet once, in the last micro-batch
        with model.no_sync() if alone else contextlib.nullcontext():
            loss, _ = objective(model, batch, cfg)
            (loss * ranks).backward()  # DDP averages over ranks what is an average already
        total += loss.detach()
    return total

@torch.no_grad()
def evaluate(model, batches, cfg):
    """This rank's part of the mean loss over a global batch, without dropout."""
    model.eval()
    loss = sum(objective(model, batch, cfg)[0] for batch in batches)
    model.train()
    return loss

def validate(loss_of, corpus, step, cfg, device, rank, ranks):
    """Prints nats per target and bits per byte of corpus; after training, lzma's bits as well.
    loss_of(batches) is this rank's part of the mean loss over a global batch."""
    nats = n_targets = n_bytes = 0.0
    n_batches = min(cfg.val_batches, corpus.n_windows(cfg.seq_len) // cfg.batch_size)
    for i in range(n_batches):
        first = i * cfg.batch_size
        batches = next_batches(corpus, first, False, cfg, device, rank, ranks)
        (loss,) = sum_over_ranks(loss_of(batches), device=device)
        nats += loss * batches[0]["n_targets"]
        n_targets += batches[0]["n_targets"]
        n_bytes += batches[0]["n_bytes"]
    bpb = f"{bits_per_byte(nats, n_bytes):.3f}".replace("nan", "n/a")
    line = f"val {step} | loss {nats / max(n_targets, 1):.4f} | bpb {bpb}"
    text = corpus.text(n_batches * cfg.batch_size * cfg.seq_len)
    if step == cfg.steps and text:
        line += f" | lzma {8 * len(lzma.compress(text, preset=9)) / len(text):.3f}"
    print(line, flush=True)

@torch.compiler.set_stance("force_eager")  # a compiled block would compile for every length
@torch.no_grad()
def sample(model, ids, n, known, cfg):
    """ids and n more, drawn at temperature 0.8 from the softmax over what known [V] allows."""
    model.eval()
    device = model.token_embedding.weight.device
    torch.manual_seed(cfg.seed)
    for _ in range(n):
        tokens = torch.tensor([ids[-(cfg.seq_len or cfg.context) :]], device=device)  # [1, T]
        with torch.autocast(device.type, torch.bfloat16, cfg.precision == "bf16"):
            logits = model(tokens)[0, -1].float().masked_fill(~known.to(device), -math.inf)  # [V]
        ids = ids + torch.multinomial((logits / 0.8).softmax(-1), 1).tolist()
    return ids

def check(cfg, ranks):
    """Raises ValueError for a configuration that cannot run on that many ranks."""
    for field in dataclasses.fields(cfg):
        low = 0 if field.default == 0 or field.type is float or field.name == "warmup_steps" else 1
        if field.type in (int, float) and not low <= getattr(cfg, field.name) < math.inf:
            raise ValueError(f"--{field.name} {getattr(cfg, field.name)} is not {low} or more")
    steps, micro = split_batch(cfg, ranks)
    for wrong, message in (
        (cfg.dim % cfg.n_heads, f"{cfg.n_heads} heads do not divide the width {cfg.dim}"),
        (cfg.seq_len > cfg.context, f"--seq_len {cfg.seq_len} exceeds --context {cfg.context}"),
        (cfg.dropout >= 1, f"--dropout {cfg.dropout} leaves nothing"),
        (ranks * steps * micro != cfg.batch_size,
         f"--batch_size {cfg.batch_size} is not {ranks} ranks x micro-batches of {micro}"),
        (cfg.resume and not cfg.out, "--resume needs --out"),
        (cfg.export and cfg.hidden_dim != 4 * cfg.dim, "--export: the class has F = 4 D"),
        ((cfg.init or cfg.export) and not importlib.util.find_spec("safetensors"),
         "--init and --export need the package safetensors: pip install safetensors"),
        (cfg.write_tokens and ranks > 1, "--write_tokens is for one process, without torchrun"),
        ((cfg.write_tokens or cfg.standardize) and shard_paths(cfg.data),
         "--write_tokens and --standardize take text, and --data is token shards"),
    ):
        if wrong:
            raise ValueError(message)

def dry_run(cfg):
    """Prints parameters, FLOPs per token and bytes per rank, from shapes alone."""
    cfg.vocab_size = cfg.vocab_size or load_tokenizer(cfg.tokenizer or "bytes", SPECIALS).n_vocab
    check(cfg, cfg.world_size)
    with torch.device("meta"):
        total, activated = count_parameters(GPT1(cfg))
    print(f"parameters {total:,} | activated {activated:,}")
    print(f"FLOPs per token {flops_per_token(cfg):.4g} | 6 N gives {6 * activated:.4g}")
    memory = memory_per_rank(cfg)
    for kind, size in (memory | {"sum": sum(memory.values())}).items():
        print(f"{kind:12} {size / 2**30:8.3f} GiB on each of {cfg.world_size} ranks")

def train(model, optimizer, corpus, heldout, state, cfg, device):
    """Updates until cfg.steps, or until SIGTERM or SIGINT; state says how far it came."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("dp",))
    replicas, loss_of = parallelize(model, cfg, mesh), functools.partial(evaluate, model, cfg=cfg)
    signals, saved, skipped, pace = [], state["step"], 0, 0.0
    handlers = {s: signal(s, lambda *_: signals.append(1)) for s in (SIGTERM, SIGINT)}
    while state["step"] < cfg.steps:
        if state["step"] % cfg.val_every == 0:
            validate(loss_of, heldout, state["step"], cfg, device, rank, ranks)
        started = time.perf_counter()
        first = state["sequences"] + state["offset"]
        batches = next_batches(corpus, first, bool(signals), cfg, device, rank, ranks)
        if batches is None:
            break
        torch.manual_seed(stable_hash(cfg.seed, state["step"], rank))  # of dropout
        loss = accumulate_gradients(replicas, batches, cfg)
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf).item()
        lr = learning_rate(state["step"], cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        finite = math.isfinite(norm)  # the same on all ranks; a loss that is not finite shows here
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1
        state["sequences" if finite else "offset"] += cfg.batch_size
        state["tokens"] += finite * cfg.batch_size * cfg.seq_len
        seconds = time.perf_counter() - started
        pace = 0.9 * (pace or seconds) + 0.1 * seconds
        if state["step"] % cfg.log_every == 0 or state["step"] in (1, cfg.steps):
            (loss,) = sum_over_ranks(loss, device=device)
            bpb = bits_per_byte(loss * batches[0]["n_targets"], batches[0]["n_bytes"])
            row = {"step": state["step"], "loss": loss, "bpb": bpb, "lr": lr, "grad": norm}
            log_step({**row, "tokens": state["tokens"]}, pace, cfg, device)
        skipped = 0 if finite else skipped + 1
        if skipped:
            print(f"step {state['step']} skipped: its gradient is not finite", flush=True)
        if skipped == 3:
            raise ValueError(f"three steps to {state['step']} had no finite gradient")
        if cfg.out and state["step"] % cfg.save_every == 0:
            save_checkpoint(cfg.out, model, optimizer, state)
            saved = state["step"]
    if cfg.out and saved < state["step"]:
        save_checkpoint(cfg.out, model, optimizer, state)
    for signum, handler in handlers.items():
        signal(signum, handler)

@record
def main(argv=None):
    """Reads the command line and the data, builds or resumes the run, trains, exports, samples."""
    with one_line_mistakes():
        cfg = parse(argv)
        if cfg.dry_run:
            return dry_run(cfg)
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        check(cfg, ranks)
        if cfg.init:
            source, theirs = from_hf(cfg.init)
            shape = {name: getattr(theirs, name) for name in (*HF_CONFIG, "hidden_dim")}
            cfg = dataclasses.replace(cfg, **shape)
            check(cfg, ranks)
        documents = read_documents(cfg.data)
        if cfg.standardize:
            documents = ((name, standardize(text)) for name, text in documents)
        known = cfg.tokenizer or not shard_paths(cfg.data)
        tokenizer = load_tokenizer(cfg.tokenizer or "bytes", SPECIALS) if known else None
        documents = tokenize(documents, tokenizer)
        if cfg.write_tokens:
            return write_tokens(cfg.write_tokens, documents)
        device = launch(cfg.timeout)
        for folder in filter(None, (cfg.out, cfg.export)):
            Path(folder).mkdir(parents=True, exist_ok=True)
        cfg.seq_len = cfg.seq_len or cfg.context
        sizes, tokens = (cfg.vocab_size, cfg.batch_size, cfg.seq_len), cfg.batch_size * cfg.seq_len
        corpus, heldout = load_corpora(cfg.data, documents, tokenizer, *sizes)
        cfg.vocab_size, windows = corpus.vocab_size, corpus.n_windows(cfg.seq_len)
        # Undisclosed: the number of updates; it follows from the 100 epochs.
        cfg.steps = cfg.steps or math.ceil(cfg.epochs * windows / cfg.batch_size)

        model = GPT1(cfg)
        init_weights(model, cfg)
        if cfg.init:
            model.load_state_dict(source.state_dict())
        optimizer = build_optimizer(model.to(device), cfg)
        state = {"step": 0, "sequences": 0, "tokens": 0, "offset": 0, "seed": cfg.seed}
        if cfg.out:
            load_checkpoint(cfg.out, cfg.resume, cfg.steps, model, optimizer, state)
        if cfg.out and dist.get_rank() == 0:
            config = json.dumps(dataclasses.asdict(cfg), indent=2)
            (Path(cfg.out) / "config.json").write_text(config + "\n")
        (total, activated), (steps, micro) = count_parameters(model), split_batch(cfg, ranks)
        print(f"python {sys.version.split()[0]} | torch {torch.__version__} |", end=" ")
        print(f"{device.type} {cfg.precision} | {windows:,} windows to train on")
        print(f"parameters {total:,} | activated {activated:,} | FLOPs per token", end=" ")
        print(f"{flops_per_token(cfg):.3g} | tokens per step {tokens:,}", end=" ")
        print(f"= {ranks} ranks x {steps} x {micro} sequences of {cfg.seq_len}", flush=True)
        train(model, optimizer, corpus, heldout, state, cfg, device)
        if state["step"] < cfg.steps:
            return print(f"stopped by a signal after step {state['step']}", flush=True)
        loss_of = functools.partial(evaluate, model, cfg=cfg)
        validate(loss_of, heldout, cfg.steps, cfg, device, dist.get_rank(), ranks)
        if cfg.export and dist.get_rank() == 0:
            to_hf(model, cfg, cfg.export)
        if tokenizer and dist.get_rank() == 0:
            prompt = standardize(cfg.prompt) if cfg.standardize else cfg.prompt
            ids = tokenizer.encode_ordinary(prompt or heldout.text(32).decode(errors="ignore"))
            known = torch.from_numpy(heldout.token_bytes[: cfg.vocab_size] > 0)
            print(tokenizer.decode(sample(model, ids, 256, known, cfg)), flush=True)

# ---------------------------------------- Plumbing ----------------------------------------

@contextlib.contextmanager
def one_line_mistakes():
    """Only rank 0 prints; what the user can mend is one line on stderr and exit status 2."""
    rank = int(os.environ.get("RANK", 0))
    try:
        with contextlib.redirect_stdout(open(os.devnull, "w") if rank else sys.stdout):
            yield
    except (OSError, ValueError) as error:
        time.sleep(5 * (rank > 0))  # where rank 0 fails too, torchrun ends the others meanwhile
        print(f"{Path(__file__).name}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    finally:  # a rank that fails among others leaves at once: it must not wait for them here
        if dist.is_initialized() and (dist.get_world_size() == 1 or not sys.exc_info()[0]):
            dist.destroy_process_group()

def parse(argv):
    """Config from the command line: a preset, and the flags given over it."""

    def mistake(message):
        raise ValueError(message)

    usage, summary = "%(prog)s [--preset NAME] [--FLAG VALUE ...]", __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(usage=usage, description=summary, allow_abbrev=False)
    parser.error = mistake
    preset = "small" if torch.cuda.is_available() else "demo"
    parser.add_argument("--preset", choices=PRESETS, default=preset, help=f"(default: {preset})")
    meanings = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Config), re.M))
    for field in dataclasses.fields(Config):
        kind = dict(type=field.type)
        if field.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        elif get_args(field.type):
            kind = dict(choices=get_args(field.type))
        about = f"{meanings[field.name]} (default: {field.default!r})"
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=about, **kind)
    flags = vars(parser.parse_args(argv))
    cfg = Config(**(PRESETS[flags.pop("preset")] | flags))
    if cfg.precision == "auto":
        cfg.precision = "bf16" if torch.cuda.is_available() else "fp32"
    return cfg

def launch(timeout):
    """This rank's device, after joining torchrun's process group, or one of a single rank."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "TORCHELASTIC_RESTART_COUNT": 0}
    rank, ranks, local, restarts = (int(os.environ.get(k, v)) for k, v in names.items())
    store, device, backend = dist.HashStore(), torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ValueError(f"rank {local} of this machine finds {torch.cuda.device_count()} GPUs")
        device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    if ranks > 1:  # a name for each restart: its workers must not meet the addresses of the dead
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store = dist.TCPStore(*address, is_master=hosts)
        store = dist.PrefixStore(f"start {restarts}", store)
    limit = timedelta(seconds=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=limit)
    return device

def log_step(row, pace, cfg, device):
    """Prints row, which has step, loss, bpb, lr, grad and tokens, and what the script adds to them,
    and writes it to metrics.jsonl; pace is how many seconds a step has taken of late."""
    step, speed = row["step"], cfg.batch_size * cfg.seq_len / pace
    left = round((cfg.steps - step) * pace)
    unit, mfu = 1 if sys.platform == "darwin" else 1024, ""
    memory = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
        peak = dist.get_world_size() * PEAK_FLOPS.get(torch.cuda.get_device_name(device), math.inf)
        if cfg.precision == "bf16" and peak < math.inf:
            mfu = f"mfu {speed * flops_per_token(cfg) / peak:.1%} | "
    bpb = f"{row['bpb']:.3f}".replace("nan", "n/a")
    more = "".join(f"{name} {value} | " for name, value in list(row.items())[6:])
    print(
        f"step {step}/{cfg.steps} | loss {row['loss']:.4f} | bpb {bpb} | "
        f"lr {row['lr']:.2e} | grad {row['grad']:.2f} | tokens {row['tokens'] / 1e6:.1f}M | "
        f"{more}{speed / 1e3:.1f}k tok/s | {mfu}mem {memory / 2**30:.1f}G | "
        f"eta {left // 60}:{left % 60:02}", flush=True,
    )  # fmt: skip
    if cfg.out and dist.get_rank() == 0:
        finite = {k: None if str(v) in ("nan", "inf", "-inf") else v for k, v in row.items()}
        with open(Path(cfg.out) / "metrics.jsonl", "a") as file:
            print(json.dumps(finite), file=file)

def bits_per_byte(nats, n_bytes):
    """nats over n_bytes of text in bits per byte; NaN, printed as n/a, if n_bytes is unknown."""
    return nats / math.log(2) / n_bytes if n_bytes else math.nan

def stable_hash(*key):
    """64 bits that depend on the key alone: the seed of all that is drawn."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")

def shuffled(index, n, key):
    """The image of index under a permutation of range(n) that key names: a Feistel network on the
    bits of n, walked until it lands below n, which needs no memory however large n is."""
    half = (n.bit_length() + 1) // 2
    while True:
        left, right = divmod(index, 1 << half)
        for i in range(4):
            left, right = right, left ^ stable_hash(key, i, right) % (1 << half)
        index = (left << half) + right
        if index < n:
            return index

class Corpus:
    """Token streams, in memory or memory-mapped, one array a part. Documents end with `separator`
    (-1: unknown); token_bytes [V] is the length of each id's text (0: unknown)."""

    def __init__(self, parts, tokenizer, vocab_size, in_order):
        self.parts, self.tokenizer, self.in_order = parts, tokenizer, in_order
        self.vocab_size, n_vocab = vocab_size, tokenizer.n_vocab if tokenizer else 0
        self.token_bytes = np.zeros(max(vocab_size, n_vocab), np.int64)
        self.separator = end_token(tokenizer) if tokenizer else -1
        for text, i in tokenizer._mergeable_ranks.items() if tokenizer else ():
            self.token_bytes[i] = len(text)

    def n_windows(self, length):
        """Windows of length + 1 ids in an epoch."""
        return sum(max(len(part) // length - 1, 0) for part in self.parts)

    def window(self, index, length, seed):
        """Window `index` of the run, length + 1 ids. An epoch has each window once, in an order and
        at a phase (ids before the first window) of its own; in_order, it has neither."""
        n = self.n_windows(length)
        epoch, index = divmod(index, n)
        phase = 0 if self.in_order else stable_hash(seed, epoch) % length
        index = index if self.in_order else shuffled(index, n, (seed, epoch))
        for part in self.parts:
            n = max(len(part) // length - 1, 0)
            if index < n:
                break
            index -= n
        start = phase + index * length
        ids = part[start : start + length + 1].astype(np.int64)
        strange = ids[(ids >= self.vocab_size) & (ids != self.separator)]
        if len(strange):
            raise ValueError(f"the data has token id {strange[0]}, but V is {self.vocab_size}")
        return ids

    def text(self, n):
        """The text of the first n ids as bytes; nothing where the tokenizer is unknown."""
        ids = np.concatenate([part[:n] for part in self.parts])[:n]
        ids = ids[self.token_bytes[ids] > 0].tolist()
        return self.tokenizer.decode_bytes(ids) if self.tokenizer else b""

def load_corpora(path, documents, tokenizer, vocab_size, batch_size, length):
    """(training, held-out) Corpus. Held out is the end of the stream: one document in twenty, since
    they come in the order of their hashes; of shards or a single document, the last 5 %."""
    parts, cut = [open_shard(file) for file in shard_paths(path)], 0
    vocab_size = vocab_size or (tokenizer.n_vocab if tokenizer else 0)
    if vocab_size <= max(tokenizer._mergeable_ranks.values() if tokenizer else [0]):
        raise ValueError(f"--vocab_size {vocab_size} is too small, or --tokenizer is missing")
    if not parts:
        hashed = sorted(((stable_hash(name), ids) for name, ids in documents), key=lambda x: x[0])
        cut = sum(len(ids) for key, ids in hashed if key < 0.95 * 2**64)
        parts = [np.concatenate([ids for _, ids in hashed] or [np.zeros(0, np.uint16)])]
    total, least = sum(map(len, parts)), (batch_size + 1) * length
    if min(cut, total - cut) < least:
        cut = max(total - max(total // 20, least), 0)
    train, held = [], []
    for part in parts:
        train.append(part[:cut])
        held.append(part[cut:])
        cut = max(cut - len(part), 0)
    train = Corpus(train, tokenizer, vocab_size, in_order=False)
    held = Corpus(held, tokenizer, vocab_size, in_order=True)
    if min(train.n_windows(length), held.n_windows(length)) < batch_size:
        raise ValueError(
            f"{path} is too short: {total:,} tokens in {len(parts)} parts do not hold a batch of "
            f"{batch_size} x {length} to train on and another to hold out"
        )
    return train, held

def read_documents(path):
    """(name, text) of each document: a file (.txt, .md, .py), a line of a .jsonl file, or all of a
    directory or a pattern; without a path, the modules of Python's standard library."""
    root = Path(path or sysconfig.get_paths()["stdlib"])
    kinds = (".txt", ".md", ".py", ".jsonl") if path else (".py",)
    skip = set() if path else {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    files = list_files(root, skip)
    if not root.is_dir():  # names are relative to the directory before the pattern
        root = Path(re.split(r"[*?[]", f"{root}")[0] + "*").parent
    if files != [Path(path)]:
        files = [file for file in files if file.suffix in kinds and file.is_file()]
    if not files:
        raise ValueError(f"{path or root} has no file of {', '.join(kinds)}")
    for file in files:
        where, wanted = file, "UTF-8 text"
        try:
            if file.suffix != ".jsonl":
                text = file.read_text("utf-8", errors="strict" if path else "ignore")
                yield file.relative_to(root).as_posix(), text
                continue
            for number, line in enumerate(file.open("rb"), 1):
                if not line.strip():
                    continue
                where, wanted = f"{file}, line {number},", 'a JSON object with a string "text"'
                text = json.loads(line)["text"]
                if not isinstance(text, str):
                    raise TypeError(f"it is {text!r:.40}")
                yield text, text
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where} is not {wanted}: {error}") from error

def load_tokenizer(name, specials):
    """tiktoken.Encoding of the 256 `bytes`, of one of tiktoken's own names or of a file of ranks,
    with those special tokens that it lacks behind its last id."""
    known = {}
    try:
        if name == "bytes":
            pattern, ranks = r"[\s\S]", {bytes([i]): i for i in range(256)}
        elif os.path.isfile(name):  # tiktoken's own loader would cache the first file of a name
            pattern, lines = PATTERN, Path(name).read_bytes().splitlines()
            ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
        else:
            base = tiktoken.get_encoding(name)
            pattern, ranks, known = base._pat_str, base._mergeable_ranks, base._special_tokens
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer {name}: no file of ranks, and not to be had") from error
    if not all(bytes([i]) in ranks for i in range(256)):
        raise ValueError(f"tokenizer {name} lacks some of the 256 single bytes")
    if len(set(ranks.values())) < len(ranks) or min(ranks.values()) < 0:
        raise ValueError(f"tokenizer {name} has a rank twice, or one below 0")
    for token in specials:
        known = {token: max([*ranks.values(), *known.values()]) + 1} | known
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=known)

def end_token(tokenizer):
    """The id that ends a document: the tokenizer's own <|endoftext|> if it has one, or END."""
    return tokenizer._special_tokens.get("<|endoftext|>", tokenizer._special_tokens[END])

def tokenize(documents, tokenizer):
    """(name, ids between BEGIN, where the tokenizer has it, and END) of each (name, text)."""
    kind = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    begin = [i for token, i in tokenizer._special_tokens.items() if token == BEGIN]
    end = [end_token(tokenizer)]
    for name, text in ((name, text) for name, text in documents if text):
        ids = tokenizer.encode_to_numpy(text, disallowed_special=())
        yield name, np.concatenate((begin, ids, end)).astype(kind)

def write_tokens(folder, documents):
    """Writes tokenized documents to folder as .npy shards of 2**27 ids or a document more."""
    if shard_paths(folder):
        raise ValueError(f"--write_tokens: {folder} has shards already")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for n in itertools.count():
        shard, size = [], 0
        while size < 2**27 and (document := next(documents, None)):
            shard.append(document[1])
            size += len(document[1])
        if not shard:
            return print(f"{n} shards in {folder}", flush=True)
        np.save(Path(folder) / f"tokens_{n:05d}.npy", np.concatenate(shard))

def list_files(path, skip=frozenset()):
    """The files at path, in order: a file, all below a directory but what lies in folders named in
    skip, or those of a pattern."""
    if os.path.isdir(path):
        found = []
        for folder, folders, files in os.walk(path):
            folders[:] = set(folders) - skip
            found += (Path(folder, file) for file in files)
        return [file for file in sorted(found) if file.is_file()]
    return [Path(file) for file in sorted(glob.glob(str(path), recursive=True)) or [path]]

def shard_paths(path):
    """The token shards at path, if it is not empty, in order."""
    files = list_files(path) if path else []
    return [file for file in files if file.suffix in (".npy", ".bin")]

def open_shard(path):
    """Memory-maps a shard: .npy of uint16 or uint32, or .bin, uint16 behind 256 int32 of header."""
    if path.suffix == ".npy":
        try:
            ids = np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is no .npy file: {error}") from error
        if ids.ndim != 1 or ids.dtype not in (np.uint16, np.uint32):
            raise ValueError(f"{path} is {ids.dtype} {ids.shape}, not one row of uint16 or uint32")
        return ids
    header = np.fromfile(path, np.int32, 256)
    if len(header) < 256 or (header[0], header[1]) != (20240520, 1):
        raise ValueError(f"{path} has not the header of a .bin shard")
    if path.stat().st_size != 1024 + 2 * int(header[2]):
        raise ValueError(f"{path} is longer or shorter than the {header[2]} tokens of its header")
    return np.memmap(path, np.uint16, "r", 1024)

if __name__ == "__main__":
    main()
