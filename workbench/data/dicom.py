"""A DICOM file -> the grey pixels that a PNG of the same radiograph would hold.

What the file says is done in its order: modality rescale, window, inversion of MONOCHROME1 (DICOM PS3.3, C.7.6.3 and
C.11). Without a window the whole range of the values becomes 0 to 255.

    from workbench.data import dicom
    if dicom.is_dicom(encoded):
        pixels = dicom.decode_dicom(encoded, "chest.dcm")      # uint8 (height, width)
"""

import io
from pathlib import Path

import numpy as np

from workbench import WorkbenchError

MOST_PIXELS = 90_000_000  # five times what a large detector gives


def is_dicom(encoded: bytes) -> bool:
    """Whether bytes are a DICOM file: 128 bytes of anything, then DICM."""
    return encoded[128:132] == b"DICM"


def check_pixels(pixels: int, path: str | Path) -> None:
    """Refuse an image that claims absurdly many pixels, before memory is taken for them."""
    if pixels > MOST_PIXELS:
        raise WorkbenchError(
            f"`{path}` claims {pixels:,} pixels, more than the {MOST_PIXELS:,} a radiograph may have: give it in a "
            "smaller size, or remove it."
        )


def decode_dicom(encoded: bytes, path: str | Path) -> np.ndarray:
    """Decode one radiograph, 8 to 16 bits a pixel, signed or not.

    Args:
        encoded: the file's bytes.
        path: its name, for what is raised.

    Returns:
        uint8 (height, width); bright is dense, as in NIH's files.

    Raises:
        WorkbenchError: no pixels, several frames, colour, or a compression that no installed decoder reads.
    """
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    try:
        dataset = pydicom.dcmread(io.BytesIO(encoded))
        kind = str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
        if "PixelData" not in dataset:
            raise WorkbenchError(f"`{path}` is a DICOM file without pixels: give the file of the image itself.")
        if not kind.startswith("MONOCHROME"):
            raise WorkbenchError(f"`{path}` is a DICOM file in colour ({kind}): expected a grey radiograph.")
        if int(dataset.get("NumberOfFrames") or 1) != 1:
            raise WorkbenchError(
                f"`{path}` is a DICOM file of {dataset.NumberOfFrames} frames: expected one radiograph."
            )
        # Asked before anything is decoded: a compressed file of a few bytes can claim any size.
        height, width = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
        check_pixels(height * width, path)
        stored = dataset.pixel_array
        if stored.ndim != 2 or not stored.size:
            raise ValueError(f"pixels of the shape {stored.shape}")
        values = apply_voi_lut(apply_modality_lut(stored, dataset), dataset).astype(np.float64)
        low, high = _range(dataset, values)
        if not np.isfinite([low, high, values.min(), values.max()]).all():
            raise ValueError("a rescaling or window that is not finite")
    except WorkbenchError:
        raise
    except Exception as error:  # pydicom raises many kinds
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:160]
        raise WorkbenchError(
            f"`{path}` is a DICOM file whose pixels cannot be read ({said}): export it uncompressed."
        ) from None
    grey = np.clip((values - low) / max(high - low, 1e-9), 0, 1)
    if kind == "MONOCHROME1":  # here low values are bright
        grey = 1 - grey
    return np.round(255 * grey).astype(np.uint8)


def _range(dataset, values: np.ndarray) -> tuple[float, float]:
    """The values that become 0 and 255."""
    from pydicom.pixels import apply_modality_lut

    windowed = dataset.get("WindowCenter") not in (None, "") or "VOILUTSequence" in dataset
    if not windowed:
        return float(values.min()), float(values.max())
    if "VOILUTSequence" in dataset:
        return 0.0, float(2 ** int(dataset.VOILUTSequence[0].LUTDescriptor[2]) - 1)
    # A window is stretched by pydicom over all values that the stored bits can hold, after rescaling.
    bits, signed = int(dataset.BitsStored), bool(int(dataset.get("PixelRepresentation", 0)))
    ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1])
    ends = np.sort(apply_modality_lut(ends, dataset).astype(float))
    return float(ends[0]), float(ends[1])
