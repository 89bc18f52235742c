"""What a node says: text from outside in it, log levels, and what a stranger can make of its log and records."""

from __future__ import annotations

import array
import importlib
import re
import signal
import time

import pytest
import yaml
from rcl_interfaces.msg import Log
from rcl_interfaces.srv import GetParameters, ListParameters
from rclpy.parameter import Parameter, parameter_value_to_python
from rclpy.qos import DurabilityPolicy, QoSProfile

from support.harness import Peer, image, running_node, wait_until
from support.networks import copying

CAMERA = '/camera/image_raw'
FORGED = '[FATAL] [1700000000.000000000] [c7_inference]: the engine is on fire'
HOSTILE = f'/no\x1b[2Jsuch\u202e\n{FORGED}\r\u2028\x9b'
# Each message of the log begins so; what does not is a line below one.
BEGINS = re.compile(r'\[(DEBUG|INFO|WARN|ERROR|FATAL)\] \[\d+\.\d+\] \[[\w./]+\]: ')


def lines_of(process) -> list[str]:
    """Return the lines of a node's log, each of which is a message or indented below one."""
    lines = process.output().split('\n')
    assert all(BEGINS.match(line) or line.startswith('    ') or not line for line in lines)
    return lines


def test_a_newline_in_model_path_forges_no_line_of_the_log():
    with running_node() as (process, peer):
        rosout: list[Log] = []
        latched = QoSProfile(depth=1000, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        peer.node.create_subscription(Log, '/rosout', rosout.append, latched)
        assert peer.set_parameter('model_path', HOSTILE).successful
        assert not peer.change_state('configure')
        peer.wait_level('Runtime', 'ERROR')
        for text in (peer.message('Runtime'), peer.wait_record('c7.start_failed')['reason']):
            assert r'/no\x1b[2Jsuch\u202e\n[FATAL]' in text and text.isprintable()
        assert not [line for line in lines_of(process) if line.startswith('[FATAL]')]
        assert '\x1b' not in process.output()
        wait_until(lambda: any('configure failed' in line.msg for line in rosout), 'the message on /rosout')
        assert all(line.msg.isprintable() for line in rosout if line.name == 'c7_inference')


def test_a_4_mib_encoding_makes_small_records_and_lines(tmp_path):
    """Its answer, where there is one, carries the beginning; a frame_id that long is refused, others go untouched."""
    huge = 'x' * (4 << 20)
    with running_node({'model_path': copying(tmp_path), 'cpu_threads': 1, 'hot_standby': False}) as (process, peer):
        peer.start()
        peer.wait_matched(CAMERA)

        def refused_in_the_end(message, count):
            """Send it again where it was lost on its way, as large ones are."""
            peer.publisher(CAMERA).publish(message)
            time.sleep(0.2)
            return len(peer.payloads('c7.image_refused')) >= count

        wait_until(lambda: refused_in_the_end(image(1, encoding=f'{huge}\n{FORGED}'), 1), 'the refusal of one')
        refused = peer.payloads('c7.image_refused')[0]
        assert refused['reason'] == 'encoding' and len(refused['message']) < 5000
        hostile = image(2)
        hostile.header.frame_id = huge
        wait_until(lambda: refused_in_the_end(hostile, 2), 'the refusal of the other')
        assert 'frame_id' in peer.payloads('c7.image_refused')[1]['message']
        longest = image(3)
        longest.header.frame_id = '日' * 16_384
        assert peer.ask(CAMERA, longest).header.frame_id == '日' * 16_384
        longest.header.frame_id += '日'
        longest.header.stamp.sec = 4
        told = len(peer.diagnostics)
        wait_until(lambda: len(peer.diagnostics) > told + 1, 'diagnostics that know of what came before')
        before = int(peer.values(f'Stream {CAMERA}')['refused message'])
        peer.publisher(CAMERA).publish(longest)
        wait_until(lambda: int(peer.values(f'Stream {CAMERA}')['refused message']) > before, 'the one too long')
        assert max(len(record.payload_json) for record in peer.records) < 20_000
        assert max(map(len, lines_of(process))) < 5000
        assert max(len(pair.value) for each in peer.diagnostics for s in each.status for pair in s.values) < 5000


def test_log_levels_change_at_run_time(tmp_path):
    """Node and library alike; a level given at the start holds, and deactivate, cleanup and shutdown leave a line."""
    try:
        from rcl_interfaces.msg import LoggerLevel
        from rcl_interfaces.srv import GetLoggerLevels, SetLoggerLevels
    except ImportError:
        pytest.skip('this ROS has no services for log levels')
    arguments = ('--log-level', 'c7_inference:=warn')
    with running_node({'model_path': copying(tmp_path), 'cpu_threads': 1}, arguments) as (process, peer):
        peer.start()
        assert peer.change_state('deactivate') and peer.change_state('cleanup')
        assert '[INFO]' not in process.output().replace('[c7_inference]: DDS', '')
        names = GetLoggerLevels.Request(names=['c7_inference'])
        assert peer.look_up(GetLoggerLevels, 'get_logger_levels', names).levels[0].level == LoggerLevel.LOG_LEVEL_WARN
        level = LoggerLevel(name='c7_inference', level=LoggerLevel.LOG_LEVEL_INFO)
        answer = peer.look_up(SetLoggerLevels, 'set_logger_levels', SetLoggerLevels.Request(levels=[level]))
        assert answer.results[0].successful
        peer.start()
        wait_until(lambda: 'serves copying' in process.output(), "the library's line")
        assert peer.change_state('deactivate')
        assert 'inactive, 0 of 0 images answered' in process.output()
        assert peer.change_state('cleanup')
        assert 'unconfigured; the engines have ended' in process.output()
        assert peer.change_state('shutdown')
        assert 'finalized' in process.output()


def test_what_ros2_param_dump_prints_is_read_back_unchanged(domain_id, start_node, tmp_path):
    """By rclpy's own reader, which ``ros2 param load`` uses: it takes [.nan] for a text."""
    read_file = getattr(importlib.import_module('rclpy.parameter'), 'parameter_dict_from_yaml_file', None)
    if read_file is None:
        pytest.skip('this rclpy has no reader of parameter files')
    file = tmp_path / 'dumped.yaml'
    for arguments in ((), ('-p', 'preprocess.mean:=[.nan]')):
        node, peer = start_node(arguments=arguments), Peer(domain_id)
        names = sorted(peer.call(ListParameters, 'list_parameters', ListParameters.Request()).result.names)
        told = peer.call(GetParameters, 'get_parameters', GetParameters.Request(names=names)).values
        plain = {name: parameter_value_to_python(value) for name, value in zip(names, told, strict=True)}
        plain = {name: list(value) if isinstance(value, array.array) else value for name, value in plain.items()}
        file.write_text(yaml.dump({'/c7_inference': {'ros__parameters': plain}}, default_flow_style=False))
        read = read_file(str(file), target_nodes=['/c7_inference'])
        assert {name: each.value for name, each in read.items()} == dict(zip(names, told, strict=True))
        for name in names:
            if name not in ('autostart', 'start_type_description_service', 'use_sim_time'):
                assert peer.set_parameter(name, Parameter.from_parameter_msg(read[name]).value).successful
        node.signal(signal.SIGTERM)
        assert node.wait() == 0
        peer.close()
