"""The norms of the backbone, by the name that `config.norm_type` has for them."""

import torch
from torch import nn

from ordnung.configuration.configuration_backbone import BackboneConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467).

    In float32 at least; then rounded, and multiplied by the weight in the dtype of the states, as Llama does.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


NORMS = {"layer_norm": nn.LayerNorm, "rms_norm": RMSNorm}


def make_norm(config: BackboneConfig) -> nn.Module:
    """The configured norm of states (..., D)."""
    return NORMS[config.norm_type](config.hidden_size, eps=config.layer_norm_eps)


__all__ = ["NORMS", "RMSNorm", "make_norm"]
