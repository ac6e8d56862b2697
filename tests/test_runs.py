"""The command line as people use it: torchrun, kill and resume, signals, shards, bad input. What all scripts share runs on gpt1."""
import base64
import contextlib
import dataclasses
import importlib
import io
import json
import math
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import tracemalloc
from unittest import mock

import deepseek_v3
import gpt1
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CAUSAL, SCRIPTS
from ranks import Process, free_port, run_main

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENVIRONMENT = dict(os.environ)
EVERY = pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "omni"])  # whose runs are in test_omni.py
LOOPS = pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in ("chinchilla", "omni")])  # chinchilla's is gpt1's


def small(name, **more):
    """Flags of a run of seconds."""
    flags = {"preset": "demo", "val_batches": 1, "log_every": 1, "timeout": 30, "val_every": 1000, **SCRIPTS[name].small, **more}
    return [f"--{flag}={value}" for flag, value in flags.items()]


@contextlib.contextmanager
def folder_with_text():
    """A temporary directory with a file text.txt."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "text.txt")
        path.write_text("".join(f"line {i} says {i * i}\n" + "\n" * (i % 20 == 19) for i in range(2000)))
        yield path.parent


@pytest.fixture(scope="module")
def text():
    with folder_with_text() as folder:
        yield str(folder / "text.txt")


@pytest.fixture
def main(monkeypatch):
    """main(name, *flags) -> (exit status, stdout, stderr) of a script in this process, whose signals it leaves alone."""

    def call(name, *flags):
        monkeypatch.setattr(f"{name}.catch_signals", list)
        return run_main(name, flags)

    return call


@pytest.fixture
def together(ranks):
    """together(n, name, *flags): stdout of the script on n ranks, which started long ago."""

    def call(n, name, *flags):
        (status, out, err), *others = ranks.run(n, run_main, name, flags, timeout=120)
        assert status == 0 and not any(other[0] for other in others), (err, *(other[2] for other in others))
        return out

    return call


def torchrun(script, *flags, options="--standalone --nproc_per_node=2"):
    line = [sys.executable, "-m", "torch.distributed.run", *options.split(), str(script), *flags]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)


def wait_for(arrived, process, seconds=60):
    """Until arrived() is true; fails if the process ends or the time is up first."""
    deadline = time.monotonic() + seconds
    while not arrived():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"nothing within {seconds} s"
        time.sleep(0.001)


def logged(out):
    """Lines of the log; the last of a step counts."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {(row["step"], "loss" in row): row for row in rows}


def losses(out):
    return [row["loss"] for (_, training), row in logged(out).items() if training]


def newest(out):
    """(name, {file: bytes}) of the newest checkpoint: weights, moments and state."""
    folder = sorted(out.glob("step_*[0-9]"))[-1]
    return folder.name, {path.name: path.read_bytes() for path in folder.glob("*.distcp")}


def state_of(checkpoint):
    state = {"step": 0, "sequences": 0, "tokens": 0}
    torch.distributed.checkpoint.load({"state": state}, checkpoint_id=checkpoint)
    return tuple(state.values())


# Processes


def check_demo(name, out, sample):
    """What four updates of the demo on two ranks print."""
    line = (r"^step (\d)/4 \| loss \d+\.\d{4} \| bpb (?:\d+\.\d+|n/a) \| lr \S+ \| grad \S+ \| (?:\w+ \S+ \| )*tokens \S+M"
            r"(?: \| \S+k tok/s \| eta \d+:\d\d:\d\d)?$")  # fmt: skip
    assert re.findall(line, out, re.M) == ["1", "2", "4"]
    assert "2 ranks x 1 x {} sequences of {}".format(SCRIPTS[name].batch[0] // 2, SCRIPTS[name].batch[1]) in out
    assert re.findall(r"^val (\d) \| loss \d+\.\d+ \| bpb (?:\d+\.\d+|n/a.*)$", out, re.M) == ["0", "4"]
    assert len(out.split("\nval 4 ")[1]) > sample, "a sample ends the run"


DEMO = ["--steps=4", "--log_every=2", "--val_batches=1"]


@pytest.mark.background
def test_demo_under_torchrun():
    """gpt1, on the whole corpus."""
    process = torchrun(ROOT / "gpt1.py", *DEMO)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0, out
    check_demo("gpt1", out, 250)


@LOOPS
def test_demo_on_two_ranks(together, name):
    """In the first way of its row, on a part of the corpus."""
    flags = [*DEMO, *" ".join(SCRIPTS[name].variants[:1]).split(), "--data", sysconfig.get_paths()["stdlib"] + "/asyncio"]
    check_demo(name, together(2, name, *flags), 50)


@pytest.mark.background
@LOOPS
def test_killed_and_stopped_runs_end_the_same_bit_for_bit(name):
    """SIGKILL in the middle of a save; then a signal, upon which the run saves and ends; and the rest."""
    with folder_with_text() as folder:
        whole, broken = folder / "whole", folder / "broken"
        flags = small(name, data=folder / "text.txt", dim=192, steps=40, save_every=5)  # wide, so that a save takes a while
        flags += ["--dropout=0.1"] if name in ("gpt1", "gpt3", "bert", "t5") else []  # so that its seeds count
        uninterrupted = Process(name, [*flags, "--out", whole])
        process = Process(name, [*flags, "--out", broken])
        wait_for(lambda: list(broken.glob("step_*[0-9]")) and list(broken.glob("step_*.tmp")), process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        log = broken / "metrics.jsonl"
        before = len(log.read_text())
        process = Process(name, [*flags, "--out", broken, "--resume"])
        wait_for(lambda: len(log.read_text()) > before, process)
        process.send_signal(signal.SIGINT if name == "gpt1" else signal.SIGTERM)
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        step = int(re.search(r"stopped after step (\d+)", output)[1])
        assert 5 < step < 40 and (broken / f"step_{step:09}").exists()
        assert Process(name, [*flags, "--out", broken, "--resume"]).wait() == uninterrupted.wait() == 0
        assert newest(whole) == newest(broken)
        assert logged(whole) == logged(broken), "the resumed log is that of the whole run"
        assert len(list(broken.glob("step_*"))) == 2, "two checkpoints stay, and nothing partial"


@LOOPS
def test_another_number_of_ranks_goes_on(together, name, text, tmp_path):
    """The second half of a run once more, on two ranks."""
    flags = small(name, data=text, out=tmp_path, steps=12, save_every=6)
    together(1, name, *flags)
    expected = losses(tmp_path)
    shutil.rmtree(tmp_path / "step_000000012")
    more = ["--ep=1"] if hasattr(importlib.import_module(name).Config, "ep") else []  # as in the checkpoint
    assert "step 7/12" in together(2, name, *flags, "--resume", "--micro_batch=1", *more)
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-4) and len(expected) == 12


DIES = f"""
import os, pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
import gpt1
start, inner = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), gpt1.training_step
def training_step(*args):
    if start == 1 and list(pathlib.Path(__file__).parent.glob("step_*[0-9]")):
        os.kill(os.getpid(), 9)
    if start == 2:
        raise RuntimeError("deliberate failure")
    return inner(*args)
if os.environ["RANK"] == "1":
    gpt1.training_step = training_step
    if start == 0:
        os.kill(os.getpid(), 9)
gpt1.main(sys.argv[1:])
"""


@pytest.mark.background
def test_torchrun_restarts_dead_workers_and_shows_the_error():
    """The first start loses a worker before it joins, the second one after a save, and the third fails for good."""
    with folder_with_text() as folder:
        (folder / "dies.py").write_text(DIES)
        flags = small("gpt1", data=folder / "text.txt", out=folder, steps=4000, save_every=10)
        process = torchrun(folder / "dies.py", *flags, options="--standalone --nproc_per_node=2 --max-restarts=2")
        out = process.communicate(timeout=180)[0]
    assert process.returncode == 1 and "deliberate failure" in out
    assert [out.count(line) for line in ("starting a run", "continuing from", "step 4000/")] == [1, 1, 0]


@pytest.mark.background
def test_two_agents_restart_together():
    """Two torchrun agents of one worker each: one worker is killed, both start again, and the run ends the same bit for bit."""
    with folder_with_text() as folder:
        whole, broken = folder / "whole", folder / "broken"
        flags = small("gpt1", data=folder / "text.txt", steps=300, save_every=10)
        options = f"--nnodes=2 --nproc_per_node=1 --max-restarts=2 --rdzv-backend=c10d --rdzv-endpoint=localhost:{free_port()} --rdzv-id=test"
        agents = [torchrun(ROOT / "gpt1.py", *flags, f"--out={broken}", options=options) for _ in range(2)]
        wait_for(lambda: list(broken.glob("step_*[0-9]")), agents[0])
        children = subprocess.run(["pgrep", "-P", str(agents[1].pid)], capture_output=True, text=True).stdout
        os.kill(int(children.split()[-1]), signal.SIGKILL)
        uninterrupted = torchrun(ROOT / "gpt1.py", *flags, f"--out={whole}")
        output = "".join(agent.communicate(timeout=180)[0] for agent in agents)
        assert [agent.returncode for agent in agents] == [0, 0], output
        assert len(re.findall(r"^torch \S+ \| cpu", output, re.M)) == 2 and "continuing from" in output
        assert uninterrupted.wait(timeout=180) == 0 and newest(whole) == newest(broken)


def test_locks_and_second_signals(main, text, tmp_path):
    """A directory takes one run at a time. That run, in an update of 1,024 micro-batches, ends at once at its second signal."""
    flags = small("gpt1", data=text, out=tmp_path, steps=2)
    process = Process("gpt1", [*flags, "--batch_size=1024", "--micro_batch=1", "--seq_len=4", "--n_layers=8"])
    wait_for((tmp_path / "config.json").exists, process)
    status, out, err = main("gpt1", *flags)
    assert status == 2 and "another run is writing" in err and "step 1/" not in out
    wait_for((tmp_path / "metrics.jsonl").exists, process)  # the first validation
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == -signal.SIGINT
    assert main("gpt1", *flags)[0] == 0, "a dead process gives the lock back"


def test_a_killed_write_tokens_leaves_nothing_that_looks_whole(main, tmp_path):
    (tmp_path / "text.txt").write_text("some text " * 2_000_000)
    flags = ["--data", tmp_path / "text.txt", "--write_tokens", tmp_path / "shards"]
    process = Process("gpt1", flags)
    wait_for((tmp_path / "shards.tmp").exists, process)
    process.kill()
    process.wait()
    assert not (tmp_path / "shards").exists()
    assert main("gpt1", *flags)[0] == 0
    assert [path.name[-10:] for path in (tmp_path / "shards").iterdir()] == ["_00000.npy"] and not (tmp_path / "shards.tmp").exists()
    assert main("gpt1", *flags)[0] == 2, "they are not written over"


def test_a_bad_token_ends_the_run_after_a_save(ranks, tmp_path):
    """Position 1,700 of a shard, on one of two ranks: the line names it, and the updates before are kept."""
    ids = np.resize(np.arange(97, 123, dtype=np.uint16), 8000)
    ids[1700] = 999
    np.save(tmp_path / "ids.npy", ids)
    answers = ranks.run(2, run_main, "gpt1", small("gpt1", data=tmp_path / "ids.npy", tokenizer="bytes", steps=200, out=tmp_path))
    assert [status for status, *_ in answers] == [0, 2], "the rank with the bad token fails, and torchrun with it"
    assert [err.count("ids.npy, position 1700: token id 999") for *_, err in answers] == [0, 1]
    steps = len(losses(tmp_path))
    assert (tmp_path / f"step_{steps:09}").exists() and 0 < steps < 200


# Bad input


MISTAKES = {  # flags -> what the line on stderr must say; without an arrow, the flags themselves. DIR and TEXT are what make_files makes
    "every script": [
        "--data DIR/ids.npy --write_tokens DIR/w -> token shards", "--data DIR/ids.npy -> need --tokenizer or --vocab_size", "--out TEXT/below -> TEXT",
        "--tokenizer no_such_tokenizer -> no_such_tokenizer", "--eval -> --eval needs --out or --init", "--micro_batch 3 -> micro-batches of 3", "--lr nan",
        "--data DIR/missing.txt -> missing.txt", "--resume -> --resume needs --out",
    ],
    "kimi_muon": [
        "--dry_run --world_size 3 --ep 3 -> --ep 3 does not divide 16 experts", "--long_tokens 64 --long_seq_len 48 -> --long_seq_len 48", "--vocab_size 256",
        "--batch_size 3 --micro_batch 2 -> 3 sequences of 16", "--kv_rank 0 --export DIR/hf -> need --kv_rank",
        "--tokens 9 --long_tokens 99 -> more than --tokens 9", "--long_tokens 64 --long_seq_len 8 -> less than --seq_len 16",
        "--ep 2 -> ep 2 x dp 0 are not 1 ranks", "--tau 0 -> --tau 0 is not above 0", "--tokens 0 -> not a single update", "--n_dense 4", "--top_k 17",
        "--tau nan",
    ],
    "t5": [
        "--data DIR/ids.npy --vocab_size 32256 --denoiser ul2 --sentinels 128 --sentinel 32127 -> --mode 32100 to 32102",
        "--denoiser ul2 --inputs 512 --seq_len 0 -> hides up to 127 spans in an example of 1004 tokens: --sentinels", "--inputs 3 -> --inputs 3 cannot hold",
        "--data DIR/ids.npy --vocab_size 400 --sentinel 99 -> 100 sentinels from --sentinel 99",
        "--data DIR/ids.npy --vocab_size 32128 --prompt text -> --prompt needs --tokenizer", "--vocab_size 256 -> --vocab_size 256 is less than the 361 ids",
        "--denoiser iid --inputs 2048 --seq_len 0 -> --sentinels is too small", "--dry_run --world_size 3 -> not 3 ranks", "--denoiser bert -> bert",
        "--rate 1 -> --rate 1.0", "--dropout 1.5 -> 1.5", "--span 0.5",
    ],
    "gpt1": [
        "--data DIR/latin.txt --prompt x -> latin.txt is not UTF-8", "--data DIR/empty.txt -> 0 tokens are too few", "--export DIR/hf -> hidden_dim of 4 dim",
        "--init DIR/no_weights -> FileNotFoundError", "--dry_run --world_size 3 -> 3 ranks", "--n_heads 5 -> 5 heads", "--dropout 1.5 -> 1.5", "--seed -1",
        "--batch_size 0",
    ],
    "gemma": [
        "--no-qk_norm --rope_theta 10000 --long_tokens 64 --long_seq_len 32 --export DIR/hf -> --export needs", "--init DIR/no_weights -> model_type None",
        "--teacher DIR/no_weights -> no_weights holds no Gemma2ForCausalLM or Gemma3ForCausalLM", "--data TEXT,DIR/many --write_tokens DIR/w -> one corpus",
        "--long_tokens 1000 --long_seq_len 100 -> --batch_size 0 of length 100", "--data DIR/short.txt -> short.txt: ValueError: 11 tokens are too few",
        "--window 16 -> --window 16 is not less than 16 tokens", "--attention_cap 5 --export DIR/hf -> --export needs", "--dry_run --world_size 3 -> 3 ranks",
        "--dp 2 -> dp 2 x dp_replicate 1 are not 1 ranks", "--data TEXT,TEXT,DIR/none.txt -> DIR/none.txt",
        "--no-qk_norm --export DIR/hf -> --export needs", "--n_kv_heads 3 -> 3 key-value heads, 4 heads", "--tokens 0 -> --tokens is 0", "--data TEXT, -> has an empty path",
        "--head_dim 15", "--long_tokens 64 --long_seq_len 8 -> less than --seq_len 16",
        "--export TEXT -> is a file", "--warmup 0.2",
    ],
    "gpt3": [
        "--dry_run --world_size 4 --tp 4 --n_heads 6 -> --tp 4 does not divide 6 heads", "--dry_run --world_size 2 --tp 2 --hidden_dim 81 -> --hidden_dim 81",
        "--dry_run --world_size 2 --pp 2 --micro_batch 4 -> 1 micro-batches are fewer", "--dry_run --world_size 2 --tp 2 --export DIR/new -> without --tp",
        "--data TEXT,DIR/latin.txt --write_tokens DIR/w -> one corpus, not a mix", "--tokenizer bpe:300 --write_tokens DIR/w -> --write_tokens needs --out",
        "--train_tokenizer 200 --tokenizer bpe:999 --out DIR/t -> 200 entries", "--data DIR/short.txt -> short.txt: ValueError: 10 tokens are too few",
        "--init DIR/no_weights -> no_weights holds no GPT2LMHeadModel", "--tokenizer bpe:300 --data DIR/ids.npy -> learned from text",
        "--dry_run --world_size 8 --pp 8 -> fewer than --pp 8", "--dry_run --world_size 3 -> 4 is not 3 ranks x n", "--data TEXT,DIR/none.txt -> DIR/none.txt",
        "--data 0:TEXT -> the weight of TEXT is 0", "--tokenizer bpe:999999 -> no more than", "--data half:TEXT -> is not WEIGHT:PATH", "--pp 0 -> pp 0",
        "--train_tokenizer 300 -> needs --out", "--tokenizer bpe:256 -> 256 entries", "--tp 2 -> are not 1 ranks",
        "--n_heads 5 -> 5 heads", "--banded all -> banded", "--vocab_size 256 -> no place for <|endoftext|>",
        "--dropout 1 -> --dropout 1.0", "--warmup 0.2", "--decay 0 -> --decay 0.0", "--ramp 4e9 -> are parts", "--init DIR --tokenizer bpe:300 -> learns one", "--tokens 0 -> --tokens is 0", "--compile --first_batch 2 -> --compile needs --micro_batch",
    ],
    "chinchilla": [
        "--sweep 1e3 --sizes 12x2 --head_dim 12 -> 1000 FLOPs are not one update of 12x2", "--sweep 1e9 --sizes 20x2 -> do not divide the width 20",
        "--batch_size 6 --second_batch 9 --micro_batch 2 -> --second_batch 9", "--sweep 1e9,x --sizes 12x2 -> is not FLOPS,... and",
        "--sweep=-1e9 --sizes 12x2 -> is not FLOPS,... and", "--sweep 1e9 --sizes 9m -> is not FLOPS,... and", "--sweep 1e9 --second_batch 8 -> single run",
        "--inference_tokens 1e9 -> needs --budget", "--plot DIR/p -> --plot", "--sweep 1e9 --sizes= -> is not FLOPS,... and", "--sweep 1e9 --export DIR/hf -> single run",
        "--dry_run --world_size 3 -> 3 ranks", "--fit DIR/none.csv -> none.csv", "--dim 47 -> --dim 47 is odd", "--vocab_size 256", "--cosine 0.5",
        "--budget inf",
    ],
    "llama3": [
        "--dry_run --world_size 3 --pp 3 --batch_size 7 --pp_chunks 2 --micro_batch 1 --n_layers 6 --long_tokens 0 --anneal_tokens 0 -> are not 2 equal rounds",
        "--dry_run --world_size 2 --cp 2 --seq_len 18 --long_tokens 0 --anneal_tokens 0 -> --cp 2 needs a multiple of 4", "--dim 8 -> even parts of 4",
        "--dry_run --world_size 8 --pp 8 --micro_batch 1 -> 3 layers, embedding and head are fewer than 8 pipeline stages", "--data 0:TEXT -> the weight of TEXT is 0",
        "--dry_run --world_size 2 --pp 2 --micro_batch 4 -> 1 micro-batches are fewer than --pp 2", "--dry_run --world_size 3 -> not 3 data-parallel ranks",
        "--dry_run --world_size 4 --tp 4 -> --tp 4 does not divide --n_kv_heads 2", "--dry_run --world_size 2 --tp 2 --vocab_size 257 -> --vocab_size 257",
        "--data TEXT,DIR/latin.txt --write_tokens DIR/w -> one corpus, not a mix", "--data 1:TEXT,1e-9:DIR/latin.txt -> common denominator above 1,000,000",
        "--ramp 64*24:1e5 -> --ramp: 64*24:1e5 is not LENGTHxSEQUENCES:TOKENS", "--data DIR/short.txt -> short.txt: ValueError: 11 tokens are too few",
        "--tokens 0 --long_tokens 0 --anneal_tokens 0 -> not a single update", "--dry_run --world_size 2 --tp 2 --hidden_dim 81 -> --hidden_dim 81",
        "--data 0.5:TEXT,0.5:DIR/none.txt -> DIR/none.txt", "--data TEXT;soon;TEXT -> is not MIX;TOKENS;MIX", "--vocab_size 256 --no-bos -> --vocab_size 256",
        "--anneal_data DIR/none.txt -> DIR/none.txt", "--ramp 16x4:9e3,16x4:8e3 -> out of order", "--data half:TEXT -> is not WEIGHT:PATH", "--tp 0 -> tp 0",
        "--dry_run --tokens inf -> --tokens inf", "--long_lengths long -> --long_lengths", "--data TEXT;9;TEXT;8;TEXT -> in order", "--n_heads 5 -> 5 heads",
        "--n_kv_heads 3 -> 3 key-value heads", "--tp 2 -> are not 1 ranks", "--dry_run --pp 0 -> pp 0", "--long_lengths 0",
    ],
    "bert": [
        "--tokenizer DIR/vocab.txt -> vocab.txt must begin with [PAD] and have [UNK], [CLS], [SEP], [MASK]", "--data DIR/single.txt -> one of them of 2 sentences",
        "--long_micro_batch 3 --long_share 0.5 --long_seq_len 8 -> micro-batches of 3",
        "--vocab_size 99 -> 100 entries in the tokenizer, 99 in the model, as --vocab_size", "--objective rtd --export DIR/hf -> --objective mlm",
        "--data DIR/one.txt -> 1 documents of text are too few", "--seq_len 17 -> 17 tokens exceed --context 16", "--dropout 1.5 -> 1.5",
        "--prompt none -> --prompt has no [MASK]", "--data DIR/many -> 0 documents of text are too few", "--n_heads 5 -> 5 heads",
    ],
    "deepseek_v3": [
        "--dry_run --world_size 3 --ep 3 -> --ep 3 does not divide 16 experts", "--dry_run --world_size 8 --pp 8 -> --pp 8 is more than 3 layers",
        "--top_k 9 -> --top_k 9 is more than 2 groups of 4", "--n_groups 3 -> 3 groups do not divide 16 experts", "--pp 0 -> pp 0",
        "--recompute paper --compile -> --recompute paper", "--long 32:4 -> is not LENGTHxSEQUENCES:STEPS", "--vocab_size 256",
        "--tokens 0 -> not a single update", "--dim 20 -> multiples of 8", "--pp 2 -> are not 1 ranks", "--vocab_size 258", "--first_batch 9",
    ],
}  # fmt: skip
MISTAKES["gpt1"] += [  # of text that all scripts share
    "--data DIR/none -> either text (.txt .md .py .jsonl) or token shards (.npy .bin), not 0 and 0", "--data DIR/a.json -> either text (.txt .md .py .jsonl)",
    "--data DIR/ids.npy --tokenizer bytes --vocab_size 255 -> --vocab_size 255", "--data DIR/odd.bin --tokenizer bytes -> odd.bin is not a token shard",
    "--data DIR/garbage.npy --tokenizer bytes -> garbage.npy", "--data DIR/ids.npy --tokenizer bytes -> token id 1000", "--no_such_flag -> no_such_flag",
    "--data DIR/floats.npy --tokenizer bytes -> float64", "--data DIR/no_text.jsonl -> no_text.jsonl, line 2", "--data DIR/ones.jsonl -> no token to predict",
    "--data DIR/magic.bin --tokenizer bytes -> header", "--data DIR/broken.jsonl -> broken.jsonl, line 2", "--data DIR/latin.txt -> latin.txt is not UTF-8",
    "--data DIR/empty_files -> 0 tokens are too few", "--tokenizer DIR/ranks.txt -> 256 single bytes", "--tokenizer DIR/twice.txt -> a rank twice",
    "--data DIR/both -> not 1 and 1", "--steps many -> --steps", "--preset huge -> huge",
]  # fmt: skip


def make_files(folder):
    """What the flags above name."""
    for name in ("none", "no_weights", "many", "empty_files", "both"):
        (folder / name).mkdir()
    lines = [f"line {i} says\n" for i in range(2000)]
    every = [base64.b64encode(bytes([i])).decode() for i in range(256)]
    for name, content in {
        "no_weights/config.json": json.dumps(dict(vocab_size=9, n_positions=9, n_embd=8, n_layer=1, n_head=2)), "empty.txt": "", "short.txt": "too short",
        "broken.jsonl": '{"text": "good"}\n{"text": "bad\n', "no_text.jsonl": '{"text": "good"}\n{"txt": "bad"}\n', "a.json": '{"text": "good"}\n' * 1000,
        "ones.jsonl": '{"text": "a"}\n' * 3000, "both/a.txt": "text",
        "one.txt": "".join(lines), "single.txt": "\n".join(lines),
        "vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\nline\nsays", "ranks.txt": "IQ== 0\n", "garbage.npy": "garbage",
        "twice.txt": "".join(f"{token} {min(i, 254)}\n" for i, token in enumerate(every)),
    }.items():  # fmt: skip
        (folder / name).write_text(content)
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 1000)
    for i in range(300):
        np.save(folder / "many" / f"{i}.npy", np.zeros(20, np.uint16))
        (folder / "empty_files" / f"{i}.txt").touch()
    for name, ids in (("both/b", np.zeros(5000, np.uint16)), ("ids", np.full(5000, 1000, np.uint16)), ("floats", np.zeros(5000))):
        np.save(folder / f"{name}.npy", ids)
    for name, magic, n in (("magic", 1, 16), ("odd", 20240520, 15)):
        (folder / f"{name}.bin").write_bytes(np.array([magic, 1, 8, *[0] * 253], np.int32).tobytes() + bytes(n))


@EVERY
def test_mistakes_end_in_one_line_and_status_2(main, name, text, tmp_path, monkeypatch):
    """Before training, and with the name of what is wrong."""
    make_files(tmp_path)
    mistakes = [mistake.partition(" -> ")[::2] for mistake in MISTAKES["every script"] + MISTAKES[name]]
    for flags, phrase in [*mistakes, ("--init none", "pip install safetensors"), ("--export none --hidden_dim 192", "pip install safetensors")]:
        if phrase == "pip install safetensors":
            monkeypatch.setitem(sys.modules, "safetensors", None)
        missing = {"--init", "--teacher", "--export"} & set(flags.split()) and not importlib.util.find_spec("safetensors")
        if name == "bert" and "ids.npy" in flags:  # which reads no shards of tokens
            continue
        flags, phrase = (words.replace("DIR", str(tmp_path)).replace("TEXT", text) for words in (flags, phrase or flags))
        status, out, err = main(name, *small(name, data=text), *flags.split())
        assert status == 2 and len(err.splitlines()) == 1, (flags, status, err)
        assert phrase in err or missing and "pip install safetensors" in err, (flags, err)
        assert "step 1/" not in out, "a mistake is found before training"


@EVERY
def test_checkpoints_that_do_not_fit(main, name, text, tmp_path):
    """Other data, seeds and shapes are refused; the same data at another path, and a run that has ended, are not."""
    moved, other = tmp_path / "moved.txt", tmp_path / "other.txt"
    moved.write_text(pathlib.Path(text).read_text())
    other.write_text(pathlib.Path(text).read_text() + "and more")
    flags = small(name, data=text, out=tmp_path / "out", steps=2)
    assert main(name, *flags)[0] == 0
    for more, phrase in (("", "--resume"), ("--resume --seed 1", "seed 0"), ("--resume --dim 24", "dim 48"), ("--resume --n_layers 5", "n_layers"),
                         (f"--resume --data {other}", "fingerprint")):  # fmt: skip
        status, _, err = main(name, *flags, *more.split())
        assert status == 2 and phrase in err and len(err.splitlines()) == 1, (more, err)
    assert main(name, *flags, "--resume", "--data", moved)[0] == 0


def test_saves_that_fail_and_checkpoints_that_are_damaged(main, text, tmp_path):
    flags = small("gpt1", data=text, out=tmp_path)
    assert main("gpt1", *flags, "--steps=2")[0] == 0

    def full(*args, checkpoint_id):
        checkpoint_id.mkdir()
        raise gpt1.dcp.api.CheckpointException("save", {0: (OSError("No space left on device"), None)})

    with mock.patch("gpt1.dcp.save", full):
        status, _, err = main("gpt1", *flags, "--steps=4", "--resume")
        assert status == 2 and "No space left" in err and len(err.splitlines()) == 1
    assert main("gpt1", *flags, "--steps=4", "--resume")[0] == 0, "the checkpoint before is still there"
    (shard,) = (tmp_path / "step_000000004").glob("*.distcp")
    for damage in (lambda: os.truncate(shard, shard.stat().st_size // 2), (tmp_path / "step_000000004" / ".metadata").unlink):
        damage()
        status, _, err = main("gpt1", *flags, "--resume")
        assert status == 2 and "damaged" in err and len(err.splitlines()) == 1


# Training


@EVERY
def test_steps_that_are_not_finite(main, name, text, tmp_path, monkeypatch):
    """A skipped step leaves weights and moments alone, and three in a row end the run."""
    module = importlib.import_module(name)
    bad = (3, 4, 7, 8, 9)
    inner, weights, models = module.objective, [None], []
    if name == "deepseek_v3":  # whose objective has the sums of a pipeline, and not the model
        parallelize = module.parallelize
        monkeypatch.setattr(module, "parallelize", lambda *args: models.append(parallelize(*args)) or models[0])

    def objective(model, batch, cfg):
        loss, metrics = inner(model, batch, cfg)
        if not torch.is_grad_enabled():
            return loss, metrics
        factor = float("nan") if len(weights) in bad else 1.0
        weights.append([p.detach().clone() for p in (*models, model)[0].parameters()])
        return loss * factor, {name: value * (factor if name == "main" else 1.0) for name, value in metrics.items()}

    monkeypatch.setattr(module, "objective", objective)
    status, out, err = main(name, *small(name, data=text, out=tmp_path, steps=12, save_every=2))
    assert all(torch.equal(a, b) for a, b in zip(weights[3], weights[5])), "steps 3 and 4 changed nothing"
    assert not all(torch.equal(a, b) for a, b in zip(weights[2], weights[3]))
    assert [loss is None for loss in losses(tmp_path)] == [step in bad for step in range(1, 10)]
    assert out.count("skipped") == len(bad) and newest(tmp_path)[0] == "step_000000006", "nothing is saved behind a skipped step"
    assert state_of(tmp_path / "step_000000006") == (6, 24, 4 * 64), "skipped sequences do not come again"
    assert (status, err.count("3 steps to 9"), len(err.splitlines())) == (2, 1, 1)


def test_a_signal_in_a_skipped_step_saves(text, tmp_path, monkeypatch):
    signals, inner = [], gpt1.training_step
    steps = iter([inner, inner, lambda *_: signals.append(signal.SIGTERM) or (math.nan, 0.0)])
    monkeypatch.setattr(gpt1, "catch_signals", lambda: signals)
    monkeypatch.setattr(gpt1, "training_step", lambda *args: next(steps)(*args))
    status, out, _ = run_main("gpt1", small("gpt1", data=text, out=tmp_path, steps=9))
    assert status == 0 and "stopped after step 3" in out and state_of(tmp_path / "step_000000003") == (3, 12, 2 * 64)


@pytest.mark.parametrize("name", [name for name in CAUSAL.args[1] if name != "kimi_muon"])  # whose step has tests of its own
def test_training_is_what_it_says(main, name, text, tmp_path):
    """Three updates against a plain loop in float64: data, rate, clipping, AdamW, and the val line."""
    module, row, experts = importlib.import_module(name), SCRIPTS[name], name == "deepseek_v3"
    flags = small(name, data=text, out=tmp_path, steps=3, micro_batch=2, clip=0.1, weight_decay=0.3, prompt="line 7 says")
    if experts:  # next-token loss alone, and experts that the biases do not move
        pytest.importorskip("safetensors")
        flags += ["--no-mtp", "--balance_loss=0", "--gamma=0", f"--export={tmp_path}/hf"]
    _, out, _ = main(name, *flags)
    assert "line 7 says" in out.split("val 3")[1], "the sample continues the prompt"
    run = json.loads((tmp_path / "config.json").read_text())
    cfg = module.Config(**{field.name: run[field.name] for field in dataclasses.fields(module.Config)})
    load = {"gpt3": "load_mix", "llama3": "load_mixes", "gemma": "load_languages", "deepseek_v3": "load_documents"}.get(name, "load_data")
    _, corpus, heldout = getattr(module, load)(cfg)
    if name == "llama3":
        corpus, cfg = corpus[0], module.phases(cfg)[0].cfg
    model = getattr(module, row.model)(cfg)
    module.init_weights(model, cfg)
    if not experts:  # whose grouped products are fp32 at most
        model.double()
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()}

    def nats(batch):
        logits = model(batch["tokens"], **{key: batch[key] for key in ("documents",) if key in batch})
        return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())

    rates = [row["lr"] for row in logged(tmp_path).values() if "lr" in row]  # test_shapes.py has the schedule
    b1, b2 = row.betas
    for step in range(3):
        grads = torch.autograd.grad(nats(module.get_batch(corpus, 4 * step, 4, cfg)), list(model.parameters()))
        scale = 0.1 / torch.sqrt(sum(g.square().sum() for g in grads))
        assert scale < 1, "there is something to clip"
        with torch.no_grad():
            for (p, (m, v)), g in zip(moments.items(), grads):
                m.mul_(b1).add_((1 - b1) * scale * g)
                v.mul_(b2).add_((1 - b2) * (scale * g) ** 2)
                tied = name == "gemma" and p is model.token_embedding.weight
                p *= 1 - rates[step] * 0.3 * (p.ndim > 1 and not tied)
                p -= rates[step] * (m / (1 - b1 ** (step + 1))) / ((v / (1 - b2 ** (step + 1))).sqrt() + 1e-8)
    expected = nats(module.get_batch(heldout, 0, 4, cfg)).item()
    assert float(re.search(r"val 3 \| loss ([\d.]+)", out)[1]) == pytest.approx(expected, abs=2e-4)
    prefix = row.prefix.removeprefix("/model/")
    found = {prefix + key: torch.empty(p.shape) for key, p in model.named_parameters()}
    if experts:  # whose checkpoints have pieces of flat tensors
        found = dict(module.from_hf(tmp_path / "hf")[0].named_parameters())
    else:
        torch.distributed.checkpoint.load({"model": found}, checkpoint_id=tmp_path / "step_000000003")
    for key, p in model.named_parameters():
        if ".qkv.bias" not in key:  # the keys' bias has no gradient but noise, which Adam enlarges
            torch.testing.assert_close(found[prefix + key].data.type_as(p), p.data, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in ("bert", "omni")])  # which write no shards
def test_write_tokens_then_train_on_them(main, name, text, tmp_path):
    shards = tmp_path / "shards"
    assert main(name, *small(name, data=text, write_tokens=shards))[0] == 0
    (shard,) = shards.iterdir()
    ids = np.load(shard)
    assert ids.dtype == np.uint16 and bytes(ids[ids < 256].astype(np.uint8)).decode() == pathlib.Path(text).read_text()
    specials = np.flatnonzero(ids >= 256).tolist()
    assert specials == {"t5": [], "llama3": [0, len(ids) - 1], "gemma": [0, len(ids) - 1]}.get(name, [len(ids) - 1])
    (tmp_path / "a.bin").write_bytes(np.array([20240520, 1, len(ids), *[0] * 253], np.int32).tobytes() + ids.tobytes())
    runs = [main(name, *small(name, data=path, tokenizer="bytes", steps=2)) for path in (shards, tmp_path / "a.bin")]
    first, second = (re.findall(r"loss \S+ \| bpb \d\S+", out) for _, out, _ in runs)
    assert len(first) == 4 and first == second
    ids_of = dict(sentinel=299, sentinels=20) if name == "t5" else {}
    status, out, _ = main(name, *small(name, data=shards, vocab_size=300, steps=2, **ids_of))
    assert status == 0 and out.count("bpb n/a") == 4, "the tokenizer is unknown"


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_has_every_field_with_its_meaning(main, name, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.setenv("COLUMNS", "10000")
    for preset in ("demo", list(module.PRESETS)[-1]):
        status, out, _ = main(name, "--preset", preset, "--help")
        out = re.sub(r"\s+", " ", out)
        for field in dataclasses.fields(module.Config):
            value = module.PRESETS[preset].get(field.name, field.default)
            assert re.search(rf"--{field.name}\b.* \({preset}: {re.escape(repr(value))}\)", out), field.name
        summary = " ".join(module.__doc__.split("\n\n")[0].split())
        assert status == 0 and summary in out and summary.endswith(".")


@EVERY
def test_dry_run_prints_every_preset(main, name):
    """Parameters, and bytes of weights, gradients and moments: copies of the model in some scripts, shards of it in others."""
    module, counts = importlib.import_module(name), SCRIPTS[name].counts
    shards = 4 if name in ("chinchilla", "llama3", "gemma", "t5") else 1
    for preset in ("44m", "70b") if name == "chinchilla" else counts:
        flags = {"671b": "--world_size 2048 --pp 16 --ep 64"}.get(preset, "--world_size 4")
        flags += " --tokenizer=" * (name == "gpt3")
        flags += " --vocab_size 261" * (name == "bert" and "vocab_size" not in module.PRESETS[preset])
        status, out, err = main(name, "--preset", preset, "--dry_run", *flags.split())
        assert status == 0 and f"parameters {counts[preset]:,} | activated " in out, err
        if hasattr(module.Config, "n_experts"):  # which are cut in another way
            continue
        sizes = {kind: float(size) for kind, size in re.findall(r"(\w+) +([\d.]+) GiB", out)}
        weights = 4 * counts[preset] / shards / 2**30
        assert sizes["parameters"] == sizes["gradients"] == pytest.approx(weights, rel=1e-3, abs=1e-3) and sizes["activations"] > 0
        if name == "t5":  # sums of rows and columns
            assert sizes["optimizer"] <= sizes["parameters"] / 40
        else:
            assert sizes["optimizer"] == pytest.approx(2 * weights, rel=1e-3, abs=1e-3)


# Small inputs that went wrong once


def test_directories_are_read_through_links_and_by_known_endings(tmp_path, capsys):
    """Each file once, in the order of their names; a line of .jsonl is a document; the byte order mark is none of the text."""
    folder = tmp_path / "mix"
    for name in ("disk2/deep", "mix/e.md"):
        (tmp_path / name).mkdir(parents=True)
    for name, content in (("disk2/deep/b.md", "second é"), ("mix/WEB.TXT", "\ufeffupper case"), ("mix/picture.png", "x"), ("wiki[1].txt", "[1]"),
                          ("mix/c.jsonl", '{"text": "third"}\n\n{"text": "cut \\ud83d, whole \\ud83d\\ude00", "more": 1}\n')):  # fmt: skip
        (tmp_path / name).write_text(content, "utf-8")
    for name, target in (("web", "../disk2"), ("up", ".."), ("again", "web")):
        (folder / name).symlink_to(target)
    documents = list(gpt1.read_documents(str(folder), gpt1.find_files(str(folder))[0]))
    assert documents[:2] == [("WEB.TXT", "upper case"), ("again/deep/b.md", "second é")]
    assert [text for _, text in documents[2:]] == ["third", "cut \ufffd, whole \U0001f600"]
    assert capsys.readouterr().out == f"{folder}: 3 of 4 files are read\n"
    assert gpt1.find_files(str(tmp_path / "wiki[1].txt")) == ([tmp_path / "wiki[1].txt"], [])


def test_embedded_corpus_is_the_standard_library():
    documents = dict(gpt1.read_documents("", gpt1.find_files("")[0]))
    assert len(documents) > 400 and sum(map(len, documents.values())) > 5e6 and "argparse.py" in documents
    assert not any(re.search(r"(^|/)(tests?|site-packages)/", name) for name in documents)


def test_held_out_documents_are_chosen_by_name(main, tmp_path):
    """A twentieth of them, the same ones from text and in the shards of --write_tokens."""
    names = [f"{i:03}.txt" for i in range(400)]
    held = {name for name in names if gpt1.is_held_out(name)}
    assert 5 < len(held) < 45
    (tmp_path / "text").mkdir()
    for name in names:
        (tmp_path / "text" / name).write_text(name)
    assert main("gpt1", "--data", tmp_path / "text", "--write_tokens", tmp_path / "shards")[0] == 0
    (tmp_path / "shards" / "val_00000.npy").rename(tmp_path / "shards" / "0_val.npy")  # before train_00000.npy
    tokenizer = gpt1.load_tokenizer("bytes", ["<|endoftext|>"])
    for folder in (tmp_path / "text", tmp_path / "shards"):
        files, shards = gpt1.find_files(str(folder))
        documents = gpt1.tokenize(gpt1.read_documents(str(folder), files), tokenizer, 256)
        corpora = gpt1.load_corpora(shards, documents, tokenizer, 256, 257, 1, 7)
        train, heldout = (tokenizer.decode(corpus.read(0, corpus.size)).split("<|endoftext|>")[:-1] for corpus in corpora)
        assert set(heldout) == held and set(train) == set(names) - held


def test_large_and_many_shards_open_at_once(tmp_path, request):
    """A gigabyte without being read, and 1,100 files with few descriptors."""
    tokenizer = gpt1.load_tokenizer("bytes", ["<|endoftext|>"])
    for i in range(1100):
        np.save(tmp_path / f"{i:04}.npy", np.ones(40 + i % 7, np.uint16))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits))
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 20, limits[1]))
    train, _ = gpt1.load_corpora(gpt1.find_files(str(tmp_path))[1], iter(()), tokenizer, 256, 257, 4, 16)
    assert train.read(0, train.size).sum() == train.size > 40_000
    np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.uint16, (2**29,))  # zeros, sparse
    started = time.perf_counter()
    tracemalloc.start()
    train, _ = gpt1.load_corpora([tmp_path / "large.npy"], iter(()), tokenizer, 256, 257, 64, 512)
    gpt1.get_batch(train, 10**6, 64, gpt1.Config())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.perf_counter() - started < 10 and peak < 50e6 and train.n_windows(512) > 990_000


def test_tokenizers(main, text, tmp_path):
    """Special tokens in the text are text; what the tokenizer cannot take is named, and that it is not there, in one line."""
    tokenizer = gpt1.load_tokenizer("bytes", ["<|endoftext|>"])
    assert tokenizer.encode("aé<|endoftext|>", allowed_special="all") == [97, 195, 169, 256]
    assert [ids.tolist().count(256) for _, ids in gpt1.tokenize([("a", "a <|endoftext|> b")], tokenizer, 256)] == [1]
    ranks = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the"]
    (tmp_path / "ranks").write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(ranks)) + "\n")
    tokenizer = gpt1.load_tokenizer(str(tmp_path / "ranks"), ("<|one|>", "<|two|>"))
    assert tokenizer.encode_ordinary("the the") == [257, 258] and tokenizer.n_vocab == 261 and tokenizer.encode_single_token("<|two|>") == 260
    with pytest.raises(ValueError, match="cannot take document 'spaces'"):
        list(gpt1.tokenize([("spaces", "x" + " " * 1_000_000)], tokenizer, 260))
    assert "warning: a vocabulary of 40,478 entries over bytes" in main("gpt1", *small("gpt1", data=text, steps=1, vocab_size=40478, dim=24))[1]
    with mock.patch("tiktoken.get_encoding", side_effect=ConnectionError("a long story\nin several lines")):  # as without a network
        status, _, err = main("gpt1", "--tokenizer", "gpt2")
    assert status == 2 and "gpt2" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("batch_size", [8, 2])
def test_resume_with_another_batch_size_goes_on_in_the_data(main, text, tmp_path, monkeypatch, batch_size):
    """10 of 20 updates of 4 sequences, then batches of 8 or 2: from sequence 40 to 80."""
    flags = small("gpt1", data=text, out=tmp_path, save_every=10)
    assert main("gpt1", *flags, "--steps=20")[0] == 0
    shutil.rmtree(tmp_path / "step_000000020")
    firsts, get_batch = [], gpt1.get_batch
    monkeypatch.setattr(gpt1, "get_batch", lambda corpus, first, n, cfg: firsts.append((first, corpus.in_order)) or get_batch(corpus, first, n, cfg))
    assert main("gpt1", *flags, "--resume", f"--batch_size={batch_size}")[0] == 0
    n = 40 // batch_size
    assert [first for first, in_order in firsts if not in_order][:n] == list(range(40, 80, batch_size))
    assert state_of(tmp_path / f"step_{10 + n:09}") == (10 + n, 80, 80 * 16)


def test_lengths_of_warm_ups_and_runs(main, text, tmp_path):
    """Without a warm-up the first update has the full rate, and a long one is cut; steps follow from epochs; a divergence leaves nothing."""
    flags = small("gpt1", data=text, seed="99999999999999999999")
    _, out, _ = main("gpt1", *flags, "--steps=4", "--warmup_steps=0", "--lr=1e-3", "--out", tmp_path / "a")
    assert logged(tmp_path / "a")[1, True]["lr"] == 1e-3 and "warm-up" not in out
    assert "the warm-up is cut to 2 updates" in main("gpt1", *flags, "--steps=20", "--warmup_steps=5")[1]
    _, out, _ = main("gpt1", *flags, "--steps=0", "--epochs=0.013", "--out", tmp_path / "b")
    windows = int(re.search(r"([\d,]+) windows", out)[1].replace(",", ""))
    assert f"step 1/{math.ceil(0.013 * windows / 4)} " in out and windows > 1000
    assert main("gpt1", *flags, "--lr=1e30", "--steps=3", "--out", tmp_path / "c")[0] == 2 and not list(tmp_path.glob("c/step_*"))


def test_surroundings(main, text, monkeypatch, capsys):
    """Output in another encoding, a reader that ends early, as head does, and half of torchrun's environment."""
    flags = small("gpt1", data=text, steps=2, prompt="ü€")
    monkeypatch.setattr(gpt1, "catch_signals", list)
    latin = io.TextIOWrapper(io.BytesIO(), "latin-1")
    with contextlib.redirect_stdout(latin):
        gpt1.main(flags)
    assert "ü?".encode("latin-1") in latin.buffer.getvalue()
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, contextlib.redirect_stdout(closed), pytest.raises(SystemExit) as end:
        gpt1.main(flags)
    assert end.value.code == 1 and capsys.readouterr().err == ""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    status, _, err = main("gpt1", *flags)
    assert status == 2 and "MASTER_ADDR" in err and len(err.splitlines()) == 1


def test_held_out_text_that_begins_with_separators_has_a_sample(main, tmp_path):
    for name, ids in (("train", np.resize(np.arange(97, 120), 2000)), ("val", np.append(np.full(40, 256), np.resize(np.arange(97, 120), 2000)))):
        np.save(tmp_path / f"{name}.npy", ids.astype(np.uint16))
    status, out, err = main("gpt1", *small("gpt1", data=tmp_path, tokenizer="bytes", steps=1))
    assert status == 0 and len(out.split("val 1 ")[1].partition("\n")[2]) > 16, err


def test_time_left_leaves_out_the_first_update(main, text, monkeypatch):
    for pace, left, expected in ((None, 9, "tokens 0.0M"), (0.5, 90, "eta 0:00:45"), (2.0, 5400, "eta 3:00:00")):
        assert gpt1.progress(64, left, pace, gpt1.Config(batch_size=4, seq_len=16), torch.device("cpu"))[-1] == expected
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")  # 989e12 FLOPs a second in bf16
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(gpt1.dist, "get_world_size", lambda: 2)
    for precision, expected in (("bf16", ["mfu 25.0%", "mem 3.0G"]), ("fp32", ["mem 3.0G"])):
        cfg = gpt1.Config(batch_size=4, seq_len=16, vocab_size=257, precision=precision)
        pace = 64 * gpt1.flops_per_token(cfg) / (2 * 989e12 * 0.25)
        assert gpt1.progress(64, 9, pace, cfg, torch.device("cuda"))[2:-1] == expected
    monkeypatch.undo()
    inner, seconds = gpt1.training_step, [1]
    monkeypatch.setattr(gpt1, "training_step", lambda *args: time.sleep(seconds.pop() if seconds else 0) or inner(*args))
    out = main("gpt1", *small("gpt1", data=text, steps=200))[1]
    eta = re.search(r"step 3/200 .* eta (\d+):(\d+):(\d+)", out)
    assert int(eta[3]) + 60 * int(eta[2]) < 60, "197 updates at the pace of the second"


def test_eval_reads_the_newest_checkpoint_and_writes_nothing(main, text, tmp_path):
    flags = small("gpt1", data=text, out=tmp_path, steps=4)
    trained = main("gpt1", *flags)[1].split("val 4")[1]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    out = main("gpt1", *flags, "--eval", "--steps=8")[1]
    assert "step 1/" not in out and out.split("val 4")[1] == trained
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_one_graph_is_compiled_for_all_blocks(main, text):
    """Under dropout, validation and a sample of other lengths."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert main("gpt1", *small("gpt1", data=text, steps=3, val_every=1, n_layers=3, dropout=0.1), "--compile")[0] == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


# DeepSeek-V3's layouts and phases


def v3_flags(text, **more):
    """A ramp of batches, seven updates of pre-training and seven of extension."""
    sizes = dict(batch_size=16, first_batch=8, batch_multiple=8, ramp_tokens=512, tokens=2048, long="32x8:4", rope_original=16, pack=16)
    return small("deepseek_v3", **{"data": text, "warmup_steps": 0, "save_every": 7, **sizes, **more})


def test_deepseek_v3_resumes_in_every_phase_on_other_ranks(together, ranks, text, tmp_path):
    """On one rank, on two over the border of the extension, and on one. Experts on other ranks are refused."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    out = together(1, "deepseek_v3", *v3_flags(text, out=whole))
    assert "YaRN factor 1" in out and "YaRN factor 2" in out
    flags = v3_flags(text, out=parts, ep=1)
    for n, more in ((1, ["--steps=5"]), (2, ["--steps=11", "--resume"]), (1, ["--resume"])):
        done = together(n, "deepseek_v3", *flags, *more)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4) and len(losses(parts)) == 14
    final = [float(re.search(r"val 14 \| loss (\S+)", output)[1]) for output in (out, done)]
    assert final[0] == pytest.approx(final[1], rel=1e-4) and len(done.split("val 14")[1]) > 30, "a sample ends the run"
    answers = ranks.run(2, run_main, "deepseek_v3", [*flags, "--ep=2", "--resume"])
    assert "has --pp 1 --ep 1: --resume --pp 1 --ep 1 --export DIR" in answers[0][2]


def test_deepseek_v3_resumes_with_another_batch(together, tmp_path):
    """The data goes on where it was, and the run ends at the tokens that its first start planned: 128 sequences of 16 and 32 of 32."""
    (tmp_path / "text.txt").write_text("".join(f"line {i} says {i * i}\n" for i in range(12000)))
    flags = v3_flags(tmp_path / "text.txt", out=tmp_path / "run", first_batch=0)
    together(1, "deepseek_v3", *flags)
    shutil.rmtree(tmp_path / "run" / "step_000000012")
    flags = [flag for flag in flags if not flag.startswith(("--tokens", "--long="))]
    out = together(2, "deepseek_v3", *flags, "--ep=1", "--batch_size=8", "--resume")
    assert "step 9/13 |" in out and "step 10/13 |" in out and out.index("step 9/13") < out.index("factor 2") < out.index("step 10/13")
    assert state_of(tmp_path / "run" / "step_000000013") == (13, 160, 3072)


@pytest.mark.parametrize("precision, moments", [("bf16", torch.float32), ("fp8", torch.bfloat16)])
def test_deepseek_v3_low_precision_resumes_bit_for_bit(together, text, precision, moments, tmp_path):
    """fp32 masters of bf16 weights, and under fp8 bf16 moments."""
    flags = v3_flags(text, precision=precision, recompute="paper", lr=0.003, n_layers=2)
    together(1, "deepseek_v3", *flags, "--steps=6", "--out", tmp_path / "whole")
    for steps, more in ((3, []), (6, ["--resume"])):
        together(1, "deepseek_v3", *flags, f"--steps={steps}", "--out", tmp_path / "parts", *more)
    assert newest(tmp_path / "whole") == newest(tmp_path / "parts")
    tensors = torch.distributed.checkpoint.FileSystemReader(tmp_path / "parts" / "step_000000006").read_metadata().state_dict_metadata
    kinds = {(key[:5], "exp_avg" in key): tensor.properties.dtype for key, tensor in tensors.items() if hasattr(tensor, "properties")}
    assert kinds["model", False] == torch.float32 and kinds["optim", True] == moments


def test_deepseek_v3_export_and_init_under_a_layout(together, text, tmp_path):
    """From a pipeline with experts on two ranks to a plain directory, and from there to one rank."""
    pytest.importorskip("safetensors")
    first = together(4, "deepseek_v3", *v3_flags(text, pp=2, micro_batch=1, long="", steps=3, export=tmp_path / "hf"))
    done = together(1, "deepseek_v3", *v3_flags(text, steps=1, init=tmp_path / "hf"))
    loss, again = (float(re.search(rf"val {step} \| loss (\S+)", out)[1]) for step, out in ((3, first), (0, done)))
    assert again == pytest.approx(loss, rel=2e-5)


def test_deepseek_v3_fp8_trains_where_experts_of_a_rank_get_no_token(together):
    flags = "--n_experts 2 --n_groups 2 --groups_kept 1 --top_k 1 --seq_len 4 --batch_size 2 --first_batch 2 --dim 32 --hidden_dim 32"
    flags += " --n_layers 2 --precision fp8 --ep 2 --long= --steps 4 --val_batches 1 --log_every 1 --prompt a"
    out = together(2, "deepseek_v3", *flags.split())
    assert "step 4/4 | loss 5." in out and "max_load 2.0" in out


def test_deepseek_v3_stops_before_a_phase_that_the_layout_cannot_hold(together, text, tmp_path):
    flags = small("deepseek_v3", data=text, out=tmp_path, tokens=192, long="32x1:2", n_layers=2)
    out = together(2, "deepseek_v3", *flags, "--ep=1")
    assert "this run stops after 0.0M tokens: 1 sequences of 32" in out and "step 3/3" in out
    out = together(1, "deepseek_v3", *flags, "--resume")
    assert "step 5/5" in out and "YaRN factor 2" in out


def test_deepseek_v3_documents_on_shards_have_borders_that_flags_name(tmp_path, capsys):
    np.save(tmp_path / "ids.npy", np.resize(np.arange(10, 40, dtype=np.uint16), 3000))
    for flags, borders, rearranged in (("", 0, 0), ("--eos_id=10", 1, 0), ("--eos_id=10 --fim_ids=7,8,9", 1, 1)):
        cfg, _ = deepseek_v3.parse([*small("deepseek_v3", data=tmp_path, vocab_size=40, fim=0.5), *flags.split()])
        deepseek_v3.check(deepseek_v3.fit_layout(cfg, 1), 1)
        _, corpus, _ = deepseek_v3.load_documents(cfg)
        out = capsys.readouterr().out
        assert ("no borders" not in out, "no document is rearranged" not in out) == (borders, rearranged)
        assert (deepseek_v3.get_batch(corpus, 0, 100, cfg)["tokens"] == 7).any() == rearranged


def test_deepseek_v3_papers_layout_fits(main):
    """The docstring's layout, and the extensions, which another or none here can hold."""
    command = re.search(r"deepseek_v3.py (--preset 671b.*?--ep \d+)", deepseek_v3.__doc__, re.S)[1]
    for ranks, long in ((2048, [False, False]), (1024, [False, False])):
        lines = main("deepseek_v3", *command.split(), "--dry_run", "--world_size", ranks)[1].splitlines()[2:]
        assert [line.endswith(": fits 80 GB") for line in lines] == [True, True, *long]
