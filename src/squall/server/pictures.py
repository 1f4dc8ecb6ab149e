"""Pictures over HTTP, in OpenAI's shape: their bodies, their jobs, and their files."""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict

from squall.api.pictures import data_uri, encoded
from squall.diffusion.model import ImageModel, Painting
from squall.diffusion.request import Picture, PictureRequest, fitted, size_of
from squall.errors import EngineStopped, InvalidRequest
from squall.server.dialect import Dialect
from squall.server.errors import ApiError
from squall.server.options import ServerOptions
from squall.server.schemas import Body
from squall.vision.images import Media, read

if TYPE_CHECKING:
    from squall.server.service import Service

MOST_PICTURES = 8  # of a request
POLL_S = 0.2  # how often streams look how far a picture is
FOLDER = "/images/"  # where they lie, under names that are secrets, which clients hand on
PROGRESS, COMPLETED = "image_generation.progress", "image_generation.completed"
_FIELD_BYTES, _MOST_PARTS = 64 * 1024, 64
_FIELDS = ("width", "height", "steps", "guidance", "seed")
# As OpenAI has it, and as mistral.rs does.
Format = Literal["url", "b64_json", "Url", "B64Json"]


class PictureBody(Body, frozen=True):
    """What a picture is to show; sizes are multiples of 16, by default 1280x720."""

    prompt: str
    n: int = 1
    size: str | None = None
    width: int | None = None
    height: int | None = None
    response_format: Format | None = None
    background: Literal["auto", "opaque"] | None = None
    output_format: Literal["png"] | None = None
    partial_images: Literal[0] | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    stream: bool | None = None

    def request(self, media: Media) -> PictureRequest:  # noqa: ARG002
        """The first of its pictures. Raises InvalidRequest."""
        if not 1 <= self.n <= MOST_PICTURES:
            raise InvalidRequest(f"n is {self.n}; it must be 1 to {MOST_PICTURES}")
        given = {name: value for name in _FIELDS if (value := getattr(self, name)) is not None}
        if self.size not in (None, "auto"):
            if given.keys() & {"width", "height"}:
                raise InvalidRequest("size is given, and width or height; leave one of them out")
            given |= size_of(str(self.size))
        return PictureRequest(prompt=self.prompt, **given)


class EditBody(PictureBody, frozen=True):
    """A picture made of another, which is a URL, base64, or a file of a form."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    image: str | bytes | list[str | bytes]
    mask: object = None
    strength: float | None = None

    @property
    def images(self) -> list[str | bytes]:
        return self.image if isinstance(self.image, list) else [self.image]

    def request(self, media: Media) -> PictureRequest:
        """See `PictureBody`; reads the image, and keeps no more of it than is needed."""
        if self.mask is not None:
            raise InvalidRequest("mask is not supported; the whole picture is made anew")
        if len(self.images) != 1:
            raise InvalidRequest(f"image has {len(self.images)} images; it must be one")
        request = super().request(media)
        strength = request.strength if self.strength is None else self.strength
        image = fitted(read(self.images[0], media), request.width, request.height)
        return replace(request, image=image, strength=strength)


def parse_form(kind: str, data: bytes) -> EditBody:
    """The body of an edit from a form, as browsers and OpenAI's client send it."""
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import create_form_parser

    found: dict[str, list[str | bytes]] = {}

    def add(name: bytes | None, value: str | bytes) -> None:
        if sum(map(len, found.values())) == _MOST_PARTS:
            raise ValueError(f"it has more than {_MOST_PARTS} parts")
        key = (name or b"").decode(errors="replace").removesuffix("[]")
        found.setdefault(key, []).append(value)

    try:
        parser = create_form_parser(
            {"Content-Type": kind.encode("latin-1")},
            lambda field: add(field.field_name, _text(field.value or b"")),
            lambda file: add(file.field_name, _read_file(file.file_object)),
            config={"MAX_MEMORY_FILE_SIZE": len(data) + 1},
        )
        parser.write(data)
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise ApiError(400, f"the body is no form: {error}", "invalid_form") from None
    fields = {key: one[0] if len(one) == 1 else one for key, one in found.items()}
    return EditBody.model_validate(fields, strict=False)


def _text(value: bytes) -> str:
    if len(value) > _FIELD_BYTES:
        raise ValueError(f"a field has more than {_FIELD_BYTES} bytes, and is no file")
    return value.decode()


def _read_file(file: Any) -> bytes:
    file.seek(0)
    return bytes(file.read())


@dataclass(eq=False)
class PicturesJob:
    """Pictures of one request, in the making. tell: what clients get of one that is made."""

    paintings: list[Painting]
    tell: Callable[[Picture], Awaitable[dict[str, Any]]]
    usage: None = None

    async def data(self) -> list[dict[str, Any]]:
        return [await self.tell(await _painted(one)) for one in map(_ending, self.paintings)]

    async def chunks_async(self) -> AsyncIterator[dict[str, Any]]:
        """Events: how far each is whenever a step is done, and in the end the picture."""
        for index, painting in enumerate(self.paintings):
            of, step = {"index": index, "n": len(self.paintings)}, -1
            ended = _ending(painting)
            while not ended.done():
                if painting.step > step:
                    step = painting.step
                    yield {"type": PROGRESS, **of, "step": step, "steps": painting.steps}
                await asyncio.wait([ended], timeout=POLL_S)
            yield {"type": COMPLETED, **of, **await self.tell(await _painted(ended))}

    def close(self) -> None:
        """Cancel what is not made yet."""
        for painting in self.paintings:
            painting.cancel()


def _ending(painting: Painting) -> asyncio.Future[Picture]:
    return asyncio.wrap_future(painting.future)


async def _painted(waiting: asyncio.Future[Picture]) -> Picture:
    await asyncio.wait([waiting])
    if waiting.cancelled():
        raise EngineStopped("the picture was cancelled")
    return waiting.result()


class Pictures(Dialect):
    """OpenAI's pictures. base: what URLs begin with."""

    def __init__(self, service: Service, body: PictureBody, base: str) -> None:
        super().__init__(body, "", "")
        self._service, self._base = service, base

    def start(self, model: ImageModel) -> PicturesJob:
        """All pictures are queued, or none. Raises as `ImageModel.submit` does."""
        request = self.body.request(self._service.options.media)
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        job = PicturesJob([], self._datum)
        try:
            for number in range(self.body.n):
                one = replace(request, seed=(seed + number) % 2**64)
                job.paintings.append(model.submit(one))
        except BaseException:
            job.close()
            raise
        return job

    async def whole(self, job: PicturesJob) -> str:
        return json.dumps({"created": int(time.time()), "data": await job.data()})

    def part(self, job: PicturesJob, chunk: dict[str, Any]) -> bytes:  # noqa: ARG002
        return f"event: {chunk['type']}\ndata: {json.dumps(chunk)}\n\n".encode()

    async def _datum(self, picture: Picture) -> dict[str, Any]:
        found = await asyncio.wrap_future(self._service.submit(lambda: self._shown(picture)))
        notes = {"notes": list(picture.notes)} if picture.notes else {}
        return {**found, "seed": picture.seed, **notes}

    def _shown(self, picture: Picture) -> dict[str, str]:
        png, wanted = picture.png(), self.body.response_format
        if wanted in (None, "url", "Url"):
            return {"url": f"{self._base}{FOLDER}{self._service.album.keep(png)}"}
        return {"b64_json": encoded(png) if wanted == "b64_json" else data_uri(png)}


@dataclass(eq=False)
class Album:
    """Pictures as files with names that nobody can guess, each for a while."""

    options: ServerOptions
    _folder: Path | None = None
    _closed: bool = False
    _kept: dict[str, tuple[float, int]] = field(default_factory=dict)  # when it ends, bytes
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def keep(self, png: bytes) -> str:
        """The name of a new file."""
        name = f"{secrets.token_urlsafe(24)}.png"
        with self._lock:
            if self._closed:
                raise EngineStopped("the server has ended")
            if self._folder is None:
                given = self.options.image_folder
                self._folder = given or Path(tempfile.mkdtemp(prefix="squall-images-"))
                self._folder.mkdir(parents=True, exist_ok=True)
            while self._kept and self._bytes() + len(png) > self.options.image_bytes:
                self._remove(next(iter(self._kept)))
            self._kept[name] = (time.monotonic() + self.options.image_age_s, len(png))
            try:
                (self._folder / name).write_bytes(png)
            except OSError:
                self._remove(name)  # what was written of it
                raise
        return name

    def find(self, name: str) -> bytes:
        """A file's bytes. Raises ApiError, also for names that it never gave."""
        self.tidy()
        with self._lock:
            if name in self._kept and self._folder is not None:
                with suppress(FileNotFoundError):  # somebody else removed it
                    return (self._folder / name).read_bytes()
        raise ApiError(404, "there is no such picture, or no longer", "not_found")

    def tidy(self) -> None:
        """Remove what is too old."""
        with self._lock:
            for name in [n for n, (end, _) in self._kept.items() if end < time.monotonic()]:
                self._remove(name)

    def close(self) -> None:
        """Remove all of it."""
        with self._lock:
            self._closed = True
            for name in list(self._kept):
                self._remove(name)
            if self._folder is not None and self.options.image_folder is None:
                shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _bytes(self) -> int:
        return sum(size for _, size in self._kept.values())

    def _remove(self, name: str) -> None:
        del self._kept[name]
        if self._folder is not None:
            (self._folder / name).unlink(missing_ok=True)
