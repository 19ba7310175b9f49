"""Compiled, exported and traced graphs."""

import warnings

import pytest
import torch

from family.base import FamilyBase
from family.batches import VOCAB, masked_batch


class OnlyLogits(torch.nn.Module):
    """A model as a graph takes it: ids and mask to logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(ids, attention_mask=mask, use_cache=False).logits


def graph_batches():
    """Batches of other shapes than a graph was made from, padded on the left, on the right and in the middle."""
    yield masked_batch()
    for rows, tokens in ((2, 5), (4, 37), (1, 64)):
        ids = torch.randint(1, VOCAB, (rows, tokens))
        mask = torch.ones_like(ids)
        mask[0, : tokens // 3] = 0
        mask[-1, -1 - tokens // 4 : -1] = 0
        yield ids, mask


class Graphs(FamilyBase):
    def test_graph_captures_whole_forward(self, compiled_variant):
        model = self.shallow(compiled_variant)
        ids = torch.randint(1, VOCAB, (2, 21))
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        self.assert_equal(compiled(ids, use_cache=False).logits, model(ids).logits, compiled_variant)

    def test_exports_with_dynamic_length(self, exported_variant):
        model = self.shallow(exported_variant)
        length = torch.export.Dim("length", min=2, max=64)
        with torch.no_grad():
            program = torch.export.export(
                model,
                (torch.randint(1, VOCAB, (1, 24)),),
                {"use_cache": False},
                dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
                strict=False,
            )
        for tokens in (5, 40):
            ids = torch.randint(1, VOCAB, (1, tokens))
            self.assert_equal(program.module()(ids, use_cache=False).logits, model(ids).logits, exported_variant)

    def test_traced_graph_takes_padding_and_other_shapes(self, variant):
        """torch.jit.trace, which records shapes as the exporters do."""
        model = self.shallow(variant)
        ids, mask = masked_batch()
        for example in (mask, torch.ones_like(mask)):  # a graph made without padding takes it too
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of shapes that are read, which is what is tested
                traced = torch.jit.trace(OnlyLogits(model), (ids, example), check_trace=False)
            for other, padded in graph_batches():
                expected = model(other, attention_mask=padded, use_cache=False).logits
                self.assert_equal(traced(other, padded)[padded == 1], expected[padded == 1], variant)

    def test_onnx_takes_padding_and_other_shapes(self, tmp_path):
        """torch.onnx's exporter, run by onnxruntime."""
        if not self.exports_to_onnx:
            pytest.skip("this family's plan of passes has no ONNX form")
        pytest.importorskip("onnxscript", reason="needs ordnung[onnx]")
        runtime = pytest.importorskip("onnxruntime", reason="needs ordnung[onnx]")
        model = self.shallow().float()
        ids, mask = masked_batch()
        shape = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=64)}
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                OnlyLogits(model),
                (ids, mask),
                tmp_path / "model.onnx",
                dynamo=True,
                verbose=False,
                dynamic_shapes={"ids": shape, "mask": shape},
            )
        session = runtime.InferenceSession(tmp_path / "model.onnx")
        names = [argument.name for argument in session.get_inputs()]
        for ids, mask in graph_batches():
            expected = model(ids, attention_mask=mask, use_cache=False).logits.detach()
            got = torch.from_numpy(session.run(None, dict(zip(names, (ids.numpy(), mask.numpy()))))[0])
            torch.testing.assert_close(got[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-4)
