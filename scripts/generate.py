"""Write text with a checkpoint.

    ordnung generate --model_name_or_path out/demo --prompt "Call me"

Text appears on stdout as it is made, the speed on stderr. Without a sampling option decoding is what the checkpoint's
generation config says, which is greedy if it says nothing.
"""

from dataclasses import dataclass

from ordnung.scripts.common.errors import ScriptError, run_script
from ordnung.scripts.common.options import check_bounds, option, program, required


@dataclass(kw_only=True)
class GenerateOptions:
    model_name_or_path: str = required("Checkpoint: folder or Hub name.", section="model")
    trust_remote_code: bool = option(False, "Run code that comes with the checkpoint.")
    prompt: list[str] | None = option(None, "One or more texts to continue; default: standard input.", section="data")
    prompt_file: list[str] | None = option(None, "Or files to continue, each a prompt.")
    max_new_tokens: int = option(200, "Most tokens of a text.", least=1, section="output")
    num_return_sequences: int = option(1, "Texts per prompt.", least=1)
    seed: int | None = option(None, "Makes sampling repeatable.")
    temperature: float | None = option(
        None, "1 samples from the model as it is.", above=0, section="sampling (any but the last switches it on)"
    )
    top_k: int | None = option(None, "Sample from the k likeliest tokens.", least=1)
    top_p: float | None = option(None, "Sample from the likeliest tokens of this total probability.", above=0, most=1)
    repetition_penalty: float | None = option(None, "Above 1: tokens used before get unlikelier.", above=0)

    def __post_init__(self):
        check_bounds(self)
        if self.prompt and self.prompt_file:
            raise ScriptError("give --prompt or --prompt_file, not both")


main = program(GenerateOptions, "common.generation", __doc__)

if __name__ == "__main__":
    run_script(main)
