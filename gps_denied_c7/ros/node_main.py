"""The ``c7_inference_node`` executable: process, signals, executor."""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import re
import stat
import sys
import threading
from collections.abc import Iterable, Iterator

import rclpy
from rclpy.context import Context
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import remove_ros_args

from gps_denied_c7.monitoring.thermal import ThermalSource
from gps_denied_c7.monitoring.thermal_sources import find_thermal_source
from gps_denied_c7.ros.callbacks import PoolExecutor
from gps_denied_c7.ros.dds_memory import sweep_segments, transport_warnings
from gps_denied_c7.ros.fastdds import (
    apply_profile,
    domain_id,
    free_taken_messages,
    tune_allocator,
)
from gps_denied_c7.ros.log_forwarding import forward_to, log_files_problem
from gps_denied_c7.ros.node import DEFAULT_NODE_NAME, C7InferenceNode
from gps_denied_c7.ros.shutdown import NodeStop
from gps_denied_c7.text import plain

__all__ = ['main']

_END_S = 3.0
_THREADS = 4

_HELP = f"""usage: c7_inference_node [-h] [--ros-args ...]

Answer camera images with the tensors of a neural network: a ROS 2 lifecycle node, /{DEFAULT_NODE_NAME}.

  ros2 run gps_denied_c7 c7_inference_node --ros-args -p model_path:=/path/to/bundle -p autostart:=true \\
      -p 'image_topics:=[/camera/image_raw]'
  ros2 launch gps_denied_c7 c7_inference.launch.py

model_path names a model bundle (c7_engine bundle makes one) or an .onnx file. Without autostart the node waits:
  ros2 lifecycle set /{DEFAULT_NODE_NAME} configure
  ros2 lifecycle set /{DEFAULT_NODE_NAME} activate

options:
  -h, --help    show this help and exit
  --ros-args    what follows is for ROS 2: -p NAME:=VALUE, --params-file FILE, -r FROM:=TO, --log-level LEVEL

parameters:
  config/c7_inference.yaml, installed with the package, lists all with their defaults; docs/reference/parameters.md
  explains them. Of a running node: ros2 param list /{DEFAULT_NODE_NAME}, ros2 param describe /{DEFAULT_NODE_NAME} NAME

It ends with SIGINT (Ctrl-C) or SIGTERM, and exits with 0; with 2 where the command line cannot be used.
"""

_ROS_REMEDIES = {
    'params file': 'Check that the file exists and is a ROS parameter file, like config/c7_inference.yaml.',
    'remap rule': 'Write -r FROM:=TO.',
    'log level': 'Write --log-level debug, info, warn, error or fatal.',
    '': 'Write -p NAME:=VALUE, with VALUE as in a parameter file.',
}
"""What to do about arguments that rcl refuses, by a word in its message; the first that fits."""


def main(args: list[str] | None = None) -> int:
    """
    Run the node until SIGINT, SIGTERM or SIGHUP.

    rclpy's own handlers invalidate the context first, after which nothing can be published; so they
    are not installed. The executor spins in a thread of its own and the main thread waits for signals.

    :return: the exit code 0 after --help, 2 for a command line that cannot be used; after a signal the process ends
        with 0 in here.
    """
    _open_standard_streams()
    args = sys.argv[1:] if args is None else args
    own = list(_outside_ros_args(args))
    if {'-h', '--help'}.intersection(own):
        print(_HELP, end='')
        return 0
    if problem := _command_line_problem(args, own):
        _say(f'c7_inference_node: {problem}')
        return 2
    _wait_for_no_reader()
    # Nothing here multiplies matrices. OpenCV's copy of OpenBLAS would start a thread for each core and, where it may
    # not, send this process a SIGINT.
    os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
    profile = apply_profile(os.environ)
    free_taken_messages(os.environ, profile.path)
    tune_allocator()
    swept = sweep_segments()
    stop = NodeStop()
    no_log_files = log_files_problem(os.environ)
    if no_log_files:
        args = [*args, '--ros-args', '--disable-external-lib-logs']
    try:
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
        thermal = find_thermal_source()
        thermal.start()
        node = C7InferenceNode(thermal=thermal)
    except Exception as error:
        _say(f'c7_inference_node cannot start: {error}')
        return 2
    node.get_logger().info(profile.reason)
    if str(swept):
        node.get_logger().info(str(swept))
    notices = (*transport_warnings(os.environ), *filter(None, [no_log_files]))
    # On Humble, a new one is the default after the shutdown of this one.
    context = rclpy.get_default_context()
    left_behind = not _run(node, thermal, stop, notices)
    del node
    if not left_behind:
        _leave_domain(context)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):  # its reader is gone
            stream.flush()
    # Everything has been reported and freed; the exit code must not depend on the order in which vendor
    # libraries run their static destructors.
    os._exit(0)


def _leave_domain(context: Context) -> None:
    """
    Free what Fast DDS reserved for the participant: 70 MB of /dev/shm for each process that omits it.

    The participant goes with its context once nothing refers to it.
    """
    gc.collect()
    try:
        context.destroy()
    except Exception as error:
        _say(f'c7_inference_node could not leave its DDS domain: {error}')


def _outside_ros_args(arguments: Iterable[str]) -> Iterator[str]:
    """Yield what ROS does not read: what stands before ``--ros-args`` and behind the ``--`` that may end it."""
    for_ros = False
    for argument in arguments:
        if argument == ('--' if for_ros else '--ros-args'):
            for_ros = not for_ros
        elif argument not in ('', '--') and not for_ros:
            yield argument


def _command_line_problem(arguments: list[str], own: list[str]) -> str:
    """
    Say why ROS cannot start, with the remedy; empty where it can.

    :param own: arguments that are not for ROS. rcl ignores them, or takes NAME:=VALUE for a remapping.
    """
    if own:
        return (
            f'{own[0]!r} is not an option of this program. Parameters follow --ros-args: '
            'c7_inference_node --ros-args -p model_path:=net.onnx'
        )
    try:
        domain_id(os.environ.get('ROS_DOMAIN_ID') or '0')
        remove_ros_args(arguments)
    except argparse.ArgumentTypeError as error:
        return f'ROS_DOMAIN_ID: {error}'
    except Exception as error:  # rclpy's own, which it does not export
        wrong = re.sub(r'[.\s]*, at [^ ]+:\d+', '', str(error))
        remedy = next(remedy for word, remedy in _ROS_REMEDIES.items() if word in wrong)
        return f'ROS does not accept what follows --ros-args: {wrong}. {remedy}'
    return ''


def _run(node: C7InferenceNode, thermal: ThermalSource, stop: NodeStop, notices: tuple[str, ...]) -> bool:
    """Spin ``node`` until ``stop``, end it, and return whether nothing was left behind."""
    logging_bridge = forward_to(node.get_logger())
    executor = PoolExecutor(_THREADS, on_escape=lambda error: node.report_callback_failure('executor', error))
    executor.add_node(node)
    spinning = threading.Thread(target=executor.spin, name='c7-executor', daemon=True)
    spinning.start()
    node.begin(notices)
    stop.wait()
    try:
        node.get_logger().info(f'{stop.reason}: shutting down')
        clean = node.end(stop.reason, timeout_s=_END_S)
        thermal.stop()
        executor.stop()
        spinning.join(1.0)
        logging.getLogger().removeHandler(logging_bridge)
        if clean and not spinning.is_alive():
            # Leaving the domain properly spares peers the wait for a lease to run out. Where a callback or an
            # engine is still busy, tearing DDS down under it could crash instead.
            executor.shutdown(timeout_sec=0.5)
            node.destroy_node()
            rclpy.try_shutdown()
            return True
    except Exception as error:
        try:
            node.report_callback_failure('shutdown', error)
        except Exception:  # there is nothing left to report it with
            _say(f'c7_inference_node failed while shutting down: {type(error).__name__}: {error}')
    return False


def _say(text: str) -> None:
    """Print a line on standard error; where its reader is gone, neither that nor what is flushed later is a failure."""
    try:
        print(plain(text), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        sys.stderr = None  # type: ignore[assignment]


def _open_standard_streams() -> None:
    """Open what was closed of descriptors 0 to 2; whatever got such a number would have log lines written into it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _wait_for_no_reader() -> None:
    """
    Drop log lines that have no reader: a full pipe, or a terminal that Ctrl-S has stopped.

    rclpy writes them under the interpreter's lock, so that a write that waits would hold up every thread. Opened again,
    since the flag belongs to the open file, which others share; what cannot be opened so, as a socket, stays as it is.
    """
    for number in (1, 2):
        if not (stat.S_ISFIFO(os.fstat(number).st_mode) or os.isatty(number)):
            continue
        with contextlib.suppress(OSError):
            again = os.open(f'/proc/self/fd/{number}', os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            os.dup2(again, number)
            os.close(again)


if __name__ == '__main__':
    sys.exit(main())
