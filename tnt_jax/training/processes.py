"""Several processes that train together: they meet, they watch each other, and they end together.

JAX's own service does the work of a run. What it does not do is here: to say who is missing, and to end a run at once
when one of its processes has died (it notices after minutes, and then aborts).

Before JAX starts, the others meet at process 0; see `meeting`. The connections stay open, one from each process to
process 0: a connection that closes without a farewell is a process that died.
"""

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping

import jax

from tnt_jax.config import DistributedConfig, InputError
from tnt_jax.training.meeting import RESTART, Connection, address, gather, report_to
from tnt_jax.training.stopping import Signals

# Should a dead host not be found out by the connections, JAX aborts after its own heartbeats have been missing.
HEARTBEAT_SECONDS = 50


@contextlib.contextmanager
def process_group(config: DistributedConfig, facts: Mapping[str, str], listening: Signals) -> Iterator[None]:
    """Joins the processes of a run, if there are several; the run goes on inside.

    It must come before JAX looks for devices. An error inside ends all processes: the others print it, and exit with
    the same code. An exception that has `agreed`, all of them raise.

    Args:
        facts: what must be the same in all processes, by name.
        listening: the signals of this process; what ends it at once ends all of them.

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
        gather(coordinator, count, facts, deadline)
        if index == 0
        else report_to(coordinator, count, index, facts, deadline)
    )
    watch = _Watch(index, connections)
    listening.before_exit = watch.tell
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
        listening.take_back()
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
    address(coordinator)
    if not 0 <= index < count:
        raise InputError(f"distributed.process-id is {index}, and must lie between 0 and {count - 1}")
    return (coordinator, count, index, None) if count > 1 else None


class _Watch:
    """Listens to the connections while the run goes on. Process 0 passes on what it hears."""

    def __init__(self, index: int, connections: list[Connection]):
        self._connections = connections
        self._who = f"process {index} on {socket.gethostname()}: "
        self._ending = threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    def farewell(self) -> None:
        """This process ends as it should."""
        for connection in self._connections:
            connection.send(code=0)

    def tell(self, code: int, message: str) -> None:
        """This process ends with this code, for this reason."""
        for connection in self._connections:
            connection.send(code=code, message=f"{self._who}{message}"[:10_000])

    def fail(self, error: BaseException) -> None:
        """This process has an error: all of them end."""
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        if not hasattr(error, "exit_code") and not isinstance(error, KeyboardInterrupt):
            traceback.print_exception(error)
        self._end(code, str(error) or type(error).__name__, self._who)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self._connections:
                selector.register(connection.socket, selectors.EVENT_READ, connection)
                self._hear(connection, list(connection.pending))
            while selector.get_map():
                for key, _ in selector.select():
                    if self._hear(key.data, key.data.read()):
                        selector.unregister(key.fileobj)

    def _hear(self, connection: Connection, messages: list[dict] | None) -> bool:
        """Whether the other process has said farewell. An error of it ends this one."""
        died = f"process {connection.index} on {connection.host} died or cannot be reached any more. "
        died += "Started again, the run goes on from its last checkpoint"
        for message in [{"code": RESTART, "message": died}] if messages is None else messages:
            code = message.get("code")
            if code == 0:
                return True
            if code is not None:
                code = code if isinstance(code, int) and 0 < code < 256 else RESTART
                self._end(code, str(message.get("message", "")), "", but=connection)
        return False

    def _end(self, code: int, message: str, who: str, but: Connection | None = None) -> None:
        with self._ending:  # and never let go: the first reason is the one that is told
            for connection in self._connections:
                if connection is not but:
                    connection.send(code=code, message=(who + message)[:10_000])
            print(f"error: {message}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            # Not sys.exit: the other threads wait for processes that will not answer.
            os._exit(code)
