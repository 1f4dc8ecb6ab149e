"""LLaMA files from before GGUF (magics ggml, ggmf, ggjt): given the metadata that GGUF would have.

The files do not say the context, the epsilon of the norms or how many query heads share a key: the
first two are LLaMA 2's here, the last is for the caller to say.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from struct import Struct
from types import MappingProxyType

import numpy as np

from squall.checkpoints.base import Checkpoint, Entry, Field, Tensor, map_file, mapped
from squall.checkpoints.gguf_header import MAX_NAME_BYTES, MAX_TENSORS, Cursor
from squall.errors import InvalidCheckpoint, InvalidRequest, UnsupportedModel
from squall.files import quote
from squall.quant import by_ggml_id

CONTEXT = 4096
EPSILON = 1e-5
MAX_VOCAB = 1 << 20
MAX_TOKEN_BYTES = 1 << 16
ALIGNMENT = 32
# (magic, version) -> whether there are scores, whether data is aligned, whether blocks are GGUF's.
_LAYOUTS = {
    (b"lmgg", 0): (False, False, False),
    (b"fmgg", 1): (True, False, False),
    (b"tjgg", 1): (True, True, False),
    (b"tjgg", 2): (True, True, False),
    (b"tjgg", 3): (True, True, True),
}
_SAME_IN_ALL = (0, 1)  # f32 and f16
_U32, _F32 = Struct("<I"), Struct("<f")
_HPARAMS = ("n_vocab", "n_embd", "n_mult", "n_head", "n_layer", "n_rot", "ftype")
_NAMES = {
    "tok_embeddings": "token_embd", "norm": "output_norm", "output": "output",
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v",
    "attention.wo": "attn_output", "attention_norm": "attn_norm", "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up",
}  # fmt: skip
_NAME = re.compile(r"(?:layers\.(\d{1,5})\.)?([a-z0-9_.]+?)\.weight")
_UNKNOWN, _CONTROL, _NORMAL, _UNUSED, _BYTE = 2, 3, 1, 5, 6
_FIRST_BYTE = 3  # after <unk>, <s> and </s>


def is_ggml(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like one from before GGUF."""
    try:
        with open(path, "rb") as file:
            return file.read(4) in {magic for magic, _ in _LAYOUTS}
    except OSError:
        return False


def open_ggml(path: str | os.PathLike[str], *, gqa: int = 1) -> Checkpoint:
    """Open a file; `gqa` query heads share each key, 8 in LLaMA 2 70B.

    Raises UnsupportedModel for quantized files older than ggjt 3, whose blocks are others.
    """
    file = Path(path)
    buffer = map_file(file, "give the path of a model file")
    cursor = Cursor(buffer, file.name, len(buffer))
    magic, version = _version(cursor)
    scored, aligned, current = _LAYOUTS[magic, version]
    hparams = {name: cursor.integer(_U32, name) for name in _HPARAMS}
    if not 1 <= hparams["n_vocab"] <= MAX_VOCAB or min(hparams.values()) < 0:
        raise cursor.fault(f"it claims {hparams['n_vocab']} tokens; the limit is {MAX_VOCAB}")
    heads = hparams["n_head"]
    if gqa < 1 or heads % gqa:
        raise InvalidRequest(f"gqa is {gqa}; it must divide the {heads} heads of the model")
    vocabulary = _vocabulary(cursor, hparams["n_vocab"], scored=scored)
    tensors = _tensors(cursor, aligned=aligned, current=current)
    metadata = {**_metadata(hparams, gqa, tensors), **vocabulary}
    return Checkpoint(
        file, MappingProxyType(metadata), MappingProxyType(tensors), len(buffer), version, (file,)
    )


def _version(cursor: Cursor) -> tuple[bytes, int]:
    start = cursor.take(4, "the magic number")
    magic = cursor.buffer[start : start + 4]
    if magic not in {known for known, _ in _LAYOUTS}:
        raise InvalidCheckpoint(f"{quote(cursor.source)} is not a GGML file: it has {magic!r}")
    version = 0 if magic == b"lmgg" else cursor.integer(_U32, "the version")
    if (magic, version) not in _LAYOUTS:
        kind = f"{magic[::-1].decode()} {version or ''}".rstrip()
        raise UnsupportedModel(
            f"{quote(cursor.source)} is of kind {kind}; Squall reads ggml, ggmf 1 and ggjt 1 to 3"
        )
    return magic, version


def _vocabulary(cursor: Cursor, count: int, *, scored: bool) -> dict[str, Field]:
    cursor.need(count * (8 if scored else 4), f"{count} tokens")
    tokens, types, scores = [], [], np.empty(count, np.float32)
    for i in range(count):
        size = cursor.integer(_U32, f"the length of token {i}")
        if size > MAX_TOKEN_BYTES:
            raise cursor.fault(f"token {i} has {size} bytes; the limit is {MAX_TOKEN_BYTES}")
        start = cursor.take(size, f"token {i}")
        text, kind = _token(i, cursor.buffer[start : start + size])
        tokens.append(text)
        types.append(kind)
        scores[i] = -i  # pieces are sorted by their scores
        if scored:
            scores[i] = _F32.unpack_from(cursor.buffer, cursor.take(4, f"score {i}"))[0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def _token(i: int, data: bytes) -> tuple[str, int]:
    """The files hold text with spaces, bytes as themselves, and no names of control tokens."""
    if i < _FIRST_BYTE:
        return ("<unk>", "<s>", "</s>")[i], _CONTROL if i else _UNKNOWN
    if i < _FIRST_BYTE + 256 and data == bytes([i - _FIRST_BYTE]):
        return f"<0x{data[0]:02X}>", _BYTE
    if not data:
        return f"<unused {i}>", _UNUSED
    return data.decode("utf-8", "surrogateescape").replace(" ", "\u2581"), _NORMAL


def _tensors(cursor: Cursor, *, aligned: bool, current: bool) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    while cursor.position < len(cursor.buffer):
        tensor = _tensor(cursor, aligned=aligned, current=current)
        if tensor.name in tensors or len(tensors) >= MAX_TENSORS:
            raise cursor.fault(
                f"tensor {quote(tensor.name)} is there twice, or there are over {MAX_TENSORS}"
            )
        tensors[tensor.name] = tensor
    tensors.pop("rope.freqs", None)  # the usual frequencies, written down
    return tensors


def _tensor(cursor: Cursor, *, aligned: bool, current: bool) -> Tensor:
    dims = cursor.integer(_U32, "the dimensions of a tensor")
    size = cursor.integer(_U32, "the length of a tensor's name")
    type_id = cursor.integer(_U32, "the type of a tensor")
    if not 1 <= dims <= 2 or not 1 <= size <= MAX_NAME_BYTES:
        raise cursor.fault(f"a tensor has {dims} dimensions and a name of {size} bytes")
    shape = tuple(cursor.integer(_U32, "the shape of a tensor") for _ in range(dims))[::-1]
    start = cursor.take(size, "a tensor's name")
    name = _name(cursor, str(cursor.buffer[start : start + size], "utf-8", "replace"))
    if not current and type_id not in _SAME_IN_ALL:
        raise UnsupportedModel(
            f"{quote(cursor.source)}: tensor {quote(name)} is quantized in blocks from before "
            "ggjt 3; only f32 and f16 are read from such files: convert the model again"
        )
    format = by_ggml_id(type_id)
    if not math.prod(shape):
        raise cursor.fault(f"tensor {quote(name)} has shape {shape}; no axis may be 0")
    if aligned:
        cursor.take(-cursor.position % ALIGNMENT, f"the padding of {quote(name)}")
    nbytes = math.prod(shape[:-1]) * format.row_bytes(shape[-1])
    start = cursor.take(nbytes, f"tensor {quote(name)}")
    return mapped(cursor.buffer, Entry(name, format.name, shape, nbytes, start))


def _name(cursor: Cursor, old: str) -> str:
    if old == "rope.freqs":
        return old
    match = _NAME.fullmatch(old)
    new = _NAMES.get(match[2]) if match else None
    if match is None or new is None:
        raise cursor.fault(f"tensor {quote(old)} is none of LLaMA's")
    return f"{new}.weight" if match[1] is None else f"blk.{int(match[1])}.{new}.weight"


def _metadata(
    hparams: Mapping[str, int], gqa: int, tensors: Mapping[str, Tensor]
) -> dict[str, Field]:
    up = tensors.get("blk.0.ffn_up.weight")
    return {
        "general.architecture": "llama",
        "llama.context_length": CONTEXT,
        "llama.embedding_length": hparams["n_embd"],
        "llama.block_count": hparams["n_layer"],
        "llama.feed_forward_length": 0 if up is None else up.rows,
        "llama.attention.head_count": hparams["n_head"],
        "llama.attention.head_count_kv": hparams["n_head"] // gqa,
        "llama.attention.layer_norm_rms_epsilon": EPSILON,
        "llama.rope.dimension_count": hparams["n_rot"],
    }
