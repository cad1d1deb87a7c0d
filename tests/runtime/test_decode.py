"""From a file in any form to upright 8-bit RGB, or one message that names the file."""

import contextlib
import io
import os
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from vitrail_runtime.decoding import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    MAX_PIXELS_VARIABLE,
    decode,
    name_of,
    pixel_limit,
    read_size,
)
from vitrail_runtime.errors import ImageError, InputError


def gradient(height, width):
    """A smooth picture with a dark red top left corner: survives JPEG, and shows how it is turned."""
    y, x = np.mgrid[0:height, 0:width]
    red = 255 * y / max(1, height - 1)
    green = 255 * x / max(1, width - 1)
    return np.stack([red, green, np.full_like(red, 60)], axis=2).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_every_exif_orientation_comes_out_upright(tmp_path, orientation, suffix):
    upright = gradient(40, 64)
    stored = {  # what a camera stores, so that the tag undoes it
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    options = {"jpg": {"quality": 98, "subsampling": 0}, "webp": {"lossless": True}}
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **options.get(suffix, {}))
    seen = decode(path)
    assert read_size(path) == seen.shape[:2] == (40, 64)
    assert np.abs(seen.astype(int) - upright).max() <= (6 if suffix == "jpg" else 0)
    again = decode(path, at_least=(20, 32))
    assert again.shape == ((20, 32, 3) if suffix == "jpg" else (40, 64, 3))
    assert again[0, 0].sum() < 130 < again[-1, -1].sum()


def test_exif_behind_the_pixels_of_a_png_counts_too(tmp_path):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gradient(40, 64)).save(buffer, "png", exif=exif)
    data = buffer.getvalue()
    start = data.index(b"eXIf") - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    end = data.index(b"IEND") - 4
    path = tmp_path / "late.png"
    path.write_bytes(data[:start] + data[start + len(chunk) : end] + chunk + data[end:])
    assert read_size(path) == decode(path).shape[:2] == (64, 40)


@pytest.mark.filterwarnings("ignore::UserWarning")  # pytest resets the filters of the import
def test_a_damaged_exif_block_does_not_cost_the_picture(tmp_path):
    path = tmp_path / "odd.jpg"
    Image.fromarray(gradient(16, 24)).save(path, exif=b"Exif\0\0II*\0" + b"\xff" * 40)
    assert decode(path).shape == (16, 24, 3)


@pytest.mark.parametrize(
    "at_least", [(1, 1), (99, 100), (100, 100), (130, 90), (500, 700), (900, 900)]
)
def test_a_scaled_jpeg_is_never_smaller_than_needed_nor_twice_as_large_as_it_could_be(
    tmp_path, at_least
):
    path = tmp_path / "large.jpg"
    Image.fromarray(gradient(500, 703)).save(path, quality=95)
    height, width, _ = decode(path, at_least=at_least).shape
    assert height >= min(at_least[0], 500)
    assert width >= min(at_least[1], 703)
    assert (height, width) in [(63, 88), (125, 176), (250, 352), (500, 703)]
    halved = -(-height // 2) < at_least[0] or -(-width // 2) < at_least[1]
    assert halved or height == 63
    assert read_size(path) == (500, 703)


def test_sources_of_every_kind_give_the_same_picture(tmp_path):
    image = gradient(20, 30)
    path = tmp_path / "Bild \u00e4\u4e2d\U0001f984.png"
    Image.fromarray(image).save(path)
    for source in (
        path,
        str(path),
        path.read_bytes(),
        Image.open(path),
        Image.fromarray(image),
        image,
    ):
        seen = decode(source)
        np.testing.assert_array_equal(seen, image)
        assert (seen.dtype, read_size(source)) == (np.uint8, (20, 30))
    assert seen.flags.c_contiguous


def test_a_file_opened_by_the_caller_is_not_reduced_behind_her_back(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(gradient(64, 80)).save(path)
    with Image.open(path) as image:
        assert decode(image, at_least=(8, 8)).shape == (64, 80, 3)
        assert image.size == (80, 64)


# ---- odd kinds of pixels, each with a defined result


def saved(tmp_path, image, suffix, **options):
    path = tmp_path / f"odd.{suffix}"
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257, 300], [32768, 65278, 65535]], dtype=np.uint16)
    seen = decode(saved(tmp_path, Image.fromarray(values), suffix))
    np.testing.assert_array_equal(seen[:, :, 0], [[0, 1, 1], [128, 254, 255]])
    assert (seen[:, :, 0] == seen[:, :, 2]).all()


def test_32_bit_integers_count_as_16_bit_ones_and_more_is_refused(tmp_path):
    image = Image.fromarray(np.array([[0, 65535]], dtype=np.int32))
    np.testing.assert_array_equal(decode(saved(tmp_path, image, "tif"))[0, :, 0], [0, 255])
    image = Image.fromarray(np.array([[-1, 70000]], dtype=np.int32))
    with pytest.raises(InputError, match=r"odd.tif holds integers from -1 to 70000.*0 to 65535"):
        decode(saved(tmp_path, image, "tif"))


def test_floats_in_0_to_1_are_scaled_and_others_are_refused(tmp_path):
    image = Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32))
    np.testing.assert_array_equal(decode(saved(tmp_path, image, "tif"))[0, :, 1], [0, 128, 255])
    for bad in (3.5, np.nan):
        image = Image.fromarray(np.array([[0, bad]], dtype=np.float32))
        with pytest.raises(InputError, match=r"odd.tif holds floats .*\[0, 1\] is expected"):
            decode(saved(tmp_path, image, "tif"))


def test_1_bit_and_8_bit_grey_become_three_equal_channels(tmp_path):
    bits = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("1")
    for suffix in ("png", "tif", "pbm"):
        seen = decode(saved(tmp_path, bits, suffix))
        np.testing.assert_array_equal(seen, np.array([[0, 255], [255, 0]])[:, :, None].repeat(3, 2))
    grey = Image.fromarray(np.array([[3, 200]], dtype=np.uint8))
    np.testing.assert_array_equal(decode(saved(tmp_path, grey, "png")), [[[3] * 3, [200] * 3]])


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_transparency_is_laid_over_white(tmp_path, suffix):
    rgba = np.array([[[255, 0, 0, 255], [9, 9, 9, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    seen = decode(saved(tmp_path, Image.fromarray(rgba), suffix, **options))
    np.testing.assert_array_equal(seen, [[[255, 0, 0], [255, 255, 255], [127, 127, 127]]])
    np.testing.assert_array_equal(decode(rgba), seen)


def test_opaque_alpha_changes_nothing_against_dropping_it(tmp_path):
    image = Image.fromarray(gradient(9, 7))
    path = saved(tmp_path, image.convert("RGBA"), "png")
    np.testing.assert_array_equal(decode(path), np.asarray(Image.open(path).convert("RGB")))


def test_grey_with_alpha_and_a_transparent_colour_are_laid_over_white(tmp_path):
    la = Image.fromarray(np.array([[[10, 255], [10, 0]]], dtype=np.uint8), "LA")
    np.testing.assert_array_equal(decode(saved(tmp_path, la, "png"))[0, :, 0], [10, 255])
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    path = saved(tmp_path, rgb, "png", transparency=(1, 2, 3))
    np.testing.assert_array_equal(decode(path), [[[255] * 3, [4, 5, 6]]])


@pytest.mark.parametrize("transparency", [None, 1, b"\xff\x00\xff"])
def test_palettes_become_their_colours_and_transparent_entries_white(tmp_path, transparency):
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    options = {} if transparency is None else {"transparency": transparency}
    middle = [40, 50, 60] if transparency is None else [255, 255, 255]
    seen = decode(saved(tmp_path, image, "png", **options))
    np.testing.assert_array_equal(seen, [[[10, 20, 30], middle, [70, 80, 90]]])


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_becomes_rgb_and_adobes_inverted_ink_is_understood(tmp_path, suffix):
    # Pillow writes CMYK JPEGs inverted with Adobe's marker, as Photoshop does.
    ink = np.zeros((32, 32, 4), np.uint8)
    ink[:, :, 1] = ink[:, :, 2] = 255  # magenta + yellow = red
    options = {"quality": 95} if suffix == "jpg" else {}
    path = saved(tmp_path, Image.fromarray(ink, "CMYK"), suffix, **options)
    seen = decode(path, at_least=(16, 16))
    assert seen.shape == ((16, 16, 3) if suffix == "jpg" else (32, 32, 3))
    assert np.abs(seen.astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_an_animation_the_first_frame_counts(tmp_path, suffix):
    first = Image.new("RGB", (12, 8), (250, 0, 0))
    rest = [Image.new("RGB", (12, 8), c) for c in [(0, 250, 0), (0, 0, 250)]]
    options = {"lossless": True} if suffix == "webp" else {}
    path = saved(tmp_path, first, suffix, save_all=True, append_images=rest, **options)
    assert Image.open(path).n_frames == 3
    seen = decode(path)
    assert seen.shape == (8, 12, 3)
    assert (seen == (250, 0, 0)).all()


def test_icc_profiles_are_ignored(tmp_path):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    path = saved(tmp_path, Image.fromarray(gradient(4, 5)), "png", icc_profile=profile)
    np.testing.assert_array_equal(decode(path), gradient(4, 5))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1)])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_thin_and_tiny_pictures_are_pictures(tmp_path, shape, suffix):
    path = saved(tmp_path, Image.fromarray(gradient(*shape)), suffix)
    assert decode(path, at_least=(256, 256)).shape == (*shape, 3)


def test_arrays_of_grey_and_rgb_are_taken_and_others_are_refused():
    assert decode(np.zeros((4, 5), np.uint8)).shape == (4, 5, 3)
    assert decode(np.zeros((4, 5, 1), np.uint8)).shape == (4, 5, 3)
    assert decode(np.zeros((8, 10, 3), np.uint8)[::2, ::2]).flags.c_contiguous
    for bad in (
        np.zeros((4, 5, 3)),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
    ):
        with pytest.raises(InputError, match=r"^<ndarray> must be a uint8 array"):
            decode(bad)


# ---- what cannot be read: one message that names the file


def test_a_file_that_is_not_there_a_folder_and_an_empty_file_say_so(tmp_path):
    (tmp_path / "empty.jpg").touch()
    for name, message in [
        ("no.jpg", "no such file"),
        ("", "is a folder"),
        ("empty.jpg", "is empty"),
    ]:
        for read in (decode, read_size):
            with pytest.raises(InputError, match=message) as error:
                read(tmp_path / name)
            assert str(tmp_path / name) in str(error.value)
    with pytest.raises(InputError, match="0 bytes"):
        decode(b"")
    with pytest.raises(InputError, match=r"^shard.tar:a.jpg is not a picture"):
        decode(b"text", name="shard.tar:a.jpg")
    with pytest.raises(InputError, match="got int"):
        decode(3)


def test_what_is_wrong_with_an_image_stands_apart_from_its_name_also_out_of_another_process(
    tmp_path,
):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    for source, name in (
        (tmp_path / "no: is empty.jpg", str(tmp_path / "no: is empty.jpg")),
        (tmp_path / "cut.png", str(tmp_path / "cut.png")),
        (b"text", "<4 bytes>"),
        (np.zeros(3), "<ndarray>"),
        (Image.new("CMYK", (20, 30)), "<Image>"),
    ):
        for given in (None, "mine is mine"):
            with pytest.raises(ImageError) as raised:
                decode(source, name=given, max_pixels=500)
            error = raised.value
            assert error.name == (given or name)
            assert str(error) == f"{error.name} {error.problem}"
            assert error.problem.split()[0] in ("is", "must", "cannot")
            again = pickle.loads(pickle.dumps(error))
            assert (type(again), again.name, again.problem, str(again)) == (
                ImageError,
                error.name,
                error.problem,
                str(error),
            )


def test_a_text_file_called_jpg_and_an_eps_are_not_pictures(tmp_path):
    # EPS would start Ghostscript: it is not even tried.
    for text in (
        b"hello, I am text",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n%%EndComments\n",
    ):
        path = tmp_path / "text.jpg"
        path.write_bytes(text)
        with pytest.raises(
            InputError, match=r"text.jpg is not a picture in a format that is read here"
        ):
            decode(path)


@pytest.mark.parametrize(
    "suffix", ["jpg", "png", "gif", "webp", "bmp", "tif", "ppm", "avif", "jp2"]
)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_file_is_an_error_and_not_a_half_grey_picture(tmp_path, suffix, share):
    path = tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    assert decode(path).shape == (64, 80, 3)
    path.write_bytes(data[: int(len(data) * share)])
    for at_least in (None, (16, 16)):
        with pytest.raises(InputError, match=rf"cut.{suffix} is "):
            decode(path, at_least=at_least)


@pytest.mark.filterwarnings("ignore::UserWarning")  # pytest resets the filters of the import
def test_damage_anywhere_is_an_input_error_or_a_picture_and_nothing_else(tmp_path):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    for suffix in ("jpg", "png", "gif", "webp", "tif", "bmp", "ppm", "tga"):
        path = saved(tmp_path, image, suffix)
        data = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(60):
            broken = data.copy()
            at = rng.integers(0, min(len(data), 200), 4)
            broken[at] = rng.integers(0, 256, 4)
            for read in (decode, read_size):
                with contextlib.suppress(InputError):
                    assert read(broken.tobytes()) is not None


def bomb(width, height):
    """A PNG of a few hundred bytes that claims any size."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_a_decompression_bomb_is_refused_with_its_size_and_the_way_out(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(20000, 10000))
    for read in (decode, read_size):
        with pytest.raises(InputError, match=rf"bomb.png is too large.*{MAX_PIXELS_VARIABLE}"):
            read(path)
    # Raised, the file is opened (and is broken, as it says).
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "3e8")
    assert read_size(path) == (10000, 20000)
    assert Image.MAX_IMAGE_PIXELS == 89478485
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "many")
    with pytest.raises(InputError, match="must be a number of pixels"):
        read_size(path)


def test_the_limit_of_pixels_can_be_lowered(tmp_path):
    path = saved(tmp_path, Image.fromarray(gradient(30, 40)), "jpg")
    assert decode(path, max_pixels=1200).shape == (30, 40, 3)
    with pytest.raises(InputError, match=r"30 x 40 is 0.0 megapixels|too large"):
        decode(path, max_pixels=1199)


def test_pillow_never_speaks(tmp_path):
    """Large, transparent and damaged files raise warnings inside Pillow; a person sees none of them."""
    large = tmp_path / "large.png"
    large.write_bytes(bomb(10000, 10000))  # between Pillow's warning and its error
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "palette.png", transparency=b"\xff\x00")
    Image.fromarray(gradient(9, 9)).save(tmp_path / "cut.tif")
    data = (tmp_path / "cut.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(data[: len(data) - 20])
    code = (
        "import sys, pathlib\n"
        "from vitrail_runtime import decode, read_size, InputError\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    for read in (read_size, decode):\n"
        "        try: read(path)\n"
        "        except InputError: pass\n"
    )
    command = [sys.executable, "-W", "always", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- the same rules, number by number


def test_16_bit_values_are_divided_by_257_to_the_nearest():
    values = np.array([[0, 128, 129, 385, 386, 65406, 65407, 65535]], dtype=np.uint16)
    expected = np.floor(values.astype(float) / 257 + 0.5)
    assert expected.tolist() == [[0, 0, 1, 1, 2, 254, 255, 255]]
    np.testing.assert_array_equal(decode(Image.fromarray(values))[:, :, 2], expected)


@pytest.mark.parametrize("values", [(-1, 5), (0, 65536)])
def test_integers_of_more_than_16_bits_are_refused_on_both_sides(values):
    with pytest.raises(InputError, match=f"integers from {values[0]} to {values[1]}"):
        decode(Image.fromarray(np.array([values], dtype=np.int32)))


@pytest.mark.parametrize("values", [(-0.01, 0.5), (0.5, 1.01)])
def test_floats_outside_0_to_1_are_refused_on_both_sides(values):
    with pytest.raises(InputError, match=rf"floats from {values[0]} to {values[1]}, but \[0, 1\]"):
        decode(Image.fromarray(np.array([values], dtype=np.float32)))


def test_floats_go_to_the_nearest_of_256_steps():
    values = np.array([[0.4 / 255, 0.6 / 255, 100.4 / 255, 254.6 / 255]], dtype=np.float32)
    np.testing.assert_array_equal(decode(Image.fromarray(values))[0, :, 0], [0, 1, 100, 255])


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_every_mode_with_transparency_is_laid_over_white(mode):
    rgba = np.array([[[80, 80, 80, 255], [80, 80, 80, 0], [80, 80, 80, 64]]], dtype=np.uint8)
    grey = 255 - (255 - 80) * rgba[0, :, 3].astype(float) / 255
    image = Image.fromarray(rgba)
    if mode in ("LA", "La"):
        image = image.convert("LA")
    if mode != image.mode:
        image = image.convert(mode)
    seen = decode(image)
    assert seen.shape == (1, 3, 3)
    assert np.abs(seen[0] - grey[:, None]).max() <= (3 if mode == "PA" else 1.5)


def test_other_colour_spaces_are_converted():
    image = Image.fromarray(gradient(9, 7))
    seen = decode(image.convert("YCbCr")).astype(int)
    assert np.abs(seen - gradient(9, 7)).max() <= 4


@pytest.mark.parametrize(("value", "turned"), [(0, False), (1, False), (8, True), (9, False)])
def test_an_orientation_that_means_nothing_turns_nothing(tmp_path, value, turned):
    exif = Image.Exif()
    exif[0x0112] = value
    path = saved(tmp_path, Image.fromarray(gradient(20, 30)), "jpg", exif=exif)
    shape = (30, 20) if turned else (20, 30)
    assert decode(path).shape[:2] == read_size(path) == shape


def test_an_open_image_is_turned_too_and_stays_as_it_was(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path, Image.fromarray(gradient(20, 30)), "png", exif=exif)
    with Image.open(path) as image:
        assert read_size(image) == (30, 20)
        seen = decode(image)
        np.testing.assert_array_equal(seen, np.rot90(gradient(20, 30), -1))
        seen[:] = 0  # a copy of its own
        np.testing.assert_array_equal(np.asarray(image), gradient(20, 30))
    image = Image.fromarray(gradient(20, 30))
    decode(image)[:] = 0
    np.testing.assert_array_equal(np.asarray(image), gradient(20, 30))


def test_a_reduced_jpeg_is_the_picture_seen_from_further_away(tmp_path):
    path = saved(tmp_path, Image.fromarray(gradient(160, 240)), "jpg", quality=98)
    for at_least, shape in (
        ((80, 120), (80, 120)),
        ((41, 20), (80, 120)),
        ((20, 61), (80, 120)),
        ((40, 60), (40, 60)),
    ):
        seen = decode(path, at_least=at_least)
        assert seen.shape[:2] == shape
        assert np.abs(seen.astype(int) - gradient(*shape)).max() <= 8


def test_the_files_that_a_folder_is_searched_for_can_be_read(tmp_path):
    image = Image.fromarray(gradient(12, 16))
    for suffix in sorted(IMAGE_SUFFIXES):
        path = tmp_path / f"a{suffix}"
        kinds = {".jpe": "JPEG", ".jfif": "JPEG", ".pbm": "PPM", ".pgm": "PPM", ".apng": "PNG"}
        image.convert("1" if suffix == ".pbm" else "RGB").save(path, kinds.get(suffix))
        assert decode(path).shape == (12, 16, 3)
    for kind in ("ICO", "DIB"):
        image.save(tmp_path / f"a.{kind.lower()}", kind)
        assert decode(tmp_path / f"a.{kind.lower()}").shape[2] == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(InputError, match=r"pipe\.jpg is not a regular file"):
        decode(tmp_path / "pipe.jpg")


def test_messages_call_a_source_by_its_path_or_by_what_it_is(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (2, 2)), "png")
    assert name_of(path) == name_of(str(path)) == str(path)
    assert name_of(b"12345") == "<5 bytes>"
    with Image.open(path) as image:
        assert name_of(image) == str(path)
    assert name_of(Image.new("RGB", (2, 2))) == "<Image>"
    with pytest.raises(InputError, match=r"^<4 bytes> is not a picture"):
        read_size(b"text")
    with pytest.raises(InputError, match=r"^mine is too large to decode"):
        read_size(Image.new("RGB", (20, 20)), max_pixels=399, name="mine")


def test_the_limit_is_the_one_given_or_the_environments_or_512_mib_of_rgb(monkeypatch):
    monkeypatch.delenv(MAX_PIXELS_VARIABLE, raising=False)
    assert pixel_limit() == MAX_PIXELS == 2**29 // 3
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "")
    assert pixel_limit() == MAX_PIXELS
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "5e3")
    assert (pixel_limit(), pixel_limit(7), pixel_limit(0)) == (5000, 7, 0)
    wide = Image.new("RGB", (100, 50))
    assert read_size(wide) == (50, 100)
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "4999")
    with pytest.raises(InputError, match=r"50 x 100 is 0\.0 megapixels, above the limit of 0\.0"):
        decode(wide)


def test_a_raised_limit_is_raised_for_this_picture_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = saved(tmp_path, Image.fromarray(gradient(30, 40)), "png")
    with pytest.raises(InputError, match="is too large to decode: "):
        decode(path)
    assert decode(path, max_pixels=MAX_PIXELS + 1).shape == (30, 40, 3)
    assert Image.MAX_IMAGE_PIXELS == 100
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # a caller who wants no limit keeps none
    assert decode(path, max_pixels=MAX_PIXELS + 1).shape == (30, 40, 3)
    assert Image.MAX_IMAGE_PIXELS is None


def test_grey_and_transparent_arrays_are_pictures_too():
    grey = np.array([[3, 200, 7]], dtype=np.uint8)
    for array in (grey, grey[:, :, None]):
        np.testing.assert_array_equal(decode(array), [[[3] * 3, [200] * 3, [7] * 3]])
    four = np.full((4, 6, 4), 255, np.uint8)
    four[0, 1] = (9, 9, 9, 0)
    seen = decode(four[:, ::2])
    assert seen.shape == (4, 3, 3)
    assert (seen == 255).all()
    assert read_size(four) == (4, 6)
    for bad in (
        np.zeros((4, 5, 2), np.uint8),
        np.zeros((4, 5, 5), np.uint8),
        np.zeros((4, 0), np.uint8),
    ):
        for read in (decode, read_size):
            with pytest.raises(InputError, match=r"^<ndarray> must be a uint8 array"):
                read(bad)
