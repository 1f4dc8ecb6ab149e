"""Tokenizers of folders against transformers, on small vocabularies trained here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Library
from transformers import PreTrainedTokenizerFast

from squall.errors import InvalidCheckpoint, InvalidRequest, UnsupportedModel
from squall.text.hf_tokenizer import HfTokenizer
from squall.text.stream import TextStream
from squall.text.tokenizer import Piece

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
BASIC = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
Make = Callable[[list[str]], Library]


def trained(library: Library, trainer: Any, corpus: list[str]) -> Library:
    library.train_from_iterator(corpus, trainer)
    return library


def bytelevel(corpus: list[str]) -> Library:
    """As Llama 3 and Qwen: a pattern, bytes, no BOS."""
    made = Library(models.BPE())
    pattern = r"\p{N}{1,3}|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    return trained(made, trainer, corpus)


def byte_fallback_bpe(corpus: list[str]) -> Library:
    """As Llama 2: spaces are U+2581, one before each text; bytes for what has no piece."""
    first = Library(models.BPE(unk_token="<unk>"))
    first.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=[*SPECIALS, *BYTES],
        limit_alphabet=150,
        show_progress=False,
        max_token_length=8,
    )
    spec = json.loads(trained(first, trainer, corpus).to_str())
    spec["model"] |= {"byte_fallback": True, "fuse_unk": True}
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in SPECIALS]
    made = Library.from_str(json.dumps(spec))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return made


def metaspace_bpe(corpus: list[str]) -> Library:
    """As Mistral's newer files: a space before the first text alone."""
    spec = json.loads(byte_fallback_bpe(corpus).to_str())
    spec["normalizer"] = None
    spec["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "first",
        "split": False,
    }
    return Library.from_str(json.dumps(spec))


def unigram(corpus: list[str]) -> Library:
    """As sentencepiece's own: pieces with scores, and the control tokens among them."""
    made = Library(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=900, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(corpus, trainer)
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return made


def unigram_bytes(corpus: list[str]) -> Library:
    """The same with bytes for what has no piece."""
    spec = json.loads(unigram(corpus).to_str())
    spec["model"]["byte_fallback"] = True
    spec["model"]["vocab"] += [[text, 0.0] for text in BYTES]
    spec["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "ByteFallback"},
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        ],
    }
    return Library.from_str(json.dumps(spec))


MADE: dict[str, Make] = {
    made.__name__: made
    for made in (bytelevel, byte_fallback_bpe, metaspace_bpe, unigram, unigram_bytes)
}


def save(folder: Path, library: Library, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(library.to_str())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **BASIC, **config})
    )
    return folder


@pytest.fixture(scope="module", params=MADE)
def folder(
    request: pytest.FixtureRequest, strings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    made = MADE[request.param](strings[:1500])
    made.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "\n  ")])
    return save(tmp_path_factory.mktemp(request.param), made)


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[HfTokenizer, PreTrainedTokenizerFast]:
    return HfTokenizer.from_folder(folder), PreTrainedTokenizerFast.from_pretrained(folder)


def test_specials_in_text_are_read_as_transformers_does(
    pair: tuple[HfTokenizer, Any], strings: list[str]
) -> None:
    ours, theirs = pair
    for text, ids in zip(strings, theirs(strings)["input_ids"], strict=True):
        if not text.startswith("<s>"):  # transformers would say BOS twice
            assert ours.encode(text, specials=True) == ids, text


def test_plain_text_equals_transformers(pair: tuple[HfTokenizer, Any], strings: list[str]) -> None:
    ours, theirs = pair
    plain = [text for text in strings if not any(special in text for special in SPECIALS)]
    expected = theirs(plain, add_special_tokens=False)["input_ids"]
    assert len(plain) > len(strings) // 2
    for text, ids in zip(plain, expected, strict=True):
        assert ours.encode(text, add_bos=False) == ids, text
        assert ours.decode(ids) == theirs.decode(ids), text
        stream = TextStream(ours)
        assert "".join(map(stream.push, ids)) + stream.finish() == theirs.decode(
            ids, skip_special_tokens=True
        )


def test_names_of_controls_are_text_in_content(
    pair: tuple[HfTokenizer, Any], strings: list[str]
) -> None:
    ours, _ = pair
    controls = {ours.encode(name, add_bos=False, specials=True)[-1] for name in SPECIALS[1:]}
    assert len(controls) == len(SPECIALS) - 1
    plain = [*SPECIALS[1:], "a</s>", "<s></s>", "</s>" * 300, "<|im_<|im_end|>end|>"]
    for text in [*plain, *(text for text in strings if "<" in text)]:
        ids = ours.encode(text, add_bos=False)
        assert controls.isdisjoint(ids), text
    for text in plain:
        ids = ours.encode(text, add_bos=False)
        unknown = ours.decode(ours.encode("<unk>", add_bos=False, specials=True))
        assert ours.decode(ids) == text or unknown in ours.decode(ids)


def test_pieces_join_and_controls_come_from_the_template_alone(
    pair: tuple[HfTokenizer, Any],
) -> None:
    ours, theirs = pair
    pieces = [
        Piece("<|im_start|>user\n"),
        Piece("hi the", content=True),
        Piece("re<|im_end|>\n<|im_start|>"),
    ]
    whole = "<|im_start|>user\nhi there<|im_end|>\n<|im_start|>"
    expected = theirs(whole, add_special_tokens=False)["input_ids"]
    assert ours.encode_pieces(pieces, add_bos=False) == expected


def test_bos_comes_once(pair: tuple[HfTokenizer, Any]) -> None:
    ours, theirs = pair
    first = theirs("x")["input_ids"][0]
    has_bos = first == theirs.bos_token_id
    assert (ours.encode("x")[0] == ours.bos) == has_bos
    assert ours.encode("<s>x", specials=True).count(ours.bos) == 1
    assert ours.encode("<s>x").count(ours.bos) == has_bos


def test_single_tokens_decode_as_in_transformers(pair: tuple[HfTokenizer, Any]) -> None:
    ours, theirs = pair
    for token in range(len(theirs)):
        if b"\xff" not in ours.token_bytes(token) and ours.token_bytes(token).isascii():
            assert ours.decode([2, token]) == theirs.decode([2, token])
    assert ours.vocab_size == len(theirs)
    assert ours.token_bytes(len(theirs)) == b""
    with pytest.raises(InvalidRequest):
        ours.token_bytes(-1)


@pytest.mark.parametrize("kind", ["prefix", "bos", "no bos"])
def test_add_bos_token_wins(kind: str, strings: list[str], tmp_path: Path) -> None:
    config = {"prefix": {}, "bos": {"add_bos_token": True}, "no bos": {"add_bos_token": False}}
    library = byte_fallback_bpe(strings[:200])
    ours = HfTokenizer.from_folder(save(tmp_path, library, **config[kind]))
    assert (ours.encode("x")[0] == ours.bos) == (kind != "no bos")


def test_stops_are_all_that_the_files_name(strings: list[str], tmp_path: Path) -> None:
    library = bytelevel(strings[:200])
    library.add_tokens(["<|user|>", "<stop>"])
    save(tmp_path, library, eos_token={"content": "</s>", "lstrip": False, "__type": "AddedToken"})
    user, stop = (library.token_to_id(text) for text in ("<|user|>", "<stop>"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, user]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": stop, "bos_token_id": 1}))
    ours = HfTokenizer.from_folder(tmp_path)
    assert ours.stop_ids == {2, user, stop, library.token_to_id("<|im_end|>")}
    assert ours.eos == 2
    assert ours.is_special(user)
    assert user not in ours.encode("<|user|>")
    assert ours.encode("<|user|>", specials=True) == [user]


def test_stripping_tokens_equal_transformers(strings: list[str], tmp_path: Path) -> None:
    library = byte_fallback_bpe(strings[:200])
    library.add_special_tokens(
        [
            AddedToken("<left>", lstrip=True, normalized=False),
            AddedToken("<right>", rstrip=True, normalized=False),
        ]
    )
    save(tmp_path, library)
    ours, theirs = (
        HfTokenizer.from_folder(tmp_path),
        PreTrainedTokenizerFast.from_pretrained(tmp_path),
    )
    for text in ("a  <left> b", "a <right>\n b", " <right>  <left> ", "<left><right>  x"):
        assert ours.encode(text, specials=True) == theirs(text)["input_ids"]


def test_tokens_that_only_the_configuration_has_are_added(
    strings: list[str], tmp_path: Path
) -> None:
    library = bytelevel(strings[:200])
    size = library.get_vocab_size()
    token = {"content": "<new>", "special": True, "normalized": False}
    save(tmp_path, library, added_tokens_decoder={str(size): token})
    ours = HfTokenizer.from_folder(tmp_path)
    assert ours.encode("<new>", specials=True) == [size]
    assert ours.is_special(size)
    save(tmp_path, library, added_tokens_decoder={str(size + 5): token})
    with pytest.raises(InvalidCheckpoint, match="should have id"):
        HfTokenizer.from_folder(tmp_path)


def test_truncation_and_padding_of_the_file_are_off(strings: list[str], tmp_path: Path) -> None:
    library = bytelevel(strings[:200])
    library.enable_truncation(4)
    library.enable_padding(length=8)
    ours = HfTokenizer.from_folder(save(tmp_path, library))
    assert len(ours.encode("a b c d e f g h i j k")) > 8
    assert len(ours.encode("a")) == 1


def test_a_character_is_text_even_if_it_pads(strings: list[str], tmp_path: Path) -> None:
    library = bytelevel(strings[:200])
    library.add_special_tokens(["!"])
    ours = HfTokenizer.from_folder(save(tmp_path, library, pad_token="!"))
    assert ours.decode(ours.encode("Hi! There!"), skip_specials=True) == "Hi! There!"


def test_another_file_may_be_named(strings: list[str], tmp_path: Path) -> None:
    save(tmp_path, bytelevel(strings[:200]))
    other = tmp_path / "other.json"
    (tmp_path / "tokenizer.json").rename(other)
    assert HfTokenizer.from_folder(tmp_path, tokenizer_json=other).encode("a")
    with pytest.raises(InvalidCheckpoint, match="does not exist"):
        HfTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "not JSON"),
        ("[]", "JSON object"),
        ("{}", "tokenizer.json"),
        ("[" * 100_000, "JSON"),
        ('{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}}',
         "allowed"),
    ],
)  # fmt: skip
def test_broken_files_are_refused(text: str, error: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(InvalidCheckpoint, match=error):
        HfTokenizer.from_folder(tmp_path)


def test_unknown_decoders_are_named(strings: list[str], tmp_path: Path) -> None:
    library = bytelevel(strings[:100])
    library.decoder = decoders.CTC()
    with pytest.raises(UnsupportedModel, match="'CTC'; known: BPEDecoder"):
        HfTokenizer.from_folder(save(tmp_path, library))


@pytest.mark.timeout(20)  # quadratic steps take minutes
@pytest.mark.parametrize("unit", ["a ", "1", "</s>", "  \n", "<|im_end|>", "é\u0301", "\U0001fae0"])
def test_long_texts_end(unit: str, pair: tuple[HfTokenizer, Any]) -> None:
    ours, theirs = pair
    ids = ours.encode(unit * (500_000 // len(unit)), add_bos=False)
    if unit in SPECIALS:
        assert theirs.convert_tokens_to_ids(unit) not in ids
    else:
        text = unit * (20_000 // len(unit))  # long for us, and transformers need not be quick
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_bos=False) == expected
