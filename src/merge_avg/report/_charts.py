"""Charts of the agreement, as SVG to put into a page.

This imports matplotlib, which takes longer than many a merge; so `html` does it late.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import matplotlib as mpl
from matplotlib import colormaps
from matplotlib.figure import Figure

from merge_avg.agreement import TensorAgreement
from merge_avg.report import printable

_P = ParamSpec("_P")
# Checkpoints up to which the cells of the heat map have room for their numbers.
_NUMBERS = 12
# Checkpoints up to which each line has a colour that can still be told from the others.
_LINES = 8
_TICKS = 24  # names on an axis, at most
_WIDEST = 24  # letters of such a name, from its end
# Up to the first part of a name that is a number, as "model.layers.3" is.
_LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")
# These stand for colours of the page's style sheet, which has them for light and for dark. Those of
# lines are Okabe and Ito's, which most people can tell apart, made light or dark enough to be seen.
_INK, _AXIS, _GRID, _REST, *_COLOURS = (f"#0000{number:02x}" for number in range(240, 252))
_VARIABLES = dict(zip((_INK, _AXIS, _GRID, _REST), ("soft", "axis", "grid", "rest"), strict=True))
_VARIABLES |= {colour: f"line-{number}" for number, colour in enumerate(_COLOURS, 1)}
_MARKERS = "os^Dv<>P"
# Where black and white can be read equally well on viridis, whose upper end is yellow.
_MIDDLE = 0.435
_STYLE: dict[Any, Any] = {
    # Letters stay letters, for search and screen readers; and a dollar in a name stays a dollar.
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.edgecolor": _AXIS,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}


def svg(draw: Callable[_P, Figure], *args: _P.args, **kwargs: _P.kwargs) -> str:
    """Return a function's figure as an element of a page: the same one for the same numbers."""
    file = io.StringIO()
    # Without a salt the ids are random, and without a date in it a page can be compared.
    style = {**_STYLE, "svg.hashsalt": draw.__name__}
    with mpl.rc_context(style), warnings.catch_warnings():
        # The browser draws the letters, so it does not matter which of them this font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        draw(*args, **kwargs).savefig(
            file, format="svg", metadata={"Date": None}, transparent=True, bbox_inches="tight"
        )
    text = re.sub(
        r"(?<=: )#\w{6}",
        lambda found: f"var(--{_VARIABLES[found[0]]})" if found[0] in _VARIABLES else found[0],
        file.getvalue(),
    )
    return text[text.index("<svg") :]  # behind the XML declaration and the document type


def heat_map(pairs: Sequence[Sequence[float | None]], numbers: Sequence[int]) -> Figure:
    """Draw the cosines of checkpoints with checkpoints, on a scale from below the least to 1."""
    known = [value for row in pairs for value in row if value is not None]
    # The tenth below the least cosine; with a scale from 0 to 1 fine-tunes would all look alike.
    bottom = min(int(min(known) * 10 - (min(known) < 0)) / 10, 0.9)
    count = len(pairs)
    figure = Figure(figsize=(4.6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[:].set_visible(False)
    colours = colormaps["viridis"].with_extremes(bad="#d5dae0")
    cells = [[float("nan") if value is None else value for value in row] for row in pairs]
    image = axes.imshow(cells, vmin=bottom, vmax=1, cmap=colours, interpolation="nearest")
    step = -(-count // _TICKS)
    axes.tick_params(length=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(range(0, count, step), list(map(str, numbers[::step])))
        axis.set_label_text("checkpoint #")
    if count <= _NUMBERS:
        for i, row in enumerate(pairs):
            for j, value in enumerate(row):
                if value is None:
                    continue
                text = f"{value:.2f}" if value < 0.995 else f"{value:.3g}"
                colour = "black" if (value - bottom) / (1 - bottom) > _MIDDLE else "white"
                size = 8 if count <= 8 else 6
                axes.text(j, i, text, ha="center", va="center", fontsize=size, color=colour)
    figure.colorbar(image, ax=axes, shrink=0.9).outline.set_visible(False)
    return figure


def distances(tensors: Sequence[TensorAgreement], numbers: Sequence[int]) -> Figure:
    """Draw a line for each checkpoint over the layers; of many, only the farthest have colours."""
    names, rows = layers(tensors)
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    columns = list(zip(*rows, strict=True))
    order = sorted(range(len(columns)), key=lambda number: -max(columns[number]))
    shown = order if len(order) <= _LINES else order[:3]
    places = range(len(names))
    # Grey first, so that it lies below the colours.
    for number in reversed(order):
        if number not in shown:
            axes.plot(places, columns[number], color=_REST, linewidth=0.8)
    style: dict[str, Any] = {
        "markersize": 4,
        "markevery": -(-len(names) // (2 * _TICKS)),
        "lw": 1.5,
    }
    for colour, marker, number in zip(_COLOURS, _MARKERS, sorted(shown), strict=False):
        label = f"#{numbers[number]}"
        axes.plot(places, columns[number], color=colour, marker=marker, label=label, **style)
    axes.set_ylim(bottom=0, top=max(1.1 * max(map(max, rows)), 1e-6))
    axes.set_ylabel("distance / norm")
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)
    step = -(-len(names) // _TICKS)
    texts = map(printable, names[::step])
    labels = [text if len(text) <= _WIDEST else f"…{text[1 - _WIDEST :]}" for text in texts]
    turn: dict[str, Any] = {"rotation": 45, "ha": "right"} if sum(map(len, labels)) >= 90 else {}
    axes.set_xticks(places[::step], labels, **turn)
    axes.margins(x=0.02)
    title = "checkpoint" if len(shown) == len(order) else "farthest"
    axes.legend(title=title, loc="upper left", bbox_to_anchor=(1.005, 1), frameon=False, fontsize=8)
    return figure


def layers(tensors: Sequence[TensorAgreement]) -> tuple[list[str], list[list[float]]]:
    """Return the layers' names, and how far each checkpoint is from the mean there, over the norm.

    A layer is what names have in common up to their first number; what all begin with is left out.
    """
    sums: dict[str, list[float]] = {}
    for tensor in tensors:
        match = _LAYER.match(tensor.name)
        layer = match[0] if match else tensor.name.rpartition(".")[0] or tensor.name
        # Distances are over the norm. Their squares add up once they are multiplied by its square;
        # the norm itself comes first, as a distance of 1.
        row = sums.setdefault(layer, [0.0] * (1 + len(tensor.distances)))
        for number, distance in enumerate((1.0, *tensor.distances)):
            row[number] += distance**2 * tensor.norm**2
    parts = [layer.split(".")[:-1] for layer in sums]
    # Of lists it compares whole parts, so layers.1 and layers.10 have only "layers" in common.
    start = os.path.commonprefix(parts)  # noqa: RUF071
    names = [".".join(layer.split(".")[len(start) :]) for layer in sums]
    return names, [[(one / (row[0] or 1)) ** 0.5 for one in row[1:]] for row in sums.values()]
