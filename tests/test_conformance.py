"""tests/conformance itself, on a small checkout made here; its table covers every family and head."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

HARNESS = Path(__file__).parent / "conformance"
CHECKOUT = {
    "src/transformers/__init__.py": f'__version__ = "{transformers.__version__}"\n',
    "tests/test_configuration_common.py": """
class ConfigTester:
    def __init__(self, parent, config_class, **fields):
        self.config_class, self.fields = config_class, fields

    def run_common_tests(self):
        assert self.config_class(**self.fields).num_hidden_layers == self.fields["num_hidden_layers"]
""",
    "tests/test_training_mixin.py": "class TrainingTesterMixin: pass\n",
    "tests/test_modeling_common.py": """
from .exporters.test_export import ExportTesterMixin
from .generation.test_utils import GenerationTesterMixin


class ModelTesterMixin(ExportTesterMixin):
    def test_forward(self):
        for model_class in self.all_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            model_class(config)(**inputs)

    def test_attention_outputs(self):
        if not self.has_attentions:
            self.skipTest("no weights")
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config._attn_implementation = "eager"
        weights = self.all_model_classes[0](config)(**inputs, output_attentions=True).attentions
        self.assertEqual(len(weights), self.model_tester.num_hidden_layers)

    has_attentions = True

    def test_model_rope_scaling_from_config_0(self):
        self.assertTrue(self.has_attentions)

    def test_in_parts(self):
        for part in range(2):
            with self.subTest(part=part):
                self.assertFalse(part, "the second part fails")

    def test_needs_a_gpu(self):
        self.skipTest("no GPU here")
""",
    "tests/generation/test_utils.py": """
import torch


class GenerationTesterMixin:
    def test_cache(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config.eos_token_id = None
        for model_class in self.all_model_classes:
            if model_class.can_generate():
                model = model_class(config).eval()
                steps = [
                    model.generate(**inputs, max_new_tokens=n, do_sample=False, return_dict_in_generate=True)
                    for n in (3, 3, 4)
                ]
                first, second, longer = [step.past_key_values for step in steps]
        length = first.get_seq_length()
        self._check_past_key_values_for_generate(13, first, length, config)
        self._check_caches_are_equal(first, second)
        for wrong in (
            lambda: self._check_past_key_values_for_generate(12, first, length, config),
            lambda: self._check_caches_are_equal(first, longer),
        ):
            self.assertRaises(AssertionError, wrong)
""",
}


@pytest.fixture
def harness(monkeypatch):
    """The folder of the harness among those that are imported from."""
    monkeypatch.syspath_prepend(str(HARNESS))
    yield
    for name in ("run", "families"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(harness, monkeypatch, capfd):
    """`run.py` with these words: its exit status and what it writes. Each row has a process of its own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import run

    def call(*args) -> tuple[int, str]:
        try:
            code = run.main(list(map(str, args)))
        except SystemExit as end:
            code = end.code
        return code, "".join(capfd.readouterr())

    return call


@pytest.fixture
def checkout(tmp_path):
    for name, text in CHECKOUT.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.fixture
def families(harness):
    import families

    return families


def test_table_covers_every_class_and_gives_reasons(families):
    assert families.untested(families.ROWS) == []
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    for name, row in families.ROWS.items():
        config = transformers.AutoConfig.for_model(row.model_type, attn_implementation="eager", **sizes, **row.config)
        if row.flags.get("has_attentions", True):
            model = transformers.AutoModel.from_config(config)
            assert model(torch.arange(1, 9)[None], output_attentions=True).attentions, name
        for pattern, reason in row.excluded.items():
            assert pattern.startswith("test_")
            assert len(reason.split()) > 5


def test_default_rows_test_every_class(families):
    """Of a new family, which needs none of its own."""
    for model_type in families.REGISTERED:
        others = {name: row for name, row in families.ROWS.items() if row.model_type != model_type}
        assert set(families.untested(others)) == set(families.heads_of(model_type).values())
        assert families.untested({**others, **families.default_rows(model_type)}) == []


def test_runs_rows_and_reports(run, checkout):
    code, output = run(checkout, "--rows", "conv_lm", "conv_lm-hybrid")
    assert code == 1, output
    table = {line.split()[0]: line.split()[1:4] for line in output.splitlines() if line.startswith("conv_lm")}
    # forward, config and cache pass; in both rows one fails in its second part and one is skipped by itself
    assert table["conv_lm"] == ["3", "1", "3"], output  # also skipped: attention weights; excluded: rope
    assert table["conv_lm-hybrid"] == ["5", "1", "1"], output
    assert "conv_lm: test_in_parts" in output and "the second part fails" in output
    assert "   2  no GPU here" in output
    excluded = output.split("Excluded by tests/conformance:")[1].split("Failed:")[0]
    assert "no rotary embedding" in excluded and "conv_lm: test_model_rope_scaling_from_config_0" in excluded
    assert output.rstrip().endswith("8 passed, 2 failed, 4 skipped")


def test_passes_without_the_generation_tests_and_names_what_is_missing(run, checkout):
    (checkout / "tests/generation/test_utils.py").unlink()
    with open(checkout / "tests/test_modeling_common.py", "a") as file:
        file.write("    def test_generation_tester_mixin_inheritance(self):\n        self.fail()\n")
    code, output = run(checkout, "--rows", "softmax_lm", "-k", "forward or config or inheritance")
    assert code == 0, output
    assert "The checkout has no tests/generation." in output
    assert output.rstrip().endswith("3 passed, 0 failed, 1 skipped")


def test_an_exclusion_that_fits_no_test_fails(run, checkout):
    # only a checkout that has all modules can tell
    for name, text in {
        "exporters/test_export.py": "class ExportTesterMixin: pass\n",
        "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
        "test_training_mixin.py": "class TrainingTesterMixin:\n    def test_generate_with_quant_cache(self): pass\n",
    }.items():
        (checkout / "tests" / name).parent.mkdir(exist_ok=True)
        (checkout / "tests" / name).write_text(text)
    path = checkout / "tests/test_modeling_common.py"
    path.write_text(path.read_text().replace("test_model_rope", "test_rope"))
    code, output = run(checkout, "--rows", "conv_lm")
    assert code == 1
    assert "excludes 'test_model_rope_scaling_from_config_*'" in output and "drop it" in output


@pytest.mark.parametrize("break_it", ["no tests", "another version"])
def test_a_wrong_checkout_is_refused_in_words(run, checkout, break_it):
    if break_it == "no tests":
        (checkout / "tests/test_modeling_common.py").unlink()
    else:
        (checkout / "src/transformers/__init__.py").write_text('__version__ = "1.2.3"\n')
    code, output = run(checkout)
    assert code == 2
    assert ("git clone" if break_it == "no tests" else "transformers==1.2.3") in output
    assert transformers.__version__ in output


def test_is_no_part_of_the_ordinary_tests():
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", str(HARNESS)], capture_output=True, text=True
    )
    assert collected.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, collected.stdout
