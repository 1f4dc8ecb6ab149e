"""mistral.rs's Python API: a Runner opens a model and is sent requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import NoReturn

from squall.api import responses
from squall.api.jobs import Asked, start_chat, start_completion
from squall.api.requests import ChatCompletionRequest, CompletionRequest
from squall.api.which import (
    AnyMoeConfig,
    ImageGenerationResponseFormat,
    Opening,
    Selection,
    Which,
)
from squall.checkpoints.hub import Hub
from squall.engine.engine import EngineConfig
from squall.engine.memory import KvSize
from squall.errors import InvalidRequest, UnsupportedModel
from squall.model import Model


class _Runner:
    """Opens a model, which `close` or leaving a `with` block frees.

    which: what to open, or a model that is open; by default the default model.
    max_seqs: answers that are made at a time. no_kv_cache: compute everything anew for each token.
    prefix_cache_n: keep so many contexts of finished requests, for those that begin alike.
    chat_template: a Jinja template, a file with one, or a .json file with a `chat_template`.
    pa_gpu_mem_usage, pa_ctxt_len, pa_gpu_mem, pa_blk_size: the KV cache's size, as `KvSize` has it:
        a fraction of the free memory, tokens, or MiB; and tokens a block.
    prompt_batchsize: at most so many tokens of prompts a step.
    seed: for requests without one; by default they are random.
    context, threads: as in `Model.open`.

    token_source: where the hub's token is from. in_situ_quant: quantize float weights, as `isq`
    of `Model.open`.

    speculative_gamma and no_paged_attn are accepted and change nothing. Arguments whose feature is
    not there yet raise InvalidRequest.
    """

    def __init__(  # noqa: PLR0913
        self,
        which: Selection | Model | None = None,
        max_seqs: int = 16,
        no_kv_cache: bool = False,
        prefix_cache_n: int = 16,
        token_source: str = "cache",
        speculative_gamma: int = 32,  # noqa: ARG002
        which_draft: Selection | None = None,
        chat_template: str | None = None,
        num_device_layers: Sequence[str] | None = None,
        in_situ_quant: str | None = None,
        anymoe_config: AnyMoeConfig | None = None,
        pa_gpu_mem: int | float | None = None,
        pa_gpu_mem_usage: float | None = None,
        pa_ctxt_len: int | None = None,
        pa_blk_size: int | None = None,
        no_paged_attn: bool = False,  # noqa: ARG002
        prompt_batchsize: int | None = None,
        seed: int | None = None,
        *,
        context: int | None = None,
        threads: int | None = None,
    ) -> None:
        _refuse(
            which_draft=which_draft,
            num_device_layers=num_device_layers,
            anymoe_config=anymoe_config,
        )
        config = EngineConfig(
            max_seqs=max_seqs,
            no_kv_cache=no_kv_cache,
            prefix_cache_n=prefix_cache_n,
            prompt_batchsize=prompt_batchsize,
        )
        self._seed = seed
        isq = _isq(which, in_situ_quant)
        if isinstance(which, Model):
            self.model = which
        else:
            opening = Opening(None) if which is None else which.opening()
            self.model = Model.open(
                opening.path,
                context=context,
                threads=threads,
                kv=KvSize(
                    fraction=pa_gpu_mem_usage,
                    tokens=pa_ctxt_len,
                    bytes=None if pa_gpu_mem is None else int(pa_gpu_mem * 2**20),
                    block_size=pa_blk_size or KvSize().block_size,
                ),
                isq=isq,
                engine=config,
                hub=Hub(token_source=token_source),
                **opening.options,
            )
        if chat_template is not None:
            self.model.set_chat_template(chat_template)

    def tokenize_text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; add_special_tokens: after the BOS token, if the model has one."""
        return self.model.encode(text, add_bos=add_special_tokens)

    def detokenize_text(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self.model.decode(tokens, skip_specials=skip_special_tokens)

    def generate_image(
        self,
        prompt: str,  # noqa: ARG002
        response_format: ImageGenerationResponseFormat,  # noqa: ARG002
        height: int = 720,  # noqa: ARG002
        width: int = 1280,  # noqa: ARG002
    ) -> NoReturn:
        """Not there yet."""
        raise UnsupportedModel("images need a diffusion model; none is supported yet")

    def activate_adapters(self, adapter_names: Sequence[str]) -> NoReturn:  # noqa: ARG002
        """Not there yet."""
        raise UnsupportedModel("this model has no adapters; none are supported yet")

    def close(self) -> None:
        """End all answers, and free the model."""
        self.model.close()

    def _seeded(self, request: Asked) -> Asked:
        return replace(request, seed=self._seed) if request.seed is None else request


class Runner(_Runner):
    __doc__ = _Runner.__doc__

    def send_re_isq(self, dtype: str) -> None:
        """Quantize the weights again; answers that are under way go on with the new ones."""
        self.model.re_isq(dtype)

    def send_chat_completion_request(
        self, request: ChatCompletionRequest
    ) -> responses.ChatCompletionResponse | Iterator[responses.ChatCompletionChunkResponse]:
        """Answer a chat: the response, or for `stream` an iterator of chunks."""
        job = start_chat(self.model, self._seeded(request))
        return job.chunks() if request.stream else job.response()

    def send_completion_request(
        self, request: CompletionRequest
    ) -> responses.CompletionResponse | Iterator[responses.CompletionChunkResponse]:
        """Complete a text or several: the response, or for `stream` an iterator of chunks."""
        job = start_completion(self.model, self._seeded(request))
        return job.chunks() if request.stream else job.response()

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncRunner(_Runner):
    __doc__ = _Runner.__doc__

    async def send_re_isq(self, dtype: str) -> None:
        """Quantize the weights again; answers that are under way go on with the new ones."""
        await asyncio.to_thread(self.model.re_isq, dtype)

    async def send_chat_completion_request(
        self, request: ChatCompletionRequest
    ) -> responses.ChatCompletionResponse | AsyncIterator[responses.ChatCompletionChunkResponse]:
        """Answer a chat: the response, or for `stream` an asynchronous iterator of chunks."""
        job = await asyncio.to_thread(start_chat, self.model, self._seeded(request))
        return job.chunks_async() if request.stream else await job.response_async()

    async def send_completion_request(
        self, request: CompletionRequest
    ) -> responses.CompletionResponse | AsyncIterator[responses.CompletionChunkResponse]:
        """Complete a text or several: the response, or an asynchronous iterator of chunks."""
        job = await asyncio.to_thread(start_completion, self.model, self._seeded(request))
        return job.chunks_async() if request.stream else await job.response_async()

    async def __aenter__(self) -> AsyncRunner:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.close)


def _refuse(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise InvalidRequest(f"{name} is not supported yet; leave it out")


def _isq(which: Selection | Model | None, isq: str | None) -> str | None:
    if isq is not None and not isinstance(which, Which.Plain):
        raise InvalidRequest("in_situ_quant: only Which.Plain can be quantized; leave it out")
    return isq
