"""What do the results look like? The figures of README.md, THEORY.md and this folder's README.md, as SVG.

    python -m experiments.figures [--only NAME ...]     # needs matplotlib: pip install matplotlib

writes experiments/figures/NAME.svg for light and for dark pages; lines and markers tell the arms apart without colour.
"position" takes base 0 of the study from runs/, or pretrains it.
"""

import argparse
import math

import torch

from experiments import report, sweep
from experiments.sweep import script, select
from logits_replay import sample_tail
from moclip import MoClip

FOLDER = sweep.ROOT / "experiments/figures"
WIDTH = 525 / 72  # inches: 525 pt are the 700 px at which a page shows it, and 12 pt its 16 px of text
# Backgrounds are transparent. Contrast with white and with GitHub's dark page (#0d1117): grey 4.35 with either, the
# colours at least 3.3 (WCAG 2.2 asks for 3, of lines and large letters).
GREY, BLUE, ORANGE, GREEN, RED = "#797979", "#2f81f7", "#d9700a", "#2b9348", "#e5484d"
STYLE = {
    "svg.hashsalt": "moclip", "path.simplify_threshold": 0.3, "savefig.transparent": True, "legend.frameon": False,
    "figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False,
    "grid.color": GREY, "grid.alpha": 0.3, "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY,
    "xtick.color": GREY, "ytick.color": GREY, "font.size": 12, "axes.titlesize": 12, "axes.labelsize": 12,
    "legend.fontsize": 12, "xtick.labelsize": 12, "ytick.labelsize": 12, "legend.handlelength": 2.6}
LOOKS = {"full+adamw": (GREY, "o", "-"), "tail+adamw": (BLUE, "D", "--"), "anchor+adamw": (GREEN, "s", "-"),
         "replay+adamw": (RED, "v", ":"), "KL to base": (ORANGE, "^", "--"), "L2-SP 0.03": (BLUE, "X", ":"),
         "anchor+moclip": (GREEN, "s", ":"), "eps 0.0001": (RED, "*", "-."), "LoRA 32": (ORANGE, "P", ":"),
         "mixed": (GREY, "p", "-."), "own tokens": (RED, "d", ":")}


def look(name):
    color, marker, line = LOOKS[name]
    return dict(color=color, marker=marker, ls=line, ms=6, lw=1.4, label=name,
                mfc="none" if name.endswith("moclip") else color)


def frontier(plt):
    """Accuracy against forgetting, a point a rate; and forgetting against seconds, a point a number of steps."""
    rows = report.load()  # replay is far below
    arms = [name for name in LOOKS if name != "replay+adamw" and select(rows, **sweep.ALL[name])]
    figure, panels = plt.subplot_mosaic("aa;bc", figsize=(WIDTH, 8.6), height_ratios=(3, 2))
    for panel, key, names in (("a", "prose lost", arms), ("b", "SQL lost", arms[:5])):
        axes = panels[panel]
        for name in names:
            mine = select(rows, seed=0, **sweep.ALL[name])
            groups = [group for lr in sweep.LADDER if len(group := report.at(mine, lr)) == len(sweep.BASES)]
            axes.plot([max(0, report.mean(group, key)) for group in groups],
                      [100 * report.mean(group, "accuracy") for group in groups], **look(name))
        axes.set_xscale("symlog", linthresh=0.05, linscale=0.7)
        axes.set(xlim=(-0.004, 3), xlabel=f"{key}, nats a token", ylabel="accuracy, %", ylim=(78, 97))
        ticks(axes.xaxis, (0, 0.05, 0.2, 1))
    axes = panels["c"]
    for name in sweep.LONG:
        runs = [[report.mean(group, key) for key in ("run, s", "prose lost", "accuracy")]
                for value in sweep.LONGER if "steps" in value
                if (group := report.at(select(rows, seed=0, **{**sweep.ALL[name], **value}), 1.2e-3))]
        axes.plot(*list(zip(*runs))[:2], **look(name))
        for *where, accuracy in runs:
            axes.annotate(f"{100 * accuracy:.0f}", where, (0, 7 - 22 * (name == "KL to base")), ha="center",
                          textcoords="offset points", color=LOOKS[name][0])
    axes.set(xscale="log", yscale="log", xlabel="seconds; labels: accuracy, %", ylabel="prose lost, nats a token")
    ticks(axes.xaxis, (10, 20, 50, 100))
    ticks(axes.yaxis, (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2))
    for axes in panels.values():
        axes.grid(True)
    figure.legend(*panels["a"].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def ticks(axis, values):
    """These ticks of a logarithmic axis and no others, as plain numbers."""
    low, high = axis.get_view_interval()
    axis.set_ticks([value for value in values if low <= value <= high], minor=False)
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_ticks([], minor=True)


def mass(plt):
    """R7: the outside mass over the steps, lr 8e-4, mean over bases."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.6))
    for name in ("full+adamw", "replay+adamw", "tail+adamw", "anchor+adamw"):
        group = report.at(select(report.load(), seed=0, **sweep.ALL[name]), 8e-4)
        logs = torch.tensor([row["outside_mass_log"] for row in group])
        axes.plot(logs[0, :, 0], logs[:, :, 1].mean(0), **look(name))
    axes.set(yscale="log", xlabel="step", ylabel="probability outside S")
    axes.grid(True)
    axes.legend()
    return figure


def position(plt):
    """What Stage 0 keeps of a typical position, and what a batch's tail adds: probabilities in rank order.

    Of the positions with several tokens the one whose |S| and outside mass are nearest to their medians, as ratios.
    """
    base = sweep.prepared(0)
    (tokens, targets), V = base.data.domain_train, base.data.size.vocab_size
    record = script.stage0(base.model, tokens, targets, sweep.DEFAULT["tau"], sweep.DEVICE).to("cpu")
    several, scored = (record.subset_sizes > 1).nonzero().squeeze(1), targets != script.IGNORE
    far = lambda x: (x[several] / x[several].median()).clamp(min=1e-9).log().abs()
    row = several[(far(record.subset_sizes.double()) + far(record.outside_mass.double())).argmin()].item()
    example, t = (x[row].item() for x in scored.nonzero(as_tuple=True))  # row-major, as Stage 0 numbers them
    context = tokens[example:example + 1, :t + 1].to(sweep.DEVICE)
    p = (base.model(context)[0, -1] @ base.model.embedding.weight.T).softmax(0).detach().cpu()
    rank = torch.empty(V, dtype=torch.long)
    rank[p.argsort(descending=True, stable=True)] = torch.arange(1, V + 1)
    S, gold = record.select([row]).token_ids.long(), targets[example, t].item()
    batch = next(script.domain_batches(targets, sweep.DEFAULT["batch"], 0))
    golds, generator = targets[batch][scored[batch]], torch.Generator().manual_seed(0)
    tail = sample_tail(golds, V, sweep.DEFAULT["tail"], generator=generator)
    R = tail.token_ids[~torch.isin(tail.token_ids, S)]
    figure, axes = plt.subplots(figsize=(WIDTH, 4.4))
    axes.plot(torch.arange(1, V + 1), p.sort(descending=True).values, color=GREY, lw=1.4,
              label=f"all {V:,} tokens; outside S: {record.outside_mass[row]:.1%}")
    axes.plot(rank[R], p[R], "|", color=ORANGE, ms=11, label=f"the tail of a batch: {len(R)} of them")
    axes.plot(rank[S], p[S], "o", color=BLUE, ms=6, label=f"S: {len(S)} recorded tokens")
    axes.plot(rank[gold], p[gold], "*", color=GREEN, ms=17, mec=GREY,
              label=f"gold: {base.data.tokenizer.decode([gold]).strip()!r}")
    context = base.data.tokenizer.decode(tokens[example, :t + 1].tolist()).split("\n")
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="probability")
    axes.set_title("\n".join(context), loc="left")
    axes.grid(True)
    axes.legend(loc="lower left")
    return figure


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
    figure, panels = plt.subplots(1, 4, figsize=(WIDTH, 2.5))
    for degrees, tick, axes in zip((15, 45, 80, 90), (40, 10, 2, 1), panels):
        last, turn = path(math.radians(degrees))[-500:], torch.linspace(0, 2 * math.pi, 181)
        axes.plot(*last.T, color=BLUE, lw=0.8)
        axes.plot(turn.cos(), turn.sin(), "--", color=ORANGE, lw=1.5)
        axes.plot(0, 0, "+", color=GREY, ms=7)
        limit = 1.5 * max(1.0, last.norm(dim=1).max().item())  # a scale of its own
        axes.set(title=f"cap {degrees}°:\n{last.norm(dim=1).mean():.2g} lr", aspect="equal",
                 **{f"{side}{what}": (-end, end) for side in "xy" for what, end in (("lim", limit), ("ticks", tick))})
    figure.supxlabel("the last 500 of 2500 steps, in units of lr; dashed circle: radius lr", size=12)
    return figure


FIGURES = {"position": position, "frontier": frontier, "mass": mass, "orbits": orbits}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES))
    names = parser.parse_args().only
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
