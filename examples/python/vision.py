"""Ask about an image in mistral.rs's words: python vision.py MODEL ARCH IMAGE.

ARCH is Phi3V, LLaVA, LLaVANext, Idefics2, VLlama, Qwen2VL, ...; IMAGE a path, a URL or base64.
"""

import sys

from squall import ChatCompletionRequest, Runner, VisionArchitecture, Which

model, arch, image = sys.argv[1:]
with Runner(Which.VisionPlain(model, VisionArchitecture[arch])) as runner:
    request = ChatCompletionRequest(
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": image}},
                    {"type": "text", "text": "What is shown here?"},
                ],
            }
        ],
        max_tokens=64,
        temperature=0,
    )
    print(runner.send_chat_completion_request(request).choices[0].message.content)
