r"""Improving Language Understanding by Generative Pre-Training (Radford et al., 2018) in one file.

What is new compared with its parent, the Transformer (Vaswani et al., 2017):
- a decoder-only Transformer, trained as a language model on unlabelled books (§3.1, Eq. 1, 2);
- learned position embeddings (§4.1), added once; no scaling of embeddings by sqrt(D) (Eq. 2);
- GELU in place of ReLU, weights drawn from N(0, 0.02) (§4.1); a bias on every projection (code);
- dropout 0.1 on embeddings, residual branches and attention probabilities (§4.1);
- Adam with decoupled weight decay, 2000 updates of warm-up, then a cosine to zero (§4.1);
- no label smoothing.
Kept: the norm follows each residual sum (post-norm); there is no final norm after the blocks.
"Code" and "released" mean openai/finetune-transformer-lm; the pre-training code was never released.

Map: Eq. 1 objective | Eq. 2 GPT1, Block | §4.1 PRESETS["gpt1"], init_weights, build_optimizer,
learning_rate, get_batch (sequences of 512 tokens).
Legend: B batch, T positions, D width, H heads, E = D / H, F hidden width, V vocabulary.
Conventions: T + 1 tokens give T inputs and T targets; loss in nats per target; a target of -100
is not scored.

Run: python gpt1.py                         # a laptop: the preset demo
     torchrun --nproc_per_node=8 gpt1.py    # GPUs: the preset small
     torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \
         gpt1.py --preset gpt1 --data books/ --tokenizer ranks.tiktoken --out /shared/gpt1 --resume
     (ranks.tiktoken: a BPE rank file of at most 40,478 entries, such as gpt3.py learns)
Expect: the demo takes one to two minutes on two CPU cores; its held-out loss falls from 7.68 to
2.33 bits per byte, and it ends with a sample that looks like Python.
"""

import argparse
import base64
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
import socket
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from signal import SIG_DFL, SIGINT, SIGTERM, signal
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
from torch.utils.checkpoint import checkpoint

# ---------------------------------------- Config ----------------------------------------

@dataclasses.dataclass
class Config:
    """Run configuration: each field is a command-line flag, and its comment is the flag's help."""

    # Model, §4.1 "Model specifications"
    vocab_size: int = 0  # V, vocabulary size; 0: that of the tokenizer
    seq_len: int = 512  # T, sequence length in tokens, and number of positions of the model
    dim: int = 768  # D, width of the residual stream
    n_layers: int = 12  # number of blocks
    n_heads: int = 12  # H, number of attention heads
    hidden_dim: int = 3072  # F, width of the feed-forward layer
    dropout: float = 0.1  # dropout of embeddings, residual branches and attention probabilities
    # Data
    data: str = ""  # file or directory of text or token shards; empty: Python's standard library
    tokenizer: str = ""  # "bytes", a tiktoken encoding or a BPE rank file; empty: bytes, for text
    # Optimization, §4.1
    batch_size: int = 64  # sequences per update, over all ranks
    micro_batch: int = 0  # sequences per forward pass on one rank; 0: as many as the batch allows
    epochs: float = 100.0  # passes over the training data; as a flag, replaces a preset's steps
    steps: int = 0  # updates of the run; 0: as many as --epochs needs
    lr: float = 2.5e-4  # peak learning rate
    warmup_steps: int = 2000  # updates of linear warm-up; cut to a tenth of the run if longer
    weight_decay: float = 0.01  # decoupled weight decay of matrices and embeddings
    clip: float = 1.0  # maximum norm of the gradient; 0: no clipping
    seed: int = 0  # seed of the weights, the order of the data and dropout
    # Machine
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    compile: bool = False  # compile each block with torch.compile
    recompute: Literal["none", "block"] = "none"  # block: recompute blocks in the backward pass
    timeout: int = 600  # timeout of a collective, in seconds
    dry_run: bool = False  # print parameters, FLOPs and memory per rank, then exit
    world_size: int = 1  # number of ranks that --dry_run plans for
    # Reports and files
    log_every: int = 10  # updates between log lines
    val_every: int = 1000  # updates between validations
    val_batches: int = 16  # maximum number of batches per validation
    prompt: str = ""  # text that the sample continues; empty: the start of the held-out text
    out: str = ""  # directory of checkpoints, metrics.jsonl and config.json; empty: write nothing
    save_every: int = 1000  # updates between checkpoints
    resume: bool = False  # continue from the newest checkpoint in --out, if there is one
    eval: bool = False  # validate and sample the model of --init or --out, without training
    init: str = ""  # Hugging Face checkpoint directory to start from; it sets the model's sizes
    export: str = ""  # directory to write a Hugging Face checkpoint to after training
    write_tokens: str = ""  # directory to write the data to as token shards, then exit

PRESETS = {
    # For a CPU, about a minute. Two blocks, because deep post-norm models learn slowly at first; no
    # dropout, because the run is shorter than an epoch; 24 sequences, to run on 1-4, 6 or 8 ranks.
    "demo": dict(
        seq_len=128, dim=96, n_layers=2, n_heads=3, hidden_dim=384, dropout=0.0, batch_size=24,
        steps=1200, lr=6e-3, warmup_steps=100, log_every=50,
    ),
    # The paper's model over bytes: minutes on one GPU of 24 GB or a node of them.
    "small": dict(micro_batch=16, steps=1500, warmup_steps=150, compile=True, val_every=500),
    # §4.1: 12 blocks of width 768, 512 positions, batch 64, 100 epochs; 116,534,784 parameters.
    "gpt1": dict(vocab_size=40478, micro_batch=16, compile=True),
}  # fmt: skip
# Departure: bytes or a byte-level BPE instead of the paper's 40,000 merges on lower-cased spaCy
# tokens; no cleaning with ftfy; by default Python's standard library instead of BooksCorpus, which
# is withdrawn. Perplexities are not comparable with the paper's 18.4.
# Undisclosed: the held-out split. About 5 % of the documents are held out, see load_corpora.
PATTERN = (  # how GPT-2, and gpt3.py when it learns ranks, split text, for BPE rank files
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)

# ---------------------------------------- Model ----------------------------------------

class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention, softmax(q kᵀ / sqrt(E)) v, [B, T, D] -> [B, T, D], with
    dropout on the probabilities and on the output (§4.1)."""

    # Departure: later keys have the score -inf; the released code gives them -1e9.

    def __init__(self, dim, n_heads, dropout):
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.n_heads, -1))  # [B, T, 3, H, E]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, T, E] each
        p = self.dropout if self.training else 0.0
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)  # [B, H, T, E]
        x = self.out(o.transpose(1, 2).flatten(2))  # [B, T, D]
        return F.dropout(x, self.dropout, self.training)

class MLP(nn.Module):
    """GELU(x W_up + b_up) W_down + b_down, with dropout, [B, T, D] -> [B, T, D] (§4.1)."""

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
    """transformer_block of Eq. 2, [B, T, D] -> [B, T, D]; a norm follows each residual sum."""

    def __init__(self, cfg):
        super().__init__()
        self.attn = CausalSelfAttention(cfg.dim, cfg.n_heads, cfg.dropout)
        # Undisclosed: the norms' eps. It is the released code's.
        self.norm1 = nn.LayerNorm(cfg.dim, eps=1e-5)
        self.mlp = MLP(cfg.dim, cfg.hidden_dim, cfg.dropout)
        self.norm2 = nn.LayerNorm(cfg.dim, eps=1e-5)

    def forward(self, x):
        n = self.norm1(x + self.attn(x))
        return self.norm2(n + self.mlp(n))

class GPT1(nn.Module):
    """Eq. 2, tokens [B, T] -> logits [B, T, V]; the output projection is the embedding W_e."""

    def __init__(self, cfg):
        super().__init__()
        self.dropout = cfg.dropout
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.dim)  # W_e
        self.position_embedding = nn.Embedding(cfg.seq_len, cfg.dim)  # W_p
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))

    def forward(self, tokens):
        positions = self.position_embedding.weight[: tokens.shape[1]]  # [T, D]
        x = self.token_embedding(tokens) + positions  # Eq. 2, h_0 = U W_e + W_p: [B, T, D]
        # Undisclosed: what embedding dropout drops. The released code drops entries of the tables,
        # in the output projection, too; here dropout acts on the sum of the embeddings.
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)  # Eq. 2, h_l = transformer_block(h_{l-1})
        return F.linear(x, self.token_embedding.weight)  # Eq. 2, h_n W_eᵀ: [B, T, V]

def init_weights(model, cfg):
    """Draw matrices and embeddings from a normal distribution of mean 0 and standard deviation
    0.02 (§4.1); set biases to 0 and gains to 1 (code).

    Each parameter is drawn from a generator seeded by (seed, name), so that every layout
    starts from the same numbers. Raises ValueError for a parameter without a rule.
    """
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
    """(total, activated) parameters; tied weights count once, a dense model activates all."""
    total = sum(p.numel() for p in model.parameters())
    return total, total

def flops_per_token(cfg):
    """Training FLOPs per token: 2 per weight of a matrix product forward, twice that backward.
    Attention counts as causal, (T + 1) / 2 keys per query, half of what the full square gives."""
    weights = cfg.n_layers * (4 * cfg.dim**2 + 2 * cfg.dim * cfg.hidden_dim)
    attention = cfg.n_layers * 2 * cfg.dim * (cfg.seq_len + 1) / 2  # q kᵀ and softmax(...) v
    return 6 * (weights + attention + cfg.vocab_size * cfg.dim)

# ---------------------------------------- Data ----------------------------------------

def get_batch(corpus, first, n, cfg):
    """Sequences first ... first + n - 1 of the run: tokens and targets [n, T], and their counts.

    A pure function of the seed and the index, so that any number of ranks, any accumulation and
    any resume see the same sequences. n_targets counts targets, n_bytes the bytes of their text.
    """
    # Undisclosed: where the "randomly sampled, contiguous sequences" begin. An epoch reads
    # consecutive windows, from a random offset and in random order; they may cross books. T + 1
    # tokens give T targets (the released code scores T - 1 targets of T tokens).
    tokens = torch.zeros(n, cfg.seq_len, dtype=torch.int64)
    targets = torch.full_like(tokens, -100)
    for row in range(n):
        window = torch.from_numpy(corpus.window(first + row, cfg.seq_len, cfg.seed))  # [T + 1]
        # The paper's vocabulary has no separator: separators are removed, the target after a
        # separator is not scored, and the row is padded at its end.
        (kept,) = torch.where(window != corpus.separator)
        adjacent = kept.diff() == 1
        length = len(adjacent)
        tokens[row, :length] = window[kept[:-1]]
        targets[row, :length] = torch.where(adjacent, window[kept[1:]], -100)
    scored = targets[targets >= 0].numpy()
    counts = {"n_targets": len(scored), "n_bytes": int(corpus.token_bytes[scored].sum())}
    return {"tokens": tokens, "targets": targets, **counts}

# ---------------------------------------- Objective ----------------------------------------

def objective(model, batch, cfg):
    """Eq. 1 as a loss: the sum of -log P(u_i | u_{i-k} ... u_{i-1}) over the batch's targets,
    divided by batch["n_targets"], the count of the whole global batch. There are no metrics."""
    with torch.autocast(batch["tokens"].device.type, torch.bfloat16, cfg.precision == "bf16"):
        logits = model(batch["tokens"]).float().flatten(0, 1)  # [B T, V]
    nats = F.cross_entropy(logits, batch["targets"].flatten(), reduction="sum")  # Eq. 1, -L1
    return nats / max(batch["n_targets"], 1), {}

# ---------------------------------------- Optimizer ----------------------------------------

def build_optimizer(model, cfg):
    """§4.1: Adam, with the "modified L2" of Loshchilov and Hutter on all weights that are neither
    bias nor gain, embeddings included."""
    groups = [
        dict(params=[p for p in model.parameters() if p.ndim > 1], weight_decay=cfg.weight_decay),
        dict(params=[p for p in model.parameters() if p.ndim <= 1], weight_decay=0.0),
    ]
    # Undisclosed: betas, eps and clipping; these and --clip 1 are the released fine-tuning's.
    # Departure: the released Adam adds eps to the uncorrected sqrt(v) and applies the bias
    # correction to the weight decay, too; torch's AdamW does neither.
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)

def learning_rate(step, cfg):
    """§4.1: linear from 0, then a cosine to 0; step counts updates, as sequences / batch_size."""
    # Undisclosed: the cosine's span. As in the released code it is the whole run, so that after
    # the warm-up it begins a little below the peak.
    if cfg.warmup_steps and step <= cfg.warmup_steps:
        return cfg.lr * step / cfg.warmup_steps
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * min(step / cfg.steps, 1)))

# ---------------------------------------- Precision ----------------------------------------

# Parameters, gradients and Adam's moments are fp32. Under bf16, autocast (in objective) runs matrix
# products (those of the logits included), attention and GELU in bf16; norms, residual sums and
# the loss are computed in fp32.
# Undisclosed: the paper's precision. The released code is fp32 throughout: --precision fp32.

PEAK_FLOPS = {"bf16": {  # dense, by precision and the device's exact name; others get no MFU
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA B200": 2250e12,
}}  # fmt: skip

# ---------------------------------------- Parallelism ----------------------------------------

def parallelize(model, cfg, mesh):
    """Synchronous data parallelism, as released: ranks hold copies and average gradients.
    Recomputation and compilation are applied to the blocks first."""
    for block in model.blocks:
        if cfg.recompute == "block":
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if cfg.compile:
            torch.compiler.config.fail_on_recompile_limit_hit = True
            block.compile(dynamic=False)
    if mesh.size() == 1:
        return model
    # static_graph is faster, but gives wrong gradients when gradients are accumulated.
    static_graph = split_batch(cfg, mesh.size())[0] == 1
    options = {"gradient_as_bucket_view": True, "static_graph": static_graph}
    return nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group(), **options)

# ---------------------------------------- Checkpoint ----------------------------------------

HF_CONFIG = {  # field of Config: (key in config.json, default of OpenAIGPTConfig)
    "vocab_size": ("vocab_size", 40478), "seq_len": ("n_positions", 512), "dim": ("n_embd", 768),
    "n_layers": ("n_layer", 12), "n_heads": ("n_head", 12),
}  # fmt: skip
HF_FIXED = {  # the only values that are supported
    "model_type": "openai-gpt", "afn": "gelu", "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}  # fmt: skip
HF_NAMES = {  # part of a parameter's name here: its name in OpenAIGPTLMHeadModel
    "token_embedding": "tokens_embed", "position_embedding": "positions_embed", "blocks": "h",
    "attn.qkv": "attn.c_attn", "attn.out": "attn.c_proj", "norm1": "ln_1", "norm2": "ln_2",
    "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
}  # fmt: skip
SHAPE = (*HF_CONFIG, "hidden_dim")  # fields of Config that must agree with a checkpoint

def hf_tensors(model):
    """(Hugging Face's name, view of the tensor in Hugging Face's layout) of each parameter."""
    for name, p in model.named_parameters():
        for ours, theirs in HF_NAMES.items():
            name = name.replace(ours, theirs)
        yield name, p.data.T if ".c_" in name and p.ndim == 2 else p.data  # Conv1D is [in, out]

def from_hf(path):
    """(model, cfg) from the checkpoint directory of an OpenAIGPTLMHeadModel."""
    with explain(f"{path} holds no OpenAIGPTLMHeadModel", Exception):
        cfg = Config(**read_hf_config(path, HF_CONFIG, HF_FIXED))
        cfg.hidden_dim = 4 * cfg.dim
        model = GPT1(cfg)
        tensors = {k.removeprefix("transformer."): v for k, v in read_hf_tensors(path).items()}
        for name, tensor in hf_tensors(model):
            if tensors[name].shape != tensor.shape:
                raise ValueError(f"{name} is {list(tensors[name].shape)}, not {list(tensor.shape)}")
            tensor.copy_(tensors[name])
    return model, cfg

def to_hf(model, cfg, path):
    """Write model to the directory path as an OpenAIGPTLMHeadModel."""
    from safetensors.torch import save_file

    config = {key: getattr(cfg, field) for field, (key, _) in HF_CONFIG.items()} | HF_FIXED
    config |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), cfg.dropout)
    config["architectures"] = ["OpenAIGPTLMHeadModel"]
    tensors = {f"transformer.{k}": v.cpu().contiguous() for k, v in hf_tensors(model)}
    with written_beside(path) as folder:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

def read_hf_config(path, fields, fixed):
    """Fields of Config from the config.json of a Hugging Face checkpoint directory.

    fields: {field: (key, default of Hugging Face's class)}; fixed: {key: the only value that is
    supported}. Raises ValueError, with the key's name, for another value.
    """
    theirs = json.loads((Path(path) / "config.json").read_text())
    for key, value in fixed.items():
        if theirs.get(key) not in (None, value):
            raise ValueError(f"{path}: config.json has {key} {theirs[key]!r}, not {value!r}")
    return {field: theirs.get(key, default) for field, (key, default) in fields.items()}

def read_hf_tensors(path):
    """{name: tensor} of model.safetensors or, without it, of the files that the index names."""
    from safetensors.torch import load_file

    files = {"model.safetensors"}
    if not (Path(path) / "model.safetensors").exists():
        index = json.loads((Path(path) / "model.safetensors.index.json").read_text())
        files = set(index["weight_map"].values())
    return {name: tensor for file in files for name, tensor in load_file(Path(path) / file).items()}

@contextlib.contextmanager
def written_beside(path):
    """Yield a temporary directory beside path, and rename it to path at the end if no error
    occurred; path must not exist or must be an empty directory."""
    folder = Path(f"{Path(path)}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    folder.rename(path)

def newest_checkpoint(out, resume, fixed):
    """(path of the newest checkpoint in out, config.json of its run), or (None, {}).

    Raises ValueError if there is one, but neither --resume nor a restart by torchrun asks for it,
    or if its run had another value of a field in `fixed`.
    """
    path = max(Path(out).glob("step_*[0-9]"), default=None) if out else None
    run = json.loads((Path(out) / "config.json").read_text()) if path else {}
    newest = [path, run]
    dist.broadcast_object_list(newest)  # on a network file system, ranks may see different files
    path, run = newest
    (restarts,) = sum_over_ranks(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
    if path and not (resume or restarts):
        raise ValueError(f"{out} has checkpoints: --resume continues, another --out starts anew")
    for name in fixed:
        if path and run.get(name) != fixed[name]:
            raise ValueError(f"{path} has {name} {run.get(name)}, and this run {fixed[name]}")
    if out and (resume or restarts):
        print(f"continuing from {path}" if path else f"no checkpoint in {out}: starting a run")
    return path, run

def claim_directory(out, config):
    """Write config.json to the directory out; for rank 0 alone. Returns a lock, which the process
    holds while it lives; ValueError if another process holds it."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another run is writing to {out}") from error
    except OSError as error:
        print(f"{out} cannot be locked against other runs: {error}")
    (folder / "config.tmp").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "config.tmp").replace(folder / "config.json")
    return lock

def save_checkpoint(out, model, optimizer, state):
    """Write model, optimizer and state to out/step_N, and keep the two newest. The directory is
    renamed when it is complete, so that a killed process leaves only complete checkpoints."""
    final = Path(out) / f"step_{state['step']:09d}"
    partial = final.with_suffix(".tmp")
    weights, moments = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": moments["state"], "state": state}
    with explain(f"cannot save {final}", dcp.CheckpointException):
        dcp.save(content, checkpoint_id=partial)
    if dist.get_rank() == 0:
        partial.rename(final)
        old = sorted(Path(out).glob("step_*[0-9]"))[:-2]
        for path in [*old, *Path(out).glob("step_*.tmp")]:  # .tmp: of killed processes
            shutil.rmtree(path)
    dist.barrier()

def load_checkpoint(path, model, optimizer, state):
    """Fill model, optimizer and state from a checkpoint, except the optimizer's hyperparameters."""
    weights, moments = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": moments["state"], "state": state}
    with explain(f"{path} does not fit or is damaged", dcp.CheckpointException):
        dcp.load(content, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)

# ---------------------------------------- Training ----------------------------------------

def split_batch(cfg, ranks):
    """(n_micro, micro): batch_size is ranks x n_micro micro-batches x micro sequences."""
    share = cfg.batch_size // ranks
    micro = min(cfg.micro_batch or share, share)
    return share // max(micro, 1), micro

def sum_over_ranks(*numbers):
    """The numbers, each summed over all ranks, as floats."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()

def read_batch(corpus, first, cfg, device, rank, ranks):
    """The micro-batches that data-parallel rank `rank` of `ranks` reads, on the device; `first` is
    the first sequence of the global batch. It has no collectives, so that a thread can call it."""
    n_micro, micro = split_batch(cfg, ranks)
    first += rank * n_micro * micro
    batches = [get_batch(corpus, first + i * micro, micro, cfg) for i in range(n_micro)]
    for batch in batches:
        for name, value in batch.items():
            if torch.is_tensor(value) and device.type == "cuda":
                batch[name] = value.pin_memory().to(device, non_blocking=True)
    return batches

def sum_counts(batches, ranks):
    """Replace the counts (n_...) of this rank's micro-batches by the counts of the global batch.
    `ranks` is the number of data-parallel ranks; any further ranks read copies of their data."""
    names = [name for name in batches[0] if name.startswith("n_")]
    sums = sum_over_ranks(*(sum(batch[name] for batch in batches) for name in names))
    counts = {name: n * ranks / dist.get_world_size() for name, n in zip(names, sums)}
    for batch in batches:
        batch.update(counts)

@contextlib.contextmanager
def evaluation_mode(model, compiled):
    """Disable dropout, gradients and compiled code (which would recompile for each new length)."""
    eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    model.eval()
    with torch.no_grad(), eager:
        yield
    model.train()

def validate(loss_of, corpus, step, cfg, device, rank, ranks):
    """Log nats per target and bits per byte over the first windows of corpus.
    loss_of(batches) is this rank's share of the loss of a global batch."""
    sums = np.zeros(3)  # nats, targets, bytes
    for i in range(min(cfg.val_batches, corpus.n_windows(cfg.seq_len) // cfg.batch_size)):
        batches = read_batch(corpus, i * cfg.batch_size, cfg, device, rank, ranks)
        sum_counts(batches, ranks)
        (loss,) = sum_over_ranks(loss_of(batches))
        n_targets = batches[0]["n_targets"]
        sums += loss * n_targets, n_targets, batches[0]["n_bytes"]
    nats, n_targets, n_bytes = sums.tolist()
    if not n_targets:
        raise ValueError("the held-out documents have no token to predict")
    row = {"val_loss": nats / n_targets, "val_bpb": bits_per_byte(nats, n_bytes)}
    log(cfg.out, step, f"val {step}", row, [])

def sample(model, ids, n, allowed_ids, cfg):
    """ids followed by n sampled ids (temperature 0.8); allowed_ids [V], boolean, may be drawn."""
    device = model.token_embedding.weight.device
    torch.manual_seed(stable_hash(cfg.seed, "sample"))
    with evaluation_mode(model, cfg.compile):
        for _ in range(n):
            tokens = torch.tensor([ids[-cfg.seq_len :]], device=device)  # [1, T]
            with torch.autocast(device.type, torch.bfloat16, cfg.precision == "bf16"):
                logits = model(tokens)[0, -1].float().cpu()  # [V]
            p = (logits / 0.8).masked_fill(~allowed_ids, -math.inf).softmax(-1)
            ids = ids + torch.multinomial(p, 1).tolist()
    return ids

def check(cfg, ranks):
    """Raise ValueError for a configuration that cannot run on that many ranks."""
    for field in dataclasses.fields(cfg):
        least = int(field.type is int and field.default > 0 and field.name != "warmup_steps")
        if field.type in (int, float) and not least <= getattr(cfg, field.name) < math.inf:
            raise ValueError(f"--{field.name} {getattr(cfg, field.name)} is not {least} or more")
    n_micro, micro = split_batch(cfg, ranks)
    for wrong, message in (
        (cfg.dim % cfg.n_heads, f"{cfg.n_heads} heads do not divide the width {cfg.dim}"),
        (ranks * n_micro * micro != cfg.batch_size,
         f"--batch_size {cfg.batch_size} is not {ranks} ranks x n micro-batches of {micro}"),
        (cfg.resume and not cfg.out, "--resume needs --out"),
        (cfg.eval and not cfg.out and not cfg.init, "--eval needs --out or --init"),
        (cfg.export and cfg.hidden_dim != 4 * cfg.dim, "--export needs a hidden_dim of 4 dim"),
        (cfg.write_tokens and ranks > 1, "--write_tokens runs in one process, without torchrun"),
    ):
        if wrong:
            raise ValueError(message)
    check_directories(cfg.init, cfg.export, cfg.write_tokens)

def dry_run(cfg):
    """Print parameters, FLOPs per token and memory per rank, computed from shapes alone."""
    if not cfg.vocab_size:
        cfg.vocab_size = load_tokenizer(cfg.tokenizer or "bytes", ["<|endoftext|>"]).n_vocab
    check(cfg, cfg.world_size)
    with torch.device("meta"):
        total, activated = count_parameters(GPT1(cfg))
    # Kept for the backward pass, per position and block: the inputs of both norms in fp32; the
    # inputs of the four products and of GELU, q, k and v in the products' precision; a byte per
    # entry of a GPU's two dropout masks. The peak is at the start of the backward pass, when the
    # loss holds three fp32 tensors of V per position; with recomputation, which keeps each block's
    # fp32 input, it is there or in the recomputed block. Autocast keeps bf16 copies of the weights.
    size = 2 if cfg.precision == "bf16" else 4
    block = 8 * cfg.dim + size * (6 * cfg.dim + 2 * cfg.hidden_dim)
    block += 2 * cfg.dim * (cfg.dropout > 0)
    head = size * cfg.dim + 12 * cfg.vocab_size
    per_position = cfg.n_layers * block + head
    if cfg.recompute == "block":
        per_position = cfg.n_layers * 4 * cfg.dim + max(block, head)
    activations = split_batch(cfg, cfg.world_size)[1] * cfg.seq_len * per_position
    activations += 2 * total * (cfg.precision == "bf16")
    print(f"parameters {total:,} | activated {activated:,}")
    print(f"FLOPs per token {flops_per_token(cfg):.4g} | 6 N gives {6 * activated:.4g}")
    memory = {"parameters": 4 * total, "gradients": 4 * total, "optimizer": 8 * total}
    print_memory(memory | {"activations": activations})

def training_step(model, optimizer, batches, lr, cfg):
    """One update from this rank's micro-batches; returns loss and gradient norm of the global
    batch. If either is not finite, all ranks skip the update."""
    loss = torch.zeros((), device=batches[0]["tokens"].device)
    for i, batch in enumerate(batches):
        model.require_backward_grad_sync = i == len(batches) - 1  # DDP: all-reduce once per update
        part, _ = objective(model, batch, cfg)
        (part * dist.get_world_size()).backward()  # DDP averages over the ranks
        loss += part.detach()
    dist.all_reduce(loss)
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
    loss, norm = torch.stack([loss, norm]).tolist()  # the only wait for the device in an update
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return loss, norm

def train(model, optimizer, corpus, heldout, state, cfg, device):
    """Update the model until the end of the run; returns False if a signal ends it earlier."""
    this_rank = device, dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp",))
    replicas = parallelize(model, cfg, mesh)
    signals = catch_signals()
    thread = ThreadPoolExecutor(1)  # reads the next batch during an update
    next_batches = thread.submit(read_batch, corpus, state["sequences"], cfg, *this_rank)
    first_step = saved = state["step"]
    pace = None  # seconds per update
    n_skipped = 0

    def evaluate(batches):
        with evaluation_mode(model, cfg.compile):
            return sum(objective(model, batch, cfg)[0] for batch in batches)

    while True:
        step = state["step"]
        first = state["sequences"]  # first sequence of the next batch
        steps_left = math.ceil(cfg.steps - first / cfg.batch_size)
        error = next_batches.exception()  # waits until the next batch is read
        if step > first_step + 1:  # the first update may compile and is left out
            seconds = time.perf_counter() - clock
            pace = 0.9 * (pace or seconds) + 0.1 * seconds
        (stop,) = sum_over_ranks(len(signals) + (error is not None))
        end = steps_left <= 0 or stop
        if cfg.out and step > saved and (end or (step % cfg.save_every == 0 and not n_skipped)):
            save_checkpoint(cfg.out, model, optimizer, state)
            saved = step
        if error:
            raise error
        if stop:
            return False
        if end or step % cfg.val_every == 0:
            validate(evaluate, heldout, step, cfg, *this_rank)
        if end:
            return True

        clock = time.perf_counter()
        batches = next_batches.result()
        next_batches = thread.submit(read_batch, corpus, first + cfg.batch_size, cfg, *this_rank)
        sum_counts(batches, dist.get_world_size())
        torch.manual_seed(stable_hash(cfg.seed, step, dist.get_rank()))  # for dropout
        lr = learning_rate(first / cfg.batch_size, cfg)
        loss, norm = training_step(replicas, optimizer, batches, lr, cfg)
        finite = math.isfinite(loss) and math.isfinite(norm)
        state["step"] += 1
        state["sequences"] += cfg.batch_size
        state["tokens"] += finite * cfg.batch_size * cfg.seq_len
        if step == 0 or steps_left == 1 or state["step"] % cfg.log_every == 0:
            bpb = bits_per_byte(loss * batches[0]["n_targets"], batches[0]["n_bytes"])
            row = {"loss": loss, "bpb": bpb, "lr": lr, "grad": norm, "tokens": state["tokens"]}
            head = f"step {step + 1}/{step + steps_left}"
            tail = progress(state["tokens"], steps_left - 1, pace, cfg, device)
            log(cfg.out, step + 1, head, row, tail)
        n_skipped = 0 if finite else n_skipped + 1
        if n_skipped:
            print(f"step {step + 1} skipped: its loss or gradient is not finite")
        if n_skipped == 3 or (n_skipped and steps_left == 1):
            raise ValueError(f"no finite gradient in the last {n_skipped} steps to {step + 1}")

def load_data(cfg):
    """(tokenizer or None, training Corpus, held-out Corpus) of --data; sets cfg.vocab_size. With
    --write_tokens the data is written as shards instead, and the result is None."""
    files, shards = find_files(cfg.data)
    tokenizer = None
    if cfg.tokenizer or files:
        tokenizer = load_tokenizer(cfg.tokenizer or "bytes", ["<|endoftext|>"])
    separator = tokenizer.eot_token if tokenizer else -1  # unknown
    cfg.vocab_size = vocabulary_size(cfg.vocab_size, tokenizer, cfg.init)
    documents = tokenize(read_documents(cfg.data, files), tokenizer, separator)
    if cfg.write_tokens and shards:
        raise ValueError("--write_tokens reads text, and --data has token shards")
    if cfg.write_tokens:
        return write_tokens(cfg.write_tokens, documents)
    sizes = cfg.vocab_size, cfg.batch_size, cfg.seq_len
    return tokenizer, *load_corpora(shards, documents, tokenizer, separator, *sizes)

@record
def main(argv=None):
    """Run the command line: read the data, build or resume the run, train, export and sample."""
    with report_user_errors():
        cfg, given = parse(argv)
        if cfg.dry_run:
            return dry_run(cfg)
        device = init_distributed(cfg.timeout)
        ranks = dist.get_world_size()
        check(cfg, ranks)
        if cfg.init:
            source, theirs = from_hf(cfg.init)
            cfg = dataclasses.replace(cfg, **{name: getattr(theirs, name) for name in SHAPE})
        data = load_data(cfg)
        if not data:
            return
        tokenizer, corpus, heldout = data
        n_windows = corpus.n_windows(cfg.seq_len)

        # Undisclosed: the number of updates; it follows from the 100 epochs.
        if not cfg.steps or ("epochs" in given and "steps" not in given):
            cfg.steps = math.ceil(cfg.epochs * n_windows / cfg.batch_size)
        fixed = {name: getattr(cfg, name) for name in SHAPE}
        if not cfg.eval:
            fixed |= {"seed": cfg.seed, "data_fingerprint": corpus.fingerprint()}
        newest, run = newest_checkpoint(cfg.out, cfg.resume or cfg.eval, fixed)
        if run and not given & {"steps", "epochs"}:  # keep the planned number of sequences
            cfg.steps = math.ceil(run["steps"] * run["batch_size"] / cfg.batch_size)
        if cfg.warmup_steps > cfg.steps // 10:
            cfg.warmup_steps = cfg.steps // 10
            print(f"the warm-up is cut to {cfg.warmup_steps} updates, a tenth of the run")

        model = GPT1(cfg)
        init_weights(model, cfg)
        if cfg.init:
            model.load_state_dict(source.state_dict())
        optimizer = build_optimizer(model.to(device), cfg)
        state = {"step": 0, "sequences": 0, "tokens": 0}
        if newest:
            load_checkpoint(newest, model, optimizer, state)
        if cfg.eval:
            if not newest and not cfg.init:
                raise ValueError(f"--eval: {cfg.out} has no checkpoint")
            cfg.steps = 0
            cfg.out = ""  # nothing is written
        if cfg.out and dist.get_rank() == 0:
            lock = claim_directory(cfg.out, dataclasses.asdict(cfg) | fixed)  # until the run ends
        n_micro, micro = split_batch(cfg, ranks)
        n_tokens = cfg.batch_size * cfg.seq_len
        print(f"torch {torch.__version__} | {device.type} {cfg.precision} | {n_windows:,} windows")
        print("parameters {:,} | activated {:,}".format(*count_parameters(model)), end=" | ")
        print(f"FLOPs per token {flops_per_token(cfg):.3g} | tokens per step", end=" ")
        print(f"{n_tokens:,} = {ranks} ranks x {n_micro} x {micro} sequences of {cfg.seq_len}")
        if not train(model, optimizer, corpus, heldout, state, cfg, device):
            return print(f"stopped after step {state['step']}")
        if cfg.export and dist.get_rank() == 0:
            to_hf(model, cfg, cfg.export)
        if tokenizer and dist.get_rank() == 0:
            ids = tokenizer.encode_ordinary(cfg.prompt)
            ids = ids or get_batch(heldout, 0, 1, cfg)["tokens"][0, :32].tolist()
            allowed_ids = torch.from_numpy(heldout.token_bytes > 0)
            print(tokenizer.decode(sample(model, ids, 256, allowed_ids, cfg)))

# ---------------------------------------- Plumbing ----------------------------------------

@contextlib.contextmanager
def report_user_errors():
    """Print on rank 0 only; report user errors as one line on stderr and exit with status 2."""
    rank = int(os.environ.get("RANK", 0))
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        with contextlib.redirect_stdout(open(os.devnull, "w") if rank else sys.stdout):
            yield
    except BrokenPipeError:  # the program that reads our output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, ValueError) as error:
        time.sleep(5 * (rank > 0))  # so that rank 0, if it fails too, reports first
        print(f"{Path(__file__).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    finally:
        # destroy_process_group waits for the other ranks: a rank that fails alone skips it.
        if dist.is_initialized() and (dist.get_world_size() == 1 or not sys.exc_info()[0]):
            dist.destroy_process_group()

@contextlib.contextmanager
def explain(what, *errors):
    """Replace exceptions of the given kinds by a ValueError that says what failed, and why."""
    try:
        yield
    except errors as error:
        cause = str(error).strip().rpartition("\n")[2]  # without the tracebacks of other ranks
        raise ValueError(f"{what}: {type(error).__name__}: {cause}") from error

def catch_signals():
    """A list to which SIGTERM and SIGINT are appended; a second one ends the process at once."""
    received = []

    def receive(signum, frame):
        received.append(signum)
        signal(signum, SIG_DFL)

    signal(SIGTERM, receive)
    signal(SIGINT, receive)
    return received

def parse(argv):
    """(Config, names of the flags given): a preset's values, overridden by the flags."""

    def refuse(message):
        raise ValueError(message)

    summary = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(description=summary, allow_abbrev=False, add_help=False)
    parser.usage = "%(prog)s [--preset NAME] [--FLAG VALUE ...]"
    parser.error = refuse
    default = "small" if torch.cuda.is_available() else "demo"
    text = f"named set of values for the other flags (default: {default})"
    parser.add_argument("--preset", choices=PRESETS, default=default, help=text)
    preset = parser.parse_known_args(argv)[0].preset
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Config), re.M))
    for field in dataclasses.fields(Config):
        kind = {"type": type(field.default), "choices": get_args(field.type) or None}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        value = PRESETS[preset].get(field.name, field.default)
        text = f"{comments[field.name]} ({preset}: {value!r})".replace("%", "%%")
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text, **kind)
    parser.add_argument("--help", action="help", help="print this list and exit")
    given = vars(parser.parse_args(argv))
    cfg = Config(**(PRESETS[given.pop("preset")] | given))
    if cfg.precision == "auto":
        cfg.precision = "bf16" if torch.cuda.is_available() else "fp32"
    return cfg, given.keys()

def init_distributed(timeout):
    """Join torchrun's process group, or one of a single rank; returns the device of this rank."""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    store = shared_store(rank) if world_size > 1 else dist.HashStore()
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    limit = timedelta(seconds=timeout)
    store.set_timeout(limit)  # init_process_group leaves a given store's timeout as it is
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    return device

def shared_store(rank):
    """A store for this start only: the store of torchrun's agents outlives a restart and then has
    addresses of dead processes. Rank 0 opens it and publishes its address in the agents' store."""
    with explain("torchrun sets MASTER_ADDR and MASTER_PORT", KeyError):
        host = os.environ["MASTER_ADDR"]
        port = int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return dist.TCPStore(host, port, is_master=rank == 0, wait_for_workers=False)
    agents = dist.TCPStore(host, port, is_master=False)
    if rank == 0:
        if os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:
            host = socket.getfqdn()  # the agents' store may be on another node
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        agents.set("rank 0", f"{host} {store.port}")
        return store
    while True:
        host, port = agents.get("rank 0").decode().split()
        try:
            return dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=5))
        except (dist.DistNetworkError, dist.DistStoreError):  # the address of an earlier start
            time.sleep(0.1)

def log(out, step, head, row, tail):
    """Print head, the numbers of row except tokens and lists, and tail; append step and row to
    metrics.jsonl in the directory out, if any, with null for NaN and infinity."""
    formats = {"bpb": ".3f", "val_bpb": ".3f", "lr": ".2e", "grad": ".2f"}
    fields = [head]
    for name, value in row.items():
        if name != "tokens" and not isinstance(value, list):
            fields.append(f"{name.removeprefix('val_')} {value:{formats.get(name, '.4f')}}")
    print(" | ".join(fields + tail).replace("nan", "n/a"))
    if out and dist.get_rank() == 0:
        row = {k: None if str(v) in ("nan", "inf", "-inf") else v for k, v in row.items()}
        with open(Path(out) / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step} | row) + "\n")

def progress(tokens, steps_left, pace, cfg, device):
    """Fields of a log line: tokens so far and, if pace (seconds per update) is known,
    throughput, MFU, memory and time left."""
    fields = [f"tokens {tokens / 1e6:.1f}M"]
    if not pace:
        return fields
    speed = cfg.batch_size * cfg.seq_len / pace
    fields.append(f"{speed / 1e3:.1f}k tok/s")
    if device.type == "cuda":
        peak = PEAK_FLOPS.get(cfg.precision, {}).get(torch.cuda.get_device_name(device))
        if peak:
            fields.append(f"mfu {speed * flops_per_token(cfg) / peak / dist.get_world_size():.1%}")
        fields.append(f"mem {torch.cuda.max_memory_allocated(device) / 2**30:.1f}G")
    return [*fields, f"eta {timedelta(seconds=round(steps_left * pace))}"]

def print_memory(memory):
    """Print bytes per rank, by kind, and their sum."""
    for kind, n_bytes in [*memory.items(), ("sum", sum(memory.values()))]:
        print(f"{kind:12} {n_bytes / 2**30:8.3f} GiB per rank")

def check_directories(init, export, write_tokens):
    """Raise ValueError if a directory to write to is not empty, or if safetensors is needed and not
    installed."""
    for folder in (export, write_tokens):
        if folder and os.path.exists(folder) and (os.path.isfile(folder) or os.listdir(folder)):
            raise ValueError(f"{folder} is a file, or is not empty")
    if init or export:
        with explain("--init and --export need: pip install safetensors", ImportError):
            import safetensors  # noqa: F401

def bits_per_byte(nats, n_bytes):
    """nats over n_bytes of text in bits per byte; NaN, printed as n/a, if n_bytes is unknown."""
    return nats / math.log(2) / n_bytes if n_bytes else math.nan

def stable_hash(*key):
    """A 64-bit integer that depends on the key alone; it seeds every random draw."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")

@functools.lru_cache(64)  # one for each corpus of a mix, and some for the next epoch
def permutation(n, *key):
    """A random permutation of range(n), int64 [n], seeded by key."""
    return np.random.default_rng(stable_hash(*key)).permutation(n)

class Corpus:
    """Ids start ... stop - 1 of the concatenation of parts, which are (name, ids).

    separator: the id after each document, -1 if unknown; token_bytes [V]: the length of each id's
    text, 0 if it has none; in_order: windows come in order and not shuffled.
    """

    def __init__(self, parts, start, stop, separator, token_bytes, in_order):
        self.parts = parts
        self.ends = np.cumsum([len(ids) for name, ids in parts])
        self.start = start
        self.size = stop - start
        self.separator = separator
        self.token_bytes = token_bytes
        self.in_order = in_order

    def read(self, first, n):
        """Ids first ... first + n - 1, int64 [n]; ValueError for an id outside the vocabulary."""
        pieces = []
        first += self.start
        i, last = np.searchsorted(self.ends, [first, first + n - 1], side="right")
        for (name, part), end in zip(self.parts[i : last + 1], self.ends[i:]):
            start = end - len(part)  # of the part
            begin = max(first - start, 0)
            ids = part[begin : first + n - start].astype(np.int64)
            unknown = (ids >= len(self.token_bytes)) & (ids != self.separator)
            if unknown.any():
                where = f"{name}, position {begin + unknown.argmax()}"
                raise ValueError(f"{where}: token id {ids[unknown][0]} is not in the vocabulary")
            pieces.append(ids)
        return np.concatenate(pieces)

    def n_windows(self, length):
        """Number of windows of length + 1 ids in an epoch, at any offset below length."""
        return max((self.size - 1) // length - 1, 0)

    def window(self, index, length, seed):
        """Window `index` of the run, length + 1 ids. An epoch has every window once, in an order
        and at an offset of its own."""
        epoch, index = divmod(index, self.n_windows(length))
        offset = 0
        if not self.in_order:
            offset = stable_hash(seed, epoch) % length
            index = permutation(self.n_windows(length), seed, epoch)[index]
        return self.read(offset + index * length, length + 1)

    def fingerprint(self):
        """A hash of the size and the first ids, by which a resumed run recognizes its data."""
        return stable_hash(self.size, self.read(0, min(self.size, 1000)).tolist())

def load_corpora(shards, documents, tokenizer, separator, vocab_size, batch_size, length):
    """(training, held-out) Corpus of shards or, without any, of tokenized documents.

    Held out are shards with "val" in their names, or documents chosen by a hash of their names. If
    either part is less than a batch, the last 5 % of all ids, and at least a batch, are held out.
    """
    if shards:  # in both orders, what is held out comes last
        shards = sorted(shards, key=lambda path: "val" in path.name)
        parts = [(path, open_shard(path)) for path in shards]
        n_train = sum(len(ids) for path, ids in parts if "val" not in path.name)
    else:
        parts = sorted(documents, key=lambda document: stable_hash(document[0]))
        n_train = sum(len(ids) for name, ids in parts if not is_held_out(name))
    total = sum(len(ids) for name, ids in parts)
    least = (batch_size + 1) * length + 1  # ids of a batch of windows, and an offset
    if min(n_train, total - n_train) < least:
        n_train = total - max(total // 20, least)
    if n_train < least:
        raise ValueError(f"{total:,} tokens are too few for 2 batches of {batch_size} x {length}")
    token_bytes = np.zeros(vocab_size, np.int64)
    if tokenizer:
        for text in tokenizer.token_byte_values():
            token_bytes[tokenizer.encode_single_token(text)] = len(text)
    corpus = Corpus(parts, 0, n_train, separator, token_bytes, in_order=False)
    return corpus, Corpus(parts, n_train, total, separator, token_bytes, in_order=True)

def vocabulary_size(vocab_size, tokenizer, init):
    """vocab_size or, if it is 0, the tokenizer's number of ids. Raises ValueError if the ids do not
    fit. If vocab_size is larger than the byte tokenizer needs, warns, or raises with --init."""
    if not tokenizer and not vocab_size:
        raise ValueError("token shards need --tokenizer or --vocab_size")
    n_ids = tokenizer.n_vocab if tokenizer else 0
    if 0 < vocab_size < n_ids - 1:  # a vocabulary may lack the separator
        raise ValueError(f"--vocab_size {vocab_size} is less than the {n_ids} ids of the tokenizer")
    if vocab_size > n_ids and tokenizer and tokenizer.name == "bytes":
        if init:
            raise ValueError(f"--init {init} needs the --tokenizer of its {vocab_size:,} entries")
        print(f"warning: a vocabulary of {vocab_size:,} entries over bytes: --tokenizer is missing")
    return vocab_size or n_ids

def is_held_out(name):
    """Whether a document is among the 5 % that are held out, by a hash of its name."""
    return stable_hash(name) > 0.95 * 2**64

def find_files(path):
    """(text files, token shards) at path: a file, or a directory and what its links lead to, of
    one kind; without a path, the modules of Python's standard library without its tests."""
    root = Path(path or sysconfig.get_paths()["stdlib"])
    endings = (".txt", ".md", ".py", ".jsonl") if path else (".py",)
    skipped = set() if path else {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    seen = set(root.resolve().parents)  # a link to one of these would loop forever
    entries = [root]
    for entry in entries:  # the list grows by the contents of each directory
        if entry.is_dir() and entry.resolve() not in seen:
            seen.add(entry.resolve())
            entries += sorted(child for child in entry.iterdir() if child.name not in skipped)
    files = sorted(entry for entry in entries if entry.is_file())
    texts = [file for file in files if file.suffix.lower() in endings]
    shards = [file for file in files if path and file.suffix.lower() in (".npy", ".bin")]
    if bool(texts) == bool(shards):
        kinds = "either text (.txt .md .py .jsonl) or token shards (.npy .bin)"
        raise ValueError(f"{path} must be or have {kinds}, not {len(texts)} and {len(shards)}")
    print(f"{root}: {len(texts + shards)} of {len(files)} files are read")
    return texts, shards

def read_documents(path, files):
    """(name, text) of each document: a text file, whose name is its path below `path`, or a line
    of a .jsonl file, a JSON object with a string "text", which is also its name."""
    root = Path(path or sysconfig.get_paths()["stdlib"])
    for file in files:
        if file.suffix.lower() != ".jsonl":
            with explain(f"{file} is not UTF-8 text", UnicodeDecodeError):
                text = file.read_text("utf-8-sig", errors="strict" if path else "ignore")
            yield file.relative_to(root).as_posix(), text
            continue
        for number, line in enumerate(open(file, "rb"), 1):
            if line.strip():
                what = f'{file}, line {number}, is not a JSON object with a string "text"'
                with explain(what, ValueError, KeyError, TypeError):
                    # Half a surrogate pair becomes U+FFFD.
                    text = re.sub(r"[\ud800-\udfff]", "\ufffd", json.loads(line)["text"])
                yield text, text

def load_tokenizer(name, specials):
    """The tiktoken.Encoding `bytes`, of a BPE rank file, or of one of tiktoken's own names; special
    tokens that it lacks are added after its last id."""
    ranks = {bytes([i]): i for i in range(256)}
    settings = {"name": name, "pat_str": r"[\s\S]", "mergeable_ranks": ranks, "special_tokens": {}}
    if os.path.isfile(name):  # tiktoken's own loader caches by name and misses changes
        with explain(f"{name} is not a BPE rank file", ValueError):
            lines = [line.split() for line in Path(name).read_bytes().splitlines() if line.strip()]
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        settings |= {"pat_str": PATTERN, "mergeable_ranks": ranks}
    elif name != "bytes":
        what = "neither a BPE rank file nor a tiktoken encoding that is cached or can be downloaded"
        with explain(f"{name} is {what}", OSError, ValueError):
            tiktoken.get_encoding(name)
        settings = tiktoken.registry.ENCODING_CONSTRUCTORS[name]()
        ranks = settings["mergeable_ranks"]
    if len(set(ranks.values())) < len(ranks) or not all(bytes([i]) in ranks for i in range(256)):
        raise ValueError(f"{name} has a rank twice, or lacks some of the 256 single bytes")
    ids = settings["special_tokens"]
    for token in specials:
        ids.setdefault(token, 1 + max([*ranks.values(), *ids.values()]))
    # explicit_n_vocab is a check that does not count the added tokens.
    return tiktoken.Encoding(**settings | {"explicit_n_vocab": None})

def tokenize(documents, tokenizer, separator):
    """(name, ids) of each document that is not empty; the last id is the separator."""
    dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    for name, text in documents:
        with explain(f"the tokenizer cannot take document {name[:80]!r}", ValueError):
            ids = tokenizer.encode_to_numpy(text, disallowed_special=())
        if text:
            yield name, np.append(ids, separator).astype(dtype)

def write_tokens(folder, documents):
    """Write tokenized documents to .npy shards in a new or empty folder: train_00000.npy ..., and
    val_00000.npy ... of the documents that are held out; two shards per 10,000 documents."""
    groups = iter(lambda: list(itertools.islice(documents, 10000)), [])
    with written_beside(folder) as partial:
        for n, group in enumerate(groups):
            for split, held_out in (("train", False), ("val", True)):
                parts = [ids for name, ids in group if is_held_out(name) == held_out]
                if parts:
                    np.save(partial / f"{split}_{n:05d}.npy", np.concatenate(parts))
    print(f"{folder}: the documents are written")

def open_shard(path):
    """Ids of a token shard, memory-mapped without a file descriptor: .npy of uint16 or uint32, or
    .bin, uint16 after a header of 256 int32."""
    with explain(f"{path} is not a token shard", ValueError, EOFError):
        if path.suffix.lower() == ".npy":
            ids = np.load(path, mmap_mode="r")
        else:
            ids = np.memmap(path, np.uint16, "r", offset=1024)
            if np.fromfile(path, np.int32, 3).tolist() != [20240520, 1, len(ids)]:
                raise ValueError("unexpected header, or its length does not match the file")
        if ids.ndim != 1 or ids.dtype not in (np.uint16, np.uint32):
            raise ValueError(f"it holds {ids.dtype} {ids.shape}, not a row of uint16 or uint32")
    # numpy's maps keep a descriptor each, torch's do not.
    header = ids.offset // ids.itemsize
    dtype = getattr(torch, ids.dtype.name)
    return torch.from_file(str(path), size=header + len(ids), dtype=dtype).numpy()[header:]

if __name__ == "__main__":
    main()
