"""What guesses gain or cost: an answer's tokens a second with `draft` and without.

    python bench/speculation.py model.gguf --draft ngram --rounds 5

Rounds alternate, and both give the same ids, which is checked. `copy`: the answer repeats its
prompt, which a logits processor sees to, as random weights would not. `prose`: a drawn answer to a
question, as it comes. `noise`: drawn from all tokens alike, so nothing can be guessed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from squall import Model
from squall.engine.sampling import Floats

CODE = Path(__file__).read_text()[:2400]
QUESTION = "The tides come and go twice a day. The reason for this is"


def copying(prompt: list[int]) -> Any:
    """A logits processor that makes the answer repeat the prompt."""

    def copy(logits: Floats, ids: np.ndarray) -> None:
        at = len(ids) - len(prompt)
        logits[prompt[at % len(prompt)]] = 1e9

    return copy


def flat(logits: Floats, ids: np.ndarray) -> None:  # noqa: ARG001
    """All tokens alike."""
    logits[:] = 0


def cases(model: Model) -> Mapping[str, dict[str, Any]]:
    """Arguments of `generate`, by name."""
    code = model.encode(CODE)[:600]
    return {
        "copy": {"prompt": code, "logits_processors": [copying(code)], "temperature": 0},
        "prose": {"prompt": QUESTION, "temperature": 1, "top_p": 1, "seed": 7},
        "noise": {"prompt": code, "logits_processors": [flat], "temperature": 1, "seed": 7},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", nargs="?", help="by default the default model")
    parser.add_argument("--draft", default="ngram", help="a model's file, or ngram")
    parser.add_argument("--weights", default="packed", help="f32: of the model, not of the draft")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=["copy", "prose", "noise"])
    arguments = parser.parse_args()
    options: dict[str, Any] = {"context": 2048, "kv_tokens": 4096, "weights": arguments.weights}
    with (
        Model.open(arguments.model, **options) as plain,
        Model.open(arguments.model, draft=arguments.draft, **options) as guessing,
    ):
        for name in arguments.only:
            given = cases(plain)[name] | {"max_tokens": arguments.tokens, "ignore_eos": True}
            ratios = []
            for number in range(arguments.rounds + 1):
                before, after = plain.generate(**given), None
                before.read()
                after = guessing.generate(**given)
                after.read()
                assert after.ids == before.ids, "guesses changed the answer"
                if number:  # the first warms up
                    ratios.append(after.usage.answer_rate / before.usage.answer_rate)
            found = {
                "case": name,
                "plain": round(before.usage.answer_rate, 1),
                "guessing": round(after.usage.answer_rate, 1),
                "guessed": after.usage.guessed_tokens,
                "accepted": after.usage.accepted_tokens,
                "ratios": [round(ratio, 3) for ratio in ratios],
                "median": round(median(ratios), 3),
            }
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
