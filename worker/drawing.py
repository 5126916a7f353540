"""What our pictures have in common: colours and style, a curve with its interval, an axis whose marks double.

Does not own what is drawn (report_figure.py, and the demo's charts).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bon_algos.contracts import Interval

INK, FAINT = "#1f2933", "#8895a7"
BLUE, GREEN, AMBER = "#2b6cb0", "#2f855a", "#c77d0a"
STYLE: Final[dict[Any, Any]] = {
    "font.size": 9.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
}


def band(axes: Axes, x: Sequence[float], intervals: Sequence[Interval], colour: str, label: str) -> None:
    """The means as a line, the intervals as a band around it."""
    axes.fill_between(x, [i.low for i in intervals], [i.high for i in intervals], color=colour, alpha=0.17, linewidth=0)
    axes.plot(x, [i.mean for i in intervals], color=colour, label=label, linewidth=1.8)


def doubling(axes: Axes, low: float, high: float) -> None:
    """A logarithmic axis whose marks double, from `low` on."""
    ticks = [low * 2**i for i in range(int(high / low + 1e-9).bit_length())]
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
