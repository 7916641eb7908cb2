"""The collectives of a compiled program, read from its text: bytes that the devices send to each other."""

import dataclasses
import math
import re

SIZES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
# `%name = f32[8,4]{1,0} all-reduce(...)`; the result of several at once is a tuple of shapes.
OPERATION = re.compile(rf"^\s*(?:ROOT )?%?\S+ = (?P<result>.*?) (?P<kind>{KINDS})(?P<start>-start)?\(", re.M)
SHAPE = re.compile(rf"\b({'|'.join(SIZES)})\[([\d,]*)\]")
LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
COUNTED_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]")
NAMED_GROUPS = re.compile(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}")  # mesh['data'=8,'fsdp'=1] {'data'}
LOOP = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation in which devices exchange data."""

    kind: str
    bytes: int
    """Of the whole array as it lies on one device: of the result, and of what comes in for a reduce-scatter."""
    group: int | None
    """Devices that take part together; None for all, or where pairs exchange."""


def collectives(hlo: str) -> list[Collective]:
    """Those of a compiled program, `compiled.as_text()`, in the order of the text; one in a loop counts once."""
    found = []
    for match in OPERATION.finditer(hlo):
        line = hlo[match.start() : hlo.find("\n", match.end())]
        shapes = [_bytes(*shape) for shape in SHAPE.findall(match["result"])]
        kind, group = match["kind"], _group(line)
        # What goes in stands before what comes out.
        if match["start"] and (kind == "all-gather" or match["result"].startswith("((")):
            shapes = shapes[len(shapes) // 2 :]
        if match["start"] and kind == "collective-permute":
            shapes = shapes[:1]
        scattered = group or 1 if kind == "reduce-scatter" else 1
        found.append(Collective(kind, sum(shapes) * scattered, group))
    return found


def loops(hlo: str) -> list[int]:
    """The number of turns of each loop of a compiled program, where it is known and more than one."""
    return [int(count) for count in LOOP.findall(hlo) if int(count) > 1]


def _bytes(kind: str, sides: str) -> int:
    size = SIZES[kind]
    for side in filter(None, sides.split(",")):
        size *= int(side)
    return size


def _group(line: str) -> int | None:
    if listed := LISTED_GROUPS.search(line):
        return len(listed[1].split(","))
    if named := NAMED_GROUPS.search(line):
        sizes = dict(axis.split("=") for axis in named[1].split(","))
        return math.prod(int(sizes[axis]) for axis in named[2].split(","))
    counted = COUNTED_GROUPS.search(line)
    return int(counted[1]) if counted else None
