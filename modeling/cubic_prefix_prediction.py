"""CubicPrefixLM's prediction: which passes the tokens of a call need, and what a generation state spares of them.

Both functions take states (B, N, D) as the first layer takes them, their `position_ids` (B, N), which of all T tokens
so far are `real` (B, T), which of the N new ones are `read` (B, N), and the state of the earlier tokens in `past` or
None. They return the states (B, N, D) after every layer, or after the last one only.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils.import_utils import is_tracing

from ordnung.modeling.cubic_prefix_attention import PrefixCacheLayer
from ordnung.modeling.cubic_prefix_passes import Passes
from ordnung.modeling.mixers.mixer import wrong_state
from ordnung.modeling.ops.prefix_attention import prefix_ends


def predict_with_stride_one(passes: Passes, hidden_states, position_ids, real, read, past) -> list[torch.Tensor]:
    """Every token has its own pass, continued from what the state knows of the first layer."""
    passes.check_length(real.shape[1])
    seen = real.shape[1] - hidden_states.shape[1]
    state = {} if past is None else first_state(past)
    query, key, value = passes.project(hidden_states, passes.model.rope(hidden_states, position_ids))
    if seen:
        hidden_states = torch.cat([state["hidden_states"], hidden_states], dim=1)
        position_ids = torch.cat([state["position_ids"], position_ids], dim=1)
        query = torch.cat([state["query"], query], dim=2)
    if past is not None:
        key, value = past.update(key, value, 0)
    first = passes.first_layer(hidden_states, position_ids, real, query, key, value)
    anchor, at, single = None, 0, read.shape[1] == 1
    kept = {"hidden_states": hidden_states, "position_ids": position_ids, "query": query}
    if "output" in state:
        old = state["output"], state["total"]
        if single and not first.dropout:
            output, total = first.add_token(old)
            past.layers[0].first = {**kept, "output": output, "total": total}
            return passes.run_last(first, (output, total))
        fresh = first.attend(slice(seen, None), slice(seen))
        anchor, at = tuple(torch.cat(pair, dim=2) for pair in zip(old, fresh)), seen
    parts = passes.plan(prefix_ends(real, 1), nn.functional.pad(read, (seen, 0)), single)
    states, anchor = passes.run(first, parts, anchor, at, finish=past is not None)
    if past is not None:
        past.layers[0].first = {**kept, "output": anchor[0], "total": anchor[1]}
    return [x[:, seen:] for x in states]


def predict_with_stride(passes: Passes, hidden_states, position_ids, real, read, past) -> list[torch.Tensor]:
    """Tokens share passes; the state holds keys and values of the last one, and tokens are added to it causally."""
    if past is None:
        return predict_all(passes, hidden_states, position_ids, real, read)
    B, T = real.shape
    stride, seen = passes.stride, T - hidden_states.shape[1]
    ends = prefix_ends(real, stride)
    state = first_state(past)
    held = state.get("ends", ends.new_zeros(B))
    continues = stride is None or bool((ends[:, seen:] == held[:, None]).all())
    if not continues:
        passes.check_length(T)
    if seen and stride is not None:
        all_states = torch.cat([state["hidden_states"], hidden_states], dim=1)
        all_ids = torch.cat([state["position_ids"], position_ids], dim=1)
    else:
        all_states, all_ids = hidden_states, position_ids
    if stride is not None:
        past.layers[0].first = {"hidden_states": all_states, "position_ids": all_ids, "ends": ends[:, -1]}
    if continues:
        return passes.run_causally(hidden_states, position_ids, real, past)
    for layer in past.layers:
        layer.forget_pass()
    states = passes.run_pass(all_states, all_ids, real, ends[:, -1], past, every=bool(read[:, :-1].any()))
    states = [x[:, seen:] for x in states]
    missing = read & (ends[:, seen:] != ends[:, -1:])
    if missing.any():
        first = passes.first_layer(all_states, all_ids, real)
        parts = passes.plan(ends, nn.functional.pad(missing, (seen, 0)))
        others, _ = passes.run(first, parts, None, 0)
        states = [torch.where(missing[..., None], y[:, seen:], x) for x, y in zip(states, others)]
    return states


def predict_all(passes: Passes, hidden_states, position_ids, real, read) -> list[torch.Tensor]:
    """`predict_with_stride` without a state to continue or to make."""
    stride = passes.stride
    if stride is None or (not is_tracing(real) and real.shape[1] < stride):
        return passes.run_causally(hidden_states, position_ids, real, None)
    passes.check_length(real.shape[1])
    if passes.model.is_sharded and not real.all():
        raise ValueError(
            f"Sharded by FSDP, a model with `prefix_stride` ({stride}) takes no padding: processes would "
            "need different numbers of passes, and wait for each other. Pack the text into full rows, or "
            "train without sharding."
        )
    first = passes.first_layer(hidden_states, position_ids, real)
    return passes.run(first, passes.plan(prefix_ends(real, stride), read), None, 0)[0]


def first_state(past: Cache) -> dict[str, torch.Tensor]:
    """What the first layer's state holds besides keys and values.

    Raises:
        ValueError: the cache was made for another model.
    """
    if not past.layers or not isinstance(past.layers[0], PrefixCacheLayer):
        raise wrong_state("cubic_prefix", 0)
    return past.layers[0].first
