"""Writing UQFF 0.1.2; `checkpoints.uqff` reads it, and says what it is."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from squall.checkpoints import writing
from squall.checkpoints.base import ByteTensor, Checkpoint, Tensor
from squall.checkpoints.uqff import DTYPES, FP8, GGML, HQQ, PLAIN, RESIDUAL, VERSION
from squall.checkpoints.uqff_hqq import fits, split
from squall.checkpoints.writing import Chunks, Item, Part, copy_of
from squall.convert.matrices import Importance, Matrix, Quantizer, Work, count_error
from squall.errors import InvalidCheckpoint, InvalidRequest, UnsupportedModel
from squall.program import Names
from squall.quant import FORMATS, Plan
from squall.quant.hqq import GROUP
from squall.recipes.gguf_parts import NAMING
from squall.recipes.linears import Linear, linears
from squall.roles import Shapes, roles
from squall.weights import values

BESIDE = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    "processor_config.json", "preprocessor_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.json", "chat_template.jinja",
)  # fmt: skip
# What the search for HQQ's zero points was: steps, round_zeros, channel_wise.
_SEARCH = struct.pack("<IBB", 10, 0, 1)
_MOST = (1 << 32) - 1


def write_uqff(work: Work, path: Path, *, force: bool) -> None:
    """Write a folder's model; residual.safetensors and JSON files go beside it."""
    checkpoint, recipe = work.quantizer.checkpoint, work.recipe
    check_floats(checkpoint)
    writing.make_folder(path.parent)
    for name in BESIDE:
        source = checkpoint.path / name
        if source.is_file() and source.resolve() != path.with_name(name).resolve():
            with writing.replacing(path.with_name(name), force=force) as file:
                file.write(source.read_bytes())
    order = linears(recipe.text or recipe.architecture, recipe.decoder, recipe.naming)
    names, shapes = dict(recipe.names), roles(recipe.decoder)
    if recipe.decoder.tied:
        names["head.weight"], shapes["head.weight"] = names["embed.weight"], shapes["embed.weight"]
    write_linears(
        Job(work.quantizer, work.plan, order, names, shapes, work.importance), path, force
    )


def check_floats(checkpoint: Checkpoint) -> None:
    """Raises UnsupportedModel for what no UQFF file is made from."""
    if checkpoint.kind != "folder":
        raise UnsupportedModel(
            "a UQFF file is made from a folder with config.json and float weights; "
            "a GGUF file can be quantized to a .gguf file"
        )


def write_linears(job: Job, path: Path, force: bool) -> None:
    """Write a network's linears, and beside them what else it has."""
    items = [job.item(i, linear) for i, linear in enumerate(job.linears)]
    writing.write_safetensors(path.with_name(RESIDUAL), job.residual(), force=force)
    writing.write_safetensors(path, items, force=force)


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A network that is to be written: its linears in their order, where its weights are.

    prefix: of its roles in the plan.
    """

    quantizer: Quantizer
    plan: Plan
    linears: tuple[Linear, ...]
    names: Names
    shapes: Shapes
    importance: Importance = field(default_factory=dict)
    prefix: str = ""

    def residual(self) -> list[Item]:
        """The tensors that hold no linear."""
        linears = {role for linear in self.linears for role in linear.roles}
        used: dict[bool, set[str]] = {True: set(), False: set()}
        for role, parts in self.names.items():
            used[role.rsplit(".", 1)[0] in linears] |= {part.tensor for part in parts}
        taken = used[True] - used[False]  # a tied head's is the embeddings' too
        tensors = self.quantizer.checkpoint.tensors
        return [
            Item(name, t.format, t.shape, copy_of(t))
            for name, t in tensors.items()
            if name not in taken
        ]

    def item(self, index: int, linear: Linear) -> Item:
        part = self.blob(linear)
        if part.nbytes > _MOST:
            raise UnsupportedModel(
                f"{linear.tensor} takes {part.nbytes} bytes; UQFF allows {_MOST}"
            )
        return Item(str(index), "u8", (part.nbytes,), part)

    def blob(self, linear: Linear) -> Part:
        matrix, bias = self.matrix(linear), self.bias(linear)
        format = FORMATS[matrix.format]
        if matrix.format.startswith("hqq"):
            return self._hqq(matrix, bias)
        if format.name == "f8_e4m3":
            return self._fp8(matrix, bias)
        if format.name in ("f32", "f16", "bf16"):
            return self._plain(matrix, bias)
        assert format.ggml_id is not None
        tail = b"" if bias is None else _tensor("f32", bias.to_float32())
        head = struct.pack("<IBIB", VERSION, GGML, matrix.nbytes, bias is not None)
        head += struct.pack("<4I", format.ggml_id, 2, matrix.rows, matrix.cols)
        return _joined(head, matrix.nbytes, lambda: self.quantizer.chunks(matrix), tail)

    def matrix(self, linear: Linear) -> Matrix:
        names, shapes = [f"{role}.weight" for role in linear.roles], self.shapes
        slices = tuple(part for name in names for part in self.names[name])
        rows, cols = sum(shapes[name][-2] for name in names), shapes[names[0]][-1]
        stored = self.quantizer.checkpoint.tensors[slices[0].tensor].format
        format = self.plan.target(self.prefix + linear.roles[0], stored, cols)
        known = None
        if self.importance:
            name = NAMING.name(f"{linear.roles[0]}.weight")
            known = self.importance.get(name.removesuffix(".weight"))
        weights = None if known is None else check_importance(known, linear, cols)
        return Matrix(
            linear.tensor, slices, linear.expert * rows, rows, cols, format, importance=weights
        )

    def bias(self, linear: Linear) -> Tensor | None:
        """The bias; of a fused linear there is none."""
        parts = self.names.get(f"{linear.roles[0]}.bias", ())
        if len(linear.roles) > 1 and parts:
            raise UnsupportedModel(f"{linear.tensor} is fused and has a bias")
        if not parts:
            return None
        tensors = [self.quantizer.checkpoint.tensors[part.tensor] for part in parts]
        if len(parts) == 1 and tensors[0].shape == (parts[0].stop - parts[0].start,):
            return tensors[0]
        pieces = zip(tensors, parts, strict=True)
        values = np.concatenate([t.to_float32()[p.start : p.stop] for t, p in pieces])
        return ByteTensor(f"{linear.tensor}.bias", "f32", values.shape, values.view(np.uint8))

    def _plain(self, matrix: Matrix, bias: Tensor | None) -> Part:
        head = struct.pack("<IBB", VERSION, PLAIN, bias is not None)
        head += _tensor_head(matrix.format, matrix.nbytes, (matrix.rows, matrix.cols))
        return _joined(head, matrix.nbytes, lambda: self.quantizer.chunks(matrix), _bias(bias))

    def _hqq(self, matrix: Matrix, bias: Tensor | None) -> Part:
        bits, groups = int(matrix.format[3:]), matrix.rows * matrix.cols // GROUP
        if not fits(matrix.rows, matrix.cols, bits):
            raise UnsupportedModel(
                f"{matrix.name} has {groups} groups, which {matrix.format} cannot pack in a UQFF "
                "file; choose another type, or one for its layer in a topology"
            )

        def body() -> Iterator[bytes]:
            (blocks,) = self.quantizer.chunks(matrix)
            codes, scales, zeros = split(blocks, bits)
            yield _tensor("i32" if bits == 3 else "u8", codes)
            yield _tensor("f32", scales[:, None])
            yield _tensor("f32", zeros[:, None])

        words = -(-groups // 10) * 4 if bits == 3 else groups * bits // 8
        size = len(_tensor("f32", np.empty((0, 0)))) * 3 + words * GROUP + groups * 8
        tail = struct.pack("<3IBIB", 2, matrix.rows, matrix.cols, bits, GROUP, 1) + _SEARCH
        head = struct.pack("<IBB", VERSION, HQQ, bias is not None)
        return _joined(head, size, body, tail + _bias(bias))

    def _fp8(self, matrix: Matrix, bias: Tensor | None) -> Part:
        head = struct.pack("<IBB", VERSION, FP8, bias is not None)
        head += _tensor_head(matrix.format, matrix.nbytes, (matrix.rows, matrix.cols))

        def body() -> Iterator[bytes | NDArray[np.uint8]]:
            stored = self.quantizer.rows(matrix)
            exact = values(stored, matrix.cols)
            largest = float(np.max(np.abs(exact)))
            if not np.isfinite(largest):
                raise InvalidCheckpoint(f"cannot quantize {matrix.name}: a value is not finite")
            scale = np.float32(448.0 / largest) if largest > 0 else np.float32(1)
            data = FORMATS[matrix.format].quantize((exact * scale).reshape(-1))
            error, factor = np.zeros(2), np.float32(1) / scale
            count_error(error, exact, FORMATS[matrix.format].dequantize(data) * factor)
            self.quantizer.advance(len(stored.data))
            self.quantizer.note(matrix, stored.format, error)
            yield data
            yield struct.pack("<3fI", factor, factor, scale, _dtype(stored.format))

        return _joined(head, matrix.nbytes + 16, body, _bias(bias))


def check_importance(known: NDArray[np.float32], linear: Linear, cols: int) -> NDArray[np.float32]:
    """The importance of a linear's columns, [1, cols]."""
    own = known[linear.expert : linear.expert + 1]
    if own.shape != (1, cols):
        raise InvalidRequest(
            f"the imatrix has {known.shape} for {linear.tensor}, which has {cols} columns; "
            "it is of another model"
        )
    return own


def _joined(head: bytes, size: int, body: Callable[[], Chunks], tail: bytes) -> Part:
    def chunks() -> Iterator[bytes | NDArray[np.uint8]]:
        yield head
        yield from body()
        yield tail

    return Part(len(head) + size + len(tail), chunks())


def _dtype(format: str) -> int:
    return DTYPES.index(format if format in DTYPES else "f32")


def _tensor_head(format: str, nbytes: int, shape: tuple[int, ...]) -> bytes:
    return struct.pack(f"<{3 + len(shape)}I", nbytes, _dtype(format), len(shape), *shape)


def _tensor(format: str, array: NDArray[np.generic]) -> bytes:
    return _tensor_head(format, array.nbytes, array.shape) + array.tobytes()


def _bias(bias: Tensor | None) -> bytes:
    if bias is None:
        return b""
    return _tensor_head(bias.format, bias.nbytes, bias.shape) + bias.data.tobytes()
