r"""Draw the rank of attention below the diagonal, and what a token costs.

    ordnung plot-rank --output_dir out/rank
    ordnung plot-rank --model_name_or_path bert-base-uncased --text_file moby_dick.txt --share 0.9 --passages 5 \
        --lengths 64 128 256 512 --output_dir out/low_rank
    ordnung plot-rank --model_name_or_path out/softmax out/quadratic --text_file moby_dick.txt --output_dir out/rank

The block of weights that the later half of n queries has for the earlier half of n keys: its rank is bounded by the
(d + 1)(d + 2) / 2 features of a squared kernel at every n, and grows for softmax. (The rank of the whole causal matrix
says nothing: a triangle without zeros on its diagonal is invertible.) For random queries and keys, for the heads of
checkpoints, and for their queries and keys under the squared kernel. Beside it the FLOPs of a token in a layer of
QuadraticKernelLM against n and d: constant in n, growing as d^3 and not as d^2.
"""

from dataclasses import dataclass

from ordnung.scripts.common.errors import ScriptError, run_script
from ordnung.scripts.common.options import option, program, required


@dataclass(kw_only=True)
class RankOptions:
    model_name_or_path: list[str] | None = option(None, "Checkpoints: folders or Hub names.", section="models")
    text_file: str | None = option(None, "File with the text that they read.", section="data")
    lengths: list[int] = option([32, 64, 128, 256, 512, 1024], "Tokens n.", least=2)
    head_sizes: list[int] = option([4, 8], "Sizes d of random queries and keys.", least=2)
    seeds: list[int] = option([0, 1, 2], "Of random queries and keys.")
    cost_lengths: list[int] = option([256, 1024, 4096, 16384], "Tokens to count FLOPs at.", least=1)
    cost_head_sizes: list[int] = option([16, 32, 64, 128], "Head sizes to count FLOPs at.", least=2)
    share: float | None = option(
        None, "Of checkpoints, count the singular values that hold this share of the sum, beside rows shuffled: 0.9."
    )
    passages: int = option(1, "Passages of the text to do so on, each as long as the longest of --lengths.", least=1)
    threshold: float = option(1e-9, "Singular values below this share of the first do not count.")
    output_dir: str = required("Folder for rank.json and rank.png.", section="output")

    def __post_init__(self):
        self.model_name_or_path = self.model_name_or_path or []
        if self.model_name_or_path and self.text_file is None:
            raise ScriptError("--model_name_or_path needs a text to read: give --text_file")
        if self.share is not None and not 0 < self.share < 1:
            raise ScriptError(f"--share {self.share} must be between 0 and 1")
        odd = [n for n in self.lengths if n % 2]
        if odd:
            raise ScriptError(f"--lengths {odd[0]} must be even: its halves are looked at")


main = program(RankOptions, "reports.rank", __doc__)

if __name__ == "__main__":
    run_script(main)
