"""The model cards: tables as the results files give them, figures there, metadata that the Hub can read."""

import inspect
import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from ordnung.modeling.registration import FAMILIES, heads_of
from ordnung.scripts import make_cards
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.hub.model_card import PIPELINE_TAGS, head_of
from ordnung.scripts.reports import card_tables
from ordnung.scripts.reports import results as card_results

ROOT = Path(__file__).parents[2]
CARDS = sorted(path for path in (ROOT / "model_cards").glob("*.md") if path.stem not in ("claims", "linearized"))


@pytest.fixture
def project(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "model_cards", tmp_path / "model_cards")
    (tmp_path / "scripts").mkdir()
    for name in make_cards.GUIDES:
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(make_cards, "ROOT", tmp_path)
    monkeypatch.setattr(card_results, "RESULTS", tmp_path / "model_cards" / "results")
    return tmp_path


def test_tables_are_what_the_results_give(project, capsys):
    assert make_cards.main(["--check"]) == 0, capsys.readouterr().out


def test_check_sees_an_edited_figure(project):
    page = project / "model_cards/results/conv_lm.md"
    text = page.read_text()
    page.write_text(text.replace("×", "9×", 1))
    assert make_cards.main(["--check"]) == 1
    assert make_cards.main([]) == 0
    assert page.read_text() == text


def test_missing_results_are_named(project):
    (project / "model_cards/results/conv_lm_benchmark.json").unlink()
    with pytest.raises(ScriptError, match="conv_lm_benchmark.json"):
        make_cards.main([])


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_card_loads_and_is_short(card):
    data = ModelCard.load(card).data
    assert data.license == "apache-2.0" and data.library_name == "transformers"
    assert len(card.read_text().splitlines()) <= 120  # what is longer lies in a page of results/


@pytest.mark.parametrize(
    "page", sorted((ROOT / "model_cards").rglob("*.md")), ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_lead_somewhere(page):
    for link, _, place in re.findall(r"\]\(([^)#]+)(#([^)]*))?\)", page.read_text()):
        target = page.parent / link
        assert link.startswith("http") or target.exists(), link
        if place:
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.M)
            assert place in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, place


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_metadata_is_what_the_hub_takes(card):
    """Known fields of the right kind, a task that the family has a head for, the same after reading and writing."""
    read = ModelCard.load(card)
    data = read.data.to_dict()
    assert set(data) <= {*inspect.signature(ModelCardData).parameters, "model-index"}
    assert data["pipeline_tag"] in {PIPELINE_TAGS[head_of(name)] for name in heads_of(card.stem).values()}
    for name in ("tags", "datasets", "metrics"):
        values = data.get(name, [])
        assert all(isinstance(value, str) for value in values) and len(set(values)) == len(values)
    assert "ordnung" in data["tags"]
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in data.get("datasets", []))
    assert ModelCard(str(read)).data.to_dict() == data


def test_cards_are_of_families():
    assert CARDS and {card.stem for card in CARDS} <= set(FAMILIES)


def test_results_name_machine_versions_and_command():
    for path in (ROOT / "model_cards" / "results").glob("*.json"):
        machine = json.loads(path.read_text())["machine"]
        for entry in ("cpu", "threads", "torch", "transformers", "ordnung", "command", "date"):
            assert machine[entry], (path.name, entry)


def test_pretrained_variants_stand_beside_what_counted_their_text(project):
    told = card_tables.TABLES["conv_transfer"]
    assert "trigram 1.7251. Below its trigram: none." in told()
    path = card_results.RESULTS / "transfer_ngrams.json"
    counted = json.loads(path.read_text())
    own = card_results.load("transfer")["variants"]["conv"]["pretraining"]["evaluation"]["eval_perplexity"]
    counted["ngrams"]["trigram"]["mean"] = 1.05 * own  # between convolution and attention
    path.write_text(json.dumps(counted))
    assert "Below its trigram: conv." in told()
    path.unlink()
    assert "trigram" not in told()
