"""The processes that run one command together, one on each host: who writes, what they agree on.

Every function that is not named as one process's own must be called by all of them, in the same
order: each waits for the others. Of a process that runs alone, each is done at once.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # as Orbax does: the address is public nowhere
from jax.experimental import multihost_utils

from mtp_model import progress
from mtp_model.commands import FAILED, INTERRUPTED, silence
from mtp_model.problems import UserError

# A process that has not been heard of for so long is gone, and ends the others.
SILENT_S = 30
_SHUTDOWN_S = 30
# What JAX says where another process is gone, before it ends this one by itself.
_LOST = ("gloo", "unavailable", "deadline_exceeded", "barrier", "coordination service")
_AGAIN = "Run the same command on every host: it goes on from where it was last saved"
# How HTTP/2 begins, which the first process speaks: it keeps a connection that says no more.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_ANSWER_S = 5
_TRIES = 10

_leaving = threading.Event()


class LostError(UserError):
    """Another process of the cluster is gone."""


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Become one of the processes of a cluster, before JAX has looked for its devices.

    Arguments that are None are found in the environment: TPU hosts on GCE and GKE, SLURM, Open MPI,
    Kubernetes. Without a cluster in the environment, and without arguments, nothing happens.
    """
    if jax.distributed.is_initialized():  # by whoever called us
        return
    given = [value is not None for value in (coordinator, processes, process)]
    # Its own handler of SIGTERM would end the process where ours saves.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            cluster_detection_method="deactivate" if all(given) else None,
            heartbeat_timeout_seconds=SILENT_S,
            shutdown_timeout_seconds=_SHUTDOWN_S,
        )
    except ValueError as error:
        if any(given):
            raise UserError(
                f"not all of the cluster is known ({error}): give address, number of processes and "
                "number of this one"
            ) from error
    except RuntimeError as error:
        if not any(given) and "must be called before" in str(error):
            return  # whoever called us has computed something already: this process works alone
        raise UserError(f"the cluster could not be joined: {error}") from error
    if not is_first():
        progress.hush()
        threading.Thread(target=_watch_the_first, name="cluster", daemon=True).start()


def leave(status: int) -> None:
    """End this process's part, of a cluster if it is in one, with its exit status.

    Where nothing failed all of them end here, and wait for each other. Else the process ends now,
    and the others are told that it is gone.
    """
    if not jax.distributed.is_initialized():
        return
    _leaving.set()
    if status in (0, INTERRUPTED):
        jax.distributed.shutdown()
    else:
        # Python's own end would wait for the others, who would wait for what this one had to do.
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _watch_the_first() -> None:
    """End this process with a message when the first one has ended.

    JAX ends it too, by an abort that nothing in Python can catch, after it has looked up the names
    of its stack: a thread that waits for the closed connection comes before that.
    """
    host, _, port = str(distributed.global_state.coordinator_address).rpartition(":")
    last_words = (
        f"error: process {number()} of {count()} lost process 0 at {host}:{port}, which keeps them "
        f"together: it ended, and its own log says why. {_AGAIN}\n"
    ).encode()
    for _ in range(_TRIES):  # a connection may break though the process is there
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S)
        except ConnectionRefusedError:
            break
        except OSError:
            return  # a host that does not answer: JAX notices that
        with connection, contextlib.suppress(OSError):
            connection.settimeout(None)
            connection.sendall(_HELLO)
            while connection.recv(1024):
                pass
        if _leaving.is_set():
            return
    else:
        return
    if not _leaving.is_set():
        _end_with(last_words)


def _end_with(last_words: bytes) -> NoReturn:
    """End this process, with these words as the last that it says.

    What JAX's threads still have to say, in the moment that the end takes, is heard no more.
    """
    said = os.dup(2)
    silence(2)
    os.write(said, last_words)
    os._exit(FAILED)


def count() -> int:
    """How many processes there are. Without a cluster JAX does not look for devices yet."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def number() -> int:
    """Which of them this one is."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that writes what there is once: logs, settings, messages."""
    return number() == 0


def wait(reached: str) -> None:
    """Wait until all processes are here."""
    if count() > 1:
        multihost_utils.sync_global_devices(reached)


def is_anywhere(flag: bool) -> bool:
    """Whether something is so in any process."""
    if count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def all_say(value: Any) -> list[Any]:
    """What each process says, as JSON, by number."""
    if count() == 1:
        return [value]
    said = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(said.size, np.int32))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: said.size] = said
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(text[:size].tobytes()) for text, size in zip(texts, sizes, strict=True)]


def by_first(act: Callable[[], Any]) -> Any:
    """What `act` gives, done by the first process alone, as JSON; all raise where it cannot."""
    if count() == 1:
        return act()
    found, failed = None, None
    if is_first():
        try:
            found = act()
        except (UserError, OSError) as error:
            failed = error
    found, why = all_say((found, failed and str(failed)))[0]
    if why is not None:
        raise failed or UserError(f"process 0: {why}")
    return found


def raise_unless_alike(what: dict[str, str]) -> None:
    """UserError where processes do not work on the same: names what differs, and where."""
    said = all_say(what)
    odd = [
        f"{name}: process {other} has {each.get(name)}, process 0 {said[0].get(name)}"
        for other, each in enumerate(said)
        for name in sorted(said[0].keys() | each.keys())
        if each.get(name) != said[0].get(name)
    ]
    if odd:
        lines = "\n  ".join(odd)
        raise UserError(
            "the processes of the cluster were not given the same; give every host the same "
            f"command, files and version:\n  {lines}"
        )


def lost(error: Exception) -> LostError | None:
    """What an error of JAX means where it tells of another process that is gone."""
    said = str(error)
    ours = isinstance(error, UserError)
    if ours or count() == 1 or not any(word in said.lower() for word in _LOST):
        return None
    return LostError(
        f"process {number()} of {count()} lost the others ({' '.join(said.split())[:200]}). One of "
        f"them ended: its own log says why. {_AGAIN}"
    )
