"""A Jinja environment for templates nobody has checked: no way out, bounded time and memory.

Templates may use what is listed here: statements, filters, methods and attributes of the values
they meet. Everything they call is counted, and what can make something large is first asked how
large. Texts keep the origin of their characters (see `squall.text.traced`).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, partial, wraps
from itertools import permutations
from types import GeneratorType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Namespace
from jinja2.visitor import NodeTransformer

from squall.text.traced import joined, shown, trace

MAX_SECONDS = 1.0  # processor time of one rendering
MAX_CHARACTERS = 8_000_000  # of one value
MAX_TOTAL = 16 * MAX_CHARACTERS  # of all values that one rendering makes
MAX_ITEMS = 250_000  # in one value, nested ones counted
MAX_NUMBER = 100_000  # of what a width or a count may be
MAX_BITS = 4096  # of an integer

STATEMENTS = (
    nodes.Assign, nodes.AssignBlock, nodes.Block, nodes.Break, nodes.CallBlock, nodes.Continue,
    nodes.ExprStmt, nodes.FilterBlock, nodes.For, nodes.If, nodes.Macro, nodes.Output, nodes.With,
)  # fmt: skip
GLOBALS = ("range", "dict", "cycler", "joiner", "namespace")
# Filters that hand on what they are given, whatever is in it; that look into it; that make texts.
_PASSING = """
abs batch count d default first float int items last length list map reject rejectattr reverse round
select selectattr slice wordcount
"""
_SEEING = "dictsort groupby max min sort sum unique"
_WRITING = """
capitalize center e escape format indent join lower replace safe string title tojson trim truncate
upper urlencode
"""
_STRING = """
capitalize casefold center count endswith find format index isalnum isalpha isascii isdecimal
isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip
partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split
splitlines startswith strip swapcase title upper zfill
"""
_LOOP = """
changed cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0
"""
_METHODS = frozenset(_STRING.split())
_ATTRIBUTES: Mapping[type, str] = {
    dict: "copy get items keys values",
    list: "copy count index",
    tuple: "count grouper index list",
    Cycler: "current next reset",
    Macro: "arguments name",
    LoopContext: _LOOP,
}
_DIRECTIVE = re.compile(r"[%{]")
_WIDE = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{4})|\{[^{}]*:[^{}]*(?:\d{4}|\{)")


class LimitError(jinja2.TemplateError):
    """A template asked for more than a template may use."""


class _Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self._end = time.thread_time() + MAX_SECONDS
        self._left = MAX_TOTAL

    def charge(self, value: Any) -> Any:
        """Asked of whatever an operation made."""
        if time.thread_time() > self._end:
            raise LimitError(f"the template ran for more than {MAX_SECONDS:g} s")
        self._left -= len(value) if isinstance(value, (str, list, tuple)) else 0
        if self._left < 0:
            raise LimitError(f"the template made more than {MAX_TOTAL} characters")
        return value


_BUDGET: ContextVar[_Budget] = ContextVar("budget")


def weigh(*values: Any) -> int:
    """Characters, roughly, that `values` are when written out; raises if they are too many."""
    size, items, rest = 0, 0, list(values)
    while rest:
        value = rest.pop()
        items += 1
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, Mapping):
            rest += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            rest += value
        else:
            size += 8
        _check_size(size)
        if items + len(rest) > MAX_ITEMS:
            raise LimitError(f"the template made a value of more than {MAX_ITEMS} items")
    return size + items


def _check_size(characters: float, most: int = MAX_CHARACTERS) -> None:
    if characters > most:
        raise LimitError(f"the template made a value of more than {MAX_CHARACTERS} characters")


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise LimitError(f"the template made an integer of more than {MAX_BITS} bits")


def _numbers(_: Any, *values: Any) -> None:
    for value in values:
        if isinstance(value, (int, float)) and abs(value) > MAX_NUMBER:
            raise LimitError(f"a width or count of {value}; at most {MAX_NUMBER} are allowed")


def _product(value: Any, *by: Any) -> None:
    _numbers(value, *by)
    sizes = (v if isinstance(v, int) else weigh(v) for v in by)
    _check_size(weigh(value) * max([1, *sizes]), 8 * MAX_CHARACTERS)


def _replaced(value: Any, *by: Any) -> None:
    for old, new in permutations(map(str, by), 2):  # they may be named, in any order
        _check_size(str(value).count(old) * len(new))


def _form(text: Any, *values: Any) -> None:
    if _WIDE.search(str(text)):
        raise LimitError("a format with a width over 999, or with a width given by a value")
    directives = len(_DIRECTIVE.findall(str(text)))
    _check_size(directives * (weigh(*values) + 1000), 8 * MAX_CHARACTERS)


def _times(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    elif isinstance(left, int) or isinstance(right, int):
        count, value = (left, right) if isinstance(left, int) else (right, left)
        _check_size(0 if isinstance(value, float) else weigh(value) * count)


def _power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * abs(right))


# What is asked of the arguments of that which can make more than it is given.
_BOUNDS: Mapping[str, Callable[..., object]] = {
    "+": weigh, "*": _times, "**": _power, "format": _form,
    "replace": _replaced, "indent": _product, "join": _product, "batch": _numbers,
    "center": _numbers, "ljust": _numbers, "rjust": _numbers, "round": _numbers, "slice": _numbers,
    "truncate": _numbers, "zfill": _numbers,
    "%": lambda left, right: _form(left, right) if isinstance(left, str) else None,
}  # fmt: skip


def _run(name: str, function: Callable[..., Any], /, *given: Any, **named: Any) -> Any:
    if name in _BOUNDS:
        _BOUNDS[name](*given, *named.values())
    return _BUDGET.get().charge(function(*given, **named))


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as chat templates expect it: not escaped for HTML, keys in their own order."""
    if indent is not None and (indent if isinstance(indent, int) else len(indent)) > 100:
        raise LimitError("an indent of more than 100 characters")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    parts, size = [], 0
    for part in encoder.iterencode(value):
        parts.append(part)
        size += len(part)
        _check_size(size)
    return "".join(parts)


def strftime_now(format: str) -> str:
    return str(_run("format", partial(trace, datetime.now().strftime), format))


def raise_exception(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))


class _Generation(Extension):
    """`{% generation %}` marks the model's own text for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Instrument(NodeTransformer):
    """Refuses other statements, and calls back where Jinja's sandbox does not look."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        if isinstance(node, nodes.Stmt) and not isinstance(node, STATEMENTS):
            kind = type(node).__name__
            raise jinja2.TemplateSyntaxError(f"templates may not use {kind}", node.lineno)
        return super().generic_visit(node, *args, **kwargs)

    def visit_For(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_callback("seen", [], node.lineno), lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_For

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _callback("joined", node.nodes, node.lineno)

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        constant = all(isinstance(child, nodes.Const) for child in node.iter_child_nodes())
        stored = isinstance(node, nodes.Tuple) and node.ctx != "load"
        return node if constant or stored else _callback("seen", [node], node.lineno)

    visit_Tuple = visit_Dict = visit_List


def _callback(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(function, arguments, [], None, None, lineno=line)


class Environment(ImmutableSandboxedEnvironment):
    """Renders as `transformers` does, within limits."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # it would run filters at compile time, outside of any budget
            finalize=pass_context(_finalize),
            extensions=[_Generation, LoopControlExtension],
        )
        known, names = {**self.filters, "tojson": to_json}, f"{_PASSING} {_SEEING} {_WRITING}"
        self.filters = {name: _filter(name, known[name]) for name in names.split()}
        given = {"raise_exception": raise_exception, "strftime_now": strftime_now}
        self.globals = {name: self.globals[name] for name in GLOBALS} | given

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Joins what a block, a macro or the whole template wrote."""
        parts = list(parts)
        _check_size(sum(map(len, parts)))
        return str(_BUDGET.get().charge(joined(parts)))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ARG002
        """`+ * ** %`, if the result is not too large."""
        return _run(operator, partial(trace, self.binop_table[operator]), left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Any call, if its arguments and its result are not too large."""
        if not isinstance(__obj, Macro):
            args = tuple(list(a) if isinstance(a, GeneratorType) else a for a in args)
            weigh(*args, *kwargs.values())
        return _run("call", partial(super().call, __context, __obj), *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute, or else an item; methods of strings run within bounds."""
        if isinstance(obj, str) and attribute in _METHODS:
            return partial(_run, attribute, partial(trace, partial(self._method, attribute)), obj)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An item, or else an attribute."""
        if isinstance(obj, str) and isinstance(argument, str):
            return self.getattr(obj, argument)
        return super().getitem(obj, argument)

    def _method(self, name: str, text: str, *args: Any, **kwargs: Any) -> Any:
        method = getattr(text, name)
        return (self.wrap_str_format(method) or method)(*args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether it is one of those listed, or one that the template gave a namespace."""
        listed = next((names for kind, names in _ATTRIBUTES.items() if isinstance(obj, kind)), "")
        known = isinstance(obj, Namespace) or attr in listed.split()
        return known and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Jinja's own would print as nothing."""
        raise SecurityError(f"templates may not use {attribute!r} of {type(obj).__name__!r}")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Instrument().visit(tree)
        return tree

    def seen(self, *values: Any) -> Any:
        """Called at loop turns and in macros, and with lists; `call` counts and weighs them."""
        return values[-1] if values else None

    def joined(self, *values: Any) -> str:
        """Called for `~`."""
        return self.concat(str(shown(value)) for value in values)


def _finalize(_: Context, value: Any) -> Any:
    if not isinstance(value, str):
        weigh(value)
    return shown(value)


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passing, writing = name in _PASSING.split(), name in _WRITING.split()

    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        own = isinstance(args[0], (Context, EvalContext, jinja2.Environment))
        values = [list(a) if isinstance(a, GeneratorType) else a for a in args[own:]]
        if not passing:
            weigh(*values, *kwargs.values())
        made = partial(function, *args[:own])
        return _run(name, partial(trace, made) if writing else made, *values, **kwargs)

    return bounded


@lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """The template, ready to be rendered by any thread."""
    return Environment().from_string(source)


def render(source: str, variables: Mapping[str, Any]) -> str:
    """What the template writes, within one budget."""
    template, token = compiled(source), _BUDGET.set(_Budget())
    try:
        return template.render(variables)
    finally:
        _BUDGET.reset(token)
