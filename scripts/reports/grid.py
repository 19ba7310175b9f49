"""Linformer's Table 3: time and memory of an encoder layer by length and projected size, beside the paper's numbers."""

from ordnung.scripts.benchmarks.variants import PROJECTED_SIZE, PROJECTED_SIZES
from ordnung.scripts.common.machine import described
from ordnung.scripts.common.tables import markdown_table, paragraphs

FUSED, STORED, BY_HEAD = "softmax_encoder_sdpa", "softmax_encoder_eager", "softmax_encoder_eager_by_head"
DEVICE_BYTES = 16 * 2**30  # of the paper's GPU, a V100 of 16 GB
# Wang et al. 2020, arXiv 2006.04768, Table 3, against attention that stores its scores, by length and then by size (128
# to 2,048, as far as smaller than the length): times as fast, and times as large a batch.
FASTER = {
    512: (1.5, 1.3),
    1024: (1.7, 1.6, 1.3),
    2048: (2.6, 2.4, 2.1, 1.3),
    4096: (3.4, 3.2, 2.8, 2.2, 1.3),
    8192: (5.5, 5.0, 4.4, 3.5, 2.1),
    16384: (8.6, 7.8, 7.0, 5.6, 3.3),
    32768: (13, 12, 11, 8.8, 5.0),
    65536: (20, 18, 16, 14, 7.9),
}
LARGER = {
    512: (1.7, 1.5),
    1024: (3.0, 2.9, 1.8),
    2048: (6.1, 5.6, 3.6, 2.0),
    4096: (14, 13, 8.3, 4.3, 2.3),
    8192: (28, 26, 17, 8.5, 4.5),
    16384: (56, 48, 32, 16, 8),
    32768: (56, 48, 36, 18, 16),
    65536: (60, 52, 40, 20, 18),
}


def name_of(size: int) -> str:
    """The variant of benchmark.py with this projected size."""
    return "linformer_encoder" if size == PROJECTED_SIZE else f"linformer_encoder_{size}"


def markdown(results: dict) -> str:
    """Two grids, lengths by projected sizes: speed, and memory with the largest batch that it leaves."""
    rows = {(row["name"], row["length"]): row for row in results["results"] if row["task"] == "forward"}
    rows = {place: row for place, row in rows.items() if "seconds" in row and row.get("peak_bytes")}
    lengths = sorted({length for _, length in rows} & FASTER.keys())
    times, memory = [], []
    for length in lengths:
        stored = next((name for name in (STORED, BY_HEAD) if (name, length) in rows), None)
        by_head = "*" * (stored == BY_HEAD)
        others = [rows.get((name, length)) for name in (FUSED, stored)]
        faster, larger = [], []
        for i, size in enumerate(PROJECTED_SIZES):
            own = rows.get((name_of(size), length)) if size < length else None
            if own is None:
                faster.append("-")
                larger.append("-")
                continue
            found = [f"{x['seconds']['median'] / own['seconds']['median']:.2f}×" if x else "-" for x in others]
            faster.append(f"{found[0]}, {found[1]}{by_head} ({FASTER[length][i]:g}×)")
            found = [f"{x['peak_bytes'] / own['peak_bytes']:.1f}×" if x else "-" for x in others]
            batch = f"{own['peak_bytes'] / 2**20:,.0f} MiB, {DEVICE_BYTES // own['peak_bytes']:,}"
            larger.append(f"{batch}; {found[0]}, {found[1]}{by_head} ({LARGER[length][i]:g}×)")
        times.append([f"{length:,}", *faster])
        memory.append([f"{length:,}", *larger])
    header = ["tokens", *(f"k = {size:,}" for size in PROJECTED_SIZES)]
    least = min((row["seconds"]["n"] for row in rows.values()), default=0)
    return paragraphs(
        f"{described(results['machine'])} One encoder layer. In each cell: against fused attention, against attention "
        "that stores its scores (* a head at a time, where all at once did not fit), and in brackets the paper's "
        f"number against stored scores. Medians; n is {least} at least.",
        "**Times as fast**",
        markdown_table(header, times),
        f"**Peak memory of a sequence above the weights, largest batch of {DEVICE_BYTES // 2**30} GiB, times less**",
        markdown_table(header, memory),
    )
