"""Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer (Raffel et al.,
2019, arXiv 1910.10683), T5, in one file.

New against its parents, the Transformer of Vaswani et al. (2017) and BERT (1810.04805):
- an encoder and a decoder (§2.1), trained to write the spans that are missing in a text (§3.1.4,
  §3.3.4), not to name masked tokens one by one: a target is short, so that an update is cheap;
- positions are a number for each head and bucket of distances, added to attention's scores by
  all layers of a stack (§2.1); no other positions, no scaling of the scores (code);
- norms without mean and bias, at the input of each branch; no bias anywhere (§2.1);
- Adafactor, whose rate 1 / sqrt(max(n, 10⁴)) is relative to the parameters (§3.1.2), and a loss
  that keeps log Z near 0 (code);
- model and data parallelism on one mesh of devices (§2.1).
Also T5 v1.1 (gated GELU, a softmax of its own; github.com/google-research/text-to-text-transfer-
transformer, released_checkpoints.md) and, as --denoiser ul2, the mixture of UL2 (2205.05131).
"Code" is that repository, and Mesh TensorFlow's transformer, on which it ran.
Left out: the supervised tasks that the released v1.0 models also saw (§3.7): this is C4 alone, as
for the baseline and v1.1; the cleaning of C4 (§2.2); SentencePiece, for which tiktoken stands in.

Map: §2.1 RelativePositionBias, RelativeSoftmaxAttention, FeedForward, Block, T5, RMSNorm |
§3.1.2 learning_rate, build_optimizer | §3.1.4 replace_spans, corrupt | §3.3.4 span_mask | §3.7
PRESETS | Mesh TensorFlow: CrossEntropyWithZ, ShardedAdafactor, parallelize | UL2 §3.1: UL2.
Legend: B batch, T positions of the encoder, U of the decoder, S of keys, D width, H heads, E head
width, F hidden width, V vocabulary; under tensor parallelism H, F and V are a rank's own share.
Conventions: loss in nats per target, sentinels and EOS included; target -100 is none; the loss of
training, and its bits per byte, have the z-loss in them, those of validation have not. Tokens, and
speed, count the text before it is corrupted: 568 a row where the paper counts 512 inputs. UL2's
shorter denoisers leave the end of theirs unused, which counts too. Bits per byte are of the hidden
bytes, given the rest; lzma is given nothing.

Run: python t5.py                           # a laptop: the preset demo
     torchrun --nproc_per_node=8 t5.py      # GPUs: the preset small
     torchrun --nnodes=16 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
         t5.py --preset v1_1_xl --tp 8 --data c4/ --tokenizer ranks.tiktoken --vocab_size 0 \\
         --out /shared/xl
Expect: in 70 seconds on two CPU cores the demo's held-out loss falls from 6.26 to 1.80 nats per
target (13.5 to 3.9 bits per hidden byte), and it fills in a text, mostly with what is frequent.
"""

import argparse
import base64
import bisect
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
from torch.distributed.tensor import DTensor, distribute_tensor

# ---------------------------------------- Config ----------------------------------------

@dataclasses.dataclass
class Config:
    """The run. Every field is a flag of the command line, and its comment is the flag's help."""

    # Model, §2.1, §3.1.1
    vocab_size: int = 0  # V, entries of the vocabulary; 0: the tokenizer's, to a multiple of 128
    dim: int = 768  # D, width of the residual stream
    n_layers: int = 12  # blocks of the encoder, and as many of the decoder
    n_heads: int = 12  # H, attention heads
    head_dim: int = 64  # E, width of a head; H E need not be D
    hidden_dim: int = 3072  # F, width of the feed-forward layer
    gated: bool = False  # v1.1's feed-forward layer, a gated GELU, in place of ReLU
    tied: bool = True  # the softmax shares the token embedding, scaled by 1 / sqrt(D)
    buckets: int = 32  # of distances between positions
    max_distance: int = 128  # beyond which all distances are one bucket
    dropout: float = 0.1  # on what enters and leaves a stack, branches, hidden units, attention
    # Data, §2.2, §3.1.4
    data: str = ""  # text, token shards, or a directory of either; empty: Python's own library
    tokenizer: str = ""  # bytes, gpt2, cl100k_base, o200k_base, or a rank file; empty: bytes
    denoiser: Literal["t5", "iid", "ul2"] = "t5"  # spans, the baseline's tokens, or UL2's mix
    rate: float = 0.15  # of the tokens that are hidden; ul2 has its own
    span: float = 3.0  # tokens of a hidden span, on average; of the denoiser t5 alone
    inputs: int = 512  # T, positions of the encoder
    targets: int = 0  # U, positions of the decoder; 0: as many as the corruption gives
    seq_len: int = 0  # tokens of text in a row; 0: the most that the inputs hold
    pack: int = 1  # examples in a row, which do not see each other
    pad: int = 0  # id of PAD, which starts every target too; a tokenizer has its own
    eos: int = 1  # id of EOS, the end of inputs and targets; a tokenizer has its own
    sentinel: int = 32099  # id of the first sentinel, from which they count down; a tokenizer's own
    sentinels: int = 100  # that there are
    mode: int = 32100  # id of UL2's [R], before [S] and [X]; a tokenizer has its own
    # Optimization, §3.1.2
    batch_size: int = 128  # rows, that is sequences of one update, over all ranks
    steps: int = 524288  # updates
    lr: float = 0.01  # largest learning rate, until 1 / sqrt(updates) is less
    ramp_down: float = 0.0  # part of the updates, at the end, in which the rate falls to 0
    z_loss: float = 1e-4  # weight of (log Z)² in the loss
    clip: float = 0.0  # largest norm of the gradient; 0: no clipping
    seed: int = 0  # of weights, data order, corruption and dropout
    # Parallelism, §2.1
    micro_batch: int = 0  # rows of one forward pass on one rank, at most; 0: the rank's share
    tp: int = 1  # ranks that share heads, hidden units and vocabulary
    dp: int = 0  # ranks that read their own data; 0: all that are left
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
    prompt: str = ""  # text to fill in at <extra_id_0>, ...; without these, spans of it are hidden
    out: str = ""  # directory for checkpoints, metrics.jsonl, config.json; empty: none are written
    save_every: int = 1000  # updates between checkpoints
    resume: bool = False  # go on from the newest checkpoint in out
    init: str = ""  # Hugging Face checkpoint directory to start from
    export: str = ""  # directory to write the model to as a Hugging Face checkpoint
    write_tokens: str = ""  # directory to write the data to as token shards; then exit

# The code's V: 32,000 word-pieces and 100 sentinels, to a multiple of 128; a micro-batch is its
# 2,048 inputs. Its model-parallel degrees (--tp): base 1, large 2, 3b 8, 11b 32; v1.1 large 2, xl
# and xxl 8.
BASELINE = dict(vocab_size=32128, micro_batch=4, precision="bf16", compile=True, denoiser="iid")
# §3.7: spans, 2²⁰ tokens an update, a million updates.
# Undisclosed: the last two, and the rate, for v1.1. They are the same here.
FINAL = BASELINE | dict(denoiser="t5", batch_size=2048, steps=1_000_000)
V1_1 = FINAL | dict(gated=True, tied=False, dropout=0.0)
SHAPE = ("n_layers", "dim", "hidden_dim", "n_heads", "head_dim")
PRESETS = {
    # A CPU, a minute: rows of two examples. As if k, the updates of constant rate, were 400.
    "demo": dict(
        dim=64, n_layers=2, n_heads=4, head_dim=16, hidden_dim=192, dropout=0.0, inputs=96, pack=2,
        batch_size=24, steps=700, lr=0.05, ramp_down=0.5, log_every=50,
    ),
    # A GPU of 24 GB or a node of them, minutes: v1.1's base, over bytes. k is 2,500.
    "small": dict(
        dim=768, n_layers=12, hidden_dim=2048, gated=True, tied=False, dropout=0.0, batch_size=96,
        micro_batch=12, steps=2000, lr=0.02, ramp_down=0.1, compile=True, val_every=500,
    ),
    # §3.1: the baseline, with the objective of §3.1.4.
    "baseline": BASELINE,
    # §3.7. The paper's 770M for large is the count with a softmax of its own.
    # Departure: the released models also saw the supervised tasks; here they see text alone.
    "t5_small": FINAL | dict(zip(SHAPE, (6, 512, 2048, 8, 64))),
    "t5_base": FINAL | dict(zip(SHAPE, (12, 768, 3072, 12, 64))),
    "t5_large": FINAL | dict(zip(SHAPE, (24, 1024, 4096, 16, 64))),
    "t5_3b": FINAL | dict(zip(SHAPE, (24, 1024, 16384, 32, 128))),
    "t5_11b": FINAL | dict(zip(SHAPE, (24, 1024, 65536, 128, 128))),
    # §3.6: the shape of large, and other depths.
    "2x": BASELINE | dict(zip(SHAPE, (16, 1024, 4096, 16, 64))),
    "4x": BASELINE | dict(zip(SHAPE, (32, 1024, 4096, 16, 64))),
    # v1.1, released_checkpoints.md.
    "v1_1_small": V1_1 | dict(zip(SHAPE, (8, 512, 1024, 6, 64))),
    "v1_1_base": V1_1 | dict(zip(SHAPE, (12, 768, 2048, 12, 64))),
    "v1_1_large": V1_1 | dict(zip(SHAPE, (24, 1024, 2816, 16, 64))),
    "v1_1_xl": V1_1 | dict(zip(SHAPE, (24, 2048, 5120, 32, 64))),
    "v1_1_xxl": V1_1 | dict(zip(SHAPE, (24, 4096, 10240, 64, 64))),
}  # fmt: skip
# Departure: tiktoken, over bytes by default, stands for the paper's 32,000 SentencePieces, so that
# PAD, EOS and sentinels have other ids than 0, 1 and 32099 down, which those of shards keep.
BEGIN, END = "", "</s>"  # BEGIN may be none; END ends inputs and targets, and no document
PAD, MODES = "<pad>", ("[R]", "[S]", "[X]")
SPECIALS = (END, PAD, *MODES)  # and, behind them, the sentinels: the first is the last id
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

class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps), in fp32 and cast back, times a gain: [..., D]."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = F.rms_norm(x.float(), self.weight.shape, None, self.eps).type_as(x)
        return y * self.weight.type_as(x)

def relative_position_bucket(relative, bidirectional, buckets=32, max_distance=128):
    """§2.1: the bucket of key position - query position, any shape: one for each small distance,
    ever wider ones up to max_distance, one beyond. With bidirectional, half of them are for keys
    after the query (the first of that half is never used); else these are not seen, and bucket 0.
    """
    offset, distance = 0, (-relative).clamp(min=0)
    if bidirectional:
        buckets //= 2
        offset, distance = buckets * (relative > 0), relative.abs()
    exact = buckets // 2
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (far * (buckets - exact)).long()).clamp(max=buckets - 1)
    return offset + torch.where(distance < exact, distance, far)

@functools.lru_cache(8)
def bucket_of_distance(length, bidirectional, buckets, max_distance, device):
    """Buckets of the relative positions 1 - T ... T - 1: [2 T - 1]. They are made on the CPU, since
    some distances lie on the border of two, where a device's logarithm could decide otherwise."""
    relative = torch.arange(1 - length, length)
    return relative_position_bucket(relative, bidirectional, buckets, max_distance).to(device)

class RelativePositionBias(nn.Module):
    """§2.1: the numbers that all layers of a stack add to their scores, [H, T, T]."""

    def __init__(self, n_heads, bidirectional, buckets=32, max_distance=128):
        super().__init__()
        self.kind = bidirectional, buckets, max_distance
        # [H, buckets], as the code's variable lies; tensor_dimension finds it by its name's end
        self.per_head = nn.Embedding(n_heads, buckets)

    def forward(self, length):
        buckets = bucket_of_distance(length, *self.kind, self.per_head.weight.device)
        by_distance = self.per_head.weight.index_select(1, buckets)  # [H, 2 T - 1]
        # row i has the T distances from -i on: a window, which moves back as i grows
        return by_distance.unfold(1, length, 1).flip(1)  # [H, T, T]

class RelativeSoftmaxAttention(nn.Module):
    """softmax(q kᵀ + bias) v W_o of x [B, T, D], with keys and values from memory [B, S, D], or x
    itself -> [B, T, D]. bias [1 or B, H, T, S] also hides, with -inf; without it, mask [B, 1, T, S]
    does. Scores are not scaled: the initial q is small instead (code)."""

    def __init__(self, dim, n_heads, head_dim, dropout, tp=None):
        super().__init__()
        self.tp, self.head_dim, self.dropout = tp, head_dim, dropout
        inner = n_heads // group_size(tp) * head_dim
        self.q = nn.Linear(dim, inner, bias=False)
        self.k = nn.Linear(dim, inner, bias=False)
        self.v = nn.Linear(dim, inner, bias=False)
        self.out = nn.Linear(inner, dim, bias=False)

    def forward(self, x, memory=None, bias=None, mask=None):
        x = SumGradient.apply(x, self.tp) if self.tp else x
        memory = x if memory is None else memory
        heads = (layer(y) for layer, y in ((self.q, x), (self.k, memory), (self.v, memory)))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in heads)
        p = self.dropout if self.training else 0.0
        if bias is None:
            x = F.scaled_dot_product_attention(q, k, v, mask, p, scale=1.0)  # [B, H, T, E]
        else:  # written out, as torch's fused kernels have no gradient of a bias
            with torch.autocast(q.device.type, enabled=False):  # it would round the scores
                scores = (q.float() @ k.float().mT).add_(bias)  # [B, H, T, S]
            x = F.dropout(scores.softmax(-1), p, self.training).type_as(v) @ v  # [B, H, T, E]
        x = self.out(x.transpose(1, 2).flatten(2))  # [B, T, D]
        return SumOutput.apply(x, self.tp) if self.tp else x

class FeedForward(nn.Module):
    """W_o ReLU(W_i x) or, in v1.1, W_o (GELU(W_i0 x) * W_i1 x) with GELU in its tanh form:
    [B, T, D] -> [B, T, D], no biases, dropout on the hidden units (code)."""

    def __init__(self, dim, hidden_dim, gated, dropout, tp=None):
        super().__init__()
        self.tp, self.dropout = tp, dropout
        hidden_dim //= group_size(tp)
        self.gate = nn.Linear(dim, hidden_dim, bias=False) if gated else None
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x):
        x = SumGradient.apply(x, self.tp) if self.tp else x
        if self.gate is None:
            x = F.relu(self.up(x))  # [B, T, F]
        else:
            x = F.gelu(self.gate(x), approximate="tanh") * self.up(x)  # [B, T, F]
        x = self.down(F.dropout(x, self.dropout, self.training))  # [B, T, D]
        return SumOutput.apply(x, self.tp) if self.tp else x

class Block(nn.Module):
    """§2.1, [B, T, D] -> [B, T, D]: each branch behind a norm of its input, dropout, and added; in
    a decoder, attention to memory, the encoder's output, stands between the two."""

    def __init__(self, cfg, decoder, tp=None):
        super().__init__()
        # Undisclosed: what norms add to the mean square; the code's 1e-6.
        attention = cfg.dim, cfg.n_heads, cfg.head_dim, cfg.dropout, tp
        self.dropout = cfg.dropout
        self.attn_norm = RMSNorm(cfg.dim, 1e-6)
        self.attn = RelativeSoftmaxAttention(*attention)
        self.cross_norm = RMSNorm(cfg.dim, 1e-6) if decoder else None
        self.cross = RelativeSoftmaxAttention(*attention) if decoder else None
        self.ff_norm = RMSNorm(cfg.dim, 1e-6)
        self.ff = FeedForward(cfg.dim, cfg.hidden_dim, cfg.gated, cfg.dropout, tp)

    def forward(self, x, bias, memory=None, mask=None):
        # Departure: dropout draws a mask for every position. The code has one for all positions of
        # a sequence, and for all queries of a head; common ports do as this script.
        x = x + F.dropout(self.attn(self.attn_norm(x), bias=bias), self.dropout, self.training)
        if self.cross is not None:
            y = self.cross(self.cross_norm(x), memory, mask=mask)
            x = x + F.dropout(y, self.dropout, self.training)
        return x + F.dropout(self.ff(self.ff_norm(x)), self.dropout, self.training)

class Stack(nn.Module):
    """The encoder, or the decoder: embedded [B, T, D] -> [B, T, D]; visible [T, T] or [B, 1, T, T]
    is who may see whom in its own attention, None: all."""

    def __init__(self, dim, relative, blocks, dropout, recompute):
        super().__init__()
        self.dropout, self.recompute = dropout, recompute
        self.relative, self.blocks = relative, nn.ModuleList(blocks)
        self.final_norm = RMSNorm(dim, 1e-6)

    def forward(self, x, visible, memory=None, mask=None):
        bias = self.relative(x.shape[1])[None]  # [1, H, T, T]
        if visible is not None:
            bias = torch.where(visible, bias, -math.inf)  # [1 or B, H, T, T]
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            if self.recompute == "block" and self.training:
                checkpoint = torch.utils.checkpoint.checkpoint
                x = checkpoint(block, x, bias, memory, mask, use_reentrant=False)
            else:
                x = block(x, bias, memory, mask)
        return F.dropout(self.final_norm(x), self.dropout, self.training)

class T5(nn.Module):
    """Source [B, T] and shifted target [B, U] -> logits [B, U, V] in fp32. Segments, of the same
    shapes, are the numbers of a packed row's examples, 0 for padding; None: one example each."""

    def __init__(self, cfg, tp=None):
        super().__init__()
        self.tp, self.scale = tp, cfg.dim**-0.5 if cfg.tied else 1.0
        rows = cfg.vocab_size // group_size(tp)
        self.token_embedding = nn.Embedding(rows, cfg.dim)
        heads = cfg.n_heads // group_size(tp)

        def stack(decoder):
            relative = RelativePositionBias(heads, not decoder, cfg.buckets, cfg.max_distance)
            blocks = (Block(cfg, decoder, tp) for _ in range(cfg.n_layers))
            return Stack(cfg.dim, relative, blocks, cfg.dropout, cfg.recompute)

        self.encoder, self.decoder = stack(False), stack(True)
        self.head = None if cfg.tied else nn.Linear(cfg.dim, rows, bias=False)

    def embed(self, tokens):
        """[B, T] -> [B, T, D]; under tensor parallelism a rank looks up its rows of the table."""
        if not self.tp:
            return self.token_embedding(tokens)
        rows = self.token_embedding.weight.shape[0]
        tokens = tokens - self.tp.rank() * rows
        mine = (tokens >= 0) & (tokens < rows)
        x = self.token_embedding(tokens.clamp(0, rows - 1)) * mine[..., None]
        return SumOutput.apply(x, self.tp)

    def encode(self, source, segments=None):
        """Source [B, T] -> what the decoder attends to, [B, T, D]."""
        # Departure: padding sees padding, instead of being set to 0; nothing else sees it. What is
        # hidden has a score of -inf, not the code's -1e9.
        visible = None
        if segments is not None:
            visible = segments[:, None, :, None] == segments[:, None, None]  # [B, 1, T, T]
        return self.encoder(self.embed(source), visible)

    def decode(self, target, memory, source_segments=None, segments=None):
        """Shifted target [B, U], memory [B, T, D] -> logits [B, U, V], a rank's columns of them."""
        length, mask = target.shape[1], None
        visible = torch.ones(length, length, dtype=torch.bool, device=target.device).tril()
        if segments is not None:
            own = segments[:, None, :, None]  # [B, 1, U, 1]
            visible = visible & (own == segments[:, None, None])  # [B, 1, U, U]
            mask = (own == source_segments[:, None, None]) | (own == 0)  # [B, 1, U, T]
        memory = SumGradient.apply(memory, self.tp) if self.tp else memory
        x = self.decoder(self.embed(target), visible, memory, mask)
        x = SumGradient.apply(x, self.tp) if self.tp else x
        return F.linear(x * self.scale, (self.head or self.token_embedding).weight).float()

    def forward(self, source, target_in, source_segments=None, target_segments=None):
        memory = self.encode(source, source_segments)
        return self.decode(target_in, memory, source_segments, target_segments)

def group_size(group):
    """Ranks of a process group; None is a group of one."""
    return group.size() if group else 1

def init_weights(model, cfg, tp=None):
    """As the code has it: embeddings N(0, 1); matrices N(0, 1 / fan-in), those of the feed-forward
    layers and of v1.1's softmax cut at two sigma; queries smaller by sqrt(E), for the scaling that
    scores lack; gains 1; the bias of positions uniform. Each is drawn from (seed, its name)."""
    # Undisclosed: all of it in the paper.
    for name, p in model.named_parameters():
        shape, draw = whole_shape(name, p, tp), torch.Generator()
        draw.manual_seed(stable_hash(cfg.seed, name))
        whole = torch.empty(shape)
        if name == "token_embedding.weight":
            whole.normal_(0.0, 1.0, generator=draw)
        elif re.search(r"\.(q|k|v|out)\.weight$", name):
            std = shape[1] ** -0.5 * (cfg.head_dim**-0.5 if name.endswith("q.weight") else 1)
            whole.normal_(0.0, std, generator=draw)
        elif re.search(r"\.(gate|up|down)\.weight$|^head\.weight$", name):
            std = shape[1] ** -0.5
            nn.init.trunc_normal_(whole, 0.0, std, -2 * std, 2 * std, generator=draw)
        elif name.endswith("relative.per_head.weight"):  # Glorot and Bengio's, TensorFlow's default
            whole.uniform_(-1, 1, generator=draw).mul_(math.sqrt(6 / sum(shape)))
        elif re.search(r"norm\.weight$", name):
            whole.fill_(1.0)
        else:
            raise ValueError(f"no rule initialises {name}")
        fill(name, p, whole, tp)

def count_parameters(model):
    """(total, activated) parameters; a tied softmax counts once, a dense model activates all."""
    total = sum(p.numel() for p in model.parameters())
    return total, total

def flops_per_token(cfg):
    """Training FLOPs per token of text: 2 per weight of a matrix product forward, twice that
    backward. The decoder's own attention counts as causal, (U + 1) / 2 keys a query, half of what
    the full square gives; padding and packed neighbours count."""
    length, T, U = (cfg.pack * n for n in row_lengths(cfg))
    inner = cfg.n_heads * cfg.head_dim
    mlp = (3 if cfg.gated else 2) * cfg.dim * cfg.hidden_dim
    source = 6 * cfg.dim * inner + mlp + 2 * inner * T  # with the keys and values of the decoder
    target = 6 * cfg.dim * inner + mlp + 2 * inner * ((U + 1) / 2 + T)
    return 6 * (cfg.n_layers * (T * source + U * target) + U * cfg.dim * cfg.vocab_size) / length

# ---------------------------------------- Data ----------------------------------------

# UL2 §3.1: (mode, rate, mean span). One suffix of a quarter, the S-denoiser, is one endless span.
# Undisclosed: how often each comes. They are drawn uniformly.
UL2 = (
    ("[R]", 0.15, 3.0), ("[R]", 0.15, 8.0), ("[S]", 0.25, math.inf),
    ("[X]", 0.5, 3.0), ("[X]", 0.5, 8.0), ("[X]", 0.15, 64.0), ("[X]", 0.5, 64.0),
)  # fmt: skip

def count_noise(length, rate, span):
    """(tokens, spans) that are hidden of `length` tokens; halves are rounded to even (code)."""
    noise = min(max(round(length * rate), 1), length - 1)
    spans = max(round(noise / span), 1)
    # Departure: where kept tokens are fewer than spans, the code fails; here spans are as few.
    return noise, min(spans, length - noise)

def encoded_lengths(length, rate, span):
    """(inputs, targets) of `length` tokens with spans hidden: sentinels and EOS included."""
    noise, spans = count_noise(length, rate, span)
    return length - noise + spans + 1, noise + spans + 1

@functools.cache
def fitting_length(inputs, rate, span):
    """The most tokens whose encoded inputs fit: 568 for 512 (code)."""
    candidates = range(2, int((inputs + 2) / (1 - rate)) + 3)  # inputs grow with them
    fits = bisect.bisect(candidates, inputs, key=lambda n: encoded_lengths(n, rate, span)[0])
    length = candidates[fits - 1]
    # targets that just exceed the inputs would ask for a longer row (code)
    return length - (rate == 0.5 and encoded_lengths(length, rate, span)[1] > inputs)

def denoisers(cfg):
    """(mode, tokens of an example, rate, mean span) of those that hide spans."""
    ul2 = cfg.denoiser == "ul2"  # whose mode is one of the inputs
    mix = UL2 if ul2 else (("", cfg.rate, cfg.span),)
    most, room = cfg.seq_len // cfg.pack or math.inf, cfg.inputs // cfg.pack - ul2
    return [(mode, min(most, fitting_length(room, *kind)), *kind) for mode, *kind in mix]

def row_lengths(cfg):
    """(tokens of text, inputs, targets), at most, of each of a row's cfg.pack examples."""
    if cfg.denoiser == "iid":  # runs are left to chance
        length = min(cfg.seq_len // cfg.pack or math.inf, cfg.inputs // cfg.pack - 1)
        # 192 targets for 512 inputs at a rate of 0.15 (code); in proportion at others
        inputs, targets = length + 1, math.ceil(2.5 * cfg.rate * (length + 1))
    else:
        encoded = [encoded_lengths(*kind) for _, *kind in denoisers(cfg)]
        length = max(length for _, length, *_ in denoisers(cfg))
        inputs, targets = map(max, zip(*encoded))
        inputs += cfg.denoiser == "ul2"
    return length, inputs, cfg.targets // cfg.pack or targets

def random_parts(n, parts, rng):
    """Lengths of `parts` non-empty parts of n, uniform among all such."""
    cuts = np.sort(rng.choice(n - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=n)

def span_mask(length, rate, span, rng):
    """[length] bool, true where a token is hidden: a kept part, a hidden span, and so on, so that
    the first token is always kept and the last one always hidden (code)."""
    noise, spans = count_noise(length, rate, span)
    keep, drop = random_parts(length - noise, spans, rng), random_parts(noise, spans, rng)
    return np.repeat(np.arange(2 * spans) % 2 == 1, np.stack((keep, drop), 1).ravel())

def replace_spans(ids, mask, sentinel):
    """ids with each run of the mask replaced by a sentinel: sentinel, sentinel - 1, ..."""
    starts = mask & ~np.concatenate(([False], mask[:-1]))
    return np.where(starts, sentinel + 1 - np.cumsum(starts), ids)[starts | ~mask]

def corrupt(ids, rng, cfg):
    """(inputs, targets) of a piece of text: what is kept with a sentinel for each hidden run, and
    what is hidden with one for each kept run (§3.1.4)."""
    # Departure: the paper's Figure 2 closes the targets with a sentinel. The code, and this, ends
    # them with the last span, since spans hide the last token; of single tokens, as it comes.
    mode = []
    if cfg.denoiser == "iid":  # §3.1.4
        mask = rng.random(len(ids)) < cfg.rate
        starts = np.cumsum(mask & ~np.concatenate(([False], mask[:-1])))
        # Departure: the code's ids would run into word-pieces; without a sentinel none is hidden.
        mask &= starts < cfg.sentinels
    else:
        mix = denoisers(cfg)
        name, length, *kind = mix[rng.integers(len(mix))]
        mode = [cfg.mode + MODES.index(name)] if name else []
        # Departure: a window is what the longest denoiser takes; of it, the others leave the end
        # unused. A shorter window for each would have to know the draws before it.
        ids = ids[:length]
        mask = span_mask(len(ids), *kind, rng)
        if mode == [cfg.mode + 2] and count_noise(len(ids), *kind)[1] == 1:
            # an X-denoiser's only span would always be the suffix, which S has: it moves (code)
            mask = np.roll(mask, -rng.integers(len(ids) - mask.sum()))
    inputs = [*mode, *replace_spans(ids, mask, cfg.sentinel)]
    return inputs, replace_spans(ids, ~mask, cfg.sentinel)

def get_batch(corpus, first, n, cfg):
    """Rows first ... first + n - 1 of the run, of pack examples each, whatever the ranks or the
    moment: source [n, pack T], target_in and targets [n, pack U], segments of both where a row is
    not one full example, and the counts n_targets and n_bytes (of the hidden text)."""
    # Documents are one stream without separators, cut into windows (code).
    # Departure: of the whole corpus, not of 128 documents each, so that no shorter piece is left.
    # Departure: a long document is read whole; the code takes 65,536 tokens of it, at random.
    # Departure: a row has a fixed number of examples. The code fills it with as many as fit.
    length, T, U = row_lengths(cfg)
    shapes = dict(source=T, target_in=U, targets=U, source_segments=T, target_segments=U)
    fills = dict(source=cfg.pad, target_in=cfg.pad, targets=-100)
    batch = {k: torch.full((n, cfg.pack * v), fills.get(k, 0)) for k, v in shapes.items()}
    rows = {k: v.numpy() for k, v in batch.items()}
    for row in range(n):
        window = corpus.window(first + row, cfg.pack * length, cfg.seed)[:-1]
        taken = window[(window > cfg.sentinel - cfg.sentinels) & (window <= cfg.sentinel)]
        if len(taken):
            raise ValueError(
                f"the data has token id {taken[0]}, and {cfg.sentinels} ids from {cfg.sentinel} "
                "down are the sentinels: see --sentinel, --tokenizer"
            )
        rng = np.random.default_rng(stable_hash(cfg.seed, "corruption", first + row))
        at = to = 0  # where the next example of the row begins
        for segment, ids in enumerate(np.split(window, cfg.pack), 1):
            inputs, targets = corrupt(ids, rng, cfg)
            inputs, targets = [*inputs[: T - 1], cfg.eos], [*targets[: U - 1], cfg.eos]
            here, there = slice(at, at + len(inputs)), slice(to, to + len(targets))
            rows["source"][row, here], rows["source_segments"][row, here] = inputs, segment
            rows["targets"][row, there], rows["target_segments"][row, there] = targets, segment
            rows["target_in"][row, there] = [cfg.pad, *targets[:-1]]
            at, to = here.stop, there.stop
    if cfg.denoiser == "t5" and cfg.pack == 1:  # what pads targets is behind them
        del batch["source_segments"], batch["target_segments"]
    scored = rows["targets"][rows["targets"] >= 0]
    counts = {"n_targets": scored.size, "n_bytes": int(corpus.token_bytes[scored].sum())}
    return batch | counts

# ---------------------------------------- Objective ----------------------------------------

class CrossEntropyWithZ(torch.autograd.Function):
    """(sum of the nats of targets [N], sum of their (log Z)²) of logits [N, V]; targets below 0
    count nothing. Under tp each rank has its columns, and no rank ever has them all."""

    @staticmethod
    def forward(ctx, logits, targets, tp):
        first = tp.rank() * logits.shape[1] if tp else 0
        mine = (targets >= first) & (targets < first + logits.shape[1])
        local = (targets - first).clamp(0, logits.shape[1] - 1)[:, None]
        target, log_z = logits.gather(1, local)[:, 0] * mine, logits.logsumexp(1)
        if tp:
            parts = [torch.empty_like(log_z) for _ in range(tp.size())]
            dist.all_gather(parts, log_z, group=tp)
            dist.all_reduce(target, group=tp)
            log_z = torch.stack(parts).logsumexp(0)
        counted = targets >= 0
        ctx.save_for_backward(logits, local, mine, log_z, counted)
        return ((log_z - target) * counted).sum(), (log_z.square() * counted).sum()

    @staticmethod
    def backward(ctx, of_nats, of_square):
        logits, local, mine, log_z, counted = ctx.saved_tensors
        gradient = (logits - log_z[:, None]).exp_()  # [N, V], the probabilities
        gradient *= ((of_nats + 2 * of_square * log_z) * counted)[:, None]
        gradient.scatter_add_(1, local, (-of_nats * (mine & counted))[:, None].type_as(logits))
        return gradient, None, None

def objective(model, batch, cfg):
    """Cross-entropy of the targets and, where a gradient is asked for, z_loss times (log Z)²; the
    sums over the batch, divided by batch["n_targets"], the count of the whole global batch."""
    # Undisclosed: the z-loss and its weight, which are the code's.
    # Departure: the code divides by all target positions. That is the same where rows are full.
    inputs = ("source", "target_in", "source_segments", "target_segments")
    with torch.autocast(batch["source"].device.type, torch.bfloat16, cfg.precision == "bf16"):
        logits = model(*(batch[name] for name in inputs if name in batch)).flatten(0, 1)
    tp = getattr(model, "module", model).tp  # behind data parallelism, if there is any
    nats, square = CrossEntropyWithZ.apply(logits, batch["targets"].flatten(), tp)
    loss = nats + cfg.z_loss * square if torch.is_grad_enabled() else nats
    return loss / max(batch["n_targets"], 1), {}

# ---------------------------------------- Optimizer ----------------------------------------

class ShardedAdafactor(torch.optim.Adafactor):
    """torch.optim.Adafactor for parts of matrices: means and RMS are those of the whole ones, of
    which each rank of tp has a part."""

    def __init__(self, named_parameters, tp, **settings):
        named = list(named_parameters)
        super().__init__([p for _, p in named], **settings)
        self.tp, self.cut = tp, {p: tensor_dimension(name) for name, p in named}

    def mean(self, p, x, *dims):
        """The mean of x, over dims of the whole matrix of which p is a part."""
        x = x.mean(dims, keepdim=True)
        if self.cut[p] in dims:
            dist.all_reduce(x, group=self.tp)
            x /= self.tp.size()
        return x

    @torch.no_grad()
    def step(self, closure=None):
        (group,) = self.param_groups
        eps1, eps2 = group["eps"]
        for p in (p for p in group["params"] if p.grad is not None):
            state, mean = self.state[p], functools.partial(self.mean, p)
            w, g = p.view(len(p), -1), p.grad.view(len(p), -1)  # a vector is one column
            if not state:
                state["step"] = torch.tensor(0.0)
                state["row_var"] = torch.zeros_like(g[:, :1])
                state["col_var"] = torch.zeros_like(g[:1])
            state["step"] += 1
            t, square = state["step"].item(), g.square()
            row = state["row_var"].lerp_(mean(square, 1), t ** group["beta2_decay"])
            column = state["col_var"].lerp_(mean(square, 0), t ** group["beta2_decay"])
            variance = row * column / mean(row, 0).clamp_(min=eps1)
            update = variance.clamp_(min=eps1**2).rsqrt_().mul_(g)
            size = mean(w.square(), 0, 1).sqrt().clamp_(min=eps2)
            size /= mean(update.square(), 0, 1).sqrt().clamp_(min=1.0)
            w -= min(group["lr"], t**-0.5) * size * update

def build_optimizer(model, cfg):
    """§3.1.2: Adafactor as in code: no momentum, decay of the second moments 1 - t^-0.8, updates
    clipped at RMS 1 and scaled by the RMS of their parameter; no weight decay."""
    # Departure: torch's factors the second moments of every matrix, the code's only where both
    # sides have 128 or more, which at the published sizes only the tables of relative positions
    # have not.
    # Departure: the code adds 1e-30 to squared gradients; torch bounds second moments by eps1²,
    # which must not vanish in fp32, or a row without gradient, as of a token that does not occur,
    # would be 0 / 0.
    settings = dict(lr=cfg.lr, eps=(2e-19, 1e-3), weight_decay=0.0)
    if model.tp:
        return ShardedAdafactor(model.named_parameters(), model.tp, **settings)
    return torch.optim.Adafactor(model.parameters(), **settings)

def learning_rate(step, cfg):
    """§3.1.2: 1 / sqrt(max(n, k)), where cfg.lr is 1 / sqrt(k), relative to the RMS of parameters;
    step counts the updates made before. The text says that it "exponentially decays"; its formula,
    and the code, do not. ramp_down is the code's, off for T5, and 0.1 in GLU Variants (2002.05202).
    """
    rate = min(cfg.lr, (step + 1) ** -0.5)
    if cfg.ramp_down:
        rate *= min(1, (cfg.steps - step) / (cfg.ramp_down * cfg.steps))
    return rate

# ---------------------------------------- Precision ----------------------------------------

# Parameters, gradients and Adafactor's moments are fp32. Under bf16, autocast (in objective) runs
# matrix products in bf16, as the code did on TPUs; but scores of attention are fp32, those inside
# torch's fused kernels, too. Norms, softmax and loss are fp32; the logits of the vocabulary are
# rounded to bf16 by the product that gives them.
# Departure: residual sums are fp32, too, which the code has in bf16.

PEAK_FLOPS = {  # dense bf16, by the device's exact name; a device not listed gets no MFU
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA B200": 2250e12,
}  # fmt: skip

# ---------------------------------------- Parallelism ----------------------------------------

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

def mesh_shape(cfg, ranks):
    """cfg with dp as the ranks that are left, where it is 0."""
    if min(cfg.tp, ranks) < 1 or ranks % cfg.tp or (cfg.dp and cfg.dp * cfg.tp != ranks):
        raise ValueError(f"tp {cfg.tp} x dp {cfg.dp or 'any'} are not {ranks} ranks")
    return dataclasses.replace(cfg, dp=ranks // cfg.tp)

def parallelize(model, cfg, mesh):
    """Data parallelism over mesh["dp"]: each rank has a copy of its part, gradients are averaged.
    Heads, hidden units and vocabulary are cut over mesh["tp"] already, as Mesh TensorFlow did."""
    for block in (*model.encoder.blocks, *model.decoder.blocks) if cfg.compile else ():
        block.compile()
    if cfg.dp == 1:
        return model
    steps, _ = split_batch(cfg, cfg.dp)
    return nn.parallel.DistributedDataParallel(
        model, process_group=mesh["dp"].get_group(), gradient_as_bucket_view=True,
        static_graph=steps == 1,  # it is faster, and wrong under the no_sync() of accumulation
    )  # fmt: skip

def mesh_gradients(model, batches, cfg):
    """Adds the global batch's gradient to the parameters; returns this rank's part of the loss."""
    total = 0.0
    for i, batch in enumerate(batches):
        alone = cfg.dp > 1 and i < len(batches) - 1  # ranks meet once, in the last micro-batch
        with model.no_sync() if alone else contextlib.nullcontext():
            loss, _ = objective(model, batch, cfg)
            (loss * cfg.dp).backward()  # DDP averages over ranks what is an average already
        total += loss.detach()
    return total / cfg.tp

def mesh_norm(model, loss, cfg, device):
    """(norm of the whole gradient, loss summed over ranks), after scaling the gradient down to
    cfg.clip if that is not 0. What several ranks hold counts once."""
    cut, copied = [], []  # by tensor parallelism: a part on each rank, the same on all
    for name, p in model.named_parameters():
        (copied if tensor_dimension(name) is None else cut).append(p.grad)
    square, more = (nn.utils.get_total_norm(part).double() ** 2 for part in (cut, copied))
    square, loss = sum_over_ranks((square + more / cfg.tp) / cfg.dp, loss, device=device)
    norm = math.sqrt(square) if square >= 0 else math.nan
    if cfg.clip and norm > cfg.clip:
        for p in model.parameters():
            p.grad.mul_(cfg.clip / (norm + 1e-6))
    return norm, loss

def memory_per_rank(cfg):
    """Bytes on one rank of cfg.dp x cfg.tp as an eager backward pass begins, by kind."""
    local = moments = 0
    with torch.device("meta"):
        for name, p in T5(cfg).named_parameters():
            dim = tensor_dimension(name)
            shape = [n // cfg.tp if i == dim else n for i, n in enumerate(p.shape)]
            local, moments = local + math.prod(shape), moments + sum(shape)
    _, T, U = (cfg.pack * n for n in row_lengths(cfg))
    size, width = 2 if cfg.precision == "bf16" else 4, cfg.n_heads * cfg.head_dim / cfg.tp
    heads, hidden = cfg.n_heads / cfg.tp, cfg.hidden_dim / cfg.tp
    # Kept per position and branch: the norm's input, its normalised and its scaled output; q, k, v
    # and what attention gives; hidden units; the softmax of every head, and its copy for v.
    # autocast casts what enters a product, anew for each of q, k and v; scores are made in fp32.
    norm, casts = (8 + size) * cfg.dim, 2 * size * cfg.dim * (size < 4)
    mlp, soft = size * hidden * (4 if cfg.gated else 1), heads * (4 + size * (size < 4))
    attention = (8 + 2 * size) * width
    source = 2 * norm + casts + attention + mlp + soft * T
    target = 3 * norm + casts + attention + 2 * size * width + mlp + soft * U
    block = source * T + target * U + (casts + 2 * size * width) * T  # k and v of the decoder
    if cfg.recompute == "block":  # every block's input, and one block at a time in full
        block = 4 * cfg.dim * (T + U) + block / cfg.n_layers
    ends = norm * (T + U) + U * (size * cfg.dim + 4 * cfg.vocab_size / cfg.tp)
    activations = split_batch(cfg, max(cfg.dp, 1))[1] * (cfg.n_layers * block + ends)
    memory = dict(parameters=4 * local, gradients=4 * local, optimizer=4 * moments)
    memory["bf16_copies"] = 2 * local * (cfg.precision == "bf16")  # autocast's, of the weights
    return memory | {"activations": int(activations)}

# ---------------------------------------- Checkpoint ----------------------------------------

HF_CONFIG = {  # ours: Hugging Face's
    "vocab_size": "vocab_size", "dim": "d_model", "n_layers": "num_layers", "n_heads": "num_heads",
    "head_dim": "d_kv", "hidden_dim": "d_ff", "tied": "tie_word_embeddings",
    "buckets": "relative_attention_num_buckets", "dropout": "dropout_rate",
    "max_distance": "relative_attention_max_distance", "pad": "pad_token_id", "eos": "eos_token_id",
}  # fmt: skip
HF_NAMES = {
    "token_embedding": "shared", "blocks": "block", "attn_norm": "layer.0.layer_norm",
    "cross_norm": "layer.1.layer_norm", "ff_norm": "layer.FF.layer_norm", ".out.": ".o.",
    "attn.": "layer.0.SelfAttention.", "cross.": "layer.1.EncDecAttention.",
    "relative.per_head": "block.0.layer.0.SelfAttention.relative_attention_bias",
    "final_norm": "final_layer_norm", "ff.": "layer.FF.DenseReluDense.", "gate": "wi_0",
    "down": "wo",
}  # fmt: skip

def t5_name(name, gated):
    """Hugging Face's name of our parameter."""
    if name == "head.weight":
        return "lm_head.weight"
    for ours, theirs in (HF_NAMES | {"up": "wi_1" if gated else "wi"}).items():
        name = name.replace(ours, theirs)
    return name.replace("FF", "2" if name.startswith("decoder") else "1")

def read_t5_config(path):
    """Config of the T5ForConditionalGeneration in a directory."""
    try:
        theirs = json.loads((Path(path) / "config.json").read_text())
        defaults = dict(  # of that class, which its files may leave out
            tie_word_embeddings=True, relative_attention_num_buckets=32, dropout_rate=0.1,
            relative_attention_max_distance=128, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        cfg = Config(**{ours: (defaults | theirs)[name] for ours, name in HF_CONFIG.items()})
        cfg.tied = theirs.get("scale_decoder_outputs", cfg.tied)  # since transformers 5
        kind = theirs.get("feed_forward_proj", "relu")
        cfg.gated = kind == "gated-gelu"
        known = dict(  # what this script does, where it is said at all
            model_type="t5", layer_norm_epsilon=1e-6, num_decoder_layers=cfg.n_layers,
            decoder_start_token_id=cfg.pad, feed_forward_proj="gated-gelu" if cfg.gated else "relu",
        )  # fmt: skip
        for name, value in known.items():
            if theirs.get(name) not in (None, value) or "model_type" not in theirs:
                raise ValueError(f"its {name} is {theirs.get(name)}")
    except Exception as error:
        raise ValueError(f"{path} holds no T5 model: {error!r}") from error
    return cfg

def read_t5_weights(model, cfg, path, tp=None):
    """Fills the parameters that this rank has from the safetensors of a directory."""
    from safetensors import SafetensorError, safe_open

    wanted = {t5_name(name, cfg.gated): (name, p) for name, p in model.named_parameters()}
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                for key in wanted.keys() & set(tensors.keys()):
                    (name, p), whole = wanted.pop(key), tensors.get_tensor(key)
                    whole = whole.T if "per_head" in name else whole
                    if list(whole.shape) != whole_shape(name, p, tp):
                        raise ValueError(f"{key} in {file} is {list(whole.shape)}")
                    fill(name, p, whole, tp)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    if list(wanted) == ["lm_head.weight"]:  # transformers 5 ties it all the same, without a factor
        print(f"{path} holds no lm_head.weight: the softmax begins as the embedding", flush=True)
        model.head.weight.data.copy_(model.token_embedding.weight.data)
    elif wanted:
        raise ValueError(f"{path} holds no {next(iter(wanted))}")

def from_hf(path):
    """(model, cfg) from the directory of a T5ForConditionalGeneration: config.json, *.safetensors.
    """
    cfg = read_t5_config(path)
    model = T5(cfg)
    read_t5_weights(model, cfg, path)
    return model, cfg

def to_hf(model, cfg, path):
    """Writes a model, or on every rank its part of one, to a directory as a
    T5ForConditionalGeneration. Versions of transformers 5 may tie the softmax to the embedding all
    the same: then lm_head.weight of an untied model has to be put in its place."""
    from safetensors.torch import save_file

    config = {theirs: getattr(cfg, ours) for ours, theirs in HF_CONFIG.items()}
    config |= dict(architectures=["T5ForConditionalGeneration"], model_type="t5", use_cache=True)
    config |= dict(layer_norm_epsilon=1e-6, num_decoder_layers=cfg.n_layers)
    config |= dict(decoder_start_token_id=cfg.pad, is_encoder_decoder=True, torch_dtype="float32")
    config |= dict(feed_forward_proj="gated-gelu" if cfg.gated else "relu")
    tensors = {}
    for name, p in model.named_parameters():
        whole = whole_tensor(name, p.data, model.tp).cpu()
        whole = whole.T if "per_head" in name else whole
        tensors[t5_name(name, cfg.gated)] = whole.contiguous()
    if not dist.is_initialized() or dist.get_rank() == 0:
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
def sample(model, source, n, cfg):
    """Ids that the model finds likeliest for the targets of source, a list of ids: up to EOS, n at
    most. Under tensor parallelism all ranks call."""
    model.eval()
    device, ids = model.token_embedding.weight.device, [cfg.pad]
    with torch.autocast(device.type, torch.bfloat16, cfg.precision == "bf16"):
        memory = model.encode(torch.tensor([source], device=device))
        while len(ids) <= n and ids[-1] != cfg.eos:
            logits = model.decode(torch.tensor([ids], device=device), memory)[0, -1]  # [V]
            if model.tp:
                parts = [torch.empty_like(logits) for _ in range(model.tp.size())]
                dist.all_gather(parts, logits, group=model.tp)
                logits = torch.cat(parts)
            ids.append(logits.argmax().item())
    return ids[1:]

def fill_spans(model, text, heldout, cfg):
    """Prints a text, of the held-out ones if there is none, with sentinels in place of its hidden
    spans, and the same with those spans that the model finds, ⟦so⟧."""
    tokenizer, (length, T, U) = heldout.tokenizer, row_lengths(cfg)
    sentinels = range(cfg.sentinel - cfg.sentinels + 1, cfg.sentinel + 1)
    names = {f"<extra_id_{k}>" for k in range(cfg.sentinels)}
    ids = tokenizer.encode(text, allowed_special=names, disallowed_special=())
    by_hand = not set(ids).isdisjoint(sentinels)
    mode = [cfg.mode] if by_hand and cfg.denoiser == "ul2" else []  # [R]
    room = T - 1 - len(mode) if by_hand else length
    if len(ids) > room:
        print(f"--prompt has {len(ids)} tokens, and a row takes the first {room}", flush=True)
    ids = np.array([*mode, *ids[:room]] if text else heldout.window(0, length, cfg.seed)[:-1])
    if not by_hand and len(ids) > 1:  # of a single token nothing can be hidden
        rng = np.random.default_rng(stable_hash(cfg.seed, "prompt"))
        ids = corrupt(ids, rng, cfg)[0]
    ids, spans, span = [int(i) for i in ids], {}, []
    for i in sample(model, [*ids, cfg.eos], U, cfg):
        if i in sentinels:
            span = spans.setdefault(i, [])
        else:
            span.append(i)

    def spelled(ids):  # without special tokens
        return tokenizer.decode_bytes([i for i in ids if heldout.token_bytes[i]])

    parts = ("⟦".encode() + spelled(spans.get(i, [])) + "⟧".encode() if i in sentinels
             else spelled([i]) for i in ids)  # fmt: skip
    filled = b"".join(parts).decode(errors="replace")
    print(tokenizer.decode(ids), filled, sep="\n---\n", flush=True)

def most_spans(cfg):
    """Sentinels that an example needs, at most; for single tokens, on average and four sigma."""
    if cfg.denoiser == "iid":
        mean = row_lengths(cfg)[0] * cfg.rate * (1 - cfg.rate)
        return math.ceil(mean + 4 * math.sqrt(mean))
    spans = (count_noise(*kind)[1] for _, *kind in denoisers(cfg))
    return max(2 * (cfg.denoiser == "ul2"), *spans)  # a single span that moves has two

def check(cfg, ranks):
    """Raises ValueError for a configuration that cannot run on that many ranks."""
    for field in dataclasses.fields(cfg):
        low = 0 if field.default in (0, 1, 0.0) or field.type is float else 1
        low = 1 if field.name in ("pack", "tp", "world_size") else low
        if field.type in (int, float) and not low <= getattr(cfg, field.name) < math.inf:
            raise ValueError(f"--{field.name} {getattr(cfg, field.name)} is not {low} or more")
    steps, micro = split_batch(cfg, cfg.dp)
    for wrong, message in (
        (cfg.n_heads % cfg.tp, f"--tp {cfg.tp} does not divide {cfg.n_heads} heads"),
        (cfg.hidden_dim % cfg.tp, f"--tp {cfg.tp} does not divide --hidden_dim {cfg.hidden_dim}"),
        (cfg.vocab_size % cfg.tp, f"--tp {cfg.tp} does not divide --vocab_size {cfg.vocab_size}"),
        (cfg.buckets % 4, f"--buckets {cfg.buckets} is not a multiple of 4"),
        (cfg.max_distance <= cfg.buckets, f"--max_distance {cfg.max_distance} is within buckets"),
        (cfg.dropout >= 1, f"--dropout {cfg.dropout} leaves nothing"),
        (not 0 < cfg.rate < 1, f"--rate {cfg.rate} is not between 0 and 1"),
        (cfg.span < 1, f"--span {cfg.span} is less than a token"),
        (cfg.ramp_down > 1, f"--ramp_down {cfg.ramp_down} is more than the run"),
        (cfg.inputs % cfg.pack or cfg.seq_len % cfg.pack or cfg.targets % cfg.pack,
         f"--inputs, --seq_len and --targets are not {cfg.pack} examples: see --pack"),
        (cfg.inputs < 4 * cfg.pack,
         f"--inputs {cfg.inputs} in {cfg.pack} examples cannot hold a span: a token, a sentinel, "
         "EOS and, for ul2, a mode are 4"),
        (0 < cfg.seq_len < 2 * cfg.pack,
         f"--seq_len {cfg.seq_len} in {cfg.pack} examples cannot hold a span behind a token"),
        (0 < cfg.targets < 3 * cfg.pack,
         f"--targets {cfg.targets} in {cfg.pack} examples cannot hold a span: a sentinel, a token "
         "and EOS are 3"),
        (cfg.dp * steps * micro != cfg.batch_size,
         f"--batch_size {cfg.batch_size} is not {cfg.dp} ranks x micro-batches of {micro}"),
        (cfg.resume and not cfg.out, "--resume needs --out"),
        ((cfg.init or cfg.export) and not importlib.util.find_spec("safetensors"),
         "--init and --export need the package safetensors: pip install safetensors"),
        (cfg.init and not cfg.tokenizer and not shard_paths(cfg.data),
         f"{cfg.init} has a vocabulary of its own: --tokenizer is missing"),
        (cfg.write_tokens and ranks > 1, "--write_tokens is for one process, without torchrun"),
        (cfg.write_tokens and shard_paths(cfg.data),
         "--write_tokens takes text, and --data is token shards"),
        (cfg.prompt and not cfg.tokenizer and shard_paths(cfg.data),
         "--prompt needs --tokenizer where --data is token shards"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
    if cfg.seq_len > cfg.pack * row_lengths(cfg)[0]:
        raise ValueError(
            f"--seq_len {cfg.seq_len} is more than {cfg.pack * row_lengths(cfg)[0]}, what "
            f"--inputs {cfg.inputs} hold"
        )
    if most_spans(cfg) > cfg.sentinels:
        raise ValueError(
            f"the denoiser {cfg.denoiser} hides up to {most_spans(cfg)} spans in an example of "
            f"{row_lengths(cfg)[0]} tokens, and the vocabulary has {cfg.sentinels} sentinels: "
            "see --sentinels"
        )

def sentinel_names(cfg):
    """The sentinels as special tokens: they count down from the vocabulary's last id."""
    return tuple(f"<extra_id_{k}>" for k in reversed(range(cfg.sentinels)))

def fit_vocabulary(cfg, tokenizer):
    """cfg with the vocabulary and the ids of the tokenizer; without one, those that are given."""
    if tokenizer:
        ids, known = tokenizer._special_tokens, tokenizer.n_vocab
        if 0 < cfg.vocab_size < known:
            raise ValueError(f"--vocab_size {cfg.vocab_size} is below the tokenizer's {known}")
        cfg = dataclasses.replace(
            cfg, vocab_size=cfg.vocab_size or -(-known // 128) * 128, pad=ids[PAD],
            eos=end_token(tokenizer), sentinel=ids["<extra_id_0>"], mode=ids[MODES[0]],
        )  # fmt: skip
    ids = [cfg.pad, cfg.eos, *range(cfg.sentinel - cfg.sentinels + 1, cfg.sentinel + 1)]
    ids += range(cfg.mode, cfg.mode + 3) if cfg.denoiser == "ul2" else ()
    if len({*ids}) < len(ids) or min(ids) < 0 or 0 < cfg.vocab_size <= max(ids):
        raise ValueError(
            f"--vocab_size {cfg.vocab_size} does not hold, each on an id of its own, "
            f"{cfg.sentinels} sentinels from --sentinel {cfg.sentinel} down, --pad {cfg.pad}, "
            f"--eos {cfg.eos} and, for ul2, --mode {cfg.mode} to {cfg.mode + 2}"
        )
    return cfg

def dry_run(cfg):
    """Prints parameters, FLOPs per token and bytes per rank, from shapes alone."""
    cfg = mesh_shape(cfg, cfg.world_size)
    n_vocab = load_tokenizer(cfg.tokenizer or "bytes", SPECIALS + sentinel_names(cfg)).n_vocab
    cfg.vocab_size = cfg.vocab_size or -(-n_vocab // 128) * 128
    check(cfg, cfg.world_size)
    with torch.device("meta"):
        total, activated = count_parameters(T5(cfg))
    print(f"parameters {total:,} | activated {activated:,}")
    # 6 N has each token of the text meet all weights: here inputs meet one stack, targets the other
    print(f"FLOPs per token {flops_per_token(cfg):.4g} | 6 N gives {6 * activated:.4g}", end=" ")
    print("as if each token met both stacks")
    memory = memory_per_rank(cfg)
    for kind, size in (memory | {"sum": sum(memory.values())}).items():
        print(f"{kind:12} {size / 2**30:8.3f} GiB on each of {cfg.world_size} ranks")

def train_on_mesh(model, saved, optimizer, corpora, state, cfg, mesh):
    """Updates until cfg.steps, or until SIGTERM or SIGINT; state says how far it came. saved is
    what a checkpoint holds of the model."""
    device, (corpus, heldout) = torch.device(mesh.device_type), corpora
    place = device, mesh["dp"].get_local_rank(), cfg.dp
    replicas, signals, skipped, pace = parallelize(model, cfg, mesh), [], 0, 0.0
    saved_step = state["step"]
    handlers = {s: signal(s, lambda *_: signals.append(1)) for s in (SIGTERM, SIGINT)}
    while state["step"] < cfg.steps:
        if state["step"] % cfg.val_every == 0:
            loss_of = lambda x: evaluate(model, x, cfg) / cfg.tp  # noqa: E731
            validate(loss_of, heldout, state["step"], cfg, *place)
        started = time.perf_counter()
        first = state["sequences"] + state["offset"]
        batches = next_batches(corpus, first, bool(signals), cfg, *place)
        if batches is None:
            break
        # Departure: in dropout, the ranks of tp draw alike, since what they all have must stay the
        # same. So heads (and hidden units) at the same place of two ranks have the same mask.
        torch.manual_seed(stable_hash(cfg.seed, state["step"], place[1]))
        loss = mesh_gradients(replicas, batches, cfg)
        norm, loss = mesh_norm(model, loss, cfg, device)
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
            bpb = bits_per_byte(loss * batches[0]["n_targets"], batches[0]["n_bytes"])
            row = {"step": state["step"], "loss": loss, "bpb": bpb, "lr": lr, "grad": norm}
            log_step({**row, "tokens": state["tokens"]}, pace, cfg, device)
        skipped = 0 if finite else skipped + 1
        if skipped:
            print(f"step {state['step']} skipped: its gradient is not finite", flush=True)
        if skipped == 3:
            raise ValueError(f"three steps to {state['step']} had no finite gradient")
        if cfg.out and state["step"] % cfg.save_every == 0:
            save_checkpoint(cfg.out, saved, optimizer, state)
            saved_step = state["step"]
    if cfg.out and saved_step < state["step"]:
        save_checkpoint(cfg.out, saved, optimizer, state)
    for signum, handler in handlers.items():
        signal(signum, handler)

def describe_run(model, corpus, cfg, device):
    """Prints versions, layout, model and batch."""
    (length, T, U), (steps, micro) = row_lengths(cfg), split_batch(cfg, cfg.dp)
    with torch.device("meta"):
        total, activated = count_parameters(T5(cfg))
    print(f"python {sys.version.split()[0]} | torch {torch.__version__} | {device.type}", end=" ")
    print(f"{cfg.precision} | tp {cfg.tp} x dp {cfg.dp} |", end=" ")
    print(f"{corpus.n_windows(cfg.seq_len):,} windows to train on")
    print(f"parameters {total:,} | activated {activated:,} | FLOPs per token", end=" ")
    print(f"{flops_per_token(cfg):.3g} | tokens per step {cfg.batch_size * cfg.seq_len:,}", end=" ")
    print(f"= {cfg.dp} ranks x {steps} x {micro} sequences of {cfg.seq_len}:", end=" ")
    print(f"{cfg.pack} x ({length} tokens in {T} inputs, {U} targets)", flush=True)

@record
def main(argv=None):
    """Reads the command line and the data, builds or resumes the run, trains, exports, samples."""
    with one_line_mistakes():
        cfg, ranks = parse(argv), int(os.environ.get("WORLD_SIZE", 1))
        if cfg.dry_run:
            return dry_run(cfg)
        cfg = mesh_shape(cfg, ranks)
        check(cfg, ranks)
        if cfg.init:
            theirs = read_t5_config(cfg.init)
            names = {*HF_CONFIG, "gated"} - {"dropout"}  # which is a choice of this training
            cfg = dataclasses.replace(cfg, **{name: getattr(theirs, name) for name in names})
            check(cfg, ranks)
        known, special = cfg.tokenizer or not shard_paths(cfg.data), SPECIALS + sentinel_names(cfg)
        tokenizer = load_tokenizer(cfg.tokenizer or "bytes", special) if known else None
        documents = tokenize(read_documents(cfg.data), tokenizer)
        documents = ((name, ids[:-1]) for name, ids in documents)  # nothing stands between them
        if cfg.write_tokens:
            return write_tokens(cfg.write_tokens, documents)
        cfg = fit_vocabulary(cfg, tokenizer)
        check(cfg, ranks)
        device = launch(cfg.timeout)
        for folder in filter(None, (cfg.out, cfg.export)):
            Path(folder).mkdir(parents=True, exist_ok=True)
        cfg.seq_len = cfg.seq_len or cfg.pack * row_lengths(cfg)[0]
        sizes = cfg.vocab_size, cfg.batch_size, cfg.seq_len
        corpora = load_corpora(cfg.data, documents, tokenizer, *sizes)

        mesh = init_device_mesh(device.type, (cfg.dp, cfg.tp), mesh_dim_names=("dp", "tp"))
        tp = mesh["tp"].get_group() if cfg.tp > 1 else None
        model = T5(cfg, tp).to(device)
        init_weights(model, cfg, tp)
        if cfg.init:
            read_t5_weights(model, cfg, cfg.init, tp)
        optimizer = build_optimizer(model, cfg)
        saved = nn.ModuleDict({f"tp{mesh['tp'].get_local_rank()}": model})  # names for each part
        state = {"step": 0, "sequences": 0, "tokens": 0, "offset": 0, "seed": cfg.seed}
        if cfg.out:
            load_checkpoint(cfg.out, cfg.resume, cfg.steps, saved, optimizer, state)
        if cfg.out and dist.get_rank() == 0:
            config = json.dumps(dataclasses.asdict(cfg), indent=2)
            (Path(cfg.out) / "config.json").write_text(config + "\n")
        describe_run(model, corpora[0], cfg, device)
        train_on_mesh(model, saved, optimizer, corpora, state, cfg, mesh)
        if state["step"] < cfg.steps:
            return print(f"stopped by a signal after step {state['step']}", flush=True)
        place = device, mesh["dp"].get_local_rank(), cfg.dp
        validate(lambda x: evaluate(model, x, cfg) / cfg.tp, corpora[1], cfg.steps, cfg, *place)
        if cfg.export:
            to_hf(model, cfg, cfg.export)
        if tokenizer:  # token shards do not name theirs
            fill_spans(model, cfg.prompt, corpora[1], cfg)

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
