"""Anthropic's Messages, streamed: python messages.py [URL], here without /v1."""

import sys

import anthropic

url, *_ = [*sys.argv[1:], "http://127.0.0.1:8080"]
client = anthropic.Anthropic(base_url=url, api_key="any")
with client.messages.stream(
    model="default",
    messages=[{"role": "user", "content": "Tell me about the sea."}],
    max_tokens=64,
) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
print()
