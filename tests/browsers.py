"""A browser without a screen: what its tests wait for."""

import time


def wait_for(condition, seconds=120):
    """What the condition gives as soon as it is something."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.3)
    return value
