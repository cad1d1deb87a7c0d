"""Models of two towers: what is learnt from pairs, and what is said of images by names alone."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import vitrail
from vitrail import packing
from vitrail.models import HEADS, create_model, list_models, load, save
from vitrail.registry import backbone_entry
from vitrail.towers import TowersConfig, zero_shot
from vitrail_runtime.errors import InputError

VIT = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8}
HEAD = {
    "dim": 12,
    "text_dim": 16,
    "text_depth": 1,
    "text_heads": 2,
    "context": 10,
    "vocab_size": 540,
    "templates": ("a {}", "the {} here"),
}
CAPTIONS = ["a red seven", "two dots", "\N{GREEK SMALL LETTER PI} is round", "a red seven"]


def towers(head="clip", backbone="vit_tiny_patch16", classes=("seven", "dot"), **fields):
    torch.manual_seed(0)
    extra = VIT if backbone == "vit_tiny_patch16" else {}
    head = f"{head}/{backbone}"
    model = create_model(head, classes=classes, head=HEAD | fields, image_size=32, **extra)
    return model.double()


def images(count=4, size=(32, 32)):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1)).double()


def as_bytes(captions):
    return tuple(torch.from_numpy(np.frombuffer(c.encode(), np.uint8).copy()) for c in captions)


def test_embeddings_have_length_one_and_are_those_of_the_papers_tail():
    model = towers()
    got = model.eval()(images())
    assert got.shape == (4, 12)
    want = model.head(model.backbone(images()))
    assert want.abs().max() > 0.01  # of a ViT's tail that starts at zero
    torch.testing.assert_close(got, F.normalize(want, dim=1))
    assert torch.equal(model.forward_tensors(images())["embeddings"], got)
    texts = model.embed(CAPTIONS)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(4).double())
    torch.testing.assert_close(texts[0], texts[3])
    # 16 bits are too few for what has a length of one.
    assert model.bfloat16()(images().bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("head", ["clip", "siglip"])
def test_losses_are_the_papers_over_all_pairs_of_the_batch(head):
    model = towers(head).eval()
    with torch.no_grad():
        model.pairs.log_scale.fill_(math.log(20.0))
    losses = model.losses(images(), as_bytes(CAPTIONS))
    assert list(losses) == ["contrast"]
    a, b = model(images()), model.embed(CAPTIONS)
    logits = 20 * a @ b.T
    own = torch.arange(4)
    assert a.dtype == b.dtype == torch.float64
    if head == "clip":
        want = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    else:
        z = 2 * torch.eye(4).double() - 1
        want = -F.logsigmoid(z * (logits - 10)).sum() / 4
    torch.testing.assert_close(losses["contrast"] / 4, want)
    assert float(model.weight(as_bytes(CAPTIONS))) == 4


def test_captions_of_equal_length_may_come_as_one_tensor():
    model = towers().eval()
    captions = ["abc", "xyz"]
    one = model.losses(images(2), torch.stack(as_bytes(captions)))
    two = model.losses(images(2), as_bytes(captions))
    assert torch.equal(one["contrast"], two["contrast"])


@pytest.mark.parametrize("head", ["clip", "siglip"])
def test_every_parameter_receives_a_finite_gradient(head):
    model = towers(head).train()
    model.losses(images(), as_bytes(CAPTIONS))["contrast"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_scales_and_bias_start_as_in_the_papers():
    clip, siglip = towers("clip").pairs, towers("siglip").pairs
    assert clip.bias is None
    assert clip.scale.item() == pytest.approx(1 / 0.07)
    assert siglip.scale.item() == pytest.approx(10)
    assert siglip.bias is not None
    assert siglip.bias.item() == -10


def test_training_holds_the_scale_at_100_and_measuring_leaves_it():
    model = towers().train()
    with torch.no_grad():
        model.pairs.log_scale.fill_(math.log(300))
    model.eval().losses(images(), as_bytes(CAPTIONS))
    assert model.pairs.scale.item() == pytest.approx(300)
    model.train().losses(images(), as_bytes(CAPTIONS))
    assert model.pairs.scale.item() == pytest.approx(100)
    with torch.no_grad():
        model.pairs.log_scale.fill_(math.log(50))
    model.losses(images(), as_bytes(CAPTIONS))
    assert model.pairs.scale.item() == pytest.approx(50)


def test_a_classifier_by_names_is_the_mean_of_the_templates_times_the_scale():
    model = towers().eval()
    classifier = zero_shot(model, ["cat", "old dog", "7"])
    assert classifier.classes == ("cat", "old dog", "7")
    assert classifier.preprocessing == model.preprocessing
    assert classifier.task == "classify"
    with torch.no_grad():
        rows = []
        for name in ("cat", "old dog", "7"):
            both = model.embed([f"a {name}", f"the {name} here"]).sum(0)
            rows.append(both / both.norm())
        want = model(images()) @ torch.stack(rows).T / 0.07
        got = classifier(images())
    torch.testing.assert_close(got, want.to(got), rtol=1e-5, atol=1e-5)
    own = zero_shot(model)
    assert own.classes == ("seven", "dot")
    other = zero_shot(model, templates=["{}"])
    with torch.no_grad():
        want = model(images()) @ model.embed(["seven", "dot"]).T / 0.07
        torch.testing.assert_close(other(images()), want.to(got), rtol=1e-5, atol=1e-5)


def test_texts_are_embedded_part_by_part(monkeypatch):
    model = towers().eval()
    want = model.embed(CAPTIONS)
    monkeypatch.setattr("vitrail.towers.AT_ONCE", 3)
    torch.testing.assert_close(model.embed(CAPTIONS), want)


def test_asking_by_names_leaves_the_mode_and_drops_nothing():
    model = towers().train()
    classifier = zero_shot(model)
    assert all(module.training for module in model.modules())
    assert classifier.training
    assert not zero_shot(model.eval()).training


def test_the_predictor_takes_the_classifier_by_names():
    model = towers().float()
    image = Image.fromarray(np.full((40, 30, 3), 90, np.uint8))
    (said,) = vitrail.Predictor(vitrail.zero_shot(model, ["a", "b", "c"]), device=None)([image])
    assert sorted(said.names) == ["a", "b", "c"]
    with pytest.raises(InputError, match=r"vitrail.zero_shot\(model, \['cat', 'dog'\]\)"):
        list(vitrail.Predictor(model, device=None)([image]))


def test_no_name_or_one_twice_is_refused():
    model = towers(classes=None)
    assert model.classes == ()
    with pytest.raises(InputError, match=r"none are given .* zero_shot\(model, \['cat', 'dog'\]\)"):
        zero_shot(model)
    with pytest.raises(InputError, match="must differ, but are cat, cat"):
        zero_shot(model, ["cat", "cat"])


@pytest.mark.parametrize("classes", [None, ("seven", "dot")])
@pytest.mark.parametrize("head", ["clip", "siglip"])
def test_a_saved_model_says_the_same_and_knows_its_words(classes, head, tmp_path):
    model = towers(head, classes=classes).float().eval()
    model.merges = [(83, 71), (512, 68)]
    save(model, tmp_path / "m")
    again = load(tmp_path / "m")
    assert again.classes == (classes or ())
    assert again.merges == [[83, 71], [512, 68]]
    assert again.config == model.config
    assert torch.equal(again(images().float()), model(images().float()))
    assert torch.equal(again.embed(CAPTIONS), model.embed(CAPTIONS))
    assert torch.equal(again.pairs.log_scale, model.pairs.log_scale)


def test_a_vocabulary_that_came_with_the_weights_stays():
    model = towers()
    model.merges = [(83, 71)]
    model.merges = [(1, 2), (3, 4)]
    assert model.merges == [[83, 71]]


def test_packed_images_have_the_embeddings_of_each_alone():
    model = towers().eval()
    several = [images(1, size)[0] for size in ((32, 24), (16, 40), (8, 8))]
    (pack,) = packing.pack(several, patch_size=8, max_tokens=60)
    got = model.forward_packed(pack)
    want = torch.cat([model(several[i][None]) for i in pack.image_ids])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    patches = torch.cat([packing.to_patches(image, 8) for image in several])
    layout = {"sizes": [tuple(i.shape[1:]) for i in several], "patch_size": 8, "packs": (3,)}
    texts = as_bytes(CAPTIONS[:3])
    losses = model.losses(patches, texts, packing=layout)
    logits = model.pairs.scale * want @ model.embed(CAPTIONS[:3]).T
    own = torch.arange(3)
    both = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) * 3 / 2
    torch.testing.assert_close(losses["contrast"], both)


@pytest.mark.parametrize("backbone", ["mobilenetv3_small", "deit_tiny_distilled_patch16"])
def test_any_backbone_is_an_image_tower_with_the_tail_of_its_paper(backbone):
    with torch.device("meta"):
        model = create_model(f"siglip/{backbone}", head=HEAD)
        assert model(torch.empty(2, 3, 64, 96)).shape == (2, 12)
        own = create_model(backbone, num_classes=12)
    assert {k: v.shape for k, v in model.head.state_dict().items()} == {
        k: v.shape for k, v in own.head.state_dict().items()
    }
    assert model.preprocessing == backbone_entry(backbone).preprocessing


def test_tails_are_drawn_at_the_scale_of_their_width():
    torch.manual_seed(0)
    model = create_model("clip/vit_tiny_patch16", head=HEAD | {"dim": 400}, depth=1)
    assert model.head.fc.weight.std().item() == pytest.approx(192**-0.5, rel=0.03)


def test_names_are_listed_by_task():
    names = list_models("clip/*", task="contrast")
    assert "clip/resnet50" in names
    assert {n for n, head in HEADS.items() if head.embeds} == {"clip", "siglip"}
    assert not list_models("clip/*", task="segment")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"templates": ("a photo",)}, r"one \{\} for the name of a class, but got \['a photo'\]"),
        ({"templates": ("{} {}",)}, r"but got \['\{\} \{\}'\]"),
        ({"templates": ()}, "but got none"),
        ({"scale": 0.0}, "scale must be above 0, but is 0.0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        TowersConfig(**fields)
