"""Byte-level BPE against `tokenizers` set up by hand, and against the algorithm written out."""

from __future__ import annotations

import itertools
import time
import unicodedata
import warnings
from functools import lru_cache
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from squall.errors import InvalidCheckpoint, InvalidRequest, UnsupportedModel
from squall.text import pretokenizers
from squall.text.tokenizer import Piece, Tokenizer

Metadata = dict[str, Any]


def library(metadata: Metadata, *steps: Any) -> tokenizers.Tokenizer:
    """`tokenizers` with the vocabulary, and a pre-tokenizer as in a model's tokenizer.json."""
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return made


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
DIGITS = pre_tokenizers.Digits(individual_digits=True)


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


PUBLISHED = {  # by tokenizer.ggml.pre: the steps in the tokenizer.json of the models that have it
    "smollm": (DIGITS, GPT2),
    "gpt-2": (GPT2,),
    "llama-bpe": (
        split(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        BYTES,
    ),
    "tekken": (
        split(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        BYTES,
    ),
    "falcon": (
        pre_tokenizers.Punctuation("contiguous"),
        GPT2,
        pre_tokenizers.Digits(individual_digits=False),
        split("[0-9][0-9][0-9]"),
    ),
}


@pytest.mark.parametrize("pre", PUBLISHED)
def test_equals_the_published_pipeline(
    pre: str, smollm_metadata: Metadata, strings: list[str]
) -> None:
    strings = strings if pre in ("smollm", "llama-bpe") else strings[::4]
    ours = Tokenizer.from_gguf({**smollm_metadata, "tokenizer.ggml.pre": pre})
    theirs = library(smollm_metadata, *PUBLISHED[pre])
    theirs.model.ignore_merges = pre in ("llama-bpe", "tekken")
    expected = theirs.encode_batch(strings, add_special_tokens=False)
    wrong = [
        text
        for text, row in zip(strings, expected, strict=True)
        if ours.encode(text, add_bos=False) != row.ids
    ]
    assert not wrong, (len(wrong), wrong[:3])


def _kind(character: str) -> str:
    if character.isspace() and character not in "\x1c\x1d\x1e\x1f":
        return "space"
    return {"L": "letter", "N": "digit"}.get(unicodedata.category(character)[0], "other")


def _words(text: str) -> list[str]:
    """GPT-2's words, with every digit on its own, by hand."""
    words, i = [], 0
    while i < len(text):
        contraction = next(
            (c for c in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if text.startswith(c, i)), ""
        )
        first = i + (
            text[i] == " " and i + 1 < len(text) and _kind(text[i + 1]) in ("letter", "other")
        )
        kind, end = _kind(text[first]), first
        while end < len(text) and _kind(text[end]) == kind:
            end += 1
        if contraction:
            end = i + len(contraction)
        elif kind == "digit":
            end = i + 1
        elif kind == "space" and end < len(text) and _kind(text[end]) != "digit" and end - i > 1:
            end -= 1  # the last space goes with what follows
        words.append(text[i:end])
        i = end
    return words


def test_equals_the_algorithm(
    smollm: Tokenizer, smollm_metadata: Metadata, strings: list[str]
) -> None:
    ids = {token: i for i, token in enumerate(smollm_metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(m.split(" ")): i for i, m in enumerate(smollm_metadata["tokenizer.ggml.merges"])}
    keep = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    symbols = [chr(b if b in keep else next(others)) for b in range(256)]

    @lru_cache(None)
    def merged(word: str) -> tuple[int, ...]:
        parts = [symbols[b] for b in word.encode()]
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: ranks.get(pair, 1 << 30))
            if best not in ranks:
                break
            i = pairs.index(best)
            parts[i : i + 2] = ["".join(best)]
        return tuple(ids[part] for part in parts)

    for text in strings:
        if any(unicodedata.category(c) == "Cn" for c in text):
            continue  # later Unicode versions may know what it is
        expected = [i for word in _words(text) for i in merged(word)]
        assert smollm.encode(text) == expected, text


# This vocabulary has no token for these bytes; every implementation loses them.
ABSENT = {0xF1, 0xF2, 0x04, 0x06, 0x13, 0x14, 0x16, 0x1D}


def test_round_trip(smollm: Tokenizer, strings: list[str]) -> None:
    for text in strings:
        if ABSENT.intersection(text.encode()):
            continue
        assert smollm.decode(smollm.encode(text)) == text
        assert smollm.decode(smollm.encode(text, specials=True)) == text


def test_every_name_splits_without_loss(smollm_metadata: Metadata, strings: list[str]) -> None:
    for pre, name in {pre: name for name, pre in pretokenizers.PRES.items()}.items():
        tokenizer = Tokenizer.from_gguf({**smollm_metadata, "tokenizer.ggml.pre": name})
        for text in strings[:120]:
            if ABSENT.intersection(text.encode()):
                continue
            whole = unicodedata.normalize("NFC", text) if pre.nfc else text
            assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == whole, name


def test_unknown_and_missing_pre_tokenizers_warn(smollm_metadata: Metadata) -> None:
    with pytest.warns(UserWarning, match="'nonesuch', unknown.*llama-bpe"):
        unknown = Tokenizer.from_gguf({**smollm_metadata, "tokenizer.ggml.pre": "nonesuch"})
    without = {k: v for k, v in smollm_metadata.items() if k != "tokenizer.ggml.pre"}
    with pytest.warns(UserWarning, match=r"no tokenizer\.ggml\.pre"):
        missing = Tokenizer.from_gguf(without)
    gpt2 = Tokenizer.from_gguf({**smollm_metadata, "tokenizer.ggml.pre": "gpt-2"})
    assert unknown.encode("a 123") == missing.encode("a 123") == gpt2.encode("a 123")


def test_control_tokens_only_where_asked(smollm: Tokenizer) -> None:
    for name, token in {"<|im_start|>": 1, "<|im_end|>": 2, "<|endoftext|>": 0}.items():
        assert smollm.encode(name, specials=True) == [token]
        assert token not in smollm.encode(f"a{name}{name} {name}")
        assert smollm.is_special(token)
    parts = [*smollm.encode("a"), 2, *smollm.encode(" b")]
    assert smollm.encode("a<|im_end|> b", specials=True) == parts
    assert smollm.decode(parts) == "a<|im_end|> b"
    assert smollm.decode(parts, skip_specials=True) == "a b"
    assert smollm.stop_ids == {0, 2}
    assert (smollm.bos, smollm.eos, smollm.vocab_size) == (1, 2, 49152)


def test_no_token_that_reads_like_a_control_token_from_text(smollm_metadata: Metadata) -> None:
    # Words that are tokens are taken whole with llama-bpe; a control token must not be.
    tokens = [*smollm_metadata["tokenizer.ggml.tokens"], "end"]
    types = [*smollm_metadata["tokenizer.ggml.token_type"], 3]
    clash = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    tokenizer = Tokenizer.from_gguf({**smollm_metadata, **clash, "tokenizer.ggml.pre": "llama-bpe"})
    assert len(tokens) - 1 not in tokenizer.encode("end")


def test_user_defined_tokens_are_always_read(smollm_metadata: Metadata) -> None:
    types = smollm_metadata["tokenizer.ggml.token_type"].copy()
    types[[3, 4]] = 4  # <repo_name>, <reponame>
    tokenizer = Tokenizer.from_gguf({**smollm_metadata, "tokenizer.ggml.token_type": types})
    assert tokenizer.encode("<repo_name><reponame>") == [3, 4]
    assert tokenizer.decode([3, 4], skip_specials=True) == "<repo_name><reponame>"
    assert not tokenizer.is_special(3)


def test_bos_is_never_doubled(smollm_metadata: Metadata) -> None:
    tokenizer = Tokenizer.from_gguf({**smollm_metadata, "tokenizer.ggml.add_bos_token": True})
    assert tokenizer.encode("a") == [1, 81]
    assert tokenizer.encode("a", add_bos=False) == [81]
    assert tokenizer.encode("<|im_start|>a", specials=True) == [1, 81]
    assert tokenizer.encode_pieces([Piece("<|im_start|>"), Piece("a", content=True)]) == [1, 81]
    assert tokenizer.encode("") == [1]


def test_pieces_are_tokenized_as_their_text(smollm: Tokenizer, strings: list[str]) -> None:
    for text in strings[:2000]:
        safe = text.replace("<", "")
        pieces = [Piece("<|im_start|>user\n"), Piece(safe, content=True), Piece("<|im_end|>\n")]
        whole = "".join(piece.text for piece in pieces)
        assert smollm.encode_pieces(pieces) == smollm.encode(whole, specials=True)
    pieces = [Piece("x<|im_"), Piece("end|><|im_end|>", content=True), Piece("<|im_end|>")]
    ids = smollm.encode_pieces(pieces)
    assert ids.count(2) == 1
    assert smollm.decode(ids) == "x<|im_end|><|im_end|><|im_end|>"


def test_phi3_control_tokens_swallow_white_space(smollm_metadata: Metadata) -> None:
    tokenizer = Tokenizer.from_gguf({**smollm_metadata, "general.name": "Phi-3 mini"})
    ids = tokenizer.encode("<repo_name>\n x<|im_end|> y", specials=True)
    assert tokenizer.decode(ids) == "<repo_name>x<|im_end|> y"


LONG = {
    **{
        repr(c): c * (1_000_000 // len(c.encode()))
        for c in ("a", " ", "\n", "1", "é", "漢", "<", "\t ")
    },
    "word": "abcdefghijklmnopqrstuvwxyz" * 38_000,
    "control": "<|im_end|>" * 100_000,
    "digits": " x 12" + "0123456789\u0663" * 80_000 + " 7 8  9",
}


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
def test_long_texts_as_short_ones(pre: str, smollm_metadata: Metadata, strings: list[str]) -> None:
    tokenizer = Tokenizer.from_gguf({**smollm_metadata, "tokenizer.ggml.pre": pre})
    theirs = library(smollm_metadata, *PUBLISHED[pre])
    theirs.model.ignore_merges = pre == "llama-bpe"
    for text in ("".join(strings), LONG["digits"][-20_000:], LONG["digits"][:20_000]):
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_bos=False) == expected


@pytest.mark.serial
@pytest.mark.parametrize("name", LONG)
def test_a_megabyte_is_quick(name: str, smollm: Tokenizer) -> None:
    start = time.process_time()
    ids = smollm.encode(LONG[name])
    assert smollm.decode(ids) == LONG[name]
    assert time.process_time() - start < 2.0  # half that when nothing else runs


def test_bad_input_is_refused(smollm: Tokenizer, smollm_metadata: Metadata) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        smollm.encode("a\ud800")
    with pytest.raises(InvalidRequest, match="outside"):
        smollm.decode([49152])
    with pytest.raises(UnsupportedModel, match=r"'rwkv'; known: gpt2, llama"):
        Tokenizer.from_gguf({**smollm_metadata, "tokenizer.ggml.model": "rwkv"})
    broken: list[Metadata] = [
        {"tokenizer.ggml.tokens": []},
        {"tokenizer.ggml.merges": None},
        {"tokenizer.ggml.merges": ["no such"]},
        {"tokenizer.ggml.merges": ["nospace"]},
        {"tokenizer.ggml.eos_token_id": 1 << 30},
        {"tokenizer.ggml.token_type": [1]},
        {"tokenizer.ggml.model": None},
    ]
    for change in broken:
        with pytest.raises(InvalidCheckpoint):
            Tokenizer.from_gguf({**smollm_metadata, **change})


@pytest.mark.serial
def test_building_is_quick(smollm_metadata: Metadata) -> None:
    start = time.process_time()
    with warnings.catch_warnings():
        Tokenizer.from_gguf(smollm_metadata)
    assert time.process_time() - start < 0.3


def test_vocabularies_agree_but_for_padding(smollm: Tokenizer, smollm_metadata: Metadata) -> None:
    size, key = smollm.vocab_size, "tokenizer.ggml.tokens"
    tokens, types = smollm_metadata[key], [*smollm_metadata["tokenizer.ggml.token_type"]]

    def changed(names: list[str], kinds: list[int]) -> Tokenizer:
        more = {key: names, "tokenizer.ggml.token_type": kinds}
        return Tokenizer.from_gguf({**smollm_metadata, **more})

    padded = changed([*tokens, f"[PAD{size}]", f"[PAD{size + 1}]"], [*types, 5, 5])
    assert smollm.differs(padded) is padded.differs(smollm) is None
    assert smollm.differs(changed([*tokens, "more"], [*types, 1])) == size
    assert smollm.differs(changed([*tokens[:9], "other", *tokens[10:]], types)) == 9
    assert smollm.differs(changed(tokens, [*types[:9], 1, *types[10:]])) == 9
