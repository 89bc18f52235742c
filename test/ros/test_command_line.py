"""What a user types: ros2 launch, lifecycle, param, topic, interface, pkg and run against the installed package."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from support.harness import Peer, free_domain_id, wait_until
from support.scenario import IMAGE_TOPIC, record_flight
from support.source_tree import REPOSITORY

pytestmark = pytest.mark.skipif(shutil.which('ros2') is None, reason='the ros2 command is not installed')

NODE = '/c7_inference'


def ros2(*words: str, domain_id: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a ros2 command to its end and return it with its output, errors included."""
    return subprocess.run(
        ['ros2', *words],
        env={**os.environ, 'ROS_DOMAIN_ID': str(domain_id)},
        cwd=tempfile.gettempdir(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=90,
    )


class Running:
    """A ros2 command that goes on until it is told to stop."""

    def __init__(self, *words: str, domain_id: int) -> None:
        self._log = tempfile.NamedTemporaryFile('w+', prefix='c7-ros2-', suffix='.log')  # noqa: SIM115
        self.process = subprocess.Popen(
            ['ros2', *words],
            env={**os.environ, 'ROS_DOMAIN_ID': str(domain_id)},
            cwd=tempfile.gettempdir(),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def output(self) -> str:
        """Return what it has printed."""
        return Path(self._log.name).read_text(errors='replace')

    def interrupt(self) -> int:
        """Press Ctrl-C, which a terminal sends to the whole group, and return the exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(30.0)

    def close(self) -> None:
        """End whatever still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        print(self.output())
        self._log.close()


@contextlib.contextmanager
def running(*words: str, domain_id: int) -> Iterator[Running]:
    """Run a ros2 command for as long as the body takes."""
    command = Running(*words, domain_id=domain_id)
    try:
        yield command
    finally:
        command.close()


def launch(*arguments: str, domain_id: int) -> contextlib.AbstractContextManager[Running]:
    """Launch the node."""
    return running('launch', 'gps_denied_c7', 'c7_inference.launch.py', *arguments, domain_id=domain_id)


@pytest.fixture(scope='module')
def domain() -> Iterator[int]:
    """A domain that the commands of this module share."""
    with free_domain_id() as number:
        yield number


@pytest.fixture(scope='module')
def active(domain: int, demo_bundle: str) -> Iterator[Peer]:
    """A launched node that was configured and activated with ros2 lifecycle."""
    arguments = (f'model:={demo_bundle}', f'image_topics:={IMAGE_TOPIC}', 'autostart:=false')
    with launch(*arguments, domain_id=domain):
        peer = Peer(domain)
        try:
            assert peer.state() == 'unconfigured'
            # The first command would start the daemon and get its answer before the daemon knows any node.
            ros2('daemon', 'start', domain_id=domain)
            wait_until(lambda: NODE in ros2('lifecycle', 'nodes', domain_id=domain).stdout, 'the daemon', 60.0)
            for transition in ('configure', 'activate'):
                done = ros2('lifecycle', 'set', NODE, transition, domain_id=domain)
                assert 'Transitioning successful' in done.stdout
            yield peer
        finally:
            ros2('daemon', 'stop', domain_id=domain)
            peer.close()


def test_launch_explains_its_arguments():
    """Deliverable 8."""
    done = ros2('launch', 'gps_denied_c7', 'c7_inference.launch.py', '--show-args')
    assert done.returncode == 0
    assert set(re.findall(r"^ {4}'(\w+)':", done.stdout, re.MULTILINE)) == {
        'params_file', 'namespace', 'name', 'image_topics', 'model', 'autostart', 'use_sim_time', 'log_level',
        'respawn', 'respawn_delay', 'dds_profile',
    }  # fmt: skip


def test_launch_refuses_a_parameter_file_that_is_not_there(domain):
    """launch by itself starts the node without it."""
    with launch('params_file:=/nowhere.yaml', domain_id=domain) as command:
        assert command.process.wait(60.0) != 0
        assert '/nowhere.yaml is not a file' in command.output()
        assert 'process started' not in command.output()


def test_arguments_go_before_the_parameter_file_and_the_rest_of_it_holds(domain, tmp_path):
    """Also where the file names the node, which goes before a wildcard."""
    file = tmp_path / 'mine.yaml'
    parameters = {'image_topics': ['/mine'], 'model_path': 'mine', 'cpu_threads': 3, 'use_sim_time': True}
    file.write_text(yaml.dump({'/drone1/extractor': {'ros__parameters': parameters}}))
    words = (f'params_file:={file}', 'namespace:=drone1', 'name:=extractor', 'autostart:=false')
    topics = ('image_topics:=[/front/image_raw, down/image_raw]', 'model:=9.onnx')
    with launch(*words, *topics, domain_id=domain):
        peer = Peer(domain, '/drone1/extractor')
        try:
            assert list(peer.get_parameter('image_topics').string_array_value) == ['/front/image_raw', 'down/image_raw']
            assert peer.get_parameter('model_path').string_value == '9.onnx'
            assert peer.get_parameter('cpu_threads').integer_value == 3
            assert peer.get_parameter('use_sim_time').bool_value
        finally:
            peer.close()


def test_ctrl_c_ends_launch_with_exit_code_0_and_no_respawn(domain, demo_bundle):
    """Deliverable 8, N-8."""
    with launch(f'model:={demo_bundle}', domain_id=domain) as command:
        peer = Peer(domain)
        try:
            peer.wait_state('active')
            assert command.interrupt() == 0
            assert command.output().count('process started') == 1
            assert 'process has finished cleanly' in command.output()
            wait_until(lambda: 'c7.session_ended' in peer.kinds(), 'the end to be recorded')
        finally:
            peer.close()


def test_the_dds_profile_is_selected_unless_the_user_chose(domain, monkeypatch):
    """§8."""
    monkeypatch.setenv('RMW_IMPLEMENTATION', 'rmw_fastrtps_cpp')
    for name in ('FASTRTPS_DEFAULT_PROFILES_FILE', 'FASTDDS_DEFAULT_PROFILES_FILE', 'FASTDDS_BUILTIN_TRANSPORTS'):
        monkeypatch.delenv(name, raising=False)

    def environment_of_the_node(*arguments: str) -> dict[str, str]:
        with launch('autostart:=false', *arguments, domain_id=domain) as command:
            found = wait_until(lambda: re.search(r'process started with pid \[(\d+)\]', command.output()), 'the node')
            words = Path(f'/proc/{found[1]}/environ').read_bytes().split(b'\0')
            assert command.interrupt() == 0
            return dict(word.decode().split('=', 1) for word in words if b'=' in word)

    def profiles(environment: dict[str, str]) -> list[str]:
        return [value for name, value in environment.items() if name.endswith('_DEFAULT_PROFILES_FILE')]

    (profile,) = profiles(environment_of_the_node())
    assert Path(profile).name == 'fastdds_shm.xml'
    assert not profiles(environment_of_the_node('dds_profile:=false'))
    monkeypatch.setenv('FASTDDS_BUILTIN_TRANSPORTS', 'LARGE_DATA')
    assert not profiles(environment_of_the_node())


def test_lifecycle(active, domain):
    """It holds when."""
    assert ros2('lifecycle', 'nodes', domain_id=domain).stdout.split() == [NODE]
    assert ros2('lifecycle', 'get', NODE, domain_id=domain).stdout.split() == ['active', '[3]']
    refused = ros2('lifecycle', 'set', NODE, 'configure', domain_id=domain)
    assert refused.returncode != 0
    assert 'deactivate' in refused.stdout


def test_param(active, domain):
    """It holds when."""

    def param(*words: str) -> str:
        return ros2('param', *words, domain_id=domain).stdout

    assert {'autostart', 'model_path', 'preprocess.mean'} <= set(param('list', NODE).split())
    assert '2.5' not in param('get', NODE, 'latency_warn_ms')
    assert 'successful' in param('set', NODE, 'latency_warn_ms', '2.5')
    assert '2.5' in param('get', NODE, 'latency_warn_ms')
    assert 'failed' in param('set', NODE, 'latency_warn_ms', '1e30')
    assert 'cannot be changed while active' in param('set', NODE, 'cpu_threads', '2')
    assert 'milliseconds' in param('describe', NODE, 'latency_warn_ms')
    dumped = yaml.safe_load(param('dump', NODE))
    assert dumped[NODE]['ros__parameters']['image_topics'] == [IMAGE_TOPIC]
    assert dumped[NODE]['ros__parameters']['latency_warn_ms'] == 2.5


def test_topic_and_run(active, domain, tmp_path):
    """It holds when: the package's messages, flowing and shown."""

    def topic(*words: str) -> str:
        return ros2('topic', *words, domain_id=domain).stdout

    assert f'{NODE}/tensors [gps_denied_c7_msgs/msg/TensorList]' in topic('list', '-t').splitlines()
    assert 'RELIABLE' in topic('info', '--verbose', f'{NODE}/tensors')
    assert 'lifecycle_state' in topic('echo', '--once', '/diagnostics')
    replay = ('run', 'gps_denied_c7', 'c7_replay', str(record_flight(tmp_path)), '--topics', IMAGE_TOPIC, '--loop')
    with running(*replay, domain_id=domain) as replaying:
        answer = topic('echo', '--once', '--truncate-length', '40', f'{NODE}/tensors')
        assert 'runtime_label: onnx_trt_ep' in answer
        with running('topic', 'hz', '--window', '10', f'{NODE}/tensors', domain_id=domain) as hz:
            found = wait_until(lambda: re.search(r'average rate: ([0-9.]+)', hz.output()), 'a rate', 60.0)
            assert float(found[1]) > 0
        assert replaying.process.poll() is None
        assert replaying.interrupt() == 0
    late = ('--qos-durability', 'transient_local', '--qos-reliability', 'reliable')
    with running('topic', 'echo', *late, f'{NODE}/fdr', domain_id=domain) as fdr:
        wait_until(lambda: 'kind: c7.cpu_fallback' in fdr.output(), 'a flight record from before', 60.0)


@pytest.mark.parametrize('name', ['TensorList', 'Tensor', 'FdrRecord'])
def test_interface_show(name):
    """It holds when: with the comments that say shapes and units."""
    done = ros2('interface', 'show', f'gps_denied_c7_msgs/msg/{name}')
    assert done.returncode == 0
    source = REPOSITORY / 'msg' / 'msg' / f'{name}.msg'
    assert set(source.read_text().splitlines()) <= set(done.stdout.splitlines())


def test_executables_and_run():
    """§2: and each explains itself, but for the node, which runs."""
    done = ros2('pkg', 'executables', 'gps_denied_c7')
    commands = ('c7_replay', 'c7_demo', 'c7_bench')
    assert {line.split()[1] for line in done.stdout.splitlines()} >= {'c7_inference_node', *commands}
    for executable in commands:
        shown = ros2('run', 'gps_denied_c7', executable, '--help')
        assert (shown.returncode, shown.stdout.split()[:2]) == (0, ['usage:', executable])


def test_run_the_node(domain):
    """N-8: without launch, and with a name of its own."""
    words = ('run', 'gps_denied_c7', 'c7_inference_node', '--ros-args', '-r', '__node:=extractor')
    with running(*words, domain_id=domain) as command:
        peer = Peer(domain, '/extractor')
        try:
            assert peer.state() == 'unconfigured'
            assert command.interrupt() == 0
            assert 'c7.session_ended' in peer.kinds()
        finally:
            peer.close()
