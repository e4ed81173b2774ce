"""Small charts as SVG text: no script, colours by CSS classes, so that a page can be light or dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import count

COLOURS = 8  # classes c0 .. c7 in style.css
DASHES = ("", "6 3", "2 3", "8 3 2 3")
WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 14, 46
_numbers = count(1)

Point = tuple[float, float]


@dataclass
class Series:
    """One line.

    Attributes:
        name: in the text alternative and where the pointer rests.
        points: (x, y) in order of x.
        band: (x, low, high), drawn behind; may be empty.
        index: chooses colour, marker and dashes: the same index looks the same in every chart.
        zeros, broken: x of values that are exactly 0 on a log axis, or not finite: drawn hollow at the lower edge, as crosses at the upper.
    """

    name: str
    points: list[Point]
    band: list[tuple[float, float, float]] = field(default_factory=list)
    index: int = 0
    zeros: list[float] = field(default_factory=list)
    broken: list[float] = field(default_factory=list)


@dataclass
class Axis:
    """One axis: its label, its range (None: from the data), whether it is logarithmic, and how a value is written."""

    label: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    write: Callable[[float], str] = lambda value: f"{value:,g}"
    whole: bool = False

    def fit(self, values: Sequence[float]) -> None:
        """Sets what is not given so that all (finite) values lie inside."""
        values = [v for v in values if math.isfinite(v) and (v > 0 or not self.log)] or [1.0]
        low, high = min(values), max(values)
        if self.log:
            self.low = 10 ** (math.floor(math.log10(low) * 3 + 1e-9) / 3) if self.low is None else self.low
            self.high = 10 ** (math.ceil(math.log10(high) * 3 - 1e-9) / 3) if self.high is None else self.high
            if self.high <= self.low:
                self.low, self.high = self.low / 2, self.high * 2
            return
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        self.low = low - margin if self.low is None else self.low
        self.high = high + margin if self.high is None else self.high

    def share(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1; what lies outside is moved to the edge."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def ticks(self) -> list[float]:
        """About five round numbers inside the range."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, math.ceil((last - first) / 5))
            decades = [10.0**e for e in range(first, last + 1, step)]
            if len(decades) >= 2:
                return decades
            fine = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5)]
            return [t for t in fine if self.low <= t <= self.high]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
        if self.whole:
            step = max(1.0, math.ceil(step))
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 12) + 0.0 for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


class Chart:
    """An empty chart with axes, to be drawn on. Coordinates of the methods are those of the data.

    Args:
        title, description: the text alternative.
        x, y: axes whose ranges are set.
        width: of the drawing, in its own units.
        x_ticks: (place, text) instead of numbers.
    """

    def __init__(
        self, title: str, description: str, x: Axis, y: Axis, width: int = WIDTH, x_ticks: Sequence[tuple[float, str]] | None = None
    ):
        self.x, self.y, self.width = x, y, width
        number = next(_numbers)
        self._parts = [
            f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-labelledby="t{number} d{number}" style="--w:{width}px">',
            f'<title id="t{number}">{escape(title)}</title><desc id="d{number}">{escape(description)}</desc>',
        ]
        for value in y.ticks():
            self._parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{self.py(value)}" y2="{self.py(value)}"/>')
            self._text(LEFT - 6, self.py(value) + 4, y.write(value), "end")
        for place, text in x_ticks if x_ticks is not None else [(v, x.write(v)) for v in x.ticks()]:
            self._text(self.px(place), HEIGHT - BOTTOM + 17, text)
        self._parts.append(f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
        self._text((LEFT + width - RIGHT) / 2, HEIGHT - 8, x.label, kind="label")
        middle = (TOP + HEIGHT - BOTTOM) / 2
        self._parts.append(
            f'<text class="label" text-anchor="middle" transform="translate(13 {middle}) rotate(-90)">{escape(y.label)}</text>'
        )

    def px(self, value: float) -> float:
        return round(LEFT + self.x.share(value) * (self.width - LEFT - RIGHT), 2)

    def py(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - self.y.share(value) * (HEIGHT - TOP - BOTTOM), 2)

    def _text(self, x: float, y: float, text: str, anchor: str = "middle", kind: str = "tick") -> None:
        self._parts.append(f'<text class="{kind}" x="{round(x, 2)}" y="{round(y, 2)}" text-anchor="{anchor}">{escape(text)}</text>')

    def line(self, series: Series, marked: bool | None = None) -> None:
        """A line with its band, and markers where there are few points."""
        look = f"c{series.index % COLOURS}"
        if len(series.band) > 1:
            above = " ".join(f"{self.px(x)},{self.py(high)}" for x, _, high in series.band)
            below = " ".join(f"{self.px(x)},{self.py(low)}" for x, low, _ in reversed(series.band))
            self._parts.append(f'<polygon class="band {look}" points="{above} {below}"/>')
        if len(series.points) > 1:
            path = " ".join(f"{self.px(x)},{self.py(y)}" for x, y in series.points)
            dash = DASHES[series.index // COLOURS % len(DASHES)]
            dashed = f' stroke-dasharray="{dash}"' if dash else ""
            self._parts.append(f'<polyline class="line {look}" points="{path}"{dashed}/>')
        if marked or (marked is None and len(series.points) <= 40):
            for x, y in series.points:
                self.marker(x, y, series.index, f"{series.name}: {self.y.write(y)} at {self.x.write(x)}")
        for x in series.zeros:
            self.marker(x, self.y.low, series.index, f"{series.name}: exactly 0 at {self.x.write(x)}", hollow=True)
        for x in series.broken:
            cross = f"M{self.px(x) - 4},{TOP - 4}l8,8m0,-8l-8,8"
            self._parts.append(f'<path class="line {look}" d="{cross}">{_hint(f"{series.name}: not finite at {self.x.write(x)}")}</path>')

    def marker(self, x: float, y: float, index: int, hint: str, size: float = 2.6, hollow: bool = False) -> None:
        """A point; what ``hint`` says is shown where the pointer rests."""
        shape = marker_path(index, size).format(x=self.px(x), y=self.py(y))
        kind = "hollow" if hollow else "dot"
        self._parts.append(f'<path class="{kind} c{index % COLOURS}" d="{shape}">{_hint(hint)}</path>')

    def limit(self, value: float, text: str) -> None:
        """A dashed line across, with its name."""
        y = self.py(value)
        self._parts.append(f'<line class="limit" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{y}" y2="{y}"/>')
        self._text(self.width - RIGHT - 2, y - 4, text, "end", "limit-name")

    def divider(self, x: float, text: str) -> None:
        """A line from top to bottom with a name to its right."""
        self._parts.append(f'<line class="grid" x1="{self.px(x)}" x2="{self.px(x)}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        self._text(self.px(x) + 4, TOP + 6, text, "start")

    def box(self, x: float, quantiles: Sequence[float], index: int, hint: str, width: float) -> None:
        """Five quantiles: a thin line from first to last, a thick one between the middle ones, a dot at the median."""
        px, (low, first, median, third, high) = self.px(x), map(self.py, quantiles)
        look = f"c{index % COLOURS}"
        self._parts.append(
            f'<g class="{look}">{_hint(hint)}<line class="whisker" x1="{px}" x2="{px}" y1="{low}" y2="{high}"/>'
            f'<rect class="box" x="{round(px - width / 2, 2)}" y="{third}" width="{width}" height="{round(max(1.5, first - third), 2)}"/>'
            f'<line class="median" x1="{round(px - width / 2, 2)}" x2="{round(px + width / 2, 2)}" y1="{median}" y2="{median}"/></g>'
        )

    def done(self) -> str:
        return "".join([*self._parts, "</svg>"])


def _hint(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def marker_path(index: int, r: float) -> str:
    """The shape of a series' points around {x},{y}: a circle, a square, a triangle or a diamond, so that colour is not all that tells."""
    r = round(r, 2)
    return (
        f"M{{x}},{{y}}m-{r},0a{r},{r} 0 1,0 {2 * r},0a{r},{r} 0 1,0 -{2 * r},0z",
        f"M{{x}},{{y}}m-{r},-{r}h{2 * r}v{2 * r}h-{2 * r}z",
        f"M{{x}},{{y}}m0,-{1.2 * r:.2f}l{1.2 * r:.2f},{2.2 * r:.2f}h-{2.4 * r:.2f}z",
        f"M{{x}},{{y}}m0,-{1.4 * r:.2f}l{1.4 * r:.2f},{1.4 * r:.2f}l-{1.4 * r:.2f},{1.4 * r:.2f}l-{1.4 * r:.2f},-{1.4 * r:.2f}z",
    )[(index + index // COLOURS) % 4]


def swatch(index: int) -> str:
    """The sample of a series in a legend."""
    dash = DASHES[index // COLOURS % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    shape = marker_path(index, 3.4).format(x=13, y=7)
    look = f"c{index % COLOURS}"
    return (
        f'<svg class="swatch" viewBox="0 0 26 14" aria-hidden="true"><line class="line {look}" x1="0" x2="26" y1="7" y2="7"{dashed}/>'
        f'<path class="dot {look}" d="{shape}"/></svg>'
    )
