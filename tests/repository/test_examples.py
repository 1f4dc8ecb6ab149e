"""Every example runs with a small model, or a server of it, and prints an answer."""

from __future__ import annotations

import io
import json
import runpy
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from functools import cached_property
from pathlib import Path

import pytest
from painter import Painter
from pictures import draw
from project import ROOT
from tiny_models import write_adapter, write_bert, write_folder, write_xlora
from tiny_seers import write_seer

from squall import Embedder, ImageModel, Model
from squall.embedded import find
from squall.server.options import ServerOptions
from squall.server.run import listen, make_server

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
WAIT_S = 30.0
EXAMPLES = ROOT / "examples"
TESTED_ELSEWHERE = {"server/ray_serve"}  # tests/server/test_ray.py
# An example -> what it is given, by names of `Made`, and what it prints.
CASES = {
    "python/adapters": ("base law", "['law']: "),
    "python/anymoe": ("base gates law", "gates"),
    "python/chat": ("", "Paris"),
    "python/completion": ("", "1: '"),
    "python/devices": ("base", ""),
    "python/embeddings": ("embedder", "[["),
    "python/flux": ("painter prompt", "/images/image-generation-"),
    "python/gguf": ("gguf_folder gguf", ""),
    "python/grammars": ("", "lark: "),
    "python/images": ("seer prompt image", "tokens asked)"),
    "python/isq": ("base", "q8_0"),
    "python/json_answer": ("", "Paris"),
    "python/kv_cache": ("", "128 blocks of 32 tokens"),
    "python/log_probabilities": ("", "' sky'"),
    "python/logits_processor": ("", ""),
    "python/lora": ("base adapters ordering", "['law']: "),
    "python/many_at_once": ("", "whale: "),
    "python/pictures": ("painter prompt", "picture.png of seed 1"),
    "python/speculative": ("base base", ""),
    "python/streaming": ("", "sea"),
    "python/token_source": ("base", ""),
    "python/tool_call": ("", "temperature {"),
    "python/tools": ("", "21 degrees in Paris"),
    "python/topology": ("base", "q8_0"),
    "python/uqff": ("base uqff", ""),
    "python/vision": ("seer arch image", ""),
    "python/xlora": ("base xlora", ""),
    "server/adapters": ("served_adapters", "law: "),
    "server/chat": ("served", "Paris"),
    "server/completion": ("served", "'"),
    "server/embeddings": ("served_embedder", "1 64 ["),
    "server/grammars": ("served", "choice: "),
    "server/llama_index": ("served", "Paris"),
    "server/messages": ("served_root", ""),
    "server/pictures": ("prompt served_pictures", "picture.png"),
    "server/response_format": ("served", "name='"),
    "server/responses": ("served", "Paris"),
    "server/streaming": ("served", "sea"),
    "server/tool_calling": ("served", "temperature: "),
    "server/vision": ("image served_seer", ""),
}


class Made:
    """What examples are given, made when one asks for it."""

    arch, prompt, gates, uqff = "LLaVA", "a cat", "gates", "small.uqff"

    def __init__(self, root: Path, running: ExitStack) -> None:
        self.root, self.running = root, running

    @cached_property
    def base(self) -> Path:
        return write_folder(self.root / "base")

    @cached_property
    def adapters(self) -> Path:
        return self.law.parent

    @cached_property
    def law(self) -> Path:
        return write_adapter(self.root / "adapters/law", self.base)

    @cached_property
    def ordering(self) -> Path:
        path = self.root / "ordering.json"
        loaded = [{"name": "law", "adapter_model_id": str(self.adapters)}]
        path.write_text(json.dumps({"order": [], "preload_adapters": loaded}))
        return path

    @cached_property
    def xlora(self) -> Path:
        write_xlora(self.root / "xlora", self.base, ["one", "two"], "base")
        return self.root / "xlora"

    @cached_property
    def seer(self) -> Path:
        return write_seer(self.root / "llava")

    @cached_property
    def embedder(self) -> Path:
        return write_bert(self.root / "bert")

    @cached_property
    def image(self) -> Path:
        path = self.root / "cat.png"
        draw("text", 60, 40).save(path)
        return path

    @cached_property
    def painter(self) -> Path:
        from tiny_flux import pipeline  # slow to import

        pipeline(self.root / "flux")
        return self.root / "flux"

    gguf_folder = property(lambda _: find().parent)
    gguf = property(lambda _: find().name)
    served = property(lambda self: f"{self.served_root}/v1")

    @cached_property
    def served_root(self) -> str:
        return self._serve(Model.open(context=1024))

    @cached_property
    def served_seer(self) -> str:
        return f"{self._serve(Model.open(self.seer))}/v1"

    @cached_property
    def served_embedder(self) -> str:
        return f"{self._serve(Embedder.open(self.embedder))}/v1"

    @cached_property
    def served_adapters(self) -> str:
        return f"{self._serve(Model.open(self.base, adapters={'law': self.law}))}/v1"

    @cached_property
    def served_pictures(self) -> str:
        return f"{self._serve(ImageModel(Painter(), path=Path('flux')))}/v1"

    def _serve(self, model: Model | ImageModel | Embedder) -> str:
        self.running.enter_context(model)
        return self.running.enter_context(serving(model))


@contextmanager
def serving(model: Model | ImageModel | Embedder) -> Iterator[str]:
    """A server's address."""
    started = threading.Event()
    with redirect_stderr(io.StringIO()):  # the log, which outlives a test's own stream
        server = make_server({"small": model}, ServerOptions(), started.set)
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert started.wait(WAIT_S)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(WAIT_S)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    with ExitStack() as running:
        yield Made(tmp_path_factory.mktemp("made"), running)


@pytest.mark.slow("some import torch, or large clients")
@pytest.mark.parametrize("name", CASES)
def test_example_runs(
    name: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words, expected = CASES[name]
    given = [str(getattr(made, word)) for word in words.split()]
    path = str(EXAMPLES / f"{name}.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [path, *given])
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is the capital of France?\n\n"))
    for _ in range(2 if {"gates", "uqff"} & {*words.split()} else 1):
        runpy.run_path(path, run_name="__main__")
    out = capsys.readouterr().out
    assert expected in out or (tmp_path / expected).exists()
    assert out.strip()
    if name == "python/logits_processor":
        assert "e" not in out


def test_every_example_is_listed() -> None:
    found = {
        path.relative_to(EXAMPLES).with_suffix("").as_posix() for path in EXAMPLES.rglob("*.py")
    }
    assert found == set(CASES) | TESTED_ELSEWHERE
    page = (EXAMPLES / "README.md").read_text()
    assert {name for name in found if f"({name}.py)" not in page} == set()


@pytest.mark.slow("a kernel of Jupyter starts")
def test_the_cookbook_runs(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "cookbook.ipynb", as_version=4)
    nbformat.validate(notebook)
    folder = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=60, kernel_name="python3", resources=folder).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    said = ["".join(out.get("text", "") for out in cell.outputs) for cell in cells]
    assert "Paris" in said[0]
    assert any("21 degrees in " in text for text in said)
    assert "q8_0" in said[-2]
