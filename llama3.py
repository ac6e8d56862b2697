r"""The Llama 3 Herd of Models (Llama team, 2024, arXiv 2407.21783): pre-training in one file.

New against its parent, gpt3.py: what LLaMA and Llama 2 brought, RMSNorm before each branch, SwiGLU,
rotary positions, no biases; and what Llama 3 changed:
- grouped-query attention with 8 key-value heads in every size (§3.2);
- no attention across the documents of a packed sequence (§3.2); a rotary base of 500,000 (§3.2);
- a vocabulary of 128,000 tokens and 256 special ones (§3.2);
- a batch that grows from 4M to 16M tokens and a sequence that grows once (§3.4.1);
- a long-context stage of ever longer sequences (§3.4.2), and an annealing stage with data of its
  own, whose checkpoints are averaged (§3.4.3);
- four dimensions of parallelism: tensor, context, pipeline, sharded data (§3.3.2).
Qwen2.5 (arXiv 2412.15115) is the presets qwen2_5_*: the same model with a bias on q, k and v.

Map: §3.1.2 Mixture | §3.2 Llama3, Block, attention_mask, SPECIALS | §3.3.2 Pipeline, parallelize,
SumGradient, SumOutput, GatherSequence, context_positions, stage_layers | §3.4 phases,
learning_rate, train_in_stages | §3.4.2 needle_rate, rope_frequencies | §3.4.3 update_average.
"Released" means the code and configurations that Meta published: inference only.
Legend: B batch, T positions, D width, H heads, K key-value heads, E head width, F hidden width,
V vocabulary; under tensor and context parallelism H, K, F, V and T are a rank's own share.
Conventions: rotary pairs are (i, i + E/2), Hugging Face's order, not the released interleaved one;
RMSNorm before each branch; T + 1 tokens make T inputs and T targets, and target -100 is none.

Run: python llama3.py                          # a laptop: the preset demo, all three stages
     torchrun --nproc_per_node=8 llama3.py     # GPUs: the preset small
     torchrun --nnodes=16 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \
         llama3.py --preset 8b --tp 8 --tokenizer tokenizer.model --out /shared/8b \
         --data "0.5:web/,0.25:maths/,0.17:code/,0.08:languages/"
Annealing judges a data set (§3.1.3): this, against the same without new/, by the held-out loss:
     python llama3.py --preset 8b --init half_trained/ --ramp "" --tokens 0 --long_tokens 0 \
         --anneal_tokens 40e9 --lr 1.5e-4 --warmup_steps 0 --data default/ \
         --anneal_data "0.3:new/,0.7:default/"
Expect: in about a minute on two CPU cores the demo's held-out bits per byte fall from 8.13 to 2.34
through all three stages; so small a model finds next to no needle.
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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

# ---------------------------------------- Config ----------------------------------------

@dataclasses.dataclass
class Config:
    """Run configuration: each field is a command-line flag, and its comment is the flag's help."""

    # Model, §3.2, Table 3
    vocab_size: int = 0  # V, entries of the vocabulary; 0: the tokenizer's, to a multiple of 8
    dim: int = 4096  # D, width of the residual stream
    n_layers: int = 32  # number of blocks
    n_heads: int = 32  # H, query heads
    n_kv_heads: int = 8  # K, key-value heads
    hidden_dim: int = 14336  # F, width of the feed-forward layer
    norm_eps: float = 1e-5  # number added to the mean square in RMSNorm
    qkv_bias: bool = False  # a bias on queries, keys and values, as in Qwen2.5
    tied: bool = False  # one matrix for the token embedding and the softmax
    document_mask: bool = True  # no attention across the documents of a sequence
    # Positions, §3.2; the context extension is released, not in the paper
    rope_theta: float = 500000.0  # base of the rotary frequencies
    long_rope_theta: float = 0.0  # base from the long-context stage on; 0: rope_theta
    rope_scaling: Literal["none", "pi", "ntk", "yarn", "llama3"] = "none"  # context extension
    rope_factor: float = 8.0  # factor by which the context is extended
    rope_original: int = 8192  # positions of the context before its extension
    rope_from: Literal["initial", "long-context"] = "long-context"  # first stage with extension
    # Data, §3.1
    data: str = ""  # WEIGHT:PATH,...;TOKENS;WEIGHT:PATH,...: mix, and tokens until the next mix
    anneal_data: str = ""  # mix of the annealing stage; empty: the last mix of --data
    tokenizer: str = ""  # bytes, an encoding of tiktoken or a BPE rank file; empty: bytes
    bos: bool = True  # a token before each document as well as after it; Qwen2.5 has none
    # Stages, §3.4
    seq_len: int = 8192  # T, tokens of a sequence of the initial stage after --ramp
    batch_size: int = 2048  # sequences per update, over all ranks, at a length of --seq_len
    ramp: str = ""  # LENGTHxSEQUENCES:TOKENS,...: first batches, each until so many tokens
    tokens: float = 14.8e12  # tokens of the initial stage
    long_lengths: str = ""  # LENGTH,...: sequences of the long-context stage, at tokens per batch
    long_tokens: float = 0.0  # tokens of the long-context stage, in equal parts for its lengths
    anneal_tokens: float = 0.0  # tokens of the annealing stage, at the last length
    average: int = 10  # number of checkpoints of the annealing stage in the average; 0: none
    steps: int = 0  # maximum number of updates; 0: as many as the stages need
    # Optimization, §3.4.1
    lr: float = 3e-4  # peak learning rate
    min_lr: float = 3e-6  # learning rate at the end of the cosine
    warmup_steps: int = 8000  # updates of linear warm-up, at most a tenth of the stages
    cosine_steps: int = 1200000  # updates until the end of the cosine
    weight_decay: float = 0.1  # decoupled weight decay of matrices and embeddings
    clip: float = 1.0  # maximum norm of the gradient; 0: no clipping
    spike: float = 6.0  # standard deviations above the mean loss that undo updates; 0: none
    seed: int = 0  # seed of the weights and the order of the data
    # Parallelism, §3.3.2
    micro_batch: int = 0  # sequences per forward pass on one rank; 0: as many as the batch allows
    tp: int = 1  # ranks among which each layer's matrices are split
    cp: int = 1  # ranks among which each sequence is split
    pp: int = 1  # ranks among which the layers are split
    pp_chunks: int = 1  # pipeline stages on each rank
    dp: int = 0  # ranks among which data and optimizer are sharded; 0: all that are left
    dp_replicate: int = 1  # copies of the sharded model, with the gradients summed over them
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
    init: str = ""  # Hugging Face checkpoint directory to start from; fixes shape and rope
    export: str = ""  # directory to write a Hugging Face checkpoint to after training
    write_tokens: str = ""  # directory to write the data to as token shards, then exit

# §3.4.1 to §3.4.3; "8M sequences of 8,192" read as tokens, and the "final 40M tokens" of
# annealing, less than three updates, as the 40B of §3.1.3.
# Undisclosed: the lengths between 8K and 128K, and the tokens of each; there are six.
LLAMA = dict(
    vocab_size=128256, ramp="4096x1024:252e6,8192x1024:2.87e12", tokens=14.8e12, long_tokens=8e11,
    long_lengths="16384,32768,49152,65536,98304,131072", anneal_tokens=4e10, rope_scaling="llama3",
    precision="bf16", micro_batch=1, compile=True,
)  # fmt: skip
# Undisclosed: how Qwen2.5 was optimized. The batch, the rates and the stages are Llama's.
QWEN = dict(
    qkv_bias=True, rope_theta=1e4, long_rope_theta=1e6, rope_original=32768, bos=False,
    document_mask=False, seq_len=4096, batch_size=4096, tokens=17.2e12, long_lengths="32768",
    long_tokens=8e11, precision="bf16", micro_batch=1, compile=True,
)  # fmt: skip
SMALL_LLAMA = LLAMA | dict(tied=True, rope_factor=32.0, tokens=8.16e12)
SMALL_QWEN = QWEN | dict(vocab_size=151936, norm_eps=1e-6)
LARGE_QWEN = QWEN | dict(vocab_size=152064)
SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim")
PRESETS = {
    # A CPU, a minute: the ramp, one longer length and the annealing.
    "demo": dict(
        dim=96, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=256, seq_len=64, batch_size=48,
        ramp="32x24:3e4,64x24:2e5", tokens=1.1e6, long_lengths="128", long_tokens=2e5,
        anneal_tokens=3e5, rope_scaling="llama3", rope_factor=2.0, rope_original=64, lr=8e-3,
        min_lr=8e-5, warmup_steps=60, cosine_steps=700, log_every=50,
    ),
    # A GPU of 24 GB or a node of them, minutes: 83M parameters over bytes.
    "small": dict(
        dim=768, n_layers=12, n_heads=12, n_kv_heads=4, hidden_dim=2304, seq_len=1024,
        batch_size=96, ramp="512x48:4e6,1024x48:2e7", tokens=1.4e8, long_lengths="2048,4096",
        long_tokens=3e7, anneal_tokens=3e7, rope_scaling="llama3", rope_factor=4.0,
        rope_original=1024, lr=1e-3, min_lr=1e-5, warmup_steps=200, cosine_steps=2700,
        val_every=500, micro_batch=12, compile=True,
    ),
    # Llama 3.2's published configurations and 9T tokens. Undisclosed: their rates and batches.
    # Departure: from scratch and from text, not pruned from 8b and distilled.
    "1b": SMALL_LLAMA | dict(zip(SIZES, (2048, 16, 32, 8, 8192))),
    "3b": SMALL_LLAMA | dict(zip(SIZES, (3072, 28, 24, 8, 8192))),
    # Table 3; the recipes of the smaller ones are "similar" (§3.4).
    "8b": LLAMA | dict(zip(SIZES, (4096, 32, 32, 8, 14336)), lr=3e-4, min_lr=3e-6),
    "70b": LLAMA | dict(zip(SIZES, (8192, 80, 64, 8, 28672)), lr=1.5e-4, min_lr=1.5e-6),
    "405b": LLAMA
    | dict(zip(SIZES, (16384, 126, 128, 8, 53248)), lr=8e-5, min_lr=8e-7, pp_chunks=8),
    # Qwen2.5, Table 1, and the published widths.
    "qwen2_5_0.5b": SMALL_QWEN | dict(zip(SIZES, (896, 24, 14, 2, 4864)), tied=True),
    "qwen2_5_1.5b": SMALL_QWEN | dict(zip(SIZES, (1536, 28, 12, 2, 8960)), tied=True),
    "qwen2_5_3b": SMALL_QWEN | dict(zip(SIZES, (2048, 36, 16, 2, 11008)), tied=True),
    "qwen2_5_7b": LARGE_QWEN | dict(zip(SIZES, (3584, 28, 28, 4, 18944)), norm_eps=1e-6),
    "qwen2_5_14b": LARGE_QWEN | dict(zip(SIZES, (5120, 48, 40, 8, 13824))),
    "qwen2_5_32b": LARGE_QWEN | dict(zip(SIZES, (5120, 64, 40, 8, 27648))),
    "qwen2_5_72b": LARGE_QWEN
    | dict(zip(SIZES, (8192, 80, 64, 8, 29568)), lr=1.5e-4, min_lr=1.5e-6),
}  # fmt: skip
BEGIN = "<|begin_of_text|>"  # before each document
END = "<|end_of_text|>"  # after it
NAMES = "finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id python_tag image"
RESERVED = [f"reserved_special_token_{i}" for i in range(246)]
SPECIALS = (  # the 256 of Llama 3.1 and later, 128000 ... 128255
    BEGIN, END, *(f"<|{name}|>" for name in (*RESERVED[:2], *NAMES.split(), *RESERVED[2:])),
)  # fmt: skip
PATTERN = (  # how GPT-4 and Llama 3 split text into words, for BPE rank files
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

@dataclasses.dataclass
class Phase:
    """A part of a run in which length, batch, mix and positions stay the same."""

    stage: str  # initial, long-context or annealing
    first: int  # the update that it begins with
    end: int  # the update that the next one begins with
    before: int  # sequences of the phases before it
    cfg: Config  # the run's, with this phase's seq_len, batch_size, data and rope_...

def phases(cfg):
    """§3.4, the run as a list of Phase: the initial stage with its ramp and its mixes, the lengths
    of the long-context stage, annealing. Tokens measure all of them, rounded to updates."""
    # Departure: the paper goes on to the next length once short evaluations are back and needles
    # are found (§3.4.2); here tokens decide, and needle_rate only reports.
    rows, number = [], r"\d+\.?\d*(?:e\+?\d+)?"
    lengths = cfg.long_lengths.split(",") if cfg.long_lengths and cfg.long_tokens else []
    if not all(re.fullmatch(r"[1-9]\d*", length) for length in lengths):
        raise ValueError(f"--long_lengths {cfg.long_lengths} is not LENGTH,...")
    lengths = [int(length) for length in lengths]
    for part in filter(None, cfg.ramp.split(",")):
        if not (found := re.fullmatch(rf"([1-9]\d*)x([1-9]\d*):({number})", part)):
            raise ValueError(f"--ramp: {part} is not LENGTHxSEQUENCES:TOKENS")
        until = min(float(found[3]), cfg.tokens)
        rows.append(("initial", int(found[1]), int(found[2]), until))
    rows.append(("initial", cfg.seq_len, cfg.batch_size, cfg.tokens))
    later = [("long-context", length, cfg.long_tokens / len(lengths)) for length in lengths]
    later += [("annealing", (lengths or [cfg.seq_len])[-1], cfg.anneal_tokens)]
    for stage, length, tokens in later:  # constant tokens per batch, or eights that ranks can share
        sequences = cfg.seq_len * cfg.batch_size // length
        if cfg.seq_len * cfg.batch_size % length and sequences > 8:
            sequences -= sequences % 8
        rows.append((stage, length, sequences, rows[-1][3] + tokens))
    mixes, starts = cfg.data.split(";")[::2], ["0", *cfg.data.split(";")[1::2]]
    starts = [float(start) if re.fullmatch(number, start) else math.nan for start in starts]
    if len(mixes) != len(starts) or not all(a < b for a, b in itertools.pairwise(starts)):
        raise ValueError(f"--data {cfg.data} is not MIX;TOKENS;MIX;TOKENS;MIX..., in order")
    plan, done, first, before = [], 0.0, 0, 0
    for stage, length, sequences, until in rows:
        for cut in [*(start for start in starts if done < start < until), until]:
            steps = max(round((cut - done) / max(length * sequences, 1)), 0)
            now = dict(seq_len=length, batch_size=sequences)
            now["data"] = mixes[bisect.bisect_right(starts, done) - 1]
            if stage == "annealing" and cfg.anneal_data:
                now["data"] = cfg.anneal_data
            extended = stage != "initial" and lengths
            if not extended and cfg.rope_from != "initial":
                now["rope_scaling"] = "none"
            if extended and cfg.long_rope_theta:
                now["rope_theta"] = cfg.long_rope_theta
            if cfg.pp > 1 and not cfg.micro_batch:  # two micro-batches for each rank of a pipeline
                now["micro_batch"] = max(sequences // (data_ranks(cfg) * 2 * cfg.pp), 1)
            if steps:
                changed = dataclasses.replace(cfg, **now)
                plan.append(Phase(stage, first, first + steps, before, changed))
            first, done, before = first + steps, max(cut, done), before + steps * sequences
    return plan

def plan_position(plan, state):
    """(index of the phase, updates of the plan before it and in it) at a state of the run, by the
    sequences read; those of updates that go_back undid do not count."""
    position = state["sequences"] - state["undone"]
    i = bisect.bisect_right([phase.before for phase in plan], position) - 1
    return i, plan[i].first + (position - plan[i].before) / plan[i].cfg.batch_size

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

class GatherSequence(torch.autograd.Function):
    """§3.3.2, context parallelism: all ranks' positions, in the order of the ranks, of dimension 3
    of [2, B, K, T, E]; the backward pass sums the gradient of a rank's own positions."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        parts = x.new_empty(group.size() * len(x), *x.shape[1:])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(parts, x, group=group)
        return torch.cat(parts.chunk(group.size()), 3)

    @staticmethod
    def backward(ctx, gradient):
        parts = torch.cat(gradient.chunk(ctx.group.size(), 3)).float()  # summed in fp32
        own = torch.empty_like(parts[: len(gradient)])
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(own, parts, group=ctx.group)
        return own.type_as(gradient), None

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

def context_positions(length, ranks, rank):
    """§3.3.2: the positions of a context-parallel rank. Of 2 x ranks chunks it holds one from the
    front and its mirror image from the back, so that causal attention costs all ranks the same."""
    if ranks == 1:
        return torch.arange(length)
    chunks = torch.arange(length).chunk(2 * ranks)
    return torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]))

@functools.cache
def flex_kernels():
    """(attention that skips masked blocks, maker of its masks), compiled; they train on GPUs."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention), torch.compile(create_block_mask)

def attention_mask(documents, rows, columns):
    """§3.2, what a query may see: no later position, no other document. From documents [B, T], the
    positions of queries, rows, and of keys, columns: [B, 1, Tq, Tk], or a block mask on a GPU."""
    if documents.is_cuda:
        def visible(b, h, i, j):
            same = documents[b, rows[i]] == documents[b, columns[j]]
            return (columns[j] <= rows[i]) & same

        sizes = len(documents), None, len(rows), len(columns)
        return flex_kernels()[1](visible, *sizes, device=documents.device)
    same = documents[:, rows, None] == documents[:, None, columns]
    return (same & (columns <= rows[:, None]))[:, None]

def attend(q, k, v, mask):
    """softmax(q kᵀ / sqrt(E)) v over what mask shows (None: the past and the present); query head
    j uses key-value head j // (H / K). [B, H, T, E], [B, K, T, E] twice -> [B, H, T, E]."""
    if mask is None or torch.is_tensor(mask):
        settings = dict(is_causal=mask is None, enable_gqa=True)
        return F.scaled_dot_product_attention(q, k, v, mask, **settings)
    from torch.nn.attention.flex_attention import flex_attention

    flex = flex_attention if torch.compiler.is_compiling() else flex_kernels()[0]
    return flex(q, k, v, block_mask=mask, enable_gqa=True)

class GroupedQueryAttention(nn.Module):
    """§3.2, [B, T, D] -> [B, T, D]. Under a tensor-parallel group tp each rank has its own heads,
    under a context-parallel group cp its own positions, and keys and values of all."""

    def __init__(self, dim, n_heads, n_kv_heads, bias=False, tp=None, cp=None):
        super().__init__()
        self.tp, self.cp, self.head_dim = tp, cp, dim // n_heads
        width, kv_width = (n * self.head_dim // group_size(tp) for n in (n_heads, n_kv_heads))
        self.q = Linear(dim, width, bias=bias)
        self.k = Linear(dim, kv_width, bias=bias)
        self.v = Linear(dim, kv_width, bias=bias)
        self.out = Linear(width, dim, bias=False)

    def forward(self, x, rope, mask):
        x = SumGradient.apply(x, self.tp) if self.tp else x
        q, k, v = (  # [B, H, T, E], [B, K, T, E] twice
            linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        q, k = rotate(q, *rope), rotate(k, *rope)
        if self.cp:
            k, v = GatherSequence.apply(torch.stack((k, v)), self.cp)
        x = self.out(attend(q, k, v, mask).transpose(1, 2).flatten(2))  # [B, T, D]
        return SumOutput.apply(x, self.tp) if self.tp else x

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

class SwiGLU(nn.Module):
    """(silu(x W_gate) * x W_up) W_down, [B, T, D] -> [B, T, D]; under tp a rank has a part of F."""

    def __init__(self, dim, hidden_dim, tp=None):
        super().__init__()
        self.tp = tp
        self.gate = Linear(dim, hidden_dim // group_size(tp), bias=False)
        self.up = Linear(dim, hidden_dim // group_size(tp), bias=False)
        self.down = Linear(hidden_dim // group_size(tp), dim, bias=False)

    def forward(self, x):
        x = SumGradient.apply(x, self.tp) if self.tp else x
        x = self.down(GatedSiLU.apply(self.gate(x), self.up(x)))
        return SumOutput.apply(x, self.tp) if self.tp else x

class Block(nn.Module):
    """§3.2, [B, T, D] -> [B, T, D]: attention and feed-forward, each behind a norm and added."""

    # Undisclosed: whether tensor-parallel ranks share the norms' positions (sequence parallelism is
    # cited, not said to be used). They do not: each has all, and their activations are not cut.

    def __init__(self, cfg, tp=None, cp=None):
        super().__init__()
        heads = cfg.n_heads, cfg.n_kv_heads, cfg.qkv_bias
        self.attn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attn = GroupedQueryAttention(cfg.dim, *heads, tp, cp)
        self.mlp_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.mlp = SwiGLU(cfg.dim, cfg.hidden_dim, tp)

    def forward(self, x, rope, mask):
        x = x + self.attn(self.attn_norm(x), rope, mask)
        return x + self.mlp(self.mlp_norm(x))

class Llama3(nn.Module):
    """§3.2, tokens [B, T] -> logits [B, T, V]; or a pipeline's stage of it, which has some layers,
    and takes and gives [B, T, D] where it is not the first or the last."""

    def __init__(self, cfg, layers=None, first=True, last=True, tp=None, cp=None):
        super().__init__()
        self.tp, self.cp, self.recompute = tp, cp, cfg.recompute
        self.dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
        rows = cfg.vocab_size // group_size(tp)
        layers = range(cfg.n_layers) if layers is None else layers
        self.token_embedding = nn.Embedding(rows, cfg.dim) if first else None
        self.blocks = nn.ModuleDict({str(i): Block(cfg, tp, cp) for i in layers})
        self.final_norm = RMSNorm(cfg.dim, cfg.norm_eps) if last else None
        self.head = Linear(cfg.dim, rows, bias=False) if last else None
        if cfg.tied and first and last:
            self.head.weight = self.token_embedding.weight
        self.extend(cfg)

    def extend(self, cfg):
        """Takes the rotary frequencies of cfg, which the long-context stage changes."""
        shape = cfg.dim // cfg.n_heads, cfg.rope_theta
        self.rope = rope_frequencies(*shape, cfg.rope_scaling, cfg.rope_factor, cfg.rope_original)

    def embed(self, tokens):
        """[B, T] -> [B, T, D]; under tensor parallelism a rank looks up its rows of the table."""
        if not self.tp:
            return self.token_embedding(tokens).to(self.dtype)
        rows = self.token_embedding.weight.shape[0]
        tokens = tokens - self.tp.rank() * rows
        mine = (tokens >= 0) & (tokens < rows)
        x = self.token_embedding(tokens.clamp(0, rows - 1)) * mine[..., None]
        return SumOutput.apply(x, self.tp).to(self.dtype)

    def forward(self, x, documents=None):
        if self.token_embedding is not None:
            x = self.embed(x)
        # Undisclosed: whether positions restart with a document. They do not: rotary attention sees
        # differences alone, so that both give the same result.
        ranks, rank = group_size(self.cp), self.cp.rank() if self.cp else 0
        shares = [context_positions(x.shape[1] * ranks, ranks, i) for i in range(ranks)]
        rows, columns = shares[rank].to(x.device), torch.cat(shares).to(x.device)
        frequencies, scale = self.rope
        angles = rows[:, None] * frequencies.to(x.device)  # [T, E/2]
        rope, mask = (angles.cos() * scale, angles.sin() * scale), None
        if self.cp and documents is None:
            documents = torch.zeros_like(columns).expand(len(x), -1)
        if documents is not None:  # [B, T], of all ranks
            mask = attention_mask(documents, rows, columns)
        for block in self.blocks.values():
            if self.recompute == "block" and self.training:
                x = checkpoint(block, x, rope, mask, use_reentrant=False)
            else:
                x = block(x, rope, mask)
        if self.head is None:
            return x
        x = self.final_norm(x)
        x = SumGradient.apply(x, self.tp) if self.tp else x
        return self.head(x).float()

def group_size(group):
    """Ranks of a process group; None is a group of one."""
    return group.size() if group else 1

def init_weights(model, cfg, tp=None):
    """Gains are 1, biases 0, matrices normal. A parameter is drawn from (seed, its name), so that
    every layout starts from the same numbers."""
    # Undisclosed: all of it. N(0, 0.02), and for what is added to the residual stream, 2 L times,
    # 0.02 / sqrt(2 L), as GPT-2 has it.
    for name, p in model.named_parameters():
        whole = whole_shape(name, p, tp)
        if re.search(r"(token_embedding|head|q|k|v|out|gate|up|down)\.weight$", name):
            depth = 2 * cfg.n_layers if re.search(r"(out|down)\.weight$", name) else 1
            key = "token_embedding.weight" if cfg.tied and name == "head.weight" else name
            draw = torch.Generator().manual_seed(stable_hash(cfg.seed, key))
            drawn = torch.empty(whole).normal_(0.0, 0.02 / math.sqrt(depth), generator=draw)
            fill(name, p, drawn, tp)
        elif re.search(r"(q|k|v)\.bias$", name):
            fill(name, p, torch.zeros(whole), tp)
        elif re.search(r"_norm\.weight$", name):
            fill(name, p, torch.ones(whole), tp)
        else:
            raise ValueError(f"no rule initialises {name}")

def count_parameters(model):
    """(total, activated) parameters; a tied softmax counts once, a dense model activates all."""
    total = sum(p.numel() for p in model.parameters())
    return total, total

def flops_per_token(cfg):
    """Training FLOPs per token: 2 per weight of a matrix product forward, twice that backward.
    Attention counts as causal, (T + 1) / 2 keys a query, half of what the full square gives, and
    as within one document."""
    kv_dim = cfg.dim // cfg.n_heads * cfg.n_kv_heads
    weights = cfg.n_layers * (2 * cfg.dim * (cfg.dim + kv_dim) + 3 * cfg.dim * cfg.hidden_dim)
    attention = cfg.n_layers * 2 * cfg.dim * (cfg.seq_len + 1) / 2  # q kᵀ, A v
    return 6 * (weights + attention + cfg.vocab_size * cfg.dim)

# ---------------------------------------- Data ----------------------------------------

class Mixture:
    """Corpora that are drawn by weight, one sequence at a time.

    Of each block of 1,000 sequences every corpus has its exact share, in an order that the seed
    shuffles, so that its own position is arithmetic. starts: windows of each corpus that earlier
    phases spent; first: sequences that earlier phases drew from this mixture.
    """

    def __init__(self, mix, corpora, starts, first):
        self.names = list(mix)
        self.weights = list(mix.values())
        self.corpora = corpora
        self.starts = starts
        self.first = first
        self.block = 1000 if len(mix) > 1 else 1
        sums = itertools.accumulate(self.weights, initial=0.0)
        self.bounds = [round(self.block * part) for part in sums]
        self.shares = [b - a for a, b in itertools.pairwise(self.bounds)]
        self.separator = corpora[0].separator
        self.token_bytes = corpora[0].token_bytes

    def draw(self, index, seed):
        """(corpus, window of it) of sequence `index` of the phase."""
        block, place = divmod(self.first + index, self.block)
        place = permutation(self.block, seed, "mixture", block)[place]
        corpus = bisect.bisect_right(self.bounds, place) - 1
        position = block * self.shares[corpus] + place - self.bounds[corpus]
        return corpus, self.starts[corpus] + position

    def spent(self, n):
        """Windows of each corpus that are spent after n sequences of the phase."""
        blocks = math.ceil((self.first + n) / self.block)
        return [start + blocks * share for start, share in zip(self.starts, self.shares)]

    def n_windows(self, length):
        """Sequences of length + 1 ids until one of the corpora begins another epoch."""
        pairs = zip(self.corpora, self.weights)
        return round(min(corpus.n_windows(length) / weight for corpus, weight in pairs))

    def window(self, index, length, seed):
        """Window `index` of the phase, length + 1 ids."""
        corpus, position = self.draw(index, seed)
        return self.corpora[corpus].window(position, length, seed)

    def fingerprint(self):
        """A number that tells mixtures of other shares or other data apart."""
        return stable_hash(self.shares, [corpus.fingerprint() for corpus in self.corpora])

def parse_mix(text):
    """{path: weight} of WEIGHT:PATH,...; a path alone has weight 1. The weights are divided by
    their sum."""
    mix = {}
    for part in text.split(","):
        weight, path = re.fullmatch(r"(?:([^:/\\]*):)?(.*)", part, re.S).groups()
        with explain(f"{part} is not WEIGHT:PATH", ValueError):
            number = float(weight or 1)
        if not 0 < number < math.inf:
            raise ValueError(f"the weight of {path or 'the library'} is {weight}, not positive")
        mix[path] = mix.get(path, 0.0) + number
    mix = {path: weight / sum(mix.values()) for path, weight in mix.items()}
    if min(mix.values()) < 2e-3:  # two sequences of a block of Mixture
        raise ValueError(f"the weight of {min(mix, key=mix.get)} is too small")
    return mix

def cut_text(text):
    """Pieces of text for tiktoken, which fails on long ones. As released: blocks of 400,000
    characters, cut after each 25,000 in a row that are white space, or that are not."""
    for first in range(0, len(text), 400_000):
        block = text[first : first + 400_000]
        cuts = [0]
        for run in re.finditer(r"(?<!\s)\s{25001,}|(?<!\S)\S{25001,}", block):
            cuts += range(run.start() + 25_000, run.end(), 25_000)
        for begin, end in itertools.pairwise([*cuts, len(block)]):
            yield block[begin:end]

def tokenize_pieces(documents, tokenizer, separator):
    """(name, ids) of each (name, text) with a text: BEGIN, if the tokenizer has it, the ids of the
    text's pieces, and the separator."""
    dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    begin = []
    if BEGIN in tokenizer.special_tokens_set:
        begin = [tokenizer.encode_single_token(BEGIN)]
    for name, text in documents:
        ids = [tokenizer.encode_to_numpy(part, disallowed_special=()) for part in cut_text(text)]
        if text:
            yield name, np.concatenate([begin, *ids, [separator]]).astype(dtype)

def load_mixtures(cfg, sources, tokenizer, separator):
    """(Mixture of each phase of the run, Mixture of the held-out documents of its first mix).

    sources: {path: (text files, token shards)}. Each length has an order of its own, in which no
    phase draws a window that another drew, within an epoch.
    """
    # Undisclosed: whether the longer stages see text of the initial stage again. Here they may.
    plan = phases(cfg)
    length = max(phase.cfg.seq_len for phase in plan)
    batch = math.ceil(max(phase.cfg.seq_len * phase.cfg.batch_size for phase in plan) / length)
    common = parse_mix(cfg.data.split(";")[0])
    corpora = {}
    for mix in (common, *(parse_mix(phase.cfg.data) for phase in plan)):
        for path in (path for path in mix if path not in corpora):
            files, shards = sources[path]
            documents = tokenize_pieces(read_documents(path, files), tokenizer, separator)
            sizes = cfg.vocab_size, math.ceil(batch * mix[path]), length
            with explain(path or "the standard library", ValueError):
                corpora[path] = load_corpora(shards, documents, tokenizer, separator, *sizes)
    mixtures = []
    spent = {}
    last = None
    for phase in plan:
        mix = parse_mix(phase.cfg.data)
        length = phase.cfg.seq_len
        if (phase.cfg.data, length) != last:  # else the mixture of the phase before goes on
            last = phase.cfg.data, length
            first = 0
            starts = [spent.get((path, length), 0) for path in mix]
        mixtures.append(Mixture(mix, [corpora[path][0] for path in mix], starts, first))
        n = (phase.end - phase.first) * phase.cfg.batch_size
        spent.update(((path, length), i) for path, i in zip(mix, mixtures[-1].spent(n)))
        first += n
    heldout = Mixture(common, [corpora[path][1] for path in common], [0] * len(common), 0)
    return mixtures, heldout

def get_batch(corpus, first, n, cfg):
    """Sequences first ... first + n - 1 of the phase: tokens, targets and, with the mask,
    documents [n, T], and their counts.

    A pure function of the seed and the index, so that any number of ranks, any accumulation and
    any resume see the same sequences. documents numbers the document of each input; n_targets
    counts targets, n_bytes the bytes of their text.
    """
    # Undisclosed: the packing. Documents between BEGIN and END follow each other, are cut into
    # windows of T + 1 tokens, and no input predicts the first token of the next document.
    windows = np.stack([corpus.window(first + i, cfg.seq_len, cfg.seed) for i in range(n)])
    tokens = windows[:, :-1].copy()
    targets = windows[:, 1:].copy()
    batch = {}
    if cfg.document_mask:
        ends = tokens == corpus.separator  # an END belongs to its document
        targets[ends] = -100
        batch["documents"] = torch.from_numpy(np.cumsum(ends, 1) - ends)
    scored = targets[targets >= 0]
    batch["n_targets"] = len(scored)
    batch["n_bytes"] = int(corpus.token_bytes[scored].sum())
    return {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)} | batch

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
    """Next-token cross-entropy, with metrics: the sum of the batch's nats, divided by
    batch["n_targets"], the count of the whole global batch; hits counts targets ranked first."""
    logits = model(batch["tokens"], batch.get("documents"))
    nats, hits = token_loss(logits.flatten(0, 1), batch["targets"].flatten(), model.tp)
    return nats / max(batch["n_targets"], 1), {"hits": hits}

# ---------------------------------------- Optimizer ----------------------------------------

def build_optimizer(model, cfg):
    """§3.4.1: AdamW."""
    # Undisclosed: betas, eps, decay, clipping. These, and --clip 1, are Llama 2's, but for eps: it
    # printed 1e-5.
    groups = [
        dict(params=[p for p in model.parameters() if p.ndim > 1], weight_decay=cfg.weight_decay),
        dict(params=[p for p in model.parameters() if p.ndim <= 1], weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)

def learning_rate(step, cfg):
    """§3.4.1: linear warm-up, then a cosine; §3.4.3: linear to 0 while annealing. step counts the
    updates made before."""
    # Undisclosed: the rate of the long-context stage, where the cosine goes on, and from which
    # annealing begins.
    last = phases(cfg)[-1]
    start = min(step, last.first) if last.stage == "annealing" else step
    if start < cfg.warmup_steps:
        rate = cfg.lr * start / cfg.warmup_steps
    else:
        done = (start - cfg.warmup_steps) / max(cfg.cosine_steps - cfg.warmup_steps, 1)
        rate = cfg.min_lr + (cfg.lr - cfg.min_lr) / 2 * (1 + math.cos(math.pi * min(done, 1)))
    return rate * (last.end - step) / (last.end - last.first) if step > start else rate

def clip_gradients(model, loss, cfg, mesh):
    """(norm of the whole gradient, loss summed over ranks), after scaling the gradient down to
    cfg.clip. What several ranks hold counts once."""
    whole, copied = [], []  # by tensor parallelism: a part on each rank, the same on all
    for name, p in model.named_parameters():
        if not (name == "head.weight" and cfg.tied):  # the last stage's copy of the embedding
            local = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            (copied if tensor_dimension(name) is None else whole).append(local)
    square, more = (nn.utils.get_total_norm(part).double() ** 2 for part in (whole, copied))
    square = square + more / mesh["tp"].size()
    # The update waits for the device here alone.
    square, loss = sum_over_ranks(*torch.stack([square, loss]).tolist())
    norm = math.sqrt(square / mesh["dp_replicate"].size()) if square >= 0 else math.nan
    if cfg.clip and norm > cfg.clip:
        for p in model.parameters():
            p.grad.mul_(cfg.clip / (norm + 1e-6))
    return norm, loss

def update_average(pipeline, done, phase):
    """§3.4.3, Polyak averaging: after `done` updates of annealing, at each of cfg.average equally
    spaced ones, the running mean takes in the parameters."""
    # Undisclosed: how many checkpoints and how far apart; here ten, uniformly.
    n, steps = min(phase.cfg.average, phase.end - phase.first), phase.end - phase.first
    if (count := done * n // steps) > (done - 1) * n // steps:
        for name, p in pipeline.model.named_parameters():
            pipeline.average[name].lerp_(p.data, 1 / count)

# ---------------------------------------- Precision ----------------------------------------

# Parameters, their average, gradients between ranks and Adam's moments are fp32 (§3.3.2: fp32
# accumulation over micro-batches and reduce-scatter). Under bf16 the residual stream, matrix
# products and attention are bf16, with or without sharded data parallelism; norm statistics, rotary
# angles, softmax and loss are fp32.

PEAK_FLOPS = {  # dense bf16, by the device's exact name; a device not listed gets no MFU
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA B200": 2250e12,
}  # fmt: skip

# ---------------------------------------- Parallelism ----------------------------------------

def make_mesh(cfg, device_type):
    """§3.3.2: [TP, CP, PP, DP] from the innermost, rank = tp + TP (cp + CP (pp + PP dp))."""
    sizes = dict(dp_replicate=cfg.dp_replicate, dp=cfg.dp, pp=cfg.pp, cp=cfg.cp, tp=cfg.tp)
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

def fit_ranks(cfg, ranks):
    """cfg with dp, where it is 0, as the ranks that are left, and chunks of a pipeline only."""
    others = cfg.tp * cfg.cp * cfg.pp * cfg.dp_replicate
    sizes = (cfg.tp, cfg.cp, cfg.pp, cfg.dp_replicate)
    if min(sizes) < 1 or ranks % others or (cfg.dp and cfg.dp * others != ranks):
        sizes = f"tp {cfg.tp} x cp {cfg.cp} x pp {cfg.pp} x dp_replicate {cfg.dp_replicate}"
        raise ValueError(f"{sizes} x dp {cfg.dp or 'any'} are not {ranks} ranks")
    chunks = cfg.pp_chunks if cfg.pp > 1 else 1
    return dataclasses.replace(cfg, dp=ranks // others, pp_chunks=chunks)

def data_ranks(cfg):
    """Data-parallel ranks: those that read sequences of their own."""
    return max(cfg.dp, 1) * cfg.dp_replicate

def stage_layers(cfg, stage):
    """§3.3.2: the layers of a pipeline stage, one less on the first and on the last, which have
    the embedding and the head."""
    stages = cfg.pp * cfg.pp_chunks
    edges = [round((cfg.n_layers + 2) * i / stages) for i in (stage, stage + 1)]
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
    """§3.3.2, sharded data parallelism of a model on the meta device, or a stage of it, which gets
    its memory here, layer by layer: parameters, gradients and optimizer are cut over the data- and
    context-parallel ranks, gradients reduced in fp32, and parameters not resharded after the
    forward pass."""
    shards = mesh["dp", "cp"]._flatten("dp_cp")
    if cfg.dp_replicate > 1:
        shards = DeviceMesh._concatenate([mesh["dp_replicate"], shards])
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    settings = dict(mesh=shards, mp_policy=policy, reshard_after_forward=False)
    for block in model.blocks.values():
        block.to_empty(device=mesh.device_type)
        if cfg.compile:
            torch.compiler.config.fail_on_recompile_limit_hit = True
            block.compile(dynamic=False)
        if shards.size() > 1:
            fully_shard(block, **settings)
    for part in (model.token_embedding, model.final_norm, model.head):
        if part is not None:
            part.to_empty(device=mesh.device_type)
    if cfg.tied and model.head is not None and model.token_embedding is not None:
        model.head.weight = model.token_embedding.weight
    return fully_shard(model, **settings) if shards.size() > 1 else model

class Pipeline:
    """The part of the model that one rank has, run over micro-batches: one after the other where
    that is all of it, and else by 1F1B, interleaved where a rank has several stages (§3.3.2)."""

    # Departure: consecutive micro-batches of a stage are what the engine's schedule makes of them,
    # about one per pipeline rank, not the paper's free N.

    def __init__(self, cfg, mesh, averages=False):
        """Builds this rank's part, without values yet, and room for its average."""
        self.mesh, self.schedule, self.n_targets, self.hits = mesh, None, 0.0, 0.0
        self.tp, self.cp = (
            mesh[name].get_group() if mesh[name].size() > 1 else None for name in ("tp", "cp")
        )
        copy, shard = mesh["dp_replicate"].get_local_rank(), mesh["dp"].get_local_rank()
        self.data_rank = copy * cfg.dp + shard
        # sharding averages gradients over its ranks, and they are to be summed
        self.scale, self.stages = data_ranks(cfg) * cfg.cp, []
        for i in range(mesh["pp"].get_local_rank(), cfg.pp * cfg.pp_chunks, cfg.pp):
            ends = i == 0, i == cfg.pp * cfg.pp_chunks - 1
            with torch.device("meta"):
                stage = Llama3(cfg, stage_layers(cfg, i), *ends, self.tp, self.cp)
            self.stages.append(parallelize(stage, cfg, mesh))
        self.model = nn.Module()  # all parameters, by their names in the whole model
        self.model.blocks = nn.ModuleDict()
        for stage in self.stages:
            self.model.blocks.update(stage.blocks)
            for name in ("token_embedding", "final_norm", "head"):
                if getattr(stage, name) is not None:
                    setattr(self.model, name, getattr(stage, name))
        # what a checkpoint holds, under a name of the tensor-parallel rank: all have the same names
        part, self.saved, self.average = f"tp{mesh['tp'].get_local_rank()}", nn.Module(), {}
        self.saved.add_module(part, self.model)
        for name, p in self.model.named_parameters() if averages and cfg.average else ():
            self.average[name] = torch.zeros_like(p.data)
            key = f"average/{part}/{name}".replace(".", "/")
            self.saved.register_buffer(key, self.average[name])

    def enter(self, cfg):
        """Prepares for a phase: its positions, and a schedule, whose shapes are fixed."""
        self.cfg, pp = cfg, self.mesh["pp"]
        if cfg.compile:
            torch.compiler.reset()  # drops what was compiled for other lengths
        for stage in self.stages:
            stage.extend(cfg)
        if pp.size() > 1:
            device = next(self.stages[0].parameters()).device
            number, place = cfg.pp * cfg.pp_chunks, dict(device=device, group=pp.get_group())
            stages = [
                PipelineStage(stage, pp.get_local_rank() + i * cfg.pp, number, **place)
                for i, stage in enumerate(self.stages)
            ]
            steps, settings = split_batch(cfg, data_ranks(cfg))[0], dict(scale_grads=False)
            if len(stages) == 1:
                self.schedule = Schedule1F1B(stages[0], steps, self.loss, **settings)
            else:
                self.schedule = ScheduleInterleaved1F1B(stages, steps, self.loss, **settings)

    def loss(self, logits, targets):
        """The objective of a micro-batch as the schedule asks for it, on the last stage."""
        nats, hits = token_loss(logits.flatten(0, 1), targets.flatten(), self.tp)
        self.hits += hits
        return nats / max(self.n_targets, 1) * self.scale

    def run(self, batches):
        """This rank's part of the mean loss over the global batch, to be summed over all ranks;
        where autograd is on, gradients of all of it are added to the parameters."""
        cfg, losses, pp = self.cfg, [], self.mesh["pp"].get_local_rank()
        own = context_positions(cfg.seq_len, cfg.cp, self.mesh["cp"].get_local_rank())
        names = ("tokens", "targets")
        batches = [batch | {name: batch[name][:, own] for name in names} for batch in batches]
        self.n_targets, self.hits = batches[0]["n_targets"], 0.0
        if self.schedule:
            step = self.schedule.step if torch.is_grad_enabled() else self.schedule.eval
            names = [name for name in batches[0] if not name.startswith("n_")]
            whole = {name: torch.cat([batch[name] for batch in batches]) for name in names}
            tokens, last = whole.pop("tokens"), dict(target=whole.pop("targets"), losses=losses)
            first, last = (tokens,) if pp == 0 else (), last if pp == cfg.pp - 1 else {}
            step(*first, **whole, **last, return_outputs=False)
            if cfg.tied and torch.is_grad_enabled():
                self.sum_tied_gradients()
        else:
            for i, batch in enumerate(batches, 1):
                loss, metrics = objective(self.stages[0], batch, cfg)
                self.hits += metrics["hits"]
                losses.append(loss * self.scale)
                if torch.is_grad_enabled():
                    if self.scale > 1:  # ranks meet once, in the last micro-batch
                        self.stages[0].set_requires_gradient_sync(i == len(batches))
                        self.stages[0].set_reshard_after_backward(i == len(batches))
                        self.stages[0].set_is_last_backward(i == len(batches))
                    losses[-1].backward()
        if not torch.is_grad_enabled():  # as the backward pass would
            for module in itertools.chain(*(stage.modules() for stage in self.stages)):
                module.reshard() if isinstance(module, FSDPModule) else None
        self.hits = self.hits / cfg.tp
        total = torch.zeros((), dtype=torch.float64, device=batches[0]["tokens"].device)
        for loss in losses:
            total += loss.detach()
        return total / self.scale / cfg.tp

    @torch.no_grad()
    def evaluate(self, batches):
        """run without gradients."""
        return self.run(batches)

    def sum_tied_gradients(self):
        """First and last stage have a copy each of a tied embedding: both get the sum."""
        rank, group = self.mesh["pp"].get_local_rank(), self.mesh["pp"].get_group()
        ends = {0: self.stages[0].token_embedding, self.cfg.pp - 1: self.stages[-1].head}
        if rank in ends:
            gradient = ends[rank].weight.grad
            gradient = gradient.to_local() if self.scale > 1 else gradient
            other = torch.empty_like(gradient)
            peer = dist.get_global_rank(group, self.cfg.pp - 1 - rank)
            operations = [dist.P2POp(dist.isend, gradient, peer, group)]
            operations.append(dist.P2POp(dist.irecv, other, peer, group))
            for request in dist.batch_isend_irecv(operations):
                request.wait()
            gradient += other

def memory_per_rank(cfg):
    """Bytes on the rank of cfg.world_size that needs most, by kind, as an eager backward pass
    begins in the phase cfg."""
    steps, micro = split_batch(cfg, data_ranks(cfg))
    stages, shards, found = cfg.pp * cfg.pp_chunks, max(cfg.dp, 1) * cfg.cp, []
    # Kept per position and block: inputs of both norms (fp32), their outputs before and after the
    # gain, and, cut by tensor parallelism, q, k, v, the attended values and three of the MLP's.
    size, kv_dim = 2 if cfg.precision == "bf16" else 4, cfg.dim * cfg.n_kv_heads // cfg.n_heads
    cut = 2 * cfg.dim + 2 * kv_dim + 3 * cfg.hidden_dim
    block = 8 * cfg.dim + size * (4 * cfg.dim + cut / cfg.tp)
    head = 4 * cfg.dim + size * 2 * cfg.dim + 4 * cfg.vocab_size / cfg.tp  # norm, loss's softmax
    for rank in range(cfg.pp):
        whole = local = blocks = 0
        for i in range(rank, stages, cfg.pp):
            with torch.device("meta"):
                stage = Llama3(cfg, stage_layers(cfg, i), i == 0, i == stages - 1)
            for name, p in stage.named_parameters():
                shape = [*p.shape, 1]
                if (dim := tensor_dimension(name)) is not None:
                    shape[dim] //= cfg.tp
                whole += math.prod(shape)
                local += -(-shape[0] // shards) * math.prod(shape[1:])
            blocks += len(stage.blocks)
        # stages that have run forward and not backward, of 1F1B and of its interleaved form
        flight = min(cfg.pp - rank, steps)
        if cfg.pp_chunks > 1:
            at_once = steps // max(steps // cfg.pp, 1)  # consecutive micro-batches of a stage
            flight = (cfg.pp_chunks - 1) * at_once + 2 * (cfg.pp - rank) - 1
            flight = min(flight, steps * cfg.pp_chunks) / cfg.pp_chunks
        kept = flight * blocks * block
        if cfg.recompute == "block":  # every block's input, and one block at a time in full
            kept = flight * blocks * size * cfg.dim + block * (blocks > 0)
        kept += head if rank == cfg.pp - 1 else 0
        memory = dict(parameters=4 * local, gradients=4 * local, optimizer=8 * local)
        memory["average"] = 4 * local if cfg.anneal_tokens and cfg.average else 0
        sharded = shards * cfg.dp_replicate > 1  # the whole of the parameters and fp32 gradients
        memory["gathered"] = whole * ((size + 4) * sharded or size * (size == 2))
        memory["activations"] = int(micro * cfg.seq_len // cfg.cp * kept)
        found.append(memory)
    return max(found, key=lambda memory: sum(memory.values()))

def pipeline_bubble(cfg):
    """§3.3.2: idle over working time, (PP - 1) / (V M), of V stages a rank and M micro-batches."""
    return (cfg.pp - 1) / (cfg.pp_chunks * split_batch(cfg, data_ranks(cfg))[0])

# ---------------------------------------- Checkpoint ----------------------------------------

HF_CONFIG = {  # field of Config: (key in config.json, default of LlamaConfig)
    "vocab_size": ("vocab_size", 32000), "dim": ("hidden_size", 4096),
    "n_layers": ("num_hidden_layers", 32), "n_heads": ("num_attention_heads", 32),
    "n_kv_heads": ("num_key_value_heads", None), "hidden_dim": ("intermediate_size", 11008),
    "norm_eps": ("rms_norm_eps", 1e-6), "tied": ("tie_word_embeddings", False),
}  # fmt: skip
HF_QWEN = {  # where the defaults of Qwen2Config differ
    "vocab_size": ("vocab_size", 151936), "hidden_dim": ("intermediate_size", 22016),
    "n_kv_heads": ("num_key_value_heads", 32),
}  # fmt: skip
HF_FIXED = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
}  # fmt: skip
HF_NAMES = {
    "token_embedding": "model.embed_tokens", "blocks": "model.layers", "head": "lm_head",
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "final_norm": "model.norm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj", "attn.out": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip
HF_ROPE = {"none": "default", "pi": "linear", "ntk": "default", "yarn": "yarn", "llama3": "llama3"}
HF_ROPE_FIXED = {
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "truncate": True, "partial_rotary_factor": 1.0,
}  # fmt: skip
SHAPE = (*HF_CONFIG, "qkv_bias")  # fields of Config that a checkpoint fixes

def hf_name(name, tied):
    """Hugging Face's name of our parameter."""
    name = "token_embedding.weight" if tied and name == "head.weight" else name
    for ours, theirs in HF_NAMES.items():
        name = name.replace(ours, theirs)
    return name

def hf_file(name):
    """The file of a checkpoint that has a tensor: one for each layer, and for what is in none."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return f"model-{layer[1].zfill(5) if layer else name.split('.')[-2]}.safetensors"

def read_llama_config(path):
    """Config of the LlamaForCausalLM or Qwen2ForCausalLM in the directory path."""
    with explain(f"{path} holds no Llama or Qwen2 model", Exception):
        theirs = json.loads((Path(path) / "config.json").read_text())
        qwen = theirs["model_type"] == "qwen2"
        fields = HF_CONFIG | (HF_QWEN if qwen else {})
        fixed = HF_FIXED | {"model_type": "qwen2" if qwen else "llama"}
        cfg = Config(**read_hf_config(path, fields, fixed), qkv_bias=qwen)
        cfg.n_kv_heads = cfg.n_kv_heads or cfg.n_heads
        cfg.seq_len = theirs.get("max_position_embeddings", 32768 if qwen else 2048)
        rope = dict(theirs.get("rope_parameters") or theirs.get("rope_scaling") or {})
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        cfg.rope_theta = rope.pop("rope_theta", theirs.get("rope_theta", 10000.0))
        cfg.rope_scaling = {hf: ours for ours, hf in HF_ROPE.items() if ours != "ntk"}[kind]
        if cfg.rope_scaling != "none":
            cfg.rope_from = "initial"
        cfg.rope_factor = rope.pop("factor", cfg.rope_factor)
        cfg.rope_original = rope.pop("original_max_position_embeddings", None) or cfg.seq_len
        rope["head_dim"] = theirs.get("head_dim")
        supported = HF_ROPE_FIXED | {"head_dim": cfg.dim // cfg.n_heads}
        for key, value in rope.items():
            if value not in (None, supported.get(key)):
                raise ValueError(f"config.json has {key} {value!r}")
    return cfg

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

def read_hf_weights(model, cfg, path, tp=None):
    """Fill the parameters that this rank has from the safetensors of the directory path."""
    from safetensors import safe_open

    wanted = {hf_name(name, cfg.tied): (name, p) for name, p in model.named_parameters()}
    with explain(f"{path} holds no weights of this model", Exception):
        files = {"model.safetensors"}
        if not (Path(path) / "model.safetensors").exists():
            index = json.loads((Path(path) / "model.safetensors.index.json").read_text())
            files = {index["weight_map"][key] for key in wanted}
        for file in sorted(files):
            with safe_open(Path(path) / file, "pt") as tensors:
                for key in wanted.keys() & set(tensors.keys()):
                    name, p = wanted.pop(key)
                    tensor = tensors.get_tensor(key)
                    if list(tensor.shape) != whole_shape(name, p, tp):
                        raise ValueError(f"{key} in {file} is {list(tensor.shape)}")
                    fill(name, p, tensor, tp)
        if wanted:
            raise ValueError(f"there is no {next(iter(wanted))}")

def from_hf(path):
    """(model, cfg) from the checkpoint directory of a LlamaForCausalLM or Qwen2ForCausalLM."""
    cfg = read_llama_config(path)
    model = Llama3(cfg)
    read_hf_weights(model, cfg, path)
    return model, cfg

def make_llama_config(cfg):
    """The config.json of a LlamaForCausalLM or, with qkv_bias, of a Qwen2ForCausalLM."""
    theta = cfg.rope_theta
    rope = {"rope_type": HF_ROPE[cfg.rope_scaling]}
    if cfg.rope_scaling == "ntk":  # a static base, for which Hugging Face has no type
        theta *= cfg.rope_factor ** (cfg.dim // cfg.n_heads / (cfg.dim // cfg.n_heads - 2))
    elif cfg.rope_scaling != "none":
        rope["factor"] = cfg.rope_factor
        rope["original_max_position_embeddings"] = cfg.rope_original
        if cfg.rope_scaling == "llama3":
            rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = {key: getattr(cfg, field) for field, (key, _) in HF_CONFIG.items()}
    config["architectures"] = ["Qwen2ForCausalLM" if cfg.qkv_bias else "LlamaForCausalLM"]
    config |= {"model_type": "qwen2" if cfg.qkv_bias else "llama", "hidden_act": "silu"}
    config |= {"rope_theta": theta, "rope_parameters": rope | {"rope_theta": theta}}
    config |= {"max_position_embeddings": cfg.seq_len, "torch_dtype": "float32"}
    if cfg.vocab_size == 128256:
        config |= {"bos_token_id": 128000, "eos_token_id": 128001}
    return config

def to_hf(model, cfg, path, mesh=None):
    """Write model, or on every rank its part of one, to the directory path as a LlamaForCausalLM
    or Qwen2ForCausalLM: a file for each layer, from the pipeline stage that has it."""
    from safetensors.torch import save_file

    files = {}
    for name, p in model.named_parameters():
        if not (cfg.tied and name == "head.weight"):
            key = hf_name(name, cfg.tied)
            files.setdefault(hf_file(key), []).append((key, name, p))
    tp = mesh["tp"].get_group() if mesh and mesh["tp"].size() > 1 else None
    inner = ("dp_replicate", "dp", "cp", "tp")  # the first of these writes its stage's part
    writes = not mesh or all(mesh[name].get_local_rank() == 0 for name in inner)
    rank = dist.get_rank() if mesh else 0
    other = contextlib.nullcontext(Path(f"{Path(path)}.tmp"))  # which rank 0 makes
    with other if rank else written_beside(path) as folder:
        if mesh:
            dist.barrier()
        for file, group in files.items():
            tensors = {key: whole_tensor(name, p.data, tp) for key, name, p in group}
            if writes:
                tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
                save_file(tensors, folder / file, metadata={"format": "pt"})
        if rank == 0:
            (folder / "config.json").write_text(json.dumps(make_llama_config(cfg), indent=2) + "\n")
            with torch.device("meta"):
                names = [hf_name(name, cfg.tied) for name, _ in Llama3(cfg).named_parameters()]
            index = {"metadata": {}, "weight_map": {name: hf_file(name) for name in names}}
            text = json.dumps(index, indent=2) + "\n"
            (folder / "model.safetensors.index.json").write_text(text)
        if mesh:
            dist.barrier()

@contextlib.contextmanager
def written_beside(path):
    """A temporary directory, which becomes the new or empty directory path when the block ends."""
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
    if resume or restarts:
        print(f"continuing from {path}" if path else f"no checkpoint in {out}: starting a run")
    return path, run

def claim_directory(out, config):
    """Write config.json to the directory out. Returns a lock, which the process holds while it
    lives; ValueError if another process holds it."""
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

def load_specials(cfg):
    """(tokenizer, id after each document): Llama 3's special tokens for a BPE rank file, and the
    first eight of them for another tokenizer; without --bos they begin with END."""
    # Departure: Qwen2.5's rank file is used with Llama's pattern, which takes digits by three.
    specials = SPECIALS if cfg.bos else SPECIALS[1:]
    if not os.path.isfile(cfg.tokenizer):
        specials = specials[:8]
    tokenizer = load_tokenizer(cfg.tokenizer or "bytes", specials)
    if "<|endoftext|>" in tokenizer.special_tokens_set:  # of tiktoken's own encodings
        return tokenizer, tokenizer.eot_token
    return tokenizer, tokenizer.encode_single_token(END)

def find_sources(cfg):
    """({path: (text files, token shards)} of all mixes, tokenizer or None, id after each document,
    -1 if unknown); sets cfg.vocab_size."""
    mixes = cfg.data.split(";")[::2]
    if cfg.anneal_data:
        mixes.append(cfg.anneal_data)
    paths = dict.fromkeys(path for mix in mixes for path in parse_mix(mix))
    sources = {path: find_files(path) for path in paths}
    tokenizer = None
    separator = -1
    if cfg.tokenizer or any(files for files, _ in sources.values()):
        tokenizer, separator = load_specials(cfg)
        cfg.vocab_size = cfg.vocab_size or 8 * math.ceil(tokenizer.n_vocab / 8)
        if cfg.vocab_size < tokenizer.n_vocab:
            raise ValueError(f"--vocab_size {cfg.vocab_size} is below {tokenizer.n_vocab} ids")
    else:
        print("without --tokenizer there are no borders of documents, and no mask")
    cfg.vocab_size = vocabulary_size(cfg.vocab_size, tokenizer, cfg.init)
    return sources, tokenizer, separator

def gather_model(pipeline, cfg):
    """The whole model on rank 0 and None on the others, however it is laid out; all ranks call."""
    if dist.get_world_size() == 1:
        return pipeline.stages[0]
    pp, parameters = pipeline.mesh["pp"], pipeline.model.named_parameters()
    tensors = {name: whole_tensor(name, p.data, pipeline.tp).cpu() for name, p in parameters}
    stages = [None] * pp.size() if pp.get_local_rank() == 0 else None
    dist.gather_object(tensors, stages, dist.get_global_rank(pp.get_group(), 0), pp.get_group())
    if dist.get_rank() > 0:
        return None
    model = Llama3(cfg)
    model.load_state_dict({k: v for stage in stages for k, v in stage.items()}, strict=not cfg.tied)
    return model.to(pipeline.stages[0].token_embedding.weight.device)

def sample(model, ids, n, allowed_ids, cfg):
    """ids and n more, drawn at temperature 0.8 among allowed_ids [V] (boolean)."""
    device = model.token_embedding.weight.device
    torch.manual_seed(stable_hash(cfg.seed, "sample"))
    with evaluation_mode(model, cfg.compile):
        for _ in range(n):
            tokens = torch.tensor([ids[-cfg.seq_len :]], device=device)  # [1, T]
            logits = model(tokens)[0, -1].cpu()  # [V]
            p = (logits / 0.8).masked_fill(~allowed_ids, -math.inf).softmax(-1)
            ids = ids + torch.multinomial(p, 1).tolist()
    return ids

def needle_rate(pipeline, heldout, tokenizer, cfg, device):
    """§3.4.2, needle in a haystack: the share of a planted fact's tokens that the model ranks first
    where T tokens of text end with the question. NaN where that does not fit or no tokenizer is."""
    # Undisclosed: the fact. A number of five digits, at depths spread evenly over held-out text.
    tokens = []
    targets = []
    for i in range(cfg.batch_size if tokenizer else 0):
        number = stable_hash(cfg.seed, "needle", i) % 90000 + 10000
        fact, question, answer = (
            tokenizer.encode_ordinary(text)
            for text in (f"\nkey={number}\n", "\nkey=", str(number))
        )
        window = heldout.window(i, cfg.seq_len, cfg.seed)
        depth = (len(window) - len(fact + question + answer)) * i // cfg.batch_size
        if depth < 0:
            return math.nan
        window[depth : depth + len(fact)] = fact
        window[-len(question + answer) :] = question + answer
        tokens.append(window[:-1])
        asked = np.arange(cfg.seq_len) >= cfg.seq_len - len(answer)
        targets.append(np.where(asked, window[1:], -100))
    if not tokens:
        return math.nan
    steps, micro = split_batch(cfg, data_ranks(cfg))
    batches = []
    for i in range(pipeline.data_rank * steps, (pipeline.data_rank + 1) * steps):
        part = (np.stack(rows[i * micro : (i + 1) * micro]) for rows in (tokens, targets))
        batch = dict(zip(("tokens", "targets"), (torch.from_numpy(x).to(device) for x in part)))
        batch["documents"] = torch.zeros_like(batch["tokens"])
        batches.append(batch | {"n_targets": sum((row >= 0).sum() for row in targets)})
    pipeline.evaluate(batches)
    (hits,) = sum_over_ranks(pipeline.hits)
    return hits / batches[0]["n_targets"]

def is_spike(state, loss, limit):
    """Whether loss is `limit` standard deviations above its running mean, over some 50 updates,
    which it joins: a level that lasts is soon no spike."""
    n, mean, variance = state["watched"], state["loss_mean"], state["loss_variance"]
    spike = bool(limit) and n >= 20 and loss > mean + limit * math.sqrt(variance)
    rate = max(1 / (n + 1), 0.02)
    state["loss_mean"] = mean + rate * (loss - mean)
    state["loss_variance"] = (1 - rate) * (variance + rate * (loss - mean) ** 2)
    state["watched"] = n + 1
    return spike

def check(cfg, ranks):
    """Raise ValueError for a configuration that cannot run on that many ranks."""
    for field in dataclasses.fields(cfg):
        least = int(field.type is int and field.default > 0)
        if field.name in ("warmup_steps", "average"):
            least = 0
        if field.type in (int, float) and not least <= getattr(cfg, field.name) < math.inf:
            raise ValueError(f"--{field.name} {getattr(cfg, field.name)} is not {least} or more")
    stages = cfg.pp * cfg.pp_chunks
    for wrong, message in (
        (cfg.dim % (2 * cfg.n_heads) or cfg.dim < 4 * cfg.n_heads,
         f"{cfg.n_heads} heads do not divide the width {cfg.dim} into even parts of 4 or more"),
        (cfg.rope_theta <= 1, f"--rope_theta {cfg.rope_theta} is not above 1"),
        (cfg.n_heads % cfg.n_kv_heads,
         f"{cfg.n_kv_heads} key-value heads do not divide {cfg.n_heads} heads"),
        (cfg.n_kv_heads % cfg.tp,
         f"--tp {cfg.tp} does not divide {cfg.n_kv_heads} key-value heads"),
        (cfg.hidden_dim % cfg.tp, f"--tp {cfg.tp} does not divide --hidden_dim {cfg.hidden_dim}"),
        (cfg.rope_factor < 1, f"--rope_factor {cfg.rope_factor} is not 1 or more"),
        (cfg.vocab_size % cfg.tp, f"--tp {cfg.tp} does not divide --vocab_size {cfg.vocab_size}"),
        (stages > cfg.n_layers + 2,
         f"{cfg.n_layers} layers, embedding and head are fewer than {stages} stages"),
        (cfg.resume and not cfg.out, "--resume needs --out"),
        (cfg.eval and not cfg.out and not cfg.init, "--eval needs --out or --init"),
        (cfg.write_tokens and ranks > 1, "--write_tokens runs in one process, without torchrun"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
    if not phases(cfg):
        raise ValueError("--tokens, --long_tokens and --anneal_tokens give not a single update")
    for phase in phases(cfg):
        if phase.first < cfg.steps or not cfg.steps:
            check_phase(phase)

def check_phase(phase):
    """Raise ValueError for a phase whose batch does not fit the layout."""
    cfg = phase.cfg
    where = f"{phase.stage}, {cfg.batch_size} sequences of {cfg.seq_len}"
    steps, micro = split_batch(cfg, data_ranks(cfg))
    rounds = max(1, steps // cfg.pp)
    for wrong, message in (
        (data_ranks(cfg) * steps * micro != cfg.batch_size or not cfg.batch_size,
         f"not {data_ranks(cfg)} data-parallel ranks x micro-batches of {micro}"),
        (cfg.cp > 1 and cfg.seq_len % (2 * cfg.cp),
         f"--cp {cfg.cp} needs a multiple of {2 * cfg.cp}"),
        (cfg.pp > 1 and cfg.pp_chunks == 1 and steps < cfg.pp,
         f"{steps} micro-batches are fewer than --pp {cfg.pp}: see --micro_batch, --pp_chunks"),
        (cfg.pp_chunks > 1 and steps % rounds,
         f"{steps} micro-batches are not {rounds} equal rounds"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(f"{where}: {message}")

def dry_run(cfg):
    """Print parameters, FLOPs per token, bytes on the rank that needs most, and for each phase its
    activations and the pipeline's bubble, or why the layout cannot run it; from shapes alone."""
    cfg = fit_ranks(cfg, cfg.world_size)
    cfg.vocab_size = cfg.vocab_size or 8 * math.ceil(load_specials(cfg)[0].n_vocab / 8)
    check(dataclasses.replace(cfg, steps=1), cfg.world_size)
    plan = phases(cfg)
    with torch.device("meta"):
        total, activated = count_parameters(Llama3(cfg))
    print(f"parameters {total:,} | activated {activated:,}")
    flops = flops_per_token(plan[-1].cfg)
    print(f"FLOPs per token {flops:.4g} in {plan[-1].stage} | 6 N gives {6 * activated:.4g}")
    print_memory(memory_per_rank(plan[-1].cfg))
    for phase in plan:
        now = phase.cfg
        line = f"{phase.stage}, {now.batch_size:,} sequences of {now.seq_len:,}"
        try:
            check_phase(phase)
        except ValueError as error:
            print(f"{error} | another layout is needed")
            continue
        memory = memory_per_rank(now)
        steps, _ = split_batch(now, data_ranks(now))
        print(
            f"{line} | {phase.end - phase.first:,} updates | {steps} micro-batches | "
            f"bubble {pipeline_bubble(now):.1%} | "
            f"activations {memory['activations'] / 2**30:.3f} GiB | "
            f"sum {sum(memory.values()) / 2**30:.3f} GiB"
        )

def only_text(sources):
    """(name, text) of each document of the one corpus in --data, which must be text."""
    texts = [(path, files) for path, (files, _) in sources.items() if files]
    if len(sources) > 1 or not texts:
        raise ValueError("--write_tokens takes one corpus, not a mix, and text, not token shards")
    return read_documents(*texts[0])

class BatchReader:
    """Reads batches in a thread, each by the mixture and the batch size of its phase."""

    def __init__(self, plan, mixtures, *place):
        self.plan = plan
        self.mixtures = mixtures
        self.place = place
        self.thread = ThreadPoolExecutor(1)
        self.key = None

    def start(self, state):
        """Future of the batch at a state of the run, which is not read again if it is the last."""
        i, _ = plan_position(self.plan, state)
        cfg = self.plan[i].cfg
        key = state["sequences"], cfg.batch_size, i
        if key != self.key:
            self.key = key
            first = state["sequences"] - self.plan[i].before
            work = read_batch, self.mixtures[i], first, cfg, *self.place
            self.future = self.thread.submit(*work)
        return self.future

def update_unless_spike(pipeline, optimizer, batches, done, state, cfg):
    """One update from this rank's micro-batches, after `done` of the plan; returns the row for
    log, and whether its loss is a spike. Skips the update if it is, or if loss or gradient
    are not finite, which is the same on all ranks."""
    now = pipeline.cfg
    loss = pipeline.run(batches)
    norm, loss = clip_gradients(pipeline.model, loss, cfg, pipeline.mesh)
    lr = learning_rate(done, cfg)
    for group in optimizer.param_groups:
        group["lr"] = lr
    finite = math.isfinite(norm) and math.isfinite(loss)
    spike = finite and is_spike(state, loss, cfg.spike)
    if finite and not spike:
        optimizer.step()
        state["tokens"] += now.batch_size * now.seq_len
    else:
        why = f"its loss {loss:.4f} is a spike" if spike else "its loss or gradient is not finite"
        print(f"step {state['step'] + 1} skipped: {why}")
    optimizer.zero_grad()
    state["step"] += 1
    state["sequences"] += now.batch_size
    state["n_skipped"] = 0 if finite else state["n_skipped"] + 1
    bpb = bits_per_byte(loss * batches[0]["n_targets"], batches[0]["n_bytes"])
    row = {"loss": loss, "bpb": bpb, "lr": lr, "grad": norm, "tokens": state["tokens"]}
    return row, spike

def go_back(pipeline, optimizer, state, path, n_returns):
    """Undo the updates since the checkpoint at path, and go on with the data that follows theirs.
    Raises ValueError if that was done three times without a new checkpoint."""
    # Undisclosed: the recovery; there were few spikes, and no manual intervention (§3.4.1). This is
    # what others describe.
    if n_returns == 3:
        raise ValueError(f"three times back to {path}, and on to step {state['step']}")
    kept = {"step": state["step"], "sequences": state["sequences"], "watched": 0}
    load_checkpoint(path, pipeline.saved, optimizer, state)
    undone = kept["sequences"] - state["sequences"]
    state.update(kept, undone=state["undone"] + undone)
    print(f"back to the weights of {path.name}, and past {undone} sequences")

def train_in_stages(pipeline, optimizer, data, state, cfg, device):
    """Update the model until the phases or cfg.steps are over; False if a signal ends it. data is
    (phases, their mixtures, held-out Mixture, tokenizer)."""
    plan, mixtures, heldout, tokenizer = data
    place = device, pipeline.data_rank, data_ranks(cfg)
    signals = catch_signals()
    reader = BatchReader(plan, mixtures, *place)
    ahead = reader.start(state)
    saved = state["step"]
    clock = time.perf_counter()
    n_returns = 0
    phase = None
    while True:
        step = state["step"]
        i, done = plan_position(plan, state)
        steps_left = math.ceil(cfg.steps - done)
        if phase is not plan[i]:
            phase = plan[i]
            set_phase(pipeline, phase, mixtures[i])
            first_step = step
            pace = None  # seconds per update
            state["watched"] *= done >= phase.first + 1  # another batch has another loss
        error = ahead.exception()  # waits until that batch is read
        if step > first_step + 1:  # the first update may compile and is left out
            seconds = time.perf_counter() - clock
            pace = 0.9 * (pace or seconds) + 0.1 * seconds
        (stop,) = sum_over_ranks(len(signals) + (error is not None))
        end = steps_left <= 0 or stop
        due = end or step % cfg.save_every == 0
        if cfg.out and step > saved and not state["n_skipped"] and due:
            save_checkpoint(cfg.out, pipeline.saved, optimizer, state)
            saved = step
            n_returns = 0
        if error:
            raise error
        if stop:
            return False
        if not end and step % cfg.val_every == 0:
            validate(pipeline.evaluate, heldout, step, phase.cfg, *place)
        if end:
            return True

        clock = time.perf_counter()
        batches = ahead.result()
        ahead = reader.start(state | {"sequences": state["sequences"] + phase.cfg.batch_size})
        sum_counts(batches, data_ranks(cfg))
        row, spike = update_unless_spike(pipeline, optimizer, batches, done, state, cfg)
        if phase.stage == "annealing" and pipeline.average:
            update_average(pipeline, done + 1 - phase.first, phase)
        if step == 0 or steps_left == 1 or state["step"] % cfg.log_every == 0:
            head = f"step {step + 1}/{step + steps_left} | {phase.stage}"
            tail = progress(state["tokens"], steps_left - 1, pace, phase.cfg, device)
            log(cfg.out, step + 1, head, row, tail)
        if (spike or state["n_skipped"] == 3) and saved:
            n_returns += 1
            go_back(pipeline, optimizer, state, Path(cfg.out, f"step_{saved:09d}"), n_returns)
            ahead = reader.start(state)
        elif state["n_skipped"] == 3 or (state["n_skipped"] and steps_left == 1):
            skipped = f"the last {state['n_skipped']} steps to {step + 1}"
            raise ValueError(f"no finite gradient in {skipped}")
        elif phase.stage == "long-context" and done + 1 >= phase.end:
            rate = needle_rate(pipeline, heldout, tokenizer, phase.cfg, device)
            print(f"needle {phase.cfg.seq_len} | {rate:.3f} of the answers' tokens found")

def set_phase(pipeline, phase, mixture):
    """Set the pipeline to a phase; print what is about to happen, and how far into each corpus."""
    pipeline.enter(phase.cfg)
    cfg = phase.cfg
    ranks = data_ranks(cfg)
    steps, micro = split_batch(cfg, ranks)
    rope = "unscaled"
    if cfg.rope_scaling != "none":
        rope = f"{cfg.rope_scaling} x {cfg.rope_factor:g}"
    print(f"{phase.stage} to step {phase.end:,} | rope {rope} | tokens per step", end=" ")
    print(f"{cfg.batch_size * cfg.seq_len:,} = {ranks} ranks x {steps} x {micro}", end=" ")
    print(f"sequences of {cfg.seq_len:,}")
    if len(mixture.names) > 1:
        corpora = zip(mixture.names, mixture.corpora, mixture.shares, mixture.spent(0))
        for name, corpus, share, spent in corpora:
            epochs = spent / corpus.n_windows(cfg.seq_len)
            print(f"  {share / mixture.block:.1%} {name}, from epoch {epochs:.3f}")

def finish(pipeline, data, state, cfg, device):
    """Put the average in place of the parameters, if annealing is complete (§3.4.3); validate,
    export and sample."""
    plan, _, heldout, tokenizer = data
    now = pipeline.cfg
    _, done = plan_position(plan, state)
    if plan[-1].stage == "annealing" and done >= plan[-1].end:
        parameters = dict(pipeline.model.named_parameters())
        for name, average in pipeline.average.items():
            parameters[name].data.copy_(average)
    place = device, pipeline.data_rank, data_ranks(cfg)
    validate(pipeline.evaluate, heldout, state["step"], now, *place)
    if cfg.export:
        to_hf(pipeline.model, now, cfg.export, pipeline.mesh)
    with torch.device("meta"):
        small = count_parameters(Llama3(cfg))[0] < 2e9  # fits one rank
    model = gather_model(pipeline, now) if tokenizer and small else None
    if model is not None:
        ids = get_batch(heldout, 0, 1, now)["tokens"][0, :32].tolist()
        if cfg.prompt:
            ids = tokenizer.encode_ordinary(cfg.prompt)
        allowed_ids = torch.from_numpy(heldout.token_bytes > 0)
        print(tokenizer.decode(sample(model, ids, 256, allowed_ids, now)))

def resume_plan(cfg, given, ranks):
    """(path of the newest checkpoint or None, config.json of its run). A run that is continued has
    the stages of its first start, but for those that are given anew."""
    fixed = {name: getattr(cfg, name) for name in (*SHAPE, "tp", "pp")}
    if not cfg.eval:
        fixed["seed"] = cfg.seed
    path, run = newest_checkpoint(cfg.out, cfg.resume or cfg.eval, fixed)
    if cfg.eval and not path and not cfg.init:
        raise ValueError(f"--eval: {cfg.out} has no checkpoint")
    for name in ("tokens", "long_tokens", "anneal_tokens", "steps"):
        if run and name not in given:
            setattr(cfg, name, run[name])
    check(cfg, ranks)
    tenth = phases(cfg)[-1].end // 10
    if cfg.warmup_steps > tenth:
        cfg.warmup_steps = tenth
        print(f"the warm-up is cut to {tenth} updates, a tenth of the stages")
    return path, run

@record
def main(argv=None):
    """Run the command line: read the data, build or resume the run, train, export and sample."""
    with report_user_errors():
        cfg, given = parse(argv)
        check_directories(cfg.init, cfg.export, cfg.write_tokens)
        if cfg.init:
            theirs = read_llama_config(cfg.init)
            same = [*SHAPE, "rope_theta"]
            if theirs.rope_scaling != "none":  # else the stages may extend what is not yet
                same += ["rope_scaling", "rope_factor", "rope_original", "rope_from"]
            cfg = dataclasses.replace(cfg, **{name: getattr(theirs, name) for name in same})
        if cfg.dry_run:
            return dry_run(cfg)
        device = init_distributed(cfg.timeout)
        ranks = dist.get_world_size()
        cfg = fit_ranks(cfg, ranks)
        check(cfg, ranks)
        sources, tokenizer, separator = find_sources(cfg)
        if cfg.write_tokens:
            documents = tokenize_pieces(only_text(sources), tokenizer, separator)
            return write_tokens(cfg.write_tokens, documents)
        path, run = resume_plan(cfg, given, ranks)
        mixtures, heldout = load_mixtures(cfg, sources, tokenizer, separator)
        plan = [phase for phase in phases(cfg) if phase.first < (cfg.steps or math.inf)]
        data = plan, mixtures, heldout, tokenizer

        pipeline = Pipeline(cfg, make_mesh(cfg, device.type), cfg.anneal_tokens > 0)
        init_weights(pipeline.model, cfg, pipeline.tp)
        if cfg.init:
            read_hf_weights(pipeline.model, cfg, cfg.init, pipeline.tp)
        optimizer = build_optimizer(pipeline.model, cfg)
        state = {"step": 0, "sequences": 0, "undone": 0, "tokens": 0, "n_skipped": 0}
        state |= {"watched": 0, "loss_mean": 0.0, "loss_variance": 0.0}
        if path:
            load_checkpoint(path, pipeline.saved, optimizer, state)
        fingerprints = [mixture.fingerprint() for mixture in mixtures]
        i, done = plan_position(plan, state)
        n_begun = i + (done > plan[i].first)  # phases
        theirs = run.get("data_fingerprint", [])[:n_begun]
        if theirs != fingerprints[: len(theirs)] and not cfg.eval:
            raise ValueError(f"{path} has another data_fingerprint than --data or --anneal_data")
        if cfg.eval:
            cfg.out = ""  # nothing is written
        if cfg.out:
            run = dataclasses.asdict(cfg) | {"data_fingerprint": fingerprints}
            lock = claim_directory(cfg.out, run)  # held while the run lives
        with torch.device("meta"):
            total, activated = count_parameters(Llama3(cfg))
        print(f"torch {torch.__version__} | {device.type} {cfg.precision} | tp {cfg.tp} x", end=" ")
        print(f"cp {cfg.cp} x pp {cfg.pp} x dp {cfg.dp} x dp_replicate {cfg.dp_replicate}")
        print(f"parameters {total:,} | activated {activated:,} | FLOPs per token", end=" ")
        cfg.steps = min(cfg.steps or math.inf, plan[-1].end)
        print(f"{flops_per_token(plan[-1].cfg):.3g} | {cfg.steps:,} updates")
        if cfg.eval:
            cfg.steps = 0
        if not train_in_stages(pipeline, optimizer, data, state, cfg, device):
            return print(f"stopped after step {state['step']}")
        finish(pipeline, data, state, cfg, device)

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
    store = shared_store(rank) if world_size > 1 else dist.HashStore()
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

def log(out, step, head, row, tail):
    """Print head, the numbers of row and tail, which has the tokens; append step and row to
    metrics.jsonl in the directory out, if any, with null for numbers that are not finite."""
    formats = {"bpb": ".3f", "val_bpb": ".3f", "lr": ".2e", "grad": ".2f"}
    fields = [head]
    for name, value in row.items():
        if name != "tokens":
            fields.append(f"{name.removeprefix('val_')} {value:{formats.get(name, '.4f')}}")
    print(" | ".join(fields + tail).replace("nan", "n/a"))
    if out and dist.get_rank() == 0:
        row = {k: None if str(v) in ("nan", "inf", "-inf") else v for k, v in row.items()}
        with open(Path(out) / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step} | row) + "\n")

def progress(tokens, steps_left, pace, cfg, device):
    """Fields of a log line: tokens so far and, if pace, the seconds per update, is known,
    throughput, MFU, memory and time left."""
    fields = [f"tokens {tokens / 1e6:.1f}M"]
    if not pace:
        return fields
    speed = cfg.batch_size * cfg.seq_len / pace
    fields.append(f"{speed / 1e3:.1f}k tok/s")
    if device.type == "cuda":
        peak = PEAK_FLOPS.get(torch.cuda.get_device_name(device))
        if peak and cfg.precision == "bf16":
            fields.append(f"mfu {speed * flops_per_token(cfg) / peak / dist.get_world_size():.1%}")
        fields.append(f"mem {torch.cuda.max_memory_allocated(device) / 2**30:.1f}G")
    return [*fields, f"eta {timedelta(seconds=round(steps_left * pace))}"]

def print_memory(memory):
    """Print bytes per rank, by kind, and their sum."""
    for kind, n_bytes in [*memory.items(), ("sum", sum(memory.values()))]:
        print(f"{kind:12} {n_bytes / 2**30:8.3f} GiB per rank")

def check_directories(init, export, write_tokens):
    """Raise ValueError for directories to write that are not empty, or without safetensors."""
    for folder in (export, write_tokens):
        if folder and os.path.isdir(folder) and os.listdir(folder):
            raise ValueError(f"{folder} is not empty")
    if init or export:
        with explain("--init and --export need: pip install safetensors", ImportError):
            import safetensors  # noqa: F401

def bits_per_byte(nats, n_bytes):
    """nats over n_bytes of text in bits per byte; NaN, printed as n/a, if n_bytes is unknown."""
    return nats / math.log(2) / n_bytes if n_bytes else math.nan

def stable_hash(*key):
    """64 bits that depend on the key alone: the seed of all that is drawn."""
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
        """Ids first ... first + n - 1, int64 [n]; ValueError for an id that is not below V."""
        pieces = []
        first += self.start
        while n > 0:
            i = np.searchsorted(self.ends, first, side="right")
            name, part = self.parts[i]
            begin = first - (self.ends[i] - len(part))
            ids = part[begin : begin + n].astype(np.int64)
            unknown = (ids >= len(self.token_bytes)) & (ids != self.separator)
            if unknown.any():
                where = f"{name}, position {begin + unknown.argmax()}"
                raise ValueError(f"{where}: token id {ids[unknown][0]} is not in the vocabulary")
            pieces.append(ids)
            first += len(ids)
            n -= len(ids)
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

    Held out are the shards with "val" in their names, or documents by a hash of their names; if
    these are less than a batch, the last 5 % of the ids, but at least a batch.
    """
    train = [(path, open_shard(path)) for path in shards if "val" not in path.name]
    heldout = [(path, open_shard(path)) for path in shards if "val" in path.name]
    if not shards:
        documents = sorted(documents, key=lambda document: stable_hash(document[0]))
        train = [document for document in documents if not is_held_out(document[0])]
        heldout = [document for document in documents if is_held_out(document[0])]
    n_train = sum(len(ids) for name, ids in train)
    total = sum(len(ids) for name, ids in train + heldout)
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
    files = [root]
    seen = {root.resolve(), *root.resolve().parents}  # a link to one of these would not end
    for folder, folders, names in os.walk(root, followlinks=True):
        targets = {name: Path(folder, name).resolve() for name in set(folders) - skipped}
        folders[:] = [name for name in targets if targets[name] not in seen]
        seen.update(targets.values())
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
    .jsonl file, a JSON object with a string "text", named by its text."""
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
    """Ids of a token shard, in place and without a file descriptor: .npy of uint16 or uint32, or
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
