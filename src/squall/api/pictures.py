"""Pictures as answers: files with names that nobody can guess, or base64."""

from __future__ import annotations

import base64
import os
import tempfile
import time
import uuid
from concurrent.futures import CancelledError
from contextlib import suppress
from pathlib import Path

from squall.api.responses import ImageChoice, ImageGenerationResponse
from squall.diffusion.model import Painting
from squall.errors import EngineStopped, InvalidRequest


def encoded(png: bytes) -> str:
    """A PNG as OpenAI gives it, in base64."""
    return base64.b64encode(png).decode()


def data_uri(png: bytes) -> str:
    """The same as mistral.rs gives it, which browsers show too."""
    return f"data:image/png;base64,{encoded(png)}"


def make_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """The folder, made if need be; without one a new one for temporary files.

    Raises InvalidRequest if nothing could be written there.
    """
    try:
        folder = Path(given or tempfile.mkdtemp(prefix="squall-images-")).resolve()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"image_folder: {error}; choose another") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidRequest(f"image_folder: {folder} is read-only; choose another")
    return folder


def write(png: bytes, folder: Path) -> Path:
    """A new file, whole or not at all."""
    path = folder / f"image-generation-{uuid.uuid4()}.png"
    try:
        path.write_bytes(png)
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        raise InvalidRequest(
            f"the picture cannot be written: {error}; choose another image_folder, or B64Json"
        ) from error
    return path


def response(painting: Painting, folder: Path | None) -> ImageGenerationResponse:
    """One that is done, as a file in the folder; without one as base64. Raises what went wrong."""
    try:
        picture = painting.result()
    except CancelledError:
        raise EngineStopped("the model was closed before the picture was done") from None
    png = picture.png()
    at = {"b64_json": data_uri(png)} if folder is None else {"url": str(write(png, folder))}
    choice = ImageChoice(seed=picture.seed, notes=picture.notes, **at)
    return ImageGenerationResponse(created=int(time.time()), data=(choice,))
