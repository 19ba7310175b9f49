"""prefix_tasks.py: the tasks against their definitions, and the program from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ordnung.scripts import prefix_tasks as program
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.options import parse_options
from ordnung.scripts.experiments import prefix_tasks
from ordnung.scripts.experiments.earlier import EarlierTask
from ordnung.scripts.experiments.options import CompareOptions, TaskOptions
from ordnung.scripts.experiments.variants import variant_configs

VARIANTS = {"cubic": {"model_type": "cubic_prefix_lm"}, "softmax": {"model_type": "softmax_lm"}}
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "position_embedding_type": "learned"}


def test_pointers_are_followed():
    tokens, labels = prefix_tasks.draw_pointers(50, 7, 3, 5, np.random.default_rng(0))
    assert tokens.shape == labels.shape == (50, 12)
    seen = set()
    for row, answers in zip(tokens.tolist(), labels.tolist()):
        assert answers[:7] == [-100] * 7
        visited = [0]
        while row[visited[-1]] not in visited:
            visited.append(row[visited[-1]])
        assert sorted(visited) == list(range(7)) and row[visited[-1]] == 0  # one cycle
        for query, answer in zip(row[7:], answers[7:]):
            times, place = divmod(query, 7)
            seen.add((times, place))
            for _ in range(times):
                place = row[place]
            assert answer == place
    assert seen == {(times, place) for times in (1, 2, 3) for place in range(7)}


def test_functions_are_applied():
    options = TaskOptions(output_dir="none", task="function", variants=VARIANTS, symbols=5, hops=3, queries=4)
    tokens, labels = prefix_tasks.draw(options, 60, np.random.default_rng(0))
    assert tokens.shape == labels.shape == (60, options.tokens) and tokens.max() == options.vocab_size - 1
    for row, answers in zip(tokens.tolist(), labels.tolist()):
        assert answers[:5] == [-100] * 5
        for query, answer in zip(row[5:], answers[5:]):
            assert answer == row[row[row[query - 5]]]
    assert len({len(set(row[:5])) for row in tokens.tolist()}) > 2  # no permutations
    rows = prefix_tasks.draw(options, options.eval_sequences, np.random.default_rng(prefix_tasks.EVALUATION_SEED))[0]
    right = [[q - 5 == row[row[row[q - 5]]] for q in row[5:]] for row in rows.tolist()]
    right += [[row[q - 5] == row[row[row[q - 5]]] for q in row[5:]] for row in rows.tolist()]
    of_none, of_one, of_two = prefix_tasks.fewer_hops(options)
    assert (of_none, of_one) == tuple(np.mean(part) for part in (right[: len(rows)], right[len(rows) :]))
    assert of_none < of_two < 1


def test_a_variant_has_its_own_rate_and_steps(monkeypatch):
    own = {"softmax": {"max_steps": 7, "learning_rate": 0.5}}
    options = TaskOptions(
        output_dir="none", task="function", variants=VARIANTS, max_steps=3, equal_compute=False, training_by_variant=own
    )
    assert (options.of_variant("softmax").learning_rate, options.of_variant("softmax").max_steps) == (0.5, 7)
    assert (options.of_variant("cubic").learning_rate, options.of_variant("cubic").max_steps) == (1e-3, 3)
    seen = {}

    def train_all(options, configs, run, collect, steps):
        for name in configs:
            run(name, 0, Path(f"{name}-seed0.json"))
        raise KeyboardInterrupt

    def fit(options, seed, job):
        seen[job.config.model_type] = options.learning_rate, job.max_steps
        raise KeyboardInterrupt if len(seen) == 2 else ZeroDivisionError

    monkeypatch.setattr(prefix_tasks, "train_all", train_all)
    monkeypatch.setattr(prefix_tasks, "fit", fit)
    for variants in (VARIANTS, dict(reversed(VARIANTS.items()))):
        options.variants = variants
        with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
            prefix_tasks.run(options)
    assert seen == {"softmax_lm": (0.5, 7), "cubic_prefix_lm": (1e-3, 3)}


def test_triplets_are_counted():
    tokens, labels = prefix_tasks.draw_triplets(6, 5, 17, np.random.default_rng(0))
    assert tokens.shape == labels.shape == (6, 17)
    for row, answers in zip(tokens.tolist(), labels.tolist()):
        assert answers[:4] == [-100] * 4 and answers[4:-1] == row[5:]
        for n in range(5, 18):
            x = row[:n]
            triplets = sum((x[i] + x[j] + x[-1]) % n == 0 for i in range(n) for j in range(n))
            assert answers[n - 1] == triplets % n


def test_only_scored_prefixes_cost():
    options = TaskOptions(output_dir="none", task="pointer", variants=VARIANTS, symbols=20, queries=2)
    config = variant_configs(VARIANTS, TINY, vocab_size=options.vocab_size)["cubic"]
    few = prefix_tasks.step_flops(options, config)
    options.symbols, options.queries = 2, 20
    assert 0 < 3 * few < prefix_tasks.step_flops(options, config)


@pytest.fixture
def argv(tmp_path):
    path = tmp_path / "tasks.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "output_dir": str(tmp_path / "out"),
                "task": "pointer",
                "variants": VARIANTS,
                "config_overrides": {**TINY, "initializer_range": 0.2},
                "symbols": 3,
                "hops": 1,
                "queries": 4,
                "max_steps": 60,
                "evaluations": 3,
                "learning_rate": 1.0e-2,
                "warmup_steps": 5,
                "eval_sequences": 50,
                "seeds": [0, 1],
            }
        )
    )
    return ["--config", str(path)]


@pytest.mark.draws
def test_program_from_end_to_end(argv, device, tmp_path, capsys):
    argv = [*argv, "--device", device]
    program.main(argv)
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    cubic, softmax = (results["variants"][name] for name in ("cubic", "softmax"))
    assert cubic["parameters"] == softmax["parameters"]
    for result in (cubic, softmax):
        assert result["equal_steps"]["step"] == 60
        assert 0.5 < result["equal_compute"]["answers"]["mean"] <= 1  # chance is a third
    # the cheaper one went on for as long as the dearer one's FLOPs last
    assert softmax["equal_compute"]["step"] > 60 == cubic["equal_compute"]["step"]
    left = cubic["equal_compute"]["flops"] - softmax["equal_compute"]["flops"]
    assert 0 <= left < softmax["flops_per_step"]
    assert (out / "accuracy.png").stat().st_size > 1000
    assert (out / "results.md").read_text().count("| softmax") == 2
    assert cubic["equal_steps"]["answers_by_hops"] == [cubic["equal_steps"]["answers"]]

    written = (out / "runs" / "cubic-seed0.json").read_text()
    capsys.readouterr()
    program.main(argv)
    assert capsys.readouterr().out.count("finished, kept") == 4
    assert (out / "runs" / "cubic-seed0.json").read_text() == written
    with pytest.raises(ScriptError, match="runs with training of cubic {}, not"):
        program.main([*argv, "--training_by_variant", "cubic={learning_rate: 0.1}"])
    with pytest.raises(ScriptError, match="was trained for 60 steps.*equal compute takes"):
        program.main([*argv, "--variants", "cubic3={model_type: cubic_prefix_lm, num_hidden_layers: 3}"])


@pytest.mark.draws
def test_variants_have_hops_and_answers_of_their_own(argv, tmp_path, monkeypatch):
    own = "cubic={hops: 1, queries: 2},softmax={queries: 3}"
    sizes = ["--task", "function", "--symbols", "5", "--hops", "2", "--seeds", "0", "--training_by_variant", own]
    drawn, draw = {"train": set(), "measure": set()}, prefix_tasks.draw

    def recorded(options, count, random):
        tokens, labels = draw(options, count, random)
        asked, answers = tokens[:, 5:] - 5, labels[:, 5:]
        for _ in range(options.hops):
            asked = np.take_along_axis(tokens[:, :5], asked, 1)
        assert (asked == answers).all()
        drawn["measure" if count == 50 else "train"].add((options.hops, options.queries))
        return tokens, labels

    monkeypatch.setattr(prefix_tasks, "draw", recorded)
    program.main([*argv, *sizes])
    assert {(1, 2), (2, 3)} <= drawn["train"] and {(1, 2), (2, 3)} <= drawn["measure"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    cubic, softmax = (results["variants"][name] for name in ("cubic", "softmax"))
    assert cubic["parameters"] == softmax["parameters"]  # places for the most answers, whoever asks for fewer
    assert len(cubic["fewer_hops"]) == 1 and len(results["fewer_hops"]) == 2 and "fewer_hops" not in softmax
    assert cubic["equal_steps"]["step"] < cubic["equal_compute"]["step"]
    lines = [line for line in (tmp_path / "out" / "results.md").read_text().splitlines() if line[:1] == "|"]
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert header[:3] == ["variant", "hops", "answers a sequence"]
    assert rows[0][:3] == ["cubic", "1", "2"] and rows[0][-1] == f"{cubic['fewer_hops'][0]:.3f}"
    assert rows[1][:3] == ["softmax", "2", "3"] and rows[1][-1] == f"{max(results['fewer_hops']):.3f}"
    assert (tmp_path / "out" / "accuracy.png").stat().st_size > 1000


def test_an_earlier_run_is_gone_on_with_where_its_folder_is_gone(argv, tmp_path, monkeypatch, capsys):
    argv = [
        *argv,
        "--max_steps",
        "3",
        "--equal_compute",
        "false",
        "--training_by_variant",
        "cubic={learning_rate: 0.03}",
    ]
    program.main([*argv, "--only", "cubic"])
    first, held = tmp_path / "out" / "results.json", tmp_path / "held.json"
    results = json.loads(first.read_text())
    del results["settings"]["device"]  # as in files from before there was a choice
    held.write_text(json.dumps(results))
    argv += ["--output_dir", str(tmp_path / "second"), "--earlier", str(held)]
    for wrong, message in {
        ("--learning_rate", "0.5"): "made with learning_rate 0.01, not 0.5: leave it out",
        ("--seeds", "0"): r"made with seeds \[0, 1\], not \[0\]",
        ("--training_by_variant", "cubic={learning_rate: 0.02}"): "made with variant cubic .*0.03.*, not .*0.02",
        ("--earlier", str(tmp_path / "held.md")): "held.md cannot be read",
    }.items():
        with pytest.raises(ScriptError, match=message):
            program.main([*argv, *wrong])
    assert not (tmp_path / "second").exists()
    trained, fit = [], prefix_tasks.fit
    monkeypatch.setattr(
        prefix_tasks, "fit", lambda options, seed, job: trained.append(job.config.model_type) or fit(options, seed, job)
    )
    program.main(argv)
    assert trained == ["softmax_lm"] * 2 and f"{held}: cubic taken over" in capsys.readouterr().out
    both = json.loads((tmp_path / "second" / "results.json").read_text())
    assert both["variants"]["cubic"] == results["variants"]["cubic"] and list(both["variants"]) == ["cubic", "softmax"]
    assert both["earlier"] == [{"machine": results["machine"], "variants": ["cubic"]}]
    assert "Trained earlier: cubic." in (tmp_path / "second" / "results.md").read_text()

    # trained for other FLOPs, beside which others are dearest
    settings = {**results["settings"], "seeds": [0, 1]}
    made = EarlierTask(str(held), settings, settings.pop("variants"))
    assert made.finished(["cubic"], {"cubic": 3}) and not made.finished(["cubic"], {"cubic": 4})


def test_pointers_of_fewer_hops_have_no_answers_of_more(argv, tmp_path):
    own = "softmax={hops: 1}"
    program.main([*argv, "--hops", "2", "--seeds", "0", "--max_steps", "2", "--training_by_variant", own])
    lines = [line for line in (tmp_path / "out" / "results.md").read_text().splitlines() if line[:1] == "|"]
    header, _, cubic, softmax, *_ = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    last = header.index("2 hops")
    assert cubic[last].endswith("(n = 1)") and softmax[last] == "" and softmax[last - 1].endswith("(n = 1)")
    assert header[-1] == "sequences right"


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--symbols", "1"], "--symbols must be at least 2"),
        (["--only", "cubic"], "--only changes which variant is the dearest: give --equal_compute false"),
        (["--hops", "0"], "--hops must be at least 1"),
        (["--task", "triplets", "--sequence_length", "3"], "--sequence_length 3 must exceed --symbols 3"),
        (["--seeds", "1", "1"], "different numbers"),
        (["--training_by_variant", "gru={max_steps: 90}"], "gru must be one of cubic, softmax"),
        (["--training_by_variant", "cubic={seed: 1}"], "cubic: seed is the same for all"),
        (
            ["--training_by_variant", "cubic={max_steps: 9}"],
            r"max_steps \(9\) must be at least that of all \(60\)",
        ),
        (
            ["--training_by_variant", "cubic={hops: 2}"],
            r"hops \(2\) must be from 1 to that of all \(1\)",
        ),
    ],
)
def test_wrong_options_are_refused_in_words(argv, wrong, message):
    with pytest.raises(ScriptError, match=message):
        program.main([*argv, *wrong])


def test_shipped_tables_make_models_of_equal_size():
    folder = program.__file__.rsplit("/", 1)[0]
    for name, options_type in (
        ("tasks_pointer", TaskOptions),
        ("tasks_function", TaskOptions),
        ("tasks_function_more", TaskOptions),
        ("tasks_function_hops", TaskOptions),
        ("tasks_function_answers", TaskOptions),
        ("tasks_triplets", TaskOptions),
        ("tasks_triplets_short", TaskOptions),
        ("compare_cubic", CompareOptions),
    ):
        options = parse_options(options_type, ["--config", f"{folder}/configs/{name}.yaml"])
        configs = variant_configs(options.variants, {"vocab_size": 64, **options.config_overrides})
        assert {config.model_type for config in configs.values()} == {"cubic_prefix_lm", "softmax_lm"}
        assert len(options.seeds) >= 3
        sizes = set()
        for variant, config in configs.items():
            if "num_hidden_layers" not in options.variants[variant]:
                with torch.device("meta"):
                    sizes.add(prefix_tasks.AutoModelForCausalLM.from_config(config).num_parameters())
        assert len(sizes) == 1
