"""Convert a BERT-style, GPT-2 or Llama-style checkpoint into a family of this package.

    ordnung convert --source bert-base-uncased --model_type softmax_lm --output_dir out/softmax-bert

It is written with its tokenizer and its code, so that others load it without ordnung.
"""

from dataclasses import dataclass
from pathlib import Path

import ordnung
from ordnung.modeling.registration import REGISTERED
from ordnung.scripts.common.errors import ScriptError, closest, run_script
from ordnung.scripts.common.options import MergeKeyValues, option, parse_options, required


@dataclass(kw_only=True)
class ConvertOptions:
    source: str = required("Checkpoint to convert: folder or Hub name.", section="model")
    gguf_file: str | None = option(
        None, "GGUF file of the source to read instead of its own; needs `pip install ordnung[gguf]`."
    )
    model_type: str = required(f"Family to convert into: {', '.join(REGISTERED)}.")
    head: str | None = option(None, "Class to make, such as Model or ForSequenceClassification; default: as before.")
    config_overrides: str | None = option(None, "Config fields to change: projected_size=256.", action=MergeKeyValues)
    output_dir: str = required("Folder to write; a new or an empty one.", section="output")
    plain: bool = option(False, "Leave out the code that lets the folder load without ordnung installed.")

    def __post_init__(self):
        if self.model_type not in REGISTERED:
            hint = closest(self.model_type, REGISTERED)
            raise ScriptError(f"--model_type {self.model_type!r} is none of {', '.join(REGISTERED)}{hint}")
        folder = Path(self.output_dir)
        if folder.exists() and not folder.is_dir():
            raise ScriptError(f"--output_dir {folder} is a file; name a folder")
        if folder.is_dir() and any(folder.iterdir()):
            raise ScriptError(f"--output_dir {folder} is not empty; name a new folder")


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments (`sys.argv[1:]` if None); returns the exit status."""
    options = parse_options(ConvertOptions, argv, __doc__)
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    from ordnung.scripts.common import limits
    from ordnung.scripts.common.models import check_source

    check_source(options.source, options.gguf_file)
    try:
        model, report = ordnung.convert(
            options.source,
            options.model_type,
            head=options.head,
            output_report=True,
            gguf_file=options.gguf_file,
            **(options.config_overrides or {}),
        )
    except (ImportError, OSError, ValueError, StrictDataclassError) as error:
        raise ScriptError(f"cannot convert {options.source}: {' '.join(str(error).split())}") from error
    print(report)
    try:
        gguf = {} if options.gguf_file is None else {"gguf_file": options.gguf_file}
        tokenizer = limits.fit_tokenizer(AutoTokenizer.from_pretrained(options.source, **gguf), model)
    except (OSError, ValueError):
        tokenizer = None
        print(f"  note: no tokenizer in {options.source}: put one into {options.output_dir}")
    if tokenizer is not None:
        limits.check_vocabulary(tokenizer, model.config, "put the source's own tokenizer beside it")
    if options.plain:
        model.save_pretrained(options.output_dir)
        if tokenizer is not None:
            tokenizer.save_pretrained(options.output_dir)
    else:
        ordnung.save_standalone(model, options.output_dir, tokenizer)
    print(options.output_dir)
    return 0


if __name__ == "__main__":
    run_script(main)
