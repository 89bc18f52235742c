"""Paint land as seen from above: fields, woods, water, roads and houses, with surveyed marks on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ['Terrain', 'paint_terrain']

Colour = Sequence[float] | NDArray

_SUBPIXEL_BITS = 4
_SHADOW_M = (-1.1, 1.3)
"""Where the sun, in the south-east, throws a shadow per metre and a half of height: east, north."""

_CROPS: tuple[tuple[int, int, int], ...] = (
    (122, 138, 74),
    (96, 124, 62),
    (164, 150, 96),
    (142, 118, 86),
    (186, 170, 92),
    (112, 142, 84),
    (150, 140, 104),
)
_ROOFS: tuple[tuple[int, int, int], ...] = ((164, 84, 62), (146, 72, 58), (118, 104, 98), (176, 104, 76), (98, 98, 104))
_CARS: tuple[tuple[int, int, int], ...] = ((226, 226, 228), (40, 42, 48), (170, 30, 34), (46, 74, 132), (150, 152, 156))


@dataclass(frozen=True)
class Terrain:
    """
    Hold a square orthophoto and the marks surveyed in it.

    :param pixels: HxWx3 uint8, RGB; row 0 lies north. Not to be written to.
    :param metres_per_pixel: ground size of a pixel.
    :param marks: Nx2 float64, east and north in metres of the crossing points of the checkered ground control
        marks; ``map`` coordinates, whose origin is the middle of the photo and whose ground is z = 0.
    """

    pixels: NDArray
    metres_per_pixel: float
    marks: NDArray

    @property
    def map_from_pixel(self) -> NDArray:
        """3x3 float64 that takes (column, row, 1), pixel centres at integers, to (east, north, 1) in metres."""
        height, width = self.pixels.shape[:2]
        step = self.metres_per_pixel
        return np.array([[step, 0.0, -step * (width - 1) / 2], [0.0, -step, step * (height - 1) / 2], [0.0, 0.0, 1.0]])


def paint_terrain(seed: int, *, size_m: float = 500.0, metres_per_pixel: float = 0.1) -> Terrain:
    """Return the land that ``seed`` stands for; the same numbers give the same bytes on the same OpenCV."""
    painter = _Painter(seed, size_m, metres_per_pixel)
    painter.fields()
    painter.river()
    painter.roads()
    painter.woods()
    painter.village()
    painter.grain()
    marks = painter.ground_control()
    painter.pixels.setflags(write=False)
    return Terrain(painter.pixels, metres_per_pixel, marks)


class _Painter:
    """Own the canvas and the random stream; everything is in metres, east and north of the middle."""

    def __init__(self, seed: int, size_m: float, step: float) -> None:
        self.rng = np.random.default_rng(seed)
        self.size = size_m
        self.half = size_m / 2
        self.step = step
        side = round(size_m / step)
        self.pixels: NDArray = np.zeros((side, side, 3), np.uint8)
        self.centre = (side - 1) / 2
        self.main_road = self._curve(
            [(-0.55, -0.22), (-0.25, -0.12), (0.0, 0.02), (0.22, 0.05), (0.55, 0.24)], jitter=0.03
        )
        self.river_course = self._curve(
            [(-0.38, 0.55), (-0.26, 0.24), (-0.30, -0.02), (-0.12, -0.28), (-0.16, -0.55)], jitter=0.03
        )
        self.keep_clear: list[tuple[NDArray, float]] = []
        self.houses: list[NDArray] = []

    # -- geometry

    def _curve(self, points: Sequence[tuple[float, float]], *, jitter: float) -> NDArray:
        """Lay a Catmull-Rom spline through ``points``, given in parts of the size, shifted at random."""
        knots = np.array(points) * self.size
        knots[1:-1] += self.rng.normal(0.0, jitter * self.size, (len(knots) - 2, 2))
        knots = np.vstack([2 * knots[0] - knots[1], knots, 2 * knots[-1] - knots[-2]])
        t = np.linspace(0.0, 1.0, 60, endpoint=False)[:, None]
        pieces = []
        for p0, p1, p2, p3 in zip(knots, knots[1:], knots[2:], knots[3:], strict=False):
            a, b, c = 2 * p0 - 5 * p1 + 4 * p2 - p3, 3 * (p1 - p2) + p3 - p0, p2 - p0
            pieces.append(0.5 * (2 * p1 + c * t + a * t**2 + b * t**3))
        return np.vstack([*pieces, knots[-2:-1]])

    def _pixel(self, points: NDArray) -> NDArray:
        """Turn metres into the fixed-point pixel coordinates that OpenCV draws with."""
        scaled = np.empty(np.shape(points))
        scaled[..., 0] = self.centre + np.asarray(points)[..., 0] / self.step
        scaled[..., 1] = self.centre - np.asarray(points)[..., 1] / self.step
        return np.round(scaled * (1 << _SUBPIXEL_BITS)).astype(np.int32)

    def _distance(self, points: NDArray, line: NDArray) -> NDArray:
        return np.sqrt(((points[:, None, :] - line[None, :, :]) ** 2).sum(axis=2)).min(axis=1)

    def _is_clear(self, points: NDArray, extra: float = 0.0, apart: float = 0.0) -> NDArray:
        """Tell which points keep their distance from water and roads, and ``apart`` metres from houses."""
        clear = np.ones(len(points), bool)
        for line, margin in self.keep_clear:
            clear &= self._distance(points, line) > margin + extra
        if self.houses:
            clear &= self._distance(points, np.array(self.houses)) > apart
        return clear

    # -- drawing

    def polygon(self, corners: NDArray, colour: Colour) -> None:
        import cv2

        cv2.fillPoly(self.pixels, [self._pixel(corners)], tuple(map(float, colour)), cv2.LINE_AA, _SUBPIXEL_BITS)

    def line(self, points: NDArray, width_m: float, colour: Colour) -> None:
        import cv2

        thickness = max(1, round(width_m / self.step))
        cv2.polylines(
            self.pixels, [self._pixel(points)], False, tuple(map(float, colour)), thickness, cv2.LINE_AA, _SUBPIXEL_BITS
        )

    def disc(self, centre: NDArray, radius_m: float, colour: Colour) -> None:
        import cv2

        x, y = (int(v) for v in self._pixel(centre))
        radius = round(radius_m / self.step * (1 << _SUBPIXEL_BITS))
        cv2.circle(self.pixels, (x, y), radius, tuple(map(float, colour)), cv2.FILLED, cv2.LINE_AA, _SUBPIXEL_BITS)

    def noise(self, side: int, cells: int, octaves: int) -> NDArray:
        """Return side x side float32 noise of about unit deviation, coarse cells first, each octave half as strong."""
        import cv2

        total = np.zeros((side, side), np.float32)
        for octave in range(octaves):
            count = min(cells << octave, side)
            grid = self.rng.standard_normal((count, count), dtype=np.float32)
            total += cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC) * 0.5**octave
        return total

    # -- layers

    def fields(self) -> None:
        """Cut the land into parcels, each with a crop, its rows and its own patchiness."""
        import cv2

        side = self.pixels.shape[0] // 2
        step = self.size / side
        axis = ((np.arange(side, dtype=np.float32) + 0.5) / side - 0.5) * np.float32(self.size)
        east, north = np.meshgrid(axis, -axis)
        # Bend the straight cuts a little: parcels follow the lie of the land.
        bend_east = east + 9.0 * np.sin(north / 57.0) + 4.0 * np.sin(north / 23.0 + 1.0)
        bend_north = north + 8.0 * np.sin(east / 71.0 + 0.5) + 3.0 * np.sin(east / 19.0)

        tilt = self.rng.uniform(0.2, 0.6)
        u = bend_east * math.cos(tilt) + bend_north * math.sin(tilt)
        v = bend_north * math.cos(tilt) - bend_east * math.sin(tilt)
        canvas = np.zeros((side, side, 3), np.float32)
        border = np.full((side, side), 99.0, np.float32)
        reach = self.half * 1.5
        for u0, v0, u1, v1 in self._parcels((-reach, -reach, reach, reach), depth=0):
            # Bends and tilt are bounded, so a parcel's pixels lie in a box around its turned corners.
            corners = np.array([(u0, v0), (u1, v0), (u1, v1), (u0, v1)])
            turned = corners @ np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])
            low, high = turned.min(axis=0) - 14.0, turned.max(axis=0) + 14.0
            columns = slice(*np.clip((np.array([low[0], high[0]]) + self.half) / step, 0, side).astype(int))
            rows = slice(*np.clip((self.half - np.array([high[1], low[1]])) / step, 0, side).astype(int))
            colour = np.array(_CROPS[self.rng.integers(len(_CROPS))], np.float32) + self.rng.normal(0.0, 6.0, 3)
            along, period, depth = self.rng.random() < 0.5, self.rng.uniform(1.6, 4.5), self.rng.uniform(2.0, 9.0)
            uu, vv = u[rows, columns], v[rows, columns]
            inside = (uu >= u0) & (uu < u1) & (vv >= v0) & (vv < v1)
            if not inside.any():
                continue
            rows_of_crop = np.sin((uu if along else vv) * np.float32(2 * math.pi / period)) * np.float32(depth)
            # Every eighth row or so is a tramline that the tractor uses.
            rows_of_crop -= (np.sin((uu if along else vv) * np.float32(2 * math.pi / (period * 8))) > 0.97) * 16.0
            patch = colour.astype(np.float32) + rows_of_crop[..., None]
            canvas[rows, columns][inside] = patch[inside]
            edge = np.minimum(np.minimum(uu - u0, u1 - uu), np.minimum(vv - v0, v1 - vv))
            border[rows, columns][inside] = edge[inside]
        verge = np.clip(1.6 - border, 0.0, 1.0)[..., None]
        canvas = canvas * (1 - verge) + np.array((92, 104, 62), np.float32) * verge
        canvas *= (1.0 + 0.045 * self.noise(side, 9, 4) + 0.03 * self.noise(side, 160, 3))[..., None]
        rounded = np.clip(canvas, 0, 255).astype(np.uint8)
        full = self.pixels.shape[0]
        self.pixels = cv2.resize(rounded, (full, full), interpolation=cv2.INTER_CUBIC)

    def _parcels(
        self, box: tuple[float, float, float, float], depth: int
    ) -> list[tuple[float, float, float, float]]:
        u0, v0, u1, v1 = box
        wide, high = u1 - u0, v1 - v0
        if depth > 9 or max(wide, high) < 60.0 or (max(wide, high) < 110.0 and self.rng.random() < 0.35):
            return [box]
        part = self.rng.uniform(0.36, 0.64)
        if wide > high * self.rng.uniform(0.7, 1.3):
            cut = u0 + part * wide
            return self._parcels((u0, v0, cut, v1), depth + 1) + self._parcels((cut, v0, u1, v1), depth + 1)
        cut = v0 + part * high
        return self._parcels((u0, v0, u1, cut), depth + 1) + self._parcels((u0, cut, u1, v1), depth + 1)

    def river(self) -> None:
        """Let a stream run through, with reeds, gravel and deep water."""
        reeds, gravel, shallow, deep = (84, 100, 58), (156, 146, 116), (74, 98, 98), (56, 82, 88)
        for width, colour in ((19.0, reeds), (15.0, gravel), (12.5, shallow), (7.5, deep)):
            self.line(self.river_course, width, colour)
        self.keep_clear.append((self.river_course, 9.0))

    def roads(self) -> None:
        """Lay a main road with markings, a lane and farm tracks."""
        lane = self._curve([(0.18, -0.55), (0.10, -0.25), (0.04, 0.0), (0.12, 0.28), (0.06, 0.55)], jitter=0.02)
        tracks = [
            self._curve([(-0.55, 0.30), (-0.20, 0.34), (0.10, 0.27), (0.55, 0.40)], jitter=0.03),
            self._curve([(0.55, -0.30), (0.28, -0.22), (0.09, -0.24)], jitter=0.02),
            self._curve([(-0.48, -0.55), (-0.40, -0.30), (-0.32, -0.15)], jitter=0.02),
        ]
        for track in tracks:
            self.line(track, 3.2, (150, 134, 102))
            self.line(track, 0.7, (118, 124, 78))
        for course, width in ((lane, 5.0), (self.main_road, 7.6)):
            self.line(course, width + 2.4, (134, 128, 104))
            self.line(course, width, (102, 102, 104))
        self.line(lane, 4.4, (108, 108, 109))
        self._dashes(lane, 0.16, (206, 206, 202), dash=1.5, gap=3.0)
        self._offset_line(self.main_road, 3.3, 0.18, (214, 214, 210))
        self._offset_line(self.main_road, -3.3, 0.18, (214, 214, 210))
        self._dashes(self.main_road, 0.2, (224, 224, 220), dash=3.0, gap=6.0)
        self.keep_clear += [(self.main_road, 8.0), (lane, 6.5), *((track, 4.0) for track in tracks)]
        self.lane = lane
        for course, offset, spacing in ((self.main_road, 1.7, 24.0), (self.main_road, -1.7, 31.0), (lane, 1.2, 60.0)):
            for centre, direction in self._stations(course, spacing, offset):
                self._rectangle(centre + np.array(_SHADOW_M) * 0.5, direction, 4.4, 1.8, (58, 58, 60))
                self._rectangle(centre, direction, 4.4, 1.8, _CARS[self.rng.integers(len(_CARS))])
                self._rectangle(centre, direction, 1.9, 1.5, (52, 58, 66))

    def woods(self) -> None:
        """Plant woods, rows along the stream, and single trees in the meadows."""
        for _ in range(9):
            middle = self.rng.uniform(-self.half, self.half, 2)
            spread = self.rng.uniform(14.0, 30.0)
            self._trees(middle + self.rng.normal(0.0, spread, (round(spread * 6), 2)), 1.6, 3.6)
        banks = self.river_course[::2] + self.rng.normal(0.0, 4.0, (len(self.river_course[::2]), 2)) + (11.0, 0.0)
        self._trees(banks, 1.2, 2.8)
        orchard = np.stack(np.meshgrid(np.arange(11) * 6.0, np.arange(8) * 7.0), axis=-1).reshape(-1, 2)
        for middle in self.rng.uniform(-0.8 * self.half, 0.8 * self.half, (3, 2)):
            self._trees(orchard + middle + self.rng.normal(0.0, 0.3, orchard.shape), 1.3, 1.9)
        self._trees(self.rng.uniform(-self.half, self.half, (260, 2)), 1.2, 3.4)

    def village(self) -> None:
        """Build houses with gardens on both sides of the roads, and a farm with long sheds."""
        for course, spacing in ((self.main_road, 23.0), (self.lane, 29.0)):
            for sign in (1.0, -1.0):
                for centre, direction in self._stations(course, spacing, sign * self.rng.uniform(19.0, 24.0)):
                    if np.abs(centre).max() > 0.72 * self.half or self.rng.random() < 0.2:
                        continue
                    if self._is_clear(centre[None], 9.0, 24.0)[0]:
                        self.houses.append(centre)
                        self._plot(centre, direction, course)
        for middle in self.rng.uniform(-0.75 * self.half, 0.75 * self.half, (40, 2)):
            if self._is_clear(middle[None], 27.0, 60.0)[0]:
                self.houses.append(middle)
                self._farm(middle)

    def grain(self) -> None:
        """Break up flat colour with soil and grass at the scale of a pixel."""
        import cv2

        side = self.pixels.shape[0]
        speckle = self.rng.integers(0, 256, (1024, 1024), dtype=np.uint8)
        fine = cv2.addWeighted(speckle, 0.45, cv2.GaussianBlur(speckle, (0, 0), 1.6), 0.55, 0.0)
        copies = -(-side // 1024)
        grain = np.tile(fine, (copies, copies))[:side, :side].astype(np.int8) - np.int8(127)
        grain = (grain // 8).astype(np.int8)
        self.pixels = cv2.add(self.pixels, cv2.merge([grain, grain, grain]), dtype=cv2.CV_8U)

    def ground_control(self) -> NDArray:
        """Lay out checkered marks and return the points where their quarters meet, exactly as painted."""
        cells = np.stack(np.meshgrid(np.linspace(-0.8, 0.8, 8), np.linspace(-0.8, 0.8, 8)), axis=-1).reshape(-1, 2)
        wanted = cells * self.half + self.rng.uniform(-12.0, 12.0, cells.shape)
        wanted = wanted[self._is_clear(wanted, 0.0, 16.0)]
        unit = self.step / (1 << _SUBPIXEL_BITS)
        # What OpenCV draws lies on its fixed-point grid; the survey gives the coordinates of what was drawn.
        fixed = self._pixel(wanted) * unit
        marks = np.stack([fixed[:, 0] - self.centre * self.step, self.centre * self.step - fixed[:, 1]], axis=1)
        for mark, angle in zip(marks, self.rng.uniform(0.0, math.pi, len(marks)), strict=True):
            direction = np.array([math.cos(angle), math.sin(angle)])
            across = np.array([-direction[1], direction[0]])
            self._rectangle(mark, direction, 5.2, 5.2, (38, 38, 38))
            self._rectangle(mark, direction, 4.8, 4.8, (238, 238, 236))
            for sign in (1.0, -1.0):
                a, b = sign * direction * 2.0, sign * across * 2.0
                self.polygon(np.array([mark, mark + a, mark + a + b, mark + b]), (24, 24, 24))
        return marks

    # -- parts

    def _stations(self, course: NDArray, spacing: float, offset: float) -> list[tuple[NDArray, NDArray]]:
        """Walk along ``course`` and return (place ``offset`` metres to the left, direction) at uneven intervals."""
        steps = np.linalg.norm(np.diff(course, axis=0), axis=1)
        run = np.concatenate([[0.0], np.cumsum(steps)])
        places = np.arange(spacing * 0.7, run[-1], spacing)
        places += self.rng.uniform(-0.2, 0.2, len(places)) * spacing
        stations = []
        for place in places:
            index = min(int(np.searchsorted(run, place)), len(course) - 1)
            direction = course[index] - course[index - 1]
            direction = direction / np.linalg.norm(direction)
            stations.append((course[index] + offset * np.array([-direction[1], direction[0]]), direction))
        return stations

    def _offset_line(self, course: NDArray, offset: float, width: float, colour: Colour) -> None:
        direction = np.gradient(course, axis=0)
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        self.line(course + offset * np.stack([-direction[:, 1], direction[:, 0]], axis=1), width, colour)

    def _dashes(self, course: NDArray, width: float, colour: Colour, *, dash: float, gap: float) -> None:
        steps = np.linalg.norm(np.diff(course, axis=0), axis=1)
        run = np.concatenate([[0.0], np.cumsum(steps)])
        for start in np.arange(0.0, run[-1] - dash, dash + gap):
            places = np.linspace(start, start + dash, 4)
            points = np.stack([np.interp(places, run, course[:, axis]) for axis in (0, 1)], axis=1)
            self.line(points, width, colour)

    def _rectangle(
        self, centre: NDArray, direction: NDArray, length: float, width: float, colour: Colour
    ) -> None:
        across = np.array([-direction[1], direction[0]])
        a, b = direction * length / 2, across * width / 2
        self.polygon(np.array([centre + a + b, centre + a - b, centre - a - b, centre - a + b]), colour)

    def _gable(self, centre: NDArray, direction: NDArray, length: float, width: float, roof: NDArray) -> None:
        """Put a ridged roof on a rectangle: the slope that faces the sun is the lighter one."""
        across = np.array([-direction[1], direction[0]])
        sun = -np.array(_SHADOW_M)
        self._rectangle(centre + np.array(_SHADOW_M) * 1.6, direction, length, width, (52, 56, 48))
        for sign in (1.0, -1.0):
            light = 1.0 + 0.17 * sign * float(across @ sun) / float(np.linalg.norm(sun))
            self._rectangle(centre + sign * across * width / 4, direction, length, width / 2, roof * light)
        self.line(np.array([centre - direction * length / 2, centre + direction * length / 2]), 0.3, roof * 0.72)

    def _plot(self, centre: NDArray, direction: NDArray, course: NDArray) -> None:
        turn = self.rng.normal(0.0, 0.08) + (math.pi / 2 if self.rng.random() < 0.4 else 0.0)
        rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        facing = rotation @ direction
        lawn = np.array((104, 128, 68)) + self.rng.normal(0.0, 7.0, 3)
        self._rectangle(centre, direction, 20.0, 25.0, (88, 98, 60))
        self._rectangle(centre, direction, 19.2, 24.2, lawn)
        nearest = course[((course - centre) ** 2).sum(axis=1).argmin()]
        self.line(np.array([centre, nearest + (centre - nearest) * 0.2]), 2.6, (158, 152, 142))
        roof = np.array(_ROOFS[self.rng.integers(len(_ROOFS))]) + self.rng.normal(0.0, 6.0, 3)
        length, width = self.rng.uniform(10.0, 14.5), self.rng.uniform(7.5, 9.5)
        self._gable(centre, facing, length, width, roof)
        if self.rng.random() < 0.45:
            across = np.array([-facing[1], facing[0]])
            self._gable(centre + facing * length * 0.28 + across * width * 0.5, across, width * 0.9, 6.0, roof * 0.97)
        chimney = centre + facing * length * self.rng.uniform(-0.3, 0.3)
        self._rectangle(chimney, facing, 0.9, 0.9, (70, 52, 48))
        away = centre - nearest
        away = away / np.linalg.norm(away)
        if self.rng.random() < 0.22:
            self._rectangle(centre + away * 9.6, direction, 6.5, 3.6, (222, 220, 212))
            self._rectangle(centre + away * 9.6, direction, 5.7, 2.8, (92, 178, 196))
        corner = centre + away * 10.0 + direction * self.rng.uniform(-8.0, 8.0)
        self._trees(corner[None] + self.rng.normal(0.0, 2.5, (3, 2)), 1.1, 2.2)

    def _farm(self, middle: NDArray) -> None:
        angle = self.rng.uniform(0.0, math.pi)
        direction = np.array([math.cos(angle), math.sin(angle)])
        across = np.array([-direction[1], direction[0]])
        self._rectangle(middle, direction, 52.0, 40.0, (148, 138, 118))
        for offset, length in ((-11.0, 38.0), (9.0, 30.0)):
            roof = np.array((150, 152, 154)) + self.rng.normal(0.0, 8.0)
            centre = middle + across * offset
            self._gable(centre, direction, length, 13.0, roof)
            for along in np.arange(-length / 2 + 2.0, length / 2 - 1.0, 4.0):
                for side in (-3.4, 3.4):
                    self._rectangle(centre + direction * along + across * side, direction, 0.9, 2.4, (206, 212, 214))
        for index in range(3):
            centre = middle + direction * 22.0 + across * (index * 5.6 - 4.0)
            self.disc(centre + np.array(_SHADOW_M) * 1.5, 2.3, (70, 68, 60))
            self.disc(centre, 2.3, (184, 186, 186))
            self.disc(centre - np.array(_SHADOW_M) * 0.4, 1.1, (212, 214, 214))

    def _trees(self, places: NDArray, smallest: float, largest: float) -> None:
        places = places[np.abs(places).max(axis=1) < self.half + 5.0]
        if self.keep_clear:
            places = places[self._is_clear(places)]
        radii = self.rng.uniform(smallest, largest, len(places))
        shadow = np.array(_SHADOW_M)
        for place, radius in zip(places, radii, strict=True):
            self.disc(place + shadow * radius * 0.5, radius, (54, 62, 44))
        for place, radius in zip(places, radii, strict=True):
            leaf = np.array((64, 88, 46)) + self.rng.normal(0.0, 7.0, 3)
            self.disc(place, radius, leaf)
            for angle, light in zip(self.rng.uniform(0.0, 2 * math.pi, 4), (0.86, 0.94, 1.14, 1.28), strict=True):
                toward = np.array([math.cos(angle), math.sin(angle)]) * 0.35 - shadow * 0.22 * (light > 1.0)
                self.disc(place + toward * radius, radius * 0.45, leaf * light)
