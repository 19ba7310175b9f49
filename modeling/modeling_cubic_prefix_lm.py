"""CubicPrefixLM: each next token is predicted by a fully connected pass over all tokens before it.

    p(token[t + 1] | token[0..t]) = head(encoder(token[0..t])[t])

A causal model makes the states of a token once; here each prefix has its own. With `prefix_stride` s > 1 the pass of t
is fully connected up to end(t) = s floor((t + 1) / s) and causal behind it, and tokens of the same end share it. The
definition, pass by pass, is `ops.prefix_attention.prefix_states_naive`.

Here stand the model and its heads. The mixer, the layer and the generation state are in `cubic_prefix_attention.py`,
how passes are computed together in `cubic_prefix_passes.py`, which ones a call needs in `cubic_prefix_prediction.py`.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple

from ordnung.configuration.configuration_cubic_prefix_lm import CubicPrefixLMConfig
from ordnung.modeling.backbone import BackboneModel, BackbonePreTrainedModel
from ordnung.modeling.cubic_prefix_attention import PrefixLayer
from ordnung.modeling.cubic_prefix_passes import SEGMENT, Passes
from ordnung.modeling.cubic_prefix_prediction import predict_with_stride, predict_with_stride_one
from ordnung.modeling.heads import (
    ForCausalLM,
    ForMaskedLM,
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from ordnung.modeling.mixers.mixer import linear_flops
from ordnung.modeling.mixers.rows import MARKS, Rows
from ordnung.modeling.ops.prefix_attention import prefix_ends

logger = logging.get_logger(__name__)


class CubicPrefixLMPreTrainedModel(BackbonePreTrainedModel):
    config: CubicPrefixLMConfig
    _no_split_modules = ["PrefixLayer"]
    _can_compile_fullgraph = False  # generation with a state that grows: see `PrefixCacheLayer`


class CubicPrefixLMModel(CubicPrefixLMPreTrainedModel, BackboneModel):
    """The stack without a head: an encoder, or, with `predict_from`, a pass for each prefix.

    As an encoder it is one fully connected O(N^2) pass over the tokens, whatever `prefix_stride` and `is_decoder` are.
    In `CubicPrefixLMForCausalLM` it predicts from every prefix unless told `predict_from=False`; elsewhere it encodes.
    """

    layer_class = PrefixLayer
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
        if predict_from is None:
            predict_from = self.predicts
        if predict_from is False:
            self.check_encodes(past_key_values)
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
        if rows is None:
            marks = {name: kwargs.get(name) for name in MARKS}
            rows = self.packed_rows(inputs_embeds, attention_mask, position_ids, past_key_values, **marks)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and self.gradient_checkpointing and self.training:
            logger.warning_once("`use_cache=True` makes no generation state in training with gradient checkpointing.")
            use_cache = False
        if rows is not None:
            past_key_values = None
        elif use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        self.check_mask(inputs_embeds, attention_mask, past_key_values)
        if position_ids is None:
            position_ids = self.default_position_ids(inputs_embeds, attention_mask, past_key_values)
            position_ids = position_ids if rows is None else rows.positions
        if predict_from is True:
            predict_from = torch.ones(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)

        recorded = self.recorded_states(kwargs.get("output_hidden_states"))
        hidden_states, _ = self.embed(inputs_embeds, token_type_ids, position_ids)
        states = self.states_of_prefixes(
            Passes(self, record=bool(recorded)),
            hidden_states,
            position_ids.expand(hidden_states.shape[:2]),
            predict_from,
            attention_mask,
            rows,
            past_key_values,
        )
        states = [hidden_states, *states[:-1], self.lm_transform(self.norm(states[-1]))]
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(x if i in recorded else None for i, x in enumerate(states)) if recorded else None,
        )

    def states_of_prefixes(self, passes, hidden_states, position_ids, read, attention_mask, rows, past_key_values):
        """encoder(token[0..t])[t] for each token t in `read`: its state at the end of the pass over its own prefix.

        Args:
            passes: computes them together.
            hidden_states: (B, N, D), as the first layer takes them.
            position_ids, read: (B, N).
            attention_mask: (B, past + N), 0 for padding, or None.
            rows: where documents lie in packed rows, or None: a prefix begins with its document.
            past_key_values: what is known of earlier tokens, or None.

        Returns:
            (B, N, D) after every layer that `passes` records, and after the last one.
        """
        predict = predict_with_stride_one if self.stride == 1 else predict_with_stride
        if rows is not None:
            self.check_takes_documents()

            def predict_documents(hidden_states, position_ids, read, lengths):
                real = torch.ones_like(read)
                if lengths is not None:
                    real = torch.arange(read.shape[1], device=read.device) < lengths[:, None]
                return tuple(predict(passes, hidden_states, position_ids, real, read & real, None))

            return rows.mix(predict_documents, hidden_states, position_ids, read)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is None:
            B, N = read.shape
            real = torch.ones(B, seen + N, dtype=torch.bool, device=read.device)
        else:
            real = attention_mask != 0
        read = torch.ones_like(read) if self.is_sharded else read & real[:, seen:]
        return predict(passes, hidden_states, position_ids, real, read, past_key_values)

    def recorded_states(self, asked: bool | int | list[int] | None) -> list[int]:
        """Indices of the hidden states to give: all or none of them, one index or several; None as configured."""
        asked = self.config.output_hidden_states if asked is None else asked
        indices = range(len(self.layers) + 1)
        if isinstance(asked, bool):
            return list(indices) if asked else []
        return [indices[i] for i in ([asked] if isinstance(asked, int) else asked)]

    def check_encodes(self, past_key_values: Cache | None) -> None:
        if past_key_values is not None and past_key_values.get_seq_length():
            raise ValueError(
                "`past_key_values` continues a prediction: use CubicPrefixLMForCausalLM, or give `predict_from`."
            )

    def check_takes_documents(self) -> None:
        if self.is_sharded:
            raise ValueError(
                "Sharded by FSDP, this model takes no packed documents: processes would need different numbers of "
                "passes, and wait for each other. Give full rows without boundaries, or train without sharding."
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

    def rope(self, hidden_states, position_ids) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self.rotary_emb(hidden_states, position_ids) if hasattr(self, "rotary_emb") else None

    def prefix_flops(self, seq_len: int, read: torch.Tensor | None = None) -> int:
        """FLOPs of predicting from each of `seq_len` tokens, or those in `read` (1, seq_len), two per multiply-add."""
        A, D = self.layers[0].mixer.q_proj.out_features, self.config.hidden_size
        mixer, mlp = (linear_flops(part) for part in (self.layers[0].mixer, self.layers[0].mlp))
        if self.stride is None or seq_len < self.stride:
            pairs = seq_len * (seq_len + 1) // 2
            return len(self.layers) * ((mixer + mlp) * seq_len + 4 * pairs * A)
        real = torch.ones(1, seq_len, dtype=torch.bool, device="cpu")
        [(_, groups)] = Passes(self).plan(prefix_ends(real, self.stride), real if read is None else read)
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
        if inputs is None or "predict_from" in kwargs:  # nothing to read, or the caller says what
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
