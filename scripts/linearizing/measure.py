"""Teacher and student side by side, on held-out text: losses, layers, generation state and time."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, StaticCache

from ordnung.scripts.finetuning.glue_metric import spearmanr
from ordnung.scripts.linearizing.data import documents_of, mean_states, real_tokens
from ordnung.scripts.linearizing.teacher import Mixed, Pair, base_of, model_inputs, student_mixes, watched
from ordnung.scripts.pretraining.blocks import IGNORED
from ordnung.scripts.pretraining.losses import position_buckets

Batch = dict[str, torch.Tensor]
STATE_LENGTHS = (512, 2048, 8192, 32768)
FROM = (0, 256, 512, 1024)  # positions from which losses are told
# What tables tell losses of: first position, the position after the last, or None for all that follow, and words.
RANGES = {
    "all": (0, None),
    "before 256": (0, 256),
    "256 to 511": (256, 512),
    "from 512": (512, None),
    "from 1024": (1024, None),
}
PIECE = 512  # tokens of a long text that are read at once
DECODED = 16  # tokens generated to time one


@dataclass
class Scores:
    """What a model makes of the held-out tokens: nats of each, its own first choice, and each one's position.

    A token's position is how many of its document come before it. All are (targets,).
    """

    losses: np.ndarray
    choices: np.ndarray
    positions: np.ndarray

    def summary(self, teacher: "Scores | None" = None) -> dict[str, Any]:
        """Mean loss, and by position; beside a teacher also how often both choose the same token."""
        agree = None if teacher is None else self.choices == teacher.choices
        buckets = []
        for first, last in position_buckets(int(self.positions.max()) + 1):
            chosen = (self.positions >= first) & (self.positions <= last)
            if chosen.any():
                bucket = {"first": first, "last": last, "tokens": int(chosen.sum())}
                bucket |= {"loss": float(self.losses[chosen].mean())}
                buckets.append(bucket | ({} if agree is None else {"agreement": float(agree[chosen].mean())}))
        whole = {"loss": float(self.losses.mean()), "tokens": len(self.losses), "loss_by_position": buckets}
        return whole if agree is None else whole | {"agreement": float(agree.mean())}


def loss_from(summary: dict[str, Any], position: int, end: int | None = None) -> float | None:
    """Mean loss at positions from `position` on, and before `end`, of a `Scores.summary`; None if there are none."""
    buckets = [
        bucket
        for bucket in summary["loss_by_position"]
        if bucket["first"] >= position and (end is None or bucket["last"] < end)
    ]
    tokens = sum(bucket["tokens"] for bucket in buckets)
    return sum(bucket["loss"] * bucket["tokens"] for bucket in buckets) / tokens if tokens else None


def told(summary: dict[str, Any]) -> dict[str, float]:
    """Losses by the words of `RANGES`, of those ranges that differ from all tokens."""
    found = {name: loss_from(summary, *ends) for name, ends in RANGES.items()}
    many = loss_from(summary, 256) is not None
    return {name: loss for name, loss in found.items() if loss is not None and (many or name == "all")}


@torch.no_grad()
def score(model: torch.nn.Module, inner: PreTrainedModel, batches: list[Batch]) -> Scores:
    """A causal model's scores. `model` is called, and may be a wrapped `inner`."""
    losses, choices, positions = [], [], []
    for batch in batches:
        logits = model(**model_inputs(inner, batch)).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        place = batch.get("position_ids")
        if place is None:
            place = (real_tokens(batch).long().cumsum(1) - 1).expand_as(batch["input_ids"])
        wanted = labels != IGNORED
        nats = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
        for found, values in ((losses, nats), (choices, logits.argmax(-1)), (positions, place[:, 1:])):
            found.append(values[wanted].cpu().numpy())
    return Scores(*(np.concatenate(some) for some in (losses, choices, positions)))


@torch.no_grad()
def states_beside(student: torch.nn.Module, pair: Pair, batches: list[Batch]) -> dict[str, float]:
    """How far an encoder's last states are from the teacher's: squared error over variance, cosine of mean states."""
    error, moments, cosines = 0.0, Moments(), []
    for batch in batches:
        real = real_tokens(batch)
        theirs = base_of(pair.teacher)(**model_inputs(base_of(pair.teacher), batch)).last_hidden_state
        ours = student(**model_inputs(pair.student, batch), output_hidden_states=True).hidden_states[-1]
        error += float((ours - theirs).float()[real].square().sum())
        moments.add(theirs[real])
        means = [mean_states(states, documents_of(batch)) for states in (ours, theirs)]
        cosines.append(F.cosine_similarity(*means))
    relative = error / (moments.variance * moments.count * moments.width)
    return {"loss": relative, "cosine": float(torch.cat(cosines).mean())}


class Moments:
    """Mean and variance of vectors, added up in parts; the variance is a mean over channels."""

    def __init__(self):
        self.count, self.width, self.sums, self.squares = 0, 0, 0.0, 0.0

    def add(self, vectors: torch.Tensor):
        """vectors (n, D)."""
        vectors = vectors.double()
        self.count, self.width = self.count + len(vectors), vectors.shape[1]
        self.sums = self.sums + vectors.sum(0)
        self.squares += float(vectors.square().sum())

    @property
    def variance(self) -> float:
        mean = self.sums / self.count
        return max(self.squares / self.count - float(mean.square().sum()), 1e-12) / self.width


@torch.no_grad()
def teacher_variances(pair: Pair, batches: list[Batch]) -> tuple[dict[int, float], list[float]]:
    """Variances of the outputs of the teacher's attention by layer, and of the states after each layer."""
    base = base_of(pair.teacher)
    layers = list(range(len(base.layers)))
    mixed, states = {i: Moments() for i in layers}, [Moments() for _ in layers]
    for batch in batches:
        real = real_tokens(batch)

        def add(call: Mixed, real=real):
            mixed[call.layer].add(call.output[real])

        with watched(pair.teacher, layers, add):
            hidden = base(**model_inputs(base, batch), output_hidden_states=True).hidden_states[1:]
        for moments, made in zip(states, hidden):
            moments.add(made[real])
    return {i: moments.variance for i, moments in mixed.items()}, [moments.variance for moments in states]


@torch.no_grad()
def fidelity(pair: Pair, batches: list[Batch]) -> list[dict[str, float]]:
    """How near each new mixer's output is to the attention's, on the teacher's inputs: error over variance, cosine."""
    errors, cosines = dict.fromkeys(pair.replaced, 0.0), dict.fromkeys(pair.replaced, 0.0)
    moments = {number: Moments() for number in pair.replaced}
    for batch in batches:
        real = real_tokens(batch)

        def compare(call: Mixed, real=real):
            made = student_mixes(pair.student, call)
            moments[call.layer].add(call.output[real])
            errors[call.layer] += float(((made - call.output).float().square().mean(-1) * real).sum())
            cosines[call.layer] += float((F.cosine_similarity(made, call.output, dim=-1) * real).sum())

        with watched(pair.teacher, pair.replaced, compare):
            base_of(pair.teacher)(**model_inputs(base_of(pair.teacher), batch))
    return [
        {
            "layer": number,
            "relative_error": errors[number] / moments[number].count / moments[number].variance,
            "cosine": cosines[number] / moments[number].count,
        }
        for number in pair.replaced
    ]


@torch.no_grad()
def replaced_alone(pair: Pair, batches: list[Batch]) -> dict[int, float]:
    """The teacher's loss with each layer's attention replaced alone, by layer.

    For an encoder the distance of its last states from those it has otherwise, as `states_beside` measures it.
    """
    losses = {}
    base = base_of(pair.teacher)
    wanted = []
    if pair.encoder:
        wanted = [base(**model_inputs(base, batch)).last_hidden_state for batch in batches]
    for number in pair.replaced:
        with watched(pair.teacher, [number], lambda call: student_mixes(pair.student, call)):
            if not pair.encoder:
                losses[number] = float(score(pair.teacher, pair.teacher, batches).losses.mean())
                continue
            made = [base(**model_inputs(base, batch)).last_hidden_state for batch in batches]
        reals = [real_tokens(batch) for batch in batches]
        losses[number] = sum(float((x - y)[real].square().sum()) for x, y, real in zip(made, wanted, reals)) / sum(
            float(y[real].square().sum()) for y, real in zip(wanted, reals)
        )
    return losses


def without_mixing(pair: Pair):
    """Context in which the student's new mixers give zero: what is left is the floor of its loss."""
    return watched(pair.student, pair.replaced, lambda call: torch.zeros_like(call.output))


@torch.no_grad()
def similarity(model: PreTrainedModel, tokenizer, pairs, batch_size: int, max_length: int) -> float:
    """Spearman's correlation of scores with the cosines of mean states.

    Args:
        pairs: columns sentence1, sentence2 and label.
    """
    base, means = base_of(model), []
    for name in ("sentence1", "sentence2"):
        texts = list(pairs[name])
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: dict[int, torch.Tensor] = {}
        for begin in range(0, len(order), batch_size):
            some = order[begin : begin + batch_size]
            batch = tokenizer(
                [texts[i] for i in some], truncation=True, max_length=max_length, padding=True, return_tensors="pt"
            ).to(model.device)
            batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
            states = base(**model_inputs(base, batch)).last_hidden_state
            found |= dict(zip(some, mean_states(states, documents_of(batch))))
        means.append(torch.stack([found[i] for i in range(len(texts))]))
    cosines = F.cosine_similarity(*means).cpu().numpy()
    return float(spearmanr(cosines, np.array(pairs["label"], dtype=float)))


def similarities(pair: Pair, tokenizer, pairs, batch_size: int, max_length: int) -> dict[str, float]:
    """`similarity` of student and teacher, and of the student without mixing, the floor."""
    how = (tokenizer, pairs, batch_size, max_length)
    found = {"student": similarity(pair.student, *how), "teacher": similarity(pair.teacher, *how)}
    with without_mixing(pair):
        return found | {"floor": similarity(pair.student, *how)}


@torch.no_grad()
def long_losses(model: PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """Losses (N - 1,) of one text, read in pieces from the generation state, which is all that is kept of it.

    Args:
        tokens: (N,) of any length.
    """
    ids = torch.from_numpy(tokens[None].astype(np.int64)).to(model.device)
    past, before, losses = None, None, []
    for part in ids.split(PIECE, dim=1):
        out = model(part, past_key_values=past, use_cache=True)
        logits = out.logits if before is None else torch.cat([before, out.logits], dim=1)
        wanted = part[:, 1:] if before is None else part
        losses.append(F.cross_entropy(logits[0, :-1].float(), wanted[0], reduction="none").cpu().numpy())
        past, before = out.past_key_values, out.logits[:, -1:]
    return np.concatenate(losses)


def longer(pair: Pair, tokens: np.ndarray) -> list[dict[str, Any]]:
    """`long_losses` of student and teacher by position, beside the bytes of their states at its end."""
    models = {"student": pair.student, "teacher": pair.teacher}
    losses = {name: long_losses(model, tokens) for name, model in models.items()}
    rows = []
    for first, last in position_buckets(len(tokens)):
        row = {"first": first, "last": last}
        row |= {f"{name}_loss": float(found[first - 1 : last].mean()) for name, found in losses.items()}
        rows.append(row | {f"{name}_state_bytes": base_of(model).cache_bytes(last) for name, model in models.items()})
    return rows


def state_bytes(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of the generation state by tokens."""
    longest = model.config.longest_row or float("inf")
    return {str(length): base_of(model).cache_bytes(length) for length in STATE_LENGTHS if length <= longest}


@torch.no_grad()
def decode_seconds(model: PreTrainedModel, tokens: np.ndarray, static: bool = False) -> dict[str, float]:
    """Seconds to read a text and, for the median of the tokens after it, to make one.

    Args:
        tokens: (N,) the text.
        static: use transformers' static cache, whose size is that of all tokens from the beginning.
    """
    ids = torch.from_numpy(tokens[None].astype(np.int64)).to(model.device)
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + DECODED + 1) if static else None
    synchronize: Callable = torch.accelerator.synchronize if model.device.type != "cpu" else lambda: None
    start = time.perf_counter()
    out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    synchronize()
    prefill, seconds = time.perf_counter() - start, []
    for _ in range(DECODED):
        start = time.perf_counter()
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        synchronize()
        seconds.append(time.perf_counter() - start)
    return {"prefill_seconds": prefill, "token_seconds": statistics.median(seconds)}


def decode_times(pair: Pair, tokens: np.ndarray, lengths: list[int]) -> list[dict[str, Any]]:
    """`decode_seconds` of student and teacher after so many tokens, the text repeated where it is shorter."""
    rows, longest = [], min(model.config.longest_row or 2**62 for model in (pair.teacher, pair.student))
    for length in (length for length in lengths if length + DECODED < longest):
        text = np.resize(tokens, length)
        kinds = {"student": (pair.student, False), "teacher": (pair.teacher, False)}
        kinds["teacher_static_cache"] = pair.teacher, True
        for name, (model, static) in kinds.items():
            rows.append({"model": name, "tokens": length, **decode_seconds(model, text, static)})
    return rows
