"""Speculation with real weights: the same ids and the same bits of every log-probability."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine_requests import told

from squall import EngineConfig, InvalidRequest, Model
from squall.embedded import find
from squall.engine.generation import Generation
from squall.engine.request import Request
from squall.engine.sampling import Sampling
from squall.opening import Opening

TEXT = "The tide is high when the moon is near. The water follows the moon around the earth. "


class Free:
    """Guesses that cost nothing: there are as many as may be."""

    fixed, row = 1e-6, 1e-6

    def of(self, rows: int) -> float:
        return self.fixed + self.row * rows

    def observe(self, rows: int, seconds: float) -> None:
        """As before."""


class Dear(Free):
    """Steps that cost much, but not their rows."""

    fixed = 1.0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with two bits a weight."""
    path = tmp_path_factory.mktemp("draft") / "small.gguf"
    command = [sys.executable, "-m", "squall", "quantize", str(find()), "-o", str(path)]
    subprocess.run([*command, "--isq", "Q2K"], check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Greedy, sampled, penalized, the same several times; some begin alike, some end early."""
    found = []
    with Model.open(context=512) as model:
        for i in range(12):
            sampling = Sampling(
                temperature=0 if i % 2 else 0.9, top_p=0.95, seed=i,
                repetition_penalty=1.1 if i % 3 == 0 else 1.0,
                dry=model.dry(0.8) if i % 4 == 3 else None, min_tokens=4,
            )  # fmt: skip
            request = model.request(
                TEXT * (1 + i % 3) + ("The tide", "Why? ")[i % 2], sampling, 40,
                stop=("earth", "?")[: i % 3],
            )  # fmt: skip
            found.append(replace(request, logprobs=2, chunk=(None, 20)[i % 2]))
    return found


@pytest.fixture(scope="module")
def right(requests: list[Request]) -> list[object]:
    with Model.open(context=512, engine=EngineConfig(max_seqs=1, prefix_cache_n=0)) as model:
        return [told(Generation(model.engine, one)) for one in requests]


def eager(model: Model) -> Model:
    """Guesses whatever it costs."""
    speculation = model.engine._stepper._speculation
    speculation.cost = Dear()  # type: ignore[assignment]
    if speculation.draft is not None:
        speculation.draft.cost = Free()  # type: ignore[assignment]
    return model


@pytest.fixture(params=["ngram", "itself", "small"])
def draft(request: pytest.FixtureRequest, small: Path) -> str:
    return {"ngram": "ngram", "itself": str(find()), "small": str(small)}[request.param]


@pytest.mark.slow("real weights, twice")
@pytest.mark.parametrize("kv_tokens", [2048, 288])
def test_row_24_the_same_bytes_with_real_weights(
    requests: list[Request], right: list[object], draft: str, kv_tokens: int
) -> None:
    config = EngineConfig(max_seqs=5)
    opened = Model.open(context=256, kv_tokens=kv_tokens, engine=config, draft=draft)
    with eager(opened) as model:
        for _ in ("cold", "warm"):
            generations = [Generation(model.engine, one) for one in requests]
            assert [told(generation) for generation in generations] == right
        stats = model.engine.stats()
        guessed, accepted = stats.counts.guessed_tokens, stats.counts.accepted_tokens
        assert stats.counts.cached_tokens > 0
        assert (stats.preemptions > 0) == (kv_tokens == 288)
        assert guessed >= accepted > 50
        # Not those that were cut off by the end of an answer.
        assert draft != str(find()) or accepted > 0.8 * guessed


def test_row_40_prefix_cache_and_guesses(draft: str) -> None:
    """A prompt that ends in the midst of what was guessed is answered as if nothing were cached."""
    with Model.open(context=256) as model:
        whole = model.generate(TEXT, max_tokens=60, temperature=0, ignore_eos=True)
        whole.read()
    ids = [*model.encode(TEXT), *whole.ids]
    with eager(Model.open(context=256, draft=draft)) as model:
        for end in (len(ids), len(ids) - 30, len(ids) - 45):
            again = model.generate(ids[:end], max_tokens=20, temperature=0, ignore_eos=True)
            again.read()
            rest = whole.ids[60 - (len(ids) - end) :][:20]
            assert again.ids[: len(rest)] == rest
            logits = model.logits([*ids[:end], *again.ids])[end - 1 : -1]
            assert logits.argmax(axis=1).tolist() == again.ids


def test_weights_change_while_a_draft_guesses(small: Path) -> None:
    prompt = list(range(100, 180))
    with eager(Model.open(context=512, draft=small)) as model:
        answer = model.generate(prompt, max_tokens=60, temperature=0, ignore_eos=True)
        begun = [next(answer) for _ in range(5)]
        model.re_isq("Q8_0")
        answer.read()
        assert begun
        assert answer.usage.answer_tokens == 60
        after = model.logits([*prompt, *answer.ids])
        assert after[-11:-1].argmax(axis=1).tolist() == answer.ids[-10:]
    with Model.open(context=512, isq="8") as fresh:
        np.testing.assert_array_equal(fresh.logits([*prompt, *answer.ids]), after)


def test_memory_of_a_draft_is_counted(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from squall.engine import memory

    monkeypatch.setattr(memory, "available_bytes", lambda: 300 << 20)
    with Model.open() as alone, Model.open(draft=small) as both:
        assert both.context < alone.context
        assert both.executor.blocks < alone.executor.blocks


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    sys.path.insert(0, str(Path(__file__).parent.parent / "cli"))
    from tiny_models import write_folder

    yield write_folder(tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny")


def test_another_vocabulary_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"another vocabulary, from token 0 on"):
        Model.open(draft=folder)
    with Model.open(folder, context=64, draft=Opening(folder, dtype="f32")) as model:
        assert model.tokenizer.differs(model.tokenizer) is None


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"draft": 3}, "draft is 3; it must be a Opening or the path of its file"),
        ({"draft_tokens": "8"}, "draft_tokens is '8'; it must be a whole number"),
        ({"draft": "nowhere.gguf"}, "nowhere.gguf"),
    ],
)
def test_what_is_no_draft(options: dict[str, object], problem: str) -> None:
    with pytest.raises(InvalidRequest | OSError, match=problem):
        Model.open(**options)
