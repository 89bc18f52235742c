"""Where subscribing anew fails: the topic is tried again, the others go on, and the end finds nothing left."""

import logging
import threading
from types import SimpleNamespace

import pytest
from sensor_msgs.msg import CompressedImage, Image

from gps_denied_c7.monitoring.metrics import Statistics
from gps_denied_c7.pipeline.image_share import ImageShare
from gps_denied_c7.pipeline.mailbox import FrameSlots
from gps_denied_c7.ros import image_topics
from gps_denied_c7.ros.events import EventReporter
from gps_denied_c7.ros.image_subscription import DEFAULT_QOS
from gps_denied_c7.ros.image_topics import ImageTopics
from support.harness import running_node, wait_until
from support.networks import copying

FRONT, LEFT = '/front', '/left'


class Bench:
    """A stream set around subscriptions, decoders and publishers that the test makes up."""

    def __init__(self, monkeypatch, **types):
        monkeypatch.setattr(image_topics, '_REOPEN_PAUSE_S', 0.0)
        self.published = {FRONT: [], LEFT: []}
        self.open, self.decoding, self.retyped, self.fails, self.attempts = [], [], [], 0, 0
        self.decoders, self.no_threads = [], 0
        statistics = Statistics()
        statistics.open_streams((FRONT, LEFT))
        self.streams = ImageTopics(
            SimpleNamespace(get_publishers_info_by_topic=lambda topic: self.publishers(topic)),
            {FRONT: 'auto', LEFT: 'auto', **types},
            slots=FrameSlots([FRONT, LEFT], on_replaced=lambda frame: None),
            share=ImageShare([FRONT, LEFT], fraction=lambda: 0.5, cores=2.0),
            open_stream=self.open_stream,
            make_decoder=lambda topic: self.decoders.append(topic) or topic,
            make_local_decoder=lambda: None,
            make_thread=self.make_thread,
            events=EventReporter(statistics, self.record, lambda: logging.getLogger('test')),
        )

    def record(self, kind, **payload):
        if kind == 'c7.stream_retyped':
            self.retyped.append((payload['topic'], payload['type'], payload['previous_type']))

    def publishers(self, topic):
        names = [f'sensor_msgs/msg/{kind.__name__}' for kind in self.published[topic]]
        return [
            SimpleNamespace(topic_type=name, node_name='camera', node_namespace='/', qos_profile=DEFAULT_QOS)
            for name in names
        ]

    def open_stream(self, topic, message_type, sink):
        self.attempts += 1
        if self.fails:
            self.fails -= 1
            raise RuntimeError('incompatible type')
        self.open.append((topic, message_type))
        close = lambda: self.open.remove((topic, message_type))  # noqa: E731
        return SimpleNamespace(
            topic=topic, message_type=message_type, sink=sink, qos=DEFAULT_QOS, close=close, count_missed=lambda: None,
            silent_s=0.0,
        )  # fmt: skip

    def make_thread(self, topic, decoder):
        close = lambda: self.decoding.remove(topic)  # noqa: E731

        def start():
            self.decoding.append(topic)
            if self.no_threads:
                self.no_threads -= 1
                raise RuntimeError("can't start new thread")

        return SimpleNamespace(start=start, close=close, join=lambda timeout_s: True, slots=None)


@pytest.fixture
def bench(monkeypatch):
    made = Bench(monkeypatch)
    made.streams.open()
    yield made
    assert made.streams.close(1.0)
    assert made.open == made.decoding == []


def test_a_topic_that_cannot_be_subscribed_anew_at_once_is_tried_again(bench):
    bench.published[FRONT] = [CompressedImage]
    bench.fails = 3
    bench.streams.look()
    assert bench.open == [(LEFT, Image), (FRONT, CompressedImage)] and bench.decoding == [FRONT]
    assert bench.decoders == [FRONT], 'one process, not one for each try'
    assert bench.retyped == [(FRONT, 'sensor_msgs/msg/CompressedImage', 'sensor_msgs/msg/Image')]


def test_a_topic_that_cannot_be_subscribed_anew_for_long_leaves_the_others_alone_and_is_tried_with_every_look(bench):
    bench.published[FRONT] = [CompressedImage]
    bench.fails = 10_000
    for _ in range(3):
        before = bench.attempts
        bench.streams.look()
        assert bench.attempts > before
        assert bench.open == [(LEFT, Image)] and bench.decoding == []
        assert bench.streams.stream(FRONT) is None and bench.streams.stream(LEFT) is not None
        (problem,) = bench.streams.mismatches(FRONT)
        assert 'CompressedImage' in problem and 'incompatible type' in problem
    bench.fails = 0
    bench.streams.look()
    assert bench.streams.mismatches(FRONT) == ()
    assert bench.open == [(LEFT, Image), (FRONT, CompressedImage)]
    assert len(bench.retyped) == 1, 'told once'


def test_a_topic_is_decoded_whose_thread_could_not_be_started_at_first(bench):
    bench.published[FRONT] = [CompressedImage]
    bench.no_threads = 3
    bench.streams.look()
    assert bench.open == [(LEFT, Image), (FRONT, CompressedImage)] and bench.decoding == [FRONT]


def test_publishers_of_both_types_or_of_none_change_nothing(bench):
    bench.published[LEFT] = [Image]
    for published in ([Image, CompressedImage], [CompressedImage, Image], []):
        bench.published[FRONT] = published
        bench.streams.look()
        assert bench.open == [(FRONT, Image), (LEFT, Image)] and bench.retyped == []
        assert len(bench.streams.mismatches(FRONT)) == (CompressedImage in published)
    bench.published[FRONT] = [CompressedImage]
    bench.streams.look()
    bench.published[FRONT] = [CompressedImage, Image]
    bench.streams.look()
    assert (FRONT, CompressedImage) in bench.open and len(bench.retyped) == 1


def test_a_topic_on_which_no_images_come_is_logged_once_until_they_come_and_stop_again(bench, monkeypatch):
    told = []
    monkeypatch.setattr(EventReporter, 'silent', lambda events, topic: told.append(topic))
    for silent_s, lines in ((1.0, 0), (3.0, 1), (4.0, 1), (0.1, 1), (2.5, 2), (60.0, 2)):
        bench.streams.stream(FRONT).silent_s = silent_s
        bench.streams.look()
        assert told == [FRONT] * lines


def test_a_publisher_that_does_not_match_is_logged_in_place_of_the_silence(bench, caplog):
    bench.published[FRONT] = [Image, CompressedImage]
    bench.streams.stream(FRONT).silent_s = 3.0
    bench.streams.look()
    assert [each.getMessage().count('publishes sensor_msgs/msg/CompressedImage') for each in caplog.records] == [1]


def test_each_image_is_answered_once_whenever_diagnostics_look_at_the_streams(monkeypatch):
    """A look before the activation subscribes, or between two of its topics: no topic has two subscriptions."""
    made = Bench(monkeypatch)
    made.streams.look()
    assert made.open == []
    looks = []

    def publishers(topic):
        if topic == LEFT and not looks:
            looks.append(threading.Thread(target=made.streams.look))
            looks[0].start()
            # It waits for the activation to end; without that it subscribes to what is not subscribed to yet.
            looks[0].join(1.0)
        return []

    made.publishers = publishers
    made.streams.open()
    looks[0].join()
    assert made.open == [(FRONT, Image), (LEFT, Image)]
    assert made.streams.close(1.0)


def test_a_topic_that_cannot_be_subscribed_at_first_leaves_nothing_open(monkeypatch):
    made = Bench(monkeypatch, **{FRONT: 'compressed'})
    made.fails = 1
    with pytest.raises(RuntimeError):
        made.streams.open()
    assert made.decoding == [FRONT]
    assert made.streams.close(1.0) and made.streams.close(1.0)
    assert made.open == made.decoding == []
    made.streams.look()
    assert made.open == [], 'not after its end'


def test_n7_a_camera_that_does_not_publish_is_named_in_the_log(tmp_path):
    """Once, and not only on diagnostics, which a terminal does not show."""
    parameters = {'model_path': copying(tmp_path), 'image_topics': ['/wing/image_raw'], 'autostart': True}
    with running_node(parameters) as (process, peer):
        wait_until(lambda: '/wing/image_raw: no image for 2 s. Start the camera' in process.output(), 'the warning')
        wait_until(lambda: float(peer.values('Stream /wing/image_raw').get('silent_s', 0)) > 4.0, 'more looks', 30.0)
        assert process.output().count('/wing/image_raw: no image') == 1
