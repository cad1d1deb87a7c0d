"""Run lengths against faster-coco-eval's compiled encoder."""

import numpy as np
import pytest
from faster_coco_eval import mask as theirs

from vitrail_runtime.errors import InputError
from vitrail_runtime.rle import decode_mask, encode_mask, encode_part


def compiled(mask):
    return theirs.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 1), (5, 8), (90, 70)], ids=str)
def test_masks_are_written_and_read_as_the_compiled_library_does(size, share):
    for seed in range(5):
        mask = np.random.default_rng(seed).random(size) < share
        rle = encode_mask(mask)
        assert rle == {"size": list(size), "counts": compiled(mask)}
        assert (decode_mask(rle) == mask).all()
        assert (decode_mask(rle | {"counts": rle["counts"].encode()}) == mask).all()


def test_long_runs_and_differences_of_either_sign_are_written_in_full():
    mask = np.zeros((300, 400), bool)
    mask[7:290, 20:300] = True
    mask[:, 120:122] = True  # a run over the ends of columns
    mask[40:44] = False
    assert encode_mask(mask)["counts"] == compiled(mask)
    assert (decode_mask(encode_mask(mask)) == mask).all()


@pytest.mark.parametrize("corner", [(0, 0), (3, 2), (5, 6), (0, 6), (5, 0)], ids=str)
def test_a_part_is_encoded_where_it_lies(corner):
    part = np.random.default_rng(0).random((4, 3)) < 0.7
    mask = np.zeros((9, 9), bool)
    mask[corner[0] : corner[0] + 4, corner[1] : corner[1] + 3] = part
    assert encode_part(part, corner, (9, 9)) == encode_mask(mask)


def test_runs_may_stand_as_a_list_of_lengths():
    want = np.array([[0, 1], [1, 1], [0, 0]], bool)
    assert (decode_mask({"size": [3, 2], "counts": [1, 1, 1, 2, 1]}) == want).all()


@pytest.mark.parametrize("counts", [[1, 2], [5, 5], [], [-1, 7]], ids=str)
def test_runs_that_do_not_fill_the_image_are_refused(counts):
    with pytest.raises(InputError, match=r"runs of a mask cover \d+ pixels, but its size is 3 x 2"):
        decode_mask({"size": [3, 2], "counts": counts})
