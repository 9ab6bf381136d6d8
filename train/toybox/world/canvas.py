"""What places are painted with: a canvas of world coordinates, soft shapes, scattered draws.

Axes: N frames painted at once (of any scenes, all in one place), H rows, W columns.
World coordinates are those of `motion`. Without camera rotation x depends on the column alone and y
on the row, so skylines and gradients cost one line; only masks cost a plane.

Every operation is one that IEEE 754 rounds exactly (no sin, exp or pow on tensors, no division by a
plain number, which CUDA turns into a product), so a frame is the same beside others or alone, and
CUDA agrees with the CPU far below 1/255.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from train.toybox.world.scenes import TIMES

NUM_DRAWS = 160  # a scene has for its look
DRAWS_OF_DOTS = 17  # that Canvas.dots takes
Color = Sequence[float]

#: By time of day: zenith, horizon, light on things of the place.
_ZENITH = ((0.30, 0.58, 0.93), (0.55, 0.60, 0.86), (0.40, 0.24, 0.52), (0.02, 0.04, 0.15))
_HORIZON = ((0.78, 0.91, 0.99), (1.00, 0.80, 0.78), (1.00, 0.58, 0.25), (0.13, 0.18, 0.40))
_LIGHT = ((1.00, 1.00, 1.00), (0.90, 0.80, 0.86), (0.93, 0.64, 0.50), (0.30, 0.35, 0.56))
#: What the weather makes of the sky (colour by day, share of it) and of the light.
_OVERCAST = ((0.0, 0.0, 0.0), (0.50, 0.55, 0.61), (0.80, 0.84, 0.90), (0.82, 0.84, 0.86))
_OVERCAST_SHARE = (0.0, 0.78, 0.70, 0.60)
_GLOOM = (1.0, 0.80, 0.97, 0.95)


def wave(x: Tensor) -> Tensor:
    """Sine-like wave of period 1 in [-1, 1] from parabolas: smooth, and exact on every device."""
    x = x - torch.floor(x) - 0.5
    return x * (x.abs() * 16 - 8)


def domes(x: Tensor) -> Tensor:
    """Row of half circles, one a period, in [0, 1]: leaves, clouds."""
    x = 2 * (x - torch.floor(x)) - 1
    return (1 - x * x).sqrt()


class Canvas:
    """N frames being painted: world coordinates, the scenes' draws, light, and the picture so far.

    Args:
        x: world x of each column, [N, 1, W].
        y: world y of each row, [N, H, 1].
        seconds: time of each frame, [N, 1, 1].
        pixel: a pixel's side in world units, [N, 1, 1].
        looks: each scene's draws in [0, 1), [N, NUM_DRAWS].
        times: index into `TIMES`, [N].
        weathers: index into `WEATHERS`, [N].
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        seconds: Tensor,
        pixel: Tensor,
        looks: Tensor,
        times: Tensor,
        weathers: Tensor,
    ) -> None:
        self.x, self.y, self.seconds, self.pixel = x, y, seconds, pixel
        self.looks, self._next = looks, 0
        self.times = times
        light, gloom = self._by(_LIGHT, times), self._by(_GLOOM, weathers)
        self.light = light * gloom
        share = self._by(_OVERCAST_SHARE, weathers)
        cloud = self._by(_OVERCAST, weathers) * (light * 0.7 + light.amax(1, keepdim=True) * 0.3)
        self.zenith = self._by(_ZENITH, times) * (1 - share) + cloud * 0.92 * share
        self.horizon = self._by(_HORIZON, times) * (1 - share) + cloud * 1.08 * share
        self.clearness = 1 - share[:, 0]
        self.night = (times == TIMES.index("night")).to(x.dtype)[:, None, None]
        self.image = x.new_empty(x.shape[0], 3, y.shape[1], x.shape[2])

    def _by(self, rows: Sequence[Color] | Color, index: Tensor) -> Tensor:
        table = torch.tensor(rows, device=index.device, dtype=torch.float32)[index]
        return table.reshape(index.shape[0], -1, 1, 1)

    def by_time(self, day: Color, dawn: Color, sunset: Color, night: Color) -> Tensor:
        """Return a colour [N, 3, 1, 1] chosen by the time of day, not lit further."""
        return self._by((day, dawn, sunset, night), self.times)

    def draw(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return the scene's next draw in [low, high), [N, 1, 1]."""
        value = self.looks[:, self._next, None, None]
        self._next += 1
        return value * (high - low) + low

    def table(self, size: int = 8) -> Tensor:
        """Return the scene's next few draws, [N, size], to be looked up by cell."""
        values = self.looks[:, self._next : self._next + size]
        self._next += size
        return values

    def lit(self, color: Color, vary: float = 0.0) -> Tensor:
        """Return a colour under the scene's light, [N, 3, 1, 1], varied a little by seed."""
        base = self.plain(color)
        if vary:
            shifts = torch.cat([self.draw(-vary, vary) for _ in range(3)], 1)[..., None]
            base = base + shifts
        return base * self.light

    def plain(self, color: Color) -> Tensor:
        """Return a colour that glows by itself, [1, 3, 1, 1]."""
        return self.x.new_tensor(color).reshape(1, 3, 1, 1)

    def mix(self, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
        """Blend two colours [N, 3, ...] by share [N, H or 1, W or 1]."""
        return first + (second - first) * share[:, None]

    def paint(self, mask: Tensor, color: Tensor) -> None:
        """Lay a colour over the picture where mask [N, H, W] says so."""
        self.image.lerp_(color, mask[:, None])

    def under(self, line: Tensor, soft: float = 1.6) -> Tensor:
        """Return the mask of what is below a line y(x) [N, 1, W], its edge some pixels soft."""
        return ((self.y - line) * (1 / (self.pixel * soft)) + 0.5).clamp_(0, 1)

    def within(self, axis: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        """Return the 1-D mask of low < axis < high with edges a pixel and a half soft."""
        sharp = 1 / (self.pixel * 1.5)
        return ((axis - low) * sharp + 0.5).clamp(0, 1) * ((high - axis) * sharp + 0.5).clamp(0, 1)

    def disc(self, x: Tensor, y: Tensor, radius: Tensor | float) -> Tensor:
        """Return the soft mask of discs, given distances from their centres along both axes."""
        square = x * x + y * y
        edge = 2 * radius * self.pixel * 1.6
        return ((radius * radius - square) * (1 / edge) + 0.5).clamp_(0, 1)

    def cells(self, period: Tensor | float, drift: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """Cut the x axis into cells: position in the cell in [-.5, .5) and the cell's number."""
        place = self.x * (1 / period) + self.draw(0, 8) + drift
        cell = torch.floor(place)
        return place - cell - 0.5, cell.long()

    def per_cell(self, cell: Tensor, low: float = 0.0, high: float = 1.0, size: int = 8) -> Tensor:
        """Return a draw for each cell number, [N, 1, W]."""
        index = (cell % size)[:, 0]
        return self.table(size).gather(1, index)[:, None] * (high - low) + low

    def hills(self, level: Tensor | float, height: float, period: float) -> Tensor:
        """Return a rolling line y(x), [N, 1, W]."""
        first = wave(self.x * (1 / period) + self.draw())
        second = wave(self.x * (2.13 / period) + self.draw())
        third = wave(self.x * (4.76 / period) + self.draw())
        return level - height * (first * 0.6 + second * 0.3 + third * 0.1)

    def dots(self, period: float, radius: float, share: float, y: Tensor | None = None) -> Tensor:
        """Return the mask [N, H, W] of scattered discs, one at most in each cell of a grid."""
        rows = (self.y if y is None else y) * (1 / period) + self.draw(0, 8)
        row = torch.floor(rows)
        index = (row.long() % 8)[..., 0]
        columns = self.x * (1 / period) + self.table().gather(1, index)[..., None] * 5
        cell = torch.floor(columns)
        u = columns - cell - 0.5
        number = cell * 0.754877666 + self.table().gather(1, index)[..., None]
        number = number - torch.floor(number)
        v = (rows - row - 0.5) + (number * (0.5 / share) - 0.25)
        reach = radius / period
        edge = self.pixel * (2 * reach * 1.6 / period)
        disc = ((reach * reach - u * u - v * v) * (1 / edge) + 0.5).clamp_(0, 1)
        return disc * (number < share).to(disc.dtype)
