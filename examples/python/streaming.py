"""Print an answer while it is made."""

from squall import ChatCompletionRequest, Runner

with Runner() as runner:
    chunks = runner.stream_chat_completion_request(
        ChatCompletionRequest(
            messages=[{"role": "user", "content": "Tell me about the sea."}],
            max_tokens=64,
            temperature=0.1,
            presence_penalty=1.0,
        )
    )
    for chunk in chunks:
        print(chunk.choices[0].delta.content, end="", flush=True)
print()
