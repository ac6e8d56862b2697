"""Speed and memory, side by side: python tests/benchmark.py gpt1|gpt3|llama3|deepseek_v3|bert|t5|gemma|kimi_muon|omni [--pairs 10]

Each line compares the script (A) with something else (B) in interleaved pairs A B A B ... of one run
and prints the medians. CPU time is the process's, over all its threads. Nothing here is asserted.
"""
import argparse
import contextlib
import dataclasses
import importlib
import io
import itertools
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from fractions import Fraction

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
STEPS = 5  # updates of one measurement


class NanoBlock(nn.Module):
    """A block as the books have it: what a careful reader would write down without help."""

    def __init__(self, dim, n_heads, hidden_dim):
        super().__init__()
        self.n_heads = n_heads
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.c_fc, self.c_out = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.c_attn(x).split(D, dim=2)
        q, k, v = (t.view(B, T, self.n_heads, D // self.n_heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = self.ln_1(x + self.c_proj(y.transpose(1, 2).contiguous().view(B, T, D)))
        return self.ln_2(x + self.c_out(F.gelu(self.c_fc(x), approximate="tanh")))


class Nano(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(cfg.vocab_size, cfg.dim), nn.Embedding(cfg.seq_len, cfg.dim)
        self.h = nn.ModuleList(NanoBlock(cfg.dim, cfg.n_heads, cfg.hidden_dim) for _ in range(cfg.n_layers))

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return x @ self.wte.weight.T


class BookBlock(nn.Module):
    """GPT-2's block, the norm before each branch, as the books have it."""

    def __init__(self, dim, n_heads, hidden_dim):
        super().__init__()
        self.n_heads = n_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.c_fc, self.c_out = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split(D, dim=2)
        q, k, v = (t.view(B, T, self.n_heads, D // self.n_heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(B, T, D))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class Book(nn.Module):
    """GPT-2."""

    def __init__(self, cfg):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(cfg.vocab_size, cfg.dim), nn.Embedding(cfg.seq_len, cfg.dim)
        self.h = nn.ModuleList(BookBlock(cfg.dim, cfg.n_heads, cfg.hidden_dim) for _ in range(cfg.n_layers))
        self.ln_f, self.head = nn.LayerNorm(cfg.dim), nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
        self.head.weight = self.wte.weight
        for p in self.parameters():
            nn.init.normal_(p, 0.0, 0.02) if p.ndim > 1 else None

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x))


def hugging_face(cfg):
    from transformers import DeepseekV3ForCausalLM, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OpenAIGPTConfig, OpenAIGPTLMHeadModel

    if hasattr(cfg, "band"):
        from test_hf_parity import gpt2_config

        config = gpt2_config(cfg)
        config._attn_implementation = "sdpa"
        return GPT2LMHeadModel(config)
    if hasattr(cfg, "n_experts"):
        from test_hf_parity import deepseek_config

        return DeepseekV3ForCausalLM(deepseek_config(cfg))
    if hasattr(cfg, "n_kv_heads"):
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=cfg.vocab_size, hidden_size=cfg.dim, intermediate_size=cfg.hidden_dim,
                        num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.n_kv_heads,
                        max_position_embeddings=cfg.seq_len, rope_parameters=dict(rope_type="default", rope_theta=5e5))
        )  # fmt: skip
    return OpenAIGPTLMHeadModel(
        OpenAIGPTConfig(vocab_size=cfg.vocab_size, n_positions=cfg.seq_len, n_embd=cfg.dim, n_layer=cfg.n_layers,
                        n_head=cfg.n_heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    )  # fmt: skip


def plain_loop(module, cfg, kind):
    """step(): one update of a bare loop: no logs, no checks; the model is the script's or another."""
    if kind == "bare":
        model = module.GPT1(cfg)
        module.init_weights(model, cfg)
    else:
        model = kind() if callable(kind) else {"nano": Nano, "book": Book, "hf": hugging_face}[kind](cfg)
    if getattr(cfg, "compile", False):
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    data = torch.randint(cfg.vocab_size, (100_000,), dtype=torch.int32)

    def step():
        starts = torch.randint(len(data) - cfg.seq_len - 1, (cfg.batch_size,)).tolist()
        window = torch.stack([data[i : i + cfg.seq_len + 1] for i in starts]).long()
        with torch.autocast("cpu", torch.bfloat16, cfg.precision == "bf16"):
            logits = model(window[:, :-1])
        logits = getattr(logits, "logits", logits).float()
        loss = F.cross_entropy(logits.reshape(-1, cfg.vocab_size), window[:, 1:].reshape(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return lambda: [step() for _ in range(STEPS)]


def the_script(module, cfg):
    """run(): STEPS updates through the script's own train, on made-up text."""
    tokenizer = module.load_tokenizer("bytes", ["<|endoftext|>"])
    text = "".join(map(chr, torch.randint(32, 127, (400_000,)).tolist()))
    documents = module.tokenize([("text", text)], tokenizer, 256)
    corpora = module.load_corpora([], documents, tokenizer, 256, cfg.vocab_size, cfg.batch_size, cfg.seq_len)
    model = module.GPT1(cfg)
    module.init_weights(model, cfg)
    optimizer = module.build_optimizer(model, cfg)
    state = {"step": 1, "sequences": cfg.batch_size, "tokens": 0}
    module.validate = lambda *_: None  # at the end, and no part of an update

    def run():
        now = dataclasses.replace(cfg, steps=state["step"] + STEPS)
        with contextlib.redirect_stdout(io.StringIO()):
            module.train(model, optimizer, *corpora, state, now, torch.device("cpu"))

    return run


def the_pipeline(module, cfg):
    """run(): STEPS updates through llama3.py's own loop, on documents of some 200 tokens."""
    generator = torch.Generator().manual_seed(0)
    texts = ("".join(map(chr, torch.randint(32, 127, (200,), generator=generator).tolist())) for _ in range(3000))
    tokenizer, separator = module.load_specials(cfg)
    documents = module.tokenize_pieces(((str(i), text) for i, text in enumerate(texts)), tokenizer, separator)
    cfg = module.fit_ranks(dataclasses.replace(cfg, tokens=1e12), 1)
    corpora = module.load_corpora([], documents, tokenizer, separator, cfg.vocab_size, cfg.batch_size, cfg.seq_len)
    plan = module.phases(cfg)
    mix, heldout = (module.DataMix({"": Fraction(1)}, [corpus]) for corpus in corpora)
    pipeline = module.Pipeline(cfg, module.make_mesh(cfg, "cpu"))
    module.init_weights(pipeline.model, cfg)
    optimizer = module.build_optimizer(pipeline.model, cfg)
    size = cfg.batch_size * cfg.seq_len
    state = dict.fromkeys(("tokens", "n_averaged", "watched", "loss_mean", "loss_variance"), 0)
    state |= {"step": 1, "sequences": cfg.batch_size, "position": size}

    def run():
        now = dataclasses.replace(cfg, spike=0.0)
        end = state["position"] + STEPS * size
        module.validate = lambda *_: None  # at the end, and no part of an update
        with contextlib.redirect_stdout(io.StringIO()):
            module.train(pipeline, optimizer, plan, [mix], heldout, tokenizer, state, end, now, torch.device("cpu"))

    return run


def the_pipeline_1f1b(module, cfg):
    """run(): STEPS updates through deepseek_v3.py's own loop, on documents of some 200 tokens."""
    generator = torch.Generator().manual_seed(0)
    texts = ("".join(map(chr, torch.randint(32, 127, (200,), generator=generator).tolist())) for _ in range(3000))
    tokenizer = module.load_tokenizer("bytes", module.SPECIALS)
    documents = module.tokenize(((str(i), text) for i, text in enumerate(texts)), tokenizer, tokenizer.eot_token)
    cfg = module.fit_layout(dataclasses.replace(cfg, tokens=1e12), 1)
    sizes = cfg.vocab_size, cfg.batch_size, cfg.seq_len
    corpora = module.load_corpora([], documents, tokenizer, tokenizer.eot_token, *sizes)
    pipe = module.Pipeline1F1B(cfg, torch.device("cpu"))
    module.init_weights(pipe.model, cfg)
    pipe.share()
    optimizer = module.build_optimizer(pipe.flats, cfg)
    state = dict.fromkeys(("step", "sequences", "tokens", "position"), 0)

    def run():
        end = state["position"] + STEPS * cfg.batch_size * cfg.seq_len
        module.validate = lambda *_: None  # at the end, and no part of an update
        with contextlib.redirect_stdout(io.StringIO()):
            module.train(pipe, optimizer, *corpora, state, end, cfg, torch.device("cpu"))

    return run


def the_model_parallel(module, cfg):
    """run(): STEPS updates through gpt3.py's own loop, on made-up text."""
    tokenizer = module.load_tokenizer("bytes", ["<|endoftext|>"])
    text = "".join(map(chr, torch.randint(32, 127, (400_000,)).tolist()))
    documents = module.tokenize([("text", text)], tokenizer, tokenizer.eot_token)
    cfg = module.lay_out(cfg, 1)
    sizes = cfg.vocab_size, cfg.batch_size, cfg.seq_len
    corpora = module.load_corpora([], documents, tokenizer, tokenizer.eot_token, *sizes)
    mixture, heldout = (module.TrainingMix({"": 1.0}, [corpus]) for corpus in corpora)
    parallel = module.ModelParallel(cfg, torch.device("cpu"))
    module.init_weights(parallel.model, cfg)
    optimizer = module.build_optimizer(parallel.model, cfg)
    state = dict.fromkeys(("sequences", "tokens", "clean", "square", "trace"), 0) | {"step": 1, "scale": 1.0}

    def run():
        now = dataclasses.replace(cfg, tokens=state["tokens"] + STEPS * cfg.batch_size * cfg.seq_len)
        module.validate = lambda *_: None  # at the end, and no part of an update
        with contextlib.redirect_stdout(io.StringIO()):
            module.train(parallel, optimizer, mixture, heldout, state, now)

    return run


def gpt3_main(module, args):
    """fp32 and bf16, eager and compiled, against both peers; then one attention call, banded against dense."""
    dense = dict(vocab_size=4096, seq_len=512, dim=256, n_layers=6, n_heads=4, hidden_dim=1024, band=0, batch_size=4, first_batch=0,
                 val_every=10**9)  # fmt: skip
    flags = args.measure_memory.split(",") if args.measure_memory else []
    for precision, compiles in (("fp32", False), ("bf16", False), ("fp32", True), ("bf16", True)):
        column = f"{precision} {'compiled' if compiles else 'eager'}"
        cfg = module.Config(**dense, precision=precision, compile=compiles)
        if flags:
            if flags[1:] == [column]:
                run = the_model_parallel(module, cfg) if flags[0] == "script" else plain_loop(module, cfg, flags[0])
                run(), run()
                return print(peak_of_this_process())
            continue
        script = the_model_parallel(module, cfg)
        for kind, title in (("book", "from-the-book loop"), ("hf", "Hugging Face's class")):
            compare(f"{column}, {title}", script, plain_loop(module, cfg, kind), args.pairs)
        memory = {kind: peak_memory(f"{kind},{column}", [args.script]) for kind in ("script", "book", "hf")}
        print(f"{column}, peak MiB", ", ".join(f"{kind} {size:.0f}" for kind, size in memory.items()))
    q, k, v = torch.randn(3, 1, 12, 2048, 64, requires_grad=True)
    banded = lambda: module.banded_attention(q, k, v, 128, 0.0)  # noqa: E731
    dense = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    calls = [lambda attend=attend: [attend().sum().backward() for _ in range(STEPS)] for attend in (banded, dense)]
    compare("attention at 2,048, a band of 128, against dense", *calls, args.pairs)


def one_pass(module, cfg):
    """run(): forward and backward of the model alone, STEPS times."""
    model, tokens = module.DeepSeekV3(cfg), torch.randint(256, (cfg.batch_size, cfg.seq_len))
    module.init_weights(model, cfg)
    batch = dict(tokens=tokens, targets=tokens, n_targets=tokens.numel(), n_sequences=len(tokens))

    def step():
        module.objective(model, batch, cfg)[0].backward()
        model.zero_grad()

    return lambda: [step() for _ in range(STEPS)]


def measure(run):
    """(CPU seconds, wall seconds) of run()."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall


def compare(title, a, b, pairs):
    """Prints B's time over A's, so that above 1 means that the script is faster."""
    a(), b()
    rows = [(measure(a), measure(b)) for _ in range(pairs)]
    for i, kind in enumerate(("CPU", "wall")):
        mine, theirs = (statistics.median(row[j][i] for row in rows) for j in (0, 1))
        ratio = statistics.median(row[1][i] / row[0][i] for row in rows)
        each = 1000 / STEPS
        print(f"{title:28} {kind:4} ms a step: script {mine * each:8.1f}, other {theirs * each:8.1f}, "
              f"other / script {ratio:.3f}", flush=True)  # fmt: skip


def peak_of_this_process():
    status = pathlib.Path("/proc/self/status").read_text()  # ru_maxrss would include the parent's
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def peak_memory(kind, flags):
    """Peak resident MiB of a fresh process that does nothing else."""
    code = [sys.executable, __file__, *flags, "--measure_memory", kind]
    return float(subprocess.run(code, capture_output=True, text=True, check=True).stdout)


def throughput(name, ranks, threads):
    """Tokens per second of the demo, the mean of its log lines but the first."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    flags = ["--steps", "160", "--log_every", "40", "--val_batches", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([*launcher, str(ROOT / f"{name}.py"), *flags], capture_output=True, text=True, env=environment)
    return statistics.mean(float(speed) for speed in re.findall(r"([\d.]+)k tok/s", done.stdout))


def held_on_ranks(name):
    """MiB of parameters, gradients, optimizer and average that a rank of 1, 2 and 4 data-parallel ones holds."""
    from conftest import SCRIPTS
    from ranks import Ranks
    from test_gradients import held_bytes

    pool, found = Ranks(), []
    overrides = dict(dim=256, n_layers=4, n_heads=4, hidden_dim=768, anneal_tokens=96.0)
    for ranks in (1, 2, 4):
        held = pool.run(ranks, held_bytes, name, SCRIPTS[name], overrides)
        found.append(max(sum(kinds.values()) for kinds, _ in held) / 2**20)
    pool.close()
    print("held by a rank of 1, 2, 4:", ", ".join(f"{size:.2f} MiB" for size in found),
          "| times ranks, of one rank's:", ", ".join(f"{n * size / found[0]:.3f}" for n, size in zip((1, 2, 4), found)))


def llama3_main(module, args):
    shape = dict(vocab_size=264, dim=512, n_layers=8, n_heads=8, n_kv_heads=2, hidden_dim=1408, precision="fp32",
                 val_every=10**9, warmup_steps=1, document_mask=False)  # fmt: skip
    cfg = module.Config(**shape, seq_len=512, batch_size=4)
    if args.measure_memory:
        kind = args.measure_memory
        run = the_pipeline(module, cfg) if kind == "script" else plain_loop(module, cfg, kind)
        run(), run()
        return print(peak_of_this_process())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, {args.pairs} pairs of {STEPS} steps, "
          f"{cfg.n_layers} blocks of width {cfg.dim}, {cfg.batch_size} x {cfg.seq_len} tokens")  # fmt: skip
    compare("Hugging Face's class", the_pipeline(module, cfg), plain_loop(module, cfg, "hf"), args.pairs)
    memory = {kind: peak_memory(kind, [args.script]) for kind in ("script", "hf")}
    print("peak MiB", ", ".join(f"{kind} {size:.0f}" for kind, size in memory.items()), end="; ")
    print(f"script / hf {memory['script'] / memory['hf']:.3f}")
    long = dataclasses.replace(cfg, seq_len=2048, batch_size=1, n_layers=4)
    packed = dataclasses.replace(long, document_mask=True)
    compare("packed, against plain causal", the_pipeline(module, long), the_pipeline(module, packed), max(args.pairs // 2, 3))
    held_on_ranks(args.script)


def deepseek_v3_main(module, args):
    cfg = module.Config(vocab_size=4096, dim=256, n_layers=4, n_dense=1, hidden_dim=704, n_heads=4, q_rank=128, kv_rank=64, head_dim=64,
                        rope_dim=32, n_experts=32, n_shared=1, expert_dim=128, top_k=4, n_groups=4, groups_kept=2, mtp=False,
                        seq_len=256, batch_size=8, precision="fp32", val_every=10**9, warmup_steps=1, init_std=0.02)  # fmt: skip
    if args.measure_memory:
        kind = args.measure_memory
        run = the_pipeline_1f1b(module, cfg) if kind == "script" else plain_loop(module, cfg, kind)
        run(), run()
        return print(peak_of_this_process())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, {args.pairs} pairs of {STEPS} steps, "
          f"{cfg.n_layers} blocks of width {cfg.dim}, {cfg.n_experts} experts, {cfg.batch_size} x {cfg.seq_len} tokens")  # fmt: skip
    compare("Hugging Face's class", the_pipeline_1f1b(module, cfg), plain_loop(module, cfg, "hf"), args.pairs)
    memory = {kind: peak_memory(kind, [args.script]) for kind in ("script", "hf")}
    print("peak MiB", ", ".join(f"{kind} {size:.0f}" for kind, size in memory.items()), end="; ")
    print(f"script / hf {memory['script'] / memory['hf']:.3f}")
    twice = dataclasses.replace(cfg, n_experts=64)
    compare("64 experts, against 32", one_pass(module, cfg), one_pass(module, twice), max(args.pairs // 2, 3))


def bert_corpora(module, cfg):
    """Instances of documents of some forty sentences of 5 to 30 letters, as many as the runs below need."""
    import random

    from ranks import make_instances

    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz "
    sentences = [["".join(rng.choices(letters, k=rng.randint(5, 30))) for _ in range(rng.randint(20, 60))] for _ in range(600)]
    return make_instances(module, cfg, [(str(i), document) for i, document in enumerate(sentences)])


def the_phases(module, cfg):
    """run(): STEPS updates through bert.py's own loop."""
    corpora = bert_corpora(module, cfg)
    model = module.build_model(cfg)
    module.init_weights(model, cfg)
    optimizer = module.build_optimizer(model, cfg)
    state = {"step": 1, "sequences": cfg.batch_size, "tokens": 0}
    module.validate_objective = lambda *_: None  # at the end, and no part of an update

    def run():
        now = dataclasses.replace(cfg, steps=state["step"] + STEPS)
        with contextlib.redirect_stdout(io.StringIO()):
            module.train(model, optimizer, *corpora, state, now, torch.device("cpu"))

    return run


def the_phases_of_hugging_face(module, cfg):
    """run(): the same with BertForPreTraining, on the same batches, with the same class of optimizer and a bare loop."""
    from transformers import BertConfig, BertForPreTraining

    (corpus, _), first = bert_corpora(module, cfg), [0]
    model = BertForPreTraining(BertConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.dim, num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads,
        intermediate_size=cfg.hidden_dim, max_position_embeddings=cfg.context, hidden_dropout_prob=cfg.dropout,
        attention_probs_dropout_prob=cfg.dropout,
    )).train()  # fmt: skip
    optimizer = module.build_optimizer(model, cfg)

    def step():
        batch = module.get_batch(corpus, first[0], cfg.batch_size, cfg)
        first[0] += cfg.batch_size
        labels = torch.full_like(batch["tokens"], -100)
        rows, slots = (batch["labels"] >= 0).nonzero(as_tuple=True)
        labels[rows, batch["positions"][rows, slots]] = batch["labels"][rows, slots]
        loss = model(batch["tokens"], batch["attention_mask"], batch["segments"], labels=labels, next_sentence_label=batch["is_random"]).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return lambda: [step() for _ in range(STEPS)]


def bert_main(module, args):
    cfg = module.Config(vocab_size=8192, dim=256, n_layers=4, n_heads=4, hidden_dim=1024, dropout=0.0, batch_size=16, micro_batch=16,
                        seq_len=128, long_share=0.0, precision="fp32", dupe_factor=1, val_every=10**9, warmup_steps=1)  # fmt: skip
    if args.measure_memory:
        run = (the_phases if args.measure_memory == "script" else the_phases_of_hugging_face)(module, cfg)
        run(), run()
        return print(peak_of_this_process())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, {args.pairs} pairs of {STEPS} steps, "
          f"{cfg.n_layers} blocks of width {cfg.dim}, {cfg.batch_size} x {cfg.seq_len} tokens, V {cfg.vocab_size}")  # fmt: skip
    script = the_phases(module, cfg)
    compare("Hugging Face's class", script, the_phases_of_hugging_face(module, cfg), args.pairs)
    everywhere = dataclasses.replace(cfg)
    inner = module.BERT.forward

    def all_positions(self, tokens, segments, attention_mask, positions):
        logits, next_logits = inner(self, tokens, segments, attention_mask)
        return logits.take_along_dim(positions[:, :, None], 1), next_logits

    def everywhere_run():
        module.BERT.forward = all_positions
        other()
        module.BERT.forward = inner

    other = the_phases(module, everywhere)
    compare("logits at all positions", script, everywhere_run, max(args.pairs // 2, 3))
    memory = {kind: peak_memory(kind, [args.script]) for kind in ("script", "hf")}
    print("peak MiB", ", ".join(f"{kind} {size:.0f}" for kind, size in memory.items()), end="; ")
    print(f"script / hf {memory['script'] / memory['hf']:.3f}")


def the_shards(module, cfg, corpora):
    """run(): STEPS updates through t5.py's own loop."""
    model = module.T5(cfg)
    module.init_weights(model, cfg)
    optimizer = module.build_optimizer(model, cfg)
    state = {"step": 1, "sequences": 0, "tokens": 0}  # step 0 would validate
    module.validate = lambda *_: None  # at the end, and no part of an update

    def run():
        now = dataclasses.replace(cfg, steps=state["sequences"] // cfg.batch_size + STEPS)
        with contextlib.redirect_stdout(io.StringIO()):
            module.train(model, optimizer, *corpora, state, now, torch.device("cpu"))

    return run


def t5_hugging_face(module, cfg, corpus):
    """run(): STEPS updates of Hugging Face's class on the same batches, with the same optimizer class; its loss has no z-loss."""
    import transformers

    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=cfg.vocab_size, d_model=cfg.dim, d_kv=cfg.head_dim, d_ff=cfg.hidden_dim, num_layers=cfg.n_layers, num_heads=cfg.n_heads,
        dropout_rate=cfg.dropout, pad_token_id=cfg.pad, eos_token_id=cfg.eos, decoder_start_token_id=cfg.pad, use_cache=False,
    ))  # fmt: skip
    model.train()
    optimizer, done = module.Adafactor(model.parameters(), lr=cfg.lr), itertools.count()

    def step():
        batch = module.get_batch(corpus, cfg.batch_size * next(done), cfg.batch_size, cfg)
        loss = model(input_ids=batch["source"], labels=batch["targets"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return lambda: [step() for _ in range(STEPS)]


def t5_main(module, args):
    """fp32, eager, one rank, full rows of 512 inputs and 114 targets, against Hugging Face's class; then how many instances
    the corruption builds in a second, against what the demo consumes."""
    cfg = module.Config(vocab_size=4096, dim=256, n_layers=3, n_heads=4, head_dim=64, hidden_dim=1024, dropout=0.0, precision="fp32",
                        batch_size=4, pad=257, eos=256, sentinel=4095, seq_len=568, val_every=10**9)  # fmt: skip
    tokenizer = module.load_tokenizer("bytes", module.SPECIALS)
    text = "".join(map(chr, torch.randint(32, 127, (400_000,)).tolist()))
    documents = module.tokenize([("text", text)], tokenizer, cfg.eos)
    corpora = module.load_corpora([], documents, tokenizer, -1, cfg.vocab_size, cfg.batch_size, cfg.seq_len)
    if args.measure_memory:
        run = the_shards(module, cfg, corpora) if args.measure_memory == "script" else t5_hugging_face(module, cfg, corpora[0])
        run(), run()
        return print(peak_of_this_process())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, {args.pairs} pairs of {STEPS} steps, 2 x {cfg.n_layers} "
          f"blocks of width {cfg.dim}, {cfg.batch_size} x (512 inputs, 114 targets)")  # fmt: skip
    compare("Hugging Face's class", the_shards(module, cfg, corpora), t5_hugging_face(module, cfg, corpora[0]), args.pairs)
    memory = {kind: peak_memory(kind, [args.script]) for kind in ("script", "hf")}
    print("peak MiB", ", ".join(f"{kind} {size:.0f}" for kind, size in memory.items()), end="; ")
    print(f"script / hf {memory['script'] / memory['hf']:.3f}")
    demo = module.Config(**module.PRESETS["demo"], vocab_size=384, pad=257, eos=256, sentinel=360, precision="fp32", val_every=10**9)
    demo.seq_len = module.row_lengths(demo)[0]
    run, n = the_shards(module, demo, corpora), demo.batch_size * STEPS
    build = lambda: [module.get_batch(corpora[0], i * demo.batch_size, demo.batch_size, demo) for i in range(STEPS)]  # noqa: E731
    run(), build()
    rows = [(measure(build)[1], measure(run)[1]) for _ in range(args.pairs)]
    built, used = (statistics.median(n / row[i] for row in rows) for i in (0, 1))
    ratio = statistics.median(row[1] / row[0] for row in rows)
    print(f"rows a second: corruption builds {built:.0f}, the demo consumes {used:.0f}, ratio {ratio:.1f}")


def the_sharded(module, cfg):
    """run(): STEPS updates through gemma.py's own loop, on made-up text."""
    tokenizer = module.load_tokenizer("bytes", module.SPECIALS)
    text = "".join(map(chr, torch.randint(32, 127, (400_000,)).tolist()))
    documents = module.tokenize([("text", text)], tokenizer, tokenizer.eot_token)
    sizes = cfg.vocab_size, cfg.batch_size, cfg.seq_len
    corpora = module.load_corpora([], documents, tokenizer, tokenizer.eot_token, *sizes)
    model = module.build_sharded(cfg, module.init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp_replicate", "dp")))
    optimizer = module.build_optimizer(model, cfg)
    state = {"step": 1, "sequences": 0, "tokens": 0}  # step 0 would validate

    def run():
        end = (state["sequences"] + STEPS * cfg.batch_size) * cfg.seq_len
        now = dataclasses.replace(cfg, tokens=float(end))
        module.validate = lambda *_: None  # at the end, and no part of an update
        with contextlib.redirect_stdout(io.StringIO()):
            module.train(model, None, optimizer, *corpora, state, now, torch.device("cpu"))

    return run


def gemma_main(module, args):
    """fp32, eager, one rank: both generations against Hugging Face's classes; then a local layer as T doubles."""
    import transformers

    shape = dict(vocab_size=4096, dim=384, n_layers=6, n_heads=4, n_kv_heads=1, head_dim=128, query_scalar=128, hidden_dim=1152, window=256,
                 seq_len=1024, batch_size=2, precision="fp32", dp=1, lr=1e-4, val_every=10**9)  # fmt: skip
    gemma2 = dict(local_layers=1, qk_norm=False, attention_cap=50.0, logit_cap=30.0, rope_theta=1e4)
    for name, cfg in (("Gemma2", module.Config(**shape, **gemma2)), ("Gemma3", module.Config(**shape))):
        config = {key: value for key, value in module.hf_config(cfg).items() if key not in ("architectures", "model_type")}
        config_class = transformers.Gemma3TextConfig if cfg.qk_norm else transformers.Gemma2Config
        peer = lambda: getattr(transformers, f"{name}ForCausalLM")(config_class(**config)).train()  # noqa: E731, B023
        if args.measure_memory:
            kind, wanted = args.measure_memory.split(",")
            if wanted == name:
                run = the_sharded(module, cfg) if kind == "script" else plain_loop(module, cfg, peer)
                run(), run()
                return print(peak_of_this_process())
            continue
        compare(f"Hugging Face's {name}ForCausalLM", the_sharded(module, cfg), plain_loop(module, cfg, peer), args.pairs)
        memory = {kind: peak_memory(f"{kind},{name}", [args.script]) for kind in ("script", "hf")}
        print(f"{name}, peak MiB", ", ".join(f"{kind} {size:.0f}" for kind, size in memory.items()))
    for T in (1024, 2048, 4096, 8192):
        q, k, v = (torch.randn(1, heads, T, 128, requires_grad=True) for heads in (4, 1, 1))
        run = lambda: module.local_attention(q, k, v, 0.1, 256).sum().backward()  # noqa: E731, B023
        run()
        print(f"local attention, T {T}: {1000 * statistics.median(measure(run)[0] for _ in range(args.pairs)):.1f} ms of CPU time")


def the_muon(module, cfg):
    """run(): STEPS updates through kimi_muon.py's own loop, on made-up text."""
    tokenizer = module.load_tokenizer("bytes", ["<|endoftext|>"])
    text = "".join(map(chr, torch.randint(32, 127, (400_000,)).tolist()))
    documents = module.tokenize([("text", text)], tokenizer, tokenizer.eot_token)
    sizes = cfg.vocab_size, cfg.batch_size, cfg.seq_len
    corpora = module.load_corpora([], documents, tokenizer, tokenizer.eot_token, *sizes)
    mesh = module.init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "ep"))
    with torch.device("meta"):
        model = module.Kimi(cfg)
    module.parallelize(model, cfg, mesh)
    module.init_weights(model, cfg)
    shards = module.shard_parameters(model, cfg, mesh)
    parts = model, shards, module.build_optimizer(shards, cfg), None
    state = {"step": 1, "sequences": 0, "tokens": 0}  # step 0 would validate

    def run():
        end = (state["sequences"] + STEPS * cfg.batch_size) * cfg.seq_len
        now = dataclasses.replace(cfg, tokens=float(end))
        module.validate = lambda *_: None  # at the end, and no part of an update
        with contextlib.redirect_stdout(io.StringIO()):
            module.train(*parts, *corpora, state, now, torch.device("cpu"))

    return run


def muon_share(module, cfg):
    """CPU time of Muon's step, and of the update that it is part of, at the shape cfg."""
    clocks = {"muon": 0.0, "update": 0.0}

    def clocked(function, kind):
        def call(*args, **more):
            start = time.process_time()
            result = function(*args, **more)
            clocks[kind] += time.process_time() - start
            return result

        return call

    step, update = module.Muon.step, module.muon_clip_step
    module.Muon.step, module.muon_clip_step = clocked(step, "muon"), clocked(update, "update")
    run = the_muon(module, cfg)
    run()
    clocks.update(muon=0.0, update=0.0)
    run(), run()
    module.Muon.step, module.muon_clip_step = step, update
    print(f"Muon {500 * clocks['muon'] / STEPS:.1f} of {500 * clocks['update'] / STEPS:.1f} ms of CPU time an update, "
          f"{clocks['muon'] / clocks['update']:.1%}", flush=True)  # fmt: skip


def kimi_muon_main(module, args):
    """The benchmark shape of deepseek_v3 against Hugging Face's class with AdamW; Muon's share of an update; batched Newton-Schulz."""
    from test_hf_parity import kimi_config
    from transformers import DeepseekV3ForCausalLM

    cfg = module.Config(vocab_size=4096, dim=256, n_layers=4, hidden_dim=704, n_heads=4, q_rank=128, kv_rank=64, head_dim=64, rope_dim=32,
                        n_experts=32, expert_dim=128, top_k=4, seq_len=256, batch_size=8, long_tokens=0.0, lr=1e-4, precision="fp32",
                        ep=1, dp=1, val_every=10**9)  # fmt: skip
    peer = lambda: DeepseekV3ForCausalLM(kimi_config(cfg)).train()  # noqa: E731
    if args.measure_memory:
        run = the_muon(module, cfg) if args.measure_memory == "script" else plain_loop(module, cfg, peer)
        run(), run()
        return print(peak_of_this_process())
    demo = module.Config(**module.PRESETS["demo"], vocab_size=257, precision="fp32", ep=1, dp=1, val_every=10**9)
    muon_share(module, dataclasses.replace(demo, long_tokens=0.0))
    muon_share(module, cfg)
    for shape in ((64, 64, 96), (64, 96, 64), (64, 128, 128), (64, 128, 256)):
        g, clocks = torch.randn(shape), []
        for orthogonalize in (lambda: [module.newton_schulz(x, torch.float32) for x in g], lambda: module.newton_schulz(g, torch.float32)):  # noqa: B023
            orthogonalize()
            clocks.append(statistics.median(measure(orthogonalize)[0] for _ in range(args.pairs)))
        print(f"Newton-Schulz of {shape}: {1000 * clocks[0]:.1f} ms one by one, {1000 * clocks[1]:.1f} in a batch, {clocks[0] / clocks[1]:.2f} times")
    for optimizer in ("muon", "adamw"):
        title = f"Hugging Face's, {optimizer}"
        compare(title, the_muon(module, dataclasses.replace(cfg, optimizer=optimizer)), plain_loop(module, cfg, peer), args.pairs)
    memory = {kind: peak_memory(kind, [args.script]) for kind in ("script", "hf")}
    print("peak MiB", ", ".join(f"{kind} {size:.0f}" for kind, size in memory.items()))


def the_thinker(module, cfg):
    """run(): STEPS updates of omni.py's own step, on token ids made up."""
    model = module.build_omni(cfg, module.init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "ep")))
    optimizer = module.build_optimizer(model, cfg)
    data = torch.randint(cfg.vocab_size, (100_000,))
    n = cfg.batch_size * cfg.seq_len

    def step():
        starts = torch.randint(len(data) - cfg.seq_len - 1, (cfg.batch_size,)).tolist()
        window = torch.stack([data[i : i + cfg.seq_len + 1] for i in starts])
        kinds = torch.zeros(cfg.batch_size, cfg.seq_len, dtype=torch.int64)
        batch = dict.fromkeys((f"n_{modality}" for modality in module.MODALITIES), 0) | dict(
            tokens=window[:, :-1], targets=window[:, 1:], kinds=kinds, modality=kinds[:, 0], n_text=n, n_targets=n, n_tokens=n,
            positions=torch.arange(cfg.seq_len).expand(3, cfg.batch_size, -1))  # fmt: skip
        module.omni_step(model, optimizer, [batch], 1e-4, cfg)

    return lambda: [step() for _ in range(STEPS)]


def omni_main(module, args):
    """fp32, eager, one rank, text alone: the Thinker against Hugging Face's class with its torch fallback; then Gated DeltaNet."""
    import transformers

    shape = dict(dim=256, n_heads=4, head_dim=64, rotary_dim=16, key_heads=4, value_heads=8, delta_head_dim=32, n_experts=16, top_k=4,
                 expert_dim=128, shared_dim=128, vocab_size=4096, seq_len=256, batch_size=8, dp=1, precision="fp32")  # fmt: skip
    cfg = module.Config(**module.TINY | shape)
    config = transformers.Qwen3_5MoeTextConfig(**module.omni_configs(cfg)[0]["text_config"])
    peer = lambda: transformers.Qwen3_5MoeForCausalLM(config).train()  # noqa: E731
    if args.measure_memory:
        run = the_thinker(module, cfg) if args.measure_memory == "script" else plain_loop(module, cfg, peer)
        run(), run()
        return print(peak_of_this_process())
    compare("Hugging Face's class", the_thinker(module, cfg), plain_loop(module, cfg, peer), args.pairs)
    memory = {kind: peak_memory(kind, [args.script]) for kind in ("script", "hf")}
    print("peak MiB", ", ".join(f"{kind} {size:.0f}" for kind, size in memory.items()))
    for T in (1024, 2048, 4096, 8192):
        q, k, v = (torch.randn(1, 4, T, 64, requires_grad=True) for _ in range(3))
        g, beta = -torch.rand(1, 4, T), torch.rand(1, 4, T)
        run = lambda: module.gated_delta_rule(q, k, v, g, beta)[0].sum().backward()  # noqa: E731, B023
        run()
        print(f"gated delta rule, T {T}: {1000 * statistics.median(measure(run)[0] for _ in range(args.pairs)):.1f} ms of CPU time")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("script")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--measure_memory")
    args = parser.parse_args()
    module = importlib.import_module(args.script)
    module.init_distributed(60)
    own = {"gpt3": gpt3_main, "llama3": llama3_main, "deepseek_v3": deepseek_v3_main, "bert": bert_main, "t5": t5_main, "gemma": gemma_main, "kimi_muon": kimi_muon_main,
           "omni": omni_main}
    if args.script in own:
        return own[args.script](module, args)
    cfg = module.Config(vocab_size=257, dim=256, n_layers=4, n_heads=4, hidden_dim=1024, dropout=0.0,
                        seq_len=512, batch_size=4, precision="fp32", val_every=10**9, warmup_steps=1)  # fmt: skip
    if args.measure_memory:
        kind = args.measure_memory
        run = the_script(module, cfg) if kind == "script" else plain_loop(module, cfg, kind)
        run(), run()
        return print(peak_of_this_process())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, {args.pairs} pairs of {STEPS} steps, "
          f"{cfg.n_layers} blocks of width {cfg.dim}, {cfg.batch_size} x {cfg.seq_len} tokens")  # fmt: skip
    script = the_script(module, cfg)
    for kind, title in (("bare", "bare loop, same model"), ("nano", "plain from-the-book loop"), ("hf", "Hugging Face's class")):
        compare(title, script, plain_loop(module, cfg, kind), args.pairs)
    memory = {kind: peak_memory(kind, [args.script]) for kind in ("script", "bare", "nano", "hf")}
    print("peak MiB", ", ".join(f"{kind} {size:.0f}" for kind, size in memory.items()), end="; ")
    print(f"script / bare {memory['script'] / memory['bare']:.3f}")
    pairs = [(throughput(args.script, 2, 1), throughput(args.script, 1, 2)) for _ in range(args.pairs)]
    two, one = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"demo: 2 ranks x 1 thread {two:.1f}k tok/s, 1 rank x 2 threads {one:.1f}k tok/s, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
