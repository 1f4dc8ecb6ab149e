"""mistral.rs's Python API: a Runner opens a model and is sent requests."""

from __future__ import annotations

import asyncio
import base64
import os
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from squall.api import responses
from squall.api.jobs import Asked, ChatJob, CompletionJob, start_chat, start_completion
from squall.api.requests import ChatCompletionRequest, CompletionRequest
from squall.api.which import ImageGenerationResponseFormat, Selection, Which
from squall.checkpoints.hub import Hub
from squall.closing import Closing
from squall.diffusion.model import ImageModel
from squall.engine.engine import EngineConfig
from squall.engine.memory import KvSize
from squall.errors import InvalidRequest
from squall.model import Model
from squall.opening import Opening

if TYPE_CHECKING:
    from squall.adapters.anymoe import AnyMoe

_OF_FLOATS = (Which.Plain, Which.Lora, Which.XLora, Which.VisionPlain, Which.DiffusionPlain)


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

    image_folder: where the pictures lie that `generate_image` gives as paths; by default a new
    folder of the system's temporary ones.

    no_paged_attn is accepted and changes nothing. Arguments whose feature is not there yet raise
    InvalidRequest.
    """

    def __init__(  # noqa: PLR0913
        self,
        which: Selection | Model | ImageModel | None = None,
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
        image_folder: str | os.PathLike[str] | None = None,
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
        self._seed, self._image_folder = seed, image_folder
        self._owns = not isinstance(which, Model | ImageModel)
        self._opened = _opened(which, others)

    @property
    def model(self) -> Model:
        """The model of text. Raises InvalidRequest for one that makes pictures."""
        if isinstance(self._opened, ImageModel):
            raise InvalidRequest("this model makes pictures: generate_image; it answers nothing")
        return self._opened

    def tokenize_text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; add_special_tokens: after the BOS token, if the model has one."""
        return self.model.encode(text, add_bos=add_special_tokens)

    def detokenize_text(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self.model.decode(tokens, skip_specials=skip_special_tokens)

    def activate_adapters(self, adapter_names: Sequence[str]) -> None:
        """Adapters for requests that name none; raises UnknownAdapter."""
        self.model.adapters.activate(adapter_names)

    def close(self) -> None:
        """End all answers, and free the model; one that was given stays open."""
        if self._owns:
            self._opened.close()

    def _picture(
        self, prompt: str, format: ImageGenerationResponseFormat, height: int, width: int
    ) -> responses.ImageGenerationResponse:
        if not isinstance(self._opened, ImageModel):
            raise InvalidRequest("this model makes no pictures; open one by Which.DiffusionPlain")
        if not isinstance(format, ImageGenerationResponseFormat):
            raise InvalidRequest(f"response_format is {format!r:.99}; it must be Url or B64Json")
        (picture,) = self._opened.generate(prompt, width=width, height=height, seed=self._seed)
        url = encoded = None
        if format is ImageGenerationResponseFormat.Url:
            try:
                folder = self._image_folder = Path(self._image_folder or mkdtemp(prefix="squall-"))
                folder.mkdir(parents=True, exist_ok=True)
                url = str(folder / f"image-generation-{uuid.uuid4()}.png")
                picture.save(url)
            except OSError as error:
                raise InvalidRequest(f"image_folder: {error}; choose another") from None
        else:
            encoded = f"data:image/png;base64,{base64.b64encode(picture.png()).decode()}"
        choice = responses.ImageChoice(url, encoded, picture.seed)
        return responses.ImageGenerationResponse(int(time.time()), (choice,))

    def _chat(self, request: ChatCompletionRequest) -> ChatJob:
        return start_chat(self.model, self._seeded(request))

    def _completion(self, request: CompletionRequest) -> CompletionJob:
        return start_completion(self.model, self._seeded(request))

    def _seeded(self, request: Asked) -> Asked:
        return replace(request, seed=self._seed) if request.seed is None else request


def _opened(which: Selection | Model | ImageModel | None, others: Opening) -> Model | ImageModel:
    """One that is open, or is opened now."""
    if isinstance(which, Which.DiffusionPlain):
        for name in ("chat_template", "device_layers", "anymoe", "draft"):
            if getattr(others, name) is not None:
                raise InvalidRequest(f"{name} is for models of text; leave it out")
        own = Opening(threads=others.threads, isq=others.isq, hub=others.hub)
        return ImageModel.open_with(which.opening(own))
    if isinstance(which, Model | ImageModel):
        if others.chat_template is not None and isinstance(which, Model):
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

    def generate_image(
        self,
        prompt: str,
        response_format: ImageGenerationResponseFormat,
        height: int = 720,
        width: int = 1280,
    ) -> responses.ImageGenerationResponse:
        """A picture, by a model that makes some: as a file's path, or as base64."""
        return self._picture(prompt, response_format, height, width)

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

    async def generate_image(
        self,
        prompt: str,
        response_format: ImageGenerationResponseFormat,
        height: int = 720,
        width: int = 1280,
    ) -> responses.ImageGenerationResponse:
        """A picture, by a model that makes some: as a file's path, or as base64."""
        return await asyncio.to_thread(self._picture, prompt, response_format, height, width)

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
