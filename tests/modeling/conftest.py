import pytest
import torch


@pytest.fixture
def norms_in_float64(monkeypatch):
    """transformers' RMSNorms compute in float32 whatever the dtype is, where 1e-10 cannot be seen."""
    from transformers.models import llama, mistral, qwen2, qwen3

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for norm in (
        llama.modeling_llama.LlamaRMSNorm,
        mistral.modeling_mistral.MistralRMSNorm,
        qwen2.modeling_qwen2.Qwen2RMSNorm,
        qwen3.modeling_qwen3.Qwen3RMSNorm,
    ):
        monkeypatch.setattr(norm, "forward", forward)
