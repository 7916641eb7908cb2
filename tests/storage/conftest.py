"""Caches of their own, so that no test sees what another one, or the user, has fetched."""

import pytest


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache of ours and of the hub's, and no settings of the environment."""
    import huggingface_hub.constants

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    return tmp_path / "cache"


@pytest.fixture
def hub(own_cache, monkeypatch):
    """A Hugging Face hub on this machine, without repositories."""
    import huggingface_hub.constants
    from loopback import Hub

    with Hub() as server:
        # What the environment variable HF_ENDPOINT decides when the library is imported.
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the hub here has LFS alone
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server
