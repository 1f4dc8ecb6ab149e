"""Prompts to fill in, against the ids that the libraries make of texts and tokens."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from squall.errors import InvalidCheckpoint, InvalidRequest
from squall.text.fill import Fill
from squall.text.hf_tokenizer import HfTokenizer
from squall.text.tokenizer import Tokenizer as Ours

BEFORE, AFTER = "def f(x):\n    return <|fim_middle|>", "\n\nprint(f(2)) # <｜fim▁hole｜>\n"  # noqa: RUF001
SPELLINGS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
)


def library(strings: list[str]) -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|fim_pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(strings[:300], trainer)
    return made


def gguf(made: Any, types: dict[str, int], **named: int) -> dict[str, Any]:
    """What a GGUF file says of a vocabulary."""
    vocab = sorted(made.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocab]
    merges = json.loads(made.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.token_type": np.array([types.get(t, 1) for t in tokens], np.int32),
        "tokenizer.ggml.eos_token_id": 0,
        **{f"tokenizer.ggml.{name}_token_id": i for name, i in named.items()},
    }


@pytest.mark.parametrize("texts", SPELLINGS)
@pytest.mark.parametrize("special", [True, False])
def test_prefix_suffix_middle(
    texts: tuple[str, ...], special: bool, strings: list[str], tmp_path: Path
) -> None:
    made = library(strings)
    before, after = made.encode(BEFORE).ids, made.encode(AFTER).ids  # it knows no token yet
    made.add_tokens([AddedToken(t, special=special, normalized=False) for t in texts])
    ids = [made.token_to_id(text) for text in texts]
    wanted = [ids[0], *before, ids[1], *after, ids[2]]
    (tmp_path / "tokenizer.json").write_text(made.to_str())
    folder = HfTokenizer.from_folder(tmp_path)
    file = Ours.from_gguf(gguf(made, dict.fromkeys(texts, 3 if special else 4)))
    for ours in (folder, file):
        assert ours.encode_fill(BEFORE, AFTER) == wanted
        assert ours.encode_fill("", "") == ids
        assert ours.filling is not None
        assert ours.filling.stops == {*ids, made.token_to_id("<|fim_pad|>")}
        assert not set(ids) & {*ours.encode(BEFORE), *ours.encode(" ".join(texts))}


def test_other_files_have_their_names(strings: list[str]) -> None:
    """The repository, and each file after its name, as Qwen2.5-Coder's authors have it."""
    made = library(strings)
    shown = [made.encode(text).ids for text in ("project\n", "a.py\n", "y = 1\n", "file\n")]
    before, after = made.encode(BEFORE).ids, made.encode(AFTER).ids
    texts = (*SPELLINGS[0], "<|repo_name|>", "<|file_sep|>")
    made.add_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
    first, second, between, repository, file = (made.token_to_id(text) for text in texts)
    ours = Ours.from_gguf(gguf(made, dict.fromkeys(texts, 3)))
    fill = [first, *before, second, *after, between]
    assert ours.encode_fill(BEFORE, AFTER, [("a.py", "y = 1\n")], 1000) == [
        repository, *shown[0], file, *shown[1], *shown[2], file, *shown[3], *fill
    ]  # fmt: skip
    assert ours.encode_fill(BEFORE, AFTER, [], 1000) == fill


def test_files_name_them(strings: list[str]) -> None:
    made = library(strings)
    before, after = made.encode(BEFORE).ids, made.encode(AFTER).ids
    for names in (("fim_pre", "fim_suf", "fim_mid"), ("prefix", "suffix", "middle")):
        ours = Ours.from_gguf(gguf(made, {}, **dict(zip(names, (300, 301, 302), strict=True))))
        assert ours.encode_fill(BEFORE, AFTER) == [300, *before, 301, *after, 302]
        assert ours.filling == Fill((300, 301, 302), frozenset({300, 301, 302, 1}))
    assert Ours.from_gguf(gguf(made, {}, fim_pre=300, fim_suf=301)).filling is None
    with pytest.raises(InvalidCheckpoint, match="fim_pre_token_id"):
        Ours.from_gguf(gguf(made, {}, fim_pre=700, fim_suf=301, fim_mid=302))


def test_the_suffix_first(strings: list[str], tmp_path: Path) -> None:
    """Codestral's order, as mistral_common has it: BOS, suffix, prefix, and nothing else."""
    made = library(strings)
    before, after = made.encode(BEFORE).ids, made.encode(AFTER).ids
    made.add_special_tokens(["<s>", "[SUFFIX]", "[PREFIX]"])
    bos, second, first = range(700, 703)
    (tmp_path / "tokenizer.json").write_text(made.to_str())
    config = {"bos_token": "<s>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = HfTokenizer.from_folder(tmp_path)
    assert ours.encode_fill(BEFORE, AFTER) == [bos, second, *after, first, *before]


def test_code_llama(strings: list[str]) -> None:
    """A space is put before the prefix, as before any text, and none before the suffix."""
    out = io.BytesIO()
    texts = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in strings[:1500] for line in text.splitlines()),
        model_writer=out, model_type="bpe", vocab_size=900, byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, control_symbols=[*texts], hard_vocab_limit=False,
        character_coverage=0.98,
    )  # fmt: skip
    sp = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    ids = range(sp.get_piece_size())
    kinds = [3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in ids]
    ours = Ours.from_gguf({
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": np.array([sp.get_score(i) for i in ids], np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.bos_token_id": sp.bos_id(),
        "tokenizer.ggml.eos_token_id": sp.eos_id(),
        "tokenizer.ggml.unknown_token_id": sp.unk_id(),
    })  # fmt: skip
    first, second, between, end = (sp.piece_to_id(text) for text in texts)
    mark = sp.encode("\x01")
    after = sp.encode("\x01" + AFTER)[len(mark) :]
    wanted = [sp.bos_id(), first, *sp.encode(BEFORE), second, *after, between]
    assert ours.encode_fill(BEFORE, AFTER) == wanted
    assert ours.filling is not None
    assert end in ours.filling.stops


def test_a_model_without_them(smollm: Ours) -> None:
    with pytest.raises(InvalidRequest, match="suffix"):
        smollm.encode_fill("a", "b")
