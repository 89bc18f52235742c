"""A chain over stand-ins of worker processes, which die, are late and hang when the test says so."""

from __future__ import annotations

import threading
import time

import numpy as np

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import (
    InferenceError,
)
from gps_denied_c7.failover.chain import RuntimeChain
from gps_denied_c7.failover.loader import EngineLoader
from gps_denied_c7.failover.memory_budget import GpuMemoryBudget
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.compare import AllClose
from gps_denied_c7.runtimes.protocol import EngineFacts, ProviderSet
from gps_denied_c7.tensors import TensorSpec

SPEC = TensorSpec('x', 'float32', (1, 2))
GPU = Rung('tensorrt', ProviderSet.GPU)
OTHER_GPU = Rung('pytorch_fp16', ProviderSet.GPU)
LAST_GPU = Rung('onnx_trt_ep', ProviderSet.GPU)
CPU = Rung('onnx_trt_ep', ProviderSet.CPU)


class ScriptedWorker:
    """Stand in for a worker process, so that its deaths and delays happen when the test says; time stands still."""

    inputs = outputs = (SPEC,)
    request_arrays = {}
    patience = 0
    before = np.zeros((1, 2), np.float32)

    ran_ns = (0, 0)

    def __init__(self, rung, bench):
        self.rung, self.bench = rung, bench
        self.alive = False
        self.killable = True
        self.act = 'answer'
        self.request = self.claim = None
        self.released = self.gone = self.stopped = False
        self.silent_since = None

    def load(self):
        size = self.bench.sizes.get(self.rung)
        if size is not None:
            self.claim = self.bench.memory.claim(self.rung.name, key=(id(self.bench), self.rung))
        self.bench.before_load(self.rung)
        self.alive = True
        self.bench.workers.append(self)
        if size is not None:
            self.claim.settle(size)
        return EngineFacts(self.rung.name, ('x',), self.rung is CPU, 0, (), 0.0, size)

    def begin(self, inputs):
        assert self.request is None, 'one request at a time'
        if not self.alive:
            raise InferenceError('the worker is dead.')
        self.request = {name: array.copy() for name, array in inputs.items()}

    def poll(self, timeout_s):
        if not self.alive:
            self.request = None
            raise InferenceError('the worker has died.')
        if self.request is None:
            return None
        if self.act == 'die':
            self.alive, self.request = False, None
            raise InferenceError('the worker has died.')
        if self.act == 'late' or self.stopped:
            self.bench.now_ns += int((timeout_s or 0) * 1e9)
            time.sleep(0.0001)
            return None
        if self.act == 'slow' and self.patience > 0:
            self.patience -= 1
            self.bench.now_ns += int((timeout_s or 0) * 1e9)
            return None
        request, self.request = self.request, None
        if self.act == 'fail':
            raise InferenceError('the engine failed.')
        outputs = {'x': request['x'] + (self.act == 'disagree')}
        if self.act == 'zeros':
            outputs = {'x': np.zeros_like(request['x'])}
        if self.act == 'stale':
            outputs, self.before = {'x': self.before}, request['x']
        self.ran_ns = id(self), self.ran_ns[1] + 1
        self.bench.given.append((outputs, self.ran_ns))
        return outputs

    def responds(self, patience_s):
        assert self.alive and self.request is None
        if not self.stopped:
            self.silent_since = None
        elif self.silent_since is None:
            self.silent_since = self.bench.now_ns
        return not self.stopped or self.bench.now_ns - self.silent_since <= patience_s * 1e9

    def kill(self):
        self.alive = self.alive and not self.killable

    def release(self):
        self.released = True
        self.join(0.0)

    def join(self, timeout_s):
        if self.released and self.killable and not self.gone:
            self.alive, self.gone = False, True
            if self in self.bench.workers:
                self.bench.workers.remove(self)
            if self.claim is not None:
                self.claim.release()
        return self.gone or not self.released


class Bench:
    """
    A chain over scripted workers, with its clock, and everything it told.

    :param memory: the budget that engines hold a part of, of the size that ``sizes`` gives their rung.
    """

    worker_type, rules = ScriptedWorker, (AllClose('x', 0, 0),)

    def __init__(self, *rungs, memory=None, sizes=None, **config):
        self.memory, self.sizes = memory or GpuMemoryBudget(1000), sizes or {}
        self.records, self.workers, self.given, self.now_ns = [], [], [], 0
        self.load_faults = {}
        self.loads_may_end = threading.Event()
        self.loads_may_end.set()
        self.bundle = ModelBundle(
            name='net', root='/', weights_digest='sha256:' + '0' * 64, inputs=(SPEC,), outputs=(SPEC,),
            rules=self.rules,
        )  # fmt: skip
        self.chain = RuntimeChain(
            self.bundle,
            C7InferenceConfig(**config),
            lambda rung: self.worker_type(rung, self),
            emit=lambda kind, **payload: self.records.append((kind, payload)),
            monotonic_ns=lambda: self.now_ns,
            rungs=rungs,
            make_loader=self.make_loader,
        )

    def make_loader(self, *args, **kwargs):
        return EngineLoader(*args, **kwargs)

    def held(self):
        """Return the engines that are loaded and not being ended."""
        fleet = self.chain.snapshot()
        return [engine for engine in (fleet.serving, fleet.standby, fleet.shadow, *fleet.late) if engine is not None]

    def before_load(self, rung):
        if threading.current_thread() is not threading.main_thread():
            assert self.loads_may_end.wait(30)
        if (fault := self.load_faults.get(rung)) is not None:
            raise fault

    def settle(self):
        """Let every load that has been ordered end, and the chain see it."""
        deadline = time.monotonic() + 30
        self.chain.maintain()
        while loads := self.chain.snapshot().loading:
            assert time.monotonic() < deadline
            loads[0].done.wait(0.05)
            self.chain.maintain()

    def ready(self):
        self.chain.load()
        self.settle()
        return self

    def serving(self):
        return self.chain.snapshot().serving.host

    def standby(self):
        return self.chain.snapshot().standby.host

    def ask(self, value=1.0):
        try:
            answer = self.chain.infer({'x': np.full((1, 2), value, np.float32)})
            assert (answer.outputs['x'] == value).all(), 'the answer must be that of its own frame'
            (ran_ns,) = [ran_ns for outputs, ran_ns in self.given if outputs is answer.outputs]
            assert answer.ran_ns == ran_ns, 'it tells of the run that made it'
            return answer
        finally:
            self.chain.maintain()

    def switches(self):
        return [payload for kind, payload in self.records if kind == 'c7.runtime_switched']
