"""What answers images while the node is active: mailbox, inference thread, streams, and swaps of the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rclpy.node import Node

from gps_denied_c7.image.buffers import Scratch
from gps_denied_c7.monitoring.host_info import usable_cores
from gps_denied_c7.monitoring.metrics import Statistics
from gps_denied_c7.pipeline.decode_thread import DecodeThread, LocalDecoder
from gps_denied_c7.pipeline.image_share import ImageShare
from gps_denied_c7.pipeline.mailbox import FrameSlots
from gps_denied_c7.pipeline.model_swap import ModelSwapper, SwapOwner
from gps_denied_c7.pipeline.pipeline import FramePipeline, FrameResult, InferenceThread, ServedModel
from gps_denied_c7.ros.callbacks import CallbackGuard
from gps_denied_c7.ros.events import EventReporter
from gps_denied_c7.ros.frame_policy import FrameDropPolicy
from gps_denied_c7.ros.image_subscription import ImageSubscription
from gps_denied_c7.ros.image_topics import CompressedDecoder, ImageTopics
from gps_denied_c7.ros.messages import decode_message
from gps_denied_c7.ros.parameters import LiveSettings, NodeSettings
from gps_denied_c7.ros.rcl import Rcl

__all__ = ['Answering', 'AnsweringParts']

_FINISH_FRAME_S = 5.0
_END_DECODING_S = 1.0
_CANCEL_SWAP_S = 2.0


@dataclass(frozen=True, slots=True)
class AnsweringParts:
    """
    Hold what outlives one activation of the node.

    :param live: returns the live settings.
    :param publish_answer: publishes one answer.
    """

    statistics: Statistics
    events: EventReporter
    policy: FrameDropPolicy
    guard: CallbackGuard
    rcl: Rcl | None
    live: Callable[[], LiveSettings]
    publish_answer: Callable[[FrameResult], Any]


class Answering:
    """
    Answer the images of all topics with one model, from :meth:`open` to :meth:`close`.

    An image goes from its stream into the mailbox (compressed ones through a decoder), from there to the inference
    thread, and its answer to ``parts.publish_answer``.

    :param topics: resolved names.
    :param owner: of model swaps.
    """

    def __init__(
        self,
        node: Node,
        parts: AnsweringParts,
        model: ServedModel,
        topics: tuple[str, ...],
        settings: NodeSettings,
        owner: SwapOwner,
    ) -> None:
        self._node = node
        self._parts = parts
        self._settings = settings
        self._slots = FrameSlots(topics, on_replaced=parts.events.replaced)
        self._share = ImageShare(topics, fraction=lambda: parts.live().image_cpu_share, cores=usable_cores())
        self._pipeline = FramePipeline(
            model,
            decode=functools.partial(decode_message, scratch=Scratch()),
            publish=parts.publish_answer,
            on_refused=lambda frame, error: parts.events.refused(frame.topic, error),
            on_unanswered=parts.events.unanswered,
            statistics=parts.statistics,
            charge=self._share.charge,
        )
        self._inference = InferenceThread(
            self._slots,
            self._pipeline,
            too_old=parts.policy.too_old,
            shed=parts.policy.shed,
            statistics=parts.statistics,
        )
        self.swapper = ModelSwapper(model, self._inference, owner, settings, read_s=settings.config.load_timeout_s)
        self.streams = self._make_streams(dict(zip(topics, settings.image_topic_types, strict=True)))

    def open(self) -> None:
        """Begin; what a failure leaves open is closed by :meth:`close`."""
        self._inference.start()
        self.streams.open()

    def close(self, left_behind: Callable[[str], object]) -> None:
        """
        Cancel a swap, end the streams and finish the current frame; may be repeated after a failure.

        :param left_behind: called with what still runs after that.
        """
        if not self.swapper.stop(_CANCEL_SWAP_S):
            left_behind('the load of another model cannot be stopped')
        if not self.streams.close(_END_DECODING_S):
            left_behind('an image is still being decoded although its decoder was stopped')
        if not self._inference.stop(_FINISH_FRAME_S):
            left_behind(f'the current frame is still not answered after {_FINISH_FRAME_S:.0f} s')

    def _make_streams(self, types: dict[str, str]) -> ImageTopics:
        parts = self._parts
        return ImageTopics(
            self._node,
            types,
            slots=self._slots,
            share=self._share,
            open_stream=functools.partial(
                ImageSubscription,
                self._node,
                statistics=parts.statistics,
                memory_bytes=self._settings.decoder_memory_mb << 20,
                admits=self._share.admits,
                rcl=parts.rcl,
                guard=parts.guard,
                live=parts.live,
                events=parts.events,
            ),
            make_decoder=functools.partial(CompressedDecoder, settings=self._settings),
            make_local_decoder=lambda: LocalDecoder(functools.partial(decode_message, scratch=Scratch())),
            make_thread=functools.partial(
                DecodeThread,
                slots=self._slots,
                spec=lambda: self._pipeline.preprocessing,
                pixels_wanted=lambda: self._pipeline.answered.wanted,
                charge=self._share.charge,
                shed=parts.policy.shed,
                on_refused=parts.events.refused,
                statistics=parts.statistics,
            ),
            events=parts.events,
        )
