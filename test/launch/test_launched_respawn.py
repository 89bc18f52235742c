"""§8: killed with SIGKILL under launch, the node comes back and becomes active by itself."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

# launch_test does not read pytest's settings.
sys.path.append(str(Path(__file__).parents[1]))

from support.harness import image, wait_until
from support.launching import NODE_PROCESS, LaunchCase, Rig, assertExitCodes, parametrize, post_shutdown_test
from support.scenario import IMAGE_TOPIC, check_alerts


@pytest.mark.launch_test
@parametrize('respawn_delay', ['0.2', '2.0'])
def generate_test_description(respawn_delay):
    """Launch with respawn, as is the default."""
    rig = Rig('/c7_inference')
    return rig.description(model=rig.bundle(), image_topics=IMAGE_TOPIC, respawn_delay=respawn_delay)


class Respawn(LaunchCase):
    """While it runs."""

    def test_a_killed_node_is_active_again(self, rig, proc_info, respawn_delay):
        """N-2: and it answers and alerts as before."""
        rig.peer.wait_state('active')
        rig.peer.wait_record('c7.session_started')
        camera = rig.peer.wait_matched(IMAGE_TOPIC)
        first = proc_info[NODE_PROCESS].pid
        os.kill(first, signal.SIGKILL)
        killed = time.monotonic()

        def flies_on() -> bool:
            # As a camera that knows nothing of all this.
            camera.publish(image(width=640, height=480))
            time.sleep(1 / 30)
            return bool(rig.peer.tensors)

        wait_until(flies_on, 'a tensor of the new process')
        print(f'respawn_delay {respawn_delay} s: first tensor {time.monotonic() - killed:.2f} s after SIGKILL')
        wait_until(lambda: proc_info[NODE_PROCESS].pid != first, 'the process to be started again')
        # A new peer: the old one still knows the dead node's services.
        peer = rig.listen()
        peer.wait_state('active')
        print(f'respawn_delay {respawn_delay} s: active {time.monotonic() - killed:.2f} s after SIGKILL')
        peer.wait_matched(IMAGE_TOPIC)
        assert peer.ask(IMAGE_TOPIC, image(width=640, height=480)).runtime_label == 'onnx_trt_ep'
        check_alerts(peer)
        (session,) = {record.session_id for record in peer.records}
        # Who listened before the node died hears it again, and can tell the two apart.
        wait_until(lambda: {record.session_id for record in rig.peer.records} > {session}, 'the new session', 60.0)


@post_shutdown_test()
class End(LaunchCase):
    """After Ctrl-C."""

    def test_it_ended_in_order(self, rig, proc_info):
        """N-8: and launch did not start it once more."""
        self.addCleanup(rig.close)
        assertExitCodes(proc_info)
        assert 'c7.session_ended' in rig.peer.kinds()
