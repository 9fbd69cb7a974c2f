"""The study: a resumable grid over train_small.py. report.py makes its tables: README.md and TABLES.md.

    python experiments/sweep.py [--only STUDY ...] [--workers 2]      # what is missing; about 50 s a run and worker

Every run is a row of experiments/results/sweep.json, written as soon as it is finished; an interrupted study goes on
where it stopped. A setting is chosen on validation questions and reported on test questions: a row has both. A base is
known by the fingerprint of its weights: another machine may make another one from the same seed, and starts anew.
"""

import argparse
import collections
import copy
import functools
import itertools
import json
import math
import multiprocessing
import random
import re
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import rivals  # noqa: E402  (its folder is on the path only now)
import train_small as script  # noqa: E402

RESULTS, CPU = ROOT / "experiments/results/sweep.json", torch.device("cpu")
DEFAULT = dict(base=0, width=script.WIDTH, method="tail+adamw", variant="", tau=0.9, tail=256, lr=6e-4, max_angle=90.0,
               scope="global", batch=32, steps=200, seed=0)
BASES, RATES = (0, 1, 2), (2e-4, 4e-4, 6e-4, 8e-4, 1.2e-3, 1.6e-3, 2.4e-3, 3.2e-3)
CENTRE, DOUBLED = (4e-4, 6e-4, 8e-4, 1.2e-3), (4e-4, 8e-4, 1.6e-3)
TAUS = (0.01, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
FOUR, THREE = ("full+adamw", "full+moclip", "tail+adamw", "tail+moclip"), ("full+adamw", "tail+adamw", "tail+moclip")
RIVALS = ("head frozen", "head rows of the batch", "mixed", "KL to base", "matched norm", "torque-aware")
ALPHAS, EPS = ("interpolated, 0.5", "interpolated, 0.75"), ("eps 1e-06", "eps 1e-05", "eps 0.0001", "eps 0.001")
PARTS = "eps 0.0001, head", "eps 0.0001, body"


def grid():
    """{study: its settings}, the most telling studies first; a run in two studies is run once."""
    def runs(**lists):
        lists = {"seed": 0, "base": BASES, **lists}  # the first varies slowest: all bases early
        values = [x if isinstance(x, (tuple, list)) else (x,) for x in lists.values()]
        return [{**DEFAULT, **dict(zip(lists, combination))} for combination in itertools.product(*values)]

    sizes, six = (0, 16, 64, 256, 1024, script.V), script.METHODS
    return {
        "main": runs(method=six, lr=RATES),
        "main, seed 1": runs(seed=1, method=FOUR, lr=(6e-4, 8e-4)) + runs(seed=1, method="replay+adamw", lr=4e-4)
        + runs(seed=1, method="replay+moclip", lr=2e-4) + runs(seed=1, method="full+adamw", lr=(4e-4, 2.4e-3)),
        "rivals": [run for variant in RIVALS for run in runs(method="full+adamw", variant=variant, lr=(6e-4, 8e-4))]
        + runs(method="full+adamw", variant="head frozen", lr=CENTRE)
        + runs(method="tail+adamw", variant=("KL to base", "mixed"), lr=(6e-4, 8e-4)),
        "record": runs(tail=(0, 16, 256), tau=(0.01, 0.9)) + runs(tail=(16, 256), variant="gold only"),
        "cap": runs(method=("tail+moclip", "full+moclip"), max_angle=(60.0, 90.0, 180.0))
        + runs(method="tail+moclip", batch=8, max_angle=(60.0, 90.0, 180.0)),
        "tau": runs(method=("tail+adamw", "replay+adamw"), tau=(0.9, 0.95, 0.99)),
        "record by rate": runs(variant="gold only", lr=CENTRE),
        "eps": runs(method="full+adamw", variant=EPS[1:3], lr=(6e-4, 8e-4)) + runs(variant=EPS[2], lr=(6e-4, 8e-4)),
        "eps by rate": runs(seed=1, method=("full+adamw", "tail+adamw"), variant=EPS[2], lr=8e-4)
        + runs(method=("full+adamw", "tail+adamw"), variant=EPS[2], lr=RATES)
        + runs(method="full+adamw", variant=EPS[3], lr=RATES[3:]),
        "eps, a part": runs(method="full+adamw", variant=PARTS, lr=(6e-4, 8e-4)),
        "small cap": runs(method=("full+moclip", "tail+moclip"), max_angle=60.0, lr=(2e-4, 3e-4)),
        "rivals, tail": runs(method="full+adamw", variant="KL every 5th step")
        + runs(variant=("KL every 5th step", "matched norm")),
        # on one base
        "batch": [run for batch, steps in ((128, 100), (8, 200)) for variant, method in
                  (("", THREE), ("gold only", "tail+adamw"))
                  for run in runs(method=method, variant=variant, batch=batch, steps=steps, lr=DOUBLED, base=0)]
        + runs(variant="gold only", lr=8e-4, base=0),
        "controls": runs(variant=("uniform only", "frozen sum"), base=0)
        + runs(variant="uniform only", tail=1024, base=0),
        "recorded late": runs(method="replay+adamw", tau=0.98, lr=4e-4, base=0,
                              variant=("", "recorded at 40", "recorded every epoch")),
        "stability": runs(method=FOUR, variant=("bfloat16", "spikes"), base=0) + runs(method=FOUR, lr=1.28e-2, base=0),
        "rivals by rate": [run for variant in RIVALS for run in
                           runs(method="full+adamw", variant=variant, lr=(*CENTRE, 1.6e-3), base=0)]
        + runs(method="full+adamw", variant=("head frozen", "head rows of the batch"), lr=RATES, base=0),
        "record by size": runs(tail=sizes, tau=(0.01, 0.9), base=0) + runs(tail=sizes[1:], variant="gold only", base=0),
        "tau, all": runs(method=("tail+adamw", "replay+adamw"), tau=TAUS, base=0),
        "small cap, all": [run for cap, lrs in ((60.0, (1e-4, 2e-4, 3e-4, 4e-4)), (75.0, (2e-4, 4e-4, 6e-4)),
                                                (45.0, (1e-4, 2e-4)))
                           for run in runs(method=("full+moclip", "tail+moclip"), max_angle=cap, lr=lrs, base=0)],
        "interpolation": runs(method="full+adamw", variant=ALPHAS, lr=(8e-4, 1.6e-3, 2.4e-3), base=0),
        "eps, all": runs(method="full+adamw", variant=EPS, lr=(6e-4, 8e-4), base=0),
        "scope": runs(method="tail+moclip", scope=("global", "tensor"), base=0),
        "size": [run for width in (96, 384) for run in runs(method=THREE, width=width, lr=DOUBLED, base=0)],
        "advice": [run for at in (dict(tail=(64, 256, 1024)), dict(tau=(0.01, 0.5, 0.98)), dict(variant="gold only"))
                   for run in runs(**at, width=96, lr=8e-4, base=0)],
    }


def name_of(settings):
    return json.dumps(settings, sort_keys=True)


def at_width(width):
    script.WIDTH, script.HEADS = width, width // 32


def other_sql(data):
    """Questions and their SQL over schemas that pretraining never saw, tokens and targets: what the base could do."""
    rng = random.Random("other")
    counts = collections.Counter(re.findall(r"\b[a-z]{4,9}\b", data.tokenizer.decode(data.streams[0].tolist())))
    words = [word for word, _ in counts.most_common(100)]
    schemas = [script.random_schema(rng, words) for _ in range(20)]
    pairs = [script.ask(rng, rng.choice(list(script.FORMS)), rng.choice(schemas), {}) for _ in range(200)]
    return script.encode_domain(data.tokenizer, pairs)


@functools.cache
def prepared(seed, width):
    """Data, base model and its general NLLs, and an empty cache of records; pretrains the base if it is not there."""
    at_width(width)
    settings = dict(script.BASE, seed=seed)
    data = script.prepare(settings, 120)
    data.other_sql = other_sql(data)
    (ROOT / "runs").mkdir(exist_ok=True)
    state, _ = script.load_base(data, settings, ROOT / "runs", CPU)
    model = script.Model()
    model.load_state_dict(state)
    return SimpleNamespace(data=data, model=model.eval(), fingerprint=script.fingerprint(state), records={})


@torch.no_grad()
def measured(model, base):
    """{measure_part: value} on validation and test questions, in one pass; nats per token under the full softmax.

    general_nll_golds, general_nll_other: of the general text's tokens that are golds of the domain, and of the others.
    other_sql_nll: of SQL over schemas that neither pretraining nor the domain has.
    """
    model.eval()
    data, golds = base.data, torch.zeros(script.V, dtype=torch.bool)
    out = {"other_sql_nll": script.nll(model, *data.other_sql, CPU)}
    golds[data.domain_train[1][data.domain_train[1] != script.IGNORE]] = True
    pairs = data.validation + data.test
    answers = script.generate(model, data.tokenizer, [question for question, _ in pairs], CPU)
    right = [data.database.agrees(answer, gold) for answer, (_, gold) in zip(answers, pairs)]
    n = len(data.validation)
    for part, mine in (("validation", right[:n]), ("test", right[n:])):
        total, count = torch.zeros(2), torch.zeros(2)
        for x, y in zip(*(tensor.split(64) for tensor in getattr(data, f"general_{part}"))):
            hidden, gold = script.scored_hidden(model, x, y, CPU)
            nll = F.linear_cross_entropy(hidden, model.embedding.weight, gold, reduction="none")
            total.index_add_(0, golds[gold].long(), nll)
            count.index_add_(0, golds[gold].long(), torch.ones_like(nll))
        values = {"domain_accuracy": sum(mine) / len(mine),
                  "domain_nll": script.nll(model, *getattr(data, f"domain_{part}"), CPU),
                  "general_nll": (total.sum() / count.sum()).item(), "general_nll_other": (total / count)[0].item(),
                  "general_nll_golds": (total / count)[1].item()}
        out |= {f"{key}_{part}": value for key, value in values.items()}
    return out


def head_moved(model, base):
    """How far the rows of the (tied) head went: all, and those of tokens that the domain's training text never has."""
    step = model.embedding.weight.detach() - base.model.embedding.weight.detach()
    seen = torch.zeros(len(step), dtype=torch.bool)
    for part in base.data.domain_train:
        seen[part[part != script.IGNORE]] = True
    return {"head_moved": step.norm().item(), "head_moved_unseen": step[~seen].norm().item(),
            "head_rows_moved": (step != 0).any(1).sum().item()}


def spikes(losses):
    """Steps whose training loss is more than twice the median of the 10 before it."""
    return sum(losses[i] > 2 * statistics.median(losses[i - 10:i]) for i in range(10, len(losses)))


def run(settings):
    """One fine-tuning run; returns its row."""
    s, start = SimpleNamespace(**settings), time.time()
    base = prepared(s.base, s.width)
    at_width(s.width)
    if s.tau not in base.records:
        base.records[s.tau] = script.stage0(base.model, *base.data.domain_train, s.tau, CPU)
    model, record = copy.deepcopy(base.model), base.records[s.tau]
    c = SimpleNamespace(model=model, base=base.model, data=base.data, record=record, args=s, method=s.method,
                        seed=s.seed, generator=torch.Generator().manual_seed(2**31 + s.seed))
    score, optimizer = rivals.VARIANTS[s.variant](c)
    score, losses, angles = score or rivals.own(c), [], []

    def logged(*inputs):
        loss = score(*inputs)
        losses.append(loss.item())
        return loss

    optimizer = optimizer or script.make_optimizer(s.method, model.parameters(), s)
    if "moclip" in s.method:
        optimizer.param_groups[0]["scope"] = s.scope
        optimizer.register_step_post_hook(lambda *_: angles.append(math.degrees(optimizer.last_angle.mean())))
    probe = script.outside_mass_probe(*base.data.domain_train, CPU)
    out = script.finetune(model, s.method, base.data.domain_train, record, probe, s, s.seed, CPU, logged, optimizer)
    model.float()
    out |= measured(model, base) | head_moved(model, base)
    out |= {"spikes": spikes(losses), "seconds": time.time() - start}
    if angles:
        out["angle_quantiles_deg"] = [sorted(angles)[int(q * (len(angles) - 1))] for q in (0.05, 0.5, 0.95)]
    return {"settings": settings, "base": base.fingerprint, **out}


def base_row(seed, width):
    base = prepared(seed, width)
    parameters = sum(p.numel() for p in base.model.parameters())
    return {"base": seed, "width": width, "fingerprint": base.fingerprint, "parameters": parameters,
            **measured(base.model, base)}


def one_thread():
    torch.set_num_threads(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=grid(), default=list(grid()))
    parser.add_argument("--bases", nargs="+", type=int, default=BASES, help="base seeds, to run some first")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    args = parser.parse_args()
    done = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"bases": [], "runs": []}
    wanted = {name_of(s): s for study in args.only for s in grid()[study] if s["base"] in args.bases}.values()

    def keep():
        lines = {key: ",\n".join(map(json.dumps, rows)) for key, rows in done.items()}
        text = "{" + ",\n".join(f'"{key}": [\n{rows}\n]' for key, rows in lines.items()) + "}\n"
        script.write_atomically(RESULTS, lambda temporary: temporary.write_text(text))

    for seed, width in dict.fromkeys((s["base"], s["width"]) for s in wanted):
        fingerprint = prepared(seed, width).fingerprint  # pretrained here, with all threads, as train_small.py does it
        if not any(row["fingerprint"] == fingerprint for row in done["bases"]):
            done["bases"].append(base_row(seed, width))
            keep()
    current = {row["fingerprint"] for row in done["bases"]} & {prepared(*key).fingerprint for key in
                                                              {(s["base"], s["width"]) for s in wanted}}
    finished = {name_of(row["settings"]) for row in done["runs"] if row["base"] in current}
    todo = [s for s in wanted if name_of(s) not in finished]
    with multiprocessing.get_context("spawn").Pool(args.workers, one_thread) as pool:
        for row in tqdm(pool.imap_unordered(run, todo), "study", len(todo)):
            done["runs"].append(row)
            keep()


if __name__ == "__main__":
    main()
