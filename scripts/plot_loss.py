"""Draw the loss curve of a pretraining run, also of one that is still running.

ordnung plot-loss --run out/demo
"""

from dataclasses import dataclass
from pathlib import Path

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import option, parse_options, required


@dataclass(kw_only=True)
class PlotOptions:
    run: str = required("The run's folder, or its metrics.jsonl.", section="data")
    output: str | None = option(None, "Image file; default: loss_curve.png beside metrics.jsonl.", section="output")
    title: str | None = option(None, "Above the curve.")


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments (`sys.argv[1:]` if None); returns the exit status."""
    options = parse_options(PlotOptions, argv, __doc__)
    from ordnung.scripts.pretraining.report import plot_loss

    metrics = Path(options.run)
    if metrics.is_dir():
        metrics = metrics / "metrics.jsonl"
    image = options.output or metrics.with_name("loss_curve.png")
    plot_loss(metrics, image, options.title)
    print(image)
    return 0


if __name__ == "__main__":
    run_script(main)
