"""The options of the programs that make evidence."""

from dataclasses import dataclass

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.options import MergeKeyValues, option, required
from ordnung.scripts.finetuning.tasks import TASKS, choose_tasks
from ordnung.scripts.training.runs import check_seeds


@dataclass(kw_only=True)
class TrainingOptions:
    """What is trained, and how; a program adds its task."""

    output_dir: str = required("Folder for results.json, results.md, accuracy.png and the runs.")
    variants: str = required("Models by name: model_type and the config fields that differ.", action=MergeKeyValues)
    config_overrides: str | None = option(None, "Config fields of all variants.", action=MergeKeyValues)
    seeds: list[int] = option([0, 1, 2], "Each variant trains with each.")

    # optimisation
    max_steps: int = option(2000, "Optimizer steps.")
    batch_size: int = option(32, "Sequences in a step.")
    learning_rate: float = option(1e-3, "AdamW's learning rate, constant after the warm-up.")
    weight_decay: float = option(0.0, "AdamW's weight decay, for matrices.")
    warmup_steps: int = option(100, "Steps of linear warm-up.")

    def __post_init__(self):
        self.check_positive("max_steps", "batch_size")
        check_seeds(self.seeds)
        self.config_overrides = self.config_overrides or {}

    def check_positive(self, *names: str):
        for name in names:
            if getattr(self, name) < 1:
                raise ScriptError(f"--{name} must be at least 1, not {getattr(self, name)}")


@dataclass(kw_only=True)
class RecallOptions(TrainingOptions):
    sequence_length: int = option(64, "Tokens in a sequence.")
    num_pairs: list[int] = option([2, 4, 8, 16], "Key-value pairs in a sequence; training batches take them in turn.")
    num_queries: int = option(16, "Queries in a sequence, each for one of its keys.")
    alphabet_size: int = option(32, "Different keys, and as many different values.")
    distance_edges: list[int] = option(
        [1, 11, 21, 31, 41, 51, 64],
        "Distances from query to key (tokens) where the ranges to report begin, and the end.",
    )
    eval_sequences: int = option(512, "Sequences to measure on, for each number of pairs.")

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("sequence_length", "num_queries", "alphabet_size", "eval_sequences")
        room = self.sequence_length - self.num_queries
        if not 1 <= min(self.num_pairs) <= max(self.num_pairs) <= min(self.alphabet_size, room // 2):
            raise ScriptError(
                f"--num_pairs {self.num_pairs} must be from 1 to {min(self.alphabet_size, room // 2)}: there are "
                f"{self.alphabet_size} keys, and {self.num_queries} queries need room in {self.sequence_length} tokens"
            )
        if self.distance_edges != sorted(set(self.distance_edges)) or len(self.distance_edges) < 2:
            raise ScriptError(f"--distance_edges {self.distance_edges} must be two or more rising numbers")

    @property
    def vocab_size(self) -> int:
        return 1 + 2 * self.alphabet_size


@dataclass(kw_only=True)
class TaskOptions(TrainingOptions):
    task: str = required("What to train on.", choices=["pointer", "triplets"])
    symbols: int = option(16, "pointer: numbers permuted. triplets: given tokens, which the others follow from.")
    hops: int = option(7, "pointer: most times to apply the permutation; a query asks for any number from 1 on.")
    queries: int = option(16, "pointer: queries in a sequence.")
    sequence_length: int = option(64, "triplets: tokens in a sequence.")
    eval_sequences: int = option(256, "Sequences to measure on.")

    # optimisation
    max_steps: int = option(2000, "Optimizer steps for which all variants are compared.")
    equal_compute: bool = option(True, "Let the cheaper variants go on to the FLOPs of the dearest.")
    evaluations: int = option(20, "Times to measure in the course of a run.")

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("hops", "queries", "eval_sequences", "evaluations")
        if self.symbols < 2:
            raise ScriptError(f"--symbols must be at least 2, not {self.symbols}")
        if self.task == "triplets" and self.sequence_length <= self.symbols:
            raise ScriptError(
                f"--sequence_length {self.sequence_length} must exceed --symbols {self.symbols}, the tokens given"
            )

    @property
    def vocab_size(self) -> int:
        return (1 + self.hops) * self.symbols if self.task == "pointer" else self.sequence_length

    @property
    def tokens(self) -> int:
        return self.symbols + self.queries if self.task == "pointer" else self.sequence_length


@dataclass
class CompareOptions:
    output_dir: str = required("Folder for results.json, results.md, positions.png and the runs.")
    variants: str = required("Models by name: model_type and the config fields that differ.", action=MergeKeyValues)
    pretrain: str = required(
        "Options of pretrain.py for all runs: max_steps=100,block_size=128.", action=MergeKeyValues
    )
    config_overrides: str | None = option(None, "Config fields of all variants.", action=MergeKeyValues)
    seeds: list[int] = option([0, 1, 2], "Each variant trains with each.")
    baseline: str | None = option(None, "Variant that perplexity is held against.")
    equal_compute: list[str] | None = option(
        None, "Variants to train once more, as NAME_equal_compute, for as many FLOPs as the dearest variant takes."
    )

    def __post_init__(self):
        self.config_overrides = self.config_overrides or {}
        check_seeds(self.seeds)
        if self.baseline is not None and self.baseline not in self.variants:
            raise ScriptError(f"--baseline {self.baseline} must be one of the variants {', '.join(self.variants)}")
        self.equal_compute = self.equal_compute or []
        unknown = [name for name in self.equal_compute if name not in self.variants]
        if unknown:
            raise ScriptError(f"--equal_compute {unknown[0]} must be one of the variants {', '.join(self.variants)}")
        if self.equal_compute and "max_steps" not in self.pretrain:
            raise ScriptError("--equal_compute lengthens max_steps: give it in --pretrain")


@dataclass(kw_only=True)
class BaselineOptions:
    output_dir: str = required("Folder for results.json.")
    task_name: list[str] = required(f"One or more of {', '.join(TASKS)}; all: GLUE's.")
    dataset_path: str | None = option(None, "Local folder: a folder for each task, or the files of a single one.")
    dataset_name: str | None = option(None, "Data set of the Hub in place of the task's own.")
    max_train_samples: int | None = option(None, "Train on so many examples, chosen at random.")


# Options of the fine-tuning programs that are set for each run.
OWN_OPTIONS = ("output_dir", "model_name_or_path", "seeds", "task_name", "dataset_path")


@dataclass(kw_only=True)
class TransferOptions:
    output_dir: str = required("Folder for results.json, results.md and the runs.")
    variants: str = required("Models by name: model_type and the config fields that differ.", action=MergeKeyValues)
    pretrain: str = required("Options of pretrain.py for all variants: max_steps=100.", action=MergeKeyValues)
    config_overrides: str | None = option(None, "Config fields of all variants.", action=MergeKeyValues)
    task_name: list[str] = option(
        ["sst2", "mrpc", "rte", "cola", "imdb"], f"Tasks to fine-tune on, of {', '.join(TASKS)}."
    )
    finetune: str | None = option(None, "Options of the fine-tuning programs for all tasks.", action=MergeKeyValues)
    finetune_by_task: str | None = option(None, "Those of single tasks, by task, which win.", action=MergeKeyValues)
    seeds: list[int] = option([0, 1, 2], "Each variant is fine-tuned with each on each task.")
    glue_path: str | None = option(None, "Local folder with a folder for each GLUE task; default: the Hub.")
    imdb_path: str | None = option(None, "Local folder of IMDB; default: the Hub.")

    def __post_init__(self):
        self.config_overrides, self.finetune = self.config_overrides or {}, self.finetune or {}
        self.finetune_by_task = self.finetune_by_task or {}
        choose_tasks([*self.task_name, *self.finetune_by_task])
        check_seeds(self.seeds)
        for options in (self.finetune, *self.finetune_by_task.values()):
            own = [name for name in OWN_OPTIONS if name in options]
            if own:
                raise ScriptError(f"--finetune {own[0]}: it is set for each run, leave it out")

    def data_path(self, task: str) -> str | None:
        return self.imdb_path if task == "imdb" else self.glue_path
