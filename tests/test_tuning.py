"""How to open a model here: what fits is arithmetic on sizes; of rates only that they are there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from squall import tuning
from squall.assembly import prepare
from squall.cli import several
from squall.cli.app import app
from squall.errors import InvalidRequest, OutOfMemory
from squall.executors import devices
from squall.opening import Opening
from squall.quant import FORMATS
from squall.tuning import Choice, best, choices

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LAYERS, HIDDEN, WIDE, VOCAB, CONTEXT = 5, 256, 512, 160, 1024
# Keys and values of a token: two, in every layer, of two heads of 64.
KV_VALUES = 2 * LAYERS * 2 * 64
LINEARS = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * 128 + 3 * HIDDEN * WIDE) + HIDDEN * VOCAB
FLOATS = VOCAB * HIDDEN + (2 * LAYERS + 1) * HIDDEN


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tuning") / "model"
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(devices, "free_bytes", lambda _: size)
    monkeypatch.setattr("squall.assembly.devices.free_bytes", lambda _: size)
    monkeypatch.setattr("squall.measure.free_bytes", lambda _: size)


def test_every_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 1 << 30)
    told: list[tuple[int, int]] = []
    found = choices(Opening(folder), lambda done, whole: told.append((done, whole)))
    assert told == [(done, 7) for done in range(7)]
    assert [c.isq for c in found] == [None, "Q8_0", "Q6K", "Q5K", "Q4K", "Q3K", "Q2K"]
    for choice in found[1:]:
        format = FORMATS[choice.format]
        linears = LINEARS * format.block_bytes // format.block
        assert choice.weight_bytes == pytest.approx(linears + 4 * FLOATS, rel=0.02)
    for choice in found:
        assert choice.context == choice.longest == CONTEXT
        assert choice.kv_dtype == "f16"
        assert choice.bytes == choice.weight_bytes + CONTEXT * 2 * KV_VALUES
        assert (choice.prompt or 0) > (choice.answer or 0) > 0


def test_a_vocabulary_that_stays_as_it_is_hides_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig(
        vocab_size=20_000, hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    monkeypatch.setattr(tuning, "_rates", lambda *_: (2.0, 1.0))
    losses = [choice.loss for choice in choices(Opening(tmp_path))]
    assert losses == [0.0, *tuning.LOSS.values()]


def test_too_little_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q4 = next(c for c in choices(Opening(folder)) if c.isq == "Q4K")
    # For half of the context with f16, and so for a little less than all of it with q8_0.
    room = q4.weight_bytes + CONTEXT // 2 * 2 * KV_VALUES
    free(monkeypatch, room)
    monkeypatch.setattr(tuning, "_rates", lambda *_: (2.0, 1.0))
    found = {choice.isq: choice for choice in choices(Opening(folder))}
    least = CONTEXT // 2 * 16 / 9
    assert found["Q4K"].kv_dtype == "q8_0"
    assert found["Q4K"].context == pytest.approx(least, abs=2)
    assert found["Q4K"].bytes <= room
    stored = found[None]
    assert stored.context == 0
    assert stored.answer is None
    assert best([*found.values()], "quality").isq not in (None, "Q8_0")
    with pytest.raises(OutOfMemory, match="no way to open it fits"):
        best(choices(Opening(folder, context=CONTEXT, kv_dtype="f32", isq="Q8_0")))


def test_goals() -> None:
    def way(isq: str | None, loss: float | None, answer: float | None) -> Choice:
        context = 0 if answer is None else 512
        return Choice(isq, "-", loss, "f16", context, context, 1 << 20, 1 << 20, answer, answer)

    ways = [way(None, 0.0, 5.0), way("Q5K", 0.018, 11.0), way("Q4K", 0.043, 14.0)]
    ways += [way("Q3K", 0.28, 13.0), way("Q2K", 0.57, 20.0)]
    assert [best(ways, goal).isq for goal in ("quality", "balanced", "speed")] == [
        None,
        "Q4K",
        "Q4K",
    ]
    assert best([way(None, 0.0, None), *ways[1:]], "quality").isq == "Q5K"
    assert best([way(None, None, 3.0)]).isq is None
    unknown = [way(None, 0.0, None), way("Q8_0", 0.0009, 3.0), way("Q6K", None, 9.0)]
    assert best(unknown, "quality").isq == "Q8_0"
    with pytest.raises(InvalidRequest, match="quality, balanced, speed"):
        best(ways, "taste")


def test_layers_that_stand_for_all(folder: Path) -> None:
    """Theirs are the weights of the layers that were chosen, and the head is the model's."""
    prepared = prepare(Opening(folder))
    checkpoint, recipe, _ = tuning._some_layers(prepared, [0, 3], Opening(folder))
    assert len(recipe.decoder.layers) == 2
    names = prepared[1].names
    for role, slices in recipe.names.items():
        assert slices == names[role.replace("layers.1.", "layers.3.")]
    assert {r.split(".")[1] for r in recipe.names if r.startswith("layers.")} == {"0", "1"}
    assert "head.weight" in recipe.names
    assert checkpoint.size_bytes < prepared[0].size_bytes


def test_a_quantized_model_has_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_rates", lambda *_: (2.0, 1.0))
    (found,) = choices(Opening())
    assert (found.isq, found.format, found.loss) == (None, "q4_1", None)
    assert best([found]) is found


def test_the_command(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "tuned.toml"
    args = ["tune", str(folder), "--for", "quality", "--context", "512", "-o", str(file)]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    assert "* │ as they are: f32" in done.stdout
    assert f"squall serve {folder} --context 512" in done.stdout
    assert tomllib.loads(file.read_text())["model"] == [{"path": str(folder), "context": 512}]
    (entry,) = several.read(file)
    assert entry.options == {"context": 512}
    again = CliRunner().invoke(app, args)
    assert again.exit_code == 1
    assert "exists" in str(again.exception) + again.output


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        ("--context 9999", 1, "trained for 1 to 1024 tokens"),
        ("--for taste", 2, "not one of 'quality'"),
        ("-o nowhere/x.toml", 1, "would be in a folder that is not there"),
    ],
)
def test_what_is_told_before_anything_is_measured(
    flags: str, status: int, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_choice", None)
    done = CliRunner().invoke(app, ["tune", str(folder), *flags.split()])
    assert done.exit_code == status
    assert message in str(done.exception) + done.output


def test_as_json(folder: Path) -> None:
    done = CliRunner().invoke(app, ["tune", str(folder), "--isq", "Q4K", "--json"])
    assert done.exit_code == 0, done.output
    (choice,) = json.loads(done.stdout)["choices"]
    assert choice["isq"] == "Q4K"
    assert choice["chosen"] is True
