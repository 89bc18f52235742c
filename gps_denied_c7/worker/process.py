"""A child process, seen from the node: start it, talk to it, notice its death, end it (F-1)."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gps_denied_c7.child_environment import SAFE_DIRECTORY, python_child, worker_environment
from gps_denied_c7.errors import NO_THREADS_REMEDY, EngineDeserializeError, WorkerDiedError
from gps_denied_c7.worker.channel import (
    PROTOCOL_VERSION,
    Channel,
    ChannelClosedError,
    ChildProtocol,
    MessageError,
    Ready,
)
from gps_denied_c7.worker.log import WorkerLog
from gps_denied_c7.worker.shared_memory import SharedTensors

__all__ = ['WorkerProcess']

# Its exit code comes a moment after its channel has closed; no frame waits until a driver releases the process.
_EXIT_CODE_S = 0.1
# Before anything is loaded: while another worker's memory is being freed, only the node would be left to take.
# The kernel adds thousandths of the limit to what a process holds, and ends the highest. With 800, a node that holds
# eight tenths of its memory cgroup comes after the smallest worker, and a decoder, with 1000, before most workers.
_EXPENDABLE = """
{ read -r score && echo $((score > 200 ? 1000 : score + 800)) >/proc/self/oom_score_adj; } </proc/self/oom_score_adj
exec "$@"
"""


class _Spawner:
    """
    Start processes from one thread that lives as long as this process.

    The kernel ends a worker with the thread that started it, and threads of an executor come and go.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._orders: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]]] = queue.SimpleQueue()

    def run(self, start: Callable[[], Any]) -> Any:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._serve, name='c7-spawner', daemon=True)
                self._thread.start()
        result: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._orders.put((start, result))
        value, error = result.get()
        if error is not None:
            raise error
        return value

    def _serve(self) -> None:
        while True:
            start, result = self._orders.get()
            try:
                result.put((start(), None))
            except BaseException as error:
                result.put((None, error))
            # What they refer to must not live until the next order.
            del start, result


_spawner = _Spawner()


class WorkerProcess:
    """
    Hold one process that runs a module of this package, its channel, and its end.

    For one thread, except :meth:`kill`, :meth:`release` and :meth:`join`.

    :param name: of the worker in logs and errors; may be changed.
    :param process: the process; reaped by this object.
    :param channel: this end of its channel; closed by this object.
    :param lifetime: descriptor whose closing ends the process; closed by this object, -1 for none.
    :raises OSError: the process cannot be watched.
    """

    def __init__(self, name: str, process: subprocess.Popen[bytes], channel: Channel, lifetime: int = -1) -> None:
        self.name = name
        self._process = process
        self._channel = channel
        self._lifetime = lifetime
        self._is_ready = False
        self._releasing, self._reaping = threading.Lock(), threading.Lock()
        self._released = False
        self._then: Callable[[], None] = lambda: None
        self._gone = threading.Event()
        self._pidfd = os.pidfd_open(process.pid)
        self._death = select.poll()
        self._death.register(self._pidfd, select.POLLIN)
        self._poller = select.poll()
        self._poller.register(channel.fileno(), select.POLLIN)
        self._poller.register(self._pidfd, select.POLLIN)

    @classmethod
    def start(cls, name: str, protocol: ChildProtocol, arguments: Iterable[str] = ()) -> WorkerProcess:
        """
        Start a process that waits for what it is to do.

        :param name: as above.
        :param protocol: what is sent to it; its module takes ``--channel`` and ``--lifetime``.
        :param arguments: other options of the module.
        :raises EngineDeserializeError: there is no process or descriptor left for it.
        """
        try:
            with contextlib.ExitStack() as failed, contextlib.ExitStack() as handed_over:
                ours, theirs = Channel.pair(protocol)
                failed.callback(ours.close)
                handed_over.callback(theirs.close)
                read_end, lifetime = os.pipe()
                failed.callback(os.close, lifetime)
                handed_over.callback(os.close, read_end)
                log_read, log_write = os.pipe()
                failed.callback(os.close, log_read)
                handed_over.callback(os.close, log_write)
                command, environ = python_child(
                    protocol.module, '--channel', str(theirs.fileno()), '--lifetime', str(read_end), *arguments,
                    environ=worker_environment(os.environ),
                )  # fmt: skip
                process = _spawner.run(
                    lambda: subprocess.Popen(
                        ['/bin/sh', '-c', _EXPENDABLE, 'sh', *command],
                        env=environ,
                        cwd=SAFE_DIRECTORY,
                        pass_fds=(theirs.fileno(), read_end),
                        stdin=subprocess.DEVNULL,
                        stdout=log_write,
                        stderr=log_write,
                        start_new_session=True,
                    )
                )
                failed.callback(process.wait)
                failed.callback(process.kill)
                worker = cls(name, process, ours, lifetime)
                failed.callback(os.close, worker._pidfd)
                log = WorkerLog(lambda: worker.name)
                forward = threading.Thread(target=log.run, args=(log_read,), name='c7-worker-log', daemon=True)
                forward.start()
                failed.pop_all()
                return worker
        except (OSError, RuntimeError) as error:
            # RuntimeError: no thread to read its log.
            raise EngineDeserializeError(
                f'no worker process could be started: {error}.', remedy=NO_THREADS_REMEDY
            ) from error

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs; never waits."""
        return self._pidfd >= 0 and not self._death.poll(0)

    def send(self, message: Any, descriptors: Sequence[int] = (), *, block: bool = True) -> None:
        """
        Send a message; a copy of each descriptor goes with it.

        :param block: wait where many messages lie unread at the other end.
        :raises WorkerDiedError: the process is dead.
        :raises InferenceError: it would have to wait.
        """
        try:
            self._channel.send(message, descriptors, block=block)
        except ChannelClosedError as error:
            raise self._died() from error

    def send_segment(self, message: Any, segment: SharedTensors) -> None:
        """Hand a segment of shared memory over with ``message``; close it where that fails, as :meth:`send` does."""
        try:
            # A process that reads nothing must not hold up this one.
            self.send(message, [segment.descriptor], block=False)
        except BaseException:
            segment.close()
            raise

    def await_ready(self, deadline: float) -> bool:
        """
        Wait until the process takes messages; False where it does not by ``deadline`` of the steady clock.

        :raises WorkerDiedError: it is dead.
        :raises MessageError: it speaks another version of the protocol, or none.
        """
        if not self._is_ready:
            message = self.receive(deadline)
            if message is None:
                return False
            if not isinstance(message, Ready):
                raise MessageError(f'{self.name} sent {type(message).__name__} before Ready.')
            if message.version != PROTOCOL_VERSION:
                raise MessageError(
                    f'{self.name} uses version {message.version} of the protocol, this process {PROTOCOL_VERSION}.',
                    remedy='Start the node again: its package was updated while it ran.',
                )
            self._is_ready = True
        return True

    def receive(self, deadline: float | None) -> Any:
        """
        Return the next message, None after ``deadline`` of the steady clock.

        :raises WorkerDiedError: it is dead, and every message that it sent before was returned.
        :raises MessageError: it has sent something else.
        """
        while True:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1e3
            ready = self._poller.poll(remaining)
            try:
                received = self._channel.receive(block=False)
            except ChannelClosedError as error:
                raise self._died() from error
            except MessageError as error:
                raise MessageError(f'{self.name} sent {error.message}') from error
            if received is not None:
                return received[0]
            if not ready:
                return None
            if any(descriptor == self._pidfd for descriptor, _ in ready):
                raise self._died()

    def kill(self) -> None:
        """Begin to end it, without waiting; from any thread."""
        with self._releasing:
            if not self._released:
                self._kill()

    def release(self, then: Callable[[], None] = lambda: None) -> None:
        """
        End it and close what leads to it, without waiting for its end; safe to repeat, from any thread.

        :param then: called once the process is gone, from any thread.
        """
        with self._releasing:
            if self._released:
                return
            self._released, self._then = True, then
            self._kill()
            self._channel.close()
            for descriptor in (self._pidfd, self._lifetime):
                if descriptor >= 0:
                    os.close(descriptor)
            self._pidfd = self._lifetime = -1
            if self._process.poll() is not None:
                self._reap()
                return
            # A driver may take a second to release the process, or never do it. join reaps if no thread can be started.
            with contextlib.suppress(RuntimeError):
                threading.Thread(target=self._reap, name='c7-reaper', daemon=True).start()

    def join(self, timeout_s: float) -> bool:
        """Wait until the released process is gone; False where it is not within ``timeout_s``."""
        if not self._gone.wait(timeout_s) and self._released and self._process.poll() is not None:
            self._reap()
        return self._gone.is_set()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _reap(self) -> None:
        self._process.wait()
        with self._reaping:
            if not self._gone.is_set():
                self._then()
                self._gone.set()

    def _died(self) -> WorkerDiedError:
        if self._pidfd < 0 or not self._death.poll(_EXIT_CODE_S * 1e3):
            return WorkerDiedError(f'{self.name} closed its channel.')
        code = self._process.wait()
        how = f'was ended by {_signal_name(-code)}' if code < 0 else f'ended with exit code {code}'
        return WorkerDiedError(f'{self.name} {how}.')


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        # Of the real-time signals, only the first and the last have names.
        return f'signal {number}'
