"""Probes of frozen features: k nearest neighbours and a linear classifier."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

NEIGHBOURS, TEMPERATURE = 20, 0.07  # DINO's, arXiv 2104.14294
CHUNK = 1024  # test images whose similarities are held at a time
Features = Float[np.ndarray, "images dim"]
Labels = Int[np.ndarray, " images"]


def nearest_neighbours(
    train: Features, train_labels: Labels, test: Features, *, classes: int, neighbours: int = NEIGHBOURS
) -> Labels:
    """The class of each test image that its nearest training images vote for, by cosine similarity.

    A vote weighs exp(similarity / 0.07). Source: knn_classifier in DINO's eval_knn.py.
    """
    train, labels = _unit(jnp.asarray(train)), jnp.asarray(train_labels)
    chunks = [
        _vote(_unit(jnp.asarray(test[start : start + CHUNK])), train, labels, min(neighbours, len(train)), classes)
        for start in range(0, len(test), CHUNK)
    ]
    return np.concatenate([np.asarray(chunk) for chunk in chunks])


def _unit(features: Array) -> Array:
    return features / jnp.maximum(jnp.linalg.norm(features, axis=1, keepdims=True), 1e-12)


@jax.jit(static_argnums=(3, 4))
def _vote(test: Array, train: Array, labels: Array, neighbours: int, classes: int) -> Array:
    # On TPUs the default would be one pass in bfloat16.
    similarities = jnp.matmul(test, train.T, precision=jax.lax.Precision.HIGHEST)
    similarity, nearest = jax.lax.top_k(similarities, neighbours)
    votes = jax.nn.one_hot(labels[nearest], classes) * jnp.exp(similarity / TEMPERATURE)[..., None]
    return votes.sum(axis=1).argmax(axis=-1)


def linear_probe(train: Features, train_labels: Labels, test: Features) -> Labels:
    """The class of each test image from a linear classifier of the standardised training features.

    Logistic regression with scikit-learn's default L2 penalty, until it has converged or for 1,000 iterations.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return classifier.fit(train, train_labels).predict(test)
