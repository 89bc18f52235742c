"""
Two implementations of the runtime chain, on the same scripted engines and the same clock, compared step by step.

A history is drawn from a seed before it begins, so that nothing either chain does changes it. All that happens in a
:class:`World` is written down: calls of engines, records, states, answers and errors. Time goes on only where an
engine, a load or the history takes some; loads in the background and events of the history come due then.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import C7Error, EngineDeserializeError, InferenceError, WorkerDiedError
from gps_denied_c7.failover import loader as loader_module
from gps_denied_c7.failover import self_test
from gps_denied_c7.failover.loader import EngineLoad, EngineLoader
from gps_denied_c7.failover.memory_budget import GpuMemoryBudget
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.compare import AllClose
from gps_denied_c7.runtimes.protocol import EngineFacts
from gps_denied_c7.tensors import TensorSpec
from support.histories import ACTS, FAULTS, LATE, POISON, POISONED, draw_history

SPEC = TensorSpec('x', 'float32', (1, 2))


class World:
    """
    One chain, or two of which one serves, its engines, its clock, and what happened.

    :param build: RuntimeChain, or what takes the same arguments.
    """

    def __init__(self, build, setting):
        self.build, self.setting = build, setting
        self.now_ns, self.events, self.order = 0, [], 0
        self.trace, self.hosts, self.made = [], [], 0
        self.broken, self.seen, self.loaders = [], None, []
        self.faults, self.load_s, self.takes_s, self.proof_s, self.no_threads = {}, {}, {}, {}, 0
        self.fingerprint, self.cancelled_finish = setting['fingerprint'], False
        self.memory = GpuMemoryBudget(1000)
        self.loading, self.releasing, self.locks = None, None, []
        self.bundle = ModelBundle(
            name='net', root='/', weights_digest='sha256:' + '0' * 64,
            inputs=() if setting['bare'] else (SPEC,), outputs=() if setting['bare'] else (SPEC,),
            rules=(AllClose('x', 0.0, 0.25),) if setting['rules'] and not setting['bare'] else (),
        )  # fmt: skip
        self.chain = self.make_chain()
        self.beside = None

    def make_chain(self):
        world = self

        class Loader(SteppedLoader):
            pass

        Loader.world = world
        with current(world):
            chain = self.build(
                self.bundle, C7InferenceConfig(**self.setting['config']), lambda rung: self.make_host(rung),
                emit=lambda kind, **payload: self.note('record', kind, tuple(payload.items())),
                on_change=self.see_status,
                monotonic_ns=lambda: self.now_ns, rungs=self.setting['rungs'], make_loader=Loader,
            )  # fmt: skip
        return chain

    def see_status(self, status):
        self.seen = status

    def make_host(self, rung):
        host = Host(self, rung)
        self.note('host', host.number, rung.name)
        return host

    def note(self, *what):
        self.trace.append((self.now_ns, *what))

    # --- time -------------------------------------------------------------------------------------

    def at(self, delay_s, call):
        self.order += 1
        heapq.heappush(self.events, (self.now_ns + int(delay_s * 1e9), self.order, call))

    def advance(self, seconds):
        self.advance_to(self.now_ns + int(seconds * 1e9))

    def advance_to(self, end_ns, until=lambda: False):
        while self.events and self.events[0][0] <= end_ns and not until():
            when_ns, _, call = heapq.heappop(self.events)
            self.now_ns = max(self.now_ns, when_ns)
            call()
        if not until():
            self.now_ns = max(self.now_ns, end_ns)

    # --- steps of a history -----------------------------------------------------------------------

    def step(self, name, *args):
        with current(self):
            getattr(self, f'do_{name}')(*args)
            for chain in filter(None, (self.chain, self.beside)):
                self.note('after', chain.status(), self.seen, chain.inputs, chain.outputs, *chain.request_arrays())
        # A transaction writes its record at its end: how calls and records are mixed is not compared.
        trace, self.trace = self.trace, []
        return sorted(trace, key=lambda each: each[1] == 'record')

    def call(self, what, *args, **kwargs):
        try:
            outcome = what(*args, **kwargs)
        except Exception as error:
            outcome = of_error(error)
        if self.releasing is not None:
            self.releasing.join(30)
            assert not self.releasing.is_alive()
            self.note('released', self.releasing.outcome)
            self.releasing = None
        return outcome

    def do_infer(self, value, in_place):
        request = {'x': np.full((1, 2), value, np.float32)}
        arrays = self.chain.request_arrays()
        if in_place and arrays:
            arrays['x'][...] = value
            request = dict(arrays)
        outcome = self.call(self.chain.infer, request)
        if hasattr(outcome, 'outputs'):
            outputs = {name: array.tolist() for name, array in outcome.outputs.items()}
            outcome = (*outcome.maker, outcome.ran_ns, outputs)
        self.note('answer', outcome)

    def do_maintain(self):
        self.note('maintained', self.call(self.chain.maintain))
        if self.beside is not None:
            self.note('maintained beside', self.call(self.beside.maintain))

    def do_frames(self, values, in_place, pause_s):
        for value in values:
            self.do_infer(value, in_place)
            self.do_maintain()
            self.advance(pause_s)

    def do_prove(self):
        self.note('proved', self.call(self.chain.prove))

    def do_load(self):
        self.note('loaded', self.call(self.chain.load))

    def do_release(self):
        self.note('released', self.call(self.chain.release))

    def do_load_anew(self):
        self.do_release()
        self.do_load()

    def do_make_room(self, lack_bytes):
        self.note('room', self.call(self.chain.make_room, lack_bytes))

    def do_load_beside(self):
        if self.beside is None:
            self.beside = self.make_chain()
            self.note('loaded beside', self.call(self.beside.load, beside=self.chain))

    def do_shadow(self, value):
        chain = self.beside or self.chain
        outcome = self.call(chain.shadow, {'x': np.full((1, 2), value, np.float32)})
        if isinstance(outcome, dict):
            outcome = {name: array.tolist() for name, array in outcome.items()}
        self.note('shadowed', outcome)

    def do_hand_over(self):
        if self.beside is not None:
            if self.beside.status().active is not None:
                self.chain, self.beside = self.beside, self.chain
            self.note('freed', self.call(self.beside.release))
            self.beside = None

    def do_wait(self, seconds):
        self.advance(seconds)

    def do_script(self, index, act):
        if (host := self.pick(index)) is not None:
            host.act, host.patience = act, 2

    def do_script_all(self, act):
        for host in self.living():
            host.act, host.patience = act, 2

    def do_script_rung(self, rung, act):
        """Also of engines to be loaded."""
        for host in self.living():
            if host.rung == rung:
                host.act, host.patience = act, 2

    def do_poison(self, act, alike):
        """Ask for what no engine survives, or too few do, also none that is loaded for it."""
        self.faults = dict.fromkeys(self.setting['rungs'][not alike :], act)
        self.do_script_all(act)
        self.do_infer(POISON, False)
        self.faults = {}

    def do_crash(self, index):
        if (host := self.pick(index)) is not None:
            host.alive = False

    def do_stop(self, index):
        if (host := self.pick(index)) is not None:
            host.stopped = True

    def do_unkillable(self, index):
        if (host := self.pick(index)) is not None:
            host.act, host.killable = 'late', False

    def do_free_driver(self):
        for host in self.hosts:
            host.killable = True

    def do_fault(self, rung, fault):
        self.faults[rung] = fault

    def do_load_s(self, rung, seconds, takes_s, proof_s):
        self.load_s[rung], self.takes_s[rung], self.proof_s[rung] = seconds, takes_s, proof_s

    def do_files(self):
        """Have a file change; D3: what was refused before the first look at the files is dated by that look at once."""
        first, self.fingerprint = self.fingerprint is None, (self.fingerprint or 0) + 1
        for loader in self.loaders if first else ():
            for rung in self.setting['rungs']:
                loader.refused(rung)

    def do_threads(self, number):
        self.no_threads = number

    def do_finish_cancelled(self, finish):
        self.cancelled_finish = finish

    def do_later(self, delay_s, name, args):
        """Have another step come while an engine or a load takes its time."""
        self.at(delay_s, lambda: getattr(self, f'do_{name}')(*args))

    def do_release_meanwhile(self, patient):
        if self.releasing is None and any(lock.held for lock in self.locks[-1:]):
            self.releasing = Releasing(self.chain, patient)
            self.releasing.start()
            self.releasing.arrived.wait(30)

    def do_heal(self):
        self.faults.clear()
        self.load_s.clear()
        self.takes_s.clear()
        for host in self.hosts:
            host.act, host.killable, host.stopped = 'answer', True, False

    def living(self):
        return [host for host in self.hosts if host.loaded and not host.gone]

    def pick(self, index):
        living = self.living()
        return living[index % len(living)] if living else None


class Releasing(threading.Thread):
    """A release from another thread, which finds the chain busy."""

    def __init__(self, chain, patient):
        super().__init__(daemon=True)
        self.chain, self.patient = chain, patient
        self.tried, self.arrived, self.outcome = 0, threading.Event(), None

    def run(self):
        try:
            self.outcome = self.chain.release(1.0)
        except Exception as error:
            self.outcome = of_error(error)
        self.arrived.set()


class Lock:
    """The chain's lock: a release from another thread finds it taken once, and again where it is not patient."""

    def __init__(self):
        self.lock, self.depth = threading.RLock(), 0

    @property
    def held(self):
        return self.depth > 0

    def acquire(self, timeout=-1):
        thread = threading.current_thread()
        if isinstance(thread, Releasing):
            thread.tried += 1
            if thread.tried == 1 or not thread.patient:
                return False
            thread.arrived.set()
        self.lock.acquire()
        self.depth += 1
        return True

    def release(self):
        self.depth -= 1
        self.lock.release()

    __enter__ = acquire

    def __exit__(self, *error):
        self.release()


class Done:
    """Tell whether a load has ended; whoever waits has the clock go on."""

    def __init__(self, world, load):
        self.world, self.load, self.ended = world, load, False

    def is_set(self):
        return self.ended

    def set(self):
        self.ended = True

    def wait(self, timeout=None):
        world = self.world
        if self.load.cancelled:
            if not self.ended and not world.cancelled_finish:
                self.load.begin()
            return self.ended
        end_ns = self.load.due_ns if timeout is None else world.now_ns + int(timeout * 1e9)
        world.advance_to(end_ns, until=self.is_set)
        return self.ended


class SteppedLoad(EngineLoad):
    """A load whose end comes with the world's clock."""

    due_ns, begin = 0, None


class SteppedLoader(EngineLoader):
    """Load in the background by the world's clock."""

    world = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._files = self
        self.world.loaders.append(self)

    # What it asks of a FileWatch.
    def latest(self):
        return self.world.fingerprint

    @property
    def seen(self):
        return self.world.fingerprint

    def _add(self, rung):
        load = super()._add(rung)
        assert self.loads[-1] is load
        stepped = SteppedLoad(rung)
        stepped.done = Done(self.world, stepped)
        self.loads[-1] = stepped
        return stepped

    def _run_in_thread(self, load):
        world = self.world
        if world.no_threads:
            world.no_threads -= 1
            raise RuntimeError("can't start new thread")
        world.note('load', load.rung.name)
        started = []

        def begin():
            if not started:
                started.append(True)
                outer, world.loading = world.loading, load
                try:
                    self._run(load)
                finally:
                    world.loading = outer

        delay_s = world.load_s.get(load.rung, 0.0)
        load.begin, load.due_ns = begin, world.now_ns + int(delay_s * 1e9)
        if delay_s:
            world.at(delay_s, begin)
        else:
            begin()

    def load(self, load):
        outer, self.world.loading = self.world.loading, load
        try:
            return super().load(load)
        finally:
            self.world.loading = outer


class Host:
    """Stand in for a worker process, or for an engine in this process, that does what the history says."""

    inputs = outputs = (SPEC,)

    def __init__(self, world, rung):
        self.world, self.rung = world, rung
        world.made += 1
        self.number = world.made
        self.alive = self.loaded = False
        self.killable, self.act, self.patience = True, 'answer', 0
        self.request = self.claim = None
        self.released = self.gone = self.stopped = False
        self.silent_since, self.ran_ns = None, (0, 0)
        self.in_place = {'x': np.zeros((1, 2), np.float32)} if world.setting['in_place'] else {}
        self.load_of = world.loading
        fault = world.faults.get(rung)
        if fault == 'no host':
            raise EngineDeserializeError('its worker cannot be started.')

    @property
    def pid(self):
        if not self.world.setting['pids']:
            return None
        if self.stopped and self.alive:
            return stopped_process()
        return os.getpid() if self.alive else 2**22 + 5

    @property
    def request_arrays(self):
        return self.in_place

    def load(self):
        world, rung = self.world, self.rung
        world.note('loads', self.number)
        if (size := world.setting['sizes'].get(rung)) is not None and rung.on_gpu:
            self.claim = world.memory.claim(rung.name, key=rung)
        if not self.in_background():
            world.advance(world.takes_s.get(rung, 0.0))
        if self.in_background() and self.load_of.cancelled and not world.cancelled_finish:
            raise WorkerDiedError('it was killed.')
        fault = world.faults.get(rung)
        if fault in FAULTS:
            raise FAULTS[fault]()
        self.alive = self.loaded = True
        world.hosts.append(self)
        if fault in ACTS:
            self.act, self.patience = fault, 2
        if self.claim is not None:
            self.claim.settle(size)
        gpu = f'{rung.strategy}-gpu' if rung.on_gpu else 'CPUExecutionProvider'
        return EngineFacts(gpu, ('asked-first', gpu), not rung.on_gpu, 0, ('a note',), 0.0, size)

    def in_background(self):
        return isinstance(self.load_of, SteppedLoad) and self.load_of.begin is not None

    def begin(self, inputs):
        value = float(inputs['x'][0, 0])
        self.world.note('begin', self.number, value, self.alive)
        self.require_held()
        if self.request is not None:
            raise InferenceError('the worker still runs the request before.')
        if self.act == 'die on request':
            self.alive = False
        if not self.alive:
            raise WorkerDiedError('the worker is dead.')
        self.request = {'x': inputs['x'].copy()}
        if self.in_place:
            self.in_place['x'][...] = inputs['x']

    def poll(self, timeout_s):
        outcome = 'nothing'
        try:
            outputs = self.answer(timeout_s)
            if outputs is not None:
                outcome = outputs['x'].tolist()
            return outputs
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            self.world.note('poll', self.number, timeout_s, outcome)

    def require_held(self):
        if self.released:
            self.world.broken.append(f'engine {self.number} is asked after its release')

    def answer(self, timeout_s):
        self.require_held()
        world, act = self.world, self.act
        if not self.alive:
            self.request = None
            raise WorkerDiedError('the worker has died.')
        if self.request is None:
            return None
        value = float(self.request['x'][0, 0])
        if act.startswith('poisoned'):
            act = POISONED[act] if value == POISON else 'answer'
        if act == 'die':
            self.alive, self.request = False, None
            raise WorkerDiedError('the worker has died.')
        if act in ('late once', 'late death', 'late fault'):
            self.patience -= 1
            act = 'late' if self.patience >= 0 else LATE[act]
            if act == 'die':
                self.alive, self.request = False, None
                raise WorkerDiedError('the worker has died, late.')
        if act == 'late' or self.stopped:
            world.advance(timeout_s or 0)
            if self.alive:
                return None
            self.request = None
            raise WorkerDiedError('the worker has died meanwhile.')
        if act == 'slow' and self.patience > 0:
            self.patience -= 1
            world.advance(timeout_s or 0)
            return None
        world.advance(min(world.proof_s.get(self.rung, 0.0), timeout_s or 0))
        request, self.request = self.request, None
        if act == 'fail':
            raise InferenceError('the engine failed.')
        if act == 'raise':
            raise OSError('a driver call failed')
        self.ran_ns = (self.number, world.now_ns)
        return {'x': request['x'] + (act == 'disagree')}

    def responds(self, patience_s):
        self.world.note('responds', self.number)
        if self.world.setting['config']['isolation'] == 'none':
            return True
        if not self.stopped:
            self.silent_since = None
        elif self.silent_since is None:
            self.silent_since = self.world.now_ns
        return not self.stopped or self.world.now_ns - self.silent_since <= patience_s * 1e9

    def kill(self):
        self.world.note('kill', self.number)
        self.alive = self.alive and not self.killable

    def release(self):
        self.world.note('release', self.number)
        self.released = True
        self.join(0.0)

    def join(self, timeout_s):
        if self.released and self.killable and not self.gone:
            self.alive, self.gone = False, True
            if self in self.world.hosts:
                self.world.hosts.remove(self)
            if self.claim is not None:
                self.claim.release()
        return self.gone or not self.released


def of_error(error):
    """Return what a caller sees of an error."""
    if isinstance(error, OSError):
        return 'OSError', str(error)
    if not isinstance(error, C7Error):
        raise error
    causes = tuple((name, type(cause).__name__, str(cause)) for name, cause in getattr(error, 'causes', ()))
    cause = type(error.__cause__).__name__.lstrip('_')
    return type(error).__name__, str(error), error.remedy, causes, cause, error.lasting


# --- comparison -----------------------------------------------------------------------------------


def first_difference(build, other, seed, *, steps=60):
    """Return where two chains part in a history, with what each did in that step; None where they never do."""
    setting, history = draw_history(seed, steps)
    with stepped_time():
        world, other_world = World(build, setting), World(other, setting)
        for number, step in enumerate(history):
            found, wanted = world.step(*step), other_world.step(*step)
            assert not world.broken, world.broken
            if found != wanted:
                return Difference(seed, number, step, setting, history[:number], found, wanted)
    return None


class Difference:
    """Where two chains part."""

    def __init__(self, seed, number, step, setting, history, found, wanted):
        self.seed, self.number, self.step, self.setting, self.history = seed, number, step, setting, history
        self.found, self.wanted = found, wanted

    def __str__(self):
        lines = [f'history {self.seed}, step {self.number}: {self.step}', f'{self.setting}']
        lines += map(str, self.history[-12:])
        same = 0
        for one, other in zip(self.found, self.wanted, strict=False):
            if one != other:
                break
            same += 1
        lines += [f'  both: {each}' for each in self.found[max(0, same - 25) : same]]
        lines += [f'  found: {each}' for each in self.found[same : same + 6]]
        lines += [f'  wanted: {each}' for each in self.wanted[same : same + 6]]
        return '\n'.join(lines)


# --- seams ----------------------------------------------------------------------------------------

_world = None
_stopped = None
_seams = []


@contextlib.contextmanager
def current(world):
    """Have the clocks and locks of the modules be those of ``world``."""
    global _world
    before, _world = _world, world
    try:
        yield
    finally:
        _world = before


def make_lock():
    lock = Lock()
    _world.locks.append(lock)
    return lock


class NoTimer:
    """A watchdog that never barks: the world's clock has nothing to do with its."""

    daemon = True

    def __init__(self, interval, function):
        pass

    def start(self):
        pass

    def cancel(self):
        pass


@contextlib.contextmanager
def stepped_time():
    """Replace what the chain's modules know of threads and time."""
    fake_threads = types.SimpleNamespace(
        RLock=make_lock, Timer=NoTimer, Thread=threading.Thread, Event=threading.Event, Lock=threading.Lock
    )
    fake_time = types.SimpleNamespace(monotonic=lambda: _world.now_ns / 1e9)
    saved = [(module, name, vars(module)[name]) for module, name in [
        (loader_module, 'threading'), (self_test, 'time'), *((module, 'threading') for module in _seams),
    ]]  # fmt: skip
    try:
        loader_module.threading, self_test.time = fake_threads, fake_time
        for module in _seams:
            module.threading = fake_threads
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)


def add_seam(module):
    """Have a chain's module take its lock from here while histories run."""
    if module not in _seams:
        _seams.append(module)


def stopped_process():
    """Return the id of a process that SIGSTOP has stopped."""
    global _stopped
    if _stopped is None:
        _stopped = subprocess.Popen([sys.executable, '-Sc', 'import time; time.sleep(3600)'])
        os.kill(_stopped.pid, signal.SIGSTOP)
        while Path(f'/proc/{_stopped.pid}/stat').read_text().rpartition(')')[2].split()[0] != 'T':
            pass
    return _stopped.pid


def end_stopped_process():
    global _stopped
    if _stopped is not None:
        _stopped.kill()
        _stopped.wait()
        _stopped = None
