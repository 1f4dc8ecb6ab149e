"""Models of the Hugging Face hub: an id to files here, downloaded once.

The listing of a repository decides what is fetched, and only names that are known to be needed
pass; so no name from a repository becomes a path. The server itself (HF_ENDPOINT) is trusted: the
library names files of the cache after its ETags. A model in the cache is opened without a
connection if `offline` says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from squall.errors import InvalidRequest, ModelNotFound

Progress = Callable[[int, int], None]

TOKEN_SOURCES = "literal:TOKEN, env:VARIABLE, path:FILE, cache, none"
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
_ID = re.compile(rf"{_PART}/{_PART}")
_REVISION = re.compile(rf"{_PART}(/{_PART}){{0,8}}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OF = re.compile(r"-(\d{5})-of-(\d{5})\.")
_CONFIGURATION = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens"
    r"|chat_template|processor_config|preprocessor_config)\.json|chat_template\.jinja"
    r"|additional_chat_templates/[A-Za-z0-9_-]+\.jinja"
)
_GGUF = re.compile(rf"({_PART}/)?{_PART}\.gguf")
# The first kind that a repository has is fetched.
_WEIGHTS = (
    re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"),
    re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.(bin|pt|pth)|pytorch_model\.bin\.index\.json"),
)


@dataclass(frozen=True, slots=True)
class Hub:
    """How the hub is used. `revision` is a branch, tag or commit.

    token_source: where the token is from that gated and private models need: TOKEN_SOURCES.
    offline: make no connection and use what is in the cache; HF_HUB_OFFLINE=1 says the same.
    """

    revision: str = "main"
    token_source: str = "cache"
    offline: bool = False

    def __post_init__(self) -> None:
        _check(_REVISION, self.revision, "revision", "a branch, tag or commit")
        token(self.token_source)

    def fetch(self, name: str, progress: Progress | None = None) -> Path:
        """The folder of the model `owner/name`, or the file of `owner/name:file`.

        file: a GGUF file of the repository, or a part of its name such as `Q4_K_M`. Downloads
        what is not in the cache, and calls `progress` with bytes done and bytes in all. Raises
        ModelNotFound if the model cannot be had.
        """
        id, _, file = name.partition(":")
        check_id(id)
        cached = self._cached(id)
        if self.offline or _offline():
            found = None if cached is None else _in_folder(cached, file)
            if found is None:
                raise ModelNotFound(
                    f"{name} is not, or not wholly, in the cache of the hub, and --offline (or "
                    "HF_HUB_OFFLINE) forbids to download it; leave that out once"
                )
            return found
        try:
            return _Download(self, id, file, progress).run()
        except ConnectionError as error:
            found = None if cached is None else _in_folder(cached, file)
            if found is None:
                raise ModelNotFound(f"cannot download {name}: {error}") from None
            return found

    def _cached(self, id: str) -> Path | None:
        root = _cache() / ("models--" + id.replace("/", "--"))
        try:
            commit = (root / "refs" / self.revision).read_text().strip()
        except OSError:
            commit = self.revision
        folder = root / "snapshots" / commit
        return folder if _COMMIT.fullmatch(commit) and folder.is_dir() else None


def check_id(id: str) -> None:
    """Raise InvalidRequest unless `id` is `owner/name` in the hub's alphabet."""
    _check(_ID, id, "model id", "owner/name of letters, digits, '-', '_' and '.'")


def is_id(name: str) -> bool:
    """Whether this could mean a model of the hub: `owner/name` or `owner/name:file`."""
    id, _, _ = name.partition(":")
    return _ID.fullmatch(id) is not None and ".." not in id and not id.endswith(".gguf")


def _check(pattern: re.Pattern[str], text: str, what: str, allowed: str) -> None:
    if not pattern.fullmatch(text) or ".." in text or "--" in text:
        raise InvalidRequest(f"{text[:100]!r} is no {what}; it must be {allowed}, without '..'")


def token(source: str) -> str | None:
    """The token that a token source says; None if it says none, or its place is empty."""
    kind, colon, value = source.partition(":")
    if kind == "literal" and colon:
        return value or None
    if kind == "env" and colon:
        return os.environ.get(value or "HUGGING_FACE_HUB_TOKEN") or None
    if kind == "path" and colon:
        return _first_line(Path(value).expanduser())
    if source == "cache":
        return _first_line(_home() / "token")
    if source == "none":
        return None
    raise InvalidRequest(f"the token source must be one of {TOKEN_SOURCES}")


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError):
        return None


def _home() -> Path:
    return Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()


def _cache() -> Path:
    named = os.environ.get("HF_HUB_CACHE")
    return Path(named).expanduser() if named else _home() / "hub"


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _in_folder(folder: Path, file: str) -> Path | None:
    """What a folder of the cache has for `file`, or None unless it has all of it."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    try:
        chosen, main = choose(names, file)
    except ModelNotFound:
        return None
    for match in filter(None, map(_OF.search, chosen)):
        parts = {_OF.sub(f"-{n:05}-of-{match[2]}.", match.string) for n in _numbers(match[2])}
        if not parts <= names:
            return None
    return folder / main if main else folder


def _numbers(last: str) -> range:
    return range(1, min(int(last), 10_000) + 1)


def choose(names: Collection[str], file: str) -> tuple[list[str], str | None]:
    """Which files of a repository are needed; and the GGUF file to open, if it is one."""
    if not file and (weights := folder_weights(names)):
        return sorted(filter(_CONFIGURATION.fullmatch, names)) + weights, None
    ggufs = sorted(name for name in names if _GGUF.fullmatch(name) and ".." not in name)
    first = [name for name in ggufs if (of := _OF.search(name)) is None or of[1] == "00001"]
    found = [name for name in first if name == file] or [
        name for name in first if file.lower() in name.lower()
    ]
    if len(found) != 1:
        raise ModelNotFound(
            f"it has {len(found)} GGUF models" + (f" named {file[:100]!r}" if file else "")
            + (f"; name one as owner/name:file, of {', '.join(first[:40])}" if first else
               ", and no model.safetensors or pytorch_model.bin")
        )  # fmt: skip
    of = _OF.search(found[0])
    if of is None:
        return found, found[0]
    parts = [_OF.sub(f"-{n:05}-of-{of[2]}.", found[0]) for n in _numbers(of[2])]
    return [part for part in parts if part in names], found[0]


def folder_weights(names: Collection[str]) -> list[str]:
    """Of the files of a model, those that transformers would take weights from."""
    for kind in _WEIGHTS:
        weights = sorted(name for name in names if kind.fullmatch(name))
        if any(not name.endswith(".json") for name in weights):
            return weights
    return []


class _Download:
    """The files of one repository, at one commit."""

    def __init__(self, hub: Hub, id: str, file: str, progress: Progress | None) -> None:
        self._hub = hub
        self._id = id
        self._file = file
        self._progress = progress or (lambda *_: None)
        self._token = token(hub.token_source) or False

    def run(self) -> Path:
        """Raises ConnectionError where the hub could not be asked."""
        commit, sizes = self._listing()
        try:
            names, main = choose(sizes, self._file)
        except ModelNotFound as error:
            raise ModelNotFound(f"cannot open {self._id} of the hub: {error}") from None
        whole = sum(sizes[name] for name in names)
        done = 0
        path = Path()
        for n, name in enumerate(names):
            # The branch's name goes with one file, so that the cache knows its commit.
            revision = self._hub.revision if n == 0 else commit
            path = self._attempt(lambda: self._one(name, revision, done, whole))  # noqa: B023
            done += sizes[name]
            self._progress(done, whole)
        folder = path.parents[names[-1].count("/")]
        return folder / main if main else folder

    def _listing(self) -> tuple[str, dict[str, int]]:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=_endpoint(), token=self._token)
        info = self._attempt(
            lambda: api.model_info(self._id, revision=self._hub.revision, files_metadata=True)
        )
        commit = str(info.sha)
        if not _COMMIT.fullmatch(commit):
            raise ModelNotFound(f"the hub gives no commit for {self._id}; try again later")
        return commit, {file.rfilename: file.size or 0 for file in info.siblings or ()}

    def _one(self, name: str, revision: str, done: int, whole: int) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(
            hf_hub_download(
                self._id,
                name,
                revision=revision,
                token=self._token,
                endpoint=_endpoint(),
                cache_dir=_cache(),
                tqdm_class=_bar(lambda count: self._progress(min(done + count, whole), whole)),
            )
        )

    def _attempt(self, action: Callable[[], Any]) -> Any:
        """Do something on the hub; what fails gets the remedy."""
        from huggingface_hub import errors

        where = f"{self._id} at {self._hub.revision}"
        try:
            return action()
        except errors.GatedRepoError:
            problem = (
                f"the model {self._id} is gated: ask for access on its page, and give the token of "
                f"your account with --token-source ({TOKEN_SOURCES})"
            )
        except errors.RepositoryNotFoundError:
            problem = (
                f"the hub has no model {self._id}, or shows it to its members only: check the "
                "name, or give a token with --token-source; a local folder does not exist either"
            )
        except errors.RevisionNotFoundError:
            problem = f"the model {self._id} has no revision {self._hub.revision!r}"
        except Exception as error:
            # Whatever else, from the network to a full disk.
            raise ConnectionError(f"{where}: {_reason(error)}") from error
        raise ModelNotFound(problem)


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _bar(report: Callable[[int], None]) -> type[Any]:
    """A progress bar that shows nothing and reports the bytes so far."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]
            self.count = options.get("initial") or 0

        def update(self, n: float | None = 1) -> None:
            self.count += n or 0
            report(int(self.count))

    return Bar
