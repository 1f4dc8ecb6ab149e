"""Schedules against diffusers' scheduler and its pipelines."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline
from diffusers.models.embeddings import Timesteps
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from squall.diffusion.schedule import Schedule, first_step, sinusoid
from squall.errors import InvalidCheckpoint, UnsupportedModel

CONFIGS = {
    "schnell": {"shift": 1.0, "use_dynamic_shifting": False},
    "dev": {"shift": 3.0, "use_dynamic_shifting": True},
    "shifted": {"shift": 3.0, "use_dynamic_shifting": False},
    "other": {
        "use_dynamic_shifting": True, "base_shift": 0.3, "max_shift": 0.9,
        "base_image_seq_len": 64, "max_image_seq_len": 1000,
    },
}  # fmt: skip


def written(**config) -> dict[str, object]:
    """scheduler_config.json as diffusers writes it."""
    return json.loads(FlowMatchEulerDiscreteScheduler(**config).to_json_string())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", [1, 256, 1024, 3600, 4096, 16384])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_sigmas(name, rows, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(**CONFIGS[name])
    c = scheduler.config
    sizes = (c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    mu = calculate_shift(rows, *sizes)
    scheduler.set_timesteps(steps, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    found = Schedule.of_config(written(**CONFIGS[name])).sigmas(steps, rows)
    assert np.allclose(found, scheduler.sigmas.numpy(), atol=1e-6)
    assert (found[0], found[-1]) == (1, 0)


def test_without_a_file_they_are_those_of_schnell_and_dev():
    for dynamic, name in ((False, "schnell"), (True, "dev")):
        read = Schedule.of_config(written(**CONFIGS[name]))
        assert Schedule(dynamic).sigmas(9, 3600) == read.sigmas(9, 3600)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        ({"_class_name": None}, "None"),
        ({"shift_terminal": 0.02}, "shift_terminal"),
        ({"invert_sigmas": True}, "invert_sigmas"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"time_shift_type": "linear"}, "time_shift_type"),
        ({"stochastic_sampling": True}, "stochastic_sampling"),
        ({"num_train_timesteps": 500}, "num_train_timesteps"),
        ({"tomorrow": 3}, "tomorrow"),
    ],
)
def test_what_is_not_known_is_refused_by_name(changed, named):
    config = written()
    with pytest.raises(UnsupportedModel, match=named):
        Schedule.of_config(config | changed)


@pytest.mark.parametrize("value", ["3", float("nan"), math.inf, -1, 0, True, [1], 1e9])
def test_numbers_that_make_no_sense_are_refused(value):
    config = written()
    with pytest.raises(InvalidCheckpoint, match="shift"):
        Schedule.of_config(config | {"shift": value})
    with pytest.raises(InvalidCheckpoint, match="no sense"):
        Schedule.of_config(config | {"base_image_seq_len": 4096})
    assert all(map(math.isfinite, Schedule(True, max_shift=50.0).sigmas(3, 1 << 14)))


@pytest.mark.parametrize("steps", [1, 3, 4, 28, 50])
@pytest.mark.parametrize("strength", [1e-9, 0.01, 0.3, 0.5, 0.6, 0.95, 1.0])
def test_a_picture_begins_where_diffusers_begins_it(steps, strength):
    class Pipeline:
        scheduler = FlowMatchEulerDiscreteScheduler()

    Pipeline.scheduler.set_timesteps(steps)
    _, left = FluxImg2ImgPipeline.get_timesteps(Pipeline, steps, strength, "cpu")
    assert first_step(steps, strength) == steps - max(left, 1)


@pytest.mark.parametrize("value", [0.0, 0.001, 0.5, 1.0, 4.0])
def test_sinusoids(value):
    wanted = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(
        torch.tensor([1000 * value])
    )
    assert np.abs(sinusoid(value) - wanted.numpy()).max() < 5e-4  # float32 angles up to 4000
    assert sinusoid(value).shape == (1, 256)
