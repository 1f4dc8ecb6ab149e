"""Where the parts of a model are found, and which files are models that make pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from squall.checkpoints.hub import Hub, choose
from squall.diffusion import files
from squall.diffusion.files import find, is_image_model
from squall.errors import InvalidCheckpoint, InvalidRequest, ModelNotFound, UnsupportedModel
from squall.opening import Opening

INDEX = {
    "_class_name": "FluxPipeline", "_diffusers_version": "0.42.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "image_encoder": [None, None],
}  # fmt: skip
# As they are on the hub.
PIPELINE = [
    "model_index.json", "scheduler/scheduler_config.json",
    "text_encoder/config.json", "text_encoder/model.safetensors",
    "text_encoder_2/config.json", "text_encoder_2/model-00001-of-00002.safetensors",
    "text_encoder_2/model-00002-of-00002.safetensors",
    "text_encoder_2/model.safetensors.index.json",
    "tokenizer/merges.txt", "tokenizer/vocab.json", "tokenizer_2/tokenizer.json",
    "transformer/config.json", "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
]  # fmt: skip
BESIDE = [
    ".gitattributes", "README.md", "LICENSE.md", "schnell_grid.jpeg", "dev_grid.jpg",
    "tokenizer/special_tokens_map.json", "tokenizer_2/spiece.model",
    "tokenizer_2/special_tokens_map.json", "vae/x.bin", "../vae/config.json",
]  # fmt: skip


def made(folder: Path, *names: str, index: object = INDEX) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(index) if name == files.INDEX else "{}")
    return folder


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """The hub, which has what is asked for."""
    asked = []

    def fetch(hub, name, *_, **options):
        asked.append((name, options.get("skip"), hub.revision))
        (found := tmp_path / "hub" / name).mkdir(parents=True, exist_ok=True)
        return found

    monkeypatch.setattr(Hub, "fetch", fetch)
    return asked


def test_a_pipeline_has_its_parts_in_folders(tmp_path, fetched):
    made(tmp_path, *PIPELINE)
    found = find(Opening(tmp_path))
    names = {name: getattr(found, name) for name in files.Files.__slots__}
    assert {name: path.relative_to(tmp_path).as_posix() for name, path in names.items()} == {
        "path": ".", "transformer": "transformer", "vae": "vae", "t5": "text_encoder_2",
        "clip": "text_encoder", "t5_tokens": "tokenizer_2", "clip_tokens": "tokenizer",
        "scheduler": "scheduler/scheduler_config.json",
    }  # fmt: skip
    assert not fetched


@pytest.mark.parametrize("name", ["flux1-schnell.safetensors", "flux1-dev.safetensors"])
@pytest.mark.parametrize("lone", [False, True])
def test_what_the_original_layout_lacks_is_where_mistral_rs_takes_it(tmp_path, fetched, name, lone):
    made(tmp_path, name, "ae.safetensors", "transformer/config.json", "vae/config.json")
    found = find(Opening(tmp_path / name if lone else tmp_path))
    hub = tmp_path / "hub"
    assert found.transformer == tmp_path / name
    assert found.vae == tmp_path / "ae.safetensors"
    assert found.t5 == hub / files.T5
    assert found.t5_tokens == hub / files.T5_TOKENS
    assert found.clip == hub / files.CLIP
    assert found.clip_tokens == hub / files.CLIP_TOKENS  # as the folder here is empty
    asked = {name for name, *_ in fetched}
    assert asked == {files.T5, files.T5_TOKENS, files.CLIP, files.CLIP_TOKENS}


def test_parts_can_be_named(tmp_path, fetched):
    given = made(tmp_path / "own", "t5.gguf", "clip/vocab.json", "clip/merges.txt", "v.safetensors")
    flux = made(tmp_path / "flux", "f.gguf") / "f.gguf"
    named = {"t5": given / "t5.gguf", "clip": given / "clip", "vae": given / "v.safetensors"}
    found = find(Opening(flux, **named))
    assert (found.transformer, found.vae) == (flux, named["vae"])
    assert found.t5 == found.t5_tokens == named["t5"]
    assert found.clip == found.clip_tokens == named["clip"]
    assert not fetched
    assert find(Opening(flux, vae=named["vae"], t5="who/t5", clip=named["clip"])).t5 == (
        tmp_path / "hub/who/t5"
    )
    with pytest.raises(ModelNotFound, match=r"autoencoder.*--vae"):
        find(Opening(flux))
    for name in ("t5", "clip", "vae"):
        with pytest.raises(ModelNotFound, match="no/such/file"):
            find(Opening(flux, **named | {name: "no/such/file"}))


def test_only_what_is_needed_is_fetched(tmp_path, fetched):
    with pytest.raises(ModelNotFound, match="transformer"):
        find(Opening("who/flux", t5=tmp_path, vae=tmp_path, hub=Hub(revision="v1")))
    assert fetched[0] == ("who/flux", ("text_encoder_2/", "vae/"), "v1")
    assert fetched[1] == (files.CLIP, None, "main")
    assert choose(PIPELINE + BESIDE, "") == (sorted(PIPELINE), None)
    rest = [name for name in PIPELINE if not name.startswith(("vae/", "text_encoder_2/"))]
    skip = ("text_encoder_2/", "vae/")
    assert choose(PIPELINE + BESIDE, "", skip=skip) == (sorted(rest), None)
    own = ["flux1-dev.safetensors", "ae.safetensors"]
    assert choose([*PIPELINE, *own, *BESIDE], "") == (sorted(PIPELINE), None)
    original = ["transformer/config.json", "vae/config.json", *own]
    assert sorted(choose(original + BESIDE, "")[0]) == sorted(original)
    quantized = ["transformer/config.json", "transformer/model.uqff", "vae/config.json"]
    assert choose([*quantized, *BESIDE], "") == (quantized, None)


def test_the_seeds_repositories_of_texts_are_fetched():
    t5 = ["config.json", "t5_xxl-shard-0.safetensors", "t5_xxl-shard-1.safetensors"]
    assert choose([*t5, "README.md"], "") == (t5, None)
    name = files.T5_TOKENS.partition(":")[2]
    assert choose([name, "README.md"], name) == ([name], name)
    assert files.T5_TOKENS.partition(":")[0].count("/") == 1


def test_parts_in_lone_files_are_fetched_alone_and_tokenizers_with_what_is_said_of_them():
    parts = ["ae.safetensors", "flux1-dev-fp8-e4m3fn.safetensors", "t5xxl_fp8_e4m3fn.safetensors"]
    parts += ["clip_l.safetensors", files.CLIP_TOKENS.partition(":")[2]]
    repository = [*parts, "model.safetensors", "config.json", "flux.safetensors/../x.safetensors"]
    for part in parts:
        beside = ["config.json"] if part == "tokenizer.json" else []
        assert choose(repository, part) == ([*beside, part], part)
    for other in ("model.safetensors", "config.json", repository[-1]):
        with pytest.raises(ModelNotFound):
            choose(repository, other)


def test_tokens_of_a_lone_clip_do_not_bring_another(tmp_path, fetched):
    made(tmp_path, "flux1-dev.safetensors", "ae.safetensors", "clip_l.safetensors", "t5.gguf")
    find(Opening(tmp_path, t5=tmp_path / "t5.gguf", clip=tmp_path / "clip_l.safetensors"))
    assert [name for name, *_ in fetched] == [files.CLIP_TOKENS]


@pytest.mark.parametrize(
    ("index", "error", "match"),
    [
        (INDEX | {"_class_name": "StableDiffusionPipeline"}, UnsupportedModel, "StableDiffusion"),
        (INDEX | {"_class_name": "FluxFillPipeline"}, UnsupportedModel, "FluxFill"),
        ({}, UnsupportedModel, "None"),
        (INDEX | {"_class_name": ["FluxPipeline"]}, UnsupportedModel, "known: FluxPipeline"),
        ([INDEX], InvalidCheckpoint, "not a JSON object"),
    ],
)
def test_other_pipelines_and_junk_are_refused(tmp_path, fetched, index, error, match):
    made(tmp_path, *PIPELINE, index=index)
    with pytest.raises(error, match=match):
        find(Opening(tmp_path))
    assert not fetched
    kind = index.get("_class_name") if isinstance(index, dict) else ""
    assert is_image_model(tmp_path) == str(kind).startswith("Flux")


def test_names_of_parts_lead_nowhere_else(tmp_path):
    """What model_index.json calls the libraries of parts is never a path."""
    index = INDEX | {"vae": ["../../outside", "AutoencoderKL"], "../x": ["y", "z"]}
    made(tmp_path, *PIPELINE, index=index)
    assert find(Opening(tmp_path)).vae == tmp_path / "vae"


def test_what_is_missing_or_not_one_is_told(tmp_path):
    made(tmp_path, "vae/a.safetensors", "text_encoder/a.safetensors", "tokenizer/vocab.json")
    made(tmp_path, "text_encoder_2/a.safetensors", "tokenizer_2/tokenizer.json")
    with pytest.raises(ModelNotFound, match=r"no transformer/ and 0 files"):
        find(Opening(tmp_path))
    made(tmp_path, "flux1-dev.safetensors", "flux1-schnell.safetensors")
    with pytest.raises(ModelNotFound, match=r"2 files.*flux1-dev.*flux1-schnell"):
        find(Opening(tmp_path))
    with pytest.raises(ModelNotFound, match="does not exist"):
        find(Opening("./no such folder"))
    with pytest.raises(InvalidRequest, match="name a model"):
        find(Opening())


def test_models_that_make_pictures_are_told_apart(tmp_path):
    assert is_image_model(made(tmp_path / "a", *PIPELINE))
    assert is_image_model(made(tmp_path / "b", "flux1-dev.safetensors"))
    assert is_image_model(tmp_path / "b/flux1-dev.safetensors")
    assert is_image_model(str(tmp_path / "b"))
    for other in ("c/config.json", "c/model.safetensors", "c/x.gguf", "d/model_index.json"):
        made(tmp_path, other, index={"_class_name": "StableDiffusionPipeline"})
        assert not is_image_model(tmp_path / other)
        assert not is_image_model((tmp_path / other).parent)
    for junk in ("", "[", "[1]", '{"_class_name": 3}', "\0"):
        (tmp_path / "d/model_index.json").write_text(junk)
        assert not is_image_model(tmp_path / "d")
    assert not is_image_model(tmp_path / "nowhere")
    assert not is_image_model("black-forest-labs/FLUX.1-schnell")
    assert not is_image_model("~nobody-of-this-name/flux1-dev.safetensors")
