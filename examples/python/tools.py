"""A function that the model calls; it is told the result, and answers."""

from squall import Model, tools


def temperature(city: str) -> str:
    """How warm it is in a city."""
    return f"It is 21 degrees in {city}."


with Model.open() as model:
    outcome = tools.run(
        model, "How warm is it in Paris?", [temperature], tool_choice="required",
        parallel_tool_calls=False, max_tokens=64, temperature=0, most_calls=1,
    )  # fmt: skip
for message in outcome.messages:
    print(message)
