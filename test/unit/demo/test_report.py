"""The demo's verdict: each thing that can go wrong is seen, and told in every form."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

from gps_denied_c7.demo.report import STAGES, DemoReport, FrameCount, expected_alerts, stage_percentiles

pytest.importorskip('tabulate')

COUNT = FrameCount(
    topic='/camera/image_raw', sent=10, answered=10, repeated=0, dropped=0, refused=0, unanswered=0, lost_before_node=0
)
RECORDS = tuple(
    (kind, {'model_name': 'm'})
    for kind in ('c7.session_started', 'c7.fallback_to_onnx_trt_ep', 'c7.cpu_fallback', 'c7.session_ended')
)
GOOD = DemoReport(
    frames=(COUNT,),
    stages={'/camera/image_raw': dict.fromkeys(STAGES, (1.0, 2.5, 3.25))},
    model='m',
    weights_digest='sha256:0123456789abcdef',
    runtimes=('onnx_trt_ep',),
    providers=('CPUExecutionProvider',),
    is_fallback=True,
    records=RECORDS,
    standing_alerts=('c7.fallback_to_onnx_trt_ep', 'c7.cpu_fallback'),
    diagnostics_message='fallback',
    node_exit_code=0,
    transport='shared memory',
    pace=1.0,
    seconds={'replay': 1.0},
)


def changed(**values: Any) -> DemoReport:
    return dataclasses.replace(GOOD, **values)


def counted(**values: int | None) -> DemoReport:
    return changed(frames=(dataclasses.replace(COUNT, **values),))


def test_a_good_run_has_no_problems():
    assert GOOD.problems() == []


@pytest.mark.parametrize(
    ('report', 'words'),
    [
        (counted(answered=9), '1 of 10 frames were lost'),
        (counted(answered=9, dropped=1), '10 frames went in and 9 answers came out'),
        (counted(answered=9, refused=1), '10 frames went in and 9 answers came out'),
        (counted(answered=9, unanswered=1), '10 frames went in and 9 answers came out'),
        (counted(answered=9, lost_before_node=1), '1 frames were lost on the way'),
        (counted(repeated=2), '2 frames were answered more than once'),
        (changed(records=RECORDS[:1] + RECORDS[2:]), 'c7.fallback_to_onnx_trt_ep was recorded 0 times'),
        (changed(records=RECORDS + RECORDS[2:3]), 'c7.cpu_fallback was recorded 2 times'),
        (changed(standing_alerts=('c7.cpu_fallback',)), 'c7.fallback_to_onnx_trt_ep is not on /diagnostics'),
        (changed(records=RECORDS[:-1]), 'did not record the end'),
        (changed(node_exit_code=-9), 'ended with code -9'),
    ],
)
def test_every_problem_is_seen(report, words):
    """Deliverable 7: non-zero exit when a frame was lost or an alert is missing."""
    assert any(words in problem for problem in report.problems()), report.problems()
    assert words in report.markdown()
    assert report.to_json()['problems'] == report.problems()


def test_unknown_loss_before_the_node_is_no_loss():
    """N-3: unknown is not 0, but it is no proof of loss either; the account from end to end is."""
    assert counted(lost_before_node=None).problems() == []
    assert counted(lost_before_node=None, answered=9).problems()


def test_lost_is_what_nothing_accounts_for():
    count = dataclasses.replace(COUNT, answered=4, dropped=3, refused=1, unanswered=1)
    assert count.lost == 1


@pytest.mark.parametrize(
    ('runtimes', 'providers', 'fallback', 'alerts'),
    [
        (['onnx_trt_ep'], ['CPUExecutionProvider'], True, ['c7.fallback_to_onnx_trt_ep', 'c7.cpu_fallback']),
        (['onnx_trt_ep'], ['TensorrtExecutionProvider'], True, ['c7.fallback_to_onnx_trt_ep']),
        (['onnx_trt_ep'], ['CPUExecutionProvider'], False, ['c7.cpu_fallback']),
        (['tensorrt'], ['TensorRT'], False, []),
    ],
)
def test_alerts_are_expected_by_what_answered(runtimes, providers, fallback, alerts):
    """AC-5, Risk-2: a machine with a GPU raises no CPU alert."""
    assert list(expected_alerts(runtimes, providers, fallback)) == alerts


def test_tables_hold_every_number():
    """§8: frames in, out, dropped by policy, lost; p50, p95, p99 per stage; runtime, provider; alerts."""
    for style in ('simple_outline', 'github'):
        text = counted(sent=23, answered=17, dropped=4).text(style)
        for words in ('in', 'out', 'dropped by policy', 'lost', 'p50', 'p95', 'p99', *STAGES, '2.50', '3.25'):
            assert words in text
        row = next(line for line in text.splitlines() if '/camera/image_raw' in line)
        assert re.findall(r'\d+', row) == ['23', '17', '4', '0', '2']
        for words in ('onnx_trt_ep (as fallback)', 'CPUExecutionProvider', 'c7.cpu_fallback'):
            assert words in text
    assert '| stage' in GOOD.markdown() and '![detections](detections.png)' in GOOD.markdown()


def test_report_is_json():
    values = json.loads(json.dumps(GOOD.to_json()))
    assert values['frames'][0]['lost'] == 0 and values['records'][1]['kind'] == 'c7.fallback_to_onnx_trt_ep'


def test_percentiles_are_milliseconds_of_each_stage():
    answers = [{'ns': dict.fromkeys(STAGES, (index + 1) * 1_000_000)} for index in range(101)]
    assert stage_percentiles(answers)['engine'] == (51.0, 96.0, 100.0)


def test_what_no_other_stage_took_of_the_total_is_the_messages():
    inside = {'queue': 1e6, 'decode': 2e6, 'preprocess': 3e6, 'hand_off': 1e6, 'engine': 2e6, 'hand_back': 1e6}
    answers = [{'ns': {**inside, 'total': (10 + extra) * 1e6}} for extra in (1, 2, 3)]
    found = stage_percentiles(answers)
    assert found['message'][0] == 2.0 and found['total'][0] == 12.0
