"""The meeting of processes: who may come, what disturbs it, and what does not."""

import contextlib
import json
import random
import socket
import threading
import time

import pytest

from tnt_jax.config import InputError
from tnt_jax.training import meeting
from tnt_jax.training.meeting import LONGEST_LINE, PeersError, gather, report_to

FACTS = {"config.seed": "0", "version of jax": "1"}


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


class Background(threading.Thread):
    """A function's result or exception, in a thread of its own."""

    def __init__(self, function, *arguments):
        super().__init__(daemon=True)
        self.function, self.arguments = function, arguments
        self.start()

    def run(self):
        try:
            self.result, self.error = self.function(*self.arguments), None
        except Exception as error:
            self.result, self.error = None, error

    def get(self, seconds=30):
        self.join(seconds)
        assert not self.is_alive(), "it hangs"
        if self.error:
            raise self.error
        return self.result


class Place:
    """A meeting of `count` processes at a free port, with process 0 waiting."""

    def __init__(self, count, seconds=20.0):
        self.count, self.port, self.seconds = count, free_port(), seconds
        self.coordinator = f"127.0.0.1:{self.port}"
        self.process_0 = Background(gather, self.coordinator, count, FACTS, time.monotonic() + seconds)

    def process(self, index, count=None, facts=FACTS):
        deadline = time.monotonic() + self.seconds
        return Background(report_to, self.coordinator, count or self.count, index, facts, deadline)

    def connect(self):
        """A bare connection, as soon as process 0 listens."""
        for _ in range(500):
            with contextlib.suppress(ConnectionRefusedError):
                return socket.create_connection(("127.0.0.1", self.port), timeout=10)
            time.sleep(0.01)
        raise AssertionError("process 0 does not listen")

    def hello(self, index, **changes):
        """A connection that has said hello, as bytes on the wire."""
        message = {"tnt_jax": 1, "process": index, "count": self.count, "host": "h", "token": "t", "facts": FACTS}
        connection = self.connect()
        connection.sendall(json.dumps(message | changes).encode() + b"\n")
        return connection

    def go(self, *others):
        """Everybody is told to go; seconds since the beginning."""
        connections = self.process_0.get()
        assert sorted(connection.index for connection in connections) == list(range(1, self.count))
        for other in others:
            assert [connection.index for connection in other.get()] == [0]
        for connection in connections:
            connection.close()


def heard(connection):
    """The messages until the other end closes."""
    with connection, connection.makefile() as lines:
        return [json.loads(line) for line in lines]


def test_all_come():
    place = Place(4)
    place.go(*(place.process(index) for index in (3, 1, 2)))


def test_process_0_comes_last():
    port = free_port()
    other = Background(report_to, f"127.0.0.1:{port}", 2, 1, FACTS, time.monotonic() + 20)
    time.sleep(0.5)
    (connection,) = gather(f"127.0.0.1:{port}", 2, FACTS, time.monotonic() + 20)
    assert other.get()
    connection.close()


def test_two_thousand_processes_meet():
    place = Place(2000)
    began = time.monotonic()
    waiting = [place.hello(index, token=str(index)) for index in range(1, 2000)]
    place.go()
    assert time.monotonic() - began < 15
    for connection in (waiting[0], waiting[999], waiting[-1]):
        assert heard(connection)[-1] == {"go": True}
    for connection in waiting:
        connection.close()


def test_silent_connections_keep_nobody_waiting():
    place = Place(2)
    silent = [place.connect() for _ in range(20)]
    began = time.monotonic()
    place.go(place.process(1))
    assert time.monotonic() - began < 3
    for connection in silent:
        connection.close()


def test_more_strangers_than_are_kept(monkeypatch):
    monkeypatch.setattr(meeting, "FEWEST_STRANGERS", 4)
    place = Place(2)
    strangers = [place.connect() for _ in range(50)]
    place.go(place.process(1))
    for connection in strangers:
        connection.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b'{"process": 1}\n',
        b'{"process": 1, "count": 2}\n',
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        b"\x00\xff" * 1000 + b"\n",
        b"[" * 100_000 + b"\n",
        b"x" * (LONGEST_LINE + 10),
        b'{"here": true}\n',
        b'{"code": 1, "message": "no"}\n',
        b"",
    ],
)
def test_garbage_is_closed_and_ends_nothing(garbage):
    place = Place(2)
    stranger = place.connect()
    stranger.sendall(garbage)
    place.go(place.process(1))
    stranger.close()


def test_a_process_that_died_while_others_were_awaited_may_come_again():
    place = Place(3)
    place.hello(1, token="first").close()
    again, last = place.process(1), place.process(2)
    place.go(again, last)


def test_a_process_whose_host_has_vanished_may_come_again(monkeypatch):
    monkeypatch.setattr(meeting, "WAITING_SECONDS", 0.5)
    place = Place(3)
    vanished = place.hello(1, token="first")  # never answers, never closes
    again = place.process(1)
    with vanished, vanished.makefile() as lines:
        while json.loads(lines.readline()) != {"waiting": 0}:  # process 0 asks it, for another has come in its place
            pass
        place.go(again, place.process(2))
        assert {"go": True} not in [json.loads(line) for line in lines]


def test_a_process_that_lost_its_connection_takes_its_own_place():
    place = Place(3)
    lost = place.hello(1, token="same")
    found = place.hello(1, token="same")
    other = place.process(2)
    place.go(other)
    assert heard(found)[-1] == {"go": True}
    assert {"go": True} not in heard(lost)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([(1, 3, FACTS)], "process 1 on .* is one of 3, and process 0 one of 2"),
        ([(1, 3, FACTS), (1, 3, FACTS)], "there are two processes 1"),
        ([(1, 2, FACTS | {"config.seed": "5"})], "process 1 on .* is of another run: config.seed is 5 there and 0 on"),
        ([(1, 2, {"config.seed": "0"})], "version of jax is missing there and 1 on process 0"),
    ],
)
def test_processes_that_contradict_each_other_are_all_told_so(others, message):
    place = Place(1 + len(others))
    others = [place.process(*arguments) for arguments in others]
    for each in (place.process_0, *others):
        with pytest.raises(InputError, match=message):
            each.get()


def test_process_0_says_who_did_not_come_and_so_do_those_that_came():
    place = Place(3, seconds=1.0)
    came = place.process(1)
    for each in (place.process_0, came):
        with pytest.raises(PeersError, match=r"waited 1 s for 3 processes at 127.0.0.1:\d+; process 2 did not come"):
            each.get()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b'{"hello": 1}\n', b"[" * 5000 + b"\n"])
def test_something_else_answers_where_process_0_should(answer):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.sendall(answer)
                    connection.close()

        Background(serve)
        with pytest.raises(PeersError, match=f"process 1 cannot reach the coordinator at 127.0.0.1:{port}"):
            report_to(f"127.0.0.1:{port}", 2, 1, FACTS, time.monotonic() + 1)


def test_what_comes_right_after_go_is_not_lost():
    with socket.create_server(("127.0.0.1", 0)) as server:
        other = Background(report_to, f"127.0.0.1:{server.getsockname()[1]}", 2, 1, FACTS, time.monotonic() + 5)
        connection, _ = server.accept()
        connection.sendall(b'{"go": true}\n{"code": 75, "message": "died"}\n')
        assert list(other.get()[0].pending) == [{"code": 75, "message": "died"}]
        connection.close()


def message_of(chance: random.Random) -> bytes:
    """What a stranger might send: half a hello, a hello with wrong fields, JSON of any kind, or noise."""
    hello = {"tnt_jax": 1, "process": 1, "count": 3, "host": "h", "token": "t", "facts": {"a": "b"}}
    odd = [None, True, -1, 0, 2**40, 1.5, "", "x" * 300, [], {}, [hello], {"facts": []}]
    kind = chance.randrange(6)
    if kind == 0:
        text = json.dumps(hello).encode()
        return text[: chance.randrange(len(text))]
    if kind == 1:
        name = chance.choice(list(hello))
        # A hello of another count is a contradiction, which is another test's.
        wrong = [value for value in odd if name != "count" or type(value) is not int or value < 1]
        if name == "facts":
            wrong = [value for value in odd if value != {}]
        if name in ("host", "token", "process"):
            wrong = [value for value in wrong if not isinstance(value, str) or len(value) > 255]
        return json.dumps(hello | {name: chance.choice(wrong)}).encode() + b"\n"
    if kind == 2:
        return json.dumps({chance.choice(["go", "here", "code", "waiting"]): chance.choice(odd)}).encode() + b"\n"
    if kind == 3:
        return json.dumps(chance.choice(odd)).encode() + b"\n"
    if kind == 4:
        return chance.randbytes(chance.randrange(300)) + b"\n" * chance.randrange(2)
    return b"{" * chance.randrange(70_000)


@pytest.mark.parametrize("seed", range(4))
def test_no_message_of_a_stranger_ends_or_hinders_a_meeting(seed):
    chance, place, open_ = random.Random(seed), Place(3), []
    for _ in range(150):
        stranger = place.connect()
        with contextlib.suppress(OSError):
            stranger.sendall(message_of(chance))
        if chance.random() < 0.5:
            stranger.close()
        else:
            open_.append(stranger)
    began = time.monotonic()
    place.go(place.process(1), place.process(2))
    assert time.monotonic() - began < 5
    for stranger in open_:
        stranger.close()


@pytest.mark.parametrize("seed", range(4))
def test_no_message_in_the_place_of_process_0_is_a_traceback_or_a_hang(seed):
    chance = random.Random(seed)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.sendall(message_of(chance).replace(b'"go"', b'"stop"'))
                    connection.close()

        Background(serve)
        other = Background(report_to, f"127.0.0.1:{server.getsockname()[1]}", 2, 1, FACTS, time.monotonic() + 2)
        with pytest.raises((PeersError, InputError)):
            other.get()
