"""The hub, played by a server here: what is asked of it, what is kept, and what is refused."""

from __future__ import annotations

import importlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from checkpoints.hub_server import (
    MAIN,
    OTHER,
    TOKEN,
    Handler,
    Repository,
    Server,
    playing,
)
from squall import recipes
from squall.checkpoints import hub
from squall.checkpoints.hub import Hub
from squall.errors import InvalidRequest, ModelNotFound, SquallError
from squall.locate import locate

FOLDER = {
    "config.json": b"{}",
    "tokenizer.json": b"{ }",
    "additional_chat_templates/tool_use.jinja": b"t",
    "model-00001-of-00002.safetensors": b"1" * 1000,
    "model-00002-of-00002.safetensors": b"2" * 1000,
    "model.safetensors.index.json": b"{  }",
    "pytorch_model.bin": b"no",
    "model.gguf": b"no",
    "README.md": b"no",
    "original/consolidated.00.pth": b"no",
}
NEEDED = {name for name, content in FOLDER.items() if content != b"no"}
GGUFS = {"m-Q4_K_M.gguf": b"q4", "m-Q8_0.gguf": b"q8", "README.md": b"no"} | {
    f"big-F16-0000{n}-of-00002.gguf": b"%d" % n for n in (1, 2)
}


ADAPTERS = {
    f"{folder}{name}": f"{folder}{name}".encode()
    for folder in ("adapter_1/", "adapter_10/", "my_law/")
    for name in ("adapter_config.json", "adapter_model.safetensors")
} | {"xlora_config.json": b"x", "xlora_classifier.safetensors": b"c", "README.md": b"no"}
ADAPTER = {"adapter_config.json": b"c", "adapter_model.bin": b"w", "training_args.bin": b"no"}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    repositories = {"folder": FOLDER, "ggufs": GGUFS, "adapters": ADAPTERS, "adapter": ADAPTER}
    named = {f"o/{name}": files for name, files in repositories.items()}
    with playing(named, tmp_path, monkeypatch) as played:
        yield played


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_has_what_is_needed(server: Server) -> None:
    steps: list[tuple[int, int]] = []
    folder = Hub().fetch("o/folder", lambda *step: steps.append(step))
    assert names(folder) == NEEDED
    assert all((folder / name).read_bytes() == FOLDER[name] for name in NEEDED)
    whole = sum(len(FOLDER[name]) for name in NEEDED)
    assert steps[-1] == (whole, whole)
    assert steps == sorted(steps)
    assert set(server.downloads()) == NEEDED


def test_a_model_that_embeds_comes_with_what_follows_it(server: Server) -> None:
    needed = {
        "config.json", "tokenizer.json", "model.safetensors", "modules.json",
        "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json",
        "2_Dense/config.json", "2_Dense/model.safetensors",
    }  # fmt: skip
    others = {"onnx/model.onnx", "2_Dense/pytorch_model.bin", "pytorch_model.bin", "README.md"}
    files = {name: name.encode() for name in needed | others}
    server.repositories["o/embeds"] = Repository(files)
    assert names(Hub().fetch("o/embeds")) == needed
    assert names(Hub(offline=True).fetch("o/embeds")) == needed


@pytest.mark.usefixtures("server")
def test_a_tokenizer_comes_with_what_says_how_it_is_used() -> None:
    file = Hub().fetch("o/folder:tokenizer.json")
    assert file.name == "tokenizer.json"
    assert names(file.parent) == {n for n in NEEDED if n.endswith((".json", ".jinja"))} - {
        "model.safetensors.index.json"
    }
    assert Hub(offline=True).fetch("o/folder:tokenizer.json") == file


def test_a_second_time_nothing_is_downloaded(server: Server) -> None:
    first = Hub().fetch("o/folder")
    server.requests.clear()
    assert Hub().fetch("o/folder") == first
    assert not server.downloads()
    assert len(server.requests) <= 2


def test_pickles_only_without_safetensors(server: Server) -> None:
    files = {name: FOLDER[name] for name in ("config.json", "pytorch_model.bin", "README.md")}
    server.repositories["o/old"] = Repository(files)
    assert names(Hub().fetch("o/old")) == {"config.json", "pytorch_model.bin"}


@pytest.mark.parametrize("file", ["m-Q8_0.gguf", "Q8_0", "q8"])
def test_one_gguf_file(file: str, server: Server) -> None:
    found = Hub().fetch(f"o/ggufs:{file}")
    assert found.name == "m-Q8_0.gguf"
    assert found.read_bytes() == b"q8"
    assert server.downloads() == ["m-Q8_0.gguf"]


@pytest.mark.parametrize(
    ("file", "folder"), [("adapter_1", "adapter_1"), ("law", "my_law"), ("adapter_10",) * 2]
)
def test_one_adapter_of_several(file: str, folder: str, server: Server) -> None:
    found = Hub().fetch(f"o/adapters:{file}")
    assert found.name == folder
    assert names(found) == {"adapter_config.json", "adapter_model.safetensors"}
    assert len(server.downloads()) == 2


def test_all_of_an_adapter(server: Server) -> None:
    assert names(Hub().fetch("o/adapters")) == ADAPTERS.keys() - {"README.md"}
    server.requests.clear()
    alone = {"adapter_config.json", "adapter_model.bin"}
    assert names(Hub().fetch("o/adapter")) == alone
    assert names(Hub().fetch("o/adapter:whatever")) == alone
    assert set(server.downloads()) == alone
    assert Hub(offline=True).fetch("o/adapters:law").name == "my_law"
    for file in ("adapter", "code"):
        with pytest.raises(ModelNotFound, match="0 GGUF models named"):
            Hub().fetch(f"o/adapters:{file}")


def test_a_tower_comes_with_its_model(server: Server) -> None:
    files = ["m-Q4_K_M.gguf", "mmproj-m-BF16.gguf", "mmproj-m-f16.gguf", "README.md"]
    server.repositories["o/sees"] = Repository({name: name.encode() for name in files})
    alone = locate("o/sees:q4_k_m", mmproj=False)
    assert (alone.name, server.downloads()) == (files[0], [files[0]])
    steps: list[tuple[int, int]] = []
    assert locate("o/sees", progress=lambda *step: steps.append(step)) == alone
    assert steps[-1] == (len(files[0]) + len(files[2]),) * 2
    assert names(alone.parent) == {files[0], files[2]}
    assert Hub().fetch("o/sees:mmproj-m-bf16").name == files[1]
    assert locate("o/sees", Hub(offline=True)) == alone


@pytest.mark.usefixtures("server")
def test_a_split_gguf_file() -> None:
    found = Hub().fetch("o/ggufs:F16")
    assert found.name == "big-F16-00001-of-00002.gguf"
    assert names(found.parent) == {name for name in GGUFS if "F16" in name}
    (found.parent / "big-F16-00002-of-00002.gguf").unlink()
    with pytest.raises(ModelNotFound, match="not wholly"):
        Hub(offline=True).fetch("o/ggufs:F16")


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("file", ["", ":q5", ":m-", ":../m-Q8_0.gguf"])
def test_which_gguf_must_be_clear(file: str) -> None:
    with pytest.raises(ModelNotFound, match=r"o/ggufs.*m-Q4_K_M\.gguf, m-Q8_0\.gguf"):
        Hub().fetch(f"o/ggufs{file}")


@pytest.mark.usefixtures("server")
def test_revisions() -> None:
    main, other = Hub().fetch("o/folder"), Hub(revision="v2").fetch("o/folder")
    assert (main.name, other.name) == (MAIN, OTHER)
    assert Hub(revision="v2", offline=True).fetch("o/folder") == other
    assert Hub(revision=MAIN, offline=True).fetch("o/folder") == main
    with pytest.raises(ModelNotFound, match="no revision 'v3'"):
        Hub(revision="v3").fetch("o/folder")


def test_offline_makes_no_request(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFound, match=r"o/folder is not, .*--offline"):
        Hub(offline=True).fetch("o/folder")
    assert not server.requests
    folder = Hub().fetch("o/folder")
    file = Hub().fetch("o/ggufs:q4")
    server.requests.clear()
    assert Hub(offline=True).fetch("o/folder") == folder
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    importlib.reload(constants)
    assert Hub().fetch("o/ggufs:q4") == file
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="not wholly"):
        Hub().fetch("o/folder")
    assert not server.requests


@pytest.mark.usefixtures("server")
def test_without_a_connection_the_cache_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Hub().fetch("o/folder")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    importlib.reload(constants)
    assert Hub().fetch("o/folder") == folder
    with pytest.raises(ModelNotFound, match="cannot download o/ggufs:q4"):
        Hub().fetch("o/ggufs:q4")


def test_gated_and_missing(server: Server) -> None:
    server.repositories["o/gated"] = Repository(FOLDER, gated=True)
    for source in ("none", "literal:wrong"):
        with pytest.raises(ModelNotFound, match=r"gated.*--token-source"):
            Hub(token_source=source).fetch("o/gated")
    assert {given for *_, given in server.requests} == {None, "wrong"}
    assert names(Hub(token_source=f"literal:{TOKEN}").fetch("o/gated")) == NEEDED
    with pytest.raises(ModelNotFound, match="no model o/none"):
        Hub().fetch("o/none")


def test_an_interrupted_download_goes_on(server: Server) -> None:
    server.fail_after = 300
    with pytest.raises(ModelNotFound, match="cannot download o/folder"):
        Hub().fetch("o/folder")
    with pytest.raises(ModelNotFound, match="not wholly"):
        Hub(offline=True).fetch("o/folder")
    server.fail_after = None
    assert names(Hub().fetch("o/folder")) == NEEDED


def test_ctrl_c_ends_a_download_at_once(server: Server) -> None:
    first, over = threading.Lock(), threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def held() -> None:
        if not first.acquire(blocking=False):  # files come side by side, and are tried again
            return
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        over.wait(5)
        over.set()

    server.held = held
    try:
        with pytest.raises(KeyboardInterrupt):
            Hub().fetch("o/folder")
    finally:
        signal.signal(signal.SIGINT, before)
    assert first.locked()
    assert not over.is_set()
    over.set()


@pytest.mark.usefixtures("server")
def test_what_nothing_goes_on_with_is_removed() -> None:
    blobs = Hub().fetch("o/folder").parents[1] / "blobs"
    old = [blobs / name for name in ("a.incomplete", "a.12345678.incomplete")]
    for file in (*old, new := blobs / "b.12345678.incomplete"):
        file.write_bytes(b"1")
    for file in old:
        os.utime(file, (0, 0))
    Hub().fetch("o/folder")
    assert [file.exists() for file in (*old, new)] == [True, False, True]


def test_names_in_the_listing_never_lead_out(server: Server, tmp_path: Path) -> None:
    listed = [
        *("config.json", "../escape.safetensors", "/etc/x.gguf", "../../m.gguf", "a/../../b.gguf"),
        *("additional_chat_templates/../../x.jinja", "model.safetensors", "..\\x.gguf"),
    ]
    files = {"config.json": b"{}", "model.safetensors": b"s"}
    server.repositories["o/evil"] = Repository(files, listed=listed)
    assert names(Hub().fetch("o/evil")) == {"config.json", "model.safetensors"}
    for wanted in ("m.gguf", "x.gguf", "../../m.gguf"):
        with pytest.raises(ModelNotFound, match="0 GGUF"):
            Hub().fetch(f"o/evil:{wanted}")
    with pytest.raises(ModelNotFound, match="no commit"):
        Hub(revision="odd").fetch("o/evil")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


@pytest.mark.parametrize(
    "id",
    ["../x", "o/..", "o/../x", "/etc/passwd", "o", "o/n/m", "o/n\0", "o/n\n", "o/n%2f", "o\\n",
     ".o/n", "o/n--m", "", "o/" + "n" * 97, "http://x/y"],
)  # fmt: skip
def test_other_ids_are_refused(id: str, server: Server) -> None:
    with pytest.raises(InvalidRequest, match=r"is no model id; it must be owner/name"):
        Hub().fetch(id)
    assert not server.requests


@pytest.mark.parametrize("revision", ["../main", "", "a b", "/x", "-x", "x/../y", "x\n"])
def test_other_revisions_are_refused(revision: str) -> None:
    with pytest.raises(InvalidRequest, match="is no revision"):
        Hub(revision=revision)


def test_token_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "usual")
    monkeypatch.setenv("MINE", "mine")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    importlib.reload(constants)
    (tmp_path / "token").write_text("cached\n")
    expected = {
        "literal:a:b": "a:b", "env:MINE": "mine", "env:": "usual", "env:ABSENT": None,
        f"path:{tmp_path / 'token'}": "cached", "path:absent": None, "cache": "usual",
        "none": None,
    }  # fmt: skip
    assert {source: hub.token(source) for source in expected} == expected
    monkeypatch.setenv("HF_TOKEN", "theirs")
    assert hub.token("cache") == "theirs"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN")
    assert hub.token("cache") == "cached"
    for wrong in ("", "literal", "env", "path", "cache:", "None", "keyring"):
        with pytest.raises(InvalidRequest, match="literal:TOKEN, env:VARIABLE"):
            Hub(token_source=wrong)


def test_a_token_in_the_environment_opens_a_gated_model(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repositories["o/gated"] = Repository(FOLDER, gated=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert names(Hub().fetch("o/gated")) == NEEDED
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ModelNotFound, match="HF_TOKEN"):
        Hub().fetch("o/gated")


def test_a_refusal_that_says_no_more_speaks_of_tokens(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Handler, "list", lambda self, *_: self.send(401, b'{"error": "Invalid credentials"}', {})
    )
    with pytest.raises(ModelNotFound, match="HF_TOKEN"):
        Hub().fetch("o/folder")
    assert not server.downloads()


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("o/folder", {"config": {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}}),
        ("o/folder", {"config": {"model_type": "mamba"}}),
        ("o/ggufs:q8", {"gguf": {"architecture": "mamba", "total": 2}}),
    ],
)
def test_an_unknown_architecture_is_refused_before_the_download(
    name: str, known: dict[str, Any], server: Server
) -> None:
    repository = server.repositories[name.partition(":")[0]]
    repository.known = known
    with pytest.raises(SquallError, match=r"(?i)mamba"):
        locate(name, judge=recipes.judge)
    assert not server.downloads()
    repository.known = {"config": {"model_type": "llama"}, "gguf": {"architecture": "llama"}}
    locate(name, judge=recipes.judge)
    assert server.downloads()


@pytest.mark.parametrize(
    ("variable", "place"),
    [("HF_HUB_CACHE", "hf/hub"), ("HUGGINGFACE_HUB_CACHE", "hf/hub"), ("HF_HOME", "hf"),
     ("XDG_CACHE_HOME", "."), ("HF_HUB_CACHE", "$HERE/hf/hub")],
)  # fmt: skip
def test_where_the_cache_may_be(
    variable: str, place: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Hub().fetch("o/folder")
    if variable == "XDG_CACHE_HOME":
        (tmp_path / "hf").rename(tmp_path / "huggingface")
        folder = tmp_path / "huggingface" / folder.relative_to(tmp_path / "hf")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.setenv(variable, place if "$" in place else str(tmp_path / place))
    importlib.reload(constants)
    server.requests.clear()
    assert Hub(offline=True).fetch("o/folder") == folder
    assert not server.requests
