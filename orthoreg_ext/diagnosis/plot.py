"""The figures of a diagnosis."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .result import Diagnosis

_MEAN, _MORE = "#2a7de1", "#e0712b"  # readable on white and on black


def draw(diagnosis: Diagnosis, where: str | PathLike[str] | Sequence[Any] | None) -> Any:
    """See :meth:`Diagnosis.plot`."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError(
            "matplotlib is not installed, which plots need; install it with: "
            "pip install orthoreg_ext[cli]"
        ) from error
    arrays = diagnosis.arrays()
    panels = [_degree, _cosines, _condition]
    panels += [_gap] if "gap" in arrays else []
    panels += [_spectrum] if "singular_values" in arrays else []
    if where is None or isinstance(where, (str, PathLike)):
        size = (3.4 * len(panels), max(2.0, 0.22 * len(diagnosis) + 1.2))
        figure = Figure(figsize=size, layout="constrained")
        axes: list[Any] = list(figure.subplots(1, len(panels), squeeze=False)[0])
    else:
        axes = list(where)
        if len(axes) != len(panels):
            names = ", ".join(panel.__name__[1:] for panel in panels)
            raise ValueError(
                f"where has {len(axes)} axes, expected {len(panels)}, one for each panel: {names}"
            )
        figure = axes[0].figure
    for axis, panel in zip(axes, panels, strict=True):
        panel(axis, arrays)
    if isinstance(where, (str, PathLike)):
        figure.savefig(where)
    return figure


def _layers(axis: Any, arrays: dict[str, Any], title: str) -> Any:
    places = np.arange(len(arrays["name"]))
    axis.set_yticks(places, [name or "(model)" for name in arrays["name"]], fontsize=7)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9)
    return places


def _degree(axis: Any, arrays: dict[str, Any]) -> None:
    places = _layers(axis, arrays, "orthogonality degree")
    axis.barh(places, arrays["degree"], color=_MEAN)
    axis.set_xlim(0, 1)


def _cosines(axis: Any, arrays: dict[str, Any]) -> None:
    places = _layers(axis, arrays, "|cosine|: mean, largest")
    axis.barh(places, arrays["mean_cosine"], color=_MEAN)
    axis.plot(arrays["max_cosine"], places, "o", color=_MORE, markersize=4)
    axis.set_xlim(0, 1.02)


def _condition(axis: Any, arrays: dict[str, Any]) -> None:
    places = _layers(axis, arrays, "condition number; >: infinite")
    values = arrays["condition"]
    finite = np.isfinite(values)
    end = 10 * max(values[finite], default=1.0)
    axis.set_xscale("log")
    axis.barh(places[finite], values[finite], color=_MEAN)
    axis.plot(np.full((~finite).sum(), end), places[~finite], ">", color=_MORE)
    axis.set_xlim(0.9, 2 * end)


def _gap(axis: Any, arrays: dict[str, Any]) -> None:
    places = _layers(axis, arrays, "additivity gap; |: of random signs")
    axis.barh(places, arrays["gap"], color=_MEAN)
    axis.plot(arrays["gap_floor"], places, "|", color=_MORE, markersize=8, markeredgewidth=2)
    axis.set_xlim(0, 1)


def _spectrum(axis: Any, arrays: dict[str, Any]) -> None:
    values = np.sort(arrays["singular_values"].ravel())
    values = np.maximum(values, max(values[-1], 1) * 1e-9)  # zeros have no place on a log axis
    axis.set_xscale("log")
    axis.plot(values, np.linspace(0, 1, len(values)), color=_MEAN)
    axis.axvline(1, color=_MORE, linewidth=1)
    axis.set_title("share of Jacobian singular values below", fontsize=9)
    axis.set_ylim(0, 1)
