"""The inference node: which of its parts lives from which transition to which, and what runs in which thread."""

from __future__ import annotations

import functools
import time
from typing import Any

from gps_denied_c7_msgs.msg import Tensor, TensorList
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image

from gps_denied_c7.errors import C7Error, ConfigError
from gps_denied_c7.failover.chain import RuntimeChain
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.monitoring.cpu_latency import CpuWakeup
from gps_denied_c7.monitoring.flight_record import cause_of
from gps_denied_c7.monitoring.host_info import describe_gpu, hardware_id, package_versions
from gps_denied_c7.monitoring.metrics import Statistics, StatisticsSnapshot
from gps_denied_c7.monitoring.thermal import ThermalStatePublisher, UnknownThermalState
from gps_denied_c7.monitoring.thermal_policy import ThermalPolicy
from gps_denied_c7.pipeline.chain_factory import ChainFactory
from gps_denied_c7.pipeline.model_swap import SwapStatus
from gps_denied_c7.pipeline.pipeline import ServedModel
from gps_denied_c7.ros.answering import Answering, AnsweringParts
from gps_denied_c7.ros.autostart import Autostart, start_conditions
from gps_denied_c7.ros.diagnostics import (
    DiagnosticsPublisher,
    Report,
    latency_report,
    runtime_report,
    stream_health,
    stream_report,
    thermal_report,
)
from gps_denied_c7.ros.events import EventReporter
from gps_denied_c7.ros.flight_recorder import FlightRecorder
from gps_denied_c7.ros.frame_policy import FrameDropPolicy
from gps_denied_c7.ros.image_topics import resolve_topics
from gps_denied_c7.ros.lifecycle import ResponsiveLifecycleNode
from gps_denied_c7.ros.loaded_model import LoadedModel
from gps_denied_c7.ros.parameter_table import WITH_MODEL
from gps_denied_c7.ros.parameters import LiveSettings, NodeParameters, NodeSettings
from gps_denied_c7.ros.rcl import load_rcl
from gps_denied_c7.ros.shutdown import end_in_time
from gps_denied_c7.ros.tensor_publisher import TensorPublisher

__all__ = ['DEFAULT_NODE_NAME', 'TENSORS_QOS', 'C7InferenceNode']

DEFAULT_NODE_NAME = 'c7_inference'
TENSORS_QOS = QoSProfile(depth=5, reliability=ReliabilityPolicy.RELIABLE)

_DRAIN_S = 0.5


class C7InferenceNode(ResponsiveLifecycleNode):
    """
    Answer images with tensors, and survive failures of engines, inputs and callbacks.

    Threads: a PoolExecutor of a few threads runs callbacks, none of which waits for an
    engine except a transition, which blocks one of those threads while the others serve. Lifecycle
    services share a reentrant group, each image topic and the diagnostics timer have an exclusive one,
    parameter services keep rclpy's. Frames are answered by a thread of their own, outside the executor,
    so that an engine that takes long delays no service.

    Parts: the chain factory, the drop policy, reporter, recorder, diagnostics and publishers live as long as the node;
    the chain and its model from configure to cleanup; what answers images, and the request for awake cores, from
    activate to deactivate.

    :param thermal: source of the thermal state.
    """

    def __init__(
        self, node_name: str = DEFAULT_NODE_NAME, *, thermal: ThermalStatePublisher | None = None, **kwargs: Any
    ) -> None:
        self._statistics = Statistics()
        self._thermal = thermal or UnknownThermalState()
        self._answering: Answering | None = None
        self._swap: SwapStatus | None = None
        self._left_behind = False
        self._start_problem, self._start_lasting = '', False
        self._start_reasons: set[str] = set()
        self._notices: tuple[str, ...] = ()
        self._factory = ChainFactory(
            self._thermal, emit=self.record, on_change=lambda status: self._publish_changes()
        )
        self._model = LoadedModel(self._factory, self.get_logger)
        self._events = EventReporter(self._statistics, self.record, self.get_logger)
        self._policy = FrameDropPolicy(
            lambda: self._live, self._thermal, self._events, lambda: int(self.get_clock().now().nanoseconds)
        )
        self._wakeup = CpuWakeup(
            lambda: self._live.cpu_wakeup_latency_us, lambda problem: self.get_logger().warning(problem)
        )
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
        rcl = load_rcl(Image, CompressedImage, TensorList, Tensor)
        self._answers = TensorPublisher(self._tensors, rcl)
        self._parts = AnsweringParts(
            statistics=self._statistics,
            events=self._events,
            policy=self._policy,
            guard=self.guard,
            rcl=rcl,
            live=lambda: self._live,
            publish_answer=lambda result: self._answers.publish(result),
        )
        self._diagnostics = DiagnosticsPublisher(self, self._reports, hardware_id())
        # The steady clock: simulated time may stop, and diagnostics must not.
        self._timer = self.create_timer(
            1.0,
            self.guard('diagnostics timer', self._tick),
            callback_group=MutuallyExclusiveCallbackGroup(),
            clock=Clock(clock_type=ClockType.STEADY_TIME),
        )
        self._autostart = Autostart(
            self,
            lasting=lambda: self._start_lasting,
            conditions=lambda: start_conditions(self._settings.values()),
        )

    # --- life -------------------------------------------------------------------------------------

    def begin(self, notices: tuple[str, ...] = ()) -> None:
        """
        Record the session's start, and take the node to active where ``autostart`` asks for it.

        :param notices: lasting notes on the host, shown on diagnostics.
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
        if self._settings.values()['autostart']:
            self._autostart.start()
        else:
            self.get_logger().info(
                f'unconfigured, waiting for a transition (ros2 lifecycle set {self.get_fully_qualified_name()} '
                'configure); with autostart, the node activates itself'
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
        in_time = end_in_time(lambda: self.transition('shutdown'), self._model.abandon_frame, timeout_s)
        clean = in_time and not self._left_behind
        self._recorder.flush(force=True)
        self.record('c7.session_ended', reason=reason, clean=clean, lifecycle_state=self.lifecycle_state)
        # Fast DDS acknowledges with its heartbeats, seconds apart; what was sent is out long before that.
        self._recorder.drain(min(_DRAIN_S, max(0.0, deadline - time.monotonic())))
        return clean

    def record(self, kind: str, **payload: Any) -> None:
        """Write a flight record."""
        self._recorder.emit(kind, **payload)

    def operator_transition(self, label: str) -> None:
        """End autostart: a client has taken over the lifecycle."""
        if self._autostart.running:
            self.get_logger().info(f'a client requested {label}: autostart ends')
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

    def report_callback_failure(self, callback: str, error: Exception) -> None:
        """Log, count and record an exception that a callback raised (N-5)."""
        super().report_callback_failure(callback, error)
        self._statistics.callback_failed(callback)
        self.record('c7.callback_failed', callback=callback, error=f'{type(error).__name__}: {error}')

    # --- transitions ------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load and self-test the first usable rung."""
        return self._finish(self.run_transition('configure', self._configure, undo=self._release))

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Self-test the serving rung, then open the streams."""
        return self._finish(
            self.run_transition('activate', lambda: self._activate(state), undo=lambda: self._deactivate(state))
        )

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Close the streams and finish the current frame."""
        return self._finish(
            self.run_transition('deactivate', lambda: self._deactivate(state), failed=TransitionCallbackReturn.ERROR),
            f'inactive, {_answered_of(self._statistics.snapshot())}; the streams are closed, the engines stay loaded',
        )

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free everything that configure built."""
        outcome = self.run_transition('cleanup', self._release, failed=TransitionCallbackReturn.ERROR)
        return self._finish(outcome, 'unconfigured; the engines have ended and their memory is free')

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free everything, from any state."""
        outcome = self.run_transition('shutdown', self._release, failed=TransitionCallbackReturn.ERROR)
        answered = _answered_of(self._statistics.snapshot())
        return self._finish(outcome, f'finalized, {answered}; restart the node to continue')

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free everything and return to unconfigured; diagnostics keep the reason."""
        self.run_transition('error processing', self._release)
        self._publish_changes()
        return TransitionCallbackReturn.SUCCESS

    def _finish(self, outcome: TransitionCallbackReturn, done: str = '') -> TransitionCallbackReturn:
        if outcome == TransitionCallbackReturn.SUCCESS:
            self._start_problem = ''
            if done:
                left = ', except for the parts named above, which still run' if self._left_behind else ''
                self.get_logger().info(f'{done}{left}')
        self._publish_changes()
        return outcome

    def _configure(self) -> None:
        self._release()
        loaded = self._model.on_configure(self._settings.settings(), functools.partial(resolve_topics, self))
        self._swap = None
        self._statistics.open_streams(loaded.topics)
        self._events.reset()
        self._policy.on_configure()

    def _activate(self, state: LifecycleState) -> None:
        loaded = self._model.require()
        loaded.model.chain.prove()
        if super().on_activate(state) != TransitionCallbackReturn.SUCCESS:
            raise C7Error('the tensor publisher could not be activated.')
        self._answering = Answering(self, self._parts, loaded.model, loaded.topics, loaded.settings, owner=self)
        self._answering.open()
        self._wakeup.on_activate()
        self.get_logger().info(f'active, listening to {", ".join(loaded.topics)}')

    def _deactivate(self, state: LifecycleState) -> None:
        self._close_streams()
        super().on_deactivate(state)

    def _close_streams(self) -> None:
        try:
            if self._answering is not None:
                self._answering.close(self._leave_behind)
            # Not before: error processing closes what a failure has left.
            self._answering = None
        finally:
            self._wakeup.on_deactivate()

    def _leave_behind(self, what: str) -> None:
        self._left_behind = True
        self.get_logger().error(f'{what}; its thread keeps running')

    def _release(self) -> None:
        self._close_streams()
        self._model.on_cleanup()

    # --- model swap -------------------------------------------------------------------------------

    def make_chain(self, bundle: ModelBundle, settings: NodeSettings) -> RuntimeChain:
        """Return a chain for another model; engines are not built in flight (F-5)."""
        return self._model.make_chain(bundle, settings)

    def path_accepted(self, path: str) -> bool:
        """Return whether clients see ``path`` as ``model_path`` now."""
        return bool(self.get_parameter('model_path').value == path)

    def model_swapped(self, model: ServedModel, settings: NodeSettings) -> None:
        """Note the model that answers now, for diagnostics and the next cleanup."""
        self._model.swapped(settings, model)

    def keep_model(self) -> None:
        """Restore ``model_path`` and its companions to the model that keeps answering."""
        self._settings.restore_model(self._model.require().settings)

    def swap_changed(self, status: SwapStatus) -> None:
        """Show the swap's progress at once."""
        self._swap = status
        self.guard('diagnostics', self._diagnostics.publish)()

    def _begin_swap(self, settings: NodeSettings) -> None:
        answering = self._answering
        if answering is not None:
            answering.swapper.begin(settings.model_path, settings)
        elif why := self._why_fixed('model_path'):
            raise ConfigError('model_path', why)

    # --- parameters -------------------------------------------------------------------------------

    def _why_fixed(self, name: str) -> str | None:
        state = self.lifecycle_state
        if state == 'unconfigured' or (name == 'model_path' and self._answering is not None):
            return None
        if state == 'finalized':
            return 'cannot be changed any more; restart the node.'
        steps = 'deactivate and cleanup' if state == 'active' else 'cleanup'
        instead = ' Or set it together with model_path.' if state == 'active' and name in WITH_MODEL else ''
        return f'cannot be changed while {state}; run {steps} first, then set it and configure.{instead}'

    def _set_live(self, live: LiveSettings) -> None:
        self._live = live
        self._wakeup.on_settings()
        self._policy.on_settings(live)

    def _config_digest(self) -> str:
        try:
            return self._settings.settings().config.digest()
        except ConfigError as error:
            return f'none: {error}'

    # --- diagnostics ------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._recorder.flush()
        if self._live.thermal_policy != ThermalPolicy.OFF:
            self._events.thermal(self._thermal.thermal_state())
        answering = self._answering
        if answering is not None:
            answering.streams.look()
        self._diagnostics.publish()

    def _publish_changes(self) -> None:
        self.guard('diagnostics', functools.partial(self._diagnostics.publish, only_changes=True))()

    def _reports(self) -> list[Report]:
        snapshot = self._statistics.snapshot()
        loaded = self._model.current
        reports = [
            runtime_report(
                self.lifecycle_state,
                loaded.model.chain.status() if loaded else None,
                self._start_problem,
                snapshot.callback_failures,
                (*self._notices, *filter(None, [self._wakeup.problem])),
                self._factory.building,
                self._swap,
                self._factory.gpu_memory,
            )
        ]
        answering = self._answering
        streams = answering.streams if answering is not None else None
        for topic in loaded.topics if loaded else ():
            health = stream_health(topic, snapshot, streams, self._events, self._policy)
            reports.append(stream_report(health, active=streams is not None))
        reports.append(latency_report(snapshot.stages, self._live.latency_warn_ms))
        state = self._thermal.thermal_state()
        reports.append(thermal_report(state, self._live.thermal_policy, self._policy.answered_of))
        return reports


def _answered_of(snapshot: StatisticsSnapshot) -> str:
    """Say how many of the images that arrived on all topics were answered."""
    streams = snapshot.streams.values()
    answered, received = sum(each.answered for each in streams), sum(each.received for each in streams)
    return f'{answered} of {received} images answered since configure'
