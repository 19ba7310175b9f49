"""The tasks that `benchmark.py` times: what one sample of each does, with set-up and preparation kept off the clock."""

import copy
from dataclasses import dataclass, field, replace

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache

from ordnung.scripts.benchmarks.variants import Shape, Variant, state_bytes


@dataclass(frozen=True)
class Settings:
    """What all cases of a run share; picklable, because probes run in child processes."""

    shape: Shape = field(default_factory=Shape)
    batch_size: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    seed: int = 0
    decode_steps: int = 32

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def tiny(self) -> "Settings":
        """Smallest sizes that run the same code: loads libraries and starts threads while using hardly any memory."""
        heads = self.shape.num_attention_heads
        shape = Shape(8 * heads, 1, heads, vocab_size=64, kernel_size=8)
        return replace(self, shape=shape, batch_size=1, decode_steps=2)


@dataclass(frozen=True)
class Case:
    """One task of one competitor at one length (tokens)."""

    task: str
    name: str
    length: int


class Sample:
    """One repeatable measurement. The weights exist once it is constructed; `run` alone is timed.

    `tokens` is the number of tokens of one sequence that `run` processes (the divisor of time per token), `flops` what
    `run` costs, `state` the measured and predicted bytes of one sequence's generation state where the task has one, and
    the kind of `cache` that holds it.
    `measures_memory` is False where what keeps the sample repeatable takes memory that its use in a model does not.
    """

    tokens: int
    flops: int
    state: dict
    measures_memory = True

    def setup(self) -> None:
        """Once, before the first sample."""

    def prepare(self):
        """Before every sample; what it returns is handed to `run`."""

    def run(self, argument) -> None:
        raise NotImplementedError

    def facts(self) -> dict:
        """What is known of the sample after `setup`, besides its time."""
        return {"tokens": self.tokens, "flops": self.flops, **getattr(self, "state", {})}


def build_model(variant: Variant, max_length: int, settings: Settings) -> PreTrainedModel:
    """The variant for sequences of up to `max_length` tokens, on the device and in the dtype of the run."""
    shape = replace(settings.shape, max_length=max_length)
    return variant.build(shape, settings.seed).to(settings.device, settings.torch_dtype)


def new_cache(config: PreTrainedConfig, length: int, static: bool) -> Cache:
    """An empty generation state; a static one has room for `length` tokens, where a dynamic one is copied to grow."""
    return StaticCache(config, max_cache_len=length) if static else DynamicCache(config=config)


def random_tokens(settings: Settings, vocab_size: int, length: int) -> torch.Tensor:
    """The same (batch, length) token ids for every competitor."""
    generator = torch.Generator().manual_seed(settings.seed)
    return torch.randint(vocab_size, (settings.batch_size, length), generator=generator).to(settings.device)


class ModelSample(Sample):
    def __init__(self, variant: Variant, task: str, length: int, settings: Settings, static: bool = False):
        self.variant, self.length, self.settings, self.static = variant, length, settings, static
        self.model = build_model(variant, length + settings.decode_steps, settings)
        steps = settings.decode_steps if task == "decode" else 1
        self.tokens = steps if task == "decode" else length
        self.flops = settings.batch_size * steps * variant.count_flops(self.model, task, length)
        tokens = random_tokens(settings, self.model.config.vocab_size, length + settings.decode_steps)
        self.context, self.continuation = tokens[:, :length], tokens[:, length:]


class ForwardSample(ModelSample):
    """Logits of every position, evaluation mode, no cache."""

    @torch.no_grad()
    def run(self, argument):
        self.variant.run(self.model, self.context)


class TrainSample(ModelSample):
    """Forward with loss, backward and AdamW step; then the gradients are freed."""

    def setup(self):
        self.model.train()
        # fused: one pass over the parameters, so that the optimizer weighs little, and equally for all
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def run(self, argument):
        self.variant.run(self.model, self.context, labels=self.context).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class PrefillSample(ModelSample):
    """Fill a new cache with the whole context at once and make the logits of its last position, as `generate` does."""

    def prepare(self):
        return DynamicCache(config=self.model.config)

    @torch.no_grad()
    def run(self, argument):
        self.variant.run(self.model, self.context, argument, logits_to_keep=1)


class DecodeSample(ModelSample):
    """Single-token steps after a real prefill of the context; each sample continues a copy of that same cache."""

    measures_memory = False  # the state is held twice

    @torch.no_grad()
    def setup(self):
        room = self.length + self.settings.decode_steps
        self.cache = new_cache(self.model.config, room, self.static)
        self.variant.run(self.model, self.context, self.cache, logits_to_keep=1)
        kept = room if self.static else self.length
        predicted = self.model.cache_bytes(kept) if hasattr(self.model, "cache_bytes") else None
        measured = state_bytes(self.cache) // self.settings.batch_size
        self.state = {"state_bytes": measured, "predicted_state_bytes": predicted}
        self.state["cache"] = "static" if self.static else "dynamic"

    def prepare(self):
        return copy.deepcopy(self.cache)

    @torch.no_grad()
    def run(self, argument):
        for step in range(self.settings.decode_steps):
            token = self.continuation[:, step : step + 1]
            self.variant.run(self.model, token, argument, self.length + step)


MODEL_TASKS: dict[str, type[ModelSample]] = {
    "forward": ForwardSample,
    "train": TrainSample,
    "prefill": PrefillSample,
    "decode": DecodeSample,
}
