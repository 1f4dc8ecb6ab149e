"""Coverage-guided fuzzing of the GGUF reader; needs `pip install atheris`.

    python tests/fuzz/fuzz_gguf.py --seconds 600

Any exception but SquallError, or an input that takes over a second, is a finding: the input is kept
in the folder given by --findings, and `python tests/fuzz/fuzz_gguf.py INPUT` runs it again.
"""

from __future__ import annotations

import argparse
import contextlib
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from squall.checkpoints import Inspection

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "src")]

MAX_INPUT_BYTES = 4096
MAX_SECONDS = 1.0
WORDS = [b"GGUF", b"split.no", b"split.count", b"split.tensors.count", b"general.alignment"]
NUMBERS = (0, 1, 2, 8, 9, 32, 2**16, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def part(number: int) -> bytes:
    """One of the two parts of a valid split file."""
    from checkpoints import gguf_builder as b

    keys = {"split.no": number, "split.count": 2, "split.tensors.count": 2}
    fields = [(key, b.scalar(b.U16, value)) for key, value in keys.items()]
    return b.File(fields, [b.TensorEntry(f"t{number}", (4,))], bytes(16)).to_bytes()


def seeds() -> list[bytes]:
    """Valid files that reach every kind of value and format, and the small hostile ones."""
    from checkpoints import gguf_builder as b
    from checkpoints.gguf_corpus import hostile
    from squall.quant import GGML_FORMATS

    found = [b.small().to_bytes(), b.small().with_(version=2).to_bytes(), part(0), part(1)]
    for format in GGML_FORMATS.values():
        entry = b.TensorEntry("t", (format.block, 2), format.ggml_id)
        found.append(b.File([], [entry], bytes(2 * format.block_bytes)).to_bytes())
    scalars = [(f"k{kind}", b.scalar(kind, 1)) for kind in b.CODES]
    arrays = [(f"a{kind}", b.array(kind, bytes(16), 2)) for kind in b.CODES]
    found.append(b.File([*scalars, *arrays]).to_bytes())
    return found + [content for _, content in hostile() if len(content) <= MAX_INPUT_BYTES]


def texts(inspection: Inspection) -> Iterator[str]:
    """What a user interface would print of the file's own words."""
    for field in inspection.metadata:
        yield from (field.key, str(field))
    for tensor in inspection.tensors:
        yield tensor.name


def make_target(folder: Path) -> Callable[[bytes], None]:
    """The function under test. Each input is a file, half of the time the second part of two."""
    from squall.checkpoints import describe, open_gguf, read_header
    from squall.errors import SquallError

    pairs = [[folder / f"{name}-0000{n}-of-00002.gguf" for n in (1, 2)] for name in "ab"]
    pairs[0][1].write_bytes(part(1))
    pairs[1][0].write_bytes(part(0))
    fuzzed = [pairs[0][0], pairs[1][1]]

    def run(path: Path) -> None:
        with contextlib.suppress(SquallError):
            found = describe(read_header(path))
            assert all(text.isprintable() for text in texts(found))
        with contextlib.suppress(SquallError):
            for tensor in open_gguf(path).tensors.values():
                assert tensor.to_float32().shape == tensor.shape

    def target(data: bytes) -> None:
        path = fuzzed[len(data) % 2]
        path.write_bytes(data)
        start = time.thread_time()
        run(path)
        seconds = time.thread_time() - start
        assert seconds < MAX_SECONDS, f"{len(data)} bytes took {seconds:.1f} s"

    return target


def write_dictionary(path: Path) -> None:
    words = WORDS + [struct.pack("<Q", n) for n in NUMBERS]
    words += [struct.pack("<I", n) for n in (*range(42), 2**31, 2**32 - 1)]
    lines = ["".join(f"\\x{byte:02x}" for byte in word) for word in words]
    path.write_text("".join(f'"{line}"\n' for line in lines))


def fuzz(folder: Path, seconds: int, findings: Path) -> None:
    """Never returns: the fuzzer ends the process on the spot, with 0 if nothing was found."""
    import atheris

    with atheris.instrument_imports(include=["squall"]):
        target = make_target(folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds()):
        (corpus / str(number)).write_bytes(seed)
    write_dictionary(folder / "words")
    options = {
        "max_total_time": seconds,
        "max_len": MAX_INPUT_BYTES,
        "timeout": 10,
        "rss_limit_mb": 1024,
        "dict": folder / "words",
        "artifact_prefix": f"{findings}/",
        "print_final_stats": 1,
    }
    arguments = [f"-{name}={value}" for name, value in options.items()]
    atheris.Setup([sys.argv[0], *arguments, str(corpus)], target)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", nargs="*", type=Path, help="run these inputs and do not fuzz")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        fuzz(args.folder, args.seconds, args.findings)
    with tempfile.TemporaryDirectory(prefix="squall-fuzz-") as name:
        if not args.inputs:
            child = [sys.executable, __file__, *sys.argv[1:], "--folder", name]
            sys.exit(subprocess.run(child, check=False).returncode)
        target = make_target(Path(name))
        for path in args.inputs:
            target(path.read_bytes())


if __name__ == "__main__":
    main()
