"""Popular repositories' config.json, as published but for sizes: all open as in transformers.

A model of random weights is saved from what transformers makes of the file; the file beside it
stays as it was published.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import distance, run
from published_configs import PUBLISHED, reduced

from native_executor import native
from squall.checkpoints.folder import open_folder
from squall.decoder import compile
from squall.recipes import config, load

TOKENS = np.random.default_rng(3).integers(3, 128, 24).tolist()

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_there_are_many_and_of_every_architecture() -> None:
    assert len(PUBLISHED) >= 60
    used = {name for values in PUBLISHED.values() for name in values["architectures"]}
    of_text = {name: e.function for name, e in config.RECIPES.items() if name not in config.SEERS}
    found = {config.RECIPES[name].function for name in used}
    assert found == set(of_text.values())


def opened_by_transformers(folder: Path) -> Any:
    """The model that transformers makes of a folder with nothing but a config.json."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(5)
    known = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(known, attn_implementation="eager", dtype="float32")
    for name, weight in model.eval().named_parameters():
        scale = 0.3 if weight.dim() == 1 else weight.shape[-1] ** -0.5
        weight.data.normal_(0.0, scale).add_("norm" in name and weight.dim() == 1)
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    import torch

    text = json.dumps(reduced(PUBLISHED[name]))
    (tmp_path / "config.json").write_text(text)
    model = opened_by_transformers(tmp_path)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with torch.no_grad():
        wanted = model(torch.tensor([TOKENS])).logits[0].numpy()

    checkpoint = open_folder(tmp_path)
    recipe = load(checkpoint)
    program = compile(recipe.decoder, recipe.names, context=64)
    executor = native(program, checkpoint, blocks=16, kv_dtype="f32", threads=1)
    assert distance(run(executor, TOKENS, [9, 1, 14]), wanted) < 1e-5
