"""Logits Replay + MoClip end to end: pretrain a compact LM, record, fine-tune four ways, measure what was forgotten.

    python train_small.py              # first run pretrains and caches the base; later runs start from the cache
    python train_small.py --quick      # smoke run of the same code path
    python train_small.py --tau 0.8    # see the outside mass run away
    python train_small.py --record-at 0 69 138   # see it held down: Stage 0 again at every epoch, with the model as it is then
    python train_small.py --batch 128 --steps 100 --lr 8e-4 --record-at 17 34 51 68 85   # replay at its best: see README.md

Nothing is downloaded. Read top to bottom: 1 general text, 2 domain, 3 tokenizer, 4 model, 5 base, 6 Stage 0,
7 Stage 1, 8 evaluation, 9 the run. General text is the English prose that ships with every CPython; the domain is
questions to SQL over a small telecom database; what counts in the domain is whether the generated SQL, run on the
database, returns the right rows. The base has seen prose, and SQL over other, random schemas: it knows SQL, not this database.

Shapes: B sequences of T tokens, flattened row-major to N positions; d = width, V = vocabulary size.
"""

import argparse
import ast
import collections
import copy
import hashlib
import inspect
import itertools
import json
import math
import os
import platform
import random
import re
import sqlite3
import statistics
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from logits_replay import ReplayRecord, linear_replay_cross_entropy, outside_mass, record_topk
from moclip import MoClip

V, WIDTH, LAYERS, HEADS, CONTEXT = 12288, 192, 2, 6, 80
IGNORE = -100
BASE = dict(steps=700, batch=24, lr=3e-3, seed=0, schemas=400, sql_examples=12000)
QUICK_BASE = dict(BASE, steps=60, batch=8, sql_examples=2000)
METHODS = ("full+adamw", "full+moclip", "replay+adamw", "replay+moclip")


# ---------------------------------------------------------------------------------------------- 1. general text

def general_documents():
    """English prose in every CPython: the language reference topics, and each standard-library module's docstrings."""
    from pydoc_data.topics import topics
    documents = {f"topic {name}": text for name, text in topics.items()}
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for folder in (".", "*", "*/*") for path in root.glob(f"{folder}/*.py")]
    files = [path for path in files if not {"test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3",
                                            "pydoc_data", "encodings"} & set(path.relative_to(root).parts)]
    for path in tqdm(sorted(set(files)), "harvesting docstrings", disable=None, leave=False):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        text = "\n\n".join(filter(None, (ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, nodes))))
        if len(text) > 200:
            documents[str(path.relative_to(root))] = text
    return documents


# ---------------------------------------------------------------------------------------------- 2. the domain

# table -> column -> values: a list (text, first column is the row's name) or a range (numbers); and how people say it
TELECOM = {
    "site": {"name": [f"{a} {b}" for a in ("North", "South", "East", "West", "Upper", "Lower", "Old", "New")
                      for b in ("Hill", "Bridge", "Park", "Gate", "Lake")],
             "city": ["Oslo", "Paris", "Berlin", "Madrid", "Rome", "Vienna", "London", "Athens", "Dublin", "Prague"],
             "vendor": ["Alpha", "Delta", "Gamma", "Sigma", "Omega"],
             "height": range(10, 90), "year": range(1995, 2025)},
    "cell": {"code": [f"{a}{i}" for a in "ABCDEFGHJK" for i in range(10, 22)],
             "site": "site.name",
             "band": ["low", "middle", "high", "micro", "local", "shared"],
             "power": range(5, 80), "users": range(1, 400)},
    "alarm": {"number": [f"X{i}" for i in range(100, 300)],
              "cell": "cell.code",
              "kind": ["power", "link", "clock", "heat", "fan", "door", "signal", "config"],
              "severity": ["minor", "major", "critical", "warning"],
              "hours": range(1, 72), "cost": range(100, 900)},
}
SPOKEN = {"site": ["sites", "towers", "locations"], "cell": ["cells", "sectors", "carriers"],
          "alarm": ["alarms", "faults", "incidents"], "city": ["city", "town"], "vendor": ["vendor", "supplier", "maker"],
          "height": ["height", "elevation"], "year": ["year", "build date"], "band": ["band", "frequency"],
          "power": ["power", "output"], "users": ["users", "load"], "kind": ["kind", "type", "category"],
          "severity": ["severity", "level"], "hours": ["hours", "duration"], "cost": ["cost", "price"]}

# questions => SQL. {t} table, {i} its name column, {c} = {v} and {u}.{e} = {w} text columns with a value, {n} a number column,
# {x} {y} numbers, {k} a small one, {o} an operator, {g} an aggregate, {s} a sort order. Upper case: the same as people say it.
FORMS = """
how many {T} are there | count all {T} | what is the number of {T} | give the total count of {T} | tell me how many {T} we have | how many {T} do we run | number of {T} please => SELECT COUNT(*) FROM {t}
how many {T} have {C} '{v}' | count the {T} whose {C} is '{v}' => SELECT COUNT(*) FROM {t} WHERE {c} = '{v}'
how many {T} have {N} {O} {x} | count {T} with a {N} {O} {x} => SELECT COUNT(*) FROM {t} WHERE {n} {o} {x}
which {T} have {C} '{v}' | list {T} where the {C} is '{v}' => SELECT {i} FROM {t} WHERE {c} = '{v}'
which {T} have a {C} other than '{v}' | list {T} whose {C} is not '{v}' => SELECT {i} FROM {t} WHERE {c} != '{v}'
which {T} have {N} {O} {x} | show {T} with {N} {O} {x} => SELECT {i} FROM {t} WHERE {n} {o} {x}
which {T} have {N} between {x} and {y} | list {T} with {N} from {x} to {y} => SELECT {i} FROM {t} WHERE {n} BETWEEN {x} AND {y}
which {T} with {C} '{v}' have {N} {O} {x} | list {T} where {C} is '{v}' and {N} is {O} {x} => SELECT {i} FROM {t} WHERE {c} = '{v}' AND {n} {o} {x}
which {T} have {C} '{v}' or {N} {O} {x} | show {T} that have {C} '{v}' or else {N} {O} {x} => SELECT {i} FROM {t} WHERE {c} = '{v}' OR {n} {o} {x}
show the {N} of {T} with {C} '{v}' | what {N} do {T} with {C} '{v}' have => SELECT {n} FROM {t} WHERE {c} = '{v}'
what is the {G} {N} of all {T} | give the {G} {N} over {T} | {G} {N} of {T} => SELECT {g}({n}) FROM {t}
what is the {G} {N} of {T} with {C} '{v}' | for {T} whose {C} is '{v}' give the {G} {N} => SELECT {g}({n}) FROM {t} WHERE {c} = '{v}'
how many {T} are there for each {C} | count {T} per {C} | number of {T} by {C} => SELECT {c}, COUNT(*) FROM {t} GROUP BY {c}
what is the {G} {N} of {T} for each {C} | {G} {N} of {T} per {C} => SELECT {c}, {g}({n}) FROM {t} GROUP BY {c}
which {C} values have more than {k} {T} | list each {C} that has over {k} {T} => SELECT {c} FROM {t} GROUP BY {c} HAVING COUNT(*) > {k}
which {k} {T} have the {S} {N} | list the {k} {T} with the {S} {N} => SELECT {i} FROM {t} ORDER BY {n} {s}, {i} LIMIT {k}
which {k} {T} with {C} '{v}' have the {S} {N} | of {T} with {C} '{v}' list the {k} with the {S} {N} => SELECT {i} FROM {t} WHERE {c} = '{v}' ORDER BY {n} {s}, {i} LIMIT {k}
which different {C} values do {T} with {N} {O} {x} have | list every {C} of {T} with {N} {O} {x} once => SELECT DISTINCT {c} FROM {t} WHERE {n} {o} {x}
which {T} with {C} '{v}' are {O} the average {N} | list {T} whose {C} is '{v}' and {N} {O} average => SELECT {i} FROM {t} WHERE {c} = '{v}' AND {n} {o} (SELECT AVG({n}) FROM {t})
how many {T} belong to {U} with {E} '{w}' | count {T} at {U} whose {E} is '{w}' => SELECT COUNT(*) FROM {t} JOIN {u} ON {t}.{f} = {u}.{j} WHERE {u}.{e} = '{w}'
which {T} with {N} {O} {x} belong to {U} with {E} '{w}' | list {T} at {U} whose {E} is '{w}' with {N} {O} {x} => SELECT {t}.{i} FROM {t} JOIN {u} ON {t}.{f} = {u}.{j} WHERE {u}.{e} = '{w}' AND {t}.{n} {o} {x}
"""
FORMS = {sql: questions.split(" | ") for questions, sql in (line.split(" => ") for line in FORMS.strip().splitlines())}
OPERATORS = {">": ["above", "over", "greater than"], "<": ["below", "under", "less than"]}
AGGREGATES = {"AVG": ["average", "mean"], "MAX": ["largest", "maximum"], "MIN": ["smallest", "minimum"], "SUM": ["total"]}
ORDERS = {"DESC": ["highest", "largest"], "ASC": ["lowest", "smallest"]}


def ask(rng, sql, schema, spoken):
    """One (question, SQL) pair of the form `sql` over the schema."""
    say = lambda name, words=spoken: rng.choice(words.get(name, [name]))
    joins = {t: next(((c, *v.split(".")) for c, v in columns.items() if isinstance(v, str)), None)
             for t, columns in schema.items()}
    t = rng.choice([t for t in schema if joins[t] or "{u}" not in sql])
    texts = lambda table: [c for c, v in list(schema[table].items())[1:] if isinstance(v, list)]
    numbers = [c for c, v in schema[t].items() if isinstance(v, range)]
    f, u, j = joins[t] or (None, t, None)
    c, e, n = rng.choice(texts(t)), rng.choice(texts(u)), rng.choice(numbers)
    x, y = sorted(rng.sample(schema[t][n], 2))
    o, g, s = rng.choice(list(OPERATORS)), rng.choice(list(AGGREGATES)), rng.choice(list(ORDERS))
    slots = dict(t=t, i=next(iter(schema[t])), c=c, v=rng.choice(schema[t][c]), n=n, x=x, y=y, k=rng.randint(2, 9), o=o, g=g,
                 s=s, f=f, u=u, j=j, e=e, w=rng.choice(schema[u][e]), T=say(t), U=say(u), C=say(c), E=say(e), N=say(n),
                 O=say(o, OPERATORS), G=say(g, AGGREGATES), S=say(s, ORDERS))
    return rng.choice(FORMS[sql]).format(**slots), sql.format(**slots)


def random_schema(rng, words):
    """A schema like the domain's with other names: two tables, the second one refers to the first."""
    names = iter(rng.sample(words, 12))
    values = lambda: rng.sample(words, 8)
    first, key = next(names), next(names)
    return {first: {key: values(), next(names): values(), next(names): values(), next(names): range(1, 100),
                    next(names): range(1900, 2025)},
            next(names): {next(names): values(), first: f"{first}.{key}", next(names): values(),
                          next(names): range(10, 1000), next(names): range(1, 50)}}


class Database:
    """The telecom tables in memory. The SQL that runs on it comes from a model: reading only, few steps, few rows."""

    def __init__(self, rng, rows=dict(site=40, cell=120, alarm=200)):
        self.connection = sqlite3.connect(":memory:")
        for t, columns in TELECOM.items():
            self.connection.execute(f"CREATE TABLE {t} ({', '.join(columns)})")
            pools = [TELECOM[v.split(".")[0]][v.split(".")[1]] if isinstance(v, str) else v for v in columns.values()]
            for i in range(rows[t]):
                row = [pool[i] if k == 0 else rng.choice(pool) for k, pool in enumerate(pools)]
                self.connection.execute(f"INSERT INTO {t} VALUES ({', '.join('?' * len(row))})", row)
        allowed = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ}
        self.connection.set_authorizer(lambda action, _, name, *__: sqlite3.SQLITE_OK if action in allowed or (
            action == sqlite3.SQLITE_FUNCTION and name in ("count", "sum", "avg", "min", "max")) else sqlite3.SQLITE_DENY)

    def rows(self, sql):
        """The rows of a query, at most 1000 of them; None if it fails."""
        thousands = itertools.count(1)
        self.connection.set_progress_handler(lambda: next(thousands) > 1000, 1000)  # stop after a million virtual-machine steps
        try:
            return self.connection.execute(sql).fetchmany(1000)
        except (sqlite3.Error, sqlite3.Warning, ValueError):
            return None

    def agrees(self, sql, gold):
        """Do both queries return the same rows, in the same order where the gold query asks for one?"""
        mine, right = self.rows(sql), self.rows(gold)
        return mine is not None and (mine == right if "ORDER BY" in gold else sorted(mine, key=repr) == sorted(right, key=repr))


def domain_split(rng, database, per_form):
    """Distinct questions with non-empty answers; of every form one in eight is held out. Returns (train, test)."""
    train, test = [], []
    for form in FORMS:
        pairs = {}
        for _ in range(20 * per_form):
            question, sql = ask(rng, form, TELECOM, SPOKEN)
            if len(pairs) < per_form and database.rows(sql) not in ([], [(0,)], [(None,)]):
                pairs[question] = sql
        pairs = list(pairs.items())
        held_out = max(1, len(pairs) // 8)
        test += pairs[:held_out]
        train += pairs[held_out:]
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def prompt(question):
    return f"Question: {question}?\nSQL:"


# ---------------------------------------------------------------------------------------------- 3. tokenizer

class Tokenizer:
    """Whole words, single digits and symbols by frequency, the 256 bytes for everything else: lossless on any text."""

    PIECE = re.compile(r" ?[A-Za-z]+| ?[0-9]| ?[^A-Za-z0-9\s]|\s+")

    def __init__(self, text, size):
        counts = collections.Counter(self.PIECE.findall(text))
        pieces = sorted(counts, key=lambda piece: (-counts[piece], piece))[:size - 257]
        self.end = 256
        self.id = {piece: 257 + i for i, piece in enumerate(pieces)}
        self.bytes = [bytes([i]) for i in range(256)] + [b""] + [p.encode(errors="surrogatepass") for p in pieces]

    def encode(self, text):
        ids = []
        for piece in self.PIECE.findall(text):
            ids += [self.id[piece]] if piece in self.id else piece.encode(errors="surrogatepass")
        return ids

    def decode(self, ids):
        data = b"".join(self.bytes[i] if i < len(self.bytes) else b"" for i in ids)
        try:
            return data.decode(errors="surrogatepass")
        except UnicodeDecodeError:  # a model may stop inside a character
            return data.decode(errors="replace")


# ---------------------------------------------------------------------------------------------- 4. model

def rotary(x, turn):
    """Rotate the pairs (x_i, x_i+h) of every head by position x frequency, so that attention sees relative positions."""
    a, b = x.chunk(2, -1)
    cos, sin = turn
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x, turn, past):
        B, T, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k = rotary(q, turn), rotary(k, turn)
        if past:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        x = x + self.out(attended.transpose(1, 2).reshape(B, T, WIDTH))
        return x + self.mlp(self.norm2(x)), (k, v)


class Model(nn.Module):
    """A pre-norm causal transformer with tied embeddings; returns hidden states, the losses apply the head."""

    def __init__(self):
        super().__init__()
        self.embedding, self.previous = nn.Embedding(V, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens, past=None):
        """tokens (B, T) -> hidden (B, T, d). `past`: a dict, {} at first, that keeps what the tokens after these need."""
        past = {} if past is None else past
        start = past[0][0].shape[2] if past else 0
        half = WIDTH // HEADS // 2
        angle = torch.outer(torch.arange(start, start + tokens.shape[1], device=tokens.device),
                            1e3 ** -(torch.arange(half, device=tokens.device) / half))
        x = self.embedding(tokens)
        turn = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        # each position also gets the token before it, so that a single layer can look up "what followed this last time?"
        before = past.get("last", torch.zeros_like(x[:, :1]))
        past["last"] = x[:, -1:]
        x = x + self.previous(torch.cat([before, x[:, :-1]], 1))
        for i, block in enumerate(self.blocks):
            x, past[i] = block(x, turn, past.get(i))
        return self.norm(x)


# ---------------------------------------------------------------------------------------------- 5. the base

def batches(streams, settings):
    """Batches (B, T + 1) of random windows, an equal share from each token stream."""
    generator = torch.Generator().manual_seed(settings["seed"])
    share, span = settings["batch"] // len(streams), CONTEXT + 1
    while True:
        yield torch.cat([stream.unfold(0, span, 1)[torch.randint(len(stream) - span, (share,), generator=generator)]
                         for stream in streams])


def warmup_then_linear(optimizer, steps):
    """Learning rate: up over the first tenth, then down to zero at the last step."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / (steps / 10), (steps - i) / (steps * 0.9), 1))


def pretrain(streams, settings, device):
    """Next-token prediction on the streams; returns the state dict, on the CPU."""
    torch.manual_seed(settings["seed"])
    model = Model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), settings["lr"], weight_decay=0.01)
    schedule = warmup_then_linear(optimizer, settings["steps"])
    bar = tqdm(range(settings["steps"]), "pretraining the base", disable=None)
    for _, tokens in zip(bar, batches(streams, settings)):
        tokens = tokens.to(device)
        hidden = model(tokens[:, :-1])
        loss = F.linear_cross_entropy(hidden.flatten(0, 1), model.embedding.weight, tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"{loss.item():.2f} nats", refresh=False)
    return {name: value.cpu() for name, value in model.state_dict().items()}


def write_atomically(path, write):
    """`write(temporary path)`, then rename: a crash leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    write(temporary)
    os.replace(temporary, path)


def digest(*things):
    return hashlib.sha256("\0".join(map(str, things)).encode(errors="surrogatepass")).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- 6. Stage 0

def encode_domain(tokenizer, pairs):
    """Tokens (M, T) and targets (M, T): the next token where it belongs to the SQL or ends it, IGNORE elsewhere."""
    rows = [(tokenizer.encode(prompt(q)), tokenizer.encode(" " + sql) + [tokenizer.end]) for q, sql in pairs]
    rows.sort(key=lambda row: len(row[0] + row[1]))
    T = max(len(p) + len(s) for p, s in rows) - 1
    assert T <= CONTEXT, f"an example of {T} tokens does not fit the context of {CONTEXT}"
    tokens = torch.tensor([(p + s + [tokenizer.end] * T)[:T] for p, s in rows])
    targets = torch.tensor([([IGNORE] * (len(p) - 1) + s + [IGNORE] * T)[:T] for p, s in rows])
    return tokens, targets


def scored_hidden(model, tokens, targets, device):
    """The model's hidden states (N, d) at the positions with a target, in row-major order, and those targets (N,)."""
    scored = targets != IGNORE
    used = int(scored.any(0).nonzero().max()) + 1  # the rest is padding
    return model(tokens[:, :used].to(device))[scored[:, :used].to(device)], targets[scored].to(device)


@torch.no_grad()
def stage0(model, tokens, targets, tau, device):
    """Record S_t for every scored position, in row-major order, under the model as it is."""
    model.eval()
    records = []
    for x, y in tqdm(list(zip(tokens.split(64), targets.split(64))), "Stage 0: recording", disable=None):
        hidden, gold = scored_hidden(model, x, y, device)
        records.append(record_topk(hidden @ model.embedding.weight.T, gold, tau))
    return ReplayRecord.concat(records)


# ---------------------------------------------------------------------------------------------- 7. Stage 1

def clock(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def domain_batches(targets, size, seed):
    """Batches of example numbers: an epoch is shuffled, then alike in length within 8 batches, so that little is padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = targets.shape[1] - (targets != IGNORE).flip(1).int().argmax(1)
    while True:
        chunks = torch.randperm(len(lengths), generator=generator).split(8 * size)
        epoch = torch.cat([chunk[lengths[chunk].argsort()] for chunk in chunks]).split(size)
        for i in torch.randperm(len(epoch), generator=generator):
            yield epoch[i]


def finetune(model, method, data, record, probe, args, seed, device):
    """Train on the domain's SQL tokens with one of the four methods; returns what was measured on the way.

    `record` is the base's; `probe(model, record)` returns the outside mass, which is followed for every method.
    """
    (tokens, targets), head = data, model.embedding.weight
    replay, moclip = method.startswith("replay"), method.endswith("moclip")
    if moclip:
        optimizer = MoClip(model.parameters(), args.lr, max_angle=math.radians(args.max_angle))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.0)
    schedule = warmup_then_linear(optimizer, args.steps)
    rows = torch.arange(len(record)).split((targets != IGNORE).sum(1).tolist())  # example -> its rows of the record
    step_ms, head_ms, angles, clipped, outside, stage0_s = [], [], [], [], [], 0.0
    model.train()
    bar = tqdm(range(args.steps), f"Stage 1: {method}, seed {seed}", disable=None)
    for step, batch in zip(bar, domain_batches(targets, args.batch, seed)):
        if step % max(1, args.steps // 10) == 0:
            outside.append([step, probe(model, record)])
        start = clock(device)
        if replay and step > 0 and step in args.record_at:  # Stage 0 late, or again: with the model as it is now
            record = stage0(model, tokens, targets, args.tau, device)
            model.train()
            stage0_s += clock(device) - start
            start = clock(device)
        hidden, gold = scored_hidden(model, tokens[batch], targets[batch], device)
        replayed = replay and step >= min(args.record_at)  # before the first Stage 0: the full softmax
        subsets = record.select(torch.cat([rows[i] for i in batch])) if replayed else None
        before_head = clock(device)
        h = hidden.detach().requires_grad_()  # cut here, so that the head can be timed; the gradient is the same
        if replayed:
            loss = linear_replay_cross_entropy(h, head, gold, subsets)
        else:
            loss = F.linear_cross_entropy(h, head, gold)
        optimizer.zero_grad()
        loss.backward()
        after_head = clock(device)
        hidden.backward(h.grad)
        optimizer.step()
        schedule.step()
        step_ms.append(1e3 * (clock(device) - start))
        head_ms.append(1e3 * (after_head - before_head))
        if moclip:
            angles.append(optimizer.last_angle)
            clipped.append(optimizer.last_clipped)
    outside.append([args.steps, probe(model, record)])
    return {"step_ms": statistics.median(step_ms), "head_ms": statistics.median(head_ms), "steps_s": sum(step_ms) / 1e3,
            "stage0_s": stage0_s, "train_nll_last": loss.item(),
            "subset_size_mean": record.subset_sizes.float().mean().item() if replay else V,
            "outside_mass_log": outside, "outside_mass_start": outside[0][1], "outside_mass_end": outside[-1][1],
            "angle_mean_deg": math.degrees(torch.stack(angles).mean()) if moclip else None,
            "clip_fraction": torch.stack(clipped).float().mean().item() if moclip else None}


# ---------------------------------------------------------------------------------------------- 8. evaluation

@torch.no_grad()
def nll(model, tokens, targets, device):
    """Mean nats per scored token under the full softmax."""
    model.eval()
    total = 0.0
    for x, y in zip(tokens.split(64), targets.split(64)):
        hidden, gold = scored_hidden(model, x, y, device)
        total += F.linear_cross_entropy(hidden, model.embedding.weight, gold, reduction="sum").item()
    return total / (targets != IGNORE).sum().item()


@torch.no_grad()
def generate(model, tokenizer, questions, device):
    """The SQL that the model writes for each question: greedy, full softmax, questions of equal length together."""
    model.eval()
    prompts = [tokenizer.encode(prompt(q)) for q in questions]
    answers = [""] * len(prompts)
    for length in tqdm(sorted(set(map(len, prompts))), "generating SQL", disable=None, leave=False):
        members = [i for i, ids in enumerate(prompts) if len(ids) == length]
        new, past, out = torch.tensor([prompts[i] for i in members], device=device), {}, []
        for _ in range(CONTEXT - length):
            new = (model(new, past)[:, -1] @ model.embedding.weight.T).argmax(-1, keepdim=True)
            out.append(new)
            if (torch.cat(out, 1) == tokenizer.end).any(1).all():
                break
        for i, ids in zip(members, torch.cat(out, 1).tolist()):
            answers[i] = tokenizer.decode(ids[:ids.index(tokenizer.end)] if tokenizer.end in ids else ids).strip()
    return answers


def evaluate(model, data, device):
    answers = generate(model, data.tokenizer, [q for q, _ in data.test], device)
    right = sum(data.database.agrees(answer, gold) for answer, (_, gold) in zip(answers, data.test))
    samples = [" ".join(answer.split())[:100] for answer in answers[::len(answers) // 3][:3]]
    return {"domain_nll": nll(model, *data.domain_test, device), "domain_accuracy": right / len(data.test),
            "general_nll": nll(model, *data.general_test, device), "samples": samples}


# ---------------------------------------------------------------------------------------------- 9. the run

def prepare(settings, per_form):
    """All data, split: documents and questions are either for training or held out, never both."""
    rng = random.Random(settings["seed"])
    documents = general_documents()
    names = sorted(documents)
    rng.shuffle(names)
    held_out = len(names) // 20
    general_test, general_train = ("\n\n".join(documents[n] for n in part) for part in (names[:held_out], names[held_out:]))
    counts = collections.Counter(re.findall(r"\b[a-z]{4,9}\b", general_train))
    words = sorted({w for w, _ in counts.most_common(100)} | set(re.findall(r"[A-Za-z]{3,}", f"{TELECOM} {SPOKEN}")))
    schemas = [random_schema(rng, words) for _ in range(settings["schemas"])]
    other = [ask(rng, rng.choice(list(FORMS)), rng.choice(schemas), {}) for _ in range(settings["sql_examples"])]
    database = Database(rng)
    train, test = domain_split(rng, database, per_form)
    tokenizer = Tokenizer(general_train + "".join(f"{prompt(q)} {sql}" for q, sql in other), V)
    prose = torch.tensor(tokenizer.encode(general_train))
    sql = torch.tensor([i for q, sql in other for i in tokenizer.encode(f"{prompt(q)} {sql}") + [tokenizer.end]])
    windows = torch.tensor(tokenizer.encode(general_test)).unfold(0, CONTEXT + 1, CONTEXT)[:200]
    return SimpleNamespace(tokenizer=tokenizer, database=database, train=train, test=test, streams=[prose, sql, sql],
                           domain_train=encode_domain(tokenizer, train), domain_test=encode_domain(tokenizer, test),
                           general_test=(windows[:, :-1], windows[:, 1:]), fingerprint=digest(general_train, other))


def load_base(data, settings, out, device):
    """(state dict, key): from the cache if everything that shaped it is unchanged, else pretrained and cached."""
    key = digest(settings, V, WIDTH, LAYERS, HEADS, CONTEXT, torch.__version__, data.fingerprint,
                 *map(inspect.getsource, (Tokenizer, rotary, Block, Model, batches, warmup_then_linear, pretrain)))
    path = out / f"base-{key}.pt"
    if not path.exists():
        state = pretrain(data.streams, settings, device)
        write_atomically(path, lambda temporary: torch.save(state, temporary))
    return torch.load(path, weights_only=True), key


COLUMNS = (("domain accuracy", "domain_accuracy", "{:.1%}"), ("domain NLL", "domain_nll", "{:.3f}"),
           ("general NLL", "general_nll", "{:.3f}"), ("forgetting", "forgetting", "{:.3f}"), ("ms a step", "step_ms", "{:.0f}"),
           ("ms in head", "head_ms", "{:.0f}"), ("s in all", "total_s", "{:.1f}"), ("tokens a row", "subset_size_mean", "{:.0f}"),
           ("outside mass before", "outside_mass_start", "{:.4f}"), ("after", "outside_mass_end", "{:.4f}"),
           ("angle", "angle_mean_deg", "{:.0f}°"), ("clipped", "clip_fraction", "{:.0%}"))


def print_table(base, runs):
    """One row a method, mean ± standard deviation over the seeds, as a Markdown table."""
    table = [["method", *(title for title, _, _ in COLUMNS)], ["---"] * (len(COLUMNS) + 1)]
    for method in dict.fromkeys(run["method"] for run in [base, *runs]):
        table.append([method])
        for _, key, form in COLUMNS:
            values = [run[key] for run in [base, *runs] if run["method"] == method and run.get(key) is not None]
            spread = " ± " + form.format(statistics.stdev(values)) if len(set(values)) > 1 else ""
            table[-1].append(form.format(statistics.mean(values)) + spread if values else "")
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default=torch.accelerator.current_accelerator(check_available=True) or "cpu")
    parser.add_argument("--tau", type=float, default=0.98, help="coverage of the recorded subsets, in (0, 1]")
    parser.add_argument("--max-angle", type=float, default=90, help="MoClip's cap, in degrees")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=200, help="fine-tuning steps")
    parser.add_argument("--batch", type=int, default=32, help="examples a step")
    parser.add_argument("--lr", type=float, default=4e-4, help="learning rate (README.md says how it was found)")
    parser.add_argument("--record-at", nargs="+", type=int, default=[0], help="steps before which Stage 0 runs")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the cache and of results.json")
    parser.add_argument("--quick", action="store_true", help="a smoke run: tiny base, few steps, one seed")
    args = parser.parse_args()
    args.per_form, base_settings = 120, BASE
    if args.quick:
        args.steps, args.seeds, args.per_form, args.out, base_settings = 5, [0], 24, args.out / "quick", QUICK_BASE
    if not (0 < args.tau <= 1 and 0 <= args.max_angle <= 180 and 0 < args.lr < math.inf and min(args.steps, args.batch) >= 1):
        parser.error("--tau must lie in (0, 1], --max-angle in [0, 180], --lr be positive and finite, --steps and --batch at least 1")
    if not set(args.record_at) <= set(range(args.steps)):
        parser.error("--record-at must lie in [0, steps)")
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)

    data = prepare(base_settings, args.per_form)
    print(f"general: {len(data.streams[0]):,} training tokens; SQL over other schemas: {len(data.streams[1]):,} tokens; "
          f"domain: {len(data.train)} questions, {len(data.test)} held out")
    state, key = load_base(data, base_settings, args.out, device)
    base_model = Model().to(device)
    base_model.load_state_dict(state)
    base = {"method": "base", "key": key, "parameters": sum(p.numel() for p in base_model.parameters()),
            **evaluate(base_model, data, device)}

    # Stage 0, under the base
    start = clock(device)
    record = stage0(base_model, *data.domain_train, args.tau, device)
    stage0_s = clock(device) - start
    size = sum(x.nbytes for x in (record.token_ids, record.offsets, record.outside_mass)) / len(record)
    print(f"Stage 0: {len(record):,} positions in {stage0_s:.1f} s; a position at tau = {args.tau}: "
          f"{record.subset_sizes.float().mean():.0f} tokens in {size:.0f} bytes; its float32 logits would take {4 * V}")
    every = len(data.train) // 32  # the outside mass is followed on 32 training examples
    tokens, targets = (part[::every][:32] for part in data.domain_train)
    rows = torch.arange(len(record)).split((data.domain_train[1] != IGNORE).sum(1).tolist())
    probe_rows = torch.cat(rows[::every][:32])

    @torch.no_grad()
    def probe(model, record):
        hidden, _ = scored_hidden(model, tokens, targets, device)
        return outside_mass(hidden @ model.embedding.weight.T, record.select(probe_rows)).mean().item()

    # Stage 1: every finished run is kept in a file of its own and taken from there the next time
    sources = [Path(__file__).with_name(name).read_text() for name in ("train_small.py", "logits_replay.py", "moclip.py")]
    config = {name: getattr(args, name) for name in ("tau", "max_angle", "steps", "batch", "lr", "record_at", "per_form")}
    config |= {"device": str(device), "base": base_settings, "torch": torch.__version__, "python": platform.python_version(),
               "threads": torch.get_num_threads()}
    runs = []
    for seed, method in itertools.product(args.seeds, args.methods):
        path = args.out / f"run-{digest(config, key, sources, method, seed)}.json"
        if not path.exists():
            model = copy.deepcopy(base_model)
            run = {"method": method, "seed": seed, "record_bytes_per_position": size}
            run |= finetune(model, method, data.domain_train, record, probe, args, seed, device)
            run |= evaluate(model, data, device)
            if method.startswith("replay") and 0 in args.record_at:
                run["stage0_s"] += stage0_s
            run["total_s"] = run["stage0_s"] + run["steps_s"]
            run["forgetting"] = run["general_nll"] - base["general_nll"]
            write_atomically(path, lambda temporary: temporary.write_text(json.dumps(run, indent=1)))
        runs.append(json.loads(path.read_text()))
        results = json.dumps({"config": config, "base": base, "runs": runs}, indent=1)
        write_atomically(args.out / "results.json", lambda temporary: temporary.write_text(results))

    print()
    print_table(base, runs)
    for i, (question, gold) in enumerate(data.test[::len(data.test) // 3][:3]):
        print(f"\n{question}?\n  {'gold':14}{gold}")
        for run in [base, *runs[:len(args.methods)]]:
            print(f"  {run['method']:14}{run['samples'][i]}")


if __name__ == "__main__":
    main()
