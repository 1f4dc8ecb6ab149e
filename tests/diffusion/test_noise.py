"""Noise: the same bytes everywhere, normal, and laid out as diffusers packs latents."""

from __future__ import annotations

import hashlib
import math
import statistics

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from squall.diffusion.noise import (
    logarithm,
    normals,
    pack,
    packed,
    quantiles,
    uniforms,
    unpack,
)


def test_the_first_draws_never_change():
    assert normals(42, 4).tobytes().hex() == "f296cebe3e16d33f7e8209be7ba10040"
    assert normals(0, 2).tobytes().hex() == "46acc83ebe94e9bf"
    assert hashlib.sha256(normals(2**64 - 1, 100_000).tobytes()).hexdigest() == (
        "08ba8a12aabd16b56dfcb618e3a2597da0a0dfd89906e48af1498275f710ef14"
    )


def test_draws_are_keyed_by_seed_and_place():
    assert (normals(3, 10_000)[:100] == normals(3, 100)).all()
    assert (normals(3, 100) != normals(4, 100)).all()


def splitmix(x: int) -> int:
    word = 2**64 - 1
    x = x + 0x9E3779B97F4A7C15 & word
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & word
    x = (x ^ x >> 27) * 0x94D049BB133111EB & word
    return x ^ x >> 31


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63, 2**64 - 1])
def test_uniforms_are_those_that_tokens_are_drawn_by(seed):
    wanted = [(splitmix(splitmix(seed) ^ i) >> 12) + 0.5 for i in range(500)]
    assert (uniforms(seed, 500) == np.array(wanted) / 2**52).all()


def test_uniforms_are_never_0_or_1(monkeypatch):
    extremes = np.array([0, 2**64 - 1], np.uint64)
    monkeypatch.setattr("squall.diffusion.noise._mix", lambda x: extremes if len(x) == 2 else x)
    low, high = uniforms(0, 2)
    assert 0 < low < high < 1
    assert np.isfinite(quantiles(np.array([low, high]))).all()
    assert -low + 1 == high


def test_the_logarithm_is_that_of_the_c_library():
    random = np.random.default_rng(0)
    x = np.concatenate([np.exp(random.uniform(-700, 700, 20_000)), random.random(20_000)])
    wanted = np.array([math.log(value) for value in x])
    assert np.abs(logarithm(x) / wanted - 1).max() < 1e-15


def test_quantiles_are_those_of_the_standard_library():
    inverse = statistics.NormalDist().inv_cdf
    p = np.concatenate([uniforms(1, 20_000), [2.0**-53, 1 - 2.0**-53, 0.5, 0.075, 0.925, 1e-11]])
    wanted = np.array([inverse(value) for value in p])
    assert np.abs(quantiles(p) - wanted).max() < 1e-14


def test_draws_are_normal():
    x = normals(7, 200_000).astype(np.float64)
    moments = [(x**power).mean() for power in (1, 2, 3, 4)]
    deviations = np.sqrt(np.array([1, 2, 15, 96]) / len(x))
    assert (np.abs(moments - np.array([0, 1, 0, 3])) < 4 * deviations).all()
    ordered = np.sort(x)
    below = np.array([(1 + math.erf(value / math.sqrt(2))) / 2 for value in ordered])
    steps = np.arange(len(x) + 1) / len(x)
    distance = max(np.abs(below - steps[:-1]).max(), np.abs(below - steps[1:]).max())
    assert distance < 1.63 / math.sqrt(len(x))  # Kolmogorov and Smirnov, 1 %
    for other in (normals(8, 200_000), np.roll(x, 1), np.roll(x, 128)):
        assert abs((x * other).mean()) < 0.01


def test_latents_are_packed_as_diffusers_does():
    latents = torch.arange(16 * 6 * 4, dtype=torch.float32).reshape(1, 16, 6, 4)
    wanted = FluxPipeline._pack_latents(latents, 1, 16, 6, 4)[0].numpy()
    rows = latents[0].permute(1, 2, 0).numpy()
    assert (pack(rows) == wanted).all()
    assert (unpack(wanted, 6, 4) == rows.reshape(24, 16)).all()


def test_noise_has_its_places_in_the_order_of_latents():
    noise = torch.from_numpy(normals(5, 16 * 6 * 4)).reshape(1, 16, 6, 4)
    wanted = FluxPipeline._pack_latents(noise, 1, 16, 6, 4)[0].numpy()
    assert (packed(5, 16, 6, 4) == wanted).all()
