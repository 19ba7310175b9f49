"""The controls of experiments against the formula, and against SoftmaxLM."""

import math

import pytest
import torch
from family_tester import FamilyTester
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, DynamicCache

from ordnung import SoftmaxLMConfig
from ordnung.modeling.ops.causal_conv import causal_conv_naive
from ordnung.scripts.experiments.control_attention import ControlAttentionConfig
from ordnung.scripts.experiments.scores import SCORES

ARGUMENTS = {**FamilyTester.base_arguments, "num_key_value_heads": 2, "qk_norm": True}


@pytest.mark.parametrize("weights", ["softmax", "elu"])
def test_mixer_equals_the_formula(weights):
    fields = {**ARGUMENTS, "position_embedding_type": "none"}
    config = ControlAttentionConfig(**fields, weights=weights, short_conv_kernel=3, decay_gate=True)
    mixer = AutoModelForCausalLM.from_config(config).double().model.layers[0].mixer
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    joined = torch.cat([mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)], -1)
    joined = causal_conv_naive(joined, mixer.conv_kernel)[0].unflatten(-1, (8, 8))  # 4 heads of queries, 2 and 2
    total = torch.nn.functional.logsigmoid(mixer.decay_proj(x)[0] + mixer.decay_bias).cumsum(0)
    outputs = torch.zeros(9, 4, 8, dtype=torch.float64)
    for h in range(4):
        query, key = mixer.q_norm(joined[:, h]), mixer.k_norm(joined[:, 4 + h // 2])
        for i in range(9):
            if weights == "softmax":
                each = torch.exp(key[: i + 1] @ query[i] / math.sqrt(8))
            else:
                each = (torch.nn.functional.elu(key[: i + 1]) + 1) @ (torch.nn.functional.elu(query[i]) + 1)
            each = each * torch.exp(total[i, h] - total[: i + 1, h])
            outputs[i, h] = each @ joined[: i + 1, 6 + h // 2] / each.sum()
    expected = mixer.out_proj(outputs.flatten(1))[None]
    torch.testing.assert_close(mixer(x)[0], expected, rtol=0, atol=1e-12)


def naive_score(score, h, query, key, lag):
    """Of one pair and head, straight from the formula."""
    name, root = type(score).__name__, math.sqrt(len(query))
    if name == "Dot":
        return query @ key / root
    if name == "Bilinear":
        return query @ score.matrix[h] @ key / root
    if name == "Distance":
        return -((query - key) ** 2).sum() / root
    if name == "Additive":
        return sum(w * math.tanh(a + b) for w, a, b in zip(score.vector[h], query, key))
    if name == "Mlp":
        return torch.relu(query @ score.of_query[h] + key @ score.of_key[h] + score.bias[h]) @ score.vector[h]
    return score.lags[h, lag]


@pytest.mark.parametrize("name", SCORES)
@torch.no_grad()
def test_mixing_by_each_score_equals_the_formula(name):
    config = ControlAttentionConfig(**{**ARGUMENTS, "position_embedding_type": "none"}, score=name)
    mixer = AutoModelForCausalLM.from_config(config).double().model.layers[0].mixer
    assert mixer.flops(8) > mixer.flops(4) > 0
    for parameter in mixer.score.parameters():  # also those that start at nothing
        parameter.normal_()
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    reads = name != "position"
    assert reads == hasattr(mixer, "q_proj")
    query, key = (norm(mixer.heads(p(x)))[0] for norm, p in ((mixer.q_norm, mixer.q_proj), (mixer.k_norm, mixer.k_proj))
                  ) if reads else (torch.zeros(9, 4, 8),) * 2  # fmt: skip
    value, outputs = mixer.heads(mixer.v_proj(x))[0], torch.zeros(9, 4, 8, dtype=torch.float64)
    for h in range(4):
        g = h // 2 if reads else h
        for i in range(9):
            scores = [naive_score(mixer.score, h, query[i, h], key[j, g], i - j) for j in range(i + 1)]
            weights = torch.tensor(scores, dtype=torch.float64).exp()
            outputs[i, h] = weights @ value[: i + 1, h // 2] / weights.sum()
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(outputs.flatten(1))[None], rtol=0, atol=1e-12)


def test_scores_start_from_what_they_say():
    """A bilinear score as the dot product, positions as the mean; all learn, and a row must not be too long."""
    query, key = torch.randn(2, 1, 5, 4, 8, requires_grad=True)
    made = {name: score(4, 8, 16) for name, score in SCORES.items()}
    for score in made.values():
        with torch.no_grad():
            score.init_weights()
        (score(query, key) - 1).square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in score.parameters())
    torch.testing.assert_close(made["bilinear"](query, key), made["dot"](query, key))
    assert not made["position"](query, key).any()
    with pytest.raises(ValueError, match="lags for 16 tokens, not for 17: raise `max_position_embeddings`"):
        made["position"](*torch.randn(2, 1, 17, 4, 8))
    with pytest.raises(StrictDataclassError, match="with `weights` 'elu' set 'dot'"):
        ControlAttentionConfig(weights="elu", score="additive")


def test_softmax_without_extras_is_softmax_lm():
    ours = AutoModelForCausalLM.from_config(ControlAttentionConfig(**ARGUMENTS)).double()
    other = AutoModelForCausalLM.from_config(SoftmaxLMConfig(**ARGUMENTS)).double()
    other.load_state_dict(ours.state_dict())
    ids = torch.randint(1, 50, (2, 11))
    got, expected = ours(ids, use_cache=False).logits, other(ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    assert ours.cache_bytes(30) == other.cache_bytes(30)


def test_padding_and_states_are_refused():
    model = AutoModelForCausalLM.from_config(ControlAttentionConfig(**ARGUMENTS))
    ids = torch.randint(1, 50, (2, 6))
    with pytest.raises(ValueError, match="give no padding, and use_cache=False"):
        model(ids, past_key_values=DynamicCache(), use_cache=True)
    with pytest.raises(ValueError, match="give no padding"):
        model(ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6]), use_cache=False)
