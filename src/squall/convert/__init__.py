"""Models of one file format quantized and written as another, a matrix at a time."""

from __future__ import annotations

from pathlib import Path

from squall import _native
from squall.checkpoints import UQFF, Checkpoint
from squall.checkpoints.writing import exists
from squall.convert.gguf import write_gguf
from squall.convert.imatrix import read_imatrix
from squall.convert.matrices import Importance, Quantizer, Work, Written
from squall.convert.merged import merge_folder, merged
from squall.convert.pictures import write_pictures
from squall.convert.uqff import write_uqff
from squall.quant import Plan
from squall.recipes import Recipe
from squall.weights import Progress

__all__ = [
    "Importance",
    "Written",
    "merge_folder",
    "merged",
    "read_imatrix",
    "write",
    "write_pictures",
]


def write(  # noqa: PLR0913
    checkpoint: Checkpoint,
    recipe: Recipe,
    plan: Plan,
    path: Path,
    *,
    force: bool = False,
    importance: Importance | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> tuple[Written, ...]:
    """Quantize a model to a UQFF file and what lies beside it, or to a GGUF file, by its name.

    Raises InvalidRequest if the file exists, unless `force`, and UnsupportedModel if its format
    cannot hold the model.
    """
    if path.exists() and not force:
        raise exists(path)
    whole = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    quantizer = Quantizer(checkpoint, _native.ThreadPool(threads), whole, progress)
    work = Work(quantizer, recipe, plan, importance or {})
    writer = write_uqff if path.suffix == UQFF else write_gguf
    writer(work, path, force=force)
    return tuple(quantizer.written)
