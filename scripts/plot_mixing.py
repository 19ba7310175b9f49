"""Draw how a model mixes the tokens of a text, and how much of it a low rank holds.

    ordnung plot-mixing --model_name_or_path out/demo --text "Call me Ishmael." --output_dir out/mixing

`mixing.png` (of further texts `mixing_2.png`, ...) shows the weights of every head of every layer: softmax weights, a
convolution's Toeplitz matrix, weights of slots; of a fine-tuned classifier also what it says of the text. `kernels.png`
shows a convolution's weights by lag, as their matrices look alike. `spectrum.png` shows the share of the sum of
singular values that the first ones hold, as figure 1 of the Linformer paper (Wang et al. 2020, arXiv 2006.04768),
`spectrum.json` the figures at one rank. Checkpoints that `convert` reads, such as BERT, GPT-2, Llama and Longformer,
are drawn as the attention that they are.
"""

from dataclasses import dataclass

from ordnung.scripts.common.errors import ScriptError, run_script
from ordnung.scripts.common.options import option, program, required


@dataclass(kw_only=True)
class MixingOptions:
    model_name_or_path: str = required("Checkpoint: folder or Hub name.", section="model")
    text: list[str] | None = option(None, "The text, or several: a picture of each.", section="data")
    text_file: str | None = option(None, "Or a file with the text.")
    max_length: int = option(512, "Tokens of it to use.", least=1)
    rank: int | None = option(None, "Rank of the figures; default: a quarter of the tokens.", least=1)
    weights: bool = option(False, "Write the weights too, as mixing.json.")
    output_dir: str = required("Folder for the images and figures.", section="output")

    def __post_init__(self):
        if (self.text is None) == (self.text_file is None):
            raise ScriptError("give one of --text and --text_file")


main = program(MixingOptions, "reports.mixing", __doc__)

if __name__ == "__main__":
    run_script(main)
