"""Several models of one command, or of a file."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from random_models import write_random
from servers import chat, in_process

from squall import InvalidRequest, SquallError
from squall.cli.serve import ServeFlags, app
from squall.cli.several import Entry, lazies, read
from squall.engine.engine import EngineConfig
from squall.opening import Opening

FILE = """
keep_alive = "10m"
[[model]]
path = "{a}"
name = "chat"
pinned = true
context = 512
max_seqs = 4
adapters = {{ french = "somewhere" }}
[[model]]
path = "{b}"
kind = "vision"
keep_alive = -1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("a", "b")):
        write_random(found / f"{name}.gguf", seed)
    return found


def written(folder: Path, text: str) -> Path:
    path = folder / "models.toml"
    path.write_text(text.format(a=folder / "a.gguf", b=folder / "b.gguf"))
    return path


def test_a_file(folder: Path) -> None:
    models = lazies(ServeFlags(max_seqs=2), read(written(folder, FILE)))
    chatting, seeing = models["chat"], models["b"]
    assert (chatting.kind, chatting.pinned, chatting.keep_alive_s) == ("text", True, 600)
    assert (seeing.kind, seeing.pinned, seeing.keep_alive_s) == ("text", False, None)
    first, second = chatting.open, seeing.open
    assert isinstance(first, Opening)
    assert isinstance(second, Opening)
    assert (first.context, second.context) == (512, None)
    assert first.adapters == {"french": "somewhere"}
    assert [o.engine and o.engine.max_seqs for o in (first, second)] == [4, 2]
    assert isinstance(first.engine, EngineConfig)


def test_words(folder: Path) -> None:
    models = lazies(ServeFlags(preload=True), [Entry(str(folder / f"{n}.gguf")) for n in "ab"])
    assert [(name, m.pinned, m.preload, m.keep_alive_s) for name, m in models.items()] == [
        ("a", False, True, 300),
        ("b", False, True, 300),
    ]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[[model]]\nname = 'x'", "lacks path"),
        ("[[model]]\npath = '{a}'\ncontxt = 5", "has contxt; known: .*context"),
        ("[[model]]\npath = '{a}'\nxlora = 5", "has xlora; known"),
        ("[[model]]\npath = 5", "path of .* is 5; it must be a text"),
        ("[[model]]\npath = '{a}'\npinned = 1", "pinned of .* must be true or false"),
        ("[[model]]\npath = '{a}'\nkind = 'audio'", "known: text, vision, pictures, embeddings"),
        ("[[model]]\npath = '{a}'\nkeep_alive = 'soon'", "'soon' is no time"),
        ("[[model]]\npath = '{a}'\ncontext = 'long'", "context is 'long'"),
        ("[[model]]\npath = '{a}'\nmax_seqs = 0", "max_seqs"),
        ("[[model]]\npath = '{a}'\nkv_memory = '1G'", "kv_memory of .* must be a whole number"),
        ("[[model]]\npath = '{a}'\nimage_memory = true", "image_memory of .* whole number"),
        ("[[model]]\npath = '{a}'\nadapter = 5", "adapter of .* must be a list of texts"),
        ("[[model]]\npath = '{a}'\nadapter = [5]", "adapter of .* must be a list of texts"),
        ("[[model]]\npath = '{a}'\nrevision = 5", "revision of .* must be a text"),
        ("[[model]]\npath = '{a}'\nthreads = -1", "threads is -1"),
        ("[[model]]\npath = '{a}'\nt5 = 'x'", "t5 is for models that make pictures"),
        ("[[model]]\npath = 'none.gguf'", "'none.gguf' does not exist"),
        ("[[model]]\npath = '{a}'\n[[model]]\npath = '{a}'", "two models are called 'a'"),
        ("model = 3", r"each model is a table \[\[model\]\]"),
        ("models = 3", "has models; known: keep_alive, model"),
        ("model = [1]", "must be a table"),
        ("= 3", "is not TOML"),
    ],
)
def test_what_is_wrong_is_told(folder: Path, text: str, wrong: str) -> None:
    with pytest.raises(SquallError, match=wrong):
        lazies(ServeFlags(), read(written(folder, text)))


def test_a_broken_model_is_told_at_the_start(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes((folder / "a.gguf").read_bytes()[:1000])
    with pytest.raises(SquallError, match=r"broken\.gguf"):
        lazies(ServeFlags(), [Entry(str(folder / "a.gguf")), Entry(str(broken))])


def test_the_command(folder: Path, tmp_path: Path) -> None:
    models = [str(folder / f"{name}.gguf") for name in "ab"]
    with in_process(tmp_path / "stderr", *models, "--keep-alive", "0") as server:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            for name in "ab":
                body = chat(model=name, max_tokens=3, ignore_eos=True)
                found = http.post("/v1/chat/completions", json=body).json()
                assert (found["model"], found["usage"]["completion_tokens"]) == (name, 3)
            states = {m["id"]: m["state"] for m in http.get("/v1/models").json()["data"]}
            assert states["a"] == "unloaded"
        assert "b at http" in server.stderr()
        assert server.stop() == 0
    assert "leaked" not in (tmp_path / "stderr").read_text()


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        (("{a}", "{b}", "-i"), "-i is for one model"),
        (("{a}", "{b}", "--served-model-name", "x"), "--served-model-name is for one model"),
        (("{a}", "{b}", "-f", "{a}"), "give one of them"),
        (("{a}", "--models", "{a}"), "--models names the models"),
        (("{a}", "none.gguf"), "'none.gguf' does not exist"),
        (("{a}", "{a}"), "two models are called 'a'"),
        (("{a}", "{b}", "--keep-alive", "soon"), "is no time"),
    ],
)
def test_what_goes_not_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], wrong: str
) -> None:
    given = [flag.format(a=folder / "a.gguf", b=folder / "b.gguf") for flag in flags]
    monkeypatch.setattr("squall.cli.serve.signal.signal", lambda *_: None)
    with pytest.raises(SquallError, match=wrong):
        app(["--port", "0", *given], standalone_mode=False)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(InvalidRequest, match="cannot read"):
        read(Path("/nowhere/models.toml"))
