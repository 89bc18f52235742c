"""Fly a camera over painted land and record what it sees, with the true pose, as a rosbag2."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.demo.terrain import Terrain, paint_terrain
from gps_denied_c7.errors import C7Error, ConfigError, in_one_line

if TYPE_CHECKING:
    from rosbags.typesys.store import Typestore

__all__ = ['DEFAULT_CAMERAS', 'Camera', 'Flight', 'FlightSummary', 'Pose', 'main', 'pose_at', 'write_flight']

MAP_FRAME = 'map'
POSE_TOPIC = '/ground_truth/pose'
_ENCODINGS = ('mono8', 'rgb8', 'bgr8')
_START_NS = 1_700_000_000_000_000_000
_ALTITUDE_M = 120.0
_LAP_S = 60.0


@dataclass(frozen=True, slots=True)
class Camera:
    """
    Describe one camera that looks down, an ideal pinhole.

    :param name: its namespace; it publishes on ``<name>/image_raw`` and ``<name>/camera_info``.
    :param width: image width, pixels.
    :param height: image height, pixels.
    :param encoding: ``mono8``, ``rgb8`` or ``bgr8``.
    :param rate_hz: frames per second.
    :param field_of_view_deg: horizontal angle of view.
    :param compressed: also publish every frame as JPEG on ``<name>/image_raw/compressed``.
    :raises ConfigError: naming the field.
    """

    name: str
    width: int
    height: int
    encoding: str
    rate_hz: float
    field_of_view_deg: float = 60.0
    compressed: bool = False

    def __post_init__(self) -> None:
        if not self.name.startswith('/') or len(self.name) < 2 or self.name.endswith('/'):
            raise ConfigError('camera', f'{self.name!r} is not a namespace.', remedy='Write it as /camera.')
        if self.encoding not in _ENCODINGS:
            raise ConfigError('camera', f'encoding {self.encoding!r} unknown.', remedy=f'Use one of {_ENCODINGS}.')
        if not (8 <= self.width <= 16384 and 8 <= self.height <= 16384):
            raise ConfigError('camera', f'{self.width}x{self.height} pixels is out of range (8 to 16384 each).')
        if not 0.01 <= self.rate_hz <= 1000.0:
            raise ConfigError('camera', f'rate {self.rate_hz} Hz is out of range (0.01 to 1000).')
        if not 5.0 <= self.field_of_view_deg <= 90.0:
            raise ConfigError('camera', f'field of view {self.field_of_view_deg} degrees is out of range (5 to 90).')

    @property
    def image_topics(self) -> tuple[str, ...]:
        """Topics of its images."""
        raw = f'{self.name}/image_raw'
        return (raw, f'{raw}/compressed') if self.compressed else (raw,)

    @property
    def frame_id(self) -> str:
        """Name of the optical frame: x right, y down the image, z along the view."""
        return f'{self.name.strip("/").replace("/", "_")}_optical_frame'

    @property
    def matrix(self) -> NDArray:
        """3x3 float64 intrinsics in pixels, pixel centres at integers."""
        focal = self.width / 2 / math.tan(math.radians(self.field_of_view_deg) / 2)
        return np.array([[focal, 0.0, (self.width - 1) / 2], [0.0, focal, (self.height - 1) / 2], [0.0, 0.0, 1.0]])

    @classmethod
    def parse(cls, text: str) -> Camera:
        """
        Read ``NAME:WIDTHxHEIGHT:ENCODING:RATE[:compressed]``, as ``/camera:640x480:mono8:15``.

        :raises ConfigError: where the text is anything else.
        """
        parts = text.split(':')
        try:
            name, size, encoding, rate = parts[:4]
            width, height = size.split('x')
            if parts[4:] not in ([], ['compressed']):
                raise ValueError(parts[4:])
            return cls(name, int(width), int(height), encoding, float(rate), compressed=bool(parts[4:]))
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(
                'camera', f'{text!r} cannot be read.', remedy='Write NAME:WIDTHxHEIGHT:ENCODING:RATE[:compressed].'
            ) from error


DEFAULT_CAMERAS = (
    Camera('/camera', 640, 480, 'mono8', 15.0),
    Camera('/camera_hd', 1920, 1080, 'rgb8', 5.0, field_of_view_deg=66.0),
)


@dataclass(frozen=True, slots=True)
class Flight:
    """
    Say what is flown and recorded.

    :param duration_s: length of the flight; the path is a figure of eight of one minute.
    :param cameras: at least one, of different names; all share one optical centre and attitude.
    :param seed: decides terrain and sensor noise; equal flights give equal bytes.
    :param storage: ``mcap`` or ``sqlite3``.
    :raises ConfigError: naming the field.
    """

    duration_s: float = 10.0
    cameras: tuple[Camera, ...] = DEFAULT_CAMERAS
    seed: int = 7
    storage: str = 'mcap'

    def __post_init__(self) -> None:
        if not 0.0 < self.duration_s <= 3600.0:
            raise ConfigError('duration', f'{self.duration_s} s is out of range (above 0, to 3600).')
        if not self.cameras or len({camera.name for camera in self.cameras}) != len(self.cameras):
            raise ConfigError('cameras', 'there must be at least one, and their names must differ.')
        if self.storage not in ('mcap', 'sqlite3'):
            raise ConfigError('storage', f'{self.storage!r} unknown.', remedy='Use mcap or sqlite3.')
        if self.seed < 0:
            raise ConfigError('seed', f'{self.seed} is negative.')


@dataclass(frozen=True, slots=True)
class Pose:
    """
    Place the optical frame of the cameras in the map: east, north, up.

    :param position: metres, float64 (3,).
    :param rotation: 3x3 float64 that turns camera coordinates into map coordinates.
    """

    position: NDArray
    rotation: NDArray

    def quaternion(self) -> tuple[float, float, float, float]:
        """Return the rotation as x, y, z, w with w >= 0 (Shepperd 1978: divide by the largest component)."""
        r = self.rotation
        squares = np.array([1 + r[0, 0] - r[1, 1] - r[2, 2], 1 - r[0, 0] + r[1, 1] - r[2, 2],
                            1 - r[0, 0] - r[1, 1] + r[2, 2], 1 + r[0, 0] + r[1, 1] + r[2, 2]])  # fmt: skip
        x, y, z, w = squares
        largest = int(squares.argmax())
        vector = (
            np.array([x, r[0, 1] + r[1, 0], r[0, 2] + r[2, 0], r[2, 1] - r[1, 2]]),
            np.array([r[0, 1] + r[1, 0], y, r[1, 2] + r[2, 1], r[0, 2] - r[2, 0]]),
            np.array([r[0, 2] + r[2, 0], r[1, 2] + r[2, 1], z, r[1, 0] - r[0, 1]]),
            np.array([r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1], w]),
        )[largest]
        unit = vector / np.linalg.norm(vector) * (1.0 if vector[3] >= 0 else -1.0)
        return float(unit[0]), float(unit[1]), float(unit[2]), float(unit[3])

    def image_from_map(self, camera: Camera) -> NDArray:
        """Return the 3x3 homography from (east, north, 1) on the ground z = 0 to pixels of ``camera``."""
        turn = self.rotation.T
        return camera.matrix @ np.column_stack([turn[:, 0], turn[:, 1], -turn @ self.position])


@dataclass(frozen=True, slots=True)
class FlightSummary:
    """
    Tell what was recorded.

    :param path: the bag's directory.
    :param frames: images by topic.
    :param size_bytes: of the bag's storage file.
    """

    path: Path
    frames: dict[str, int]
    size_bytes: int


def pose_at(time_s: float) -> Pose:
    """
    Return where the cameras are ``time_s`` seconds into a flight.

    The path is a figure of eight with gentle climbs, flown nose first, with a few degrees of bank and nod; the
    top of the image points forward.
    """
    phase = 2 * math.pi * time_s / _LAP_S
    east, north = 105.0 * math.sin(phase), 70.0 * math.sin(2 * phase)
    heading = math.atan2(140.0 * math.cos(2 * phase), 105.0 * math.cos(phase))
    up = _ALTITUDE_M + 7.0 * math.sin(2 * math.pi * time_s / 23.0)
    bank = math.radians(3.0) * math.sin(2 * math.pi * time_s / 7.0)
    nod = math.radians(1.5) * math.sin(2 * math.pi * time_s / 4.3 + 0.7)
    c, s = math.cos(heading), math.sin(heading)
    right, backward, down = (s, -c, 0.0), (-c, -s, 0.0), (0.0, 0.0, -1.0)
    level = np.column_stack([right, backward, down])
    tilt_x = np.array([[1, 0, 0], [0, math.cos(nod), -math.sin(nod)], [0, math.sin(nod), math.cos(nod)]])
    tilt_y = np.array([[math.cos(bank), 0, math.sin(bank)], [0, 1, 0], [-math.sin(bank), 0, math.cos(bank)]])
    return Pose(np.array([east, north, up]), level @ tilt_x @ tilt_y)


class _Sensor:
    """Turn the terrain into one camera's images."""

    def __init__(self, terrain: Terrain, camera: Camera, seed: int) -> None:
        import cv2

        self.camera = camera
        ground_sample = 2 * _ALTITUDE_M * math.tan(math.radians(camera.field_of_view_deg) / 2) / camera.width
        # Sampling land finer than the image's pixels would alias: take the pyramid level that is just finer.
        levels = max(0, math.floor(math.log2(ground_sample / terrain.metres_per_pixel) + 0.2))
        pixels = terrain.pixels
        if camera.encoding == 'mono8':
            pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        elif camera.encoding == 'bgr8':
            pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
        for _ in range(levels):
            pixels = cv2.pyrDown(pixels)
        # pyrDown keeps the even samples, so pixel n of a level is pixel n * 2**levels of the photo.
        scale = float(1 << levels)
        self.map_from_pixel = terrain.map_from_pixel @ np.diag([scale, scale, 1.0])
        self.pixels = pixels
        self.rng = np.random.default_rng((seed, camera.width, camera.height))
        shape = (camera.height + 64, camera.width + 64, *pixels.shape[2:])
        self.noise = np.clip(np.rint(self.rng.standard_normal(shape, dtype=np.float32) * 1.6), -9, 9).astype(np.int8)

    def expose(self, pose: Pose) -> NDArray:
        """Return the image at ``pose``, uint8 HxW or HxWx3, C-contiguous."""
        import cv2

        camera = self.camera
        size = (camera.width, camera.height)
        homography = pose.image_from_map(camera) @ self.map_from_pixel
        clean = cv2.warpPerspective(self.pixels, homography, size, borderMode=cv2.BORDER_REFLECT)
        # A fresh noise image per frame costs ten times the rendering; a shifted cut of one looks the same.
        row, column = (int(v) for v in self.rng.integers(0, 64, 2))
        noise = self.noise[row : row + camera.height, column : column + camera.width]
        return cv2.add(clean, np.ascontiguousarray(noise), dtype=cv2.CV_8U)


def write_flight(
    path: Path, flight: Flight, *, terrain: Terrain | None = None, disable_bar: bool | None = True
) -> FlightSummary:
    """
    Record ``flight`` as a rosbag2 in the new directory ``path``.

    Per camera ``image_raw``, ``camera_info`` and where asked ``image_raw/compressed``; the pose of the optical
    frame in ``map`` on ``/ground_truth/pose`` at every exposure. Bag time is the header stamp.

    :param terrain: land already painted from the flight's seed, painted here where None.
    :param disable_bar: draw no progress bar on standard error; None to draw it on a terminal alone.
    :raises ConfigError: ``path`` exists.
    """
    from rosbags.rosbag2 import StoragePlugin, Writer
    from rosbags.typesys import Stores, get_typestore
    from tqdm import tqdm

    path = Path(path)
    if path.exists():
        raise ConfigError('path', f'{path} exists.', remedy='Name a new directory, or remove that one.')
    store = get_typestore(Stores.ROS2_JAZZY)
    path.parent.mkdir(parents=True, exist_ok=True)
    exposures = _exposures(flight)
    frames = Counter(topic for _, camera in exposures for topic in camera.image_topics)
    plugin = StoragePlugin.MCAP if flight.storage == 'mcap' else StoragePlugin.SQLITE3
    # Version 8 is also read by older ROS 2 distributions; 9 only changed how the metadata spells the QoS.
    with (
        Writer(path, version=8, storage_plugin=plugin) as writer,
        tqdm(total=len(exposures), desc='painting', unit='frame', disable=disable_bar, leave=False) as bar,
    ):
        recorder = _Recorder(writer, store, terrain or paint_terrain(flight.seed), flight)
        bar.set_description('flying')
        for time_ns, camera in exposures:
            recorder.record(time_ns, camera)
            bar.update()
    size = sum(file.stat().st_size for file in path.iterdir() if file.suffix in ('.mcap', '.db3'))
    return FlightSummary(path, frames, size)


def _exposures(flight: Flight) -> list[tuple[int, Camera]]:
    """Return (nanoseconds into the flight, camera) in time order, cameras in their order where times are equal."""
    exposures = [
        (round(index * 1e9 / camera.rate_hz), camera)
        for camera in flight.cameras
        for index in range(math.ceil(flight.duration_s * camera.rate_hz - 1e-9))
    ]
    return sorted(exposures, key=lambda exposure: exposure[0])


class _Recorder:
    """Write the messages of each exposure."""

    def __init__(self, writer: Any, store: Typestore, terrain: Terrain, flight: Flight) -> None:
        self.writer = writer
        self.store = store
        self.sensors = {
            camera.name: _Sensor(terrain, camera, flight.seed + index) for index, camera in enumerate(flight.cameras)
        }
        self.last_pose_ns: int | None = None
        self.connections: dict[str, Any] = {}
        self._add(POSE_TOPIC, 'geometry_msgs/msg/PoseStamped')
        for camera in flight.cameras:
            self._add(f'{camera.name}/image_raw', 'sensor_msgs/msg/Image')
            self._add(f'{camera.name}/camera_info', 'sensor_msgs/msg/CameraInfo')
            if camera.compressed:
                self._add(f'{camera.name}/image_raw/compressed', 'sensor_msgs/msg/CompressedImage')

    def _add(self, topic: str, msgtype: str) -> None:
        self.connections[topic] = self.writer.add_connection(
            topic, msgtype, typestore=self.store, offered_qos_profiles=[_offered_qos()]
        )

    def _write(self, topic: str, time_ns: int, message: Any) -> None:
        connection = self.connections[topic]
        data = self.store.serialize_cdr(message, connection.msgtype)
        self.writer.write(connection, _START_NS + time_ns, bytes(data))

    def _header(self, time_ns: int, frame_id: str) -> Any:
        types = self.store.types
        seconds, nanoseconds = divmod(_START_NS + time_ns, 1_000_000_000)
        stamp = types['builtin_interfaces/msg/Time'](sec=seconds, nanosec=nanoseconds)
        return types['std_msgs/msg/Header'](stamp=stamp, frame_id=frame_id)

    def record(self, time_ns: int, camera: Camera) -> None:
        pose = pose_at(time_ns / 1e9)
        if self.last_pose_ns != time_ns:
            self.last_pose_ns = time_ns
            self._write(POSE_TOPIC, time_ns, self._pose(time_ns, pose))
        header = self._header(time_ns, camera.frame_id)
        self._write(f'{camera.name}/camera_info', time_ns, self._camera_info(header, camera))
        image = self.sensors[camera.name].expose(pose)
        types = self.store.types
        self._write(
            f'{camera.name}/image_raw',
            time_ns,
            types['sensor_msgs/msg/Image'](
                header=header,
                height=camera.height,
                width=camera.width,
                encoding=camera.encoding,
                is_bigendian=0,
                step=image.strides[0],
                data=image.reshape(-1),
            ),
        )
        if camera.compressed:
            message = types['sensor_msgs/msg/CompressedImage'](header=header, format='jpeg', data=_jpeg(image, camera))
            self._write(f'{camera.name}/image_raw/compressed', time_ns, message)

    def _pose(self, time_ns: int, pose: Pose) -> Any:
        types = self.store.types
        x, y, z, w = pose.quaternion()
        east, north, up = (float(value) for value in pose.position)
        return types['geometry_msgs/msg/PoseStamped'](
            header=self._header(time_ns, MAP_FRAME),
            pose=types['geometry_msgs/msg/Pose'](
                position=types['geometry_msgs/msg/Point'](x=east, y=north, z=up),
                orientation=types['geometry_msgs/msg/Quaternion'](x=x, y=y, z=z, w=w),
            ),
        )

    def _camera_info(self, header: Any, camera: Camera) -> Any:
        types = self.store.types
        matrix = camera.matrix
        projection = np.hstack([matrix, np.zeros((3, 1))])
        whole = types['sensor_msgs/msg/RegionOfInterest'](x_offset=0, y_offset=0, height=0, width=0, do_rectify=False)
        return types['sensor_msgs/msg/CameraInfo'](
            header=header,
            height=camera.height,
            width=camera.width,
            distortion_model='plumb_bob',
            d=np.zeros(5),
            k=matrix.reshape(-1),
            r=np.eye(3).reshape(-1),
            p=projection.reshape(-1),
            binning_x=0,
            binning_y=0,
            roi=whole,
        )


def _jpeg(image: NDArray, camera: Camera) -> NDArray:
    import cv2

    if camera.encoding == 'rgb8':
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    written, data = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 90])
    if not written:
        raise C7Error('OpenCV could not write a JPEG.', remedy='Install an OpenCV that was built with JPEG.')
    return data.reshape(-1)


def _offered_qos() -> Any:
    """Return what a camera driver offers: reliable, so that any subscriber matches, and a short history."""
    from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime

    forever = QosTime(9223372036, 854775807)
    return Qos(
        QosHistory.KEEP_LAST, 10, QosReliability.RELIABLE, QosDurability.VOLATILE, forever, forever,
        QosLiveliness.AUTOMATIC, forever, False,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog='python3 -m gps_denied_c7.demo.flight',
        description='Record a synthetic flight over painted land as a rosbag2, with CameraInfo and the true pose. '
        'Needs no ROS.',
    )
    parser.add_argument('bag', type=Path, help='directory to make')
    parser.add_argument(
        '--duration', type=float, default=Flight().duration_s, metavar='SECONDS', help='default: %(default)g'
    )
    parser.add_argument(
        '--seed', type=int, default=Flight().seed,
        help='random seed of the terrain and the flight path; default: %(default)s',
    )  # fmt: skip
    parser.add_argument('--storage', choices=('mcap', 'sqlite3'), default='mcap', help='default: %(default)s')
    parser.add_argument(
        '--camera', action='append', metavar='NAME:WxH:ENCODING:RATE[:compressed]',
        help='repeatable; it publishes NAME/image_raw and NAME/camera_info, with :compressed also '
        'NAME/image_raw/compressed; default: /camera:640x480:mono8:15 and /camera_hd:1920x1080:rgb8:5',
    )  # fmt: skip
    parser.add_argument('--no-progress', action='store_true', help='draw no bar')
    options = parser.parse_args(arguments)
    try:
        cameras = tuple(Camera.parse(text) for text in options.camera or ()) or DEFAULT_CAMERAS
        flight = Flight(options.duration, cameras, options.seed, options.storage)
        summary = write_flight(options.bag, flight, disable_bar=options.no_progress)
    except (C7Error, ModuleNotFoundError) as error:
        print(f'{parser.prog}: {in_one_line(error)}', file=sys.stderr)
        return 1
    frames = ', '.join(f'{count} on {topic}' for topic, count in summary.frames.items())
    print(f'{summary.path}: {frames}; {summary.size_bytes / 1e6:.0f} MB')
    return 0


if __name__ == '__main__':
    sys.exit(main())
