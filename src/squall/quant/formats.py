"""The table of number formats, and what ggml calls them."""

from __future__ import annotations

from squall.errors import UnsupportedModel
from squall.quant import floats, hqq, integers, kquants, legacy
from squall.quant.format import Format

FORMATS: dict[str, Format] = {
    format.name: format
    for family in (floats, legacy, kquants, hqq, integers)
    for format in family.FORMATS
}

# ggml tensor types known by name only, so that the error can say what the file holds.
UNSUPPORTED = {
    4: "q4_2 (withdrawn)", 5: "q4_3 (withdrawn)", 16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs",
    19: "iq1_s", 20: "iq4_nl", 21: "iq3_s", 22: "iq2_s", 23: "iq4_xs", 24: "i8", 25: "i16",
    26: "i32", 27: "i64", 28: "f64", 29: "iq1_m", 31: "q4_0_4_4 (withdrawn)",
    32: "q4_0_4_8 (withdrawn)", 33: "q4_0_8_8 (withdrawn)", 34: "tq1_0", 35: "tq2_0",
    36: "iq4_nl_4_4 (withdrawn)", 37: "iq4_nl_4_8 (withdrawn)", 38: "iq4_nl_8_8 (withdrawn)",
    39: "mxfp4", 40: "nvfp4", 41: "q1_0",
}  # fmt: skip

GGML_FORMATS: dict[int, Format] = {f.ggml_id: f for f in FORMATS.values() if f.ggml_id is not None}


def by_ggml_id(id: int) -> Format:
    try:
        return GGML_FORMATS[id]
    except KeyError:
        known = ", ".join(format.name for format in GGML_FORMATS.values())
        raise UnsupportedModel(
            f"tensor type {UNSUPPORTED.get(id, 'unknown')} (ggml id {id}) is not supported; "
            f"known: {known}. Use a file quantized to one of these"
        ) from None
