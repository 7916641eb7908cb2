"""Several processes that train together: they meet, they watch each other, and they end together.

JAX's own service does the work of a run. What it does not do is here: to say who is missing, and to end a run at once
when one of its processes has died (it notices after minutes, and then aborts).

Process 0 first listens where JAX's coordinator will: the others connect and say who they are. When all are there, the
listener makes way for the coordinator. The connections stay open, one from each process to process 0: a connection that
closes without a farewell is a process that died.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import jax

from tnt_jax.config import DistributedConfig, InputError

RESTART = 75
"""What a process exits with where the same command, started again everywhere, may go on: EX_TEMPFAIL."""
HELLO_SECONDS = 10
# A host that vanishes without closing its connections is found out by the kernel after 10 + 4 x 5 seconds; should all
# of this fail, JAX aborts after its own heartbeats have been missing.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
HEARTBEAT_SECONDS = 50


class PeersError(RuntimeError):
    """Not all processes of the run came."""

    exit_code = RESTART


@contextlib.contextmanager
def together(config: DistributedConfig) -> Iterator[None]:
    """Joins the processes of a run, if there are several; the run goes on inside.

    It must come before JAX looks for devices. An error inside ends all processes: the others print it, and exit with
    the same code. An exception that has `agreed`, all of them raise.

    Raises:
        InputError: the configuration is incomplete or contradicts that of process 0.
        PeersError: not all processes came in time.
    """
    cluster = _cluster(config)
    if cluster is None:
        yield
        return
    coordinator, count, index, local_devices = cluster
    deadline = time.monotonic() + config.timeout
    connections = (
        _gather(coordinator, count, deadline) if index == 0 else _report_to(coordinator, count, index, deadline)
    )
    watch = _Watch(index, connections)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            local_devices,
            initialization_timeout=max(60, int(config.timeout)),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
        kinds = ", ".join(sorted({device.device_kind for device in jax.local_devices()}))
        print(
            f"process {index} of {count} on {socket.gethostname()}: {jax.local_device_count()} of "
            f"{jax.device_count()} devices ({kinds})",
            flush=True,
        )
        yield
    except BaseException as error:
        if not getattr(error, "agreed", False):
            watch.fail(error)
        raise
    finally:
        watch.farewell()


def _cluster(config: DistributedConfig) -> tuple | None:
    """Coordinator, number of processes, index of this one, and its devices (None for all); None for a lone process."""
    given = {"coordinator": config.coordinator, "num-processes": config.num_processes, "process-id": config.process_id}
    missing = [f"--distributed.{name}" for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise InputError(f"{', '.join(missing)} is missing: several processes need all of --distributed.coordinator "
                         "HOST:PORT, --distributed.num-processes and --distributed.process-id")  # fmt: skip
    if missing:
        from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize() asks; it is not public

        detected = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(config.timeout))
        return detected if detected[0] and detected[1] and detected[1] > 1 else None
    coordinator, count, index = given.values()
    _address(coordinator)
    if not 0 <= index < count:
        raise InputError(f"distributed.process-id is {index}, and must lie between 0 and {count - 1}")
    return (coordinator, count, index, None) if count > 1 else None


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"distributed.coordinator is {coordinator!r}, and must be HOST:PORT")
    return host.strip("[]"), int(port)


class _Connection:
    """Messages as lines of JSON to and from another process."""

    def __init__(self, connected: socket.socket, index: int, host: str):
        self.index, self.host, self._socket = index, host, connected
        self._lines = connected.makefile("r", encoding="utf-8")
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, **message) -> None:
        with contextlib.suppress(OSError):  # who has gone is found out by reading
            self._socket.sendall((json.dumps(message) + "\n").encode())

    def receive(self, seconds: float | None = None) -> dict | None:
        """The next message; None when the other end is closed or, in `seconds`, silent or no process of ours."""
        self._socket.settimeout(seconds)
        try:
            line = self._lines.readline()
            return json.loads(line) if line.endswith("\n") else None
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        self._socket.close()


def _gather(coordinator: str, count: int, deadline: float) -> list[_Connection]:
    """Process 0 waits for the others."""
    port, came = _address(coordinator)[1], {}
    try:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        listener = socket.create_server(
            ("", port), family=family, backlog=count, dualstack_ipv6=family == socket.AF_INET6
        )
    except OSError as error:
        raise InputError(f"process 0 cannot listen on port {port} of {coordinator}: {error.strerror}") from error
    with listener:
        began = time.monotonic()
        while len(came) < count - 1:
            left = deadline - time.monotonic()
            listener.settimeout(max(left, 0.01))
            try:
                connected, address = listener.accept()
            except TimeoutError:
                missing = [str(index) for index in range(1, count) if index not in came]
                message = f"waited {time.monotonic() - began:.0f} s for {count} processes at {coordinator}; " + (
                    f"process {missing[0]} did not come" if len(missing) == 1 else f"{', '.join(missing)} did not come"
                )
                for connection in came.values():
                    connection.send(code=RESTART, message=message)
                raise PeersError(message) from None
            peer = _Connection(connected, -1, address[0])
            hello = peer.receive(HELLO_SECONDS)
            if not isinstance(hello, dict) or "process" not in hello:
                peer.close()  # a stranger
                continue
            peer.index, peer.host = hello["process"], hello["host"]
            wrong = None
            if hello["count"] != count:
                wrong = f"process {peer.index} on {peer.host} is one of {hello['count']}, and process 0 one of {count}"
            elif peer.index in came:
                wrong = f"there are two processes {peer.index}, on {came[peer.index].host} and on {peer.host}"
            came[peer.index if peer.index not in came else -1] = peer
            if wrong:
                for connection in came.values():
                    connection.send(code=InputError.exit_code, message=wrong)
                raise InputError(wrong)
    # Only now, when the port is free again for the coordinator.
    for connection in came.values():
        connection.send(go=True)
    return list(came.values())


def _report_to(coordinator: str, count: int, index: int, deadline: float) -> list[_Connection]:
    """The others report to process 0, and wait until all have."""
    host, port = _address(coordinator)
    began, reason = time.monotonic(), "nothing answered"
    while time.monotonic() < deadline:
        try:
            connected = socket.create_connection((host, port), timeout=HELLO_SECONDS)
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.3)
            continue
        connection = _Connection(connected, 0, host)
        connection.send(process=index, count=count, host=socket.gethostname())
        # Process 0 may have begun to wait later than this one.
        answer = connection.receive(deadline - time.monotonic() + HELLO_SECONDS)
        if answer and "go" in answer:
            return [connection]
        if answer and answer.get("code") == InputError.exit_code:
            raise InputError(answer["message"])
        if answer:
            raise PeersError(answer["message"])
        connection.close()
        reason = "it closed the connection"
        time.sleep(0.3)
    waited = time.monotonic() - began
    raise PeersError(f"waited {waited:.0f} s: process {index} cannot reach the coordinator at {coordinator} ({reason})")


class _Watch:
    """Listens to the connections while the run goes on. Process 0 passes on what it hears."""

    def __init__(self, index: int, connections: list[_Connection]):
        self._index, self._connections = index, connections
        self._ending = threading.Lock()
        for connection in connections:
            threading.Thread(target=self._listen, args=(connection,), daemon=True).start()

    def farewell(self) -> None:
        """This process ends as it should."""
        for connection in self._connections:
            connection.send(code=0)

    def fail(self, error: BaseException) -> None:
        """This process has an error: all of them end."""
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        if not hasattr(error, "exit_code") and not isinstance(error, KeyboardInterrupt):
            traceback.print_exception(error)
        self._end(code, str(error) or type(error).__name__, f"process {self._index} on {socket.gethostname()}: ")

    def _listen(self, connection: _Connection) -> None:
        died = f"process {connection.index} on {connection.host} died or cannot be reached any more"
        message = connection.receive() or {"code": RESTART, "message": f"{died}. Started again, the run goes on from "
                                           "its last checkpoint"}  # fmt: skip
        if message["code"]:
            self._end(message["code"], message["message"], "", but=connection)

    def _end(self, code: int, message: str, who: str, but: _Connection | None = None) -> None:
        with self._ending:  # and never let go: the first reason is the one that is told
            for connection in self._connections:
                if connection is not but:
                    connection.send(code=code, message=who + message)
            print(f"error: {message}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            # Not sys.exit: the other threads wait for processes that will not answer.
            os._exit(code)
