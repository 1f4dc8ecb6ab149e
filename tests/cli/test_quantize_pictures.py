"""`squall quantize` with a model that makes pictures: what it writes, and that it is whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from squall import convert
from squall.checkpoints.folder import open_folder
from squall.checkpoints.uqff import open_uqff
from squall.convert import pictures
from squall.errors import InvalidRequest, UnsupportedModel
from squall.program import Matrix
from squall.quant import FORMATS, Plan, Topology
from squall.recipes.encoders import load_t5
from squall.recipes.names import Part
from squall.weights import WeightStore

T5: dict[str, Any] = {
    "vocab_size": 90, "d_model": 64, "d_kv": 16, "d_ff": 160, "num_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(3)
    T5EncoderModel(T5Config(**T5)).save_pretrained(folder / "t5")
    (folder / "clip").mkdir()
    (folder / "clip/config.json").write_text("{}")
    (folder / "clip/model.safetensors").write_bytes(b"weights")
    (folder / "ae.safetensors").write_bytes(b"autoencoder")
    return folder


def encoder(source: Path) -> dict[str, tuple[Any, Part]]:
    checkpoint = open_folder(source / "t5")
    return {"text_encoder_2": (checkpoint, load_t5(checkpoint))}


def written(source: Path, out: Path, plan: Plan) -> tuple[convert.Written, ...]:
    copies = {"text_encoder": source / "clip", "ae.safetensors": source / "ae.safetensors"}
    return convert.write_pictures(encoder(source), copies, plan, out)


def rows(checkpoint: Any, part: Part, role: str, cols: int) -> bytes:
    slices = part.names[role]
    count = sum(piece.stop - piece.start for piece in slices)
    found = WeightStore(checkpoint).rows(Matrix(slices, count, cols), 0)
    return found.data.tobytes()


def test_what_is_written(source: Path, tmp_path: Path) -> None:
    done = written(source, tmp_path / "out", Plan.of("q8_0"))
    assert len(done) == 2 * 7
    assert {item.format for item in done} == {"q8_0"}
    assert (tmp_path / "out/text_encoder/model.safetensors").read_bytes() == b"weights"
    assert (tmp_path / "out/ae.safetensors").read_bytes() == b"autoencoder"
    assert json.loads((tmp_path / "out/model_index.json").read_text()) == {
        "_class_name": "FluxPipeline"
    }
    ((before, whole),) = encoder(source).values()
    after = open_uqff(tmp_path / "out/text_encoder_2/model.uqff")
    part = load_t5(after)
    assert part.spec == whole.spec
    role = "encoder.layers.1.feed_forward.gate.weight"
    shape = (160, 64)
    exact = before.tensors[whole.names[role][0].tensor].to_float32()
    assert exact.shape == shape
    assert rows(after, part, role, 64) == FORMATS["q8_0"].quantize(exact.reshape(-1)).tobytes()
    embedded = after.tensors[part.names["encoder.embed.weight"][0].tensor]
    wanted = before.tensors[whole.names["encoder.embed.weight"][0].tensor]
    assert np.array_equal(embedded.to_float32(), wanted.to_float32())


def test_what_is_not_quantized_takes_no_room(source: Path, tmp_path: Path) -> None:
    written(source, tmp_path / "out", Plan.of("q8_0"))
    copy = tmp_path / "out/text_encoder/model.safetensors"
    if os.stat(source).st_dev == os.stat(tmp_path).st_dev:
        assert copy.samefile(source / "clip/model.safetensors")


def test_copies_where_links_cannot_be(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    written(source, tmp_path / "out", Plan.of("q8_0"))
    assert (tmp_path / "out/text_encoder/model.safetensors").read_bytes() == b"weights"


def test_tokenizers_come_without_weights(source: Path, tmp_path: Path) -> None:
    copies = {"text_encoder": source / "clip", "tokenizer": source / "clip"}
    convert.write_pictures(encoder(source), copies, Plan.of("q8_0"), tmp_path / "out")
    names = {
        place: {path.name for path in (tmp_path / "out" / place).iterdir()} for place in copies
    }
    assert names == {
        "text_encoder": {"config.json", "model.safetensors"}, "tokenizer": {"config.json"},
    }  # fmt: skip


def test_links_of_a_cache_are_followed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "ae.safetensors").symlink_to(source / "ae.safetensors")
    copies = {"ae.safetensors": tmp_path / "ae.safetensors"}
    convert.write_pictures(encoder(source), copies, Plan.of("q8_0"), tmp_path / "out")
    assert not (tmp_path / "out/ae.safetensors").is_symlink()
    assert (tmp_path / "out/ae.safetensors").read_bytes() == b"autoencoder"


def test_a_topology_is_for_layers(source: Path, tmp_path: Path) -> None:
    (tmp_path / "t.yml").write_text("0-1:\n  isq: Q4_0\n")
    done = written(
        source, tmp_path / "out", Plan.of("q8_0", Topology.from_file(tmp_path / "t.yml"))
    )
    assert {item.format for item in done if "block.0." in item.name} == {"q4_0"}
    assert {item.format for item in done if "block.1." in item.name} == {"q8_0"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_nothing_is_left_of_half_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error(28, "No space left on device")

    monkeypatch.setattr(pictures, "write_linears", fail)
    wanted = InvalidRequest if error is OSError else error
    with pytest.raises(wanted):
        written(source, tmp_path / "out", Plan.of("q8_0"))
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_kept(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InvalidRequest, match="exists"):
        written(source, tmp_path / "out", Plan.of("q8_0"))
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"]


def test_floats_alone_can_be_quantized(source: Path, tmp_path: Path) -> None:
    written(source, tmp_path / "out", Plan.of("q8_0"))
    quantized = tmp_path / "again"
    shutil.copytree(tmp_path / "out/text_encoder_2", quantized)
    checkpoint = open_uqff(quantized / "model.uqff")
    networks = {"text_encoder_2": (checkpoint, load_t5(checkpoint))}
    with pytest.raises(UnsupportedModel, match="float weights"):
        convert.write_pictures(networks, {}, Plan.of("q8_0"), tmp_path / "other")
    assert not (tmp_path / "other").exists()
