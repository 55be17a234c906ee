"""Whether the heat maps lie where a radiologist drew the box: arrays and boxes in, a table out.

Two scores against hand-drawn boxes. The pointing game (Zhang et al. 2016, arXiv:1608.00507) asks whether the hottest
place lies in a box, which has a chance level: the share of the image that the boxes cover. IoBB (Wang et al. 2017,
arXiv:1705.02315) cuts the map at fixed heats, puts a box around each region that is left, and divides what it shares
with the hand-drawn box by its own area; it is a precision, which small detections flatter, so false positives per
image stand beside it. The maps are `workbench.training.gradcam`'s; nothing here needs TensorFlow.

    heat = read_heat_maps("results/first/heatmaps.npz")
    boxes = scale_boxes(chestxray14.read_boxes("data/nih"), stored_size=heat.stored_size, image_size=heat.image_size)
    localisation_table(heat, boxes)
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage

from workbench import WorkbenchError
from workbench.analysis import resampling

ORIGINAL_SIZE = 1024  # NIH's boxes are in pixels of its 1024×1024 files
CUTS = (60 / 255, 180 / 255)  # Wang et al. cut at 60 and at 180 of 255, and take the boxes of both
OVERLAPS = (0.1, 0.25, 0.5, 0.75)
SIDES = ["x", "y", "width", "height"]


@dataclass(frozen=True)
class HeatMaps:
    """Heat maps of one run.

    Attributes:
        table: one row per map: image, finding, and the network's score in [0, 1].
        maps: (n, h, w) float32 in [0, 1], each with the maximum 1 or all zero, in the order of the table.
        image_size: side of the square that the network saw, in pixels.
        stored_size: side of the square whose centre that is, in pixels.
        rectified: whether negative evidence was cut off, which leaves maps of zeros where the score is low.
    """

    table: pd.DataFrame
    maps: np.ndarray
    image_size: int
    stored_size: int
    rectified: bool = True


def read_heat_maps(path: str | os.PathLike) -> HeatMaps:
    """Read a run's `heatmaps.npz`.

    Raises:
        WorkbenchError: the file is missing or is not one of heat maps.
    """
    path = Path(path)
    if not path.is_file():
        raise WorkbenchError(f"There are no heat maps at {path}: compute them first (notebook 04).")
    try:
        # allow_pickle stays off: a file of results must not run code.
        with np.load(path, allow_pickle=False) as file:
            table = pd.DataFrame({"image": file["images"], "finding": file["findings"], "score": file["scores"]})
            maps = file["maps"].astype(np.float32)
            if maps.ndim != 3 or len(maps) != len(table) or not np.isfinite(maps).all():
                raise ValueError(f"{len(table)} names and maps of the shape {maps.shape}")
            sizes = int(file["image_size"]), int(file["stored_size"])
            return HeatMaps(table, maps, *sizes, bool(file["rectified"]))
    except Exception as error:  # of a broken file zipfile, zlib, tokenize and numpy each have their own
        raise WorkbenchError(f"{path} is not a file of heat maps ({error}): compute them again.") from None


def scale_boxes(
    boxes: pd.DataFrame, *, stored_size: int, image_size: int, original_size: int = ORIGINAL_SIZE
) -> pd.DataFrame:
    """Boxes of the original radiographs in pixels of what the network saw, cut off at its edge.

    Args:
        boxes: image, finding, x, y (of the upper left corner), width, height in pixels of the original.
        stored_size: side to which the original was resized, in pixels.
        image_size: side of the centre crop of that.
        original_size: side of the original.

    Returns:
        The same rows and columns. A box that lies outside the crop has no width or no height.
    """
    if not 0 < image_size <= stored_size:
        raise WorkbenchError(f"image_size={image_size} of stored_size={stored_size}: expected a crop that fits inside.")
    scale, edge = stored_size / original_size, (stored_size - image_size) // 2
    scaled = boxes.copy()
    for start, length in (("x", "width"), ("y", "height")):
        low = (boxes[start] * scale - edge).clip(0, image_size)
        high = ((boxes[start] + boxes[length]) * scale - edge).clip(0, image_size)
        scaled[start], scaled[length] = low, high - low
    return scaled


def upsample(maps: np.ndarray, size: int) -> np.ndarray:
    """Maps (n, h, w) brought to (n, size, size) float32, bilinear between the centres of their cells."""

    def weights(cells: int) -> np.ndarray:
        place = ((np.arange(size) + 0.5) * cells / size - 0.5).clip(0, cells - 1)
        return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(cells))).astype(np.float32)

    maps = np.asarray(maps, np.float32)
    return weights(maps.shape[1]) @ maps @ weights(maps.shape[2]).T


def hottest_point(heat: np.ndarray, *, image_size: int) -> tuple[float, float] | None:
    """Where a map (h, w) is hottest: x and y in pixels, at the centre of the cell; None where it is zero all over.

    A bilinear enlargement has its maximum there; its first largest pixel would be at the edge for a cell at the edge.
    """
    if not heat.max() > 0:
        return None
    row, column = np.unravel_index(np.argmax(heat), heat.shape)
    return (column + 0.5) * image_size / heat.shape[1], (row + 0.5) * image_size / heat.shape[0]


def detect_boxes(heat: np.ndarray, *, image_size: int, cuts: Sequence[float] = CUTS) -> np.ndarray:
    """Boxes around the connected regions of a map that are at least as hot as a cut, for each cut.

    Args:
        heat: (h, w) in [0, 1].
        image_size: side to which the map is enlarged first, in pixels.
        cuts: heats in (0, 1].

    Returns:
        (m, 4) float: x, y, width, height in pixels, each box once.
    """
    enlarged, found = upsample(heat[None], image_size)[0], []
    for cut in cuts:
        regions, _ = ndimage.label(enlarged >= cut)
        found += [(x.start, y.start, x.stop - x.start, y.stop - y.start) for y, x in ndimage.find_objects(regions)]
    return np.array(list(dict.fromkeys(found)), float).reshape(-1, 4)


def iobb(detected: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Intersection over the DETECTED box's area: boxes x, y, width, height (m, 4) and (k, 4) -> (m, k) in [0, 1]."""
    detected, drawn = np.asarray(detected, float)[:, None], np.asarray(drawn, float)[None]
    low = np.maximum(detected[..., :2], drawn[..., :2])
    high = np.minimum(detected[..., :2] + detected[..., 2:], drawn[..., :2] + drawn[..., 2:])
    return (high - low).clip(0).prod(axis=-1) / detected[..., 2:].prod(axis=-1)


def localisation_table(
    heat: HeatMaps,
    boxes: pd.DataFrame,
    *,
    tolerance: float = 0.0,
    cuts: Sequence[float] = CUTS,
    overlaps: Sequence[float] = OVERLAPS,
) -> pd.DataFrame:
    """Score heat maps against hand-drawn boxes, finding by finding.

    Args:
        heat: maps; those of an image and finding without a box are passed over.
        boxes: image, finding, x, y, width, height in pixels of what the network saw, by `scale_boxes`. Boxes without
            a map are left out and counted in `table.attrs["boxes_without_map"]`; a box outside the crop is a miss.
        tolerance: pixels by which the pointing game widens every box; Zhang et al. use 15.
        cuts: heats at which maps are cut for IoBB.
        overlaps: the least IoBB, T, at which a box counts as found.

    Returns:
        A row per finding: boxes, images, blank (share of the images whose map is all zero, which is a miss), pointing
        (share of the images whose hottest point is in a box), pointing_low and pointing_high (Wilson's 95 % interval,
        images taken as independent), chance (mean share of the image in the boxes), and for every T `iobb_T` (share
        of the boxes with a detection of that IoBB) and `false_positives_T` (detections per image that reach T with no
        box of the finding).

    Raises:
        WorkbenchError: no box has a map.
    """
    place = {pair: row for row, pair in enumerate(heat.table[["image", "finding"]].itertuples(index=False, name=None))}
    rows, without_map = [], 0
    for (image, finding), drawn in boxes.groupby(["image", "finding"], sort=False):
        if (image, finding) not in place:
            without_map += len(drawn)
            continue
        rows.append(
            {"finding": finding, "boxes": len(drawn)}
            | _score(heat.maps[place[image, finding]], drawn[SIDES].to_numpy(float), heat, tolerance, cuts, overlaps)
        )
    if not rows:
        raise WorkbenchError(
            f"None of the {len(boxes)} boxes has a heat map among {len(heat.table)}: request maps of the images and "
            "findings that have boxes."
        )
    groups = pd.DataFrame(rows).groupby("finding", sort=False)
    total, images = groups.sum(), groups.size()
    table = pd.DataFrame({"boxes": total["boxes"], "images": images, "blank": total["blank"] / images})
    table["pointing"] = total["hit"] / images
    table["pointing_low"], table["pointing_high"] = resampling.wilson_interval(total["hit"], images)
    table["chance"] = total["covered"] / images
    for overlap in overlaps:
        table[f"iobb_{overlap:g}"] = total[f"found_{overlap:g}"] / total["boxes"]
        table[f"false_positives_{overlap:g}"] = total[f"false_{overlap:g}"] / images
    table.attrs["boxes_without_map"] = without_map
    return table


def _score(heat: np.ndarray, drawn: np.ndarray, of: HeatMaps, tolerance: float, cuts, overlaps) -> dict:
    """One map against the boxes of its image and finding."""
    visible = drawn[(drawn[:, 2:] > 0).all(axis=1)]
    point = hottest_point(heat, image_size=of.image_size)
    pixel = np.arange(of.image_size) + 0.5
    row = {
        "blank": point is None,
        "hit": point is not None and bool(_inside(visible, *point, tolerance).any()),
        "covered": _inside(visible, pixel[:, None, None], pixel[:, None], tolerance).any(axis=-1).mean(),
    }
    detected = detect_boxes(heat, image_size=of.image_size, cuts=cuts)
    overlap = iobb(detected, drawn)
    for least in overlaps:
        reached = overlap >= least
        row[f"found_{least:g}"] = int(reached.any(axis=0).sum())
        row[f"false_{least:g}"] = int((~reached.any(axis=1)).sum())
    return row


def _inside(boxes: np.ndarray, x, y, tolerance: float) -> np.ndarray:
    """Whether points lie in boxes (k, 4) widened on all sides; the last axis is that of the boxes."""
    left, top, width, height = boxes.T
    across = (x >= left - tolerance) & (x <= left + width + tolerance)
    return across & (y >= top - tolerance) & (y <= top + height + tolerance)
