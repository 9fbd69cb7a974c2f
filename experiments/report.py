"""The tables of README.md, THEORY.md and this folder's README.md and TABLES.md, from experiments/results/*.json alone:

    python experiments/report.py            # writes each between its marks, <!-- table NAME --> and <!-- end -->

A test checks that nothing changes when it is run. A learning rate is chosen on validation questions, one for all bases:
the smallest whose mean accuracy is within two points of the arm's best (`chosen`; two points are two standard errors of
a mean over the 915 validation questions of three bases), from the runs of seed 0 alone. What is reported are test
questions; ± is the standard deviation over bases and seeds together, an interval Student's over the bases' means.
"""

import collections
import contextlib
import io
import json
import math
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import sweep  # noqa: E402  (its folder is on the path only now)

STUDENT = {1: 12.71, 2: 4.303}  # 97.5 % quantile of Student's t, by degrees of freedom


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
            general |= {part: row[f"general_nll_{part}_test"] - at[f"general_nll_{part}_test"]
                        for part in ("golds", "other")}
            rows.append({**row, **row["settings"], "fingerprint": row["base"], "forgetting": general["test"],
                         "parameters": at["parameters"],
                         "forgetting_sql": row.get("other_sql_nll", math.nan) - at.get("other_sql_nll", math.nan),
                         **{f"forgetting_{part}": value for part, value in general.items()},
                         "accuracy": row["domain_accuracy_test"]})
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


def candidates(rows):
    """{lr: mean validation accuracy}, of seed 0, over the rates that were run on the most bases, ascending."""
    groups = by_rate([row for row in rows if row["seed"] == 0])
    most = max(map(len, groups.values()))
    return {lr: mean(group, "domain_accuracy_validation") for lr, group in groups.items() if len(group) == most}


def best(rows):
    """The learning rate with the highest validation accuracy."""
    found = candidates(rows)
    return max(found, key=found.get)


def chosen(rows, tolerance=0.02):
    """The smallest learning rate whose validation accuracy is within two points of the best."""
    found = candidates(rows)
    return next(lr for lr, accuracy in found.items() if accuracy >= max(found.values()) - tolerance)


def spread(rows, key, form):
    """Mean ± standard deviation over bases and seeds; ValueError for two rows of one base and seed: two arms, then."""
    if len({(row.get("base"), row["seed"]) for row in rows}) < len(rows):
        raise ValueError(f"two arms in one line: {rows[0].get('settings', rows[0]['method'])}")
    values = [row[key] for row in rows]
    deviation = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.mean(values)) + deviation


MEASURES = {"accuracy": ("accuracy", "{:.1%}"), "forgetting": ("forgetting", "{:.3f}"),
            "domain NLL": ("domain_nll_test", "{:.3f}"), "outside mass": ("outside_mass_end", "{:.4f}"),
            "tokens a row": ("subset_size_mean", "{:.0f}"), "head moved": ("head_moved", "{:.1f}"),
            "rows moved": ("head_rows_moved", "{:.0f}"),
            "spikes": ("spikes", "{:.1f}"), "clipped": ("clip_fraction", "{:.0%}"),
            "of domain golds": ("forgetting_golds", "{:.3f}"),
            "of other tokens": ("forgetting_other", "{:.3f}"),
            "of SQL over other schemas": ("forgetting_sql", "{:.3f}")}


def markdown(titles, lines):
    """A table; a line is its cells."""
    head, *rest = ("| " + " | ".join(map(str, cells)) + " |" for cells in (titles, *lines))
    return "\n".join([head, "|" + "---|" * len(titles), *rest])


def table(lines, titles, measures):
    """`lines` are (cells, rows); a measure is a column. A line without rows is left out."""
    return markdown([*titles, *measures], ([*cells, *(spread(rows, *MEASURES[m]) for m in measures)]
                                           for cells, rows in lines if rows))


def paired(rows, others, key, difference):
    """(mean, low, high) of a difference over bases, each the mean of the pairs of one seed; 95 %, Student."""
    by, values = {(row["base"], row["seed"]): row[key] for row in others}, collections.defaultdict(list)
    for row in rows:
        if (row["base"], row["seed"]) in by:
            values[row["base"]].append(difference(row[key], by[row["base"], row["seed"]]))
    values = [statistics.mean(v) for v in values.values()]
    middle = statistics.mean(values)
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / len(values)**0.5
    return middle, middle - half, middle + half


def points(rows, others):
    """Accuracy against the others', in points: (mean, low, high)."""
    return paired(rows, others, "accuracy", lambda a, b: 100 * (a - b))


def less(rows, others):
    """By what part forgetting is less than the others': (mean, low, high), from the mean logarithm of the ratios."""
    middle, low, high = map(math.exp, paired(rows, others, "forgetting", lambda a, b: math.log(a / b)))
    return 1 - middle, 1 - high, 1 - low


def at(rows, lr):
    return [row for row in rows if row["lr"] == lr]


def main_table(rows):
    arms = {method: select(rows, method=method) for method in sweep.script.METHODS}
    lines = [((method, f"{chosen(mine):g}"), at(mine, chosen(mine))) for method, mine in arms.items()]
    return table(lines, ("method", "lr"), ("accuracy", "forgetting", "domain NLL", "outside mass"))


def frontier_table(rows):
    lines = [((method, f"{lr:g}"), at(select(rows, method=method), lr)) for method in sweep.script.METHODS
             for lr in sweep.RATES]
    return table(lines, ("method", "lr"), ("accuracy", "forgetting"))


def tau_table(rows):
    lines = []
    for tau in sweep.TAUS:
        for method in ("replay+adamw", "tail+adamw"):
            mine = at(select(rows, method=method, tau=tau, seed=0), sweep.DEFAULT["lr"])
            lines.append(((tau, method, len(mine)), mine))
    return table(lines, ("tau", "method", "bases"), ("accuracy", "forgetting", "outside mass", "tokens a row"))


def drift_table(rows):
    """THEORY.md R7: the outside mass at the start, at its highest and at the end."""
    lines = []
    for tau, methods in ((0.9, ("full+adamw", "replay+adamw", "tail+adamw")), (0.98, ("replay+adamw", "tail+adamw"))):
        for method in methods:
            logs = [row["outside_mass_log"]
                    for row in at(select(rows, method=method, tau=tau, seed=0), sweep.DEFAULT["lr"])]
            masses = [statistics.mean(points) for points in zip(*([mass for _, mass in log] for log in logs))]
            highest = masses.index(max(masses))
            lines.append((tau, method, f"{masses[0]:.3f}", f"{masses[highest]:.3f}", logs[0][highest][0],
                          f"{masses[-1]:.3f}"))
    return markdown(["tau", "training", "at the start", "highest", "at step", "at the end"], lines)


RECORDED = {"gold only, no Stage 0": dict(variant="gold only"), "top 1 and gold": dict(tau=0.01), "tau = 0.9": {}}
ARMS = {"full+adamw": dict(method="full+adamw"),
        **{f"full+adamw, {v}": dict(method="full+adamw", variant=v)
           for v in (*sweep.RIVALS, "KL every 5th step", *sweep.EPS[1:3])}, "tail+adamw": {},
        **{f"tail+adamw, {v}": dict(variant=v)
           for v in ("mixed", "KL to base", "KL every 5th step", "matched norm", sweep.EPS[2])},
        "tail+moclip": dict(method="tail+moclip")}


def record_table(rows):
    lines = []
    for size in (0, 16, 64, 256, 1024, sweep.script.V):
        for name, settings in RECORDED.items():
            mine = at(select(rows, tail=size, seed=0, **settings), sweep.DEFAULT["lr"])
            lines.append(((name, "all" if size == sweep.script.V else size, len(mine)), mine))
    return table(lines, ("recorded", "tail", "bases"), ("accuracy", "forgetting", "domain NLL", "outside mass"))


def differences(arms, titles, measure, form):
    """Each arm, (cells, its rows, those it is compared with): `points` and `measure`, with 95 % intervals."""
    def interval(form, found):
        middle, low, high = map(form.format, found)
        return middle, f"{low} to {high}"

    return markdown(titles, ([*cells, *interval("{:+.1f}", points(group, reference)),
                              *interval(form, measure(group, reference))] for cells, group, reference in arms))


def record_claim(rows):
    """What a record adds to the same tail."""
    tails = {size: at(select(rows, tail=size, variant="gold only"), sweep.DEFAULT["lr"]) for size in (16, 256)}
    arms = [((name, size), at(select(rows, tail=size, seed=0, **RECORDED[name]), sweep.DEFAULT["lr"]), plain)
            for size, plain in tails.items() for name in ("top 1 and gold", "tau = 0.9")]
    titles = ["recorded", "tail", "accuracy, points", "95 %", "domain NLL", "95 %"]
    return differences(arms, titles, lambda a, b: paired(a, b, "domain_nll_test", lambda x, y: x - y), "{:+.3f}")


def record_by_rate(rows):
    """The tail without a record against the tail with one, at the same rate."""
    plain, tail = select(rows, variant="gold only"), select(rows, seed=0)
    arms = [((f"{lr:g}",), at(plain, lr), at(tail, lr)) for lr in sweep.CENTRE]
    titles = ["gold only against tau = 0.9: lr", "accuracy, points", "95 %", "less forgetting", "95 %"]
    return differences(arms, titles, less, "{:.0%}")


def sql_table(rows):
    """What else the base could do: SQL over schemas that nobody trained on."""
    names = ("full+adamw", "full+adamw, eps 1e-05", "full+adamw, eps 0.0001", "full+adamw, KL to base", "tail+adamw",
             "tail+moclip")
    arms = {**{name: ARMS[name] for name in names}, "replay+adamw": dict(method="replay+adamw")}
    lines = [((name,), at(select(rows, seed=0, **settings), sweep.DEFAULT["lr"])) for name, settings in arms.items()]
    return table(lines, ("arm, lr 6e-4",), ("accuracy", "forgetting", "of SQL over other schemas"))


def eps_table(rows, lrs):
    """Values of eps, and 1e-4 of the head alone and of the body alone."""
    lines = [((method, eps.removeprefix("eps ") or "1e-08", f"{lr:g}", len(mine)), mine)
             for method in ("full+adamw", "tail+adamw") for eps in ("", *sweep.EPS, *sweep.PARTS) for lr in lrs
             if (mine := at(select(rows, method=method, variant=eps), lr))]
    return table(lines, ("method", "eps", "lr", "runs"), ("accuracy", "forgetting", "domain NLL", "head moved"))


def interpolation_table(rows):
    lines = [((alpha, f"{lr:g}"), at(select(rows, method="full+adamw", variant=variant, base=0, seed=0), lr))
             for alpha, variant in ((1, ""), (0.75, sweep.ALPHAS[1]), (0.5, sweep.ALPHAS[0]))
             for lr in (8e-4, 1.6e-3, 2.4e-3)]
    return table(lines, ("alpha", "lr"), ("accuracy", "forgetting", "domain NLL"))


def rivals_table(rows):
    lines = [((f"{lr:g}", name), at(select(rows, seed=0, **settings), lr))
             for lr in sweep.CENTRE for name, settings in ARMS.items()]
    return table(lines, ("lr", "arm"), ("accuracy", "forgetting", "domain NLL", "head moved"))


def claim(rows):
    """Each arm against full+adamw, both at their chosen rates."""
    full = select(rows, method="full+adamw")
    arms = {"full+adamw at its highest validation accuracy": at(full, best(full))}
    for method in ("full+moclip", "tail+adamw", "tail+moclip"):
        mine = select(rows, method=method)
        arms[method] = at(mine, chosen(mine))
    titles = [f"against full+adamw at {chosen(full):g}", "lr", "accuracy, points", "95 %", "less forgetting", "95 %"]
    return differences([((name, f"{mine[0]['lr']:g}"), mine, at(full, chosen(full))) for name, mine in arms.items()],
                       titles, less, "{:.0%}")


def same_rate(rows):
    """The tail against the full softmax with the same optimizer at the same rate: nothing is chosen."""
    arms = []
    for optimizer in ("adamw", "moclip"):
        full, tail = (select(rows, method=f"{loss}+{optimizer}") for loss in ("full", "tail"))
        arms += [((f"tail+{optimizer}", f"{lr:g}"), at(tail, lr), at(full, lr)) for lr in sweep.RATES]
    titles = ["against full with the same optimizer", "lr", "accuracy, points", "95 %", "less forgetting", "95 %"]
    return differences(arms, titles, less, "{:.0%}")


def tolerances(rows):
    """How far the claim hangs on the tolerance of the choice."""
    full, arms = select(rows, method="full+adamw"), []
    for tolerance in (0.0, 0.01, 0.015, 0.02, 0.03):
        for method in ("tail+adamw", "tail+moclip"):
            mine = select(rows, method=method)
            lrs = chosen(full, tolerance), chosen(mine, tolerance)
            arms.append(((method, f"{100 * tolerance:g}", f"{lrs[0]:g}", f"{lrs[1]:g}"),
                         at(mine, lrs[1]), at(full, lrs[0])))
    titles = ["method", "tolerance, points", "lr of full+adamw", "lr", "accuracy, points", "95 %", "less forgetting",
              "95 %"]
    return differences(arms, titles, less, "{:.0%}")


def rivals_claim(rows):
    """Each rival against tail+adamw, both at their chosen rates."""
    tail, arms = select(rows), []
    for name, settings in ARMS.items():
        mine = select(rows, **settings)
        if name != "tail+adamw":
            arms.append(((name, f"{chosen(mine):g}"), at(mine, chosen(mine)), at(tail, chosen(tail))))
    titles = [f"against tail+adamw at {chosen(tail):g}", "lr", "accuracy, points", "95 %", "forgetting, nats", "95 %"]
    return differences(arms, titles, lambda a, b: paired(a, b, "forgetting", lambda x, y: x - y), "{:+.3f}")


def rivals_speed(_):
    found = json.loads(sweep.RESULTS.with_name("rivals.json").read_text())
    return markdown(["arm", "time of a step, full+adamw's = 1"], ((name, f"{x:.2f}") for name, x in found.items()))


def cap_table(rows, least=3):
    """What was run on `least` bases or more."""
    lines = [((method, batch, f"{cap:g}°", f"{lr:g}", len(mine)), mine)
             for method, batch in (("full+moclip", 32), ("tail+moclip", 32), ("tail+moclip", 8))
             for cap in (45.0, 60.0, 75.0, 90.0, 180.0)
             for lr, mine in by_rate(select(rows, method=method, batch=batch, max_angle=cap, seed=0)).items()
             if len(mine) >= least and (cap < 90 or lr == sweep.DEFAULT["lr"])]
    return table(lines, ("method", "batch", "cap", "lr", "bases"), ("accuracy", "forgetting", "domain NLL", "clipped",
                                                                    "spikes"))


def stability_table(rows):
    conditions = {"as it is": ({}, 6e-4), "bfloat16": (dict(variant="bfloat16"), 6e-4),
                  "spikes": (dict(variant="spikes"), 6e-4), "lr 1.28e-2": ({}, 1.28e-2)}
    lines = [((condition, method), at(select(rows, method=method, base=0, seed=0, **settings), lr))
             for condition, (settings, lr) in conditions.items() for method in sweep.FOUR]
    return table(lines, ("condition", "method"), ("accuracy", "forgetting", "domain NLL", "spikes"))


def batch_table(rows):
    lines = [((batch, name), at(select(rows, batch=batch, steps=steps, base=0, seed=0, **settings), 8e-4))
             for batch, steps in ((8, 200), (32, 200), (128, 100))
             for name, settings in (("full+adamw", dict(method="full+adamw")), ("tail+adamw", {}),
                                    ("tail+adamw, gold only, no Stage 0", dict(variant="gold only")),
                                    ("tail+moclip", dict(method="tail+moclip")))]
    return table(lines, ("batch", "arm"), ("accuracy", "forgetting", "domain NLL"))


def size_table(rows):
    """A row is a size and a rate, a column an arm."""
    measures = "accuracy", "forgetting", "domain NLL"
    titles = [f"{measure}, {arm}" for measure in measures for arm in sweep.THREE]
    lines = []
    for width in (96, sweep.script.WIDTH, 384):
        for lr in sweep.DOUBLED:
            mine = [at(select(rows, width=width, method=method, base=0, seed=0), lr) for method in sweep.THREE]
            if all(mine):
                lines.append((f"{mine[0][0]['parameters']:,}", f"{lr:g}",
                              *(spread(group, *MEASURES[measure]) for measure in measures for group in mine)))
    return markdown(["parameters", "lr", *titles], lines)


def advice_table(rows):
    """What `theory.py --advise` says (tau = 0.9, a tail of V/50) and its neighbours, at a size it was not made from."""
    arms = [("tau = 0.9", tail, {}) for tail in (256, 64, 1024)]
    arms += [(name, 256, settings) for name, settings in (*list(RECORDED.items())[:2], ("tau = 0.5", dict(tau=0.5)),
                                                          ("tau = 0.98", dict(tau=0.98)))]
    lines = [((name, tail), at(select(rows, width=96, base=0, seed=0, tail=tail, **settings), 8e-4))
             for name, tail, settings in arms]
    return table(lines, ("recorded", "tail"), ("accuracy", "forgetting", "domain NLL", "outside mass"))


def late_table(rows):
    lines = [((variant or "recorded under the base",), at(select(rows, method="replay+adamw", tau=0.98, variant=variant,
                                                                 seed=0), 4e-4))
             for variant in ("", "recorded at 40", "recorded every epoch")]
    return table(lines, ("replay+adamw, tau = 0.98",), ("accuracy", "forgetting", "domain NLL", "outside mass"))


def controls_table(rows):
    lines = [((name,), at(select(rows, base=0, seed=0, **settings), sweep.DEFAULT["lr"]))
             for name, settings in (("the tail: golds and 256 others", {}), ("the golds alone", dict(tail=0)),
                                    ("256 uniformly, no golds", dict(variant="uniform only")),
                                    ("1024 uniformly, no golds", dict(variant="uniform only", tail=1024)),
                                    ("the base's sum outside, frozen", dict(variant="frozen sum")))]
    return table(lines, ("what stands for the outside",), ("accuracy", "forgetting", "domain NLL", "outside mass"))


def classes_table(rows):
    """Forgetting by class of the general text's token: those that are golds of the domain somewhere, and the others."""
    names = ("full+adamw", "full+adamw, head rows of the batch", "full+adamw, mixed", "tail+adamw")
    lines = [((name,), at(select(rows, seed=0, **ARMS[name]), sweep.DEFAULT["lr"])) for name in names]
    return table(lines, ("arm, lr 6e-4",), ("forgetting", "of domain golds", "of other tokens", "head moved",
                                            "rows moved"))


def variance_table(_):
    """R9 on a real batch: what the tail's draw does to sum, loss and gradient, with a record and without."""
    arms = collections.defaultdict(dict)
    for row in json.loads(sweep.RESULTS.with_name("variance.json").read_text())["rows"]:
        arms[row["batch"], row["tail"], row["record"]][row["model"]] = row
    titles = ["batch", "tail", "recorded", "error of the sum, before training", "bias, nats", "noise, nats",
              "error of the gradient", "error of the gradient, after training"]
    lines = []
    for arm, found in sorted(arms.items(), key=lambda item: item[0][:2]):
        first, last = found["before training"], found["after it"]
        lines.append((*arm, f"{first['sum']:.0%}", f"{first['bias']:.4f}", f"{first['noise']:.4f}",
                      f"{first['body']:.0%}", f"{last['body']:.0%}"))
    return markdown(titles, lines)


def speed_table(_):
    found = json.loads(sweep.RESULTS.with_name("speed.json").read_text())
    return markdown(["what", "measured", "aim"], ((row["what"], row["value"], row["target"]) for row in found["rows"]))


def pretrained(domain):
    """{(arm, lr): its rows}, of the present script, which knows a tail; a row is a seed."""
    arms = collections.defaultdict(list)
    for study in json.loads(sweep.RESULTS.with_name("pretrained.json").read_text()):
        at = study["config"]
        for run in study["runs"]:
            if at.get("domain") == domain and run["method"] != "base":
                name = ", ".join(filter(None, (run["method"], at["variant"])))
                arms[name, float(at["lr"])].append({**run, "accuracy": run["domain_accuracy"],
                                                    "domain_nll_test": run["domain_nll"]})
    return arms


def pretrained_table(domain):
    """At 1e-4 all, at other rates what has several seeds; ± over seeds."""
    lines = [((name, f"{lr:g}", len(runs)), runs) for (name, lr), runs in pretrained(domain).items()
             if lr == 1e-4 or len(runs) > 1]
    return table(lines, ("arm", "lr", "seeds"), ("accuracy", "forgetting", "domain NLL"))


def pretrained_rates(_):
    """The rates, on validation questions, of the one seed that has all of them, of the arms with several."""
    arms, lines = pretrained("sql"), []
    several = {name for name, lr in arms if lr != 1e-4}  # all have 1e-4
    for (name, lr), runs in sorted(arms.items()):
        lines += [(name, f"{lr:g}", f"{run['domain_accuracy_validation']:.1%}", f"{run['domain_nll_validation']:.3f}",
                   f"{run['accuracy']:.1%}", f"{run['forgetting']:.3f}")
                  for run in runs if run["seed"] == 1 and name in several]
    return markdown(["arm", "lr", "accuracy, validation", "domain NLL, validation", "accuracy", "forgetting"], lines)


def earlier_table(_):
    """The rows of the script before it knew a tail."""
    lines = []
    for study in json.loads(sweep.RESULTS.with_name("pretrained.json").read_text()):
        at, late = study["config"], study["config"].get("record_at", "0") != "0"
        for run in study["runs"]:
            if "tail" not in at and run["method"] != "base":
                size = f"{run['subset_size_mean']:.0f}" if run.get("subset_size_mean") else "all"
                name = run["method"] + ", recorded at step 8" * (late and not run["method"].startswith("full"))
                lines.append((at["tau"], at["lr"], name, f"{run['domain_accuracy']:.1%}", f"{run['forgetting']:.3f}",
                              f"{run['domain_nll']:.3f}", size))
    return markdown(["tau", "lr", "method", "accuracy", "forgetting", "domain NLL", "tokens a row"], lines)


def first_run(_):
    """The table that train_small.py printed at its defaults."""
    found = json.loads(sweep.RESULTS.with_name("default.json").read_text())
    with contextlib.redirect_stdout(io.StringIO()) as out:
        sweep.script.print_table(found["base"], found["runs"])
    return "```\n" + out.getvalue() + "```"


def bases_table(_):
    lines = [(row["base"], f"`{row['fingerprint']}`", f"{row['parameters']:,}", f"{row['domain_nll_test']:.3f}",
              f"{row['general_nll_test']:.3f}") for row in json.loads(sweep.RESULTS.read_text())["bases"]]
    return markdown(["base seed", "fingerprint", "parameters", "domain NLL", "general NLL"], lines)


TABLES = {"main": main_table, "frontier": frontier_table, "claim": claim, "tau": tau_table, "drift": drift_table,
          "record": record_table, "record claim": record_claim, "rivals": rivals_table, "rivals claim": rivals_claim,
          "same rate": same_rate, "tolerances": tolerances, "record by rate": record_by_rate, "sql": sql_table,
          "eps": lambda rows: eps_table(rows, [8e-4]), "eps, all": lambda rows: eps_table(rows, sweep.RATES),
          "interpolation": interpolation_table, "rivals speed": rivals_speed, "size": size_table,
          "advice": advice_table, "cap": cap_table, "cap, all": lambda rows: cap_table(rows, 1),
          "stability": stability_table, "batch": batch_table, "late": late_table, "controls": controls_table,
          "classes": classes_table, "variance": variance_table, "first run": first_run, "bases": bases_table,
          "speed": speed_table, "pretrained": lambda _: pretrained_table("sql"),
          "calls": lambda _: pretrained_table("calls"), "pretrained rates": pretrained_rates,
          "pretrained, earlier": earlier_table}
READMES = [sweep.ROOT / name for name in ("README.md", "experiments/README.md", "experiments/TABLES.md", "THEORY.md")]


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
