r"""DeepSeek-V3 Technical Report (DeepSeek-AI, 2024, arXiv 2412.19437) in one file.

New against its parent, llama3.py (and against DeepSeek-V2, arXiv 2405.04434, where marked):
- multi-head latent attention: keys and values from one small latent, and one rotary key that all
  heads share (§2.1.1);
- a mixture of many small experts and a shared one (§2.1.2; new: sigmoid affinities, a bias that
  balances the selection, only a weak sequence-wise balance loss, no dropped token);
- multi-token prediction: one further module predicts the token after the next (new, §2.2);
- experts on different ranks, pipeline stages and ZeRO-1 instead of tensor parallelism (§3.2);
- FP8 matrix products with a scale for every tile of 1 x 128 or 128 x 128 (new, §3.3);
- documents packed best-fit without a mask, fill-in-the-middle (§4.1); a schedule in tokens
  (§4.2) and a context that YaRN extends (§4.3).

Map: §2.1.1 MultiHeadLatentAttention | §2.1.2 route, sequence_balance, Router, MoE, Experts,
update_biases | §2.2 MultiTokenPrediction, objective | §3.2 Pipeline1F1B, FlatParameters (ZeRO-1),
exchanged, recompute_activations | §3.3 quantize, fprop, dgrad, wgrad, FP8Linear, FP8Experts,
all_to_all_fp8, AdamWithBF16Moments | §4.1 pack, fill_in_the_middle | §4.2 plan, learning_rate |
§4.3 yarn_frequencies, plan. "Released" means the inference code and the weights that DeepSeek
published. Left out: DualPipe, the average of the weights (§3.2.3), 12-bit activations (§3.3.3) and
the random split of joined tokens (§4.1).
Legend: B batch, T positions, N = B T tokens, D width, H heads, E head width, to which R rotary
channels are added, F hidden width, V vocabulary, X experts, K experts per token, M rows at the
experts of a rank.
Conventions: rotary pairs are (i, i + R/2), not the released interleaved ones; RMSNorm before each
branch; T + 1 tokens give T inputs and T targets, all of which are scored; losses and gradients are
sums over ranks, each divided by a count of the whole global batch.

Run: python deepseek_v3.py                          # a laptop: the preset demo
     torchrun --nproc_per_node=8 deepseek_v3.py     # GPUs: the preset small, experts on 8 ranks
     torchrun --nnodes=256 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \
         deepseek_v3.py --preset 671b --pp 16 --ep 64 --data shards/ --eos_id 1 \
         --fim_ids 128801,128800,128802 --out /shared/671b --resume
     (32 GiB per rank. The run stops before the extension to 32K. The same command on 128 nodes
     continues it, with 87 GiB per rank, more than 80 GB: PyTorch's stages keep a buffer for every
     micro-batch. No layout fits the extension to 128K: 480 sequences are too few for 16 stages.)
Expect: in about a minute on two CPU cores the demo's held-out bits per byte fall from 8.05 to 2.74;
the loss of multi-token prediction stays close to the main loss, and the load of the busiest expert
falls from 2.9 to 1.2 times the mean; after the extension, with fixed biases, it is 1.4.
"""

import argparse
import base64
import bisect
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
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.utils.checkpoint import (
    CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts,
)  # fmt: skip

# ---------------------------------------- Config ----------------------------------------

@dataclasses.dataclass(unsafe_hash=True)
class Config:
    """Run configuration: each field is a command-line flag, and its comment is the flag's help."""

    # Model, §4.2
    vocab_size: int = 0  # V, vocabulary size; 0: that of the tokenizer
    dim: int = 7168  # D, width of the residual stream
    n_layers: int = 61  # number of blocks
    n_dense: int = 3  # number of leading blocks with a dense feed-forward layer instead of experts
    hidden_dim: int = 18432  # F, width of the dense feed-forward layers
    n_heads: int = 128  # H, attention heads
    q_rank: int = 1536  # d_c', width of the query latent; 0: queries are not compressed
    kv_rank: int = 512  # d_c, width of the latent of keys and values
    head_dim: int = 128  # d_h, width of a head without its rotary part
    rope_dim: int = 64  # d_h^R, width of the rotary part of queries and keys
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm; 1e-6 for latents
    init_std: float = 0.006  # standard deviation of the initial matrices
    # Experts, §2.1.2
    n_experts: int = 256  # X, routed experts of a layer
    n_shared: int = 1  # shared experts of a layer, which process every token
    expert_dim: int = 2048  # hidden width of an expert
    top_k: int = 8  # K, routed experts per token
    n_groups: int = 8  # number of groups of experts, each meant for one node
    groups_kept: int = 4  # maximum number of groups that the experts of a token come from
    route_scale: float = 2.5  # factor of the gates of the routed experts
    gamma: float = 0.001  # change of a balancing bias in one update
    balance_loss: float = 1e-4  # alpha, weight of the sequence-wise balance loss
    # Multi-token prediction, §2.2
    mtp: bool = True  # also predict the token after the next one
    mtp_weight: float = 0.3  # lambda, weight of the loss of multi-token prediction
    mtp_last_weight: float = 0.1  # weight of multi-token prediction after 10/14.8 of the tokens
    # Data, §4.1
    data: str = ""  # file or directory of text or token shards; empty: Python's standard library
    tokenizer: str = ""  # bytes, an encoding of tiktoken or a BPE rank file; empty: bytes
    eos_id: int = 0  # id that ends each document in token shards, without --tokenizer; 0: unknown
    fim_ids: str = ""  # BEGIN,HOLE,END: ids for fill-in-the-middle in shards, without --tokenizer
    fim: float = 0.1  # share of documents that are rearranged for fill-in-the-middle
    pack: int = 256  # maximum number of sequences that documents are packed into at once
    seq_len: int = 4096  # T, tokens of a sequence in pre-training
    # Schedule, §4.2, §4.3
    tokens: float = 14.8e12  # tokens of pre-training
    batch_size: int = 15360  # sequences per update, over all ranks, after the ramp
    first_batch: int = 0  # sequences of the first update; 0: batch_size
    ramp_tokens: float = 469e9  # tokens in which the batch grows to batch_size
    batch_multiple: int = 128  # sequences by which the batch grows at each step of the ramp
    long: str = ""  # context extension with YaRN, as LENGTHxSEQUENCES:STEPS,...; empty: none
    long_rope_factor: float = 40.0  # value of --rope_factor in the context extension
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_factor: float = 1.0  # YaRN's s, the factor by which the context is extended; 1: no YaRN
    rope_original: int = 4096  # context length that --rope_factor extends
    rope_mscale: float = 1.0  # YaRN's mscale in released configurations; 0: absent
    rope_mscale_all_dim: float = 1.0  # mscale_all_dim in released configurations; 0: absent
    steps: int = 0  # maximum number of updates; 0: as many as the schedule has
    # Optimization, §4.2
    lr: float = 2.2e-4  # peak learning rate
    min_lr: float = 2.2e-5  # learning rate from 14.3/14.8 of the tokens on
    last_lr: float = 7.3e-6  # learning rate from 14.633/14.8 of the tokens on
    decay: Literal["cosine", "steps"] = "cosine"  # decay of lr; steps: x 0.316 at 80 % and 90 %
    warmup_steps: int = 2000  # updates of linear warm-up, at most a tenth of the run
    weight_decay: float = 0.1  # decoupled weight decay of matrices and embeddings
    adam_eps: float = 1e-8  # added to the root of Adam's second moment
    clip: float = 1.0  # maximum norm of the gradient; 0: no clipping
    seed: int = 0  # seed of the weights and the order of the data
    # Parallelism, §3.2
    micro_batch: int = 0  # sequences per forward pass on one rank; 0: as many as the batch allows
    pp: int = 1  # pipeline stages, over which the layers are divided
    ep: int = 0  # ranks over which the experts are divided; 0: a divisor of the ranks, at most 8
    dp: int = 0  # copies of the experts; 0: as many as the ranks allow
    # Machine
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"  # auto: bf16 on a GPU, else fp32
    compile: bool = False  # compile attention and dense feed-forward layers with torch.compile
    recompute: Literal["none", "paper", "block"] = "none"  # what to recompute; paper: norms, SwiGLU
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

PRESETS = {
    # A CPU, a minute, and an extension of the context at the end.
    "demo": dict(
        dim=96, n_layers=3, n_dense=1, hidden_dim=256, n_heads=4, q_rank=48, kv_rank=32,
        head_dim=16, rope_dim=16, init_std=0.02, n_experts=16, expert_dim=64, top_k=3, n_groups=4,
        groups_kept=2, gamma=0.01, seq_len=64, tokens=5.5e5, batch_size=48, first_batch=24,
        ramp_tokens=1e5, batch_multiple=24, pack=4096, long="128x24:20", long_rope_factor=2.0,
        lr=3e-3, min_lr=3e-4, last_lr=1.5e-4, warmup_steps=20, log_every=50,
    ),
    # A GPU of 24 GB or a node of them, minutes: 243M parameters over bytes, 72M of them active.
    "small": dict(
        dim=768, n_layers=12, n_dense=1, hidden_dim=2048, n_heads=12, q_rank=384, kv_rank=256,
        head_dim=64, rope_dim=32, init_std=0.02, n_experts=32, expert_dim=256, top_k=4, n_groups=8,
        groups_kept=4, seq_len=1024, tokens=1.6e8, batch_size=96, first_batch=48, ramp_tokens=2e7,
        batch_multiple=48, long="2048x48:30", long_rope_factor=2.0, lr=1e-3, min_lr=1e-4,
        last_lr=3.3e-5, warmup_steps=150, val_every=500, micro_batch=12, compile=True,
    ),
    # §4.2 and §4.3: the model, its schedule and its two extensions.
    # Departure: whole blocks are recomputed. With what §3.2.3 recomputes, the first of 16 stages of
    # 1F1B would keep 76 GiB of activations, and a rank would need more than 80 GB.
    "671b": dict(
        vocab_size=129280, first_batch=3072, long="32768x1920:1000,131072x480:1000",
        precision="fp8", recompute="block", micro_batch=1,
    ),
    # The small ablation of §4.5, in the shape of DeepSeek-V2-Lite (V2, appendix B).
    # Undisclosed: learning rate and batch of the ablation, here V2-Lite's, and the factor of its
    # gates, here Moonlight's. The large ablation, 228.7B, has no preset: its sizes are not given.
    "16b": dict(
        vocab_size=102400, dim=2048, n_layers=27, n_dense=1, hidden_dim=10944, n_heads=16, q_rank=0,
        n_experts=64, n_shared=2, expert_dim=1408, top_k=6, n_groups=1, groups_kept=1,
        route_scale=2.446, tokens=1.33e12, batch_size=4608, lr=4.2e-4, decay="steps",
        precision="bf16", micro_batch=1, compile=True,
    ),
}  # fmt: skip
# Undisclosed: whether a token also begins a document. §4.1 shows only the <|eos_token|> that ends
# it, which has tiktoken's name here.
SPECIALS = ("<|endoftext|>", "<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")  # §4.1
PATTERN = (  # how GPT-4 and Llama 3 split text into words, for BPE rank files
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

@functools.lru_cache(64)  # by the values of cfg
def plan(cfg):
    """§4.2 and §4.3, the phases of the run: [(tokens of the run at the end, Config of the phase)].
    The batch grows with the tokens; the extensions of cfg.long follow."""
    # Undisclosed: the shape of the ramp. Each batch, in steps of batch_multiple, has equal tokens.
    parts = []  # (updates, Config)
    tokens = 0
    first_batch = cfg.first_batch or cfg.batch_size
    sizes = [*range(first_batch, cfg.batch_size, cfg.batch_multiple), cfg.batch_size]
    ends = [*np.linspace(0.0, cfg.ramp_tokens, len(sizes))[1:], cfg.tokens]
    for size, end in zip(sizes, ends):
        n_updates = math.ceil((min(end, cfg.tokens) - tokens) / (size * cfg.seq_len))
        n_updates = max(n_updates, 0)
        parts.append((n_updates, dataclasses.replace(cfg, batch_size=size)))
        tokens += n_updates * size * cfg.seq_len
    for part in filter(None, cfg.long.split(",")):
        with explain(f"--long: {part} is not LENGTHxSEQUENCES:STEPS", ValueError):
            length, size, n_updates = map(int, re.split("[x:]", part))
        changes = dict(seq_len=length, batch_size=size, rope_factor=cfg.long_rope_factor)
        if cfg.rope_factor == 1:
            changes["rope_original"] = cfg.seq_len
        parts.append((n_updates, dataclasses.replace(cfg, **changes)))
    phases = []
    end = 0
    steps_left = cfg.steps or math.inf
    for n_updates, phase in parts:
        n_updates = min(n_updates, steps_left)
        steps_left -= n_updates
        end += n_updates * phase.batch_size * phase.seq_len
        if n_updates:
            phases.append((end, phase))
    return phases

def planned_updates(tokens, end, cfg):
    """Number of updates that take the run from `tokens` to `end` tokens."""
    n_updates = 0
    for phase_end, phase in plan(cfg):
        update = phase.batch_size * phase.seq_len
        n = max(math.ceil((min(phase_end, end) - tokens) / update), 0)
        n_updates += n
        tokens += n * update
    return n_updates

def current_phase(tokens, cfg):
    """Config of the phase after so many tokens, with the γ and λ that hold there: λ falls after
    10/14.8 of the tokens of pre-training, and γ becomes 0 after 14.3/14.8 of them."""
    phases = plan(cfg)
    phase = next((phase for end, phase in phases if tokens < end), phases[-1][1])
    phase = dataclasses.replace(phase)
    if tokens >= 10 / 14.8 * cfg.tokens:
        phase.mtp_weight = cfg.mtp_last_weight
    if tokens >= 14.3 / 14.8 * cfg.tokens:
        phase.gamma = 0.0
    return phase

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

def yarn_frequencies(dim, theta, factor, original):
    """Rotary frequencies [R/2], in radians per position, of a context of `original` positions that
    YaRN (arXiv 2309.00071) extends `factor` times; a factor of 1 changes nothing (§4.3)."""
    i = torch.arange(0, dim, 2, dtype=torch.float32)
    frequencies = theta ** -(i / dim)
    # Pairs of at least β = 32 rotations within the original context keep their frequency, those of
    # at most α = 1 are interpolated, and between them a ramp blends the two.
    low = dim * math.log(original / (2 * math.pi * 32)) / (2 * math.log(theta))
    high = dim * math.log(original / (2 * math.pi)) / (2 * math.log(theta))
    low = max(math.floor(low), 0)
    high = min(math.ceil(high), dim - 1)
    ramp = ((i / 2 - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / factor * ramp

def yarn_scales(factor, mscale, mscale_all_dim):
    """(factor of cos and sin, factor of the attention scores), as released: r(mscale) divided by
    r(mscale_all_dim), and r(mscale_all_dim) squared, where r(m) = 0.1 m ln(s) + 1. In §4.3 both are
    1, and r is sqrt(t); 0 means that a released configuration lacks the coefficient."""
    root_all = 0.1 * mscale_all_dim * math.log(factor) + 1
    if not mscale or not mscale_all_dim:
        return 0.1 * math.log(factor) + 1, root_all**2
    return (0.1 * mscale * math.log(factor) + 1) / root_all, root_all**2

def rotate(x, cos, sin):
    """Rotary embedding of x [B, H, T, E] by the angles of cos and sin [T, E/2], in fp32."""
    first, second = x.float().chunk(2, -1)  # [B, H, T, E/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).type_as(x)

class MultiHeadLatentAttention(nn.Module):
    """§2.1.1, causal attention, [B, T, D] -> [B, T, D]. Queries are expanded from a latent of
    q_rank channels (0: from the input), keys and values from a latent of kv_rank channels. A head
    has head_dim channels without position and rope_dim rotary ones; all heads share the rotary key.
    `scale` multiplies the scores."""
    # Undisclosed: "additional scaling factors" at the latents (§4.2). The released code has none.
    # Undisclosed: eps of the latents' norms. Here 1e-6, as in the released code.

    def __init__(self, dim, n_heads, q_rank, kv_rank, head_dim, rope_dim):
        super().__init__()
        self.n_heads = n_heads
        self.kv_rank = kv_rank
        self.head_dim = head_dim
        self.rope_dim = rope_dim
        self.scale = (head_dim + rope_dim) ** -0.5
        self.q_down = Linear(dim, q_rank, bias=False) if q_rank else nn.Identity()  # W^DQ
        self.q_norm = RMSNorm(q_rank, 1e-6) if q_rank else nn.Identity()  # norms: §4.2
        self.q_up = Linear(q_rank or dim, n_heads * (head_dim + rope_dim), bias=False)  # W^UQ, W^QR
        self.kv_down = Linear(dim, kv_rank + rope_dim, bias=False)  # W^DKV, W^KR
        self.kv_norm = RMSNorm(kv_rank, 1e-6)
        self.kv_up = Linear(kv_rank, n_heads * 2 * head_dim, bias=False)  # by head: W^UK, W^UV
        self.out = Linear(n_heads * head_dim, dim, bias=False)  # W^O

    def forward(self, x, cos, sin):
        # Queries: compressed, then expanded; a head has a content part and a rotary part.
        q = self.q_up(self.q_norm(self.q_down(x)))  # Eq. 6-8: [B, T, H (E + R)]
        q = q.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # [B, H, T, E + R]
        q_content, q_rotary = q.split([self.head_dim, self.rope_dim], -1)

        # Keys and values: one latent for both, and one rotary key that all heads share.
        latent, k_rotary = self.kv_down(x).split([self.kv_rank, self.rope_dim], -1)  # Eq. 1
        kv = self.kv_up(self.kv_norm(latent))  # Eq. 2, 5: [B, T, H 2E]
        kv = kv.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        k_content, v = kv.chunk(2, -1)  # [B, H, T, E] each
        k_rotary = rotate(k_rotary[:, None], cos, sin)  # Eq. 3: [B, 1, T, R]
        k_rotary = k_rotary.expand(-1, self.n_heads, -1, -1)

        q = torch.cat((q_content, rotate(q_rotary, cos, sin)), -1)  # Eq. 9
        k = torch.cat((k_content, k_rotary), -1)  # Eq. 4
        v = F.pad(v, (0, self.rope_dim))  # fused kernels want equal widths
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)  # Eq. 10
        o = o[..., : self.head_dim].transpose(1, 2).flatten(2)  # [B, T, H E]
        return self.out(o)  # Eq. 11

class GatedMLP(nn.Module):
    """SwiGLU, (silu(x W_gate) * x W_up) W_down: [B, T, D] -> [B, T, D]."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden_dim, bias=False)
        self.down = Linear(hidden_dim, dim, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)  # [B, T, F] each
        return self.down(F.silu(gate) * up)

def route(s, bias, top_k, n_groups, groups_kept, scale):
    """§2.1.2: the K experts of each token and their gates, [..., K] each, from affinities s
    [..., X]. The bias affects the selection only, first of groups and then of experts."""
    biased = s.detach() + bias
    groups = biased.unflatten(-1, (n_groups, -1))  # [..., groups, X / groups]
    # Departure: the score of a group is the sum of its two largest affinities, as released. In the
    # paper it is that of its K / groups_kept largest, which are two only in the paper's model.
    scores = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1)  # [..., groups]
    kept = scores.topk(groups_kept, -1).indices
    dropped = torch.ones_like(scores, dtype=torch.bool).scatter(-1, kept, False)
    biased = groups.masked_fill(dropped[..., None], -math.inf).flatten(-2)  # [..., X]
    experts = biased.topk(top_k, -1).indices  # Eq. 16
    selected = s.gather(-1, experts)  # without the bias
    # Departure: `scale` and 1e-20 are in the released code, not in Eq. 13.
    gates = scale * selected / (selected.sum(-1, keepdim=True) + 1e-20)  # Eq. 13
    return experts, gates

def sequence_balance(s, top_k):
    """Eq. 17-20 without α, summed over sequences, of affinities s [B, T, X]."""
    # Eq. 18 counts the top K of s without bias and groups, not the experts that were selected.
    best = torch.zeros_like(s).scatter(-1, s.topk(top_k, -1).indices, 1.0)
    f = best.mean(1) * (s.shape[-1] / top_k)  # Eq. 18: [B, X], without a gradient
    p = (s / s.sum(-1, keepdim=True)).mean(1)  # Eq. 19, 20: [B, X]
    return (f * p).sum()  # Eq. 17

class Router(nn.Module):
    """§2.1.2, [B, T, D] -> experts and gates [B, T, K], the number of tokens of each expert [X],
    and the balance loss summed over sequences. Each backward pass adds the numbers to `load`."""

    def __init__(self, dim, n_experts, top_k, n_groups, groups_kept, scale):
        super().__init__()
        self.top_k = top_k
        self.n_groups = n_groups
        self.groups_kept = groups_kept
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(n_experts, dim))  # e_i, the centroids
        self.register_buffer("bias", torch.zeros(n_experts))  # b_i
        self.register_buffer("load", torch.zeros(n_experts), persistent=False)

    def affinities(self, x):
        """s of Eq. 15, [B, T, D] -> [B, T, X], in fp32."""
        return torch.sigmoid(F.linear(x.float(), self.weight))

    def add_load(self, counts):
        """Add the counts [X] of a batch to the load."""
        self.load += counts

    def forward(self, x):
        s = self.affinities(x)
        settings = self.top_k, self.n_groups, self.groups_kept, self.scale
        experts, gates = route(s, self.bias, *settings)
        rows = experts.flatten()
        counts = torch.zeros_like(self.bias, dtype=torch.int64)
        counts = counts.index_add(0, rows, torch.ones_like(rows))  # [X]
        if s.requires_grad:  # in the backward pass, since a forward pass may be recomputed
            s.register_hook(lambda gradient: self.add_load(counts))
        return experts, gates, counts, sequence_balance(s, self.top_k)

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

class MoE(nn.Module):
    """§2.1.2, [B, T, D] -> [B, T, D] and the balance loss: shared experts, and K routed ones per
    token; no token is dropped (Eq. 12 without its residual)."""

    def __init__(self, dim, expert_dim, n_experts, n_shared, top_k, n_groups, groups_kept, scale):
        super().__init__()
        self.router = Router(dim, n_experts, top_k, n_groups, groups_kept, scale)
        self.shared = GatedMLP(dim, n_shared * expert_dim)
        self.experts = Experts(n_experts, dim, expert_dim)

    def forward(self, x):
        experts, gates, counts, balance = self.router(x)
        k = experts.shape[-1]
        order = experts.flatten().argsort(stable=True)  # [N K], by expert
        inverse = order.argsort()
        rows = Permute.apply(x.flatten(0, 1), order, inverse, k)  # [N K, D]
        y = self.experts(rows, gates.flatten().gather(0, order), counts)
        y = Permute.apply(y, inverse, order, 1).unflatten(0, (-1, k))  # [N, K, D]
        y = y.sum(1).view_as(x) + self.shared(x)  # Eq. 12
        return y, balance

class Block(nn.Module):
    """§2.1, [B, T, D] -> [B, T, D] and the balance loss: attention, then a SwiGLU (dense) or
    experts, each after a norm and added to the residual stream."""

    def __init__(self, cfg, dense):
        super().__init__()
        heads = cfg.n_heads, cfg.q_rank, cfg.kv_rank, cfg.head_dim, cfg.rope_dim
        self.attn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attn = MultiHeadLatentAttention(cfg.dim, *heads)
        self.mlp_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        if dense:
            self.mlp = GatedMLP(cfg.dim, cfg.hidden_dim)
        else:
            experts = cfg.expert_dim, cfg.n_experts, cfg.n_shared
            routing = cfg.top_k, cfg.n_groups, cfg.groups_kept, cfg.route_scale
            self.mlp = MoE(cfg.dim, *experts, *routing)

    def attend(self, x, cos, sin):
        """The attention branch."""
        return self.attn(self.attn_norm(x), cos, sin)

    def forward(self, x, cos, sin):
        x = x + self.attend(x, cos, sin)
        if isinstance(self.mlp, MoE):
            y, balance = self.mlp(self.mlp_norm(x))
            return x + y, balance
        return x + self.mlp(self.mlp_norm(x)), 0.0

class MultiTokenPrediction(nn.Module):
    """§2.2, one module: final state of the main model and embeddings of the tokens, [B, T, D] each
    -> the state [B, T - 1, D] that predicts one token further, and the balance loss of its block.
    """

    def __init__(self, cfg):
        super().__init__()
        self.embedding_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.state_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.merge = Linear(2 * cfg.dim, cfg.dim, bias=False)  # M_1
        self.block = Block(cfg, dense=False)  # TRM_1
        self.final_norm = RMSNorm(cfg.dim, cfg.norm_eps)

    def forward(self, state, embedded, cos, sin):
        # Departure: the embedding comes first, and a norm precedes the shared head, as in the
        # released weights. Eq. 21 has the state first, Eq. 23 no norm.
        embedded = self.embedding_norm(embedded[:, 1:])
        state = self.state_norm(state[:, :-1])
        x = self.merge(torch.cat((embedded, state), -1))  # Eq. 21: [B, T - 1, D]
        x, balance = self.block(x, cos[:-1], sin[:-1])  # Eq. 22
        return self.final_norm(x), balance

class DeepSeekV3(nn.Module):
    """§2, tokens [B, T] -> logits [B, T, V] in fp32 or, with targets, the sums [3] of `losses`.
    `dtype` is the precision of the residual stream; parameters may be kept in another."""

    def __init__(self, cfg):
        super().__init__()
        self.dtype = torch.float32
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.dim)
        blocks = {str(i): Block(cfg, i < cfg.n_dense) for i in range(cfg.n_layers)}
        self.blocks = nn.ModuleDict(blocks)
        self.final_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.head = Linear(cfg.dim, cfg.vocab_size, bias=False)
        self.mtp = MultiTokenPrediction(cfg) if cfg.mtp else None
        self.extend(cfg)

    def extend(self, cfg):
        """Set the rotary frequencies and attention scales of the context extension in cfg."""
        # Departure: §4.3 extends the shared key alone. Here, as released, queries rotate like it,
        # as relative positions need, and the factor t multiplies the whole scores.
        sizes = cfg.rope_dim, cfg.rope_theta, cfg.rope_factor, cfg.rope_original
        self.frequencies = yarn_frequencies(*sizes)
        scales = yarn_scales(cfg.rope_factor, cfg.rope_mscale, cfg.rope_mscale_all_dim)
        self.rotary_scale, score_scale = scales
        for module in self.modules():
            if isinstance(module, MultiHeadLatentAttention):
                module.scale = score_scale * (cfg.head_dim + cfg.rope_dim) ** -0.5

    def forward(self, tokens, targets=None):
        x, balance = self.run_blocks(self.embed(tokens), 0.0)
        if targets is None:
            return self.logits(self.final_norm(x))
        return self.losses(x, balance, tokens, targets)

    def embed(self, tokens):
        """[B, T] -> [B, T, D]."""
        return self.token_embedding(tokens).to(self.dtype)

    def rope(self, x):
        """(cos, sin) [T, R/2] of the rotary angles, in fp32, of x [B, T, D]."""
        positions = torch.arange(x.shape[1], device=x.device)
        angles = positions[:, None] * self.frequencies.to(x.device)
        return angles.cos() * self.rotary_scale, angles.sin() * self.rotary_scale

    def run_blocks(self, x, balance):
        """x [B, T, D] after the blocks, and `balance` plus their balance losses."""
        cos, sin = self.rope(x)
        for block in self.blocks.values():
            x, block_balance = block(x, cos, sin)
            balance = balance + block_balance
        return x, balance

    def logits(self, x):
        """The head, [..., D] -> [..., V], in fp32."""
        return self.head(x).float()

    def losses(self, x, balance, tokens, targets):
        """Sums over the batch, [3]: nats of the next tokens, nats of multi-token prediction, and
        the balance loss. x [B, T, D] is the output of the blocks, balance their balance loss."""
        state = self.final_norm(x)
        vocab_size = self.head.out_features
        nats = chunked_loss(self.logits, state.flatten(0, 1), targets, vocab_size)
        mtp_nats = torch.zeros_like(nats)
        if self.mtp:
            # Undisclosed: whether the module reads the state before or after the final norm. Here
            # after it, as Hugging Face's code does.
            mtp_state, block_balance = self.mtp(state, self.embed(tokens), *self.rope(x))
            mtp_targets = targets[:, 1:]  # Eq. 24: t_3 ... t_{T+1}
            mtp_nats = chunked_loss(self.logits, mtp_state.flatten(0, 1), mtp_targets, vocab_size)
            balance = balance + block_balance
        return torch.stack((nats, mtp_nats, balance))

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

def init_weights(model, cfg, first_expert=0):
    """§4.2: N(0, 0.006) for all matrices, and gains of 1. A matrix is drawn from (seed, name), one
    of an expert from (seed, name, expert), so that every layout starts from the same numbers. The
    experts are numbered from first_expert. Raises ValueError for a parameter without a rule."""
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            p.data.fill_(1.0)
        elif re.search(r"(token_embedding|head|_down|_up|out|down|merge|router)\.weight$", name):
            generator = torch.Generator().manual_seed(stable_hash(cfg.seed, name))
            p.data.copy_(torch.empty(p.shape).normal_(0.0, cfg.init_std, generator=generator))
        elif is_expert(name):
            for i, matrix in enumerate(p.data, first_expert):
                generator = torch.Generator().manual_seed(stable_hash(cfg.seed, name, i))
                drawn = torch.empty(matrix.shape).normal_(0.0, cfg.init_std, generator=generator)
                matrix.copy_(drawn)
        else:
            raise ValueError(f"no rule initialises {name}")
    for buffer in model.buffers():
        buffer.zero_()

def is_expert(name):
    """Whether a parameter belongs to the routed experts, of which a rank has a part."""
    return ".experts." in name

def routers(model):
    """{layer: Router} of a model or a part of it; layer -1 is that of multi-token prediction."""
    blocks = {int(number): block for number, block in model.blocks.items()}
    if model.mtp:
        blocks[-1] = model.mtp.block
    return {i: block.mlp.router for i, block in blocks.items() if isinstance(block.mlp, MoE)}

def count_parameters(model):
    """(total, activated by a token) parameters of the main model, without multi-token prediction
    and balancing biases. The embedding counts as activated, unlike in the 2.4B of §4.5."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if name[:4] != "mtp."}
    total = sum(sizes.values())
    routed = sum(n for name, n in sizes.items() if is_expert(name))
    *_, router = routers(model).values()
    return total, total - routed * (len(router.bias) - router.top_k) // len(router.bias)

def layer_sizes(cfg):
    """Numbers of weights of attention, of a dense feed-forward layer, of one expert, and of the
    shared experts and router of a layer, without norms, which are less than a thousandth."""
    attention = cfg.dim * (cfg.q_rank + cfg.kv_rank + cfg.rope_dim + cfg.n_heads * cfg.head_dim)
    attention += (cfg.q_rank or cfg.dim) * cfg.n_heads * (cfg.head_dim + cfg.rope_dim)
    attention += cfg.kv_rank * cfg.n_heads * 2 * cfg.head_dim
    expert = 3 * cfg.dim * cfg.expert_dim
    shared = cfg.n_shared * expert + cfg.dim * cfg.n_experts
    return attention, 3 * cfg.dim * cfg.hidden_dim, expert, shared

def flops_per_token(cfg):
    """Training FLOPs per token, with multi-token prediction: 2 per weight of a matrix product in
    the forward pass and 4 in the backward pass. Attention is counted as causal: (T + 1) / 2 keys
    per query, half of the full square."""
    attention, dense, expert, shared = layer_sizes(cfg)
    head_widths = cfg.n_heads * (2 * cfg.head_dim + cfg.rope_dim)
    attention += head_widths * (cfg.seq_len + 1) / 2  # q kᵀ, A v
    moe = shared + cfg.top_k * expert
    n_moe = cfg.n_layers - cfg.n_dense + cfg.mtp
    weights = (cfg.n_dense + n_moe) * attention + cfg.n_dense * dense + n_moe * moe
    weights += (1 + cfg.mtp) * cfg.dim * cfg.vocab_size + cfg.mtp * 2 * cfg.dim**2
    return 6 * weights

# ---------------------------------------- Data ----------------------------------------

def fill_in_the_middle(ids, fim_ids, key):
    """§4.1, PSM: the ids of a document, cut at two points that key decides, in the order begin,
    prefix, hole, suffix, end, middle, and the id that ended the document."""
    # Undisclosed: the cuts. Here uniform, and between tokens, so that shards need no tokenizer.
    begin, hole, end = fim_ids
    cuts = sorted(stable_hash(key, i) % len(ids) for i in range(2))
    prefix, middle, suffix = np.split(ids[:-1], cuts)
    return np.concatenate(([begin], prefix, [hole], suffix, [end], middle, ids[-1:]))

@functools.lru_cache(32)
def pack(corpus, block, length, n, fim, fim_ids, seed):
    """Block `block` of n packed sequences, [n, T + 1]. A share `fim` of the documents is rearranged
    with fim_ids (begin, hole, end), or none if fim_ids is empty."""
    # Undisclosed: the packing, "inspired by" best-fit packing (arXiv 2404.10830). Here a block is a
    # stretch of the corpus as long as n sequences. Its documents, cut to at most a sequence, go by
    # size, largest first, into the fullest sequence with room. Those without room are cut to
    # fill what is left; the excess that fill-in-the-middle adds, about 0.1 %, is lost.
    window = length + 1
    ids = corpus.window(block, n * window - 1, seed)
    pieces = []
    for i, document in enumerate(np.split(ids, np.flatnonzero(ids == corpus.separator) + 1)):
        key = (seed, "document", length, block, i)
        complete = i > 0 and len(document) > 1 and document[-1] == corpus.separator
        if fim_ids and complete and stable_hash(key) < fim * 2**64:
            document = fill_in_the_middle(document, fim_ids, key)
        starts = range(0, len(document), window)
        pieces += [document[start : start + window] for start in starts]

    rows = [[] for _ in range(n)]  # the pieces of each sequence
    rooms = [(window, row) for row in range(n)]  # sorted: (ids that still fit, sequence)

    def append(piece, i):
        """Append a piece to the sequence of rooms[i]; return what does not fit."""
        room, row = rooms.pop(i)
        rows[row].append(piece[:room])
        bisect.insort(rooms, (room - len(piece[:room]), row))
        return piece[room:]

    leftover = []  # pieces for which no sequence has room
    for piece in sorted(pieces, key=len, reverse=True):
        best = bisect.bisect_left(rooms, (len(piece), -1))
        if best < n:
            append(piece, best)
        else:
            leftover.append(piece)
    for piece in leftover:
        while len(piece) and rooms[-1][0]:
            piece = append(piece, -1)
    return np.stack([np.concatenate(row) for row in rows])

def get_batch(corpus, first, n, cfg):
    """Sequences first ... first + n - 1 of the run: tokens and targets [n, T], and the counts
    n_targets, n_bytes of the targets' text, and n_sequences.

    A pure function of the seed and the index, so that any number of ranks, any accumulation and
    any resume see the same sequences. Held-out text is neither packed nor rearranged.
    """
    # Blocks of at most cfg.pack sequences, halved until the corpus has at least four blocks.
    size = min(cfg.pack, corpus.n_windows(cfg.seq_len))
    while size > 1 and corpus.n_windows(size * (cfg.seq_len + 1) - 1) < 4:
        size //= 2
    fim_ids = tuple(map(int, filter(None, cfg.fim_ids.split(","))))
    windows = []
    for i in range(first, first + n):
        if corpus.in_order:
            windows.append(corpus.window(i, cfg.seq_len, cfg.seed))
            continue
        group, index = divmod(i, 16 * size)  # the sequences of 16 blocks are shuffled together
        index = permutation(16 * size, cfg.seed, "pack", group)[index]
        block = 16 * group + index // size
        rows = pack(corpus, block, cfg.seq_len, size, cfg.fim, fim_ids, cfg.seed)
        windows.append(rows[index % size])
    windows = torch.from_numpy(np.stack(windows))  # [n, T + 1]
    targets = windows[:, 1:]
    n_bytes = int(corpus.token_bytes[targets].sum())
    counts = {"n_targets": targets.numel(), "n_bytes": n_bytes, "n_sequences": n}
    return {"tokens": windows[:, :-1], "targets": targets, **counts}

# ---------------------------------------- Objective ----------------------------------------

def objective(model, batch, cfg):
    """§2.2, Eq. 17: L_main + λ L_MTP + Σ L_Bal over layers, with the first two as metrics. The sums
    that the model returns are divided by counts of the global batch: nats by n_targets, those
    of multi-token prediction too, although it has one less in each sequence (Eq. 24), and the
    balance loss by n_sequences."""
    # Undisclosed: how L_Bal adds up. Summed over layers, that of multi-token prediction included,
    # and averaged over sequences, as in V2; the bias of its router is updated like the others.
    nats, mtp_nats, balance = model(batch["tokens"], batch["targets"])
    main = nats / batch["n_targets"]
    mtp = mtp_nats / batch["n_targets"]
    balance = balance / batch["n_sequences"]
    loss = main + cfg.mtp_weight * mtp + cfg.balance_loss * balance
    return loss, {"main": main.detach(), "mtp": mtp.detach()}

# ---------------------------------------- Optimizer ----------------------------------------

class AdamWithBF16Moments(torch.optim.AdamW):
    """§3.3.3, AdamW that computes in fp32 and keeps its moments in bf16 between updates."""

    def cast_moments(self, dtype):
        """Cast the moments to dtype."""
        for state in self.state.values():
            state["exp_avg"] = state["exp_avg"].to(dtype)
            state["exp_avg_sq"] = state["exp_avg_sq"].to(dtype)

    def step(self, closure=None):
        self.cast_moments(torch.float32)
        super().step()
        self.cast_moments(torch.bfloat16)

def build_optimizer(flats, cfg):
    """§4.2: AdamW over the masters of {name: FlatParameters}; with bf16 moments under fp8."""
    # Undisclosed: eps, and what is decayed. Here matrices and embeddings, but no gains of norms.
    groups = []
    for kind in ("matrices", "experts", "routers", "norms"):
        masters = [flat.master for name, flat in flats.items() if name.endswith(kind)]
        groups.append(dict(params=masters, weight_decay=cfg.weight_decay * (kind != "norms")))
    adam = AdamWithBF16Moments if cfg.precision == "fp8" else torch.optim.AdamW
    return adam(groups, lr=cfg.lr, betas=(0.9, 0.95), eps=cfg.adam_eps, fused=True)

def learning_rate(tokens, cfg):
    """§4.2, after so many tokens: linear warm-up over updates; lr up to 10/14.8 of pre-training, a
    cosine to min_lr at 14.3/14.8, min_lr up to 14.633/14.8, then last_lr, also in the extension
    (§4.3). With --decay steps, as V2-Lite: lr, times 0.316 at 80 % and again at 90 % of the tokens.
    """
    n_updates = planned_updates(0, tokens, cfg)
    if n_updates < cfg.warmup_steps and cfg.tokens:  # an extension alone has no warm-up
        return cfg.lr * n_updates / cfg.warmup_steps
    share = tokens / cfg.tokens if cfg.tokens else 1.0
    if cfg.decay == "steps":
        if share < 0.8:
            return cfg.lr
        return cfg.lr * (0.316 if share < 0.9 else 0.316**2)
    if share >= 14.633 / 14.8:
        return cfg.last_lr
    done = min(max((share * 14.8 - 10) / 4.3, 0.0), 1.0)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) / 2 * (1 + math.cos(math.pi * done))

def update_biases(own, gamma, loads):
    """§2.1.2: b += γ sign(mean load - load) for the routers of this rank, own = {layer: Router},
    with loads summed over the ranks and micro-batches of an update. Returns load / mean load of all
    layers; `loads` is a tensor of zeros of that shape, [layers + 1, X]."""
    for layer, router in own.items():
        loads[layer] = router.load
        router.load.zero_()
    dist.all_reduce(loads)
    mean = loads.mean(1, keepdim=True)
    for layer, router in own.items():
        router.bias += gamma * torch.sign(mean - loads)[layer]
    return loads / mean.clamp(min=1e-9)

# ---------------------------------------- Precision ----------------------------------------

# Under bf16 and fp8 the weights are bf16 and the masters that AdamW updates fp32, gradients are
# summed in fp32, and residual stream and attention are bf16; router, norm statistics, rotary
# angles, softmax and loss are fp32. Under fp8 (§3.3) the products of attention's projections, of
# the feed-forward layers and of the experts take E4M3 operands, and AdamW's moments are bf16;
# embedding, head, router, norms and attention itself are not cast down. Off Hopper this is
# emulated: codes times scales, multiplied and summed in fp32; the kernel sums each 128 products in
# the tensor cores, and those sums in fp32 (N_C, §3.3.2).
# Undisclosed: the merge of multi-token prediction. Here it stays bf16, as in the released weights.
# Departure: weights are quantized from bf16 copies. The input of attention's output projection
# is cached in E4M3, where the paper has E5M6, 12 bits that PyTorch lacks (§3.3.3). Experts cache
# the input of their SwiGLU in bf16 and its output in E4M3, where the paper caches the input in FP8
# and computes the output again.

PEAK_FLOPS = {"bf16": {  # dense, by precision and the device's exact name; others get no MFU
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA B200": 2250e12,
}}  # fmt: skip
PEAK_FLOPS["fp8"] = {k: 2 * peak for k, peak in PEAK_FLOPS["bf16"].items() if "NVIDIA H" in k}

def quantize(x, rows, columns, powers=False, least=1e-4):
    """§3.3.2: x [M, N] in tiles of rows x columns as (E4M3 codes [M', N'], fp32 scales [M' / rows,
    N' / columns]), x = code * scale, M' and N' padded to whole tiles, and M' to 16 rows. Scale
    = max(amax of the tile, least) / 448, with powers rounded up to a power of two."""
    down = -x.shape[0] % max(rows, 16)
    right = -x.shape[1] % columns
    x = F.pad(x.float(), (0, right, 0, down))
    tiles = x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)
    scales = tiles.abs().amax((1, 3)).clamp(min=least) / 448
    if powers:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    codes = (tiles / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.view(x.shape), scales

# Undisclosed: `least` of gradients. With the 1e-4 of the released kernels, which are for inference,
# gradients of a loss that is divided by all tokens of a batch would vanish.
quantize_gradient = functools.partial(quantize, least=1e-30)

def dequantize(codes, scales):
    """The fp32 numbers [M, N] of codes and scales."""
    m, n = scales.shape
    tiles = codes.view(m, codes.shape[0] // max(m, 1), n, codes.shape[1] // max(n, 1))
    return (tiles.float() * scales[:, None, :, None]).view(codes.shape)

def has_fp8_kernels(device):
    """Whether F.scaled_mm takes 1 x 128 tiles and 128 x 128 blocks on a device: on Hopper alone."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)

def scaled_product(a, b, dtype):
    """a bᵀ of codes and scales of a [M, K] and b [N, K] in tiles along K, summed in fp32."""
    if not has_fp8_kernels(a[0].device) or not a[0].numel():
        return (dequantize(*a) @ dequantize(*b).T).to(dtype)
    scaling = []  # scales and their kind, of a and of b, in the layouts that the kernels ask for
    for codes, scales in (a, b):
        if len(scales) == len(codes):
            column_major = scales.T.contiguous().T
            scaling += column_major, F.ScalingType.BlockWise1x128
        else:
            padded = F.pad(scales, (0, -scales.shape[1] % 4))
            scaling += padded.T, F.ScalingType.BlockWise128x128
    return F.scaled_mm(a[0], b[0].T, *scaling, output_dtype=dtype)

def fprop(tiles, blocks, dtype):
    """Y = X Wᵀ: X in tiles of 1 x 128, W in blocks of 128 x 128."""
    return scaled_product(tiles, blocks, dtype)

def dgrad(gradient, blocks, powers):
    """dX = dY W: dY in tiles of 1 x 128; the blocks of W, transposed, keep their scales."""
    transposed = tuple(part.T.contiguous() for part in blocks)
    return scaled_product(quantize_gradient(gradient, 1, 128, powers), transposed, gradient.dtype)

def wgrad(gradient, x, powers):
    """dW = dYᵀ X: both in tiles of 128 tokens x 1 channel; in fp32."""
    a = quantize_gradient(gradient.T.contiguous(), 1, 128, powers[1])
    b = quantize(x.T.contiguous(), 1, 128, powers[0])
    return scaled_product(a, b, torch.float32)

class FP8Product(torch.autograd.Function):
    """§3.3.2, rows x [M, D] by one weight w [F, D] or by several, w [X, F, D], of which matrix i
    multiplies rows bounds[i] ... bounds[i + 1] - 1: [M, F]. `blocks` has codes and scales of each;
    `powers`: whether the scales of x, and those of the gradient, are powers of two. x is kept in
    E4M3; with powers of two its new tiles along tokens lose no digit."""

    @staticmethod
    def forward(ctx, x, w, blocks, bounds, powers):
        outputs = []
        kept = []
        for block, (start, end) in zip(blocks, itertools.pairwise(bounds)):
            tiles = quantize(x[start:end], 1, 128, powers[0])
            kept += tiles
            outputs.append(fprop(tiles, block, x.dtype)[: end - start, : w.shape[-2]])
        ctx.save_for_backward(w, *kept)
        ctx.settings = blocks, bounds, powers
        return torch.cat(outputs)

    @staticmethod
    def backward(ctx, gradient):
        w, *kept = ctx.saved_tensors
        blocks, bounds, powers = ctx.settings
        n_outputs, n_inputs = w.shape[-2:]
        dx = []
        dw = []
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            rows = gradient[start:end]
            x = dequantize(*kept[2 * i : 2 * i + 2])[: end - start, :n_inputs]
            dx.append(dgrad(rows, blocks[i], powers[1])[: end - start, :n_inputs])
            dw.append(wgrad(rows, x, powers)[:n_outputs, :n_inputs])
        return torch.cat(dx), torch.stack(dw).view(w.shape), None, None, None

class FP8Linear(nn.Module):
    """A linear layer with a weight [F, D] and FP8 operands. `powers`: whether the scales of the
    input are powers of two. `blocks` caches the codes and scales of the weight until its update."""

    def __init__(self, weight, powers):
        super().__init__()
        self.weight = weight
        self.powers = powers
        self.blocks = None

    def forward(self, x):
        if self.blocks is None:
            self.blocks = [quantize(self.weight.data, 128, 128)]
        rows = x.flatten(0, -2)
        bounds = 0, len(rows)
        y = FP8Product.apply(rows, self.weight, self.blocks, bounds, (self.powers, False))
        return y.unflatten(0, x.shape[:-1])

class FP8Experts(nn.Module):
    """Experts of weights gate_up [X, 2F, D] and down [X, D, F], with FP8 operands. The scales of
    the input, and of the gradient of the output, are powers of two (§3.3.3)."""

    # Departure: PyTorch has no grouped product with these scales: each expert has its own.

    def __init__(self, gate_up, down):
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.blocks = None

    def forward(self, x, gates, counts):
        if self.blocks is None:
            weights = self.gate_up.data, self.down.data
            self.blocks = [[quantize(w, 128, 128) for w in matrices] for matrices in weights]
        bounds = (0, *counts.cumsum(0).tolist())
        hidden = FP8Product.apply(x, self.gate_up, self.blocks[0], bounds, (True, False))
        gate, up = hidden.chunk(2, -1)  # [M, F] each
        h = F.silu(gate) * up * gates[:, None].type_as(up)
        return FP8Product.apply(h, self.down, self.blocks[1], bounds, (False, True))

def use_fp8(model):
    """Replace the linear layers of attention and feed-forward layers, and the experts. The input
    of attention's output projection has powers of two as scales (§3.3.3)."""
    for parent in list(model.modules()):
        if isinstance(parent, (MultiHeadLatentAttention, GatedMLP)):
            for name, child in list(parent.named_children()):
                if isinstance(child, Linear):
                    setattr(parent, name, FP8Linear(child.weight, powers=name == "out"))
        if isinstance(parent, MoE):
            parent.experts = FP8Experts(parent.experts.gate_up, parent.experts.down)

def forget_codes(model):
    """Drop the cached codes of all weights, after an update."""
    for module in model.modules():
        if isinstance(module, (FP8Linear, FP8Experts)):
            module.blocks = None

# ---------------------------------------- Parallelism ----------------------------------------

def fit_layout(cfg, ranks):
    """cfg with ep and dp chosen where they are 0: ep divides the experts, the ranks of a stage and
    8; dp takes all ranks that are left."""
    left = ranks // max(cfg.pp, 1)
    ep = cfg.ep or (left // cfg.dp if cfg.dp else math.gcd(left, cfg.n_experts, 8))
    dp = cfg.dp or left // max(ep, 1)
    if min(cfg.pp, ep) < 1 or cfg.pp * ep * dp != ranks:
        sizes = f"pp {cfg.pp} x ep {cfg.ep or 'any'} x dp {cfg.dp or 'any'}"
        raise ValueError(f"{sizes} are not {ranks} ranks")
    return dataclasses.replace(cfg, ep=ep, dp=dp)

def reading_ranks(cfg):
    """Number of data-parallel ranks, which read different sequences: all ranks of a stage."""
    return cfg.dp * cfg.ep

def layers_of_stage(cfg, stage):
    """The layers of a pipeline stage, as a range."""
    # Undisclosed: how the 61 layers are divided. Here evenly, with the head counted as two.
    edges = [round((cfg.n_layers + 2) * i / cfg.pp) for i in (stage, stage + 1)]
    return range(*(min(edge, cfg.n_layers) for edge in edges))

def all_to_all(x, send, receive, group):
    """Rows of x [M, ...], send[i] of which go to rank i of the group; receive[i] come from it."""
    rows = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(rows, x.contiguous(), receive, send, group=group)
    return rows

def all_to_all_fp8(x, send, receive, group):
    """all_to_all of activations or gradients x [M, D] in E4M3, whose scale for each 1 x 128 is a
    power of two (§3.3.3)."""
    codes, scales = (part[: len(x)] for part in quantize_gradient(x, 1, 128, powers=True))
    codes = all_to_all(codes.view(torch.uint8), send, receive, group).view(torch.float8_e4m3fn)
    scales = all_to_all(scales, send, receive, group)
    return dequantize(codes, scales)[:, : x.shape[1]].type_as(x)

class Exchange(torch.autograd.Function):
    """§3.2.2, all-to-all of rows by the function `send_rows`, and of their gradients, in the
    opposite direction, by `send_gradients`."""

    @staticmethod
    def forward(ctx, x, send, receive, group, send_rows, send_gradients):
        ctx.settings = receive, send, group
        ctx.send_gradients = send_gradients
        return send_rows(x, send, receive, group)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.send_gradients(gradient, *ctx.settings), None, None, None, None, None

def exchanged(experts, group, dispatch, x, gates, counts):
    """experts(x, gates, counts), where each rank of the group has a part of the experts: dispatch
    of the rows and their gates to the ranks of their experts, and combine of the outputs. The rows,
    and the gradients of the outputs, travel by the function `dispatch`."""
    ranks = group.size()
    send = counts.view(ranks, -1)  # [ranks, X / ranks]
    receive = all_to_all(send, [1] * ranks, [1] * ranks, group)
    n_send, n_receive = torch.stack((send.sum(1), receive.sum(1))).tolist()
    x = Exchange.apply(x, n_send, n_receive, group, dispatch, all_to_all)
    gates = Exchange.apply(gates, n_send, n_receive, group, all_to_all, all_to_all)
    # Rows come sorted by rank, and the experts take them sorted by expert.
    local = torch.arange(send.shape[1], device=x.device).repeat(ranks)
    order = local.repeat_interleave(receive.flatten()).argsort(stable=True)
    inverse = order.argsort()
    rows = Permute.apply(x, order, inverse, 1)
    y = experts(rows, gates.gather(0, order), receive.sum(0))
    y = Permute.apply(y, inverse, order, 1)
    return Exchange.apply(y, n_receive, n_send, group, all_to_all, dispatch)

def keeps_bf16(name, cfg):
    """Whether a parameter is kept in bf16, and its master in fp32."""
    return cfg.precision in ("bf16", "fp8") and not re.search(r"(norm|router)\.weight$", name)

def set_dtypes(model, cfg):
    """Cast the parameters of a model on the meta device to the dtypes that they are kept in."""
    for name, p in model.named_parameters():
        if keeps_bf16(name, cfg):
            p.data = p.data.bfloat16()

def recomputed(function, **settings):
    """The function with activation checkpointing: inputs are saved, the rest is computed again."""
    return functools.partial(checkpoint, function, use_reentrant=False, **settings)

def keep_attention(context, operator, *args, **kwargs):
    """Policy of selective checkpointing: save the outputs of attention, recompute the rest."""
    is_attention = "scaled_dot_product" in operator.name()
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE

def recompute_activations(model, how):
    """Recompute blocks, or as the paper (§3.2.3) norms and up-projections of attention, the output
    of the experts' SwiGLU, and the fp32 input of the router."""
    # Departure: attention's down-projections are computed again with its norms, and the norm before
    # the feed-forward layer is kept.
    contexts = functools.partial(create_selective_checkpoint_contexts, keep_attention)
    for module in model.modules():
        if how == "block" and isinstance(module, Block):
            module.forward = recomputed(module.forward)
        if how == "paper" and isinstance(module, Block):
            module.attend = recomputed(module.attend, context_fn=contexts)
        if how == "paper" and isinstance(module, Router):
            module.affinities = recomputed(module.affinities)
        if how == "paper" and isinstance(module, Experts):
            module.project = recomputed(module.project)

def parallelize(model, cfg, mesh):
    """Reduce a model on the meta device to the part of this rank, the layers of its pipeline stage
    and its part of the experts, and allocate it. Weights are bf16, except norms and routers and
    under fp32; gradients are fp32. Sets precision, recomputation and compilation."""
    stage = mesh["pp"].get_local_rank()
    is_last = stage == cfg.pp - 1
    for i in set(range(cfg.n_layers)) - set(layers_of_stage(cfg, stage)):
        del model.blocks[str(i)]
    if not is_last:
        model.final_norm = model.head = model.mtp = None
    if stage > 0 and not (is_last and cfg.mtp):  # multi-token prediction has a copy
        model.token_embedding = None
    dispatch = all_to_all
    if cfg.precision != "fp32":
        model.dtype = torch.bfloat16
    if cfg.precision == "fp8":
        use_fp8(model)
        dispatch = all_to_all_fp8
    recompute_activations(model, cfg.recompute)
    group = mesh["ep"].get_group()
    for module in model.modules():
        if isinstance(module, MoE) and cfg.ep > 1:
            experts = module.experts
            experts.gate_up = nn.Parameter(experts.gate_up[: cfg.n_experts // cfg.ep])
            experts.down = nn.Parameter(experts.down[: cfg.n_experts // cfg.ep])
            experts.forward = functools.partial(exchanged, experts.forward, group, dispatch)
        if isinstance(module, (MultiHeadLatentAttention, GatedMLP)) and cfg.compile:
            module.compile(dynamic=False)
    if cfg.compile:
        torch.compiler.config.fail_on_recompile_limit_hit = True
        torch.compiler.config.recompile_limit = 64  # a graph for each length and width
    set_dtypes(model, cfg)
    model.to_empty(device=mesh.device_type)
    for p in model.parameters():
        p.grad_dtype = torch.float32
    return model

class FlatParameters:
    """§3.2, ZeRO-1 for the n values of parameters of one kind in a block. The parameters become
    views of one flat tensor, and their fp32 gradients views of another. Each rank of the mesh has
    one part of the fp32 values, the `master`, with its Adam moments, and updates that part."""

    def __init__(self, parameters, mesh):
        self.mesh = mesh
        self.weights = torch.cat([p.data.flatten() for p in parameters])
        self.gradients = torch.zeros_like(self.weights, dtype=torch.float32)
        self.n = len(self.weights)
        sizes = [p.numel() for p in parameters]
        views = zip(parameters, self.weights.split(sizes), self.gradients.split(sizes))
        for p, weights, gradients in views:
            p.data = weights.view_as(p)
            p.grad = gradients.view_as(p)
        size = math.ceil(self.n / mesh.size())  # of a part; the last ranks' may be smaller
        first = min(mesh.get_local_rank() * size, self.n)
        self.master = nn.Parameter(self.shard(self.weights[first : first + size].float()))

    def shard(self, part):
        """DTensor [n] of all ranks' parts, so that a checkpoint fits another number of ranks."""
        layout = dict(run_check=False, shape=torch.Size([self.n]), stride=(1,))
        return DTensor.from_local(part, self.mesh, [Shard(0)], **layout)

    def reduce(self):
        """Sum the gradients over ranks; this rank's part becomes the gradient of its master."""
        sums = DTensor.from_local(self.gradients, self.mesh, [Partial()], run_check=False)
        self.master.grad = sums.redistribute(placements=[Shard(0)])

    @torch.no_grad()
    def gather(self):
        """Write the masters of all ranks to the weights."""
        part = self.master.to_local().to(self.weights.dtype)
        self.weights.copy_(self.shard(part).full_tensor())

def flatten_parameters(model, mesh, data):
    """{name: FlatParameters} of each block, in the kinds experts, other matrices, routers, norms;
    `data` is the mesh of all ranks of a stage."""
    kinds = {"experts": f"ep{mesh['ep'].get_local_rank()}/experts", "router": "routers"}
    kinds |= {"norm": "norms", "": "matrices"}
    groups = {}
    for name, p in model.named_parameters():
        kind = next(kind for part, kind in kinds.items() if part in name)
        block = re.match(r"blocks\.\d+|\w+", name)[0].replace(".", "/")
        groups.setdefault(f"{block}/{kind}", []).append(p)
    return {
        name: FlatParameters(parameters, mesh["dp"] if name.endswith("experts") else data)
        for name, parameters in groups.items()
    }

class PipelinePart(nn.Module):
    """The part of a model that a pipeline rank has: states x [B, T, D] and balance loss -> those
    after its blocks or, on the last stage, the sums of DeepSeekV3.losses. All get the tokens."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs, tokens, targets):
        if not inputs:  # the first stage; the balance loss is fp32 and must have a gradient
            x = self.model.embed(tokens)
            inputs = x, x.new_zeros((), dtype=torch.float32, requires_grad=True)
        x, balance = self.model.run_blocks(*inputs)
        if self.model.head is None:
            return x, balance
        return self.model.losses(x, balance, tokens, targets)

class Pipeline1F1B:
    """§3.2.1, this rank's part of the model, run over micro-batches in the schedule 1F1B, which for
    one pipeline stage is a forward and a backward pass of each."""

    # Departure: 1F1B instead of DualPipe, which hides the all-to-all of the experts behind the
    # computation of another micro-batch. PyTorch's DualPipeV does not overlap the two, and needs 2
    # PP = 32 micro-batches, where the first batch of 3,072 sequences gives 24. In DualPipe one rank
    # has the first and the last stage and one embedding for both (§3.2.3); here each of the two
    # stages has a copy, and the gradients of the copies are summed.

    def __init__(self, cfg, device):
        # Ranks by pipeline stage, copy of the experts, and part of the experts, the last innermost:
        # where a node has X / n_groups experts, a token reaches groups_kept nodes at most (§3.2).
        names = "pp", "dp", "ep"
        self.mesh = init_device_mesh(device.type, (cfg.pp, cfg.dp, cfg.ep), mesh_dim_names=names)
        sizes = cfg.pp, reading_ranks(cfg)
        self.data = init_device_mesh(device.type, sizes, mesh_dim_names=("pp", "data"))["data"]
        self.device = device
        self.stage = self.mesh["pp"].get_local_rank()
        self.is_last = self.stage == cfg.pp - 1
        self.first_expert = self.mesh["ep"].get_local_rank() * cfg.n_experts // cfg.ep
        with torch.device("meta"):
            model = DeepSeekV3(cfg)
        self.model = parallelize(model, cfg, self.mesh)
        self.ends = None  # the first and the last stage, which share the embedding
        if cfg.pp > 1 and cfg.mtp:
            pairs = self.mesh.mesh[[0, -1]].flatten(1).T.tolist()
            self.ends, _ = dist.new_subgroups_by_enumeration(pairs)

    def share(self):
        """Shard the parameters over ranks, once they are initialised. `saved` is what a checkpoint
        holds: masters and balancing biases."""
        self.flats = flatten_parameters(self.model, self.mesh, self.data)
        self.saved = nn.ParameterDict({name: flat.master for name, flat in self.flats.items()})
        for name, buffer in self.model.named_buffers():
            if name.endswith("router.bias"):
                self.saved.register_buffer(name.replace(".", "/"), buffer)

    def start_phase(self, cfg):
        """Prepare for a phase of the run: rotary frequencies, and a schedule for its shapes."""
        self.cfg = cfg
        self.model.extend(cfg)
        self.schedule = self.make_schedule(cfg)

    def make_schedule(self, cfg):
        """The schedule 1F1B of this rank's stage for the shapes of cfg."""
        n_micro, micro = split_batch(cfg, reading_ranks(cfg))
        empty = functools.partial(torch.empty, device="meta", requires_grad=True)
        between = empty(micro, cfg.seq_len, cfg.dim, dtype=self.model.dtype), empty(())
        stage = PipelineStage(
            PipelinePart(self.model), self.stage, cfg.pp, self.device,
            input_args=between if self.stage else (),
            output_args=empty(3) if self.is_last else between,
            group=self.mesh["pp"].get_group(),
        )  # fmt: skip
        return Schedule1F1B(stage, n_micro, self.loss, scale_grads=False)

    def loss(self, sums, targets):
        """The objective of a micro-batch, of which the last stage has returned the sums; adds its
        metrics to self.metrics."""
        loss, metrics = objective(lambda tokens, targets: sums, self.batch, self.cfg)
        self.metrics += torch.stack((metrics["main"], metrics["mtp"]))
        return loss

    def run(self, batches):
        """[main loss, loss of multi-token prediction] of this rank's part of the global batch, to
        be summed over ranks. Where autograd is on, gradients of the objective are added up."""
        self.batch = batches[0]  # each has the counts of the global batch
        self.metrics = torch.zeros(2, device=self.device)
        tokens = torch.cat([batch["tokens"] for batch in batches])
        targets = torch.cat([batch["targets"] for batch in batches])
        losses = dict(target=targets, losses=[]) if self.is_last else {}
        step = self.schedule.step
        if not torch.is_grad_enabled():
            # PyTorch 2.11 keeps whether the first run had gradients, and a schedule its buffers.
            step = self.make_schedule(self.cfg).eval
        step(tokens=tokens, targets=targets, **losses, return_outputs=False)
        return self.metrics

    def reduce(self, losses, limit):
        """Sum gradients and losses [2] over ranks, and clip the gradient to a norm of `limit`, if
        that is not 0. Returns the norm of the whole gradient and the two losses."""
        gradients = []
        counted = []  # for the norm, without the last stage's copy of the embedding
        for name, flat in self.flats.items():
            flat.reduce()
            gradients.append(flat.master.grad.to_local())
            if name.startswith("token_embedding") and self.ends:
                dist.all_reduce(gradients[-1], group=self.ends)
            if not name.startswith("token_embedding") or self.stage == 0:
                counted.append(gradients[-1])
        square = nn.utils.get_total_norm(counted).double() ** 2
        sums = torch.cat((square[None], losses.double()))
        dist.all_reduce(sums)
        square, main, mtp = sums.tolist()  # here an update waits for the device
        norm = square**0.5
        if limit and norm > limit:
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))
        return norm, main, mtp

    def evaluate(self, batches):
        """The main loss, without gradients."""
        with evaluation_mode(self.model, self.cfg.compile):
            return self.run(batches)[0]

def kept_bytes(cfg):
    """Bytes per position that a dense block, and a block with experts, keep for the backward pass,
    if all experts get equally many tokens."""
    size = 4 if cfg.precision == "fp32" else 2  # of an activation
    cached = 1 if cfg.precision == "fp8" else size  # of an input of a linear layer
    width = cfg.n_heads * (cfg.head_dim + cfg.rope_dim)
    norm = (4 + size) * cfg.dim  # its input in fp32 and the normalised one
    attention = norm + cached * cfg.dim + (4 + size + cached) * (cfg.q_rank + cfg.kv_rank)
    attention += 4 * size * width + cached * cfg.n_heads * cfg.head_dim  # q, k, v, o; o again
    attention += 4 * cfg.rope_dim * (cfg.n_heads + 1)  # rotary parts, in fp32
    hidden = 3 * size + cached  # per hidden channel: gate, up, silu(gate) and the product
    routed = cached * cfg.dim + (size + hidden) * cfg.expert_dim
    router = 4 * cfg.dim  # its input in fp32
    if cfg.recompute == "paper":
        attention = size * (cfg.dim + width)
        router = 0
        if cfg.precision != "fp8":
            routed = size * (cfg.dim + 2 * cfg.expert_dim)
    dense = norm + cached * cfg.dim + hidden * cfg.hidden_dim
    moe = norm + cached * cfg.dim + hidden * cfg.n_shared * cfg.expert_dim
    moe += router + cfg.top_k * routed
    return attention + dense, attention + moe

def stage_memory(cfg, stage):
    """Bytes on a rank of a pipeline stage, by kind, as a backward pass begins."""
    is_last = stage == cfg.pp - 1
    layers = layers_of_stage(cfg, stage)
    n_dense = sum(layer < cfg.n_dense for layer in layers)
    n_moe = len(layers) - n_dense + (is_last and cfg.mtp)
    attention, dense, expert, shared = layer_sizes(cfg)
    coded = (n_dense + n_moe) * attention + n_dense * dense + n_moe * shared  # in E4M3, too
    experts = n_moe * expert * cfg.n_experts // cfg.ep
    table = cfg.vocab_size * cfg.dim
    others = table * (stage == 0)
    if is_last:
        others += table + cfg.mtp * (2 * cfg.dim**2 + table * (cfg.pp > 1))
    n = coded + experts + others
    n_masters = (coded + others) / reading_ranks(cfg) + experts / cfg.dp
    size = 4 if cfg.precision == "fp32" else 2
    optimizer = {"fp32": 8, "bf16": 4 + 8, "fp8": 4 + 4}[cfg.precision]  # masters and moments
    memory = {"weights": size * n, "gradients": 4 * n, "optimizer": optimizer * n_masters}
    if cfg.precision == "fp8":
        memory["weights"] += coded + experts

    dense, moe = kept_bytes(cfg)
    kept = n_dense * dense + n_moe * moe
    recomputed_block = 0
    if cfg.recompute == "block":
        kept = (n_dense + n_moe) * size * cfg.dim
        recomputed_block = max(dense, moe)
    n_micro, micro = split_batch(cfg, reading_ranks(cfg))
    positions = micro * cfg.seq_len
    in_flight = min(cfg.pp - stage, n_micro)  # micro-batches of 1F1B
    memory["activations"] = positions * (in_flight * kept + recomputed_block)
    # PyTorch's stages keep a buffer per micro-batch for what each of their neighbours sends.
    n_neighbours = (stage > 0) + (stage < cfg.pp - 1)
    memory["received"] = n_micro * n_neighbours * positions * size * cfg.dim
    if is_last:  # logits of a chunk, their softmax and its gradient, and inputs of norms and heads
        memory["activations"] += 12 * min(positions * cfg.vocab_size, 2**25)
        memory["activations"] += positions * (4 + 2 * size) * cfg.dim * (1 + 3 * cfg.mtp)
    return memory

def memory_per_rank(cfg):
    """Bytes on the rank that needs most, by kind, in the phase cfg, in closed form."""
    stages = [stage_memory(cfg, stage) for stage in range(cfg.pp)]
    return max(stages, key=lambda memory: sum(memory.values()))

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
HF_ROPE = {  # the only values that are supported in rope_parameters
    "beta_fast": 32, "beta_slow": 1, "attention_factor": None, "truncate": True,
    "partial_rotary_factor": 1.0,
}  # fmt: skip
SHAPE = (  # fields of Config that --init sets, and that a checkpoint fixes
    *HF_CONFIG, "mtp", "rope_theta", "rope_factor", "rope_original", "rope_mscale",
    "rope_mscale_all_dim",
)  # fmt: skip
HF_NAMES = {  # part of a name: Hugging Face's
    "token_embedding": "model.embed_tokens", "blocks": "model.layers", "final_norm": "model.norm",
    "head": "lm_head", "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attn": "self_attn", "q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_up": "q_b_proj",
    "kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj",
    "out": "o_proj", "router": "gate", "bias": "e_score_correction_bias",
    "shared": "shared_experts", "down": "down_proj", "merge": "eh_proj",
    "embedding_norm": "enorm", "state_norm": "hnorm", "shared_norm": "shared_head.norm",
}  # fmt: skip

def named_matrices(model, first_expert=0):
    """(name, tensor) of all parameters and balancing biases, with one matrix per expert; experts
    are numbered from first_expert."""
    for name, p in model.named_parameters():
        if is_expert(name):
            for i, matrix in enumerate(p.data, first_expert):
                yield name.replace("experts", f"experts.{i}") + ".weight", matrix
        else:
            yield name, p.data
    for name, buffer in model.named_buffers():
        if name.endswith("router.bias"):
            yield name, buffer

def deepseek_tensors(name, tensor, cfg):
    """{Hugging Face's name: tensor} of one of named_matrices; gate_up becomes two tensors."""
    name = name.replace("mtp.block", "mtp").replace("mtp.final_norm", "mtp.shared_norm")
    names = HF_NAMES | {"mtp": f"model.layers.{cfg.n_layers}"}
    if not cfg.q_rank:
        names["q_up"] = "q_proj"
    key = ".".join(names.get(part, part) for part in name.split("."))
    if "gate_up" not in name:
        return {key: tensor}
    gate, up = tensor.chunk(2)
    return {key.replace("gate_up", "gate_proj"): gate, key.replace("gate_up", "up_proj"): up}

def rotary_rows(name, cfg):
    """Rows of Hugging Face's matrix in our order, whose rotary pairs are (i, i + R/2) instead of
    (2i, 2i + 1); all rows, if it has no rotary ones."""
    pairs = torch.arange(cfg.rope_dim).view(-1, 2).T.flatten()
    if ".kv_down." in name:
        return torch.cat((torch.arange(cfg.kv_rank), cfg.kv_rank + pairs))
    if ".q_up." in name:
        head = torch.cat((torch.arange(cfg.head_dim), cfg.head_dim + pairs))
        return (torch.arange(cfg.n_heads)[:, None] * len(head) + head).flatten()
    return slice(None)

def read_config(path):
    """Config of the DeepseekV3ForCausalLM in a directory. Raises ValueError, with the key's name,
    for a value that would change the result and is not supported."""
    with explain(f"{path} holds no DeepSeek-V3 model", Exception):
        theirs = {"model_type": None, "v_head_dim": 128, "num_key_value_heads": 128}
        theirs |= json.loads((Path(path) / "config.json").read_text())
        theirs |= theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
        fields = {field: theirs.get(key, default) for field, (key, default) in HF_CONFIG.items()}
        cfg = Config(**fields)
        cfg.q_rank = cfg.q_rank or 0  # null
        cfg.seq_len = theirs.get("max_position_embeddings", 4096)
        cfg.rope_theta = theirs.get("rope_theta", 1e4)
        rope_type = theirs.get("rope_type") or theirs.get("type") or "default"
        if rope_type == "yarn":
            cfg.rope_original = theirs.get("original_max_position_embeddings", cfg.seq_len)
            cfg.rope_factor = theirs.get("factor") or cfg.seq_len / cfg.rope_original
            cfg.rope_mscale = theirs.get("mscale") or 0.0
            cfg.rope_mscale_all_dim = theirs.get("mscale_all_dim") or 0.0
        elif rope_type != "default":
            raise ValueError(f"config.json has rope_type {rope_type}, not yarn or default")
        n_mtp = theirs.get("num_nextn_predict_layers", theirs.get("num_mtp_layers")) or 0
        cfg.mtp = n_mtp > 0
        theirs["num_nextn_predict_layers"] = n_mtp
        supported = HF_FIXED | HF_ROPE | {"v_head_dim": cfg.head_dim}
        supported |= {"num_key_value_heads": cfg.n_heads, "num_nextn_predict_layers": int(cfg.mtp)}
        for key, value in supported.items():
            if theirs.get(key, value) != value:
                raise ValueError(f"config.json has {key} {theirs[key]!r}, not {value!r}")
    return cfg

def read_weights(model, cfg, path, first_expert=0):
    """Fill a model, or a rank's part of one, whose experts count from first_expert, from the
    safetensors of a directory, FP8 ones with their block scales. Multi-token prediction stays as it
    is, if the directory has none, as those that DeepseekV3ForCausalLM writes."""
    with explain(f"{path} holds no such DeepSeek-V3 model", Exception):
        tensors = read_hf_tensors(path)
        has_mtp = f"model.layers.{cfg.n_layers}.eh_proj.weight" in tensors
        if cfg.mtp and not has_mtp:
            print(f"{path} has no weights of multi-token prediction: they are newly initialised")
        for name, tensor in named_matrices(model, first_expert):
            if name.startswith("mtp.") and not has_mtp:
                continue
            for key, part in deepseek_tensors(name, tensor, cfg).items():
                value = tensors[key]
                if value.shape != part.shape:
                    raise ValueError(f"{key} is {list(value.shape)}, not {list(part.shape)}")
                if f"{key}_scale_inv" in tensors:  # it is the factor, not its inverse
                    scale = tensors[f"{key}_scale_inv"]
                    scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
                    value = value.float() * scale[: value.shape[0], : value.shape[1]]
                part.copy_(value[rotary_rows(name, cfg)])

def from_hf(path):
    """(model, cfg) from the checkpoint directory of a DeepseekV3ForCausalLM, with multi-token
    prediction as one layer more."""
    cfg = read_config(path)
    model = DeepSeekV3(cfg)
    init_weights(model, cfg)
    read_weights(model, cfg, path)
    return model, cfg

def deepseek_config(cfg):
    """The content of config.json for the model of cfg."""
    config = {key: getattr(cfg, field) for field, (key, _) in HF_CONFIG.items()} | HF_FIXED
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    if cfg.rope_factor > 1:
        rope |= {"rope_type": "yarn", "factor": cfg.rope_factor}
        rope |= {"original_max_position_embeddings": cfg.rope_original}
        rope |= {"mscale": cfg.rope_mscale, "mscale_all_dim": cfg.rope_mscale_all_dim}
    return config | {
        "architectures": ["DeepseekV3ForCausalLM"], "q_lora_rank": cfg.q_rank or None,
        "num_key_value_heads": cfg.n_heads, "v_head_dim": cfg.head_dim, "rope_parameters": rope,
        "num_nextn_predict_layers": int(cfg.mtp), "initializer_range": cfg.init_std,
        "max_position_embeddings": cfg.seq_len,
        "dtype": "bfloat16" if keeps_bf16("", cfg) else "float32",
    }  # fmt: skip

def to_hf(model, cfg, path):
    """Write a model, or the parts of it that ranks have, to the directory path as a
    DeepseekV3ForCausalLM. All ranks call this; rank 0 writes files of about 4 GB, tensor by tensor.
    """
    # Departure: released files repeat embedding and head in the layer of multi-token prediction.
    from safetensors.torch import save_file

    source = named_matrices(model)
    if isinstance(model, Pipeline1F1B):
        source = collect_matrices(model, cfg)
        if dist.get_rank() > 0:
            for _ in source:
                pass  # this rank's part in collecting
            return
    tensors = {}  # of the file that is being filled
    index = {}
    with written_beside(path) as folder:
        for name, tensor in itertools.chain(source, [("", None)]):  # and the end
            if not name or sum(tensor.nbytes for tensor in tensors.values()) > 4e9:
                file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
                save_file(tensors, folder / file, metadata={"format": "pt"})
                index |= dict.fromkeys(tensors, file)
                tensors = {}
            if name:
                for key, part in deepseek_tensors(name, tensor, cfg).items():
                    tensors[key] = torch.empty_like(part, device="cpu")
                    tensors[key][rotary_rows(name, cfg)] = part.cpu()
        (folder / "config.json").write_text(json.dumps(deepseek_config(cfg), indent=2) + "\n")
        text = json.dumps({"metadata": {}, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n")

def collect_matrices(pipe, cfg):
    """named_matrices of the complete model, on all ranks, which must all call this. The last rank
    that has a tensor broadcasts it, one after the other."""
    with torch.device("meta"):
        model = DeepSeekV3(cfg)
    set_dtypes(model, cfg)
    own = dict(named_matrices(pipe.model, pipe.first_expert))
    ranks = [dist.get_rank() if name in own else -1 for name, _ in named_matrices(model)]
    owners = torch.tensor(ranks)
    dist.all_reduce(owners, dist.ReduceOp.MAX)
    for (name, tensor), owner in zip(named_matrices(model), owners.tolist()):
        tensor = own.get(name, torch.empty_like(tensor, device=pipe.device))
        dist.broadcast(tensor, owner)
        yield name, tensor

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
    may_be_0 = "warmup_steps", "n_dense", "q_rank"
    for field in dataclasses.fields(cfg):
        least = int(field.type is int and field.default > 0 and field.name not in may_be_0)
        if field.type in (int, float) and not least <= getattr(cfg, field.name) < math.inf:
            raise ValueError(f"--{field.name} {getattr(cfg, field.name)} is not {least} or more")
    group = cfg.n_experts // cfg.n_groups
    for wrong, message in (
        (cfg.rope_dim % 2 or cfg.rope_theta <= 1, "--rope_dim is odd, or --rope_theta 1 or less"),
        (min(cfg.rope_factor, cfg.long_rope_factor) < 1,
         f"--rope_factor {cfg.rope_factor} or --long_rope_factor is not 1 or more"),
        (cfg.n_dense >= cfg.n_layers,
         f"--n_dense {cfg.n_dense} leaves none of {cfg.n_layers} layers with experts"),
        (cfg.fim > 1, f"--fim {cfg.fim} is above 1"),
        (re.search(r"(^|[x:,])[0-]", cfg.long), f"--long {cfg.long} has a number below 1"),
        (cfg.n_experts % cfg.n_groups,
         f"{cfg.n_groups} groups do not divide {cfg.n_experts} experts"),
        (cfg.groups_kept > cfg.n_groups,
         f"--groups_kept {cfg.groups_kept} is more than {cfg.n_groups} groups"),
        (cfg.top_k > group * cfg.groups_kept,
         f"--top_k {cfg.top_k} is more than {cfg.groups_kept} groups of {group} experts"),
        (cfg.tokenizer and (cfg.eos_id or cfg.fim_ids),
         "--eos_id and --fim_ids are for token shards without --tokenizer"),
        (cfg.n_experts % cfg.ep, f"--ep {cfg.ep} does not divide {cfg.n_experts} experts"),
        (cfg.dim % 8 or cfg.expert_dim % 8, "--dim and --expert_dim are not multiples of 8"),
        (not plan(cfg), "--tokens and --long give not a single update"),
        (cfg.first_batch > cfg.batch_size,
         f"--first_batch {cfg.first_batch} is above --batch_size {cfg.batch_size}"),
        (cfg.pp > cfg.n_layers, f"--pp {cfg.pp} is more than {cfg.n_layers} layers"),
        (cfg.compile and cfg.recompute == "paper", "--recompute paper is not for --compile"),
        (cfg.resume and not cfg.out, "--resume needs --out"),
        (cfg.eval and not cfg.out and not cfg.init, "--eval needs --out or --init"),
        (cfg.write_tokens and ranks > 1, "--write_tokens runs in one process, without torchrun"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)

def batch_problem(cfg):
    """Why the layout cannot hold the batch of the phase cfg; empty if it can."""
    ranks = reading_ranks(cfg)
    n_micro, micro = split_batch(cfg, ranks)
    if n_micro >= cfg.pp and ranks * n_micro * micro == cfg.batch_size:
        return ""
    layout = f"{ranks} data-parallel ranks x {cfg.pp} or more micro-batches of {micro}"
    return f"{cfg.batch_size:,} sequences of {cfg.seq_len:,} are not {layout}"

def last_tokens(tokens, end, cfg):
    """Tokens of the run at which it must stop: `end`, or the end of the last phase that the layout
    can hold, which is printed. Raises ValueError if it cannot hold the phase after `tokens`."""
    start = 0
    for phase_end, phase in plan(cfg):
        if tokens < phase_end and start < end and batch_problem(phase):
            if start <= tokens:
                raise ValueError(batch_problem(phase))
            print(f"this run stops after {start / 1e6:.1f}M tokens: {batch_problem(phase)}")
            print("--resume continues on other ranks, with the same --pp and --ep")
            return start
        start = phase_end
    return end

def dry_run(cfg):
    """Print parameters, FLOPs per token, and for the first and the last batch of pre-training and
    each extension the bytes on the rank that needs most, and whether they fit, or why the layout
    cannot run it; from shapes alone."""
    cfg = fit_layout(cfg, cfg.world_size)
    if not cfg.vocab_size:
        cfg.vocab_size = load_tokenizer(cfg.tokenizer or "bytes", SPECIALS).n_vocab
    check(cfg, cfg.world_size)
    with torch.device("meta"):
        model = DeepSeekV3(cfg)
    total, activated = count_parameters(model)
    mtp = sum(p.numel() for p in model.mtp.parameters()) if model.mtp else 0
    print(f"parameters {total:,} | activated {activated:,} | multi-token prediction {mtp:,}")
    phases = [phase for _, phase in plan(cfg)]
    flops = flops_per_token(phases[0])
    print(f"FLOPs per token {flops:.4g} | 6 N of the activated gives {6 * activated:.4g}")
    n_long = cfg.long.count(":")  # extensions
    for phase in [phases[0], *phases[1:][-1 - n_long :]]:
        if batch_problem(phase):
            print(f"{batch_problem(phase)}: another layout is needed")
            continue
        n_micro, _ = split_batch(phase, reading_ranks(phase))
        memory = memory_per_rank(phase)
        need = sum(memory.values())
        sizes = " | ".join(f"{kind} {size / 2**30:.2f}" for kind, size in memory.items())
        fits = "fits 80 GB" if need < 80e9 else "does not fit 80 GB"
        print(f"{phase.batch_size:,} sequences of {phase.seq_len:,}", end=" | ")
        print(f"{n_micro} micro-batches | {sizes} | sum {need / 2**30:.2f} GiB a rank: {fits}")

def advance(pipe, optimizer, batches, lr, cfg):
    """Update parameters and balancing biases once, from this rank's micro-batches and the cfg of
    current_phase; or not, if the loss or the gradient norm is not finite. Returns main loss, loss
    of multi-token prediction, gradient norm, and expert loads over their mean, [layers + 1, X]: the
    last row is that of multi-token prediction, and dense layers have 0."""
    norm, loss, mtp = pipe.reduce(pipe.run(batches), cfg.clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    finite = math.isfinite(norm) and math.isfinite(loss)
    if finite:
        optimizer.step()
        forget_codes(pipe.model)
    for flat in pipe.flats.values():
        flat.gather()
        flat.gradients.zero_()
    loads = torch.zeros(cfg.n_layers + 1, cfg.n_experts, device=pipe.device)
    return loss, mtp, norm, update_biases(routers(pipe.model), cfg.gamma * finite, loads)

def train(pipe, optimizer, corpus, heldout, state, end, cfg, device):
    """Update the model until `end` tokens of the plan are read; False if a signal ends it."""
    signals = catch_signals()
    reader = device, pipe.data.get_local_rank(), reading_ranks(cfg)
    thread = ThreadPoolExecutor(1)  # reads the next batch during an update
    saved = state["step"]
    n_skipped = 0
    shape = None  # of the batches of the phase

    def read_ahead():  # Config of the next update, and the future of its batch
        phase = current_phase(min(state["position"], end - 1), cfg)
        return phase, thread.submit(read_batch, corpus, state["sequences"], phase, *reader)

    next_cfg, next_batches = read_ahead()
    while True:
        step = state["step"]
        now = next_cfg
        n_tokens = now.batch_size * now.seq_len
        pipe.cfg = now
        if shape != (now.rope_factor, now.batch_size, now.seq_len):
            shape = now.rope_factor, now.batch_size, now.seq_len
            pipe.start_phase(now)
            first_step = step
            pace = None  # seconds per update
            n_micro, micro = split_batch(now, reading_ranks(cfg))
            print(f"YaRN factor {now.rope_factor:g} | tokens per step {n_tokens:,}", end=" = ")
            print(f"{reading_ranks(cfg)} ranks x {n_micro} x {micro} sequences of {now.seq_len:,}")
        steps_left = 0 if cfg.eval else planned_updates(state["position"], end, cfg)
        error = next_batches.exception()  # waits until the batch to come is read
        if step > first_step + 1:  # the first update of a phase may compile and is left out
            seconds = time.perf_counter() - clock
            pace = 0.9 * (pace or seconds) + 0.1 * seconds
        (stop,) = sum_over_ranks(len(signals) + (error is not None))
        ends = steps_left <= 0 or stop
        if cfg.out and step > saved and (ends or (step % cfg.save_every == 0 and not n_skipped)):
            save_checkpoint(cfg.out, pipe.saved, optimizer, state)
            saved = step
        if error:
            raise error
        if stop:
            return False
        if ends or step % cfg.val_every == 0:
            validate(pipe.evaluate, heldout, step, now, *reader)
        if ends:
            return True

        clock = time.perf_counter()
        batches = next_batches.result()
        lr = learning_rate(state["position"], cfg)
        state["sequences"] += now.batch_size
        state["position"] += n_tokens
        next_cfg, next_batches = read_ahead()
        sum_counts(batches, reading_ranks(cfg))
        loss, mtp, norm, loads = advance(pipe, optimizer, batches, lr, now)
        finite = math.isfinite(loss) and math.isfinite(norm)
        state["step"] += 1
        state["tokens"] += finite * n_tokens
        if step == 0 or steps_left == 1 or state["step"] % cfg.log_every == 0:
            bpb = bits_per_byte(loss * batches[0]["n_targets"], batches[0]["n_bytes"])
            row = {"loss": loss, "bpb": bpb, "lr": lr, "grad": norm, "tokens": state["tokens"]}
            if cfg.mtp:
                row["mtp"] = mtp
            row["max_load"] = loads.max().item()
            row |= {"max_loads": loads.amax(1).tolist(), "min_loads": loads.amin(1).tolist()}
            head = f"step {step + 1}/{step + steps_left}"
            tail = progress(state["tokens"], steps_left - 1, pace, now, device)
            log(cfg.out, step + 1, head, row, tail)
        n_skipped = 0 if finite else n_skipped + 1
        if n_skipped:
            print(f"step {step + 1} skipped: its loss or gradient is not finite")
        if n_skipped == 3 or (n_skipped and steps_left == 1):
            raise ValueError(f"no finite gradient in the last {n_skipped} steps to {step + 1}")

def load_documents(cfg):
    """(tokenizer or None, training Corpus, held-out Corpus) of --data; sets vocab_size, eos_id and
    fim_ids of cfg. With --write_tokens, write the data as token shards and return None."""
    files, shards = find_files(cfg.data)
    tokenizer = None
    if cfg.tokenizer or files:
        tokenizer = load_tokenizer(cfg.tokenizer or "bytes", SPECIALS)
        cfg.eos_id = tokenizer.eot_token
        cfg.fim_ids = ",".join(str(tokenizer.encode_single_token(token)) for token in SPECIALS[1:])
    cfg.vocab_size = vocabulary_size(cfg.vocab_size, tokenizer, cfg.init)
    if not cfg.eos_id:
        print("documents have no borders: their packing needs --tokenizer or --eos_id")
    if cfg.fim and not (cfg.eos_id and cfg.fim_ids):
        print("no document is rearranged: this needs --tokenizer, or --eos_id and --fim_ids")
    separator = cfg.eos_id or -1
    documents = tokenize(read_documents(cfg.data, files), tokenizer, separator)
    if cfg.write_tokens and shards:
        raise ValueError("--write_tokens reads text, and --data has token shards")
    if cfg.write_tokens:
        return write_tokens(cfg.write_tokens, documents)
    phases = [phase for _, phase in plan(cfg)]
    length = max(phase.seq_len for phase in phases)
    batch = max(math.ceil(phase.batch_size * phase.seq_len / length) for phase in phases)
    sizes = cfg.vocab_size, batch, length
    return tokenizer, *load_corpora(shards, documents, tokenizer, separator, *sizes)

@record
def main(argv=None):
    """Run the command line: read the data, build or resume the run, train, export and sample."""
    with report_user_errors():
        cfg, given = parse(argv)
        check_directories(cfg.init, cfg.export, cfg.write_tokens)
        if cfg.init:
            theirs = read_config(cfg.init)
            cfg = dataclasses.replace(cfg, **{name: getattr(theirs, name) for name in SHAPE})
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
        if run and "ep" not in given:
            cfg = fit_layout(dataclasses.replace(cfg, ep=run["ep"], dp=0), ranks)
        if run and (run["pp"], run["ep"]) != (cfg.pp, cfg.ep):
            layout = f"--pp {run['pp']} --ep {run['ep']}"
            way = f"--resume {layout} --export DIR, and then --init DIR with another layout"
            raise ValueError(f"{checkpoint} has {layout}: {way}")
        for name in run.keys() & {"tokens", "long"} - given:  # the phases of the run's first start
            setattr(cfg, name, run[name])

        pipe = Pipeline1F1B(cfg, device)
        init_weights(pipe.model, cfg, pipe.first_expert)
        if cfg.init:
            read_weights(pipe.model, cfg, cfg.init, pipe.first_expert)
        pipe.share()
        optimizer = build_optimizer(pipe.flats, cfg)
        budget = plan(cfg)[-1][0]  # tokens of the run, which its first start fixes
        # position: tokens of the plan that are read, those of skipped updates included
        state = {"step": 0, "sequences": 0, "tokens": 0, "position": 0, "budget": budget}
        if checkpoint:
            load_checkpoint(checkpoint, pipe.saved, optimizer, state)
            for flat in pipe.flats.values():
                flat.gather()
        if given & {"steps", "tokens", "long"}:
            state["budget"] = budget
        n_updates = planned_updates(0, state["budget"], cfg)
        if cfg.tokens and cfg.warmup_steps > n_updates // 10:
            cfg.warmup_steps = n_updates // 10
            print(f"the warm-up is cut to {cfg.warmup_steps} updates, a tenth of the run")
        end = last_tokens(state["position"], state["budget"], cfg)
        if cfg.eval:
            cfg.out = ""  # nothing is written
        if cfg.out and dist.get_rank() == 0:
            lock = claim_directory(cfg.out, dataclasses.asdict(cfg) | fixed)  # while the run lives
        with torch.device("meta"):
            total, activated = count_parameters(DeepSeekV3(cfg))
        print(f"torch {torch.__version__} | {device.type} {cfg.precision}", end=" | ")
        print(f"pp {cfg.pp} x dp {cfg.dp} x ep {cfg.ep} | {n_updates:,} updates", end=" | ")
        print(f"parameters {total:,} | activated {activated:,}", end=" | ")
        print(f"FLOPs per token {flops_per_token(cfg):.3g}")
        if not train(pipe, optimizer, corpus, heldout, state, end, cfg, device):
            return print(f"stopped after step {state['step']}")
        now = pipe.cfg
        if cfg.export:
            to_hf(pipe, now, cfg.export)
        if tokenizer and cfg.pp == 1:  # else: --export, then --init and --eval
            ids = tokenizer.encode_ordinary(cfg.prompt)
            ids = ids or get_batch(heldout, 0, 1, now)["tokens"][0, :32].tolist()
            allowed_ids = torch.from_numpy(heldout.token_bytes > 0)
            print(tokenizer.decode(sample(pipe.model, ids, 256, allowed_ids, now)))

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
