"""Files from before GGUF, written by hand, against transformers, gguf-py and sentencepiece."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import tiny
from convert import convert
from gguf.quants import quantize
from harness import MakeExecutor, distance, run

from squall.checkpoints.ggml import is_ggml, open_ggml
from squall.checkpoints.gguf import open_gguf
from squall.decoder import compile
from squall.errors import InvalidRequest, SquallError, UnsupportedModel
from squall.recipes import load
from squall.text.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CASE = next(case for case in tiny.CASES if case.name == "llama")
OLD = {
    "token_embd": "tok_embeddings", "output_norm": "norm", "output": "output",
    "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv",
    "attn_output": "attention.wo", "attn_norm": "attention_norm", "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3", "ffn_norm": "ffn_norm",
}  # fmt: skip
QUANTS = gguf.GGMLQuantizationType
Vocabulary = list[tuple[bytes, float]]
VOCABULARY: Vocabulary = [(b"", 0.0)] * 3 + [(bytes([i]), 0.0) for i in range(256)]


def old_name(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    layer = ["layers", parts[1]] if parts[0] == "blk" else []
    return ".".join([*layer, OLD[parts[-1]], "weight"])


def write(
    path: Path,
    hparams: tuple[int, ...],
    vocabulary: Vocabulary,
    tensors: dict[str, tuple[int, tuple[int, ...], bytes]],
    magic: bytes = b"tjgg",
    version: int = 3,
) -> Path:
    """The format as llama.cpp described it until August 2023."""
    out = io.BytesIO()
    out.write(magic + (b"" if magic == b"lmgg" else struct.pack("<I", version)))
    out.write(struct.pack("<7I", *hparams))
    for text, score in vocabulary:
        out.write(struct.pack("<I", len(text)) + text)
        out.write(b"" if magic == b"lmgg" else struct.pack("<f", score))
    for name, (kind, shape, data) in tensors.items():
        out.write(struct.pack("<3I", len(shape), len(name), kind))
        out.write(struct.pack(f"<{len(shape)}I", *shape[::-1]) + name.encode())
        out.write(bytes(-out.tell() % 32) if magic == b"tjgg" else b"")
        out.write(data)
    path.write_bytes(out.getvalue())
    return path


def model_tensors(source: Path, kind: QUANTS) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    """The tensors of a GGUF file by their old names; matrices quantized by gguf-py."""
    found = {}
    for tensor in gguf.GGUFReader(source).tensors:
        values = np.asarray(tensor.data, np.float32)
        matrix = values.ndim == 2
        data = quantize(values, kind if matrix else QUANTS.F32)
        number = int(kind if matrix else QUANTS.F32)
        found[old_name(tensor.name)] = (number, values.shape, data.tobytes())
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny LLaMA with what the old files take for granted, and its GGUF file."""
    model = tiny.build(CASE)
    model.config.rms_norm_eps = 1e-5
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-5
    path = tmp_path_factory.mktemp("ggml") / "a.gguf"
    convert(model, CASE.architecture, path)
    return model, path


def hparams(config: Any, vocab: int | None = None) -> tuple[int, ...]:
    heads = config.num_attention_heads
    return (vocab or config.vocab_size, config.hidden_size, 256, heads, config.num_hidden_layers,
            config.hidden_size // heads, 0)  # fmt: skip


def old_file(path: Path, source: tuple[Any, Path], kind: QUANTS, **options: Any) -> Path:
    config = source[0].config
    vocabulary = VOCABULARY[: config.vocab_size]
    return write(path, hparams(config), vocabulary, model_tensors(source[1], kind), **options)


KINDS = {
    "ggml": (b"lmgg", 0), "ggmf 1": (b"fmgg", 1), "ggjt 1": (b"tjgg", 1), "ggjt 3": (b"tjgg", 3),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(
    kind: str, source: tuple[Any, Path], make_reference: MakeExecutor, tmp_path: Path
) -> None:
    import torch

    magic, version = KINDS[kind]
    path = old_file(tmp_path / "a.bin", source, QUANTS.F32, magic=magic, version=version)
    gqa = source[0].config.num_attention_heads // source[0].config.num_key_value_heads
    assert is_ggml(path)
    checkpoint = open_ggml(path, gqa=gqa)
    recipe = load(checkpoint)
    executor = make_reference(
        compile(recipe.decoder, recipe.names, context=tiny.CONTEXT), checkpoint
    )
    tokens = list(range(3, 33))
    with torch.no_grad():
        wanted = source[0](torch.tensor([tokens])).logits[0].numpy()
    assert distance(run(executor, tokens, [30]), wanted) < 1e-5


@pytest.mark.parametrize("kind", [QUANTS.F16, QUANTS.Q4_0, QUANTS.Q5_1, QUANTS.Q8_0])
def test_blocks_equal_ggufs(kind: QUANTS, source: tuple[Any, Path], tmp_path: Path) -> None:
    found = open_ggml(old_file(tmp_path / "a.bin", source, kind), gqa=2).tensors
    expected = open_gguf(source[1]).tensors
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape
        if len(tensor.shape) == 2:
            values = quantize(expected[name].to_float32(), kind)
            assert np.array_equal(tensor.to_float32(), gguf.quants.dequantize(values, kind))


def test_vocabulary_equals_sentencepiece(source: tuple[Any, Path], tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "data" / "english.txt").read_text()
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=made, vocab_size=600,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    sp = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
    vocabulary = []
    for i in range(sp.vocab_size()):
        piece = sp.id_to_piece(i).replace("\u2581", " ").encode()
        piece = bytes([i - 3]) if sp.is_byte(i) else b"" if sp.is_control(i) else piece
        vocabulary.append((piece, sp.get_score(i)))
    tensors = model_tensors(source[1], QUANTS.F32)
    file = write(tmp_path / "a.bin", hparams(source[0].config, 600), vocabulary, tensors)
    tokenizer = Tokenizer.from_gguf(open_ggml(file).metadata)
    for line in [*text.splitlines()[:300], "a  b\tc é \U0001fae0", "<s>x</s>"]:
        assert tokenizer.encode(line, add_bos=False) == sp.encode(line)
        assert tokenizer.decode(tokenizer.encode(line), skip_specials=True) == line
    assert tokenizer.encode("x")[0] == sp.bos_id()


@pytest.mark.parametrize("version", [1, 2])
def test_older_blocks_are_refused(version: int, source: tuple[Any, Path], tmp_path: Path) -> None:
    path = old_file(tmp_path / "a.bin", source, QUANTS.Q4_0, version=version)
    with pytest.raises(UnsupportedModel, match=r"before ggjt 3.*convert"):
        open_ggml(path, gqa=2)


@pytest.mark.parametrize("gqa", [0, -1, 3, 8])
def test_gqa_divides_the_heads(gqa: int, source: tuple[Any, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="must divide the 4 heads"):
        open_ggml(old_file(tmp_path / "a.bin", source, QUANTS.F32), gqa=gqa)


TENSOR = (0, (4, 2), bytes(32))
SMALL = (3, 2, 256, 1, 1, 2, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"hparams": (2**32 - 1, *SMALL[1:])},
        {"hparams": (0, *SMALL[1:])},
        {"version": 4},
        {"magic": b"fmgg", "version": 3},
        {"magic": b"GGUF"},
        {"tensors": {"strange.weight": TENSOR}},
        {"tensors": {"layers.x.ffn_norm.weight": TENSOR}},
        {"tensors": {"layers.999999.ffn_norm.weight": TENSOR}},
        {"tensors": {"../norm.weight": TENSOR}},
        {"tensors": {"norm.weight": (0, (4, 4), bytes(32))}},
        {"tensors": {"norm.weight": (0, (2**31, 2**31), bytes(32))}},
        {"tensors": {"norm.weight": (0, (0, 4), b"")}},
        {"tensors": {"norm.weight": (0, (), b"")}},
        {"tensors": {"norm.weight": (0, (1, 1, 1), bytes(4))}},
        {"tensors": {"norm.weight": (99, (4, 2), bytes(32))}},
        {"tensors": {"norm.weight": (2, (4, 2), bytes(32))}},
        {"tensors": {"n" * 300: TENSOR}},
        {"tensors": {"norm.weight": TENSOR, "layers.0.norm.weight": TENSOR, "": TENSOR}},
        {"vocabulary": [(bytes(1 << 17), 0.0)] * 3},
    ],
)
def test_malformed_files_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    given = {"hparams": SMALL, "vocabulary": [(b"a", 0.0)] * 3, "tensors": {"norm.weight": TENSOR}}
    open_ggml(write(tmp_path / "a.bin", **given))
    with pytest.raises(SquallError):
        open_ggml(write(tmp_path / "b.bin", **{**given, **changes}))


def test_cut_off_files_are_refused(source: tuple[Any, Path], tmp_path: Path) -> None:
    data = old_file(tmp_path / "a.bin", source, QUANTS.Q8_0).read_bytes()
    random = np.random.default_rng(5)
    for end in [*range(200), *random.integers(200, len(data), 100)]:
        (tmp_path / "b.bin").write_bytes(data[:end])
        try:
            whole = open_ggml(tmp_path / "b.bin", gqa=2)
        except SquallError:
            continue
        with pytest.raises(SquallError):  # cut between two tensors
            load(whole)
