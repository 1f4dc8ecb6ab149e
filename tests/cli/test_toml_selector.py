"""TOML files that select a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from squall.api.anymoe import AnyMoeConfig, AnyMoeExpertType
from squall.api.which import (
    IsqOrganization,
    ModelDType,
    Selection,
    Which,
)
from squall.checkpoints.hub import Hub
from squall.cli.toml_selector import TomlSelection, read_toml
from squall.errors import InvalidRequest
from squall.opening import Opening

FILE = 'quantized_model_id = "d"\nquantized_filename = '
XLORA, LORA = '\nxlora_model_id = "x"\norder = "o"', '\nadapters_model_id = "a"\norder = "o"'
MODELS: dict[str, tuple[str, Selection]] = {
    "plain": ('model_id = "m"', Which.Plain("m")),
    "plain with all": (
        'model_id = "m"\narch = "mistral"\ndtype = "bf16"\ntopology = "t"\norganization = "moqe"\n'
        'write_uqff = "w.uqff"\nfrom_uqff = "f.uqff"',
        Which.Plain(
            "m", "mistral", None, "t", IsqOrganization.MoQE, "w.uqff", "f.uqff", ModelDType.BF16
        ),
    ),
    "gguf": (f'{FILE}"f.gguf"\ntok_model_id = "t"', Which.GGUF("d", "f.gguf", "t")),
    "gguf in parts": (f'{FILE}"a.gguf b.gguf"', Which.GGUF("d", "a.gguf b.gguf")),
    "ggml": (f'{FILE}"f.bin"\ngqa = 8', Which.GGML("d", "f.bin", gqa=8)),
    "ggml by its name": (f'{FILE}"f.bin"', Which.GGML("d", "f.bin")),
    "x-lora": (f'model_id = "m"{XLORA}', Which.XLora("x", "o", model_id="m")),
    "lora of its ordering file": (LORA, Which.Lora("a", "o")),
    "lora without one": ('adapters_model_id = "a"', Which.Lora("a")),
    "lora": (f'model_id = "m"{LORA}', Which.Lora("a", "o", model_id="m")),
    "x-lora-gguf": (f'{FILE}"f.gguf"{XLORA}', Which.XLoraGGUF("d", "f.gguf", "x", "o")),
    "lora-gguf": (f'{FILE}"f.gguf"{LORA}', Which.LoraGGUF("d", "f.gguf", "a", "o")),
    "x-lora-ggml": (f'{FILE}"f.bin"{XLORA}', Which.XLoraGGML("d", "f.bin", "x", "o")),
    "lora-ggml": (f'{FILE}"f.bin"{LORA}\ngqa = 2', Which.LoraGGML("d", "f.bin", "a", "o", gqa=2)),
}


def read(folder: Path, text: str) -> TomlSelection:
    (folder / "s.toml").write_text(text)
    return read_toml(folder / "s.toml")


@pytest.mark.parametrize(("text", "wanted"), MODELS.values(), ids=MODELS.keys())
def test_models(text: str, wanted: Selection, tmp_path: Path) -> None:
    assert read(tmp_path, f"[model]\n{text}\n") == TomlSelection(wanted)


def test_vision_is_told_by_its_architecture(tmp_path: Path) -> None:
    for extra in ('arch = "llava_next"', 'arch = "idefics2"\nmax_edge = 500'):
        found = read(tmp_path, f'[model]\nmodel_id = "m"\n{extra}')
        assert isinstance(found.model, Which.VisionPlain)
        arch = extra.split('"')[1]
        assert (found.opening().architecture, found.opening().max_edge) == (
            arch, 500 if "max_edge" in extra else None,
        )  # fmt: skip


def test_the_tokenizer_of_the_root(tmp_path: Path) -> None:
    found = read(tmp_path, 'tokenizer_json = "t.json"\n[model]\nmodel_id = "m"')
    assert found.model == Which.Plain("m", tokenizer_json="t.json")
    assert found.opening().tokenizer_json == "t.json"
    assert not found.no_kv_cache
    assert read(tmp_path, 'no_kv_cache = true\n[model]\nmodel_id = "m"').no_kv_cache


def test_speculative_and_anymoe(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        """
        [model]
        model_id = "m"
        [speculative]
        gamma = 5
        [speculative.draft_model]
        model_id = "d"
        [anymoe]
        dataset_json = "d.json"
        prefix = "model.layers"
        mlp = "mlp"
        model_ids = ["a", "b"]
        layers = [0, 2]
        [anymoe.config]
        hidden_size = 64
        epochs = 3
        expert_type = {lora_adapter = {rank = 8, alpha = 16.0, target_modules = ["up_proj"]}}
        """,
    )
    assert found.speculative == (Which.Plain("d"), 5)
    adapter = AnyMoeExpertType.LoraAdapter(8, 16.0, ["up_proj"])
    assert found.anymoe == AnyMoeConfig(
        64, "d.json", "model.layers", "mlp", ["a", "b"], adapter, [0, 2], epochs=3
    )
    assert found.opening().anymoe == found.anymoe


def test_row_40_a_draft_model(tmp_path: Path) -> None:
    (tmp_path / "f.gguf").touch()
    found = read(
        tmp_path,
        f"""
        [model]
        model_id = "m"
        [speculative]
        gamma = 5
        draft_model = {{quantized_model_id = {str(tmp_path)!r}, quantized_filename = "f.gguf"}}
        """,
    )
    hub = Hub(offline=True)
    opening = found.opening(Opening(hub=hub, context=64))
    assert (opening.path, opening.context, opening.draft_tokens) == ("m", 64, 5)
    assert opening.of_draft == Opening(tmp_path / "f.gguf", hub=hub)
    with pytest.raises(InvalidRequest, match="give one"):
        found.opening(Opening(draft="ngram"))


WRONG = {
    "no TOML": ("[model", "is not TOML"),
    "no model": ("tokenizer_json = 'x'", "lacks model"),
    "a model that is none": ("model = 3", "must be a table"),
    "an unknown table": ("[model]\nmodel_id = 'm'\n[speculation]\n", "has speculation; known"),
    "an unknown key": ("[model]\nmodel_id = 'm'\nmodel = 1", "The kinds and their keys"),
    "nothing": ("[model]", "has nothing"),
    "an unknown dtype": ("[model]\nmodel_id = 'm'\ndtype = 'f8'", "auto, bf16, f16, f32"),
    "a number": ("[model]\nmodel_id = 3", "must be a text"),
    "no number": (f"[model]\n{FILE}'f'\ngqa = true", "must be a number"),
    "no flag": ("no_kv_cache = 1\n[model]\nmodel_id = 'm'", "true or false"),
    "no gamma": (
        "[model]\nmodel_id = 'm'\n[speculative.draft_model]\nmodel_id = 'm'",
        "lacks gamma",
    ),
    "an absurd gamma": (
        "[model]\nmodel_id = 'm'\n[speculative]\ngamma = 0\ndraft_model = {model_id = 'm'}",
        "from 1 on",
    ),
    "an empty anymoe": ("[model]\nmodel_id = 'm'\n[anymoe]", "lacks config, dataset_json"),
}


@pytest.mark.parametrize(("text", "problem"), WRONG.values(), ids=WRONG.keys())
def test_wrong_files(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        read(tmp_path, text)
    with pytest.raises(InvalidRequest, match="cannot read"):
        read_toml(tmp_path / "none.toml")
