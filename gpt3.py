"""Language Models are Few-Shot Learners (Brown et al., 2020, arXiv 2005.14165), GPT-3, and Language
Models are Unsupervised Multitask Learners (Radford et al., 2019), GPT-2, in one file.

New against its parent, gpt1.py; in GPT-2 (§2.2, §2.3):
- the norm moves to the input of each branch, and one more follows the last block;
- what is added to the residual stream starts smaller by the root of how often that happens;
- a byte-level BPE of 50,257 entries, which spells any text; documents in one stream.
In GPT-3 (§2.1, §2.2, appendix B):
- every other layer attends only to a band of the latest positions; contexts of 2,048;
- a rate and a batch for each size, warm-up, cosine and a growing batch measured in tokens;
- Adam (0.9, 0.95), decay 0.1, clipping at 1; corpora mixed by weight, packed without a mask;
- models split inside each matrix product and across the layers, loss scaling for fp16.
Kept: learned positions, GELU, biases, the shared softmax, F = 4 D.

Map: GPT-2 §2.2 train_bpe | §2.3 Block, init_weights | GPT-3 §2.1 Block, banded_mask, PRESETS,
ParallelAttention, ParallelMLP, ModelParallel | §2.2 Mixture | §2.3 noise_scale | appendix B
learning_rate, batch_at, build_optimizer, get_batch | the title: loss_by_position, shots.
"Megatron" is arXiv 1909.08053, "noise scale" arXiv 1812.06162; "released" is GPT-2's inference
code, since GPT-3 was never released.
Legend: B batch, T positions, D width, H heads, E = D / H, F hidden width, V vocabulary; under
tensor parallelism H, F and V are a rank's own share.
Conventions: T + 1 tokens make T inputs and T targets; loss in nats per target.

Run: python gpt3.py                         # a laptop: the preset demo
     torchrun --nproc_per_node=8 gpt3.py    # GPUs: the preset small
     torchrun --nnodes=16 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
         gpt3.py --preset 13b --tp 8 --pp 4 --tokenizer gpt2 --out /shared/13b \\
         --data "60:cc/,22:webtext2/,8:books1/,8:books2/,3:wikipedia/"
Expect: in a minute on two CPU cores the demo learns a BPE of 1,024 entries, and its held-out bits
per byte fall from 3.92 to 2.24 (lzma needs 1.93); an example in the context makes an answer
likelier, but none is found yet.
"""

import argparse
import base64
import bisect
import collections
import contextlib
import dataclasses
import functools
import glob
import hashlib
import heapq
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
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, distribute_tensor

# ---------------------------------------- Config ----------------------------------------

@dataclasses.dataclass
class Config:
    """The run. Every field is a flag of the command line, and its comment is the flag's help."""

    # Model, Table 2.1
    vocab_size: int = 0  # V, entries of the vocabulary; 0: as many as the tokenizer has
    seq_len: int = 2048  # T, positions that the model has, and tokens of every training sequence
    dim: int = 768  # D, width of the residual stream
    n_layers: int = 12  # blocks
    n_heads: int = 12  # H, attention heads
    hidden_dim: int = 3072  # F, width of the feed-forward layer
    band: int = 128  # positions that a banded layer attends to, its own included; 0: all are dense
    banded: Literal["odd", "even"] = "odd"  # which layers are banded, counted from 0
    dropout: float = 0.0  # on embeddings and residual branches
    # Data
    data: str = ""  # WEIGHT:PATH,...: a mix of text and shards of its ids; empty: Python's library
    tokenizer: str = ""  # bytes, gpt2, ..., a rank file, or bpe:N, learned here; empty: bytes
    train_tokenizer: int = 0  # entries of a BPE to learn from the data for out/ranks.tiktoken; exit
    # Optimization, Table 2.1 and appendix B
    batch_size: int = 256  # sequences of one update, over all ranks, once ramped up
    first_batch: int = 16  # sequences of the first update; 0: batch_size
    ramp_tokens: float = 4e9  # over which the batch grows
    batch_multiple: int = 1  # sequences that a growing batch is a multiple of
    tokens: float = 300e9  # of the run
    steps: int = 0  # updates, at most; 0: as many as the tokens need
    lr: float = 6e-4  # largest learning rate
    warmup_tokens: float = 375e6  # of linear warm-up
    decay_tokens: float = 260e9  # at which the cosine ends, at a tenth of the rate
    weight_decay: float = 0.1  # decoupled, on matrices and embeddings
    clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    noise_scale: bool = False  # log the gradient noise scale, in tokens
    seed: int = 0  # of weights, data order and dropout
    # Parallelism, §2.1
    micro_batch: int = 0  # sequences of one forward pass, at most; 0: the share, pp: a part of it
    tp: int = 1  # ranks that share each layer's matrices
    pp: int = 1  # ranks that share the layers
    dp: int = 0  # ranks that read their own data and share the optimizer; 0: all that are left
    # Machine
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on GPUs, else fp32
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

# Batches in sequences: 32k, 0.5M, 1M, 2M and 3.2M tokens are 16, 256, 512, 1024 and 1536 of 2,048.
# Undisclosed: how long each size's ramp is ("the first 4-12 billion tokens"), and how batches are
# rounded: down to sixteens, which data-parallel ranks can share, at some 2 more updates in 100 than
# by ones. More ranks than 16, or a pipeline, need a larger --first_batch and --batch_multiple.
GPT3 = dict(vocab_size=50257, batch_multiple=16, precision="bf16", micro_batch=1, compile=True)
# Undisclosed: GPT-2's optimizer, rate and length. The optimizer and the rates are GPT-3's for these
# sizes, the 300,000 updates Megatron's, the warm-up 2,000 of them. Band 0: all layers are dense.
# Undisclosed: GPT-2's dropout. None here; --dropout 0.1 has it on embeddings and residual branches.
# Departure: and not on attention probabilities, which kernels that skip blocks do not offer.
GPT2 = GPT3 | dict(
    seq_len=1024, band=0, batch_size=512, first_batch=0, tokens=3e5 * 2**19,
    warmup_tokens=2e3 * 2**19, decay_tokens=3e5 * 2**19,
)  # fmt: skip
SHAPE = ("n_layers", "dim", "n_heads", "hidden_dim")
BATCH = ("batch_size", "ramp_tokens", "lr")
PRESETS = {
    # A CPU, a minute: a BPE of its own, a batch that grows from 24 sequences to 72.
    "demo": dict(
        seq_len=128, dim=128, n_layers=2, n_heads=4, hidden_dim=512, band=32, tokenizer="bpe:1024",
        batch_size=72, first_batch=24, ramp_tokens=9e5, batch_multiple=24, tokens=1.2e6, lr=6e-3,
        warmup_tokens=1e5, decay_tokens=1.2e6, log_every=50,
    ),
    # A GPU of 24 GB or a node of them, minutes: the shape of 125m, over bytes.
    "small": dict(
        seq_len=1024, batch_size=144, first_batch=48, ramp_tokens=4e7, batch_multiple=48,
        tokens=1.5e8, warmup_tokens=1e7, decay_tokens=1.5e8, micro_batch=6, compile=True,
        val_every=500,
    ),
    # GPT-2, Table 2; heads of 64 as released.
    "gpt2": GPT2 | dict(zip(SHAPE, (12, 768, 12, 3072)), lr=6e-4),
    "gpt2_medium": GPT2 | dict(zip(SHAPE, (24, 1024, 16, 4096)), lr=3e-4),
    "gpt2_large": GPT2 | dict(zip(SHAPE, (36, 1280, 20, 5120)), lr=2.5e-4),
    "gpt2_xl": GPT2 | dict(zip(SHAPE, (48, 1600, 25, 6400)), lr=2e-4),
    # GPT-3, Table 2.1. It prints 24 heads of 128 for 1.3b and a width of 5,140 for 13b; the
    # parameters of Table D.1, 1,320M and 12,850M, say 16 heads and 5,120.
    "125m": GPT3 | dict(zip(SHAPE + BATCH, (12, 768, 12, 3072, 256, 4e9, 6e-4))),
    "350m": GPT3 | dict(zip(SHAPE + BATCH, (24, 1024, 16, 4096, 256, 4e9, 3e-4))),
    "760m": GPT3 | dict(zip(SHAPE + BATCH, (24, 1536, 16, 6144, 256, 4e9, 2.5e-4))),
    "1.3b": GPT3 | dict(zip(SHAPE + BATCH, (24, 2048, 16, 8192, 512, 6e9, 2e-4))),
    "2.7b": GPT3 | dict(zip(SHAPE + BATCH, (32, 2560, 32, 10240, 512, 6e9, 1.6e-4))),
    "6.7b": GPT3 | dict(zip(SHAPE + BATCH, (32, 4096, 32, 16384, 1024, 8e9, 1.2e-4))),
    "13b": GPT3 | dict(zip(SHAPE + BATCH, (40, 5120, 40, 20480, 1024, 8e9, 1e-4))),
    "175b": GPT3 | dict(zip(SHAPE + BATCH, (96, 12288, 96, 49152, 1536, 12e9, 0.6e-4))),
}  # fmt: skip
BEGIN, END = "", "<|endoftext|>"  # tokens around each document of a stream; BEGIN may be none
SPECIALS = (END,)
PATTERN = (  # how GPT-4 and Llama 3 split text into words, for files of ranks
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# ---------------------------------------- Model ----------------------------------------

class SumGradient(torch.autograd.Function):
    """Megatron's f, where a tensor enters the ranks of a group: its gradient sums over them."""

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
    """Megatron's g, where partial results leave the ranks of a group: they sum over them."""

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

@functools.cache
def flex_kernels():
    """(attention that skips masked blocks, maker of its masks), compiled; they train on GPUs."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention), torch.compile(create_block_mask)

@functools.lru_cache(4)
def banded_mask(length, band, device):
    """What the queries of a banded layer may see: of positions 0 ... i the last `band`, i included.
    [T, T], or a block mask on a GPU, where attention skips what it leaves out."""
    # Undisclosed: the width of the band, and that it is the same for all heads. 128 is what gpt-oss
    # has "following GPT-3"; i counts, as in the released sparse attention.
    def visible(b, h, i, j):
        return (j <= i) & (i - j < band)

    if device.type == "cuda":
        return flex_kernels()[1](visible, None, None, length, length, device=device)
    position = torch.arange(length, device=device)
    return visible(0, 0, position[:, None], position)

def attend(q, k, v, mask):
    """softmax(q kᵀ / sqrt(E)) v over what mask shows (None: the past and the present); query head
    j uses key-value head j // (H / K). [B, H, T, E], [B, K, T, E] twice -> [B, H, T, E]."""
    if mask is None or torch.is_tensor(mask):
        settings = dict(is_causal=mask is None, enable_gqa=True)
        return F.scaled_dot_product_attention(q, k, v, mask, **settings)
    from torch.nn.attention.flex_attention import flex_attention

    flex = flex_attention if torch.compiler.is_compiling() else flex_kernels()[0]
    return flex(q, k, v, block_mask=mask, enable_gqa=True)

class ParallelAttention(nn.Module):
    """Attention over what mask shows (None: the past and the present), [B, T, D] -> [B, T, D];
    under a tensor-parallel group tp each rank has some heads."""

    def __init__(self, dim, n_heads, tp=None):
        super().__init__()
        self.head_dim = dim // n_heads
        # rows are ordered by head, and q, k, v within: a rank's share is one piece
        self.qkv = ColumnParallelLinear(dim, 3 * dim, tp)
        self.out = RowParallelLinear(dim, dim, tp)

    def forward(self, x, mask):
        qkv = self.qkv(x).unflatten(-1, (-1, 3, self.head_dim))  # [B, T, H, 3, E]
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # [B, H, T, E] each
        return self.out(attend(q, k, v, mask).transpose(1, 2).flatten(2))  # [B, T, D]

class ParallelMLP(nn.Module):
    """GELU(x W_fc + b_fc) W_pr + b_pr, [B, T, D] -> [B, T, D], GELU in its tanh form as released;
    under tp a rank has a part of F."""

    def __init__(self, dim, hidden_dim, tp=None):
        super().__init__()
        self.up = ColumnParallelLinear(dim, hidden_dim, tp)
        self.down = RowParallelLinear(hidden_dim, dim, tp)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))

class Block(nn.Module):
    """GPT-2 §2.3, [B, T, D] -> [B, T, D]: each branch behind a norm of its input, and added."""

    def __init__(self, cfg, tp=None):
        super().__init__()
        self.dropout = cfg.dropout
        self.norm1 = nn.LayerNorm(cfg.dim, eps=1e-5)
        self.attn = ParallelAttention(cfg.dim, cfg.n_heads, tp)
        self.norm2 = nn.LayerNorm(cfg.dim, eps=1e-5)
        self.mlp = ParallelMLP(cfg.dim, cfg.hidden_dim, tp)

    def forward(self, x, mask):
        x = x + F.dropout(self.attn(self.norm1(x), mask), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)

class GPT3(nn.Module):
    """Tokens [B, T] -> logits [B, T, V]; or a pipeline's stage of it, which has some layers, and
    takes and gives [B, T, D] where it is not the first or the last."""

    def __init__(self, cfg, layers=None, first=True, last=True, tp=None):
        super().__init__()
        self.tp, self.cfg = tp, cfg
        self.dtype = dict(bf16=torch.bfloat16, fp16=torch.float16).get(cfg.precision, torch.float32)
        rows, layers = padded_rows(cfg, tp), range(cfg.n_layers) if layers is None else layers
        self.token_embedding = nn.Embedding(rows, cfg.dim) if first else None
        self.position_embedding = nn.Embedding(cfg.seq_len, cfg.dim) if first else None
        self.blocks = nn.ModuleDict({str(i): Block(cfg, tp) for i in layers})
        self.final_norm = nn.LayerNorm(cfg.dim, eps=1e-5) if last else None
        # the softmax shares the token embedding; a last stage without it has a copy
        self.head = nn.Linear(cfg.dim, rows, bias=False) if last and not first else None

    def embed(self, tokens):
        """[B, T] -> [B, T, D]; under tensor parallelism a rank looks up its rows of the table."""
        positions = self.position_embedding.weight[: tokens.shape[1]]  # [T, D]
        if not self.tp:
            return self.token_embedding(tokens) + positions
        rows = self.token_embedding.weight.shape[0]
        tokens = tokens - self.tp.rank() * rows
        mine = (tokens >= 0) & (tokens < rows)
        x = self.token_embedding(tokens.clamp(0, rows - 1)) * mine[..., None]
        return SumOutput.apply(x, self.tp) + positions

    def logits(self, x):
        """[B, T, D] -> [B, T, V]; rows that only pad the table to the ranks are never predicted."""
        x = self.final_norm(x)
        x = SumGradient.apply(x, self.tp) if self.tp else x
        x = F.linear(x, (self.head or self.token_embedding).weight).float()
        first = self.tp.rank() * x.shape[-1] if self.tp else 0
        if first + x.shape[-1] > self.cfg.vocab_size:
            x[..., max(self.cfg.vocab_size - first, 0) :] = -1e10
        return x

    def forward(self, x):
        cfg, masks = self.cfg, (None, None)
        low = self.dtype != torch.float32
        with torch.autocast(x.device.type, self.dtype) if low else contextlib.nullcontext():
            if self.token_embedding is not None:
                x = F.dropout(self.embed(x), cfg.dropout, self.training)
            if cfg.band:
                # Undisclosed: whether odd or even layers are banded. Odd: the first is dense.
                masks = None, banded_mask(x.shape[1], cfg.band, x.device)
            for i, block in self.blocks.items():
                mask = masks[int(i) % 2 == (cfg.banded == "odd")]
                if cfg.recompute == "block" and self.training:
                    checkpoint = torch.utils.checkpoint.checkpoint
                    x = checkpoint(block, x, mask, use_reentrant=False)
                else:
                    x = block(x, mask)
            return x if self.final_norm is None else self.logits(x)

def group_size(group):
    """Ranks of a process group; None is a group of one."""
    return group.size() if group else 1

def padded_rows(cfg, tp):
    """Rows of the embedding on a rank of tp: Megatron pads V to a multiple of 128 times them."""
    ranks = group_size(tp)
    return cfg.vocab_size if ranks == 1 else -(-cfg.vocab_size // (128 * ranks)) * 128

def init_weights(model, cfg, tp=None):
    """GPT-2 §2.3: N(0, 0.02), and what is added to the residual stream smaller by sqrt(2 L), the
    "number of residual layers"; biases 0, gains 1, positions N(0, 0.01) as released. A parameter is
    drawn from (seed, its name), so that every layout starts from the same numbers."""
    # Departure: the released code scales no residual weight, though the paper says so.
    for name, p in model.named_parameters():
        shape = whole_shape(name, p, tp)
        if re.search(r"(_embedding|head|qkv|out|up|down)\.weight$", name):
            key = "token_embedding.weight" if name == "head.weight" else name
            std = 0.01 if "position" in name else 0.02
            std /= math.sqrt(2 * cfg.n_layers) if re.search(r"(out|down)\.weight$", name) else 1
            rows = cfg.vocab_size if key == "token_embedding.weight" else shape[0]
            draw = torch.Generator().manual_seed(stable_hash(cfg.seed, key))
            drawn = torch.empty(rows, shape[1]).normal_(0.0, std, generator=draw)
            fill(name, p, F.pad(drawn, (0, 0, 0, shape[0] - rows)), tp)
        elif re.search(r"(qkv|out|up|down|norm[12]|final_norm)\.(weight|bias)$", name):
            fill(name, p, torch.full(shape, float(name.endswith("weight"))), tp)
        else:
            raise ValueError(f"no rule initialises {name}")

def count_parameters(model):
    """(total, activated) parameters; the tied softmax counts once, a dense model activates all."""
    total = sum(p.numel() for p in model.parameters())
    return total, total

def flops_per_token(cfg):
    """Training FLOPs per token: 2 per weight of a matrix product forward, twice that backward.
    Attention counts what a query sees: as causal, (T + 1) / 2 keys, half of what the full square
    gives, and in banded layers those of the band."""
    T, band = cfg.seq_len, min(cfg.band or cfg.seq_len, cfg.seq_len)
    n_banded = (cfg.n_layers + (cfg.banded == "even")) // 2
    keys = (cfg.n_layers - n_banded) * (T + 1) / 2
    keys += n_banded * band * (T - (band - 1) / 2) / T
    weights = cfg.n_layers * (4 * cfg.dim**2 + 2 * cfg.dim * cfg.hidden_dim)
    return 6 * (weights + 2 * cfg.dim * keys + cfg.vocab_size * cfg.dim)

# ---------------------------------------- Data ----------------------------------------

def train_bpe(texts, entries):
    """GPT-2 §2.2, byte-level BPE: {bytes: rank} of the 256 bytes and, up to `entries`, of the pairs
    of entries that were merged, each time the most frequent one within words."""
    # Departure: PATTERN splits words, as for every file of ranks here, and not GPT-2's, which knows
    # contractions in lower case only. re has no \p{L} and \p{N}: [^\W\d_] and \d come close.
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|(?:[^\r\n\w]|_)?[^\W\d_]+|\d{1,3}"
        r"| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    counts = collections.Counter()
    for text in texts:
        counts.update(re.findall(pattern, text))
    words = [(list(word.encode()), n) for word, n in counts.items()]
    frequency, where = collections.Counter(), collections.defaultdict(set)
    for i, (word, n) in enumerate(words):
        for pair in itertools.pairwise(word):
            frequency[pair] += n
            where[pair].add(i)
    heap, ranks = [(-n, pair) for pair, n in frequency.items()], {bytes([i]): i for i in range(256)}
    tokens = list(ranks)
    heapq.heapify(heap)
    while heap and len(ranks) < entries:
        n, pair = heapq.heappop(heap)
        if -n != frequency[pair]:  # merges of others have taken some: back with what is left
            if frequency[pair]:
                heapq.heappush(heap, (-frequency[pair], pair))
            continue
        token = tokens[pair[0]] + tokens[pair[1]]
        if (new := ranks.setdefault(token, len(ranks))) == len(tokens):
            tokens.append(token)
        fresh = set()
        for i in where.pop(pair):
            word, n = words[i]
            for old in itertools.pairwise(word):
                frequency[old] -= n
            for j in range(len(word) - 1):
                if tuple(word[j : j + 2]) == pair:
                    word[j : j + 2] = [new]
            for now in itertools.pairwise(word):
                frequency[now] += n
                where[now].add(i)
                if new in now:
                    fresh.add(now)
        for now in fresh:
            heapq.heappush(heap, (-frequency[now], now))
    if len(ranks) < entries:
        raise ValueError(f"the text has no more than {len(ranks)} entries of a BPE, not {entries}")
    return ranks

def learn_ranks(cfg, entries, most, folder):
    """train_bpe on documents that are not held out, in the order of their hashes and up to `most`
    characters; written to folder/ranks.tiktoken if there is a folder."""
    paths = [path for path in parse_mix(cfg.data) if not shard_paths(path)]
    documents = (document for path in paths for document in read_documents(path))
    hashed = sorted((stable_hash(name), text) for name, text in documents)
    texts = [text for key, text in hashed if key < 0.95 * 2**64] or [text for _, text in hashed]
    sizes = itertools.accumulate(map(len, texts), initial=0)
    ranks = train_bpe((text for text, before in zip(texts, sizes) if before < most), entries)
    if folder and int(os.environ.get("RANK", 0)) == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
        partial = Path(folder) / "ranks.tmp"
        partial.write_text("".join(lines))
        partial.rename(Path(folder) / "ranks.tiktoken")
    return ranks

def make_tokenizer(cfg):
    """The tokenizer of cfg. bpe:N is learned from 4 MB of text, once: a run that goes on has it."""
    if not cfg.tokenizer.startswith("bpe:"):
        return load_tokenizer(cfg.tokenizer or "bytes", SPECIALS)
    entries, folder = int(cfg.tokenizer.removeprefix("bpe:")), cfg.out or cfg.write_tokens
    known = f"{folder}/ranks.tiktoken"
    if not folder or not os.path.exists(known):
        settings = dict(mergeable_ranks=learn_ranks(cfg, entries, 2**22, folder))
        settings["special_tokens"] = {END: entries}
        return tiktoken.Encoding(cfg.tokenizer, pat_str=PATTERN, **settings)
    if (tokenizer := load_tokenizer(known, SPECIALS)).n_vocab != entries + 1:
        raise ValueError(f"{known} has {tokenizer.n_vocab - 1} entries, and not {entries}")
    return tokenizer

class Mixture:
    """Corpora drawn by weight, a sequence at a time. Of each block of 1,000 sequences every
    corpus has its exact share, in an order that the seed shuffles, so that its own position is
    arithmetic. starts are the windows of each corpus that are spent already, and first the
    sequences that earlier phases drew from this mixture."""

    def __init__(self, mix, corpora, starts, first):
        self.names, self.corpora, self.starts, self.first = list(mix), corpora, starts, first
        self.block = 1000 if len(mix) > 1 else 1
        sums = itertools.accumulate(mix.values(), initial=0.0)
        self.bounds = [round(self.block * part) for part in sums]
        self.shares = [b - a for a, b in itertools.pairwise(self.bounds)]
        self.separator, self.token_bytes = corpora[0].separator, corpora[0].token_bytes

    def draw(self, index, seed):
        """(corpus, window of it) of sequence `index` of the phase."""
        block, place = divmod(self.first + index, self.block)
        place = shuffled(place, self.block, (seed, "mixture", block))
        corpus = bisect.bisect_right(self.bounds, place) - 1
        position = block * self.shares[corpus] + place - self.bounds[corpus]
        return corpus, self.starts[corpus] + position

    def spent(self, n):
        """The windows of each corpus that are spent after n sequences of the phase."""
        blocks = -(-(self.first + n) // self.block)
        return [start + blocks * share for start, share in zip(self.starts, self.shares)]

    def window(self, index, length, seed):
        """Window `index` of the phase, length + 1 ids."""
        corpus, position = self.draw(index, seed)
        return self.corpora[corpus].window(position, length, seed)

def parse_mix(text):
    """{path: weight} of WEIGHT:PATH,...; a path alone has weight 1."""
    mix = {}
    for part in text.split(","):
        weight, path = re.fullmatch(r"(?:([^:/\\]*):)?(.*)", part, re.S).groups()
        try:
            number = float(weight or 1)
        except ValueError:
            raise ValueError(f"{part} is not WEIGHT:PATH") from None
        if not 0 < number < math.inf:
            raise ValueError(f"the weight of {path or 'the library'} is {weight}, not positive")
        mix[path] = mix.get(path, 0.0) + number
    mix = {path: weight / sum(mix.values()) for path, weight in mix.items()}
    if min(mix.values()) < 2e-3:  # two sequences of a block of Mixture
        raise ValueError(f"the weight of {min(mix, key=mix.get)} is too small")
    return mix

def mix_held_out(mix, heldout, batch, length, most):
    """Parts of the held-out corpora of a mix, batch by batch of sequences of `length`, in which
    every corpus has its share; `most` batches at most."""
    sizes = {path: (math.ceil(batch * mix[path]) + 1) * length for path in mix}
    rounds = min(sum(map(len, heldout[path].parts)) // size for path, size in sizes.items())
    parts = []
    for i in range(min(rounds, most)):
        for path, size in sizes.items():
            start = i * size
            for part in heldout[path].parts:
                parts.append(part[max(start, 0) : max(start + size, 0)])
                start -= len(part)
    return parts

def load_mixture(cfg, tokenizer):
    """(Mixture to train on, held-out Corpus of the same mix). A corpus whose epoch is over begins
    another, in another order; till then no sequence of it comes twice (appendix B)."""
    # Table 2.2: of Common Crawl (410B tokens), WebText2 (19B), Books1 (12B), Books2 (55B) and
    # Wikipedia (3B) it prints weights of 60, 22, 8, 8 and 3 %, and 0.44, 2.9, 1.9, 0.43 and 3.4
    # epochs in 300B tokens. The weights, which add up to 101 %, give 0.43, 3.4, 2.0, 0.43 and 3.0.
    # Departure: the corpora are to be had clean: quality filter, fuzzy deduplication (appendix A)
    # and removal of what benchmarks contain (appendix C) are not here.
    mix, corpora = parse_mix(cfg.data), {}
    for path, weight in mix.items():
        documents = [] if shard_paths(path) else tokenize(read_documents(path), tokenizer)
        sizes = cfg.vocab_size, math.ceil(cfg.batch_size * weight), cfg.seq_len
        corpora[path] = load_corpora(path, documents, tokenizer, *sizes)
    cfg.vocab_size = max(corpus.vocab_size for corpus, _ in corpora.values())
    mixture = Mixture(mix, [corpora[path][0] for path in mix], [0] * len(mix), 0)
    heldout = {path: held for path, (_, held) in corpora.items()}
    parts = mix_held_out(mix, heldout, cfg.batch_size, cfg.seq_len, cfg.val_batches)
    return mixture, Corpus(parts, tokenizer, cfg.vocab_size, in_order=True)

def get_batch(corpus, first, n, cfg):
    """Sequences first ... first + n - 1 of the run, whatever the ranks or the moment: tokens and
    targets [n, T], and the counts n_targets and n_bytes (of the targets' text)."""
    # Appendix B: documents in one stream, END after each, cut into windows; nothing is masked, all
    # targets count, and attention crosses documents. Undisclosed: how windows lie in the stream.
    windows = np.stack([corpus.window(first + i, cfg.seq_len, cfg.seed) for i in range(n)])
    tokens, targets = torch.from_numpy(windows[:, :-1].copy()), windows[:, 1:]
    counts = {"n_targets": targets.size, "n_bytes": int(corpus.token_bytes[targets].sum())}
    return {"tokens": tokens, "targets": torch.from_numpy(targets.copy()), **counts}

# ---------------------------------------- Objective ----------------------------------------

def token_loss(logits, targets, tp=None):
    """(sum of the nats of targets [N], how many of them had the largest logit, where autograd is
    off) of logits [N, V]. Under tp each rank has its columns, and no rank ever has them all."""
    counted, first = targets >= 0, tp.rank() * logits.shape[1] if tp else 0
    if not tp and torch.is_grad_enabled():
        return F.cross_entropy(logits, targets, reduction="sum"), 0
    top = logits.detach().amax(1)  # [N]
    mine = (targets >= first) & (targets < first + logits.shape[1])
    local = (targets - first).clamp(0, logits.shape[1] - 1)[:, None]
    target = logits.gather(1, local)[:, 0] * mine
    if tp:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=tp)
    total = (logits - top[:, None]).exp().sum(1)
    if tp:
        target, total = SumOutput.apply(target, tp), SumOutput.apply(total, tp)
    nats = (total.log() + top - target) * counted
    return nats.sum(), ((target >= top) & counted).sum()

def objective(model, batch, cfg):
    """Next-token cross-entropy, and no metrics: the sum of the batch's nats, divided by
    batch["n_targets"], the count of the whole global batch."""
    logits = model(batch["tokens"])
    nats, _ = token_loss(logits.flatten(0, 1), batch["targets"].flatten(), model.tp)
    return nats / max(batch["n_targets"], 1), {}

# ---------------------------------------- Optimizer ----------------------------------------

def build_optimizer(model, cfg):
    """Appendix B: Adam with a decay that is decoupled, as it cites Loshchilov and Hutter."""
    # Undisclosed: what decays. Matrices and embeddings, neither gains nor biases.
    groups = [
        dict(params=[p for p in model.parameters() if p.ndim > 1], weight_decay=cfg.weight_decay),
        dict(params=[p for p in model.parameters() if p.ndim <= 1], weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)

def learning_rate(tokens, cfg):
    """Appendix B: linear warm-up, a cosine to a tenth, and on at that; tokens are those seen."""
    # Undisclosed: whether the 260 billion tokens of the cosine include the warm-up. They do.
    if tokens < cfg.warmup_tokens:
        return cfg.lr * tokens / cfg.warmup_tokens
    span = max(cfg.decay_tokens - cfg.warmup_tokens, 1)
    done = min((tokens - cfg.warmup_tokens) / span, 1)
    return cfg.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

def batch_at(tokens, cfg):
    """Appendix B: sequences of the update after `tokens`, a number that grows linearly with them
    over the ramp, rounded down to a multiple."""
    if not cfg.first_batch or tokens >= cfg.ramp_tokens:
        return cfg.batch_size
    grown = (cfg.batch_size - cfg.first_batch) * tokens / cfg.ramp_tokens
    return int(cfg.first_batch + grown) // cfg.batch_multiple * cfg.batch_multiple

def count_steps(cfg):
    """(updates of the ramp, of the run)."""
    tokens, ramp = 0, 0
    while tokens < min(cfg.tokens, cfg.ramp_tokens) and batch_at(tokens, cfg) < cfg.batch_size:
        tokens, ramp = tokens + batch_at(tokens, cfg) * cfg.seq_len, ramp + 1
    left = math.ceil((cfg.tokens - tokens) / (cfg.batch_size * cfg.seq_len))
    return ramp, ramp + max(left, 0)

def gradient_norm(model, loss, mesh, device):
    """(norm of the whole gradient, loss summed over ranks). What several ranks hold counts once."""
    whole, copied = [], []  # by tensor parallelism: a part on each rank, the same on all
    for name, p in model.named_parameters():
        if name != "head.weight":  # the last stage's copy of the embedding
            local = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            (copied if tensor_dimension(name) is None else whole).append(local)
    square, more = (nn.utils.get_total_norm(part).double() ** 2 for part in (whole, copied))
    square, loss = sum_over_ranks(square + more / mesh["tp"].size(), loss, device=device)
    return math.sqrt(square) if square >= 0 else math.nan, loss

def noise_scale(small, big, n_small, n_big):
    """§2.3, noise scale, appendix A.1: (|G|², tr Σ), unbiased, from the norms of the gradients of
    n_small and of n_big sequences; the simple noise scale is tr Σ / |G|², averages of both."""
    square = (n_big * big**2 - n_small * small**2) / (n_big - n_small)
    return square, (small**2 - big**2) / (1 / n_small - 1 / n_big)

# ---------------------------------------- Precision ----------------------------------------

# Parameters, gradients between ranks and Adam's moments are fp32. Under bf16 and fp16, autocast (in
# GPT3.forward) runs matrix products and attention in that; norms, residual sums, softmax and loss
# stay fp32.
# Undisclosed: the paper's precision, but for a credit of "fully half-precision training". fp16 is
# as that generation trained (Sparse Transformers §5.6): fp16 activations, and a loss scale that
# starts at 2^16, halves when a gradient overflows, whose step is tried again, and doubles after
# 1,000 steps without (blocksparse's example). bf16 needs none, and is the default on a GPU.
# Departure: gradients meet in fp32, where they met in fp16.

PEAK_FLOPS = {  # dense bf16, by the device's exact name; a device not listed gets no MFU
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA B200": 2250e12,
}  # fmt: skip

# ---------------------------------------- Parallelism ----------------------------------------

def lay_out(cfg, ranks):
    """cfg with dp as the ranks that are left, where it is 0, and micro-batches for a pipeline."""
    others = cfg.tp * cfg.pp
    if min(cfg.tp, cfg.pp) < 1 or ranks % others or (cfg.dp and cfg.dp * others != ranks):
        raise ValueError(
            f"tp {cfg.tp} x pp {cfg.pp} x dp {cfg.dp or 'any'} are not {ranks} ranks"
        )
    cfg = dataclasses.replace(cfg, dp=ranks // others)
    if cfg.pp > 1 and not cfg.micro_batch:  # two for each rank of the pipeline, at the least
        share = math.gcd(cfg.first_batch or cfg.batch_size, cfg.batch_size) // cfg.dp
        fits = (n for n in range(share // (2 * cfg.pp), 0, -1) if share % n == 0)
        cfg.micro_batch = next(fits, 1)
    return cfg

def stage_blocks(cfg, stage):
    """The layers of a pipeline stage: an equal number, one less beside the embedding and beside the
    softmax."""
    edges = [round((cfg.n_layers + 2) * i / cfg.pp) for i in (stage, stage + 1)]
    return range(max(edges[0] - 1, 0), min(edges[1] - 1, cfg.n_layers))

def tensor_dimension(name):
    """The dimension along which tensor parallelism cuts a parameter; None: each rank has it all."""
    if re.search(r"(token_embedding|head|q|k|v|gate|up)\.(weight|bias)$", name):
        return 0
    return 1 if re.search(r"(out|down)\.weight$", name) else None

def whole_shape(name, p, tp):
    """The shape that a parameter has without tensor parallelism."""
    dim = tensor_dimension(name)
    return [size * group_size(tp) if i == dim else size for i, size in enumerate(p.shape)]

def fill(name, p, whole, tp):
    """Writes this rank's part of the whole tensor to the parameter."""
    if tp and tensor_dimension(name) is not None:
        whole = whole.chunk(tp.size(), tensor_dimension(name))[tp.rank()]
    if isinstance(p, DTensor):
        whole = whole.contiguous().to(p.device, p.dtype)
        whole = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
    p.data.copy_(whole)

def whole_tensor(name, tensor, tp):
    """The whole of a parameter, or its gradient, of which each rank has a part; all ranks call."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    if tp and tensor_dimension(name) is not None:
        parts = [torch.empty_like(tensor) for _ in range(tp.size())]
        dist.all_gather(parts, tensor.contiguous(), group=tp)
        tensor = torch.cat(parts, tensor_dimension(name))
    return tensor

def parallelize(model, cfg, mesh):
    """Data parallelism of a model on the meta device, or a stage of it, which gets its memory here:
    parameters, gradients and optimizer are cut over the data-parallel ranks. Parameters are
    gathered once an update, in fp32, so that the layout changes no number."""
    # Undisclosed: how data parallelism went. Cutting the optimizer's state is later than the paper.
    settings = dict(mesh=mesh["dp"], reshard_after_forward=False)
    settings["mp_policy"] = MixedPrecisionPolicy(cast_forward_inputs=False)
    model.to_empty(device=mesh.device_type)
    for block in model.blocks.values():
        if cfg.compile:
            block.compile()
        if cfg.dp > 1:
            fully_shard(block, **settings)
    return fully_shard(model, **settings) if cfg.dp > 1 else model

class ModelParallel:
    """§2.1, "model parallelism within each matrix multiply and across the layers": the part of the
    model that one rank has, run over micro-batches, one after the other or by a pipeline's 1F1B."""

    # Undisclosed: the pipeline's schedule, and all degrees.

    def __init__(self, cfg, device):
        """Builds this rank's part, without values yet; ranks are tp + TP (pp + PP dp)."""
        names, sizes = ("dp", "pp", "tp"), (cfg.dp, cfg.pp, cfg.tp)
        self.mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
        self.cfg, self.device, self.n_targets, self.n_micro = cfg, device, 0.0, 0
        self.tp = self.mesh["tp"].get_group() if cfg.tp > 1 else None
        self.data_rank, self.stage = (self.mesh[n].get_local_rank() for n in ("dp", "pp"))
        self.ends = self.stage == 0, self.stage == cfg.pp - 1
        with torch.device("meta"):
            model = GPT3(cfg, stage_blocks(cfg, self.stage), *self.ends, self.tp)
        self.model = parallelize(model, cfg, self.mesh)
        self.saved = nn.Module()  # what a checkpoint holds: names are unique among tp's ranks
        self.saved.add_module(f"tp{self.mesh['tp'].get_local_rank()}", self.model)

    def loss(self, logits, targets):
        """The objective of a micro-batch as the schedule asks for it, on the last stage."""
        nats, _ = token_loss(logits.flatten(0, 1), targets.flatten(), self.tp)
        return nats / self.n_targets * self.scale

    def run(self, batches, scale=1.0):
        """(this rank's part of the mean loss over the global batch, norm after the first
        micro-batch with --noise_scale); where autograd is on, the gradient of scale times all of it
        is added to the parameters."""
        # sharding averages gradients over its ranks, and they are to be summed
        cfg, losses, norm, self.scale = self.cfg, [], 0.0, scale * self.cfg.dp
        self.n_targets, learns = batches[0]["n_targets"], torch.is_grad_enabled()
        if cfg.pp > 1:
            self.run_pipeline(batches, losses)
        for i, batch in enumerate(batches if cfg.pp == 1 else (), 1):
            loss, _ = objective(self.model, batch, cfg)
            losses.append(loss * self.scale)
            first = learns and cfg.noise_scale and i == 1 < len(batches)
            if learns:
                meets = i == len(batches) or first
                if cfg.dp > 1:  # ranks meet once, in the last micro-batch
                    self.model.set_requires_gradient_sync(meets)
                    self.model.set_reshard_after_backward(meets)
                    self.model.set_is_last_backward(meets)
                losses[-1].backward()
            if first:
                norm, _ = gradient_norm(self.model, 0.0, self.mesh, self.device)
        for module in self.model.modules() if not learns else ():  # as the backward pass would
            module.reshard() if isinstance(module, FSDPModule) else None
        return sum(loss.detach() for loss in losses) / self.scale / cfg.tp if losses else 0.0, norm

    def run_pipeline(self, batches, losses):
        """run by the stages of a pipeline, whose schedule fits one number of micro-batches."""
        n, group = len(batches), self.mesh["pp"].get_group()
        if n != self.n_micro:
            stage = PipelineStage(self.model, self.stage, self.cfg.pp, self.device, group=group)
            self.schedule = Schedule1F1B(stage, n, self.loss, scale_grads=False)
            self.n_micro = n
        step = self.schedule.step if torch.is_grad_enabled() else self.schedule.eval
        tokens, targets = (torch.cat([b[name] for b in batches]) for name in ("tokens", "targets"))
        last = dict(target=targets, losses=losses) if self.ends[1] else {}
        step(*[tokens] * self.ends[0], **last, return_outputs=False)
        if torch.is_grad_enabled() and any(self.ends):  # both have a copy of the embedding
            table = self.model.token_embedding if self.ends[0] else self.model.head
            gradient = table.weight.grad
            gradient = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            other = torch.empty_like(gradient)
            peer = dist.get_global_rank(group, self.cfg.pp - 1 - self.stage)
            operations = [dist.P2POp(dist.isend, gradient, peer, group)]
            operations.append(dist.P2POp(dist.irecv, other, peer, group))
            for request in dist.batch_isend_irecv(operations):
                request.wait()
            gradient += other

    @torch.no_grad()
    def evaluate(self, batches):
        """This rank's part of the mean loss over a global batch, without dropout."""
        self.model.eval()
        loss, _ = self.run(batches)
        self.model.train()
        return loss

def memory_per_rank(cfg):
    """Bytes on the rank of cfg.world_size that needs most, by kind, as an eager backward pass
    begins at the full batch."""
    steps, micro = split_batch(cfg, max(cfg.dp, 1))
    # Kept per position and block: inputs of both norms (fp32), inputs of the first products of both
    # branches, and, cut by tensor parallelism, q, k, v, the attended values, GELU's in- and output.
    size, found = 4 if cfg.precision == "fp32" else 2, []
    block = 8 * cfg.dim + size * (2 * cfg.dim + (4 * cfg.dim + 2 * cfg.hidden_dim) / cfg.tp)
    block += 2 * cfg.dim * (cfg.dropout > 0)  # a byte an entry of a GPU's two dropout masks
    head = 4 * cfg.dim + size * cfg.dim + 4 * cfg.vocab_size / cfg.tp  # norm, product, softmax
    for i in range(cfg.pp):
        with torch.device("meta"):
            stage = GPT3(cfg, stage_blocks(cfg, i), i == 0, i == cfg.pp - 1)
        local = whole = 0
        for name, p in stage.named_parameters():
            part = p.numel() / (cfg.tp if tensor_dimension(name) is not None else 1)
            whole += part
            local += part / max(cfg.dp, 1)
        flight, blocks = min(cfg.pp - i, steps), len(stage.blocks)
        kept = flight * blocks * block
        if cfg.recompute == "block":  # every block's input, and one block at a time in full
            kept = flight * blocks * 4 * cfg.dim + block * (blocks > 0)
        kept += head if i == cfg.pp - 1 else 0
        memory = dict(parameters=4 * local, gradients=4 * local, optimizer=8 * local)
        memory["gathered"] = 8 * whole * (cfg.dp > 1)  # parameters, and gradients before they meet
        memory["activations"] = micro * cfg.seq_len * kept
        found.append({kind: int(bytes) for kind, bytes in memory.items()})
    return max(found, key=lambda memory: sum(memory.values()))

# ---------------------------------------- Checkpoint ----------------------------------------

HF_CONFIG = {  # ours: Hugging Face's
    "vocab_size": "vocab_size", "seq_len": "n_positions", "dim": "n_embd", "n_layers": "n_layer",
    "n_heads": "n_head", "hidden_dim": "n_inner",
}  # fmt: skip
HF_NAMES = {
    "token_embedding": "wte", "position_embedding": "wpe", "blocks": "h", "attn.qkv": "attn.c_attn",
    "attn.out": "attn.c_proj", "norm1": "ln_1", "norm2": "ln_2", "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj", "final_norm": "ln_f", "head": "wte",
}  # fmt: skip

def gpt2_name(name):
    """Hugging Face's name of our parameter, as the released checkpoints have it, without prefix."""
    for ours, theirs in HF_NAMES.items():
        name = name.replace(ours, theirs)
    return name

def to_conv1d(name, tensor, n_heads):
    """A whole parameter as GPT2LMHeadModel has it: matrices [in, out], all q before all k and v."""
    if "qkv" in name:
        tensor = tensor.unflatten(0, (n_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    return tensor.T if re.search(r"(qkv|out|up|down)\.weight$", name) else tensor

def from_conv1d(name, tensor, n_heads):
    """The inverse of to_conv1d."""
    tensor = tensor.T if re.search(r"(qkv|out|up|down)\.weight$", name) else tensor
    if "qkv" in name:
        tensor = tensor.unflatten(0, (3, n_heads, -1)).transpose(0, 1).flatten(0, 2)
    return tensor

def read_gpt2_config(path):
    """Config of the GPT2LMHeadModel in a directory."""
    if not importlib.util.find_spec("safetensors"):
        raise ValueError("--init needs the package safetensors: pip install safetensors")
    try:
        theirs = json.loads((Path(path) / "config.json").read_text())
        theirs["n_inner"] = theirs.get("n_inner") or 4 * theirs["n_embd"]
        cfg = Config(**{ours: theirs[name] for ours, name in HF_CONFIG.items()})
        cfg.band, cfg.banded = theirs.get("band", 0), theirs.get("banded", "odd")
        known = dict(  # what this script does, where it is said at all
            model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5,
            scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
            add_cross_attention=False, tie_word_embeddings=True,
        )  # fmt: skip
        for name, value in known.items():
            if theirs.get(name, None if name == "model_type" else value) != value:
                raise ValueError(f"its {name} is {theirs.get(name)}")
    except Exception as error:
        raise ValueError(f"{path} holds no GPT-2 model: {error!r}") from error
    return cfg

def read_gpt2_weights(model, cfg, path, tp=None):
    """Fills the parameters that this rank has from the safetensors of a directory."""
    from safetensors import SafetensorError, safe_open

    wanted = {gpt2_name(name): (name, p) for name, p in model.named_parameters()}
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                keys = {key.removeprefix("transformer."): key for key in tensors.keys()}
                for key in wanted.keys() & keys.keys():
                    (name, p), tensor = wanted.pop(key), tensors.get_tensor(keys[key])
                    whole = from_conv1d(name, tensor, cfg.n_heads)
                    rows = whole_shape(name, p, tp)[0]
                    if "token_embedding" in name or "head" in name:
                        whole = F.pad(whole, (0, 0, 0, rows - cfg.vocab_size))
                    if list(whole.shape) != whole_shape(name, p, tp):
                        raise ValueError(f"{keys[key]} in {file} is {list(tensor.shape)}")
                    fill(name, p, whole, tp)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    if wanted:
        raise ValueError(f"{path} holds no {next(iter(wanted))}")

def from_hf(path):
    """(model, cfg) from the directory of a GPT2LMHeadModel: config.json, *.safetensors."""
    cfg = read_gpt2_config(path)
    model = GPT3(cfg)
    read_gpt2_weights(model, cfg, path)
    return model, cfg

def to_hf(model, cfg, path, mesh=None):
    """Writes a model, or on every rank its part of one, to a directory as a GPT2LMHeadModel: a file
    for each layer, from the stage that has it."""
    # Departure: that class has no banded layers. It reads them as dense ones, and this script, by
    # two entries of config.json that are its own, as what they are.
    from safetensors.torch import save_file

    config = {theirs: getattr(cfg, ours) for ours, theirs in HF_CONFIG.items()}
    config |= dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", torch_dtype="float32")
    config |= dict(activation_function="gelu_new", layer_norm_epsilon=1e-5)
    config |= dict.fromkeys(("resid_pdrop", "embd_pdrop"), cfg.dropout) | dict(attn_pdrop=0.0)
    config |= dict(band=cfg.band, banded=cfg.banded) if cfg.band else {}
    end = cfg.vocab_size - 1 if cfg.vocab_size == 50257 else None
    config |= dict(bos_token_id=end, eos_token_id=end)
    tp = mesh["tp"].get_group() if mesh and mesh["tp"].size() > 1 else None
    writes = not mesh or all(mesh[name].get_local_rank() == 0 for name in ("dp", "tp"))

    def file_of(name):  # one for each layer, and for what is in none
        layer = re.match(r"blocks\.(\d+)\.", name)
        return f"model-{layer[1].zfill(5) if layer else name.split('.')[0]}.safetensors"

    with torch.device("meta"):
        names = [name for name, _ in GPT3(cfg).named_parameters()]
    files = {f"transformer.{gpt2_name(name)}": file_of(name) for name in names}
    if not mesh or dist.get_rank() == 0:
        Path(path).mkdir(parents=True, exist_ok=True)
        for old in Path(path).glob("*.safetensors*"):
            old.unlink()
        (Path(path) / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        index = json.dumps({"metadata": {}, "weight_map": files}, indent=2)
        (Path(path) / "model.safetensors.index.json").write_text(index + "\n")
    if mesh:
        dist.barrier()
    own = [(name, p) for name, p in model.named_parameters() if name != "head.weight"]
    for file, group in itertools.groupby(own, lambda parameter: file_of(parameter[0])):
        tensors = {}
        for name, p in group:
            whole = whole_tensor(name, p.data, tp).cpu()
            whole = whole[: cfg.vocab_size] if "token_embedding" in name else whole
            key = f"transformer.{gpt2_name(name)}"
            tensors[key] = to_conv1d(name, whole, cfg.n_heads).contiguous()
        if writes:
            save_file(tensors, Path(path) / file, metadata={"format": "pt"})
    if mesh:
        dist.barrier()

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

def whole_model(parallel, cfg):
    """The whole model on rank 0 and None on the others, however it is laid out; all ranks call."""
    if dist.get_world_size() == 1:
        return parallel.model
    pp, tensors = parallel.mesh["pp"], {}
    for name, p in parallel.model.named_parameters():
        whole = whole_tensor(name, p.data, parallel.tp).cpu()
        tensors[name] = whole[: cfg.vocab_size] if "token_embedding" in name else whole
    tensors.pop("head.weight", None)
    stages = [None] * pp.size() if pp.get_local_rank() == 0 else None
    dist.gather_object(tensors, stages, dist.get_global_rank(pp.get_group(), 0), pp.get_group())
    if dist.get_rank() > 0:
        return None
    model = GPT3(cfg)
    model.load_state_dict({name: whole for stage in stages for name, whole in stage.items()})
    return model.to(parallel.device)

@torch.compiler.set_stance("force_eager")  # a compiled block would compile for every length
@torch.no_grad()
def sample(model, ids, n, known, cfg):
    """ids and n more, drawn at temperature 0.8 from the softmax over what known [V] allows."""
    device = model.token_embedding.weight.device
    torch.manual_seed(cfg.seed)
    for _ in range(n):
        tokens = torch.tensor([ids[-cfg.seq_len :]], device=device)  # [1, T]
        logits = model(tokens)[0, -1].masked_fill(~known.to(device), -math.inf)  # [V]
        ids = ids + torch.multinomial((logits / 0.8).softmax(-1), 1).tolist()
    return ids

@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def loss_by_position(model, heldout, n, cfg):
    """Mean nats of the targets at each position of the context, over n held-out sequences: [T]."""
    device, total = model.token_embedding.weight.device, 0.0
    for i in range(n):
        batch = get_batch(heldout, i, 1, cfg)
        logits = model(batch["tokens"].to(device))[0]  # [T, V]
        targets = batch["targets"][0].to(device)
        total = total + F.cross_entropy(logits, targets, reduction="none")
    return (total / n).tolist()

@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def shots(model, tokenizer, n_shots, n, cfg):
    """A mapping made up on the spot, eight words to eight others, of which n_shots are shown, the
    one that is asked for among them: (nats of an answer, share of answers all of whose tokens are
    ranked first) over n such prompts; NaN where one does not fit."""
    # Departure: the paper's tasks need benchmarks and a large model. This is its smallest case: a
    # rule that only the context can tell.
    nats = right = 0.0
    for i in range(n):
        def word(*key):
            letters = stable_hash(cfg.seed, "shots", i, *key)
            return "".join(chr(97 + letters // 26**k % 26) for k in range(4))

        asked = stable_hash(cfg.seed, i) % max(n_shots, 1)
        shown = "".join(f"{word('x', k)} = {word('y', k)}\n" for k in range(n_shots))
        prompt = tokenizer.encode_ordinary(f"{shown}{word('x', asked)} =")
        answer = tokenizer.encode_ordinary(f" {word('y', asked)}")
        if len(prompt + answer) > cfg.seq_len:
            return math.nan, math.nan
        ids = torch.tensor(prompt + answer, device=model.token_embedding.weight.device)
        logits = model(ids[None, :-1])[0, len(prompt) - 1 :]  # [T, V] of the answer
        nats += F.cross_entropy(logits, ids[len(prompt) :], reduction="sum").item() / n
        right += torch.equal(logits.argmax(-1), ids[len(prompt) :]) / n
    return nats, right

def check(cfg, ranks):
    """Raises ValueError for a configuration that cannot run on that many ranks."""
    for field in dataclasses.fields(cfg):
        may_be_0 = field.type is float or field.name in ("band", "first_batch")
        low = 0 if field.default == 0 or may_be_0 else 1
        if field.type in (int, float) and not low <= getattr(cfg, field.name) < math.inf:
            raise ValueError(f"--{field.name} {getattr(cfg, field.name)} is not {low} or more")
    learned = re.fullmatch(r"bpe:(\d+)", cfg.tokenizer)
    entries = cfg.train_tokenizer or (int(learned[1]) if learned else 0)
    for wrong, message in (
        (cfg.dim % cfg.n_heads, f"{cfg.n_heads} heads do not divide the width {cfg.dim}"),
        (cfg.n_heads % cfg.tp, f"--tp {cfg.tp} does not divide {cfg.n_heads} heads"),
        (cfg.hidden_dim % cfg.tp, f"--tp {cfg.tp} does not divide --hidden_dim {cfg.hidden_dim}"),
        (cfg.n_layers + 2 < cfg.pp,
         f"{cfg.n_layers} layers, embedding and softmax are fewer than --pp {cfg.pp}"),
        (cfg.dropout >= 1, f"--dropout {cfg.dropout} leaves nothing"),
        (cfg.tokenizer.startswith("bpe:") and not learned, f"{cfg.tokenizer} is not bpe:N"),
        ((learned or cfg.train_tokenizer) and entries <= 256,
         f"a BPE of {entries} entries has no more than the 256 bytes"),
        ((learned or cfg.train_tokenizer) and all(map(shard_paths, parse_mix(cfg.data))),
         "a BPE is learned from text, and --data is token shards"),
        (cfg.train_tokenizer and not cfg.out, "--train_tokenizer needs --out"),
        (cfg.train_tokenizer and os.path.exists(f"{cfg.out}/ranks.tiktoken"),
         f"--train_tokenizer: {cfg.out} has ranks.tiktoken already"),
        (cfg.noise_scale and cfg.pp > 1, "--noise_scale does not work with --pp"),
        (cfg.noise_scale and not cfg.batch_size > cfg.dp * cfg.micro_batch > 0,
         "--noise_scale needs --micro_batch, and two of them in the batch"),
        (cfg.first_batch > cfg.batch_size,
         f"--first_batch {cfg.first_batch} is more than --batch_size {cfg.batch_size}"),
        (cfg.first_batch % cfg.batch_multiple or cfg.batch_size % cfg.batch_multiple,
         f"--first_batch and --batch_size are not multiples of {cfg.batch_multiple}"),
        (not cfg.tokens, "--tokens 0 gives not a single update"),
        (cfg.resume and not cfg.out, "--resume needs --out"),
        (cfg.export and not importlib.util.find_spec("safetensors"),
         "--export needs the package safetensors: pip install safetensors"),
        (ranks > 1 and (cfg.write_tokens or cfg.train_tokenizer),
         "--write_tokens and --train_tokenizer are for one process, without torchrun"),
        (cfg.write_tokens and len(parse_mix(cfg.data)) > 1,
         "--write_tokens takes one corpus, not a mix"),
        (cfg.write_tokens and all(map(shard_paths, parse_mix(cfg.data))),
         "--write_tokens takes text, and --data is token shards"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
    for path in filter(None, parse_mix(cfg.data)):
        if not all(map(os.path.exists, list_files(path))):
            raise ValueError(f"--data: there is no {path}")
    check_batches(cfg)

def check_batches(cfg):
    """Raises ValueError if a batch of the ramp does not fit the layout."""
    for n in range(cfg.first_batch or cfg.batch_size, cfg.batch_size + 1, cfg.batch_multiple):
        steps, micro = split_batch(dataclasses.replace(cfg, batch_size=n), cfg.dp)
        if cfg.dp * steps * micro != n or not steps:
            raise ValueError(
                f"a batch of {n} sequences is not {cfg.dp} data-parallel ranks x micro-batches of "
                f"{max(micro, 1)}: see --first_batch, --batch_size, --batch_multiple, --micro_batch"
            )
        if steps < cfg.pp:
            raise ValueError(f"{steps} micro-batches are fewer than --pp {cfg.pp}: --first_batch")

def dry_run(cfg):
    """Prints parameters, FLOPs per token, updates and bytes on the rank that needs most, from
    shapes alone."""
    cfg = lay_out(cfg, cfg.world_size)
    check(cfg, cfg.world_size)
    learned = cfg.tokenizer.startswith("bpe:") and int(cfg.tokenizer.removeprefix("bpe:")) + 1
    known = learned or load_tokenizer(cfg.tokenizer or "bytes", SPECIALS).n_vocab
    cfg.vocab_size = cfg.vocab_size or known
    with torch.device("meta"):
        total, activated = count_parameters(GPT3(cfg))
    print(f"parameters {total:,} | activated {activated:,}")
    print(f"FLOPs per token {flops_per_token(cfg):.4g} | 6 N gives {6 * activated:.4g}")
    ramp, steps = count_steps(cfg)
    print(f"updates {steps:,}, {ramp:,} of them of the ramp | pipeline bubble", end=" ")
    print(f"{(cfg.pp - 1) / split_batch(cfg, cfg.dp)[0]:.1%} of the work on a full batch")
    memory = memory_per_rank(cfg)
    for kind, size in (memory | {"sum": sum(memory.values())}).items():
        print(f"{kind:12} {size / 2**30:8.3f} GiB on one of {cfg.world_size} ranks")

def take_step(parallel, optimizer, batches, state, cfg):
    """One update of the parameters, unless its gradient is not finite; returns log_step's row. With
    a loss scale, a gradient that overflows halves it and is tried again."""
    while True:
        loss, first = parallel.run(batches, state["scale"])
        norm, loss = gradient_norm(parallel.model, loss, parallel.mesh, parallel.device)
        if math.isfinite(norm) or not math.isfinite(loss) or state["scale"] <= 1:
            break
        state["scale"], state["clean"] = state["scale"] / 2, 0
        print(f"step {state['step'] + 1} overflows: loss scale {state['scale']:g}", flush=True)
        optimizer.zero_grad()
    norm, finite = norm / state["scale"], math.isfinite(norm) and math.isfinite(loss)
    lr, size = learning_rate(state["tokens"], cfg), sum(len(batch["tokens"]) for batch in batches)
    row = {"step": state["step"] + 1, "loss": loss, "lr": lr, "grad": norm, "batch": size * cfg.dp}
    if first and finite:
        some = len(batches[0]["tokens"]) * cfg.dp
        small = first * row["batch"] / some / state["scale"]  # as the mean of its own targets
        # Undisclosed: the decay of the averages.
        for name, value in zip(("square", "trace"), noise_scale(small, norm, some, row["batch"])):
            state[name] = 0.99 * state[name] + 0.01 * value
    factor = min(1.0, cfg.clip / (norm + 1e-6)) if cfg.clip else 1.0
    for p in parallel.model.parameters() if finite and factor != state["scale"] else ():
        p.grad.mul_(factor / state["scale"])
    for group in optimizer.param_groups:
        group["lr"] = lr
    if finite:
        optimizer.step()
    else:
        print(f"step {row['step']} skipped: its gradient is not finite", flush=True)
    optimizer.zero_grad()
    state["step"] += 1
    state["sequences" if finite else "offset"] += row["batch"]
    state["tokens"] += finite * row["batch"] * cfg.seq_len
    state["bad"] = 0 if finite else state["bad"] + 1
    state["clean"] = state["clean"] + 1 if finite and cfg.precision == "fp16" else 0
    if state["clean"] == 1000:
        state["scale"], state["clean"] = 2 * state["scale"], 0
    return row

def train_with_ramp(parallel, optimizer, mixture, heldout, state, cfg):
    """Updates until cfg.steps, or until SIGTERM or SIGINT; state says how far it came."""
    place, device = (parallel.data_rank, cfg.dp), parallel.device
    signals, saved, pace = [], state["step"], 0.0
    handlers = {s: signal(s, lambda *_: signals.append(1)) for s in (SIGTERM, SIGINT)}
    while state["step"] < cfg.steps:
        if state["step"] % cfg.val_every == 0:
            validate(parallel.evaluate, heldout, state["step"], cfg, device, *place)
        started = time.perf_counter()
        first = state["sequences"] + state["offset"]
        now = dataclasses.replace(cfg, batch_size=batch_at(state["tokens"], cfg))
        batches = next_batches(mixture, first, bool(signals), now, device, *place)
        if batches is None:
            break
        key = cfg.seed, state["step"], parallel.data_rank, parallel.stage  # the same for all of tp
        torch.manual_seed(stable_hash(*key))  # of dropout
        row = take_step(parallel, optimizer, batches, state, cfg)
        seconds = time.perf_counter() - started
        pace = 0.9 * (pace or seconds) + 0.1 * seconds
        if row["step"] % cfg.log_every == 0 or row["step"] in (1, cfg.steps):
            counts = batches[0]["n_targets"], batches[0]["n_bytes"]
            bpb, more = bits_per_byte(row["loss"] * counts[0], counts[1]), {"batch": row["batch"]}
            if cfg.noise_scale and state["square"]:
                more["noise"] = round(state["trace"] / state["square"] * cfg.seq_len)
            if cfg.precision == "fp16":
                more["scale"] = state["scale"]
            row = {"step": row["step"], "loss": row["loss"], "bpb": bpb, "lr": row["lr"]} | {
                "grad": row["grad"], "tokens": state["tokens"], **more
            }
            log_step(row, pace, now, device)
        if state["bad"] == 3:
            raise ValueError(f"three steps to {state['step']} had no finite gradient")
        if cfg.out and state["step"] % cfg.save_every == 0:
            save_checkpoint(cfg.out, parallel.saved, optimizer, state)
            saved = state["step"]
    if cfg.out and saved < state["step"]:
        save_checkpoint(cfg.out, parallel.saved, optimizer, state)
    for signum, handler in handlers.items():
        signal(signum, handler)

def present(mixture, cfg, device):
    """Prints versions, layout, model and batch, and how often each corpus of a mix comes."""
    with torch.device("meta"):
        total, activated = count_parameters(GPT3(cfg))
    now = dataclasses.replace(cfg, batch_size=batch_at(0, cfg))
    steps, micro = split_batch(now, cfg.dp)
    print(f"python {sys.version.split()[0]} | torch {torch.__version__} | {device.type}", end=" ")
    print(f"{cfg.precision} | tp {cfg.tp} x pp {cfg.pp} x dp {cfg.dp} | {cfg.steps:,} updates")
    print(f"parameters {total:,} | activated {activated:,} | FLOPs per token", end=" ")
    print(f"{flops_per_token(cfg):.3g} | tokens per step {now.batch_size * cfg.seq_len:,}", end=" ")
    print(f"to {cfg.batch_size * cfg.seq_len:,}, at first", end=" ")
    print(f"= {cfg.dp} ranks x {steps} x {micro} sequences of {cfg.seq_len}", flush=True)
    rows = zip(mixture.names, mixture.corpora, mixture.shares)
    for name, corpus, share in rows if len(mixture.names) > 1 else ():
        part = share / mixture.block
        epochs = part * cfg.tokens / cfg.seq_len / corpus.n_windows(cfg.seq_len)
        print(f"  {part:.1%} {name or 'the library'}, {epochs:.2f} epochs", flush=True)

def wrap_up(parallel, heldout, tokenizer, cfg):
    """Validates, exports, measures what the context is good for, and samples."""
    place = parallel.device, parallel.data_rank, cfg.dp
    validate(parallel.evaluate, heldout, cfg.steps, cfg, *place)
    if cfg.export:
        to_hf(parallel.model, cfg, cfg.export, parallel.mesh)
    with torch.device("meta"):
        small = count_parameters(GPT3(cfg))[0] < 2e9  # fits one rank
    if (model := whole_model(parallel, cfg) if small else None) is None:
        return
    model.eval()
    n, edges = min(64, heldout.n_windows(cfg.seq_len)), [0]
    nats = loss_by_position(model, heldout, n, cfg)
    while edges[-1] < cfg.seq_len:
        edges.append(min(max(4, 2 * edges[-1]), cfg.seq_len))
    parts = ((a, b, sum(nats[a:b]) / (b - a)) for a, b in itertools.pairwise(edges))
    print("loss by position |", " | ".join(f"{a}-{b - 1} {mean:.3f}" for a, b, mean in parts))
    if tokenizer:
        for n_shots in (0, 1, 8):
            nats, right = shots(model, tokenizer, n_shots, 64, cfg)
            line = f"{n_shots} shots | {nats:.3f} nats an answer | {right:.1%} right"
            print(line if nats == nats else f"{n_shots} shots | n/a: they do not fit --seq_len")
        ids = tokenizer.encode_ordinary(cfg.prompt or heldout.text(32).decode(errors="ignore"))
        known = torch.from_numpy(heldout.token_bytes[: cfg.vocab_size] > 0)
        known = F.pad(known, (0, cfg.vocab_size - len(known)))
        print(tokenizer.decode(sample(model, ids, 256, known, cfg)), flush=True)

@record
def main(argv=None):
    """Reads the command line and the data, builds or resumes the run, trains, exports, samples."""
    with one_line_mistakes():
        cfg = parse(argv)
        if cfg.init:
            same = (*HF_CONFIG, "band", "banded")
            theirs = read_gpt2_config(cfg.init)
            found = {name: getattr(theirs, name) for name in same}
            cfg = dataclasses.replace(cfg, **found)
            print("--init has", ", ".join(f"{name} {value}" for name, value in found.items()))
        if cfg.dry_run:
            return dry_run(cfg)
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        cfg = lay_out(cfg, ranks)
        check(cfg, ranks)
        if cfg.train_tokenizer:
            learned = learn_ranks(cfg, cfg.train_tokenizer, math.inf, cfg.out)
            return print(f"{len(learned)} entries in {cfg.out}/ranks.tiktoken")
        known = cfg.tokenizer or not all(map(shard_paths, parse_mix(cfg.data)))
        tokenizer = make_tokenizer(cfg) if known else None
        if cfg.write_tokens:
            (path,) = parse_mix(cfg.data)
            return write_tokens(cfg.write_tokens, tokenize(read_documents(path), tokenizer))
        if tokenizer and 0 < cfg.vocab_size < tokenizer.n_vocab:
            raise ValueError(f"--vocab_size {cfg.vocab_size} is below {tokenizer.n_vocab}")
        device = launch(cfg.timeout)
        for folder in filter(None, (cfg.out, cfg.export)):
            Path(folder).mkdir(parents=True, exist_ok=True)
        mixture, heldout = load_mixture(cfg, tokenizer)
        cfg.steps = min(cfg.steps or math.inf, count_steps(cfg)[1])

        parallel = ModelParallel(cfg, device)
        init_weights(parallel.model, cfg, parallel.tp)
        if cfg.init:
            read_gpt2_weights(parallel.model, cfg, cfg.init, parallel.tp)
        optimizer = build_optimizer(parallel.model, cfg)
        state = {"step": 0, "sequences": 0, "tokens": 0, "offset": 0, "seed": cfg.seed, "bad": 0}
        state |= {"scale": 1.0, "clean": 0, "square": 0.0, "trace": 0.0}
        if cfg.out:
            load_checkpoint(cfg.out, cfg.resume, cfg.steps, parallel.saved, optimizer, state)
        if (cfg.precision == "fp16") != (state["scale"] > 1):  # it begins, or is over
            state["scale"] = 2.0**16 if cfg.precision == "fp16" else 1.0
        if cfg.out and dist.get_rank() == 0:
            config = json.dumps(dataclasses.asdict(cfg), indent=2)
            (Path(cfg.out) / "config.json").write_text(config + "\n")
        present(mixture, cfg, device)
        train_with_ramp(parallel, optimizer, mixture, heldout, state, cfg)
        if state["step"] < cfg.steps:
            return print(f"stopped by a signal after step {state['step']}", flush=True)
        wrap_up(parallel, heldout, tokenizer, cfg)

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
