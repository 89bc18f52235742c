"""The inference node: lifecycle, streams, and what it tells others. It delegates; it computes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gps_denied_c7_msgs.msg import Tensor, TensorList
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image

from gps_denied_c7.bundle import ModelBundle
from gps_denied_c7.chain import RuntimeChain
from gps_denied_c7.chain_status import ChainStatus
from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.cpu_latency import CpuLatencyError, CpuLatencyRequest
from gps_denied_c7.decode_thread import DecodeThread, LocalDecoder
from gps_denied_c7.engine_cache import fallback_directory
from gps_denied_c7.errors import C7Error, ConfigError, ImageRejectedError, InferenceError
from gps_denied_c7.fdr import cause_of
from gps_denied_c7.file_watch import fingerprint, model_files
from gps_denied_c7.gpu_memory import GpuMemoryBudget
from gps_denied_c7.host import describe_gpu, hardware_id, package_versions, usable_cores
from gps_denied_c7.hosts import in_process_hosts
from gps_denied_c7.image_share import CameraCost, ImageShare
from gps_denied_c7.model_swap import ModelSwapper, SwapStatus
from gps_denied_c7.pipeline import FramePipeline, InferenceThread, ServedModel
from gps_denied_c7.ros.autostart import Autostart
from gps_denied_c7.ros.diagnostics import (
    SHARE_REMEDY,
    DiagnosticsPublisher,
    Report,
    StreamHealth,
    latency_report,
    runtime_report,
    stream_report,
    thermal_report,
)
from gps_denied_c7.ros.flight_recorder import FlightRecorder
from gps_denied_c7.ros.guard import RateLimiter
from gps_denied_c7.ros.lifecycle import ResponsiveLifecycleNode
from gps_denied_c7.ros.messages import decode_message, stamp_ns
from gps_denied_c7.ros.parameters import WITH_MODEL, LiveSettings, NodeParameters, NodeSettings
from gps_denied_c7.ros.rcl import load_rcl
from gps_denied_c7.ros.stream_set import StreamSet, compressed_decoder
from gps_denied_c7.ros.streams import ImageStream, queue_depth, type_name
from gps_denied_c7.ros.tensor_publisher import TensorPublisher
from gps_denied_c7.rungs import ORT_LABEL, Rung, RungHost
from gps_denied_c7.runtime import BuildProgress
from gps_denied_c7.scratch import Scratch
from gps_denied_c7.serving import fit_bundle, fit_model, read_bundle
from gps_denied_c7.slots import Frame, FrameSlots
from gps_denied_c7.stalling import read_or_give_up
from gps_denied_c7.statistics import Statistics, StreamCounters
from gps_denied_c7.text import with_traceback
from gps_denied_c7.thermal import ThermalLevel, ThermalStatePublisher, UnknownThermalState
from gps_denied_c7.thermal_policy import FrameShedding, ThermalPolicy
from gps_denied_c7.worker_host import worker_hosts
from gps_denied_c7.worker_process import SpareWorker

__all__ = ['DEFAULT_NODE_NAME', 'TENSORS_QOS', 'C7InferenceNode']

DEFAULT_NODE_NAME = 'c7_inference'
TENSORS_QOS = QoSProfile(depth=5, reliability=ReliabilityPolicy.RELIABLE)

_FINISH_FRAME_S = 5.0
_END_DECODING_S = 1.0
_CANCEL_SWAP_S = 2.0
_WARN_EVERY_S = 5.0
_DRAIN_S = 0.5
_LOOK_S = 2.0
# Of the time for an end: from when on a frame in hand is given up, and what is left for the last record to arrive.
_END_FRAME_S = 1.6
_SAY_GOODBYE_S = 1.0


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What a configure builds and a cleanup frees."""

    settings: NodeSettings
    topics: tuple[str, ...]
    model: ServedModel


class C7InferenceNode(ResponsiveLifecycleNode):
    """
    Answer images with tensors, and stay up whatever happens.

    Who runs where: a PoolExecutor of a few threads runs callbacks, none of which waits for an
    engine except a transition, which blocks one of those threads while the others serve. Lifecycle
    services share a reentrant group, each image topic and the diagnostics timer have an exclusive one,
    parameter services keep rclpy's. Frames are answered by a thread of their own, outside the executor,
    so that an engine that takes long delays no service.

    :param thermal: source of the thermal state.
    """

    def __init__(
        self, node_name: str = DEFAULT_NODE_NAME, *, thermal: ThermalStatePublisher | None = None, **kwargs: Any
    ) -> None:
        self._statistics = Statistics()
        self._warnings = RateLimiter(_WARN_EVERY_S)
        self._thermal = thermal or UnknownThermalState()
        self._thermal_level = ThermalLevel.UNKNOWN
        self._shedding = FrameShedding()
        self._loaded: _Loaded | None = None
        self._streams: StreamSet | None = None
        self._inference: InferenceThread | None = None
        self._swapper: ModelSwapper | None = None
        self._swap: SwapStatus | None = None
        self._left_behind = False
        self._building: BuildProgress | None = None
        # As long-lived as this process: an engine that could not be ended still holds its part after a cleanup.
        self._gpu_memory = GpuMemoryBudget(C7InferenceConfig().gpu_memory_budget_bytes)
        self._spare: SpareWorker | None = None
        self._start_problem, self._start_lasting = '', False
        self._start_reasons: set[str] = set()
        self._refused_ns: dict[str, int] = {}
        self._unanswered_ns: dict[str, int] = {}
        self._dropped_by_age: Counter[str] = Counter()
        self._notices: tuple[str, ...] = ()
        self._cpu_latency = CpuLatencyRequest()
        self._cpu_latency_problem: tuple[str, ...] = ()
        self._cpu_latency_lock, self._cpu_latency_wanted = threading.Lock(), False
        self._recorder: FlightRecorder | None = None
        super().__init__(node_name, **kwargs)
        self._recorder = FlightRecorder(self)
        self._settings = NodeParameters(
            self,
            fixed=self._why_fixed,
            on_live=self._set_live,
            on_model=self._begin_swap,
            on_failure=self.report_callback_failure,
        )
        self._live = self._settings.live()
        self._tensors = self.create_lifecycle_publisher(TensorList, '~/tensors', TENSORS_QOS)
        self._rcl = load_rcl(Image, CompressedImage, TensorList, Tensor)
        self._answers = TensorPublisher(self._tensors, self._rcl)
        self._diagnostics = DiagnosticsPublisher(self, self._reports, hardware_id())
        # The steady clock: simulated time may stand still, and diagnostics must not.
        self._timer = self.create_timer(
            1.0,
            self.guard('diagnostics timer', self._tick),
            callback_group=MutuallyExclusiveCallbackGroup(),
            clock=Clock(clock_type=ClockType.STEADY_TIME),
        )
        self._autostart = Autostart(
            lambda: self.lifecycle_state,
            self.transition,
            on_pause=lambda pause_s: self.get_logger().error(f'not active; next attempt in {pause_s:.0f} s'),
            lasting=lambda: self._start_lasting,
            conditions=self._start_conditions,
            on_wait=lambda: self.get_logger().error(
                'not active; next attempt when a parameter, the model or an engine file changes'
            ),
            on_failure=lambda error: self.report_callback_failure('autostart', error),
        )

    # --- life -------------------------------------------------------------------------------------

    def begin(self, notices: tuple[str, ...] = ()) -> None:
        """
        Record the session's start, and take the node to active where ``autostart`` asks for it.

        :param notices: lasting remarks on the host, shown on diagnostics.
        """
        self._notices = notices
        for notice in notices:
            self.get_logger().warning(notice)
        self.record(
            'c7.session_started',
            versions=package_versions(),
            host=hardware_id(),
            gpu=describe_gpu(),
            config_digest=self._config_digest(),
        )
        if self._settings.autostart:
            self._autostart.start()
        else:
            self.get_logger().info(
                f'unconfigured, waiting for a transition (ros2 lifecycle set {self.get_fully_qualified_name()} '
                'configure); with autostart, the node goes to active by itself'
            )

    def end(self, reason: str, timeout_s: float) -> bool:
        """
        Shut down: end the streams, free the engine, record the session's end.

        :param timeout_s: seconds for all of it; an engine that does not return is left behind.
        :return: whether nothing was left behind.
        """
        deadline = time.monotonic() + timeout_s
        self.ending = True
        self._autostart.stop()
        done = threading.Event()

        def shut_down() -> None:
            if self.lifecycle_state != 'finalized':
                self.transition('shutdown')
            done.set()

        try:
            threading.Thread(target=shut_down, name='c7-shutdown', daemon=True).start()
        except RuntimeError:
            # No memory for one more thread: better an end that may be cut short than none.
            shut_down()
        for_frame_s = max(0.0, timeout_s - _END_FRAME_S)
        if not done.wait(for_frame_s):
            self._give_up_frame()
        clean = done.wait(max(0.0, timeout_s - for_frame_s - _SAY_GOODBYE_S)) and not self._left_behind
        self._flight_recorder().recorder.flush(force=True)
        self.record('c7.session_ended', reason=reason, clean=clean, lifecycle_state=self.lifecycle_state)
        # Fast DDS acknowledges with its heartbeats, seconds apart; what was sent is out long before that.
        self._flight_recorder().drain(min(_DRAIN_S, max(0.0, deadline - time.monotonic())))
        return clean

    def _give_up_frame(self) -> None:
        """End the engine that keeps the shutdown waiting: a worker can be ended, a thread of this process cannot."""
        loaded = self._loaded
        if loaded is not None:
            self.get_logger().warning('the frame in hand is not answered in time and is given up')
            with contextlib.suppress(InferenceError):
                loaded.model.chain.release(0.2)

    def record(self, kind: str, **payload: Any) -> None:
        """Write a flight record and, since it may come with a change of level, look at diagnostics."""
        self._flight_recorder().recorder.emit(kind, **payload)

    def operator_transition(self, label: str) -> None:
        """Leave the lifecycle to whoever asked."""
        if self._autostart.running:
            self.get_logger().info(f'{label} was asked for from outside: autostart ends')
        self._autostart.stop()

    def transition_failed(self, label: str, reason: str, lasting: bool) -> None:
        """Keep the reason for diagnostics, and record each distinct one once."""
        if self.ending:
            return
        self._start_problem, self._start_lasting = f'{label} failed: {reason}', lasting
        if label in ('configure', 'activate') and (key := f'{label} {cause_of(reason)}') not in self._start_reasons:
            self._start_reasons.add(key)
            self.record('c7.start_failed', transition=label, reason=reason)
        self._publish_changes()

    def _start_conditions(self) -> Hashable:
        """Return what is another as soon as a parameter or file is that a start depends on, and where a look stalls."""
        values = self._settings.values()
        caches = [values['engine_cache_dir'], values['ort_trt_cache_dir']]

        def look() -> Hashable:
            files, directories = model_files(values['model_path'])
            return fingerprint(files, [*directories, *caches, *map(fallback_directory, map(Path, caches))])

        try:
            return repr(values), read_or_give_up('what a start depends on', look, limit_s=_LOOK_S)
        except C7Error:
            # On a mount that has stalled; the attempt says so.
            return object()

    def report_callback_failure(self, callback: str, error: Exception) -> None:
        """Log, count and record an exception that a callback let out (N-5)."""
        super().report_callback_failure(callback, error)
        self._statistics.callback_failed(callback)
        if self._recorder is not None:
            self.record('c7.callback_failed', callback=callback, error=f'{type(error).__name__}: {error}')

    # --- transitions ------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load and prove the first usable rung."""
        return self._finish(self.run_transition('configure', self._configure, undo=self._release))

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Prove the serving rung, then open the streams."""
        return self._finish(
            self.run_transition('activate', lambda: self._activate(state), undo=lambda: self._deactivate(state))
        )

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Close the streams and finish the frame in hand."""
        return self._finish(
            self.run_transition('deactivate', lambda: self._deactivate(state), failed=TransitionCallbackReturn.ERROR),
            f'inactive, {self._answered()}; the streams are closed, the engines stay loaded',
        )

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free everything that configure built."""
        outcome = self.run_transition('cleanup', self._release, failed=TransitionCallbackReturn.ERROR)
        return self._finish(outcome, 'unconfigured; the engines are ended and their memory is free')

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free everything, from any state."""
        outcome = self.run_transition('shutdown', self._release, failed=TransitionCallbackReturn.ERROR)
        return self._finish(outcome, f'finalized, {self._answered()}; start the node again to go on')

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free everything and return to unconfigured; why stays on diagnostics."""
        self.run_transition('error processing', self._release)
        self._publish_changes()
        return TransitionCallbackReturn.SUCCESS

    def _finish(self, outcome: TransitionCallbackReturn, done: str = '') -> TransitionCallbackReturn:
        if outcome == TransitionCallbackReturn.SUCCESS:
            self._start_problem = ''
            if done:
                left = ' except for what was left behind, see above' if self._left_behind else ''
                self.get_logger().info(f'{done}{left}')
        self._publish_changes()
        return outcome

    def _answered(self) -> str:
        streams = self._statistics.snapshot().streams.values()
        answered, received = (sum(getattr(each, name) for each in streams) for name in ('answered', 'received'))
        return f'{answered} of {received} images answered since configure'

    def _configure(self) -> None:
        self._release()
        settings = self._settings.settings()
        if not settings.model_path:
            raise ConfigError('model_path', 'is not set.', remedy='Name a model bundle or an .onnx file.')
        bundle = read_bundle(settings.model_path, limit_s=settings.config.load_timeout_s)
        bundle = fit_bundle(bundle, settings)
        topics = self._resolve_topics(settings.image_topics)
        self._gpu_memory.resize(settings.config.gpu_memory_budget_bytes)
        # ONNX Runtime has the last rung of every chain, and most engines that are loaded in flight.
        config = settings.config
        wanted = config.spare_worker and config.isolation == 'process' and ORT_LABEL not in config.disabled_runtimes
        self._spare = SpareWorker(ORT_LABEL) if wanted else None
        chain = self._make_chain(bundle, settings.config)
        try:
            self._load(chain)
            model = fit_model(bundle, chain, settings)
        except BaseException:
            chain.release()
            self._end_spare()
            raise
        self._swap = None
        self._statistics.open_streams(topics)
        self._refused_ns.clear()
        self._unanswered_ns.clear()
        self._dropped_by_age.clear()
        self._loaded = _Loaded(settings, topics, model)

    def _make_chain(self, bundle: ModelBundle, config: C7InferenceConfig) -> RuntimeChain:
        hosts = self._hosts(bundle, config)
        return RuntimeChain(bundle, config, hosts, emit=self.record, on_change=self._on_chain_change)

    def _hosts(self, bundle: ModelBundle, config: C7InferenceConfig) -> Callable[[Rung], RungHost]:
        if config.isolation == 'none':
            return in_process_hosts(bundle, config, self._thermal, on_build=self._on_build)
        return worker_hosts(
            bundle, config, memory=self._gpu_memory, spare=self._spare, on_build=self._on_build
        )

    def _end_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.close()

    def _load(self, chain: RuntimeChain) -> None:
        try:
            chain.load()
        finally:
            self._building = None

    def _resolve_topics(self, names: tuple[str, ...]) -> tuple[str, ...]:
        topics = tuple(self._resolve_topic(name) for name in names)
        # Two spellings of one topic, or a remapping, would have each of its frames answered twice.
        if len(set(topics)) != len(topics):
            raise ConfigError('image_topics', f'{list(names)} resolves to {list(topics)}, a topic twice.')
        own = {each.topic_name for each in self.publishers} | {each.topic_name for each in self.subscriptions}
        own.add('/rosout')
        if clashing := sorted(own.intersection(topics)):
            raise ConfigError(
                'image_topics', f'{clashing} are topics of this node itself.', remedy='Name the topics of cameras.'
            )
        return topics

    def _resolve_topic(self, name: str) -> str:
        try:
            return str(self.resolve_topic_name(name))
        except Exception as error:  # rclpy's own, of several kinds
            raise ConfigError(
                'image_topics', f'{name!r} cannot be resolved: {error}.', remedy='Correct the name of the topic.'
            ) from error

    def _activate(self, state: LifecycleState) -> None:
        loaded = self._require_loaded()
        loaded.model.chain.prove()
        if super().on_activate(state) != TransitionCallbackReturn.SUCCESS:
            raise C7Error('the tensor publisher could not be activated.')
        slots = FrameSlots(loaded.topics, on_replaced=lambda frame: self._count(frame.topic, 'replaced'))
        share = ImageShare(loaded.topics, fraction=lambda: self._live.image_cpu_share, cores=usable_cores())
        pipeline = FramePipeline(
            loaded.model,
            decode=functools.partial(decode_message, scratch=Scratch()),
            publish=lambda result: self._answers.publish(result),
            on_refused=lambda frame, error: self._refuse(frame.topic, error),
            on_unanswered=self._report_unanswered,
            statistics=self._statistics,
            charge=share.charge,
        )
        self._inference = InferenceThread(
            slots, pipeline, too_old=self._too_old, shed=self._shed, statistics=self._statistics
        )
        self._inference.start()
        self._swapper = ModelSwapper(
            loaded.model, self._inference, self, loaded.settings, read_s=loaded.settings.config.load_timeout_s
        )
        self._streams = self._make_streams(loaded, slots, share, pipeline)
        self._streams.open()
        self._ask_for_cores(wanted=True)
        self.get_logger().info(f'active, listening to {", ".join(loaded.topics)}')

    def _make_streams(
        self, loaded: _Loaded, slots: FrameSlots, share: ImageShare, pipeline: FramePipeline
    ) -> StreamSet:
        return StreamSet(
            self,
            dict(zip(loaded.topics, loaded.settings.image_topic_types, strict=True)),
            slots=slots,
            share=share,
            open_stream=functools.partial(
                ImageStream,
                self,
                statistics=self._statistics,
                admits=share.admits,
                rcl=self._rcl,
                guard=self.guard,
                live=lambda: self._live,
                on_refused=self._refuse,
                on_time_reset=self._report_time_reset,
                on_overrun=self._report_overrun,
            ),
            make_decoder=functools.partial(compressed_decoder, settings=loaded.settings),
            make_local_decoder=lambda: LocalDecoder(functools.partial(decode_message, scratch=Scratch())),
            make_thread=functools.partial(
                DecodeThread,
                slots=slots,
                spec=lambda: pipeline.preprocessing,
                pixels_wanted=lambda: pipeline.answered.wanted,
                charge=share.charge,
                shed=self._shed,
                on_refused=self._refuse,
                statistics=self._statistics,
            ),
            on_retyped=self._report_retyped,
        )

    def _deactivate(self, state: LifecycleState) -> None:
        self._close_streams()
        super().on_deactivate(state)

    def _close_streams(self) -> None:
        swapper, self._swapper = self._swapper, None
        if swapper is not None and not swapper.stop(_CANCEL_SWAP_S):
            self._left_behind = True
        try:
            streams = self._streams
            if streams is not None and not streams.close(_END_DECODING_S):
                self._left_behind = True
                self.get_logger().error('an image is still being decoded though its decoder was ended; left behind')
            # Not before: error processing closes what a failure has left.
            self._streams = None
            inference, self._inference = self._inference, None
            if inference is not None and not inference.stop(_FINISH_FRAME_S):
                self._left_behind = True
                self.get_logger().error(
                    f'the frame in hand is not answered after {_FINISH_FRAME_S:.0f} s; left behind'
                )
        finally:
            self._ask_for_cores(wanted=False)

    def _ask_for_cores(self, *, wanted: bool | None = None) -> None:
        """
        Have idle cores wake up as fast as ``cpu_wakeup_latency_us`` says while that is wanted, else as they would.

        :param wanted: from now on, None for no change.
        """
        with self._cpu_latency_lock:
            self._cpu_latency_wanted = self._cpu_latency_wanted if wanted is None else wanted
            self._cpu_latency_problem = ()
            if not self._cpu_latency_wanted or self._live.cpu_wakeup_latency_us < 0:
                self._cpu_latency.drop()
                return
            try:
                self._cpu_latency.hold(self._live.cpu_wakeup_latency_us)
            except CpuLatencyError as error:
                self._cpu_latency_problem = (str(error),)
                self.get_logger().warning(str(error))

    def _release(self) -> None:
        self._close_streams()
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            try:
                loaded.model.chain.release()
            except C7Error as error:
                self.get_logger().error(str(error))
        self._end_spare()

    # --- frames -----------------------------------------------------------------------------------

    def _count(self, topic: str, event: str) -> None:
        self._statistics.count(topic, event)

    def _too_old(self, frame: Frame) -> bool:
        live = self._live
        if live.max_queue_age_ms and time.monotonic_ns() - frame.received_ns > live.max_queue_age_ms * 1e6:
            return True
        if not live.max_frame_age_ms:
            self._dropped_by_age[frame.topic] = 0
            return False
        age_ms = (self.get_clock().now().nanoseconds - stamp_ns(frame.message.header)) / 1e6
        if age_ms <= live.max_frame_age_ms:
            self._dropped_by_age[frame.topic] = 0
            return False
        self._dropped_by_age[frame.topic] += 1
        if self._warnings.pass_now(('age', frame.topic)) is not None:
            self.get_logger().warning(
                f'{frame.topic}: the last {self._dropped_by_age[frame.topic]} images were dropped, their header '
                f'stamps lie {age_ms:.0f} ms back, more than max_frame_age_ms. Where they come from a bag, set '
                'use_sim_time and play it with --clock; else synchronise the clocks or raise max_frame_age_ms.'
            )
        return True

    def _shed(self, frame: Frame) -> bool:
        if self._live.thermal_policy != ThermalPolicy.SHED:
            return False
        return self._shedding.drops(frame.topic, self._thermal.thermal_state(), self._live.min_rate_hz)

    def _refuse(self, topic: str, error: ImageRejectedError) -> None:
        self._statistics.refuse(topic, error.reason)
        self._refused_ns[topic] = time.monotonic_ns()
        self.record('c7.image_refused', topic=topic, reason=error.reason, message=str(error))
        held = self._warnings.pass_now((topic, error.reason))
        if held is not None:
            more = f' ({held} more since the last warning)' if held else ''
            self.get_logger().warning(f'{topic}: image refused: {error}{more}')

    def _report_unanswered(self, frame: Frame, error: Exception) -> None:
        self._unanswered_ns[frame.topic] = time.monotonic_ns()
        self.record('c7.frame_unanswered', topic=frame.topic, reason=str(error))
        held = self._warnings.pass_now(('unanswered', type(error)))
        if held is not None:
            more = f' ({held} more since the last message)' if held else ''
            text = f'{frame.topic}: a frame was not answered: {error}{more}'
            self.get_logger().error(with_traceback(text, None if isinstance(error, C7Error) else error))

    def _report_time_reset(self, topic: str, backwards_s: float) -> None:
        self.record('c7.time_reset', topic=topic, backwards_s=backwards_s)
        # Two publishers whose clocks differ have this happen with every other image.
        held = self._warnings.pass_now((topic, 'time reset'))
        if held is not None:
            more = f' ({held} more jumps since the last warning)' if held else ''
            self.get_logger().warning(f'{topic}: stamps jumped back by {backwards_s:.1f} s; going on from there{more}')

    def _report_overrun(self, topic: str, qos: QoSProfile, keeps_newest: bool) -> None:
        self.record('c7.stream_overrun', topic=topic, queue_depth=queue_depth(qos), keeps_newest=keeps_newest)
        if self._warnings.pass_now((topic, 'overrun')) is None:
            return
        override = f'qos_overrides.{topic}.subscription'
        remedy = (
            'Until the streams are opened anew, the newest alone is kept.'
            if keeps_newest
            else f'Have the newest alone be kept: {override}.history keep_last, {override}.depth 1.'
        )
        self.get_logger().warning(
            f'{topic}: images come faster than this machine can receive them; they queue up, and the oldest is taken '
            f'first. {remedy} Lower their rate or size.'
        )

    def _report_retyped(self, topic: str, message_type: str, before: str) -> None:
        self._count(topic, 'retyped')
        self.record('c7.stream_retyped', topic=topic, type=message_type, previous_type=before)
        held = self._warnings.pass_now((topic, 'retyped'))
        if held is not None:
            more = f' ({held} more changes since the last message)' if held else ''
            self.get_logger().info(
                f'{topic} is published as {message_type}, so it is no longer subscribed as {before}. Set '
                f'image_topic_types to miss no images at the start.{more}'
            )

    def _report_share(self, cost: CameraCost) -> None:
        self.record(
            'c7.camera_slowed' if cost.slowed else 'c7.camera_no_longer_slowed',
            topic=cost.topic,
            image_ms=round(cost.image_ms or 0.0, 1),
            used_cores=round(cost.used_cores, 3),
            share_cores=cost.share_cores,
        )
        if self._warnings.pass_now((cost.topic, 'share', cost.slowed)) is None:
            return
        if cost.slowed:
            self.get_logger().warning(f'{cost.topic} is slowed: {cost}. {SHARE_REMEDY}')
        else:
            self.get_logger().info(f'{cost.topic} is no longer slowed: {cost}.')

    # --- model swap -------------------------------------------------------------------------------

    def make_chain(self, bundle: ModelBundle, settings: NodeSettings) -> RuntimeChain:
        """Return a chain for another model; engines are not built in flight (F-5)."""
        return self._make_chain(bundle, dataclasses.replace(settings.config, build_on_configure=False))

    def path_accepted(self, path: str) -> bool:
        """Return whether ``model_path`` is ``path`` for everybody who asks."""
        return bool(self.get_parameter('model_path').value == path)

    def model_swapped(self, path: str, model: ServedModel, settings: NodeSettings) -> None:
        """Have diagnostics and the next cleanup see the model that answers now."""
        self._loaded = dataclasses.replace(self._require_loaded(), settings=settings, model=model)

    def keep_model(self, path: str) -> None:
        """Take ``model_path`` and its companions back to the model that goes on answering."""
        self._settings.restore_model(self._require_loaded().settings)

    def swap_changed(self, status: SwapStatus) -> None:
        """Show how far the swap is, at once."""
        self._swap = status
        try:
            self._diagnostics.publish()
        except Exception as error:
            self.report_callback_failure('diagnostics', error)

    def _begin_swap(self, settings: NodeSettings) -> None:
        swapper = self._swapper
        if swapper is not None:
            swapper.begin(settings.model_path, settings)
        elif why := self._why_fixed('model_path'):
            raise ConfigError('model_path', why)

    # --- parameters -------------------------------------------------------------------------------

    def _why_fixed(self, name: str) -> str | None:
        state = self.lifecycle_state
        if state == 'unconfigured' or (name == 'model_path' and self._swapper is not None):
            return None
        if state == 'finalized':
            return 'cannot change any more; start the node again.'
        steps = 'deactivate and cleanup' if state == 'active' else 'cleanup'
        instead = ' Or set it together with model_path.' if state == 'active' and name in WITH_MODEL else ''
        return f'cannot change while {state}; run {steps} first, then set it and configure.{instead}'

    def _set_live(self, live: LiveSettings) -> None:
        before, self._live = self._live, live
        if live.cpu_wakeup_latency_us != before.cpu_wakeup_latency_us or self._cpu_latency_problem:
            self._ask_for_cores()
        if live.thermal_policy != ThermalPolicy.SHED:
            self._shedding.reset()

    def _config_digest(self) -> str:
        try:
            return self._settings.settings().config.digest()
        except ConfigError as error:
            return f'none: {error}'

    # --- diagnostics ------------------------------------------------------------------------------

    def _on_chain_change(self, status: ChainStatus) -> None:
        self._publish_changes()

    def _on_build(self, progress: BuildProgress) -> None:
        self._building = progress

    def _tick(self) -> None:
        self._flight_recorder().recorder.flush()
        self._note_thermal_level()
        streams = self._streams
        if streams is not None:
            streams.look()
            for topic in streams.topics:
                for problem in streams.mismatches(topic):
                    if self._warnings.pass_now((topic, problem)) is not None:
                        self.get_logger().warning(f'{topic}: {problem}')
            for cost in streams.share.changes():
                self._report_share(cost)
        self._diagnostics.publish()

    def _note_thermal_level(self) -> None:
        state = self._thermal.thermal_state()
        if self._live.thermal_policy == ThermalPolicy.OFF or state.level is self._thermal_level:
            return
        self._thermal_level = state.level
        self.record(
            'c7.thermal_state',
            level=state.level.value,
            source=state.source,
            reasons=list(state.reasons),
            temperatures_c=state.temperatures_c,
        )

    def _publish_changes(self) -> None:
        try:
            self._diagnostics.publish_changes()
        except Exception as error:
            self.report_callback_failure('diagnostics', error)

    def _reports(self) -> list[Report]:
        snapshot = self._statistics.snapshot()
        loaded = self._loaded
        reports = [
            runtime_report(
                self.lifecycle_state,
                loaded.model.chain.status() if loaded else None,
                self._start_problem,
                snapshot.callback_failures,
                (*self._notices, *self._cpu_latency_problem),
                self._building,
                self._swap,
                self._gpu_memory,
            )
        ]
        streams = self._streams
        now_ns = time.monotonic_ns()
        for topic in loaded.topics if loaded else ():
            counters = snapshot.streams.get(topic, StreamCounters())
            stream = streams.stream(topic) if streams is not None else None
            since_ns = (stream.last_received_ns or stream.opened_ns) if stream else now_ns
            health = StreamHealth(
                topic=topic,
                counters=counters,
                silent_s=(now_ns - since_ns) / 1e9,
                refused_s=_since_s(now_ns, self._refused_ns.get(topic)),
                unanswered_s=_since_s(now_ns, self._unanswered_ns.get(topic)),
                lost_s=_since_s(now_ns, stream.last_lost_ns) if stream else None,
                too_old=self._dropped_by_age[topic],
                mismatches=streams.mismatches(topic) if streams is not None else (),
                queue_depth=queue_depth(stream.qos) if stream else 'closed',
                message_type=type_name(stream.message_type) if stream else '',
                cost=streams.share.cost(topic) if streams is not None else None,
            )
            reports.append(stream_report(health, active=streams is not None))
        reports.append(latency_report(snapshot.stages, self._live.latency_warn_ms))
        state = self._thermal.thermal_state()
        reports.append(thermal_report(state, self._live.thermal_policy, 2**self._shedding.step))
        return reports

    def _flight_recorder(self) -> FlightRecorder:
        assert self._recorder is not None
        return self._recorder

    def _require_loaded(self) -> _Loaded:
        if self._loaded is None:
            raise C7Error('no model is loaded.', remedy='Run the configure transition first.')
        return self._loaded


def _since_s(now_ns: int, then_ns: int | None) -> float | None:
    return None if then_ns is None else (now_ns - then_ns) / 1e9
