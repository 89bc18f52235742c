"""N-4, N-5: each callback is handed to a thread once, and one that raises ends neither spinning nor the others."""

from __future__ import annotations

import inspect
import threading
import time
from types import SimpleNamespace

import pytest
import rclpy
from rclpy.callback_groups import ReentrantCallbackGroup

from gps_denied_c7.ros import callbacks
from gps_denied_c7.ros.callbacks import CallbackGuard, PoolExecutor, PromptCallbackGroup
from support.harness import wait_until


class Spinning:
    """A node on a spinning PoolExecutor that counts what it hands to its pool."""

    def __init__(self, context, threads):
        self.escaped, self.handed_over = [], 0
        self.node = rclpy.create_node('spinning', context=context)
        self.executor = PoolExecutor(threads, on_escape=self.escaped.append, context=context)
        submit = self.executor._pool.submit

        def counting(*args):
            self.handed_over += 1
            return submit(*args)

        self.executor._pool.submit = counting
        self.executor.add_node(self.node)
        self.thread = threading.Thread(target=self.executor.spin)
        self.thread.start()

    def timer(self, callback, period_s=0.001):
        return self.node.create_timer(period_s, callback, callback_group=ReentrantCallbackGroup())

    def close(self):
        self.executor.stop()
        self.thread.join()
        self.executor.shutdown()
        self.node.destroy_node()


@pytest.fixture
def spin(ros_context):
    made = []

    def start(threads=2):
        made.append(Spinning(ros_context, threads))
        return made[-1]

    yield start
    for each in made:
        each.close()


def test_n4_a_callback_is_handed_over_once_however_busy_the_interpreter_is(spin):
    """rclpy's own executor does so about eight times beside a thread that computes in Python."""
    spinning, calls, over = spin(), [], threading.Event()

    def compute():
        while not over.is_set():
            sum(range(1000))

    busy = threading.Thread(target=compute)
    busy.start()
    try:
        timer = spinning.timer(lambda: calls.append(1))
        wait_until(lambda: len(calls) >= 100, 'a hundred calls')
        timer.cancel()
    finally:
        over.set()
        busy.join()
    wait_until(lambda: not spinning.executor._handed_over, 'the last call to end')
    # The last one may be cancelled between its hand-over and its call.
    assert spinning.handed_over in (len(calls), len(calls) + 1)


def test_n4_callbacks_wait_for_a_thread_and_run_once_it_is_free(spin):
    spinning, leave = spin(threads=2), threading.Event()
    begun, waiting = [], []
    blocking = [spinning.timer(lambda: begun.append(1) or leave.wait(30)) for _ in range(2)]
    wait_until(lambda: len(begun) == 2, 'every thread to be taken')
    guards = [spinning.node.create_guard_condition(lambda number=number: waiting.append(number)) for number in range(5)]
    for each in (*blocking, *guards):
        each.cancel() if each in blocking else each.trigger()
    time.sleep(0.1)
    assert waiting == [], 'no thread is free'
    leave.set()
    wait_until(lambda: sorted(set(waiting)) == list(range(5)), 'all that waited')
    assert len(waiting) == 5 and len(begun) == 2


def test_n5_spinning_goes_on_after_a_callback_that_nobody_guarded(spin):
    """Each exception is told once."""
    spinning, calls, others = spin(), [], []

    def broken():
        calls.append(1)
        raise RuntimeError(f'number {len(calls)}')

    timer = spinning.timer(broken)
    spinning.timer(lambda: others.append(1))
    wait_until(lambda: len(calls) >= 5 and len(others) >= 5, 'calls after the failure')
    timer.cancel()
    wait_until(lambda: len(spinning.escaped) == len(calls), 'every failure to be told')
    assert sorted(str(error) for error in spinning.escaped) == sorted(f'number {n + 1}' for n in range(len(calls)))


def test_n5_spinning_goes_on_after_waiting_itself_failed(spin, monkeypatch):
    spinning, calls = spin(), []
    wait = spinning.executor.wait_for_ready_callbacks
    failures = [RuntimeError('wait set is invalid'), RuntimeError('again')]

    def failing(**kwargs):
        if failures:
            raise failures.pop()
        return wait(**kwargs)

    monkeypatch.setattr(spinning.executor, 'wait_for_ready_callbacks', failing)
    spinning.timer(lambda: calls.append(1))
    # The wait that was under way before answers the timer too.
    wait_until(lambda: len(spinning.escaped) == 2, 'both failures to be told')
    calls.clear()
    wait_until(lambda: calls, 'a call after the failures')


def test_stop_ends_a_wait_in_which_nothing_becomes_ready(spin, monkeypatch):
    """Once notified, rclpy goes on waiting where it has found nothing to do."""
    monkeypatch.setattr(callbacks, '_WAKE_S', 60.0)
    spinning, calls = spin(), []
    spinning.node.create_guard_condition(lambda: calls.append(1)).trigger()
    wait_until(lambda: calls, 'a callback')
    # For the next wait to begin; nothing tells of it.
    time.sleep(0.2)
    spinning.executor.stop()
    spinning.thread.join(20.0)
    assert not spinning.thread.is_alive()


def test_the_end_of_the_context_ends_spinning(ros_context):
    executor = PoolExecutor(2, on_escape=print, context=ros_context)
    thread = threading.Thread(target=executor.spin)
    thread.start()
    ros_context.try_shutdown()
    thread.join(10.0)
    assert not thread.is_alive()
    executor.shutdown()


def test_a_wait_that_fails_because_the_context_has_ended_ends_spinning_and_is_no_error(ros_context, monkeypatch):
    escaped = []

    def escape(error):
        escaped.append(error)
        executor.stop()

    executor = PoolExecutor(2, on_escape=escape, context=ros_context)

    def ended_meanwhile(**kwargs):
        ros_context.try_shutdown()
        raise RuntimeError('the given context is not valid')

    monkeypatch.setattr(executor, 'wait_for_ready_callbacks', ended_meanwhile)
    thread = threading.Thread(target=executor.spin)
    thread.start()
    thread.join(30.0)
    assert not thread.is_alive() and escaped == []
    executor.shutdown()


def test_n4_a_prompt_callback_runs_at_once_where_it_spins_whoever_blocks_the_pool(spin):
    spinning, over, blocked, calls = spin(threads=1), threading.Event(), threading.Event(), []

    def block():
        blocked.set()
        over.wait(30)

    spinning.timer(block)
    wait_until(blocked.is_set, 'a callback that holds the only thread')

    def prompt():
        calls.append(threading.current_thread())
        if len(calls) == 2:
            raise RuntimeError('escaped')

    spinning.node.create_timer(0.001, prompt, callback_group=PromptCallbackGroup())
    try:
        wait_until(lambda: len(calls) > 5, 'the callbacks that follow the one that raised')
        assert set(calls) == {spinning.thread}
        assert [str(error) for error in spinning.escaped] == ['escaped']
    finally:
        over.set()


@pytest.mark.parametrize(('times', 'left_s'), [(0, 0.0025), (1, 0.0015), (2, 0.0005), (3, 0.0)])
def test_a_prompt_callback_is_followed_by_what_is_left_of_a_pause(ros_context, monkeypatch, times, left_s):
    """It may have given way itself, and the next image need not wait for another pause."""
    slept = []

    def prompt():
        for _ in range(times):
            callbacks.yield_gil()
        slept.clear()

    node = rclpy.create_node('prompt', context=ros_context)
    executor = PoolExecutor(1, on_escape=pytest.fail, context=ros_context, pause_s=0.0025)
    executor.add_node(node)
    guard = node.create_guard_condition(prompt, callback_group=PromptCallbackGroup())
    with monkeypatch.context() as patched:
        patched.setattr(callbacks, 'time', SimpleNamespace(sleep=slept.append))
        # What was given way before is no part of the next one's.
        for _ in range(2):
            guard.trigger()
            while not slept:
                executor.spin_once(timeout_sec=5.0)
            assert slept == [pytest.approx(left_s)]
            slept.clear()
    executor.shutdown()
    node.destroy_node()


@pytest.fixture
def reported():
    return []


@pytest.fixture
def guard(reported):
    return CallbackGuard(lambda name, error: reported.append((name, error)))


def test_an_exception_is_reported_and_kept_in(guard, reported):
    def broken(message):
        raise RuntimeError(message)

    assert guard('subscription', broken)('boom') is None
    ((name, error),) = reported
    assert name == 'subscription' and str(error) == 'boom'


def test_a_failed_service_still_answers(guard):
    def broken(request, response):
        raise RuntimeError

    assert guard('service', broken)('request', 'response') == 'response'


def test_the_signature_stays_since_rclpy_looks_at_it(guard):
    def with_info(message, info):
        """Take both."""

    assert list(inspect.signature(guard('x', with_info)).parameters) == ['message', 'info']


def test_a_result_passes_through(guard, reported):
    assert guard('x', lambda message: message + 1)(1) == 2
    assert reported == []
