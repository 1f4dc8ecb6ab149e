"""SentencePiece BPE against the sentencepiece library, on models it trains here."""

from __future__ import annotations

import inspect
import io
import json
import random
import string
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import sentencepiece

from squall.errors import InvalidCheckpoint
from squall.text import pieces
from squall.text.tokenizer import Piece, Tokenizer

USER = ["<b>", "</b>", "\u2581\u2581\u2581", "\n\n"]
Pair = tuple[sentencepiece.SentencePieceProcessor, Tokenizer]


def text_lines(strings: list[str]) -> Iterator[str]:
    for module in (inspect, json, random, string, io, pieces):
        yield from inspect.getsource(module).splitlines()
    yield from (line for text in strings[:3000] for line in text.splitlines())


def train(strings: list[str], **options: Any) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    lines = (line for line in text_lines(strings) if "\0" not in line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=2000,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        num_threads=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def metadata(
    sp: sentencepiece.SentencePieceProcessor, *, space_prefix: bool, user: list[str] | None = None
) -> dict[str, Any]:
    ids = range(sp.get_piece_size())
    tokens = [sp.id_to_piece(i) for i in ids]

    def kind(i: int) -> int:
        if tokens[i] in (user or []):
            return 4
        return 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([sp.get_score(i) for i in ids], np.float32),
        "tokenizer.ggml.token_type": np.array([kind(i) for i in ids], np.int32),
        "tokenizer.ggml.bos_token_id": sp.bos_id(),
        "tokenizer.ggml.eos_token_id": sp.eos_id(),
        "tokenizer.ggml.unknown_token_id": sp.unk_id(),
        "tokenizer.ggml.add_space_prefix": space_prefix,
    }


@pytest.fixture(scope="module")
def llama(strings: list[str]) -> Pair:
    """As Llama 2 has it: a space before the text, bytes for what has no piece."""
    sp = train(strings, byte_fallback=True, split_digits=True)
    return sp, Tokenizer.from_gguf(metadata(sp, space_prefix=True))


@pytest.fixture(scope="module")
def gemma(strings: list[str]) -> Pair:
    """As Gemma has it: nothing before the text, and tokens for mark-up and runs of space."""
    sp = train(
        strings,
        byte_fallback=True,
        add_dummy_prefix=False,
        user_defined_symbols=USER,
        split_digits=True,
    )
    return sp, Tokenizer.from_gguf(metadata(sp, space_prefix=False, user=USER))


@pytest.fixture(scope="module")
def without_bytes(strings: list[str]) -> Pair:
    """One unknown token for whatever has no piece."""
    sp = train(strings, split_by_whitespace=False)
    return sp, Tokenizer.from_gguf(metadata(sp, space_prefix=True))


@pytest.mark.parametrize("name", ["llama", "gemma", "without_bytes"])
def test_equals_sentencepiece(
    name: str, request: pytest.FixtureRequest, strings: list[str]
) -> None:
    sp, tokenizer = request.getfixturevalue(name)
    texts = [text for text in strings if text]
    for text, ids in zip(texts, sp.encode(texts), strict=True):
        assert tokenizer.encode(text, add_bos=False) == ids, text
        if name == "llama":
            assert tokenizer.decode(ids) == sp.decode(ids) or "\u2581" in text


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_round_trip(name: str, request: pytest.FixtureRequest, strings: list[str]) -> None:
    _, tokenizer = request.getfixturevalue(name)
    for text in strings:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos
        assert tokenizer.decode(ids, skip_specials=True) == text
        parsed = tokenizer.encode(text, add_bos=False, specials=True)
        assert tokenizer.decode(parsed) == text


@pytest.mark.parametrize("alphabet", ["ab", "abc", "ab ", "aé漢b"])
def test_ties_and_long_words(alphabet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small alphabets make every kind of overlap; the library for long words must merge alike."""
    random_ = random.Random(3)
    lines = ["".join(random_.choices(alphabet, k=40)) for _ in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    texts = ["".join(random_.choices(alphabet, k=random_.randint(1, 60))) for _ in range(2000)]
    texts += ["".join(random_.choices(alphabet, k=3000)), "ab" * 1000, "aab" * 1000]
    expected = sp.encode(texts)
    for long in (pieces._LONG, 0):
        monkeypatch.setattr(pieces, "_LONG", long)
        tokenizer = Tokenizer.from_gguf(metadata(sp, space_prefix=True))
        assert [tokenizer.encode(text, add_bos=False) for text in texts] == expected


def test_control_tokens_and_their_spaces(llama: Pair) -> None:
    sp, tokenizer = llama
    assert tokenizer.encode("<s>a</s>", specials=True) == [1, *sp.encode("a"), 2]
    assert tokenizer.encode("<s>a", add_bos=False) == sp.encode("<s>a")
    assert not {1, 2} & set(tokenizer.encode("<s> </s>", add_bos=False))
    assert tokenizer.encode("a</s>b c", specials=True) == [1, *sp.encode("a"), 2, *sp.encode("b c")]
    assert tokenizer.encode_pieces([Piece("<s>"), Piece("a", content=True)]) == [1, *sp.encode("a")]
    assert tokenizer.encode("") == [1]
    assert tokenizer.stop_ids == {2}
    assert tokenizer.token_bytes(tokenizer.encode("\x07", add_bos=False)[-1]) == b"\x07"


@pytest.mark.serial
def test_a_megabyte_is_quick(llama: Pair, gemma: Pair) -> None:
    letters = random.Random(5).choices(string.ascii_lowercase, k=1_000_000)
    texts = [
        c * (1_000_000 // len(c.encode())) for c in ("a", " ", "\n", "1", "é", "漢", "\t ", "ab ")
    ]
    for _, tokenizer in (llama, gemma):
        for text in [*texts, "".join(letters)]:
            start = time.process_time()
            ids = tokenizer.encode(text, add_bos=False)
            assert tokenizer.decode(ids) == text
            assert time.process_time() - start < 2.0, text[:5]  # half that when nothing else runs


def test_scores_are_needed(llama: Pair) -> None:
    wrong = metadata(llama[0], space_prefix=True)
    del wrong["tokenizer.ggml.scores"]
    with pytest.raises(InvalidCheckpoint, match="scores"):
        Tokenizer.from_gguf(wrong)
