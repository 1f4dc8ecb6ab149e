"""The pickles of PyTorch checkpoints, read by a machine of our own that cannot run anything.

It knows the operations that such files need and makes plain values from them. Names of classes and
functions are looked up in one table of inert meanings; Python's own unpickler is not involved.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from squall.checkpoints.files import quote
from squall.checkpoints.mapped import Buffer
from squall.errors import InvalidCheckpoint, UnsupportedModel

MAX_BYTES = 32 << 20
MAX_OPERATIONS = 4_000_000
MAX_DIMS = 8
_LIMIT = 1 << 62


@dataclass(frozen=True, slots=True)
class Storage:
    """Numbers of one kind somewhere in the file."""

    key: str
    format: str
    size: int


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as a view of a storage; all counts are in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Name:
    """A class or function that the file names; it means what the tables here say."""

    text: str


_STORAGES = {
    "torch.FloatStorage": "f32",
    "torch.HalfStorage": "f16",
    "torch.BFloat16Storage": "bf16",
    "torch.DoubleStorage": "f64",
    "torch.LongStorage": "i64",
    "torch.IntStorage": "i32",
    "torch.ShortStorage": "i16",
    "torch.CharStorage": "i8",
    "torch.ByteStorage": "u8",
    "torch.BoolStorage": "bool",
}
SIZES = {"f32": 4, "f16": 2, "bf16": 2, "f64": 8, "i64": 8, "i32": 4, "i16": 2, "i8": 1, "u8": 1,
         "bool": 1}  # fmt: skip


def unpickle(buffer: Buffer, start: int, stop: int, source: str) -> tuple[Any, int]:
    """The value of the pickle at `start`, and where it ends, at `stop` at most.

    Values are None, bool, int, float, str, tuple, list, dict, Storage and View. Containers may
    share parts, so walking all of one may never end. `source` names the file in errors.
    """
    machine = _Machine(buffer, start, min(stop, start + MAX_BYTES), source)
    for _ in range(MAX_OPERATIONS):
        code = machine.take(1)[0]
        if code == _STOP:
            return machine.pop(), machine.position
        operation = _OPERATIONS.get(code)
        if operation is None:
            name = _REFUSED.get(code, f"0x{code:02x}")
            raise machine.fault(f"it uses the operation {name}, which no tensors need")
        operation(machine)
    raise machine.fault(f"it has over {MAX_OPERATIONS} operations")


class _Machine:
    """A stack, marks on it, and a memo."""

    def __init__(self, buffer: Buffer, start: int, stop: int, source: str) -> None:
        self.position = start
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self._buffer = buffer
        self._stop = min(stop, len(buffer))
        self._source = source

    def fault(self, problem: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(
            f"{quote(self._source)}: its pickle is not one of tensors: {problem} "
            f"(near byte {self.position}); use safetensors or GGUF"
        )

    def take(self, size: int) -> bytes:
        end = self.position + size
        if end > self._stop:
            raise self.fault("it is cut off, or too large")
        found = self._buffer[self.position : end]
        self.position = end
        return found

    def skip(self, size: int) -> None:
        self.take(size)

    def number(self, layout: str) -> int:
        value: int = struct.unpack("<" + layout, self.take(struct.calcsize(layout)))[0]
        return value

    def text(self, size: int) -> str:
        try:
            return str(self.take(size), "utf-8")
        except UnicodeDecodeError:
            raise self.fault("a string is not UTF-8") from None

    def line(self) -> str:
        end = self._buffer.find(b"\n", self.position, min(self._stop, self.position + 256))
        if end < 0:
            raise self.fault("a name has no end")
        found = self.text(end - self.position)
        self.position += 1
        return found

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.fault("it takes a value where there is none")
        return self.stack.pop()

    def drop(self) -> None:
        self.pop()

    def pop_kind(self, kind: type[Any], what: str) -> Any:
        value = self.pop()
        if type(value) is not kind:
            raise self.fault(f"{what} is a {type(value).__name__}, not a {kind.__name__}")
        return value

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise self.fault("it takes values up to a mark where there is none")
        mark = self.marks.pop()
        found = self.stack[mark:]
        del self.stack[mark:]
        return found

    def top(self, kind: type[Any]) -> Any:
        value = self.pop_kind(kind, "a container")
        self.push(value)
        return value

    def remember(self, index: int) -> None:
        value = self.pop()
        self.push(value)
        self.memo[index] = value

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise self.fault("it recalls what it never stored")
        self.push(self.memo[index])

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2 or not all(type(key) is str for key in items[::2]):
            raise self.fault("the keys of its dictionaries must be strings")
        target.update(zip(items[::2], items[1::2], strict=True))

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def append(self) -> None:
        value = self.pop()
        self.top(list).append(value)

    def append_all(self) -> None:
        values = self.pop_mark()
        self.top(list).extend(values)

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def long(self) -> None:
        size = self.number("B")
        if size > 16:
            raise self.fault(f"a number has {size} bytes")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def name(self, text: str) -> None:
        if text not in _STORAGES and text not in _CALLS:
            raise self.fault(f"it names {quote(text)}")
        self.push(_Name(text))

    def stack_name(self) -> None:
        name, module = self.pop_kind(str, "a name"), self.pop_kind(str, "a module")
        self.name(f"{module}.{name}")

    def call(self) -> None:
        arguments = self.pop_kind(tuple, "what is called with")
        function = self.pop_kind(_Name, "what is called")
        if function.text not in _CALLS:
            raise self.fault(f"it calls {function.text}")
        self.push(_CALLS[function.text](self, arguments))

    def build(self) -> None:
        """Attributes, such as the `_metadata` of a state dict; nothing here has any."""
        self.pop_kind(dict, "a state")
        self.top(dict)

    def storage(self) -> None:
        given = self.pop_kind(tuple, "a persistent id")
        match given:
            case ("storage", _Name(text), str(key), str(), int(size), *rest) if (
                text in _STORAGES and 0 <= size < _LIMIT and rest in ([], [None])
            ):
                self.push(Storage(key, _STORAGES[text], size))
            case _:
                raise self.fault("a persistent id is not that of a storage")


def _no_arguments(machine: _Machine, arguments: tuple[Any, ...]) -> dict[str, Any]:
    if arguments:
        raise machine.fault("it makes a dictionary from values")
    return {}


def _tensor(machine: _Machine, arguments: tuple[Any, ...]) -> View:
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides), *_) if len(
            shape
        ) == len(strides) <= MAX_DIMS and all(
            type(n) is int and 0 <= n < _LIMIT for n in (offset, *shape, *strides)
        ):
            return View(storage, offset, shape, strides)
    raise machine.fault("a tensor is not made from a storage, an offset, a shape and strides")


def _parameter(machine: _Machine, arguments: tuple[Any, ...]) -> View:
    if not arguments or type(arguments[0]) is not View:
        raise machine.fault("a parameter is not made from a tensor")
    return arguments[0]


_CALLS: Mapping[str, Callable[[_Machine, tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _no_arguments,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
}

_STOP = ord(".")
_OPERATIONS: Mapping[int, Callable[[_Machine], None]] = {
    0x80: lambda m: m.skip(1),  # PROTO
    0x95: lambda m: m.skip(8),  # FRAME
    ord("("): lambda m: m.marks.append(len(m.stack)),
    ord("0"): _Machine.drop,
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("J"): lambda m: m.push(m.number("i")),
    ord("K"): lambda m: m.push(m.number("B")),
    ord("M"): lambda m: m.push(m.number("H")),
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    0x8A: _Machine.long,
    ord("X"): lambda m: m.push(m.text(m.number("I"))),
    0x8C: lambda m: m.push(m.text(m.number("B"))),
    ord("U"): lambda m: m.push(m.text(m.number("B"))),
    ord("}"): lambda m: m.push({}),
    ord("]"): lambda m: m.push([]),
    ord(")"): lambda m: m.push(()),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("t"): lambda m: m.push(tuple(m.pop_mark())),
    ord("a"): _Machine.append,
    ord("e"): _Machine.append_all,
    ord("s"): _Machine.set_item,
    ord("u"): lambda m: m.set_items(m.pop_mark()),
    ord("q"): lambda m: m.remember(m.number("B")),
    ord("r"): lambda m: m.remember(m.number("I")),
    0x94: lambda m: m.remember(len(m.memo)),
    ord("h"): lambda m: m.recall(m.number("B")),
    ord("j"): lambda m: m.recall(m.number("I")),
    ord("c"): lambda m: m.name(f"{m.line()}.{m.line()}"),
    0x93: _Machine.stack_name,
    ord("R"): _Machine.call,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.storage,
}
_REFUSED = {
    ord("P"): "PERSID", ord("i"): "INST", ord("o"): "OBJ", 0x81: "NEWOBJ", 0x92: "NEWOBJ_EX",
    0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", 0x8B: "LONG4", 0x8D: "BINUNICODE8",
    0x8E: "BINBYTES8", 0x96: "BYTEARRAY8", 0x97: "NEXT_BUFFER", 0x90: "ADDITEMS", 0x8F: "EMPTY_SET",
    0x91: "FROZENSET", ord("B"): "BINBYTES", ord("C"): "SHORT_BINBYTES", ord("2"): "DUP",
    ord("1"): "POP_MARK", ord("I"): "INT", ord("L"): "LONG", ord("S"): "STRING",
    ord("V"): "UNICODE", ord("F"): "FLOAT", ord("d"): "DICT", ord("l"): "LIST", ord("p"): "PUT",
    ord("g"): "GET", ord("T"): "BINSTRING",
}  # fmt: skip


def check_magic(value: Any, source: str) -> None:
    """Raise UnsupportedModel unless this is how a PyTorch file from before ZIP begins."""
    if type(value) is not int or value != 0x1950A86A20F9469CFC6C:
        raise UnsupportedModel(f"{quote(source)} is a pickle, but none that PyTorch wrote")
