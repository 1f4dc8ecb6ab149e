"""A model that is open: text in, text out, and the logits between."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from squall import convert, decoder, recipes
from squall.checkpoints import UQFF, Checkpoint, open_checkpoint
from squall.checkpoints.hub import Hub
from squall.engine.defaults import GenerationDefaults
from squall.engine.engine import Engine, EngineConfig, Executor
from squall.engine.generation import Generation
from squall.engine.memory import KvSize, choose_context, choose_kv_tokens, token_bytes
from squall.engine.request import Request, Scoring
from squall.engine.sampling import (
    DRY_BREAKERS,
    Breakers,
    Dry,
    LogitsProcessor,
    Sampling,
)
from squall.errors import InvalidRequest
from squall.executors.native import CacheType, NativeExecutor, default_threads
from squall.locate import locate, locate_uqff
from squall.program import Program
from squall.quant import FormatTotal, Plan, Topology
from squall.quant.isq import Dtype
from squall.recipes import Recipe
from squall.spec import Decoder
from squall.text.chat import ChatTemplate
from squall.text.hf_tokenizer import HfTokenizer
from squall.text.stream import TextStream
from squall.text.tokenizer import Tokenizer

Message = Mapping[str, str]
Prompt = str | Sequence[int] | Sequence[Message]
Progress = Callable[[int, int], None]

MAX_ROWS = 512
MAX_OUTPUTS = 64
DEVICES = ("cpu",)
GREEDY = Sampling(temperature=0, seed=0)


class Model:
    """A language model, open and ready. Make one with `Model.open`.

    The KV cache keeps what earlier requests computed, and a prompt that begins like one of them is
    computed only from where it differs; so a chat does not read its history again. Threads and
    tasks may share a model: their answers are computed together.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        program: Program,
        tokenizer: Tokenizer,
        engine: Engine,
    ) -> None:
        self.defaults = GenerationDefaults.from_folder(checkpoint.path)
        self.checkpoint = checkpoint
        self.architecture = recipe.architecture
        self.spec: Decoder = recipe.decoder
        self.program = program
        self.tokenizer = tokenizer
        self._engine: Engine | None = engine

    @classmethod
    def open(  # noqa: PLR0913
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        context: int | None = None,
        threads: int | None = None,
        weights: Literal["packed", "f32"] = "packed",
        kv_dtype: CacheType = "f16",
        kv_tokens: int | None = None,
        kv: KvSize | None = None,
        isq: str | int | None = None,
        topology: Topology | str | os.PathLike[str] | None = None,
        dtype: Dtype = "auto",
        experts_only: bool = False,
        engine: EngineConfig | None = None,
        architecture: str | None = None,
        hub: Hub | None = None,
        tokenizer_json: str | os.PathLike[str] | None = None,
        gqa: int = 1,
        write_uqff: str | os.PathLike[str] | None = None,
        from_uqff: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> Model:
        """Open a GGUF file, the folder of a model, a model of the hub; without `path` the default.

        context: tokens of prompt and answer together; by default what the model was trained for,
            up to 8192 and to half of the free memory.
        threads: by default as many as this process may use.
        kv_dtype: of the KV cache; "q8_0" takes half the memory of "f16", and a little quality.
        weights: "f32" computes with the exact values of the file, for comparisons; slow and large.
        kv: how large the KV cache is, for all requests together, and its blocks.
        kv_tokens: short for `KvSize(tokens=kv_tokens)`.
        isq: quantize the weights while they are read: "Q4K", "Q8_0", "HQQ4", "FP8"..., or bits.
        topology: other types for some layers, a `Topology` or its YAML file.
        dtype: of the float weights that are not quantized; "auto": as they are stored.
        experts_only: of a mixture of experts quantize only the experts and the head.
        engine: how many requests run and wait, and what is kept.
        architecture: such as "mistral", in place of what a folder's config.json says.
        hub: revision and token for a `path` such as "owner/name:file", or that it must be offline.
        write_uqff: write the quantized weights to this new UQFF file, and open that.
        from_uqff: open this UQFF file, or the one of this name in the model's folder.
        tokenizer_json: a file to use in place of the model's own tokenizer.
        gqa: query heads to a KV head, which files from before GGUF do not say.
        progress: called with (bytes loaded, bytes in all).
        """
        checkpoint, recipe, plan = prepare(
            path, isq=isq, topology=topology, dtype=dtype, experts_only=experts_only,
            architecture=architecture, hub=hub, gqa=gqa, from_uqff=from_uqff, progress=progress,
        )  # fmt: skip
        if write_uqff is not None:
            checkpoint = _written(checkpoint, recipe, plan, Path(write_uqff), threads, progress)
            recipe, plan = recipes.load(checkpoint, architecture), Plan()
        engine, kv = engine or EngineConfig(), kv or KvSize(tokens=kv_tokens)
        size, room = _sizes(checkpoint, recipe.decoder, kv_dtype, context, kv, engine.max_seqs)
        program = decoder.compile(recipe.decoder, recipe.names, context=size)
        tokenizer = open_tokenizer(checkpoint, tokenizer_json)
        executor = NativeExecutor(
            program, checkpoint,
            threads=threads, weights=weights, plan=plan, kv_dtype=kv_dtype,
            blocks=-(-room // kv.block_size), block_size=kv.block_size,
            max_rows=MAX_ROWS, max_outputs=MAX_OUTPUTS, progress=progress,
        )  # fmt: skip
        return cls(checkpoint, recipe, program, tokenizer, _engine(executor, engine, tokenizer))

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.program.context

    @property
    def engine(self) -> Engine:
        """What answers requests; for servers and for statistics."""
        if self._engine is None:
            raise InvalidRequest("the model is closed; open it again")
        return self._engine

    @property
    def executor(self) -> Executor:
        """What runs the program; knows threads, instruction set and sizes."""
        return self.engine.executor

    @property
    def weight_formats(self) -> tuple[FormatTotal, ...]:
        """What the matrices are in memory: number formats, with counts and bytes."""
        return self._native.formats

    def re_isq(self, isq: str | int | None, *, progress: Progress | None = None) -> None:
        """Quantize the weights again, from the file, as `isq` of `open` says; None: as they are.

        Answers that are under way wait, and go on with the new weights. Needs memory for the old
        and the new weights together.
        """
        plan = replace(self._native.plan, isq=Plan.of(isq).isq)
        self.engine.change_model(lambda: self._native.requantize(plan, progress=progress))

    @property
    def _native(self) -> NativeExecutor:
        executor = self.engine.executor
        assert isinstance(executor, NativeExecutor)
        return executor

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The chat template: the file's, unless another one is assigned."""
        if self.checkpoint.kind == "gguf":
            return ChatTemplate.from_gguf(self.checkpoint.metadata)
        return ChatTemplate.from_folder(self.checkpoint.path, controls=self.tokenizer.controls)

    def set_chat_template(self, source: str) -> None:
        """Use another template: a name such as "chatml", a .jinja or .json file, or Jinja."""
        self.chat_template = self.chat_template.replaced(source)

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Token ids of plain text; control tokens in it are not special. BOS if it is used."""
        return self.tokenizer.encode(text, add_bos=add_bos)

    def encode_chat(
        self, messages: Sequence[Message], *, template_kwargs: Mapping[str, object] | None = None
    ) -> list[int]:
        """Token ids of a conversation in the chat template, up to where the answer begins.

        template_kwargs: more variables for the template, such as `enable_thinking`.
        """
        pieces = self.chat_template.render(messages, kwargs=template_kwargs or {})
        return self.tokenizer.encode_pieces(pieces)

    def decode(self, ids: Sequence[int], *, skip_specials: bool = False) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(ids, skip_specials=skip_specials)

    def logits(self, ids: Sequence[int], *, chunk: int = MAX_OUTPUTS) -> NDArray[np.float32]:
        """Logits `[tokens, vocab]`, row i after token i, computed `chunk` tokens a step."""
        checked = self._check_ids(ids)
        if not 1 <= chunk <= MAX_ROWS:
            raise InvalidRequest(f"chunk is {chunk}; it must be between 1 and {MAX_ROWS}")
        logits = np.empty((len(checked), self.spec.vocab), np.float32)

        def take(first: int, rows: NDArray[np.float32]) -> None:
            logits[first : first + len(rows)] = rows

        self._score(checked, Scoring(take), chunk=chunk)
        return logits

    def log_probabilities(self, ids: Sequence[int], *, start: int = 1) -> NDArray[np.float64]:
        """log p(ids[i] | ids[:i]) for `i` from `start` (at least 1) to the last."""
        checked = self._check_ids(ids)
        if not 1 <= start <= len(checked):
            raise InvalidRequest(f"start is {start}; it must be between 1 and {len(checked)}")
        found = np.empty(len(checked) - start)

        def take(first: int, rows: NDArray[np.float32]) -> None:
            wanted = checked[first + 1 : first + 1 + len(rows)]
            at = first + 1 - start
            found[at : at + len(rows)] = _log_softmax_at(rows, wanted)

        if len(found):
            self._score(checked[:-1], Scoring(take, start - 1))
        return found

    def generate(  # noqa: PLR0913
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        stop_ids: Iterable[int] = (),
        ignore_eos: bool = False,
        min_tokens: int | None = None,
        frequency_penalty: float | None = None,
        presence_penalty: float | None = None,
        repetition_penalty: float | None = None,
        dry: Dry | None = None,
        logit_bias: Mapping[int, float] | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        logprobs: int | None = None,
    ) -> Generation:
        """Continue a text, token ids, or a conversation (messages of `role` and `content`).

        The result is an iterator of pieces; it also tells the `seed`, `ids`, `finish_reason` and
        `usage`. Arguments are checked here, before the first piece is asked for.

        max_tokens: at most so many, and no more than the context leaves, which is the default.
        temperature: 0 always takes the likeliest token. `top_k` 0, `top_p` 1, `min_p` 0 mean "off".
            What is None (`repetition_penalty` too) is as `defaults` has it, or as `Sampling`.
        seed: by default random, and told by the result. The same seed gives the same answer.
        stop: strings that end the answer and are not part of it; `stop_ids` are tokens that do.
        ignore_eos: go on after the model's own end tokens. min_tokens: none ends it before so many.
        dry: made by `dry`. The other penalties, biases and processors: docs/sampling.md.
        logprobs: pieces tell each token's log-probability, and those of so many likeliest tokens.
        """
        given = locals()
        names = Sampling.__dataclass_fields__
        sampling = self.defaults.sampling({name: given[name] for name in names})
        request = self.request(prompt, sampling, max_tokens, stop=stop, stop_ids=stop_ids)
        request = replace(request, ignore_eos=ignore_eos, logprobs=logprobs)
        return Generation(self.engine, request)

    def request(
        self,
        prompt: Prompt,
        sampling: Sampling,
        max_tokens: int | None = None,
        *,
        stop: str | Sequence[str] = (),
        stop_ids: Iterable[int] = (),
    ) -> Request:
        """What `generate` asks of the engine, checked against this model."""
        sampling.check_ids(self.spec.vocab)
        return Request(
            ids=self._prompt_ids(prompt),
            sampling=sampling,
            max_tokens=max_tokens,
            stop=_check_stop(stop),
            stop_ids=frozenset(self._check_ids(tuple(stop_ids)) if stop_ids else ()),
            continues=not _is_chat(prompt),
        )

    def dry(
        self,
        multiplier: float,
        *,
        base: float = 1.75,
        allowed_length: int = 2,
        breakers: Sequence[str] = DRY_BREAKERS,
        range: int | None = None,
    ) -> Dry:
        """The DRY penalty on repeats (docs/sampling.md), with breakers in this model's tokens."""
        found = Breakers(breakers, self.tokenizer.token_bytes)
        return Dry(multiplier, base, allowed_length, found, range)

    def close(self) -> None:
        """End all answers, and free weights and cache. A closed model cannot be used."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self._check_ids(self.encode(prompt))
        if _is_chat(prompt):
            return self._check_ids(self.encode_chat(_check_messages(prompt)))
        return self._check_ids(prompt)

    def _check_ids(self, ids: Sequence[object]) -> list[int]:
        if not len(ids):
            raise InvalidRequest("the prompt is empty; give at least one token")
        try:
            array = np.asarray(ids).astype(np.int64, casting="same_kind")
            (_,) = array.shape
        except (TypeError, ValueError):
            raise InvalidRequest(
                "a prompt is text, a list of token ids, or a list of messages "
                "such as {'role': 'user', 'content': 'Hi'}"
            ) from None
        if array.min() < 0 or array.max() >= self.spec.vocab:
            raise InvalidRequest(
                f"token ids go from 0 to {self.spec.vocab - 1}; "
                f"found {array.min() if array.min() < 0 else array.max()}"
            )
        checked: list[int] = array.tolist()
        return checked

    def _score(self, ids: list[int], scoring: Scoring, *, chunk: int | None = None) -> None:
        request = Request(ids=ids, sampling=GREEDY, max_tokens=0, scoring=scoring, chunk=chunk)
        Generation(self.engine, request).read()


def open_tokenizer(
    checkpoint: Checkpoint, tokenizer_json: str | os.PathLike[str] | None = None
) -> Tokenizer:
    """The tokenizer of a checkpoint, from where its kind has it, or from a file."""
    if checkpoint.kind == "gguf" and tokenizer_json is None:
        return Tokenizer.from_gguf(checkpoint.metadata)
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    return HfTokenizer.from_folder(folder, tokenizer_json=tokenizer_json)


def prepare(  # noqa: PLR0913
    path: str | os.PathLike[str] | None,
    *,
    isq: str | int | None = None,
    topology: Topology | str | os.PathLike[str] | None = None,
    dtype: Dtype = "auto",
    experts_only: bool = False,
    architecture: str | None = None,
    hub: Hub | None = None,
    gqa: int = 1,
    from_uqff: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> tuple[Checkpoint, Recipe, Plan]:
    """What `Model.open` begins with: the files, what the model is, what becomes of the weights."""
    checkpoint = open_checkpoint(_locate(path, from_uqff, hub, progress), gqa=gqa)
    recipe = recipes.load(checkpoint, architecture)
    if isinstance(topology, str | os.PathLike):
        topology = Topology.from_file(Path(topology))
    plan = Plan.of(isq, topology, experts_only=experts_only, dtype=dtype)
    plan.topology.check(len(recipe.decoder.layers), DEVICES)
    return checkpoint, recipe, plan


def _sizes(
    checkpoint: Checkpoint,
    model: Decoder,
    kv_dtype: CacheType,
    context: int | None,
    kv: KvSize,
    max_seqs: int,
) -> tuple[int, int]:
    """Tokens of the context, and of the KV cache."""
    memory = {
        "bytes_per_token": token_bytes(model, kv_dtype),
        "weight_bytes": checkpoint.size_bytes,
    }
    size = choose_context(context, trained=model.context, **memory)
    room = choose_kv_tokens(kv, context=size, max_seqs=max_seqs, **memory)
    return (min(size, room) if context is None else size), room


def _engine(executor: Executor, config: EngineConfig, tokenizer: Tokenizer) -> Engine:
    def text(request: Request) -> TextStream:
        return TextStream(tokenizer, request.stop, at_start=not request.continues)

    return Engine(executor, config, text=text, stop_ids=tokenizer.stop_ids)


def _locate(
    path: str | os.PathLike[str] | None,
    from_uqff: str | os.PathLike[str] | None,
    hub: Hub | None,
    progress: Progress | None,
) -> Path:
    if from_uqff is None:
        return locate(path, hub, progress)
    if path is None:
        return locate_uqff(Path(), from_uqff)
    folder = Path(path).expanduser()
    return locate_uqff(folder if folder.is_dir() else locate(path, hub, progress), from_uqff)


def _written(
    checkpoint: Checkpoint,
    recipe: Recipe,
    plan: Plan,
    path: Path,
    threads: int | None,
    progress: Progress | None,
) -> Checkpoint:
    """The checkpoint as a UQFF file, which is new."""
    if path.suffix != UQFF:
        raise InvalidRequest(f"write_uqff is {str(path)!r}; the name must end in {UQFF}")
    if not plan.quantizes:
        raise InvalidRequest("write_uqff needs isq or a topology: what to quantize the weights to")
    threads = threads or default_threads()
    convert.write_uqff(checkpoint, recipe, plan, path, threads=threads, progress=progress)
    return open_checkpoint(path)


def _log_softmax_at(logits: NDArray[np.float32], ids: Sequence[int]) -> NDArray[np.float64]:
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    chosen = rows[np.arange(len(ids)), ids]
    result: NDArray[np.float64] = chosen - np.log(np.exp(rows).sum(axis=1))
    return result


def _is_chat(prompt: Prompt) -> bool:
    return len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _check_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(string, str) and string for string in strings):
        raise InvalidRequest("stop strings must be text, and not empty")
    return strings


def _check_messages(messages: Sequence[object]) -> list[Message]:
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise InvalidRequest(f"a message has a role and a content; this one is {message!r}")
    return list(messages)  # type: ignore[arg-type]
