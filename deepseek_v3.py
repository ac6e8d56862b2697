r"""DeepSeek-V3 Technical Report (DeepSeek-AI, 2024, arXiv 2412.19437) in one file.

New against its parent, llama3.py (and against DeepSeek-V2, arXiv 2405.04434, where marked):
- multi-head latent attention: keys and values out of one small latent, a rotary key of its own
  that all heads share (§2.1.1);
- a mixture of many small experts and a shared one, balanced by a bias that only chooses and not by
  a loss (new: sigmoid affinities, no auxiliary loss, no dropped token, §2.1.2);
- multi-token prediction: one module more predicts the token after the next (new, §2.2);
- experts on different ranks, DualPipe and ZeRO-1 instead of tensor parallelism (§3.2);
- FP8 matrix products with a scale for every tile of 1 x 128 or 128 x 128 (new, §3.3);
- documents packed best-fit without a mask, fill-in-the-middle (§4.1); a schedule in tokens
  (§4.2).

Map: §2.1.1 MultiHeadLatentAttention | §2.1.2 route, sequence_balance, Router, MoE, Exchange,
update_biases | §2.2 MultiTokenPrediction, objective | §3.2 DualPipe, ZeRO1, recomputed,
update_average | §3.3 quantize, scaled_product, FP8Product, FP8Linear, FP8Experts, round_e5m6,
AdamWithBF16Moments | §4.1 pack, fill_in_the_middle | §4.2 plan, learning_rate | §4.3 the later
phases of plan. "Released" means the inference code and the weights that DeepSeek published.
Legend: B batch, T positions, N = B T tokens, D width, H heads, E head width, R its rotary part, F
hidden width, V vocabulary, X experts, K experts a token, M rows at the experts of a rank.
Conventions: rotary pairs are (i, i + R/2), not the released interleaved ones; RMSNorm before each
branch; T + 1 tokens make T inputs and T targets, and target -100 is none. Losses and gradients are
sums over ranks, each divided by a count of the whole global batch.

Run: python deepseek_v3.py                          # a laptop: the preset demo
     torchrun --nproc_per_node=8 deepseek_v3.py     # GPUs: the preset small, experts on 8 ranks
     torchrun --nnodes=256 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \
         deepseek_v3.py --preset 671b --pp 16 --ep 64 --first_batch 4096 --recompute block \
         --long= --data shards/ --out /shared/671b
Expect: in about a minute on two CPU cores the demo's held-out bits per byte fall from 8.05 to 2.79;
multi-token prediction's loss stays close to the main one, and the fullest expert's load falls from
2.6 to some 1.4 times the mean.
"""

import argparse
import base64
import bisect
import contextlib
import dataclasses
import fcntl
import functools
import gc
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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.pipelining import PipelineStage, ScheduleDualPipeV
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

# ---------------------------------------- Config ----------------------------------------

@dataclasses.dataclass(unsafe_hash=True)
class Config:
    """Run configuration: each field is a command-line flag, and its comment is the flag's help."""

    # Model, §4.2
    vocab_size: int = 0  # V, vocabulary size; 0: that of the tokenizer
    dim: int = 7168  # D, width of the residual stream
    n_layers: int = 61  # number of blocks
    n_dense: int = 3  # leading blocks with a dense feed-forward layer instead of experts
    hidden_dim: int = 18432  # F, width of the dense feed-forward layers
    n_heads: int = 128  # H, attention heads
    q_rank: int = 1536  # d_c', width of the latent of the queries; 0: no such latent
    kv_rank: int = 512  # d_c, width of the latent of keys and values
    head_dim: int = 128  # d_h, width of a head without its rotary part
    rope_dim: int = 64  # d_h^R, width of the rotary part of queries and keys
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    init_std: float = 0.006  # standard deviation of the initial matrices
    # Experts, §2.1.2
    n_experts: int = 256  # X, routed experts of a layer
    n_shared: int = 1  # shared experts of a layer, which process every token
    expert_dim: int = 2048  # F of an expert
    top_k: int = 8  # K, routed experts per token
    n_groups: int = 8  # groups of experts, each on a node of its own
    groups_kept: int = 4  # groups that the experts of one token may come from
    route_scale: float = 2.5  # factor of the weights of the routed experts
    gamma: float = 0.001  # step of the balancing biases in one update
    balance_loss: float = 1e-4  # alpha, weight of the sequence-wise balance loss
    # Multi-token prediction, §2.2
    mtp: Literal["none", "sequential", "parallel"] = "sequential"  # multi-token prediction
    mtp_weight: float = 0.3  # lambda, weight of the loss of multi-token prediction
    mtp_last_weight: float = 0.1  # lambda after 10 of 14.8 parts of the tokens
    # Data, §4.1
    data: str = ""  # file or directory of text or token shards; empty: Python's standard library
    tokenizer: str = ""  # bytes, an encoding of tiktoken or a BPE rank file; empty: bytes
    fim: float = 0.1  # share of documents that are rearranged for fill-in-the-middle
    split_joined: float = 0.0  # share of tokens of punctuation and line breaks that are split
    pack: int = 256  # maximum number of sequences that documents are packed into at once
    seq_len: int = 4096  # T, tokens of a sequence in pre-training
    # Schedule, §4.2, §4.3
    tokens: float = 14.8e12  # tokens of pre-training
    batch_size: int = 15360  # sequences per update, over all ranks, after the ramp
    first_batch: int = 0  # sequences of the first update; 0: batch_size
    ramp_tokens: float = 469e9  # tokens in which the batch grows to batch_size
    batch_multiple: int = 128  # sequences by which the batch grows at each step of the ramp
    long: str = ""  # context extension with YaRN, as LENGTHxSEQUENCES:STEPS,...; empty: none
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_scaling: Literal["none", "yarn"] = "none"  # of pre-training; the extension has yarn
    rope_factor: float = 40.0  # YaRN's s, the factor by which the context is extended
    rope_original: int = 4096  # context length before the extension
    steps: int = 0  # maximum number of updates; 0: as many as the schedule has
    # Optimization, §4.2
    lr: float = 2.2e-4  # peak learning rate
    min_lr: float = 2.2e-5  # learning rate from 14.3 of 14.8 parts of the tokens
    last_lr: float = 7.3e-6  # learning rate from 14.633 of 14.8 parts of the tokens
    decay: Literal["cosine", "steps"] = "cosine"  # steps: 0.316 lr from 80 %, 0.1 lr from 90 %
    warmup_steps: int = 2000  # updates of linear warm-up, at most a tenth of the run
    weight_decay: float = 0.1  # decoupled weight decay of matrices and embeddings
    adam_eps: float = 1e-8  # added to the root of Adam's second moment
    clip: float = 1.0  # maximum norm of the gradient; 0: no clipping
    ema: float = 0.0  # decay of an average of the weights, validated at the end; 0: no average
    seed: int = 0  # seed of the weights and the order of the data
    # Parallelism, §3.2
    micro_batch: int = 0  # sequences per forward pass on one rank; 0: as many as the batch allows
    pp: int = 1  # ranks over which the layers are divided, two stages on each
    ep: int = 0  # ranks over which the experts are divided; 0: a divisor of the ranks, at most 8
    dp: int = 0  # copies of the experts; 0: as many as the ranks allow
    # Machine
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"  # auto: bf16 on a GPU, else fp32
    compile: bool = False  # compile attention and dense feed-forward layers with torch.compile
    recompute: Literal["none", "paper", "block"] = "none"  # paper: norms and up-projections
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

LITE = dict(  # what V2-Lite and the three below share
    n_dense=1, q_rank=0, n_shared=2, n_experts=64, top_k=6, n_groups=1, groups_kept=1,
    route_scale=2.446, decay="steps", precision="bf16", micro_batch=1, compile=True,
)  # fmt: skip
# The plain baselines of arXiv 2512.24880, Table 5, in V3's style. Undisclosed: query compression,
# dense width and groups; with these the printed totals come out. The factor is Moonlight's.
STYLE = LITE | dict(vocab_size=129280, norm_eps=1e-20, adam_eps=1e-20, mtp="none")
SIZES = ("dim", "n_layers", "hidden_dim", "n_heads", "expert_dim")
PRESETS = {
    # A CPU, a minute, and an extension of the context at the end.
    "demo": dict(
        dim=96, n_layers=3, n_dense=1, hidden_dim=256, n_heads=4, q_rank=48, kv_rank=32,
        head_dim=16, rope_dim=16, init_std=0.02, n_experts=16, expert_dim=64, top_k=3, n_groups=4,
        groups_kept=2, gamma=0.01, seq_len=64, tokens=5.5e5, batch_size=48, first_batch=24,
        ramp_tokens=1e5, batch_multiple=24, pack=4096, long="128x24:20", rope_factor=2.0,
        rope_original=64, lr=4e-3, min_lr=4e-4, last_lr=2e-4, warmup_steps=20, log_every=50,
    ),
    # A GPU of 24 GB or a node of them, minutes: 215M parameters over bytes, 65M of them active.
    "small": dict(
        dim=768, n_layers=12, n_dense=1, hidden_dim=2048, n_heads=12, q_rank=384, kv_rank=256,
        head_dim=64, rope_dim=32, init_std=0.02, n_experts=32, expert_dim=256, top_k=4, n_groups=8,
        groups_kept=4, seq_len=1024, tokens=1.6e8, batch_size=96, first_batch=48, ramp_tokens=2e7,
        batch_multiple=48, long="2048x48:30", rope_factor=2.0, rope_original=1024, lr=1e-3,
        min_lr=1e-4, last_lr=3.3e-5, warmup_steps=150, val_every=500, micro_batch=12, compile=True,
    ),
    # §4.2 and §4.3: the model, its schedule and its two extensions.
    "671b": dict(
        vocab_size=129280, first_batch=3072, long="32768x1920:1000,131072x480:1000",
        precision="fp8", recompute="paper", micro_batch=1,
    ),
    # The shape of DeepSeek-V2 (its §3.1.2), nearest to the large ablation of §4.5. Undisclosed:
    # rates, batch and tokens of that run, 540B; these are V2's.
    "236b": dict(
        dim=5120, n_layers=60, n_dense=1, hidden_dim=12288, n_heads=128, n_experts=160, n_shared=2,
        expert_dim=1536, top_k=6, groups_kept=3, vocab_size=102400, tokens=5.4e11, batch_size=9216,
        first_batch=2304, ramp_tokens=225e9, lr=2.4e-4, decay="steps", precision="fp8",
        recompute="paper", micro_batch=1,
    ),
    # DeepSeek-V2-Lite (V2, appendix B), the small ablation of §4.5.
    "16b": LITE | dict(zip(SIZES, (2048, 27, 10944, 16, 1408)), vocab_size=102400, lr=4.2e-4,
                       tokens=1.33e12, batch_size=4608),
    "27b": STYLE | dict(zip(SIZES, (2560, 30, 12288, 32, 1536)), n_experts=72, lr=4e-4,
                        tokens=262e9, batch_size=1280),
    "9b": STYLE | dict(zip(SIZES, (1920, 18, 10240, 24, 1280)), lr=5.9e-4, tokens=105e9,
                       batch_size=512),
    "3b": STYLE | dict(zip(SIZES, (1280, 12, 7168, 16, 896)), lr=8.6e-4, tokens=39.3e9,
                       batch_size=320, batch_multiple=64),
}  # fmt: skip
# Undisclosed: whether a token begins a document, too. §4.1 shows only the one that ends it, an
# <|eos_token|>; here it has the name that tiktoken's encodings know.
SPECIALS = ("<|endoftext|>", "<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")  # §4.1
PATTERN = (  # how GPT-4 and Llama 3 split text into words, for BPE rank files
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

@dataclasses.dataclass
class PlanPhase:
    """A part of the run in which batch, length and rotary embedding stay the same."""

    first: int  # updates before it
    end: int  # updates before the next phase
    tokens: float  # tokens before it
    sequences: int  # sequences before it
    cfg: Config  # the run's, with the batch_size, seq_len and rope_scaling of the phase

@functools.lru_cache(64)
def plan(cfg):
    """§4.2 and §4.3: the run as a list of PlanPhase: the batch grows with the tokens; then come
    the phases of cfg.long."""
    # Undisclosed: the shape of the ramp. It is linear in tokens, in steps of batch_multiple.
    # PyTorch's schedule wants as many micro-batches as stages, so that the paper's first 3,072
    # sequences do not fill 16 x 128 ranks.
    parts = []  # (updates, cfg)
    tokens = 0.0
    start = cfg.first_batch or cfg.batch_size
    for size in [*range(start, cfg.batch_size, cfg.batch_multiple), cfg.batch_size]:
        until = cfg.tokens
        if size < cfg.batch_size:
            grown = (size + cfg.batch_multiple - start) / (cfg.batch_size - start)
            until = min(cfg.ramp_tokens * min(grown, 1.0), cfg.tokens)
        steps = math.ceil((until - tokens) / (size * cfg.seq_len))
        if steps > 0:
            parts.append((steps, dataclasses.replace(cfg, batch_size=size)))
            tokens += steps * size * cfg.seq_len
    for part in filter(None, cfg.long.split(",")):
        if not (numbers := re.fullmatch(r"([1-9]\d*)x([1-9]\d*):([1-9]\d*)", part)):
            raise ValueError(f"--long: {part} is not LENGTHxSEQUENCES:STEPS")
        length, size, steps = map(int, numbers.groups())
        long = dict(seq_len=length, batch_size=size, rope_scaling="yarn")
        parts.append((steps, dataclasses.replace(cfg, **long)))
    phases = [PlanPhase(0, 0, 0.0, 0, cfg)]
    for steps, now in parts:
        if cfg.pp > 1 and not cfg.micro_batch:  # two micro-batches for each stage, or more
            share = now.batch_size // reading_ranks(cfg)
            sizes = range(1, max(share // (4 * cfg.pp), 1) + 1)
            now.micro_batch = max(size for size in sizes if share % size == 0)
        last = phases[-1]
        sequences = (last.end - last.first) * last.cfg.batch_size
        tokens = last.tokens + sequences * last.cfg.seq_len
        sequences += last.sequences
        phases.append(PlanPhase(last.end, last.end + steps, tokens, sequences, now))
    return phases[1:]

def planned_step(sequences, cfg):
    """Updates, and a fraction of one, in which the plan uses that many sequences."""
    phase = [phase for phase in plan(cfg) if phase.sequences <= sequences][-1]
    return phase.first + (sequences - phase.sequences) / phase.cfg.batch_size

def at_step(step, cfg):
    """(the PlanPhase of an update, its cfg with the gamma and lambda of the moment, the share of
    the tokens of pre-training before it): λ falls at 10/14.8 of them, γ at 14.3/14.8."""
    phases = plan(cfg)
    phase = next((phase for phase in phases if step < phase.end), phases[-1])
    tokens = phase.tokens + (step - phase.first) * phase.cfg.batch_size * phase.cfg.seq_len
    share = tokens / cfg.tokens if cfg.tokens else 1.0
    weight = cfg.mtp_weight if share < 10 / 14.8 else cfg.mtp_last_weight
    gamma = cfg.gamma if share < 14.3 / 14.8 else 0.0
    return phase, dataclasses.replace(phase.cfg, mtp_weight=weight, gamma=gamma), share

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

def rope_frequencies(dim, theta, scaling, factor, original):
    """(frequencies [E/2] in radians a position, factor of cos and sin) of rotary embeddings, whose
    context of `original` positions a scaling extends `factor` times."""
    if scaling == "ntk":  # the highest frequency stays, the lowest is divided by s
        theta *= factor ** (dim / (dim - 2))
    i = torch.arange(0, dim, 2, dtype=torch.float32)
    frequencies = 1.0 / theta ** (i / dim)  # §3.2
    if scaling == "pi":  # Position Interpolation: positions divided by s
        return frequencies / factor, 1.0
    if scaling == "llama3":  # released: by wavelength, with original / 4 and original / 1
        u = ((original * frequencies / (2 * math.pi) - 1.0) / (4.0 - 1.0)).clamp(0, 1)
        return (1 - u) * frequencies / factor + u * frequencies, 1.0
    if scaling == "yarn":  # blend between 32 rotations and 1 within the original context
        turns = (original / (2 * math.pi * rotations) for rotations in (32, 1))
        low, high = (dim * math.log(turn) / (2 * math.log(theta)) for turn in turns)
        low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
        ramp = ((i / 2 - low) / max(high - low, 1e-3)).clamp(0, 1)
        return frequencies * (1 - ramp) + frequencies / factor * ramp, 0.1 * math.log(factor) + 1
    return frequencies, 1.0

def rotate(x, cos, sin):
    """Rotary embedding of x [B, H, T, E] by the angles of cos and sin [T, E/2], in fp32."""
    first, second = x.float().chunk(2, -1)  # [B, H, T, E/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).type_as(x)

class GatedSiLU(torch.autograd.Function):
    """silu(gate) * up, which keeps its two inputs for the backward pass and not silu(gate) too."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient, gate).mul_(up), F.silu(gate).mul_(gradient)

class MultiHeadLatentAttention(nn.Module):
    """§2.1.1, [B, T, D] -> [B, T, D]. Queries come out of a latent of q_rank channels (0: out of
    the input), keys and values out of one of kv_rank; a head is head_dim channels without and
    rope_dim with a position, the latter of one key for all heads."""

    def __init__(self, dim, n_heads, q_rank, kv_rank, head_dim, rope_dim, fp8, recompute):
        super().__init__()
        self.n_heads, self.recompute = n_heads, recompute
        self.query, self.latent = (head_dim, rope_dim), (kv_rank, rope_dim)
        linear = FP8Linear if fp8 else Linear
        self.q_down = linear(dim, q_rank, bias=False) if q_rank else None  # W^DQ
        self.q_norm = RMSNorm(q_rank, 1e-6) if q_rank else None
        self.q_up = linear(q_rank or dim, n_heads * (head_dim + rope_dim), bias=False)  # W^UQ, W^QR
        self.kv_down = linear(dim, kv_rank + rope_dim, bias=False)  # W^DKV, W^KR
        self.kv_norm = RMSNorm(kv_rank, 1e-6)
        self.kv_up = linear(kv_rank, n_heads * 2 * head_dim, bias=False)  # by head: W^UK, W^UV
        self.out = linear(n_heads * head_dim, dim, bias=False)  # W^O
        self.out.wide_cache = True  # attention's backward pass needs this input, too

    def expand(self, c_q, c_kv, k_r, cos, sin):
        """Latents [B, T, d_c'], [B, T, d_c] and the rotary key [B, T, R] to queries, keys and
        values [B, H, T, E + R]; of the values the last R are zeros, for the fused kernels."""
        q = self.q_up(self.q_norm(c_q) if self.q_norm else c_q)  # Eq. 7, 8
        q = q.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # [B, H, T, E + R]
        q_c, q_r = q.split(self.query, -1)
        kv = self.kv_up(self.kv_norm(c_kv)).unflatten(-1, (self.n_heads, -1))
        k_c, v = kv.transpose(1, 2).chunk(2, -1)  # Eq. 2, 5: [B, H, T, E] each
        k_r = rotate(k_r[:, None], cos, sin).expand(-1, self.n_heads, -1, -1)  # Eq. 3
        q = torch.cat((q_c, rotate(q_r, cos, sin)), -1)  # Eq. 9
        k = torch.cat((k_c, k_r), -1)  # Eq. 4
        return q, k, F.pad(v, (0, self.query[1]))

    def forward(self, x, rope):
        cos, sin, mscale = rope
        c_q = self.q_down(x) if self.q_down else x  # Eq. 6
        c_kv, k_r = self.kv_down(x).split(self.latent, -1)  # Eq. 1
        latents = c_q, c_kv, k_r, cos, sin
        # recomputed twice: as attention's inputs, and for the gradients of the up-projections
        expand = functools.partial(checkpoint, self.expand, use_reentrant=False)
        again = recomputed(expand, *latents) if self.recompute else None
        with again or contextlib.nullcontext(self.expand(*latents)) as (q, k, v):
            scale = mscale**2 / math.sqrt(sum(self.query))
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)  # Eq. 10
        o = o[..., : self.query[0]].transpose(1, 2).flatten(2)  # [B, T, H E]
        return self.out(o)  # Eq. 11

class GatedMLP(nn.Module):
    """SwiGLU, (silu(x W_gate) * x W_up) W_down: [B, T, D] -> [B, T, D]."""

    def __init__(self, dim, hidden_dim, fp8):
        super().__init__()
        linear = FP8Linear if fp8 else Linear
        self.gate_up = linear(dim, 2 * hidden_dim, bias=False)
        self.down = linear(hidden_dim, dim, bias=False)

    def forward(self, x):
        return self.down(GatedSiLU.apply(*self.gate_up(x).chunk(2, -1)))

def route(s, bias, top_k, n_groups, groups_kept, scale):
    """§2.1.2: of affinities s [..., X], (the experts [..., K] of each token, their weights). The
    bias only chooses: the best groups by the sum of their two best, and the best K in them."""
    biased = s.detach() + bias
    if n_groups > 1:
        groups = biased.unflatten(-1, (n_groups, -1))  # [..., groups, X / groups]
        best = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1).topk(groups_kept, -1)
        dropped = torch.ones(groups.shape[:-1], dtype=torch.bool, device=s.device)
        dropped = dropped.scatter(-1, best.indices, False)
        biased = groups.masked_fill(dropped[..., None], -math.inf).flatten(-2)
    experts = biased.topk(top_k, -1).indices  # Eq. 16
    chosen = s.gather(-1, experts)
    return experts, scale * chosen / (chosen.sum(-1, keepdim=True) + 1e-20)  # Eq. 13

def sequence_balance(s, top_k):
    """Eq. 17 to 20 without α, summed over sequences, of affinities s [B, T, X]."""
    # Undisclosed: whether f counts the experts that were chosen. Eq. 18 says the best K of s.
    with torch.no_grad():
        best = torch.zeros_like(s).scatter(-1, s.topk(top_k, -1).indices, 1.0)
        f = best.mean(1) * (s.shape[-1] / top_k)  # Eq. 18: [B, X]
    p = (s / s.sum(-1, keepdim=True)).mean(1)  # Eq. 19, 20
    return (f * p).sum()

class AddLoss(torch.autograd.Function):
    """Passes x on and adds `loss` to whatever is minimised behind it, with weight 1."""

    @staticmethod
    def forward(ctx, x, loss):
        ctx.shape, ctx.kind = loss.shape, loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, torch.ones(ctx.shape, dtype=ctx.kind, device=gradient.device)

class Router(nn.Module):
    """§2.1.2, [B, T, D] -> experts and weights [B, T, K] and the balance loss times `balance`,
    which whoever trains sets to α / sequences of the global batch. All of it in fp32."""

    def __init__(self, dim, n_experts, top_k, n_groups, groups_kept, scale):
        super().__init__()
        self.settings, self.balance, self.loss = (top_k, n_groups, groups_kept, scale), 0.0, 0.0
        self.counts = True  # off where a pass is made again
        self.weight = nn.Parameter(torch.empty(n_experts, dim))  # e_i, the centroids
        self.register_buffer("bias", torch.zeros(n_experts))
        self.register_buffer("load", torch.zeros(n_experts), persistent=False)

    def forward(self, x):
        s = torch.sigmoid(F.linear(x.float(), self.weight))  # Eq. 15: [B, T, X]
        experts, weights = route(s, self.bias, *self.settings)
        if torch.is_grad_enabled() and self.counts:
            rows = experts.flatten()
            self.load.index_add_(0, rows, torch.ones_like(rows, dtype=torch.float32))
        loss = sequence_balance(s, self.settings[0]) * self.balance
        self.loss = loss.detach()
        return experts, weights, loss

class Permute(torch.autograd.Function):
    """Row order[i] // k of x [N, D] to place i; `inverse` undoes order. Two gathers, no sums."""

    @staticmethod
    def forward(ctx, x, order, inverse, k):
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx, gradient):
        (inverse,) = ctx.saved_tensors
        rows = gradient.index_select(0, inverse)
        return rows.unflatten(0, (-1, ctx.k)).sum(1) if ctx.k > 1 else rows, None, None, None

class Exchange(torch.autograd.Function):
    """§3.2.2, all-to-all of rows [M, D]: send[i] of them go to rank i of the group, receive[i] come
    from it. With fp8_out, or on the way back with fp8_back, they travel as E4M3 (§3.3.3)."""

    @staticmethod
    def forward(ctx, x, send, receive, group, fp8_out, fp8_back):
        ctx.send, ctx.receive, ctx.group, ctx.fp8_back = send, receive, group, fp8_back
        return all_to_all(x, send, receive, group, fp8_out)

    @staticmethod
    def backward(ctx, gradient):
        x = all_to_all(gradient, ctx.receive, ctx.send, ctx.group, ctx.fp8_back)
        return x, None, None, None, None, None

def all_to_all(x, send, receive, group, fp8=False):
    """The rows of x [M, D] where Exchange sends them."""
    if fp8:
        parts = (part[: len(x)] for part in quantize_gradient(x, 1, 128, powers=True))
        codes, scales = (all_to_all(p.view(torch.uint8), send, receive, group) for p in parts)
        pair = codes.view(torch.float8_e4m3fn), scales.view(torch.float32)
        return dequantize(*pair)[:, : x.shape[1]].type_as(x)
    rows = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(rows, x.contiguous(), receive, send, group=group)
    return rows

def grouped_mm(x, w, ends):
    """Rows of x [M, K], of which expert i has those up to ends[i], by its matrix in w [X, N, K]:
    [M, N]. Behind the last expert's rows it is undefined."""
    if x.is_meta:  # where PyTorch has it for bf16 alone: of the same size
        return x @ w[0].mT
    return F.grouped_mm(x, w.mT, offs=ends)

class Experts(nn.Module):
    """X SwiGLUs at once, [M, D] -> [M, D]: rows ends[i - 1] ... ends[i] go to expert i."""

    def __init__(self, n_experts, dim, hidden_dim, fp8):
        super().__init__()
        self.fp8 = fp8
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * hidden_dim, dim))
        self.down = nn.Parameter(torch.empty(n_experts, dim, hidden_dim))

    def forward(self, x, ends):
        if self.fp8:
            return FP8Experts.apply(x, self.gate_up, self.down, ends)
        hidden = grouped_mm(x, self.gate_up.type_as(x), ends).chunk(2, -1)
        return grouped_mm(GatedSiLU.apply(*hidden), self.down.type_as(x), ends)

class MoE(nn.Module):
    """§2.1.2, [B, T, D] -> [B, T, D]: shared experts and K routed ones, of which each rank of the
    group `ep` has a part; no token is dropped (Eq. 12 without its residual)."""

    def __init__(self, dim, expert_dim, n_experts, n_shared, route_settings, fp8, ep=None):
        super().__init__()
        self.ep, self.fp8 = ep, fp8
        self.router = Router(dim, n_experts, *route_settings)
        self.shared = GatedMLP(dim, n_shared * expert_dim, fp8) if n_shared else None
        self.experts = Experts(n_experts // group_size(ep), dim, expert_dim, fp8)

    def forward(self, x):
        experts, weights, loss = self.router(x)  # [B, T, K] twice
        k, rows = experts.shape[-1], experts.flatten()
        order = rows.argsort(stable=True)  # [N K], by expert
        inverse = order.argsort()
        counts = torch.zeros_like(self.router.bias, dtype=torch.long)
        counts = counts.index_add(0, rows, torch.ones_like(rows))  # [X]
        y = Permute.apply(x.flatten(0, 1), order, inverse, k)  # [N K, D]
        y = self.visit(y, counts) if self.ep else self.experts(y, counts.cumsum(0).int())
        y = Permute.apply(y, inverse, order, 1).unflatten(0, (-1, k))  # [N, K, D]
        y = (weights.flatten(0, 1)[:, None].type_as(y) @ y).view_as(x)  # Σ g FFN, Eq. 12
        y = AddLoss.apply(y, loss)
        return y + self.shared(x) if self.shared else y

    def visit(self, x, counts):
        """Rows x [N K, D], counts [X] of them for each expert, to the ranks that have those
        experts, through them, and back: dispatch and combine."""
        ranks, device = self.ep.size(), x.device
        send = counts.view(ranks, -1)
        receive = all_to_all(send, [1] * ranks, [1] * ranks, self.ep)  # [ranks, X / ranks]
        sizes = torch.stack((send.sum(1), receive.sum(1))).tolist()
        x = Exchange.apply(x, *sizes, self.ep, self.fp8, False)
        local = torch.arange(receive.shape[1], device=device).repeat(ranks)
        order = local.repeat_interleave(receive.flatten()).argsort(stable=True)
        inverse = order.argsort()
        y = self.experts(Permute.apply(x, order, inverse, 1), receive.sum(0).cumsum(0).int())
        return Exchange.apply(Permute.apply(y, inverse, order, 1), *sizes[::-1], self.ep, False,
                              self.fp8)  # fmt: skip

@contextlib.contextmanager
def recomputed(function, *inputs):
    """§3.2.3, yields the tensors function(*inputs): whatever is done with them inside the context
    does not keep them for its backward pass, which makes them again from the inputs."""
    outputs, again = function(*inputs), []
    places = {y.untyped_storage()._cdata: i for i, y in enumerate(outputs)}

    def pack(x):
        place = places.get(x.untyped_storage()._cdata)
        return x if place is None else (place, x.shape, x.stride(), x.storage_offset())

    def unpack(kept):
        if torch.is_tensor(kept):
            return kept
        if not again:
            with torch.no_grad():
                again.extend(function(*inputs))
        return again[kept[0]].as_strided(*kept[1:])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield outputs

def made_again(module):
    """The module as a function that keeps its inputs alone for the backward pass, which computes
    the rest once more; routers count the tokens of the first pass only."""

    @contextlib.contextmanager
    def uncounted():
        for router in routers(module):
            router.counts = False
        try:
            yield
        finally:
            for router in routers(module):
                router.counts = True

    contexts = lambda: (contextlib.nullcontext(), uncounted())  # noqa: E731
    return functools.partial(checkpoint, module, use_reentrant=False, context_fn=contexts)

class Block(nn.Module):
    """§2.1, [B, T, D] -> [B, T, D]: attention, and a SwiGLU or experts, each behind a norm and
    added to the residual stream."""

    def __init__(self, cfg, dense, ep=None):
        super().__init__()
        self.recompute, fp8 = cfg.recompute == "paper", cfg.precision == "fp8"
        heads = cfg.n_heads, cfg.q_rank, cfg.kv_rank, cfg.head_dim, cfg.rope_dim
        self.attn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attn = MultiHeadLatentAttention(cfg.dim, *heads, fp8, self.recompute)
        self.mlp_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        if dense:
            self.mlp = GatedMLP(cfg.dim, cfg.hidden_dim, fp8)
        else:
            settings = cfg.top_k, cfg.n_groups, cfg.groups_kept, cfg.route_scale
            experts = cfg.expert_dim, cfg.n_experts, cfg.n_shared
            self.mlp = MoE(cfg.dim, *experts, settings, fp8, ep)

    def forward(self, x, rope):
        x = x + self.behind(self.attn_norm, x, lambda h: self.attn(h, rope))
        return x + self.behind(self.mlp_norm, x, self.mlp)

    def behind(self, norm, x, function):
        """function(norm(x)), of which norm(x) is not kept if the paper's recomputation is on."""
        if not self.recompute:
            return function(norm(x))
        once = lambda x: (checkpoint(norm, x, use_reentrant=False),)  # noqa: E731
        with recomputed(once, x) as (h,):
            return function(h)

class MultiTokenPrediction(nn.Module):
    """§2.2, one module more (D = 1): the state of the main model [B, T, D] and the embeddings of
    the next tokens give the state [B, T - 1, D] that predicts the tokens after them. In parallel
    (Gloeckle et al., arXiv 2404.19737) the state alone does."""

    # Departure: --recompute paper keeps what these norms and the model's final one give.

    def __init__(self, cfg, ep=None):
        super().__init__()
        if cfg.mtp == "sequential":
            self.embedding_norm = RMSNorm(cfg.dim, cfg.norm_eps)
            self.state_norm = RMSNorm(cfg.dim, cfg.norm_eps)
            self.merge = Linear(2 * cfg.dim, cfg.dim, bias=False)  # M_1
        self.sequential, self.block = cfg.mtp == "sequential", Block(cfg, False, ep)
        self.final_norm = RMSNorm(cfg.dim, cfg.norm_eps)

    def forward(self, state, embedded, rope):
        # Undisclosed: a norm of its own before the shared head, and the order in M_1; as released.
        x, (cos, sin, mscale) = state[:, :-1], rope
        if self.sequential:
            parts = self.embedding_norm(embedded[:, 1:]), self.state_norm(x)
            x = self.merge(torch.cat(parts, -1))  # Eq. 21: [B, T - 1, D]
        return self.final_norm(self.block(x, (cos[:-1], sin[:-1], mscale)))  # Eq. 22

class DeepSeekV3(nn.Module):
    """§2, tokens [B, T] -> logits [B, T, V]; or a pipeline's stage of it, which has some layers,
    and takes and gives [B, T, D] where it is not the first or the last. With `ahead`, the tokens
    once more, the last stage also gives the logits [B, T - 1, V] of multi-token prediction."""

    def __init__(self, cfg, layers=None, first=True, last=True, ep=None):
        super().__init__()
        self.recompute, self.top_k = cfg.recompute == "block", cfg.top_k
        self.dtype = torch.bfloat16 if cfg.precision in ("bf16", "fp8") else torch.float32
        layers = range(cfg.n_layers) if layers is None else layers
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.dim) if first else None
        self.blocks = nn.ModuleDict({str(i): Block(cfg, i < cfg.n_dense, ep) for i in layers})
        self.final_norm = RMSNorm(cfg.dim, cfg.norm_eps) if last else None
        self.head = Linear(cfg.dim, cfg.vocab_size, bias=False) if last else None
        self.mtp = MultiTokenPrediction(cfg, ep) if last and cfg.mtp != "none" else None
        self.shared_embedding = None  # the first stage's, on a last stage
        self.extend(cfg)

    def extend(self, cfg):
        """Takes the rotary frequencies of cfg: YaRN's where the context is extended (§4.3)."""
        settings = cfg.rope_scaling, cfg.rope_factor, cfg.rope_original
        self.rope = rope_frequencies(cfg.rope_dim, cfg.rope_theta, *settings)

    def forward(self, x, ahead=None):
        if self.token_embedding is not None:
            x = self.token_embedding(x).to(self.dtype)  # [B, T, D]
        frequencies, mscale = self.rope
        positions = torch.arange(x.shape[1], device=x.device)
        angles = positions[:, None] * frequencies.to(x.device)  # [T, R/2]
        rope = angles.cos(), angles.sin(), mscale  # mscale² scales the logits, not the rotation
        blocks = self.blocks.values()
        if self.recompute and torch.is_grad_enabled():
            blocks = map(made_again, blocks)
        for block in blocks:
            x = block(x, rope)
        if self.head is None:
            return x
        state = self.final_norm(x)
        logits = self.head(state).float()  # [B, T, V]
        if ahead is None or self.mtp is None:
            return logits
        # Undisclosed: whether the module reads the state before or after the final norm; after it,
        # as the released weights are used.
        state = state if self.mtp.sequential else x
        embedded = (self.token_embedding or self.shared_embedding)(ahead).to(self.dtype)
        mtp = made_again(self.mtp) if self.recompute and torch.is_grad_enabled() else self.mtp
        return logits, self.head(mtp(state, embedded, rope)).float()  # Eq. 23

def group_size(group):
    """Ranks of a process group; None is a group of one."""
    return group.size() if group else 1

def init_weights(model, cfg, ep=None):
    """§4.2: N(0, 0.006) for all matrices, and gains of 1. A matrix is drawn from (seed, its name),
    an expert's from its number too, so that every layout starts from the same numbers."""
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            p.data.fill_(1.0)
        elif re.search(r"(token_embedding|head|_down|_up|out|down|merge|router)\.weight$", name):
            draw = torch.Generator().manual_seed(stable_hash(cfg.seed, name))
            p.data.copy_(torch.empty(p.shape).normal_(0.0, cfg.init_std, generator=draw))
        elif is_expert(name):
            first = ep.rank() * len(p) if ep else 0
            for i, matrix in enumerate(p.data):
                draw = torch.Generator().manual_seed(stable_hash(cfg.seed, name, first + i))
                drawn = torch.empty(matrix.shape).normal_(0.0, cfg.init_std, generator=draw)
                matrix.copy_(drawn)
        else:
            raise ValueError(f"no rule initialises {name}")
    for router in routers(model):
        router.bias.zero_()
        router.load.zero_()

def is_expert(name):
    """Whether a parameter belongs to the routed experts, of which a rank has a part."""
    return ".experts." in name

def routers(model):
    """The routers of a model or a part of it, in order."""
    return [module for module in model.modules() if isinstance(module, Router)]

def count_parameters(model):
    """(total, activated by a token) parameters of the main model, as the paper counts them:
    without multi-token prediction, which inference drops, and without the balancing biases."""
    total = activated = 0
    for name, p in model.named_parameters():
        if not name.startswith("mtp."):
            total += p.numel()
            activated += p.numel()
            if is_expert(name):
                activated -= p.numel() * (len(p) - model.top_k) // len(p)
    return total, activated

def flops_per_token(cfg):
    """Training FLOPs per token: 2 per weight of a matrix product that the token meets forward,
    twice that backward, multi-token prediction included. Attention counts as causal, (T + 1) / 2
    keys a query, half of what the full square gives."""
    query, n_moe = cfg.head_dim + cfg.rope_dim, cfg.n_layers - cfg.n_dense
    attention = cfg.dim * (cfg.q_rank + cfg.kv_rank + cfg.rope_dim + cfg.n_heads * cfg.head_dim)
    attention += (cfg.q_rank or cfg.dim) * cfg.n_heads * query
    attention += cfg.kv_rank * cfg.n_heads * 2 * cfg.head_dim
    attention += cfg.n_heads * (query + cfg.head_dim) * (cfg.seq_len + 1) / 2  # q kᵀ, A v
    experts = 3 * cfg.dim * cfg.expert_dim * (cfg.n_shared + cfg.top_k) + cfg.dim * cfg.n_experts
    weights = cfg.n_layers * attention + cfg.n_dense * 3 * cfg.dim * cfg.hidden_dim
    weights += n_moe * experts + cfg.dim * cfg.vocab_size
    if cfg.mtp != "none":
        merge = 2 * cfg.dim**2 if cfg.mtp == "sequential" else 0
        weights += attention + experts + merge + cfg.dim * cfg.vocab_size
    return 6 * weights

# ---------------------------------------- Data ----------------------------------------

@functools.lru_cache(1)
def document_tokenizer(name):
    """The tokenizer of that name, loaded once; None without a name."""
    return load_tokenizer(name, SPECIALS) if name else None

def fill_in_the_middle(ids, tokenizer, key):
    """§4.1, PSM: a document's ids, whose text is cut at two places, as begin f_pre hole f_suf end
    f_middle, and the id that ended it."""
    # Undisclosed: the places. Two characters, uniformly.
    begin, hole, end = map(tokenizer.encode_single_token, SPECIALS[1:])
    with explain(f"the data is not that of --tokenizer {tokenizer.name}", KeyError):
        text = tokenizer.decode(ids[:-1].tolist(), errors="ignore")
    first, second = sorted(stable_hash(key, i) % (len(text) + 1) for i in range(2))
    parts = text[:first], text[first:second], text[second:]
    pre, middle, suffix = map(tokenizer.encode_ordinary, parts)
    return np.array([begin, *pre, hole, *suffix, end, *middle, ids[-1]])

@functools.lru_cache(1)
def joined_tokens(tokenizer):
    """{id of a token of punctuation and line breaks: (id of the former, id of the latter)}."""
    pairs = {}
    texts = set(tokenizer.token_byte_values())
    for text in texts:
        match = re.fullmatch(rb"([!-/:-@\[-`{-~]+)([\r\n]+)", text)
        if match and texts.issuperset(match.groups()):
            first, second = map(tokenizer.encode_single_token, match.groups())
            pairs[tokenizer.encode_single_token(text)] = first, second
    return pairs

def prepare_document(ids, tokenizer, fim, split_joined, key):
    """(ids of a document as the model sees it, whether they are to fill in the middle): some joined
    tokens split, some documents rearranged, as `key` decides."""
    # Undisclosed: the share of joined tokens that are split (§4.1). None, unless --split_joined.
    if split_joined:
        pairs, n = joined_tokens(tokenizer), 2**20
        ids = [
            pairs[i] if i in pairs and stable_hash(key, place) % n < split_joined * n else (i,)
            for place, i in enumerate(ids.tolist())
        ]
        ids = np.array(list(itertools.chain(*ids)))
    complete = len(ids) > 1 and ids[-1] == tokenizer.eot_token
    if complete and stable_hash(key, "fim") % 2**20 < fim * 2**20:
        return fill_in_the_middle(ids, tokenizer, key), True
    return ids, False

@functools.lru_cache(32)
def pack(corpus, tokenizer, block, length, n, fim, split_joined, seed):
    """Block `block` of n sequences: (ids [n, T + 1], -1 where none are left; of each sequence the
    documents that begin, those rearranged, and cuts that no document's length asks for)."""
    # Undisclosed: the packing, "inspired by" best-fit packing (arXiv 2404.10830). Here a stretch of
    # the corpus as long as n sequences goes into them: documents, cut where they are longer than a
    # sequence, by size into the fullest sequence with room; what fits nowhere is cut to fill up
    # what is left, and what fill-in-the-middle has added beyond that, some 0.1 %, is lost.
    window, pieces, counts = length + 1, [], np.zeros((n, 3), np.int64)
    ids = corpus.window(block, n * window - 1, seed)
    for i, part in enumerate(np.split(ids, np.flatnonzero(ids == corpus.separator) + 1)):
        rearranged = False
        if tokenizer and len(part) and i:  # the first is the end of one that began before
            key = (seed, "document", length, block, i)
            part, rearranged = prepare_document(part, tokenizer, fim, split_joined, key)
        cuts = range(0, len(part), window)
        pieces += [(part[j : j + window], i > 0 == j, rearranged and j == 0) for j in cuts]
    rows, used = np.full((n, window), -1, np.int32), [0] * n
    room, rest = [(window, row) for row in range(n)], []

    def place(row, piece, *events):
        rows[row, used[row] : used[row] + len(piece)] = piece
        used[row] += len(piece)
        counts[row] += events

    for piece in sorted(pieces, key=lambda piece: -len(piece[0])):
        best = bisect.bisect_left(room, (len(piece[0]), -1))
        if best == len(room):
            rest.append(piece)
            continue
        left, row = room.pop(best)
        place(row, *piece, 0)
        bisect.insort(room, (left - len(piece[0]), row))
    for piece, *events in rest:
        while len(piece) and room[-1][0]:
            left, row = room.pop()
            place(row, piece[:left], *events, len(piece) > left)
            piece, events = piece[left:], (0, 0)
            bisect.insort(room, (window - used[row], row))
    return rows, counts

def get_batch(corpus, first, n, cfg):
    """Sequences first ... first + n - 1 of the run, whatever the ranks or the moment: tokens and
    targets [n, T]; and the counts n_targets, n_bytes (of the targets' text), n_sequences,
    n_documents, n_fim and n_cut. Held-out text is neither packed nor rearranged."""
    windows, counts, size = [], np.zeros(3, np.int64), min(cfg.pack, corpus.n_windows(cfg.seq_len))
    while size > 1 and not corpus.n_windows(size * (cfg.seq_len + 1) - 1) > 3:
        size //= 2
    for i in range(first, first + n):
        if corpus.in_order:
            windows.append(corpus.window(i, cfg.seq_len, cfg.seed))
            continue
        group, place = divmod(i, 16 * size)  # 16 blocks at a time are mixed
        place = shuffled(place, 16 * size, (cfg.seed, "pack", group))
        settings = cfg.seq_len, size, cfg.fim, cfg.split_joined, cfg.seed
        tokenizer = document_tokenizer(cfg.tokenizer)
        rows, more = pack(corpus, tokenizer, 16 * group + place // size, *settings)
        windows.append(rows[place % size].astype(np.int64))
        counts = counts + more[place % size]
    windows = np.stack(windows)
    tokens, targets = windows[:, :-1].copy(), windows[:, 1:].copy()
    tokens[tokens < 0] = max(corpus.separator, 0)
    targets[targets < 0] = -100
    scored = targets[targets >= 0]
    names = dict(zip(("n_documents", "n_fim", "n_cut"), counts.tolist()))
    names |= {"n_targets": scored.size, "n_bytes": int(corpus.token_bytes[scored].sum())}
    tokens, targets = torch.from_numpy(tokens), torch.from_numpy(targets)
    return {"tokens": tokens, "targets": targets, "n_sequences": n, **names}

# ---------------------------------------- Objective ----------------------------------------

def nats_ahead(output, targets):
    """(sum of the nats of targets [B, T], sum of those of multi-token prediction, or 0) of what the
    model gives: logits [B, T, V], and logits [B, T - 1, V] one target further."""
    logits, *more = output if isinstance(output, tuple) else (output,)
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    if not more:
        return nats, nats.detach() * 0
    further = targets[:, 1:].flatten()  # Eq. 24: t_3 ... t_{T+1}
    return nats, F.cross_entropy(more[0].flatten(0, 1), further, reduction="sum")

def objective(model, batch, cfg):
    """§2.2 and Eq. 17: L_main + λ L_MTP + Σ L_Bal over layers, with the first two as metrics. Nats
    are divided by batch["n_targets"], those of multi-token prediction too, although it has one
    less in each sequence (Eq. 24), and L_Bal by batch["n_sequences"], of the global batch."""
    # Undisclosed: how L_Bal adds up. Summed over layers and averaged over sequences, as in V2.
    for router in (found := routers(model)):
        router.balance = cfg.balance_loss / batch["n_sequences"]
    output = model(batch["tokens"], batch["tokens"])
    n_targets = max(batch["n_targets"], 1)
    main, ahead = (nats / n_targets for nats in nats_ahead(output, batch["targets"]))
    # L_Bal is here by its value alone; its gradient comes from AddLoss, inside the model
    loss = main + cfg.mtp_weight * ahead + sum(router.loss for router in found)
    return loss, {"main": main.detach(), "mtp": ahead.detach()}

# ---------------------------------------- Optimizer ----------------------------------------

class AdamWithBF16Moments(torch.optim.Optimizer):
    """§3.3.3, AdamW whose moments are kept in bf16 and whose arithmetic is fp32."""

    def __init__(self, groups, lr, betas, eps):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))

    def load_state_dict(self, state_dict):
        """torch's own casts what it loads to the dtype of the parameters."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state |= {name: state[name].bfloat16() for name in ("exp_avg", "exp_avg_sq")}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = torch.zeros_like(p, dtype=torch.bfloat16)
                state["step"] += 1
                n = state["step"].item()
                first = state["exp_avg"].float().lerp_(p.grad, 1 - beta1)
                second = state["exp_avg_sq"].float().mul_(beta2)
                second.addcmul_(p.grad, p.grad, value=1 - beta2)
                state["exp_avg"].copy_(first)
                state["exp_avg_sq"].copy_(second)
                root = (second / (1 - beta2**n)).sqrt_().add_(group["eps"])
                p.mul_(1 - lr * group["weight_decay"])
                p.addcdiv_(first, root, value=-lr / (1 - beta1**n))

def build_optimizer(zero, cfg):
    """§4.2: AdamW over the masters of a ZeRO1; with bf16 moments under fp8."""
    # Undisclosed: eps, and what is decayed: matrices and embeddings, no gain of a norm.
    groups = {}
    for name, master in zero.masters.items():
        decayed = not name.endswith("norm.weight")
        group = groups.setdefault((decayed, is_expert(name)), [])  # a mesh each
        group.append(master)
    groups = [
        dict(params=group, weight_decay=cfg.weight_decay * decayed)
        for (decayed, _), group in groups.items()
    ]
    settings = dict(lr=cfg.lr, betas=(0.9, 0.95), eps=cfg.adam_eps)
    if cfg.precision == "fp8":
        return AdamWithBF16Moments(groups, **settings)
    return torch.optim.AdamW(groups, **settings, fused=True)

def learning_rate(step, cfg):
    """§4.2: linear warm-up over updates; then by tokens: constant to 10 of 14.8 parts, a cosine to
    14.3, constant to 14.633, constant to the end and in the extension (§4.3). With --decay steps,
    V2's: constant, and down twice. step counts the updates made before."""
    share = at_step(step, cfg)[2]
    if step < cfg.warmup_steps:
        return cfg.lr * step / cfg.warmup_steps
    if cfg.decay == "steps":
        return cfg.lr * (1.0 if share < 0.8 else 0.316 if share < 0.9 else 0.1)
    if share >= 14.633 / 14.8:
        return cfg.last_lr
    done = min(max((share * 14.8 - 10) / 4.3, 0.0), 1.0)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) / 2 * (1 + math.cos(math.pi * done))

def update_biases(found, gamma, group):
    """§2.1.2: b += γ sign(mean load - load) for each router, with the loads of all data-parallel
    ranks and micro-batches of an update; returns the loads over their mean, [layers, X]."""
    loads = torch.stack([router.load for router in found])
    dist.all_reduce(loads, group=group)
    mean = loads.mean(1, keepdim=True)
    for router, change in zip(found, torch.sign(mean - loads)):
        router.bias += gamma * change
        router.load.zero_()
    return loads / mean.clamp(min=1e-9)

# ---------------------------------------- Precision ----------------------------------------

# Under bf16 and fp8 the weights are bf16 and the masters that AdamW updates fp32, gradients are
# summed in fp32, and residual stream and attention are bf16; router, norm statistics, rotary
# angles, softmax and loss are fp32. Under fp8 (§3.3) the products of attention's projections, of
# the feed-forward layers and of the experts take E4M3 operands, and AdamW's moments are bf16;
# embedding, head, router, norms, attention itself and the merge of multi-token prediction are not
# cast down. Off Hopper the same arithmetic is emulated: codes times scales, multiplied in fp32.
# Departure: E4M3 codes of weights come from their bf16 copies, and PyTorch has no type of 12 bits:
# the cache of attention's output has the numbers of E5M6 in bf16, beside the output that attention
# itself keeps. Only routed experts keep the input of their SwiGLU in FP8.

PEAK_FLOPS = {  # dense bf16, by the device's exact name; a device not listed gets no MFU
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA B200": 2250e12,
}  # fmt: skip

def quantize(x, rows, columns, powers=False, least=1e-4):
    """§3.3.2: x [..., M, N] in tiles of rows x columns as (E4M3 codes [..., M', N'], fp32 scales
    [..., M' / rows, N' / columns]), x = code * scale, M' and N' padded to whole tiles, and to 16
    rows. The largest of each tile, at least `least`, becomes 448; with powers a scale is a power of
    two."""
    down, right = -x.shape[-2] % max(rows, 16), -x.shape[-1] % columns
    x = F.pad(x.float(), (0, right, 0, down))
    tiles = x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))  # [..., m, rows, n, columns]
    scales = tiles.abs().amax((-3, -1)).clamp(min=least) / 448
    if powers:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    codes = (tiles / scales[..., :, None, :, None]).to(torch.float8_e4m3fn)
    return codes.flatten(-2).flatten(-3, -2), scales

# Undisclosed: how small gradients are kept. The released kernels, for inference, take 1e-4 as the
# least, below which gradients of a loss that is divided by all tokens of a batch would vanish.
quantize_gradient = functools.partial(quantize, least=1e-30)

def dequantize(codes, scales):
    """The fp32 numbers [..., M, N] of codes and scales."""
    tiles = codes.unflatten(-1, (scales.shape[-1], -1)).unflatten(-3, (scales.shape[-2], -1))
    return (tiles.float() * scales[..., :, None, :, None]).flatten(-2).flatten(-3, -2)

def scaled_product(a, b, dtype):
    """a bᵀ of codes and scales of a [M, K] and b [N, K] in tiles along K, summed in fp32."""
    (a, scale_a), (b, scale_b) = a, b
    if not (a.is_cuda and torch.cuda.get_device_capability(a.device) == (9, 0)):
        return (dequantize(a, scale_a) @ dequantize(b, scale_b).T).to(dtype)
    kinds, scales = [], []
    for codes, scale in ((a, scale_a), (b, scale_b)):  # the layouts that the kernels ask for
        if len(scale) == len(codes):
            kinds.append(F.ScalingType.BlockWise1x128)
            scales.append(scale.t().contiguous().t())
        else:
            kinds.append(F.ScalingType.BlockWise128x128)
            scales.append(F.pad(scale, (0, -scale.shape[1] % 4)).t())
    return F.scaled_mm(a, b.t(), scales[0], kinds[0], scales[1], kinds[1], output_dtype=dtype)

def transposed(pair):
    """Codes and scales of the transpose of a matrix of square tiles."""
    return tuple(part.mT.contiguous() for part in pair)

def round_e5m6(x):
    """§3.3.3: x to the nearest number of 5 bits of exponent and 6 of mantissa, ties to even."""
    quantum = torch.exp2((torch.frexp(x).exponent - 1).clamp(min=-14).float() - 6)
    return (torch.round(x / quantum) * quantum).clamp(-65024, 65024)

def cache_e5m6(x):
    """What a cache in E5M6 gives back of x [N, D], with a power-of-two scale for each 1 x 128."""
    tiles = F.pad(x.float(), (0, -x.shape[-1] % 128)).unflatten(-1, (-1, 128))
    scales = tiles.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 65024
    scales = torch.exp2(torch.ceil(torch.log2(scales)))
    return (round_e5m6(tiles / scales) * scales).flatten(-2)[..., : x.shape[-1]].type_as(x)

class FP8Product(torch.autograd.Function):
    """§3.3.2, y = x wᵀ of x [N, D] and w [F, D]: x and the gradient of y in tiles of 1 x 128, w in
    blocks of 128 x 128; both factors of the weight's gradient in tiles of 128 x 1, along tokens.
    x is kept in E4M3, or with `wide` in E5M6."""

    @staticmethod
    def forward(ctx, x, w, wide):
        tiles = quantize(x, 1, 128, powers=wide)
        ctx.wide, ctx.sizes = wide, x.shape
        ctx.save_for_backward(w, *((cache_e5m6(x),) if wide else tiles))
        return scaled_product(tiles, quantize(w, 128, 128), x.dtype)[: len(x), : len(w)]

    @staticmethod
    def backward(ctx, gradient):
        w, *cache = ctx.saved_tensors
        n, width = ctx.sizes
        blocks = transposed(quantize(w, 128, 128))
        tiles = quantize_gradient(gradient, 1, 128)
        dx = scaled_product(tiles, blocks, gradient.dtype)[:n, :width]
        x = cache[0] if ctx.wide else dequantize(*cache)[:n, :width]
        columns = quantize_gradient(gradient.T, 1, 128), quantize(x.T, 1, 128, powers=ctx.wide)
        return dx, scaled_product(*columns, torch.float32)[: len(w), :width], None

class FP8Linear(nn.Linear):
    """A linear layer without bias whose three matrix products take FP8 operands."""

    wide_cache = False  # whether the input is kept in E5M6

    def forward(self, x):
        y = FP8Product.apply(x.flatten(0, -2), self.weight, self.wide_cache)
        return y.unflatten(0, x.shape[:-1])

def grouped_product(a, b, ends, dtype):
    """Rows of a, codes and scales of [M, K], each by the matrix of its expert, codes and scales of
    b [X, N, K]: [M, N]. Expert i has the rows up to ends[i]; behind the last they are 0."""
    if a[0].is_cuda and torch.cuda.get_device_capability(a[0].device) == (9, 0):
        # PyTorch has no grouped product with these scales: one product for each expert of the rank
        bounds, parts = [0, *ends.tolist()], []
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            rows = tuple(part[start:end] for part in a)
            parts.append(scaled_product(rows, (b[0][i], b[1][i]), dtype))
        parts.append(parts[0].new_zeros(len(a[0]) - bounds[-1], parts[0].shape[1]))
        return torch.cat(parts)
    rows = grouped_mm(dequantize(*a), dequantize(*b), ends).to(dtype)
    unused = torch.arange(len(rows), device=rows.device) >= ends[-1]
    return rows.masked_fill_(unused[:, None], 0)

def grouped_weight_gradient(a, b, ends, powers):
    """Σ over an expert's rows of aᵀ b, [X, N, K], of a gradient a [M, N] and b [M, K] in tiles of
    128 x 1. What comes from tiles with powers of two keeps them, and with them every digit."""
    a, b = quantize_gradient(a, 128, 1, powers[0]), quantize(b, 128, 1, powers[1])
    if a[0].is_cuda and torch.cuda.get_device_capability(a[0].device) == (9, 0):
        a, b = transposed(a), transposed(b)
        parts = []
        for start, end in itertools.pairwise([0, *ends.tolist()]):
            pair = (
                (codes[:, start:end].contiguous(), scales[:, start // 128 : end // 128])
                for codes, scales in (a, b)
            )
            parts.append(scaled_product(*pair, torch.float32))
        return torch.stack(parts)
    return F.grouped_mm(dequantize(*a).T, dequantize(*b), offs=ends)

class FP8Experts(torch.autograd.Function):
    """§3.3, the SwiGLUs of X experts over rows x [M, D] sorted by expert: gate_up [X, 2F, D], down
    [X, D, F]. Rows are laid out anew so that each expert's begin a tile. Kept in FP8 are the input,
    which comes with power-of-two scales, and the SwiGLU's input, whose output is made again."""

    @staticmethod
    def forward(ctx, x, gate_up, down, ends):
        tile = 128 if any(ctx.needs_input_grad) else 16
        sizes = ends.diff(prepend=ends.new_zeros(1))
        padded = (sizes + tile - 1) // tile * tile
        starts, rows = padded.cumsum(0) - padded, torch.arange(len(x), device=x.device)
        expert = torch.searchsorted(ends, rows.int(), right=True)
        places = starts[expert] + rows - (ends - sizes)[expert]  # of x among the padded rows
        total = -(-(len(x) + (tile - 1) * len(sizes)) // tile) * tile
        ends = padded.cumsum(0).int()
        x = x.new_zeros(total, x.shape[1]).index_copy(0, places, x)
        tiles = quantize(x, 1, 128, powers=True)
        hidden = grouped_product(tiles, quantize(gate_up, 128, 128), ends, x.dtype)
        hidden = hidden[:, : gate_up.shape[1]]
        gate, up = hidden.chunk(2, -1)
        y = quantize(F.silu(gate) * up, 1, 128)
        y = grouped_product(y, quantize(down, 128, 128), ends, x.dtype)
        ctx.save_for_backward(gate_up, down, places, ends, *tiles, *quantize(hidden, 1, 128))
        return y[places, : x.shape[1]]

    @staticmethod
    def backward(ctx, gradient):
        gate_up, down, places, ends, *kept = ctx.saved_tensors
        x = dequantize(*kept[:2])[:, : gate_up.shape[2]]
        gate, up = dequantize(*kept[2:])[:, : gate_up.shape[1]].chunk(2, -1)
        dy = gradient.new_zeros(len(x), gradient.shape[1]).index_copy(0, places, gradient)
        tiles = quantize_gradient(dy, 1, 128, powers=True)
        d_hidden = grouped_product(tiles, transposed(quantize(down, 128, 128)), ends, dy.dtype)
        d_hidden = d_hidden[:, : down.shape[2]].float()
        dy_tiles, h = dequantize(*tiles)[:, : dy.shape[1]], F.silu(gate) * up
        d_down = grouped_weight_gradient(dy_tiles, h, ends, (True, False))
        d_gate = torch.ops.aten.silu_backward(d_hidden * up, gate)
        d_hidden = torch.cat((d_gate, d_hidden * F.silu(gate)), -1).to(dy.dtype)
        blocks = transposed(quantize(gate_up, 128, 128))
        dx = grouped_product(quantize_gradient(d_hidden, 1, 128), blocks, ends, dy.dtype)
        d_gate_up = grouped_weight_gradient(d_hidden, x, ends, (False, True))
        return dx[places, : x.shape[1]], d_gate_up, d_down, None

# ---------------------------------------- Parallelism ----------------------------------------

def expert_mesh(cfg, device_type):
    """§3.2: ranks by pipeline stage, copy of the experts, and part of the experts, the last
    innermost: where a node has X / n_groups experts, a token reaches groups_kept nodes at most."""
    sizes = dict(pp=cfg.pp, dp=cfg.dp, ep=cfg.ep)
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

def fit_layout(cfg, ranks):
    """cfg with ep and dp, where they are 0, chosen: experts on as many ranks as divide them and the
    ranks, 8 at most; copies on all ranks that are left."""
    left = ranks // max(cfg.pp, 1)
    ep = cfg.ep or (left // cfg.dp if cfg.dp else math.gcd(left, cfg.n_experts, 8))
    dp = cfg.dp or left // max(ep, 1)
    if min(cfg.pp, ep) < 1 or cfg.pp * ep * dp != ranks:
        sizes = f"pp {cfg.pp} x ep {cfg.ep or 'any'} x dp {cfg.dp or 'any'}"
        raise ValueError(f"{sizes} are not {ranks} ranks")
    return dataclasses.replace(cfg, ep=ep, dp=dp)

def reading_ranks(cfg):
    """Ranks that read sequences of their own: all with the same part of the layers."""
    return max(cfg.dp, 1) * max(cfg.ep, 1)

def stages_of(cfg, rank):
    """DualPipe's stages of a pipeline rank as (number, layers, is first, is last): of 2 pp stages,
    one from the front and its mirror image from the back, so that the first and the last, which
    share embedding and head, share a rank (§3.2.3)."""
    # Undisclosed: how the 61 layers are cut. Evenly, the head counted as two.
    n = 2 * cfg.pp if cfg.pp > 1 else 1
    edges = [min(round((cfg.n_layers + 2) * i / n), cfg.n_layers) for i in range(n)]
    edges.append(cfg.n_layers)
    own = sorted({rank, n - 1 - rank})
    return [(i, range(edges[i], edges[i + 1]), i == 0, i == n - 1) for i in own]

def keeps_bf16(name, cfg):
    """Whether a parameter is kept in bf16, and its master in fp32."""
    return cfg.precision in ("bf16", "fp8") and not re.search(r"(norm|router)\.weight$", name)

def parallelize(model, cfg, mesh):
    """Gives a model on the meta device, or a stage of it, its memory, in bf16 but for norms and
    routers unless cfg.precision is fp32, with gradients in fp32."""
    for name, p in model.named_parameters():
        if keeps_bf16(name, cfg):
            p.data = p.data.bfloat16()
    model.to_empty(device=mesh.device_type)
    for p in model.parameters():
        p.grad_dtype = torch.float32
    if cfg.compile:
        torch.compiler.config.fail_on_recompile_limit_hit = True
        torch.compiler.config.recompile_limit = 64  # a graph for each length and width
        for module in model.modules():
            if isinstance(module, (MultiHeadLatentAttention, GatedMLP)):
                module.compile(dynamic=False)
    return model

class ZeRO1:
    """§3.2, ZeRO-1 written out: all ranks have the weights of their stage and experts, and each an
    equal part of every parameter's fp32 master and Adam moments. Gradients are summed over ranks
    into those parts, and new weights gathered from them, a block of the model at a time."""

    def __init__(self, model, mesh):
        self.ep, self.copies, self.data = mesh["ep"], mesh["dp"], mesh["dp", "ep"]._flatten("data")
        self.nested = self.ep if self.copies.size() == 1 else self.copies
        if min(self.ep.size(), self.copies.size()) > 1:  # cut by ep and then by dp
            ranks = mesh.mesh.mT.contiguous()
            turned = DeviceMesh(mesh.device_type, ranks, mesh_dim_names=("pp", "ep", "dp"))
            self.nested = turned["ep", "dp"]
        self.parameters, self.masters = dict(model.named_parameters()), {}
        for name, p in self.parameters.items():
            own = self.part(name, p.data.view(-1))  # fp32 weights are their own masters
            own = own if p.dtype == torch.float32 else own.float()
            self.masters[name] = nn.Parameter(self.spread(name, own))
        buckets = {}
        for name, p in self.parameters.items():
            key = *name.split(".")[:2], is_expert(name), p.dtype
            buckets.setdefault(key, []).append(name)
        self.buckets = list(buckets.values())

    def mesh(self, name):
        """The ranks that have the same parameter."""
        return self.copies if is_expert(name) else self.data

    def part(self, name, flat):
        """This rank's part of a flat tensor, the last ranks' shorter or empty."""
        mesh, size = self.mesh(name), -(-len(flat) // self.mesh(name).size())
        return flat[mesh.get_local_rank() * size :][:size]

    def spread(self, name, own):
        """A part as a DTensor, so that a checkpoint of one layout fits another."""
        if self.data.size() == 1:
            return own
        mesh, size = self.data, self.parameters[name].numel()
        if is_expert(name):
            mesh, size = self.nested, size * self.ep.size()
        placements, shape = [Shard(0)] * mesh.ndim, torch.Size([size])
        return DTensor.from_local(own, mesh, placements, run_check=False, shape=shape, stride=(1,))

    def rows(self, name, flat):
        """A flat tensor as [ranks, size of a part], padded with zeros."""
        n = self.mesh(name).size()
        return F.pad(flat, (0, -len(flat) % n)).view(n, -1)

    def reduce(self):
        """Sums gradients over ranks into the masters' .grad, and frees the parameters'."""
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        for names in self.buckets:
            mesh, sums = self.mesh(names[0]), [self.parameters[n].grad.view(-1) for n in names]
            if mesh.size() > 1:
                rows = [self.rows(n, flat) for n, flat in zip(names, sums)]
                sizes = [row.shape[1] for row in rows]
                total = rows[0].new_empty(sum(sizes))
                scatter(total, torch.cat(rows, 1).flatten(), group=mesh.get_group())
                sums = total.split(sizes)
            for name, own in zip(names, sums):
                own = own[: len(self.local(self.masters[name]))]
                self.masters[name].grad = self.spread(name, own)
                self.parameters[name].grad = None

    @torch.no_grad()
    def gather(self):
        """Writes the masters of all ranks to the parameters."""
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        for names in self.buckets:
            mesh, weights = self.mesh(names[0]), [self.parameters[n].data.view(-1) for n in names]
            sizes = [-(-len(flat) // mesh.size()) for flat in weights]
            for name, flat in zip(names, weights):
                if flat.dtype != torch.float32:
                    self.part(name, flat).copy_(self.local(self.masters[name]))
            if mesh.size() > 1:
                own = [self.part(name, flat) for name, flat in zip(names, weights)]
                own = [F.pad(part, (0, size - len(part))) for part, size in zip(own, sizes)]
                rows = own[0].new_empty(mesh.size() * sum(sizes))
                gather(rows, torch.cat(own), group=mesh.get_group())
                for flat, row in zip(weights, rows.view(mesh.size(), -1).split(sizes, 1)):
                    flat.copy_(row.flatten()[: len(flat)])

    def local(self, tensor):
        """What this rank has of a master."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def clip(self, *numbers, limit):
        """(norm of the whole gradient, numbers summed over ranks), after scaling the gradient down
        to `limit`. What several ranks hold is in one part, so that it counts once."""
        parts = [self.local(master.grad) for master in self.masters.values()]
        square = nn.utils.get_total_norm(parts).double() ** 2
        sums = torch.stack([square, *(square.new_tensor(0.0) + number for number in numbers)])
        dist.all_reduce(sums)
        square, *sums = sums.tolist()  # an update waits for the device here, and in Exchange
        norm = math.sqrt(square) if square >= 0 else math.nan
        if limit and norm > limit:
            torch._foreach_mul_(parts, limit / (norm + 1e-6))
        return norm, *sums

class VStage(PipelineStage):
    """PyTorch's stage, mended where its neighbour is on the same rank: without gradients there is
    none to hand over, and (in 2.11, under gloo) a rank must not wait for a greeting of its own."""

    def _get_init_p2p_neighbors_ops(self):
        operations = super()._get_init_p2p_neighbors_ops()
        return [operation for operation in operations if operation.peer != dist.get_rank()]

    def backward_one_chunk(self, chunk, loss=None, full_backward=True, last_backward=False):
        """Of blocks that are made again both parts at once: apart, each would make them again."""
        whole = full_backward or self.whole_backward
        return super().backward_one_chunk(chunk, loss, whole, last_backward)

    def backward_weight_one_chunk(self, *args, **kwargs):
        """The weights' part, if it has not been done."""
        if not self.whole_backward:
            super().backward_weight_one_chunk(*args, **kwargs)

    def get_local_bwd_output(self, *args):
        """The gradient of this stage's input, for the stage before it."""
        return super().get_local_bwd_output(*args) if self.has_backward else None

    def set_local_bwd_input(self, *args):
        """Takes the gradient of this stage's output."""
        if self.has_backward:
            super().set_local_bwd_input(*args)

class DualPipe:
    """The part of the model that one rank has, run over micro-batches: one after the other where
    that is all layers, and else by DualPipe's schedule (§3.2.1), in PyTorch's form DualPipeV, which
    needs one copy of the parameters where the paper's needs two."""

    def __init__(self, cfg, mesh):
        """Builds this rank's part, without values yet."""
        self.mesh, self.schedule, self.main, self.ahead = mesh, None, 0.0, 0.0
        self.ep = mesh["ep"].get_group() if mesh["ep"].size() > 1 else None
        self.data_rank = mesh["dp"].get_local_rank() * cfg.ep + mesh["ep"].get_local_rank()
        self.stages, self.model = [], nn.Module()  # of all parameters, by their names in the whole
        self.model.blocks = nn.ModuleDict()
        for _, *part in stages_of(cfg, mesh["pp"].get_local_rank()):
            with torch.device("meta"):
                stage = DeepSeekV3(cfg, *part, self.ep)
            self.stages.append(parallelize(stage, cfg, mesh))
            self.model.blocks.update(stage.blocks)
            for name in ("token_embedding", "final_norm", "head", "mtp"):
                if getattr(stage, name) is not None:
                    setattr(self.model, name, getattr(stage, name))
        if len(self.stages) > 1:  # the last stage has it, too, and so gets gradients for it
            self.stages[-1].shared_embedding = self.stages[0].token_embedding
        self.routers = routers(self.model)

    def share(self, cfg):
        """To be called once the parameters have values: cuts them into masters. What a checkpoint
        holds is in .saved: masters, balancing biases and the moving average."""
        self.zero, self.saved = ZeRO1(self.model, self.mesh), nn.Module()
        for name, master in self.zero.masters.items():
            self.saved.register_parameter(name.replace(".", "/"), master)
        for name, buffer in self.model.named_buffers():
            if name.endswith("router.bias"):
                self.saved.register_buffer(name.replace(".", "/"), buffer)
        where = ((mesh.get_local_rank(), mesh.size()) for mesh in (self.zero.copies, self.zero.ep))
        self.average, place = {}, f"{[*where]}"  # it goes on in the same layout alone
        for name, master in self.zero.masters.items() if cfg.ema else ():
            self.average[name] = self.zero.local(master.data).cpu().clone()
            key = f"average/{place}/{name}".replace(".", "/")
            self.saved.register_buffer(key, self.average[name])

    def enter(self, cfg):
        """Prepare for a phase of the run, and print it: positions, and a schedule, whose shapes are
        fixed."""
        self.cfg, pp = cfg, self.mesh["pp"]
        for stage in self.stages:
            stage.extend(cfg)
        steps, micro = split_batch(cfg, reading_ranks(cfg))
        print(f"rope scaling {cfg.rope_scaling} | tokens per step", end=" ")
        print(f"{cfg.batch_size * cfg.seq_len:,} = {reading_ranks(cfg)} ranks", end=" ")
        print(f"x {steps} x {micro} sequences of {cfg.seq_len:,}")
        if pp.size() > 1:
            stages = []
            where = dict(device=next(self.model.parameters()).device, group=pp.get_group())
            # shapes that are not given are found by a pass of their own, which routers would count
            real = functools.partial(torch.empty, device="meta", requires_grad=True)
            state = real(micro, cfg.seq_len, cfg.dim, dtype=self.stages[0].dtype)
            logits = [real(micro, cfg.seq_len - i, cfg.vocab_size) for i in range(2)]
            ids = torch.empty(micro, cfg.seq_len, dtype=torch.long, device="meta")
            own = stages_of(cfg, pp.get_local_rank())
            for stage, (i, _, first, last) in zip(self.stages, own):
                given = ids if first else state
                made = tuple(logits[: 1 + (cfg.mtp != "none")]) if last else state
                shapes = dict(input_args=given, output_args=made)
                stages.append(VStage(stage, i, 2 * cfg.pp, **shapes, **where))
                stages[-1].whole_backward = cfg.recompute == "block"
            self.schedule = ScheduleDualPipeV(stages, steps, self.loss, scale_grads=False)

    def loss(self, output, targets):
        """The objective of a micro-batch, as the schedule asks for it; each layer adds its own
        balance loss."""
        main, ahead = (nats / self.n_targets for nats in nats_ahead(output, targets))
        self.main, self.ahead = self.main + main.detach(), self.ahead + ahead.detach()
        return main + self.cfg.mtp_weight * ahead

    def run(self, batches):
        """This rank's part of the mean of the main loss over the global batch, to be summed over
        all ranks; that of multi-token prediction is in .ahead. Where autograd is on, gradients of
        the whole objective are added to the parameters."""
        self.n_targets, self.main, self.ahead = max(batches[0]["n_targets"], 1), 0.0, 0.0
        for router in self.routers:
            router.balance = self.cfg.balance_loss / batches[0]["n_sequences"]
        if self.schedule:
            names = "tokens", "targets"
            tokens, targets = (torch.cat([batch[name] for batch in batches]) for name in names)
            ends = self.mesh["pp"].get_local_rank() == 0  # this rank has the first and last stage
            inputs, more = ((tokens,), dict(target=targets, losses=[])) if ends else ((), {})
            step = self.schedule.step if torch.is_grad_enabled() else self.schedule.eval
            step(*inputs, ahead=tokens, **more, return_outputs=False)
        else:
            for batch in batches:
                loss, metrics = objective(self.stages[0], batch, self.cfg)
                self.main, self.ahead = self.main + metrics["main"], self.ahead + metrics["mtp"]
                if torch.is_grad_enabled():
                    loss.backward()
        return self.main

    def evaluate(self, batches):
        """run without gradients."""
        with evaluation_mode(self.model, self.cfg.compile):
            return self.run(batches)

    @torch.no_grad()
    def update_average(self, decay):
        """§3.2.3: the moving average of the parameters, in CPU memory."""
        # Undisclosed: its decay. Departure: not asynchronous; a copy each update.
        for name, average in self.average.items():
            average.lerp_(self.zero.local(self.zero.masters[name]).cpu(), 1 - decay)

def memory_per_rank(cfg):
    """Bytes on the rank of cfg.world_size that needs most, by kind, as a backward pass begins in
    the phase cfg: sizes from shapes, activations from what a forward pass on the meta device would
    keep, with tokens spread evenly over experts."""
    # of n = 2 PP stages number i has n - i micro-batches under way, a rank's two n + 1: of its part
    # of the layers PP + 1/2, where Table 2 says PP + 1
    (steps, micro), found, kept = split_batch(cfg, reading_ranks(cfg)), [], {}
    for rank in range(cfg.pp):
        memory = dict.fromkeys(("weights", "gradients", "masters", "moments", "activations"), 0)
        for i, layers, first, last in stages_of(cfg, rank):
            with torch.device("meta"):
                stage = DeepSeekV3(cfg, layers, first, last)
            for name, p in stage.named_parameters():
                size = p.numel() // (max(cfg.ep, 1) if is_expert(name) else 1)
                copies = max(cfg.dp, 1) if is_expert(name) else reading_ranks(cfg)
                low = keeps_bf16(name, cfg)
                memory["weights"] += size * (2 if low else 4)
                memory["gradients"] += 4 * size
                memory["masters"] += 4 * -(-size // copies) if low else 0
                memory["moments"] += (4 if cfg.precision == "fp8" else 8) * -(-size // copies)
            flight = min(2 * cfg.pp - i, steps) if cfg.pp > 1 else 1
            kind = len(layers), sum(layer < cfg.n_dense for layer in layers), first, last
            kept[kind] = kept.get(kind) or kept_for_backward(stage, cfg, micro)
            memory["activations"] += flight * kept[kind]
        found.append(memory)
    return max(found, key=lambda memory: sum(memory.values()))

class Alive(TorchDispatchMode):
    """Remembers every storage that is made inside it and not the parameters'; bytes() is the size
    of those still in use."""

    def __init__(self, parameters):
        super().__init__()
        self.old, self.made = {p.untyped_storage()._cdata for p in parameters}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for x in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            storage = x.untyped_storage() if torch.is_tensor(x) else None
            if storage is not None and storage._cdata not in self.old:
                reference = StorageWeakRef(storage)
                self.made[reference.cdata] = (reference, storage.nbytes())
        return outputs

    def bytes(self):
        return sum(size for reference, size in self.made.values() if not reference.expired())

def fused_on_meta(q, k, v, is_causal, scale):
    """What stands for attention on the meta device, where PyTorch would plan the unfused one."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attention(q, k, v, 0.0, is_causal, scale=scale)[0]

def kept_for_backward(stage, cfg, micro):
    """Bytes that a stage on the meta device keeps for its backward pass of `micro` sequences."""
    for name, p in stage.named_parameters():
        if keeps_bf16(name, cfg):
            p.data = p.data.bfloat16()
    for moe in (module for module in stage.modules() if isinstance(module, MoE)):
        own, moe.ep = cfg.n_experts // max(cfg.ep, 1), True  # as many rows come as go
        moe.visit = lambda x, counts, moe=moe: moe.experts(x, counts[:own].cumsum(0).int())
    ids = torch.zeros(micro, cfg.seq_len, dtype=torch.long, device="meta")
    x = torch.empty(*ids.shape, cfg.dim, dtype=stage.dtype, device="meta", requires_grad=True)
    x = x if stage.token_embedding is None else ids
    if stage.head is not None and stage.token_embedding is None:
        stage.shared_embedding = nn.Embedding(cfg.vocab_size, cfg.dim, device="meta")
    fused, F.scaled_dot_product_attention = F.scaled_dot_product_attention, fused_on_meta
    try:
        with Alive(stage.parameters()) as alive:
            output = stage(x, ids)
            loss = sum(nats_ahead(output, ids)) if stage.head is not None else output
            del output
            gc.collect()
            return alive.bytes() - 0 * loss.numel()
    finally:
        F.scaled_dot_product_attention = fused

# ---------------------------------------- Checkpoint ----------------------------------------

HF_CONFIG = {  # field of Config: (key in config.json, default of DeepseekV3Config)
    "vocab_size": ("vocab_size", 129280), "dim": ("hidden_size", 7168),
    "n_layers": ("num_hidden_layers", 61), "n_dense": ("first_k_dense_replace", 3),
    "hidden_dim": ("intermediate_size", 18432), "n_heads": ("num_attention_heads", 128),
    "q_rank": ("q_lora_rank", 1536), "kv_rank": ("kv_lora_rank", 512),
    "head_dim": ("qk_nope_head_dim", 128), "rope_dim": ("qk_rope_head_dim", 64),
    "norm_eps": ("rms_norm_eps", 1e-6), "n_experts": ("n_routed_experts", 256),
    "n_shared": ("n_shared_experts", 1), "expert_dim": ("moe_intermediate_size", 2048),
    "top_k": ("num_experts_per_tok", 8), "n_groups": ("n_group", 8),
    "groups_kept": ("topk_group", 4), "route_scale": ("routed_scaling_factor", 2.5),
}  # fmt: skip
HF_FIXED = {  # the only values that are supported
    "model_type": "deepseek_v3", "hidden_act": "silu", "attention_bias": False,
    "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "tie_word_embeddings": False, "moe_layer_freq": 1, "rope_interleave": True,
}  # fmt: skip
HF_YARN = {"rope_type": "yarn", "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
           "mscale_all_dim": 1.0}  # fmt: skip
SHAPE = (*HF_CONFIG, "rope_theta", "mtp")  # fields of Config that must agree with a checkpoint
HF_NAMES = {  # the first that fits
    r"^token_embedding": "model.embed_tokens", r"^final_norm": "model.norm", r"^head": "lm_head",
    r"^blocks\.(\d+)": r"model.layers.\1", r"^mtp\.block": "model.layers.L",
    r"^mtp\.merge": "model.layers.L.eh_proj", r"^mtp\.embedding_norm": "model.layers.L.enorm",
    r"^mtp\.state_norm": "model.layers.L.hnorm",
    r"^mtp\.final_norm": "model.layers.L.shared_head.norm",
}  # fmt: skip
HF_PARTS = {
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attn.q_down": "self_attn.q_a_proj", "attn.q_norm": "self_attn.q_a_layernorm",
    "attn.q_up": "self_attn.q_b_proj", "attn.kv_down": "self_attn.kv_a_proj_with_mqa",
    "attn.kv_norm": "self_attn.kv_a_layernorm", "attn.kv_up": "self_attn.kv_b_proj",
    "attn.out": "self_attn.o_proj", "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.e_score_correction_bias", "mlp.shared": "mlp.shared_experts",
    "down.weight": "down_proj.weight",
}  # fmt: skip

def hf_views(model, cfg, first=0):
    """(Hugging Face's name, its part of one of our tensors, order of its rows or None) for all of a
    model, or of a rank's part of one, whose experts count from `first`."""
    one = torch.arange(cfg.rope_dim).view(-1, 2).T.flatten()  # interleaved pairs to ours
    head = torch.cat((torch.arange(cfg.head_dim), cfg.head_dim + one))
    heads = (torch.arange(cfg.n_heads)[:, None] * len(head) + head).flatten()
    orders = {"q_up": heads, "kv_down": torch.cat((torch.arange(cfg.kv_rank), cfg.kv_rank + one))}
    biases = ((n, b) for n, b in model.named_buffers() if n.endswith("router.bias"))
    for name, tensor in itertools.chain(model.named_parameters(), biases):
        order = next((order for part, order in orders.items() if f".{part}." in name), None)
        for ours, theirs in HF_NAMES.items():
            name = re.sub(ours, theirs, name).replace("layers.L", f"layers.{cfg.n_layers}")
        for ours, theirs in HF_PARTS.items():
            name = name.replace(ours, theirs)
        name = name if cfg.q_rank else name.replace("q_b_proj", "q_proj")
        parts = {name: tensor.data}
        if ".experts." in name:  # down or gate_up [X, ...]
            name = name if name.endswith("gate_up") else f"{name}_proj"
            parts = {name.replace("experts", f"experts.{first + i}") + ".weight": matrix
                     for i, matrix in enumerate(tensor.data)}  # fmt: skip
        for name, part in parts.items():
            if "gate_up" not in name:
                yield name, part, order
                continue
            for kind, half in zip(("gate_proj", "up_proj"), part.chunk(2)):
                yield name.replace("gate_up", kind), half, order

def read_config(path):
    """Config of the DeepseekV3ForCausalLM in a directory."""
    keys = ("model_type", "rope_parameters", "rope_scaling", "rope_theta", "v_head_dim",
            "num_key_value_heads", "max_position_embeddings", "num_nextn_predict_layers",
            "num_mtp_layers")  # fmt: skip
    with explain(f"{path} holds no DeepSeek-V3 model", Exception):
        theirs = read_hf_config(path, HF_CONFIG | {key: (key, None) for key in keys}, HF_FIXED)
        cfg = Config(**{field: theirs[field] or 0 for field in HF_CONFIG})
        cfg.seq_len = theirs["max_position_embeddings"] or 4096
        n_mtp = theirs["num_nextn_predict_layers"] or theirs["num_mtp_layers"] or 0
        cfg.mtp = "sequential" if n_mtp else "none"
        rope = theirs["rope_parameters"] or theirs["rope_scaling"] or {}
        rope = {"rope_type": rope.get("type", "default")} | rope
        cfg.rope_theta = rope.pop("rope_theta", theirs["rope_theta"] or 1e4)
        cfg.rope_factor = rope.pop("factor", cfg.rope_factor)
        cfg.rope_original = rope.pop("original_max_position_embeddings", cfg.rope_original)
        rope.pop("type", None)
        wanted = {"rope_type": "default"}
        if rope["rope_type"] == "yarn":
            cfg.rope_scaling = "yarn"
            wanted = HF_YARN
            rope = {"beta_fast": 32, "beta_slow": 1} | rope
        for key, value, supported in (
            ("model_type", theirs["model_type"], ["deepseek_v3"]),
            ("v_head_dim", theirs["v_head_dim"], [None, cfg.head_dim]),
            ("num_key_value_heads", theirs["num_key_value_heads"], [None, cfg.n_heads]),
            ("num_nextn_predict_layers", n_mtp, [0, 1]),
            ("rope_parameters", rope, [wanted]),
        ):
            if value not in supported:
                raise ValueError(f"config.json has {key} {value}, not {supported[-1]}")
    return cfg

def read_weights(model, cfg, path, first=0):
    """Fill a model, or a rank's part of one, whose experts count from `first`, from the
    safetensors of a directory, FP8 ones with their block scales (§9)."""
    with explain(f"{path} holds no such DeepSeek-V3 model", Exception):
        tensors = read_hf_tensors(path)
        for name, part, order in hf_views(model, cfg, first):
            tensor = tensors[name]
            if tensor.shape != part.shape:
                raise ValueError(f"{name} is {list(tensor.shape)}, not {list(part.shape)}")
            if f"{name}_scale_inv" in tensors:  # it is the factor, not its inverse
                scale = tensors[f"{name}_scale_inv"]
                scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
                tensor = tensor.float() * scale[: tensor.shape[0], : tensor.shape[1]]
            part.copy_(tensor if order is None else tensor[order])

def from_hf(path):
    """(model, cfg) from the checkpoint directory of a DeepseekV3ForCausalLM, with multi-token
    prediction as one layer more."""
    cfg = read_config(path)
    model = DeepSeekV3(cfg)
    read_weights(model, cfg, path)
    return model, cfg

def to_hf(model, cfg, path, mesh=None):
    """Write a model, or on every rank its part of one, to a directory as a DeepseekV3ForCausalLM:
    a file for each layer and rank that has experts of it."""
    from safetensors.torch import save_file

    config = {key: getattr(cfg, field) for field, (key, _) in HF_CONFIG.items()} | HF_FIXED
    config |= dict(
        architectures=["DeepseekV3ForCausalLM"], q_lora_rank=cfg.q_rank or None,
        num_key_value_heads=cfg.n_heads, v_head_dim=cfg.head_dim, rope_theta=cfg.rope_theta,
        num_nextn_predict_layers=int(cfg.mtp != "none"), max_position_embeddings=cfg.seq_len,
        initializer_range=cfg.init_std,
        torch_dtype="bfloat16" if keeps_bf16("", cfg) else "float32",
    )  # fmt: skip
    config["rope_parameters"] = dict(rope_type="default", rope_theta=cfg.rope_theta)
    if cfg.rope_scaling == "yarn":
        scaling = dict(factor=cfg.rope_factor, original_max_position_embeddings=cfg.rope_original)
        config["rope_parameters"] |= HF_YARN | scaling
    rank = dist.get_rank() if mesh else 0
    ep = mesh["ep"].get_local_rank() if mesh else 0
    copy = mesh["dp"].get_local_rank() if mesh else 0
    first = ep * cfg.n_experts // mesh["ep"].size() if mesh else 0
    files = {}
    for name, part, order in hf_views(model, cfg, first):
        theirs = part.cpu().clone()  # save_file wants tensors that share no memory
        if order is not None:
            theirs[order] = part.cpu()
        if copy == 0 and (ep == 0 or ".experts." in name):
            layer = re.search(r"layers\.(\d+)", name)
            file = f"model-{layer[1].zfill(5) if layer else name.split('.')[-2]}-{ep:05d}"
            files.setdefault(f"{file}.safetensors", {})[name] = theirs
            for end, copied in (("embed_tokens", "embed_tokens"), ("lm_head", "shared_head.head")):
                if cfg.mtp != "none" and name.endswith(f"{end}.weight"):  # as released
                    more = f"model.layers.{cfg.n_layers}.{copied}.weight"
                    files[f"{file}.safetensors"][more] = theirs.clone()
    indices = [{name: file for file, tensors in files.items() for name in tensors}]
    with written_beside(path) if rank == 0 else contextlib.nullcontext() as folder:
        if mesh:
            indices *= dist.get_world_size()
            dist.barrier()
        for file, tensors in files.items():
            save_file(tensors, f"{Path(path)}.tmp/{file}", metadata={"format": "pt"})
        if mesh:
            dist.all_gather_object(indices, indices[rank])
        if rank == 0:
            weight_map = {name: file for index in indices for name, file in index.items()}
            index = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2)
            (folder / "model.safetensors.index.json").write_text(index + "\n")
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
    """A temporary directory; when the block ends, its files move to the directory path."""
    path = Path(path)
    folder = path.with_name(path.name + ".tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    try:
        folder.rename(path)  # at once, if path is new or empty
    except OSError:
        for file in folder.iterdir():
            file.replace(path / file.name)
        folder.rmdir()

def newest_checkpoint(out, resume, fixed):
    """(path of the newest checkpoint in out, config.json of its run), or (None, {}).

    Raises ValueError if there is one, but neither --resume nor a restart by torchrun asks for it,
    or if its run had another value of a field in `fixed`.
    """
    newest = [None, {}]
    checkpoints = sorted(Path(out).glob("step_*[0-9]")) if out else []
    if checkpoints:
        newest = [checkpoints[-1], json.loads((Path(out) / "config.json").read_text())]
    dist.broadcast_object_list(newest)  # ranks on a network file system may list other files
    path, run = newest
    (restarts,) = sum_over_ranks(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
    if path and not (resume or restarts):
        raise ValueError(f"{out} has checkpoints: --resume continues, another --out starts anew")
    for name in fixed:
        if path and run.get(name) != fixed[name]:
            raise ValueError(f"{path} has {name} {run.get(name)}, and this run {fixed[name]}")
    if path:
        print(f"continuing from {path}")
    elif resume:
        print(f"no checkpoint in {out or '--out'}: starting a run")
    return path, run

def claim_directory(out, step, config):
    """Write config.json, and remove the rows of later steps from metrics.jsonl. Returns a lock,
    which the process holds while it lives; ValueError if another process holds it."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "w")
    if dist.get_rank() > 0:
        return lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another run is writing to {out}") from error
    except OSError as error:
        print(f"{out} cannot be locked against other runs: {error}")
    log = folder / "metrics.jsonl"
    log.touch()
    rows = [json.loads(line) for line in log.open() if line.endswith("}\n")]
    kept = [row for row in rows if row["step"] < step or (row["step"] == step and "loss" in row)]
    log.write_text("".join(json.dumps(row) + "\n" for row in kept))
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
    """Fill model, optimizer and state from a checkpoint; its hyperparameters stay as they are."""
    weights, moments = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": moments["state"], "state": dict(state)}
    with explain(f"{path} does not fit or is damaged", dcp.CheckpointException):
        dcp.load(content, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    state.update(content["state"])


# ---------------------------------------- Training ----------------------------------------

def split_batch(cfg, ranks):
    """(steps, micro) such that batch_size = ranks x steps of accumulation x micro sequences."""
    share = cfg.batch_size // ranks
    micro = min(cfg.micro_batch or share, share)
    return share // max(micro, 1), micro

def sum_over_ranks(*numbers):
    """The numbers, each summed over all ranks, as floats."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()

def read_batch(corpus, first, cfg, device, rank, ranks):
    """Micro-batches, on the device, of data-parallel rank `rank` of `ranks` of the global batch
    that begins with sequence `first`. Without collectives, so that a thread can call it."""
    steps, micro = split_batch(cfg, ranks)
    first += rank * steps * micro
    batches = [get_batch(corpus, first + i * micro, micro, cfg) for i in range(steps)]
    for batch in batches:
        for name, value in batch.items():
            if torch.is_tensor(value) and device.type == "cuda":
                batch[name] = value.pin_memory().to(device, non_blocking=True)
    return batches

def sum_counts(batches, ranks):
    """Replace the counts (n_...) of micro-batches by those of the global batch, which `ranks`
    data-parallel ranks read together; all others read the same as one of these."""
    names = [name for name in batches[0] if name.startswith("n_")]
    sums = sum_over_ranks(*(sum(batch[name] for batch in batches) for name in names))
    counts = {name: n * ranks / dist.get_world_size() for name, n in zip(names, sums)}
    for batch in batches:
        batch.update(counts)

@contextlib.contextmanager
def evaluation_mode(model, compiled):
    """No dropout, no gradients, and no compiled code, which would be compiled for each length."""
    eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    model.eval()
    with torch.no_grad(), eager:
        yield
    model.train()

def validate(loss_of, corpus, step, cfg, device, rank, ranks):
    """Print and log nats per target and bits per byte over the first windows of corpus.
    loss_of(batches) is this rank's share of the loss of a global batch."""
    nats = n_targets = n_bytes = 0.0
    for i in range(min(cfg.val_batches, corpus.n_windows(cfg.seq_len) // cfg.batch_size)):
        batches = read_batch(corpus, i * cfg.batch_size, cfg, device, rank, ranks)
        sum_counts(batches, ranks)
        (loss,) = sum_over_ranks(loss_of(batches))
        nats += loss * batches[0]["n_targets"]
        n_targets += batches[0]["n_targets"]
        n_bytes += batches[0]["n_bytes"]
    if not n_targets:
        raise ValueError("the held-out documents have no token to predict")
    row = {"step": step, "val_loss": nats / n_targets, "val_bpb": bits_per_byte(nats, n_bytes)}
    bpb = f"{row['val_bpb']:.3f}".replace("nan", "n/a")
    print(f"val {step} | loss {row['val_loss']:.4f} | bpb {bpb}")
    write_row(cfg.out, row)


def gather_stages(pipe, cfg):
    """The whole model on rank 0 and None on the others, however it is laid out; all ranks call."""
    if dist.get_world_size() == 1:
        return pipe.stages[0]
    tensors, pp = {}, pipe.mesh["pp"]
    for name, p in itertools.chain(pipe.model.named_parameters(), pipe.model.named_buffers()):
        parts = [p.data]
        if is_expert(name) and pipe.ep:
            parts = [torch.empty_like(p.data) for _ in range(pipe.ep.size())]
            dist.all_gather(parts, p.data, group=pipe.ep)
        tensors[name] = torch.cat(parts).cpu()
    stages = [None] * pp.size() if pp.get_local_rank() == 0 else None
    dist.gather_object(tensors, stages, dist.get_global_rank(pp.get_group(), 0), pp.get_group())
    if dist.get_rank() > 0:
        return None
    model = DeepSeekV3(cfg)
    whole = {name: tensor for stage in stages for name, tensor in stage.items()}
    model.load_state_dict(whole, strict=False)
    return model.to(pipe.stages[0].token_embedding.weight.device)

def sample(model, ids, n, allowed_ids, cfg):
    """ids and n more, drawn at temperature 0.8 among allowed_ids [V] (boolean)."""
    model.extend(cfg)
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
    may_be_0 = "warmup_steps", "n_dense", "n_shared", "q_rank"
    for field in dataclasses.fields(cfg):
        least = int(field.type is int and field.default > 0 and field.name not in may_be_0)
        if field.type in (int, float) and not least <= getattr(cfg, field.name) < math.inf:
            raise ValueError(f"--{field.name} {getattr(cfg, field.name)} is not {least} or more")
    group = cfg.n_experts // cfg.n_groups
    stages = 2 * cfg.pp if cfg.pp > 1 else 1
    for wrong, message in (
        (cfg.rope_dim % 2, f"--rope_dim {cfg.rope_dim} is odd"),
        (cfg.rope_theta <= 1, f"--rope_theta {cfg.rope_theta} is not above 1"),
        (cfg.rope_factor < 1, f"--rope_factor {cfg.rope_factor} is not 1 or more"),
        (cfg.n_dense > cfg.n_layers, f"--n_dense {cfg.n_dense} is above {cfg.n_layers} layers"),
        (cfg.n_experts % cfg.n_groups,
         f"{cfg.n_groups} groups do not divide {cfg.n_experts} experts"),
        (cfg.groups_kept > cfg.n_groups,
         f"--groups_kept {cfg.groups_kept} is more than {cfg.n_groups} groups"),
        (cfg.top_k > group * cfg.groups_kept,
         f"--top_k {cfg.top_k} is more than {cfg.groups_kept} groups of {group} experts"),
        (cfg.n_experts % max(cfg.ep, 1),
         f"--ep {cfg.ep} does not divide {cfg.n_experts} experts"),
        (cfg.dim % 8 or cfg.expert_dim % 8, "--dim and --expert_dim are not multiples of 8"),
        (cfg.precision == "fp8" and (cfg.dim % 16 or cfg.expert_dim % 16),
         "--precision fp8 wants --dim and --expert_dim in multiples of 16"),
        (max(cfg.fim, cfg.split_joined) > 1, "--fim or --split_joined is above 1"),
        (cfg.ema >= 1, f"--ema {cfg.ema} is not below 1"),
        (not cfg.tokens and not cfg.long, "--tokens and --long give not a single update"),
        (cfg.first_batch > cfg.batch_size,
         f"--first_batch {cfg.first_batch} is above --batch_size {cfg.batch_size}"),
        (stages > cfg.n_layers + 2,
         f"{cfg.n_layers} layers, embedding and head are fewer than {stages} stages"),
        (cfg.compile and cfg.recompute == "paper", "--recompute paper is not for --compile"),
        (cfg.resume and not cfg.out, "--resume needs --out"),
        (cfg.eval and not cfg.out and not cfg.init, "--eval needs --out or --init"),
        ((cfg.init or cfg.export) and cfg.mtp == "parallel",
         "--init and --export have no form for --mtp parallel"),
        (cfg.write_tokens and ranks > 1, "--write_tokens runs in one process, without torchrun"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
    if cfg.init or cfg.export:
        with explain("--init and --export need: pip install safetensors", ImportError):
            import safetensors  # noqa: F401

def check_batch(cfg):
    """Raise ValueError for a phase of the run whose batch does not fit the layout."""
    steps, micro = split_batch(cfg, reading_ranks(cfg))
    where = f"{cfg.batch_size} sequences of {cfg.seq_len}"
    if reading_ranks(cfg) * steps * micro != cfg.batch_size:
        message = f"{reading_ranks(cfg)} data-parallel ranks x micro-batches of {micro}"
        raise ValueError(f"{where} are not {message}")
    if cfg.pp > 1 and steps < 2 * cfg.pp:
        raise ValueError(f"{where}: {steps} micro-batches are fewer than the {2 * cfg.pp} stages")

def dry_run(cfg):
    """Print parameters, FLOPs per token, and for the first and the last batch of pre-training and
    each extension the bytes on the rank that needs most, or why the layout cannot run it; from
    shapes alone."""
    cfg = fit_layout(cfg, cfg.world_size)
    tokenizer = load_tokenizer(cfg.tokenizer or "bytes", SPECIALS)
    cfg.vocab_size = cfg.vocab_size or tokenizer.n_vocab
    check(cfg, cfg.world_size)
    with torch.device("meta"):
        model = DeepSeekV3(cfg)
    total, activated = count_parameters(model)
    ahead = sum(p.numel() for p in model.mtp.parameters()) if model.mtp else 0
    print(f"parameters {total:,} | activated {activated:,} | multi-token prediction {ahead:,}")
    phases = plan(cfg)
    flops = flops_per_token(phases[0].cfg)
    print(f"FLOPs per token {flops:.4g} | 6 N of the activated gives {6 * activated:.4g}")
    scaled = [phase.cfg.rope_scaling for phase in phases].count("yarn")
    ends = [phases[0], *phases[-1 - scaled :]]
    for phase in ends:
        now = phase.cfg
        steps, _ = split_batch(now, reading_ranks(cfg))
        print(f"{now.batch_size:,} sequences of {now.seq_len:,}", end=" ")
        print(f"from step {phase.first:,}", end=" | ")
        try:
            check_batch(now)
        except ValueError as error:
            print(f"{error} | another layout is needed")
            continue
        memory = memory_per_rank(now)
        parts = " | ".join(f"{kind} {size / 2**30:.3f}" for kind, size in memory.items())
        need = sum(memory.values())
        most = max(memory, key=memory.get)
        fits = "fits 80 GB" if need < 80e9 else f"does not fit 80 GB, {most} most of all"
        print(f"{steps} micro-batches | {parts} | sum {need / 2**30:.3f} GiB a rank: {fits}")

def advance(pipe, optimizer, batches, lr, cfg):
    """One update of parameters and balancing biases from this rank's micro-batches; cfg is that of
    the moment. Returns the loss, the loss of multi-token prediction and the gradient norm of the
    global batch, and of all layers the largest load over the mean and minus the smallest, on the
    device. Parameters and biases stay as they are if loss or norm is not finite."""
    pipe.run(batches)
    pipe.zero.reduce()
    norm, loss, ahead = pipe.zero.clip(pipe.main, pipe.ahead, limit=cfg.clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    finite = math.isfinite(norm) and math.isfinite(loss)
    if finite:
        optimizer.step()
        pipe.zero.gather()
        pipe.update_average(cfg.ema)
    optimizer.zero_grad()
    extremes = torch.tensor([0.0, -math.inf], device=batches[0]["tokens"].device)
    if pipe.routers:
        loads = update_biases(pipe.routers, cfg.gamma * finite, pipe.zero.data.get_group())
        extremes = torch.stack((loads.max(), -loads.min()))
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    return loss, ahead, norm, extremes

def train(pipe, optimizer, corpus, heldout, state, cfg, device, signals):
    """Update the model until the plan is carried out, or a signal was received."""
    place = device, pipe.data_rank, reading_ranks(cfg)
    thread = ThreadPoolExecutor(1)  # reads the next batch during an update
    first_step = saved = state["step"]
    entered = None
    n_skipped = 0
    pace = None

    def read_ahead(first):
        now = at_step(planned_step(first, cfg), cfg)[1]
        return thread.submit(read_batch, corpus, first, now, *place)

    ahead = read_ahead(state["sequences"])
    while True:
        step = state["step"]
        first = state["sequences"]  # of the batch to come
        position = planned_step(first, cfg)  # the same in updates of the plan
        steps_left = 0 if cfg.eval else math.ceil(cfg.steps - position)
        phase, now, _ = at_step(min(position, cfg.steps - 1), cfg)
        if phase.first != entered:
            pipe.enter(now)
            entered = phase.first
            first_step = step
            pace = None
        pipe.cfg = now
        n_signals = n_errors = 0
        if steps_left > 0:
            clock = time.perf_counter()
            error = ahead.exception()
            waited = time.perf_counter() - clock
            n_signals, n_errors = sum_over_ranks(len(signals), error is not None)
        end = steps_left <= 0 or n_signals or n_errors
        if cfg.out and step > saved and not n_skipped and (end or step % cfg.save_every == 0):
            save_checkpoint(cfg.out, pipe.saved, optimizer, state)
            saved = step
        if n_errors:
            raise_first(error)
        if steps_left <= 0 or (step % cfg.val_every == 0 and not end):
            validate(pipe.evaluate, heldout, step, now, *place)
        if end:
            return steps_left <= 0

        clock = time.perf_counter()
        batches = ahead.result()
        ahead = read_ahead(first + now.batch_size)
        sum_counts(batches, reading_ranks(cfg))
        lr = learning_rate(position, cfg)
        loss, mtp, norm, extremes = advance(pipe, optimizer, batches, lr, now)
        finite = math.isfinite(loss) and math.isfinite(norm)
        state["step"] += 1
        state["sequences"] += now.batch_size
        state["tokens"] += finite * now.batch_size * now.seq_len
        for name in ("n_documents", "n_fim", "n_cut"):
            state[name] += round(batches[0][name])
        seconds = waited + time.perf_counter() - clock
        if step > first_step:  # the first update may compile and is left out
            pace = 0.9 * (pace or seconds) + 0.1 * seconds
        if step == 0 or steps_left == 1 or state["step"] % cfg.log_every == 0:
            bpb = bits_per_byte(loss * batches[0]["n_targets"], batches[0]["n_bytes"])
            row = {"step": step + 1, "loss": loss, "bpb": bpb, "lr": lr, "grad": norm}
            if cfg.mtp != "none":
                row["mtp"] = round(mtp, 4)
            largest, smallest = extremes.tolist()
            if largest:
                row |= {"max_load": round(largest, 3), "min_load": round(-smallest, 3)}
            log_step(row | {"tokens": state["tokens"]}, steps_left - 1, pace, now, device)
        n_skipped = 0 if finite else n_skipped + 1
        if n_skipped:
            print(f"step {step + 1} skipped: its loss or gradient is not finite")
        if n_skipped == 3 or (n_skipped and steps_left == 1):
            raise ValueError(f"no finite gradient in the last {n_skipped} steps to {step + 1}")

def conclude(pipe, heldout, tokenizer, state, device):
    """Say what became of the documents, export, sample, and validate the moving average."""
    cfg = pipe.cfg  # of the last phase
    print(f"documents {state['n_documents']:,} | filled in the middle {state['n_fim']:,}", end=" ")
    print(f"| cut by the packing {state['n_cut']:,}")
    if cfg.export:
        to_hf(pipe.model, cfg, cfg.export, pipe.mesh)
    with torch.device("meta"):
        small = count_parameters(DeepSeekV3(cfg))[0] < 2e9  # fits one rank
    model = gather_stages(pipe, cfg) if tokenizer and small else None
    if model:
        ids = get_batch(heldout, 0, 1, cfg)["tokens"][0, :32].tolist()
        if cfg.prompt:
            ids = tokenizer.encode_ordinary(cfg.prompt)
        allowed_ids = torch.from_numpy(heldout.token_bytes > 0)
        print(tokenizer.decode(sample(model, ids, 256, allowed_ids, cfg)))
    if pipe.average:
        for name, average in pipe.average.items():
            pipe.zero.local(pipe.zero.masters[name].data).copy_(average)
        pipe.zero.gather()
        print("the moving average of the weights:", end=" ")
        place = device, pipe.data_rank, reading_ranks(cfg)
        unlogged = dataclasses.replace(cfg, out="")
        validate(pipe.evaluate, heldout, state["step"], unlogged, *place)

def load_documents(cfg):
    """(tokenizer or None, training Corpus, held-out Corpus) of --data; sets cfg.tokenizer and
    cfg.vocab_size. With --write_tokens the data is written as shards instead: None."""
    files, shards = find_files(cfg.data)
    if files and not cfg.tokenizer:
        cfg.tokenizer = "bytes"
    tokenizer = document_tokenizer(cfg.tokenizer)
    separator = -1  # unknown
    cfg.vocab_size = vocabulary_size(cfg.vocab_size, tokenizer, cfg.init)
    if tokenizer:
        separator = tokenizer.eot_token
        if cfg.vocab_size < tokenizer.n_vocab:
            n_ids = f"{tokenizer.n_vocab} ids of text and special tokens"
            raise ValueError(f"--vocab_size {cfg.vocab_size} is less than the {n_ids}")
    else:
        print("without --tokenizer documents have no borders, and none is rearranged")
    documents = tokenize(read_documents(cfg.data, files), tokenizer, separator)
    if cfg.write_tokens and shards:
        raise ValueError("--write_tokens reads text, and --data has token shards")
    if cfg.write_tokens:
        return write_tokens(cfg.write_tokens, documents)
    phases = [phase.cfg for phase in plan(cfg)]
    length = max(phase.seq_len for phase in phases)
    batch = max(math.ceil(phase.batch_size * phase.seq_len / length) for phase in phases)
    sizes = cfg.vocab_size, batch, length
    return tokenizer, *load_corpora(shards, documents, tokenizer, separator, *sizes)

@record
def main(argv=None):
    """Run the command line: read the data, build or resume the run, train, export and sample."""
    with report_user_errors():
        cfg, given = parse(argv)
        if cfg.init:
            check(cfg, 1)
            theirs = read_config(cfg.init)
            yarn = ("rope_scaling", "rope_factor", "rope_original")
            names = SHAPE + yarn if theirs.rope_scaling == "yarn" else SHAPE
            cfg = dataclasses.replace(cfg, **{name: getattr(theirs, name) for name in names})
        if cfg.dry_run:
            return dry_run(cfg)
        device = init_distributed(cfg.timeout)
        ranks = dist.get_world_size()
        cfg = fit_layout(cfg, ranks)
        check(cfg, ranks)
        data = load_documents(cfg)
        if not data:
            return
        tokenizer, corpus, heldout = data

        fixed = {name: getattr(cfg, name) for name in SHAPE}
        if not cfg.eval:
            fixed |= {"seed": cfg.seed, "data_fingerprint": corpus.fingerprint()}
        checkpoint, run = newest_checkpoint(cfg.out, cfg.resume or cfg.eval, fixed)
        if cfg.eval and not checkpoint and not cfg.init:
            raise ValueError(f"--eval: {cfg.out} has no checkpoint")
        if run:
            for name in {"tokens", "long"} - given:
                setattr(cfg, name, run[name])
        cfg.steps = min(cfg.steps or math.inf, plan(cfg)[-1].end)
        if run and not given & {"steps", "tokens", "long"}:  # the sequences that were planned first
            cfg.steps = math.ceil(planned_step(run["planned_sequences"], cfg))
        for phase in plan(cfg):
            if phase.first < cfg.steps:
                check_batch(phase.cfg)
        if cfg.warmup_steps > cfg.steps // 10:
            cfg.warmup_steps = cfg.steps // 10
            print(f"the warm-up is cut to {cfg.warmup_steps} updates, a tenth of the run")
        weights = list(Path(cfg.export).glob("*.safetensors*")) if cfg.export else []
        if weights and run.get("export") != cfg.export:
            raise ValueError(f"--export {cfg.export} has weights that this run did not write")

        pipe = DualPipe(cfg, expert_mesh(cfg, device.type))
        init_weights(pipe.model, cfg, pipe.ep)
        if cfg.init:
            own = pipe.mesh["ep"].get_local_rank() * cfg.n_experts // cfg.ep
            read_weights(pipe.model, cfg, cfg.init, own)
        pipe.share(cfg)
        optimizer = build_optimizer(pipe.zero, cfg)
        state = dict.fromkeys(("step", "sequences", "tokens", "n_documents", "n_fim", "n_cut"), 0)
        if checkpoint:
            load_checkpoint(checkpoint, pipe.saved, optimizer, state)
            pipe.zero.gather()
        if cfg.eval:
            cfg.out = ""  # nothing is written
        if cfg.out:
            last = at_step(cfg.steps - 1, cfg)[0]
            planned = last.sequences + (cfg.steps - last.first) * last.cfg.batch_size
            run = dataclasses.asdict(cfg) | fixed | {"planned_sequences": planned}
            lock = claim_directory(cfg.out, state["step"], run)  # held until this run ends
        with torch.device("meta"):
            counts = count_parameters(DeepSeekV3(cfg))
        print(f"torch {torch.__version__} | {device.type} {cfg.precision}", end=" | ")
        print(f"pp {cfg.pp} x dp {cfg.dp} x ep {cfg.ep} | {cfg.steps:,} updates")
        print("parameters {:,} | activated {:,}".format(*counts), end=" | ")
        print(f"FLOPs per token {flops_per_token(cfg):.3g}")
        with stop_signals() as signals:
            finished = train(pipe, optimizer, corpus, heldout, state, cfg, device, signals)
        if not finished:
            return print(f"stopped after step {state['step']}")
        conclude(pipe, heldout, tokenizer, state, device)

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
        # A rank that fails alone leaves at once; it would wait here for the others.
        if dist.is_initialized() and (dist.get_world_size() == 1 or not sys.exc_info()[0]):
            dist.destroy_process_group()

@contextlib.contextmanager
def explain(what, *errors):
    """Replace exceptions of the given kinds by a ValueError that says what failed, and why."""
    try:
        yield
    except errors as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        cause = error
        if isinstance(error, dcp.CheckpointException):  # its text is the traceback of each rank
            cause = next(iter(error.failures.values()))[0]
        raise ValueError(f"{what}: {type(cause).__name__}: {cause}") from error

@contextlib.contextmanager
def stop_signals():
    """A list that SIGTERM and SIGINT append to; a second one of a kind ends the process at once."""
    received = []

    def receive(signum, frame):
        received.append(signum)
        signal(signum, SIG_DFL)

    handlers = {signum: signal(signum, receive) for signum in (SIGTERM, SIGINT)}
    try:
        yield received
    finally:
        for signum, handler in handlers.items():
            signal(signum, handler)

def parse(argv):
    """(Config, names of the flags given): a preset's values, overridden by the flags."""

    def refuse(message):
        raise ValueError(message)

    summary = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(description=summary, allow_abbrev=False, add_help=False)
    parser.usage = "%(prog)s [--preset NAME] [--FLAG VALUE ...]"
    parser.error = refuse
    default = "small" if torch.cuda.is_available() else "demo"
    parser.add_argument("--preset", choices=PRESETS, default=default, help=f"(default: {default})")
    preset = parser.parse_known_args(argv)[0].preset
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Config), re.M))
    for field in dataclasses.fields(Config):
        kind = {"type": field.type}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif get_args(field.type):
            kind = {"choices": get_args(field.type)}
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
    store = dist.HashStore()
    if world_size > 1:
        store = shared_store(rank)
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    limit = timedelta(seconds=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    return device

def shared_store(rank):
    """A store for this start alone: the agents' store outlives a restart and then holds addresses
    of dead processes. Rank 0 opens it and publishes its address in the agents' store."""
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

def raise_first(error):
    """Raise, on all ranks, the error of the first rank that has one."""
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    raise error or next(filter(None, errors))

def log_step(row, steps_left, pace, cfg, device):
    """Print row, which has step and tokens among its numbers, and write it to metrics.jsonl;
    pace is the number of seconds that an update takes, None if unknown."""
    formats = {"loss": ".4f", "bpb": ".3f", "lr": ".2e", "grad": ".2f"}
    fields = [f"step {row['step']}/{row['step'] + steps_left}"]
    for name, value in row.items():
        if name not in ("step", "tokens"):
            fields.append(f"{name} {value:{formats.get(name, '')}}".replace("nan", "n/a"))
    fields.append(f"tokens {row['tokens'] / 1e6:.1f}M")
    on_gpu = device.type == "cuda"
    peak = PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if on_gpu else None
    if pace:
        speed = cfg.batch_size * cfg.seq_len / pace
        fields.append(f"{speed / 1e3:.1f}k tok/s")
        if peak and cfg.precision == "bf16":
            fields.append(f"mfu {speed * flops_per_token(cfg) / peak / dist.get_world_size():.1%}")
        if on_gpu:
            fields.append(f"mem {torch.cuda.max_memory_allocated(device) / 2**30:.1f}G")
        fields.append(f"eta {timedelta(seconds=round(steps_left * pace))}")
    print(" | ".join(fields))
    write_row(cfg.out, row)

def write_row(out, row):
    """Append row to metrics.jsonl in the directory out, if it is not empty, with null for numbers
    that are not finite."""
    if out and dist.get_rank() == 0:
        row = {k: None if str(v) in ("nan", "inf", "-inf") else v for k, v in row.items()}
        with open(Path(out) / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

def bits_per_byte(nats, n_bytes):
    """nats over n_bytes of text in bits per byte; NaN, printed as n/a, if n_bytes is unknown."""
    return nats / math.log(2) / n_bytes if n_bytes else math.nan

def stable_hash(*key):
    """64 bits that depend on the key alone: the seed of all that is drawn."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")

def shuffled(index, n, key):
    """Position of index in a pseudo-random permutation of range(n) seeded by key: a Feistel network
    on the bits of n, repeated until the result is below n, which needs no memory."""
    half = (n.bit_length() + 1) // 2
    while True:
        left, right = divmod(index, 1 << half)
        for i in range(4):
            mixed = left ^ stable_hash(key, i, right) % (1 << half)
            left = right
            right = mixed
        index = (left << half) + right
        if index < n:
            return index

class Corpus:
    """Ids start ... stop - 1 of the concatenation of parts, each an array or a token shard's path.

    separator: the id after each document, -1 if unknown; token_bytes [V]: the length of each id's
    text, 0 if it has none; in_order: windows come in order and not shuffled.
    """

    def __init__(self, parts, start, stop, separator, token_bytes, in_order):
        self.parts = parts
        self.ends = np.cumsum([len(open_part(part)) for part in parts])
        self.start = start
        self.size = stop - start
        self.separator = separator
        self.token_bytes = token_bytes
        self.in_order = in_order

    def read(self, first, n):
        """Ids first ... first + n - 1, int64 [n]; ValueError for an id that is not below V."""
        pieces = []
        first += self.start
        stop = first + n
        while first < stop:
            i = np.searchsorted(self.ends, first, side="right")
            ids = open_part(self.parts[i])
            begin = first - (self.ends[i] - len(ids))
            ids = ids[begin : begin + stop - first].astype(np.int64)
            unknown = (ids >= len(self.token_bytes)) & (ids != self.separator)
            if unknown.any():
                where = f"{self.parts[i]}, position {begin + unknown.argmax()}"
                raise ValueError(f"{where}: token id {ids[unknown][0]} is not in the vocabulary")
            pieces.append(ids)
            first += len(ids)
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
            index = shuffled(index, self.n_windows(length), (seed, epoch))
        return self.read(offset + index * length, length + 1)

    def fingerprint(self):
        """A hash of the size and the first ids, by which a resumed run recognizes its data."""
        return stable_hash(self.size, self.read(0, min(self.size, 1000)).tolist())

def load_corpora(shards, documents, tokenizer, separator, vocab_size, batch_size, length):
    """(training, held-out) Corpus of shards or, without any, of tokenized documents.

    Held out are the shards with "val" in their names, or documents by a hash of their names; if
    these are less than a batch, the last 5 % of the ids, but at least a batch.
    """
    train = [path for path in shards if "val" not in path.name]
    heldout = [path for path in shards if "val" in path.name]
    if not shards:
        documents = sorted(documents, key=lambda document: stable_hash(document[0]))
        train = [ids for name, ids in documents if not is_held_out(name)]
        heldout = [ids for name, ids in documents if is_held_out(name)]
    n_train = sum(len(open_part(part)) for part in train)
    total = n_train + sum(len(open_part(part)) for part in heldout)
    least = (batch_size + 1) * length + 1  # ids of a batch of windows, and an offset
    if min(n_train, total - n_train) < least:
        n_train = total - max(total // 20, least)
    if n_train < least:
        batch = f"a batch of {batch_size} x {length}"
        raise ValueError(f"{total:,} tokens are too few for {batch} and another to hold out")
    token_bytes = np.zeros(vocab_size, np.int64)
    if tokenizer:
        for text in tokenizer.token_byte_values():
            token_bytes[tokenizer.encode_single_token(text)] = len(text)
    parts = train + heldout
    corpus = Corpus(parts, 0, n_train, separator, token_bytes, in_order=False)
    return corpus, Corpus(parts, n_train, total, separator, token_bytes, in_order=True)

def vocabulary_size(vocab_size, tokenizer, init):
    """vocab_size or, if it is 0, that of the tokenizer, whose ids must fit. A vocabulary that is
    larger than the byte tokenizer's is a warning, and with --init a ValueError."""
    if not vocab_size and not tokenizer:
        raise ValueError("token shards need --tokenizer or --vocab_size")
    if not vocab_size or not tokenizer:
        return vocab_size or tokenizer.n_vocab
    n_ids = 1 + max(map(tokenizer.encode_single_token, tokenizer.token_byte_values()))
    if vocab_size < n_ids:
        raise ValueError(f"--vocab_size {vocab_size} is less than the {n_ids} ids of the tokenizer")
    if tokenizer.name == "bytes" and vocab_size > tokenizer.n_vocab:
        print(f"warning: a vocabulary of {vocab_size:,} entries over bytes: --tokenizer is missing")
        if init:
            raise ValueError(f"--init {init} needs the --tokenizer of its {vocab_size:,} entries")
    return vocab_size

def is_held_out(name):
    """Whether a document is among the 5 % that are held out, by a hash of its name."""
    return stable_hash(name) > 0.95 * 2**64

def find_files(path):
    """(text files, token shards) at path: a file, or a directory and what its links lead to, of
    one kind; without a path, the modules of Python's standard library without its tests."""
    root = Path(path or sysconfig.get_paths()["stdlib"])
    endings = (".txt", ".md", ".py", ".jsonl") if path else (".py",)
    skipped = set() if path else {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = [root]
    seen = set(root.resolve().parents)  # following a link to one of these would not end
    for folder, folders, names in os.walk(root, followlinks=True):
        if Path(folder).resolve() in seen:
            folders.clear()
            continue
        seen.add(Path(folder).resolve())
        folders[:] = set(folders) - skipped
        files += [Path(folder, name) for name in names]
    files = sorted(file for file in files if file.is_file())
    texts = [file for file in files if file.suffix.lower() in endings]
    shards = [file for file in files if path and file.suffix.lower() in (".npy", ".bin")]
    if bool(texts) == bool(shards):
        kinds = "either text (.txt .md .py .jsonl) or token shards (.npy .bin)"
        raise ValueError(f"{path} must be or have {kinds}, not {len(texts)} and {len(shards)}")
    print(f"{root}: {len(texts + shards)} of {len(files)} files are read")
    return texts, shards

def read_documents(path, files):
    """(name, text) of each document: a text file, named by its path below `path`, or a line of a
    .jsonl file, named by its text."""
    root = Path(path or sysconfig.get_paths()["stdlib"])
    for file in files:
        if file.suffix.lower() == ".jsonl":
            yield from read_json_lines(file)
            continue
        with explain(f"{file} is not UTF-8 text", UnicodeDecodeError):
            text = file.read_text("utf-8-sig", errors="strict" if path else "ignore")
        yield file.relative_to(root).as_posix(), text

def read_json_lines(file):
    """(text, text) of each line, a JSON object with a string "text"; empty lines are skipped."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                what = f'{file}, line {number}, is not a JSON object with a string "text"'
                with explain(what, ValueError, KeyError, TypeError, AttributeError):
                    code = json.loads(line)["text"].encode("utf-16", "surrogatepass")
                text = code.decode("utf-16", "replace")  # U+FFFD for half a surrogate pair
                yield text, text

def load_tokenizer(name, specials):
    """The tiktoken.Encoding `bytes`, of a BPE rank file, or of one of tiktoken's own names; special
    tokens that it lacks get the ids after its last."""
    ranks = {bytes([i]): i for i in range(256)}
    settings = {"name": name, "pat_str": r"[\s\S]", "mergeable_ranks": ranks, "special_tokens": {}}
    if os.path.isfile(name):  # tiktoken's own loader would cache the first file of a name
        with explain(f"{name} is not a BPE rank file", ValueError):
            lines = [line.split() for line in Path(name).read_bytes().splitlines() if line.strip()]
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        settings |= {"pat_str": PATTERN, "mergeable_ranks": ranks}
    elif name != "bytes":
        what = "is neither a BPE rank file nor a tiktoken encoding, cached or to be downloaded"
        with explain(f"{name} {what}", OSError, ValueError):
            tiktoken.get_encoding(name)
        settings = tiktoken.registry.ENCODING_CONSTRUCTORS[name]()
        ranks = settings["mergeable_ranks"]
    if len(set(ranks.values())) < len(ranks) or not all(bytes([i]) in ranks for i in range(256)):
        raise ValueError(f"{name} has a rank twice, or lacks some of the 256 single bytes")
    ids = settings["special_tokens"]
    for token in specials:
        ids.setdefault(token, 1 + max([*ranks.values(), *ids.values()]))
    settings.pop("explicit_n_vocab", None)  # a check of the number without new tokens
    return tiktoken.Encoding(**settings)

def tokenize(documents, tokenizer, separator):
    """(name, ids) of each document that is not empty; the last id is the separator."""
    dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    for name, text in documents:
        # tiktoken's PanicException, of the longest words, is a BaseException.
        with explain(f"the tokenizer cannot take document {name[:80]!r}", BaseException):
            ids = tokenizer.encode_to_numpy(text, disallowed_special=())
        if text:
            yield name, np.append(ids, separator).astype(dtype)

def write_tokens(folder, documents):
    """Write tokenized documents to .npy shards in a new or empty folder: train_00000.npy ..., and
    val_00000.npy ... of the documents that are held out; two shards per 2**27 ids."""
    if os.path.exists(folder) and os.listdir(folder):
        raise ValueError(f"--write_tokens {folder} is not empty")
    with written_beside(folder) as partial:
        for n in itertools.count():
            splits = {"train": [], "val": []}
            n_ids = 0
            while n_ids < 2**27 and (document := next(documents, None)):
                name, ids = document
                splits["val" if is_held_out(name) else "train"].append(ids)
                n_ids += len(ids)
            if not n_ids:
                break
            for split, parts in splits.items():
                if parts:
                    np.save(partial / f"{split}_{n:05d}.npy", np.concatenate(parts))
    print(f"{folder}: {n} shards to train on, with what is held out beside them")

def open_part(part):
    """Ids of a part of a Corpus: an array itself, or a shard that is memory-mapped while the result
    lives: .npy of uint16 or uint32, or .bin, uint16 after a header of 256 int32."""
    if isinstance(part, np.ndarray):
        return part
    with explain(f"{part} is not a token shard", ValueError, EOFError):
        if part.suffix.lower() == ".npy":
            ids = np.load(part, mmap_mode="r")
        else:
            magic, version, size = np.fromfile(part, np.int32, 3).tolist()
            ids = np.memmap(part, np.uint16, "r", offset=1024)
            if [magic, version, size] != [20240520, 1, len(ids)]:
                raise ValueError("unexpected header, or its length does not match the file")
        if ids.ndim != 1 or ids.dtype not in (np.uint16, np.uint32):
            raise ValueError(f"it holds {ids.dtype} {ids.shape}, not a row of uint16 or uint32")
    return ids

if __name__ == "__main__":
    main()
