"""The one style of all figures: colours, sizes, titles, notes, and how a figure is saved."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from utils.core.paths import atomic_write
from utils.experiments.records import display_name

#: Okabe and Ito's colours, which people with colour-blindness can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


#: Of a written figure.
COLOURS_OF_A_FILE = 256


_STYLE: Any = {
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.constrained_layout.use": True,
}
# tables of notebooks show their cells whole: pandas would cut off what a check has measured
pd.set_option("display.max_colwidth", None)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a PNG of at most ``COLOURS_OF_A_FILE`` colours atomically and return its path.

    A repository is cloned with all its figures; a palette takes a third of the space and shows the same.
    """
    target, dpi = Path(path), _STYLE["savefig.dpi"]
    # not the median cut, which gives thin lines the colours of the areas around them
    few = _drawn(figure, dpi).quantize(COLOURS_OF_A_FILE, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    atomic_write(target, lambda file: few.save(file, "PNG", optimize=True, dpi=(dpi, dpi)))
    return target


def _drawn(figure: Figure, dpi: int) -> Image.Image:
    """A figure as pixels, the same as ``savefig`` gives, which draws twice and packs them in between."""
    canvas, own = figure.canvas, figure.dpi
    with plt.rc_context(_STYLE):
        drawn = FigureCanvasAgg(figure)
        figure.set_dpi(dpi)
        drawn.draw()
    picture = Image.fromarray(np.asarray(drawn.buffer_rgba())).convert("RGB")
    figure.set_dpi(own)
    figure.set_canvas(canvas)
    return picture


def axes_of(rows: int = 1, columns: int = 1, *, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """A figure in the common style and its axes as a 2-D array; ``size`` in inches."""
    with plt.rc_context(_STYLE):
        return plt.subplots(rows, columns, figsize=size, squeeze=False, **options)


def finish(figure: Figure, title: str, *notes: str) -> Figure:
    """Give a figure its title and what must be said of its numbers, each from a line of its own, and close it.

    A hardened model is called so, also where the title names its folder.
    """
    # about eleven characters of this size fit into an inch
    texts = (display_name(title), *notes)
    lines = [part for text in texts if text for part in textwrap.wrap(text, int(11 * figure.get_figwidth()))]
    figure.suptitle("\n".join(lines), fontsize=11)
    for legend in [*figure.legends, *filter(None, (ax.get_legend() for ax in figure.axes))]:
        legend.set_frame_on(False)
    # notebooks show what a cell returns; closing keeps them from showing it twice
    plt.close(figure)
    return figure


def percent_axis(ax: Axes, *, room: float = 6) -> None:
    """A vertical axis of percent whose ticks end at 100; ``room`` above is for labels."""
    ax.set_ylim(0, 100 + room)
    ax.set_yticks(range(0, 101, 20))
    ax.spines["left"].set_bounds(0, 100)


def line_style(index: int) -> dict[str, Any]:
    """Colour, dashes and marker of the line with this number: told apart in grey, too."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": ("-", "--", ":", "-.")[index % 4],
        "marker": "os^D"[index % 4],
        "markersize": 4,
    }


def mark_radius(ax: Axes, eps: float, scale: float = 255) -> None:
    """A thin labelled line at a radius, under the curves; ``scale`` is the axis' unit a pixel unit."""
    ax.axvline(scale * eps, color="grey", linewidth=0.8, alpha=0.6)
    inside = f" = {scale * eps:.3g}/{scale:g}" if scale != 1 else ""
    ax.annotate(f" {eps:g}{inside}", (scale * eps, 101), fontsize=8, color="grey")


def legend_of_curves(ax: Axes) -> None:
    """A legend to the right of the axes, where it hides neither a curve nor a mark."""
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
