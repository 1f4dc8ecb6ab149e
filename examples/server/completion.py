"""Go on with a text, whole and streamed: python completion.py [URL]."""

import sys

import openai

url, *_ = [*sys.argv[1:], "http://127.0.0.1:8080/v1"]
client = openai.OpenAI(base_url=url, api_key="any")
prompt = "The three primary colours are"
answer = client.completions.create(model="default", prompt=prompt, max_tokens=16, seed=1)
print(repr(answer.choices[0].text))
chunks = client.completions.create(
    model="default", prompt=prompt, max_tokens=16, seed=1, stream=True
)
print(repr("".join(chunk.choices[0].text for chunk in chunks)))
