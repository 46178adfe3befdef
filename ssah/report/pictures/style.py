"""What all pictures share: style, title, and being saved whole. PNG; needs no display."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssah.storage import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#333333"
DASHED: Any = (0, (4, 3))  # points drawn and left out, in turn
_DPI = 150  # sharp on a screen and on paper, at 100 to 300 kB a picture
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": INK,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


@contextmanager
def picture(
    path: str | os.PathLike[str], title: str, size: tuple[float, float], **style: Any
) -> Iterator[Figure]:
    """Draw a picture: yields an empty figure, which is saved as PNG when the block ends well.

    Args:
        path: of the file; its folder is made if need be.
        title: over the whole picture.
        size: width and height, inches at 150 dots each.
        style: settings of matplotlib beside those of all pictures, with ``_`` for ``.``:
            ``axes_grid_axis="x"``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "matplotlib is not installed, which draws the pictures: pip install 'ssah[report]'"
        )
    import matplotlib as mpl
    from matplotlib.figure import Figure

    own: dict[Any, Any] = {name.replace("_", "."): value for name, value in style.items()}
    settings: Any = {**_STYLE, **own}  # newer releases list every name that there is
    with mpl.rc_context(settings):  # the caller's own pictures keep their style
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
        # Whole or not at all: a run that is cut off leaves no half of a picture behind.
        target, content = Path(path), io.BytesIO()
        figure.savefig(content, format="png", dpi=_DPI, facecolor="white")
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, content.getvalue())


def write(
    axes: Axes,
    text: str,
    place: tuple[float, float],
    shift: tuple[float, float] = (4, 0),
    **options: Any,
) -> None:
    """Write ``text`` beside a point of the data, ``shift`` points (1/72 inch) away from it."""
    style = {"va": "center", "fontsize": 9, "color": INK, **options}
    axes.annotate(text, place, xytext=shift, textcoords="offset points", **style)


def footnote(figure: Figure, text: str) -> None:
    """Say below the picture what its lines and bands are."""
    figure.supxlabel(text, fontsize=8.5, color="#666666")


def whole_numbers(axes: Axes) -> None:
    """Mark the axis of layers, or of tokens, at whole numbers alone."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
