"""How each `tokenizer.ggml.pre` name cuts text into words before byte-level BPE.

pretokenizers.json has the names by family, with the patterns of the published tokenizers, in
Oniguruma's syntax. Several passes that one pattern expresses exactly are one pattern there: each
pass costs half a microsecond a word. Where a pattern would take the square of a text's length it
ends earlier: `{0,64}` for `*`, and `(?<!\\s)` before spaces at the end. Letters are code points
where they would not survive a text's normalization.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

BYTES = "<bytes>"  # where in the steps characters become byte symbols; at the end when absent


@dataclass(frozen=True, slots=True)
class Pre:
    """Patterns applied in turn, each match a word of its own, and what else the name implies."""

    steps: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is that token, whatever the merges say
    add_bos: bool = False
    nfc: bool = False


_FAMILIES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
PRES: dict[str, Pre] = {
    name: Pre(**{**rules, "steps": tuple(rules["steps"])})
    for names, rules in _FAMILIES.items()
    for name in names.split()
}


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
