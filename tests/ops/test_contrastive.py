"""The contrastive losses: against formulas written out, and the chunked form against the plain one."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from tests.ops.contrastive_cases import F64, found, loss_of, of_rank, pairs
from tests.train.children import CONTEXT
from vitrail.ops.contrastive import sigmoid_pairs, softmax_pairs
from vitrail_runtime.errors import InputError

FORMS = pytest.mark.parametrize("form", ["softmax", "sigmoid"])
IMPLEMENTATIONS = pytest.mark.parametrize("how", ["plain", "chunked"])


def close(got, want, tolerance=1e-12):
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


@IMPLEMENTATIONS
def test_the_softmax_loss_is_that_of_transformers_clip_summed_over_the_pairs(how):
    images, texts, scale, _ = pairs()
    want = len(images) * image_text_contrastive_loss(scale * texts @ images.T)
    close(softmax_pairs(images, texts, scale, implementation=how), want)


@IMPLEMENTATIONS
def test_the_sigmoid_loss_is_equation_1_summed_over_all_combinations(how):
    images, texts, scale, bias = (x.detach() for x in pairs())
    want = 0.0
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            z = 1 if i == j else -1
            logit = scale.item() * float(image @ text) + bias.item()
            want += math.log(1 + math.exp(z * -logit))
    assert float(sigmoid_pairs(images, texts, scale, bias, implementation=how)) == pytest.approx(
        want, rel=1e-12
    )


@FORMS
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_the_chunked_form_has_the_value_and_the_gradients_of_the_plain_one(form, chunk):
    got = found(form, pairs(), factor=0.7, chunk=chunk)
    want = found(form, pairs(), factor=0.7, implementation="plain")
    for mine, other in zip(got, want, strict=True):
        close(mine, other)


@FORMS
def test_the_chunked_form_is_what_is_used_unless_told(form, monkeypatch):
    loss = loss_of(form, pairs())
    assert type(loss.grad_fn).__name__ == "_ChunkedBackward"


@pytest.mark.parametrize("first", [3, 5])
def test_two_processes_with_a_part_of_the_pairs_each_have_the_gradient_of_all(first, tmp_path):
    how = str(tmp_path / "store"), str(tmp_path / "out")
    children = [CONTEXT.Process(target=of_rank, args=(rank, first, *how)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    (one, *alone), (two, *also_alone) = (torch.load(f"{how[1]}-{rank}") for rank in range(2))
    for part, answers in ((slice(first), *alone), (slice(first, None), *also_alone)):
        for (form, implementation), said in answers.items():
            mine = [x if x.dim() == 1 else x[part] for x in pairs()]
            mine = [x.detach().requires_grad_() for x in mine]
            want = found(form, mine, factor=3.0, implementation=implementation)
            for got, expected in zip(said, want, strict=True):
                close(got, expected)
    for form, implementation in one:
        want = found(form, pairs(), factor=3.0, implementation="plain")
        first_said, second_said = one[form, implementation], two[form, implementation]
        shares = zip(first_said, second_said, want, strict=True)
        for place, (mine, other, whole) in enumerate(shares):
            # Embeddings each have their own gradient; loss, scale and bias are added up.
            both = torch.cat((mine, other)) if place in (1, 2) else mine + other
            close(both, whole)


@FORMS
def test_no_tensor_of_the_chunked_form_has_more_than_a_strip_of_the_matrix(form):
    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.largest = max(self.largest, out.numel())
            return out

    given = pairs(number=64, dim=3)
    with Sizes() as seen:
        found(form, given, chunk=5)
    assert seen.largest == 5 * 64


@FORMS
def test_large_similarities_overflow_in_neither_form(form):
    images, texts, _, bias = pairs(dtype=torch.float32)
    scale = torch.tensor(1e4)
    for how in ("plain", "chunked"):
        loss = loss_of(form, (images, texts, scale, bias), implementation=how)
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (images, texts)))


@FORMS
@IMPLEMENTATIONS
def test_16_bit_embeddings_are_compared_in_float32(form, how):
    given = [x.detach() for x in pairs(number=40, dtype=torch.bfloat16)]
    want = loss_of(form, [x.float() for x in given], implementation="plain")
    got = loss_of(form, given, implementation=how)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@FORMS
@IMPLEMENTATIONS
def test_autocast_does_not_round_the_similarities(form, how):
    given = pairs(number=40, dtype=torch.float32)
    want = found(form, given, implementation=how)
    got = found(form, given, implementation=how, autocast=True)
    for mine, other in zip(got, want, strict=True):
        close(mine, other, 0)


@FORMS
def test_without_gradients_the_value_alone_is_computed(form):
    given = pairs()
    want = loss_of(form, given)
    with torch.no_grad():
        got = loss_of(form, given)
    close(got, want.detach())
    assert not got.requires_grad


@FORMS
def test_the_gradient_reaches_one_tower_where_the_other_is_frozen(form):
    images, texts, scale, bias = pairs()
    want = found(form, (images, texts, scale, bias))[2]
    loss = loss_of(form, (images.detach(), texts, scale.detach(), bias.detach()))
    close(torch.autograd.grad(loss, texts)[0], want)


@pytest.mark.parametrize(
    ("images", "texts"), [((3, 4), (2, 4)), ((3, 4), (3, 5)), ((4,), (4,)), ((1, 3, 4), (1, 3, 4))]
)
def test_what_are_no_pairs_is_refused(images, texts):
    with pytest.raises(ValueError, match=r"are no pairs; give both as \(N, D\)"):
        softmax_pairs(torch.zeros(images), torch.zeros(texts), torch.ones(()))
    with pytest.raises(ValueError, match="are no pairs"):
        sigmoid_pairs(torch.zeros(images), torch.zeros(texts), torch.ones(()), torch.ones(()))


@FORMS
def test_an_unknown_implementation_is_named(form):
    with pytest.raises(InputError, match="'naive'; there are chunked, plain"):
        loss_of(form, pairs(), implementation="naive")


def test_one_pair_has_no_softmax_loss():
    images, texts, scale, _ = pairs(number=1)
    assert float(softmax_pairs(images, texts, scale).detach()) == pytest.approx(0.0, abs=1e-12)


def test_leaves_keep_the_dtype_of_float64():
    assert softmax_pairs(*pairs()[:3]).dtype == F64
