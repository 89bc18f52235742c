"""N-8: an end on purpose is no error: not in the log, not in the exit code, whoever has gone before."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from support.harness import ROOT, free_domain_id, wait_until
from support.networks import copying

RUNS = int(os.environ.get('C7_END_RUNS', '4'))
TROUBLE = re.compile(r'ERROR|FATAL|Traceback|[Ee]xception')

# rclpy of Humble: a new default context takes the place of one that was shut down, and cannot be destroyed.
HUMBLE = """
import sys
import rclpy.context

rclpy.context.Context.destroy = lambda self: self._Context__context.destroy_when_not_in_use()
from gps_denied_c7.ros.node_main import main

sys.exit(main())
"""


def environment(domain_id: int) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    return {**os.environ, 'PYTHONPATH': path, 'ROS_DOMAIN_ID': str(domain_id)}


def wait_until_up(process: subprocess.Popen) -> None:
    """Wait until the node handles SIGTERM, and some time more for it to be there."""

    def handles_sigterm() -> bool:
        assert process.poll() is None
        caught = re.search(r'SigCgt:\s*(\w+)', Path(f'/proc/{process.pid}/status').read_text())
        return bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)

    wait_until(handles_sigterm, 'the node')
    time.sleep(0.7)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize('gone', ['closed', 'reader', 'full'])
def test_n8_the_exit_code_is_0_where_nobody_reads_what_it_prints(gone, number, domain_id):
    """Standard output and error are closed, or a pipe whose reader has gone, or full; also with Humble's rclpy."""
    words = [sys.executable, '-c', HUMBLE]
    redirect = {'closed': '>&- 2>&-', 'reader': '', 'full': '>/dev/full 2>&1'}[gone]
    read_end, write_end = os.pipe()
    streams = {'stdout': write_end, 'stderr': write_end} if gone == 'reader' else {}
    process = subprocess.Popen(
        ['bash', '-c', f'exec "$@" {redirect}', 'bash', *words], env=environment(domain_id), cwd='/', **streams
    )
    os.close(write_end)
    os.close(read_end)
    try:
        wait_until_up(process)
        process.send_signal(number)
        assert process.wait(30.0) == 0
    finally:
        process.kill()
        process.wait()


def test_n8_humble_ends_without_a_word_on_standard_error(domain_id):
    process = subprocess.Popen(
        [sys.executable, '-c', HUMBLE], env=environment(domain_id), cwd='/', stderr=subprocess.PIPE, text=True
    )
    wait_until_up(process)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 0
    assert 'could not' not in errors and not TROUBLE.search(errors)


@pytest.mark.parametrize('seed', range(RUNS))
def test_n8_ctrl_c_at_any_moment_of_the_start_logs_no_error(seed, tmp_path):
    """A terminal sends it to the whole group; launch to the node. Engines are loaded beside just then."""
    chooser = random.Random(seed)
    with free_domain_id() as domain_id, tempfile.NamedTemporaryFile('w+') as log:
        words = [sys.executable, '-m', 'gps_denied_c7.ros.node_main', '--ros-args', '-p', 'autostart:=true']
        process = subprocess.Popen(
            [*words, '-p', f'model_path:={copying(tmp_path)}', '-p', 'cpu_threads:=1'],
            stdout=log, stderr=subprocess.STDOUT, env=environment(domain_id), cwd='/', start_new_session=True,
        )  # fmt: skip
        try:
            moment = ('active, listening', 0.3) if seed % 2 == 0 else ('DDS profile', 1.5)
            wait_until(lambda: moment[0] in Path(log.name).read_text(), moment[0])
            time.sleep(chooser.uniform(0.0, moment[1]))
            send = os.killpg if chooser.random() < 0.5 else os.kill
            send(process.pid, chooser.choice([signal.SIGINT, signal.SIGTERM]))
            assert process.wait(30.0) == 0
        finally:
            process.kill()
            process.wait()
        text = Path(log.name).read_text()
        print(text)
        assert 'shutting down' in text
        assert not TROUBLE.search(text)
