"""The tables of README.md, experiments/README.md and THEORY.md, from experiments/results/*.json alone:

    python experiments/report.py            # writes each between its marks, <!-- table NAME --> and <!-- end -->

A test checks that nothing changes when it is run. A learning rate is chosen on validation questions, one for all bases:
the smallest whose mean accuracy is within two points of the arm's best (`chosen`; two points are two standard errors of
a mean over the 915 validation questions of three bases). What is reported are test questions; ± is the standard
deviation over bases and seeds together.
"""

import collections
import contextlib
import io
import json
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import sweep  # noqa: E402  (its folder is on the path only now)

STUDENT = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}  # 97.5 % quantile of Student's t, by degrees of freedom


def load():
    """The study's rows, those of one fingerprint a base (the one with most rows), with the base's row as `at`."""
    done = json.loads(sweep.RESULTS.read_text())
    bases = {row["fingerprint"]: row for row in done["bases"]}
    count = collections.Counter(row["base"] for row in done["runs"])
    kept = {}
    for mark, base in bases.items():
        key = base["base"], base["width"]
        if key not in kept or count[mark] > count[kept[key]]:
            kept[key] = mark
    rows = []
    for row in done["runs"]:
        if row["base"] in kept.values():
            at = bases[row["base"]]
            general = {part: row[f"general_nll_{part}"] - at[f"general_nll_{part}"] for part in ("validation", "test")}
            rows.append({**row, **row["settings"], "fingerprint": row["base"], "forgetting": general["test"],
                         "forgetting_validation": general["validation"], "accuracy": row["domain_accuracy_test"]})
    return rows


def select(rows, **settings):
    """The rows with these settings; what is not named is DEFAULT's, but for lr, base and seed, which are free."""
    wanted = {**{k: v for k, v in sweep.DEFAULT.items() if k not in ("lr", "base", "seed")}, **settings}
    return [row for row in rows if all(row[k] == v for k, v in wanted.items())]


def mean(rows, key):
    return statistics.mean(row[key] for row in rows)


def by_rate(rows):
    rates = sorted({row["lr"] for row in rows})
    return {lr: [row for row in rows if row["lr"] == lr] for lr in rates}


def best(rows):
    """The learning rate with the highest validation accuracy."""
    groups = by_rate(rows)
    return max(groups, key=lambda lr: mean(groups[lr], "domain_accuracy_validation"))


def chosen(rows):
    """The smallest learning rate whose validation accuracy is within two points of the best."""
    groups = by_rate(rows)
    top = mean(groups[best(rows)], "domain_accuracy_validation")
    return next(lr for lr in groups if mean(groups[lr], "domain_accuracy_validation") >= top - 0.02)


def spread(rows, key, form):
    values = [row[key] for row in rows]
    deviation = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.mean(values)) + deviation


MEASURES = {"accuracy": ("accuracy", "{:.1%}"), "forgetting": ("forgetting", "{:.3f}"),
            "domain NLL": ("domain_nll_test", "{:.3f}"), "outside mass": ("outside_mass_end", "{:.4f}"),
            "tokens a row": ("subset_size_mean", "{:.0f}"), "head moved": ("head_moved", "{:.1f}"),
            "of it unseen rows": ("head_moved_unseen", "{:.1f}"), "rows moved": ("head_rows_moved", "{:.0f}"),
            "spikes": ("spikes", "{:.1f}")}


def table(lines, titles, measures):
    """Markdown: `lines` are (cells, rows); a measure is a column."""
    out = ["| " + " | ".join([*titles, *measures]) + " |", "|" + "---|" * (len(titles) + len(measures))]
    for cells, rows in lines:
        if rows:
            out.append("| " + " | ".join([*map(str, cells), *(spread(rows, *MEASURES[m]) for m in measures)]) + " |")
    return "\n".join(out)


def paired(rows, others, key="forgetting", difference=lambda a, b: 1 - a / b):
    """(mean, low, high) of a difference over the pairs of one base and seed; 95 %, Student."""
    by = {(row["base"], row["seed"]): row[key] for row in others}
    values = [difference(row[key], by[row["base"], row["seed"]]) for row in rows if (row["base"], row["seed"]) in by]
    middle = statistics.mean(values)
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / len(values)**0.5
    return middle, middle - half, middle + half


def at(rows, lr):
    return [row for row in rows if row["lr"] == lr]


def main_table(rows, measures=("accuracy", "forgetting", "domain NLL", "outside mass")):
    lines = []
    for method in sweep.script.METHODS:
        mine = select(rows, method=method)
        if mine:
            lines.append(((method, f"{chosen(mine):g}"), at(mine, chosen(mine))))
    return table(lines, ("method", "lr"), measures)


def small_table(rows):
    return main_table(rows, ("accuracy", "forgetting"))


def frontier_table(rows):
    lines = [((method, f"{lr:g}"), group) for method in sweep.script.METHODS
             for lr, group in by_rate(select(rows, method=method)).items()]
    return table(lines, ("method", "lr"), ("accuracy", "forgetting"))


def tau_table(rows):
    lines = [((tau, method), at(select(rows, method=method, tau=tau, base=0), sweep.DEFAULT["lr"]))
             for tau in sweep.TAUS for method in ("replay+adamw", "tail+adamw")]
    return table(lines, ("tau", "method"), ("accuracy", "forgetting", "outside mass", "tokens a row"))


def drift_table(rows):
    """THEORY.md R7: the outside mass at the start, at its highest and at the end."""
    titles = ["tau", "training", "at the start", "highest", "at step", "at the end"]
    out = ["| " + " | ".join(titles) + " |", "|---|---|---|---|---|---|"]
    for tau, methods in ((0.9, ("full+adamw", "replay+adamw", "tail+adamw")), (0.98, ("replay+adamw", "tail+adamw"))):
        for method in methods:
            logs = [row["outside_mass_log"] for row in at(select(rows, method=method, tau=tau), sweep.DEFAULT["lr"])]
            masses = [statistics.mean(points) for points in zip(*([mass for _, mass in log] for log in logs))]
            highest = masses.index(max(masses))
            out.append(f"| {tau} | {method} | {masses[0]:.3f} | {masses[highest]:.3f} | {logs[0][highest][0]} "
                       f"| {masses[-1]:.3f} |")
    return "\n".join(out)


def record_table(rows):
    lines = []
    for size in (0, 16, 64, 256, 1024, sweep.script.V):
        for name, settings in (("gold only, no Stage 0", dict(variant="gold only")),
                               ("top 1 and gold", dict(tau=0.01)), ("tau = 0.9", dict())):
            lines.append(((name, "all" if size == sweep.script.V else size),
                          at(select(rows, tail=size, base=0, **settings), sweep.DEFAULT["lr"])))
    return table(lines, ("recorded", "tail"), ("accuracy", "forgetting", "domain NLL", "outside mass"))


def rivals_table(rows):
    lines = []
    for lr in sweep.RATES:
        for name, settings in (("full+adamw", dict(method="full+adamw")),
                               *((f"full+adamw, {v}", dict(method="full+adamw", variant=v)) for v in sweep.RIVALS),
                               ("tail+adamw", dict()), ("tail+moclip", dict(method="tail+moclip"))):
            if 4e-4 <= lr <= 1.2e-3:
                lines.append(((f"{lr:g}", name), at(select(rows, base=0, **settings), lr)))
    return table(lines, ("lr", "arm"), ("accuracy", "forgetting", "head moved", "of it unseen rows"))


def claim(rows):
    """Each arm against full+adamw, both at their chosen rates: paired differences with 95 % intervals."""
    full = select(rows, method="full+adamw")
    reference = at(full, chosen(full))
    titles = [f"against full+adamw at {chosen(full):g}", "lr", "accuracy, points", "95 %", "less forgetting", "95 %"]
    out = ["| " + " | ".join(titles) + " |", "|---|---|---|---|---|---|"]
    arms = {"full+adamw at its highest validation accuracy": at(full, best(full))}
    for name, settings in (("full+moclip", dict(method="full+moclip")), ("tail+adamw", {}),
                           ("tail+moclip", dict(method="tail+moclip"))):
        arms[name] = at(select(rows, **settings), chosen(select(rows, **settings)))
    for name, group in arms.items():
        a, b = paired(group, reference, "accuracy", lambda x, y: 100 * (x - y)), paired(group, reference)
        out.append(f"| {name} | {group[0]['lr']:g} | {a[0]:+.1f} | {a[1]:+.1f} to {a[2]:+.1f} "
                   f"| {b[0]:.0%} | {b[1]:.0%} to {b[2]:.0%} |")
    return "\n".join(out)


def speed_table(_):
    found = json.loads(sweep.RESULTS.with_name("speed.json").read_text())
    lines = [f"| {row['what']} | {row['value']} | {row['target']} |" for row in found["rows"]]
    return "\n".join(["| what | measured | aim |", "|---|---|---|", *lines])


def pretrained_table(_):
    out = ["| tau | lr | method | accuracy | forgetting | domain NLL | tokens a row | s a step |", "|" + "---|" * 8]
    for study in json.loads(sweep.RESULTS.with_name("pretrained.json").read_text()):
        at, late = study["config"], study["config"].get("record_at", "0") != "0"
        for run in study["runs"]:
            if run["method"] != "base":
                size = f"{run['subset_size_mean']:.0f}" if run.get("subset_size_mean") else "all"
                name = run["method"] + ", recorded at step 8" * (late and not run["method"].startswith("full"))
                out.append(f"| {at['tau']} | {at['lr']} | {name} | {run['domain_accuracy']:.1%} "
                           f"| {run['forgetting']:.3f} "
                           f"| {run['domain_nll']:.3f} | {size} | {run['step_ms'] / 1e3:.1f} |")
    return "\n".join(out)


def first_run(_):
    """What train_small.py printed at its defaults: the table, and the first of its three questions."""
    found = json.loads(sweep.RESULTS.with_name("default.json").read_text())
    base, runs = {**found["base"], "questions": found["base"]["questions"][:1]}, found["runs"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        sweep.script.print_table(base, runs)
        sweep.script.print_samples(base, runs)
    return "```\n" + out.getvalue() + "```"


def bases_table(_):
    lines = [f"| {row['base']} | `{row['fingerprint']}` | {row['parameters']:,} | {row['domain_nll_test']:.3f} "
             f"| {row['general_nll_test']:.3f} |" for row in json.loads(sweep.RESULTS.read_text())["bases"]]
    titles = ["base seed", "fingerprint", "parameters", "domain NLL", "general NLL"]
    return "\n".join(["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles), *lines])


def bases_compared(rows):
    """The record's and the rivals' main lines over all bases, at one learning rate."""
    arms = {"full+adamw": dict(method="full+adamw"),
            "full+adamw, head rows of the batch": dict(method="full+adamw", variant="head rows of the batch"),
            "full+adamw, mixed": dict(method="full+adamw", variant="mixed"), "tail+adamw": {},
            "tail+adamw, gold only, no Stage 0": dict(variant="gold only")}
    lines = [((name,), at(select(rows, **settings), sweep.DEFAULT["lr"])) for name, settings in arms.items()]
    return table(lines, ("arm",), ("accuracy", "forgetting", "domain NLL"))


TABLES = {"small": small_table, "main": main_table, "frontier": frontier_table, "claim": claim, "tau": tau_table,
          "drift": drift_table, "record": record_table, "rivals": rivals_table,
          "three bases": bases_compared, "first run": first_run,
          "bases": bases_table, "speed": speed_table, "pretrained": pretrained_table}
READMES = sweep.ROOT / "README.md", sweep.ROOT / "experiments/README.md", sweep.ROOT / "THEORY.md"


def fill(text, rows):
    """`text` with every table between its marks made anew."""
    return re.sub(r"(<!-- table (.+?) -->\n).*?(<!-- end -->)",
                  lambda match: f"{match[1]}{TABLES[match[2]](rows)}\n{match[3]}", text, flags=re.DOTALL)


def main():
    rows = load()
    for path in READMES:
        path.write_text(fill(path.read_text(), rows))


if __name__ == "__main__":
    main()
