"""Processes that act as ranks, and what tests share. Every wait has a timeout; a hang is a failure that names the rank."""
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
import weakref

import torch
import torch.distributed as dist
from conftest import SCRIPTS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FORKSERVER = multiprocessing.get_context("forkserver")  # forks from a process that has imported the scripts already
FORKSERVER.set_forkserver_preload([*SCRIPTS, "torch._dynamo"])  # which every optimizer imports


def serve(connection):
    """A worker: runs what it is sent, answers (True, result) or (False, traceback)."""
    torch.set_num_threads(1)
    while True:
        environment, function, args = connection.recv()
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
    """run(n, function, *args) calls function(*args) in n of four processes with torchrun's environment."""

    workers, n_runs = [], 0

    def run(self, n, function, *args, timeout=90, **more):
        """The results by rank, with `more` in the environment; RuntimeError with the traceback of the first rank that failed."""
        if self.n_runs % 16 == 0:
            self.close()  # threads of Gloo outlive their groups, and wake up all the time
        self.n_runs += 1
        while len(self.workers) < 4:
            ours, theirs = multiprocessing.Pipe()
            process = FORKSERVER.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            self.workers.append((process, ours))
        port = free_port()
        for rank, (_, connection) in enumerate(self.workers[:n]):
            environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=n, MASTER_PORT=port, MASTER_ADDR="127.0.0.1",
                               TORCHELASTIC_RESTART_COUNT=0, TORCHELASTIC_USE_AGENT_STORE=False) | more  # fmt: skip
            connection.send(({k: str(v) for k, v in environment.items()}, function, args))
        deadline, results = time.monotonic() + timeout, []
        for rank, (_, connection) in enumerate(self.workers[:n]):
            good, result = connection.recv() if connection.poll(max(deadline - time.monotonic(), 0)) else (False, f"no answer within {timeout} s")
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
    """The script, whose sample is 16 tokens long, for speed."""
    module = importlib.import_module(name)
    sample = module.sample
    if "n" in inspect.signature(sample).parameters:  # it has not been shortened
        module.sample = lambda model, ids, length, *more: sample(model, ids, min(length, 16), *more)
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


def together(ranks, n, name, *flags):
    """stdout of the script on n ranks, which all end well."""
    (status, out, err), *others = ranks.run(n, run_main, name, flags, timeout=120)
    assert status == 0 and not any(other[0] for other in others), (err, *(other[2] for other in others))
    return out


def as_a_process(name, flags, out, err):
    """What a process of its own does: the script, with its output in files."""
    os.setsid()
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    with_short_sample(name).main(list(flags))


class Process(multiprocessing.context.ForkServerProcess):
    """A script in a process of its own, with the part of Popen that tests use."""

    poll = lambda self: self.exitcode  # noqa: E731

    def __init__(self, name, flags):
        self.files = [tempfile.mkstemp()[1] for _ in range(2)]
        super().__init__(target=as_a_process, args=(name, [str(flag) for flag in flags], *self.files))
        self.start()

    def wait(self, timeout=120):
        self.join(timeout)
        return self.exitcode

    def communicate(self):
        """(stdout, stderr) once it has ended."""
        self.wait()
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
    tokenizer = module.WordPiece([*module.SPECIALS, *letters, *(f"##{c}" for c in letters)])
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


class Live(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still there, by id; parameters and their gradients have none."""

    def __init__(self, model):
        super().__init__()
        self.bytes, self.peak = {id(p.untyped_storage()): 0 for p in model.parameters()}, 0
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: self.bytes.update({id(p.grad.untyped_storage()): 0}))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id(storage := tensor.untyped_storage()) not in self.bytes:
                self.bytes[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.bytes.pop, id(storage))
        self.peak = max(self.peak, sum(self.bytes.values()))
        return result


def live_activations(model, objective):
    """Bytes that are live when the backward pass of objective() begins, and at the peak of both passes."""
    with Live(model) as live:
        loss = objective()
        kept = sum(live.bytes.values())
        loss.backward()
    return kept, live.peak


def gradients(name, row, overrides):
    """(loss, gradients, norm before clipping or None) of one global batch, as the script itself computes them on this rank."""
    module = importlib.import_module(name)
    device = module.init_distributed(30)
    cfg = module.Config(**{**row.tiny, **overrides})
    corpus, _ = make_corpora(module, cfg)
    ways = dict(gpt3=split, llama3=in_pipeline, deepseek_v3=in_pipeline_with_experts, gemma=sharded, kimi_muon=in_flat_masters, omni=dealt)
    loss, found, norm = ways.get(name, in_replicas)(module, cfg, corpus, make_model(module, row, cfg), device)
    return loss, {key: g.numpy() for key, g in found.items()}, norm


IDLE = types.SimpleNamespace(param_groups=[{"scale": 1.0}], step=lambda: None, zero_grad=lambda: None)  # an optimizer that changes nothing


def global_batch(module, corpus, cfg, device, rank, ranks):
    """This rank's micro-batches of the batch that begins with sequence 3, with the counts of all ranks."""
    batches = module.read_batch(corpus, 3, cfg, device, rank, ranks)
    module.sum_counts(batches, ranks)
    return batches


def whole(g):
    """The complete tensor of one that may be sharded."""
    return g.full_tensor() if hasattr(g, "full_tensor") else g


def joined(part, group, dim=0):
    """The parts of the group's ranks in one tensor; without a group, a copy of the part."""
    if group is None:
        return part.clone()
    parts = [torch.empty(part.shape) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim)


def in_replicas(module, cfg, corpus, model, device):
    """GPT-1's and BERT's copies of the model, and Chinchilla's shards of it."""
    mesh = module.init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp",))
    replicas = module.parallelize(model, cfg, mesh)
    batches = global_batch(module, corpus, cfg, device, dist.get_rank(), dist.get_world_size())
    name = next(name for name in ("update_shards", "update_model", "training_step") if hasattr(module, name))
    means = getattr(module, name)(replicas, IDLE, batches, 0.3, cfg)
    assert IDLE.param_groups[0]["lr"] == 0.3
    loss, norm = (means["loss"], means["grad"]) if name == "update_model" else means
    return loss, {key: whole(p.grad) for key, p in model.named_parameters()}, norm


def sharded(module, cfg, corpus, model, device):
    """Gemma, which is built in shards."""
    mesh = module.init_device_mesh(device.type, (cfg.dp_replicate, cfg.dp), mesh_dim_names=("dp_replicate", "dp"))
    shards, values = module.build_sharded(cfg, mesh), model.state_dict()
    for key, p in shards.named_parameters():
        module.fill_parameter(p, values[key])
    batches = global_batch(module, corpus, cfg, device, dist.get_rank(), dist.get_world_size())
    loss, norm = module.sharded_step(shards, None, IDLE, batches, 0.0, cfg)
    return loss, {key: whole(p.grad) for key, p in shards.named_parameters()}, norm


def split(module, cfg, corpus, model, device):
    """GPT-3's matrices and layers are split, and its vocabulary is padded to the ranks."""
    cfg, values, found = module.lay_out(cfg, dist.get_world_size()), model.state_dict(), {}
    parallel = module.ModelParallel(cfg, device)
    for key, p in parallel.model.named_parameters():
        module.fill_part(key, p, values["token_embedding.weight" if key == "head.weight" else key], parallel.tp)
    batches = global_batch(module, corpus, cfg, device, parallel.data_rank, cfg.dp)
    loss, square, *_ = parallel.gradients(batches, 1.0)
    norm = math.sqrt(square)
    for key, p in parallel.model.named_parameters():
        dim = module.split_dimension(key)
        g = p.grad if dim is None else joined(p.grad, parallel.tp, dim)
        if key.startswith(("token_embedding", "head")):
            assert not g[cfg.vocab_size :].any(), "padding has no gradient"
            g = g[: cfg.vocab_size]
        found[key] = g / max(1, norm)
    return loss, found, norm


def in_pipeline(module, cfg, corpus, model, device):
    """Llama 3's stages: the complete gradients of those of this rank."""
    cfg, values = module.fit_ranks(cfg, dist.get_world_size()), model.state_dict()
    (phase,) = module.phases(cfg)
    pipeline = module.Pipeline(cfg, module.make_mesh(cfg, device.type))
    for key, p in pipeline.model.named_parameters():
        module.fill(key, p, values[key], pipeline.tp)
    pipeline.start_phase(phase.cfg)
    batches = global_batch(module, corpus, phase.cfg, device, pipeline.data_rank, cfg.dp)
    norm, loss = module.clip_gradients(pipeline.model, pipeline.run(batches), phase.cfg, pipeline.mesh)
    return loss, {key: module.whole_tensor(key, p.grad, pipeline.tp) for key, p in pipeline.model.named_parameters()}, norm


def in_pipeline_with_experts(module, cfg, corpus, model, device):
    """DeepSeek-V3's stages and experts; with them go the balancing biases after an update."""
    cfg, values = module.fit_layout(cfg, dist.get_world_size()), model.state_dict()
    (_, phase), *_ = module.plan(cfg)
    pipe = module.Pipeline1F1B(cfg, device)
    mesh = pipe.mesh["ep"]
    for key, tensor in [*pipe.model.named_parameters(), *pipe.model.named_buffers()]:
        if not key.endswith("load"):
            tensor.data.copy_(values[key].chunk(mesh.size())[mesh.get_local_rank()] if module.is_expert(key) else values[key])
    for router in module.routers(pipe.model).values():
        router.load.zero_()
    pipe.share()
    pipe.start_phase(phase)
    batches = global_batch(module, corpus, phase, device, pipe.data.get_local_rank(), module.reading_ranks(cfg))
    norm, main, ahead = pipe.reduce(pipe.run(batches), cfg.clip)
    module.update_biases(module.routers(pipe.model), 0.01, torch.zeros(cfg.n_layers + 1, cfg.n_experts))
    found = {key: value for key, value in pipe.model.named_buffers() if key.endswith("router.bias")}
    for flat in pipe.flats.values():  # of which p.grad are views
        flat.gradients[: flat.n] = flat.master.grad.full_tensor()
    for key, p in pipe.model.named_parameters():
        found[key] = joined(p.grad, mesh.get_group() if module.is_expert(key) else None)
    return main + cfg.mtp_weight * ahead, found, norm


def in_flat_masters(module, cfg, corpus, model, device):
    """Kimi's, from an update that changes nothing but the balancing biases, which go with them."""
    mesh = module.init_device_mesh(device.type, (cfg.dp, cfg.ep), mesh_dim_names=("dp", "ep"))
    values, found = model.state_dict(), {}
    with torch.device("meta"):
        model = module.Kimi(cfg)
    module.parallelize(model, cfg, mesh)
    module.init_weights(model, cfg)
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if key in values:
            tensor.data.copy_(values[key].chunk(cfg.ep)[mesh["ep"].get_local_rank()] if module.is_expert(key) else values[key])
    flats = module.shard_parameters(model, cfg, mesh)

    def collect():
        for flat in flats:
            g = whole(flat.master.grad)
            for key, (start, stop, shape) in flat.spans.items():
                found[key] = joined(g[start:stop].view(shape), mesh["ep"].get_group() if module.is_expert(key) else None)

    batches = global_batch(module, corpus, cfg, device, dist.get_rank(), dist.get_world_size())
    optimizer = types.SimpleNamespace(param_groups=[], step=collect)
    loss, *_ = module.muon_clip_step(model, flats, [optimizer], batches, 0.0, 0.01, cfg)
    found |= {key: value for key, value in model.named_buffers() if key.endswith("router.bias")}
    return loss, found, None


def dealt(module, cfg, source, model, device):
    """Omni's items, which are dealt to ranks, of the parts of the model that the stage trains."""
    mesh = module.init_device_mesh(device.type, (cfg.dp, cfg.ep), mesh_dim_names=("dp", "ep"))
    parts, values, found = module.build_omni(cfg, mesh), model.state_dict(), {}
    rank_of = re.compile(r"part\d+\.")  # in the names of experts
    for key, p in parts.named_parameters():
        value = values[rank_of.sub("", key)]
        module.fill_parameter(p, value.chunk(cfg.ep)[mesh["ep"].get_local_rank()] if rank_of.search(key) else value)
    batches, imbalance = module.read_dealt(source, 3, cfg, device, dist.get_rank(), dist.get_world_size())
    assert 1 <= imbalance < 2
    module.sum_counts(batches, dist.get_world_size())
    loss, norm, _ = module.omni_step(parts, IDLE, batches, 0.0, cfg)
    for key, p in parts.named_parameters():
        if p.requires_grad:
            found[rank_of.sub("", key)] = joined(whole(p.grad), mesh["ep"].get_group() if rank_of.search(key) else None)
    return loss, found, norm
