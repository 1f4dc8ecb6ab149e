"""Pictures on terminals that can show them: kitty's protocol, iTerm2's, or sixel."""

from __future__ import annotations

import base64
import os
import re
import select
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from squall.diffusion.request import Picture

CHUNK = 4096  # characters of base64, as kitty wants them
CELL = 8  # pixels, where a terminal does not tell
COLORS = 255
ANSWER_S = 0.3  # for what a terminal says of itself
MOST_ANSWER = 256
_DA1 = re.compile(r"\x1b\[\?([\d;]*)c")
_SIXEL_RUN = 3  # from which on a run is shorter than its characters


def show(picture: Picture) -> bool:
    """Show a picture on standard output, as wide as fits; False if that cannot show any."""
    from PIL import Image

    if not sys.stdout.isatty() or (encode := _encoder()) is None:
        return False
    image = Image.fromarray(picture.pixels)
    image.thumbnail((_width(), image.height))
    sys.stdout.write(f"{encode(replace(picture, pixels=np.asarray(image)))}\n")
    sys.stdout.flush()
    return True


def _encoder() -> Callable[[Picture], str] | None:
    """How this terminal wants it: by what it sets, or by what it answers."""
    term, program = os.environ.get("TERM", ""), os.environ.get("TERM_PROGRAM", "")
    inside = "TMUX" in os.environ or term.startswith(("tmux", "screen"))
    if not inside and (
        "KITTY_WINDOW_ID" in os.environ or {"xterm-kitty", "xterm-ghostty"} & {term}
    ):
        return kitty
    if not inside and program in ("iTerm.app", "WezTerm", "mintty"):
        return iterm2
    return sixel if term not in ("", "dumb", "linux") and "4" in _attributes() else None


def _width() -> int:
    """Of the terminal, in pixels."""
    size = b""
    with suppress(ImportError):  # not on Windows
        import fcntl
        import termios

        size = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, bytes(8))
    pixels = int.from_bytes(size[4:6], sys.byteorder)
    return pixels or shutil.get_terminal_size().columns * CELL


@cache
def _attributes() -> set[str]:
    """What the terminal answers to DA1; nothing if it does not in time."""
    if not sys.stdin.isatty() or find_spec("termios") is None:
        return set()
    import termios
    import tty

    source, answer, end_s = sys.stdin.fileno(), "", time.monotonic() + ANSWER_S
    before = termios.tcgetattr(source)
    try:
        tty.setcbreak(source)
        sys.stdout.write("\x1b[c")
        sys.stdout.flush()
        while not (found := _DA1.search(answer)) and len(answer) < MOST_ANSWER:
            if not select.select([source], [], [], max(end_s - time.monotonic(), 0))[0]:
                return set()
            answer += os.read(source, 1).decode("ascii", "replace")
    finally:
        termios.tcsetattr(source, termios.TCSANOW, before)
    return set(found[1].split(";")) if found else set()


def kitty(picture: Picture) -> str:
    """https://sw.kovidgoyal.net/kitty/graphics-protocol/; q=2: it answers nothing."""
    text, parts = base64.b64encode(picture.png()).decode(), []
    starts = range(0, len(text), CHUNK)
    for start in starts:
        keys = "f=100,a=T,q=2," * (start == 0) + f"m={int(start != starts[-1])}"
        parts.append(f"\x1b_G{keys};{text[start : start + CHUNK]}\x1b\\")
    return "".join(parts)


def iterm2(picture: Picture) -> str:
    """https://iterm2.com/documentation-images.html."""
    data, width = picture.png(), picture.pixels.shape[1]
    text = base64.b64encode(data).decode()
    return f"\x1b]1337;File=inline=1;size={len(data)};width={width}px:{text}\x07"


def sixel(picture: Picture) -> str:
    """Bands of six lines, each color by color, as DEC's terminals have it."""
    from PIL import Image

    image = Image.fromarray(picture.pixels).quantize(COLORS)
    codes, palette = np.asarray(image), np.array(image.getpalette()).reshape(-1, 3) * 100 // 255
    parts = [f'\x1bPq"1;1;{codes.shape[1]};{codes.shape[0]}']
    parts += [f"#{i};2;{r};{g};{b}" for i, (r, g, b) in enumerate(palette)]
    for top in range(0, len(codes), 6):
        band = codes[top : top + 6]
        bits = np.left_shift(1, np.arange(len(band)))[:, None]
        for color in np.unique(band):
            parts.append(f"#{color}{_runs(((band == color) * bits).sum(0))}$")
        parts.append("-")
    return "".join([*parts, "\x1b\\"])


def _runs(sixels: NDArray[np.int64]) -> str:
    edges = [0, *(np.flatnonzero(np.diff(sixels)) + 1), len(sixels)]
    found = []
    for start, stop in pairwise(edges):
        sign, count = chr(63 + int(sixels[start])), int(stop - start)
        found.append(f"!{count}{sign}" if count > _SIXEL_RUN else sign * count)
    return "".join(found)
