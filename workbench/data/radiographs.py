"""Radiographs one at a time: an image file -> grey pixels -> the size that training needs -> bytes, and back.

Knows neither tables nor shards, and imports neither pandas nor TensorFlow: the processes that `shards` starts to
decode images import this module alone, so they start in a quarter of a second.

    from workbench.data import radiographs
    pixels = radiographs.read_radiograph("data/nih/images/00000001_000.png")     # uint8 (height, width)
    small = radiographs.resize_radiograph(pixels, 256)
"""

import io
import math
import os
import re
import stat
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from workbench import WorkbenchError
from workbench.data import dicom

MOST_BYTES = 2**30
ENCODINGS = ("raw", "png", "jpeg")
JPEG_QUALITY = 95
COLOUR_SPREAD = 6  # grey levels between the channels, on average, from which a picture counts as coloured


def read_radiograph(path: str | Path) -> np.ndarray:
    """Read one image or DICOM file as grey, uint8 (height, width); of a coloured one the luminance, alpha ignored.

    What a file holds decides, not its name: a JPEG called .png is read. PNGs of 1 to 8 bits, with a palette or alpha,
    and JPEGs, in CMYK too, are read. PNGs of 16 bits are refused, since they do not say which of their values are black
    and white: stretched over all 16 bits a 12-bit radiograph is black, stretched over its own range a marker or a burnt
    corner sets the contrast, and the network would see neither as it saw NIH's. The DICOM file carries the window.

    Raises:
        WorkbenchError: there is no such file, it cannot be read, or it is no radiograph; nothing is waited for, and no
            more memory taken than `MOST_BYTES` and `dicom.MOST_PIXELS` need.
    """
    encoded = _read_file(path)
    try:
        if dicom.is_dicom(encoded):
            return dicom.decode_dicom(encoded, path)
        pixels = _decode_png(encoded)
        return _decode_other(encoded, path) if pixels is None else pixels
    except WorkbenchError:
        raise
    except Exception as error:  # damaged files make decoders raise all there is
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:160]
        raise WorkbenchError(
            f"`{path}` cannot be decoded ({said}): download or extract it again, or remove it and skip it."
        ) from None


def find_faults(paths: Sequence[str]) -> list[str]:
    """Read image files: of each why it cannot be read, as a sentence; empty for one that can."""
    return [_fault_of(path) for path in paths]


def refuse_colour(path: str | Path) -> None:
    """Raise a WorkbenchError if an image file is in colour, as photographs are. Grey stored as RGB passes."""
    encoded = _read_file(path)
    try:
        with _open_image(encoded, path) as image:
            if image.mode in ("L", "1", "LA") or image.mode.startswith(("I", "F")):
                return
            small = np.asarray(image.convert("RGB").resize((64, 64)), np.int16)
    except Exception:
        return  # no image that Pillow knows; reading it says what is wrong
    spread = (small.max(axis=2) - small.min(axis=2)).mean()
    if spread > COLOUR_SPREAD:
        raise WorkbenchError(f"`{path}` is a picture in colour, and a radiograph is grey: give the radiograph itself.")


def resize_radiograph(pixels: np.ndarray, size: int) -> np.ndarray:
    """Bring a grey image to (size, size): averaged over areas when shrunk, interpolated when enlarged.

    An image that is not square is stretched. Each pixel is the mean of exactly the area that it covers, parts
    of pixels counted as such; Pillow's BOX filter counts whole pixels only, so it shifts details a little.
    """
    height, width = pixels.shape
    if (height, width) == (size, size):
        return pixels
    if height == width and height % size == 0:
        return np.asarray(Image.fromarray(pixels).reduce(height // size))
    if min(height, width) < size:
        return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))
    sums = _sum_rows(_sum_rows(pixels, size).T, size).T.astype(np.int64)
    area = (height // math.gcd(height, size)) * (width // math.gcd(width, size))
    return ((2 * sums + area) // (2 * area)).astype(np.uint8)


def encode_radiographs(paths: Sequence[str], size: int, encoding: str) -> list[bytes]:
    """Read, resize and encode the images of one shard."""
    return [encode_pixels(resize_radiograph(read_radiograph(path), size), encoding) for path in paths]


def decode_radiograph(encoded: bytes, encoding: str, size: int) -> np.ndarray:
    """What `encode_radiographs` encoded: uint8 (size, size)."""
    if encoding == "raw":
        return np.frombuffer(encoded, np.uint8).reshape(size, size)
    return np.asarray(Image.open(io.BytesIO(encoded)))


def _read_file(path: str | Path) -> bytes:
    try:
        told = os.stat(path)
        # Asked before it is opened: opening a FIFO waits for ever, and a device may have no end.
        if not stat.S_ISREG(told.st_mode):
            kind = "a folder" if stat.S_ISDIR(told.st_mode) else "a device, a FIFO or a socket"
            raise WorkbenchError(f"`{path}` is {kind}, not an image file: remove it, or give the file itself.")
        if told.st_size > MOST_BYTES:
            raise WorkbenchError(
                f"`{path}` has {told.st_size:,} bytes, more than the {MOST_BYTES:,} a radiograph may have: remove it."
            )
        if told.st_size == 0:
            raise WorkbenchError(
                f"`{path}` is empty (0 bytes): download or extract it again, or remove it and skip it."
            )
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise WorkbenchError(f"`{path}` does not exist: is the data set complete?") from None
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise WorkbenchError(f"`{path}` cannot be read ({said}): check its permissions and the disk.") from None


def _fault_of(path: str) -> str:
    try:
        read_radiograph(path)
    except WorkbenchError as error:
        return str(error)
    return ""


def _decode_png(encoded: bytes) -> np.ndarray | None:
    """Decode a PNG of 8 bits, grey or RGBA, as NIH's are, in 0.4 of Pillow's time; None: let Pillow see to it."""
    from kornia_rs.io import decode_image_png_u8

    # The signature, the header's length and name, then width, height, depth, kind, and three that vary less.
    width, height, *form = struct.unpack(">16xIIBBBBB", encoded[:29].ljust(29, b"\0"))
    channels = {(8, 0, 0, 0, 0): "mono", (8, 6, 0, 0, 0): "rgba"}.get(tuple(form))
    if not encoded.startswith(b"\x89PNG") or channels is None or width * height > dicom.MOST_PIXELS or _moves(encoded):
        return None
    try:
        pixels = decode_image_png_u8(encoded, (height, width), channels)
    except Exception:  # It raises nothing narrower. Pillow says what is wrong.
        return None
    return pixels[..., 0] if channels == "mono" else np.asarray(Image.fromarray(pixels).convert("L"))


def _moves(encoded: bytes) -> bool:
    """Whether a PNG may be animated: the chunk that says so stands before the pixels."""
    return b"acTL" in encoded[: max(encoded.find(b"IDAT"), 0)]


def _decode_other(encoded: bytes, path: str | Path) -> np.ndarray:
    with _open_image(encoded, path) as image:
        # Pillow makes 8 bits of 16 where a PNG has several channels; the header still tells.
        if image.mode.startswith(("I", "F")) or (image.format == "PNG" and encoded[24] == 16):
            raise WorkbenchError(
                f"`{path}` has 16 bits a channel, and nothing in it says which values are black and white: give the "
                "DICOM file, or an image of 8 bits, windowed as for reading."
            )
        if image.format == "PNG" and getattr(image, "n_frames", 1) > 1:
            raise WorkbenchError(f"`{path}` is an animation of {image.n_frames} pictures: expected one radiograph.")
        image.load()
        # Palettes go through RGB; alpha is dropped, not composited: NIH's RGBA files are opaque.
        return np.asarray(image if image.mode == "L" else image.convert("RGB").convert("L"))


def _open_image(encoded: bytes, path: str | Path) -> Image.Image:
    """Open a PNG or JPEG, without decoding it yet; a WorkbenchError for anything else and for absurd sizes."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of some sizes and refuses others; here they are all refused below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # No other formats: Pillow's readers of some run other programs.
            image = Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG"))
        pixels = image.width * image.height
    except Image.DecompressionBombError as error:
        pixels = int(re.search(r"\d+", str(error)).group())
    except UnidentifiedImageError:
        raise WorkbenchError(
            f"`{path}` cannot be decoded (it is no PNG, JPEG or DICOM file): download or extract it again, or remove "
            "it and skip it."
        ) from None
    dicom.check_pixels(pixels, path)
    return image


def _sum_rows(values: np.ndarray, size: int) -> np.ndarray:
    """Sums over `size` equal bands of rows, parts of rows counted as such: whole numbers, `rows` times the means.

    The pattern of rows and bands repeats, so all its repetitions are added up at once, in the smallest type that
    holds the sums. A product with a matrix of weights takes forty times as long.
    """
    common = math.gcd(len(values), size)
    rows, bands = len(values) // common, size // common
    values = values.reshape(common, rows, -1).astype(np.min_scalar_type(np.iinfo(values.dtype).max * rows))
    sums = np.zeros((common, bands, values.shape[2]), values.dtype)
    # A row is `bands` long, and a band `rows`.
    for band in range(bands):
        for row in range(band * rows // bands, -(-(band + 1) * rows // bands)):
            overlap = min((row + 1) * bands, (band + 1) * rows) - max(row * bands, band * rows)
            sums[:, band] += overlap * values[:, row]
    return sums.reshape(size, -1)


def encode_pixels(pixels: np.ndarray, encoding: str) -> bytes:
    """Encode uint8 (height, width) as shards hold it."""
    if encoding == "raw":
        return pixels.tobytes()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, encoding, **({"quality": JPEG_QUALITY} if encoding == "jpeg" else {}))
    return file.getvalue()
