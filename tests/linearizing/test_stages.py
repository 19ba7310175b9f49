"""What is measured and minimised, against the formulas."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from linear_runs import LAYER, built, encoder, results, scaled
from transformers import AutoModelForCausalLM

from ordnung.scripts.linearizing import measure
from ordnung.scripts.linearizing import run as running
from ordnung.scripts.linearizing.data import documents_of, mean_states, real_tokens
from ordnung.scripts.linearizing.stages import calibrate
from ordnung.scripts.linearizing.teacher import base_of, model_inputs, student_mixes, watched


def test_transfers_gradients_are_those_of_the_formula(arguments):
    made = built(arguments())
    stage = made.stage("transfer")
    pair, batch = made.pair, made.text.held_out[0]
    model = stage.build_model(None)
    stage.loss(model, scaled(stage, batch)).backward()
    got = {name: p.grad.clone() for name, p in pair.student.named_parameters() if p.grad is not None}
    pair.student.zero_grad()
    # straight from the formula: all layers' inputs first, then one sum
    calls = []
    with watched(pair.teacher, pair.replaced, calls.append), torch.no_grad():
        pair.teacher(batch["input_ids"])
    loss = 0.0
    for call in calls:
        mixer, kwargs = (
            base_of(pair.student).layers[call.layer].mixer,
            {**call.kwargs, "attention_mask": None, "past_key_values": None},
        )
        shared = base_of(pair.student).shared_inputs(mixer.layer_type)
        torch.testing.assert_close(student_mixes(pair.student, call), mixer(call.inputs, **kwargs, **shared)[0])
        variance = float(made.before["variances"][str(call.layer)])
        loss = loss + (student_mixes(pair.student, call) - call.output).square().mean() / variance / 3
    loss.backward()
    wanted = {name: p.grad for name, p in pair.student.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys() and all(".mixer." in name or name in pair.new for name in got)
    assert {name.split(".")[2] for name in got if ".mixer." in name} == {"0", "1", "2"}
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_outputs_are_scaled_to_fit_before_they_are_trained(arguments, data, kind):
    made = built(arguments(**(encoder(data) if kind == "encoder" else {}), per_device_eval_batch_size=4))
    pair, batches = made.pair, made.text.held_out[:1]
    for layer in base_of(pair.student).layers:  # far off
        layer.mixer.out_proj.weight.data *= 7
    calls, real = [], real_tokens(batches[0])
    with watched(pair.teacher, pair.replaced, calls.append), torch.no_grad():
        base_of(pair.teacher)(**model_inputs(base_of(pair.teacher), batches[0]))
        wanted = []
        for call in calls:  # each channel by numpy's least squares
            ours, theirs = (x[real].double().numpy() for x in (student_mixes(pair.student, call), call.output))
            biased = base_of(pair.student).layers[0].mixer.out_proj.bias is not None
            columns = [np.stack([o, np.ones(len(o))] if biased else [o], 1) for o in ours.T]
            fits = [c @ np.linalg.lstsq(c, t, rcond=None)[0] for c, t in zip(columns, theirs.T)]
            wanted.append(np.stack(fits, 1))
    calibrate(pair, batches)
    for call, fit in zip(calls, wanted):
        with torch.no_grad():
            np.testing.assert_allclose(student_mixes(pair.student, call)[real].numpy(), fit, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_costs_of_a_decoder_are_those_of_the_formulas(arguments, temperature):
    made = built(arguments(temperature=temperature, lm_weight=0.5, hidden_weight=0.25))
    stage = made.stage("distill")
    batch, pair = made.text.held_out[0], made.pair
    costs = stage.costs(stage.build_model(None), batch)
    ours = pair.student(batch["input_ids"], output_hidden_states=True)
    theirs = pair.teacher(batch["input_ids"], output_hidden_states=True)
    p, q = ((x.logits.double() / temperature).softmax(-1) for x in (theirs, ours))
    kl = temperature**2 * (p * (p.log() - q.log())).sum(-1)
    assert float(costs["kl"]) == pytest.approx(float(kl.sum()), rel=1e-4)
    assert float(costs["lm"]) == pytest.approx(
        float(pair.student(batch["input_ids"], labels=batch["input_ids"]).loss * 62), rel=1e-4
    )
    errors = [
        float((x - y).square().mean()) * 64 / variance
        for x, y, variance in zip(ours.hidden_states[1:], theirs.hidden_states[1:], made.before["state_variances"])
    ]
    assert float(costs["hidden"]) == pytest.approx(np.mean(errors), rel=1e-4)
    assert stage.weights == {"kl": 1.0, "lm": 0.5, "hidden": 0.25}
    assert stage.counts(batch) == {"kl": 64, "lm": 62, "hidden": 64}


def test_costs_of_an_encoder_see_each_document_alone(arguments, data):
    made = built(arguments(**encoder(data, block_size=48, validation_fraction=0.3)))
    stage = made.stage("distill")
    pair = made.pair
    batch = max(made.text.held_out, key=lambda batch: int(documents_of(batch).max()))
    documents = documents_of(batch)
    assert documents.max() + 1 > len(documents), "no row holds several documents"
    costs, cosine, hidden = stage.costs(stage.build_model(None), batch), 0.0, np.zeros(3)
    for number in range(int(documents.max()) + 1):
        ids = batch["input_ids"][documents == number][None]
        ours, theirs = (m(ids, output_hidden_states=True).hidden_states for m in (pair.student, pair.teacher))
        cosine += 1 - float(F.cosine_similarity(ours[-1].mean(1), theirs[-1].mean(1)))
        hidden += [float((x - y).square().mean(-1).sum()) for x, y in zip(ours[1:], theirs[1:])]
    assert float(costs["cosine"]) == pytest.approx(cosine, rel=1e-3, abs=1e-5)
    wanted = (hidden / made.before["state_variances"]).mean()
    assert float(costs["hidden"]) == pytest.approx(wanted, rel=1e-3)
    assert (
        stage.counts(batch)["cosine"] == documents.max() + 1 and stage.counts(batch)["hidden"] == (documents >= 0).sum()
    )


def test_mean_states_leave_padding_out():
    states = torch.arange(12.0).view(2, 3, 2)
    documents = torch.tensor([[0, 0, 1], [2, -1, -1]])
    torch.testing.assert_close(mean_states(states, documents), torch.tensor([[1.0, 2.0], [4.0, 5.0], [6.0, 7.0]]))


def test_attention_stays_where_it_is_missed_most(arguments, run):
    made = built(arguments(keep_attention=1))
    losses, rows = made.before["replaced_alone"], made.text.first_rows(running.CHOOSING)
    base = base_of(made.pair.teacher)
    for number in range(3):  # in words: the teacher with that layer's mixer changed for the student's
        if made.pair.student.config.layer_types[number] == "full_attention":
            continue
        own = base.layers[number].mixer
        shared = base_of(made.pair.student).shared_inputs(LAYER)
        new = base_of(made.pair.student).layers[number].mixer

        class Swapped(torch.nn.Module):
            def forward(self, states, attention_mask=None, new=new, shared=shared, **kwargs):
                return new(states, **kwargs, **shared)

        base.layers[number].mixer = Swapped()
        base.layers[number].mixer.layer_type = "full_attention"
        assert losses[str(number)] == pytest.approx(
            measure.score(made.pair.teacher, made.pair.teacher, rows).losses.mean().item(), abs=1e-5
        )
        base.layers[number].mixer = own
    worst = max(losses, key=losses.get)
    assert made.pair.student.config.layer_types[int(worst)] == "full_attention"
    out = run("kept", keep_attention=1)
    assert AutoModelForCausalLM.from_pretrained(out).config.layer_types == made.pair.student.config.layer_types
    assert results(out)["replaced_alone"] == losses and len(results(out)["layers"]["student"]) == 2


def test_distillation_trains_what_it_is_told_to(arguments):
    for what, wanted in (("mixers", {"mixer"}), ("layers", {"mixer", "mlp", "mixer_norm", "mlp_norm"})):
        made = built(arguments("of " + what, trainable=what))
        model = made.stage("distill").build_model(None)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert {name.split(".")[3] for name in names if ".layers." in name} == wanted
        assert not any("embed" in name for name in names) and made.pair.new == [n for n in names if ".layers." not in n]
