"""LlamaIndex: pip install llama-index-llms-openai-like; python llama_index.py [URL]."""

import sys

from llama_index.llms.openai_like import OpenAILike  # type: ignore[import-untyped]

url, *_ = [*sys.argv[1:], "http://127.0.0.1:8080/v1"]
llm = OpenAILike(
    model="default", api_base=url, api_key="any", is_chat_model=True, max_tokens=32, temperature=0
)
print(llm.complete("What is the capital of France?"))
for chunk in llm.stream_complete("And of Italy?"):
    print(chunk.delta, end="", flush=True)
print()
