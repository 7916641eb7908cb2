"""Names on the Hugging Face hub, against a small hub on this machine."""

import http.server
import io
import threading
import time

import huggingface_hub.constants
import numpy as np
import published
import pytest
import safetensors.numpy
import torch

import tnt_jax
from tnt_jax.config import InputError
from tnt_jax.models.variants import model_config
from tnt_jax.storage.folder import parameter_shapes
from tnt_jax.storage.torch.convert import convert
from tnt_jax.storage.torch.layouts import layout_shapes


@pytest.fixture(scope="module")
def tensors():
    config = model_config("tnt_ti_patch16_224", image_size=32, num_classes=10)
    shapes = layout_shapes({path: of.shape for path, of in parameter_shapes(config).items()}, "timm")
    return {name: np.ascontiguousarray(published.tensor(name, shape, seed=0)) for name, shape in shapes.items()}


@pytest.fixture
def hub(tensors, tmp_path, monkeypatch):
    """Serves `timm/new` (safetensors), `timm/old` (a PyTorch file) and `timm/empty` as the hub does."""
    pickled = io.BytesIO()
    torch.save({name: torch.tensor(tensor) for name, tensor in tensors.items()}, pickled)
    files = {
        "/timm/new/resolve/main/model.safetensors": safetensors.numpy.save(tensors),
        "/timm/old/resolve/main/pytorch_model.bin": pickled.getvalue(),
        "/timm/empty/resolve/main/README.md": b"",
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.reply(with_body=False)

        def do_GET(self):
            self.reply(with_body=True)

        def reply(self, with_body):
            known = any(path.startswith("/".join(self.path.split("/")[:3]) + "/") for path in files)
            content = files.get(self.path)
            self.send_response(404 if content is None else 200)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("ETag", '"0123456789"')
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if with_body and content:
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # What the environment variables HF_ENDPOINT and HF_HOME decide when the library is imported.
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["timm/new", "timm/old"])
def test_a_name_on_the_hub_is_downloaded_and_converted(name, hub, tensors, tmp_path):
    convert(name, tmp_path / "model", num_classes=10)
    model = tnt_jax.load_model(tmp_path / "model")
    np.testing.assert_array_equal(model.class_token[...], tensors["cls_token"])
    assert model.description.source["hub"] == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/none", "timm/none is neither a file here nor a model on the Hugging Face hub"),
        ("timm/empty", r"timm/empty on the Hugging Face hub has none of model\.safetensors, pytorch_model\.bin"),
    ],
)
def test_what_the_hub_does_not_have_is_an_input_error(name, message, hub, tmp_path):
    with pytest.raises(InputError, match=message):
        convert(name, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_hub_out_of_reach_is_an_input_error(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between the library's five further tries
    hub.shutdown()
    hub.server_close()
    with pytest.raises(InputError, match="the Hugging Face hub is out of reach"):
        convert("timm/new", tmp_path / "model")
