"""What a user types wrong: each program refuses it in one line that says how it is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.source_tree import REPOSITORY

NODE = 'ros.node_main'
BEHIND = 'Parameters follow --ros-args: c7_inference_node --ros-args -p'
PARAMETER = 'Write -p NAME:=VALUE'
FILE = 'Check that the file exists and is a ROS parameter file'
DOMAIN = 'is not a ROS domain. Give a whole number from 0 to 232.'


def run(program: str, *arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    path = os.pathsep.join([str(REPOSITORY), os.environ.get('PYTHONPATH', '')])
    return subprocess.run(
        [sys.executable, '-m', f'gps_denied_c7.{program}', *arguments], capture_output=True, text=True, check=False,
        timeout=30, cwd=cwd, env={**os.environ, 'PYTHONPATH': path, **environ},
    )  # fmt: skip


@pytest.mark.parametrize(
    ('arguments', 'found', 'remedy'),
    [
        ('net.onnx', "'net.onnx'", BEHIND),
        ('-p model_path:=net.onnx', "'-p'", BEHIND),
        ('--model net.onnx', "'--model'", BEHIND),
        ('model_path:=net.onnx', "'model_path:=net.onnx'", BEHIND),
        ('--ros-args -p autostart:=true -- net.onnx', "'net.onnx'", BEHIND),
        ('--ros-args model_path:=net.onnx', "['model_path:=net.onnx']", PARAMETER),
        ('--ros-args -p model_path=net.onnx', "'-p model_path=net.onnx'", PARAMETER),
        ('--ros-args -p latency_warn_ms:=', "'-p latency_warn_ms:='", PARAMETER),
        ('--ros-args --params-file nope.yaml', "'--params-file nope.yaml'", FILE),
        ('--ros-args --params-file list.yaml', "'--params-file list.yaml'", FILE),
        ('--ros-args -r image', "'-r image'", 'Write -r FROM:=TO.'),
        ('--ros-args --log-level loud', "'--log-level loud'", 'Write --log-level debug, info'),
    ],
)
def test_n10_an_argument_that_the_node_cannot_use_is_refused_with_how_it_is_written(tmp_path, arguments, found, remedy):
    (tmp_path / 'list.yaml').write_text('- model_path: net.onnx\n')
    done = run(NODE, *arguments.split(), cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith('c7_inference_node: ') and found in line and remedy in line
    assert '/src/' not in line, 'a place in the source code of rcl'


@pytest.mark.parametrize('number', ['300', '-1', '233', 'seven'])
@pytest.mark.parametrize('program', [NODE, 'demo.run'])
def test_a_ros_domain_that_dds_does_not_have_is_refused_at_the_start(tmp_path, program, number):
    done = run(program, cwd=tmp_path, ROS_DOMAIN_ID=number)
    assert done.returncode == 2
    assert f'{number!r} {DOMAIN}' in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir()), 'nothing was recorded'


def test_the_benchmark_refuses_a_ros_domain_that_dds_does_not_have(tmp_path):
    done = run('bench.run', '--domain-id', '300', cwd=tmp_path)
    assert done.returncode == 2
    assert f"'300' {DOMAIN}" in done.stderr.splitlines()[-1]
