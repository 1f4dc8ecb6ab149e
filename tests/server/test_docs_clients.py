"""docs/clients.md: what it has of each library runs."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted import scripted
from servers import in_thread

from squall import Model

TEXT = (Path(__file__).parents[2] / "docs" / "clients.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
SCRIPT = {"Which city": '{"name": "Paris", "people": 2}', "sky": "Air scatters blue light most."}
SLOW = pytest.mark.slow("the library takes seconds to import")


@pytest.fixture(scope="module")
def url(model: Model) -> Iterator[str]:
    with scripted(model, SCRIPT), in_thread(model) as running:
        yield running.url


def given() -> Iterator[object]:
    for block in BLOCKS:
        name = block.split()[1]
        yield pytest.param(block, marks=[SLOW] if name == "litellm" else [], id=name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("block", [*given()])
def test_libraries(
    url: str, block: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    exec(block.replace("http://127.0.0.1:8080", url), {"__name__": "example"})
    assert capsys.readouterr().out.strip() in ("Paris", "Air scatters blue light most.")
    gc.collect()  # connections that libraries leave open, while that is ignored
