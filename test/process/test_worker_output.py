"""N-8: a worker that writes without end never waits, and its error is heard."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading

import pytest

from gps_denied_c7.worker.log import WorkerLog

pytestmark = pytest.mark.once

WRITER = """
import os, sys, time
end = time.monotonic() + float(sys.argv[1])
block, written = eval(sys.argv[2]), 0
while time.monotonic() < end:
    written += os.write(2, block)
os.write(2, b'\\n\\x1e40 the engine fails\\n')
print(written)
"""


@pytest.mark.parametrize('block', [r"b'a vendor\n' * 99", "b'x' * 65536", 'bytes(65536)', r"b'\n' * 65536"])
def test_a_worker_that_writes_without_end_never_waits_and_its_error_is_heard(block, caplog):
    """Lines, one line without an end, NUL bytes, empty lines; as fast as a process can write them."""
    caplog.set_level(logging.DEBUG)
    read_end, write_end = os.pipe()
    thread = threading.Thread(target=WorkerLog(lambda: 'worker 1').run, args=(read_end,))
    thread.start()
    writer = subprocess.Popen([sys.executable, '-c', WRITER, '1.0', block], stderr=write_end, stdout=subprocess.PIPE)
    os.close(write_end)
    written = int(writer.communicate(timeout=60)[0])
    thread.join(60.0)
    assert not thread.is_alive() and written > 1 << 20
    said = [record.getMessage() for record in caplog.records]
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert any('the engine fails' in line for line in errors)
    assert len(said) < 300 and sum(map(len, said)) < 200_000
