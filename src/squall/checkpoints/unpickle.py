"""The pickles of PyTorch checkpoints, by Python's unpickler with lists of what is allowed.

It knows only the operations that tensors need, names of classes and functions mean what the tables
here say, nothing gets attributes, and what is read is counted. It is the unpickler in Python, since
the one in C trusts indices of its memo and hashes whatever is a key.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from squall.checkpoints.base import Buffer
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.files import quote

MAX_BYTES = 32 << 20
MAX_READS = 600_000  # an operation, and each part of its argument: 10,000 tensors
MAX_LINE = 256
MAX_MARKS = 64
MAX_DIMS = 8
_LIMIT = 1 << 62
_STORAGES = {
    "Float": "f32", "Half": "f16", "BFloat16": "bf16", "Double": "f64", "Long": "i64",
    "Int": "i32", "Short": "i16", "Char": "i8", "Byte": "u8", "Bool": "bool",
}  # fmt: skip


class Storage(NamedTuple):
    """Numbers of one kind somewhere in the file."""

    key: str
    format: str
    size: int


class View(NamedTuple):
    """A tensor as a view of a storage; all counts are in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Kind(NamedTuple):
    format: str


def _dictionary(*arguments: Any) -> dict[str, Any]:
    if arguments:
        raise ValueError("it makes a dictionary from values")
    return {}


def _tensor(*arguments: Any) -> View:
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides), *_) if len(
            shape
        ) == len(strides) <= MAX_DIMS and all(
            type(n) is int and 0 <= n < _LIMIT for n in (offset, *shape, *strides)
        ):
            return View(storage, offset, shape, strides)
    raise ValueError("a tensor is not made from a storage, an offset, a shape and strides")


def _parameter(tensor: Any, *_: Any) -> View:
    if not isinstance(tensor, View):
        raise ValueError("a parameter is not made from a tensor")
    return tensor


_NAMES: Mapping[str, _Kind | Callable[..., Any]] = {
    "collections.OrderedDict": _dictionary,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    **{f"torch.{name}Storage": _Kind(format) for name, format in _STORAGES.items()},
}
_THEIRS: Mapping[int, Callable[[Any], None]] = pickle._Unpickler.dispatch
_ALLOWED = """
    PROTO STOP POP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 BINFLOAT LONG1 BINUNICODE
    SHORT_BINUNICODE SHORT_BINSTRING EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE
    APPEND APPENDS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE
    BINPERSID
    """.split()  # noqa: SIM905


class _Reader:
    """The bytes `start:stop` of a buffer; to read past the end, or too often, is an error."""

    def __init__(self, buffer: Buffer, start: int, stop: int) -> None:
        self.position = start
        self._buffer = buffer
        self._stop = min(stop, len(buffer))
        self._left = MAX_READS

    def read(self, size: int) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"it has over {MAX_READS} operations and arguments")
        end = self.position + size
        if end > self._stop:
            raise ValueError("it is cut off, or too large")
        found = self._buffer[self.position : end]
        self.position = end
        return found

    def readline(self) -> bytes:
        end = self._buffer.find(b"\n", self.position, self.position + MAX_LINE)
        if end < 0:
            raise ValueError("a name has no end")
        return self.read(end + 1 - self.position)


class _Operations(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Callable[[Any], None]:
        raise ValueError(f"it uses the operation {chr(code)!a}, which no tensors need")


class _Unpickler(pickle._Unpickler):
    stack: list[Any]
    metastack: list[list[Any]]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _NAMES:
            raise ValueError(f"it names {quote(f'{module}.{name}')}")
        return _NAMES[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            case ("storage", _Kind(format), str(key), str(), int(size), *rest) if (
                0 <= size < _LIMIT and rest in ([], [None])
            ):
                return Storage(key, format, size)
        raise ValueError("a persistent id is not that of a storage")

    def skip_frame(self) -> None:
        self.read(8)

    def mark(self) -> None:
        if len(self.metastack) >= MAX_MARKS:
            raise ValueError(f"over {MAX_MARKS} containers are open at once")
        _THEIRS[pickle.MARK[0]](self)

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def set_items(self) -> None:
        self._update(self.pop_mark())

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or not all(type(key) is str for key in items[::2]):
            raise ValueError("the keys of its dictionaries must be strings")
        target.update(zip(items[::2], items[1::2], strict=True))

    def build(self) -> None:
        """Attributes, such as the `_metadata` of a state dict; nothing here has any."""
        if type(self.stack.pop()) is not dict or type(self.stack[-1]) is not dict:
            raise ValueError("it gives attributes to what has none")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = _Operations(
        {
            **{code: _THEIRS[code] for code in (getattr(pickle, name)[0] for name in _ALLOWED)},
            pickle.FRAME[0]: skip_frame,
            pickle.MARK[0]: mark,
            pickle.SETITEM[0]: set_item,
            pickle.SETITEMS[0]: set_items,
            pickle.BUILD[0]: build,
        }
    )


def unpickle(buffer: Buffer, start: int, stop: int, source: str) -> tuple[Any, int]:
    """The value of the pickle at `start`, and where it ends, at `stop` at most.

    Values are None, bool, int, float, str, tuple, list, dict, Storage and View. Containers may
    share parts, so walking all of one may never end. `source` names the file in errors.
    """
    reader = _Reader(buffer, start, min(stop, start + MAX_BYTES))
    try:
        return _Unpickler(reader, encoding="utf-8").load(), reader.position
    except Exception as error:  # whatever an operation makes of values that are not its own
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__} {error}"
        raise InvalidCheckpoint(
            f"{quote(source)}: its pickle is not one of tensors: {reason} "
            f"(near byte {reader.position}); use safetensors or GGUF"
        ) from None


def check_magic(value: Any, source: str) -> None:
    """Raise UnsupportedModel unless this is how a PyTorch file from before ZIP begins."""
    if type(value) is not int or value != 0x1950A86A20F9469CFC6C:
        raise UnsupportedModel(f"{quote(source)} is a pickle, but none that PyTorch wrote")
