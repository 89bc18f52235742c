"""Who competes in what."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from gps_denied_c7.bench.cases import (
    BARE,
    CAMERAS,
    CONTESTANTS,
    FORTY_LINES,
    IMAGE_SIZE,
    JPEG,
    OUTPUT_SIZE,
    SHIPPED,
    Case,
    full_cases,
    quick_cases,
    scaling_cases,
)


@pytest.mark.parametrize('cases', [quick_cases(), full_cases(), scaling_cases()], ids=['quick', 'full', 'scaling'])
def test_every_case_has_a_name_of_its_own_and_known_contestants(cases):
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert {name for case in cases for name in case.contestants} <= {one.name for one in CONTESTANTS}


def test_the_full_matrix_has_every_combination():
    found = {
        (case.height, case.model_ms, case.large_outputs, case.rate_hz, case.cameras)
        for case in full_cases() if case.seconds is None
    }  # fmt: skip
    assert found == set(itertools.product((480, 1080), (5, 30, 100), (False, True), (10, 30, 60, 0), (1, 2, 4)))


def test_pictures_that_are_compressed_are_measured_in_every_form_but_the_series():
    for cases in (quick_cases(), full_cases()):
        [case] = [case for case in cases if case.encoding == JPEG]
        assert case.name == '1080p_jpeg_5ms_small_30hz' and case.channels == 3
        assert {FORTY_LINES, SHIPPED} <= set(case.contestants)


def test_saturation_sends_more_than_the_engine_can_answer():
    case = Case(width=640, height=480, encoding='mono8', model_ms=30, rate_hz=0, cameras=2)
    assert case.sent_hz(25.0) * 2 >= 1.5 * 1000 / 25.0
    assert case.is_overloaded
    assert Case(width=640, height=480, encoding='mono8', model_ms=30, rate_hz=10).sent_hz(25.0) == 10


@pytest.mark.parametrize(
    ('maps', 'name', 'title'),
    [
        (0, 'small', 'small outputs'),
        (1, '1MB', '1 MB of outputs'),
        (5, '6MB', '6 MB of outputs'),
        (10, '12MB', '12 MB of outputs'),
    ],
)
def test_outputs_are_named_by_their_size(maps, name, title):
    case = Case(width=640, height=480, encoding='mono8', model_ms=5, dense_maps=maps)
    assert case.name == f'480p_mono8_5ms_{name}_30hz'
    assert case.title == f'640x480 mono8, 5 ms model, {title}, 30 Hz, 1 camera'
    assert case.large_outputs is (maps > 0)


def test_each_series_grows_along_its_axis_and_in_nothing_else():
    points = {
        series: [case for case in scaling_cases() if series in case.series]
        for series in (IMAGE_SIZE, CAMERAS, OUTPUT_SIZE)
    }
    assert {series: [case.point(series) for case in cases] for series, cases in points.items()} == {
        IMAGE_SIZE: ['320x240', '640x480', '1280x720', '1920x1080', '2560x1440'],
        CAMERAS: ['1 camera', '2 cameras', '3 cameras', '4 cameras', '6 cameras'],
        OUTPUT_SIZE: ['1 KB', '1 MB', '2 MB', '6 MB', '12 MB'],
    }
    assert {series: {case.constants(series) for case in cases} for series, cases in points.items()} == {
        IMAGE_SIZE: {'rgb8, 5 ms model, small outputs, 30 Hz, 1 camera'},
        CAMERAS: {'640x480 mono8, 5 ms model, small outputs, 30 Hz'},
        OUTPUT_SIZE: {'640x480 mono8, 5 ms model, 30 Hz, 1 camera'},
    }
    assert {case.contestants for case in scaling_cases()} == {(BARE, FORTY_LINES, SHIPPED)}


def test_the_point_of_two_series_is_measured_once():
    assert [case.series for case in scaling_cases() if len(case.series) != 1] == [(CAMERAS, OUTPUT_SIZE)]


def test_where_large_blocks_move_each_repetition_has_processes_of_its_own():
    small = Case(width=640, height=480, encoding='mono8', model_ms=5)
    assert not small.separate_processes
    assert dataclasses.replace(small, dense_maps=1).separate_processes
    assert dataclasses.replace(small, width=1920, height=1080, encoding='rgb8').separate_processes
