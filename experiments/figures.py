"""Figures, as SVG for light and for dark pages:

    python experiments/figures.py [names]     # without names all of them; needs matplotlib (pip install matplotlib)

writes experiments/figures/NAME.svg for the names of FIGURES, at the end of this file. The same data give the same file.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from moclip import MoClip  # noqa: E402  (the repository root must be on the path first)

FOLDER = ROOT / "experiments/figures"
WIDTH = 525 / 72  # inches: 525 pt are the 700 px at which a page shows it, so that sizes in pt are what the reader sees
# Backgrounds are transparent. Contrast with white and with GitHub's dark page (#0d1117): grey 4.35 with either, the
# colours at least 3.3 (WCAG 2.2 asks for 3, of lines and large letters).
GREY, BLUE, ORANGE, GREEN, RED = "#797979", "#2f81f7", "#d9700a", "#2b9348", "#e5484d"
STYLE = {
    "svg.hashsalt": "moclip", "path.simplify_threshold": 0.3, "savefig.transparent": True, "legend.frameon": False,
    "figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False,
    "grid.color": GREY, "grid.alpha": 0.3, "text.color": GREY,
    "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "font.size": 10, "axes.titlesize": 10, "legend.fontsize": 9, "xtick.labelsize": 9, "ytick.labelsize": 9}


def path(max_angle, steps=2500, lr=0.01, betas=(0.9, 0.99)):
    """(steps + 1, 2) iterates of MoClip on f = |w|^2 / 2 from (1, 0.4), in units of lr. As in THEORY.md, M7."""
    w = torch.nn.Parameter(torch.tensor([1.0, 0.4], dtype=torch.float64))
    optimizer, points = MoClip([w], lr=lr, betas=betas, max_angle=max_angle), [w.detach().clone()]
    for _ in range(steps):
        w.grad = w.detach().clone()  # the gradient of f
        optimizer.step()
        points.append(w.detach().clone())
    return torch.stack(points) / lr


def orbits(plt):
    """THEORY.md, M7: below 90 degrees the iterates end on a wide circle around the minimum, at 90 within lr of it."""
    figure, panels = plt.subplots(2, 4, figsize=(WIDTH, 4.15))
    for degrees, (whole, end) in zip((15, 45, 80, 90), panels.T):
        points = path(math.radians(degrees))
        last = points[-500:]
        radius = last.norm(dim=1).mean().item()
        whole.plot(*points.T, color=BLUE, lw=0.8)
        whole.plot(*points[0], "o", color=ORANGE, ms=5)
        whole.set(title=f"cap {degrees}°", xlim=(-120, 120), ylim=(-120, 120))
        whole.set(xticks=(-100, 0, 100), yticks=(-100, 0, 100))
        end.plot(*last.T, color=BLUE, lw=0.8)
        turn = torch.linspace(0, 2 * math.pi, 181)
        end.plot(turn.cos(), turn.sin(), color=ORANGE, lw=1.5)
        limit = 1.35 * max(1.0, last.norm(dim=1).max().item())  # a scale of its own
        tick = {15: 40, 45: 10, 80: 2, 90: 1}[degrees]
        end.set(title=f"radius {radius:.2g} lr", xlim=(-limit, limit), ylim=(-limit, limit))
        end.set(xticks=(-tick, 0, tick), yticks=(-tick, 0, tick))
        for axes in (whole, end):
            axes.set_aspect("equal")
            axes.plot(0, 0, "+", color=GREY, ms=6)
    panels[0, 0].set_ylabel("2500 steps")
    panels[1, 0].set_ylabel("the last 500")
    figure.supxlabel("both coordinates in units of lr; dot: start; cross: minimum; orange circle: radius lr", size=10)
    return figure


def study():
    """(report, rows) of the study."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import report
    return report, report.load()


def stage0_row(plt):
    """One real row: its tokens by name, before training and after it with the paper's loss and with the tail."""
    found = json.loads((ROOT / "experiments/results/row.json").read_text())
    panels = {"base": "recorded by Stage 0", "replay+adamw": "after the paper's loss",
              "tail+adamw": "after the loss with a tail"}
    tokens = [token for token in found["tokens"] if token["recorded"] or max(token[name] for name in panels) > 0.015]
    others = {name: max(0.0, 1 - sum(token[name] for token in tokens)) for name in panels}
    tokens.append({"text": "all others", "recorded": False, "gold": False, **others})
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 0.24 * len(tokens) + 1.3), sharey=True)
    for ax, (name, title) in zip(axes, panels.items()):
        p = [token[name] for token in tokens]
        bars = ax.barh(range(len(tokens)), p, color=[BLUE if token["recorded"] else RED for token in tokens])
        ax.bar_label(bars, [f"{x:.3f}" if x >= 5e-4 else "0" for x in p], padding=2, color=GREY, size=9)
        ax.set(title=f"{title}\n$\\rho$ = {found['outside_mass'][name]:.2f}", xlim=(0, 1.28), xticks=(0, 0.5, 1))
        ax.set_yticks(range(len(tokens)), [token["text"].strip() + " *" * token["gold"] for token in tokens])
    axes[0].invert_yaxis()
    figure.supxlabel(f"probability; blue: in S, the top K that reach tau = {found['tau']}, and gold *; red: outside",
                     size=10)
    return figure


def frontier(plt):
    """Accuracy against forgetting; a point a rate, mean over bases and seeds. "mixed" and KL need general text."""
    report, rows = study()
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(WIDTH, 4.4), sharex=True, height_ratios=(3, 1))
    looks = {"full": (GREY, "o"), "replay": (RED, "s"), "tail": (BLUE, "D")}
    for method in report.sweep.script.METHODS:
        color, marker = looks[method.split("+")[0]]
        axes, line = lower if method.startswith("replay") else upper, "-" if method.endswith("adamw") else "--"
        groups = {lr: report.at(report.select(rows, method=method), lr) for lr in report.sweep.RATES}
        x = [report.mean(group, "forgetting") for group in groups.values()]
        y = [100 * report.mean(group, "accuracy") for group in groups.values()]
        axes.plot(x, y, line, marker=marker, color=color, mfc=color if line == "-" else "none", ms=5, label=method)
        if method in ("full+adamw", "tail+adamw"):
            for lr, a, b in zip(groups, x, y):
                above = method == "tail+adamw"
                axes.annotate(f"{1e4 * lr:g}", (a, b), (-4, 6) if above else (4, -12), textcoords="offset points",
                              size=9, color=color, ha="right" if above else "left")
    for variant, marker in (("mixed", "^"), ("KL to base", "v"), ("eps 0.0001", "*")):
        for method, color in (("full+adamw", GREY), ("tail+adamw", BLUE)):
            rows_of = report.select(rows, method=method, variant=variant)
            groups = [report.at(rows_of, lr) for lr in (report.sweep.RATES[:6] if "eps" in variant else (6e-4, 8e-4))]
            upper.plot([report.mean(group, "forgetting") for group in groups],
                       [100 * report.mean(group, "accuracy") for group in groups], ":", marker=marker, ms=6,
                       color=color, label=f"{method}, {variant}")
    upper.annotate("better", (0.14, 0.55), (0.24, 0.35), xycoords="axes fraction", color=GREEN, size=11, va="top",
                   arrowprops=dict(arrowstyle="-|>", color=GREEN, lw=1.5))
    upper.set(ylabel="test accuracy, %")
    lower.set(xscale="log", ylabel="the same", ylim=(-4, 50), xticks=(0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2),
              xticklabels=("0.005", "0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"),
              xlabel="forgetting: rise of the general NLL, nats a token (log scale); labels: learning rate / 1e-4")
    lower.minorticks_off()
    for axes in (upper, lower):
        axes.grid(True)
        axes.legend(loc="lower right" if axes is upper else "upper right")
    return figure


def mass(plt):
    """R7: the outside mass over the steps, at the default setting, mean over bases and seeds."""
    report, rows = study()
    figure, axes = plt.subplots(figsize=(WIDTH, 3.2))
    for method, color in (("full+adamw", GREY), ("replay+adamw", RED), ("tail+adamw", BLUE)):
        group = report.at(report.select(rows, method=method), report.sweep.DEFAULT["lr"])
        logs = torch.tensor([row["outside_mass_log"] for row in group])
        axes.plot(logs[0, :, 0], logs[:, :, 1].mean(0), marker=".", color=color, label=method)
    axes.set(yscale="log", xlabel="step", ylabel="outside mass")
    axes.grid(True)
    axes.legend()
    return figure


FIGURES = {"row": stage0_row, "frontier": frontier, "orbits": orbits, "mass": mass}
"""name -> function(pyplot) -> figure."""


def main():
    parser = argparse.ArgumentParser(description="Draw the figures as SVG.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(FIGURES)}; default: all")
    names = parser.parse_args().names or list(FIGURES)
    if unknown := [name for name in names if name not in FIGURES]:
        parser.error(f"no figure {unknown[0]!r}; there are {', '.join(FIGURES)}")
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the figures need matplotlib: pip install matplotlib") from error
    matplotlib.use("svg")
    from matplotlib import pyplot as plt
    plt.rcParams.update(STYLE)
    FOLDER.mkdir(exist_ok=True)
    for name in names:
        # no date and no version in the file: it changes only where the figure does
        FIGURES[name](plt).savefig(FOLDER / f"{name}.svg", metadata={"Date": None, "Creator": None})
        print(f"experiments/figures/{name}.svg")


if __name__ == "__main__":
    main()
