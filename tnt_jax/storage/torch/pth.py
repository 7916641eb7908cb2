"""Files that `torch.save` wrote, without PyTorch and without running anything that they say.

Tensors are views of the file, which is mapped into memory: what is not looked at is not read. Read are the zip format,
and the format before PyTorch 1.6. Source: torch/serialization.py and torch/_utils.py.
"""

import dataclasses
import mmap
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tnt_jax.storage.torch.unpickle import Damaged, Inert, OrderedDict, plain_key, unpickle

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

_DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
    "complex64": np.complex64,
    "complex128": np.complex128,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
_QUANTISED = ("QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage", "QUInt2x4Storage")


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """Bytes of a file that tensors look at."""

    key: str
    dtype: np.dtype
    numel: int
    content: Callable[[], memoryview]
    """The bytes, whose checksum is verified the first time."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor in a file, as it was saved: a view of a storage."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements."""

    def numpy(self) -> np.ndarray:
        """The tensor as a read-only array that lies in the file.

        Raises:
            Damaged: the checksum of its bytes is wrong.
        """
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        buffer = self.storage.content()
        if not len(buffer):
            return np.empty(self.shape, self.dtype)
        return np.ndarray(self.shape, self.dtype, buffer, self.offset * self.dtype.itemsize, strides)

    def release_pages(self) -> None:
        """Gives the memory of what was read of the file back to the system; the next look reads it again."""
        mapped = self.storage.content().obj
        if isinstance(mapped, mmap.mmap) and hasattr(mapped, "madvise"):
            mapped.madvise(mmap.MADV_DONTNEED)


@dataclasses.dataclass(frozen=True)
class UnsupportedTensor:
    """A tensor that has no plain array: sparse, quantised, without data, or dependent on something inert."""

    why: str


def is_zip(start: bytes) -> bool:
    """True if a file that begins so can be a zip archive."""
    return start.startswith(b"PK\x03\x04")


def is_legacy(start: bytes) -> bool:
    """True if a file that begins so is of the format before PyTorch 1.6."""
    return start[2:14] == b"\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little")


def read_pth(path: Path) -> Any:
    """The object in a file that `torch.save` wrote.

    Dictionaries, lists, tuples, texts and numbers are themselves, tensors are `Tensor` or `UnsupportedTensor`,
    anything else is `Inert`. A dictionary may contain itself.

    Raises:
        Damaged: it is no such file, or it is damaged.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(16)
        if not start:
            raise Damaged("it is empty")
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if is_zip(start):
        return _Archive(path, data).read()
    if is_legacy(start):
        return _read_legacy(data)
    raise Damaged("it is no file that torch.save wrote")


class _Archive:
    """The zip format: `NAME/data.pkl`, and each storage as `NAME/data/KEY`, uncompressed."""

    def __init__(self, path: Path, data: memoryview):
        self.data, self.storages = data, {}
        try:
            with zipfile.ZipFile(path) as archive:
                self.entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, EOFError) as error:
            raise Damaged(f"its list of contents, at the end, is damaged or cut off ({error})") from error
        if "data.pkl" not in self.entries:
            raise Damaged("it is a zip archive without data.pkl, which torch.save writes")
        if "constants.pkl" in self.entries:
            raise Damaged("it is a TorchScript archive; save the state dict of its module, model.state_dict()")

    def read(self) -> Any:
        order = bytes(self.content("byteorder")) if "byteorder" in self.entries else b"little"
        if order not in (b"little", b"big"):
            raise Damaged(f"its byte order is {order[:20]!r}")
        self.order = "<" if order == b"little" else ">"
        known = _known(len(self.data))
        value, _ = unpickle(self.content("data.pkl"), 0, known, self.persistent)
        return value

    def content(self, name: str) -> memoryview:
        """The bytes of an entry, after its checksum was verified."""
        info = self.entries[name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise Damaged(f"{info.filename} in it is compressed or encrypted, and torch.save does neither")
        header = info.header_offset
        if bytes(self.data[header : header + 4]) != b"PK\x03\x04":
            raise Damaged(f"{info.filename} is not where its list of contents says")
        lengths = struct.unpack_from("<HH", self.data, header + 26)
        start = header + 30 + sum(lengths)
        content = self.data[start : start + info.file_size]
        if len(content) != info.file_size or info.file_size != info.compress_size:
            raise Damaged(f"{info.filename} is cut off")
        if zlib.crc32(content) != info.CRC:
            raise Damaged(f"the checksum of {info.filename} in it is wrong")
        return content

    def persistent(self, identity: Any) -> Any:
        kind, key, numel = _storage_identity(identity)
        if kind in _QUANTISED:
            return UnsupportedTensor("quantised")
        if key not in self.storages:
            dtype, name = np.dtype(_DTYPES[_STORAGES[kind]]).newbyteorder(self.order), f"data/{key}"
            if name not in self.entries:
                raise Damaged(f"it lacks {name}, the bytes of a tensor")
            if self.entries[name].file_size != numel * dtype.itemsize:
                raise Damaged(f"{name} has {self.entries[name].file_size} bytes, not {numel} of {dtype.itemsize} each")
            self.storages[key] = Storage(key, dtype, numel, _once(lambda: self.content(name)))
        return self.storages[key]


def _once(read: Callable[[], memoryview]) -> Callable[[], memoryview]:
    lock, found = threading.Lock(), []

    def content() -> memoryview:
        with lock:
            if not found:
                found.append(read())
        return found[0]

    return content


def _storage_identity(identity: Any) -> tuple[str, str, int]:
    """Kind, key and number of elements of a storage, from `("storage", type, key, device, numel, ...)`."""
    match identity:
        case ("storage", Inert(), str() as key, _, int() as numel, *_) if numel >= 0:
            kind = identity[1].name.rpartition(".")[2]
            if kind in _STORAGES or kind in _QUANTISED:
                return kind, key, numel
            raise Damaged(f"it has a storage of {identity[1].name}, which is not known")
    raise Damaged("it refers to a storage in a form that is not known")


def _read_legacy(data: memoryview) -> Any:
    """The format before 1.6: five pickles, then for each storage the number of its elements and their bytes."""
    storages: dict[str, list] = {}  # key -> [dtype, numel, start]

    def persistent(identity: Any) -> Any:
        if isinstance(identity, tuple) and identity[:1] == ("module",) and len(identity) > 1:
            return identity[1]  # the class of a whole module, beside its source text
        kind, key, numel = _storage_identity(identity)
        if kind in _QUANTISED:
            raise Damaged("it has quantised tensors, in the format before PyTorch 1.6")
        dtype = np.dtype(_DTYPES[_STORAGES[kind]]).newbyteorder(order)
        entry = storages.setdefault(key, [dtype, numel, None])
        view = identity[5] if len(identity) > 5 else None  # key, offset and length, of PyTorch before 0.4
        offset, length = (view[1], view[2]) if isinstance(view, tuple) and len(view) == 3 else (0, numel)
        if not (isinstance(offset, int) and isinstance(length, int) and 0 <= offset <= offset + length <= numel):
            raise Damaged(f"storage {key} has a view outside of itself")

        def content() -> memoryview:
            start = entry[2] + offset * dtype.itemsize
            return data[start : start + length * dtype.itemsize]

        return Storage(key, dtype, length, content)

    order = "<"
    nothing: dict[str, Any] = {}
    magic, at = unpickle(data, 0, nothing, persistent)
    protocol, at = unpickle(data, at, nothing, persistent)
    system, at = unpickle(data, at, nothing, persistent)
    if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL or not isinstance(system, dict):
        raise Damaged("it does not begin as torch.save begins")
    order = "<" if system.get("little_endian", True) else ">"
    value, at = unpickle(data, at, _known(len(data)), persistent)
    keys, at = unpickle(data, at, nothing, persistent)
    if not isinstance(keys, list) or set(map(str, keys)) != set(storages):
        raise Damaged("its list of storages is not that of its tensors")
    for key in map(str, keys):
        dtype, numel, _ = storages[key]
        if at + 8 > len(data) or struct.unpack_from(order + "q", data, at) != (numel,):
            raise Damaged(f"storage {key} is cut off, or has another size than its tensors say")
        storages[key][2] = at + 8
        at += 8 + numel * dtype.itemsize
        if at > len(data):
            raise Damaged(f"storage {key} is cut off")
    return value


def _known(limit: int) -> dict[str, Any]:
    """The meaning of the globals in a file of `limit` bytes."""
    tensor = _Rebuild(limit)
    known = {
        "collections.OrderedDict": lambda pairs=(), *_: _mapping(pairs),
        "collections.defaultdict": lambda *_: {},
        "_codecs.encode": _encoded,
        "torch.Size": lambda sizes=(): sizes if isinstance(sizes, tuple) else (),
        "torch._utils._rebuild_tensor": tensor.from_storage,
        "torch._utils._rebuild_tensor_v2": tensor.from_storage,
        "torch._utils._rebuild_tensor_v3": tensor.from_bytes,
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
        "torch._tensor._rebuild_from_type_v2": lambda function, kind, arguments, *_: _rebuilt(function, arguments),
        "torch._utils._rebuild_meta_tensor_no_storage": lambda *_: UnsupportedTensor(
            "without data (on the device meta)"
        ),
        "torch._utils._rebuild_sparse_tensor": lambda *_: UnsupportedTensor("sparse"),
        "torch._utils._rebuild_sparse_csr_tensor": lambda *_: UnsupportedTensor("sparse"),
        "torch._utils._rebuild_nested_tensor": lambda *_: UnsupportedTensor("nested"),
        "torch._utils._rebuild_qtensor": lambda *_: UnsupportedTensor("quantised"),
        "torch._utils._rebuild_wrapper_subclass": lambda *_: UnsupportedTensor(
            "of a subclass that has no data of its own"
        ),
    }
    return known | {f"torch.{name}": np.dtype(kind) for name, kind in _DTYPES.items()}


def _mapping(pairs: Any) -> OrderedDict:
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    ):
        raise Damaged("it has an ordered dictionary that is none")
    return OrderedDict((plain_key(key), value) for key, value in pairs)


def _encoded(text: Any, encoding: Any = "latin1") -> Any:
    """The bytes of protocol 2, which are text in latin-1."""
    if isinstance(text, str) and encoding == "latin1" and all(letter <= "\xff" for letter in text):
        return text.encode("latin-1")
    raise Damaged("it has bytes in a form that is not known")


def _rebuilt(function: Any, arguments: Any) -> Any:
    if not callable(function) or not isinstance(arguments, tuple):
        return UnsupportedTensor(f"made by {kind_of(function)}, which is not run")
    return function(*arguments)


class _Rebuild:
    """The functions by which torch/_utils.py makes tensors."""

    def __init__(self, limit: int):
        self.limit = limit

    def from_storage(
        self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any
    ) -> Tensor | UnsupportedTensor:
        if isinstance(storage, UnsupportedTensor):
            return storage
        if not isinstance(storage, Storage):
            return UnsupportedTensor(
                f"made from {kind_of(storage)}, which is not run" if isinstance(storage, Inert) else "damaged"
            )
        metadata = rest[2] if len(rest) > 2 else None
        return self._tensor(storage, storage.dtype, storage.numel, offset, shape, strides, metadata)

    def from_bytes(
        self, storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
    ) -> Tensor | UnsupportedTensor:
        if isinstance(dtype, Inert):
            return UnsupportedTensor(f"of the dtype {dtype.name}")
        if not isinstance(storage, Storage) or not isinstance(dtype, np.dtype):
            return UnsupportedTensor("damaged")
        dtype = dtype.newbyteorder(storage.dtype.byteorder) if storage.dtype.byteorder == ">" else dtype
        numel = storage.numel * storage.dtype.itemsize // dtype.itemsize
        return self._tensor(storage, dtype, numel, offset, shape, strides, rest[0] if rest else None)

    def _tensor(
        self, storage: Storage, dtype: np.dtype, numel: int, offset: Any, shape: Any, strides: Any, metadata: Any
    ) -> Tensor | UnsupportedTensor:
        whole = [offset, *shape, *strides] if isinstance(shape, tuple) and isinstance(strides, tuple) else [None]
        if not all(isinstance(number, int) and number >= 0 for number in whole) or len(shape) != len(strides):
            raise Damaged("it has a tensor whose sizes are no sizes")
        if len(shape) > 32:
            raise Damaged(f"it has a tensor of {len(shape)} dimensions")
        count = 1
        for side in shape:
            count *= side
        last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
        if count and last >= numel:
            raise Damaged(f"it has a tensor of {_sizes(shape)} that reaches beyond its storage of {numel}")
        if count * dtype.itemsize > self.limit:
            raise Damaged(f"it has a tensor of {_sizes(shape)}, which is more than the file has bytes")
        if isinstance(metadata, dict) and (metadata.get("conj") or metadata.get("neg")):
            return UnsupportedTensor("conjugated or negated when it is read")
        return Tensor(storage, dtype, offset, shape, strides)


def kind_of(value: Any) -> str:
    """A value in a few words. It may be as large as a file likes."""
    return f"<{value.name[:100]}>" if isinstance(value, Inert) else f"a {type(value).__name__}"


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(str(side) if side < 1 << 63 else "?" for side in shape)
