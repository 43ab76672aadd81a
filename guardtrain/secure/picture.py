"""The robustness of a model's units as a picture: layers by kinds of module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from guardtrain.secure.units import FUSED, KINDS

if TYPE_CHECKING:
    from guardtrain.secure.result import RobustModules


def write_heat_map(result: RobustModules, path: Path) -> None:
    """The heat map as a PNG, whole or not at all. Raises OSError."""
    partial = path.with_name(f".{path.name}.tmp")
    heat_map(result).savefig(partial, dpi=150, format="png")
    partial.replace(path)


def heat_map(result: RobustModules) -> Figure:
    """What each unit costs the probe when it is disturbed alone; those that are robust together have a dot."""
    kinds = [kind for kind in (*KINDS, *FUSED) if any(unit.kind == kind for unit in result.units)]
    layers = sorted({unit.layer for unit in result.units})
    drops_KL = np.full((len(kinds), len(layers)), np.nan)
    for unit, drop in result.units.items():
        drops_KL[kinds.index(unit.kind), layers.index(unit.layer)] = drop
    figure = Figure(figsize=(np.clip(2.2 + 0.3 * len(layers), 6.5, 16), 1.5 + 0.32 * len(kinds)), layout="constrained")
    axes = figure.subplots()
    most = max(float(np.nanmax(np.abs(drops_KL))), 1e-3)
    # Cells and no image, so that an SVG of it holds lines alone.
    image = axes.pcolormesh(drops_KL, cmap="RdBu_r", vmin=-most, vmax=most)
    across = [layers.index(unit.layer) + 0.5 for unit in result.robust]
    down = [kinds.index(unit.kind) + 0.5 for unit in result.robust]
    axes.scatter(across, down, s=9 if len(layers) < 60 else 4, color="#222222")
    step = -(-len(layers) // 30)
    axes.set(xlabel="layer", xticks=np.arange(0, len(layers), step) + 0.5, yticks=np.arange(len(kinds)) + 0.5)
    axes.invert_yaxis()
    axes.set_xticklabels([str(layer) for layer in layers[::step]])
    axes.set_yticklabels(kinds)
    axes.set_title(_title(result), fontsize=9, loc="left")
    bar = figure.colorbar(image, ax=axes, label="kept AUROC lost", pad=0.01)
    assert bar.solids is not None
    bar.solids.set_rasterized(False)  # as an SVG it is then lines too, which a page that loads no image can hold
    return figure


def _title(result: RobustModules) -> str:
    model = Path(result.model).name  # a folder's place says nothing to a reader
    how = f"each unit disturbed alone ({result.settings['perturbation']}, strength {result.strength:.2g})"
    return f"{model}: {how}\ndots: the {len(result.robust)} of {len(result.units)} that are robust together"
