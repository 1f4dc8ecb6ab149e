"""A chat with a server: python chat.py [URL], by default http://127.0.0.1:8080/v1."""

import sys

import openai
from openai.types.chat import ChatCompletionMessageParam

url, *_ = [*sys.argv[1:], "http://127.0.0.1:8080/v1"]
client = openai.OpenAI(base_url=url, api_key="any")
messages: list[ChatCompletionMessageParam] = []
print("an empty line ends it")
while question := input("> "):
    messages.append({"role": "user", "content": question})
    answer = client.chat.completions.create(
        model="default", messages=messages, max_tokens=256, temperature=0
    )
    print(text := answer.choices[0].message.content)
    messages.append({"role": "assistant", "content": text})
