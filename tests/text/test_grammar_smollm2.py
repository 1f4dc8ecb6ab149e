"""SmolLM2 answers in the shapes of the corpus, several at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from schema_corpus import FUNCTIONS, SCHEMAS

from squall import Model
from squall.engine.generation import Generation
from squall.engine.request import FinishReason
from squall.engine.sampling import Sampling
from squall.text.grammar import Grammar

Answer = tuple[str, FinishReason | None]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.open(context=2048) as model:
        yield model


def answers(
    model: Model, grammars: Sequence[Grammar], prompts: Sequence[str], *, temperature: float
) -> list[Answer]:
    started = []
    for n, (grammar, prompt) in enumerate(zip(grammars, prompts, strict=True)):
        chat = [{"role": "user", "content": prompt}]
        request = model.request(chat, Sampling(temperature=temperature, seed=n), max_tokens=300)
        request = replace(request, constraint=model.grammars.compile(grammar), continues=True)
        started.append(Generation(model.engine, request))
    found: list[Answer] = []
    for generation in started:
        pieces = list(generation)
        assert pieces[-1].error is None
        found.append(("".join(piece.text for piece in pieces), pieces[-1].finish_reason))
    return found


def fit(model: Model, schemas: Sequence[dict[str, Any]], *, temperature: float) -> int:
    """How many ended, all of which fit."""
    ended = 0
    prompts = [f"Answer as JSON that fits this: {json.dumps(schema)[:600]}" for schema in schemas]
    grammars = [Grammar.json_schema(schema) for schema in schemas]
    found = answers(model, grammars, prompts, temperature=temperature)
    for schema, (text, reason) in zip(schemas, found, strict=True):
        if reason == "length":
            continue
        ended += 1
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))
    return ended


def test_a_few_schemas(model: Model) -> None:
    schemas = [*FUNCTIONS[:3], *SCHEMAS[60:200:40]]
    assert fit(model, schemas, temperature=1) > len(schemas) // 2


@pytest.mark.nightly("3 min")
def test_all_schemas(model: Model) -> None:
    for first in range(0, len(SCHEMAS), 8):
        fit(model, SCHEMAS[first : first + 8], temperature=1)


def test_row_9_what_has_no_bound_ends(model: Model) -> None:
    """Greedily, where models without such care go on with digits or spaces until they are cut."""
    prompts = ["Hello", "Tell me about a person.", "What is 1/3?"]
    schemas = [{}, {"type": "number"}, {"type": "string"}, {"type": "array"}, {"type": "object"}]
    for schema in schemas:
        grammars = [Grammar.json_schema(schema)] * len(prompts)
        for text, reason in answers(model, grammars, prompts, temperature=0):
            assert reason == "stop", text
            jsonschema.validate(json.loads(text), schema)
