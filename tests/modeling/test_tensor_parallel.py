"""Models cut over two processes by transformers' tensor-parallel and pipeline plans equal whole ones."""

import importlib.util
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

# Pipelines came into transformers after its tensor parallelism.
PIPELINED = importlib.util.find_spec("transformers.distributed.pipeline_parallel") is not None
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
LAYERWISE = {"projected_size": 8, "local_block_size": 4, "projection_type": "linear", "projection_sharing": "layerwise"}
POST = {"norm_position": "post", "position_embedding_type": "learned", "type_vocab_size": 2, "lm_head_transform": True}
# The same for pipelines, whose second stage begins with the second of three layers.
PIPELINES = {
    "pipeline-softmax": ("softmax_lm", MODERN),
    "pipeline-softmax-post": ("softmax_lm", POST),
    "pipeline-conv-hybrid": ("conv_lm", {"kernel_size": 4, "layer_types": ["conv", "full_attention", "conv"]}),
    "pipeline-linformer-layerwise": ("linformer_lm", LAYERWISE),
    "pipeline-sparse": ("sparse_attention_lm", SPARSE),
    "pipeline-quadratic": ("quadratic_kernel_lm", {}),
}
PROGRAM = """
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
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
    pipeline = "pipeline" in folder
    how = {"distributed_config": DistributedConfig(pp_size=2)} if pipeline else {"tp_plan": "auto"}
    if "refused" in folder:
        try:
            auto.from_pretrained(folder, **how)
        except ValueError as error:
            if dist.get_rank() == 0:
                print("refused:", error, flush=True)
        continue
    cut = auto.from_pretrained(folder, **how, dtype=torch.float64)
    whole = auto.from_pretrained(folder, dtype=torch.float64)
    rank = dist.get_rank()
    torch.manual_seed(0)
    ids = torch.randint(1, 50, (2, 21))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    expected, got = (model(ids, attention_mask=mask, labels=labels) for model in (whole, cut))
    difference = (got.logits - expected.logits)[mask == 1].abs().max().item()
    held, gradient, both = 0, 0.0, [whole.named_parameters(), cut.named_parameters()]
    if pipeline:  # transformers' pipelines go forward only
        held, both = sum(b.numel() for b in cut.parameters()), [(), ()]
        here = [i for i, layer in enumerate(cut.model.layers) if hasattr(layer, "mixer")]
        assert here == [[0], [1, 2]][rank]
    else:
        expected.loss.backward()
        got.loss.backward()
    for (name, a), (_, b) in zip(*both, strict=True):
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
    assert difference < 1e-10 and gradient < 1e-10 and generated, (folder, difference, gradient)
    assert share < (0.85 if pipeline else 0.6), (folder, share)
dist.barrier()
sys.stdout.flush()
os._exit(0)
"""


def save(folder, model_type, fields, layers=2):
    arguments = {**FamilyTester.base_arguments, "num_hidden_layers": layers, "pad_token_id": 0, "eos_token_id": None}
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
    """Logits, gradients and generated tokens, with a part of the parameters; a model without a plan is refused."""
    for name, (model_type, fields) in CASES.items():
        save(tmp_path / name, model_type, fields)
    save(tmp_path / "refused", "conv_lm", {"kernel_size": 4})
    pipelines = PIPELINES if PIPELINED else {}
    for name, (model_type, fields) in pipelines.items():
        save(tmp_path / name, model_type, fields, 3)
    if pipelines:
        shared = AutoConfig.from_pretrained(tmp_path / "pipeline-linformer-layerwise")
        assert shared.learns_projection(0) and shared.projection_sharing == "layerwise"
        save(tmp_path / "pipeline-refused", "cubic_prefix_lm", {})
    names = [*CASES, "refused", *pipelines, *["pipeline-refused"] * PIPELINED]
    (tmp_path / "program.py").write_text(PROGRAM)
    done = launch(tmp_path / "program.py", *(tmp_path / name for name in names))
    assert done.returncode == 0, done.stderr[-8000:]
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [name if "refused" not in name else "refused:" for name in names]
    refused = [line for line in lines if line.startswith("refused")]
    assert "`ConvLMForCausalLM` has no `tp_plan`" in refused[0]
    assert not pipelines or "CubicPrefixLMForCausalLM has no `pp_plan`" in refused[1]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_plans_name_what_the_model_has(model_type):
    fields = {"linformer_lm": POOL, "conv_lm": {"kernel_size": 4}}.get(model_type, {})
    arguments = {**FamilyTester.base_arguments, **MODERN, "is_decoder": True, **fields}
    model = modeling_auto.AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **arguments))
    names = {name.replace("layers.0.", "layers.*.") for name, _ in model.named_modules()}
    assert set(model.tp_plan) <= names and set(model.pp_plan) <= names
    assert bool(model.pp_plan) == bool(model.supports_pp_plan) == (model_type != "cubic_prefix_lm")
    assert set(model.pp_plan) in ({"model.embed_tokens", "model.layers", "model.norm", "lm_head"}, set())
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
