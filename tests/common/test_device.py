"""Programs that are told to use a GPU where there is none."""

import pytest
import torch

from ordnung.scripts import bench_quadratic, bench_sparse, benchmark, prefix_tasks, recall
from ordnung.scripts.common.errors import ScriptError

# small, should it train all the same
TRAINED = ["--variants", "softmax={model_type: softmax_lm}", "--max_steps", "1", "--seeds", "0"]
TRAINED += ["--config_overrides", "hidden_size=8,num_hidden_layers=1,num_attention_heads=2", "--output_dir", "out"]
PROGRAMS = {
    benchmark: ["--output", "out/speed.json"],
    bench_quadratic: ["--output", "out/speed.json"],
    bench_sparse: ["--output", "out/speed.json"],
    recall: TRAINED,
    prefix_tasks: [*TRAINED, "--task", "pointer"],
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_cuda_is_refused_in_words_without_a_gpu(program, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ScriptError, match="torch sees no GPU"):
        program.main([*PROGRAMS[program], "--device", "cuda"])
    assert not (tmp_path / "out").exists()
