r"""Language Models are Few-Shot Learners (Brown et al., 2020, arXiv 2005.14165), GPT-3, and
Language Models are Unsupervised Multitask Learners (Radford et al., 2019), GPT-2, in one file.

What is new compared with its parent, gpt1.py, in GPT-2 (§2.2, §2.3):
- the norm moves to the input of each branch, and one more follows the last block;
- weights of the N residual layers are scaled by 1 / sqrt(N) at initialization;
- a byte-level BPE of 50,257 entries, which encodes any text; documents in one stream.
In GPT-3 (§2.1, §2.2, appendix B):
- every other layer attends only to a band of the latest positions; contexts of 2,048;
- a learning rate and a batch for each size; warm-up, cosine and batch ramp measured in tokens;
- Adam (0.9, 0.95), decay 0.1, clipping at 1; corpora mixed by weight, packed without a mask;
- models split inside each matrix product and across the layers; loss scaling for fp16.
Kept: learned positions, GELU, biases, the shared softmax, F = 4 D.

Map: GPT-2 §2.2 train_bpe | §2.3 Block, init_weights | GPT-3 §2.1 Block, banded_attention, PRESETS,
ParallelAttention, ParallelMLP, ModelParallel | §2.2 TrainingMix | §2.3 noise_scale | appendix B
learning_rate, batch_at, build_optimizer, get_batch | Fig. 3.1, Table D.1 dry_run.
"Megatron" is arXiv 1909.08053, "noise scale" arXiv 1812.06162; "released" is GPT-2's inference
code, since GPT-3 was never released.
Legend: B batch, T positions, D width, H heads, E = D / H, F hidden width, V vocabulary; W band;
under tensor parallelism H, F and V are a rank's own share.
Conventions: T + 1 tokens make T inputs and T targets; loss in nats per target.

Run: python gpt3.py                         # a laptop: the preset demo
     torchrun --nproc_per_node=8 gpt3.py    # GPUs: the preset small
     torchrun --nnodes=16 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \
         gpt3.py --preset 13b --tp 8 --pp 4 --out /shared/13b \
         --data "60:cc/,22:webtext2/,8:books1/,8:books2/,3:wikipedia/"
Expect: in a minute on two CPU cores the demo learns a BPE of 1,024 entries, and its held-out bits
per byte fall from 3.89 to 2.22. Attention to 128 positions takes 0.43 of the time of
dense attention in contexts of 2,048.
"""

import argparse
import base64
import bisect
import collections
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
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.utils.checkpoint import checkpoint

# ---------------------------------------- Config ----------------------------------------

@dataclasses.dataclass
class Config:
    """Run configuration: each field is a command-line flag, and its comment is the flag's help."""

    # Model, Table 2.1
    vocab_size: int = 0  # V, vocabulary size; 0: that of the tokenizer
    seq_len: int = 2048  # T, sequence length in tokens, and number of positions of the model
    dim: int = 768  # D, width of the residual stream
    n_layers: int = 12  # number of blocks
    n_heads: int = 12  # H, number of attention heads
    hidden_dim: int = 3072  # F, width of the feed-forward layer
    band: int = 128  # positions that a banded layer attends to, its own included; 0: all are dense
    banded: Literal["odd", "even"] = "odd"  # which layers are banded, counted from 0
    dropout: float = 0.0  # dropout of embeddings, residual branches and attention probabilities
    # Data
    data: str = ""  # [WEIGHT:]PATH,... of text or shards; empty: Python's standard library
    tokenizer: str = ""  # bytes, bpe:N (learned), a tiktoken encoding or a rank file; empty: bytes
    train_tokenizer: int = 0  # BPE entries to learn and write to ranks.tiktoken in --out, then exit
    # Optimization, Table 2.1 and appendix B
    batch_size: int = 256  # sequences per update after the ramp, over all ranks
    first_batch: int = 16  # sequences of the first update, before rounding; 0: batch_size
    batch_multiple: int = 1  # sequences by which the batch grows at each step of the ramp
    ramp: float = 4e9 / 300e9  # part of the run's tokens over which the batch grows
    tokens: float = 300e9  # tokens of the run, if --steps is 0
    steps: int = 0  # updates of the run; 0: as many as --tokens needs
    lr: float = 6e-4  # peak learning rate
    warmup: float = 375e6 / 300e9  # part of the run's tokens over which the learning rate rises
    decay: float = 260e9 / 300e9  # part of the run's tokens after which the rate is --floor
    floor: float = 0.1  # last learning rate, as a part of the peak
    beta1: float = 0.9  # decay of Adam's average of the gradient
    beta2: float = 0.95  # decay of Adam's average of the squared gradient
    eps: float = 1e-8  # number that Adam adds to the root of the averaged squared gradient
    weight_decay: float = 0.1  # decoupled weight decay of matrices and embeddings
    clip: float = 1.0  # maximum norm of the gradient; 0: no clipping
    noise_scale: bool = False  # log the gradient noise scale; needs micro-batches or --dp 2
    seed: int = 0  # seed of the weights, the order of the data and dropout
    # Parallelism, §2.1
    micro_batch: int = 0  # sequences per forward pass; 0: a rank's share, under --pp 1 / (2 pp)
    tp: int = 1  # tensor-parallel ranks, which share each layer's matrices
    pp: int = 1  # pipeline-parallel ranks, which share the layers
    dp: int = 0  # data-parallel ranks, each with a copy; 0: all that are left
    # Machine
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 (GPU) or fp32
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

# Batches in sequences: 32k, 0.5M, 1M, 2M and 3.2M tokens are 16, 256, 512, 1024 and 1536 of 2,048.
# Undisclosed: how long each size's ramp is ("the first 4-12 billion tokens"), and how batches are
# rounded: here down to multiples of 16, which takes up to 2 % more updates than whole sequences.
# Undisclosed: GPT-3's dropout. Here there is none.
GPT3 = dict(
    vocab_size=50257, tokenizer="gpt2", batch_multiple=16, precision="bf16", micro_batch=1,
    compile=True,
)  # fmt: skip
# Undisclosed: GPT-2's optimizer, learning rate, number of updates and dropout. Optimizer and rates
# are GPT-3's for these sizes, the 300,000 updates Megatron's, with 2,000 of warm-up; no dropout.
# band=0: all layers are dense.
GPT2 = GPT3 | dict(
    seq_len=1024, band=0, batch_size=512, first_batch=0, tokens=3e5 * 2**19, warmup=2e3 / 3e5,
    decay=1.0,
)  # fmt: skip
SIZES = ("n_layers", "dim", "n_heads", "hidden_dim")
BATCH = ("batch_size", "ramp", "lr")
PRESETS = {
    # For a CPU, about a minute: learns its own BPE; the batch grows from 24 sequences to 72.
    "demo": dict(
        seq_len=128, dim=128, n_layers=2, n_heads=4, hidden_dim=512, band=32, tokenizer="bpe:1024",
        batch_size=72, first_batch=24, batch_multiple=24, ramp=0.75, tokens=1.2e6, lr=6e-3,
        warmup=0.08, decay=1.0, log_every=50,
    ),
    # The shape of 125m over bytes: minutes on one GPU of 24 GB or a node of them.
    "small": dict(
        seq_len=1024, batch_size=144, first_batch=48, batch_multiple=48, ramp=0.25, tokens=1.5e8,
        warmup=0.07, decay=1.0, micro_batch=6, compile=True, val_every=500,
    ),
    # GPT-2, Table 2; heads of 64 as released.
    "gpt2": GPT2 | dict(zip(SIZES, (12, 768, 12, 3072)), lr=6e-4),
    "gpt2_medium": GPT2 | dict(zip(SIZES, (24, 1024, 16, 4096)), lr=3e-4),
    "gpt2_large": GPT2 | dict(zip(SIZES, (36, 1280, 20, 5120)), lr=2.5e-4),
    "gpt2_xl": GPT2 | dict(zip(SIZES, (48, 1600, 25, 6400)), lr=2e-4),
    # GPT-3, Table 2.1. It prints 24 heads of 128 for 1.3b and a width of 5,140 for 13b; the
    # parameters of Table D.1, 1,320M and 12,850M, say 16 heads and 5,120.
    # Undisclosed: recomputation. With it 175b fits 80 GB at --tp 8 --pp 12.
    "125m": GPT3 | dict(zip(SIZES + BATCH, (12, 768, 12, 3072, 256, 4 / 300, 6e-4))),
    "350m": GPT3 | dict(zip(SIZES + BATCH, (24, 1024, 16, 4096, 256, 4 / 300, 3e-4))),
    "760m": GPT3 | dict(zip(SIZES + BATCH, (24, 1536, 16, 6144, 256, 4 / 300, 2.5e-4))),
    "1.3b": GPT3 | dict(zip(SIZES + BATCH, (24, 2048, 16, 8192, 512, 6 / 300, 2e-4))),
    "2.7b": GPT3 | dict(zip(SIZES + BATCH, (32, 2560, 32, 10240, 512, 6 / 300, 1.6e-4))),
    "6.7b": GPT3 | dict(zip(SIZES + BATCH, (32, 4096, 32, 16384, 1024, 8 / 300, 1.2e-4))),
    "13b": GPT3 | dict(zip(SIZES + BATCH, (40, 5120, 40, 20480, 1024, 8 / 300, 1e-4))),
    "175b": GPT3 | dict(zip(SIZES + BATCH, (96, 12288, 96, 49152, 1536, 12 / 300, 0.6e-4)),
                   recompute="block"),
}  # fmt: skip
PATTERN = (  # how GPT-2 splits text into words, as released, for BPE rank files
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)

# ---------------------------------------- Model ----------------------------------------

class SumGradient(torch.autograd.Function):
    """Megatron's f: the identity forward; backward, the gradient's sum over a group's ranks."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None

class SumOutput(torch.autograd.Function):
    """Megatron's g: the sum over a group's ranks forward; the identity backward."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None

class ColumnParallelLinear(nn.Linear):
    """x Wᵀ + b of Megatron §3, split by columns: [..., in] on every rank of the tensor-parallel
    group tp -> [..., a rank's share of out]."""

    def __init__(self, in_features, out_features, tp=None):
        super().__init__(in_features, out_features // group_size(tp))
        self.tp = tp

    def forward(self, x):
        return super().forward(SumGradient.apply(x, self.tp) if self.tp else x)

class RowParallelLinear(nn.Linear):
    """x Wᵀ + b of Megatron §3, split by rows: [..., a rank's share of in] -> [..., out], summed
    over the ranks of tp; the bias, which all of them have, is added once."""

    def __init__(self, in_features, out_features, tp=None):
        super().__init__(in_features // group_size(tp), out_features)
        self.tp = tp

    def forward(self, x):
        if not self.tp:
            return super().forward(x)
        return SumOutput.apply(F.linear(x, self.weight), self.tp) + self.bias

def banded_attention(q, k, v, band, dropout):
    """Attention of each position to the last `band` positions, its own included, [B, H, T, E].
    Positions form N blocks of W = band: a query sees keys of its own block and the one before."""
    # Undisclosed: the width of the band, how it counts, and whether all heads have the same. 128 is
    # that of gpt-oss ("following GPT-3"); the released sparse attention counts the query itself.
    attend = functools.partial(F.scaled_dot_product_attention, dropout_p=dropout)
    B, _, T, _ = q.shape
    first = attend(*(x[:, :, :band].contiguous() for x in (q, k, v)), is_causal=True)
    if T <= band:
        return first  # one block, [B, H, T, E]
    padding = -T % band  # at the end, where no query of the sequence sees it
    q, k, v = (F.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, band)) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, N, H, W, E]
    q = q[:, 1:].flatten(0, 1)  # [B (N-1), H, W, E]
    k, v = (torch.cat((x[:, :-1], x[:, 1:]), 3).flatten(0, 1) for x in (k, v))  # [.., H, 2W, E]
    i = torch.arange(band, 2 * band, device=q.device)[:, None]  # queries: the second W of 2W
    j = torch.arange(2 * band, device=q.device)
    o = attend(q, k, v, (j <= i) & (i - j < band))  # [B (N-1), H, W, E]
    o = o.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)  # [B, H, (N-1) W, E]
    return torch.cat((first, o), 2)[:, :, :T]

class ParallelAttention(nn.Module):
    """Multi-head causal self-attention, softmax(q kᵀ / sqrt(E)) v, [B, T, D] -> [B, T, D], to the
    last `band` positions or, if it is 0, to all; each rank of a tensor-parallel group tp has H of
    the heads."""

    def __init__(self, dim, n_heads, band, dropout, tp=None):
        super().__init__()
        self.head_dim = dim // n_heads
        self.band = band
        self.dropout = dropout
        # Rows are ordered by head, and by q, k, v within: a rank's share is one piece.
        self.qkv = ColumnParallelLinear(dim, 3 * dim, tp)
        self.out = RowParallelLinear(dim, dim, tp)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (-1, 3, self.head_dim))  # [B, T, H, 3, E]
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # [B, H, T, E] each
        p = self.dropout if self.training else 0.0
        if self.band:
            o = banded_attention(q, k, v, self.band, p)  # [B, H, T, E]
        else:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        return self.out(o.transpose(1, 2).flatten(2))  # [B, T, D]

class ParallelMLP(nn.Module):
    """GELU(x W_up + b_up) W_down + b_down, [B, T, D] -> [B, T, D], with GELU's tanh form as
    released; each rank of a tensor-parallel group tp has F of the hidden units."""

    def __init__(self, dim, hidden_dim, tp=None):
        super().__init__()
        self.up = ColumnParallelLinear(dim, hidden_dim, tp)
        self.down = RowParallelLinear(hidden_dim, dim, tp)

    def forward(self, x):
        x = F.gelu(self.up(x), approximate="tanh")  # [B, T, F]
        return self.down(x)  # [B, T, D]

class Block(nn.Module):
    """GPT-2 §2.3, [B, T, D] -> [B, T, D]: a norm begins each branch; sums have none."""

    def __init__(self, cfg, band, tp=None):
        super().__init__()
        self.dropout = cfg.dropout
        self.norm1 = nn.LayerNorm(cfg.dim, eps=1e-5)  # eps as released
        self.attn = ParallelAttention(cfg.dim, cfg.n_heads, band, cfg.dropout, tp)
        self.norm2 = nn.LayerNorm(cfg.dim, eps=1e-5)
        self.mlp = ParallelMLP(cfg.dim, cfg.hidden_dim, tp)

    def forward(self, x):
        x = x + F.dropout(self.attn(self.norm1(x)), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)

class GPT3(nn.Module):
    """Tokens [B, T] -> logits [B, T, V]; the output projection is the token embedding. Or a stage
    of a pipeline with some of the layers: one that is not the first takes [B, T, D], and one that
    is not the last returns [B, T, D]."""

    def __init__(self, cfg, layers=None, first=True, last=True, tp=None):
        super().__init__()
        self.tp = tp
        self.vocab_size = cfg.vocab_size
        self.dropout = cfg.dropout
        rows = cfg.vocab_size
        if tp:  # Megatron pads V to a multiple of 128 on each rank
            rows = 128 * math.ceil(cfg.vocab_size / (128 * tp.size()))
        self.token_embedding = nn.Embedding(rows, cfg.dim) if first else None
        self.position_embedding = nn.Embedding(cfg.seq_len, cfg.dim) if first else None
        self.blocks = nn.ModuleDict()
        for i in range(cfg.n_layers) if layers is None else layers:
            # Undisclosed: whether odd or even layers are banded. Odd: the first is dense.
            band = cfg.band if i % 2 == (cfg.banded == "odd") else 0
            self.blocks[str(i)] = Block(cfg, band, tp)
        self.final_norm = nn.LayerNorm(cfg.dim, eps=1e-5) if last else None
        # A last stage that is not the first has its own copy of the token embedding.
        self.head = nn.Linear(cfg.dim, rows, bias=False) if last and not first else None

    def embed(self, tokens):
        """[B, T] -> [B, T, D]; each rank of tp looks up the tokens among its rows of the table."""
        positions = self.position_embedding.weight[: tokens.shape[1]]  # [T, D]
        if not self.tp:
            return self.token_embedding(tokens) + positions
        rows = self.token_embedding.weight.shape[0]
        tokens = tokens - self.tp.rank() * rows
        mine = (tokens >= 0) & (tokens < rows)
        x = self.token_embedding(tokens.clamp(0, rows - 1)) * mine[..., None]
        return SumOutput.apply(x, self.tp) + positions

    def logits(self, x):
        """[B, T, D] -> [B, T, V], fp32; the logits of padding rows are -1e10."""
        x = self.final_norm(x)
        x = SumGradient.apply(x, self.tp) if self.tp else x
        x = F.linear(x, (self.head or self.token_embedding).weight).float()
        if self.tp:
            n_real = self.vocab_size - self.tp.rank() * x.shape[-1]
            x[..., max(n_real, 0) :] = -1e10
        return x

    def forward(self, x):
        if self.token_embedding is not None:
            x = F.dropout(self.embed(x), self.dropout, self.training)
        for block in self.blocks.values():
            x = block(x)
        return x if self.final_norm is None else self.logits(x)

def group_size(group):
    """Ranks of a process group; None is a group of one."""
    return group.size() if group else 1

def init_weights(model, cfg, tp=None):
    """Draw weights from N(0, 0.02), and positions from N(0, 0.01) as released; set biases to 0 and
    gains to 1. GPT-2 §2.3: the weights of the N = 2 L residual layers are scaled by 1 / sqrt(N).

    Each parameter is drawn from a generator seeded by (seed, name), so that every layout
    starts from the same numbers. Raises ValueError for a parameter without a rule.
    """
    # Departure: the released code does not scale the weights of residual layers; the paper does.
    # Undisclosed: what N counts. Here both branches of each of the L blocks, as in Megatron §4.2.
    with torch.device("meta"):
        complete = dict(GPT3(cfg).named_parameters())
    for name, p in model.named_parameters():
        if re.search(r"(^|\.)(\w+_embedding|head|qkv|out|up|down)\.weight$", name):
            std = 0.02
            if name == "position_embedding.weight":
                std = 0.01
            elif re.search(r"\.(out|down)\.weight$", name):
                std /= math.sqrt(2 * cfg.n_layers)
            name = name.replace("head.weight", "token_embedding.weight")  # of which it is a copy
            generator = torch.Generator().manual_seed(stable_hash(cfg.seed, name))
            drawn = torch.empty(complete[name].shape).normal_(0.0, std, generator=generator)
            fill_part(name, p, drawn, tp)
        elif re.search(r"(^|\.)(qkv|out|up|down|norm[12]|final_norm)\.bias$", name):
            nn.init.zeros_(p)
        elif re.search(r"(^|\.)(norm[12]|final_norm)\.weight$", name):
            nn.init.ones_(p)
        else:
            raise ValueError(f"no rule initialises {name}")

def count_parameters(model):
    """(total, activated) parameters; tied weights count once, a dense model activates all."""
    total = sum(p.numel() for p in model.parameters())
    return total, total

def flops_per_token(cfg):
    """Training FLOPs per token: 2 per weight of a matrix product forward, twice that backward.
    Attention counts as causal, (T + 1) / 2 keys per query, half of what the full square gives; in
    banded layers only the keys of the band count."""
    T = cfg.seq_len
    band = min(cfg.band or T, T)
    n_banded = (cfg.n_layers + (cfg.banded == "even")) // 2
    keys = (cfg.n_layers - n_banded) * (T + 1) / 2  # per query, summed over the layers
    keys += n_banded * band * (T - (band - 1) / 2) / T
    weights = cfg.n_layers * (4 * cfg.dim**2 + 2 * cfg.dim * cfg.hidden_dim)
    return 6 * (weights + 2 * cfg.dim * keys + cfg.vocab_size * cfg.dim)

# ---------------------------------------- Data ----------------------------------------

def train_bpe(texts, n_entries):
    """GPT-2 §2.2, byte-level BPE: {bytes: rank} of n_entries entries, the 256 bytes and the results
    of merges; each merges the pair of adjacent entries that is most frequent within words."""
    # Departure: Python's re has no \p{L} and \p{N} (see PATTERN); [^\W\d_] and \d come close.
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
    words = collections.Counter()
    for text in texts:
        words.update(re.findall(pattern, text))
    lengths = np.array([len(word.encode()) for word in words], np.int64)
    ids = np.frombuffer("".join(words).encode(), np.uint8).astype(np.int32)
    ids = np.insert(ids, np.cumsum(lengths), -1)  # each word once, and -1 after it
    weights = np.repeat(list(words.values()), lengths + 1)  # how often the text has the word
    counts = collections.Counter()  # of each pair (a, b), whose key is a 2^32 + b

    def count(starts, sign):  # add sign times the pairs that begin at these positions
        starts = starts[(ids[starts] >= 0) & (ids[starts + 1] >= 0)]
        pairs = ids[starts].astype(np.int64) << 32 | ids[starts + 1]
        pairs, index = np.unique(pairs, return_inverse=True)
        for pair, n in zip(pairs.tolist(), np.bincount(index, weights[starts]).tolist()):
            counts[pair] += sign * n

    count(np.arange(len(ids) - 1), 1)
    ranks = {bytes([i]): i for i in range(256)}
    while len(ranks) < n_entries:
        pair = max(counts, key=counts.get, default=None)
        if not counts[pair]:
            raise ValueError(f"the text has no more than {len(ranks)} entries, not {n_entries}")
        a, b = divmod(pair, 2**32)
        at = np.flatnonzero((ids[:-1] == a) & (ids[1:] == b))
        # Pairs (a, a) of aaa overlap: of each run of adjacent pairs, merge every other one.
        run = np.cumsum(np.diff(at, prepend=-2) > 1)
        at = at[(np.arange(len(at)) - np.searchsorted(run, run)) % 2 == 0]
        count(np.unique([at - 1, at, at + 1]), -1)
        tokens = list(ranks)  # by id
        ids[at] = ranks.setdefault(tokens[a] + tokens[b], len(ranks))
        ids = np.delete(ids, at + 1)
        weights = np.delete(weights, at + 1)
        at -= np.arange(len(at))
        count(np.unique([at - 1, at]), 1)
    return ranks

def learn_ranks(documents, n_entries, n_characters, folder):
    """train_bpe on the documents that are not held out (on all, if there are no others), in the
    order of their hashes, up to n_characters. Rank 0 writes the result to folder/ranks.tiktoken if
    folder is not empty."""
    documents = sorted(documents, key=lambda document: stable_hash(document[0]))
    if not documents:
        raise ValueError("a BPE is learned from text, and --data has token shards")
    texts = [text for name, text in documents if not is_held_out(name)]
    texts = texts or [text for _, text in documents]
    sizes = itertools.accumulate(map(len, texts), initial=0)
    texts = (text for text, before in zip(texts, sizes) if before < n_characters)
    ranks = train_bpe(texts, n_entries)
    if folder and dist.get_rank() == 0:
        lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
        partial = Path(folder) / "ranks.tmp"
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("".join(lines))
        partial.replace(Path(folder) / "ranks.tiktoken")
    return ranks

def entries_to_learn(tokenizer):
    """N of a tokenizer bpe:N; 0 for any other tokenizer."""
    learned = re.fullmatch(r"bpe:(\d+)", tokenizer)
    return int(learned[1]) if learned else 0

def make_tokenizer(name, documents, out):
    """The tokenizer of that name. bpe:N is read from out/ranks.tiktoken if the run has written it,
    and is learned from 4 MB of the documents otherwise."""
    n_entries = entries_to_learn(name)
    written = f"{out}/ranks.tiktoken"
    if not n_entries:
        return load_tokenizer(name or "bytes", ["<|endoftext|>"])
    if not out or not os.path.exists(written):
        ranks = learn_ranks(documents, n_entries, 2**22, out)
        settings = {"pat_str": PATTERN, "mergeable_ranks": ranks}
        return tiktoken.Encoding(name, **settings, special_tokens={"<|endoftext|>": n_entries})
    tokenizer = load_tokenizer(written, ["<|endoftext|>"])
    if tokenizer.n_vocab != n_entries + 1:
        raise ValueError(f"{written} has {tokenizer.n_vocab - 1} entries, and not {n_entries}")
    return tokenizer

class TrainingMix:
    """Corpora that are drawn by weight (Table 2.2), one sequence at a time.

    In each block of 1,000 sequences every corpus has its share, rounded to 1 / 1,000, in an order
    that depends on the seed and the block. Each corpus is read in its own order, and which of its
    windows comes next follows from the index of the sequence alone.
    """

    # Undisclosed: how corpora are drawn. Here by quotas of a block, not independently.

    def __init__(self, mix, corpora):
        self.corpora = corpora
        self.token_bytes = corpora[0].token_bytes
        self.weights = list(mix.values())
        sums = itertools.accumulate(self.weights, initial=0.0)
        self.shares = np.diff([round(1000 * part) for part in sums]).tolist()

    def draw(self, index, seed):
        """(index of the corpus, index of its window) of sequence `index` of the run."""
        block, i = divmod(index, 1000)
        order = permutation(1000, seed, "mix", block)
        drawn = np.repeat(range(len(self.shares)), self.shares)[order]  # corpus of each sequence
        corpus = drawn[i]
        n_earlier = int((drawn[:i] == corpus).sum())  # sequences of this corpus in the block
        return corpus, block * self.shares[corpus] + n_earlier

    def n_windows(self, length):
        """Sequences of length + 1 ids until one of the corpora begins another epoch."""
        pairs = zip(self.corpora, self.weights)
        return round(min(corpus.n_windows(length) / weight for corpus, weight in pairs))

    def window(self, index, length, seed):
        """Window `index` of the run, length + 1 ids."""
        corpus, position = self.draw(index, seed)
        return self.corpora[corpus].window(position, length, seed)

    def fingerprint(self):
        """A hash of the shares and the corpora, by which a resumed run recognizes its data."""
        return stable_hash(self.shares, [corpus.fingerprint() for corpus in self.corpora])

def parse_weights(text):
    """{path: weight} of WEIGHT:PATH,...; a path alone has weight 1. The weights are divided by
    their sum."""
    mix = {}
    for part in text.split(","):
        weight, path = re.fullmatch(r"(?:([^:/\\]*):)?(.*)", part, re.S).groups()
        with explain(f"{part} is not WEIGHT:PATH", ValueError):
            mix[path] = mix.get(path, 0.0) + float(weight or 1)
    total = sum(mix.values())
    least = min(mix, key=mix.get)
    if not 0 < 0.002 * total <= mix[least] < math.inf:  # two sequences of a block of TrainingMix
        what = f"is {mix[least]:g} of {total:g}, less than 2 of 1,000"
        raise ValueError(f"the weight of {least or 'the library'} {what}")
    return {path: weight / total for path, weight in mix.items()}

def load_mix(cfg):
    """(tokenizer or None, TrainingMix, TrainingMix of the held-out text) of --data; sets
    cfg.vocab_size. With --train_tokenizer or --write_tokens the tokenizer or the shards are written
    instead, and the result is None. A corpus is read without replacement until its epoch ends
    (appendix B)."""
    # Table 2.2 prints, for Common Crawl (410B tokens), WebText2 (19B), Books1 (12B), Books2 (55B)
    # and Wikipedia (3B), weights of 60, 22, 8, 8 and 3 % and 0.44, 2.9, 1.9, 0.43 and 3.4 epochs in
    # 300B tokens.
    # Departure: the printed weights add up to 101 %; they are divided by that, which gives 0.43,
    # 3.4, 2.0, 0.43 and 3.0 epochs.
    # Departure: the quality filter and the fuzzy deduplication of appendix A and the removal of
    # benchmark texts of appendix C are left out: --data is read as it is.
    mix = parse_weights(cfg.data)
    sources = {path: find_files(path) for path in mix}  # (text files, token shards) of each
    if cfg.write_tokens and (len(mix) > 1 or any(shards for _, shards in sources.values())):
        raise ValueError("--write_tokens takes text of one corpus, not a mix or token shards")
    texts = (text for path in mix for text in read_documents(path, sources[path][0]))
    if cfg.train_tokenizer:
        learn_ranks(texts, cfg.train_tokenizer, math.inf, cfg.out)
        return print(f"{cfg.train_tokenizer} entries in {cfg.out}/ranks.tiktoken")
    tokenizer = None
    separator = -1  # unknown
    if cfg.tokenizer or any(files for files, _ in sources.values()):
        tokenizer = make_tokenizer(cfg.tokenizer, texts, cfg.out)
        separator = tokenizer.eot_token
    cfg.vocab_size = vocabulary_size(cfg.vocab_size, tokenizer, cfg.init)
    if separator >= cfg.vocab_size:
        raise ValueError(f"--vocab_size {cfg.vocab_size} has no place for <|endoftext|>")
    corpora = []
    for path, (files, shards) in sources.items():
        documents = tokenize(read_documents(path, files), tokenizer, separator)
        if cfg.write_tokens:
            return write_tokens(cfg.write_tokens, documents)
        sizes = cfg.vocab_size, math.ceil(cfg.batch_size * mix[path]), cfg.seq_len
        with explain(f"--data {path}", ValueError):
            corpora.append(load_corpora(shards, documents, tokenizer, separator, *sizes))
    corpora, heldout = zip(*corpora)
    return tokenizer, TrainingMix(mix, corpora), TrainingMix(mix, heldout)

def get_batch(corpus, first, n, cfg):
    """Sequences first ... first + n - 1 of the run: tokens and targets [n, T], and their counts.

    A pure function of the seed and the index, so that any number of ranks, any accumulation and
    any resume see the same sequences. n_targets counts targets, n_bytes the bytes of their text.
    """
    # Appendix B: documents in one stream, a separator after each, cut into windows; nothing is
    # masked, all targets count, and attention crosses documents.
    # Undisclosed: on which side of a document its separator stands, and where windows begin. An
    # epoch reads consecutive windows, from a random offset and in random order.
    windows = np.stack([corpus.window(first + i, cfg.seq_len, cfg.seed) for i in range(n)])
    tokens = torch.from_numpy(windows[:, :-1].copy())
    targets = windows[:, 1:].copy()
    counts = {"n_targets": targets.size, "n_bytes": int(corpus.token_bytes[targets].sum())}
    return {"tokens": tokens, "targets": torch.from_numpy(targets), **counts}

# ---------------------------------------- Objective ----------------------------------------

def vocab_parallel_loss(logits, targets, tp):
    """Sum of the cross-entropies, in nats, of logits [B T, V] and targets [B T]. Each rank of tp
    has V columns; maxima, sums and target logits are reduced, never the logits (Megatron §3)."""
    if not tp:
        return F.cross_entropy(logits, targets, reduction="sum")
    top = logits.detach().amax(1)  # [B T]
    dist.all_reduce(top, dist.ReduceOp.MAX, group=tp)
    total = SumOutput.apply((logits - top[:, None]).exp().sum(1), tp)
    local = targets - tp.rank() * logits.shape[1]
    mine = (local >= 0) & (local < logits.shape[1])
    target = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    target = SumOutput.apply(target * mine, tp)
    return (total.log() + top - target).sum()

def objective(model, batch, cfg):
    """Next-token cross-entropy: the sum of the nats of the batch's targets, divided by
    batch["n_targets"], the count of the whole global batch. There are no metrics."""
    logits = model(batch["tokens"])
    nats = vocab_parallel_loss(logits.flatten(0, 1), batch["targets"].flatten(), model.tp)
    return nats / max(batch["n_targets"], 1), {}

# ---------------------------------------- Optimizer ----------------------------------------

def build_optimizer(model, cfg):
    """Appendix B: Adam with weight decay, decoupled, since it cites Loshchilov and Hutter."""
    # Undisclosed: which weights decay. Here matrices and embeddings, neither gains nor biases.
    groups = [
        dict(params=[p for p in model.parameters() if p.ndim > 1], weight_decay=cfg.weight_decay),
        dict(params=[p for p in model.parameters() if p.ndim <= 1], weight_decay=0.0),
    ]
    betas = cfg.beta1, cfg.beta2
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=betas, eps=cfg.eps, fused=True)

def learning_rate(tokens, cfg):
    """Appendix B: linear warm-up, a cosine to --floor of the peak, then constant; tokens are those
    that the model has seen."""
    # Undisclosed: whether the 260 billion tokens of the cosine include the warm-up. Here they do.
    # Departure: warm-up, decay and ramp scale with --tokens, so that short runs have all three.
    seen = tokens / cfg.tokens
    if seen < cfg.warmup:
        return cfg.lr * seen / cfg.warmup
    done = min((seen - cfg.warmup) / max(cfg.decay - cfg.warmup, 1e-9), 1)
    return cfg.lr * (cfg.floor + (1 - cfg.floor) * 0.5 * (1 + math.cos(math.pi * done)))

def batch_at(tokens, cfg):
    """Appendix B: sequences of the update that follows `tokens`. The number grows linearly in
    tokens over the ramp, rounded down to a multiple that the ranks can share."""
    if not cfg.first_batch or tokens >= cfg.ramp * cfg.tokens:
        return cfg.batch_size
    multiple = math.lcm(cfg.batch_multiple, cfg.dp * max(cfg.micro_batch, 1))
    least = math.ceil(cfg.dp * cfg.pp * max(cfg.micro_batch, 1) / multiple) * multiple
    grown = (cfg.batch_size - cfg.first_batch) * tokens / (cfg.ramp * cfg.tokens)
    return min(max(int(cfg.first_batch + grown) // multiple * multiple, least), cfg.batch_size)

def count_steps(cfg, tokens=0):
    """(updates of the ramp, all updates) from `tokens` to the end of the run."""
    ramp = 0
    while tokens < cfg.tokens and batch_at(tokens, cfg) < cfg.batch_size:
        tokens += batch_at(tokens, cfg) * cfg.seq_len
        ramp += 1
    left = math.ceil((cfg.tokens - tokens) / (cfg.batch_size * cfg.seq_len))
    return ramp, ramp + max(left, 0)

def noise_scale(small, big, n_small, n_big):
    """Unbiased estimates of |G|² and tr Σ from small and big, the squared norms of the gradients of
    n_small and n_big sequences (noise scale, appendix A.1). The simple noise scale is the ratio of
    their averages, tr Σ / |G|²; §2.3 measured it to choose the batch sizes."""
    square = (n_big * big - n_small * small) / (n_big - n_small)
    return square, (small - big) / (1 / n_small - 1 / n_big)

# ---------------------------------------- Precision ----------------------------------------

# Parameters, gradients and Adam's moments are fp32. Under bf16 and fp16, autocast (in parallelize)
# runs matrix products (those of the logits included), attention and GELU in that precision; norms,
# residual sums and the loss are computed in fp32.
# Undisclosed: the paper's precision; its credits name "fully half-precision training". --precision
# fp16 follows Sparse Transformers §5.6, with the numbers of blocksparse's example: the loss scale
# starts at 2^16, halves when a gradient overflows, and that step is computed again; it doubles
# after 1,000 steps without an overflow. bf16 needs no loss scale.
# Departure: gradients are fp32, in the all-reduce too; Sparse Transformers had fp16 gradients.

PEAK_FLOPS = {"bf16": {  # dense, by precision and the device's exact name; others get no MFU
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA B200": 2250e12,
}}  # fmt: skip
PEAK_FLOPS["fp16"] = PEAK_FLOPS["bf16"]

# ---------------------------------------- Parallelism ----------------------------------------

def lay_out(cfg, ranks):
    """cfg with --dp, where it is 0, set to the ranks that are left, and --micro_batch, where it is
    0, to two micro-batches for each pipeline rank. Raises ValueError if the ranks do not fit."""
    others = cfg.tp * cfg.pp
    if min(cfg.tp, cfg.pp) < 1 or ranks % others or (cfg.dp and cfg.dp * others != ranks):
        layout = f"tp {cfg.tp} x pp {cfg.pp} x dp {cfg.dp or 'any'}"
        raise ValueError(f"{layout} are not {ranks} ranks")
    cfg = dataclasses.replace(cfg, dp=ranks // others)
    if cfg.pp > 1 and not cfg.micro_batch:
        first = min(cfg.first_batch or cfg.batch_size, cfg.batch_size)
        cfg.micro_batch = max(first // (2 * cfg.pp * cfg.dp), 1)
    return cfg

def build_stage(cfg, stage, tp=None):
    """A stage of the pipeline on the meta device, with a layer less on the first stage and on the
    last, which have the embedding and the softmax."""
    edges = [round((cfg.n_layers + 2) * i / cfg.pp) for i in (stage, stage + 1)]
    layers = range(max(edges[0] - 1, 0), min(edges[1] - 1, cfg.n_layers))
    with torch.device("meta"):
        return GPT3(cfg, layers, stage == 0, stage == cfg.pp - 1, tp)

def split_dimension(name):
    """The dimension along which tensor parallelism cuts a parameter; None: each rank has it all."""
    if re.search(r"(^|\.)(token_embedding|head|qkv|up)\.(weight|bias)$", name):
        return 0
    return 1 if re.search(r"(^|\.)(out|down)\.weight$", name) else None

def fill_part(name, p, replicated, tp):
    """Write this rank's part of the complete tensor to the parameter; padding rows are 0."""
    dim = split_dimension(name)
    if tp and dim is not None:
        first = tp.rank() * p.shape[dim]
        replicated = replicated.tensor_split((first, first + p.shape[dim]), dim)[1]
    p.data.zero_()
    p.data[: len(replicated)] = replicated

def parallelize(model, cfg, mesh):
    """Apply recomputation and compilation to the blocks, and autocast to the model."""
    for block in model.blocks.values():
        if cfg.recompute == "block":
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if cfg.compile:
            torch.compiler.config.fail_on_recompile_limit_hit = True
            block.compile(dynamic=False)
    if cfg.precision != "fp32":
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[cfg.precision]
        model.forward = torch.autocast(mesh.device_type, dtype)(model.forward)
    return model

class ModelParallel:
    """§2.1, "model parallelism within each matrix multiply and across the layers": the part of the
    model that one rank has, run over micro-batches in a loop or, with --pp, by a schedule.
    Data-parallel ranks have copies of it and sum their gradients in one all-reduce per update."""

    # Undisclosed: all degrees, the schedule of the pipeline (here 1F1B), and how gradients of
    # data-parallel ranks are summed.

    def __init__(self, cfg, device):
        """Build this rank's part, whose values are not set; a rank is tp + TP (pp + PP dp)."""
        sizes = cfg.dp, cfg.pp, cfg.tp
        self.mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("dp", "pp", "tp"))
        self.cfg = cfg
        self.device = device
        self.tp = self.mesh["tp"].get_group() if cfg.tp > 1 else None
        self.data_rank, self.stage, tp_rank = self.mesh.get_coordinate()
        self.use = None  # of self.schedule: micro-batches, and whether there are gradients
        model = build_stage(cfg, self.stage, self.tp).to_empty(device=device)
        self.model = parallelize(model, cfg, self.mesh)
        # For checkpoints: the model, with names that are unique among the ranks of tp.
        self.saved = nn.ModuleDict({f"tp{tp_rank}": self.model})
        if cfg.pp > 1:  # the first and the last stage of each pipeline, which share the embedding
            ends = self.mesh.mesh[:, [0, -1]].movedim(1, 2).flatten(0, 1)  # [DP TP, 2]
            self.ends, _ = dist.new_subgroups_by_enumeration(ends.tolist())

    def run(self, batches, scale=1.0):
        """This rank's part of the mean loss over the global batch, from these micro-batches of it.
        If gradients are enabled, those of scale times the loss are added to p.grad."""
        if self.cfg.pp > 1:
            return self.run_pipeline(batches, scale)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss, _ = objective(self.model, batch, self.cfg)
            if torch.is_grad_enabled():
                (loss * scale).backward()
            total += loss.detach()
        return total / self.cfg.tp

    def run_pipeline(self, batches, scale):
        """run for a stage of a pipeline; only the last stage has a loss that is not 0."""
        self.factor = scale / batches[0]["n_targets"]
        use = len(batches), torch.is_grad_enabled()
        if use != self.use:
            self.use = use
            group = self.mesh["pp"].get_group()
            stage = PipelineStage(self.model, self.stage, self.cfg.pp, self.device, group=group)
            self.schedule = Schedule1F1B(stage, len(batches), self.scaled_loss, scale_grads=False)
        step = self.schedule.step if torch.is_grad_enabled() else self.schedule.eval
        tokens = torch.cat([batch["tokens"] for batch in batches])
        targets = torch.cat([batch["targets"] for batch in batches])
        inputs = [tokens] if self.stage == 0 else []
        losses = []  # of micro-batches; the schedule fills it on the last stage
        step(*inputs, target=targets, losses=losses, return_outputs=False)
        if torch.is_grad_enabled() and self.ends:
            table = self.model.token_embedding or self.model.head
            dist.all_reduce(table.weight.grad, group=self.ends)  # of the embedding and its copy
        total = sum(losses, torch.zeros((), device=self.device)).detach()
        return total / scale / self.cfg.tp

    def scaled_loss(self, logits, targets):
        """scale times the objective of a micro-batch, for the schedule."""
        return vocab_parallel_loss(logits.flatten(0, 1), targets.flatten(), self.tp) * self.factor

    def squared_norm(self):
        """This rank's part of |gradient|²; replicated parameters count once over the ranks of tp,
        and the embedding counts on the first stage only."""
        counted = [(name, p) for name, p in self.model.named_parameters() if name != "head.weight"]
        sharded = [p.grad for name, p in counted if split_dimension(name) is not None]
        replicated = [p.grad for name, p in counted if split_dimension(name) is None]
        square = nn.utils.get_total_norm(sharded).double() ** 2
        return square + nn.utils.get_total_norm(replicated).double() ** 2 / self.cfg.tp

    def gradients(self, batches, scale):
        """Replace the gradient by that of scale times the mean loss over the global batch.

        Returns the loss, |gradient|², and for the noise scale the mean |gradient|² of smaller
        batches and n, where a smaller batch has 1 / n of the sequences: each data-parallel rank's
        share or, with one such rank, its first micro-batches. NaN without --noise_scale.
        """
        cfg = self.cfg
        self.model.zero_grad()
        n_first = len(batches)
        if cfg.noise_scale and cfg.dp == 1 and len(batches) >= 2 * cfg.pp:
            n_first = cfg.pp  # the fewest micro-batches that a pipeline can run
        n = cfg.dp * len(batches) / n_first
        loss = self.run(batches[:n_first], scale).double()
        small = loss * math.nan
        if cfg.noise_scale and n > 1:
            small = self.squared_norm() * n**2 / cfg.dp  # of means over fewer sequences
        if n_first < len(batches):
            if self.model.head is not None:  # its gradient is in that of the first stage already
                self.model.head.weight.grad.zero_()
            loss += self.run(batches[n_first:], scale)
        if cfg.dp > 1:
            parameters = list(self.model.parameters())
            flat = torch.cat([p.grad.flatten() for p in parameters])
            dist.all_reduce(flat, group=self.mesh["dp"].get_group())
            for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
                p.grad = part.view_as(p)
        sums = torch.stack([loss, self.squared_norm() / cfg.dp, small])
        dist.all_reduce(sums)
        loss, square, small = sums.tolist()  # the only wait for the device in an update
        return loss, square, small, n

    def evaluate(self, batches):
        """This rank's part of the mean loss over a global batch, without dropout."""
        with evaluation_mode(self.model, compiled=False):  # lengths are those of training
            return self.run(batches).item()

def memory_per_rank(cfg):
    """Bytes by kind on the rank that needs most, at the start of the backward pass of a full batch,
    without compilation."""
    n_micro, micro = split_batch(cfg, cfg.dp)
    # Kept for the backward pass, per position and block: the inputs of both norms in fp32; the
    # inputs of qkv and up; divided over tp, q, k, v, the inputs of out and down, and GELU's input;
    # a byte per entry of a GPU's two dropout masks. Casts: autocast's copies of the weights, which
    # each micro-batch in flight makes anew, or with recomputation only the one that runs.
    size = 4 if cfg.precision == "fp32" else 2
    block = 8 * cfg.dim + size * (2 * cfg.dim + (4 * cfg.dim + 2 * cfg.hidden_dim) / cfg.tp)
    block += 2 * cfg.dim * (cfg.dropout > 0)
    banded = 3 * size * cfg.dim / cfg.tp  # keys and values of two blocks; all blocks' outputs
    head = 4 * cfg.dim + size * cfg.dim + 4 * cfg.vocab_size / cfg.tp  # norm, product, softmax
    stages = []
    for i in range(cfg.pp):
        stage = build_stage(cfg, i)
        n = 0
        for name, p in stage.named_parameters():
            n += p.numel() / (cfg.tp if split_dimension(name) is not None else 1)
        in_flight = min(cfg.pp - i, n_micro)  # micro-batches of 1F1B
        n_banded = sum(part.attn.band > 0 for part in stage.blocks.values())
        kept = in_flight * (len(stage.blocks) * block + n_banded * banded)
        casts = in_flight * 2 * n * (size == 2)
        if cfg.recompute == "block" and len(stage.blocks):  # every input, and one block in full
            kept = in_flight * len(stage.blocks) * 4 * cfg.dim + block + banded
            casts = 2 * n * (size == 2)
        if i == cfg.pp - 1:
            kept += head
        memory = {"parameters": 4 * n, "gradients": 4 * n, "optimizer": 8 * n, "casts": casts}
        memory["activations"] = micro * cfg.seq_len * kept
        # PyTorch's stages keep a buffer per micro-batch for what each of their neighbours sends.
        n_neighbours = (i > 0) + (i < cfg.pp - 1)
        memory["received"] = n_micro * n_neighbours * micro * cfg.seq_len * 4 * cfg.dim
        stages.append(memory)
    return max(stages, key=lambda memory: sum(memory.values()))

# ---------------------------------------- Checkpoint ----------------------------------------

HF_CONFIG = {  # field of Config: (key in config.json, default of GPT2Config; bands are ours)
    "vocab_size": ("vocab_size", 50257), "seq_len": ("n_positions", 1024), "dim": ("n_embd", 768),
    "n_layers": ("n_layer", 12), "n_heads": ("n_head", 12), "hidden_dim": ("n_inner", None),
    "band": ("band", 0), "banded": ("banded", "odd"),
}  # fmt: skip
HF_FIXED = {  # the only values that are supported
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False, "tie_word_embeddings": True,
}  # fmt: skip
HF_NAMES = {
    "token_embedding": "wte", "position_embedding": "wpe", "blocks": "h", "attn.qkv": "attn.c_attn",
    "attn.out": "attn.c_proj", "norm1": "ln_1", "norm2": "ln_2", "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj", "final_norm": "ln_f",
}  # fmt: skip
SHAPE = tuple(HF_CONFIG)  # fields of Config that must agree with a checkpoint

def gpt2_tensors(model, n_heads):
    """(name in Hugging Face's class, view of our tensor in the order of theirs, its shape there) of
    each parameter. Their matrices are [in, out]; their rows of qkv have all q, then all k and v."""
    for name, p in model.named_parameters():
        tensor = p.data
        if "qkv" in name:
            tensor = tensor.unflatten(0, (n_heads, 3, -1)).transpose(0, 1)  # [3, H, E, ...]
        if re.search(r"\.(qkv|out|up|down)\.weight$", name):
            tensor = tensor.movedim(-1, 0)  # [D, 3, H, E] or [in, out]
        for ours, theirs in HF_NAMES.items():
            name = name.replace(ours, theirs)
        yield name, tensor, tensor.flatten(p.ndim - 1).shape

def from_hf(path):
    """(model, cfg) from the checkpoint directory of a GPT2LMHeadModel."""
    with explain(f"{path} holds no GPT2LMHeadModel", Exception):
        cfg = Config(**read_hf_config(path, HF_CONFIG, HF_FIXED))
        cfg.hidden_dim = cfg.hidden_dim or 4 * cfg.dim
        model = GPT3(cfg)
        tensors = {k.removeprefix("transformer."): v for k, v in read_hf_tensors(path).items()}
        for name, tensor, shape in gpt2_tensors(model, cfg.n_heads):
            if tensors[name].shape != shape:
                raise ValueError(f"{name} is {list(tensors[name].shape)}, not {list(shape)}")
            tensor.copy_(tensors[name].view_as(tensor))
    return model, cfg

def to_hf(model, cfg, path):
    """Write model to the directory path as a GPT2LMHeadModel."""
    # Departure: GPT2LMHeadModel has no banded layers and reads them as dense ones. Two keys of
    # config.json, band and banded, which only this script reads, say which layers are banded.
    from safetensors.torch import save_file

    config = {key: getattr(cfg, field) for field, (key, _) in HF_CONFIG.items()} | HF_FIXED
    config |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), cfg.dropout)
    end = cfg.vocab_size - 1 if cfg.vocab_size == 50257 else None
    config |= dict(architectures=["GPT2LMHeadModel"], bos_token_id=end, eos_token_id=end)
    tensors = {}
    for name, tensor, shape in gpt2_tensors(model, cfg.n_heads):
        tensors[f"transformer.{name}"] = tensor.reshape(shape).cpu().contiguous()
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

def loss_by_position(model, heldout, n, cfg):
    """Mean nats of the targets at each position, over the first n held-out sequences, [T]."""
    device = model.token_embedding.weight.device
    total = torch.zeros(cfg.seq_len, device=device)
    with evaluation_mode(model, cfg.compile):
        for i in range(n):
            batch = get_batch(heldout, i, 1, cfg)
            logits = model(batch["tokens"].to(device))[0]  # [T, V]
            total += F.cross_entropy(logits, batch["targets"][0].to(device), reduction="none")
    return (total / n).tolist()

def sample(model, ids, n, allowed_ids, cfg):
    """ids followed by n sampled ids (temperature 0.8); allowed_ids [V], boolean, may be drawn."""
    device = model.token_embedding.weight.device
    torch.manual_seed(stable_hash(cfg.seed, "sample"))
    with evaluation_mode(model, cfg.compile):
        for _ in range(n):
            tokens = torch.tensor([ids[-cfg.seq_len :]], device=device)  # [1, T]
            logits = model(tokens)[0, -1].cpu()  # [V]
            p = (logits / 0.8).masked_fill(~allowed_ids, -math.inf).softmax(-1)
            ids = ids + torch.multinomial(p, 1).tolist()
    return ids

def check(cfg, ranks):
    """Raise ValueError for a configuration that cannot run on that many ranks."""
    for field in dataclasses.fields(cfg):
        may_be_zero = field.name in ("band", "first_batch")
        least = int(field.type is int and field.default > 0 and not may_be_zero)
        if field.type in (int, float) and not least <= getattr(cfg, field.name) < math.inf:
            raise ValueError(f"--{field.name} {getattr(cfg, field.name)} is not {least} or more")
    n_entries = cfg.train_tokenizer or entries_to_learn(cfg.tokenizer)
    n_micro, micro = split_batch(cfg, cfg.dp)
    for wrong, message in (
        (cfg.dim % cfg.n_heads, f"{cfg.n_heads} heads do not divide the width {cfg.dim}"),
        (cfg.n_heads % cfg.tp, f"--tp {cfg.tp} does not divide {cfg.n_heads} heads"),
        (cfg.hidden_dim % cfg.tp, f"--tp {cfg.tp} does not divide --hidden_dim {cfg.hidden_dim}"),
        (cfg.dp * n_micro * micro != cfg.batch_size,
         f"--batch_size {cfg.batch_size} is not {cfg.dp} ranks x n micro-batches of {micro}"),
        (cfg.dropout >= 1, f"--dropout {cfg.dropout} is not less than 1"),
        (cfg.warmup > 0.1, f"--warmup {cfg.warmup} is more than a tenth of the run"),
        (not cfg.warmup < cfg.decay <= 1,
         f"--decay {cfg.decay} is not a part of the run that ends after --warmup {cfg.warmup}"),
        (max(cfg.ramp, cfg.floor) > 1, "--ramp and --floor are parts, at most 1"),
        (cfg.tokens <= 0, "--tokens is 0"),
        (cfg.compile and cfg.first_batch and not cfg.micro_batch,
         "--compile needs --micro_batch where the batch grows"),
        (cfg.pp > cfg.n_layers + 2,
         f"{cfg.n_layers} layers, embedding and softmax are fewer than --pp {cfg.pp}"),
        (n_micro < cfg.pp, f"{n_micro} micro-batches are fewer than --pp {cfg.pp}"),
        (0 < n_entries <= 256, f"a BPE of {n_entries} entries has no more than the 256 bytes"),
        (cfg.train_tokenizer and not cfg.out, "--train_tokenizer needs --out"),
        (cfg.train_tokenizer and os.path.exists(f"{cfg.out}/ranks.tiktoken"),
         f"--train_tokenizer: {cfg.out} has ranks.tiktoken already"),
        (cfg.resume and not cfg.out, "--resume needs --out"),
        (cfg.eval and not cfg.out and not cfg.init, "--eval needs --out or --init"),
        (cfg.init and entries_to_learn(cfg.tokenizer),
         f"--init needs the tokenizer of its model, and --tokenizer {cfg.tokenizer} learns one"),
        (cfg.export and cfg.tp * cfg.pp > 1, "--export needs a model without --tp and --pp"),
        (ranks > 1 and (cfg.write_tokens or cfg.train_tokenizer),
         "--write_tokens and --train_tokenizer run in one process, without torchrun"),
        (cfg.write_tokens and entries_to_learn(cfg.tokenizer) and not cfg.out,
         "--write_tokens needs --out for the ranks of a BPE that it learns"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
    check_directories(cfg.init, cfg.export, cfg.write_tokens)

def dry_run(cfg):
    """Print parameters, FLOPs, updates, a bound of the loss and memory per rank, computed from
    shapes alone."""
    cfg = lay_out(cfg, cfg.world_size)
    check(cfg, cfg.world_size)
    n_entries = entries_to_learn(cfg.tokenizer)
    if not cfg.vocab_size and n_entries:
        cfg.vocab_size = n_entries + 1
    elif not cfg.vocab_size:
        cfg.vocab_size = load_tokenizer(cfg.tokenizer or "bytes", ["<|endoftext|>"]).n_vocab
    cfg.tokens = run_tokens(cfg)
    with torch.device("meta"):
        total, activated = count_parameters(GPT3(cfg))
    print(f"parameters {total:,} | activated {activated:,}")
    print(f"FLOPs per token {flops_per_token(cfg):.4g} | 6 N gives {6 * activated:.4g}")
    ramp, steps = count_steps(cfg)
    print(f"updates {steps:,}, {ramp:,} of them of the ramp")
    pf_days = 6 * total * cfg.tokens / 8.64e19  # as in Table D.1
    without_embeddings = pf_days * (1 - (cfg.vocab_size + cfg.seq_len) * cfg.dim / total)
    print(f"PF-days {pf_days:.4g} (Table D.1) | least loss for that compute", end=" ")
    print(f"{2.57 * without_embeddings**-0.048:.2f} nats per token (Fig. 3.1)")
    print_memory(memory_per_rank(cfg))

def run_tokens(cfg):
    """Tokens of the run: --tokens or, with --steps, the fewest that take that many updates."""
    if not cfg.steps:
        return cfg.tokens

    def updates(n):
        return count_steps(dataclasses.replace(cfg, tokens=float(n * cfg.seq_len)))[1]

    sequences = range(cfg.steps * cfg.batch_size + 1)
    return float(bisect.bisect_left(sequences, cfg.steps, key=updates) * cfg.seq_len)

def take_step(parallel, optimizer, batches, lr, state):
    """One update from this data-parallel rank's micro-batches; returns loss and gradient norm of
    the global batch. If either is not finite, all ranks skip the update. With a loss scale, an
    overflow of the gradient halves the scale, and the gradient is computed again."""
    cfg = parallel.cfg
    while True:
        loss, square, small, n = parallel.gradients(batches, state["scale"])
        if math.isfinite(square) or not math.isfinite(loss) or state["scale"] <= 1:
            break
        state["scale"] /= 2
        state["clean"] = 0
    norm = math.sqrt(square) / state["scale"]
    finite = math.isfinite(norm) and math.isfinite(loss)
    if finite and math.isfinite(small):
        n_big = sum(len(batch["tokens"]) for batch in batches) * cfg.dp
        small /= state["scale"] ** 2
        square, trace = noise_scale(small, norm**2, n_big / n, n_big)
        # Undisclosed: how estimates are averaged. Here exponentially, with a decay of 0.99.
        state["square"] = 0.99 * state["square"] + 0.01 * square
        state["trace"] = 0.99 * state["trace"] + 0.01 * trace
    for group in optimizer.param_groups:
        group["lr"] = lr
    if finite:
        limit = cfg.clip or math.inf
        factor = min(1.0, limit / (norm + 1e-6)) / state["scale"]
        for p in parallel.model.parameters():
            p.grad.mul_(factor)
        optimizer.step()
    state["clean"] = state["clean"] + 1 if finite and cfg.precision == "fp16" else 0
    if state["clean"] == 1000:
        state["scale"] *= 2
        state["clean"] = 0
    return loss, norm

def train(parallel, optimizer, mix, heldout, state, cfg):
    """Update the model until the tokens of the run are used up; returns False if a signal ends it
    earlier. A skipped update counts for the data and the ramp, but not for the learning rate."""
    this_rank = parallel.device, parallel.data_rank, cfg.dp
    signals = catch_signals()
    thread = ThreadPoolExecutor(1)  # reads the next batch during an update

    def read(first):  # cfg with the size of the batch that begins with `first`, and the batch
        now = dataclasses.replace(cfg, batch_size=batch_at(first * cfg.seq_len, cfg))
        return now, read_batch(mix, first, now, *this_rank)

    next_batches = thread.submit(read, state["sequences"])
    first_step = saved = state["step"]
    last_step = first_step + count_steps(cfg, state["sequences"] * cfg.seq_len)[1]
    pace = None  # seconds per update
    n_skipped = 0

    while True:
        step = state["step"]
        steps_left = last_step - step
        error = next_batches.exception()  # waits until the next batch is read
        if step > first_step + 1:  # the first update may compile and is left out
            seconds = time.perf_counter() - clock
            pace = 0.9 * (pace or seconds) + 0.1 * seconds
        (stop,) = sum_over_ranks(len(signals) + (error is not None))
        end = steps_left <= 0 or stop
        if cfg.out and step > saved and (end or (step % cfg.save_every == 0 and not n_skipped)):
            save_checkpoint(cfg.out, parallel.saved, optimizer, state)
            saved = step
        if error:
            raise error
        if stop:
            return False
        if end or step % cfg.val_every == 0:
            validate(parallel.evaluate, heldout, step, cfg, *this_rank)
        if end:
            return True

        clock = time.perf_counter()
        now, batches = next_batches.result()
        state["sequences"] += now.batch_size
        next_batches = thread.submit(read, state["sequences"])
        sum_counts(batches, cfg.dp)
        # All ranks of tp drop the same entries of the residual stream, of which each has a copy.
        # Departure: their heads share masks of attention probabilities; Megatron's have their own.
        key = cfg.seed, step, parallel.data_rank, parallel.stage
        torch.manual_seed(stable_hash(*key))  # for dropout
        lr = learning_rate(state["tokens"], cfg)
        loss, norm = take_step(parallel, optimizer, batches, lr, state)
        finite = math.isfinite(loss) and math.isfinite(norm)
        state["step"] += 1
        state["tokens"] += finite * now.batch_size * cfg.seq_len
        if step == 0 or steps_left == 1 or state["step"] % cfg.log_every == 0:
            bpb = bits_per_byte(loss * batches[0]["n_targets"], batches[0]["n_bytes"])
            row = {"loss": loss, "bpb": bpb, "lr": lr, "grad": norm}
            if cfg.noise_scale:
                row["noise"] = state["trace"] / (state["square"] or math.nan)
            row["tokens"] = state["tokens"]
            head = f"step {step + 1}/{last_step}"
            tail = progress(state["tokens"], steps_left - 1, pace, now, parallel.device)
            if cfg.precision == "fp16":
                tail.insert(0, f"scale {state['scale']:g}")
            log(cfg.out, step + 1, head, row, [f"batch {now.batch_size}", *tail])
        n_skipped = 0 if finite else n_skipped + 1
        if n_skipped:
            print(f"step {step + 1} skipped: its loss or gradient is not finite")
        if n_skipped == 3 or (n_skipped and steps_left == 1):
            raise ValueError(f"no finite gradient in the last {n_skipped} steps to {step + 1}")

def export_and_sample(model, heldout, tokenizer, cfg):
    """Export the model, print its loss by position, and print a sample."""
    if cfg.export:
        to_hf(model, cfg, cfg.export)
    nats = loss_by_position(model, heldout, min(64, heldout.n_windows(cfg.seq_len)), cfg)
    edges = [0, *(2**i for i in range(2, 30) if 2**i < cfg.seq_len), cfg.seq_len]
    means = [f"{a}-{b - 1} {sum(nats[a:b]) / (b - a):.3f}" for a, b in itertools.pairwise(edges)]
    print("loss by position |", " | ".join(means))
    if tokenizer:
        ids = tokenizer.encode_ordinary(cfg.prompt)
        ids = ids or get_batch(heldout, 0, 1, cfg)["tokens"][0, :32].tolist()
        allowed_ids = torch.from_numpy(heldout.token_bytes > 0)
        print(tokenizer.decode(sample(model, ids, 256, allowed_ids, cfg)))

@record
def main(argv=None):
    """Run the command line: read the data, build or resume the run, train, export and sample."""
    with report_user_errors():
        cfg, given = parse(argv)
        if cfg.dry_run:
            return dry_run(cfg)
        device = init_distributed(cfg.timeout)
        ranks = dist.get_world_size()
        cfg = lay_out(cfg, ranks)
        check(cfg, ranks)
        if cfg.init:
            source, theirs = from_hf(cfg.init)
            taken = set(SHAPE) - (given & {"band", "banded"})  # a dense model may get bands
            cfg = dataclasses.replace(cfg, **{name: getattr(theirs, name) for name in taken})
            check(cfg, ranks)
        data = load_mix(cfg)
        if not data:
            return
        tokenizer, mix, heldout = data
        n_windows = mix.n_windows(cfg.seq_len)

        cfg.tokens = run_tokens(cfg)
        fixed = {name: getattr(cfg, name) for name in (*SHAPE, "tp", "pp")}
        if not cfg.eval:
            fixed |= {"seed": cfg.seed, "data_fingerprint": mix.fingerprint()}
        newest, run = newest_checkpoint(cfg.out, cfg.resume or cfg.eval, fixed)
        if run and not given & {"steps", "tokens"}:  # keep the planned number of tokens
            cfg.tokens = run["tokens"]

        parallel = ModelParallel(cfg, device)
        init_weights(parallel.model, cfg, parallel.tp)
        if cfg.init:
            values = source.state_dict()
            for name, p in parallel.model.named_parameters():
                value = values[name.replace("head.weight", "token_embedding.weight")]
                fill_part(name, p, value, parallel.tp)
        optimizer = build_optimizer(parallel.model, cfg)
        state = {"step": 0, "sequences": 0, "tokens": 0}
        state |= {"scale": 1.0, "clean": 0, "square": 0.0, "trace": 0.0}
        if newest:
            load_checkpoint(newest, parallel.saved, optimizer, state)
        if (cfg.precision == "fp16") != (state["scale"] > 1):  # --precision differs from before
            state["scale"] = 2.0**16 if cfg.precision == "fp16" else 1.0
        if cfg.eval:
            if not newest and not cfg.init:
                raise ValueError(f"--eval: {cfg.out} has no checkpoint")
            cfg.tokens = 0.0
            cfg.out = ""  # nothing is written
        if cfg.out and dist.get_rank() == 0:
            lock = claim_directory(cfg.out, dataclasses.asdict(cfg) | fixed)  # until the run ends
        with torch.device("meta"):
            total, activated = count_parameters(GPT3(cfg))
        first = dataclasses.replace(cfg, batch_size=batch_at(0, cfg))
        n_micro, micro = split_batch(first, cfg.dp)
        n_tokens = first.batch_size * cfg.seq_len
        print(f"torch {torch.__version__} | {device.type} {cfg.precision} | {n_windows:,} windows")
        print(f"parameters {total:,} | activated {activated:,}", end=" | ")
        print(f"FLOPs per token {flops_per_token(cfg):.3g} | tokens per step", end=" ")
        print(f"{n_tokens:,} = {cfg.dp} ranks x {n_micro} x {micro} sequences of", end=" ")
        print(f"{cfg.seq_len}, later {cfg.batch_size * cfg.seq_len:,}", end=" | ")
        print(f"tp {cfg.tp} x pp {cfg.pp} x dp {cfg.dp}")
        if not train(parallel, optimizer, mix, heldout, state, cfg):
            return print(f"stopped after step {state['step']}")
        if dist.get_rank() == 0 and cfg.tp * cfg.pp == 1:  # this rank has the complete model
            export_and_sample(parallel.model, heldout, tokenizer, cfg)

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
