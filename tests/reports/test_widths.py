"""Models of several widths: how they are told apart, and the exponents that are fitted to them."""

import math

import pytest

from ordnung.scripts.reports import widths

MACHINE = {
    "gpu": [],
    "cpu": "a CPU",
    "threads": 1,
    "torch": "2",
    "transformers": "5",
    "ordnung": "0",
    "date": "2026-11-27",
}


def made(power, width, shift=1.0):
    """A run whose loss is a power of its training FLOPs, on two seeds of one exponent."""
    flops = float(width**2)
    losses = [factor * shift * (3 * flops * 1000) ** power for factor in (10, 11)]
    perplexities = [math.exp(loss) for loss in losses]
    return {
        "forward_flops_per_token": flops,
        "tokens": 1000,
        "eval_loss": {"values": losses},
        "eval_perplexity": {"values": perplexities},
    }


@pytest.mark.draws
def test_slopes_are_those_of_the_loss_in_the_flops(tmp_path):
    variants = {f"conv_source_{width}": made(-0.05, width, 1.1) for width in (128, 32, 64)}
    variants |= {f"softmax_{width}": made(-0.1, width) for width in (32, 64, 128)}
    models = {name: {"model_type": "conv_lm" if "conv" in name else "softmax_lm"} for name in variants}
    settings = {"pretrain": {"max_steps": 20}, "variants": models}
    results = {"machine": MACHINE, "settings": settings, "variants": variants, "ngrams": {"trigram": {"mean": math.e}}}
    kinds = widths.by_kind(results)
    assert {kind: list(found) for kind, found in kinds.items()} == dict.fromkeys(
        ("conv_source", "softmax"), [32, 64, 128]
    )
    for kind, expected in (("conv_source", -0.05), ("softmax", -0.1)):
        found = widths.slope(kinds[kind])
        assert found.n == 2 and (found.low, found.mean, found.high) == pytest.approx((expected,) * 3)
    table = widths.sizes_markdown(results)
    assert "-0.050 (-0.050 to -0.050, n = 2)" in table and "a trigram has 1.000" in table
    widths.sizes_plot(results, tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.draws
def test_capacity_is_told_beside_the_bytes_of_the_state(tmp_path):
    def found(state, *shares):
        return {"parameters": 10 * state, "state_bytes": state, "accuracy": [{"values": [0.0] * 3}, {"values": shares}]}

    variants = {"conv_64": found(2048, 0.5, 0.6, 0.7), "conv_32": found(1024, 0.1, 0.2, 0.3)}
    settings = {"num_pairs": [2, 24], "max_steps": 5, "batch_size": 2, "sequence_length": 64}
    settings["variants"] = dict.fromkeys(variants, {"model_type": "conv_lm"})
    results = {"machine": MACHINE, "settings": settings, "variants": variants, "chance": 0.03}
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in widths.capacity_markdown(results).splitlines()
    ]
    assert lines[2][-1] == "right of 24 pairs"
    assert lines[4][:4] == ["conv", "32", "10,240", "1,024"] and lines[5][:4] == ["conv", "64", "20,480", "2,048"]
    assert lines[4][4].startswith("0.200 (") and lines[5][4].startswith("0.600 (")
    widths.capacity_plot(results, tmp_path / "capacity.png")
    assert (tmp_path / "capacity.png").read_bytes().startswith(b"\x89PNG")
