"""N-4: while an engine takes long, services and diagnostics go on; test/measure/responsiveness.py says how fast."""

from __future__ import annotations

import threading

from rclpy.qos import QoSProfile, ReliabilityPolicy

from support.harness import image, running_node, wait_until
from support.networks import copying, slow, slow_to_load

CAMERA = '/camera/image_raw'


def test_n4_services_and_diagnostics_answer_while_configure_is_busy(tmp_path):
    """All of it before the load ends, which it does not within this test; a second transition is refused."""
    with running_node({'model_path': slow_to_load(tmp_path, multiplications=5000)}) as (process, peer):
        answer = peer.ask_change_state('configure')
        peer.wait_state('configuring')
        before = len(peer.diagnostics)
        for _ in range(20):
            assert peer.state() == 'configuring'
            assert peer.get_parameter('model_path').string_value.endswith('slow_to_load.onnx')
        assert peer.set_parameter('latency_warn_ms', 7.0).successful, 'a live parameter'
        refused = peer.set_parameter('model_path', copying(tmp_path))
        assert not refused.successful and 'configuring' in refused.reason
        for label in ('configure', 'activate', 'cleanup', 'shutdown'):
            assert not peer.change_state(label, timeout_s=10.0), 'refused at once, not queued'
        assert 'still under way' in process.output()
        wait_until(lambda: len(peer.diagnostics) >= before + 2, 'diagnostics meanwhile')
        assert peer.values('Runtime')['lifecycle_state'] == 'configuring'
        assert peer.state() == 'configuring' and not answer.done()


def test_n4_services_and_diagnostics_answer_under_image_overload(tmp_path):
    """Images come without pause into a network that takes several times as long."""
    best_effort = {f'qos_overrides.{CAMERA}.subscription.reliability': 'best_effort'}
    parameters = {'model_path': slow(tmp_path, multiplications=40), 'cpu_threads': 1, **best_effort}
    with running_node(parameters) as (_, peer):
        peer.start()
        flood = peer.publisher(CAMERA, qos=QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT))
        peer.wait_matched(CAMERA)
        over = threading.Event()

        def camera():
            number = 0
            while not over.wait(1 / 60):
                number += 1
                flood.publish(image(number, width=640, height=480))

        thread = threading.Thread(target=camera)
        thread.start()
        try:
            wait_until(lambda: int(peer.values(f'Stream {CAMERA}').get('dropped_replaced', 0)) > 20, 'an overload')
            before = len(peer.diagnostics)
            for number in range(50):
                assert peer.state() == 'active'
                assert peer.get_parameter('model_path')
                assert peer.set_parameter('latency_warn_ms', float(number)).successful
            wait_until(lambda: len(peer.diagnostics) >= before + 2, 'diagnostics meanwhile')
            answered = len(peer.tensors)
            wait_until(lambda: len(peer.tensors) > answered, 'answers meanwhile')
            assert peer.change_state('deactivate') and peer.change_state('activate')
        finally:
            over.set()
            thread.join()
