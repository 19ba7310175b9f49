"""The options of the programs that make evidence."""

from dataclasses import dataclass, replace
from typing import Literal

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.options import MergeKeyValues, check_bounds, option, required
from ordnung.scripts.finetuning.tasks import TASKS, choose_tasks
from ordnung.scripts.training.runs import check_seeds


@dataclass(kw_only=True)
class VariantOptions:
    """What is compared; a program adds on what."""

    variants: str = required(
        "Models by name: model_type and the config fields that differ.", section="models", action=MergeKeyValues
    )
    config_overrides: str | None = option(None, "Config fields of all variants.", action=MergeKeyValues)
    only: list[str] | None = option(None, "Of the variants, those to train and to tell now; default: all.")
    seeds: list[int] = option([0, 1, 2], "Each variant trains with each.")
    output_dir: str = required("Folder for results.json, results.md, a figure and the runs.", section="output")

    def __post_init__(self):
        check_bounds(self)
        check_seeds(self.seeds)
        self.config_overrides = self.config_overrides or {}
        if self.only:
            if unknown := set(self.only) - set(self.variants):
                raise ScriptError(f"--only {min(unknown)} must be one of the variants {', '.join(self.variants)}")
            others = set(self.variants) - set(self.only)
            self.only = self.only if others else None
            self.leave_out(others)

    def leave_out(self, others: set[str]):
        """Take variants out of all that names them."""
        self.variants = {name: variant for name, variant in self.variants.items() if name not in others}


@dataclass(kw_only=True)
class TrainingOptions(VariantOptions):
    """Training on a synthetic task."""

    max_steps: int = option(2000, "Optimizer steps.", least=1, section="optimisation")
    batch_size: int = option(32, "Sequences in a step.", least=1)
    learning_rate: float = option(1e-3, "AdamW's learning rate, constant after the warm-up.")
    weight_decay: float = option(0.0, "AdamW's weight decay, for matrices.")
    warmup_steps: int = option(100, "Steps of linear warm-up.")
    device: Literal["cpu", "cuda"] = option("cpu", "Where to train and measure.")
    training_by_variant: str | None = option(
        None,
        "learning_rate and max_steps of single variants, by variant, which win; of prefix-tasks hops and queries too.",
        action=MergeKeyValues,
    )
    earlier: str | None = option(
        None,
        "results.json of an earlier run with the same settings and seeds: variants that it has trained are taken over, "
        "also where its runs are gone.",
    )

    variants_own = {"learning_rate", "max_steps"}  # what `training_by_variant` may set

    def __post_init__(self):
        super().__post_init__()
        self.training_by_variant = self.training_by_variant or {}
        for name, own in self.training_by_variant.items():
            if name not in self.variants:
                raise ScriptError(f"--training_by_variant {name} must be one of {', '.join(self.variants)}")
            if unknown := set(own) - self.variants_own:
                raise ScriptError(
                    f"--training_by_variant {name}: {min(unknown)} is the same for all; a variant's own are "
                    + ", ".join(sorted(self.variants_own))
                )
            if own.get("max_steps", self.max_steps) < self.max_steps:
                raise ScriptError(
                    f"--training_by_variant {name}: max_steps ({own['max_steps']}) must be at least that of all "
                    f"({self.max_steps})"
                )

    def leave_out(self, others: set[str]):
        super().leave_out(others)
        own = self.training_by_variant or {}
        self.training_by_variant = {name: value for name, value in own.items() if name not in others}

    def of_variant(self, name: str):
        """These options with the variant's own in place, and none of single variants any more."""
        return replace(self, **self.training_by_variant.get(name, {}), training_by_variant=None)


@dataclass(kw_only=True)
class RecallOptions(TrainingOptions):
    sequence_length: int = option(64, "Tokens in a sequence.", least=1, section="data")
    num_pairs: list[int] = option([2, 4, 8, 16], "Key-value pairs in a sequence; training batches take them in turn.")
    num_queries: int = option(16, "Queries in a sequence, each for one of its keys.", least=1)
    alphabet_size: int = option(32, "Different keys, and as many different values.", least=1)
    distance_edges: list[int] = option(
        [1, 11, 21, 31, 41, 51, 64],
        "Distances from query to key (tokens) where the ranges to report begin, and the end.",
    )
    eval_sequences: int = option(512, "Sequences to measure on, for each number of pairs.", least=1)

    def __post_init__(self):
        super().__post_init__()
        room = self.sequence_length - self.num_queries
        if not 1 <= min(self.num_pairs) <= max(self.num_pairs) <= min(self.alphabet_size, room // 2):
            raise ScriptError(
                f"--num_pairs {self.num_pairs} must be from 1 to {min(self.alphabet_size, room // 2)}: there are "
                f"{self.alphabet_size} keys, and {self.num_queries} queries need room in {self.sequence_length} tokens"
            )
        if self.distance_edges != sorted(set(self.distance_edges)) or len(self.distance_edges) < 2:
            raise ScriptError(f"--distance_edges {self.distance_edges} must be two or more rising numbers")
        if self.distance_edges[0] > 1 or self.distance_edges[-1] < self.sequence_length:
            raise ScriptError(
                f"--distance_edges {self.distance_edges} must reach from 1 to --sequence_length "
                f"({self.sequence_length}): queries at other distances would be in no range"
            )

    @property
    def vocab_size(self) -> int:
        return 1 + 2 * self.alphabet_size


@dataclass(kw_only=True)
class TaskOptions(TrainingOptions):
    task: str = required("What to train on.", choices=["pointer", "function", "triplets"], section="data")
    symbols: int = option(
        16, "pointer, function: numbers that are mapped. triplets: given tokens, which the others follow from.", least=2
    )
    hops: int = option(
        7, "pointer: most times to apply the permutation; a query asks for any number. function: times.", least=1
    )
    queries: int = option(16, "pointer, function: queries in a sequence, and answers.", least=1)
    sequence_length: int = option(64, "triplets: tokens in a sequence.")
    eval_sequences: int = option(256, "Sequences to measure on.", least=1)
    evaluations: int = option(20, "Times to measure in the course of a run.", least=1)
    equal_compute: bool = option(True, "Let the cheaper variants go on to the FLOPs of the dearest.")

    variants_own = TrainingOptions.variants_own | {"hops", "queries"}

    def __post_init__(self):
        super().__post_init__()
        for name, own in self.training_by_variant.items():
            for size in ("hops", "queries"):
                if not 1 <= own.get(size, 1) <= getattr(self, size):
                    raise ScriptError(
                        f"--training_by_variant {name}: {size} ({own[size]}) must be from 1 to that of all "
                        f"({getattr(self, size)}), which models have places and tokens for"
                    )
        if self.only and self.equal_compute:
            raise ScriptError("--only changes which variant is the dearest: give --equal_compute false with it")
        if self.task == "triplets" and self.sequence_length <= self.symbols:
            raise ScriptError(
                f"--sequence_length {self.sequence_length} must exceed --symbols {self.symbols}, the tokens given"
            )

    @property
    def vocab_size(self) -> int:
        sizes = {"pointer": (1 + self.hops) * self.symbols, "function": 2 * self.symbols}
        return sizes.get(self.task, self.sequence_length)

    @property
    def tokens(self) -> int:
        return self.sequence_length if self.task == "triplets" else self.symbols + self.queries


@dataclass(kw_only=True)
class CompareOptions(VariantOptions):
    pretrain: str = required(
        "Options of pretrain.py for all runs: max_steps=100,block_size=128.", section="training", action=MergeKeyValues
    )
    baseline: str | None = option(None, "Variant that perplexity is held against.")
    earlier: str | None = option(
        None,
        "results.json of an earlier run with the same settings, seeds and text: what it tried and trained is taken "
        "over, also where its runs are gone.",
    )
    sweep: str | None = option(
        None,
        "Tried first on each variant, whose best it then trains with: options of pretrain.py with lists of values, and "
        "those of the tries: learning_rate=[1e-3,3e-3],max_steps=50.",
        action=MergeKeyValues,
    )
    equal_compute: list[str] | None = option(
        None, "Variants to train once more, as NAME_equal_compute, for as many FLOPs as another variant takes."
    )
    equal_compute_with: str | None = option(None, "That other variant; default: the dearest.")
    equal_compute_only: list[str] | None = option(
        None, "Variants of equal_compute that are trained for those FLOPs alone, and tried for as much less or more."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.baseline is not None and self.baseline not in self.variants:
            raise ScriptError(f"--baseline {self.baseline} must be one of the variants {', '.join(self.variants)}")
        self.equal_compute = self.equal_compute or []
        self.equal_compute_only = self.equal_compute_only or []
        if self.only and self.equal_compute and self.equal_compute_with is None:
            raise ScriptError(
                f"--only {' '.join(self.only)} changes which variant is the dearest: name one of them by "
                "--equal_compute_with"
            )
        other = [self.equal_compute_with] if self.equal_compute_with is not None else []
        named = {"equal_compute": self.equal_compute, "equal_compute_with": other}
        for option_name, names in named.items():
            unknown = [name for name in names if name not in self.variants]
            if unknown:
                raise ScriptError(
                    f"--{option_name} {unknown[0]} must be one of the variants {', '.join(self.variants)}"
                )
        alone = [name for name in self.equal_compute_only if name not in self.equal_compute]
        if alone:
            raise ScriptError(f"--equal_compute_only {alone[0]} must be one of equal_compute: add it there")
        if self.equal_compute_only and self.equal_compute_with in (None, *self.equal_compute_only):
            raise ScriptError(
                f"--equal_compute_with {self.equal_compute_with} must be a variant with steps of its own, as "
                f"{self.equal_compute_only[0]} has none"
            )
        if self.baseline in self.equal_compute_only:
            raise ScriptError(f"--baseline {self.baseline} must not be in equal_compute_only")
        if self.equal_compute and "max_steps" not in self.pretrain:
            raise ScriptError("--equal_compute lengthens max_steps: give it in --pretrain")
        self.sweep = self.sweep or {}
        if self.sweep and not any(isinstance(values, list) for values in self.sweep.values()):
            raise ScriptError("--sweep has no list of values to choose from: learning_rate=[1e-3,3e-3]")
        for name in ("max_steps", "eval_steps"):
            if isinstance(self.sweep.get(name), list):
                raise ScriptError(
                    f"--sweep {name}={self.sweep[name]}: what is compared trains for as long as --pretrain says, so "
                    "give one number for all tries"
                )

    def leave_out(self, others: set[str]):
        super().leave_out(others)
        for field in ("equal_compute", "equal_compute_only"):
            setattr(self, field, [name for name in getattr(self, field) or [] if name not in others])


@dataclass(kw_only=True)
class BaselineOptions:
    task_name: list[str] = required(f"One or more of {', '.join(TASKS)}; all: GLUE's.", section="data")
    dataset_path: str | None = option(None, "Local folder: a folder for each task, or the files of a single one.")
    dataset_name: str | None = option(None, "Data set of the Hub in place of the task's own.")
    max_train_samples: int | None = option(None, "Train on so many examples, chosen at random.", least=1)
    max_eval_samples: int | None = option(None, "Score on so many of each split, chosen at random.", least=1)
    output_dir: str = required("Folder for results.json.", section="output")


@dataclass(kw_only=True)
class NgramOptions:
    results: str = required("Results file of compare.py or transfer.py whose text to count.", section="data")
    pretrain: str | None = option(None, "Options of pretrain.py that win: where its text is.", action=MergeKeyValues)
    seeds: list[int] | None = option(None, "Of the runs; default: those of the results.")
    output_file: str = required("JSON.", section="output")


# Options of finetune.py that are set for each run.
OWN_OPTIONS = ("output_dir", "model_name_or_path", "seeds", "task_name", "dataset_path")


@dataclass(kw_only=True)
class TransferOptions(VariantOptions):
    pretrain: str | None = option(
        None,
        "Options of pretrain.py for all variants without a source: max_steps=100.",
        section="training",
        action=MergeKeyValues,
    )
    linearize: str | None = option(
        None, "Options of linearize.py for all variants with a source that are distilled.", action=MergeKeyValues
    )
    task_name: list[str] = option(
        ["sst2", "mrpc", "rte", "cola", "imdb"], f"Tasks to fine-tune on, of {', '.join(TASKS)}."
    )
    finetune: str | None = option(None, "Options of finetune.py for all tasks.", action=MergeKeyValues)
    finetune_by_task: str | None = option(None, "Those of single tasks, by task, which win.", action=MergeKeyValues)
    glue_path: str | None = option(None, "Local folder with a folder for each GLUE task; default: the Hub.")
    imdb_path: str | None = option(None, "Local folder of IMDB; default: the Hub.")
    baseline: str | None = option(None, "Variant that scores are held against, seed by seed.")
    earlier: str | None = option(
        None,
        "results.json of an earlier run with the same settings, seeds and data: variants that it has fine-tuned on all "
        "the tasks are taken over, also where its folder is gone.",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.baseline is not None and self.baseline not in self.variants:
            raise ScriptError(f"--baseline {self.baseline} must be one of the variants {', '.join(self.variants)}")
        self.finetune, self.finetune_by_task = self.finetune or {}, self.finetune_by_task or {}
        self.linearize = self.linearize or {}
        self.started = {
            name: made for name, made in self.variants.items() if isinstance(made, dict) and "source" in made
        }
        self.pretrained = {name: made for name, made in self.variants.items() if name not in self.started}
        if self.pretrained and self.pretrain is None:
            raise ScriptError(
                f"variant {min(self.pretrained)} is pretrained: give --pretrain, or the source that it starts from"
            )
        self.task_name = [task.name for task in choose_tasks(self.task_name)]
        if self.finetune_by_task:
            choose_tasks([*self.finetune_by_task])
        for options in (self.finetune, *self.finetune_by_task.values()):
            own = [name for name in OWN_OPTIONS if name in options]
            if own:
                raise ScriptError(f"--finetune {own[0]}: it is set for each run, leave it out")

    def leave_out(self, others: set[str]):
        super().leave_out(others)
        self.baseline = None if self.baseline in others else self.baseline

    def data_path(self, task: str) -> str | None:
        return self.imdb_path if task == "imdb" else self.glue_path
