"""The flags for opening a model that all commands share, whichever kind of model it is."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squall.api.which import Which
from squall.checkpoints.hub import Hub, is_id
from squall.cli import options
from squall.cli.getting import get_default
from squall.cli.options import option
from squall.cli.selectors import Selected
from squall.errors import InvalidRequest
from squall.names import DEFAULT, resolve
from squall.opening import DEFAULTS, KvDtype, Opening, Weights
from squall.quant import Plan

if TYPE_CHECKING:
    from squall.diffusion.model import ImageModel
    from squall.model import Model


# The fields of flags for models of one kind alone.
OF_TEXT = """
    mmproj device_layers tensor_parallel kv_dtype adapter merge temperature top_k top_p min_p
    frequency_penalty presence_penalty repetition_penalty min_tokens dry_multiplier dry_base
    dry_allowed_length dry_range dry_sequence_breakers max_tokens stop system chat_template raw
    context draft json_schema grammar regex max_seqs max_queue queue_timeout adapter_folder
    image_memory adapter_memory kv_tokens kv_memory kv_fraction kv_block no_kv_cache prefix_cache_n
    prompt_batchsize truncate_sequence throughput
"""
OF_PICTURES = """
    t5 clip vae size steps guidance strength n output show image_folder image_age
"""
# The options of a model that makes pictures, if it is opened beside one of text.
SHARED = ("threads", "device", "exact", "hub", "t5", "clip", "vae")


@dataclass(frozen=True, kw_only=True)
class HubFlags:
    """How the hub is used."""

    revision: options.Revision = "main"
    token_source: options.TokenSource = "cache"
    offline: bool = option(False, "--offline", help="Use the hub's cache; no connection.")

    @property
    def hub(self) -> Hub:
        return Hub(self.revision, self.token_source, self.offline)


@dataclass(frozen=True, kw_only=True)
class PartFlags:
    """Where parts of models that make pictures are, if not with the model."""

    t5: str | None = option(
        None, metavar="PATH_OR_ID",
        help="The first encoder of texts of a model that makes pictures.",
    )  # fmt: skip
    clip: str | None = option(None, metavar="PATH_OR_ID", help="The second one.")
    vae: str | None = option(None, metavar="PATH_OR_ID", help="What decodes its pictures.")


@dataclass(frozen=True, kw_only=True)
class FileFlags(PartFlags, HubFlags):
    """Which model, of whichever kind, whose files are looked at."""

    words: options.Model = None
    file: options.File = None
    model: options.Folder = None
    as_json: options.Json = False

    @property
    def opening(self) -> Opening:
        """How the files are found."""
        check_one(self.words, self.model, self.file)
        name = self.words or self.file or self.model
        return Opening(name, t5=self.t5, clip=self.clip, vae=self.vae, hub=self.hub)


@dataclass(frozen=True, kw_only=True)
class ModelFlags(HubFlags):
    """Which model, and what becomes of its weights.

    A flag of these and of the commands that has the name of an option of `Opening` sets it.
    """

    file: options.File = None
    model: options.Folder = None
    mmproj: str | None = option(
        None, "--mmproj", metavar="FILE|none",
        help="The tower that a GGUF model sees with; by default the one beside it.",
    )  # fmt: skip
    isq: str | None = option(
        None, "--isq", help="Quantize a model of float weights: Q4K, Q8_0, HQQ4, FP8... or bits."
    )
    topology: Path | None = option(None, help="A YAML file: quantization by layer.")
    threads: options.Threads = None
    device: options.DeviceOption = "cpu"
    device_layers: options.DeviceLayers = None
    exact: options.Exact = True
    tensor_parallel: options.TensorParallel = None
    weights: Weights = option("packed", help="f32: the file's exact values, for comparisons; slow.")
    kv_dtype: KvDtype = option("f16", help="KV cache; q8_0 takes half the memory, costs little.")
    adapter: list[str] | None = option(
        None, metavar="[NAME=]PATH[@WEIGHT]",
        help="A LoRA adapter: a folder, owner/name, or a GGUF file; several may be given.",
    )  # fmt: skip
    yes: options.Yes = False
    merge: bool = option(
        False, "--merge", help="Make the adapters part of the weights, which are floats."
    )

    @property
    def adapts_all(self) -> bool:
        """Whether adapters are for whatever is asked, and not chosen by requests."""
        return True

    def open(self, selected: Selected, others: Opening = DEFAULTS) -> Model:
        """The model, with `others` where no flag says more; a terminal is told how far it is."""
        from squall.model import Model

        with options.progress("loading") as shown:
            opening = self.opening(selected, replace(others, progress=shown))
            model = Model.open_with(opening)
        if opening.isq is not None or opening.topology is not None:
            sys.stderr.write(f"{_formats(model)}\n")
        return model

    def opening(self, selected: Selected, others: Opening = DEFAULTS) -> Opening:
        if self.makes_pictures(selected):
            raise InvalidRequest(
                "this model makes pictures, which is for squall run, serve, quantize and inspect; "
                "name a model of text"
            )
        others_own = OF_PICTURES.split()  # of the model beside this one
        given = {name: value for name, value in self.given().items() if name not in others_own}
        if found := torchrun():
            given.setdefault("tensor_parallel", found[1])
        given["command"] = tuple(sys.orig_argv[1:])
        if self.adapter:
            weighted = named_adapters(self.adapter)
            given["adapters"] = {name: path for name, (path, _) in weighted.items()}
            weights = {name: weight for name, (_, weight) in weighted.items()}
            if self.adapts_all or self.merge:
                given["active"] = weights
            elif set(weights.values()) != {1.0}:
                raise InvalidRequest("--adapter: requests choose the weights; leave them out")
        opening = self._chosen(selected, replace(others, **given))
        as_stored = opening.isq is None and opening.topology is None
        return opening if as_stored or opening.from_uqff is not None else _of_floats(opening)

    def given(self) -> dict[str, Any]:
        """The options that flags of their names set, and the hub."""
        named = {item.name: vars(self).get(item.name) for item in fields(Opening)}
        given = {name: value for name, value in named.items() if value is not None}
        return given | {"hub": self.hub}

    def makes_pictures(self, selected: Selected) -> bool:
        """Whether the model is one of pictures."""
        path = selected or self.file or self.model
        if not isinstance(path, str):
            return isinstance(selected, Which.DiffusionPlain)
        return makes_pictures(path)

    def open_pictures(
        self, selected: Selected, name: str | None = None, beside: Model | None = None
    ) -> ImageModel:
        """The model that makes pictures; a terminal is told how far it is.

        name: it is this one, `beside` a model of text, whose flags the others are.
        """
        from squall.diffusion.model import ImageModel

        given = self.given()
        with options.progress("loading") as shown:
            if beside is None:
                opening = self._chosen(selected, Opening(progress=shown, **given))
                return ImageModel.open_with(opening)
            shared = {option: given[option] for option in SHARED if option in given}
            opening = Opening(name, progress=shown, **shared)
            return ImageModel.open_with(opening, pool=beside.executor.pool)

    def check_kind(self, *, text: bool, pictures: bool) -> None:
        """Raises InvalidRequest for flags that the models at hand can make no use of."""
        useless = ("" if text else OF_TEXT) + ("" if pictures else OF_PICTURES)
        for item in fields(self):
            if item.name in useless.split() and getattr(self, item.name) != item.default:
                kind = "pictures" if text else "text"
                flag = item.name.replace("_", "-")
                raise InvalidRequest(f"--{flag} is for models that make {kind}; leave it out")

    def _chosen(self, selected: Selected, others: Opening) -> Opening:
        check_one(self.file, self.model, selected)
        if selected is None or isinstance(selected, str):
            path = selected or self.file or self.model
            if path in (None, DEFAULT):
                get_default(self.yes)
            return replace(others, path=path)
        return selected.opening(others)


@dataclass(frozen=True, kw_only=True)
class PictureFlags(PartFlags, ModelFlags):
    """For models of both kinds."""


def makes_pictures(path: str) -> bool:
    """Whether a file, a folder or a model of the hub, going by its name, makes pictures."""
    from squall.diffusion.files import is_image_model

    path = path if os.path.exists(path) else resolve(path)
    on_hub = is_id(path) and not os.path.exists(path)
    return is_image_model(path) or (on_hub and re.search(r"flux\W?1", path.lower()) is not None)


def torchrun() -> tuple[int, int] | None:
    """This process's rank, and how many there are, where torchrun has started it."""
    run, *numbers = (os.environ.get(n, "") for n in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"))
    if not run or not all(map(str.isdecimal, numbers)):
        return None
    rank, size = map(int, numbers)
    return rank, size


def check_one(*names: object) -> None:
    """Raises InvalidRequest where several names of a model are given."""
    if sum(name is not None for name in names) > 1:
        raise InvalidRequest("-f, -m and a kind each name a model; give one of them")


_ADAPTER = re.compile(r"(?:([^=/]+)=)?(.+?)(?:@(-?\d+(?:\.\d+)?))?")


def named_adapters(given: Iterable[str]) -> dict[str, tuple[str, float]]:
    """The path and weight of each, from PATH, NAME=PATH, or one of these with @WEIGHT."""
    found: dict[str, tuple[str, float]] = {}
    for text in given:
        match = None if os.path.exists(text) else _ADAPTER.fullmatch(text)
        name, path, weight = match.groups() if match else (None, text, None)
        name = name or os.path.basename(path.rstrip("/")).removesuffix(".gguf")
        if not name or name in found:
            raise InvalidRequest(f"--adapter {text}: give it a name of its own, as NAME=PATH")
        found[name] = path, float(weight or 1)
    return found


def _of_floats(opening: Opening) -> Opening:
    """What is to be quantized, here if it had to be fetched."""
    from squall.locate import locate

    path = locate(opening.path, opening.hub, opening.progress)
    if path.is_file() and Plan.of(opening.isq, opening.topology).quantizes:
        raise InvalidRequest(
            f"{path} has its number formats already; --isq and --topology are for folders "
            "of float weights (safetensors). Choose a GGUF file of the format you want"
        )
    return replace(opening, path=path)


def _formats(model: Model) -> str:
    parts = [
        f"{total.matrices} {total.format} ({total.nbytes / 2**20:.1f} MiB)"
        for total in model.weight_formats
    ]
    return f"[weights: {', '.join(parts)}]"
