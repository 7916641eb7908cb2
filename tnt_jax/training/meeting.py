"""How the processes of a run meet: lines of JSON over TCP, on the port on which JAX's coordinator will listen.

Process 0 listens, and each of the others connects to it. A message is one line, a JSON object of at most 64 KiB.

From the others to process 0:
    {"tnt_jax": 1, "process": 3, "count": 8, "host": "node3", "token": "5f0c", "facts": {"config.seed": "0"}}
        The hello, which comes first. The token is random, one for each process that was ever started. The facts are
        what must be the same in all processes.
    {"here": true}
        The answer to "waiting".
From process 0:
    {"waiting": 2}
        How many are missing. It comes every five seconds; whoever hears nothing for twenty connects anew.
    {"go": true}
        All are there. The listener is closed before, so that the port is free for the coordinator.
In both directions, at any time:
    {"code": 75, "message": "..."}
        The sender ends with this exit code, and so must everybody; 0 is a farewell.

What is no hello within ten seconds is a stranger, such as a scanner or a readiness probe, and is closed. It makes
nobody wait, and never ends the run. A process that comes again, because it died or because its connection did, takes
the place of the one that has gone: that is the one whose connection is closed, or that does not answer.
"""

import collections
import contextlib
import json
import resource
import selectors
import socket
import time
import uuid
from collections.abc import Iterator, Mapping

from tnt_jax.config import InputError

PROTOCOL = 1
LONGEST_LINE = 2**16
HELLO_SECONDS = 10
WAITING_SECONDS = 5
SILENT_SECONDS = 20
SEND_SECONDS = 5
FEWEST_STRANGERS = 256
"""So many connections may be open without having said hello, or as many as there are processes."""
RESTART = 75
"""What a process exits with where the same command, started again everywhere, may go on: EX_TEMPFAIL."""
# A host that vanishes without closing its connections is found out by the kernel after 10 + 4 x 5 seconds.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}


class PeersError(RuntimeError):
    """Not all processes of the run came."""

    exit_code = RESTART


class Connection:
    """A connection to another process; `index` is -1 until it has said who it is."""

    def __init__(self, connected: socket.socket, host: str, index: int = -1):
        self.socket, self.host, self.index = connected, host, index
        self.token, self.facts = "", {}
        self.opened = self.heard = time.monotonic()
        self.pending: collections.deque[dict] = collections.deque()
        """Messages that came behind the last one that `receive` gave."""
        self._received = bytearray()
        connected.settimeout(SEND_SECONDS)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, **message) -> None:
        with contextlib.suppress(OSError):  # whoever has gone is found out by reading
            self.socket.sendall((json.dumps(message) + "\n").encode())

    def read(self) -> list[dict] | None:
        """The messages that have come, once the socket is readable; None if it is closed, or what came is none."""
        try:
            received = self.socket.recv(LONGEST_LINE)
        except TimeoutError:
            return []
        except OSError:
            return None
        *lines, rest = (bytes(self._received) + received).split(b"\n")
        self._received = bytearray(rest)
        messages = [_parsed(line) for line in lines]
        if not received or len(rest) > LONGEST_LINE or None in messages:
            return None
        self.heard = time.monotonic()
        return messages

    def receive(self, seconds: float) -> Iterator[dict]:
        """The messages that come, until the connection is closed or nothing has come for so long."""
        self.socket.settimeout(seconds)
        while True:
            began = time.monotonic()
            messages = self.read()
            if messages is None or (not messages and time.monotonic() - began >= seconds):
                return
            self.pending.extend(messages)
            while self.pending:
                yield self.pending.popleft()

    def close(self) -> None:
        self.socket.close()


def _parsed(line: bytes) -> dict | None:
    try:
        message = json.loads(line) if len(line) <= LONGEST_LINE else None
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def address(coordinator: str) -> tuple[str, int]:
    """Host and port. Raises InputError if it is not HOST:PORT."""
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 2**16:
        raise InputError(f"distributed.coordinator is {coordinator!r}, and must be HOST:PORT")
    return host.strip("[]"), int(port)


def gather(coordinator: str, count: int, facts: Mapping[str, str], deadline: float) -> list[Connection]:
    """Process 0 waits for the others.

    Args:
        deadline: of the monotonic clock, in seconds.

    Raises:
        InputError: a process contradicts this one; all that came are told so.
        PeersError: not all came in time; those that came are told so.
    """
    _allow_open_files(count + max(FEWEST_STRANGERS, count))
    port = address(coordinator)[1]
    try:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        listener = socket.create_server(
            ("", port), family=family, backlog=max(128, count), dualstack_ipv6=family == socket.AF_INET6
        )
    except OSError as error:
        raise InputError(f"process 0 cannot listen on port {port} of {coordinator}: {error.strerror}") from error
    with listener:
        meeting = _Meeting(listener, coordinator, count, facts)
        try:
            meeting.wait(deadline)
        except (InputError, PeersError) as error:
            meeting.tell_all(code=error.exit_code, message=str(error))
            raise
        finally:
            meeting.close_strangers()
    # Only now, when the port is free again for the coordinator.
    meeting.tell_all(go=True)
    return list(meeting.came.values())


class _Meeting:
    """Process 0's view of who has come."""

    def __init__(self, listener: socket.socket, coordinator: str, count: int, facts: Mapping[str, str]):
        self.came: dict[int, Connection] = {}
        self._contenders: dict[int, Connection] = {}
        self._strangers: list[Connection] = []
        self._listener, self._coordinator, self._count, self._facts = listener, coordinator, count, dict(facts)
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def wait(self, deadline: float) -> None:
        began, ask_at = time.monotonic(), 0.0
        while len(self.came) < self._count - 1 or self._contenders:
            now = time.monotonic()
            if now >= deadline:
                raise PeersError(self._who_is_missing(now - began))
            if now >= ask_at:
                self.tell_all(waiting=self._count - 1 - len(self.came))
                ask_at = now + WAITING_SECONDS
            self._drop_the_silent(now)
            for key, _ in self._selector.select(min(deadline - now, ask_at - now, 1.0)):
                if key.data is None:
                    self._accept()
                else:
                    self._hear(key.data)

    def tell_all(self, **message) -> None:
        for connection in [*self.came.values(), *self._contenders.values()]:
            connection.send(**message)

    def close_strangers(self) -> None:
        for connection in self._strangers:
            connection.close()
        self._selector.close()

    def _who_is_missing(self, waited: float) -> str:
        missing = [str(index) for index in range(1, self._count) if index not in self.came]
        names = ", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
        return f"waited {waited:.0f} s for {self._count} processes at {self._coordinator}; " + (
            f"process {names} did not come" if len(missing) == 1 else f"{names} did not come"
        )

    def _accept(self) -> None:
        while True:
            try:
                connected, place = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:  # no file descriptor is left, or the other end has gone
                if self._strangers:
                    self._forget(self._strangers[0])
                else:
                    time.sleep(0.1)
                return
            connection = Connection(connected, place[0])
            self._strangers.append(connection)
            self._selector.register(connected, selectors.EVENT_READ, connection)
            if len(self._strangers) > max(FEWEST_STRANGERS, self._count):
                self._forget(self._strangers[0])

    def _hear(self, connection: Connection) -> None:
        if connection.socket.fileno() < 0:  # forgotten since it became readable
            return
        messages = connection.read()
        if messages is None:
            self._forget(connection)
            return
        for message in messages:
            if connection in self._strangers:
                if not self._greet(connection, message):
                    self._forget(connection)
                    return
            elif "here" in message and connection.index in self._contenders:
                other = self._contenders[connection.index]
                if other is not connection:
                    raise InputError(
                        f"there are two processes {connection.index}, on {connection.host} and on {other.host}"
                    )
            elif "code" in message:  # it ends, and may come again
                self._forget(connection)
                return

    def _greet(self, connection: Connection, hello: dict) -> bool:
        """Takes a hello; False if it is none."""
        if not _is_hello(hello):
            return False
        index, host = hello["process"], hello["host"]
        if hello["count"] != self._count:
            self._strangers.remove(connection)
            self._contenders[index] = connection  # so that it is told
            raise InputError(
                f"process {index} on {host} is one of {hello['count']}, and process 0 one of {self._count}"
            )
        if not index < self._count:
            return False
        self._strangers.remove(connection)
        connection.index, connection.host = index, host
        connection.token, connection.facts = hello["token"], hello["facts"]
        present = self.came.get(index)
        if present is None or present.token == connection.token:
            self._take(connection)
        else:
            if index in self._contenders:
                self._forget(self._contenders[index])
            self._contenders[index] = connection
            present.send(waiting=0)  # is it still there?
            present.heard = min(present.heard, time.monotonic() - SILENT_SECONDS + WAITING_SECONDS)
        return True

    def _take(self, connection: Connection) -> None:
        if connection.index in self.came:
            self._forget(self.came[connection.index])
        self.came[connection.index] = connection
        compare(self._facts, connection.facts, connection.index, connection.host)

    def _drop_the_silent(self, now: float) -> None:
        for connection in list(self._strangers):
            if now - connection.opened > HELLO_SECONDS:
                self._forget(connection)
        for connection in list(self.came.values()):
            if now - connection.heard > SILENT_SECONDS:
                self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.socket)
        connection.close()
        if connection in self._strangers:
            self._strangers.remove(connection)
        if self._contenders.get(connection.index) is connection:
            del self._contenders[connection.index]
        if self.came.get(connection.index) is connection:
            del self.came[connection.index]
            if connection.index in self._contenders:
                self._take(self._contenders.pop(connection.index))


def _is_hello(message: dict) -> bool:
    def is_count(value) -> bool:
        return type(value) is int and 1 <= value < 2**31

    facts = message.get("facts")
    return (
        is_count(message.get("tnt_jax"))
        and message["tnt_jax"] == PROTOCOL
        and is_count(message.get("process"))
        and is_count(message.get("count"))
        and all(isinstance(message.get(name), str) and len(message[name]) < 256 for name in ("host", "token"))
        and isinstance(facts, dict)
        and all(isinstance(value, str) for value in facts.values())
    )


def compare(ours: Mapping[str, str], theirs: Mapping[str, str], index: int, host: str) -> None:
    """Raises InputError if a process knows other facts than process 0; the message names all of them."""
    differ = [
        f"{name} is {_short(theirs.get(name, 'missing'))} there and {_short(ours.get(name, 'missing'))} on process 0"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if differ:
        more = f"; and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise InputError(
            f"process {index} on {host} is of another run: {'; '.join(differ[:5])}{more}. "
            "Start the same command with the same versions everywhere"
        )


def _short(value: str) -> str:
    return value if len(value) <= 100 else f"{value[:100]}..."


def report_to(coordinator: str, count: int, index: int, facts: Mapping[str, str], deadline: float) -> list[Connection]:
    """The others report to process 0, and wait until all have.

    Raises:
        InputError: process 0 says that something is wrong.
        PeersError: process 0 cannot be reached, or says that not all came.
    """
    host, port = address(coordinator)
    hello = {"tnt_jax": PROTOCOL, "process": index, "count": count, "host": socket.gethostname()[:255]}
    hello |= {"token": uuid.uuid4().hex, "facts": dict(facts)}
    began, reason = time.monotonic(), "nothing answered"
    while time.monotonic() < deadline:
        try:
            connected = socket.create_connection((host, port), timeout=HELLO_SECONDS)
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.3)
            continue
        connection = Connection(connected, host, 0)
        connection.send(**hello)
        reason = "what answers there is not process 0"
        # As long as process 0 waits, so does this one: it may have begun later.
        for message in connection.receive(SILENT_SECONDS):
            if "go" in message:
                connected.settimeout(SEND_SECONDS)
                return [connection]
            if "code" in message:
                text = str(message.get("message", ""))
                raise (InputError if message["code"] == InputError.exit_code else PeersError)(text)
            if "waiting" not in message:
                break
            reason = "it closed the connection"
            connection.send(here=True)
        connection.close()
        time.sleep(0.3)
    waited = time.monotonic() - began
    raise PeersError(f"waited {waited:.0f} s: process {index} cannot reach the coordinator at {coordinator} ({reason})")


def _allow_open_files(count: int) -> None:
    """Raises this process's limit of open files, by so many, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < count + 64:
            raise InputError(f"process 0 needs {count + 64} open files, and may have {hard}; see ulimit -n")
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
