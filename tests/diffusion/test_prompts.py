"""Ids of prompts against transformers' tokenizers, whatever people write."""

from __future__ import annotations

import inspect
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from squall.diffusion.prompts import BEGIN, END, ClipTokens, T5Tokens
from squall.errors import InvalidCheckpoint, InvalidRequest, ModelNotFound, UnsupportedModel

WORDS = "a photo of an astronaut riding a horse on mars, highly detailed, 8k, it's don't we'll"
TEXTS = [
    "", " ", "\n", "a cat", "A CAT in Ünïcödé, ŒUVRE, İstanbul ẞ",
    "  two  spaces\t\ttabs \n\n lines\r\n", "1234 5.6e7, 8k; 1/2 ½ ² ٣",
    "it's I'm we'll you'd they've don't can't O'Neil's 'quoted' ''",
    "emoji 🐈\u200d⬛ 👩🏽\u200d🚀 🇫🇷 ❤\ufe0f done", "漢字かな交じり文 한국어 العربية עברית हिन्दी",
    "e\u0301 é \u212b ﬁ ﬀ ① \uff46\uff55\uff4c\uff4c", "a,b.c!d?e(f)g[h]{i}<j>|k|#l",
    "zero\u200bwidth \u00a0nbsp \ufeff bom \u2028 line \x00 nul \x07 bell",
    " ".join(WORDS.split()[n % 16] for n in range(200)), "x" * 500, "!?" * 60,
    "snake_case CamelCase http://example.com/?q=a%20b&c=d#e", "~`@$^&*_+=-\\\"'",
    "▁ already ▁there▁",
    f"named {BEGIN} tokens{END}of it </s> <pad> <unk> <extra_id_0>",
    "<|STARTOFTEXT|> <|EndOfText|>",
]  # fmt: skip


def corpus() -> Iterator[str]:
    for module in (inspect, json, random, io):
        yield from inspect.getsource(module).splitlines()
    yield from TEXTS[3:] * 3


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vocab.json and merges.txt as OpenAI's: bytes, bytes that end words, merges, names."""
    made = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    bytelevel = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([words, bytelevel])
    trainer = trainers.BpeTrainer(
        vocab_size=1500, end_of_word_suffix="</w>", show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(corpus(), trainer)
    merges = [" ".join(pair) for pair in json.loads(made.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet)]
    names += [merge.replace(" ", "") for merge in merges]
    names = [*dict.fromkeys(names), BEGIN, END]
    folder = tmp_path_factory.mktemp("clip")
    vocab = {name: i for i, name in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder


@pytest.mark.parametrize("text", TEXTS)
def test_clip(clip_folder: Path, tmp_path: Path, text: str) -> None:
    theirs = CLIPTokenizer.from_pretrained(clip_folder)
    wanted = theirs(text).input_ids
    for place in (clip_folder, clip_folder / "vocab.json"):
        assert ClipTokens.open(place).encode(text) == wanted
    theirs.save_pretrained(tmp_path)  # which writes a tokenizer.json
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        assert ClipTokens.open(place).encode(text) == wanted


def test_clip_is_cut_and_pooled(clip_folder: Path) -> None:
    tokens = ClipTokens.open(clip_folder)
    theirs = CLIPTokenizer.from_pretrained(clip_folder)
    for text in TEXTS:
        ids = tokens.encode(text)
        wanted = theirs(text, padding="max_length", max_length=77, truncation=True).input_ids
        padded = tokens.pad(ids, 77)
        assert padded == wanted
        assert padded[tokens.pooled_row(padded)] == tokens.end
        assert tokens.end not in padded[: tokens.pooled_row(padded)]


# ---- T5 ----


@pytest.fixture(scope="session")
def pieces() -> sentencepiece.SentencePieceProcessor:
    """As T5's: padding, end and unknown first; texts are normalized by NFKC."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for line in corpus() if line.strip() and "\0" not in line),
        model_writer=model, model_type="unigram", vocab_size=900, character_coverage=0.99,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def charsmap(pieces: sentencepiece.SentencePieceProcessor) -> bytes:
    """Field 2 of the normalizer's specification, field 3 of a model."""
    return next(_field(next(_field(pieces.serialized_model_proto(), 3)), 2))


def _field(data: bytes, wanted: int) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        size, after = _varint(data, at)
        kind = key & 7
        end = {0: after, 1: at + 8, 2: after + size, 5: at + 4}[kind]
        if kind == 2 and key >> 3 == wanted:
            yield data[after:end]
        at = end


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


def t5_metadata(pieces: sentencepiece.SentencePieceProcessor, **changes: Any) -> dict[str, Any]:
    """As llama.cpp writes them: what the table has beyond the pieces is unused."""
    size = pieces.get_piece_size()
    kinds = [2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 1 for i in range(size)]
    made = {
        "model": "t5",
        "tokens": [*map(pieces.id_to_piece, range(size)), *(f"[PAD{size + i}]" for i in range(9))],
        "scores": np.array([*map(pieces.get_score, range(size)), *[-1e4] * 9], np.float32),
        "token_type": np.array([*kinds, *[5] * 9], np.int32),
        "eos_token_id": 1, "unknown_token_id": 2, "padding_token_id": 0,
        "add_space_prefix": True, "remove_extra_whitespaces": True, "add_eos_token": True,
        "precompiled_charsmap": np.frombuffer(charsmap(pieces), np.uint8),
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in (made | changes).items()}


def t5_of_transformers(pieces: sentencepiece.SentencePieceProcessor) -> T5Tokenizer:
    ids = range(pieces.get_piece_size())
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in ids]
    return T5Tokenizer(vocab, _spm_precompiled_charsmap=charsmap(pieces))


@pytest.mark.parametrize("text", TEXTS)
def test_t5(pieces: sentencepiece.SentencePieceProcessor, tmp_path: Path, text: str) -> None:
    theirs = t5_of_transformers(pieces)
    theirs.save_pretrained(tmp_path)
    wanted = theirs(text).input_ids
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        assert T5Tokens.open(place).encode(text) == wanted
    if "<extra_id" not in text:  # which GGUF files do not name
        for changes in ({}, {"unknown_token_id": None}, {"eos_token_id": None}):
            assert T5Tokens.from_gguf(t5_metadata(pieces, **changes)).encode(text) == wanted


def test_t5_as_sentencepiece(pieces: sentencepiece.SentencePieceProcessor) -> None:
    """Of cuts that are as good it may take another."""
    tokens = T5Tokens.from_gguf(t5_metadata(pieces))
    for text in set(corpus()):
        if "\0" not in text and "</s>" not in text:
            *ids, end = tokens.encode(text)
            wanted = pieces.encode(text)
            assert pieces.decode(ids) == pieces.decode(wanted)
            scores = [sum(map(pieces.get_score, found)) for found in (ids, wanted)]
            assert scores[0] == pytest.approx(scores[1], rel=1e-5), text
            assert end == 1


def test_t5_is_padded_or_refused(pieces: sentencepiece.SentencePieceProcessor) -> None:
    tokens = T5Tokens.from_gguf(t5_metadata(pieces))
    ids = tokens.encode("a cat")
    assert tokens.pad(ids, len(ids) + 2) == [*ids, 0, 0]
    assert tokens.pad(ids, len(ids)) == ids
    with pytest.raises(InvalidRequest, match=rf"{len(ids)} tokens.*reads 2;"):
        tokens.pad(ids, 2)


# ---- what is refused ----


def test_missing_and_foreign_files(clip_folder: Path, tmp_path: Path) -> None:
    for kind in (T5Tokens, ClipTokens):
        with pytest.raises(ModelNotFound, match=r"tokenizer\.json"):
            kind.open(tmp_path)
        file = tmp_path / "other.json"
        for text in ("{}", "nonsense", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'):
            file.write_text(text)
            with pytest.raises(InvalidCheckpoint):
                kind.open(file)
    with pytest.raises(InvalidCheckpoint, match="</s>"):
        T5Tokens.open(saved(clip_folder, tmp_path))
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(ModelNotFound, match=r"merges\.txt"):
        ClipTokens.open(tmp_path / "vocab.json")
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(InvalidCheckpoint):
        ClipTokens.open(tmp_path / "vocab.json")


def saved(clip_folder: Path, path: Path) -> Path:
    CLIPTokenizer.from_pretrained(clip_folder).save_pretrained(path / "clip")
    return path / "clip" / "tokenizer.json"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": "llama"}, UnsupportedModel),
        ({"model": None}, UnsupportedModel),
        ({"tokens": None}, InvalidCheckpoint),
        ({"scores": ["x"]}, InvalidCheckpoint),
        ({"scores": np.zeros(3, np.float32)}, InvalidCheckpoint),
        ({"tokens": ["a"] * 909, "eos_token_id": None}, InvalidCheckpoint),
        ({"eos_token_id": 10**6}, InvalidCheckpoint),
        ({"unknown_token_id": None, "token_type": np.ones(909, np.int32)}, InvalidCheckpoint),
        ({"precompiled_charsmap": [1, 2, 3]}, InvalidCheckpoint),
        ({"precompiled_charsmap": ["x"]}, InvalidCheckpoint),
    ],
)  # fmt: skip
def test_metadata_that_does_not_fit(
    pieces: sentencepiece.SentencePieceProcessor, changes: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        T5Tokens.from_gguf(t5_metadata(pieces, **changes))


def test_a_table_of_characters_that_leads_out_of_itself(
    pieces: sentencepiece.SentencePieceProcessor,
) -> None:
    table = np.frombuffer(charsmap(pieces), np.uint8)
    cut = table[: 4 + int(table[:4].view("<u4")[0]) + 10]
    tokens = T5Tokens.from_gguf(t5_metadata(pieces, precompiled_charsmap=cut))
    with pytest.raises(InvalidCheckpoint, match="out of bounds"):
        tokens.encode(" ".join(TEXTS))


def test_half_a_character(clip_folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        ClipTokens.open(clip_folder).encode("a \ud800 b")
