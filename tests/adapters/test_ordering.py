"""mistral.rs's ordering files, as its own are, and as they should not be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from squall.adapters.ordering import Ordering
from squall.errors import InvalidRequest, ModelNotFound, SquallError

LORA = {
    "base_model_id": "HuggingFaceH4/zephyr-7b-beta",
    "order": ["adapter_1"],
    "preload_adapters": [{"name": "adapter_2", "adapter_model_id": "lamm-mit/x-lora"}],
}
XLORA = {
    "order": ["adapter_1", "adapter_2"],
    "layers": {"model.layers.0.self_attn.q_proj": 0, "model.layers.0.self_attn.k_proj": 1},
    "base_model_id": "HuggingFaceH4/zephyr-7b-beta",
}


def write(folder: Path, content: object) -> Path:
    path = folder / "ordering.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def adapters(root: Path, *names: str) -> str:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "adapter_config.json").write_text("{}")
    return str(root)


def test_files_of_mistral_rs(tmp_path: Path) -> None:
    found = Ordering.read(write(tmp_path, LORA))
    assert found.order == ("adapter_1",)
    assert found.preload == {"adapter_2": "lamm-mit/x-lora"}
    found = Ordering.read(write(tmp_path, XLORA))
    assert found.layers == XLORA["layers"]
    assert found.base_model_id == "HuggingFaceH4/zephyr-7b-beta"
    assert Ordering.read(write(tmp_path, {})) == Ordering.read(None) == Ordering()


WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "is not JSON"),
    "a list": ("[]", "is not a JSON object"),
    "an order that is a text": ({"order": "a"}, "order in the ordering file is 'a'"),
    "a name that is none": ({"order": ["a", 3]}, "names, which are texts"),
    "a name that is empty": ({"order": [""]}, "names, which are texts"),
    "a name twice": ({"order": ["a", "a"]}, "each once"),
    "a name in both": (
        {"order": ["a"], "preload_adapters": [{"name": "a", "adapter_model_id": "b"}]},
        "each once",
    ),
    "too many": ({"order": [str(i) for i in range(5000)]}, "each once"),
    "a preload without a place": ({"preload_adapters": [{"name": "a"}]}, "names, which are"),
    "a preload that is a name": ({"preload_adapters": ["a"]}, "in the ordering file is 'a'"),
    "a base that is none": ({"base_model_id": 3}, "base_model_id in the ordering file is 3"),
    "layers that are a list": ({"layers": [1]}, "layers in the ordering file"),
    "a layer below 0": ({"layers": {"a": -1}}, "from 0 on"),
    "a layer that is true": ({"layers": {"a": True}}, "from 0 on"),
}


@pytest.mark.parametrize(("content", "problem"), WRONG.values(), ids=WRONG.keys())
def test_wrong_files(content: object, problem: str, tmp_path: Path) -> None:
    with pytest.raises(SquallError, match=problem):
        Ordering.read(write(tmp_path, content))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="there is no ordering file"):
        Ordering.read(tmp_path / "none.json")


def test_the_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ordering = Ordering(base_model_id="HuggingFaceH4/zephyr-7b-beta")
    for right in (None, "huggingfaceh4/Zephyr-7B-beta", "mirror/zephyr-7b-beta/", str(tmp_path)):
        ordering.check_base(right)
    with pytest.raises(InvalidRequest, match="for 'HuggingFaceH4/zephyr-7b-beta', not for 'a/b'"):
        ordering.check_base("a/b")
    monkeypatch.chdir(tmp_path)
    Path("a/b").mkdir(parents=True)
    ordering.check_base("a/b")
    Ordering().check_base("c/d")


def test_where_adapters_are(tmp_path: Path) -> None:
    root = adapters(tmp_path / "x-lora", "adapter_1", "adapter_10", "my_adapter_2")
    alone = adapters(tmp_path, "math")
    places = Ordering(("adapter_1", "adapter_2"), preload={"law": f"{alone}/math"}).places(root)
    assert places == {
        "adapter_1": f"{root}/adapter_1",
        "adapter_2": f"{root}/my_adapter_2",
        "law": f"{tmp_path}/math",
    }
    with pytest.raises(ModelNotFound, match=r"3 folders in .* have 'adapter' in their names"):
        Ordering(("adapter",)).places(root)
    with pytest.raises(ModelNotFound, match="there: 'adapter_1', 'adapter_10', 'my_adapter_2'"):
        Ordering(("code",)).places(root)
    assert Ordering(("a",), preload={"b": "c/d"}).places("owner/name") == {
        "a": "owner/name:a",
        "b": "c/d:b",
    }


def test_adapters_without_an_order(tmp_path: Path) -> None:
    root = adapters(tmp_path / "several", "b", "a")
    assert Ordering().places(root) == {"a": f"{root}/a", "b": f"{root}/b"}
    one = adapters(tmp_path, "one") + "/one"
    assert Ordering().places(one) == {"one": one}
    file = tmp_path / "f.gguf"
    file.touch()
    assert Ordering().places(str(file)) == {"f.gguf": str(file)}
    only = Ordering(preload={"b": str(tmp_path / "several")})
    assert only.places("none/such") == {"b": f"{root}/b"}
