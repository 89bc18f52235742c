"""N-8: whatever a worker writes, the log stays short, errors are in it, and the worker never waits."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time

import pytest

from gps_denied_c7.worker.child import LOG_MARK
from gps_denied_c7.worker.log import WorkerLog


def own(level: int, text: str) -> bytes:
    return f'{LOG_MARK}{level} {text}\n'.encode()


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.DEBUG)

    def lines(level: int = 0) -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelno >= level]

    return lines


@pytest.fixture
def log():
    return WorkerLog(lambda: 'worker 1', clock=lambda: 0.0)


def feed(log: WorkerLog, data: bytes, sizes: list[int] | None = None) -> None:
    for size in sizes or [len(data)]:
        chunk, data = bytearray(data[:size]), data[size:]
        log.feed(chunk, len(chunk))
    if data:
        feed(log, data)


def test_what_is_left_out_is_counted_to_the_line(log, said):
    feed(log, b'noise\n' * 12_545)
    log.finish()
    told = [line for line in said() if 'left out' in line]
    logged = said().count('worker 1: noise')
    assert 100 < logged < 400
    out = 12_545 - logged
    assert told == [f'worker 1: left out {out:,} lines ({6 * out:,} bytes) of its output within 0 s.']


def test_errors_are_heard_through_any_noise_and_noise_of_our_own(log, said):
    feed(log, b'noise\n' * 5000 + own(20, 'told') * 5000)
    for number in range(50):
        feed(log, b'noise\n' * 100 + own(20, 'told') * 100 + own(40, f'error {number}') + own(20, 'told'))
    assert said(logging.ERROR) == [f'worker 1: error {number}' for number in range(50)]


def test_errors_without_end_are_limited_too(log, said):
    feed(log, own(40, 'again') * 100_000)
    assert len(said(logging.ERROR)) < 600


def test_lines_are_the_same_however_they_are_cut_into_chunks(said, caplog):
    """Random lines, marks among them, in random pieces: what is logged and what is counted does not change."""
    chooser = random.Random(18)
    for _ in range(30):
        pieces = [b'', b'plain', b'x' * 1999, b'y' * 5000, b'\x1e', b'\x1e4', b'\0\xff', b'\x1e40 bad', b'\x1e10 so']
        data = b''.join(chooser.choice(pieces) + b'\n' for _ in range(400))
        results = []
        for sizes in ([len(data)], [chooser.choice([1, 2, 3, 700, 5000]) for _ in range(3000)]):
            caplog.clear()
            log = WorkerLog(lambda: 'w', clock=lambda: 0.0)
            feed(log, data, sizes)
            log.finish()
            # Of a line that is cut, how many bytes are counted as left out depends on the chunks.
            results.append([(record.levelno, record.getMessage().partition('(')[0]) for record in caplog.records])
        assert results[0] == results[1]


def test_a_long_line_is_cut_and_the_next_one_is_whole(log, said):
    feed(log, b'x' * 100_000 + b'\nnext\n' + b'y' * 3000)
    log.finish()
    assert said() == [f'worker 1: {"x" * 2000} …', 'worker 1: next', f'worker 1: {"y" * 2000} …']


def test_quiet_after_noise_the_count_is_told_all_the_same(said):
    now = [0.0]
    log = WorkerLog(lambda: 'worker 1', clock=lambda: now[0])
    read_end, write_end = os.pipe()
    thread = threading.Thread(target=log.run, args=(read_end,), daemon=True)
    thread.start()
    os.write(write_end, b'noise\n' * 5000)
    deadline = time.monotonic() + 30.0
    while len(said()) < 100 and time.monotonic() < deadline:
        time.sleep(0.01)
    now[0] = 100.0
    os.write(write_end, b'\n')
    while not any('left out' in line for line in said()) and time.monotonic() < deadline:
        time.sleep(0.01)
    with contextlib.suppress(OSError):
        os.close(write_end)
    thread.join(30.0)
    assert sum('left out' in line for line in said()) == 1


def test_after_a_while_lines_are_heard_again(said):
    now = [0.0]
    log = WorkerLog(lambda: 'worker 1', clock=lambda: now[0])
    feed(log, b'noise\n' * 5000)
    now[0] = 60.0
    feed(log, b'quiet again\n')
    assert 'worker 1: quiet again' in said()
