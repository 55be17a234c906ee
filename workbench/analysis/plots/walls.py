"""Radiographs on a wall, with titles, boxes and heat maps."""

import re
from collections.abc import Sequence
from textwrap import fill

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

from workbench.analysis.localisation import upsample
from workbench.analysis.plots.style import INK, ORANGE, SKY, WIDTH, panels, readable

OPACITY = 0.6  # of the hottest place; the radiograph has to show through


def plot_radiographs(
    images: Sequence[np.ndarray] | np.ndarray,
    titles: Sequence[str],
    *,
    boxes: Sequence[Sequence[tuple]] | None = None,
    columns: int = 4,
    box_colour: str = ORANGE,
) -> np.ndarray:
    """Hang radiographs on a wall, with a title over each and boxes drawn in.

    Args:
        images: n grey images, uint8, (height, width) or (height, width, 1).
        titles: n titles; long ones are wrapped.
        boxes: for each image a sequence of (x, y, width, height, name) in pixels of the image shown.
        columns: images per row.
        box_colour: of the boxes and of the ground of their names.

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
            panel.add_patch(Rectangle((x, y), box_width, box_height, fill=False, color=box_colour, linewidth=1.5))
            inside = y < 0.08 * pixels.shape[0]  # no room above the box
            right = x > 0.6 * pixels.shape[1]  # no room to the right of its corner
            corner = (x + box_width if right else x, y)
            # Boxes often share a corner; then the later name hangs from the lower edge.
            hidden = any(np.abs(np.subtract(corner, other) / pixels.shape[::-1]).max() < 0.08 for other in taken)
            taken.append(corner)
            panel.text(
                corner[0], y + box_height if hidden else y, readable([name])[0], fontsize=8, color="black",
                ha="right" if right else "left", va="top" if inside or hidden else "bottom",
                bbox={"facecolor": box_colour, "edgecolor": "none", "pad": 1},
            )  # fmt: skip
    return axes


def plot_heat_maps(
    images: Sequence[np.ndarray] | np.ndarray,
    maps: np.ndarray,
    titles: Sequence[str],
    *,
    boxes: Sequence[Sequence[tuple]] | None = None,
    columns: int = 4,
) -> np.ndarray:
    """Hang radiographs on a wall, each under its heat map, with the boxes that were drawn by hand.

    Cold places are clear and hot ones glow, so that the radiograph is seen where the network did not look.

    Args:
        images: n square grey images, uint8, (size, size) or (size, size, 1), as the network saw them.
        maps: (n, h, w) in [0, 1], 1 the hottest place of its own map; enlarged to the images.
        titles: n titles; long ones are wrapped. An all-zero map adds a line that says so.
        boxes: for each image a sequence of (x, y, width, height, name) in pixels of the image shown.
        columns: images per row.

    Returns:
        The n axes.
    """
    cold = ["\nno heat: nothing speaks for it" if not np.any(heat) else "" for heat in maps]
    titles = [f"{title}{line}" for title, line in zip(titles, cold, strict=True)]
    axes = plot_radiographs(images, titles, boxes=boxes, columns=columns, box_colour=SKY)
    colours = colormaps["inferno"](np.linspace(0, 1, 256))
    colours[:, 3] = OPACITY * np.linspace(0, 1, 256) ** 1.5  # lukewarm places stay nearly clear
    figure = axes[0].figure
    figure.set_figheight(figure.get_figheight() + 0.5)  # for the bar, which else would take it from the titles
    glow = ListedColormap(colours, name="glow")
    for panel, image, heat in zip(axes, images, maps, strict=True):
        enlarged = upsample(np.asarray(heat)[None], len(image))[0]
        # Above the radiograph, below the boxes.
        panel.imshow(enlarged, cmap=glow, vmin=0, vmax=1, zorder=0.5)
    over_grey = colours[:, :3] * colours[:, 3:] + 0.5 * (1 - colours[:, 3:])  # as it looks on a radiograph
    bar = figure.colorbar(
        ScalarMappable(cmap=ListedColormap(over_grey, name="glow over grey")),
        ax=list(axes),
        location="bottom",
        fraction=0.03,
        aspect=45,
        pad=0.02,
        shrink=0.5,
    )
    bar.outline.set_visible(False)
    bar.set_ticks([0, 0.5, 1], labels=["0", "half", "hottest place of the map"])
    bar.ax.tick_params(labelsize=8, colors=INK, length=0)
    return axes
