"""The study behind README's "What tau and max_angle do": a resumable grid over train_small.py.

    python experiments/sweep.py             # runs what is missing, then prints the tables (about 40 s a run on 2 cores)
    python experiments/sweep.py --tables    # prints the tables of what has finished
    python experiments/sweep.py --figures   # redraws experiments/figures/*.svg (pip install matplotlib)

Every run is a row of experiments/results/sweep.json, written as soon as it is finished; an interrupted study goes on
where it stopped. Learning rates of all methods come from one grid, the same for each.
"""

import argparse
import collections
import functools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_small as script  # noqa: E402  (its folder is on the path only now)
from logits_replay import outside_mass  # noqa: E402
from moclip import MoClip  # noqa: E402

RESULTS, FIGURES = ROOT / "experiments/results/sweep.json", ROOT / "experiments/figures"
DEFAULT = dict(method="replay+moclip", tau=0.98, max_angle=90.0, lr=4e-4, batch=32, steps=200, scope="global", variant="", vocab=script.V,
               seed=0)
SEEDS = (0, 1, 2)
REPLAY = ("replay+adamw", "replay+moclip")
LEARNING_RATES, LARGE_BATCH_RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3), (4e-4, 8e-4, 1.1e-3, 1.6e-3, 3.2e-3)


def grid():
    """(study, settings) of every run, the most telling studies first; a run in two studies is run once."""
    def runs(study, **lists):
        combinations = [{}]
        for name, values in lists.items():
            combinations = [{**c, name: v} for c in combinations for v in (values if isinstance(values, (list, tuple)) else [values])]
        return [(study, {**DEFAULT, **c}) for c in combinations]

    for seed in SEEDS:
        yield from runs("frontier", method=list(script.METHODS), lr=LEARNING_RATES, seed=seed)
        yield from runs("record at", method=REPLAY, lr=LEARNING_RATES, variant="record at 40", seed=seed)
        yield from runs("record at", method=REPLAY, tau=0.99, variant="record at 40", seed=seed)
        yield from runs("record at", variant=[f"record at {step}" for step in (10, 20, 40, 69)], seed=seed)
        yield from runs("record at", method=REPLAY, lr=(4e-4, 8e-4), variant="record at 0 69 138", seed=seed)
        yield from runs("record at", method=REPLAY, tau=0.95, variant="record at 0 69 138", seed=seed)
        yield from runs("large head", method="full+adamw", lr=LEARNING_RATES, vocab=24576, seed=seed)
        yield from runs("large head", method="replay+moclip", lr=LEARNING_RATES, variant="record at 40", vocab=24576, seed=seed)
        yield from runs("large batch", method="full+adamw", lr=LARGE_BATCH_RATES, batch=128, steps=100, seed=seed)
        yield from runs("large batch", method=REPLAY, lr=LARGE_BATCH_RATES, variant="record at 17 34 51 68 85", batch=128, steps=100, seed=seed)
        yield from runs("large batch", tau=0.99, lr=(8e-4, 1.1e-3), variant="record at 17 51", batch=128, steps=100, seed=seed)
        yield from runs("tau", method="replay+adamw", tau=(0.8, 0.9, 0.95, 0.98, 0.99, 0.995), seed=seed)
        yield from runs("angle", method="full+moclip", max_angle=(30.0, 60.0, 75.0, 90.0, 180.0), seed=seed)
        yield from runs("outside mass", variant=("", "frozen head", "record at 40", "record at 0 69 138"), seed=seed)
        yield from runs("outside mass", tau=0.995, seed=seed)
        yield from runs("outside mass", lr=1e-4, seed=seed)
        yield from runs("scope", scope=("global", "tensor"), seed=seed)
        yield from runs("stability", method=("full+adamw", "full+moclip"), lr=(3.2e-3, 1.28e-2), seed=seed)
        yield from runs("stability", method=("full+adamw", "full+moclip"), variant=("spikes", "bfloat16"), seed=seed)
        yield from runs("stability", method="full+moclip", variant=("spikes",), max_angle=180.0, seed=seed)
        yield from runs("angle", method="full+moclip", max_angle=(45.0, 60.0, 90.0, 180.0), batch=8, seed=seed)
    for seed in SEEDS:
        yield from runs("angle", method="full+moclip", max_angle=(45.0, 60.0, 90.0, 180.0), batch=128, steps=100, seed=seed)
    yield from runs("large batch", lr=(4e-4, 8e-4, 1.6e-3, 3.2e-3), variant="record at 17", batch=128, steps=100)
    yield from runs("large head", method="replay+moclip", tau=0.99, lr=LEARNING_RATES, variant="record at 0 69 138", vocab=24576)


def name_of(settings):
    return json.dumps(settings, sort_keys=True)


class Recording(MoClip):
    """MoClip that keeps every angle and the norm of the momentum."""

    angles, norms = [], []

    def step(self, closure=None):
        loss = super().step(closure)
        Recording.angles.append(self.last_angle.flatten().mean().item())
        Recording.norms.append(math.sqrt(sum((s["exp_avg"] ** 2).sum().item() for s in self.state.values())))
        return loss


def run(data, state, records, settings, device):
    """One fine-tuning run with `settings`; returns its measurements."""
    s = SimpleNamespace(**settings)
    model = script.Model().to(device)
    model.load_state_dict(state)
    if s.tau not in records:
        records[s.tau] = script.stage0(model, *data.domain_train, s.tau, device)
    record = records[s.tau]
    tokens, targets = data.domain_train
    every = len(tokens) // 32
    rows = torch.arange(len(record)).split((targets != script.IGNORE).sum(1).tolist())
    x, y, probe_rows = tokens[::every][:32], targets[::every][:32], torch.cat(rows[::every][:32])

    gold_outside = []

    @torch.no_grad()
    def probe(model, record):
        """The outside mass; noted beside it: the share of positions whose gold token is not among the top-K of this moment."""
        hidden, gold = script.scored_hidden(model, x, y, device)
        z = (hidden @ model.embedding.weight.T).float()
        p = z.softmax(-1)
        p_gold = p.gather(1, gold[:, None])
        gold_outside.append((torch.where(p > p_gold, p, 0).sum(1) >= s.tau).float().mean().item())
        return outside_mass(z, record.select(probe_rows)).mean().item()

    if s.variant == "frozen head":
        model.embedding.weight.requires_grad_(False)  # tied: the embedding is frozen with it
    if s.variant == "bfloat16":
        model.bfloat16()
    if s.variant == "spikes":
        steps = collections.Counter()
        for i, p in enumerate(model.parameters()):
            def spike(gradient, i=i):
                steps[i] += 1
                return gradient * 1e3 if steps[i] % 20 == 0 else gradient
            p.register_hook(spike)
    record_at = [int(step) for step in s.variant.removeprefix("record at").split()] if "record at" in s.variant else [0]
    Recording.angles, Recording.norms = [], []
    script.MoClip = functools.partial(Recording, scope=s.scope)
    try:
        out = script.finetune(model, s.method, data.domain_train, record, probe,
                              SimpleNamespace(lr=s.lr, max_angle=s.max_angle, steps=s.steps, batch=s.batch, tau=s.tau, record_at=record_at),
                              s.seed, device)
    finally:
        script.MoClip = MoClip
    out |= script.evaluate(model.float(), data, device)
    out["gold_outside_log"] = [[step, share] for (step, _), share in zip(out["outside_mass_log"], gold_outside)]
    if Recording.angles:
        degrees = sorted(map(math.degrees, Recording.angles[1:]))
        out["angle_quantiles_deg"] = [degrees[int(q * (len(degrees) - 1))] for q in (0.05, 0.25, 0.5, 0.75, 0.95)]
        out["momentum_norm"] = statistics.mean(Recording.norms)
    return {key: value for key, value in out.items() if key != "samples"}


def study(device):
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    out = ROOT / "runs"
    out.mkdir(exist_ok=True)
    done = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"torch": torch.__version__, "bases": {}, "runs": []}

    @functools.cache
    def at(vocab):
        """Data, base model and an empty cache of records for this vocabulary size."""
        data = script.prepare(script.BASE, 120)
        state, key = script.load_base(data, script.BASE, out, device)
        if done["bases"].get(str(vocab), {"key": None})["key"] != key:
            model = script.Model().to(device)
            model.load_state_dict(state)
            done["bases"][str(vocab)] = {"key": key, **script.evaluate(model, data, device)}
            done["runs"] = [row for row in done["runs"] if row["settings"]["vocab"] != vocab]
        return data, state, {}

    for vocab in dict.fromkeys(settings["vocab"] for _, settings in grid()):
        script.V = vocab
        at(vocab)
    finished = {name_of(row["settings"]) for row in done["runs"]}
    todo = list({name_of(s): s for _, s in grid() if name_of(s) not in finished}.values())
    for settings in tqdm(todo, "study", disable=None):
        script.V = settings["vocab"]
        prepared, start = at(script.V), time.time()
        measured = run(*prepared, settings, device)
        measured["forgetting"] = measured["general_nll"] - done["bases"][str(script.V)]["general_nll"]
        done["runs"].append({"settings": settings, "seconds": time.time() - start, **measured})
        text = json.dumps({**done, "runs": []}, indent=1)[:-4] + "[\n" + ",\n".join(map(json.dumps, done["runs"])) + "\n]\n}\n"
        script.write_atomically(RESULTS, lambda temporary: temporary.write_text(text))


def rows_of(done, study, *by):
    """{values of the settings named in `by`: finished runs}, in the order of the grid."""
    found = {name_of(row["settings"]): row for row in done["runs"]}
    groups = {}
    for name, settings in grid():
        if name == study and name_of(settings) in found:
            group = groups.setdefault(tuple(settings[b] for b in by), {})
            group[name_of(settings)] = found[name_of(settings)]
    return {key: list(group.values()) for key, group in groups.items()}


MEASURES = (("accuracy", "domain_accuracy", "{:.1%}"), ("domain NLL", "domain_nll", "{:.3f}"), ("forgetting", "forgetting", "{:.3f}"),
            ("outside mass", "outside_mass_end", "{:.4f}"), ("tokens a row", "subset_size_mean", "{:.0f}"),
            ("ms a step", "step_ms", "{:.0f}"), ("ms in head", "head_ms", "{:.0f}"), ("angle", "angle_mean_deg", "{:.0f}°"), ("clipped", "clip_fraction", "{:.0%}"),
            ("momentum norm", "momentum_norm", "{:.2f}"))
STUDIES = {"frontier": ("method", "lr"), "record at": ("method", "variant", "tau", "lr"), "large head": ("method", "variant", "tau", "lr"), "large batch": ("method", "variant", "tau", "lr"), "tau": ("tau",), "angle": ("batch", "max_angle"), "outside mass": ("variant", "tau", "lr"),
           "scope": ("scope",), "stability": ("method", "max_angle", "lr", "variant")}


def mean_and_spread(rows, key, form):
    values = [row[key] for row in rows if row.get(key) is not None]
    if not values:
        return ""
    return form.format(statistics.mean(values)) + (" ± " + form.format(statistics.stdev(values)) if len(values) > 1 else "")


def tables(done):
    for study, by in STUDIES.items():
        groups = rows_of(done, study, *by)
        if not groups:
            continue
        print(f"\n### {study}\n\n| {' | '.join([*by, 'seeds', *(title for title, _, _ in MEASURES)])} |")
        print("|" + "---|" * (len(by) + 1 + len(MEASURES)))
        for key, rows in groups.items():
            print(f"| {' | '.join([*map(str, key), str(len(rows)), *(mean_and_spread(rows, k, f) for _, k, f in MEASURES)])} |")


def figures(done):
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the figures need matplotlib: pip install matplotlib") from error
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "moclip"  # the same file every time
    from matplotlib import pyplot as plt
    FIGURES.mkdir(exist_ok=True)
    mean = lambda rows, key: statistics.mean(row[key] for row in rows)
    deviation = lambda rows, key: statistics.stdev(row[key] for row in rows) if len(rows) > 1 else 0.0

    def save(name, xlabel, ylabel):
        plt.xlabel(xlabel), plt.ylabel(ylabel), plt.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5)), plt.grid(alpha=0.3), plt.tight_layout()
        plt.savefig(FIGURES / name, metadata={"Date": None})
        plt.close()

    plt.figure(figsize=(8, 4))
    groups = rows_of(done, "frontier", "method", "lr")
    groups |= {(f"{m}, recorded at step 40", lr): rows for (m, variant, tau, lr), rows in rows_of(done, "record at", "method", "variant", "tau", "lr").items()
               if (variant, tau) == ("record at 40", DEFAULT["tau"])}
    for method in dict.fromkeys(m for m, _ in groups):
        mine = [rows for (m, _), rows in groups.items() if m == method]
        plt.errorbar([mean(r, "forgetting") for r in mine], [100 * mean(r, "domain_accuracy") for r in mine],
                     xerr=[deviation(r, "forgetting") for r in mine], yerr=[100 * deviation(r, "domain_accuracy") for r in mine],
                     marker="o", label=method)
    plt.xscale("log")
    save("frontier.svg", "forgetting: rise of the general NLL (nats a token)", "domain accuracy (%)")

    plt.figure(figsize=(8, 4))
    for (tau,), rows in rows_of(done, "tau", "tau").items():
        logs = [row["outside_mass_log"] for row in rows]
        plt.plot([step for step, _ in logs[0]], [statistics.mean(log[i][1] for log in logs) for i in range(len(logs[0]))],
                 marker=".", label=f"tau = {tau}")
    plt.yscale("log")
    save("outside_mass.svg", "step", "outside mass, mean over 32 training examples")

    plt.figure(figsize=(8, 4))
    for batch in (8, 32, 128):
        mine = {cap: rows for (b, cap), rows in rows_of(done, "angle", "batch", "max_angle").items() if b == batch}
        if 180.0 in mine:
            quantiles = [statistics.mean(row["angle_quantiles_deg"][i] for row in mine[180.0]) for i in range(5)]
            plt.plot(quantiles, (5, 25, 50, 75, 95), marker="o", label=f"batch {batch}")
    save("angles.svg", "angle between gradient and momentum, no cap (degrees)", "percent of the steps below")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tables", action="store_true", help="only print the tables")
    parser.add_argument("--figures", action="store_true", help="only redraw the figures")
    args = parser.parse_args()
    if not (args.tables or args.figures):
        study(torch.device("cpu"))
    done = json.loads(RESULTS.read_text())
    figures(done) if args.figures else tables(done)


if __name__ == "__main__":
    main()
