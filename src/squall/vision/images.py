"""Images as models read them, RGB and upright, from wherever they are, within limits.

The pixels are those of transformers' `load_image`: Pillow's `convert("RGB")`, which leaves alpha
out. Only grey of 16 bits, which that would clip, is scaled.
"""

from __future__ import annotations

import binascii
import hashlib
import io
import os
import re
import stat
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from numpy.typing import NDArray

from squall.errors import InvalidRequest
from squall.files import quote

if TYPE_CHECKING:
    from PIL.Image import Image

# By Pillow's names: what people send, and whose decoders are small. How each file begins.
_KINDS = {
    "Png": rb"\x89PNG\r\n\x1a\n", "Jpeg": rb"\xff\xd8\xff", "WebP": rb"RIFF....WEBP",
    "Gif": rb"GIF8[79]a", "Bmp": rb"BM",
}  # fmt: skip
_ALLOWED = "a PNG, JPEG, WebP, GIF or BMP file"
_OTHERS = {
    rb"\s*<(!doctype )?html": "a web page", rb"\s*<": "SVG or XML", rb"%PDF": "PDF",
    rb"II\*\0|MM\0\*": "TIFF", rb"....ftypavi": "AVIF", rb"....ftyp": "HEIF or a video",
    rb"....jP  |\xff\x4f\xff\x51": "JPEG 2000", rb"\Z": "empty",
}  # fmt: skip
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s\[\]:/@A-Z]+)(:\d{1,5})?")
_BASE64 = re.compile(r"[A-Za-z0-9+/_=\s-]*")
_FILE = re.compile("file:(//(localhost(?=/))?)?", re.IGNORECASE)
_MOST_PATH = 4096  # characters
_MOST_ESCAPES = 2**18
_LINES = 64
# Pillow's transpositions that set right what EXIF says of how the camera was held.
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
_ORIENTATION = 0x0112
# Each may take some hundreds of MiB.
_DECODING = threading.BoundedSemaphore(2)
_QUIET = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Media:
    """Where images may come from, and how large they may be.

    hosts: of URLs: `example.org`, `.example.org` for what is below it, or "*", each for the ports
        80 and 443, or with `:PORT`. What is not public must be named: an IP address, `localhost`.
    folder: files within may be read; "/" is any, by paths from the current folder. None: none.
    images: of one prompt. file_bytes: of an image as it comes. redirects: of a URL.
    pixels: of an image, as many as phones' cameras make; edge: of its longer side.
    seconds: what reading all images of a prompt may take.
    """

    hosts: tuple[str, ...] = ()
    folder: Path | None = None
    images: int = 16
    file_bytes: int = 20 * 2**20
    redirects: int = 3
    pixels: int = 2**26
    edge: int = 2**15
    seconds: float = 30.0

    def __post_init__(self) -> None:
        for host in self.hosts:
            if not _HOST.fullmatch(host):
                what = 'a name, .NAME for what is below it, an IP address or "*", or one with :PORT'
                raise InvalidRequest(f"{host!r:.200} is no host of URLs; give {what}")
        if self.folder is not None and not self.folder.is_dir():
            raise InvalidRequest(f"images: there is no folder {str(self.folder)!r}")


class Clock:
    """What is left of the seconds that something may take."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._end_s = seconds, time.monotonic() + seconds

    def left_s(self) -> float:
        """Raises InvalidRequest once they are over."""
        left_s = self._end_s - time.monotonic()
        if left_s <= 0:
            raise InvalidRequest(f"images took longer than {self._seconds:g} s to read")
        return left_s


OWN = Media(hosts=("*",), folder=Path("/"))  # for who asks in this process


def read(source: object, media: Media = OWN) -> Image:
    """An image from a URL, path, data: URI, base64, bytes, NumPy array or image of Pillow's.

    Raises InvalidRequest.
    """
    return next(read_all([source], media))


def read_all(sources: Sequence[object], media: Media = OWN) -> Iterator[Image]:
    """The images of a prompt, one after the other, so that one at a time takes memory."""
    if len(sources) > media.images:
        raise InvalidRequest(f"there are {len(sources)} images; at most {media.images} are allowed")
    clock = Clock(media.seconds)
    for source in sources:
        yield _read(source, media, clock)


def digest(image: Image) -> bytes:
    """What tells an image from others: SHA-256 of mode, size and pixels."""
    found = hashlib.sha256(f"{image.mode} {image.size} ".encode())
    for top in range(0, image.height, _LINES):  # as other threads wait while bytes are copied
        box = 0, top, image.width, min(top + _LINES, image.height)
        found.update(image.crop(box).tobytes())
    return found.digest()


def _read(source: object, media: Media, clock: Clock) -> Image:
    from PIL import Image

    ready = isinstance(source, np.ndarray | Image.Image)
    data = b"" if ready else _data(source, media, clock)
    if len(data) > media.file_bytes:
        raise InvalidRequest(f"an image has more than the {media.file_bytes} bytes allowed")
    with _QUIET:  # about odd files; for good, as no thread may set filters back under others
        warnings.filterwarnings("ignore", module=r"PIL\.")
    with _DECODING:
        try:
            if isinstance(source, np.ndarray):
                image = _of_array(source)
            else:
                image = source if isinstance(source, Image.Image) else _opened(data, clock)
            if not 0 < image.width * image.height <= media.pixels or max(image.size) > media.edge:
                raise Image.DecompressionBombError
            image.load()
            return _upright_rgb(image)
        except InvalidRequest:
            raise
        except Image.DecompressionBombError:
            limits = f"at most {media.pixels} pixels and an edge of {media.edge} are allowed"
            raise InvalidRequest(f"an image is too large, or empty; {limits}") from None
        except Exception:  # whatever decoders raise; what they say may be about the process
            raise InvalidRequest("an image is damaged, or was cut; send the whole file") from None


class _Timed(io.BytesIO):
    """A file that decoders read part by part, while there is time."""

    def __init__(self, data: bytes, clock: Clock) -> None:
        super().__init__(data)
        self._clock = clock

    def read(self, size: int | None = -1, /) -> bytes:
        self._clock.left_s()
        return super().read(size)


def _opened(data: bytes, clock: Clock) -> Image:
    """A file's header read, and no pixel.

    Not by Image.open, which would try the plugins of other formats.
    """
    kind = next((k for k, magic in _KINDS.items() if re.match(magic, data, re.DOTALL)), None)
    if kind is None:
        flags = re.DOTALL | re.IGNORECASE
        other = (name for magic, name in _OTHERS.items() if re.match(magic, data[:1000], flags))
        raise InvalidRequest(f"an image is {next(other, 'of an unknown kind')}; send {_ALLOWED}")
    plugin = import_module(f"PIL.{kind}ImagePlugin")
    file = getattr(plugin, f"{kind}ImageFile")(_Timed(data, clock))
    file.decodermaxblock = 2**10  # bytes of a JPEG between two looks at the clock
    image: Image = file
    return image


def _of_array(array: NDArray[np.generic]) -> Image:
    from PIL.Image import fromarray

    right = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype.kind == "f" and array.size and array.min() >= 0 and array.max() <= 1:
        array = np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    if not (right and array.size and array.dtype == np.uint8):
        what = "height, width and maybe 1, 3 or 4 channels, of uint8, or of floats from 0 to 1"
        raise InvalidRequest(
            f"an image is an array of {array.dtype} {[*array.shape]}; it must have {what}"
        )
    return fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))


def _upright_rgb(image: Image) -> Image:
    from PIL.Image import Transpose, fromarray

    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # nothing but a picture's metadata is wrong
        turn = None
    if image.mode.startswith("I"):
        wide = np.asarray(image).clip(0, 65535).astype(np.uint32)
        wide *= 255  # in place: there may be many
        wide += 32767
        wide //= 65535
        image = fromarray(wide.astype(np.uint8))
    made = image.convert("RGB")
    made.info.clear()
    return made if turn is None else made.transpose(Transpose(turn))


def _data(source: object, media: Media, clock: Clock) -> bytes:
    """The file that a source is, or names."""
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if not isinstance(source, str | os.PathLike):
        kinds = "a URL, path, data: URI, base64, bytes, a NumPy array or an image of Pillow's"
        raise InvalidRequest(f"an image is given as {type(source).__name__}; give {kinds}")
    text = os.fsdecode(source)
    scheme = text[:20].partition(":")[0].lower() if isinstance(source, str) else ""
    if scheme in ("http", "https"):
        from squall.vision.fetching import fetch

        return fetch(text, media, clock)
    if scheme == "data":
        head, _, body = text.partition(",")
        if body.count("%") > _MOST_ESCAPES:  # each takes a hundred bytes while it is read
            what = f"an image's data: URL has more than {_MOST_ESCAPES} escapes with %"
            raise InvalidRequest(f"{what}; send base64, which needs none")
        whole = head[-7:].lower() != ";base64"
        found = unquote_to_bytes(body) if whole else _of_base64(unquote(body))
    elif scheme == "file":
        found = _of_file(unquote(_FILE.sub("", text[: 3 * _MOST_PATH])), media)
    else:
        found = _of_file(text, media)
        found = _of_base64(text) if found is None else found
    if found is None:
        kinds = "an http, https or data: URL" + (", a file" if media.folder else "") + ", or base64"
        raise InvalidRequest(f"an image is {quote(text)}; it must be {kinds}")
    return found


def _of_base64(text: str) -> bytes | None:
    """Also without padding, with spaces, or of the alphabet for URLs; None for what is none."""
    if not _BASE64.fullmatch(text[:1000]):
        return None
    try:
        return binascii.a2b_base64(text.replace("-", "+").replace("_", "/") + "==")
    except ValueError:
        return None


def _of_file(path: str, media: Media) -> bytes | None:
    """None for what is no file within the folder, or a link out of it."""
    if media.folder is None or len(path) > _MOST_PATH:
        return None
    try:
        root = os.path.realpath(media.folder)
        place = os.path.realpath(os.path.join("" if root == os.sep else root, path))
        if os.path.commonpath([root, place]) != root or not stat.S_ISREG(os.stat(place).st_mode):
            return None
        with open(place, "rb") as file:
            return file.read(media.file_bytes + 1)
    except (OSError, ValueError):
        return None
