"""mistral.rs's TOML files that select a model, as the same data as flags and `Which` give.

no_kv_cache = true        # optional, as is tokenizer_json
[model]                   # the keys of a selector's flags, as snake_case
model_id = "owner/name"

[speculative]             # optional: a draft model
gamma = 32
[speculative.draft_model]
model_id = "owner/small"

[anymoe]                  # optional: experts made of several models
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squall.api.which import NUMBERS, Selection, VisionArchitecture, Which, chosen, vision_name
from squall.cli.options import read_text
from squall.errors import InvalidRequest
from squall.opening import DEFAULTS, Opening

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from squall.adapters.anymoe import AnyMoe

# The most special first; the first that has all keys, and all of whose required keys are there.
_KINDS: tuple[type[Selection], ...] = (
    Which.XLoraGGUF,
    Which.LoraGGUF,
    Which.XLoraGGML,
    Which.LoraGGML,
    Which.GGUF,
    Which.GGML,
    Which.XLora,
    Which.Lora,
    Which.VisionPlain,
    Which.Plain,
)
_VISION = set(map(vision_name, VisionArchitecture))


@dataclass(frozen=True)
class TomlSelection:
    """What a file selects. speculative: the draft model, and its tokens a step."""

    model: Selection
    speculative: tuple[Selection, int] | None = None
    anymoe: AnyMoe | None = None
    no_kv_cache: bool = False

    def opening(self, others: Opening = DEFAULTS) -> Opening:
        """How to open the model; raises UnsupportedModel for what Squall does not do yet."""
        others = replace(others, anymoe=self.anymoe)
        if self.speculative is not None:
            if others.draft is not None:
                raise InvalidRequest("--draft and [speculative] each name a draft; give one")
            draft, most = self.speculative
            own = draft.opening(Opening(hub=others.hub, progress=others.progress))
            others = replace(others, draft=own, draft_tokens=most)
        return self.model.opening(others)


def read_toml(path: Path) -> TomlSelection:
    """Read a file; raises InvalidRequest with what is wrong in it, and what could be there."""
    root = read_root(path)
    known = {"model", "tokenizer_json", "no_kv_cache", "speculative", "anymoe"}
    check_keys(root, "the file", known, {"model"})
    no_kv_cache = root.get("no_kv_cache", False)
    if type(no_kv_cache) is not bool:
        raise InvalidRequest(f"no_kv_cache is {no_kv_cache!r}; it must be true or false")
    tokenizer = root.get("tokenizer_json")
    if tokenizer is not None and not isinstance(tokenizer, str):
        raise InvalidRequest(f"tokenizer_json is {tokenizer!r}; it must be a path")
    model = _selection(root["model"], "[model]", tokenizer)
    draft = anymoe = None
    if "speculative" in root:
        given = _table(root["speculative"], "[speculative]")
        check_keys(given, "[speculative]", {"gamma", "draft_model"}, {"gamma", "draft_model"})
        if type(given["gamma"]) is not int or given["gamma"] < 1:
            raise InvalidRequest(f"gamma is {given['gamma']!r}; it must be a number from 1 on")
        section = "[speculative.draft_model]"
        draft = (_selection(given["draft_model"], section, tokenizer), given["gamma"])
    if "anymoe" in root:
        anymoe = _anymoe(_table(root["anymoe"], "[anymoe]"))
    return TomlSelection(model, draft, anymoe, no_kv_cache)


def read_root(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(path))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidRequest(f"{path} is not TOML: {error}") from None


def _selection(given: object, section: str, tokenizer: str | None) -> Selection:
    values = dict(_table(given, section))
    kinds = [kind for kind in _KINDS if _required(kind) <= values.keys() <= _allowed(kind)]
    if "max_edge" not in values and str(values.get("arch")).lower() not in _VISION:
        kinds = [kind for kind in kinds if kind is not Which.VisionPlain]
    if not kinds:
        lines = "; ".join(
            f"{kind.__name__}: {', '.join(sorted(_allowed(kind)))}" for kind in _KINDS
        )
        raise InvalidRequest(
            f"{section} has {', '.join(sorted(values)) or 'nothing'}, which no kind of model has "
            f"all of. The kinds and their keys: {lines}"
        )
    # GGML and GGUF have the same keys but for gqa, so the file's name tells.
    gguf = str(values.get("quantized_filename", ".gguf")).endswith(".gguf")
    ggml = "gqa" in values or not gguf
    kind = next((k for k in kinds if k.__name__.endswith("GGML") == ggml), kinds[0])
    for key, value in values.items():
        values[key] = _value(section, key, value)
    if tokenizer is not None and "tokenizer_json" in {item.name for item in fields(kind)}:
        values["tokenizer_json"] = tokenizer
    return kind(**values)


def _value(section: str, key: str, value: object) -> object:
    if (found := chosen(key, value, f"{key} in {section}")) is not value:
        return found
    kind, what = (int, "a number") if key in NUMBERS else (str, "a text")
    if type(value) is not kind:
        raise InvalidRequest(f"{key} in {section} is {value!r}; it must be {what}")
    return value


def _anymoe(given: Mapping[str, Any]) -> AnyMoe:
    from squall.adapters.anymoe import AnyMoe, FineTuned, LoraAdapter

    config = dict(_table(given.get("config", {}), "[anymoe.config]"))
    outer = {"dataset_json", "prefix", "mlp", "model_ids", "layers"}
    check_keys(given, "[anymoe]", outer | {"config"}, (outer - {"layers"}) | {"config"})
    inner = {item.name for item in fields(AnyMoe)} - outer
    check_keys(config, "[anymoe.config]", inner, {"hidden_size", "expert_type"})
    if (expert := config["expert_type"]) == "fine_tuned":
        config["expert_type"] = FineTuned()
    else:
        adapter = _table(_table(expert, "expert_type").get("lora_adapter"), "lora_adapter")
        names = {item.name for item in fields(LoraAdapter)}
        check_keys(adapter, "lora_adapter", names, names)
        config["expert_type"] = LoraAdapter(**adapter)
    return AnyMoe(**config, **{key: given[key] for key in outer & given.keys()})


def _allowed(kind: type[Selection]) -> set[str]:
    return {item.name for item in fields(kind)} - {"tokenizer_json"}


def _required(kind: type[Selection]) -> set[str]:
    return {item.name for item in fields(kind) if item.default is MISSING}


def _table(given: object, what: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise InvalidRequest(f"{what} is {given!r:.99}; it must be a table")
    return given


def check_keys(
    given: Mapping[str, object], what: str, known: Collection[str], needed: set[str]
) -> None:
    """Raises InvalidRequest for a key that nobody knows, and for one that lacks."""
    if wrong := sorted(given.keys() - set(known)):
        raise InvalidRequest(
            f"{what} has {', '.join(wrong)[:200]}; known: {', '.join(sorted(known))}"
        )
    if missing := sorted(needed - given.keys()):
        raise InvalidRequest(f"{what} lacks {', '.join(missing)}")
