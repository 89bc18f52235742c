"""The programs that the how-to guides show do what they say."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from gps_denied_c7_msgs.msg import TensorList

from support.harness import Peer, image, running_node, tensor, wait_until
from support.networks import copying
from support.source_tree import REPOSITORY

CAMERA = '/camera/image_raw'


def programs(page: str) -> list[str]:
    """Return the Python programs that a page shows."""
    text = (REPOSITORY / 'docs/how-to' / page).read_text()
    return re.findall(r'^```python\n(.*?)^```', text, re.DOTALL | re.MULTILINE)


def is_printed(peer: Peer, answers: list[TensorList], printed: Path) -> bool:
    """Have one more image answered; return whether the reader, which may join late, has printed one of the answers."""
    answers.append(peer.ask(CAMERA, image(len(answers) + 1)))
    shape = tensor(answers[0], 'copy').shape
    lines = {f'{CAMERA} {each.header.stamp.sec}.000000000 copy float32 {shape}' for each in answers}
    return not lines.isdisjoint(printed.read_text().splitlines())


def test_the_shown_reader_of_tensors_prints_the_outputs_of_each_answer(tmp_path: Path):
    reader, to_image = programs('read-tensors.md')
    answers: list[TensorList] = []
    (tmp_path / 'reader.py').write_text(reader)
    with running_node({'model_path': copying(tmp_path), 'autostart': True}) as (node, peer), \
            open(tmp_path / 'printed', 'w+') as printed:  # fmt: skip
        peer.wait_state('active')
        domain = {'ROS_DOMAIN_ID': str(peer.context.get_domain_id()), 'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST'}
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / 'reader.py')], stdout=printed, stderr=subprocess.STDOUT,
            env={**os.environ, **domain},
        )  # fmt: skip
        try:
            wait_until(lambda: is_printed(peer, answers, tmp_path / 'printed'), 'a printed answer')
            process.send_signal(signal.SIGINT)
            assert process.wait(30.0) == 0
        finally:
            process.kill()
            process.wait()
    assert 'Traceback' not in (tmp_path / 'printed').read_text()
    shown = {'np': np, 'TensorList': TensorList}
    # The functions alone: the program itself spins.
    exec(reader.partition('\n\ndef on_answer')[0] + '\n\n' + to_image, shown)
    answer = answers[-1]
    assert np.array_equal(shown['arrays'](answer)['copy'], tensor(answer, 'copy'))
    answer.tensors[0].data, answer.tensors[0].shape = [], [0, 2]
    assert shown['arrays'](answer)[answer.tensors[0].name].shape == (0, 2), 'no points found'
    answer.network_to_image = [2.0, 0.0, 10.0, 0.0, 4.0, 20.0]
    assert shown['to_image'](answer, np.array([[1.0, 1.0]])).tolist() == [[12.0, 24.0]]
