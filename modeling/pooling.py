"""One state for each sequence, for heads that classify it: of its first or last real token, or their mean."""

import torch

from ordnung.modeling.mixers.rows import Rows


def pool_rows(hidden_states: torch.Tensor, real: torch.BoolTensor | None, pooling: str) -> torch.Tensor:
    """(B, D) of states (B, N, D).

    Args:
        real: (B, N), False for padding, wherever it lies; None if all tokens are real. A row without real tokens gives
            the state of its last token, or zeros with "mean".
        pooling: "first", "last" or "mean".
    """
    B, N = hidden_states.shape[:2]
    if real is None:
        real = torch.ones(B, N, dtype=torch.bool, device=hidden_states.device)
    real = real.to(hidden_states.device)
    if pooling == "mean":
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        total = wide.masked_fill(~real[..., None], 0).sum(1)
        return (total / real.sum(1, keepdim=True).clamp(min=1)).to(hidden_states.dtype)
    index = torch.arange(N, device=real.device)
    if pooling == "last":
        read = torch.where(real, index, -1).amax(1)
    else:
        read = torch.where(real, index, N).amin(1).clamp(max=N - 1)
    return hidden_states[torch.arange(B, device=real.device), read]


def pool_documents(hidden_states: torch.Tensor, rows: Rows, pooling: str) -> torch.Tensor:
    """(documents, D) of packed states (B, N, D), in the order of the documents in the batch; as `pool_rows`."""
    flat = hidden_states.flatten(0, 1)
    if pooling != "mean":
        return flat[rows.bounds[0 if pooling == "first" else 1].to(flat.device)]
    documents = rows.documents.flatten().to(flat.device)
    places = (documents >= 0).nonzero()[:, 0]
    documents, count = documents[places], rows.bounds.shape[1]
    wide = flat[places].to(torch.promote_types(flat.dtype, torch.float32))
    total = wide.new_zeros(count, flat.shape[1]).index_add(0, documents, wide)
    return (total / documents.bincount(minlength=count)[:, None]).to(flat.dtype)


__all__ = ["pool_documents", "pool_rows"]
