"""The web page at /ui: what is served, to whom, and with which headers."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
from servers import Process, Running, in_thread

from squall import Model
from squall.server.page import INDEX, PATH, POLICY, read_files

FILES = read_files()
OTHERS = sorted(FILES.keys() - {INDEX})


@pytest.fixture(scope="module")
def running(model: Model) -> Iterator[Running]:
    with in_thread(model, api_keys=("key",)) as found:
        yield found


@pytest.fixture
def http(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=30) as found:
        yield found


@pytest.mark.parametrize("path", [PATH, *(f"{PATH}/{name}" for name in OTHERS)])
def test_files_are_open_and_safe(http: httpx.Client, path: str) -> None:
    """Also where a key is asked for, which is for the page to give."""
    response = http.get(path)
    assert response.status_code == 200
    assert response.content == FILES[path.removeprefix(PATH).strip("/") or INDEX].data
    assert response.headers["content-security-policy"] == POLICY
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["content-type"].split(";")[0] in {
        "text/html", "text/css", "text/javascript", "image/svg+xml",
    }  # fmt: skip


def test_the_policy_allows_nothing_from_elsewhere() -> None:
    assert POLICY.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
    assert {"form-action 'none'", "frame-ancestors 'none'"} < set(POLICY.split("; "))
    assert not re.search(r"unsafe|https?:|\*", POLICY)


def test_what_a_browser_has_is_not_sent_again(http: httpx.Client) -> None:
    etag = http.get(PATH).headers["etag"]
    for known in (etag, f'"other", W/{etag}'):
        response = http.get(PATH, headers={"If-None-Match": known})
        assert (response.status_code, response.content) == (304, b"")
        assert response.headers["etag"] == etag
    assert http.get(PATH, headers={"If-None-Match": '"other"'}).status_code == 200
    assert http.head(PATH).headers["etag"] == etag


def test_relative_links_work_behind_a_slash(http: httpx.Client) -> None:
    response = http.get(f"{PATH}/")
    assert (response.status_code, response.headers["location"]) == (307, "../ui")
    assert http.get(f"{PATH}/", follow_redirects=True).text.startswith("<!doctype html>")


@pytest.mark.parametrize(
    "name", ["nothing.js", INDEX, "..%2fpage.py", "%2e%2e%2fgate.py", "a/b", "__init__.py"]
)
def test_only_known_names_are_served(http: httpx.Client, name: str) -> None:
    assert http.get(f"{PATH}/{name}").status_code in (404, 401)


def test_the_page_is_no_way_around_the_key(http: httpx.Client) -> None:
    for path in ("/ui/../v1/models", "/ui/..%2fv1/models", "/uis", "/metrics"):
        assert http.get(path).status_code in (401, 404)


def test_no_page_where_it_is_off(model: Model) -> None:
    with in_thread(model, ui=False) as found, httpx.Client(base_url=found.url) as http:
        assert http.get(PATH).status_code == 404
        assert http.get(f"{PATH}/app.js").status_code == 404
        assert http.get("/").text == "OK"


def test_serve_tells_where_it_is(server: Process) -> None:
    assert f"a page for browsers at {server.url}/ui\n" in server.stderr()


def test_links_lead_to_files_that_there_are() -> None:
    html = FILES[INDEX].data.decode()
    linked = re.findall(r'(?:href|src)="(?!#)([^"]+)"', html)
    assert {"ui/app.js", "ui/style.css", "ui/icon.svg"} == set(linked)
    assert not re.search(r"<script(?![^>]* src=)|<style|\bstyle=|\bon[a-z]+=|https?:", html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(ids)
    scripts = "".join(FILES[name].data.decode() for name in OTHERS)
    assert {f"i-{name}" for name in re.findall(r'\bbutton\("([^"]+)"', scripts)} <= set(ids)
    assert set(re.findall(r'byId\("([^"]+)"\)', scripts)) <= {*ids, "settings-pictures"}


@pytest.mark.parametrize("name", [name for name in OTHERS if name.endswith(".js")])
def test_modules_import_each_other_and_parse_no_html(name: str) -> None:
    text = FILES[name].data.decode()
    assert set(re.findall(r'from "\./([^"]+)"', text)) <= FILES.keys()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text)
    assert not re.search(r"https?://(?![^\n]*w3\.org)[a-z]", text)
