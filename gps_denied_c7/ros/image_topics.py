"""The image topics while the node is active: the type of each, the thread that decodes it, and its CPU time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rclpy.node import Node
from rclpy.qos import QoSCompatibility, QoSProfile, qos_check_compatible
from sensor_msgs.msg import CompressedImage, Image

from gps_denied_c7.errors import ConfigError
from gps_denied_c7.image.decode import DecodedImage
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec
from gps_denied_c7.pipeline.decode_thread import Decoder, DecodeThread
from gps_denied_c7.pipeline.image_share import ImageShare
from gps_denied_c7.pipeline.mailbox import FrameSlots
from gps_denied_c7.ros.events import SILENT_S, EventReporter
from gps_denied_c7.ros.image_subscription import ImageSubscription
from gps_denied_c7.ros.messages import CompressedData, ReceivedImage, image_type
from gps_denied_c7.ros.parameters import NodeSettings

__all__ = ['CompressedDecoder', 'ImageTopics', 'resolve_topics', 'type_name']

_TYPES: Mapping[str, type[Image] | type[CompressedImage]] = {'raw': Image, 'compressed': CompressedImage}

# CPU time of one thread. OpenCV may use more threads; the images of other topics wait all the time.
_LONG_MS = 10.0
# A subscription ends when no executor waits for it any longer; Fast DDS refuses a second type for a topic until then.
_REOPEN_TRIES, _REOPEN_PAUSE_S = 15, 0.02

_log = logging.getLogger(__name__)


class CompressedDecoder:
    """Decode messages in the decoder process of one compressed topic, which ends with :meth:`close`."""

    def __init__(self, topic: str, *, settings: NodeSettings) -> None:
        # Only for nodes that have a compressed topic.
        from gps_denied_c7.decoder.client import ImageDecoder

        self._decoder = ImageDecoder(
            topic, memory_bytes=settings.decoder_memory_mb << 20, timeout_s=settings.decode_timeout_ms / 1e3
        )

    @property
    def cpu_ns(self) -> int:
        """CPU time of the process so far, nanoseconds."""
        return self._decoder.cpu_ns

    def decode(self, message: ReceivedImage, spec: PreprocessingSpec, *, pixels: bool) -> DecodedImage:
        """Return one image made ready; raises ImageRejectedError."""
        picture = message.picture
        assert isinstance(picture, CompressedData)
        return self._decoder.decode(picture.format, picture.data, spec, pixels=pixels)

    def close(self) -> None:
        """End the process."""
        self._decoder.close()


class _Camera:
    """
    Hold one topic, whatever type it has at the moment.

    :param fixed: its type where a setting says it.
    """

    def __init__(self, topic: str, fixed: type[Image] | type[CompressedImage] | None) -> None:
        self.topic = topic
        self.fixed = fixed
        self.message_type = fixed or image_type(topic)
        self.stream: ImageSubscription | None = None
        self.decoding: DecodeThread | None = None
        self.mismatches: tuple[str, ...] = ()
        self.silent = False


class ImageTopics:
    """
    Own the subscriptions of all image topics, and the threads that decode what the inference thread must not.

    The setting decides the type of a topic, otherwise its publisher. While there are no publishers, or publishers of
    both types, the type stays as it is; at first it follows image_transport's naming rule. Compressed topics have a
    decoder and a thread that waits for it. A raw topic gets a thread as soon as its images delay those of other topics.

    :param types: what ``image_topic_types`` says of each topic, ``auto``, ``raw`` or ``compressed``.
    :param slots: the inference thread's.
    :param open_stream: subscribes to a topic with a message type and a sink.
    :param make_decoder: makes what decodes the compressed images of a topic.
    :param make_local_decoder: makes what decodes raw ones.
    :param make_thread: makes the thread for a topic and its decoder.
    :param events: reports changes of type, publishers that cannot match, and cameras that are slowed.
    """

    def __init__(
        self,
        node: Node,
        types: Mapping[str, str],
        *,
        slots: FrameSlots,
        share: ImageShare,
        open_stream: Callable[[str, type[Image] | type[CompressedImage], FrameSlots], ImageSubscription],
        make_decoder: Callable[[str], Decoder],
        make_local_decoder: Callable[[], Decoder],
        make_thread: Callable[[str, Decoder], DecodeThread],
        events: EventReporter,
    ) -> None:
        self._node = node
        self._slots = slots
        self._open_stream = open_stream
        self._make_decoder = make_decoder
        self._make_local_decoder = make_local_decoder
        self._make_thread = make_thread
        self._events = events
        # Held while a topic is subscribed or given up: the diagnostics timer and a transition may meet.
        self._lock = threading.Lock()
        self._follows = False
        self._ending: list[DecodeThread] = []
        self._cameras = {topic: _Camera(topic, _TYPES.get(setting)) for topic, setting in types.items()}
        self.share = share

    def open(self) -> None:
        """Subscribe to all topics; what a failure leaves open is closed by :meth:`close`."""
        with self._lock:
            for camera in self._cameras.values():
                camera.message_type = self._type_of(camera, self._publishers(camera))
                self._open(camera)
            self._follows = True

    def stream(self, topic: str) -> ImageSubscription | None:
        """Return the subscription of a topic, None where there is none at the moment."""
        return self._cameras[topic].stream

    def mismatches(self, topic: str) -> tuple[str, ...]:
        """Return the publishers that cannot reach the subscription of a topic, and why, as of the last look."""
        return self._cameras[topic].mismatches

    def look(self) -> None:
        """Follow the publishers and the cost of every topic; called regularly, from one thread."""
        for camera in self._cameras.values():
            publishers = self._publishers(camera)
            with self._lock:
                if not self._follows:
                    # A topic that the activation has yet to subscribe to would be subscribed to twice.
                    return
                self._follow_type(camera, publishers)
                if camera.stream is not None:
                    self._take_aside(camera)
                    camera.stream.count_missed()
                    camera.mismatches = tuple(
                        _publisher_mismatches(publishers, camera.message_type, camera.stream.qos)
                    )
                was_silent = camera.silent
                camera.silent = camera.stream is not None and camera.stream.silent_s > SILENT_S
            for problem in camera.mismatches:
                self._events.mismatch(camera.topic, problem)
            if camera.silent and not was_silent and not camera.mismatches:
                self._events.silent(camera.topic)
        for cost in self.share.changes():
            self._events.share_changed(cost)

    def close(self, timeout_s: float) -> bool:
        """
        End all subscriptions, decoders and threads; again where something failed.

        :return: False where a thread still decodes after ``timeout_s``; it ends as soon as its decoder returns.
        """
        with self._lock:
            self._follows = False
            for camera in self._cameras.values():
                self._shut(camera)
            ending, self._ending = self._ending, []
        deadline = time.monotonic() + timeout_s
        return all(thread.join(max(0.0, deadline - time.monotonic())) for thread in ending)

    def _publishers(self, camera: _Camera) -> list[Any]:
        return list(self._node.get_publishers_info_by_topic(camera.topic))

    def _type_of(self, camera: _Camera, publishers: list[Any]) -> type[Image] | type[CompressedImage]:
        """Return the type that a topic is to be subscribed with now."""
        if camera.fixed is not None:
            return camera.fixed
        published = {publisher.topic_type for publisher in publishers}
        found = [message_type for message_type in _TYPES.values() if type_name(message_type) in published]
        return found[0] if len(found) == 1 else camera.message_type

    def _open(self, camera: _Camera) -> None:
        sink = self._slots
        if camera.message_type is CompressedImage:
            decoding = camera.decoding or self._begin_decoding(camera, self._make_decoder(camera.topic))
            sink = decoding.slots
        camera.stream = self._open_stream(camera.topic, camera.message_type, sink)

    def _begin_decoding(self, camera: _Camera, decoder: Decoder) -> DecodeThread:
        thread = self._make_thread(camera.topic, decoder)
        try:
            thread.start()
        except BaseException:
            thread.close()
            raise
        camera.decoding = thread
        return thread

    def _shut(self, camera: _Camera) -> None:
        stream, camera.stream = camera.stream, None
        decoding, camera.decoding = camera.decoding, None
        try:
            if stream is not None:
                stream.close()
        finally:
            if decoding is not None:
                self._ending = [thread for thread in self._ending if not thread.join(0.0)] + [decoding]
                decoding.close()

    def _follow_type(self, camera: _Camera, publishers: list[Any]) -> None:
        """Subscribe again where the present publishers have another type."""
        wanted = self._type_of(camera, publishers)
        before = camera.message_type
        if wanted is before and camera.stream is not None:
            return
        self._shut(camera)
        camera.message_type = wanted
        for left in reversed(range(_REOPEN_TRIES)):
            try:
                self._open(camera)
                break
            except Exception as error:  # rclpy's own, while the subscription before has not gone
                # The decoder stays for the next try: each is a process.
                if not left:
                    self._shut(camera)
                    camera.mismatches = (f'it cannot be subscribed as {type_name(wanted)}: {error}',)
                    break
                time.sleep(_REOPEN_PAUSE_S)
        if wanted is not before:
            self._events.retyped(camera.topic, type_name(wanted), type_name(before))

    def _take_aside(self, camera: _Camera) -> None:
        """Decode a raw topic in a thread of its own where its images take so long that other topics would wait."""
        cost = self.share.cost(camera.topic)
        if camera.decoding is not None or len(self._cameras) == 1 or (cost.image_ms or 0.0) < _LONG_MS:
            return
        assert camera.stream is not None
        camera.stream.sink = self._begin_decoding(camera, self._make_local_decoder()).slots
        _log.info('%s is now decoded in its own thread: %s.', camera.topic, cost)


def type_name(message_type: type) -> str:
    """Return the name that the ROS graph has for an image message type."""
    return f'sensor_msgs/msg/{message_type.__name__}'


def _publisher_mismatches(publishers: Iterable[Any], message_type: type, qos: QoSProfile) -> list[str]:
    """
    Name every publisher that cannot reach a subscription, and why.

    DDS keeps such endpoints apart silently.

    :param publishers: of the topic, as the graph has them.
    :param message_type: of the subscription.
    :param qos: likewise.
    """
    wanted = type_name(message_type)
    problems = []
    for publisher in publishers:
        name = f'{publisher.node_namespace.rstrip("/")}/{publisher.node_name}'
        if publisher.topic_type != wanted:
            problems.append(f'{name} publishes {publisher.topic_type}, not {wanted}')
            continue
        compatibility, reason = qos_check_compatible(publisher.qos_profile, qos)
        if compatibility == QoSCompatibility.ERROR:
            problems.append(f'{name} offers a QoS that cannot match: {reason.strip()}')
    return problems


def resolve_topics(node: Node, names: Iterable[str]) -> tuple[str, ...]:
    """
    Return the full names of image topics, remapped as the node is.

    :raises ConfigError: a name cannot be resolved, is there twice, or is that of a topic of the node itself.
    """
    names = tuple(names)
    topics = tuple(_resolve_topic(node, name) for name in names)
    # Two spellings of one topic, or a remapping, would have each of its frames answered twice.
    if len(set(topics)) != len(topics):
        raise ConfigError('image_topics', f'{list(names)} resolves to {list(topics)}, a topic twice.')
    own = {each.topic_name for each in node.publishers} | {each.topic_name for each in node.subscriptions}
    own.add('/rosout')
    if clashing := sorted(own.intersection(topics)):
        raise ConfigError(
            'image_topics', f'{clashing} are topics of this node itself.', remedy='Name the topics of cameras.'
        )
    return topics


def _resolve_topic(node: Node, name: str) -> str:
    try:
        return str(node.resolve_topic_name(name))
    except Exception as error:  # rclpy's own, of several kinds
        raise ConfigError(
            'image_topics', f'{name!r} cannot be resolved: {error}.', remedy='Correct the name of the topic.'
        ) from error
