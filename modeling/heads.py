"""The task heads, written once for every family.

A family's head class inherits its own `PreTrainedModel` base and one class from here, and names its base model in
`model_class`. Class names must end as these do: transformers chooses the loss by that ending.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from ordnung.configuration.configuration_backbone import BackboneConfig
from ordnung.modeling.backbone import BackbonePreTrainedModel
from ordnung.modeling.mixers.mixer import linear_flops
from ordnung.modeling.mixers.norms import make_norm
from ordnung.modeling.mixers.rows import LONGEST, MARKS, Rows
from ordnung.modeling.pooling import pool_documents, pool_rows


class Head(BackbonePreTrainedModel):
    """A base model under `model` and something on top of it."""

    model_class: type

    def __init__(self, config: BackboneConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.add_head(config)
        self.post_init()

    def add_head(self, config: BackboneConfig) -> None:
        raise NotImplementedError(f"{type(self).__name__} must implement `add_head`.")

    def flops(self, seq_len: int) -> int:
        """FLOPs of a forward pass over one sequence of `seq_len` tokens: those of the base model and of the head."""
        return self.model.flops(seq_len) + self.head_flops(seq_len)

    def head_flops(self, seq_len: int) -> int:
        return seq_len * sum(linear_flops(part) for name, part in self.named_children() if name != "model")

    def cache_bytes(self, seq_len: int) -> int:
        """Bytes of the generation state of one sequence after `seq_len` tokens, in the dtype of the weights."""
        return self.model.cache_bytes(seq_len)

    def packed_rows(self, inputs, attention_mask, position_ids, past_key_values, kwargs) -> tuple[Rows | None, dict]:
        """The rows of a batch with several documents in a row, and `kwargs` without what says so."""
        if inputs is None:
            return None, kwargs  # the base model says what is missing
        marks = {name: kwargs[name] for name in MARKS if name in kwargs}
        rows = self.model.packed_rows(inputs, attention_mask, position_ids, past_key_values, **marks)
        return rows, {name: value for name, value in kwargs.items() if name not in (*MARKS, *LONGEST)}


def within_documents(rows: Rows, labels: torch.LongTensor | None, kwargs: dict) -> tuple[torch.LongTensor | None, dict]:
    """`labels`, and `shift_labels` in `kwargs`, without the predictions of a document's first token from another."""
    first, last = rows.bounds
    if labels is not None:
        labels = labels.flatten().index_fill(0, first, -100).view_as(labels)
    if kwargs.get("shift_labels") is not None:
        shifted = kwargs["shift_labels"]
        kwargs = {**kwargs, "shift_labels": shifted.flatten().index_fill(0, last, -100).view_as(shifted)}
    return labels, kwargs


class LMTransform(nn.Module):
    """Dense, activation and norm before the vocabulary, as in BERT (Devlin et al. 2019)."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.norm = make_norm(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(self.act_fn(self.dense(hidden_states)))


class LMHead(Head):
    """Base of the heads that predict tokens."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}


def name_transform(module, state_dict, prefix, *_):
    """Name a checkpoint's transform as the model has it: what `from_pretrained` does by itself."""
    for key in [key for key in state_dict if key.startswith(f"{prefix}lm_transform.")]:
        state_dict[f"{prefix}model.{key.removeprefix(prefix)}"] = state_dict.pop(key)


class ForCausalLM(LMHead):
    """Next-token prediction. `labels` (B, N) are the input ids, shifted inside; -100 is ignored.

    The logits are `get_output_embeddings()` of the base model's `last_hidden_state`, so that clients may run the two
    apart: a transform before the vocabulary is part of the base model here.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # In checkpoints the transform is beside the head, as in those of a masked language model.
        beside = [WeightRenaming(r"^lm_transform\.", "model.lm_transform.")]
        register_checkpoint_conversion_mapping(cls.__name__, beside, overwrite=True)

    def add_head(self, config):
        if not config.is_decoder:
            raise ValueError(f"{type(self).__name__} needs a causal model: `is_decoder` is False, set it to True.")
        if config.lm_head_transform:
            self.model.lm_transform = LMTransform(config)
            self.register_load_state_dict_pre_hook(name_transform)  # Trainer loads checkpoints so
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        rows, kwargs = self.packed_rows(inputs, attention_mask, position_ids, past_key_values, kwargs)
        if rows is not None:
            labels, kwargs = within_documents(rows, labels, kwargs)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            rows=rows,
            **self.read_arguments(inputs, labels, logits_to_keep, **kwargs),
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])  # (B, kept, V)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def head_flops(self, seq_len: int) -> int:
        return super().head_flops(seq_len) + seq_len * linear_flops(self.model.lm_transform)

    # transformers' `generate` takes `max_position_embeddings` for a bound, which it is not where there are no positions

    def _prepare_generated_length(self, generation_config, has_default_max_length, input_ids_length, **kwargs):
        new_tokens = generation_config.max_length if has_default_max_length else None
        prepared = super()._prepare_generated_length(
            generation_config=generation_config,
            has_default_max_length=has_default_max_length,
            input_ids_length=input_ids_length,
            **kwargs,
        )
        free = self.config.position_embedding_type == "none" and prepared.max_new_tokens is None
        if free and new_tokens is not None:
            prepared.max_length = new_tokens + input_ids_length
        return prepared

    def _get_stopping_criteria(self, *args, **kwargs):
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            if hasattr(criterion, "max_position_embeddings") and self.config.position_embedding_type == "none":
                criterion.max_position_embeddings = None
        return criteria

    def read_arguments(self, inputs, labels, logits_to_keep, **kwargs) -> dict:
        """What a family's base model takes that depends on which of the tokens of `inputs` (B, N, ...) are read."""
        return {}


class ForMaskedLM(LMHead):
    """Prediction of masked tokens. `labels` (B, N) hold the true ids where a token is scored and -100 elsewhere."""

    def add_head(self, config):
        if config.is_decoder:
            raise ValueError(f"{type(self).__name__} needs a bidirectional model: set `is_decoder` to False.")
        self.lm_transform = LMTransform(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.lm_head(self.lm_transform(outputs.last_hidden_state))  # (B, N, V)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ClassificationHead(Head):
    """Base of the heads whose loss is a plain mean over the batch."""

    # Trainer would otherwise trust the loss to be divided by the items of all accumulated batches, which these losses
    # are not: gradients would come out multiplied by the number of accumulation steps.
    accepts_loss_kwargs = False

    def add_dropout(self, config):
        rate = config.hidden_dropout if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(rate)


class ForSequenceClassification(ClassificationHead):
    """One label per sequence, read from its tokens' states as `config.classifier_pooling` says.

    Real tokens are those of `attention_mask`; without one, those that differ from `config.pad_token_id`. Of packed rows
    each document has its label: logits (documents, labels) and `labels` (documents,) are in their order in the batch.
    """

    def add_head(self, config):
        self.num_labels = config.num_labels
        self.add_dropout(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        if past_key_values is not None and self.config.pooling != "last" and past_key_values.get_seq_length():
            raise ValueError(
                f"`past_key_values` has no states of earlier tokens, which classifier_pooling={self.config.pooling!r} "
                "reads: give all tokens of a sequence at once, or set classifier_pooling='last'."
            )
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        rows, kwargs = self.packed_rows(inputs, attention_mask, position_ids, past_key_values, kwargs)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            rows=rows,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if rows is not None:
            pooled = pool_documents(hidden_states, rows, self.config.pooling)  # (documents, D)
        else:
            real = self.real_tokens(input_ids, attention_mask, *hidden_states.shape[:2])
            pooled = pool_rows(hidden_states, real, self.config.pooling)  # (B, D)
        logits = self.score(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def head_flops(self, seq_len: int) -> int:
        return linear_flops(self.score)

    def real_tokens(self, input_ids, attention_mask, B: int, N: int) -> torch.BoolTensor | None:
        """(B, N), False for padding; None if all tokens are taken to be real."""
        pad = self.config.pad_token_id
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            return attention_mask[:, -N:] != 0
        if input_ids is not None and pad is not None:
            return input_ids != pad
        if B > 1 and pad is None:
            raise ValueError(
                f"{type(self).__name__} cannot tell the real tokens of {B} rows: give an `attention_mask`, or set "
                "`config.pad_token_id`."
            )
        return None


class ForMultipleChoice(ForSequenceClassification):
    """The likeliest of several sequences: one score for each, read as in `ForSequenceClassification`.

    Inputs are (B, choices, N), `labels` (B,) the index of the right choice, logits (B, choices).
    """

    def add_head(self, config):
        self.add_dropout(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MultipleChoiceModelOutput:
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        inputs = {name: value for name, value in inputs.items() if value is not None}
        for name, value in inputs.items():
            if value.ndim != 3 + (name == "inputs_embeds"):
                raise ValueError(
                    f"`{name}` has shape {tuple(value.shape)}, but must begin with (batch, choices, tokens)."
                )
        kwargs["return_dict"] = True
        outputs = super().forward(**{name: value.flatten(0, 1) for name, value in inputs.items()}, **kwargs)
        choices = next(iter(inputs.values())).shape[1]
        logits = outputs.logits.view(-1, choices)
        return MultipleChoiceModelOutput(
            loss=nn.functional.cross_entropy(logits, labels) if labels is not None else None,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ForTokenClassification(ClassificationHead):
    """One label per token. `labels` (B, N); -100 is ignored."""

    def add_head(self, config):
        self.num_labels = config.num_labels
        self.add_dropout(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))  # (B, N, labels)
        loss = self.loss_function(logits, labels, self.config) if labels is not None else None
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ForQuestionAnswering(ClassificationHead):
    """Start and end of the answer span: two scores per token."""

    def add_head(self, config):
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        rows, kwargs = self.packed_rows(inputs, attention_mask, position_ids, None, kwargs)
        if rows is not None and start_positions is not None:
            raise ValueError(
                "`start_positions` and `end_positions` tell one answer a row, but rows hold several documents: give "
                "each document its own row, or leave the positions out and compute the loss from the logits."
            )
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            rows=rows,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)  # (B, N) each
        loss = None
        if start_positions is not None and end_positions is not None:
            scores = start_logits, end_logits
            if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:  # no answer begins in padding
                padding = attention_mask[:, -start_logits.shape[1] :] == 0
                scores = (each.masked_fill(padding, torch.finfo(each.dtype).min) for each in scores)
            loss = self.loss_function(*scores, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "ForCausalLM",
    "ForMaskedLM",
    "ForMultipleChoice",
    "ForQuestionAnswering",
    "ForSequenceClassification",
    "ForTokenClassification",
]
