"""COCO's panoptic form, and how masks that lie over each other become segments."""

import numpy as np
import pytest
import torch
from transformers.image_transforms import id_to_rgb, rgb_to_id
from transformers.models.detr.image_processing_detr import compute_segments

from vitrail_runtime import panoptic
from vitrail_runtime.errors import InputError
from vitrail_runtime.panoptic import colours_of, ids_of, merge, segments_of


def test_ids_and_colours_are_those_of_the_official_code():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, panoptic.LARGEST + 1, (5, 7))
    ids[0, :3] = (0, 255, 256**3 - 1)
    colours = colours_of(ids)
    assert colours.dtype == np.uint8
    assert np.array_equal(colours, id_to_rgb(ids))
    assert np.array_equal(ids_of(colours), rgb_to_id(colours))
    assert np.array_equal(ids_of(colours), ids)


@pytest.mark.parametrize("wrong", [-1, 256**3])
def test_an_id_that_no_colour_can_be_is_refused(wrong):
    with pytest.raises(InputError, match="ids of segments are 0 to 16,777,215, but here are"):
        colours_of(np.array([[3, wrong]]))


IDS = np.array([[0, 7, 7, 7], [0, 7, 300, 300], [0, 0, 300, 0]])


def test_the_list_of_an_image_has_areas_and_boxes():
    assert segments_of(IDS, {7: 2, 300: 5}) == [
        {"id": 7, "category_id": 2, "area": 4, "bbox": [1, 0, 3, 2], "iscrowd": 0},
        {"id": 300, "category_id": 5, "area": 3, "bbox": [2, 1, 2, 2], "iscrowd": 0},
    ]


@pytest.mark.parametrize("seed", range(4))
def test_segments_are_those_of_transformers(seed):
    """Of things alone: theirs counts on from the id of stuff that it meets again, and gives ids twice."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(9, 3, 4, generator=generator) * 3
    masks = torch.nn.functional.interpolate(coarse[None], (18, 24), mode="bicubic")[0].sigmoid()
    scores = torch.rand(9, generator=generator) * 0.5 + 0.5
    labels = torch.randint(0, 4, (9,), generator=generator)
    kept = scores > 0.6
    how = {"mask_threshold": 0.4, "overlap_mask_area_threshold": 0.3, "label_ids_to_fuse": set()}
    want, told = compute_segments(masks[kept].clone(), scores[kept], labels[kept], **how)
    given = masks.numpy(), scores.numpy(), labels.numpy()
    ids, found, said = merge((18, 24), *given, (), sure=0.6, own=0.3, on=0.4)
    assert np.array_equal(ids, want.numpy())
    assert found == [segment["label_id"] for segment in told]
    assert said == pytest.approx([segment["score"] for segment in told], abs=1e-6)
    assert len(set(found)) > 1


def test_segments_of_one_class_of_stuff_are_one():
    masks = np.zeros((4, 2, 4))
    masks[range(4), :, range(4)] = 0.9
    given = masks, np.array([0.9, 0.95, 0.99, 0.91]), np.array([2, 1, 2, 1])
    ids, found, said = merge((2, 4), *given, {2})
    assert ids[0].tolist() == [1, 2, 1, 3]
    assert (found, said) == ([2, 1, 1], [0.9, 0.95, 0.91])


def test_a_query_that_others_cover_leaves_nothing():
    masks = np.zeros((3, 4, 5))
    masks[0, :, :4], masks[1, :, :3], masks[2, :, 4] = 0.9, 1.0, 0.9
    scores, labels = np.array([0.9, 0.95, 0.8]), np.array([1, 2, 1])
    ids, found, said = merge((4, 5), masks, scores, labels, ())
    assert (found, said) == ([2], [0.95])  # the first keeps a quarter, the last is not sure
    assert (ids[:, :3] == 1).all()
    assert not ids[:, 3:].any()
    assert (panoptic.SURE, panoptic.OWN, panoptic.ON) == (0.85, 0.8, 0.5)


def test_without_a_sure_query_there_is_no_segment():
    ids, found, said = merge(
        (3, 4), np.ones((2, 3, 4)), np.array([0.85, 0.1]), np.array([0, 1]), ()
    )
    assert (ids.shape, ids.any(), found, said) == ((3, 4), False, [], [])
