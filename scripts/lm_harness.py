"""Run lm-evaluation-harness on a checkpoint.

    python scripts/lm_harness.py --model_name_or_path out/demo --tasks my_task --include_path my_tasks/

`--include_path` is a folder of the harness's YAML task files, which may name local data files; tasks that the harness
ships are downloaded by it. Needs `pip install "ordnung[harness]"`.
"""

from dataclasses import dataclass
from pathlib import Path

import ordnung  # noqa: F401  (its model types enter the Auto classes)
from ordnung.scripts.common.errors import ScriptError, closest, run_script
from ordnung.scripts.common.files import write_json
from ordnung.scripts.common.machine import machine_info
from ordnung.scripts.common.options import option, parse_options, required


@dataclass(kw_only=True)
class HarnessOptions:
    model_name_or_path: str = required("Checkpoint: folder or Hub name.")
    tasks: list[str] = required("Names of the harness's tasks, or of those in include_path.")
    include_path: str | None = option(None, "Folder with further task files.")
    num_fewshot: int | None = option(None, "Examples shown; default: what the task says.")
    limit: int | None = option(None, "Evaluate on the first so many examples of each task.")
    batch_size: int = option(8, "Requests in a batch.")
    max_length: int | None = option(None, "Tokens of a request; default: the model's length.")
    use_cpu: bool = option(False, "Stay on the CPU even where there is an accelerator.")
    trust_remote_code: bool = option(False, "Run code that comes with the checkpoint.")
    output_file: str | None = option(None, "JSON file for the results.")

    def __post_init__(self):
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ScriptError(f"--include_path {self.include_path}: there is no such folder")
        if self.output_file is not None and not Path(self.output_file).parent.is_dir():
            raise ScriptError(f"--output_file {self.output_file}: its folder does not exist")


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments (`sys.argv[1:]` if None); returns the exit status."""
    options = parse_options(HarnessOptions, argv, __doc__)
    try:
        import lm_eval
        import torch
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ScriptError(
            f'lm-evaluation-harness cannot be imported ({error}): pip install "ordnung[harness]"'
        ) from error
    manager = TaskManager(include_path=options.include_path)
    for name in options.tasks:
        if name not in manager.all_tasks:
            raise ScriptError(f"unknown task {name!r}{closest(name, manager.all_tasks)}; see --include_path")
    accelerated = torch.accelerator.is_available() and not options.use_cpu
    try:
        model = HFLM(
            pretrained=options.model_name_or_path,
            device=str(torch.accelerator.current_accelerator()) if accelerated else "cpu",
            batch_size=options.batch_size,
            max_length=options.max_length,
            trust_remote_code=options.trust_remote_code,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ScriptError(
            f"no causal language model can be loaded from {options.model_name_or_path}: {error}"
        ) from error
    done = lm_eval.simple_evaluate(
        model=model,
        tasks=options.tasks,
        task_manager=manager,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        bootstrap_iters=1000,
    )
    print(lm_eval.utils.make_table(done))
    if options.output_file:
        versions = {"lm_eval": lm_eval.__version__, "tasks": done["versions"]}
        results = {"model": options.model_name_or_path, "results": done["results"], "versions": versions}
        write_json(options.output_file, {**results, "num_fewshot": done["n-shot"], "machine": machine_info()})
        print(f"Written: {options.output_file}")
    return 0


if __name__ == "__main__":
    run_script(main)
