"""A peer on the same DDS domain as the node under test, and the node as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from gps_denied_c7_msgs.msg import FdrRecord, TensorList
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import Parameter as ParameterMsg
from rcl_interfaces.srv import GetParameters, SetParameters, SetParametersAtomically
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image

from gps_denied_c7.demo import ros_domain
from gps_denied_c7.monitoring.flight_record import in_order
from gps_denied_c7.ros.callbacks import PoolExecutor
from gps_denied_c7.ros.fastdds import named_profile, ports_in_force
from gps_denied_c7.ros.flight_recorder import FDR_QOS
from gps_denied_c7.ros.node import DEFAULT_NODE_NAME, TENSORS_QOS, C7InferenceNode

__all__ = [
    'LocalNode', 'NodeProcess', 'Peer', 'free_domain_id', 'image', 'reliable', 'running_node', 'tensor', 'wait_until',
]  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]

TRANSITIONS = {
    'configure': Transition.TRANSITION_CONFIGURE,
    'activate': Transition.TRANSITION_ACTIVATE,
    'deactivate': Transition.TRANSITION_DEACTIVATE,
    'cleanup': Transition.TRANSITION_CLEANUP,
}
USUAL_SERVICES = {
    'get_state': GetState,
    'change_state': ChangeState,
    'get_parameters': GetParameters,
    'set_parameters': SetParameters,
}
STEADY = ('unconfigured', 'inactive', 'active', 'finalized')
LEVELS = {DiagnosticStatus.OK: 'OK', DiagnosticStatus.WARN: 'WARN', DiagnosticStatus.ERROR: 'ERROR'}


def free_domain_id() -> contextlib.AbstractContextManager[int]:
    """Hold a ROS domain in which there is nothing; each call begins with the next one."""
    return ros_domain.free_domain_id(ports_in_force(os.environ))


@contextlib.contextmanager
def eager_discovery() -> Iterator[None]:
    """Let a participant of this process that is made meanwhile be found fast."""
    variable = named_profile(os.environ)
    before = os.environ.get(variable, '')
    if before:
        os.environ[variable] = str(Path(__file__).with_name('eager_discovery.xml'))
    yield
    if before:
        os.environ[variable] = before


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 30.0) -> Any:
    """Return the first true value of ``condition``, or fail saying ``what`` was awaited."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f'waited {timeout_s:.0f} s for {what}'
        time.sleep(0.01)
    return value


def image(number: int = 1, *, width: int = 64, height: int = 48, encoding: str = 'mono8', **fields: Any) -> Image:
    """Return a well-formed mono8 image stamped ``number`` seconds, or one with ``fields`` changed."""
    message = Image(width=width, height=height, encoding=encoding, step=width)
    message.header.stamp.sec = number
    message.header.frame_id = f'camera {number}'
    if 'data' not in fields:
        message.data = bytes(range(256)) * (width * height // 256)
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def tensor(answer: TensorList, name: str) -> np.ndarray:
    """Return one tensor of an answer as its message describes it."""
    (message,) = [tensor for tensor in answer.tensors if tensor.name == name]
    dtype = np.dtype(message.dtype).newbyteorder('<')
    assert len(message.data) == dtype.itemsize * int(np.prod(message.shape, dtype=np.int64))
    return np.frombuffer(bytes(message.data), dtype).reshape(message.shape)


class Peer:
    """
    Listen to a node and ask its services, from a context and threads of its own.

    :param node: fully qualified name of the node under test.
    :param context: an initialised context to join, its owner's to end, instead of one of its own.
    """

    def __init__(
        self, domain_id: int, node: str = f'/{DEFAULT_NODE_NAME}', *, context: rclpy.Context | None = None
    ) -> None:
        self.node_name = node
        self.tensors: list[TensorList] = []
        self.records: list[FdrRecord] = []
        self.diagnostics: list[DiagnosticArray] = []
        self.context = context or rclpy.Context()
        self._owns_context = context is None
        with eager_discovery():
            if context is None:
                rclpy.init(context=self.context, domain_id=domain_id)
            self.node = rclpy.create_node('test_peer', context=self.context)
        self.node.create_subscription(TensorList, f'{node}/tensors', self.tensors.append, TENSORS_QOS)
        self.node.create_subscription(FdrRecord, f'{node}/fdr', self.records.append, FDR_QOS)
        self.node.create_subscription(DiagnosticArray, '/diagnostics', self.diagnostics.append, 10)
        self._publishers: dict[str, Any] = {}
        self._clients: dict[str, Any] = {}
        # Not rclpy's own with several threads, which now and then serves nothing for seconds: with a depth of five,
        # answers that the node has given are lost meanwhile.
        self._executor = PoolExecutor(2, on_escape=self._escaped, context=self.context, pause_s=0.0)
        self._executor.add_node(self.node)
        self._thread = threading.Thread(target=self._executor.spin, daemon=True)
        self._thread.start()

    def _escaped(self, error: Exception) -> None:
        print(f'the peer met {error!r}')

    def close(self) -> None:
        """Leave the domain."""
        self._executor.stop()
        self._thread.join(5.0)
        self._executor.shutdown(timeout_sec=1.0)
        self.node.destroy_node()
        if self._owns_context:
            self.context.try_shutdown()

    # --- services ---------------------------------------------------------------------------------

    def call(self, service_type: type, service: str, request: Any, timeout_s: float = 30.0) -> Any:
        """Return the answer of ``<node>/<service>``."""
        answer = self._wait_answer(self._client(service_type, service, timeout_s).call_async(request), timeout_s)
        assert answer is not None, f'{service} did not answer within {timeout_s:.0f} s'
        return answer

    def look_up(self, service_type: type, service: str, request: Any, timeout_s: float = 30.0) -> Any:
        """Return the answer of a service that may be asked twice, asking again where a request was lost."""
        client = self._client(service_type, service, timeout_s)
        deadline = time.monotonic() + timeout_s
        while (answer := self._wait_answer(client.call_async(request), 3.0)) is None:
            assert time.monotonic() < deadline, f'{service} did not answer within {timeout_s:.0f} s'
        return answer

    def _client(self, service_type: type, service: str, timeout_s: float = 30.0) -> Any:
        if service not in self._clients:
            # Those that nearly every test uses come together, to wait once.
            new = {service: service_type} if self._clients else {**USUAL_SERVICES, service: service_type}
            for name, type_ in new.items():
                self._clients[name] = self.node.create_client(type_, f'{self.node_name}/{name}')
            for name in new:
                # rclpy's wait_for_service looks four times a second.
                wait_until(self._clients[name].service_is_ready, f'the service {name}', timeout_s)
            # The service may get to know its client a moment later, and would not find it with its answer.
            time.sleep(0.2)
        return self._clients[service]

    def _wait_answer(self, future: Any, timeout_s: float) -> Any:
        done = threading.Event()
        future.add_done_callback(lambda _: done.set())
        return future.result() if done.wait(timeout_s) else None

    def state(self, timeout_s: float = 30.0) -> str:
        """Return the lifecycle state's label."""
        return self.look_up(GetState, 'get_state', GetState.Request(), timeout_s).current_state.label

    def change_state(self, label: str, timeout_s: float = 60.0) -> bool:
        """Ask for a transition and return whether it succeeded."""
        before = self.state()
        future = self.ask_change_state(label)
        deadline = time.monotonic() + timeout_s
        while (answer := self._wait_answer(future, 3.0)) is None:
            if (state := self.state()) in STEADY:
                return state != before
            assert time.monotonic() < deadline, f'{label} was not answered within {timeout_s:.0f} s'
        return answer.success

    def ask_change_state(self, label: str) -> Any:
        """
        Ask for a transition and return the future of its answer once the node has begun with it.

        The first request or answer after a match is now and then lost, with rclpy's own nodes too.
        """
        before = self.state()
        client = self._client(ChangeState, 'change_state')
        request = ChangeState.Request(transition=Transition(id=TRANSITIONS.get(label, 0), label=label))
        while True:
            future = client.call_async(request)
            ask_again = time.monotonic() + 3.0
            while time.monotonic() < ask_again:
                if self._wait_answer(future, 0.1) is not None or self.state() != before:
                    return future

    def get_parameter(self, name: str) -> Any:
        """Return a parameter's value message."""
        return self.look_up(GetParameters, 'get_parameters', GetParameters.Request(names=[name])).values[0]

    def set_parameter(self, name: str, value: Any) -> Any:
        """Set a parameter and return the SetParametersResult."""
        message: ParameterMsg = Parameter(name, value=value).to_parameter_msg()
        return self.look_up(SetParameters, 'set_parameters', SetParameters.Request(parameters=[message])).results[0]

    def set_together(self, **values: Any) -> Any:
        """Set parameters in one request and return its SetParametersResult."""
        messages = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        request = SetParametersAtomically.Request(parameters=messages)
        return self.look_up(SetParametersAtomically, 'set_parameters_atomically', request).result

    def wait_state(self, label: str, timeout_s: float = 60.0) -> None:
        """Wait for a lifecycle state."""
        wait_until(lambda: self.state() == label, f'state {label}', timeout_s)

    def start(self, label: str = 'active') -> None:
        """Take the node to ``inactive`` or ``active`` by transitions that must succeed."""
        for transition in ('configure', 'activate')[: 1 if label == 'inactive' else 2]:
            assert self.change_state(transition), f'{transition} failed: {self.message("Runtime")}'

    # --- topics -----------------------------------------------------------------------------------

    def publisher(self, topic: str, message_type: type = Image, qos: QoSProfile | None = None) -> Any:
        """Return a publisher of ``topic``, reliable by default so that a test loses nothing on its own side."""
        if topic not in self._publishers:
            profile = qos or QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE)
            self._publishers[topic] = self.node.create_publisher(message_type, topic, profile)
        return self._publishers[topic]

    def wait_matched(self, topic: str, message_type: type = Image, timeout_s: float = 30.0) -> Any:
        """Return the publisher of ``topic`` once a subscription has matched it."""
        publisher = self.publisher(topic, message_type)
        wait_until(lambda: publisher.get_subscription_count() > 0, f'a subscription of {topic}', timeout_s)
        # The other end may match a moment later; what leaves before is lost for a best-effort reader.
        time.sleep(0.3)
        return publisher

    def ask(self, topic: str, message: Any, timeout_s: float = 30.0) -> TensorList:
        """Publish one image on a matched topic and return its answer."""
        before = len(self.tensors)
        self.publisher(topic, type(message)).publish(message)
        wait_until(lambda: len(self.tensors) > before, f'an answer to an image on {topic}', timeout_s)
        return self.tensors[before]

    def kinds(self) -> list[str]:
        """Return the kinds of the flight records received so far, in the order in which they were written."""
        return [record.kind for record in in_order(self.records, lambda record: (record.session_id, record.seq))]

    def payloads(self, kind: str) -> list[dict[str, Any]]:
        """Return the payloads of the flight records of one kind."""
        return [json.loads(record.payload_json) for record in list(self.records) if record.kind == kind]

    def status(self, name: str) -> Any:
        """Return the latest diagnostic status called ``name``, None before the first."""
        for message in reversed(list(self.diagnostics)):
            for status in message.status:
                if status.name == f'{self.node_name}: {name}':
                    return status
        return None

    def wait_record(self, kind: str, timeout_s: float = 30.0) -> dict[str, Any]:
        """Return the payload of the first flight record of ``kind``."""
        return wait_until(lambda: self.payloads(kind), f'a record {kind}', timeout_s)[0]

    def wait_values(self, name: str, known: dict[str, str], timeout_s: float = 30.0) -> None:
        """Wait for a diagnostic status to have all of ``known`` among its values."""
        deadline = time.monotonic() + timeout_s
        while not (values := self.values(name)).items() >= known.items():
            assert time.monotonic() < deadline, f'{name}: waited {timeout_s:.0f} s for {known}, last was {values}'
            time.sleep(0.01)

    def level(self, name: str) -> str:
        """Return the latest level of the diagnostic status called ``name``: OK, WARN, ERROR, or '' before the first."""
        status = self.status(name)
        return LEVELS[status.level] if status else ''

    def message(self, name: str) -> str:
        """Return the latest message of the diagnostic status called ``name``."""
        status = self.status(name)
        return status.message if status else ''

    def wait_level(self, name: str, level: str, timeout_s: float = 30.0) -> None:
        """Wait for a diagnostic status to have a level."""
        wait_until(lambda: self.level(name) == level, f'{name} at {level}', timeout_s)

    def values(self, name: str) -> dict[str, str]:
        """Return the key-value pairs of the latest diagnostic status called ``name``."""
        status = self.status(name)
        return {pair.key: pair.value for pair in status.values} if status else {}


class LocalNode:
    """
    Run the node in this process, on a real executor, for what needs a hand inside it.

    :param parameters: of the node.
    """

    def __init__(self, context: rclpy.Context, *, thermal: Any = None, **parameters: Any) -> None:
        self.node = C7InferenceNode(
            context=context,
            thermal=thermal,
            parameter_overrides=[Parameter(name, value=value) for name, value in parameters.items()],
        )
        self._executor = PoolExecutor(
            4, on_escape=lambda error: self.node.report_callback_failure('executor', error), context=context
        )
        self._executor.add_node(self.node)
        self._thread = threading.Thread(target=self._executor.spin, daemon=True)
        self._thread.start()

    def set(self, name: str, value: Any) -> Any:
        """Set a parameter and return the result."""
        return self.node.set_parameters([Parameter(name, value=value)])[0]

    def chain(self) -> Any:
        """Return the status of the loaded chain."""
        return self.node._model.current.model.chain.status()

    @property
    def streams(self) -> Any:
        """The ImageTopics of a node that is active."""
        return self.node._answering.streams

    def close(self) -> None:
        """Shut the node down."""
        self.node.end('test', timeout_s=5.0)
        self._executor.stop()
        self._thread.join(5.0)
        self._executor.shutdown(timeout_sec=1.0)
        self.node.destroy_node()


def reliable(*topics: str, depth: int = 2000) -> dict[str, Any]:
    """Return QoS overrides with which, at this depth, a busy machine loses no image before the node."""
    return {
        f'qos_overrides.{topic}.subscription.{name}': value
        for topic in topics
        for name, value in (('reliability', 'reliable'), ('depth', depth))
    }


@contextlib.contextmanager
def active_node(context: rclpy.Context, topic: str, model_path: str) -> Iterator[LocalNode]:
    """A node in this process that is active and misses no image of ``topic`` on the way; shut down at the end."""
    local = LocalNode(context, model_path=model_path, cpu_threads=1, **reliable(topic, depth=5))
    try:
        assert local.node.transition('configure') and local.node.transition('activate')
        yield local
    finally:
        local.close()


class NodeProcess:
    """
    Run ``c7_inference_node`` as a process of its own.

    :param parameters: of the node; each value is written as YAML.
    :param arguments: further ``--ros-args`` words.
    """

    def __init__(
        self, domain_id: int, parameters: dict[str, Any] | None = None, arguments: tuple[str, ...] = (), **env: str
    ) -> None:
        words = [sys.executable, '-m', 'gps_denied_c7.ros.node_main', '--ros-args', *arguments]
        for name, value in (parameters or {}).items():
            words += ['-p', f'{name}:={json.dumps(value)}']
        self.log = tempfile.NamedTemporaryFile('w+', suffix='.log', prefix='c7-node-')  # noqa: SIM115
        self.process = subprocess.Popen(
            words,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            cwd=tempfile.gettempdir(),
            env={
                **os.environ,
                'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
                'ROS_DOMAIN_ID': str(domain_id),
                'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST',
                **env,
            },
        )

    def output(self) -> str:
        """Return everything the process has printed."""
        return Path(self.log.name).read_text(errors='replace')

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 30.0) -> int:
        """Return the exit code."""
        return self.process.wait(timeout_s)

    def shared_memory(self) -> set[Path]:
        """Return the files of the shared memory that Fast DDS holds for the process."""
        opened = []
        for link in Path(f'/proc/{self.process.pid}/fd').glob('*'):
            # It may be closed just then.
            with contextlib.suppress(FileNotFoundError):
                opened.append(os.readlink(link))
        locks = {path for path in opened if re.fullmatch(r'/dev/shm/fast(rtps|dds)_[0-9a-f]{16}_el', path)}
        return {Path(path) for lock in locks for path in (lock, lock.removesuffix('_el'))}

    def close(self) -> None:
        """End the process if it still runs, and hand on what it printed, for pytest to show where a test fails."""
        if self.process.poll() is None:
            segments = self.shared_memory()
            self.process.kill()
            self.process.wait()
            # Fast DDS cannot remove its own, tens of megabytes each, when it is killed.
            for path in segments:
                path.unlink(missing_ok=True)
        print(self.output())
        self.log.close()


@contextlib.contextmanager
def running_node(
    parameters: dict[str, Any] | None = None,
    arguments: tuple[str, ...] = (),
    node: str = f'/{DEFAULT_NODE_NAME}',
    **env: str,
) -> Iterator[tuple[NodeProcess, Peer]]:
    """
    Run a node process on a domain of its own, with a peer.

    Its image subscriptions are reliable unless ``parameters`` say otherwise: what a test publishes arrives.

    :param node: fully qualified name that it is going to have.
    """
    parameters = dict(parameters or {})
    for topic in filter(re.compile(r'/[\w/]+').fullmatch, parameters.get('image_topics', ['/camera/image_raw'])):
        parameters.setdefault(f'qos_overrides.{topic}.subscription.reliability', 'reliable')
    with free_domain_id() as domain_id:
        process = NodeProcess(domain_id, parameters, arguments, **env)
        peer = Peer(domain_id, node)
        try:
            yield process, peer
        finally:
            peer.close()
            process.close()
