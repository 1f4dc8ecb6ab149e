"""Ask the default model a question."""

from squall import ChatCompletionRequest, Runner

with Runner() as runner:
    response = runner.send_chat_completion_request(
        ChatCompletionRequest(
            model="default",
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            max_tokens=64,
            temperature=0,
        )
    )
print(response.choices[0].message.content)
print(response.usage)
