"""Draws docs/demo.png, the README's figure, from the history.json of a `make demo`.

python scripts/demo_figure.py [build/demo/history.json] [docs/demo.png]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ARMS = {"with OrthoReg, cut by Fisher": True, "twin without, cut by L1": False}


def main(history: Path, target: Path) -> None:
    """Accuracy by epoch, and the filters' correlation by layer, medians over the seeds."""
    run: dict[str, Any] = json.loads(history.read_text())["run"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for place, (label, regularised) in enumerate(ARMS.items()):
        arms = [arm for arm in run["arms"] if arm["regularised"] is regularised]
        courses = [[epoch["accuracy"] for epoch in arm["epochs"]] for arm in arms]
        accuracy = [median(values) for values in zip(*courses, strict=True)]
        left.plot(range(1, len(accuracy) + 1), accuracy, marker="o", ms=3, label=label)
        layers = list(arms[0]["layer_correlations"])
        bars = [median(arm["layer_correlations"][layer] for arm in arms) for layer in layers]
        right.bar([i + 0.4 * place for i in range(len(layers))], bars, 0.4, label=label)
    left.axvline(run["settings"]["epochs"] + 0.5, color="grey", lw=1, ls=":")
    removed = 100 * run["settings"]["ratio"]
    left.set(xlabel=f"epoch; dotted: {removed:.0f} % of the filters removed", ylabel="accuracy, %")
    right.set(ylabel="mean |filter correlation|")
    right.set_xticks([i + 0.2 for i in range(len(layers))], layers)
    left.legend(loc="center right")
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    arguments = [Path(a) for a in sys.argv[1:]]
    main(*(arguments + [Path("build/demo/history.json"), Path("docs/demo.png")][len(arguments) :]))
