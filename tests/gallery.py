"""The demo shapes of all scripts, trained with the same FLOPs: python tests/gallery.py [--flops 2e12]

Writes README.md's table and chart between the markers <!-- gallery --> and <!-- end of gallery -->, by hand,
under an hour on two cores. --compare adds two comparisons of the papers to the text below the chart:
a Gemma student with and without its teacher, and Muon against AdamW.
"""
import argparse
import importlib
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
POINTS = 8  # validations in a run
COLORS = {"blue": "#1f77b4", "orange": "#ff7f0e", "green": "#2ca02c", "red": "#d62728", "purple": "#9467bd", "brown": "#8c564b", "black": "#000000"}
# script: (name of its model, flags of one phase without another length, batch or stage)
SCRIPTS = {
    "gpt1": ("GPT1", ""),
    "bert": ("BERT", "--long_share 0"),
    "t5": ("T5", ""),
    "gpt3": ("GPT3", "--first_batch 0 --batch_size 24"),
    "chinchilla": ("Chinchilla", "--sweep="),
    "llama3": ("Llama3", "--ramp= --long_tokens 0 --anneal_tokens 0 --batch_size 24"),
    "deepseek_v3": ("DeepSeekV3", "--long= --first_batch 0"),
    "gemma": ("Gemma", "--long_tokens 0"),
    "kimi_muon": ("Kimi", "--long_tokens 0"),
    "omni": ("Omni", ""),
}


def configure(name, flags):
    """(module, its Config of the demo with these flags, the vocabulary's size filled in)."""
    module = importlib.import_module(name)
    cfg, _ = module.parse(["--preset", "demo", *flags.split()])
    cfg.vocab_size = cfg.vocab_size or {"bert": 1024, "gpt3": 1024 + 1, "t5": 384}.get(name, 264 if name == "omni" else 257)
    return module, cfg


def plan(name, flags, flops):
    """(flags of a run that takes so many FLOPs, its updates, its tokens, parameters and activated parameters)."""
    module, cfg = configure(name, flags)
    with torch.device("meta"):
        n_parameters, n_activated = module.count_parameters(getattr(module, SCRIPTS[name][0])(cfg))[:2]
    if name == "omni":  # of an item, whose tokens are patches and frames, too
        tokenizer, part, _ = module.load_sources(cfg)
        source = module.Source(cfg, tokenizer, *part, held_out=False)
        items = [source.item(i) for i in range(200)]
        steps = int(flops / (6 * cfg.batch_size * sum(module.item_cost(item, cfg) for item in items) / len(items)))
        tokens = steps * cfg.batch_size * sum(len(module.place_tokens(item, tokenizer)[0]) for item in items) / len(items)
        return f"--steps {steps}", steps, tokens, n_parameters, n_activated
    length = module.row_lengths(cfg)[0] if name == "t5" else cfg.seq_len
    tokens = flops / module.flops_per_token(cfg)
    steps = int(tokens / cfg.batch_size / length)
    length_of_run = f"--steps {steps}" if name in ("gpt1", "bert", "t5") else f"--tokens {steps * cfg.batch_size * length}"
    return length_of_run, steps, steps * cfg.batch_size * length, n_parameters, n_activated


def run(name, flags):
    """(rows of metrics.jsonl, what was printed, seconds) of a run of the demo."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / f"{name}.py"), "--preset", "demo", *flags.split(), "--out", folder]
        start = time.time()
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
        (metrics,) = pathlib.Path(folder).rglob("metrics.jsonl")  # omni.py has a directory for each stage
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return rows, done.stdout, time.time() - start


def result(name, rows):
    """What the run came to, as the table says it, and the curve of bits per byte, if it is one."""
    validations = [row for row in rows if "val_loss" in row]
    last = validations[-1]
    if name == "bert":
        return f"{last['val_mlm_acc']:.1%} of masked tokens, {last['val_nsp_acc']:.1%} of pairs", None
    if name == "t5":
        return f"{last['val_loss']:.3f} nats per hidden token", None
    curve = [row["val_bpb"] for row in validations]
    return f"{last['val_bpb']:.3f} bits per byte" + " of captions and text" * (name == "omni"), None if name == "omni" else curve


def gallery(flops):
    """Markdown of the table and of the chart."""
    lines = ["| script | parameters | activated | tokens | tokens a second | held out | lines |", "|---|---|---|---|---|---|---|"]
    curves = {}
    for name, (_, flags) in SCRIPTS.items():
        length, steps, tokens, n_parameters, n_activated = plan(name, flags, flops)
        rows, out, seconds = run(name, f"{flags} {length} --val_every {max(steps // POINTS, 1)} --log_every {max(steps // 10, 1)}")
        speeds = [float(speed) for speed in re.findall(r"([\d.]+)k tok/s", out)]
        held_out, curve = result(name, rows)
        if curve:
            curves[name] = curve
        n_lines = len((ROOT / f"{name}.py").read_text("utf-8").splitlines())
        lines.append(f"| `{name}.py` | {n_parameters:,} | {n_activated:,} | {tokens / 1e6:.2f}M | {1000 * sorted(speeds)[len(speeds) // 2]:,.0f} "
                     f"| {held_out} | {n_lines:,} |")  # fmt: skip
        print(lines[-1], f"{seconds:.0f} s", flush=True)
    order = sorted(curves, key=lambda name: -curves[name][-1])
    legend = ", ".join(f"{name} ({color})" for name, color in zip(order, COLORS))
    palette = ", ".join(COLORS.values())
    chart = [f"The chart's lines, from the top at their ends: {legend}.", "", "```mermaid",
             f'%%{{init: {{"themeVariables": {{"xyChart": {{"plotColorPalette": "{palette}"}}}}}}}}%%', "xychart-beta",
             '    title "Held-out bits per byte"', f'    x-axis "share of the FLOPs" {1 / POINTS} --> 1', '    y-axis "bits per byte" 2 --> 4.5']  # fmt: skip
    for name in order:  # without the model as initialised
        chart.append(f"    line [{', '.join(f'{value:.3f}' for value in curves[name][1 : POINTS + 1])}]")
    return "\n".join([*lines, "", *chart, "```"])


def compare():
    """Markdown of the two comparisons, in held-out bits per byte."""
    end = lambda name, flags: run(name, flags)[0][-1]["val_bpb"]  # noqa: E731
    half = "--dim 48 --hidden_dim 128"
    with tempfile.TemporaryDirectory() as folder:
        teacher = end("gemma", f"--export {folder}/teacher")
        taught = end("gemma", f"--teacher {folder}/teacher {half}")
    alone = end("gemma", half)
    text = f"Bits per byte: the demo of `gemma.py` {teacher:.2f}; half as wide {taught:.2f} with that model as its teacher, {alone:.2f} without,\non the same tokens."
    text += " `kimi_muon.py --long_tokens 0`, by optimizer and peak learning rate:"
    for optimizer, rates in (("muon", (2e-3, 4e-3, 8e-3, 1.6e-2)), ("adamw", (1e-3, 2e-3, 4e-3))):
        ends = [f"{end('kimi_muon', f'--long_tokens 0 --optimizer {optimizer} --lr {rate}'):.2f} at {rate:g}" for rate in rates]
        text += f"\n`--optimizer {optimizer}` {', '.join(ends)}" + (";" if optimizer == "muon" else ".")
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--flops", type=float, default=2e12)
    parser.add_argument("--compare", action="store_true")
    args = parser.parse_args()
    text = f"Each run uses {args.flops:.0e} training FLOPs, as counted by `flops_per_token`; {torch.get_num_threads()} threads, torch {torch.__version__}, fp32. "
    text += "Activated parameters are those that one\ntoken uses. BERT and T5 do not predict the next token, and omni.py predicts mostly captions: their figures do not compare with the others."
    text += f"\n\n{gallery(args.flops)}"
    if args.compare:
        text += f"\n\n{compare()}"
    readme = ROOT / "README.md"
    before, after = readme.read_text("utf-8").split("<!-- gallery -->")
    readme.write_text(f"{before}<!-- gallery -->\n{text}\n<!-- end of gallery -->{after.split('<!-- end of gallery -->')[1]}", "utf-8")


if __name__ == "__main__":
    main()
