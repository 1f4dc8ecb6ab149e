"""What the files beside the weights say: modules, names of tensors, vocab.txt."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from harness import distance
from safetensors.torch import load_file, save_file
from tiny_embedders import BERT, TEXTS, WORDS, ids, pooled, rows, vector, write

from squall import Embedder
from squall.checkpoints import hub
from squall.embeddings.files import is_embedding_model
from squall.errors import InvalidCheckpoint, InvalidRequest, UnsupportedModel

CLOSE = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def renamed(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = {change(name): tensor.clone() for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


def reconfigured(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(config | changes))


def test_names_of_tensors(tmp_path: Path) -> None:
    """Under a model's own name, as heads have them; and norms as early files have them."""
    write(tmp_path, "BertModel")
    with Embedder.open(tmp_path) as embedder:
        wanted = embedder.embed(TEXTS).vectors
    norms = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def early(name: str) -> str:
        for new, old in norms.items():
            name = name.replace(new, old)
        return f"bert.{name}"

    renamed(tmp_path, early)
    reconfigured(tmp_path, architectures=["BertForMaskedLM"])
    with Embedder.open(tmp_path) as embedder:
        assert np.array_equal(embedder.embed(TEXTS).vectors, wanted)


@pytest.mark.parametrize(("kind", "before", "gone", "said"), [
    ("ModernBertModel", "model.", ("rope_parameters", "layer_types"), {
        "global_rope_theta": 9000.0, "local_rope_theta": 700.0, "global_attn_every_n_layers": 2,
        "position_embedding_type": "absolute", "layer_norm_eps": 1e-5, "reference_compile": True,
    }),
    ("NomicBertModel", "", ("rope_parameters", "hidden_size", "num_attention_heads",
        "num_hidden_layers", "intermediate_size", "layer_norm_eps", "max_position_embeddings",
        "hidden_act"), {
        "n_embd": 48, "n_head": 4, "n_layer": 3, "n_inner": 80, "layer_norm_epsilon": 0.01,
        "rotary_emb_base": 700, "n_positions": 8192, "max_trained_positions": 130,
        "activation_function": "swiglu", "qkv_proj_bias": False, "rotary_emb_fraction": 1.0,
        "rotary_scaling_factor": None, "prenorm": False, "pad_vocab_size_multiple": 64,
    }),
])  # fmt: skip
def test_configurations_as_their_authors_write_them(
    tmp_path: Path, kind: str, before: str, gone: tuple[str, ...], said: dict[str, Any]
) -> None:
    turns = {"full_attention": 9000.0, "sliding_attention": 700.0}
    rope = {name: {"rope_type": "default", "rope_theta": theta} for name, theta in turns.items()}
    changes: dict[str, Any] = {"rope_parameters": rope["sliding_attention"]}
    if kind == "ModernBertModel":
        changes = {"rope_parameters": rope, "layer_types": [*turns] * 2}
    model = write(tmp_path, kind, **changes)
    path = tmp_path / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in gone}
    path.write_text(json.dumps(config | said))
    renamed(tmp_path, lambda name: before + name)
    with Embedder.open(tmp_path) as embedder:
        assert embedder.context == 130
        found = embedder.embed([ids(60)], normalize=False).vectors[0]
    assert distance(found, rows(model, ids(60)).mean(0)) < CLOSE


def test_a_nomic_bert_that_turns_otherwise(tmp_path: Path) -> None:
    write(tmp_path, "NomicBertModel")
    reconfigured(tmp_path, rotary_emb_interleaved=True)
    with pytest.raises(UnsupportedModel, match="rotary_emb_interleaved"):
        Embedder.open(tmp_path)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_names_of_a_decoder_without_its_head(tmp_path: Path, prefix: str) -> None:
    model = write(tmp_path, "Qwen3Model")
    renamed(tmp_path, lambda name: prefix + name.removeprefix("model."))
    with Embedder.open(tmp_path) as embedder:
        found = embedder.embed([ids(9)], normalize=False).vectors[0]
    assert distance(found, rows(model, ids(9))[-1]) < CLOSE


@pytest.mark.parametrize("lower", [True, False])
def test_a_vocabulary_alone(tmp_path: Path, lower: bool) -> None:
    write(tmp_path, "BertModel")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    reconfigured(tmp_path, "tokenizer_config.json", do_lower_case=lower)
    theirs = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"), do_lower_case=lower)
    with Embedder.open(tmp_path) as embedder:
        for text in ("the Cat, 北京é", "THINGING", "a\u2028b"):
            found = embedder.embed([text]).vectors
            assert np.array_equal(found, embedder.embed([theirs(text)["input_ids"]]).vectors), text


def test_without_a_tokenizer(tmp_path: Path) -> None:
    write(tmp_path, "BertModel")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"neither tokenizer\.json nor vocab\.txt"):
        Embedder.open(tmp_path)


@pytest.mark.parametrize("kind", ["activation.Tanh", "linear.Identity", "activation.GELU"])
def test_linears_after_pooling(tmp_path: Path, kind: str) -> None:
    """As EmbeddingGemma has them."""
    model = write(tmp_path, "Gemma3TextModel")
    pooled(tmp_path, "mean")
    modules = json.loads((tmp_path / "modules.json").read_text())
    sizes, wanted = (48, 72, 24), vector(rows(model, ids(30)), "mean")
    for number, (cols, count) in enumerate(pairwise(sizes), start=2):
        folder = tmp_path / f"{number}_Dense"
        folder.mkdir()
        weight = torch.randn(count, cols) / 8
        save_file({"linear.weight": weight}, folder / "model.safetensors")
        given = {"in_features": cols, "out_features": count, "bias": False}
        reconfigured(folder, activation_function=f"torch.nn.modules.{kind}", **given)
        path = {"type": "sentence_transformers.models.Dense", "path": folder.name}
        modules.insert(number, {"idx": number, "name": str(number), **path})
        made = getattr(torch.nn, kind.partition(".")[2])()(weight @ torch.tensor(wanted))
        wanted = made.numpy()
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with Embedder.open(tmp_path) as embedder:
        assert embedder.width == 24
        found = embedder.embed([ids(30), *TEXTS], normalize=False).vectors
        assert np.array_equal(embedder.embed([ids(30)], normalize=False).vectors[0], found[0])
    assert distance(found[0], wanted) < CLOSE


@pytest.mark.parametrize("mode", ["cls", ["mean"], "lasttoken"])
def test_poolings_as_they_are_written_now(tmp_path: Path, mode: Any) -> None:
    model = write(tmp_path, "BertModel")
    pooled(tmp_path, "mean")
    config = {"pooling_mode": mode, "embedding_dimension": 48, "include_prompt": True}
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(config))
    name = (mode if isinstance(mode, str) else mode[0]).removesuffix("token")
    with Embedder.open(tmp_path) as embedder:
        found = embedder.embed([ids(9)], normalize=False).vectors[0]
    assert distance(found, vector(rows(model, ids(9)), name)) < CLOSE


def test_as_sentence_transformers_writes_now(tmp_path: Path) -> None:
    """The longest text beside the tokenizer, and how wide a vector is."""
    write(tmp_path, "BertModel")
    pooled(tmp_path, "mean")
    with Embedder.open(tmp_path) as embedder:
        whole = embedder.embed(["the cat"], normalize=False).vectors
    pooled(tmp_path, "mean", truncate_dim=20)
    reconfigured(tmp_path, "tokenizer_config.json", model_max_length=9)
    with Embedder.open(tmp_path) as embedder:
        assert (embedder.context, embedder.width) == (9, 20)
        found = embedder.embed(["the cat"], normalize=False).vectors
        assert np.array_equal(found, whole[:, :20])
        with pytest.raises(InvalidRequest, match=r"dimensions is 21; it must be in 1\.\.20"):
            embedder.embed(["a"], dimensions=21)
    reconfigured(tmp_path, "sentence_bert_config.json", max_seq_length=12)
    with Embedder.open(tmp_path) as embedder:
        assert embedder.context == 12
    (tmp_path / "sentence_bert_config.json").unlink()
    reconfigured(tmp_path, "tokenizer_config.json", model_max_length=int(1e30))  # no limit
    with Embedder.open(tmp_path) as embedder:
        assert embedder.context == BERT["max_position_embeddings"]


def test_texts_in_lower_case(tmp_path: Path) -> None:
    write(tmp_path, "BertModel")
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["normalizer"]["lowercase"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with Embedder.open(tmp_path) as embedder:
        small, large = embedder.embed(["the", "The"]).vectors
        assert not np.array_equal(small, large)
    reconfigured(tmp_path, "sentence_bert_config.json", do_lower_case=True, max_seq_length=9)
    with Embedder.open(tmp_path) as embedder:
        assert embedder.context == 9
        found = embedder.embed(["the", "The"]).vectors
    assert np.array_equal(found, [small, small])


@pytest.mark.parametrize(("name", "text", "error", "message"), [
    ("modules.json", "{}", InvalidCheckpoint, "no list of modules"),
    ("modules.json", "[1]", InvalidCheckpoint, "no list of modules"),
    ("modules.json", '[{"type": "a.Pooling", "path": "../x"}]', InvalidCheckpoint, "a folder in"),
    ("modules.json", '[{"type": "a.CNN", "path": "1_CNN"}]', UnsupportedModel, "'CNN'; known: Tr"),
    ("1_Pooling/config.json", '{"pooling_mode": "min"}', UnsupportedModel, "'min'; known: cls"),
    ("1_Pooling/config.json", "{}", UnsupportedModel, "rows are pooled by"),
    ("1_Pooling/config.json", '{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true}',
     UnsupportedModel, "pooled by"),
    ("1_Pooling/config.json", '{"pooling_mode": "cls", "include_prompt": false}', UnsupportedModel,
     "include_prompt"),
    ("sentence_bert_config.json", '{"max_seq_length": -1}', InvalidCheckpoint, "max_seq_length"),
    ("tokenizer_config.json", '{"model_max_length": 0}', InvalidCheckpoint, "model_max_length"),
    ("config_sentence_transformers.json", '{"truncate_dim": "8"}', InvalidCheckpoint, "is '8'"),
    ("modules.json", '[{"type": "a.LogitScore", "path": "1_L"}]', UnsupportedModel, "'LogitScore'"),
])  # fmt: skip
def test_files_that_say_something_else(
    tmp_path: Path, name: str, text: str, error: type[Exception], message: str
) -> None:
    write(tmp_path, "BertModel")
    pooled(tmp_path, "mean")
    (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        Embedder.open(tmp_path)


@pytest.mark.parametrize(("changes", "message"), [
    ({"hidden_act": "mish"}, "'mish'"),
    ({"max_position_embeddings": 131}, "position_embeddings.*shape"),
    ({"type_vocab_size": 3}, "token_type_embeddings.*shape"),
    ({"num_hidden_layers": 4}, r"layer\.3\..* is missing"),
    ({"num_hidden_layers": 2}, "does not use"),
    ({"vocab_size": 3}, "shape"),
    ({"is_decoder": True}, "is_decoder"),
    ({"position_embedding_type": "relative_key"}, "relative_key"),
    ({"model_type": "fnet"}, "unknown model_type 'fnet'"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization"),
])  # fmt: skip
def test_a_bert_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path, "BertModel")
    reconfigured(tmp_path, **changes)
    with pytest.raises((InvalidCheckpoint, UnsupportedModel), match=message):
        Embedder.open(tmp_path)


def test_which_models_embed(tmp_path: Path) -> None:
    for number, (config, answer) in enumerate([
        ({"model_type": "bert"}, True),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, False),
        ({"model_type": "qwen3", "architectures": ["Qwen3Model"]}, True),
        ({"model_type": "t5", "architectures": ["T5EncoderModel"]}, False),
        ({}, False),
    ]):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        assert is_embedding_model(folder) == answer, config
    (tmp_path / "1/modules.json").write_text("[]")
    assert is_embedding_model(str(tmp_path / "1"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    for other in ("bad.gguf", "nowhere", ".", "a/b:c"):
        assert not is_embedding_model(tmp_path / other)


def test_files_of_the_hub() -> None:
    names = [
        "config.json", "model.safetensors", "modules.json", "1_Pooling/config.json", "vocab.txt",
        "2_Dense/config.json", "2_Dense/model.safetensors", "config_sentence_transformers.json",
        "sentence_bert_config.json", "tokenizer.json",
    ]  # fmt: skip
    others = ["onnx/model.onnx", "README.md", "data_config.json", "2_Dense/pytorch_model.bin"]
    assert sorted(hub.choose([*names, *others], "")[0]) == sorted(names)


def test_sizes(tmp_path: Path) -> None:
    """Positions are what limits a text where no file says less."""
    write(tmp_path, "BertModel")
    with Embedder.open(tmp_path) as embedder:
        assert embedder.context == BERT["max_position_embeddings"]
        assert embedder.path == tmp_path
        assert embedder.name == tmp_path.name


def test_a_model_of_the_hub_is_called_as_its_repository(tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--name-1.5" / "snapshots" / ("a" * 40)
    write(folder, "BertModel")
    with Embedder.open(folder) as embedder:
        assert embedder.name == "owner/name-1.5"
