"""Pickles as data: a machine for the opcodes of protocols 2 to 5 that never imports and never calls anything.

A global that the caller does not know becomes an `Inert`, and so does whatever would be made by calling it.
Source of the opcodes: the comments of Python's Lib/pickletools.py.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any

LARGEST_KEY = 64  # entries of a tuple that is a key
LARGEST_NUMBER = 16  # bytes of an integer; the magic number of PyTorch has 10


class Damaged(ValueError):
    """A pickle that is not as it should be. The message says in which way."""


class Inert:
    """Stands for a class or function, or for an object of it, of which nothing is run."""

    __slots__ = ("name", "state")

    def __init__(self, name: str):
        self.name = name
        self.state: Any = None
        """The argument that the pickle would have given to the object's `__setstate__`."""


class OrderedDict(dict):
    """Stands for `collections.OrderedDict`, which in a state dict has PyTorch's `_metadata` as an attribute."""

    attributes: Mapping[str, Any] = {}


_MARK = object()
_NUMBERS = {  # opcode -> format of the number behind it, of which it is the value
    0x4A: "<i",  # BININT
    0x4B: "<B",  # BININT1
    0x4D: "<H",  # BININT2
    0x47: ">d",  # BINFLOAT
}
_CONSTANTS = {0x4E: None, 0x88: True, 0x89: False, 0x29: ()}  # NONE NEWTRUE NEWFALSE EMPTY_TUPLE
_EMPTY = {0x7D: dict, 0x5D: list, 0x8F: lambda: Inert("builtins.set")}
_TEXTS = {  # opcode -> format of the length, and how the bytes behind it are decoded
    0x58: ("<I", "text"),  # BINUNICODE
    0x8C: ("<B", "text"),  # SHORT_BINUNICODE
    0x8D: ("<Q", "text"),  # BINUNICODE8
    0x54: ("<I", "old"),  # BINSTRING, of Python 2
    0x55: ("<B", "old"),  # SHORT_BINSTRING
    0x42: ("<I", "bytes"),  # BINBYTES
    0x43: ("<B", "bytes"),  # SHORT_BINBYTES
    0x8E: ("<Q", "bytes"),  # BINBYTES8
    0x96: ("<Q", "bytes"),  # BYTEARRAY8
    0x8A: ("<B", "number"),  # LONG1
    0x8B: ("<I", "number"),  # LONG4
}
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
_PUT = {0x71: "<B", 0x72: "<I"}  # BINPUT LONG_BINPUT
_GET = {0x68: "<B", 0x6A: "<I"}  # BINGET LONG_BINGET
_GLOBAL, _STACK_GLOBAL, _MARKER, _STOP, _MEMOIZE = 0x63, 0x93, 0x28, 0x2E, 0x94
_PROTO, _FRAME = 0x80, 0x95


def unpickle(
    data: memoryview,
    start: int,
    known: Mapping[str, Any],
    persistent: Callable[[Any], Any],
) -> tuple[Any, int]:
    """The object that a pickle describes, and where the pickle ends.

    Args:
        data: of which the pickle begins at `start`.
        known: what a global stands for by its full name: a function, which is called with the arguments that the
            pickle gives, or any other value, which is passed on.
        persistent: the object for a persistent id.

    Raises:
        Damaged: it is no pickle, or it is cut off or contradicts itself.
    """
    machine = _Machine(data, start, known, persistent)
    try:
        return machine.run(), machine.at
    except (struct.error, IndexError) as error:
        raise Damaged("the pickle is cut off, or takes more from its stack than there is") from error


class _Machine:
    def __init__(self, data: memoryview, start: int, known: Mapping[str, Any], persistent: Callable[[Any], Any]):
        self.data, self.at, self.known, self.persistent = data, start, known, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while True:
            opcode = self.data[self.at]
            self.at += 1
            if opcode == _STOP:
                value = self.pop()
                if self.stack:
                    raise Damaged("the pickle ends in the middle of an object")
                return value
            self.step(opcode)

    def step(self, opcode: int) -> None:
        push = self.stack.append
        if opcode in _NUMBERS:
            push(self.number(_NUMBERS[opcode]))
        elif opcode in _TEXTS:
            push(self.text(*_TEXTS[opcode]))
        elif opcode in _CONSTANTS:
            push(_CONSTANTS[opcode])
        elif opcode in _EMPTY:
            push(_EMPTY[opcode]())
        elif opcode in _TUPLES:
            push(tuple(reversed([self.pop() for _ in range(_TUPLES[opcode])])))
        elif opcode in _PUT:
            self.memo[self.number(_PUT[opcode])] = self.top()
        elif opcode == _MEMOIZE:
            self.memo[len(self.memo)] = self.top()
        elif opcode in _GET:
            index = self.number(_GET[opcode])
            if index not in self.memo:
                raise Damaged(f"the pickle refers to object {index} of itself, which it does not have")
            push(self.memo[index])
        elif opcode == _MARKER:
            push(_MARK)
        elif opcode == _GLOBAL:
            push(self.find(f"{self.line()}.{self.line()}"))
        elif opcode == _STACK_GLOBAL:
            name, module = self.pop(), self.pop()
            push(self.find(f"{module}.{name}" if isinstance(name, str) and isinstance(module, str) else "?"))
        elif opcode == _PROTO:
            self.number("<B")
        elif opcode == _FRAME:
            self.number("<Q")
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self)
        else:
            raise Damaged(f"byte {self.at - 1} of the pickle, {opcode:#04x}, is no opcode of protocols 2 to 5")

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def text(self, form: str, kind: str) -> Any:
        size = self.number(form)
        if kind == "number" and size > LARGEST_NUMBER:
            raise Damaged(f"the pickle has an integer of {size} bytes")
        raw = bytes(self.data[self.at : self.at + size])
        if len(raw) < size:
            raise Damaged("the pickle is cut off in a text")
        self.at += size
        if kind == "bytes":
            return raw
        if kind == "number":
            return int.from_bytes(raw, "little", signed=True)
        try:
            return raw.decode("utf-8", "surrogatepass" if kind == "text" else "strict")
        except UnicodeDecodeError as error:
            if kind == "old":
                return raw.decode("latin-1")
            raise Damaged("the pickle has a text that is not UTF-8") from error

    def line(self) -> str:
        end = bytes(self.data[self.at : self.at + 1000]).find(b"\n")
        if end < 0:
            raise Damaged("the pickle has a global without an end")
        text = bytes(self.data[self.at : self.at + end]).decode("utf-8", "replace")
        self.at += end + 1
        return text

    def find(self, name: str) -> Any:
        return self.known[name] if name in self.known else Inert(name)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise Damaged("the pickle has a mark where an object should be")
        return value

    def top(self) -> Any:
        if self.stack[-1] is _MARK:
            raise Damaged("the pickle has a mark where an object should be")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                values = self.stack[index + 1 :]
                del self.stack[index:]
                return values
        raise Damaged("the pickle has no mark where one should be")

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Inert):
            return
        if not isinstance(target, dict) or len(values) % 2:
            raise Damaged("the pickle sets items on something that is not a dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[plain_key(key)] = value

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target += values
        elif not isinstance(target, Inert):
            raise Damaged("the pickle appends to something that is not a list")

    def call(self, function: Any, arguments: Any) -> None:
        if isinstance(function, Inert):
            self.stack.append(Inert(function.name))
        elif callable(function) and isinstance(arguments, tuple):
            try:
                self.stack.append(function(*arguments))
            except TypeError as error:
                raise Damaged(f"the pickle gives a function other arguments than it takes ({error})") from error
        else:
            raise Damaged("the pickle calls something that is not a function")

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        self.call(function, arguments)

    def new_with_keywords(self) -> None:
        keywords, arguments, kind = self.pop(), self.pop(), self.pop()
        self.call(kind if not keywords else Inert(getattr(kind, "name", "?")), arguments)

    def instance(self) -> None:  # OBJ: a class and its arguments since the mark
        values = self.pop_to_mark()
        if not values:
            raise Damaged("the pickle has no class where one should be")
        self.call(values[0], tuple(values[1:]))

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Inert):
            target.state = state
        elif isinstance(target, OrderedDict) and isinstance(state, dict):
            target.attributes = state

    def persistent_object(self) -> None:
        self.stack.append(self.persistent(self.pop()))

    def dictionary(self) -> None:
        values = self.pop_to_mark()
        self.stack.append({})
        self.set_items(values)


def plain_key(key: Any) -> Any:
    """The same key, which can be hashed without going deep into it.

    Raises:
        Damaged: it cannot.
    """
    if isinstance(key, tuple):
        if len(key) > LARGEST_KEY or any(isinstance(part, tuple | dict | list) for part in key):
            raise Damaged("the pickle has a key that is no plain value")
    elif isinstance(key, dict | list):
        raise Damaged("the pickle has a key that is no plain value")
    return key


_ACTIONS: dict[int, Callable[[_Machine], Any]] = {
    0x30: _Machine.pop,  # POP
    0x31: _Machine.pop_to_mark,  # POP_MARK
    0x32: lambda machine: machine.stack.append(machine.top()),  # DUP
    0x51: _Machine.persistent_object,  # BINPERSID
    0x52: _Machine.reduce,  # REDUCE
    0x81: _Machine.reduce,  # NEWOBJ
    0x92: _Machine.new_with_keywords,  # NEWOBJ_EX
    0x6F: _Machine.instance,  # OBJ
    0x62: _Machine.build,  # BUILD
    0x61: lambda machine: machine.append([machine.pop()]),  # APPEND
    0x65: lambda machine: machine.append(machine.pop_to_mark()),  # APPENDS
    0x90: lambda machine: machine.append(machine.pop_to_mark()),  # ADDITEMS
    0x91: lambda machine: (machine.pop_to_mark(), machine.stack.append(Inert("builtins.frozenset"))),  # FROZENSET
    0x73: lambda machine: machine.set_items([machine.pop(), machine.pop()][::-1]),  # SETITEM
    0x75: lambda machine: machine.set_items(machine.pop_to_mark()),  # SETITEMS
    0x74: lambda machine: machine.stack.append(tuple(machine.pop_to_mark())),  # TUPLE
    0x6C: lambda machine: machine.stack.append(machine.pop_to_mark()),  # LIST
    0x64: _Machine.dictionary,  # DICT
}
