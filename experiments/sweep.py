"""The study: which loss learns most and forgets least, at what price, and against what one would use instead?

README's recommendation rests on it, and every table here but those of speed and of pretrained models (report.py).

    python -m experiments.sweep [--only STUDY ...] [--bases 0 1 2] [--workers 2]     # what is missing; a minute a run

Every run is a row of experiments/results/sweep.json, written as soon as it is finished; an interrupted study goes on
where it stopped. A setting is chosen on validation questions and reported on test questions: a row has both. Every arm
has four learning rates, and the next one as long as its best lies at their edge (study "edges"). A base is known by the
fingerprint of its weights: another processor may make another one from the same seed, and needs a results file anew.
"""

import argparse
import copy
import functools
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import train_small as script
from experiments import rivals

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments/results/sweep.json"
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
MACHINE = f"{torch.cuda.get_device_name() if DEVICE.type == 'cuda' else DEVICE}, torch {torch.__version__}"
DEFAULT = dict(base=0, seed=0, method="full+adamw", variant="", lr=1.2e-3, steps=200, batch=32, max_angle=90.0,
               tau=0.9, tail=256, text="own", windows=120, anchor_tau=0.98, anchor_size=32, anchor_gold=True,
               anchor_step=2, anchor_weight=0.3)
BASES, RATES, LARGE = (0, 1, 2), (4e-4, 8e-4, 1.2e-3, 1.6e-3), (1.6e-3, 3.2e-3, 6.4e-3, 1.28e-2)
LADDER = sorted({1e-4, 2e-4, 2.4e-3, 2.56e-2, *RATES, *LARGE})
FULL, TAIL, REPLAY, ANCHOR = (dict(method=f"{loss}+adamw") for loss in ("full", "tail", "replay", "anchor"))
TAUS = 0.9, 0.98, 0.999
ARMS = {
    "main": {"full+adamw": FULL, "tail+adamw": TAIL, "replay+adamw": REPLAY, "anchor+adamw": ANCHOR},
    "moclip": {method: dict(method=method) for method in ("anchor+moclip", "full+moclip", "tail+moclip")},
    "rivals": {variant: dict(FULL, variant=variant) for variant in
               ("LoRA 8", "LoRA 32", "L2-SP 0.001", "L2-SP 0.01", "L2-SP 0.03", "eps 0.0001", "KL to base", "mixed",
                "own tokens")},
    "texts": {f"anchor+adamw, {text}": dict(ANCHOR, text=text.split()[0]) for text in ("given text", "both texts")},
    "beside": {"anchor+adamw, full softmax": dict(ANCHOR, variant="full softmax"),
               "anchor+adamw, gold only": dict(ANCHOR, variant="gold only, anchor")}}
"""study -> arm -> its settings, but for base, seed and learning rate."""
ALL = {name: arm for arms in ARMS.values() for name, arm in arms.items()}
DIALS = {
    "tau, max_size": [dict(anchor_tau=tau, anchor_size=size)
                      for tau, size in ((0.5, None), (0.9, 16), (0.98, 16), (0.98, 32), (0.999, 64))],
    "windows in all": [dict(windows=count) for count in (20, 60, 120, 600)],
    "windows a step": [dict(anchor_step=count) for count in (1, 2, 4)],
    "weight": [dict(anchor_weight=weight) for weight in (0.1, 0.3, 0.5, 1.0, 3.0)],
    "begun with": [dict(text=text) for text in ("own", "own, end of text", "own, any token")],
    "gold in S": [dict(anchor_gold=gold) for gold in (True, False)]}
"""dial -> its values, for anchor+adamw, one at a time."""
LONGER = [*(dict(steps=steps) for steps in (100, 200, 400, 800)), dict(lr=2.4e-3)]
LONG = "full+adamw", "tail+adamw", "anchor+adamw", "KL to base", "L2-SP 0.03"  # does forgetting stay put?


def studies(rows):
    """{study: its settings}, the most telling first; "edges" and "seed 1" depend on the rows that are there."""
    def runs(arms, lrs=RATES, bases=BASES, **settings):  # the first varies slowest: all bases early
        return [{**DEFAULT, **arm, "base": base, "lr": lr, **settings} for base in bases for lr in lrs for arm in arms]

    tried = [(arm, mine) for arm in ALL.values() if (mine := select(rows, **arm))]
    return {**{study: [run for name, arm in mine.items() for run in runs([arm], LARGE if "LoRA" in name else RATES)]
               for study, mine in ARMS.items()},
            "edges": [run for arm, mine in tried for run in runs([arm], beyond(mine))],
            "seed 1": [run for arm, mine in tried
                       for run in runs([arm], {1.2e-3, chosen(mine)} & {*by_rate(mine)}, seed=1)],
            "dials": runs([{**ANCHOR, **value} for values in DIALS.values() for value in values], [1.2e-3]),
            "longer": [run for value in LONGER for run in runs([ALL[arm] for arm in LONG], [1.2e-3], **value)],
            "record": runs([TAIL, dict(TAIL, variant="gold only"), *(dict(REPLAY, tau=tau) for tau in TAUS)], [8e-4]),
            "cap": [run for cap in (60.0, 90.0, 180.0)
                    for run in runs([dict(method="tail+moclip")], [8e-4], max_angle=cap)]}


# ----------------------------------------------------------------------------------------------- the choice of a rate

def settings_of(row):
    return {name: row.get(name, default) for name, default in DEFAULT.items()}


def select(rows, **settings):
    """The rows with these settings; what is not named is DEFAULT's, but for lr, base and seed, which are free."""
    wanted = {**{name: value for name, value in DEFAULT.items() if name not in ("lr", "base", "seed")}, **settings}
    return [row for row in rows if wanted.items() <= settings_of(row).items()]


def by_rate(rows):
    """{lr: mean validation accuracy}, of seed 0, over the rates that were run on the most bases, ascending."""
    groups = {lr: [row["domain_accuracy_validation"] for row in rows if (row["lr"], row["seed"]) == (lr, 0)]
              for lr in sorted({row["lr"] for row in rows if row["seed"] == 0})}
    most = max(map(len, groups.values()))
    return {lr: statistics.mean(group) for lr, group in groups.items() if len(group) == most}


def chosen(rows, tolerance=0.02):
    """The smallest rate whose validation accuracy is within two points of the best: above, mostly forgetting grows.

    Two points are two standard errors of a mean over the 915 validation questions of three bases.
    """
    found = by_rate(rows)
    return next(lr for lr, accuracy in found.items() if accuracy >= max(found.values()) - tolerance)


def beyond(rows):
    """The rates that are still to be tried: none, or the neighbour of the best one if that lies at the edge."""
    found = by_rate(rows)
    tried, best = sorted(found), max(found, key=found.get)
    return ([lr for lr in LADDER if lr < best][-1:] if best == tried[0] else
            [lr for lr in LADDER if lr > best][:1] if best == tried[-1] else [])


# ------------------------------------------------------------------------------------------------------------ a run

@functools.cache
def prepared(seed):
    """Data, base model, its fingerprint, and an empty store of what Stage 0 makes; pretrains a base that is missing."""
    settings = dict(script.BASE, seed=seed)
    data = script.prepare(settings, 120)
    (ROOT / "runs").mkdir(exist_ok=True)
    state, _ = script.load_base(data, settings, ROOT / "runs", DEVICE)
    model = script.Model().to(DEVICE)
    model.load_state_dict(state)
    return SimpleNamespace(data=data, model=model.eval(), fingerprint=script.fingerprint(state), stored={})


def stored(base, key, make):
    """(what `make` makes, the seconds that it took): made once for a base."""
    if key not in base.stored:
        start = time.perf_counter()
        made = make()
        base.stored[key] = made, time.perf_counter() - start
    return base.stored[key]


def windows(base, s):
    """The anchor's text, (s.windows, context + 1)."""
    own = lambda count: script.write_text(base.model, base.data.tokenizer.end, count, DEVICE, s.seed)
    given = lambda count: next(script.batches(base.data.streams[:2], dict(batch=count, seed=s.seed), base.data.context))
    if s.text == "given":
        return given(s.windows)  # half prose, half SQL, of what the base was pretrained on
    if s.text == "both":
        return torch.cat([own(s.windows // 2), given(s.windows // 2)])
    if s.text == "own":
        return own(s.windows)  # the first half begins with the end of text, the other half with any token
    return own(2 * s.windows)[:s.windows] if s.text == "own, end of text" else own(2 * s.windows)[s.windows:]


def recorded(base, text, s):
    """The anchor: text and record. Without gold: the most probable token, in S anyway, is recorded in its place."""
    tokens, targets, head = text[:, :-1], text[:, 1:], base.model.embedding.weight
    if not s.anchor_gold:
        with torch.no_grad():
            targets = torch.cat([(base.model(x) @ head.T).argmax(-1) for x in tokens.split(32)])
    record = script.stage0(base.model, tokens, targets, s.anchor_tau, DEVICE, max_size=s.anchor_size,
                           keep_log_probs=True)
    return SimpleNamespace(tokens=tokens, record=record)


def stage0(base, s):
    """(record, text, anchor, what it took): all that Stage 0 makes; an arm pays for what it needs."""
    # the outside mass is measured on the domain's record for every arm
    record, seconds = stored(base, s.tau, lambda: script.stage0(base.model, *base.data.domain_train, s.tau, DEVICE))
    needed = not s.method.startswith("full") and s.variant not in rivals.UNRECORDED
    cost = {"stage0_s": seconds * needed, "record_bytes": len(record) * script.record_bytes(record) * needed}
    text, anchor, key = None, None, (s.text, s.windows, s.seed)
    if s.method.startswith("anchor") or s.variant in rivals.ON_TEXT:
        text, seconds = stored(base, key, lambda: windows(base, s).to(DEVICE))
        cost["stage0_s"] += seconds
    if s.method.startswith("anchor"):
        key = *key, s.anchor_tau, s.anchor_size, s.anchor_gold
        anchor, seconds = stored(base, key, lambda: recorded(base, text, s))
        sizes, width = anchor.record.subset_sizes, script.record_bytes(anchor.record)
        cost["stage0_s"] += seconds
        cost |= {"anchor_bytes": len(sizes) * width, "anchor_bytes_a_position": width,
                 "anchor_tokens_a_position": sizes.float().mean().item(),
                 "anchor_outside_mass": anchor.record.outside_mass.mean().item(),
                 "anchor_single_token": (sizes == 1).float().mean().item()}  # its blind spot
    return record, text, anchor, cost


def measured(model, data):
    """{measure_part: value} on validation and test, nats per token under the full softmax."""
    return {f"{measure}_{part}": value for part in ("validation", "test")
            for measure, value in script.evaluate(model, data, DEVICE, part).items() if measure != "samples"}


def train(base, s):
    """(fine-tuned model, what training and Stage 0 took)."""
    data, model = base.data, copy.deepcopy(base.model)
    record, text, anchor, cost = stage0(base, s)
    c = SimpleNamespace(model=model, base=base.model, data=data, record=record, anchor=anchor, text=text, args=s,
                        method=s.method, generator=torch.Generator(DEVICE).manual_seed(2**31 + s.seed))
    score, optimizer = rivals.VARIANTS[s.variant](c)
    probe = script.outside_mass_probe(*data.domain_train, DEVICE)
    out = script.finetune(model, s.method, data.domain_train, record, probe, s, s.seed, DEVICE, anchor, score,
                          optimizer)
    return model, out | cost | {"trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def run(settings):
    """One run's row: the settings, the base's fingerprint, and what was measured."""
    base, start = prepared(settings["base"]), time.perf_counter()
    model, out = train(base, SimpleNamespace(**settings))
    out |= measured(model, base.data)
    return {**settings, "fingerprint": base.fingerprint, "machine": MACHINE, **out,
            "seconds": time.perf_counter() - start}


def load():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"bases": [], "runs": []}


def main():
    parser, names = argparse.ArgumentParser(description=__doc__.split("\n")[0]), list(studies([]))
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--bases", nargs="+", type=int, choices=BASES, default=BASES, help="to run some first")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    args = parser.parse_args()
    done = load()

    def keep():
        lines = {key: ",\n".join(map(json.dumps, rows)) for key, rows in done.items()}
        text = "{" + ",\n".join(f'"{key}": [\n{rows}\n]' for key, rows in lines.items()) + "}\n"
        script.write_atomically(RESULTS, lambda file: file.write(text.encode()))

    for seed in args.bases:
        base = prepared(seed)  # pretrained here, with all threads, as train_small.py does it
        mine = [row for row in done["bases"] if row["base"] == seed]
        if any(row["fingerprint"] != base.fingerprint for row in mine):
            raise SystemExit(f"{RESULTS}: base {seed} there has other weights than the one here; move the file away")
        if not mine:
            done["bases"].append({"base": seed, "fingerprint": base.fingerprint, **measured(base.model, base.data),
                                  "parameters": sum(p.numel() for p in base.model.parameters())})
            keep()
    with multiprocessing.get_context("spawn").Pool(args.workers, torch.set_num_threads, (1,)) as pool:
        for study in args.only:
            while True:  # "edges" asks again
                finished = [settings_of(row) for row in done["runs"]]
                wanted = [s for s in studies(done["runs"])[study] if s["base"] in args.bases and s not in finished]
                todo = [s for i, s in enumerate(wanted) if s not in wanted[:i]]
                if not todo:
                    break
                for row in tqdm(pool.imap_unordered(run, todo), study, len(todo)):
                    done["runs"].append(row)
                    keep()


if __name__ == "__main__":
    main()
