"""A DDS domain per test, loopback only, and the node as a process of its own."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator

import pytest
import rclpy

from support.harness import NodeProcess, Peer, free_domain_id

if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    # Under nohup a node under test would inherit this and leave SIGHUP alone; a handler is not inherited.
    signal.signal(signal.SIGHUP, lambda number, frame: None)


@pytest.fixture
def domain_id() -> Iterator[int]:
    """A domain that only this test uses."""
    with free_domain_id() as number:
        yield number


@pytest.fixture
def ros_context(domain_id: int) -> Iterator[rclpy.Context]:
    """An initialised context on the test's domain."""
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=domain_id)
    yield context
    # rclpy leaves a lifecycle node's services to the collector: better here, where their DDS still runs, than anywhere.
    gc.collect()
    context.try_shutdown()


@pytest.fixture
def peer(domain_id: int) -> Iterator[Peer]:
    """A listener for the default node."""
    listener = Peer(domain_id)
    yield listener
    listener.close()


@pytest.fixture
def near_peer(domain_id: int, ros_context: rclpy.Context) -> Iterator[Peer]:
    """A listener for a node in this process, which shares its DDS participant."""
    listener = Peer(domain_id, context=ros_context)
    yield listener
    listener.close()


@pytest.fixture
def start_node(domain_id: int) -> Iterator[Callable[..., NodeProcess]]:
    """Start node processes on the test's domain, and end what is left of them."""
    processes: list[NodeProcess] = []

    def start(parameters: dict | None = None, arguments: tuple[str, ...] = (), **env: str) -> NodeProcess:
        processes.append(NodeProcess(domain_id, parameters, arguments, **env))
        return processes[-1]

    yield start
    for process in processes:
        process.close()


@pytest.fixture(scope='session')
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of the demo network's bundle."""
    from gps_denied_c7.demo.network import write_demo_bundle

    return str(write_demo_bundle(tmp_path_factory.mktemp('bundle')))
