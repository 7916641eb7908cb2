"""The page in a real browser: Chromium, headless, driven by Selenium. Needs Gradio, Chromium and its driver.

CI installs them (`make test-demo`); what they would not change is tested by the first two tests without them.
"""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
import urllib.request

import commands
import numpy as np
import pytest
from browsers import wait_for
from PIL import Image
from small_models import small_model

import tnt_jax

NAMES = tuple(f"class {letter}" for letter in "abcdefg")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "small"
    tnt_jax.save_model(small_model(num_classes=7, image_size=64), folder, class_names=NAMES)
    return folder


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_port_in_use_and_a_port_that_is_none_are_refused(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, out, err = commands.run("demo.py", folder, "--port", port)
    assert (code, out) == (2, "")
    assert f"port {port} of 127.0.0.1 cannot be used (Address already in use); choose another one with --port" in err
    code, _, err = commands.run("demo.py", folder, "--port", "70000")
    assert code == 2
    assert "--port is 70000, and must lie between 1 and 65535" in err


def test_without_gradio_a_message_says_how_to_get_it(folder, port, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, out, err = commands.run("demo.py", folder, "--port", port)
    assert (code, out) == (2, "")
    assert "the page needs gradio, which is not installed: pip install" in err


@pytest.fixture
def page(folder, port, tmp_path):
    """The address of the page, served by the command in a process of its own."""
    log = (tmp_path / "log").open("w+")
    command = [sys.executable, "demo.py", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, cwd=commands.ROOT, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(address, timeout=5).read()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.demo
def test_an_image_is_dropped_and_a_patch_clicked(page, browser, folder, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    def found(selector):
        return browser.find_elements(By.CSS_SELECTOR, selector)

    def plot(name):
        images = found(f"#{name} img")
        return images[0].get_attribute("src") if images else None

    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 90, 3), np.uint8)).save(photo)
    browser.get(page)
    wait_for(lambda: found("#image input[type=file]"))[0].send_keys(str(photo))
    wait_for(lambda: "%" in found("#classes")[0].text)
    result = tnt_jax.inference_model(folder, photo)
    text = found("#classes")[0].text
    assert result["pred_class"] in text
    assert len(set(re.findall("class [a-g]", text))) == 5
    assert f"{result['pred_score']:.0%}" in text

    seen = wait_for(lambda: found("#seen img"))[0]
    wait_for(lambda: seen.size["width"] > 100)

    def click(right, down):
        """At a share of the picture, which the image fills as far as its shape lets it."""
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", seen)
        side = min(seen.size["width"], seen.size["height"])
        offset = int((right - 0.5) * side), int((down - 0.5) * side)
        ActionChains(browser).move_to_element_with_offset(seen, *offset).click().perform()

    def shows(right, down, text):
        """After a click. A plot that comes moves the page, so that a click may miss: then once more."""
        click(right, down)
        end = time.monotonic() + 10
        while text not in found("#patch")[0].text:
            if time.monotonic() > end:
                return False
            time.sleep(0.2)
        return True

    wait_for(lambda: shows(0.9, 0.1, "Patch in row 0, column 3"))
    first = wait_for(lambda: plot("inner")), wait_for(lambda: plot("outer"))
    wait_for(lambda: shows(0.4, 0.6, "Patch in row 2, column 1"))
    wait_for(lambda: plot("inner") != first[0] and plot("outer") != first[1])
    wait_for(lambda: found("#classes button"))[0].click()
    wait_for(lambda: plot("why"))
    shot = pathlib.Path(os.environ.get("DEMO_SCREENSHOT", tmp_path / "page.png"))
    time.sleep(1)
    browser.execute_script("window.scrollTo(0, 0)")
    browser.save_screenshot(str(shot))
    assert np.asarray(Image.open(shot)).std() > 10

    # What the page asked for, and not what the browser asks for by itself.
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    asked = [each["request"]["url"] for each in sent if each["documentURL"].startswith(page)]
    assert len(asked) > 10
    assert not [url for url in asked if not url.startswith((page, "data:", "blob:"))]
