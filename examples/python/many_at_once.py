"""Many conversations at a time: their tokens are computed together."""

import asyncio

from squall import AsyncRunner, ChatCompletionRequest

ANIMALS = ["cat", "whale", "sparrow", "ant"]


async def main() -> None:
    async with AsyncRunner() as runner:
        requests = [
            ChatCompletionRequest(messages=f"What does a {animal} eat?", max_tokens=32, seed=1)
            for animal in ANIMALS
        ]
        responses = await asyncio.gather(*map(runner.send_chat_completion_request, requests))
    for animal, response in zip(ANIMALS, responses, strict=True):
        print(f"{animal}: {response.choices[0].message.content}")


asyncio.run(main())
