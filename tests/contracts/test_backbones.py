"""What every registered backbone promises, checked cheaply: shapes of all variants on `meta`,
behaviour with numbers on the tiny config of each family."""

import copy
import math
import re

import pytest
import torch

from tests.parity import randomise
from vitrail.classifiers import Classifier
from vitrail.models import build_classifier, create_backbone
from vitrail.registry import list_backbones, tiny_entries

TINY = tiny_entries()
SIZES = [(1, 1), (1, 5), (57, 3), (37, 53), (64, 96), (97, 33)]


def make_tiny(family: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    backbone = TINY[family].cls(TINY[family].config)
    randomise(backbone)
    return backbone.eval()


def make_classifier(family: str, num_classes: int = 5) -> Classifier:
    torch.manual_seed(0)
    model = build_classifier(TINY[family], TINY[family].config, num_classes)
    randomise(model)
    return model.eval()


def images(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width, generator=generator)


def finest_and_all(features):
    out = list(features.maps.values())
    return out if features.prefix is None else [*out, features.prefix]


# Tracing takes seconds a family: each of another kind at every change, all with the slow tests.
TRACED = [
    family
    if family in ("vit", "efficientvit", "resnet")
    else pytest.param(family, marks=pytest.mark.slow)
    for family in TINY
]


@pytest.mark.parametrize("name", list_backbones())
def test_maps_have_the_declared_channels_and_strides(name):
    with torch.device("meta"):  # shapes of every variant, at no cost
        backbone = create_backbone(name)
        maps = backbone(torch.empty(2, 3, 64, 96)).maps
    assert maps.keys() == backbone.feature_specs.keys()
    for key, spec in backbone.feature_specs.items():
        expected = (2, spec.channels, math.ceil(64 / spec.stride), math.ceil(96 / spec.stride))
        assert maps[key].shape == expected, key


@pytest.mark.parametrize("name", list_backbones())
def test_no_table_is_computed_into_a_buffer(name):
    """Everything in state_dict is a weight or a running statistic, so `meta` + assign is complete."""
    with torch.device("meta"):
        backbone = create_backbone(name)
    own = set(backbone.state_dict())
    for key, _ in backbone.named_buffers():
        leaf = key.rpartition(".")[2]
        assert leaf in ("running_mean", "running_var", "num_batches_tracked"), key
        assert key in own, f"{key} is not persistent and would stay on meta"


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_any_size_gives_maps_of_the_ceiling(family, height, width):
    backbone = make_tiny(family)
    with torch.no_grad():
        features = backbone(images(2, height, width))
    for key, spec in backbone.feature_specs.items():
        expected = (
            2,
            spec.channels,
            math.ceil(height / spec.stride),
            math.ceil(width / spec.stride),
        )
        assert features.maps[key].shape == expected, key
        assert features.maps[key].isfinite().all(), key


@pytest.mark.parametrize("family", TINY)
def test_an_image_in_a_batch_equals_the_image_alone(family):
    model = make_classifier(family)
    batch = images(3, 65, 47)
    with torch.no_grad():
        together = model(batch)
        alone = torch.cat([model(batch[i : i + 1]) for i in range(3)])
    scale = together.abs().max()
    torch.testing.assert_close(together / scale, alone / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", TINY)
def test_every_parameter_receives_a_finite_gradient(family):
    model = make_classifier(family).train()
    loss = model(images(4, 64, 96)).square().sum()
    loss += sum(x.float().sum() for x in finest_and_all(model.backbone(images(4, 64, 96, seed=1))))
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, f"no gradient: {without}"
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad.isfinite().all(), name


@pytest.mark.parametrize("family", TINY)
def test_gradient_checkpointing_changes_nothing(family):
    backbone = make_tiny(family).train()
    twin = copy.deepcopy(backbone)
    twin.grad_checkpointing = True
    x = images(2, 40, 56)
    for model in (backbone, twin):
        torch.manual_seed(1)
        sum(v.square().mean() for v in finest_and_all(model(x))).backward()
    for (name, a), b in zip(backbone.named_parameters(), twin.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=lambda m, n=name: f"{n}: {m}")
    # The second run of a block must not move running statistics again.
    for (name, a), b in zip(backbone.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


BLOCK = re.compile(
    r"(blocks\.\d+|stages\.\d+\.(blocks\.)?\d+|layers\.\d+\.blocks\.\d+|layer\d\.\d+)\."
)


def runs_of_each_block(family: str, checkpointing: bool, training: bool) -> dict[str, int]:
    """How often the layers of each block run, at most, in a forward and a backward pass."""
    backbone = make_tiny(family).train(training)
    backbone.grad_checkpointing = checkpointing
    calls: dict[str, int] = {}
    for name, module in backbone.named_modules():
        block = BLOCK.match(f"{name}.")
        if block and not list(module.children()) and list(module.parameters()):
            calls[name] = 0
            module.register_forward_hook(
                lambda m, given, out, name=name: calls.update({name: calls[name] + 1})
            )
    sum(v.sum() for v in finest_and_all(backbone(images(2, 40, 56)))).backward()
    runs: dict[str, int] = {}
    for name, count in calls.items():
        block = BLOCK.match(f"{name}.")[0]
        # The second run ends with the last tensor that the gradients need.
        runs[block] = max(count, runs.get(block, 0))
    return runs


@pytest.mark.parametrize("family", TINY)
def test_gradient_checkpointing_computes_every_block_again_in_training_alone(family):
    plain = runs_of_each_block(family, checkpointing=False, training=True)
    again = runs_of_each_block(family, checkpointing=True, training=True)
    assert plain, "no block was found"
    assert again == {block: 2 * count for block, count in plain.items()}
    assert runs_of_each_block(family, checkpointing=True, training=False) == plain


@pytest.mark.parametrize("family", TINY)
def test_bf16_autocast_runs_forward_and_backward(family):
    model = make_classifier(family).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(2, 64, 48)).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("family", TINY)
def test_recording_names_intermediates_and_changes_nothing(family):
    backbone = make_tiny(family)
    record: dict[str, torch.Tensor] = {}
    x = images(2, 64, 96)
    with torch.no_grad():
        plain, seen = finest_and_all(backbone(x)), finest_and_all(backbone(x, record=record))
    assert record, "nothing was recorded"
    for a, b in zip(plain, seen, strict=True):
        scale = a.abs().max()
        torch.testing.assert_close(a / scale, b / scale, atol=2e-5, rtol=0)
    for key, value in record.items():
        if key.endswith("attn.weights"):
            assert value.ndim == 4, f"{key}: expected (B, heads, queries, keys)"


@pytest.mark.parametrize("family", TINY)
def test_the_model_is_built_on_meta_and_loaded_by_assignment(family):
    source = make_classifier(family)
    with torch.device("meta"):
        target = build_classifier(TINY[family], TINY[family].config, 5).eval()
    target.load_state_dict(source.state_dict(), assign=True)
    x = images(1, 48, 80)
    with torch.no_grad():
        assert torch.equal(source(x), target(x))


@pytest.mark.parametrize("family", TRACED)
def test_compiling_gives_the_same_result(family):
    torch._dynamo.reset()
    model = make_classifier(family)
    x = images(2, 64, 96)
    with torch.no_grad():
        eager = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    scale = eager.abs().max()
    torch.testing.assert_close(compiled / scale, eager / scale, atol=2e-5, rtol=0)


# Older tracers fix sizes of these (in conv, in max_pool2d) that the program does not depend on.
EXPORTED_SINCE = {"mobilevitv2": "2.12", "resnet": "2.13", "efficientnet": "2.14"}


def exported(family: str) -> tuple[Classifier, torch.export.ExportedProgram]:
    if torch.__version__ < EXPORTED_SINCE.get(family, "2.11"):
        pytest.skip(f"{family} with sizes that vary is exported by torch {EXPORTED_SINCE[family]}")
    model = make_classifier(family)
    dim = torch.export.Dim
    # Sizes and batch of the example are all different and none is special.
    shapes = ({0: dim("batch", min=1, max=64), 2: dim("height", min=2), 3: dim("width", min=2)},)
    dynamic = shapes if getattr(model.backbone, "export_dynamic", True) else ({0: shapes[0][0]},)
    # A map whose side may be 1 is no reason to specialise: the tests run the program at several sizes.
    oblivious = torch.fx.experimental._config.patch(backed_size_oblivious=True)
    with torch.no_grad(), oblivious:
        program = torch.export.export(model, (images(3, 75, 107),), dynamic_shapes=dynamic)
    return model, program


@pytest.mark.parametrize("family", TRACED)
def test_an_exported_program_equals_eager_at_sizes_not_seen(family):
    model, program = exported(family)
    run = program.module()
    sizes = [(1, 64, 96), (2, 131, 50), (4, 33, 34)]
    for size in sizes if getattr(model.backbone, "export_dynamic", True) else [(2, 75, 107)]:
        x = images(*size)
        with torch.no_grad():
            want, got = model(x), run(x)
        scale = want.abs().max()
        torch.testing.assert_close(got / scale, want / scale, atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", TINY)
def test_onnx_output_equals_eager_at_a_size_not_seen_at_export(family, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    model, program = exported(family)
    path = tmp_path / "model.onnx"
    torch.onnx.export(program, (), path, dynamo=True, external_data=False, verbose=False)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    sizes = [(1, 64, 96), (2, 131, 50)]
    for size in sizes if getattr(model.backbone, "export_dynamic", True) else [(2, 75, 107)]:
        x = images(*size)
        with torch.no_grad():
            want = model(x)
        got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        scale = want.abs().max()
        torch.testing.assert_close(got / scale, want / scale, atol=1e-4, rtol=0)
