"""N-3: loss is counted where sequence numbers tell, and unknown otherwise."""

from gps_denied_c7.ros.streams import SequenceGaps


def info(number, gid=None):
    message_info = {'publication_sequence_number': number}
    if gid is not None:
        message_info['publisher_gid'] = {'data': gid}
    return message_info


def test_no_gap_is_no_loss():
    gaps = SequenceGaps()
    assert [gaps.note(info(number), 1) for number in (7, 8, 9)] == [0, 0, 0]


def test_a_gap_is_what_is_missing():
    gaps = SequenceGaps()
    assert [gaps.note(info(number), 1) for number in (1, 2, 5, 6, 10)] == [0, 0, 2, 2, 5]


def test_what_could_not_be_read_is_not_lost():
    gaps = SequenceGaps()
    gaps.note_unreadable()
    assert gaps.note(info(2), 1) == 0
    gaps.note_unreadable()
    assert gaps.note(info(4), 1) == 0
    assert gaps.note(info(6), 1) == 1, 'it was one message, once'
    gaps.note_unreadable()
    assert gaps.note(info(9), 1) == 2


def test_what_was_published_before_the_first_message_is_not_lost():
    assert SequenceGaps().note(info(1000), 1) == 0


def test_a_restarted_publisher_begins_a_new_count():
    gaps = SequenceGaps()
    for number in (100, 101):
        gaps.note(info(number), 1)
    assert gaps.note(info(1), 1) == 0
    assert gaps.note(info(3), 1) == 1


def test_two_publishers_that_cannot_be_told_apart_make_loss_unknown():
    gaps = SequenceGaps()
    gaps.note(info(1), 1)
    assert gaps.note(info(50), 2) is None
    assert gaps.note(info(51), 1) is None, 'what was missed meanwhile stays unknown'


def test_two_publishers_that_name_themselves_are_counted_apart():
    gaps = SequenceGaps()
    for number in range(1, 4):
        assert gaps.note(info(number, b'a'), 2) == 0
        assert gaps.note(info(number + 100, b'b'), 2) == 0
    assert gaps.note(info(6, b'a'), 2) == 2


def test_no_number_is_unknown():
    """Humble's callbacks get no message info."""
    assert SequenceGaps().note(None, 1) is None
    assert SequenceGaps().note({'publication_sequence_number': None}, 1) is None
