"""Linformer's Table 3 from a results file of benchmark.py."""

import pytest

from ordnung.scripts.benchmarks.variants import PROJECTED_SIZES, VARIANTS, Shape
from ordnung.scripts.common.machine import machine_info
from ordnung.scripts.reports import grid


def row(name, length, seconds, peak):
    timed = {"median": seconds, "n": 3} if seconds else None
    return {"task": "forward", "name": name, "length": length, "peak_bytes": peak} | (
        {"seconds": timed} if timed else {"skipped": "needs more"}
    )


@pytest.fixture
def results():
    rows = [row(grid.FUSED, 512, 3.0, 2**20), row(grid.STORED, 512, 6.0, 2**22), row(grid.BY_HEAD, 512, 5.0, 2**21)]
    rows += [row(grid.name_of(size), 512, 2.0, 2**21) for size in PROJECTED_SIZES]
    rows += [row(grid.FUSED, 65536, 90.0, 2**30), row(grid.STORED, 65536, None, None)]
    rows += [row(grid.BY_HEAD, 65536, 300.0, 2**33), row(grid.name_of(2048), 65536, 10.0, 2**29)]
    return {"machine": machine_info(), "results": rows}


def test_cells_hold_ours_and_the_papers(results):
    lines = grid.markdown(results).split("\n")
    short, long = [line for line in lines if line.startswith("| 512")], [x for x in lines if x.startswith("| 65,536")]
    assert "1.50×, 3.00× (1.5×)" in short[0] and "1.50×, 3.00× (1.3×)" in short[0]
    assert short[0].count("×)") == 2  # k = 512 and above are no smaller than the row
    assert "2 MiB, 8,192; 0.5×, 2.0× (1.7×)" in short[1]
    assert "9.00×, 30.00×* (7.9×)" in long[0] and "512 MiB, 32; 2.0×, 16.0×* (18×)" in long[1]
    assert "n is 3 at least" in lines[0]


def test_the_paper_has_a_number_in_every_cell_where_the_size_is_below_the_length():
    for table in (grid.FASTER, grid.LARGER):
        for length, numbers in table.items():
            assert len(numbers) == sum(size < length for size in PROJECTED_SIZES)
            assert list(numbers) == sorted(numbers, reverse=True)  # a larger size saves less


@pytest.mark.parametrize("size", PROJECTED_SIZES)
def test_encoders_of_the_grid_have_its_sizes(size):
    shape = Shape(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9, kernel_size=2, max_length=3000
    )
    config = VARIANTS[grid.name_of(size)].config(shape)
    assert config.projected_size == size and config.max_position_embeddings % size == 0
