"""Python functions that a model calls, until it has an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field
from scripted import Scripted, scripted

from squall import InvalidRequest, Model, Runner, tools


class Place(BaseModel):
    city: str
    degrees: int = 20


def weather(city: Annotated[str, Field(description="Where.")], days: int = 1) -> Place:
    """The weather in a city."""
    if city == "Atlantis":
        raise LookupError("there is no Atlantis")
    return Place(city=city, degrees=20 + days)


def call(name: str, **arguments: Any) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def run(
    model: Model, script: Mapping[str, str], functions: Any = (weather,), **options: Any
) -> tuple[tools.Outcome, Scripted]:
    with scripted(model, script) as known:
        return tools.run(model, "Well?", functions, **options), known


def test_functions_are_called_until_there_is_an_answer(model: Model) -> None:
    script = {
        '"Rome","degrees":22': "Rome has 22.",
        "there is no Atlantis": call("weather", city="Rome", days=2),
        "Well?": call("weather", city="Atlantis"),
    }
    found, known = run(model, script)
    assert (found.answer, found.finish_reason) == ("Rome has 22.", "stop")
    assert [m["role"] for m in found.messages] == ["user", *["assistant", "tool"] * 2, "assistant"]
    assert found.messages[2]["content"] == "LookupError: there is no Atlantis"
    assert found.messages[2]["tool_call_id"] == found.messages[1]["tool_calls"][0]["id"]
    assert "The weather in a city." in known.prompts[0]
    assert "Where." in known.prompts[0]


def test_several_calls_of_one_answer(model: Model) -> None:
    both = f"{call('weather', city='Rome')}\n{call('weather', city='Oslo')}"
    found, _ = run(model, {'"Oslo","degrees":21': "Both.", "Well?": both})
    assert [m["role"] for m in found.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert found.answer == "Both."


def test_who_calls_for_ever_has_to_answer(model: Model) -> None:
    found, known = run(model, {"Well?": call("weather", city="Rome")}, most_calls=3)
    assert len(known.prompts) == 4
    assert [m["role"] for m in found.messages].count("tool") == 3
    assert found.answer == call("weather", city="Rome")  # as text, since it may not call


def test_a_call_that_is_cut_is_not_made(model: Model) -> None:
    found, _ = run(model, {"Well?": call("weather", city="Rome")}, max_tokens=12)
    assert found.finish_reason == "length"
    assert [message["role"] for message in found.messages] == ["user", "assistant"]


def test_a_choice_is_for_the_first_answer(model: Model) -> None:
    script = {'"degrees":21': "Rome has 21.", "Well?": call("weather", city="Rome")}
    found, _ = run(model, script, tool_choice="required")
    assert found.answer == "Rome has 21."


def test_functions_with_schemas_of_their_own(model: Model) -> None:
    schema = {"type": "object", "properties": {"x": {"const": 5}}, "required": ["x"]}
    seen: list[Any] = []

    def see(**given: Any) -> str:
        seen.append(given)
        return "seen it"

    script = {"seen it": "Done.", "Well?": call("look", x=5)}
    found, _ = run(model, script, {"look": (schema, see)})
    assert (found.answer, seen) == ("Done.", [{"x": 5}])
    with scripted(model, script), Runner(model) as runner:
        assert tools.run(runner, "Well?", {"look": (schema, see)}).answer == "Done."


def test_results_that_are_no_unicode(model: Model) -> None:
    found, _ = run(model, {"a?b": "Done.", "Well?": call("look")}, {"look": lambda: "a\udcffb"})
    assert found.answer == "Done."


def test_functions_that_would_have_to_be_awaited(model: Model) -> None:
    async def later() -> int:
        return 1

    with pytest.raises(InvalidRequest, match="later is async"):
        tools.run(model, "Well?", [later])


def test_a_signature_that_cannot_be_told(model: Model) -> None:
    def odd(where: Scripted) -> None: ...

    with pytest.raises(InvalidRequest, match=r"odd.*\(schema, function\)"):
        tools.run(model, "Well?", [odd])
