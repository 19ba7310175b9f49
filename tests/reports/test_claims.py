"""The page of claims: every verdict is computed, and follows its files."""

import json
import shutil
from pathlib import Path

import pytest

from ordnung.scripts.experiments.verdicts import FAILS, HOLDS, OPEN, PART
from ordnung.scripts.reports import claims, results

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


def claim(quote):
    (found,) = [claim for claim in claims.all_claims() if quote in claim.quote]
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
    assert "`0123456789`" in row and "growth.py" in row and "(results/growth.json)" in row
    assert any("not recorded" in row for row in rows)  # of files from before commits were


def test_a_claim_without_an_experiment_is_not_decided():
    assert claim("the FFN does the mixing").verdict == OPEN


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
    assert claim(quote).verdict == HOLDS
    (files / "conv_lm_compare_ngrams.json").unlink()
    assert claim(quote).verdict == OPEN  # nothing to hold them against


def without_static(value):
    value["results"] = [row for row in value["results"] if not row["name"].endswith("_static")]


def test_decode_speed_waits_for_a_static_cache(files):
    quote = "faster than attention's after 32,768"
    change(files, "conv_lm_benchmark_decode", without_static)
    assert claim(quote).verdict == OPEN

    def static(value):
        (row,) = [row for row in value["results"] if (row["name"], row["length"]) == ("softmax_lm", 32768)]
        seconds = {key: value / 100 if key != "n" else value for key, value in row["seconds"].items()}
        for name in ("softmax_lm_static", "gpt2_sdpa_static"):
            value["results"].append({**row, "name": name, "seconds": seconds})

    change(files, "conv_lm_benchmark_decode", static)
    assert claim(quote).verdict == FAILS  # held against the better form


def test_a_universal_claim_fails_by_one_case(files):
    unnecessary = claim("content-dependent scores are unnecessary")
    assert {finding.verdict for finding in unnecessary.findings} == {FAILS, OPEN} and unnecessary.verdict == FAILS


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
