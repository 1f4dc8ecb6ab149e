"""The adapters of an open model, by name: loaded, replaced and removed while requests run."""

from __future__ import annotations

import hashlib
import numbers
import os
import re
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

from squall.batch import Mixture
from squall.errors import InvalidRequest, OutOfMemory, SquallError, UnknownAdapter
from squall.executors import Adapter
from squall.program import Site
from squall.weights import Term

if TYPE_CHECKING:
    from squall.adapters.lora import Lora

Adapters = str | Sequence[str] | Mapping[str, float]
"""What a request asks for: a name, names, or names with weights."""

MOST_NAMES = 1024
MOST_MIXED = 16
MOST_WEIGHT = 1000
_NAME = re.compile(r"(?=\S).{1,200}(?<=\S)")


@dataclass(frozen=True, slots=True)
class Info:
    """What is known of an adapter.

    path: as it was given. digest: of what its files say. nbytes: of its weights, which are in
    memory if it is `loaded`; if it is `pinned`, always. active: for requests that ask for none.
    """

    name: str
    path: str
    digest: str
    rank: int
    nbytes: int
    pinned: bool
    loaded: bool = True
    active: bool = False


class Chosen(NamedTuple):
    """Adapters of a request. digest: of their contents and weights, whatever their names."""

    mixture: Mixture = ()
    digest: str = ""


@dataclass(slots=True, eq=False)
class _Version:
    """What a name stands for. handle: None while it is dropped.

    where: its files, also those of an adapter of the hub. began, used: when, in order.
    """

    info: Info
    where: str
    handle: Adapter | None
    began: int
    used: int


class Shelf:
    """Adapters by name. Any thread may call it; files are read on the caller's thread.

    read: from a path. make: from weights, what the executor takes.
    limit_bytes: of weights in memory. Those that were not used for longest are dropped, and read
        again when they are used. A request keeps what it began with.
    used: there was an adapter once, so names in requests may be meant for one.
    """

    def __init__(
        self,
        read: Callable[[str], Lora],
        make: Callable[[Mapping[Site, Term]], Adapter],
        *,
        limit_bytes: int | None = None,
    ) -> None:
        self.limit_bytes = limit_bytes
        self.used = False
        self._read = read
        self._make = make
        self._clock = count(1)
        # Guards what follows, for moments: files are read without it.
        self._lock = threading.Lock()
        self._reserved = {"default"}
        self._versions: dict[str, _Version] = {}
        self._active: dict[str, float] = {}
        self._loading: dict[_Version, Future[Adapter]] = {}

    @property
    def active(self) -> tuple[str, ...]:
        """What requests get that ask for none."""
        return tuple(self._active)

    @property
    def weights(self) -> dict[str, float]:
        """And with which weights."""
        return dict(self._active)

    def __contains__(self, name: object) -> bool:
        return name in self._versions

    def list(self) -> tuple[Info, ...]:
        with self._lock:
            return tuple(map(self._info, self._versions.values()))

    def reserve(self, name: str) -> None:
        """`name` is the model's own. Raises InvalidRequest if an adapter has it."""
        with self._lock:
            if name in self._versions:
                raise InvalidRequest(f"{name!r} is an adapter's name; give the model another one")
            self._reserved.add(name)

    def load(self, name: str, path: str | os.PathLike[str], *, pinned: bool = False) -> Info:
        """Read an adapter, also in the place of one of this name; if it fails, nothing changes.

        Of several loads of a name at a time the one that began last stays.
        Raises InvalidRequest for a name that cannot be, and whatever reading a file can.
        """
        if not (isinstance(name, str) and name.isprintable() and _NAME.fullmatch(name)):
            raise InvalidRequest(
                f"the adapter's name is {name!r:.250}; it must be a text of 1 to 200 printable "
                "characters, no space first or last"
            )
        with self._lock:
            self._check_free(name)
            began = next(self._clock)
        version = self._read_new(name, os.fspath(path), pinned, began)
        with self._lock:
            self._check_free(name)
            now = self._versions.get(name)
            if now is None or now.began < began:
                self._drop({**self._versions, name: version}, version)
                self._versions[name] = version
                self.used = True
            return self._info(version)

    def remove(self, name: str) -> None:
        """Forget an adapter. Raises UnknownAdapter."""
        with self._lock:
            self._find(name)
            del self._versions[name]
            self._active = {other: w for other, w in self._active.items() if other != name}

    def activate(self, adapters: Adapters) -> None:
        """What requests get that ask for none; [] is none. Raises UnknownAdapter."""
        weights = weights_of(adapters)
        with self._lock:
            for name in weights:
                self._find(name)
            self._active = weights

    def choose(self, adapters: Adapters | None = None) -> Chosen:
        """The versions that names stand for now; None: the active ones. Raises UnknownAdapter.

        Reads the weights of those that were dropped.
        """
        asked = None if adapters is None else weights_of(adapters)
        with self._lock:
            weights = self._active if asked is None else asked
            found = [(self._find(name), weight) for name, weight in weights.items()]
        found = [(version, weight) for version, weight in found if weight]
        if not found:
            return Chosen()
        known = repr([(version.info.digest, weight) for version, weight in found])
        mixture = tuple((self._handle(version), weight) for version, weight in found)
        return Chosen(mixture, hashlib.sha256(known.encode()).hexdigest())

    def ready(self, adapters: Adapters | None) -> bool:
        """Whether `choose` has nothing to read now."""
        names = (adapters,) if isinstance(adapters, str) else adapters
        with self._lock:
            found = map(self._versions.get, self._active if names is None else names)
            return all(version is None or version.handle is not None for version in found)

    def _handle(self, version: _Version) -> Adapter:
        version.used = next(self._clock)
        return version.handle or self._once(version)

    def _once(self, version: _Version) -> Adapter:
        """What was dropped, read by this thread, or by another one that is at it."""
        with self._lock:
            loading = self._loading.get(version)
            if mine := loading is None:
                loading = self._loading[version] = Future()
        if mine:
            try:
                loading.set_result(self._again(version))
            except BaseException as error:
                loading.set_exception(error)
            with self._lock:
                del self._loading[version]
        return loading.result()

    def _read_new(self, name: str, path: str, pinned: bool, began: int) -> _Version:
        lora = self._read(path)
        if lora.vectors:
            what = f"the adapter {path!r:.200} changes {next(iter(lora.vectors))}"
            raise InvalidRequest(f"{what}, which cannot be kept beside the model; merge it")
        handle = self._make(lora.terms)
        info = Info(name, path, lora.digest, lora.rank, handle.nbytes, pinned)
        where = os.path.abspath(lora.path)
        return _Version(info, where, handle, began, used=next(self._clock))

    def _again(self, version: _Version) -> Adapter:
        if version.handle is not None:
            return version.handle
        lora = None
        with suppress(SquallError):
            lora = self._read(version.where)
        if lora is None or lora.digest != version.info.digest:
            raise UnknownAdapter(
                f"the weights of adapter {version.info.name!r} were dropped, and its files are not "
                "what they were; load it again"
            )
        handle = self._make(lora.terms)
        with self._lock:
            if version in self._versions.values():
                self._drop(self._versions, version)
            version.handle = handle
        return handle

    def _drop(self, versions: Mapping[str, _Version], new: _Version) -> None:
        """Make room for `new`, one of the versions. Raises OutOfMemory, and drops nothing then."""
        if self.limit_bytes is None:
            return
        others = [v for v in versions.values() if v.handle is not None and v is not new]
        room = self.limit_bytes - sum(v.info.nbytes for v in others if v.info.pinned)
        if (free := room - new.info.nbytes) < 0:
            takes = f"the adapter takes {new.info.nbytes} bytes, and there is room for {room}"
            raise OutOfMemory(f"{takes}; allow more (adapter_bytes, --adapter-memory) or pin less")
        for version in sorted(others, key=lambda v: -v.used):
            if not version.info.pinned:
                free -= version.info.nbytes
                if free < 0:
                    version.handle = None

    def _info(self, version: _Version) -> Info:
        active = version.info.name in self._active
        return replace(version.info, loaded=version.handle is not None, active=active)

    def _find(self, name: str) -> _Version:
        if name not in self._versions:
            known = ", ".join(map(repr, self._versions)) or "none"
            raise UnknownAdapter(f"there is no adapter {name!r:.200}; there are {known:.500}")
        return self._versions[name]

    def _check_free(self, name: str) -> None:
        if name in self._reserved:
            raise InvalidRequest(f"{name!r} means the model itself; give the adapter another name")
        if len(self._versions) >= MOST_NAMES and name not in self._versions:
            raise InvalidRequest(f"there are {MOST_NAMES} adapters already; remove one")


def weights_of(adapters: object) -> dict[str, float]:
    """Adapters with their weights, each once, in order. Raises InvalidRequest.

    A name alone has the weight 1.
    """
    given: object = (adapters,) if isinstance(adapters, str) else adapters
    if isinstance(given, Sequence) and all(isinstance(name, str) for name in given):
        given = dict.fromkeys(given, 1.0)
    items: Collection[Any] = given.items() if isinstance(given, Mapping) else ((None, None),)
    if len(items) > MOST_MIXED or not all(_is_weight(*item) for item in items):
        raise InvalidRequest(
            f"adapters is {adapters!r:.100}; it must be a name, a list of names, or names with "
            f"weights from -{MOST_WEIGHT} to {MOST_WEIGHT}, such as {{'name': 0.5}}; at most "
            f"{MOST_MIXED} names"
        )
    return {name: float(weight) for name, weight in items}


def _is_weight(name: object, weight: Any) -> bool:
    real = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
    return isinstance(name, str) and real and abs(weight) <= MOST_WEIGHT  # which NaN is not
