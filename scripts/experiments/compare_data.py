"""The options and the text that all runs of a comparison share."""

import shutil
from pathlib import Path
from typing import Any

from ordnung.scripts.common import corpus
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.options import arguments, parse_options
from ordnung.scripts.pretraining.data import load_documents
from ordnung.scripts.pretraining.options import PretrainOptions

# Options of pretrain.py that the comparison sets for each run.
OWN_OPTIONS = ("output_dir", "seed", "model_type", "config_name", "model_name_or_path", "config_overrides")
OWN_OPTIONS += ("overwrite_output_dir", "resume_from_checkpoint")
# Those that have done their work once the text is split and the tokenizer made.
DATA_OPTIONS = ("train_file", "validation_file", "dataset_name", "dataset_config_name", "text_column")
DATA_OPTIONS += ("train_weights", "join_rows", "exclude_file")
DATA_OPTIONS += ("tokenizer_name", "train_tokenizer_vocab_size")


def check_pretrain(options: dict[str, Any]) -> PretrainOptions:
    """The options of pretrain.py that all runs share, parsed.

    Raises:
        ScriptError: wrong options, or such that the runs cannot be compared position by position.
    """
    own = [name for name in OWN_OPTIONS if name in options]
    if own:
        raise ScriptError(f"--pretrain {own[0]}: the comparison sets it for each run, leave it out")
    model = {"model_type": "any", "output_dir": "any"}
    shared = parse_options(PretrainOptions, arguments({**options, **model}))
    if shared.objective != "causal" or shared.streaming or shared.respect_document_boundaries:
        raise ScriptError(
            "variants are compared as causal models on full blocks of text in memory: leave objective, streaming and "
            "respect_document_boundaries out of --pretrain"
        )
    return shared


def prepare_data(output_dir: Path, shared: PretrainOptions) -> dict[str, str]:
    """Split the text and make the tokenizer, once for all runs.

    Returns:
        options of pretrain.py: files with a document per line, and the tokenizer's folder.
    Raises:
        ScriptError: nothing held out; as `load_documents` and the functions of `corpus`.
    """
    folder, unfinished = output_dir / "data", output_dir / ".tmp-data"
    if not folder.exists():
        train, held_out = load_documents(shared)
        if held_out is None:
            raise ScriptError("a comparison needs held-out text: --pretrain validation_fraction must be above 0")
        if shared.tokenizer_name:
            tokenizer = corpus.load_tokenizer(shared.tokenizer_name, shared.trust_remote_code)
        else:
            tokenizer = corpus.train_tokenizer(corpus.texts(train), shared.train_tokenizer_vocab_size, masked=False)
        shutil.rmtree(unfinished, ignore_errors=True)
        tokenizer.save_pretrained(unfinished / "tokenizer")
        for name, documents in (("train", train), ("held_out", held_out)):
            documents.to_json(unfinished / f"{name}.jsonl")
        unfinished.rename(folder)
    return {
        "train_file": str(folder / "train.jsonl"),
        "validation_file": str(folder / "held_out.jsonl"),
        "tokenizer_name": str(folder / "tokenizer"),
    }
