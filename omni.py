r"""Qwen3.5-Omni Technical Report (Qwen Team, 2026, arXiv 2604.15804; "O35") in one file, with the
Qwen3-Omni Technical Report (2025, arXiv 2509.17765; "O3") for what it does not disclose.

One model reads text, images, audio and video, and writes and speaks. New against its parents,
gemma.py and, for the experts, kimi_muon.py:
- an audio encoder, AuT, trained from scratch with a text decoder: 16 times fewer tokens than mel
  frames, attention in windows whose length is drawn for each batch (O35 §2.2);
- a vision encoder for any resolution, with a merger of 2 x 2 patches (O3 §2.3);
- the Thinker: three Gated DeltaNets for each gated attention, a shared expert beside the routed
  ones, rotary positions of time, row and column, and timestamps in words (O35 §2.3);
- the Talker: one stream of text and speech (ARIA), several codes per frame of speech, predicted by
  an MTP module (O35 §2.4);
- training in stages, in which parts are frozen (O35 §3).

The papers give the structure, the stages, the token shares of stage S2 and the contexts; released
configurations of Qwen3-Omni and Qwen3.5 give sizes of the parts. The sizes of Qwen3.5-Omni, its
losses, its optimizer, its speech codec and its data are not disclosed: the choices of this script
are marked, its codec quantizes amplitudes of bands and is not learned, and its data are synthetic.
Left out: Code2Wav, the extra mergers of Qwen3-Omni's vision encoder (DeepStack), prompts that name
a task, the Talker's system prompt and its stage of long contexts, post-training.

Map: O35 §2.2 log_mel, AudioTransformer, AudioDecoder | §2.3 VisionTransformer, position_ids,
arrange_media, Thinker | §2.4 interleave, Talker | §3 STAGES. Gated DeltaNet: arXiv 2412.06464.
Legend: B batch, T positions, D width, H heads, K key-value heads or chosen experts, E head width, F
hidden width, V vocabulary, X experts, G codes of a frame of speech, W audio windows of S chunks, C
chunks, channels or positions of a chunk, M pairs of video frames of P patches, or rows that experts
read, N rows of all items together, R rotated dimensions of a head.
Conventions: rotary pairs are the two halves of the rotated part; norms are fp32; loss in nats per
target; a target of -100 is not scored; items are padded at their ends.

Run: python omni.py                              # a laptop: stage S2 alone, from scratch
     python omni.py --preset demo_walk --out walk    # all stages, and walk/t1/speech.wav
     torchrun --nproc_per_node=8 omni.py --ep 8  # GPUs: the preset small
     torchrun --nnodes=16 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \
         omni.py --preset 35b_a3b --ep 8 --stage a0 --decoder_layers 8 --init Qwen3.5-35B-A3B \
         --data manifest.jsonl --tokenizer ranks.tiktoken --out /shared/omni --resume
     then --stage s1a, s1b ... without --init: a stage begins with the one before it in --out.
     manifest.jsonl: {"text": "a dog barks", "audio": "a.wav", "video": "frames/", "fps": 25} ...
Expect: in four minutes on two CPU cores the demo, of 340 updates, comes to name the colour in an
image, the event in a sound and the pitch of a beep (100 % of held-out answers; 20, 9 and 55 % with
the image or sound zeroed) and shapes (66 %, zeroed 30 %). Walls, directions and synchrony it does
not learn: they stay at chance.
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
import wave
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
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

# ---------------------------------------- Config ----------------------------------------

@dataclasses.dataclass
class Config:
    """Run configuration: each field is a command-line flag, and its comment is the flag's help."""

    # Thinker: released configuration of Qwen3.5-35B-A3B
    vocab_size: int = 0  # V, entries of the vocabulary; 0: those of the tokenizer
    dim: int = 2048  # D, width of the Thinker's residual stream
    n_layers: int = 40  # blocks of the Thinker; every fourth has attention
    n_heads: int = 16  # H, query heads of attention
    n_kv_heads: int = 2  # K, key-value heads of attention
    head_dim: int = 256  # E, width of a head of attention
    rotary_dim: int = 64  # R, dimensions of a head that are rotated
    rope_theta: float = 1e7  # base of the rotary frequencies
    key_heads: int = 16  # key heads of Gated DeltaNet
    value_heads: int = 32  # value heads of Gated DeltaNet
    delta_head_dim: int = 128  # width of a head of Gated DeltaNet
    n_experts: int = 256  # X, routed experts of a block
    top_k: int = 8  # routed experts of a token
    expert_dim: int = 512  # F, width of a routed expert
    shared_dim: int = 512  # width of the shared expert
    # AuT: sizes of Qwen3-Omni, convolutions of Qwen3.5-Omni
    audio_dim: int = 1280  # width of the audio encoder
    audio_layers: int = 32  # blocks of the audio encoder
    audio_heads: int = 20  # attention heads of the audio encoder
    audio_hidden: int = 5120  # width of the audio encoder's feed-forward layer
    audio_channels: int = 480  # channels of the audio encoder's convolutions
    audio_convs: int = 4  # convolutions of stride 2: 3 give 80 ms a token, 4 give 160 ms
    audio_chunk: int = 160  # mel frames of 10 ms that are convolved together
    audio_window: int = 800  # largest attention window of the audio encoder, in mel frames
    decoder_layers: int = 0  # blocks of the text decoder of stage a0; 0: no such decoder
    # Vision encoder: released configuration
    vision_dim: int = 1152  # width of the vision encoder
    vision_layers: int = 27  # blocks of the vision encoder
    vision_heads: int = 16  # attention heads of the vision encoder
    vision_hidden: int = 4304  # width of the vision encoder's feed-forward layer
    patch: int = 16  # side of a patch in pixels
    position_side: int = 48  # side of the table of learned positions
    # Talker
    talker_layers: int = 0  # blocks of the Talker; 0: no Talker
    talker_dim: int = 1024  # width of the Talker and of its MTP module
    mtp_layers: int = 5  # blocks of the MTP module
    n_codebooks: int = 16  # G, codes of a frame of speech
    codebook_size: int = 64  # entries of a codebook
    # Data
    data: str = ""  # a manifest.jsonl; empty: synthetic shapes and sounds, and Python's source
    # Departure: the paper's shares are of tokens (O35 §3), these are of items.
    mix: str = "text:.214,audio:.464,image:.221,video:.033,av:.068"  # shares of synthetic items
    time: Literal["text", "abs"] = "text"  # how time is given: timestamps in text, or position ids
    # Departure: the paper's rate is dynamic (O35 §2.3), here it is the same for all videos.
    fps: float = 1.25  # frames per second that videos are sampled at
    min_pixels: int = 65536  # smallest area of an image after resizing
    max_pixels: int = 16777216  # largest area of an image after resizing
    image_size: int = 64  # side in pixels of synthetic images and frames
    n_frames: int = 8  # frames of a synthetic video
    seq_len: int = 32768  # characters of a synthetic text; tokens of an item in --dry_run
    tokenizer: str = ""  # bytes, an encoding of tiktoken or a BPE rank file; empty: bytes
    # Optimization
    stage: Literal["a0", "lm", "s1a", "s1b", "s2", "s3", "t1", "all"] = "s2"  # stage of training
    batch_size: int = 32  # items per update, over all ranks
    micro_batch: int = 0  # mean items per forward pass on a rank; 0: as many as the batch allows
    steps: int = 1000  # updates of the stage
    lr: float = 2e-4  # peak learning rate
    encoder_scale: float = 0.25  # learning rate of the encoders over --lr; a0 ignores it
    warmup: float = 0.03  # share of the updates that warm up the learning rate
    weight_decay: float = 0.1  # decoupled weight decay of matrices and of the gains 1 + w
    balance_loss: float = 1e-3  # weight of the balance loss
    clip: float = 1.0  # maximum norm of the gradient; 0: no clipping
    seed: int = 0  # seed of the weights and the data
    # Machine
    dp: int = 0  # ranks that have the same experts and shard them; 0: all ranks / ep
    ep: int = 1  # ranks among which the experts of a block are divided
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    recompute: Literal["none", "block"] = "none"  # block: recompute blocks in the backward pass
    timeout: int = 600  # timeout of a collective, in seconds
    dry_run: bool = False  # print parameters, FLOPs and memory per rank, then exit
    world_size: int = 1  # number of ranks that --dry_run plans for
    # Reports and files
    log_every: int = 10  # updates between log lines
    val_every: int = 1000  # updates between validations
    val_items: int = 64  # held-out items of each modality per validation
    out: str = ""  # directory of checkpoints, metrics.jsonl and config.json; empty: write nothing
    save_every: int = 1000  # updates between checkpoints
    resume: bool = False  # continue from the newest checkpoint in --out, if there is one
    eval: bool = False  # validate the model of --init or --out, without training
    init: str = ""  # Hugging Face directory to start from; its shape replaces that of the flags
    export: str = ""  # Hugging Face directory to write all but the Talker to after training

TINY = dict(  # for bytes, and images of 32 x 32 pixels
    dim=128, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=32, rotary_dim=16, key_heads=2,
    value_heads=4, delta_head_dim=32, n_experts=8, top_k=2, expert_dim=64, shared_dim=64,
    audio_dim=96, audio_layers=2, audio_heads=4, audio_hidden=192, audio_channels=16,
    vision_dim=96, vision_layers=2, vision_heads=4, vision_hidden=192, patch=8, position_side=16,
    min_pixels=1, image_size=32, n_frames=4, seq_len=64, batch_size=24, lr=1.2e-3,
    encoder_scale=1.0, log_every=25, mix="text:.1,audio:.3,image:.25,video:.25,av:.1",
)  # fmt: skip
PRESETS = {
    # A CPU, four minutes: stage S2 alone, from scratch. Most items are images and videos, because
    # shapes are learned late, after about 5,000 of them.
    "demo": TINY | dict(
        mix="text:.05,audio:.2,image:.38,video:.32,av:.05", batch_size=48, steps=340,
    ),
    # The same through all stages, with a Talker; 200 updates each.
    "demo_walk": TINY | dict(
        stage="all", steps=200, decoder_layers=1, talker_layers=4, talker_dim=96, mtp_layers=1,
    ),
    # One GPU of 24 GB or a node of them, minutes: for images of 64 x 64 pixels.
    "small": TINY | dict(
        dim=256, n_layers=8, head_dim=64, rotary_dim=32, key_heads=4, value_heads=8, n_experts=16,
        top_k=4, expert_dim=128, shared_dim=128, audio_dim=192, audio_layers=4, audio_hidden=768,
        audio_channels=64, vision_dim=192, vision_layers=4, vision_hidden=768, image_size=64,
        n_frames=8, seq_len=256, batch_size=96, steps=2000, val_every=500, lr=1e-3,
    ),
    # Undisclosed: the sizes of Qwen3.5-Omni. These are the backbones and the vision encoder of
    # Qwen3.5, and the AuT of Qwen3-Omni with a fourth convolution and with chunks of 160 frames,
    # which are exactly 10 tokens of 160 ms. Undisclosed, too: the batch, here 1,024 items. There is
    # no AuT decoder and no Talker: stage a0 needs --decoder_layers; for t1, every stage before it
    # needs the same --talker_layers, since a stage loads all of its parts from the one before.
    "35b_a3b": dict(
        vocab_size=248320, batch_size=1024, precision="bf16", micro_batch=1, recompute="block",
    ),
    "397b_a17b": dict(
        vocab_size=248320, dim=4096, n_layers=60, n_heads=32, value_heads=64, n_experts=512,
        top_k=10, expert_dim=1024, shared_dim=1024, batch_size=1024, precision="bf16",
        micro_batch=1, recompute="block",
    ),
}  # fmt: skip
SPECIALS = {  # and their ids in Qwen3.5, counted from its last rank; of audio, in Qwen3-Omni
    "<|endoftext|>": 0, "<|audio_start|>": 26, "<|audio_pad|>": 32, "<|audio_end|>": 27,
    "<|vision_start|>": 9, "<|vision_end|>": 10, "<|image_pad|>": 12, "<|video_pad|>": 13,
}  # fmt: skip
PATTERN = (  # how Qwen3.5 splits text into words, as released, for BPE rank files
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# ---------------------------------------- Audio ----------------------------------------

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

def rotate(x, cos, sin):
    """Rotary embedding of x [B, H, T, E] by the angles of cos and sin [T, E/2], in fp32."""
    first, second = x.float().chunk(2, -1)  # [B, H, T, E/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).type_as(x)

def causal_attention(q, k, v, scale):
    """softmax(q kᵀ scale) v over this and all earlier positions; query head j uses key-value head
    j // (H / K). [B, H, T, E], [B, K, T, E] twice -> [B, H, T, E]."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

def mel_filters(n_mels, n_fft, rate):
    """Triangular filters on Slaney's mel scale, each of area 1: [n_fft / 2 + 1, n_mels]."""
    mels = np.linspace(0, 15 + 27 * math.log(rate / 2000) / math.log(6.4), n_mels + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))  # in Hz
    bins = np.linspace(0, rate / 2, n_fft // 2 + 1)[:, None]
    left = edges[:-2]
    center = edges[1:-1]
    right = edges[2:]
    triangles = np.minimum((bins - left) / (center - left), (right - bins) / (right - center))
    return torch.from_numpy(np.maximum(triangles, 0) * 2 / (right - left)).float()

def log_mel(wave):
    """Log-mel spectrogram of a wave at 16 kHz in [-1, 1]: [n] -> [128, n // 160], fp32. A frame of
    25 ms every 10 ms; values at least 80 dB below the clip's maximum are equal (released)."""
    window = torch.hann_window(400)
    spectrum = torch.stft(wave, 400, 160, window=window, return_complex=True)  # [201, n // 160 + 1]
    power = spectrum[:, :-1].abs() ** 2
    mel = (mel_filters(128, 400, 16000).T @ power).clamp(min=1e-10).log10()
    return (mel.clamp(min=mel.max() - 8) + 4) / 4

def conv_length(n, n_convs):
    """Length of n frames (or mel bands) after n_convs convolutions of stride 2; a tensor or int."""
    for _ in range(n_convs):
        n = (n - 1) // 2 + 1
    return n

def count_audio_tokens(n_frames, chunk, n_convs):
    """Tokens of a clip of n_frames, whose chunks are convolved one by one (O3 §2.2)."""
    n_chunks, rest = divmod(n_frames, chunk)
    return n_chunks * conv_length(chunk, n_convs) + (conv_length(rest, n_convs) if rest else 0)

def cut_into_windows(mels, chunk, window):
    """Clips [128, n], each cut into chunks of `chunk` frames and these into windows of `window`
    chunks: mel [W, S, 128, chunk], zero where there is no sound, and the frames of each chunk
    [W, S], 0 for a chunk that is not there."""
    parts = [part for mel in mels for part in mel.split(window * chunk, 1)]
    S = max(math.ceil(part.shape[1] / chunk) for part in parts)
    mel = torch.stack([F.pad(part, (0, S * chunk - part.shape[1])) for part in parts])
    lengths = torch.tensor([part.shape[1] for part in parts])[:, None]
    n_frames = (lengths - chunk * torch.arange(S)).clamp(0, chunk)
    return mel.unflatten(2, (S, chunk)).transpose(1, 2), n_frames

def sinusoids(positions, dim):
    """Whisper's position embedding, [...] -> [..., D]: sines, then cosines."""
    i = torch.arange(dim // 2, device=positions.device)
    angles = positions[..., None] * 10000.0 ** (-i / (dim // 2 - 1))
    return torch.cat((angles.sin(), angles.cos()), -1)

class LayerNorm(nn.LayerNorm):
    """A LayerNorm in fp32, whose result is cast back."""

    def forward(self, x):
        settings = self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        return F.layer_norm(x.float(), *settings).type_as(x)

class EncoderBlock(nn.Module):
    """Attention and a GELU layer, each behind a norm: [B, T, D] -> [B, T, D]. mask, [B, 1, 1, T] or
    [T, T], is true for keys that a query attends to; rope: (cos, sin) of queries and keys, or None.
    """

    def __init__(self, dim, n_heads, hidden_dim, eps, gelu):
        super().__init__()
        self.n_heads = n_heads
        self.gelu = gelu
        self.norm1 = LayerNorm(dim, eps=eps)
        self.qkv = Linear(dim, 3 * dim)
        self.out = Linear(dim, dim)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.up = Linear(dim, hidden_dim)
        self.down = Linear(hidden_dim, dim)

    def forward(self, x, mask, rope=None):
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.n_heads, -1))  # [B, T, 3, H, E]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, T, E] each
        if rope:
            q = rotate(q, *rope)
            k = rotate(k, *rope)
        y = F.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate=self.gelu))

class AudioTransformer(nn.Module):
    """AuT (O3 §2.2, O35 §2.2): windows of log-mel chunks [W, S, 128, chunk] with n_frames [W, S] ->
    features [N, D] of the N tokens of all clips. Each convolution halves bands and frames:
    three give 80 ms a token, four 160 ms."""

    def __init__(self, channels, n_convs, dim, n_layers, n_heads, hidden_dim):
        super().__init__()
        self.dim = dim
        sizes = [1] + [channels] * n_convs
        self.convs = nn.ModuleList(
            nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)
            for c_in, c_out in itertools.pairwise(sizes)
        )
        self.conv_out = Linear(channels * conv_length(128, n_convs), dim, bias=False)
        self.blocks = nn.ModuleList(
            EncoderBlock(dim, n_heads, hidden_dim, 1e-5, "none") for _ in range(n_layers)
        )
        self.final_norm = LayerNorm(dim, eps=1e-5)

    def forward(self, mel, n_frames, dtype):
        present = n_frames > 0  # [W, S]
        y = mel[present][:, None].to(dtype)  # [C, 1, 128, chunk]
        for conv in self.convs:
            weights = conv.weight.to(dtype), conv.bias.to(dtype)
            y = F.gelu(F.conv2d(y, *weights, stride=2, padding=1))
        y = self.conv_out(y.permute(0, 3, 1, 2).flatten(2))  # [C, tokens of a chunk, D]
        positions = torch.arange(y.shape[1], device=y.device)  # restart in every chunk
        y = y + sinusoids(positions, self.dim).to(dtype)
        x = y.new_zeros(*n_frames.shape, *y.shape[1:])  # [W, S, tokens of a chunk, D]
        x[present] = y
        x = x.flatten(1, 2)  # [W, T, D]
        n_tokens = conv_length(n_frames, len(self.convs)).where(present, 0)  # [W, S]
        exists = (positions < n_tokens[..., None]).flatten(1)  # [W, T]
        for block in self.blocks:  # a window attends to itself alone
            x = block(x, exists[:, None, None])
        return self.final_norm(x[exists])  # [N, D]

class Adapter(nn.Module):
    """Two linear layers between the widths of two parts: [..., D] -> [..., out_dim]."""

    def __init__(self, dim, hidden_dim, out_dim, activation=F.gelu):
        super().__init__()
        self.activation = activation
        self.up = Linear(dim, hidden_dim)
        self.down = Linear(hidden_dim, out_dim)

    def forward(self, x):
        return self.down(self.activation(self.up(x)))

class DecoderBlock(nn.Module):
    """Cross-attention to a memory [B, T, D], then causal self-attention and a GELU layer:
    x [B, T, D] -> [B, T, D]. causal [T, T] and memory_mask [B, 1, 1, T] are true for keys that a
    query attends to."""

    def __init__(self, dim, n_heads, hidden_dim):
        super().__init__()
        self.self_block = EncoderBlock(dim, n_heads, hidden_dim, 1e-5, "none")
        self.n_heads = n_heads
        self.norm = LayerNorm(dim, eps=1e-5)
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.out = Linear(dim, dim)

    def forward(self, x, causal, memory, memory_mask):
        q = self.q(self.norm(x)).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # [B, H, T, E]
        kv = self.kv(memory).unflatten(-1, (2, self.n_heads, -1))  # [B, T, 2, H, E]
        k, v = kv.permute(2, 0, 3, 1, 4)  # [B, H, T, E] each
        y = F.scaled_dot_product_attention(q, k, v, memory_mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.self_block(x, causal)

class AudioDecoder(nn.Module):
    """The text decoder of AuT's pre-training, dropped afterwards (O35 §2.2): tokens [B, T], and
    memory [B, T, D] with audio features where is_audio [B, T] -> its head's input [B, T, D]."""

    # Undisclosed: depth, width and order of its layers. It has the encoder's width. Departure: it
    # reads the item as the Thinker does, with the placeholders and timestamps before the text.

    def __init__(self, vocab_size, dim, n_layers, n_heads, hidden_dim):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(DecoderBlock(dim, n_heads, hidden_dim) for _ in range(n_layers))
        self.final_norm = LayerNorm(dim, eps=1e-5)
        self.head = Linear(dim, vocab_size, bias=False)

    def forward(self, tokens, memory, is_audio):
        positions = (~is_audio).cumsum(1)  # of the text
        x = self.token_embedding(tokens).type_as(memory)
        x = x + sinusoids(positions, x.shape[-1]).type_as(x)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        for block in self.blocks:
            x = block(x, causal, memory, is_audio[:, None, None])
        return self.final_norm(x)

# ---------------------------------------- Vision ----------------------------------------

def smart_resize(height, width, factor, min_pixels, max_pixels):
    """Height and width rounded to multiples of factor, with an area in [min_pixels, max_pixels]
    (released)."""
    sides = height, width
    new_sides = [round(side / factor) * factor for side in sides]
    if math.prod(new_sides) > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_sides = [max(factor, math.floor(side / scale / factor) * factor) for side in sides]
    elif math.prod(new_sides) < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_sides = [math.ceil(side * scale / factor) * factor for side in sides]
    return tuple(new_sides)

def cut_into_patches(frames, patch, min_pixels, max_pixels):
    """Frames [n, H, W, 3] of 0 ... 255, resized, as patches of two frames, [t, h w, 3 · 2 · p · p]
    in fp32, in the order of 2 x 2 blocks, and (h, w). If n is odd, as for an image, the last frame
    is repeated."""
    height, width = smart_resize(*frames.shape[1:3], 2 * patch, min_pixels, max_pixels)
    x = torch.from_numpy(np.ascontiguousarray(frames)).float().permute(0, 3, 1, 2)  # [n, 3, H, W]
    if x.shape[2:] != (height, width):
        x = F.interpolate(x, (height, width), mode="bicubic", antialias=True).round().clamp(0, 255)
    x = x / 127.5 - 1
    if len(x) % 2:
        x = torch.cat((x, x[-1:]))
    x = x.unflatten(0, (-1, 2)).unflatten(3, (-1, 2, patch)).unflatten(6, (-1, 2, patch))
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # [t, h / 2, w / 2, 2, 2, 3, 2, p, p]
    return x.flatten(1, 4).flatten(2), (height // patch, width // patch)

class VisionTransformer(nn.Module):
    """The encoder of images and videos (O3 §2.3): patches [M, P, 3 · 2 · p · p] of M pairs of
    frames with their sizes grid [M, 2] in patches -> features [N, out_dim] of the N blocks of 2 x 2
    patches. Each pair of frames attends to itself alone."""

    # Undisclosed: whether features of its middle layers are added in the Thinker (DeepStack, O3).
    # They are not here, as in the released Qwen3.5.

    def __init__(self, patch, side, dim, n_layers, n_heads, hidden_dim, out_dim):
        super().__init__()
        self.head_dim = dim // n_heads
        self.side = side
        self.patch_embedding = Linear(6 * patch**2, dim)  # a Conv3d whose stride is its kernel
        self.position_embedding = nn.Embedding(side**2, dim)
        self.blocks = nn.ModuleList(
            EncoderBlock(dim, n_heads, hidden_dim, 1e-6, "tanh") for _ in range(n_layers)
        )
        self.merger_norm = LayerNorm(dim, eps=1e-6)
        self.merger = Adapter(4 * dim, 4 * dim, out_dim)

    def forward(self, patches, grid, dtype):
        # Row and column of each patch, in the order of 2 x 2 blocks; smaller grids are padded.
        index = torch.arange(patches.shape[1], device=grid.device)  # [P]
        block = index // 4
        within_block = index % 4
        row = block // (grid[:, 1:] // 2) * 2 + within_block // 2  # [M, P]
        column = block % (grid[:, 1:] // 2) * 2 + within_block % 2
        exists = index < grid.prod(1, keepdim=True)
        coordinates = torch.stack((row, column), -1).where(exists[..., None], 0)  # [M, P, 2]

        x = self.patch_embedding(patches.to(dtype)) + self.positions(coordinates, grid).to(dtype)
        i = torch.arange(self.head_dim // 4, device=grid.device)
        frequencies = 10000.0 ** (-4 * i / self.head_dim)
        angles = (coordinates[..., None] * frequencies).flatten(2)[:, None]  # [M, 1, P, E/2]
        rope = angles.cos(), angles.sin()
        for encoder_block in self.blocks:
            x = encoder_block(x, exists[:, None, None], rope)
        x = self.merger_norm(x).unflatten(1, (-1, 4)).flatten(2)  # [M, P / 4, 4 D]
        return self.merger(x[exists[:, ::4]])  # [N, out_dim]

    def positions(self, coordinates, grid):
        """Position embedding of each patch, [M, P, 2] -> [M, P, D]: bilinear interpolation of the
        learned side x side table, whose corners are the corners of the grid."""
        scaled = coordinates * (self.side - 1) / (grid - 1)[:, None]
        low = scaled.floor().long()  # [M, P, 2]
        high = (low + 1).clamp(max=self.side - 1)
        weight = scaled - low
        total = 0.0
        for y, wy in ((low[..., 0], 1 - weight[..., 0]), (high[..., 0], weight[..., 0])):
            for x, wx in ((low[..., 1], 1 - weight[..., 1]), (high[..., 1], weight[..., 1])):
                total = total + self.position_embedding(y * self.side + x) * (wy * wx)[..., None]
        return total

# ---------------------------------------- Thinker ----------------------------------------

@dataclasses.dataclass
class Segment:
    """A part of an item: token ids of text, or audio and frames that begin at the same time. grid:
    temporal patches, rows and columns of tokens; step: position ids per temporal patch."""

    text: list = ()
    n_audio: int = 0
    grid: tuple = (0, 0, 0)
    step: float = 0.0

TEXT, AUDIO, VISION = range(3)  # kinds of tokens

def position_ids(segments):
    """TM-RoPE (O3 §2.3): ids of time, row and column [3, T], and the kind of each token [T].

    Each segment starts at 1 + the largest id before it. The three ids of a text or audio token are
    equal and increase by one per token. The time id of a patch increases by `step` per temporal
    patch; its row and column count from the segment's start. Tokens of audio and frames that begin
    at the same time are sorted by time id, frames first.
    """
    ids = []
    kinds = []
    start = 0
    for segment in segments:
        text = np.tile(np.arange(len(segment.text)), (3, 1))
        t, h, w = np.indices(segment.grid).reshape(3, -1)
        patches = np.stack((t * segment.step, h, w))
        audio = np.tile(np.arange(segment.n_audio), (3, 1))
        parts = np.concatenate((text, patches, audio), 1) + start
        kind = np.repeat((TEXT, VISION, AUDIO), (text.shape[1], len(t), segment.n_audio))
        order = parts[0].argsort(kind="stable")
        ids.append(parts[:, order])
        kinds.append(kind[order])
        start = parts.max() + 1
    return np.concatenate(ids, 1), np.concatenate(kinds)

def rotary_angles(positions, dim, theta):
    """(cos, sin) [B, 1, T, R/2] of the angles of ids [3, B, T] for R = dim rotary dimensions. The
    ids of time, row and column take turns: t h w t h w ... (O3 §2.3)."""
    # Undisclosed: the shares of the three ids in Qwen3.5-Omni. A third each, as in Qwen3.5.
    i = torch.arange(dim // 2, device=positions.device)
    angles = positions.float()[i % 3].permute(1, 2, 0) * theta ** (-2 * i / dim)  # [B, T, R/2]
    return angles.cos()[:, None], angles.sin()[:, None]

def gated_delta_rule(q, k, v, g, beta, chunk=64):
    """The gated delta rule (arXiv 2412.06464) with normed q and k, in chunks of matrix products.

    S_t = e^{g_t} (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ and o_t = S_tᵀ q_t / sqrt(E), S_0 = 0.
    q, k [B, H, T, E], v [B, H, T, E'], g and beta [B, H, T] -> o [B, H, T, E'] and the last S.
    """
    T = q.shape[2]
    chunk = min(chunk, T)
    q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6) * q.shape[-1] ** -0.5
    k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
    q, k, v = (F.pad(x, (0, 0, 0, -T % chunk)).unflatten(2, (-1, chunk)) for x in (q, k, v))
    g, beta = (F.pad(x, (0, -T % chunk)).unflatten(2, (-1, chunk)) for x in (g, beta))

    # Within chunks of C positions; matrices are [B, H, T / C, C, C] or [B, H, T / C, C, E].
    L = g.cumsum(-1)
    above = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    decay = (L[..., None] - L[..., None, :]).masked_fill(above, -math.inf).exp()  # Γ
    A = beta[..., None] * (k @ k.mT) * decay  # below the diagonal, which is 1 to the solver
    sides = torch.cat((v, L.exp()[..., None] * k), -1) * beta[..., None]
    solved = torch.linalg.solve_triangular(A, sides, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[-1], k.shape[-1]], -1)  # A⁻¹ β V and A⁻¹ β e^L K
    scores = (q @ k.mT) * decay
    q = q * L.exp()[..., None]
    k = k * (L[..., -1:] - L).exp()[..., None]

    # From chunk to chunk: V' = U - W S, O = e^L Q S + (Q Kᵀ ⊙ Γ) V', S ← e^{L_C} S + Kᵀ V'.
    outputs = []
    S = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1])
    end = L[..., -1:, None].exp()  # decay over a complete chunk
    # unbind: the backward pass of indexing would allocate a tensor of all chunks for each chunk.
    for q, k, u, w, scores, end in zip(*(x.unbind(2) for x in (q, k, u, w, scores, end))):
        new = u - w @ S  # V'
        outputs.append(q @ S + scores @ new)
        S = end * S + k.mT @ new
    return torch.cat(outputs, 2)[:, :, :T], S

class GatedDeltaNet(nn.Module):
    """Gated DeltaNet, [B, T, D] -> [B, T, D]: H_v value heads of width E, of which H_v / H_k share
    a key head; queries, keys and values pass a causal convolution over four positions."""

    def __init__(self, dim, key_heads, value_heads, head_dim):
        super().__init__()
        self.key_heads = key_heads
        self.value_heads = value_heads
        self.head_dim = head_dim
        key_dim = key_heads * head_dim
        value_dim = value_heads * head_dim
        self.qkv = Linear(dim, 2 * key_dim + value_dim, bias=False)
        self.z = Linear(dim, value_dim, bias=False)
        self.b = Linear(dim, value_heads, bias=False)
        self.a = Linear(dim, value_heads, bias=False)
        self.conv = nn.Parameter(torch.empty(2 * key_dim + value_dim, 4))
        self.A_log = nn.Parameter(torch.empty(value_heads))
        self.dt_bias = nn.Parameter(torch.empty(value_heads))
        self.gated_norm = nn.Parameter(torch.empty(head_dim))
        self.o = Linear(value_dim, dim, bias=False)

    def forward(self, x, cos, sin):
        qkv = self.qkv(x).mT  # [B, C, T]
        weight = self.conv.type_as(x)[:, None]
        qkv = F.silu(F.conv1d(F.pad(qkv, (3, 0)), weight, groups=len(weight)))
        qkv = qkv.unflatten(1, (-1, self.head_dim)).mT.float()  # [B, heads, T, E]
        q, k, v = qkv.split([self.key_heads, self.key_heads, self.value_heads], 1)
        q = q.repeat_interleave(self.value_heads // self.key_heads, 1)
        k = k.repeat_interleave(self.value_heads // self.key_heads, 1)
        beta = self.b(x).float().sigmoid().mT  # [B, H_v, T]
        g = -self.A_log.float().exp() * F.softplus(self.a(x).float() + self.dt_bias.float())
        y, _ = gated_delta_rule(q, k, v, g.mT, beta)  # in fp32
        y = F.rms_norm(y, (self.head_dim,), self.gated_norm.float(), 1e-6)
        y = y.transpose(1, 2).flatten(2) * F.silu(self.z(x).float())  # the norm before the gate
        return self.o(y.type_as(x))

class GatedAttention(nn.Module):
    """Grouped-query attention whose output passes a sigmoid gate, [B, T, D] -> [B, T, D]. The first
    R dimensions of a head's normed query and key are rotated by the R / 2 angles of cos and sin."""

    def __init__(self, dim, n_heads, n_kv_heads, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.q = Linear(dim, 2 * n_heads * head_dim, bias=False)  # of each head, query and gate
        self.k = Linear(dim, n_kv_heads * head_dim, bias=False)
        self.v = Linear(dim, n_kv_heads * head_dim, bias=False)
        self.q_norm = UnitOffsetRMSNorm(head_dim)
        self.k_norm = UnitOffsetRMSNorm(head_dim)
        self.out = Linear(n_heads * head_dim, dim, bias=False)

    def forward(self, x, cos, sin):
        q, gate = self.q(x).unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, -1)  # [B, T, H, E]
        k = self.k(x).unflatten(-1, (-1, self.head_dim))  # [B, T, K, E]
        v = self.v(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, K, T, E]
        q = self.rotate_part(self.q_norm(q).transpose(1, 2), cos, sin)  # [B, H, T, E]
        k = self.rotate_part(self.k_norm(k).transpose(1, 2), cos, sin)
        y = causal_attention(q, k, v, self.head_dim**-0.5)
        return self.out(y.transpose(1, 2).flatten(2) * gate.flatten(2).sigmoid())

    def rotate_part(self, x, cos, sin):
        """x [B, H, T, E] with its first R dimensions rotated."""
        R = 2 * cos.shape[-1]
        return torch.cat((rotate(x[..., :R], cos, sin), x[..., R:]), -1)

class GatedMLP(nn.Module):
    """SwiGLU, (silu(x W_gate) * x W_up) W_down: [B, T, D] -> [B, T, D]."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden_dim, bias=False)
        self.down = Linear(hidden_dim, dim, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)  # [B, T, F] each
        return self.down(F.silu(gate) * up)

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

class SharedExpertMoE(nn.Module):
    """K of X routed experts per token, and a shared one behind a sigmoid gate: x [B, T, D] ->
    [B, T, D], and the balance loss X Σ_i f_i p_i, summed over the tokens that exist [B, T]. f_i are
    assignments to expert i per token, p_i its probability. No token is dropped."""

    # Departure: f is the share of the global batch of the update before, so that the losses of
    # micro-batches and ranks add up to that of the global batch.

    def __init__(self, dim, expert_dim, shared_dim, n_experts, top_k):
        super().__init__()
        self.top_k = top_k
        self.router = nn.Parameter(torch.empty(n_experts, dim))
        self.experts = Experts(n_experts, dim, expert_dim)
        self.shared = GatedMLP(dim, shared_dim)
        self.shared_gate = Linear(dim, 1, bias=False)
        self.register_buffer("share", torch.full((n_experts,), top_k / n_experts))  # f
        self.register_buffer("load", torch.zeros(n_experts), persistent=False)

    def forward(self, x, exists):
        p = F.linear(x.flatten(0, 1).float(), self.router.float()).softmax(-1)  # [N, X]
        gates, experts = p.topk(self.top_k, -1)  # [N, K] each
        gates = gates / gates.sum(-1, keepdim=True)
        exists = exists.flatten()[:, None]
        balance = len(self.share) * (p * self.share * exists).sum()
        if self.training:  # recomputation counts all tokens twice, which leaves the shares alone
            self.load += (torch.zeros_like(p).scatter(1, experts, 1.0) * exists).sum(0)

        rows = experts.flatten()
        counts = torch.zeros_like(self.share, dtype=torch.int64)
        counts = counts.index_add(0, rows, torch.ones_like(rows))  # [X]
        order = rows.argsort(stable=True)  # [N K], by expert
        inverse = order.argsort()
        rows = Permute.apply(x.flatten(0, 1), order, inverse, self.top_k)  # [N K, D]
        y = self.experts(rows, gates.flatten().gather(0, order), counts)
        y = Permute.apply(y, inverse, order, 1).unflatten(0, (-1, self.top_k))  # [N, K, D]
        y = y.sum(1).view_as(x)
        return y + self.shared_gate(x).sigmoid() * self.shared(x), balance

class Block(nn.Module):
    """A mixer and experts, each behind a norm: x [B, T, D] -> x and the balance loss. Every fourth
    mixer is attention, the others are Gated DeltaNets (O35 §2.1)."""

    def __init__(self, cfg, dim, index):
        super().__init__()
        self.mixer_norm = UnitOffsetRMSNorm(dim)
        if (index + 1) % 4 == 0:
            self.mixer = GatedAttention(dim, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim)
        else:
            self.mixer = GatedDeltaNet(dim, cfg.key_heads, cfg.value_heads, cfg.delta_head_dim)
        self.moe_norm = UnitOffsetRMSNorm(dim)
        self.moe = SharedExpertMoE(dim, cfg.expert_dim, cfg.shared_dim, cfg.n_experts, cfg.top_k)

    def forward(self, x, cos, sin, exists):
        x = x + self.mixer(self.mixer_norm(x), cos, sin)
        y, balance = self.moe(self.moe_norm(x), exists)
        return x + y, balance

class Thinker(nn.Module):
    """The text model (O35 §2): embeddings x [B, T, D] with position ids [3, B, T] -> the input of
    the head and the states before block L / 2, both [B, T, D], and the sum of balance losses."""

    def __init__(self, cfg):
        super().__init__()
        self.rotary_dim = cfg.rotary_dim
        self.rope_theta = cfg.rope_theta
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.blocks = nn.ModuleList(Block(cfg, cfg.dim, i) for i in range(cfg.n_layers))
        self.final_norm = UnitOffsetRMSNorm(cfg.dim)
        self.head = Linear(cfg.dim, cfg.vocab_size, bias=False)

    def forward(self, x, positions, exists):
        rope = rotary_angles(positions, self.rotary_dim, self.rope_theta)
        balance = 0.0
        for i, block in enumerate(self.blocks):
            if i == len(self.blocks) // 2:
                middle = x
            x, loss = block(x, *rope, exists)
            balance = balance + loss
        return self.final_norm(x), middle, balance

# ---------------------------------------- Talker ----------------------------------------

# Departure: the codec of Qwen3.5-Omni, residual vector quantization and a convolutional decoder
# (Code2Wav), is learned and undisclosed. This one needs no learning and decodes to sound: a frame
# of 80 ms is G codes. Code 0 is the loudest band, code g the amplitude of band g.
FRAME = 1280  # samples of a codec frame at 16 kHz
BANDS = np.array(  # Hz; the rows and the columns of the letters' two tones, and others between
    [250, 697, 770, 852, 941, 1045, 1209, 1336, 1477, 1633, 1805, 1990, 350, 480, 2500, 3000]
)

def band_waves(n_bands):
    """Sines and cosines of the first n_bands bands over a frame: [2, bands, FRAME]."""
    angles = 2 * math.pi * BANDS[:n_bands, None] * np.arange(FRAME) / 16000
    return np.stack((np.sin(angles), np.cos(angles)))

def encode_speech(wave, n_codebooks, codebook_size):
    """Codes [frames, G] of a wave at 16 kHz: levels of amplitude between 0 and 1, quietest 0."""
    frames = wave[: len(wave) // FRAME * FRAME].reshape(-1, FRAME)
    parts = np.einsum("ft,cbt->cfb", frames, band_waves(n_codebooks)) * 2 / FRAME
    amplitude = np.hypot(*parts)  # [frames, G]
    codes = np.rint(amplitude.clip(0, 1) * (codebook_size - 1)).astype(np.int64)
    codes[:, 0] = amplitude.argmax(1)
    return codes

def decode_speech(codes, codebook_size):
    """The wave of codes [frames, G]: a sum of sines, each frame alone."""
    amplitude = codes / (codebook_size - 1)
    amplitude[:, 0] = (codes[:, 0] == 0) * amplitude[:, 1:].max(1)  # 0 in silence
    return (amplitude @ band_waves(codes.shape[1])[0]).flatten()

def interleave(n_text, n_speech, lead):
    """ARIA (O35 §2.4): the order of an item's text (False) and speech (True) tokens. In each
    prefix, speech / text <= n_speech / n_text; `lead` delays speech by as many text tokens."""
    # Undisclosed: which of the allowed orders are trained on. Here a speech token comes as soon as
    # it is allowed, or 1 to 5 text tokens later.
    order = []
    text = speech = 0
    while text < n_text or speech < n_speech:
        allowed = (speech + 1) * n_text <= max(text - lead, 0) * n_speech or text == n_text
        order.append(allowed)
        speech += allowed
        text += not allowed
    return order

class DenseBlock(nn.Module):
    """Gated attention and a SwiGLU, each behind a norm: [N, T, D] -> [N, T, D]."""

    def __init__(self, dim, n_heads, n_kv_heads, head_dim, hidden_dim):
        super().__init__()
        self.attn_norm = UnitOffsetRMSNorm(dim)
        self.attn = GatedAttention(dim, n_heads, n_kv_heads, head_dim)
        self.mlp_norm = UnitOffsetRMSNorm(dim)
        self.mlp = GatedMLP(dim, hidden_dim)

    def forward(self, x, cos, sin):
        x = x + self.attn(self.attn_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))

class Talker(nn.Module):
    """The speech model (O3 §2.4, O35 §2.4): a hybrid stack that predicts code 0 of each frame, and
    the MTP module, which predicts the frame's codes 1 ... G - 1 one after the other."""

    # Undisclosed: the sizes, and what the Talker reads of the Thinker. Its blocks and those of the
    # MTP module have the heads and the experts of the Thinker; it reads word embeddings of text and
    # states of the Thinker's middle at audio and frames, as in O3.

    def __init__(self, cfg):
        super().__init__()
        dim = cfg.talker_dim
        self.rotary_dim = cfg.rotary_dim
        self.rope_theta = cfg.rope_theta
        self.codebook_size = cfg.codebook_size
        self.text_projection = Adapter(cfg.dim, cfg.dim, dim, F.silu)
        self.media_projection = Adapter(cfg.dim, cfg.dim, dim, F.silu)
        self.code_embedding = nn.Embedding(cfg.n_codebooks * cfg.codebook_size, dim)
        self.blocks = nn.ModuleList(Block(cfg, dim, i) for i in range(cfg.talker_layers))
        self.final_norm = UnitOffsetRMSNorm(dim)
        self.head = Linear(dim, cfg.codebook_size + 1, bias=False)  # the last id ends the speech
        heads = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
        self.mtp_blocks = nn.ModuleList(
            DenseBlock(dim, *heads, 3 * dim) for _ in range(cfg.mtp_layers)
        )
        self.mtp_norm = UnitOffsetRMSNorm(dim)
        self.mtp_head = nn.Parameter(torch.empty(cfg.n_codebooks - 1, cfg.codebook_size, dim))

    def embed_codes(self, codes):
        """E_g(c_g) of codes [..., G]: [..., G, D]."""
        offsets = self.codebook_size * torch.arange(codes.shape[-1], device=codes.device)
        return self.code_embedding(codes.clamp(min=0) + offsets)

    def forward(self, text, media, is_media, codes, positions, exists):
        """States [B, T, D] and the balance loss of a stream. Its tokens are of text or media, word
        embeddings or middle states [B, T, D] of the Thinker, or frames of speech, codes [B, T, G],
        which are -1 elsewhere."""
        is_media = is_media[..., None]
        x = torch.where(is_media, self.media_projection(media), self.text_projection(text))
        speech = self.embed_codes(codes).sum(-2).type_as(x)
        x = torch.where(codes[..., :1] >= 0, speech, x)
        rope = rotary_angles(positions, self.rotary_dim, self.rope_theta)
        balance = 0.0
        for block in self.blocks:
            x, loss = block(x, *rope, exists)
            balance = balance + loss
        return self.final_norm(x), balance

    def predict_codes(self, h, codes):
        """MTP: logits [N, g, size] of codes 1 ... g of N frames, whose states are h [N, D], from
        their codes 0 ... g - 1, [N, g]: it reads h, E_0(c_0), ..., E_{g-1}(c_{g-1})."""
        embedded = self.embed_codes(codes).type_as(h)
        x = torch.cat((h[:, None], embedded), 1)  # [N, 1 + g, D]
        positions = torch.arange(x.shape[1], device=h.device).expand(3, 1, -1)
        rope = rotary_angles(positions, self.rotary_dim, self.rope_theta)
        for block in self.mtp_blocks:
            x = block(x, *rope)
        heads = self.mtp_head[: codes.shape[1]].type_as(x)  # [g, size, D]
        return torch.einsum("ngd,gvd->ngv", self.mtp_norm(x)[:, 1:], heads).float()

# ---------------------------------------- Model ----------------------------------------

def replace_rows(x, mask, rows):
    """x [B, T, D] with rows [N, D] where mask [B, T] is true. Where it is true nowhere, the rows
    have a gradient of zero, so that all ranks run all encoders, whatever their batches hold."""
    return (x + 0.0 * rows.sum()).index_put((mask,), rows)

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

class Omni(nn.Module):
    """Qwen3.5-Omni, tokens [B, T] -> logits [B, T, V]. A batch (see get_batch) adds media to the
    tokens, and a task names what is returned; `dtype` is the precision of the residual streams."""

    def __init__(self, cfg):
        super().__init__()
        self.dtype = torch.float32
        audio = cfg.audio_dim, cfg.audio_layers, cfg.audio_heads, cfg.audio_hidden
        self.audio = AudioTransformer(cfg.audio_channels, cfg.audio_convs, *audio)
        self.audio_adapter = Adapter(cfg.audio_dim, cfg.audio_dim, cfg.dim)
        vision = cfg.vision_dim, cfg.vision_layers, cfg.vision_heads, cfg.vision_hidden
        self.vision = VisionTransformer(cfg.patch, cfg.position_side, *vision, cfg.dim)
        self.thinker = Thinker(cfg)
        self.decoder = self.talker = None
        if cfg.decoder_layers:
            sizes = cfg.audio_dim, cfg.decoder_layers, cfg.audio_heads, cfg.audio_hidden
            self.decoder = AudioDecoder(cfg.vocab_size, *sizes)
        if cfg.talker_layers:
            self.talker = Talker(cfg)

    def forward(self, tokens, batch=None, task="logits"):
        """task "logits": logits [B, T, V]; "predict": the likeliest ids [N] at the N targets;
        "loss": nats by modality and the balance loss; "transcribe": nats by modality of AuT's
        decoder, and 0; "speak": nats of code 0 and of the others, and the Talker's balance loss;
        "next_codes": the likeliest codes [G] after position `place` of item 0."""
        if batch is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            batch = {"positions": positions.expand(3, *tokens.shape)}
            batch["kinds"] = torch.zeros_like(tokens)
        if task == "transcribe":
            return self.transcribe(tokens, batch)
        x = self.thinker.token_embedding(tokens).to(self.dtype)
        if "mel" in batch:
            audio = self.audio(batch["mel"], batch["mel_frames"], self.dtype)
            x = replace_rows(x, batch["kinds"] == AUDIO, self.audio_adapter(audio))
            vision = self.vision(batch["patches"], batch["grid"], self.dtype)
            x = replace_rows(x, batch["kinds"] == VISION, vision)
        x, middle, balance = self.thinker(x, batch["positions"], batch["kinds"] >= 0)
        if task == "logits":
            return self.thinker.head(x).float()
        if task in ("speak", "next_codes"):
            h, talker_balance = self.run_talker(middle, batch)
            if task == "next_codes":
                return self.next_codes(h[0, batch["place"]])
            return self.speech_loss(h, batch), talker_balance
        if task == "predict":
            return self.thinker.head(x[batch["targets"] >= 0]).argmax(-1)
        return self.nats(self.thinker.head, x, batch), balance

    def nats(self, head, x, batch):
        """Cross-entropies of the targets, summed by modality: x [B, T, D] -> [modalities]."""
        sums = []
        for i in range(len(MODALITIES)):
            scored = (batch["targets"] >= 0) & (batch["modality"] == i)[:, None]
            rows = x[scored]
            logits = lambda rows: head(rows).float()  # noqa: E731
            loss = chunked_loss(logits, rows, batch["targets"][scored], head.out_features)
            sums.append(rows.float().sum() * 0.0 + loss)  # a tensor, without rows too
        return torch.stack(sums)

    def transcribe(self, tokens, batch):
        """The pre-training task of AuT: text from audio by the decoder alone."""
        rows = self.audio(batch["mel"], batch["mel_frames"], self.dtype)
        is_audio = batch["kinds"] == AUDIO
        memory = replace_rows(rows.new_zeros(*tokens.shape, rows.shape[-1]), is_audio, rows)
        x = self.decoder(tokens, memory, is_audio)
        return self.nats(self.decoder.head, x, batch), x.new_zeros(())

    def run_talker(self, middle, batch):
        """States of the Talker over its streams, and its balance loss. What it reads of the
        Thinker, word embeddings and middle states, is detached."""
        text = self.thinker.token_embedding(batch["stream"]).to(self.dtype).detach()
        media = F.pad(middle, (0, 0, 0, text.shape[1] - middle.shape[1])).detach()
        kinds = batch["stream_kinds"]
        positions = batch["stream_positions"]
        return self.talker(text, media, kinds > TEXT, batch["codes"], positions, kinds >= 0)

    def speech_loss(self, h, batch):
        """Nats of code 0, the end of speech included, and of codes 1 ... G - 1: [2]."""
        targets = batch["next_codes"]  # [B, T, G], -1 where there is none
        scored = targets[..., 0] >= 0
        logits = self.talker.head(h[scored]).float()
        first = F.cross_entropy(logits, targets[scored][:, 0], reduction="sum")
        frames = targets[..., 1] >= 0  # the end has no further codes
        codes = targets[frames]  # [N, G]
        logits = self.talker.predict_codes(h[frames], codes[:, :-1])
        further = F.cross_entropy(logits.flatten(0, 1), codes[:, 1:].flatten(), reduction="sum")
        return torch.stack((first, further))

    def next_codes(self, h):
        """The likeliest codes [G] of the frame after a state h [D]; code 0 may be the end."""
        codes = self.talker.head(h[None]).argmax(-1)  # [1]
        while len(codes) < len(self.talker.mtp_head) + 1:
            known = codes[None].clamp(max=self.talker.codebook_size - 1)
            logits = self.talker.predict_codes(h[None], known)
            codes = torch.cat((codes, logits[0, -1:].argmax(-1)))
        return codes

UNIT_OFFSET = r"(thinker|talker)\..*norm\.weight$"  # gains 1 + w

def init_weights(model, cfg):
    """Fill the parameters, each from a random stream named by (seed, name), an expert's from its
    number too, so that every layout starts from the same numbers. Raises ValueError for a parameter
    without a rule."""
    # Undisclosed: all of it but 0.02, which the released configurations have. Encoders, except for
    # the patch embedding, keep the variance of their inputs; the decay of Gated DeltaNet is that of
    # its authors' code, except that A starts at 1 to 16, not 0 to 16; the rows of a router have the
    # same norm, so that no expert is chosen more often.
    for name, p in model.named_parameters():
        generator = torch.Generator().manual_seed(stable_hash(cfg.seed, name))
        value = torch.empty(p.shape)
        if is_expert(name):
            for i, matrix in enumerate(value, first_expert(name, len(p))):
                key = cfg.seed, re.sub(r"part\d+\.", "", name), i
                generator.manual_seed(stable_hash(*key))
                matrix.normal_(0.0, 0.02, generator=generator)
        elif re.search(UNIT_OFFSET, name) or name.endswith(".bias"):
            value.zero_()
        elif re.search(r"norm\d?(\.weight)?$", name):
            value.fill_(1.0)
        elif name.endswith("A_log"):
            value.uniform_(1.0, 16.0, generator=generator).log_()
        elif name.endswith("dt_bias"):  # softplus of it is between 0.001 and 0.1
            value.uniform_(math.log(0.001), math.log(0.1), generator=generator)
            value = value.exp().expm1().log()
        elif name.endswith("router"):
            value = F.normalize(value.normal_(generator=generator)) * 0.02 * p.shape[1] ** 0.5
        elif re.match(r"(audio|audio_adapter|vision|decoder)\.", name) and "embedding." not in name:
            value.normal_(0.0, p[0].numel() ** -0.5, generator=generator)
        elif name.endswith("conv") or "position_embedding" in name:
            value.normal_(0.0, 0.5, generator=generator)
        elif name.endswith((".weight", "mtp_head")):
            value.normal_(0.0, 0.02, generator=generator)
        else:
            raise ValueError(f"no rule initialises {name}")
        fill_parameter(p, value)
    for moe in moe_layers(model):
        moe.share.fill_(cfg.top_k / cfg.n_experts)
        moe.load.zero_()

def moe_layers(model):
    """The layers of experts, in order."""
    return [module for module in model.modules() if isinstance(module, SharedExpertMoE)]

def count_parameters(model):
    """(total, activated) parameters of all parts, embeddings included: of the routed experts, a
    token activates top_k."""
    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if is_expert(name))
    moe = moe_layers(model)[0]
    n_experts = len(moe.share)
    return total, total - routed // n_experts * (n_experts - moe.top_k)

def flops_per_token(cfg):
    """Training FLOPs per token of text in the Thinker: 2 per weight of a matrix product forward,
    twice that backward. Attention counts as causal, (T + 1) / 2 keys per query; Gated DeltaNet as
    a recurrence, three products of its state; encoders and Talker are left out."""
    n_attention = cfg.n_layers // 4
    width = cfg.n_heads * cfg.head_dim
    attention = cfg.dim * (3 * width + 2 * cfg.n_kv_heads * cfg.head_dim)
    attention += 2 * width * (cfg.seq_len + 1) / 2  # q kᵀ and A v
    key_dim = cfg.key_heads * cfg.delta_head_dim
    value_dim = cfg.value_heads * cfg.delta_head_dim
    delta = cfg.dim * (2 * key_dim + 3 * value_dim + 2 * cfg.value_heads)
    delta += 4 * (2 * key_dim + value_dim) + 3 * value_dim * cfg.delta_head_dim
    experts = cfg.dim * (cfg.n_experts + 1 + 3 * (cfg.top_k * cfg.expert_dim + cfg.shared_dim))
    mixers = n_attention * attention + (cfg.n_layers - n_attention) * delta
    return 6 * (mixers + cfg.n_layers * experts + cfg.vocab_size * cfg.dim)

# ---------------------------------------- Data ----------------------------------------

MODALITIES = ("text", "audio", "image", "video", "av")
COLOURS = {
    "red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230),
    "yellow": (230, 220, 50), "pink": (240, 90, 200), "white": (240, 240, 240),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {
    "right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1), "down right": (1, 1),
    "up right": (1, -1), "down left": (-1, 1), "up left": (-1, -1),
}  # fmt: skip
EVENTS = (
    "low tone", "high tone", "rising chirp", "falling chirp", "one beep", "two beeps", "noise",
    "clicks",
)  # fmt: skip
ANSWERS = {  # parts of captions that validation counts: number of answers, all equally likely
    "image colour": len(COLOURS), "image shape": len(SHAPES), "audio event": len(EVENTS),
    "video direction": len(DIRECTIONS), "av wall": 2, "av pitch": 2, "av match": 2,
}  # fmt: skip

def tone(hertz, seconds):
    """A sine, faded in and out over 5 ms: [16000 seconds]; hertz may be an array over time."""
    n = round(16000 * seconds)
    phase = 2 * math.pi * np.cumsum(np.broadcast_to(hertz, n)) / 16000
    fade = np.minimum(1, np.minimum(np.arange(n), np.arange(n)[::-1]) / 80)
    return 0.5 * np.sin(phase) * fade

def draw_beeps(pitches, starts, seconds, n):
    """A wave [n]: silence in which a tone of each pitch begins at its sample in `starts`."""
    wave = np.zeros(n)
    for hertz, start in zip(pitches, starts):
        beep = tone(hertz, seconds)[: n - start]
        wave[start : start + len(beep)] = beep
    return wave

def draw_event(event, seconds, seed):
    """A wave of one of EVENTS."""
    rng = np.random.default_rng(seed)
    n = round(16000 * seconds)
    low = rng.uniform(200, 500)
    high = rng.uniform(1500, 3000)
    rising = np.linspace(low, high, n)
    hertz = {"low tone": low, "high tone": high}
    hertz |= {"rising chirp": rising, "falling chirp": rising[::-1]}
    if event in hertz:
        return tone(hertz[event], seconds)
    if event == "noise":
        return rng.normal(0, 0.2, n)
    if event == "clicks":
        wave = np.zeros(n)
        wave[rng.integers(800) :: 1600] = 0.9
        return wave
    starts = {"one beep": [0.15], "two beeps": [0.15, 0.6]}[event]  # shares of the wave
    pitches = rng.uniform(600, 1200, len(starts))
    return draw_beeps(pitches, [round(n * start) for start in starts], 0.2, n)

LETTER = 4 * FRAME  # samples of a letter

def spell(text):
    """A text in tones: for each letter 160 ms of two tones and as much silence, for any other
    character silence alone."""
    parts = []
    for letter in text:
        sound = np.zeros(LETTER // 2)
        if "a" <= letter <= "z":
            row, column = divmod(ord(letter) - ord("a"), 6)
            sound = 0.9 * (tone(BANDS[1 + row], 0.16) + tone(BANDS[6 + column], 0.16))
        parts += [sound, np.zeros(LETTER // 2)]
    return np.concatenate(parts)

def draw_clip(colour, shape, path, radius, size, seed):
    """Frames [n, size, size, 3] of 0 ... 255: a shape at the n points (x, y) of a path, on a noisy
    dark background."""
    rng = np.random.default_rng(seed)
    i, j = np.indices((size, size))
    x, y = path.T[..., None, None]  # [n, 1, 1] each
    dx = np.abs(j - x)  # [n, size, size]
    dy = i - y
    inside = {
        "circle": dx**2 + dy**2 <= radius**2,
        "square": np.maximum(dx, np.abs(dy)) <= 0.85 * radius,
        "triangle": (dx <= (dy + radius) / 2) & (dy <= radius),
    }[shape]
    frames = rng.uniform(0, 60, (len(path), size, size, 1)).repeat(3, 3)
    frames[inside] = COLOURS[colour]
    return frames.astype(np.uint8)

def draw_item(modality, rng, cfg):
    """The caption and the media of a synthetic item of one of MODALITIES but text. The caption is a
    list of (text, its name in ANSWERS or ""), media are {kind: (function that makes it, its size)}.
    """
    size = cfg.image_size
    seed = int(rng.integers(2**60))  # of the media, which are made when a batch needs them
    colour = str(rng.choice(list(COLOURS)))
    shape = str(rng.choice(SHAPES))
    radius = rng.uniform(0.24, 0.32) * size
    start = rng.uniform(0.35, 0.65, 2) * size
    i = np.arange(cfg.n_frames)
    if modality == "audio" and rng.random() < 0.6:
        event = str(rng.choice(EVENTS))
        seconds = rng.uniform(0.8, 1.6)
        make = functools.partial(draw_event, event, seconds, seed)
        return [(event, "audio event")], {"wave": (make, round(16000 * seconds))}
    if modality == "audio":
        word = "".join(chr(97 + letter) for letter in rng.integers(0, 26, rng.integers(2, 5)))
        return [(word, "")], {"wave": (functools.partial(spell, word), LETTER * len(word))}
    if modality == "image":
        caption = [("a ", ""), (colour, "image colour"), (" ", ""), (shape, "image shape")]
        path = rng.uniform(0.35, 0.65, (1, 2)) * size
    if modality == "video":
        direction = str(rng.choice(list(DIRECTIONS)))
        caption = [(f"a {colour} {shape} moves ", ""), (direction, "video direction")]
        speed = 0.4 * size / cfg.n_frames
        path = start + np.outer(i - i.mean(), DIRECTIONS[direction]) * speed
    wave = {}
    if modality == "av":  # the shape hits a wall; a beep comes then, or at another time
        wall = str(rng.choice(("right", "left")))
        pitch = str(rng.choice(("high", "low")))
        match = str(rng.choice(("in time", "out of time")))
        hit, other = rng.permutation(np.arange(1, cfg.n_frames))[:2]
        edge = size - radius if wall == "right" else radius
        away = np.abs(i - hit) * size * 0.12
        x = edge - away if wall == "right" else edge + away
        path = np.stack((x, np.full_like(x, start[1])), 1)
        caption = [(wall, "av wall"), (" wall, ", ""), (pitch, "av pitch"), (" beep, ", "")]
        caption.append((match, "av match"))
        beat = (hit if match == "in time" else other) / cfg.fps
        hertz = 1800 if pitch == "high" else 500
        n = round(16000 * (cfg.n_frames / cfg.fps))
        make = functools.partial(draw_beeps, [hertz], [round(16000 * beat)], 0.33, n)
        wave = {"wave": (make, n)}
    make = functools.partial(draw_clip, colour, shape, path, radius, size, seed)
    return caption, wave | {"frames": (make, (len(path), size, size))}

def arrange_media(modality, n_audio, grid, rng, cfg):
    """What precedes an item's caption: strings, and Segments of media."""
    # Undisclosed: how timestamps, frames and sound are combined, and their format. Here the mean
    # time of each pair of frames precedes it, and the sound of its interval follows it. In sound
    # without frames, the time of the next token is inserted every 10 to 50 tokens.
    if modality == "text":
        return []
    t, h, w = grid
    start = "<|vision_start|>" * (t > 0) + "<|audio_start|>" * (n_audio > 0)
    end = "<|audio_end|>" * (n_audio > 0) + "<|vision_end|>" * (t > 0)
    seconds = 0.01 * cfg.audio_chunk / conv_length(cfg.audio_chunk, cfg.audio_convs)  # of a token
    step = 2 / cfg.fps / seconds  # tokens of sound per pair of frames
    if modality == "image" or cfg.time == "abs":
        return [start, Segment(n_audio=n_audio, grid=grid, step=step), end]
    parts = []
    done = 0  # tokens of sound without frames
    while modality == "audio" and done < n_audio:
        if done:
            parts.append(f"<{done * seconds:.1f} seconds>")
        n = min(int(rng.integers(10, 51)), n_audio - done)
        parts.append(Segment(n_audio=n))
        done += n
    borders = [min(round(step * i), n_audio) for i in range(t)] + [n_audio]  # sound of each pair
    for i, (first, last) in enumerate(itertools.pairwise(borders)):
        time = f"<{(2 * i + 0.5) / cfg.fps:.1f} seconds>"
        media = Segment(n_audio=last - first, grid=(1, h, w))
        parts += [time + start, media, end] if modality == "video" else [time, media]
    return parts if modality == "video" else [start, *parts, end]

@dataclasses.dataclass
class Item:
    """An item of the data. The model learns to predict the last segment, the caption; answers has
    for each of its tokens the number in ANSWERS from 1, or 0; media are as of draw_item."""

    modality: str
    segments: list
    answers: list
    media: dict
    lead: int  # tokens by which text runs ahead of speech

def modality_of(media):
    """The one of MODALITIES that an item with these media belongs to."""
    if "frames" not in media:
        return "audio" if "wave" in media else "text"
    if "wave" in media:
        return "av"
    n_frames = media["frames"][1][0]
    return "image" if n_frames == 1 else "video"

def make_item(caption, media, tokenizer, rng, cfg):
    """The Item of a caption and its media."""
    n_audio = 0
    grid = (0, 0, 0)
    if "wave" in media:
        n_frames = media["wave"][1] // 160
        n_audio = count_audio_tokens(n_frames, cfg.audio_chunk, cfg.audio_convs)
    if "frames" in media:
        n, height, width = media["frames"][1]
        side = 2 * cfg.patch
        height, width = smart_resize(height, width, side, cfg.min_pixels, cfg.max_pixels)
        grid = (math.ceil(n / 2), height // side, width // side)
    modality = modality_of(media)
    parts = arrange_media(modality, n_audio, grid, rng, cfg)
    encode = functools.partial(tokenizer.encode, allowed_special="all")
    segments = [Segment(encode(part)) if isinstance(part, str) else part for part in parts]
    ids = []
    answers = []
    for text, name in caption:
        part = tokenizer.encode_ordinary(text)
        ids += part
        answers += [1 + list(ANSWERS).index(name) if name else 0] * len(part)
    segments.append(Segment([*ids, tokenizer.eot_token]))
    answers.append(answers[-1])  # a last answer includes the end of the caption
    return Item(modality, segments, answers, media, int(rng.integers(6)))

class Source:
    """Items by number: synthetic ones, whose texts are parts of documents, or those of the rows of
    a manifest that suit the stage, about 5 % of which are held out."""

    def __init__(self, cfg, tokenizer, documents, rows, held_out):
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.documents = documents
        self.held_out = held_out
        rows = [(i, row) for i, row in enumerate(rows) if self.suits_stage(row[1])]
        flags = [is_held_out((i, caption)) for i, (caption, _) in rows]
        if len(set(flags)) == 1:  # too few rows for a choice by hash
            flags[-1] = not flags[-1]
        self.rows = [row for (_, row), flag in zip(rows, flags) if flag == held_out]
        if cfg.data and not self.rows:
            raise ValueError(f"stage {cfg.stage} needs 2 lines of --data with media for it")
        with explain(f"--mix {cfg.mix} is not MODALITY:SHARE,...", ValueError):
            pairs = (part.split(":") for part in cfg.mix.split(","))
            shares = {modality: float(share) for modality, share in pairs}
        modalities = STAGES[cfg.stage].modalities
        self.mix = {modality: shares.get(modality, 0.0) for modality in modalities}
        if shares.keys() - set(MODALITIES) or not any(self.mix.values()):
            names = " or ".join(modalities)
            raise ValueError(f"--mix {cfg.mix} has an unknown modality, or no share of {names}")

    def suits_stage(self, media):
        """Whether the stage trains on items with these media."""
        if self.cfg.stage == "t1":
            return "speech" in media
        return modality_of(media) in STAGES[self.cfg.stage].modalities

    def item(self, index, modality=""):
        """Item `index` of the stage, a pure function of the seed and the index. The modality of a
        synthetic item is drawn unless it is given."""
        cfg = self.cfg
        rng = np.random.default_rng(stable_hash(cfg.seed, self.held_out, index))
        if self.rows:
            epoch, i = divmod(index, len(self.rows))
            row = self.rows[permutation(len(self.rows), cfg.seed, epoch)[i]]
            return make_item(*row, self.tokenizer, rng, cfg)
        shares = np.array(list(self.mix.values()))
        drawn = rng.choice(list(self.mix), p=shares / shares.sum())
        modality = modality or str(drawn)
        if modality == "text":
            return make_item([(self.text(rng), "")], {}, self.tokenizer, rng, cfg)
        caption, media = draw_item(modality, rng, cfg)
        words = "".join(text for text, _ in caption)
        media["speech"] = (functools.partial(spell, words), LETTER * len(words))
        return make_item(caption, media, self.tokenizer, rng, cfg)

    def text(self, rng):
        """At most seq_len - 1 characters of a document or, half of the time, a caption."""
        if rng.random() < 0.5:
            modality = str(rng.choice(MODALITIES[1:]))
            return "".join(text for text, _ in draw_item(modality, rng, self.cfg)[0])
        document = self.documents[rng.integers(len(self.documents))]
        start = rng.integers(max(len(document) - self.cfg.seq_len + 2, 1))
        return document[start : start + self.cfg.seq_len - 1]

    def items_of(self, modality, n):
        """The first items of a modality, at most n."""
        if not self.rows:
            return [self.item(i, modality) for i in range(n)] if modality in self.mix else []
        order = permutation(len(self.rows), self.cfg.seed, 0)  # of the items of the first epoch
        chosen = (i for i, j in enumerate(order) if modality_of(self.rows[j][1]) == modality)
        return [self.item(i) for i in itertools.islice(chosen, n)]

    def fingerprint(self):
        """A hash of the data, by which a resumed run recognizes it."""
        items = [self.item(i).segments for i in range(16)]  # with --tokenizer, --time, --fps ...
        captions = [caption for caption, _ in self.rows]
        return stable_hash(self.mix, captions, len(self.documents), items)

def deal(costs, n):
    """Deal items to n parts of about equal cost: the most expensive first, each to the part with
    the least cost so far. Returns for each part the sorted indices of its items, and its cost."""
    parts = [[] for _ in range(n)]
    sums = [0.0] * n
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = sums.index(min(sums))
        parts[least].append(i)
        sums[least] += costs[i]
    return [sorted(part) for part in parts], sums

def item_cost(item, cfg):
    """Multiplications of an item with weights, forward: of its tokens, patches and frames."""
    n_tokens = sum(len(s.text) + s.n_audio + math.prod(s.grid) for s in item.segments)
    n_patches = sum(4 * math.prod(s.grid) for s in item.segments)
    n_audio = sum(s.n_audio for s in item.segments)
    thinker = cfg.n_layers * cfg.dim * (6 * cfg.dim + 3 * cfg.top_k * cfg.expert_dim)
    vision = cfg.vision_layers * cfg.vision_dim * (4 * cfg.vision_dim + 2 * cfg.vision_hidden)
    audio = cfg.audio_layers * cfg.audio_dim * (4 * cfg.audio_dim + 2 * cfg.audio_hidden)
    return n_tokens * thinker + n_patches * vision + n_audio * audio

def stack(arrays, value):
    """Arrays of different lengths as one tensor, padded at their ends in the first dimension."""
    tensors = [torch.as_tensor(array) for array in arrays]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

def place_tokens(item, tokenizer):
    """Ids [T], positions [3, T] and kinds [T] of an item's tokens."""
    positions, kinds = position_ids(item.segments)
    patch = "<|image_pad|>" if item.modality == "image" else "<|video_pad|>"
    ids = np.empty(len(kinds), np.int64)
    ids[kinds == TEXT] = [i for segment in item.segments for i in segment.text]
    ids[kinds == AUDIO] = tokenizer.encode_single_token("<|audio_pad|>")
    ids[kinds == VISION] = tokenizer.encode_single_token(patch)
    return ids, positions, kinds

def collate(items, tokenizer, cfg, window=0):
    """The batch of some items: tokens, targets, answers and kinds [B, T], positions [3, B, T],
    modality [B], media, and the counts n_...; an attention window of AuT has `window` chunks, or 0:
    as many as --audio_window allows."""
    padding = {"tokens": 0, "targets": -100, "answers": 0, "kinds": -1, "positions": 0.0}
    rows = []
    counts = dict.fromkeys((f"n_{modality}" for modality in MODALITIES), 0)
    for item in items:
        ids, positions, kinds = place_tokens(item, tokenizer)
        start = len(ids) - len(item.segments[-1].text)  # of the caption
        answers = np.zeros(len(ids), np.int64)
        answers[start:] = item.answers
        targets = np.append(ids[1:], -100)
        targets[: max(start - 1, 0)] = -100
        rows.append((ids, targets, np.append(answers[1:], 0), kinds, positions.T))
        counts[f"n_{item.modality}"] += int((targets >= 0).sum())
    columns = zip(padding.items(), zip(*rows))
    batch = {name: stack(arrays, value) for (name, value), arrays in columns}
    batch["positions"] = batch["positions"].permute(2, 0, 1)
    batch["modality"] = torch.tensor([MODALITIES.index(item.modality) for item in items])

    limits = cfg.min_pixels, cfg.max_pixels
    frames = (item.media["frames"][0]() for item in items if "frames" in item.media)
    clips = [cut_into_patches(clip, cfg.patch, *limits) for clip in frames]
    waves = (item.media["wave"][0]() for item in items if "wave" in item.media)
    mels = [log_mel(torch.from_numpy(wave).float()) for wave in waves]
    # Without frames or sound, a block of patches or a chunk of zeros that no token refers to.
    clips = clips or [(torch.zeros(1, 4, 6 * cfg.patch**2), (2, 2))]
    mels = mels or [torch.zeros(128, 1)]
    batch["patches"] = stack([pair for clip, _ in clips for pair in clip], 0.0)
    batch["grid"] = torch.tensor([size for clip, size in clips for _ in clip])
    mel, n_frames = cut_into_windows(mels, cfg.audio_chunk, window or longest_window(cfg))
    batch |= {"mel": mel, "mel_frames": n_frames, **counts, "n_targets": sum(counts.values())}
    batch["n_tokens"] = int((batch["kinds"] >= 0).sum())
    # Without <|endoftext|>, and without the first token of a text, which is not scored.
    scored = [item.segments[-1].text[len(item.segments) == 1 : -1] for item in items]
    batch["n_bytes"] = sum(len(tokenizer.decode_bytes(ids)) for ids in scored)
    if cfg.stage == "t1":
        batch |= collate_speech(items, tokenizer, cfg)
    return batch

def collate_speech(items, tokenizer, cfg):
    """The Talker's streams: an item's media, then its caption and the codes of its speech,
    interleaved. stream and stream_kinds [B, T], stream_positions [3, B, T], codes and next_codes
    [B, T, G], -1 where there are none. Speech has no bits per byte: n_bytes is 0."""
    names = ("stream", "stream_kinds", "stream_positions", "codes", "next_codes")
    rows = []
    n_frames = 0
    for item in items:
        *context, caption = item.segments
        text = caption.text[:-1]  # without <|endoftext|>
        wave = item.media["speech"][0]()
        speech = encode_speech(wave, cfg.n_codebooks, cfg.codebook_size)  # [frames, G]
        order = np.array(interleave(len(text), len(speech), item.lead))
        ids = np.zeros(len(order), np.int64)
        ids[~order] = text
        stream = dataclasses.replace(item, segments=[*context, Segment(ids.tolist())])
        ids, positions, kinds = place_tokens(stream, tokenizer)
        codes = np.full((len(ids), cfg.n_codebooks), -1)
        codes[len(ids) - len(order) :][order] = speech
        next_codes = np.roll(codes, -1, 0)  # the first codes, which become the last, are -1
        next_codes[-1, 0] = cfg.codebook_size  # the id that ends the speech
        rows.append((ids, kinds, positions.T, codes, next_codes))
        n_frames += len(speech)
    batch = {name: stack(arrays, -1) for name, arrays in zip(names, zip(*rows))}
    batch["stream_positions"] = batch["stream_positions"].permute(2, 0, 1)
    batch["stream"] = batch["stream"].clamp(min=0)
    batch |= {"n_speech": n_frames + len(items), "n_frames_of_speech": n_frames, "n_bytes": 0}
    return batch | {"n_stream": int((batch["stream_kinds"] >= 0).sum())}

def longest_window(cfg):
    """Chunks of the largest attention window of AuT."""
    return max(cfg.audio_window // cfg.audio_chunk, 1)

def draw_window(first, cfg):
    """Chunks of an attention window of AuT in the batch that begins with item `first`."""
    # Departure: whole chunks, with the defaults 1.6 to 8 s; in O3 §2.2, 1 to 8 s. Undisclosed:
    # whether windows vary after AuT's pre-training. They do here, in all stages.
    return 1 + stable_hash(cfg.seed, "window", first) % longest_window(cfg)

def get_batch(source, first, n, cfg):
    """Items first ... first + n - 1 of the run: see collate. A pure function of the seed and the
    numbers, so that ranks, accumulation and resumption see the same items."""
    items = [source.item(first + i) for i in range(n)]
    return collate(items, source.tokenizer, cfg, draw_window(first, cfg))

def to_device(batch, device):
    """The batch with its tensors on the device, copied from pinned memory without waiting."""
    for name, value in batch.items():
        if torch.is_tensor(value) and device.type == "cuda":
            batch[name] = value.pin_memory().to(device, non_blocking=True)
    return batch

def read_dealt(source, first, cfg, device, rank, ranks):
    """The micro-batches that data-parallel rank `rank` of `ranks` reads, on the device, and the
    imbalance, the largest cost of a micro-batch over the mean; `first` is the first item of the
    global batch. Items are dealt by cost. It has no collectives, so that a thread can call it."""
    n_micro, _ = split_batch(cfg, ranks)
    items = [source.item(first + i) for i in range(cfg.batch_size)]
    parts, costs = deal([item_cost(item, cfg) for item in items], ranks * n_micro)
    batches = []
    for part in parts[rank * n_micro :][:n_micro]:
        chosen = [items[i] for i in part]
        batch = collate(chosen, source.tokenizer, cfg, draw_window(first, cfg))
        batches.append(to_device(batch, device))
    return batches, max(costs) * len(costs) / sum(costs)

def read_wave(path):
    """(function that returns the samples [n] in [-1, 1] of a .wav file, n)."""
    with explain(f"{path} is not a PCM .wav file", wave.Error, EOFError):
        with wave.open(str(path)) as file:
            kind = file.getframerate(), file.getsampwidth(), file.getnchannels()
            n = file.getnframes()
    if kind != (16000, 2, 1):
        convert = f"ffmpeg -i {path} -ar 16000 -ac 1 -c:a pcm_s16le new.wav"
        raise ValueError(f"{path} is not 16 kHz, 16 bits and mono; {convert} converts it")
    if n <= 200:
        raise ValueError(f"{path} has {n} samples, and 201 are the least")
    if path.stat().st_size < 44 + 2 * n:
        raise ValueError(f"{path} ends before its {n} samples")

    def read():
        with wave.open(str(path)) as file:
            return np.frombuffer(file.readframes(n), "<i2") / 32768

    return read, n

def write_wave(path, samples):
    """Write samples [n] in [-1, 1] as a .wav file of 16 kHz."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())

def read_image(path):
    """An image, uint8 [H, W, 3], of a .npy file or a binary .ppm file."""
    if path.suffix == ".npy":
        image = np.load(path, mmap_mode="r")
    else:
        content = np.memmap(path, np.uint8, "r")
        header = re.match(rb"P6\s+(?:#.*\n)*(\d+)\s+(\d+)\s+255\s", content)
        if not header:
            convert = f"ffmpeg -i {path} new.ppm"
            raise ValueError(f"{path} is neither .npy nor .ppm of 8 bits; {convert} converts it")
        width, height = map(int, header.groups())
        image = content[header.end() :][: height * width * 3].reshape(height, width, 3)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        holds = f"{path} holds {image.dtype} {image.shape}"
        raise ValueError(f"{holds}, not uint8 [H, W, 3]; a clip is a folder")
    return image

def read_frames(path, fps, target_fps):
    """(function that returns frames [n, H, W, 3], (n, H, W)) of an image file or, if fps is not 0,
    of a clip, a folder of images, sampled at target_fps: 2.ppm comes before 10.ppm."""
    files = sorted(path.iterdir(), key=lambda f: (len(f.name), f.name)) if fps else [path]
    sizes = {read_image(file).shape[:2] for file in files}
    if len(sizes) != 1:
        raise ValueError(f"{path} has frames of several sizes, or none")
    if fps:
        times = np.arange(math.ceil(len(files) / fps * target_fps)) / target_fps
        nearest = np.minimum(np.rint(times * fps).astype(int), len(files) - 1)
        files = [files[i] for i in nearest]
    make = lambda: np.stack([read_image(file) for file in files])  # noqa: E731
    return make, (len(files), *sizes.pop())

def read_manifest(path, target_fps):
    """[(caption, media)], as of draw_item, of the lines of a manifest: JSON objects with "text" and
    any of "audio", "speech", and "image" or "video" with its "fps". Paths are relative to the
    manifest's directory."""
    rows = []
    folder = Path(path).parent
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            with explain(f"{path}, line {number}", ValueError, OSError, KeyError, TypeError):
                row = {"text": "", "fps": 0} | json.loads(line)
                unknown = row.keys() - {"text", "audio", "image", "video", "fps", "speech"}
                if unknown or not row["text"] or not isinstance(row["text"], str):
                    raise ValueError(f"unknown keys {sorted(unknown)}, or no text")
                if "video" in row and ("image" in row or not row["fps"] > 0):
                    raise ValueError(f"an image beside a video, or fps {row['fps']}")
                if "image" in row and "audio" in row:
                    raise ValueError("an image beside a sound: only video has both")
                media = {}
                for key, kind in (("audio", "wave"), ("speech", "speech")):
                    if key in row:
                        media[kind] = read_wave(folder / row[key])
                for key, fps in (("image", 0), ("video", row["fps"])):
                    if key in row:
                        media["frames"] = read_frames(folder / row[key], fps, target_fps)
            rows.append(([(row["text"], "")], media))
    return rows

# ---------------------------------------- Objective ----------------------------------------

@dataclasses.dataclass
class Stage:
    """A stage of training (O35 §3): a pattern of the names of its trained parameters, its
    modalities, and factors of --lr and of the lengths --seq_len and --n_frames."""

    trained: str
    modalities: tuple
    lr: float = 1.0
    length: int = 1

STAGES = {
    # AuT with a text decoder, which is dropped (O35 §2.2).
    "a0": Stage(r"(audio|decoder)\.", ("audio",)),
    # Departure: the paper initialises the Thinker from Qwen3.5; this stage trains it on text.
    "lm": Stage(r"thinker\.", ("text",)),
    # S1: adapters, then encoders, with a frozen Thinker: trained together, the encoders would learn
    # to compensate for it (O3 §3).
    # Departure: the paper trains audio and vision separately, here one run trains both.
    # Undisclosed: whether S1b trains the adapters. It does not here.
    "s1a": Stage(r"audio_adapter\.|vision\.merger", ("audio", "image")),
    "s1b": Stage(r"audio\.|vision\.(?!merger)", ("audio", "image")),
    "s2": Stage(r"(audio|audio_adapter|vision|thinker)\.", MODALITIES),
    # Departure: contexts are 32,768 tokens in S2 and 262,144 in S3 (O35 §3). Here each item is a
    # sequence of its own, neither cut nor packed with others, and synthetic items of S3 are longer.
    "s3": Stage(r"(audio|audio_adapter|vision|thinker)\.", MODALITIES, lr=0.1, length=2),
    "t1": Stage(r"talker\.", MODALITIES[1:]),
}
TASKS = {"a0": "transcribe", "t1": "speak"}  # the others have the task "loss"

def objective(model, batch, cfg):
    """The loss of a stage, with the balance loss in training, and its parts as metrics; each sum is
    divided by its count n_... in the whole global batch."""
    # Undisclosed: the losses of all stages.
    sums, balance = model(batch["tokens"], batch, TASKS.get(cfg.stage, "loss"))
    if cfg.stage == "t1":  # code 0, and the mean of the others
        first = sums[0] / batch["n_speech"]
        others = sums[1] / (batch["n_frames_of_speech"] * (cfg.n_codebooks - 1))
        balance = balance / (batch["n_stream"] * cfg.talker_layers)
        metrics = {"code0": first, "codes": others}
        loss = first + others
    else:
        balance = balance / (batch["n_tokens"] * cfg.n_layers)
        loss = sums.sum() / batch["n_targets"]
        counts = [max(batch[f"n_{modality}"], 1) for modality in MODALITIES]
        metrics = {name: nats / n for name, nats, n in zip(MODALITIES, sums, counts)}
    trains_experts = cfg.stage == "t1" or re.match(STAGES[cfg.stage].trained, "thinker.")
    if model.training and trains_experts:
        loss = loss + cfg.balance_loss * balance
    return loss, {name: value.detach() for name, value in metrics.items()}

# ---------------------------------------- Optimizer ----------------------------------------

def build_optimizer(model, cfg):
    """AdamW on what the stage trains. Matrices are decayed, and gains 1 + w, towards 1; biases,
    other gains and the decay parameters of Gated DeltaNet are not."""
    # Undisclosed: the optimizer and all of its settings.
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decayed = p.ndim > 1 or re.search(UNIT_OFFSET, name) is not None
        # In a0, AuT is trained from scratch together with its decoder, at the same rate.
        is_encoder = cfg.stage != "a0" and re.match(STAGES["s1b"].trained, name) is not None
        scale = cfg.encoder_scale if is_encoder else 1.0
        group = {"params": [], "weight_decay": cfg.weight_decay * decayed, "scale": scale}
        key = decayed, is_encoder, is_expert(name)  # experts are sharded over other ranks
        groups.setdefault(key, group)["params"].append(p)
    betas = 0.9, 0.95
    return torch.optim.AdamW(groups.values(), lr=cfg.lr, betas=betas, eps=1e-8, fused=True)

def learning_rate(step, cfg):
    """Linear warm-up from 0, then a cosine to 0; step: updates so far, items / batch_size."""
    # Undisclosed: the schedule.
    warmup = cfg.warmup * cfg.steps
    if step < warmup:
        return cfg.lr * step / warmup
    done = min((step - warmup) / max(cfg.steps - warmup, 1), 1)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * done))

@torch.no_grad()
def update_shares(model):
    """Set each router's shares f to those of the global batch of the last update."""
    layers = moe_layers(model)
    loads = torch.stack([layer.load for layer in layers])
    dist.all_reduce(loads)
    for layer, load in zip(layers, loads):
        layer.share.copy_(torch.where(load.sum() > 0, load * layer.top_k / load.sum(), layer.share))
        layer.load.zero_()

# ---------------------------------------- Precision ----------------------------------------

# Undisclosed: the precision. Parameters, gradients and Adam's moments are fp32. Under bf16 the
# residual streams and the matrix products are bf16, as are the parameters that sharded ranks
# gather; mel, norms, rotary angles, router, the state of Gated DeltaNet, softmax, logits and loss
# are fp32.

PEAK_FLOPS = {"bf16": {  # dense, by precision and the device's exact name; others get no MFU
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA B200": 2250e12,
}}  # fmt: skip

# ---------------------------------------- Parallelism ----------------------------------------

def is_expert(name):
    """Whether a parameter belongs to the routed experts, of which a rank has a part."""
    return ".experts." in name

def first_expert(name, n):
    """Number of the first of the n experts in a parameter; a rank's part of them has its rank in
    its name."""
    rank = re.search(r"part(\d+)\.", name)
    return int(rank[1]) * n if rank else 0

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

def divide_experts(moe, group):
    """Replace the experts of a layer by this rank's part of them. The part has a name of its own,
    part0, part1 ..., because checkpoints and initialisation tell parameters apart by name."""
    X, width, dim = moe.experts.gate_up.shape
    with torch.device(moe.experts.gate_up.device):
        part = DistributedExperts(X, dim, width // 2, group)
    part.requires_grad_(moe.experts.gate_up.requires_grad)
    del moe.experts
    moe.add_module(f"part{group.rank()}", nn.ModuleDict({"experts": part}))
    moe.experts = functools.partial(part)  # called in forward, and no second entry of the module
    return part

def parallelize(model, cfg, mesh):
    """Shard parameters, gradients and optimizer as in ZeRO-3: experts over the ranks of "dp", which
    have the same ones, all else over all ranks. Gradients are summed. Sets the precision;
    recomputes blocks."""
    # Undisclosed: the parallel layout.
    model.dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(model.dtype, torch.float32, cast_forward_inputs=False)
    everyone = init_device_mesh(mesh.device_type, (mesh.size(),), mesh_dim_names=("all",))
    blocks = (EncoderBlock, Block, DenseBlock)
    shards = [(m, everyone) for m in model.modules() if isinstance(m, blocks)]
    if cfg.recompute == "block":
        for block, _ in shards:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if cfg.ep > 1:
        experts = [divide_experts(moe, mesh["ep"].get_group()) for moe in moe_layers(model)]
        shards = [(module, mesh["dp"]) for module in experts] + shards
    if mesh.size() > 1:
        for module, ranks in shards:
            fully_shard(module, mesh=ranks, mp_policy=policy)
        fully_shard(model, mesh=everyone, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model

def fill_parameter(p, value):
    """Write value, the complete tensor, to a parameter that may be sharded."""
    if isinstance(p, DTensor):
        value = value.to(p.device, p.dtype)
        value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
    p.data.copy_(value)

def build_omni(cfg, mesh, path=""):
    """The parallelized model of this rank, initialised or with the weights of a Hugging Face
    checkpoint directory; what the stage does not train has no gradient. Memory is allocated after
    the model is sharded, for this rank's shards alone."""
    with torch.device("meta"):
        model = Omni(cfg)
    for name, p in model.named_parameters():
        p.requires_grad_(re.match(STAGES[cfg.stage].trained, name) is not None)
    parallelize(model, cfg, mesh)
    model.to_empty(device=mesh.device_type)
    init_weights(model, cfg)
    if path:
        fill_from_hf(model, path)
    return model

def memory_per_rank(model, cfg):
    """Bytes on each rank, by kind, of a model on the meta device, for batches of text alone. Of
    --stage all, those of s2."""
    n = sum(p.numel() for p in model.parameters())
    trained = STAGES["s2" if cfg.stage == "all" else cfg.stage].trained
    n_trained = sum(p.numel() for name, p in model.named_parameters() if re.match(trained, name))
    block = max(sum(p.numel() for p in block.parameters()) for block in model.thinker.blocks)
    experts = sum(p.numel() for p in model.thinker.blocks[0].moe.experts.parameters())
    size = 2 if cfg.precision == "bf16" else 4
    ranks = cfg.dp * cfg.ep
    memory = {"parameters": 4 * n / ranks, "gradients": 4 * n_trained / ranks}
    memory["optimizer"] = 8 * n_trained / ranks
    # Gathered: embedding and head with their gradients; a block, with a rank's part of its experts,
    # with its gradient, and the next block.
    table = cfg.vocab_size * cfg.dim
    gathered = 4 * table + 3 * (block - experts + experts // cfg.ep)
    if ranks == 1:  # or bf16 copies of the matrices, which the backward pass needs
        copied = table + block if cfg.recompute == "block" else n - table
        gathered = copied * (size == 2)
    memory["gathered"] = size * gathered
    # Kept for the backward pass, per token and block: about 40 numbers of width D and 6 per hidden
    # channel of the chosen experts; with recomputation, the input alone and one block's.
    kept = size * (40 * cfg.dim + 6 * (cfg.top_k * cfg.expert_dim + cfg.shared_dim))
    tokens = split_batch(cfg, ranks)[1] * cfg.seq_len
    memory["activations"] = tokens * cfg.n_layers * kept
    if cfg.recompute == "block":
        memory["activations"] = tokens * (cfg.n_layers * size * cfg.dim + kept)
    return memory

# ---------------------------------------- Checkpoint ----------------------------------------

# The Thinker and the vision encoder are those of a Qwen3_5MoeForConditionalGeneration. AuT and its
# adapter, in its subdirectory audio_tower, are a Qwen3OmniMoeAudioEncoder, which has three
# convolutions; one with four is read by this script alone.
HF_CONFIG = {  # part of config.json, or the one of audio_tower: {field of Config: key}
    "text_config": {
        "vocab_size": "vocab_size", "dim": "hidden_size", "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim", "key_heads": "linear_num_key_heads",
        "value_heads": "linear_num_value_heads", "delta_head_dim": "linear_key_head_dim",
        "n_experts": "num_experts", "top_k": "num_experts_per_tok",
        "expert_dim": "moe_intermediate_size", "shared_dim": "shared_expert_intermediate_size",
    },
    "vision_config": {
        "vision_dim": "hidden_size", "vision_layers": "depth", "vision_heads": "num_heads",
        "vision_hidden": "intermediate_size", "patch": "patch_size",
    },
    "audio_tower": {
        "audio_dim": "d_model", "audio_layers": "encoder_layers",
        "audio_heads": "encoder_attention_heads", "audio_hidden": "encoder_ffn_dim",
        "audio_channels": "downsample_hidden_size",
    },
}  # fmt: skip
HF_FIXED = {  # the only values that are supported
    "text_config": {
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False,
        "linear_conv_kernel_dim": 4, "tie_word_embeddings": False,
        "model_type": "qwen3_5_moe_text",
    },
    "vision_config": {
        "hidden_act": "gelu_pytorch_tanh", "spatial_merge_size": 2, "temporal_patch_size": 2,
        "in_channels": 3, "model_type": "qwen3_5_moe_vision",
    },
    "audio_tower": {
        "activation_function": "gelu", "num_mel_bins": 128, "scale_embedding": False,
        "model_type": "qwen3_omni_moe_audio_encoder",
    },
}  # fmt: skip
HF_NAMES = {  # part of the model: (pattern in our names, Hugging Face's), applied in order
    "thinker": (
        (r"^", "model.language_model."), (r".*head", "lm_head"), (r"\.blocks", ".layers"),
        (r"token_embedding", "embed_tokens"), (r"final_norm", "norm"),
        (r"mixer_norm", "input_layernorm"), (r"moe_norm", "post_attention_layernorm"),
        (r"mixer\.([qkv])\.", r"self_attn.\1_proj."),
        (r"mixer\.([qk])_norm", r"self_attn.\1_norm"),
        (r"mixer\.out", "self_attn.o_proj"), (r"mixer\.(qkv|z|b|a)\.", r"linear_attn.in_proj_\1."),
        (r"mixer\.conv", "linear_attn.conv1d.weight"), (r"mixer\.gated_norm", "mixer.norm.weight"),
        (r"mixer\.o\.", "linear_attn.out_proj."), (r"mixer", "linear_attn"),
        (r"moe\.router", "mlp.gate.weight"),
        (r"moe\.(part\d+\.)?experts\.(\w+)", r"mlp.experts.\2_proj"),
        (r"moe\.shared\.(\w+)", r"mlp.shared_expert.\1_proj"), (r"moe\.", "mlp."),
        (r"shared_gate", "shared_expert_gate"),
    ),
    "vision": (
        (r"^", "model.visual."), (r"patch_embedding", "patch_embed.proj"),
        (r"position_embedding", "pos_embed"), (r"qkv", "attn.qkv"), (r"out", "attn.proj"),
        (r"merger_norm", "merger.norm"), (r"(\d)\.(up|down)", r"\1.mlp.\2"),
        (r"\.up", ".linear_fc1"), (r"\.down", ".linear_fc2"),
    ),
    "audio": (
        (r"convs\.0", "conv2d1"), (r"convs\.1", "conv2d2"), (r"convs\.2", "conv2d3"),
        (r"convs\.3", "conv2d4"), (r"blocks", "layers"), (r"final_norm", "ln_post"),
        (r"norm1", "self_attn_layer_norm"), (r"norm2", "final_layer_norm"), (r"up", "fc1"),
        (r"down", "fc2"), (r"\.out", ".self_attn.out_proj"), (r"qkv", "self_attn.qkv_proj"),
    ),
    "audio_adapter": ((r"up", "proj1"), (r"down", "proj2")),
}  # fmt: skip
SHAPE = [field.name for field in dataclasses.fields(Config)]
SHAPE = SHAPE[: SHAPE.index("data")]  # fields of the model, which must agree with a checkpoint

def hf_names(name):
    """Hugging Face's names of the tensors that a parameter concatenates; none for a parameter that
    their classes do not have."""
    part, name = name.split(".", 1)
    if part not in HF_NAMES:
        return []
    for pattern, theirs in HF_NAMES[part]:
        name = re.sub(pattern, theirs, name)
    if "qkv_proj" in name:
        return [name.replace("qkv", kind) for kind in "qkv"]
    if "shared_expert.gate_up" in name:
        return [name.replace("gate_up", kind) for kind in ("gate", "up")]
    return [name]

def read_omni_config(path, cfg):
    """cfg with the shape in the config.json of a Qwen3_5MoeForConditionalGeneration and, if there
    is one, of its audio tower."""
    with explain(f"{path} holds no Qwen3_5MoeForConditionalGeneration", Exception):
        cfg = dataclasses.replace(cfg)
        theirs = json.loads((Path(path) / "config.json").read_text())
        if (Path(path) / "audio_tower").exists():
            audio = json.loads((Path(path) / "audio_tower" / "config.json").read_text())
            theirs["audio_tower"] = audio
            cfg.audio_chunk = 2 * audio["n_window"]
            cfg.audio_window = audio["n_window_infer"]
            cfg.audio_convs = audio.get("downsample_times", 3)
        parts = [part for part in HF_CONFIG if part in theirs]
        for part in parts:
            for field, key in HF_CONFIG[part].items():  # Config has their defaults
                setattr(cfg, field, theirs[part].get(key, getattr(Config, field)))
        rope = theirs["text_config"].get("rope_parameters") or {}
        cfg.rope_theta = rope.get("rope_theta", Config.rope_theta)
        cfg.rotary_dim = int(cfg.head_dim * rope.get("partial_rotary_factor", 0.25))
        cfg.position_side = math.isqrt(theirs["vision_config"].get("num_position_embeddings", 2304))
        ours, audio = omni_configs(cfg)  # what is written for this shape is what can be read
        ours |= {"audio_tower": audio, "rope": ours["text_config"].pop("rope_parameters")}
        theirs["rope"] = rope
        free = ("architectures", "max_position_embeddings")
        for part in (*parts, "rope"):
            for key, value in ours[part].items():
                if key not in free and theirs[part].get(key, value) != value:
                    raise ValueError(f"{part} has {key} {theirs[part][key]!r}, not {value!r}")
    return cfg

def fill_from_hf(model, path):
    """Fill the parameters of model, which may be sharded, from a Hugging Face directory; parts that
    it does not have stay as they are."""
    with explain(f"{path} holds no Qwen3_5MoeForConditionalGeneration of this shape", Exception):
        tensors = read_hf_tensors(path)
        n_experts = len(moe_layers(model)[0].share)
        has_audio = (Path(path) / "audio_tower").exists()
        if has_audio:
            tensors |= read_hf_tensors(Path(path) / "audio_tower")
        for name, p in model.named_parameters():
            names = hf_names(name)
            if not names or (name.startswith("audio") and not has_audio):
                continue
            if is_expert(name) and names[0] not in tensors:  # a file with one tensor per expert
                prefix, kind = names[0].rsplit(".", 1)
                kinds = ["down_proj"] if kind == "down_proj" else ["gate_proj", "up_proj"]
                names = [f"{prefix}.{i}.{kind}.weight" for i in range(n_experts) for kind in kinds]
            value = torch.cat([tensors[key] for key in names])
            if is_expert(name):
                value = value.view(n_experts, *p.shape[1:])[first_expert(name, len(p)) :][: len(p)]
            fill_parameter(p, value.view(p.shape))

def from_hf(path):
    """(model, cfg) from the directory of a Qwen3_5MoeForConditionalGeneration."""
    cfg = read_omni_config(path, Config())
    model = Omni(cfg)
    init_weights(model, cfg)
    fill_from_hf(model, path)
    return model, cfg

def omni_configs(cfg):
    """config.json of the Thinker with the vision encoder, and of the audio tower."""
    config = {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe"}
    for part, fields in HF_CONFIG.items():
        config[part] = {key: getattr(cfg, field) for field, key in fields.items()} | HF_FIXED[part]
    n = cfg.rotary_dim // 2
    section = [(n + 2) // 3, (n + 1) // 3, n // 3]  # pairs of time, row and column
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta, "mrope_section": section}
    rope |= {"partial_rotary_factor": cfg.rotary_dim / cfg.head_dim, "mrope_interleaved": True}
    text = {"rope_parameters": rope, "linear_value_head_dim": cfg.delta_head_dim}
    config["text_config"] |= text | {"max_position_embeddings": 262144}
    vision = {"out_hidden_size": cfg.dim, "num_position_embeddings": cfg.position_side**2}
    config["vision_config"] |= vision
    audio = {"architectures": ["Qwen3OmniMoeAudioEncoder"], "output_dim": cfg.dim}
    audio |= {"n_window": cfg.audio_chunk // 2, "n_window_infer": cfg.audio_window}
    audio |= {"downsample_times": cfg.audio_convs} | config.pop("audio_tower")
    return config, audio

def to_hf(model, cfg, path, mesh=None):
    """Write the Thinker and the vision encoder to the directory path, and AuT to audio_tower in it.
    All ranks call this: they gather one parameter after the other; rank 0 keeps all in its memory
    and writes."""
    from safetensors.torch import save_file

    is_writer = not dist.is_initialized() or dist.get_rank() == 0
    folders = {"": {}, "audio_tower": {}}
    for name, p in model.named_parameters():
        value = p.full_tensor() if isinstance(p, DTensor) else p
        if is_expert(name) and cfg.ep > 1:
            parts = [torch.empty_like(value) for _ in range(cfg.ep)]
            dist.all_gather(parts, value.detach(), group=mesh["ep"].get_group())
            value = torch.cat(parts)
        if name.endswith("conv"):
            value = value[:, None]
        if "patch_embedding.weight" in name:
            value = value.view(-1, 3, 2, cfg.patch, cfg.patch)
        names = hf_names(name)
        for key, part in zip(names, value.chunk(max(len(names), 1))):
            if is_writer:
                folder = "audio_tower" if name.startswith("audio") else ""
                folders[folder][key] = part.detach().cpu().contiguous()
    if not is_writer:
        return
    with written_beside(path) as target:
        for (folder, tensors), config in zip(folders.items(), omni_configs(cfg)):
            (target / folder).mkdir(exist_ok=True)
            save_file(tensors, target / folder / "model.safetensors", metadata={"format": "pt"})
            (target / folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

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

def count_right(model, batch):
    """[2, answers]: how many of each of ANSWERS are in the batch, and how many are predicted, that
    is, all of their tokens are the likeliest ones."""
    scored = batch["targets"] >= 0
    right = model(batch["tokens"], batch, "predict") == batch["targets"][scored]  # [N]
    answers = batch["answers"][scored]
    items = scored.nonzero()[:, 0]
    # [B, 1 + answers], of which column 0 is of the other tokens.
    asked = torch.zeros(len(scored), 1 + len(ANSWERS), device=items.device)
    asked[items, answers] = 1.0
    predicted = asked.clone()
    predicted[items[~right], answers[~right]] = 0.0
    return torch.stack((asked, predicted)).sum(1)[:, 1:].cpu().numpy()

def measure(model, source, step, cfg, device):
    """Log held-out nats per target by modality and, for synthetic items, print how many answers the
    model predicts, with their media and with zeros instead of pixels and mel."""
    rank = dist.get_rank()
    ranks = dist.get_world_size()
    row = {"val_loss": 0.0, "val_bpb": 0.0}
    sums = np.zeros(3)  # nats, targets, bytes
    counts = np.zeros((2, 2, len(ANSWERS)))  # with media and without: asked, right
    with evaluation_mode(model, False):
        for modality in MODALITIES:
            items = source.items_of(modality, cfg.val_items)
            if not items:
                continue
            items = items * math.ceil(ranks / len(items))  # each rank has one
            batch = to_device(collate(items[rank::ranks], source.tokenizer, cfg), device)
            sum_counts([batch], ranks)
            (loss,) = sum_over_ranks(objective(model, batch, cfg)[0].item())
            row[f"val_{modality}"] = loss
            sums += loss * batch["n_targets"], batch["n_targets"], batch["n_bytes"]
            if cfg.stage not in TASKS:
                zeros = {"mel": 0 * batch["mel"], "patches": 0 * batch["patches"]}
                counts += count_right(model, batch), count_right(model, batch | zeros)
    nats, n_targets, n_bytes = sums.tolist()
    row |= {"val_loss": nats / n_targets, "val_bpb": bits_per_byte(nats, n_bytes)}
    log(cfg.out, step, f"val {step}", row, [])
    (asked, right), (_, right_zeroed) = np.reshape(sum_over_ranks(*counts.flat), counts.shape)
    for i, (name, n_answers) in enumerate(ANSWERS.items()):
        if asked[i]:
            without = f"without it {right_zeroed[i] / asked[i]:6.1%} | chance {1 / n_answers:.1%}"
            print(f"{name:16} {right[i] / asked[i]:6.1%} of {asked[i]:.0f} right | {without}")

def check(cfg, ranks):
    """Raise ValueError for a configuration that cannot run on that many ranks."""
    for field in dataclasses.fields(cfg):
        least = int(field.type is int and field.default > 0)
        if field.type in (int, float) and not least <= getattr(cfg, field.name) < math.inf:
            raise ValueError(f"--{field.name} {getattr(cfg, field.name)} is not {least} or more")
    n_micro, micro = split_batch(cfg, ranks)
    stages = stage_names(cfg)
    for wrong, message in (
        (cfg.rotary_dim % 2 or cfg.rotary_dim > cfg.head_dim, f"--rotary_dim {cfg.rotary_dim}"),
        (cfg.n_heads % cfg.n_kv_heads, f"{cfg.n_kv_heads} key-value heads, {cfg.n_heads} heads"),
        (cfg.value_heads % cfg.key_heads, f"{cfg.key_heads} key, {cfg.value_heads} value heads"),
        (cfg.vision_dim % (4 * cfg.vision_heads), "4 vision_heads do not divide vision_dim"),
        (cfg.top_k > cfg.n_experts, f"--top_k {cfg.top_k} of {cfg.n_experts} experts"),
        (cfg.n_frames < 3 or cfg.fps == 0, "--n_frames is less than 3, or --fps is 0"),
        (not 2 <= cfg.n_codebooks <= min(cfg.codebook_size, len(BANDS)),
         f"--n_codebooks {cfg.n_codebooks} with --codebook_size {cfg.codebook_size}"),
        ("a0" in stages and not cfg.decoder_layers, "stage a0 needs --decoder_layers"),
        ("t1" in stages and not cfg.talker_layers, "stage t1 needs --talker_layers"),
        (cfg.warmup > 0.1, f"--warmup {cfg.warmup} is more than a tenth of the run"),
        (cfg.dp * cfg.ep != ranks, f"dp {cfg.dp} x ep {cfg.ep} are not {ranks} ranks"),
        (cfg.n_experts % cfg.ep, f"--ep {cfg.ep} does not divide {cfg.n_experts} experts"),
        (ranks * n_micro * micro != cfg.batch_size,
         f"--batch_size {cfg.batch_size} is not {ranks} ranks x n micro-batches of {micro}"),
        (cfg.resume and not cfg.out, "--resume needs --out"),
        (cfg.eval and not cfg.out and not cfg.init, "--eval needs --out or --init"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
    check_directories(cfg.init, cfg.export, "")

def print_model(cfg):
    """Print parameters and FLOPs per token. Returns the model, on the meta device."""
    with torch.device("meta"):
        model = Omni(cfg)
    n, activated = count_parameters(model)
    print(f"parameters {n:,} | activated {activated:,}", end=" | ")
    print(f"FLOPs per token {flops_per_token(cfg):.4g} | 6 N gives {6 * activated:.4g}")
    for name, part in model.named_children():
        print(f"{name:13} {sum(p.numel() for p in part.parameters()):,}")
    return model

def dry_run(cfg):
    """Print parameters, FLOPs per token and memory per rank, computed from shapes alone."""
    if not cfg.vocab_size:
        cfg.vocab_size = load_tokenizer(cfg.tokenizer or "bytes", SPECIALS).n_vocab
    cfg.dp = cfg.dp or cfg.world_size // max(cfg.ep, 1)
    check(cfg, cfg.world_size)
    print_memory(memory_per_rank(print_model(cfg), cfg))

def omni_step(model, optimizer, batches, lr, cfg):
    """One update from this rank's micro-batches; returns loss, gradient norm and metrics of the
    global batch. Skips the update if loss or norm is not finite, which is the same on all ranks."""
    totals = 0.0
    # Each micro-batch reduces its gradients: unreduced, every rank would keep those of all weights.
    for batch in batches:
        loss, metrics = objective(model, batch, cfg)
        loss.backward()
        totals = totals + torch.stack([loss.detach(), *metrics.values()])
    # Every rank has a part of each gradient, and no part is on two ranks.
    parts = [p.grad for p in model.parameters() if p.grad is not None]
    parts = [part.to_local() if isinstance(part, DTensor) else part for part in parts]
    totals = torch.cat((nn.utils.get_total_norm(parts).square()[None], totals))
    dist.all_reduce(totals)
    square, loss, *values = totals.tolist()  # waits for the device, as the exchange of experts does
    norm = math.sqrt(square) if square >= 0 else math.nan
    if cfg.clip and norm > cfg.clip:
        torch._foreach_mul_(parts, cfg.clip / norm)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    update_shares(model)
    return loss, norm, dict(zip(metrics, values))

def train(model, optimizer, source, heldout, state, cfg, device, signals):
    """Update the model until the items of the stage are used up; False if a signal ends it."""
    reader = device, dist.get_rank(), dist.get_world_size()
    thread = ThreadPoolExecutor(1)  # reads the next batch during an update
    ahead = thread.submit(read_dealt, source, state["sequences"], cfg, *reader)
    first_step = saved = state["step"]
    pace = None  # seconds per update
    n_skipped = 0
    while True:
        step = state["step"]
        first = state["sequences"]  # of the batch to come
        steps_left = math.ceil(cfg.steps - first / cfg.batch_size)
        error = ahead.exception()  # waits until the batch to come is read
        if step > first_step + 1:  # the first update allocates memory and is left out
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
            measure(model, heldout, step, cfg, device)
        if end:
            return True

        clock = time.perf_counter()
        batches, imbalance = ahead.result()
        ahead = thread.submit(read_dealt, source, first + cfg.batch_size, cfg, *reader)
        sum_counts(batches, dist.get_world_size())
        counts = batches[0]
        lr = learning_rate(first / cfg.batch_size, cfg)
        loss, norm, metrics = omni_step(model, optimizer, batches, lr, cfg)
        finite = math.isfinite(loss) and math.isfinite(norm)
        state["step"] += 1
        state["sequences"] += cfg.batch_size
        state["tokens"] += finite * round(counts["n_tokens"])
        if step == 0 or steps_left == 1 or state["step"] % cfg.log_every == 0:
            bpb = bits_per_byte(loss * counts["n_targets"], counts["n_bytes"])
            parts = {k: value for k, value in metrics.items() if counts.get(f"n_{k}", 1)}
            row = {"loss": loss, "bpb": bpb, **parts, "lr": lr, "grad": norm}
            row |= {"imbalance": imbalance, "tokens": state["tokens"]}
            head = f"{cfg.stage} step {step + 1}/{step + steps_left}"
            # flops_per_token counts a trained Thinker: stages that freeze it print no MFU.
            precision = cfg.precision if cfg.stage in ("lm", "s2", "s3") else ""
            seq_len = counts["n_tokens"] / cfg.batch_size
            lengths = dataclasses.replace(cfg, seq_len=seq_len, precision=precision)
            tail = progress(state["tokens"], steps_left - 1, pace, lengths, device)
            log(cfg.out, step + 1, head, row, tail)
        n_skipped = 0 if finite else n_skipped + 1
        if n_skipped:
            print(f"step {step + 1} skipped: its loss or gradient is not finite")
        if n_skipped == 3 or (n_skipped and steps_left == 1):
            raise ValueError(f"no finite gradient in the last {n_skipped} steps to {step + 1}")

def load_sources(cfg):
    """(tokenizer, documents and rows to train on, documents and rows held out): the rows of --data,
    of which Source holds some out, or documents for synthetic items. Sets cfg.vocab_size."""
    specials = list(SPECIALS)
    if os.path.isfile(cfg.tokenizer):  # a released model knows its special tokens by their ids
        names = {place: token for token, place in SPECIALS.items()}
        specials = [names.get(i, f"<|unused_{i}|>") for i in range(33)]
    tokenizer = load_tokenizer(cfg.tokenizer or "bytes", specials)
    n_ids = tokenizer.n_vocab
    cfg.vocab_size = cfg.vocab_size or n_ids
    size = f"--vocab_size {cfg.vocab_size:,}"
    if cfg.vocab_size < n_ids:
        raise ValueError(f"{size} is less than the {n_ids} ids of the tokenizer")
    if cfg.vocab_size > n_ids and tokenizer.name == "bytes":
        if cfg.init:
            raise ValueError(f"--init {cfg.init} with {size} needs its own --tokenizer")
        print(f"warning: {size} over bytes: --tokenizer is missing")
    if cfg.data:
        rows = read_manifest(cfg.data, cfg.fps)
        return tokenizer, ([], rows), ([], rows)
    documents = [(name, text) for name, text in read_standard_library() if text]
    train = [text for name, text in documents if not is_held_out(name)]
    held_out = [text for name, text in documents if is_held_out(name)]
    return tokenizer, (train, []), (held_out, [])

def stage_names(cfg):
    """The stages of the run, in order."""
    return list(STAGES) if cfg.stage == "all" else [cfg.stage]

def stage_config(cfg, name):
    """The Config of a stage, whose files are in a directory of its own below --out."""
    stage = STAGES[name]
    changes = dict(stage=name, lr=cfg.lr * stage.lr, out=cfg.out and f"{cfg.out}/{name}")
    changes |= dict(seq_len=cfg.seq_len * stage.length, n_frames=cfg.n_frames * stage.length)
    return dataclasses.replace(cfg, **changes)

def load_stage_before(model, cfg):
    """Fill the model from the newest checkpoint of the last stage before this one, if any."""
    names = list(STAGES)
    for name in reversed(names[: names.index(cfg.stage)]):
        checkpoints = sorted(Path(cfg.out).parent.glob(f"{name}/step_*[0-9]")) if cfg.out else []
        if checkpoints:
            with explain(f"{checkpoints[-1]} does not fit", dcp.CheckpointException):
                dcp.load({"model": model.state_dict()}, checkpoint_id=checkpoints[-1])
            return print(f"stage {cfg.stage} begins with {checkpoints[-1]}")
    print(f"stage {cfg.stage} begins with new weights")

def run_stage(cfg, given, mesh, previous, source, heldout, device, signals):
    """Train a stage, from the model `previous` of the stage before in this run, if any. Returns the
    model, and whether the stage ended."""
    model = build_omni(cfg, mesh, cfg.init)
    optimizer = build_optimizer(model, cfg)
    state = {"step": 0, "sequences": 0, "tokens": 0}
    fixed = {name: getattr(cfg, name) for name in (*SHAPE, "ep", "seed")}
    fixed["data_fingerprint"] = source.fingerprint()
    checkpoint, run = newest_checkpoint(cfg.out, cfg.resume or cfg.eval, fixed)
    if checkpoint:
        load_checkpoint(checkpoint, model, optimizer, state)
    elif previous:
        model.load_state_dict(previous.state_dict())
    elif not cfg.init:
        load_stage_before(model, cfg)
    if run and "steps" not in given:  # as many items as its first start planned
        cfg.steps = math.ceil(run["steps"] * run["batch_size"] / cfg.batch_size)
    if cfg.eval:
        if not checkpoint and not cfg.init:
            raise ValueError("--eval needs --init, or --out with a checkpoint of the stage")
        cfg.steps = 0
        cfg.out = ""  # nothing is written
    if cfg.out and dist.get_rank() == 0:
        lock = claim_directory(cfg.out, dataclasses.asdict(cfg) | fixed)  # while the stage lives
    ranks = dist.get_world_size()
    n_micro, micro = split_batch(cfg, ranks)
    print(f"stage {cfg.stage} | {cfg.batch_size} items per step", end=" = ")
    print(f"{ranks} ranks x {n_micro} x {micro}")
    return model, train(model, optimizer, source, heldout, state, cfg, device, signals)

def sample(model, item, tokenizer, cfg, device):
    """What the model writes after an item's media: at most 48 ids, each the likeliest."""
    thinker_cfg = dataclasses.replace(cfg, stage="s2")  # batches without speech
    *context, _ = item.segments
    ids = []
    with evaluation_mode(model, False):
        while len(ids) < 48:
            segments = [*context, Segment(ids)] if ids else context
            prompt = dataclasses.replace(item, segments=segments, answers=0)
            batch = to_device(collate([prompt], tokenizer, thinker_cfg), device)
            likeliest = model(batch["tokens"], batch)[0, -1].argmax().item()
            if likeliest == tokenizer.eot_token:
                break
            ids.append(likeliest)
    return ids

def sample_speech(model, item, ids, tokenizer, cfg, device):
    """The wave [n] in which the Talker says the text of ids after an item's media."""
    # Undisclosed: how the ratio of text and speech is known before the speech. Here speech is as
    # long as the letters of the toy codec, or ends earlier.
    segments = [*item.segments[:-1], Segment([*ids, tokenizer.eot_token])]
    n_letters = len(tokenizer.decode(ids))
    silence = {"speech": (lambda: np.zeros(LETTER * n_letters), 0)}
    changes = dict(segments=segments, answers=0, media=item.media | silence, lead=0)
    batch = collate([dataclasses.replace(item, **changes)], tokenizer, cfg)
    batch = to_device(batch, device)
    (places,) = torch.where(batch["codes"][0, :, 0] >= 0)
    with evaluation_mode(model, False):
        for n_done, place in enumerate(places):
            batch["place"] = place - 1
            codes = model(batch["tokens"], batch, "next_codes")  # [G]
            if codes[0] == cfg.codebook_size:
                places = places[:n_done]
                break
            batch["codes"][0, place] = codes
    return decode_speech(batch["codes"][0, places].cpu().numpy(), cfg.codebook_size)

def show(model, source, cfg, device):
    """Print captions of held-out items and what the model writes. After stage t1, the Talker says
    the last of these texts in the file speech.wav of --out."""
    ids = []
    for modality in MODALITIES[1:]:
        for item in source.items_of(modality, 1):
            truth = source.tokenizer.decode(item.segments[-1].text[:-1])
            ids = sample(model, item, source.tokenizer, cfg, device)
            print(f"{modality:6}{truth!r}, and the model: {source.tokenizer.decode(ids)!r}")
    if cfg.stage == "t1" and cfg.out and ids:
        speech = sample_speech(model, item, ids, source.tokenizer, cfg, device)
        if dist.get_rank() == 0 and len(speech):
            write_wave(Path(cfg.out) / "speech.wav", speech)
            print(f"{cfg.out}/speech.wav says it in {len(speech) / 16000:.1f} seconds")

@record
def main(argv=None):
    """Run the command line: read the data, train the stages one after the other, export, sample."""
    with report_user_errors():
        cfg, given = parse(argv)
        if cfg.dry_run:
            return dry_run(cfg)
        device = init_distributed(cfg.timeout)
        ranks = dist.get_world_size()
        cfg.dp = cfg.dp or ranks // max(cfg.ep, 1)
        if cfg.init:
            cfg = read_omni_config(cfg.init, cfg)
        check(cfg, ranks)
        tokenizer, *parts = load_sources(cfg)
        plan = []  # all sources are built before training, so that errors come first
        for name in stage_names(cfg):
            stage = stage_config(cfg, name)
            sources = [Source(stage, tokenizer, *part, held_out=i) for i, part in enumerate(parts)]
            plan.append((stage, *sources))
        mesh = init_device_mesh(device.type, (cfg.dp, cfg.ep), mesh_dim_names=("dp", "ep"))
        signals = catch_signals()
        print(f"torch {torch.__version__} | {device.type} {cfg.precision}", end=" | ")
        print(f"dp {cfg.dp} x ep {cfg.ep}")
        print_model(cfg)
        model = None
        for stage, source, heldout in plan:
            model, ended = run_stage(stage, given, mesh, model, source, heldout, device, signals)
            if not ended:
                return print(f"stopped in stage {stage.stage}")
        if cfg.export:
            to_hf(model, cfg, cfg.export, mesh)
        show(model, heldout, stage, device)

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

def is_held_out(name):
    """Whether a document is among the 5 % that are held out, by a hash of its name."""
    return stable_hash(name) > 0.95 * 2**64

def read_standard_library():
    """(path, text) of each module of Python's standard library, in order and without tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped]  # those to walk through
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    for file in sorted(filter(Path.is_file, files)):
        yield file.relative_to(root).as_posix(), file.read_text("utf-8-sig", errors="ignore")

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

if __name__ == "__main__":
    main()
