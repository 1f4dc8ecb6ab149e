"""`bench/peers.py`: its arithmetic on made-up rounds, and a real one where llama.cpp is built."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
PEERS = Path(os.environ.get("PEERS_HOME") or Path.home() / ".cache/squall-peers")


@pytest.fixture(scope="module")
def peers() -> Any:
    spec = importlib.util.spec_from_file_location("peers", BENCH / "peers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["peers"] = module
    spec.loader.exec_module(module)
    return module


def result(rate: float, load_s: float) -> dict[str, Any]:
    memory = {"RssAnon": 2**20, "RssFile": 2**20}
    rates = [[10 * rate, rate], [5 * rate, rate / 2]]
    return {"rates": rates, "load_s": load_s, "memory": memory, "bandwidth": 1000.0}


def test_summary(peers: Any, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(bytes(10))
    job = {"model": str(tmp_path / "model.gguf"), "plans": [[512, 128, 1], [32, 16, 4]]}
    theirs = result(10.0, 4.0)
    rounds = [(result(20.0, 2.0), theirs), (result(90.0, 1.0), theirs), (result(30.0, 8.0), theirs)]
    lines = {line["name"]: line for line in peers.summary(job, rounds)}
    assert list(lines) == [
        "pp512", "tg128 after 512", "pp32 x4", "tg16 after 32 x4", "load s", "RssAnon MiB",
        "Rss MiB",
    ]  # fmt: skip
    answer = lines["tg128 after 512"]
    assert (answer["squall"], answer["llama.cpp"], answer["ratio"]) == (30.0, 10.0, 3.0)
    assert answer["ratios"] == [2.0, 9.0, 3.0]
    # 30 tokens a second read 300 of the 1000 bytes a second that can be read.
    assert answer["of_bound"] == pytest.approx(0.3)
    assert "of_bound" not in lines["tg16 after 32 x4"]
    assert lines["load s"]["ratios"] == [2.0, 4.0, 0.5]
    assert lines["Rss MiB"]["squall"] == 2.0


def test_workers_agree_on_their_results() -> None:
    """What both print has the same form; the rates are the machine's."""
    python = PEERS / "llama-cpp/bin/python"
    if not python.exists():
        pytest.skip("llama.cpp is not built here; bench/peers.py builds it")
    command = [sys.executable, str(BENCH / "peers.py"), "--rounds", "1", "--json"]
    sizes = ["-p", "32", "-g", "2", "-d", "40", "-b", "2", "--threads", "1"]
    done = subprocess.run(command + sizes, capture_output=True, text=True, check=True)
    (report,) = json.loads(done.stdout)
    ((ours, theirs),) = report["rounds"]
    assert ours.keys() - theirs.keys() == {"bandwidth"}
    assert not theirs.keys() - ours.keys()
    for side in (ours, theirs):
        assert [len(rates) for rates in side["rates"]] == [2, 2, 2]
        assert all(rate > 0 for rates in side["rates"] for rate in rates)
        assert side["memory"]["RssAnon"] > 2**20
    assert [line["name"] for line in report["rows"]][:4] == [
        "pp32", "tg2 after 32", "pp40", "tg2 after 40",
    ]  # fmt: skip
