"""docs/serving.md: its benchmarks and its code run, and its numbers are those of the code."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from servers import Process

from squall import Model
from squall.engine.memory import USUAL_TOKENS
from squall.server import run
from squall.server.app import create_app
from squall.server.limits import MOST_VALUES
from squall.server.options import ServerOptions

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
LINES = [line for b in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in b.splitlines()]
BENCHES = [line for line in LINES if line.startswith("squall bench")]


@pytest.mark.parametrize("line", BENCHES)
def test_benches_run(server: Process, line: str) -> None:
    line = line.replace("http://127.0.0.1:8080", server.url)
    command = [sys.executable, "-m", *shlex.split(line), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)["results"]
    assert [result["concurrency"] for result in results] == [1, 4]
    for result in results:
        assert (result["requests"], result["errors"]) == (2 * result["concurrency"], 0)
        assert result["answer_tokens"] == 16 * result["requests"]
        assert 0 < result["first_s"]["p50"] <= result["first_s"]["p99"]
        assert result["gap_s"]["p50"] > 0


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
def test_python_runs(block: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[object] = []
    monkeypatch.setattr(Model, "open", lambda *_: model)
    monkeypatch.setattr(run, "serve_on", lambda models, *_: served.append(create_app(models)))
    monkeypatch.setattr(run, "listen", lambda *_: None)
    exec(block, {})
    assert len(served) == 1


def test_numbers() -> None:
    options = ServerOptions()
    assert f"over {options.body_bytes >> 20} MiB" in TEXT
    assert MOST_VALUES == 10**6
    assert f"room for {USUAL_TOKENS} tokens" in TEXT
    assert f"over {options.all_bodies_bytes >> 20} MiB together" in TEXT
    media = options.media
    assert f"| images of a request | {media.images} |" in TEXT
    assert f"| a file | {media.file_bytes >> 20} MiB |" in TEXT
    assert f"| an image | {media.pixels:,} pixels" in TEXT
    assert f"{media.edge:,} of an edge" in TEXT
    assert f"| reading all images of a request | {media.seconds:g} s |" in TEXT
    assert media.redirects == 3
    assert f"header slower than {options.header_s:g} s" in TEXT
    assert f"body slower than {options.body_s:g} s" in TEXT
    assert f"nothing for {options.write_s:g} s" in TEXT
    assert f"`--drain-timeout` seconds ({options.drain_s:g})" in TEXT
    assert f"Kept are {options.kept_responses} responses and {options.kept_bytes >> 20} MiB" in TEXT
    assert f"`--stall-timeout` seconds ({options.stall_s:g})" in TEXT
