"""Number formats of weights: block layouts, conversion to and from float32, and what becomes what."""

from __future__ import annotations

from squall.quant.format import Format
from squall.quant.formats import FORMATS, UNSUPPORTED, by_ggml_id
from squall.quant.isq import FormatTotal, Plan
from squall.quant.topology import Topology

__all__ = ["FORMATS", "UNSUPPORTED", "Format", "FormatTotal", "Plan", "Topology", "by_ggml_id"]
