"""How much noise a picture has at each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall.diffusion.transformer import SINUSOID
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.recipes.fields import Fields

Floats = NDArray[np.float32]
_LONGEST, _TIMES = 10000.0, 1000
_KIND = "FlowMatchEulerDiscreteScheduler"
# Of scheduler_config.json, what else it may say, in the one way that is known.
_FIXED = {"num_train_timesteps": _TIMES, "time_shift_type": "exponential", "_class_name": _KIND}
_STEEPEST = 50.0


class _Config(Fields):
    def _is_harmless(self, key: str, value: object) -> bool:
        return not value or value == _FIXED.get(key) or key == "_diffusers_version"


@dataclass(frozen=True, slots=True)
class Schedule:
    """Of flow matching: noise falls evenly, but is shifted so that more steps have much of it.

    shift: 1: not at all. dynamic: by e to the power of what grows linearly with a picture's rows,
        from `base_shift` at `base_image_seq_len` to `max_shift` at `max_image_seq_len`.
    """

    dynamic: bool
    shift: float = 1.0
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: float = 256
    max_image_seq_len: float = 4096

    @classmethod
    def of_config(cls, config: Mapping[str, object]) -> Schedule:
        """That of scheduler_config.json; refuses what is not known, by its name."""
        if (kind := config.get("_class_name")) != _KIND:
            raise UnsupportedModel(f"the scheduler is {kind!r}; Squall has {_KIND}")
        c = _Config({name: value for name, value in config.items() if value is not None}, {})
        usual: dict[str, Any] = {one.name: one.default for one in fields(cls)[1:]}
        numbers = {name: c.number(name, of, high=1e6) for name, of in usual.items()}
        made = cls(c.flag("use_dynamic_shifting", False), **numbers)
        c.check_all_read()
        if made.max_image_seq_len <= made.base_image_seq_len or made.max_shift > _STEEPEST:
            raise InvalidCheckpoint("the scheduler's sizes and shifts of pictures make no sense")
        return made

    def sigmas(self, steps: int, rows: int) -> list[float]:
        """The share of noise before each step, and after the last; rows: of the picture."""
        if self.dynamic:
            slope = self.max_shift - self.base_shift
            slope /= self.max_image_seq_len - self.base_image_seq_len
            mu = self.base_shift + slope * (rows - self.base_image_seq_len)
            shift = math.exp(min(mu, 500.0))
        else:
            shift = self.shift
        even = np.linspace(1, 0, steps + 1)
        return [float(t and shift * t / (1 + (shift - 1) * t)) for t in even]


def first_step(steps: int, strength: float) -> int:
    """The step to begin with for a picture that is to be made anew to this extent; 0: the first."""
    return min(int(steps - min(steps * strength, steps)), steps - 1)


def sinusoid(value: float) -> Floats:
    """A time from 0 to 1, or guidance, as sines and cosines, the cosines first: [1, SINUSOID]."""
    half = SINUSOID // 2
    frequencies = np.exp(-math.log(_LONGEST) * np.arange(half) / half)
    angles = _TIMES * value * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)])[None].astype(np.float32)
