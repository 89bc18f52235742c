"""An engine in a worker process, seen from the node: start it, ask it, notice its death, end it (F-1, F-4)."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import EngineDeserializeError, InferenceError, ModelBundleError, WorkerDiedError
from gps_denied_c7.failover.memory_budget import GpuMemoryBudget, GpuMemoryClaim
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.external_data import find_external
from gps_denied_c7.runtimes.protocol import BuildProgress, EngineFacts
from gps_denied_c7.runtimes.registry import require_strategy
from gps_denied_c7.stalling import read_or_give_up
from gps_denied_c7.tensors import TensorSpec, check_inputs, check_outputs
from gps_denied_c7.worker.messages import MessageError
from gps_denied_c7.worker.process import WorkerProcess
from gps_denied_c7.worker.protocol import (
    WORKER_PROTOCOL,
    Answer,
    AnswerNext,
    Failed,
    Infer,
    InferNext,
    Load,
    Loaded,
    LoadFailed,
    Loading,
    MapAnswers,
    MapRequests,
    NeedRoom,
    Ping,
    Pong,
    Progress,
    RefuseRoom,
)
from gps_denied_c7.worker.server import WorkerTask
from gps_denied_c7.worker.shared_memory import SharedTensors, TensorLayout
from gps_denied_c7.worker.spare import SpareWorker

__all__ = ['WorkerHost', 'worker_hosts']

_LARGEST_ANSWER_BYTES = 1 << 30
# A builder may measure one tactic, or time one layer, for minutes and show nothing meanwhile.
_LONGEST_STEP_S = 600.0
# A spare worker that does nothing with its task for so long is stopped, or starved.
_SPARE_S = 0.25
_SIGN_EVERY_S = 0.25
# A request has one answer, and another message where the answer needs a larger segment.
_MOST_MESSAGES = 8
_log = logging.getLogger(__name__)


class WorkerHost:
    """
    Run a rung's engine in a process of its own.

    Whatever that process does, this one gets an error instead of an answer. For one thread, except
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
        self._requests: SharedTensors | None = None
        self._answers: SharedTensors | None = None
        self._inputs: dict[str, NDArray] = {}
        self._layout_sent = False
        self._outputs: dict[str, NDArray] = {}
        self._number = 0
        self._asked_at: float | None = None
        self._heard_at = 0.0
        self._messages = 0
        self._releasing = threading.Lock()
        self._released = self._killed = False
        self._running = False
        self._ran_ns = (0, 0)
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
        return self._process.pid if self._process is not None and not self._released else None

    @property
    def alive(self) -> bool:
        """Whether the worker runs; never waits."""
        return self._process is not None and self._process.alive

    @property
    def running(self) -> bool:
        """Whether a request was begun whose answer has not been taken."""
        return self._running

    @property
    def request_arrays(self) -> Mapping[str, NDArray]:
        """The arrays that the worker reads its inputs from, by name; to be filled in place while none is running."""
        return self._inputs

    @property
    def ran_ns(self) -> tuple[int, int]:
        """When the engine began and ended the run of the last answer, by the steady clock, as its worker tells."""
        return self._ran_ns

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
        self._input_specs, self._output_specs = loaded.inputs, loaded.outputs
        if self._claim is not None:
            self._claim.settle(loaded.facts.gpu_memory_bytes)
        if self._spare is not None:
            self._spare.prepare()
        return loaded.facts

    def begin(self, inputs: Mapping[str, NDArray]) -> None:
        """
        Hand one request over; :meth:`poll` gives its answer.

        :param inputs: arrays by canonical name; copied unless they are :attr:`request_arrays` themselves.
        :raises InferenceError: inputs that do not fit, a request still running, or a dead worker.
        """
        process = self._loaded()
        if self._running:
            raise InferenceError(f'{process.name} still runs the request before.')
        # Its own arrays, filled in place, are what they were when they were laid out.
        if self._inputs.keys() != inputs.keys() or any(inputs[name] is not own for name, own in self._inputs.items()):
            self._copy(inputs)
        # A sign of life that is still to come is passed over with whatever else is no answer.
        self._number, self._asked_at = self._number + 1, None
        if self._layout_sent:
            process.send(InferNext(self._number), block=False)
        else:
            process.send(Infer(self._number, TensorLayout.of(self._inputs)), block=False)
            self._layout_sent = True
        self._running, self._messages = True, 0

    def poll(self, timeout_s: float | None) -> dict[str, NDArray] | None:
        """
        Return the answer to the request that was begun, None where there is none within ``timeout_s``.

        :return: read-only views of the worker's segment, valid until the next :meth:`begin`.
        :raises InferenceError: the engine failed, the worker died, or what it answered does not fit.
        """
        process = self._loaded()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                message = process.receive(deadline)
            except WorkerDiedError:
                self._running = False
                raise
            if message is None:
                return None
            self._messages += 1
            if self._messages > _MOST_MESSAGES:
                # Each is read whatever the deadline says.
                raise InferenceError(f'{self._name()} sends more than a request needs.')
            if isinstance(message, NeedRoom):
                self._grow(message.bytes)
                continue
            if not isinstance(message, (AnswerNext, Answer, Failed)) or message.number != self._number:
                continue
            self._running = False
            if isinstance(message, AnswerNext):
                self._ran_ns = message.began_ns, message.ended_ns
            else:
                self._take_layout(message)
            if not self._outputs:
                raise InferenceError(f'{self._name()} answers without having said where.')
            return dict(self._outputs)

    def _take_layout(self, message: Answer | Failed) -> None:
        """Find the outputs of this answer and of the next ones."""
        # Where this layout is refused, the one before is not that of later answers either.
        self._outputs, self._layout_sent = {}, False
        if isinstance(message, Failed):
            raise message.error.error()
        if self._answers is None:
            raise InferenceError(f'{self._name()} answers without a segment.')
        outputs = self._answers.arrays(message.layout)
        self._output_specs = tuple(
            dataclasses.replace(spec, shape=None) if spec.name in message.unsized else spec
            for spec in self._output_specs
        )
        # The worker has checked each value; what decides about memory and shapes is checked here again.
        check_outputs(self._output_specs, outputs)
        self._outputs, self._layout_sent, self._ran_ns = outputs, True, message.ran_ns

    def infer(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Run one request and wait for it, however long it takes; as :meth:`begin` and :meth:`poll`."""
        self.begin(inputs)
        outputs = self.poll(None)
        assert outputs is not None
        return outputs

    def responds(self, patience_s: float) -> bool:
        """
        Ask the worker for a sign of life now and then, while it has no request; never waits.

        One that is stopped, frozen or swapped out looks alive until it is asked.

        :return: False where it has given none for ``patience_s``.
        """
        process, now = self._loaded(), time.monotonic()
        try:
            if self._asked_at is None:
                if now - self._heard_at >= _SIGN_EVERY_S:
                    process.send(Ping(), block=False)
                    self._asked_at = now
                return True
            if isinstance(process.receive(now), Pong):
                self._asked_at, self._heard_at = None, now
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
            self._inputs, self._outputs, self._layout_sent, self._running = {}, {}, False, False
            for segment in (self._requests, self._answers):
                if segment is not None:
                    segment.close()
            self._requests = self._answers = None

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
                # It has died, or says what cannot be read.
                if self._killed or self._released:
                    raise
                _log.warning('%s', error)
            _log.warning('%s did not take its task; another one is started.', process.name)
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
        """Return what a worker says of the engine that it was told to load, once it has."""
        limit_s = self._task.config.load_timeout_s
        deadline = time.monotonic() + limit_s
        step: tuple[str, float | None] | None = None
        while process.await_ready(deadline) and (message := process.receive(deadline)) is not None:
            if isinstance(message, Loaded):
                return message
            if isinstance(message, LoadFailed):
                raise message.error.error()
            if isinstance(message, Progress):
                now = (message.progress.phase, message.progress.fraction)
                if self._task.config.build_on_configure and now != step:
                    # Only a new step counts: a worker reports progress also while its builder hangs.
                    step, limit_s = now, max(limit_s, _LONGEST_STEP_S)
                    deadline = time.monotonic() + limit_s
                if self._on_build is not None:
                    self._on_build(message.progress)
            elif not isinstance(message, Loading):
                raise MessageError(f'{self._name()} sent {type(message).__name__} before it has loaded an engine.')
        self.kill()
        stood = f' Building an engine, it had come to: {step[0]}.' if step is not None else ''
        raise EngineDeserializeError(
            f'{self._name()} did not load, or get on with it, within {limit_s:.0f} s and was killed.{stood}',
            remedy='Raise load_timeout_s, or build the engine before the flight (c7_engine build).',
        )

    def _loaded(self) -> WorkerProcess:
        if self._process is None or self._released:
            raise InferenceError('no engine is loaded.')
        return self._process

    def _name(self) -> str:
        return self._process.name if self._process is not None else f'worker {self._generation}'

    # --- what goes through it ---------------------------------------------------------------------

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
            self._requests = self._replace(self._requests, MapRequests(), layout.size)
        self._inputs = self._requests.arrays(layout)
        self._layout_sent = False

    def _grow(self, size: int) -> None:
        # Views of the segment before are no answer to anything that comes.
        self._outputs = {}
        try:
            if size > _LARGEST_ANSWER_BYTES:
                raise InferenceError(f'an answer of {size} bytes is larger than {_LARGEST_ANSWER_BYTES}.')
            self._answers = self._replace(self._answers, MapAnswers(), size)
        except WorkerDiedError:
            raise
        except InferenceError as error:
            # The worker waits for the segment; without one, it fails this request alone.
            self._loaded().send(RefuseRoom(error.message), block=False)

    def _replace(
        self, before: SharedTensors | None, message: MapRequests | MapAnswers, size: int
    ) -> SharedTensors:
        process = self._loaded()
        try:
            segment = SharedTensors.create(size, writable=isinstance(message, MapRequests))
        except OSError as error:
            raise InferenceError(f'no memory for a segment of {size} bytes: {error}.') from error
        if before is not None:
            before.close()
        try:
            # A worker that reads nothing must not hold up this process.
            process.send(message, [segment.descriptor], block=False)
        except InferenceError:
            segment.close()
            raise
        return segment


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
