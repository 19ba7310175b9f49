"""Draw a run's loss curve: `python scripts/plot_loss.py out/demo` (a run's folder or its metrics.jsonl)."""

import argparse
from pathlib import Path

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.pretraining.report import plot_loss


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description="Draw a pretraining run's loss curve.")
    parser.add_argument("run", help="the run's folder, or its metrics.jsonl")
    parser.add_argument("--output", help="image file; default: loss_curve.png beside metrics.jsonl")
    parser.add_argument("--title")
    options = parser.parse_args(argv)
    metrics = Path(options.run)
    if metrics.is_dir():
        metrics = metrics / "metrics.jsonl"
    image = options.output or metrics.with_name("loss_curve.png")
    plot_loss(metrics, image, options.title)
    print(image)


if __name__ == "__main__":
    run_script(main)
