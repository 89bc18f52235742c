"""The memory of images: what large ones took comes back, and does not stay with the node for good."""

from __future__ import annotations

from array import array
from pathlib import Path

from support.harness import NodeProcess, image, running_node, wait_until

CAMERA = '/camera/image_raw'
SIDE = 8192


def own_bytes(process: NodeProcess) -> int:
    """Return what a node has of memory that it shares with no process: without the segments of Fast DDS."""
    status = Path(f'/proc/{process.process.pid}/status').read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith('RssAnon:'))


def test_n7_the_memory_that_large_images_took_comes_back_once_they_have_stopped(demo_bundle):
    """While the camera is still there and its small images go on: nothing is restarted for it."""
    with running_node({'model_path': demo_bundle, 'cpu_threads': 1}) as (process, peer):
        peer.start()
        peer.wait_matched(CAMERA)
        wait_until(lambda: peer.values('Runtime').get('standby') not in (None, 'none'), 'a standby')
        peer.ask(CAMERA, image(1))
        before = own_bytes(process)
        for encoding in ('mono8', 'bayer_rggb8', 'mono8', 'bayer_rggb8'):
            large = image(2, width=SIDE, height=SIDE, encoding=encoding, data=array('B', bytes(SIDE**2)))
            # The second comes while the first is taken.
            peer.publisher(CAMERA).publish(large)
            peer.ask(CAMERA, large)

        def is_back() -> bool:
            peer.publisher(CAMERA).publish(image(3))
            return own_bytes(process) - before < SIDE**2 // 2

        wait_until(is_back, 'the memory of the large images to come back')
