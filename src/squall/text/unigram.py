"""Pieces with scores (`tokenizer.ggml.model = t5`) on the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from squall.text.vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary

_UNUSED = 5  # a type of tokens in GGUF


def unigram(v: Vocabulary, metadata: Mapping[str, Any]) -> Any:
    """The library's tokenizer; raises what it raises, or ValueError, for what does not fit."""

    def said(name: str) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}", ())

    # Unused ones after the last that is used fill the table up, and would pass for pieces.
    used = max(i for i, kind in enumerate(v.types) if kind != _UNUSED) + 1
    scores = np.asarray(said("scores"), np.float64)
    unknown = next(iter(v.of_type(UNKNOWN)), v.unknown)
    if scores.shape != (len(v.tokens),) or unknown is None:
        raise ValueError(f"{scores.size} scores of {len(v.tokens)} tokens, the unknown: {unknown}")
    pieces = list(zip(v.tokens[:used], scores.tolist(), strict=False))
    library = Library(models.Unigram(pieces, unknown, byte_fallback=False))
    if (table := np.asarray(said("precompiled_charsmap"), np.uint8)).size:
        library.normalizer = normalizers.Precompiled(table.tobytes())
    steps = pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")
    library.pre_tokenizer = pre_tokenizers.Sequence([*steps])
    named = v.of_type(CONTROL, UNKNOWN, USER_DEFINED)
    library.add_special_tokens([AddedToken(v.tokens[i], normalized=False) for i in named])
    return library
