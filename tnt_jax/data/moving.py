"""The places in an image from which the pixels of a prepared one come, so that masks and boxes move with them.

Crop, large-scale jitter, shift and flip keep rows rows and columns columns: a number for each row and for each column
of the result says all, for masks and for boxes.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt16
from PIL import Image

from tnt_jax.data.resample import resize
from tnt_jax.data.samples import Pixels


@dataclasses.dataclass(frozen=True)
class Places:
    """Of each row and each column of a prepared image the middle in the whole one, in pixels; NaN where it shows none
    of it, as in padding."""

    rows: Float[np.ndarray, " height"]
    columns: Float[np.ndarray, " width"]

    @classmethod
    def of_box(cls, box: tuple[float, float, float, float], size: tuple[int, int]) -> "Places":
        """Those of a box (top, left, height, width) that was resized to `size`."""
        return cls(*((np.arange(to) + 0.5) * (box[2 + axis] / to) + box[axis] for axis, to in enumerate(size)))

    def take(self, rows: Int[np.ndarray, " new_height"], columns: Int[np.ndarray, " new_width"]) -> "Places":
        """Some of the rows and columns, in this order; numbers that are none are padding."""
        pairs = zip((self.rows, self.columns), (rows, columns), strict=True)
        return Places(
            *(np.where((at >= 0) & (at < len(old)), old[at.clip(0, len(old) - 1)], np.nan) for old, at in pairs)
        )

    def mirrored(self) -> "Places":
        return Places(self.rows, self.columns[::-1])

    def of_boxes(
        self, boxes: Float[np.ndarray, "boxes 4"]
    ) -> tuple[tuple[float, float, float, float], Float[np.ndarray, "boxes 4"]]:
        """The prepared image as a box of the whole one, and boxes of the whole one as shares of the prepared one.

        Boxes are left, top, right, bottom in pixels. What lies outside of what is shown is cut off: of a box of which
        nothing is shown nothing is left.
        """
        whole, found = np.zeros(4), np.zeros(boxes.shape)
        for axis, at in enumerate((self.columns, self.rows)):
            shown = np.flatnonzero(~np.isnan(at))
            first, last = shown[[0, -1]] if len(shown) else (0, -1)
            # From one pixel to the next; of a single one the side is not known, and nothing is left of boxes.
            step = (at[last] - at[first]) / (last - first) if last > first else np.nan
            ends = [at[first] + (edge - first - 0.5) * step for edge in (0, len(at))] if last > first else [0, 0]
            whole[[axis, axis + 2]] = ends
            if last > first:
                edges = (boxes[:, [axis, axis + 2]] - at[first]) / step + first + 0.5
                found[:, [axis, axis + 2]] = np.sort(edges, axis=1).clip(first, last + 1) / len(at)
        return tuple(whole), found

    def of_mask(
        self, mask: UInt16[np.ndarray, "height width"], outside: int
    ) -> UInt16[np.ndarray, "new_height new_width"]:
        """The mask of the prepared image: in each pixel the value that lies at its middle, `outside` in padding."""
        both = (self.rows, self.columns)
        rows, columns = (
            np.nan_to_num(each).astype(np.int64).clip(0, side - 1) for each, side in zip(both, mask.shape, strict=True)
        )
        moved = mask[rows[:, None], columns]
        moved[np.isnan(self.rows)] = outside
        moved[:, np.isnan(self.columns)] = outside
        return moved


def fitted(
    image: Pixels,
    size: tuple[int, int],
    interpolation: Image.Resampling,
    fill: Sequence[float],
    *,
    factor: float = 1.0,
    at: tuple[float, float] = (0.5, 0.5),
) -> tuple[Pixels, Places]:
    """The whole image, as large as it fits into `size`, times `factor`: what is too much is cut, what lacks is filled.

    Args:
        fill: of each channel.
        at: share of what is cut or filled that lies above and to the left.
    """
    shape = image.shape[:2]
    scale = factor * min(to / side for to, side in zip(size, shape, strict=True))
    new = tuple(max(1, round(side * scale)) for side in shape)
    # Where the part that is shown begins, in the resized image and in the result.
    cut = [round(share * max(0, whole - to)) for share, whole, to in zip(at, new, size, strict=True)]
    start = [round(share * max(0, to - whole)) for share, whole, to in zip(at, new, size, strict=True)]
    length = tuple(min(whole, to) for whole, to in zip(new, size, strict=True))
    part = resize(image, new, interpolation, (*cut, *length))
    if length != tuple(size):
        whole = np.empty((*size, image.shape[2]), image.dtype)
        whole[:] = np.asarray(fill)
        whole[start[0] : start[0] + length[0], start[1] : start[1] + length[1]] = part
        part = whole
    box = tuple(begin * side / whole for begin, side, whole in zip(cut, shape, new, strict=True))
    box += tuple(many * side / whole for many, side, whole in zip(length, shape, new, strict=True))
    return part, Places.of_box(box, length).take(
        *(np.arange(to) - first for to, first in zip(size, start, strict=True))
    )
