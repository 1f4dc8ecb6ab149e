"""Writes src/squall/recipes/config_keys.json: the keys of config.json that transformers reads.

Per architecture: `reads`, the keys that can change what its model computes, with the value that
its class takes where one is missing; `known`, the others that its class declares; `aliases`, other
names of keys. Of the parts of models that see `reads` is all that their classes declare. Read from
the source of the installed transformers, whose version the file has.

    python tools/config_keys.py          # write
    python tools/config_keys.py --check  # end with 1 if it differs from the file
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[1] / "src/squall/recipes/config_keys.json"
# What the base class of all configurations and the shared code of rope and masks read.
SHARED = {
    "original_max_position_embeddings", "partial_rotary_factor", "per_layer_config",
    "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings",
}  # fmt: skip
# Of training, of losses, of generation, and of how the same numbers are computed.
WITHOUT_EFFECT = {
    "_attn_implementation", "attention_dropout", "bos_token_id", "embd_pdrop", "embedding_dropout",
    "eos_token_id", "hidden_dropout", "image_token_id", "initializer_range", "input_jitter_noise",
    "mm_tokens_per_image", "name_or_path", "num_labels", "output_router_logits", "pad_token_id",
    "pretraining_tp", "resid_pdrop", "residual_dropout", "router_aux_loss_coef", "token_type_ids",
    "use_cache",
}  # fmt: skip
# Of parts that see: of other heads than those that language models have.
UNUSED = {"initializer_factor", "projection_dim", "vision_use_head", "torch_dtype"}
# Of the text's keys without effect: what an image is.
OF_IMAGES = {"mm_tokens_per_image"}
# Whose parts are described, and the parts that models may have beside those.
SEEING = (
    "Gemma3", "Idefics2", "Idefics3", "Llava", "LlavaNext", "Mistral3", "Mllama", "Qwen2VL",
    "Qwen2_5_VL", "SmolVLM",
)  # fmt: skip
MORE_PARTS = (
    "CLIPVision", "SiglipVision", "PixtralVision", "CLIPText", "T5", "Bert", "Roberta",
    "XLMRoberta", "MPNet", "DistilBert", "Electra", "NomicBert", "ModernBert",
)  # fmt: skip
# Read by training alone, except in this architecture.
JITTER, WITH_JITTER = "router_jitter_noise", "phimoe"


def read_names(source: str, owner: str) -> set[str]:
    """Attributes of `owner` and of `self.config`, by `.` and by getattr; keys taken from kwargs."""
    found = set()
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        match node:
            case ast.Attribute(value=value, attr=name) if ast.unparse(value) in owner.split():
                found.add(name)
            case ast.Call(func=ast.Name("getattr"), args=[value, ast.Constant(str(name)), *_]):
                if ast.unparse(value) in owner.split():
                    found.add(name)
            case ast.Call(
                func=ast.Attribute(value=ast.Name("kwargs")), args=[ast.Constant(str(name)), *_]
            ):
                found.add(name)
    return found


def describe(architecture: str) -> dict[str, Any]:
    """What the table says of one class of transformers."""
    import transformers

    model = getattr(transformers, architecture)
    config = model.config_class
    text = type(config().get_text_config())
    module = inspect.getmodule(model)
    assert module is not None
    fields = {field.name: field.default for field in dataclasses.fields(text)}
    # Early files of models that see have the language model's keys beside these.
    whole = [config, *(getattr(config(), part) for part in config.sub_configs)]
    others = {field.name for part in whole for field in dataclasses.fields(part)} - fields.keys()
    own = {field.name for field in dataclasses.fields(config)}
    base = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    reads = read_names(inspect.getsource(module), "config self.config")
    reads |= read_names(inspect.getsource(text), "self")
    reads = reads & (fields.keys() - base) | (reads - fields.keys() - vars(text).keys()) | SHARED
    reads -= {name for name in reads if hasattr(transformers.PreTrainedConfig, name)} - SHARED
    reads -= others - SHARED
    reads -= WITHOUT_EFFECT if text.model_type == WITH_JITTER else {*WITHOUT_EFFECT, JITTER}
    reads -= {name for name in reads if name.startswith("_") or name.endswith("_config")} - SHARED
    defaults = {name: fields.get(name) for name in reads} | rope_defaults(text())
    return {
        "model_type": config.model_type,
        "reads": {name: defaults.get(name) for name in sorted(reads)},
        "known": sorted((fields.keys() | own) - reads - base),
        "aliases": dict(text.attribute_map),
    }


def describe_part(config: Any) -> dict[str, Any]:
    """What the table says of a configuration that is no language model's."""
    import transformers

    base = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    fields = {field.name for field in dataclasses.fields(config)} - base
    parts = {name for name in fields if name.endswith("_config")}
    known = (fields & (WITHOUT_EFFECT | UNUSED)) - OF_IMAGES | parts
    reads = {name: getattr(config, name) for name in fields - known}
    if rope := reads.get("rope_parameters"):
        none = dict.fromkeys(("head_dim", "rope_parameters", "rope_scaling"))
        near = rope.get("sliding_attention")
        reads |= none | {"rope_theta": rope.get("full_attention", rope)["rope_theta"]}
        if near:
            reads |= {"layer_types": None, "rope_local_base_freq": near["rope_theta"]}
    return {
        "reads": {name: reads[name] for name in sorted(reads)},
        "known": sorted(known | {"tie_word_embeddings"}),
        "aliases": dict(config.attribute_map),
    }


def parts() -> dict[str, Any]:
    """Those of models that see, by `model_type`, and what is said beside their parts."""
    import transformers

    configs = [getattr(transformers, f"{name}Config")() for name in (*MORE_PARTS, *SEEING)]
    inner = [
        type(getattr(config, part))()  # of which a model that gives no part has another
        for config in configs
        for part in config.sub_configs
        if part != "text_config"
    ]
    return {config.model_type: describe_part(config) for config in (*configs, *inner)}


def rope_defaults(config: Any) -> dict[str, Any]:
    """What a class takes for the rope, which is no field of it."""
    rope = config.rope_parameters
    near = rope.get("sliding_attention", {})
    rope = rope.get("full_attention", rope)
    found = {
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope.get("partial_rotary_factor"),
        "tie_word_embeddings": None,  # what the files hold says it
    }
    return found | ({"rope_local_base_freq": near["rope_theta"]} if near else {})


def table() -> dict[str, Any]:
    import transformers

    from squall.recipes.config import RECIPES

    base = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    theirs = [name for name in sorted(RECIPES) if hasattr(transformers, name)]
    # Names of their authors' classes, before transformers had its own.
    others = {
        name: {"same_as": next(own for own in theirs if RECIPES[own] == RECIPES[name])}
        for name in sorted(RECIPES.keys() - set(theirs))
    }
    return {
        "transformers": transformers.__version__,
        "known": sorted(base),
        "architectures": {name: describe(name) for name in theirs} | others,
        "parts": parts(),
    }


def main() -> int:
    text = json.dumps(table(), indent=1) + "\n"
    if "--check" in sys.argv[1:]:
        return int(PATH.read_text() != text)
    PATH.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
