"""A picture of a text: python pictures.py [PROMPT [URL]]."""

import base64
import sys
from pathlib import Path

import openai

defaults = ["A lighthouse at dawn.", "http://127.0.0.1:8080/v1"]
given = sys.argv[1:]
prompt, url = [*given, *defaults[len(given) :]]
client = openai.OpenAI(base_url=url, api_key="any")
answer = client.images.generate(
    model="default",
    prompt=prompt,
    size="512x512",
    response_format="b64_json",
    extra_body={"seed": 7},
)
(picture,) = answer.data or []
Path("picture.png").write_bytes(base64.b64decode(picture.b64_json or ""))
print("picture.png")
