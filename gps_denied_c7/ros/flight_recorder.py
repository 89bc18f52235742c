"""Publish flight records in every lifecycle state."""

from __future__ import annotations

import time

from gps_denied_c7_msgs.msg import FdrRecord as FdrRecordMsg
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from gps_denied_c7.monitoring.flight_record import FdrRecord, FdrRecorder
from gps_denied_c7.ros.messages import to_fdr_message

__all__ = ['FDR_QOS', 'FlightRecorder']


def _fdr_qos(depth: int) -> QoSProfile:
    return QoSProfile(
        depth=depth, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
    )


FDR_QOS = _fdr_qos(1000)

# A subscriber with FDR_QOS has one queue for both histories: together they must not overflow it.
_REPEATING_DEPTH = 200

_POLL_S = 0.01


class FlightRecorder(FdrRecorder):
    """
    Publish records on ``~/fdr`` for as long as the process lives.

    A lifecycle publisher would lose what is published before activation. Two writers share the topic:
    a late subscriber gets the history of both, and no flood of repeating kinds can push a one-shot
    out of the history of the other.
    """

    def __init__(self, node: Node) -> None:
        self._one_shots = node.create_publisher(FdrRecordMsg, '~/fdr', _fdr_qos(FDR_QOS.depth - _REPEATING_DEPTH))
        self._repeating = node.create_publisher(FdrRecordMsg, '~/fdr', _fdr_qos(_REPEATING_DEPTH))
        super().__init__(
            self._publish_record,
            node=node.get_fully_qualified_name(),
            ros_time_ns=lambda: node.get_clock().now().nanoseconds,
        )

    def _publish_record(self, record: FdrRecord) -> None:
        publisher = self._repeating if record.repeating else self._one_shots
        publisher.publish(to_fdr_message(record))

    def drain(self, timeout_s: float) -> bool:
        """Wait until every matched subscriber has acknowledged everything; False on timeout."""
        deadline = time.monotonic() + timeout_s
        # Without waiting in there: rclpy holds the interpreter's lock meanwhile, so that no other thread could
        # end a process whose wait, by a clock that is set back, takes longer than was asked.
        while not all(publisher.wait_for_all_acked(Duration()) for publisher in (self._one_shots, self._repeating)):
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)
        return True
