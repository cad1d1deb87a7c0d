"""Detectors as graphs, by torch.export and in ONNX Runtime, at sizes that were not seen at export."""

import numpy as np
import pytest
import torch

from tests.contracts.test_detectors import images, make
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
@pytest.mark.parametrize("config", ["deformable_detr"])
def test_an_exported_detector_answers_the_same_at_sizes_not_seen(config, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    model = Answers(make("resnet", config))
    dim = torch.export.Dim
    sides = {2: dim("height", min=64, max=2048), 3: dim("width", min=64, max=2048)}
    oblivious = torch.fx.experimental._config.patch(backed_size_oblivious=True)
    with torch.no_grad(), oblivious:
        program = torch.export.export(model, (images(1, 75, 107),), dynamic_shapes=(sides,))
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
