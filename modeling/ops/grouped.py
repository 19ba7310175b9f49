"""Grouped queries: fewer heads of keys and values, each of which serves several heads of queries."""

import torch


def per_query_head(x: torch.Tensor, groups: int, dim: int = 1) -> torch.Tensor:
    """`x` with G key heads in `dim` as H = G * groups query heads; `x` itself where those are as many."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=dim)
