r"""Pictures on the command line: made one after the other, saved, and shown.

Ctrl-C ends a picture with its step; a second one, the program.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from squall.checkpoints.writing import replacing
from squall.cli import INTERRUPTED, screen
from squall.cli.chat import converse, note
from squall.cli.options import progress
from squall.diffusion.request import Picture, PictureRequest, Pixels, size_of
from squall.errors import InvalidRequest, SquallError

if TYPE_CHECKING:
    from squall.cli.run import RunFlags
    from squall.cli.selectors import Selected
    from squall.diffusion.model import ImageModel

# What a picture's file may be.
KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MOST_NAME = 40  # characters of the prompt
SEEDS = 2**64
HELP = r"""\help          this text
\size WxH      such as 1024x768, in multiples of 16
\steps N       more is finer and takes longer
\guidance X    how closely to follow the text, if the model can be told
\seed N        the same seed, the same picture
\image PLACE   begin with a picture: a file or a URL
\strength X    how much of that to make anew, up to 1
\exit          leave (so do Ctrl-D, and Ctrl-C at the prompt)
Without a value these are as at first. Ctrl-C ends a picture. Everything else is a prompt."""


def read_image(place: str) -> Pixels:
    from squall.vision.images import read

    return np.asarray(read(place.strip("\"'")))


# The fields that commands change, and how they are read.
_READERS: dict[str, Callable[[str], Any]] = {
    "steps": int, "guidance": float, "seed": int, "image": read_image, "strength": float,
}  # fmt: skip
_SIZE = ("width", "height")


def _read(name: str, text: str) -> dict[str, Any]:
    try:
        return size_of(text) if name == "size" else {name: _READERS[name](text)}
    except ValueError:
        raise InvalidRequest(f"{name} is {text!r}; it must be a number") from None


def check_output(path: Path) -> None:
    """Before a picture is made: whether it could be saved there."""
    if path.suffix.lower() not in KINDS:
        raise InvalidRequest(f"{path} must end in one of {', '.join(KINDS)}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InvalidRequest(f"{path.parent} is no folder that can be written to")


def draw(flags: RunFlags, selected: Selected) -> None:
    """The pictures that `squall run` is asked for, or without a prompt one a line."""
    check_output(flags.output or Path("image.png"))
    if flags.prompt is None and (flags.n > 1 or flags.output):
        raise InvalidRequest("--n and --output need a PROMPT")
    if len(flags.image or ()) > 1:
        raise InvalidRequest("a picture begins with one --image")
    given = {name: value for name in _READERS if (value := getattr(flags, name)) is not None}
    given["image"] = read_image(flags.image[0]) if flags.image else None
    given |= size_of(flags.size) if flags.size else {}
    request = PictureRequest(prompt=flags.prompt or "-", **given)
    with flags.open_pictures(selected) as model:
        easel = Easel(model, request, flags.show)
        if flags.prompt is None:
            easel.loop()
        for number in range(flags.n if flags.prompt is not None else 0):
            path = flags.output
            if path is not None and flags.n > 1:
                path = path.with_stem(f"{path.stem}-{number + 1}")
            picture = easel.paint(request, path)
            if picture is None:
                raise KeyboardInterrupt
            request = replace(request, seed=(picture.seed + 1) % SEEDS)


@dataclass(slots=True)
class Easel:
    """Makes pictures as `first` says, but for the prompt, or as commands change it."""

    model: ImageModel
    first: PictureRequest
    shown: bool = True
    request: PictureRequest = field(init=False)

    def __post_init__(self) -> None:
        self.request = self.first

    def loop(self) -> None:
        r"""A prompt a line, until \exit."""
        model = self.model
        guidance = "" if model.guidance is None else f", guidance {model.guidance:g}"
        note(f"{model.path.name}: {model.steps} steps{guidance}, unless you say otherwise.")
        note(r"\help lists the commands.")
        commands = {f"\\{name}": partial(self._change, name) for name in ("size", *_READERS)}
        converse({"\\help": lambda _: note(HELP)} | commands, self._prompted)

    def _change(self, name: str, text: str) -> None:
        """Take a field's value, or with no text its first one."""
        names = _SIZE if name == "size" else (name,)
        first = {one: getattr(self.first, one) for one in names}
        try:
            self.request = replace(self.request, **(_read(name, text) if text else first))
        except SquallError as error:
            note(f"error: {error}")

    def _prompted(self, prompt: str) -> None:
        try:
            if self.paint(replace(self.request, prompt=prompt)) is None:
                note("ended")
        except SquallError as error:
            note(f"error: {error}")

    def paint(self, request: PictureRequest, path: Path | None = None) -> Picture | None:
        """Make, save, tell and show a picture; None if Ctrl-C ended it."""
        start_s = time.monotonic()
        picture = self._made(request)
        if picture is None:
            return None
        path = path or free(request.prompt, picture.seed)
        save(picture, path)
        if self.shown:
            screen.show(picture)
        sys.stdout.write(f"{path}\n")
        sys.stdout.flush()
        height, width, _ = picture.pixels.shape
        for text in picture.notes:
            note(f"note: {text}")
        took_s = time.monotonic() - start_s
        note(f"[{width}x{height}; {picture.steps} steps; seed {picture.seed}; {took_s:.1f} s]")
        return picture

    def _made(self, request: PictureRequest) -> Picture | None:
        painting = None
        try:
            with progress("step", "decoding") as shown:
                painting = self.model.submit(request, shown)
                shown(painting.step, painting.steps)
                return painting.result()
        except KeyboardInterrupt:
            if painting is None:
                return None
        try:
            painting.cancel()
            note("\nit ends with this step; Ctrl-C again ends the program at once")
            wait([painting.future])
        except KeyboardInterrupt:
            os._exit(INTERRUPTED)
        return None


def free(prompt: str, seed: int) -> Path:
    """A file of the current folder that is not there yet, named after the prompt."""
    words = "-".join(["image", *re.findall(r"\w+", prompt.lower())])[:MOST_NAME].rstrip("-")
    paths = (Path(f"{words}-{seed}{f'-{n}' * (n > 1)}.png") for n in count(1))
    return next(path for path in paths if not path.exists())


def save(picture: Picture, path: Path) -> None:
    """Whole or not at all."""
    from PIL import Image

    with replacing(path, force=True) as file:
        Image.fromarray(picture.pixels).save(file, KINDS[path.suffix.lower()])
