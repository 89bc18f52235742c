"""N-3: one waiting frame per topic, newest wins, round-robin."""

import threading

from gps_denied_c7.pipeline.mailbox import Frame, FrameSlots


def frame(topic, number):
    return Frame(topic, number, received_ns=number, receive_stamp_ns=0)


def make(topics=('/a', '/b', '/c')):
    replaced = []
    return FrameSlots(topics, on_replaced=replaced.append), replaced


def test_the_newest_frame_wins_and_the_replaced_one_is_reported():
    slots, replaced = make()
    for number in range(3):
        slots.put(frame('/a', number))
    assert slots.take(0).message == 2
    assert [old.message for old in replaced] == [0, 1]
    assert slots.take(0) is None


def test_topics_take_turns_so_that_a_fast_camera_cannot_starve_a_slow_one():
    slots, _ = make()
    slots.put(frame('/b', 0))
    slots.put(frame('/c', 0))
    served = []
    for number in range(6):
        slots.put(frame('/a', number))
        served.append(slots.take(0).topic)
    assert set(served[:3]) == {'/a', '/b', '/c'}


def test_close_returns_what_waits_and_refuses_more():
    slots, _ = make()
    slots.put(frame('/a', 1))
    assert [waiting.message for waiting in slots.close()] == [1]
    assert slots.put(frame('/a', 2)) is False
    assert slots.take(0) is None


def test_close_wakes_a_waiting_taker():
    slots, _ = make()
    taken = []
    taker = threading.Thread(target=lambda: taken.append(slots.take(60)))
    taker.start()
    slots.close()
    taker.join(10)
    assert taken == [None]


def test_every_frame_is_taken_or_replaced_exactly_once():
    replaced = []
    slots = FrameSlots(['/a', '/b'], on_replaced=replaced.append)
    taken = []

    def take():
        while (got := slots.take(0.5)) is not None:
            taken.append((got.topic, got.message))

    def put(topic):
        for number in range(2000):
            slots.put(frame(topic, number))

    taker = threading.Thread(target=take)
    putters = [threading.Thread(target=put, args=(topic,)) for topic in ('/a', '/b')]
    for thread in (taker, *putters):
        thread.start()
    for thread in (*putters, taker):
        thread.join()
    seen = taken + [(old.topic, old.message) for old in replaced]
    assert sorted(seen) == sorted((topic, number) for topic in ('/a', '/b') for number in range(2000))
    for topic in ('/a', '/b'):
        order = [number for name, number in taken if name == topic]
        assert order == sorted(order)
