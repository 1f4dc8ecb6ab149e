"""Every example runs and prints an answer; so does what pages of docs/ show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pictures import draw
from project import ROOT
from tiny_models import write_adapter, write_folder
from tiny_seers import write_seer

from squall.embedded import find

PAGES = {
    name: "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL))
    for name in (
        "docs/python-api.md",
        "docs/structured-output.md",
        "docs/vision.md",
        "docs/diffusion.md",
    )
}
EXPECTED = {
    "adapters": "['law']: ",
    "chat": "Paris",
    "gguf": "",
    "image_runner": "/images/image-generation-",
    "images": "tokens asked)",
    "json_answer": "Paris",
    "log_probabilities": "' sky'",
    "logits_processor": "",
    "many_at_once": "whale: ",
    "pictures": "picture.png of seed 1",
    "streaming": "sea",
    "tools": "21 degrees in Paris",
}
TESTED_ELSEWHERE = {"ray_serve"}  # tests/server/test_ray.py
ARGUMENTS = {"gguf": [str(find().parent), find().name]}


def run(*command: str, folder: Path | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", *command],
        capture_output=True, text=True, timeout=120, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny model, and an adapter for it."""
    root = tmp_path_factory.mktemp("adapted")
    base = write_folder(root / "base")
    return [str(base), str(write_adapter(root / "law", base))]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny model that sees, what to ask it, and an image."""
    root = tmp_path_factory.mktemp("shown")
    draw("text", 60, 40).save(root / "cat.png")
    return [str(write_seer(root / "llava")), "What is this?", str(root / "cat.png")]


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that makes pictures, by its name on the hub."""
    from tiny_flux import pipeline  # slow to import

    folder = tmp_path_factory.mktemp("painter") / "black-forest-labs/FLUX.1-schnell"
    pipeline(folder)
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "path",
    [e for e in sorted((ROOT / "examples").glob("*.py")) if e.stem not in TESTED_ELSEWHERE],
    ids=lambda p: p.stem,
)
def test_example_runs(
    path: Path, adapted: list[str], shown: list[str], painter: Path, tmp_path: Path
) -> None:
    cat = [str(painter), "a cat"]
    given = {"adapters": adapted, "images": shown, "pictures": cat, "image_runner": cat} | ARGUMENTS
    out = run(str(path), *given.get(path.stem, []), folder=tmp_path)
    assert EXPECTED[path.stem] in out
    assert out.strip()
    if path.stem == "logits_processor":
        assert "e" not in out


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "vision" not in page and "diffusion" not in page]
)
def test_page_runs(page: str) -> None:
    assert "Paris" in run("-c", PAGES[page])


def test_the_page_of_vision_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiny models in place of the hub's, and a file in place of the web's."""
    write_seer(tmp_path / "llava-hf/llava-1.5-7b-hf")
    write_seer(tmp_path / "microsoft/Phi-3.5-vision-instruct", "phi3v")
    draw("text", 60, 40).save(tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    text = PAGES["docs/vision.md"].replace("https://example.org/", "")
    assert run("-c", text).strip()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_page_of_pictures_runs(painter: Path) -> None:
    folder = painter.parents[1]
    assert run("-c", PAGES["docs/diffusion.md"], folder=folder).startswith("7 4 (512, 512, 3)")
    assert (folder / "lighthouse.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_shown_passes_a_type_checker(tmp_path: Path) -> None:
    """The examples, the README's code and that of pages, by mypy's strictest rules."""
    readme = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    texts = {f"readme_{i}": text for i, text in enumerate(readme)}
    texts |= {f"page_{i}": text for i, text in enumerate(PAGES.values())}
    texts |= {path.stem: path.read_text() for path in (ROOT / "examples").glob("*.py")}
    for name, text in texts.items():
        (tmp_path / f"shown_{name}.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", *tmp_path.glob("*.py")],
        capture_output=True, text=True, env=os.environ | {"MYPYPATH": str(ROOT / "src")},
        cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
