"""Models cut over two processes by transformers' tensor-parallel plans equal whole ones."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from family_tester import MODERN, FamilyTester
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from ordnung.modeling.registration import FAMILIES

POOL = {"projected_size": 8, "projection_type": "mean_pool", "local_block_size": 4, "num_global_tokens": 2}
SPARSE = {"sliding_window": 5, "num_global_tokens": 2}
# name -> family, fields
CASES = {
    "softmax": ("softmax_lm", {}),
    "softmax-modern": ("softmax_lm", MODERN),
    "softmax-encoder": ("softmax_lm", {"is_decoder": False, "position_embedding_type": "learned"}),
    "linformer": ("linformer_lm", POOL),
    "linformer-modern": ("linformer_lm", {**POOL, **MODERN}),
    "linformer-encoder": (
        "linformer_lm",
        {"is_decoder": False, "projected_size": 8, "projection_type": "adaptive_mean_pool"},
    ),
    "sparse": ("sparse_attention_lm", SPARSE),
    "sparse-modern": ("sparse_attention_lm", {**SPARSE, **MODERN}),
}
PROGRAM = """
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.models.auto import modeling_auto
import ordnung

def piece(whole, part, rank):
    for dim, (a, b) in enumerate(zip(whole.shape, part.shape)):
        if a != b:
            return whole.narrow(dim, rank * b, b)
    return whole

for folder in sys.argv[1:]:
    head = "AutoModelForMaskedLM" if "encoder" in folder else "AutoModelForCausalLM"
    auto = getattr(modeling_auto, head)
    if "refused" in folder:
        try:
            auto.from_pretrained(folder, tp_plan="auto")
        except ValueError as error:
            if dist.get_rank() == 0:
                print("refused:", error, flush=True)
        continue
    cut = auto.from_pretrained(folder, tp_plan="auto", dtype=torch.float64)
    whole = auto.from_pretrained(folder, dtype=torch.float64)
    rank = dist.get_rank()
    torch.manual_seed(0)
    ids = torch.randint(1, 50, (2, 21))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    expected, got = (model(ids, attention_mask=mask, labels=labels) for model in (whole, cut))
    difference = (got.logits - expected.logits)[mask == 1].abs().max().item()
    expected.loss.backward()
    got.loss.backward()
    held, gradient = 0, 0.0
    for (name, a), (_, b) in zip(whole.named_parameters(), cut.named_parameters(), strict=True):
        local = b.grad.to_local() if isinstance(b.grad, DTensor) else b.grad
        held += (b.to_local() if isinstance(b, DTensor) else b).numel()
        gradient = max(gradient, (local - piece(a.grad, local, rank)).abs().max().item())
    generated = True
    if "encoder" not in folder:
        arguments = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        generated = torch.equal(cut.generate(ids, **arguments), whole.generate(ids, **arguments))
    share = held / sum(p.numel() for p in whole.parameters())
    if rank == 0:
        print(os.path.basename(folder), difference, gradient, share, generated, flush=True)
    assert difference < 1e-10 and gradient < 1e-10 and share < 0.6 and generated, (folder, difference, gradient, share)
dist.barrier()
sys.stdout.flush()
os._exit(0)
"""


def save(folder, model_type, fields):
    arguments = {**FamilyTester.base_arguments, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": None}
    config = AutoConfig.for_model(model_type, **{**arguments, **fields})
    head = "AutoModelForCausalLM" if config.is_decoder else "AutoModelForMaskedLM"
    model = getattr(modeling_auto, head).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def launch(program, *arguments):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", port, program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = list(map(str, [*command, *arguments]))
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_two_processes_equal_one(tmp_path):
    """Logits, gradients and generated tokens, with half of the parameters; a model without a plan is refused."""
    for name, (model_type, fields) in CASES.items():
        save(tmp_path / name, model_type, fields)
    save(tmp_path / "refused", "conv_lm", {"kernel_size": 4})
    (tmp_path / "program.py").write_text(PROGRAM)
    done = launch(tmp_path / "program.py", *(tmp_path / name for name in (*CASES, "refused")))
    assert done.returncode == 0, done.stderr[-8000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == [*CASES, "refused:"]
    assert "`ConvLMForCausalLM` has no `tp_plan`" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_plans_name_what_the_model_has(model_type):
    fields = {"linformer_lm": POOL, "conv_lm": {"kernel_size": 4}}.get(model_type, {})
    arguments = {**FamilyTester.base_arguments, **MODERN, "is_decoder": True, **fields}
    model = modeling_auto.AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **arguments))
    names = {name.replace("layers.0.", "layers.*.") for name, _ in model.named_modules()}
    assert set(model.tp_plan) <= names and set(model.pp_plan) <= names
    assert model.supports_pp_plan and "model.layers" in model.pp_plan
    splits = model_type in ("softmax_lm", "linformer_lm", "sparse_attention_lm")
    assert bool(model.tp_plan) == bool(model.supports_tp_plan) == splits
    if splits:  # every projection, and so every head
        projections = {name for name in names if name.startswith("model.layers.*") and name.endswith("_proj")}
        assert projections <= set(model.tp_plan) and model.tp_plan["lm_head"] == "colwise_gather_output"


def test_heads_that_cannot_be_split_have_no_plan():
    for model_type, fields in (
        ("linformer_lm", {"projected_size": 8, "projection_sharing": "none"}),
        ("linformer_lm", {"projected_size": 8, "projection_sharing": "layerwise"}),
        ("sparse_attention_lm", {"is_decoder": False, "global_projections": "separate"}),
    ):
        config = AutoConfig.for_model(model_type, **{**FamilyTester.base_arguments, "is_decoder": False, **fields})
        assert config.base_model_tp_plan is None
        assert modeling_auto.AutoModelForMaskedLM.from_config(config).tp_plan == {}
