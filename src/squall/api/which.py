"""Which model a Runner opens, in mistral.rs's words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, cast

from squall.adapters.ordering import Ordering
from squall.checkpoints.hub import is_id
from squall.errors import InvalidRequest, ModelNotFound
from squall.opening import DEFAULTS, Opening
from squall.quant.isq import Dtype

Architecture = Enum(
    "Architecture", "Mistral Gemma Mixtral Llama Phi2 Phi3 Qwen2 Gemma2 Starcoder2 Phi3_5MoE"
)
VisionArchitecture = Enum(
    "VisionArchitecture",
    "Phi3V Idefics2 LLaVANext LLaVA VLlama Qwen2VL Idefics3 SmolVLM Qwen2_5VL Mistral3 Gemma3",
)
DiffusionArchitecture = Enum("DiffusionArchitecture", "Flux FluxOffloaded")
IsqOrganization = Enum("IsqOrganization", "Default MoQE")
ModelDType = Enum("ModelDType", "Auto BF16 F16 F32")
ImageGenerationResponseFormat = Enum("ImageGenerationResponseFormat", "Url B64Json")


@dataclass(frozen=True)
class Selection(ABC):
    """A kind of model."""

    @abstractmethod
    def opening(self, others: Opening = DEFAULTS) -> Opening:
        """How to open it, with `others` where it says nothing."""


# Fields of kinds that are numbers, with the least, and those that are one of several.
NUMBERS = {"gqa": 1, "max_edge": 1, "tgt_non_granular_index": None}
_CHOICES: dict[str, type[Enum]] = {"dtype": ModelDType, "organization": IsqOrganization}


def chosen(field: str, given: object, where: str) -> Any:
    """A field's value by its name, where it is one of several."""
    if field not in _CHOICES:
        return given
    known = {name.lower(): member for name, member in _CHOICES[field].__members__.items()}
    if str(given).lower() not in known:
        raise InvalidRequest(f"{where} is {given!r}; it must be one of {', '.join(known)}")
    return known[str(given).lower()]


def _name(of: Enum | str) -> str:
    return str(of.name if isinstance(of, Enum) else of).lower().replace("_", ".")


def vision_name(of: Enum | str) -> str:
    """What commands and recipes call an architecture of models that see."""
    others = {"LLaVANext": "llava_next", "Gemma3": "gemma3-vision"}
    return of if isinstance(of, str) else others.get(of.name) or _name(of)


Files = str | Sequence[str]


def _file_of(model: str, names: Sequence[str]) -> str | Path:
    """The first of the files of a folder, or of a model of the hub."""
    if not Path(model).is_dir() and is_id(model):
        return f"{model}:{names[0]}"
    missing = [name for name in names if not Path(model, name).is_file()]
    if missing:
        raise ModelNotFound(f"{', '.join(missing)} is not in {model!r}")
    return Path(model, names[0])


def _of_file(kind: Which.GGUF | Which.GGML, others: Opening, path: str | Path) -> Opening:
    return replace(
        others,
        path=path,
        tokenizer_from=kind.tok_model_id,
        topology=kind.topology or others.topology,
        dtype=cast(Dtype, _name(kind.dtype)),
    )


@dataclass(frozen=True, kw_only=True)
class _AdapterFields:
    """What kinds with adapters have beside, or unlike, those without."""

    xlora_model_id: str
    adapters_model_id: str
    order: str | None = None
    model_id: str | None = None
    tgt_non_granular_index: int | None = None


class _Adapted(Selection):
    """A kind with adapters. Where model_id is missing, the ordering file names the model.

    In a folder of floats adapters become part of the weights. Beside others, and where there are
    some to preload, they are kept apart, and requests choose.
    """

    plain: ClassVar[type[Selection]]

    def opening(self, others: Opening = DEFAULTS) -> Opening:
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        ordering = Ordering.read(given["order"])
        ordering.check_base(given.get("model_id") or given.get("tok_model_id"))
        if (is_folder := "model_id" in given) and given["model_id"] is None:
            given["model_id"] = ordering.base_model_id
            if ordering.base_model_id is None:
                raise InvalidRequest("which model? Give model_id, or base_model_id in the order")
        names = [item.name for item in fields(self.plain)]
        kind = self.plain(**{name: given[name] for name in names if name in given})
        opening = kind.opening(others)
        if "xlora_model_id" in given:
            from squall.adapters.xlora import XLora

            most = given["tgt_non_granular_index"]
            return replace(opening, xlora=XLora(given["xlora_model_id"], given["order"], most))
        adapters = ordering.places(given["adapters_model_id"])
        active = {name: 1.0 for name in adapters if name not in ordering.preload}
        alone = is_folder and not ordering.preload and not others.adapters
        return replace(
            opening,
            adapters={**(others.adapters or {}), **adapters},
            active={**(others.active or {}), **active},
            merge=others.merge or (None if alone else False),
        )


def _adapted(plain: type[Selection], name: str, order: str) -> type[Any]:
    """The kind `name`: some fields of `plain`, and those of adapters, in this order."""
    known = {item.name: item for of in (plain, _AdapterFields) for item in fields(of)}
    listed = [
        (word, known[word].type, field(default=known[word].default)) for word in order.split()
    ]
    made = make_dataclass(name, listed, bases=(_Adapted,), namespace={"plain": plain}, frozen=True)
    made.__module__, made.__qualname__ = __name__, f"Which.{name}"
    made.__doc__ = f"As {plain.__name__}, with {'X-LoRA' if name[0] == 'X' else 'LoRA adapters'}."
    return made


class Which:
    """The kinds of model; their fields are mistral.rs's, in its order."""

    @dataclass(frozen=True)
    class Plain(Selection):
        """Text models of a folder, or of the hub; `from_uqff` is a file in it."""

        model_id: str
        arch: Architecture | str | None = None
        tokenizer_json: str | None = None
        topology: str | None = None
        organization: IsqOrganization | None = None
        write_uqff: str | None = None
        from_uqff: str | None = None
        dtype: ModelDType = ModelDType.Auto

        def opening(self, others: Opening = DEFAULTS) -> Opening:
            named = _name(self.organization or IsqOrganization.Default)
            return replace(
                others,
                path=self.model_id,
                architecture=None if self.arch is None else _name(self.arch),
                tokenizer_json=self.tokenizer_json,
                topology=self.topology or others.topology,
                experts_only=chosen("organization", named, "organization") is IsqOrganization.MoQE,
                write_uqff=self.write_uqff,
                from_uqff=self.from_uqff,
                dtype=cast(Dtype, _name(self.dtype)),
            )

    @dataclass(frozen=True)
    class GGUF(Selection):
        """A GGUF file, or a split one.

        quantized_model_id: a folder, or a model of the hub. quantized_filename: a file in it, or
        all parts of one, as a list or with spaces between.
        tok_model_id: where tokenizer and chat template are, if not the file's own.
        """

        quantized_model_id: str
        quantized_filename: Files
        tok_model_id: str | None = None
        topology: str | None = None
        dtype: ModelDType = ModelDType.Auto

        def opening(self, others: Opening = DEFAULTS) -> Opening:
            """See `Selection`; of a split file the first part."""
            given = self.quantized_filename
            if isinstance(given, str):
                alone = Path(self.quantized_model_id, given).is_file()
                given = [given] if alone else given.split()
            names = sorted(given)
            if not names:
                raise ModelNotFound("quantized_filename is empty; name a file")
            return _of_file(self, others, _file_of(self.quantized_model_id, names))

    @dataclass(frozen=True)
    class GGML(Selection):
        """A file of GGUF's predecessor."""

        quantized_model_id: str
        quantized_filename: str
        tok_model_id: str | None = None
        tokenizer_json: str | None = None
        gqa: int = 1
        topology: str | None = None
        dtype: ModelDType = ModelDType.Auto

        def opening(self, others: Opening = DEFAULTS) -> Opening:
            """See `Selection`. Without a tokenizer_json, the file's own tokenizer is used."""
            path = _file_of(self.quantized_model_id, [self.quantized_filename])
            opening = _of_file(self, others, path)
            return replace(opening, gqa=self.gqa, tokenizer_json=self.tokenizer_json)

    Lora = _adapted(
        Plain, "Lora",
        "adapters_model_id order arch model_id tokenizer_json topology write_uqff from_uqff dtype",
    )  # fmt: skip
    XLora = _adapted(
        Plain, "XLora",
        "xlora_model_id order arch model_id tokenizer_json tgt_non_granular_index topology "
        "write_uqff from_uqff dtype",
    )  # fmt: skip
    LoraGGUF = _adapted(
        GGUF, "LoraGGUF",
        "quantized_model_id quantized_filename adapters_model_id order tok_model_id topology dtype",
    )  # fmt: skip
    XLoraGGUF = _adapted(
        GGUF, "XLoraGGUF",
        "quantized_model_id quantized_filename xlora_model_id order tok_model_id "
        "tgt_non_granular_index topology dtype",
    )  # fmt: skip
    LoraGGML = _adapted(
        GGML, "LoraGGML",
        "quantized_model_id quantized_filename adapters_model_id order tok_model_id "
        "tokenizer_json gqa topology dtype",
    )  # fmt: skip
    XLoraGGML = _adapted(
        GGML, "XLoraGGML",
        "quantized_model_id quantized_filename xlora_model_id order tok_model_id "
        "tgt_non_granular_index tokenizer_json gqa topology dtype",
    )  # fmt: skip

    @dataclass(frozen=True)
    class VisionPlain(Selection):
        """Models that see: as Plain, which opens them too; max_edge: see `Opening`."""

        model_id: str
        arch: VisionArchitecture | str | None = None
        tokenizer_json: str | None = None
        topology: str | None = None
        write_uqff: str | None = None
        from_uqff: str | None = None
        dtype: ModelDType = ModelDType.Auto
        max_edge: int | None = None

        def opening(self, others: Opening = DEFAULTS) -> Opening:
            names = ("tokenizer_json", "topology", "write_uqff", "from_uqff", "dtype")
            plain = Which.Plain(self.model_id, **{name: getattr(self, name) for name in names})
            arch = self.arch and vision_name(self.arch)
            return replace(plain.opening(others), architecture=arch, max_edge=self.max_edge)

    @dataclass(frozen=True)
    class DiffusionPlain(Selection):
        """Models that make images."""

        model_id: str
        arch: DiffusionArchitecture | str
        dtype: ModelDType = ModelDType.Auto

        def opening(self, others: Opening = DEFAULTS) -> Opening:
            names = {"Flux": "flux", "FluxOffloaded": "flux-offloaded"}
            arch = self.arch if isinstance(self.arch, str) else names[self.arch.name]
            dtype = cast(Dtype, _name(self.dtype))
            return replace(others, path=self.model_id, architecture=arch, dtype=dtype)
