"""The state dicts of the published PyTorch implementations: their names, reading them, writing them."""
