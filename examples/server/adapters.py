"""The same question to a model and to each of its adapters: python adapters.py [URL]."""

import sys

import openai

url, *_ = [*sys.argv[1:], "http://127.0.0.1:8080/v1"]
client = openai.OpenAI(base_url=url, api_key="any")
for model in client.models.list():  # an adapter's name is a model's name
    answer = client.chat.completions.create(
        model=model.id,
        messages=[{"role": "user", "content": "Say hello."}],
        max_tokens=16,
        temperature=0,
    )
    print(f"{model.id}: {answer.choices[0].message.content}")
