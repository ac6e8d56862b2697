r"""Muon is Scalable for LLM Training (Liu et al., 2025, arXiv 2502.16982: "M", Moonlight), Kimi K2:
Open Agentic Intelligence (2025, arXiv 2507.20534) and the language model of Kimi K2.5 (2026, arXiv
2602.02276) in one file.

New against its parent, deepseek_v3.py:
- Muon for matrices and AdamW for the rest, with one learning rate and one weight decay, also for
  the gains of norms: Muon's updates are scaled to the size of AdamW's (M §2.2, Eq. 4, appendix D);
- ZeRO-1 with an additional gather of the momenta, since Muon needs whole matrices (M §2.3);
- QK-Clip, after each update: heads whose largest attention logit exceeded tau are scaled down (K2
  §2.1, Algorithm 1); with it Muon is MuonClip;
- no multi-token prediction and no groups of experts; the update of the balancing biases is centred
  (M appendix C); more and sparser experts, half the heads (K2 §2.3);
- two schedules by tokens: cosine and cooldown (M §3.3); constant, cosine, anneal and long
  sequences (K2 §2.5).
Left out: K2.5's vision tower and its joint stages, rephrased data (K2 §2.2), FP8 storage and the
offloading of activations (K2 §2.4.3), masks between documents.

Map: M Eq. 2 newton_schulz | Eq. 4 orthogonalize, Muon | §2.2 optimizer_of, split_by_function |
Algorithm 1 ShardedParameters, orthogonalize_shards | §3.3 SCHEDULES, phases_left | §3.4
svd_entropy | Table 2 MultiHeadAttention, PRESETS | appendix C SigmoidRouter,
update_centred_biases. K2 §2.1 largest_logits, qk_clip, muon_clip_step | §2.3 Kimi | §2.4
DistributedExperts | §2.5 SCHEDULES, yarn_beta_frequencies. "Released" means the configurations
and the weights at Hugging Face.
Legend: B batch, T positions, N = B T tokens, D width, H heads, E head width, to which R
rotary channels are added, C latent width, F hidden width, V vocabulary, X experts, K experts per
token, M rows at the experts of a rank; A, B rows and columns of a matrix.
Conventions: rotary pairs are (i, i + R/2), not the released interleaved ones; RMSNorm before each
branch; T + 1 tokens give T inputs and T targets; losses and gradients are sums over ranks, divided
by the targets of the whole global batch.

Run: python kimi_muon.py                          # a laptop: the preset demo
     python kimi_muon.py --tau 3                  # the same, with heads to clip
     python kimi_muon.py --optimizer adamw        # the same, by AdamW alone
     torchrun --nproc_per_node=8 kimi_muon.py     # GPUs: the preset small, experts on 8 ranks
     torchrun --nnodes=4 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \
         kimi_muon.py --preset moonlight_16b_a3b --ep 8 --data shards/ --out /shared/16b --resume
Expect: with 80 seconds of CPU time, 42 on two cores, the demo's held-out bits per byte fall from
8.07 to 2.28; Muon takes 12 % of it. The largest logit grows to 16.8; with --tau 3 it stays
below 3.6, half of the heads or more are clipped, and the end is 2.55. With --long_tokens 0 (one
seed) Muon ends at 2.31, 2.19 and 2.20 with --lr 4e-3, 8e-3 and 1.6e-2, AdamW at 2.69, 2.55 and 2.67
with 1e-3, 2e-3 and 4e-3: Muon needs 54 % of the updates for AdamW's best loss (M: 52 % of the
FLOPs). SVD entropies of the two routers: 0.94 and 0.95 with Muon, 0.92 and 0.87 with AdamW.
"""

import argparse
import base64
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
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.utils.checkpoint import checkpoint

# ---------------------------------------- Config ----------------------------------------

@dataclasses.dataclass
class Config:
    """Run configuration: each field is a command-line flag, and its comment is the flag's help."""

    # Model: K2 §2.3, Table 2; released configurations
    vocab_size: int = 0  # V, vocabulary size; 0: that of the tokenizer
    dim: int = 7168  # D, width of the residual stream
    n_layers: int = 61  # number of blocks
    n_dense: int = 1  # leading blocks with a dense feed-forward layer instead of experts
    hidden_dim: int = 18432  # F, width of the dense feed-forward layers
    n_heads: int = 64  # H, attention heads
    q_rank: int = 1536  # width of the latent of the queries; 0: no such latent
    kv_rank: int = 512  # C, width of the latent of keys and values; 0: plain multi-head attention
    head_dim: int = 128  # E, width of a head without its rotary part
    rope_dim: int = 64  # R, width of the rotary part of queries and keys
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    rope_theta: float = 50000.0  # base of the rotary frequencies
    rope_factor: float = 1.0  # YaRN's s, factor of the context extension; 1: no YaRN
    rope_original: int = 4096  # positions before YaRN's extension
    rope_beta_fast: float = 1.0  # rotations over rope_original from which YaRN keeps a frequency
    # Experts: M appendix C, K2 §2.3
    n_experts: int = 384  # X, routed experts of a layer
    n_shared: int = 1  # shared experts of a layer, which process every token
    expert_dim: int = 2048  # hidden width of an expert
    top_k: int = 8  # K, routed experts per token
    route_scale: float = 2.827  # factor of the gates of the routed experts
    bias_rate: float = 1e-3  # u, change of a balancing bias in one update
    bias_tokens: float = 10e12  # tokens of the run after which the balancing biases stay fixed
    # Data
    data: str = ""  # file or directory of text or token shards; empty: Python's standard library
    tokenizer: str = ""  # bytes, an encoding of tiktoken or a BPE rank file; empty: bytes
    # Schedule: K2 §2.5
    seq_len: int = 4096  # T, tokens of a sequence
    batch_size: int = 16384  # sequences per update, over all ranks
    tokens: float = 15.96e12  # tokens of the run; the other token counts do not follow it
    steps: int = 0  # updates of the run at the full batch; scales all token counts; 0: no scaling
    ramp_tokens: float = 0.0  # tokens at the start with batches of --first_batch; 0: none
    first_batch: int = 0  # sequences per update during --ramp_tokens
    long_tokens: float = 60e9  # tokens at the end in sequences of --long_seq_len; 0: none
    long_seq_len: int = 32768  # tokens of a sequence at the end; a batch keeps its tokens
    schedule: Literal["moonlight", "k2", "cosine"] = "k2"  # rate of M, of K2, or a cosine
    lr: float = 2e-4  # peak learning rate
    # Optimization: M §2, K2 §2.1
    optimizer: Literal["muon", "adamw"] = "muon"  # optimizer of matrices; the rest uses AdamW
    weight_decay: float = 0.1  # decoupled weight decay of all parameters
    split_fused: bool = True  # orthogonalize each functional part of a fused matrix separately
    tau: float = 100.0  # largest attention logit of a head that QK-Clip allows; 1e9: no clipping
    seed: int = 0  # seed of the weights and the order of the data
    # Parallelism: K2 §2.4
    micro_batch: int = 0  # sequences per forward pass on one rank; 0: as many as the batch allows
    ep: int = 0  # ranks that share the experts; 0: greatest common divisor of ranks, experts and 8
    dp: int = 0  # copies of the experts; 0: as many as the ranks allow
    # Machine
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    compile: bool = False  # compile attention and dense feed-forward layers with torch.compile
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
    init: str = ""  # Hugging Face checkpoint directory to start from
    export: str = ""  # directory to write a Hugging Face checkpoint to after training
    write_tokens: str = ""  # directory to write the data to as token shards, then exit

LARGE = dict(vocab_size=163840, precision="bf16", micro_batch=1, compile=True)
DENSE = LARGE | dict(  # M Table 2: Llama-like, without experts and latents
    q_rank=0, kv_rank=0, norm_eps=1e-5, seq_len=8192, tau=1e9, schedule="cosine", long_tokens=0.0,
)  # fmt: skip
TABLE_2 = ("n_layers", "n_dense", "n_heads", "dim", "hidden_dim", "tokens", "lr", "batch_size")
PRESETS = {
    # A CPU, a minute. route_scale as M Figure 6 finds it, rounded.
    "demo": dict(
        dim=96, n_layers=3, hidden_dim=256, n_heads=4, q_rank=48, kv_rank=32, head_dim=16,
        rope_dim=16, n_experts=16, expert_dim=64, top_k=3, route_scale=1.7, bias_rate=0.01,
        bias_tokens=5e5, seq_len=64, batch_size=48, tokens=8e5, long_tokens=2.5e5,
        long_seq_len=128, lr=8e-3, log_every=50,
    ),
    # A GPU of 24 GB or a node of them, minutes: 243M parameters over bytes, 61M of them active.
    "small": dict(
        dim=768, n_layers=12, hidden_dim=2048, n_heads=12, q_rank=384, kv_rank=256, head_dim=64,
        rope_dim=32, n_experts=32, expert_dim=256, top_k=4, route_scale=2.0, bias_tokens=1.4e8,
        seq_len=1024, batch_size=96, tokens=1.6e8, long_tokens=1e7, long_seq_len=2048, lr=1e-3,
        val_every=500, micro_batch=12, compile=True,
    ),
    # M §3.3, appendix C and the released configuration: 15.29B parameters without embedding and
    # head, 2.24B of them active. M has no QK-Clip.
    "moonlight_16b_a3b": LARGE | dict(
        dim=2048, n_layers=27, hidden_dim=11264, n_heads=16, q_rank=0, norm_eps=1e-5, n_experts=64,
        n_shared=2, expert_dim=1408, top_k=6, route_scale=2.446, bias_tokens=5.2e12, seq_len=8192,
        batch_size=4096, schedule="moonlight", tokens=5.7e12, ramp_tokens=200e9, first_batch=2048,
        long_tokens=0.0, lr=4.2e-4, tau=1e9,
    ),
    # K2 §2.3 to §2.5. Table 2 prints 1.04T parameters, 32.6B active; the released configuration,
    # used here, has 1,026.4B and 32.9B (61 layers of experts would have 1,043.0B). Its YaRN to
    # 131,072 positions is left out: K2 describes no training with it.
    # Undisclosed: u for K2 and when it ends; here Moonlight's u, to the end of the constant rate.
    "kimi_k2": LARGE | dict(recompute="block"),
    # The language model of K2.5; epsilon and YaRN as in copies of the released configuration, not
    # verified. Undisclosed: rates and batches.
    # Departure: tokens and phases are K2's, with YaRN to 262,144 positions throughout. K2.5 trains
    # a late checkpoint of K2 on 15T tokens, then on 500B and 200B, up to 262,144 (Table 3).
    "kimi_k25": LARGE | dict(
        norm_eps=1e-5, rope_factor=64.0, rope_beta_fast=32.0, recompute="block",
    ),
    # M Table 2. Undisclosed: the vocabulary and rotary base, here Moonlight's, and the schedule. F
    # is 2.6 D (§3.1) rounded to a multiple of 8, which gives row 1 334M parameters, printed 399M.
    "399m": DENSE | dict(zip(TABLE_2, (12, 12, 12, 1536, 3992, 8.92e9, 9.503e-4, 96))),
    "545m": DENSE | dict(zip(TABLE_2, (14, 14, 14, 1792, 4656, 14.04e9, 9.143e-4, 128))),
    "822m": DENSE | dict(zip(TABLE_2, (16, 16, 16, 2048, 5328, 20.76e9, 8.825e-4, 160))),
    "1.1b": DENSE | dict(zip(TABLE_2, (18, 18, 18, 2304, 5992, 28.54e9, 8.561e-4, 192))),
    "1.5b": DENSE | dict(zip(TABLE_2, (20, 20, 20, 2560, 6656, 38.91e9, 8.305e-4, 256))),
}  # fmt: skip
SCHEDULES = {  # (share of the tokens at its end, curve, part of the peak rate at its end) of parts
    # M §3.3: warm-up to 33B tokens, cosine to 5.2T, 100 updates up to 1e-4, linear to 0 at 5.7T.
    "moonlight": (
        (33 / 5700, "linear", 1.0), (5200 / 5700, "cosine", 0.1),
        (5203.3554432 / 5700, "linear", 1 / 4.2), (1.0, "linear", 0.0),
    ),
    # K2 §2.5: warm-up of 500 updates, constant to 10T, cosine to 15.5T, then 400B tokens and 60B of
    # long sequences. Undisclosed: the curves of the first and last part, the exact batch ("67M
    # tokens", here 2**26), and whether the last 460B are beyond the 15.5T.
    "k2": (
        (0.033554432 / 15.96, "linear", 1.0), (10 / 15.96, "linear", 1.0),
        (15.5 / 15.96, "cosine", 0.1), (1.0, "linear", 0.035),
    ),
    "cosine": ((0.02, "linear", 1.0), (1.0, "cosine", 0.1)),
}  # fmt: skip
TOKEN_COUNTS = ("tokens", "ramp_tokens", "long_tokens", "bias_tokens")  # that --steps scales
MATRICES = r"\.(q|k|v|out|router|gate_up|q_up|kv_up|down|q_down|kv_down)(\.weight)?$"  # of blocks
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

class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps), in fp32 and cast back, times a gain: [..., D]."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = F.rms_norm(x.float(), self.weight.shape, None, self.eps).type_as(x)
        return y * self.weight.type_as(x)

def yarn_beta_frequencies(dim, theta, factor, original, beta_fast):
    """Rotary frequencies [R/2], in radians per position, of a context of `original` positions that
    YaRN (K2 §2.5) extends `factor` times; a factor of 1 changes nothing."""
    i = torch.arange(0, dim, 2, dtype=torch.float32)
    frequencies = theta ** -(i / dim)
    # Pairs of at least beta_fast rotations within the original context keep their frequency, those
    # of at most 1 are interpolated, and between them a ramp blends the two. K2 has 1 for both.
    pairs = dim / (2 * math.log(theta))  # whose frequencies span a factor of e
    low = max(math.floor(pairs * math.log(original / (2 * math.pi * beta_fast))), 0)
    high = min(math.ceil(pairs * math.log(original / (2 * math.pi))), dim - 1)
    ramp = ((i / 2 - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / factor * ramp

def rotate(x, cos, sin):
    """Rotary embedding of x [B, H, T, E] by the angles of cos and sin [T, E/2], in fp32."""
    first, second = x.float().chunk(2, -1)  # [B, H, T, E/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).type_as(x)

@torch.no_grad()
def largest_logits(q, k, scale):
    """S_max of each head (K2 §2.1), [H]: the largest scale q_i k_jᵀ with j <= i, over the batch,
    of queries and keys [B, H, T, E], in blocks of 128 queries, so that no T x T scores exist."""
    largest = []
    for start in range(0, q.shape[2], 128):
        rows = q[:, :, start : start + 128]  # [B, H, 128, E]; the last block may be smaller
        stop = start + rows.shape[2]
        scores = rows @ k[:, :, :stop].mT  # [B, H, 128, stop]
        future = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(start + 1)
        largest.append(scores.masked_fill_(future, -math.inf).amax((0, 2, 3)))
    return torch.stack(largest).amax(0).float() * scale

class MaxLogitLatentAttention(nn.Module):
    """DeepSeek-V3's causal attention, [B, T, D] -> [B, T, D], which records in `largest` [H] the
    largest logits of its heads since it was last set to 0. Queries are expanded from a latent of
    q_rank channels (0: from the input), keys and values from a latent of kv_rank channels. A head
    has head_dim channels without position and rope_dim rotary ones; the rotary key is one for all
    heads. `scale` multiplies the scores."""

    def __init__(self, dim, n_heads, q_rank, kv_rank, head_dim, rope_dim):
        super().__init__()
        self.n_heads = n_heads
        self.kv_rank = kv_rank
        self.head_dim = head_dim
        self.rope_dim = rope_dim
        self.scale = (head_dim + rope_dim) ** -0.5
        self.q_down = Linear(dim, q_rank, bias=False) if q_rank else nn.Identity()
        self.q_norm = RMSNorm(q_rank, 1e-6) if q_rank else nn.Identity()  # eps as released
        self.q_up = Linear(q_rank or dim, n_heads * (head_dim + rope_dim), bias=False)
        self.kv_down = Linear(dim, kv_rank + rope_dim, bias=False)
        self.kv_norm = RMSNorm(kv_rank, 1e-6)
        self.kv_up = Linear(kv_rank, n_heads * 2 * head_dim, bias=False)
        self.out = Linear(n_heads * head_dim, dim, bias=False)
        self.register_buffer("largest", torch.zeros(n_heads), persistent=False)

    def forward(self, x, cos, sin):
        # Queries: compressed, then expanded; a head has a content part and a rotary part.
        q = self.q_up(self.q_norm(self.q_down(x)))  # [B, T, H (E + R)]
        q = q.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # [B, H, T, E + R]
        q_content, q_rotary = q.split([self.head_dim, self.rope_dim], -1)

        # Keys and values: one latent for both, and one rotary key that all heads share.
        latent, k_rotary = self.kv_down(x).split([self.kv_rank, self.rope_dim], -1)
        kv = self.kv_up(self.kv_norm(latent))  # [B, T, H 2E]
        kv = kv.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        k_content, v = kv.chunk(2, -1)  # [B, H, T, E] each
        k_rotary = rotate(k_rotary[:, None], cos, sin)  # [B, 1, T, R]
        k_rotary = k_rotary.expand(-1, self.n_heads, -1, -1)

        q = torch.cat((q_content, rotate(q_rotary, cos, sin)), -1)
        k = torch.cat((k_content, k_rotary), -1)
        if self.training:
            torch.maximum(self.largest, largest_logits(q, k, self.scale), out=self.largest)
        v = F.pad(v, (0, self.rope_dim))  # fused kernels want equal widths
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        o = o[..., : self.head_dim].transpose(1, 2).flatten(2)  # [B, T, H E]
        return self.out(o)

class MultiHeadAttention(nn.Module):
    """Causal self-attention of M's dense models (M Table 2), [B, T, D] -> [B, T, D], which records
    in `largest` [H] the largest logits of its heads since it was last set to 0."""

    def __init__(self, dim, n_heads, head_dim):
        super().__init__()
        self.n_heads = n_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.q = Linear(dim, n_heads * head_dim, bias=False)
        self.k = Linear(dim, n_heads * head_dim, bias=False)
        self.v = Linear(dim, n_heads * head_dim, bias=False)
        self.out = Linear(n_heads * head_dim, dim, bias=False)
        self.register_buffer("largest", torch.zeros(n_heads), persistent=False)

    def forward(self, x, cos, sin):
        heads = (self.n_heads, -1)
        q = rotate(self.q(x).unflatten(-1, heads).transpose(1, 2), cos, sin)  # [B, H, T, E]
        k = rotate(self.k(x).unflatten(-1, heads).transpose(1, 2), cos, sin)  # [B, H, T, E]
        v = self.v(x).unflatten(-1, heads).transpose(1, 2)  # [B, H, T, E]
        if self.training:
            torch.maximum(self.largest, largest_logits(q, k, self.scale), out=self.largest)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.out(o.transpose(1, 2).flatten(2))

class GatedMLP(nn.Module):
    """SwiGLU, (silu(x W_gate) * x W_up) W_down: [B, T, D] -> [B, T, D]."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden_dim, bias=False)
        self.down = Linear(hidden_dim, dim, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)  # [B, T, F] each
        return self.down(F.silu(gate) * up)

class SigmoidRouter(nn.Module):
    """M appendix C, [N, D] -> the K experts of each token and their gates, [N, K] each, in fp32,
    and the number of tokens of each expert [X], which `load` sums over an update. The balancing
    bias only selects."""

    def __init__(self, dim, n_experts, top_k, scale):
        super().__init__()
        self.top_k = top_k
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(n_experts, dim))
        self.register_buffer("bias", torch.zeros(n_experts))
        self.register_buffer("load", torch.zeros(n_experts), persistent=False)

    def forward(self, x):
        scores = torch.sigmoid(F.linear(x.float(), self.weight))  # [N, X]
        experts = (scores + self.bias).topk(self.top_k).indices  # [N, K]
        selected = scores.gather(-1, experts)
        gates = self.scale * selected / (selected.sum(-1, keepdim=True) + 1e-20)
        counts = torch.zeros_like(self.bias, dtype=torch.int64)
        counts.index_add_(0, experts.flatten(), torch.ones_like(experts.flatten()))  # [X]
        if self.training:
            self.load += counts
        return experts, gates, counts

class Permute(torch.autograd.Function):
    """Output row i is row order[i] // k of x [N, D]; order is a permutation of N k numbers, and
    `inverse` its inverse, by which the backward pass gathers instead of scattering."""

    @staticmethod
    def forward(ctx, x, order, inverse, k):
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx, gradient):
        (inverse,) = ctx.saved_tensors
        rows = gradient.index_select(0, inverse)  # [N k, D]
        return rows.unflatten(0, (-1, ctx.k)).sum(1), None, None, None

class Experts(nn.Module):
    """X SwiGLUs, each for its own rows: x [M, D] and gates [M], sorted by expert, and the numbers
    of rows [X] -> [M, D]. The gate multiplies the hidden layer instead of the output; the result is
    the same, and the outputs need not be kept for the backward pass."""

    def __init__(self, n_experts, dim, hidden_dim):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * hidden_dim, dim))
        self.down = nn.Parameter(torch.empty(n_experts, dim, hidden_dim))

    def forward(self, x, gates, counts):
        ends = counts.cumsum(0).int()  # [X]
        hidden = F.grouped_mm(x, self.gate_up.type_as(x).mT, offs=ends)  # [M, 2F]
        return self.project(hidden, gates, ends)

    def project(self, hidden, gates, ends):
        """The hidden layer [M, 2F] -> [M, D]."""
        gate, up = hidden.chunk(2, -1)  # [M, F] each
        h = F.silu(gate) * up * gates[:, None].type_as(up)
        return F.grouped_mm(h, self.down.type_as(h).mT, offs=ends)

class MixtureOfExperts(nn.Module):
    """[B, T, D] -> [B, T, D]: shared experts, and K routed ones per token; no token is dropped."""

    def __init__(self, dim, expert_dim, n_experts, n_shared, top_k, scale):
        super().__init__()
        self.router = SigmoidRouter(dim, n_experts, top_k, scale)
        self.shared = GatedMLP(dim, n_shared * expert_dim)
        self.experts = Experts(n_experts, dim, expert_dim)

    def forward(self, x):
        experts, gates, counts = self.router(x.flatten(0, 1))  # [N, K] twice, [X]
        k = experts.shape[-1]
        order = experts.flatten().argsort(stable=True)  # [N K], by expert
        inverse = order.argsort()
        rows = Permute.apply(x.flatten(0, 1), order, inverse, k)  # [N K, D]
        y = self.experts(rows, gates.flatten().gather(0, order), counts)
        y = Permute.apply(y, inverse, order, 1).unflatten(0, (-1, k))  # [N, K, D]
        return y.sum(1).view_as(x) + self.shared(x)

class Block(nn.Module):
    """[B, T, D] -> [B, T, D]: attention, then a SwiGLU (dense) or experts, each after a norm and
    added to the residual stream. Without kv_rank, attention has no latents."""

    def __init__(self, cfg, dense):
        super().__init__()
        self.attn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        if cfg.kv_rank:
            heads = cfg.n_heads, cfg.q_rank, cfg.kv_rank, cfg.head_dim, cfg.rope_dim
            self.attn = MaxLogitLatentAttention(cfg.dim, *heads)
        else:
            self.attn = MultiHeadAttention(cfg.dim, cfg.n_heads, cfg.head_dim)
        self.attn.scale *= (0.1 * math.log(cfg.rope_factor) + 1) ** 2  # YaRN, K2 §2.5
        self.mlp_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        if dense:
            self.mlp = GatedMLP(cfg.dim, cfg.hidden_dim)
        else:
            experts = cfg.expert_dim, cfg.n_experts, cfg.n_shared, cfg.top_k, cfg.route_scale
            self.mlp = MixtureOfExperts(cfg.dim, *experts)

    def forward(self, x, cos, sin):
        x = x + self.attn(self.attn_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))

class Kimi(nn.Module):
    """Tokens [B, T] -> logits [B, T, V] in fp32 or, with targets, the summed loss. `dtype` is the
    precision of the residual stream; parameters may be kept in another."""

    def __init__(self, cfg):
        super().__init__()
        self.dtype = torch.float32
        self.ep = None  # process group over whose ranks the experts are divided
        self.first_expert = 0  # of this rank
        rope_dim = cfg.rope_dim if cfg.kv_rank else cfg.head_dim
        yarn = cfg.rope_factor, cfg.rope_original, cfg.rope_beta_fast
        self.rope_settings = rope_dim, cfg.rope_theta, *yarn
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.blocks = nn.ModuleList(Block(cfg, i < cfg.n_dense) for i in range(cfg.n_layers))
        self.final_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.head = Linear(cfg.dim, cfg.vocab_size, bias=False)

    def forward(self, tokens, targets=None):
        x = self.token_embedding(tokens).to(self.dtype)  # [B, T, D]
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        frequencies = yarn_beta_frequencies(*self.rope_settings).to(tokens.device)
        angles = positions[:, None] * frequencies  # [T, R/2]
        cos = angles.cos()
        sin = angles.sin()
        for block in self.blocks:
            x = block(x, cos, sin)
        x = self.final_norm(x)
        if targets is None:
            return self.logits(x)
        return chunked_loss(self.logits, x.flatten(0, 1), targets, self.head.out_features)

    def routers(self):
        """The routers, in order."""
        return [module for module in self.modules() if isinstance(module, SigmoidRouter)]

    def logits(self, x):
        """The head, [..., D] -> [..., V], fp32."""
        return self.head(x).float()

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
    """Draw all matrices from N(0, 0.02) (released); the gains of norms are 1.

    Each matrix is drawn from a generator seeded by (seed, name), one of an expert by its number,
    too, so that every layout starts from the same numbers. ValueError for one without a rule.
    """
    # Undisclosed: the initialization.
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            p.data.fill_(1.0)
        elif re.search(rf"{MATRICES}|^(token_embedding|head)\.weight$", name):
            first = model.first_expert if is_expert(name) else 0
            for i, matrix in enumerate(p.data.view(-1, *p.shape[-2:]), first):
                generator = torch.Generator().manual_seed(stable_hash(cfg.seed, name, i))
                matrix.copy_(torch.empty(matrix.shape).normal_(0.0, 0.02, generator=generator))
        else:
            raise ValueError(f"no rule initialises {name}")
    for buffer in model.buffers():
        buffer.zero_()

def is_expert(name):
    """Whether a parameter belongs to the routed experts, of which a rank has a part."""
    return ".experts." in name

def count_parameters(model):
    """(total, activated by a token) parameters, embedding and head included, as in M's "16B/3B";
    the balancing biases are no parameters."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0  # in the experts to which a token is not routed
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            idle += sum(p[module.router.top_k :].numel() for p in module.experts.parameters())
    return total, total - idle

def flops_per_token(cfg):
    """Training FLOPs per token: 2 per weight of a matrix product in the forward pass and 4 in the
    backward pass. Attention is counted as causal: (T + 1) / 2 keys per query, half of the full
    square. The recording of the largest logits and the optimizer are not counted."""
    query = cfg.head_dim + cfg.rope_dim
    attention = cfg.dim * (cfg.q_rank + cfg.kv_rank + cfg.rope_dim)
    attention += (cfg.q_rank or cfg.dim) * cfg.n_heads * query
    attention += (2 * cfg.kv_rank + cfg.dim) * cfg.n_heads * cfg.head_dim
    if not cfg.kv_rank:
        query = cfg.head_dim
        attention = 4 * cfg.dim * cfg.n_heads * query
    attention += cfg.n_heads * (query + cfg.head_dim) * (cfg.seq_len + 1) / 2  # q kᵀ and A v
    experts = 3 * cfg.dim * cfg.expert_dim * (cfg.n_shared + cfg.top_k) + cfg.dim * cfg.n_experts
    weights = cfg.n_layers * attention + cfg.n_dense * 3 * cfg.dim * cfg.hidden_dim
    return 6 * (weights + (cfg.n_layers - cfg.n_dense) * experts + cfg.dim * cfg.vocab_size)

# ---------------------------------------- Data ----------------------------------------

def get_batch(corpus, first, n, cfg):
    """Sequences first ... first + n - 1 of the phase: tokens and targets [n, T], and the counts
    n_targets of targets and n_bytes of their text.

    A pure function of the seed and the index, so that any number of ranks, any accumulation and
    any resume see the same sequences.
    """
    # Undisclosed: the packing. Documents, each followed by a separator, are concatenated and cut
    # into windows of T + 1 tokens; attention crosses the borders of documents.
    windows = np.stack([corpus.window(first + i, cfg.seq_len, cfg.seed) for i in range(n)])
    tokens = torch.from_numpy(windows[:, :-1].copy())
    targets = torch.from_numpy(windows[:, 1:].copy())
    counts = {"n_targets": targets.numel(), "n_bytes": int(corpus.token_bytes[targets].sum())}
    return {"tokens": tokens, "targets": targets, **counts}

def scale_to_steps(cfg):
    """cfg with its token counts scaled so that the run has --steps updates, if they are given."""
    scale = cfg.steps * cfg.batch_size * cfg.seq_len / cfg.tokens if cfg.steps else 1.0
    return dataclasses.replace(cfg, **{name: scale * getattr(cfg, name) for name in TOKEN_COUNTS})

def phases_left(sequences, cfg):
    """The phases that remain after `sequences` sequences of the run (at its end, the last phase
    with 0 updates): [(the sequence of the run that reads window 0, updates left, Config)]. Batches
    are smaller at the start (M §3.3), sequences longer at the end (K2 §2.5)."""
    # Undisclosed: the data of the long sequences; here windows of the same text, in another order.
    long_batch = max(cfg.batch_size * cfg.seq_len // cfg.long_seq_len, 1)
    phases = []
    start = tokens = 0
    for end, changes in (
        (cfg.ramp_tokens, dict(batch_size=cfg.first_batch or cfg.batch_size)),
        (cfg.tokens - cfg.long_tokens, dict()),
        (cfg.tokens, dict(batch_size=long_batch, seq_len=cfg.long_seq_len)),
    ):
        phase = dataclasses.replace(cfg, **changes)
        n_tokens = phase.batch_size * phase.seq_len  # of an update
        n_updates = max(math.ceil((end - tokens) / n_tokens - 1e-6), 0)
        tokens += n_updates * n_tokens
        stop = start + n_updates * phase.batch_size
        if stop > start:
            first = start if phase.seq_len != cfg.seq_len else 0  # one order of windows per length
            left = math.ceil((stop - max(sequences, start)) / phase.batch_size)
            phases.append((first, max(left, 0), phase))
        start = stop
    return [phase for phase in phases if phase[1]] or phases[-1:]

# ---------------------------------------- Objective ----------------------------------------

def objective(model, batch, cfg):
    """Sum of the cross-entropies of the next tokens, divided by batch["n_targets"], the count of
    the whole global batch; no further metrics. M appendix C drops multi-token prediction."""
    # Undisclosed: a balance loss. The released configurations have one, no paper says it was on.
    return model(batch["tokens"], batch["targets"]) / batch["n_targets"], {}

# ---------------------------------------- Optimizer ----------------------------------------

def newton_schulz(g, dtype):
    """M Eq. 2: approximate U Vᵀ for each matrix U Σ Vᵀ (singular value decomposition) of
    g [..., A, B], by five steps X = a X + (b S + c S²) X with S = X Xᵀ, in dtype."""
    a, b, c = 3.4445, -4.7750, 2.0315  # map singular values of 0.01 to 1 into [0.68, 1.14]
    x = g.to(dtype).reshape(-1, *g.shape[-2:])
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT  # so that X Xᵀ is the smaller product
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        s = torch.baddbmm(s, s, s, beta=b, alpha=c)  # b S + c S²
        x = torch.baddbmm(x, s, x, beta=a)
    return (x.mT if is_tall else x).reshape(g.shape)

def orthogonalize(matrices, dtype):
    """M Eq. 4: 0.2 sqrt(max(A, B)) newton_schulz(M) for each of a list of matrices or stacks of
    matrices [..., A, B], in one batch for each shape. The factor makes the root mean square of an
    update about 0.2, as with AdamW, whatever the shape."""
    matrices = list(matrices)
    batches = {}
    for i, matrix in enumerate(matrices):
        batches.setdefault(matrix.shape[-2:], []).append(i)
    updates = matrices.copy()
    for (rows, columns), batch in batches.items():
        stacks = [matrices[i].reshape(-1, rows, columns) for i in batch]
        o = newton_schulz(torch.cat(stacks), dtype) * (0.2 * math.sqrt(max(rows, columns)))
        for i, part in zip(batch, o.split([len(stack) for stack in stacks])):
            updates[i] = part.view(matrices[i].shape)
    return updates

class Muon(torch.optim.Optimizer):
    """M Eq. 1 and 4: orthogonalized momentum and decoupled weight decay, at AdamW's learning rate.

    Parameters are matrices [A, B] or stacks of them [X, A, B], and `orthogonalize` is a function
    from all their momenta to their updates: lambda momenta: orthogonalize(momenta, torch.bfloat16).
    Distributed, they are flat DTensors of many matrices (orthogonalize_shards).
    """

    def __init__(self, params, lr, weight_decay, orthogonalize, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.orthogonalize = orthogonalize

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            momenta = (self.look_ahead(p, group["momentum"]) for p in group["params"])
            for p, o in zip(group["params"], self.orthogonalize(momenta)):
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(o, alpha=-group["lr"])

    def look_ahead(self, p, momentum):
        """M_t = μ M_{t-1} + G_t (Eq. 1), and of it G_t + μ M_t, Nesterov's."""
        # Undisclosed: which form K2 uses. Its Algorithm 1 and M's Eq. 1 orthogonalize M_t; a
        # footnote of M says that the practice is Nesterov's.
        if not self.state[p]:
            self.state[p]["momentum"] = torch.zeros_like(p)
        m = self.state[p]["momentum"]
        m.mul_(momentum).add_(p.grad)
        return p.grad.add(m, alpha=momentum)

def qk_clip(largest, tau, head_dim, rope_dim):
    """K2 Algorithm 1: factors of the rows of q_up, [W^QC W^QR], [H (E + R)], and of kv_up,
    [W^KC W^V], [H 2E]. They scale the logits of a head by γ = min(1, tau / largest): √γ for W^QC
    and W^KC, γ for W^QR, because all heads share the rotary key, and 1 for W^V."""
    gamma = (tau / largest).clamp(max=1.0)[:, None]  # [H, 1]
    content = gamma.sqrt().expand(-1, head_dim)
    rotary = gamma.expand(-1, rope_dim)
    values = torch.ones_like(content)
    return torch.cat((content, rotary), 1).flatten(), torch.cat((content, values), 1).flatten()

def optimizer_of(name):
    """M §2.2: Muon for matrices, AdamW for the embedding, the head and the gains of norms."""
    if re.search(r"(^token_embedding|^head|norm)\.weight$", name):
        return "adamw"
    if re.search(MATRICES, name):
        return "muon"
    raise ValueError(f"no optimizer updates {name}")

def split_by_function(name, w, cfg):
    """Split a fused matrix w [A, B], or a stack [X, A, B], into one view per function, such as W^KC
    and W^V, [X, groups, rows, B]; Muon treats groups x rows as the rows of one matrix."""
    # Undisclosed: how fused matrices are split. M's Figure 9 lists W^C, W^KR, W^QC, W^QR, W^KC and
    # W^V separately; one matrix per head would make updates too large (§2.2).
    *_, rows, columns = w.shape
    functions = {  # part of a name: (groups, sizes of the parts of a group)
        "gate_up": (1, [rows // 2, rows // 2]), "kv_down": (1, [cfg.kv_rank, cfg.rope_dim]),
        "q_up": (cfg.n_heads, [cfg.head_dim, cfg.rope_dim]),
        "kv_up": (cfg.n_heads, [cfg.head_dim, cfg.head_dim]), "": (1, [rows]),
    }  # fmt: skip
    fused = re.search(r"gate_up|kv_down|q_up|kv_up|$", name)[0]
    groups, sizes = functions[fused if cfg.split_fused else ""]
    return w.view(-1, groups, sum(sizes), columns).split(sizes, dim=2)

@torch.no_grad()
def update_centred_biases(routers, rate):
    """M appendix C: b += u (sign(e) - mean sign(e)) of each router, where e is the mean load less
    that of an expert, in the global batch; returns the loads over their mean, [layers, X]."""
    loads = torch.stack([router.load for router in routers])
    dist.all_reduce(loads)
    mean = loads.mean(1, keepdim=True)
    signs = torch.sign(mean - loads)
    for router, change in zip(routers, signs - signs.mean(1, keepdim=True)):
        router.bias += rate * change
        router.load.zero_()
    return loads / mean

def svd_entropy(w):
    """M §3.4: -Σ p ln p / ln n of the n singular values σ of w, with p = σ² / Σ σ²."""
    p = torch.linalg.svdvals(w.float()).square()
    p = p / p.sum()
    return -torch.special.xlogy(p, p).sum() / math.log(len(p))

def build_optimizer(shards, cfg):
    """[AdamW, Muon] of the masters of ShardedParameters, or AdamW of all with --optimizer adamw;
    both decay all that they update, gains of norms included (M appendix D)."""
    # Undisclosed: AdamW's betas and eps; these are of M's released toy code.
    settings = dict(lr=0.0, weight_decay=cfg.weight_decay)
    muon = [shard for shard in shards if shard.optimizer == "muon"]
    adamw = [shard.master for shard in shards if shard.optimizer == "adamw"]
    optimizers = [torch.optim.AdamW(adamw, betas=(0.9, 0.95), eps=1e-8, fused=True, **settings)]
    if muon:
        orthogonalize_all = functools.partial(orthogonalize_shards, muon, cfg)
        masters = [shard.master for shard in muon]
        optimizers.append(Muon(masters, orthogonalize=orthogonalize_all, **settings))
    return optimizers

def learning_rate(tokens, cfg):
    """K2 §2.5, M §3.3: the learning rate after so many tokens of the run."""
    start = before = 0.0
    for end, curve, after in SCHEDULES[cfg.schedule]:
        done = (tokens / cfg.tokens - start) / (end - start)
        if done < 1:
            if curve == "cosine":
                done = (1 - math.cos(math.pi * done)) / 2
            return cfg.lr * (before + done * (after - before))
        start = end
        before = after
    return cfg.lr * before

# ---------------------------------------- Precision ----------------------------------------

# Under bf16 the weights are bf16, their masters and the momenta fp32, gradients are summed in fp32,
# and residual stream, matrix products and attention are bf16, as are Newton-Schulz and the momenta
# that are gathered for it (M Algorithm 1); router, gains of norms, norm statistics, rotary angles,
# softmax, logits of the head and loss are fp32. The scores from which QK-Clip takes S_max are bf16.
# Departure: K2 stores the inputs of SwiGLU and of the experts in FP8, recomputes norms, SwiGLU and
# some projections, and offloads other activations to the CPU (§2.4.3); here activations are bf16
# on the device, and --recompute block recomputes whole blocks.

PEAK_FLOPS = {"bf16": {  # dense, by precision and the device's exact name; others get no MFU
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA B200": 2250e12,
}}  # fmt: skip

# ---------------------------------------- Parallelism ----------------------------------------

# Departure: no pipeline, where K2 has 16 stages (§2.4, interleaved 1F1B); a rank has all layers.
# --dry_run --preset kimi_k2 --world_size 2048 --ep 128 plans 120 GiB per rank, of
# which 66 are weights and gradients of the 11.7B parameters that are not of experts, and 161 GiB
# for the long sequences.

def choose_layout(cfg, ranks):
    """cfg with ep and dp chosen where they are 0: ep divides the ranks, the experts and 8, and is 1
    for a model without experts; dp takes all ranks that are left."""
    n_experts = cfg.n_experts if cfg.n_dense < cfg.n_layers else 1
    ep = cfg.ep or math.gcd(ranks, n_experts, 8)
    if cfg.dp and not cfg.ep:
        ep = max(ranks // cfg.dp, 1)
    return dataclasses.replace(cfg, ep=ep, dp=cfg.dp or ranks // ep)

def weight_dtype(name, cfg):
    """The dtype in which a parameter is kept; its master is fp32."""
    is_bf16 = cfg.precision == "bf16" and not re.search(r"(norm|router)\.weight$", name)
    return torch.bfloat16 if is_bf16 else torch.float32

def all_to_all(x, send, receive, group):
    """Rows of x [M, ...], send[i] of which go to rank i of the group; receive[i] come from it."""
    rows = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(rows, x.contiguous(), receive, send, group=group)
    return rows

class AllToAll(torch.autograd.Function):
    """all_to_all, whose gradients go the opposite way."""

    @staticmethod
    def forward(ctx, x, send, receive, group):
        ctx.back = receive, send, group
        return all_to_all(x, send, receive, group)

    @staticmethod
    def backward(ctx, gradient):
        return all_to_all(gradient, *ctx.back), None, None, None

class DistributedExperts(Experts):
    """Experts, of which each rank of a group has an equal part: rows and gates go to the
    ranks that have their experts, and come back."""

    def __init__(self, n_experts, dim, hidden_dim, group):
        super().__init__(n_experts // group.size(), dim, hidden_dim)
        self.group = group

    def forward(self, x, gates, counts):
        n = self.group.size()
        send = counts.view(n, -1)  # [ranks, X / ranks]
        receive = all_to_all(send, [1] * n, [1] * n, self.group)  # the same of the rows to come
        sizes = torch.stack((send.sum(1), receive.sum(1))).tolist()
        x = AllToAll.apply(x, *sizes, self.group)  # [M, D], by rank, then by expert
        gates = AllToAll.apply(gates, *sizes, self.group)
        local = torch.arange(receive.shape[1], device=x.device).repeat(n)
        order = local.repeat_interleave(receive.flatten()).argsort(stable=True)  # by expert
        inverse = order.argsort()
        x = Permute.apply(x, order, inverse, 1)
        y = super().forward(x, gates[order], receive.sum(0))
        return AllToAll.apply(Permute.apply(y, inverse, order, 1), *sizes[::-1], self.group)

def parallelize(model, cfg, mesh):
    """Give a model on the meta device its memory: this rank's part of the experts, weights in the
    precision of cfg, gradients in fp32. Sets recomputation and compilation."""
    if cfg.ep > 1:
        model.ep = mesh["ep"].get_group()
        model.first_expert = model.ep.rank() * cfg.n_experts // cfg.ep
        for block in model.blocks[cfg.n_dense :]:
            with torch.device("meta"):
                sizes = cfg.n_experts, cfg.dim, cfg.expert_dim
                block.mlp.experts = DistributedExperts(*sizes, model.ep)
    if cfg.precision == "bf16":
        model.dtype = torch.bfloat16
    for name, p in model.named_parameters():
        p.data = p.data.to(weight_dtype(name, cfg))
    model.to_empty(device=mesh.device_type)
    for p in model.parameters():
        p.grad_dtype = torch.float32
    if cfg.compile:
        torch.compiler.config.fail_on_recompile_limit_hit = True
        torch.compiler.config.recompile_limit = 64  # a graph for each length and width
    for module in model.modules():
        # Recomputed routers count each token twice; the loads relative to their mean do not change.
        if cfg.recompute == "block" and isinstance(module, Block):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
        kinds = MaxLogitLatentAttention, MultiHeadAttention, GatedMLP
        if cfg.compile and isinstance(module, kinds):
            module.compile(dynamic=False)

class ShardedParameters:
    """ZeRO-1 (M §2.3): parameters of one kind as views of one flat tensor, of which each rank of a
    mesh keeps the fp32 master of an equal part, for an optimizer to update. All ranks have the
    weights and sum their gradients in fp32."""

    def __init__(self, named, mesh, optimizer):
        self.mesh = mesh
        self.optimizer = optimizer  # that updates them, muon or adamw
        self.rms = {}  # name: root mean square of the last update, if this rank has a part of it
        self.spans = {}  # name: (start, stop, shape) in the flat tensor
        self.weights = torch.cat([p.data.flatten() for _, p in named])
        self.gradients = torch.zeros_like(self.weights, dtype=torch.float32)
        start = 0
        for name, p in named:
            stop = start + p.numel()
            self.spans[name] = (start, stop, p.shape)
            p.data = self.weights[start:stop].view(p.shape)
            p.grad = self.gradients[start:stop].view(p.shape)
            start = stop
        share = math.ceil(stop / mesh.size())
        first = min(mesh.get_local_rank() * share, stop)
        self.own = slice(first, min(first + share, stop))  # of this rank
        self.master = nn.Parameter(self.as_dtensor(self.weights[self.own].float()))

    def as_dtensor(self, own):
        """The flat tensor, distributed, of which this rank has the part `own`."""
        size = dict(shape=self.weights.shape, stride=(1,))
        return DTensor.from_local(own, self.mesh, [Shard(0)], run_check=False, **size)

    def reduce(self):
        """Sum the gradients over the ranks, into the gradient of the master."""
        sums = DTensor.from_local(self.gradients, self.mesh, [Partial()], run_check=False)
        self.master.grad = sums.redistribute(placements=[Shard(0)])

    @torch.no_grad()
    def scale_rows(self, name, factors):
        """Multiply row i of a parameter [A, B] by factors[i], in the master."""
        start, stop, (_, columns) = self.spans[name]
        first, last = (max(i - self.own.start, 0) for i in (start, stop))  # in this rank's part
        own = self.master.to_local()[first:last]  # empty if it has none of the parameter
        skipped = max(self.own.start - start, 0)  # entries that are other ranks'
        own *= factors.repeat_interleave(columns)[skipped : skipped + len(own)]

    @torch.no_grad()
    def gather(self):
        """Write the masters of all ranks to the weights."""
        own = self.master.to_local().to(self.weights.dtype)
        self.weights.copy_(self.as_dtensor(own).full_tensor())

def clip_heads(model, shards, largest, tau):
    """QK-Clip of all layers, in the masters, from their largest logits [layers, H]."""
    for i, block in enumerate(model.blocks):
        if isinstance(block.attn, MultiHeadAttention):
            rows, _ = qk_clip(largest[i], tau, block.attn.head_dim, 0)
            factors = {"q": rows, "k": rows}
        else:
            rows, kv_rows = qk_clip(largest[i], tau, block.attn.head_dim, block.attn.rope_dim)
            factors = {"q_up": rows, "kv_up": kv_rows}
        for part, rows in factors.items():
            name = f"blocks.{i}.attn.{part}.weight"
            next(shard for shard in shards if name in shard.spans).scale_rows(name, rows)

def shard_parameters(model, cfg, mesh):
    """Group the parameters of a model by optimizer, dtype and the ranks that hold them, into
    ShardedParameters of about 2**28 numbers each."""
    world = init_device_mesh(mesh.device_type, (mesh.size(),))
    kinds = {}
    sizes = collections.Counter()
    for name, p in model.named_parameters():
        optimizer = optimizer_of(name) if cfg.optimizer == "muon" else "adamw"
        kind = optimizer, is_expert(name), p.dtype
        kinds.setdefault((*kind, sizes[kind] // 2**28), []).append((name, p))
        sizes[kind] += p.numel()
    return [
        ShardedParameters(named, mesh["dp"] if of_experts else world, optimizer)
        for (optimizer, of_experts, *_), named in kinds.items()
    ]

@torch.no_grad()
def orthogonalize_shards(shards, cfg, momenta):
    """M Algorithm 1: from distributed momenta of ShardedParameters their updates, one at a time."""
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    for shard, momentum in zip(shards, momenta):
        # Departure: each rank gathers all momenta, where M's gathers only the matrices of which it
        # has a part; a stack of experts counts as one matrix when a rank's part is determined.
        whole = momentum.to(dtype).full_tensor()  # line 3
        matrices = {  # those that this rank has a part of
            name: whole[start:stop].view(shape)
            for name, (start, stop, shape) in shard.spans.items()
            if start < shard.own.stop and stop > shard.own.start
        }
        views = [view for k, w in matrices.items() for view in split_by_function(k, w, cfg)]
        results = orthogonalize([view.flatten(1, 2) for view in views], dtype)  # line 4
        for view, result in zip(views, results):
            view.copy_(result.view(view.shape))
        shard.rms = {k: w.float().square().mean().sqrt() for k, w in matrices.items()}  # line 7
        yield shard.as_dtensor(whole[shard.own].float())  # line 5

def checkpoint_content(model, shards):
    """Content of a checkpoint: masters, with one entry per ep rank for experts, and biases."""
    content = nn.ParameterDict()
    for shard in shards:
        name = next(iter(shard.spans))
        first = f"@{model.first_expert}" if is_expert(name) else ""
        content[name.replace(".", "/") + first] = shard.master
    for i, router in enumerate(model.routers()):
        content[f"bias{i}"] = nn.Parameter(router.bias, requires_grad=False)
    return content

def memory_per_rank(cfg):
    """Bytes on each of cfg.dp x cfg.ep ranks, by kind, as a backward pass begins, with tokens
    spread evenly over experts."""
    with torch.device("meta"):
        model = Kimi(cfg)
    memory = dict.fromkeys(("weights", "gradients", "masters", "optimizer"), 0)
    for name, p in model.named_parameters():
        n = p.numel() // (cfg.ep if is_expert(name) else 1)
        own = n / (cfg.dp if is_expert(name) else cfg.dp * cfg.ep)
        itemsize = weight_dtype(name, cfg).itemsize
        memory["weights"] += itemsize * n
        memory["gradients"] += 4 * n
        memory["masters"] += 4 * own * (itemsize < 4)
        is_muon = cfg.optimizer == optimizer_of(name) == "muon"  # one state; AdamW has two
        memory["optimizer"] += 4 * own * (1 if is_muon else 2)

    # Kept for the backward pass, per position: by a norm its input in fp32 and the normalised one,
    # by a linear layer its input; by attention q, k, v, its output, and rotary parts in fp32; by a
    # SwiGLU both branches, silu(gate) and the product; by the router its input in fp32.
    size = 2 if cfg.precision == "bf16" else 4
    rope_dim = cfg.rope_dim if cfg.kv_rank else 0  # in addition to head_dim
    branch = (4 + 2 * size) * cfg.dim  # norm and linear layer
    attention = branch + (4 + 2 * size) * (cfg.q_rank + cfg.kv_rank)
    attention += size * cfg.n_heads * (5 * cfg.head_dim + 4 * rope_dim)
    attention += 4 * rope_dim * (cfg.n_heads + 1)
    dense = branch + 4 * size * cfg.hidden_dim
    moe = branch + 4 * cfg.dim + 4 * size * cfg.n_shared * cfg.expert_dim
    moe += cfg.top_k * size * (cfg.dim + 5 * cfg.expert_dim)
    blocks = [attention + (dense if i < cfg.n_dense else moe) for i in range(cfg.n_layers)]
    kept = sum(blocks)
    if cfg.recompute == "block":
        kept = cfg.n_layers * size * cfg.dim + max(blocks)
    positions = split_batch(cfg, cfg.dp * cfg.ep)[1] * cfg.seq_len
    logits = 12 * min(positions * cfg.vocab_size, 2**25)  # of a chunk, softmax and gradient
    memory["activations"] = positions * (kept + branch) + logits
    return memory

# ---------------------------------------- Checkpoint ----------------------------------------

HF_CONFIG = {  # field of Config: (key in config.json, default of DeepseekV3Config)
    "vocab_size": ("vocab_size", 129280), "dim": ("hidden_size", 7168),
    "n_layers": ("num_hidden_layers", 61), "n_dense": ("first_k_dense_replace", 3),
    "hidden_dim": ("intermediate_size", 18432), "n_heads": ("num_attention_heads", 128),
    "q_rank": ("q_lora_rank", 1536), "kv_rank": ("kv_lora_rank", 512),
    "head_dim": ("qk_nope_head_dim", 128), "rope_dim": ("qk_rope_head_dim", 64),
    "norm_eps": ("rms_norm_eps", 1e-6), "n_experts": ("n_routed_experts", 256),
    "n_shared": ("n_shared_experts", 1), "expert_dim": ("moe_intermediate_size", 2048),
    "top_k": ("num_experts_per_tok", 8), "route_scale": ("routed_scaling_factor", 2.5),
}  # fmt: skip
HF_FIXED = {  # the only values that are supported
    "hidden_act": "silu", "attention_bias": False, "norm_topk_prob": True,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "tie_word_embeddings": False,
    "moe_layer_freq": 1, "rope_interleave": True, "n_group": 1, "topk_group": 1,
}  # fmt: skip
HF_NAMES = {  # part of a parameter's name: Hugging Face's
    "token_embedding": "model.embed_tokens", "blocks": "model.layers", "final_norm": "model.norm",
    "head": "lm_head", "attn": "self_attn", "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm", "q_down": "q_a_proj", "q_norm": "q_a_layernorm",
    "q_up": "q_b_proj", "kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm",
    "kv_up": "kv_b_proj", "out": "o_proj", "router": "gate", "bias": "e_score_correction_bias",
    "shared": "shared_experts", "down": "down_proj",
}  # fmt: skip
# Fields of Config that a checkpoint fixes.
SHAPE = (*HF_CONFIG, "rope_theta", "rope_factor", "rope_original", "rope_beta_fast")

def hf_views(model, cfg):
    """(Hugging Face's name, the number of the expert for {} in it, view of our tensor, indices of
    its rows in theirs) of all tensors of a rank's model, each expert's apart. Their rotary pairs
    are (2i, 2i + 1), ours (i, i + R/2)."""
    pairs = torch.arange(cfg.rope_dim).view(-1, 2).T.flatten()
    head = torch.cat((torch.arange(cfg.head_dim), cfg.head_dim + pairs))
    rows = {
        "kv_down": torch.cat((torch.arange(cfg.kv_rank), cfg.kv_rank + pairs)),
        "q_up": (torch.arange(cfg.n_heads)[:, None] * len(head) + head).flatten(),
    }
    for name, tensor in model.state_dict().items():
        theirs = ".".join(HF_NAMES.get(word, word) for word in name.split("."))
        if not cfg.q_rank:
            theirs = theirs.replace("q_b_proj", "q_proj")
        matrices = [(0, tensor)]
        if is_expert(name):
            theirs = theirs.replace("experts", "experts.{}") + ".weight"
            matrices = enumerate(tensor, model.first_expert)
        for number, matrix in matrices:
            halves = matrix.chunk(2) if "gate_up" in name else [matrix]
            for kind, half in zip(("gate_proj", "up_proj"), halves):
                order = rows.get(name.split(".")[-2], slice(None))
                yield theirs.replace("gate_up", kind), number, half, order

def read_kimi_config(path):
    """Config from the config.json of a DeepseekV3ForCausalLM such as Moonlight's or K2's. Raises
    ValueError, with the key's name, for a value that is not supported."""
    with explain(f"{path} holds no model of Kimi", Exception):
        # The class's defaults of keys that have no field in Config.
        theirs = {"n_group": 8, "topk_group": 4, "v_head_dim": 128, "num_key_value_heads": 128}
        theirs |= json.loads((Path(path) / "config.json").read_text())
        theirs |= theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
        fields = {field: theirs.get(key, default) for field, (key, default) in HF_CONFIG.items()}
        cfg = Config(**fields)
        cfg.q_rank = cfg.q_rank or 0  # null
        cfg.seq_len = theirs.get("max_position_embeddings", 4096)
        cfg.rope_theta = theirs.get("rope_theta", 1e4)
        rope_type = theirs.get("type", theirs.get("rope_type", "default"))
        supported = {key: (value, None) for key, value in HF_FIXED.items()}
        supported |= {"v_head_dim": [cfg.head_dim], "num_key_value_heads": (cfg.n_heads, None)}
        supported["model_type"] = "deepseek_v3", "kimi_k2"
        if rope_type == "yarn":
            cfg.rope_factor = theirs["factor"]
            cfg.rope_original = theirs.get("original_max_position_embeddings", cfg.seq_len)
            cfg.rope_beta_fast = theirs.get("beta_fast", 32.0)
            supported |= {"beta_slow": (1, None), "mscale": [1], "mscale_all_dim": [1]}
            supported |= {"attention_factor": [None], "truncate": (True, None)}
        elif rope_type != "default":
            raise ValueError(f"config.json has rope_type {rope_type!r}, not 'default' or 'yarn'")
        for key, values in supported.items():
            if theirs.get(key) not in values:
                raise ValueError(f"config.json has {key} {theirs.get(key)!r}, not {values[0]!r}")
    return cfg

def fill_kimi(model, cfg, path):
    """Fill a rank's model from a Hugging Face directory, whose matrices may be FP8 codes with a
    scale for each block of 128 x 128, as K2's are."""
    with explain(f"{path} holds no model of Kimi of this shape", Exception):
        tensors = read_hf_tensors(path)
        for name, number, ours, rows in hf_views(model, cfg):
            name = name.format(number)
            theirs = tensors[name]
            if f"{name}_scale_inv" in tensors:  # it is the factor, not its inverse
                scale = tensors[f"{name}_scale_inv"].repeat_interleave(128, 0)
                scale = scale.repeat_interleave(128, 1)
                theirs = theirs.float() * scale[: len(theirs), : theirs.shape[1]]
            if theirs.shape != ours.shape:
                raise ValueError(f"{name} is {list(theirs.shape)}, not {list(ours.shape)}")
            ours.copy_(theirs[rows])

def from_hf(path):
    """(model, cfg) from the directory of a DeepseekV3ForCausalLM."""
    cfg = read_kimi_config(path)
    model = Kimi(cfg)
    fill_kimi(model, cfg, path)
    return model, cfg

def to_hf(model, cfg, path):
    """Write model to the directory path as a DeepseekV3ForCausalLM. All ranks call this, and gather
    the experts matrix by matrix; rank 0 writes files of about 5 GB."""
    from safetensors.torch import save_file

    is_writer = not dist.is_initialized() or dist.get_rank() == 0
    tensors = {}  # of the file that is being filled
    index = {}

    def write_file():
        file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))
        tensors.clear()

    with written_beside(path) if is_writer else contextlib.nullcontext() as folder:
        for name, number, ours, rows in hf_views(model, cfg):
            if sum(tensor.nbytes for tensor in tensors.values()) > 5e9:
                write_file()
            parts = [ours]
            if model.ep and "{}" in name:
                parts = [torch.empty_like(ours) for _ in range(cfg.ep)]
                dist.all_gather(parts, ours.contiguous(), group=model.ep)
            for rank, part in enumerate(parts if is_writer else ()):
                key = name.format(number + rank * cfg.n_experts // len(parts))
                tensors[key] = torch.empty_like(part, device="cpu")
                tensors[key][rows] = part.cpu()
        if is_writer:
            write_file()
            (folder / "config.json").write_text(json.dumps(kimi_hf_config(cfg), indent=2) + "\n")
            text = json.dumps({"metadata": {}, "weight_map": index}, indent=2)
            (folder / "model.safetensors.index.json").write_text(text + "\n")

def kimi_hf_config(cfg):
    """config.json of the model."""
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    if cfg.rope_factor > 1:
        rope |= dict(
            rope_type="yarn", factor=cfg.rope_factor, beta_fast=cfg.rope_beta_fast, beta_slow=1,
            original_max_position_embeddings=cfg.rope_original, mscale=1.0, mscale_all_dim=1.0,
        )  # fmt: skip
    config = {key: getattr(cfg, field) for field, (key, _) in HF_CONFIG.items()} | HF_FIXED
    return config | dict(
        architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", rope_parameters=rope,
        q_lora_rank=cfg.q_rank or None, num_key_value_heads=cfg.n_heads, v_head_dim=cfg.head_dim,
        max_position_embeddings=cfg.seq_len, num_nextn_predict_layers=0,
    )  # fmt: skip

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
    may_be_0 = "n_dense", "q_rank", "kv_rank"
    for field in dataclasses.fields(cfg):
        least = int(field.type is int and field.default > 0 and field.name not in may_be_0)
        if field.type in (int, float) and not least <= getattr(cfg, field.name) < math.inf:
            raise ValueError(f"--{field.name} {getattr(cfg, field.name)} is not {least} or more")
    for wrong, message in (
        (cfg.tau == 0, "--tau 0 is not above 0"),
        (cfg.rope_dim % 2 or cfg.rope_theta <= 1, "--rope_dim is odd, or --rope_theta 1 or less"),
        (cfg.rope_factor < 1, f"--rope_factor {cfg.rope_factor} is not 1 or more"),
        (cfg.ramp_tokens and not cfg.first_batch, "--ramp_tokens needs --first_batch"),
        (cfg.n_dense > cfg.n_layers, f"--n_dense {cfg.n_dense} is above {cfg.n_layers} layers"),
        (cfg.top_k > cfg.n_experts, f"--top_k {cfg.top_k} is above {cfg.n_experts} experts"),
        (cfg.ep * cfg.dp != ranks, f"ep {cfg.ep} x dp {cfg.dp} are not {ranks} ranks"),
        (cfg.n_experts % cfg.ep, f"--ep {cfg.ep} does not divide {cfg.n_experts} experts"),
        (not phases_left(0, cfg), f"--tokens {cfg.tokens:g} gives not a single update"),
        (cfg.ramp_tokens + cfg.long_tokens > cfg.tokens,
         f"--ramp_tokens and --long_tokens are more than --tokens {cfg.tokens:g}"),
        (cfg.long_tokens and cfg.long_seq_len < cfg.seq_len,
         f"--long_seq_len {cfg.long_seq_len} is less than --seq_len {cfg.seq_len}"),
        (cfg.long_tokens and cfg.batch_size * cfg.seq_len % cfg.long_seq_len,
         f"--long_seq_len {cfg.long_seq_len} does not divide the tokens of a batch"),
        (cfg.resume and not cfg.out, "--resume needs --out"),
        (cfg.eval and not cfg.out and not cfg.init, "--eval needs --out or --init"),
        ((cfg.init or cfg.export) and not cfg.kv_rank, "--init and --export need --kv_rank"),
        (cfg.write_tokens and ranks > 1, "--write_tokens runs in one process, without torchrun"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
    for _, _, phase in phases_left(0, cfg):
        n_micro, micro = split_batch(phase, ranks)
        if not 0 < phase.batch_size == ranks * n_micro * micro:
            batch = f"a batch of {phase.batch_size} sequences of {phase.seq_len}"
            raise ValueError(f"{batch} is not {ranks} ranks x n micro-batches of {micro}")

def dry_run(cfg):
    """Print parameters, FLOPs per token and memory per rank, computed from shapes alone."""
    cfg = choose_layout(cfg, cfg.world_size)
    if not cfg.vocab_size:
        cfg.vocab_size = load_tokenizer(cfg.tokenizer or "bytes", ["<|endoftext|>"]).n_vocab
    check(cfg, cfg.world_size)
    cfg = scale_to_steps(cfg)
    with torch.device("meta"):
        total, activated = count_parameters(Kimi(cfg))
    print(f"parameters {total:,} | activated {activated:,} | 6 N {6 * activated:.4g}")
    for _, n_updates, phase in phases_left(0, cfg):
        print_updates(n_updates, phase)
        print_memory(memory_per_rank(phase))

def print_updates(n_updates, cfg):
    """Print updates, batch and FLOPs of a phase."""
    n_micro, micro = split_batch(cfg, cfg.dp * cfg.ep)
    print(f"{n_updates:,} updates of {cfg.batch_size * cfg.seq_len:,} tokens", end=" = ")
    print(f"{cfg.dp * cfg.ep} ranks x {n_micro} x {micro} sequences of {cfg.seq_len}", end=" | ")
    print(f"FLOPs per token {flops_per_token(cfg):.4g}")

def muon_clip_step(model, shards, optimizers, batches, lr, bias_rate, cfg):
    """K2 Algorithm 1, one update from this rank's micro-batches. Returns loss and gradient norm of
    the global batch, the largest logits [layers, H] in it, and loads of experts over their mean
    [layers, X]. Nothing changes if loss or norm is not finite, which is the same on all ranks."""
    loss = torch.zeros((), device=batches[0]["tokens"].device)
    for batch in batches:
        part, _ = objective(model, batch, cfg)
        part.backward()
        loss += part.detach()
    for shard in shards:
        shard.reduce()
    square = sum(shard.master.grad.to_local().square().sum() for shard in shards)
    sums = torch.stack([loss, square]).double()
    dist.all_reduce(sums)
    loss, square = sums.tolist()
    # Undisclosed: gradient clipping. M and K2 do not mention it; gradients are not clipped here.
    norm = square**0.5
    largest = torch.stack([block.attn.largest for block in model.blocks])  # [layers, H]
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        clip_heads(model, shards, largest, cfg.tau)
    for shard in shards:
        shard.gather()
        shard.gradients.zero_()
        shard.master.grad = None
    for block in model.blocks:
        block.attn.largest.zero_()
    loads = largest.new_ones(1, 1)  # of a dense model
    if model.routers():
        loads = update_centred_biases(model.routers(), bias_rate * finite)
    return loss, norm, largest, loads

@torch.no_grad()
def diagnostics(model, shards, largest, loads, tau):
    """Of an update the largest logit, the share of heads clipped and the largest load over the
    mean; and as lists [name, update RMS] of each matrix (of experts, the largest of any rank; M
    Algorithm 1, line 7), SVD entropy of each router, and the largest logits by layer and head."""
    zero = largest.new_zeros(())  # for matrices of which this rank has no part
    local_rms = {name: shard.rms.get(name, zero) for shard in shards for name in shard.spans}
    rms = torch.stack([*local_rms.values()])
    dist.all_reduce(rms, dist.ReduceOp.MAX)
    return {
        "max_logit": largest.max().item(), "clipped": (largest > tau).float().mean().item(),
        "max_load": loads.max().item(),
        "update_rms": [[name, value] for name, value in zip(local_rms, rms.tolist()) if value],
        "router_entropy": [svd_entropy(router.weight).item() for router in model.routers()],
        "largest_logits": largest.tolist(),
    }  # fmt: skip

def train(model, shards, optimizers, content, corpus, heldout, state, cfg, device):
    """Update the model until the phases of the run are over; False if a signal ends it."""
    reader = device, dist.get_rank(), dist.get_world_size()
    signals = catch_signals()
    thread = ThreadPoolExecutor(1)  # reads the next batch during an update

    def read_ahead(sequences):
        start, _, phase = phases_left(sequences, cfg)[0]
        return thread.submit(read_batch, corpus, sequences - start, phase, *reader)

    def evaluate(batches):
        with evaluation_mode(model, cfg.compile):
            return sum(objective(model, batch, cfg)[0] for batch in batches)

    ahead = read_ahead(state["sequences"])
    first_step = saved = state["step"]
    phase = pace = None  # pace: seconds per update
    n_skipped = 0
    while True:
        step = state["step"]
        phases = phases_left(state["sequences"], cfg)
        steps_left = 0 if cfg.eval else sum(n for _, n, _ in phases)
        error = ahead.exception()  # waits until that batch is read
        if step > first_step + 1:  # the first update may compile and is left out
            seconds = time.perf_counter() - clock
            pace = 0.9 * (pace or seconds) + 0.1 * seconds
        if phases[0][2] != phase:
            phase = phases[0][2]
            first_step = step
            pace = None
        (stop,) = sum_over_ranks(len(signals) + (error is not None))
        end = steps_left <= 0 or stop
        if cfg.out and step > saved and (end or (step % cfg.save_every == 0 and not n_skipped)):
            save_checkpoint(cfg.out, content, optimizers, state)
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
        u = cfg.bias_rate * (state["tokens"] < cfg.bias_tokens)
        loss, norm, largest, loads = muon_clip_step(model, shards, optimizers, batches, lr, u, cfg)
        finite = math.isfinite(loss) and math.isfinite(norm)
        state["step"] += 1
        state["tokens"] += finite * phase.batch_size * phase.seq_len
        if step == 0 or steps_left == 1 or state["step"] % cfg.log_every == 0:
            bpb = bits_per_byte(loss * batches[0]["n_targets"], batches[0]["n_bytes"])
            row = {"loss": loss, "bpb": bpb, "lr": lr, "grad": norm, "tokens": state["tokens"]}
            row |= diagnostics(model, shards, largest, loads, cfg.tau)
            head = f"step {step + 1}/{step + steps_left}"
            tail = progress(state["tokens"], steps_left - 1, pace, phase, device)
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
        check_directories(cfg.init, cfg.export, cfg.write_tokens)
        if cfg.init:
            theirs = read_kimi_config(cfg.init)
            cfg = dataclasses.replace(cfg, **{name: getattr(theirs, name) for name in SHAPE})
        if cfg.dry_run:
            return dry_run(cfg)
        device = init_distributed(cfg.timeout)
        ranks = dist.get_world_size()
        cfg = choose_layout(cfg, ranks)
        check(cfg, ranks)
        *_, last = phases_left(0, cfg)[-1]
        data = load_data(last)  # the held-out text must fill a batch of the last phase
        if not data:
            return
        tokenizer, corpus, heldout = data
        cfg.vocab_size = last.vocab_size
        if tokenizer and cfg.vocab_size < tokenizer.n_vocab:
            raise ValueError(f"--vocab_size {cfg.vocab_size} is less than {tokenizer.n_vocab} ids")

        kept = *SHAPE, "optimizer", "seq_len", "long_seq_len"
        fixed = {name: getattr(cfg, name) for name in kept}
        if not cfg.eval:
            fixed |= {"seed": cfg.seed, "data_fingerprint": corpus.fingerprint()}
        checkpoint, run = newest_checkpoint(cfg.out, cfg.resume or cfg.eval, fixed)
        if run and "ep" not in given:
            cfg = choose_layout(dataclasses.replace(cfg, ep=run["ep"], dp=0), ranks)
            check(cfg, ranks)
        if run and run["ep"] != cfg.ep:
            raise ValueError(f"{checkpoint} has --ep {run['ep']}: --export DIR, then --init DIR")
        cfg = scale_to_steps(cfg)
        if run and not given & {"steps", *TOKEN_COUNTS}:  # as its first start planned
            cfg = dataclasses.replace(cfg, **{name: run[name] for name in TOKEN_COUNTS})

        mesh = init_device_mesh(device.type, (cfg.dp, cfg.ep), mesh_dim_names=("dp", "ep"))
        with torch.device("meta"):
            model = Kimi(cfg)
        total, activated = count_parameters(model)  # before each rank keeps its part
        parallelize(model, cfg, mesh)
        init_weights(model, cfg)
        if cfg.init:
            fill_kimi(model, cfg, cfg.init)
        shards = shard_parameters(model, cfg, mesh)
        optimizers = build_optimizer(shards, cfg)
        content = checkpoint_content(model, shards)
        state = {"step": 0, "sequences": 0, "tokens": 0}
        if checkpoint:
            load_checkpoint(checkpoint, content, optimizers, state)
            for shard in shards:
                shard.gather()
        if cfg.eval:
            if not checkpoint and not cfg.init:
                raise ValueError(f"--eval: {cfg.out} has no checkpoint")
            cfg.out = ""  # nothing is written
        if cfg.out and dist.get_rank() == 0:
            lock = claim_directory(cfg.out, dataclasses.asdict(cfg) | fixed)  # while the run lives
        print(f"torch {torch.__version__} | {device.type} {cfg.precision} | dp {cfg.dp} x", end=" ")
        print(f"ep {cfg.ep} | parameters {total:,} | activated {activated:,}")
        for _, n_updates, phase in phases_left(state["sequences"], cfg):
            print_updates(n_updates, phase)
        if not train(model, shards, optimizers, content, corpus, heldout, state, cfg, device):
            return print(f"stopped after step {state['step']}")
        _, _, last = phases_left(state["sequences"], cfg)[0]  # the phase that the model is in
        if cfg.export:
            to_hf(model, last, cfg.export)
        if tokenizer:
            ids = tokenizer.encode_ordinary(cfg.prompt)
            ids = ids or get_batch(heldout, 0, 1, last)["tokens"][0, :32].tolist()
            allowed_ids = torch.from_numpy(heldout.token_bytes > 0)
            print(tokenizer.decode(sample(model, ids, 256, allowed_ids, last)))

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
