"""Chromium without a screen, and without what it asks the network for by itself."""

import time

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--window-size=1400,1500",
)  # fmt: skip


def wait_for(condition, seconds=120):
    """What the condition gives as soon as it is something."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.3)
    return value
