"""The built-in data set `wire_bonding`: procedural two-channel images of bond wires, with index masks.

It replaces the paper's confidential wire-bonding data ("Decorrelation Speeds Up Vision Transformers", section on
semiconductor data: two channels, 2048 x 2048; classes wire, ball, wedge, epoxy). Every image is a pure function of
(seed, index, size, bits); nothing is stored or downloaded.

How a picture is made:
1. A layout (pitch, wire, loop, materials, pose) is drawn from the generator of (seed, index). The unit of length is the
   longer side of the image: another size shows the same scene, and a non-square image shows the middle of the square
   one.
2. The scene is painted, far to near, with its class labels: ground, leads, epoxy, die, dust, bonds and wires.
3. Two lights shade it, bright field (channel 0) and dark field (channel 1), followed by optics and sensor (all in
   `wire_bonding_canvas`, with the formulas).

Shapes: H, W = image; N = columns (pad, wire, lead), T = points along a wire, K = strips across it; P = polygons,
V = points of a polygon, R = epoxy rings, L = bus lines of a block. Coordinates are (x, y) in the frame of the die edge:
x along the row of pads, y from the die to the leads.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from hf_dbp.data.wire_bonding_canvas import Array, Canvas, Label, defocus, expose, shade
from hf_dbp.errors import UserError

__all__ = ["CLASS_NAMES", "WireBonding", "render"]

CLASS_NAMES = ("background", "wire", "ball", "wedge", "epoxy")
BACKGROUND, WIRE, BALL, WEDGE, EPOXY = range(5)

MIN_SIZE = 32
_FINE = 192  # if the longer side is below this, paint on a grid finer by a whole factor, then sample

_Rng = np.random.Generator

# Slope of the surface by relative radius, for the round parts.
_BALL_SLOPE = ((0.0, 0.3, 0.4, 0.46, 0.55, 0.78, 0.9, 1.0), (0.05, 0.7, 0.97, 0.4, 0.08, 0.12, 0.55, 0.92))
_WEDGE_SLOPE = ((0.0, 0.5, 0.75, 1.0), (0.02, 0.1, 0.35, 0.75))
_DROP_SLOPE = ((0.0, 0.5, 0.8, 1.0), (0.02, 0.2, 0.45, 0.6))
_DUST_SLOPE = ((0.0, 1.0), (0.1, 0.8))


@dataclass(frozen=True)
class _Layout:
    """Where things are (unit: longer image side; frame of the die edge) and their materials."""

    angle: float  # of the frame in the image
    focus: Array  # point of the frame at the image centre
    pitch: float  # of the pads
    fan: float  # lead pitch / pad pitch
    pad: float  # half side of a pad
    pad_y: float
    stagger: float  # of every second pad
    lead_y: float  # tip of the leads
    lead_width: float  # as a fraction of the lead pitch
    wedge_y: float
    tier: float  # further reach of every second wire
    wire: float  # half width
    loop: float  # height of the wires
    die_end: float  # x of the die's corner, outside the view for most
    laminate: bool  # leads on a laminate, else a lead frame over an open gap
    metal: Array  # specular, diffuse: wires
    frame: Array  # specular, diffuse: leads and die paddle
    epoxy: Array  # specular, diffuse
    light: float  # azimuth of the oblique light in the image

    @classmethod
    def draw(cls, rng: _Rng) -> "_Layout":
        wire = rng.uniform(0.0088, 0.0145)
        ball = wire * rng.uniform(2.2, 2.9)
        pitch = 2 * ball * rng.uniform(1.2, 1.9)
        span = rng.uniform(0.36, 0.6)
        wedge_y = span - 0.05
        tier = rng.uniform(0.05, 0.09) if rng.random() < 0.3 else 0.0
        angle = rng.integers(4) * np.pi / 2 + rng.normal(0, 0.12) if rng.random() < 0.7 else rng.uniform(0, 2 * np.pi)
        gold, copper, aluminium = (0.95, 0.16), (0.68, 0.1), (0.85, 0.3)
        metal = np.array((gold, copper, aluminium)[rng.choice(3, p=(0.5, 0.3, 0.2))]) * rng.uniform(0.85, 1.1)
        silver_filled = rng.random() < 0.5
        return cls(
            angle=float(angle),
            focus=np.array([rng.uniform(-0.5, 0.5) * pitch, span / 2 - 0.05 + rng.uniform(-0.09, 0.09)]),
            pitch=pitch,
            fan=rng.uniform(1.0, 1.35),
            pad=ball * rng.uniform(1.02, 1.15),
            pad_y=-ball * 1.3 - rng.uniform(0.01, 0.03),
            stagger=ball * rng.uniform(2.3, 2.8) if rng.random() < 0.25 else 0.0,
            lead_y=wedge_y - rng.uniform(0.03, 0.08),
            lead_width=rng.uniform(0.5, 0.78),
            wedge_y=wedge_y,
            tier=tier,
            wire=wire,
            loop=span * rng.uniform(0.12, 0.3),
            die_end=rng.uniform(0.1, 0.45) * rng.choice((-1, 1)) if rng.random() < 0.3 else 9.0,
            laminate=bool(rng.random() < 0.45),
            metal=metal,
            frame=np.array([rng.uniform(0.35, 0.75), rng.uniform(0.12, 0.3)]),
            epoxy=np.array([0.3, 0.55] if silver_filled else [0.6, 0.12]) * rng.uniform(0.7, 1.1),
            light=rng.uniform(0, 2 * np.pi),
        )


def _boxes(x: Any, y: Any, half_x: Any, half_y: Any) -> Array:
    """Upright rectangles (..., 4, 2) in the frame, given by centre and half sides (...)."""
    x, y, half_x, half_y = np.broadcast_arrays(*np.atleast_1d(x, y, half_x, half_y))
    sides = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    boxes: Array = np.stack([x, y], -1)[..., None, :] + sides * np.stack([half_x, half_y], -1)[..., None, :]
    return boxes


def _columns(layout: _Layout) -> Array:
    """Numbers of the pads and leads that may be in view; 0 is the middle one."""
    reach = int(0.75 / layout.pitch) + 1
    return np.arange(-reach, reach + 1)


def _paint_ground(canvas: Canvas, rng: _Rng, layout: _Layout) -> None:
    """Paint open gap or laminate, die paddle and leads, with a texture of brushed metal or woven laminate."""
    floor = rng.uniform(0.3, 0.55) if layout.laminate else rng.uniform(0.04, 0.16)
    canvas.surface_IJ4[...] = np.array([0, 0, 0.05, floor], np.float32)
    metal = np.array([0, 0, *layout.frame])
    paddle_end = rng.uniform(0.3, 0.75) * layout.lead_y
    edge = np.array([0, 0.75, 0.4, 0.3])  # rounded, hence steep, edge of punched metal
    canvas.polygons(_boxes(0, paddle_end - 1, 3, 1), edge)
    canvas.polygons(_boxes(0, paddle_end - 1 - 0.006, 3, 1), metal * rng.uniform(0.8, 1.1))
    x_N = _columns(layout) * layout.pitch * layout.fan
    half, spread = layout.pitch * layout.fan * layout.lead_width / 2, rng.uniform(1.0, 1.6)
    for inset, value in ((0.0, edge), (min(0.005, half / 4), metal)):
        sides_4, top_4 = np.array([-1, 1, 1, -1]) * (half - inset), np.array([1, 1, spread, spread])
        y_N4 = np.broadcast_to([layout.lead_y + inset] * 2 + [layout.lead_y + 0.9] * 2, (len(x_N), 4))
        canvas.polygons(np.stack([x_N[:, None] * top_4 + sides_4, y_N4], -1), value)
    brush = rng.choice((0.0, np.pi / 2)) + rng.normal(0, 0.05)
    across_2 = (canvas.turn_22 @ (-np.sin(brush), np.cos(brush)) * rng.uniform(0.08, 0.25)).astype(np.float32)
    streaks_IJ = canvas.noise(rng, stretch=40.0, angle=brush)
    stains_IJ = canvas.noise(rng, stretch=rng.uniform(1, 3)) * np.float32(rng.uniform(0.08, 0.2)) + 1
    for rows in canvas.bands():
        nx, ny, spec, diffuse = (canvas.surface_IJ4[rows, :, c] for c in range(4))
        lean_IJ = streaks_IJ[rows] * spec
        nx += across_2[0] * lean_IJ
        ny += across_2[1] * lean_IJ
        spec *= stains_IJ[rows]
        diffuse *= stains_IJ[rows]


def _die_edge(layout: _Layout, points: int) -> tuple[Array, Array]:
    """Points (V, 2) along the die's edge, and around a corner if it is in view, with outward normals (V, 2)."""
    if layout.die_end > 1:
        x_V = np.linspace(-1, 1, points)
        return np.stack([x_V, 0 * x_V], -1), np.stack([0 * x_V, 0 * x_V + 1], -1)
    side, corner = np.sign(layout.die_end), points // 8
    turn_V = np.concatenate([np.zeros(points // 2), np.linspace(0, np.pi / 2, corner), np.full(points // 2, np.pi / 2)])
    far_V = np.linspace(1, 0, points // 2)
    before_V = np.concatenate([far_V, np.zeros(len(turn_V) - len(far_V))])  # distance to the corner
    points_V2 = np.stack([layout.die_end - side * before_V, -before_V[::-1]], -1)
    return points_V2, np.stack([side * np.sin(turn_V), np.cos(turn_V)], -1)


def _paint_epoxy(canvas: Canvas, rng: _Rng, layout: _Layout) -> None:
    """Paint the fillet along the die's edge (before the die, which covers its inside) and smears beside it."""
    points, rings = (48, 5) if canvas.scale < 400 else (160, 18)
    edge_V2, out_V2 = _die_edge(layout, points)
    along_V = np.linspace(-1, 1, len(edge_V2))
    width_V = np.ones_like(along_V)
    for size, waves in ((0.3, 4), (0.15, 11), (0.07, 24)):
        width_V += size * np.sin(along_V * waves * rng.uniform(1, 2) + rng.uniform(0, 6.3))
    width_V *= rng.uniform(0.035, 0.075)
    width_V *= np.clip(1.6 - abs(np.abs(out_V2).sum(-1) - 1) * 1.5, 0, 1)  # epoxy recedes around a corner
    bend_V1 = np.gradient(width_V, along_V)[:, None]
    slope_V2 = out_V2 + bend_V1 * out_V2[:, ::-1] * (-1, 1)
    slope_V2 /= np.linalg.norm(slope_V2, axis=-1, keepdims=True)
    rise = rng.uniform(0.5, 0.9)
    inner_V2 = edge_V2 - 0.02 * out_V2
    depth_R = np.linspace(1, 0.1, rings)
    steep_R = rise * np.interp(depth_R, (0.1, 0.3, 0.7, 0.9, 1), (1, 0.75, 0.2, 0.3, 0.8))  # hollow, with a rounded rim
    outer_RV2 = edge_V2 + depth_R[:, None, None] * width_V[:, None] * out_V2
    inner_RV2 = np.broadcast_to(inner_V2, outer_RV2.shape)
    quads = np.stack([outer_RV2[:, :-1], outer_RV2[:, 1:], inner_RV2[:, 1:], inner_RV2[:, :-1]], 2)
    value_RV4 = np.empty((*quads.shape[:2], 4))
    value_RV4[..., :2], value_RV4[..., 2:] = steep_R[:, None, None] * slope_V2[:-1], layout.epoxy
    canvas.polygons(quads.reshape(-1, 4, 2), value_RV4.reshape(-1, 4), EPOXY)
    for _ in range(rng.integers(1, 5)):
        centre_2 = np.array([rng.uniform(-0.5, 0.5), rng.uniform(0.02, 0.16)])
        length = rng.uniform(0.012, 0.06)
        half = (length, length * rng.uniform(0.4, 0.9))
        lobes = (rng.uniform(0.1, 0.3), rng.uniform(0, 6.3))
        canvas.stamp(centre_2, half, rng.uniform(0, 3.1), _DROP_SLOPE, layout.epoxy, EPOXY, lobes=lobes)


def _paint_die(canvas: Canvas, rng: _Rng, layout: _Layout) -> None:
    """Paint silicon with seal ring, circuit blocks, bus lines and the row of bond pads."""
    side = np.sign(layout.die_end)
    middle = layout.die_end - 3 * side if abs(layout.die_end) < 1 else 0.0

    def plate(inset: float, *value: float) -> None:
        canvas.polygons(_boxes(middle, -3, 3 - inset, 3 - inset), np.array(value), BACKGROUND)

    spec = rng.uniform(0.3, 0.6)
    plate(0, 0.2, 0.6, 0.2, 0.1)  # chipped sawing edge
    plate(0.006, 0, 0, spec * 0.7, 0.05)
    plate(0.016, 0.3, 0.3, spec, 0.08)  # seal ring
    plate(0.020, 0, 0, spec, 0.03)
    inner = middle + (3 - 0.02), layout.pad_y - layout.pad - layout.stagger - 0.02
    low, high = middle - (3 - 0.02), inner[0]
    x_P, y_P = rng.uniform(-0.8, 0.8, 40), inner[1] - rng.uniform(0, 0.6, 40)
    half_P2 = rng.uniform(0.01, 0.09, (40, 2))
    y_P = np.minimum(y_P, inner[1] - half_P2[:, 1])
    x_P = np.clip(x_P, max(low, -9) + half_P2[:, 0], high - half_P2[:, 0])
    value_P4 = np.stack([0 * x_P, 0 * x_P, spec * rng.uniform(0.55, 1.35, 40), rng.uniform(0.02, 0.12, 40)], 1)
    canvas.polygons(_boxes(x_P, y_P, half_P2[:, 0], half_P2[:, 1]), value_P4)
    upright_P1 = rng.random((40, 1)) < 0.5
    long_P1, short_P1 = np.where(upright_P1, half_P2[:, ::-1], half_P2).T[..., None]
    step_P1 = rng.uniform(0.007, 0.02, (40, 1))
    line_PL = step_P1 * np.arange(1, 16) - short_P1  # bus lines, from one side of the block to the other
    shape = line_PL.shape
    x_PL, y_PL = x_P[:, None] + np.where(upright_P1, line_PL, 0), y_P[:, None] + np.where(upright_P1, 0, line_PL)
    half_x_PL, half_y_PL = np.where(upright_P1, step_P1 / 5, long_P1), np.where(upright_P1, long_P1, step_P1 / 5)
    value_PL4 = np.empty((*shape, 4))
    value_PL4[..., 0], value_PL4[..., 1] = 0.35 * upright_P1, 0.35 * ~upright_P1
    value_PL4[..., 2], value_PL4[..., 3] = spec, rng.uniform(0.05, 0.35, (40, 1))
    on_PL = line_PL < short_P1
    boxes = _boxes(x_PL, y_PL, np.broadcast_to(half_x_PL, shape), np.broadcast_to(half_y_PL, shape))
    canvas.polygons(boxes[on_PL], value_PL4[on_PL])
    pad_N2 = _pads(layout)
    pad_N2 = pad_N2[(pad_N2[:, 0] > low + layout.pad) & (pad_N2[:, 0] < high - layout.pad)]
    frame = layout.pad * 1.16
    canvas.polygons(_boxes(pad_N2[:, 0], pad_N2[:, 1], frame, frame), np.array([0.2, 0.3, spec * 0.5, 0.05]))
    canvas.polygons(
        _boxes(pad_N2[:, 0], pad_N2[:, 1], layout.pad, layout.pad), np.array([0, 0, rng.uniform(0.7, 0.95), 0.12])
    )


def _pads(layout: _Layout) -> Array:
    """Pad centres (N, 2), one per column."""
    column_N = _columns(layout)
    return np.stack([column_N * layout.pitch, layout.pad_y - layout.stagger * (column_N % 2)], -1)


def _wire_curves(rng: _Rng, layout: _Layout, points: int) -> tuple[Array, Array]:
    """Centre lines (N, T, 2) in plan and heights (N, T) from ball to wedge; one in twenty is bent sideways."""
    column_N = _columns(layout)
    start_N2 = _pads(layout) + rng.normal(0, 0.1 * layout.pad, (len(column_N), 2))
    end_N2 = np.stack([column_N * layout.pitch * layout.fan, layout.wedge_y + layout.tier * (column_N % 2)], -1)
    end_N2 += rng.normal(0, 0.006, end_N2.shape)
    sway_N = rng.normal(0, 0.12, len(column_N)) * layout.pitch + rng.normal(0, 0.15) * layout.pitch
    sway_N = np.where(rng.random(len(column_N)) < 0.05, 3.5 * sway_N, sway_N)
    t_T = np.linspace(0, 1, points) ** 1.6  # denser where the wire rises from the ball
    bow_NT = sway_N[:, None] * np.sin(np.pi * t_T) + 0.06 * layout.pitch * np.sin(2 * np.pi * t_T)
    chord_N12 = (end_N2 - start_N2)[:, None]
    normal_N12 = chord_N12[..., ::-1] * (-1, 1) / np.linalg.norm(chord_N12, axis=-1, keepdims=True)
    curve_NT2 = start_N2[:, None] + chord_N12 * t_T[:, None] + normal_N12 * bow_NT[..., None]
    rise, fall = rng.uniform(0.35, 0.7), rng.uniform(0.9, 1.7)
    height_T = t_T**rise * (1 - t_T) ** fall
    height_N = layout.loop * rng.uniform(0.85, 1.15, len(column_N))
    return curve_NT2, height_N[:, None] * height_T / height_T.max()


def _paint_wires(canvas: Canvas, rng: _Rng, layout: _Layout) -> None:
    """Paint balls, wedges and the wires between them, column by column, and their shadows in the oblique light."""
    width = layout.wire * canvas.scale
    points, strips = (11, 3) if width < 5 else (25, 7) if width < 12 else (41, 13)
    curve_NT2, height_NT = _wire_curves(rng, layout, points)
    tangent_NT2 = np.gradient(curve_NT2, axis=1)
    step_NT1 = np.linalg.norm(tangent_NT2, axis=-1, keepdims=True)
    tangent_NT2 /= step_NT1
    normal_NT2 = tangent_NT2[..., ::-1] * (-1, 1)
    climb_NT1 = np.gradient(height_NT, axis=1)[..., None] / step_NT1
    climb_NT1 /= np.hypot(1, climb_NT1)

    half = max(layout.wire - 0.5 / canvas.scale, 0)  # cv2 fills half a pixel beyond the corners
    across_K = np.linspace(-1, 1, strips + 1)
    grid_NTK2 = curve_NT2[:, :, None] + half * across_K[:, None] * normal_NT2[:, :, None]
    quads_NTKV2 = np.stack(
        [grid_NTK2[:, :-1, :-1], grid_NTK2[:, 1:, :-1], grid_NTK2[:, 1:, 1:], grid_NTK2[:, :-1, 1:]], 3
    )
    v_K1 = 0.98 * ((across_K[:-1] + across_K[1:]) / 2)[:, None]
    upright_NT12 = np.sqrt(1 - climb_NT1**2)[:, :-1, None]
    slope_NTK2 = v_K1 * upright_NT12 * normal_NT2[:, :-1, None] - climb_NT1[:, :-1, None] * tangent_NT2[:, :-1, None]
    value_NTK4 = np.concatenate([slope_NTK2, np.broadcast_to(layout.metal, slope_NTK2.shape)], -1)

    light_2 = canvas.turn_22.T @ (np.cos(layout.light), np.sin(layout.light))
    shade_NT2 = curve_NT2 - 0.6 * height_NT[..., None] * light_2
    present_N = rng.random(len(curve_NT2)) > 0.04
    size_N = layout.pad * rng.uniform(0.86, 0.98, len(curve_NT2))
    first, last = (layout.die_end, 9) if -1 < layout.die_end < 0 else (-9, layout.die_end)
    on_die_N = (curve_NT2[:, 0, 0] > first + layout.pad) & (curve_NT2[:, 0, 0] < last - layout.pad)
    seen_N = np.flatnonzero(present_N & on_die_N & canvas.sees(canvas.fixed(curve_NT2), margin=0.1))
    for n in seen_N:
        for target, line_T2, value in ((canvas.label_IJ, curve_NT2[n], WIRE), (canvas.shadow_IJ, shade_NT2[n], 255)):
            band = half * normal_NT2[n]
            canvas.outline(target, np.concatenate([line_T2 + band, (line_T2 - band)[::-1]]), value)
        heading = float(np.arctan2(tangent_NT2[n, -1, 1], tangent_NT2[n, -1, 0]))
        canvas.stamp(curve_NT2[n, 0], (size_N[n], size_N[n]), 0, _BALL_SLOPE, layout.metal, BALL)
        foot = 2.4 * layout.wire, 1.5 * layout.wire
        toe_2 = curve_NT2[n, -1] + 0.5 * foot[0] * tangent_NT2[n, -1]
        canvas.stamp(toe_2, foot, heading, _WEDGE_SLOPE, layout.metal, WEDGE, power=3)
    canvas.polygons(quads_NTKV2[seen_N].reshape(-1, 4, 2), value_NTK4[seen_N].reshape(-1, 4))
    if width > 12:  # the strips would look like facets
        canvas.surface_IJ4 = cv2.GaussianBlur(canvas.surface_IJ4, (0, 0), width / 16)


def _paint_dust(canvas: Canvas, rng: _Rng) -> None:
    """Paint a few specks, which only the oblique light shows well."""
    for _ in range(rng.integers(0, 7)):
        half = rng.uniform(0.002, 0.006)
        centre_2, shape = canvas.focus_2 + rng.uniform(-0.6, 0.6, 2), (half, half * rng.uniform(0.5, 1))
        canvas.stamp(centre_2, shape, rng.uniform(0, 3), _DUST_SLOPE, np.array([0.1, 0.8]), BACKGROUND)


def _checked(index: int, seed: int, size: int | tuple[int, int], bits: int) -> tuple[int, int]:
    """Height and width, after checking the arguments of `render`."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < MIN_SIZE:
        raise UserError(f"size={size}: wire_bonding images need at least {MIN_SIZE} pixels a side")
    if bits not in (8, 16):
        raise UserError(f"bits={bits}: choose 8 or 16")
    if index < 0 or seed < 0:
        raise UserError(f"index={index}, seed={seed}: both count from 0; choose 0 or more")
    return height, width


def render(
    index: int, *, seed: int = 0, size: int | tuple[int, int] = 2048, bits: int = 8
) -> tuple[npt.NDArray[np.uint8 | np.uint16], Label]:
    """Image `index` of the set `seed`: `image_HW2` (bright field, dark field) and `label_HW` (ids of `CLASS_NAMES`).

    Args:
        index: which image, from 0, without limit.
        seed: which set, from 0.
        size: side, or (height, width), in pixels; at least 32 each. Designed for up to 2048.
        bits: 8 or 16; the image is uint8 or uint16, over the full range.

    Raises:
        ValueError: an argument is out of range.
    """
    height, width = _checked(index, seed, size, bits)
    rng = np.random.default_rng([seed, index])
    layout = _Layout.draw(rng)
    fine = -(-_FINE // max(height, width))
    canvas = Canvas(height, width, fine, angle=layout.angle, focus_2=layout.focus)
    _paint_ground(canvas, rng, layout)
    _paint_epoxy(canvas, rng, layout)
    _paint_die(canvas, rng, layout)
    _paint_dust(canvas, rng)
    _paint_wires(canvas, rng, layout)
    wire_IJ = canvas.label_IJ == WIRE
    image_IJ2 = shade(canvas, rng, layout.light, wire_IJ | (canvas.label_IJ == BALL))
    image_HW2 = defocus(image_IJ2, rng, fine, wire_IJ)
    image_HW2 = expose(image_HW2, rng, np.random.default_rng([seed, index, height, width]))
    top, kind = (255, np.uint8) if bits == 8 else (65535, np.uint16)
    label_HW = canvas.label_IJ[fine // 2 :: fine, fine // 2 :: fine]
    image_HW2 *= top
    return np.rint(image_HW2, out=image_HW2).astype(kind), np.ascontiguousarray(label_HW)


class WireBonding(torch.utils.data.Dataset[dict[str, npt.NDArray[Any]]]):
    """Map-style data set of images `first` ... `first + num_images - 1` of the set `seed`, rendered on access.

    Items are {"image": (H, W, 2) uint8 or uint16, "annotation": (H, W) uint8}; see `render` for the arguments. Use
    ranges that do not overlap for training and validation.

    Raises:
        ValueError: an argument of the constructor is out of range.
        IndexError: the index is outside the data set.
    """

    def __init__(
        self, num_images: int, *, size: int | tuple[int, int], seed: int = 0, bits: int = 8, first: int = 0
    ) -> None:
        if num_images < 1:
            raise UserError(f"num_images={num_images}: must be at least 1")
        _checked(first, seed, size, bits)
        self.num_images, self.size, self.seed, self.bits, self.first = num_images, size, seed, bits, first

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict[str, npt.NDArray[Any]]:
        if not 0 <= index < self.num_images:
            raise IndexError(f"index {index} is outside a data set of {self.num_images} images")
        image, annotation = render(self.first + index, seed=self.seed, size=self.size, bits=self.bits)
        return {"image": image, "annotation": annotation}
