"""N-8: what the process of a node is given by whoever starts it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
from collections.abc import Iterator

import pytest

from support import harness
from support.harness import image, running_node
from support.networks import copying

CAMERA = '/camera/image_raw'


@contextlib.contextmanager
def full_pipe() -> Iterator[int]:
    """Yield one end of a pipe of one page that nobody reads."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    try:
        yield write
    finally:
        os.close(read)
        os.close(write)


@contextlib.contextmanager
def stopped_terminal() -> Iterator[int]:
    """Yield a terminal that shows nothing, as after Ctrl-S."""
    ours, theirs = pty.openpty()
    try:
        yield theirs
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize('output', [full_pipe, stopped_terminal])
def test_n8_a_node_whose_output_nobody_reads_answers_and_ends(tmp_path, monkeypatch, output):
    """N-4: log lines are lost then, and nothing else."""
    with output() as descriptor, monkeypatch.context() as patch:
        start = subprocess.Popen

        def start_with_that_output(words, **options):
            return start(words, **{**options, 'stdout': descriptor, 'stderr': descriptor})

        patch.setattr(harness.subprocess, 'Popen', start_with_that_output)
        parameters = {'model_path': copying(tmp_path), 'cpu_threads': 1}
        with running_node(parameters, ('--log-level', 'debug')) as (process, peer):
            patch.undo()
            peer.start()
            peer.wait_matched(CAMERA)
            assert peer.ask(CAMERA, image(1)).header.stamp.sec == 1
            process.signal(signal.SIGTERM)
            assert process.wait() == 0
