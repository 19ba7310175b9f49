"""CubicPrefixLM's passes: planned in groups, computed together, each from what the passes have in common.

The first layer shares its attention between all passes, so that a group of them adds the keys that are its own. The
layers between run for each pass, and the last one gives the tokens that are read. Which passes a call needs, and what
it continues, is said in `cubic_prefix_prediction.py`.
"""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_bidirectional_mask,
    create_causal_mask,
)
from transformers.utils.import_utils import is_tracing

from ordnung.modeling.backbone import BackboneModel
from ordnung.modeling.ops.grouped import per_query_head
from ordnung.modeling.ops.prefix_attention import (
    FirstLayer,
    Group,
    all_passes,
    last_passes,
    plan_passes,
    prefix_ends,
    sees,
    take,
)

# Passes that end within so many tokens are computed together, or within four strides.
GROUP_ENDS = 16
# The first layer's sums over earlier keys are kept at such distances (tokens) and continued from there.
SEGMENT = 256
# Activations that a layer keeps of a token for the backward pass, in units of the width: for the estimate in an error.
ACTIVATIONS = 17


class Passes:
    """Passes with the layers of `model`, a CubicPrefixLMModel.

    Methods return states (B, T, D) after every layer where `record` is True, after the last one only otherwise.
    """

    def __init__(self, model: BackboneModel, record: bool = False):
        self.model, self.config, self.layers = model, model.config, model.layers
        self.stride, self.record = model.stride, record

    # The plan

    def check_length(self, tokens: int) -> None:
        """
        Raises:
            ValueError: a prefix of so many tokens exceeds `prefix_group_tokens`.
        """
        if is_tracing() or tokens <= self.config.prefix_group_tokens:
            return
        width = ACTIVATIONS * (len(self.layers) - 1) * self.config.hidden_size * self.model.dtype.itemsize
        raise ValueError(
            f"A prefix of {tokens} tokens exceeds `prefix_group_tokens` ({self.config.prefix_group_tokens}). Training "
            f"on it keeps about {tokens * width / 2**30:.2f} GiB of activations: where they fit, set "
            f"`prefix_group_tokens` to at least {tokens}; otherwise shorten the input."
        )

    def plan(self, ends: torch.Tensor, read: torch.Tensor, single: bool = False) -> list[tuple[slice, list[Group]]]:
        """Groups of passes for the tokens in `read` (B, T), for some rows after the other.

        `single` means the last token of every row, with stride 1.
        """
        if is_tracing(read):
            return [(slice(None), all_passes(ends))]
        (B, T), budget, span = read.shape, self.config.prefix_group_tokens, max(GROUP_ENDS, 4 * self.stride)
        # as many rows as a group within the budget has passes of: more would share first-layer work with none
        passes = 1 if single else max(1, int(read.sum()) * span / (self.stride * B * T))
        size = max(1, int(budget / (T * passes)))
        parts = [slice(first, min(first + size, B)) for first in range(0, B, size)]
        if single:
            return [(rows, last_passes(ends[rows])) for rows in parts]
        return [(rows, plan_passes(ends[rows], read[rows], span, budget)) for rows in parts]

    # Many passes, in groups

    def first_layer(self, hidden_states, position_ids, real, *projected) -> FirstLayer:
        """What all passes share; `projected` are queries, scaled, keys and values where they are there already."""
        rope = self.model.rope(hidden_states, position_ids)
        mixer = self.layers[0].mixer
        query, *held = projected or self.project(hidden_states, rope)
        held = [per_query_head(x, mixer.num_key_value_groups) for x in held]
        return FirstLayer(hidden_states, query, *held, real, rope, mixer.dropout)

    def project(self, hidden_states, rope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The first layer's queries, scaled, keys and values."""
        query, key, value = self.layers[0](hidden_states, rope, part="project")
        return query * self.layers[0].mixer.scaling, key, value

    def run(self, first: FirstLayer, parts, anchor, at: int, finish: bool = False):
        """Computes passes in groups.

        Args:
            parts: from `plan`.
            anchor: output and log-sum-exp of all queries over the keys before `at` in the first layer, or None.
            finish: whether to return those over all keys.

        Returns:
            the states, and with `finish` the anchor over all keys.
        """
        budget = self.config.prefix_group_tokens
        learns = torch.is_grad_enabled() and not is_tracing(first.real)
        recompute = partial(checkpoint, use_reentrant=False)
        kept = budget if self.model.gradient_checkpointing and self.model.training else 0
        outputs, rows, places, anchors = [], [], [], []
        for part, groups in parts:
            shared = first.only(part)
            done, past = at, None if anchor is None else tuple(x[part] for x in anchor)
            for group in groups:
                if group.start - done >= SEGMENT or (group is groups[-1] and group.start > done):
                    step = shared.attend, slice(None), slice(done, group.start), past
                    past, done = recompute(*step) if learns else step[0](*step[1:]), group.start
                kept += group.rows.shape[0] * group.stop
                step = self.run_group, shared, group, past, done
                outputs.append(recompute(*step) if learns and kept > budget else step[0](*step[1:]))
                rows.append(group.pick(group.rows[:, None].expand_as(group.reads)) + (part.start or 0))
                places.append(group.pick(group.reads))
            if finish:
                rest = slice(done, None)
                anchors.append(shared.attend(slice(None), rest, past) if done < first.real.shape[1] else past)
        anchor = tuple(map(torch.cat, zip(*anchors))) if finish else None
        if not outputs:
            return [torch.zeros_like(first.hidden_states)] * (len(self.layers) if self.record else 1), anchor
        states = []
        for x in map(torch.cat, zip(*outputs)):
            index = torch.cat(rows).to(x.device), torch.cat(places).to(x.device)  # layers may lie on several devices
            states.append(x.new_zeros(first.hidden_states.shape).index_put(index, x))
        return states, anchor

    def run_group(self, first: FirstLayer, group: Group, anchor, at: int) -> list[torch.Tensor]:
        """The states (tokens read, D) of all passes in `group`."""
        T, rows, chosen = group.stop, group.rows, group.reads
        past = first.attend(slice(T), slice(at, group.start), anchor) if group.start > at else anchor
        mixed = first.attend_passes(group, past)
        hidden_states = self.layers[0](take(first.hidden_states[:, :T], rows), mixed, part="finish")
        states = [hidden_states]
        real, rope = take(first.real, rows)[:, :T], first.position_embeddings
        rope = None if rope is None else tuple(take(x, rows)[:, :T] for x in rope)
        if len(self.layers) > 2:
            mask = self.mask(hidden_states, real, group.ends)
        for layer in self.layers[1:-1]:
            hidden_states = layer(hidden_states, attention_mask=mask, position_embeddings=rope, is_causal=False)
            states.append(hidden_states)
        visible = real[:, None] & sees(group.ends, chosen, torch.arange(T, device=real.device))
        last = self.layers[-1](hidden_states, chosen, visible, rope, part="read")
        if self.record:
            states = [x.gather(1, chosen[..., None].expand_as(last).to(x.device)) for x in states]
        return [group.pick(x) for x in ([*states, last] if self.record else [last])]

    def run_last(self, first: FirstLayer, attended) -> list[torch.Tensor]:
        """The states (B, 1, D) of the last tokens, from what the first layer's attention gives over all keys."""
        outputs = []
        for rows, [group] in self.plan(prefix_ends(first.real, 1), first.real, single=True):
            past = tuple(x[rows] for x in attended)
            outputs.append(self.run_group(first.only(rows), group, past, group.start))
        return [torch.cat(x)[:, None] for x in zip(*outputs)]

    # One pass over whole rows, whose keys and values a state may keep

    def run_pass(self, hidden_states, position_ids, real, ends, past, every: bool) -> list[torch.Tensor]:
        """The pass that ends at `ends` (B,), its keys and values kept; unless `every`, read at the last token alone."""
        mask, rope = self.mask(hidden_states, real, ends), self.model.rope(hidden_states, position_ids)
        if every:
            return self.run_layers(self.layers, hidden_states, mask, rope, past, is_causal=False)
        states = self.run_layers(self.layers[:-1], hidden_states, mask, rope, past, is_causal=False)
        B, T = real.shape
        chosen = torch.full((B, 1), T - 1, device=real.device)
        last = self.layers[-1](states[-1], chosen, real[:, None], rope, past, part="read")  # it sees all before it
        return [*(states if self.record else []), nn.functional.pad(last, (0, 0, T - 1, 0))]

    def run_causally(self, hidden_states, position_ids, real, past) -> list[torch.Tensor]:
        """The pass without fully connected tokens, or the next tokens of one that has them."""
        real, mask = unless_all(real), None
        if real is not None or hidden_states.shape[1] > 1 or is_tracing(hidden_states):
            mask = create_causal_mask(self.config, hidden_states, real, past)
        rope = self.model.rope(hidden_states, position_ids)
        return self.run_layers(self.layers, hidden_states, mask, rope, past, is_causal=True)

    def run_layers(self, layers, hidden_states, mask, rope, past, is_causal: bool) -> list[torch.Tensor]:
        states = []
        for layer in layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=rope,
                past_key_values=past,
                is_causal=is_causal,
            )
            states.append(hidden_states)
        return states if self.record else states[-1:]

    def mask(self, hidden_states, real, ends):
        """The mask for whole layers of passes: which tokens each token of `hidden_states` (G, T, D) sees."""
        places = torch.arange(real.shape[1], device=real.device)
        inside = real & (places < ends[:, None])
        everything = unless_all(inside) is None
        if everything or self.stride == 1:  # what lies beyond a pass is padding, as in any batch of an encoder
            return None if everything else create_bidirectional_mask(self.config, hidden_states, inside)
        if "flash" in self.config._attn_implementation:
            raise ValueError(
                f"`prefix_stride` ({self.stride}) needs a mask of pairs of tokens, which "
                f"{self.config._attn_implementation!r} does not take: set attn_implementation='sdpa' or prefix_stride=1"
            )
        G, T = hidden_states.shape[:2]
        make = ALL_MASK_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        return make(  # as `create_bidirectional_mask` does, which runs mask functions other than its own through vmap
            batch_size=G,
            q_length=T,
            kv_length=T,
            mask_function=lambda row, head, query, key: (key < ends[row]) | (key <= query),
            attention_mask=real,
            allow_is_causal_skip=False,
            dtype=hidden_states.dtype,
            config=self.config,
            device=hidden_states.device,
        )


def unless_all(real: torch.Tensor) -> torch.Tensor | None:
    """A mask of tokens, or None where it masks nothing."""
    return None if not is_tracing(real) and bool(real.all()) else real
