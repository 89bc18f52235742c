"""The ``c7_replay`` executable: play a rosbag2 onto its topics as the raw CDR it was recorded as."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import rclpy
from rclpy.signals import SignalHandlerOptions

from gps_denied_c7.ground.command_line import log_to_stderr, path_argument
from gps_denied_c7.ros.bag import Bag, BagError
from gps_denied_c7.ros.dds_memory import transport_warnings
from gps_denied_c7.ros.fastdds import apply_profile, tune_allocator
from gps_denied_c7.ros.replay_report import ReplayReport
from gps_denied_c7.ros.replayer import DEFAULT_MAX_GAP_S, DEFAULT_WAIT_S, Replayer, ReplayOptions
from gps_denied_c7.ros.shutdown import on_first_signal
from gps_denied_c7.text import plain

__all__ = ['main']

_DEFAULT_CLOCK_HZ = 40.0
_NAME_CHARACTERS = 40
_SMALLEST, _LARGEST = 1e-9, 1e9
_ENDING = (signal.SIGINT, signal.SIGTERM)

_logger = logging.getLogger('c7_replay')


class _Terminal:
    """Write to standard error, and ignore failures: a progress bar does not deserve an error message."""

    encoding = 'utf-8'

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(text, end='', file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Do nothing: each text is written at once."""

    def isatty(self) -> bool:
        return sys.stderr is not None and sys.stderr.isatty()

    def fileno(self) -> int:
        return 2


class _Signals:
    """
    End the program at SIGINT or SIGTERM: at once until :meth:`defer`, after which only ``stop`` is set.

    rclpy's own handlers would shut the context down under a publisher.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.received: signal.Signals | None = None
        for number in _ENDING:
            signal.signal(number, self._interrupt)

    def defer(self) -> None:
        """Only note the first signal from now on."""
        on_first_signal(_ENDING, self._note)

    def _interrupt(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number)
        raise KeyboardInterrupt

    def _note(self, number: signal.Signals) -> None:
        self.received = number
        self.stop.set()


def main(args: Sequence[str] | None = None) -> int:
    """
    Run ``c7_replay``.

    :return: 0 when everything that was asked for was in the bag and was sent, or a loop over it was ended by a signal;
        1 when the bag cannot be played, something in it is missing, or the report cannot be written; 2 for a command
        line that cannot be used; 128 + signal number when interrupted before the end.
    """
    own, ros = _split_arguments(sys.argv[1:] if args is None else args)
    parser = _parser()
    parsed = parser.parse_args(own)
    remap = dict(parsed.remap or ())
    if len(remap) < len(set(parsed.remap or ())):
        parser.error('--remap gives one topic several names')
    log_to_stderr('c7_replay', logging.INFO)
    options = ReplayOptions(
        rate=parsed.rate,
        loop=parsed.loop,
        topics=tuple(parsed.topics or ()),
        remap=remap,
        clock_hz=parsed.clock or 0.0,
        wait_matched_s=DEFAULT_WAIT_S if parsed.wait_matched is None else parsed.wait_matched,
        require_matched=bool(parsed.wait_matched),
        max_gap_s=parsed.max_gap,
    )
    report = ReplayReport(str(parsed.bag), options.rate)
    try:
        # Before hours of replay, and so that no older report stays where this one cannot be written.
        written = _open_report(parsed.json, parsed.bag) if parsed.json else None
    except OSError as error:
        _logger.error('%s cannot be written: %s. Name another file with --json.', parsed.json, error)
        return 1
    _logger.info(apply_profile(os.environ).reason)
    tune_allocator()
    signals = _Signals()
    # A file of gigabytes without an index takes seconds.
    _logger.info('opening the bag')
    try:
        with Bag(parsed.bag) as bag:
            signals.defer()
            _init(ros)
            try:
                _run(bag, options, signals, report, show_progress=parsed.progress)
            finally:
                rclpy.try_shutdown()
    except BagError as error:
        report.error = str(error)
        _logger.error('%s', error)
    except KeyboardInterrupt:
        _logger.error('interrupted while the bag was opened; nothing was sent.')
    report.interrupted = signals.received.name if signals.received else ''
    saved = _save(report, written)
    if report.error:
        return 1
    if signals.received is not None and not (options.loop and report.loops):
        return 128 + signals.received
    return 0 if saved and report.complete else 1


def _init(arguments: list[str]) -> None:
    """
    Start ROS.

    :raises BagError: it cannot, as for arguments that it does not know.
    """
    try:
        rclpy.init(args=arguments, signal_handler_options=SignalHandlerOptions.NO)
    except Exception as error:
        # rclpy has no common class for what arguments, rcl and the middleware refuse.
        raise BagError(f'ROS cannot start: {error}.', remedy='Correct what follows --ros-args.') from error


def _run(
    bag: Bag, options: ReplayOptions, signals: _Signals, report: ReplayReport, *, show_progress: bool | None
) -> None:
    from tqdm import tqdm

    node = rclpy.create_node('c7_replay', start_parameter_services=False, enable_rosout=False)
    try:
        replayer = Replayer(node, bag, options, signals.stop, report)
        for warning in [*transport_warnings(os.environ), *report.notes, *report.missing]:
            _logger.warning('%s', warning)
        replayer.wait_matched()
        total = None if options.loop else sum(topic.recorded for topic in report.topics)
        disable = None if show_progress is None else not show_progress
        name = plain(bag.path.name, _NAME_CHARACTERS)
        try:
            with tqdm(total=total, unit='msg', desc=name, disable=disable, file=_Terminal()) as bar:
                replayer.play(bar.update)
        finally:
            replayer.finish()
            for line in report.lines():
                _logger.info('%s', line)
    finally:
        node.destroy_node()


def _open_report(path: Path, bag: Path) -> TextIO:
    """
    Open the file for the report, and empty it.

    :raises OSError: it cannot be written, or is the bag.
    """
    within = bag.resolve() in path.resolve().parents
    if path.exists() and (within or any(file.exists() and file.samefile(path) for file in (bag, *bag.glob('*')))):
        raise FileExistsError('it belongs to the bag')
    return path.open('w', encoding='utf-8')


def _save(report: ReplayReport, file: TextIO | None) -> bool:
    """Write the report where it was asked for; False, and an error in the log, where that fails."""
    if file is None:
        return True
    try:
        with file:
            file.write(json.dumps(report.to_json(), indent=2) + '\n')
    except OSError as error:
        _logger.error('%s could not be written: %s. Name another file with --json.', file.name, error)
        return False
    return True


def _split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """
    Part the command line into this program's arguments and those that follow ``--ros-args``.

    rclpy's own splitting takes any ``a:=b`` for itself, which is what ``--remap`` takes as well.
    """
    if '--ros-args' not in arguments:
        return list(arguments), []
    begin = arguments.index('--ros-args')
    end = arguments.index('--', begin) if '--' in arguments[begin:] else len(arguments)
    return [*arguments[:begin], *arguments[end + 1 :]], list(arguments[begin:end])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='c7_replay',
        description='Play a rosbag2 (sqlite3 or mcap) onto its topics, as recorded. Parts that are damaged, missing or '
        'not playable are reported, the rest is played; the bag is never changed.',
        epilog='Exit code: 0 when everything asked for was in the bag and was sent; 1 when it cannot be played or '
        'something is missing; 2 for a wrong command line; 128 + signal when interrupted.',
    )
    parser.add_argument('bag', type=path_argument, help='bag directory, or one .mcap or .db3 file')
    parser.add_argument(
        '--rate', type=_positive, default=1.0, metavar='FACTOR', help='factor on the recorded speed; default: 1'
    )
    parser.add_argument('--loop', action='store_true', help='start over at the end, until interrupted')
    parser.add_argument(
        '--topics', nargs='+', action='extend', metavar='TOPIC', help='play only these, and wait for their subscribers'
    )
    parser.add_argument(
        '--remap', nargs='+', action='extend', type=_remapping, metavar='FROM:=TO', help='publish under other names'
    )
    parser.add_argument(
        '--clock', nargs='?', type=_positive, const=_DEFAULT_CLOCK_HZ, metavar='HZ',
        help=f"publish the bag's time on /clock, {_DEFAULT_CLOCK_HZ:g} times a second where HZ is not given",
    )  # fmt: skip
    parser.add_argument(
        '--wait-matched', type=_not_negative, metavar='SECONDS',
        help='give up if there is no subscriber by then (to each of --topics, else to any topic); 0: do not wait. '
        f'Default: wait {DEFAULT_WAIT_S:g} s, then play anyway',
    )  # fmt: skip
    parser.add_argument(
        '--max-gap', type=_gap, default=DEFAULT_MAX_GAP_S, metavar='SECONDS',
        help='shorten a longer silence on the topics played, as when the clock was set while recording, to this many '
        f'seconds of bag time, and report it; inf: play it in full. Default: {DEFAULT_MAX_GAP_S:g}',
    )  # fmt: skip
    parser.add_argument(
        '--progress', action=argparse.BooleanOptionalAction, help='show the progress; default: only on a terminal'
    )
    parser.add_argument('--json', type=path_argument, metavar='FILE', help='also write the report to this file')
    return parser


def _number(text: str) -> float:
    """Return NaN, which no range contains, for other text: argparse would name the function for a ValueError."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _positive(text: str) -> float:
    value = _number(text)
    if not _SMALLEST <= value <= _LARGEST:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number from {_SMALLEST:g} to {_LARGEST:g}')
    return value


def _gap(text: str) -> float:
    return math.inf if _number(text) == math.inf else _positive(text)


def _not_negative(text: str) -> float:
    value = _number(text)
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number from 0 on')
    return value


def _remapping(text: str) -> tuple[str, str]:
    source, separator, target = text.partition(':=')
    if not (source and separator and target):
        raise argparse.ArgumentTypeError(f'{text} is not FROM:=TO')
    return source, target


if __name__ == '__main__':
    sys.exit(main())
