"""Ask about an image of this machine: python vision.py IMAGE [URL]."""

import base64
import sys
from pathlib import Path

import openai

image, url, *_ = [*sys.argv[1:], "http://127.0.0.1:8080/v1"]
client = openai.OpenAI(base_url=url, api_key="any")
# Another machine's images go by their URL, from hosts that `squall serve --allow-media-url` names.
data = f"data:image/png;base64,{base64.b64encode(Path(image).read_bytes()).decode()}"
answer = client.chat.completions.create(
    model="default",
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": data}},
                {"type": "text", "text": "What is shown here?"},
            ],
        }
    ],
    max_tokens=64,
    temperature=0,
)
print(answer.choices[0].message.content)
