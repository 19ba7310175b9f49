"""The command `ordnung`: the programs of this folder under one name, and commands of others with our families.

`ordnung pretrain ...` is `python -m ordnung.scripts.pretrain ...`, and in a clone `python scripts/pretrain.py ...`.
"""

import ast
import importlib
import sys
from pathlib import Path

import ordnung
from ordnung.scripts.common.errors import ScriptError, closest, run_script

# By heading: commands, named as the files of their programs, but for those of `FILES`.
GROUPS = {
    "train": "pretrain finetune convert linearize",
    "use": "predict generate evaluate plot-loss plot-mixing plot-rank share",
    "compare": "compare transfer baselines ngrams recall prefix-tasks benchmark growth bench-prefix bench-quadratic "
    "bench-finetune bench-packing bench-conv peers bench-sparse claims",
}
FILES = {"evaluate": "evaluate_lm", "share": "push_to_hub"}
PROGRAMS = {name: FILES.get(name, name.replace("-", "_")) for group in GROUPS.values() for name in group.split()}
# Commands of others, run with the families known.
OTHERS = {
    "lm-eval": "Run lm-evaluation-harness: `ordnung lm-eval --model hf --model_args pretrained=out/demo ...`.",
    "serve": "Answer requests as OpenAI's API does: `transformers serve`, with ordnung's families.",
    "chat": "Talk in the terminal to a model that is served: `transformers chat`.",
}


def summary(program: str) -> str:
    """The first line of a program's description, read without importing it."""
    source = Path(__file__).with_name(f"{program}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)).split("\n")[0]


def overview() -> str:
    """All commands, with a line each."""
    groups = {title: {name: summary(PROGRAMS[name]) for name in group.split()} for title, group in GROUPS.items()}
    groups["hand over, with ordnung's families known"] = OTHERS
    width = max(len(command) for group in groups.values() for command in group)
    lines = ["usage: ordnung COMMAND [options]", "", "`ordnung COMMAND --help` lists the options of one."]
    for title, group in groups.items():
        lines += ["", f"{title}:", *(f"  {command:{width}}  {line}" for command, line in group.items())]
    return "\n".join(lines)


def hand_over(command: str, argv: list[str]):
    """Run a command of others.

    Raises:
        ScriptError: what it needs is not installed.
    """
    if command == "serve" and "--help" not in argv:
        from ordnung.modeling.registration import REGISTERED, heads_of

        classes = [getattr(ordnung, name) for model_type in REGISTERED for name in heads_of(model_type).values()]
        from transformers.cli.serving import model_manager

        # the server looks a checkpoint's class up in the namespace of transformers, as it has it
        for model_class in classes:
            setattr(model_manager.transformers, model_class.__name__, model_class)
    try:
        if command == "lm-eval":
            from lm_eval.__main__ import cli_evaluate

            sys.argv = ["ordnung lm-eval", *argv]  # where it looks for its options
            cli_evaluate()
        else:
            from transformers.cli.transformers import app

            app(args=[command, *argv], prog_name="ordnung")
    except ImportError as error:
        needs = {"lm-eval": "harness"}.get(command, "serving")
        raise ScriptError(f'{" ".join(str(error).split())}: pip install "ordnung[{needs}]"') from error


def main(argv: list[str] | None = None) -> int | None:
    """Run a command given as words (`sys.argv[1:]` if None); returns the exit status.

    Raises:
        ScriptError: there is no such command; as the command.
    """
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(overview())
    elif command == "--version":
        print(ordnung.__version__)
    elif command in OTHERS:
        hand_over(command, rest)
    elif command in PROGRAMS:
        return importlib.import_module(f"ordnung.scripts.{PROGRAMS[command]}").main(rest)
    else:
        hint = closest(command, [*PROGRAMS, *OTHERS])
        raise ScriptError(f"unknown command {command!r}{hint}; `ordnung --help` lists all")
    return 0


def start():
    """What the installed command calls."""
    run_script(main)


if __name__ == "__main__":
    start()
