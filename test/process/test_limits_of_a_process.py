"""F-1, N-7: limits that a process meets once, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from gps_denied_c7.model import bundle as bundle_module

MIB = 1 << 20
IMPORT = """
import re, resource
import numpy
from gps_denied_c7.errors import RuntimeUnavailableError
size = int(re.search(r'VmSize:\\s+(\\d+)', open('/proc/self/status').read())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + (8 << 20),) * 2)
try:
    import onnxruntime
except ImportError as error:
    try:
        raise RuntimeUnavailableError('onnx_trt_ep', 'does not import.') from error
    except RuntimeUnavailableError as refused:
        print('lasting' if refused.lasting else 'may pass', error)
"""


def test_a_library_that_found_no_memory_is_tried_again():
    """ImportError tells it by its text alone; the package is there, and no file changes when there is memory again."""
    done = subprocess.run([sys.executable, '-c', IMPORT], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith('may pass'), done


LOAD = """
import sys
from gps_denied_c7.model.files import read_file
from gps_denied_c7.errors import ModelBundleError
from pathlib import Path
try:
    print(len(read_file(Path(sys.argv[1]))))
except ModelBundleError as error:
    print(error)
"""


def test_a_process_in_a_small_memory_cgroup_lives_on(tmp_path):
    """A real group of the kernel's, where this user may make one: the file is 300 MB, the group may have 200."""
    groups = {kind: Path(point) / group.lstrip('/') for kind, point, group in own_memory_group()}
    kind, parent = next(iter(groups.items()), ('', Path('/nowhere')))
    group = parent / f'c7-test-{os.getpid()}'
    try:
        group.mkdir()
        (group / ('memory.max' if kind == 'cgroup2' else 'memory.limit_in_bytes')).write_text(str(200 * MIB))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f'no memory cgroup can be made here: {error}')
    path = tmp_path / 'weights'
    path.write_bytes(bytes(MIB) * 300)
    try:
        command = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        done = subprocess.run(
            ['sh', '-c', command, 'sh', sys.executable, '-c', LOAD, str(path)],
            capture_output=True, text=True, check=False, timeout=120,
            env={**os.environ, 'PYTHONPATH': str(Path(bundle_module.__file__).parents[2])},
        )  # fmt: skip
    finally:
        group.rmdir()
    assert done.returncode == 0, done
    assert f'{300 * MIB} bytes' in done.stdout and group.name in done.stdout


def own_memory_group():
    """Yield kind, mount point and own group of each hierarchy that limits memory, by mount(8)'s table."""
    own = {}
    for line in Path('/proc/self/cgroup').read_text().splitlines():
        _, controllers, path = line.split(':', 2)
        own['cgroup' if 'memory' in controllers.split(',') else controllers or 'cgroup2'] = path
    for line in Path('/proc/mounts').read_text().splitlines():
        _, point, kind, options, *_ = line.split()
        limits = 'memory' in options.split(',') if kind == 'cgroup' else kind == 'cgroup2'
        if limits and kind in own and (kind == 'cgroup' or os.path.exists(f'{point}{own[kind]}/memory.current')):
            yield kind, point, own[kind]


def test_n7_a_limit_of_opencv_is_a_refusal_too():
    """OpenCV reads its own limits once per process, and raises above them."""
    script = (
        'import sys; from gps_denied_c7.image.decode import decode_compressed\n'
        'from gps_denied_c7.errors import ImageRejectedError\n'
        'try: decode_compressed("png", sys.stdin.buffer.read())\n'
        'except ImageRejectedError as error: print(error.reason, type(error.__cause__).__name__)'
    )
    done, png = cv2.imencode('.png', np.zeros((48, 64, 3), np.uint8))
    assert done
    environment = {**os.environ, 'OPENCV_IO_MAX_IMAGE_PIXELS': '100'}
    command = [sys.executable, '-c', script]
    done = subprocess.run(command, input=png.tobytes(), env=environment, capture_output=True, timeout=60, check=True)
    assert done.stdout.decode().strip() == 'data error'
