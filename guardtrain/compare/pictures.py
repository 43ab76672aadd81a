"""The two pictures of a comparison: how each control differs from the ordinary tune, and how robust each module is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from guardtrain.compare.controls import ORDINARY
from guardtrain.compare.findings import Difference, Models, decisive_measure, differences_of, measures_of
from guardtrain.compare.measure import MEASURES, SCORE
from guardtrain.compare.statistics import Answer
from guardtrain.evaluate.reporting.document import Picture
from guardtrain.evaluate.reporting.figures import HEX, WIDTH, drawn, picture
from guardtrain.secure.picture import heat_map
from guardtrain.secure.result import RobustModules

# For a file of its own, which has no page to take colours from.
ON_PAPER = {"muted": "#57606a", "grid": "#e4e8ec", "good": "#0072b2", "bad": "#c14a00"}
MARKERS: dict[Answer, tuple[str, str]] = {"better": ("^", "good"), "worse": ("v", "bad"), "unknown": ("o", "muted")}
CAPTION = (
    "Each way of tuning less the ordinary tune, with 95 % intervals over seeds and items. A triangle that points up is better, "
    "one that points down is worse, a circle cannot be told."
)


@drawn
def differences_picture(models: Models) -> Picture:
    """One panel for each of the measures that tell most; a mark for each control, its difference to the ordinary tune."""
    described = "Differences to the ordinary tune by control and measure; the table has the figures"
    return picture(_differences_figure(models, HEX), "differences", CAPTION, described)


def differences_png(models: Models, path: Path) -> None:
    """The same as a file."""
    _differences_figure(models, ON_PAPER).savefig(path, dpi=150)


def _differences_figure(models: Models, colours: Mapping[str, str]) -> Figure:
    wanted = dict.fromkeys((decisive_measure(models), "probe", SCORE))
    shown = [name for name in wanted if name in measures_of(models)]
    controls = [name for name in models if name != ORDINARY]
    figure = Figure(figsize=(WIDTH * 1.5, 1.0 + 0.26 * len(controls)), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, shown, strict=True):
        axes.axvline(0, color=colours["muted"], linewidth=0.8)
        for place, control in enumerate(controls):
            found = next(each for each in differences_of(models, control, ORDINARY) if each.measure == measure)
            _draw_difference(axes, place, found, colours)
        is_share = MEASURES[measure].unit == "share"
        axes.xaxis.set_major_formatter(_points_tick if is_share else _number_tick)
        axes.set(title=MEASURES[measure].said, xlabel="percentage points" if is_share else "")
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x", color=colours["grid"], linewidth=0.5)
        axes.set_axisbelow(True)
    panels[0].set_yticks(range(len(controls)), controls)
    panels[0].invert_yaxis()
    return figure


def _draw_difference(axes: Any, place: int, each: Difference, colours: Mapping[str, str]) -> None:
    marker, name = MARKERS[each.answer]
    if each.found.interval is not None:
        axes.plot(each.found.interval, [place, place], color=colours[name], linewidth=1.4)
    axes.plot(each.found.mean, place, color=colours[name], marker=marker, markersize=6, linestyle="none")


def _points_tick(value: float, _: float) -> str:
    return f"{100 * value:+.3g}"


def _number_tick(value: float, _: float) -> str:
    return f"{value:+.3g}"


@drawn
def robustness_picture(modules: RobustModules) -> Picture:
    """The heat map of the search: layers by modules."""
    caption = (
        f"What the probe loses when each of {len(modules.units)} modules is disturbed alone. Dots mark the {len(modules.robust)} "
        "that are robust together."
    )
    described = "Heat map of the probe's loss by layer and module; modules.json has the figures"
    return picture(heat_map(modules), "robustness", caption, described)
