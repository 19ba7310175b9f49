"""CubicPrefixLM: each next token is predicted by a fully connected pass over all tokens before it."""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_bidirectional_mask,
    create_causal_mask,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.import_utils import is_tracing

from ordnung.configuration.configuration_cubic_prefix_lm import CubicPrefixLMConfig
from ordnung.modeling.backbone import BackboneModel, BackbonePreTrainedModel
from ordnung.modeling.cubic_prefix_attention import PrefixCacheLayer
from ordnung.modeling.heads import (
    ForCausalLM,
    ForMaskedLM,
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from ordnung.modeling.mixers.mixer import linear_flops, wrong_state
from ordnung.modeling.mixers.rows import MARKS, Rows
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


def project_first(layer, hidden_states, position_embeddings):
    return layer.mixer.project(layer.before_mixer(hidden_states), position_embeddings)


def finish_first(layer, hidden_states, mixed):
    return layer.after_mixer(hidden_states, layer.mixer.out_proj(mixed))


def read_last(layer, hidden_states, chosen, visible, position_embeddings, past_key_values=None):
    mixed = layer.mixer.read(layer.before_mixer(hidden_states), chosen, visible, position_embeddings, past_key_values)
    return layer.after_mixer(hidden_states.gather(1, chosen[..., None].expand_as(mixed)), mixed)


def unless_all(real: torch.Tensor) -> torch.Tensor | None:
    """A mask of tokens, or None where it masks nothing."""
    return None if not is_tracing(real) and bool(real.all()) else real


class CubicPrefixLMPreTrainedModel(BackbonePreTrainedModel):
    config: CubicPrefixLMConfig
    _can_compile_fullgraph = False  # generation with a state that grows: see `PrefixCacheLayer`


class CubicPrefixLMModel(CubicPrefixLMPreTrainedModel, BackboneModel):
    """The stack without a head: an encoder, or, with `predict_from`, a pass for each prefix.

    As an encoder it is one fully connected O(N^2) pass over the tokens, whatever `prefix_stride` and `is_decoder` are.
    In `CubicPrefixLMForCausalLM` it predicts from every prefix unless told `predict_from=False`; elsewhere it encodes.
    """

    predicts = False  # what `predict_from` is by default

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        rows: Rows | None = None,
        predict_from: torch.BoolTensor | bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Runs the stack. The arguments are those of `BackboneModel.forward`, and:

        Args:
            predict_from: (B, N), True for the tokens whose successors are to be predicted: each gets its state at the
                end of the pass over its own prefix. The others may get zeros, and cost nothing. `hidden_states`, where
                asked for, are those of each such token in that pass; attention weights are given by the encoder only.
                True is all tokens, False the encoder.
            past_key_values: with `predict_from` only.

        Raises:
            ValueError: as `BackboneModel.forward`; and if a prefix exceeds `prefix_group_tokens`, or `past_key_values`
                is of another kind.
        """
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if predict_from is None:
            predict_from = self.predicts
        if predict_from is False:
            if seen:
                raise ValueError(
                    "`past_key_values` continues a prediction: use CubicPrefixLMForCausalLM, or give `predict_from`."
                )
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=False,
                rows=rows,
                **kwargs,
            )
        inputs_embeds = self.embed_inputs(input_ids, inputs_embeds)
        if isinstance(attention_mask, dict):
            attention_mask = self.padding_in(attention_mask)
        if predict_from is True:
            predict_from = torch.ones(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        if rows is None:
            marks = {name: kwargs.get(name) for name in MARKS}
            rows = self.packed_rows(inputs_embeds, attention_mask, position_ids, past_key_values, **marks)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if rows is not None:
            past_key_values = None
        elif use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        record = kwargs.get("output_hidden_states")
        record = self.config.output_hidden_states if record is None else record
        recorded = range(len(self.layers) + 1)
        if not isinstance(record, bool):  # one index or several
            recorded = {recorded[i] for i in ([record] if isinstance(record, int) else record)}
            record = True

        self.check_mask(inputs_embeds, attention_mask, past_key_values)
        if position_ids is None:
            position_ids = self.default_position_ids(inputs_embeds, attention_mask, past_key_values)
            position_ids = position_ids if rows is None else rows.positions
        hidden_states, _ = self.embed(inputs_embeds, token_type_ids, position_ids)
        B, N = hidden_states.shape[:2]
        new = (hidden_states, position_ids.expand(B, N))
        predict = self.predict_with_stride_one if self.stride == 1 else self.predict_with_stride
        if rows is None:
            if attention_mask is None:
                real = torch.ones(B, seen + N, dtype=torch.bool, device=hidden_states.device)
            else:
                real = attention_mask != 0
            read = torch.ones_like(predict_from) if self.is_sharded else predict_from & real[:, seen:]
            states = predict(*new, real, read, past_key_values, record)
        else:
            if self.is_sharded:
                raise ValueError(
                    "Sharded by FSDP, this model takes no packed documents: processes would need different numbers of "
                    "passes, and wait for each other. Give full rows without boundaries, or train without sharding."
                )

            def predict_row(hidden_states, position_ids, read, lengths):
                real = torch.ones_like(read)
                if lengths is not None:
                    real = torch.arange(read.shape[1], device=read.device) < lengths[:, None]
                return tuple(predict(hidden_states, position_ids, real, read & real, None, record))

            states = rows.mix(predict_row, *new, predict_from)
        states = [hidden_states, *states[:-1], self.lm_transform(self.norm(states[-1]))]
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(x if i in recorded else None for i, x in enumerate(states)) if record else None,
        )

    @property
    def stride(self) -> int | None:
        """The stride that matters: a single layer gives its last token what causal attention gives."""
        return None if len(self.layers) == 1 else self.config.prefix_stride

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 gathers the weights at each call of a layer.

        All processes then have to call the layers equally often: the plan of passes may depend on shapes alone.
        """
        return hasattr(self.layers[0], "unshard")

    # Each of the following returns the states (B, N, D) after every layer, or after the last one only.

    def predict_with_stride_one(self, hidden_states, position_ids, real, read, past, record) -> list[torch.Tensor]:
        """Every token has its own pass, continued from what the state knows of the first layer."""
        self.check_length(real.shape[1])
        seen = real.shape[1] - hidden_states.shape[1]
        state = {} if past is None else self.first_state(past)
        new = self.layers[0](hidden_states, self.rope(hidden_states, position_ids), run=project_first)
        query, key, value = new[0] * self.layers[0].mixer.scaling, *new[1:]
        if seen:
            hidden_states = torch.cat([state["hidden_states"], hidden_states], dim=1)
            position_ids = torch.cat([state["position_ids"], position_ids], dim=1)
            query = torch.cat([state["query"], query], dim=2)
        if past is not None:
            key, value = past.update(key, value, 0)
        first = self.first_layer(hidden_states, position_ids, real, query, key, value)
        anchor, at, single = None, 0, read.shape[1] == 1
        kept = {"hidden_states": hidden_states, "position_ids": position_ids, "query": query}
        if "output" in state:
            old = state["output"], state["total"]
            if single and not first.dropout:
                output, total = first.add_token(old)
                past.layers[0].first = {**kept, "output": output, "total": total}
                return self.run_last(first, (output, total), record)
            fresh = first.attend(slice(seen, None), slice(seen))
            anchor, at = tuple(torch.cat(pair, dim=2) for pair in zip(old, fresh)), seen
        parts = self.plan(prefix_ends(real, 1), nn.functional.pad(read, (seen, 0)), single)
        states, anchor = self.run_passes(first, parts, anchor, at, record, finish=past is not None)
        if past is not None:
            past.layers[0].first = {**kept, "output": anchor[0], "total": anchor[1]}
        return [x[:, seen:] for x in states]

    def run_last(self, first: FirstLayer, attended, record: bool) -> list[torch.Tensor]:
        """The states (B, 1, D) of the last tokens, from what the first layer's attention gives over all keys."""
        outputs = []
        for rows, [group] in self.plan(prefix_ends(first.real, 1), first.real, single=True):
            past = tuple(x[rows] for x in attended)
            outputs.append(self.run_group(first.only(rows), group, past, group.start, record))
        return [torch.cat(x)[:, None] for x in zip(*outputs)]

    def predict_with_stride(self, hidden_states, position_ids, real, read, past, record) -> list[torch.Tensor]:
        """Tokens share passes; the state holds keys and values of the last one, and tokens are added to it causally."""
        B, T = real.shape
        seen = T - hidden_states.shape[1]
        ends = prefix_ends(real, self.stride)
        if past is None:
            if self.stride is None or (not is_tracing(real) and T < self.stride):
                return self.run_causally(hidden_states, position_ids, real, None, record)
            self.check_length(T)
            if self.is_sharded and not real.all():
                raise ValueError(
                    f"Sharded by FSDP, a model with `prefix_stride` ({self.stride}) takes no padding: processes would "
                    "need different numbers of passes, and wait for each other. Pack the text into full rows, or "
                    "train without sharding."
                )
            first = self.first_layer(hidden_states, position_ids, real)
            return self.run_passes(first, self.plan(ends, read), None, 0, record)[0]
        state = self.first_state(past)
        held = state.get("ends", ends.new_zeros(B))
        continues = self.stride is None or bool((ends[:, seen:] == held[:, None]).all())
        if not continues:
            self.check_length(T)
        if seen and self.stride is not None:
            all_states = torch.cat([state["hidden_states"], hidden_states], dim=1)
            all_ids = torch.cat([state["position_ids"], position_ids], dim=1)
        else:
            all_states, all_ids = hidden_states, position_ids
        if self.stride is not None:
            past.layers[0].first = {"hidden_states": all_states, "position_ids": all_ids, "ends": ends[:, -1]}
        if continues:
            return self.run_causally(hidden_states, position_ids, real, past, record)
        for layer in past.layers:
            layer.forget_pass()
        states = self.keep_pass(all_states, all_ids, real, ends[:, -1], past, record, bool(read[:, :-1].any()))
        states = [x[:, seen:] for x in states]
        missing = read & (ends[:, seen:] != ends[:, -1:])
        if missing.any():
            first = self.first_layer(all_states, all_ids, real)
            parts = self.plan(ends, nn.functional.pad(missing, (seen, 0)))
            others, _ = self.run_passes(first, parts, None, 0, record)
            states = [torch.where(missing[..., None], y[:, seen:], x) for x, y in zip(states, others)]
        return states

    def keep_pass(self, hidden_states, position_ids, real, ends, past, record, every: bool) -> list[torch.Tensor]:
        """The pass that ends at `ends` (B,), its keys and values kept; unless `every`, read at the last token alone."""
        mask, rope = self.pass_mask(hidden_states, real, ends), self.rope(hidden_states, position_ids)
        if every:
            return self.run_layers(self.layers, hidden_states, mask, rope, past, False, record)
        states = self.run_layers(self.layers[:-1], hidden_states, mask, rope, past, False, record)
        B, T = real.shape
        chosen = torch.full((B, 1), T - 1, device=real.device)
        last = self.layers[-1](states[-1], chosen, real[:, None], rope, past, run=read_last)  # it sees all before it
        return [*(states if record else []), nn.functional.pad(last, (0, 0, T - 1, 0))]

    def run_causally(self, hidden_states, position_ids, real, past, record) -> list[torch.Tensor]:
        real, mask = unless_all(real), None
        if real is not None or hidden_states.shape[1] > 1 or is_tracing(hidden_states):
            mask = create_causal_mask(self.config, hidden_states, real, past)
        rope = self.rope(hidden_states, position_ids)
        return self.run_layers(self.layers, hidden_states, mask, rope, past, True, record)

    def run_layers(self, layers, hidden_states, mask, rope, past, is_causal, record) -> list[torch.Tensor]:
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
        return states if record else states[-1:]

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

    def run_passes(self, first: FirstLayer, parts, anchor, at: int, record: bool, finish: bool = False):
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
        kept = budget if self.gradient_checkpointing and self.training else 0
        outputs, rows, places, anchors = [], [], [], []
        for part, groups in parts:
            shared = first.only(part)
            done, past = at, None if anchor is None else tuple(x[part] for x in anchor)
            for group in groups:
                if group.start - done >= SEGMENT or (group is groups[-1] and group.start > done):
                    step = shared.attend, slice(None), slice(done, group.start), past
                    past, done = recompute(*step) if learns else step[0](*step[1:]), group.start
                kept += group.rows.shape[0] * group.stop
                step = self.run_group, shared, group, past, done, record
                outputs.append(recompute(*step) if learns and kept > budget else step[0](*step[1:]))
                rows.append(group.pick(group.rows[:, None].expand_as(group.reads)) + (part.start or 0))
                places.append(group.pick(group.reads))
            if finish:
                rest = slice(done, None)
                anchors.append(shared.attend(slice(None), rest, past) if done < first.real.shape[1] else past)
        anchor = tuple(map(torch.cat, zip(*anchors))) if finish else None
        if not outputs:
            return [torch.zeros_like(first.hidden_states)] * (len(self.layers) if record else 1), anchor
        states = []
        for x in map(torch.cat, zip(*outputs)):
            index = torch.cat(rows).to(x.device), torch.cat(places).to(x.device)  # layers may lie on several devices
            states.append(x.new_zeros(first.hidden_states.shape).index_put(index, x))
        return states, anchor

    def run_group(self, first: FirstLayer, group: Group, anchor, at: int, record: bool) -> list[torch.Tensor]:
        """The states (tokens read, D) of all passes in `group`."""
        T, rows, chosen = group.stop, group.rows, group.reads
        past = first.attend(slice(T), slice(at, group.start), anchor) if group.start > at else anchor
        mixed = first.attend_passes(group, past)
        hidden_states = self.layers[0](take(first.hidden_states[:, :T], rows), mixed, run=finish_first)
        states = [hidden_states]
        real, rope = take(first.real, rows)[:, :T], first.position_embeddings
        rope = None if rope is None else tuple(take(x, rows)[:, :T] for x in rope)
        if len(self.layers) > 2:
            mask = self.pass_mask(hidden_states, real, group.ends)
        for layer in self.layers[1:-1]:
            hidden_states = layer(hidden_states, attention_mask=mask, position_embeddings=rope, is_causal=False)
            states.append(hidden_states)
        visible = real[:, None] & sees(group.ends, chosen, torch.arange(T, device=real.device))
        last = self.layers[-1](hidden_states, chosen, visible, rope, run=read_last)
        if record:
            states = [x.gather(1, chosen[..., None].expand_as(last).to(x.device)) for x in states]
        return [group.pick(x) for x in ([*states, last] if record else [last])]

    def first_layer(self, hidden_states, position_ids, real, *projected) -> FirstLayer:
        rope = self.rope(hidden_states, position_ids)
        mixer = self.layers[0].mixer
        if not projected:
            query, key, value = self.layers[0](hidden_states, rope, run=project_first)
            projected = query * mixer.scaling, key, value
        query, *held = projected
        held = [per_query_head(x, mixer.num_key_value_groups) for x in held]
        return FirstLayer(hidden_states, query, *held, real, rope, mixer.dropout)

    def first_state(self, past: Cache) -> dict[str, torch.Tensor]:
        if not past.layers or not isinstance(past.layers[0], PrefixCacheLayer):
            raise wrong_state("cubic_prefix", 0)
        return past.layers[0].first

    def rope(self, hidden_states, position_ids) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self.rotary_emb(hidden_states, position_ids) if hasattr(self, "rotary_emb") else None

    def pass_mask(self, hidden_states, real, ends):
        """The mask for whole layers of passes: which tokens each token of `hidden_states` (G, T, D) sees."""
        places = torch.arange(real.shape[1], device=real.device)
        inside = real & (places < ends[:, None])
        everything = unless_all(inside) is None
        if everything or self.stride == 1:  # what lies beyond a pass is padding, as in any batch of an encoder
            return None if everything else create_bidirectional_mask(self.config, hidden_states, inside)
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

    def check_length(self, tokens: int) -> None:
        if is_tracing() or tokens <= self.config.prefix_group_tokens:
            return
        width = ACTIVATIONS * (len(self.layers) - 1) * self.config.hidden_size * self.dtype.itemsize
        raise ValueError(
            f"A prefix of {tokens} tokens exceeds `prefix_group_tokens` ({self.config.prefix_group_tokens}). Training "
            f"on it keeps about {tokens * width / 2**30:.2f} GiB of activations: where they fit, set "
            f"`prefix_group_tokens` to at least {tokens}; otherwise shorten the input."
        )

    def prefix_flops(self, seq_len: int, read: torch.Tensor | None = None) -> int:
        """FLOPs of predicting from each of `seq_len` tokens, or those in `read` (1, seq_len), two per multiply-add."""
        A, D = self.layers[0].mixer.q_proj.out_features, self.config.hidden_size
        mixer, mlp = (linear_flops(part) for part in (self.layers[0].mixer, self.layers[0].mlp))
        if self.stride is None or seq_len < self.stride:
            pairs = seq_len * (seq_len + 1) // 2
            return len(self.layers) * ((mixer + mlp) * seq_len + 4 * pairs * A)
        real = torch.ones(1, seq_len, dtype=torch.bool, device="cpu")
        [(_, groups)] = self.plan(prefix_ends(real, self.stride), real if read is None else read)
        flops, at = (mixer - 2 * A * D) * seq_len, 0  # the output is projected in each pass
        for group in groups:
            G, T, S = len(group.rows), group.stop, group.reads.shape[1]
            if group.start - at >= SEGMENT or (group is groups[-1] and group.start > at):
                flops += 4 * A * seq_len * (group.start - at)
                at = group.start
            flops += 4 * A * T * (group.start - at) + 2 * A * T * (T - group.start) * (1 + G)
            flops += G * T * (2 * A * D + mlp)
            flops += (len(self.layers) - 2) * G * T * (mixer + mlp + 4 * T * A)
            flops += G * (S * mlp + self.layers[-1].mixer.read_flops(S, T))
        return flops

    def cache_bytes(self, seq_len: int) -> int:
        """Bytes of the generation state of one sequence after `seq_len` tokens, in the dtype of the weights."""
        D, H, itemsize = self.config.hidden_size, self.config.num_attention_heads, self.dtype.itemsize
        inner, held = (linear.out_features for linear in (self.layers[0].mixer.q_proj, self.layers[0].mixer.k_proj))
        if self.stride == 1:
            return seq_len * ((D + inner + 2 * held) * itemsize + (inner + H) * max(itemsize, 4))
        return seq_len * (2 * len(self.layers) * held + (self.stride is not None) * D) * itemsize


class CubicPrefixLMForCausalLM(CubicPrefixLMPreTrainedModel, ForCausalLM, GenerationMixin):
    """Next-token prediction, each from a pass over its own prefix.

    Passes whose predictions are not asked for are not computed: those that `logits_to_keep` leaves out, and where
    `labels` are given, those without a label, except for the last token. Logits there are those of a zero state.
    """

    model_class = CubicPrefixLMModel

    def add_head(self, config):
        super().add_head(config)
        self.model.predicts = True

    def read_arguments(self, inputs, labels, logits_to_keep, shift_labels=None, **kwargs) -> dict:
        if inputs is None:
            return {}
        if shift_labels is not None:
            return {"predict_from": shift_labels != -100}
        if labels is not None:
            return {"predict_from": nn.functional.pad(labels[:, 1:] != -100, (0, 1), value=True)}
        read = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        if isinstance(logits_to_keep, int):
            read[:, : -logits_to_keep if logits_to_keep else 0] = False
        else:
            read = torch.zeros_like(read)
            read[:, logits_to_keep] = True
        return {"predict_from": read}

    def flops(self, seq_len: int) -> int:
        """FLOPs of predicting from each of `seq_len` tokens of one sequence, as they are computed."""
        return self.model.prefix_flops(seq_len) + self.head_flops(seq_len)


class CubicPrefixLMForMaskedLM(CubicPrefixLMPreTrainedModel, ForMaskedLM):
    model_class = CubicPrefixLMModel


class CubicPrefixLMForSequenceClassification(CubicPrefixLMPreTrainedModel, ForSequenceClassification):
    model_class = CubicPrefixLMModel


class CubicPrefixLMForMultipleChoice(CubicPrefixLMPreTrainedModel, ForMultipleChoice):
    model_class = CubicPrefixLMModel


class CubicPrefixLMForTokenClassification(CubicPrefixLMPreTrainedModel, ForTokenClassification):
    model_class = CubicPrefixLMModel


class CubicPrefixLMForQuestionAnswering(CubicPrefixLMPreTrainedModel, ForQuestionAnswering):
    model_class = CubicPrefixLMModel


__all__ = [
    "CubicPrefixLMForCausalLM",
    "CubicPrefixLMForMaskedLM",
    "CubicPrefixLMForMultipleChoice",
    "CubicPrefixLMForQuestionAnswering",
    "CubicPrefixLMForSequenceClassification",
    "CubicPrefixLMForTokenClassification",
    "CubicPrefixLMModel",
    "CubicPrefixLMPreTrainedModel",
]
