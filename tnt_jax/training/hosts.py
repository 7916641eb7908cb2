"""The processes of a run: they find each other, they agree, and they end together.

`jax.distributed` joins them, notices within `HEARTBEAT_SECONDS` when one has gone, and then aborts the others (134).
Through its key-value store goes what all must have in common, what process 0 decides, and why a process ends: then all
end with its exit code. A lone process has index 0 of 1, and waits for nobody.
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax

from tnt_jax.config import DistributedConfig, InputError, TrainConfig
from tnt_jax.storage.run import by_role
from tnt_jax.training.signals import Signals

RESTART = 75
"""The exit code where the same command, started again everywhere, may go on: EX_TEMPFAIL."""
HEARTBEAT_SECONDS = 20
FOR_EVER = 2**31 - 1  # milliseconds
END = "tnt_jax/end"
HOST = socket.gethostname()
PACKAGE = pathlib.Path(__file__).parent.parent
VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
EACH_ITS_OWN = ("data.source", "data.num_threads", "data.num_workers")
"""Fields that may differ between processes: paths, whose content is compared, and how each prepares its images."""
CODE = (".py", ".c", ".h", ".cu")
LAUNCHERS = {
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK"),
    "torchrun": ("WORLD_SIZE", "RANK"),
}
"""The launchers that JAX does not recognise by itself, and the variables with number and index of processes."""
ALONE = "--distributed.num-processes 1 trains alone"
TOLD = "--distributed.coordinator HOST:PORT, --distributed.num-processes and --distributed.process-id"
Value = TypeVar("Value")


class LostError(RuntimeError):
    """A device, another process or the way to it is gone. Started again, the run may go on."""

    exit_code = RESTART


class Hosts:
    """The processes of a run, as one of them sees the others."""

    def __init__(self, index: int = 0, count: int = 1):
        self.index, self.count = index, count
        self._keys = (f"tnt_jax/{number}" for number in itertools.count())
        self._told, self._over = threading.Event(), threading.Event()
        if count > 1:
            self._client = _key_value_store()
            self._listening = threading.Thread(target=self._listen, daemon=True)
            self._listening.start()

    def share(self, value: Callable[[], Value]) -> Value:
        """A value that process 0 computes for all of them; it is sent as JSON."""
        if self.count == 1:
            return value()
        key = next(self._keys)
        if self.index == 0:
            self._client.key_value_set(key, json.dumps(value(), default=str))
        return json.loads(self._client.blocking_key_value_get(key, FOR_EVER))

    def agree(self, what: str, of_this: Callable[[], Mapping[str, str]]) -> None:
        """Makes sure that all have the same facts; `what` says what a process does that has not.

        Args:
            of_this: the facts of this process by name, which a lone one is not asked for.

        Raises:
            InputError: this process has others than process 0. The others wait here, and are told.
        """
        if self.count == 1:
            return
        facts = of_this()
        theirs = self.share(lambda: {name: [_digest(value), value[:100]] for name, value in facts.items()})
        differ = [
            f"{name} is {facts.get(name, 'missing')[:100]} here and {theirs.get(name, ('', 'missing'))[1]} on process 0"
            for name in sorted(facts.keys() | theirs.keys())
            if name not in facts or name not in theirs or _digest(facts[name]) != theirs[name][0]
        ]
        if differ:
            more = f"; and {len(differ) - 5} more" if len(differ) > 5 else ""
            raise InputError(
                f"this process {what}: {'; '.join(differ[:5])}{more}. "
                "Start the same command with the same versions and the same data everywhere"
            )
        self._client.wait_at_barrier(next(self._keys), FOR_EVER)

    def tell(self, code: int, message: str) -> None:
        """This process ends with this code, for this reason: so do the others."""
        if self.count == 1:
            return
        said = {"from": self.index, "code": code, "message": f"process {self.index} on {HOST}: {message}"[:10_000]}
        with contextlib.suppress(Exception):  # the service has gone, or another process was first
            self._client.key_value_set(END, json.dumps(said))
        time.sleep(3 if self.index == 0 else 0)  # it has the service, and goes last

    def end(self, error: BaseException) -> None:
        """An error of this process ends all of them, unless all of them raise it."""
        if self.count == 1 or getattr(error, "agreed", False):
            return
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", None)
        message = str(error) or type(error).__name__
        if code is None:  # nobody has foreseen it
            traceback.print_exception(error)
            code = 1
        print(f"error: {message}", file=sys.stderr, flush=True)
        # Who has lost another sees what follows from it: whoever knows the reason is given the time to say it.
        if isinstance(error, LostError) and self._told.wait(2):
            time.sleep(60)  # the other thread ends this process
        self.tell(code, message)
        _exit(code)

    def close(self) -> None:
        """This process has done its part. No thread may be in JAX when Python ends."""
        self._over.set()
        if self.count > 1:
            self._listening.join()

    def _listen(self) -> None:
        while not self._over.wait(1.0):
            try:
                said = json.loads(self._client.key_value_try_get(END))
            except Exception:  # it is not there; or process 0 has gone, which a collective or the heartbeat will say
                continue
            if said["from"] == self.index:
                return
            self._told.set()
            print(f"error: {said['message']}", file=sys.stderr, flush=True)
            time.sleep(3 if self.index == 0 else 0)
            _exit(said["code"])


def _exit(code: int) -> None:
    """Not sys.exit: other threads wait for processes that will not answer."""
    sys.stdout.flush()
    os._exit(code)


def _digest(value: str) -> str:
    return hashlib.sha256(value.encode(errors="surrogateescape")).hexdigest()[:32]


@contextlib.contextmanager
def joined(config: DistributedConfig, signals: Signals) -> Iterator[Hosts]:
    """The processes of a run, joined; the run goes on inside. It must come before JAX looks for devices.

    Args:
        signals: those of this process; what ends it at once ends all of them.

    Raises:
        InputError: the configuration is incomplete, or several processes were started and are not told of each other.
        LostError: JAX has lost a device, another process or its connection.
    """
    cluster = _cluster(config)
    hosts = _join(*cluster, config.timeout) if cluster else Hosts()
    signals.before_exit = hosts.tell
    try:
        yield hosts
    except BaseException as error:
        lost = _lost(error)
        hosts.end(lost or error)
        if lost:
            raise lost from error
        raise
    finally:
        hosts.close()


def _join(coordinator: str, count: int, index: int, local_devices: list[int] | None, timeout: float) -> Hosts:
    print(f"process {index} of {count} on {HOST} starts", flush=True)
    late = threading.Timer(timeout, _late, (coordinator, count, timeout))  # JAX aborts without a word
    late.daemon = True
    late.start()
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours, see `signals`
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            local_devices,
            initialization_timeout=int(timeout) + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=3 * HEARTBEAT_SECONDS,
        )
    except jax.errors.JaxRuntimeError as error:
        raise LostError(f"process {index} cannot use {coordinator}: {str(error).splitlines()[0]}") from error
    finally:
        late.cancel()
    hosts = Hosts(index, count)
    kinds = ", ".join(sorted({device.device_kind for device in jax.local_devices()}))
    devices = f"{jax.local_device_count()} of {jax.device_count()} devices ({kinds})"
    print(f"process {index} of {count} on {HOST}: {devices}", flush=True)
    return hosts


def _late(coordinator: str, count: int, timeout: float) -> None:
    print(
        f"error: waited {timeout:.0f} s for {count} processes at {coordinator}, and not all came; those that did have "
        f"said so in their first line. {ALONE}",
        file=sys.stderr,
        flush=True,
    )
    _exit(RESTART)


def _lost(error: BaseException) -> LostError | None:
    """The same error where it says that a device or a process has gone, and not that the program is wrong."""
    text, is_jax = str(error), isinstance(error, jax.errors.JaxRuntimeError)
    ours = text.startswith(("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED", "NOT_FOUND")) or "ompil" in text
    if (is_jax and not ours) or (isinstance(error, ValueError | RuntimeError) and "Gloo" in text):
        return LostError(
            f"a device or another process is lost: {text.splitlines()[0] if text else 'JAX does not say why'}. "
            "Started again, the run goes on from its last checkpoint"
        )
    return None


def _cluster(config: DistributedConfig) -> tuple[str, int, int, list[int] | None] | None:
    """Coordinator, number of processes, index of this one, and its devices (None for all); None for a lone process."""
    coordinator, count, index, local_devices = config.coordinator, config.num_processes, config.process_id, None
    if count == 1:
        return None
    launcher, launched = _launched()
    if coordinator is count is index is None:
        coordinator, found, index, local_devices = _detected(config.timeout)
        if coordinator is None or not found or found == 1:
            if launched is None:
                return None
            raise InputError(
                f"{launcher} has started {launched[0]} processes, and JAX does not find them: add "
                f"--distributed.coordinator HOST:PORT, a free port of process 0's host. {ALONE}"
            )
        return coordinator, found, index, local_devices
    if launched:
        count, index = launched[0] if count is None else count, launched[1] if index is None else index
    given = {"coordinator": coordinator, "num-processes": count, "process-id": index}
    if missing := [f"--distributed.{name}" for name, value in given.items() if value is None]:
        raise InputError(f"{', '.join(missing)} is missing: several processes need all of {TOLD}")
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 2**16:
        raise InputError(f"distributed.coordinator is {coordinator!r}, and must be HOST:PORT")
    if not 0 <= index < count:
        raise InputError(f"distributed.process-id is {index}, and must lie between 0 and {count - 1}")
    return coordinator, count, index, local_devices


def _detected(timeout: float) -> tuple:
    """The same as `_cluster`, as JAX finds it of a TPU pod, GKE, SLURM or Open MPI 4; each None where there is none."""
    try:
        from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize() asks; it is not public

        return ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(timeout))
    except Exception as error:  # of many types: an empty variable, a token that is not there
        first = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"JAX cannot find out which processes there are ({type(error).__name__}: {first}). {ALONE}; several need "
            f"all of {TOLD}"
        ) from error


def _key_value_store() -> Any:
    """The client of the store that all processes of jax.distributed share."""
    try:
        from jax._src.distributed import global_state  # as Orbax does: it has no public name

        return global_state.client
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"JAX {jax.__version__} has its key-value store elsewhere ({error}), without which several processes "
            "cannot train; the versions of requirements.txt are tested"
        ) from error


def _launched() -> tuple[str, tuple[int, int]] | tuple[None, None]:
    """The launcher of several processes, how many there are and which of them this one is."""
    for launcher, variables in LAUNCHERS.items():
        numbers = [os.environ.get(variable, "") for variable in variables]
        if all(number.isdecimal() for number in numbers) and int(numbers[0]) > 1:
            return launcher, (int(numbers[0]), int(numbers[1]))
    return None, None


def facts(config: TrainConfig) -> dict[str, str]:
    """The configuration and the versions of this process, by name: what all processes must have in common."""
    fields = {name: value for name, (value, _) in by_role(config).items() if name not in EACH_ITS_OWN}
    found = {f"config.{name}": json.dumps(value) for name, value in fields.items()}
    found |= {f"version of {name}": importlib.metadata.version(name) for name in VERSIONS}
    digest = hashlib.sha256()
    for path in sorted(path for path in PACKAGE.rglob("*") if path.suffix in CODE):
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    return found | {"code of tnt_jax": digest.hexdigest()[:12]}
