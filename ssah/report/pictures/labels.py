"""Names beside points that cover neither each other nor a point.

For example, two points at the same place have their names on its right and on its left. A name that
finds no room nearby goes further away, and a line leads to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ssah.report.pictures.style import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

_FIRST, _STEP, _RINGS = 7.0, 9.0, 12  # points (1/72 inch): the nearest ring, and how many follow
_LED = 14.0  # from here on a line leads to the name
# Beside a point a name is read most easily; then above and below.
_WAYS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))


def label_points(
    figure: Figure,
    axes: Axes,
    points: Sequence[tuple[float, float, str]],
    others: Sequence[tuple[float, float]] = (),
) -> None:
    """Write the name of each point beside it.

    The size of the axes must be final: what is drawn later may move points, and not the names.

    Args:
        figure: of the axes.
        axes: where the points are drawn.
        points: x, y and name; the first ones get the best places.
        others: points without a name, which are not covered either.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    scale, inside = figure.dpi / 72, axes.get_window_extent()  # pixels a point; pixels
    marked = [axes.transData.transform(place[:2]) for place in (*points, *others)]
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in marked]
    for (x, y, name), (across, up) in zip(points, marked, strict=False):
        label = axes.annotate(name, (x, y), fontsize=8.5, color=INK, ha="left", va="bottom")
        label.set_in_layout(False)  # else the axes make room, and all points move
        width, height = label.get_window_extent().size
        for distance, way in _places():
            # From the point to the lower left corner of its name.
            shift = (
                scale * distance * way[0] + (way[0] - 1) / 2 * width,
                scale * distance * way[1] + (way[1] - 1) / 2 * height,
            )
            box = Bbox.from_bounds(across + shift[0], up + shift[1], width, height)
            if _within(box, inside) and not box.count_overlaps(taken):
                break
        taken.append(box)
        label.set_anncoords("offset points")
        label.xyann = shift[0] / scale, shift[1] / scale
        if distance > _LED:
            ends = zip(shift, (width, height), strict=True)  # of the name, across and up
            right, above = (min(max(0.0, low), low + size) / scale for low, size in ends)
            line = {"arrowstyle": "-", "linewidth": 0.5, "color": "#999999"}
            leader = axes.annotate(
                "", (x, y), (right, above), textcoords="offset points", arrowprops=line
            )
            leader.set_in_layout(False)


def _places() -> Iterator[tuple[float, tuple[int, int]]]:
    """How far from a point, the nearest first, and in which way: to the right, and up."""
    for ring in range(_RINGS):
        for way in _WAYS:
            yield _FIRST + _STEP * ring, way


def _within(box: Bbox, other: Bbox) -> bool:
    return bool(
        box.x0 >= other.x0 and box.x1 <= other.x1 and box.y0 >= other.y0 and box.y1 <= other.y1
    )
