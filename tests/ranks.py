"""A pool of processes that act as ranks: starting them is most of a multi-rank test's cost, so all
tests share one. Every wait has a timeout; a hang is a failure that names the rank."""
import contextlib
import importlib
import inspect
import io
import math
import multiprocessing
import os
import pathlib
import re
import socket
import tempfile
import time
import traceback
import types

import torch
import torch.distributed as dist


def serve(connection):
    """A worker: runs what it is sent, answers (True, result) or (False, traceback)."""
    torch.set_num_threads(1)
    while (job := connection.recv()) is not None:
        environment, function, args = job
        os.environ.update(environment)
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        if dist.is_initialized():
            dist.destroy_process_group()
        connection.send(answer)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Ranks:
    """run(n, function, *args) calls function(*args) in n processes with torchrun's environment."""

    def __init__(self, size):
        self.size, self.workers = size, []

    def start(self):
        context = multiprocessing.get_context("spawn")
        for _ in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            self.workers.append((process, ours))

    def run(self, n, function, *args, timeout=60, **more):
        """The results by rank, with `more` in the environment; RuntimeError with the traceback of the first rank that failed."""
        if not self.workers:
            self.start()
            timeout += 60
        port = free_port()
        for rank, (_, connection) in enumerate(self.workers[:n]):
            environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=n, MASTER_PORT=port, MASTER_ADDR="127.0.0.1",
                               TORCHELASTIC_RESTART_COUNT=0, TORCHELASTIC_USE_AGENT_STORE=False)  # fmt: skip
            environment.update(more)
            connection.send(({k: str(v) for k, v in environment.items()}, function, args))
        deadline, results = time.monotonic() + timeout, []
        for rank, (_, connection) in enumerate(self.workers[:n]):
            if not connection.poll(max(deadline - time.monotonic(), 0)):
                self.close()
                raise RuntimeError(f"rank {rank} of {n} gave no answer within {timeout} s")
            good, result = connection.recv()
            if not good:
                self.close()
                raise RuntimeError(f"rank {rank} of {n} failed:\n{result}")
            results.append(result)
        return results

    def close(self):
        """Kills the workers; the next run starts new ones."""
        for process, _ in self.workers:
            process.kill()
        self.workers = []


def with_short_sample(name):
    """The script, whose sample is 16 tokens long: the whole of it is seen under torchrun, once a script."""
    module = importlib.import_module(name)
    if not hasattr(module, "whole_sample") and "n" in inspect.signature(module.sample).parameters:
        module.whole_sample = module.sample
        module.sample = lambda model, ids, n, *more: module.whole_sample(model, ids, min(n, 16), *more)
    return module


def run_main(name, flags):
    """(exit status, stdout, stderr) of the script's main on this rank, as after a start of its own."""
    status, streams = 0, (io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8"))
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            with_short_sample(name).main([str(flag) for flag in flags])
        except SystemExit as error:
            status = error.code
    [stream.flush() for stream in streams]
    return status, *(stream.buffer.getvalue().decode() for stream in streams)


def as_a_process(name, flags, out, err):
    """What a process of its own does: the script, with its output in files."""
    os.setsid()
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    with_short_sample(name).main(list(flags))


class Process:
    """A script in a process of its own, forked from one that has imported torch already, with the part of Popen that tests use."""

    server = multiprocessing.get_context("forkserver")

    def __init__(self, name, flags):
        self.server.set_forkserver_preload(["gpt1", "gpt3", "chinchilla", "llama3", "deepseek_v3", "bert", "t5"])
        self.files = [tempfile.mkstemp()[1] for _ in range(2)]
        self.process = self.server.Process(target=as_a_process, args=(name, [str(flag) for flag in flags], *self.files))
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill
        self.send_signal = lambda signum: os.kill(self.pid, signum)

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=60):
        self.process.join(timeout)
        return self.process.exitcode

    @property
    def returncode(self):
        return self.process.exitcode

    def communicate(self, timeout=60):
        """(stdout, stderr) once it has ended."""
        self.wait(timeout)
        return tuple(pathlib.Path(path).read_text() for path in self.files)


def make_corpora(module, cfg):
    """Corpora of made-up documents, many shorter than a window, so that targets are not all counted."""
    if hasattr(module, "Source"):  # items of all kinds, made on the spot
        tokenizer = module.load_tokenizer("bytes", module.SPECIALS)
        return [module.Source(cfg, tokenizer, [f"some text, number {i}. " * 9 for i in range(7)], [], held_out) for held_out in (0, 1)]
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 40, (300,), generator=generator).tolist()
    texts = ("".join(chr(97 + (i * k) % 26) for k in range(n)) for i, n in enumerate(lengths))
    if hasattr(module, "Instances"):
        return make_instances(module, cfg, [(f"{i}", text.split("e")) for i, text in enumerate(texts)])
    tokenizer = module.load_tokenizer("bytes", getattr(module, "SPECIALS", ["<|endoftext|>"]))
    separator = tokenizer.encode_single_token(getattr(module, "END", "<|endoftext|>"))
    tokenize = getattr(module, "tokenize_pieces", None) or module.tokenize
    documents = tokenize(((f"{i}", text) for i, text in enumerate(texts)), tokenizer, separator)
    vocab_size = cfg.vocab_size or tokenizer.n_vocab
    return module.load_corpora([], documents, tokenizer, separator, vocab_size, cfg.batch_size, cfg.seq_len)


def make_instances(module, cfg, documents):
    """(training, held-out) instances of documents whose sentences are letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokenizer = module.WordPiece([*module.SPECIALS, *letters, *(f"##{c}" for c in letters)], "letters")
    with tempfile.TemporaryDirectory() as folder:
        module.write_instances(folder, module.tokenize_sentences(documents, tokenizer), tokenizer, cfg)
        return [module.Instances(folder, split, tokenizer, cfg) for split in ("train", "val")]


def make_model(module, row, cfg):
    """The model as initialised, then every gain and bias moved off its 1 or 0."""
    model = getattr(module, row.model)(cfg)
    module.init_weights(model, cfg)
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.ndim == 1):
            p += 0.1 * torch.sin(torch.arange(p.numel()) + i)
        for i, (name, b) in enumerate(model.named_buffers()):
            if name.endswith("router.bias"):
                b += 0.02 * torch.sin(torch.arange(b.numel()) + i)
    return model


def gradients(name, row, overrides):
    """Loss and gradients of one global batch, as the script itself computes them on this rank."""
    module = importlib.import_module(name)
    device = module.init_distributed(30)
    cfg = module.Config(**{**row.tiny, **overrides})
    corpus, _ = make_corpora(module, cfg)
    model = make_model(module, row, cfg)
    if hasattr(module, "Source"):
        return omni_gradients(module, cfg, corpus, model.state_dict(), device)
    if hasattr(module, "FlatParameters"):
        return expert_gradients(module, cfg, corpus, model.state_dict(), device)
    if hasattr(module, "Pipeline"):
        return pipeline_gradients(module, cfg, corpus, dict(model.named_parameters()), device)
    if hasattr(module, "ModelParallel"):
        return split_gradients(module, cfg, corpus, dict(model.named_parameters()), device)
    if hasattr(module, "ShardedParameters"):
        return flat_gradients(module, cfg, corpus, model.state_dict(), device)
    if hasattr(module, "build_sharded"):
        return sharded_gradients(module, cfg, corpus, dict(model.named_parameters()), device)
    mesh = module.init_device_mesh(device.type, (module.dist.get_world_size(),), mesh_dim_names=("dp",))
    replicas = module.parallelize(model, cfg, mesh)
    batches = global_batch(module, corpus, cfg, device, dist.get_rank(), dist.get_world_size())
    optimizer = types.SimpleNamespace(param_groups=[], step=lambda: None, zero_grad=lambda: None)
    update = getattr(module, "update_shards", None) or module.training_step
    loss, norm = update(replicas, optimizer, batches, 0.0, cfg)
    whole = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g  # noqa: E731
    return loss, {name: whole(p.grad).numpy() for name, p in model.named_parameters()}, norm


def global_batch(module, corpus, cfg, device, rank, ranks):
    """This rank's micro-batches of the batch that begins with sequence 3, with the counts of all ranks."""
    batches = module.read_batch(corpus, 3, cfg, device, rank, ranks)
    module.sum_counts(batches, ranks)
    return batches


def pipeline_gradients(module, cfg, corpus, values, device):
    """The same for a script whose model is laid out over ranks: the whole gradients of this rank's stages, and the norm
    that would be clipped; values are the parameters to start from."""
    cfg = module.fit_ranks(cfg, dist.get_world_size())
    (phase,) = module.phases(cfg)
    pipeline = module.Pipeline(cfg, module.make_mesh(cfg, device.type))
    for key, p in pipeline.model.named_parameters():
        module.fill(key, p, values[key].detach(), pipeline.tp)
    pipeline.enter(phase.cfg)
    batches = global_batch(module, corpus, phase.cfg, device, pipeline.data_rank, cfg.dp)
    norm, loss = module.clip_gradients(pipeline.model, pipeline.run(batches), phase.cfg, pipeline.mesh)
    found = {key: module.whole_tensor(key, p.grad, pipeline.tp).numpy() for key, p in pipeline.model.named_parameters()}
    return loss, found, norm


def split_gradients(module, cfg, corpus, values, device):
    """The same for a script that splits matrices and layers, and pads the vocabulary to its ranks."""
    cfg = module.lay_out(cfg, dist.get_world_size())
    parallel = module.ModelParallel(cfg, device)
    for key, p in parallel.model.named_parameters():
        value = values["token_embedding.weight" if key == "head.weight" else key].detach()
        module.fill_part(key, p, value, parallel.tp)
    batches = global_batch(module, corpus, cfg, device, parallel.data_rank, cfg.dp)
    loss, square, *_ = parallel.gradients(batches, 1.0)
    found, norm = {}, math.sqrt(square)
    for key, p in parallel.model.named_parameters():
        g, dim = p.grad, module.split_dimension(key)
        if parallel.tp and dim is not None:
            parts = [torch.empty_like(g) for _ in range(cfg.tp)]
            dist.all_gather(parts, g.contiguous(), group=parallel.tp)
            g = torch.cat(parts, dim)
        if key.startswith(("token_embedding", "head")):
            assert not g[cfg.vocab_size :].any(), "padding has no gradient"
            g = g[: cfg.vocab_size]
        found[key] = (g / max(1, norm)).numpy()
    return loss, found, norm


def sharded_gradients(module, cfg, corpus, values, device):
    """The same for a script that builds its model sharded, after a step that changes nothing."""
    sizes = cfg.dp_replicate, cfg.dp
    model = module.build_sharded(cfg, module.init_device_mesh(device.type, sizes, mesh_dim_names=("dp_replicate", "dp")))
    for key, p in model.named_parameters():
        module.fill_parameter(p, values[key].detach())
    batches = global_batch(module, corpus, cfg, device, dist.get_rank(), dist.get_world_size())
    optimizer = types.SimpleNamespace(param_groups=[], step=lambda: None, zero_grad=lambda: None)
    loss, norm = module.sharded_step(model, None, optimizer, batches, 0.0, cfg)
    whole = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g  # noqa: E731
    return loss, {key: whole(p.grad).numpy() for key, p in model.named_parameters()}, norm


def flat_gradients(module, cfg, corpus, values, device):
    """The same for a script with flat masters, from an update that changes nothing but the balancing biases."""
    mesh = module.init_device_mesh(device.type, (cfg.dp, cfg.ep), mesh_dim_names=("dp", "ep"))
    with torch.device("meta"):
        model = module.Kimi(cfg)
    module.parallelize(model, cfg, mesh)
    module.init_weights(model, cfg)
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if key in values:
            tensor.data.copy_(values[key].chunk(cfg.ep)[mesh["ep"].get_local_rank()] if module.is_expert(key) else values[key])
    flats = module.shard_parameters(model, cfg, mesh)
    found = {}

    def collect():
        for flat in flats:
            g = flat.master.grad
            g = g.full_tensor() if hasattr(g, "full_tensor") else g
            for key, (start, stop, shape) in flat.spans.items():
                parts = [g[start:stop].view(shape)]
                if module.is_expert(key) and cfg.ep > 1:
                    parts = [torch.empty(shape) for _ in range(cfg.ep)]
                    dist.all_gather(parts, g[start:stop].view(shape).contiguous(), group=model.ep)
                found[key] = torch.cat(parts).numpy()

    batches = global_batch(module, corpus, cfg, device, dist.get_rank(), dist.get_world_size())
    optimizer = types.SimpleNamespace(param_groups=[], step=collect)
    loss, _, *_ = module.muon_clip_step(model, flats, [optimizer], batches, 0.0, 0.01, cfg)
    found |= {key: value.numpy() for key, value in model.named_buffers() if key.endswith("router.bias")}
    return loss, found, None


def expert_gradients(module, cfg, corpus, values, device):
    """The same for a script whose experts are laid out over ranks; with them go the balancing biases after an update."""
    cfg = module.fit_layout(cfg, dist.get_world_size())
    (_, phase), *_ = module.plan(cfg)
    pipe = module.Pipeline1F1B(cfg, module.expert_mesh(cfg, device.type))
    rank, ranks = pipe.mesh["ep"].get_local_rank(), pipe.mesh["ep"].size()
    for key, tensor in [*pipe.model.named_parameters(), *pipe.model.named_buffers()]:
        if not key.endswith("load"):
            value = values[key]
            tensor.data.copy_(value.chunk(ranks)[rank] if module.is_expert(key) else value)
    for router in pipe.routers.values():
        router.load.zero_()
    pipe.share()
    pipe.enter(phase)
    batches = global_batch(module, corpus, phase, device, pipe.data.get_local_rank(), module.reading_ranks(cfg))
    norm, main, ahead = pipe.reduce(pipe.run(batches), cfg.clip)
    module.update_biases(list(pipe.routers.values()), 0.01, pipe.data.get_group())
    found = {key: value.numpy() for key, value in pipe.model.named_buffers() if key.endswith("router.bias")}
    for flat in pipe.flats.values():  # of which p.grad are views
        flat.gradients[: flat.n] = flat.master.grad.full_tensor()
    for key, p in pipe.model.named_parameters():
        parts = [p.grad]
        if module.is_expert(key) and ranks > 1:
            parts = [torch.empty_like(p.grad) for _ in range(ranks)]
            dist.all_gather(parts, p.grad, group=pipe.mesh["ep"].get_group())
        found[key] = torch.cat(parts).numpy()
    return main + cfg.mtp_weight * ahead, found, norm


def omni_gradients(module, cfg, source, values, device):
    """The same for a script that deals items to ranks and trains some of the parts of its model."""
    mesh = module.init_device_mesh(device.type, (cfg.dp, cfg.ep), mesh_dim_names=("dp", "ep"))
    model = module.build_omni(cfg, mesh)
    part = re.compile(r"part\d+\.")
    for key, p in model.named_parameters():
        value = values[part.sub("", key)]
        if part.search(key):
            value = value.chunk(cfg.ep)[mesh["ep"].get_local_rank()]
        module.fill_parameter(p, value)
    batches, imbalance = module.read_dealt(source, 3, cfg, device, dist.get_rank(), dist.get_world_size())
    assert 1 <= imbalance < 2
    module.sum_counts(batches, dist.get_world_size())
    optimizer = types.SimpleNamespace(param_groups=[], step=lambda: None, zero_grad=lambda: None)
    loss, norm, _ = module.omni_step(model, optimizer, batches, 0.0, cfg)
    found = {}
    for key, p in model.named_parameters():
        if p.requires_grad:
            g = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            if part.search(key):
                parts = [torch.empty_like(g) for _ in range(cfg.ep)]
                dist.all_gather(parts, g, group=mesh["ep"].get_group())
                g = torch.cat(parts)
            found[part.sub("", key)] = g.numpy()
    return loss, found, norm
