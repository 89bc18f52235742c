"""What bring-up must show, the same for a node that a test starts and for one that launch starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gps_denied_c7.demo.flight import Camera, Flight, write_flight
from gps_denied_c7.demo.terrain import paint_terrain
from support.harness import ROOT, Peer, wait_until

__all__ = ['IMAGE_TOPIC', 'check_alerts', 'check_answers', 'record_flight', 'replay']

IMAGE_TOPIC = '/camera/image_raw'
ALERTS = ('c7.fallback_to_onnx_trt_ep', 'c7.cpu_fallback')


def record_flight(directory: Path) -> Path:
    """Record three seconds of flight below ``directory`` and return the bag."""
    camera = Camera(IMAGE_TOPIC.rpartition('/')[0], 640, 480, 'mono8', 5.0)
    terrain = paint_terrain(7, size_m=400.0, metres_per_pixel=0.4)
    return write_flight(directory / 'flight', Flight(3.0, (camera,)), terrain=terrain).path


def replay(bag: Path, domain_id: int) -> dict[str, Any]:
    """Play the images of ``bag`` from a c7_replay process, once somebody listens, and return its report."""
    with tempfile.NamedTemporaryFile('r', suffix='.json') as report:
        done = subprocess.run(
            [
                sys.executable, '-m', 'gps_denied_c7.ros.replay_main', str(bag), '--topics', IMAGE_TOPIC,
                '--wait-matched', '60', '--no-progress', '--json', report.name,
            ],
            cwd=tempfile.gettempdir(),
            env={
                **os.environ,
                'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
                'ROS_DOMAIN_ID': str(domain_id),
            },
            capture_output=True,
            text=True,
            timeout=180,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.load(report)


def check_answers(peer: Peer, sent: int) -> None:
    """
    Check that every frame sent is accounted for, and that each answer says who made it.

    Waits, since the last answers and the counters come after the replay has ended.
    """

    def counters() -> dict[str, int] | None:
        values = peer.values(f'Stream {IMAGE_TOPIC}')
        counted = {name: int(value) for name, value in values.items() if value.isdigit()}
        # A slow machine may push some out of the middleware's queue; they count as dropped.
        arrived = counted.get('received', 0) + counted.get('dropped_in_queue', 0)
        done = arrived == sent and counted['accepted'] == counted['answered']
        return counted if done and len(peer.tensors) == counted['answered'] else None

    try:
        counted = wait_until(counters, f'{sent} frames to be accounted for', 60.0)
    except AssertionError:
        print(peer.values(f'Stream {IMAGE_TOPIC}'), 'arrived:', [answer.frame_seq for answer in peer.tensors])
        raise
    assert counted.get('lost_before_node', 0) == 0
    assert counted['answered'] + counted['dropped_by_policy'] == sent
    assert counted['unanswered'] == 0
    answers = list(peer.tensors)
    assert [answer.frame_seq for answer in answers] == list(range(answers[0].frame_seq, answers[-1].frame_seq + 1))
    stamps = [(answer.header.stamp.sec, answer.header.stamp.nanosec) for answer in answers]
    assert stamps == sorted(set(stamps))
    for answer in answers:
        assert answer.source_topic == IMAGE_TOPIC
        assert (answer.runtime_label, answer.active_provider) == ('onnx_trt_ep', 'CPUExecutionProvider')
        assert answer.is_fallback
        assert [tensor.name for tensor in answer.tensors] == ['keypoints', 'scores', 'descriptors', 'heatmap']


def check_alerts(peer: Peer) -> None:
    """Check that both fallback alerts were recorded once and stand on diagnostics."""
    for kind in ALERTS:
        peer.wait_record(kind)
        (payload,) = peer.payloads(kind)
        assert payload['active_provider'] == 'CPUExecutionProvider'
    peer.wait_level('Runtime', 'WARN')
    assert set(ALERTS) <= set(peer.values('Runtime')['alerts'].split(', '))
