"""A model that is open: text in, text out, and the logits between."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, NoReturn, ParamSpec, TypeGuard, cast

import numpy as np
from numpy.typing import NDArray

from squall import convert, decoder, executors, recipes
from squall.adapters.edits import adaptable
from squall.adapters.shelf import Adapters, Shelf
from squall.checkpoints import UQFF, Checkpoint, open_checkpoint
from squall.closing import Closing
from squall.engine.defaults import GenerationDefaults
from squall.engine.draft import Draft
from squall.engine.engine import Engine, EngineConfig
from squall.engine.generation import Generation
from squall.engine.memory import (
    KvSize,
    available_bytes,
    choose_context,
    choose_kv_tokens,
    token_bytes,
)
from squall.engine.request import CacheScope, Constraint, Request, Scoring
from squall.engine.sampling import DRY_BREAKERS, Breakers, Dry, LogitsProcessor, Sampling
from squall.engine.speculation import MOST_GUESSES, Speculation
from squall.errors import InvalidRequest
from squall.executors import DEVICES, Executor, Limits, ThreadPool, default_threads, thread_pool
from squall.locate import locate, locate_uqff
from squall.opening import Opening
from squall.program import Program
from squall.quant import FormatTotal, Plan, Topology
from squall.recipes import Recipe
from squall.spec import Decoder
from squall.text.chat import ChatPrompt, ChatTemplate
from squall.text.grammar import Grammar, Grammars
from squall.text.hf_tokenizer import HfTokenizer
from squall.text.stream import TextStream
from squall.text.tokenizer import Tokenizer
from squall.text.tools import Tool
from squall.weights import Progress, WeightStore

if TYPE_CHECKING:
    from squall.adapters.lora import Lora

Message = Mapping[str, str]
Prompt = str | Sequence[int] | Sequence[Message] | ChatPrompt
Prepared = tuple[Checkpoint, Recipe, Plan]

MAX_ROWS = 512
MAX_OUTPUTS = 64
# Tokens of the context by default where a prompt is one step, for which there are buffers.
LONGEST_STEP = 2048
# Of the free memory, for the weights of adapters.
ADAPTER_SHARE = 0.25
_NO_PROMPT = (
    "a prompt is text, a list of token ids, or a list of messages "
    "such as {'role': 'user', 'content': 'Hi'}"
)
_CLOSED = "the model is closed; open it again"
GREEDY = Sampling(temperature=0, seed=0)

_Options = ParamSpec("_Options")


def _one_by_one(
    describe: Callable[_Options, Opening],
) -> Callable[Concatenate[type[Model], _Options], Model]:
    """`Model.open_with` as a method that takes the options themselves, spelled nowhere else."""

    def open(cls: type[Model], /, *path: _Options.args, **options: _Options.kwargs) -> Model:
        return cls.open_with(describe(*path, **options))

    open.__doc__ = describe.__doc__
    first, *_ = inspect.signature(open).parameters.values()
    options = inspect.signature(describe).parameters.values()
    open.__signature__ = inspect.Signature([first, *options])  # type: ignore[attr-defined]
    return open


class Model(Closing):
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
        adapters: Shelf,
    ) -> None:
        self.defaults = GenerationDefaults.from_folder(checkpoint.path)
        self.checkpoint = checkpoint
        self.architecture = recipe.architecture
        self.spec: Decoder = recipe.decoder
        self.program = program
        self.tokenizer = tokenizer
        self._engine: Engine | None = engine
        self._adapters: Shelf | None = adapters
        self._whole = any(getattr(op, "shared", None) is not None for op in program.ops)

    @classmethod
    def open_with(cls, opening: Opening) -> Model:
        """Open what is described; `open` takes the options themselves."""
        checkpoint, recipe, plan = prepare(opening)
        if opening.write_uqff is not None:
            checkpoint = _written(checkpoint, recipe, plan, opening)
            recipe, plan = recipes.load(checkpoint, opening.architecture), Plan()
        engine = opening.engine or EngineConfig()
        kv = opening.kv or KvSize(tokens=opening.kv_tokens)
        tokenizer = open_tokenizer(checkpoint, opening.tokenizer_json)
        prepared = [(checkpoint, recipe, plan)]
        if (small := opening.of_draft) is not None:
            prepared.append(_prepared_draft(small, tokenizer))
        size, room = _sizes(prepared, opening, kv, engine.max_seqs)
        given = opening.chat_template
        template = given and _template(checkpoint).replaced(given)
        limits = Limits(
            rows={"tokens": MAX_ROWS, "outputs": MAX_OUTPUTS},
            blocks=-(-room // kv.block_size),
            block_size=kv.block_size,
            kv_dtype=opening.kv_dtype,
        )
        there, own = (limits, thread_pool(opening.threads)), prepared[0]

        def encode(text: str) -> list[int]:
            chat = [{"role": "user", "content": text}]
            prompt = (template or _template(checkpoint)).prompt(chat, tokenizer)
            return tokenizer.encode_pieces(prompt.pieces)

        executor = _executor(own, opening, size, there, encode)
        adapters = _shelf(own, opening, executor)
        most, draft = min(opening.draft_tokens or MOST_GUESSES, MAX_OUTPUTS), None
        if small is not None:
            draft = Draft(_executor(prepared[1], small, size, there, encode), executor.vocab)
        speculation = None if opening.draft is None else Speculation(most, draft)
        answering = _engine(executor, engine, tokenizer, speculation)
        model = cls(checkpoint, recipe, executor.program, tokenizer, answering, adapters)
        if template:
            model.chat_template = template
        return model

    open = classmethod(_one_by_one(Opening))

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.program.context

    @property
    def engine(self) -> Engine:
        """What answers requests; for servers and for statistics."""
        if self._engine is None:
            raise InvalidRequest(_CLOSED)
        return self._engine

    @property
    def adapters(self) -> Shelf:
        """LoRA adapters beside the weights, by name."""
        if self._adapters is None:
            raise InvalidRequest(_CLOSED)
        return self._adapters

    @property
    def executor(self) -> Executor:
        """What runs the program; knows threads, instruction set and sizes."""
        return self.engine.executor

    @property
    def weight_formats(self) -> tuple[FormatTotal, ...]:
        """What the matrices are in memory: number formats, with counts and bytes."""
        return self.executor.formats

    def re_isq(self, isq: str | int | None, *, progress: Progress | None = None) -> None:
        """Quantize the weights again, from the file, as `isq` of `open` says; None: as they are.

        Answers that are under way wait, and go on with the new weights. Needs memory for the old
        and the new weights together.
        """
        executor = self.executor
        plan = replace(executor.plan, isq=Plan.of(isq).isq)
        self.engine.change_model(lambda: executor.requantize(plan, progress=progress))

    @cached_property
    def grammars(self) -> Grammars:
        """What answers may look like, compiled for this model."""
        return Grammars(self.tokenizer, self.spec.vocab)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The chat template: the file's, unless another one is given or assigned."""
        return _template(self.checkpoint)

    def set_chat_template(self, source: str) -> None:
        """Use another template: a name such as "chatml", a .jinja or .json file, or Jinja."""
        self.chat_template = self.chat_template.replaced(source)

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Token ids of plain text; control tokens in it are not special. BOS if it is used."""
        if not isinstance(text, str):
            raise InvalidRequest(f"{text!r:.99} is no text; only text has tokens")
        return self.tokenizer.encode(text, add_bos=add_bos)

    def encode_chat(
        self, messages: Sequence[Message], *, template_kwargs: Mapping[str, object] | None = None
    ) -> list[int]:
        """Token ids of a conversation in the chat template, up to where the answer begins.

        template_kwargs: more variables for the template, such as `enable_thinking`.
        """
        prompt = self.chat_prompt(messages, template_kwargs=template_kwargs)
        return self.tokenizer.encode_pieces(prompt.pieces)

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Tool] = (),
        template_kwargs: Mapping[str, object] | None = None,
        continues: bool = False,
    ) -> ChatPrompt:
        """A conversation in the chat template; it tells how answers reason and call tools, too."""
        kwargs, tokenizer = template_kwargs or {}, self.tokenizer
        return self.chat_template.prompt(
            messages, tokenizer, tools=tools, kwargs=kwargs, continues=continues
        )

    def constraint(self, grammar: Grammar | type | Mapping[str, Any], prompt: object) -> Constraint:
        """What an answer to `prompt` may be, once it has reasoned."""
        if not isinstance(grammar, Grammar):
            grammar = Grammar.json_schema(grammar)
        reasoning = prompt.reasoning if isinstance(prompt, ChatPrompt) else None
        return self.grammars.compile(grammar, after=reasoning)

    def decode(self, ids: Sequence[int], *, skip_specials: bool = False) -> str:
        """The text of token ids."""
        try:
            return self.tokenizer.decode(ids, skip_specials=skip_specials)
        except TypeError:
            raise InvalidRequest(f"{ids!r:.99} are no token ids, which are whole numbers") from None

    def logits(
        self, ids: Sequence[int], *, chunk: int = MAX_OUTPUTS, adapters: Adapters | None = None
    ) -> NDArray[np.float32]:
        """Logits `[tokens, vocab]`, row i after token i, computed `chunk` tokens a step."""
        checked = self._check_ids(ids)
        if not isinstance(chunk, int) or not 1 <= chunk <= MAX_ROWS:
            raise InvalidRequest(f"chunk is {chunk}; it must be between 1 and {MAX_ROWS}")
        logits = np.empty((len(checked), self.spec.vocab), np.float32)

        def take(first: int, rows: NDArray[np.float32]) -> None:
            logits[first : first + len(rows)] = rows

        self._score(checked, adapters, scoring=Scoring(take), chunk=chunk)
        return logits

    def log_probabilities(
        self, ids: Sequence[int], *, start: int = 1, adapters: Adapters | None = None
    ) -> NDArray[np.float64]:
        """log p(ids[i] | ids[:i]) for `i` from `start` (at least 1) to the last."""
        checked = self._check_ids(ids)
        if not isinstance(start, int) or not 1 <= start <= len(checked):
            raise InvalidRequest(f"start is {start}; it must be between 1 and {len(checked)}")
        found = np.empty(len(checked) - start)

        def take(first: int, rows: NDArray[np.float32]) -> None:
            wanted = checked[first + 1 : first + 1 + len(rows)]
            at = first + 1 - start
            found[at : at + len(rows)] = _log_softmax_at(rows, wanted)

        if len(found):
            self._score(checked[:-1], adapters, scoring=Scoring(take, start - 1))
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
        grammar: Grammar | type | Mapping[str, Any] | None = None,
        adapters: Adapters | None = None,
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
        grammar: what the answer must look like; a pydantic class or a JSON schema mean its JSON.
        adapters: names of `Model.adapters`, or names with weights; None: those that are active.
        """
        given = locals()
        names = Sampling.__dataclass_fields__
        sampling = self.defaults.sampling({name: given[name] for name in names})
        read = self._read(prompt)
        constraint = None if grammar is None else self.constraint(grammar, read)
        request = self.request(
            read, sampling, max_tokens, stop=stop, stop_ids=stop_ids, constraint=constraint,
            adapters=adapters,
        )  # fmt: skip
        request = replace(request, ignore_eos=ignore_eos, logprobs=logprobs)
        return Generation(self.engine, request)

    def request(  # noqa: PLR0913
        self,
        prompt: Prompt,
        sampling: Sampling,
        max_tokens: int | None = None,
        *,
        stop: str | Sequence[str] = (),
        stop_ids: Iterable[int] = (),
        constraint: Constraint | None = None,
        adapters: Adapters | None = None,
    ) -> Request:
        """What `generate` asks of the engine, checked against this model."""
        sampling.check_ids(self.spec.vocab)
        read = self._read(prompt)
        chat = read if isinstance(read, ChatPrompt) else None
        ids = read if chat is None else self.tokenizer.encode_pieces(chat.pieces)
        in_text = chat is None or any(piece.content for piece in chat.pieces[-1:])
        mixture, digest = self.adapters.choose(adapters)
        return Request(
            ids=self._check_ids(ids),
            sampling=sampling,
            max_tokens=max_tokens,
            stop=_check_stop(stop),
            stop_ids=frozenset(self._check_stop_ids(stop_ids)),
            continues=constraint is not None or in_text,
            constraint=constraint,
            shown=frozenset() if chat is None else chat.shown(self.tokenizer),
            adapters=mixture,
            scope=CacheScope(adapter=digest),
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
            self._engine = self._adapters = None

    def _read(self, prompt: Prompt) -> Sequence[int] | ChatPrompt:
        """The prompt as ids, or as a chat in the template."""
        if isinstance(prompt, str):
            return self.encode(prompt)
        if _is_chat(prompt):
            _check_messages(prompt)
            return self.chat_prompt(prompt)
        return cast("Sequence[int] | ChatPrompt", prompt)

    def _check_ids(self, ids: object, wrong: str = _NO_PROMPT) -> list[int]:
        try:
            array = np.asarray(ids)
            if array.size:
                array = array.astype(np.int64, casting="same_kind")
            (count,) = array.shape
        except (TypeError, ValueError, OverflowError):
            raise InvalidRequest(wrong) from None
        if not count:
            raise InvalidRequest("the prompt is empty; give at least one token")
        if array.min() < 0 or array.max() >= self.spec.vocab:
            raise InvalidRequest(
                f"token ids go from 0 to {self.spec.vocab - 1}; "
                f"found {array.min() if array.min() < 0 else array.max()}"
            )
        checked: list[int] = array.tolist()
        return checked

    def _check_stop_ids(self, ids: Iterable[int]) -> list[int]:
        wrong = "stop_ids must be token ids, whole numbers"
        if not isinstance(ids, Iterable):
            raise InvalidRequest(wrong)
        return self._check_ids(given, wrong) if (given := list(ids)) else given

    def _score(self, ids: list[int], adapters: Adapters | None, **scoring: Any) -> None:
        request = self.request(ids, GREEDY, adapters=adapters)
        Generation(self.engine, replace(request, max_tokens=0, **scoring)).read()


def open_tokenizer(
    checkpoint: Checkpoint, tokenizer_json: str | os.PathLike[str] | None = None
) -> Tokenizer:
    """The tokenizer of a checkpoint, from where its kind has it, or from a file."""
    if checkpoint.kind == "gguf" and tokenizer_json is None:
        return Tokenizer.from_gguf(checkpoint.metadata)
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    return HfTokenizer.from_folder(folder, tokenizer_json=tokenizer_json)


def _template(checkpoint: Checkpoint) -> ChatTemplate:
    if checkpoint.kind == "gguf":
        return ChatTemplate.from_gguf(checkpoint.metadata)
    return ChatTemplate.from_folder(checkpoint.path)


def prepare(opening: Opening) -> Prepared:
    """What `Model.open` begins with: the files, what the model is, what becomes of the weights."""
    checkpoint = open_checkpoint(_locate(opening), gqa=opening.gqa)
    recipe = recipes.load(checkpoint, opening.architecture)
    topology = opening.topology
    if isinstance(topology, str | os.PathLike):
        topology = Topology.from_file(Path(topology))
    plan = Plan.of(opening.isq, topology, experts_only=opening.experts_only, dtype=opening.dtype)
    plan.topology.check(len(recipe.decoder.layers), DEVICES)
    return checkpoint, recipe, plan


def _prepared_draft(opening: Opening, tokenizer: Tokenizer) -> Prepared:
    """What opening a draft model begins with; raises InvalidRequest for another vocabulary."""
    prepared = prepare(opening)
    found = open_tokenizer(prepared[0], opening.tokenizer_json)
    if (id_ := tokenizer.differs(found)) is not None:
        raise InvalidRequest(
            f"the draft model {prepared[0].path} has another vocabulary, from token {id_} on; "
            "choose a smaller model of the same family"
        )
    return prepared


def _sizes(
    models: Sequence[Prepared], opening: Opening, kv: KvSize, max_seqs: int
) -> tuple[int, int]:
    """Tokens of the context, and of the KV cache, which several models share."""
    caches = [*models, *models[:1]] if opening.xlora else models
    each = [token_bytes(recipe.decoder, opening.kv_dtype) for _, recipe, _ in caches]
    weights = [checkpoint.size_bytes for checkpoint, _, _ in models]
    memory = {"bytes_per_token": sum(each), "weight_bytes": sum(weights)}
    trained, wanted = models[0][1].decoder.context, opening.context
    if wanted is None and opening.anymoe:
        wanted = min(trained, LONGEST_STEP)
    size = choose_context(wanted, trained=trained, **memory)
    room = choose_kv_tokens(kv, context=size, max_seqs=max_seqs, **memory)
    return (min(size, room) if opening.context is None else size), room


def _executor(
    model: Prepared,
    opening: Opening,
    context: int,
    there: tuple[Limits, ThreadPool],
    encode: Callable[[str], Sequence[int]],
) -> Executor:
    """One of the model, with what adapters make of it. encode: what a user says, as tokens."""
    checkpoint, recipe, plan = model
    context, (limits, pool) = min(context, recipe.decoder.context), there
    store = partial(WeightStore, checkpoint, plan=plan, exact=opening.weights == "f32")
    given: dict[str, Any] = {"pool": pool, "progress": opening.progress}
    if opening.xlora is not None:
        from squall.adapters.target import Target
        from squall.adapters.xlora import CLASSIFIER, Parts, TwoPasses

        parts = Parts.read(opening.xlora, Target.of(checkpoint, recipe), opening.hub)
        own, programs = (
            store(others={CLASSIFIER: parts.classifier}),
            parts.programs(recipe, context),
        )
        return cast(Executor, TwoPasses(parts, programs, own, limits, **given))
    if opening.anymoe is not None:
        from squall.adapters.anymoe import Experts
        from squall.adapters.anymoe_training import open_experts

        experts = Experts(opening.anymoe, checkpoint, recipe, opening.hub)
        own = store(others=experts.others, merged=experts.merged)
        # A prompt is one step, beside a row of each other request.
        most = max(context + (opening.engine or EngineConfig()).max_seqs, MAX_ROWS)
        limits = replace(limits, rows={**limits.rows, "tokens": most})
        given |= {"context": context, "encode": encode, "trained": opening.progress}
        return open_experts(experts, own, limits, **given)
    program = adaptable(decoder.compile(recipe.decoder, recipe.names, context=context))
    return executors.open(program, store(**_merged(model, opening)), limits, **given)


def _read_adapter(model: Prepared, opening: Opening, path: str | os.PathLike[str]) -> Lora:
    from squall.adapters.lora import read
    from squall.adapters.target import Target

    return read(path, Target.of(*model[:2]), hub=opening.hub)


def _merges(checkpoint: Checkpoint, opening: Opening) -> bool:
    """Whether adapters become part of the weights."""
    if opening.merge is None:
        stored = {tensor.format for tensor in checkpoint.tensors.values()}
        return not checkpoint.quantization and stored <= {"f32", "f16", "bf16"}
    if opening.merge and not opening.adapters:
        raise InvalidRequest("merge: there is nothing to merge; name adapters")
    return opening.merge


def _merged(model: Prepared, opening: Opening) -> dict[str, Any]:
    """What a weight store is to add to the weights."""
    if not opening.adapters or not _merges(model[0], opening):
        return {}
    from squall.adapters.lora import merged_terms, merged_vectors

    active = opening.active or {}
    loras = [
        (_read_adapter(model, opening, path), active.get(name, 1.0))
        for name, path in opening.adapters.items()
    ]
    return {"merged": merged_terms(loras), "vectors": merged_vectors(loras)}


def _shelf(model: Prepared, opening: Opening, executor: Executor) -> Shelf:
    """The adapters that requests may have; at first those of the opening."""
    limit, free = opening.adapter_bytes, available_bytes()
    if limit is None and free is not None:
        limit = int(free * ADAPTER_SHARE)
    alone = opening.xlora or opening.anymoe

    def refuse(_: object) -> NoReturn:
        raise InvalidRequest("a model with X-LoRA or AnyMoE takes no adapters beside its own")

    make = refuse if alone else executor.adapter
    shelf = Shelf(partial(_read_adapter, model, opening), make, limit_bytes=limit)
    if _merges(model[0], opening):
        return shelf
    adapters = opening.adapters or {}
    for number, (name, path) in enumerate(adapters.items(), start=1):
        shelf.load(name, path)
        if opening.progress is not None:
            opening.progress(number, len(adapters))
    shelf.activate(opening.active or {})
    return shelf


def _engine(
    executor: Executor, config: EngineConfig, tokenizer: Tokenizer, speculation: Speculation | None
) -> Engine:
    def text(request: Request) -> TextStream:
        at_start = not request.continues
        return TextStream(tokenizer, request.stop, at_start=at_start, shown=request.shown)

    stop_ids = tokenizer.stop_ids
    return Engine(executor, config, text=text, stop_ids=stop_ids, speculation=speculation)


def _locate(opening: Opening) -> Path:
    path, name = opening.path, opening.from_uqff
    if name is not None and (path is None or Path(path).expanduser().is_dir()):
        return locate_uqff(Path(path or "").expanduser(), name)
    judge = partial(recipes.judge, architecture=opening.architecture)
    found = locate(path, opening.hub, opening.progress, judge)
    return found if name is None else locate_uqff(found, name)


def _written(checkpoint: Checkpoint, recipe: Recipe, plan: Plan, opening: Opening) -> Checkpoint:
    """The checkpoint as a UQFF file, which is new."""
    path = Path(opening.write_uqff or "")
    if path.suffix != UQFF:
        raise InvalidRequest(f"write_uqff is {str(path)!r}; the name must end in {UQFF}")
    if not plan.quantizes:
        raise InvalidRequest("write_uqff needs isq or a topology: what to quantize the weights to")
    threads = opening.threads or default_threads()
    convert.write(checkpoint, recipe, plan, path, threads=threads, progress=opening.progress)
    return open_checkpoint(path)


def _log_softmax_at(logits: NDArray[np.float32], ids: Sequence[int]) -> NDArray[np.float64]:
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    chosen = rows[np.arange(len(ids)), ids]
    result: NDArray[np.float64] = chosen - np.log(np.exp(rows).sum(axis=1))
    return result


def _is_chat(prompt: Prompt) -> TypeGuard[Sequence[Message]]:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _check_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) and s for s in strings):
        raise InvalidRequest("stop strings must be text, and not empty")
    return tuple(strings)


def _check_messages(messages: Sequence[object]) -> None:
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise InvalidRequest(f"a message has a role and a content; this one is {message!r}")
        if not isinstance(message["role"], str) or not isinstance(message["content"], str | list):
            raise InvalidRequest(f"role and content of a message are text; this one is {message!r}")
