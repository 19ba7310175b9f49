"""Builds the test class of one row out of a transformers checkout. run.py has pytest collect this file, once a process.

The transformers under test is the installed one: of the checkout only `tests` is imported.
"""

import fnmatch
import importlib
import os
import sys
import types
import unittest
from unittest import mock

import torch
import transformers
from families import EXCLUDED, ROWS
from transformers import AutoConfig, AutoModel
from transformers.testing_utils import torch_device

import ordnung

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 37,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The common tests import these, and the source distribution of transformers does not hold them: module -> stand-ins
NOT_IN_SDIST = {
    "tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "tests.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "tests.utils.test_configuration_utils": {"config_common_kwargs": {}},
}


def import_tests(checkout: str) -> tuple[types.SimpleNamespace, list[str]]:
    """Imports the classes that test files in transformers build on; also returns the modules that were stood in for."""
    missing = []
    for name, contents in NOT_IN_SDIST.items():
        if not os.path.exists(os.path.join(checkout, *name.split(".")) + ".py"):
            missing.append(name)
            sys.modules[name] = types.ModuleType(name)
            vars(sys.modules[name]).update(contents)
    sys.path.insert(0, checkout)
    # The tests look classes up in a second copy of transformers, loaded from beside them: give them the installed one.
    with mock.patch("transformers.utils.direct_transformers_import", lambda *args, **kwargs: transformers):
        common = importlib.import_module("tests.test_modeling_common")
        config = importlib.import_module("tests.test_configuration_common")
        training = importlib.import_module("tests.test_training_mixin")
    sys.path.remove(checkout)
    return types.SimpleNamespace(**{**vars(training), **vars(config), **vars(common)}), missing


class FamilyTester:
    """The object that the common tests ask for configs and inputs, and for the sizes that they should expect."""

    batch_size, seq_length, num_choices, is_training = 13, 7, 3, True

    def __init__(self, row, classes):
        self.config = {**SMALL, **row.config}
        self.model_type = row.model_type
        self.causal_lm_class = classes.get("ForCausalLM")
        vars(self).update(self.config)

    def get_config(self):
        return AutoConfig.for_model(self.model_type, **self.config)

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, self.seq_length)
        input_ids = torch.randint(0, self.vocab_size, shape, device=torch_device)
        # row i ends with i + 1 real tokens, up to all of them; on the left is where `generate` takes padding
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids).tril().flip(1)}


def states(cache_layer) -> list[torch.Tensor]:
    """The floating-point tensors of a cache layer, wherever it keeps them; counters of tokens are none."""
    held = []
    for value in vars(cache_layer).values():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        held += [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return held


class FamilyChecks:
    """Where the common tests presume a stack of transformers' own attention layers, what holds for our stacks."""

    # the tests find no year of copyright in our config files and would leave this one out
    test_can_init_all_missing_weights_before_2023 = True

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_attention_outputs(self):
        # only attention layers have weights to return
        attends = ("full_attention", "cubic_prefix", "sparse_attention")
        self.model_tester.num_hidden_layers = sum(
            kind in attends for kind in self.model_tester.get_config().layer_types
        )
        super().test_attention_outputs()

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        self.assertEqual(len(past_key_values), config.num_hidden_layers)
        with torch.device("meta"):
            model = AutoModel.from_config(config)
        held = sum(state.numel() for layer in past_key_values.layers for state in states(layer))
        self.assertEqual(held * model.dtype.itemsize, batch_size * model.cache_bytes(seq_length))

    def _check_caches_are_equal(self, cache1, cache2):
        self.assertEqual(len(cache1), len(cache2))
        for layer1, layer2 in zip(cache1.layers, cache2.layers):
            self.assertIs(type(layer1), type(layer2))
            self.assertEqual(int(layer1.get_seq_length()), int(layer2.get_seq_length()))
            torch.testing.assert_close(states(layer1), states(layer2))


def build(name: str, checkout: str) -> type[unittest.TestCase]:
    """The test class of the row called `name`."""
    row = ROWS[name]
    tests, missing = import_tests(checkout)
    classes = {head: getattr(ordnung, class_name) for head, class_name in row.classes.items()}

    bases = [FamilyChecks, tests.ModelTesterMixin]
    if "ForCausalLM" in classes:
        bases += [tests.GenerationTesterMixin, tests.TrainingTesterMixin]

    def setUp(self):
        torch.manual_seed(0)
        self.model_tester = FamilyTester(row, classes)
        if self._testMethodName == "test_reverse_loading_mapping":
            # the only keys that checkpoints call otherwise are those of a causal head's transform
            self.model_tester.config["lm_head_transform"] = self.model_tester.get_config().is_decoder
        self.config_tester = tests.ConfigTester(self, classes["Model"].config_class, **self.model_tester.config)

    members = {"model_tester": None, "setUp": setUp, "all_model_classes": tuple(classes.values()), **row.flags}
    test_class = type("FamilyTest", (*bases, unittest.TestCase), members)

    excluded = dict(row.excluded)
    if "tests.generation.test_utils" in missing:
        excluded["test_generation_tester_mixin_inheritance"] = "The checkout has no tests/generation."
    for pattern, reason in excluded.items():
        matches = [test for test in dir(test_class) if fnmatch.fnmatchcase(test, pattern)]
        if not matches and not missing:
            raise ValueError(f"The row {name!r} excludes {pattern!r}, but the checkout has no such test: drop it.")
        for test in matches:
            setattr(test_class, test, unittest.skip(EXCLUDED + reason)(getattr(test_class, test)))
    return test_class


FamilyTest = build(os.environ["CONFORMANCE_ROW"], os.environ["CONFORMANCE_CHECKOUT"])
