"""Results of frames that no pipeline ever computed, and text for their fields."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import strategies as st

from gps_denied_c7.failover.chain import Answer
from gps_denied_c7.pipeline.mailbox import Frame
from gps_denied_c7.pipeline.pipeline import FrameResult
from gps_denied_c7.ros.messages import (
    received_image,
)

SECOND = 1_000_000_000
TEXT = st.text(st.characters(exclude_characters='\0', exclude_categories=['Cs']), max_size=9)


def received(message):
    return received_image(message)


def result(message, outputs, **changes):
    values = {
        'frame': Frame('/camera', received(message), time.monotonic_ns(), receive_stamp_ns=17 * SECOND + 5),
        'frame_seq': 2**40,
        'source_size': (64, 48),
        'network_to_image': np.array([[2.0, 0.0, 0.5], [0.0, 3.0, 1.0]]),
        'answer': Answer(outputs, 'onnx_trt_ep', 'CPUExecutionProvider', True, 'net', 'sha256:ab'),
        'durations_ns': {'queue': 1, 'decode': 2, 'preprocess': 3, 'hand_off': 4, 'engine': 5, 'hand_back': 6},
        **changes,
    }
    return FrameResult(**values)
