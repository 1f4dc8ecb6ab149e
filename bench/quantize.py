"""Quantizers: error and time beside llama.cpp's, and what each type does to a model's perplexity.

    python bench/quantize.py error [--library PATH_OF_LIBGGML_BASE]
    python bench/quantize.py perplexity [TEXT...]
    python bench/quantize.py model [--types Q4K,Q8_0,HQQ4] [--folder FOLDER]

They print tables for docs/quantization.md. `error` takes random numbers of three distributions and
matrices of the default model. `perplexity` opens the values of the default model in every type in
turn, by default on Pride and Prejudice and Alice's Adventures in Wonderland. `model` quantizes a
folder of 1.1 billion random float16 weights while it is opened, and has llama.cpp do it with a GGUF
file of the same weights: seconds, and the largest memory that is not a file's.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from folders import write_dequantized, write_random
from peers import peer_python, run_worker
from random_gguf import SHAPES
from squall import Model, _native, convert, recipes
from squall.checkpoints import open_checkpoint, open_gguf
from squall.locate import locate
from squall.quant import FORMATS, Format, Plan
from squall.quant.isq import TYPES

HERE = Path(__file__).parent
TEXTS = [HERE.parent / "tests/data/english.txt", HERE / "alice.txt"]
# Types of ours -> of llama.cpp's files in which all matrices are of one type.
FILE_TYPES = {
    "q2k": "Q2_K_S", "q3k": "Q3_K_S", "q4k": "Q4_K_S", "q5k": "Q5_K_S", "q6k": "Q6_K",
    "q4_0": "Q4_0", "q4_1": "Q4_1", "q5_0": "Q5_0", "q5_1": "Q5_1", "q8_0": "Q8_0",
}  # fmt: skip
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
    checkpoint, rng = open_gguf(locate(None)), np.random.default_rng(0)
    found = {"normal": rng.standard_normal((256, 3072), np.float32)}
    found["heavy tails"] = rng.standard_t(4, (256, 3072)).astype(np.float32)
    found["positive"] = np.abs(rng.standard_normal((256, 3072), np.float32))
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


def perplexity(texts: list[Path], tokens: int) -> None:
    print("| type | MiB | perplexity | seconds to quantize |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write_dequantized(Path(folder), Path(locate(None)))
        text = "\n\n".join(path.read_text(encoding="utf-8") for path in texts)
        with Model.open(folder, context=tokens) as model:
            ids = model.encode(text)[:tokens]
            for name in [None, *TYPES]:
                _progress(f"{name or 'float32'}, {len(ids)} tokens")
                start = time.perf_counter()
                if name is not None:
                    model.re_isq(name)
                elapsed_s = time.perf_counter() - start
                found = np.exp(-model.log_probabilities(ids).mean())
                size = sum(total.nbytes for total in model.weight_formats) / 2**20
                cost = "" if name is None else f"{elapsed_s:.1f}"
                print(f"| {name or 'float32'} | {size:.0f} | {found:.2f} | {cost} |", flush=True)


def _progress(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


def model(types: list[str], folder: Path | None, threads: int) -> None:
    """Each type in a process of its own; `peak` beside what may be needed at most."""
    with tempfile.TemporaryDirectory() as temporary:
        source = folder or Path(temporary) / "model"
        if not (source / "config.json").exists():
            _progress("writing random weights")
            write_random(source, SHAPES["tinyllama"])
        floats = Path(temporary) / "floats.gguf"
        checkpoint = open_checkpoint(source)
        if FILE_TYPES.keys() & types:
            _progress("writing the same as GGUF")
            convert.write(checkpoint, recipes.load(checkpoint), Plan(), floats)
        largest = max(tensor.nbytes for tensor in checkpoint.tensors.values())
        print("| type | MiB | seconds | llama.cpp's | ratio | peak MiB | at most |")
        print("|---|---|---|---|---|---|---|")
        for name in types:
            job = {"folder": str(source), "isq": name, "threads": threads}
            _progress(f"{name}: Squall")
            ours = run_worker(sys.executable, Path(__file__).name, job, None)
            cells = ["", ""]
            if name in FILE_TYPES:
                _progress(f"{name}: llama.cpp")
                theirs = _llama(floats, Path(temporary) / "out.gguf", name, threads)
                cells = [f"{theirs:.1f}", f"{ours['seconds'] / theirs:.2f}"]
            allowed = ours["weight_bytes"] + 2 * largest + 300 * 10**6
            sizes = (f"{size / 2**20:.0f}" for size in (ours["peak_bytes"], allowed))
            size = f"{ours['weight_bytes'] / 2**20:.0f}"
            print("|", " | ".join([name, size, f"{ours['seconds']:.1f}", *cells, *sizes]), "|")


def _llama(source: Path, out: Path, name: str, threads: int) -> float:
    job = {
        "source": str(source), "out": str(out), "type": FILE_TYPES[name], "threads": threads,
    }  # fmt: skip
    command = [str(peer_python(None)), str(HERE / "llama_quantize.py"), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds: float = json.loads(done.stdout.splitlines()[-1])["seconds"]
    return seconds


def worker(job: dict[str, Any]) -> None:
    """Open a folder, quantized; seconds and memory in bytes, as JSON."""
    done, peak = threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.005):
            lines = Path("/proc/self/status").read_text().splitlines()
            (size,) = (line.split()[1] for line in lines if line.startswith("RssAnon"))
            peak[0] = max(peak[0], int(size) * 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start_s = time.perf_counter()
    opened = Model.open(job["folder"], isq=job["isq"], threads=job["threads"], context=512)
    elapsed_s = time.perf_counter() - start_s
    done.set()
    watcher.join()
    size = sum(total.nbytes for total in opened.weight_formats)
    print(json.dumps({"seconds": elapsed_s, "peak_bytes": peak[0], "weight_bytes": size}))


def main() -> None:
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        worker(json.loads(sys.argv[1]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    errors = commands.add_parser("error")
    errors.add_argument("--library", type=Path, default=next(PEERS.rglob("libggml-base.so"), None))
    perplexities = commands.add_parser("perplexity")
    perplexities.add_argument("texts", type=Path, nargs="*", default=TEXTS)
    perplexities.add_argument("--tokens", type=int, default=2000)
    models = commands.add_parser("model")
    models.add_argument("--types", default="q4k,q8_0,hqq4,fp8")
    models.add_argument("--folder", type=Path, help="keep the weights here, or take them from here")
    models.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.command == "error":
        error(options.library)
    elif options.command == "perplexity":
        perplexity(options.texts, options.tokens)
    else:
        model(options.types.lower().split(","), options.folder, options.threads)


if __name__ == "__main__":
    main()
