"""Write the tables of the cards and the pages beside them, and the cards' figures, from model_cards/results.

    python scripts/make_cards.py            # rewrite what stands between the markers
    python scripts/make_cards.py --check    # exit status 1 if a table is not what the results give
    python scripts/make_cards.py --page out/claims.html    # and a page of curves and heatmaps to pick from

A table of `card_tables.py` stands between `<!-- table: NAME -->` and `<!-- end -->`; nothing else of a file is touched.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from ordnung.scripts.common.errors import ScriptError, run_script
from ordnung.scripts.common.files import write_text
from ordnung.scripts.common.options import option, parse_options
from ordnung.scripts.reports import page
from ordnung.scripts.reports.card_tables import FIGURES, TABLES

ROOT = Path(__file__).resolve().parents[1]
GUIDES = ["README.md", "scripts/README.md"]  # they may hold tables too
MARKER = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.S)


def fill(text: str) -> str:
    """`text` with every marked table made anew.

    Raises:
        ScriptError: a marker names no table.
    """

    def table(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise ScriptError(f"no table {match[2]!r}; there are {', '.join(TABLES)}")
        return f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}"

    return MARKER.sub(table, text)


@dataclass
class CardOptions:
    check: bool = option(False, "Write nothing; exit status 1 if a table is out of date.")
    page: str | None = option(None, "Write an HTML page of curves and heatmaps too; needs ordnung[page].")


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments (`sys.argv[1:]` if None); returns the exit status."""
    options = parse_options(CardOptions, argv, __doc__)
    check = options.check
    stale, shown = 0, set()
    for path in [*(ROOT / name for name in GUIDES), *sorted((ROOT / "model_cards").rglob("*.md"))]:
        old = path.read_text(encoding="utf-8")
        new = fill(old)
        shown |= {name for name in FIGURES if f"figures/{name}.png" in new}
        if new != old:
            stale += 1
            print(f"{path.relative_to(ROOT)}: {'out of date' if check else 'written'}")
            if not check:
                write_text(path, new)
    if not check:
        for name in shown:
            FIGURES[name](ROOT / "model_cards" / "figures" / f"{name}.png")
    if options.page is not None:
        page.write(options.page)
        print(options.page)
    return 1 if check and stale else 0


if __name__ == "__main__":
    run_script(main)
