"""`squall bench`: the form of its reports; the numbers are the machine's."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
from command import squall
from tiny_models import write_folder
from typer.testing import CliRunner

from squall.cli.app import app
from squall.errors import InvalidRequest

SMALL = ("-p", "24", "-g", "4", "-r", "2", "--threads", "1")


def test_json() -> None:
    done = squall("bench", *SMALL, "--json")
    report = json.loads(done.stdout)
    assert [result["test"] for result in report["results"]] == ["pp24", "tg4"]
    assert all(len(result["tokens_per_second"]) == 2 for result in report["results"])
    assert all(rate > 0 for result in report["results"] for rate in result["tokens_per_second"])
    assert report["threads"] == 1


def test_table() -> None:
    out = squall("bench", *SMALL).stdout
    assert "pp24" in out
    assert "±" in out


def test_one_of_both() -> None:
    report = json.loads(squall("bench", "-p", "0", "-g", "2", "-r", "1", "--json").stdout)
    assert [result["test"] for result in report["results"]] == ["tg2"]
    assert squall("bench", "-p", "0", "-g", "0").returncode == 1


def test_depth_and_batch() -> None:
    report = json.loads(squall("bench", *SMALL, "-d", "40", "-b", "3", "--json").stdout)
    assert [result["test"] for result in report["results"]] == ["pp24@d40@b3", "tg4@d40@b3"]


def test_profile() -> None:
    report = json.loads(squall("bench", *SMALL, "--profile", "--json").stdout)
    assert [(found["test"], found["steps"]) for found in report["profiles"]] == [
        ("pp24", 1),
        ("tg4", 4),
    ]
    limits = report["roofline"]
    for phase in (phase for found in report["profiles"] for phase in found["phases"]):
        products_s = phase["dots"] / limits["dots"] + phase["fmas"] / limits["fmas"]
        assert phase["limit_s"] == max(phase["bytes"] / limits["bytes"], products_s)
    out = squall("bench", *SMALL, "--profile").stdout
    assert "of limit" in out
    assert "gated linear" in out


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_folder_quantized_on_the_way_in(tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path))
    sizes = {}
    for isq in ((), ("--isq", "Q8_0"), ("--isq", "Q4_0")):
        done = CliRunner().invoke(app, ["bench", *SMALL, "--json", "plain", "-m", folder, *isq])
        assert done.exit_code == 0, (done.output, done.exception)
        sizes[isq[-1:]] = json.loads(done.stdout)["weight_bytes"]
    assert sizes["Q4_0",] < sizes["Q8_0",] < sizes[()]
    requests = ["bench", *SMALL, "-c", "1", "--json", "plain", "-m", folder, "--isq", "Q4_0"]
    assert json.loads(CliRunner().invoke(app, requests).stdout)["results"][0]["errors"] == 0


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        found = CliRunner().invoke(app, ["bench", "--url", url])
    assert isinstance(found.exception, InvalidRequest)  # which the command shows as its last word
    message = r"first request failed: ConnectError: .*; is the server there"
    assert re.search(message, str(found.exception))


def test_a_draft_tells_how_often_it_is_right(tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path))
    for draft in ("ngram", folder):
        options = ["bench", "-m", folder, "-p", "24", "-g", "40", "-r", "1", "--draft", draft]
        done = CliRunner().invoke(app, [*options, "--json"])
        assert done.exit_code == 0, (done.output, done.exception)
        (report,) = json.loads(done.stdout)["results"]
        assert report["answer_tokens"] == 40
        assert 0 <= report["accepted_tokens"] <= report["guessed_tokens"]
    out = CliRunner().invoke(app, ["bench", *SMALL[:-2], "-g", "90", "--draft", "ngram"]).stdout
    assert re.search(r"guesses right: \d+ of [1-9]", out)
