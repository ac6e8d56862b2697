"""The Llama 3 Herd of Models (Llama team, 2024, arXiv 2407.21783): pre-training in one file.

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
     torchrun --nnodes=16 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
         llama3.py --preset 8b --tp 8 --tokenizer tokenizer.model --out /shared/8b \\
         --data "0.5:web/*.jsonl,0.25:maths/,0.17:code/,0.08:languages/"
Annealing judges a data set (§3.1.3): this, against the same without new/, by the held-out loss:
     python llama3.py --preset 8b --init half_trained/ --ramp "" --tokens 0 --long_tokens 0 \\
         --anneal_tokens 40e9 --lr 1.5e-4 --warmup_steps 0 --data default/ \\
         --anneal_data "0.3:new/,0.7:default/"
Expect: in about a minute on two CPU cores the demo's held-out bits per byte fall from 8.13 to 2.36
(lzma needs 2.06) through all three stages; so small a model finds next to no needle.
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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor, distribute_tensor

# ---------------------------------------- Config ----------------------------------------

@dataclasses.dataclass
class Config:
    """The run. Every field is a flag of the command line, and its comment is the flag's help."""

    # Model, §3.2, Table 3
    vocab_size: int = 0  # V; 0: the tokenizer's, up to a multiple of 8 for tensor parallelism
    dim: int = 4096  # D, width of the residual stream
    n_layers: int = 32  # blocks
    n_heads: int = 32  # H, query heads
    n_kv_heads: int = 8  # K, key-value heads
    hidden_dim: int = 14336  # F, width of the feed-forward layer
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    qkv_bias: bool = False  # a bias on queries, keys and values, as Qwen2.5 has
    tied: bool = False  # the softmax shares the token embedding
    document_mask: bool = True  # no attention across the documents of a sequence
    # Positions, §3.2; the context extension is released, not in the paper
    rope_theta: float = 500000.0  # base of the rotary frequencies
    long_rope_theta: float = 0.0  # the base from the long-context stage on; 0: rope_theta
    rope_scaling: Literal["none", "pi", "ntk", "yarn", "llama3"] = "none"  # context extension
    rope_factor: float = 8.0  # s, times by which the context is extended
    rope_original: int = 8192  # context before the extension
    rope_from: Literal["initial", "long-context"] = "long-context"  # stage that begins to extend
    # Data, §3.1
    data: str = ""  # WEIGHT:PATH,...;TOKENS;WEIGHT:PATH,...: a mix, and from which token the next
    anneal_data: str = ""  # mix of the annealing stage; empty: the last of data
    tokenizer: str = ""  # bytes, gpt2, cl100k_base, o200k_base, or a rank file; empty: bytes
    bos: bool = True  # begin each document with a token too; Qwen2.5 does not
    # Stages, §3.4
    seq_len: int = 8192  # T of the initial stage, once ramped up
    batch_size: int = 2048  # sequences of one update, over all ranks, at that length
    ramp: str = ""  # LENGTHxSEQUENCES:TOKENS,...: the batches before that, and until which token
    tokens: float = 14.8e12  # of the initial stage
    long_lengths: str = ""  # LENGTH,...: of the long-context stage, at constant tokens per batch
    long_tokens: float = 0.0  # of the long-context stage, the same for each length
    anneal_tokens: float = 0.0  # of the annealing stage, at the last length
    average: int = 10  # checkpoints of the annealing stage that are averaged; 0: none
    steps: int = 0  # updates, at most; 0: as many as the stages have
    # Optimization, §3.4.1
    lr: float = 3e-4  # largest learning rate
    min_lr: float = 3e-6  # where the cosine ends
    warmup_steps: int = 8000  # updates of linear warm-up
    cosine_steps: int = 1200000  # updates at which the cosine ends
    weight_decay: float = 0.1  # decoupled, on matrices and embeddings
    clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    spike: float = 6.0  # standard deviations above the mean loss that send the run back; 0: none
    seed: int = 0  # of weights and data order
    # Parallelism, §3.3.2
    micro_batch: int = 0  # sequences of one forward pass, at most; 0: the share, pp: a part of it
    tp: int = 1  # ranks that share each layer's matrices
    cp: int = 1  # ranks that share each sequence
    pp: int = 1  # ranks that share the layers
    pp_chunks: int = 1  # stages of the pipeline on each rank
    dp: int = 0  # ranks among which data and optimizer are sharded; 0: all that are left
    dp_replicate: int = 1  # copies of the above, with the gradients summed over them
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
    prompt: str = ""  # text that the sample continues; empty: the start of the held-out text
    out: str = ""  # directory for checkpoints, metrics.jsonl, config.json; empty: none are written
    save_every: int = 1000  # updates between checkpoints
    resume: bool = False  # go on from the newest checkpoint in out
    init: str = ""  # Hugging Face checkpoint directory to start from, whose shape and rope count
    export: str = ""  # directory to write the model to as a Hugging Face checkpoint
    write_tokens: str = ""  # directory to write the data to as token shards; then exit

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
SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim")
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
    "1b": SMALL_LLAMA | dict(zip(SHAPE, (2048, 16, 32, 8, 8192))),
    "3b": SMALL_LLAMA | dict(zip(SHAPE, (3072, 28, 24, 8, 8192))),
    # Table 3; the recipes of the smaller ones are "similar" (§3.4).
    "8b": LLAMA | dict(zip(SHAPE, (4096, 32, 32, 8, 14336)), lr=3e-4, min_lr=3e-6),
    "70b": LLAMA | dict(zip(SHAPE, (8192, 80, 64, 8, 28672)), lr=1.5e-4, min_lr=1.5e-6),
    "405b": LLAMA
    | dict(zip(SHAPE, (16384, 126, 128, 8, 53248)), lr=8e-5, min_lr=8e-7, pp_chunks=8),
    # Qwen2.5, Table 1, and the published widths.
    "qwen2_5_0.5b": SMALL_QWEN | dict(zip(SHAPE, (896, 24, 14, 2, 4864)), tied=True),
    "qwen2_5_1.5b": SMALL_QWEN | dict(zip(SHAPE, (1536, 28, 12, 2, 8960)), tied=True),
    "qwen2_5_3b": SMALL_QWEN | dict(zip(SHAPE, (2048, 36, 16, 2, 11008)), tied=True),
    "qwen2_5_7b": LARGE_QWEN | dict(zip(SHAPE, (3584, 28, 28, 4, 18944)), norm_eps=1e-6),
    "qwen2_5_14b": LARGE_QWEN | dict(zip(SHAPE, (5120, 48, 40, 8, 13824))),
    "qwen2_5_32b": LARGE_QWEN | dict(zip(SHAPE, (5120, 64, 40, 8, 27648))),
    "qwen2_5_72b": LARGE_QWEN
    | dict(zip(SHAPE, (8192, 80, 64, 8, 29568)), lr=1.5e-4, min_lr=1.5e-6),
}  # fmt: skip
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"  # tokens around each document of a stream
NAMES = "finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id python_tag image"
RESERVED = [f"reserved_special_token_{i}" for i in range(246)]
SPECIALS = (  # the 256 of Llama 3.1 and later, 128000 ... 128255
    BEGIN, END, *(f"<|{name}|>" for name in (*RESERVED[:2], *NAMES.split(), *RESERVED[2:])),
)  # fmt: skip
PATTERN = (  # how GPT-4 and Llama 3 split text into words, for files of ranks
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

@dataclasses.dataclass
class Phase:
    """A part of a run in which length, batch, mix and positions stay the same."""

    stage: str  # initial, long-context or annealing
    first: int  # the update that it begins with
    end: int  # the update that the next one begins with
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
    plan, done, first = [], 0.0, 0
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
                plan.append(Phase(stage, first, first + steps, dataclasses.replace(cfg, **now)))
            first, done = first + steps, max(cut, done)
    return plan

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
                checkpoint = torch.utils.checkpoint.checkpoint
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

def load_mixtures(cfg, tokenizer):
    """(a Mixture for each of the run's phases, held-out Corpus of its first mix). Each length has
    an order of its own, in which no phase draws a window that another drew, within an epoch."""
    # Undisclosed: whether the longer stages see text of the initial stage again. Here they may.
    plan, corpora, spent, mixtures, last = phases(cfg), {}, {}, [], None
    length = max(phase.cfg.seq_len for phase in plan)
    batch = math.ceil(max(phase.cfg.seq_len * phase.cfg.batch_size for phase in plan) / length)
    common = parse_mix(cfg.data.split(";")[0])
    for mix in (common, *(parse_mix(phase.cfg.data) for phase in plan)):
        for path in (path for path in mix if path not in corpora):
            documents = [] if shard_paths(path) else tokenize(read_documents(path), tokenizer)
            sizes = cfg.vocab_size, math.ceil(batch * mix[path]), length
            corpora[path] = load_corpora(path, documents, tokenizer, *sizes)
    for phase in plan:
        now, mix = phase.cfg, parse_mix(phase.cfg.data)
        if (now.data, now.seq_len) != last:  # else the last phase's mixture goes on
            first, last = 0, (now.data, now.seq_len)
            starts = [spent.get((path, now.seq_len), 0) for path in mix]
        mixtures.append(Mixture(mix, [corpora[path][0] for path in mix], starts, first))
        n = (phase.end - phase.first) * now.batch_size
        spent.update(((path, now.seq_len), i) for path, i in zip(mix, mixtures[-1].spent(n)))
        first += n
    heldout = {path: corpora[path][1] for path in common}
    parts = mix_held_out(common, heldout, batch, length, cfg.val_batches)
    return mixtures, Corpus(parts, tokenizer, cfg.vocab_size, in_order=True)

def get_batch(corpus, first, n, cfg):
    """Sequences first ... first + n - 1 of the phase, whatever the ranks or the moment: tokens,
    targets and (with the mask) documents [n, T]: which document each input belongs to; and the
    counts n_targets and n_bytes (of the targets' text)."""
    # Undisclosed: the packing. Documents between BEGIN and END follow each other, are cut into
    # windows of T + 1 tokens, and no input predicts the first token of the next document.
    windows = np.stack([corpus.window(first + i, cfg.seq_len, cfg.seed) for i in range(n)])
    tokens, targets = windows[:, :-1], windows[:, 1:].copy()
    ends, batch = tokens == corpus.separator, {}
    if cfg.document_mask:
        targets[ends] = -100
        batch["documents"] = torch.from_numpy(np.cumsum(ends, 1) - ends)  # an END is its document's
    scored = targets[targets >= 0]
    counts = {"n_targets": scored.size, "n_bytes": int(corpus.token_bytes[scored].sum())}
    tokens, targets = torch.from_numpy(tokens.copy()), torch.from_numpy(targets)
    return {"tokens": tokens, "targets": targets, **batch, **counts}

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

def clip_gradients(model, loss, cfg, mesh, device):
    """(norm of the whole gradient, loss summed over ranks), after scaling the gradient down to
    cfg.clip. What several ranks hold counts once."""
    whole, copied = [], []  # by tensor parallelism: a part on each rank, the same on all
    for name, p in model.named_parameters():
        if not (name == "head.weight" and cfg.tied):  # the last stage's copy of the embedding
            local = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            (copied if tensor_dimension(name) is None else whole).append(local)
    square, more = (nn.utils.get_total_norm(part).double() ** 2 for part in (whole, copied))
    square, loss = sum_over_ranks(square + more / mesh["tp"].size(), loss, device=device)
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
            block.compile()
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
        return sum(loss.detach() for loss in losses) / self.scale / cfg.tp if losses else 0.0

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

HF_CONFIG = {  # ours: Hugging Face's
    "vocab_size": "vocab_size", "dim": "hidden_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size", "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings",
}  # fmt: skip
HF_NAMES = {
    "token_embedding": "model.embed_tokens", "blocks": "model.layers", "head": "lm_head",
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "final_norm": "model.norm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj", "attn.out": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip
HF_ROPE = {"none": "default", "pi": "linear", "ntk": "default", "yarn": "yarn", "llama3": "llama3"}

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

def read_hf_config(path):
    """Config of the LlamaForCausalLM or Qwen2ForCausalLM in a directory."""
    if not importlib.util.find_spec("safetensors"):
        raise ValueError("--init needs the package safetensors: pip install safetensors")
    try:
        theirs = json.loads((Path(path) / "config.json").read_text())
        cfg = Config(**{ours: theirs[name] for ours, name in HF_CONFIG.items()})
        cfg.qkv_bias = theirs["model_type"] == "qwen2"
        cfg.seq_len = theirs["max_position_embeddings"]
        rope = dict(theirs.get("rope_parameters") or theirs.get("rope_scaling") or {})
        cfg.rope_theta = rope.pop("rope_theta", None) or theirs["rope_theta"]
        kind = rope.pop("type", None) or rope.get("rope_type", "default")
        cfg.rope_scaling = {theirs: ours for ours, theirs in HF_ROPE.items() if ours != "ntk"}[kind]
        cfg.rope_from = "initial" if cfg.rope_scaling != "none" else cfg.rope_from
        cfg.rope_factor = rope.pop("factor", cfg.rope_factor)
        cfg.rope_original = rope.pop("original_max_position_embeddings", None) or cfg.seq_len
        known = dict(  # what this script does, where it is said at all
            model_type=("llama", "qwen2"), head_dim=(cfg.dim // cfg.n_heads,), mlp_bias=(False,),
            hidden_act=("silu",), attention_bias=(False,), use_sliding_window=(False,),
            rope_type=(kind,), low_freq_factor=(1.0,), high_freq_factor=(4.0,), beta_fast=(32.0,),
            beta_slow=(1.0,), truncate=(True,), partial_rotary_factor=(1.0,),
        )  # fmt: skip
        said = {name: theirs[name] for name in known.keys() & theirs.keys()} | rope
        for name, found in said.items():
            if found not in (None, *known.get(name, ())):
                raise ValueError(f"its {name} is {found}")
    except Exception as error:
        raise ValueError(f"{path} holds no Llama or Qwen2 model: {error!r}") from error
    return cfg

def read_hf_weights(model, cfg, path, tp=None):
    """Fills the parameters that this rank has from the safetensors of a directory."""
    from safetensors import SafetensorError, safe_open

    wanted = {hf_name(name, cfg.tied): (name, p) for name, p in model.named_parameters()}
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                for key in wanted.keys() & set(tensors.keys()):
                    (name, p), tensor = wanted.pop(key), tensors.get_tensor(key)
                    if list(tensor.shape) != whole_shape(name, p, tp):
                        raise ValueError(f"{key} in {file} is {list(tensor.shape)}")
                    fill(name, p, tensor, tp)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    if wanted:
        raise ValueError(f"{path} holds no {next(iter(wanted))}")

def from_hf(path):
    """(model, cfg) from the directory of a LlamaForCausalLM or a Qwen2ForCausalLM: config.json,
    *.safetensors."""
    cfg = read_hf_config(path)
    model = Llama3(cfg)
    read_hf_weights(model, cfg, path)
    return model, cfg

def to_hf(model, cfg, path, mesh=None):
    """Writes a model, or on every rank its part of one, to a directory as a LlamaForCausalLM or,
    with qkv_bias, a Qwen2ForCausalLM: a file for each layer, from the stage that has it."""
    from safetensors.torch import save_file

    theta, rope = cfg.rope_theta, {"rope_type": HF_ROPE[cfg.rope_scaling]}
    if cfg.rope_scaling == "ntk":  # a static base, for which Hugging Face has no type
        theta *= cfg.rope_factor ** (cfg.dim // cfg.n_heads / (cfg.dim // cfg.n_heads - 2))
    elif cfg.rope_scaling != "none":
        rope |= dict(factor=cfg.rope_factor, original_max_position_embeddings=cfg.rope_original)
        if cfg.rope_scaling == "llama3":
            rope |= dict(low_freq_factor=1.0, high_freq_factor=4.0)
    kind = ("Qwen2ForCausalLM", "qwen2") if cfg.qkv_bias else ("LlamaForCausalLM", "llama")
    config = {theirs: getattr(cfg, ours) for ours, theirs in HF_CONFIG.items()}
    config |= dict(architectures=[kind[0]], model_type=kind[1], hidden_act="silu", rope_theta=theta)
    config |= dict(rope_parameters=rope | dict(rope_theta=theta), torch_dtype="float32")
    config["max_position_embeddings"] = cfg.seq_len
    if cfg.vocab_size == 128256:
        config |= dict(bos_token_id=128000, eos_token_id=128001)
    tp = mesh["tp"].get_group() if mesh and mesh["tp"].size() > 1 else None
    inner = ("dp_replicate", "dp", "cp", "tp")  # the first of these writes its stage's part
    writes = not mesh or all(mesh[name].get_local_rank() == 0 for name in inner)
    rank = dist.get_rank() if mesh else 0
    if rank == 0:
        Path(path).mkdir(parents=True, exist_ok=True)
        for old in Path(path).glob("*.safetensors*"):
            old.unlink()
        (Path(path) / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        with torch.device("meta"):
            names = [hf_name(name, cfg.tied) for name, _ in Llama3(cfg).named_parameters()]
        index = {"metadata": {}, "weight_map": {name: hf_file(name) for name in names}}
        (Path(path) / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    if mesh:
        dist.barrier()
    parameters = [x for x in model.named_parameters() if not (cfg.tied and x[0] == "head.weight")]
    file_of = lambda parameter: hf_file(hf_name(parameter[0], cfg.tied))  # noqa: E731
    for file, group in itertools.groupby(parameters, file_of):
        tensors = {hf_name(n, cfg.tied): whole_tensor(n, p.data, tp) for n, p in group}
        if writes:
            tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
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

def load_specials(cfg):
    """The tokenizer with Llama 3's special tokens; the two that documents need where it is not a
    file of ranks, and no BEGIN without --bos."""
    # Departure: a document is not cut into blocks of 400,000 characters first, as released, and
    # Qwen2.5's file of ranks is used with Llama's pattern, which takes digits by three.
    special = SPECIALS if os.path.isfile(cfg.tokenizer) else (BEGIN, END)
    return load_tokenizer(cfg.tokenizer or "bytes", special[not cfg.bos :])

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

@torch.compiler.set_stance("force_eager")  # a compiled block would compile for every length
@torch.no_grad()
def sample(model, ids, n, known, cfg):
    """ids and n more, drawn at temperature 0.8 from the softmax over what known [V] allows."""
    model.eval()
    device = model.token_embedding.weight.device
    torch.manual_seed(cfg.seed)
    for _ in range(n):
        tokens = torch.tensor([ids[-cfg.seq_len :]], device=device)  # [1, T]
        logits = model(tokens)[0, -1].masked_fill(~known.to(device), -math.inf)  # [V]
        ids = ids + torch.multinomial((logits / 0.8).softmax(-1), 1).tolist()
    return ids

@torch.no_grad()
def needle_rate(pipeline, heldout, cfg, device):
    """§3.4.2, needle in a haystack: the share of a planted fact's tokens that the model ranks first
    where T tokens of text end with the question. NaN where that does not fit or no tokenizer is."""
    # Undisclosed: the fact. A number of five digits, at depths spread evenly over held-out text.
    tokens, targets = [], []
    for i in range(cfg.batch_size if heldout.tokenizer else 0):
        number = stable_hash(cfg.seed, "needle", i) % 90000 + 10000
        fact, question, answer = (
            heldout.tokenizer.encode_ordinary(text)
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
    pipeline.run(batches)
    (hits,) = sum_over_ranks(pipeline.hits, device=device)
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
    """Raises ValueError for a configuration that cannot run on that many ranks."""
    for field in dataclasses.fields(cfg):
        may_be_0 = field.type is float or field.name in ("warmup_steps", "average")
        low = 0 if field.default == 0 or may_be_0 else 1
        if field.type in (int, float) and not low <= getattr(cfg, field.name) < math.inf:
            raise ValueError(f"--{field.name} {getattr(cfg, field.name)} is not {low} or more")
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
        (cfg.export and not importlib.util.find_spec("safetensors"),
         "--export needs the package safetensors: pip install safetensors"),
        (cfg.write_tokens and ranks > 1, "--write_tokens is for one process, without torchrun"),
        (cfg.write_tokens and (";" in cfg.data or len(parse_mix(cfg.data)) > 1),
         "--write_tokens takes one corpus, not a mix"),
        (cfg.write_tokens and shard_paths(cfg.data),
         "--write_tokens takes text, and --data is token shards"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
    if not phases(cfg):
        raise ValueError("--tokens, --long_tokens and --anneal_tokens give not a single update")
    for phase in phases(cfg):
        if phase.first < cfg.steps or not cfg.steps:
            check_phase(phase)

def check_phase(phase):
    """Raises ValueError for a phase whose batch does not fit the layout."""
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
    for path in filter(None, parse_mix(cfg.data)):
        if not all(map(os.path.exists, list_files(path))):
            raise ValueError(f"--data or --anneal_data: there is no {path}")

def dry_run(cfg):
    """Prints parameters, FLOPs per token, bytes on the rank that needs most, and for each phase its
    activations and the pipeline's bubble, or why the layout cannot run it; from shapes alone."""
    cfg = fit_ranks(cfg, cfg.world_size)
    cfg.vocab_size = cfg.vocab_size or -(-load_specials(cfg).n_vocab // 8) * 8
    check(dataclasses.replace(cfg, steps=1), cfg.world_size)
    plan = phases(cfg)
    with torch.device("meta"):
        total, activated = count_parameters(Llama3(cfg))
    print(f"parameters {total:,} | activated {activated:,}")
    flops = flops_per_token(plan[-1].cfg)
    print(f"FLOPs per token {flops:.4g} in {plan[-1].stage} | 6 N gives {6 * activated:.4g}")
    for kind, size in memory_per_rank(plan[-1].cfg).items():
        if kind != "activations":
            print(f"{kind:12} {size / 2**30:8.3f} GiB on one of {cfg.world_size} ranks")
    for phase in plan:
        now = phase.cfg
        line = f"{phase.stage}, {now.batch_size:,} sequences of {now.seq_len:,}"
        try:
            check_phase(phase)
        except ValueError as error:
            print(f"{error} | another layout is needed")
            continue
        memory, steps = memory_per_rank(now), split_batch(now, data_ranks(now))[0]
        print(
            f"{line} | {phase.end - phase.first:,} updates | {steps} micro-batches | "
            f"bubble {pipeline_bubble(now):.1%} | "
            f"activations {memory['activations'] / 2**30:.3f} GiB | "
            f"sum {sum(memory.values()) / 2**30:.3f} GiB"
        )

def update(pipeline, optimizer, batches, state, cfg, device):
    """One update of the parameters, unless gradient or loss are not finite or the loss is a spike;
    returns the row that log_step wants, and whether it is a spike."""
    loss, now = pipeline.run(batches), pipeline.cfg
    norm, loss = clip_gradients(pipeline.model, loss, cfg, pipeline.mesh, device)
    lr = learning_rate(state["step"], cfg)
    for group in optimizer.param_groups:
        group["lr"] = lr
    state["step"] += 1
    finite = math.isfinite(norm) and math.isfinite(loss)
    spike = finite and is_spike(state, loss, cfg.spike)
    if finite and not spike:
        optimizer.step()
        state["sequences"] += now.batch_size
        state["tokens"] += now.batch_size * now.seq_len
    else:
        why = f"its loss {loss:.4f} is a spike" if spike else "its gradient is not finite"
        print(f"step {state['step']} skipped: {why}", flush=True)
    optimizer.zero_grad()
    state["bad"] = 0 if finite else state["bad"] + 1
    bpb = bits_per_byte(loss * batches[0]["n_targets"], batches[0]["n_bytes"])
    row = {"step": state["step"], "loss": loss, "bpb": bpb, "lr": lr, "grad": norm}
    return {**row, "tokens": state["tokens"]}, spike

def go_back(pipeline, optimizer, state, returns, cfg):
    """Back to the newest checkpoint, and past the data that came after it."""
    # Undisclosed: the recovery; there were few spikes, and no manual intervention (§3.4.1). This is
    # what others describe.
    step, offset = state["step"], state["offset"]
    load_checkpoint(cfg.out, True, cfg.steps, pipeline.saved, optimizer, state)
    if returns == 3:
        raise ValueError(f"three times back to step {state['step']}, and on to step {step}")
    skipped = (step - state["step"]) * pipeline.cfg.batch_size
    state["offset"], state["bad"], state["watched"] = offset + skipped, 0, 0
    print(f"back to step {state['step']}, and past {skipped} sequences", flush=True)

def train_in_stages(pipeline, optimizer, data, state, cfg, device):
    """Updates until cfg.steps, or until SIGTERM or SIGINT; state says how far it came. data is
    (phases, their mixtures, held-out corpus)."""
    rank, ranks, (plan, mixtures, heldout) = pipeline.data_rank, data_ranks(cfg), data
    signals, saved, returns, pace, phase = [], state["step"], 0, 0.0, None
    handlers = {s: signal(s, lambda *_: signals.append(1)) for s in (SIGTERM, SIGINT)}
    while (step := state["step"]) < cfg.steps:
        if phase is None or not phase.first <= step < phase.end:
            phase, mixture = next(pair for pair in zip(plan, mixtures) if step < pair[0].end)
            now = phase.cfg
            pipeline.enter(now)
            announce(phase, mixture)
            state["watched"] *= step > phase.first  # another batch has another loss
        if step % cfg.val_every == 0:
            validate(pipeline.evaluate, heldout, step, now, device, rank, ranks)
        started = time.perf_counter()
        first = (step - phase.first) * now.batch_size + state["offset"]
        batches = next_batches(mixture, first, bool(signals), now, device, rank, ranks)
        if batches is None:
            break
        row, spike = update(pipeline, optimizer, batches, state, cfg, device)
        if phase.stage == "annealing" and pipeline.average:
            update_average(pipeline, row["step"] - phase.first, phase)
        seconds = time.perf_counter() - started
        pace = 0.9 * (pace or seconds) + 0.1 * seconds
        if row["step"] % cfg.log_every == 0 or row["step"] in (1, cfg.steps):
            log_step({**row, "stage": phase.stage}, pace, now, device)
        if (spike or state["bad"] == 3) and saved:
            returns += 1
            go_back(pipeline, optimizer, state, returns, cfg)
            continue
        if state["bad"] == 3:
            raise ValueError(f"three steps to {row['step']} had no finite gradient")
        if row["step"] == phase.end and phase.stage == "long-context":
            rate = needle_rate(pipeline, heldout, now, device)
            print(f"needle {now.seq_len} | {rate:.3f} of the answers' tokens found", flush=True)
        if cfg.out and row["step"] % cfg.save_every == 0:
            save_checkpoint(cfg.out, pipeline.saved, optimizer, state)
            saved, returns = row["step"], 0
    if cfg.out and saved < state["step"]:
        save_checkpoint(cfg.out, pipeline.saved, optimizer, state)
    for signum, handler in handlers.items():
        signal(signum, handler)

def announce(phase, mixture):
    """Prints what the phase is about to do, and how far it is into each corpus."""
    cfg, ranks, rope = phase.cfg, data_ranks(phase.cfg), "unscaled"
    steps, micro = split_batch(cfg, ranks)
    if cfg.rope_scaling != "none":
        rope = f"{cfg.rope_scaling} x {cfg.rope_factor:g}"
    print(f"{phase.stage} to step {phase.end:,} | rope {rope} | tokens per step", end=" ")
    print(f"{cfg.batch_size * cfg.seq_len:,} = {ranks} ranks x {steps} x {micro}", end=" ")
    print(f"sequences of {cfg.seq_len:,}", flush=True)
    corpora = zip(mixture.names, mixture.corpora, mixture.shares, mixture.spent(0))
    for name, corpus, share, spent in corpora if len(mixture.names) > 1 else ():
        epochs = spent / corpus.n_windows(cfg.seq_len)
        print(f"  {share / mixture.block:.1%} {name}, from epoch {epochs:.3f}", flush=True)

def finish(pipeline, data, tokenizer, cfg, device):
    """Puts the average in place of the parameters, where annealing is complete (§3.4.3), validates,
    exports and samples."""
    plan, _, heldout = data
    last, parameters = plan[-1].cfg, list(pipeline.model.named_parameters())
    pipeline.enter(last)
    annealed = plan[-1].stage == "annealing" and cfg.steps == plan[-1].end
    for name, p in parameters if pipeline.average and annealed else ():
        p.data.copy_(pipeline.average[name])
    place = pipeline.data_rank, data_ranks(cfg)
    validate(pipeline.evaluate, heldout, cfg.steps, last, device, *place)
    if cfg.export:
        to_hf(pipeline.model, last, cfg.export, pipeline.mesh)
    with torch.device("meta"):
        small = count_parameters(Llama3(cfg))[0] < 2e9  # fits one rank
    if (model := gather_model(pipeline, last) if tokenizer and small else None) is not None:
        ids = tokenizer.encode_ordinary(cfg.prompt or heldout.text(32).decode(errors="ignore"))
        known = torch.from_numpy(heldout.token_bytes[: cfg.vocab_size] > 0)
        known = F.pad(known, (0, cfg.vocab_size - len(known)))
        print(tokenizer.decode(sample(model, ids, 256, known, last)), flush=True)

@record
def main(argv=None):
    """Reads the command line and the data, builds or resumes the run, trains, exports, samples."""
    with one_line_mistakes():
        cfg = parse(argv)
        if cfg.init:
            theirs, same = read_hf_config(cfg.init), [*HF_CONFIG, "qkv_bias", "rope_theta"]
            if theirs.rope_scaling != "none":  # else the stages may extend what is not yet
                same += ["rope_scaling", "rope_factor", "rope_original", "rope_from"]
            cfg = dataclasses.replace(cfg, **{name: getattr(theirs, name) for name in same})
        if cfg.dry_run:
            return dry_run(cfg)
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        cfg = fit_ranks(cfg, ranks)
        check(cfg, ranks)
        paths = {path for phase in phases(cfg) for path in parse_mix(phase.cfg.data)}
        known = cfg.tokenizer or not all(shard_paths(path) for path in paths)
        tokenizer = load_specials(cfg) if known else None
        if cfg.write_tokens:
            return write_tokens(cfg.write_tokens, tokenize(read_documents(cfg.data), tokenizer))
        if tokenizer:
            cfg.vocab_size = cfg.vocab_size or -(-tokenizer.n_vocab // 8) * 8
            if cfg.vocab_size < tokenizer.n_vocab:
                raise ValueError(f"--vocab_size {cfg.vocab_size} is below {tokenizer.n_vocab}")
            check(cfg, ranks)
        else:
            print("without --tokenizer there are no borders of documents, and no mask")
        device = launch(cfg.timeout)
        for folder in filter(None, (cfg.out, cfg.export)):
            Path(folder).mkdir(parents=True, exist_ok=True)
        cfg.steps = min(cfg.steps or math.inf, phases(cfg)[-1].end)
        mixtures, heldout = load_mixtures(cfg, tokenizer)
        plan = [phase for phase in phases(cfg) if phase.first < cfg.steps]
        data = plan, mixtures, heldout

        pipeline = Pipeline(cfg, make_mesh(cfg, device.type), cfg.anneal_tokens > 0)
        init_weights(pipeline.model, cfg, pipeline.tp)
        if cfg.init:
            read_hf_weights(pipeline.model, cfg, cfg.init, pipeline.tp)
        optimizer = build_optimizer(pipeline.model, cfg)
        state = {"step": 0, "sequences": 0, "tokens": 0, "offset": 0, "seed": cfg.seed}
        state |= {"bad": 0, "watched": 0, "loss_mean": 0.0, "loss_variance": 0.0}
        if cfg.out:
            load_checkpoint(cfg.out, cfg.resume, cfg.steps, pipeline.saved, optimizer, state)
        if cfg.out and dist.get_rank() == 0:
            config = json.dumps(dataclasses.asdict(cfg), indent=2)
            (Path(cfg.out) / "config.json").write_text(config + "\n")
        with torch.device("meta"):
            total, activated = count_parameters(Llama3(cfg))
        print(f"python {sys.version.split()[0]} | torch {torch.__version__} |", end=" ")
        print(f"{device.type} {cfg.precision} | tp {cfg.tp} x cp {cfg.cp} x pp {cfg.pp} x", end=" ")
        print(f"dp {cfg.dp} x dp_replicate {cfg.dp_replicate} | {cfg.steps:,} updates")
        print(f"parameters {total:,} | activated {activated:,} | FLOPs per token", end=" ")
        print(f"{flops_per_token(plan[-1].cfg):.3g}", flush=True)
        train_in_stages(pipeline, optimizer, data, state, cfg, device)
        if state["step"] < cfg.steps:
            return print(f"stopped by a signal after step {state['step']}", flush=True)
        finish(pipeline, data, tokenizer, cfg, device)

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
