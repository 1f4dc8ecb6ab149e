"""A model that makes pictures as a folder of diffusers' kind, in which two parts are UQFF files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from squall import _native
from squall.checkpoints import Checkpoint, writing
from squall.convert.matrices import Quantizer, Written
from squall.convert.uqff import Job, check_floats, write_linears
from squall.errors import InvalidRequest
from squall.quant import Plan
from squall.recipes.encoders import LARGE, T5, XXL
from squall.recipes.flux import config_of
from squall.recipes.linears import FLUX, linears
from squall.recipes.names import Part
from squall.roles import roles
from squall.weights import Progress

FILE = "model.uqff"
KINDS = {"encoder": T5, "flux": FLUX}
_TOKENS = (".json", ".txt", ".model")  # weights may lie beside these
INDEX = {"_class_name": "FluxPipeline"}


def write_pictures(
    networks: Mapping[str, tuple[Checkpoint, Part]],
    copies: Mapping[str, Path],
    plan: Plan,
    folder: Path,
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> tuple[Written, ...]:
    """Quantize networks, each to a folder of that name within a new one.

    copies: what is taken as it is, files and folders, by where it is put.
    progress: of each network in turn.
    """
    for checkpoint, _ in networks.values():
        check_floats(checkpoint)
    pool, written = _native.ThreadPool(threads), list[Written]()
    with _making(folder) as made:
        for place, source in copies.items():
            _put(source, made / place)
        if not (made / "model_index.json").exists():
            (made / "model_index.json").write_text(json.dumps(INDEX, indent=2))
        clip = made / "text_encoder"
        if clip.is_dir() and not (clip / "config.json").exists():
            (clip / "config.json").write_text(json.dumps(dict(LARGE), indent=2))
        for name, (checkpoint, part) in networks.items():
            whole = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
            quantizer = Quantizer(checkpoint, pool, whole, progress)
            writing.make_folder(made / name)
            config = checkpoint.metadata or (
                config_of(checkpoint.tensors) if part.kind == "flux" else XXL
            )
            (made / name / "config.json").write_text(json.dumps({**config}, indent=2))
            order = linears(KINDS[part.kind], part.spec, part.naming)  # type: ignore[arg-type]
            names = {role.removeprefix(part.prefix): at for role, at in part.names.items()}
            job = Job(quantizer, plan, order, names, roles(part.spec), prefix=part.prefix)
            write_linears(job, made / name / FILE, force=False)
            written += quantizer.written
    return tuple(written)


@contextmanager
def _making(folder: Path) -> Iterator[Path]:
    """A folder with a temporary name, which becomes `folder` when it is complete."""
    if folder.exists():
        raise InvalidRequest(f"{folder} exists; give another name, or remove it")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(folder)
    except OSError as error:
        raise InvalidRequest(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(source: Path, target: Path) -> None:
    """A copy, or what is large by another name; of a folder its files, or a tokenizer's."""
    if source.is_dir():
        for file in filter(Path.is_file, source.iterdir()):
            if not target.name.startswith("tokenizer") or file.suffix in _TOKENS:
                _put(file, target / file.name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix not in _TOKENS:  # which people edit
        with suppress(OSError):  # another file system
            os.link(source.resolve(), target)
            return
    shutil.copyfile(source, target)
