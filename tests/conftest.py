"""One row a script: what the tests must know of it. A new script is a new row, not a new test."""
import dataclasses
import importlib
import multiprocessing
import os
import pathlib
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the numbers below are a CPU's
os.environ.setdefault("OMP_NUM_THREADS", "1")

from chinchilla import TABLE_A9  # noqa: E402


@dataclasses.dataclass
class Row:
    model: str  # name of the model class
    tiny: dict  # a Config whose sizes are pairwise different, for shapes and gradients
    counts: dict  # preset: exact parameters, from the paper or its specification
    schedule: tuple  # (overrides of Config, {step: learning rate})
    layouts: tuple  # (ranks, overrides of Config): all must give one rank's gradients
    falls: float  # nats that 30 steps of the demo's shape take off the loss, at least
    batch: tuple  # (sequences, tokens of each) of the demo's first update
    variants: tuple  # flags of the ways to train
    small: dict  # flags of a run of seconds: updates of 4 sequences of 16 tokens
    warm: str = "--warmup_steps 10"  # flags for ten updates of warm-up of the demo
    plain: dict = dataclasses.field(default_factory=dict)  # a Config whose objective is next-token loss alone
    masked_flops: float = 0  # per token of the tiny Config, of scores that the mask hides, which PyTorch's counter sees


FEW = "--dim 32 --hidden_dim 48 --expert_dim 16 --n_heads 2 --q_rank 16 --n_layers 2 --n_experts 4 --top_k 2"  # for bf16, slow on a CPU

SCRIPTS = {
    "gpt1": Row(
        model="GPT1",
        tiny=dict(vocab_size=257, dim=24, n_layers=2, n_heads=3, hidden_dim=80, dropout=0.0,
                  seq_len=7, batch_size=8, precision="fp32", lr=1e-3, steps=5, warmup_steps=1),
        counts={"gpt1": 116_534_784, "small": 85_645_056, "demo": 260_640},
        schedule=(dict(lr=1.0, steps=100_000, warmup_steps=2000),  # a little less at 2001: the cosine began at 0
                  {0: 0.0, 1: 0.0005, 1000: 0.5, 2000: 1.0, 2001: 0.999012, 50_000: 0.5, 99_999: 2.5e-10}),
        layouts=((1, dict(micro_batch=8)), (1, dict(micro_batch=2)), (1, dict(micro_batch=1)),
                 (2, dict(micro_batch=4)), (2, dict(micro_batch=1)), (4, dict(micro_batch=2)),
                 (4, dict(micro_batch=1)), (2, dict(recompute="block"))),
        falls=1.0, batch=(24, 128),
        variants=("", "--precision bf16 --recompute block --dim 36 --hidden_dim 64"),
        small=dict(batch_size=4, dim=48, hidden_dim=64, seq_len=16, warmup_steps=2),
        masked_flops=12 * 2 * 24 * (7 - 4),
    ),
    "gpt3": Row(
        model="GPT3",
        tiny=dict(vocab_size=257, seq_len=7, dim=24, n_layers=4, n_heads=4, hidden_dim=80, band=3, batch_size=8, first_batch=0,
                  precision="fp32", lr=1e-3, tokens=280.0, warmup=0.1),
        counts={"gpt2": 124_439_808, "gpt2_medium": 354_823_168, "gpt2_large": 774_030_080, "gpt2_xl": 1_557_611_200,
                "125m": 125_226_240, "350m": 355_871_744, "760m": 760_300_032, "1.3b": 1_315_723_264, "2.7b": 2_651_553_280,
                "6.7b": 6_658_404_352, "13b": 12_853_386_240, "175b": 174_604_259_328, "small": 86_039_808, "demo": 446_080},
        schedule=(dict(lr=0.6e-4), {0: 0.0, 187.5e6: 3e-5, 375e6: 6e-5, 10e9: 5.981708e-5, 130e9: 3.306126e-5,
                                    200e9: 1.280897e-5, 260e9: 6e-6, 300e9: 6e-6}),  # the specification's for 175B, in tokens
        layouts=((1, dict(micro_batch=2)), (2, dict(tp=2)), (2, dict(pp=2)), (2, dict(dp=2)), (4, dict(tp=2, pp=2)),
                 (4, dict(tp=2, dp=2, micro_batch=1)), (4, dict(pp=2, dp=2)), (4, dict(tp=4)), (4, dict(pp=4, micro_batch=1)),
                 (1, dict(micro_batch=2, noise_scale=True)), (2, dict(dp=2, micro_batch=1, noise_scale=True)),
                 (2, dict(dp=2, recompute="block")), (2, dict(pp=2, recompute="block", banded="even"))),
        falls=1.5, batch=(24, 128),
        variants=("--tokenizer bytes", "--tokenizer bytes --precision bf16 --recompute block --dim 32 --hidden_dim 64 --n_layers 2",
                  "--tokenizer bytes --precision fp16 --dim 16 --hidden_dim 32 --n_layers 2"),  # fp16 is slow on a CPU
        small=dict(tokenizer="", batch_size=4, first_batch=0, batch_multiple=1, dim=48, hidden_dim=64, seq_len=16,
                   warmup=0.1, lr=1e-3),
        warm="--warmup 0.1 --batch_size 24",
        masked_flops=12 * 24 * (2 * (7 - 4) + 2 * (9 + 36 - 18) / 7),  # two dense layers; two of bands: 3 x 3, twice 18 of 3 x 6
    ),
    "chinchilla": Row(
        model="Chinchilla",
        tiny=dict(vocab_size=257, dim=24, n_layers=2, n_heads=3, head_dim=10, hidden_dim=80, seq_len=7, batch_size=8,
                  precision="fp32", lr=1e-3, steps=5, tokens=280.0, warmup_steps=1),
        # the specification's formula; test_chinchilla.py compares it with the millions that Table A9 prints
        counts={**{f"{N}m": 32000 * D + L * (5 * D * H * E + 8 * D * D + 2 * H * E + 7 * D) + D for N, D, E, H, L in TABLE_A9},
                "70b": 70_061_268_992, "280b": 279_708_975_104, "demo": 73_152, "small": 5_191_680},
        schedule=(dict(lr=1.0, batch_size=1, seq_len=1, tokens=1e5, warmup_steps=2000),
                  {0: 1e-7, 1000: 0.5, 2000: 1.0, 2001: 0.999111, 25_000: 0.868198, 50_000: 0.55, 99_999: 0.1}),  # 0.1 + 0.45 (1 + cos)
        layouts=((1, dict(micro_batch=2)), (2, dict(micro_batch=2)), (4, dict(recompute="block"))),  # the update is gpt1's
        falls=1.0, batch=(24, 32),
        variants=("", "--precision bf16 --recompute block"),
        small=dict(sweep="", batch_size=4, dim=48, hidden_dim=64, seq_len=16, warmup_steps=2, lr=1e-3),
        masked_flops=18 * 2 * 30 * (7 - 4) + 4 * 2 * 24 * 30 / 2,  # three products of T x T, and once that of distances
    ),
    "llama3": Row(
        model="Llama3",
        tiny=dict(vocab_size=264, dim=48, n_layers=3, n_heads=6, n_kv_heads=2, hidden_dim=80, seq_len=12,
                  batch_size=8, rope_theta=100.0, precision="fp32", lr=1e-3, steps=5, warmup_steps=1,
                  tokens=480.0),
        counts={"1b": 1_235_814_400, "3b": 3_212_749_824, "8b": 8_030_261_248, "70b": 70_553_706_496,
                "405b": 405_853_388_800, "qwen2_5_0.5b": 494_032_768, "qwen2_5_1.5b": 1_543_714_304,
                "qwen2_5_3b": 3_085_938_688, "qwen2_5_7b": 7_615_616_512, "qwen2_5_14b": 14_770_033_664,
                "qwen2_5_32b": 32_763_876_352, "qwen2_5_72b": 72_706_203_648,
                "small": 83_000_064, "demo": 355_488},
        schedule=(dict(lr=8e-5, min_lr=8e-7, tokens=1.2e6 * 2**24, anneal_tokens=2384.0 * 2**24, cosine_steps=1_200_000),
                  {0: 0.0, 4000: 4e-5, 8000: 8e-5, 604_000: 4.04e-5, 1_200_000: 8e-7, 1_201_192: 4e-7,
                   1_202_384: 0.0}),  # the specification's for 405B, annealed in 2,384 updates of 16,777,216 tokens
        layouts=((1, dict(micro_batch=2)), (2, dict(dp=2, micro_batch=2)), (2, dict(tp=2)), (2, dict(tp=2, tied=True)),
                 (2, dict(tp=2, qkv_bias=True)), (2, dict(cp=2)), (2, dict(cp=2, document_mask=False)), (2, dict(pp=2)),
                 (2, dict(pp=2, pp_chunks=2)), (2, dict(dp=2, recompute="block", micro_batch=1)),
                 (4, dict(tp=2, pp=2)), (4, dict(cp=2, dp=2, micro_batch=2)), (4, dict(tp=2, cp=2, tied=True)),
                 (4, dict(pp=2, dp=2, pp_chunks=2, recompute="block"))),
        falls=1.5, batch=(24, 32),
        variants=("", "--precision bf16 --recompute block --dim 32 --hidden_dim 64", "--no-document_mask --tied --qkv_bias"),
        small=dict(batch_size=4, dim=48, hidden_dim=64, seq_len=16, ramp="", long_lengths="32",
                   warmup_steps=2, lr=1e-3),
        masked_flops=12 * 3 * 48 * (12 - 6.5),
    ),
    "deepseek_v3": Row(
        model="DeepSeekV3",
        tiny=dict(vocab_size=260, dim=24, n_layers=4, n_dense=1, hidden_dim=40, n_heads=3, q_rank=20, kv_rank=28,
                  head_dim=10, rope_dim=6, init_std=0.1, n_experts=12, n_shared=2, expert_dim=16, top_k=3, n_groups=4,
                  groups_kept=2, balance_loss=0.01, rope_theta=100.0, seq_len=11, batch_size=8, precision="fp32", lr=1e-3,
                  warmup_steps=1, tokens=440.0, pack=16, fim_ids="257,258,259"),
        counts={"671b": 671_026_404_352, "16b": 15_706_484_224, "small": 242_819_328, "demo": 831_120},
        schedule=(dict(lr=2.2e-4, batch_size=3072, long="32768x1920:1000"),  # 12,582,912 tokens an update; the cosine, then two tails
                  {0: 0.0, 1000 * 12582912: 1.1e-4, 2000 * 12582912: 2.2e-4, 9.999e12: 2.2e-4, 11.075e12: 1.91004e-4, 12.15e12: 1.21e-4,
                   13.225e12: 5.09964e-5, 14.3e12: 2.2e-5, 14.632e12: 2.2e-5, 14.634e12: 7.3e-6, 14.85e12: 7.3e-6}),
        layouts=((1, dict(micro_batch=2)), (2, dict(ep=2)), (4, dict(ep=4)), (2, dict(dp=2)), (4, dict(dp=4)),
                 (2, dict(pp=2, micro_batch=2)), (4, dict(pp=2, ep=2, micro_batch=1)), (4, dict(pp=2, dp=2, micro_batch=1)),
                 (4, dict(dp=2, ep=2, micro_batch=1)), (2, dict(pp=2, mtp=False, q_rank=0, micro_batch=1)), (2, dict(ep=2, recompute="paper")),
                 (4, dict(pp=2, ep=2, recompute="block", micro_batch=2))),
        falls=1.5, batch=(24, 64),
        variants=("", *(f"--precision {how} {FEW} --n_groups 2 --groups_kept 1" for how in ("bf16 --recompute block", "fp8 --recompute paper"))),
        small=dict(batch_size=4, first_batch=4, dim=48, hidden_dim=64, seq_len=16, long="", warmup_steps=2, lr=1e-3),
        plain=dict(mtp=False, balance_loss=0.0, init_std=0.02),
        masked_flops=6 * 4 * 3 * (32 * 11 - 26 * 6),  # values are padded to the width of queries and keys
    ),
    "bert": Row(
        model="build_model",  # BERT or ELECTRA
        tiny=dict(vocab_size=261, context=28, dim=24, n_layers=2, n_heads=3, hidden_dim=80, dropout=0.0, seq_len=20, long_share=0.0,
                  max_predictions=5, batch_size=8, precision="fp32", lr=1e-3, steps=5, warmup_steps=1),
        counts={"base": 110_106_428, "large": 336_226_108, "base_cased": 108_932_934, "large_cased": 334_661_958, "l3_h768_a12": 46_315_580,
                "l6_h768_a3": 67_579_196, "l6_h768_a12": 67_579_196, "l12_h1024_a16": 185_071_420, "small": 19_839_751, "demo": 133_959,
                "electra_small": 14_196_219},
        # the specification's: the rate drops where warm-up ends, just below the peak
        schedule=(dict(), {0: 0.0, 1: 1e-8, 5000: 5e-5, 9999: 9.999e-5, 10_000: 9.9e-5, 500_000: 5e-5, 1_000_000: 0.0}),
        layouts=tuple((n, way | more) for way in (dict(), dict(nsp=False), dict(objective="rtd", nsp=False)) for n, more in (
            (1, dict(micro_batch=1, clip=0.0)), (2, dict(recompute="block")), (4, dict(micro_batch=2)), (4, dict(micro_batch=1, clip=0.1)))),
        falls=1.0, batch=(24, 64),
        variants=("--long_share 0", "--long_share 0 --objective rtd --no-nsp", "--long_share 0 --precision bf16 --recompute block"),
        small=dict(batch_size=4, dim=48, hidden_dim=64, context=16, seq_len=16, long_share=0, max_predictions=3, tokenizer="wordpiece:100",
                   sentences="lines", warmup_steps=2),
    ),
    "t5": Row(
        model="T5",
        tiny=dict(vocab_size=384, dim=24, n_layers=2, n_heads=4, head_dim=10, hidden_dim=40, dropout=0.0, inputs=23, seq_len=24, batch_size=8,
                  pad=257, eos=256, mode=258, sentinel=360, sentinels=19, precision="fp32", lr=0.3, steps=5, clip=1.0,
                  z_loss=0.0),
        counts={"t5_small": 60_506_624, "t5_base": 222_903_552, "baseline": 222_903_552, "t5_large": 737_668_096, "t5_3b": 2_851_598_336,
                "t5_11b": 11_307_321_344, "2x": 502_746_112, "4x": 972_590_080, "v1_1_small": 76_961_152, "v1_1_base": 247_577_856,
                "v1_1_large": 783_150_080, "v1_1_xl": 2_849_757_184, "v1_1_xxl": 11_135_332_352, "small": 198_819_072, "demo": 222_208},
        # the paper's: 0.01 for ten thousand updates, then the inverse square root; in the last tenth GLU Variants' fall to 0
        schedule=(dict(steps=10**6, ramp_down=0.1), {0: 0.01, 9_999: 0.01, 39_999: 0.005, 899_999: 0.001054093, 950_000: 0.000512989}),
        layouts=((1, dict(micro_batch=2)), (2, dict(micro_batch=1, recompute="block")), (4, dict(denoiser="iid")),
                 (4, dict(denoiser="ul2", gated=True, tied=False, micro_batch=1))),
        falls=1.5, batch=(48, 52), variants=(),
        small=dict(batch_size=4, dim=48, hidden_dim=64, seq_len=16, lr=0.01), warm="",
    ),
    "gemma": Row(
        model="Gemma",
        tiny=dict(vocab_size=258, dim=24, n_layers=4, n_heads=6, n_kv_heads=3, head_dim=10, query_scalar=7, hidden_dim=40, window=3,
                  local_layers=2, rope_theta=100.0, rope_factor=1.5, seq_len=7, batch_size=8, precision="fp32", lr=1e-3, tokens=280.0, dp=1),
        counts={"2b": 2_614_636_800, "9b": 9_242_164_736, "27b": 27_227_718_144, "3_270m": 268_098_176, "3_1b": 999_885_952,
                "3_4b": 3_880_099_328, "3_12b": 11_765_788_416, "3_27b": 27_009_002_240, "small": 67_049_344, "demo": 469_024},
        schedule=(dict(lr=1.0, tokens=9e8, long_tokens=1e8), {0: 0.0, 5e6: 0.5, 1e7: 1.0, 2.575e8: 0.868198, 5.05e8: 0.55, 1e9: 0.1}),
        layouts=((1, dict(micro_batch=2)), (2, dict(dp=2)), (4, dict(dp=4, micro_batch=1)), (4, dict(dp=2, dp_replicate=2)),
                 (2, dict(dp=1, dp_replicate=2)), (2, dict(dp=2, recompute="block", micro_batch=1)),
                 (2, dict(dp=2, qk_norm=False, attention_cap=0.4, logit_cap=0.3))),
        falls=1.5, batch=(24, 128),
        variants=("", "--no-qk_norm --attention_cap 50 --logit_cap 30 --precision bf16 --recompute block --dim 32 --hidden_dim 64 --head_dim 16 "
                      "--n_heads 2 --n_kv_heads 1 --n_layers 2 --local_layers 1"),
        small=dict(batch_size=4, dim=48, n_layers=3, head_dim=16, hidden_dim=64, window=8, seq_len=16, long_tokens=0, lr=1e-3),
        warm="--warmup 0.1 --long_tokens 0",
        masked_flops=12 * 60 * (3 * (9 + 2 * 18 - 18) / 7 + 7 - 4),  # three windows of 3, whose last two see two each; one global layer
    ),
    "kimi_muon": Row(
        model="Kimi",
        tiny=dict(vocab_size=257, dim=24, n_layers=4, hidden_dim=40, n_heads=3, q_rank=20, kv_rank=28, head_dim=10, rope_dim=6, n_experts=12,
                  n_shared=2, expert_dim=16, top_k=3, rope_theta=100.0, seq_len=11, batch_size=8, precision="fp32", lr=1e-3, tokens=440.0,
                  long_tokens=0.0, ep=1, dp=1),
        counts={"moonlight_16b_a3b": 15_960_108_544, "kimi_k2": 1_026_408_209_408, "kimi_k25": 1_026_408_209_408, "399m": 837_342_720,
                "545m": 1_117_514_496, "822m": 1_463_355_392, "1.1b": 1_882_766_592, "1.5b": 2_385_615_360, "small": 242_814_720,
                "demo": 830_544},  # the specification's; dense: 2 V D + D + L (4 D D + 3 D F + 2 D)
        schedule=(dict(lr=4.2e-4, tokens=5.7e12, schedule="moonlight"),  # Moonlight's, in tokens
                  {0: 0.0, 16.5e9: 2.1e-4, 33e9: 4.2e-4, 1.2e12: 3.743860e-4, 2.6165e12: 2.31e-4, 5.2e12: 4.2e-5, 5.2e12 + 50 * 2**25: 7.1e-5,
                   5.2e12 + 100 * 2**25: 1e-4, 5.45e12: 5.033781e-5, 5.7e12: 0.0}),
        layouts=((1, dict(micro_batch=2)), (2, dict(ep=2)), (2, dict(dp=2)), (4, dict(ep=4)), (4, dict(ep=2, dp=2, micro_batch=1)),
                 (2, dict(ep=2, recompute="block")), (2, dict(dp=2, q_rank=0)), (2, dict(dp=2, kv_rank=0, n_dense=4))),
        falls=1.5, batch=(48, 64),
        variants=("", f"--precision bf16 --recompute block {FEW}", "--optimizer adamw --q_rank 0 --n_layers 2 --n_experts 4 --top_k 2"),
        small=dict(batch_size=4, dim=48, hidden_dim=64, seq_len=16, long_tokens=0, lr=1e-3), warm="--long_tokens 0",
        masked_flops=6 * 4 * 3 * (32 * 11 - 26 * 6) + 2 * 4 * 3 * 16 * 11,  # as DeepSeek-V3's, and the largest logits
    ),
    "omni": Row(
        model="Omni",
        tiny=dict(vocab_size=264, dim=24, n_layers=4, n_heads=6, n_kv_heads=3, head_dim=10, rotary_dim=8, rope_theta=100.0, key_heads=2,
                  value_heads=6, delta_head_dim=7, n_experts=8, top_k=3, expert_dim=12, shared_dim=20, balance_loss=0.01, audio_dim=28,
                  audio_layers=2, audio_heads=2, audio_hidden=36, audio_channels=6, audio_chunk=32, audio_window=96, decoder_layers=1,
                  vision_dim=32, vision_layers=2, vision_heads=4, vision_hidden=44, patch=4, position_side=5, min_pixels=1, talker_layers=4,
                  talker_dim=20, mtp_layers=1, n_codebooks=4, codebook_size=9, image_size=16, n_frames=4, seq_len=23, batch_size=8,
                  mix="text:1,audio:1,image:1,video:1,av:1", precision="fp32", lr=1e-3, steps=5, warmup=0.0, dp=1),
        counts={"35b_a3b": 35_107_181_936 + 645_086_048, "397b_a17b": 396_802_360_816 + 647_709_536,
                "small": 15_678_240 + 2_690_368 + 2_076_032, "demo": 1_825_864, "demo_walk": 3_245_952},  # backbone, vision, AuT
        schedule=(dict(lr=1.0, steps=1000), {0: 0.0, 15: 0.5, 30: 1.0, 515: 0.5, 1000: 0.0}),
        layouts=((1, dict(micro_batch=2)), (2, dict(dp=2)), (2, dict(dp=1, ep=2)), (4, dict(dp=2, ep=2)),
                 (2, dict(dp=1, ep=2, stage="t1", recompute="block")), (2, dict(dp=2, stage="a0")), (2, dict(dp=2, stage="s1a"))),
        falls=1.0, batch=(48, 0), variants=(), small=dict(),
    ),
}  # fmt: skip


def pytest_configure(config):
    """Nothing of what libraries say of themselves reaches the reader's screen."""
    for warning in (
        "Unable to enable fault handler", "torch.distributed is disabled", ".torch.jit.script", "__array_wrap__ must accept",
        "flex_attention called without torch.compile", "Converting a tensor with requires_grad=True to a scalar",
    ):
        config.addinivalue_line("filterwarnings", f"ignore:{warning}")


def run_tests(items, config, pipe, lock):
    """Runs the tests in this process and sends what would be printed of them."""

    def send(report):
        with lock:
            pipe.send(config.hook.pytest_report_to_serializable(config=config, report=report))

    config.pluginmanager.unregister(name="terminalreporter")
    config.pluginmanager.register(types.SimpleNamespace(pytest_runtest_logreport=send))
    for item, after in zip(items, [*items[1:], None]):
        config.hook.pytest_runtest_protocol(item=item, nextitem=after)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """Of many tests, two processes run every second one each, with all imports done before. A few run in this process, as for a debugger."""
    config, missing, fork = session.config, dict.fromkeys(item.nodeid for item in session.items), multiprocessing.get_context("fork")
    if len(missing) < 20 or session.testsfailed or config.option.collectonly or config.option.usepdb or sys.platform != "linux":
        return None
    config.pluginmanager.get_plugin("terminalreporter").showfspath = False  # the files are mixed
    (ours, theirs), lock = fork.Pipe(duplex=False), fork.Lock()
    processes = [fork.Process(target=run_tests, args=(session.items[k::2], config, theirs, lock)) for k in range(2)]
    [process.start() for process in processes]
    theirs.close()
    try:
        while missing and not session.shouldfail:
            report = config.hook.pytest_report_from_serializable(config=config, data=ours.recv())
            config.hook.pytest_runtest_logreport(report=report)
            if report.when == "teardown":
                missing.pop(report.nodeid, None)
                config.hook.pytest_runtest_logfinish(nodeid=report.nodeid, location=report.location)
    except EOFError:
        session.shouldfail = f"a process has died in {next(iter(missing))}, and {len(missing)} tests did not run"
    finally:
        [process.kill() for process in processes]
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    return True


# for what has one text in all scripts, which test_house.py sees to: one of them is enough
SHARED = pytest.mark.parametrize("script", ["gpt1"], indirect=True)
# for models that read tokens and predict the next one; test_bert.py and test_t5.py have the same for theirs
CAUSAL = pytest.mark.parametrize("script", [name for name in SCRIPTS if name not in ("bert", "t5", "omni")], indirect=True)


@pytest.fixture(params=SCRIPTS)
def script(request):
    """(module, its row) of each script in turn."""
    return importlib.import_module(request.param), SCRIPTS[request.param]


@pytest.fixture(scope="session")
def ranks():
    """The pool of worker processes; see ranks.py."""
    from ranks import Ranks

    pool = Ranks()
    yield pool
    pool.close()
