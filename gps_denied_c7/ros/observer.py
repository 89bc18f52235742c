"""Listen to a node from a separate process and print its messages, one JSON object a line."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from gps_denied_c7_msgs.msg import FdrRecord, TensorList
from numpy.typing import NDArray
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from gps_denied_c7.monitoring.flight_record import read_payload
from gps_denied_c7.ros.helper_node import helper_node
from gps_denied_c7.ros.messages import stage_durations
from gps_denied_c7.ros.shutdown import on_first_signal

__all__ = ['Observer', 'main']

_LARGEST_KEPT_BYTES = 1 << 16


class Observer:
    """
    Subscribe to a node's tensors, flight records and diagnostics.

    :param target: fully qualified name of the node listened to.
    :param report: takes every event, ready for JSON.
    """

    def __init__(self, node: Node, target: str, report: Any) -> None:
        self._target = target
        self._report = report
        self.tensors: dict[str, NDArray] = {}
        # Deeper than the publisher's history: this process may be held up, and what it misses counts as lost.
        answers = QoSProfile(depth=200, reliability=ReliabilityPolicy.RELIABLE)
        records = QoSProfile(
            depth=1000, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
        )
        node.create_subscription(TensorList, f'{target}/tensors', self._on_tensors, answers)
        node.create_subscription(FdrRecord, f'{target}/fdr', self._on_record, records)
        node.create_subscription(DiagnosticArray, '/diagnostics', self._on_diagnostics, 100)

    def _on_tensors(self, message: TensorList) -> None:
        stamp_ns = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
        for tensor in message.tensors:
            if len(tensor.data) <= _LARGEST_KEPT_BYTES:
                array = np.frombuffer(tensor.data, np.dtype(tensor.dtype).newbyteorder('<'))
                key = f'{message.source_topic}|{message.frame_seq}|{tensor.name}'
                self.tensors[key] = array.reshape(tuple(tensor.shape)).copy()
        self._report(
            {
                'event': 'answer',
                'topic': message.source_topic,
                'frame_seq': message.frame_seq,
                'stamp_ns': stamp_ns,
                'source_size': [message.source_width, message.source_height],
                'network_to_image': list(message.network_to_image),
                'model': message.model_name,
                'weights_digest': message.weights_digest,
                'runtime': message.runtime_label,
                'provider': message.active_provider,
                'is_fallback': message.is_fallback,
                'ns': stage_durations(message),
                'tensors': {tensor.name: list(tensor.shape) for tensor in message.tensors},
            }
        )

    def _on_record(self, message: FdrRecord) -> None:
        self._report(
            {
                'event': 'record',
                'kind': message.kind,
                'severity': message.severity,
                'session_id': message.session_id,
                'seq': message.seq,
                'payload': read_payload(message.payload_json),
            }
        )

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        prefix = f'{self._target}: '
        statuses = {
            status.name.removeprefix(prefix): {
                'level': int.from_bytes(status.level, 'little'),
                'message': status.message,
                'values': {value.key: value.value for value in status.values},
            }
            for status in message.status
            if status.name.startswith(prefix)
        }
        if statuses:
            self._report({'event': 'diagnostics', 'statuses': statuses})


def main(args: Sequence[str] | None = None) -> int:
    """Listen until SIGINT or SIGTERM, then write the small tensors of all answers; returns 0."""
    parser = argparse.ArgumentParser(prog='c7_observer', description='Print the messages of an inference node as JSON.')
    parser.add_argument('--node', default='/c7_inference', help='fully qualified name')
    parser.add_argument('--tensors', type=Path, metavar='FILE', help='.npz for tensors of up to 64 KiB each')
    options = parser.parse_args(args)
    stop = threading.Event()
    on_first_signal((signal.SIGINT, signal.SIGTERM), lambda number: stop.set())
    # Fast DDS prints its errors on standard output; they belong on standard error, apart from the events.
    events = os.fdopen(os.dup(sys.stdout.fileno()), 'w', encoding='utf-8')
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with helper_node('c7_observer') as (node, executor):
        observer = Observer(node, options.node, lambda event: print(json.dumps(event), file=events, flush=True))
        while not stop.is_set():
            executor.spin_once(timeout_sec=0.1)
        if options.tensors is not None:
            np.savez(options.tensors, **observer.tensors)  # type: ignore[arg-type]
    return 0


if __name__ == '__main__':
    sys.exit(main())
