"""Retrieval of images of the same class: recall and mean average precision by cosine similarity."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

CHUNK = 1024  # queries whose similarities are held at a time


class Retrieval(NamedTuple):
    """Every image as a query among all others."""

    nearest: Int[np.ndarray, "images neighbours"]
    """The most similar images, the most similar first."""
    recall: float
    """Proportion of the queries of which one of these has the class; of queries whose class others have."""
    mean_average_precision: float
    """Over all other images, not over the nearest alone."""
    queries: int
    """Images whose class others have."""


def retrieve(
    features: Float[np.ndarray, "images dim"], labels: Int[np.ndarray, " images"], neighbours: int
) -> Retrieval:
    """The nearest images of each image, and what they are worth by class."""
    from sklearn.metrics import average_precision_score

    count = len(features)
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    nearest, precisions, found = np.empty((count, min(neighbours, count - 1)), np.int64), [], []
    for start in range(0, count, CHUNK):
        similarities = unit[start : start + CHUNK] @ unit.T
        for query, row in enumerate(similarities, start):
            row[query] = -np.inf
            order = np.argsort(-row, kind="stable")
            nearest[query] = order[: nearest.shape[1]]
            same = np.delete(labels == labels[query], query)
            if same.any():
                precisions.append(average_precision_score(same, np.delete(row, query)))
                found.append((labels[nearest[query]] == labels[query]).any())
    means = (float(np.mean(each)) if each else float("nan") for each in (found, precisions))
    return Retrieval(nearest, *means, len(found))
