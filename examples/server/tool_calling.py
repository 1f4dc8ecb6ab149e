"""A function that the model calls over HTTP: python tool_calling.py [URL]."""

import json
import sys

import openai
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

TOOL: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "temperature",
        "description": "How warm it is in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
        },
    },
}
url, *_ = [*sys.argv[1:], "http://127.0.0.1:8080/v1"]
client = openai.OpenAI(base_url=url, api_key="any")
messages: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "How warm is it in Paris?"}
]
answer = client.chat.completions.create(
    model="default", messages=messages, tools=[TOOL], tool_choice="required",
    parallel_tool_calls=False, max_tokens=64, temperature=0,
)  # fmt: skip
for call in answer.choices[0].message.tool_calls or []:
    assert call.type == "function"
    city = json.loads(call.function.arguments)["city"]
    print(f"{call.function.name}: {city}")
    messages += [
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": call.function.arguments,
                    },
                }
            ],
        },
        {"role": "tool", "tool_call_id": call.id, "content": f"21 degrees in {city}"},
    ]
answer = client.chat.completions.create(
    model="default", messages=messages, max_tokens=32, temperature=0
)
print(answer.choices[0].message.content)
