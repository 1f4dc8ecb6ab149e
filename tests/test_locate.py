"""Which file a name means, and what is said when it means none."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from squall.checkpoints.hub import Hub
from squall.errors import ModelNotFound
from squall.locate import find_mmproj, locate, looks_like_model


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def test_a_file(tmp_path: Path) -> None:
    make(tmp_path, "a.gguf")
    assert locate(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"


def test_a_folder_with_one(tmp_path: Path) -> None:
    assert locate(make(tmp_path, "a.gguf", "README.md")) == tmp_path / "a.gguf"


def test_a_folder_with_one_that_sees(tmp_path: Path) -> None:
    make(tmp_path, "a.gguf", "mmproj-a-f16.gguf", "a-mmproj-q8_0.gguf")
    assert locate(tmp_path) == tmp_path / "a.gguf"
    towers = [tmp_path / "a-mmproj-q8_0.gguf", tmp_path / "mmproj-a-f16.gguf"]
    assert find_mmproj(tmp_path / "a.gguf", None, None, None) == towers
    assert find_mmproj(tmp_path / "a.gguf", towers[0], None, None) == towers[:1]


def test_a_folder_with_a_split_one(tmp_path: Path) -> None:
    make(tmp_path, "a-00001-of-00002.gguf", "a-00002-of-00002.gguf")
    assert locate(tmp_path) == tmp_path / "a-00001-of-00002.gguf"


def test_a_folder_with_a_config(tmp_path: Path) -> None:
    assert locate(make(tmp_path, "config.json", "a.gguf")) == tmp_path / "a.gguf"


def test_a_folder_with_both(tmp_path: Path) -> None:
    assert locate(make(tmp_path, "config.json", "model.safetensors", "a.gguf")) == tmp_path


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"has no GGUF file and no config\.json"),
        (["a.gguf", "b.gguf"], r"2 models; name one of them: a\.gguf, b\.gguf"),
    ],
)
def test_other_folders(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(ModelNotFound, match=message):
        locate(make(tmp_path, *names))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/model", "owner/model is not, .* in the cache"),
        ("owner/model:Q4_K_M", "owner/model:Q4_K_M is not, .* in the cache"),
        ("owner/../model", "does not exist"),
        ("folder/model.gguf", "does not exist"),
        ("~nobody-of-this-name/model.gguf", "does not exist"),
        ("model.gguf", "does not exist"),
    ],
)
def test_what_is_not_there(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFound, match=message):
        locate(name, Hub(offline=True))


def test_what_is_here_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    make(tmp_path / "owner" / "model", "a.gguf")
    assert locate("owner/model") == Path("owner/model/a.gguf")


def test_what_the_cache_of_the_hub_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--o--m" / "snapshots" / ("c" * 40)
    folder.mkdir(parents=True)
    make(folder, "a-Q8_0.gguf")
    hub = Hub(revision="c" * 40, offline=True)
    assert locate("o/m", hub) == locate("o/m:Q8_0", hub) == folder / "a-Q8_0.gguf"


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("here", True), ("folder", True), (".", True), ("none.gguf", True), ("./none", True),
        ("~/none", True), ("/none/at/all", True), ("owner/name", True), ("owner/name:Q4_K_M", True),
        ("my model.gguf", True), ("none", False), ("Why?", False), ("24/7", False), ("", False),
        ("what is none.gguf", False), ("is it here/there", False), ("...", False),
        ("a" * 9999, False), ("half\0", False),
    ],
)  # fmt: skip
def test_words_that_mean_a_model(
    word: str, wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make(tmp_path, "here", "my model.gguf"))
    (tmp_path / "folder").mkdir()
    assert looks_like_model(word) is wanted
