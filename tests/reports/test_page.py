"""The page of curves and heatmaps: its points are those of the results files, and a browser draws and picks them."""

import json
import re
import shutil
import subprocess

import pytest

from ordnung.modeling.registration import FAMILIES
from ordnung.scripts import make_cards
from ordnung.scripts.reports import claims, page, results

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Picks as a reader does, and notes what is drawn after each.
PICKS = """<script>
const told = {}, count = (where) => document.querySelectorAll(where).length;
const set = async (picture, id, value) => { await picture.view.signal(id, value).runAsync(); };
const lines = () => count("#curves .mark-line.role-mark path");
window.drawn.then(async ([curves, heatmaps]) => {
  told.title = document.querySelector("#curves .role-title-text text").textContent;
  told.all = lines();
  const box = [...document.querySelectorAll("#pick-families input")];
  told.families = box.map((one) => one.name);
  box[0].click(); await curves.view.runAsync(); told.without = lines(); box[0].click(); await curves.view.runAsync();
  const select = document.querySelector("#pick-metrics select");
  select.selectedIndex = 1; select.dispatchEvent(new Event("change")); await curves.view.runAsync();
  told.second = document.querySelector("#curves .role-title-text text").textContent;
  told.tiles = {};
  for (const family of document.querySelector("#pick-mixer select").options) {
    await set(heatmaps, "family", family.value);
    told.tiles[family.value] = count("#heatmaps .mark-rect.role-mark path");
  }
  told.requests = performance.getEntriesByType("resource").map((one) => one.name);
  document.body.dataset.told = JSON.stringify(told);
});
</script></body>"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    pytest.importorskip("vl_convert", reason='needs the libraries of Vega: pip install "ordnung[page]"')
    path = tmp_path_factory.mktemp("page") / "claims.html"
    page.write(path)
    return path


def opened(path):
    """The page's elements after its scripts have run, in a browser that reaches no network."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs a browser without a window, one of {', '.join(BROWSERS)}")
    options = "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync disable-background-networking"
    words = [f"--{option}" for option in f"{options} disable-component-update disable-dev-shm-usage dump-dom".split()]
    words += [f"--user-data-dir={path.parent / 'profile'}", "--virtual-time-budget=60000"]
    words += ["--host-resolver-rules=MAP * ~NOTFOUND", path.as_uri()]
    return subprocess.run([browser, *words], capture_output=True, text=True, timeout=240).stdout


def test_points_are_those_of_the_files():
    cost = page.told_apart([*page.counted(), *page.timed(), *page.timed_alone()])
    assert set(FAMILIES) <= {one["family"] for one in cost}
    growth = results.load("growth")
    (point,) = [one for one in cost if one["metric"].startswith("FLOPs, counted: training step")
                and (one["name"], one["x"]) == ("conv_lm", growth["lengths"][0])]  # fmt: skip
    assert point["y"] == pytest.approx(growth["families"]["conv_lm"]["train"]["values"][0], rel=1e-4)
    quality = list(page.learned())
    for one in [*cost, *quality]:
        assert one.get("low", one["y"]) <= one["y"] * 1.001 and one["y"] <= one.get("high", one["y"]) * 1.001
    accuracy = results.load("conv_lm_recall")["variants"]["conv"]["accuracy"][0]["mean"]
    recalled = [one["y"] for one in quality if (one["metric"], one["name"], one["x"]) ==
                ("right answers, by key-value pairs (conv_lm_recall)", "conv", 2)]  # fmt: skip
    assert recalled == [pytest.approx(accuracy, rel=1e-4)]


def test_a_later_run_stands_beside_an_earlier_one():
    first, other = ({"metric": "m", "family": "f", "name": name, "x": 1, "y": 1} for name in "ab")
    kept = page.told_apart([first, other, {**first, "y": 2}, {**first, "x": 3}])
    assert [(one["name"], one["y"], one["dash"]) for one in kept] == [
        ("a", 1, 0),
        ("b", 1, 1),
        ("a, run 2", 2, 2),
        ("a", 1, 0),
    ]


def test_page_holds_all_that_it_needs(written):
    text = written.read_text(encoding="utf-8")
    assert len(text) < 3_000_000
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.S)  # the libraries of Vega hold words of markup
    assert not re.search(r"<(script|link|img|iframe)\b|@import|url\(", own)
    assert all(name in text for name in FAMILIES) and "holds in part" in text
    (finding, *_) = claims.all_claims()[0].findings
    assert finding.key in text and results.machines(finding.file)[0]["command"] in text


def test_a_browser_draws_what_is_picked(written):
    path = written.with_name("picked.html")
    before, _, after = written.read_text(encoding="utf-8").rpartition("</body>")
    path.write_text(before + PICKS + after, encoding="utf-8")
    found = re.search(r'data-told="([^"]*)"', opened(path))
    assert found, "the page drew nothing"
    told = json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&"))
    assert told["all"] > told["without"] > 0 and set(FAMILIES) <= set(told["families"])
    assert told["title"] != told["second"] and "FLOPs" in told["title"]
    for mixer in (results.load(f"mixing_{name}") for name in FAMILIES):
        heads = mixer["layers"][0]["weights"]
        cells = sum(len(line.split()) for lines in heads for line in lines)
        assert told["tiles"][mixer["model_type"]] == cells, mixer["model_type"]
    assert [name for name in told["requests"] if not name.startswith("data:")] == []


def test_make_cards_writes_the_page_or_says_what_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "write", lambda path: tmp_path.joinpath("page.html").write_text("page"))
    monkeypatch.setattr(make_cards, "ROOT", tmp_path)
    (tmp_path / "model_cards").mkdir()
    (tmp_path / "scripts").mkdir()
    for name in make_cards.GUIDES:
        (tmp_path / name).write_text("nothing to fill")
    assert make_cards.main(["--page", str(tmp_path / "page.html")]) == 0
    assert "page.html" in capsys.readouterr().out and (tmp_path / "page.html").exists()
