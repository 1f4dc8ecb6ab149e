"""Adapters by name, with files that are made up: loaded, replaced, dropped and read again."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

from squall.adapters import shelf
from squall.adapters.shelf import Chosen, Shelf, weights_of
from squall.errors import InvalidRequest, ModelNotFound, OutOfMemory, UnknownAdapter

SIZE = 100


@dataclass(frozen=True)
class Handle:
    """What an executor would have."""

    content: str
    nbytes: int = SIZE


@dataclass
class Files:
    """Paths with contents, how often each was read, and on which threads."""

    contents: dict[str, str] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    vectors: dict[str, Any] = field(default_factory=dict)
    held: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)

    def read(self, path: str) -> Any:
        self.reads.append(path)
        self.threads.add(threading.get_ident())
        self.begun.set()
        assert self.held.wait(10)
        if path not in self.contents:
            raise ModelNotFound(f"there is no {path}")
        return Read(path, self.contents[path], self.vectors)

    def shelf(self, **options: Any) -> Shelf:
        return Shelf(self.read, lambda terms: Handle(str(terms)), **options)


class Read:
    """A file that was read; its "terms" are its content."""

    rank = 4

    def __init__(self, path: str, content: str, vectors: dict[str, Any]) -> None:
        self.path = path
        self.terms, self.digest, self.vectors = content, f"digest of {content}", vectors


@pytest.fixture
def files() -> Iterator[Files]:
    found = Files({f"/{name}": name.upper() for name in "abcdef"})
    found.held.set()
    yield found
    found.held.set()


def contents(chosen: Chosen) -> list[tuple[str, float]]:
    return [(handle.content, weight) for handle, weight in chosen.mixture]  # type: ignore[attr-defined]


def loaded(found: Shelf) -> list[str]:
    return [info.name for info in found.list() if info.loaded]


def test_load_choose_replace_remove(files: Files) -> None:
    found = files.shelf()
    assert not found.used
    info = found.load("mine", "/a", pinned=True)
    assert (info.name, info.path, info.digest, info.rank) == ("mine", "/a", "digest of A", 4)
    assert (info.nbytes, info.pinned, info.loaded, info.active) == (SIZE, True, True, False)
    assert found.list() == (info,)
    assert "mine" in found
    before = found.choose("mine")
    assert contents(before) == [("A", 1.0)]
    found.load("mine", "/b")
    assert [(i.name, i.digest, i.pinned) for i in found.list()] == [("mine", "digest of B", False)]
    assert contents(before) == [("A", 1.0)]  # who began with it has it
    assert contents(found.choose("mine")) == [("B", 1.0)]
    found.remove("mine")
    assert found.list() == ()
    assert found.used
    for gone in (lambda: found.choose("mine"), lambda: found.remove("mine")):
        with pytest.raises(UnknownAdapter, match="no adapter 'mine'; there are none"):
            gone()
    assert files.reads == ["/a", "/b"]


def test_a_failure_changes_nothing(files: Files) -> None:
    found = files.shelf()
    found.load("mine", "/a")
    found.activate(["mine"])
    before, chosen = found.list(), found.choose()
    with pytest.raises(ModelNotFound, match="/missing"):
        found.load("mine", "/missing")
    with pytest.raises(ModelNotFound):
        found.load("other", "/missing")
    files.vectors = {"layers.0.norm.weight": 1}
    with pytest.raises(InvalidRequest, match=r"layers\.0\.norm\.weight.*merge it"):
        found.load("mine", "/b")
    with pytest.raises(UnknownAdapter):
        found.activate(["mine", "other"])
    assert (found.list(), found.choose()) == (before, chosen)


def test_names(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    found = files.shelf()
    found.reserve("base")
    wrong: list[Any] = ["", " a", "a ", "a\nb", "a\x00", "x" * 201, "\u202e", 5, None]
    for name in wrong:
        with pytest.raises(InvalidRequest, match="the adapter's name is"):
            found.load(name, "/a")
    for name in ("base", "default"):
        with pytest.raises(InvalidRequest, match="means the model itself"):
            found.load(name, "/a")
    assert files.reads == []
    monkeypatch.setattr(shelf, "MOST_NAMES", 2)
    for name in ("org/näme 1", "ü" * 200):
        found.load(name, "/a")
    with pytest.raises(InvalidRequest, match="there are 2 adapters already"):
        found.load("third", "/a")
    found.load("org/näme 1", "/b")
    with pytest.raises(InvalidRequest, match="give the model another one"):
        found.reserve("org/näme 1")


def test_weights() -> None:
    assert weights_of("a") == {"a": 1.0}
    assert list(weights_of(["b", "a", "b"]).items()) == [("b", 1.0), ("a", 1.0)]
    assert list(weights_of({"b": 2, "a": -0.5}).items()) == [("b", 2.0), ("a", -0.5)]
    assert weights_of([]) == weights_of({}) == {}
    wrong: list[Any] = [5, [5], b"a", {5: 1.0}, {"a": "1"}, {"a": True}, {"a": None}, [["a"]]]
    wrong += [{"a": number} for number in (math.nan, math.inf, -math.inf, 1e9, 10**400)]
    wrong += [[f"{i}" for i in range(17)]]
    for given in wrong:
        with pytest.raises(InvalidRequest, match=r"^adapters is"):
            weights_of(given)


def test_digests_tell_contents_and_weights_apart_and_no_names(files: Files) -> None:
    found = files.shelf()
    for name in "abc":
        found.load(name, f"/{name}")
    found.load("again", "/a")
    assert found.choose("a").digest == found.choose(["again"]).digest
    assert found.choose("a").digest == found.choose({"a": 1, "b": 0}).digest
    assert found.choose([]) == found.choose() == found.choose({"a": 0.0}) == Chosen((), "")
    with pytest.raises(UnknownAdapter):
        found.choose({"a": 1, "gone": 0})
    asked: list[Any] = ["a", "b", ["a", "b"], ["b", "a"], {"a": 0.5}, {"a": 0.5, "b": 1}, "c"]
    digests = [found.choose(adapters).digest for adapters in asked]
    assert len({*digests, ""}) == len(asked) + 1
    before = found.choose("a").digest
    found.load("a", "/b")
    assert found.choose("a").digest == found.choose("b").digest != before


def test_active_ones_are_for_who_asks_for_none(files: Files) -> None:
    found = files.shelf()
    for name in "abc":
        found.load(name, f"/{name}")
    found.activate({"b": 0.5, "a": 1})
    assert found.active == ("b", "a")
    assert contents(found.choose()) == [("B", 0.5), ("A", 1.0)]
    assert contents(found.choose("c")) == [("C", 1.0)]
    assert contents(found.choose([])) == []
    assert [info.active for info in found.list()] == [True, True, False]
    found.load("b", "/d")
    assert contents(found.choose()) == [("D", 0.5), ("A", 1.0)]
    found.remove("b")
    assert found.active == ("a",)
    found.activate([])
    assert found.choose() == Chosen()


def test_what_was_not_used_for_longest_is_dropped_and_read_again(files: Files) -> None:
    found = files.shelf(limit_bytes=3 * SIZE)
    found.load("p", "/a", pinned=True)
    for name in "bc":
        found.load(name, f"/{name}")
    found.choose("b")
    found.load("d", "/d")
    assert loaded(found) == ["p", "b", "d"]
    files.reads.clear()
    assert contents(found.choose(["c", "d"])) == [("C", 1.0), ("D", 1.0)]
    assert files.reads == ["/c"]
    assert loaded(found) == ["p", "c", "d"]
    found.load("d", "/e")  # in its own place
    assert loaded(found) == ["p", "c", "d"]


@pytest.mark.parametrize("becomes", ["another", None])
def test_dropped_weights_are_the_same_ones_again_or_an_error(
    files: Files, becomes: str | None
) -> None:
    found = files.shelf(limit_bytes=SIZE)
    found.load("a", "/a")
    found.load("b", "/b")
    before = found.list()
    del files.contents["/a"]
    if becomes is not None:
        files.contents["/a"] = becomes
    with pytest.raises(UnknownAdapter, match=r"'a' were dropped.*load it again") as caught:
        found.choose("a")
    assert "/a" not in str(caught.value)  # nobody's business but the server's
    assert found.list() == before
    files.contents["/a"] = "A"
    assert contents(found.choose("a")) == [("A", 1.0)]


def test_too_large_for_the_limit(files: Files) -> None:
    found = files.shelf(limit_bytes=2 * SIZE)
    found.load("a", "/a", pinned=True)
    found.load("b", "/b")
    found.load("c", "/c")
    before = found.list()
    with pytest.raises(OutOfMemory, match=r"allow more .*--adapter-memory"):
        files.shelf(limit_bytes=SIZE - 1).load("a", "/a")
    found.load("c", "/d", pinned=True)
    with pytest.raises(OutOfMemory, match=f"takes {SIZE} bytes, and there is room for 0"):
        found.load("b", "/e")
    assert [i.digest for i in before[:2]] == [i.digest for i in found.list()[:2]]


def test_many_threads_read_a_file_once_and_on_their_own_time(files: Files) -> None:
    found = files.shelf(limit_bytes=SIZE)
    found.load("a", "/a")
    found.load("b", "/b")
    files.reads.clear()
    files.held.clear()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(found.choose, "a") for _ in range(8)]
        assert files.begun.wait(10)
        assert contents(found.choose("b")) == [("B", 1.0)]  # the others do not wait
        assert found.list()
        files.held.set()
        assert {repr(contents(each.result())) for each in waiting} == {"[('A', 1.0)]"}
        assert files.reads == ["/a"]
    assert threading.get_ident() in files.threads


@pytest.mark.parametrize("pinned", [False, True])
def test_the_load_that_began_last_stays(files: Files, pinned: bool) -> None:
    """Also where an earlier one, of what the files were then, ends later."""
    found, read, old, go = files.shelf(), files.read, threading.Event(), threading.Event()

    def slow(path: str) -> Any:
        what = read(path)
        old.set()
        assert go.wait(10)
        return what

    with ThreadPoolExecutor(1) as pool:
        found._read = slow
        first = pool.submit(found.load, "a", "/a")
        assert old.wait(10)
        found._read, files.contents["/a"] = read, "NEW"
        assert found.load("a", "/a", pinned=pinned).digest == "digest of NEW"
        go.set()
        assert first.result().digest == "digest of A"
    assert contents(found.choose("a")) == [("NEW", 1.0)]
    assert found.list()[0].pinned == pinned


def test_versions_do_not_tear(files: Files) -> None:
    """Whoever chooses while a name is replaced has the weights that its digest means."""
    found, stop = files.shelf(limit_bytes=2 * SIZE), threading.Event()
    for name in "ab":
        found.load(name, f"/{name}")
    digests = {content: files.shelf() for content in "ABCDEF"}
    for content, other in digests.items():
        other.load("x", f"/{content.lower()}")
    right = {content: other.choose("x").digest for content, other in digests.items()}

    def swap(name: str) -> None:
        while not stop.is_set():
            for path in ("/c", "/d", "/e", "/f"):
                found.load(name, path)

    with ThreadPoolExecutor(3) as pool:
        swapping = [pool.submit(swap, name) for name in "ab"]
        for _ in range(500):
            chosen = found.choose("a")
            ((content, _),) = contents(chosen)
            assert chosen.digest == right[content]
        stop.set()
        for each in swapping:
            each.result()
    clocks = [version.used for version in found._versions.values()]
    assert all(first != second for first, second in pairwise(sorted(clocks)))
