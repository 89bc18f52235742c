"""A lifecycle node whose services always answer (N-1, N-4, N-5)."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

from lifecycle_msgs.srv import ChangeState
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.lifecycle import LifecycleNodeMixin, TransitionCallbackReturn
from rclpy.node import Node

from gps_denied_c7.errors import C7Error
from gps_denied_c7.ros.callbacks import CallbackGuard
from gps_denied_c7.ros.plain_logger import PlainLogger
from gps_denied_c7.text import with_traceback

__all__ = ['ResponsiveLifecycleNode']


class ResponsiveLifecycleNode(LifecycleNodeMixin, Node):
    """
    Run transitions one at a time while every other service keeps answering.

    rclpy puts the lifecycle and the parameter services into one mutually exclusive group, so a long
    ``configure`` silences them all; and it answers an impossible transition with an exception that
    ends ``spin()``. Here the lifecycle services have a reentrant group of their own: a transition takes
    one thread of a PoolExecutor, the others serve. A second transition meanwhile is refused.
    The mixin is initialised by hand because LifecycleNode does not pass a callback group on.
    """

    def __init__(self, node_name: str, **kwargs: Any) -> None:
        # Humble cannot change levels at run time.
        if 'enable_logger_service' in inspect.signature(Node.__init__).parameters:
            kwargs.setdefault('enable_logger_service', True)
        self._plain_logger: PlainLogger | None = None
        Node.__init__(self, node_name, **kwargs)
        LifecycleNodeMixin.__init__(self, callback_group=ReentrantCallbackGroup())
        self.guard = CallbackGuard(self.report_callback_failure)
        self.ending = False
        """Whether the process is about to end: what fails from then on fails because of that."""
        self._transition_running = threading.Lock()
        self._transition_name = ''
        for service in self.services:
            callback = service.callback
            if service.srv_type is ChangeState:
                callback = self._refusing(callback)
            service.callback = self.guard(f'service {service.srv_name.rpartition("/")[2]}', callback)

    def get_logger(self) -> Any:
        """Return the node's logger, which escapes text from outside."""
        if self._plain_logger is None:
            self._plain_logger = PlainLogger(super().get_logger().name)
        return self._plain_logger

    @property
    def lifecycle_state(self) -> str:
        """Label of the current lifecycle state, as ``active``."""
        return str(self._state_machine.current_state[1])

    def report_callback_failure(self, callback: str, error: Exception) -> None:
        """Log an exception that a callback raised."""
        self.get_logger().error(f'{callback} failed: {type(error).__name__}: {error}')

    def operator_transition(self, label: str) -> None:
        """Note that a client asked for a transition; called before it runs."""

    def transition(self, label: str) -> bool:
        """
        Run a transition from inside the node, after one that is under way.

        :param label: ``configure``, ``activate``, ``deactivate``, ``cleanup`` or ``shutdown``.
        :return: whether it succeeded; False also where the state allows no such transition.
        """
        with self._transition_running:
            self._transition_name = label
            if not any(label == name for _, name, *_ in self._state_machine.available_transitions):
                return False
            trigger: Callable[[], TransitionCallbackReturn] = getattr(self, f'trigger_{label}')
            return trigger() == TransitionCallbackReturn.SUCCESS

    def run_transition(
        self,
        label: str,
        body: Callable[[], None],
        undo: Callable[[], None] | None = None,
        *,
        failed: TransitionCallbackReturn = TransitionCallbackReturn.FAILURE,
    ) -> TransitionCallbackReturn:
        """
        Run a transition callback's body; rclpy would swallow its exceptions silently.

        :param undo: releases what a failed ``body`` left behind.
        :param failed: the result of a failed ``body``: FAILURE leaves the state, ERROR calls :meth:`on_error`.
        """
        try:
            body()
            return TransitionCallbackReturn.SUCCESS
        except C7Error as error:
            reason, lasting = str(error), error.lasting
            if self.ending:
                self.get_logger().info(f'{label} was cancelled: {reason}')
            else:
                self.get_logger().error(f'{label} failed: {reason}')
        except Exception as error:
            reason, lasting = f'{type(error).__name__}: {error}', False
            self._report_unexpected(label, error)
        self.transition_failed(label, reason, lasting)
        if undo is not None:
            try:
                undo()
            except Exception as error:
                self._report_unexpected(label, error)
                return TransitionCallbackReturn.ERROR
        return failed

    def _report_unexpected(self, label: str, error: Exception) -> None:
        self.report_callback_failure(f'transition {label}', error)
        self.get_logger().error(with_traceback(f'{label} failed unexpectedly', error))

    def transition_failed(self, label: str, reason: str, lasting: bool) -> None:
        """Note why a transition failed, and whether it will again until a file, a package or a parameter changes."""

    def _refusing(self, change_state: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(response: ChangeState.Response, why: str) -> ChangeState.Response:
            self.get_logger().warning(f'transition refused: {why}')
            response.success = False
            return response

        def answer(request: ChangeState.Request, response: ChangeState.Response) -> ChangeState.Response:
            wanted = request.transition
            labels = {number: label for number, label, *_ in self._state_machine.available_transitions}
            label = wanted.label or labels.get(wanted.id, f'number {wanted.id}')
            if not self._transition_running.acquire(blocking=False):
                return refuse(response, f'{label}: {self._transition_name} is still under way')
            try:
                if label not in labels.values():
                    return refuse(response, f'{label} is not possible while {self.lifecycle_state}')
                self._transition_name = label
                self.operator_transition(label)
                return change_state(request, response)
            finally:
                self._transition_running.release()

        return answer
