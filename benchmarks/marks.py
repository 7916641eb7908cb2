"""Images whose class is one small mark at a known place: what a model can only know from a few pixels."""

import struct

import numpy as np

MARKS = np.array(
    [
        [[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]],
        [[1, 0, 1, 0], [1, 0, 1, 0], [1, 0, 1, 0], [1, 0, 1, 0]],
        [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]],
    ]
)
SIDE = 32


def marked_images(count, seed, marks=MARKS, anywhere=False):
    """Noise with one of the marks of 4 x 4 pixels inside of a patch of 8, or `anywhere`; of the last class with none.

    Images uint8 (count, 32, 32), classes, and the marks' upper left corners (count, 2).
    """
    rng = np.random.default_rng(seed)
    images = rng.integers(90, 166, (count, SIDE, SIDE), np.uint8)
    classes = rng.integers(0, len(marks) + 1, count)
    corners = 8 * rng.integers(0, SIDE // 8, (count, 2)) + 2 * rng.integers(0, 3, (count, 2))
    corners = rng.integers(0, SIDE - 3, (count, 2)) if anywhere else corners
    for image, label, (row, column) in zip(images, classes, corners, strict=True):
        if label < len(marks):
            image[row : row + 4, column : column + 4] = np.where(marks[label], 255, 0)
    return images, classes.astype(np.uint8), corners


def balanced_marks(count, seed=0):
    """Marks with eight white pixels and eight black ones, of which any two differ in four pixels at least."""
    rng, marks = np.random.default_rng(seed), []
    while len(marks) < count:
        mark = rng.permutation(16).reshape(4, 4) < 8
        if all((mark != other).sum() >= 4 for other in marks):
            marks.append(mark)
    return np.array(marks)


def write_idx(folder, train, test):
    """A folder for `idx:FOLDER`; train and test are pairs of images and classes."""
    for name, (images, classes) in (("train", train), ("t10k", test)):
        for kind, array in (("images-idx3", images), ("labels-idx1", classes)):
            head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{name}-{kind}-ubyte").write_bytes(head + array.tobytes())
