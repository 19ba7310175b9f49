"""Sharing on the Hub, over HTTP against hub_server: what is pushed, and what goes wrong."""

import json
import re
import shlex

import peft
import pytest
import torch
from hub_models import STANDARD_FILES, save_model
from hub_server import READER, WRITER, File, Repository
from huggingface_hub import ModelCard, constants
from safetensors.torch import load as load_tensors
from transformers import AutoModelForCausalLM

from ordnung.scripts import push_to_hub
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.hub import sharing
from ordnung.scripts.hub.sharing import Target, check_target, push


def test_a_push_is_one_complete_commit(hub, checkpoint):
    (checkpoint / "run.yaml").write_text("seed: 0\n")
    (checkpoint / "optimizer.pt").write_text("not for others")
    address = push(checkpoint, check_target(Target("whale", language=["en"])))
    assert address == f"{hub.url}/ahab/whale"
    repository = hub.repositories["ahab/whale"]
    assert repository.messages == ["initial commit", Target.commit_message] and not repository.private
    files = repository.files()
    extra = {".gitattributes", "results.json", "run.yaml", ".eval_results/nyu-mll_glue.yaml"}
    assert set(files) == STANDARD_FILES | extra
    expected = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    weights = load_tensors(files["model.safetensors"])
    assert weights and all(torch.equal(weights[name], expected[name]) for name in weights)
    assert all((checkpoint / "hub" / name).read_bytes() == files[name] for name in set(files) - {".gitattributes"})


def test_pushing_again_changes_nothing(hub, checkpoint):
    for _ in range(2):
        push(checkpoint, Target("ahab/whale"))
    assert len(hub.repositories["ahab/whale"].commits) == 2
    assert len(hub.seen("PUT /lfs/")) == 1


@pytest.mark.parametrize("lost_answers", [0, 1])
def test_an_existing_repository_keeps_its_files_and_loses_old_weights(lost_answers, hub, checkpoint):
    hub.faults["/commit/main!"] = lost_answers
    repository = hub.repositories["ahab/whale"] = Repository(private=True)
    kept = {"notes.txt": b"mine", "results.json": b'{"mine": 1}', ".eval_results/mine.yaml": b"[]"}
    old = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}"}
    old |= {"adapter_config.json": b"{}", "adapter_model.safetensors": b"old"}
    repository.commit("main", {name: File(content, False) for name, content in (kept | old).items()}, "by hand")
    (checkpoint / "results.json").unlink()
    push(checkpoint, check_target(Target("ahab/whale")))
    files = repository.files()
    assert kept.items() <= files.items() and "model.safetensors" in files and not old.keys() & files.keys()
    assert repository.private and repository.messages == ["by hand", Target.commit_message]


def test_the_scores_of_an_earlier_model_go_with_it(hub, checkpoint):
    (checkpoint / "run.yaml").write_text("seed: 0\n")
    push(checkpoint, Target("ahab/whale"))
    repository = hub.repositories["ahab/whale"]
    scores = {".eval_results/nyu-mll_glue.yaml", "results.json", "run.yaml"}
    assert scores < set(repository.files())
    tree = repository.commits[repository.branches["main"]]
    repository.commit("main", {**tree, ".eval_results/mine.yaml": File(b"[]", False)}, "by hand")
    for name in ("run.yaml", "results.json"):
        (checkpoint / name).unlink()
    push(checkpoint, Target("ahab/whale"))
    files = set(repository.files())
    assert not scores & files and files >= STANDARD_FILES | {".eval_results/mine.yaml"}


@pytest.mark.parametrize(
    "part",
    ["/repos/create", "/repos/create!", "/branch/", "/branch/!", "PUT /lfs/", "PUT /lfs/!", "/preupload/"]
    + ["/commit/small", "/commit/small!"],
)
def test_a_dropped_connection_is_taken_up_again(part, hub, checkpoint):
    hub.faults[part] = 1
    push(checkpoint, check_target(Target("ahab/whale", revision="small")))
    assert hub.faults[part] == 0
    repository = hub.repositories["ahab/whale"]
    assert STANDARD_FILES < set(repository.files("small"))
    assert repository.messages == ["initial commit", Target.commit_message]  # a lost answer makes no second commit


def test_a_half_finished_upload_goes_on_with_the_command_that_is_told(hub, checkpoint, capsys):
    hub.faults["/commit/main"] = 100
    target = Target("ahab/whale", revision="v1.0", private=True, language=["en", "fr"], commit_message="It's here")
    hub.faults["/commit/v1.0"] = 100
    with pytest.raises(ScriptError, match="is complete, but it was not uploaded .* cannot be reached") as caught:
        push(checkpoint, check_target(target))
    assert STANDARD_FILES < {path.name for path in (checkpoint / "hub").iterdir()}
    assert set(hub.repositories["ahab/whale"].files("v1.0")) == {".gitattributes"}
    hub.faults.clear()
    command = str(caught.value).partition("push it again by: ")[2]
    assert push_to_hub.main(shlex.split(command)[2:]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/ahab/whale/tree/v1.0"
    repository = hub.repositories["ahab/whale"]
    assert STANDARD_FILES < set(repository.files("v1.0")) and repository.messages[-1] == "It's here"
    assert ModelCard((checkpoint / "hub" / "README.md").read_text()).data.language == ["en", "fr"]
    assert len(hub.seen("PUT /lfs/")) == 1 and len(hub.objects) == 1


def test_a_revision_leaves_main_alone(hub, checkpoint):
    address = push(checkpoint, check_target(Target("ahab/whale", revision="small")))
    assert address == f"{hub.url}/ahab/whale/tree/small"
    repository = hub.repositories["ahab/whale"]
    assert set(repository.files("main")) == {".gitattributes"}
    assert STANDARD_FILES < set(repository.files("small"))
    assert '"ahab/whale", revision="small"' in repository.files("small")["README.md"].decode()


def test_private_is_private(hub, checkpoint):
    push(checkpoint, check_target(Target("ahab/whale", private=True)))
    assert hub.repositories["ahab/whale"].private
    hub.repositories["ahab/open"] = Repository(private=False)
    hub.repositories["ahab/open"].commit("main", {}, "by hand")
    with pytest.raises(ScriptError, match="ahab/open is there already and public"):
        check_target(Target("ahab/open", private=True))


def test_what_the_hub_would_refuse_is_told_first(hub, monkeypatch, tmp_path):
    for target, message in (
        (Target("whale", token="hf_wrong"), "refuses the access token"),
        (Target("whale", token=READER), "the token of ahab may only read"),
        (Target("melville/whale"), "cannot make a repository for 'melville'; there are ahab, pequod"),
        (Target("a whale!"), "cannot push to a whale!: .*"),
    ):
        with pytest.raises(ScriptError, match=message):
            check_target(target)
    hub.repositories["melville/whale"] = Repository(private=False)
    hub.repositories["melville/whale"].commit("main", {}, "by hand")
    with pytest.raises(ScriptError, match="may not write there"):
        check_target(Target("melville/whale"))
    assert check_target(Target("pequod/whale")).repo_id == "pequod/whale"
    assert not hub.seen("POST")  # nothing was made on the way

    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ScriptError, match="no access token; run `hf auth login`"):
        check_target(Target("whale"))
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ScriptError, match="http://127.0.0.1:9 cannot be reached .* HF_ENDPOINT"):
        check_target(Target("whale"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ScriptError, match="offline mode is on; unset HF_HUB_OFFLINE"):
        check_target(Target("whale"))


def test_a_dry_run_shows_all_and_asks_nobody(hub, checkpoint, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    arguments = ["--model_name_or_path", str(checkpoint), "--hub_model_id", "ahab/whale", "--private", "--dry_run"]
    assert push_to_hub.main(arguments) == 0
    shown = capsys.readouterr().out
    assert not hub.requests and f"{hub.url}/ahab/whale (private, if new)" in shown
    for path in (checkpoint / "hub").iterdir():
        assert not path.is_file() or re.search(rf"^ +{path.stat().st_size:,}  {re.escape(path.name)}$", shown, re.M)
    assert shown.endswith((checkpoint / "hub" / "README.md").read_text())
    assert push_to_hub.main([*arguments, "--hub_model_id", "whale"]) == 0  # who the user is would be asked
    assert 'from_pretrained("your-name/whale", trust' in capsys.readouterr().out and not hub.requests
    with pytest.raises(ScriptError, match="cannot push to a whale!"):
        push_to_hub.main([*arguments, "--hub_model_id", "a whale!"])


def test_what_cannot_be_shared_is_told_in_words(hub, checkpoint, tmp_path, tokenizer):
    target = Target("ahab/whale")
    with pytest.raises(ScriptError, match="nowhere holds no config.json"):
        sharing.write_folder(tmp_path / "nowhere", target)
    for content, message in (
        ("{", "cannot be read"),
        ("[]", "must hold an object, not a list"),
        ('{"eval_results": [{"metric": 1}]}', "no EvalResult can be made"),
    ):
        (checkpoint / "results.json").write_text(content)
        with pytest.raises(ScriptError, match=message):
            sharing.write_folder(checkpoint, target)
        assert not (checkpoint / "hub").exists() and not (checkpoint / ".tmp-hub").exists()
    (checkpoint / "results.json").unlink()
    config = json.loads((checkpoint / "config.json").read_text())
    for name, message in (
        ("LossyLM", "of class LossyLM, which neither"),
        ("T5ForConditionalGeneration", "none of the heads"),
        ("GPT2DoubleHeadsModel", "none of the heads"),
    ):
        (checkpoint / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
        with pytest.raises(ScriptError, match=message):
            sharing.write_folder(checkpoint, target)
    for fields in ({"hidden_size": 24}, {"hidden_size": 17}):  # not that of the weights; not a multiple of the heads
        (checkpoint / "config.json").write_text(json.dumps({**config, **fields}))
        with pytest.raises(ScriptError, match="cannot be loaded"):
            sharing.write_folder(checkpoint, target)
    (checkpoint / "config.json").write_text(json.dumps(config))
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(ScriptError, match="cannot be loaded"):
        sharing.write_folder(checkpoint, target)
    (checkpoint / "model.safetensors").write_bytes(weights)
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer_config.json").unlink()
    with pytest.raises(ScriptError, match="tokenizer of .* cannot be loaded"):
        sharing.write_folder(checkpoint, target)


def test_an_adapter_goes_to_the_hub_if_its_base_is_there(hub, tmp_path, tokenizer):
    base = save_model(tmp_path / "base", tokenizer)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    for name, fails in ((str(tmp_path / "base"), True), ("ahab/base", False)):
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": name}))
        if fails:
            with pytest.raises(ScriptError, match="which others do not have.*merge"):
                push(tmp_path / "adapter", Target("ahab/adapter"))
    push(tmp_path / "adapter", Target("ahab/adapter"))
    files = hub.repositories["ahab/adapter"].files()
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} < set(files)
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "ahab/base" and card.data.library_name == "peft"
    assert "AutoPeftModelForCausalLM.from_pretrained" in card.text
