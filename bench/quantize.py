"""Quantizers: error and time beside llama.cpp's, and what each type does to a model's perplexity.

    python bench/quantize.py error [--library PATH_OF_LIBGGML_BASE]
    python bench/quantize.py perplexity TEXT [MODEL]

Both print tables for docs/quantization.md. `error` takes normal random numbers and matrices of
the default model; `perplexity` opens MODEL, by default the default model, in every type in turn.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from squall import Model, _native
from squall.checkpoints import open_gguf
from squall.locate import locate
from squall.quant import FORMATS, Format
from squall.quant.isq import TYPES

MATRICES = ("blk.10.ffn_up.weight", "blk.3.attn_q.weight")
PEERS = Path.home() / ".cache/squall-peers/llama-cpp"


class Ggml:
    """llama.cpp's own quantizers, from its library."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._prepare = library.ggml_quantize_init
        self._quantize = library.ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        wide, pointer = ctypes.c_int64, ctypes.c_void_p
        self._quantize.argtypes = [ctypes.c_int, pointer, pointer, wide, wide, wide, pointer]

    def quantize(self, format: Format, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        rows, cols = x.shape
        out = np.empty(rows * format.row_bytes(cols), np.uint8)
        self._prepare(format.ggml_id)
        self._quantize(format.ggml_id, x.ctypes.data, out.ctypes.data, 0, rows, cols, None)
        return out


def weights() -> dict[str, NDArray[np.float32]]:
    checkpoint = open_gguf(locate(None))
    found = {"normal": np.random.default_rng(0).standard_normal((256, 3072), np.float32)}
    for name in MATRICES:
        found[name] = np.ascontiguousarray(checkpoint.tensors[name].to_float32().reshape(-1, 768))
    return found


def error(library: Path | None) -> None:
    ggml = None if library is None else Ggml(library)
    print("| weights | type | error | of llama.cpp's | ns a value | llama.cpp's |")
    print("|---|---|---|---|---|---|")
    for source, x in weights().items():
        size = np.sqrt(np.square(x).mean())
        for name in TYPES.values():
            print(f"| {source} | {name} |", " | ".join(_row(ggml, FORMATS[name], x, size)), "|")


def _row(ggml: Ggml | None, format: Format, x: NDArray[np.float32], size: float) -> list[str]:
    start = time.perf_counter()
    data, factors = _native.quantize(format.name, x)
    elapsed_s = time.perf_counter() - start
    values = format.dequantize(data).reshape(x.shape)
    values *= factors[:, None] if len(factors) else 1
    ours = _rms(values - x)
    cells = [f"{ours / size:.5f}", "", f"{elapsed_s / x.size * 1e9:.1f}", ""]
    if ggml is not None and format.ggml_id is not None and not format.name.startswith("q8_"):
        start = time.perf_counter()
        theirs = ggml.quantize(format, x)
        elapsed_s = time.perf_counter() - start
        wanted = _rms(format.dequantize(theirs).reshape(x.shape) - x)
        cells[1] = f"{ours / wanted:.3f}" if wanted else "both exact"
        cells[3] = f"{elapsed_s / x.size * 1e9:.1f}"
    return cells


def _rms(x: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.square(x.astype(np.float64)).mean()))


def perplexity(text: Path, path: str | None, tokens: int) -> None:
    print("| type | MiB | perplexity | seconds to quantize |")
    print("|---|---|---|---|")
    with Model.open(path, context=tokens) as model:
        ids = model.encode(text.read_text(encoding="utf-8"))[:tokens]
        for name in [None, *TYPES]:
            start = time.perf_counter()
            if name is not None:
                model.re_isq(name)
            elapsed_s = time.perf_counter() - start
            found = np.exp(-model.log_probabilities(ids).mean())
            size = sum(total.nbytes for total in model.weight_formats) / 2**20
            cost = "" if name is None else f"{elapsed_s:.1f}"
            print(f"| {name or 'as stored'} | {size:.0f} | {found:.2f} | {cost} |")
            sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    errors = commands.add_parser("error")
    errors.add_argument("--library", type=Path, default=next(PEERS.rglob("libggml-base.so"), None))
    perplexities = commands.add_parser("perplexity")
    perplexities.add_argument("text", type=Path)
    perplexities.add_argument("model", nargs="?")
    perplexities.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    if options.command == "error":
        error(options.library)
    else:
        perplexity(options.text, options.model, options.tokens)


if __name__ == "__main__":
    main()
