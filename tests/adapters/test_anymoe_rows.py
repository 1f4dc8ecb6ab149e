"""Rows of AnyMoE: in steps of every kind, on every instruction set, and under the engine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from anymoe_models import ROWS, Tiny, made
from engine_requests import Numbers, Told, told
from harness import distance, make_batch
from test_xlora_engine import ALONE, answers, asked
from tiny_models import write_folder

from reference_executor import ReferenceExecutor
from squall import Model, _native, executors, recipes
from squall.adapters.anymoe import GATES, AnyMoe, Experts, FineTuned
from squall.batch import Batch
from squall.checkpoints import open_checkpoint
from squall.engine.engine import Engine, EngineConfig
from squall.engine.generation import Generation
from squall.engine.request import Request
from squall.errors import ContextLengthExceeded, InvalidRequest
from squall.executors import Executor, Limits
from squall.quant import Plan
from squall.weights import WeightStore

NAMES = ["llama-biased-tied", "starcoder2", "granite", "gemma2"]
TOKENS = np.random.default_rng(5).integers(3, 160, (3, 40)).tolist()

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module", params=NAMES)
def mixed(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return made(request.param, tmp_path_factory.mktemp("mixed"))


def steps() -> list[Batch]:
    """A prompt alone; an answer beside a whole prompt, and one with the start of its answer."""
    a, b, c = TOKENS
    parts = [
        ([(b[:9], 0, 1)], [9]),
        ([(a[:23], 0, 0), (b[9:12], 9, 1), (c[:9], 0, 2)], [23, 9, 5]),
        ([(c[9:10], 9, 2), (a[23:25], 23, 0)], [5, 23]),
    ]
    return [
        replace(make_batch(part), prompts=np.array(prompts, np.int32)) for part, prompts in parts
    ]


@pytest.mark.parametrize(
    ("mixed", "format", "near"),
    [(name, None, 1e-5) for name in NAMES] + [(name, "Q8_0", 0.1) for name in NAMES[:2]],
    indirect=["mixed"],
)
@pytest.mark.parametrize("isa", _native.isas())
def test_rows_equal_numpy(
    mixed: Tiny, isa: str, format: str | None, near: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUALL_ISA", isa)
    checkpoint = open_checkpoint(mixed.paths[0])
    experts = Experts(mixed.random_gates(), checkpoint, recipes.load(checkpoint))
    others = experts.others | {GATES: experts.gates()}
    program = experts.program(ROWS)
    wanted = ReferenceExecutor(program, checkpoint, others=others, blocks=16)
    store = WeightStore(checkpoint, plan=Plan.of(format), others=others)
    limits = Limits(rows={"tokens": ROWS, "outputs": ROWS}, blocks=16, kv_dtype="f32")
    found = executors.open(program, store, limits)
    for batch in steps():
        assert distance(found.step(batch), wanted.step(batch)) < near


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> Executor:
    """One with too few blocks for all requests at a time."""
    tiny = made("llama-biased-tied", tmp_path_factory.mktemp("engine"))
    return tiny.open(tiny.random_gates(), rows=ROWS + 16, blocks=14)


@pytest.mark.parametrize("shared", [[0, 0, 1], [1, 1, 2], [0, -1, 2], [0, 3, 2]])
def test_rows_that_share_name_the_first_of_them(executor: Executor, shared: list[int]) -> None:
    batch = make_batch([(TOKENS[0][:3], 0, 0)])
    indices = batch.inputs(()) | {"shared": np.array(shared, np.int32)}
    with pytest.raises(InvalidRequest, match="must name the first of them"):
        executor.run(indices, batch)


@pytest.fixture(scope="module")
def alone(executor: Executor) -> list[Told]:
    """Each for itself, in a new engine."""
    return [answers(executor, [request], ALONE)[0] for request in asked()]


def test_together_and_preempted(executor: Executor, alone: list[Told]) -> None:
    engine = Engine(executor, EngineConfig(max_seqs=16), text=Numbers)
    for _ in ("cold", "warm"):
        assert [told(one) for one in [Generation(engine, one) for one in asked()]] == alone
    assert engine.stats().preemptions > 0
    assert engine.stats().counts.cached_tokens == 0
    engine.close()


@pytest.mark.parametrize("config", [{"prompt_batchsize": 4}, {"no_kv_cache": True}])
def test_chunks_are_not_for_prompts(
    executor: Executor, alone: list[Told], config: dict[str, Any]
) -> None:
    requests = [replace(one, chunk=3) for one in asked()]
    assert answers(executor, requests, EngineConfig(max_seqs=16, **config)) == alone


def test_guessed(executor: Executor, alone: list[Told]) -> None:
    known = {tuple(request.ids): ids for request, (_, ids, *_) in zip(asked(), alone, strict=True)}

    def guessing(request: Request) -> Request:
        answer, begun = known[tuple(request.ids)], len(request.ids)

        def propose(ids: Sequence[int], most: int) -> Iterable[int]:
            """What follows, every fifth wrong."""
            done = len(ids) - begun
            right = enumerate(answer[done : done + most], done)
            return [5 if at % 5 == 4 else token for at, token in right]

        return replace(request, proposer=propose)

    engine = Engine(executor, EngineConfig(max_seqs=16), text=Numbers)
    requests = [guessing(one) for one in asked()]
    assert [told(one) for one in [Generation(engine, one) for one in requests]] == alone
    counts = engine.stats().counts
    assert counts.guessed_tokens > counts.accepted_tokens > 50
    engine.close()


def test_where_a_prompt_ends_matters(executor: Executor) -> None:
    """Or else none of this would show anything."""
    batch = make_batch([(TOKENS[0], 0, 0)])
    found = [
        executor.step(replace(batch, prompts=np.array([prompt], np.int32)))
        for prompt in (0, 20, 40)
    ]
    assert min(distance(found[0], found[i]) for i in (1, 2)) > 0.1
    assert distance(found[1], found[2]) > 0.1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Of a model with a tokenizer, through all doors."""
    folder = tmp_path_factory.mktemp("doors")
    paths = [write_folder(folder / f"m{i}", initializer_range=0.03 * (i + 1)) for i in range(2)]
    rows = [{"prompt": "abab", "expert": 0}, {"prompt": "1 + 1", "expert": 1}]
    (folder / "rows.json").write_text(json.dumps({"rows": rows}))
    config = AnyMoe(
        64, str(folder / "rows.json"), "model.layers", "mlp", [str(paths[1])], FineTuned(),
        lr=0.1, epochs=5, gate_model_id=str(folder / "gates"),
    )  # fmt: skip
    with Model.open(paths[0], anymoe=config, context=200, threads=1) as opened:
        yield opened


def test_all_logits_of_a_prompt_longer_than_a_step_has_outputs(model: Model) -> None:
    ids = np.random.default_rng(3).integers(3, 60, 150).tolist()
    found = model.logits(ids)
    batch = make_batch([(ids, 0, 0)])
    table = np.arange(10, dtype=np.int32)[None]
    batch = replace(batch, block_tables=table, prompts=np.array([150], np.int32))
    for part in np.array_split(np.arange(150, dtype=np.int32), 3):
        wanted = model.executor.step(replace(batch, outputs=part))
        assert found[part].tobytes() == wanted.tobytes()


def test_a_prompt_as_long_as_the_context_is_answered(model: Model) -> None:
    ids = np.random.default_rng(3).integers(3, 60, 199).tolist()
    assert len(model.generate(ids, max_tokens=5, ignore_eos=True).read()) >= 0
    with pytest.raises(ContextLengthExceeded):
        model.generate([*ids, 3, 4], max_tokens=5)


def test_quantized_again(model: Model) -> None:
    before = model.logits([5, 6, 7])
    model.re_isq("Q8_0")
    assert {"q8_0"} < {total.format for total in model.weight_formats}
    assert 0 < distance(model.logits([5, 6, 7]), before) < 0.1
    model.re_isq(None)
    assert model.logits([5, 6, 7]).tobytes() == before.tobytes()
