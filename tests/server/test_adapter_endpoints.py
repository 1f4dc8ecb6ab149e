"""Adapters over HTTP: loaded, chosen, replaced and removed while others are answered."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from adapter_files import write_adapter, write_base
from prometheus_client.parser import text_string_to_metric_families
from servers import Running, chat, events, in_process, in_thread, until
from starlette.testclient import TestClient

from squall import AsyncRunner, EngineConfig, InvalidRequest, Model, Runner, UnknownAdapter
from squall.server import run
from squall.server.app import create_app
from squall.server.options import ServerOptions

CHAT, TEXT, LOAD = "/v1/chat/completions", "/v1/completions", "/v1/adapters"
FIELDS: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
NAMES = ("one", "two", "org/three")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters, and beside their folder the model and another adapter."""
    found = tmp_path_factory.mktemp("files") / "adapters"
    write_base(found.parent / "tiny")
    write_adapter(found.parent / "outside", 9)
    for seed, name in enumerate(NAMES):
        write_adapter(found / name, seed)
    return found


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Iterator[Model]:
    engine = EngineConfig(max_seqs=8, prefix_cache_n=4)
    with Model.open(folder.parent / "tiny", context=512, threads=1, engine=engine) as found:
        yield found


@pytest.fixture
def running(tiny: Model, folder: Path) -> Iterator[Running]:
    """Its server, with the adapters "one", "two" and "org/three"."""
    for name in NAMES:
        tiny.adapters.load(name, folder / name)
    with in_thread(tiny, adapter_folders=(folder,)) as found:
        yield found
    for info in tiny.adapters.list():
        tiny.adapters.remove(info.name)


@pytest.fixture
def http(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=60) as found:
        yield found


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as found:
        yield found


def alone(model: Model, adapters: Any) -> str:
    """What the model says to PROMPT with these."""
    return model.generate(chat("Say")["messages"], adapters=adapters, **FIELDS).read()


def said(found: httpx.Response) -> Any:
    return found.json()["choices"][0]["message"]["content"]


def error(found: httpx.Response, status: int, code: str) -> str:
    told = found.json()["error"]
    assert (found.status_code, told["code"]) == (status, code), told
    message: str = told["message"]
    return message


def test_chosen_as_the_model(client: openai.OpenAI, tiny: Model) -> None:
    expected = {name: alone(tiny, name) for name in NAMES} | {"tiny": alone(tiny, [])}
    assert len(set(expected.values())) == 4
    messages: Any = chat("Say")["messages"]
    for name, text in expected.items():
        found = client.chat.completions.create(
            model=name, messages=messages, max_tokens=12, temperature=0,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        assert (found.model, found.choices[0].message.content) == (name, text)
        parts = client.chat.completions.create(
            model=name, messages=messages, max_tokens=12, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        chunks = list(parts)
        assert {chunk.model for chunk in chunks} == {name}
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def test_chosen_by_the_field(http: httpx.Client, tiny: Model) -> None:
    weights = {"one": 0.5, "two": -1}
    for adapters in ("one", ["two"], ["one", "two"], weights, [], {}, None):
        text = alone(tiny, adapters)
        found = http.post(CHAT, json=chat("Say", adapters=adapters, **FIELDS)).json()
        assert (found["model"], found["choices"][0]["message"]["content"]) == ("tiny", text)
        body = {"prompt": "user: Say\n", "adapters": adapters, **FIELDS}
        assert http.post(TEXT, json=body).json()["choices"][0]["text"] == text
    text = alone(tiny, "two")
    for fields in ({"model": "two"}, {"adapters": ["two"]}):
        body = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}
        told = http.post("/v1/responses", json={"input": "Say", **body}).json()
        assert told["output"][0]["content"][0]["text"] == text
        assert told["model"] == fields.get("model", "tiny")
        told = http.post("/v1/messages", json=chat("Say", **body)).json()
        assert told["content"][0]["text"] == text


def test_all_get_what_is_active(http: httpx.Client, tiny: Model) -> None:
    texts = {name: alone(tiny, name) for name in (*NAMES, ())}
    for names in (["one"], ["org/three"], []):
        found = http.post("/activate_adapters", json={"adapter_names": names})
        assert found.json() == {"adapter_names": names}
        active = [info["name"] for info in http.get(LOAD).json()["data"] if info["active"]]
        assert active == names
        for fields, text in (
            ({}, texts[names[0] if names else ()]), ({"model": "tiny"}, None),
            ({"adapters": []}, texts[()]), ({"model": "two"}, texts["two"]),
        ):  # fmt: skip
            told = http.post(CHAT, json=chat("Say", **FIELDS, **fields)).json()
            if text is not None:
                assert told["choices"][0]["message"]["content"] == text
    error(http.post("/activate_adapters", json={"adapter_names": ["x"]}), 404, "model_not_found")
    error(http.post("/activate_adapters", json={}), 400, "missing_required_parameter")


def test_names_that_nothing_has(http: httpx.Client) -> None:
    """With adapters the name of a request means something, and a wrong one is told."""
    for path, body in ((CHAT, chat(model="gone")), (TEXT, {"prompt": "x", "model": "gone"})):
        text = error(http.post(path, json=body), 404, "model_not_found")
        assert "'tiny', 'one', 'two', 'org/three'" in text
        field = {key: value for key, value in body.items() if key != "model"}
        found = http.post(path, json=field | {"adapters": ["one", "gone"]})
        assert "no adapter 'gone'" in error(found, 404, "model_not_found")
    both = http.post(CHAT, json=chat(model="one", adapters=["two"]))
    assert "leave one of the fields out" in error(both, 400, "invalid_value")
    for wrong in (5, [5], {"one": "x"}, {"one": True}, [["one"]]):
        found = http.post(CHAT, json=chat(adapters=wrong))
        assert error(found, 400, "invalid_value").startswith("adapters")
    found = http.post(CHAT, json=chat(adapters={"one": 1e9}))
    assert "from -1000 to 1000" in error(found, 400, "invalid_value")
    assert http.post("/tokenize", json={"prompt": "x", "model": "one"}).json()["count"] == 1


def test_models_are_listed_with_their_parents(client: openai.OpenAI, folder: Path) -> None:
    listed: list[Any] = list(client.models.list())
    assert [card.id for card in listed] == ["tiny", *NAMES]
    assert [card.parent for card in listed] == [None, "tiny", "tiny", "tiny"]
    assert [card.root for card in listed] == ["tiny", *(str(folder / name) for name in NAMES)]
    for card in listed:
        assert client.models.retrieve(card.id) == card
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gone")


def test_loaded_replaced_and_removed(http: httpx.Client, tiny: Model, folder: Path) -> None:
    found = http.post(LOAD, json={"name": "new", "path": "one", "pinned": True})
    told = found.json()
    assert (found.status_code, told["path"]) == (200, str(folder / "one"))
    assert (told["name"], told["model"], told["pinned"], told["loaded"]) == (
        "new", "tiny", True, True
    )  # fmt: skip
    assert told in http.get(LOAD).json()["data"]
    ask = chat("Say", model="new", **FIELDS)
    assert http.post(CHAT, json=ask).json()["choices"][0]["message"]["content"] == alone(
        tiny, "one"
    )
    assert http.post(LOAD, json={"name": "new", "path": str(folder / "two")}).status_code == 200
    assert http.post(CHAT, json=ask).json()["choices"][0]["message"]["content"] == alone(
        tiny, "two"
    )
    gone = http.delete(f"{LOAD}/new")
    assert gone.json() == {"name": "new", "object": "adapter", "deleted": True}
    error(http.post(CHAT, json=ask), 404, "model_not_found")
    again = http.delete(f"{LOAD}/new")
    error(again, 404, "model_not_found")
    assert "there is no adapter 'new'; there are" in again.text
    assert http.delete(f"{LOAD}/org/three").status_code == 200
    assert [info["name"] for info in http.get(LOAD).json()["data"]] == ["one", "two"]


def test_row_12_a_missing_path_is_404_and_changes_nothing(
    http: httpx.Client, tiny: Model, folder: Path
) -> None:
    before, cards, text = http.get(LOAD).json(), http.get("/v1/models").json(), alone(tiny, "one")
    (folder / "broken").mkdir(exist_ok=True)
    shutil.copy(folder / "one/adapter_config.json", folder / "broken")
    (folder / "broken/adapter_model.safetensors").write_bytes(b"no tensors")
    for name in ("one", "new"):
        for path in ("missing", f"{folder}/one/../missing", "x" * 4000, "one/" * 1000 + "x"):
            error(http.post(LOAD, json={"name": name, "path": path}), 404, "model_not_found")
            body = {"lora_name": name, "lora_path": path, "load_inplace": True}
            error(http.post("/v1/load_lora_adapter", json=body), 404, "model_not_found")
        found = http.post(LOAD, json={"name": name, "path": "broken"})
        error(found, 400, "invalid_checkpoint")
    for name in ("", " one", "tiny", "default", "a\nb", "x" * 201):
        error(http.post(LOAD, json={"name": name, "path": "two"}), 400, "invalid_value")
    for path in ("", "a\0b", 5, None):
        assert http.post(LOAD, json={"name": "new", "path": path}).status_code == 400
    assert (http.get(LOAD).json(), http.get("/v1/models").json()) == (before, cards)
    assert alone(tiny, "one") == text


@pytest.mark.parametrize(
    "path", ["../outside", "/etc/passwd", "{parent}/outside", "link", "..", "/", "../missing"]
)
def test_only_allowed_folders(http: httpx.Client, folder: Path, path: str) -> None:
    if not (folder / "link").is_symlink():
        (folder / "link").symlink_to(folder.parent / "outside")
    body = {"name": "new", "path": path.format(parent=folder.parent)}
    error(http.post(LOAD, json=body), 403, "adapter_not_allowed")
    body = {"lora_name": "new", "lora_path": body["path"]}
    error(http.post("/v1/load_lora_adapter", json=body), 403, "adapter_not_allowed")


def test_nothing_is_loaded_or_removed_unless_a_folder_is_allowed(tiny: Model, folder: Path) -> None:
    tiny.adapters.load("one", folder / "one")
    with TestClient(create_app(tiny)) as http:
        for found in (
            http.post(LOAD, json={"name": "new", "path": str(folder / "one")}),
            http.delete(f"{LOAD}/one"),
            http.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "one"}),
            http.post("/v1/unload_lora_adapter", json={"lora_name": "one"}),
        ):
            error(found, 403, "adapter_not_allowed")
        assert http.post(CHAT, json=chat(model="one", max_tokens=1)).status_code == 200
    tiny.adapters.remove("one")


def test_vllms_names(http: httpx.Client, tiny: Model, folder: Path) -> None:
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    body: dict[str, Any] = {"lora_name": "sql", "lora_path": str(folder / "one")}
    found = http.post(load, json=body)
    assert (found.status_code, found.text) == (
        200, "Success: LoRA adapter 'sql' added successfully."
    )  # fmt: skip
    assert "load_inplace" in error(http.post(load, json=body), 400, "invalid_value")
    body |= {"lora_path": str(folder / "two"), "load_inplace": True}
    assert http.post(load, json=body).status_code == 200
    assert alone(tiny, "sql") == alone(tiny, "two")
    found = http.post(unload, json={"lora_name": "sql", "lora_int_id": 1})
    assert (found.status_code, found.text) == (
        200, "Success: LoRA adapter 'sql' removed successfully."
    )  # fmt: skip
    error(http.post(unload, json={"lora_name": "sql"}), 404, "model_not_found")
    for path, wrong in ((load, {}), (load, {"lora_name": "a"}), (unload, {})):
        error(http.post(path, json=wrong), 400, "missing_required_parameter")


def test_a_running_answer_keeps_its_version(running: Running, http: httpx.Client) -> None:
    tiny, held = running.model, running.held
    body = chat("Say", model="one", max_tokens=40, temperature=0, ignore_eos=True, stream=True)
    wanted = "".join(
        event["choices"][0]["delta"].get("content", "")
        for event in events(http.post(CHAT, json=body).text)[:-1]
    )
    held.hold()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(lambda: httpx.post(running.url + CHAT, json=body, timeout=60).text)
        until(lambda: tiny.engine.stats().running == 1)
        held.let(5)
        assert http.post(LOAD, json={"name": "one", "path": "two"}).status_code == 200
        assert http.delete(f"{LOAD}/two").status_code == 200
        held.let()
        parts = events(asked.result())[:-1]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in parts) == wanted


def test_a_slow_load_holds_up_nobody(running: Running, http: httpx.Client) -> None:
    """Not the event loop, not the threads that requests are read on, and not the engine."""
    shelf = running.model.adapters
    read, waiting = shelf._read, []

    def slow(path: str) -> Any:
        waiting.append(path)
        until(lambda: not waiting)
        return read(path)

    shelf._read = slow
    try:
        with ThreadPoolExecutor(4) as pool:
            loads = [
                pool.submit(http.post, LOAD, json={"name": f"slow {i}", "path": "one"})
                for i in range(4)
            ]
            until(lambda: len(waiting) == 4)
            found = http.post(CHAT, json=chat("Say", model="two", **FIELDS))
            assert found.status_code == 200
            assert http.get("/health").status_code == 200
            waiting.clear()
            assert [load.result().status_code for load in loads] == [200] * 4
    finally:
        waiting.clear()
        shelf._read = read


def test_requests_for_dropped_adapters_hold_up_no_others(
    running: Running, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, go, waiting = running.model.adapters, threading.Event(), list[str]()
    read, loaded = shelf._read, shelf.list()
    texts = {name: alone(running.model, name) for name in NAMES}

    def slow(path: str) -> Any:
        waiting.append(path)
        assert go.wait(30)
        return read(path)

    monkeypatch.setattr(shelf, "limit_bytes", loaded[0].nbytes)
    shelf.choose("org/three")
    shelf.load("org/three", loaded[2].path)
    monkeypatch.setattr(shelf, "_read", slow)
    with ThreadPoolExecutor(2) as pool:
        asked = {
            name: pool.submit(http.post, CHAT, json=chat("Say", model=name, **FIELDS))
            for name in NAMES[:2]
        }
        until(lambda: len(waiting) == 2)
        try:
            for fields in ({}, {"model": "org/three"}, {"adapters": []}):
                body = chat("Say", **fields, **FIELDS)
                assert http.post(CHAT, json=body, timeout=5).status_code == 200
        finally:
            go.set()
        assert {name: said(found.result()) for name, found in asked.items()} == {
            name: texts[name] for name in NAMES[:2]
        }


def test_a_server_stops_while_many_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, go = list[str](), threading.Event()
    monkeypatch.setattr(run, "LAST_BYTES_S", 0.1)
    with Model.open(folder.parent / "tiny", context=64, threads=1) as model, ExitStack() as stack:
        read = model.adapters._read

        def slow(path: str) -> Any:
            waiting.append(path)
            assert go.wait(30)
            return read(path)

        monkeypatch.setattr(model.adapters, "_read", slow)
        running = stack.enter_context(in_thread(model, adapter_folders=(folder,), drain_s=0.2))
        pool = stack.enter_context(ThreadPoolExecutor(40))
        stack.callback(go.set)
        bodies = [{"name": f"slow {i}", "path": "one"} for i in range(40)]
        loads = [pool.submit(httpx.post, running.url + LOAD, json=body) for body in bodies]
        until(lambda: running.service.active == 40)
        running.service.draining = True
        until(lambda: running.server.should_exit, 5)
        assert 1 <= len(waiting) < 40
        go.set()
        wait(loads)


def test_keys_share_adapters_and_no_prefixes(tiny: Model, folder: Path) -> None:
    """A key's digest, as a name or in a name, opens nothing of what others have cached."""
    tiny.adapters.load("one", folder / "one")
    keys = ("key-a", "key-b")
    with in_thread(tiny, api_keys=keys, adapter_folders=(folder,)) as running:

        def cached(key: str, **fields: Any) -> int:
            body = {"prompt": "x" * 100, "max_tokens": 1, **fields}
            headers = {"Authorization": f"Bearer {key}"}
            found = httpx.post(running.url + TEXT, json=body, headers=headers, timeout=60).json()
            count: int = found["usage"]["prompt_tokens_details"]["cached_tokens"]
            return count

        asked: list[dict[str, Any]] = [{}, {"model": "one"}, {"adapters": {"one": 0.5}}]
        for fields in asked:
            for key in keys:
                assert cached(key, **fields) == 0
        for fields in asked:
            for key in keys:
                assert cached(key, **fields) > 0
        assert httpx.get(running.url + LOAD).status_code == 401
        assert httpx.post(running.url + LOAD, json={}).status_code == 401
    tiny.adapters.remove("one")


def test_several_models(tiny: Model, folder: Path) -> None:
    with Model.open(folder.parent / "tiny", context=256, threads=1) as other:
        other.adapters.load("mine", folder / "one")
        models = {"first": tiny, "second": other}
        with TestClient(create_app(models)) as http:
            found = http.post(CHAT, json=chat("Say", model="mine", **FIELDS)).json()
            assert found["choices"][0]["message"]["content"] == alone(other, "mine")
            ids = [card["id"] for card in http.get("/v1/models").json()["data"]]
            assert ids == ["first", "second", "mine"]
            assert http.get("/v1/models/mine").json()["parent"] == "second"
        with TestClient(create_app(models, ServerOptions(adapter_folders=(folder,)))) as http:
            body = {"model": "first", "name": "mine", "path": "two"}
            text = error(http.post(LOAD, json=body), 400, "invalid_value")
            assert text == "'mine' is an adapter of the model 'second'"
            body = {"model": "first", "lora_name": "mine", "lora_path": "two"}
            error(http.post("/v1/load_lora_adapter", json=body), 400, "invalid_value")
            body = {"model": "second", "name": "mine", "path": "two"}
            assert http.post(LOAD, json=body).status_code == 200
            assert "mine" not in tiny.adapters
        other.adapters.load("third", folder / "one")
        with pytest.raises(InvalidRequest, match="'third' is an adapter's name"):
            create_app({"first": tiny, "third": other})
        for found in (tiny, other):
            found.engine.on_death = None


def test_metrics(http: httpx.Client) -> None:
    families = text_string_to_metric_families(http.get("/metrics").text)
    found = {f.name: {tuple(s.labels.values()): s.value for s in f.samples} for f in families}
    assert found["squall_adapters"] == {("tiny", "loaded"): 3, ("tiny", "dropped"): 0}
    assert found["squall_adapter_bytes"][("tiny",)] > 0


def test_runner(tiny: Model, folder: Path) -> None:
    tiny.adapters.load("one", folder / "one")
    runner = Runner(tiny)
    runner.activate_adapters(["one"])
    assert alone(tiny, None) == alone(tiny, "one") != alone(tiny, [])
    AsyncRunner(tiny).activate_adapters([])
    assert alone(tiny, None) == alone(tiny, [])
    with pytest.raises(UnknownAdapter):
        runner.activate_adapters(["one", "two"])
    tiny.adapters.remove("one")


def test_the_command(folder: Path, tmp_path: Path) -> None:
    flags = ("--adapter", f"one={folder / 'one'}", "--adapter-folder", str(folder))
    model = str(folder.parent / "tiny")
    with in_process(tmp_path / "stderr", model, "--context", "256", *flags) as server:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            assert http.post(LOAD, json={"name": "sql", "path": "two"}).status_code == 200
            ids = [card["id"] for card in http.get("/v1/models").json()["data"]]
            assert ids == ["tiny", "one", "sql"]
            texts = {said(http.post(CHAT, json=chat("Say", model=id_, **FIELDS))) for id_ in ids}
            assert len(texts) == 3
        assert server.stop() == 0
