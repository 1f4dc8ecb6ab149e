"""Which model a Runner opens, in mistral.rs's words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from squall.errors import InvalidRequest, ModelNotFound, UnsupportedModel

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
    """A kind of model; most kinds are not there yet."""

    def path(self) -> Path:
        """The GGUF file to open."""
        name = type(self).__name__
        raise UnsupportedModel(f"Which.{name} is not supported yet; Which.GGUF is")


Files = str | Sequence[str]


class Which:
    """The kinds of model; their fields are mistral.rs's, in its order."""

    @dataclass(frozen=True)
    class Plain(Selection):
        """Unquantized text models."""

        model_id: str
        arch: Architecture | None = None
        tokenizer_json: str | None = None
        topology: str | None = None
        organization: IsqOrganization | None = None
        write_uqff: str | None = None
        from_uqff: str | None = None
        dtype: ModelDType = ModelDType.Auto

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

        quantized_model_id: a folder. quantized_filename: a file in it, or all parts of one.
        tok_model_id: not needed, the file's own tokenizer and chat template are used.
        """

        quantized_model_id: str
        quantized_filename: Files
        tok_model_id: str | None = None
        topology: str | None = None
        dtype: ModelDType = ModelDType.Auto

        def path(self) -> Path:
            """The file, or the first part of it."""
            if self.topology is not None or self.dtype is not ModelDType.Auto:
                raise InvalidRequest("topology and dtype are not supported yet; leave them out")
            given = self.quantized_filename
            names = [given] if isinstance(given, str) else sorted(given)
            paths = [Path(self.quantized_model_id, name) for name in names]
            missing = [str(path) for path in paths if not path.is_file()]
            if missing or not paths:
                raise ModelNotFound(
                    f"{', '.join(missing) or 'no file'} is not here, and Squall does not download "
                    "from a model hub yet. Download the GGUF file; quantized_model_id is its folder"
                )
            return paths[0]

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
