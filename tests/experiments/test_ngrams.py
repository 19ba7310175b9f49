"""Kneser-Ney n-grams against the formula, and against nltk's where it is installed."""

import json

import numpy as np
import pytest

from ordnung.scripts import ngrams as program
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.experiments.ngrams import KneserNey

V = 7
# the bigram that begins it comes again, so that each has a token before it: nltk counts the one that has none
TEXT = np.array([[1, 2, 3, 1, 2, 4, 1, 2, 3, 5, 4, 1, 2, 2, 3, 1, 6, 2, 3, 1, 1, 2]])


def chance(text, context, token, discounts):
    """The formula, by loops over all n-grams of a list of tokens."""
    n = len(context) + 1
    grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
    if n < len(discounts):  # by the different tokens before
        longer = {tuple(text[i : i + n + 1]) for i in range(len(text) - n)}
        grams = [gram[1:] for gram in longer]
    lower = chance(text, context[1:], token, discounts) if context else 1 / V
    after = [gram for gram in grams if gram[:-1] == tuple(context)]
    if not after:
        return lower
    discount = discounts[n - 1]
    own = max(after.count((*context, token)) - discount, 0)
    return (own + discount * len(set(after)) * lower) / len(after)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_losses_are_those_of_the_formula(order):
    discounts = [0.3, 0.6, 0.8][:order]
    model = KneserNey(TEXT, V, order, discounts)
    held_out = np.array([[3, 1, 2, 0, 0, 5, 2, 3], [6, 6, 1, 2, 3, 3, 4, 0]])  # 0 was never seen
    losses = model.losses(held_out)
    assert losses.shape == (2, 7)
    for block, own in zip(held_out.tolist(), losses):
        for i, loss in enumerate(own, start=1):
            context = block[max(0, i - order + 1) : i]
            assert np.exp(-loss) == pytest.approx(chance(TEXT[0].tolist(), context, block[i], discounts), rel=1e-12)


def test_chances_of_all_tokens_sum_to_one_and_discounts_are_estimated():
    model = KneserNey(np.random.default_rng(0).integers(V - 1, size=(4, 30)), V)
    for context in ([1, 2], [6, 6], [2, 6]):
        blocks = np.array([[*context, token] for token in range(V)])
        chances = np.exp(-model.losses(blocks)[:, -1])
        assert chances.sum() == pytest.approx(1) and chances.min() > 0
    counts = KneserNey(TEXT, V).orders[2].counts.tolist()
    once, twice = counts.count(1), counts.count(2)
    assert KneserNey(TEXT, V).orders[2].discount == once / (once + 2 * twice) and 0 < twice


def test_blocks_are_not_joined():
    apart = KneserNey(np.array([[1, 2], [3, 4]]), V, 2)
    assert apart.orders[1].keys.tolist() == [1 * V + 2, 3 * V + 4]


def test_nltk_gives_the_same():
    nltk_lm = pytest.importorskip("nltk.lm", reason="nltk is not installed")
    text = [str(token) for token in TEXT[0]]
    theirs = nltk_lm.KneserNeyInterpolated(3, discount=0.4)
    theirs.fit([[tuple(text[i : i + n]) for n in (1, 2, 3) for i in range(len(text) - n + 1)]], text)
    ours = KneserNey(TEXT, V, 3, [0.0, 0.4, 0.4])  # theirs does not discount single tokens
    for block in ([1, 2, 3], [2, 3, 4], [4, 1, 1], [1, 6, 2]):
        expected = theirs.score(str(block[2]), [str(token) for token in block[:2]])
        assert np.exp(-ours.losses(np.array([block]))[0, -1]) == pytest.approx(expected, rel=1e-12)


def test_program_counts_what_the_runs_saw(tmp_path):
    text = tmp_path / "text.txt"
    words = np.random.default_rng(0).choice("whale ship sea captain harpoon".split(), 4000)
    text.write_text("\n\n".join(" ".join(words[i : i + 40]) for i in range(0, 4000, 40)))
    pretrain = {"train_file": str(text), "validation_fraction": 0.2, "train_tokenizer_vocab_size": 300}
    pretrain |= {"block_size": 16, "per_device_train_batch_size": 2, "max_steps": 5, "learning_rate": 0.1}
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"settings": {"pretrain": pretrain}, "seeds": [0, 1]}))
    output = tmp_path / "ngrams.json"
    (tmp_path / "started.json").write_text(json.dumps({"settings": {"pretrain": None}, "seeds": [0]}))
    with pytest.raises(ScriptError, match="started.json holds models that were not pretrained there"):
        program.main(["--results", str(tmp_path / "started.json"), "--output_file", str(output)])
    assert program.main(["--results", str(results), "--output_file", str(output)]) == 0
    lines = json.loads(output.read_text())["ngrams"]
    assert lines["training_tokens"] == [160, 160]
    for name in ("bigram", "trigram"):
        assert len(set(lines[name]["values"])) == 2 and 4 < lines[name]["mean"] < 40
    # with all of the text, more than once: five words that nothing foretells
    more = ["--pretrain", "max_steps=400", "--seeds", "3"]
    assert program.main(["--results", str(results), "--output_file", str(output), *more]) == 0
    lines = json.loads(output.read_text())["ngrams"]
    assert lines["bigram"]["values"][0] == pytest.approx(5, rel=0.1)
    # half an epoch is half of the blocks
    del pretrain["max_steps"]
    results.write_text(json.dumps({"settings": {"pretrain": pretrain}, "seeds": [3]}))
    for epochs in (0.5, 1):
        more = ["--pretrain", f"num_train_epochs={epochs}"]
        assert program.main(["--results", str(results), "--output_file", str(output), *more]) == 0
        (counted,) = json.loads(output.read_text())["ngrams"]["training_tokens"]
        assert counted == pytest.approx(epochs * lines["training_tokens"][0], rel=0.02)
