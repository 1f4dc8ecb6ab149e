"""A Jinja environment for templates nobody has checked: no way out, bounded time and memory.

Jinja's own sandbox keeps templates from Python's internals, but not from `'a' * 10**9`. Here every
loop turn is counted, and whatever can make something large is first asked how large.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from types import BuiltinMethodType, GeneratorType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 1.0  # processor time of one rendering
MAX_CHARACTERS = 8_000_000  # of one value
MAX_TOTAL = 16 * MAX_CHARACTERS  # of all values that one rendering makes
MAX_ITEMS = 250_000  # in one value, nested ones counted
MAX_NUMBER = 100_000  # of what a width or a count may be
MAX_BITS = 4096  # of an integer

_ALLOWED = """
abs batch capitalize count d default dictsort e escape first float format groupby indent int items
join last length list lower map max min reject rejectattr replace reverse round safe select
selectattr slice sort string sum title trim truncate unique upper urlencode wordcount
"""
FILTERS = _ALLOWED.split()
GLOBALS = ("range", "dict", "cycler", "joiner", "namespace")
# Filters whose cost and result do not grow with what their argument's items hold.
_ITEMWISE = """
abs batch count d default first float int items last length list map reject rejectattr reverse
select selectattr slice
"""
_SHALLOW = frozenset(_ITEMWISE.split())
# Methods and filters that take a width or a count, and those whose result is a product of sizes.
_PADDING = "center expandtabs indent ljust rjust zfill"
_COUNTING = frozenset([*_PADDING.split(), "batch", "round", "slice", "to_bytes", "truncate"])
_GROWING = frozenset([*_PADDING.split(), "join", "replace", "translate"])
_DIRECTIVE = re.compile(r"[%{]")
_WIDE = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{4})|\{[^{}]*:[^{}]*(?:\d{4}|\{)")


class LimitError(jinja2.TemplateError):
    """A template asked for more than a template may use."""


class _Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self._end = time.thread_time() + MAX_SECONDS
        self._left = MAX_TOTAL

    def tick(self) -> None:
        if time.thread_time() > self._end:
            raise LimitError(f"the template ran for more than {MAX_SECONDS:g} s")

    def charge(self, value: Any) -> Any:
        if isinstance(value, (str, bytes, list, tuple)):
            self._left -= len(value)
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
        if isinstance(value, (str, bytes)):
            size += len(value)
        elif isinstance(value, Mapping):
            rest += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            rest += value
        else:
            size += 8
        if size > MAX_CHARACTERS or items + len(rest) > MAX_ITEMS:
            raise _too_large()
    return size + items


def _too_large() -> LimitError:
    return LimitError(f"the template made a value of more than {MAX_CHARACTERS} characters")


def _check_product(*factors: Any) -> None:
    """`factors`: what is made larger, and what it is made larger by."""
    first, *others = (v if isinstance(v, int) else weigh(v) for v in factors)
    if first * max([1, *others]) > 8 * MAX_CHARACTERS:
        raise _too_large()


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, (int, float)) and abs(value) > MAX_NUMBER:
            raise LimitError(f"a width or count of {value}; at most {MAX_NUMBER} are allowed")


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise LimitError(f"the template made an integer of more than {MAX_BITS} bits")


def _check_format(text: Any, *values: Any) -> None:
    if _WIDE.search(text):
        raise LimitError("a format with a width over 999, or with a width given by a value")
    _check_product(len(_DIRECTIVE.findall(text)), weigh(*values), 1000)


def _add(left: Any, right: Any) -> Any:
    if not isinstance(left, (int, float)):
        weigh(left, right)
    return left + right


def _multiply(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    elif isinstance(left, int) or isinstance(right, int):
        count, value = (left, right) if isinstance(left, int) else (right, left)
        if not isinstance(value, float) and weigh(value) * count > MAX_CHARACTERS:
            raise _too_large()
    return left * right


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * abs(right))
    return left**right


def _modulo(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        _check_format(left, right)
    elif isinstance(left, bytes):
        raise LimitError("templates may not format bytes")
    return left % right


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
        if size > MAX_CHARACTERS:
            raise _too_large()
    return "".join(parts)


def strftime_now(form: str) -> str:
    """The present local time in the form asked for."""
    _check_format(form)
    return datetime.now().strftime(form)


def raise_exception(message: Any) -> NoReturn:
    """Lets a template refuse its input."""
    raise jinja2.TemplateError(str(message))


class _Generation(Extension):
    """`{% generation %}` marks the model's own text for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Instrument(NodeTransformer):
    """Makes a template call back where Jinja's sandbox does not look."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._counted(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._counted(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._counted(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _callback("joined", node.nodes, node.lineno)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._weighed(node, node.items)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._weighed(node, node.items) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._weighed(node, [pair.value for pair in node.items])

    def _counted(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_callback("count", [], node.lineno), lineno=node.lineno))
        return node

    def _weighed(self, node: nodes.Expr, items: list[nodes.Expr]) -> nodes.Node:
        self.generic_visit(node)
        if all(isinstance(item, nodes.Const) for item in items):
            return node
        return _callback("weighed", [node], node.lineno)


def _callback(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(function, arguments, [], None, None, lineno=line)


class Environment(ImmutableSandboxedEnvironment):
    """Renders as `transformers` does, within limits."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    default_binop_table = {  # noqa: RUF012
        **ImmutableSandboxedEnvironment.default_binop_table,
        "+": _add,
        "*": _multiply,
        "**": _power,
        "%": _modulo,
    }

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # it would run filters at compile time, outside of any budget
            finalize=pass_context(_finalize),
            extensions=[_Generation, LoopControlExtension],
        )
        self.filters = {name: _guarded(name, self.filters[name]) for name in FILTERS}
        self.filters["tojson"] = _guarded("tojson", to_json)
        allowed = {name: self.globals[name] for name in GLOBALS}
        self.globals.clear()
        self.globals.update(allowed, raise_exception=raise_exception, strftime_now=strftime_now)

    def run(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """Renders within one budget."""
        token = _BUDGET.set(_Budget())
        try:
            return template.render(variables)
        finally:
            _BUDGET.reset(token)

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Joins what a block, a macro or the whole template wrote."""
        parts = list(parts)
        if sum(map(len, parts)) > MAX_CHARACTERS:
            raise _too_large()
        joined: str = _BUDGET.get().charge("".join(parts))
        return joined

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`+ * ** %`, if the result is not too large."""
        budget = _BUDGET.get()
        budget.tick()
        return budget.charge(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Any call, if its arguments and its result are not too large."""
        budget = _BUDGET.get()
        budget.tick()
        if not isinstance(__obj, Macro):
            args = tuple(list(a) if isinstance(a, GeneratorType) else a for a in args)
            _check_call(__obj, [*args, *kwargs.values()])
        return budget.charge(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format`, checked as `%` is."""
        function = super().wrap_str_format(value)
        if function is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, *args, *kwargs.values())
            return function(*args, **kwargs)

        return checked

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Also forbids what takes quadratic time."""
        return attr != "striptags" and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Jinja's own would print as nothing."""
        raise SecurityError(f"templates may not use {attribute!r} of {type(obj).__name__!r}")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Instrument().visit(tree)
        return tree

    def count(self) -> None:
        """Called once a loop turn and once a macro call; `call` has counted."""

    def weighed(self, value: Any) -> Any:
        """Called on the lists and dictionaries a template writes; `call` has weighed them."""
        return value

    def joined(self, *values: Any) -> str:
        """Called for `~`."""
        return self.concat(map(str, values))


def _finalize(_: Context, value: Any) -> Any:
    if not isinstance(value, str):
        weigh(value)
    return value


def _check_call(function: Any, values: list[Any]) -> None:
    weigh(*values)
    if not isinstance(function, BuiltinMethodType):
        return
    if function.__name__ in _COUNTING:
        _check_numbers(values)
    if function.__name__ in _GROWING:
        _check_product(function.__self__, *values)


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is counted and looks at the size of its arguments first."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        budget.tick()
        own = isinstance(args[0], (Context, EvalContext, jinja2.Environment))
        values = [list(a) if isinstance(a, GeneratorType) else a for a in args[own:]]
        others = [*values[1:], *kwargs.values()]
        if name not in _SHALLOW:
            weigh(values[0], *others)
        if name == "format":
            _check_format(str(values[0]), *others)
        if name in _COUNTING:
            _check_numbers(others)
        if name in _GROWING:
            _check_product(values[0], *others)
        return budget.charge(function(*args[:own], *values, **kwargs))

    return guarded
