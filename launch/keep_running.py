#!/usr/bin/env python3
"""Runs a command, and starts it again when it ends in a way that another start can mend.

    python3 launch/keep_running.py [--starts 100] [--wait 10] -- python train.py --config configs/imagenet_tnt_s.py

The same line runs on every machine of a pod, in every container of a job, in every task of SLURM. It needs nothing but
Python. It ends with the exit code of the command

- after 0 (done), 1 (a failure that would come again), 2 (wrong input) and 130 (Ctrl-C);
- when it is itself told to end by SIGTERM or Ctrl-C, which it passes on;
- after so many starts.

After everything else, such as 75 (stopped, or another process died), 134 (JAX aborts when another one is gone) and 137
(killed by the kernel, which had no memory left), it waits and starts the command again. It waits twice as long before
each next start, at most five minutes; a start that lasted ten minutes counts as a success, after which the waits begin
anew.
"""

import argparse
import signal
import subprocess
import sys
import time

FINAL = (0, 1, 2, 130)
LONGEST_WAIT = 300.0
# Python runs the handler of a signal between two of its own instructions. A signal that comes just before a blocking
# call would be noticed when the call returns, so no call blocks for longer than this, in seconds.
SLICE = 0.2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=100, help="of the command, at most")
    parser.add_argument("--wait", type=float, default=10.0, help="seconds before the second start")
    parser.add_argument("--good", type=float, default=600.0, help="seconds after which a start counts as a success")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND [ARGUMENT ...]")
    given = parser.parse_args()
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command or given.starts < 1:
        parser.error("a command, and at least one start")
    return keep_running(command, given.starts, given.wait, given.good)


def keep_running(command: list[str], starts: int, first_wait: float, good: float) -> int:
    told, child = False, None

    def pass_on(number: int, frame) -> None:
        nonlocal told
        told = True
        if child is not None and child.poll() is None:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    wait = first_wait
    for start in range(1, starts + 1):
        began = time.monotonic()
        try:
            # A group of its own: Ctrl-C comes once, from here.
            child = subprocess.Popen(command, start_new_session=True)
        except OSError as error:
            print(f"keep_running: {command[0]}: {error.strerror}", file=sys.stderr)
            return 2
        if told:
            child.terminate()
        code = _wait(child)
        code = code if code >= 0 else 128 - code  # as shells say it
        if code in FINAL or told:
            return code
        if time.monotonic() - began >= good:
            wait = first_wait
        if start == starts:
            print(f"keep_running: exit code {code}, and this was start {start} of {starts}", file=sys.stderr)
            return code
        text = f"keep_running: exit code {code}; start {start + 1} of at most {starts} in {wait:g} s"
        print(text, file=sys.stderr, flush=True)
        again = time.monotonic() + wait
        while time.monotonic() < again:
            if told:
                return 75
            time.sleep(min(SLICE, wait))
        wait = min(2 * wait, LONGEST_WAIT)
    return code


def _wait(child: subprocess.Popen) -> int:
    while True:
        try:
            return child.wait(timeout=SLICE)
        except subprocess.TimeoutExpired:
            continue


if __name__ == "__main__":
    sys.exit(main())
