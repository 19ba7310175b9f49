"""scripts/benchmark.py on tiny models: FLOP formulas, memory, checks, what is left out and why, and its files."""

import json
import logging
import subprocess
import time
from dataclasses import replace

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import ordnung
from ordnung.modeling.registration import REGISTERED
from ordnung.scripts import benchmark
from ordnung.scripts.benchmarks import checks as bench_checks
from ordnung.scripts.benchmarks import measure as bench_measure
from ordnung.scripts.benchmarks import mixer as bench_mixer
from ordnung.scripts.benchmarks import run as bench_run
from ordnung.scripts.benchmarks.cases import Case, Sample, Settings
from ordnung.scripts.benchmarks.report import add_ratios, markdown
from ordnung.scripts.benchmarks.variants import (
    CAUSAL,
    VARIANTS,
    Shape,
    mamba_matmul_flops,
    pairs,
    state_bytes,
    with_static_forms,
)
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.machine import described, machine_info

SHAPE = Shape(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, kernel_size=16)
SETTINGS = Settings(shape=SHAPE, decode_steps=2)
N = 40


@pytest.fixture(autouse=True)
def restore_process():
    """The program sets threads and log levels for its whole process; here others share that."""
    threads, verbosity, level = (
        torch.get_num_threads(),
        transformers.logging.get_verbosity(),
        logging.getLogger("ordnung").level,
    )
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)
    logging.getLogger("ordnung").setLevel(level)


def counted_flops(variant, model, tokens, **kwargs):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        variant.run(model, tokens, **kwargs)
    return counter.get_total_flops()


@pytest.fixture
def tokens():
    return torch.randint(SHAPE.vocab_size, (1, N))


class TestFlops:
    """Each formula against what torch counts in the operators that a forward pass really calls."""

    def test_eager_gpt2(self, tokens):
        variant = VARIANTS["gpt2_eager"]
        model = variant.build(SHAPE)
        assert counted_flops(variant, model, tokens) == variant.count_flops(model, "forward", N)
        assert counted_flops(variant, model, tokens, logits_to_keep=1) == variant.count_flops(model, "prefill", N)

    @pytest.mark.parametrize("name", ["gpt2_sdpa", "softmax_lm"])
    def test_fused_attention_is_eager_less_the_masked_pairs(self, name, tokens):
        variant = VARIANTS[name]
        model = variant.build(SHAPE)
        model.set_attn_implementation("eager")
        masked = pairs(N, 0, causal=False) - pairs(N, 0, causal=True)
        masked_flops = 4 * SHAPE.hidden_size * masked * SHAPE.num_hidden_layers
        model_flops = counted_flops(variant, model, tokens)
        model.set_attn_implementation("sdpa")
        assert model_flops - masked_flops == variant.count_flops(model, "forward", N)

    def test_lfm2(self, tokens):
        variant = VARIANTS["lfm2_conv"]
        model = variant.build(SHAPE)
        taps = model.config.conv_L_cache
        cut_off = 2 * taps * SHAPE.hidden_size * (taps - 1) * SHAPE.num_hidden_layers  # outputs after the last token
        counted = counted_flops(variant, model, tokens) - cut_off
        # exact but for rotary angles, which some versions make by a matrix product even without attention layers
        assert counted == pytest.approx(variant.count_flops(model, "forward", N), rel=1e-3)

    def test_mamba_without_its_scan(self, tokens):
        variant = VARIANTS["mamba"]
        model = variant.build(SHAPE)
        taps, inner = model.config.conv_kernel, model.config.intermediate_size
        cut_off = 2 * taps * inner * (taps - 1) * SHAPE.num_hidden_layers
        assert counted_flops(variant, model, tokens) - cut_off == mamba_matmul_flops(model.config, N, 0, N)
        scan = 6 * N * inner * model.config.state_size * SHAPE.num_hidden_layers
        assert variant.count_flops(model, "forward", N) == mamba_matmul_flops(model.config, N, 0, N) + scan

    def test_conv_lm(self, tokens):
        variant = VARIANTS["conv_lm"]
        model = variant.build(SHAPE)
        for module in model.modules():
            if hasattr(module, "config"):
                module.config.conv_implementation = "conv1d"
        counted = counted_flops(variant, model, tokens)
        # the first tokens have fewer than K predecessors: the model may leave those products out, torch counts them
        spare = 2 * SHAPE.hidden_size * SHAPE.num_hidden_layers * sum(range(SHAPE.kernel_size))
        assert counted - spare <= variant.count_flops(model, "forward", N) <= counted

    def test_linformer_in_whole_blocks(self):
        variant = VARIANTS["linformer_lm"]
        model = variant.build(SHAPE)
        model.set_attn_implementation("eager")
        tokens = torch.randint(SHAPE.vocab_size, (1, 192))
        assert counted_flops(variant, model, tokens) == variant.count_flops(model, "forward", 192)

    @pytest.mark.parametrize("name", [name for name in VARIANTS if name not in CAUSAL])
    def test_encoders(self, name, tokens):
        variant = VARIANTS[name]
        model = variant.build(SHAPE)
        model.set_attn_implementation("eager")
        assert counted_flops(variant, model, tokens) == variant.count_flops(model, "forward", N)

    def test_cubic_prefix_lm(self, tokens):
        variant = VARIANTS["cubic_prefix_lm"]
        model = variant.build(SHAPE)
        model.set_attn_implementation("eager")
        assert counted_flops(variant, model, tokens) == variant.count_flops(model, "forward", N)
        cache = DynamicCache(config=model.config)
        prefill = counted_flops(variant, model, tokens, cache=cache, logits_to_keep=1)
        assert prefill == variant.count_flops(model, "prefill", N)
        step = counted_flops(variant, model, tokens[:, :1], cache=cache, past=N)
        assert step == variant.count_flops(model, "decode", N)

    def test_a_window_costs_the_same_after_it_and_a_stride_ever_more(self):
        for name, grows in (("local", False), ("global", False), ("strided", True), ("all", True)):
            variant = VARIANTS[f"sparse_{name}"]
            model = variant.build(SHAPE)
            counts = [variant.count_flops(model, "decode", n) for n in (1000, 3000, 9000)]
            assert (counts[0] < counts[1] < counts[2]) if grows else (counts[0] == counts[1] == counts[2])

    def test_mistral_window(self, tokens):
        variant = VARIANTS["mistral_window"]
        model = variant.build(SHAPE)
        model.set_attn_implementation("eager")
        assert counted_flops(variant, model, tokens) == pytest.approx(
            variant.count_flops(model, "forward", N), rel=1e-3
        )

    @pytest.mark.parametrize("name", [name for name in CAUSAL if VARIANTS[name].by_default])
    def test_decode_is_the_cost_of_one_more_token(self, name):
        variant = VARIANTS[name]
        model = variant.build(SHAPE)
        short, long = (variant.count_flops(model, "decode", n) for n in (100, 200))
        attention = 4 * SHAPE.hidden_size * 100 * SHAPE.num_hidden_layers
        assert long - short == (attention if model.config.model_type in ("gpt2", "softmax_lm") else 0)
        assert variant.count_flops(model, "train", 100) == 3 * variant.count_flops(model, "forward", 100)


@pytest.mark.parametrize("name", CAUSAL)
def test_state_bytes(name):
    """The walk over the cache finds what each kind of state must hold after 300 tokens."""
    sample = bench_measure.make_sample(Case("decode", name, 300), SETTINGS)
    sample.setup()
    width, layers = SHAPE.hidden_size, SHAPE.num_hidden_layers
    if name in ("gpt2_sdpa", "gpt2_sdpa_gelu", "gpt2_eager", "softmax_lm"):
        assert state_bytes(sample.cache) == 2 * 300 * width * layers * 4
    elif name == "conv_lm":
        kept = (SHAPE.kernel_size - 1) * width * layers * 4
        assert kept <= state_bytes(sample.cache) <= 1.1 * kept
        assert sample.state["predicted_state_bytes"] == pytest.approx(state_bytes(sample.cache), rel=0.02)
    elif name == "linformer_lm":
        kept = 2 * (128 + 2 * 64) * width * layers * 4  # slots, and two blocks
        assert kept <= state_bytes(sample.cache) <= 1.1 * kept
        assert sample.state["predicted_state_bytes"] == pytest.approx(state_bytes(sample.cache), rel=0.02)
    elif name == "quadratic_kernel_lm":
        # tokens are counted apart, which is no floating-point state
        assert sample.state["predicted_state_bytes"] == state_bytes(sample.cache) - 8 * layers
    elif name.startswith(("sparse_", "mistral_")):
        held = state_bytes(sample.cache)
        assert held >= 2 * 255 * width * layers * 4  # the window
        if name != "mistral_window":
            assert sample.state["predicted_state_bytes"] == pytest.approx(held, rel=0.02)
    elif name == "cubic_prefix_lm":
        # positions apart, which are no floating-point state
        assert sample.state["predicted_state_bytes"] == state_bytes(sample.cache) - 300 * 8
    elif name in REGISTERED:
        assert sample.state["predicted_state_bytes"] == pytest.approx(state_bytes(sample.cache), rel=0.02)
    else:
        assert 0 < state_bytes(sample.cache) < 100 * width * layers * 4
    before = sample.cache.get_seq_length() if "gpt2" in name else None
    sample.run(sample.prepare())
    if before is not None:
        assert sample.cache.get_seq_length() == before == 300  # a sample decodes on a copy


@pytest.mark.parametrize("name", [name for name in with_static_forms(CAUSAL) if name not in VARIANTS])
def test_static_caches_have_room_for_all_steps_and_are_not_copied(name):
    sample = bench_measure.make_sample(Case("decode", name, 300), SETTINGS)
    sample.setup()
    kept = 2 * (300 + SETTINGS.decode_steps) * SHAPE.hidden_size * SHAPE.num_hidden_layers * 4
    counters = 8 * SHAPE.num_hidden_layers
    assert state_bytes(sample.cache) == kept + counters and sample.state["cache"] == "static"
    assert sample.state["predicted_state_bytes"] in (None, kept)
    copy = sample.prepare()
    places = [layer.keys.data_ptr() for layer in copy.layers]
    sample.run(copy)
    assert [layer.keys.data_ptr() for layer in copy.layers] == places
    assert copy.get_seq_length() == 302 and sample.cache.get_seq_length() == 300


class TestProbe:
    def test_peak_memory_is_that_of_the_scores(self):
        """Unfused attention over 1024 tokens holds H N*N scores and a few arrays of that size."""
        outcome = bench_measure.probe(Case("prefill", "gpt2_eager", 1024), big(), limit_seconds=60)
        assert outcome["status"] == "ok", outcome
        scores = 4 * 4 * 1024**2
        assert 2 * scores < outcome["peak_bytes"] < 8 * scores
        assert outcome["tokens"] == 1024 and outcome["probe_seconds"] > 0

    def test_too_little_memory_is_said_in_words(self):
        """2**19 tokens of unfused attention need terabytes."""
        outcome = bench_measure.probe(Case("mixer", "source_mixer_eager", 2**19), big(), limit_seconds=60)
        assert outcome["status"] == "skipped"
        assert "GiB that are free" in outcome["reason"]

    def test_too_little_time_is_said_in_words(self):
        start = time.perf_counter()
        outcome = bench_measure.probe(Case("train", "mamba", 4096), big(), limit_seconds=2)
        assert outcome == {"status": "skipped", "reason": "one sample with its set-up takes more than 2 s"}
        assert time.perf_counter() - start < 30

    def test_an_error_is_no_skip(self):
        outcome = bench_measure.probe(Case("forward", "gpt2_sdpa", 16), replace(big(), dtype="int8"), limit_seconds=60)
        assert outcome["status"] == "failed"
        assert outcome["reason"].startswith("TypeError")


def big():
    return Settings(shape=Shape(64, 1, 4, vocab_size=64, kernel_size=16), decode_steps=2)


class Recorder(Sample):
    """Takes `seconds` and writes its name into a log when it runs; out of memory after `lives` runs."""

    def __init__(self, name, log, lives=1000, seconds=0.0):
        self.name, self.log, self.lives, self.seconds = name, log, lives, seconds

    def run(self, argument):
        time.sleep(self.seconds)
        if len([entry for entry in self.log if entry == self.name]) >= self.lives:
            raise MemoryError("no more")
        self.log.append(self.name)


def test_samples_take_turns():
    log = []
    samples = {name: Recorder(name, log) for name in "abc"}
    seconds, dropped = bench_measure.time_in_turns(samples, "cpu", 30.0, dict.fromkeys("abc", 100.0))
    assert log == list("abc") * bench_measure.MAX_ROUNDS
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", bench_measure.MAX_ROUNDS)
    assert not dropped


def test_a_sample_that_uses_the_budget_alone_runs_once():
    log = []
    samples = {"quick": Recorder("quick", log), "slow": Recorder("slow", log, seconds=0.3)}
    seconds, _ = bench_measure.time_in_turns(samples, "cpu", 0.2, dict.fromkeys(samples, 1.0))
    assert len(seconds["slow"]) == 1 and len(seconds["quick"]) == bench_measure.MIN_ROUNDS
    assert bench_measure.summarise(seconds["slow"])["q1"] == seconds["slow"][0] >= 0.3


def test_running_out_of_memory_drops_one_sample_only():
    log = []
    samples = {"a": Recorder("a", log), "b": Recorder("b", log, lives=2), "c": Recorder("c", log)}
    seconds, dropped = bench_measure.time_in_turns(samples, "cpu", 30.0, dict.fromkeys("abc", 100.0))
    assert seconds.keys() == {"a", "c"}
    assert dropped.keys() == {"b"} and "no more" in dropped["b"]


def test_summary_of_known_samples():
    assert bench_measure.summarise([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "n": 5}


def test_ratios_divide_medians_and_flops():
    def row(name, seconds, flops):
        return {"task": "forward", "length": 8, "name": name, "seconds": {"median": seconds}, "flops": flops}

    rows = [row("a", 1.0, 10), row("b", 4.0, 30), {"task": "forward", "length": 8, "name": "c", "status": "skipped"}]
    add_ratios(rows, "b")
    assert rows[0]["ratios"] == {"b": {"measured": 4.0, "predicted": 3.0}}
    assert rows[1]["ratios"] == {"b": {"measured": 1.0, "predicted": 1.0}}
    assert "ratios" not in rows[2]


def test_decode_is_held_against_the_faster_form_of_the_baseline():
    def row(name, length, seconds):
        return {"task": "decode", "length": length, "name": name, "seconds": {"median": seconds}, "flops": 1}

    rows = [row("a", 8, 1.0), row("b", 8, 6.0), row("b_static", 8, 3.0), row("a", 2, 1.0), row("b", 2, 2.0)]
    rows += [row("b_static", 2, 4.0)]
    add_ratios(rows, "b")
    assert [row["ratios"] for row in rows[:3]] == [
        {"b_static": {"measured": measured, "predicted": 1.0}} for measured in (3.0, 0.5, 1.0)
    ]
    assert rows[3]["ratios"] == {"b": {"measured": 2.0, "predicted": 1.0}}


def test_hopeless_cases_are_not_tried():
    done = {"task": "forward", "status": "ok", "length": 100, "probe_seconds": 10.0}
    assert bench_run.hopeless(None, 200, 15) is None
    assert bench_run.hopeless(done, 200, 25) is None
    assert "at least 20 s" in bench_run.hopeless(done, 200, 15)
    assert bench_run.hopeless({**done, "task": "decode"}, 200, 15) is None
    skipped = {"task": "forward", "status": "skipped", "length": 100, "reason": "too slow"}
    again = {**skipped, "length": 200, "reason": bench_run.hopeless(skipped, 200, 15)}
    assert again["reason"] == bench_run.hopeless(again, 400, 15) == "at N=100: too slow"


def test_every_variant_passes_its_checks():
    checks = bench_checks.run_checks(list(VARIANTS), SETTINGS)
    assert {name: check for name, check in checks.items() if not check["passed"]} == {}
    assert len(checks) == len(with_static_forms(CAUSAL)) + len(bench_checks.IMPLEMENTATIONS) + 1 + 2


def test_wrong_outputs_are_not_timed(tmp_path, monkeypatch, capsys):
    """A convolution that is off by one tap takes ConvLM out of the comparison and the exit status tells."""
    right = bench_checks.causal_conv
    monkeypatch.setattr(bench_checks, "causal_conv", lambda v, k, **kwargs: right(v, k.roll(1, 1), **kwargs))
    status = benchmark.main(arguments(tmp_path, "--tasks", "forward", "mixer", "--lengths", "16"))
    results = json.loads((tmp_path / "speed.json").read_text())
    assert status == 1
    assert results["checks"]["convolution auto"]["passed"] is False
    assert [row["name"] for row in results["results"]] == ["gpt2_sdpa"]
    assert "convolution auto: deviates by" in capsys.readouterr().out


def arguments(folder, *more):
    sizes = "--hidden_size 48 --num_hidden_layers 1 --num_attention_heads 4 --vocab_size 96 --kernel_size 8"
    rest = "--decode_steps 2 --seconds 0.01 --threads 1 --variants conv_lm gpt2_sdpa"
    return [*sizes.split(), *rest.split(), "--output", str(folder / "speed.json"), *more]


@pytest.mark.draws
def test_end_to_end(tmp_path, capsys):
    tasks = ["forward", "train", "decode", "memory"]
    assert benchmark.main(arguments(tmp_path, "--tasks", *tasks, "--lengths", "16", "32")) == 0
    results = json.loads((tmp_path / "speed.json").read_text())
    rows = {(row["task"], row["name"], row["length"]): row for row in results["results"]}
    every_task = ["forward", "train", "prefill", "decode"]
    names = {(t, v) for t in every_task for v in ("conv_lm", "gpt2_sdpa")} | {("decode", "gpt2_sdpa_static")}
    assert set(rows) == {(t, v, n) for t, v in names for n in (16, 32)}
    for (task, _, length), row in rows.items():
        assert row["status"] == "ok", row
        assert row["peak_bytes"] is None if task == "decode" else row["peak_bytes"] >= 0
        assert ("seconds" in row) == (task != "prefill")  # probed for its memory only
        if task != "prefill":
            quartiles = row["seconds"]
            assert 0 < quartiles["q1"] <= quartiles["median"] <= quartiles["q3"]
            assert 1 <= quartiles["n"] <= bench_measure.MAX_ROUNDS
            (ratio,) = row["ratios"].items()
            assert ratio[1]["predicted"] == rows[task, ratio[0], length]["flops"] / row["flops"]
        if task == "decode":
            assert row["cache"] == ("static" if row["name"] == "gpt2_sdpa_static" else "dynamic")
            assert row["tokens"] == 2 and row["state_bytes"] > 0
    assert results["machine"]["threads"] == 1
    assert results["machine"]["torch"] == torch.__version__
    assert results["settings"]["seed"] == 0
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.json", "speed.png"]  # no temporary file

    capsys.readouterr()
    assert benchmark.main(["--markdown", str(tmp_path / "speed.json"), "--baseline", "conv_lm"]) == 0
    table = capsys.readouterr().out
    for expected in ("**Forward, µs per token**", "| conv_lm", "**Generation state", "ratios against conv_lm"):
        assert expected in table


def test_encoders_run_forward_only(tmp_path):
    encoders = [name for name in VARIANTS if name not in CAUSAL]
    more = ["--variants", *encoders, "--baseline", encoders[0], "--tasks", "forward", "memory", "--lengths", "16"]
    assert benchmark.main(arguments(tmp_path, *more)) == 0
    rows = json.loads((tmp_path / "speed.json").read_text())["results"]
    assert [(row["task"], row["name"], row["status"]) for row in rows] == [("forward", x, "ok") for x in encoders]
    assert all(row["peak_bytes"] >= 0 and row["seconds"]["median"] > 0 for row in rows)


def test_parts(tmp_path):
    """The mixer task times the very calls that the model makes; the parts are cheaper than what holds them."""
    block, convolution = (
        bench_measure.make_sample(Case("mixer", name, 64), SETTINGS) for name in ("block", "convolution")
    )
    assert 0 < convolution.flops < block.flops
    for sample in (block, convolution):
        sample.setup()
        sample.run(sample.prepare())
    v, kernel = convolution.args[:2]
    assert v.shape == (1, 64, SHAPE.hidden_size)
    assert kernel.shape == (SHAPE.num_attention_heads, SHAPE.kernel_size)
    mixers = {
        kind: bench_measure.make_sample(Case("mixer", f"source_mixer_{kind}", 64), SETTINGS)
        for kind in ("conv", "sdpa", "eager")
    }
    width, taps, masked = 256, 64, 64 * 63 // 2
    assert mixers["eager"].flops - mixers["sdpa"].flops == 4 * width * masked
    assert mixers["sdpa"].flops == 2 * 64 * 4 * width**2 + 4 * width * (64**2 - masked)
    assert mixers["conv"].flops <= 2 * 64 * (2 * width**2 + taps * width)


def test_interrupt_keeps_finished_lengths(tmp_path, monkeypatch):
    measure = bench_run.measure

    def interrupted(task, names, lengths, *rest):
        if lengths == [32]:
            raise KeyboardInterrupt
        return measure(task, names, lengths, *rest)

    monkeypatch.setattr(bench_run, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(arguments(tmp_path, "--tasks", "forward", "--lengths", "16", "32"))
    results = json.loads((tmp_path / "speed.json").read_text())
    assert [(row["name"], row["length"]) for row in results["results"]] == [("conv_lm", 16), ("gpt2_sdpa", 16)]
    assert "**Forward" in markdown(results)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["--variants", "gpt3"], "--variants gpt3; there are conv_lm, "),
        (["--variants", "conv_lm", "--baseline", "mamba"], "--baseline mamba must be among --variants"),
        (["--hidden_size", "50"], r"--hidden_size \(50\) must be a multiple of --num_attention_heads \(4\)"),
        (["--tasks", "decod"], "--tasks decod; did you mean 'decode'"),
        (["--lengths", "16", "0"], "--lengths must be at least 1, not 0"),
        (["--decode_steps", "0"], "--decode_steps must be at least 1, not 0"),
    ],
)
def test_bad_arguments(bad, message, tmp_path):
    with pytest.raises(ScriptError, match=message):
        benchmark.main(arguments(tmp_path, *bad))


@pytest.mark.cuda
def test_cuda(tmp_path):
    device = ["--device", "cuda", "--dtype", "bfloat16"]
    assert benchmark.main(arguments(tmp_path, *device, "--tasks", "forward", "train", "decode", "--lengths", "16")) == 0
    rows = json.loads((tmp_path / "speed.json").read_text())["results"]
    assert len(rows) == 6 and all(row["status"] == "ok" for row in rows)
    assert all(row["peak_bytes"] > 0 for row in rows if row["task"] != "decode")


def test_machine_info_names_versions_and_command():
    info = json.loads(json.dumps(machine_info()))
    assert info["torch"] == torch.__version__
    assert info["threads"] == torch.get_num_threads()
    assert info["cores"] >= 1
    assert info["gpu"] or f"({torch.backends.cpu.get_cpu_capability()})" in described(info)
    assert info["ordnung"] and info["transformers"] and info["python"] and info["command"]


def test_machine_info_tells_the_commit_and_whether_files_differ(tmp_path, monkeypatch):
    """Of the clone that runs, never of a checkout around an installed package."""

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *who, "-C", tmp_path, *words], capture_output=True, text=True, check=True).stdout

    monkeypatch.setattr(ordnung, "__file__", str(tmp_path / "__init__.py"))
    assert machine_info()["commit"] is None
    git("init")
    (tmp_path / "__init__.py").write_text("")
    git("add", ".")
    git("commit", "-m", "first")
    head = git("rev-parse", "HEAD").strip()
    assert machine_info()["commit"] == head
    (tmp_path / "__init__.py").write_text("changed")
    assert machine_info()["commit"] == f"{head}-dirty"
    (tmp_path / "inner").mkdir()
    monkeypatch.setattr(ordnung, "__file__", str(tmp_path / "inner" / "__init__.py"))
    assert machine_info()["commit"] is None


def test_part_names_are_known():
    for part in bench_mixer.PARTS.values():
        assert set(part.compared_with) <= set(bench_mixer.PARTS)
