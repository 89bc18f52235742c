"""The node's parameters: declared, checked when they are set, and restored (N-10)."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Mapping
from typing import Any

from rcl_interfaces.msg import SetParametersResult
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.node import Node
from rclpy.parameter import Parameter

from gps_denied_c7.errors import C7Error, ConfigError
from gps_denied_c7.ros.parameter_table import PARAMETERS, ParameterDeclaration
from gps_denied_c7.ros.settings import (
    DECLARED,
    LiveSettings,
    NodeSettings,
    is_unset_mean,
    same_value,
    settings_from,
)
from gps_denied_c7.text import plain

__all__ = ['NodeParameters']

_BY_NAME = {declaration.name: declaration for declaration in PARAMETERS}


class NodeParameters:
    """
    Own the node's parameters.

    A value of the wrong type or out of range in the parameter file must not end the process: the
    default is declared in its place and ``configure`` is refused until the value is set.

    :param fixed: says why the parameter of that name, which is not live, cannot be set now, or None when it can.
    :param on_live: called with the new live settings after each change.
    :param on_model: called with each new ``model_path`` that is valid so far, and the other settings, before it is set;
        raises a C7Error to refuse it.
    :param on_failure: called with the callback's name and an unexpected exception.
    """

    def __init__(
        self,
        node: Node,
        *,
        fixed: Callable[[str], str | None],
        on_live: Callable[[LiveSettings], None],
        on_model: Callable[[NodeSettings], None],
        on_failure: Callable[[str, Exception], None],
    ) -> None:
        self._node = node
        self._fixed = fixed
        self._on_live = on_live
        self._on_model = on_model
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._restoring: int | None = None
        self._broken: dict[str, str] = {}
        for declaration in PARAMETERS:
            self._declare(declaration)
        self._values = {declaration.name: self._value(declaration.name) for declaration in PARAMETERS}
        self._warn_of_strangers()
        node.add_on_set_parameters_callback(self._on_set)

    def settings(self) -> NodeSettings:
        """
        Return what a configure works with now.

        :raises ConfigError: a value that cannot be used, naming the parameter.
        """
        with self._lock:
            for name, problem in self._broken.items():
                raise ConfigError(name, problem, remedy=f'Correct the parameter file, or ros2 param set {name}.')
            return settings_from(self._values)[0]

    def values(self) -> dict[str, Any]:
        """Return the value of each parameter, whether it can be used or not."""
        with self._lock:
            return dict(self._values)

    def live(self) -> LiveSettings:
        """Return the live settings; the defaults' where the start values cannot be used together."""
        with self._lock:
            values = {name: self._values[name] for name in LiveSettings.__dataclass_fields__}
            return LiveSettings(**values)

    def restore_model(self, settings: NodeSettings) -> None:
        """
        Reset the parameters of the model to earlier values, in any lifecycle state and with no other effect.

        :raises ConfigError: they cannot be set.
        """
        values = {
            'model_path': settings.model_path,
            'output_tensors': list(settings.output_tensors) or [''],
            'allow_non_finite': list(settings.allow_non_finite) or [''],
        }
        parameters = [Parameter(name, value=value) for name, value in values.items()]
        self._restoring = threading.get_ident()
        try:
            result = self._node.set_parameters_atomically(parameters)
        finally:
            self._restoring = None
        if not result.successful:
            raise ConfigError('model_path', f'could not be reset to {settings.model_path!r}: {result.reason}')

    @property
    def autostart(self) -> bool:
        """Whether the node is to activate itself."""
        return bool(self._values['autostart'])

    def _declare(self, declaration: ParameterDeclaration) -> None:
        descriptor = declaration.descriptor()
        value = declaration.default
        try:
            self._node.declare_parameter(declaration.name, value, descriptor)
        except (InvalidParameterTypeException, InvalidParameterValueException) as error:
            self._broken[declaration.name] = f'the start value cannot be used ({error}).'
            self._node.get_logger().error(f'parameter {declaration.name}: {self._broken[declaration.name]}')
            self._node.declare_parameter(declaration.name, value, descriptor, ignore_override=True)
        if is_unset_mean(declaration.name, self._value(declaration.name)):
            # From a parameter file of an earlier version; NaN in a file dumped now could not be read back.
            self._node.set_parameters([Parameter(declaration.name, value=value)])

    def _warn_of_strangers(self) -> None:
        """Say which start values name no parameter: ROS ignores them silently, typing errors among them."""
        strangers = []
        # Private, and the same from Humble to Kilted; there is no other way to see them.
        for name in getattr(self._node, '_parameter_overrides', {}):
            # What others declare: rclpy itself, and each subscription's QoS later on.
            if not self._node.has_parameter(name) and not name.startswith('qos_overrides.'):
                (meant,) = difflib.get_close_matches(name, _BY_NAME, 1) or ('',)
                strangers.append(f'{name} (did you mean {meant}?)' if meant else name)
        if strangers:
            self._node.get_logger().warning(f'not parameters of this node, and ignored: {", ".join(sorted(strangers))}')

    def _value(self, name: str) -> Any:
        value = self._node.get_parameter_or(name, Parameter(name)).value
        return _plain(value)

    def _on_set(self, parameters: list[Parameter]) -> SetParametersResult:
        try:
            self._apply(parameters)
        except C7Error as error:
            return SetParametersResult(successful=False, reason=plain(error))
        except Exception as error:
            # If raised, the client would get no result.
            self._on_failure('on-set-parameters callback', error)
            return SetParametersResult(successful=False, reason=plain(f'{type(error).__name__}: {error}'))
        return SetParametersResult(successful=True)

    def _apply(self, parameters: list[Parameter]) -> None:
        ours = {parameter.name: _plain(parameter.value) for parameter in parameters if parameter.name in _BY_NAME}
        if not ours:
            return
        changed = {name: value for name, value in ours.items() if not same_value(value, self._values[name])}
        restoring = self._restoring == threading.get_ident()
        with_model = {name for name in changed if _BY_NAME[name].with_model and 'model_path' in ours}
        for name in changed:
            asked = 'model_path' if name in with_model else name
            if not _BY_NAME[name].live and not restoring and (why := self._fixed(asked)):
                raise ConfigError(name, why)
        with self._lock:
            values = {**self._values, **ours}
            try:
                settings = settings_from(values)[0]
            except ConfigError:
                # Start values that were wrong before must not keep a right one from being set.
                if _usable(self._values) or not _usable({**DECLARED, **ours}):
                    raise
            else:
                if ('model_path' in changed or with_model) and not restoring:
                    self._on_model(settings)
            self._values = values
            self._broken = {name: problem for name, problem in self._broken.items() if name not in ours}
        self._on_live(self.live())


def _usable(values: Mapping[str, Any]) -> bool:
    try:
        settings_from(values)
    except ConfigError:
        return False
    return True


def _plain(value: Any) -> Any:
    """Return ``value`` with rclpy's arrays as lists."""
    return value if value is None or isinstance(value, bool | int | float | str) else list(value)
