"""Fuzzing of images: files of every format that Pillow writes, changed at random.

    python tests/fuzz/fuzz_images.py --seconds 600 --seed 1

Any exception but InvalidRequest, a file that takes over two seconds, or memory beyond what its
pixels may need, is a finding: the file is kept in the folder given by --findings, and
`python tests/fuzz/fuzz_images.py FILE` reads it again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from squall.errors import InvalidRequest
from squall.vision.images import Media, read

MAX_SECONDS = 2.0
# A million pixels in a few copies, beside Python, NumPy and Pillow.
MAX_MIB = 400
RULES = Media(pixels=2**20, seconds=1.5)
WORDS = [bytes([b]) * n for b in (0, 1, 0x7F, 0x80, 0xFF) for n in (1, 2, 4)]
WORDS += [struct.pack(order + "I", n) for n in (2**15, 2**24, 2**31 - 1) for order in "<>"]


def seeds() -> Iterator[bytes]:
    """Files of every format and mode, with metadata, frames and transparency; also refused ones."""
    noise = np.random.default_rng(5).integers(0, 256, (12, 17, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "what it shows"
    more: list[dict[str, Any]] = [
        {}, {"exif": exif}, {"save_all": True, "append_images": [Image.new("RGB", (17, 12))]},
        {"transparency": 3}, {"progressive": True}, {"lossless": True}, {"compression": "tiff_lzw"},
    ]  # fmt: skip
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "MPO", "TIFF", "PPM", "JPEG2000", "ICO"):
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"):
            image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
            if mode != "I;16":
                image = Image.fromarray(noise, "RGBA").convert(mode)
            for options in more:
                file = io.BytesIO()
                with contextlib.suppress(Exception):  # what a format has no modes or options for
                    image.save(file, kind, **options)
                    yield file.getvalue()


def changed(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """A file with some bytes replaced, left out, repeated, or from another one."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, size = rng.randrange(len(made) + 1), rng.choice((1, 2, 4, 16, 64))
        other = rng.choice(others)
        begin = rng.randrange(len(other) + 1)
        new = rng.choice(
            (b"", rng.randbytes(size), rng.choice(WORDS), other[begin : begin + size],
             bytes(made[at : at + size]) * 2)
        )  # fmt: skip
        made[at : at + rng.choice((0, len(new), size))] = new
    if rng.random() < 0.1:
        del made[rng.randrange(len(made) + 1) :]
    return with_checksums(made) if rng.random() < 0.8 else bytes(made)


def with_checksums(data: bytearray) -> bytes:
    """A PNG whose chunks have the right ones, so that what is in them is read."""
    at = 8
    while data.startswith(b"\x89PNG") and at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


def check(data: bytes) -> bool:
    """Whether it is an image."""
    start_s = time.thread_time()
    found = False
    with contextlib.suppress(InvalidRequest):
        image = read(data, RULES)
        found = image.mode == "RGB" and image.width * image.height <= RULES.pixels
        assert found
    seconds = time.thread_time() - start_s
    assert seconds < MAX_SECONDS, f"it took {seconds:.1f} s"
    # Not ru_maxrss: that starts at the resident size of the process that started this one.
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line) >> 10
    assert peak < MAX_MIB, f"{peak} MiB were needed"
    return found


def fuzz(seconds: float, seed: int, findings: Path) -> None:
    """Ends with an error at the first finding."""
    rng, corpus = random.Random(seed), list(seeds())
    end_s = time.monotonic() + seconds
    count = images = 0
    while time.monotonic() < end_s:
        data = changed(rng.choice(corpus), rng, corpus)
        try:
            images += check(data)
        except BaseException:
            path = findings / f"image-{seed}-{count}"
            path.write_bytes(data)
            sys.stderr.write(f"kept as {path}\n")
            raise
        count += 1
    sys.stderr.write(f"{count} files, of which {images} are images\n")
    assert 0 < images < count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", nargs="*", type=Path, help="read these files and do not fuzz")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    for path in args.inputs:
        check(path.read_bytes())
    if not args.inputs:
        fuzz(args.seconds, args.seed, args.findings)


if __name__ == "__main__":
    main()
