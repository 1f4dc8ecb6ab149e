"""Print an answer while it is made: python streaming.py [URL]."""

import sys

import openai

url, *_ = [*sys.argv[1:], "http://127.0.0.1:8080/v1"]
client = openai.OpenAI(base_url=url, api_key="any")
with client.chat.completions.create(
    model="default",
    messages=[{"role": "user", "content": "Tell me about the sea."}],
    max_tokens=64,
    stream=True,
) as chunks:
    for chunk in chunks:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
