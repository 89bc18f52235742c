"""The subscriber to the tensors: one process that notes when it had received each answer."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from gps_denied_c7_msgs.msg import Tensor, TensorList
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription

from gps_denied_c7.bench.commands import CommandLine
from gps_denied_c7.ros.callbacks import SubscriptionReady, Untaken
from gps_denied_c7.ros.helper_node import helper_node
from gps_denied_c7.ros.messages import stage_durations
from gps_denied_c7.ros.rcl import Rcl

__all__ = ['Listener', 'main']


class Listener:
    """
    Collect the answers of every contestant, and what their diagnostics say.

    The answers are taken through rcl, which costs what it costs a consumer written in C++; rclpy would copy the
    tensors once more.

    :param contestants: names of their nodes.
    """

    def __init__(self, node: Node, contestants: Sequence[str]) -> None:
        self._rcl = Rcl(TensorList, Tensor)
        self._tensors = self._rcl.message(TensorList)
        self._answers: dict[str, list[dict[str, int]]] = {name: [] for name in contestants}
        self._statuses: dict[str, dict[str, str]] = {}
        qos = QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE)
        for name in contestants:
            topic = f'/{name}/tensors'
            subscription = node.create_subscription(TensorList, topic, _leave, qos, callback_group=Untaken())
            on_ready = partial(self._on_ready, name, subscription)
            SubscriptionReady(node, subscription, node.default_callback_group, on_ready)
        node.create_subscription(DiagnosticArray, '/diagnostics', self._on_diagnostics, 50)

    def _on_ready(self, name: str, subscription: Subscription) -> None:
        if self._rcl.take(subscription, self._tensors) is None:
            return
        arrival_ns = time.time_ns()
        message = self._tensors.fields
        answer = {f'{stage}_ns': duration for stage, duration in stage_durations(message).items()}
        answer['stamp_ns'] = _nanoseconds(message.header.stamp)
        answer['receive_ns'] = _nanoseconds(message.receive_stamp)
        answer['arrival_ns'] = arrival_ns
        answer['bytes'] = sum(tensor.data.size for tensor in self._rcl.elements(Tensor, message.tensors))
        self._answers[name].append(answer)

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            self._statuses[status.name] = {pair.key: pair.value for pair in status.values}

    def collect(self, name: str) -> list[dict[str, int]]:
        """Return a contestant's answers since the last time."""
        answers, self._answers[name] = self._answers[name], []
        return answers

    def statuses(self, name: str) -> dict[str, dict[str, str]]:
        """Return the values of a node's latest diagnostics by the name of the status."""
        prefix = f'/{name}: '
        return {
            full.removeprefix(prefix): values for full, values in self._statuses.items() if full.startswith(prefix)
        }


def _leave(message: TensorList) -> None:
    raise AssertionError('an executor took what it was to leave')


def _nanoseconds(stamp: Any) -> int:
    return int(stamp.sec) * 10**9 + int(stamp.nanosec)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve commands until standard input ends."""
    parser = argparse.ArgumentParser(prog='c7_bench_listener')
    parser.add_argument('contestants', nargs='+')
    options = parser.parse_args(arguments)
    commands = CommandLine()
    with helper_node('c7_bench_listener') as (node, executor):
        listener = Listener(node, options.contestants)

        def answer(contestant: str) -> dict[str, Any]:
            return {'answers': listener.collect(contestant), 'statuses': listener.statuses(contestant)}

        commands.serve(answer, meanwhile=lambda: executor.spin_once(timeout_sec=0.02))
    return 0


if __name__ == '__main__':
    sys.exit(main())
