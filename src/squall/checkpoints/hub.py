"""Models of the Hugging Face hub: an id to files here, downloaded once by its library.

The listing of a repository decides what is fetched, and only names that are known to be needed
pass; so no name from a repository becomes a path. The server itself (HF_ENDPOINT) is trusted: the
library names files of the cache after its ETags. A model in the cache is opened without a
connection if `offline` says so.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from squall.errors import InvalidRequest, ModelNotFound
from squall.files import read_json

Progress = Callable[[int, int], None]
Judge = Callable[[Mapping[str, object]], None]

STALE_S = 3600.0  # since something was written to what is downloaded
TOKEN_SOURCES = "literal:TOKEN, env:VARIABLE, path:FILE, cache, none"
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
_ID = re.compile(rf"{_PART}/{_PART}")
_REVISION = re.compile(rf"{_PART}(/{_PART}){{0,8}}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OF = re.compile(r"-(\d{5})-of-(\d{5})\.")
_CONFIGURATION = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens"
    r"|chat_template|processor_config|preprocessor_config|modules|config_sentence_transformers"
    r"|sentence_(bert|roberta)_config)\.json|chat_template\.jinja"
    r"|additional_chat_templates/[A-Za-z0-9_-]+\.jinja"
    # Of models that embed: BERT's vocabulary, and what follows the transformer.
    r"|vocab\.txt|\d{1,2}_[A-Za-z]{1,30}/(config\.json|model\.safetensors)"
)
# Of models that make pictures: the parts of a pipeline, and what is FLUX.1's own layout.
_PICTURES = re.compile(
    r"model_index\.json|scheduler/scheduler_config\.json"
    r"|tokenizer(_2)?/(tokenizer\.json|vocab\.json|merges\.txt)"
    r"|(text_encoder(_2)?|transformer|vae)/(config\.json|residual\.safetensors"
    r"|(model|diffusion_pytorch_model)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
    rf"|{_PART}\.uqff)"
)
_FLUX = re.compile(r"flux\d{1,3}-[a-z]{1,20}\.safetensors|ae\.safetensors")
# What can be fetched alone: a tokenizer, and files that are one part of such a model.
_LONE = re.compile(
    rf"({_PART})?tokenizer\.json|(flux\d|ae\b|t5xxl|clip_l)[A-Za-z0-9_.-]{{0,80}}\.safetensors"
)
_GGUF = re.compile(rf"({_PART}/)?{_PART}\.gguf")
# What adapters have, one or in folders several, what weighs them (X-LoRA), and gates of AnyMoE.
_ADAPTERS = re.compile(
    rf"({_PART}/)?(adapter_config\.json|adapter_model\.(safetensors|bin)|gate\.safetensors"
    r"|xlora_config\.json|xlora_classifier\.safetensors)"
)
# The first kind that a repository has is fetched.
_WEIGHTS = (
    re.compile(
        r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
        r"|t5_xxl-shard-\d\.safetensors"
    ),
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
        _token_source(self.token_source)

    def path(self, name: str | os.PathLike[str]) -> Path:
        """What has this path, or what `fetch` gets where nothing has and it can be a name."""
        path = Path(os.path.expanduser(name))
        return path if os.path.exists(path) or not is_id(str(name)) else self.fetch(str(name))

    def fetch(
        self,
        name: str,
        progress: Progress | None = None,
        judge: Judge | None = None,
        *,
        mmproj: bool = False,
        skip: tuple[str, ...] = (),
    ) -> Path:
        """The folder of the model `owner/name`, or the file of `owner/name:file`.

        file: a GGUF file of the repository, or a part of its name such as `Q4_K_M`; or a part of a
        model that makes pictures, such as `ae.safetensors`. Downloads
        what is not in the cache, and calls `progress` with bytes done and bytes in all. Before,
        `judge` gets what the hub knows of the model, keys of config.json or of GGUF metadata, and
        may raise. mmproj: the tower of a GGUF model comes too, if it has one. skip: what names of
        files begin with that are not needed. Raises ModelNotFound if the model cannot be had.
        """
        from huggingface_hub import constants

        id, _, file = name.partition(":")
        _check(_ID, id, "model id", "owner/name of letters, digits, '-', '_' and '.'")
        if self.offline or constants.HF_HUB_OFFLINE:
            found = self._cached(id, file, skip)
            if found is None:
                raise ModelNotFound(
                    f"{name} is not, or not wholly, in the cache of the hub, and --offline (or "
                    "HF_HUB_OFFLINE) forbids to download it; leave that out once"
                )
            return found
        try:
            download = _Download(self, id, file, progress or (lambda *_: None))
            return download.run(judge, mmproj, skip)
        except ConnectionError as error:
            found = self._cached(id, file, skip)
            if found is None:
                raise ModelNotFound(f"cannot download {name}: {error}") from None
            return found

    def _cached(self, id: str, file: str, skip: tuple[str, ...]) -> Path | None:
        """What the cache has for `file`, or None unless it has all of it."""
        from huggingface_hub import constants

        folder = snapshot(_folder_of(Path(constants.HF_HUB_CACHE), id), self.revision)
        return None if folder is None else _in_folder(folder, file, skip)


def _folder_of(cache: Path, id: str) -> Path:
    return cache / f"models--{id.replace('/', '--')}"


def id_of(repository: Path) -> str:
    return repository.name.removeprefix("models--").replace("--", "/")


def name_of(path: Path) -> str:
    """What a model is called: by its file or folder, or as its repository of the cache."""
    path = path.absolute()
    if path.is_file():
        return path.stem
    return id_of(path.parents[1]) if path.parent.name == "snapshots" else path.name


def snapshot(repository: Path, revision: str) -> Path | None:
    """The folder of a repository of the cache at a revision."""
    try:
        commit = (repository / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        commit = revision
    return repository / "snapshots" / commit if _COMMIT.fullmatch(commit) else None


def files_in(folder: Path) -> set[str]:
    """The names of the files of a folder and those below."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def is_id(name: str) -> bool:
    """Whether this could mean a model of the hub: `owner/name` or `owner/name:file`."""
    id, _, _ = name.partition(":")
    return _ID.fullmatch(id) is not None and ".." not in id and not id.endswith(".gguf")


def _check(pattern: re.Pattern[str], text: str, what: str, allowed: str) -> None:
    if not pattern.fullmatch(text) or ".." in text or "--" in text:
        raise InvalidRequest(f"{text[:100]!r} is no {what}; it must be {allowed}, without '..'")


def token(source: str) -> str | None:
    """The token that a token source says; None if it says none, or its place is empty.

    cache: what the hub's library would use, HF_TOKEN or what `hf auth login` has stored.
    """
    kind, value = _token_source(source)
    if kind == "literal":
        return value or None
    if kind == "env":
        return os.environ.get(value or "HUGGING_FACE_HUB_TOKEN") or None
    if kind == "path":
        try:
            return Path(value).expanduser().read_text(encoding="utf-8").strip() or None
        except (OSError, ValueError):
            return None
    if kind == "none":
        return None
    from huggingface_hub import get_token

    return get_token()


def _token_source(source: str) -> tuple[str, str]:
    kind, colon, value = source.partition(":")
    if kind not in (("literal", "env", "path") if colon else ("cache", "none")):
        raise InvalidRequest(f"the token source must be one of {TOKEN_SOURCES}")
    return kind, value


def _in_folder(folder: Path, file: str, skip: tuple[str, ...]) -> Path | None:
    """What a folder of the cache has for `file`, or None unless it has all of it."""
    names = files_in(folder)
    try:
        chosen, main = choose(names, file, skip=skip)
    except ModelNotFound:
        return None
    whole = all(part in names for name in chosen for part in parts_of(name))
    return (folder / main if main else folder) if whole else None


def parts_of(name: str) -> list[str]:
    """The names of the whole set of files that a file is one of, such as 00002-of-00003."""
    of = _OF.search(name)
    last = 1 if of is None else min(int(of[2]), 10_000)
    return [_OF.sub(rf"-{n:05}-of-\2.", name) for n in range(1, last + 1)]


def is_mmproj(name: str) -> bool:
    return "mmproj" in name.lower()


def tower(names: Collection[str]) -> list[str]:
    """Of a repository's files the mmproj one; of several that with f16, as they are the same."""
    found = sorted(n for n in names if _GGUF.fullmatch(n) and is_mmproj(n) and ".." not in n)
    half = [name for name in found if re.search("(?<!b)f16", name.lower())]
    return found if len(found) == 1 else half if len(half) == 1 else []


def choose(
    names: Collection[str], file: str, *, mmproj: bool = False, skip: tuple[str, ...] = ()
) -> tuple[list[str], str | None]:
    """Which files of a repository are needed; and the one to open, if it is one.

    mmproj: the tower that goes with it, too. skip: what others begin with.
    """
    names = [name for name in names if not name.startswith(skip)]
    if not file and (pictures := _pictures(names)):
        return pictures, None
    if file in names and _LONE.fullmatch(file) and ".." not in file:
        beside = filter(_CONFIGURATION.fullmatch, names) if file == "tokenizer.json" else [file]
        return sorted(beside), file
    if not file and (weights := folder_weights(names)):
        return sorted(filter(_CONFIGURATION.fullmatch, names)) + weights, None
    ggufs = sorted(name for name in names if _GGUF.fullmatch(name) and ".." not in name)
    first = [name for name in ggufs if (of := _OF.search(name)) is None or of[1] == "00001"]
    if not is_mmproj(file):
        first = [name for name in first if not is_mmproj(name)]
    found = [name for name in first if name == file] or [
        name for name in first if file.lower() in name.lower()
    ]
    if not found and (adapters := _adapters(names, file)):
        return adapters
    if len(found) != 1:
        raise ModelNotFound(
            f"it has {len(found)} GGUF models" + (f" named {file[:100]!r}" if file else "")
            + (f"; name one as owner/name:file, of {', '.join(first[:40])}" if first else
               ", and no model.safetensors or pytorch_model.bin")
        )  # fmt: skip
    more = tower(names) if mmproj and not is_mmproj(found[0]) else []
    return [part for part in parts_of(found[0]) if part in names] + more, found[0]


def _pictures(names: Collection[str]) -> list[str]:
    """The files of a model that makes pictures, of one layout; none if it is none."""
    parts = sorted(name for name in names if _PICTURES.fullmatch(name) and ".." not in name)
    weights = (".safetensors", ".uqff")
    if any(name.startswith("transformer/") and name.endswith(weights) for name in parts):
        return parts
    own = sorted(filter(_FLUX.fullmatch, names))
    return parts + own if any(name != "ae.safetensors" for name in own) else []


def _adapters(names: Collection[str], file: str) -> tuple[list[str], str | None] | None:
    """The files of adapters, or of one, and its folder: that whose name has `file`."""
    found = sorted(name for name in names if _ADAPTERS.fullmatch(name) and ".." not in name)
    folders = {name.rpartition("/")[0] for name in found}
    chosen = [folder for folder in folders if file in folder]
    if not file or not chosen:
        own = [name for name in found if not file or "/" not in name]
        return (own, None) if own and (not file or "adapter_config.json" in own) else None
    if file not in chosen and len(chosen) > 1:
        return None
    folder = file if file in chosen else chosen[0]
    return [name for name in found if name.startswith(f"{folder}/")], folder


def folder_weights(names: Collection[str]) -> list[str]:
    """Of the files of a model, those that transformers would take weights from."""
    for kind in _WEIGHTS:
        weights = sorted(name for name in names if kind.fullmatch(name))
        if any(not name.endswith(".json") for name in weights):
            return weights
    return []


class _Download:
    """The files of one repository, at one commit."""

    def __init__(self, hub: Hub, id: str, file: str, progress: Progress) -> None:
        self._hub = hub
        self._id = id
        self._file = file
        self._progress = progress
        self._options: dict[str, Any] = {
            "revision": hub.revision,
            "token": token(hub.token_source) or False,
        }

    def run(self, judge: Judge | None, mmproj: bool, skip: tuple[str, ...]) -> Path:
        """Raises ConnectionError where the hub could not be asked."""
        from huggingface_hub import HfApi, snapshot_download

        id, options = self._id, self._options.copy()
        info = self._attempt(lambda: HfApi().model_info(id, files_metadata=True, **options))
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        if not _COMMIT.fullmatch(str(info.sha)):
            raise ModelNotFound(f"the hub gives no commit for {self._id}; try again later")
        try:
            names, main = choose(sizes, self._file, mmproj=mmproj, skip=skip)
        except ModelNotFound as error:
            raise ModelNotFound(f"cannot open {self._id} of the hub: {error}") from None
        if judge is not None:
            judge(_known(info, main) or self._configuration(names))
        whole, stopped = sum(sizes[name] for name in names), threading.Event()
        self._check_space(sizes, names, str(info.sha))

        def count(done: int) -> None:
            if stopped.is_set():
                raise InterruptedError
            self._progress(min(done, whole), whole)

        options |= {"allow_patterns": names, "tqdm_class": _bar(count)}
        fetch = partial(_apart, partial(snapshot_download, id, **options), stopped)
        folder = Path(self._attempt(fetch))
        if folder.name != info.sha or not all((folder / name).is_file() for name in names):
            raise ConnectionError(f"{self._id} changed while it was downloaded, or came in part")
        self._progress(whole, whole)
        return folder / main if main else folder

    def _configuration(self, names: list[str]) -> Mapping[str, object]:
        from huggingface_hub import hf_hub_download

        if "config.json" not in names:
            return {}
        fetch = partial(hf_hub_download, self._id, "config.json", **self._options)
        return read_json(Path(self._attempt(fetch))) or {}

    def _check_space(self, sizes: Mapping[str, int], names: list[str], commit: str) -> None:
        """Raises ModelNotFound if what is to come does not fit the disk of the cache."""
        from huggingface_hub import constants

        cache = Path(constants.HF_HUB_CACHE)
        root = _folder_of(cache, self._id)
        missing = sum(sizes[n] for n in names if not (root / "snapshots" / commit / n).is_file())
        begun = 0
        for file in root.glob("blobs/*.incomplete"):
            stat = file.stat()
            if file.name.count(".") == 1:
                begun += stat.st_size
            # Named at random, so that nothing goes on with it.
            elif stat.st_mtime < time.time() - STALE_S:
                file.unlink(missing_ok=True)
        free = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists())).free
        if missing - begun > free:
            raise ModelNotFound(
                f"{self._id} needs {missing / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free "
                f"where {cache} is; remove something (squall rm), or set HF_HOME to another disk"
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
                f"your account in HF_TOKEN or with --token-source ({TOKEN_SOURCES})"
            )
        except errors.RepositoryNotFoundError:
            problem = (
                f"the hub has no model {self._id}, or shows it to its members only: check the "
                "name, or give a token in HF_TOKEN or with --token-source; a local folder does not "
                "exist either"
            )
        except errors.RevisionNotFoundError:
            problem = f"the model {self._id} has no revision {self._hub.revision!r}"
        except Exception as error:
            # Whatever else, from the network to a full disk.
            if getattr(getattr(error, "response", None), "status_code", None) not in (401, 403):
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                raise ConnectionError(f"{where}: {reason}") from error
            given = "the token given" if self._options["token"] else "a request without a token"
            problem = (
                f"the hub refuses {given} for {self._id}: give one that may read it in HF_TOKEN or "
                f"with --token-source ({TOKEN_SOURCES})"
            )
        raise ModelNotFound(problem)


def _apart(action: Callable[[], Any], stopped: threading.Event) -> Any:
    """Do it in a thread of its own, as the library, interrupted, waits for what it downloads."""
    done: Future[Any] = Future()

    def act() -> None:
        try:
            done.set_result(action())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=act, daemon=True).start()
    try:
        return done.result()
    except KeyboardInterrupt:
        stopped.set()
        raise


def _known(info: Any, gguf: str | None) -> Mapping[str, object]:
    """What a listing says of a model, in the words of its own files."""
    if gguf is None:
        return info.config if isinstance(info.config, dict) else {}
    found = info.gguf if isinstance(getattr(info, "gguf", None), dict) else {}
    name = found.get("architecture", "clip")  # which may be that of its tower
    return {} if name == "clip" else {"general.architecture": name}


def _bar(report: Callable[[int], None]) -> type[Any]:
    """A progress bar that shows nothing and reports the bytes that are here so far."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            # There are others, of files and of bytes on their way.
            self.counts = options.get("name") == "huggingface_hub.snapshot_download"
            self.count, self.lock = 0, threading.Lock()
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            if self.counts:
                with self.lock:
                    self.count += int(n or 0)
                    report(self.count)

    return Bar
