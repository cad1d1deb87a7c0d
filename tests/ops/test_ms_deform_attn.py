"""Deformable attention: the official numbers, a loop over points, and every form against the plain one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.golden.compare import check, load
from tests.golden.fill import array, fill
from vitrail.ops.ms_deform_attn import MSDeformAttn, automatic, has_triton, ms_deform_attn
from vitrail_runtime.errors import InputError

FORMS = ["plain", "bag", "gather"]
FIXTURE = "msdeform_attn"


def draw(shapes, batch=2, queries=3, heads=2, width=3, points=2, dtype=torch.float64, seed=0):
    """value, locations (some outside) and weights; nothing on a pixel's centre, where slopes jump."""
    g = torch.Generator().manual_seed(seed)
    tokens = sum(h * w for h, w in shapes)
    value = torch.randn(batch, tokens, heads, width, generator=g, dtype=torch.float64)
    place = (batch, queries, heads, len(shapes), points)
    locations = torch.rand(*place, 2, generator=g, dtype=torch.float64) * 1.5 - 0.25
    weights = torch.rand(place, generator=g, dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (value, locations, weights)]


def by_hand(value, shapes, locations, weights):
    """Equation 3, one point and one corner at a time."""
    batch, queries, heads, levels, points, _ = locations.shape
    out = torch.zeros(batch, queries, heads, value.shape[-1], dtype=value.dtype)
    for b, q, h, level, p in torch.cartesian_prod(
        *map(torch.arange, (batch, queries, heads, levels, points))
    ).tolist():
        height, width = shapes[level]
        start = sum(a * b for a, b in shapes[:level])
        x = locations[b, q, h, level, p, 0].item() * width - 0.5
        y = locations[b, q, h, level, p, 1].item() * height - 0.5
        for row in range(height):
            for column in range(width):
                share = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
                pixel = value[b, start + row * width + column, h]
                out[b, q, h] += weights[b, q, h, level, p] * share * pixel
    return out.flatten(2)


def outcome(inputs, shapes, form):
    """Output and the gradients of all three inputs for a fixed, uneven gradient of the output."""
    value, locations, weights = (t.detach().clone().requires_grad_() for t in inputs)
    out = ms_deform_attn(value, shapes, locations, weights, implementation=form)
    slope = torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return out.detach(), *torch.autograd.grad(out, (value, locations, weights), slope)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_official_numbers(form):
    facts, arrays = load(FIXTURE)
    shapes = [tuple(shape) for shape in facts["config"]["spatial_shapes"]]
    out = ms_deform_attn(
        array("msdeform_attn.value", 2, 64, 4, 8).double(),
        shapes,
        torch.from_numpy(arrays["sampling_locations"]).double(),
        torch.from_numpy(arrays["attention_weights"]).double(),
        implementation=form,
    )
    check(FIXTURE, {"core_output": out})


@pytest.mark.parametrize(("name", "ratio"), [("plain", 1.0), ("half", 0.5), ("box", 1.0)])
def test_the_module_with_official_weights_gives_the_official_numbers(name, ratio):
    facts, arrays = load(FIXTURE)
    module = MSDeformAttn(32, num_heads=4, num_levels=3, num_points=4, value_ratio=ratio)
    keys = {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    official = {key for key, _, _ in facts["state_dict"] if key.startswith(f"{name}.")}
    assert keys.keys() == official
    module.load_state_dict({k.removeprefix(f"{name}."): v for k, v in fill(keys).items()})
    module.double()
    query = array("msdeform_attn.q", 2, 11, 32).double()
    features = array("msdeform_attn.f", 2, 64, 32).double()
    reference = torch.from_numpy(arrays[f"{name}.reference_points"]).double()
    shapes = [tuple(shape) for shape in facts["config"]["spatial_shapes"]]
    pad_mask = torch.zeros(2, 64, dtype=torch.bool)
    pad_mask[0, 2] = True
    pad_mask[0, -5:] = True
    with torch.no_grad():
        whole = module(query, reference, features, shapes)
        masked = module(query, reference, features, shapes, pad_mask)
    check(FIXTURE, {f"{name}.output": whole, f"{name}.output_masked": masked})


def test_the_module_starts_as_the_official_one():
    module = MSDeformAttn(32, num_heads=4, num_levels=3, num_points=4)
    check(FIXTURE, {"init.sampling_offsets.bias": module.sampling_offsets.bias})
    for zero in (module.sampling_offsets.weight, *module.attention_weights.parameters()):
        assert not zero.any()
    for part in (module.value_proj, module.output_proj):
        assert not part.bias.any()
        bound = math.sqrt(6 / (32 + 32))  # Xavier's, uniform
        assert 0.9 * bound < part.weight.abs().max() <= bound


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_equation_3(form):
    shapes = [(3, 2), (1, 1), (1, 4)]
    inputs = [t.detach() for t in draw(shapes)]
    torch.testing.assert_close(
        ms_deform_attn(inputs[0], shapes, *inputs[1:], implementation=form),
        by_hand(inputs[0], shapes, *inputs[1:]),
    )


def test_nothing_is_kept_for_the_gradient_beside_the_inputs():
    inputs = draw([(4, 5), (2, 3)])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        ms_deform_attn(inputs[0], [(4, 5), (2, 3)], *inputs[1:], implementation="bag")
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in inputs}


@pytest.mark.parametrize("form", FORMS)
def test_every_gradient_is_the_slope(form):
    shapes = [(3, 2), (1, 1)]
    inputs = draw(shapes, batch=1, queries=2, heads=2, width=2)
    assert torch.autograd.gradcheck(
        lambda value, locations, weights: ms_deform_attn(
            value, shapes, locations, weights, implementation=form
        ),
        inputs,
    )


@pytest.mark.parametrize(
    "queries", [3, 40]
)  # fewer rows of the maps than reads of a query, and more
@pytest.mark.parametrize("alone", range(3))
def test_an_input_that_alone_needs_a_gradient_gets_the_plain_one(alone, queries):
    shapes = [(5, 7), (2, 3)] if queries == 40 else [(1, 2)]
    found = []
    for form in ("bag", "plain"):
        inputs = draw(shapes, batch=2, queries=queries, heads=2, width=4)
        leaves = [x.detach().requires_grad_(i == alone) for i, x in enumerate(inputs)]
        out = ms_deform_attn(leaves[0], shapes, *leaves[1:], implementation=form)
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()  # not the same everywhere
        assert [x.grad is not None for x in leaves] == [i == alone for i in range(3)]
        found.append(leaves[alone].grad)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4),
    batch=st.integers(1, 3),
    queries=st.integers(1, 4),
    heads=st.integers(1, 3),
    width=st.integers(1, 4),
    points=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_all_forms_agree_in_the_output_and_every_gradient(
    shapes, batch, queries, heads, width, points, seed
):
    inputs = draw(shapes, batch, queries, heads, width, points, seed=seed)
    plain = outcome(inputs, shapes, "plain")
    for form in FORMS[1:]:
        torch.testing.assert_close(outcome(inputs, shapes, form), plain)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_rounds_inputs_and_output_alone(form, dtype):
    shapes = [(9, 5), (2, 3)]
    inputs = draw(shapes, points=4, dtype=dtype)
    got = outcome(inputs, shapes, form)
    assert [t.dtype for t in got] == [dtype] * 4
    exact = outcome([t.double() for t in inputs], shapes, "plain")
    eps = torch.finfo(dtype).eps
    # In float32 the place of a point itself is rounded, to eps times the pixels of a side.
    allowed = 16 * eps if dtype == torch.float32 else 2 * eps
    for ours, truth in zip(got, exact, strict=True):
        assert (ours.double() - truth).abs().max() <= allowed * truth.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_locations_of_float32_place_points_in_a_bfloat16_value(form):
    shapes = [(40, 70)]
    value, locations, weights = (t.detach() for t in draw(shapes, dtype=torch.float32))
    value = value.bfloat16()
    out = ms_deform_attn(value, shapes, locations, weights, implementation=form)
    exact = ms_deform_attn(value.double(), shapes, locations.double(), weights.double())
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().max() <= 2**-8 * exact.abs().max()


@pytest.mark.parametrize("form", ["bag", "gather"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_location_that_is_no_place_reads_no_memory_elsewhere(form, bad):
    shapes = [(2, 3), (1, 1)]
    value, locations, weights = (t.detach() for t in draw(shapes, dtype=torch.float32))
    whole = ms_deform_attn(value, shapes, locations, weights, implementation=form)
    locations[0, 1, 0, 0, 0, 0] = bad
    out = ms_deform_attn(value, shapes, locations, weights, implementation=form)
    assert out[0, 1, :3].isnan().all() == (not math.isfinite(bad))  # a NaN is not hidden
    out[0, 1, :3] = whole[0, 1, :3]
    torch.testing.assert_close(out, whole, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_value_that_is_a_view_is_read_as_it_is(form):
    shapes = [(3, 2), (1, 1)]
    value, locations, weights = (t.detach() for t in draw(shapes, heads=2, width=3))
    view = value.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not view.is_contiguous()
    torch.testing.assert_close(
        ms_deform_attn(view, shapes, locations, weights, implementation=form),
        ms_deform_attn(value, shapes, locations, weights, implementation=form),
    )


def test_auto_is_the_bag_on_the_cpu_and_the_gather_under_export(monkeypatch):
    assert automatic(torch.empty(1)) == "bag"
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert automatic(torch.empty(1)) == "gather"


@pytest.mark.parametrize(
    ("device", "dtype", "installed", "form"),
    [
        ("cuda", torch.float32, True, "triton"),
        ("cuda", torch.bfloat16, True, "triton"),
        ("cuda", torch.float16, True, "triton"),
        ("cuda", torch.float64, True, "plain"),
        ("cuda", torch.float32, False, "plain"),
        ("mps", torch.float32, True, "plain"),
    ],
)
def test_auto_takes_kernels_where_they_run(monkeypatch, device, dtype, installed, form):
    class Value:
        pass

    value = Value()
    value.device, value.dtype = torch.device(device), dtype
    monkeypatch.setattr("vitrail.ops.ms_deform_attn.has_triton", lambda: installed)
    assert automatic(value) == form


def test_an_exported_module_has_no_grid_sample_and_the_same_numbers():
    shapes = [(3, 2), (2, 2)]
    module = MSDeformAttn(8, num_heads=2, num_levels=2, num_points=2).eval()
    g = torch.Generator().manual_seed(0)

    def call(batch):
        return (
            torch.randn(batch, 4, 8, generator=g),
            torch.rand(batch, 4, 2, 2, generator=g),
            torch.randn(batch, 10, 8, generator=g),
        )

    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = module

        def forward(self, query, reference, features):
            return self.attn(query, reference, features, shapes)

    batch = torch.export.Dim("batch", min=1, max=9)
    program = torch.export.export(Fixed(), call(2), dynamic_shapes=({0: batch},) * 3)
    names = {str(node.target) for node in program.graph.nodes}
    assert not [n for n in names if "grid_sampl" in n or "embedding_bag" in n]
    other = call(5)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*other), Fixed()(*other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": [(3, 2)]}, r"value of shape \(2, 7, 2, 3\).*expected \(batch, 6, heads, width"),
        ({"locations": torch.zeros(2, 3, 2, 1, 2, 2)}, r"expected \(2, queries, 2, 2, points, 2\)"),
        ({"locations": torch.zeros(2, 3, 2, 2, 2, 3)}, r"locations of shape \(2, 3, 2, 2, 2, 3\)"),
        ({"weights": torch.zeros(2, 3, 2, 2, 1)}, r"weights of shape \(2, 3, 2, 2, 1\) do not fit"),
        ({"implementation": "fast"}, "unknown implementation 'fast'; there are auto, plain, bag"),
    ],
)
def test_what_does_not_fit_is_said(change, message):
    shapes = [(3, 2), (1, 1)]
    value, locations, weights = draw(shapes)
    given = {"value": value, "shapes": shapes, "locations": locations, "weights": weights}
    with pytest.raises(InputError, match=message):
        ms_deform_attn(**(given | change))


def test_kernels_without_triton_are_refused(monkeypatch):
    monkeypatch.setattr("vitrail.ops.ms_deform_attn.has_triton", lambda: False)
    shapes = [(3, 2)]
    value, locations, weights = draw(shapes)
    with pytest.raises(InputError, match="needs Triton; install it or pass 'auto'"):
        ms_deform_attn(value, shapes, locations, weights, implementation="triton")


def test_a_module_that_cannot_be_is_refused():
    with pytest.raises(InputError, match="16 value channels do not divide into 3 heads"):
        MSDeformAttn(32, num_heads=3, num_levels=1, num_points=4, value_ratio=0.5)
    module = MSDeformAttn(4, num_heads=2, num_levels=1, num_points=1)
    with pytest.raises(InputError, match="reference points have 3 numbers"):
        module(torch.zeros(1, 2, 4), torch.zeros(1, 2, 1, 3), torch.zeros(1, 1, 4), [(1, 1)])


def test_triton_is_found_where_it_can_be_imported():
    try:
        import triton  # noqa: F401
    except ImportError:
        assert not has_triton()
    else:
        assert has_triton()


def test_of_eight_heads_the_first_points_lie_on_the_edge_of_a_square():
    """Not on a circle: a head that looks askew steps one cell in both directions."""
    bias = MSDeformAttn(16, 8, 2, 3).sampling_offsets.bias.detach().view(8, 2, 3, 2)
    steps = torch.tensor([1.0, 2.0, 3.0]).expand(8, 2, 3)
    torch.testing.assert_close(bias.abs().amax(-1), steps)
    torch.testing.assert_close(bias[1, 0, 0], torch.tensor([1.0, 1.0]))


def test_a_module_asks_for_the_form_that_it_was_given():
    module = MSDeformAttn(8, 2, 1, 1, implementation="fast")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="fast"):
        module(torch.zeros(1, 2, 8), torch.rand(1, 2, 1, 2), torch.zeros(1, 4, 8), [(2, 2)])
