r"""Training Compute-Optimal Large Language Models (Hoffmann et al., 2022) in one file.

What is new compared with gpt1.py: the subject is a sweep of runs and the laws fitted to them.
- For each budget C of FLOPs the sweep trains models of several sizes N, each on D = C / 6N tokens
  with a cosine of that length (§3.1, App. B), and three fits give the optimal
  N(C) and D(C) (§3, App. D).
- Two further fits are Kaplan et al.'s law (2020) and Llama 3's two-step law (2024, §3.2.1). The
  published constants include the correction of the third fit by Besiroglu et al. (2024). Sardana
  et al. (2024) give the best N and D of models that process many tokens after training.
- The model is Gopher's (Rae et al. 2021): RMSNorm before each branch, and relative positions as
  in Transformer-XL (Dai et al. 2019, §3.3) in place of learned ones.
- AdamW with a cosine that falls tenfold (§4.1, App. G); products in bf16 of fp32 weights, which
  are sharded over the ranks.

Map: Tables 4, A9 PRESETS | App. F appendix_f | §3.1 fit_envelope | §3.2 fit_isoflop | §3.3
fit_parametric | Eq. 4 frontier | Tables 3, A3 all_laws | §4.1 Chinchilla, build_optimizer |
Table 4 (the batch doubles) at_sequence | Kaplan Eq. 1.5 kaplan_residuals, Table 6 kaplan_optimum |
Llama 3 §3.2.1 fit_llama, fit_accuracy | Sardana Eq. 3 overtrain.
Legend: B batch, T positions, D width, H heads, E head width, F hidden width, V vocabulary; of runs
and laws: N parameters with embeddings, D tokens, C FLOPs, L nats per token; P constants of a law,
R runs.
Conventions: T + 1 tokens give T inputs and T targets, which all count; loss in nats per target.

Run: python chinchilla.py                         # a laptop: a sweep of minutes, and its fits
     torchrun --nproc_per_node=8 chinchilla.py    # GPUs: the preset small, one run per rank
     torchrun --nnodes=32 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \
         chinchilla.py --preset 1018m --data massive/ --tokenizer ranks.tiktoken --out /shared/1b
     (ranks.tiktoken: a BPE rank file of at most 31,999 entries, such as gpt3.py learns)
     python chinchilla.py --budget 1e21            # the optimum by every law; no training
     python chinchilla.py --fit runs.csv           # the laws of any table with columns N, D, loss
Expect: in six minutes on two CPU cores the demo trains 15 models and fits the laws. Held-out loss
falls from 5.48 nats per byte to 1.94 in the best model of 1e11 FLOPs (32x1, N 21.9k), 1.85 of 2e11
and 1.75 of 4e11 (48x1, N 42.8k). The parabolas' lowest points are N 15.9k, 26.1k and 39.6k; a is
0.47, 0.66 and 0.51 by approaches 1, 2 and 3. A sweep of this size shows the method and not the
constants.
"""

import argparse
import base64
import contextlib
import csv
import dataclasses
import fcntl
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import socket
import sys
import sysconfig
import tempfile
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
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

# ---------------------------------------- Config ----------------------------------------

@dataclasses.dataclass
class Config:
    """Run configuration: each field is a command-line flag, and its comment is the flag's help."""

    # Model, Table 4: the 70B
    vocab_size: int = 0  # V, vocabulary size; 0: that of the tokenizer
    dim: int = 8192  # D, width of the residual stream
    n_layers: int = 80  # number of blocks
    n_heads: int = 64  # H, number of attention heads
    head_dim: int = 128  # E, width of a head; H x E need not be D
    hidden_dim: int = 32768  # F, width of the feed-forward layer
    norm_eps: float = 1e-5  # number added to the mean square in RMSNorm
    # Data
    tokenizer: str = ""  # "bytes", a tiktoken encoding or a BPE rank file; empty: bytes, for text
    seq_len: int = 2048  # T, sequence length in tokens
    # Optimization, §4.1 and Appendix D
    batch_size: int = 256  # sequences per update, over all ranks
    second_batch: int = 0  # sequences per update in the second half of the tokens; 0: batch_size
    micro_batch: int = 0  # sequences per forward pass on one rank; 0: as many as the batch allows
    tokens: float = 0.0  # D, training tokens of a single run, if --steps is 0; 0: 20 per parameter
    steps: int = 0  # updates, of batch_size sequences, of a single run, not a sweep; 0: by --tokens
    lr: float = 1e-4  # peak learning rate; a sweep's WIDTHxLAYERS models have lr x dim / WIDTH
    warmup_steps: int = 1500  # updates of linear warm-up; cut to a tenth of the run if longer
    cosine: float = 1.0  # length of the learning-rate cosine, as a multiple of the run's
    weight_decay: float = 0.1  # decoupled weight decay of matrices and embeddings
    clip: float = 1.0  # maximum norm of the gradient; 0: no clipping
    seed: int = 0  # seed of the weights and of the order of the data
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    log_every: int = 10  # updates between log lines, and between points of a training curve
    val_batches: int = 16  # maximum number of batches per validation
    # Machine: from here on, no field changes the numbers of a sweep's run
    data: str = ""  # file or directory of text or token shards; empty: Python's standard library
    compile: bool = False  # compile each block with torch.compile
    recompute: Literal["none", "block"] = "none"  # block: recompute blocks in the backward pass
    timeout: int = 600  # timeout of a collective, in seconds
    dry_run: bool = False  # print parameters, FLOPs and memory per rank, then exit
    world_size: int = 1  # number of ranks that --dry_run plans for
    # Sweep and laws
    sweep: str = ""  # budgets of a sweep, FLOPS,...; empty: a single run
    sizes: str = ""  # models of a sweep: presets, or WIDTHxLAYERS with heads of head_dim
    flops: Literal["6nd", "appF"] = "6nd"  # how a budget counts FLOPs: 6 N D, or as Appendix F does
    keep_models: bool = True  # keep the checkpoints of a sweep's finished runs
    fit: str = ""  # file of runs to fit without training: .csv (columns N, D, loss, ...) or .jsonl
    drop_highest: int = 0  # runs of highest loss that approach 3 leaves out (Besiroglu: 5)
    bootstrap: int = 100  # resamples of 80 % of the runs, for the intervals of a fit; 0: none
    budget: float = 0.0  # FLOPs to find the best N and D for, by all laws and --fit; no training
    inference_tokens: float = 0.0  # tokens that --budget's model reads and writes after training
    plot: str = ""  # image file to write plots of a fit to, .png or .pdf; needs matplotlib
    # Reports and files
    val_every: int = 1000  # updates between validations
    prompt: str = ""  # text that the sample continues; empty: the start of the held-out text
    out: str = ""  # directory of checkpoints, metrics.jsonl, runs.jsonl; empty: write nothing
    save_every: int = 1000  # updates between checkpoints
    resume: bool = False  # continue from the newest checkpoint in --out; a sweep always does
    eval: bool = False  # validate and sample the model of --init or --out, without training
    init: str = ""  # directory with the weights to start from, as --export writes it
    export: str = ""  # directory to write the weights to after training, as safetensors
    write_tokens: str = ""  # directory to write the data to as token shards, then exit

TABLE_A9 = (  # parameters in millions, D, E, H, layers; F = 4 D
    (44, 512, 64, 8, 8), (57, 576, 64, 9, 9), (74, 640, 64, 10, 10), (90, 640, 64, 10, 13),
    (106, 640, 64, 10, 16), (117, 768, 64, 12, 12), (140, 768, 64, 12, 15), (163, 768, 64, 12, 18),
    (175, 896, 64, 14, 14), (196, 896, 64, 14, 16), (217, 896, 64, 14, 18), (251, 1024, 64, 16, 16),
    (278, 1024, 64, 16, 18), (306, 1024, 64, 16, 20), (425, 1280, 128, 10, 18),
    (489, 1280, 128, 10, 21), (509, 1408, 128, 11, 18), (552, 1280, 128, 10, 24),
    (587, 1408, 128, 11, 21), (632, 1536, 128, 12, 19), (664, 1408, 128, 11, 24),
    (724, 1536, 128, 12, 22), (816, 1536, 128, 12, 25), (893, 1792, 128, 14, 20),
    (1018, 1792, 128, 14, 23), (1143, 1792, 128, 14, 26), (1266, 2048, 128, 16, 22),
    (1424, 2176, 128, 17, 22), (1429, 2048, 128, 16, 25), (1593, 2048, 128, 16, 28),
    (1609, 2176, 128, 17, 25), (1731, 2304, 128, 18, 24), (1794, 2176, 128, 17, 28),
    (2007, 2304, 128, 18, 28), (2283, 2304, 128, 18, 32), (2298, 2560, 128, 20, 26),
    (2639, 2560, 128, 20, 30), (2980, 2560, 128, 20, 34), (3530, 2688, 128, 22, 36),
    (3802, 2816, 128, 22, 36), (4084, 2944, 128, 22, 36), (4516, 3072, 128, 24, 36),
    (6796, 3584, 128, 28, 40), (9293, 4096, 128, 32, 42), (11452, 4352, 128, 32, 47),
    (12295, 4608, 128, 36, 44), (12569, 4608, 128, 32, 47), (13735, 4864, 128, 32, 47),
    (14940, 4992, 128, 32, 49), (16183, 5120, 128, 40, 47),
)  # fmt: skip
# Undisclosed: the sequence length, here Gopher's; Table A4's ratios come out with it.
PUBLISHED = dict(
    vocab_size=32_000, precision="bf16", micro_batch=1, compile=True, recompute="block"
)
PRESETS = {
    # For a CPU, minutes. Bytes, short sequences and many small updates, because attention forms
    # late; one layer in the sweep, because models this small are bound by the number of operations.
    "demo": dict(
        dim=48, n_layers=2, n_heads=3, head_dim=16, hidden_dim=192, seq_len=32, batch_size=24,
        lr=0.36 / 48, warmup_steps=300, log_every=10, val_batches=64,
        sweep="1e11,2e11,4e11", sizes="16x1,32x1,48x1,64x1,96x1",
    ),
    # For a GPU of 24 GB or a node of them, minutes: sizes around the optimum of Besiroglu's law.
    "small": dict(
        dim=256, n_layers=6, n_heads=8, head_dim=32, hidden_dim=1024, seq_len=256, batch_size=256,
        lr=1.5e-3, warmup_steps=300, compile=True, sweep="1e15,2e15,4e15,8e15",
        sizes="128x6,160x6,192x7,256x6,320x6,384x7",
    ),
    # Table 4: Chinchilla, 1.4T tokens, batch 1.5M -> 3M. Rebuilt with rotary positions it would
    # have 64.7B parameters, since those need no W_R.
    "70b": dict(PUBLISHED, batch_size=768, second_batch=1536, tokens=1.4e12),
    # Table 4: Gopher, 300B tokens, batch 3M -> 6M; its Adam is AdamW without decay.
    # Departure: fp32 weights, where Gopher rounded bf16 parameters stochastically.
    "280b": dict(PUBLISHED, dim=16384, n_heads=128, hidden_dim=65536, batch_size=1536, lr=4e-5,
                 second_batch=3072, tokens=3e11, weight_decay=0.0, clip=0.25),
}  # fmt: skip

for millions, dim, head_dim, n_heads, n_layers in TABLE_A9:
    # Undisclosed: the rate of each size between 2e-4 for the smallest and 1.25e-4 for the largest
    # (here linear in ln N), and the batches (here 0.5M tokens, as for the models of App. D.4).
    PRESETS[f"{millions}m"] = PUBLISHED | dict(
        dim=dim, n_layers=n_layers, n_heads=n_heads, head_dim=head_dim, hidden_dim=4 * dim,
        lr=2e-4 - 0.75e-4 * math.log(millions / 44) / math.log(16183 / 44),
    )  # fmt: skip
# Departure: bytes or a byte-level BPE instead of 32,000 pieces of SentencePiece; by default the
# standard library of Python instead of MassiveText, which is not public. Its mix (Table A1: 45 %
# MassiveWeb, 30 books, 10 C4, 10 news, 4 GitHub, 1 Wikipedia) has to be in the shards of --data.
# Undisclosed: the held-out split. About 5 % of the documents are held out, see load_corpora.
PATTERN = (  # how GPT-2, and gpt3.py when it learns ranks, split text, for BPE rank files
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)

PF_DAY = 8.64e19  # FLOPs, the unit of Kaplan's C
# Approach 3 with the digits in the source files of the paper: at 5.76e23 FLOPs they give the 40B
# that the paper states; the rounded constants that it prints (Eq. 10) give 32B.
HOFFMANN = dict(
    E=math.exp(0.5267228), A=math.exp(6.0073404), B=math.exp(6.0179186),
    alpha=0.33917084, beta=0.2849083,
)  # fmt: skip
HOFFMANN_ROUNDED = dict(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
BESIROGLU = dict(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
LLAMA3 = {"text": (0.29, 0.53), "Fig. 3": (0.299, 0.537)}  # optimal tokens = A C^alpha

# ---------------------------------------- Model ----------------------------------------

class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps), in fp32 and cast back, times a gain: [..., D]."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = F.rms_norm(x.float(), self.weight.shape, None, self.eps).type_as(x)
        return y * self.weight.type_as(x)

@functools.lru_cache(maxsize=4)
def distances(length, dim, device):
    """(Sinusoids of the distances T - 1 ... 0, half sines and half cosines, [T, D], R of
    Transformer-XL; the causal mask, 0 or -inf, [T, T]), fp32, for all layers and updates."""
    frequencies = 10000 ** (-torch.arange(0, dim, 2, device=device) / dim)  # [D/2]
    angles = torch.arange(length - 1.0, -1, -1, device=device)[:, None] * frequencies  # [T, D/2]
    mask = torch.full((length, length), -math.inf, device=device).triu(1)
    return torch.cat((angles.sin(), angles.cos()), -1), mask

def relative_shift(scores):
    """Scores of query i by distance (columns T - 1 ... 0) as scores by key j = i - distance:
    [..., T, T]. Entries with j > i belong to other rows: mask them (Transformer-XL, App. B)."""
    T = scores.shape[-1]
    scores = F.pad(scores, (1, 0))  # [..., T, T + 1], read as rows of T: row i moves T - 1 - i left
    return scores.reshape(*scores.shape[:-2], T + 1, T)[..., 1:, :]

class RelativeAttention(nn.Module):
    """softmax over j <= i of ((q_i + u) k_j + (q_i + w) W_R r_{i-j}) / sqrt(E), times v, as in
    Transformer-XL §3.3: x [B, T, D] -> [B, T, D]; r, mask: see distances."""

    # Undisclosed: whether each layer has its own W_R, u and w, and which layers have biases. With
    # all its own, and biases in the feed-forward layers alone, all but four of the 50 counts of
    # Table A9 come out. Nor is a memory of earlier sequences mentioned: there is none.

    def __init__(self, dim, n_heads, head_dim):
        super().__init__()
        self.n_heads = n_heads
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * n_heads * head_dim, bias=False)
        self.distance = nn.Linear(dim, n_heads * head_dim, bias=False)  # W_R
        self.out = nn.Linear(n_heads * head_dim, dim, bias=False)
        self.u = nn.Parameter(torch.zeros(n_heads * head_dim))
        self.w = nn.Parameter(torch.zeros(n_heads * head_dim))

    def forward(self, x, r, mask):
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4).contiguous()
        u = self.u.view(self.n_heads, 1, -1).type_as(q)  # [H, 1, E]
        w = self.w.view(self.n_heads, 1, -1).type_as(q)
        scale = 1 / math.sqrt(self.head_dim)
        r = self.distance(r.type_as(x)).view(T, self.n_heads, -1).permute(1, 2, 0) * scale
        content = (q + u) @ (k * scale).transpose(-2, -1)  # [B, H, T, T]
        position = relative_shift((q + w) @ r)  # [B, H, T, E] x [H, E, T] -> [B, H, T, T]
        p = (mask + content + position).softmax(-1).type_as(v)  # sums and softmax: fp32
        return self.out((p @ v).transpose(1, 2).reshape(B, T, -1))  # [B, T, D]

class PlainMLP(nn.Module):
    """GELU(x W_up + b_up) W_down + b_down, [B, T, D] -> [B, T, D] (Gopher §3.1)."""

    # Undisclosed: the form of GELU. The released code of GPT and GPT-2 has the tanh form.

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.up = nn.Linear(dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        x = F.gelu(self.up(x), approximate="tanh")  # [B, T, F]
        return self.down(x)  # [B, T, D]

class Block(nn.Module):
    """GPT-2's block with RMSNorm before each branch, [B, T, D] -> [B, T, D] (Gopher §3.1)."""

    # Undisclosed: activation, dropout and eps. As in GPT-2, GELU; no dropout, since most of the
    # text is read once.

    def __init__(self, cfg):
        super().__init__()
        self.norm1 = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attn = RelativeAttention(cfg.dim, cfg.n_heads, cfg.head_dim)
        self.norm2 = RMSNorm(cfg.dim, cfg.norm_eps)
        self.mlp = PlainMLP(cfg.dim, cfg.hidden_dim)

    def forward(self, x, r, mask):
        x = x + self.attn(self.norm1(x), r, mask)
        return x + self.mlp(self.norm2(x))

class Chinchilla(nn.Module):
    """Gopher's model (§4.1), tokens [B, T] -> logits [B, T, V] for any T; the softmax shares the
    token embedding, as the counts of Table A9 say."""

    def __init__(self, cfg):
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)

    def forward(self, tokens):
        x = self.token_embedding(tokens)  # [B, T, D]
        r, mask = distances(tokens.shape[1], x.shape[-1], tokens.device)  # [T, D], [T, T]
        for block in self.blocks:
            x = block(x, r, mask)
        return F.linear(self.norm(x), self.token_embedding.weight)  # [B, T, V]

def init_weights(model, cfg):
    """Draw matrices and embeddings from a normal distribution of mean 0 and standard deviation
    0.02, or 0.02 / sqrt(2 n_layers) if they end a residual branch; set gains to 1, biases to 0.

    Each parameter is drawn from a generator seeded by (seed, name), so that every layout
    starts from the same numbers. Raises ValueError for a parameter without a rule.
    """
    # Undisclosed: initialisation. This is GPT-2's.
    for name, p in model.named_parameters():
        if re.search(r"(^|\.)(token_embedding|qkv|distance|up|out|down)\.weight$", name):
            std = 0.02
            if re.search(r"\.(out|down)\.weight$", name):
                std /= math.sqrt(2 * cfg.n_layers)
            generator = torch.Generator().manual_seed(stable_hash(cfg.seed, name))
            fill_parameter(p, torch.empty(p.shape).normal_(0.0, std, generator=generator))
        elif re.search(r"\.(attn\.[uw]|(up|down)\.bias)$", name):
            nn.init.zeros_(p)
        elif re.search(r"(^|\.)norm[12]?\.weight$", name):
            nn.init.ones_(p)
        else:
            raise ValueError(f"no rule initialises {name}")

def count_parameters(model):
    """(total, activated) parameters; tied weights count once, a dense model activates all."""
    total = sum(p.numel() for p in model.parameters())
    return total, total

def flops_per_token(cfg):
    """Training FLOPs per token: 2 per weight of a matrix product forward, twice that backward.
    Attention counts as causal, (T + 1) / 2 keys per query, half of what the full square gives;
    W_R r is left out, since one product serves all sequences of a batch."""
    width = cfg.n_heads * cfg.head_dim
    weights = cfg.n_layers * (4 * cfg.dim * width + 2 * cfg.dim * cfg.hidden_dim)
    attention = cfg.n_layers * 3 * width * (cfg.seq_len + 1) / 2  # q k, q r, A v
    return 6 * (weights + attention + cfg.vocab_size * cfg.dim)

def appendix_f(cfg):
    """Forward FLOPs of a sequence of T tokens by the terms of Appendix F; training takes three
    times as many. Table A4's ratios to 6 N D come out with "body" alone, and the 6.3e23 that the
    paper gives for Gopher is four times "body", as if one forward pass were recomputed."""
    T, D, L, V = cfg.seq_len, cfg.dim, cfg.n_layers, cfg.vocab_size
    width = cfg.n_heads * cfg.head_dim
    attention = 2 * 3 * T * D * width  # queries, keys, values
    attention += 2 * T * T * width + 3 * cfg.n_heads * T * T  # logits, softmax
    attention += 2 * T * T * width + 2 * T * width * D  # values by probabilities, output
    dense = 2 * T * (2 * D * cfg.hidden_dim)
    terms = {"embeddings": 2 * T * V * D, "body": L * (attention + dense), "logits": 2 * T * D * V}
    return terms | {"total": sum(terms.values())}

# ---------------------------------------- Data ----------------------------------------

def get_batch(corpus, first, n, cfg):
    """Sequences first ... first + n - 1 of the run: tokens and targets [n, T], and their counts.

    A pure function of the seed and the index, so that any number of ranks, any accumulation and
    any resume see the same sequences. n_targets counts targets, n_bytes the bytes of their text.
    """
    # Undisclosed: how documents fill sequences. As in GPT-3 they are concatenated, each followed by
    # <|endoftext|>, and attention crosses their borders.
    windows = np.stack([corpus.window(first + i, cfg.seq_len, cfg.seed) for i in range(n)])
    tokens = torch.from_numpy(windows[:, :-1].copy())
    targets = windows[:, 1:].copy()
    counts = {"n_targets": targets.size, "n_bytes": int(corpus.token_bytes[targets].sum())}
    return {"tokens": tokens, "targets": torch.from_numpy(targets), **counts}

# ---------------------------------------- Objective ----------------------------------------

def objective(model, batch, cfg):
    """The sum of -log P(next token) over the batch's targets, divided by batch["n_targets"], the
    count of the whole global batch. There are no metrics."""
    with torch.autocast(batch["tokens"].device.type, torch.bfloat16, cfg.precision == "bf16"):
        logits = model(batch["tokens"]).float().flatten(0, 1)  # [B T, V]
    nats = F.cross_entropy(logits, batch["targets"].flatten(), reduction="sum")
    return nats / max(batch["n_targets"], 1), {}

# ---------------------------------------- Laws ----------------------------------------

def parametric_loss(law, N, D):
    """Eq. 2: E + A / N^alpha + B / D^beta, in nats per token."""
    return law["E"] + law["A"] / N ** law["alpha"] + law["B"] / D ** law["beta"]

def frontier(law, C):
    """Eq. 4: (N, D) of least parametric loss with 6 N D = C."""
    alpha, beta = law["alpha"], law["beta"]
    G = (alpha * law["A"] / (beta * law["B"])) ** (1 / (alpha + beta))
    return G * (C / 6) ** (beta / (alpha + beta)), (C / 6) ** (alpha / (alpha + beta)) / G

def frontier_power_law(law):
    """(k, a) of the frontier's N = k C^a."""
    a = law["beta"] / (law["alpha"] + law["beta"])
    return frontier(law, 6.0)[0] / 6**a, a

def overtrain(law, N, D, inference):
    """Sardana Eq. 3: (N, D) of the same loss as the given ones and the least cost 6 N D + 2 N
    inference of training and inference, from a grid of smaller models."""
    N = N * np.geomspace(1e-6, 1, 100_001)
    N_term = law["A"] / N ** law["alpha"]
    D_term = law["B"] / D ** law["beta"] - (N_term - N_term[-1])  # what N adds, D has to save
    N = N[D_term > 0]
    D = (law["B"] / D_term[D_term > 0]) ** (1 / law["beta"])
    best = np.argmin(6 * N * D + 2 * N * inference)
    return N[best], D[best]

def critical_batch(loss):
    """Kaplan Eq. 1.4: tokens of the batch with which training to a loss takes twice the least
    number of updates and twice the least number of tokens."""
    return 2e8 / loss ** (1 / 0.21)

def kaplan_optimum(C):
    """Kaplan Table 6, Eq. 1.3: (optimal N without embeddings, tokens D, loss) for C_min in FLOPs,
    the compute with a batch B far below the critical one: C = C_min (1 + B / B_crit)."""
    days = C / PF_DAY
    return 1.3e9 * days**0.73, 2e10 * days**0.27, (3.1e8 / days) ** 0.050

SQUARES = 1e9  # delta with which a Huber loss is half the square

class TooFewRuns(Exception):
    """A law cannot be fitted to these runs; the message says what they lack."""

def minimize(function, start):
    """(minimum, argument) of function, [P] -> scalar, by L-BFGS from start, in float64."""
    x = torch.tensor(np.array(start), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [x], max_iter=500, history_size=20, tolerance_grad=1e-9, tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        # Departure: the sums are 1e-5 to 1e-3, near the optimizer's tolerances, and are scaled. The
        # paper's fit, of a mean over runs, stopped far from the minimum (Besiroglu).
        loss = 1e6 * function(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    return function(x).item(), x.detach().numpy()

def best_minimum(residuals, delta, axes, start):
    """The argument of the least Huber sum of residuals(x [..., P]) [..., R], by L-BFGS from start
    or, if it is None, from the best five points of the grid of axes."""
    objective = functools.partial(huber_sum, residuals, delta)
    starts = [start]
    if start is None:
        grid = torch.cartesian_prod(*(torch.tensor(list(axis)).double() for axis in axes))
        starts = grid[objective(grid).argsort()[:5]].tolist()
    minima = [minimize(objective, start) for start in starts]
    minima = [(value, x.tolist()) for value, x in minima if math.isfinite(value)]
    if not minima:
        raise TooFewRuns("no minimum")
    return min(minima)[1]

def columns(rows, *names):
    """The named columns of the rows, as float64 arrays."""
    return [np.array([row[name] for row in rows], np.float64) for name in names]

def power_law(x, y):
    """(k, exponent) of y = k x^exponent by least squares in logarithms."""
    exponent, log_k = np.polyfit(np.log(x), np.log(y), 1)
    return math.exp(log_k), exponent

def smoothed(losses):
    """Losses averaged over a Gaussian with a window of 10, also at both ends (§3.1)."""
    # Undisclosed: the Gaussian's standard deviation, here a quarter of the window.
    # Departure: the window counts logged updates, because those of small runs have few tokens.
    kernel = np.exp(-0.5 * (np.arange(-5, 6) / 2.5) ** 2)
    total = np.convolve(losses, kernel)[5:-5]
    return total / np.convolve(np.ones(len(losses)), kernel)[5:-5]

def training_curves(rows):
    """(N, FLOPs per token, tokens, losses) of each run that has a curve."""
    return [(r["N"], r["C"] / r["D"], *np.array(r["curve"]).T) for r in rows if r.get("curve")]

def envelope(curves):
    """§3.1, App. D.1: (C, N, D, loss) of the run of least loss at 1500 FLOPs, from the end of the
    first run to that of the first run of the highest budget."""
    ends = [cost * tokens[-1] for _, cost, tokens, _ in curves]
    if not curves or max(ends) < 1.5 * min(ends):
        raise TooFewRuns("needs training curves of two budgets")
    C = np.geomspace(min(ends), min(end for end in ends if end > 0.9 * max(ends)), 1500)
    losses = np.array([
        np.interp(np.log(C), np.log(cost * tokens), loss, math.inf, math.inf)
        for _, cost, tokens, loss in curves
    ])  # [R, 1500]; infinite before and after a run
    reached = np.isfinite(losses.min(0))
    C = C[reached]
    losses = losses[:, reached]
    N, cost = np.array([curve[:2] for curve in curves])[losses.argmin(0)].T
    return C, N, C / cost, losses.min(0)

def fit_envelope(rows, start=None):
    """Approach 1 (§3.1): power laws through the sizes and tokens that lie on the envelope."""
    # Departure: each size has one cosine per budget, where the paper has four over a factor of 16.
    C, N, D, _ = envelope(training_curves(rows))
    if len(set(N)) < 3:
        raise TooFewRuns("fewer than three sizes have the least loss at some budget")
    k, a = power_law(C, N)
    _, b = power_law(C, D)
    return {"a": a, "b": b, "k": k, "sizes": len(set(N))}, None

def budgets_of(rows):
    """The runs of each budget that has three sizes or more, in the order of budgets: runs whose
    budgets or, without that column, C are neighbours less than a tenth apart."""
    C = np.array([row.get("budget") or row["C"] for row in rows])
    order = C.argsort(kind="stable")
    C = C[order]
    firsts = np.flatnonzero(C[1:] > 1.1 * C[:-1]) + 1  # of all budgets but the lowest
    groups = [[rows[i] for i in same] for same in np.split(order, firsts)]
    return [group for group in groups if len({row["N"] for row in group}) >= 3]

def parabola(rows, name):
    """§3.2: the parabola of the loss over the logarithm of a column, N or D, of a budget's runs:
    (N, D, C and loss at its lowest point, or None if that is outside the runs; coefficients)."""
    # Undisclosed: the parabola's argument and weights, here ln N and equal weights.
    rows = sorted(rows, key=lambda row: row[name])
    x, *logs = np.log(columns(rows, name, "N", "D", "C"))
    c = np.polyfit(x, *columns(rows, "loss"), 2)
    lowest = -c[1] / (2 * c[0]) if c[0] > 0 else math.nan
    if not x[0] < lowest < x[-1]:
        return None, c
    # N and D are both read off, because C = 6 N D does not hold with --flops appF.
    point = {key: math.exp(np.interp(lowest, x, y)) for key, y in zip("NDC", logs)}
    return point | {"loss": np.polyval(c, lowest)}, c

def lowest_points(rows, name):
    """The lowest point of each budget that has one inside, with the run nearest to it."""
    points = []
    for same in budgets_of(rows):
        point, _ = parabola(same, name)
        if point:
            nearest = min(same, key=lambda row: abs(math.log(row[name] / point[name])))
            points.append(point | {"run": nearest})
    if len(points) < 2:
        raise TooFewRuns("needs two budgets whose lowest loss lies inside three sizes or more")
    return points

def fit_isoflop(rows, start=None):
    """Approach 2 (§3.2): power laws through the lowest points of the IsoFLOP parabolas."""
    C, N, D = columns(lowest_points(rows, "N"), "C", "N", "D")
    k, a = power_law(C, N)
    _, b = power_law(C, D)
    return {"a": a, "b": b, "k": k, "budgets": len(C)}, None

def huber_sum(residuals, delta, x):
    """Eq. 3: the sum over runs of the Huber losses of residuals(x [..., P]) [..., R]: [...]."""
    r = residuals(x)
    return F.huber_loss(r, torch.zeros_like(r), reduction="none", delta=delta).sum(-1)

def parametric_residuals(x, ln_N, ln_D, ln_L):
    """ln of Eq. 2 minus ln L, x = (a, b, e, alpha, beta) [..., 5] with A, B, E = exp(a, b, e)."""
    a, b, e, alpha, beta = x[..., None].unbind(-2)  # [..., 1] each
    terms = torch.broadcast_tensors(a - alpha * ln_N, b - beta * ln_D, e)
    return torch.stack(terms).logsumexp(0) - ln_L  # [..., R]

def fit_law(rows, residuals, delta, axes, start):
    """The argument of least Huber sum for a law of N, D and L; axes, start: see best_minimum."""
    N, D, L = (torch.from_numpy(np.log(column)) for column in columns(rows, "N", "D", "loss"))
    if len(set(N.tolist())) < 3 or len(set(D.tolist())) < 3 or len(rows) < 6:
        raise TooFewRuns("needs six runs, of three sizes and three D")
    residuals = functools.partial(residuals, ln_N=N, ln_D=D, ln_L=L)
    x = best_minimum(residuals, delta, axes, start)
    if min(x[-2:]) <= 0 or not -700 < min(x) <= max(x) < 700:
        raise TooFewRuns("the loss does not fall with N and D")
    return x

def fit_parametric(rows, start=None, delta=1e-3):
    """Approach 3 (§3.3, App. D.2): Eq. 2 by Huber loss and L-BFGS from a grid of 4500 starts."""
    # Undisclosed: which final losses enter, here all but those that --drop_highest leaves out.
    # Departure: all starts are scored, but only the best five are followed, to save time.
    axes = [np.arange(0, 26, 5)] * 2 + [np.arange(-1, 1.1, 0.5)] + [np.arange(0, 2.1, 0.5)] * 2
    x = fit_law(rows, parametric_residuals, delta, axes, start)
    law = dict(zip("ABE", np.exp(x[:3]).tolist())) | {"alpha": x[3], "beta": x[4]}
    k, a = frontier_power_law(law)
    return {"a": a, "b": 1 - a, "k": k} | law, x

def kaplan_residuals(x, ln_N, ln_D, ln_L):
    """ln of Kaplan's Eq. 1.5, [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D, minus ln L,
    x = (ln N_c, ln D_c, alpha_N, alpha_D) [..., 4]; N has no embeddings."""
    # Departure: of Kaplan's laws, only this one, the critical batch and the optimum are here. Left
    # out: the laws of N, of D and of updates (Eq. 1.1, 1.2, 1.6), overfitting (4.4), rates (D.1).
    N_c, D_c, alpha_N, alpha_D = x[..., None].unbind(-2)
    return alpha_D * torch.logaddexp(alpha_N / alpha_D * (N_c - ln_N), D_c - ln_D) - ln_L

def fit_kaplan(rows, start=None):
    """Kaplan Eq. 1.5, with N without embeddings where runs have it, and the optimum it implies.
    Kaplan's own constants (Table 2): N_c 6.4e13, D_c 1.8e13, alpha_N 0.076, alpha_D 0.103."""
    # Undisclosed: how Kaplan fits it, here least squares in ln L.
    # Departure: Kaplan leaves out models of one layer (D.7), but the demo has no others.
    rows = [row | {"N": row.get("N_non_embedding") or row["N"]} for row in rows]
    axes = [np.arange(5, 41, 5)] * 2 + [(0.03, 0.07, 0.15, 0.3, 0.6)] * 2
    x = fit_law(rows, kaplan_residuals, SQUARES, axes, start)
    N_c, D_c, alpha_N, alpha_D = x  # logarithms of N_c and D_c
    p = alpha_N / alpha_D  # least loss with 6 N D = C: p (N_c / N)^p = 6 D_c N / C
    k = math.exp((math.log(p / 6) + p * N_c - D_c) / (1 + p))
    law = {"N_c": math.exp(N_c), "D_c": math.exp(D_c), "alpha_N": alpha_N, "alpha_D": alpha_D}
    return {"a": 1 / (1 + p), "b": p / (1 + p), "k": k} | law, x

def fit_llama(rows, start=None):
    """Llama 3 §3.2.1: the optimal tokens D = A C^b, through the lowest points of parabolas over
    ln D; and fit_accuracy, if the runs allow."""
    C, N, D = columns(lowest_points(rows, "D"), "C", "N", "D")
    k, a = power_law(C, N)
    A, b = power_law(C, D)
    law = {"a": a, "b": b, "k": k, "A": A}
    x = None
    with contextlib.suppress(TooFewRuns):
        accuracy, x = fit_accuracy(rows, start)
        law |= accuracy
    return law, x

def fit_accuracy(rows, start):
    """Llama 3 §3.2.1, of runs with the columns nll, in nats per character of a benchmark's correct
    answers, and accuracy: nll of the optimal models = intercept + slope ln C, and accuracy =
    1/4 + 3/4 / (1 + exp(k (nll - m))), with chance among four answers as its floor."""
    # Undisclosed: how the sigmoid is fitted and what its floor is, here least squares and chance.
    # Departure: to all runs, where the paper takes the optimal ones and the Llama 2 models.
    rows = [row for row in rows if None not in (row.get("nll"), row.get("accuracy"))]
    optimal = [point["run"] for point in lowest_points(rows, "D")]
    slope, intercept = np.polyfit(*np.log(columns(optimal, "C")), *columns(optimal, "nll"), 1)
    nll, accuracy = (torch.from_numpy(column) for column in columns(rows, "nll", "accuracy"))

    def residuals(x):
        m, k = x[..., None].unbind(-2)
        return 0.25 + 0.75 * torch.sigmoid(-k * (nll - m)) - accuracy

    axes = [np.linspace(nll.min().item() - 1, nll.max().item() + 1, 20), np.geomspace(0.1, 50, 20)]
    m, k = best_minimum(residuals, SQUARES, axes, start)
    line = {"nll_intercept": intercept, "nll_slope": slope}
    return line | {"sigmoid_m": m, "sigmoid_k": k}, [m, k]

FITS = {  # each returns (constants, start for the fits of resamples, None if nothing is searched)
    "approach 1": fit_envelope, "approach 2": fit_isoflop, "approach 3": fit_parametric,
    "Kaplan": fit_kaplan, "Llama 3": fit_llama,
}  # fmt: skip

def fit_resamples(fit, rows, ahead, n_resamples, generator):
    """{constant of the fit, or N_ahead, the optimal N for `ahead` FLOPs: (value, its 10 % and 90 %
    over the resamples of 80 % of the rows that have it, how many do)}."""
    # Undisclosed: whether resamples are drawn with replacement, here without.
    # Departure: their searches start from the minimum of all rows and not from the grid.
    best, x = fit(rows)
    resamples = [best]
    for _ in range(n_resamples):
        chosen = generator.choice(len(rows), round(0.8 * len(rows)), replace=False)
        with contextlib.suppress(TooFewRuns):
            resamples.append(fit([rows[i] for i in chosen], x)[0])
    for constants in resamples:
        constants["N_ahead"] = power(constants["k"], constants["a"], ahead)
    intervals = {}
    for key, value in best.items():
        values = [constants[key] for constants in resamples[1:] if key in constants]
        interval = np.percentile(values or [math.nan], (10, 90)).tolist()
        intervals[key] = (value, *interval, len(values))
    return intervals

def read_table(path):
    """The rows of a .jsonl, without lines that a kill cut short, or of a .csv, as dicts."""
    with explain(f"{path} is not a table", ValueError, csv.Error):
        lines = Path(path).read_text("utf-8-sig").splitlines(True)
        if Path(path).suffix == ".jsonl":
            return [json.loads(line) for line in lines if line.strip().endswith("}")]
        return list(csv.DictReader(lines))

def read_runs(path, table, flops):
    """The runs of a table, read from path, that did not diverge: rows with N, D, loss, C (C_appF if
    flops is "appF"; 6 N D without a column C), and further columns if there are."""
    written = [row for row in table if "key" in row]  # by a sweep
    if any(row.get("flops", flops) != flops for row in written):
        raise ValueError(f"{path} has a sweep of another --flops than {flops}")
    if len({row.get("sweep") for row in written}) > 1:  # of other data or another configuration
        raise ValueError(f"{path} has several sweeps: repeat the command of one to fit its runs")
    runs = []
    for number, row in enumerate(table, 1):
        if row.get("loss") is None and "key" in row:
            print(f"run {row.get('name')} diverged: it is left out")
            continue
        with explain(f"{path}, run {number}, is not numbers above 0", Exception):
            run = {name: float(row[name]) for name in ("N", "D", "loss")}
            run["C"] = 6 * run["N"] * run["D"]
            for name in ("C", "C_appF", "nll", "accuracy", "N_non_embedding", "budget"):
                if row.get(name) not in (None, ""):
                    run[name] = float(row[name])
            if flops == "appF":
                run["C"] = run["C_appF"]
            if not all(0 < x < math.inf for x in run.values()):
                raise ValueError(f"it has {run}")
        runs.append(run | {"curve": row.get("curve")})
    if not runs:
        raise ValueError(f"{path} has no runs")
    return runs

def human(x):
    """x with three digits and a unit, as 1.41M; in exponential form from 1e15 on."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if size <= x < 1e15:
            return f"{x / size:#.3g}".rstrip(".") + unit
    return f"{x:.3g}"

def plot(rows, fits, path):
    """Write three panels to an image file: IsoFLOP parabolas (§3.2), training curves with their
    envelope (§3.1), and the optimal N by every fit and by the published approach 3."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (isoflop, training, optimum) = plt.subplots(1, 3, figsize=(20, 6))
    for same in budgets_of(rows):
        N, loss, C = columns(sorted(same, key=lambda row: row["N"]), "N", "loss", "C")
        (line,) = isoflop.plot(N, loss, "o", label=f"{C[0]:.2g} FLOPs")
        point, c = parabola(same, "N")
        x = np.geomspace(N[0], N[-1], 100)
        isoflop.plot(x, np.polyval(c, np.log(x)), "-", color=line.get_color())
        if point:
            isoflop.plot(point["N"], point["loss"], "*", color=line.get_color(), markersize=14)
            optimum.plot(point["C"], point["N"], "k*")
    curves = training_curves(rows)
    sizes = sorted({N for N, *_ in curves})
    for N, cost, tokens, loss in curves:
        training.plot(cost * tokens, loss, color=f"C{sizes.index(N)}", linewidth=0.8)
    for i, N in enumerate(sizes):
        training.plot([], [], color=f"C{i}", label=f"N {human(N)}")
    with contextlib.suppress(TooFewRuns):
        C, N, _, loss = envelope(curves)
        training.plot(C, loss, "k:", label="envelope")
        optimum.plot(C, N, "k.", markersize=2, label="envelope")
    (C,) = columns(rows, "C")
    C = np.geomspace(C.min(), 10 * C.max(), 50)
    optimum.plot(C, frontier(HOFFMANN, C)[0], "k--", label="approach 3 as published, C = 6 N D")
    for name, law in fits.items():
        a = law["a"][0]
        (line,) = optimum.plot(C, law["k"][0] * C**a, label=f"{name}, a {a:.3f}")
        optimum.plot([C[-1]] * 2, law["N_ahead"][1:3], "_-", color=line.get_color())
    isoflop.set(xscale="log", xlabel="N", ylabel="loss, nats per token")
    training.set(xscale="log", xlabel="FLOPs", ylabel="training loss, smoothed")
    optimum.set(xscale="log", yscale="log", xlabel="C, FLOPs", ylabel="optimal N (lowest point: *)")
    for panel in figure.axes:
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
    print(f"plots are written to {path}")

def shown(key, value, low, high, count, of):
    """A constant with its interval and, unless all have it, how many of the resamples do."""
    interval = "n/a" if math.isnan(low) else f"{low:.4g}, {high:.4g}"
    return f"{key} {value:.4g} [{interval}{f'; {count} of {of}' if count < of else ''}]"

def fit_and_report(rows, cfg):
    """Fit all laws to rows; print the lowest points of the budgets and the constants with their
    intervals, and plot. Returns {law: constants as of fit_resamples} of the laws that fit."""
    print(f"fits to {len(rows)} runs; in brackets 10 to 90 % of {cfg.bootstrap} resamples of 80 %")
    ahead = 10 * max(row["C"] for row in rows)
    print(f"optimal N = k C^a, optimal D ~ C^b; N_ahead is that N for C {ahead:.3g},", end=" ")
    print("10 times the largest; approach 3 and Kaplan's law count C as 6 N D")
    for same in budgets_of(rows):
        N, C = columns(same, "N", "C")
        point, _ = parabola(same, "N")
        optimum = "none inside the swept sizes"
        if point:
            ratio = point["D"] / point["N"]
            optimum = f"{human(point['N'])}, loss {point['loss']:.4f}, D/N {ratio:.3g}"
        sizes = f"{human(N.min())} ... {human(N.max())}"
        print(f"C {C.mean():.3g} | {len(same)} runs | N {sizes} | lowest point {optimum}")
    kept = sorted(rows, key=lambda row: -row["loss"])[cfg.drop_highest :]
    fits = {}
    for name, fit in FITS.items():
        used = kept if fit is fit_parametric else rows
        generator = np.random.default_rng(stable_hash(cfg.seed, name))
        try:
            law = fit_resamples(fit, used, ahead, cfg.bootstrap, generator)
        except TooFewRuns as error:
            print(f"{name:10} | n/a: {error}")
            continue
        fits[name] = law
        print(f"{name:10} | {' | '.join(shown(k, *v, cfg.bootstrap) for k, v in law.items())}")
        if name == "approach 1" and law["sizes"][0] < 10:
            print(f"{'':10} | with so few sizes, the exponent depends on the grid of sizes")
    if cfg.plot:
        try:
            plot(rows, fits, cfg.plot)
        except Exception as error:  # must not end a run whose fits are complete
            print(f"no plots: {type(error).__name__}: {error}")
    return fits

def power(k, a, C):
    """k C^a, within e^-200 ... e^200."""
    return math.exp(max(min(math.log(k) + a * math.log(C), 200), -200))

def all_laws(fits):
    """[(name, k, a of N = k C^a, a with its interval as text, parametric law or None)] of every
    published law and of our own fits."""
    # a: as in Table 2, with 10 to 90 %; Besiroglu's with the standard error. For approaches 1 and 2
    # no k is published: these power laws are the least squares through Tables 3 and A3.
    laws = [
        ("Kaplan, Table 6 *", kaplan_optimum(PF_DAY)[0] / PF_DAY**0.73, 0.73, "0.73", None),
        ("Hoffmann, approach 1", 0.09916, 0.49810, "0.50 (0.488, 0.502)", None),
        ("Hoffmann, approach 2", 0.14488, 0.48994, "0.49 (0.462, 0.534)", None),
        ("Hoffmann, approach 3", *frontier_power_law(HOFFMANN), "0.46 (0.454, 0.455)", HOFFMANN),
        ("same, as printed", *frontier_power_law(HOFFMANN_ROUNDED), "0.452", HOFFMANN_ROUNDED),
        ("Besiroglu", *frontier_power_law(BESIROGLU), "0.513 +- 0.02", BESIROGLU),
    ]
    for name, (A, alpha) in LLAMA3.items():
        laws.append((f"Llama 3, {name}", 1 / (6 * A), 1 - alpha, f"{1 - alpha:.3f}", None))
    for name, law in fits.items():
        values = {key: value for key, (value, *_) in law.items()}
        interval = shown("", *law["a"], law["a"][-1]).strip()
        parametric = values if "E" in values else None
        name = f"own fit, {name}" + " *" * (name == "Kaplan")
        laws.append((name, values["k"], values["a"], interval, parametric))
    return laws

def answer(cfg, fits):
    """Print the optimal N and D for a budget by every law."""
    C = cfg.budget
    used = cfg.inference_tokens
    _, kaplan_D, loss = kaplan_optimum(C)
    print(f"budget {C:.3g} FLOPs = {C / PF_DAY:.3g} PF-days | D = C / 6N | a of N = k C^a")
    for name, k, a, interval, law in all_laws(fits):
        N = power(k, a, C)
        D = kaplan_D if name.startswith("Kaplan") else C / (6 * N)
        line = f"{name:21} | N {human(N):>7} | D {human(D):>7} | D/N {D / N:8.3g} | a {interval:21}"
        if law:
            line += f" | loss {parametric_loss(law, N, D):.4f}"
        if law and used:
            small_N, large_D = overtrain(law, N, D, used)
            ratio = (6 * small_N * large_D + 2 * small_N * used) / (6 * N * D + 2 * N * used)
            line += f" | used for {human(used)} tokens: N {human(small_N)},"
            line += f" D {human(large_D)}, {ratio:.3f} of the cost"
        print(line.rstrip())
    print("* N without embeddings; Table 6 has a fit of D, too, and its C is C_min, of batches far")
    print(f"below the critical {human(critical_batch(loss))} tokens (Eq. 1.4 at loss {loss:.3f})")

# ---------------------------------------- Sweep ----------------------------------------

def is_sweep(cfg):
    """Whether to train a sweep: --sweep has budgets, and no flag asks for a single run."""
    return bool(cfg.sweep) and not cfg.steps and not cfg.eval

def plan_sweep(cfg, fingerprint):
    """[(first columns of the run's row in runs.jsonl, Config of the run)] for each budget and size,
    the longest run first. Column "sweep" is a hash of the data's fingerprint, of --flops and of
    the fields of Config before `data` except the seed; "key" of all that determines the run."""
    values = dataclasses.asdict(dataclasses.replace(cfg, seed=0))
    names = list(values)[: list(values).index("data")]
    shared = stable_hash(fingerprint, cfg.flops, [values[name] for name in names])
    plan = []
    for C, size in itertools.product(cfg.sweep.split(","), cfg.sizes.split(",")):
        with explain(f"--sweep {C} --sizes {size} is not FLOPS,... and presets or WIDTHxLAYERS",
                     ValueError, OverflowError):  # fmt: skip
            C = float(C)
            # Undisclosed: batches and warm-up of the sweep's models ("well-tested heuristics").
            # Here all have the same batch, and warm-up is at most a tenth of a run.
            if size in PRESETS:
                names_of_size = ("dim", "n_layers", "n_heads", "head_dim", "hidden_dim", "lr")
                changes = {name: getattr(Config(**PRESETS[size]), name) for name in names_of_size}
            else:  # Departure: the learning rate of small models falls with their width
                dim, n_layers = map(int, size.split("x"))
                changes = dict(dim=dim, n_layers=n_layers, hidden_dim=4 * dim)
                changes |= dict(n_heads=dim // cfg.head_dim, lr=cfg.lr * cfg.dim / dim)
                if dim % cfg.head_dim or dim % 2 or n_layers < 1:
                    raise ValueError(f"heads of {cfg.head_dim} do not divide the width {dim}")
            run = dataclasses.replace(cfg, **changes, sweep="", sizes="")
            with torch.device("meta"):
                N, _ = count_parameters(Chinchilla(run))
            cost = 6 * N
            if cfg.flops == "appF":
                cost = 3 * appendix_f(run)["total"] / run.seq_len
            run.steps = round(C / cost / (run.batch_size * run.seq_len))  # D = C / FLOPs per token
            if run.steps < 1:
                raise ValueError(f"{C:g} FLOPs are not one update of {size}")
        key = f"{stable_hash(shared, cfg.seed, changes, C) % 16**12:012x}"
        row = {"key": key, "name": f"{run.dim}x{run.n_layers}_{C:g}_{key}", "sweep": f"{shared:x}"}
        plan.append((row | {"flops": cfg.flops, "budget": C, "N": N}, run))
    # An update of a very small model takes as long as some 5e7 FLOPs, whatever it computes.
    return sorted(plan, key=lambda planned: -planned[0]["budget"] - 5e7 * planned[1].steps)

class OnceAMinute(io.TextIOBase):
    """An output that prints the text written to it at most once a minute, after a head."""

    def __init__(self, head):
        self.head = head
        self.stdout = sys.stdout
        self.last = time.monotonic()

    def write(self, text):
        if time.monotonic() > self.last + 60 and text.strip():
            self.last = time.monotonic()
            self.stdout.write(f"{self.head} | {text.strip()}\n")

def train_run(row, run, corpus, heldout, device, signals):
    """Train one run of a sweep in its directory run.out, from its checkpoint if it has one. Returns
    its row for runs.jsonl, of loss None if it diverged; None if a signal stopped it."""
    if run.compile:
        torch.compiler.reset()  # each size recompiles the block, and the number of times is limited
    run.val_every = run.steps + 1  # validate at the start and at the end
    run.resume = True
    with contextlib.redirect_stdout(OnceAMinute(row["name"])), contextlib.suppress(Diverged):
        if not single_run(run, set(), corpus, heldout, None, device, signals):
            return None
    # Departure: all approaches but the first are fitted to the held-out loss, where the paper takes
    # the smoothed training loss; small sweeps repeat their text, and have few updates to smooth.
    logged = [json.loads(line) for line in (Path(run.out) / "metrics.jsonl").open()]
    loss = logged[-1].get("val_loss")  # on the same windows for all runs; None if one diverged
    if loss is None:
        return row | {"loss": None}
    updates = {r["step"]: r for r in logged if r.get("loss")}  # a resume logs some again
    tokens, losses = columns([updates[step] for step in sorted(updates)], "tokens", "loss")
    losses = smoothed(losses)
    kept = np.unique(np.geomspace(1, len(losses), 100).round().astype(int)) - 1
    D = tokens[-1]
    return row | {
        "D": D, "C": 6 * row["N"] * D, "C_appF": 3 * appendix_f(run)["total"] / run.seq_len * D,
        "N_non_embedding": row["N"] - run.vocab_size * run.dim, "steps": run.steps, "lr": run.lr,
        "seed": run.seed, "loss": loss, "train_loss": losses[-1],
        "curve": np.stack((tokens, losses), 1)[kept].round(5).tolist(),
    }  # fmt: skip

def finished(file):
    """{key: row} of the runs in runs.jsonl."""
    return {row["key"]: row for row in read_table(file)} if file.exists() else {}

def sweep(cfg, plan, corpus, heldout, device, queue, signals):
    """Train the planned runs that the queue gives this rank, except those in runs.jsonl; rank 0
    waits for the other ranks. Returns whether all runs are finished."""
    store, rank, ranks = queue
    file = Path(cfg.out) / "runs.jsonl"
    while not signals:
        turn = store.add("next", 1) - 1
        if turn >= len(plan):
            break
        row, run = plan[turn]
        if row["key"] in finished(file):
            continue
        run.out = str(Path(cfg.out) / row["name"])
        print(f"run {turn + 1}/{len(plan)}: {row['name']}, {run.steps:,} updates")
        row = train_run(row, run, corpus, heldout, device, signals)
        if row:
            with open(file, "ab", buffering=2**20) as end:  # one write: lines of ranks do not mix
                end.write(f"\n{json.dumps(row)}\n".encode())
            if not cfg.keep_models:
                shutil.rmtree(run.out)
    with contextlib.suppress(dist.DistNetworkError):  # rank 0, which has the store, was stopped
        store.add("ended", 1)
    while rank == 0 and not signals and store.add("ended", 0) < ranks:
        time.sleep(0.1)
    return finished(file).keys() >= {row["key"] for row, _ in plan}

def sweep_and_fit(cfg, corpus, heldout, device, queue, signals):
    """Train the sweep over the ranks of the queue, in cfg.out or a temporary directory, and fit
    the laws to it on rank 0."""
    store, rank, ranks = queue
    plan = plan_sweep(cfg, corpus.fingerprint())
    if device.type == "cpu" and max(run.dim for _, run in plan) <= 256:
        torch.set_num_threads(1)  # threads slow down products this small
    with tempfile.TemporaryDirectory(prefix="chinchilla_", ignore_cleanup_errors=True) as folder:
        if rank == 0:
            store.set("folder", cfg.out or folder)
        cfg.out = store.get("folder").decode()
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        file = Path(cfg.out) / "runs.jsonl"
        n_done = sum(row["key"] in finished(file) for row, _ in plan)
        print(f"sweep of {len(plan)} runs over {ranks} ranks, of which {n_done} are done")
        for row, run in plan:
            epochs = run.steps * run.batch_size / corpus.n_windows(run.seq_len)
            warning = ", a warning: more than four" if epochs > 4 else ""
            print(f"  {row['name']}: N {human(row['N'])},", end=" ")
            print(f"D {human(planned_tokens(run, 0))}, {epochs:.2f} epochs{warning}")
        if not sweep(cfg, plan, corpus, heldout, device, queue, signals):
            return print("stopped by a signal" if signals else "another rank failed")
        if rank == 0:
            table = [finished(file)[row["key"]] for row, _ in plan]
            fit_and_report(read_runs(file, table, cfg.flops), cfg)

# ---------------------------------------- Optimizer ----------------------------------------

def build_optimizer(model, cfg):
    """AdamW (§4.1, App. G), whose decay is on all weights that are neither bias nor gain."""
    # Undisclosed: betas, eps and decay, here GPT-3's; warm-up and clipping, here Gopher's.
    groups = [
        dict(params=[p for p in model.parameters() if p.ndim > 1], weight_decay=cfg.weight_decay),
        dict(params=[p for p in model.parameters() if p.ndim <= 1], weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)

def learning_rate(sequences, cfg):
    """After that many sequences: linear from 1e-7 (Gopher), then a cosine that falls tenfold over
    `cosine` times the tokens of the run (§3.1, App. B)."""
    # Undisclosed: the cosine's span. Here it is the whole run, so that after the warm-up it begins
    # a little below the peak.
    step = sequences / cfg.batch_size
    if cfg.warmup_steps and step <= cfg.warmup_steps:
        return 1e-7 + (cfg.lr - 1e-7) * step / cfg.warmup_steps
    progress = min(sequences * cfg.seq_len / (cfg.cosine * cfg.tokens), 1)
    return cfg.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

# ---------------------------------------- Precision ----------------------------------------

# Parameters, gradients and Adam's moments are fp32. Under bf16, autocast (in objective) runs matrix
# products in bf16; the sums and the softmax of attention's scores, norms, residual sums and the
# loss stay fp32. Sharded ranks gather the weights of blocks in bf16, and reduce fp32 gradients.
# Chinchilla keeps this fp32 copy where Gopher rounded bf16 parameters stochastically.

PEAK_FLOPS = {"bf16": {  # dense, by precision and the device's exact name; others get no MFU
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA B200": 2250e12,
}}  # fmt: skip

# ---------------------------------------- Parallelism ----------------------------------------

def parallelize(model, cfg, mesh):
    """Parameters, gradients and optimizer state are sharded if there are several ranks (ZeRO-3).
    Recomputation and compilation are applied to the blocks first."""
    # Departure: the paper shards the optimizer state alone, and also uses model parallelism.
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        if cfg.recompute == "block":
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if cfg.compile:
            torch.compiler.config.fail_on_recompile_limit_hit = True
            block.compile(dynamic=False)
        if mesh.size() > 1:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    if mesh.size() > 1:  # fp32 embeddings begin an fp32 residual stream
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return model

def fill_parameter(p, value):
    """Write value, the complete tensor, to a parameter that may be sharded."""
    if isinstance(p, DTensor):
        value = value.to(p.device, p.dtype)
        value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
    p.data.copy_(value)

def memory_per_rank(cfg):
    """Bytes on one rank of cfg.world_size as an eager backward pass begins, by kind."""
    with torch.device("meta"):
        model = Chinchilla(cfg)
    n, _ = count_parameters(model)
    n_block = sum(p.numel() for p in model.blocks[0].parameters())
    n_root = n - n_block * cfg.n_layers  # embedding and last norm
    ranks = cfg.world_size
    largest = dataclasses.replace(cfg, batch_size=max(cfg.batch_size, cfg.second_batch))
    positions = split_batch(largest, ranks)[1] * cfg.seq_len
    size = 2 if cfg.precision == "bf16" else 4
    width = cfg.n_heads * cfg.head_dim
    # Kept per position and block: the inputs of both norms and their results before the gain
    # (fp32); the inputs of the products: q, k, v, q + u, q + w, k, r of each sequence, and P v; the
    # input of GELU; the probabilities P.
    block = 16 * cfg.dim + size * (2 * cfg.dim + 8 * width + 2 * cfg.hidden_dim)
    block += (6 if size == 2 else 4) * cfg.n_heads * cfg.seq_len
    blocks = cfg.n_layers * block
    if cfg.recompute == "block":  # the inputs of all blocks, and one block at a time in full
        blocks = cfg.n_layers * 4 * cfg.dim + block
    head = (8 + size) * cfg.dim + 4 * cfg.vocab_size  # last norm, last product, loss's softmax
    memory = {"parameters": 4 * n / ranks, "gradients": 4 * n / ranks, "optimizer": 8 * n / ranks}
    # Weights and gradients of the root, in fp32, and of a block, and the next block's weights.
    gathered = (8 * n_root + size * 3 * n_block) * (ranks > 1)
    return memory | {"gathered": gathered, "activations": positions * (blocks + head)}

def join_queue(cfg):
    """(store, rank, ranks) of torchrun's processes, which take the runs of a sweep from a counter
    in the store. Afterwards each of them forms a process group of its own."""
    rank = int(os.environ.get("RANK", 0))
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    store = dist.HashStore()
    if ranks > 1:
        store = shared_store(rank)
        store.set_timeout(timedelta(seconds=cfg.timeout))
        os.environ.update(RANK="0", WORLD_SIZE="1")
    return store, rank, ranks

# ---------------------------------------- Checkpoint ----------------------------------------

SHAPE = ("vocab_size", "dim", "n_layers", "n_heads", "head_dim", "hidden_dim", "norm_eps")

def from_hf(path):
    """(model, cfg) from a directory that to_hf wrote; the weights stay in the mapped file."""
    # Hugging Face has no class for this model: the names of config and tensors are our own.
    from safetensors.torch import load_file

    with explain(f"{path} holds no Chinchilla model", Exception):
        config = json.loads((Path(path) / "config.json").read_text())
        cfg = Config(**{name: config[name] for name in SHAPE})
        with torch.device("meta"):
            model = Chinchilla(cfg)
        model.load_state_dict(load_file(Path(path) / "model.safetensors"), assign=True)
    return model, cfg

def to_hf(model, cfg, path):
    """Write model to the directory path: config.json and safetensors. All ranks call this: they
    gather one tensor after the other; rank 0 keeps all in its memory and writes."""
    from safetensors.torch import save_file

    is_writer = not dist.is_initialized() or dist.get_rank() == 0
    tensors = {}
    for name, p in model.named_parameters():
        tensor = p.full_tensor() if isinstance(p, DTensor) else p
        if is_writer:
            tensors[name] = tensor.detach().cpu().contiguous()
    if is_writer:
        with written_beside(path) as folder:
            save_file(tensors, folder / "model.safetensors")
            config = {name: getattr(cfg, name) for name in SHAPE}
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

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
    optional = ("warmup_steps", "bootstrap")  # may be 0, although their default is not
    for field in dataclasses.fields(cfg):
        least = int(field.type is int and field.default > 0 and field.name not in optional)
        if field.type in (int, float) and not least <= getattr(cfg, field.name) < math.inf:
            raise ValueError(f"--{field.name} {getattr(cfg, field.name)} is not {least} or more")
    sweep = is_sweep(cfg)
    for name in ("init", "export", "second_batch", "tokens", "cosine"):
        if sweep and getattr(cfg, name) != getattr(Config, name):
            raise ValueError(f"--{name} is for a single run: --sweep= turns the sweep off")
    n_sharing = 1 if sweep else ranks  # ranks that share a batch
    for name in ("batch_size", "second_batch"):
        n = getattr(cfg, name)
        n_micro, micro = split_batch(dataclasses.replace(cfg, batch_size=n), n_sharing)
        if n_sharing * n_micro * micro != n:
            raise ValueError(f"--{name} {n} is not {n_sharing} ranks x n micro-batches of {micro}")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    for wrong, message in (
        (cfg.dim % 2, f"--dim {cfg.dim} is odd: sinusoids of distances come in pairs"),
        (cfg.cosine < 1, f"--cosine {cfg.cosine} ends before the run"),
        (cfg.resume and not cfg.out, "--resume needs --out"),
        (cfg.eval and not cfg.out and not cfg.init, "--eval needs --out or --init"),
        (cfg.write_tokens and ranks > 1, "--write_tokens runs in one process, without torchrun"),
        (cfg.budget and cfg.flops == "appF", "--budget counts FLOPs as 6 N D, not as --flops appF"),
        (cfg.inference_tokens and not cfg.budget, "--inference_tokens needs --budget"),
        (cfg.plot and not cfg.fit and (cfg.budget or not sweep), "--plot needs --fit or a sweep"),
        (sweep and local < ranks and not cfg.out, "a sweep over several machines needs --out"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
    check_directories(cfg.init, cfg.export, cfg.write_tokens)
    if cfg.plot:
        with explain("--plot needs: pip install matplotlib", ImportError):
            import matplotlib  # noqa: F401

def planned_tokens(cfg, n):
    """D of a run of a model of n parameters."""
    if cfg.steps:
        return float(cfg.steps * cfg.batch_size * cfg.seq_len)
    return cfg.tokens or 20.0 * n

def updates_left(sequences, cfg):
    """Number of updates from that many sequences to the end of the run."""
    total = cfg.tokens / cfg.seq_len
    half = total / 2 if cfg.second_batch else total
    n_first = max(math.ceil((half - sequences) / cfg.batch_size), 0)
    sequences += n_first * cfg.batch_size
    second_batch = cfg.second_batch or cfg.batch_size
    return n_first + max(math.ceil((total - sequences) / second_batch), 0)

def at_sequence(sequences, cfg):
    """cfg with the batch of the update that follows that many sequences: from half of the tokens
    on, --second_batch (Table 4, "doubled midway")."""
    if cfg.second_batch and 2 * sequences * cfg.seq_len >= cfg.tokens:
        return dataclasses.replace(cfg, batch_size=cfg.second_batch)
    return cfg

def dry_run(cfg):
    """Print parameters, FLOPs per token and memory per rank, computed from shapes alone, of a run
    or of each run of a sweep, which one rank trains."""
    if not cfg.vocab_size:
        cfg.vocab_size = load_tokenizer(cfg.tokenizer or "bytes", ["<|endoftext|>"]).n_vocab
    check(cfg, cfg.world_size)
    runs = [cfg]
    if is_sweep(cfg):
        runs = [dataclasses.replace(run, world_size=1) for _, run in plan_sweep(cfg, 0)]
    for run in runs:
        with torch.device("meta"):
            total, activated = count_parameters(Chinchilla(run))
        run.tokens = planned_tokens(run, total)
        print(f"{run.dim}x{run.n_layers} | parameters {total:,} | activated {activated:,}")
        print(f"FLOPs per token {flops_per_token(run):.4g} | 6 N gives {6 * total:.4g}", end=" ")
        print(f"| App. F {3 * appendix_f(run)['total'] / run.seq_len:.4g}")
        print(f"D {human(run.tokens)} in {updates_left(0, run):,} updates", end=" ")
        print(f"| 6 N D {6 * total * run.tokens:.3g}")
        print_memory(memory_per_rank(run))

def update_shards(model, optimizer, batches, lr, cfg):
    """One update from this rank's micro-batches; returns loss and gradient norm of the global
    batch. If either is not finite, all ranks skip the update."""
    loss = torch.zeros((), device=batches[0]["targets"].device)
    # Each micro-batch reduces its gradients: unreduced, every rank would keep those of all weights.
    for batch in batches:
        part, _ = objective(model, batch, cfg)
        (part * dist.get_world_size()).backward()  # FSDP averages over the ranks
        loss += part.detach()
    dist.all_reduce(loss)
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()  # of the shards of all ranks
    loss, norm = torch.stack([loss, norm]).tolist()  # the only wait for the device in an update
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return loss, norm

class Diverged(ValueError):
    """The last updates were skipped, because the loss or the gradient was not finite."""

def train(model, optimizer, corpus, heldout, state, cfg, device, signals):
    """Update the model until the end of the run; returns False if a signal ends it earlier."""
    this_rank = device, dist.get_rank(), dist.get_world_size()
    next_cfg = at_sequence(state["sequences"], cfg)  # has the size of the next batch
    thread = ThreadPoolExecutor(1)  # reads the next batch during an update
    next_batches = thread.submit(read_batch, corpus, state["sequences"], next_cfg, *this_rank)
    first_step = saved = state["step"]
    pace = None  # seconds per update
    n_skipped = 0

    def evaluate(batches):
        with evaluation_mode(model, cfg.compile):
            return sum(objective(model, batch, cfg)[0] for batch in batches)

    while True:
        step = state["step"]
        first = state["sequences"]  # first sequence of the next batch
        steps_left = updates_left(first, cfg)
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
        now = next_cfg
        following = first + now.batch_size
        next_cfg = at_sequence(following, cfg)
        next_batches = thread.submit(read_batch, corpus, following, next_cfg, *this_rank)
        sum_counts(batches, dist.get_world_size())
        lr = learning_rate(first, cfg)
        loss, norm = update_shards(model, optimizer, batches, lr, cfg)
        finite = math.isfinite(loss) and math.isfinite(norm)
        state["step"] += 1
        state["sequences"] = following
        state["tokens"] += finite * now.batch_size * cfg.seq_len
        if step == 0 or steps_left == 1 or state["step"] % cfg.log_every == 0:
            bpb = bits_per_byte(loss * batches[0]["n_targets"], batches[0]["n_bytes"])
            row = {"loss": loss, "bpb": bpb, "lr": lr, "grad": norm, "tokens": state["tokens"]}
            head = f"step {step + 1}/{step + steps_left}"
            tail = progress(state["tokens"], steps_left - 1, pace, now, device)
            log(cfg.out, step + 1, head, row, tail)
        n_skipped = 0 if finite else n_skipped + 1
        if n_skipped:
            print(f"step {step + 1} skipped: its loss or gradient is not finite")
        if n_skipped == 3 or (n_skipped and steps_left == 1):
            raise Diverged(f"no finite gradient in the last {n_skipped} steps to {step + 1}")

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

def single_run(cfg, given, corpus, heldout, source, device, signals):
    """Build or resume one run on all ranks, and train it. It begins with the weights of the model
    `source`, if that is not None. Returns the model, or None if a signal stopped the run."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("dp",))
    with torch.device("meta"):
        model = Chinchilla(cfg)
    total, activated = count_parameters(model)
    cfg.tokens = planned_tokens(cfg, total)
    fixed = {name: getattr(cfg, name) for name in SHAPE}
    if not cfg.eval:
        fixed |= {"seq_len": cfg.seq_len, "seed": cfg.seed}
        fixed |= {"data_fingerprint": corpus.fingerprint()}
    newest, run = newest_checkpoint(cfg.out, cfg.resume or cfg.eval, fixed)
    if run and not given & {"steps", "tokens"}:  # keep the planned number of tokens
        cfg.tokens = run["tokens"]
    n_updates = updates_left(0, cfg)
    if cfg.warmup_steps > n_updates // 10:
        cfg.warmup_steps = n_updates // 10
        print(f"the warm-up is cut to {cfg.warmup_steps} updates, a tenth of the run")

    model = parallelize(model, cfg, mesh).to_empty(device=device)
    if source:
        values = dict(source.named_parameters())
        for name, p in model.named_parameters():
            fill_parameter(p, values[name].detach())
    else:
        init_weights(model, cfg)
    optimizer = build_optimizer(model, cfg)
    state = {"step": 0, "sequences": 0, "tokens": 0}
    if newest:
        load_checkpoint(newest, model, optimizer, state)
    if cfg.eval:
        if not newest and not cfg.init:
            raise ValueError(f"--eval: {cfg.out} has no checkpoint")
        cfg.tokens = 0
        cfg.out = ""  # nothing is written
    if cfg.out and dist.get_rank() == 0:
        lock = claim_directory(cfg.out, dataclasses.asdict(cfg) | fixed)  # until the run ends
    n_micro, micro = split_batch(cfg, ranks)
    print(f"parameters {total:,} | activated {activated:,} | FLOPs per token", end=" ")
    print(f"{flops_per_token(cfg):.3g} | tokens per step {cfg.batch_size * cfg.seq_len:,}", end=" ")
    print(f"= {ranks} ranks x {n_micro} x {micro} sequences of {cfg.seq_len}", end=" | ")
    print(f"D {human(cfg.tokens)}, {cfg.tokens / total:.3g} per parameter")
    if train(model, optimizer, corpus, heldout, state, cfg, device, signals):
        return model
    print(f"stopped after step {state['step']}")
    return None

@record
def main(argv=None):
    """Run the command line: answer from the laws, or train a sweep or a single model."""
    with report_user_errors():
        cfg, given = parse(argv)
        if cfg.dry_run:
            return dry_run(cfg)
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        check(cfg, ranks)
        laws = {"flops", "drop_highest", "bootstrap"}
        unused = given & (laws | {"sweep", "sizes", "keep_models"})
        if cfg.fit or cfg.budget:
            unused = given - laws - {"fit", "budget", "inference_tokens", "plot", "seed"}
        elif is_sweep(cfg):
            unused = given & {"n_layers", "n_heads", "hidden_dim", "val_every", "prompt"}
        if not cfg.sweep:
            unused -= {"sweep"}  # --sweep= turns it off
        if unused:
            print(f"warning: no effect in this mode: --{', --'.join(sorted(unused))}")
        fits = {}
        if cfg.fit:
            fits = fit_and_report(read_runs(cfg.fit, read_table(cfg.fit), cfg.flops), cfg)
        if cfg.budget:
            answer(cfg, fits)
        if cfg.budget or cfg.fit:
            return
        queue = join_queue(cfg) if is_sweep(cfg) else None
        device = init_distributed(cfg.timeout)
        source = None
        if cfg.init:
            source, theirs = from_hf(cfg.init)
            cfg = dataclasses.replace(cfg, **{name: getattr(theirs, name) for name in SHAPE})
        data = load_data(cfg)
        if not data:
            return
        tokenizer, corpus, heldout = data
        if corpus.separator >= cfg.vocab_size:
            raise ValueError(f"--vocab_size {cfg.vocab_size} has no place for <|endoftext|>")
        n_windows = corpus.n_windows(cfg.seq_len)
        print(f"torch {torch.__version__} | {device.type} {cfg.precision} | {n_windows:,} windows")
        signals = catch_signals()
        if queue:
            return sweep_and_fit(cfg, corpus, heldout, device, queue, signals)
        model = single_run(cfg, given, corpus, heldout, source, device, signals)
        if not model:
            return
        if cfg.export:
            to_hf(model, cfg, cfg.export)
        if tokenizer:  # all ranks compute the sample, since each has a shard of the weights
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
