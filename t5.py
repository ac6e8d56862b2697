r"""Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer
(Raffel et al., 2019, arXiv 1910.10683), T5, in one file.

What is new compared with its parents, bert.py and the Transformer (Vaswani et al., 2017):
- an encoder and a decoder (§2.1): the decoder writes the spans that are missing in the encoder's
  text (§3.1.4, §3.3.4), where BERT predicts each masked token by itself;
- positions enter attention alone, as a learned bias of the scores for each head and bucket of
  distances, which all layers of a stack share (§2.1); scores are not scaled (code);
- norms at the input of each branch (pre-norm), without mean and bias; no bias anywhere (§2.1);
- ReLU in place of GELU (§3.1.1);
- Adafactor, whose rate 1 / sqrt(max(n, 10⁴)) is relative to the RMS of each parameter (§3.1.2),
  and a z-loss, which keeps log Z near 0 (code).
Also T5 v1.1 (gated GELU, untied softmax; github.com/google-research/text-to-text-transfer-
transformer, released_checkpoints.md) and, as --denoiser ul2, the mixture of UL2 (2205.05131).
"Code" means that repository and Mesh TensorFlow's transformer, on which it ran.
Left out: the supervised tasks that the released v1.0 models also saw (§3.7); the cleaning of C4
(§2.2); SentencePiece, for which tiktoken stands in.
--init with a released checkpoint needs token shards of that checkpoint's ids (--data shards/).

Map: §2.1 RelativePositionBias, RelativeBiasAttention, FeedForward, Block, Stack, T5, RMSNorm |
§3.1.2 learning_rate, Adafactor | §3.1.4 replace_spans, corrupt | §3.3.4 span_mask | §3.6, §3.7
PRESETS | UL2 §3.1 UL2.
Legend: B batch, T positions of the encoder, U of the decoder, S of keys, D width, H heads, E head
width, F hidden width, V vocabulary.
Conventions: loss in nats per target, sentinels and EOS included; a target of -100 is not scored;
the z-loss is in the loss of training and not in that of validation. Tokens, and speed, count the
text before it is corrupted, where the paper counts 512 inputs: 568 a row, and 511 where single
tokens are hidden (iid). Bits per byte: the targets' loss in bits, per byte of the hidden text.

Run: python t5.py                           # a laptop: the preset demo
     torchrun --nproc_per_node=8 t5.py      # GPUs: the preset small
     torchrun --nnodes=16 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \
         t5.py --preset t5_11b --data c4/ --tokenizer ranks.tiktoken --vocab_size 0 \
         --out /shared/11b --resume
Expect: in 64 seconds on two CPU cores the demo's held-out loss falls from 6.26 to 1.98 nats per
target (13.6 to 4.3 bits per hidden byte; rounding alone moves the end between 1.74 and 1.98), and
its sample fills in a text, mostly with frequent strings.
T5-base on C4, no dropout, --ramp_down 0.1: 1.997 nats per held-out target after 65,536 updates of
the baseline's batch (GEGLU 1.942), 1.677 after 524,288 (1.633); GLU Variants (2002.05202), Table 1.
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
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

# ---------------------------------------- Config ----------------------------------------

@dataclasses.dataclass
class Config:
    """Run configuration: each field is a command-line flag, and its comment is the flag's help."""

    # Model, §2.1, §3.1.1
    vocab_size: int = 0  # V, entries of the vocabulary; 0: those of the tokenizer, padded to 128
    dim: int = 768  # D, width of the residual stream
    n_layers: int = 12  # blocks of the encoder, and as many of the decoder
    n_heads: int = 12  # H, attention heads
    head_dim: int = 64  # E, width of an attention head; H E need not be D
    hidden_dim: int = 3072  # F, width of the feed-forward layer
    gated: bool = False  # feed-forward layer of v1.1, a gated GELU, in place of ReLU
    tied: bool = True  # the softmax shares the token embedding, scaled by 1 / sqrt(D)
    dropout: float = 0.1  # dropout of stack inputs and outputs, branches, hidden units, attention
    # Data, §2.2, §3.1.4
    data: str = ""  # file or directory of text or token shards; empty: Python's standard library
    tokenizer: str = ""  # "bytes", a tiktoken encoding or a BPE rank file; empty: bytes, for text
    denoiser: Literal["t5", "iid", "ul2"] = "t5"  # t5: spans; iid: single tokens; ul2: UL2's mix
    rate: float = 0.15  # fraction of the tokens that is hidden by the denoisers t5 and iid
    span: float = 3.0  # mean tokens of a span that the denoiser t5 hides
    inputs: int = 512  # T, positions of the encoder, at most
    seq_len: int = 0  # tokens of text in a sequence, at most; 0: as many as the inputs hold
    pad: int = 0  # id of PAD, which begins every target; for token shards without --tokenizer
    eos: int = 1  # id of EOS, which ends inputs and targets; for shards without --tokenizer
    sentinel: int = 32099  # id of the first sentinel; for token shards without --tokenizer
    sentinels: int = 100  # number of sentinels, ids counting down; ul2 needs 127 at 512 inputs
    mode: int = 32100  # id of UL2's [R], then of [S] and [X]; for shards without --tokenizer
    # Optimization, §3.1.2
    batch_size: int = 128  # sequences per update, over all ranks
    micro_batch: int = 0  # sequences per forward pass on one rank; 0: as many as the batch allows
    steps: int = 524288  # updates of the run
    lr: float = 0.01  # maximum learning rate, until 1 / sqrt(updates) is less
    ramp_down: float = 0.0  # fraction of the updates, at the end, in which the rate falls to 0
    z_loss: float = 1e-4  # weight of (log Z)² in the loss
    clip: float = 0.0  # maximum norm of the gradient; 0: no clipping
    seed: int = 0  # seed of the weights, the order of the data, the corruption and dropout
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
    prompt: str = ""  # text to fill in at <extra_id_0>, ..., or at its end; empty: held-out text
    out: str = ""  # directory of checkpoints, metrics.jsonl and config.json; empty: write nothing
    save_every: int = 1000  # updates between checkpoints
    resume: bool = False  # continue from the newest checkpoint in --out, if there is one
    eval: bool = False  # validate and sample the model of --init or --out, without training
    init: str = ""  # Hugging Face checkpoint directory to start from; it sets the model's sizes
    export: str = ""  # directory to write a Hugging Face checkpoint to after training
    write_tokens: str = ""  # directory to write the data to as token shards, then exit

# Undisclosed: V. The code's has 32,000 word-pieces and 100 sentinels, padded to a multiple of 128.
BASELINE = dict(vocab_size=32128, micro_batch=32, precision="bf16", compile=True, denoiser="iid")
# §3.7: spans, 2²⁰ tokens an update, a million updates.
# Undisclosed: batch, updates and learning rate of v1.1. They are those of §3.7 here.
FINAL = BASELINE | dict(denoiser="t5", batch_size=2048, steps=1_000_000)
V1_1 = FINAL | dict(gated=True, tied=False, dropout=0.0)
SHARDED = dict(micro_batch=8, recompute="block")  # for the sizes that need several GPUs
SIZES = ("n_layers", "dim", "hidden_dim", "n_heads", "head_dim")
PRESETS = {
    # For a CPU, about a minute. The rate is constant for 400 updates: 0.05 = 1 / sqrt(400).
    "demo": dict(
        dim=64, n_layers=2, n_heads=4, head_dim=16, hidden_dim=192, dropout=0.0, inputs=48,
        batch_size=48, steps=700, lr=0.05, ramp_down=0.5, log_every=50,
    ),
    # For a GPU of 24 GB or a node of them, minutes: v1.1's base, over bytes.
    "small": dict(
        dim=768, n_layers=12, hidden_dim=2048, gated=True, tied=False, dropout=0.0, batch_size=96,
        micro_batch=12, steps=2000, lr=0.02, ramp_down=0.1, compile=True, val_every=500,
    ),
    # §3.1: the baseline, with the objective of §3.1.4.
    "baseline": BASELINE,
    # §3.7. The paper's 770M for large is the count with an untied softmax.
    # Departure: the released models also saw the supervised tasks; here they see text alone.
    "t5_small": FINAL | dict(zip(SIZES, (6, 512, 2048, 8, 64))),
    "t5_base": FINAL | dict(zip(SIZES, (12, 768, 3072, 12, 64))),
    "t5_large": FINAL | dict(zip(SIZES, (24, 1024, 4096, 16, 64))),
    "t5_3b": FINAL | SHARDED | dict(zip(SIZES, (24, 1024, 16384, 32, 128))),
    "t5_11b": FINAL | SHARDED | dict(zip(SIZES, (24, 1024, 65536, 128, 128))),
    # §3.6: the shape of large, and other depths; four times the baseline's computation each.
    "2x": BASELINE | dict(zip(SIZES, (16, 1024, 4096, 16, 64)), steps=2 * 524288),
    "4x": BASELINE | dict(zip(SIZES, (32, 1024, 4096, 16, 64))),
    # v1.1, released_checkpoints.md.
    "v1_1_small": V1_1 | dict(zip(SIZES, (8, 512, 1024, 6, 64))),
    "v1_1_base": V1_1 | dict(zip(SIZES, (12, 768, 2048, 12, 64))),
    "v1_1_large": V1_1 | dict(zip(SIZES, (24, 1024, 2816, 16, 64))),
    "v1_1_xl": V1_1 | SHARDED | dict(zip(SIZES, (24, 2048, 5120, 32, 64))),
    "v1_1_xxl": V1_1 | SHARDED | dict(zip(SIZES, (24, 4096, 10240, 64, 64))),
}  # fmt: skip
# Departure: the default text is Python's standard library instead of C4 (§2.2). About 5 % of the
# documents are held out, where C4 has a split of its own.
# Departure: tiktoken, over bytes by default, stands for the paper's 32,000 SentencePieces, so that
# PAD, EOS and sentinels have other ids than the code's 0, 1 and 32099 down. Token shards without a
# --tokenizer have the code's, or those of --pad, --eos and --sentinel.
END = "</s>"  # EOS: ends inputs and targets; documents have no separator
MODES = ("[R]", "[S]", "[X]")
SPECIALS = (END, "<pad>", *MODES)  # the sentinels follow; <extra_id_0> has the tokenizer's last id
PATTERN = (  # how GPT-4 and Llama 3 split text into words, for BPE rank files
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

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

@functools.lru_cache(8)
def relative_position_buckets(length, bidirectional, device):
    """§2.1: the bucket of each query and key, int64 [T, T], by relative position: one for each
    small distance, then ever wider ones on a logarithmic scale to 128. If bidirectional, buckets 16
    to 31 are for keys after the query (16 stays unused); else those are masked, and in bucket 0.

    Computed on the CPU, since some distances lie on the border of two buckets, where the rounding
    of a device's logarithm could decide otherwise.
    """
    # Undisclosed: where each bucket begins. As in the code the last one begins at a distance of 91
    # if bidirectional, else of 113: less than the "offset of 128" of the paper.
    position = torch.arange(length, device="cpu")
    relative = position[None] - position[:, None]  # key - query
    distance = relative.abs() if bidirectional else (-relative).clamp(min=0)
    offset = 16 * (bidirectional & (relative > 0))
    buckets = 16 if bidirectional else 32
    exact = buckets // 2
    scale = torch.log(distance.clamp(min=1).float() / exact) / math.log(128 / exact)  # 1 at 128
    far = (exact + (scale * (buckets - exact)).long()).clamp(max=buckets - 1)
    return (offset + torch.where(distance < exact, distance, far)).to(device)

class RelativePositionBias(nn.Module):
    """§2.1: a learned scalar for each head and bucket of relative positions: [H, T, T]."""

    def __init__(self, n_heads, bidirectional):
        super().__init__()
        self.bidirectional = bidirectional
        self.table = nn.Embedding(32, n_heads)

    def forward(self, length):
        device = self.table.weight.device
        buckets = relative_position_buckets(length, self.bidirectional, device)  # [T, T]
        # Contiguous, since a GPU's fused attention takes no other mask.
        return self.table(buckets).permute(2, 0, 1).contiguous()  # [H, T, T]

class RelativeBiasAttention(nn.Module):
    """softmax(q kᵀ + bias) v W_o with queries of x [B, T, D], keys and values of memory [B, S, D]:
    [B, T, D]. bias is None or broadcasts to [B, H, T, S]; -inf masks a key."""

    # Undisclosed: that scores are not scaled by 1 / sqrt(E); the code's initial W_q is smaller.

    def __init__(self, dim, n_heads, head_dim, dropout):
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.q = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.k = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.v = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.out = nn.Linear(n_heads * head_dim, dim, bias=False)

    def forward(self, x, memory, bias):
        q = self.q(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # [B, H, T, E]
        k = self.k(memory).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # [B, H, S, E]
        v = self.v(memory).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # [B, H, S, E]
        p = self.dropout if self.training else 0.0
        o = F.scaled_dot_product_attention(q, k, v, bias, p, scale=1.0)  # [B, H, T, E]
        return self.out(o.transpose(1, 2).flatten(2))  # [B, T, D]

class FeedForward(nn.Module):
    """W_o ReLU(W_i x) or, in v1.1, W_o (GELU(W_i0 x) * W_i1 x), with the tanh form of GELU and
    dropout on the hidden units (code): [B, T, D] -> [B, T, D]."""

    def __init__(self, dim, hidden_dim, gated, dropout):
        super().__init__()
        self.dropout = dropout
        self.gate = nn.Linear(dim, hidden_dim, bias=False) if gated else None
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x):
        if self.gate is None:
            x = F.relu(self.up(x))  # [B, T, F]
        else:
            x = F.gelu(self.gate(x), approximate="tanh") * self.up(x)  # [B, T, F]
        return self.down(F.dropout(x, self.dropout, self.training))  # [B, T, D]

class Block(nn.Module):
    """§2.1: x + dropout(branch(norm(x))) for self-attention, in a decoder for attention to memory,
    the encoder's output [B, S, D], and for the feed-forward layer: [B, T, D] -> [B, T, D]."""

    def __init__(self, cfg, decoder):
        super().__init__()
        attention = cfg.dim, cfg.n_heads, cfg.head_dim, cfg.dropout
        self.dropout = cfg.dropout
        # Undisclosed: the eps of norms; the code's 1e-6.
        self.attn_norm = RMSNorm(cfg.dim, 1e-6)
        self.attn = RelativeBiasAttention(*attention)
        self.cross_norm = RMSNorm(cfg.dim, 1e-6) if decoder else None
        self.cross = RelativeBiasAttention(*attention) if decoder else None
        self.ff_norm = RMSNorm(cfg.dim, 1e-6)
        self.ff = FeedForward(cfg.dim, cfg.hidden_dim, cfg.gated, cfg.dropout)

    def forward(self, x, bias, memory=None, memory_bias=None):
        # Departure: dropout draws a mask for every position. The code draws one for all positions
        # of a sequence, and for all queries of a head; common ports do as this script.
        y = self.attn_norm(x)
        x = x + F.dropout(self.attn(y, y, bias), self.dropout, self.training)
        if self.cross is not None:
            y = self.cross(self.cross_norm(x), memory, memory_bias)
            x = x + F.dropout(y, self.dropout, self.training)
        return x + F.dropout(self.ff(self.ff_norm(x)), self.dropout, self.training)

class Stack(nn.Module):
    """The encoder or the decoder, a list of blocks: embedded [B, T, D] -> [B, T, D]. mask [T, T] or
    [B, 1, 1, T] is -inf at keys that are not to be seen and 0 at others; None: all are seen."""

    def __init__(self, blocks, dim, n_heads, dropout, bidirectional):
        super().__init__()
        self.dropout = dropout
        self.relative = RelativePositionBias(n_heads, bidirectional)
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = RMSNorm(dim, 1e-6)

    def forward(self, x, mask, memory=None, memory_bias=None):
        bias = self.relative(x.shape[1])[None]  # [1, H, T, T]
        if mask is not None:
            bias = bias + mask  # [1 or B, H, T, T]
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x, bias, memory, memory_bias)
        return F.dropout(self.final_norm(x), self.dropout, self.training)

class T5(nn.Module):
    """Source [B, T] and shifted target [B, U] -> logits [B, U, V] in fp32. source_mask [B, T] is
    true at tokens and false at padding; None: all are tokens."""

    def __init__(self, cfg):
        super().__init__()
        # Undisclosed: the scale of a tied softmax's input; the code's.
        self.scale = cfg.dim**-0.5 if cfg.tied else 1.0
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.dim)
        encoder = [Block(cfg, decoder=False) for _ in range(cfg.n_layers)]
        decoder = [Block(cfg, decoder=True) for _ in range(cfg.n_layers)]
        self.encoder = Stack(encoder, cfg.dim, cfg.n_heads, cfg.dropout, bidirectional=True)
        self.decoder = Stack(decoder, cfg.dim, cfg.n_heads, cfg.dropout, bidirectional=False)
        self.head = None if cfg.tied else nn.Linear(cfg.dim, cfg.vocab_size, bias=False)

    def forward(self, source, target_in, source_mask=None):
        # Departure: states of padding are not set to 0, since nothing sees them; masked scores are
        # -inf, where the code has -1e9.
        padding = None
        if source_mask is not None:
            padding = torch.where(source_mask, 0.0, -math.inf)[:, None, None]  # [B, 1, 1, T]
        memory = self.encoder(self.token_embedding(source), padding)  # [B, T, D]
        # -inf above the diagonal: [U, U]
        future = nn.Transformer.generate_square_subsequent_mask(target_in.shape[1], source.device)
        x = self.decoder(self.token_embedding(target_in), future, memory, padding)  # [B, U, D]
        weight = self.token_embedding.weight if self.head is None else self.head.weight
        return F.linear(x * self.scale, weight).float()

def init_weights(model, cfg):
    """Embeddings N(0, 1); matrices N(0, 1 / fan-in), truncated at two sigma for the feed-forward
    layers and v1.1's softmax; W_q smaller by sqrt(E), since scores are not scaled; gains 1; the
    table of relative positions uniform.

    Each parameter is drawn from a generator seeded by (seed, name), so that every layout
    starts from the same numbers. Raises ValueError for a parameter without a rule.
    """
    # Undisclosed: the initialisation; the code's.
    for name, p in model.named_parameters():
        generator = torch.Generator().manual_seed(stable_hash(cfg.seed, name))
        value = torch.empty(p.shape)
        std = p.shape[-1] ** -0.5
        if name == "token_embedding.weight":
            value.normal_(0.0, 1.0, generator=generator)
        elif name.endswith(".q.weight"):
            value.normal_(0.0, std * cfg.head_dim**-0.5, generator=generator)
        elif re.search(r"\.(k|v|out)\.weight$", name):
            value.normal_(0.0, std, generator=generator)
        elif re.search(r"\.(gate|up|down)\.weight$|^head\.weight$", name):
            nn.init.trunc_normal_(value, 0.0, std, -2 * std, 2 * std, generator=generator)
        elif name.endswith("relative.table.weight"):  # Glorot and Bengio's, TensorFlow's default
            nn.init.xavier_uniform_(value, generator=generator)
        elif name.endswith("norm.weight"):
            value.fill_(1.0)
        else:
            raise ValueError(f"no rule initialises {name}")
        fill_parameter(p, value)

def count_parameters(model):
    """(total, activated) parameters; tied weights count once, a dense model activates all."""
    total = sum(p.numel() for p in model.parameters())
    return total, total

def flops_per_token(cfg):
    """Training FLOPs per token of text: 2 per weight of a matrix product forward, twice that
    backward. The decoder's self-attention counts as causal, (U + 1) / 2 keys per query; padding
    counts as tokens."""
    length, T, U = row_lengths(cfg)
    inner = cfg.n_heads * cfg.head_dim
    mlp = (3 if cfg.gated else 2) * cfg.dim * cfg.hidden_dim
    # Of a layer, per position of the source (with the decoder's keys and values of memory), and of
    # the target: six matrices D x H E, feed-forward layer, scores and their weighted sums.
    source = 6 * cfg.dim * inner + mlp + 2 * inner * T
    target = 6 * cfg.dim * inner + mlp + 2 * inner * ((U + 1) / 2 + T)
    return 6 * (cfg.n_layers * (T * source + U * target) + U * cfg.dim * cfg.vocab_size) / length

# ---------------------------------------- Data ----------------------------------------

# UL2 §3.1: (mode, rate, mean span). The S-denoiser hides a suffix of a quarter of the tokens: a
# single span is always the end of the text.
# Undisclosed: how often each denoiser is used. Each is drawn with the same probability.
UL2 = (
    ("[R]", 0.15, 3.0), ("[R]", 0.15, 8.0), ("[S]", 0.25, math.inf),
    ("[X]", 0.5, 3.0), ("[X]", 0.5, 8.0), ("[X]", 0.15, 64.0), ("[X]", 0.5, 64.0),
)  # fmt: skip

def count_noise(length, rate, span):
    """(tokens, spans) to hide of `length` tokens; halves are rounded to even (code)."""
    noise = min(max(round(length * rate), 1), length - 1)
    spans = max(round(noise / span), 1)
    # Departure: where kept tokens are fewer than spans, the code fails; here spans are as few.
    return noise, min(spans, length - noise)

def moves_span(mode, length, rate, span):
    """Whether the span is moved, cyclically (code): the only one of an X-denoiser, which otherwise
    would hide a suffix, as S does. It takes a sentinel more: in the inputs where it is cut in two,
    in the targets where kept tokens are on both sides."""
    return mode == "[X]" and count_noise(length, rate, span)[1] == 1

def encoded_lengths(length, mode, rate, span):
    """(inputs, targets), at most, of `length` tokens: mode, sentinels and EOS included."""
    noise, spans = count_noise(length, rate, span)
    sentinels = spans + moves_span(mode, length, rate, span)
    return bool(mode) + length - noise + sentinels + 1, noise + sentinels + 1

@functools.cache
def fitting_length(inputs, mode, rate, span):
    """The most tokens whose encoded inputs fit: 568 for 512 (code)."""
    length = 2
    while encoded_lengths(length + 1, mode, rate, span)[0] <= inputs:
        length += 1
    # At a rate of 0.5, targets may exceed the inputs by one; one token less avoids it (code).
    # Departure: a row then has the targets of the shorter text. The code takes one from the count
    # of the longer: for spans of 16 in 26 inputs 26, of which 25 are used.
    if rate == 0.5 and encoded_lengths(length, mode, rate, span)[1] > inputs:
        length -= 1
    return length

def denoisers(cfg):
    """(tokens of an example, mode, rate, mean span) of each denoiser that hides spans."""
    mix = UL2 if cfg.denoiser == "ul2" else [("", cfg.rate, cfg.span)]
    lengths = [fitting_length(cfg.inputs, *denoiser) for denoiser in mix]
    return [(min(n, cfg.seq_len or n), *denoiser) for n, denoiser in zip(lengths, mix)]

def row_lengths(cfg):
    """(tokens of text, inputs, targets), at most, of an example."""
    if cfg.denoiser == "iid":  # the number of runs is random
        length = min(cfg.inputs - 1, cfg.seq_len or cfg.inputs)
        # Undisclosed: the number of targets. The code has 192 for 512 inputs at a rate of 0.15; at
        # others it is in proportion here.
        return length, length + 1, math.ceil(2.5 * cfg.rate * (length + 1))
    lengths = [(example[0], *encoded_lengths(*example)) for example in denoisers(cfg)]
    return tuple(map(max, zip(*lengths)))

def random_parts(n, parts, rng):
    """Lengths of `parts` non-empty parts of n, drawn uniformly among all compositions."""
    cuts = np.sort(rng.choice(n - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=n)

def span_mask(length, rate, span, rng):
    """Which tokens are hidden, bool [length]: kept and hidden spans alternate, so that the first
    token is always kept and the last one always hidden."""
    # Undisclosed: how spans are drawn, beyond their number and mean (§3.3.4); as in the code.
    noise, spans = count_noise(length, rate, span)
    kept = random_parts(length - noise, spans, rng)
    hidden = random_parts(noise, spans, rng)
    return np.repeat([False, True] * spans, np.stack((kept, hidden), 1).ravel())

def replace_spans(ids, mask, sentinel):
    """ids with each run of the mask replaced by a sentinel: sentinel, sentinel - 1, ..."""
    starts = mask & np.diff(mask, prepend=False)  # the first token of each run
    return np.where(starts, sentinel + 1 - np.cumsum(starts), ids)[starts | ~mask]

def corrupt(ids, rng, cfg):
    """(inputs, targets) of a window of text, without EOS: the kept tokens with a sentinel for each
    hidden span, and the hidden tokens with a sentinel for each kept span (§3.1.4)."""
    # Departure: the paper's Figure 2 closes the targets with a sentinel. The code and this script
    # end them with the last hidden span; a sentinel closes them only if the last token is kept,
    # which happens where single tokens are hidden, or a span is moved.
    mode = []
    if cfg.denoiser == "iid":  # §3.1.4
        mask = rng.random(len(ids)) < cfg.rate
        # Departure: the code does not limit the spans to its sentinels; here the text beyond the
        # last sentinel is kept.
        mask &= np.cumsum(mask & np.diff(mask, prepend=False)) < cfg.sentinels
    else:
        mix = denoisers(cfg)
        length, name, rate, span = mix[rng.integers(len(mix))]
        mode = [cfg.mode + MODES.index(name)] if name else []
        # Departure: a window is what the longest denoiser takes; of it, the others leave the end
        # unused. A shorter window for each would have to know the draws before it.
        ids = ids[:length]
        mask = span_mask(length, rate, span, rng)
        if moves_span(name, length, rate, span):
            mask = np.roll(mask, rng.integers(length))
    inputs = [*mode, *replace_spans(ids, mask, cfg.sentinel)]
    return inputs, replace_spans(ids, ~mask, cfg.sentinel)

def get_batch(corpus, first, n, cfg):
    """Windows first ... first + n - 1 of the run: source [n, T], target_in and targets [n, U], the
    source_mask [n, T] of denoisers that do not fill every row, and the counts n_targets and n_bytes
    (of the hidden text).

    A pure function of the seed and the index, so that any number of ranks, any accumulation and
    any resume see the same sequences. Targets of -100 are not scored.
    """
    # Undisclosed: how documents become sequences. As in the code they are joined without separators
    # and cut into windows; each epoch reads them in random order, at a random offset.
    # Departure: the stream is the whole corpus. The code concatenates 128 documents at a time, and
    # packs the shorter pieces that are left, several in a row.
    # Departure: a long document is read whole; the code takes 65,536 tokens of it, at random.
    length, T, U = row_lengths(cfg)
    source = torch.full((n, T), cfg.pad)
    target_in = torch.full((n, U), cfg.pad)
    targets = torch.full((n, U), -100)
    source_mask = torch.zeros(n, T, dtype=torch.bool)
    for row in range(n):
        window = corpus.window(first + row, length, cfg.seed)[:-1]
        is_sentinel = (window > cfg.sentinel - cfg.sentinels) & (window <= cfg.sentinel)
        if is_sentinel.any():
            message = f"the data has token id {window[is_sentinel][0]}, which is a sentinel's"
            raise ValueError(f"{message}: see --sentinel, --tokenizer")
        rng = np.random.default_rng(stable_hash(cfg.seed, "corruption", first + row))
        inputs, outputs = corrupt(window, rng, cfg)
        outputs = torch.tensor([*outputs[: U - 1], cfg.eos])
        source[row, : len(inputs) + 1] = torch.tensor([*inputs, cfg.eos])
        source_mask[row, : len(inputs) + 1] = True
        targets[row, : len(outputs)] = outputs
        # Undisclosed: the first input of the decoder. In the code it is PAD.
        target_in[row, 1 : len(outputs)] = outputs[:-1]  # shifted right behind PAD
    scored = targets[targets >= 0].numpy()
    counts = {"n_targets": len(scored), "n_bytes": int(corpus.token_bytes[scored].sum())}
    batch = {"source": source, "target_in": target_in, "targets": targets, **counts}
    if cfg.denoiser != "t5":
        batch["source_mask"] = source_mask
    return batch

# ---------------------------------------- Objective ----------------------------------------

def objective(model, batch, cfg):
    """Cross-entropy of the targets and, in training, z_loss (log Z)² each: sums over the batch,
    divided by batch["n_targets"], the count of the whole global batch; and no metrics."""
    # Undisclosed: the z-loss and its weight, which are the code's.
    # Departure: the code divides by all target positions. That is the same where rows are full.
    with torch.autocast(batch["source"].device.type, torch.bfloat16, cfg.precision == "bf16"):
        logits = model(batch["source"], batch["target_in"], batch.get("source_mask"))  # [B, U, V]
    targets = batch["targets"]  # [B, U]
    log_z = logits.logsumexp(-1)
    loss = log_z - logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]  # [B, U]
    if torch.is_grad_enabled():  # not in validation
        loss = loss + cfg.z_loss * log_z.square()
    return loss.masked_fill(targets < 0, 0.0).sum() / batch["n_targets"], {}

# ---------------------------------------- Optimizer ----------------------------------------

class Adafactor(torch.optim.Optimizer):
    """Adafactor as used in §3.1.2 (code): no momentum, second moments factored into means of rows
    and of columns, updates clipped to RMS 1 and scaled by the RMS of their parameter. Parameters
    may be sharded by rows: means are those of the complete matrix. A vector is one column."""

    # Undisclosed: the settings of Adafactor; all are the code's.
    # Departure: the code factors only where both sides have 128 or more, which at the published
    # sizes all matrices have, except the tables of relative positions.

    def __init__(self, parameters, lr):
        super().__init__(parameters, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            value = local_rows(p)
            g = local_rows(p.grad)
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["rows"] = torch.zeros_like(p[:, :1] if p.ndim == 2 else p)
                state["columns"] = torch.zeros_like(g.sum(0, keepdim=True))
            state["step"] += 1
            weight = state["step"].item() ** -0.8  # 1 - β2
            square = g.square() + 1e-30
            mean = sum_of_shards(square.sum(0, keepdim=True), p) / len(p)
            rows = local_rows(state["rows"]).lerp_(square.mean(1, keepdim=True), weight)
            columns = state["columns"].lerp_(mean, weight)
            # g / sqrt(v), with v = rows columns / mean(rows), and mean(rows) = mean(columns)
            update = g * (rows / columns.mean()).rsqrt() * columns.rsqrt()
            rms = (sum_of_shards(update.square().sum(), p) / p.numel()).sqrt()
            scale = (sum_of_shards(value.square().sum(), p) / p.numel()).sqrt()
            lr = self.param_groups[0]["lr"] * scale.clamp(min=1e-3)
            value -= lr / rms.clamp(min=1.0) * update

def local_rows(x):
    """This rank's rows of a parameter or a gradient, as a matrix."""
    x = x.to_local() if isinstance(x, DTensor) else x
    return x if x.ndim == 2 else x[:, None]

def sum_of_shards(x, p):
    """x summed over the ranks that have rows of the parameter p."""
    if isinstance(p, DTensor):
        dist.all_reduce(x, group=p.device_mesh.get_group())
    return x

def build_optimizer(model, cfg):
    """§3.1.2: Adafactor for all parameters; no weight decay."""
    return Adafactor(model.parameters(), lr=cfg.lr)

def learning_rate(step, cfg):
    """§3.1.2: 1 / sqrt(max(n, k)), where cfg.lr is 1 / sqrt(k), relative to the RMS of parameters;
    step counts the updates made before. The text says that it "exponentially decays"; its formula,
    and the code, do not. ramp_down is 0 for T5 (code), and 0.1 in GLU Variants (2002.05202).
    """
    rate = min(cfg.lr, (step + 1) ** -0.5)
    if cfg.ramp_down:
        rate *= min(1, (cfg.steps - step) / (cfg.ramp_down * cfg.steps))
    return rate

# ---------------------------------------- Precision ----------------------------------------

# Undisclosed: the precision. As in the code, parameters, gradients and Adafactor's moments are
# fp32. Under bf16, autocast (in objective) runs matrix products and attention in bf16; norms,
# softmax and loss are fp32. Logits of the vocabulary are products, and thus rounded to bf16.
# Departure: residual sums are fp32 (in the code bf16), and attention rounds the bias of relative
# positions to bf16 (in the code it is fp32).

PEAK_FLOPS = {"bf16": {  # dense, by precision and the device's exact name; others get no MFU
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA B200": 2250e12,
}}  # fmt: skip

# ---------------------------------------- Parallelism ----------------------------------------

def parallelize(model, cfg, mesh):
    """Data parallelism with parameters, gradients and optimizer state sharded over the ranks
    (FSDP), where there are several. Recomputation and compilation are applied to the blocks first.
    """
    # Departure: the paper combines data parallelism with model parallelism, which splits heads,
    # hidden units and vocabulary over devices (§2.1, Mesh TensorFlow). Here every rank computes
    # whole layers, and only their storage is sharded: all published sizes fit in that way.
    blocks = [*model.encoder.blocks, *model.decoder.blocks]
    for block in blocks:
        if cfg.recompute == "block":
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if cfg.compile:
            torch.compiler.config.fail_on_recompile_limit_hit = True
            block.compile(dynamic=False)
    if mesh.size() == 1:
        return model
    # Matrices are gathered in the precision of their products; gradients are averaged in fp32.
    dtype = torch.bfloat16 if cfg.precision == "bf16" else None
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)  # the rest stays fp32
    return model

def fill_parameter(p, value):
    """Write value, the complete tensor, to a parameter that may be sharded."""
    if isinstance(p, DTensor):
        value = value.to(p.device, p.dtype)
        value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
    p.data.copy_(value)

# ---------------------------------------- Checkpoint ----------------------------------------

HF_CONFIG = {  # field of Config: (key in config.json, default of T5Config)
    "vocab_size": ("vocab_size", 32128), "dim": ("d_model", 512), "n_layers": ("num_layers", 6),
    "n_heads": ("num_heads", 8), "head_dim": ("d_kv", 64), "hidden_dim": ("d_ff", 2048),
    "gated": ("feed_forward_proj", "relu"), "tied": ("tie_word_embeddings", True),
    "pad": ("pad_token_id", 0), "eos": ("eos_token_id", 1),
}  # fmt: skip
HF_NAMES = {  # part of a parameter's name here: its name in T5ForConditionalGeneration
    "token_embedding": "shared", "blocks": "block", "attn_norm": "layer.0.layer_norm",
    "cross_norm": "layer.1.layer_norm", "ff_norm": "layer.FF.layer_norm", ".out.": ".o.",
    "attn.": "layer.0.SelfAttention.", "cross.": "layer.1.EncDecAttention.",
    "relative.table": "block.0.layer.0.SelfAttention.relative_attention_bias",
    "final_norm": "final_layer_norm", "ff.": "layer.FF.DenseReluDense.", "gate": "wi_0",
    "down": "wo", "head": "lm_head",
}  # fmt: skip
SHAPE = tuple(HF_CONFIG)  # fields of Config that must agree with a checkpoint

def t5_name(name, gated):
    """Hugging Face's name of a parameter."""
    for ours, theirs in (HF_NAMES | {"up": "wi_1" if gated else "wi"}).items():
        name = name.replace(ours, theirs)
    return name.replace("FF", "2" if name.startswith("decoder") else "1")

def fixed_keys(cfg):
    """Keys of config.json with the only values that are supported, some of which depend on cfg."""
    return {
        "model_type": "t5", "is_encoder_decoder": True, "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
        "num_decoder_layers": cfg.n_layers, "decoder_start_token_id": cfg.pad,
        "feed_forward_proj": "gated-gelu" if cfg.gated else "relu",
    }  # fmt: skip

def from_hf(path):
    """(model, cfg) from the checkpoint directory of a T5ForConditionalGeneration."""
    with explain(f"{path} holds no T5ForConditionalGeneration", Exception):
        cfg = Config(**read_hf_config(path, HF_CONFIG, {}))
        cfg.gated = cfg.gated == "gated-gelu"
        # In transformers 5 tie_word_embeddings is always true, and this key has its old meaning.
        scaled = {"tied": ("scale_decoder_outputs", cfg.tied)}
        cfg.tied = read_hf_config(path, scaled, fixed_keys(cfg))["tied"]
        tensors = read_hf_tensors(path)
        if not cfg.tied and "lm_head.weight" not in tensors:  # transformers 5 ties all T5 models
            print(f"{path} holds no lm_head.weight: the softmax begins as the embedding")
            tensors["lm_head.weight"] = tensors["shared.weight"].clone()
        with torch.device("meta"):
            model = T5(cfg)
        values = {name: tensors[t5_name(name, cfg.gated)].float() for name in model.state_dict()}
        model.load_state_dict(values, assign=True)
    return model, cfg

def to_hf(model, cfg, path):
    """Write model to the directory path as a T5ForConditionalGeneration; all ranks call this.
    Transformers 5 reads an untied softmax as it is here, and warns that it is not tied."""
    from safetensors.torch import save_file

    config = {key: getattr(cfg, field) for field, (key, _) in HF_CONFIG.items()} | fixed_keys(cfg)
    config |= {"dropout_rate": cfg.dropout, "architectures": ["T5ForConditionalGeneration"]}
    writes = not dist.is_initialized() or dist.get_rank() == 0
    tensors = {}
    for name, p in model.named_parameters():
        value = p.full_tensor() if isinstance(p, DTensor) else p
        if writes:
            tensors[t5_name(name, cfg.gated)] = value.detach().cpu()
    if writes:
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

def sample(model, source, n, cfg):
    """The likeliest targets of source, a list of ids: one at a time, up to EOS or n. All ranks call
    this."""
    device = model.token_embedding.weight.device
    source = torch.tensor([source], device=device)  # [1, T]
    ids = [cfg.pad]
    autocast = torch.autocast(device.type, torch.bfloat16, cfg.precision == "bf16")
    with evaluation_mode(model, cfg.compile), autocast:
        while len(ids) <= n and ids[-1] != cfg.eos:
            logits = model(source, torch.tensor([ids], device=device))  # [1, U, V]
            ids.append(logits[0, -1].argmax().item())
    return ids[1:]

def fill_spans(model, text, heldout, tokenizer, cfg):
    """Print a text, by default the first held-out one, with sentinels in place of its hidden spans,
    and the same text with the spans that the model predicts in ⟦ ⟧."""
    length, _, U = row_lengths(cfg)
    sentinels = range(cfg.sentinel - cfg.sentinels + 1, cfg.sentinel + 1)
    if text:
        names = set(sentinel_names(cfg.sentinels))
        ids = tokenizer.encode(text, allowed_special=names, disallowed_special=())
        if set(ids).isdisjoint(sentinels):
            ids.append(cfg.sentinel)
        if cfg.denoiser == "ul2":
            ids.insert(0, cfg.mode)  # [R]
    else:
        rng = np.random.default_rng(stable_hash(cfg.seed, "prompt"))
        ids, _ = corrupt(heldout.read(0, length), rng, cfg)
    predicted = sample(model, [*ids, cfg.eos], U, cfg)
    predicted = [i for i in predicted if i in sentinels or heldout.token_bytes[i]]  # no PAD, EOS
    mark = r"(<extra_id_\d+>)"
    parts = re.split(mark, tokenizer.decode(predicted))
    spans = dict(zip(parts[1::2], parts[2::2]))
    text = tokenizer.decode(ids)
    filled = re.sub(mark, lambda match: f"⟦{spans.get(match[0], '')}⟧", text)
    print(text, filled, sep="\n---\n")

def check(cfg, ranks):
    """Raise ValueError for a configuration that cannot run on that many ranks."""
    for field in dataclasses.fields(cfg):
        least = int(field.type is int and field.default > 0 and field.name not in ("eos", "mode"))
        if field.type in (int, float) and not least <= getattr(cfg, field.name) < math.inf:
            raise ValueError(f"--{field.name} {getattr(cfg, field.name)} is not {least} or more")
    n_micro, micro = split_batch(cfg, ranks)
    for wrong, message in (
        (not 0 < cfg.rate < 1, f"--rate {cfg.rate} is not between 0 and 1"),
        (cfg.span < 1, f"--span {cfg.span} is less than a token"),
        (cfg.dropout >= 1, f"--dropout {cfg.dropout} is not less than 1"),
        (cfg.ramp_down > 1, f"--ramp_down {cfg.ramp_down} is more than 1"),
        (cfg.inputs < 5, f"--inputs {cfg.inputs} cannot hold mode, token, sentinels and EOS"),
        (ranks * n_micro * micro != cfg.batch_size,
         f"--batch_size {cfg.batch_size} is not {ranks} ranks x n micro-batches of {micro}"),
        (cfg.resume and not cfg.out, "--resume needs --out"),
        (cfg.eval and not cfg.out and not cfg.init, "--eval needs --out or --init"),
        (cfg.write_tokens and ranks > 1, "--write_tokens runs in one process, without torchrun"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
    length = row_lengths(cfg)[0]
    n_spans = max(count_noise(n, rate, span)[1] for n, _, rate, span in denoisers(cfg))
    if cfg.denoiser == "iid":  # half more than the mean, which at 511 tokens is five sigma
        n_spans = math.ceil(1.5 * length * cfg.rate * (1 - cfg.rate))
    if n_spans > cfg.sentinels:
        hides = f"hides up to {n_spans} spans in an example of {length} tokens"
        raise ValueError(f"--denoiser {cfg.denoiser} {hides}: --sentinels is too small")
    check_directories(cfg.init, cfg.export, cfg.write_tokens)

def sentinel_names(n):
    """Names of n sentinels in the order of their ids; <extra_id_0> has the last id."""
    return tuple(f"<extra_id_{k}>" for k in reversed(range(n)))

def load_vocabulary(cfg, is_text):
    """The tokenizer of --tokenizer, by default bytes for text, or None for token shards without it.
    Sets vocab_size and the special ids in cfg to those of the tokenizer. Raises ValueError if two
    special ids are the same, or one is outside of the vocabulary."""
    tokenizer = None
    if cfg.tokenizer or is_text:
        specials = SPECIALS + sentinel_names(cfg.sentinels)
        tokenizer = load_tokenizer(cfg.tokenizer or "bytes", specials)
        padded = 128 * math.ceil(tokenizer.n_vocab / 128)  # as the code pads it
        cfg.vocab_size = cfg.vocab_size or padded
        names = "<pad></s><extra_id_0>[R]"
        cfg.pad, cfg.eos, cfg.sentinel, cfg.mode = tokenizer.encode(names, allowed_special="all")
    if not tokenizer or cfg.vocab_size != padded:
        vocabulary_size(cfg.vocab_size, tokenizer, cfg.init)
    ids = [cfg.pad, cfg.eos, *range(cfg.sentinel - cfg.sentinels + 1, cfg.sentinel + 1)]
    if cfg.denoiser == "ul2":
        ids += range(cfg.mode, cfg.mode + len(MODES))
    if len(set(ids)) < len(ids) or min(ids) < 0 or max(ids) >= cfg.vocab_size:
        sentinels = f"{cfg.sentinels} sentinels from --sentinel {cfg.sentinel} down"
        others = f"--pad {cfg.pad}, --eos {cfg.eos}, for ul2 --mode {cfg.mode} to {cfg.mode + 2}"
        raise ValueError(f"--vocab_size {cfg.vocab_size} lacks distinct {sentinels}, {others}")
    return tokenizer

def dry_run(cfg):
    """Print parameters, FLOPs per token and memory per rank, computed from shapes alone."""
    ranks = cfg.world_size
    if not cfg.vocab_size:
        load_vocabulary(cfg, is_text=True)
    check(cfg, ranks)
    with torch.device("meta"):
        model = T5(cfg)
    total, activated = count_parameters(model)
    print(f"parameters {total:,} | activated {activated:,}")
    # 6 N is more: inputs meet the weights of one stack only, and targets those of the other.
    print(f"FLOPs per token {flops_per_token(cfg):.4g} | 6 N gives {6 * activated:.4g}")
    # Kept for the backward pass, in bytes per position and branch: the norm's input and normalised
    # output in fp32; the inputs of products, which autocast casts anew for each of q, k and v; q,
    # k, v and what attention gives; hidden units; a byte per entry of a GPU's dropout masks. The
    # decoder's keys and values of memory have the T positions of the encoder. The peak is at the
    # start of the backward pass, when the loss holds five fp32 tensors of V per target; with
    # recomputation, which keeps each block's fp32 input, it is there or in a recomputed block.
    _, T, U = row_lengths(cfg)
    size = 2 if cfg.precision == "bf16" else 4
    inner = size * cfg.n_heads * cfg.head_dim
    cast = size * cfg.dim * (size == 2)
    norm = (8 + size + (cfg.dropout > 0)) * cfg.dim
    attention = norm + 4 * inner + 2 * cast
    mlp = norm + size * cfg.hidden_dim * (4 if cfg.gated else 1)
    mlp += (size + 1) * cfg.hidden_dim * (cfg.dropout > 0)
    encoder = T * (attention + mlp)
    decoder = U * (attention + norm + 2 * inner + mlp) + T * 2 * (inner + cast)
    head = norm * (T + U) + U * (size * cfg.dim + 20 * cfg.vocab_size)
    kept = cfg.n_layers * (encoder + decoder) + head
    if cfg.recompute == "block":
        kept = cfg.n_layers * 4 * cfg.dim * (T + U) + max(encoder, decoder, head)
    memory = {"parameters": 4 * total / ranks, "gradients": 4 * total / ranks}
    # Means of rows and of columns; only those of rows are sharded, but both are few.
    memory["optimizer"] = 4 * sum(sum(p.shape) for p in model.parameters())
    memory["gathered"] = 2 * total * (size == 2)  # autocast's copies
    if ranks > 1:  # the root's parameters, those of a block and the next one, and their gradients
        block = sum(p.numel() for p in model.decoder.blocks[0].parameters())
        blocks = sum(p.numel() for name, p in model.named_parameters() if ".blocks." in name)
        memory["gathered"] = 8 * (total - blocks) + 3 * size * block
    print_memory(memory | {"activations": split_batch(cfg, ranks)[1] * kept})

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

def train(model, optimizer, corpus, heldout, state, cfg, device):
    """Update the model until the end of the run; returns False if a signal ends it earlier."""
    this_rank = device, dist.get_rank(), dist.get_world_size()
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
        loss, norm = update_shards(model, optimizer, batches, lr, cfg)
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

def load_stream(cfg):
    """(tokenizer or None, training Corpus, held-out Corpus) of --data, whose documents have no
    separator (code); sets the fields of cfg that depend on them. With --write_tokens the data is
    written as shards instead, and the result is None."""
    files, shards = find_files(cfg.data)
    ids = cfg.pad, cfg.eos
    tokenizer = load_vocabulary(cfg, is_text=bool(files))
    if cfg.init and ids != (cfg.pad, cfg.eos):
        raise ValueError(f"--init {cfg.init} has PAD, EOS {ids}, which the tokenizer does not have")
    if cfg.prompt and not tokenizer:
        raise ValueError("--prompt needs --tokenizer where --data is token shards")
    documents = tokenize(read_documents(cfg.data, files), tokenizer, cfg.eos)
    documents = ((name, ids[:-1]) for name, ids in documents)
    if cfg.write_tokens and shards:
        raise ValueError("--write_tokens reads text, and --data has token shards")
    if cfg.write_tokens:
        return write_tokens(cfg.write_tokens, documents)
    cfg.seq_len = row_lengths(cfg)[0]
    sizes = cfg.vocab_size, cfg.batch_size, cfg.seq_len
    return tokenizer, *load_corpora(shards, documents, tokenizer, -1, *sizes)

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
        data = load_stream(cfg)
        if not data:
            return
        tokenizer, corpus, heldout = data

        fixed = {name: getattr(cfg, name) for name in (*SHAPE, "sentinel", "mode")}
        if not cfg.eval:
            fixed |= {"seq_len": cfg.seq_len, "seed": cfg.seed}
            fixed |= {"data_fingerprint": corpus.fingerprint()}
        newest, run = newest_checkpoint(cfg.out, cfg.resume or cfg.eval, fixed)
        if run and "steps" not in given:  # keep the planned number of sequences
            cfg.steps = math.ceil(run["steps"] * run["batch_size"] / cfg.batch_size)

        with torch.device("meta"):  # no memory before it is sharded
            model = T5(cfg)
        mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("dp",))
        parallelize(model, cfg, mesh)
        model.to_empty(device=device)
        init_weights(model, cfg)
        if cfg.init:
            for p, value in zip(model.parameters(), source.parameters()):
                fill_parameter(p, value.detach())
        optimizer = build_optimizer(model, cfg)
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
        n_windows = corpus.n_windows(cfg.seq_len)
        _, T, U = row_lengths(cfg)
        print(f"torch {torch.__version__} | {device.type} {cfg.precision} | {n_windows:,} windows")
        print("parameters {:,} | activated {:,}".format(*count_parameters(model)), end=" | ")
        print(f"FLOPs per token {flops_per_token(cfg):.3g} | tokens per step", end=" ")
        print(f"{cfg.batch_size * cfg.seq_len:,} = {ranks} ranks x {n_micro} x {micro}", end=" ")
        print(f"sequences of {cfg.seq_len} in {T} inputs, {U} targets")
        if not train(model, optimizer, corpus, heldout, state, cfg, device):
            return print(f"stopped after step {state['step']}")
        if cfg.export:
            to_hf(model, cfg, cfg.export)
        if tokenizer:  # token shards do not name theirs
            fill_spans(model, cfg.prompt, heldout, tokenizer, cfg)

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
