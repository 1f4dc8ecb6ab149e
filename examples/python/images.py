"""Ask a model about images: python images.py MODEL QUESTION IMAGE..."""

import sys

import squall

folder, question, *images = sys.argv[1:]
with squall.Model.open(folder) as model:
    # Each is a path or a URL, and stays in the conversation.
    content = [{"type": "image", "image": image} for image in images]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    answer = model.generate(messages, max_tokens=64, temperature=0)
    print(f"{answer.read()!r} ({answer.usage.prompt_tokens} tokens asked)")
