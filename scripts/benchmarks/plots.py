"""Plots for the documentation: each as two SVG files, for light and for dark pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scripts.benchmarks.common import IMAGES, machine_line

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Name to xs and ys; series without points are left out."""

# Okabe and Ito's colours, which anybody can tell apart; blue and green lighter on dark pages.
_THEMES: dict[str, Any] = {
    "light": {
        "text": "#1f2328",
        "grid": "#d1d9e0",
        "series": ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"),
    },
    "dark": {
        "text": "#f0f6fc",
        "grid": "#3d444d",
        "series": ("#56b4e9", "#e69f00", "#2fc79b", "#cc79a7", "#f0e442", "#d55e00"),
    },
}
_MARKERS = "osD^vP"


def lines(
    name: str,
    said: Mapping[str, Any],
    *,
    title: str,
    x: str,
    y: str,
    series: Series,
    log_x: bool = False,
    log_y: bool = False,
) -> None:
    """A line for each of `series`."""

    def plot(axes: Any, colours: Sequence[str]) -> None:
        shown = [(label, points) for label, points in series.items() if points[0]]
        for index, (label, (xs, ys)) in enumerate(shown):
            axes.plot(xs, ys, marker=_MARKERS[index], color=colours[index], label=label, lw=2)
        if log_x:
            axes.set_xscale("log", base=2 if max(max(p[0]) for _, p in shown) < 1e5 else 10)
            ticks = sorted({value for _, (xs, _) in shown for value in xs})
            axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
            axes.minorticks_off()
        else:
            axes.xaxis.get_major_locator().set_params(integer=True)
        if log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        else:
            axes.set_ylim(bottom=0)
        axes.legend(frameon=False, labelcolor="linecolor")

    _draw(name, said, title, x, y, plot)


def bars(
    name: str,
    said: Mapping[str, Any],
    *,
    title: str,
    y: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    log_y: bool = False,
) -> None:
    """A group of bars for each of `groups`, one bar for each of `series`."""

    def plot(axes: Any, colours: Sequence[str]) -> None:
        width = 0.8 / len(series)
        size = 8 if len(series) < 5 else 6.5
        for index, (label, values) in enumerate(series.items()):
            places = [group + (index + 0.5) * width - 0.4 for group in range(len(groups))]
            drawn = axes.bar(places, values, width * 0.92, label=label, color=colours[index])
            axes.bar_label(drawn, [f"{v:,.0f}" for v in values], fontsize=size, padding=2)
        axes.set_xticks(range(len(groups)), groups)
        if log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.margins(y=0.15)
        axes.legend(frameon=False)

    _draw(name, said, title, "", y, plot)


def _draw(
    name: str,
    said: Mapping[str, Any],
    title: str,
    x: str,
    y: str,
    plot: Callable[[Any, Sequence[str]], None],
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    IMAGES.mkdir(parents=True, exist_ok=True)
    for theme, colours in _THEMES.items():
        settings = {
            "axes.facecolor": "none",
            "axes.edgecolor": colours["grid"],
            "axes.labelcolor": colours["text"],
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlecolor": colours["text"],
            "font.size": 10.0,
            "grid.color": colours["grid"],
            "grid.linewidth": 0.6,
            "svg.fonttype": "path",
            "svg.hashsalt": name,
            "text.color": colours["text"],
            "xtick.color": colours["text"],
            "ytick.color": colours["text"],
        }
        with pyplot.rc_context(settings):
            figure, axes = pyplot.subplots(figsize=(7.2, 4.2))
            axes.set_title(title, loc="left", fontsize=11)
            axes.set_xlabel(x)
            axes.set_ylabel(y)
            axes.grid(axis="y")
            axes.set_axisbelow(True)
            plot(axes, colours["series"])
            caption = machine_line(said["machine"]) + (" (quick run)" if said["quick"] else "")
            figure.text(0.01, 0.01, caption, fontsize=7, alpha=0.8)
            figure.tight_layout(rect=(0, 0.03, 1, 1))
            figure.savefig(
                IMAGES / f"{name}-{theme}.svg", transparent=True, metadata={"Date": None}
            )
            pyplot.close(figure)
