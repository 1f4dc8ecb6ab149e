"""Speculation in models: tiny ones in several number formats, and a real one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine_requests import Told, told

from random_gguf import Shape, write
from squall import EngineConfig, Model, SquallError
from squall.engine.generation import Generation
from squall.engine.request import Request
from squall.engine.sampling import Sampling
from squall.engine.speculation import Cost
from squall.opening import Opening
from squall.text.grammar import Grammar

VOCAB = 400
# Of the weights in the file, and of the KV cache.
FORMATS = [("q4_k", "f16"), ("q8_0", "q8_0"), ("f16", "f32"), ("q2_k", "q8_0")]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}}}
TEXT = "The tide is high when the moon is near. The water follows the moon around the earth. "


class Always(Cost):
    """Costs at which every guess that has a chance pays, whatever the machine does."""

    def __init__(self, fixed: float) -> None:
        super().__init__()
        super().observe(1, 1.0)
        self.fixed, self.row = fixed, 1e-6

    def observe(self, rows: int, seconds: float) -> None:
        """As before."""


def eager(model: Model) -> Model:
    speculation = model.engine._stepper._speculation
    speculation.cost = Always(1.0)
    if speculation.draft is not None:
        speculation.draft.cost = Always(1e-6)
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model in each format, "other" with the same vocabulary, and one with another."""
    folder = tmp_path_factory.mktemp("tiny")
    found = {name: folder / f"{name}.gguf" for name, _ in FORMATS}
    for name, path in found.items():
        write(path, Shape(2, 256, 512, 4, 2, VOCAB), name, context=256)
    found |= {"other": folder / "other.gguf", "larger": folder / "larger.gguf"}
    write(found["other"], Shape(1, 256, 256, 4, 2, VOCAB), "q8_0", context=100)
    write(found["larger"], Shape(1, 256, 256, 4, 2, VOCAB + 1), "q8_0", context=100)
    return found


def requests_of(model: Model, rng: np.random.Generator) -> list[Request]:
    """Greedy, sampled, penalized, in a shape; some begin alike, several times the same; long."""
    grammars = (None, Grammar("regex", "[a-f]{5,30}( [0-9]+){2,9}"), Grammar.json_schema(SCHEMA))
    starts = [grammar and model.grammars.compile(grammar) for grammar in grammars]
    stem, found = "abcdefgh" * 6, []
    for i in range(12):
        sampling = Sampling(
            temperature=(0, 0.9, 3.0)[i % 3], top_p=0.95, seed=i,
            repetition_penalty=1.3 if i % 4 == 1 else 1.0,
            dry=model.dry(0.8) if i % 5 == 2 else None, min_tokens=3 * (i % 2),
        )  # fmt: skip
        text = stem[: int(rng.integers(2, 48))]
        one = model.request(text, sampling, int(rng.integers(10, 50)), stop=("ab",)[: i % 2])
        found.append(
            replace(one, logprobs=(None, 2)[i % 2], chunk=(None, 7)[i % 3 == 0],
                    constraint=starts[i % 7 % 3], ignore_eos=True)
        )  # fmt: skip
    again = [replace(found[1], sampling=replace(found[1].sampling, seed=seed)) for seed in range(3)]
    # These outgrow a small cache together.
    long = [replace(found[0], ids=[i, 5, 5], max_tokens=120, constraint=None) for i in range(3)]
    return [*long, *found, *again]


def answers(model: Model, requests: Sequence[Request]) -> list[Told]:
    return [told(one) for one in [Generation(model.engine, request) for request in requests]]


@pytest.mark.parametrize(("name", "kv_dtype"), FORMATS)
def test_rows_24_40_the_same_bytes(
    rng: np.random.Generator, files: dict[str, Path], name: str, kv_dtype: str
) -> None:
    """Guesses with grammars, prefix hits, kinds of cache and weights, streams, n answers."""
    path = files[name]
    with Model.open(path, kv_dtype=kv_dtype, engine=EngineConfig(max_seqs=1)) as model:
        requests = requests_of(model, rng)
        right = answers(model, requests)
    small = {"kv_tokens": 256, "context": 200, "engine": EngineConfig(max_seqs=5)}
    for draft in ("ngram", path, files["other"]):
        opened = Model.open(path, kv_dtype=kv_dtype, draft=draft, draft_tokens=6, **small)
        with eager(opened) as model:
            for _ in ("cold", "warm"):
                assert answers(model, requests) == right
            stats = model.engine.stats()
            assert stats.preemptions > 0
            assert stats.counts.cached_tokens > 0
            assert stats.counts.guessed_tokens > 100
            if draft == path:
                # What is not right was cut off by the end of an answer.
                assert stats.counts.accepted_tokens > 0.8 * stats.counts.guessed_tokens


def test_weights_change_while_a_draft_guesses(files: dict[str, Path]) -> None:
    prompt = list(range(40))
    with eager(Model.open(files["f16"], draft=files["f16"])) as model:
        answer = model.generate(prompt, max_tokens=150, temperature=0, ignore_eos=True)
        begun = [next(answer) for _ in range(5)]
        model.re_isq("Q8_0")
        answer.read()
        assert begun
        assert answer.usage.answer_tokens == 150
        after = model.logits([*prompt, *answer.ids])
        assert after[-11:-1].argmax(axis=1).tolist() == answer.ids[-10:]
        model.engine._stepper._speculation.draft = None
        plain = model.generate(prompt, max_tokens=20, temperature=0, ignore_eos=True)
        plain.read()
        assert plain.ids == model.logits([*prompt, *plain.ids])[39:-1].argmax(axis=1).tolist()


def test_memory_of_a_draft_is_counted(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from squall.executors import devices

    path = files["q8_0"]
    monkeypatch.setattr(devices, "available_bytes", lambda: 5 << 20)
    with Model.open(path) as alone, Model.open(path, draft=path) as both:
        assert both.executor.blocks < alone.executor.blocks


def test_another_vocabulary_is_refused(files: dict[str, Path]) -> None:
    problem = f"larger.gguf has another vocabulary, from token {VOCAB - 1} on"
    with pytest.raises(SquallError, match=problem):
        Model.open(files["f16"], draft=files["larger"])
    with pytest.raises(SquallError, match="has another vocabulary, from token 0 on"):
        Model.open(files["f16"], draft=Opening())
    with Model.open(files["f16"], draft=Opening(files["other"], weights="f32")) as model:
        assert model.engine._stepper._speculation.draft is not None


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"draft": 3}, "draft is 3; it must be a Opening or the path of its file"),
        ({"draft_tokens": "8"}, "draft_tokens is '8'; it must be a whole number"),
        ({"draft_tokens": 0}, "draft_tokens is 0; it must be at least 1"),
        ({"draft": "nowhere.gguf"}, "nowhere.gguf"),
    ],
)
def test_what_is_no_draft(options: dict[str, object], problem: str) -> None:
    with pytest.raises(SquallError, match=problem):
        Model.open(**options)  # type: ignore[arg-type]


def test_row_24_the_same_bytes_with_real_weights() -> None:
    """An answer that repeats its prompt, which takes few steps, and others beside it."""
    with Model.open(context=512) as model:
        sampling = [Sampling(temperature=t, seed=3, repetition_penalty=1.05) for t in (0, 0.8)]
        asked = [model.request(TEXT * 3 + text, s, 30) for s in sampling for text in ("", "Why?")]
        requests = [replace(one, logprobs=2, ignore_eos=True) for one in asked]
        right = answers(model, requests)
    with eager(Model.open(context=512, draft="ngram")) as model:
        assert answers(model, requests) == right
        counts = model.engine.stats().counts
        assert counts.guessed_tokens > counts.accepted_tokens > 0
