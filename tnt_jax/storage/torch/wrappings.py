"""Finds the state dict of a TNT in a checkpoint: beside an optimizer, in a trainer's wrapper, averaged or not.

Source of the order: timm/models/_helpers.py, load_state_dict; of the exchange of averaged and raw weights:
mmengine/hooks/ema_hook.py, before_save_checkpoint.
"""

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from tnt_jax.config import InputError
from tnt_jax.storage.torch.formats import is_tensor
from tnt_jax.storage.torch.layouts import DETR_BACKBONE
from tnt_jax.storage.torch.unpickle import Inert, OrderedDict

_log = logging.getLogger(__name__)

MAX_DEPTH = 8  # dictionaries in dictionaries that are looked into
MAX_DICTS = 100_000
PREFERRED_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")  # timm's order; the rest in file order
_AVERAGED = re.compile(r"(^|[._])(ema|teacher|averaged|swa)([._]|$)", re.IGNORECASE)

# One tensor that each kind of network has in a layout, whatever its sizes and options are.
_ANCHORS = {
    "mmpretrain": "layers.0.outer_block.attn.attn.in_proj_weight",
    "huawei": "blocks.0.outer_attn.qk.weight",
    "timm": "blocks.0.attn_out.qk.weight",
    "transformers": f"{DETR_BACKBONE}blocks.0.attn_out.qk.weight",
    "pyramid": "stages.0.blocks.0.outer_attn.q.weight",
    "tnt_jax": "blocks.0.outer.attn.qkv.kernel",
    "tnt_jax pyramid": "stages.0.blocks.0.outer.attn.qkv.kernel",
}


@dataclasses.dataclass(frozen=True)
class StateDict:
    """The state dict of one TNT in a checkpoint."""

    place: str
    """The place of a dictionary: keys, and the prefix of the names, such as `state_dict/model.`."""
    averaged: bool
    tensors: Mapping[str, Any]
    """By the names of the layout, without a prefix; what has another prefix keeps its name."""
    attributes: Mapping[str, Any]
    """Of PyTorch's ordered dictionary."""


def find_state_dict(name: str, content: Any, weights: Literal["raw", "ema"] | None) -> StateDict:
    """The one that was asked for; without asking the averaged one if there is any, as timm does.

    Args:
        name: of the file, for messages.

    Raises:
        InputError: there is none, or there are several that could be meant.
    """
    found = list(_state_dicts(content))
    if not found:
        raise InputError(_what_there_is(name, content))
    wanted = [each for each in found if weights is None or each.averaged == (weights == "ema")]
    if not wanted:
        other = "raw" if weights == "ema" else "averaged"
        raise InputError(
            f"{name} has no {'averaged' if weights == 'ema' else 'raw'} weights, only {other} ones: "
            + ", ".join(each.place for each in found)
        )
    candidates = [each for each in wanted if each.averaged] or wanted
    chosen = min(candidates, key=lambda each: _rank(each.place))
    if others := ", ".join(each.place for each in wanted if each is not chosen):
        read = f"{chosen.place}, which is averaged," if chosen.averaged else chosen.place
        _log.warning("%s holds several networks: %s is read, and not %s", name, read, others)
    return chosen


def _rank(place: str) -> int:
    first = place.partition("/")[0]
    return PREFERRED_KEYS.index(first) if first in PREFERRED_KEYS else len(PREFERRED_KEYS)


def _state_dicts(content: Any) -> Iterator[StateDict]:
    for keys, mapping in _mappings(content):
        prefixes = _prefixes(mapping)
        for prefix in prefixes:
            place = "/".join(filter(None, (*keys, prefix))) or "the file itself"
            averaged = bool(_AVERAGED.search(".".join((*keys[-2:], prefix))))
            if len(keys) == 1 and isinstance(content, Mapping) and "ema_state_dict" in content:
                averaged = keys[0] == "state_dict"  # mmengine saves the averaged weights there, and the raw ones here
            tensors = _of_prefix(mapping, prefix, prefixes)
            yield StateDict(place, averaged, tensors, getattr(mapping, "attributes", {}))


def _mappings(content: Any) -> Iterator[tuple[tuple[str, ...], Mapping]]:
    """Every dictionary in a checkpoint once, with the keys that lead to it, the outer ones first."""
    # By identity, and kept alive: the number of a dictionary that is gone may be that of the next one.
    seen: dict[int, Any] = {}
    waiting = [((), content)]
    for keys, value in waiting:
        if id(value) in seen or len(keys) > MAX_DEPTH or len(seen) > MAX_DICTS:
            continue
        seen[id(value)] = value
        mapping = _of_module(value) if isinstance(value, Inert) else value
        if isinstance(mapping, Mapping):
            yield keys, mapping
            waiting += [((*keys, _text(key)), inner) for key, inner in mapping.items() if not is_tensor(inner)]


def _text(key: Any) -> str:
    """A key for people. Of one that is no text or number only its type: nothing that a file holds is printed whole."""
    return str(key)[:100] if isinstance(key, str | int | float) else f"<{type(key).__name__}>"


def _of_module(module: Inert) -> Mapping | None:
    """The state dict of a whole `torch.nn.Module` that was saved, which is itself not made."""
    tensors, seen, waiting = OrderedDict(), set(), [("", module)]
    for prefix, each in waiting:
        state = each.state if isinstance(each, Inert) else None
        if not isinstance(state, Mapping) or not isinstance(state.get("_modules"), Mapping) or id(each) in seen:
            continue
        seen.add(id(each))
        for kind in ("_parameters", "_buffers"):
            values = state.get(kind) if isinstance(state.get(kind), Mapping) else {}
            tensors |= {f"{prefix}{name}": value for name, value in values.items() if is_tensor(value)}
        waiting += [(f"{prefix}{name}.", child) for name, child in state["_modules"].items()]
    return tensors or None


def _prefixes(names: Mapping) -> list[str]:
    """The prefixes of the names of a TNT, such as `module.`; several where several networks lie side by side."""
    prefixes = {}
    for name in filter(lambda name: isinstance(name, str), names):
        found = [kind for kind, anchor in _ANCHORS.items() if name == anchor or name.endswith("." + anchor)]
        if found:
            kind = max(found, key=lambda kind: len(_ANCHORS[kind]))  # a backbone of timm's in a DETR is both
            prefix = name.removesuffix(_ANCHORS[kind])
            if kind == "mmpretrain":
                prefix = prefix.removesuffix("backbone.")
            if not re.search(r"(^|\.)stages\.\d+\.$", prefix):  # a PyramidTNT has blocks in its stages
                prefixes[prefix] = None
    return list(prefixes)


def _of_prefix(values: Mapping, prefix: str, prefixes: list[str]) -> dict[str, Any]:
    """The tensors with a prefix, by their names without it, and those that belong to none of the networks.

    The names of a bare backbone get mmpretrain's `backbone.` before them.
    """
    taken = {}
    for name, value in values.items():
        of = max((each for each in prefixes if str(name).startswith(each)), key=len, default=prefix)
        if of == prefix:
            taken[str(name).removeprefix(prefix)] = value
    if _ANCHORS["mmpretrain"] in taken:
        taken = {name if name.startswith("head.") else f"backbone.{name}": value for name, value in taken.items()}
    return taken


def _what_there_is(name: str, content: Any) -> str:
    """The reason why a checkpoint without a TNT is refused: its real content."""
    if not isinstance(content, Mapping | Inert):
        return f"{name} holds a {type(content).__name__} and no state dict"
    largest: Mapping = {}
    for _, mapping in _mappings(content):
        if sum(map(is_tensor, mapping.values())) > sum(map(is_tensor, largest.values())):
            largest = mapping
    tensors = [key for key, value in largest.items() if is_tensor(value)]
    if not tensors:
        kinds = ", ".join(f"{key} ({type(value).__name__})" for key, value in _some(content))
        return f"{name} has no tensors; it holds {kinds or f'an empty {type(content).__name__}'}"
    if not all(isinstance(key, str) for key in tensors):
        return f"{name} names its tensors {', '.join(map(_text, tensors[:4]))}, and a state dict names them with texts"
    return (
        f"this is the state dict of another network ({len(tensors)} tensors: {', '.join(tensors[:4])} ...); a TNT has "
        + ", ".join(f"{anchor} ({kind})" for kind, anchor in _ANCHORS.items())
    )


def _some(content: Any) -> list[tuple[str, Any]]:
    return (
        [(_text(key)[:50], value) for key, value in list(content.items())[:8]] if isinstance(content, Mapping) else []
    )
