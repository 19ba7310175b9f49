"""Fine-tune a checkpoint on GLUE: `python scripts/finetune_glue.py --model_name_or_path out/demo --task_name sst2 ...`.

Tasks: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, or all. Runs on one process or, through `accelerate launch`,
on several. See finetuning/run.py for what the output folder receives; the same command goes on where it was stopped.
"""

from dataclasses import dataclass

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import parse_options, required
from ordnung.scripts.finetuning.options import FinetuneOptions
from ordnung.scripts.finetuning.run import run
from ordnung.scripts.finetuning.tasks import GLUE, choose_tasks


@dataclass(kw_only=True)
class GlueOptions(FinetuneOptions):
    task_name: list[str] = required(f"One or more of {', '.join(GLUE)}, or all.")


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments (`sys.argv[1:]` if None); returns the exit status."""
    options = parse_options(GlueOptions, argv, __doc__)
    return run(choose_tasks(options.task_name, GLUE), options)


if __name__ == "__main__":
    run_script(main)
