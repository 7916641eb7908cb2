"""export.py --format web in a real browser: Chromium, headless, driven by Selenium, beside predict.py."""

import functools
import http.server
import os
import pathlib
import threading

import commands
import numpy as np
import pytest
from browsers import wait_for
from PIL import Image
from small_models import small_model

import tnt_jax
from tnt_jax.export import web


@pytest.fixture
def serve():
    """A function that serves a folder and returns its address."""
    servers = []

    def start(folder):
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    yield start
    for server in servers:
        server.shutdown()


@pytest.mark.demo
@pytest.mark.parametrize("changes", [{"image_size": (64, 96)}, {"image_size": 64, "in_channels": 1}])
def test_the_page_answers_as_predict_does(changes, browser, serve, tmp_path):
    from selenium.webdriver.common.by import By

    names = [f"class {letter}" for letter in "abcdefg"]
    tnt_jax.save_model(small_model(num_classes=7, **changes), tmp_path / "m", class_names=names)
    code, _, err = commands.run("export.py", tmp_path / "m", "--format", "web", "--out", tmp_path / "page")
    assert code == 0, err
    photo, exif = tmp_path / "photo.jpg", Image.Exif()
    exif[0x0112] = 6  # lies on its side
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 15, 3), np.uint8)).resize((190, 140))
    smooth.save(photo, exif=exif, quality=95)
    browser.get(serve(tmp_path / "page"))
    wait_for(lambda: browser.find_element(By.TAG_NAME, "body").get_attribute("data-ready"))
    browser.find_element(By.ID, "file").send_keys(str(photo))
    rows = wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "#predictions tr"))
    found = {row.text.rpartition(" ")[0]: float(row.get_attribute("data-score")) for row in rows}
    scores = tnt_jax.inference_model(tmp_path / "m", photo)["pred_scores"]
    likeliest = np.argsort(-scores)[:5]
    assert list(found) == [names[label] for label in likeliest]
    np.testing.assert_allclose(list(found.values()), scores[likeliest], atol=1e-3)
    if shot := os.environ.get("WEB_SCREENSHOT"):
        browser.save_screenshot(str(pathlib.Path(shot)))

    (tmp_path / "not.jpg").write_bytes(b"no image")
    browser.find_element(By.ID, "file").send_keys(str(tmp_path / "not.jpg"))
    wait_for(lambda: "not.jpg cannot be read as an image" in browser.find_element(By.ID, "error").text)


def test_what_has_no_page_is_said(tmp_path, monkeypatch):
    tnt_jax.save_model(small_model(in_channels=5), tmp_path / "five")
    code, _, err = commands.run("export.py", tmp_path / "five", "--format", "web", "--out", tmp_path / "page")
    assert (code, "a page shows images of 1 or 3 channels, and the model takes 5" in err) == (2, True)
    tnt_jax.save_model(small_model(), tmp_path / "m")
    monkeypatch.setattr(web.shutil, "which", lambda name: None)
    code, _, err = commands.run("export.py", tmp_path / "m", "--format", "web", "--out", tmp_path / "page")
    assert (code, "with npm, which is not installed" in err) == (2, True)
    assert not (tmp_path / "page").exists()
