"""One image at a time: every file is read as Pillow reads it, damage is named, and sizes are exact averages."""

import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from odd_images import GREY, READ, REFUSED, write_odd_images
from PIL import Image

from workbench import WorkbenchError
from workbench.data import radiographs

NIH = Path(__file__).resolve().parents[1].parent / "shared" / "nih"


def test_radiographs_become_grey_and_alpha_is_ignored(tmp_path):
    colour = np.zeros((4, 6, 4), np.uint8)
    colour[..., :3] = 200
    colour[..., 3] = 7
    colour[0, 0, :3] = 255, 0, 0
    Image.fromarray(colour, "RGBA").save(tmp_path / "rgba.png")
    grey = radiographs.read_radiograph(tmp_path / "rgba.png")
    assert grey.shape == (4, 6)
    assert grey.dtype == np.uint8
    assert grey[1, 1] == 200
    assert grey[0, 0] == 76  # ITU-R 601: 0.299 × 255


def read_with_pillow(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").convert("L"))


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (64, 64), (100, 300)])
def test_every_kind_of_png_is_read_as_pillow_reads_it(tmp_path, mode, shape):
    rng = np.random.default_rng(shape[0])
    # Smooth above, noise below: the encoder then takes different filters for different rows.
    colour = np.add.outer(np.arange(shape[0]), np.arange(shape[1]))[..., None] + rng.integers(0, 9, (*shape, 4))
    colour[shape[0] // 2 :] = rng.integers(0, 256, colour[shape[0] // 2 :].shape)
    Image.fromarray(colour.astype(np.uint8), "RGBA").convert(mode).save(tmp_path / "image.png")
    pixels = radiographs.read_radiograph(tmp_path / "image.png")
    np.testing.assert_array_equal(pixels, read_with_pillow(tmp_path / "image.png"))


def test_a_transparent_grey_level_and_a_jpeg_under_the_name_of_a_png(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8))
    image.save(tmp_path / "transparent.png", transparency=5)
    image.save(tmp_path / "jpeg.png", "jpeg")
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(radiographs.read_radiograph(path), read_with_pillow(path))


def test_a_damaged_png_is_refused_or_read_as_pillow_reads_it(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.png"
    Image.fromarray(rng.integers(0, 256, (12, 12), np.uint8)).save(path)
    whole, refused = path.read_bytes(), 0
    damaged = [whole[:length] for length in range(len(whole))]
    for place in range(len(whole)):
        damaged.append(bytearray(whole))
        damaged[-1][place] ^= 1 << rng.integers(8)
    for content in damaged:
        path.write_bytes(content)
        try:
            pixels = radiographs.read_radiograph(path)
        except WorkbenchError:
            refused += 1
        else:
            np.testing.assert_array_equal(pixels, read_with_pillow(path))
    assert refused > len(damaged) * 0.8


def test_an_absurd_size_is_refused(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "huge.png")
    content = bytearray((tmp_path / "huge.png").read_bytes())
    content[16:24] = b"\0\1\0\0" * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "huge.png").write_bytes(content)
    with pytest.raises(WorkbenchError, match=r"huge.png` claims 4,294,967,296 pixels, more than"):
        radiographs.read_radiograph(tmp_path / "huge.png")


def test_unreadable_radiographs_are_named(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1000])
    Image.fromarray(pixels.astype(np.uint16) * 100).save(tmp_path / "deep.png")
    for name, message in (("cut", "cannot be decoded"), ("deep", "16 bits a channel"), ("gone", "does not exist")):
        with pytest.raises(WorkbenchError, match=f"{name}.png` .*{message}|{name}.png` {message}"):
            radiographs.read_radiograph(tmp_path / f"{name}.png")


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    write_odd_images(folder)
    return folder


def read_as_for_prediction(path):
    radiographs.refuse_colour(path)
    return radiographs.read_radiograph(path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("read", [radiographs.read_radiograph, read_as_for_prediction])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_radiograph_is_refused_in_one_sentence_at_once(odd, name, read):
    with pytest.raises(WorkbenchError, match=rf"^`\S+/{name}` .*{REFUSED[name]}[^\n]*[.?]$") as told:
        read(odd / name)
    assert "BytesIO" not in str(told.value)
    assert radiographs.find_faults([str(odd / name)]) == [str(told.value)]


@pytest.mark.parametrize("name", READ)
def test_odd_files_that_hold_a_radiograph_are_read(odd, name):
    expected = GREY[:1, :1] if name == "one.png" else GREY
    pixels = radiographs.read_radiograph(odd / name)
    assert pixels.shape == expected.shape
    # Noise is the worst that a JPEG can be given.
    assert np.abs(pixels.astype(int) - expected).mean() < (6 if name in ("jpeg.png", "cmyk.jpg", "phone.jpg") else 0.01)


def test_a_bomb_takes_no_memory(odd):
    code = (
        "import resource, sys; from workbench import WorkbenchError; from workbench.data import radiographs\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "radiographs.read_radiograph(sys.argv[1] + '/palette.png'); before = used()\n"
        "for name in ('bomb.png', 'bomb.jpg', 'large.png', 'bytes.png'):\n"
        "    for read in (radiographs.read_radiograph, radiographs.refuse_colour):\n"
        "        try: read(sys.argv[1] + '/' + name)\n"
        "        except WorkbenchError: pass\n"
        "print(used() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(odd)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60, "MiB"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_file_without_permission_is_refused_by_name(odd, tmp_path):
    shutil.copy(odd / "palette.png", tmp_path / "secret.png")
    (tmp_path / "secret.png").chmod(0)
    code = (
        "import os, sys; from workbench.data import radiographs; path = sys.argv[1]\n"
        "os.chdir(os.path.dirname(path)); os.setgid(65534); os.setuid(65534)\n"
        "print(radiographs.find_faults([os.path.basename(path)])[0])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "secret.png")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told == "`secret.png` cannot be read (Permission denied): check its permissions and the disk.\n"


@pytest.mark.nih
@pytest.mark.skipif(not NIH.is_dir(), reason=f"no sample of real radiographs at {NIH}")
def test_real_originals_are_read_as_pillow_reads_them_and_agree_with_their_averages():
    paths = sorted((NIH / "images").glob("*.png"))
    modes = {}
    for path in paths:
        with Image.open(path) as image:
            modes.setdefault(image.mode, path)
    assert set(modes) == {"L", "RGBA"}
    for path in [*modes.values(), *paths[::10]]:
        pixels = radiographs.read_radiograph(path)
        assert pixels.shape == (1024, 1024)
        np.testing.assert_array_equal(pixels, read_with_pillow(path))
        small = radiographs.read_radiograph(NIH / "images_256" / path.name)
        assert np.abs(radiographs.resize_radiograph(pixels, 256).astype(int) - small).max() <= 1


@pytest.mark.parametrize(("source", "target"), [(96, 24), (96, 72), (96, 64), (30, 7), (64, 18)])
def test_shrinking_averages_the_exact_area(source, target):
    pixels = np.random.default_rng(2).integers(0, 256, (source, source)).astype(np.uint8)
    factor = np.lcm(source, target)
    fine = np.kron(pixels, np.ones((factor // source,) * 2))
    block = factor // target
    exact = fine.reshape(target, block, target, block).mean((1, 3))
    np.testing.assert_array_equal(radiographs.resize_radiograph(pixels, target), np.floor(exact + 0.5 + 1e-9))


@pytest.mark.parametrize("level", [0, 1, 255])
def test_an_even_image_stays_even_however_large(level):
    pixels = np.full((2999, 1024), level, np.uint8)
    assert (radiographs.resize_radiograph(pixels, 288) == level).all()


def test_other_shapes_and_sizes():
    pixels = np.full((40, 60), 9, np.uint8)
    assert radiographs.resize_radiograph(pixels, 16).tolist() == [[9] * 16] * 16
    assert radiographs.resize_radiograph(pixels, 100).shape == (100, 100)
    assert radiographs.resize_radiograph(pixels[:, :40], 40).base is pixels


def test_the_processes_that_decode_import_neither_pandas_nor_tensorflow():
    code = "import sys\nfrom workbench.data import radiographs\nprint({'pandas', 'tensorflow'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
