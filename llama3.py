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
Left out: the filters of the data (§3.1.1), the scaling laws (§3.2.1) and post-training.

Map: §3.1.2 DataMix | §3.2 Llama3, Block, attention_mask, SPECIALS | §3.3.2 parallelize, Pipeline,
split_matrices, split_sequence, keep_stage, stage_layers | §3.4 phases, learning_rate, train |
§3.4.2 needle_loss | §3.4.3 update_average. "Released" means the code and configurations that Meta
published, which are of inference: rope_frequencies (the scaling of RoPE is not in the paper),
cut_text, RMSNorm.
Legend: B batch, T positions, D width, H heads, K key-value heads, E head width, F hidden width,
V vocabulary; under tensor and context parallelism H, K, F, V and T are a rank's own share.
Conventions: rotary pairs are (i, i + E/2), Hugging Face's order, not the released interleaved one;
RMSNorm before each branch; T + 1 tokens make T inputs and T targets, and target -100 is none.

Run: python llama3.py                          # a laptop: the preset demo, all three stages
     torchrun --nproc_per_node=8 llama3.py     # GPUs: the preset small
     torchrun --nnodes=16 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \
         llama3.py --preset 8b --tp 8 --recompute block --tokenizer tokenizer.model \
         --data "0.5:web/,0.25:maths/,0.17:code/,0.08:languages/" --out /shared/8b --resume
Plans of the paper's 405B, at 8,192 positions and from 16,384 on (Table 4): 59 GiB per rank; or 117
with the preset's eight pipeline stages per rank: PyTorch gives each a buffer per micro-batch.
     python llama3.py --dry_run --preset 405b --tp 8 --pp 16 --pp_chunks 1 --recompute block \
         --world_size 16384
     python llama3.py --dry_run --preset 405b --tp 8 --cp 16 --pp 16 --pp_chunks 1 \
         --recompute block --world_size 16384
The run stops before a phase that its layout cannot hold; the same command with --resume and another
--dp or --cp goes on. Annealing judges a data set (§3.1.3): this, against the same without new/:
     torchrun --nproc_per_node=8 llama3.py --preset 8b --tp 8 --init half_trained/ \
         --tokenizer tokenizer.model --ramp "" --tokens 0 --long_tokens 0 --anneal_tokens 40e9 \
         --lr 1.5e-4 --warmup_steps 0 --data default/ --anneal_data "0.3:new/,0.7:default/"
Expect: in about a minute on two CPU cores the demo's held-out bits per byte fall from 8.13 to 2.24
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
from fractions import Fraction
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
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

# ---------------------------------------- Config ----------------------------------------

@dataclasses.dataclass
class Config:
    """Run configuration: each field is a command-line flag, and its comment is the flag's help."""

    # Model, §3.2, Table 3
    vocab_size: int = 0  # V, vocabulary size; 0: the tokenizer's, rounded up to a multiple of 8
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
    rope_scaling: Literal["none", "pi", "ntk", "yarn", "llama3"] = "none"  # change of frequencies
    rope_factor: float = 8.0  # factor by which the context is extended
    rope_original: int = 8192  # positions of the context before its extension
    rope_from: Literal["initial", "long-context"] = "long-context"  # first stage that has it
    # Data, §3.1
    data: str = ""  # mix [WEIGHT:]PATH,... of text or shards; ";TOKENS;MIX": another from TOKENS on
    anneal_data: str = ""  # mix of the annealing stage; empty: the last mix of --data
    tokenizer: str = ""  # bytes, an encoding of tiktoken or a BPE rank file; empty: bytes
    bos: bool = True  # a token before each document as well as after it; Qwen2.5 has none
    # Stages, §3.4
    seq_len: int = 8192  # T, sequence length of the initial stage after --ramp
    batch_size: int = 2048  # sequences per update over all ranks, at the length --seq_len
    ramp: str = ""  # LENGTHxSEQUENCES:TOKENS,...: first batches, each up to TOKENS of the run
    tokens: float = 14.8e12  # tokens of the initial stage, --ramp included
    long_lengths: str = ""  # LENGTH,...: lengths of the long-context stage; same tokens per batch
    long_tokens: float = 0.0  # tokens of the long-context stage, split equally among its lengths
    anneal_tokens: float = 0.0  # tokens of the annealing stage, at the last length
    average: int = 10  # number of checkpoints of the annealing stage in the average; 0: none
    steps: int = 0  # maximum number of updates; 0: as many as the stages need
    # Optimization, §3.4.1
    lr: float = 3e-4  # peak learning rate
    min_lr: float = 3e-6  # learning rate at the end of the cosine
    warmup_steps: int = 8000  # updates of linear warm-up, at most a tenth of all stages
    cosine_steps: int = 1200000  # updates until the end of the cosine
    weight_decay: float = 0.1  # decoupled weight decay of matrices and embeddings
    clip: float = 1.0  # maximum norm of the gradient; 0: no clipping
    spike: float = 6.0  # standard deviations above the mean loss at which to undo updates; 0: never
    seed: int = 0  # seed of the weights and the order of the data
    # Parallelism, §3.3.2
    micro_batch: int = 0  # sequences per forward pass on one rank; 0: as many as the batch allows
    tp: int = 1  # ranks among which each layer's matrices are split
    cp: int = 1  # ranks among which each sequence is split
    pp: int = 1  # ranks among which the layers are split
    pp_chunks: int = 1  # pipeline stages on each rank
    dp: int = 0  # ranks among which data, model and optimizer are sharded; 0: all that are left
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
    save_every: int = 1000  # updates between checkpoints; each phase begins with one, too
    resume: bool = False  # continue from the newest checkpoint in --out, if there is one
    eval: bool = False  # validate and sample what --init or --out holds, without training
    init: str = ""  # Hugging Face checkpoint directory to start from; sets shape and positions
    export: str = ""  # directory to write a Hugging Face checkpoint to after training
    write_tokens: str = ""  # directory to write the data to as token shards, then exit

# §3.4: 15.6T tokens, of which the long-context stage takes 0.8T, and annealing after them; "8M
# sequences of 8,192" are read as 8M tokens.
# Departure: annealing takes the 40B tokens of §3.1.3; the "final 40M" are less than three updates.
# Undisclosed: the lengths between 8K and 128K, and the tokens of each; there are six.
# Undisclosed: the rotary frequencies at these lengths; here the released ones.
LLAMA = dict(
    vocab_size=128256, ramp="4096x1024:252e6,8192x1024:2.87e12", tokens=14.8e12, long_tokens=8e11,
    long_lengths="16384,32768,49152,65536,98304,131072", anneal_tokens=4e10, rope_scaling="llama3",
    precision="bf16", micro_batch=1, compile=True,
)  # fmt: skip
# Qwen2.5 §3: 18T tokens at 4,096 positions, 32,768 at the end with another rotary base.
# Undisclosed: how it was optimized; rates and tokens per batch are Llama's, without its ramp and
# its annealing. Of the tokens, the second phase takes 800B, as in Llama 3.
# Undisclosed: a mask between documents, and a token before each; here neither.
QWEN = dict(
    qkv_bias=True, rope_theta=1e4, long_rope_theta=1e6, rope_original=32768, bos=False,
    document_mask=False, seq_len=4096, batch_size=4096, tokens=17.2e12, long_lengths="32768",
    long_tokens=8e11, precision="bf16", micro_batch=1, compile=True,
)  # fmt: skip
SMALL_LLAMA = LLAMA | dict(tied=True, rope_factor=32.0, tokens=8.16e12, cosine_steps=770000)
SMALL_QWEN = QWEN | dict(vocab_size=151936, norm_eps=1e-6)
LARGE_QWEN = QWEN | dict(vocab_size=152064)
SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim")
PRESETS = {
    # A CPU, a minute: the ramp, one longer length and the annealing.
    "demo": dict(
        dim=96, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=256, seq_len=64, batch_size=48,
        ramp="32x24:3e4,64x24:2e5", tokens=1.1e6, long_lengths="128", long_tokens=2e5,
        anneal_tokens=3e5, rope_scaling="llama3", rope_factor=2.0, rope_original=64, lr=4e-3,
        min_lr=4e-5, warmup_steps=60, cosine_steps=700, log_every=50,
    ),
    # A GPU of 24 GB or a node of them, minutes: 83M parameters over bytes.
    "small": dict(
        dim=768, n_layers=12, n_heads=12, n_kv_heads=4, hidden_dim=2304, seq_len=1024,
        batch_size=96, ramp="512x48:4e6,1024x48:2e7", tokens=1.4e8, long_lengths="2048,4096",
        long_tokens=3e7, anneal_tokens=3e7, rope_scaling="llama3", rope_factor=4.0,
        rope_original=1024, lr=1e-3, min_lr=1e-5, warmup_steps=200, cosine_steps=2700,
        val_every=500, micro_batch=12, compile=True,
    ),
    # Llama 3.2's published configurations and 9T tokens, annealing included.
    # Undisclosed: their rates and batches. The cosine is as much longer than the run as the 405B's.
    # Departure: from scratch and from text, not pruned from 8b and distilled.
    "1b": SMALL_LLAMA | dict(zip(SIZES, (2048, 16, 32, 8, 8192))),
    "3b": SMALL_LLAMA | dict(zip(SIZES, (3072, 28, 24, 8, 8192))),
    # Table 3 has the peak rates; the recipes of the smaller ones are "similar" (§3.4).
    # Undisclosed: in what. Here the 405B's batches, tokens and cosine, to 1 % of the peak.
    "8b": LLAMA | dict(zip(SIZES, (4096, 32, 32, 8, 14336)), lr=3e-4, min_lr=3e-6),
    "70b": LLAMA | dict(zip(SIZES, (8192, 80, 64, 8, 28672)), lr=1.5e-4, min_lr=1.5e-6),
    # Undisclosed: stages per pipeline rank. 126 layers, embedding and head make 16 x 8 (§3.3.2).
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
RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(246)]
SPECIALS = (  # the 256 of Llama 3.1 and later, 128000 ... 128255
    BEGIN, END, *RESERVED[:2], "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>", *RESERVED[2:],
)  # fmt: skip
PATTERN = (  # how GPT-4 and Llama 3 split text into words, for BPE rank files
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

@dataclasses.dataclass
class Phase:
    """A part of a run in which length, batch, mix and rotary frequencies stay the same."""

    stage: str  # initial, long-context or annealing
    begin: int  # tokens of the run before it
    end: int  # tokens of the run at its end
    size: int  # tokens per update
    cfg: Config  # the run's, with this phase's seq_len, batch_size, data and rope_...

def parse_stages(cfg):
    """(stage, length, sequences per update, tokens of the run at its end) of each part of --ramp,
    the rest of the initial stage, each of --long_lengths, and annealing."""
    rows = []
    end = 0.0  # of a part of the ramp
    for part in filter(None, cfg.ramp.split(",")):
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*):(\d+\.?\d*(?:[eE]\+?\d+)?)", part)
        if not match or float(match[3]) <= end:
            raise ValueError(f"--ramp: {part} is not LENGTHxSEQUENCES:TOKENS, or is out of order")
        end = float(match[3])
        rows.append(("initial", int(match[1]), int(match[2]), min(end, cfg.tokens)))
    rows.append(("initial", cfg.seq_len, cfg.batch_size, cfg.tokens))
    if not re.fullmatch(r"([1-9]\d*(,|$))*", cfg.long_lengths):
        raise ValueError(f"--long_lengths {cfg.long_lengths} is not LENGTH,...")
    lengths = [int(part) for part in cfg.long_lengths.split(",") if part and cfg.long_tokens]
    later = [("long-context", length, cfg.long_tokens / len(lengths)) for length in lengths]
    later.append(("annealing", [cfg.seq_len, *lengths][-1], cfg.anneal_tokens))
    end = cfg.tokens
    for stage, length, tokens in later:
        # Departure: an update has as many tokens as before (Table 4), or fewer if the ranks cannot
        # share that many equally.
        sequences = max(cfg.seq_len * cfg.batch_size // length, 1)
        unit = max(cfg.dp, 1) * max(cfg.micro_batch, 1)
        if sequences > unit * cfg.pp:
            unit *= cfg.pp
        sequences = sequences - sequences % unit or sequences
        end += tokens
        rows.append((stage, length, sequences, end))
    return rows

def phases(cfg):
    """§3.4, the run as a list of Phase: the initial stage with its ramp and its mixes, the lengths
    of the long-context stage, annealing. All end at a number of tokens, rounded to updates."""
    # Departure: the paper goes on to the next length once short evaluations are back and needles
    # are found (§3.4.2); here tokens decide, and needle_loss only reports.
    mixes = cfg.data.split(";")[::2]
    with explain(f"--data {cfg.data} is not MIX;TOKENS;MIX;TOKENS;MIX...", ValueError):
        starts = [0.0, *map(float, cfg.data.split(";")[1::2])]  # tokens at which each mix begins
    if len(mixes) != len(starts) or sorted(set(starts)) != starts:
        raise ValueError(f"--data {cfg.data} is not MIX;TOKENS;MIX;TOKENS;MIX..., in order")
    plan = []
    begin = 0  # tokens
    for stage, length, sequences, end in parse_stages(cfg):
        changes = {"seq_len": length, "batch_size": sequences}
        is_long = stage != "initial" and length > cfg.seq_len
        if not is_long and cfg.rope_from != "initial":
            changes["rope_scaling"] = "none"
        if is_long and cfg.long_rope_theta:
            changes["rope_theta"] = cfg.long_rope_theta
        if cfg.pp > 1 and not cfg.micro_batch:  # two micro-batches for each rank of a pipeline
            changes["micro_batch"] = max(sequences // (max(cfg.dp, 1) * 2 * cfg.pp), 1)
        size = length * sequences
        cuts = [start for start in starts if stage != "annealing" and begin < start < end]
        for cut in [*cuts, end]:
            changes["data"] = mixes[bisect.bisect_left(starts, cut) - 1]
            if stage == "annealing":
                changes["data"] = cfg.anneal_data or mixes[-1]
            n_updates = round((cut - begin) / size)
            if n_updates > 0:
                phase_cfg = dataclasses.replace(cfg, **changes)
                plan.append(Phase(stage, begin, begin + n_updates * size, size, phase_cfg))
                begin = plan[-1].end
    if not plan:
        raise ValueError("--tokens, --long_tokens and --anneal_tokens give not a single update")
    return plan

def updates_before(plan, tokens):
    """Updates that the first `tokens` tokens of the run take, as a float."""
    return sum(max(min(tokens, phase.end) - phase.begin, 0) / phase.size for phase in plan)

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
    """(frequencies [E/2] in radians per position, factor of cos and sin) of rotary embeddings,
    whose context of `original` positions a scaling extends `factor` times."""
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
        def pair(rotations):  # i of the pair that makes so many
            return dim * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(theta))

        low = max(math.floor(pair(32)), 0)
        high = min(math.ceil(pair(1)), dim - 1)
        ramp = ((i / 2 - low) / max(high - low, 1e-3)).clamp(0, 1)
        return frequencies * (1 - ramp) + frequencies / factor * ramp, 0.1 * math.log(factor) + 1
    return frequencies, 1.0

def rotate(x, cos, sin):
    """Rotary embedding of x [B, H, T, E] by the angles of cos and sin [T, E/2], in fp32."""
    first, second = x.float().chunk(2, -1)  # [B, H, T, E/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).type_as(x)

@functools.cache
def compiled(function):
    """Compile a function once. Without compilation, flex_attention forms all T x T scores."""
    return torch.compile(function)

def attention_mask(documents, rows, columns):
    """§3.2, what a query may see: no later position, no other document. From documents [B, T], the
    positions of queries, rows, and of keys, columns: [B, 1, Tq, Tk], or a block mask on a GPU."""
    if documents.is_cuda:
        def visible(b, h, i, j):
            same = documents[b, rows[i]] == documents[b, columns[j]]
            return (columns[j] <= rows[i]) & same

        sizes = len(documents), None, len(rows), len(columns)
        return compiled(create_block_mask)(visible, *sizes, device=documents.device)
    same = documents[:, rows, None] == documents[:, None, columns]
    return (same & (columns <= rows[:, None]))[:, None]

def attend(q, k, v, mask):
    """softmax(q kᵀ / sqrt(E)) v over the positions that mask allows (None: causal); query
    head j uses key-value head j // (H / K). [B, H, T, E], [B, K, T, E] twice -> [B, H, T, E]."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if torch.is_tensor(mask):
        T = q.shape[2]
        S = k.shape[2]
        size = 512 if T == S else T  # queries of a block, which skip the keys of later blocks
        outputs = []
        for start in range(0, T, size):
            rows = slice(start, start + size)
            keys = slice(start + size + S - T)
            operands = q[:, :, rows], k[:, :, keys], v[:, :, keys], mask[:, :, rows, keys]
            outputs.append(F.scaled_dot_product_attention(*operands, enable_gqa=True))
        return torch.cat(outputs, 2)
    flex = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
    return flex(q, k, v, block_mask=mask, enable_gqa=True)

class GroupedQueryAttention(nn.Module):
    """Causal attention in which H / K query heads share a key-value head (§3.2), [B, T, D] ->
    [B, T, D]. cos and sin [T, E/2] rotate queries and keys; mask hides other documents."""

    def __init__(self, dim, n_heads, n_kv_heads, bias=False):
        super().__init__()
        self.head_dim = dim // n_heads
        self.q = Linear(dim, dim, bias=bias)
        self.k = Linear(dim, n_kv_heads * self.head_dim, bias=bias)
        self.v = Linear(dim, n_kv_heads * self.head_dim, bias=bias)
        self.out = Linear(dim, dim, bias=False)
        self.attend = attend  # context parallelism gathers keys and values first

    def forward(self, x, cos, sin, mask=None):
        heads = (-1, self.head_dim)
        q = self.q(x).unflatten(-1, heads).transpose(1, 2)  # [B, H, T, E]
        k = self.k(x).unflatten(-1, heads).transpose(1, 2)  # [B, K, T, E]
        v = self.v(x).unflatten(-1, heads).transpose(1, 2)  # [B, K, T, E]
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        x = self.attend(q, k, v, mask)  # [B, H, T, E]
        return self.out(x.transpose(1, 2).flatten(2))  # [B, T, D]

class SwiGLU(nn.Module):
    """(silu(x W_gate) * x W_up) W_down, [B, T, D] -> [B, T, D] (§3.2)."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.gate = Linear(dim, hidden_dim, bias=False)
        self.up = Linear(dim, hidden_dim, bias=False)
        self.down = Linear(hidden_dim, dim, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))

class Block(nn.Module):
    """Pre-norm attention and feed-forward, with residuals, [B, T, D] -> [B, T, D] (§3.2)."""

    def __init__(self, cfg):
        super().__init__()
        self.attn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attn = GroupedQueryAttention(cfg.dim, cfg.n_heads, cfg.n_kv_heads, cfg.qkv_bias)
        self.mlp_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.mlp = SwiGLU(cfg.dim, cfg.hidden_dim)

    def forward(self, x, cos, sin, mask=None):
        x = x + self.attn(self.attn_norm(x), cos, sin, mask)
        return x + self.mlp(self.mlp_norm(x))

class Llama3(nn.Module):
    """§3.2, tokens [B, T] -> logits [B, T, V] in fp32 or, with targets, the summed loss. `dtype` is
    the precision of the residual stream. parallelize cuts it over ranks, from outside."""

    def __init__(self, cfg):
        super().__init__()
        self.dtype = torch.float32
        self.vocab_size = cfg.vocab_size
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.blocks = nn.ModuleDict({str(i): Block(cfg) for i in range(cfg.n_layers)})
        self.final_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.head = None if cfg.tied else Linear(cfg.dim, cfg.vocab_size, bias=False)
        self.set_rope(cfg)

    def set_rope(self, cfg):
        """Take the rotary frequencies of cfg, which the long-context stage changes."""
        head_dim = cfg.dim // cfg.n_heads
        scaling = cfg.rope_scaling, cfg.rope_factor, cfg.rope_original
        self.rope = rope_frequencies(head_dim, cfg.rope_theta, *scaling)

    def forward(self, tokens, targets=None, documents=None):
        """Logits or, with targets, the sum of the cross-entropies in nats. documents [B, T] numbers
        the document of each token; without it a sequence is one document."""
        x = self.transform(self.embed(tokens), documents)
        x = self.final_norm(x)
        return self.logits(x) if targets is None else self.loss(x, targets)

    def embed(self, tokens):
        """[B, T] -> [B, T, D], not scaled."""
        return self.token_embedding(tokens).to(self.dtype)

    def transform(self, x, documents=None):
        """The blocks, [B, T, D] -> [B, T, D]."""
        # Undisclosed: whether positions restart with a document. They do not: rotary attention sees
        # differences alone, so that both give the same result.
        rows, columns = self.positions(x)
        frequencies, scale = self.rope
        angles = rows[:, None] * frequencies.to(x.device)  # [T, E/2]
        cos = angles.cos() * scale
        sin = angles.sin() * scale
        mask = None
        if documents is not None:
            mask = attention_mask(documents, rows, columns)
        for block in self.blocks.values():
            x = block(x, cos, sin, mask)
        return x

    def positions(self, x):
        """Positions [T] of the queries and of the keys."""
        rows = torch.arange(x.shape[1], device=x.device)
        return rows, rows

    def logits(self, x):
        """The head, [..., D] -> [..., V] in fp32."""
        head = self.head or self.token_embedding
        return F.linear(x, head.weight.type_as(x)).float()

    def loss(self, x, targets):
        """Sum of the cross-entropies, in nats, of the targets [B, T] after x [B, T, D]."""
        return chunked_loss(self.logits, x.flatten(0, 1), targets, self.vocab_size)

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

def init_weights(model, cfg, tp=None):
    """Gains are 1, biases 0, matrices normal. A parameter is drawn from (seed, its name), so that
    every layout starts from the same numbers. Raises ValueError for a parameter without a rule."""
    # Undisclosed: all of it. N(0, 0.02), and for what is added to the residual stream, 2 L times,
    # 0.02 / sqrt(2 L), as GPT-2 has it.
    shapes = whole_shapes(cfg)
    for name, p in model.named_parameters():
        if re.search(r"(token_embedding|head|q|k|v|out|gate|up|down)\.weight$", name):
            depth = 2 * cfg.n_layers if re.search(r"(out|down)\.weight$", name) else 1
            generator = torch.Generator().manual_seed(stable_hash(cfg.seed, name))
            whole = torch.empty(shapes[name])
            fill(name, p, whole.normal_(0.0, 0.02 / math.sqrt(depth), generator=generator), tp)
        elif re.search(r"(q|k|v)\.bias$", name):
            nn.init.zeros_(p)
        elif re.search(r"_norm\.weight$", name):
            nn.init.ones_(p)
        else:
            raise ValueError(f"no rule initialises {name}")

def count_parameters(model):
    """(total, activated) parameters; a tied softmax counts once, a dense model activates all."""
    total = sum(p.numel() for p in model.parameters())
    return total, total

def flops_per_token(cfg):
    """Training FLOPs per token: 2 per weight of a matrix product forward, twice that backward.
    Attention counts as causal, (T + 1) / 2 keys per query, half of what the full square gives, and
    as within one document."""
    kv_dim = cfg.dim // cfg.n_heads * cfg.n_kv_heads
    weights = cfg.n_layers * (2 * cfg.dim * (cfg.dim + kv_dim) + 3 * cfg.dim * cfg.hidden_dim)
    attention = cfg.n_layers * 2 * cfg.dim * (cfg.seq_len + 1) / 2  # q kᵀ, A v
    return 6 * (weights + attention + cfg.vocab_size * cfg.dim)

# ---------------------------------------- Data ----------------------------------------

class DataMix:
    """§3.1.2, "data mix": corpora in given proportions, {name: Fraction}, to be read as one Corpus.

    A block has as many sequences as the proportions' common denominator: of each corpus its exact
    share, in an order that the seed shuffles. Each corpus is read in its own order across blocks,
    so that the window that a sequence reads follows from the sequence's index alone.
    """

    def __init__(self, proportions, corpora):
        self.corpora = corpora
        self.block = math.lcm(*(share.denominator for share in proportions.values()))
        self.shares = [int(share * self.block) for share in proportions.values()]
        self.bounds = [0, *itertools.accumulate(self.shares)]
        self.separator = corpora[0].separator
        self.token_bytes = corpora[0].token_bytes

    def n_windows(self, length):
        """Sequences of length + 1 ids before one of the corpora is read again."""
        pairs = zip(self.corpora, self.shares)
        return min(self.block * corpus.n_windows(length) // share for corpus, share in pairs)

    def window(self, index, length, seed):
        """The length + 1 ids of sequence `index`."""
        block, position = divmod(index, self.block)
        order = permutation(self.block, seed, "data mix", block)
        i = bisect.bisect_right(self.bounds, order[position]) - 1
        earlier = order[:position]
        n_read = int(((self.bounds[i] <= earlier) & (earlier < self.bounds[i + 1])).sum())
        return self.corpora[i].window(block * self.shares[i] + n_read, length, seed)

    def fingerprint(self):
        """A hash of the proportions and of the fingerprints of the corpora."""
        return stable_hash(self.shares, [corpus.fingerprint() for corpus in self.corpora])

def read_mix(text):
    """{path: Fraction} of WEIGHT:PATH,...; a path alone has weight 1. The weights are divided by
    their sum."""
    mix = {}
    for part in text.split(","):
        weight, path = re.fullmatch(r"(?:([^:/\\]*):)?(.*)", part, re.S).groups()
        with explain(f"{part} is not WEIGHT:PATH", ValueError):
            number = Fraction(weight or 1)
        if number <= 0:
            raise ValueError(f"the weight of {path or 'the library'} is {weight}, not positive")
        mix[path] = mix.get(path, 0) + number
    mix = {path: number / sum(mix.values()) for path, number in mix.items()}
    if math.lcm(*(number.denominator for number in mix.values())) > 10**6:
        raise ValueError(f"the weights of {text} have a common denominator above 1,000,000")
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

def load_mixes(cfg):
    """(tokenizer or None, DataMix of each phase, DataMix of the documents held out of the first);
    sets cfg.vocab_size. With --write_tokens the data is written as shards, and the result None."""
    # Undisclosed: whether a stage sees text of an earlier one again. A sequence's index in the run
    # decides what it reads of its mix, so that phases of the same length and mix go on, and others
    # may read again.
    plan = phases(cfg)
    mixes = [read_mix(cfg.data.split(";")[0]), *(read_mix(phase.cfg.data) for phase in plan)]
    sources = {path: find_files(path) for path in dict.fromkeys(itertools.chain(*mixes))}
    tokenizer = None
    separator = -1  # unknown
    if cfg.tokenizer or any(files for files, _ in sources.values()):
        tokenizer, separator = load_specials(cfg)
        cfg.vocab_size = cfg.vocab_size or 8 * math.ceil(tokenizer.n_vocab / 8)
    else:
        print("without --tokenizer there are no borders of documents, and no mask")
    cfg.vocab_size = vocabulary_size(cfg.vocab_size, tokenizer, cfg.init)
    length = max(phase.cfg.seq_len for phase in plan)
    batch = math.ceil(max(phase.size for phase in plan) / length)
    corpora = {}
    for path, (files, shards) in sources.items():
        documents = tokenize_pieces(read_documents(path, files), tokenizer, separator)
        if cfg.write_tokens and (shards or len(sources) > 1):
            raise ValueError("--write_tokens takes text of one corpus, not a mix or token shards")
        if cfg.write_tokens:
            return write_tokens(cfg.write_tokens, documents)
        share = max(mix.get(path, 0) for mix in mixes)
        sizes = cfg.vocab_size, math.ceil(batch * share), length
        with explain(path or "the standard library", ValueError):
            corpora[path] = load_corpora(shards, documents, tokenizer, separator, *sizes)
    heldout = DataMix(mixes[0], [corpora[path][1] for path in mixes[0]])
    return tokenizer, [DataMix(m, [corpora[p][0] for p in m]) for m in mixes[1:]], heldout

def get_batch(corpus, first, n, cfg):
    """Sequences first ... first + n - 1 of the run: tokens, targets and, with the mask,
    documents [n, T], and their counts.

    A pure function of the seed and the index, so that any number of ranks, any accumulation and
    any resume see the same sequences. documents numbers the document of each input; n_targets
    counts targets, n_bytes the bytes of their text.
    """
    # Undisclosed: the packing. Documents between BEGIN and END follow each other, are cut into
    # windows of T + 1 tokens. With the mask, no input predicts the next document's first token.
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

def objective(model, batch, cfg):
    """Next-token cross-entropy: the sum of the batch's nats, divided by batch["n_targets"], the
    count of the whole global batch. There are no metrics."""
    nats = model(batch["tokens"], batch["targets"], batch.get("documents"))
    return nats / max(batch["n_targets"], 1), {}

# ---------------------------------------- Optimizer ----------------------------------------

def build_optimizer(model, cfg):
    """§3.4.1: AdamW."""
    # Undisclosed: betas, eps, decay, clipping. These, and --clip 1, are Llama 2's, but for eps: it
    # printed 1e-5. A decay of 0.1 is also that of the scaling-law runs (§3.2.1).
    groups = [
        dict(params=[p for p in model.parameters() if p.ndim > 1], weight_decay=cfg.weight_decay),
        dict(params=[p for p in model.parameters() if p.ndim <= 1], weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)

def learning_rate(step, cfg):
    """§3.4.1: linear warm-up, then a cosine; §3.4.3: linear to 0 while annealing. step counts the
    updates of the plan that are done, whatever their batch."""
    # Undisclosed: the rate of the long-context stage. Here the cosine continues, and annealing
    # starts from the rate that it has reached.
    plan = phases(cfg)
    end = updates_before(plan, plan[-1].end)
    begin = end  # of annealing
    if plan[-1].stage == "annealing":
        begin = updates_before(plan, plan[-1].begin)
    start = min(step, begin)
    if start < cfg.warmup_steps:
        rate = cfg.lr * start / cfg.warmup_steps
    else:
        done = (start - cfg.warmup_steps) / max(cfg.cosine_steps - cfg.warmup_steps, 1)
        rate = cfg.min_lr + (cfg.lr - cfg.min_lr) / 2 * (1 + math.cos(math.pi * min(done, 1)))
    return rate * (end - step) / (end - begin) if step > start else rate

def clip_gradients(model, loss, cfg, mesh):
    """(norm of the complete gradient, loss summed over ranks), after scaling the gradient down to a
    norm of cfg.clip. Parameters of which each tensor-parallel rank has a copy count once."""
    split = []
    replicated = []
    for name, p in model.named_parameters():
        local = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
        (replicated if tensor_dimension(name) is None else split).append(local)
    square = nn.utils.get_total_norm(split).double() ** 2
    square = square + nn.utils.get_total_norm(replicated).double() ** 2 / mesh["tp"].size()
    # The update waits for the device here alone.
    square, loss = sum_over_ranks(*torch.stack([square, loss]).tolist())
    norm = math.sqrt(square) if square >= 0 else math.nan
    if cfg.clip and norm > cfg.clip:
        for p in model.parameters():
            p.grad.mul_(cfg.clip / (norm + 1e-6))
    return norm, loss

def update_average(pipeline, state, phase, n_checkpoints):
    """§3.4.3, Polyak averaging: after each of n_checkpoints equally spaced updates of annealing (or
    each update, if they are fewer) the parameters enter the running mean, which replaces them when
    the run ends. state has the tokens of the run so far and the number of checkpoints in the mean.
    """
    # Undisclosed: how many checkpoints and how far apart; here ten, uniformly.
    n_updates = (phase.end - phase.begin) // phase.size
    done = (state["position"] - phase.begin) // phase.size
    if done * n_checkpoints // n_updates > (done - 1) * n_checkpoints // n_updates:
        state["n_averaged"] += 1
        for mean, p in zip(pipeline.average.parameters(), pipeline.model.parameters()):
            mean.data.lerp_(p.data, 1 / state["n_averaged"])

# ---------------------------------------- Precision ----------------------------------------

# Parameters, their average, gradients between ranks and Adam's moments are fp32 (§3.3.2: fp32
# accumulation over micro-batches and reduce-scatter). Under bf16 the residual stream, matrix
# products and attention are bf16, with or without sharded data parallelism; norm statistics, rotary
# angles, softmax and loss are fp32.

PEAK_FLOPS = {"bf16": {  # dense, by precision and the device's exact name; others get no MFU
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA B200": 2250e12,
}}  # fmt: skip

# ---------------------------------------- Parallelism ----------------------------------------

def make_mesh(cfg, device_type):
    """§3.3.2: [TP, CP, PP, DP] from the innermost, rank = tp + TP (cp + CP (pp + PP dp))."""
    sizes = dict(dp=cfg.dp, pp=cfg.pp, cp=cfg.cp, tp=cfg.tp)
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

def fit_ranks(cfg, ranks):
    """cfg with the number of ranks left for --dp 0, and one chunk per rank without a pipeline."""
    others = cfg.tp * cfg.cp * cfg.pp
    if others < 1 or ranks % others or (cfg.dp and cfg.dp * others != ranks):
        sizes = f"tp {cfg.tp} x cp {cfg.cp} x pp {cfg.pp} x dp {cfg.dp or 'any'}"
        raise ValueError(f"{sizes} are not {ranks} ranks")
    chunks = cfg.pp_chunks if cfg.pp > 1 else 1
    return dataclasses.replace(cfg, dp=ranks // others, pp_chunks=chunks)

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

def split_branch(forward, tp, x, *inputs):
    """A branch whose matrices are cut over tensor-parallel ranks, between Megatron's f and g."""
    return SumOutput.apply(forward(SumGradient.apply(x, tp), *inputs), tp)

def split_embed(model, tp, tokens):
    """Llama3.embed, of a rank that has a part of the table's rows."""
    rows = model.token_embedding.weight.shape[0]
    tokens = tokens - tp.rank() * rows
    mine = (tokens >= 0) & (tokens < rows)
    x = model.token_embedding(tokens.clamp(0, rows - 1)) * mine[..., None]
    return SumOutput.apply(x, tp).to(model.dtype)

def split_loss(model, tp, x, targets):
    """Llama3.loss, of a rank that has a part of the vocabulary: no rank ever has all logits."""

    def chunk_loss(x, targets):
        logits = model.logits(SumGradient.apply(x, tp))  # [N, V of this rank]
        first = tp.rank() * logits.shape[1]
        local = (targets - first).clamp(0, logits.shape[1] - 1)[:, None]
        mine = (targets >= first) & (targets < first + logits.shape[1])
        target = SumOutput.apply(logits.gather(1, local)[:, 0] * mine, tp)
        top = logits.detach().amax(1)  # [N]
        dist.all_reduce(top, dist.ReduceOp.MAX, group=tp)
        total = SumOutput.apply((logits - top[:, None]).exp().sum(1), tp)
        return ((total.log() + top - target) * (targets >= 0)).sum()

    x = x.flatten(0, 1)  # [B T, D]
    targets = targets.flatten()
    nats = 0.0
    for rows in slices(len(x), model.vocab_size // tp.size()):
        nats = nats + checkpoint(chunk_loss, x[rows], targets[rows], use_reentrant=False)
    return nats

def split_matrices(model, tp):
    """Tensor parallelism: keep this rank's part of the matrices, and sum over the ranks."""
    for name, p in list(model.named_parameters()):
        dim = tensor_dimension(name)
        if dim is not None:
            owner, _, attribute = name.rpartition(".")
            part = nn.Parameter(p.chunk(tp.size(), dim)[tp.rank()].contiguous())
            setattr(model.get_submodule(owner), attribute, part)
    for block in model.blocks.values():
        block.attn.forward = functools.partial(split_branch, block.attn.forward, tp)
        block.mlp.forward = functools.partial(split_branch, block.mlp.forward, tp)
    model.embed = functools.partial(split_embed, model, tp)
    model.loss = functools.partial(split_loss, model, tp)

class GatherSequence(torch.autograd.Function):
    """§3.3.2, context parallelism: all ranks' positions, in the order of the ranks, of dimension 3
    of [2, B, K, T, E]; the backward pass sums the gradient of a rank's own positions."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts, 3)

    @staticmethod
    def backward(ctx, gradient):
        parts = torch.stack(gradient.chunk(ctx.group.size(), 3))
        received = torch.empty_like(parts)  # torch.compile cannot trace reduce_scatter of a list
        dist.all_to_all_single(received, parts, group=ctx.group)
        return received.float().sum(0).type_as(gradient), None  # summed in fp32

def context_positions(length, ranks, rank):
    """§3.3.2: the positions of a context-parallel rank. Of 2 x ranks chunks it holds one from the
    front and its mirror image from the back, so that causal attention costs all ranks the same."""
    chunks = torch.arange(length).chunk(2 * ranks)
    return torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]))

def split_sequence(model, cp):
    """Context parallelism: a rank has the positions of two chunks, and attends to those of all."""

    def positions(x):
        chunks = [context_positions(x.shape[1] * cp.size(), cp.size(), i) for i in range(cp.size())]
        return chunks[cp.rank()].to(x.device), torch.cat(chunks).to(x.device)

    def attend_to_all(q, k, v, mask):
        k, v = GatherSequence.apply(torch.stack((k, v)), cp)
        return attend(q, k, v, mask)

    model.positions = positions
    for block in model.blocks.values():
        block.attn.attend = attend_to_all

def stage_layers(cfg, stage):
    """§3.3.2: the layers of a pipeline stage, one less on the first and on the last, which have
    the embedding and the head."""
    stages = cfg.pp * cfg.pp_chunks
    edges = [round((cfg.n_layers + 2) * i / stages) for i in (stage, stage + 1)]
    return range(max(edges[0] - 1, 0), min(edges[1] - 1, cfg.n_layers))

def keep_stage(model, cfg, stage):
    """Pipeline parallelism: keep the layers of a stage, the embedding on the first and the head and
    the loss on the last."""
    layers = map(str, stage_layers(cfg, stage))
    model.blocks = nn.ModuleDict({name: model.blocks[name] for name in layers})
    if stage > 0:
        model.token_embedding = None
        model.embed = lambda x: x
    if stage < cfg.pp * cfg.pp_chunks - 1:
        model.final_norm = nn.Identity()
        model.head = None
        model.loss = lambda x, targets: x

def tensor_dimension(name):
    """The dimension along which tensor parallelism cuts a parameter; None: each rank has it all."""
    if re.search(r"(token_embedding|head|q|k|v|gate|up)\.(weight|bias)$", name):
        return 0
    return 1 if re.search(r"(out|down)\.weight$", name) else None

def whole_shapes(cfg):
    """{name: shape} of all parameters of the model on one rank."""
    with torch.device("meta"):
        return {name: p.shape for name, p in Llama3(cfg).named_parameters()}

def fill(name, p, whole, tp):
    """Write this rank's part of the whole tensor to the parameter."""
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

def parallelize(model, cfg, mesh, shards, stage=0):
    """§3.3.2: cut a model on the meta device along [TP, CP, PP, DP], recompute and compile blocks,
    and allocate this rank's part, whose values are not set. With DP (FSDP), parameters, gradients
    and optimizer are sharded over `shards`, the data- and context-parallel ranks, gradients are
    reduced in fp32, and parameters are not resharded after the forward pass."""
    # Departure: the residual stream and the norms are not cut by tensor parallelism (sequence
    # parallelism is cited, not said to be used): each of the TP ranks keeps all of them, so that
    # 405B at 8,192 positions needs --recompute block to fit 80 GB.
    model.dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    if cfg.tp > 1:
        split_matrices(model, mesh["tp"].get_group())
    if cfg.pp > 1:
        keep_stage(model, cfg, stage)
    if cfg.cp > 1:
        split_sequence(model, mesh["cp"].get_group())
    policy = MixedPrecisionPolicy(model.dtype, torch.float32, cast_forward_inputs=False)
    settings = dict(mesh=shards, mp_policy=policy, reshard_after_forward=False)
    for block in model.blocks.values():
        if cfg.recompute == "block":
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if cfg.compile:
            torch.compiler.config.recompile_limit = 64  # a graph per length and mode
            torch.compiler.config.fail_on_recompile_limit_hit = True
            block.compile(dynamic=False)
    if shards.size() > 1:
        for module in (*model.blocks.values(), model):
            fully_shard(module, **settings)
    return model.to_empty(device=mesh.device_type)

def build_stages(cfg, mesh, shards):
    """(pipeline stages of this rank, all their parameters by their names in the model)."""
    stages = []
    merged = nn.Module()
    merged.blocks = nn.ModuleDict()
    for i in range(mesh["pp"].get_local_rank(), cfg.pp * cfg.pp_chunks, cfg.pp):
        with torch.device("meta"):
            model = Llama3(cfg)
        stages.append(parallelize(model, cfg, mesh, shards, i))
        merged.blocks.update(model.blocks)
        for name, child in model.named_children():
            if name != "blocks":
                merged.add_module(name, child)
    return stages, merged

class Pipeline:
    """The part of the model that one rank has, run over micro-batches: one after the other where
    that is all layers, and else by 1F1B, interleaved where a rank has several stages (§3.3.2)."""

    # Departure: consecutive micro-batches of a stage are what the engine's schedule makes of them,
    # about one per pipeline rank, not the paper's free N.

    def __init__(self, cfg, mesh):
        self.mesh = mesh
        self.tp = mesh["tp"].get_group() if cfg.tp > 1 else None
        self.data_rank = mesh["dp"].get_local_rank()
        self.n_shards = cfg.dp * cfg.cp  # sharding averages over these ranks, losses are summed
        ranks = mesh.mesh.permute(1, 3, 0, 2).flatten(2)  # [PP, TP, DP CP]
        names = ("pp", "tp", "shard")
        self.shards = DeviceMesh(mesh.device_type, ranks, mesh_dim_names=names)["shard"]
        self.stages, self.model = build_stages(cfg, mesh, self.shards)
        self.average = None
        # All tensor-parallel ranks have the same names: in a checkpoint, the rank is part of them.
        self.saved = nn.ModuleDict({f"tp{mesh['tp'].get_local_rank()}": self.model})

    def add_average(self, cfg):
        """Make room for the average of the parameters, which is saved with them."""
        _, self.average = build_stages(cfg, self.mesh, self.shards)
        for p in self.average.requires_grad_(False).parameters():
            p.data.zero_()
        self.saved[f"average_tp{self.mesh['tp'].get_local_rank()}"] = self.average

    def start_phase(self, cfg):
        """Prepare for a phase: its positions, and a new schedule, whose shapes are fixed."""
        self.cfg = cfg
        for stage in self.stages:
            stage.set_rope(cfg)
        self.has_gradients = None  # whether self.schedule runs backward; None: no schedule yet

    def make_schedule(self):
        """A schedule of this rank's stages for the batches of self.cfg."""
        cfg = self.cfg
        group = self.mesh["pp"].get_group()
        device = next(self.model.parameters()).device
        n_micro, _ = split_batch(cfg, cfg.dp)
        stages = []
        for i, stage in enumerate(self.stages):
            index = group.rank() + i * cfg.pp
            stages.append(PipelineStage(stage, index, cfg.pp * cfg.pp_chunks, device, group=group))
        settings = dict(n_microbatches=n_micro, loss_fn=self.loss, scale_grads=False)
        if cfg.pp_chunks == 1:
            return Schedule1F1B(stages[0], **settings)
        return ScheduleInterleaved1F1B(stages, **settings)

    def loss(self, nats, targets):
        """The objective of a micro-batch with that many nats, as the schedule asks for it, times
        the number over which sharding averages gradients."""
        return nats / max(self.n_targets, 1) * self.n_shards

    def run(self, batches):
        """This rank's part of the mean loss over the global batch, to be summed over all ranks;
        where autograd is on, its gradients are added to the parameters."""
        self.n_targets = batches[0]["n_targets"]
        parts = [self.own_part(batch) for batch in batches]
        if self.cfg.pp > 1:
            losses = self.run_schedule(parts)
        else:
            losses = [self.run_micro_batch(part, part is parts[-1]) for part in parts]
        total = torch.zeros((), dtype=torch.float64, device=parts[0]["tokens"].device)
        return sum((loss.detach() for loss in losses), total) / self.n_shards / self.cfg.tp

    def own_part(self, batch):
        """A micro-batch with this rank's positions of tokens and targets, and all documents."""
        if self.cfg.cp == 1:
            return batch
        own = context_positions(self.cfg.seq_len, self.cfg.cp, self.mesh["cp"].get_local_rank())
        part = {"documents": torch.zeros_like(batch["tokens"])}  # one document, if there is no mask
        return part | batch | {name: batch[name][:, own] for name in ("tokens", "targets")}

    def run_micro_batch(self, batch, is_last):
        """The loss of a micro-batch of a model with all layers, times n_shards; where autograd is
        on, its gradients are added, which ranks reduce once, in the last micro-batch."""
        (model,) = self.stages
        loss = objective(model, batch, self.cfg)[0] * self.n_shards
        if torch.is_grad_enabled():
            if self.n_shards > 1:
                model.set_requires_gradient_sync(is_last)
                model.set_reshard_after_backward(is_last)
            loss.backward()
        return loss

    def run_schedule(self, batches):
        """The losses, on the last stage, of all micro-batches, which go forward and, where autograd
        is on, backward through the pipeline."""
        names = [name for name in batches[0] if not name.startswith("n_")]
        inputs = {name: torch.cat([batch[name] for batch in batches]) for name in names}
        tokens = inputs.pop("tokens")
        first = [tokens] if self.mesh["pp"].get_local_rank() == 0 else []
        losses = []
        if self.has_gradients != torch.is_grad_enabled():  # in PyTorch 2.11 the first run decides
            self.has_gradients = torch.is_grad_enabled()
            self.schedule = self.make_schedule()
        step = self.schedule.step if self.has_gradients else self.schedule.eval
        step(*first, target=inputs["targets"], losses=losses, return_outputs=False, **inputs)
        return losses

    def use_average(self):
        """Put the average in place of the parameters."""
        for p, mean in zip(self.model.parameters(), self.average.parameters()):
            p.data.copy_(mean.data)

    @torch.no_grad()
    def evaluate(self, batches):
        """run without gradients; parameters are resharded, as the backward pass does it."""
        loss = self.run(batches)
        for module in itertools.chain(*(stage.modules() for stage in self.stages)):
            if isinstance(module, FSDPModule):
                module.reshard()
        return loss

def memory_per_rank(cfg):
    """Bytes on the rank that needs most, by kind, at the peak of an update, not compiled, in the
    phase whose Config is cfg."""
    n_micro, micro = split_batch(cfg, cfg.dp)
    size = 2 if cfg.precision == "bf16" else 4
    kv_dim = cfg.dim * cfg.n_kv_heads // cfg.n_heads
    matrices = 2 * cfg.dim * (cfg.dim + kv_dim) + 3 * cfg.dim * cfg.hidden_dim
    layer = matrices / cfg.tp + 2 * cfg.dim  # but for biases
    table = cfg.vocab_size * cfg.dim / cfg.tp
    # Kept for the backward pass, per position and block: inputs of both norms in fp32, their
    # outputs before and after the gain and, cut by tensor parallelism, q, k, v, the attended
    # values and four of the MLP. Recomputed blocks keep their input, and one is there in full.
    split = 2 * cfg.dim + 2 * kv_dim + 4 * cfg.hidden_dim
    block = 8 * cfg.dim + size * (4 * cfg.dim + split / cfg.tp)
    kept_block = size * cfg.dim if cfg.recompute == "block" else block
    positions = micro * cfg.seq_len // cfg.cp
    # The final norm, and of a chunk the fp32 logits, their softmax and its gradient.
    head = positions * (4 + 2 * size) * cfg.dim
    columns = cfg.vocab_size // cfg.tp
    head += 12 * columns * slices(positions, columns)[0].stop
    # Or, in the backward pass of a block, the gradients of three of the MLP and of its input.
    gradients = positions * size * (3 * cfg.hidden_dim / cfg.tp + cfg.dim)
    n_shards = cfg.dp * cfg.cp
    ranks = []
    for rank in range(cfg.pp):
        is_last = rank == cfg.pp - 1
        stages = range(rank, cfg.pp * cfg.pp_chunks, cfg.pp)
        n_blocks = sum(len(stage_layers(cfg, stage)) for stage in stages)
        n_tables = (rank == 0) + (is_last and not cfg.tied)
        n = n_blocks * layer + n_tables * table + is_last * cfg.dim
        # Micro-batches that have run forward and not backward, of 1F1B or its interleaved form.
        flight = min(cfg.pp - rank, n_micro)
        if cfg.pp_chunks > 1:
            at_once = n_micro // max(n_micro // cfg.pp, 1)  # consecutive micro-batches of a stage
            flight = (cfg.pp_chunks - 1) * at_once + 2 * (cfg.pp - rank) - 1
            flight = min(flight, n_micro * cfg.pp_chunks) / cfg.pp_chunks
        activations = flight * n_blocks * kept_block * positions
        recomputed = block * positions * (cfg.recompute == "block")
        fp32 = 4 * n / n_shards  # a copy of the parameters
        memory = {"parameters": fp32, "gradients": fp32, "optimizer": 2 * fp32}
        memory["average"] = fp32 * (cfg.anneal_tokens > 0 and cfg.average > 0)
        # Complete parameters and fp32 gradients of shards, or bf16 copies of the parameters.
        memory["gathered"] = n * (size + 4) * (n_shards > 1) or n * size * (size == 2)
        memory["activations"] = activations + max(recomputed + gradients, head * is_last)
        # PyTorch's stages keep a buffer per micro-batch for what each of their neighbours sends.
        last_stage = cfg.pp * cfg.pp_chunks - 1
        n_neighbours = sum((stage > 0) + (stage < last_stage) for stage in stages)
        memory["received"] = n_micro * n_neighbours * positions * size * cfg.dim
        ranks.append(memory)
    return max(ranks, key=lambda memory: sum(memory.values()))

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
HF_ENDS = {  # entries of a published vocabulary: ids before and after a document
    128256: (128000, 128001), 151936: (151643, 151643), 152064: (151643, 151643),
}  # fmt: skip
SHAPE = (*HF_CONFIG, "qkv_bias", "rope_theta", "rope_from")  # fields that a checkpoint fixes
FILE_BYTES = 5e9  # of a file of weights at most, unless one tensor is larger

def hf_name(name):
    """Hugging Face's name of our parameter."""
    for ours, theirs in HF_NAMES.items():
        name = name.replace(ours, theirs)
    return name

def read_llama_config(path):
    """{field of Config: value} of the LlamaForCausalLM or Qwen2ForCausalLM in the directory path.
    Fields of a context extension are there if the model has one."""
    with explain(f"{path} holds no Llama or Qwen2 model", Exception):
        theirs = json.loads((Path(path) / "config.json").read_text())
        qwen = {"llama": False, "qwen2": True}[theirs["model_type"]]
        fields = read_hf_config(path, HF_CONFIG | (HF_QWEN if qwen else {}), HF_FIXED)
        fields["qkv_bias"] = qwen
        fields["n_kv_heads"] = fields["n_kv_heads"] or fields["n_heads"]
        fields["seq_len"] = theirs.get("max_position_embeddings", 32768 if qwen else 2048)
        rope = dict(theirs.get("rope_parameters") or theirs.get("rope_scaling") or {})
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        fields["rope_theta"] = rope.pop("rope_theta", theirs.get("rope_theta", 10000.0))
        original = rope.pop("original_max_position_embeddings", None)
        if kind != "default":
            fields["rope_scaling"] = {"linear": "pi", "yarn": "yarn", "llama3": "llama3"}[kind]
            fields["rope_from"] = "initial"
            fields["rope_factor"] = rope.pop("factor")
            fields["rope_original"] = original or fields["seq_len"]
        supported = HF_ROPE_FIXED | {"head_dim": fields["dim"] // fields["n_heads"]}
        for key, value in [*rope.items(), ("head_dim", theirs.get("head_dim"))]:
            if value not in (None, supported.get(key)):
                raise ValueError(f"config.json has {key} {value!r}")
    return fields

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

def fill_layout_from_hf(model, path, tp=None):
    """Fill the parameters that this rank has from a Hugging Face checkpoint directory."""
    with explain(f"{path} holds no Llama or Qwen2 model of this shape", Exception):
        tensors = read_hf_tensors(path)
        for name, p in model.named_parameters():
            fill(name, p, tensors[hf_name(name)], tp)

def from_hf(path):
    """(model, cfg) from the checkpoint directory of a LlamaForCausalLM or Qwen2ForCausalLM."""
    cfg = Config(**read_llama_config(path))
    model = Llama3(cfg)
    fill_layout_from_hf(model, path)
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
    begin, end = HF_ENDS.get(cfg.vocab_size, (None, None))
    return config | {"bos_token_id": begin, "eos_token_id": end}

def gather_tensors(model, cfg, mesh):
    """(name, complete tensor) of each parameter of the whole model, one after the other, in the
    memory of the CPU; all ranks, of which each has a part of the model, call this together."""
    own = dict(model.named_parameters())
    tp = mesh["tp"].get_group() if cfg.tp > 1 else None
    pp = mesh["pp"].get_group()
    holders = [None] * pp.size()  # names that each rank of a pipeline has
    dist.all_gather_object(holders, list(own), group=pp)
    for name, shape in whole_shapes(cfg).items():
        holder = [name in names for names in holders].index(True)
        tensor = torch.empty(shape)
        if holder == pp.rank():
            tensor.copy_(whole_tensor(name, own[name].data, tp))
        dist.broadcast(tensor, group=pp, group_src=holder)
        yield name, tensor

def group_by_file(tensors):
    """{Hugging Face's name: tensor} of each file that (our name, tensor) of all parameters make."""
    content = {}
    for name, tensor in tensors:
        if content and sum(t.nbytes for t in [*content.values(), tensor]) > FILE_BYTES:
            yield content
            content = {}
        content[hf_name(name)] = tensor.data.cpu().contiguous()
    yield content

def to_hf(model, cfg, path, mesh=None):
    """Write model, or on every rank its part of one, to the directory path as a LlamaForCausalLM
    or Qwen2ForCausalLM. The first rank writes; it holds the tensors of at most two files."""
    from safetensors.torch import save_file

    tensors = model.named_parameters() if mesh is None else gather_tensors(model, cfg, mesh)
    if mesh is not None and dist.get_rank() > 0:
        for _ in tensors:
            pass  # this rank's part in gathering
        return
    file_of = {}  # by Hugging Face's name
    with written_beside(path) as folder:
        for i, content in enumerate(group_by_file(tensors), 1):
            file = f"model-{i:05d}.safetensors"
            save_file(content, folder / file, metadata={"format": "pt"})
            file_of |= dict.fromkeys(content, file)
        if i == 1:
            (folder / file).rename(folder / "model.safetensors")
        else:
            index = json.dumps({"metadata": {}, "weight_map": file_of}, indent=2) + "\n"
            (folder / "model.safetensors.index.json").write_text(index)
        (folder / "config.json").write_text(json.dumps(make_llama_config(cfg), indent=2) + "\n")

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

def load_specials(cfg):
    """(tokenizer, id after each document): Llama 3's special tokens for a BPE rank file, the first
    eight of them for another tokenizer; without --bos, <|endoftext|> and seven others."""
    is_file = os.path.isfile(cfg.tokenizer)
    if is_file and cfg.bos == cfg.qkv_bias:
        raise ValueError("--tokenizer: Llama 3's file goes with --bos, Qwen2.5's with --no-bos")
    specials = SPECIALS if is_file else SPECIALS[:8]
    if not cfg.bos:
        specials = ["<|endoftext|>", *SPECIALS[2:9]]
    tokenizer = load_tokenizer(cfg.tokenizer or "bytes", specials)
    if is_file and cfg.qkv_bias:  # Qwen2.5's pattern takes digits one by one
        id_of = tokenizer.encode_single_token
        tokenizer = tiktoken.Encoding(
            cfg.tokenizer, pat_str=PATTERN.replace("{1,3}", ""),
            mergeable_ranks={text: id_of(text) for text in tokenizer.token_byte_values()},
            special_tokens={token: id_of(token) for token in tokenizer.special_tokens_set},
        )  # fmt: skip
    end = "<|endoftext|>" if "<|endoftext|>" in tokenizer.special_tokens_set else END
    return tokenizer, tokenizer.encode_single_token(end)

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

def needle_loss(pipeline, heldout, tokenizer, cfg, device):
    """§3.4.2, needle in a haystack: nats per token of a number planted in T tokens of text,
    whose end asks for it; NaN if T is too short."""
    # Undisclosed: the fact. A number of five digits, at depths spread evenly over held-out text.
    batches = read_batch(heldout, 0, cfg, device, pipeline.data_rank, cfg.dp)
    i = pipeline.data_rank * cfg.batch_size // cfg.dp  # index of the sequence
    for batch in batches:
        for tokens, targets in zip(batch["tokens"], batch["targets"]):
            number = str(stable_hash(cfg.seed, "needle", i) % 90000 + 10000)
            fact = torch.tensor(tokenizer.encode_ordinary(f"\nkey={number}\n"))
            question = torch.tensor(tokenizer.encode_ordinary(f"\nkey={number}"))  # and answer
            n_answer = len(tokenizer.encode_ordinary(number))
            n_depths = cfg.seq_len - len(fact) - len(question)
            if n_depths < 0:
                return math.nan
            depth = n_depths * i // cfg.batch_size
            tokens[depth : depth + len(fact)] = fact
            tokens[1 - len(question) :] = question[:-1]
            targets.fill_(-100)[-n_answer:] = question[-n_answer:]
            i += 1
        batch["documents"] = torch.zeros_like(batch["tokens"])
        batch["n_targets"] = int((batch["targets"] >= 0).sum())
    sum_counts(batches, cfg.dp)
    (loss,) = sum_over_ranks(pipeline.evaluate(batches))
    return loss

def is_spike(state, loss, limit):
    """Whether loss is `limit` standard deviations above its running mean over about 50
    updates. The mean then takes it in, so that a lasting level is soon no spike."""
    n = state["watched"]
    deviation = loss - state["loss_mean"]
    spike = n >= 20 and 0 < limit * math.sqrt(state["loss_variance"]) < deviation
    rate = max(1 / (n + 1), 0.02)
    state["loss_mean"] += rate * deviation
    state["loss_variance"] = (1 - rate) * (state["loss_variance"] + rate * deviation**2)
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
    for name in ("n_kv_heads", "hidden_dim", "vocab_size"):
        if getattr(cfg, name) % cfg.tp:
            raise ValueError(f"--tp {cfg.tp} does not divide --{name} {getattr(cfg, name)}")
    stages = cfg.pp * cfg.pp_chunks
    for wrong, message in (
        (cfg.dim % (2 * cfg.n_heads) or cfg.dim < 4 * cfg.n_heads,
         f"{cfg.n_heads} heads do not divide the width {cfg.dim} into even parts of 4 or more"),
        (cfg.n_heads % cfg.n_kv_heads,
         f"{cfg.n_kv_heads} key-value heads do not divide {cfg.n_heads} heads"),
        (cfg.tied and cfg.pp > 1, "--pp does not work with --tied: the embedding is on one rank"),
        (stages > cfg.n_layers + 2,
         f"{cfg.n_layers} layers, embedding and head are fewer than {stages} pipeline stages"),
        (cfg.resume and not cfg.out, "--resume needs --out"),
        (cfg.write_tokens and ranks > 1, "--write_tokens runs in one process, without torchrun"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
    problems = [phase_problem(phase) for phase in phases(cfg)]
    if all(problems):
        raise ValueError(problems[0])

def phase_problem(phase):
    """Why the layout cannot hold a phase; empty if it can."""
    cfg = phase.cfg
    n_micro, micro = split_batch(cfg, cfg.dp)
    where = f"{phase.stage}, {cfg.batch_size:,} sequences of {cfg.seq_len:,}"
    if cfg.dp * n_micro * micro != cfg.batch_size:
        return f"{where}: not {cfg.dp} data-parallel ranks x micro-batches of {micro}"
    if cfg.cp > 1 and cfg.seq_len % (2 * cfg.cp):
        return f"{where}: --cp {cfg.cp} needs a multiple of {2 * cfg.cp}"
    if cfg.pp_chunks == 1 and n_micro < cfg.pp:
        return f"{where}: {n_micro} micro-batches are fewer than --pp {cfg.pp}: see --micro_batch"
    if cfg.pp_chunks > 1 and n_micro % max(1, n_micro // cfg.pp):
        return f"{where}: {n_micro} micro-batches are not {n_micro // cfg.pp} equal rounds"
    return ""

def limit_to_layout(plan, position, end):
    """Tokens at which the run ends: `end`, or where a phase begins that the layout cannot hold,
    which is printed. Raises ValueError if that is the phase of the present position."""
    for phase in plan:
        if position < phase.end and phase.begin < end and phase_problem(phase):
            if phase.begin <= position:
                raise ValueError(phase_problem(phase))
            print(f"{phase_problem(phase)}: the run ends before it, after {phase.begin:,} tokens;")
            print("the same command with --resume and another --dp, --cp or --micro_batch goes on")
            return phase.begin
    return end

def describe(phase):
    """One line on a phase: data, rotary scaling, updates, and the sequences of a rank."""
    cfg = phase.cfg
    n_micro, micro = split_batch(cfg, cfg.dp)
    source = f"data {cfg.data or 'the standard library'} | rope {cfg.rope_scaling}"
    updates = f"{(phase.end - phase.begin) // phase.size:,} updates of {phase.size:,} tokens"
    shares = f"{cfg.dp} ranks x {n_micro} x {micro} sequences of {cfg.seq_len:,}"
    return f"{phase.stage} | {source} | {updates} = {shares}"

def print_sizes(plan, cfg):
    """Print parameters and, in the last phase, FLOPs per token."""
    with torch.device("meta"):
        total, activated = count_parameters(Llama3(cfg))
    print(f"parameters {total:,} | activated {activated:,} | FLOPs per token", end=" ")
    print(f"{flops_per_token(plan[-1].cfg):.4g}, 6 N gives {6 * activated:.4g}")

def dry_run(cfg):
    """Print parameters, FLOPs per token, for each phase the pipeline's bubble and the bytes on the
    rank that needs most, or why the layout cannot hold it, and the bytes in the phase that needs
    most, by kind; from shapes alone."""
    cfg = fit_ranks(cfg, cfg.world_size)
    cfg.vocab_size = cfg.vocab_size or 8 * math.ceil(load_specials(cfg)[0].n_vocab / 8)
    check(cfg, cfg.world_size)
    plan = phases(cfg)
    print_sizes(plan, cfg)
    memories = []
    for phase in plan:
        if phase_problem(phase):
            print(f"{phase_problem(phase)} | another layout is needed")
            continue
        memories.append(memory_per_rank(phase.cfg))
        n_micro, _ = split_batch(phase.cfg, cfg.dp)
        bubble = (cfg.pp - 1) / (cfg.pp_chunks * n_micro)  # §3.3.2: (PP - 1) / (V M)
        n_bytes = sum(memories[-1].values())
        print(f"{describe(phase)} | bubble {bubble:.1%} | sum {n_bytes / 2**30:.3f} GiB")
    print_memory(max(memories, key=lambda memory: sum(memory.values())))

def go_back(pipeline, optimizer, state, path):
    """Undo the updates since the checkpoint at path, and continue with the data after theirs."""
    # Undisclosed: the recovery; there were few spikes, and no manual intervention (§3.4.1). This
    # is what others describe.
    kept = {"step": state["step"], "sequences": state["sequences"], "watched": 0}
    load_checkpoint(path, pipeline.saved, optimizer, state)
    undone = kept["sequences"] - state["sequences"]
    state.update(kept)
    print(f"back to the weights of {path.name}, and past {undone} sequences")

def pipeline_step(pipeline, optimizer, batches, lr, state, cfg):
    """One update from this rank's micro-batches; returns the row for log, and why the update was
    skipped, if it was, which is the same on all ranks."""
    loss = pipeline.run(batches)
    norm, loss = clip_gradients(pipeline.model, loss, cfg, pipeline.mesh)
    for group in optimizer.param_groups:
        group["lr"] = lr
    state["step"] += 1
    why = ""
    if not (math.isfinite(norm) and math.isfinite(loss)):
        why = "its loss or gradient is not finite"
    elif is_spike(state, loss, cfg.spike):
        why = f"its loss {loss:.4f} is a spike"
    else:
        optimizer.step()
        state["tokens"] += pipeline.cfg.batch_size * pipeline.cfg.seq_len
    optimizer.zero_grad()
    if why:
        print(f"step {state['step']} skipped: {why}")
    bpb = bits_per_byte(loss * batches[0]["n_targets"], batches[0]["n_bytes"])
    return {"loss": loss, "bpb": bpb, "lr": lr, "grad": norm, "tokens": state["tokens"]}, why

def train(pipeline, optimizer, plan, mixes, heldout, tokenizer, state, end, cfg, device):
    """Update the model until `end` tokens of the plan are read; False if a signal stops it."""
    reader = device, pipeline.data_rank, cfg.dp
    signals = catch_signals()
    thread = ThreadPoolExecutor(1)  # reads the next batch during an update

    def read_ahead():  # (index of the phase, future batch) of the next update
        position = max(min(state["position"], end - 1), 0)  # at the end, the last phase
        i = bisect.bisect_right([phase.begin for phase in plan], position) - 1
        return i, thread.submit(read_batch, mixes[i], state["sequences"], plan[i].cfg, *reader)

    saved = state["step"]
    phase = None
    n_skipped = 0
    i, ahead = read_ahead()
    while True:
        step = state["step"]
        if phase is not plan[i]:
            phase = plan[i]
            now = phase.cfg
            pipeline.start_phase(now)
            print(describe(phase))
            first_step = step
            pace = None  # seconds per update
        n_updates = updates_before(plan, state["position"])
        steps_left = math.ceil(updates_before(plan, end) - n_updates)
        error = ahead.exception()  # waits until that batch is read
        if step > first_step + 1:  # the first update may compile and is left out
            seconds = time.perf_counter() - clock
            pace = 0.9 * (pace or seconds) + 0.1 * seconds
        (stop,) = sum_over_ranks(len(signals) + (error is not None))
        is_over = steps_left <= 0 or stop
        is_due = step % cfg.save_every == 0 or step == first_step
        if cfg.out and step > saved and (is_over or (is_due and not n_skipped)):
            save_checkpoint(cfg.out, pipeline.saved, optimizer, state)
            saved = step
        if error:
            raise error
        if stop:
            return False
        if is_over and cfg.average and state["n_averaged"]:
            pipeline.use_average()
        if is_over or step % cfg.val_every == 0:
            validate(pipeline.evaluate, heldout, step, now, *reader)
        if is_over:
            return True

        clock = time.perf_counter()
        batches = ahead.result()
        state["sequences"] += now.batch_size
        state["position"] += phase.size
        i, ahead = read_ahead()
        sum_counts(batches, cfg.dp)
        lr = learning_rate(n_updates, cfg)
        row, why = pipeline_step(pipeline, optimizer, batches, lr, state, cfg)
        if phase.stage == "annealing" and cfg.average:
            update_average(pipeline, state, phase, cfg.average)
        if step == 0 or steps_left == 1 or state["step"] % cfg.log_every == 0:
            head = f"step {step + 1}/{step + steps_left}"
            tail = progress(state["tokens"], steps_left - 1, pace, now, device)
            log(cfg.out, step + 1, head, row, [f"stage {phase.stage}", *tail])
        n_skipped = n_skipped + 1 if "finite" in why else 0
        if saved and "spike" in why:
            go_back(pipeline, optimizer, state, Path(cfg.out, f"step_{saved:09d}"))
            saved = 0  # return once per checkpoint; until the next, a spike only skips its update
            i, ahead = read_ahead()  # the phase may be another
        elif n_skipped == 3 or (n_skipped and steps_left == 1):
            raise ValueError(f"no finite gradient in the last {n_skipped} steps to {step + 1}")
        elif phase.stage == "long-context" and state["position"] >= phase.end and tokenizer:
            needle = needle_loss(pipeline, heldout, tokenizer, now, device)
            print(f"needle {now.seq_len} | loss {needle:.4f}")

BUDGET = {"tokens", "long_tokens", "anneal_tokens"}  # fields that a run keeps when it is resumed

def plan_and_end(cfg, given, run):
    """(phases, tokens of the plan after which the run ends); run is config.json of a run that goes
    on, whose --steps cut it at as many tokens. Cuts the warm-up to a tenth of the stages."""
    # Departure: 8,000 updates are less than a hundredth of the paper's run; a short one would end
    # within them.
    plan = phases(cfg)
    end = plan[-1].end
    if cfg.steps:  # the inverse of updates_before
        end = bisect.bisect_left(range(end), cfg.steps, key=functools.partial(updates_before, plan))
    if run and run["steps"] and not given & {"steps", *BUDGET}:
        cfg.steps = run["steps"]
        end = run["end"]
    tenth = int(updates_before(plan, plan[-1].end)) // 10
    if cfg.warmup_steps > tenth:
        cfg.warmup_steps = tenth
        print(f"the warm-up is cut to {tenth} updates, a tenth of the stages")
    return plan, end

def restore(pipeline, optimizer, state, checkpoint, cfg):
    """Fill the parts of a run from a checkpoint, if there is one; it may have no average yet."""
    if checkpoint:
        keys = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        if any("average_tp" in key for key in keys):
            pipeline.add_average(cfg)
        load_checkpoint(checkpoint, pipeline.saved, optimizer, state)
    if cfg.anneal_tokens and cfg.average and pipeline.average is None:
        pipeline.add_average(cfg)

@record
def main(argv=None):
    """Run the command line: read the data, build or resume the run, train, export and sample."""
    with report_user_errors():
        cfg, given = parse(argv)
        check_directories(cfg.init, cfg.export, cfg.write_tokens)
        if cfg.init:
            theirs = read_llama_config(cfg.init) | {"seq_len": cfg.seq_len}
            cfg = dataclasses.replace(cfg, **theirs)
            if cfg.eval and not cfg.out:  # validates at the model's length
                cfg.ramp = ""
        if cfg.dry_run:
            return dry_run(cfg)
        device = init_distributed(cfg.timeout)
        ranks = dist.get_world_size()
        cfg = fit_ranks(cfg, ranks)
        check(cfg, ranks)

        shape = [name for name in SHAPE if name != "vocab_size"]  # which the data may decide
        fixed = {name: getattr(cfg, name) for name in ("tp", "pp", *shape)}
        if not cfg.eval:
            fixed |= {"seed": cfg.seed}
        checkpoint, run = newest_checkpoint(cfg.out, cfg.resume or cfg.eval, fixed)
        if cfg.eval and not checkpoint and not cfg.init:
            raise ValueError("--eval needs --out or --init, and --out a checkpoint")
        for name in BUDGET - given:  # a run that goes on has the stages of its first start
            setattr(cfg, name, run.get(name, getattr(cfg, name)))
        data = load_mixes(cfg)
        if not data:
            return
        tokenizer, mixes, heldout = data
        check(cfg, ranks)  # again, with the size of the vocabulary
        plan, end = plan_and_end(cfg, given, run)
        pipeline = Pipeline(cfg, make_mesh(cfg, device.type))
        init_weights(pipeline.model, cfg, pipeline.tp)
        if cfg.init:
            fill_layout_from_hf(pipeline.model, cfg.init, pipeline.tp)
        optimizer = build_optimizer(pipeline.model, cfg)
        state = {"step": 0, "sequences": 0, "position": 0, "tokens": 0}
        state |= {"n_averaged": 0, "watched": 0, "loss_mean": 0.0, "loss_variance": 0.0}
        restore(pipeline, optimizer, state, checkpoint, cfg)
        fingerprints = [mix.fingerprint() for mix in mixes]
        n_begun = sum(phase.begin < state["position"] for phase in plan)
        before = run.get("data_fingerprint", [])[:n_begun]
        if before != fingerprints[: len(before)] and not cfg.eval:
            raise ValueError(f"{checkpoint} has another data_fingerprint than --data")
        if cfg.eval:
            end = state["position"]
            cfg.out = ""  # nothing is written
        if cfg.out and dist.get_rank() == 0:
            run = dataclasses.asdict(cfg) | {"end": end, "data_fingerprint": fingerprints}
            lock = claim_directory(cfg.out, run)  # held while the run lives
        print(f"torch {torch.__version__} | {device.type} {cfg.precision} | tp {cfg.tp} x", end=" ")
        print(f"cp {cfg.cp} x pp {cfg.pp} x dp {cfg.dp}")
        print_sizes(plan, cfg)
        end = limit_to_layout(plan, state["position"], end)
        if not train(pipeline, optimizer, plan, mixes, heldout, tokenizer, state, end, cfg, device):
            return print(f"stopped after step {state['step']}")
        now = pipeline.cfg
        if cfg.export:
            to_hf(pipeline.model, now, cfg.export, pipeline.mesh)
        if tokenizer and cfg.tp * cfg.cp * cfg.pp == 1:  # else: --export, then --init and --eval
            ids = tokenizer.encode_ordinary(cfg.prompt)
            ids = ids or get_batch(heldout, 0, 1, now)["tokens"][0, :32].tolist()
            allowed_ids = torch.from_numpy(heldout.token_bytes > 0)
            print(tokenizer.decode(sample(pipeline.stages[0], ids, 256, allowed_ids, now)))

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
