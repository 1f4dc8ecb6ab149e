"""Images from every source and in every mode, as transformers has them; and what is refused."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from squall.errors import InvalidRequest
from squall.vision.images import OWN, Media, digest, read, read_all

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "F")
FILES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"), "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"), "GIF": ("L", "P", "RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
}  # fmt: skip


def picture(mode: str = "RGB", size: tuple[int, int] = (13, 7)) -> Image.Image:
    """A picture in which every pixel is its own."""
    rng = np.random.default_rng(5)
    made = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 4), np.uint8), "RGBA")
    return made if mode == "RGBA" else made.convert("PA" if mode == "PA" else mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def same(found: Image.Image, wanted: Image.Image) -> bool:
    return found.mode == wanted.mode == "RGB" and np.array_equal(found, wanted)


def oracle(path: Path) -> Image.Image:
    from transformers.image_utils import load_image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_image(str(path))


@pytest.mark.parametrize(("kind", "mode"), [(k, m) for k, modes in FILES.items() for m in modes])
def test_files_are_read_as_transformers_does(tmp_path: Path, kind: str, mode: str) -> None:
    path = tmp_path / "a"
    image = picture("RGB") if (kind, mode) == ("WEBP", "P") else picture(mode)
    path.write_bytes(encoded(image, kind))
    assert same(read(path), oracle(path))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_is_turned_as_transformers_does(tmp_path: Path, kind: str, orientation: int) -> None:
    path, exif = tmp_path / "a", Image.Exif()
    exif[0x0112] = orientation
    path.write_bytes(encoded(picture(), kind, exif=exif))
    assert same(read(path), oracle(path))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {"transparency": 3}),
        ("PNG", {"transparency": bytes(range(256))}),
        ("GIF", {"transparency": 3}),
        ("PNG", {"save_all": True, "append_images": [picture().rotate(180)]}),
        ("GIF", {"save_all": True, "append_images": [picture().rotate(180)]}),
        ("WEBP", {"save_all": True, "append_images": [picture().rotate(180)]}),
        ("MPO", {"save_all": True, "append_images": [picture().rotate(180)]}),
        ("JPEG", {"progressive": True}),
    ],
)
def test_transparency_and_first_frames(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    path = tmp_path / "a"
    image = picture("P" if "transparency" in options else "RGB")
    path.write_bytes(encoded(image, kind, **options))
    assert same(read(path), oracle(path))


@pytest.mark.parametrize("mode", MODES)
def test_images_of_pillow(mode: str) -> None:
    image = picture(mode)
    before = image.tobytes()
    assert same(read(image), image.convert("RGB"))
    assert image.tobytes() == before


@pytest.mark.parametrize("form", ["I;16", "I", "PNG"])
def test_grey_of_16_bits_is_scaled(form: str) -> None:
    """Where a plain conversion makes nearly all of it white."""
    wide = np.linspace(0, 65535, 35, dtype=np.uint16).reshape(5, 7)
    image: Any = Image.fromarray(wide.astype(np.int32) if form == "I" else wide)
    found = read(encoded(image) if form == "PNG" else image)
    wanted = np.rint(wide / 257).astype(np.uint8)
    assert np.array_equal(np.asarray(found), np.stack([wanted] * 3, -1))


SOURCES: dict[str, Callable[[bytes, Path], Any]] = {
    "bytes": lambda data, _: data,
    "bytearray": lambda data, _: bytearray(data),
    "path": lambda _, path: path,
    "path as a text": lambda _, path: str(path),
    "file URL": lambda _, path: path.as_uri(),
    "file URL of this machine": lambda _, path: f"file://localhost{path}",
    "relative path": lambda _, path: os.path.relpath(path),
    "base64": lambda data, _: base64.b64encode(data).decode(),
    "unpadded": lambda data, _: base64.b64encode(data).decode().rstrip("="),
    "for URLs": lambda data, _: base64.urlsafe_b64encode(data).decode(),
    "in lines": lambda data, _: base64.encodebytes(data).decode().replace("\n", " \r\n\t"),
    "data URI": lambda data, _: f"data:image/png;base64,{base64.b64encode(data).decode()}",
    "data URI of no type": lambda data, _: f"data:;base64,{base64.b64encode(data).decode()}",
    "DATA URI": lambda data, _: f"DATA:image/x;a=b;BASE64,{base64.b64encode(data).decode()}",
    "quoted base64": lambda data, _: f"data:a;base64,{quote(base64.b64encode(data), safe='')}",
    "quoted bytes": lambda data, _: f"data:image/png,{quote(data)}",
    "array": lambda *_: np.asarray(picture()),
    "floats": lambda *_: np.asarray(picture(), np.float32) / 255,
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_image(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a picture's file"
    path.write_bytes(encoded(picture()))
    found = read(SOURCES[name](path.read_bytes(), path))
    assert same(found, picture())
    assert digest(found) == digest(picture())


@pytest.mark.parametrize("channels", [(), (1,), (3,), (4,)])
def test_arrays_of_all_channels(channels: tuple[int, ...]) -> None:
    array = np.arange(6 * (channels or (1,))[0], dtype=np.uint8).reshape(2, 3, *channels)
    found = np.asarray(read(array))
    wanted = array if channels in ((3,), (4,)) else np.stack([array.reshape(2, 3)] * 3, -1)
    assert np.array_equal(found, wanted[..., :3])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 4, 5), np.uint8), np.zeros(3, np.uint8), np.zeros((0, 3), np.uint8),
        np.zeros((3, 3), np.int64), np.full((3, 3), 1.5), np.full((3, 3), np.nan),
        np.zeros((3, 3), bool), np.array([["a"]]), np.array([[None]]),
    ],
)  # fmt: skip
def test_arrays_that_are_no_images(array: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"array of .* must have height, width"):
        read(array)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG of so many pixels, of which there are none."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bombs() -> dict[str, bytes]:
    """A small file of every format that says it is of very many pixels."""
    small = picture(size=(8, 8))
    gif, bmp, webp = (bytearray(encoded(small, kind)) for kind in ("GIF", "BMP", "WEBP"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    frame = bytearray(encoded(small, "GIF"))
    at = frame.index(b",\0\0\0\0\x08\0\x08\0")
    frame[at + 5 : at + 9] = struct.pack("<HH", 65000, 65000)
    bmp[18:26] = struct.pack("<ii", 50000, 50000)
    head = b"VP8X" + struct.pack("<II", 10, 0x10) + b"\xff\xff\x0f" * 2
    webp = bytearray(b"RIFF" + struct.pack("<I", len(webp) + 10) + b"WEBP" + head) + webp[12:]
    jpeg = bytearray(encoded(small, "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 65500, 65500)
    return {
        "png": bomb(50000, 50000, zlib.compress(bytes(10**6))), "gif": bytes(gif),
        "frame": bytes(frame), "bmp": bytes(bmp), "webp": bytes(webp), "jpeg": bytes(jpeg),
        "wide": bomb(100_000, 1), "high": bomb(1, 100_000), "huge": bomb(2**31 - 1, 2**31 - 1),
    }  # fmt: skip


@pytest.mark.parametrize("name", bombs())
def test_decompression_bombs(name: str) -> None:
    """Refused by what their headers say, before there is room for a pixel."""
    tracemalloc.start()
    with pytest.raises(InvalidRequest, match=r"too large|damaged"):
        read(bombs()[name])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


def test_sizes_are_checked_of_everything() -> None:
    few = replace(OWN, pixels=100)
    for source in (encoded(picture(size=(10, 11))), picture(size=(10, 11)), np.zeros((11, 10))):
        with pytest.raises(InvalidRequest, match="100 pixels"):
            read(source, few)
    assert read(picture(size=(10, 10)), few).size == (10, 10)
    with pytest.raises(InvalidRequest, match="empty"):
        read(Image.new("RGB", (0, 5)))
    with pytest.raises(InvalidRequest, match="an edge of 12"):
        read(picture(), replace(OWN, edge=12))
    with pytest.raises(InvalidRequest, match="more than the 50 bytes"):
        read(encoded(picture()), replace(OWN, file_bytes=50))


@pytest.mark.parametrize("kind", FILES)
def test_truncated_files(kind: str) -> None:
    data = encoded(picture(size=(60, 50)), kind)
    for size in (*range(1, 60), len(data) // 2, len(data) - 40):
        with pytest.raises(InvalidRequest, match=r"damaged, or was cut|unknown kind"):
            read(data[:size])


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b'<?xml version="1.0"?><svg/>', "SVG"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"\n<html>404</html>", "a web page"),
        (b"%PDF-1.7", "PDF"),
        (encoded(picture(), "TIFF"), "TIFF"),
        (encoded(picture(), "JPEG2000"), "JPEG 2000"),
        (b"\0\0\0\x1cftypavif", "AVIF"),
        (b"\0\0\0\x1cftypheic", "HEIF"),
        (encoded(picture(), "PPM"), "of an unknown kind"),
        (encoded(picture(), "ICO"), "of an unknown kind"),
        (b"SIMPLE  =  T" + bytes(3000), "of an unknown kind"),
        (b"", "empty"),
    ],
)
def test_other_formats_are_named(data: bytes, name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"image is {name}.*send a PNG, JPEG, WebP, GIF"):
        read(data)


@pytest.mark.parametrize("source", [None, 3, [1], {"url": "x"}, 1.5, True])
def test_what_is_no_source(source: object) -> None:
    with pytest.raises(InvalidRequest, match=r"is given as .*; give a URL, path"):
        read(source)


@pytest.mark.parametrize(
    "source", ["ftp://a/b.png", "no such file.png", "data:;base64,%", "\0", "file://[x", "é"]
)
def test_texts_that_are_no_sources(source: str) -> None:
    with pytest.raises(InvalidRequest, match=r"it must be an http, https or data: URL"):
        read(source)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of images that may be read, with ways out of it."""
    made = tmp_path / "media"
    (made / "in").mkdir(parents=True)
    for path in (made / "a b.png", made / "in/b.png", tmp_path / "secret.png"):
        path.write_bytes(encoded(picture()))
    (made / "out.png").symlink_to(tmp_path / "secret.png")
    (made / "up").symlink_to(tmp_path)
    (made / "near.png").symlink_to(made / "in/b.png")
    (tmp_path / "media2").mkdir()
    (tmp_path / "media2/c.png").write_bytes(encoded(picture()))
    os.mkfifo(made / "pipe")
    return made


@pytest.mark.parametrize(
    "source",
    ["a b.png", "file:a%20b.png", "file://in/b.png", "in//b.png", "near.png", "file:{}/in/b.png"],
)
def test_files_in_the_folder(folder: Path, source: str) -> None:
    assert same(read(source.format(folder), Media(folder=folder)), picture())


@pytest.mark.parametrize(
    "source",
    [
        "../secret.png", "file:../secret.png", "file://../secret.png", "in/../../secret.png",
        "{0}/../secret.png", "file:{0}/../secret.png", "file:%2e%2e/secret.png", "up/secret.png",
        "file:%2e%2e%2fsecret.png", "out.png", "/etc/passwd", "//etc/passwd", "file:///etc/passwd",
        "file:////etc/passwd", "file://localhost/etc/passwd", "file:///proc/self/environ",
        "../media2/c.png", "{0}2/c.png", "in", "pipe", ".", "", "file:", "file://", "a\0b",
        "file:%00", "/dev/zero", "x" * 5000,
    ],
)  # fmt: skip
def test_files_elsewhere(folder: Path, source: str) -> None:
    given = source.format(folder)
    for form in (given, Path(given)):
        with pytest.raises(InvalidRequest) as caught:
            read(form, Media(folder=folder))
        assert "{" in source or str(folder.parent) not in str(caught.value)


def test_there_and_not_there_are_one_error(folder: Path) -> None:
    """Nobody learns which files there are."""
    told = set()
    for name in ("secret.png", "absent.png"):
        with pytest.raises(InvalidRequest) as caught:
            read(f"file:../{name}", Media(folder=folder))
        told.add(str(caught.value).replace(name, ""))
    assert len(told) == 1


@pytest.mark.parametrize("source", ["{}/a b.png", "file:{}/a%20b.png", "http://127.0.0.1/a.png"])
def test_nothing_is_allowed_by_default(folder: Path, source: str) -> None:
    with pytest.raises(InvalidRequest):
        read(source.format(folder), Media())
    assert same(read(encoded(picture()), Media()), picture())


def test_rules_are_checked(tmp_path: Path) -> None:
    for host in ("http://a.org", "a.org/", "", "A.org", "a b", "a:b", "a@b"):
        with pytest.raises(InvalidRequest, match="no host of URLs; give"):
            Media(hosts=(host,))
    with pytest.raises(InvalidRequest, match="there is no folder"):
        Media(folder=tmp_path / "absent")


def test_many_images() -> None:
    found = list(read_all([picture(), encoded(picture())]))
    assert all(same(image, picture()) for image in found)
    with pytest.raises(InvalidRequest, match="there are 17 images; at most 16"):
        next(read_all([picture()] * 17))


def test_decoding_ends_in_time() -> None:
    with pytest.raises(InvalidRequest, match="longer than 1e-09 s"):
        read(encoded(picture()), replace(OWN, seconds=1e-9))
    data = b"GIF89a" + bytes(7) + (b"!\xfe" + b"\x01a" * 10**6)  # a comment a byte at a time
    with pytest.raises(InvalidRequest, match=r"longer than 0\.1 s"):
        read(data, replace(OWN, seconds=0.1))


@pytest.mark.serial
def test_many_scans_of_a_jpeg_end_in_time() -> None:
    """Each goes over all of the image, and is a few bytes."""
    file = io.BytesIO()
    Image.new("L", (2000, 2000)).save(file, "JPEG", progressive=True, quality=10)
    data = file.getvalue()
    at = data.rindex(b"\xff\xda")
    many = data[:at] + data[at:-2] * 20_000 + data[-2:]
    start_s = time.monotonic()
    with pytest.raises(InvalidRequest, match=r"longer than 0\.2 s"):
        read(many, replace(OWN, seconds=0.2))
    assert time.monotonic() - start_s < 5  # of over twenty


def test_errors_and_warnings_say_nothing_of_the_process(capfd: pytest.CaptureFixture[str]) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x02\0\xff\xff\0\0\xff\0\0\0" * 9
    odd = [
        encoded(picture(), "JPEG", exif=exif), encoded(picture("P"), transparency=bytes(9)),
        bomb(10000, 10000), encoded(picture())[:-30],
    ]  # fmt: skip
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for data in odd:
            with contextlib.suppress(InvalidRequest):
                read(data)
    assert not told
    assert capfd.readouterr() == ("", "")


def test_digests_tell_images_apart() -> None:
    flat = np.zeros((2, 6, 3), np.uint8)
    images = [flat, flat.reshape(6, 2, 3), flat + 1, flat.reshape(3, 4, 3)]
    assert len({digest(read(image)) for image in images}) == 4
    assert len(digest(read(flat))) == 32


def test_mutated_images_are_images_or_errors() -> None:
    rng = random.Random(7)
    for kind in FILES:
        data = bytearray(encoded(picture(), kind))
        for _ in range(60):
            made = data[:]
            for _ in range(rng.randint(1, 6)):
                made[rng.randrange(len(made))] = rng.randrange(256)
            with contextlib.suppress(InvalidRequest):
                assert read(bytes(made)).mode == "RGB"


def test_nothing_is_imported_before_it_is_needed() -> None:
    code = "import sys, squall.vision.images; print({'PIL', 'httpx', 'httpcore'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_escapes_are_few() -> None:
    """Millions of them would take gigabytes, and keep other threads waiting for seconds."""
    data = base64.b64encode(encoded(picture(size=(3, 2)))).decode()
    escaped = "".join(f"%{ord(letter):02x}" for letter in data)
    assert read(f"data:image/png;base64,{escaped}").size == (3, 2)
    for head in ("data:image/png;base64,", "data:,"):
        with pytest.raises(InvalidRequest, match="more than 262144 escapes with %; send base64"):
            read(head + "%41" * 2**19)
    with pytest.raises(InvalidRequest, match="an image is"):
        read("file:" + "%2e" * 2**22)
