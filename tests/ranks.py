"""A pool of processes that act as ranks: starting them is most of a multi-rank test's cost, so all
tests share one. Every wait has a timeout; a hang is a failure that names the rank."""
import importlib
import multiprocessing
import os
import socket
import time
import traceback

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


def make_corpora(module, cfg):
    """Corpora of made-up documents, many shorter than a window, so that targets are not all counted."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 40, (300,), generator=generator).tolist()
    texts = ("".join(chr(97 + (i * k) % 26) for k in range(n)) for i, n in enumerate(lengths))
    tokenizer = module.load_tokenizer("bytes", module.SPECIALS)
    documents = module.tokenize(((f"{i}", text) for i, text in enumerate(texts)), tokenizer)
    return module.load_corpora("", documents, tokenizer, cfg.vocab_size, cfg.batch_size, cfg.seq_len)


def make_model(module, row, cfg):
    """The model as initialised, then every gain and bias moved off its 1 or 0."""
    model = getattr(module, row.model)(cfg)
    module.init_weights(model, cfg)
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.ndim == 1):
            p += 0.1 * torch.sin(torch.arange(p.numel()) + i)
    return model


def gradients(name, row, overrides):
    """Loss and gradients of one global batch, as the script itself computes them on this rank."""
    module = importlib.import_module(name)
    device = module.launch(30)
    cfg = module.Config(**{**row.tiny, **overrides})
    corpus, _ = make_corpora(module, cfg)
    model = make_model(module, row, cfg)
    if hasattr(module, "Pipeline"):
        return pipeline_gradients(module, cfg, corpus, dict(model.named_parameters()), device)
    mesh = module.init_device_mesh(device.type, (module.dist.get_world_size(),), mesh_dim_names=("dp",))
    replicas = module.parallelize(model, cfg, mesh)
    batches = module.next_batches(corpus, 3, False, cfg, device, dist.get_rank(), dist.get_world_size())
    loss = module.accumulate_gradients(replicas, batches, cfg)
    (loss,) = module.sum_over_ranks(loss, device=device)
    return loss, {name: p.grad.numpy() for name, p in model.named_parameters()}, None


def pipeline_gradients(module, cfg, corpus, values, device):
    """The same for a script whose model is laid out over ranks: the whole gradients of this rank's stages, and the norm
    that would be clipped; values are the parameters to start from."""
    cfg = module.fit_ranks(cfg, dist.get_world_size())
    (phase,) = module.phases(cfg)
    pipeline = module.Pipeline(cfg, module.make_mesh(cfg, device.type))
    for key, p in pipeline.model.named_parameters():
        value = values["token_embedding.weight" if key == "head.weight" and cfg.tied else key]
        module.fill(key, p, value.detach(), pipeline.tp)
    pipeline.enter(phase.cfg)
    batches = module.next_batches(corpus, 3, False, phase.cfg, device, pipeline.data_rank, module.data_ranks(cfg))
    norm, loss = module.clip_gradients(pipeline.model, pipeline.run(batches), phase.cfg, pipeline.mesh, device)
    found = {key: module.whole_tensor(key, p.grad, pipeline.tp).numpy() for key, p in pipeline.model.named_parameters()}
    return loss, found, norm
