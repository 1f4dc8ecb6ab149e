"""How each `tokenizer.ggml.pre` name cuts text into words before byte-level BPE, as data.

The patterns are those of the published tokenizers themselves, in Oniguruma's syntax. Several passes
that one pattern expresses exactly are one pattern here: each pass costs half a microsecond a word.
"""

# ruff: noqa: RUF001

from __future__ import annotations

import warnings
from dataclasses import dataclass

BYTES = "<bytes>"  # where in the steps characters become byte symbols; at the end when absent


@dataclass(frozen=True, slots=True)
class Pre:
    """Patterns applied in turn, each match a word of its own, and what else the name implies."""

    steps: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is that token, whatever the merges say
    add_bos: bool = False
    nfc: bool = False


_ANY_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LOWER_CASE = r"'s|'t|'re|'ve|'m|'ll|'d"
_SPACES = r"\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+|" + _SPACES
_GPT2 = rf"{_LOWER_CASE}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"
# Digits on their own, then GPT-2 in what lies between them: spaces before a digit form one word.
_GPT2_DIGITS = rf"\p{{N}}|{_LOWER_CASE}| ?\p{{L}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?=\p{{N}})|{_SPACES}"


def _modern(digits: str, *, contractions: str = _ANY_CASE, word: str = r"\p{L}+") -> str:
    other = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    return rf"{contractions}|[^\r\n\p{{L}}\p{{N}}]?{word}|{digits}|{other}|{_LINES}"


def _cased(digits: str, *, suffix: str = "", han: str = "", tail: str = r"[\r\n/]*") -> str:
    upper, lower = (
        rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{han}]",
        rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{han}]",
    )
    words = "|".join(
        rf"[^\r\n\p{{L}}\p{{N}}]?{letters}{suffix}"
        for letters in (f"{upper}*{lower}+", f"{upper}+{lower}*")
    )
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+{tail}|{_LINES}"


_ASCII_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    rf"{_ASCII_WORD}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}",
)
# As code points, since some of these letters do not survive a text's normalization.
_CASED_LETTERS = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F 386 "
    "388-38A 38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA "
    "1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 "
    "1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB "
    "1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D "
    "212F-2134 2139 213C-213F 2145-2149 214E 2183-2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2-2CF3 "
    "A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A "
    "FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF "
    "1E900-1E943"
)


def _class(ranges: str) -> str:
    ends = [[rf"\x{{{end}}}" for end in item.split("-")] for item in ranges.split()]
    return "[" + "".join("-".join(end) for end in ends) + "]"


_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?{_class(_CASED_LETTERS)}+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"(?<!\s)\s+$",  # without the look-behind a long run of spaces costs its length squared
    r"[一-龥ࠀ-一가-퟿]+",
    r"\p{N}",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_FALCON = (r"[\p{P}$+<=>^`|~]+", _GPT2, BYTES, r"\p{N}+", r"[0-9][0-9][0-9]")
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
_EXAONE_MOE = (
    rf"{_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|{_SPACES}"
)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|"
    + _SPACES
)
_SEED_CODER = (
    rf"{_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}"
)
_QWEN35 = (
    rf"{_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}"
)
# Threes from the right; both have `*` and `+` for 64 and so take the square of a number's length.
_THREES = r"\d{1,3}(?=(?:\d{3}){0,64}\b)"
_KIMI = r"\p{Han}+|" + _cased(
    r"\p{N}{1,3}", suffix=_ANY_CASE + "?", han=r"&&[^\p{Han}]", tail=r"[\r\n]*"
)

_FAMILIES: tuple[tuple[str, Pre], ...] = (
    (
        "default gpt-2 phi-2 gigachat a.x-4.0 mellum modern-bert jina-es jina-de jina-v2-es "
        "jina-v2-de jina-v1-en jina-v2-code roberta-bpe jais trillion granite-docling exaone4",
        Pre((_GPT2,)),
    ),
    ("mpt olmo", Pre((_GPT2,), nfc=True)),
    ("smollm starcoder refact codeshell exaone minerva-7b mellum2", Pre((_GPT2_DIGITS,))),
    ("command-r", Pre((_GPT2_DIGITS,), nfc=True)),
    (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        Pre((_modern(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True),
    ),
    ("dbrx smaug-bpe glm4 chatglm-bpe", Pre((_modern(r"\p{N}{1,3}"),))),
    ("minicpm5", Pre((r"\p{N}{1,3}", _modern(r"\p{N}+")), ignore_merges=True)),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2", Pre((_modern(r"\p{N}"),), nfc=True)),
    ("hunyuan solar-open grok-2", Pre((_modern(r"\p{N}"),))),
    ("laguna", Pre((r"[^\n]+|[\n]+", _modern(r"\p{N}")))),
    ("qwen35", Pre((_QWEN35,), nfc=True)),
    ("tekken", Pre((_cased(r"\p{N}"),), ignore_merges=True, add_bos=True)),
    (
        "gpt-4o llama4 kanana2 talkie minimax-m2",
        Pre((_cased(r"\p{N}{1,3}", suffix=_ANY_CASE + "?"),)),
    ),
    ("tiny_aya cohere2moe", Pre((_THREES, _cased(r"\p{N}{1,3}", suffix=_ANY_CASE + "?")))),
    ("kimi-k2", Pre((_KIMI,))),
    ("deepseek-llm", Pre(_DEEPSEEK_LLM)),
    ("deepseek-coder", Pre(_DEEPSEEK_CODER)),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", Pre(_DEEPSEEK_V3)),
    ("falcon", Pre(_FALCON)),
    ("bloom poro-chat gpt3-finnish", Pre((_BLOOM,))),
    ("viking", Pre((_BLOOM, r"\p{N}"))),
    ("bailingmoe bailingmoe2 llada-moe", Pre((_BAILING,))),
    ("seed-coder", Pre((_SEED_CODER,))),
    ("exaone-moe", Pre((_EXAONE_MOE,))),
    ("superbpe", Pre((r"\p{N}+", r"(?=(\d{3}){1,64}(?!\d))"))),
)
PRES: dict[str, Pre] = {name: pre for names, pre in _FAMILIES for name in names.split()}


def by_name(name: str | None) -> Pre:
    """The rules of a `tokenizer.ggml.pre` name; an unknown or absent one warns and is GPT-2's."""
    pre = PRES.get(name or "")
    if pre is not None:
        return pre
    what = "has no tokenizer.ggml.pre" if name is None else f"names pre-tokenizer {name!r}, unknown"
    warnings.warn(
        f"the GGUF file {what}: text is split as GPT-2 does, which may cost quality. "
        f"Convert the model again, or use one of: {', '.join(sorted(PRES))}",
        stacklevel=2,
    )
    return PRES["default"]
