"""Grammars: what an answer may be, and which tokens may therefore come next.

Every kind becomes a source in llguidance's dialect of Lark, which is compiled once a model.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from squall.errors import InvalidCheckpoint, InvalidRequest, SamplingFailed
from squall.files import parse_json
from squall.text.tokenizer import Tokenizer
from squall.text.yacc import lark_of_yacc

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    from numpy.typing import NDArray

Kind = Literal["regex", "yacc", "lark", "json_schema", "json_object", "choice"]
MAX_BYTES = 256 << 10
MAX_REGEX = 4096  # characters of one pattern: compiling may take the square of them
MAX_PATTERNS = 32 << 10  # characters of all patterns of a JSON schema
MAX_MULTIPLE = 100_000  # remainders that a number's digits may have
MAX_DIGITS = 32  # in a row, of a JSON number without a bound
CACHED = 64
_STACK_BYTES = 512 << 20  # what is compiled is walked by recursion, a level for each rule
_STACK = threading.Lock()
# At most a space, or a new line and its indentation: a model could go on with white space.
_JSON_OPTIONS = {"whitespace_pattern": r"( |\n[ \t]{0,32})?"}


@dataclass(frozen=True)
class Grammar:
    """What an answer must be: `value` in the language `kind`.

    json_schema: a JSON text; json_object: nothing; choice: a JSON list of texts.
    """

    kind: Kind
    value: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            known = ", ".join(get_args(Kind))
            raise InvalidRequest(f"unknown kind of grammar {self.kind!r:.80}; known: {known}")
        if not isinstance(self.value, str):
            raise InvalidRequest(f"a grammar must be text, not {type(self.value).__name__}")
        if not self.value and self.kind != "json_object":
            raise InvalidRequest(f"the {self.kind} grammar is empty")
        limit = MAX_REGEX if self.kind == "regex" else MAX_BYTES
        if (size := len(self.value.encode("utf-8", "replace"))) > limit:
            raise InvalidRequest(f"the {self.kind} has {size} bytes; the limit is {limit}")
        _LARK[self.kind](self.value)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str | type) -> Grammar:
        """A JSON schema: an object, its JSON text, or a class of pydantic's."""
        if isinstance(schema, str):
            return cls("json_schema", schema)
        if isinstance(schema, type):
            described = getattr(schema, "model_json_schema", None)
            if described is None:
                raise InvalidRequest(
                    f"{schema.__name__} has no JSON schema; give a pydantic model, or a dict"
                )
            schema = described()
            for node in _nodes(schema, 0):
                # Small models would add to what the class has for ever.
                if node.get("type") == "object" and "properties" in node:
                    node.setdefault("additionalProperties", False)
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"the JSON schema is not JSON: {error!s:.200}") from None
        return cls("json_schema", text)

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls("json_object")

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Grammar:
        """One of `texts`, exactly."""
        return cls("choice", json.dumps(list(texts)))

    def lark(self) -> str:
        """The same in llguidance's Lark, with the rule `start`."""
        return _LARK[self.kind](self.value)


def _lark_of_regex(value: str) -> str:
    from llguidance import regex_to_lark

    return f"start: /{regex_to_lark(value, '')}/"


def _lark_of_lark(value: str) -> str:
    """The source, but the schemas in it are read as ours are."""
    done, at = [], 0
    for found in re.finditer(
        r'"(?:[^"\\\n]|\\.)*"|(?://|#)[^\n]*|/(?:[^/\\\n]|\\.)+/|%json', value
    ):
        if found[0] != "%json" or found.start() < at:
            continue
        start = re.compile(r"\s*").match(value, found.end()).end()  # type: ignore[union-attr]
        try:
            _, end = json.JSONDecoder().raw_decode(value, start)
        except (ValueError, RecursionError):
            raise InvalidRequest("the Lark grammar's %json is not followed by JSON") from None
        done += [value[at : found.start()], _json(_parsed(value[start:end]))]
        at = end
    return "".join(done) + value[at:]


def _lark_of_choice(value: str) -> str:
    texts = _parsed(value)
    if not isinstance(texts, list) or not texts or not all(t and isinstance(t, str) for t in texts):
        raise InvalidRequest(
            "a choice must be a JSON list of at least one text, none of them empty"
        )
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(text) for text in dict.fromkeys(texts))


_LARK: Mapping[str, Callable[[str], str]] = {
    "regex": _lark_of_regex,
    "yacc": lark_of_yacc,
    "lark": _lark_of_lark,
    "json_schema": lambda value: "start: " + _json(_parsed(value)),
    "json_object": lambda _: "start: " + _json({"type": "object"}),
    "choice": _lark_of_choice,
}


def _parsed(text: str) -> Any:
    """A JSON text within limits."""
    try:
        found = parse_json(f'{{"grammar": {text}}}', "the grammar", unique=True)
    except InvalidCheckpoint as error:
        raise InvalidRequest(f"{error!s:.300}") from None
    if len(found) != 1:
        raise InvalidRequest("the grammar is not one JSON text")
    return found["grammar"]


def _json(schema: Any) -> str:
    """A schema as a term of Lark; llguidance refuses keywords that it cannot enforce."""
    if not isinstance(schema, dict | bool):
        raise InvalidRequest("a JSON schema must be an object, true or false")
    if schema is False:
        raise InvalidRequest("the JSON schema is false: no answer fits it")
    schema = {} if schema is True else schema
    nodes = list(_nodes(schema, 0))
    _check_patterns(nodes)
    _check_multiples(nodes)
    # These options are the last word: a client's could turn off what is enforced.
    return "%json " + json.dumps({**schema, "x-guidance": _JSON_OPTIONS})


def _nodes(value: Any, depth: int) -> Iterator[dict[str, Any]]:
    """All objects of a schema, whatever they are there for."""
    if depth > 100:
        raise InvalidRequest("the JSON schema is nested too deeply; the limit is 100 levels")
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            yield from _nodes(inner, depth + 1)


def _check_patterns(nodes: Sequence[Mapping[str, Any]]) -> None:
    found = [node["pattern"] for node in nodes if isinstance(node.get("pattern"), str)]
    for node in nodes:
        if isinstance(named := node.get("patternProperties"), dict):
            found += named
    if max(map(len, found), default=0) > MAX_REGEX or sum(map(len, found)) > MAX_PATTERNS:
        raise InvalidRequest(
            f"the patterns of a JSON schema may have {MAX_REGEX} characters, all together "
            f"{MAX_PATTERNS}"
        )


def _check_multiples(nodes: Sequence[Mapping[str, Any]]) -> None:
    """`allOf` may ask for all of them, and then there are as many states as their multiple."""
    given = [node.get("multipleOf") for node in nodes]
    numbers = [v for v in given if isinstance(v, int | float) and not isinstance(v, bool)]
    values = [Decimal(repr(v)) for v in numbers if v > 0]
    try:
        scale = 10 ** max([0, *(-int(value.as_tuple().exponent) for value in values)])
        multiple = math.lcm(*(int(value * scale) for value in values))
    except (ValueError, ArithmeticError):
        multiple = MAX_MULTIPLE + 1
    if multiple > MAX_MULTIPLE:
        raise InvalidRequest(
            f"the least common multiple of all multipleOf may be {MAX_MULTIPLE} units of their "
            "last digit at most"
        )


class Grammars:
    """The compiled grammars of one model; the latest are kept."""

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        """`vocab`: how many ids the model can draw; those that the tokenizer lacks never may."""
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._lock = threading.Lock()
        self._vocabulary: _Vocabulary | None = None
        self._compiled: OrderedDict[bytes, Future[Callable[[], Matcher]]] = OrderedDict()

    def compile(self, grammar: Grammar, *, after: str | None = None) -> Callable[[], Matcher]:
        """What starts a matcher for each answer; raises InvalidRequest for what cannot be enforced.

        after: the answer begins with free text that ends with this, which may be a control
        token's name, and only then with what the grammar says.
        """
        named = json.dumps([grammar.kind, grammar.value, after])
        key = hashlib.sha256(named.encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            future = self._compiled.get(key)
            if new := future is None:
                future = self._compiled[key] = Future()
            self._compiled.move_to_end(key)
            while len(self._compiled) > CACHED:
                self._compiled.popitem(last=False)
        if new:
            _with_deep_stack(lambda: self._fulfil(future, grammar, after))
        try:
            return future.result()
        except BaseException:
            with self._lock:
                if self._compiled.get(key) is future:
                    del self._compiled[key]
            raise

    def _fulfil(
        self, future: Future[Callable[[], Matcher]], grammar: Grammar, after: str | None
    ) -> None:
        try:
            future.set_result(self._compile(grammar, after))
        except BaseException as error:
            future.set_exception(error)

    def _compile(self, grammar: Grammar, after: str | None) -> Callable[[], Matcher]:
        from llguidance import LLMatcher

        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _Vocabulary.of(self._tokenizer, self._vocab)
        vocabulary = self._vocabulary
        source = grammar.lark()
        parts: list[dict[str, str]] = [{"name": "answer", "lark_grammar": source}]
        if after is not None:
            parts.insert(0, {"lark_grammar": self._free_text(after)})
        text = json.dumps({"grammars": parts})
        root = LLMatcher(vocabulary.library, text, log_level=0, limits=_limits())
        bounded = "%json" in source
        if error := root.get_error():
            raise InvalidRequest(f"the {grammar.kind} cannot be enforced: {_short(error)}")
        try:
            Matcher(root.deep_copy(), vocabulary, bounded=bounded).row()
        except SamplingFailed as failed:
            raise InvalidRequest(f"no answer fits the {grammar.kind}: {failed}") from None
        return lambda: Matcher(root.deep_copy(), vocabulary, bounded=bounded)

    def _free_text(self, after: str) -> str:
        ids = self._tokenizer.encode(after, add_bos=False, specials=True)
        if len(ids) == 1 and self._tokenizer.is_special(ids[0]):
            return f"start: text <[{ids[0]}]> /\\n{{0,2}}/ @answer\ntext: /(?s:.*)/"
        return f"start: text /\\n{{0,2}}/ @answer\ntext[suffix={json.dumps(after)}]: /(?s:.*)/"


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=10_000,  # an object of so many optional properties
        step_max_items=10_000,
        max_lexer_states=50_000,
        verbose_errors=False,
    )


def _short(error: str) -> str:
    """llguidance's error, without the source that it shows."""
    found = re.search(r"Unimplemented keys: \[(.*)\]", error)
    if found:
        return f"JSON schema keywords that are not supported: {found[1][:300]}"
    return re.sub(r"\n   1 \|.*|<non-verbose/>", "", error, flags=re.DOTALL).strip()[:400]


def _with_deep_stack(work: Callable[[], None]) -> None:
    with _STACK:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread = threading.Thread(target=work, name="squall-grammar", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()


@dataclass(frozen=True)
class _Vocabulary:
    """A model's tokens as llguidance takes them."""

    library: LLTokenizer
    words: int  # of a row of bits
    digits: NDArray[np.uint32]  # which tokens begin with a digit
    letter: int  # a token that may come in texts and never in numbers
    tokens: Sequence[bytes]
    stops: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab: int) -> _Vocabulary:
        from llguidance import LLTokenizer

        known = range(min(vocab, tokenizer.vocab_size))
        special = {i for i in known if tokenizer.is_special(i)} | tokenizer.stop_ids
        tokens = [tokenizer.token_bytes(i) for i in known]
        # llguidance marks control tokens by this byte, which is in no UTF-8.
        tokens = [b"" if b"\xff" in token else token for token in tokens]
        tokens += [b""] * (vocab - len(tokens))
        texts = [b"" if i in special else token for i, token in enumerate(tokens)]
        begins = [token[:1].isdigit() for token in texts]
        stops = frozenset(i for i in tokenizer.stop_ids if i < vocab)
        wrapper = _Wrapper(tokenizer, tokens, sorted(special), stops)
        library = LLTokenizer(wrapper, eos_token=sorted(stops))  # type: ignore[arg-type]
        return cls(
            library,
            -(-vocab // 32),
            _bits(begins),
            texts.index(b"z") if b"z" in texts else -1,
            texts,
            stops,
        )


class _Wrapper:
    """What llguidance asks a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self, tokenizer: Tokenizer, tokens: list[bytes], special: list[int], stops: frozenset[int]
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = min(stops)
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """Ids of what goes on with a text; a space that comes before texts is taken off."""
        for before in ("", "\n"):
            ids = self._tokenizer.encode(before + text, add_bos=False)
            parts = [self.tokens[i] for i in ids]
            for start in range(min(3, len(ids))):
                if b"".join(parts[start:]) == text.encode():
                    return ids[start:]
        return []


def _bits(flags: Sequence[bool]) -> NDArray[np.uint32]:
    """A row of bits, 32 a word."""
    padded = np.zeros(-(-len(flags) // 32) * 32, dtype=bool)
    padded[: len(flags)] = flags
    return np.packbits(padded, bitorder="little").view(np.uint32)


class Matcher:
    """What may follow in one answer. One thread at a time calls it."""

    def __init__(self, inner: LLMatcher, vocabulary: _Vocabulary, *, bounded: bool) -> None:
        """bounded: numbers may not go on for ever."""
        self._bounded = bounded
        self._inner = inner
        self._vocabulary = vocabulary
        self._digits = 0  # that the text ends with
        self._row: NDArray[np.uint32] | None = None  # what may come next

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""
        return self._inner.is_stopped()

    def allowed(self, guesses: Sequence[int]) -> Sequence[NDArray[np.uint32]]:
        """Bits of the ids that may be drawn next, and after each guess."""
        rows = np.zeros((1 + len(guesses), self._vocabulary.words), np.uint32)
        rows[0] = self.row()
        digits, taken = self._digits, 0
        for guess in guesses:
            if guess in self._vocabulary.stops or not self._inner.try_consume_tokens([guess]):
                break
            taken += 1
            digits = self._run(digits, guess)
            self._fill(rows[taken], digits)
        if taken and not self._inner.rollback(taken):
            raise self._failed()
        return list(rows)

    def forced(self, most: int) -> Sequence[int]:
        """Ids that will follow, most likely: the grammar leaves no choice of text."""
        if most < 1 or self.finished:
            return ()
        if ids := self._inner.compute_ff_tokens():
            return ids[:most]
        words = np.flatnonzero(row := self.row())
        if len(words) != 1 or (word := int(row[words[0]])).bit_count() != 1:
            return ()
        token = int(words[0]) * 32 + word.bit_length() - 1
        return () if token in self._vocabulary.stops else (token,)

    def accept(self, token: int) -> None:
        """Goes on after `token`, which was drawn."""
        if self.finished:
            return
        if not self._inner.consume_token(token):
            raise self._failed()
        self._digits, self._row = self._run(self._digits, token), None

    def row(self) -> NDArray[np.uint32]:
        """Bits of the ids that may be drawn next."""
        if self._row is None:
            self._row = np.zeros(self._vocabulary.words, np.uint32)
            self._fill(self._row, self._digits)
        return self._row

    def _fill(self, row: NDArray[np.uint32], digits: int) -> None:
        self._inner.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._inner.is_error():
            raise self._failed()
        letter = self._vocabulary.letter
        if digits < MAX_DIGITS or row[letter // 32] >> (letter % 32) & 1:
            return
        fewer = row & ~self._vocabulary.digits
        if fewer.any():
            row[:] = fewer

    def _run(self, digits: int, token: int) -> int:
        text = self._vocabulary.tokens[token]
        if not self._bounded or not text[-1:].isdigit():
            return 0
        return digits + len(text) if text.isdigit() else 1

    def _failed(self) -> SamplingFailed:
        reason = _short(self._inner.get_error()) or "the token drawn was not allowed"
        return SamplingFailed(f"the grammar cannot go on: {reason}")
