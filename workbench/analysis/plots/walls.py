"""Radiographs on a wall, with titles and boxes."""

import re
from collections.abc import Sequence
from textwrap import fill

import numpy as np
from matplotlib.patches import Rectangle

from workbench.analysis.plots.style import INK, ORANGE, WIDTH, panels, readable


def plot_radiographs(
    images: Sequence[np.ndarray] | np.ndarray,
    titles: Sequence[str],
    *,
    boxes: Sequence[Sequence[tuple]] | None = None,
    columns: int = 4,
) -> np.ndarray:
    """Hang radiographs on a wall, with a title over each and boxes drawn in.

    Args:
        images: n grey images, uint8, (height, width) or (height, width, 1).
        titles: n titles; long ones are wrapped.
        boxes: for each image a sequence of (x, y, width, height, name) in pixels of the image shown.
        columns: images per row.

    Returns:
        The n axes.
    """
    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)
    # A small wall keeps a small width: two radiographs blown up to the page show nothing more.
    width = min(WIDTH, 3.2 * columns)
    side = width / columns
    letters = max(8, int(side * 13.5))
    named = [re.sub(r"(?<=[a-z])_(?=[A-Z])", " ", str(title)) for title in titles]  # Pleural_Thickening
    texts = ["\n".join(fill(line, letters) for line in title.split("\n")) for title in named]
    height = rows * (side + 0.17 * max(text.count("\n") + 1 for text in texts))
    axes = panels(None, len(images), columns=columns, width=width, height=height)
    for index, (panel, image, text) in enumerate(zip(axes, images, texts, strict=True)):
        pixels = np.asarray(image)
        pixels = pixels[..., 0] if pixels.ndim == 3 else pixels
        panel.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        panel.set_title(text, fontsize=9, color=INK, pad=3)
        panel.set_axis_off()
        taken = []
        for x, y, box_width, box_height, name in boxes[index] if boxes is not None else ():
            panel.add_patch(Rectangle((x, y), box_width, box_height, fill=False, color=ORANGE, linewidth=1.5))
            inside = y < 0.08 * pixels.shape[0]  # no room above the box
            right = x > 0.6 * pixels.shape[1]  # no room to the right of its corner
            corner = (x + box_width if right else x, y)
            # Boxes often share a corner; then the later name hangs from the lower edge.
            hidden = any(np.abs(np.subtract(corner, other) / pixels.shape[::-1]).max() < 0.08 for other in taken)
            taken.append(corner)
            panel.text(
                corner[0], y + box_height if hidden else y, readable([name])[0], fontsize=8, color="black",
                ha="right" if right else "left", va="top" if inside or hidden else "bottom",
                bbox={"facecolor": ORANGE, "edgecolor": "none", "pad": 1},
            )  # fmt: skip
    return axes
