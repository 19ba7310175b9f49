"""recall.py: the task and the measures against their definitions, and the program from end to end."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_variants import TINY, VARIANTS, write_config

from ordnung.scripts import recall as recall_program
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.experiments import recall
from ordnung.scripts.experiments.options import RecallOptions
from ordnung.scripts.experiments.variants import variant_configs


class TestRecallTask:
    @pytest.fixture
    def options(self):
        return RecallOptions(
            output_dir="none",
            variants=VARIANTS,
            sequence_length=40,
            num_pairs=[3, 8],
            num_queries=10,
            alphabet_size=12,
            distance_edges=[1, 9, 17, 40],
            eval_sequences=64,
            batch_size=16,
        )

    @pytest.mark.parametrize("num_pairs", [1, 3, 8])
    def test_answers_follow_from_the_pairs(self, options, num_pairs):
        tokens, labels, distances = recall.sample(options, 50, num_pairs, np.random.default_rng(0))
        assert tokens.shape == labels.shape == distances.shape == (50, 40)
        for row, answers, back in zip(tokens.tolist(), labels.tolist(), distances.tolist()):
            pairs = dict(zip(row[0 : 2 * num_pairs : 2], row[1 : 2 * num_pairs : 2]))
            assert len(pairs) == len(set(pairs.values())) == num_pairs
            assert all(1 <= key <= 12 < value <= 24 for key, value in pairs.items())
            asked = [place for place, token in enumerate(row) if place >= 2 * num_pairs and token]
            assert len(asked) == 10
            assert answers == [pairs[row[place]] if place in asked else -100 for place in range(40)]
            assert back == [place - row.index(row[place]) if place in asked else 0 for place in range(40)]

    def test_seed_decides(self, options):
        first, again, other = (recall.sample(options, 4, 3, np.random.default_rng(seed))[0] for seed in (0, 0, 1))
        assert (first == again).all() and (first != other).any()

    def test_all_variants_train_on_the_same_sequences(self, options, monkeypatch):
        seen, sample = [], recall.sample
        monkeypatch.setattr(recall, "sample", lambda *args: seen.append(sample(*args)) or seen[-1])
        options.max_steps = 2
        for config in variant_configs(VARIANTS, TINY, vocab_size=options.vocab_size).values():
            recall.train(options, config, 5)
        for mine, other in zip(seen[:2], seen[2:]):
            assert (mine[0] == other[0]).all()

    def test_accuracy_by_distance_of_a_model_that_sees_16_tokens_back(self, options):
        """The model answers a query from its pair if that is at most 16 tokens away, and with a blank if not."""

        class NearSighted(torch.nn.Module):
            device = torch.device("cpu")

            def forward(self, tokens, use_cache):
                logits = torch.zeros(*tokens.shape, options.vocab_size)
                logits[..., 0] = 1
                for row, line in enumerate(tokens.tolist()):
                    for place, token in enumerate(line):
                        key = line.index(token)
                        if 0 < place - key <= 16:
                            logits[row, place, line[key + 1]] = 2
                return SimpleNamespace(logits=logits)

        result = recall.measure(options, NearSighted())
        assert result["accuracy_by_distance"] == [[1, 1, 0], [1, 1, 0]]
        for total, answers in zip(result["accuracy"], result["answers"]):
            assert sum(answers) == 640
            assert total == pytest.approx(sum(answers[:2]) / 640)

    def test_unreachable_distances_have_no_accuracy(self, options):
        options.distance_edges = [1, 2, 40]
        result = recall.measure(options, recall.train(options, self.config(options), 0)[0])
        assert [line[0] for line in result["accuracy_by_distance"]] == [None, None]

    def config(self, options):
        options.max_steps = 1
        return variant_configs(VARIANTS, TINY, vocab_size=options.vocab_size)["conv"]

    def test_solved_is_judged_within_the_receptive_field(self):
        run = {"accuracy_by_distance": [[None, 1.0, 0.1], [1.0, 0.995, 0.0]]}
        assert recall.solved(run, [1, 3, 9, 17], 9)
        assert not recall.solved(run, [1, 3, 9, 17], 17)
        assert not recall.solved(run, [1, 3, 9, 17], None)

    def test_still_learning(self):
        assert recall.still_learning([3.0, 2.0, 1.0])
        assert not recall.still_learning([3.0, 1.0, 0.99])

    @pytest.mark.parametrize(
        "wrong, message",
        [
            ({"num_pairs": [2, 16]}, "must be from 1 to 12"),
            ({"num_queries": 35}, "must be from 1 to 2"),
            ({"distance_edges": [5, 3]}, "rising"),
            ({"distance_edges": [1, 9, 39]}, r"\[1, 9, 39\] must reach from 1 to --sequence_length \(40\)"),
            ({"distance_edges": [2, 9, 40]}, r"\[2, 9, 40\] must reach from 1 to --sequence_length \(40\)"),
            ({"seeds": [1, 1]}, "different"),
            ({"max_steps": 0}, "max_steps must be at least 1"),
        ],
    )
    def test_bad_options(self, wrong, message):
        with pytest.raises(ScriptError, match=message):
            RecallOptions(
                **{
                    "output_dir": "",
                    "variants": VARIANTS,
                    "num_pairs": [4],
                    "alphabet_size": 12,
                    "sequence_length": 40,
                    **wrong,
                }
            )


class TestRecallProgram:
    @pytest.fixture
    def argv(self, tmp_path):
        return write_config(
            tmp_path / "recall.yaml",
            sequence_length=24,
            num_pairs=[2, 4],
            num_queries=8,
            distance_edges=[1, 8, 24],
            alphabet_size=6,
            eval_sequences=8,
            max_steps=20,
            batch_size=4,
        )

    @pytest.mark.draws
    def test_from_end_to_end_and_again(self, argv, device, tmp_path, monkeypatch, capsys):
        argv = [*argv, "--device", device]
        recall_program.main(argv)
        folder = tmp_path / "out"
        results = json.loads((folder / "results.json").read_text())
        assert (folder / "accuracy.png").stat().st_size > 0
        assert (folder / "results.md").read_text().strip() in capsys.readouterr().out
        assert results["chance"] == 1 / 6 and results["chance_shown"] == [1 / 2, 1 / 4]
        assert results["settings"]["max_steps"] == 20
        assert results["variants"]["conv"]["receptive_field"] == 7
        assert results["variants"]["softmax"]["receptive_field"] is None
        for result in results["variants"].values():
            assert [len(result["accuracy"]), len(result["accuracy_by_distance"])] == [2, 2]
            assert all(len(curve) == 10 for curve in result["loss_curves"])

        trained, train = [], recall.train
        monkeypatch.setattr(
            recall, "train", lambda options, config, seed: trained.append(seed) or train(options, config, seed)
        )
        recall_program.main([*argv, "--seeds", "0", "1", "2"])
        assert trained == [2, 2]
        again = json.loads((folder / "results.json").read_text())
        for name, result in results["variants"].items():
            assert again["variants"][name]["accuracy"][0]["values"][:2] == result["accuracy"][0]["values"]

        path = folder / "settings.json"
        claimed = json.loads(path.read_text())
        assert claimed["device"] == device
        path.write_text(json.dumps({**claimed, "device": "another"}))
        with pytest.raises(ScriptError, match=f'device "another", not "{device}"'):
            recall_program.main(argv)
        path.write_text(json.dumps({name: value for name, value in claimed.items() if name != "device"}))
        if device == "cpu":  # which alone there was when folders did not tell
            recall_program.main(argv)
        path.write_text(json.dumps(claimed))
        with pytest.raises(ScriptError, match="max_steps 20, not 9"):
            recall_program.main([*argv, "--max_steps", "9"])
        with pytest.raises(ScriptError, match='variant conv .*"kernel_size": 4.*, not .*"kernel_size": 5'):
            recall_program.main([*argv, "--variants", "conv={model_type: conv_lm, kernel_size: 5}"])

    def test_a_variant_may_have_options_of_its_own(self, argv, tmp_path, monkeypatch):
        seen, train = {}, recall.train
        monkeypatch.setattr(
            recall,
            "train",
            lambda options, config, seed: (
                seen.update({config.model_type: options.max_steps}) or train(options, config, seed)
            ),
        )
        recall_program.main([*argv, "--seeds", "0", "--training_by_variant", "conv={max_steps: 30}"])
        assert seen == {"softmax_lm": 20, "conv_lm": 30}
        told = [line for line in (tmp_path / "out" / "results.md").read_text().splitlines() if "s of training" in line]
        assert ["s of training in 30 steps, sees" in line for line in told] == ["- conv" in line for line in told]

    def test_some_of_the_variants_now_and_the_others_later(self, argv, tmp_path, monkeypatch):
        argv += ["--seeds", "0"]
        trained, train = [], recall.train
        monkeypatch.setattr(
            recall,
            "train",
            lambda options, config, seed: trained.append(config.model_type) or train(options, config, seed),
        )
        recall_program.main([*argv, "--only", "softmax"])
        recall_program.main(argv)
        assert trained == ["softmax_lm", "conv_lm"]
        assert set(json.loads((tmp_path / "out" / "results.json").read_text())["variants"]) == set(VARIANTS)
