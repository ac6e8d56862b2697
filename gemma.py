r"""Gemma 2: Improving Open Language Models at a Practical Size (Gemma Team, 2024, arXiv 2408.00118)
and Gemma 3 Technical Report (Gemma Team, 2025, arXiv 2503.19786) in one file.

New against its parent, llama3.py:
- local layers, which attend to a window, between global ones: 1:1 in Gemma 2, 5:1 in Gemma 3 (§2);
- soft-caps of attention scores and logits (Gemma 2 §2) or norms of queries and keys (Gemma 3 §2);
- a norm with gain 1 + w before and after each branch, GeGLU, a scaled embedding tied to the head
  (Gemma 2 §2, released), a head width set apart from D / H (Table 1) and a query scale (released):
  1 / sqrt(E), except in the two 27B models, where it is 1 / sqrt(D / H);
- distillation as the pre-training objective: the cross-entropy to a teacher's distributions, whole
  (Gemma 2 §3.2) or restricted to 256 sampled tokens (Gemma 3 §2.2);
- a RoPE base for each kind of layer, and a last phase of long sequences, in which the positions of
  global layers are divided by 8 (Gemma 3 §5.3); languages mixed as in UniMax (Gemma 3 §2.2).
Left out: Gemma 3's image encoder, which is frozen, quantization-aware training (Gemma 3 §2.3), the
filters of the data and post-training. "Released" means the code and the configurations of
google-deepmind/gemma and google/gemma_pytorch.

Map: Gemma 2 §2, Table 1 Gemma, Block, LocalGlobalAttention, PRESETS | §3.2 soft_targets,
objective | §3.3, Table 3 parallelize. Gemma 3 §2, Table 1 Block, PRESETS | §2.2 sample_logits,
unimax | §2.4, Table 2 parallelize | §5.3 token_phases, rotary_table.
Legend: B batch, T positions, D width, H query heads, K key-value heads, G = H / K, E head width, F
hidden width, V vocabulary, W window, M blocks of a window, S queries and P keys of a block of
soft-capped attention, N positions of a chunk, n tokens sampled at a position (in
get_batch: sequences).
Conventions: rotary pairs are the two halves of a head; norms are fp32; T + 1 tokens give T inputs
and T targets; loss in nats per target; a target of -100 is not scored.

Run: python gemma.py                         # a laptop: the preset demo, on next tokens
     python gemma.py --export teacher        # the same, and export the model as a teacher
     # a student of half the width, which learns from that teacher:
     python gemma.py --teacher teacher --dim 48 --hidden_dim 128
     torchrun --nproc_per_node=8 gemma.py    # GPUs: the preset small
     torchrun --nnodes=16 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \
         gemma.py --preset 2b --teacher /shared/9b --dp_replicate 16 --data en/,code/ \
         --tokenizer ranks.tiktoken --out /shared/2b --resume
Expect: in 70 seconds on two CPU cores the demo's held-out bits per byte fall from 8.04 to 2.58. A
student of half its width (`--dim 48 --hidden_dim 128`) comes to 2.76 on the same tokens with this
teacher and without one, and to 2.74 with its whole distributions (`--samples 0`; one seed each).
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
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

# ---------------------------------------- Config ----------------------------------------

@dataclasses.dataclass
class Config:
    """Run configuration: each field is a command-line flag, and its comment is the flag's help."""

    # Model: Gemma 2 §2, Table 1; Gemma 3 §2, Table 1; released configurations
    vocab_size: int = 0  # V, entries of the vocabulary; 0: those of the tokenizer
    dim: int = 1152  # D, width of the residual stream
    n_layers: int = 26  # number of blocks
    n_heads: int = 4  # H, query heads
    n_kv_heads: int = 1  # K, key-value heads
    head_dim: int = 256  # E, width of a head
    query_scalar: int = 256  # its square root divides the scores; set it with --head_dim
    hidden_dim: int = 6912  # F, width of the feed-forward layer, that is, of its gate
    window: int = 512  # W, positions that a query of a local layer sees, its own included
    local_layers: int = 5  # local layers before each global one
    qk_norm: bool = True  # a norm on queries and keys, as in Gemma 3
    attention_cap: float = 0.0  # soft-cap of attention scores, as in Gemma 2; 0: none
    logit_cap: float = 0.0  # soft-cap of the logits, as in Gemma 2; 0: none
    rope_theta: float = 1e6  # base of the rotary frequencies of global layers; local ones: 1e4
    rope_factor: float = 1.0  # number that divides the positions of global layers
    # Data: Gemma 2 §3.1, Gemma 3 §2.2
    data: str = ""  # PATH,...: a corpus for each language; empty: Python's standard library
    max_epochs: float = 4.0  # passes at which UniMax limits a small corpus of a mix
    tokenizer: str = ""  # bytes, an encoding of tiktoken or a BPE rank file; empty: bytes
    # Phases: Gemma 3 §5.3
    seq_len: int = 32768  # T, tokens of a sequence
    batch_size: int = 32  # sequences per update, over all ranks
    tokens: float = 2e12  # tokens of the first phase
    long_seq_len: int = 131072  # tokens per sequence in the second phase; a batch keeps its tokens
    long_tokens: float = 0.0  # tokens of the second phase, of long sequences; 0: no such phase
    long_rope_factor: float = 8.0  # value of --rope_factor in the second phase
    steps: int = 0  # total updates, split in proportion to each phase's tokens; 0: from the tokens
    # Distillation: Gemma 2 §3.2, Gemma 3 §2.2
    teacher: str = ""  # Hugging Face directory of the teacher; empty: learn the next token
    samples: int = 256  # tokens sampled from each distribution of the teacher; 0: all tokens
    # Optimization
    lr: float = 6e-4  # peak learning rate
    warmup: float = 0.01  # share of the run's tokens with a linear warm-up, at most a tenth
    weight_decay: float = 0.1  # decoupled weight decay of matrices other than the embedding
    clip: float = 1.0  # maximum norm of the gradient; 0: no clipping
    seed: int = 0  # seed of the weights, the order of the data and the teacher's samples
    # Parallelism: Gemma 2 §3.3, Gemma 3 Table 2
    micro_batch: int = 0  # sequences per forward pass on one rank; 0: as many as the batch allows
    dp: int = 0  # ranks among which data and model are sharded; 0: all that are left
    dp_replicate: int = 1  # copies of the sharded model, among which data are split, too
    # Machine
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    compile: bool = False  # compile each block with torch.compile
    recompute: Literal["none", "block"] = "none"  # block: recompute blocks in the backward pass
    timeout: int = 600  # seconds that a collective waits for a lost rank
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
    eval: bool = False  # validate and sample what --init or --out holds, without training
    init: str = ""  # Hugging Face checkpoint directory to start from; fixes the model's shape
    export: str = ""  # directory to write a Hugging Face checkpoint to after training
    write_tokens: str = ""  # directory to write the data to as token shards, then exit

# Undisclosed: the learning rates, the batches, the warm-up and the share of the last phase. The
# rates fall with the size, a batch has 1M tokens (below 3B), 2M or 4M (from 12B).
PUBLISHED = dict(precision="bf16", micro_batch=1, compile=True, recompute="block")
GEMMA2 = PUBLISHED | dict(
    vocab_size=256128, local_layers=1, window=4096, qk_norm=False, attention_cap=50.0,
    logit_cap=30.0, rope_theta=1e4, seq_len=8192, batch_size=128, samples=0,
)  # fmt: skip
GEMMA3 = PUBLISHED | dict(vocab_size=262144)
GEMMA3_LARGE = GEMMA3 | dict(window=1024, batch_size=128)
TABLE = (  # columns below: sizes (papers, released code), and tokens of the two phases
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "query_scalar", "hidden_dim",
    "tokens", "long_tokens",
)  # fmt: skip
PRESETS = {
    # A CPU, a minute: Gemma 3 with 2 local layers to a global one, the last layer local, 2 phases.
    "demo": dict(
        dim=96, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=32, query_scalar=32,
        hidden_dim=256, window=32, local_layers=2, seq_len=128, batch_size=24, tokens=1e6,
        long_seq_len=256, long_tokens=1.2e5, long_rope_factor=2.0, samples=32, lr=6e-3,
        warmup=0.05, log_every=25,
    ),
    # One GPU of 24 GB or a node of them, minutes: over bytes.
    "small": dict(
        dim=640, n_layers=12, n_heads=4, n_kv_heads=1, hidden_dim=2048, window=256, seq_len=1024,
        batch_size=96, tokens=1.4e8, long_seq_len=4096, long_tokens=1e7, long_rope_factor=4.0,
        lr=1e-3, warmup=0.02, val_every=500, micro_batch=12, compile=True,
    ),
    # Gemma 2, Table 1 (which prints the two feed-forward branches together), Table 2 and §3.1. The
    # 2B and the 9B learned from a teacher, the 27B next tokens (§3.2).
    "2b": GEMMA2 | dict(zip(TABLE, (2304, 26, 8, 4, 256, 256, 9216, 2e12)), lr=4e-4),
    "9b": GEMMA2
    | dict(zip(TABLE, (3584, 42, 16, 8, 256, 256, 14336, 8e12)), lr=3e-4, batch_size=256),
    "27b": GEMMA2
    | dict(zip(TABLE, (4608, 46, 32, 16, 128, 144, 36864, 13e12)), lr=2e-4, batch_size=512),
    # Released after the report of Gemma 3; its 6T tokens are from the announcement.
    "3_270m": GEMMA3 | dict(zip(TABLE, (640, 18, 4, 1, 256, 256, 2048, 6e12)), lr=1e-3),
    # Gemma 3, Table 1 and §2.2; all learned from a teacher, and all but the 1B end with sequences
    # of 128K tokens (§5.3).
    "3_1b": GEMMA3 | dict(zip(TABLE, (1152, 26, 4, 1, 256, 256, 6912, 2e12)), lr=6e-4),
    "3_4b": GEMMA3_LARGE
    | dict(zip(TABLE, (2560, 34, 8, 4, 256, 256, 10240, 3.94e12, 6e10)), lr=4e-4, batch_size=64),
    "3_12b": GEMMA3_LARGE
    | dict(zip(TABLE, (3840, 48, 16, 8, 256, 256, 15360, 11.82e12, 1.8e11)), lr=3e-4),
    "3_27b": GEMMA3_LARGE
    | dict(zip(TABLE, (5376, 62, 32, 16, 128, 168, 21504, 13.79e12, 2.1e11)), lr=2e-4),
}  # fmt: skip
# Departure: bytes or a byte-level BPE in place of Gemini's SentencePiece model, whose file has
# another format.
BEGIN = "<bos>"  # before each document, as released
SPECIALS = [BEGIN, "<|endoftext|>"]  # the second, <eos> in the papers, follows each document
PATTERN = (  # how GPT-4 and Llama 3 split text into words, for BPE rank files
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# ---------------------------------------- Model ----------------------------------------

class Linear(nn.Linear):
    """A linear layer that works in the precision of its input, whatever its weights are kept in."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.type_as(x)
        return F.linear(x, self.weight.type_as(x), bias)

class Normalize(torch.autograd.Function):
    """y = r x with r = 1 / sqrt(mean(x²) + eps), the mean over the last dimension. The backward
    pass, dx = r (dy - y mean(y dy)), needs y and r; autograd would keep x and square it again."""

    @staticmethod
    def forward(ctx, x, eps):
        r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)  # [..., 1]
        y = x * r
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    def backward(ctx, dy):
        y, r = ctx.saved_tensors
        mean = (y * dy).mean(-1, keepdim=True)  # [..., 1]
        return torch.addcmul(dy, y, mean, value=-1).mul_(r), None

class UnitOffsetRMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) (1 + w), all of it in fp32 and cast back at the end: [..., D]."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        gain = 1.0 + self.weight.float()
        return (Normalize.apply(x.float(), self.eps) * gain).type_as(x)

def rotary_table(length, dim, theta, factor, device):
    """(cos, sin) [T, E/2] of the rotary angles of positions 0 ... length - 1, which are divided by
    factor (linear interpolation), in fp32."""
    i = torch.arange(0, dim, 2, dtype=torch.float32, device=device)
    frequencies = theta ** -(i / dim) / factor  # radians per position
    angles = torch.arange(length, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()

def rotate(x, cos, sin):
    """Rotary embedding of x [B, H, T, E] by the angles of cos and sin [T, E/2], in fp32."""
    first, second = x.float().chunk(2, -1)  # [B, H, T, E/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).type_as(x)

def causal_attention(q, k, v, scale):
    """softmax(q kᵀ scale) v over this and all earlier positions; query head j uses key-value head
    j // (H / K). [B, H, T, E], [B, K, T, E] twice -> [B, H, T, E]."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

def local_attention(q, k, v, scale, window):
    """causal_attention over the last `window` positions, the query's own included. The positions
    form blocks of one window; a block's queries see their own block and the one before. With a
    window of T, attention is global."""
    B, H, T, _ = q.shape
    K = k.shape[1]
    # The first block sees only itself. It is copied: of a view, autograd would keep all of q, k, v.
    first_block = (x[:, :, :window].contiguous() for x in (q, k, v))
    first = causal_attention(*first_block, scale)
    if T <= window:
        return first
    if T % window:  # padding after the last position, which no query before it sees
        q, k, v = (F.pad(x, (0, 0, 0, -T % window)) for x in (q, k, v))
    # M blocks of W positions: [B, M, H or K, W, E].
    q, k, v = (x.unflatten(2, (-1, window)).transpose(1, 2) for x in (q, k, v))
    # Keys and values of the block before and of the block itself: [B (M-1), K, 2W, E].
    k, v = (torch.cat((x[:, :-1], x[:, 1:]), 3).flatten(0, 1) for x in (k, v))
    # The G = H / K query heads that share keys are laid end to end: [B (M-1), K, G W, E].
    q = q[:, 1:].unflatten(2, (K, -1)).flatten(3, 4).flatten(0, 1)
    i = torch.arange(window, 2 * window, device=q.device)[:, None]  # queries: the second block
    j = torch.arange(2 * window, device=q.device)  # keys: both blocks
    visible = ((j <= i) & (j > i - window)).repeat(H // K, 1)  # [G W, 2W]
    x = F.scaled_dot_product_attention(q, k, v, visible, scale=scale)  # [B (M-1), K, G W, E]
    x = x.unflatten(2, (-1, window)).flatten(1, 2)  # [B (M-1), H, W, E]
    x = x.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)  # [B, H, (M-1) W, E]
    return torch.cat((first, x), 2)[:, :, :T]

def soft_cap(x, cap):
    """cap tanh(x / cap), between -cap and cap (Gemma 2 §2); x itself if cap is 0."""
    return cap * torch.tanh(x / cap) if cap else x

def capped_block(q, k, v, scale, window, cap):
    """Attention with soft-capped scores of the last S of P positions. q [B, H, S, E], k and v
    [B, K, P, E] -> [B, H, S, E]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))  # [B, H, P, E]
    # Scale, cap and mask, in this order; cap divides q, which is smaller than the scores.
    scores = cap * torch.tanh((q * (scale / cap) @ k.mT).float())  # [B, H, S, P]
    j = torch.arange(k.shape[2], device=q.device)  # keys
    i = j[-q.shape[2] :, None]  # queries
    visible = (j <= i) & (j > i - window)  # [S, P]
    return scores.masked_fill(~visible, -math.inf).softmax(-1).type_as(v) @ v

def soft_capped_attention(q, k, v, scale, window, cap):
    """local_attention with soft-capped scores (Gemma 2 §2), which scaled_dot_product_attention does
    not support. Blocks of at most 512 queries are each recomputed in the backward pass, so that
    memory is linear in T."""
    T = q.shape[2]
    size = min(window, 512)
    outputs = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        seen = slice(max(start - window + 1, 0), stop)
        block = q[:, :, start:stop], k[:, :, seen], v[:, :, seen]
        outputs.append(checkpoint(capped_block, *block, scale, window, cap, use_reentrant=False))
    return torch.cat(outputs, 2)

class LocalGlobalAttention(nn.Module):
    """Grouped-query attention over `window` positions, or over all if it is 0: [B, T, D] ->
    [B, T, D]. Queries and keys are normed (Gemma 3) or their products soft-capped (Gemma 2)."""

    def __init__(self, dim, n_heads, n_kv_heads, head_dim, query_scalar, window, qk_norm, cap):
        super().__init__()
        self.head_dim = head_dim
        self.scale = query_scalar**-0.5
        self.window = window
        self.cap = cap
        self.q = Linear(dim, n_heads * head_dim, bias=False)
        self.k = Linear(dim, n_kv_heads * head_dim, bias=False)
        self.v = Linear(dim, n_kv_heads * head_dim, bias=False)
        self.out = Linear(n_heads * head_dim, dim, bias=False)
        self.q_norm = UnitOffsetRMSNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = UnitOffsetRMSNorm(head_dim) if qk_norm else nn.Identity()

    def forward(self, x, cos, sin):
        heads = (-1, self.head_dim)
        q = self.q_norm(self.q(x).unflatten(-1, heads)).transpose(1, 2)  # [B, H, T, E]
        k = self.k_norm(self.k(x).unflatten(-1, heads)).transpose(1, 2)  # [B, K, T, E]
        v = self.v(x).unflatten(-1, heads).transpose(1, 2)  # [B, K, T, E]
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        window = self.window or x.shape[1]
        if self.cap:
            x = soft_capped_attention(q, k, v, self.scale, window, self.cap)
        else:
            x = local_attention(q, k, v, self.scale, window)
        return self.out(x.transpose(1, 2).flatten(2))  # [B, T, D]

class GeGLU(nn.Module):
    """(gelu(x W_gate) * x W_up) W_down, [B, T, D] -> [B, T, D], with the tanh form of GELU."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.gate = Linear(dim, hidden_dim, bias=False)
        self.up = Linear(dim, hidden_dim, bias=False)
        self.down = Linear(hidden_dim, dim, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))

class Block(nn.Module):
    """A norm before and after each branch, [B, T, D] -> [B, T, D] (Gemma 2 §2). A global block
    follows each `local_layers` local ones; the first is local (Gemma 3 §2)."""

    def __init__(self, cfg, index):
        super().__init__()
        self.is_local = (index + 1) % (cfg.local_layers + 1) > 0
        window = cfg.window if self.is_local else 0
        heads = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, cfg.query_scalar
        self.attn_norm = UnitOffsetRMSNorm(cfg.dim)
        self.attn = LocalGlobalAttention(cfg.dim, *heads, window, cfg.qk_norm, cfg.attention_cap)
        self.attn_post_norm = UnitOffsetRMSNorm(cfg.dim)
        self.mlp_norm = UnitOffsetRMSNorm(cfg.dim)
        self.mlp = GeGLU(cfg.dim, cfg.hidden_dim)
        self.mlp_post_norm = UnitOffsetRMSNorm(cfg.dim)

    def forward(self, x, cos, sin):
        x = x + self.attn_post_norm(self.attn(self.attn_norm(x), cos, sin))
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))

class Gemma(nn.Module):
    """Gemma 2 or 3, tokens [B, T] -> logits [B, T, V] in fp32 or, with targets, the summed loss.
    `dtype` is the precision of the residual stream; parameters may be kept in another."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.dtype = torch.float32
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layers))
        self.final_norm = UnitOffsetRMSNorm(cfg.dim)

    def forward(self, tokens, targets=None):
        """Logits or, with targets, the sum of the cross-entropies in nats; see chunked_loss."""
        x = self.hidden_states(tokens)
        if targets is None:
            return self.logits(x)
        return chunked_loss(self.logits, x.flatten(0, 1), targets, self.cfg.vocab_size)

    def hidden_states(self, tokens):
        """The states that the head reads, [B, T] -> [B, T, D]."""
        x = self.token_embedding(tokens).to(self.dtype)
        x = x * torch.tensor(x.shape[-1] ** 0.5, dtype=x.dtype)  # sqrt(D), rounded to this dtype
        cfg = self.cfg
        shape = x.shape[1], cfg.head_dim
        local_rope = rotary_table(*shape, 1e4, 1.0, x.device)
        global_rope = rotary_table(*shape, cfg.rope_theta, cfg.rope_factor, x.device)
        for block in self.blocks:
            rope = local_rope if block.is_local else global_rope
            x = block(x, *rope)
        return self.final_norm(x)

    def logits(self, x):
        """The tied head, soft-capped in Gemma 2: [..., D] -> [..., V], fp32."""
        logits = F.linear(x, self.token_embedding.weight.type_as(x)).float()
        return soft_cap(logits, self.cfg.logit_cap)

def slices(n, vocab_size):
    """Slices of n positions, each with at most 2**25 logits, which take 128 MiB in fp32."""
    size = max(2**25 // vocab_size, 1)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]

def chunked_loss(head, x, targets, vocab_size):
    """Sum of the cross-entropies, in nats, of the logits head(x) of N positions x [N, D], chunk by
    chunk, each recomputed in the backward pass, so that the logits of all positions never exist.
    targets: N ids, of which -100 is not scored; or a function from a slice of n positions to their
    distributions [n, V], zero for a position that is not scored."""

    def chunk_loss(x, rows):
        chosen = targets.flatten()[rows] if torch.is_tensor(targets) else targets(rows)
        return F.cross_entropy(head(x), chosen, reduction="sum")

    chunks = slices(len(x), vocab_size)
    if len(chunks) == 1:  # nothing to save
        return chunk_loss(x, chunks[0])
    return sum(checkpoint(chunk_loss, x[rows], rows, use_reentrant=False) for rows in chunks)

def init_weights(model, cfg):
    """Draw matrices and the embedding from N(0, 0.02); the gains' w are 0, so that 1 + w is 1.

    Each parameter has a random stream of its own, named by (seed, name), so that every layout
    starts from the same numbers. Raises ValueError for a parameter without a rule.
    """
    # Undisclosed: the initialisation. The released code draws from N(0, 0.01), Hugging Face's
    # classes from N(0, 0.02).
    for name, p in model.named_parameters():
        if re.search(r"(token_embedding|q|k|v|out|gate|up|down)\.weight$", name):
            generator = torch.Generator().manual_seed(stable_hash(cfg.seed, name))
            fill_parameter(p, torch.empty(p.shape).normal_(0.0, 0.02, generator=generator))
        elif re.search(r"norm\.weight$", name):
            fill_parameter(p, torch.zeros(p.shape))
        else:
            raise ValueError(f"no rule initialises {name}")

def count_parameters(model):
    """(total, activated) parameters; the tied head counts once, a dense model activates all."""
    total = sum(p.numel() for p in model.parameters())
    return total, total

def flops_per_token(cfg):
    """Training FLOPs per token: 2 per weight of a matrix product forward, twice that backward.
    Attention counts the keys that a query sees, on average; a teacher's products are left out."""
    width = cfg.n_heads * cfg.head_dim
    kv_width = cfg.n_kv_heads * cfg.head_dim
    weights = cfg.n_layers * cfg.dim * (2 * width + 2 * kv_width + 3 * cfg.hidden_dim)
    n_global = cfg.n_layers // (cfg.local_layers + 1)
    window = min(cfg.window, cfg.seq_len)
    global_keys = (cfg.seq_len + 1) / 2
    local_keys = window - window * (window - 1) / 2 / cfg.seq_len
    keys = n_global * global_keys + (cfg.n_layers - n_global) * local_keys
    return 6 * (weights + 2 * width * keys + cfg.vocab_size * cfg.dim)  # q kᵀ and A v

# ---------------------------------------- Data ----------------------------------------

def unimax(sizes, budget, max_epochs):
    """Sampling weights {language: weight} of UniMax (Chung et al. 2023), to which Gemma 3 §2.2
    refers, from sizes {language: tokens}: equal shares of the budget of tokens, except that no
    language is read more than max_epochs times, unless the budget needs more of all."""
    # Undisclosed: the maximum of passes, and what is changed in UniMax. Sizes here are in tokens.
    tokens = {}
    for name in sorted(sizes, key=sizes.get):  # the smallest first; what it leaves is shared
        share = (budget - sum(tokens.values())) / (len(sizes) - len(tokens))
        tokens[name] = min(share, max_epochs * sizes[name])
    return {name: tokens[name] / sum(tokens.values()) for name in sizes}

class LanguageMixture:
    """Corpora in given proportions, to be read as one Corpus. Of each BLOCK sequences every corpus
    has its share, to a whole number, at places that the seed shuffles; its windows come in order.
    The window that a sequence reads follows from the sequence's index alone."""

    BLOCK = 100_000

    def __init__(self, corpora, weights):
        self.corpora = corpora
        sums = itertools.accumulate(weights.values(), initial=0.0)
        self.bounds = [round(self.BLOCK * total) for total in sums]  # of the corpora's shares
        if 0 in np.diff(self.bounds):
            raise ValueError(f"a corpus has less than one of {self.BLOCK:,} sequences")
        self.separator = corpora[0].separator
        self.token_bytes = corpora[0].token_bytes

    def n_windows(self, length):
        """Number of windows of all corpora together."""
        return sum(corpus.n_windows(length) for corpus in self.corpora)

    def window(self, index, length, seed):
        """The length + 1 ids of sequence `index`."""
        block, position = divmod(index, self.BLOCK)
        # A draw of bounds[i] ... bounds[i + 1] - 1 is corpus i.
        draws = permutation(self.BLOCK, seed, "mixture", block)
        i = np.searchsorted(self.bounds, draws[position], side="right") - 1
        start, stop = self.bounds[i : i + 2]
        earlier = draws[:position]
        n_read = int(((start <= earlier) & (earlier < stop)).sum())  # of corpus i, in this block
        return self.corpora[i].window(block * (stop - start) + n_read, length, seed)

    def fingerprint(self):
        """A hash of the proportions and of the fingerprints of the corpora."""
        return stable_hash(self.bounds, [corpus.fingerprint() for corpus in self.corpora])

def add_bos(documents, tokenizer):
    """(name, ids) of each document, with the token BEGIN before its ids."""
    for name, ids in documents:
        yield name, np.append(tokenizer.encode_single_token(BEGIN), ids).astype(ids.dtype)

def get_batch(corpus, first, n, cfg):
    """Sequences first ... first + n - 1 of the phase: tokens and targets [n, T], indices [n] of the
    sequences, and the counts n_targets of targets and n_bytes of their text.

    A pure function of the seed and the index, so that any number of ranks, any accumulation and
    any resume see the same sequences.
    """
    # Undisclosed: the packing. Documents between BOS and EOS follow each other, are cut into
    # windows of T + 1 tokens, and attention crosses from one to the next. An EOS predicts nothing
    # (in shards without --tokenizer it is unknown, and predicts the next document's first token).
    windows = np.stack([corpus.window(first + i, cfg.seq_len, cfg.seed) for i in range(n)])
    tokens = torch.from_numpy(windows[:, :-1].copy())
    targets = torch.from_numpy(windows[:, 1:])
    targets = targets.where(tokens != corpus.separator, -100)
    scored = targets[targets >= 0].numpy()
    counts = {"n_targets": len(scored), "n_bytes": int(corpus.token_bytes[scored].sum())}
    indices = torch.arange(first, first + n)
    return {"tokens": tokens, "targets": targets, "indices": indices, **counts}

def token_phases(cfg):
    """[(first sequence, end, Config)] of the phases: one of --tokens, then one of --long_tokens, in
    which sequences are long and positions of global layers are interpolated (Gemma 3 §5.3)."""
    # Undisclosed: the data of the last phase. It reads the same corpora, again from their start.
    end = math.ceil(cfg.tokens / cfg.seq_len)
    phases = [(0, end, cfg)]
    if cfg.long_tokens:
        batch_size = cfg.batch_size * cfg.seq_len // cfg.long_seq_len
        micro_batch = math.ceil(cfg.micro_batch * cfg.seq_len / cfg.long_seq_len)
        sizes = dict(seq_len=cfg.long_seq_len, batch_size=batch_size, micro_batch=micro_batch)
        long = dataclasses.replace(cfg, rope_factor=cfg.long_rope_factor, **sizes)
        phases.append((end, end + math.ceil(cfg.long_tokens / cfg.long_seq_len), long))
    return phases

def find_phase(sequences, cfg):
    """(first sequence, Config) of the phase that a run is in after so many sequences."""
    for start, end, phase in token_phases(cfg):
        if sequences < end:
            break
    return start, phase

def count_updates(sequences, cfg):
    """Updates that remain after so many sequences of the run."""
    n_updates = 0
    for _, end, phase in token_phases(cfg):
        n = max(math.ceil((end - sequences) / phase.batch_size), 0)
        n_updates += n
        sequences += n * phase.batch_size
    return n_updates

# ---------------------------------------- Objective ----------------------------------------

@torch.no_grad()
def soft_targets(teacher, batch, cfg):
    """A function that maps a slice of N of the B T positions to the teacher's distributions [N, V]
    there, whole (Gemma 2 §3.2) or sampled (Gemma 3 §2.2). Positions that are not scored get 0."""
    scored = batch["targets"].flatten()[:, None] >= 0  # [B T, 1]
    states = teacher.hidden_states(batch["tokens"])  # [B, T, D of the teacher]
    if not cfg.samples:
        # Undisclosed: a temperature, or a term for the next token itself. There is none here.
        states = states.flatten(0, 1)
        return lambda rows: teacher.logits(states[rows]).softmax(-1) * scored[rows]

    samples = []
    for x, index in zip(states, batch["indices"].tolist()):
        seed = stable_hash(cfg.seed, cfg.seq_len, index)
        samples += sample_logits(teacher, x, cfg.samples, seed)
    ids, p = (torch.cat(parts) for parts in zip(*samples))  # [B T, n] each

    def sampled_distributions(rows):
        t = torch.zeros(len(ids[rows]), cfg.vocab_size, device=p.device)
        return t.scatter_(1, ids[rows], p[rows] * scored[rows])

    return sampled_distributions

def sample_logits(teacher, x, n, seed):
    """Yield, for one slice of N positions of a sequence x [T, D] after another, n tokens sampled
    from the teacher's distribution at each position, and their probabilities, renormalised to sum
    to 1: ids and p, [N, n] each."""
    # Undisclosed: whether tokens are drawn with replacement, and whether the student's softmax is
    # restricted to them. Here Gumbel top-k draws n distinct tokens, which favours likely ones on
    # average, and the student's softmax is over the whole vocabulary.
    generator = torch.Generator(x.device).manual_seed(seed)
    for rows in slices(len(x), teacher.token_embedding.num_embeddings):
        logits = teacher.logits(x[rows])  # [N, V]
        gumbel = -torch.empty_like(logits).exponential_(generator=generator).log()
        ids = (logits + gumbel).topk(n).indices  # [N, n]
        yield ids, logits.gather(1, ids).softmax(-1)

def objective(model, batch, cfg):
    """Sum of the cross-entropies to batch["targets"], the next tokens or what soft_targets returns
    (Gemma 2 §3.2: - sum_x P_T(x | x_c) log P_S(x | x_c)), divided by batch["n_targets"], the count
    of the whole global batch; no further metrics."""
    return model(batch["tokens"], batch["targets"]) / max(batch["n_targets"], 1), {}

# ---------------------------------------- Optimizer ----------------------------------------

def build_optimizer(model, cfg):
    """AdamW; the tied and scaled embedding and the gains are not decayed."""
    # Undisclosed: the optimizer and all of its settings.
    embedding = model.token_embedding.weight
    matrices = [p for p in model.parameters() if p.ndim > 1 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim == 1 or p is embedding]
    groups = [dict(params=matrices), dict(params=others, weight_decay=0.0)]
    settings = dict(lr=cfg.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=cfg.weight_decay)
    return torch.optim.AdamW(groups, **settings, fused=True)

def learning_rate(tokens, cfg):
    """Linear warm-up from 0, then a cosine to a tenth; tokens are those seen before the update."""
    # Undisclosed: the schedule. The cosine spans the run, its last phase included.
    done = min(tokens / (cfg.tokens + cfg.long_tokens), 1)
    if done < cfg.warmup:
        return cfg.lr * done / cfg.warmup
    done = (done - cfg.warmup) / (1 - cfg.warmup)
    return cfg.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

# ---------------------------------------- Precision ----------------------------------------

# Undisclosed: the precision of training; the released parameters are bf16. Parameters, gradients
# and Adam's moments are fp32. Under bf16 the residual stream and the matrix products are bf16, as
# are the parameters that sharded ranks gather; norms, rotary angles, soft-caps, softmax, logits and
# loss are fp32, and the factor sqrt(D) of the embedding is rounded to bf16.

PEAK_FLOPS = {"bf16": {  # dense, by precision and the device's exact name; others get no MFU
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA B200": 2250e12,
}}  # fmt: skip

# ---------------------------------------- Parallelism ----------------------------------------

def parallelize(model, cfg, mesh):
    """Gemma 2 §3.3, Gemma 3 Table 2: parameters, gradients and optimizer sharded over the ranks of
    "dp" as in ZeRO-3, gradients averaged over all ranks and copies. The embedding, the final
    norm and the tied head are one group, the root's. Sets the precision; recomputes, compiles."""
    # Departure: the papers also split matrices ("model") or sequences; llama3.py shows how.
    model.dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    if cfg.compile:  # one graph for each kind of layer, each length, and the teacher
        torch.compiler.config.recompile_limit = 32
        torch.compiler.config.fail_on_recompile_limit_hit = True
    for block in model.blocks:
        if cfg.recompute == "block":
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if cfg.compile:
            block.compile(dynamic=False)
    if mesh.size() > 1:
        policy = fsdp.MixedPrecisionPolicy(model.dtype, torch.float32, cast_forward_inputs=False)
        shards = mesh if cfg.dp_replicate > 1 else mesh["dp"]  # no all-reduce over one copy
        for module in (*model.blocks, model):  # the root comes last, and stays gathered
            fsdp.fully_shard(module, mesh=shards, mp_policy=policy)
    return model

def fill_parameter(p, value):
    """Write value, the complete tensor, to a parameter that may be sharded."""
    if isinstance(p, DTensor):
        value = value.to(p.device, p.dtype)
        value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
    p.data.copy_(value)

def build_sharded(cfg, mesh, path=""):
    """The parallelized model of this rank, initialised or with the weights of a Hugging Face
    checkpoint directory. Memory is allocated after it is sharded, for this rank's shards alone."""
    with torch.device("meta"):
        model = Gemma(cfg)
    parallelize(model, cfg, mesh)
    model.to_empty(device=mesh.device_type)
    if path:
        fill_weights(model, path)
    else:
        init_weights(model, cfg)
    return model

def load_teacher(cfg, mesh):
    """The model of --teacher, sharded as the student is, without gradients."""
    # Undisclosed: the teacher, and whether its distributions are stored. Here it runs beside the
    # student, on the same packed sequences, and keeps its own rope_factor in both phases.
    theirs = dataclasses.replace(cfg, **read_gemma_shape(cfg.teacher), recompute="none")
    if theirs.vocab_size != cfg.vocab_size:
        sizes = f"{theirs.vocab_size:,} entries, and the student {cfg.vocab_size:,}"
        raise ValueError(f"the vocabulary of --teacher {cfg.teacher} has {sizes}")
    if cfg.samples > cfg.vocab_size:
        raise ValueError(f"--samples {cfg.samples} is more than the {cfg.vocab_size} tokens")
    teacher = build_sharded(theirs, mesh, cfg.teacher)
    fsdp.register_fsdp_forward_method(teacher, "hidden_states")  # gathers what soft_targets needs
    return teacher.requires_grad_(False)

def memory_per_rank(model, cfg):
    """Bytes on each of cfg.dp x cfg.dp_replicate ranks, by kind, without those of a teacher; of
    model, only the shapes count."""
    n, _ = count_parameters(model)
    n_blocks = sum(p.numel() for p in model.blocks.parameters())
    size = 2 if cfg.precision == "bf16" else 4
    # Gathered: embedding and head with their gradient; a block with its gradient, and the next.
    gathered = 2 * (n - n_blocks) + 3 * n_blocks / cfg.n_layers
    if cfg.dp * cfg.dp_replicate == 1:  # or bf16 copies, which the backward pass needs
        gathered = n * (size == 2)
    # Kept for the backward pass, per position and block: x / rms(x) of the norms in fp32; in the
    # products' precision the inputs of the matrix products and of GeGLU, q, k, v and the output.
    width = (cfg.n_heads + cfg.n_kv_heads) * cfg.head_dim
    block = cfg.dim * (16 + 2 * size) + 4 * size * cfg.hidden_dim
    block += width * (2 * size + (4 + size) * cfg.qk_norm)
    positions = split_batch(cfg, cfg.dp * cfg.dp_replicate)[1] * cfg.seq_len
    kept = positions * cfg.n_layers * block
    if cfg.recompute == "block":
        kept = positions * (cfg.n_layers * size * cfg.dim + block)
    # The fp32 logits of a chunk, their softmax and its gradient.
    head = 12 * min(positions * cfg.vocab_size, 2**25)
    share = 4 * n / cfg.dp  # bytes of a rank's shards of the parameters
    memory = {"parameters": share, "gradients": share, "optimizer": 2 * share}
    return memory | {"gathered": size * gathered, "activations": kept + head}

# ---------------------------------------- Checkpoint ----------------------------------------

HF_CLASSES = {"gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}
MODELS = " or ".join(HF_CLASSES.values())
HF_CONFIG = {  # field of Config: (key in config.json, default of Gemma 2's class)
    "vocab_size": ("vocab_size", 256000), "dim": ("hidden_size", 2304),
    "n_layers": ("num_hidden_layers", 26), "n_heads": ("num_attention_heads", 8),
    "n_kv_heads": ("num_key_value_heads", 4), "head_dim": ("head_dim", 256),
    "query_scalar": ("query_pre_attn_scalar", 256), "hidden_dim": ("intermediate_size", 9216),
    "window": ("sliding_window", 4096), "attention_cap": ("attn_logit_softcapping", 50.0),
    "logit_cap": ("final_logit_softcapping", 30.0),
}  # fmt: skip
HF_GEMMA3 = {  # fields for which Gemma 3's class has another default
    "vocab_size": ("vocab_size", 262208), "logit_cap": ("final_logit_softcapping", None),
}  # fmt: skip
HF_FIXED = {
    "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "attention_bias": False,
    "attention_dropout": 0.0, "tie_word_embeddings": True, "use_bidirectional_attention": False,
}  # fmt: skip
HF_NAMES = {  # part of a parameter's name: Hugging Face's
    "token_embedding": "model.embed_tokens", "blocks": "model.layers", "final_norm": "model.norm",
    "attn_norm": "input_layernorm", "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm", "mlp_post_norm": "post_feedforward_layernorm",
    "attn": "self_attn", "q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj",
    "gate": "gate_proj", "up": "up_proj", "down": "down_proj",
}  # fmt: skip
# Fields of Config that a checkpoint fixes.
SHAPE = (*HF_CONFIG, "local_layers", "qk_norm", "rope_theta", "rope_factor")

def gemma_name(name):
    """Hugging Face's name of a parameter."""
    return ".".join(HF_NAMES.get(part, part) for part in name.split("."))

def read_gemma_shape(path):
    """{field in SHAPE: value} of the Gemma2ForCausalLM or Gemma3ForCausalLM in a directory."""
    with explain(f"{path} holds no {MODELS}", Exception):
        theirs = json.loads((Path(path) / "config.json").read_text())
        kind = theirs.get("model_type")
        if kind not in HF_CLASSES:
            raise ValueError(f"config.json has model_type {kind!r}, not {' or '.join(HF_CLASSES)}")
        is_gemma3 = kind == "gemma3_text"
        fields = HF_CONFIG | HF_GEMMA3 if is_gemma3 else HF_CONFIG
        shape = read_hf_config(path, fields, HF_FIXED)
        shape["attention_cap"] = 0.0 if is_gemma3 else shape["attention_cap"] or 0.0  # null
        shape["logit_cap"] = shape["logit_cap"] or 0.0

        n_local = theirs.get("sliding_window_pattern", 6) - 1 if is_gemma3 else 1
        types = theirs.get("layer_types") or layer_types(n_local, shape["n_layers"])
        n_local = [*types, "full_attention"].index("full_attention")
        if types != layer_types(n_local, shape["n_layers"]):
            raise ValueError("config.json has layer_types without a period")

        # The directories first published have rope_theta, rope_scaling and rope_local_base_freq.
        ropes = theirs.get("rope_parameters") or {}  # by kind of layer; Gemma 2 has one for all
        rope = {"rope_theta": theirs.get("rope_theta", 1e6 if is_gemma3 else 1e4)}
        rope |= theirs.get("rope_scaling") or {}
        rope |= ropes.get("full_attention", {}) if is_gemma3 else ropes
        local = {"rope_theta": theirs.get("rope_local_base_freq", 1e4)}
        local |= ropes.get("sliding_attention", {}) if is_gemma3 else rope
        rope_types = [r.get("rope_type", r.get("type", "default")) for r in (local, rope)]
        is_plain = rope_types[0] == "default" and local["rope_theta"] == 1e4
        if not is_plain or rope_types[1] not in ("default", "linear"):
            raise ValueError(f"config.json has RoPE {local} in local layers, {rope} in global ones")
        factor = rope["factor"] if rope_types[1] == "linear" else 1.0
    shape |= {"local_layers": n_local, "qk_norm": is_gemma3}
    return shape | {"rope_theta": rope["rope_theta"], "rope_factor": factor}

def fill_weights(model, path):
    """Fill the parameters of model, which may be sharded, from a Hugging Face directory."""
    with explain(f"{path} holds no {MODELS} of this shape", Exception):
        tensors = read_hf_tensors(path)
        for name, p in model.named_parameters():
            fill_parameter(p, tensors[gemma_name(name)].view(p.shape))

def from_hf(path):
    """(model, cfg) from the directory of a Gemma2ForCausalLM or a Gemma3ForCausalLM."""
    shape = read_gemma_shape(path)
    theirs = json.loads((Path(path) / "config.json").read_text())
    cfg = Config(**shape, seq_len=theirs.get("max_position_embeddings", 32768))
    model = Gemma(cfg)
    fill_weights(model, path)
    return model, cfg

def layer_types(local_layers, n_layers):
    """Hugging Face's names of the kinds of the layers."""
    pattern = ["sliding_attention"] * local_layers + ["full_attention"]
    return list(itertools.islice(itertools.cycle(pattern), n_layers))

def hf_config(cfg):
    """config.json of the model."""
    kind = "gemma3_text" if cfg.qk_norm else "gemma2"
    config = {key: getattr(cfg, field) or None for field, (key, _) in HF_CONFIG.items()} | HF_FIXED
    rope = {"rope_type": "default", "rope_theta": 1e4}
    if cfg.qk_norm:
        linear = {"rope_type": "linear", "rope_theta": cfg.rope_theta, "factor": cfg.rope_factor}
        rope = {"full_attention": linear, "sliding_attention": rope}
    config |= {"architectures": [HF_CLASSES[kind]], "model_type": kind, "rope_parameters": rope}
    config["layer_types"] = layer_types(cfg.local_layers, cfg.n_layers)
    config["max_position_embeddings"] = cfg.seq_len
    # These ids belong to the tokenizer, which is not written.
    return config | dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))

def to_hf(model, cfg, path):
    """Write model to the directory path as a Gemma2ForCausalLM or a Gemma3ForCausalLM. All ranks
    call this: they gather one tensor after the other; rank 0 keeps all in its memory and writes."""
    from safetensors.torch import save_file

    is_writer = not dist.is_initialized() or dist.get_rank() == 0
    tensors = {}
    for name, p in model.named_parameters():
        tensor = p.full_tensor() if isinstance(p, DTensor) else p
        if is_writer:
            tensors[gemma_name(name)] = tensor.detach().cpu().contiguous()
    if is_writer:
        with written_beside(path) as folder:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            (folder / "config.json").write_text(json.dumps(hf_config(cfg), indent=2) + "\n")

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
    """ids and n more, drawn at temperature 0.8 among allowed_ids [V] (boolean). All ranks call
    this and draw the same."""
    torch.manual_seed(stable_hash(cfg.seed, "sample"))
    with evaluation_mode(model, cfg.compile):
        for _ in range(n):
            tokens = torch.tensor([ids[-cfg.seq_len :]], device=model.token_embedding.weight.device)
            logits = model(tokens)[0, -1].cpu()  # [V]
            p = (logits / 0.8).masked_fill(~allowed_ids, -math.inf).softmax(-1)
            ids = ids + torch.multinomial(p, 1).tolist()
    return ids

def check(cfg, ranks):
    """Raise ValueError for a configuration that cannot run on that many ranks."""
    zero = ("local_layers", "samples")
    for field in dataclasses.fields(cfg):
        least = int(field.type is int and field.default > 0 and field.name not in zero)
        if field.type in (int, float) and not least <= getattr(cfg, field.name) < math.inf:
            raise ValueError(f"--{field.name} {getattr(cfg, field.name)} is not {least} or more")
    # Gemma 3's class has no soft-cap of scores; Gemma 2's has one RoPE for all of its layers.
    *_, last = token_phases(cfg)[-1]
    mixed = cfg.attention_cap if cfg.qk_norm else (cfg.rope_theta != 1e4 or last.rope_factor != 1)
    for wrong, message in (
        (cfg.n_heads % cfg.n_kv_heads, f"{cfg.n_kv_heads} key-value heads, {cfg.n_heads} heads"),
        (cfg.window >= cfg.seq_len and not cfg.init,
         f"--window {cfg.window} is not less than {cfg.seq_len} tokens"),
        (cfg.head_dim % 2, f"--head_dim {cfg.head_dim} is odd"),
        (cfg.data and "" in cfg.data.split(","), f"--data {cfg.data} has an empty path"),
        (cfg.long_tokens and cfg.long_seq_len < cfg.seq_len and not cfg.init,
         f"--long_seq_len {cfg.long_seq_len} is less than --seq_len {cfg.seq_len}"),
        (cfg.tokens * cfg.rope_factor * cfg.long_rope_factor == 0,
         "--rope_factor, --long_rope_factor or --tokens is 0"),
        (cfg.warmup > 0.1, f"--warmup {cfg.warmup} is more than a tenth of the run"),
        (cfg.dp * cfg.dp_replicate != ranks,
         f"dp {cfg.dp} x dp_replicate {cfg.dp_replicate} are not {ranks} ranks"),
        (cfg.resume and not cfg.out, "--resume needs --out"),
        (cfg.eval and not cfg.out and not cfg.init, "--eval needs --out or --init"),
        (cfg.export and mixed, f"--export needs the soft-caps or norms and ropes of {MODELS}"),
        (cfg.write_tokens and ranks > 1, "--write_tokens runs in one process, without torchrun"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
    for *_, phase in token_phases(cfg):
        n_micro, micro = split_batch(phase, ranks)
        if not 0 < phase.batch_size == ranks * n_micro * micro:
            batch = f"--batch_size {phase.batch_size} of length {phase.seq_len}"
            raise ValueError(f"{batch} is not {ranks} ranks x micro-batches of {micro}")

def dry_run(cfg):
    """Print parameters, FLOPs per token and memory per rank, computed from shapes alone."""
    if not cfg.vocab_size:
        cfg.vocab_size = load_tokenizer(cfg.tokenizer or "bytes", SPECIALS).n_vocab
    cfg.dp = cfg.dp or cfg.world_size // cfg.dp_replicate
    check(cfg, cfg.world_size)
    with torch.device("meta"):
        model = Gemma(cfg)
    n, activated = count_parameters(model)
    print(f"parameters {n:,} | activated {activated:,}")
    for *_, phase in token_phases(cfg):
        print(f"sequences of {phase.seq_len:,} tokens: FLOPs per token", end=" ")
        print(f"{flops_per_token(phase):.4g} | 6 N gives {6 * activated:.4g}")
        print_memory(memory_per_rank(model, phase))

def sharded_step(model, teacher, optimizer, batches, lr, cfg):
    """One update from this rank's micro-batches; returns loss and gradient norm of the global
    batch. Skips the update if either is not finite, which is the same on all ranks."""
    loss = torch.zeros((), device=batches[0]["tokens"].device)
    # Each micro-batch reduces its gradients: unreduced, every rank would keep those of all weights.
    for batch in batches:
        if teacher:
            batch = batch | {"targets": soft_targets(teacher, batch, cfg)}
        part, _ = objective(model, batch, cfg)
        (part * dist.get_world_size()).backward()  # FSDP averages over the ranks
        loss += part.detach()
    dist.all_reduce(loss)
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()  # of all shards, each counted once and not once a copy
    loss, norm = torch.stack([loss, norm]).tolist()  # the only wait for the device in an update
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return loss, norm

def begin_phase(model, phase, n_updates):
    """Set the model to a phase of the run, and print what is about to happen."""
    model.cfg = phase
    ranks = dist.get_world_size()
    n_micro, micro = split_batch(phase, ranks)
    print(f"{n_updates:,} updates of {phase.batch_size * phase.seq_len:,} tokens", end=" = ")
    print(f"{ranks} ranks x {n_micro} x {micro} sequences of {phase.seq_len}", end=" | ")
    print(f"positions of global layers / {phase.rope_factor:g}")

def train(model, teacher, optimizer, corpus, heldout, state, cfg, device):
    """Update the model until the phases of the run are over; False if a signal ends it."""
    signals = catch_signals()
    reader = device, dist.get_rank(), dist.get_world_size()
    thread = ThreadPoolExecutor(1)  # reads the next batch during an update

    def read_ahead(sequences):
        start, phase = find_phase(sequences, cfg)
        return thread.submit(read_batch, corpus, sequences - start, phase, *reader)

    def evaluate(batches):
        with evaluation_mode(model, cfg.compile):
            return sum(objective(model, batch, cfg)[0] for batch in batches)

    ahead = read_ahead(state["sequences"])
    saved = state["step"]
    n_skipped = 0
    phase = None
    while True:
        step = state["step"]
        _, current = find_phase(state["sequences"], cfg)
        if current != phase:
            phase = current
            begin_phase(model, phase, count_updates(state["sequences"], cfg))
            first_step = step
            pace = None  # seconds per update
        steps_left = 0 if cfg.eval else count_updates(state["sequences"], cfg)
        error = ahead.exception()  # waits until the batch to come is read
        if step > first_step + 1:  # the first update of a phase may compile and is left out
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
            validate(evaluate, heldout, step, phase, *reader)
        if end:
            return True

        clock = time.perf_counter()
        batches = ahead.result()
        state["sequences"] += phase.batch_size
        ahead = read_ahead(state["sequences"])
        sum_counts(batches, dist.get_world_size())
        lr = learning_rate(state["tokens"], cfg)
        loss, norm = sharded_step(model, teacher, optimizer, batches, lr, phase)
        finite = math.isfinite(loss) and math.isfinite(norm)
        state["step"] += 1
        state["tokens"] += finite * phase.batch_size * phase.seq_len
        if step == 0 or steps_left == 1 or state["step"] % cfg.log_every == 0:
            n_bytes = 0 if teacher else batches[0]["n_bytes"]  # its distributions are not the text
            bpb = bits_per_byte(loss * batches[0]["n_targets"], n_bytes)
            row = {"loss": loss, "bpb": bpb, "lr": lr, "grad": norm, "tokens": state["tokens"]}
            head = f"step {step + 1}/{step + steps_left}"
            tail = progress(state["tokens"], steps_left - 1, pace, phase, device)
            log(cfg.out, step + 1, head, row, tail)
        n_skipped = 0 if finite else n_skipped + 1
        if n_skipped:
            print(f"step {step + 1} skipped: its loss or gradient is not finite")
        if n_skipped == 3 or (n_skipped and steps_left == 1):
            raise ValueError(f"no finite gradient in the last {n_skipped} steps to {step + 1}")

def load_languages(cfg):
    """(tokenizer or None, training corpus, held-out corpus) of --data; several corpora are mixed by
    UniMax. Sets cfg.vocab_size. With --write_tokens the data is written as shards instead, and the
    result is None."""
    sources = {path: find_files(path) for path in cfg.data.split(",")}
    tokenizer = None
    if cfg.tokenizer or any(files for files, _ in sources.values()):
        tokenizer = load_tokenizer(cfg.tokenizer or "bytes", SPECIALS)
    separator = tokenizer.eot_token if tokenizer else -1  # unknown
    cfg.vocab_size = vocabulary_size(cfg.vocab_size, tokenizer, cfg.init)
    *_, last = token_phases(cfg)[-1]
    sizes = cfg.vocab_size, math.ceil(last.batch_size / len(sources)), last.seq_len
    corpora = {}
    for path, (files, shards) in sources.items():
        documents = add_bos(tokenize(read_documents(path, files), tokenizer, separator), tokenizer)
        if cfg.write_tokens and (shards or len(sources) > 1):
            raise ValueError("--write_tokens reads the text of one corpus")
        if cfg.write_tokens:
            return write_tokens(cfg.write_tokens, documents)
        with explain(path or "the standard library", ValueError):
            corpora[path] = load_corpora(shards, documents, tokenizer, separator, *sizes)
    train, heldout = zip(*corpora.values())
    if len(sources) == 1:
        return tokenizer, train[0], heldout[0]
    n_tokens = {path: corpus.size for path, corpus in zip(corpora, train)}
    budget = cfg.tokens + cfg.long_tokens
    weights = unimax(n_tokens, budget, cfg.max_epochs)
    if budget > cfg.max_epochs * sum(n_tokens.values()):
        print(f"warning: {budget:g} tokens are more than {cfg.max_epochs:g} passes over --data")
    for path, weight in weights.items():
        print(f"{path}: {weight:.1%} of the sequences")
    return tokenizer, LanguageMixture(train, weights), LanguageMixture(heldout, weights)

def plan_run(cfg, run, given):
    """Set the tokens of the phases: those of --steps or, for a run that is continued, those of its
    first start."""
    if run and not given & {"steps", "tokens", "long_tokens"}:
        cfg.tokens = run["tokens"]
        cfg.long_tokens = run["long_tokens"]
    elif cfg.steps:
        share = cfg.long_tokens / (cfg.tokens + cfg.long_tokens)
        batch = cfg.batch_size * cfg.seq_len
        cfg.long_tokens = float(batch * round(share * cfg.steps))
        cfg.tokens = batch * cfg.steps - cfg.long_tokens

@record
def main(argv=None):
    """Run the command line: read the data, build or resume the run, train, export and sample."""
    with report_user_errors():
        cfg, given = parse(argv)
        check_directories(cfg.init or cfg.teacher, cfg.export, cfg.write_tokens)
        if cfg.init:
            cfg = dataclasses.replace(cfg, **read_gemma_shape(cfg.init))
        if cfg.dry_run:
            return dry_run(cfg)
        device = init_distributed(cfg.timeout)
        ranks = dist.get_world_size()
        cfg.dp = cfg.dp or ranks // cfg.dp_replicate
        check(cfg, ranks)

        newest, run = newest_checkpoint(cfg.out, cfg.resume or cfg.eval, {})
        plan_run(cfg, run, given)  # on which the shares of languages depend
        data = load_languages(cfg)
        if not data:
            return
        tokenizer, corpus, heldout = data
        fixed = {name: getattr(cfg, name) for name in (*SHAPE, "seq_len", "long_seq_len")}
        if not cfg.eval:
            fixed |= {"seed": cfg.seed, "data_fingerprint": corpus.fingerprint()}
            fixed |= {"has_teacher": bool(cfg.teacher), "samples": cfg.samples}
        for name, value in fixed.items():
            if run and run.get(name) != value:
                raise ValueError(f"{newest} has {name} {run.get(name)}, and this run {value}")

        sizes = cfg.dp_replicate, cfg.dp
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("dp_replicate", "dp"))
        model = build_sharded(cfg, mesh, cfg.init)
        teacher = load_teacher(cfg, mesh) if cfg.teacher else None
        optimizer = build_optimizer(model, cfg)
        state = {"step": 0, "sequences": 0, "tokens": 0}
        if newest:
            load_checkpoint(newest, model, optimizer, state)
        if cfg.eval:
            if not newest and not cfg.init:
                raise ValueError(f"--eval: {cfg.out} has no checkpoint")
            cfg.out = ""  # nothing is written
        if cfg.out and dist.get_rank() == 0:
            lock = claim_directory(cfg.out, dataclasses.asdict(cfg) | fixed)  # while the run lives
        total, activated = count_parameters(model)
        print(f"torch {torch.__version__} | {device.type} {cfg.precision} | dp {cfg.dp} x", end=" ")
        print(f"dp_replicate {cfg.dp_replicate} | parameters {total:,} | activated", end=" ")
        print(f"{activated:,} | FLOPs per token {flops_per_token(cfg):.3g}")
        if not train(model, teacher, optimizer, corpus, heldout, state, cfg, device):
            return print(f"stopped after step {state['step']}")
        if cfg.export:
            to_hf(model, model.cfg, cfg.export)
        if tokenizer:
            ids = tokenizer.encode_ordinary(cfg.prompt)
            if ids:
                ids.insert(0, tokenizer.encode_single_token(BEGIN))  # as documents begin
            ids = ids or get_batch(heldout, 0, 1, model.cfg)["tokens"][0, :32].tolist()
            allowed_ids = torch.from_numpy(heldout.token_bytes > 0)
            print(tokenizer.decode(sample(model, ids, 256, allowed_ids, model.cfg)))

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
