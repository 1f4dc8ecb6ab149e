"""Files that are there whole or not at all."""

from __future__ import annotations

import filecmp
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from squall.checkpoints.base import Tensor
from squall.errors import InvalidRequest

Chunks = Iterable[bytes | NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Part:
    """`nbytes` bytes of a file, made when they are written."""

    nbytes: int
    chunks: Chunks


@dataclass(frozen=True, slots=True)
class Item:
    name: str
    format: str
    shape: tuple[int, ...]
    part: Part


@contextmanager
def replacing(path: Path, *, force: bool) -> Iterator[IO[bytes]]:
    """A file with a temporary name, which becomes `path` when it is complete.

    What is there is kept without `force`: to write other bytes then raises InvalidRequest.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists() and not force and not filecmp.cmp(path, temporary, shallow=False):
            raise exists(path)
        os.replace(temporary, path)
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """And those that it is in, where they are not there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"cannot make {path}: {error.strerror}") from None


def copy_of(tensor: Tensor) -> Part:
    """The bytes of a tensor, read when they are written."""

    def chunks() -> Iterator[NDArray[np.uint8]]:
        yield tensor.data

    return Part(tensor.nbytes, chunks())


def exists(path: Path) -> InvalidRequest:
    return InvalidRequest(
        f"{path} exists; give another name, remove it, or overwrite it with squall quantize --force"
    )


def write_parts(file: IO[bytes], parts: Iterable[Part]) -> None:
    """Append them; a part of another size than it said is a fault of ours."""
    for part in parts:
        start = file.tell()
        for chunk in part.chunks:
            file.write(chunk if isinstance(chunk, bytes) else chunk.data.cast("B"))
        assert file.tell() - start == part.nbytes, f"{file.tell() - start} of {part.nbytes} bytes"


def write_safetensors(
    path: Path, items: Sequence[Item], *, force: bool, metadata: Mapping[str, str] | None = None
) -> None:
    table: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for item in items:
        offsets = [at, at + item.part.nbytes]
        dtype = item.format.upper()
        table[item.name] = {"dtype": dtype, "shape": item.shape, "data_offsets": offsets}
        at += item.part.nbytes
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with replacing(path, force=force) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        write_parts(file, (item.part for item in items))
