"""OpenAI's Responses, where the server keeps the conversation: python responses.py [URL]."""

import sys

import openai

url, *_ = [*sys.argv[1:], "http://127.0.0.1:8080/v1"]
client = openai.OpenAI(base_url=url, api_key="any")
first = client.responses.create(
    model="default",
    input="What is the capital of France?",
    max_output_tokens=32,
    temperature=0,
)
print(first.output_text)
second = client.responses.create(
    model="default",
    input="And of Italy?",
    previous_response_id=first.id,
    max_output_tokens=32,
    temperature=0,
)
print(second.output_text)
