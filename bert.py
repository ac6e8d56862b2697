r"""BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding (Devlin et al.,
2018, arXiv 1810.04805) in one file.

New against its parent, gpt1.py:
- attention looks both ways (§3): no causal mask, only padding is hidden;
- two sentences in one sequence, [CLS] A [SEP] B [SEP], told apart by segment embeddings (§3);
- a norm and dropout on the sum of the embeddings, norms with eps 1e-12 (code);
- masked LM: 15 % of the tokens are predicted, of which 80 % are hidden (§3.1, A.1), by a head of
  its own whose decoder shares the token embedding (code);
- next sentence prediction from the pooled [CLS] (§3.1);
- Adam without bias correction, linear warm-up and decay from step 0 (A.2, code);
- 90 % of the updates at length 128, the rest at 512 (A.2).
And one objective of another paper for contrast, --objective rtd: ELECTRA's replaced token
detection (Clark et al., 2020, arXiv 2003.10555), where every token is a signal.
Kept: post-norm blocks, GELU, learned positions, F = 4 D, biases.

Map: §3 BERT, Embeddings, Block, PRESETS | §3.1 masked_lm, objective | A.1
create_masked_lm_predictions | A.2 create_instances, AdamWeightDecay, learning_rate, phase_at |
ELECTRA §2 ELECTRA, replaced_token_detection. "Code" and "released" mean google-research/bert.
Legend: B batch, T positions, D width, H heads, E = D / H, F hidden width, V vocabulary, P slots for
predictions, W width of the token embedding (D but in small ELECTRA).
Conventions: NSP label 0 is IsNext, 1 a random sentence; loss in nats; label -100 is none.

Run: python bert.py                         # a laptop: the preset demo
     torchrun --nproc_per_node=8 bert.py    # GPUs: the preset small
     torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \
         bert.py --preset base --data wiki/ --sentences lines --tokenizer vocab.txt \
         --out /shared/bert --resume
Expect: in 75 seconds on two CPU cores the demo comes to name 17 % of the masked tokens of held-out
text (0 % at first), and of its pairs, at length 128, 63 % (the more frequent answer: 52 %).
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
import random
import re
import shutil
import socket
import sys
import sysconfig
import time
import unicodedata
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
from torch.utils.checkpoint import checkpoint

# ---------------------------------------- Config ----------------------------------------

@dataclasses.dataclass
class Config:
    """Run configuration: each field is a command-line flag, and its comment is the flag's help."""

    # Model, §3
    vocab_size: int = 0  # V, entries of the vocabulary; 0: those of the tokenizer
    context: int = 512  # positions of the model
    dim: int = 768  # D, width of the residual stream
    n_layers: int = 12  # number of blocks
    n_heads: int = 12  # H, attention heads
    hidden_dim: int = 3072  # F, width of the feed-forward layer
    gelu: Literal["erf", "tanh"] = "erf"  # form of GELU: of the first release, or of later ones
    init_std: float = 0.02  # σ of the normal distribution of initial weights, cut at 2 σ
    dropout: float = 0.1  # dropout of embeddings, residual branches and attention probabilities
    # Data, §3.1 and A.1
    data: str = ""  # file or directory of text or token shards; empty: Python's standard library
    sentences: Literal["prose", "lines"] = "prose"  # lines: one a line, blank lines end documents
    tokenizer: str = ""  # wordpiece:N (learned), vocab.txt, encoding or BPE file; empty: bytes
    uncased: bool = True  # turn text into lower case without accents
    seq_len: int = 128  # T, tokens of a training sequence
    long_seq_len: int = 512  # T of the last updates
    long_share: float = 0.1  # share of the updates at long_seq_len
    short_seq_prob: float = 0.1  # share of the documents whose sequences are shorter, at random
    dupe_factor: int = 10  # passes until pairs and masks repeat; 0: they never do
    masked_lm_prob: float = 0.15  # share of the tokens to predict
    # Undisclosed: dupe_factor, and both P. They are the released code's; at 512, 0.15 T.
    max_predictions: int = 20  # P, maximum number of predictions in a sequence
    long_max_predictions: int = 77  # P at long_seq_len
    # Objective
    objective: Literal["mlm", "rtd"] = "mlm"  # BERT's, or ELECTRA's replaced token detection
    embedding_dim: int = 0  # W of rtd, width of the token embedding; 0: D
    generator_divisor: int = 4  # width of rtd's discriminator over that of its generator
    rtd_weight: float = 50.0  # weight of the loss of rtd's discriminator
    # Optimization, A.2
    batch_size: int = 256  # sequences per update, over all ranks
    micro_batch: int = 0  # sequences per forward pass on one rank; 0: as many as the batch allows
    long_micro_batch: int = 0  # micro_batch at long_seq_len; 0: the same
    steps: int = 1_000_000  # updates of the run
    lr: float = 1e-4  # learning rate that the warm-up aims at
    warmup_steps: int = 10_000  # updates of linear warm-up, at most a tenth of the run
    weight_decay: float = 0.01  # decoupled weight decay of matrices and embeddings
    clip: float = 1.0  # maximum norm of the gradient; 0: no clipping
    seed: int = 0  # seed of the weights, the order of the data and dropout
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
    prompt: str = ""  # text whose [MASK] the sample fills in; empty: a held-out sequence
    out: str = ""  # directory of checkpoints, metrics.jsonl and config.json; empty: write nothing
    save_every: int = 1000  # updates between checkpoints
    resume: bool = False  # continue from the newest checkpoint in --out, if there is one
    eval: bool = False  # validate and sample what --init or --out holds, without training
    init: str = ""  # Hugging Face checkpoint directory to start from
    export: str = ""  # directory to write a Hugging Face checkpoint to after training
    write_tokens: str = ""  # directory to write the data to as token shards, then exit

LARGE = dict(dim=1024, n_layers=24, n_heads=16, hidden_dim=4096)
GPU = dict(compile=True, micro_batch=64, long_micro_batch=16)
PRESETS = {
    # A CPU, a minute. Shallow and narrow, since post-norm is slow at first, and σ grows as the root
    # of the width shrinks; no dropout in a run this short; 24 sequences divide by 1, 2, 3, 4, 6
    # and 8 ranks.
    "demo": dict(
        context=128, dim=64, n_layers=2, n_heads=2, hidden_dim=256, init_std=0.06, dropout=0.0,
        tokenizer="wordpiece:1024", generator_divisor=2, seq_len=64, max_predictions=10,
        long_seq_len=128, long_max_predictions=20, batch_size=24, steps=1600, lr=2e-3,
        warmup_steps=160, log_every=100, val_every=480, val_batches=32,
    ),
    # A GPU of 24 GB or a node of them, minutes: shallower than BASE, for the same reason.
    "small": dict(
        dim=512, n_layers=6, n_heads=8, hidden_dim=2048, tokenizer="wordpiece:8192", lr=4e-4,
        steps=8000, warmup_steps=800, **GPU,
    ),
    # §3, Table 6 and A.2.
    # Departure: V is that of the released vocabularies; the paper says 30,000.
    "base": dict(vocab_size=30522, **GPU),
    "large": dict(vocab_size=30522, **LARGE, **GPU),
    "base_cased": dict(vocab_size=28996, uncased=False, **GPU),
    "large_cased": dict(vocab_size=28996, uncased=False, **LARGE, **GPU),
    "l3_h768_a12": dict(vocab_size=30522, n_layers=3, **GPU),
    "l6_h768_a3": dict(vocab_size=30522, n_layers=6, n_heads=3, **GPU),
    "l6_h768_a12": dict(vocab_size=30522, n_layers=6, **GPU),
    # Undisclosed: F of this row; 4 D, as everywhere.
    "l12_h1024_a16": dict(vocab_size=30522, **LARGE | dict(n_layers=12), **GPU),
    # ELECTRA's Table 6; one length throughout, predictions and masks as in its code.
    # Departure: its sentences are consecutive. Here its pairs are BERT's, half of them random.
    "electra_small": dict(
        objective="rtd", vocab_size=30522, dim=256, n_heads=4, hidden_dim=1024, embedding_dim=128,
        max_predictions=19, dupe_factor=0, long_share=0.0, batch_size=128, lr=5e-4, compile=True,
    ),
    "electra_base": dict(
        objective="rtd", vocab_size=30522, generator_divisor=3, seq_len=512, max_predictions=79,
        dupe_factor=0, long_share=0.0, steps=766_000, lr=2e-4, compile=True, micro_batch=16,
    ),
    "electra_large": dict(
        objective="rtd", vocab_size=30522, **LARGE, seq_len=512, masked_lm_prob=0.25,
        max_predictions=130, dupe_factor=0, long_share=0.0, batch_size=2048, steps=400_000,
        lr=2e-4, compile=True, micro_batch=16,
    ),
}  # fmt: skip
BLOCK = 2**18  # tokens of a block of documents
LANES = 8  # blocks that a batch is drawn from
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PATTERN = (  # how GPT-4 and Llama 3 split text into words, for BPE rank files
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# ---------------------------------------- Model ----------------------------------------

class Embeddings(nn.Module):
    """Dropout(LayerNorm(WordEmb + TypeEmb + PosEmb)), tokens, segments [B, T] -> [B, T, W] (§3)."""

    def __init__(self, vocab_size, context, dim, dropout):
        super().__init__()
        self.dropout = dropout
        self.token = nn.Embedding(vocab_size, dim)
        self.segment = nn.Embedding(2, dim)
        self.position = nn.Embedding(context, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, tokens, segments):
        x = self.token(tokens) + self.segment(segments) + self.position.weight[: tokens.shape[1]]
        return F.dropout(self.norm(x), self.dropout, self.training)

class BidirectionalAttention(nn.Module):
    """softmax(q kᵀ / sqrt(E)) v over all positions that the mask [B, 1, 1, T] shows, [B, T, D] ->
    [B, T, D], with dropout on the probabilities and on the output (§3, A.2)."""

    def __init__(self, dim, n_heads, dropout):
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x, mask):
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_heads, D // self.n_heads)  # [B, T, 3, H, E]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, T, E] each
        p = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)  # [B, H, T, E]
        x = self.out(x.transpose(1, 2).reshape(B, T, D))  # [B, T, D]
        return F.dropout(x, self.dropout, self.training)

class PositionwiseFeedForward(nn.Module):
    """GELU(x W_i + b_i) W_f + b_f, [B, T, D] -> [B, T, D] (§3)."""

    # Undisclosed: the form of GELU that trained the paper's models. The first release has erf,
    # which is the default here; since February 2019 it has tanh.

    def __init__(self, dim, hidden_dim, gelu, dropout):
        super().__init__()
        self.form, self.dropout = gelu.replace("erf", "none"), dropout
        self.up = nn.Linear(dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        x = F.gelu(self.up(x), approximate=self.form)  # [B, T, F]
        return F.dropout(self.down(x), self.dropout, self.training)  # [B, T, D]

class Block(nn.Module):
    """A post-norm block, [B, T, D] -> [B, T, D] (§3)."""

    def __init__(self, dim, n_heads, hidden_dim, gelu, dropout):
        super().__init__()
        self.attn = BidirectionalAttention(dim, n_heads, dropout)
        self.norm1 = nn.LayerNorm(dim, eps=1e-12)
        self.mlp = PositionwiseFeedForward(dim, hidden_dim, gelu, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, x, mask):
        x = self.norm1(x + self.attn(x, mask))
        return self.norm2(x + self.mlp(x))

class BidirectionalEncoder(nn.Module):
    """The stack of blocks, embeddings [B, T, W] -> states [B, T, D]; W is projected to D if it is
    another. attention_mask [B, T] is true where there is a token; none where all are."""

    def __init__(self, embedding_dim, dim, n_layers, n_heads, hidden_dim, gelu, dropout):
        super().__init__()
        self.project = nn.Linear(embedding_dim, dim) if embedding_dim != dim else nn.Identity()
        sizes = dim, n_heads, hidden_dim, gelu, dropout
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(n_layers))

    def forward(self, x, attention_mask=None):
        x = self.project(x)
        mask = None
        if attention_mask is not None:
            # Departure: the code adds -10000 to the scores of hidden keys; here they are left out.
            mask = attention_mask.bool()[:, None, None]  # [B, 1, 1, T]
        for block in self.blocks:
            x = block(x, mask)
        return x

class MaskedLMHead(nn.Module):
    """LayerNorm(GELU(x W_t + b_t)) WordEmbᵀ + b, states [..., D] -> logits [..., V] (code)."""

    def __init__(self, dim, embedding_dim, vocab_size, gelu):
        super().__init__()
        self.form = gelu.replace("erf", "none")
        self.dense = nn.Linear(dim, embedding_dim)
        self.norm = nn.LayerNorm(embedding_dim, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x, token_embedding):
        x = self.norm(F.gelu(self.dense(x), approximate=self.form))
        return F.linear(x, token_embedding, self.bias)

def gather_states(x, positions):
    """The states at the positions [B, P], or all of them without: [B, T, D] -> [B, P, D]."""
    if positions is None:
        return x
    return x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2]))

class BERT(nn.Module):
    """§3: tokens, segments and attention_mask [B, T] -> logits of the masked LM at the positions
    [B, P, V], or everywhere [B, T, V], and of the next sentence [B, 2]."""

    def __init__(self, cfg):
        super().__init__()
        self.embeddings = Embeddings(cfg.vocab_size, cfg.context, cfg.dim, cfg.dropout)
        sizes = cfg.n_layers, cfg.n_heads, cfg.hidden_dim, cfg.gelu, cfg.dropout
        self.encoder = BidirectionalEncoder(cfg.dim, cfg.dim, *sizes)
        self.pooler = nn.Linear(cfg.dim, cfg.dim)
        self.mlm = MaskedLMHead(cfg.dim, cfg.dim, cfg.vocab_size, cfg.gelu)
        self.nsp = nn.Linear(cfg.dim, 2)

    def forward(self, tokens, segments=None, attention_mask=None, positions=None):
        segments = torch.zeros_like(tokens) if segments is None else segments
        x = self.encoder(self.embeddings(tokens, segments), attention_mask)  # [B, T, D]
        pooled = torch.tanh(self.pooler(x[:, 0]))  # [B, D], of [CLS]
        return self.mlm(gather_states(x, positions), self.embeddings.token.weight), self.nsp(pooled)

class ELECTRA(nn.Module):
    """ELECTRA §2: a narrow generator fills in what is masked, the discriminator, which is what one
    keeps, tells for each token whether it was replaced; they share the embeddings (§3.2).
    tokens [B, T] -> the generator's logits [B, P, V], the discriminator's [B, T], replaced [B, T];
    without labels there is nothing to fill in, and the discriminator sees the tokens."""

    def __init__(self, cfg):
        super().__init__()
        width, n = cfg.embedding_dim or cfg.dim, cfg.generator_divisor
        self.embeddings = Embeddings(cfg.vocab_size, cfg.context, width, cfg.dropout)
        how = cfg.gelu, cfg.dropout
        narrow = cfg.dim // n, cfg.n_layers, cfg.n_heads // n, cfg.hidden_dim // n
        self.generator = BidirectionalEncoder(width, *narrow, *how)
        self.mlm = MaskedLMHead(cfg.dim // n, width, cfg.vocab_size, cfg.gelu)
        wide = cfg.dim, cfg.n_layers, cfg.n_heads, cfg.hidden_dim
        self.discriminator = BidirectionalEncoder(width, *wide, *how)
        self.form = cfg.gelu.replace("erf", "none")
        self.dense, self.score = nn.Linear(cfg.dim, cfg.dim), nn.Linear(cfg.dim, 1)

    def forward(self, tokens, segments=None, attention_mask=None, positions=None, labels=None,
                uniform=None):  # fmt: skip
        segments = torch.zeros_like(tokens) if segments is None else segments
        x = self.generator(self.embeddings(tokens, segments), attention_mask)  # [B, T, D / n]
        logits = self.mlm(gather_states(x, positions), self.embeddings.token.weight)  # [B, P, V]
        replaced = torch.zeros_like(tokens, dtype=torch.bool)
        if labels is not None:  # sample at temperature 1, through which no gradient flows
            shares = logits.detach().float().softmax(-1).cumsum(-1)  # [B, P, V]
            filled = (shares < uniform[:, :, None]).sum(-1).clamp(max=shares.shape[-1] - 1)
            positions = positions.where(labels >= 0, 0)  # where [CLS] stands, which nothing fills
            original = tokens.scatter(1, positions, labels.where(labels >= 0, tokens[:, :1]))
            tokens = tokens.scatter(1, positions, filled.where(labels >= 0, tokens[:, :1]))
            replaced = tokens != original  # a token that is drawn again counts as original
        x = self.discriminator(self.embeddings(tokens, segments), attention_mask)  # [B, T, D]
        x = F.gelu(self.dense(x), approximate=self.form)  # [B, T, D]
        return logits, self.score(x)[..., 0], replaced

def build_model(cfg):
    """The model that cfg.objective trains."""
    return ELECTRA(cfg) if cfg.objective == "rtd" else BERT(cfg)

def init_weights(model, cfg):
    """Code: a normal of σ 0.02 cut at 2 σ for matrices and embeddings, biases 0, gains 1. A
    parameter is drawn from (seed, its name), so that every layout starts from the same numbers."""
    std = cfg.init_std
    matrices = "token|segment|position|project|qkv|out|up|down|dense|pooler|nsp|score"
    for name, p in model.named_parameters():
        if re.search(rf"\b({matrices})\.weight$", name):
            generator = torch.Generator().manual_seed(stable_hash(cfg.seed, name))
            drawn = torch.empty(p.shape)
            nn.init.trunc_normal_(drawn, 0.0, std, -2 * std, 2 * std, generator=generator)
            p.data.copy_(drawn)
        elif re.search(rf"\b({matrices}|norm[12]?|mlm)\.bias$", name):
            nn.init.zeros_(p)
        elif re.search(r"\bnorm[12]?\.weight$", name):
            nn.init.ones_(p)
        else:
            raise ValueError(f"no rule initialises {name}")

def count_parameters(model):
    """(total, activated) parameters; the tied decoder counts once, a dense model activates all."""
    total = sum(p.numel() for p in model.parameters())
    return total, total

def flops_per_token(cfg):
    """Training FLOPs per token: 2 per weight of a matrix product forward, twice that backward. All
    T keys count for a query; a head counts for the share of the positions that it sees."""
    T, P, D, W = cfg.seq_len, cfg.max_predictions, cfg.dim, cfg.embedding_dim or cfg.dim

    def encoder(n):  # of a width n times narrower
        project = W * D // n if W != D // n else 0
        weights = 4 * (D // n) ** 2 + 2 * (D // n) * (cfg.hidden_dim // n)
        return project + cfg.n_layers * (weights + 2 * D // n * T)  # and q kᵀ, A v

    if cfg.objective == "rtd":
        narrow, n = D // cfg.generator_divisor, cfg.generator_divisor
        heads = (narrow + cfg.vocab_size) * W * P / T + D * D + D
        return 6 * (encoder(1) + encoder(n) + heads)
    return 6 * (encoder(1) + ((D + cfg.vocab_size) * D * P + D * D + 2 * D) / T)

# ---------------------------------------- Data ----------------------------------------

def prose_of(code):
    """The docstrings and comments of Python code, in order, as paragraphs: lines of comments, and
    strings in three quotes that begin a line. Other strings and comments are passed over."""
    found = re.finditer(
        r"""((?:^[ \t]*\#[^\n]*\n)+)|(^[ \t]*[rRuU]?)?(\"{3}|'{3})((?:\\.|[^\\])*?)\3"""
        r"""|\#[^\n]*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""", code, re.M | re.S
    )  # fmt: skip
    parts = (re.sub(r"^[ \t]*#[ #:]*", "", m[1], flags=re.M) if m[1] else m[4] for m in found
             if m[1] or m[2] is not None)  # fmt: skip
    return "\n\n".join(parts)

def clean_text(text, uncased):
    """Text without control characters and, uncased, in lower case and without accents (code)."""
    text = text.lower() if uncased else text
    if text.isascii() and text.isprintable():
        return text
    text = "".join(c for c in text if c in "\t\n\r" or unicodedata.category(c)[0] != "C")
    if uncased:
        text = unicodedata.normalize("NFD", text)
        text = "".join(c for c in text if unicodedata.category(c) != "Mn")
    return text.replace("\ufffd", "")

@functools.lru_cache(None)
def set_apart(c):
    """A character with spaces around it if it is a word of its own (code): ASCII that is neither
    letter nor digit, punctuation, Chinese; a space for any white space."""
    chinese = r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ceaf\U0002f800-\U0002fa1f]"
    if c.isspace():
        return " "
    sign = c.isascii() and not c.isalnum() or unicodedata.category(c)[0] == "P"
    return f" {c} " if sign or re.match(chinese, c) else c

def split_sentences(documents, cfg):
    """(name, sentences) of each (name, text). Code: a sentence a line, and a blank line between
    documents; or prose, cut into sentences here."""
    # Undisclosed: how the paper cut Wikipedia and books into sentences. Here one ends with its
    # paragraph, or with a full stop and the like before a space and what is not lower case.
    # Departure: books and Wikipedia are not at hand. The documents of the embedded corpus are
    # modules, and their sentences come from docstrings and comments. The released README's advice
    # to cut 2 % of the sentences at random is not followed.
    cut = re.compile(r"(?<=[.!?])\s+(?![a-z])|(?<=[。！？])")
    for name, text in documents:
        if name != text and name.endswith(".py"):
            text = prose_of(text)
        paragraphs = [p.strip() for p in re.split(r"\n\s*\n", text)]
        if cfg.sentences == "lines":
            for i, paragraph in enumerate(filter(None, paragraphs)):
                lines = clean_text(paragraph, cfg.uncased).split("\n")
                yield f"{name} {i}", [line.strip() for line in lines]
            continue
        found = (s for p in paragraphs for s in cut.split(" ".join(p.split())))
        yield name, [clean_text(s, cfg.uncased) for s in found if re.search(r"[^\W\d_]", s)]

class WordPiece:
    """§3: a vocabulary with the interface of a tiktoken.Encoding. A word is cut greedily into the
    longest entries that fit; those inside a word begin with ##."""

    def __init__(self, entries, name):
        self.name = str(name)
        self.entries = entries
        self.n_vocab = len(entries)
        self.ids = {entry: i for i, entry in enumerate(entries)}
        missing = [token for token in SPECIALS if token not in self.ids]
        if missing:
            raise ValueError(f"{name}: none of its {len(entries)} entries is {missing[0]}")
        self.cut = functools.lru_cache(2**16)(self.cut)

    def token_byte_values(self):
        """The entries that are neither special nor unused, as bytes."""
        special = r"\[[A-Z]+\]|\[unused\d+\]"
        return [entry.encode() for entry in self.ids if not re.fullmatch(special, entry)]

    def encode_single_token(self, entry):
        """The id of an entry, a string or bytes."""
        return self.ids[entry.decode() if isinstance(entry, bytes) else entry]

    def cut(self, word):
        """Ids of a word; [UNK] if it has a part without entry, or more than 200 characters."""
        ids = []
        start = 0
        while start < len(word) <= 200:
            for end in range(len(word), start, -1):
                piece = "##" * (start > 0) + word[start:end]
                if piece in self.ids:
                    break
            else:
                return [self.ids["[UNK]"]]
            ids.append(self.ids[piece])
            start = end
        return ids or [self.ids["[UNK]"]]

    def encode_ordinary(self, text):
        """Ids of text."""
        words = "".join(map(set_apart, text)).split()
        return [i for word in words for i in self.cut(word)]

    def encode_to_numpy(self, text, disallowed_special):
        """Ids of text as an array; as in encode_ordinary, special tokens in it are plain text."""
        return np.array(self.encode_ordinary(text), np.uint32)

    def decode(self, ids):
        """The words of ids, separated by spaces."""
        return " ".join(self.entries[i] for i in ids).replace(" ##", "")

def learn_wordpiece(documents, size):
    """A WordPiece of `size` entries from a list of (name, sentences): the special tokens, the most
    frequent characters, as words and inside them, and the most frequent words. Of several documents
    those that their hash holds out are not read."""
    words = collections.Counter()
    letters = collections.Counter()
    for name, sentences in documents:
        if len(documents) == 1 or not is_held_out(name):
            words.update("".join(map(set_apart, " ".join(sentences))).split())
    for word, n in words.items():
        letters.update(dict.fromkeys(word, n))
    letters = [c for c, _ in letters.most_common(96)]
    entries = [*SPECIALS, *letters, *(f"##{c}" for c in letters if set_apart(c) == c)]
    entries = list(dict.fromkeys([*entries, *(word for word, _ in words.most_common())]))
    if len(entries) < size:
        raise ValueError(f"wordpiece:{size}: the text to train on has {len(entries)} entries")
    return WordPiece(entries[:size], f"wordpiece:{size}")

def choose_tokenizer(name, documents):
    """A WordPiece, read from a file or learned from documents, or what load_tokenizer(name) is."""
    # Departure: how WordPiece learned its entries was not released, and those of books and
    # Wikipedia suit neither a small model nor Python's library. wordpiece:N takes what is frequent,
    # and spells other words; a released vocab.txt is read, and words are cut as released.
    if name.startswith("wordpiece:"):
        return learn_wordpiece(documents, int(name.removeprefix("wordpiece:")))
    if os.path.isfile(name):
        with explain(f"{name} is not UTF-8 text", UnicodeDecodeError):
            lines = Path(name).read_text("utf-8").removesuffix("\n").split("\n")
        if len(lines[0].split()) == 1:  # a BPE rank file has two fields a line
            return WordPiece(lines, name)
    return load_tokenizer(name or "bytes", SPECIALS)

def save_vocabulary(tokenizer, path):
    """Write the entries of a WordPiece to a file, one a line; nothing for other tokenizers."""
    if isinstance(tokenizer, WordPiece):
        path.write_text("\n".join(tokenizer.entries) + "\n", "utf-8")

def tokenize_sentences(documents, tokenizer):
    """(name, ids) of each (name, sentences) with a text: [SEP] ends a sentence, another [SEP] the
    document."""
    separator = tokenizer.encode_single_token("[SEP]")
    for name, sentences in documents:
        named = ((name, sentence) for sentence in sentences)
        parts = [ids for _, ids in tokenize(named, tokenizer, separator) if len(ids) > 1]
        if parts:
            yield name, np.concatenate([*parts, parts[-1][-1:]])

class SentenceCorpus:
    """What get_batch reads: a Corpus of the ids of tokenize_sentences, and the ids of SPECIALS."""

    def __init__(self, ids, tokenizer):
        self.ids = ids
        self.special_ids = {token: tokenizer.encode_single_token(token) for token in SPECIALS}

def read_block(corpus, block, n_blocks):
    """Documents, lists of sentences, which are lists of ids, in one of n_blocks equal parts."""
    first = corpus.size * block // n_blocks
    stop = corpus.size * (block + 1) // n_blocks
    documents = [[]]
    sentence = []
    # Two separators end what the block's border cuts.
    for i in [*corpus.read(first, stop - first).tolist(), corpus.separator, corpus.separator]:
        if i != corpus.separator:
            sentence.append(i)
        elif sentence:
            documents[-1].append(sentence)
            sentence = []
        elif documents[-1]:
            documents.append([])
    return documents[:-1]

def create_instances(documents, index, length, short_seq_prob, rng):
    """The pairs (A, B, is B random) of one document of documents, as the released code makes them,
    one draw of rng after the other."""
    # Undisclosed: the generator that made the paper's data, in C++; this one follows it.
    document, most = documents[index], length - 3  # [CLS], [SEP] and [SEP]
    target = rng.randint(2, most) if rng.random() < short_seq_prob else most
    chunk, size, i = [], 0, 0
    while i < len(document):
        chunk.append(document[i])
        size += len(document[i])
        if i == len(document) - 1 or size >= target:
            a_end = rng.randint(1, len(chunk) - 1) if len(chunk) >= 2 else 1
            a = list(itertools.chain.from_iterable(chunk[:a_end]))
            is_random = len(chunk) == 1 or rng.random() < 0.5
            if is_random:
                for _ in range(10):
                    other = rng.randint(0, len(documents) - 1)
                    if other != index:
                        break
                b, start = [], rng.randint(0, len(documents[other]) - 1)
                for sentence in documents[other][start:]:
                    b += sentence
                    if len(b) >= target - len(a):
                        break
                i -= len(chunk) - a_end  # what was not used comes again
            else:
                b = list(itertools.chain.from_iterable(chunk[a_end:]))
            while len(a) + len(b) > most:  # front or back of the longer one
                longer = a if len(a) > len(b) else b
                del longer[0 if rng.random() < 0.5 else -1]
            yield a, b, is_random
            chunk, size = [], 0
        i += 1

@functools.lru_cache(4 * LANES)
def block_instances(corpus, block, n_blocks, length, short_seq_prob, key):
    """The pairs of a block's documents: (ids of A and B, length of A, is B random) of each."""
    documents = read_block(corpus, block, n_blocks)
    rng = random.Random(stable_hash(key, block))
    return [
        (np.array(a + b, np.int32), len(a), is_random)
        for index in range(len(documents))
        for a, b, is_random in create_instances(documents, index, length, short_seq_prob, rng)
    ]

def find_instance(corpus, index, cfg):
    """Instance `index` of the run, (ids of A and B, length of A, is B random), and the key of its
    masks."""
    # Departure: a pass takes from each block of BLOCK tokens as many instances as windows of T fit,
    # at random, so that any instance is found without making those before it; it mixes LANES blocks
    # at a time, and its random sentences come from the same block, which are the document's own
    # where it fills the block; one that a border cuts is two. The released code makes files, of all
    # instances of shuffled documents. Here, what a pass leaves of a block may come in another.
    n_blocks = max(corpus.size // BLOCK, 1)
    quota = max(corpus.size // (n_blocks * cfg.seq_len), 1)
    epoch, index = divmod(index, n_blocks * quota)
    group, index = divmod(index, LANES * quota)
    lanes = min(LANES, n_blocks - group * LANES)
    lane, slot = divmod(permutation(lanes * quota, cfg.seed, epoch, group)[index], quota)
    block = permutation(n_blocks, cfg.seed, epoch)[group * LANES + lane]
    key = cfg.seed, epoch % cfg.dupe_factor if cfg.dupe_factor else epoch, cfg.seq_len
    settings = n_blocks, cfg.seq_len, cfg.short_seq_prob, key
    found = block_instances(corpus, block, *settings)
    if not found:
        n = corpus.size // n_blocks
        raise ValueError(f"block {block} of the data, of {n:,} tokens, has no text")
    which = permutation(max(quota, len(found)), key, block)[slot] % len(found)
    return *found[which], (*key, int(block), int(slot))

def create_masked_lm_predictions(tokens, cfg, specials, n_vocab, rng):
    """A.1 on the list tokens: (tokens as seen, sorted positions, their labels)."""
    hidden = specials["[CLS]"], specials["[SEP]"]
    candidates = [i for i, token in enumerate(tokens) if token not in hidden]
    rng.shuffle(candidates)
    n = min(cfg.max_predictions, max(1, round(len(tokens) * cfg.masked_lm_prob)))
    positions, seen = candidates[:n], list(tokens)
    # ELECTRA's code hides 85 % of them, and shows the rest
    masked, kept = (0.85, 1.0) if cfg.objective == "rtd" else (0.8, 0.5)
    for i in positions:
        if rng.random() < masked:
            seen[i] = specials["[MASK]"]
        elif rng.random() >= kept:
            seen[i] = rng.randint(0, n_vocab - 1)
    positions.sort()
    return seen, positions, [tokens[i] for i in positions]

def get_batch(corpus, first, n, cfg):
    """Instances first ... first + n - 1 of the run, whatever the ranks or the moment: tokens,
    segments and attention_mask [n, T]; positions, labels and uniform (numbers in [0, 1), by which
    ELECTRA samples) [n, P]; is_random [n]; and their counts."""
    T, P = cfg.seq_len, cfg.max_predictions
    specials = corpus.special_ids
    sep = specials["[SEP]"]
    n_vocab = len(corpus.ids.token_bytes)
    tokens = np.full((n, T), specials["[PAD]"], np.int64)
    segments = np.zeros_like(tokens)
    attention_mask = np.zeros((n, T), bool)
    positions = np.zeros((n, P), np.int64)
    labels = np.full((n, P), -100)
    uniform = np.zeros((n, P), np.float32)
    is_random = np.zeros(n, np.int64)
    for row in range(n):
        ids, split, is_random[row], key = find_instance(corpus.ids, first + row, cfg)
        ids = [specials["[CLS]"], *ids[:split].tolist(), sep, *ids[split:].tolist(), sep]
        rng = random.Random(stable_hash("masks", *key))
        seen, where, originals = create_masked_lm_predictions(ids, cfg, specials, n_vocab, rng)
        tokens[row, : len(ids)] = seen
        attention_mask[row, : len(ids)] = True
        segments[row, split + 2 : len(ids)] = 1
        positions[row, : len(where)] = where
        labels[row, : len(where)] = originals
        if cfg.objective == "rtd":
            uniform[row] = [rng.random() for _ in range(P)]
    arrays = dict(
        tokens=tokens, segments=segments, attention_mask=attention_mask, positions=positions,
        labels=labels, uniform=uniform, is_random=is_random,
    )  # fmt: skip
    counts = {"n_targets": int((labels >= 0).sum()), "n_sequences": n}
    counts |= {"n_tokens": int(attention_mask.sum()), "n_random": int(is_random.sum())}
    return {name: torch.from_numpy(array) for name, array in arrays.items()} | counts

def most_documents(corpus):
    """(documents of a block, sentences of a document), the most that are found; the search ends
    where both are 2 or more, or after 64 blocks."""
    n_documents = n_sentences = 0
    n_blocks = max(corpus.size // BLOCK, 1)
    for block in range(min(n_blocks, 64)):
        documents = read_block(corpus, block, n_blocks)
        n_documents = max(n_documents, len(documents))
        n_sentences = max([n_sentences, *map(len, documents)])
        if min(n_documents, n_sentences) >= 2:
            break
    return n_documents, n_sentences

def check_documents(corpus, heldout, cfg):
    """Raise ValueError if next sentences cannot be drawn: they need, in a block, two documents, one
    of them of two sentences."""
    name = cfg.data or "the embedded corpus"
    n_documents, n_sentences = most_documents(corpus)
    if n_documents < 2:
        found = f"{n_documents} document to train on"
        raise ValueError(f"{name} has {found}, and random sentences need 2")
    if n_sentences < 2:
        raise ValueError(f"{name}: no document has 2 sentences: none has a next one")
    if most_documents(heldout)[0] < 2:
        print("held out is one document: its random sentences are its own")

# ---------------------------------------- Objective ----------------------------------------

def masked_lm(logits, labels, n_targets):
    """§3.1: (mean nats of the labels, share of them that has the largest logit), both of them this
    batch's sums over n_targets, the count of the whole global batch; 1e-5 is the code's."""
    nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    hits = (logits.argmax(-1) == labels).sum()
    return nats / (n_targets + 1e-5), hits / n_targets

def replaced_token_detection(model, batch, cfg):
    """ELECTRA §2: the generator's masked LM, plus rtd_weight times the mean sigmoid cross-entropy
    of "replaced" over all tokens that are not padding."""
    names = "tokens", "segments", "attention_mask", "positions", "labels", "uniform"
    with torch.autocast(batch["tokens"].device.type, torch.bfloat16, cfg.precision == "bf16"):
        logits, scores, replaced = model(*(batch[name] for name in names))
    mlm, mlm_acc = masked_lm(logits.float(), batch["labels"], batch["n_targets"])
    mask, n_tokens = batch["attention_mask"], batch["n_tokens"]
    nats = F.binary_cross_entropy_with_logits(scores.float(), replaced.float(), reduction="none")
    rtd = (nats * mask).sum() / n_tokens
    hits = (((scores > 0) == replaced) & mask).sum() / n_tokens
    metrics = {"mlm": mlm, "rtd": rtd, "mlm_acc": mlm_acc, "rtd_acc": hits}
    return mlm + cfg.rtd_weight * rtd, metrics | {"replaced": replaced.sum() / n_tokens}

def objective(model, batch, cfg):
    """A.2: the sum of the mean masked LM loss and the mean next sentence loss, with metrics. Each
    is a sum over the batch divided by its count in the whole global batch."""
    # Departure: the code divides by the predictions of a device, here by those of all devices.
    if cfg.objective == "rtd":
        return replaced_token_detection(model, batch, cfg)
    names = "tokens", "segments", "attention_mask", "positions"
    with torch.autocast(batch["tokens"].device.type, torch.bfloat16, cfg.precision == "bf16"):
        logits, next_logits = model(*(batch[name] for name in names))  # [B, P, V], [B, 2]
    mlm, mlm_acc = masked_lm(logits.float(), batch["labels"], batch["n_targets"])
    n, is_random = batch["n_sequences"], batch["is_random"]
    nsp = F.cross_entropy(next_logits.float(), is_random, reduction="sum") / n
    hits = (next_logits.argmax(-1) == is_random).sum() / n
    return mlm + nsp, {"mlm": mlm, "nsp": nsp, "mlm_acc": mlm_acc, "nsp_acc": hits}

# ---------------------------------------- Optimizer ----------------------------------------

class AdamWeightDecay(torch.optim.Optimizer):
    """Adam as the released code has it: m and v without bias correction, decoupled decay."""

    # Departure: A.2 says "L2 weight decay", which would be a part of the gradient.

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state.update(m=torch.zeros_like(p), v=torch.zeros_like(p))
                m = state["m"].lerp_(p.grad, 1 - beta1)  # m = β1 m + (1 - β1) g
                v = state["v"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                update = m / (v.sqrt() + group["eps"]) + group["weight_decay"] * p
                p.sub_(update, alpha=group["lr"])

def build_optimizer(model, cfg):
    """A.2: Adam (0.9, 0.999), decay 0.01 on all but biases and norms (code), eps 1e-6 (code)."""
    groups = [
        dict(params=[p for p in model.parameters() if p.ndim > 1], weight_decay=cfg.weight_decay),
        dict(params=[p for p in model.parameters() if p.ndim <= 1], weight_decay=0.0),
    ]
    return AdamWeightDecay(groups, dict(lr=cfg.lr, betas=(0.9, 0.999), eps=1e-6))

def learning_rate(step, cfg):
    """A.2: linear warm-up, then linear decay to 0; step counts the updates made before. The decay
    began at step 0 (code), so that the rate drops where warm-up ends, just below lr."""
    if step < cfg.warmup_steps:
        return cfg.lr * step / cfg.warmup_steps
    return cfg.lr * max(1 - step / cfg.steps, 0.0)

def phase_at(step, cfg):
    """A.2: cfg as it is at that step, sequences of seq_len, or at the end of long_seq_len."""
    # Undisclosed: the batch in the first phase. "256 sequences" holds in both.
    n_long = round(cfg.long_share * cfg.steps)
    if step < cfg.steps - n_long or n_long == 0:
        return cfg
    return dataclasses.replace(
        cfg, seq_len=cfg.long_seq_len, max_predictions=cfg.long_max_predictions,
        micro_batch=cfg.long_micro_batch or cfg.micro_batch,
    )  # fmt: skip

def phases_of(cfg):
    """cfg as it is in each phase: one or two."""
    short = phase_at(0, cfg)
    long = phase_at(cfg.steps, cfg)
    return [short] if short == long else [short, long]

# ---------------------------------------- Precision ----------------------------------------

# Parameters, gradients and Adam's moments are fp32. Under bf16, autocast (in objective) runs matrix
# products and attention in bf16; norms, residual sums, sampling and the losses stay fp32.
# Undisclosed: the paper's precision. The released code is fp32 throughout: --precision fp32.

PEAK_FLOPS = {  # dense bf16, by the device's exact name; a device not listed gets no MFU
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA B200": 2250e12,
}  # fmt: skip

# ---------------------------------------- Parallelism ----------------------------------------

def parallelize(model, cfg, mesh):
    """Synchronous data parallelism (A.2): each rank has a copy, gradients are averaged.
    Recomputation and compilation are applied to the blocks first."""
    # Departure: on TPUs the code clips each replica's gradient before the average; here, after it.
    for block in model.modules():
        if isinstance(block, Block) and cfg.recompute == "block":
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if isinstance(block, Block) and cfg.compile:
            torch.compiler.config.fail_on_recompile_limit_hit = True
            block.compile(dynamic=False)
    if mesh.size() == 1:
        return model
    # A static graph is faster, and wrong with gradient accumulation.
    static_graph = all(split_batch(phase, mesh.size())[0] == 1 for phase in phases_of(cfg))
    return nn.parallel.DistributedDataParallel(
        model, process_group=mesh.get_group(), gradient_as_bucket_view=True,
        static_graph=static_graph,
    )  # fmt: skip

def memory_per_rank(cfg):
    """Bytes on one rank of cfg.world_size as an eager backward pass begins, by kind."""
    with torch.device("meta"):
        n, _ = count_parameters(build_model(cfg))
    _, micro = split_batch(cfg, cfg.world_size)
    positions = micro * cfg.seq_len
    slots = micro * cfg.max_predictions
    size = 2 if cfg.precision == "bf16" else 4

    def encoder(n):  # of a width n times narrower
        # Kept per position and block: inputs of both norms (fp32); inputs of the four products, q,
        # k, v and GELU's input (in the products' precision); a byte an entry of two dropout masks.
        dim = cfg.dim // n
        hidden_dim = cfg.hidden_dim // n
        block = 8 * dim + size * (6 * dim + 2 * hidden_dim) + 2 * dim * (cfg.dropout > 0)
        if cfg.recompute == "block":  # every block's input, and one block at a time in full
            block = 4 * dim + block / cfg.n_layers
        return positions * (cfg.n_layers * block + 4 * dim)  # and the last states

    def head(dim):  # inputs of both products, of GELU and of the norm; the loss's softmax
        return slots * (size * (dim + 2 * width) + 4 * width + 4 * cfg.vocab_size)

    width = cfg.embedding_dim or cfg.dim
    embedded = positions * (4 + (cfg.dropout > 0)) * width  # the norm's input, dropout's mask
    if cfg.objective == "rtd":
        narrow = cfg.dim // cfg.generator_divisor
        kept = encoder(1) + encoder(cfg.generator_divisor) + head(narrow) + 2 * embedded
        kept += positions * size * 2 * cfg.dim  # inputs of GELU and of the score
    else:
        kept = encoder(1) + head(cfg.dim) + embedded
    kinds = {"parameters": 4 * n, "gradients": 4 * n, "optimizer": 8 * n}
    return kinds | {"activations": int(kept)}

# ---------------------------------------- Checkpoint ----------------------------------------

HF_CONFIG = {  # field of Config: (key in config.json, default of BertConfig)
    "vocab_size": ("vocab_size", 30522), "context": ("max_position_embeddings", 512),
    "dim": ("hidden_size", 768), "n_layers": ("num_hidden_layers", 12),
    "n_heads": ("num_attention_heads", 12), "hidden_dim": ("intermediate_size", 3072),
    "gelu": ("hidden_act", "gelu"),
}  # fmt: skip
HF_FIXED = {
    "model_type": "bert", "layer_norm_eps": 1e-12, "type_vocab_size": 2, "is_decoder": False,
    "position_embedding_type": "absolute", "tie_word_embeddings": True,
}  # fmt: skip
HF_GELU = {"gelu": "erf", "gelu_new": "tanh"}
HF_NAMES = {
    "embeddings.token.": "bert.embeddings.word_embeddings.",
    "embeddings.segment.": "bert.embeddings.token_type_embeddings.",
    "embeddings.position.": "bert.embeddings.position_embeddings.",
    "embeddings.norm.": "bert.embeddings.LayerNorm.", "encoder.blocks.": "bert.encoder.layer.",
    "attn.qkv.": "attention.self.qkv.", "attn.out.": "attention.output.dense.",
    "norm1.": "attention.output.LayerNorm.", "norm2.": "output.LayerNorm.",
    "mlp.up.": "intermediate.dense.", "mlp.down.": "output.dense.", "pooler.": "bert.pooler.dense.",
    "mlm.dense.": "cls.predictions.transform.dense.", "mlm.bias": "cls.predictions.bias",
    "mlm.norm.": "cls.predictions.transform.LayerNorm.", "nsp.": "cls.seq_relationship.",
}  # fmt: skip
# fields of Config that a checkpoint fixes
SHAPE = (*HF_CONFIG, "objective", "embedding_dim", "generator_divisor")

def bert_tensors(model):
    """(Hugging Face's name, our tensor or a part of it) of each parameter."""
    for name, p in model.named_parameters():
        for ours, theirs in HF_NAMES.items():
            name = re.sub(rf"(^|\.){re.escape(ours)}", rf"\g<1>{theirs}", name)
        parts = ("query", "key", "value") if ".qkv." in name else ("qkv",)
        for part, tensor in zip(parts, p.data.chunk(len(parts))):
            yield name.replace("qkv", part), tensor

def from_hf(path):
    """(model, cfg) from the checkpoint directory of a BertForPreTraining."""
    with explain(f"{path} holds no BertForPreTraining", Exception):
        fields = read_hf_config(path, HF_CONFIG, HF_FIXED)
        if fields["gelu"] not in HF_GELU:
            raise ValueError(f"config.json has hidden_act {fields['gelu']!r}, not {[*HF_GELU]}")
        cfg = Config(**fields | {"gelu": HF_GELU[fields["gelu"]]})
        model = BERT(cfg)
        tensors = {}
        for name, tensor in read_hf_tensors(path).items():
            name = name.replace("LayerNorm.gamma", "LayerNorm.weight")  # as first converted
            tensors[name.replace("LayerNorm.beta", "LayerNorm.bias")] = tensor
        for name, tensor in bert_tensors(model):
            tensor.copy_(tensors[name].view_as(tensor))
    return model, cfg

def to_hf(model, cfg, path):
    """Write model to the directory path as a BertForPreTraining."""
    from safetensors.torch import save_file

    config = {key: getattr(cfg, field) for field, (key, _) in HF_CONFIG.items()} | HF_FIXED
    config["hidden_act"] = {form: name for name, form in HF_GELU.items()}[cfg.gelu]
    config |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), cfg.dropout)
    config["architectures"] = ["BertForPreTraining"]
    tensors = {k: v.cpu().clone().contiguous() for k, v in bert_tensors(model)}
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

def run_batches(model, batches, cfg, backward):
    """Loss and metrics of the global batch of which this rank has these micro-batches, by name,
    as scalars on the device; `backward` adds the gradient of the loss to the parameters."""
    sums = {}
    for i, batch in enumerate(batches):
        model.require_backward_grad_sync = i == len(batches) - 1  # DDP: one all-reduce an update
        loss, metrics = objective(model, batch, cfg)
        if backward:
            (loss * dist.get_world_size()).backward()  # DDP averages over the ranks
        for name, value in {"loss": loss, **metrics}.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
    values = torch.stack(list(sums.values()))
    dist.all_reduce(values)
    return dict(zip(sums, values))

def update_model(model, optimizer, batches, lr, cfg):
    """One update from this rank's micro-batches: loss, metrics and gradient norm ("grad") of the
    global batch, by name. The parameters stay as they are if loss or norm is not finite, which all
    ranks find alike."""
    found = run_batches(model, batches, cfg, backward=True)
    found["grad"] = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
    # The update waits for the device here alone.
    found = dict(zip(found, torch.stack(list(found.values())).tolist()))
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(found["loss"]) and math.isfinite(found["grad"]):
        optimizer.step()
    optimizer.zero_grad()
    return found

COUNTED = {  # what a metric is a mean over
    "mlm": "n_targets", "mlm_acc": "n_targets", "nsp": "n_sequences", "nsp_acc": "n_sequences",
    "rtd": "n_tokens", "rtd_acc": "n_tokens", "replaced": "n_tokens",
}  # fmt: skip

def validate_objective(model, heldout, step, cfg, device, rank, ranks):
    """Print and log the held-out loss, its terms and the accuracies; majority is what always giving
    the more frequent answer about the next sentence would score."""
    totals = collections.Counter()
    counts = collections.Counter()
    for i in range(min(cfg.val_batches, heldout.ids.n_windows(cfg.seq_len) // cfg.batch_size)):
        batches = read_batch(heldout, i * cfg.batch_size, cfg, device, rank, ranks)
        sum_counts(batches, ranks)
        counts.update({k: n for k, n in batches[0].items() if k.startswith("n_")})
        with evaluation_mode(model, cfg.compile):
            means = run_batches(model, batches, cfg, backward=False)
        means.pop("loss")
        totals.update({k: float(mean) * batches[0][COUNTED[k]] for k, mean in means.items()})
    means = {name: total / counts[COUNTED[name]] for name, total in totals.items()}
    loss = means["mlm"] + means.get("nsp", 0.0) + cfg.rtd_weight * means.get("rtd", 0.0)
    if cfg.objective == "mlm":
        share = counts["n_random"] / counts["n_sequences"]
        means["majority"] = max(share, 1 - share)
    row = {"val_loss": loss, "val_bpb": math.nan}
    row |= {f"val_{name}": mean for name, mean in means.items()}
    log(cfg.out, step, f"val {step}", row, [f"length {cfg.seq_len}"])

def sample(model, ids, segments, mask, allowed_ids, cfg):
    """ids, with each that is mask replaced by the most likely of allowed_ids (boolean, of the first
    entries of the vocabulary), one position at a time, the most certain first."""
    device = model.embeddings.token.weight.device
    ids = list(ids)
    with evaluation_mode(model, cfg.compile):
        while mask in ids:
            tokens, kinds = torch.tensor([ids, segments], device=device)[:, None]  # [1, T] each
            with torch.autocast(device.type, torch.bfloat16, cfg.precision == "bf16"):
                logits = model(tokens, kinds)[0][0].float().cpu()  # [T, V]
            logits = logits[:, : len(allowed_ids)].masked_fill(~allowed_ids, -math.inf)
            certainty, best = logits.log_softmax(-1).max(-1)
            position = certainty.masked_fill(tokens[0].cpu() != mask, -math.inf).argmax()
            ids[position] = best[position].item()
    return ids

def fill_masks(model, heldout, tokenizer, cfg):
    """Print the prompt, or a held-out sequence, with its [MASK], and what the model fills in."""
    specials = heldout.special_ids
    if cfg.prompt:
        parts = [clean_text(part, cfg.uncased) for part in cfg.prompt.split("[MASK]")]
        ids = [i for part in parts for i in (specials["[MASK]"], *tokenizer.encode_ordinary(part))]
        ids = [specials["[CLS]"], *ids[1:], specials["[SEP]"]]
        if len(ids) > cfg.context:
            print(f"--prompt has {len(ids)} tokens, of which {cfg.context} are read")
        ids = ids[: cfg.context]
        segments = [0] * len(ids)
    else:
        batch = get_batch(heldout, 0, 1, cfg)
        ids = batch["tokens"][0, : batch["n_tokens"]].tolist()
        segments = batch["segments"][0, : batch["n_tokens"]].tolist()
    allowed_ids = torch.from_numpy(heldout.ids.token_bytes > 0)
    filled = sample(model, ids, segments, specials["[MASK]"], allowed_ids, cfg)
    print(f"masked: {tokenizer.decode(ids)}\nfilled: {tokenizer.decode(filled)}")

def check(cfg, ranks):
    """Raise ValueError for a configuration that cannot run on that many ranks."""
    for field in dataclasses.fields(cfg):
        may_be_0 = field.name in ("warmup_steps", "dupe_factor")
        least = int(field.type is int and field.default > 0 and not may_be_0)
        if field.type in (int, float) and not least <= getattr(cfg, field.name) < math.inf:
            raise ValueError(f"--{field.name} {getattr(cfg, field.name)} is not {least} or more")
    for name in ("dropout", "long_share", "short_seq_prob", "masked_lm_prob"):
        if getattr(cfg, name) > 1 or cfg.dropout == 1:
            raise ValueError(f"--{name} {getattr(cfg, name)} is no share")
    for phase in phases_of(cfg):
        name = "seq_len" if phase is cfg else "long_seq_len"
        steps, micro = split_batch(phase, ranks)
        for wrong, message in (
            (phase.seq_len > cfg.context, f"exceeds --context {cfg.context}"),
            (phase.seq_len < 5, "does not hold [CLS] a [SEP] b [SEP], 5 tokens"),
            (ranks * steps * micro != cfg.batch_size,
             f"has --batch_size {cfg.batch_size}, not {ranks} ranks x micro-batches of {micro}"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(f"--{name} {phase.seq_len} {message}")
    n = cfg.generator_divisor
    rtd = cfg.objective == "rtd"
    sizes = f"{cfg.dim}, {cfg.n_heads} heads and {cfg.hidden_dim}"
    learned = cfg.tokenizer.startswith("wordpiece:")
    for wrong, message in (
        (cfg.dim % cfg.n_heads, f"{cfg.n_heads} heads do not divide the width {cfg.dim}"),
        (rtd and (cfg.dim % n or cfg.n_heads % n or cfg.hidden_dim % n),
         f"--generator_divisor {n} does not divide width {sizes}"),
        (cfg.resume and not cfg.out, "--resume needs --out"),
        (cfg.eval and not cfg.out and not cfg.init, "--eval needs --out or --init"),
        (rtd and (cfg.init or cfg.export), "--init and --export take BERT, and rtd trains ELECTRA"),
        (cfg.write_tokens and ranks > 1, "--write_tokens runs in one process, without torchrun"),
        (cfg.init_std == 0, "--init_std 0.0 draws no weights"),
        (cfg.embedding_dim and not rtd, "--embedding_dim is of --objective rtd"),
        (cfg.prompt and "[MASK]" not in cfg.prompt, "--prompt has no [MASK] to fill in"),
        (cfg.init and learned, f"--init {cfg.init} needs the --tokenizer of its vocabulary"),
        (learned and not re.fullmatch(r"wordpiece:[1-9]\d{2,6}", cfg.tokenizer),
         f"--tokenizer {cfg.tokenizer} is not wordpiece:N with N from 100"),
    ):
        if wrong:
            raise ValueError(message)
    check_directories(cfg.init, cfg.export, cfg.write_tokens)

def dry_run(cfg):
    """Print parameters, FLOPs per token and bytes per rank in each phase, from shapes alone."""
    check(cfg, cfg.world_size)
    learned = re.fullmatch(r"wordpiece:(\d+)", cfg.tokenizer)
    if not cfg.vocab_size and learned:
        cfg.vocab_size = int(learned[1])
    cfg.vocab_size = cfg.vocab_size or choose_tokenizer(cfg.tokenizer, []).n_vocab
    with torch.device("meta"):
        total, activated = count_parameters(build_model(cfg))
    print(f"parameters {total:,} | activated {activated:,}")
    for phase in phases_of(cfg):
        print(f"FLOPs per token {flops_per_token(phase):.4g} at length {phase.seq_len}", end=" ")
        print(f"| 6 N gives {6 * activated:.4g}")
        print_memory(memory_per_rank(phase))

def train(model, optimizer, corpus, heldout, state, run, device):
    """Update the model until the sequences of the run are used up; False if a signal ends it."""
    place = device, dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp",))
    replicas = parallelize(model, run, mesh)
    signals = catch_signals()
    thread = ThreadPoolExecutor(1)  # reads the next batch during an update

    def read_ahead(first):
        phase = phase_at(first / run.batch_size, run)
        return thread.submit(read_batch, corpus, first, phase, *place)

    ahead = read_ahead(state["sequences"])
    first_step = saved = state["step"]
    clock = time.perf_counter()
    pace = None  # seconds per update
    n_skipped = 0
    while True:
        step = state["step"]
        first = state["sequences"]  # of the batch to come
        cfg = phase_at(first / run.batch_size, run)
        steps_left = math.ceil(cfg.steps - first / cfg.batch_size)
        error = ahead.exception()  # waits until that batch is read
        if step > first_step + 1:  # the first update may compile and is left out
            seconds = time.perf_counter() - clock
            pace = 0.9 * (pace or seconds) + 0.1 * seconds
        (stop,) = sum_over_ranks(len(signals) + (error is not None))
        end = steps_left <= 0 or stop
        if cfg.out and step > saved and not n_skipped and (end or step % cfg.save_every == 0):
            save_checkpoint(cfg.out, model, optimizer, state)
            saved = step
        if error:
            raise error
        if stop:
            return False
        if end or step % cfg.val_every == 0:
            validate_objective(model, heldout, step, cfg, *place)
        if end:
            return True

        clock = time.perf_counter()
        batches = ahead.result()
        ahead = read_ahead(first + cfg.batch_size)
        sum_counts(batches, dist.get_world_size())
        torch.manual_seed(stable_hash(cfg.seed, step, dist.get_rank()))  # of dropout
        lr = learning_rate(first / cfg.batch_size, cfg)
        found = update_model(replicas, optimizer, batches, lr, cfg)
        finite = math.isfinite(found["loss"]) and math.isfinite(found["grad"])
        state["step"] += 1
        state["sequences"] += cfg.batch_size
        state["tokens"] += finite * cfg.batch_size * cfg.seq_len
        if step == 0 or steps_left == 1 or state["step"] % cfg.log_every == 0:
            row = {"loss": found["loss"], "bpb": math.nan, "lr": lr, "grad": found["grad"]}
            row |= found | {"tokens": state["tokens"]}
            head = f"step {step + 1}/{step + steps_left}"
            tail = progress(state["tokens"], steps_left - 1, pace, cfg, device)
            log(cfg.out, step + 1, head, row, tail)
        n_skipped = 0 if finite else n_skipped + 1
        if n_skipped:
            print(f"step {step + 1} skipped: its loss or gradient is not finite")
        if n_skipped == 3 or (n_skipped and steps_left == 1):
            raise ValueError(f"no finite gradient in the last {n_skipped} steps to {step + 1}")

def load_sentences(cfg):
    """(tokenizer, training SentenceCorpus, held-out SentenceCorpus) of --data; sets cfg.vocab_size.
    With --write_tokens the data is written as shards instead, and the result is None."""
    files, shards = find_files(cfg.data)
    documents = split_sentences(read_documents(cfg.data, files), cfg)
    if cfg.tokenizer.startswith("wordpiece:"):
        documents = list(documents)  # read twice
    if shards and (isinstance(documents, list) or not cfg.tokenizer):
        raise ValueError("token shards need --tokenizer, the vocabulary that has their [MASK]")
    tokenizer = choose_tokenizer(cfg.tokenizer, documents)
    separator = tokenizer.encode_single_token("[SEP]")
    cfg.vocab_size = vocabulary_size(cfg.vocab_size, tokenizer, cfg.init)
    if cfg.vocab_size < tokenizer.n_vocab:
        entries = f"the {tokenizer.n_vocab} entries of the tokenizer, [MASK] among them"
        raise ValueError(f"--vocab_size {cfg.vocab_size} is less than {entries}")
    documents = tokenize_sentences(documents, tokenizer)
    if cfg.write_tokens and shards:
        raise ValueError("--write_tokens reads text, and --data has token shards")
    if cfg.write_tokens:
        write_tokens(cfg.write_tokens, documents)
        return save_vocabulary(tokenizer, Path(cfg.write_tokens) / "vocab.wordpiece")
    # Ids from tokenizer.n_vocab on have no entry, even if the model has room for more.
    longest = max(phase.seq_len for phase in phases_of(cfg))
    sizes = tokenizer.n_vocab, cfg.batch_size, longest
    corpus, heldout = load_corpora(shards, documents, tokenizer, separator, *sizes)
    check_documents(corpus, heldout, cfg)
    return tokenizer, SentenceCorpus(corpus, tokenizer), SentenceCorpus(heldout, tokenizer)

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
            check(cfg, ranks)

        data = load_sentences(cfg)
        if not data:
            return
        tokenizer, corpus, heldout = data
        n_windows = corpus.ids.n_windows(cfg.seq_len)

        fixed = {name: getattr(cfg, name) for name in SHAPE}
        if not cfg.eval:
            fixed |= {"seed": cfg.seed, "data_fingerprint": corpus.ids.fingerprint()}
        checkpoint, run = newest_checkpoint(cfg.out, cfg.resume or cfg.eval, fixed)
        if run and "steps" not in given:  # as many sequences as its first start planned
            cfg.steps = math.ceil(run["steps"] * run["batch_size"] / cfg.batch_size)
        if cfg.warmup_steps > cfg.steps // 10:
            cfg.warmup_steps = cfg.steps // 10
            print(f"the warm-up is cut to {cfg.warmup_steps} updates, a tenth of the run")

        model = build_model(cfg)
        init_weights(model, cfg)
        if cfg.init:
            model.load_state_dict(source.state_dict())
        optimizer = build_optimizer(model.to(device), cfg)
        state = {"step": 0, "sequences": 0, "tokens": 0}
        if checkpoint:
            load_checkpoint(checkpoint, model, optimizer, state)
        if cfg.eval:
            if not checkpoint and not cfg.init:
                raise ValueError(f"--eval: {cfg.out} has no checkpoint")
            cfg.steps = 0
            cfg.out = ""  # nothing is written
        if cfg.out:
            lock = claim_directory(cfg.out, dataclasses.asdict(cfg) | fixed)  # while the run lives
            if dist.get_rank() == 0:
                save_vocabulary(tokenizer, Path(cfg.out) / "vocab.txt")
        print(f"torch {torch.__version__} | {device.type} {cfg.precision} | {n_windows:,} windows")
        print("parameters {:,} | activated {:,}".format(*count_parameters(model)), end=" | ")
        print(f"FLOPs per token {flops_per_token(cfg):.3g} | tokens per step", end=" ")
        print("{:,} = {} ranks x {} x {} sequences of {}".format(
            cfg.batch_size * cfg.seq_len, ranks, *split_batch(cfg, ranks), cfg.seq_len
        ))  # fmt: skip
        if not train(model, optimizer, corpus, heldout, state, cfg, device):
            return print(f"stopped after step {state['step']}")
        if cfg.export and dist.get_rank() == 0:
            to_hf(model, cfg, cfg.export)
            save_vocabulary(tokenizer, Path(cfg.export) / "vocab.txt")
        if dist.get_rank() == 0:
            fill_masks(model, heldout, tokenizer, phase_at(cfg.steps, cfg))

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
