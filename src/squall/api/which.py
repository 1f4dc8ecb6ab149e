"""Which model a Runner opens, in mistral.rs's words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import cast

from squall.checkpoints.hub import is_id
from squall.errors import InvalidRequest, ModelNotFound, UnsupportedModel
from squall.opening import DEFAULTS, Opening
from squall.quant.isq import Dtype

Architecture = Enum(
    "Architecture",
    "Mistral Gemma Mixtral Llama Phi2 Phi3 Qwen2 Gemma2 Starcoder2 Phi3_5MoE",
)
VisionArchitecture = Enum("VisionArchitecture", "Phi3V Idefics2 LLaVANext LLaVA VLlama Qwen2VL")
DiffusionArchitecture = Enum("DiffusionArchitecture", "Flux FluxOffloaded")
IsqOrganization = Enum("IsqOrganization", "Default MoQE")
ModelDType = Enum("ModelDType", "Auto BF16 F16 F32")
ImageGenerationResponseFormat = Enum("ImageGenerationResponseFormat", "Url B64Json")


class AnyMoeExpertType:
    """What the experts of AnyMoE are."""

    @dataclass(frozen=True)
    class FineTuned:
        """Whole feed-forward layers."""

    @dataclass(frozen=True)
    class LoraAdapter:
        """Adapters of the model's own layers."""

        rank: int
        alpha: float
        target_modules: Sequence[str]


@dataclass(frozen=True)
class AnyMoeConfig:
    """How AnyMoE makes experts of models."""

    hidden_size: int
    dataset_json: str
    prefix: str
    mlp: str
    model_ids: Sequence[str]
    expert_type: AnyMoeExpertType.FineTuned | AnyMoeExpertType.LoraAdapter
    layers: Sequence[int] = ()
    lr: float = 1e-3
    epochs: int = 100
    batch_size: int = 4
    gate_model_id: str | None = None
    training: bool = True
    loss_csv_path: str | None = None


class Selection:
    """A kind of model; some kinds are not there yet."""

    def opening(self, others: Opening = DEFAULTS) -> Opening:  # noqa: ARG002
        """How to open it, with `others` where it says nothing.

        Raises UnsupportedModel for a kind that is not there yet.
        """
        name = type(self).__name__
        raise UnsupportedModel(f"Which.{name} is not supported yet; Plain, GGUF and GGML are")


def _name(of: Enum | str) -> str:
    return str(of.name if isinstance(of, Enum) else of).lower().replace("_", ".")


Files = str | Sequence[str]


def _check_as_stored(topology: str | None, dtype: ModelDType) -> None:
    if topology is not None or dtype is not ModelDType.Auto:
        raise InvalidRequest("the file has its number formats; leave topology and dtype out")


def _file_of(model: str, names: Sequence[str]) -> str | Path:
    """The first of the files of a folder, or of a model of the hub."""
    if not Path(model).is_dir() and is_id(model):
        return f"{model}:{names[0]}"
    missing = [name for name in names if not Path(model, name).is_file()]
    if missing:
        raise ModelNotFound(f"{', '.join(missing)} is not in {model!r}")
    return Path(model, names[0])


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
            """See `Selection`."""
            return replace(
                others,
                path=self.model_id,
                architecture=None if self.arch is None else _name(self.arch),
                tokenizer_json=self.tokenizer_json,
                topology=self.topology or others.topology,
                experts_only=self.organization is IsqOrganization.MoQE,
                write_uqff=self.write_uqff,
                from_uqff=self.from_uqff,
                dtype=cast(Dtype, _name(self.dtype)),
            )

    @dataclass(frozen=True)
    class XLora(Selection):
        """Unquantized text models with adapters that they weigh themselves."""

        xlora_model_id: str
        order: str
        arch: Architecture | None = None
        model_id: str | None = None
        tokenizer_json: str | None = None
        tgt_non_granular_index: int | None = None
        topology: str | None = None
        write_uqff: str | None = None
        from_uqff: str | None = None
        dtype: ModelDType = ModelDType.Auto

    @dataclass(frozen=True)
    class Lora(Selection):
        """Unquantized text models with adapters."""

        adapters_model_id: str
        order: str
        arch: Architecture | None = None
        model_id: str | None = None
        tokenizer_json: str | None = None
        topology: str | None = None
        write_uqff: str | None = None
        from_uqff: str | None = None
        dtype: ModelDType = ModelDType.Auto

    @dataclass(frozen=True)
    class GGUF(Selection):
        """A GGUF file, or a split one.

        quantized_model_id: a folder, or a model of the hub. quantized_filename: a file in it, or
        all parts of one.
        tok_model_id: not needed, the file's own tokenizer and chat template are used.
        """

        quantized_model_id: str
        quantized_filename: Files
        tok_model_id: str | None = None
        topology: str | None = None
        dtype: ModelDType = ModelDType.Auto

        def opening(self, others: Opening = DEFAULTS) -> Opening:
            """See `Selection`; of a split file the first part."""
            _check_as_stored(self.topology, self.dtype)
            given = self.quantized_filename
            names = [given] if isinstance(given, str) else sorted(given)
            if not names:
                raise ModelNotFound("quantized_filename is empty; name a file")
            return replace(others, path=_file_of(self.quantized_model_id, names))

    @dataclass(frozen=True)
    class XLoraGGUF(Selection):
        """A GGUF file with adapters that the model weighs itself."""

        quantized_model_id: str
        quantized_filename: Files
        xlora_model_id: str
        order: str
        tok_model_id: str | None = None
        tgt_non_granular_index: int | None = None
        topology: str | None = None
        dtype: ModelDType = ModelDType.Auto

    @dataclass(frozen=True)
    class LoraGGUF(Selection):
        """A GGUF file with adapters."""

        quantized_model_id: str
        quantized_filename: Files
        adapters_model_id: str
        order: str
        tok_model_id: str | None = None
        topology: str | None = None
        dtype: ModelDType = ModelDType.Auto

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
            _check_as_stored(self.topology, self.dtype)
            path = _file_of(self.quantized_model_id, [self.quantized_filename])
            return replace(others, path=path, gqa=self.gqa, tokenizer_json=self.tokenizer_json)

    @dataclass(frozen=True)
    class XLoraGGML(Selection):
        """A GGML file with adapters that the model weighs itself."""

        quantized_model_id: str
        quantized_filename: str
        xlora_model_id: str
        order: str
        tok_model_id: str | None = None
        tgt_non_granular_index: int | None = None
        tokenizer_json: str | None = None
        gqa: int = 1
        topology: str | None = None
        dtype: ModelDType = ModelDType.Auto

    @dataclass(frozen=True)
    class LoraGGML(Selection):
        """A GGML file with adapters."""

        quantized_model_id: str
        quantized_filename: str
        adapters_model_id: str
        order: str
        tok_model_id: str | None = None
        tokenizer_json: str | None = None
        gqa: int = 1
        topology: str | None = None
        dtype: ModelDType = ModelDType.Auto

    @dataclass(frozen=True)
    class VisionPlain(Selection):
        """Models that see images."""

        model_id: str
        arch: VisionArchitecture
        tokenizer_json: str | None = None
        topology: str | None = None
        write_uqff: str | None = None
        from_uqff: str | None = None
        dtype: ModelDType = ModelDType.Auto
        max_edge: int | None = None

    @dataclass(frozen=True)
    class DiffusionPlain(Selection):
        """Models that make images."""

        model_id: str
        arch: DiffusionArchitecture
        dtype: ModelDType = ModelDType.Auto
