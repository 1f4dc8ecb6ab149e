"""Rows of many adapters in a step: the same bytes as alone, whatever else is computed with them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import adapter_files
import numpy as np
import pytest
from adapter_files import CONFIG, HIDDEN, LINEARS, VOCAB, WIDTH, write_adapter, write_base
from engine_requests import Told, told
from test_speculation_models import eager

from squall import EngineConfig, InvalidRequest, Model, UnknownAdapter
from squall.api.jobs import start_completion
from squall.api.requests import CompletionRequest
from squall.engine.generation import Generation
from squall.engine.request import CacheScope, Request
from squall.engine.sampling import Sampling
from squall.engine.sequence import Chunk, batch_of
from squall.engine.sequence import Sequence as Sequence_

NAMES = [f"a{i}" for i in range(8)]
# What requests ask for, one after the other.
MIXES: list[Any] = [*NAMES, [], ["a0", "a1"], {"a2": 0.5, "a5": -1.0}, ["a5"], {"a0": 0.3}]
FORMATS = [(None, "f16"), (None, "f32"), ("Q8_0", "q8_0"), ("Q4_0", "f16")]
TEXT = "the tide is high when the moon is near, "
IDS = list(range(30, 130))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model "base", adapters for all of its linears or for some, and "merged/NAME"."""
    folder = tmp_path_factory.mktemp("adapters")
    write_base(folder / "base")
    for seed, name in enumerate(NAMES):
        modules = (tuple(LINEARS), ("self_attn.q_proj", "mlp.down_proj"))[seed % 3 == 1]
        write_adapter(folder / name, seed, modules)
        write_base(folder / "merged" / name, {folder / name: 1.0})
    return folder


def opened(files: Path, name: str = "base", **options: Any) -> Model:
    given = {"context": 300, "threads": 1, **options}
    model = Model.open(files / name, **given)
    if name == "base":
        for adapter in NAMES:
            model.adapters.load(adapter, files / adapter)
    return model


@pytest.fixture(scope="module")
def model(files: Path) -> Iterator[Model]:
    with opened(files, kv_dtype="f32") as found:
        yield found


def asked(model: Model) -> list[Request]:
    """32 requests; most begin alike, whatever their adapters are."""
    found = []
    for i in range(32):
        sampling = Sampling(
            temperature=(0, 0.9, 2.0)[i % 3], seed=i, repetition_penalty=1.2 if i % 5 == 1 else 1.0
        )
        text = (TEXT * 2)[: 20 + 2 * (i % 16)] + "?" * (i % 2)
        one = model.request(text, sampling, 10 + i, adapters=MIXES[i % len(MIXES)])
        found.append(replace(one, logprobs=2, ignore_eos=True))
    return found


def answers(model: Model, requests: Sequence[Request]) -> list[Told]:
    return [told(one) for one in [Generation(model.engine, request) for request in requests]]


def chunked(model: Model) -> list[Request]:
    return [replace(one, chunk=1 + i % 7) for i, one in enumerate(asked(model))]


def proposed(right: list[Told]) -> Callable[[Model], list[Request]]:
    """Guesses as others make them: the answer with some of it wrong."""

    def make(model: Model) -> list[Request]:
        def proposer(answer: Sequence[int], prompt: int) -> Any:
            def propose(ids: Sequence[int], most: int) -> list[int]:
                at = len(ids) - prompt
                ahead = list(answer[at : at + most])
                return [(i + 1) % 300 if k == 5 else i for k, i in enumerate(ahead)]

            return propose

        requests = asked(model)
        return [
            replace(one, proposer=proposer(ids, len(one.ids)))
            for one, (_, ids, _, _) in zip(requests, right, strict=True)
        ]

    return make


@pytest.mark.parametrize(("isq", "kv_dtype"), FORMATS)
def test_the_same_bytes_alone_and_together(files: Path, isq: str | None, kv_dtype: str) -> None:
    kinds = {"isq": isq, "kv_dtype": kv_dtype}
    one = EngineConfig(max_seqs=1, prefix_cache_n=0)
    with opened(files, engine=one, **kinds) as model:
        right = answers(model, asked(model))
        assert len({text for text, *_ in right}) > 20
    ways: dict[str, tuple[dict[str, Any], Callable[[Model], list[Request]]]] = {
        "together": ({}, asked),
        "two threads": ({"threads": 2}, asked),
        "chunked": ({"engine": EngineConfig(max_seqs=5, prompt_batchsize=16)}, chunked),
        "n-grams": ({"draft": "ngram"}, asked),
        "draft": ({"draft": files / "base", "draft_tokens": 6}, asked),
        "proposer": ({}, proposed(right)),
        "preempted": ({"kv_tokens": 320}, asked),
    }
    for way, (options, make) in ways.items():
        with opened(files, **{"engine": EngineConfig(max_seqs=16), **kinds, **options}) as model:
            if "draft" in options:
                eager(model)
            requests = make(model)
            for cache in ("cold", "warm"):
                assert answers(model, requests) == right, (way, cache)
            stats = model.engine.stats()
            assert stats.counts.cached_tokens > 0
            assert (stats.preemptions > 0) == (way == "preempted")
            guessing = way in ("n-grams", "draft", "proposer")
            assert (stats.counts.guessed_tokens > 20) == guessing, way


@pytest.mark.parametrize("chunk", [1, 64])
def test_as_the_adapter_merged_offline(files: Path, model: Model, chunk: int) -> None:
    for name in NAMES:
        with opened(files, f"merged/{name}", kv_dtype="f32") as merged:
            wanted = merged.logits(IDS)
            found = model.logits(IDS, adapters=name, chunk=chunk)
            assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
            scores = merged.log_probabilities(IDS)
            np.testing.assert_allclose(
                model.log_probabilities(IDS, adapters=name), scores, atol=1e-3
            )


def test_weights_of_several(files: Path, model: Model, tmp_path: Path) -> None:
    mix = {"a0": 0.7, "a1": -0.4}
    write_base(tmp_path, {files / name: weight for name, weight in mix.items()})
    with Model.open(tmp_path, context=300, kv_dtype="f32") as merged:
        wanted = merged.logits(IDS)
        found = model.logits(IDS, adapters=mix)
        assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    base = model.logits(IDS, adapters=[])
    np.testing.assert_array_equal(model.logits(IDS), base)
    np.testing.assert_array_equal(model.logits(IDS, adapters={"a0": 0}), base)


def test_row_12_a_name_with_other_weights_is_another_adapter(files: Path, tmp_path: Path) -> None:
    """What was cached under the name before is of no use; what is under other names is."""
    path = tmp_path / "adapter"
    with opened(files, kv_dtype="f32") as model:
        for seed, same in ((70, False), (71, False), (71, True), (70, True)):
            write_adapter(path, seed)
            model.adapters.load("again", path)
            base = write_base(tmp_path / f"merged{seed}", {path: 1.0})
            with Model.open(base, context=300, threads=1, kv_dtype="f32") as merged:
                wanted = merged.logits(IDS)
                greedy = merged.generate(IDS, max_tokens=20, temperature=0, ignore_eos=True)
                text = greedy.read()
            for cached in (same, True):
                answer = model.generate(
                    IDS, max_tokens=20, temperature=0, ignore_eos=True, adapters="again"
                )
                assert answer.read() == text
                assert (answer.usage.cached_tokens > 0) == cached
            found = model.logits(IDS, adapters="again")
            assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
        model.adapters.load("alias", path)
        answer = model.generate(IDS, max_tokens=1, adapters="alias")
        answer.read()
        assert answer.usage.cached_tokens > 0


def test_an_answer_keeps_the_version_it_began_with(files: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_tokens": 60, "temperature": 0, "ignore_eos": True}
    path = write_adapter(tmp_path / "adapter", 80)
    # Little room, so that it is computed again from its beginning when it is preempted.
    with opened(files, kv_tokens=320) as model:
        model.adapters.load("mine", path)
        wanted = model.generate(TEXT, adapters="mine", **options).read()
        answer = model.generate(TEXT, adapters="mine", **options)
        begun = "".join(next(answer).text for _ in range(5))
        write_adapter(path, 81)
        model.adapters.load("mine", path)
        new = model.generate(TEXT, adapters="mine", **options)
        others = [model.generate(TEXT + str(i), adapters="a1", **options) for i in range(4)]
        model.adapters.remove("mine")
        gc.collect()
        assert begun + answer.read() == wanted
        assert new.read() != wanted
        for other in others:
            other.read()
        assert model.engine.stats().preemptions > 0
        with pytest.raises(UnknownAdapter):
            model.generate(TEXT, adapters="mine")


def test_the_prompts_of_a_request_have_one_version(
    files: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.adapters.load("mine", files / "a0")
    right = model.generate(TEXT, adapters="mine", max_tokens=8, temperature=0).read()
    choose = model.adapters.choose

    def replacing(adapters: Any = None) -> Any:
        """Somebody else is quick."""
        found = choose(adapters)
        model.adapters.load("mine", files / "a1")
        return found

    monkeypatch.setattr(model.adapters, "choose", replacing)
    request = CompletionRequest(
        prompt=[TEXT] * 3, model="any", max_tokens=8, temperature=0, adapters="mine"
    )
    found = start_completion(model, request).response()
    assert [choice.text for choice in found.choices] == [right] * 3
    monkeypatch.undo()
    model.adapters.remove("mine")


def test_other_weights_of_the_base(files: Path) -> None:
    """Adapters stay when the base is quantized anew, and so does what they add."""
    with opened(files, kv_dtype="f32") as model, opened(files, isq="Q8_0", kv_dtype="f32") as fresh:
        answer = model.generate(TEXT, max_tokens=60, temperature=0, ignore_eos=True, adapters="a3")
        assert [next(answer) for _ in range(5)]
        model.re_isq("Q8_0")
        answer.read()
        assert answer.usage.answer_tokens == 60
        for adapters in ([], "a3"):
            np.testing.assert_array_equal(
                model.logits(IDS, adapters=adapters), fresh.logits(IDS, adapters=adapters)
            )


def test_row_s17_scopes_do_not_collide(files: Path) -> None:
    """A tenant and an adapter that are spelled alike, or one in the other, are two."""
    with opened(files) as model:
        digest = model.adapters.choose("a0").digest
        tenants = ("", "a0", digest, f"', adapter='{digest}", f"{digest}', adapter='")
        scopes = [CacheScope(a, b) for a in tenants for b in tenants]
        for cached in (0, 96):
            for scope in scopes:
                one = model.request(IDS, Sampling(temperature=0), 1)
                answer = Generation(model.engine, replace(one, scope=scope))
                answer.read()
                assert answer.usage.cached_tokens == cached, scope
        digests = {model.adapters.choose(adapters).digest for adapters in MIXES}
        asked = [model.request(IDS, Sampling(), adapters=adapters) for adapters in MIXES]
        assert {one.scope for one in asked} == {CacheScope("", found) for found in digests}
        assert len(digests) == len(MIXES) - 1  # "a5" is there twice


def test_adapters_are_loaded_and_dropped_while_many_threads_ask(files: Path) -> None:
    with opened(files, engine=EngineConfig(max_seqs=8)) as model:
        shelf = model.adapters
        right = {
            name: model.generate(TEXT, max_tokens=15, temperature=0, adapters=name).read()
            for name in NAMES
        }
        shelf.limit_bytes = 3 * max(info.nbytes for info in shelf.list())
        stop, failed = threading.Event(), []

        def ask(names: Sequence[str]) -> None:
            try:
                for name in names * 4:
                    found = model.generate(TEXT, max_tokens=15, temperature=0, adapters=name)
                    assert found.read() == right[name]
            except BaseException as error:
                failed.append(error)

        def load() -> None:
            while not stop.is_set():
                shelf.load("other", files / "a6")

        threads = [threading.Thread(target=ask, args=(NAMES[i:] + NAMES[:i],)) for i in range(4)]
        loading = threading.Thread(target=load)
        for thread in (*threads, loading):
            thread.start()
        for thread in threads:
            thread.join()
        stop.set()
        loading.join()
        assert failed == []
        loaded = [info.nbytes for info in shelf.list() if info.loaded]
        assert sum(loaded) <= shelf.limit_bytes


def test_row_12_a_thousand_swaps_leave_no_memory_behind(files: Path, tmp_path: Path) -> None:
    paths = [write_adapter(tmp_path / str(seed), seed) for seed in (90, 91)]
    with opened(files) as model:

        def swap(times: int) -> None:
            for i in range(times):
                model.adapters.load("mine", paths[i % 2])
                if i % 10 == 0:
                    answer = model.generate(TEXT, max_tokens=2, adapters="mine")
                    answer.read()

        swap(200)
        before = anonymous_bytes()
        swap(1000)
        gc.collect()
        # A leak would be 75 kB each time.
        assert anonymous_bytes() - before < 2 << 20


def test_what_large_ranks_need_in_a_step_does_not_stay(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_files, "RANK", 2048)
    write_adapter(tmp_path, 92)
    with Model.open(files / "base", context=600, threads=1) as model:
        model.adapters.load("large", tmp_path)
        before = anonymous_bytes()
        model.generate([5] * 550, adapters="large", max_tokens=2).read()
        # 14 weights with 512 rows of 2048 floats.
        assert anonymous_bytes() - before < 20 << 20


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another shape with the same vocabulary."""
    linears = {name: (rows // 2, cols // 2) for name, (rows, cols) in LINEARS.items()}
    sizes = {"WIDTH": WIDTH // 2, "LINEARS": linears, "LAYERS": 1}
    config = {"hidden_size": WIDTH // 2, "intermediate_size": HIDDEN // 2, "num_hidden_layers": 1}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**sizes, "CONFIG": CONFIG | config}.items():
            patch.setattr(adapter_files, name, value)
        return write_base(tmp_path_factory.mktemp("small"))


def test_a_small_draft_has_no_part_of_the_adapters(files: Path, small: Path) -> None:
    options = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
    with opened(files) as model:
        right = [model.generate(TEXT, adapters=mix, **options).read() for mix in MIXES]
    with opened(files, draft=small, draft_tokens=6) as model:
        eager(model)
        given = [model.generate(TEXT, adapters=mix, **options) for mix in MIXES]
        assert [answer.read() for answer in given] == right
        assert model.engine.stats().counts.guessed_tokens > 100


def test_handles_are_for_models_of_one_shape(files: Path, small: Path) -> None:
    """Others are an error, as their terms are larger or smaller than the weights."""
    with opened(files) as model, Model.open(small, context=300) as unlike:
        (handle,) = model.adapters.choose("a1").mixture
        for mixture in ((handle,), (handle, handle), ((None, 1.0),)):
            request = replace(unlike.request(IDS, Sampling(), 1), adapters=mixture)
            with pytest.raises(InvalidRequest, match=r"another model|incompatible"):
                unlike.executor.step(batch_of([whole_of(request)], VOCAB))
        with opened(files, "merged/a0") as like:
            request = replace(like.request(IDS, Sampling(), 1), adapters=(handle,))
            found = like.executor.step(batch_of([whole_of(request)], VOCAB))
            assert np.isfinite(found).all()


def whole_of(request: Request) -> Chunk:
    ids = list(request.ids)
    sequence = Sequence_(request, 0, ids, len(ids) - 1)
    sequence.blocks.extend(range(8))
    return Chunk(sequence, 0, len(ids), range(len(ids) - 1, len(ids)))
