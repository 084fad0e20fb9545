"""Surface buffer, lights and camera for `wire_bonding`; nothing here depends on what is painted.

A scene is painted, far to near, as a surface: the horizontal part n = (nx, ny) of the unit normal, specular and diffuse
reflectance s and d. Two lights shade the same surface:

    bright field (channel 0, coaxial)   s exp(-|n|^2 / w0^2) + 0.22 d (1 - |n|^2)
    dark field   (channel 1, oblique)   s (lamp exp(-|n - h|^2 / w1^2) + ring exp(-(|n| - |h|)^2 / w1^2))
                                        + 0.3 d (1 + 1.3 n.l), less in cast shadows

with l the azimuth of the lamp and h the half vector of its light: flat surfaces are bright in the first and black in
the second, flanks the reverse. Defocus, uneven lighting, shot noise and read noise follow.

Shapes: H, W = image; I, J = the painted grid, `fine` times the image's; P = polygons, V = points of one.
Coordinates are (x, y) in the scene's frame, in units of the image's longer side.
"""

import math
from functools import cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Canvas", "Float", "Label", "defocus", "expose", "shade"]

Array = npt.NDArray[Any]
Float = npt.NDArray[np.float32]
Label = npt.NDArray[np.uint8]


class Canvas:
    """`surface_IJ4` (nx, ny, specular, diffuse), `label_IJ` and `shadow_IJ`, painted in the frame of the scene.

    `angle` turns the frame in the image; `focus_2` is its point at the image centre.
    """

    def __init__(self, height: int, width: int, fine: int, *, angle: float, focus_2: Array) -> None:
        self.surface_IJ4 = np.empty((height * fine, width * fine, 4), np.float32)
        self.label_IJ = np.zeros((height * fine, width * fine), np.uint8)
        self.shadow_IJ = np.zeros((height * fine, width * fine), np.uint8)
        self.fine = fine
        self.scale = float(max(height, width) * fine)
        self.angle = angle
        cos, sin = np.cos(angle), np.sin(angle)
        self.turn_22 = np.array([[cos, -sin], [sin, cos]])
        self.centre_2 = np.array([width - 1, height - 1]) / 2 * fine + fine // 2  # sample points fall on grid points
        self.focus_2 = focus_2

    def pixels(self, points: Array) -> Array:
        """Frame coordinates (..., 2) -> pixel coordinates (..., 2), pixel centres at whole numbers."""
        return (points - self.focus_2) @ (self.scale * self.turn_22.T) + self.centre_2

    def polygons(self, points_PV2: Array, value_P4: Array, label: int | None = None) -> None:
        """Fill P convex polygons; `value_P4` is one row for all or one row each, with its slope in the frame."""
        fixed_PV2 = self.fixed(points_PV2)
        seen_P = self.sees(fixed_PV2)
        value_P4 = np.array(np.broadcast_to(value_P4, (len(seen_P), 4))[seen_P])
        value_P4[:, :2] = value_P4[:, :2] @ self.turn_22.T
        for polygon, value in zip(fixed_PV2[seen_P], value_P4.tolist(), strict=True):
            cv2.fillConvexPoly(self.surface_IJ4, polygon, value, shift=4)
            if label is not None:
                cv2.fillConvexPoly(self.label_IJ, polygon, label, shift=4)

    def fixed(self, points: Array) -> npt.NDArray[np.int32]:
        """Pixel coordinates in cv2's fixed-point format for drawing (4 fractional bits)."""
        fixed: npt.NDArray[np.int32] = np.rint(self.pixels(points) * 16).astype(np.int32)
        return fixed

    def sees(self, fixed_PV2: npt.NDArray[np.int32], margin: float = 0.0) -> npt.NDArray[np.bool_]:
        """Which of P groups of points may reach into the view when drawn up to `margin` wide."""
        border = int(16 * (margin * self.scale + 1))
        height, width = self.label_IJ.shape
        x_PV, y_PV = fixed_PV2[..., 0], fixed_PV2[..., 1]
        across_P = (x_PV.max(1) > -border) & (x_PV.min(1) < 16 * width + border)
        seen_P: npt.NDArray[np.bool_] = across_P & (y_PV.max(1) > -border) & (y_PV.min(1) < 16 * height + border)
        return seen_P

    def outline(self, target_IJ: Label, points_V2: Array, value: int) -> None:
        """Fill one polygon of any shape in the label or shadow map."""
        cv2.fillPoly(target_IJ, [self.fixed(points_V2)], value, shift=4)

    def stamp(
        self,
        centre_2: Array,
        half: tuple[float, float],
        angle: float,
        slope: tuple[tuple[float, ...], tuple[float, ...]],
        material: Array,
        label: int,
        power: float = 2.0,
        lobes: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """Paint a round part: a superellipse with half axes `half` and exponent `power`; its slope is a table (radii,
        slopes).

        `lobes` = (amplitude, phase) makes the rim wavy; `material` = (specular, diffuse); label 0 leaves labels
        unchanged.
        """
        x, y = self.pixels(centre_2).tolist()
        a, b = half[0] * self.scale, half[1] * self.scale
        reach = math.hypot(a, b) * (1 + lobes[0]) + 1
        height, width = self.label_IJ.shape
        j0, j1 = max(int(x - reach), 0), min(int(x + reach) + 2, width)
        i0, i1 = max(int(y - reach), 0), min(int(y + reach) + 2, height)
        if j0 >= j1 or i0 >= i1:
            return
        dx, dy = np.arange(j0, j1) - x, np.arange(i0, i1)[:, None] - y
        cos, sin = math.cos(angle + self.angle), math.sin(angle + self.angle)
        u, v = (dx * cos + dy * sin) / a, (dy * cos - dx * sin) / b
        polar = np.hypot(u, v) + 1e-6
        radius = polar if power == 2 else (np.abs(u) ** power + np.abs(v) ** power) ** (1 / power)
        if lobes[0]:
            azimuth = np.arctan2(v, u)
            wave = np.sin(2 * azimuth + lobes[1]) + 0.6 * np.sin(3 * azimuth - 2 * lobes[1])
            radius = radius / (1 + lobes[0] * wave / 1.6)
        steep = np.interp(radius, *slope) / polar
        value = np.empty((*radius.shape, 4), np.float32)
        value[..., 0], value[..., 1], value[..., 2:] = (
            steep * (u * cos - v * sin),
            steep * (u * sin + v * cos),
            material,
        )
        cover = np.clip((1 - radius) * min(a, b) + 0.5, 0, 1)
        window = self.surface_IJ4[i0:i1, j0:j1]
        window += cover[..., None].astype(np.float32) * (value - window)
        if label:
            self.label_IJ[i0:i1, j0:j1][cover > 0.5] = label

    def noise(self, rng: np.random.Generator, stretch: float = 1.0, angle: float = 0.0) -> Float:
        """Noise_IJ at all scales, with standard deviation below 1, stretched by `stretch` along `angle` of the
        frame."""
        octaves = _noise_pyramid()
        tile = octaves[min(max(round(np.log2(octaves[0].shape[0] / self.scale)), 0), len(octaves) - 1)]
        cos, sin = np.cos(angle + self.angle), np.sin(angle + self.angle)
        per_pixel = tile.shape[0] / self.scale
        linear = per_pixel * np.array([[cos / stretch, sin / stretch], [-sin, cos]])
        offset = rng.uniform(0, tile.shape[0], 2) - 0.5 - linear @ self.centre_2
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        size = self.label_IJ.shape[::-1]
        noise_IJ: Float = cv2.warpAffine(tile, np.c_[linear, offset], size, flags=flags, borderMode=cv2.BORDER_WRAP)
        return noise_IJ

    def bands(self) -> list[slice]:
        """Slices of rows small enough that work on them stays in the processor's cache."""
        rows = max(2**15 // self.label_IJ.shape[1], 1)
        return [slice(i, i + rows) for i in range(0, self.label_IJ.shape[0], rows)]


@cache
def _noise_pyramid() -> tuple[Float, ...]:
    """A fixed tile of noise with equal power in every octave, at 1024, 512, ... 128 cells."""
    rng = np.random.default_rng(2405)
    tile = np.zeros((1024, 1024), np.float32)
    for cells in (16, 32, 64, 128, 256, 512, 1024):
        zoom, rim = 1024 // cells, 4  # resized with a rim from the opposite side, so the tile has no seam
        octave = np.pad(rng.standard_normal((cells, cells), np.float32), rim, mode="wrap")
        octave = cv2.resize(octave, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
        tile += octave[rim * zoom : -rim * zoom, rim * zoom : -rim * zoom] / 7**0.5
    levels = [tile]
    while levels[-1].shape[0] > 128:
        side = levels[-1].shape[0] // 2
        levels.append(cv2.resize(levels[-1], (side, side), interpolation=cv2.INTER_AREA))
    return tuple(levels)


def shade(canvas: Canvas, rng: np.random.Generator, light: float, raised_IJ: npt.NDArray[np.bool_]) -> Float:
    """Both lights on the painted surface (I, J, 2), see the module docstring; `raised_IJ` receives no shadow."""
    light_x, light_y = np.float32(np.cos(light)), np.float32(np.sin(light))
    drawn = rng.uniform((0.4, 0.28, 0.2, 0.6, 0.15), (0.6, 0.42, 0.3, 1.0, 0.7)).astype(np.float32)
    tilt, width0, width1, lamp, ring = drawn
    gain_2 = rng.uniform((0.75, 1.4), (1.1, 2.2)).astype(np.float32)
    shadow_IJ = np.where(raised_IJ, 0, cv2.GaussianBlur(canvas.shadow_IJ, (0, 0), 0.004 * canvas.scale))
    depth = np.float32(rng.uniform(0.3, 0.75) / 255)
    image_IJ2 = np.empty((*canvas.label_IJ.shape, 2), np.float32)
    for rows in canvas.bands():
        nx, ny, spec, diffuse = cv2.split(canvas.surface_IJ4[rows])
        nn = nx * nx + ny * ny
        toward = nx * light_x + ny * light_y
        bright = spec * np.exp(nn * (-1 / width0**2)) + 0.22 * diffuse * np.maximum(1 - nn, 0)
        from_lamp = np.exp((nn - 2 * tilt * toward + tilt**2) * (-1 / width1**2))
        from_ring = np.exp((np.sqrt(nn) - tilt) ** 2 * (-1 / width1**2))
        dark = spec * (lamp * from_lamp + ring * from_ring) + 0.3 * diffuse * np.maximum(1 + 1.3 * toward, 0)
        image_IJ2[rows, :, 0] = gain_2[0] * bright
        image_IJ2[rows, :, 1] = gain_2[1] * dark * (1 - depth * shadow_IJ[rows])
    return image_IJ2


def defocus(image_IJ2: Float, rng: np.random.Generator, fine: int, near_IJ: npt.NDArray[np.bool_]) -> Float:
    """Blur the plane and the near parts differently (the focus is on one or between them), then sample pixels (H, W,
    2)."""
    scale = max(near_IJ.shape)
    least = 0.45 * fine  # blur of the optics, which also prevents aliasing
    sigmas = np.maximum((0.0004 + np.sort(rng.exponential(0.0012, 2))) * scale, least)
    plane, near = sigmas[:: rng.choice((-1, 1))]
    at = slice(fine // 2, None, fine)
    plane_HW2, near_HW2 = (cv2.GaussianBlur(image_IJ2, (0, 0), sigma)[at, at] for sigma in (plane, near))
    weight_IJ = cv2.GaussianBlur(np.where(near_IJ, np.float32(1), np.float32(0)), (0, 0), max(plane, near))
    mixed_HW2: Float = near_HW2
    mixed_HW2 -= plane_HW2
    mixed_HW2 *= weight_IJ[at, at, None]
    mixed_HW2 += plane_HW2
    return mixed_HW2


def expose(image_HW2: Float, rng: np.random.Generator, noise_rng: np.random.Generator) -> Float:
    """Add uneven lighting (an enlarged 16 x 16 map _GG), offset, shot and read noise; values in [0, 1]."""
    height, width = image_HW2.shape[:2]
    reach = max(height, width)
    x_G, y_G1 = (np.arange(16) - 7.5) / 16 * width / reach, (np.arange(16)[:, None] - 7.5) / 16 * height / reach
    gain_GG2 = np.empty((16, 16, 2), np.float32)
    for channel in range(2):
        slope, azimuth, vignette = rng.uniform(0, (0.45, 2 * np.pi, 0.5))
        tilt_GG = x_G * np.cos(azimuth) + y_G1 * np.sin(azimuth)
        gain_GG2[..., channel] = 1 + slope * tilt_GG - vignette * (x_G**2 + y_G1**2)
    exposed_HW2: Float = image_HW2 * cv2.resize(gain_GG2, (width, height), interpolation=cv2.INTER_LINEAR)
    exposed_HW2 += np.float32(rng.uniform(0.01, 0.05))
    shot, read = rng.uniform((2e-5, 0.002), (3e-4, 0.012)).astype(np.float32)
    noise_HW2 = noise_rng.standard_normal(image_HW2.shape, np.float32)
    noise_HW2 *= np.sqrt(shot * exposed_HW2 + read**2)
    exposed_HW2 += noise_HW2
    return np.clip(exposed_HW2, 0, 1, out=exposed_HW2)
