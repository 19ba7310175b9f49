"""The kinds of sparse attention: which pairs of tokens each computes, how many, and what is held of them."""

from pathlib import Path

import torch

from ordnung.configuration.configuration_sparse_attention_lm import SparseAttentionLMConfig
from ordnung.modeling.modeling_sparse_attention_lm import SparseAttention
from ordnung.modeling.ops.sparse_keys import pairs_seen
from ordnung.modeling.ops.sparse_pattern import Pattern, mask_naive
from ordnung.scripts.common.figures import new_figure
from ordnung.scripts.common.tables import markdown_table

LENGTHS = (4096, 32768)
# kind -> fields beside a window of 256, and what a token sees besides
KINDS = {
    "local": ({"num_global_tokens": 0}, "nothing"),
    "local + global (Longformer)": ({"num_global_tokens": 16}, "the first 16 tokens"),
    "local + strided": ({"num_global_tokens": 0, "global_stride": 64}, "every 64th token"),
    "local + random": ({"num_global_tokens": 0, "num_random_blocks": 4}, "4 blocks of 64 tokens"),
    "all": ({"num_global_tokens": 16, "global_stride": 64, "num_random_blocks": 4}, "all of these"),
}
# kind -> pattern of the gallery, where 64 tokens and a window of 3 show what is what
GALLERY = {
    "local": {"window": 3},
    "strided": {"window": 3, "stride": 8},
    "global": {"window": 1, "num_global": 3},
    "random": {"window": 3, "num_random": 2, "random_block": 3},
    "local + global\n(Longformer)": {"window": 3, "num_global": 3},
}
GALLERY_TOKENS = 64


def mixer(**fields) -> SparseAttention:
    """One layer, without memory for its weights."""
    with torch.device("meta"):
        return SparseAttention(SparseAttentionLMConfig(num_hidden_layers=1, **fields), 0)


def share(pattern: Pattern, tokens: int) -> float:
    """The part of full attention's pairs that is computed."""
    return pairs_seen(pattern, tokens) / (tokens * (tokens + 1) // 2 if pattern.causal else tokens**2)


def markdown() -> str:
    """Pairs computed and state held, as the models themselves count them."""
    header = ["kind", "a token sees the window and"]
    header += [f"pairs, causal, {length:,} tokens" for length in LENGTHS]
    header += [f"both ways, {LENGTHS[0]:,}", *(f"state, {length:,}" for length in LENGTHS)]
    body = []
    for kind, (fields, besides) in KINDS.items():
        causal, both = mixer(**fields), mixer(is_decoder=False, **fields)
        full = 2 * causal.k_proj.out_features  # elements that attention keeps of a token
        pairs = [share(causal.pattern, length) for length in LENGTHS] + [share(both.pattern, LENGTHS[0])]
        held = [causal.cache_bytes(length, 1) / (length * full) for length in LENGTHS]
        body.append([kind, besides, *(f"{100 * part:.1f} %" for part in (*pairs, *held))])
    return markdown_table(header, body)


def plot(image: Path):
    """Five kinds as heatmaps, bidirectional above and causal below, with the share of pairs that each computes."""
    figure, axes = new_figure(2, len(GALLERY), figsize=(2.3 * len(GALLERY), 5.4))
    for line, causal in zip(axes, (False, True)):
        for panel, (kind, fields) in zip(line, GALLERY.items()):
            pattern = Pattern(**fields, causal=causal)
            mask = mask_naive(pattern, GALLERY_TOKENS)
            near = mask_naive(Pattern(fields["window"], causal=causal), GALLERY_TOKENS)
            panel.imshow(mask.int() + near.int(), cmap="Blues", vmin=0, vmax=2.4, interpolation="nearest")
            panel.set_title(f"{kind}\n{100 * share(pattern, GALLERY_TOKENS):.0f} % of pairs", fontsize=9)
            panel.set(xticks=[], yticks=[])
        line[0].set_ylabel("causal: query" if causal else "bidirectional: query", fontsize=9)
    figure.supxlabel("key (dark: the window, light: what is seen besides)", fontsize=9)
    figure.savefig(image, dpi=110)
