"""Streams: together the pieces are the decoded text, cut before the first stop string."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest

from squall.errors import InvalidRequest
from squall.text.stream import TextStream
from squall.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def bytewise() -> Tokenizer:
    """A sentencepiece vocabulary of bytes and few pieces, in which any byte string can be said."""
    pieces = ["\u2581", "a", "b", "\u2581a", "ab", "abc", "STOP", "\U0001fae0", "\u2581\u2581"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    return Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": np.arange(0, -len(tokens), -1, dtype=np.float32),
            "tokenizer.ggml.token_type": np.array([2, 3, 3, *[6] * 256, *[1] * len(pieces)]),
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
        }
    )


def stream(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    made = TextStream(tokenizer, stop)
    parts = []
    for token in ids:
        parts.append(made.push(token))
        if made.stopped:
            break
    return [*parts, made.finish()]


def expected(text: str, stop: Sequence[str]) -> str:
    """The text before the stop string that is complete first; of two, before the earlier start."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    return text[: min(ends)[1]] if ends else text


def test_is_the_decoded_text(smollm: Tokenizer, strings: list[str]) -> None:
    for text in strings:
        ids = smollm.encode(text, specials=True)
        parts = stream(smollm, ids)
        assert "".join(parts) == smollm.decode(ids, skip_specials=True)
        assert "\ufffd" not in "".join(parts) or "\ufffd" in smollm.decode(ids)


@pytest.mark.parametrize(
    "text", ["🫠", "🥹", "龜", "👩‍👩‍👧‍👦", "é", "a\u200db", "🏳️‍🌈 x", "\U0010ffff"]
)
def test_whole_characters_only(text: str, smollm: Tokenizer, bytewise: Tokenizer) -> None:
    raw = [3 + b for b in text.encode()]
    for tokenizer, ids in ((smollm, smollm.encode(text)), (bytewise, raw)):
        parts = stream(tokenizer, ids)
        assert "".join(parts) == text
        assert not any("\ufffd" in part for part in parts)
    assert len([part for part in stream(bytewise, raw) if part]) == len(text)


def test_broken_characters_are_shown_once_they_cannot_be_completed(bytewise: Tokenizer) -> None:
    def of(raw: bytes) -> list[str]:
        return stream(bytewise, [3 + b for b in raw])

    assert of(b"\xf0\x9f\xabA") == ["", "", "", "\ufffdA", ""]
    assert of(b"\xf0\x9f") == ["", "", "\ufffd"]
    assert of(b"\xff\xc3\xa9") == ["\ufffd", "", "é", ""]
    assert of(b"\xe2\x28\xa1") == ["", "\ufffd(", "\ufffd", ""]
    for raw in itertools.product((0x41, 0x80, 0xBF, 0xC3, 0xE2, 0x82, 0xF0, 0x9F, 0xFF), repeat=4):
        assert "".join(of(bytes(raw))) == bytes(raw).decode(errors="replace")


def test_leading_space_and_control_tokens(bytewise: Tokenizer) -> None:
    space_a, two, b = (bytewise.vocab_size - k for k in (6, 1, 7))
    assert bytewise.token_bytes(space_a) == b" a"
    assert stream(bytewise, [space_a, space_a]) == ["a", " a", ""]
    assert stream(bytewise, [1, two, space_a, 2, b]) == ["", " ", " a", "", "b", ""]
    keeps = TextStream(bytewise, at_start=False)
    assert keeps.push(space_a) == " a"
    assert "".join(stream(bytewise, [0xF0 + 3, 2, 0x9F + 3, 0xAB + 3, 0xA0 + 3])) == "🫠"


STOPS = (["STOP"], ["\n\n"], ["ab", "abc"], ["aab", "abaab"], ["ba", "STO", "b🫠"], ["</s>"], [" "])


@pytest.mark.parametrize("stop", STOPS)
def test_stop_strings(stop: list[str], bytewise: Tokenizer) -> None:
    random_ = random.Random(11)
    last = bytewise.vocab_size
    for _ in range(3000):
        pool = [*range(last - 9, last), 3 + 10, 3 + 0xF0, 3 + 0x9F, 3 + ord("S"), 3 + ord("T"), 2]
        ids = random_.choices(pool, k=random_.randint(0, 14))
        whole = expected(bytewise.decode(ids, skip_specials=True), stop)
        made, shown = TextStream(bytewise, stop), ""
        for token in ids:
            shown += made.push(token)
            assert whole.startswith(shown)  # nothing of the stop string, not even for a moment
            if made.stopped:
                assert made.push(token) == ""
                break
        assert shown + made.finish() == whole


def test_stop_strings_over_one_to_five_tokens(smollm: Tokenizer) -> None:
    text = "The answer is forty-two</think>. And then more text follows."
    ids = smollm.encode(text)
    for first, last in itertools.combinations(range(len(text)), 2):
        stop = text[first : last + 1]
        made = TextStream(smollm, [stop])
        shown = "".join(itertools.takewhile(lambda _: True, map(made.push, ids))) + made.finish()
        assert shown == text[: text.find(stop)]
        assert made.stopped


def test_failed_prefixes_are_flushed_at_once(smollm: Tokenizer) -> None:
    made = TextStream(smollm, ["<stop>"])
    shown = [made.push(token) for token in smollm.encode("a <sto")]
    assert "".join(shown) == "a "
    assert "".join(made.push(token) for token in smollm.encode("ne> b")) == "<stone> b"
    assert made.finish() == ""
    held = TextStream(smollm, ["<stop>"])
    assert "".join(map(held.push, smollm.encode("x<st"))) == "x"
    assert held.finish() == "<st"
    assert held.finish() == ""
    assert not held.stopped


def test_a_stop_string_must_not_be_empty(smollm: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        TextStream(smollm, [""])


def test_control_tokens_that_are_part_of_a_text(smollm: Tokenizer) -> None:
    text = "<|im_start|>{<|im_end|>}<|im_start|>"
    ids = smollm.encode(text, add_bos=False, specials=True)
    (mark,) = smollm.encode("<|im_start|>", add_bos=False, specials=True)
    made = TextStream(smollm, ["}<|im_"], shown={mark})
    assert [made.push(token) for token in ids] == ["<|im_start|>", "{", "", "", ""]
    assert made.stopped
