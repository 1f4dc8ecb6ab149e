"""Quantized on the way in or written to a GGUF file: the same tiles, so the same speed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from harness import Build
from test_uqff import logits, tokenizer_of_bytes
from tiny import RMS, Case

from squall import _native, convert
from squall.checkpoints import open_gguf
from squall.quant import FORMATS, Plan
from squall.quant.isq import TYPES, parse_type

# qwen2's rows of q and k lie the same way in both files.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
CASE = Case("qwen2-wide", "qwen2", "Qwen2ForCausalLM", RMS | WIDE)


@pytest.mark.parametrize(
    "isq", [name for name in TYPES if FORMATS[parse_type(name)].ggml_id is not None]
)
def test_isq_is_a_file_of_the_type(isq: str, built_folder: Build, tmp_path: Path) -> None:
    built, path, plan = built_folder(CASE), tmp_path / "m.gguf", Plan.of(isq)
    tokenizer_of_bytes(built.checkpoint.path, built.recipe.decoder.vocab)
    convert.write(built.checkpoint, built.recipe, plan, path, threads=2)
    read = open_gguf(path)
    np.testing.assert_array_equal(logits(built, read), logits(built, built.checkpoint, plan))
    for part, role in (("mlp.up_proj", "ffn_up"), ("self_attn.k_proj", "attn_k")):
        source = built.checkpoint.tensors[f"model.layers.1.{part}.weight"]
        written = read.tensors[f"blk.1.{role}.weight"]
        assert written.format == parse_type(isq)
        made = _native.quantize_tile("f32", source.data, *source.shape, written.format)
        packed = _native.pack(written.format, written.data, *written.shape)
        assert made.data == packed.data
