"""AnyMoE in mistral.rs's words."""

from __future__ import annotations

from squall.adapters import anymoe

AnyMoeConfig = anymoe.AnyMoe


class AnyMoeExpertType:
    """What the experts are: whole feed-forward layers, or adapters of the model's own."""

    FineTuned = anymoe.FineTuned
    LoraAdapter = anymoe.LoraAdapter
