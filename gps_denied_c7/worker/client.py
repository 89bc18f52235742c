"""An engine in a worker process, seen from the node: start it, ask it, notice its death, end it (F-1, F-4)."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from numpy.typing import NDArray

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import InferenceError, ModelBundleError, WorkerDiedError
from gps_denied_c7.failover.memory_budget import GpuMemoryBudget, GpuMemoryClaim
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.external_data import find_external
from gps_denied_c7.runtimes.protocol import BuildProgress, EngineFacts
from gps_denied_c7.runtimes.registry import require_strategy
from gps_denied_c7.stalled_reads import read_or_give_up
from gps_denied_c7.tensors import TensorSpec
from gps_denied_c7.worker.build_timeout import LoadTimeout
from gps_denied_c7.worker.channel import MessageError
from gps_denied_c7.worker.exchange import Exchange
from gps_denied_c7.worker.process import WorkerProcess
from gps_denied_c7.worker.protocol import (
    WORKER_PROTOCOL,
    Load,
    Loaded,
    LoadFailed,
    Loading,
    Ping,
    Pong,
    Progress,
)
from gps_denied_c7.worker.server import WorkerTask
from gps_denied_c7.worker.spare import SpareWorker

__all__ = ['WorkerHost', 'worker_hosts']

# A spare worker that does not confirm its task within this time is stopped, or gets no CPU time.
_SPARE_S = 0.25
_SIGN_EVERY_S = 0.25
_log = logging.getLogger(__name__)


class WorkerHost:
    """
    Run a rung's engine in a process of its own.

    If that process crashes or hangs, this one gets an error. For one thread, except
    :meth:`kill`.

    :param memory: the budget that an engine on a GPU claims its memory from; None for the configuration's own.
    :param spare: a process to take instead of a new one where it is ready and has the vendor's library; None for none.
    :param generation: names the worker in logs; counts the workers of a chain.
    :param on_build: called with the progress of a build.
    """

    def __init__(
        self,
        rung: Rung,
        bundle: ModelBundle,
        config: C7InferenceConfig,
        *,
        memory: GpuMemoryBudget | None = None,
        spare: SpareWorker | None = None,
        generation: int = 0,
        on_build: Callable[[BuildProgress], None] | None = None,
    ) -> None:
        self._task = WorkerTask(bundle, config, rung)
        self._memory = memory or GpuMemoryBudget(config.gpu_memory_budget_bytes)
        self._spare = spare
        self._claim: GpuMemoryClaim | None = None
        self._generation = generation
        self._on_build = on_build
        self._process: WorkerProcess | None = None
        self._exchange: Exchange | None = None
        self._asked_at: float | None = None
        self._answered_at = 0.0
        self._releasing = threading.Lock()
        self._released = self._killed = False

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Canonical inputs of the loaded engine, empty before."""
        return self._exchange.inputs if self._exchange is not None else ()

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Canonical outputs of the loaded engine, empty before."""
        return self._exchange.outputs if self._exchange is not None else ()

    @property
    def pid(self) -> int | None:
        """Process id of the worker, None where none runs."""
        return self._process.pid if self._process is not None and not self._released else None

    @property
    def alive(self) -> bool:
        """Whether the worker runs; never waits."""
        return self._process is not None and self._process.alive

    @property
    def request_arrays(self) -> Mapping[str, NDArray]:
        """The arrays that the worker reads its inputs from, by name; to be filled in place while none is running."""
        return self._exchange.request_arrays if self._exchange is not None else {}

    @property
    def ran_ns(self) -> tuple[int, int]:
        """When the engine began and ended the run of the last answer, by the steady clock, as its worker reports."""
        return self._exchange.ran_ns if self._exchange is not None else (0, 0)

    def load(self) -> EngineFacts:
        """
        Start the worker and have it load its engine.

        :raises GpuMemoryError: it does not fit beside the other engines; no process has been started, unless the
            engine turned out to be larger than was known.
        :raises EngineDeserializeError: it died, or did not load within ``load_timeout_s``.
        :raises C7Error: whatever the worker's runtime refused the engine with.
        """
        process = self._start(self._claim_memory())
        loaded = self._wait_for_engine(process)
        self._exchange = Exchange(process, loaded.inputs, loaded.outputs)
        if self._claim is not None:
            self._claim.settle(loaded.facts.gpu_memory_bytes)
        if self._spare is not None:
            self._spare.prepare()
        return loaded.facts

    def begin(self, inputs: Mapping[str, NDArray]) -> None:
        """
        Send one request; :meth:`poll` returns its answer.

        :param inputs: arrays by canonical name; copied unless they are :attr:`request_arrays` themselves.
        :raises InferenceError: inputs that do not fit, a request still running, or a dead worker.
        """
        self._loaded().begin(inputs)
        # A sign of life that is still to come is ignored.
        self._asked_at = None

    def poll(self, timeout_s: float | None) -> dict[str, NDArray] | None:
        """
        Return the answer to the request that was begun, None where there is none within ``timeout_s``.

        :return: read-only views of the worker's segment, valid until the next :meth:`begin`.
        :raises InferenceError: the engine failed, the worker died, or what it answered does not fit.
        """
        return self._loaded().poll(timeout_s)

    def infer(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Run one request and wait for it, however long it takes; as :meth:`begin` and :meth:`poll`."""
        self.begin(inputs)
        outputs = self.poll(None)
        assert outputs is not None
        return outputs

    def responds(self, patience_s: float) -> bool:
        """
        Ask the worker for a sign of life at intervals, while it has no request; never waits.

        A worker that is stopped, frozen or swapped out seems to run until it is asked.

        :return: False where it has given none for ``patience_s``.
        """
        self._loaded()
        process, now = self._process, time.monotonic()
        assert process is not None
        try:
            if self._asked_at is None:
                if now - self._answered_at >= _SIGN_EVERY_S:
                    process.send(Ping(), block=False)
                    self._asked_at = now
                return True
            if isinstance(process.receive(now), Pong):
                self._asked_at, self._answered_at = None, now
        except InferenceError as error:
            _log.error('%s', error)
            return False
        return self._asked_at is None or now - self._asked_at <= patience_s

    def kill(self) -> None:
        """Begin to end the worker, without waiting for it, and start no other; from any thread."""
        self._killed = True
        if (process := self._process) is not None:
            process.kill()

    def release(self) -> None:
        """
        End the worker and give back its memory and descriptors; safe to repeat, from any thread.

        Its process is waited for by :meth:`join` alone, and what it claims of the GPU's memory is held until then.
        """
        with self._releasing:
            self._released = True
            claim, self._claim = self._claim, None
            if self._process is None:
                if claim is not None:
                    claim.release()
            elif claim is None:
                self._process.release()
            else:
                claim.leave()
                self._process.release(then=claim.release)
            if self._exchange is not None:
                self._exchange.close()

    def join(self, timeout_s: float) -> bool:
        """Wait until the released worker's process is gone; False where it is not within ``timeout_s``."""
        return self._process is None or self._process.join(timeout_s)

    # --- the process ------------------------------------------------------------------------------

    def _claim_memory(self) -> WorkerTask:
        """Return the task with the memory that the engine may take, where it is one on a GPU."""
        task = self._task
        if not task.rung.on_gpu:
            return task
        artefacts = task.bundle.artefacts_for(task.rung.strategy)
        self._claim = self._memory.claim(
            task.rung.name,
            key=(task.bundle.weights_digest, task.rung),
            file_bytes=read_or_give_up(
                f'the artefacts of {task.bundle.root}',
                lambda: _file_bytes(artefacts),
                limit_s=task.config.load_timeout_s,
            ),
        )
        config = dataclasses.replace(task.config, gpu_memory_budget_bytes=self._claim.limit_bytes)
        return dataclasses.replace(task, config=config)

    def _start(self, task: WorkerTask) -> WorkerProcess:
        """Have a process load the engine: the spare one where it is for this strategy and takes the task."""
        spare = self._spare
        if spare is not None and spare.strategy == task.rung.strategy and (process := spare.take()) is not None:
            self._adopt(process)
            try:
                self._hand_over(process, task)
                if isinstance(process.receive(time.monotonic() + _SPARE_S), Loading):
                    return process
            except InferenceError as error:
                # It has died, or sent an invalid message.
                if self._killed or self._released:
                    raise
                _log.warning('%s', error)
            _log.warning('%s did not confirm its task; another worker is started.', process.name)
            process.release()
        process = WorkerProcess.start(f'worker {self._generation}', WORKER_PROTOCOL)
        self._adopt(process)
        self._hand_over(process, task)
        return process

    def _adopt(self, process: WorkerProcess) -> None:
        process.name = f'worker {self._generation} ({self._task.rung.name}, pid {process.pid})'
        with self._releasing:
            self._process = process
            if self._released or self._killed:
                process.release()
                raise WorkerDiedError(f'{process.name} was ended while it was being started.')

    def _hand_over(self, process: WorkerProcess, task: WorkerTask) -> None:
        descriptor = os.memfd_create('c7-task', os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(descriptor), 'wb') as file:
                pickle.dump(task, file)
            process.send(Load(), [descriptor])
        finally:
            os.close(descriptor)

    def _wait_for_engine(self, process: WorkerProcess) -> Loaded:
        """Return the worker's report of the engine that it has loaded."""
        config = self._task.config
        timeout = LoadTimeout(config.load_timeout_s, builds=config.build_on_configure)
        while process.await_ready(timeout.deadline) and (message := process.receive(timeout.deadline)) is not None:
            if isinstance(message, Loaded):
                return message
            if isinstance(message, LoadFailed):
                raise message.error.error()
            if isinstance(message, Progress):
                timeout.note(message.progress)
                if self._on_build is not None:
                    self._on_build(message.progress)
            elif not isinstance(message, Loading):
                raise MessageError(f'{self._name()} sent {type(message).__name__} before it has loaded an engine.')
            if time.monotonic() > timeout.deadline:
                break
        self.kill()
        raise timeout.error(self._name())

    def _loaded(self) -> Exchange:
        if self._exchange is None or self._released:
            raise InferenceError('no engine is loaded.')
        return self._exchange

    def _name(self) -> str:
        return self._process.name if self._process is not None else f'worker {self._generation}'


def worker_hosts(
    bundle: ModelBundle,
    config: C7InferenceConfig,
    *,
    memory: GpuMemoryBudget | None = None,
    spare: SpareWorker | None = None,
    on_build: Callable[[BuildProgress], None] | None = None,
) -> Callable[[Rung], WorkerHost]:
    """
    Return the host factory that RuntimeChain wants, with a process for each engine.

    It raises RuntimeUnavailableError for a strategy that this host lacks, and starts no process for it.

    :param memory: shared with the engines of other chains; None for ``gpu_memory_budget_bytes`` of its own.
    :param spare: shared likewise; prepared again with each engine that is loaded; None for none.
    :param on_build: called with the progress of a build.
    """
    generations = iter(range(1, 1 << 62))
    budget = memory or GpuMemoryBudget(config.gpu_memory_budget_bytes)

    def make(rung: Rung) -> WorkerHost:
        require_strategy(rung.strategy, config)
        return WorkerHost(
            rung, bundle, config, memory=budget, spare=spare, generation=next(generations), on_build=on_build
        )

    return make


def _file_bytes(artefacts: Sequence[Artefact]) -> int:
    """Return the size of the smallest artefact with its weights; 0 where one is gone, which its loader reports."""
    sizes = []
    for artefact in artefacts:
        try:
            files = [find_external(artefact.path, location) for location in artefact.external_data]
            sizes.append(sum(file.stat().st_size for file in (artefact.path, *files)))
        except (OSError, ModelBundleError):
            return 0
    return min(sizes, default=0)
