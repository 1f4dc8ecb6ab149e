"""Programs that are no decoder, cut programs, and executors that share weights and threads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import BLOCK, BLOCKS, Build, MakeExecutor, distance, make_batch
from tiny import CASES
from transformers import BertConfig, BertModel

from native_executor import native
from reference_executor import ReferenceExecutor
from squall import _native, decoder, executors
from squall.checkpoints.base import Checkpoint
from squall.checkpoints.folder import open_folder
from squall.errors import InvalidRequest
from squall.executors import Limits
from squall.program import (
    Add,
    Attend,
    Builder,
    Embed,
    Index,
    Linear,
    Matrix,
    Normalize,
    Program,
    RopeAngles,
    Slice,
    Value,
    Vector,
)
from squall.quant import Plan
from squall.weights import WeightStore

BERT = BertConfig(
    vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
    intermediate_size=48, max_position_embeddings=40, type_vocab_size=2, layer_norm_eps=1e-3,
)  # fmt: skip
LENGTHS = (17, 1, 9)  # of texts that are encoded together


class Encoder:
    """A BERT as a program: rows see their whole text, and nothing is cached."""

    def __init__(self, config: BertConfig) -> None:
        self.config = config
        self.builder = Builder()

    def matrix(self, name: str, rows: int, cols: int) -> Matrix:
        return Matrix((Slice(f"{name}.weight", 0, rows),), rows, cols, role=name)

    def vector(self, name: str, size: int) -> Vector:
        return Vector((Slice(name, 0, size),), size)

    def linear(self, x: Value, name: str, width: int, **more: Any) -> Value:
        weight = self.matrix(name, width, x.width)
        out = self.builder.value(name, width)
        bias = self.vector(f"{name}.bias", width)
        return self.builder.emit(Linear(out, x, weight, bias, **more))

    def norm(self, x: Value, name: str) -> Value:
        weight, bias = (self.vector(f"{name}.{part}", x.width) for part in ("weight", "bias"))
        out, eps = self.builder.value(name, x.width), self.config.layer_norm_eps
        return self.builder.emit(Normalize(out, x, weight, bias, "layer", eps, x.width))

    def embedded(self) -> Value:
        sizes = {
            "word": self.config.vocab_size,
            "position": self.config.max_position_embeddings,
            "token_type": self.config.type_vocab_size,
        }
        b, found = self.builder, []
        for name, rows in sizes.items():
            table = self.matrix(f"embeddings.{name}_embeddings", rows, self.config.hidden_size)
            found.append(b.emit(Embed(b.value(name, table.cols), Index(name), table)))
        word, position, kind = found
        x = b.emit(Add(b.value("placed", word.width), word, position))
        x = b.emit(Add(b.value("embedded", word.width), x, kind))
        return self.norm(x, "embeddings.LayerNorm")

    def layer(self, x: Value, name: str) -> Value:
        c, own = self.config, f"{name}.attention"
        parts = ("query", "key", "value")
        q, k, v = (self.linear(x, f"{own}.self.{part}", x.width) for part in parts)
        dim = x.width // c.num_attention_heads
        heads = self.builder.emit(
            Attend(
                self.builder.value(own, x.width), q, k, v, Index("spans", axes=2), None,
                c.num_attention_heads, c.num_attention_heads, dim, dim**-0.5, None, None,
            )
        )  # fmt: skip
        x = self.linear(heads, f"{own}.output.dense", x.width, residual=x)
        x = self.norm(x, f"{own}.output.LayerNorm")
        inner = self.linear(x, f"{name}.intermediate.dense", c.intermediate_size, activation="gelu")
        out = self.linear(inner, f"{name}.output.dense", x.width, residual=x)
        return self.norm(out, f"{name}.output.LayerNorm")

    def program(self) -> Program:
        x = self.embedded()
        for i in range(self.config.num_hidden_layers):
            x = self.layer(x, f"encoder.layer.{i}")
        return self.builder.build(x)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BertModel]:
    torch.manual_seed(3)
    model = BertModel(BERT, add_pooling_layer=False).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms and biases are 1 and 0 otherwise
            torch.nn.init.normal_(parameter, mean=float("LayerNorm.weight" in name), std=0.5)
    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("isa", [*_native.isas(), "reference"])
def test_a_bidirectional_encoder_is_a_program(
    bert: tuple[Path, BertModel], isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of several lengths in one run, each row seeing all of its own."""
    folder, model = bert
    rng = np.random.default_rng()
    texts = [rng.integers(0, BERT.vocab_size, size) for size in LENGTHS]
    types = [rng.integers(0, 2, size) for size in LENGTHS]
    wanted = []
    for ids, kinds in zip(texts, types, strict=True):
        with torch.no_grad():
            out = model(torch.tensor(ids[None]), token_type_ids=torch.tensor(kinds[None]))
        wanted.append(out.last_hidden_state[0].numpy())
    ends = np.cumsum(LENGTHS)
    spans = np.repeat([ends - LENGTHS, ends], LENGTHS, axis=1).astype(np.int32)
    inputs = {
        "word": np.concatenate(texts).astype(np.int32),
        "position": np.concatenate([np.arange(size) for size in LENGTHS]).astype(np.int32),
        "token_type": np.concatenate(types).astype(np.int32),
        "spans": spans,
    }
    program, checkpoint = Encoder(BERT).program(), open_folder(folder)
    name = program.outputs[0].name
    if isa == "reference":
        found = ReferenceExecutor(program, checkpoint, blocks=1).run(inputs)[name]
    else:
        monkeypatch.setenv("SQUALL_ISA", isa)
        executor = executors.open(program, WeightStore(checkpoint), Limits(rows={"tokens": 64}))
        found = executor.run(inputs)[name]
        alone = {key: value[..., : LENGTHS[0]] for key, value in inputs.items()}
        assert np.array_equal(executor.run(alone)[name], found[: LENGTHS[0]])
        with pytest.raises(InvalidRequest, match="a position that is not there"):
            executor.run(inputs | {"spans": spans + 1})
        with pytest.raises(InvalidRequest, match="lacks 'spans'"):
            executor.run({key: value for key, value in inputs.items() if key != "spans"})
    assert distance(found, np.concatenate(wanted)) < 1e-5


CUT = [case for case in CASES if case.name in ("llama", "gemma2", "phi2", "qwen3moe", "olmo2")]


@pytest.mark.parametrize("case", CUT, ids=lambda case: case.name)
def test_a_decoder_cut_in_two_gives_the_same_bytes(built: Build, case: Any) -> None:
    model = built(case)
    whole = decoder.compile(model.recipe.decoder, model.recipe.names, context=model.context)
    limits = Limits(
        rows={"tokens": 64, "outputs": 64}, blocks=BLOCKS, block_size=BLOCK, kv_dtype="f16"
    )
    store, pool = WeightStore(model.checkpoint), executors.thread_pool(2)
    one = executors.open(whole, store, limits, pool=pool)
    for after in ("embed", "layers.0", f"layers.{len(whole.caches) - 2}"):
        parts = whole.stages(after)
        assert sum(len(part.caches) for part in parts) == len(whole.caches)
        first, second = (executors.open(part, store, limits, pool=pool) for part in parts)
        for start, stop in ((0, 20), (20, 21), (21, len(model.tokens))):
            batch = make_batch([(model.tokens[start:stop], start, 0)])
            wanted, given = one.step(batch), batch.inputs(one.program.indices)
            crossing = first.run(given, batch)
            found = second.run({**given, **crossing}, batch)
            assert np.array_equal(found["logits"], wanted)


@pytest.mark.parametrize("case", CUT[:2], ids=lambda case: case.name)
def test_rows_see_their_spans(built: Build, make_executor: MakeExecutor, case: Any) -> None:
    """Rows that see each other, as those of an image do, in one step and after others."""
    model = built(case)
    program = decoder.compile(model.recipe.decoder, model.recipe.names, context=model.context)
    found, wanted = [], []
    for executor, logits in (
        (make_executor(program, model.checkpoint), found),
        (ReferenceExecutor(program, model.checkpoint, blocks=BLOCKS), wanted),
    ):
        for start, stop in ((0, 20), (20, 21), (21, 40)):
            batch = make_batch([(model.tokens[start:stop], start, 0)])
            spans = batch.inputs(())["spans"].copy()
            spans[1, 2 : (stop - start) // 2] = start + (stop - start) // 2
            spans[0, -3:] = start // 2
            rotary = (batch.positions * 3)[None] % 50
            logits.append(executor.step(replace(batch, spans=spans, rotary=rotary)))
    assert distance(np.concatenate(found), np.concatenate(wanted)) < 1e-5
    assert distance(np.concatenate(wanted), model.logits) > 1e-2


def test_executors_share_weights_and_threads(built: Build) -> None:
    """Two on one store: tiles are there once, caches twice; another plan leaves the other alone."""
    model = built(CUT[0])
    program = decoder.compile(model.recipe.decoder, model.recipe.names, context=model.context)
    store, pool = WeightStore(model.checkpoint), executors.thread_pool(2)
    limits = Limits(blocks=BLOCKS, block_size=BLOCK)
    loaded: list[tuple[int, int]] = []
    one, two = (
        executors.open(program, store, limits, pool=pool, progress=lambda *at: loaded.append(at))
        for _ in range(2)
    )
    assert one.pool is two.pool
    assert len(store.layouts) == 1
    assert len(loaded) == len({store.key(weight) for weight in program.weights()})
    first = make_batch([(model.tokens[:20], 0, 0)])
    wanted = one.step(first)
    other = make_batch([(model.tokens[5:25], 0, 0)])  # in the other's cache, of the same blocks
    two.step(other)
    rest = make_batch([(model.tokens[20:], 20, 0)])
    alone = native(program, model.checkpoint, blocks=BLOCKS, block_size=BLOCK)
    assert np.array_equal(alone.step(first), wanted)
    assert np.array_equal(alone.step(rest), one.step(rest))
    two.requantize(Plan.of("q8_0"))
    assert (one.plan, two.plan) == (Plan(), Plan.of("q8_0"))
    assert np.array_equal(one.step(rest), alone.step(rest))
    assert not np.array_equal(two.step(first), wanted)


def test_frequencies_turn_with_axes_of_their_own(tmp_path: Path) -> None:
    """As positions of pictures have them: time, height and width."""
    b = Builder()
    rotary = Index("rotary", axes=3)
    axes, frequencies = (0, 2, 1, 1), (1.0, 0.5, 0.25, 0.125)
    angles = b.emit(RopeAngles(b.value("angles", 8), rotary, frequencies, 1.5, axes))
    program = b.build(angles)
    checkpoint = Checkpoint(tmp_path, {}, {}, 0)
    positions = np.random.default_rng().integers(0, 100, (3, 13)).astype(np.int32)
    executor = executors.open(program, WeightStore(checkpoint), Limits(rows={"tokens": 16}))
    found = executor.run({"rotary": positions})["angles"]
    turned = positions[list(axes)].T * np.array(frequencies)
    wanted = 1.5 * np.concatenate([np.cos(turned), np.sin(turned)], axis=1)
    assert np.abs(found - wanted).max() < 1e-6
