"""SoftmaxLM: the softmax attention control. The backbone as it is, with `Attention` in every layer."""

from transformers.generation import GenerationMixin

from ordnung.configuration.configuration_softmax_lm import SoftmaxLMConfig
from ordnung.modeling.backbone import BackboneModel, BackbonePreTrainedModel
from ordnung.modeling.heads import (
    ForCausalLM,
    ForMaskedLM,
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)


class SoftmaxLMPreTrainedModel(BackbonePreTrainedModel):
    config: SoftmaxLMConfig


class SoftmaxLMModel(SoftmaxLMPreTrainedModel, BackboneModel):
    """The stack without a head."""


class SoftmaxLMForCausalLM(SoftmaxLMPreTrainedModel, ForCausalLM, GenerationMixin):
    model_class = SoftmaxLMModel


class SoftmaxLMForMaskedLM(SoftmaxLMPreTrainedModel, ForMaskedLM):
    model_class = SoftmaxLMModel


class SoftmaxLMForSequenceClassification(SoftmaxLMPreTrainedModel, ForSequenceClassification):
    model_class = SoftmaxLMModel


class SoftmaxLMForMultipleChoice(SoftmaxLMPreTrainedModel, ForMultipleChoice):
    model_class = SoftmaxLMModel


class SoftmaxLMForTokenClassification(SoftmaxLMPreTrainedModel, ForTokenClassification):
    model_class = SoftmaxLMModel


class SoftmaxLMForQuestionAnswering(SoftmaxLMPreTrainedModel, ForQuestionAnswering):
    model_class = SoftmaxLMModel


__all__ = [
    "SoftmaxLMForCausalLM",
    "SoftmaxLMForMaskedLM",
    "SoftmaxLMForMultipleChoice",
    "SoftmaxLMForQuestionAnswering",
    "SoftmaxLMForSequenceClassification",
    "SoftmaxLMForTokenClassification",
    "SoftmaxLMModel",
    "SoftmaxLMPreTrainedModel",
]
