r"""BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding (Devlin et al.,
2018, arXiv 1810.04805) in one file.

What is new compared with its parent, gpt1.py:
- attention looks both ways (§3): no causal mask, only padding is hidden;
- two segments in one sequence, [CLS] A [SEP] B [SEP], told apart by segment embeddings (§3);
- a norm and dropout on the sum of the embeddings, norms with eps 1e-12 (code);
- masked LM: 15 % of the tokens are predicted; 80 % of them are replaced by [MASK], 10 % by random
  tokens (§3.1, A.1); the decoder shares the token embedding and has a bias (code);
- next sentence prediction from the pooled [CLS] (§3.1);
- Adam without bias correction; linear warm-up, and linear decay from step 0 (A.2, code);
- 90 % of the updates at length 128, the rest at 512 (A.2).
Kept: post-norm blocks, GELU, learned positions, F = 4 D, biases.
For contrast: --no-nsp, RoBERTa's sequences of full sentences (Liu et al., 2019, arXiv 1907.11692),
and --objective rtd, ELECTRA's replaced token detection (Clark et al., 2020, arXiv 2003.10555),
whose loss covers every token.

Map: §3 BERT, Embeddings, Block, PRESETS | §3.1 masked_lm, objective | A.1
create_masked_lm_predictions | A.2 create_pairs, AdamWeightDecay, learning_rate, phase_at |
ELECTRA §2 ELECTRA, replaced_token_detection. "(code)" marks what the paper does not say and the
released code does: google-research/bert, and google-research/electra for ELECTRA.
Legend: B batch, T positions, D width, H heads, E = D / H, F hidden width, V vocabulary, P slots for
predictions, W width of the token embedding (in BERT, D).
Conventions: NSP label 0 is IsNext, 1 a random sentence; loss in nats; label -100 is not scored.

Run: python bert.py                         # a laptop: the preset demo
     torchrun --nproc_per_node=8 bert.py    # GPUs: the preset small
     python bert.py --preset base --data wiki/ --sentences lines --tokenizer vocab.txt \
         --write_instances /shared/wiki     # once for a large corpus, then on many nodes:
     torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \
         bert.py --preset base --data /shared/wiki --out /shared/bert --resume
Expect: in 44 seconds on two CPU cores the demo learns to predict 18 % of the masked tokens of
held-out text (0 % at first) and 62 % of its pairs at length 128 (the more frequent answer: 55 %).
"""

import argparse
import collections
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import inspect
import json
import math
import os
import random
import re
import shutil
import socket
import sys
import sysconfig
import tempfile
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from signal import SIG_DFL, SIGINT, SIGTERM, signal
from typing import Literal, get_args

import numpy as np
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
    vocab_size: int = 0  # V, vocabulary size; 0: that of the tokenizer
    context: int = 512  # number of positions of the model
    dim: int = 768  # D, width of the residual stream
    n_layers: int = 12  # number of blocks
    n_heads: int = 12  # H, number of attention heads
    hidden_dim: int = 3072  # F, width of the feed-forward layer
    init_std: float = 0.02  # standard deviation σ of the initial weights before they are cut at 2 σ
    dropout: float = 0.1  # dropout of embeddings, residual branches and attention probabilities
    # Data, §3.1 and A.1
    data: str = ""  # text, or a directory of --write_instances; empty: Python's standard library
    sentences: Literal["prose", "lines"] = "prose"  # lines: one a line, blank lines end documents
    tokenizer: str = "wordpiece:8192"  # vocab.txt, or wordpiece:N; --data's or --init's comes first
    uncased: bool = True  # lower-case the text and strip accents; --data's or --init's comes first
    seq_len: int = 128  # T, sequence length in tokens in the first phase
    long_seq_len: int = 512  # sequence length in tokens in the second phase
    long_share: float = 0.1  # fraction of the updates that are in the second phase
    # Undisclosed: short_seq_prob, dupe_factor, and both P. They are the released code's; at 512,
    # P is 0.15 T. RoBERTa (§4.1) says that the paper's data was duplicated 10 times.
    short_seq_prob: float = 0.1  # probability that a document's pairs have a shorter, random length
    dupe_factor: int = 10  # passes over the documents, each of which makes other pairs
    masked_lm_prob: float = 0.15  # fraction of the tokens to predict
    max_predictions: int = 20  # P, maximum number of predictions per sequence
    long_max_predictions: int = 77  # maximum number of predictions per sequence in the second phase
    static_masks: bool = False  # mask a sequence in the same way in each epoch
    # Objective
    nsp: bool = True  # next sentence prediction; without it, sequences of consecutive sentences
    objective: Literal["mlm", "rtd"] = "mlm"  # mlm: BERT; rtd: ELECTRA's replaced token detection
    # Optimization, A.2
    batch_size: int = 256  # sequences per update, over all ranks
    micro_batch: int = 0  # sequences per forward pass on one rank; 0: as many as the batch allows
    long_micro_batch: int = 0  # --micro_batch of the second phase; 0: the same as in the first
    steps: int = 1_000_000  # updates of the run
    lr: float = 1e-4  # peak learning rate
    warmup_steps: int = 10_000  # updates of linear warm-up; cut to a tenth of the run if longer
    weight_decay: float = 0.01  # decoupled weight decay of matrices and embeddings
    # Undisclosed: clipping. 1.0 is the released code's.
    clip: float = 1.0  # maximum norm of the gradient; 0: no clipping
    seed: int = 0  # seed of the weights, the order of the data and dropout
    # Machine
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    compile: bool = False  # compile each block with torch.compile
    recompute: Literal["none", "block"] = "none"  # block: recompute blocks in the backward pass
    timeout: int = 600  # timeout of a collective, in seconds
    dry_run: bool = False  # print parameters, FLOPs and memory per rank, then exit
    world_size: int = 1  # number of ranks that --dry_run plans for
    # Reports and files
    log_every: int = 10  # updates between log lines
    val_every: int = 1000  # updates between validations
    val_batches: int = 16  # maximum number of batches per validation
    prompt: str = ""  # text with [MASK] that the sample fills in; empty: a held-out sequence
    out: str = ""  # directory of checkpoints, metrics.jsonl and config.json; empty: write nothing
    save_every: int = 1000  # updates between checkpoints
    resume: bool = False  # continue from the newest checkpoint in --out, if there is one
    eval: bool = False  # validate and sample the model of --init or --out, without training
    init: str = ""  # Hugging Face checkpoint to start from; sets sizes, case, vocabulary and nsp
    export: str = ""  # directory to write a Hugging Face checkpoint to after training
    write_instances: str = ""  # directory to write the sequences made from --data to, then exit

LARGE = dict(dim=1024, n_layers=24, n_heads=16, hidden_dim=4096)
RELEASED = dict(vocab_size=30522, compile=True, micro_batch=64, long_micro_batch=16)
PRESETS = {
    # For a CPU, about a minute. Shallow and narrow, because deep post-norm models learn slowly at
    # first; σ grows as the root of the width shrinks; no dropout, because the run is short.
    "demo": dict(
        context=128, dim=64, n_layers=2, n_heads=2, hidden_dim=256, init_std=0.06, dropout=0.0,
        tokenizer="wordpiece:1024", dupe_factor=2, seq_len=64, max_predictions=10,
        long_seq_len=128, long_max_predictions=20, batch_size=24, steps=1600, lr=2e-3,
        warmup_steps=160, log_every=100, val_every=480, val_batches=32,
    ),
    # For a GPU of 24 GB or a node of them, minutes: shallower than BASE, for the same reason.
    "small": dict(
        dim=512, n_layers=6, n_heads=8, hidden_dim=2048, lr=4e-4, steps=8000, warmup_steps=800,
        compile=True, micro_batch=64, long_micro_batch=16,
    ),
    # §3, A.2 and Table 6; the comments have its perplexity of held-out masked tokens.
    # Departure: V is that of the released vocabularies; the paper says 30,000.
    "base": RELEASED,  # 3.99; 97-98 % of the pairs are right (footnote 5)
    "large": RELEASED | LARGE,  # 3.23
    "base_cased": RELEASED | dict(vocab_size=28996, uncased=False),
    "large_cased": RELEASED | LARGE | dict(vocab_size=28996, uncased=False),
    "l3_h768_a12": RELEASED | dict(n_layers=3),  # 5.84
    "l6_h768_a3": RELEASED | dict(n_layers=6, n_heads=3),  # 5.24
    "l6_h768_a12": RELEASED | dict(n_layers=6),  # 4.68
    # Undisclosed: F of this row; 4 D, as everywhere.
    "l12_h1024_a16": RELEASED | LARGE | dict(n_layers=12),  # 3.54
    # ELECTRA's Table 6.
    # Departure: its sequences have two segments; here, one.
    "electra_small": RELEASED | dict(
        objective="rtd", nsp=False, dim=256, n_heads=4, hidden_dim=1024, max_predictions=19,
        long_share=0.0, batch_size=128, lr=5e-4,
    ),
}  # fmt: skip
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

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
    """Multi-head self-attention, softmax(q kᵀ / sqrt(E)) v, [B, T, D] -> [B, T, D], over the
    positions where mask [B, 1, 1, T] is true, with dropout on the probabilities and on the output
    (§3, A.2)."""

    # Departure: the code adds -10000 to the scores of padding; here they are -infinity.

    def __init__(self, dim, n_heads, dropout):
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x, mask):
        qkv = self.qkv(x).unflatten(-1, (3, self.n_heads, -1))  # [B, T, 3, H, E]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, T, E] each
        p = self.dropout if self.training else 0.0
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)  # [B, H, T, E]
        x = self.out(o.transpose(1, 2).flatten(2))  # [B, T, D]
        return F.dropout(x, self.dropout, self.training)

class PositionwiseFeedForward(nn.Module):
    """GELU(x W_i + b_i) W_f + b_f, [B, T, D] -> [B, T, D] (§3)."""

    # Undisclosed: the form of GELU that trained the paper's models. The first release has erf, as
    # here; later releases have tanh.

    def __init__(self, dim, hidden_dim, dropout):
        super().__init__()
        self.dropout = dropout
        self.up = nn.Linear(dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        x = F.gelu(self.up(x))  # [B, T, F]
        return F.dropout(self.down(x), self.dropout, self.training)  # [B, T, D]

class Block(nn.Module):
    """A post-norm block, [B, T, D] -> [B, T, D] (§3); a norm follows each residual sum."""

    def __init__(self, dim, n_heads, hidden_dim, dropout):
        super().__init__()
        self.attn = BidirectionalAttention(dim, n_heads, dropout)
        self.norm1 = nn.LayerNorm(dim, eps=1e-12)
        self.mlp = PositionwiseFeedForward(dim, hidden_dim, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, x, mask):
        x = self.norm1(x + self.attn(x, mask))
        return self.norm2(x + self.mlp(x))

class BidirectionalEncoder(nn.Module):
    """A stack of blocks, [B, T, D] -> [B, T, D]; attention_mask [B, T] is true at tokens and false
    at padding (§3)."""

    def __init__(self, n_layers, dim, n_heads, hidden_dim, dropout):
        super().__init__()
        sizes = dim, n_heads, hidden_dim, dropout
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(n_layers))

    def forward(self, x, attention_mask):
        mask = attention_mask[:, None, None]  # [B, 1, 1, T]
        for block in self.blocks:
            x = block(x, mask)
        return x

class MaskedLMHead(nn.Module):
    """LayerNorm(GELU(x W_t + b_t)) WordEmbᵀ + b, states [..., D] -> logits [..., V] (code);
    embedding_dim is the width of WordEmb [V, W]."""

    def __init__(self, dim, embedding_dim, vocab_size):
        super().__init__()
        self.dense = nn.Linear(dim, embedding_dim)
        self.norm = nn.LayerNorm(embedding_dim, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x, token_embedding):
        x = self.norm(F.gelu(self.dense(x)))  # [..., W]
        return F.linear(x, token_embedding, self.bias)

class BERT(nn.Module):
    """§3: tokens, segments, attention_mask [B, T] -> logits of the masked LM, [B, T, V] or, at
    positions [B, P], [B, P, V], and of the next sentence, [B, 2] or, without --nsp, None."""

    def __init__(self, cfg):
        super().__init__()
        self.embeddings = Embeddings(cfg.vocab_size, cfg.context, cfg.dim, cfg.dropout)
        sizes = cfg.dim, cfg.n_heads, cfg.hidden_dim, cfg.dropout
        self.encoder = BidirectionalEncoder(cfg.n_layers, *sizes)
        self.mlm = MaskedLMHead(cfg.dim, cfg.dim, cfg.vocab_size)
        self.pooler = nn.Linear(cfg.dim, cfg.dim) if cfg.nsp else None
        self.nsp = nn.Linear(cfg.dim, 2) if cfg.nsp else None

    def forward(self, tokens, segments, attention_mask, positions=None):
        x = self.encoder(self.embeddings(tokens, segments), attention_mask)  # [B, T, D]
        next_logits = None
        if self.nsp:
            pooled = torch.tanh(self.pooler(x[:, 0]))  # the state of [CLS]: [B, D]
            next_logits = self.nsp(pooled)  # [B, 2]
        if positions is not None:
            x = x.take_along_dim(positions[:, :, None], 1)  # [B, P, D]
        return self.mlm(x, self.embeddings.token.weight), next_logits

class ELECTRA(nn.Module):
    """ELECTRA §2: a narrow generator predicts the masked tokens; the discriminator, which is kept
    after training, predicts which tokens were replaced by the generator's samples. They share
    embeddings (§3.2). tokens, segments, attention_mask [B, T], positions, labels and uniform [B, P]
    -> logits of the generator [B, P, V] and of the discriminator [B, T], and replaced [B, T];
    without positions, the generator's logits [B, T, V], None, None."""

    # Departure: of Table 6 there is the small model alone. Other sizes have its ratios, where the
    # table has W = D and, for base, a generator of a third.

    def __init__(self, cfg):
        super().__init__()
        width = cfg.dim // 2  # W, Table 6: 128 of 256
        narrow = cfg.dim // 4  # Table 6: multiplier of the generator's size 1/4
        self.embeddings = Embeddings(cfg.vocab_size, cfg.context, width, cfg.dropout)
        self.narrow_project = nn.Linear(width, narrow)
        sizes = narrow, max(cfg.n_heads // 4, 1), cfg.hidden_dim // 4, cfg.dropout
        self.generator = BidirectionalEncoder(cfg.n_layers, *sizes)
        self.mlm = MaskedLMHead(narrow, width, cfg.vocab_size)
        self.project = nn.Linear(width, cfg.dim)
        sizes = cfg.dim, cfg.n_heads, cfg.hidden_dim, cfg.dropout
        self.discriminator = BidirectionalEncoder(cfg.n_layers, *sizes)
        self.dense = nn.Linear(cfg.dim, cfg.dim)
        self.score = nn.Linear(cfg.dim, 1)

    def forward(self, tokens, segments, attention_mask, positions=None, labels=None, uniform=None):
        x = self.narrow_project(self.embeddings(tokens, segments))  # [B, T, D / 4]
        x = self.generator(x, attention_mask)
        if positions is None:
            return self.mlm(x, self.embeddings.token.weight), None, None
        x = x.take_along_dim(positions[:, :, None], 1)  # [B, P, D / 4]
        logits = self.mlm(x, self.embeddings.token.weight)  # [B, P, V]
        # Samples at temperature 1, through which no gradient flows: the first entry whose
        # cumulative probability is at least a uniform number.
        cumulative = logits.detach().float().softmax(-1).cumsum(-1)
        sampled = (cumulative < uniform[:, :, None]).sum(-1).clamp(max=cumulative.shape[-1] - 1)
        used = labels >= 0  # an unused slot has position 0, where it writes the same [CLS] again
        original = tokens.scatter(1, positions, torch.where(used, labels, tokens[:, :1]))
        tokens = tokens.scatter(1, positions, torch.where(used, sampled, tokens[:, :1]))
        x = self.project(self.embeddings(tokens, segments))  # [B, T, D]
        x = self.discriminator(x, attention_mask)
        scores = self.score(F.gelu(self.dense(x)))[..., 0]  # [B, T]
        return logits, scores, tokens != original  # a sampled original is not replaced

def build_model(cfg):
    """The model that cfg.objective trains."""
    return ELECTRA(cfg) if cfg.objective == "rtd" else BERT(cfg)

def init_weights(model, cfg):
    """Draw matrices and embeddings from a normal distribution of mean 0 and standard deviation
    init_std that is cut at 2 init_std; ELECTRA's projections and last layer from Glorot's uniform
    distribution; set biases to 0 and gains to 1 (code).

    Each parameter is drawn from a generator seeded by (seed, name), so that every layout
    starts from the same numbers. Raises ValueError for a parameter without a rule.
    """
    # Undisclosed: the initialisation. It is the released code's.
    std = cfg.init_std
    for name, p in model.named_parameters():
        generator = torch.Generator().manual_seed(stable_hash(cfg.seed, name))
        drawn = torch.empty(p.shape)
        if re.search(r"(token|segment|position|qkv|out|up|down|dense|pooler|nsp)\.weight$", name):
            p.data.copy_(nn.init.trunc_normal_(drawn, 0.0, std, -2 * std, 2 * std, generator))
        elif re.search(r"(project|score)\.weight$", name):  # TensorFlow's default
            p.data.copy_(nn.init.xavier_uniform_(drawn, generator=generator))
        elif name.endswith("bias"):
            nn.init.zeros_(p)
        elif re.search(r"norm[12]?\.weight$", name):
            nn.init.ones_(p)
        else:
            raise ValueError(f"no rule initialises {name}")

def count_parameters(model):
    """(total, activated) parameters; tied weights count once, a dense model activates all."""
    total = sum(p.numel() for p in model.parameters())
    return total, total

def flops_per_token(cfg):
    """Training FLOPs per token: 2 per weight of a matrix product forward, twice that backward.
    Attention counts all T keys per query; a head counts for the share of positions it reads."""
    D = cfg.dim
    weights = 4 * D**2 + 2 * D * cfg.hidden_dim  # of a block
    attention = 2 * D * cfg.seq_len  # q kᵀ and softmax(...) v
    predicted = cfg.max_predictions / cfg.seq_len
    products = cfg.n_layers * (weights + attention)
    if cfg.objective == "rtd":
        W = D // 2
        products += cfg.n_layers * (weights / 16 + attention / 4)  # generator: widths of a quarter
        products += W * D // 4 + W * D + D * D + D
        products += predicted * (D // 4 + cfg.vocab_size) * W
    else:
        products += predicted * (D + cfg.vocab_size) * D
        products += cfg.nsp * (D * D + 2 * D) / cfg.seq_len
    return 6 * products

# ---------------------------------------- Data ----------------------------------------

def prose_of(code):
    """The docstrings and comments of Python code, in order, as paragraphs: strings in triple quotes
    that begin a line, and lines that are comments. Other strings and comments are skipped."""
    matches = re.finditer(
        r"""((?:^[ \t]*\#[^\n]*\n)+)|(^[ \t]*[rRuU]?)?(\"{3}|'{3})((?:\\.|[^\\])*?)\3"""
        r"""|\#[^\n]*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""", code, re.M | re.S
    )  # fmt: skip
    paragraphs = []
    for match in matches:
        comment, line_start, _, string = match.groups()
        if comment:
            paragraphs.append(re.sub(r"^[ \t]*#[ #:]*", "", comment, flags=re.M))
        elif line_start is not None:
            paragraphs.append(string)
    return "\n\n".join(paragraphs)

def clean_text(text, uncased):
    """Text without control characters and, uncased, in lower case and without accents (code)."""
    if text.isascii() and text.isprintable():
        return text.lower() if uncased else text
    controls = [c for c in set(text) - set("\t\n\r") if unicodedata.category(c) in ("Cc", "Cf")]
    text = text.translate(dict.fromkeys(map(ord, controls)))
    if uncased:
        text = unicodedata.normalize("NFD", text.lower())
        accents = [c for c in set(text) if unicodedata.category(c) == "Mn"]
        text = text.translate(dict.fromkeys(map(ord, accents)))
    return text.replace("\ufffd", "")

@functools.lru_cache(None)
def set_apart(c):
    """The character c, with spaces around it if it is a word of its own (code): punctuation, other
    ASCII that is neither letter nor digit, Chinese."""
    chinese = r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ceaf\U0002f800-\U0002fa1f]"
    symbol = c.isascii() and not c.isalnum()
    alone = symbol or unicodedata.category(c)[0] == "P" or re.match(chinese, c)
    return f" {c} " if alone else c

def split_sentences(documents, cfg):
    """(name, sentences) of each document (name, text), whose text is prose or has a sentence per
    line and blank lines between documents (code)."""
    # Undisclosed: how the paper split text into sentences. Here a sentence ends with its paragraph,
    # or with a full stop, ! or ? if no lower-case letter follows.
    # Departure: the default text is Python's standard library instead of BooksCorpus, which is
    # withdrawn, and Wikipedia: a module is a document, and its docstrings and comments are prose.
    # The released README's advice to truncate 2 % of the sentences at random is not followed.
    boundary = re.compile(r"(?<=[.!?])\s+(?![a-z])|(?<=[。！？])")
    for name, text in documents:
        if name != text and name.endswith(".py"):
            text = prose_of(text)
        paragraphs = re.split(r"\n\s*\n", text.strip())
        if cfg.sentences == "lines":
            key = stable_hash(name)  # a name can be long: that of a .jsonl document is its text
            for i, paragraph in enumerate(paragraphs):
                yield f"{key} {i}", clean_text(paragraph, cfg.uncased).split("\n")
            continue
        sentences = [s for p in paragraphs for s in boundary.split(" ".join(p.split()))]
        sentences = [s for s in sentences if re.search(r"[^\W\d_]", s)]
        yield name, [clean_text(s, cfg.uncased) for s in sentences]

class WordPiece:
    """§3: words are cut greedily into the longest entries of the vocabulary; entries that continue
    a word begin with ##. The first entry is [PAD]."""

    def __init__(self, entries):
        self.entries = entries
        self.ids = {entry: i for i, entry in enumerate(entries)}
        self.dtype = np.uint16 if len(entries) <= 2**16 else np.uint32
        self.cut = functools.lru_cache(2**16)(self.cut)

    def cut(self, word):
        """Ids of a word; [UNK] if a part has no entry, or if it has more than 200 characters."""
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

    def encode(self, text):
        """Ids of text; special tokens in it are plain text."""
        words = "".join(map(set_apart, text)).split()
        return [i for word in words for i in self.cut(word)]

    def decode(self, ids):
        """The words of ids, separated by spaces."""
        return " ".join(self.entries[i] for i in ids).replace(" ##", "")

def learn_wordpiece(documents, size):
    """A WordPiece of at most `size` entries from a list of (name, sentences): the special tokens,
    the most frequent characters, which begin or continue a word, and the most frequent words. Of
    several documents, those that is_held_out chooses are not read."""
    # Undisclosed: how the paper's vocabulary was learned. Here words other than the frequent ones
    # are spelled in characters.
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
        print(f"wordpiece:{size}: the text has only {len(entries):,} entries")
    return WordPiece(entries[:size])

def load_wordpiece(path):
    """The WordPiece of a vocab.txt, which has one entry a line."""
    entries = Path(path).read_text("utf-8").removesuffix("\n").split("\n")
    if entries[0] != "[PAD]" or not set(SPECIALS).issubset(entries):
        raise ValueError(f"{path} must begin with [PAD] and have {', '.join(SPECIALS[1:])}")
    return WordPiece(entries)

def save_wordpiece(tokenizer, uncased, folder):
    """Write vocab.txt, and tokenizer_config.json as Hugging Face's BertTokenizer reads it."""
    (Path(folder) / "vocab.txt").write_text("\n".join(tokenizer.entries) + "\n", "utf-8")
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": uncased}
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

def tokenize_sentences(documents, tokenizer):
    """(name, sentences as lists of ids) of each (name, sentences) that is not empty."""
    for name, sentences in documents:
        sentences = list(filter(None, map(tokenizer.encode, sentences)))
        if sentences:
            yield name, sentences

def split_documents(documents, nsp):
    """(training, held-out) documents, lists of sentences, of (name, sentences)."""
    # Undisclosed: the held-out split. Here about 5 % of the documents are held out, by a hash of
    # their names; of a single document, the last 5 % of the sentences.
    by_hash = sorted(documents, key=lambda document: stable_hash(document[0]))
    least = 2 if nsp else 1  # a random sentence comes from another document
    n_heldout = max(least, sum(is_held_out(name) for name, _ in by_hash))  # they are the last ones
    documents = [sentences for _, sentences in by_hash]
    if len(documents) == 1 and not nsp:
        n_train = len(documents[0]) * 19 // 20
        documents = [documents[0][:n_train], documents[0][n_train:]]
    train = documents[:-n_heldout]
    if len(train) < least or max(map(len, train)) < least:
        needed = f"{least} to train on, one of them of {least} sentences, and {least} to hold out"
        raise ValueError(f"{len(by_hash)} documents of text are too few: needed are {needed}")
    return train, documents[-n_heldout:]

def create_pairs(documents, index, length, short_seq_prob, rng):
    """The pairs (A, B, whether B is random) of document `index` of documents, as the released code
    makes them, draw by draw of rng."""
    # Undisclosed: the generator that made the paper's data, in C++; the released code follows it.
    document = documents[index]
    max_tokens = length - 3  # without [CLS], [SEP] and [SEP]
    target = rng.randint(2, max_tokens) if rng.random() < short_seq_prob else max_tokens
    chunk = []
    size = i = 0
    while i < len(document):
        chunk.append(document[i])
        size += len(document[i])
        if i == len(document) - 1 or size >= target:
            a_end = rng.randint(1, len(chunk) - 1) if len(chunk) >= 2 else 1
            a = collections.deque(sum(chunk[:a_end], []))
            b = collections.deque(sum(chunk[a_end:], []))
            is_random = len(chunk) == 1 or rng.random() < 0.5
            if is_random:
                draws = (rng.randint(0, len(documents) - 1) for _ in range(10))
                other = next((draw for draw in draws if draw != index), index)
                start = rng.randint(0, len(documents[other]) - 1)
                b.clear()
                for sentence in documents[other][start:]:
                    b += sentence
                    if len(b) >= target - len(a):
                        break
                i -= len(chunk) - a_end  # put the unused sentences back
            while len(a) + len(b) > max_tokens:
                longer = a if len(a) > len(b) else b
                if rng.random() < 0.5:
                    longer.popleft()
                else:
                    longer.pop()
            yield a, b, is_random
            chunk = []
            size = 0
        i += 1

def full_sentences(documents, length, separator):
    """Sequences (A, no B, False) of as many consecutive sentences as fit, with a separator after
    each document: FULL-SENTENCES of RoBERTa (1907.11692, §4.2)."""
    # Departure: RoBERTa has a byte-level BPE, no segments, and 512 tokens throughout; here, only
    # the sequences and the objective are its.
    max_tokens = length - 2  # without [CLS] and [SEP]
    ids = []
    for document in documents:
        for sentence in document:
            if ids and len(ids) + len(sentence) > max_tokens:
                yield ids, [], False
                ids = []
            ids = (ids + sentence)[:max_tokens]
        if len(ids) < max_tokens:
            ids.append(separator)
    yield ids, [], False

def instances_path(folder, split, cfg):
    """The file of the instances of a split in the phase cfg."""
    kind = "pairs" if cfg.nsp else "sentences"
    return Path(folder) / f"{split}_{cfg.seq_len}.{kind}"

def write_instances(folder, documents, tokenizer, cfg):
    """Write the instances of documents to a new or empty folder, with the vocabulary. Each is a row
    of T + 1 numbers: the lengths of A and B, whether B is random, the ids of A and B, zeros."""
    train, heldout = split_documents(documents, cfg.nsp)
    with written_beside(folder) as partial:
        save_wordpiece(tokenizer, cfg.uncased, partial)
        for split, part, passes in (("train", train, cfg.dupe_factor), ("val", heldout, 1)):
            for phase in phases_of(cfg):
                T = phase.seq_len
                rng = random.Random(stable_hash(cfg.seed, split, T))
                instances = full_sentences(part, T, tokenizer.ids["[SEP]"])
                if cfg.nsp:
                    instances = (
                        pair for i in range(passes * len(part))
                        for pair in create_pairs(part, i % len(part), T, cfg.short_seq_prob, rng)
                    )  # fmt: skip
                with open(instances_path(partial, split, phase), "wb") as file:
                    for a, b, is_random in instances:
                        row = np.zeros(T + 1, tokenizer.dtype)
                        row[: 3 + len(a) + len(b)] = [len(a), len(b), is_random, *a, *b]
                        file.write(row)

class Instances:
    """The instances of a split: rows[T] are those of length T, memory-mapped, [n, T + 1]."""

    def __init__(self, folder, split, tokenizer, cfg):
        self.tokenizer = tokenizer
        self.in_order = split == "val"
        self.rows = {}
        for phase in phases_of(cfg):
            rows = np.memmap(instances_path(folder, split, phase), tokenizer.dtype, "r")
            self.rows[phase.seq_len] = rows.reshape(-1, phase.seq_len + 1)

    def read(self, index, cfg):
        """(A, B, whether B is random, seed of the masks) of sequence `index` of the run. Each epoch
        reads every instance once, in random order."""
        # Undisclosed: the order of the instances. The released code shuffles, too.
        rows = self.rows[cfg.seq_len]
        epoch, i = divmod(index, len(rows))
        if not self.in_order:
            i = int(permutation(len(rows), cfg.seed, cfg.seq_len, epoch)[i])
        n_a, n_b, is_random, *ids = rows[i].tolist()
        seed = i if cfg.static_masks else index
        return ids[:n_a], ids[n_a : n_a + n_b], is_random, seed

    def fingerprint(self):
        """A hash of sizes and first instances, by which a resumed run recognises its data."""
        return stable_hash({T: (len(rows), rows[:9].tolist()) for T, rows in self.rows.items()})

def create_masked_lm_predictions(tokens, cfg, tokenizer, rng):
    """A.1: (inputs, positions, labels) of a list of tokens with [CLS] and [SEP]: the tokens with
    some of them replaced, the sorted positions to predict, and the original tokens there."""
    excluded = tokenizer.ids["[CLS]"], tokenizer.ids["[SEP]"]
    candidates = [i for i, token in enumerate(tokens) if token not in excluded]
    rng.shuffle(candidates)
    n = min(cfg.max_predictions, max(1, round(len(tokens) * cfg.masked_lm_prob)))
    positions = sorted(candidates[:n])
    inputs = list(tokens)
    # 80 % of the positions become [MASK], 10 % keep their token, and 10 % get a random one.
    # Departure: ELECTRA's paper replaces all of them by [MASK]; its code, as here, 85 %, and the
    # others keep their token. The code draws positions with replacement; here they are distinct.
    mask_prob = 0.85 if cfg.objective == "rtd" else 0.8
    keep_prob = 1.0 if cfg.objective == "rtd" else 0.5
    for i in candidates[:n]:
        if rng.random() < mask_prob:
            inputs[i] = tokenizer.ids["[MASK]"]
        elif rng.random() >= keep_prob:
            inputs[i] = rng.randint(0, len(tokenizer.entries) - 1)
    return inputs, positions, [tokens[i] for i in positions]

def get_batch(corpus, first, n, cfg):
    """Sequences first ... first + n - 1 of the run: tokens, segments and attention_mask [n, T];
    positions and labels [n, P]; is_random [n]; for ELECTRA, uniform [n, P]; and their counts.

    A pure function of the seed and the index, so that any number of ranks, any accumulation and
    any resume see the same sequences. Unused slots have position 0 and label -100.
    """
    # Departure: masks are drawn anew each time that an instance is read (RoBERTa §4.1); with
    # --static_masks they are fixed, as in the files of the released code.
    ids = corpus.tokenizer.ids
    T = cfg.seq_len
    P = cfg.max_predictions
    batch = {
        "tokens": np.full((n, T), ids["[PAD]"]), "segments": np.zeros((n, T), np.int64),
        "attention_mask": np.zeros((n, T), bool), "positions": np.zeros((n, P), np.int64),
        "labels": np.full((n, P), -100), "is_random": np.zeros(n, np.int64),
    }  # fmt: skip
    if cfg.objective == "rtd":
        batch["uniform"] = np.zeros((n, P), np.float32)
    for row in range(n):
        a, b, batch["is_random"][row], seed = corpus.read(first + row, cfg)
        tokens = [ids["[CLS]"], *a, ids["[SEP]"]]
        if b:
            tokens += [*b, ids["[SEP]"]]
        rng = random.Random(stable_hash(cfg.seed, "masks", T, seed))
        inputs, positions, labels = create_masked_lm_predictions(tokens, cfg, corpus.tokenizer, rng)
        batch["tokens"][row, : len(inputs)] = inputs
        batch["segments"][row, len(a) + 2 : len(inputs)] = 1
        batch["attention_mask"][row, : len(inputs)] = True
        batch["positions"][row, : len(positions)] = positions
        batch["labels"][row, : len(labels)] = labels
        if cfg.objective == "rtd":  # from which the generator's samples follow
            batch["uniform"][row] = [rng.random() for _ in range(P)]
    counts = {
        "n_sequences": n, "n_targets": int((batch["labels"] >= 0).sum()),
        "n_tokens": int(batch["attention_mask"].sum()), "n_random": int(batch["is_random"].sum()),
    }  # fmt: skip
    return {name: torch.from_numpy(array) for name, array in batch.items()} | counts

# ---------------------------------------- Objective ----------------------------------------

def masked_lm(logits, batch):
    """§3.1: the mean of -log p(label), and the share of labels that have the largest logit: sums
    over this batch, divided by n_targets, the count of the global batch; 1e-5 is the code's."""
    # Departure: the code averages over the predictions of each device; here, over those of all.
    logits = logits.float().flatten(0, 1)  # [B P, V]
    labels = batch["labels"].flatten()
    nats = F.cross_entropy(logits, labels, reduction="sum")
    hits = (logits.argmax(-1) == labels).sum()
    return nats / (batch["n_targets"] + 1e-5), hits / max(batch["n_targets"], 1)

def replaced_token_detection(scores, replaced, batch):
    """ELECTRA §2: the discriminator's mean sigmoid cross-entropy over all tokens other than
    padding, scores and replaced [B, T], and the share of them that it classifies correctly."""
    mask = batch["attention_mask"]
    nats = F.binary_cross_entropy_with_logits(scores.float(), replaced.float(), reduction="none")
    hits = (scores > 0) == replaced  # [B, T]
    return (nats * mask).sum() / batch["n_tokens"], (hits & mask).sum() / batch["n_tokens"]

def objective(model, batch, cfg):
    """A.2: the mean masked LM loss plus the mean next sentence loss, and metrics; for ELECTRA, the
    generator's masked LM loss plus 50 times the discriminator's loss (ELECTRA §2). Each mean is a
    sum over this batch divided by the count of the global batch."""
    names = ["tokens", "segments", "attention_mask", "positions"]
    if cfg.objective == "rtd":
        names += ["labels", "uniform"]
    with torch.autocast(batch["tokens"].device.type, torch.bfloat16, cfg.precision == "bf16"):
        logits, *others = model(*(batch[name] for name in names))  # [B, P, V]
    loss, hits = masked_lm(logits, batch)
    metrics = {"mlm": loss, "mlm_acc": hits}
    if cfg.objective == "rtd":
        metrics["rtd"], metrics["rtd_acc"] = replaced_token_detection(*others, batch)
        loss = loss + 50 * metrics["rtd"]
    elif cfg.nsp:
        n = batch["n_sequences"]
        next_logits = others[0].float()  # [B, 2]
        is_random = batch["is_random"]  # label 0: IsNext, 1: NotNext (code)
        metrics["nsp"] = F.cross_entropy(next_logits, is_random, reduction="sum") / n
        metrics["nsp_acc"] = (next_logits.argmax(-1) == is_random).sum() / n
        loss = loss + metrics["nsp"]
    return loss, metrics

# ---------------------------------------- Optimizer ----------------------------------------

class AdamWeightDecay(torch.optim.Optimizer):
    """Adam of the released code: no bias correction, decoupled weight decay (A.2).
    p = p - lr (m / (sqrt(v) + eps) + weight_decay p)"""

    # Departure: A.2 says Adam, which corrects the bias of m and v, and "L2 weight decay", which
    # would add to the gradient; the released code does neither.

    def __init__(self, groups, lr, betas, eps):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if p not in self.state:
                    self.state[p] = {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}
            gradients = [p.grad for p in params]
            m = [self.state[p]["m"] for p in params]
            v = [self.state[p]["v"] for p in params]
            torch._foreach_lerp_(m, gradients, 1 - beta1)  # m = β1 m + (1 - β1) g
            torch._foreach_mul_(v, beta2)  # v = β2 v + (1 - β2) g²
            torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
            denominator = torch._foreach_sqrt(v)
            torch._foreach_add_(denominator, group["eps"])
            update = torch._foreach_div(m, denominator)  # m / (sqrt(v) + eps) + weight_decay p
            torch._foreach_add_(update, params, alpha=group["weight_decay"])
            torch._foreach_add_(params, update, alpha=-group["lr"])

def build_optimizer(model, cfg):
    """A.2: Adam (0.9, 0.999), decay 0.01 on all but biases and norms (code), eps 1e-6 (code)."""
    groups = [
        dict(params=[p for p in model.parameters() if p.ndim > 1], weight_decay=cfg.weight_decay),
        dict(params=[p for p in model.parameters() if p.ndim <= 1], weight_decay=0.0),
    ]
    return AdamWeightDecay(groups, lr=cfg.lr, betas=(0.9, 0.999), eps=1e-6)

def learning_rate(step, cfg):
    """A.2: linear warm-up, then linear decay to 0; step counts earlier updates. The decay counts
    from step 0 (code), so that the rate drops where the warm-up ends and never reaches lr."""
    warmup = min(step / max(cfg.warmup_steps, 1), 1)
    decay = max(1 - step / cfg.steps, 0)
    if cfg.objective == "rtd":
        return cfg.lr * warmup * decay  # as ELECTRA's code
    return cfg.lr * (warmup if step < cfg.warmup_steps else decay)

def phases_of(cfg):
    """A.2: cfg in each phase: sequences of seq_len and, unless long_share is 0, of long_seq_len."""
    # Undisclosed: the batch of the first phase. Here "256 sequences" holds in both.
    long = dataclasses.replace(
        cfg, seq_len=cfg.long_seq_len, max_predictions=cfg.long_max_predictions,
        micro_batch=cfg.long_micro_batch or cfg.micro_batch,
    )  # fmt: skip
    return [cfg, long] if cfg.long_share else [cfg]

def phase_at(step, cfg):
    """A.2: cfg in the phase of that step; the last updates, a share of long_share, are long."""
    n_long = round(cfg.long_share * cfg.steps)
    is_long = n_long > 0 and step >= cfg.steps - n_long
    return phases_of(cfg)[-1] if is_long else cfg

# ---------------------------------------- Precision ----------------------------------------

# Parameters, gradients and Adam's moments are fp32. Under bf16, autocast (in objective) runs matrix
# products and attention in bf16; norms, residual sums, sampling and the losses stay fp32.
# Undisclosed: the paper's precision. The released code is fp32 throughout: --precision fp32.

PEAK_FLOPS = {"bf16": {  # dense, by precision and the device's exact name; others get no MFU
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA B200": 2250e12,
}}  # fmt: skip

# ---------------------------------------- Parallelism ----------------------------------------

def parallelize(model, cfg, mesh):
    """Synchronous data parallelism, as released: ranks hold copies and average gradients.
    Recomputation and compilation are applied to the blocks first."""
    # Departure: on TPUs the code clips each replica's gradient before the average; here, after it.
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        if cfg.recompute == "block":
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if cfg.compile:
            torch.compiler.config.fail_on_recompile_limit_hit = True
            block.compile(dynamic=False)
    if mesh.size() == 1:
        return model
    # static_graph is faster, but gives wrong gradients when gradients are accumulated.
    static_graph = all(split_batch(phase, mesh.size())[0] == 1 for phase in phases_of(cfg))
    options = {"gradient_as_bucket_view": True, "static_graph": static_graph}
    return nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group(), **options)

# ---------------------------------------- Checkpoint ----------------------------------------

HF_CONFIG = {  # field of Config: (key in config.json, default of BertConfig)
    "vocab_size": ("vocab_size", 30522), "context": ("max_position_embeddings", 512),
    "dim": ("hidden_size", 768), "n_layers": ("num_hidden_layers", 12),
    "n_heads": ("num_attention_heads", 12), "hidden_dim": ("intermediate_size", 3072),
}  # fmt: skip
HF_FIXED = {  # the only values that are supported
    "model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2,
    "is_decoder": False, "position_embedding_type": "absolute", "tie_word_embeddings": True,
    "pad_token_id": 0,
}  # fmt: skip
HF_NAMES = {  # part of a parameter's name here: its name in BertForPreTraining
    "embeddings.token": "bert.embeddings.word_embeddings",
    "embeddings.segment": "bert.embeddings.token_type_embeddings",
    "embeddings.position": "bert.embeddings.position_embeddings",
    "embeddings.norm": "bert.embeddings.LayerNorm", "encoder.blocks": "bert.encoder.layer",
    "attn.qkv": "attention.self.qkv", "attn.out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm",
    "mlp.up": "intermediate.dense", "mlp.down": "output.dense", "pooler": "bert.pooler.dense",
    "mlm.dense": "cls.predictions.transform.dense", "mlm.bias": "cls.predictions.bias",
    "mlm.norm": "cls.predictions.transform.LayerNorm", "nsp": "cls.seq_relationship",
}  # fmt: skip
# Fields of Config that must agree with a checkpoint:
SHAPE = (*HF_CONFIG, "uncased", "nsp", "objective")

def bert_tensors(model):
    """(Hugging Face's name, view of the tensor or of its query, key or value) of each parameter."""
    for name, p in model.named_parameters():
        for ours, theirs in HF_NAMES.items():
            name = name.replace(ours, theirs)
        parts = ("query", "key", "value") if ".qkv." in name else ("qkv",)
        for part, tensor in zip(parts, p.data.chunk(len(parts))):
            yield name.replace("qkv", part), tensor

def read_uncased(folder):
    """Whether the vocabulary of folder is uncased, as BertTokenizer reads it; by default it is."""
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    return config.get("do_lower_case", True)

def from_hf(path):
    """(model, cfg) from the checkpoint directory of a BertForPreTraining or, without next sentence
    prediction, of a BertForMaskedLM."""
    with explain(f"{path} holds no BertForPreTraining or BertForMaskedLM", Exception):
        cfg = Config(**read_hf_config(path, HF_CONFIG, HF_FIXED), uncased=read_uncased(path))
        tensors = {}
        for name, tensor in read_hf_tensors(path).items():
            name = name.replace("LayerNorm.gamma", "LayerNorm.weight")  # of early checkpoints
            tensors[name.replace("LayerNorm.beta", "LayerNorm.bias")] = tensor
        cfg.nsp = "cls.seq_relationship.weight" in tensors
        model = BERT(cfg)
        for name, tensor in bert_tensors(model):
            tensor.copy_(tensors[name])
    return model, cfg

def to_hf(model, cfg, path):
    """Write model to the directory path as a BertForPreTraining or a BertForMaskedLM."""
    from safetensors.torch import save_file

    config = {key: getattr(cfg, field) for field, (key, _) in HF_CONFIG.items()} | HF_FIXED
    config |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), cfg.dropout)
    config["architectures"] = ["BertForPreTraining" if cfg.nsp else "BertForMaskedLM"]
    tensors = {k: v.cpu().clone() for k, v in bert_tensors(model)}
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

def run_batches(model, batches, cfg, backward):
    """{name: scalar on the device}: loss and metrics of the global batch of which this rank has
    these micro-batches. `backward` adds the gradient of the loss to the parameters."""
    sums = {}
    for i, batch in enumerate(batches):
        model.require_backward_grad_sync = i == len(batches) - 1  # DDP: all-reduce once per update
        loss, metrics = objective(model, batch, cfg)
        if backward:
            (loss * dist.get_world_size()).backward()  # DDP averages over the ranks
        for name, value in {"loss": loss, **metrics}.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
    values = torch.stack(list(sums.values()))
    dist.all_reduce(values)
    return dict(zip(sums, values))

def update_model(model, optimizer, batches, lr, cfg):
    """One update from this rank's micro-batches; returns loss, metrics and gradient norm ("grad")
    of the global batch. If loss or norm is not finite, all ranks skip the update."""
    means = run_batches(model, batches, cfg, backward=True)
    means["grad"] = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
    values = torch.stack(list(means.values())).tolist()  # the only wait for the device in an update
    means = dict(zip(means, values))
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(means["loss"]) and math.isfinite(means["grad"]):
        optimizer.step()
    optimizer.zero_grad()
    return means

def validate_objective(model, heldout, step, cfg, device, rank, ranks):
    """Log loss and metrics over the first held-out instances; majority is the share of the more
    frequent next sentence label."""
    n_batches = min(cfg.val_batches, len(heldout.rows[cfg.seq_len]) // cfg.batch_size)
    batches = []
    for i in range(max(n_batches, 1)):
        batches += read_batch(heldout, i * cfg.batch_size, cfg, device, rank, ranks)
    sum_counts(batches, ranks)  # all of them are one global batch
    with evaluation_mode(model, cfg.compile):
        means = run_batches(model, batches, cfg, backward=False)
    row = {"val_loss": means.pop("loss").item(), "val_bpb": math.nan}
    row |= {f"val_{name}": mean.item() for name, mean in means.items()}
    if "nsp" in means:
        share = batches[0]["n_random"] / batches[0]["n_sequences"]
        row["val_majority"] = max(share, 1 - share)
    log(cfg.out, step, f"val {step}", row, [f"length {cfg.seq_len}"])

def sample(model, heldout, cfg):
    """Print the prompt, or a held-out sequence, with [MASK] and with the model's predictions, which
    may be special tokens."""
    tokenizer = heldout.tokenizer
    mask = tokenizer.ids["[MASK]"]
    batch = get_batch(heldout, 0, 1, cfg)
    tokens = batch["tokens"][:, : batch["n_tokens"]]  # [1, T]
    segments = batch["segments"][:, : batch["n_tokens"]]
    if cfg.prompt:
        ids = [tokenizer.ids["[CLS]"]]
        for part in cfg.prompt.split("[MASK]"):
            ids += [*tokenizer.encode(clean_text(part, cfg.uncased)), mask]
        tokens = torch.tensor([[*ids[:-1][: cfg.context - 1], tokenizer.ids["[SEP]"]]])
        segments = torch.zeros_like(tokens)
    device = model.embeddings.token.weight.device
    with evaluation_mode(model, cfg.compile):
        logits, *_ = model(*(x.to(device) for x in (tokens, segments, tokens >= 0)))  # [1, T, V]
    best = logits[..., : len(tokenizer.entries)].argmax(-1).cpu()  # [1, T]
    filled = torch.where(tokens == mask, best, tokens)
    print(f"masked: {tokenizer.decode(tokens[0])}\nfilled: {tokenizer.decode(filled[0])}")

def check(cfg, ranks):
    """Raise ValueError for a configuration that cannot run on that many ranks."""
    for field in dataclasses.fields(cfg):
        least = int(field.type is int and field.default > 0 and field.name != "warmup_steps")
        if field.type in (int, float) and not least <= getattr(cfg, field.name) < math.inf:
            raise ValueError(f"--{field.name} {getattr(cfg, field.name)} is not {least} or more")
    for phase in phases_of(cfg):
        n_micro, micro = split_batch(phase, ranks)
        for wrong, message in (
            (cfg.dim % cfg.n_heads, f"{cfg.n_heads} heads do not divide the width {cfg.dim}"),
            (phase.seq_len > cfg.context, f"{phase.seq_len} tokens exceed --context {cfg.context}"),
            (phase.max_predictions < round(phase.seq_len * cfg.masked_lm_prob),
             f"max_predictions {phase.max_predictions} is too few for {phase.seq_len} tokens"),
            (cfg.long_share > 1, f"--long_share {cfg.long_share} is more than 1"),
            (ranks * n_micro * micro != cfg.batch_size,
             f"--batch_size {cfg.batch_size} is not {ranks} ranks x n micro-batches of {micro}"),
            (cfg.resume and not cfg.out, "--resume needs --out"),
            (cfg.eval and not cfg.out and not cfg.init, "--eval needs --out or --init"),
            (cfg.objective == "rtd" and (cfg.nsp or cfg.init or cfg.export),
             "--objective rtd needs --no-nsp, and has no --init or --export"),
            (cfg.write_instances and ranks > 1, "--write_instances runs in one process"),
            (cfg.prompt and "[MASK]" not in cfg.prompt, "--prompt has no [MASK] to fill in"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(message)
    check_directories(cfg.init, cfg.export, cfg.write_instances)

def dry_run(cfg):
    """Print parameters, and FLOPs per token and memory per rank in each phase, computed from shapes
    alone."""
    if not cfg.vocab_size:
        size = cfg.tokenizer.removeprefix("wordpiece:")
        cfg.vocab_size = int(size) if size.isdigit() else len(load_wordpiece(size).entries)
    check(cfg, cfg.world_size)
    with torch.device("meta"):
        total, activated = count_parameters(build_model(cfg))
    print(f"parameters {total:,} | activated {activated:,}")
    # Kept for the backward pass, per position and block: the inputs of both norms in fp32; the
    # inputs of the four products and of GELU, q, k and v in the products' precision; a byte per
    # entry of a GPU's two dropout masks. The loss holds three fp32 tensors of V per slot; with
    # recomputation, which keeps each block's fp32 input, the peak is there or in the recomputed
    # block. Autocast keeps bf16 copies of the weights.
    size = 2 if cfg.precision == "bf16" else 4
    encoders = 1.25 if cfg.objective == "rtd" else 1  # a generator has a quarter of the widths
    width = encoders * cfg.dim
    block = (8 + 6 * size + 2 * (cfg.dropout > 0)) * width + 2 * size * encoders * cfg.hidden_dim
    slot = (3 * size + 4) * cfg.dim + 12 * cfg.vocab_size
    for phase in phases_of(cfg):
        print(f"FLOPs per token {flops_per_token(phase):.4g} at length {phase.seq_len}", end=" ")
        print(f"| 6 N gives {6 * activated:.4g}")
        head = slot * phase.max_predictions / phase.seq_len
        kept = cfg.n_layers * block + head  # bytes per position
        if cfg.recompute == "block":
            kept = cfg.n_layers * 4 * width + max(block, head)
        kept += 2 * 4 * width  # inputs of the embeddings' norm and of the heads
        n_positions = split_batch(phase, cfg.world_size)[1] * phase.seq_len
        memory = {"parameters": 4 * total, "gradients": 4 * total, "optimizer": 8 * total}
        memory["activations"] = n_positions * kept + 2 * total * (cfg.precision == "bf16")
        print_memory(memory)

def train(model, optimizer, corpus, heldout, state, run, device):
    """Update the model until the end of the run; returns False if a signal ends it earlier."""
    this_rank = device, dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp",))
    replicas = parallelize(model, run, mesh)
    signals = catch_signals()
    thread = ThreadPoolExecutor(1)  # reads the next batch during an update

    def read_ahead(first):
        phase = phase_at(first / run.batch_size, run)
        return thread.submit(read_batch, corpus, first, phase, *this_rank)

    next_batches = read_ahead(state["sequences"])
    first_step = saved = state["step"]
    pace = None  # seconds per update
    n_skipped = 0
    while True:
        step = state["step"]
        first = state["sequences"]  # first sequence of the next batch
        cfg = phase_at(first / run.batch_size, run)
        steps_left = math.ceil(cfg.steps - first / cfg.batch_size)
        error = next_batches.exception()  # waits until the next batch is read
        if step > first_step + 1:  # the first update may compile and is left out
            seconds = time.perf_counter() - clock
            pace = 0.9 * (pace or seconds) + 0.1 * seconds
        (stop,) = sum_over_ranks(len(signals) + (error is not None))
        end = steps_left <= 0 or stop or cfg.eval
        if cfg.out and step > saved and (end or (step % cfg.save_every == 0 and not n_skipped)):
            save_checkpoint(cfg.out, model, optimizer, state)
            saved = step
        if error:
            raise error
        if stop:
            return False
        if end or step % cfg.val_every == 0:
            validate_objective(model, heldout, step, cfg, *this_rank)
        if end:
            return True

        clock = time.perf_counter()
        batches = next_batches.result()
        next_batches = read_ahead(first + cfg.batch_size)
        sum_counts(batches, dist.get_world_size())
        torch.manual_seed(stable_hash(cfg.seed, step, dist.get_rank()))  # for dropout
        lr = learning_rate(first / cfg.batch_size, cfg)
        means = update_model(replicas, optimizer, batches, lr, cfg)
        finite = math.isfinite(means["loss"]) and math.isfinite(means["grad"])
        state["step"] += 1
        state["sequences"] += cfg.batch_size
        state["tokens"] += finite * cfg.batch_size * cfg.seq_len
        if step == 0 or steps_left == 1 or state["step"] % cfg.log_every == 0:
            row = {"loss": means["loss"], "bpb": math.nan, "lr": lr, "grad": means["grad"]}
            row |= means | {"tokens": state["tokens"]}
            head = f"step {step + 1}/{step + steps_left}"
            tail = progress(state["tokens"], steps_left - 1, pace, cfg, device)
            log(cfg.out, step + 1, head, row, tail)
        n_skipped = 0 if finite else n_skipped + 1
        if n_skipped:
            print(f"step {step + 1} skipped: its loss or gradient is not finite")
        if n_skipped == 3 or (n_skipped and steps_left == 1):
            raise ValueError(f"no finite gradient in the last {n_skipped} steps to {step + 1}")

def choose_tokenizer(cfg, documents):
    """The WordPiece of the vocab.txt in --data, --init or, if the run continues, --out, which must
    agree; else that of --tokenizer, which is a vocab.txt or learned from documents."""
    out = cfg.out if cfg.resume or cfg.eval else ""
    paths = [f"{folder}/vocab.txt" for folder in (cfg.data, cfg.init, out) if folder]
    paths = list(filter(os.path.exists, paths)) or [cfg.tokenizer]
    if any(load_wordpiece(path).entries != load_wordpiece(paths[0]).entries for path in paths[1:]):
        raise ValueError(f"{' and '.join(paths)} are different vocabularies")
    if not paths[0].startswith("wordpiece:"):
        return load_wordpiece(paths[0])
    if cfg.init:
        raise ValueError(f"--init {cfg.init} has no vocab.txt: --tokenizer is needed")
    return learn_wordpiece(documents, int(cfg.tokenizer.removeprefix("wordpiece:")))

def load_instances(cfg):
    """The training and the held-out Instances of --data, a directory of --write_instances or text
    from which they are made. Sets cfg.vocab_size and, from such a directory, cfg.uncased."""
    prepared = cfg.data and os.path.exists(f"{cfg.data}/tokenizer_config.json")
    if prepared:
        cfg.uncased = read_uncased(cfg.data)
        if cfg.write_instances:
            raise ValueError(f"--write_instances reads text, and {cfg.data} has instances")
    files = [] if prepared else find_files(cfg.data)[0]
    documents = split_sentences(read_documents(cfg.data, files), cfg)
    if cfg.tokenizer.startswith("wordpiece:"):
        documents = list(documents)  # read twice
    tokenizer = choose_tokenizer(cfg, documents)
    n = len(tokenizer.entries)
    cfg.vocab_size = cfg.vocab_size or n
    sizes = f"{n:,} entries in the tokenizer, {cfg.vocab_size:,} in the model"
    if cfg.vocab_size < n:
        raise ValueError(f"{sizes}, as --vocab_size, --preset or --init has it")
    if cfg.vocab_size > n:
        print(f"warning: {sizes}")
    # A vocabulary is cased if an entry other than the special tokens has a capital letter.
    if cfg.uncased == any(e[:1] != "[" and e != e.lower() for e in tokenizer.entries):
        print(f"warning: the text is {'un' * cfg.uncased}cased, and the vocabulary is not")
    with tempfile.TemporaryDirectory() as temporary:
        folder = cfg.data if prepared else cfg.write_instances or f"{temporary}/instances"
        if not prepared:
            write_instances(folder, tokenize_sentences(documents, tokenizer), tokenizer, cfg)
        return [Instances(folder, split, tokenizer, cfg) for split in ("train", "val")]

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
        corpus, heldout = load_instances(cfg)
        if cfg.write_instances:
            return print(f"{cfg.write_instances}: the instances are written")

        fixed = {name: getattr(cfg, name) for name in SHAPE}
        if not cfg.eval:
            fixed |= {"seed": cfg.seed, "data_fingerprint": corpus.fingerprint()}
        newest, run = newest_checkpoint(cfg.out, cfg.resume or cfg.eval, fixed)
        if run and "steps" not in given:  # keep the planned number of sequences
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
        if newest:
            load_checkpoint(newest, model, optimizer, state)
        if cfg.eval:
            if not newest and not cfg.init:
                raise ValueError(f"--eval: {cfg.out} has no checkpoint")
            cfg.out = ""  # nothing is written
        if cfg.out and dist.get_rank() == 0:
            lock = claim_directory(cfg.out, dataclasses.asdict(cfg) | fixed)  # until the run ends
            save_wordpiece(corpus.tokenizer, cfg.uncased, cfg.out)
        phase = phase_at(state["sequences"] / cfg.batch_size, cfg)
        n_micro, micro = split_batch(phase, ranks)
        n_tokens = cfg.batch_size * phase.seq_len
        n_rows = len(corpus.rows[phase.seq_len])
        print(f"torch {torch.__version__} | {device.type} {cfg.precision} | {n_rows:,} instances")
        print("parameters {:,} | activated {:,}".format(*count_parameters(model)), end=" | ")
        print(f"FLOPs per token {flops_per_token(phase):.3g} | tokens per step", end=" ")
        print(f"{n_tokens:,} = {ranks} ranks x {n_micro} x {micro} sequences of {phase.seq_len}")
        if not train(model, optimizer, corpus, heldout, state, cfg, device):
            return print(f"stopped after step {state['step']}")
        if cfg.export and dist.get_rank() == 0:
            to_hf(model, cfg, cfg.export)
            save_wordpiece(corpus.tokenizer, cfg.uncased, cfg.export)
        if dist.get_rank() == 0:
            sample(model, heldout, phase_at(state["sequences"] / cfg.batch_size, cfg))

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

if __name__ == "__main__":
    main()
