"""Detectors as graphs, by torch.export and in ONNX Runtime, at sizes that were not seen at export."""

import numpy as np
import pytest
import torch

from tests.contracts.test_detectors import images, make
from vitrail.detectors.detr import best_first
from vitrail_runtime.finish import FINISH
from vitrail_runtime.preprocess import Geometry


class Answers(torch.nn.Module):
    """What is exported of a detector: its answers, or of one that suppresses boxes what it says before."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        if hasattr(self.model, "raw"):
            return dict(zip(("logits", "deltas"), self.model.raw(images), strict=True))
        return self.model.forward_tensors(images)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("resnet", "detr"),
        ("resnet", "deformable_detr"),
        ("resnet", "efficientdet"),
        ("efficientnet", "efficientdet"),
    ],
)
def test_an_exported_detector_answers_the_same_at_sizes_not_seen(family, config, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    model = Answers(make(family, config))
    dim = torch.export.Dim
    sides = {2: dim("height", min=64, max=2048), 3: dim("width", min=64, max=2048)}
    oblivious = torch.fx.experimental._config.patch(backed_size_oblivious=True)
    with (
        torch.no_grad(),
        oblivious,
    ):  # of more than one place at every level, or one is taken for fixed
        program = torch.export.export(model, (images(1, 150, 300),), dynamic_shapes=(sides,))
    called = {str(node.target) for node in program.graph.nodes}
    assert not any("grid_sampl" in name or "embedding_bag" in name for name in called)
    path = tmp_path / "model.onnx"
    torch.onnx.export(program, (), path, dynamo=True, external_data=False, verbose=False)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for height, width in ((64, 96), (131, 70)):
        x = images(1, height, width)
        with torch.no_grad():
            want, traced = model(x), program.module()(x)
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        got = dict(zip(want, map(torch.from_numpy, found), strict=True))
        for said in (traced, got):
            for name, value in want.items():
                scale = value.abs().max().clamp(min=1).to(torch.float64)
                assert said[name].dtype == value.dtype
                apart = (said[name].double() - value.double()).abs().max()
                assert apart <= 1e-4 * scale, name
        if "boxes" in want:  # as the runtime shows them, in pixels of an original of twice the size
            where = Geometry((2 * height, 2 * width), (0.5, 0.5), (0, 0))
            (mine,), (other,) = (
                FINISH["detect"](
                    {k: v.numpy() for k, v in one.items()}, [where], ("a", "b", "c"), 5
                )
                for one in (want, got)
            )
            assert mine.names == other.names
            np.testing.assert_allclose(mine.boxes, other.boxes, atol=0.05)


@pytest.mark.slow
def test_equal_scores_keep_their_order_in_onnx_too(tmp_path):
    ort = pytest.importorskip("onnxruntime")

    class First(torch.nn.Module):
        def forward(self, scores):
            return best_first(scores)

    torch.manual_seed(0)
    scores = torch.randint(0, 4, (3, 30)) / 4.0
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(First(), (scores[:2],), dynamic_shapes=({0: batch},))
    path = tmp_path / "first.onnx"
    torch.onnx.export(program, (), path, dynamo=True, external_data=False, verbose=False)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: scores.numpy()})
    want = scores.sort(dim=1, descending=True, stable=True)
    for mine, other in zip(found, want, strict=True):
        np.testing.assert_array_equal(mine, other.numpy())
