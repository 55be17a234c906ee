"""A small made-up data set in NIH's own layout, learnable in a minute or two, to try and to test everything.

Every image is a schematic chest (lungs, heart, ribs, noise); each finding is drawn as a shape or texture of
its own, at its place in the lungs, on either side. Shares run as NIH's do, from Infiltration down to Hernia,
and findings come back in the same patient; some are drawn so faintly that no reader is perfect. It says
whether a pipeline learns, nothing about radiographs.

    from workbench.data import chestxray14, synthetic
    folder = synthetic.write_synthetic("data/synthetic")          # about 1,900 images, some seconds
    frame = chestxray14.read_dataset(folder)
"""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from workbench import WorkbenchError
from workbench.files import made_by_one

FORMAT = 1  # of what is drawn: another number is another data set
STREAM = 5  # of the random numbers that draw the labels; with this one the default's shares come out as meant
ORIGINAL = 1024  # NIH's boxes are in pixels of its 1024×1024 files
TEST_SHARE = 0.22  # of the patients, about NIH's
ILL_SHARE = 0.46  # of the images have a finding

# Share of the images with each finding: NIH's order, the rare ones raised so that the test split has some.
SHARES = {
    "Infiltration": 0.150,
    "Effusion": 0.120,
    "Atelectasis": 0.110,
    "Nodule": 0.085,
    "Mass": 0.080,
    "Pneumothorax": 0.075,
    "Consolidation": 0.070,
    "Pleural_Thickening": 0.062,
    "Cardiomegaly": 0.058,
    "Emphysema": 0.054,
    "Edema": 0.050,
    "Fibrosis": 0.047,
    "Pneumonia": 0.043,
    "Hernia": 0.036,
}
# The findings that NIH has boxes of, by the names that its list uses.
BOXED = {
    name: name for name in ("Atelectasis", "Cardiomegaly", "Effusion", "Mass", "Nodule", "Pneumonia", "Pneumothorax")
} | {"Infiltration": "Infiltrate"}
HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)


def write_synthetic(
    folder: str | Path, *, patients: int = 480, image_size: int = 96, seed: int = 0, progress: bool = True
) -> Path:
    """Write the data set whole or not at all, and return its folder.

    Args:
        folder: new, empty, or what the same call with the same settings wrote, which is then left as it is.
        patients: with one to a dozen images each, nearly four on average.
        image_size: height and width of the images.
        seed: of everything drawn.
        progress: show a bar.

    Raises:
        WorkbenchError: the folder holds something else.
    """
    _check(patients, image_size)
    folder = Path(folder)
    settings = {"format": FORMAT, "patients": patients, "image_size": image_size, "seed": seed}
    if _is_taken(folder):
        return _return_same(folder, settings)
    with made_by_one(folder):
        if _is_taken(folder):
            return _return_same(folder, settings)
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        try:
            (part / "images").mkdir(parents=True)
            _write_all(part, settings, progress)
            os.replace(part, folder)
        except OSError as error:
            raise WorkbenchError(
                f"{folder} cannot be written ({error.strerror or error}): make room or choose another folder."
            ) from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _check(patients: int, image_size: int) -> None:
    if patients < 10 or image_size < 32:
        raise WorkbenchError(
            f"patients={patients}, image_size={image_size}: expected at least 10 patients and 32 pixels."
        )


def _is_taken(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _return_same(folder: Path, settings: dict) -> Path:
    marker = folder / "synthetic.json"
    try:
        written = json.loads(marker.read_text()) if marker.is_file() else None
    except (ValueError, RecursionError, OSError):
        written = None
    if written != settings:
        what = f"the made-up data set of {written}" if written else "something else than a made-up data set"
        raise WorkbenchError(
            f"`{folder}` holds {what}, not of {settings}: choose another folder, or remove this one first."
        )
    return folder


def _write_all(folder: Path, settings: dict, progress: bool) -> None:
    table, labels, in_test = _draw_tables(settings["patients"], settings["seed"])
    boxes = []
    for row, image in enumerate(
        tqdm(table["image"], unit=" images", disable=not progress, mininterval=5, file=sys.stdout)
    ):
        # Of its own for each image, so that one image does not change with what others drew.
        own = np.random.default_rng([settings["seed"], row])
        present = [name for name, positive in zip(SHARES, labels[row], strict=True) if positive]
        pixels, drawn = draw_radiograph(
            present,
            image_size=settings["image_size"],
            rng=own,
            age=table["age"][row],
            sex=table["sex"][row],
            view=table["view"][row],
        )
        Image.fromarray(pixels).save(folder / "images" / image)
        if in_test[row] and own.random() < 0.5:
            boxes += [f"{image},{BOXED[name]},{','.join(map(str, box))}" for name, box in drawn if name in BOXED]

    _write_tables(folder, table, in_test)
    _write_lines(folder / "BBox_List_2017.csv", ["Image Index,Finding Label,Bbox [x,y,w,h],,,", *boxes])
    (folder / "synthetic.json").write_text(json.dumps(settings))


def write_tables(folder: str | Path, *, patients: int = 480, seed: int = 0) -> Path:
    """Write table and lists of the same set, with an empty file for each image: to count what would be there.

    Args:
        folder: an empty one.
        patients: as for `write_synthetic`, as is `seed`.
        seed: of everything drawn.
    """
    _check(patients, image_size=96)
    folder = Path(folder)
    table, _, in_test = _draw_tables(patients, seed)
    (folder / "images").mkdir()
    for image in table["image"]:
        (folder / "images" / image).touch()
    _write_tables(folder, table, in_test)
    return folder


def _draw_tables(patients: int, seed: int) -> tuple[pd.DataFrame, np.ndarray, pd.Series]:
    """A row per image, its labels, and whether it is in the test list."""
    rng = np.random.default_rng([seed, patients, STREAM])
    table, labels = _draw_patients(patients, rng)
    tested = rng.permutation(patients)[: round(patients * TEST_SHARE)] + 1
    return table, labels, table["patient"].isin(tested)


def _write_tables(folder: Path, table: pd.DataFrame, in_test: pd.Series) -> None:
    _write_lines(folder / "Data_Entry_2017_v2020.csv", [HEADER, *(_table_line(r) for r in table.itertuples())])
    _write_lines(folder / "train_val_list.txt", table.loc[~in_test, "image"])
    _write_lines(folder / "test_list.txt", table.loc[in_test, "image"])


def _write_lines(path: Path, lines: list[str] | pd.Series) -> None:
    path.write_text("\n".join(lines) + "\n")


def _table_line(row: tuple) -> str:
    return (
        f"{row.image},{row.labels},{row.follow_up},{row.patient},{row.age},{row.sex},{row.view},"
        f"{ORIGINAL},{ORIGINAL},0.168,0.168"
    )


def _draw_patients(patients: int, rng: np.random.Generator) -> tuple[pd.DataFrame, np.ndarray]:
    """Draw the table, one row per image, and its labels, bool (images, 14) in the order of SHARES."""
    images = rng.geometric(0.25, patients).clip(max=12)
    patient = np.repeat(np.arange(patients), images)
    follow_up = np.concatenate([np.arange(count) for count in images])
    labels = _draw_labels(patient, patients, rng)
    names = np.array(list(SHARES))
    # Sicker patients are filmed lying, from front to back.
    lying = rng.random(len(patient)) < np.where(labels.any(axis=1), 0.5, 0.3)
    table = pd.DataFrame(
        {
            "image": [f"{p + 1:08d}_{f:03d}.png" for p, f in zip(patient, follow_up, strict=True)],
            "labels": ["|".join(sorted(names[row])) or "No Finding" for row in labels],
            "follow_up": follow_up,
            "patient": patient + 1,
            "age": rng.normal(48, 16, patients).clip(4, 92).astype(int)[patient] + follow_up // 2,
            "sex": rng.choice(["F", "M"], patients, p=[0.44, 0.56])[patient],
            "view": np.where(lying, "AP", "PA"),
        }
    )
    return table, labels


def _draw_labels(patient: np.ndarray, patients: int, rng: np.random.Generator) -> np.ndarray:
    shares = np.array(list(SHARES.values()))
    # A patient is ill in some of the images, and a quarter of the findings come back in it again and again.
    ill_share = rng.beta(1.5, 1.5 * (1 - ILL_SHARE) / ILL_SHARE, patients)
    returning = np.where(rng.random((patients, len(shares))) < 0.25, 1.9, 0.7)
    ill = rng.random(len(patient)) < ill_share[patient]
    chance = np.minimum(shares / ILL_SHARE * returning[patient], 0.95)
    labels = (rng.random(chance.shape) < chance) & ill[:, None]
    # An ill image has at least one finding.
    for row in np.flatnonzero(ill & ~labels.any(axis=1)):
        labels[row, rng.choice(len(shares), p=chance[row] / chance[row].sum())] = True
    return labels


def draw_radiograph(
    findings: list[str],
    *,
    image_size: int,
    rng: np.random.Generator,
    age: int = 50,
    sex: str = "M",
    view: str = "PA",
) -> tuple[np.ndarray, list[tuple[str, tuple[float, float, float, float]]]]:
    """Draw one chest with the findings: uint8 (size, size), and (finding, box) of each, boxes in 1024ths.

    A box is x, y, width, height, around the part of the picture that the finding changes most.
    """
    # One in five is faint: nobody finds them all.
    strength = {name: rng.uniform(0.15, 0.4) if rng.random() < 0.2 else rng.uniform(0.75, 1.15) for name in findings}
    grid = (np.arange(image_size) + 0.5) / image_size - 0.5
    zoom, turn = rng.normal(1.0, 0.03), rng.normal(0.0, 0.03)
    across, down = grid[None] / zoom - rng.normal(0, 0.012), grid[:, None] / zoom - rng.normal(0, 0.012)
    # Chest coordinates: u from the middle to the side, v from head to foot, about -0.5 to 0.5.
    u, v = across + turn * down, down - turn * across

    chest = _draw_chest(u, v, strength, rng, age=age, sex=sex, view=view)
    boxes = []
    for name, amount in strength.items():
        change = PATTERNS[name](u, v, rng.choice([-1, 1]), rng)
        chest = chest + amount * change
        boxes.append((name, _box_around(change)))
    chest = chest * rng.normal(1.0, 0.05) + rng.normal(0, 0.02) + rng.normal(0, 0.035, chest.shape)
    return (chest.clip(0, 1) * 255).astype(np.uint8), boxes


def _draw_chest(
    u: np.ndarray,
    v: np.ndarray,
    strength: dict[str, float],
    rng: np.random.Generator,
    *,
    age: int,
    sex: str,
    view: str,
) -> np.ndarray:
    hollow, large = strength.get("Emphysema", 0), strength.get("Cardiomegaly", 0)
    body = _ellipse(u, v, 0.46, 0.62, 0.02)
    wide, long = u * (1 - 0.12 * hollow), v * (1 - 0.13 * hollow)
    lungs = _lung(wide, long, 1) + _lung(wide, long, -1)
    # Bright where little light comes through: 0.1 outside, 0.6 in the body, 0.3 in the lungs.
    chest = 0.08 + 0.5 * body - (0.28 + 0.12 * hollow) * lungs * body
    # AP films are taken nearer to the heart and show it larger.
    width = rng.normal(0.095, 0.008) * (1.08 if view == "AP" else 1.0) * (1 - 0.3 * hollow) + 0.075 * large
    chest += 0.3 * _ellipse(u - 0.03, v - 0.13, width, 0.12 + 0.03 * large, 0.08) * (1 - 0.5 * (1 - lungs))
    chest += 0.18 * np.exp(-((u / 0.06) ** 2)) * body
    ribs = np.cos(2 * np.pi * (v - 0.5 * np.abs(np.abs(u) - 0.15) + rng.random()) / 0.115) > 0.55
    chest += (0.05 - 0.0003 * age) * ribs * lungs
    if sex == "F":
        chest += 0.05 * (_ellipse(u - 0.2, v - 0.2, 0.15, 0.12, 0.1) + _ellipse(u + 0.2, v - 0.2, 0.15, 0.12, 0.1))
    return chest


def _ellipse(u: np.ndarray, v: np.ndarray, width: float, height: float, softness: float) -> np.ndarray:
    """1 inside, 0 outside, half way on the border."""
    return 1 / (1 + np.exp(np.clip((np.hypot(u / width, v / height) - 1) / softness, -30, 30)))


def _lung(u: np.ndarray, v: np.ndarray, side: int) -> np.ndarray:
    return _ellipse(u * side - 0.2, v + 0.02, 0.14, 0.31, 0.05)


def _step(values: np.ndarray, width: float = 0.012) -> np.ndarray:
    return 1 / (1 + np.exp(np.clip(-values / width, -30, 30)))


def _place(rng: np.random.Generator, side: int) -> tuple[float, float]:
    """A point well inside a lung."""
    angle, radius = rng.uniform(0, 2 * np.pi), np.sqrt(rng.random())
    return side * (0.2 + 0.06 * radius * np.cos(angle)), -0.03 + 0.17 * radius * np.sin(angle)


def _atelectasis(u, v, side, rng):  # two plates across the lower lung
    level, slope = rng.uniform(0.02, 0.1), rng.uniform(-0.3, 0.3)
    slanted = v - slope * (u * side - 0.2) - level
    plates = np.exp(-((slanted / 0.018) ** 2)) + np.exp(-(((slanted - 0.08) / 0.018) ** 2))
    return 0.42 * plates * _lung(u, v, side)


def _effusion(u, v, side, rng):  # fluid in the base, climbing the outer wall
    level = rng.uniform(0.06, 0.15) - 4 * np.maximum(u * side - 0.2, 0) ** 2
    return 0.36 * _step(v - level) * _lung(u, v, side)


def _infiltration(u, v, side, rng):  # blotches in one zone
    x, y = _place(rng, side)
    zone = np.exp(-(((u - x) / 0.1) ** 2) - ((v - y) / 0.13) ** 2)
    blotches = sum(
        np.exp(-(((u - x - a) ** 2 + (v - y - b) ** 2) / 0.02**2))
        for a, b in zip(rng.normal(0, 0.06, 14), rng.normal(0, 0.08, 14), strict=True)
    )
    return 0.42 * np.minimum(blotches + 0.25 * zone, 1.1) * _lung(u, v, side)


def _mass(u, v, side, rng):  # one large disc
    x, y = _place(rng, side)
    radius = rng.uniform(0.06, 0.08)
    return 0.42 * _ellipse(u - x, v - y, radius, radius * rng.uniform(0.85, 1.2), 0.1)


def _nodule(u, v, side, rng):  # one small bright disc
    x, y = _place(rng, side)
    return 0.55 * _ellipse(u - x, v - y, 0.03, 0.03, 0.15)


def _pneumonia(u, v, side, rng):  # a soft cloud, striped by air in the bronchi
    x, y = _place(rng, side)
    cloud = np.exp(-(((u - x) / 0.09) ** 2) - ((v - y) / 0.11) ** 2)
    stripes = np.cos(2 * np.pi * (u * side + 0.6 * v) / 0.075 + rng.uniform(0, 6))
    return 0.42 * cloud * (0.6 + 0.5 * stripes)


def _pneumothorax(u, v, side, rng):  # black air round a collapsed lung with a bright edge
    size = rng.uniform(0.68, 0.78)
    distance = np.hypot((u * side - 0.165) / (0.14 * size), (v - 0.05) / (0.31 * size))
    edge = np.exp(-(((distance - 1) / 0.09) ** 2))
    return (0.3 * edge - 0.3 * _step(distance - 1.1, 0.05)) * _lung(u, v, side)


def _consolidation(u, v, side, rng):  # a solid upper lobe with a sharp lower border
    level = rng.uniform(-0.13, -0.05) + rng.uniform(-0.2, 0.2) * (u * side - 0.2)
    return 0.36 * _step(level - v) * _lung(u, v, side)


def _edema(u, v, side, rng):  # bat's wings round both roots
    del side
    reach = rng.uniform(0.075, 0.095)
    wings = np.exp(-(((np.abs(u) - 0.13) / reach) ** 2) - ((v + 0.02) / 0.13) ** 2)
    return 0.34 * wings * (_lung(u, v, 1) + _lung(u, v, -1))


def _fibrosis(u, v, side, rng):  # a net in both bases
    del side
    a, b = rng.uniform(0, 6, 2)
    net = np.maximum(np.cos(2 * np.pi * (u + v) / 0.1 + a), np.cos(2 * np.pi * (u - v) / 0.1 + b))
    return 0.34 * np.maximum(net, 0) * _step(v - rng.uniform(-0.05, 0.03), 0.03) * (_lung(u, v, 1) + _lung(u, v, -1))


def _pleural_thickening(u, v, side, rng):  # a rind on the outer wall
    distance = np.hypot((u * side - 0.2) / 0.14, (v + 0.02) / 0.31)
    rind = np.exp(-(((distance - 0.88) / 0.11) ** 2))
    return 0.42 * rind * _step(u * side - 0.22) * _step(0.16 - np.abs(v + rng.uniform(-0.04, 0.08)), 0.03)


def _hernia(u, v, side, rng):  # a ring with gas in it, low in the middle
    x, y = side * rng.uniform(0.0, 0.04), rng.uniform(0.2, 0.25)
    disc = _ellipse(u - x, v - y, 0.1, 0.085, 0.08)
    return 0.3 * disc - 0.75 * _ellipse(u - x, v - y, 0.065, 0.05, 0.15)


def _cardiomegaly(u, v, side, rng):  # the heart is drawn larger with the chest; this only marks its place
    del side, rng
    return 0.02 * _ellipse(u - 0.03, v - 0.13, 0.17, 0.14, 0.08)


def _emphysema(u, v, side, rng):  # so are the lungs, and darker
    del side, rng
    return -0.02 * (_lung(u, v, 1) + _lung(u, v, -1))


PATTERNS = {
    "Atelectasis": _atelectasis,
    "Cardiomegaly": _cardiomegaly,
    "Effusion": _effusion,
    "Infiltration": _infiltration,
    "Mass": _mass,
    "Nodule": _nodule,
    "Pneumonia": _pneumonia,
    "Pneumothorax": _pneumothorax,
    "Consolidation": _consolidation,
    "Edema": _edema,
    "Emphysema": _emphysema,
    "Fibrosis": _fibrosis,
    "Pleural_Thickening": _pleural_thickening,
    "Hernia": _hernia,
}


def _box_around(change: np.ndarray) -> tuple[float, float, float, float]:
    strong = np.abs(change) > 0.4 * np.abs(change).max()
    rows, columns = np.flatnonzero(strong.any(axis=1)), np.flatnonzero(strong.any(axis=0))
    pixel = ORIGINAL / len(change)
    x, y = columns[0] * pixel, rows[0] * pixel
    return x, y, (columns[-1] + 1) * pixel - x, (rows[-1] + 1) * pixel - y
