"""Vectors of texts: python embeddings.py [URL]."""

import sys

import openai

url, *_ = [*sys.argv[1:], "http://127.0.0.1:8080/v1"]
client = openai.OpenAI(base_url=url, api_key="any")
answer = client.embeddings.create(model="default", input=["It is raining.", "The sun shines."])
for each in answer.data:
    print(each.index, len(each.embedding), each.embedding[:3])
