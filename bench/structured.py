"""What a grammar costs: tokens a second of answers that run together, with one and without.

    python bench/structured.py --answers 16 --rounds 5

Rounds alternate; the ratio is taken within a round. Every answer has the same number of tokens:
the schema is an array of objects that does not end before, and end tokens do not count without it.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from statistics import median

from squall import Grammar, Model
from squall.engine.generation import Generation
from squall.engine.request import Constraint
from squall.engine.sampling import Sampling

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "city": {"enum": ["Oslo", "Lima", "Accra"]},
        "notes": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 200}


def rate(model: Model, constraint: Constraint | None, answers: int, tokens: int) -> float:
    """Tokens a second of `answers` answers together, prompts and first tokens left out."""
    running = []
    for seed in range(answers):
        prompt = [{"role": "user", "content": f"List {seed + 200} people as JSON."}]
        wanted = model.request(prompt, Sampling(1.0, top_p=1.0, seed=seed), tokens)
        wanted = replace(wanted, constraint=constraint, ignore_eos=constraint is None)
        running.append(Generation(model.engine, wanted))
    for generation in running:
        next(generation)
    started_s = time.perf_counter()
    before = sum(generation.usage.answer_tokens for generation in running)
    for generation in running:
        generation.read()
    after = sum(generation.usage.answer_tokens for generation in running)
    assert after == answers * tokens, "an answer ended early"
    return (after - before) / (time.perf_counter() - started_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", nargs="?", help="by default the default model")
    parser.add_argument("--answers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with Model.open(arguments.model, context=1024) as model:
        constraint = model.grammars.compile(Grammar.json_schema(SCHEMA))
        ratios = []
        for number in range(arguments.rounds + 1):
            plain = rate(model, None, arguments.answers, arguments.tokens)
            bound = rate(model, constraint, arguments.answers, arguments.tokens)
            if number:  # the first warms up
                ratios.append(bound / plain)
                print(json.dumps({"plain": plain, "grammar": bound, "ratio": bound / plain}))
        print(json.dumps({"median_ratio": round(median(ratios), 3)}))


if __name__ == "__main__":
    main()
