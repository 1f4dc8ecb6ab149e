"""Decoders of tokenizer.json against the `tokenizers` library: ids to text, at once and in turn."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library

from squall.errors import UnsupportedModel
from squall.text.hf_tokenizer import HfTokenizer
from squall.text.stream import TextStream

REPLACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
BYTES, FUSE = {"type": "ByteFallback"}, {"type": "Fuse"}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "decoders": list(steps)}


DECODERS = {
    "Gemma": sequence(REPLACE, BYTES, FUSE),
    "Llama": sequence(REPLACE, BYTES, FUSE, STRIP),
    "strip of each token": sequence(REPLACE, STRIP),
    "strip of each token, then the first": sequence(STRIP, REPLACE, FUSE, STRIP),
    "replace": REPLACE,
    "bytes": BYTES,
    "fuse": FUSE,
    "metaspace": metaspace("always"),
    "metaspace first": metaspace("first"),
    "metaspace never": metaspace("never"),
    "bytes and metaspace": sequence(BYTES, metaspace("always")),
    "byte level": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                   "use_regex": True},
    "byte level in a sequence": sequence({"type": "ByteLevel", "add_prefix_space": False,
                                          "trim_offsets": True, "use_regex": True}),
    "suffix": {"type": "BPEDecoder", "suffix": "</w>"},
}  # fmt: skip
WORDS = [
    "<pad>", "<s>", "</s>", "<unk>", "▁", "▁▁", "▁▁▁▁", "▁a", "b▁", "▁▁c▁d", "e</w>", "f</w>g", "h",
    " i", "j ", "Ġk", "ĠĠ", "Ċ", "é", "<0x41>", "<0x20>", "<0x0A>", "<0x7a>", "日本",
]  # fmt: skip
# Texts of added tokens, and where they may stand in a text, which does not matter here.
ADDED = [
    ("▁▁", False, {}), ("▁▁▁▁", False, {"normalized": True}), ("<think>", False, {}),
    ("\n\n", False, {"normalized": False}), ("▁new▁", False, {"lstrip": True}),
    ("<0x42>", False, {}),
    ("Ġĉ", False, {"rstrip": True}), ("x</w>", False, {"single_word": True}), ("  two", False, {}),
    ("<s>", True, {}), ("</s>", True, {}), ("<unk>", True, {}), ("<pad>", True, {}),
    ("<|im▁end|>", True, {"lstrip": True}), ("▁<|a|>", True, {"rstrip": True, "normalized": True}),
    ("Ġ<|b|>", True, {"single_word": True}), ("<|c</w>|>", True, {}),
]  # fmt: skip


def folder(path: Path, decoder: dict[str, Any]) -> Path:
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    added = []
    for text, special, flags in ADDED:
        names = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
        token = {"id": vocabulary.setdefault(text, len(vocabulary)), "content": text}
        added.append({**token, **names, **flags, "special": special})
    words = {word: vocabulary[word] for word in WORDS}
    model = {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "vocab": words}
    spec = {"version": "1.0", "added_tokens": sorted(added, key=lambda token: token["id"])}
    spec |= {"decoder": decoder, "model": {**model, "merges": []}}
    (path / "tokenizer.json").write_text(json.dumps(spec))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", DECODERS)
def test_random_ids_equal_the_library(name: str, tmp_path: Path) -> None:
    folder(tmp_path, DECODERS[name])
    ours = HfTokenizer.from_folder(tmp_path)
    theirs = Library.from_file(str(tmp_path / "tokenizer.json"))
    size, chance = theirs.get_vocab_size(), random.Random(3)
    rows = [[i] for i in range(size)] + [[i, j] for i in range(size) for j in range(0, size, 3)]
    rows += [chance.choices(range(size), k=chance.randrange(2, 9)) for _ in range(1500)]
    if name == "suffix":  # its models have it, and spaces, nowhere but at the end of words
        odd = {theirs.token_to_id(text) for text in ("f</w>g", "<|c</w>|>", "j ")}
        rows = [ids for ids in rows if odd.isdisjoint(ids)]
    for ids in rows:
        stream = TextStream(ours)
        streamed = "".join(map(stream.push, ids)) + stream.finish()
        shown = theirs.decode(ids, skip_special_tokens=True)
        texts = [theirs.id_to_token(i) for i in ids]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False), texts
        assert ours.decode(ids, skip_specials=True) == shown == streamed, texts


def test_runs_of_spaces_are_added_tokens(tmp_path: Path) -> None:
    """As in Gemma's files: indentation is a token that is added, and not special."""
    ours = HfTokenizer.from_folder(folder(tmp_path, DECODERS["Gemma"]))
    two, four = WORDS.index("▁▁"), WORDS.index("▁▁▁▁")
    h = WORDS.index("h")
    assert ours.decode([h, four, h, two]) == "h    h  "
    stream = TextStream(ours)
    assert [stream.push(i) for i in (h, four, h, two)] == ["h", "    ", "h", "  "]


def test_characters_in_bytes_come_whole(tmp_path: Path) -> None:
    ours = HfTokenizer.from_folder(folder(tmp_path, DECODERS["Llama"]))
    assert ours.token_bytes(WORDS.index("<0x7a>")) == b"z"
    assert ours.token_bytes(WORDS.index("<0x20>"), first=True) == b""


@pytest.mark.parametrize("kind", ["WordPiece", "CTC"])
def test_decoders_of_other_models_are_refused(kind: str, tmp_path: Path) -> None:
    more = {"prefix": "##", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}
    with pytest.raises(UnsupportedModel, match=f"decoder '{kind}'; known: "):
        HfTokenizer.from_folder(folder(tmp_path, {"type": kind, **more}))
