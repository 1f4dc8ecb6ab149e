"""Which weights are quantized, and to what; and the YAML that says so."""

from __future__ import annotations

import pytest

from squall.errors import InvalidRequest
from squall.quant import FORMATS, Plan, Topology
from squall.quant.isq import FALLBACKS, TYPES, fitting, parse_type

Q = "layers.0.attention.q"
EXPERT = "layers.0.feed_forward.experts.up"


@pytest.mark.parametrize("name", ["Q4K", "q4k", " q4K ", "4"])
def test_names_have_no_case(name: str) -> None:
    assert parse_type(name) == "q4_k"


def test_all_names() -> None:
    wanted = {"q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q8_1", "q2k", "q3k", "q4k", "q5k", "q6k"}
    assert wanted | {"q8k", "hqq8", "hqq4", "fp8"} <= TYPES.keys()
    assert set(TYPES.values()) | set(FALLBACKS.values()) <= FORMATS.keys()
    assert parse_type("8") == "q8_0"


@pytest.mark.parametrize("name", ["q4_kx", "7", "", "iq2"])
def test_unknown_names_list_the_known(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"q4k.*fp8.*bits: 2"):
        parse_type(name)


def test_fallbacks() -> None:
    assert fitting("q4_k", 512) == "q4_k"
    assert fitting("q4_k", 96) == "q4_1"
    assert fitting("hqq8", 96) == "q8_0"
    assert fitting("q6_k", 33) is None
    assert fitting("f8_e4m3", 33) == "f8_e4m3"


def test_roles() -> None:
    plan = Plan.of("Q4K", dtype="f16")
    for role in (Q, EXPERT, "head"):
        assert plan.target(role, "bf16", 256) == "q4_k"
    for role in ("embed", "layers.0.feed_forward.router"):
        assert plan.target(role, "bf16", 256) == "f16"
        assert plan.target(role, "q8_0", 256) == "q8_0"
    assert plan.target(Q, "bf16", 33) == "f16"
    assert Plan.of("Q4K").target("embed", "bf16", 256) == "bf16"
    assert Plan.of().target(Q, "bf16", 256) == "bf16"


def test_experts_only() -> None:
    plan = Plan.of(4, experts_only=True)
    assert plan.target(EXPERT, "f32", 256) == plan.target("head", "f32", 256) == "q4_k"
    assert plan.target(Q, "f32", 256) == "f32"


def test_topology_wins_where_it_speaks_and_later_ends_win() -> None:
    topology = Topology.from_text("""
        1-4: {isq: Q8_0}
        0-3: {isq: q2k, device: cpu}
        5: {device: cpu}
    """)
    plan = Plan.of("q6k", topology)
    found = [plan.target(f"layers.{i}.attention.q", "f32", 256) for i in range(6)]
    assert found == ["q2_k", "q8_0", "q8_0", "q8_0", "q6_k", "q6_k"]
    assert plan.target("head", "f32", 256) == "q6_k"
    topology.check(6)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a-b: {isq: q4k}", "no range"),
        ("-1: {isq: q4k}", "no range"),
        ("3-3: {isq: q4k}", "empty"),
        ("0-2: q4k", "has 'q4k'"),
        ("0-2: {bits: 4}", "has {'bits': 4}"),
        ("0-2: {device: gpu}", "cuda"),
        ("- 1", "no ranges"),
        ("", "no ranges"),
        ("0-2: {isq", "not YAML"),
    ],
)
def test_topology_explains_what_is_wrong(text: str, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        Topology.from_text(text)


def test_names_are_understood_however_they_are_written() -> None:
    names = {
        "q4_k": "Q4K q4k Q4_K q4_k_m Q4_K_S 4 q4", "q8_0": "Q8_0 q8 8 Q80", "q4_1": "q4_1 Q4-1",
        "q3_k": "Q3_K_L q3k", "hqq4": "HQQ4 hqq_4", "f8_e4m3": "FP8 f8_e4m3",
    }  # fmt: skip
    for format, spellings in names.items():
        assert {parse_type(name) for name in spellings.split()} == {format}
    for name in ("q9", "q4_k_x", "iq4_nl", "", "q4_0_m", "bf16"):
        with pytest.raises(InvalidRequest, match=r"known: q4_0, .* bits: 2, 3"):
            parse_type(name)


def test_topology_must_fit_the_model() -> None:
    with pytest.raises(InvalidRequest, match="layers 0 to 3"):
        Topology.from_text("2-5: {isq: q4k}").check(4)
    with pytest.raises(InvalidRequest, match="unknown quantization"):
        Plan.of(None, Topology.from_text("0: {isq: q9}"))
    with pytest.raises(InvalidRequest, match="dtype"):
        Plan.of(dtype="f64")
