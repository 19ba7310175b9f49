"""Share a checkpoint on the Hugging Face Hub.

    ordnung share --model_name_or_path out/demo --hub_model_id your-name/whale

Writes a stand-alone folder with tokenizer and model card to `hub` inside the checkpoint and uploads it in one commit.
Others load it with `from_pretrained("your-name/whale", trust_remote_code=True)`, without ordnung. Broken off, the same
command goes on with what is missing. `--dry_run` shows what would be uploaded, without a token or a network.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import option, parse_options, required
from ordnung.scripts.hub.options import COMMIT_MESSAGE, LICENSE, REVISION


@dataclass(kw_only=True)
class PushOptions:
    """Every option, in the order of --help."""

    model_name_or_path: str = required("Folder of a checkpoint with its tokenizer, or of an adapter.", section="model")
    results: str | None = option(None, "Results file for the card; default: the checkpoint's results.json, if any.")
    hub_model_id: str = required("Repository: user/name, or name for your own.", section="sharing")
    private: bool = option(False, "Make a new repository that only you can see.")
    revision: str = option(REVISION, "Branch to push to; made if need be.")
    commit_message: str = option(COMMIT_MESSAGE, "What the commit says.")
    license: str = option(LICENSE, "Licence of the weights, as the Hub names it.")
    language: list[str] | None = option(None, "ISO 639 codes of the language trained on.")
    token: str | None = option(None, "Access token; better HF_TOKEN or `hf auth login`, which leave no trace.")
    dry_run: bool = option(False, "Write the folder and show it; upload nothing.")


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments (`sys.argv[1:]` if None); returns the exit status."""
    options = parse_options(PushOptions, argv, __doc__)
    from ordnung.scripts.common.models import best_run
    from ordnung.scripts.hub import sharing

    logging.basicConfig(format="%(message)s")
    logging.getLogger("ordnung").setLevel(logging.INFO)
    names = ("private", "revision", "commit_message", "license", "language", "token")
    target = sharing.Target(options.hub_model_id, **{name: getattr(options, name) for name in names})
    checkpoint = Path(best_run(options.model_name_or_path))
    if options.dry_run:
        target = sharing.with_namespace(target, "your-name")
        sharing.show(sharing.write_folder(checkpoint, target, options.results), target)
    else:
        print(sharing.push(checkpoint, sharing.check_target(target), options.results))
    return 0


if __name__ == "__main__":
    run_script(main)
