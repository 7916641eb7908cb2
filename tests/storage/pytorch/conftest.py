"""A small checkpoint."""

import pytest


@pytest.fixture(scope="module")
def small():
    """TNT-Ti for small images, 10 classes, in huawei's layout."""
    from state_dicts import state_dict  # which needs PyTorch, as the tests here do

    return state_dict("huawei", "tnt_ti_patch16_224", image_size=32, num_classes=10)


@pytest.fixture
def checkpoint(small, tmp_path):
    from state_dicts import save_safetensors

    return save_safetensors(small, tmp_path / "model.safetensors")
