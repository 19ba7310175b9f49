"""The page of claims: every verdict is computed, and follows its files."""

import json
import shutil
from pathlib import Path
from statistics import median

import pytest

from ordnung.modeling.registration import FAMILIES
from ordnung.scripts.experiments.verdicts import FAILS, HOLDS, OPEN, PART
from ordnung.scripts.reports import claims, growing, results

ROOT = Path(__file__).parents[2]


@pytest.fixture
def files(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "model_cards" / "results", tmp_path / "results")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def change(files, name, edit):
    path = files / f"{name}.json"
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def claim(quote, family="", begins=""):
    every = (claim for claim in claims.all_claims() if quote in claim.quote and family in claim.family)
    (found,) = [claim for claim in every if claim.quote.startswith(begins)]
    return found


def test_every_claim_has_a_verdict_and_a_row(files):
    everything = claims.all_claims()
    assert {claim.verdict for claim in everything} <= {HOLDS, PART, FAILS, OPEN}
    page = claims.markdown(everything)
    assert all(claim.quote in page for claim in everything) and page.count("\n") == len(everything) + 1
    assert set(claims.FAMILIES) == {claim.family for claim in everything}


def test_evidence_names_key_command_and_commit(files):
    change(files, "growth", lambda value: value["machine"].update(commit="0123456789abcdef"))
    rows = claims.evidence(claims.all_claims()).split("\n")
    (row,) = [row for row in rows if "cubic_prefix_lm and softmax_lm, decode" in row]
    assert "`0123456789`" in row and "growth" in row and "--output_file" in row and "(results/growth.json)" in row
    assert any("not recorded" in row for row in rows)  # of files from before commits were

    older = {"machine": {"commit": "fedcba9876543210", "command": "ordnung older"}, "variants": ["softmax"]}
    change(files, "growth", lambda value: value.update(earlier=[older]))
    rows = claims.evidence(claims.all_claims()).split("\n")
    (row,) = [row for row in rows if "cubic_prefix_lm and softmax_lm, decode" in row]
    assert "`0123456789`, `fedcba9876`" in row and "<br>`ordnung older`" in row


def test_what_mixes_is_below_the_bigram(files):
    quote = "the FFN does the mixing"
    assert [finding.verdict for finding in claim(quote).findings] == [OPEN, FAILS] and claim(quote).verdict == FAILS

    def mixing(value):
        value["variants"]["feed_forward"]["eval_perplexity"]["values"] = [5.8] * 5

    change(files, "compare_feed_forward", mixing)
    assert claim(quote).verdict == HOLDS
    (files / "compare_feed_forward.json").unlink()
    assert {finding.number for finding in claim(quote).findings} == {"not run yet"} and claim(quote).verdict == OPEN


def test_speed_follows_the_quartiles_of_all_runs(files):
    quote = "5.5× faster"
    assert [finding.verdict for finding in claim(quote).findings] == [HOLDS, OPEN, FAILS, FAILS]

    def faster(value):
        for row in value["results"]:
            if row["name"].startswith("source") and row["name"].endswith("conv"):
                row["seconds"].update({key: row["seconds"][key] / 10 for key in ("median", "q1", "q3")})

    for name in ("conv_lm_benchmark", "conv_lm_benchmark_512", "conv_lm_benchmark_mixer"):
        change(files, name, faster)
    assert claim(quote).verdict == HOLDS

    def once(value):
        for row in value["results"]:
            if "seconds" in row:
                row["seconds"]["n"] = 1

    change(files, "conv_lm_benchmark_mixer", once)
    assert claim(quote).verdict == OPEN


def test_language_models_decide_only_below_the_trigram(files):
    quote = "3.2 % lower perplexity"
    assert claim(quote).verdict == OPEN

    def learned(value):
        for name, result in value["variants"].items():
            scale = 0.2 if name == "conv_source" else 0.3
            result["eval_perplexity"]["values"] = [scale * 150 + i for i in range(3)]

    change(files, "conv_lm_compare", learned)
    ends = {"conv_source": 30, "conv_source_equal_compute": 31, "softmax": 45}
    found = {name: {"eval_perplexity": {"values": [mean + i for i in range(3)]}} for name, mean in ends.items()}
    write(files, "compare_protocol", found)
    change(files, "compare_protocol", lambda value: value.update(ngrams={"trigram": {"mean": 80}}))
    assert claim(quote).verdict == HOLDS
    change(files, "compare_protocol", lambda value: value.update(ngrams={"trigram": {"mean": 40}}))
    assert [finding.verdict for finding in claim(quote).findings] == [HOLDS] * 2 + [OPEN] * 2
    (files / "conv_lm_compare_ngrams.json").unlink()
    assert {finding.verdict for finding in claim(quote).findings} == {OPEN}  # nothing to hold them against


def without_static(value):
    value["results"] = [row for row in value["results"] if not row["name"].endswith("_static")]


def test_decode_speed_waits_for_a_static_cache(files):
    quote = ("faster than attention's after 32,768", "conv_lm")
    change(files, "conv_lm_benchmark_decode", without_static)
    assert claim(*quote).verdict == OPEN

    def static(value):
        (row,) = [row for row in value["results"] if (row["name"], row["length"]) == ("softmax_lm", 32768)]
        seconds = {key: value / 100 if key != "n" else value for key, value in row["seconds"].items()}
        for name in ("softmax_lm_static", "gpt2_sdpa_static"):
            value["results"].append({**row, "name": name, "seconds": seconds})

    change(files, "conv_lm_benchmark_decode", static)
    assert claim(*quote).verdict == FAILS  # held against the better form


def test_growth_is_told_of_every_family_and_not_against_a_cache_that_is_copied(files):
    told = growing.series()
    assert {one.family for one in told} == set(FAMILIES) - {"softmax_lm"}
    for one in told:
        both = sorted(set(one.own) & set(one.reference))
        if both and one.from_on() == f"all from {both[0]:,}":
            assert all(one.reference[n]["median"] >= one.own[n]["median"] for n in both)
    change(files, "conv_lm_benchmark_decode", without_static)
    (decode,) = (one for one in growing.series() if (one.name, one.task) == ("conv_lm", "decode, one token"))
    assert not decode.reference and decode.from_on() == "-"


def test_a_universal_claim_fails_by_one_case(files):
    unnecessary = claim("content-dependent scores are unnecessary")
    assert {FAILS, HOLDS} <= {finding.verdict for finding in unnecessary.findings} and unnecessary.verdict == FAILS


def test_hops_along_a_function_count_once_they_are_there(files):
    def run(values):
        return {"equal_compute": {"answers": {"values": values, "mean": sum(values) / 3}}}

    more, quote = {"machine": {"command": "any"}}, "insanely more powerful"
    (files / "cubic_prefix_lm_function.json").unlink(missing_ok=True)
    first = claim(quote).findings[0]
    assert (first.number, first.verdict) == ("not run yet", OPEN)
    variants = {"cubic": run([1.0, 1.0, 0.99]), "softmax": run([0.6, 0.6, 0.61]), "softmax_fast": run([0.7, 0.71, 0.7])}
    (files / "cubic_prefix_lm_function.json").write_text(json.dumps({**more, "variants": variants}))
    first = claim(quote).findings[0]
    assert first.verdict == HOLDS and "softmax_fast" in first.against  # against the best attention
    assert claim(quote).verdict == PART


def write(files, name, variants, **settings):
    results = {"machine": {"command": "any"}, "settings": settings, "variants": variants}
    (files / f"{name}.json").write_text(json.dumps(results))


def test_rows_appear_with_their_files(files):
    """Recall of sparse attention, the ladder of scores, Linformer's tables and its rank: not run, then decided."""
    names = ("sparse_attention_lm_recall", "ladder_recall", "ladder_compare", "linformer_lm_table2")
    for name in (*names, "linformer_lm_lowrank", "quadratic_kernel_lm_compare", "compare_protocol"):
        (files / f"{name}.json").unlink(missing_ok=True)
    recalls, special = "each kind recalls what full attention does", "the dot product is not special"
    par, low, text = "on par with standard", "low-rank matrix", "no worse than attention on text"
    best = "of all three parameter sharing"
    for quote in (
        (recalls,),
        (special,),
        (par,),
        (best,),
        (low,),
        (text, "quadratic"),
        (text, "sparse"),
        (text, "conv", "gated"),
    ):
        found = claim(*quote)
        assert {finding.number for finding in found.findings} == {"not run yet"} and found.verdict == OPEN

    def right(*shares):
        return {"accuracy": [{"values": [share, share + 0.001, share - 0.001]} for share in shares]}

    kinds = {kind: right(1, 0.9) for kind in ("global_8", "stride_2", "stride_4", "random_2")}
    write(files, names[0], {"softmax_rope": right(1, 0.9), "local": right(1, 0.3), **kinds}, num_pairs=[2, 16])
    assert [finding.verdict for finding in claim(recalls).findings] == [FAILS, HOLDS, HOLDS, HOLDS, HOLDS]
    assert claim(recalls).verdict == FAILS

    rungs = {name: right(0.99) for name in ("additive", "bilinear", "distance", "mlp")}
    rest = {"dot": right(0.9), "position": right(0.1), "convolution": right(0.1)}
    write(files, names[1], {**rungs, **rest}, num_pairs=[24])
    special_ones = claim(special)
    assert {finding.verdict for finding in special_ones.findings if "recall" in finding.against} == {HOLDS}  # better
    assert special_ones.verdict == OPEN  # text is still missing
    unnecessary = claim("content-dependent scores are unnecessary").findings
    assert [finding.verdict for finding in unnecessary if "score: recall" in finding.against] == [FAILS, FAILS]

    def scored(*scores):
        return {"tasks": {task: {"score": {"values": list(scores)}} for task in ("sst2", "qnli", "imdb")}}

    equals, worse = dict.fromkeys(("softmax", "layerwise_128", "layerwise_256"), scored(0.9, 0.91)), scored(0.7, 0.71)
    ways = {
        "layerwise_64": worse,
        "none_64": worse,
        "headwise_64": scored(0.6, 0.61),
        "key_value_64": equals["softmax"],
    }
    write(files, names[3], equals | ways)
    assert [finding.verdict for finding in claim(par).findings] == [FAILS] * 3 + [HOLDS] * 6
    assert [finding.verdict for finding in claim(best).findings] == [HOLDS, HOLDS, FAILS]

    rows = [{"n": n, "needed": [[[n / 3, n / 3]]] * 2, "shuffled": [[[n / 2]]] * 2} for n in (64, 128)]
    low_rank = {"machine": {"command": "any"}, "settings": {"share": 0.9}, "models": [{"lengths": rows}]}
    (files / "linformer_lm_lowrank.json").write_text(json.dumps(low_rank))
    grows, below = claim(low).findings
    assert (grows.verdict, below.verdict) == (FAILS, HOLDS) and "exponent 1.00" in grows.number


def test_what_the_squared_kernel_costs_is_read_from_its_counts(files):
    orders = claim("attention is an O(d²) problem").findings
    assert [finding.verdict for finding in orders[:2]] == [FAILS, HOLDS]
    ranks = {FAILS: [], HOLDS: []}
    for finding in orders[2:]:
        ranks[HOLDS if "squared kernel's" in finding.against else FAILS].append(finding.verdict)
    assert all(found and set(found) == {expected} for expected, found in ranks.items())

    def square(value):
        for row in value["costs"]:
            row["counted"] = 3 * row["d"] ** 2

    change(files, "quadratic_kernel_lm_rank", square)
    assert claim("attention is an O(d²) problem").findings[0].verdict == HOLDS


def test_faster_from_d_squared_on_is_asked_there(files):
    quote = "faster from d² tokens on"
    for head_size, finding in zip((16, 32, 64), claim(quote).findings):
        rows = results.load("quadratic_kernel_lm_bench")["lengths"]
        first = min(row["length"] for row in rows if row["head_size"] == head_size and row["length"] >= head_size**2)
        assert f"N = {first}," in finding.key and finding.verdict == FAILS
    assert claim("faster than fused attention at 16,384").verdict == HOLDS

    def faster(value):
        for row in value["lengths"]:
            row["forward"]["squared"] = {
                key: v if key == "n" else v / 10 for key, v in row["forward"]["squared"].items()
            }

    change(files, "quadratic_kernel_lm_bench", faster)
    assert claim(quote).verdict == HOLDS


def test_memory_takes_more_than_one_run(files):
    quote = "14× less memory"
    (files / "linformer_lm_grid.json").unlink()
    assert all("(n = 1)" in finding.number for finding in claim(quote).findings if "less" in finding.number)
    assert claim(quote).verdict == OPEN

    def run(factor):
        value = results.load("linformer_lm_encoder")
        for row in value["results"]:
            if row["name"] == "linformer_encoder" and "peak_bytes" in row:
                row["peak_bytes"] *= factor
        (files / "linformer_lm_grid.json").write_text(json.dumps(value))
        return {finding.against: finding.verdict for finding in claim(quote).findings}

    stored = "stored scores, all heads at once, 4,096 tokens: 14×"
    assert run(1.1)[stored] == HOLDS and run(2)[stored] == OPEN  # 19.9 times and 18.1, then 9.9
    assert run(1)["fused, 4,096 tokens: 14×"] == FAILS


def test_robust_training_is_told_by_the_spread_below_the_trigram(files):
    quote = "more robust to train"
    assert [finding.verdict for finding in claim(quote).findings] == [OPEN, OPEN]

    def spread(name, ratio):
        def edit(value):
            value["variants"][name]["eval_perplexity"]["values"] = [5.9 * ratio**i for i in range(5)]

        change(files, "compare_protocol", edit)
        return claim(quote).findings[1].verdict

    assert spread("conv_source", 1.0001) == HOLDS and spread("conv_source", 1.05) == FAILS
    change(files, "compare_protocol", lambda value: value["ngrams"]["trigram"].update(mean=1.0))
    assert claim(quote).findings[1].verdict == OPEN  # counting is better than both


def test_times_of_sparse_attention_follow_their_samples(files):
    quote = "each kind is faster than fused attention"
    rows = results.load("sparse_attention_lm_bench")["attention"]
    (row,) = (row for row in rows if row["length"] == 4096 and not row["backward"])
    faster = median(row["competitors"]["SDPA"]["all_seconds"]) / median(row["competitors"]["local"]["all_seconds"])
    assert claim(quote).verdict == HOLDS and claim(quote).findings[0].number.startswith(f"{faster:.2f}×")

    def slower(value):
        for row in value["attention"]:
            row["competitors"]["local"]["all_seconds"] = [10.0] * 5

    change(files, "sparse_attention_lm_bench", slower)
    assert [finding.verdict for finding in claim(quote).findings[:2]] == [FAILS, HOLDS]
