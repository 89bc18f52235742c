"""§6, N-1: answers arrive as they were given, whichever way they leave, and only while the publisher is active."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
from gps_denied_c7_msgs.msg import Tensor, TensorList
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rclpy.lifecycle import LifecycleNode
from std_msgs.msg import Header

from gps_denied_c7.ros.rcl import Rcl, RclError
from gps_denied_c7.ros.tensor_publisher import TensorPublisher
from support.frame_results import TEXT, received, result
from support.harness import image, tensor, wait_until


@pytest.fixture
def node(ros_context):
    made = LifecycleNode('tensor_publisher', context=ros_context)
    yield made
    made.destroy_node()


@pytest.fixture(params=['rcl', 'rclpy'])
def published(request, node):
    """A lifecycle publisher, what publishes answers on it, and a way to have the next that arrived."""
    publisher = node.create_lifecycle_publisher(TensorList, 'tensors', 5)
    subscription = node.create_subscription(TensorList, 'tensors', lambda message: None, 5)
    wait_until(lambda: publisher.get_subscription_count() == 1, 'a match')

    rcl = Rcl(TensorList, Tensor) if request.param == 'rcl' else None

    return publisher, TensorPublisher(publisher, rcl), partial(next_of, subscription)


def next_of(subscription):
    taken = subscription.handle.take_message(TensorList, False)
    return taken and taken[0]


def test_answers_of_any_size_arrive_as_they_were_given(published):
    publisher, answers, arrived = published
    publisher.on_activate(None)
    for number, size in ((1, 3), (2, 300_000), (3, 0), (4, 700_000)):
        outputs = {'x': np.arange(size, dtype=np.float32), 'none': np.zeros((0, 2), np.uint8)}
        answers.publish(result(image(number), outputs))
        message = wait_until(arrived, f'answer {number}')
        assert message.header == image(number).header and [each.name for each in message.tensors] == ['x', 'none']
        np.testing.assert_array_equal(tensor(message, 'x'), outputs['x'])


def test_outputs_that_nobody_asked_for_are_left_out(published):
    publisher, answers, arrived = published
    publisher.on_activate(None)
    outputs = {name: np.zeros(2, np.float32) for name in 'abc'}
    answers.publish(result(image(1), outputs, published=frozenset('ca')))
    assert [each.name for each in wait_until(arrived, 'the answer').tensors] == ['a', 'c']


def test_n1_nothing_leaves_unless_the_publisher_is_active(published):
    publisher, answers, arrived = published
    answers.publish(result(image(1), {}))
    publisher.on_activate(None)
    answers.publish(result(image(2), {}))
    assert wait_until(arrived, 'the second').header.stamp.sec == 2
    publisher.on_deactivate(None)
    answers.publish(result(image(3), {}))
    publisher.on_activate(None)
    answers.publish(result(image(4), {}))
    assert wait_until(arrived, 'the fourth').header.stamp.sec == 4
    assert arrived() is None


ARRAYS = st.builds(
    lambda dtype, shape, order: np.arange(np.prod(shape, dtype=int)).reshape(shape, order=order).astype(dtype),
    st.sampled_from(['uint8', 'int16', 'int64', 'float16', 'float32', '>f8', 'bool']),
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from('CF'),
)


@given(st.dictionaries(TEXT, ARRAYS, max_size=4), TEXT, st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_answer_is_published_as_rclpy_would(ways, outputs, frame_id, some):
    published = frozenset(list(outputs)[1:] if some else ())
    answered = result(image(1, header=Header(frame_id=frame_id)), outputs, published=published)
    with patch.object(time, 'monotonic_ns', lambda: 2**62):
        for way in ways.answers:
            way.publish(answered)
    first, second = (wait_until(ways.arrived, 'an answer') for _ in ways.answers)
    assert first == second and len(first.tensors) == len(published or outputs)


@pytest.fixture
def ways(node):
    """Both ways to publish on one publisher, and what arrives."""
    publisher = node.create_lifecycle_publisher(TensorList, 'tensors', 5)
    publisher.on_activate(None)
    subscription = node.create_subscription(TensorList, 'tensors', lambda message: None, 5)
    wait_until(lambda: publisher.get_subscription_count() == 1, 'a match')
    answers = [TensorPublisher(publisher, rcl) for rcl in (Rcl(TensorList, Tensor), None)]
    return SimpleNamespace(answers=answers, arrived=partial(next_of, subscription))


def test_tensors_that_must_be_copied_are_kept_until_they_are_published(ways):
    outputs = {name: np.full(200_000, number, '>f8') for number, name in enumerate('abc')}
    ways.answers[0].publish(result(image(1), outputs))
    message = wait_until(ways.arrived, 'the answer')
    for number, name in enumerate('abc'):
        np.testing.assert_array_equal(tensor(message, name), np.full(200_000, number))


def test_the_middleware_reads_tensors_where_they_are(node):
    """No copy of a tensor is made before the middleware's own, and none is the message's to free."""
    publisher = node.create_lifecycle_publisher(TensorList, 'tensors', 5)
    publisher.on_activate(None)
    rcl, seen = Rcl(TensorList, Tensor), []

    class Watching:
        borrowed, structures = rcl.borrowed, rcl.structures

        @staticmethod
        def publish(publisher, message):
            seen.extend(each.data.data for each in rcl.elements(Tensor, message.fields.tensors))
            raise RclError('no middleware')

    outputs = {'a': np.ones((2, 3), np.float32), 'b': np.zeros(5, np.int64)}
    answers = TensorPublisher(publisher, Watching())
    for _ in range(3):
        with pytest.raises(RclError, match='no middleware'):
            answers.publish(result(image(1), outputs))
    assert seen == 3 * [values.ctypes.data for values in outputs.values()]
    np.testing.assert_array_equal(outputs['a'], np.ones((2, 3)))


def test_arrays_that_an_engine_fills_again_are_pointed_to_once(ways, monkeypatch):
    way = ways.answers[0]
    placed, structures = [], way._rcl.structures
    monkeypatch.setattr(way._rcl, 'structures', lambda *what: (placed.append(what), structures(*what))[1])

    def published(outputs):
        way.publish(result(image(1), outputs))
        message = wait_until(ways.arrived, 'the answer')
        assert [each.name for each in message.tensors] == list(outputs)
        for name, values in outputs.items():
            np.testing.assert_array_equal(tensor(message, name), values)
        return len(placed)

    own = {'x': np.zeros(9, np.float32), 'y': np.zeros((2, 2), np.uint8)}
    for number in range(3):
        own['x'][...] = own['y'][...] = number
        assert published(own) == 1
    assert published({**own, 'y': np.full((2, 2), 7, np.uint8)}) == 2, 'another array'
    assert published(own) == 3
    assert published({'z': own['x'], 'y': own['y']}) == 4, 'another name'
    assert published({'y': own['y'], 'z': own['x']}) == 5, 'another order'
    assert published({'y': own['y']}) == 6
    own['y'].shape = (4,)
    assert published({'y': own['y']}) == 7, 'another shape'
    copied = np.zeros(9, '>f4')
    for number in range(2):
        copied[...] = number
        assert published({'x': copied}) == 8 + number
    assert published({}) == 10
    assert published({}) == 10


def test_whatever_changes_from_one_answer_to_the_next_is_told(ways):
    """Each field by itself and back again, with another camera's answers in between."""
    outputs = {'x': np.zeros(3, np.float32)}
    one = result(image(1), outputs)
    changed = [
        one._replace(frame=dataclasses.replace(one.frame, message=received(image(1, encoding='8UC1')))),
        one._replace(frame=dataclasses.replace(one.frame, receive_stamp_ns=5)),
        one._replace(frame_seq=3),
        one._replace(source_size=(64, 49)),
        one._replace(source_size=(65, 48)),
        one._replace(network_to_image=one.network_to_image + 1.0),
        *(
            one._replace(answer=one.answer._replace(**{name: value}))
            for name, value in one.answer._asdict().items()
            if name not in ('outputs', 'ran_ns', 'is_fallback')
            for value in (value[:-1], '', f'{value} and more')
        ),
        one._replace(answer=one.answer._replace(is_fallback=False)),
        *(one._replace(durations_ns={**one.durations_ns, stage: 100}) for stage in one.durations_ns),
    ]
    other = one._replace(frame=dataclasses.replace(one.frame, topic='/other'))
    with patch.object(time, 'monotonic_ns', lambda: 2**62):
        for answered in itertools.chain.from_iterable((one, each, other, each) for each in changed):
            for way in ways.answers:
                way.publish(answered)
            first, second = (wait_until(ways.arrived, 'an answer') for _ in ways.answers)
            assert first == second


def test_what_could_not_be_said_is_not_taken_for_said(ways):
    """An answer whose model's name no message can hold is refused each time, and the next one says its own."""
    one = result(image(1), {})
    unspeakable = one._replace(answer=one.answer._replace(model_name='\ud800'))
    for _ in range(2):
        with pytest.raises(UnicodeEncodeError):
            ways.answers[0].publish(unspeakable)
    ways.answers[0].publish(one)
    assert wait_until(ways.arrived, 'the answer').model_name == one.answer.model_name


def test_an_engine_is_not_kept_by_its_last_answer(ways):
    values = np.zeros(9, np.float32)
    ways.answers[0].publish(result(image(1), {'x': values}))
    kept = weakref.ref(values)
    del values
    assert kept() is None
    # Whatever lies there now is none of the next answer's.
    ways.answers[0].publish(result(image(2), {'x': np.ones(9, np.float32)}))
    for value in (0, 1):
        assert set(tensor(wait_until(ways.arrived, 'the answer'), 'x')) == {value}


def test_a_camera_that_names_its_frame_anew_each_time_takes_no_memory(ways):
    way = ways.answers[0]
    for number in range(200):
        frame_id = f'frame {number} ' + 'x' * 10_000
        way.publish(result(image(1, header=Header(frame_id=frame_id)), {'x': np.zeros(1)}))
        message = wait_until(ways.arrived, 'the answer')
        assert (message.header.frame_id, message.source_topic) == (frame_id, '/camera')
    assert sum(len(buffer) for _, buffer in way._forms.by_topic['/camera']._texts.values()) < 12_000


def test_each_thread_fills_a_message_of_its_own(node):
    publisher = node.create_lifecycle_publisher(TensorList, 'tensors', 5)
    publisher.on_activate(None)
    rcl, filled, seen = Rcl(TensorList, Tensor), threading.Barrier(2), []

    def publish(publisher, message):
        filled.wait(10.0)
        (x,) = rcl.elements(Tensor, message.fields.tensors)
        seen.append((message.fields.header.stamp.sec, ctypes.string_at(x.data.data, x.data.size)))

    watched = SimpleNamespace(borrowed=rcl.borrowed, structures=rcl.structures, publish=publish)
    answers = TensorPublisher(publisher, watched)
    questions = [result(image(number), {'x': np.full(3, number, np.uint8)}) for number in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(answers.publish, questions))
    assert sorted(seen) == [(1, b'\1\1\1'), (2, b'\2\2\2')]


def test_answers_of_two_threads_do_not_mix(ways):
    """One whose engine hung until after the node was activated again publishes beside the new one."""
    # They take turns within an answer, too, which they otherwise do once in a hundred.
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    enough, found = threading.Event(), []

    def publish_many(number):
        while not enough.is_set():
            ways.answers[0].publish(result(image(number), {'x': np.full(50_000, number, np.float32)}))

    def collect():
        if message := ways.arrived():
            found.append((message.header.stamp.sec, set(tensor(message, 'x').ravel())))
        numbers = [number for number, _ in found]
        return min(numbers.count(1), numbers.count(2)) >= 30

    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(publish_many, number) for number in (1, 2)]
        try:
            wait_until(collect, 'thirty answers of each')
        finally:
            enough.set()
            sys.setswitchinterval(before)
        assert [each.result() for each in done] == [None, None]
    assert all(values == {float(number)} for number, values in found)
