"""A folder's tokenizer and chat template -> the metadata that GGUF files have of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.text.chat import ChatTemplate
from squall.text.hf_tokenizer import HfTokenizer, read_vocabulary
from squall.text.tokenizer import Tokenizer

_KEY = "tokenizer.ggml."
_UNUSED = 5
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# One of each kind of rules; those that are used most come first.
_CANDIDATES = (
    "llama-bpe", "qwen2", "gpt-2", "smollm", "gpt-4o", "tekken", "dbrx", "hunyuan", "command-r",
    "mpt", "qwen35", "deepseek-llm", "deepseek-coder", "deepseek-v3", "falcon", "bloom",
    "bailingmoe", "seed-coder", "exaone-moe", "kimi-k2", "viking", "laguna", "minicpm5",
)  # fmt: skip
# Words, cases, digits, spaces, lines, scripts, marks: where the rules differ.
SAMPLES = (
    "Hello, I'm here; WE'LL see what they'Re doing.  It's 12345678 o'clock... 3.14 1,000",
    "  two spaces\n\nlines \n \t\ttabs\r\n   end   \n\n\n x",
    "def f(x_1):\n    return {'a': x_1**2}  # CamelCaseWord HTMLParser aB\n//=>!?\n",
    "Déjà vu nai\u0308ve 你好，世界。 日本語テスト العربية ไทย हिन्दी 한국어 😀 ١٢٣ ½ Ⅷ",  # noqa: RUF001
    "https://example.org/a?b=c&d=1 $5.00 50% #tag @you a--b — “quote” 'tis 2nd x1y22z333",
)


def gguf_tokenizer(folder: Path, vocab: int) -> dict[str, Any]:
    """`tokenizer.*` of a byte-level BPE tokenizer; the only kind that is written.

    vocab: the model's, which may have more rows than there are tokens.
    """
    vocabulary, spec = read_vocabulary(folder)
    merges = _merges(spec, vocabulary.tokens)
    missing = vocab - len(vocabulary.tokens)
    if missing < 0:
        raise InvalidCheckpoint(
            f"tokenizer.json has {len(vocabulary.tokens)} tokens, the model {vocab}"
        )
    metadata: dict[str, Any] = {
        f"{_KEY}model": "gpt2",
        f"{_KEY}tokens": vocabulary.tokens + [f"[PAD{i}]" for i in range(vocab - missing, vocab)],
        f"{_KEY}token_type": np.array(vocabulary.types + [_UNUSED] * missing, np.int32),
        f"{_KEY}merges": merges,
    }
    ids = {"bos": vocabulary.bos, "eos": vocabulary.eos, "unknown": vocabulary.unknown}
    metadata |= {f"{_KEY}{name}_token_id": id for name, id in ids.items() if id is not None}
    tokenizer = HfTokenizer.from_folder(folder)
    with_bos, without = tokenizer.encode("a"), tokenizer.encode("a", add_bos=False)
    metadata[f"{_KEY}add_bos_token"] = with_bos != without
    for name, source in ChatTemplate.from_folder(folder).sources.items():
        metadata["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = source
    wanted = [tokenizer.encode(sample) for sample in SAMPLES]
    for pre in _CANDIDATES:
        made = Tokenizer.from_gguf(metadata | {f"{_KEY}pre": pre})
        if [made.encode(sample) for sample in SAMPLES] == wanted:
            return metadata | {f"{_KEY}pre": pre}
    raise UnsupportedModel(
        "no pre-tokenizer that GGUF has a name for cuts text as this tokenizer.json does; "
        "write UQFF instead"
    )


def _merges(spec: Any, tokens: list[str]) -> list[str]:
    model = spec.get("model")
    model = model if isinstance(model, dict) else {}
    if model.get("type") != "BPE" or any(_BYTE.fullmatch(token) for token in tokens[:1024]):
        raise UnsupportedModel(
            f"a tokenizer of the kind {model.get('type')!r} that is not byte-level BPE cannot be "
            "written as GGUF; write UQFF instead"
        )
    pairs = model.get("merges", [])
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
