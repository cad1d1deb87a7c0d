"""The pixels of a training picture, by the fastest decoder that gives those of `vitrail_runtime`'s.

TorchCodec's JPEG decoder gives Pillow's pixels to the bit and hands them over without copies, in 0.6 to
0.8 of the time on photographs and a quarter on 32 x 32. It cannot decode at a reduced size, and colour
spaces other than grey and YCbCr, damaged files and other formats have their rules in `vitrail_runtime`;
those go there. So does everything where TorchCodec cannot be loaded (its wheel has to fit torch's, which
the package registry's does not when torch is a build for CPUs alone), after one warning.
"""

import warnings

import numpy as np
import torch

from vitrail.data.examples import Images

try:
    from torchcodec.decoders import decode_jpeg  # pyright: ignore[reportPrivateImportUsage]
except (ImportError, OSError, RuntimeError) as problem:
    decode_jpeg = None
    warnings.warn(
        f"torchcodec cannot be loaded ({str(problem).strip().splitlines()[0]}), so Pillow decodes the "
        "training pictures: the same pixels, more slowly; install torchcodec >= 0.16 from where "
        "torch came from",
        stacklevel=2,
    )


def read_pixels(images: Images, i: int, at_least: tuple[int, int]) -> np.ndarray:
    """Picture i, uint8 (H, W, 3), upright: the same pixels as `images.read(i, at_least)`."""
    payload = images.read_bytes(i)
    height, width = images.sizes[i].tolist()
    # Where a JPEG may be halved, decoding it so is faster still.
    halvable = min(height // at_least[0], width // at_least[1]) >= 2
    if decode_jpeg is not None and payload[:2] == b"\xff\xd8" and not halvable:
        try:
            encoded = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            pixels = decode_jpeg(encoded, mode="UNCHANGED")  # upright, by the EXIF orientation
        except RuntimeError:  # its message is for programmers; the other reader names the file
            return images.decode(i, payload, at_least)
        assert isinstance(pixels, torch.Tensor)  # a list for a list of pictures alone
        if pixels.shape[1:] == (height, width) and pixels.shape[0] in (1, 3):
            return pixels.expand(3, -1, -1).permute(1, 2, 0).numpy()
    return images.decode(i, payload, at_least)
