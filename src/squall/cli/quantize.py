"""`squall quantize`: a model's weights in other number formats, written to a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from squall.cli import tables
from squall.cli.flags import plain
from squall.cli.opening import FileFlags, makes_pictures
from squall.cli.options import Threads, option, progress
from squall.errors import InvalidRequest
from squall.opening import NO_MMPROJ, Opening

if TYPE_CHECKING:
    from squall.checkpoints import Checkpoint
    from squall.convert import Written

_ENDINGS = (".uqff", ".gguf")
_OF_PICTURES = (
    "of a model that makes pictures: --isq, --topology or both, and -o with the name of a new "
    "folder; no --imatrix, --experts-only or --force"
)


@dataclass(frozen=True, kw_only=True)
class QuantizeFlags(FileFlags):
    output: Path = option(
        MISSING, "-o", "--output", help="To write: NAME.uqff, NAME.gguf, or a folder."
    )
    isq: str | None = option(
        None, help="Q4K, Q8_0, HQQ4, FP8... or bits; of several, with commas, a file each."
    )
    topology: Path | None = option(None, help="YAML that gives layers types of their own.")
    imatrix: Path | None = option(
        None, help="An importance matrix (imatrix), for types such as Q4K."
    )
    experts_only: bool = option(
        False, "--experts-only", help="Only the experts of a mixture, and the head."
    )
    force: bool = option(False, "--force", help="Overwrite files.")
    threads: Threads = None


def _quantize(flags: QuantizeFlags) -> None:
    """Quantize a model's weights once, and write them to a UQFF or GGUF file, or a folder.

    Beside a UQFF file lie residual.safetensors, which has what is not quantized, and JSON files.
    With several types their names end the files' names: model-q4k.uqff, model-q8_0.uqff.

    Models that make pictures become a folder: UQFF files of what is large, and the rest as it is.

    Examples:

    squall quantize FOLDER --isq Q4K -o quantized/model.uqff

    squall quantize FLUX --isq Q4K -o flux-q4k
    """
    output, isq = flags.output, flags.isq
    opening = replace(flags.opening, topology=flags.topology)
    if opening.path is not None and makes_pictures(str(opening.path)):
        opening = replace(opening, isq=isq)
        odd = flags.imatrix or flags.experts_only or flags.force or output.suffix in _ENDINGS
        if odd or (isq or flags.topology) is None:
            raise InvalidRequest(_OF_PICTURES)
        _report(output, _pictures(opening, output, flags.threads), as_json=flags.as_json)
        return
    _check(output, opening.path, flags.topology if isq is None else isq)
    opening = replace(opening, experts_only=flags.experts_only, mmproj=NO_MMPROJ)
    for out, written in _texts(opening, flags):
        _report(out, written, as_json=flags.as_json)


quantize = plain(QuantizeFlags, _quantize)


def _texts(opening: Opening, flags: QuantizeFlags) -> Iterator[tuple[Path, tuple[Written, ...]]]:
    """Quantize a model of text, to a file of each type."""
    from squall import convert
    from squall.assembly import prepare
    from squall.executors import default_threads
    from squall.quant import Plan

    named = _outputs(flags.output, flags.isq)
    formats = {out: Plan.of(name).isq for out, name in named.items()}
    with progress("fetching") as shown:
        checkpoint, recipe, plan = prepare(replace(opening, progress=shown))
    _warn_of_loss(checkpoint)
    importance = None if flags.imatrix is None else convert.read_imatrix(flags.imatrix)
    threads = flags.threads or default_threads()
    for out, format in formats.items():
        with progress(f"quantizing {out.name}") as shown:
            written = convert.write(
                checkpoint, recipe, replace(plan, isq=format), out,
                force=flags.force, importance=importance, threads=threads, progress=shown,
            )  # fmt: skip
        yield out, written


def _pictures(opening: Opening, output: Path, threads: int | None) -> tuple[Written, ...]:
    """Quantize a model that makes pictures: the transformer, and the larger encoder of texts."""
    from squall import convert
    from squall.diffusion.files import find, open_part
    from squall.executors import default_threads
    from squall.quant import Plan
    from squall.recipes.encoders import load_t5
    from squall.recipes.flux import alone, load_flux

    plan = Plan.of(opening.isq, opening.topology)
    files = find(opening)
    transformer, t5 = alone(open_part(files.transformer)), open_part(files.t5)
    networks = {
        "transformer": (transformer, load_flux(transformer)),
        "text_encoder_2": (t5, load_t5(t5)),
    }
    root = files.path if files.path.is_dir() else files.path.parent
    # Each as a folder's and as a file's name.
    places = {
        ("", "model_index.json"): root / "model_index.json",
        ("", "scheduler/scheduler_config.json"): files.scheduler,
        ("text_encoder", "text_encoder/model.safetensors"): files.clip,
        ("tokenizer", "tokenizer/tokenizer.json"): files.clip_tokens,
        ("tokenizer_2", "tokenizer_2/tokenizer.json"): files.t5_tokens,
        ("vae", "ae.safetensors"): files.vae,
    }
    there = {one[file.is_file()]: file for one, file in places.items() if file.exists()}
    with progress("quantizing") as shown:
        return convert.write_pictures(
            networks, there, plan, output, threads=threads or default_threads(), progress=shown
        )


def _check(output: Path, path: object, types: object) -> None:
    if output.suffix not in _ENDINGS:
        raise InvalidRequest(f"{output} must end in {' or '.join(_ENDINGS)}")
    if path is None:
        raise InvalidRequest("which model? Name a folder, a GGUF file or a model of the hub")
    if types is None:
        raise InvalidRequest("what to quantize to? Give --isq, --topology or both")


def _warn_of_loss(checkpoint: Checkpoint) -> None:
    from squall.quant import FORMATS

    found = {tensor.format for tensor in checkpoint.tensors.values()}
    formats = sorted(name for name in found if FORMATS[name].block > 1)
    if formats or checkpoint.quantization:
        sys.stderr.write(
            f"warning: {checkpoint.path} is quantized already "
            f"({checkpoint.quantization or ', '.join(formats)}): quantizing again adds to what was "
            "lost; begin with the float weights if you can get them\n"
        )


def _outputs(output: Path, isq: str | None) -> dict[Path, str | None]:
    """The files to write, and the type of each."""
    names: list[str | None] = [None] if isq is None else [*isq.split(",")]
    if len(names) == 1:
        return {output: names[0]}
    found = {output.with_stem(f"{output.stem}-{str(name).strip().lower()}"): name for name in names}
    if len(found) != len(names):
        raise InvalidRequest(f"--isq {isq} names a type twice")
    return found


def _report(path: Path, written: tuple[Written, ...], *, as_json: bool) -> None:
    if as_json:
        matrices = [asdict(item) for item in written]
        typer.echo(json.dumps({"file": str(path), "matrices": matrices}))
        return
    rows = [
        (item.name, item.source, item.format, " x ".join(map(str, item.shape)), item.nbytes,
         f"{100 * item.rmse:.2f} %") for item in written
    ]  # fmt: skip
    files = [path] if path.is_file() else filter(Path.is_file, path.rglob("*"))
    size = sum(file.stat().st_size for file in files)
    values = sum(item.shape[0] * item.shape[1] for item in written)
    bits = 8 * sum(item.nbytes for item in written) / max(values, 1)
    headings = ("tensor", "from", "to", "shape", "bytes", "RMSE")
    told = f"{path}: {size / 2**20:.1f} MiB, {bits:.2f} bits a quantized weight"
    tables.show(tables.table(headings, rows, headings[4:]), told)
