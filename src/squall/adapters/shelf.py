"""The adapters of an open model, by name: loaded, replaced and removed while requests run."""

from __future__ import annotations

import hashlib
import numbers
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

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
MOST_CHARACTERS = 200  # of a name
MOST_MIXED = 16
MOST_WEIGHT = 1000
_FORMS = "a name, a list of names, or names with weights such as {'name': 0.5}"


@dataclass(frozen=True, slots=True, kw_only=True)
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
    loaded: bool
    active: bool


@dataclass(frozen=True, slots=True)
class Chosen:
    """Adapters of a request. digest: of their contents and weights, whatever their names."""

    mixture: Mixture = ()
    digest: str = ""


@dataclass(slots=True, eq=False, kw_only=True)
class _Version:
    """What a name stands for. handle: None while it is dropped. used: when, in order."""

    path: str
    pinned: bool
    digest: str
    rank: int
    nbytes: int
    handle: Adapter | None
    used: int = 0


class Shelf:
    """Adapters by name. Any thread may call it; files are read on the caller's thread.

    read: from a path. make: from weights, what the executor takes.
    limit_bytes: of weights in memory. Those that were not used for longest are dropped, and read
        again when they are used. A request keeps what it began with.
    """

    def __init__(
        self,
        read: Callable[[str], Lora],
        make: Callable[[Mapping[Site, Term]], Adapter],
        *,
        limit_bytes: int | None = None,
    ) -> None:
        self.limit_bytes = limit_bytes
        self._read = read
        self._make = make
        self._clock = count(1)
        # Guards what follows, for moments: files are read without it.
        self._lock = threading.Lock()
        self._reserved = {"default"}
        self._used = False
        self._versions: dict[str, _Version] = {}
        self._active: Mapping[str, float] = {}
        self._loading: dict[tuple[object, ...], Future[tuple[_Version, Adapter]]] = {}

    @property
    def used(self) -> bool:
        """Whether there ever was an adapter, so that names of requests may be meant for one."""
        return self._used

    @property
    def active(self) -> tuple[str, ...]:
        """What requests get that ask for none."""
        return tuple(self._active)

    def __contains__(self, name: object) -> bool:
        return name in self._versions

    def list(self) -> tuple[Info, ...]:
        """All adapters."""
        with self._lock:
            return tuple(self._info(name, found) for name, found in self._versions.items())

    def reserve(self, name: str) -> None:
        """`name` is the model's own. Raises InvalidRequest if an adapter has it."""
        with self._lock:
            if name in self._versions:
                raise InvalidRequest(f"{name!r} is an adapter's name; give the model another one")
            self._reserved.add(name)

    def load(self, name: str, path: str | os.PathLike[str], *, pinned: bool = False) -> Info:
        """Read an adapter, also in the place of one of this name; if it fails, nothing changes.

        Raises InvalidRequest for a name that cannot be, and whatever reading a file can.
        """
        self._check_name(name)
        given = os.fspath(path)
        version, _ = self._once(
            ("load", name, given, pinned), lambda: self._put(name, given, pinned)
        )
        with self._lock:
            return self._info(name, version)

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
        weights = self._active if adapters is None else weights_of(adapters)
        if not weights:
            return Chosen()
        found = [(*self._take(name), weight) for name, weight in weights.items()]
        known = repr([(version.digest, weight) for version, _, weight in found])
        digest = hashlib.sha256(known.encode()).hexdigest()
        return Chosen(tuple((handle, weight) for _, handle, weight in found), digest)

    def _take(self, name: str) -> tuple[_Version, Adapter]:
        with self._lock:
            version = self._find(name)
            version.used = next(self._clock)
            if version.handle is not None:
                return version, version.handle
        return self._once(("again", version), lambda: self._again(name, version))

    def _once(
        self, key: tuple[object, ...], load: Callable[[], tuple[_Version, Adapter]]
    ) -> tuple[_Version, Adapter]:
        """What `load` finds, or what another thread finds that is at the same."""
        with self._lock:
            loading = self._loading.get(key)
            if mine := loading is None:
                loading = self._loading[key] = Future()
        if mine:
            try:
                loading.set_result(load())
            except BaseException as error:
                loading.set_exception(error)
            with self._lock:
                del self._loading[key]
        return loading.result()

    def _put(self, name: str, path: str, pinned: bool) -> tuple[_Version, Adapter]:
        lora = self._read(path)
        if lora.vectors:
            raise InvalidRequest(
                f"the adapter {path!r:.200} changes {next(iter(lora.vectors))}, which cannot be "
                "kept beside the model; merge it"
            )
        handle = self._make(lora.terms)
        version = _Version(
            path=path,
            pinned=pinned,
            digest=lora.digest,
            rank=lora.rank,
            nbytes=handle.nbytes,
            handle=handle,
            used=next(self._clock),
        )
        with self._lock:
            self._check_free(name)
            self._drop({**self._versions, name: version}, version)
            self._versions[name] = version
            self._used = True
        return version, handle

    def _again(self, name: str, version: _Version) -> tuple[_Version, Adapter]:
        if version.handle is not None:
            return version, version.handle
        lora, why = None, None
        try:
            lora = self._read(version.path)
        except SquallError as error:
            why = error
        if lora is None or lora.digest != version.digest:
            raise UnknownAdapter(
                f"the weights of adapter {name!r:.200} were dropped, and its files are not what "
                "they were; load it again"
            ) from why
        handle = self._make(lora.terms)
        with self._lock:
            if version in self._versions.values():
                self._drop(self._versions, version)
            version.handle = handle
        return version, handle

    def _drop(self, versions: Mapping[str, _Version], new: _Version) -> None:
        """Make room for `new`, one of the versions. Raises OutOfMemory, and drops nothing then."""
        if self.limit_bytes is None:
            return
        others = [v for v in versions.values() if v.handle is not None and v is not new]
        free = self.limit_bytes - new.nbytes - sum(v.nbytes for v in others if v.pinned)
        if free < 0:
            raise OutOfMemory(
                f"the adapter takes {new.nbytes} bytes, and {max(free + new.nbytes, 0)} of the "
                f"{self.limit_bytes} for adapters are free; remove some that are pinned, or allow "
                "more"
            )
        for version in sorted(others, key=lambda v: -v.used):
            if not version.pinned:
                free -= version.nbytes
                if free < 0:
                    version.handle = None

    def _info(self, name: str, version: _Version) -> Info:
        return Info(
            name=name,
            path=version.path,
            digest=version.digest,
            rank=version.rank,
            nbytes=version.nbytes,
            pinned=version.pinned,
            loaded=version.handle is not None,
            active=name in self._active,
        )

    def _find(self, name: str) -> _Version:
        if name not in self._versions:
            known = ", ".join(map(repr, self._versions)) or "none"
            raise UnknownAdapter(f"there is no adapter {name!r:.200}; there are {known:.500}")
        return self._versions[name]

    def _check_name(self, name: object) -> None:
        right = isinstance(name, str) and name.isprintable() and name == name.strip() and name
        if not right or len(str(name)) > MOST_CHARACTERS:
            raise InvalidRequest(
                f"the adapter's name is {name!r:.250}; it must be a text of 1 to {MOST_CHARACTERS} "
                "printable characters, no space first or last"
            )
        with self._lock:
            self._check_free(str(name))

    def _check_free(self, name: str) -> None:
        if name in self._reserved:
            raise InvalidRequest(f"{name!r} means the model itself; give the adapter another name")
        if len(self._versions) >= MOST_NAMES and name not in self._versions:
            raise InvalidRequest(f"there are {MOST_NAMES} adapters already; remove one")


def weights_of(adapters: object) -> dict[str, float]:
    """Adapters with their weights, each once, in order. Raises InvalidRequest.

    A name alone has the weight 1; those with the weight 0 are left out.
    """
    items: Mapping[object, object]
    if isinstance(adapters, str):
        items = {adapters: 1.0}
    elif isinstance(adapters, Mapping):
        items = adapters
    elif isinstance(adapters, Sequence) and all(isinstance(name, str) for name in adapters):
        items = dict.fromkeys(adapters, 1.0)
    else:
        raise InvalidRequest(f"adapters is {adapters!r:.100}; it must be {_FORMS}")
    found: dict[str, float] = {}
    for name, weight in items.items():
        if not isinstance(name, str):
            raise InvalidRequest(f"adapters has the name {name!r:.100}; it must be {_FORMS}")
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
            raise InvalidRequest(f"adapters has {weight!r:.100} for {name!r:.200}; give a number")
        if not abs(weight) <= MOST_WEIGHT:  # NaN is not
            raise InvalidRequest(
                f"adapters has the weight {weight!r:.100} for {name!r:.200}; it must be between "
                f"-{MOST_WEIGHT} and {MOST_WEIGHT}"
            )
        if weight:
            found[name] = float(weight)
    if len(found) > MOST_MIXED:
        raise InvalidRequest(f"adapters has {len(found)} names; at most {MOST_MIXED} go together")
    return found
