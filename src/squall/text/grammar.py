"""Grammars: what an answer may be, and which tokens may therefore come next.

All kinds become llguidance's dialect of Lark, which is compiled once a model.
"""

from __future__ import annotations

import copy
import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, cast, get_origin

import numpy as np

from squall.errors import InvalidCheckpoint, InvalidRequest, SamplingFailed
from squall.files import parse_json, quote
from squall.machine import lower_priority
from squall.text.reasoning import Reasoning, control_id
from squall.text.tokenizer import Tokenizer
from squall.text.yacc import lark_of_yacc

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from numpy.typing import NDArray

Kind = Literal["regex", "yacc", "lark", "json_schema", "json_object", "choice"]
MAX_BYTES = 256 << 10
MAX_REGEX = 4096  # characters of a pattern: compiling may take the square of them
MAX_PATTERNS = 32 << 10  # characters of all patterns of a JSON schema
MAX_JOINED = 12  # patterns that one text must match: each takes some four times as long
MAX_MULTIPLE = 100_000  # states of a number that must be a multiple
MAX_DEPTH = 100  # levels of a JSON schema
MAX_DIGITS = 20  # in a row, where a number could go on for ever
CACHED = 64
_STACK_BYTES = 512 << 20  # of address space: compiling recurses into each rule
_STACK = threading.Lock()
_NICE = 5
# Models may go on with white space for ever: a space, or a new line and its indentation.
_OPTIONS = {"whitespace_pattern": r"( |\n[ \t]{0,32})?"}
_OTHERS = {"additionalProperties", "patternProperties", "unevaluatedProperties"}
_PARTS = {"allOf", "anyOf", "oneOf", "$ref"}
_NAMED = {"properties", "patternProperties"}
_OWN = {"pattern", "properties", "items", "prefixItems", *_OTHERS}
# Those of the standard; all others only describe, as for "password".
_FORMATS = frozenset({
    "date-time", "time", "date", "duration", "email", "idn-email", "hostname", "idn-hostname",
    "ipv4", "ipv6", "uri", "uri-reference", "iri", "iri-reference", "uuid", "uri-template",
    "json-pointer", "relative-json-pointer", "regex",
})  # fmt: skip
_ROLES = {
    **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions"), "names"),
    **dict.fromkeys(("const", "default", "enum", "examples"), "data"),
}
# Dates that there are: no year 0, and 29 February in leap years alone.
_LEAP = r"(0[48]|[2468][048]|[13579][26])"
_DATE = (
    r"^(([1-9]\d{3}|0[1-9]\d\d|00[1-9]\d|000[1-9])-(0[13-9]|1[0-2]|02-[01]|02-2[0-8])"
    rf"|(\d\d{_LEAP}|{_LEAP}00)-02-29)"
)
_LARK = re.compile(r'"(?:[^"\\\n]|\\.)*"|(?://|#)[^\n]*|/(?:[^/\\\n]|\\.)+/|(%json\s*)|[&~]')
_EXCEPT = re.compile(r"\[\^|\\[ux]")
_KEYWORDS = re.compile(r"Unimplemented keys: \[(.*)\]")


@dataclass(frozen=True)
class Grammar:
    """What an answer must be: `value` in the language `kind`.

    json_schema: a JSON text; json_object: nothing; choice: a JSON list of texts.
    lark: the same in llguidance's Lark, with the rule `start`.
    """

    kind: Kind
    value: str = ""
    lark: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in _KINDS:
            known = ", ".join(_KINDS)
            raise InvalidRequest(f"unknown kind of grammar {quote(str(self.kind))}; known: {known}")
        if not isinstance(self.value, str) or not (self.value or self.kind == "json_object"):
            raise InvalidRequest(f"the {self.kind} must be a text that is not empty")
        size = len(self.value.encode("utf-8", "replace"))
        limit = MAX_REGEX if self.kind == "regex" else MAX_BYTES
        if size > limit:
            raise InvalidRequest(f"the {self.kind} has {size} bytes; the limit is {limit}")
        object.__setattr__(self, "lark", _KINDS[self.kind](self.value))

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str | type) -> Grammar:
        """A JSON schema: an object, its JSON text, or a type that pydantic can describe."""
        if isinstance(schema, type) or get_origin(schema):
            from pydantic import PydanticUserError, TypeAdapter

            try:
                schema = TypeAdapter(cast("Any", schema)).json_schema()
            except PydanticUserError as error:
                raise InvalidRequest(f"{schema} has no JSON schema: {error.message}") from None
        return cls("json_schema", schema if isinstance(schema, str) else _dumped(schema))

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Grammar:
        """One of `texts`, exactly."""
        return cls("choice", _dumped(texts))

    def unsupported(self) -> str:
        """What of it cannot be enforced; empty if all can."""
        from llguidance import LLMatcher

        source, found = LLMatcher.grammar_from_lark(self.lark), list[str]()
        _deep(lambda: found.append(LLMatcher.validate_grammar(source)))
        return _told(found[0])


def _dumped(value: object) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"the grammar is not JSON: {str(error)[:200]}") from None


def _parsed(text: str) -> Any:
    try:
        found = parse_json(f'{{"grammar": {text}}}', "the grammar", unique=True)
    except InvalidCheckpoint as error:
        raise InvalidRequest(str(error)[:300]) from None
    if len(found) > 1:
        raise InvalidRequest("the grammar is not one JSON text")
    return found["grammar"]


def _of_regex(value: str) -> str:
    from llguidance import regex_to_lark

    return f"start: /{regex_to_lark(value, 'dw')}/"


def _of_lark(value: str) -> str:
    """The source, with limits and options in its schemas."""
    done, at, joined = [], 0, 0
    for found in _LARK.finditer(value):
        joined += found[0] in "&~" and found.start() >= at
        if not found[1] or found.start() < at:
            continue
        try:
            _, end = json.JSONDecoder().raw_decode(value, found.end())
        except (ValueError, RecursionError):
            raise InvalidRequest("the Lark has a %json that JSON does not follow") from None
        done += [value[at : found.start()], _json(_parsed(value[found.end() : end]))]
        at = end
    if joined > MAX_JOINED:
        raise InvalidRequest(f"the Lark has {joined} of & and ~; the limit is {MAX_JOINED}")
    return "".join(done) + value[at:]


def _of_choice(value: str) -> str:
    texts = _parsed(value)
    if not isinstance(texts, list) or not texts or not all(t and isinstance(t, str) for t in texts):
        raise InvalidRequest("a choice must be a list of at least one text, and none may be empty")
    return "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, dict.fromkeys(texts)))


_KINDS: Mapping[str, Callable[[str], str]] = {
    "regex": _of_regex,
    "yacc": lark_of_yacc,
    "lark": _of_lark,
    "json_schema": lambda value: f"start: {_json(_parsed(value))}",
    "json_object": lambda _: f"start: {_json({'type': 'object'})}",
    "choice": _of_choice,
}


def _json(schema: Any) -> str:
    """A schema as a term of Lark, without what would take too long.

    Objects that list properties have no others, unless the schema says or may mean that they do.
    """
    if schema is False or not isinstance(schema, dict | bool):
        raise InvalidRequest("a JSON schema must be an object, or true")
    schema = {} if schema is True else schema
    every = [*_nodes(schema, "schema")]
    nodes, schemas = [node for node, _ in every], [n for n, role in every if role == "schema"]
    patterns = _patterns(nodes)
    multiples = [Decimal(str(m)) for n in nodes if type(m := n.get("multipleOf")) in (int, float)]
    if not _common(multiples) <= MAX_MULTIPLE:
        raise InvalidRequest(
            "the least common multiple of all multipleOf, with as many decimals as any of them "
            f"has, may be {MAX_MULTIPLE}"
        )
    open_ = any("allOf" in n or ("properties" in n and n.keys() & _PARTS) for n in schemas)
    for node in schemas:
        if "properties" in node and not open_ and not node.keys() & _OTHERS:
            node["additionalProperties"] = False
        if node.get("format") in ("date", "date-time"):
            node.setdefault("pattern", _DATE)
        elif isinstance(format_ := node.get("format"), str) and format_ not in _FORMATS:
            del node["format"]
        if node.get("uniqueItems") is False:
            del node["uniqueItems"]
    # The last word: what a client says there could turn off what is enforced.
    return "%json " + json.dumps({**schema, "x-guidance": _options(schemas, patterns)})


def _options(schemas: Iterable[Mapping[str, Any]], patterns: Iterable[str]) -> Mapping[str, str]:
    """How llguidance reads it; which escapes there may be, of those that it can understand."""
    if any(map(_EXCEPT.search, patterns)):  # an escaped quote is read as what is not one
        return _OPTIONS | {"json_allowed_escapes": "nrbtf"}
    # Names could be written in other ways, with a value of another kind.
    if any(n.get("additionalProperties") is not False and n.keys() & _NAMED for n in schemas):
        return _OPTIONS | {"json_allowed_escapes": 'nrbtf"\\'}
    return _OPTIONS


def _nodes(value: Any, role: str, depth: int = 0) -> Iterator[tuple[dict[str, Any], str]]:
    """All objects in a schema, and whether each is a schema, has them by names, or is data."""
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"the JSON schema has more than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        yield value, role
        for key, inner in value.items():
            named = "schema" if role == "names" else role
            yield from _nodes(
                inner, _ROLES.get(key, role) if role == "schema" else named, depth + 1
            )
    elif isinstance(value, list):
        for inner in value:
            yield from _nodes(inner, role, depth + 1)


def without(schema: Mapping[str, Any], keywords: Iterable[str]) -> dict[str, Any]:
    """A schema that does not have these keywords, wherever they are."""
    found: dict[str, Any] = json.loads(json.dumps(schema))
    for node, role in _nodes(found, "schema"):
        for keyword in keywords if role == "schema" else ():
            node.pop(keyword, None)
    return found


def _patterns(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """All patterns, unless they would take too long."""
    patterns = [p for node in nodes if isinstance(p := node.get("pattern"), str)]
    patterns += [p for node in nodes for p in _object(node.get("patternProperties"))]
    if len(max(patterns, key=len, default="")) > MAX_REGEX or len("".join(patterns)) > MAX_PATTERNS:
        raise InvalidRequest(
            f"a pattern may have {MAX_REGEX} characters, those of a JSON schema {MAX_PATTERNS}"
        )
    joined = min(len({*patterns}), 1 + sum(max(0, _applied(node) - 1) for node in nodes))
    if joined > MAX_JOINED:
        raise InvalidRequest(
            f"{joined} patterns may apply to one text, by allOf and $ref; the limit is {MAX_JOINED}"
        )
    return patterns


def _applied(node: Mapping[str, Any]) -> int:
    """How many schemas must hold at once."""
    several = node.get("allOf")
    more = len(several) - 1 if isinstance(several, list) else 0
    return more + len(node.keys() & _PARTS) + (not node.keys().isdisjoint(_OWN))


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _common(values: Sequence[Decimal]) -> float:
    """The least common multiple, counted in the last digit that any of them has."""
    digits = min((int(v.as_tuple().exponent) for v in values if v.is_finite()), default=0)
    if not all(v.is_finite() and abs(v.adjusted()) < 20 for v in values):
        return math.inf
    return math.lcm(*(int(v.scaleb(-min(digits, 0))) for v in values))


class Grammars:
    """The compiled grammars of one model; the latest are kept."""

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        """`vocab`: how many ids the model can draw; what the tokenizer lacks never may be."""
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._lock = threading.Lock()
        # By kind, value and `after`; the latest used are the last.
        self._kept: OrderedDict[tuple[Grammar, Reasoning | None], Future[Callable[[], Matcher]]]
        self._kept = OrderedDict()

    def compile(self, grammar: Grammar, *, after: Reasoning | None = None) -> Callable[[], Matcher]:
        """What starts a matcher for each answer; raises InvalidRequest for what it cannot enforce.

        after: the answer may reason first, or must if the prompt has begun to.
        """
        key, mine = (grammar, after), Future[Callable[[], Matcher]]()
        with self._lock:
            kept = self._kept.setdefault(key, mine)
            self._kept.move_to_end(key)
            if len(self._kept) > CACHED:
                self._kept.popitem(last=False)
        if kept is mine:
            try:
                mine.set_result(self._compile(grammar, after))
            except BaseException as error:
                with self._lock:
                    self._kept.pop(key, None)
                mine.set_exception(error)
        return kept.result()

    def warm(self) -> None:
        """Prepare what the first would wait for: a second, of a large vocabulary."""
        with suppress(InvalidRequest):
            _ = self._vocabulary

    @cached_property
    def _vocabulary(self) -> _Vocabulary:
        return _Vocabulary(self._tokenizer, self._vocab)

    def _compile(self, grammar: Grammar, after: Reasoning | None) -> Callable[[], Matcher]:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            max_items_in_row=5_000,  # an object may have so many optional properties
            step_max_items=20_000,
            max_lexer_states=50_000,
            verbose_errors=False,
        )
        library, found = self._vocabulary.library, list[LLMatcher]()
        source = grammar.lark
        parts = [{"name": "answer", "lark_grammar": source}]
        if after is not None:
            parts.insert(0, {"lark_grammar": self._reasoned(after)})
        text = json.dumps({"grammars": parts})
        _deep(lambda: found.append(LLMatcher(library, text, log_level=0, limits=limits)))
        if not found or (error := found[0].get_error()):
            raise InvalidRequest(f"the {grammar.kind} cannot be enforced: {_told(error)}")
        new = partial(Matcher, self._vocabulary, "%json" in source)
        try:
            new(found[0].deep_copy()).allowed(())
        except SamplingFailed as failed:
            raise InvalidRequest(f"no answer fits the {grammar.kind}: {failed}") from None
        return lambda: new(found[0].deep_copy())

    def _reasoned(self, after: Reasoning) -> str:
        """A section of free text, which must be there if the prompt has begun it, then the answer.

        Its marks may be control tokens.
        """
        marks = [
            (mark, control_id(self._tokenizer, mark)) for mark in (after.opening, after.closing)
        ]
        (opening, begin), (closing, end) = marks
        first = json.dumps(opening) if begin is None else f"<[{begin}]>"
        suffix = f"[suffix={json.dumps(closing)}]" if end is None else ""
        last = "" if end is None else f"<[{end}]>"
        start = "" if after.begun else rf"@answer | /[ \n]{{0,2}}/ {first} "
        return f"start: {start}text {last} /\\n{{0,2}}/ @answer\ntext{suffix}: /(?s:.*)/"


def _deep(work: Callable[[], None]) -> None:
    """Run it where recursion has room, and so that running answers keep their pace."""

    def lowered() -> None:
        lower_priority(_NICE)
        work()

    with _STACK:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread = threading.Thread(target=lowered, name="squall-grammar", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()


def _told(error: str) -> str:
    """llguidance's error without the source that it shows."""
    if found := _KEYWORDS.search(error):
        return f"JSON schema keywords that are not supported: {found[1][:300]}"
    error = error.replace("NoExtensionBias", "nothing can follow")
    return " ".join(re.split(r"\n +1 \||<non-verbose/>", error)[0].split())[:300]


class _Vocabulary:
    """A model's tokens, as llguidance asks for them."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        from llguidance import LLTokenizer

        self.words = -(-vocab // 32)
        self.stops = frozenset(i for i in tokenizer.stop_ids if i < vocab)
        if not self.stops:
            raise InvalidRequest("the model has no token that ends answers, so no grammar can end")
        known = range(min(vocab, tokenizer.vocab_size))
        special = {i for i in known if tokenizer.is_special(i)} | self.stops
        tokens = [tokenizer.token_bytes(i) for i in known]
        # llguidance marks control tokens by this byte, which is in no UTF-8.
        tokens = [b"" if b"\xff" in token else token for token in tokens]
        self.tokens = tokens + [b""] * (vocab - len(tokens))
        self.special_token_ids = sorted(special)
        self.eos_token_id = min(self.stops)
        self._encode = partial(tokenizer.encode, add_bos=False)
        texts = [b"" if i in special else token for i, token in enumerate(tokens)]
        self.letter = texts.index(b"z") if b"z" in texts else 0
        digits = np.zeros(self.words * 32, dtype=bool)
        digits[: len(texts)] = [token[:1].isdigit() for token in texts]
        self.digits = np.packbits(digits, bitorder="little").view(np.uint32)
        # Of a copy, as the library keeps what it is given, and a circle would never be freed.
        given: Any = copy.copy(self)
        self.library = LLTokenizer(given, eos_token=sorted(self.stops))

    def __call__(self, text: str) -> list[int]:
        """Ids of what goes on with a text, without the space that may come before texts."""
        for before in ("", "\n"):
            ids = self._encode(before + text)
            parts = [self.tokens[i] for i in ids]
            for start in range(min(3, len(ids))):
                if b"".join(parts[start:]) == text.encode():
                    return ids[start:]
        return []


class Matcher:
    """What may follow in one answer. One thread at a time calls it."""

    def __init__(self, vocabulary: _Vocabulary, numbers: bool, inner: LLMatcher) -> None:
        """numbers: whether there may be some that go on for ever."""
        self._vocabulary = vocabulary
        self._numbers = numbers
        self._inner = inner
        self._digits = 0  # that the text ends with
        self._rows: dict[tuple[int, ...], NDArray[np.uint32]] = {}  # what may come after guesses

    @property
    def finished(self) -> bool:
        return self._inner.is_stopped()

    def allowed(self, guesses: Sequence[int]) -> Sequence[NDArray[np.uint32]]:
        digits = self._digits
        rows = [self._row((), digits)]
        for i, guess in enumerate(guesses, 1):
            if guess in self._vocabulary.stops or not self._inner.try_consume_tokens([guess]):
                break
            digits = self._run(digits, guess)
            rows.append(self._row(tuple(guesses[:i]), digits))
        if len(rows) > 1 and not self._inner.rollback(len(rows) - 1):
            raise self._failed()
        # After a guess that cannot come nothing can.
        return rows + [np.zeros_like(rows[0])] * (1 + len(guesses) - len(rows))

    def forced(self, most: int) -> Sequence[int]:
        """Ids that will follow, most likely, since the grammar leaves no choice of text."""
        if most < 1 or self.finished:
            return ()
        return self._inner.compute_ff_tokens()[:most]

    def accept(self, token: int) -> None:
        if self.finished:
            return
        if not self._inner.consume_token(token):
            raise self._failed()
        self._digits, self._rows = self._run(self._digits, token), {}

    def _row(self, guesses: tuple[int, ...], digits: int) -> NDArray[np.uint32]:
        if guesses not in self._rows:
            self._rows[guesses] = self._mask(digits)
        return self._rows[guesses]

    def _mask(self, digits: int) -> NDArray[np.uint32]:
        row = np.zeros(self._vocabulary.words, np.uint32)
        self._inner.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._inner.is_error():
            raise self._failed()
        letter = self._vocabulary.letter  # where it may come is text, not a number
        if digits < MAX_DIGITS or row[letter // 32] >> (letter % 32) & 1:
            return row
        fewer = row & ~self._vocabulary.digits
        return fewer if fewer.any() else row

    def _run(self, digits: int, token: int) -> int:
        text = self._vocabulary.tokens[token]
        if not self._numbers or not text[-1:].isdigit():
            return 0
        return digits + len(text) if text.isdigit() else 1

    def _failed(self) -> SamplingFailed:
        reason = _told(self._inner.get_error()) or "a token came that may not"
        return SamplingFailed(f"the grammar cannot go on: {reason}")
