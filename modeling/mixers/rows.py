"""Which tokens of a batch form a row: padding, and packed documents, which are one matter.

Legend: B rows of the batch, N tokens of each, R documents, M tokens of the longest of them, T real tokens of all.

Padding says which tokens of a row are real; packing puts several documents into one row. Both leave a mixer with
sequences that begin anywhere and must not see each other. `Rows` lays them out as (R, M, ...), each document's tokens
first and padding after, lets the mixer work on that, and brings the result back. Documents of similar length are laid
out together, so that packing costs little padding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.utils.import_utils import is_tracing

# What clients say of packed documents besides `position_ids`: where they lie, and what follows from that.
MARKS = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")
LONGEST = ("max_length_q", "max_length_k")
# Longest documents of a group, in tokens: 16, 24, 32, 48, 64, ...
EDGES = torch.tensor([size for power in range(4, 40) for size in (1 << power, 3 << (power - 1))], device="cpu")
GROUP_TOKENS = 512  # a group of fewer real tokens joins the next longer one


@dataclass
class Group:
    """Documents that are laid out together.

    `index` (R, M) holds their tokens' places in the flat batch (B N), at padding that of some real token; None if the
    batch is laid out so as it is. `lengths` (R,) counts their tokens, None if all have M.
    """

    index: torch.LongTensor | None
    lengths: torch.LongTensor | None

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, N, ...) as (R, M, ...)."""
        if self.index is None:
            return x
        return x.flatten(0, 1).index_select(0, self.index.flatten()).unflatten(0, self.index.shape)


@dataclass
class Rows:
    """The rows of a batch that is not just B documents of N tokens.

    `back` (B N) tells where each token of the flat batch lies in the groups' outputs, one group after the other; None
    if just there. `real` (B, N) is False for padding, None if there is none.

    Where `packed`, `documents` (B, N) numbers the documents of the batch in their order, with -1 at padding,
    `positions` (B, N) counts the tokens of each one's document before it, and `bounds` (2, R) holds the places of the
    documents' first and last tokens in the flat batch. Otherwise there is one group: B documents, in their order.
    """

    groups: list[Group]
    back: torch.LongTensor | None = None
    real: torch.BoolTensor | None = None
    documents: torch.LongTensor | None = None
    positions: torch.LongTensor | None = None
    bounds: torch.LongTensor | None = None

    @property
    def packed(self) -> bool:
        """Whether some row holds several documents."""
        return self.documents is not None

    @property
    def lengths(self) -> torch.LongTensor | None:
        """(B,) real tokens of each row of the batch, None if all have N; of rows that are not packed."""
        return self.groups[0].lengths

    @classmethod
    def of_mask(cls, mask: torch.Tensor | None) -> "Rows | None":
        """Those of a batch with padding, from `mask` (B, N), not 0 for real tokens. None if all are real."""
        if mask is None:
            return None
        real = mask != 0
        if not is_tracing(mask):  # a graph cannot look
            if bool(real.all()):
                return None
            if not bool((real[:, 1:] > real[:, :-1]).any()):
                return cls([Group(None, real.sum(1))], None, real)
        # the real tokens' places are how many come before them; those of padding follow
        count = real.long()
        lengths = count.sum(1)
        place = torch.where(real, count.cumsum(1) - 1, lengths[:, None] + (1 - count).cumsum(1) - 1)  # (B, N)
        B, N = real.shape
        tokens = torch.arange(N, device=real.device).expand(B, N)
        offset = N * torch.arange(B, device=real.device)[:, None]
        index = torch.zeros_like(place).scatter(1, place, tokens) + offset
        return cls([Group(index, lengths)], (place + offset).flatten(), real)

    @classmethod
    def of_documents(cls, begins: torch.BoolTensor, real: torch.BoolTensor | None) -> "Rows":
        """Those of packed rows.

        Args:
            begins: (B, N), True for the first token of each document; the first real token of a row always is one.
            real: (B, N), False for padding, or None if there is none.
        """
        B, N = begins.shape
        device = begins.device
        if real is None:
            flat = torch.arange(B * N, device=device)  # (T,)
        else:
            flat = real.flatten().nonzero()[:, 0]
        row = flat // N
        begins = begins.flatten()[flat]
        begins[:1] = True
        begins[1:] |= row[1:] != row[:-1]
        document = begins.long().cumsum(0) - 1  # (T,)
        first = begins.nonzero()[:, 0]  # (R,)
        lengths = torch.diff(first, append=first.new_tensor([len(flat)]))
        place = torch.arange(len(flat), device=device) - first[document]

        groups, back = [], torch.zeros(B * N, dtype=torch.long, device=device)
        shift = torch.zeros_like(first)  # where each document begins in the outputs
        laid_out = 0
        for members in similar(lengths):
            own = lengths[members]
            M = int(own.max())
            places = torch.arange(M, device=device).minimum(own[:, None] - 1)  # (R, M), padding repeats the last
            groups.append(Group(flat[first[members][:, None] + places], None if int(own.min()) == M else own))
            shift[members] = laid_out + M * torch.arange(len(members), device=device)
            laid_out += M * len(members)
        back[flat] = shift[document] + place
        documents, positions = torch.full_like(back, -1), torch.zeros_like(back)
        documents[flat], positions[flat] = document, place
        bounds = flat[torch.stack([first, first + lengths - 1])]
        return cls(groups, back, real, documents.view(B, N), positions.view(B, N), bounds)

    def mix(self, function: Callable, *tensors: torch.Tensor):
        """`function` of each row for itself.

        Args:
            function: takes tensors (R, M, ...), each document's tokens first, and `lengths` (R,) or None if all have
                M; gives a tensor (R, M, ...), or a tuple of such or None. What it gives at padding is not used.
            tensors: (B, N, ...) each.

        Returns:
            what `function` gives, as (B, N, ...).
        """
        outputs = [function(*map(group.take, tensors), group.lengths) for group in self.groups]
        if isinstance(outputs[0], tuple):
            return tuple(self.join(parts, tensors[0]) for parts in zip(*outputs))
        return self.join(outputs, tensors[0])

    def join(self, parts, like: torch.Tensor) -> torch.Tensor | None:
        if parts[0] is None or self.back is None:
            return parts[0]
        flat = torch.cat([x.flatten(0, 1) for x in parts]) if len(parts) > 1 else parts[0].flatten(0, 1)
        return flat.index_select(0, self.back).unflatten(0, like.shape[:2])

    def visible(self, causal: bool) -> torch.BoolTensor:
        """(B, 1, N, N): which key (last) each query of packed rows sees; padding sees itself."""
        N = self.documents.shape[1]
        places = torch.arange(N, device=self.documents.device)
        seen = (self.documents[:, :, None] == self.documents[:, None]) & (self.documents[:, None] >= 0)
        if causal:
            seen = seen & (places <= places[:, None])
        return (seen | (places == places[:, None]))[:, None]


def over_rows(rows: Rows | None, function: Callable, *tensors: torch.Tensor):
    """`rows.mix(function, *tensors)`; without rows, all tokens of a batch are real and each of its rows a document."""
    return function(*tensors, None) if rows is None else rows.mix(function, *tensors)


def similar(lengths: torch.LongTensor) -> list[torch.LongTensor]:
    """Documents of `lengths` (R,) in groups that differ little in length: their numbers, in ascending order."""
    kinds, kind = torch.searchsorted(EDGES, lengths.cpu()).unique(return_inverse=True)
    cpu = {"dtype": torch.long, "device": "cpu"}  # whatever device is the default
    tokens = torch.zeros(len(kinds), **cpu).index_add_(0, kind, lengths.cpu())
    group, held = torch.zeros(len(kinds), **cpu), 0
    for i, count in enumerate(tokens.tolist()):
        if held >= GROUP_TOKENS:
            group[i:] += 1
            held = 0
        held += count
    chosen = group[kind].to(lengths.device)
    return [(chosen == i).nonzero()[:, 0] for i in range(int(group[-1]) + 1)]


def begins_of(
    shape: tuple[int, int],
    real: torch.BoolTensor | None = None,
    position_ids: torch.LongTensor | None = None,
    seq_idx: torch.LongTensor | None = None,
    cu_seq_lens_q: torch.LongTensor | None = None,
    cu_seq_lens_k: torch.LongTensor | None = None,
) -> torch.BoolTensor | None:
    """(B, N), True where a document begins after another one in its row; None where each row is one document.

    Args:
        shape: B and N.
        real: (B, N), False for padding, or None if there is none.
        position_ids: (B or 1, N); a document begins where they do not go up from one real token to the next beside it.
        seq_idx: (B or 1, N), the number of each token's document.
        cu_seq_lens_q, cu_seq_lens_k: (R + 1,), where documents begin and end in the flat batch.

    Raises:
        ValueError: a mark does not fit the batch, or those of queries and keys differ.
    """
    marks = {"position_ids": position_ids, "seq_idx": seq_idx}
    for name, bounds in (("cu_seq_lens_q", cu_seq_lens_q), ("cu_seq_lens_k", cu_seq_lens_k)):
        if bounds is None:
            continue
        steps = bounds.flatten().diff()
        total = shape[0] * shape[1]
        if bounds.ndim != 1 or not len(steps) or bounds[0] or bounds[-1] != total or (steps < 0).any():
            raise ValueError(
                f"`{name}` ({bounds.tolist()}) must rise from 0 to the {total} tokens of the batch: where each "
                "document begins, and where the last one ends."
            )
        tokens = torch.arange(total, device=bounds.device)
        marks[name] = torch.searchsorted(bounds.long(), tokens, right=True).view(shape)
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        if not torch.equal(marks["cu_seq_lens_q"], marks["cu_seq_lens_k"].to(cu_seq_lens_q.device)):
            raise ValueError(
                f"`cu_seq_lens_k` ({cu_seq_lens_k.tolist()}) differs from `cu_seq_lens_q` ({cu_seq_lens_q.tolist()}): "
                "queries and keys are of the same documents, give the same for both."
            )
    begins = None
    for name, numbers in marks.items():
        if numbers is None:
            continue
        if numbers.ndim != 2 or numbers.shape[0] not in (1, shape[0]) or numbers.shape[1] != shape[1]:
            raise ValueError(f"`{name}` has shape {tuple(numbers.shape)}, but the tokens have {tuple(shape)}.")
        if begins is None:
            begins = torch.zeros(shape, dtype=torch.bool, device=numbers.device)
            places = torch.arange(begins.numel()) if real is None else real.flatten().nonzero()[:, 0]
            before, now = places.to(begins.device).unfold(0, 2, 1).unbind(1) if len(places) > 1 else (places[:0],) * 2
            inside = before // shape[1] == now // shape[1]
            before, now = before[inside], now[inside]  # neighbours in a row, padding left out
        numbers = numbers.to(begins.device).expand(shape).flatten()
        if name == "position_ids":
            # generate() counts on from the position that padding was given: after padding they say nothing
            new = (numbers[now] <= numbers[before]) & (now == before + 1)
        else:
            new = numbers[now] != numbers[before]
        begins.view(-1)[now[new]] = True
    return begins if begins is not None and bool(begins.any()) else None


__all__ = ["LONGEST", "MARKS", "Group", "Rows", "begins_of", "over_rows"]
