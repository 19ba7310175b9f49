"""Stand-alone folders: what save_standalone writes loads, bit-equal, where ordnung cannot be imported."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from strangers import REFUSE
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
    set_seed,
)

import ordnung
from ordnung.modeling import standalone
from ordnung.modeling.registration import FAMILIES, heads_of

AUTO_CLASSES = {
    auto.__name__: auto
    for auto in (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )
}
HEADS = [name for name in AUTO_CLASSES if name != "AutoModelForMaskedLM"]
SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": 0}
CONV = {"model_type": "conv_lm", "kernel_size": 4}
SOFTMAX = {"model_type": "softmax_lm", "position_embedding_type": "rope"}
LINFORMER = {"model_type": "linformer_lm", "projected_size": 8, "is_decoder": True}
ENCODER = {"model_type": "softmax_lm", "position_embedding_type": "learned", "is_decoder": False}
SPARSE = {"model_type": "sparse_attention_lm", "sliding_window": 4, "num_global_tokens": 2, "global_stride": 3}
QUADRATIC = {"model_type": "quadratic_kernel_lm", "sliding_window": 4, "centering": "prefix"}
CUBIC = {"model_type": "cubic_prefix_lm", "prefix_stride": 2}

# name -> (Auto class, config fields, arguments of save_standalone)
CASES = {
    **{f"conv-{head}": (head, CONV, {}) for head in HEADS},
    **{f"softmax-{head}": (head, SOFTMAX, {}) for head in HEADS},
    **{f"encoder-{head}": (head, ENCODER, {}) for head in AUTO_CLASSES if head != "AutoModelForCausalLM"},
    "linformer": ("AutoModelForCausalLM", LINFORMER, {}),
    "linformer-encoder": ("AutoModelForMaskedLM", {**LINFORMER, "is_decoder": False}, {}),
    **{f"cubic-{head}": (head, CUBIC, {}) for head in HEADS},
    **{f"sparse-{head}": (head, SPARSE, {}) for head in ("AutoModel", "AutoModelForCausalLM")},
    "sparse-encoder": (
        "AutoModelForMaskedLM",
        {**SPARSE, "is_decoder": False, "global_projections": "separate"},
        {},
    ),
    **{f"quadratic-{head}": (head, QUADRATIC, {}) for head in ("AutoModel", "AutoModelForCausalLM")},
    "tied": ("AutoModelForCausalLM", {**CONV, "tie_word_embeddings": True}, {}),
    "untied": ("AutoModelForCausalLM", {**CONV, "tie_word_embeddings": False, "lm_head_bias": True}, {}),
    "bfloat16": ("AutoModelForCausalLM", {**CONV, "dtype": torch.bfloat16}, {}),
    "sharded": ("AutoModelForCausalLM", CONV, {"max_shard_size": "5KB"}),
    "hybrid": (
        "AutoModelForCausalLM",
        {**CONV, "layer_types": ["causal_conv", "full_attention"], "gate": "input_output"},
        {},
    ),
}

# a family that is not among them, as it comes
NAMED = {fields["model_type"] for _, fields, _ in CASES.values()}
CASES |= {name: ("AutoModelForCausalLM", {"model_type": name}, {}) for name in FAMILIES if name not in NAMED}

# Runs where ordnung cannot be imported: loads every folder, saves it again, loads that, and reports.
STRANGER = """
import json, pathlib, sys, torch, transformers
torch.set_grad_enabled(False)  # as where the expected outputs were made: kernels differ in rounding
root, reports = pathlib.Path(sys.argv[1]), {}
ids = torch.load(root / "ids.pt")

def outputs(auto, folder):
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    results = [x for x in model(ids).to_tuple() if isinstance(x, torch.Tensor)]
    if model.can_generate():
        results.append(model.generate(ids, max_new_tokens=8, do_sample=False))
    return model, results

for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    expected = torch.load(folder / "expected.pt")
    auto = (folder / "auto_class").read_text()
    model, first = outputs(auto, folder)
    again = root.with_name("again") / folder.name
    model.save_pretrained(again, max_shard_size="5KB")
    _, second = outputs(auto, again)
    reports[folder.name] = {
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "equal": [torch.equal(a, b) for a, b in zip(expected, first, strict=True)],
        "again": [torch.equal(a, b) for a, b in zip(expected, second, strict=True)],
        "auto_map": json.loads((again / "config.json").read_text())["auto_map"],
    }
    head = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, trust_remote_code=True, num_labels=5, ignore_mismatched_sizes=True)
    reports[folder.name]["other_head"] = type(head).__name__

pipe = transformers.pipeline("text-generation", str(root / "tied"), trust_remote_code=True)
text = pipe("the whale", max_new_tokens=4, do_sample=False)[0]["generated_text"]
reports["pipeline"] = text
hub = transformers.AutoModelForCausalLM.from_pretrained("someone/whale", trust_remote_code=True)
reports["hub"] = torch.equal(hub.eval()(ids).logits, torch.load(root / "hybrid" / "expected.pt")[0])
reports["ordnung"] = "ordnung" in sys.modules
print(json.dumps(reports))
"""


def make_model(auto="AutoModelForCausalLM", **fields):
    set_seed(0)
    fields = {**SMALL, **CONV, **fields}
    dtype = fields.pop("dtype", torch.float32)
    return AUTO_CLASSES[auto].from_config(AutoConfig.for_model(**fields)).to(dtype).eval()


def make_tokenizer():
    words = {word: i for i, word in enumerate(["<eos>", "<unk>", "the", "whale", *"abcdefgh"])}
    backend = Tokenizer(models.WordLevel(words, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


@torch.no_grad()
def expected_outputs(model, ids):
    results = [x for x in model(ids).to_tuple() if isinstance(x, torch.Tensor)]
    if model.can_generate():
        results.append(model.generate(ids, max_new_tokens=8, do_sample=False))
    return results


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What a process without ordnung found in the folders of all cases."""
    home = tmp_path_factory.mktemp("standalone")
    root = home / "folders"
    root.mkdir()
    ids = torch.randint(1, 64, (1, 11), generator=torch.Generator().manual_seed(1))
    torch.save(ids, root / "ids.pt")
    for name, (auto, fields, arguments) in CASES.items():
        model, folder = make_model(auto, **fields), root / name
        ordnung.save_standalone(model, folder, make_tokenizer(), **arguments)
        torch.save(expected_outputs(model, ids), folder / "expected.pt")
        (folder / "auto_class").write_text(auto)

    # From the Hub the loader fetches file by file, by another path than for a folder: lay out a cache as if it had.
    repository, commit = home / "hub" / "models--someone--whale", "0" * 40
    shutil.copytree(root / "hybrid", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)

    environment = {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REFUSE + STRANGER, str(root)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=home, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_loads_without_ordnung(name, reports):
    auto, fields, _ = CASES[name]
    report = reports[name]
    family = FAMILIES[fields["model_type"]][0]
    assert not reports["ordnung"]
    assert report["class"] == family + auto.removeprefix("Auto").removeprefix("Model" if "For" in auto else "")
    assert report["dtype"] == str(fields.get("dtype", torch.float32))
    assert report["equal"] and all(report["equal"])
    assert report["again"] and all(report["again"])
    assert report["other_head"] == f"{family}ForSequenceClassification"


@pytest.mark.slow
def test_pipeline_and_hub_layout(reports):
    assert reports["pipeline"].startswith("the whale")
    assert reports["hub"]


@pytest.mark.slow
@pytest.mark.parametrize("module", FAMILIES)
def test_auto_map_is_complete(module, reports):
    """With it each head loads as the ones do that were loaded."""
    family, name = FAMILIES[module][0], next(name for name, case in CASES.items() if case[1]["model_type"] == module)
    expected = {"AutoConfig": f"configuration_{module}.{family}Config"}
    expected |= {auto: f"modeling_{module}.{name_of_class}" for auto, name_of_class in heads_of(module).items()}
    assert reports[name]["auto_map"] == expected


def test_only_the_needed_files_are_written(tmp_path):
    files = ordnung.save_standalone(make_model(), tmp_path / "folder", make_tokenizer())
    assert sorted(files) == sorted((tmp_path / "folder").iterdir())
    names = {path.name for path in files}
    assert {"modeling_conv_lm.py", "configuration_conv_lm.py", "backbone.py"} <= names
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if "softmax_lm" in name or name == "standalone.py"]
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_ordnung_loads_its_own_classes_and_saves_them_plainly(tmp_path):
    model = make_model()
    ordnung.save_standalone(model, tmp_path / "folder")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", trust_remote_code=True).eval()
    assert type(loaded) is type(model)
    loaded.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    ids = torch.arange(1, 9)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_existing_folder_keeps_other_files_and_loses_old_weights(tmp_path):
    ordnung.save_standalone(make_model(), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    other = make_model(hidden_size=32)
    ordnung.save_standalone(other, tmp_path, max_shard_size="5KB")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(1, 9)[None]
    assert torch.equal(loaded(ids).logits, other(ids).logits)


@pytest.mark.parametrize("error", [SafetensorError("No space left on device"), KeyboardInterrupt()])
def test_failure_in_the_middle_leaves_the_old_checkpoint(error, tmp_path, monkeypatch):
    model, folder = make_model(), tmp_path / "folder"
    ordnung.save_standalone(model, folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    other = make_model(hidden_size=32)

    def fail(path, **kwargs):
        (path / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(other, "save_pretrained", fail)
    with pytest.raises(type(error)) as caught:
        ordnung.save_standalone(other, folder)
    assert caught.value.__notes__ == [f"save_standalone changed nothing in {folder}"]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_wrong_models_and_folders(tmp_path):
    class Own(type(make_model())):
        pass

    with pytest.raises(TypeError, match="not Linear: call merge_and_unload"):
        ordnung.save_standalone(nn.Linear(2, 2), tmp_path)
    with pytest.raises(TypeError, match="Own is defined in .*, not in ordnung"):
        ordnung.save_standalone(Own(make_model().config), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file"):
        ordnung.save_standalone(make_model(), tmp_path / "file")


def test_adapters_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = make_model()
    model.add_adapter(peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(TypeError, match="carries PEFT adapters"):
        ordnung.save_standalone(model, tmp_path)


@pytest.fixture
def flatten(tmp_path, monkeypatch):
    """Writes a package of the given modules and flattens its module `toy.a.main`; returns the folder of flat files."""

    def call(main, **modules):
        for name in [name for name in sys.modules if name.partition(".")[0] == "toy"]:
            monkeypatch.delitem(sys.modules, name)
        package, flat = tmp_path / "toy", tmp_path / "flat"
        for name, source in {"__init__": "", "a.__init__": "", "a.main": main, **modules}.items():
            path = package / f"{name.replace('.', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        flat.mkdir()
        standalone.write_code(["toy.a.main"], flat)
        return flat

    monkeypatch.syspath_prepend(tmp_path)
    return call


def test_imports_are_rewritten_through_the_whole_closure(flatten):
    doc = '"""Doc.\n\n>>> from toy.b import B\n"""\nimport math\n'
    main = doc + "from toy.b import (\n    B,\n)\nfrom toy.a.c import C as D\n"
    flat = flatten(main, **{"b": "from toy.a.c import C\nB = C\n", "a.c": "C = 3\n", "a.unused": ""})
    assert {path.name for path in flat.iterdir()} == {"main.py", "b.py", "c.py"}
    rewritten = main.replace("\nfrom toy.b import (", "\nfrom .b import (").replace("from toy.a.c", "from .c")
    comment, _, source = (flat / "main.py").read_text().partition("\n")
    assert comment.startswith("# toy.a.main, written as a flat file")
    assert source == rewritten


@pytest.mark.parametrize(
    ("main", "message"),
    [
        ("import toy.b\n", r"main.py:1: 'import toy.b' .*: write from toy.<module> import <name>"),
        ("import math, toy\n", r"write from toy.<module> import <name>"),
        ("from toy.b import *\n", r"name what is imported"),
        ("from ..b import B\n", r"main.py:1: 'from ..b import B' .*: write the absolute import"),
        ("from .c import C\n", r"write the absolute import"),
        ("def f():\n    from toy.b import B\n", r"main.py:2: .*: move it to the top level"),
        ("if True:\n    from toy.b import B\n", r"move it to the top level"),
        ("from toy.a import c\n", r"toy.a is a package: import from the module"),
        ("from toy import a\n", r"toy is a package"),
        ("x = 1; from toy.b import B\n", r"toy.a.main: transformers' loader reads relative imports of \[\]"),
        ('"""\nfrom .nowhere import X\n"""\n', r"reads relative imports of \['nowhere'\], the code has \[\]"),
        ("import scipy.stats\n", r"toy.a.main needs scipy, .*: put an optional import inside `try`"),
        ("def f():\n    import triton\n", r"toy.a.main needs triton"),
        ("from toy.d.c import C\nfrom toy.a.c import C as D\n", r"toy.\w.c and toy.\w.c would both become c.py"),
    ],
)
def test_what_the_loader_cannot_follow_is_refused(main, message, flatten):
    with pytest.raises(ValueError, match=message):
        flatten(main, **{"b": "B = 1\n", "a.c": "C = 1\n", "d.__init__": "", "d.c": "C = 2\n"})


def test_optional_imports_inside_try_are_allowed(flatten):
    flat = flatten("import json\nimport torch\ntry:\n    import triton\nexcept ImportError:\n    triton = None\n")
    assert "import triton" in (flat / "main.py").read_text()
