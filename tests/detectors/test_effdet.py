"""EfficientDet against effdet in float64, with its random weights carried over by the key map."""

import pytest
import torch

from tests.golden.fill import image
from tests.parity import assert_close_to_peer, randomise
from vitrail.detectors.efficientdet import from_effdet
from vitrail.models import create_model, load_dense

effdet = pytest.importorskip("effdet")
pytestmark = pytest.mark.slow  # the import alone takes seconds

K, SIZE = 7, (256, 384)
SWAPPED = [1, 0, 3, 2]  # effdet says y before x
PLAIN = {"same_pad": False, "bias": False}  # effdet's own, beside those of TensorFlow
CASES = [
    ("tf_efficientdet_d0", "efficientdet_d0", {}),
    ("tf_efficientdet_d1", "efficientdet_d1", {}),
    ("tf_efficientdet_d2", "efficientdet_d2", {}),
    ("efficientdet_d0", "efficientdet/efficientnet_b0", PLAIN),
]


def pair(theirs, ours, head, **more):
    config = effdet.get_efficientdet_config(theirs)
    config.num_classes, config.image_size = K, SIZE
    config.update(more)
    peer = effdet.EfficientDet(config, pretrained_backbone=False)
    randomise(peer, 1.38)
    model = create_model(ours, num_classes=K, head=head)
    report = load_dense(model, peer.state_dict(), ours)
    assert not report.new
    assert len(report.used) == len(peer.state_dict())
    return peer.double().eval(), model.double().eval(), config


def objects(number, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(number, 2, generator=generator) * torch.tensor([300.0, 200.0])
    size = 4 + torch.rand(number, 2, generator=generator) ** 2 * 200
    boxes = torch.cat((corner, corner + size), 1).minimum(torch.tensor([384.0, 256, 384, 256]))
    return {"boxes": boxes, "labels": torch.randint(0, K, (number,), generator=generator)}


@pytest.mark.parametrize(("theirs", "ours", "head"), CASES)
def test_outputs_losses_and_answers_equal_effdets(theirs, ours, head):
    peer, model, config = pair(theirs, ours, head)
    x = 10 * image(2, *SIZE).double()
    with torch.no_grad():
        classes, boxes = peer(x)
        logits, deltas = model.said(model.maps(x))
    flat = torch.cat([c.permute(0, 2, 3, 1).reshape(2, -1, K) for c in classes], 1)
    assert_close_to_peer(logits, flat)
    flat = torch.cat([b.permute(0, 2, 3, 1).reshape(2, -1, 4) for b in boxes], 1)
    assert_close_to_peer(deltas, flat[..., SWAPPED])

    # What is said is brought to a size that answers have: exp of the raw numbers overflows.
    spread = 2 / logits.std(), 0.3 / deltas.std()
    classes, boxes = [c * spread[0] - 2 for c in classes], [b * spread[1] for b in boxes]
    logits, deltas = logits * spread[0] - 2, deltas * spread[1]
    model.said = lambda maps: (logits, deltas)
    model.maps = lambda images: []
    check_losses(model, config, classes, boxes, x)
    check_answers(model, config, classes, boxes, x)


def check_losses(model, config, classes, boxes, x):
    from effdet.anchors import AnchorLabeler, Anchors
    from effdet.loss import DetectionLoss

    anchors = Anchors.from_config(config)
    targets = (objects(9, 0), objects(5, 1))
    mine = model.anchors(*SIZE, torch.zeros(1))
    torch.testing.assert_close(mine[:, SWAPPED], anchors.boxes, rtol=0, atol=1e-4)
    labeler = AnchorLabeler(anchors, K, match_threshold=0.5)
    labels, wanted, positives = labeler.batch_label_anchors(
        [t["boxes"][:, SWAPPED] for t in targets], [t["labels"] + 1 for t in targets]
    )
    assert model.weight(targets) == positives.sum() > 50
    for i, t in enumerate(targets):
        matched = model.match(t["boxes"], *SIZE)
        said = torch.where(matched >= 0, t["labels"][matched.clamp(min=0)], -1)
        assert torch.equal(said, torch.cat([level[i].flatten() for level in labels]))
    _, one, other = DetectionLoss(config)(classes, boxes, labels, wanted, positives)
    losses = model.losses(x, targets)
    number = positives.sum() + 1  # its one more
    # Its targets and its losses are in float32.
    assert losses["class"] / number == pytest.approx(one.item(), rel=1e-6)
    assert losses["box"] / number == pytest.approx(50 * other.item(), rel=1e-5)


def check_answers(model, config, classes, boxes, x):
    from effdet.anchors import Anchors, generate_detections
    from effdet.bench import _post_process

    anchors = Anchors.from_config(config).boxes
    said, coded, index, label = _post_process(
        classes,
        boxes,
        num_levels=config.num_levels,
        num_classes=K,
        max_detection_points=config.max_detection_points,
    )
    said_by_us = model.said([])
    model.said = lambda maps: tuple(
        each.float() for each in said_by_us
    )  # effdet answers in float32
    found = model.forward_tensors(x)
    for i in range(2):
        size = torch.tensor([SIZE[1], SIZE[0]], dtype=torch.float32)
        want = generate_detections(
            said[i], coded[i], anchors, index[i], label[i], torch.tensor(1.0), size
        )
        # It answers boxes that lie outside the image and have no area once they are cut.
        want = want[((want[:, 2:4] - want[:, :2]) > 1e-2).all(1)]
        number = len(want)
        assert 50 < number <= found["count"][i] == 100
        torch.testing.assert_close(found["boxes"][i, :number], want[:, :4], rtol=0, atol=1e-2)
        torch.testing.assert_close(found["scores"][i, :number], want[:, 4], rtol=1e-5, atol=0)
        assert torch.equal(found["labels"][i, :number], want[:, 5].long() - 1)


@pytest.mark.parametrize("scale", ["d6", "d7", "d7x"])
def test_every_key_of_the_largest_has_its_place_and_shape(scale):
    with torch.device("meta"):
        config = effdet.get_efficientdet_config(f"tf_efficientdet_{scale}")
        peer = effdet.EfficientDet(config, pretrained_backbone=False)
        model = create_model(f"efficientdet_{scale}", num_classes=90)
    state = from_effdet(peer.state_dict())
    mine = {k: v.shape for k, v in model.state_dict().items() if not k.startswith("backbone.")}
    theirs = {k: v.shape for k, v in state.items() if not k.startswith("backbone.")}
    assert mine == theirs
    own, others = (sum(p.numel() for p in m.parameters()) for m in (model, peer))
    assert own == others
    anchors = effdet.anchors.Anchors.from_config(config).boxes
    got = model.anchors(*config.image_size, torch.zeros(1))
    torch.testing.assert_close(got[:, SWAPPED], anchors, rtol=0, atol=1e-3)
