"""What headers tell of a model is what is told of it when it is open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
from servers import serving
from tiny_models import write_bert, write_folder
from tiny_seers import write_seer

from squall import Embedder, Model
from squall.about import About, of_headers, of_model
from squall.opening import Opening
from squall.server.residence import Lazy

THINKS = (
    "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}<think>{% endif %}"
)


def told(about: About) -> list[Any]:
    sizes = dict(about.sizes)
    return [about.capabilities, about.path, about.template, sizes]


def test_of_text(tmp_path: Path) -> None:
    path = write_folder(tmp_path)
    with Model.open(path, context=512) as model:
        found = of_headers("text", Opening(path, context=512))
        assert told(found) == told(of_model("text", model))
    assert found.capabilities == ("completion", "tools")
    assert found.sizes["context_length"] == 512
    thinking = of_headers("text", Opening(path, chat_template=THINKS))
    assert thinking.capabilities == ("completion", "tools", "thinking")


def test_of_what_sees(tmp_path: Path) -> None:
    path = write_seer(tmp_path)
    found = of_headers("text", Opening(path))
    assert "vision" in found.capabilities
    assert "vision" not in of_headers("text", Opening(write_folder(tmp_path / "b"))).capabilities
    with Model.open(path) as model:
        assert told(found) == told(of_model("text", model))


def test_of_vectors(tmp_path: Path) -> None:
    write_bert(tmp_path)
    with Embedder.open(tmp_path) as embedder:
        found = of_headers("embeddings", Opening(tmp_path))
        assert told(found) == told(of_model("embeddings", embedder))
    assert found.capabilities == ("embedding",)


def test_what_cannot_be_read_breaks_no_list(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    models = {
        "broken": Lazy("text", Opening(broken)),
        "gone": Lazy("embeddings", Opening(tmp_path / "x")),
        "absent": Lazy("text", Opening("owner/model")),  # which is not fetched for it
    }  # fmt: skip
    with serving(models) as running:
        cards = httpx.get(f"{running.url}/v1/models").json()["data"]
        assert [card["capabilities"] for card in cards] == [["completion"]] * 2 + [["embedding"]]
        assert len(httpx.get(f"{running.url}/api/tags").json()["models"]) == 3
        card = httpx.get(f"{running.url}/v1/models/gone").json()
        assert (card["state"], card["capabilities"]) == ("unloaded", ["embedding"])
