"""An engine in a worker process, seen from the node: start it, ask it, notice its death, end it (F-1, F-4)."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.bundle import ModelBundle
from gps_denied_c7.chain import Rung
from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import EngineDeserializeError, InferenceError, WorkerDiedError
from gps_denied_c7.gpu_memory import GpuMemoryBudget, GpuMemoryClaim
from gps_denied_c7.runtime import BuildProgress, EngineFacts, ProviderSet
from gps_denied_c7.runtimes import require_strategy
from gps_denied_c7.shared_tensors import SharedTensors, TensorLayout
from gps_denied_c7.tensors import TensorSpec, check_inputs, check_outputs
from gps_denied_c7.worker import LOG_MARK, WorkerTask
from gps_denied_c7.worker_channel import Channel, ChannelClosedError, error_from_json, plain_text

__all__ = ['WorkerHost', 'worker_hosts']

# Its exit code comes a moment after its channel has closed; no frame waits for a driver to let go of it.
_EXIT_CODE_S = 0.1
_LARGEST_ANSWER_BYTES = 1 << 30
# A request has one answer, and another packet where the answer needs a larger segment.
_MOST_PACKETS = 8
# Before anything is loaded: while another worker's memory is being freed, only the node would be left to take.
_EXPENDABLE = """
{ read -r score && echo $((score > 400 ? 1000 : score + 600)) >/proc/self/oom_score_adj; } </proc/self/oom_score_adj
exec "$@"
"""
_KEPT_VARIABLES = ('PATH', 'LD_LIBRARY_PATH', 'HOME', 'USER', 'LANG', 'TZ', 'TMPDIR', '_ROS_WHEELS_BOOTSTRAP_COMPLETE')
_KEPT_PREFIXES = ('LC_', 'XDG_', 'PYTHON', 'VIRTUAL_ENV', 'MALLOC_', 'OMP_', 'CUDA_', 'NVIDIA_', 'ORT_', 'TORCH')

_log = logging.getLogger(__name__)


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


class WorkerHost:
    """
    Run a rung's engine in a process of its own.

    Whatever that process does, this one gets an error instead of an answer. For one thread, except
    :meth:`kill`.

    :param memory: the budget that an engine on a GPU claims its memory from; None for the configuration's own.
    :param generation: names the worker in logs; counts the workers of a chain.
    :param on_build: told how far the building of an engine is.
    """

    def __init__(
        self,
        rung: Rung,
        bundle: ModelBundle,
        config: C7InferenceConfig,
        *,
        memory: GpuMemoryBudget | None = None,
        generation: int = 0,
        on_build: Callable[[BuildProgress], None] | None = None,
    ) -> None:
        self._task = WorkerTask(bundle, config, rung)
        self._memory = memory or GpuMemoryBudget(config.gpu_memory_budget_bytes)
        self._claim: GpuMemoryClaim | None = None
        self._generation = generation
        self._on_build = on_build
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._channel: Channel | None = None
        self._poller = select.poll()
        self._lifetime = -1
        self._requests: SharedTensors | None = None
        self._answers: SharedTensors | None = None
        self._inputs: dict[str, NDArray] = {}
        self._layout_sent = False
        self._outputs: dict[str, NDArray] = {}
        self._number = 0
        self._packets = 0
        self._releasing = threading.Lock()
        self._gone = threading.Event()
        self._gone.set()
        self._running = False
        self._input_specs: tuple[TensorSpec, ...] = ()
        self._output_specs: tuple[TensorSpec, ...] = ()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Canonical inputs of the loaded engine, empty before."""
        return self._input_specs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Canonical outputs of the loaded engine, empty before."""
        return self._output_specs

    @property
    def pid(self) -> int | None:
        """Process id of the worker, None where none runs."""
        return self._process.pid if self._process is not None else None

    @property
    def alive(self) -> bool:
        """Whether the worker runs; never waits."""
        return self._pidfd >= 0 and not _readable(self._pidfd)

    @property
    def running(self) -> bool:
        """Whether a request was begun whose answer has not been taken."""
        return self._running

    @property
    def request_arrays(self) -> Mapping[str, NDArray]:
        """The arrays that the worker reads its inputs from, by name; to be filled in place while none is running."""
        return self._inputs

    def load(self) -> EngineFacts:
        """
        Start the worker and have it load its engine.

        :raises GpuMemoryError: it does not fit beside the other engines; no process has been started, unless the
            engine turned out to be larger than was known.
        :raises EngineDeserializeError: it died, or did not load within ``load_timeout_s``.
        :raises C7Error: whatever the worker's runtime refused the engine with.
        """
        self._start(self._claim_memory())
        assert self._channel is not None
        # Where an engine is built, each sign of progress gives it as long again.
        limit_s = self._task.config.load_timeout_s
        deadline = time.monotonic() + limit_s
        while True:
            packet = self._receive(deadline)
            if packet is None:
                self.kill()
                raise EngineDeserializeError(
                    f'{self._name()} did not load within {limit_s:.0f} s and was killed.',
                    remedy='Raise load_timeout_s, or build the engine before the flight (c7_engine build).',
                )
            if packet.get('say') == 'progress':
                deadline = time.monotonic() + limit_s
                self._tell_progress(packet)
                continue
            if packet.get('say') != 'loaded':
                raise error_from_json(packet.get('error'))
            facts = self._take_facts(packet)
            if self._claim is not None:
                self._claim.settle(facts.gpu_memory_bytes)
            return facts

    def begin(self, inputs: Mapping[str, NDArray]) -> None:
        """
        Hand one request over; :meth:`poll` gives its answer.

        :param inputs: arrays by canonical name; copied unless they are :attr:`request_arrays` themselves.
        :raises InferenceError: inputs that do not fit, a request still running, or a dead worker.
        """
        if self._channel is None:
            raise InferenceError('no engine is loaded.')
        if self._running:
            raise InferenceError(f'{self._name()} still runs the request before.')
        # Its own arrays, filled in place, are what they were when they were laid out.
        if self._inputs.keys() != inputs.keys() or any(inputs[name] is not own for name, own in self._inputs.items()):
            self._copy(inputs)
        self._number += 1
        packet: dict[str, Any] = {'do': 'infer', 'id': self._number}
        if not self._layout_sent:
            packet['layout'] = TensorLayout.of(self._inputs).to_json()
            self._layout_sent = True
        try:
            self._channel.send(packet, block=False)
        except ChannelClosedError as error:
            raise self._died() from error
        self._running, self._packets = True, 0

    def poll(self, timeout_s: float | None) -> dict[str, NDArray] | None:
        """
        Return the answer to the request that was begun, None where there is none within ``timeout_s``.

        :return: read-only views of the worker's segment, valid until the next :meth:`begin`.
        :raises InferenceError: the engine failed, the worker died, or what it answered does not fit.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            packet = self._receive(deadline)
            if packet is None:
                return None
            self._packets += 1
            if self._packets > _MOST_PACKETS:
                # It would be listened to beyond every deadline.
                raise InferenceError(f'{self._name()} says more than a request needs.')
            if packet.get('say') == 'needs':
                self._grow(packet)
                continue
            if packet.get('id') != self._number:
                continue
            self._running = False
            if packet.get('say') != 'answered':
                raise error_from_json(packet.get('error'))
            if 'layout' in packet or not self._outputs:
                if self._answers is None:
                    raise InferenceError(f'{self._name()} answers without a segment.')
                self._outputs = self._answers.arrays(TensorLayout.from_json(packet.get('layout')))
            # The worker has looked at each value; here, what decides about memory and shapes is looked at again.
            check_outputs(self._output_specs, self._outputs, finite=True)
            return dict(self._outputs)

    def infer(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Run one request and wait for it, however long it takes; as :meth:`begin` and :meth:`poll`."""
        self.begin(inputs)
        outputs = self.poll(None)
        assert outputs is not None
        return outputs

    def kill(self) -> None:
        """Begin to end the worker, without waiting for it; from any thread."""
        with self._releasing:
            self._kill()

    def release(self) -> None:
        """
        End the worker and give back its memory and descriptors; safe to repeat, from any thread.

        Its process is waited for by :meth:`join` alone, and what it claims of the GPU's memory is held until then.
        """
        with self._releasing:
            self._release()

    def join(self, timeout_s: float) -> bool:
        """Wait until the released worker's process is gone; False where it is not within ``timeout_s``."""
        return self._gone.wait(timeout_s)

    def _kill(self) -> None:
        if self._process is None:
            return
        if self._pidfd < 0:
            self._process.kill()
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _release(self) -> None:
        self._kill()
        process, self._process = self._process, None
        channel, self._channel = self._channel, None
        claim, self._claim = self._claim, None
        if channel is not None:
            channel.close()
        if process is not None:
            if claim is not None:
                claim.leave()
            if process.poll() is None:
                # A driver may need a second for what it held, or for ever.
                threading.Thread(target=self._reap, args=(process, claim), name='c7-reaper', daemon=True).start()
            else:
                self._reap(process, claim)
        elif claim is not None:
            claim.release()
        for descriptor in (self._pidfd, self._lifetime):
            if descriptor >= 0:
                os.close(descriptor)
        self._pidfd = self._lifetime = -1
        self._inputs, self._outputs, self._layout_sent, self._running = {}, {}, False, False
        for segment in (self._requests, self._answers):
            if segment is not None:
                segment.close()
        self._requests = self._answers = None

    def _reap(self, process: subprocess.Popen[bytes], claim: GpuMemoryClaim | None) -> None:
        """Wait for a process to be gone, and its GPU memory with it."""
        process.wait()
        if claim is not None:
            claim.release()
        self._gone.set()

    # --- the process ------------------------------------------------------------------------------

    def _claim_memory(self) -> WorkerTask:
        """Return the task with the memory that the engine may take, where it is one on a GPU."""
        task = self._task
        if task.rung.providers is ProviderSet.CPU:
            return task
        artefacts = task.bundle.artefacts_for(task.rung.strategy)
        self._claim = self._memory.claim(
            task.rung.name,
            key=(task.bundle.weights_digest, task.rung),
            file_bytes=min((_file_bytes(artefact.path) for artefact in artefacts), default=0),
        )
        config = dataclasses.replace(task.config, gpu_memory_budget_bytes=self._claim.limit_bytes)
        return dataclasses.replace(task, config=config)

    def _start(self, to_load: WorkerTask) -> None:
        ours, theirs = Channel.pair()
        read_end, self._lifetime = os.pipe()
        log_read, log_write = os.pipe()
        command = [
            '/bin/sh', '-c', _EXPENDABLE, 'sh',
            sys.executable, '-m', 'gps_denied_c7.worker',
            '--channel', str(theirs.fileno()), '--lifetime', str(read_end),
        ]  # fmt: skip
        try:
            self._process = _spawner.run(
                lambda: subprocess.Popen(
                    command,
                    env=worker_environment(os.environ, self._task.rung.providers),
                    pass_fds=(theirs.fileno(), read_end),
                    stdin=subprocess.DEVNULL,
                    stdout=log_write,
                    stderr=log_write,
                    start_new_session=True,
                )
            )
            self._gone.clear()
            self._channel = ours
            self._pidfd = os.pidfd_open(self._process.pid)
            self._poller = select.poll()
            self._poller.register(ours.fileno(), select.POLLIN)
            self._poller.register(self._pidfd, select.POLLIN)
        except OSError as error:
            ours.close()
            os.close(log_read)
            raise EngineDeserializeError(f'no worker process could be started: {error}.') from error
        finally:
            theirs.close()
            os.close(read_end)
            os.close(log_write)
        threading.Thread(
            target=_forward_log, args=(log_read, self._name()), name='c7-worker-log', daemon=True
        ).start()
        task = os.memfd_create('c7-task', os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(task), 'wb') as file:
                pickle.dump(to_load, file)
            ours.send({'do': 'load'}, [task])
        except ChannelClosedError as error:
            raise self._died() from error
        finally:
            os.close(task)

    def _receive(self, deadline: float | None) -> dict[str, Any] | None:
        """Return the next packet, None after ``deadline``; a dead worker is an error, its last packet not."""
        channel = self._channel
        if channel is None:
            raise InferenceError('no engine is loaded.')
        while True:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1e3
            ready = {descriptor for descriptor, _ in self._poller.poll(remaining)}
            try:
                received = channel.receive(block=False)
            except ChannelClosedError as error:
                raise self._died() from error
            if received is not None:
                packet, descriptors = received
                for descriptor in descriptors:
                    os.close(descriptor)
                return packet
            if self._pidfd in ready:
                raise self._died()
            if not ready:
                return None

    def _died(self) -> WorkerDiedError:
        self._running = False
        process = self._process
        if process is None or not _readable(self._pidfd, _EXIT_CODE_S):
            return WorkerDiedError(f'{self._name()} closed its channel.')
        code = process.wait()
        how = f'was ended by {_signal_name(-code)}' if code < 0 else f'ended with exit code {code}'
        return WorkerDiedError(f'{self._name()} {how}.')

    def _name(self) -> str:
        pid = '' if self._process is None else f', pid {self._process.pid}'
        return f'worker {self._generation} ({self._task.rung.name}{pid})'

    # --- what goes through it ---------------------------------------------------------------------

    def _take_facts(self, packet: dict[str, Any]) -> EngineFacts:
        try:
            facts = packet['facts']
            nodes, memory = facts['cpu_nodes'], facts['gpu_memory_bytes']
            if memory is not None and not 0 <= memory < 1 << 63:
                raise ValueError(memory)
            self._input_specs = tuple(_spec(spec) for spec in packet['inputs'])
            self._output_specs = tuple(_spec(spec) for spec in packet['outputs'])
            return EngineFacts(
                active_provider=plain_text(facts['active_provider']),
                requested_providers=tuple(plain_text(name) for name in facts['requested_providers']),
                cpu_only=bool(facts['cpu_only']),
                cpu_nodes=None if nodes is None else int(nodes),
                notes=tuple(plain_text(note) for note in facts['notes']),
                load_s=float(facts['load_s']),
                gpu_memory_bytes=None if memory is None else int(memory),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise EngineDeserializeError(f'{self._name()} told something unreadable: {packet!a:.300}') from error

    def _tell_progress(self, packet: dict[str, Any]) -> None:
        if self._on_build is None:
            return
        fraction = packet.get('fraction')
        try:
            progress = BuildProgress(
                plain_text(packet.get('phase', '')),
                float(packet.get('elapsed_s', 0.0)),
                None if fraction is None else float(fraction),
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise EngineDeserializeError(f'{self._name()} told something unreadable: {packet!a:.300}') from error
        self._on_build(progress)

    def _copy(self, inputs: Mapping[str, NDArray]) -> None:
        """Copy ``inputs`` to where the worker reads them."""
        check_inputs(self._input_specs, inputs)
        self._prepare(inputs)
        for name, array in self._inputs.items():
            if inputs[name] is not array:
                np.copyto(array, inputs[name])

    def _prepare(self, inputs: Mapping[str, NDArray]) -> None:
        """Have a segment whose arrays are shaped like ``inputs``."""
        if self._inputs and all(self._inputs[name].shape == array.shape for name, array in inputs.items()):
            return
        layout = TensorLayout.of({spec.name: inputs[spec.name] for spec in self._input_specs})
        if self._requests is None or self._requests.size < layout.size:
            self._requests = self._replace(self._requests, 'requests', layout.size)
        self._inputs = self._requests.arrays(layout)
        self._layout_sent = False

    def _grow(self, packet: dict[str, Any]) -> None:
        size = packet.get('bytes')
        if not isinstance(size, int) or not 0 <= size <= _LARGEST_ANSWER_BYTES:
            raise InferenceError(f'{self._name()} asks for an impossible segment of {size!r} bytes.')
        # Views of the segment before are no answer to anything that comes.
        self._outputs = {}
        self._answers = self._replace(self._answers, 'answers', size)

    def _replace(self, before: SharedTensors | None, role: str, size: int) -> SharedTensors:
        assert self._channel is not None
        if before is not None:
            before.close()
        try:
            segment = SharedTensors.create(size, writable=role == 'requests')
        except OSError as error:
            raise InferenceError(f'no memory for a segment of {size} bytes: {error}.') from error
        try:
            # A worker that reads nothing must not hold up this process.
            self._channel.send({'do': 'map', 'segment': role}, [segment.descriptor], block=False)
        except ChannelClosedError as error:
            segment.close()
            raise self._died() from error
        except InferenceError:
            segment.close()
            raise
        return segment


def worker_hosts(
    bundle: ModelBundle,
    config: C7InferenceConfig,
    *,
    memory: GpuMemoryBudget | None = None,
    on_build: Callable[[BuildProgress], None] | None = None,
) -> Callable[[Rung], WorkerHost]:
    """
    Return the host factory that RuntimeChain wants, with a process for each engine.

    It raises RuntimeUnavailableError for a strategy that this host lacks, and starts no process for it.

    :param memory: shared with the engines of other chains; None for ``gpu_memory_budget_bytes`` of its own.
    :param on_build: told how far the building of an engine is.
    """
    generations = iter(range(1, 1 << 62))
    budget = memory or GpuMemoryBudget(config.gpu_memory_budget_bytes)

    def make(rung: Rung) -> WorkerHost:
        require_strategy(rung.strategy, config)
        return WorkerHost(rung, bundle, config, memory=budget, generation=next(generations), on_build=on_build)

    return make


def _file_bytes(path: Path) -> int:
    # One that is gone is the loader's to report.
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def worker_environment(environ: Mapping[str, str], providers: ProviderSet) -> dict[str, str]:
    """
    Return what a worker inherits: what vendor libraries and Python read, nothing of ROS.

    The CPU rung sees no GPU: a broken driver must not reach the last one that flies.
    """
    kept = {
        name: value
        for name, value in environ.items()
        if name in _KEPT_VARIABLES or name.startswith(_KEPT_PREFIXES)
    }
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    kept['PYTHONPATH'] = os.pathsep.join(filter(None, [package, kept.get('PYTHONPATH', '')]))
    if providers is ProviderSet.CPU:
        kept['CUDA_VISIBLE_DEVICES'] = ''
    return kept


def _forward_log(descriptor: int, name: str) -> None:
    """Log what a worker writes, its own records with their level and vendors' lines as warnings."""
    with open(descriptor, encoding='utf-8', errors='replace') as lines:
        for line in lines:
            text, level = line.rstrip(), logging.WARNING
            if text.startswith(LOG_MARK):
                number, _, text = text[1:].partition(' ')
                level = int(number) if number.isdigit() else level
            if text:
                _log.log(level, '%s: %s', name, text)


def _spec(value: Any) -> TensorSpec:
    name, dtype, shape = value
    axes = tuple(None if axis is None else int(axis) for axis in shape)
    return TensorSpec(plain_text(name), np.dtype(str(dtype)).name, axes)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        # Of the real-time signals, only the first and the last have names.
        return f'signal {number}'


def _readable(descriptor: int, timeout_s: float = 0.0) -> bool:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(timeout_s * 1e3))
