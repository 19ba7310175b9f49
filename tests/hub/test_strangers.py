"""What others do with a shared checkpoint, where ordnung is not installed; and the command itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from hub_models import STANDARD_FILES, save_model
from hub_server import WRITER
from strangers import REFUSE
from transformers import AutoModelForSequenceClassification

from ordnung.modeling.registration import FAMILIES, heads_of
from ordnung.scripts.hub.sharing import Target, push

ROOT = Path(__file__).parents[2]
# Runs where ordnung cannot be imported: loads every repository from the endpoint, then runs its card's snippet.
STRANGER = """
import json, re, torch, transformers
from huggingface_hub import ModelCard
torch.set_grad_enabled(False)  # attention has other kernels, with other rounding, where gradients are needed
expected, reports = torch.load(sys.argv[1]), {}
for repo, (auto, ids, logits) in expected.items():
    (snippet,) = re.findall("```python\\n(.*?)```", ModelCard.load(repo).text, re.S)
    names = {}
    exec(snippet, names)
    models = [names["model"]]
    if auto:
        models.append(getattr(transformers, auto).from_pretrained(repo, trust_remote_code=True))
    reports[repo] = all(torch.equal(model.eval()(ids)[0], logits) for model in models)
    if not auto:
        assert names["model"].config.id2label[0] == "sunk", names["model"].config
print(json.dumps({"equal": reports, "ordnung": "ordnung" in sys.modules}))
"""


@pytest.mark.slow
def test_everybody_can_load_every_head_and_run_its_snippet(hub, tmp_path, tokenizer):
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    expected = {}
    # every head of one family and every family; test_standalone.py has the others without the Hub
    shared = {("conv_lm", auto) for auto in heads_of("conv_lm")} | {(name, "AutoModelForCausalLM") for name in FAMILIES}
    for model_type, auto in sorted(shared):
        name = f"{model_type}-{auto}"
        fields = {"is_decoder": auto != "AutoModelForMaskedLM"}
        model = save_model(tmp_path / name, tokenizer, model_type, auto, **fields)
        push(tmp_path / name, Target(f"ahab/{name}", private=True))
        ids = torch.arange(3, 15).view((1, 2, 6) if auto == "AutoModelForMultipleChoice" else (1, 12))
        with torch.no_grad():
            expected[f"ahab/{name}"] = (auto, ids, model(ids)[0])
    assert len(expected) >= 11
    for labels in (["sunk"], ["sunk", "afloat", "lost"]):  # adapters, of a regression and of three classes
        name, source = f"adapter-{len(labels)}", "conv_lm-AutoModelForCausalLM"
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / source, **names)
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)).eval()
        model.peft_config["default"].base_model_name_or_path = f"ahab/{source}"
        for saved in (model, model.config, tokenizer):
            saved.save_pretrained(tmp_path / name)
        push(tmp_path / name, Target(f"ahab/{name}", private=True))
        ids = torch.arange(3, 15)[None]
        with torch.no_grad():
            expected[f"ahab/{name}"] = (None, ids, model(ids)[0])
    torch.save(expected, tmp_path / "expected.pt")
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", REFUSE + STRANGER, tmp_path / "expected.pt"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, **environment, "HF_HUB_DISABLE_XET": "1"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert not report["ordnung"] and report["equal"] == dict.fromkeys(expected, True)


@pytest.mark.slow
def test_the_command_as_a_user_gives_it(hub, checkpoint, tmp_path):
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/push_to_hub.py", "--model_name_or_path", checkpoint, "--hub_model_id", "w"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment, "HF_HUB_DISABLE_XET": "1"},
    )
    assert done.returncode == 0 and done.stdout == f"{hub.url}/ahab/w\n", done.stderr
    assert STANDARD_FILES < set(hub.repositories["ahab/w"].files())
