"""BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding (Devlin et al.,
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
     torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
         bert.py --preset base --data wiki/ --sentences lines --tokenizer vocab.txt \\
         --out /shared/bert
Expect: in 75 seconds on two CPU cores the demo comes to name 17 % of the masked tokens of held-out
text (0 % at first), and of its pairs, at length 128, 64 % (the more frequent answer: 52 %).
"""

import argparse
import base64
import collections
import contextlib
import dataclasses
import functools
import glob
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import sys
import sysconfig
import time
import unicodedata
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record

# ---------------------------------------- Config ----------------------------------------

@dataclasses.dataclass
class Config:
    """The run. Every field is a flag of the command line, and its comment is the flag's help."""

    # Model, §3
    vocab_size: int = 0  # V, entries of the vocabulary; 0: as many as the tokenizer has
    context: int = 512  # positions that the model can see
    dim: int = 768  # D, width of the residual stream
    n_layers: int = 12  # blocks
    n_heads: int = 12  # H, attention heads
    hidden_dim: int = 3072  # F, width of the feed-forward layer
    gelu: Literal["erf", "tanh"] = "erf"  # form of GELU: of the first release, or of later ones
    init_std: float = 0.02  # σ of the normal that weights are drawn from, cut at 2 σ
    dropout: float = 0.1  # on embeddings, residual branches and attention probabilities
    # Data, §3.1 and A.1
    data: str = ""  # text, token shards, or a directory of either; empty: Python's own library
    sentences: Literal["prose", "lines"] = "prose"  # lines: one each, a blank one ends a document
    tokenizer: str = ""  # wordpiece:N, learned here; vocab.txt; bytes, gpt2, ranks; empty: bytes
    uncased: bool = True  # lower case without accents
    seq_len: int = 128  # T, tokens of a training sequence
    long_seq_len: int = 512  # T of the last updates
    long_share: float = 0.1  # share of the updates at long_seq_len
    short_seq_prob: float = 0.1  # share of the documents whose sequences are shorter, at random
    dupe_factor: int = 10  # passes until pairs and masks come again; 0: never, they are dynamic
    masked_lm_prob: float = 0.15  # share of the tokens to predict
    # Undisclosed: dupe_factor, and both P. They are the released code's; at 512, 0.15 T.
    max_predictions: int = 20  # P, predictions of a sequence, at most
    long_max_predictions: int = 77  # P at long_seq_len
    # Objective
    objective: Literal["mlm", "rtd"] = "mlm"  # BERT's, or ELECTRA's replaced token detection
    embedding_dim: int = 0  # W of rtd, width of the token embedding; 0: D
    generator_divisor: int = 4  # of rtd: its generator is so many times narrower
    rtd_weight: float = 50.0  # of rtd: weight of the discriminator's loss
    # Optimization, A.2
    batch_size: int = 256  # sequences of one update, over all ranks
    micro_batch: int = 0  # sequences of one forward pass on one rank, at most; 0: the rank's share
    long_micro_batch: int = 0  # the same at long_seq_len; 0: as before
    steps: int = 1_000_000  # updates
    lr: float = 1e-4  # the rate that warm-up aims at
    warmup_steps: int = 10_000  # updates of linear warm-up
    weight_decay: float = 0.01  # decoupled, on matrices and embeddings
    clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    seed: int = 0  # of weights, data and dropout
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
    prompt: str = ""  # text whose every [MASK] the sample fills in; empty: a held-out sequence
    out: str = ""  # directory for checkpoints, metrics.jsonl, config.json; empty: none are written
    save_every: int = 1000  # updates between checkpoints
    resume: bool = False  # go on from the newest checkpoint in out
    init: str = ""  # Hugging Face checkpoint directory to start from
    export: str = ""  # directory to write the model to as a Hugging Face checkpoint
    write_tokens: str = ""  # directory to write the data to as token shards; then exit

LARGE = dict(dim=1024, n_layers=24, n_heads=16, hidden_dim=4096)
GPU = dict(compile=True, micro_batch=64, long_micro_batch=16)
PRESETS = {
    # A CPU, a minute. Shallow and narrow, since post-norm is slow at first, and σ grows as the root
    # of the width shrinks; no dropout in a run this short; a long warm-up, since updates without
    # bias correction begin larger; 24 sequences, for 1, 2, 3, 4, 6 or 8 ranks.
    "demo": dict(
        context=128, dim=64, n_layers=2, n_heads=2, hidden_dim=256, init_std=0.06, dropout=0.0,
        tokenizer="wordpiece:1024", generator_divisor=2, seq_len=64, max_predictions=10,
        long_seq_len=128, long_max_predictions=20, batch_size=24, steps=1600, lr=4e-3,
        warmup_steps=700, log_every=100, val_every=480, val_batches=32,
    ),
    # A GPU of 24 GB or a node of them, minutes: shallower than BASE, for the same reason.
    "small": dict(
        dim=512, n_layers=6, n_heads=8, hidden_dim=2048, tokenizer="wordpiece:8192", lr=4e-4,
        steps=8000, warmup_steps=2000, **GPU,
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
BLOCK, LANES = 2**18, 8  # tokens of a block of documents; blocks that a batch is drawn from
BEGIN, END = "", "[SEP]"  # ends a sentence; an empty sentence ends a document
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PATTERN = (  # how GPT-4 and Llama 3 split text into words, for files of ranks
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

    def __init__(self, embedding_dim, dim, n_layers, n_heads, hidden_dim, gelu, dropout, recompute):
        super().__init__()
        self.recompute = recompute
        self.project = nn.Linear(embedding_dim, dim) if embedding_dim != dim else nn.Identity()
        sizes = dim, n_heads, hidden_dim, gelu, dropout
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(n_layers))

    def forward(self, x, attention_mask=None):
        x, mask = self.project(x), None
        if attention_mask is not None:
            # Departure: the code adds -10000 to the scores of hidden keys; here they are left out.
            mask = attention_mask.bool()[:, None, None]  # [B, 1, 1, T]
        for block in self.blocks:
            if self.recompute == "block" and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, mask, use_reentrant=False)
            else:
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
        sizes = cfg.n_layers, cfg.n_heads, cfg.hidden_dim, cfg.gelu, cfg.dropout, cfg.recompute
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
        how = cfg.gelu, cfg.dropout, cfg.recompute
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
    """§3: a vocabulary, spoken to like a tiktoken.Encoding. A word is cut greedily into the longest
    entries that fit; those inside a word begin with ##."""

    def __init__(self, entries, name):
        self.entries, self.n_vocab = entries, len(entries)
        self.ids = {entry: i for i, entry in enumerate(entries)}
        missing = [token for token in SPECIALS if token not in self.ids]
        if missing:
            raise ValueError(f"{name}: none of its {len(entries)} entries is {missing[0]}")
        self._special_tokens = {token: self.ids[token] for token in SPECIALS}
        known = [e for e in self.ids if not re.fullmatch(r"\[[A-Z]+\]|\[unused\d+\]", e)]
        texts = {e: f" {e}" if e[:2] != "##" else e[2:] for e in known}
        self._mergeable_ranks = {text.encode(): self.ids[e] for e, text in texts.items()}
        self.cut = functools.lru_cache(2**16)(self.cut)

    def cut(self, word):
        """Ids of a word; [UNK] if it has a part without entry, or more than 200 characters."""
        ids, start = [], 0
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

    def decode(self, ids):
        """The words of ids, apart by spaces."""
        return " ".join(self.entries[i] for i in ids).replace(" ##", "")

def learn_wordpiece(documents, size):
    """A WordPiece of `size` entries from a list of (name, sentences): the special tokens, the most
    frequent characters, as words and inside them, and the most frequent words. Of several documents
    those that their hash holds out are not read."""
    words, letters = collections.Counter(), collections.Counter()
    for name, sentences in documents:
        if len(documents) == 1 or stable_hash(name) < 0.95 * 2**64:
            words.update("".join(map(set_apart, " ".join(sentences))).split())
    for word, n in words.items():
        letters.update(dict.fromkeys(word, n))
    letters = [c for c, _ in letters.most_common(96)]
    entries = [*SPECIALS, *letters, *(f"##{c}" for c in letters if set_apart(c) == c)]
    entries = list(dict.fromkeys([*entries, *(word for word, _ in words.most_common())]))
    if len(entries) < size:
        raise ValueError(f"wordpiece:{size}: the text to train on has {len(entries)} entries")
    return WordPiece(entries[:size], f"wordpiece:{size}")

def choose_tokenizer(cfg, documents):
    """A WordPiece, read or learned from documents, or what load_tokenizer makes of the name."""
    # Departure: how WordPiece learned its entries was not released, and those of books and
    # Wikipedia suit neither a small model nor Python's library. wordpiece:N takes what is frequent,
    # and spells other words; a released vocab.txt is read, and words are cut as released.
    kept, learned = Path(cfg.out) / "vocab.txt", cfg.tokenizer.startswith("wordpiece:")
    file = kept if learned and cfg.resume and kept.is_file() else Path(cfg.tokenizer)
    if file.is_file():
        lines = file.read_text("utf-8").removesuffix("\n").split("\n")
        if len(lines[0].split()) == 1:  # a file of ranks has two fields a line
            return WordPiece(lines, file)
    if learned:
        return learn_wordpiece(documents, int(cfg.tokenizer.removeprefix("wordpiece:")))
    return load_tokenizer(cfg.tokenizer or "bytes", SPECIALS)

def save_vocabulary(tokenizer, folder):
    """Writes vocab.txt, an entry a line; nothing for other tokenizers than WordPiece."""
    if isinstance(tokenizer, WordPiece):
        (Path(folder) / "vocab.txt").write_text("\n".join(tokenizer.entries) + "\n", "utf-8")

def tokenize_sentences(documents, tokenizer):
    """(name, ids) of each (name, sentences): [SEP] ends a sentence, an empty one a document."""
    kind = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    for name, sentences in documents:
        ids = []
        for sentence in filter(None, map(tokenizer.encode_ordinary, sentences)):
            ids += [*sentence, tokenizer._special_tokens["[SEP]"]]
        yield name, np.array(ids + [tokenizer._special_tokens["[SEP]"]][: len(ids)], kind)

def read_block(corpus, block, n_blocks):
    """Documents, lists of sentences, which are lists of ids, in one of n_blocks equal parts."""
    total, before, pieces = sum(map(len, corpus.parts)), 0, []
    low, high = total * block // n_blocks, total * (block + 1) // n_blocks
    for part in corpus.parts:
        pieces.append(part[max(low - before, 0) : max(high - before, 0)])
        before += len(part)
    separator = corpus.tokenizer._special_tokens["[SEP]"]
    ids = np.concatenate([*pieces, [separator]]).astype(np.int64)
    if ids.max() >= corpus.tokenizer.n_vocab:
        known = corpus.tokenizer.n_vocab
        raise ValueError(f"the data has token id {ids.max()}, and the tokenizer {known} entries")
    ends = np.flatnonzero(ids == separator).tolist()
    documents, ids = [[]], ids.tolist()
    for start, end in zip([0, *(end + 1 for end in ends)], ends):
        if start < end:
            documents[-1].append(ids[start:end])
        elif documents[-1]:
            documents.append([])
    return documents if documents[-1] else documents[:-1]

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
    documents, rng = read_block(corpus, block, n_blocks), random.Random(stable_hash(key, block))
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
    total = sum(map(len, corpus.parts))
    n_blocks = max(total // BLOCK, 1)
    quota = max(total // (n_blocks * cfg.seq_len), 1)
    epoch, index = divmod(index, n_blocks * quota)
    group, index = divmod(index, LANES * quota)
    lanes = min(LANES, n_blocks - group * LANES)
    lane, slot = divmod(shuffled(index, lanes * quota, (cfg.seed, epoch, group)), quota)
    block = shuffled(group * LANES + lane, n_blocks, (cfg.seed, epoch))
    key = cfg.seed, epoch % cfg.dupe_factor if cfg.dupe_factor else epoch, cfg.seq_len
    settings = n_blocks, cfg.seq_len, cfg.short_seq_prob, key
    found = block_instances(corpus, block, *settings)
    if not found:
        raise ValueError(f"block {block} of the data, of {total // n_blocks:,} tokens, has no text")
    which = shuffled(slot, max(quota, len(found)), (key, block)) % len(found)
    return *found[which], (*key, block, slot)

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
    T, P, n_vocab = cfg.seq_len, cfg.max_predictions, corpus.tokenizer.n_vocab
    specials = corpus.tokenizer._special_tokens
    sep = specials["[SEP]"]
    tokens = np.full((n, T), specials["[PAD]"], np.int64)
    segments, attention_mask = np.zeros_like(tokens), np.zeros((n, T), bool)
    positions, labels = np.zeros((n, P), np.int64), np.full((n, P), -100)
    uniform, is_random = np.zeros((n, P), np.float32), np.zeros(n, np.int64)
    for row in range(n):
        ids, split, is_random[row], key = find_instance(corpus, first + row, cfg)
        ids = [specials["[CLS]"], *ids[:split].tolist(), sep, *ids[split:].tolist(), sep]
        rng = random.Random(stable_hash("masks", *key))
        seen, where, originals = create_masked_lm_predictions(ids, cfg, specials, n_vocab, rng)
        tokens[row, : len(ids)], attention_mask[row, : len(ids)] = seen, True
        segments[row, split + 2 : len(ids)] = 1
        positions[row, : len(where)], labels[row, : len(where)] = where, originals
        if cfg.objective == "rtd":
            uniform[row] = [rng.random() for _ in range(P)]
    arrays = dict(
        tokens=tokens, segments=segments, attention_mask=attention_mask, positions=positions,
        labels=labels, uniform=uniform, is_random=is_random,
    )  # fmt: skip
    counts = {"n_targets": int((labels >= 0).sum()), "n_sequences": n, "n_bytes": 0}
    counts |= {"n_tokens": int(attention_mask.sum()), "n_random": int(is_random.sum())}
    return {name: torch.from_numpy(array) for name, array in arrays.items()} | counts

def check_documents(corpus, heldout, cfg):
    """Raises ValueError where next sentences cannot be drawn: they need, in a block, two documents,
    one of them of two sentences."""
    name = cfg.data or "the embedded corpus"
    for held, part in enumerate((corpus, heldout)):
        n_blocks, n, longest = max(sum(map(len, part.parts)) // BLOCK, 1), 0, 0
        for block in range(min(n_blocks, 64)):
            documents = read_block(part, block, n_blocks)
            n, longest = max(n, len(documents)), max([longest, *map(len, documents)])
            if n >= 2 and longest >= 2:
                break
        if n < 2 and not held:
            raise ValueError(f"{name} has {n} document to train on, and random sentences need 2")
        if longest < 2 and not held:
            raise ValueError(f"{name}: no document of {n} has 2 sentences: none has a next one")
        if n < 2:
            print("held out is one document: its random sentences are its own", flush=True)

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
    more = dict(seq_len=cfg.long_seq_len, max_predictions=cfg.long_max_predictions)
    micro_batch = cfg.long_micro_batch or cfg.micro_batch
    return dataclasses.replace(cfg, **more, micro_batch=micro_batch)

def phases_of(cfg):
    """cfg as it is in each phase: one or two."""
    short, long = phase_at(0, cfg), phase_at(cfg.steps, cfg)
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
    """Synchronous data parallelism (A.2): each rank has a copy, gradients are averaged."""
    # Departure: on TPUs the code clips each replica's gradient before the average; here, after it.
    if cfg.compile:
        for module in model.modules():
            if isinstance(module, Block):
                module.compile()
    if mesh.size() == 1:
        return model
    whole = all(split_batch(phase, mesh.size())[0] == 1 for phase in phases_of(cfg))
    return nn.parallel.DistributedDataParallel(
        model, process_group=mesh.get_group(), gradient_as_bucket_view=True,
        static_graph=whole,  # it is faster, and wrong under the no_sync() of accumulation
    )  # fmt: skip

def memory_per_rank(cfg):
    """Bytes on one rank of cfg.world_size as an eager backward pass begins, by kind."""
    with torch.device("meta"):
        n, _ = count_parameters(build_model(cfg))
    micro = split_batch(cfg, cfg.world_size)[1]
    positions, slots = micro * cfg.seq_len, micro * cfg.max_predictions
    size = 2 if cfg.precision == "bf16" else 4

    def encoder(n):  # of a width n times narrower
        # Kept per position and block: inputs of both norms (fp32); inputs of the four products, q,
        # k, v and GELU's input (in the products' precision); a byte an entry of two dropout masks.
        dim, hidden_dim = cfg.dim // n, cfg.hidden_dim // n
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

HF_CONFIG = {  # ours: Hugging Face's
    "vocab_size": "vocab_size", "context": "max_position_embeddings", "dim": "hidden_size",
    "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
}  # fmt: skip
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
HF_GELU = {"erf": "gelu", "tanh": "gelu_new"}

def bert_tensors(model):
    """(Hugging Face's name, our tensor or a part of it) of each of its parameters."""
    for name, p in model.named_parameters():
        for ours, theirs in HF_NAMES.items():
            name = re.sub(rf"(^|\.){re.escape(ours)}", rf"\g<1>{theirs}", name)
        parts = ("query", "key", "value") if ".qkv." in name else ("qkv",)
        for part, tensor in zip(parts, p.data.chunk(len(parts))):
            yield name.replace("qkv", part), tensor

def from_hf(path):
    """(model, cfg) from the directory of a BertForPreTraining: config.json, *.safetensors."""
    from safetensors.torch import load_file

    try:
        theirs = json.loads((Path(path) / "config.json").read_text())
        cfg = Config(**{ours: theirs[name] for ours, name in HF_CONFIG.items()})
        cfg.gelu = {name: form for form, name in HF_GELU.items()}[theirs["hidden_act"]]
        if theirs["model_type"] != "bert" or theirs.get("layer_norm_eps", 1e-12) != 1e-12:
            raise ValueError("not of the type bert with the eps 1e-12")
        tensors = {}
        for file in Path(path).glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                name = name.replace("LayerNorm.gamma", "LayerNorm.weight")  # as first converted
                tensors[name.replace("LayerNorm.beta", "LayerNorm.bias")] = tensor
        model = BERT(cfg)
        for name, tensor in bert_tensors(model):
            tensor.copy_(tensors[name].view_as(tensor))
    except Exception as error:
        raise ValueError(f"{path} holds no BertForPreTraining: {error!r}") from error
    return model, cfg

def to_hf(model, cfg, path):
    """Writes model to the directory path as a BertForPreTraining."""
    from safetensors.torch import save_file

    config = {theirs: getattr(cfg, ours) for ours, theirs in HF_CONFIG.items()}
    config |= dict(architectures=["BertForPreTraining"], model_type="bert", type_vocab_size=2)
    config |= dict(hidden_act=HF_GELU[cfg.gelu], layer_norm_eps=1e-12, tie_word_embeddings=True)
    config |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), cfg.dropout)
    tensors = {k: v.cpu().clone().contiguous() for k, v in bert_tensors(model)}
    Path(path).mkdir(parents=True, exist_ok=True)
    (Path(path) / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, Path(path) / "model.safetensors", metadata={"format": "pt"})

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

def run_batches(model, batches, cfg, backward):
    """This rank's part of the loss and the metrics of a global batch, by name; backward adds its
    gradient to the parameters."""
    sums, ranks = {}, dist.get_world_size()
    for i, batch in enumerate(batches):
        alone = backward and ranks > 1 and i < len(batches) - 1  # ranks meet once, in the last one
        with model.no_sync() if alone else contextlib.nullcontext():
            loss, metrics = objective(model, batch, cfg)
            if backward:
                (loss * ranks).backward()  # DDP averages over ranks what is an average already
        for name, value in ({"loss": loss} | metrics).items():
            sums[name] = sums.get(name, 0.0) + value.detach()
    return sums

COUNTED = {  # what a metric is a mean over
    "mlm": "n_targets", "mlm_acc": "n_targets", "nsp": "n_sequences", "nsp_acc": "n_sequences",
    "rtd": "n_tokens", "rtd_acc": "n_tokens", "replaced": "n_tokens",
}  # fmt: skip

@torch.compiler.set_stance("force_eager")  # a compiled block would compile for it, too
@torch.no_grad()
def validate_objective(model, heldout, step, cfg, device):
    """Prints the held-out loss, its terms and the accuracies; majority is what always giving the
    more frequent answer about the next sentence would score."""
    rank, ranks, totals, counts = dist.get_rank(), dist.get_world_size(), {}, collections.Counter()
    model.eval()
    for i in range(min(cfg.val_batches, heldout.n_windows(cfg.seq_len) // cfg.batch_size)):
        batches = next_batches(heldout, i * cfg.batch_size, False, cfg, device, rank, ranks)
        counts.update({k: v for k, v in batches[0].items() if k.startswith("n_")})
        means = run_batches(model, batches, cfg, backward=False)
        for name, mean in zip(means, sum_over_ranks(*means.values(), device=device)):
            if name in COUNTED:
                totals[name] = totals.get(name, 0.0) + mean * batches[0][COUNTED[name]]
    model.train()
    means = {name: total / counts[COUNTED[name]] for name, total in totals.items()}
    loss = means["mlm"] + means.get("nsp", 0.0) + cfg.rtd_weight * means.get("rtd", 0.0)
    if cfg.objective == "mlm":
        share = counts["n_random"] / counts["n_sequences"]
        means["majority"] = max(share, 1 - share)
    line = " | ".join(f"{k} {v:.4f}" for k, v in means.items())
    print(f"val {step} | loss {loss:.4f} | bpb n/a | {line} | length {cfg.seq_len}", flush=True)

@torch.compiler.set_stance("force_eager")  # a compiled block would compile for every length
@torch.no_grad()
def sample(model, ids, segments, mask, known, cfg):
    """ids, where each that is mask gives way to the likeliest of those that known [V] marks, one
    place at a time, the surest first."""
    model.eval()
    device, ids = model.embeddings.token.weight.device, list(ids)
    while mask in ids:
        tokens, kinds = torch.tensor([ids, segments], device=device)[:, None]  # [1, T] each
        with torch.autocast(device.type, torch.bfloat16, cfg.precision == "bf16"):
            logits = model(tokens, kinds)[0][0].float()  # [T, V]
        logits = logits.masked_fill(~known.to(device), -math.inf)
        sure, best = logits.log_softmax(-1).max(-1)
        place = sure.masked_fill(tokens[0] != mask, -math.inf).argmax()
        ids[place] = best[place].item()
    return ids

def fill_masks(model, heldout, cfg):
    """Prints the prompt, or a held-out sequence, with its [MASK], and what the model fills in."""
    tokenizer, specials = heldout.tokenizer, heldout.tokenizer._special_tokens
    if cfg.prompt:
        parts = [clean_text(part, cfg.uncased) for part in cfg.prompt.split("[MASK]")]
        ids = [i for part in parts for i in (specials["[MASK]"], *tokenizer.encode_ordinary(part))]
        ids = [specials["[CLS]"], *ids[1:], specials["[SEP]"]]
        if len(ids) > cfg.context:
            print(f"--prompt has {len(ids)} tokens, of which {cfg.context} are read", flush=True)
        ids, segments = ids[: cfg.context], [0] * min(len(ids), cfg.context)
    else:
        batch = get_batch(heldout, 0, 1, cfg)
        length = batch["n_tokens"]
        ids, segments = (batch[name][0, :length].tolist() for name in ("tokens", "segments"))
    known = torch.from_numpy(heldout.token_bytes > 0)
    filled = sample(model, ids, segments, specials["[MASK]"], known, cfg)
    print(f"masked: {tokenizer.decode(ids)}\nfilled: {tokenizer.decode(filled)}", flush=True)

def check(cfg, ranks):
    """Raises ValueError for a configuration that cannot run on that many ranks."""
    for field in dataclasses.fields(cfg):
        low = 0 if field.default == 0 or field.type is float else 1
        low = 0 if field.name in ("warmup_steps", "dupe_factor") else low
        if field.type in (int, float) and not low <= getattr(cfg, field.name) < math.inf:
            raise ValueError(f"--{field.name} {getattr(cfg, field.name)} is not {low} or more")
    n, rtd = cfg.generator_divisor, cfg.objective == "rtd"
    parts = cfg.dim % n or cfg.n_heads % n or cfg.hidden_dim % n
    sizes = f"{cfg.dim}, {cfg.n_heads} heads and {cfg.hidden_dim}"
    shares = "dropout", "long_share", "short_seq_prob", "masked_lm_prob"
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
    for name in shares:
        if not 0 <= getattr(cfg, name) <= 1 - (name == "dropout") * 1e-6:
            raise ValueError(f"--{name} {getattr(cfg, name)} is no share")
    learned = cfg.tokenizer.startswith("wordpiece:")
    for wrong, message in (
        (cfg.dim % cfg.n_heads, f"{cfg.n_heads} heads do not divide the width {cfg.dim}"),
        (rtd and parts, f"--generator_divisor {n} does not divide width {sizes}"),
        (cfg.resume and not cfg.out, "--resume needs --out"),
        (rtd and (cfg.init or cfg.export), "--init and --export take BERT, and rtd trains ELECTRA"),
        ((cfg.init or cfg.export) and not importlib.util.find_spec("safetensors"),
         "--init and --export need the package safetensors: pip install safetensors"),
        (cfg.write_tokens and ranks > 1, "--write_tokens is for one process, without torchrun"),
        (cfg.init_std == 0, "--init_std 0.0 draws no weights"),
        (cfg.embedding_dim and not rtd, "--embedding_dim is of --objective rtd"),
        (cfg.prompt and "[MASK]" not in cfg.prompt, "--prompt has no [MASK] to fill in"),
        (cfg.init and (learned or not cfg.tokenizer),
         f"{cfg.init} has a vocabulary of its own: --tokenizer is missing"),
        (cfg.write_tokens and shard_paths(cfg.data),
         "--write_tokens takes text, and --data is token shards"),
        (learned and not re.fullmatch(r"wordpiece:[1-9]\d{2,6}", cfg.tokenizer),
         f"--tokenizer {cfg.tokenizer} is not wordpiece:N with N from 100"),
        ((learned or not cfg.tokenizer) and shard_paths(cfg.data),
         f"{cfg.data} is token shards, whose [MASK] is unknown: --tokenizer is missing"),
    ):
        if wrong:
            raise ValueError(message)

def dry_run(cfg):
    """Prints parameters, FLOPs per token and bytes per rank in each phase, from shapes alone."""
    check(cfg, cfg.world_size)
    learned = re.fullmatch(r"wordpiece:(\d+)", cfg.tokenizer)
    entries = cfg.vocab_size or (int(learned[1]) if learned else choose_tokenizer(cfg, []).n_vocab)
    cfg.vocab_size = entries
    with torch.device("meta"):
        total, activated = count_parameters(build_model(cfg))
    print(f"parameters {total:,} | activated {activated:,}")
    for phase in phases_of(cfg):
        print(f"FLOPs per token {flops_per_token(phase):.4g} at length {phase.seq_len}", end=" ")
        print(f"| 6 N gives {6 * activated:.4g}")
        memory = memory_per_rank(phase)
        for kind, size in (memory | {"sum": sum(memory.values())}).items():
            print(f"{kind:12} {size / 2**30:8.3f} GiB on each of {cfg.world_size} ranks")

def train_in_phases(model, optimizer, corpus, heldout, state, run, device):
    """Updates until run.steps, or until SIGTERM or SIGINT; state says how far it came."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("dp",))
    replicas = parallelize(model, run, mesh)
    signals, saved, skipped, pace = [], state["step"], 0, 0.0
    handlers = {s: signal(s, lambda *_: signals.append(1)) for s in (SIGTERM, SIGINT)}
    while state["step"] < run.steps:
        cfg = phase_at(state["step"], run)
        if state["step"] % cfg.val_every == 0:
            validate_objective(model, heldout, state["step"], cfg, device)
        started = time.perf_counter()
        first = state["sequences"] + state["offset"]
        batches = next_batches(corpus, first, bool(signals), cfg, device, rank, ranks)
        if batches is None:
            break
        torch.manual_seed(stable_hash(cfg.seed, state["step"], rank))  # of dropout
        found = run_batches(replicas, batches, cfg, backward=True)
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf).item()
        lr = learning_rate(state["step"], run)
        for group in optimizer.param_groups:
            group["lr"] = lr
        finite = math.isfinite(norm)  # the same on all ranks; a loss that is not finite shows here
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1
        state["sequences" if finite else "offset"] += cfg.batch_size
        state["tokens"] += finite * cfg.batch_size * cfg.seq_len
        seconds = time.perf_counter() - started
        pace = 0.9 * (pace or seconds) + 0.1 * seconds
        if state["step"] % cfg.log_every == 0 or state["step"] in (1, cfg.steps):
            means = dict(zip(found, sum_over_ranks(*found.values(), device=device)))
            row = {"step": state["step"], "loss": means["loss"], "bpb": math.nan, "lr": lr}
            row |= {"grad": norm, "tokens": state["tokens"]}
            row |= {k: round(v, 4) for k, v in means.items() if k.endswith("_acc")}
            n, counts = batches[0]["n_sequences"], batches[0]
            trained = counts["n_tokens" if cfg.objective == "rtd" else "n_targets"]  # the loss's
            row |= {"signals": round(trained / n, 1), "positions": round(counts["n_tokens"] / n, 1)}
            log_step(row, pace, cfg, device)
        skipped = 0 if finite else skipped + 1
        if skipped:
            print(f"step {state['step']} skipped: its gradient is not finite", flush=True)
        if skipped == 3:
            raise ValueError(f"three steps to {state['step']} had no finite gradient")
        if cfg.out and state["step"] % cfg.save_every == 0:
            save_checkpoint(cfg.out, model, optimizer, state)
            saved = state["step"]
    if run.out and saved < state["step"]:
        save_checkpoint(run.out, model, optimizer, state)
    for signum, handler in handlers.items():
        signal(signum, handler)

def load_data(cfg):
    """(training, held-out) Corpus; None after --write_tokens."""
    documents = split_sentences(read_documents(cfg.data), cfg)
    documents = list(documents) if cfg.tokenizer.startswith("wordpiece:") else documents
    tokenizer = choose_tokenizer(cfg, documents)
    n_vocab, mask = tokenizer.n_vocab, tokenizer._special_tokens["[MASK]"]
    documents = tokenize_sentences(documents, tokenizer)
    if cfg.write_tokens:
        write_tokens(cfg.write_tokens, documents)
        return save_vocabulary(tokenizer, cfg.write_tokens)
    if 0 < cfg.vocab_size < n_vocab:
        raise ValueError(
            f"--vocab_size {cfg.vocab_size} does not hold the tokenizer's {n_vocab} entries, of "
            f"which [MASK] is {mask}"
        )
    longest = max(phase.seq_len for phase in phases_of(cfg))
    sizes = cfg.vocab_size, cfg.batch_size, longest
    corpus, heldout = load_corpora(cfg.data, documents, tokenizer, *sizes)
    check_documents(corpus, heldout, cfg)
    return corpus, heldout

@record
def main(argv=None):
    """Reads the command line and the data, builds or resumes the run, trains, exports, samples."""
    with one_line_mistakes():
        cfg = parse(argv)
        if cfg.dry_run:
            return dry_run(cfg)
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        check(cfg, ranks)
        if cfg.init:
            source, theirs = from_hf(cfg.init)
            shape = {name: getattr(theirs, name) for name in (*HF_CONFIG, "gelu")}
            cfg = dataclasses.replace(cfg, **shape)
            check(cfg, ranks)
        data = load_data(cfg)
        if data is None:
            return
        device = launch(cfg.timeout)
        for folder in filter(None, (cfg.out, cfg.export)):
            Path(folder).mkdir(parents=True, exist_ok=True)
        corpus, heldout = data
        cfg.vocab_size, windows = corpus.vocab_size, corpus.n_windows(cfg.seq_len)
        model = build_model(cfg)
        init_weights(model, cfg)
        if cfg.init:
            model.load_state_dict(source.state_dict())
        optimizer = build_optimizer(model.to(device), cfg)
        state = {"step": 0, "sequences": 0, "tokens": 0, "offset": 0, "seed": cfg.seed}
        if cfg.out:
            load_checkpoint(cfg.out, cfg.resume, cfg.steps, model, optimizer, state)
        if cfg.out and dist.get_rank() == 0:
            config = json.dumps(dataclasses.asdict(cfg), indent=2)
            (Path(cfg.out) / "config.json").write_text(config + "\n")
            save_vocabulary(corpus.tokenizer, cfg.out)
        (total, activated), (steps, micro) = count_parameters(model), split_batch(cfg, ranks)
        print(f"python {sys.version.split()[0]} | torch {torch.__version__} |", end=" ")
        print(f"{device.type} {cfg.precision} | {windows:,} windows to train on")
        print(f"parameters {total:,} | activated {activated:,} | FLOPs per token", end=" ")
        tokens = f"{cfg.batch_size * cfg.seq_len:,}"
        print(f"{flops_per_token(cfg):.3g} | tokens per step {tokens}", end=" ")
        print(f"= {ranks} ranks x {steps} x {micro} sequences of {cfg.seq_len}", flush=True)
        train_in_phases(model, optimizer, corpus, heldout, state, cfg, device)
        if state["step"] < cfg.steps:
            return print(f"stopped by a signal after step {state['step']}", flush=True)
        cfg = phase_at(cfg.steps, cfg)
        validate_objective(model, heldout, cfg.steps, cfg, device)
        if cfg.export and dist.get_rank() == 0:
            to_hf(model, cfg, cfg.export)
            save_vocabulary(corpus.tokenizer, cfg.export)
        if dist.get_rank() == 0:
            fill_masks(model, heldout, cfg)

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
