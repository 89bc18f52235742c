"""N-6: steps of the system's clock, as GPS or NTP make them in flight, cost the node neither a frame nor a deadline."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest
from gps_denied_c7_msgs.msg import FdrRecord

from support.harness import image, running_node, wait_until
from support.networks import copying

CAMERA = '/camera/image_raw'
HOUR_S = 3600
TEN_YEARS_S = 10 * 365 * 24 * HOUR_S
# Ahead and behind in turn, and at last back to where it was; a board without a battery wakes up years ago.
SHIFTS_S = (HOUR_S, -HOUR_S, 2 * HOUR_S, -TEN_YEARS_S, 0)


class ShiftedClock:
    """Make the system's clock of other processes step (clock_shift.c), which nobody else on the machine notices."""

    def __init__(self, directory: Path) -> None:
        compiler = shutil.which('cc') or shutil.which('gcc')
        if compiler is None:
            pytest.skip('needs a C compiler')
        library = directory / 'clock_shift.so'
        source = Path(__file__).with_name('clock_shift.c')
        subprocess.run([compiler, '-shared', '-fPIC', '-O2', '-o', library, source, '-ldl'], check=True)
        self._file = directory / 'shift'
        self._shift_s = 0
        self._file.write_bytes(struct.pack('q', 0))
        self.environ = {'LD_PRELOAD': str(library)}

    def step_to(self, shift_s: int) -> None:
        """Let the clock go wrong by ``shift_s`` seconds from now on."""
        self._shift_s = shift_s
        # In place and at once: the others have the file mapped.
        with open(self._file, 'r+b', buffering=0) as file:
            file.write(struct.pack('q', shift_s * 1_000_000_000))

    def shows(self, stamp: object) -> bool:
        """Tell whether a stamp was taken by this clock within the last minute."""
        age_s = time.time() + self._shift_s - getattr(stamp, 'sec', 0)
        return -1 <= age_s <= 60


@pytest.fixture
def clock(tmp_path):
    return ShiftedClock(tmp_path)


def test_n6_steps_of_the_system_clock_cost_no_frame(tmp_path, clock):
    """Each step is made while a frame waits for a worker that hangs; then one dies, and all goes on."""
    with running_node({'model_path': copying(tmp_path), 'cpu_threads': 1}, **clock.environ) as (process, peer):
        peer.start()
        peer.wait_matched(CAMERA)

        def switches() -> list[FdrRecord]:
            return [record for record in list(peer.records) if record.kind == 'c7.runtime_switched']

        def settled() -> bool:
            values = peer.values('Runtime')
            return values.get('standby', 'none') != 'none' and values['switches'] == str(len(switches()))

        def ask_after(harm: signal.Signals, step_to_s: int | None = None) -> None:
            wait_until(settled, 'the last switch to be over')
            number = len(switches()) + 1
            os.kill(int(peer.values('Runtime')['worker_pid']), harm)
            peer.publisher(CAMERA).publish(image(number))
            if step_to_s is not None:
                time.sleep(0.05)
                clock.step_to(step_to_s)
            wait_until(lambda: len(peer.tensors) == number, f'the answer to frame {number}')
            assert peer.tensors[-1].header.stamp.sec == number
            wait_until(lambda: len(switches()) == number, f'the record of switch {number}')
            assert clock.shows(switches()[-1].stamp)

        for shift_s in SHIFTS_S:
            ask_after(signal.SIGSTOP, shift_s)
            wait_until(lambda: clock.shows(peer.diagnostics[-1].header.stamp), f'diagnostics by a clock at {shift_s} s')
            ask_after(signal.SIGKILL)
            assert peer.state() == 'active'
        wait_until(settled, 'the last switch to be over')
        assert 'clock_shift.so' in Path(f'/proc/{peer.values("Runtime")["worker_pid"]}/maps').read_text()
        assert 'c7.callback_failed' not in peer.kinds()
        process.signal(signal.SIGINT)
        assert process.wait() == 0
