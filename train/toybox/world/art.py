"""How the Toybox world looks: its places, sky and fog, painted as soft functions on a `Canvas`.

Each painter draws what varies by seed in a fixed order; lengths are world units (see `motion`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from train.toybox.world.canvas import DRAWS_OF_DOTS, Canvas, Color, domes, wave
from train.toybox.world.scenes import PLACES, WEATHERS


def sky(c: Canvas, horizon: Tensor, *, clouds: float = 1.0) -> None:
    """Paint gradient, stars, sun or moon, and drifting clouds down to the horizon."""
    top = -0.75
    share = ((c.y - top) / (horizon - top)).clamp(0, 1)
    c.image.copy_(c.mix(c.zenith, c.horizon, share))
    bright = c.night * c.clearness
    if bool(c.night.any()):
        c.paint(c.dots(0.15, 0.011, 0.6) * bright, c.plain((1.0, 1.0, 0.92)))
    else:
        c.table(DRAWS_OF_DOTS)  # the draws after these stay the same by day
    _sun(c, horizon)
    period, level = c.draw(0.62, 0.9), c.draw(-0.36, -0.2)
    color = c.by_time((1, 1, 1), (1, 0.91, 0.90), (1, 0.76, 0.60), (0.25, 0.30, 0.48))
    for row, (scale, lift) in enumerate(((1.0, 0.0), (0.7, 0.15))):
        u, cell = c.cells(period * scale, c.seconds * (0.035 - 0.015 * row))
        width = c.per_cell(cell, 0.20, 0.42)
        offset = c.per_cell(cell, -0.05, 0.05)
        bulge = (1 - (u / width) * (u / width)).clamp(0, 1)
        tops = bulge * (0.55 + 0.45 * domes(u * 4.6 + offset * 30))
        base = level + lift + offset
        mask = c.under(base - tops * 0.14 * scale, 3.0) * (bulge * 8).clamp(0, 1)
        mask = mask * ((base + 0.012 - c.y) * 40 + 0.5).clamp(0, 1)
        c.paint(mask * (0.88 * clouds * (0.35 + 0.65 * c.clearness)), color)


def _sun(c: Canvas, horizon: Tensor) -> None:
    x = c.x - c.draw(-0.36, 0.36)
    high, low = c.draw(-0.40, -0.30), horizon - c.draw(0.02, 0.10)
    index = c.times[:, None, None]
    y = c.y - torch.where((index == 1) | (index == 2), low, high)
    radius = c.x.new_tensor((0.062, 0.075, 0.11, 0.06))[index]
    square = x * x + y * y
    glow = c.by_time((1, 0.98, 0.8), (1, 0.93, 0.75), (1, 0.72, 0.30), (0.45, 0.5, 0.75))
    strength = c.x.new_tensor((0.35, 0.6, 0.75, 0.3))[index] * c.clearness
    c.paint(strength * 0.02 / (square + 0.02), glow)
    disc = c.disc(x, y, radius)
    bitten = 1 - c.disc(x - 0.028, y + 0.012, 0.052) * c.night
    color = c.by_time((1, 0.93, 0.45), (1, 0.90, 0.62), (1, 0.45, 0.16), (0.96, 0.95, 0.82))
    c.paint(disc * bitten * c.clearness, color)


def _ground(c: Canvas, line: Tensor, near: Color, far: Color, vary: float = 0.03) -> Tensor:
    """Paint ground below a line, far colour at the line and near colour at the bottom."""
    mask = c.under(line)
    depth = ((c.y - line) * 1.6).clamp(0, 1)
    c.paint(mask, c.mix(c.lit(far, vary), c.lit(near, vary), depth))
    return mask


def _desert(c: Canvas) -> None:
    horizon = c.draw(0.02, 0.12)
    sky(c, horizon, clouds=0.4)
    u, cell = c.cells(0.55)
    height = c.per_cell(cell, -0.05, 0.15).clamp(min=0)
    mesa = horizon - height * ((0.36 - u.abs()) * 12).clamp(0, 1)
    c.paint(c.under(mesa), c.lit((0.76, 0.45, 0.33), 0.04))
    _ground(c, c.hills(horizon, 0.03, 0.9), (0.97, 0.80, 0.50), (0.90, 0.68, 0.42))
    line = c.hills(horizon + 0.12, 0.07, 0.75)
    mask = _ground(c, line, (0.98, 0.84, 0.56), (0.93, 0.73, 0.44))
    ripple = wave((c.y - line) * 11 + wave(c.x * 2.2 + c.draw()) * 0.35)
    c.paint((ripple - 0.35).clamp_(0, 1) * mask * 0.55, c.lit((0.83, 0.60, 0.34)))


def _meadow(c: Canvas) -> None:
    horizon = c.draw(0.02, 0.12)
    sky(c, horizon)
    _ground(c, c.hills(horizon - 0.02, 0.07, 0.8), (0.42, 0.70, 0.38), (0.50, 0.76, 0.50))
    line = c.hills(horizon + 0.10, 0.05, 0.7)
    mask = _ground(c, line, (0.30, 0.62, 0.22), (0.52, 0.80, 0.34))
    tuft = wave(c.x * 9 + wave(c.y * 3 + c.draw()) * 0.6) * wave(c.y * 7 + c.draw())
    c.paint(tuft.clamp_(0, 1) * mask * 0.35, c.lit((0.20, 0.50, 0.16)))
    for color in ((1.0, 0.95, 0.55), (1.0, 0.72, 0.85)):
        c.paint(c.dots(0.17, 0.022, 0.5) * mask, c.lit(color))


def _ocean(c: Canvas) -> None:
    horizon = c.draw(-0.06, 0.04)
    sky(c, horizon)
    mask = _ground(c, horizon, (0.04, 0.33, 0.62), (0.25, 0.62, 0.82))
    depth = (c.y - horizon).clamp(min=0)
    for row, (at, speed) in enumerate(((0.06, 0.10), (0.17, -0.13), (0.31, 0.17), (0.47, -0.2))):
        drift = c.seconds * speed
        size = 0.02 + 0.012 * row
        crest = horizon + at - size * wave(c.x * (3.6 - 0.6 * row) + drift + c.draw()).abs()
        band = c.under(crest)
        shade = ((c.y - crest) * (9 - 1.5 * row)).clamp(0, 1)
        top, body = c.lit((0.62, 0.88, 0.95)), c.lit((0.10 - 0.02 * row, 0.44 - 0.05 * row, 0.73))
        c.paint(band * (1 - shade * 0.35), c.mix(top, body, (shade * 3).clamp(0, 1)))
    glitter = c.by_time((1, 1, 1), (1, 0.85, 0.8), (1, 0.6, 0.3), (0.5, 0.6, 0.9))
    c.paint(mask * (0.16 / (1 + depth * 4)), glitter)


def _city(c: Canvas) -> None:
    horizon = c.draw(0.20, 0.26)
    sky(c, horizon, clouds=0.7)
    glow = c.by_time((0.55, 0.66, 0.78), (0.72, 0.62, 0.72), (0.62, 0.36, 0.42), (0.10, 0.13, 0.28))
    u, cell = c.cells(0.17)
    c.paint(c.under(horizon - c.per_cell(cell, 0.25, 0.55), 1.2), glow)
    u, cell = c.cells(0.27)
    tops = horizon - c.per_cell(cell, 0.12, 0.46)
    hue = c.per_cell(cell, 0.0, 1.0)
    solid = c.under(tops, 1.2) * c.within(u * 0.27, -0.125, 0.125)
    wall = c.mix(c.lit((0.78, 0.50, 0.42)), c.lit((0.52, 0.58, 0.68)), (hue * 3 - 1).clamp(0, 1))
    wall = c.mix(wall, c.lit((0.88, 0.80, 0.64)), (hue * 6 - 5).clamp(0, 1))
    c.paint(solid, wall)
    rows = (c.y - horizon) * (1 / 0.085)
    row = torch.floor(rows)
    panes = c.within((rows - row - 0.5) * 0.085, -0.024, 0.024)
    columns = u * (0.27 / 0.075) + 0.5
    column = torch.floor(columns)
    panes = panes * c.within((columns - column - 0.5) * 0.075, -0.02, 0.02)
    on = row * 0.37 + column * 0.61 + cell * 0.23 + c.draw()
    on = ((on - torch.floor(on)) < 0.62).to(c.x.dtype)
    inside = (u.abs() < 0.42).to(c.x.dtype) * (c.y > tops + 0.03).to(c.x.dtype)
    pane = c.by_time((0.72, 0.88, 0.97), (1, 0.86, 0.70), (1, 0.80, 0.42), (1, 0.86, 0.45))
    c.paint(panes * inside * (on * 0.85 + 0.15 * (1 - c.night)), pane)
    _ground(c, horizon, (0.42, 0.43, 0.47), (0.50, 0.51, 0.54))
    c.paint(c.within(c.y, horizon, horizon + 0.055),
            c.lit((0.74, 0.72, 0.70)))  # fmt: skip
    u, _ = c.cells(0.3)
    dash = c.within(u * 0.3, -0.08, 0.08) * c.within(c.y, horizon + 0.15, horizon + 0.175)
    c.paint(dash, c.lit((0.95, 0.92, 0.80)))


def _snow(c: Canvas) -> None:
    horizon = c.draw(0.04, 0.12)
    sky(c, horizon, clouds=0.6)
    _ground(c, c.hills(horizon - 0.03, 0.07, 0.9), (0.80, 0.87, 0.96), (0.74, 0.83, 0.94), 0.015)
    for scale in (0.75, 1.0):
        u, cell = c.cells(0.26 * scale)
        tall = c.per_cell(cell, 0.08, 0.24) * scale
        reach = tall * 0.42
        side = (u * 0.26 * scale).abs() / reach
        base = horizon + 0.10 * scale
        tip = base - tall * (1 - side)
        tree = c.under(tip) * ((base - c.y) / c.pixel + 0.5).clamp(0, 1)
        tree = tree * ((1 - side) * 8).clamp(0, 1)
        c.paint(tree, c.lit((0.16, 0.40, 0.36), 0.02))
        cap = tree * ((tip + 0.035 * scale - c.y) * 60 + 0.5).clamp(0, 1)
        c.paint(cap, c.lit((0.97, 0.98, 1.0)))
    line = c.hills(horizon + 0.10, 0.04, 0.6)
    mask = _ground(c, line, (0.94, 0.97, 1.0), (0.88, 0.93, 0.99), 0.01)
    shade = wave(c.x * 2.1 + c.y * 3 + c.draw()) * wave(c.y * 4.2 - c.x * 0.7 + c.draw())
    c.paint(shade.clamp_(0, 1) * mask * 0.5, c.lit((0.70, 0.80, 0.94)))


def _space(c: Canvas) -> None:
    c.image.copy_(c.plain((0.03, 0.02, 0.09)).expand_as(c.image))
    hue = c.draw()
    haze = wave(c.x * 0.9 + c.y * 0.6 + c.draw()) * wave(c.y * 1.1 - c.x * 0.5 + c.draw())
    tone = c.mix(c.plain((0.42, 0.14, 0.52)), c.plain((0.08, 0.36, 0.50)), hue)
    c.paint((haze * 0.5 + 0.28).clamp_(0, 0.7), tone)
    c.paint((-haze - 0.25).clamp_(0, 0.5), tone.flip(1))
    white = c.plain((1.0, 1.0, 1.0))
    c.paint(c.dots(0.125, 0.0105, 0.7), white)
    c.paint(c.dots(0.31, 0.017, 0.6), white * 0.98)
    side = torch.where(c.draw() < 0.5, -1.0, 1.0)
    x, y = c.x - side * c.draw(0.25, 0.36), c.y - c.draw(-0.34, 0.30)
    radius = c.draw(0.11, 0.16)
    ball = c.disc(x, y, radius)
    bands = wave(c.y * 9 + x * 1.5 + c.draw()) * 0.5 + 0.5
    is_cool = (c.draw() < 0.5).to(x.dtype)
    tone = c.mix(c.plain((0.95, 0.66, 0.38)), c.plain((0.45, 0.62, 0.88)), is_cool)
    c.paint(ball, c.mix(tone, tone * 0.72, bands))
    shade = c.disc(x - radius * 0.35, y - radius * 0.3, radius * 1.02)
    c.paint(ball * (1 - shade) * 0.35, white)
    tilt = y * 3.6 - x * 1.1
    ring = x * x + tilt * tilt
    inner, outer = radius * 1.35, radius * 1.85
    ring = c.within(ring, inner * inner, outer * outer)
    c.paint(ring * (1 - ball * (tilt < 0).to(x.dtype)) * 0.8, tone * 0.85 + 0.12)


def _beach(c: Canvas) -> None:
    horizon = c.draw(-0.10, -0.02)
    sky(c, horizon)
    _ground(c, horizon, (0.20, 0.70, 0.80), (0.10, 0.48, 0.75))
    for row in range(2):
        crest = horizon + 0.05 + 0.06 * row
        line = crest + 0.012 * wave(c.x * 3 + c.seconds * (0.15 + 0.1 * row) + c.draw())
        c.paint(c.within(c.y - line, -0.006, 0.008), c.lit((0.80, 0.95, 0.97)))
    tide = 0.015 * wave(c.seconds * 0.4 + c.draw())
    shore = c.hills(horizon + 0.20 + tide, 0.03, 0.8)
    c.paint(c.under(shore - 0.03), c.lit((0.97, 1.0, 1.0)))
    _ground(c, shore, (0.98, 0.88, 0.65), (0.86, 0.72, 0.50))
    mask = c.under(shore + 0.07, 12)
    c.paint(mask, c.lit((0.98, 0.87, 0.64), 0.02))
    c.paint(c.dots(0.24, 0.030, 0.5) * mask, c.lit((0.99, 0.62, 0.52)))
    c.paint(c.dots(0.21, 0.024, 0.5) * mask, c.lit((1.0, 0.98, 0.94)))
    dune = wave(c.x * 1.7 + c.y * 2.5 + c.draw()) * wave(c.y * 5 - c.x + c.draw())
    c.paint(dune.clamp_(0, 1) * mask * 0.4, c.lit((0.86, 0.70, 0.46)))


def _forest(c: Canvas) -> None:
    horizon = c.draw(0.14, 0.22)
    top, bottom = c.lit((0.50, 0.78, 0.52), 0.03), c.lit((0.80, 0.93, 0.70), 0.03)
    c.image.copy_(c.mix(top, bottom, ((c.y + 0.6) * 1.25).clamp(0, 1)))
    for scale, trunk in ((0.17, (0.50, 0.62, 0.46)), (0.30, (0.40, 0.27, 0.20))):
        u, cell = c.cells(scale)
        thick = c.per_cell(cell, 0.10, 0.17) * scale
        x = (u + c.per_cell(cell, -0.2, 0.2)) * scale
        mask = c.within(x + 0.012 * wave(c.y * 1.5), -thick, thick)
        mask = mask * ((horizon + scale * 0.25 - c.y) / c.pixel + 0.5).clamp(0, 1)
        bark = c.lit(trunk, 0.02)
        c.paint(mask, c.mix(bark * 1.15, bark * 0.75, (x / thick * 0.5 + 0.5).clamp(0, 1)))
    greens = ((-0.17, 0.23, (0.25, 0.55, 0.28)), (-0.30, 0.31, (0.16, 0.43, 0.20)))
    for level, period, color in greens:
        bump = domes(c.x * (1.7 / period) + c.draw()) * 0.085 + c.hills(0.0, 0.05, 0.7)
        leaves = 1 - c.under(level + bump + c.draw(-0.03, 0.03), 2.5)
        c.paint(leaves, c.lit(color, 0.03))
    mask = _ground(c, c.hills(horizon, 0.03, 0.5), (0.30, 0.38, 0.16), (0.42, 0.55, 0.24))
    fern = c.hills(horizon + 0.13, 0.02, 0.4) - domes(c.x * 7.5 + c.draw()) * 0.05
    c.paint(c.under(fern, 2), c.lit((0.20, 0.46, 0.18), 0.02))
    c.paint(c.dots(0.23, 0.02, 0.45) * mask, c.lit((0.95, 0.90, 0.70)))


def _mountains(c: Canvas) -> None:
    horizon = c.draw(0.14, 0.22)
    sky(c, horizon, clouds=0.7)
    for scale, rock in ((1.0, (0.55, 0.58, 0.74)), (0.72, (0.42, 0.43, 0.56))):
        u, cell = c.cells(0.62 * scale)
        peak = c.per_cell(cell, 0.34, 0.52) * scale
        jag = wave(c.x * 7 + c.draw()) * 0.018
        ridge = horizon - (peak * (1 - u.abs() * 1.75) + jag)
        mask = c.under(ridge)
        shade = ((u + wave(c.y * 6 + c.draw()) * 0.05) * 9 + 0.5).clamp(0, 1)
        stone = c.lit(rock, 0.02)
        c.paint(mask, c.mix(stone * 1.12, stone * 0.80, shade))
        cap = horizon - peak * 0.66 + wave(c.x * 8 + c.draw()) * 0.03
        snow = mask * (1 - c.under(cap))
        c.paint(snow, c.mix(c.lit((1, 1, 1)), c.lit((0.78, 0.84, 0.93)), shade))
    line = c.hills(horizon, 0.03, 0.7)
    mask = _ground(c, line, (0.34, 0.58, 0.28), (0.40, 0.60, 0.40))
    patch = wave(c.x * 2.3 + c.y * 2 + c.draw()) * wave(c.y * 5 - c.x + c.draw())
    c.paint(patch.clamp_(0, 1) * mask * 0.6, c.lit((0.22, 0.44, 0.22)))
    c.paint(c.dots(0.22, 0.03, 0.45) * mask, c.lit((0.62, 0.62, 0.64)))


def _road(c: Canvas) -> None:
    horizon = c.draw(0.0, 0.06)
    sky(c, horizon)
    _ground(c, c.hills(horizon - 0.02, 0.05, 0.9), (0.50, 0.70, 0.42), (0.56, 0.74, 0.55))
    u, cell = c.cells(0.3)
    size = c.per_cell(cell, 0.04, 0.08)
    crown = c.disc(u * 0.3, c.y - (horizon - 0.02), size)
    c.paint(c.within(c.y, horizon, horizon + 0.2), c.lit((0.62, 0.74, 0.36), 0.03))
    c.paint(crown, c.lit((0.24, 0.52, 0.28), 0.03))
    kerb = horizon + 0.09
    c.paint(c.under(kerb), c.lit((0.86, 0.84, 0.80)))
    asphalt = c.lit((0.36, 0.37, 0.41), 0.02)
    c.paint(c.under(kerb + 0.02), asphalt)
    u, _ = c.cells(0.34)
    dash = c.within(u * 0.34, -0.095, 0.095) * c.within(c.y, kerb + 0.16, kerb + 0.19)
    c.paint(dash, c.lit((1.0, 0.86, 0.30)))
    c.paint(c.within(c.y, kerb + 0.345, kerb + 0.365),
            c.lit((0.95, 0.95, 0.93)))  # fmt: skip
    u, _ = c.cells(0.2)
    post = c.within(u * 0.2, -0.014, 0.014) * c.within(c.y, kerb - 0.07, kerb)
    c.paint(post, c.lit((0.96, 0.96, 0.96)))
    _ground(c, kerb + 0.40, (0.40, 0.62, 0.26), (0.52, 0.70, 0.32))


def _underwater(c: Canvas) -> None:
    top, bottom = c.lit((0.35, 0.80, 0.90), 0.03), c.lit((0.04, 0.26, 0.52), 0.03)
    c.image.copy_(c.mix(top, bottom, ((c.y + 0.6) * 0.91).clamp(0, 1)))
    lean = c.x + c.y * 0.35
    rays = wave(lean * 1.9 + c.draw() + c.seconds * 0.05) * wave(lean * 0.8 + c.draw())
    c.paint(rays.clamp_(0, 1) * ((0.35 - c.y) * 0.55).clamp(0, 0.5), c.lit((0.85, 1.0, 1.0)))
    floor = c.hills(c.draw(0.24, 0.32), 0.03, 0.6)
    far = floor - c.hills(0.08, 0.06, 0.5)
    c.paint(c.under(far, 3), c.lit((0.06, 0.34, 0.52), 0.02))
    u, cell = c.cells(0.21)
    sway = 0.02 * wave(c.y * 3.2 + c.seconds * 0.5 + c.draw()) * (floor - c.y) * 4
    tall = c.per_cell(cell, -0.1, 0.34)
    x = (u + c.per_cell(cell, -0.15, 0.15)) * 0.21 + sway
    body = (c.y - (floor - tall)).clamp(min=0)
    weed = c.within(x, -0.03 * body.clamp(max=0.1) * 10, 0.03 * body.clamp(max=0.1) * 10)
    weed = weed * (body > 0).to(x.dtype)
    c.paint(weed, c.lit((0.16, 0.56, 0.30), 0.03))
    mask = _ground(c, floor, (0.93, 0.83, 0.60), (0.76, 0.75, 0.62))
    c.paint(c.dots(0.2, 0.03, 0.5) * mask, c.lit((0.98, 0.50, 0.48), 0.04))
    bubbles = c.dots(0.26, 0.018, 0.4, y=c.y + c.seconds * 0.14)
    c.paint(bubbles * (1 - mask) * 0.6, c.lit((0.90, 1.0, 1.0)))


def _room(c: Canvas) -> None:
    floor = c.draw(0.22, 0.28)
    wall = c.lit((0.93, 0.85, 0.70), 0.06)
    c.image.copy_(wall.expand_as(c.image))
    u, _ = c.cells(0.15)
    stripes = ((0.25 - u.abs()) * (0.15 / 1.6) / c.pixel + 0.5).clamp(0, 1)
    c.paint(stripes, wall * 0.90)
    c.paint(c.dots(0.15, 0.018, 0.9), wall * 0.78)
    x, y = c.x - c.draw(-0.30, -0.10), c.y - c.draw(-0.22, -0.14)
    c.paint(c.within(x, -0.17, 0.17) * c.within(y, -0.17, 0.17), c.lit((0.99, 0.98, 0.95)))
    glass = c.within(x, -0.14, 0.14) * c.within(y, -0.14, 0.14)
    c.paint(glass, c.mix(c.zenith, c.horizon, ((y + 0.14) * 3.5).clamp(0, 1)))
    hill = glass * c.under(c.y - y + 0.08 - 0.03 * wave(c.x * 3 + c.draw()))
    c.paint(hill, c.lit((0.40, 0.66, 0.36)))
    frame = c.lit((0.99, 0.98, 0.95))
    c.paint(c.within(x, -0.012, 0.012) * c.within(y, -0.15, 0.15), frame)
    c.paint(c.within(x, -0.15, 0.15) * c.within(y, -0.012, 0.012), frame)
    x, y = c.x - c.draw(0.26, 0.36), c.y - c.draw(-0.20, -0.10)
    c.paint(c.within(x, -0.10, 0.10) * c.within(y, -0.13, 0.13), c.lit((0.55, 0.34, 0.20), 0.05))
    canvas = c.within(x, -0.075, 0.075) * c.within(y, -0.105, 0.105)
    c.paint(canvas, c.lit((0.55, 0.75, 0.85), 0.12))
    c.paint(canvas * c.disc(x, y + 0.01, 0.05), c.lit((0.95, 0.55, 0.40), 0.12))
    c.paint(c.under(floor - 0.045), c.lit((0.98, 0.96, 0.92)))
    c.paint(c.under(floor), c.lit((0.70, 0.48, 0.30), 0.03))
    slant = c.x / (1 + (c.y - floor).clamp(min=0) * 1.6)
    board = slant * 5.9 + c.draw()
    gap = ((board - torch.floor(board) - 0.5).abs() * 14 - 6).clamp(0, 1)
    c.paint(gap * c.under(floor), c.lit((0.50, 0.32, 0.19)))


def _farm(c: Canvas) -> None:
    horizon = c.draw(0.02, 0.10)
    sky(c, horizon)
    _ground(c, c.hills(horizon - 0.03, 0.04, 0.8), (0.50, 0.68, 0.36), (0.55, 0.72, 0.42))
    x, base = c.x - c.draw(-0.32, 0.32), horizon + 0.05
    red = c.lit((0.78, 0.20, 0.16), 0.03)
    roof = (x.abs() * 0.7 - 0.27).clamp(min=-0.27)
    gable = c.within(x, -0.17, 0.17) * c.under(base + roof) * (1 - c.under(base))
    c.paint(gable, c.lit((0.97, 0.95, 0.92)))
    c.paint(c.within(x, -0.15, 0.15) * c.under(base + roof + 0.03) * (1 - c.under(base)), red)
    door = c.within(x, -0.055, 0.055) * c.within(c.y, base - 0.12, base)
    c.paint(door, c.lit((0.97, 0.95, 0.92)))
    c.paint(c.within(x, -0.04, 0.04) * c.within(c.y, base - 0.105, base), red * 0.6)
    line = horizon + 0.05 + 0.0 * c.x
    mask = _ground(c, line, (0.90, 0.70, 0.22), (0.96, 0.83, 0.42))
    slant = (c.x - c.draw(-0.2, 0.2)) / (0.12 + (c.y - line).clamp(min=0) * 1.3)
    row = slant * 0.62 + c.draw()
    furrow = ((row - torch.floor(row) - 0.5).abs() * 7 - 2.2).clamp_(0, 1)
    c.paint(furrow * mask * 0.75, c.lit((0.70, 0.50, 0.14)))
    ears = wave(c.x * 11 + c.draw()) * wave(c.y * 12 + c.draw())
    c.paint(ears.clamp_(0, 1) * mask * 0.4, c.lit((1.0, 0.92, 0.55)))


def _volcano(c: Canvas) -> None:
    horizon = c.draw(0.10, 0.18)
    sky(c, horizon, clouds=0.3)
    dusk = c.lit((0.52, 0.30, 0.32))
    c.paint(0.40 * ((c.y + 0.5) * 1.67).clamp(0, 1), dusk)
    x = c.x - c.draw(-0.26, 0.26)
    tall = c.draw(0.40, 0.50)
    puff = c.y + tall - horizon
    curl = wave(c.y * 1.4 + c.seconds * 0.12 + c.draw()) * 0.05
    smoke = (x + curl) / (0.07 - puff * 0.35).clamp(min=0.03)
    plume = (1.3 - smoke * smoke).clamp_(0, 1) * (-puff * 12).clamp(0, 1) * 0.8
    c.paint(plume, c.lit((0.45, 0.42, 0.44)))
    side = x.abs()
    slope = 0.064 / side.clamp(min=0.085) + 0.33 - side * 0.62
    mask = c.under(horizon - tall * slope.clamp(0, 1))
    rock = c.mix(c.lit((0.42, 0.30, 0.30)), c.lit((0.26, 0.18, 0.20)), (x * 4 + 0.5).clamp(0, 1))
    c.paint(mask, rock)
    fire = c.plain((1.0, 0.42, 0.08))
    drop = c.y - horizon + tall
    stream = x + wave(c.y * 2.6 + c.draw()) * 0.025 + drop * c.draw(-0.3, 0.3)
    width = 0.022 + drop.clamp(min=0) * 0.05
    c.paint(c.within(stream, -width, width) * mask, fire)
    c.paint(c.disc(x, (drop - tall * 0.02) * 2.6, 0.085), c.plain((1, 0.68, 0.2)))
    line = c.hills(horizon, 0.03, 0.5)
    mask = _ground(c, line, (0.22, 0.17, 0.19), (0.33, 0.25, 0.26))
    crack = wave(c.x * 1.3 + c.y * 1.9 + c.draw()) + wave(c.y * 3.3 - c.x * 1.0 + c.draw())
    glow = (1.1 - crack.abs() * 3.6).clamp_(0, 1) * mask
    c.paint(glow, fire)
    c.paint((glow - 0.6).clamp_(0, 1) * 2, c.plain((1, 0.8, 0.3)))


_PAINTERS: dict[str, Callable[[Canvas], None]] = {
    "desert": _desert, "meadow": _meadow, "ocean": _ocean, "city": _city, "snow": _snow,
    "space": _space, "beach": _beach, "forest": _forest, "mountains": _mountains, "road": _road,
    "underwater": _underwater, "room": _room, "farm": _farm, "volcano": _volcano,
}  # fmt: skip
assert set(_PAINTERS) == set(PLACES)


def paint_place(place: str, canvas: Canvas) -> Tensor:
    """Paint a place onto the canvas; returns its picture [N, 3, H, W] in [0, 1]."""
    _PAINTERS[place](canvas)
    return canvas.image


def paint_fog(c: Canvas, image: Tensor, weathers: Tensor, *, strength: float) -> None:
    """Lay drifting fog over pictures [N, 3, H, W] in place, where the weather is fog."""
    foggy = (weathers == WEATHERS.index("fog")).to(image.dtype)[:, None, None]
    if not bool(foggy.any()):
        return
    drift = wave(c.x * 0.8 + c.seconds * 0.06) * wave(c.y * 2.3 + 0.2)
    share = (strength * (0.85 + 0.3 * drift)).clamp(0, 1) * foggy
    tones = ((0.86, 0.89, 0.91), (0.93, 0.84, 0.85), (0.90, 0.72, 0.60), (0.27, 0.30, 0.42))
    color = c.by_time(*tones)
    image.lerp_(color, share[:, None])
