"""A call of a function, which you make yourself; tools.py has it made."""

import json

from squall import ChatCompletionRequest, Runner, ToolChoice

SCHEMA = {
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
messages: list[dict[str, object]] = [{"role": "user", "content": "How warm is it in Paris?"}]
with Runner() as runner:
    request = ChatCompletionRequest(
        messages=messages, tool_schemas=[json.dumps(SCHEMA)], tool_choice=ToolChoice.Required,
        parallel_tool_calls=False, max_tokens=64, temperature=0,
    )  # fmt: skip
    message = runner.send_chat_completion_request(request).choices[0].message
    call = message.tool_calls[0]
    print(call.function.name, call.function.arguments)
    messages += [
        {"role": "assistant", "content": None, "tool_calls": [call.to_dict()]},
        {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"},
    ]
    request = ChatCompletionRequest(messages=messages, max_tokens=32, temperature=0)
    print(runner.send_chat_completion_request(request).choices[0].message.content)
