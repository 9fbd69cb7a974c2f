"""What do the results say? Every table of README.md and of this folder's README.md, from experiments/results/ alone.

    python -m experiments.report NAME     # print one table; the names are those of TABLES, at the end of this file
    python -m experiments.report          # write all of them between their marks, <!-- table NAME --> and <!-- end -->

A test checks that writing changes nothing. A rate is chosen on validation questions (sweep.chosen), one for all bases;
test questions are reported. ± is the standard deviation over bases and seeds, an interval Student's over the bases.
"""

import argparse
import collections
import contextlib
import io
import json
import re
import statistics

from experiments import sweep
from experiments.sweep import ALL, ANCHOR, FULL, TAIL, chosen, select

STUDENT = {1: 12.71, 2: 4.303}  # 97.5 % quantile of Student's t, by degrees of freedom
READMES = [sweep.ROOT / name for name in ("README.md", "experiments/README.md")]
LOSS = ["prose lost", "SQL lost"]  # forgetting: by how much the NLL rises, nats a token


def times():
    """What speed.py measured of each arm, full+adamw first; none before it has run."""
    return next((row["arms"] for row in result("speed_cpu")["rows"] if "arms" in row), [])


def load():
    """The study's rows, with what is measured against their base; times are speed.py's, measured side by side."""
    done, rows, timed = sweep.load(), [], times()
    bases = {row["fingerprint"]: row for row in done["bases"]}
    for row in done["runs"]:
        base = bases[row["fingerprint"]]
        mine = [arm for arm in timed if select([{**row, "steps": 200}], **arm["settings"])]
        ms, stage0 = (mine[0][key] if mine else None for key in ("step_ms", "stage0_s"))
        rows.append({**row, "accuracy": row["domain_accuracy_test"], "domain NLL": row["domain_nll_test"],
                     "prose lost": row["general_nll_test"] - base["general_nll_test"],
                     "SQL lost": row["other_nll_test"] - base["other_nll_test"],
                     "outside mass": row["outside_mass_end"], "ms a step": ms,
                     "tokens": row.get("anchor_tokens_a_position"),
                     "bytes": row.get("anchor_bytes_a_position"),
                     "run, s": mine and stage0 + row["steps"] * ms / 1e3 or None, "clipped": row["clip_fraction"],
                     "record, MB": (row["record_bytes"] + row.get("anchor_bytes", 0)) / 1e6})
    return rows


FORMS = collections.defaultdict(lambda: "{:.3f}", {
    "accuracy": "{:.1%}", "domain_accuracy_validation": "{:.1%}", "outside mass": "{:.4f}", "ms a step": "{:.0f}",
    "run, s": "{:.0f}", "record, MB": "{:.1f}", "clipped": "{:.0%}", "tokens": "{:.0f}",
    "bytes": "{:.0f}", "chat same": "{:.0%}"})
PRICE = ["ms a step", "run, s", "record, MB"]


def markdown(titles, lines):
    """A table; a line is its cells."""
    head, *rest = ("| " + " | ".join(map(str, cells)) + " |" for cells in (titles, *lines))
    return "\n".join([head, "|" + "---|" * len(titles), *rest]) if rest else "(not run yet)"


def mean(rows, key):
    return statistics.mean(row[key] for row in rows)


def spread(rows, key):
    """Mean ± standard deviation over bases and seeds; ValueError for two rows of one base and seed: two arms, then."""
    if len({(row.get("base"), row["seed"]) for row in rows}) < len(rows):
        raise ValueError(f"two arms in one line: {rows[0]}")
    if any(row.get(key) is None for row in rows):
        return "-"
    values = [row[key] for row in rows]
    deviation = f" ± {FORMS[key].format(statistics.stdev(values))}" if len(values) > 1 and key not in PRICE else ""
    return FORMS[key].format(statistics.mean(values)) + deviation


def table(lines, titles, measures):
    """`lines` are (cells, rows); a measure is a column. A line without rows is left out."""
    return markdown([*titles, *measures], ([*cells, *(spread(rows, key) for key in measures)]
                                           for cells, rows in lines if rows))


def at(rows, lr):
    return [row for row in rows if row["lr"] == lr]


def best(rows, name):
    """The arm's rows at the rate that validation chose; none if it was not run."""
    mine = select(rows, **ALL[name])
    return at(mine, chosen(mine)) if mine else []


def paired(rows, others, key, difference):
    """Mean (low to high) of a difference over bases, each the mean of the pairs of one seed; 95 %, Student."""
    by, values = {(row["base"], row["seed"]): row[key] for row in others}, collections.defaultdict(list)
    for row in rows:
        if (row["base"], row["seed"]) in by:
            values[row["base"]].append(difference(row[key], by[row["base"], row["seed"]]))
    values = [statistics.mean(pairs) for pairs in values.values()]
    if len(values) < 2:
        return sum(values), None
    return statistics.mean(values), STUDENT[len(values) - 1] * statistics.stdev(values) / len(values)**0.5


def against(pairs, titles):
    """Each arm, (cells, its rows, those it is compared with): accuracy in points; the rest as a part of the other's."""
    def cell(form, found):
        middle, half = found
        low, high = (form.format(middle + sign * (half or 0)) for sign in (-1, 1))
        return form.format(middle) + (f" ({low} to {high})" if half else "")

    part = lambda a, b: a / b
    return markdown([*titles, "accuracy, points", *(f"{key}, part" for key in LOSS), "step, part", "run, part"],
                    ([*cells, cell("{:+.1f}", paired(mine, others, "accuracy", lambda a, b: 100 * (a - b))),
                      *(cell("{:.2f}", paired(mine, others, key, part)) for key in LOSS),
                      *("{:.2f}".format(mean(mine, key) / mean(others, key)) if mine[0][key] else "-"
                        for key in PRICE[:2])]
                     for cells, mine, others in pairs if mine and others))


def arms_table(*studies):
    """Each arm of these studies at its chosen rate."""
    def build(rows):
        names = [name for study in studies for name in sweep.ARMS[study]]
        lines = [((name, f"{mine[0]['lr']:g}"), mine) for name in names if (mine := best(rows, name))]
        return table(lines, ("arm", "lr"), ("accuracy", "domain NLL", *LOSS, *PRICE))
    return build


def same_rate(rows):
    """Arms against the full softmax, all with AdamW at the rate of 1.2e-3 (LoRA is not): nothing is chosen."""
    names = "tail+adamw", "anchor+adamw", *sweep.ARMS["texts"], *sweep.ARMS["beside"], *sweep.ARMS["rivals"]
    return against([((name,), at(select(rows, **ALL[name]), 1.2e-3), at(select(rows, **FULL), 1.2e-3))
                    for name in names], ["against full+adamw"])


def rates(arms):
    """These arms at every rate, of seed 0; a choice looks at validation only."""
    def build(rows):
        lines = [((name, f"{lr:g}", f"{mean(mine, 'domain_accuracy_validation'):.1%}"), mine) for name, arm in
                 arms.items() for lr in sweep.LADDER if (mine := at(select(rows, seed=0, **arm), lr))]
        return table(lines, ("arm", "lr", "accuracy, validation"), ("accuracy", *LOSS))
    return build


def dials(rows):
    """The anchor's dials, one at a time from the default."""
    values = [("the default", {}), *((dial, value) for dial, values in sweep.DIALS.items() for value in values
                                     if not value.items() <= sweep.DEFAULT.items())]
    lines = [((dial, ", ".join(map(str, value.values()))), select(rows, seed=0, lr=1.2e-3, **ANCHOR, **value))
             for dial, value in values]
    return table(lines, ("dial", "value"), ("tokens", "bytes", "accuracy", *LOSS, "ms a step"))


def longer(rows):
    """Does forgetting stay put? Four times as many steps, and twice the rate; figures.py shows steps between."""
    lines = [((name, s["steps"], f"{s['lr']:g}"), select(rows, **s)) for name in sweep.LONG for value in sweep.LONGER
             for s in [{"seed": 0, "lr": 1.2e-3, "steps": 200, **ALL[name], **value}] if s["steps"] in (200, 800)]
    return table(lines, ("arm", "steps", "lr"), ("accuracy", *LOSS, "run, s"))


def fixed(title, settings, *measures):
    """These settings, of three bases and one seed, at the rate of 8e-4."""
    return lambda rows: table([((name,), at(select(rows, seed=0, **mine), 8e-4)) for name, mine in settings.items()],
                              [title], ["accuracy", "domain NLL", *LOSS, *measures])


def bases(_):
    lines = [(row["base"], f"`{row['fingerprint']}`", f"{row['parameters']:,}", f"{row['domain_nll_test']:.3f}",
              f"{row['general_nll_test']:.3f}", f"{row['other_nll_test']:.3f}") for row in sweep.load()["bases"]]
    return markdown(["base seed", "fingerprint", "parameters", "domain NLL", "NLL of prose", "of other SQL"], lines)


def result(name):
    return json.loads((sweep.RESULTS.parent / f"{name}.json").read_text())


def first_run(_):
    """The table that train_small.py printed at its defaults."""
    found = result("default")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        sweep.script.print_table(found["base"], found["runs"])
    return "```\n" + out.getvalue() + "```"


def speed(device):
    return lambda _: markdown(["what", "measured", "aim"], ((row["what"], row["value"], row["target"])
                                                            for row in result(f"speed_{device}")["rows"]))


def costs(_):
    """Every arm's step, and its run of 200 and of 400 steps with all of Stage 0, as parts of full+adamw's."""
    full = times()[0]["step_ms"]
    return markdown(["arm", "ms a step", "part of full's step", "Stage 0, s", "part of its 200 steps", "of 400"],
                    ((arm["name"], f"{arm['step_ms']:.0f}", f"{arm['step_ms'] / full:.2f}", f"{arm['stage0_s']:.1f}",
                      *(f"{(arm['step_ms'] + 1e3 * arm['stage0_s'] / n) / full:.2f}" for n in (200, 400)))
                     for arm in times()))


def pretrained(domain, every_rate=False, seeds=1, file="pretrained", measures=("accuracy", "domain NLL", "prose lost",
                                                                               "chat KL", "chat same")):
    """A pretrained model, ± over seeds: each arm at the rate that validation chooses, or at every rate, of seed 0."""
    keys = {"domain_accuracy": "accuracy", "domain_nll": "domain NLL", "forgetting": "prose lost",
            "chat_kl": "chat KL", "chat_same": "chat same", "step_ms": "ms a step"}
    shown = ["domain_accuracy_validation"] * every_rate + [*measures]

    def build(_):
        arms = collections.defaultdict(list)
        for row in result(file):
            if row["domain"] == domain and row["method"] != "base":
                name = ", ".join(filter(None, (row["method"], row["variant"])))
                name += ", a tail of {tail}".format_map(row) * (row["tail"] != 256)
                if row["method"].startswith("anchor") or row["variant"] in sweep.rivals.ON_TEXT:
                    name += ", {anchor_text} text, {anchor_step} a step, weight {anchor_weight:g}".format_map(row)
                arms[name].append({**row, **{new: row[old] for old, new in keys.items()}})
        lines = [((name, f"{lr:g}", len(mine)), mine) for name, rows in sorted(arms.items())
                 for lr in (sorted({row["lr"] for row in rows}) if every_rate else [chosen(rows)])
                 if len(mine := [row for row in at(rows, lr) if not every_rate or row["seed"] == 0]) >= seeds]
        return table(lines, ("arm", "lr", "seeds"), shown)
    return build


TABLES = {"main": arms_table("main", "moclip"), "rivals": arms_table("rivals"), "costs": costs,
          "rates": rates(sweep.ARMS["main"]), "all rates": rates(ALL),
          "texts": arms_table("texts", "beside"), "same rate": same_rate, "dials": dials,
          "longer": longer, "bases": bases, "first run": first_run, "speed": speed("cpu"),
          "pretrained": pretrained("sql", seeds=2), "calls": pretrained("calls"),
          "pretrained rates": pretrained("sql", every_rate=True), "speed cuda": speed("cuda"),
          "pretrained costs": pretrained("sql", file="pretrained_cpu", measures=["ms a step"]),
          "record": fixed("loss, recorded", {**{f"replay, tau = {t}": {**sweep.REPLAY, "tau": t} for t in sweep.TAUS},
                                             "tail, tau = 0.9": TAIL,
                                             "tail, gold only": {**TAIL, "variant": "gold only"}}, "outside mass"),
          "cap": fixed("tail+moclip", {f"cap {cap:g}°": {**ALL["tail+moclip"], "max_angle": cap}
                                       for cap in (60.0, 90.0, 180.0)}, "clipped")}


def fill(text, rows):
    """`text` with every table between its marks made anew."""
    return re.sub(r"(<!-- table (.+?) -->\n).*?(<!-- end -->)",
                  lambda match: f"{match[1]}{TABLES[match[2]](rows)}\n{match[3]}", text, flags=re.DOTALL)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", nargs="?", choices=TABLES, help="print this table, and write nothing")
    name, rows = parser.parse_args().name, load()
    if name:
        return print(TABLES[name](rows))
    for path in READMES:
        path.write_text(fill(path.read_text(), rows))


if __name__ == "__main__":
    main()
