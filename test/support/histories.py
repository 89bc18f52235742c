"""Random histories of a chain: its settings, what is asked of it, and what happens to its engines."""

from __future__ import annotations

import random

from gps_denied_c7.errors import (
    EngineDeserializeError,
    EngineSchemaMismatchError,
    GpuMemoryError,
    GpuUnavailableError,
    InferenceError,
    RuntimeUnavailableError,
    WorkerDiedError,
)
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.runtimes.protocol import ProviderSet

TRT = Rung('tensorrt', ProviderSet.GPU)
ORT = Rung('onnx_trt_ep', ProviderSet.GPU)
PT = Rung('pytorch_fp16', ProviderSet.GPU)
CPU = Rung('onnx_trt_ep', ProviderSet.CPU)
CHAINS = (
    (TRT, PT, CPU), (TRT, ORT, CPU), (TRT, ORT, PT, CPU), (ORT, CPU), (TRT, CPU), (CPU,), (TRT, PT), (TRT,),
)  # fmt: skip
POISON = 13.0
FAULTS = {
    'refused': lambda: EngineDeserializeError('not now.'),
    'died': lambda: WorkerDiedError('the worker was ended by SIGSEGV.'),
    'failed': lambda: InferenceError('the engine failed its warm-up.'),
    'absent': lambda: RuntimeUnavailableError('tensorrt', 'is not installed.'),
    'no gpu': lambda: GpuUnavailableError('tensorrt', 'no GPU answers.'),
    'another digest': lambda: EngineSchemaMismatchError('engine_sha256', expected='a', found='b'),
    'unexpected': lambda: OSError('a driver call failed'),
    'no memory': lambda: GpuMemoryError('does not fit.', needed_bytes=500, left_bytes=100),
    'little memory': lambda: GpuMemoryError('does not fit.', needed_bytes=200, left_bytes=100),
}
ACTS = (
    'answer', 'answer', 'answer', 'die', 'die on request', 'late', 'late', 'slow', 'fail', 'raise', 'disagree',
    'poisoned', 'poisoned fail', 'poisoned late', 'late once', 'late death', 'late fault',
)  # fmt: skip
POISONED = {'poisoned': 'die', 'poisoned fail': 'fail', 'poisoned late': 'late'}
LATE = {'late once': 'answer', 'late death': 'die', 'late fault': 'fail'}
LOAD_FAULTS = (None, None, None, 'no host', 'die', 'late', *POISONED, *FAULTS)


def draw_setting(rng):
    first, longest = rng.choice([(1.0, 4.0), (0.5, 30.0), (5.0, 5.0)])
    return {
        'rungs': rng.choice(CHAINS),
        'bare': rng.random() < 0.1,
        'rules': rng.random() < 0.8,
        'in_place': rng.random() < 0.6,
        'pids': rng.random() < 0.4,
        'fingerprint': rng.choice([None, 1]),
        'sizes': {rung: rng.choice([None, 200, 400, 500]) for rung in (TRT, ORT, PT)},
        'config': {
            'isolation': 'none' if rng.random() < 0.08 else 'process',
            'hot_standby': rng.random() < 0.8,
            'restart_backoff_s': (first, longest),
            'promotion_backoff_s': rng.choice([(2.0, 8.0), (0.5, 1.0), (5.0, 300.0)]),
            'inference_deadline_ms': 100.0,
            'hang_timeout_ms': rng.choice([300.0, 1000.0]),
            'configure_budget_s': rng.choice([0.001, 0.4, 10.0]),
            'load_timeout_s': rng.choice([3.0, 60.0]),
            'gpu_fault_window_s': rng.choice([1.0, 10.0]),
            'build_on_configure': rng.random() < 0.05,
            'ort_disallow_cpu_fallback': rng.random() < 0.1,
        },
    }


class Draw:
    """Draw the steps of a history."""

    def __init__(self, rng, setting):
        self.rng, self.rungs, self.value = rng, setting['rungs'], 100.0

    def next_value(self):
        if self.rng.random() < 0.06:
            return POISON
        self.value += 1.0
        return self.value

    def event(self):
        """Return something that happens to the engines."""
        rng = self.rng
        index, rung = rng.randrange(6), rng.choice(self.rungs)
        kind = rng.choices(
            ('script', 'script_all', 'script_rung', 'crash', 'stop', 'unkillable', 'fault', 'load_s', 'files',
             'threads', 'finish_cancelled', 'free_driver', 'heal'),
            (24, 5, 6, 8, 5, 3, 14, 10, 3, 1, 1, 2, 5),
        )[0]  # fmt: skip
        args = {
            'script': lambda: (index, rng.choice(ACTS)),
            'script_all': lambda: (rng.choice(ACTS),),
            'script_rung': lambda: (rung, rng.choice(ACTS)),
            'crash': lambda: (index,), 'stop': lambda: (index,), 'unkillable': lambda: (index,),
            'fault': lambda: (rung, rng.choice(LOAD_FAULTS)),
            'load_s': lambda: (
                rung, rng.choice([0.0, 0.0, 0.05, 0.3, 2.0, 20.0]), rng.choice([0.0, 0.0, 0.2, 3.0]),
                rng.choice([0.0, 0.0, 0.01, 0.2]),
            ),
            'threads': lambda: (rng.randrange(3),), 'finish_cancelled': lambda: (rng.random() < 0.5,),
        }  # fmt: skip
        return kind, args.get(kind, lambda: ())()

    def step(self):
        rng = self.rng
        kind = rng.choices(
            ('frames', 'event', 'later', 'wait', 'maintain', 'infer', 'prove', 'load_anew', 'release', 'load',
             'make_room', 'load_beside', 'shadow', 'hand_over', 'release_meanwhile', 'poison'),
            (34, 26, 8, 12, 6, 4, 2, 1, 0.5, 0.5, 1.5, 1.2, 1.2, 1, 0.8, 0.8),
        )[0]  # fmt: skip
        if kind == 'event':
            name, args = self.event()
            return (name, *args)
        if kind == 'later':
            name, args = self.event()
            return ('later', rng.choice([0.01, 0.09, 0.15, 0.5, 2.0]), name, args)
        if kind == 'release_meanwhile':
            return ('later', rng.choice([0.01, 0.09, 0.15, 0.5]), 'release_meanwhile', (rng.random() < 0.7,))
        if kind == 'frames':
            values = tuple(self.next_value() for _ in range(rng.randrange(1, 5)))
            return ('frames', values, rng.random() < 0.5, rng.choice([0.0, 0.03, 0.03, 0.4]))
        args = {
            'wait': lambda: (rng.choice([0.05, 0.3, 0.4, 1.2, 2.5, 5.0, 10.0, 70.0, 400.0]),),
            'infer': lambda: (self.next_value(), rng.random() < 0.5),
            'make_room': lambda: (rng.choice([0, 100, 300, 600]),),
            'shadow': lambda: (self.next_value(),),
            'poison': lambda: (rng.choice(['poisoned', 'poisoned fail', 'poisoned late']), rng.random() < 0.7),
        }
        return (kind, *args.get(kind, lambda: ())())


def draw_history(seed, steps):
    """Return the setting and the steps of a history."""
    rng = random.Random(seed)
    setting = draw_setting(rng)
    draw = Draw(rng, setting)
    before = [(name, *args) for name, args in (draw.event() for _ in range(rng.choice([0, 0, 1, 3])))]
    return setting, [*before, ('load',), *(draw.step() for _ in range(steps))]
