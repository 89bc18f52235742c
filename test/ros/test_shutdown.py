"""N-8: a signal is heard at whatever moment it comes."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from support.harness import ROOT

# A main thread that is under the lock of the event nearly all the time.
WAITS = """
import signal, sys, threading
from gps_denied_c7.ros.shutdown import on_first_signal
stop, heard = threading.Event(), []
def note(number):
    heard.append(number)
    stop.set()
on_first_signal((signal.SIGINT, signal.SIGTERM), note)
signal.signal(signal.SIGUSR1, lambda number, frame: None)
print('ready', flush=True)
while not stop.wait(0):
    pass
print(*(number.name for number in heard), flush=True)
"""


@pytest.mark.parametrize(
    'numbers', [[signal.SIGTERM], [signal.SIGINT, signal.SIGTERM], [signal.SIGUSR1, signal.SIGINT]]
)
def test_n8_the_first_of_the_awaited_signals_is_heard_whatever_the_main_thread_does(numbers):
    for _ in range(5):
        with subprocess.Popen([sys.executable, '-c', WAITS], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout.readline() == 'ready\n'
                for number in numbers:
                    process.send_signal(number)
                output, _ = process.communicate(timeout=30)
            finally:
                process.kill()
        awaited = [number.name for number in numbers if number is not signal.SIGUSR1]
        # Of two that come at once, the system may hand over the one of the smaller number first.
        assert process.returncode == 0 and output.split()[0] in awaited and len(output.split()) == 1


def test_n8_a_signal_that_the_parent_has_blocked_is_heard():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        process = subprocess.Popen([sys.executable, '-c', WAITS], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with process:
        try:
            assert process.stdout.readline() == 'ready\n'
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, output) == (0, 'SIGTERM\n')
