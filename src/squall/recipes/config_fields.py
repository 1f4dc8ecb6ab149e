"""A config.json: what transformers calls things, and what of it changes no result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from squall.checkpoints.base import Tensor
from squall.errors import InvalidCheckpoint
from squall.recipes.fields import Fields
from squall.recipes.names import Naming

# The key of GGUF files, by which the shared parts ask -> those of config.json; the first there is.
KEYS: Mapping[str, tuple[str, ...]] = {
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "norm_epsilon"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "block_count": ("num_hidden_layers",),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_used_count": ("num_experts_per_tok",),
    "feed_forward_length": ("intermediate_size",),
}
# Of training, of generation, of Python objects. Objects in config.json by their first key.
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path architectures
    attention_dropout attn_implementation attn_pdrop auto_map bos_token_id
    cache_implementation classifier_dropout decoder_start_token_id do_sample dtype
    embd_pdrop embedding_dropout eos_token_id hidden_dropout id2label initializer_range
    input_jitter_noise is_decoder label2id max_length max_window_layers model_max_length
    model_type output_attentions output_hidden_states output_router_logits pad_token_id
    pretraining_tp problem_type quantization_config resid_pdrop residual_dropout return_dict
    router_aux_loss_coef router_jitter_noise task_specific_params temperature
    tokenizer_class top_k top_p torch_dtype transformers_version unk_token_id unsloth_fixed
    unsloth_version use_cache
    """.split()  # noqa: SIM905
)
NEUTRAL = (0, "", "none")  # 0 also equals False and 0.0
NEUTRAL_BY_KEY: Mapping[str, tuple[object, ...]] = {
    "layer_switch": (4,),  # these are of Cohere2, all that were published the same
    "order_of_interleaved_layers": ("local_attn_first",),
    "position_embedding_type": ("rope_gptj",),
    "rotary_pct": (1,),
    "use_embedding_sharing": (True,),
    "use_gated_activation": (True,),
    "use_parallel_block": (True,),
    "use_parallel_embedding": (True, False),
    "activation_function": ("gelu_pytorch_tanh",),  # these are of Starcoder2
    "mlp_type": ("default",),
    "norm_type": ("layer_norm",),
}


class ConfigFields(Fields):
    """The values of config.json; those of objects in it by dotted keys: `rope_scaling.factor`.

    defaults: what the class of transformers takes where a key is missing (null is not missing).
    """

    def __init__(
        self,
        config: Mapping[str, object],
        tensors: Mapping[str, Tensor],
        defaults: Mapping[str, object],
        naming: Naming,
    ) -> None:
        missing = {key: value for key, value in defaults.items() if key not in config}
        super().__init__(missing | dict(_flatten(config)), tensors)
        self.naming = naming

    def key(self, key: str) -> str:
        names = KEYS.get(key, (key,))
        return next((name for name in names if name in self._values), names[0])

    def shown(self, key: str) -> str:
        return self.key(key)

    def has_section(self, key: str) -> bool:
        """Whether there is an object of this name, and something in it."""
        return any(name.startswith(f"{key}.") for name in self._values)

    def _is_harmless(self, key: str, value: object) -> bool:
        if key.split(".")[0] in HARMLESS or value == []:
            return True
        neutral = NEUTRAL_BY_KEY.get(key, NEUTRAL)
        return isinstance(value, int | float | str) and value in neutral


def _flatten(
    values: Mapping[str, object], prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, object]]:
    if depth > 8:
        raise InvalidCheckpoint(f"{prefix[:80]!r} in config.json is nested too deeply")
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.", depth + 1)
        elif value is not None:
            yield f"{prefix}{key}", value
