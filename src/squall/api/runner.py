"""mistral.rs's Python API: a Runner opens a model and is sent requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from squall.api import responses
from squall.api.jobs import Asked, ChatJob, CompletionJob, start_chat, start_completion
from squall.api.requests import ChatCompletionRequest, CompletionRequest
from squall.api.which import ImageGenerationResponseFormat, Selection, Which
from squall.checkpoints.hub import Hub
from squall.closing import Closing
from squall.engine.engine import EngineConfig
from squall.engine.memory import KvSize
from squall.errors import InvalidRequest, UnsupportedModel
from squall.model import Model
from squall.opening import Opening

if TYPE_CHECKING:
    from squall.adapters.anymoe import AnyMoe

_OF_FLOATS = (Which.Plain, Which.Lora, Which.XLora, Which.VisionPlain)


class _Runner:
    """Opens a model, which `close` or leaving a `with` block frees.

    which: what to open, or a model that is open, and stays so; by default the default model.
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

    which_draft: a smaller model with the same vocabulary, which makes at most `speculative_gamma`
    guesses a step (docs/speculation.md).

    num_device_layers: layers on GPUs, ["0:16", "1:12"]; the rest run on the CPU (docs/devices.md).

    anymoe_config: experts made of other models (docs/anymoe.md).

    no_paged_attn is accepted and changes nothing. Arguments whose feature is not there yet raise
    InvalidRequest.
    """

    def __init__(  # noqa: PLR0913
        self,
        which: Selection | Model | None = None,
        max_seqs: int = 16,
        no_kv_cache: bool = False,
        prefix_cache_n: int = 16,
        token_source: str = "cache",
        speculative_gamma: int = 32,
        which_draft: Selection | None = None,
        chat_template: str | None = None,
        num_device_layers: Sequence[str] | None = None,
        in_situ_quant: str | None = None,
        anymoe_config: AnyMoe | None = None,
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
        if num_device_layers is not None and isinstance(which, Model):
            raise InvalidRequest("num_device_layers: the model is open already; give a Which")
        if in_situ_quant is not None and not isinstance(which, _OF_FLOATS):
            raise InvalidRequest("in_situ_quant: only folders of floats can be quantized; no file")
        if anymoe_config is not None and isinstance(which, Model):
            raise InvalidRequest("anymoe_config: the model is open already; give a Which")
        hub = Hub(token_source=token_source)
        others = Opening(
            context=context,
            threads=threads,
            kv=KvSize(
                fraction=pa_gpu_mem_usage,
                tokens=pa_ctxt_len,
                bytes=None if pa_gpu_mem is None else int(pa_gpu_mem * 2**20),
                block_size=pa_blk_size or KvSize().block_size,
            ),
            isq=in_situ_quant,
            device_layers=num_device_layers,
            anymoe=anymoe_config,
            engine=EngineConfig(
                max_seqs=max_seqs,
                no_kv_cache=no_kv_cache,
                prefix_cache_n=prefix_cache_n,
                prompt_batchsize=prompt_batchsize,
            ),
            hub=hub,
            draft=None if which_draft is None else which_draft.opening(Opening(hub=hub)),
            draft_tokens=speculative_gamma,
            chat_template=chat_template,
        )
        self._seed = seed
        self._owns = not isinstance(which, Model)
        self.model = _model(which, others)

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

    def activate_adapters(self, adapter_names: Sequence[str]) -> None:
        """Adapters for requests that name none; raises UnknownAdapter."""
        self.model.adapters.activate(adapter_names)

    def close(self) -> None:
        """End all answers, and free the model; one that was given stays open."""
        if self._owns:
            self.model.close()

    def _chat(self, request: ChatCompletionRequest) -> ChatJob:
        return start_chat(self.model, self._seeded(request))

    def _completion(self, request: CompletionRequest) -> CompletionJob:
        return start_completion(self.model, self._seeded(request))

    def _seeded(self, request: Asked) -> Asked:
        return replace(request, seed=self._seed) if request.seed is None else request


def _model(which: Selection | Model | None, others: Opening) -> Model:
    """One that is open, or is opened now."""
    if isinstance(which, Model):
        if others.chat_template is not None:
            which.set_chat_template(others.chat_template)
        return which
    if which is not None and not isinstance(which, Selection):
        raise InvalidRequest(f"which is {which!r:.99}; it must be a Which, or a Model")
    return Model.open_with(others if which is None else which.opening(others))


# `| Any` below, since the type of an answer depends on a field of the request: who sends `stream`
# there gets an iterator. The methods for streams have a type of their own.


class Runner(_Runner, Closing):
    __doc__ = _Runner.__doc__

    def send_re_isq(self, dtype: str) -> None:
        """Quantize the weights again; answers that are under way go on with the new ones."""
        self.model.re_isq(dtype)

    def send_chat_completion_request(
        self, request: ChatCompletionRequest
    ) -> responses.ChatCompletionResponse | Any:
        """Answer a chat; for a request with `stream` as `stream_chat_completion_request`."""
        job = self._chat(request)
        return job.chunks() if request.stream else job.response()

    def send_completion_request(
        self, request: CompletionRequest
    ) -> responses.CompletionResponse | Any:
        """Complete a text or several; for `stream` as `stream_completion_request`."""
        job = self._completion(request)
        return job.chunks() if request.stream else job.response()

    def stream_chat_completion_request(
        self, request: ChatCompletionRequest
    ) -> Iterator[responses.ChatCompletionChunkResponse]:
        """Answer a chat in chunks, as they come, whatever `stream` of the request is."""
        return self._chat(request).chunks()

    def stream_completion_request(
        self, request: CompletionRequest
    ) -> Iterator[responses.CompletionChunkResponse]:
        """Complete a text or several in chunks, as they come."""
        return self._completion(request).chunks()


class AsyncRunner(_Runner):
    __doc__ = _Runner.__doc__

    async def send_re_isq(self, dtype: str) -> None:
        """Quantize the weights again; answers that are under way go on with the new ones."""
        await asyncio.to_thread(self.model.re_isq, dtype)

    async def send_chat_completion_request(
        self, request: ChatCompletionRequest
    ) -> responses.ChatCompletionResponse | Any:
        """Answer a chat; for a request with `stream` as `stream_chat_completion_request`."""
        job = await asyncio.to_thread(self._chat, request)
        return job.chunks_async() if request.stream else await job.response_async()

    async def send_completion_request(
        self, request: CompletionRequest
    ) -> responses.CompletionResponse | Any:
        """Complete a text or several; for `stream` as `stream_completion_request`."""
        job = await asyncio.to_thread(self._completion, request)
        return job.chunks_async() if request.stream else await job.response_async()

    async def stream_chat_completion_request(
        self, request: ChatCompletionRequest
    ) -> AsyncIterator[responses.ChatCompletionChunkResponse]:
        """Answer a chat in chunks, as they come, whatever `stream` of the request is."""
        job = await asyncio.to_thread(self._chat, request)
        return job.chunks_async()

    async def stream_completion_request(
        self, request: CompletionRequest
    ) -> AsyncIterator[responses.CompletionChunkResponse]:
        """Complete a text or several in chunks, as they come."""
        job = await asyncio.to_thread(self._completion, request)
        return job.chunks_async()

    async def __aenter__(self) -> AsyncRunner:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)
