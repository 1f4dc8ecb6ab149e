"""An answer as an object of a class: python response_format.py [URL]."""

import sys

import openai
from pydantic import BaseModel, Field


class City(BaseModel):
    name: str = Field(max_length=20)
    country: str = Field(max_length=20)


url, *_ = [*sys.argv[1:], "http://127.0.0.1:8080/v1"]
client = openai.OpenAI(base_url=url, api_key="any")
answer = client.chat.completions.parse(
    model="default",
    messages=[{"role": "user", "content": "Tell me about Paris."}],
    response_format=City,
    max_tokens=64,
    temperature=0,
)
print(answer.choices[0].message.parsed)
