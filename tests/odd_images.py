"""Files that stand where a radiograph should: what a user may come across, and what has to be said of each."""

import os
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

GREY = np.random.default_rng(8).integers(0, 256, (40, 50), np.uint8)

READ = ("palette.png", "one.png", "jpeg.png", "png.jpg", "cmyk.jpg", "phone.jpg")
REFUSED = {
    "cut.png": "cannot be decoded",
    "cut.jpg": "cannot be decoded",
    "empty.png": r"is empty \(0 bytes\)",
    "text.png": "is no PNG, JPEG or DICOM file",
    "gif.png": "is no PNG, JPEG or DICOM file",
    "deep.png": "has 16 bits a channel",
    "deep-alpha.png": "has 16 bits a channel",
    "bomb.png": "claims 400,000,000 pixels",
    "bomb.jpg": "claims 400,000,000 pixels",
    "large.png": "claims 144,000,000 pixels",
    "bytes.png": "has 3,000,000,000 bytes, more than",
    "film.png": "is an animation of 2 pictures",
    "folder.png": "is a folder",
    "fifo.png": "is a device, a FIFO or a socket",
    "device.png": "is a device, a FIFO or a socket",
    "loop.png": "cannot be read",
    "gone.png": "does not exist",
}


def write_odd_images(folder: Path) -> None:
    """One file for each name of `READ` and `REFUSED`."""
    folder.mkdir(parents=True, exist_ok=True)
    grey = Image.fromarray(GREY)
    grey.convert("P").save(folder / "palette.png")
    grey.crop((0, 0, 1, 1)).save(folder / "one.png")
    grey.save(folder / "jpeg.png", "jpeg", quality=95)
    grey.save(folder / "png.jpg", "png")
    # As separations hold grey: black ink alone.
    Image.merge("CMYK", [Image.new("L", grey.size)] * 3 + [Image.fromarray(255 - GREY)]).save(
        folder / "cmyk.jpg", quality=95
    )
    # A second picture behind the first, as phones put a preview there.
    grey.save(folder / "phone.jpg", "mpo", save_all=True, append_images=[grey.resize((4, 4))], quality=95)

    grey.save(folder / "whole.png")
    grey.save(folder / "whole.jpg")
    for suffix in ("png", "jpg"):
        whole = folder / f"whole.{suffix}"
        (folder / f"cut.{suffix}").write_bytes(whole.read_bytes()[:900])
        whole.unlink()
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no image")
    grey.save(folder / "gif.png", "gif")
    Image.fromarray(GREY.astype(np.uint16) * 16).save(folder / "deep.png")
    _write_png(folder / "deep-alpha.png", 2, 1, depth=16, colour=4, rows=[b"\0" + bytes(8)])
    # The real thing: 20,000 rows that decompress to 400 MB.
    _write_png(folder / "bomb.png", 20_000, 20_000, depth=8, colour=0, rows=[bytes(20_001)] * 20_000)
    _write_png(folder / "large.png", 12_000, 12_000, depth=8, colour=0, rows=[bytes(12_001)] * 12_000)
    jpeg = bytearray((folder / "jpeg.png").read_bytes())
    frame = jpeg.index(b"\xff\xc0") + 5  # behind the marker, its length and the bits a sample
    jpeg[frame : frame + 4] = (20_000).to_bytes(2, "big") * 2
    (folder / "bomb.jpg").write_bytes(jpeg)
    with (folder / "bytes.png").open("wb") as file:
        file.truncate(3_000_000_000)  # a hole, which takes no room
    grey.save(folder / "film.png", save_all=True, append_images=[Image.fromarray(255 - GREY)])
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "fifo.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to("loop.png")


def _write_png(path: Path, width: int, height: int, *, depth: int, colour: int, rows: list[bytes]) -> None:
    header = b"".join(number.to_bytes(4, "big") for number in (width, height)) + bytes([depth, colour, 0, 0, 0])
    packer = zlib.compressobj(1)
    packed = b"".join([packer.compress(row) for row in rows]) + packer.flush()
    content = b"\x89PNG\r\n\x1a\n"
    for name, chunk in ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")):
        content += len(chunk).to_bytes(4, "big") + name + chunk + zlib.crc32(name + chunk).to_bytes(4, "big")
    path.write_bytes(content)
