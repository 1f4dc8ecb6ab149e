"""mistral.rs's Python API: a Runner opens a model and is sent requests."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squall.api import pictures, responses
from squall.api.jobs import Asked, ChatJob, CompletionJob, start_chat, start_completion
from squall.api.requests import ChatCompletionRequest, CompletionRequest
from squall.api.which import ImageGenerationResponseFormat, Selection, Which
from squall.checkpoints.hub import Hub
from squall.closing import Closing
from squall.diffusion.model import ImageModel, Painting
from squall.diffusion.request import PictureRequest
from squall.engine.engine import EngineConfig
from squall.engine.memory import KvSize
from squall.errors import InvalidRequest
from squall.model import Model
from squall.opening import Opening

if TYPE_CHECKING:
    from squall.adapters.anymoe import AnyMoe

_OF_PICTURES = frozenset(("which", "seed", "image_folder", "no_paged_attn"))
_OPENING_PICTURES = frozenset(("token_source", "in_situ_quant", "threads"))
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

    image_folder: where pictures are written; by default a new folder below the system's temporary
    one. It stays when the model is closed.

    no_paged_attn is accepted and changes nothing. Arguments that the kind of model can make no use
    of raise InvalidRequest.
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
        no_paged_attn: bool = False,
        prompt_batchsize: int | None = None,
        seed: int | None = None,
        *,
        context: int | None = None,
        threads: int | None = None,
        image_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        given = locals()
        self._seed, self._folder = seed, image_folder
        self._owns = not isinstance(which, Model | ImageModel)
        # Who knows which kind it is need not tell a type checker.
        self.model: Model | Any
        if isinstance(which, ImageModel | Which.DiffusionPlain):
            self.model = _image_model(which, given)
            return
        if image_folder is not None:
            raise InvalidRequest("image_folder: the model makes no pictures; leave it out")
        for name in ("num_device_layers", "anymoe_config"):
            if given[name] is not None and isinstance(which, Model):
                raise InvalidRequest(f"{name}: the model is open already; give a Which")
        if in_situ_quant is not None and not isinstance(which, _OF_FLOATS):
            raise InvalidRequest("in_situ_quant: only folders of floats can be quantized; no file")
        hub = Hub(token_source=token_source)
        others = Opening(
            context=context,
            threads=threads,
            kv=_kv_size(pa_gpu_mem_usage, pa_ctxt_len, pa_gpu_mem, pa_blk_size),
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
        self.model = _model(which, others)

    def tokenize_text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; add_special_tokens: after the BOS token, if the model has one."""
        return self._texts.encode(text, add_bos=add_special_tokens)

    def detokenize_text(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self._texts.decode(tokens, skip_specials=skip_special_tokens)

    def activate_adapters(self, adapter_names: Sequence[str]) -> None:
        """Adapters for requests that name none; raises UnknownAdapter."""
        self._texts.adapters.activate(adapter_names)

    def close(self) -> None:
        """End all answers, and free the model; one that was given stays open."""
        if self._owns:
            self.model.close()

    @property
    def _texts(self) -> Model:
        if isinstance(self.model, ImageModel):
            raise InvalidRequest("this model makes pictures; use generate_image, or open another")
        return self.model

    def _paint(
        self, prompt: str, wanted: ImageGenerationResponseFormat, height: int, width: int
    ) -> tuple[Painting, Path | None]:
        """A picture that is queued, and the folder for its file if it is to have one."""
        if not isinstance(self.model, ImageModel):
            raise InvalidRequest("this model makes no pictures; open one by Which.DiffusionPlain")
        if not isinstance(wanted, ImageGenerationResponseFormat):
            raise InvalidRequest(
                f"response_format is {wanted!r:.99}; it must be ImageGenerationResponseFormat.Url "
                "or .B64Json"
            )
        request = PictureRequest(prompt=prompt, width=width, height=height, seed=self._seed)
        if wanted is not ImageGenerationResponseFormat.Url:
            return self.model.submit(request), None
        self._folder = folder = pictures.make_folder(self._folder)
        return self.model.submit(request), folder

    def _chat(self, request: ChatCompletionRequest) -> ChatJob:
        return start_chat(self._texts, self._seeded(request))

    def _completion(self, request: CompletionRequest) -> CompletionJob:
        return start_completion(self._texts, self._seeded(request))

    def _seeded(self, request: Asked) -> Asked:
        return replace(request, seed=self._seed) if request.seed is None else request


def _kv_size(
    fraction: float | None, tokens: int | None, mib: float | None, block_size: int | None
) -> KvSize:
    size = None if mib is None else int(mib * 2**20)
    block_size = block_size or KvSize().block_size
    return KvSize(fraction=fraction, tokens=tokens, bytes=size, block_size=block_size)


def _model(which: Selection | Model | None, others: Opening) -> Model:
    """One that is open, or is opened now."""
    if isinstance(which, Model):
        if others.chat_template is not None:
            which.set_chat_template(others.chat_template)
        return which
    if which is not None and not isinstance(which, Selection):
        raise InvalidRequest(f"which is {which!r:.99}; it must be a Which, or a Model")
    return Model.open_with(others if which is None else which.opening(others))


def _image_model(which: ImageModel | Which.DiffusionPlain, given: Mapping[str, Any]) -> ImageModel:
    """One that is open, or is opened now; `given` are all of a Runner's arguments."""
    opens = isinstance(which, Which.DiffusionPlain)
    known = _OF_PICTURES | (_OPENING_PICTURES if opens else frozenset())
    for name, one in inspect.signature(_Runner).parameters.items():
        if name not in known and given[name] != one.default:
            what = "models that make pictures" if opens else "a model that is open and makes them"
            raise InvalidRequest(f"{name} is not for {what}; there are {', '.join(sorted(known))}")
    if isinstance(which, ImageModel):
        return which
    hub = Hub(token_source=given["token_source"])
    others = Opening(threads=given["threads"], isq=given["in_situ_quant"], hub=hub)
    return ImageModel.open_with(which.opening(others))


# `| Any` below, since the type of an answer depends on a field of the request: who sends `stream`
# there gets an iterator. The methods for streams have a type of their own.


class Runner(_Runner, Closing):
    __doc__ = _Runner.__doc__

    def send_re_isq(self, dtype: str) -> None:
        """Quantize the weights again; answers that are under way go on with the new ones."""
        self._texts.re_isq(dtype)

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

    def generate_image(
        self,
        prompt: str,
        response_format: ImageGenerationResponseFormat,
        height: int = 720,
        width: int = 1280,
    ) -> responses.ImageGenerationResponse:
        """A picture; `url` is the path of its file, `b64_json` a data URI."""
        painting, folder = self._paint(prompt, response_format, height, width)
        try:
            return pictures.response(painting, folder)
        finally:
            painting.cancel()  # if waiting was interrupted


class AsyncRunner(_Runner):
    __doc__ = _Runner.__doc__

    async def send_re_isq(self, dtype: str) -> None:
        """Quantize the weights again; answers that are under way go on with the new ones."""
        await asyncio.to_thread(self._texts.re_isq, dtype)

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

    async def generate_image(
        self,
        prompt: str,
        response_format: ImageGenerationResponseFormat,
        height: int = 720,
        width: int = 1280,
    ) -> responses.ImageGenerationResponse:
        """A picture; `url` is the path of its file, `b64_json` a data URI."""
        # Not in a thread: who stops waiting has to end the picture.
        painting, folder = self._paint(prompt, response_format, height, width)
        await asyncio.gather(asyncio.wrap_future(painting.future), return_exceptions=True)
        return await asyncio.to_thread(pictures.response, painting, folder)

    async def __aenter__(self) -> AsyncRunner:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)
