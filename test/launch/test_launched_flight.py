"""§8: launched, the node becomes active, answers a replayed flight, tells of its fallback, and ends with code 0."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# launch_test does not read pytest's settings.
sys.path.append(str(Path(__file__).parents[1]))

from support.launching import LaunchCase, Rig, assertExitCodes, parametrize, post_shutdown_test
from support.scenario import IMAGE_TOPIC, check_alerts, check_answers, replay


@pytest.mark.launch_test
@parametrize('autostart, namespace, name', [('true', '', 'c7_inference'), ('false', 'drone1', 'extractor')])
def generate_test_description(autostart, namespace, name):
    """Launch once as a drone does, once as a lifecycle manager does."""
    rig = Rig('/'.join(['', *filter(None, [namespace, name])]))
    return rig.description(
        autostart=autostart, namespace=namespace, name=name, model=rig.bundle(), image_topics=f'[{IMAGE_TOPIC}]'
    )


class Flight(LaunchCase):
    """While it runs."""

    def test_a_flight_is_answered_and_the_fallback_is_told(self, rig, autostart):
        """N-1, N-2, N-3, F-2."""
        if autostart == 'false':
            assert rig.peer.state() == 'unconfigured'
            rig.peer.start()
        rig.peer.wait_state('active')
        (topic,) = replay(rig.bag(), rig.domain_id)['topics']
        assert topic['sent'] == topic['recorded'] == 15
        check_answers(rig.peer, topic['sent'])
        check_alerts(rig.peer)
        check_alerts(rig.listen())


@post_shutdown_test()
class End(LaunchCase):
    """After Ctrl-C."""

    def test_it_ended_in_order(self, rig, proc_info):
        """N-8."""
        self.addCleanup(rig.close)
        assertExitCodes(proc_info)
        assert 'c7.session_ended' in rig.peer.kinds()
