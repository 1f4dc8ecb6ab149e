"""A model that is open: text in, text out, and the logits between."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import numpy as np
from numpy.typing import NDArray

from squall.adapters.shelf import Adapters, Shelf
from squall.assembly import MAX_OUTPUTS, MAX_ROWS, Assembly, assemble, template_of
from squall.closing import Closing
from squall.engine.defaults import GenerationDefaults
from squall.engine.engine import Engine
from squall.engine.generation import Generation
from squall.engine.request import CacheScope, Constraint, Request, Scoring
from squall.engine.sampling import DRY_BREAKERS, Breakers, Dry, LogitsProcessor, Sampling
from squall.errors import ContextLengthExceeded, InvalidRequest
from squall.executors import Executor
from squall.opening import Opening, one_by_one
from squall.program import Program
from squall.quant import FormatTotal, Plan
from squall.spec import Decoder
from squall.text.chat import ChatPrompt, ChatTemplate
from squall.text.grammar import Grammar, Grammars
from squall.text.images import BLIND, Placeholder
from squall.text.tools import Tool
from squall.vision.images import OWN, read_all
from squall.weights import Progress

if TYPE_CHECKING:
    from squall.vision.placing import Placed
    from squall.vision.sight import Seen, Sight

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message] | ChatPrompt

_NO_PROMPT = (
    "a prompt is text, a list of token ids, or a list of messages "
    "such as {'role': 'user', 'content': 'Hi'}"
)
_CLOSED = "the model is closed; open it again"
GREEDY = Sampling(temperature=0, seed=0)


def _open(cls: type[Model], opening: Opening) -> Model:
    return cls.open_with(opening)


class Model(Closing):
    """A language model, open and ready. Make one with `Model.open`.

    The KV cache keeps what earlier requests computed, and a prompt that begins like one of them is
    computed only from where it differs; so a chat does not read its history again. Threads and
    tasks may share a model: their answers are computed together.
    """

    def __init__(self, parts: Assembly) -> None:
        self.defaults = GenerationDefaults.from_folder(parts.checkpoint.path)
        self.checkpoint = parts.checkpoint
        self.architecture = parts.recipe.architecture
        self.spec: Decoder = parts.recipe.decoder
        self.program: Program = parts.engine.executor.program
        self.tokenizer = parts.tokenizer
        self._sight = parts.sight
        self.media = OWN  # where its images may come from
        self._engine: Engine | None = parts.engine
        self._adapters: Shelf | None = parts.adapters
        if parts.template is not None:
            self.chat_template = parts.template

    @classmethod
    def open_with(cls, opening: Opening) -> Model:
        """Open what is described; `open` takes the options themselves."""
        return cls(assemble(opening))

    open = classmethod(one_by_one(Opening, _open))

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
    def sight(self) -> Sight | None:
        """What it reads images with, if it does."""
        return self._sight if self.engine else None

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
        executor, sight = self.executor, self.sight
        plan = replace(executor.plan, isq=Plan.of(isq).isq)

        def change() -> None:
            ready = None if sight is None else sight.replanned(plan)
            executor.requantize(plan, progress=progress)
            if ready is not None:
                ready()

        self.engine.change_model(change)

    @cached_property
    def grammars(self) -> Grammars:
        """What answers may look like, compiled for this model."""
        return Grammars(self.tokenizer, self.spec.vocab)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The chat template: the file's, unless another one is given or assigned."""
        return template_of(self.checkpoint)

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
        return self.encode_prompt(self.chat_prompt(messages, template_kwargs=template_kwargs))

    def encode_prompt(self, prompt: ChatPrompt) -> list[int]:
        """Its token ids, with those that images stand in the place of."""
        if not prompt.images:
            return self.tokenizer.encode_pieces(prompt.pieces)
        return list(self._seen(prompt)[0].ids)

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Tool] = (),
        template_kwargs: Mapping[str, object] | None = None,
        continues: bool = False,
    ) -> ChatPrompt:
        """A conversation in the chat template; it tells how answers reason and call tools, too."""
        placeholder = Placeholder(self.sight.family.placeholder) if self.sight else None
        return self.chat_template.prompt(
            messages, self.tokenizer, tools=tools, kwargs=template_kwargs or {},
            continues=continues, placeholder=placeholder,
        )  # fmt: skip

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

        A content is a text, or for models that see a list of texts and images (docs/vision.md).

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
        truncate: bool = False,
        tenant: str = "",
    ) -> Request:
        """What `generate` asks of the engine, checked against this model. tenant: for whom."""
        sampling.check_ids(self.spec.vocab)
        read = self._read(prompt)
        chat = read if isinstance(read, ChatPrompt) else None
        mixture, digest = self.adapters.choose(adapters)
        shown: dict[str, Any] = {"adapters": mixture, "scope": CacheScope(tenant, digest)}
        placed: Placed | None = None
        images: list[Seen] = []
        if chat is None:
            ids: Sequence[int] = self._check_ids(read)
        elif not chat.images:
            ids = self.encode_prompt(chat)
        else:
            placed, images = self._seen(chat)
            ids = placed.ids
            if not truncate:
                self._check_room(placed, len(images))
        if self.sight is not None:
            shown = self.sight.fields(placed, images, **shown)
        in_text = chat is None or any(piece.content for piece in chat.pieces[-1:])
        return Request(
            ids=ids,
            sampling=sampling,
            max_tokens=max_tokens,
            stop=_check_stop(stop),
            stop_ids=frozenset(self._check_stop_ids(stop_ids)),
            continues=constraint is not None or in_text,
            constraint=constraint,
            shown=frozenset() if chat is None else chat.shown(self.tokenizer),
            truncate=truncate,
            **shown,
        )

    def _seen(self, prompt: ChatPrompt) -> tuple[Placed, list[Seen]]:
        """Where a prompt's images stand in its ids, and the images, which no tower has read yet."""
        from squall.vision.placing import place

        if self.sight is None:
            raise InvalidRequest(BLIND)
        images = read_all([part["source"] for part in prompt.images], self.media)
        seen = [
            self.sight.process(image, part["detail"])
            for part, image in zip(prompt.images, images, strict=True)
        ]
        read = [image.processed for image in seen]
        return place(prompt.pieces, read, self.sight.family, self.tokenizer), seen

    def _check_room(self, placed: Placed, images: int) -> None:
        """Raises ContextLengthExceeded before the tower reads images that have no room."""
        if (count := len(placed.ids)) >= self.context:
            of_images = sum(run.stop - run.start for run in placed.runs)
            raise ContextLengthExceeded(
                f"{count} tokens, {of_images} of them of {images} images, do not fit the context "
                f"of {self.context} tokens; send fewer images or smaller ones, or open the model "
                "with a longer context"
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
            self._engine = self._adapters = self._sight = None

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
            what = "role and content of a message are text, or content a list of texts and images"
            raise InvalidRequest(f"{what}; this one is {message!r:.200}")
