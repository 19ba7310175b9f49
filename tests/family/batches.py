"""The inputs of the tests: padded and packed batches, and what a state holds."""

import torch

VOCAB = 50
PAD = 0


# What Llama, Qwen and their like are made of.
MODERN = {
    "norm_type": "rms_norm",
    "mlp_type": "gated",
    "hidden_act": "silu",
    "num_key_value_heads": 2,
    "head_dim": 12,
    "attention_bias": False,
    "mlp_bias": False,
    "qk_norm": True,
    "position_embedding_type": "rope",
}


def masked_batch():
    """Three rows of 19: padded on the left, on the right, and in the middle (with one pad at the end)."""
    ids = torch.randint(1, VOCAB, (3, 19))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    mask[1, -7:] = 0
    mask[2, [3, 4, 9, 18]] = 0
    return ids.masked_fill(mask == 0, PAD), mask


# Tokens of the documents in each row of a packed batch.
PACKED = ((7, 1, 4, 9), (3, 12, 6))


def packed_batch():
    """Two rows of several documents each, and the places of each document: (row, slice)."""
    ids = torch.randint(1, VOCAB, (2, 21))
    places = []
    for row, lengths in enumerate(PACKED):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        places += [(row, slice(end - length, end)) for length, end in zip(lengths, ends)]
    return ids, places


def marks_of(mark, places):
    """What says where the documents of `packed_batch` lie, in one of the ways that clients use."""
    lengths = torch.tensor([place.stop - place.start for _, place in places])
    if mark == "position_ids":
        return {mark: torch.cat([torch.arange(n) for n in lengths]).view(2, 21)}
    if mark == "seq_idx":
        return {mark: torch.repeat_interleave(torch.arange(len(places)), lengths).int().view(2, 21)}
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def cache_tensors(cache):
    """Every floating-point tensor of the generation state; the others count tokens."""
    for layer in cache.layers:
        for value in vars(layer).values():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else [value]
            yield from (x for x in held if isinstance(x, torch.Tensor) and x.is_floating_point())
