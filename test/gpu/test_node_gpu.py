"""The whole node on the GPU over a replayed flight, with an engine that loads and with one that is refused."""

from __future__ import annotations

import json
import os
import shutil
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gps_denied_c7.monitoring.metrics import STAGES
from support.gpu.node_stack import MISSING
from support.gpu.results import percentiles, record

WARM_UP, FRAMES = 30, 300
PATIENCE_S, LOST = 1.0, 30

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

if not MISSING:
    from support.harness import NodeProcess, Peer, free_domain_id, image, running_node, wait_until
    from support.scenario import IMAGE_TOPIC, record_flight, replay


    STREAM = f'Stream {IMAGE_TOPIC}'


@pytest.fixture(scope='module')
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_flight(tmp_path_factory.mktemp('bag'))


@pytest.fixture
def flown(superpoint_bundle: Path, bag: Path, flight_caches: dict[str, str]) -> Iterator[Any]:
    """Fly the bag through a node with further parameters; return its answers, records and diagnostics."""

    def fly(**parameters: Any) -> dict[str, Any]:
        with free_domain_id() as domain_id:
            os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'
            start = time.monotonic()
            node = NodeProcess(
                domain_id,
                {
                    'autostart': True,
                    'model_path': str(superpoint_bundle),
                    'image_topics': [IMAGE_TOPIC],
                    **flight_caches,
                    **parameters,
                },
            )
            peer = Peer(domain_id)
            asked = []
            try:

                def active() -> bool:
                    began = time.monotonic()
                    state = peer.state()
                    asked.append(time.monotonic() - began)
                    return state == 'active'

                wait_until(active, 'state active', 300.0)
                start_s = time.monotonic() - start
                wait_until(lambda: peer.values('Runtime').get('standby') not in (None, 'none'), 'a standby', 60.0)
                (topic,) = replay(bag, domain_id)['topics']
                sent = str(topic['sent'])
                wait_until(lambda: peer.values(STREAM).get('received') == sent, f'{sent} images', 10.0)
                wait_until(lambda: peer.values('Latency').get('frames') == sent, f'{sent} answers', 10.0)
                # They may come after the diagnostics that count them.
                wait_until(lambda: len(peer.tensors) == topic['sent'], f'{sent} answers to arrive', 30.0)
                return {
                    'sent': topic['sent'],
                    'answers': list(peer.tensors),
                    'kinds': peer.kinds(),
                    'runtime': peer.status('Runtime'),
                    'latency': {key: value for key, value in peer.values('Latency').items() if key.endswith('p50_ms')},
                    'start_to_active_s': round(start_s, 2),
                    # The first question waits for the process to come up, too.
                    'slowest_get_state_ms': round(max(asked[1:]) * 1e3, 1),
                }
            except AssertionError:
                print(*(peer.values(name) for name in (STREAM, 'Latency', 'Runtime')), sep='\n')
                print('arrived', [answer.frame_seq for answer in peer.tensors], sorted(os.listdir('/dev/shm')))
                raise
            finally:
                node.close()
                peer.close()

    yield fly


def test_node_builds_on_configure_and_flies_on_tensorrt(flown: Any) -> None:
    """R-2, F-5: built with progress while services answer, then served from the cache without a build."""
    built = flown(build_on_configure=True)
    cached = flown()
    for flight in (built, cached):
        assert {answer.runtime_label for answer in flight['answers']} == {'tensorrt'}
        assert not any(answer.is_fallback for answer in flight['answers'])
        assert len(flight['answers']) == flight['sent']
        assert not {'c7.cpu_fallback', 'c7.fallback_to_onnx_trt_ep'} & set(flight['kinds'])
    for name, flight in (('with a build', built), ('from the cache', cached)):
        record(
            f'node on TensorRT, {name}',
            frames=f'{len(flight["answers"])} of {flight["sent"]}',
            start_to_active_s=flight['start_to_active_s'],
            slowest_get_state_ms=flight['slowest_get_state_ms'],
            **flight['latency'],
        )


@pytest.mark.parametrize('camera', ['640x480 mono8', '1920x1080 rgb8'])
def test_where_the_time_goes(superpoint_bundle: Path, flight_caches: dict[str, str], camera: str) -> None:
    """Each stage in the node at 30 Hz, with a worker and without, and what a frame takes from camera to listener."""
    size, encoding = camera.split()
    width, height = map(int, size.split('x'))
    step = width * (3 if encoding == 'rgb8' else 1)
    data = array('B', bytes(range(256)) * (step * height // 256))
    for isolation in ('process', 'none'):
        parameters = {'model_path': str(superpoint_bundle), 'isolation': isolation, **flight_caches}
        took_s: list[float] = []
        lost = 0
        with running_node({**parameters, 'build_on_configure': True}) as (_, peer):
            peer.start()
            publisher = peer.wait_matched(IMAGE_TOPIC)
            for number in range(1, WARM_UP + FRAMES + 1):
                message = image(number, width=width, height=height, encoding=encoding, step=step, data=data)
                started = time.monotonic()
                publisher.publish(message)
                # What the transport loses on its way to the node, a best-effort reader is not sent again.
                while len(peer.tensors) < number - lost and time.monotonic() - started < PATIENCE_S:
                    time.sleep(0.0002)
                if len(peer.tensors) < number - lost:
                    lost += 1
                    assert lost < LOST, (peer.values(STREAM), shutil.disk_usage('/dev/shm'))
                elif number > WARM_UP:
                    took_s.append(time.monotonic() - started)
                time.sleep(max(0.0, started + 1 / 30 - time.monotonic()))
            assert {answer.runtime_label for answer in peer.tensors} == {'tensorrt'}
            total = str(len(peer.tensors))
            wait_until(lambda peer=peer, total=total: peer.values('Latency').get('frames') == total, 'the last frame')
            values = peer.values('Latency')
        stages = {
            stage: {**{f'{p}_ms': float(values[f'{stage}_{p}_ms']) for p in ('p50', 'p95', 'p99')}, 'n': int(total)}
            for stage in STAGES
            if f'{stage}_p50_ms' in values
        }
        record(
            f'node, {camera}, isolation {isolation}', **stages, camera_to_listener=percentiles(took_s), lost=lost
        )


def test_node_with_a_refused_engine_flies_on_onnxruntime_on_the_gpu(
    flown: Any, flight_caches: dict[str, str], tmp_path: Path
) -> None:
    """AC-3, AC-5: the gate refuses a damaged engine, ONNX Runtime serves on the GPU, with the alert."""
    shutil.copytree(flight_caches['engine_cache_dir'], tmp_path / 'engines')
    (engine,) = (tmp_path / 'engines').glob('*.engine')
    plan = bytearray(engine.read_bytes())
    plan[len(plan) // 2] ^= 0x40
    engine.write_bytes(plan)
    flight = flown(engine_cache_dir=str(tmp_path / 'engines'))
    assert {answer.runtime_label for answer in flight['answers']} == {'onnx_trt_ep'}
    providers = {answer.active_provider for answer in flight['answers']}
    assert providers <= {'TensorrtExecutionProvider', 'CUDAExecutionProvider'}
    assert len(flight['answers']) == flight['sent']
    assert flight['kinds'].count('c7.fallback_to_onnx_trt_ep') == 1
    assert 'c7.cpu_fallback' not in flight['kinds']
    record(
        'node with a refused engine',
        frames=f'{len(flight["answers"])} of {flight["sent"]}',
        provider=', '.join(providers),
        alerts=json.dumps(sorted(kind for kind in flight['kinds'] if 'fallback' in kind)),
        start_to_active_s=flight['start_to_active_s'],
        **flight['latency'],
    )
