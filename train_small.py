"""Logits Replay + MoClip end to end: pretrain a compact LM, record, fine-tune eight ways, measure what was forgotten.

    python train_small.py              # the first run pretrains the base, later runs take it from the cache
    python train_small.py --quick      # smoke run of the same code path
    python train_small.py --tau 0.8    # see the outside mass run away: its column in the table

Nothing is downloaded. The method comes first: 1 Stage 0, 2 Stage 1, 3 evaluation; then what it needs, down to the run.
General text is the English prose that ships with every CPython. The domain is questions to SQL over one database, in
experiments/telecom.json; an answer is right if its rows are. The base knows prose, and SQL over other, random tables.

A method is a loss ("full": all V tokens; "replay": the recorded subset S_t; "tail": S_t, the golds of the batch and a
random sample; "anchor": the tail's, and a KL to what the base said on a little text that it wrote itself) and an
optimizer. All start from one base; all records come from one Stage 0 under it.

Shapes: M examples of T tokens, B a batch; N: their scored positions, row-major, as recorded; d = width, V = vocabulary.
"""

import argparse
import ast
import collections
import contextlib
import copy
import hashlib
import inspect
import itertools
import json
import math
import random
import re
import sqlite3
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from logits_replay import (ReplayRecord, linear_replay_cross_entropy, linear_replay_kl_div, outside_mass, record_topk,
                           sample_tail, write_atomically)
from moclip import MoClip

IGNORE = -100
BASE = dict(steps=600, batch=24, lr=3e-3, seed=0, schemas=400, sql_examples=12000)
QUICK_BASE = dict(BASE, steps=30, batch=6, sql_examples=2000)
prompt = "Question: {}?\nSQL:".format
METHODS = tuple(map("+".join, itertools.product(("full", "replay", "tail", "anchor"), ("adamw", "moclip"))))


class Size(NamedTuple):
    vocab_size: int = 12288
    width: int = 192
    layers: int = 2
    heads: int = 6
    context: int = 80  # tokens


# ----------------------------------------------------------------------------------------------------------- 1. Stage 0
@torch.no_grad()
def stage0(model, tokens, targets, tau, device, **options):
    """Record S_t for every scored position, in row-major order, under the model as it is. Options: `record_topk`'s."""
    model.eval()
    pairs = tqdm(list(zip(tokens.split(64), targets.split(64))), "Stage 0: recording", disable=None)
    scored = (scored_hidden(model, x, y, device) for x, y in pairs)
    return ReplayRecord.concat(record_topk(h @ model.embedding.weight.T, gold, tau, **options) for h, gold in scored)


def scored_hidden(model, tokens, targets, device):
    """The model's hidden states (N, d) at the positions with a target, in row-major order, and those targets (N,)."""
    scored = targets != IGNORE
    used = int(scored.any(0).nonzero().max()) + 1  # the rest is padding
    return model(tokens[:, :used].to(device))[scored[:, :used].to(device)], targets[scored].to(device)


def encode_domain(tokenizer, pairs, context, prompt=prompt):
    """Tokens (M, T) and targets (M, T): the next token where it belongs to the SQL or ends it, IGNORE elsewhere."""
    rows = [(tokenizer.encode(prompt(q)), tokenizer.encode(" " + sql) + [tokenizer.end]) for q, sql in pairs]
    rows.sort(key=lambda row: len(row[0] + row[1]))
    T = max(len(p) + len(s) for p, s in rows) - 1
    if T > context:
        raise ValueError(f"pairs: an example of {T} tokens does not fit the context of {context}")
    tokens = torch.tensor([(p + s + [tokenizer.end] * T)[:T] for p, s in rows])
    targets = torch.tensor([([IGNORE] * (len(p) - 1) + s + [IGNORE] * T)[:T] for p, s in rows])
    return tokens, targets


@torch.no_grad()
def write_text(model, end, count, device, seed=0):
    """`count` windows that the model writes by plain sampling from its full softmax, (count, context + 1) int64.

    Half of them begin with the token `end`, and this base goes on with SQL; half with any token, and go on with prose.
    """
    model.eval()
    generator = torch.Generator(device).manual_seed(seed)
    new = torch.randint(model.size.vocab_size, (count, 1), generator=generator, device=device)
    new[:count // 2] = end
    text, past = [new], {}
    for _ in tqdm(range(model.size.context), "Stage 0: the base writes", disable=None):
        p = (model(new, past)[:, -1] @ model.embedding.weight.T).softmax(-1)
        new = torch.multinomial(p, 1, generator=generator)
        text.append(new)
    return torch.cat(text, 1).cpu()


class Anchor(NamedTuple):
    """Text to be kept, W windows of T tokens, and what the base said there: rows w T to w T + T - 1 are window w's."""
    tokens: torch.Tensor  # (W, T)
    record: ReplayRecord  # W T rows, with log-probabilities


def record_anchor(model, text, device):
    """Stage 0 for the anchor, on text (W, T + 1): a large tau, so that it also holds where the base is sure, capped."""
    record = stage0(model, text[:, :-1], text[:, 1:], 0.98, device, max_size=32, keep_log_probs=True)
    return Anchor(text[:, :-1].to(device), record)


# ----------------------------------------------------------------------------------------------------------- 2. Stage 1
def scorer(method, record, args, generator, model=None, anchor=None):
    """The method's loss: a function of hidden (N, d), head (V, d), gold (N,) and rows (N,), in mean nats per position.

    S_t is row rows[t] of the record. The tail and the anchor's windows, which `model` reads, are drawn at every call.
    """
    def full(hidden, head, gold, rows):
        # L_t = log( sum over all V tokens of exp z_j ) - z_y,   z = head h_t
        return F.linear_cross_entropy(hidden, head, gold)

    def replay(hidden, head, gold, rows):
        # L_t = log( sum over S_t of exp z_j ) - z_y
        return linear_replay_cross_entropy(hidden, head, gold, record.select(rows))

    def tail(hidden, head, gold, rows):
        # L_t = log( sum over S_t of exp z_j + sum over R \ S_t of w_j exp z_j ) - z_y,   R: args.tail random tokens and
        # the golds of the batch; 1 / w_j: the probability that j is in R
        sample = sample_tail(gold, len(head), args.tail, generator=generator)
        return linear_replay_cross_entropy(hidden, head, gold, record.select(rows), tail=sample)

    def anchored(hidden, head, gold, rows):
        # L_t of the tail + weight * A,   A_t = sum over S_t of q0_j (log q0_j - log q1_j) in a few of the anchor's
        # windows; q0: what the base said there, q1: what the model says now, both renormalized to the S_t of there
        W, T = anchor.tokens.shape
        w = torch.randperm(W, generator=generator, device=generator.device)[:args.anchor_step]
        positions = T * w[:, None] + torch.arange(T, device=w.device)
        said = linear_replay_kl_div(model(anchor.tokens[w]).flatten(0, 1), head, anchor.record.select(positions))
        return tail(hidden, head, gold, rows) + args.anchor_weight * said
    return {"full": full, "replay": replay, "tail": tail, "anchor": anchored}[method.split("+")[0]]


def make_optimizer(method, parameters, args):
    if method.endswith("+moclip"):
        return MoClip(parameters, args.lr, max_angle=math.radians(args.max_angle))
    return torch.optim.AdamW(parameters, args.lr, weight_decay=0.0)


def finetune(model, method, data, record, probe, args, seed, device, anchor=None, score=None, optimizer=None):
    """Train on the scored tokens of `data`, (tokens, targets), whose record is `record`; returns what was measured.

    `probe(model, record)` is the outside mass now. `score` and `optimizer` replace what the method's name says.
    """
    (tokens, targets), head, rows_of = data, model.embedding.weight, scored_rows(data[1])
    # CPU generators use 32 bits of their seed: the upper half is for tail and anchor, the lower half for the batches
    generator = torch.Generator(device).manual_seed(2**31 + seed)
    score = score or scorer(method, record, args, generator, model, anchor)
    optimizer = optimizer or make_optimizer(method, model.parameters(), args)
    schedule = warmup_then_linear(optimizer, args.steps)
    outside, step_ms, angles, clipped = [], [], [], []
    model.train()
    bar = tqdm(range(args.steps), f"Stage 1: {method}, seed {seed}", disable=None)
    for step, batch in zip(bar, domain_batches(targets, args.batch, seed)):
        if step % max(1, args.steps // 10) == 0:
            outside.append([step, probe(model, record)])
        start = clock(device)
        hidden, gold = scored_hidden(model, tokens[batch], targets[batch], device)
        loss = score(hidden, head, gold, rows_of(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        step_ms.append(1e3 * (clock(device) - start))
        if hasattr(optimizer, "last_angle"):
            angles.append(optimizer.last_angle.mean())
            clipped.append(optimizer.last_clipped.float().mean())
    outside.append([args.steps, probe(model, record)])
    return {"step_ms": statistics.median(step_ms), "steps_s": sum(step_ms) / 1e3, "train_nll_last": loss.item(),
            "subset_size_mean": len(head) if method.startswith("full") else record.subset_sizes.float().mean().item(),
            "outside_mass_log": outside, "outside_mass_start": outside[0][1], "outside_mass_end": outside[-1][1],
            "angle_mean_deg": math.degrees(torch.stack(angles).mean()) if angles else None,
            "clip_fraction": torch.stack(clipped).mean().item() if clipped else None}


def scored_rows(targets):
    """A function of example numbers (B,): the record's rows (N,) of their scored positions, as Stage 0 numbers them."""
    scored = targets != IGNORE
    row_of = (scored.flatten().cumsum(0) - 1).view_as(targets)
    return lambda batch: row_of[batch][scored[batch]]


def domain_batches(targets, size, seed):
    """Batches of example numbers: an epoch is shuffled, then sorted by length within 8 batches: little is padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = targets.shape[1] - (targets != IGNORE).flip(1).int().argmax(1)
    while True:
        chunks = torch.randperm(len(lengths), generator=generator).split(8 * size)
        epoch = torch.cat([chunk[lengths[chunk].argsort()] for chunk in chunks]).split(size)
        for i in torch.randperm(len(epoch), generator=generator):
            yield epoch[i]


def clock(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


# -------------------------------------------------------------------------------------------------------- 3. evaluation
def nll(model, tokens, targets, device):
    """Mean nats per scored token under the full softmax. Like `generate` it runs in `evaluate`, without gradients."""
    scored = (scored_hidden(model, x, y, device) for x, y in zip(tokens.split(64), targets.split(64)))
    total = sum(F.linear_cross_entropy(h, model.embedding.weight, gold, reduction="sum").item() for h, gold in scored)
    return total / (targets != IGNORE).sum().item()


def generate(model, data, questions, device):
    """The SQL that the model writes for each question: greedy, full softmax, questions of equal length together."""
    tokenizer = data.tokenizer
    prompts = [tokenizer.encode(data.prompt(q)) for q in questions]
    answers = [""] * len(prompts)
    for length in tqdm(sorted(set(map(len, prompts))), "generating SQL", disable=None, leave=False):
        members = [i for i, ids in enumerate(prompts) if len(ids) == length]
        new, past, out = torch.tensor([prompts[i] for i in members], device=device), {}, []
        for _ in range(data.context - length):
            new = (model(new, past)[:, -1] @ model.embedding.weight.T).argmax(-1, keepdim=True)
            out.append(new)
            if (torch.cat(out, 1) == tokenizer.end).any(1).all():
                break
        for i, ids in zip(members, torch.cat(out, 1).tolist()):
            answers[i] = tokenizer.decode(ids[:ids.index(tokenizer.end)] if tokenizer.end in ids else ids).strip()
    return answers


@torch.no_grad()
def evaluate(model, data, device, part="test"):
    """The measures on one held-out part: "test" is what is reported, "validation" is for choosing settings."""
    model.eval()
    questions = getattr(data, part)
    answers = generate(model, data, [q for q, _ in questions], device)
    right = sum(data.database.agrees(answer, gold) for answer, (_, gold) in zip(answers, questions))
    kinds = ("domain", "general", "other")
    return {**{f"{kind}_nll": nll(model, *getattr(data, f"{kind}_{part}"), device) for kind in kinds},
            "domain_accuracy": right / len(questions),
            "samples": [" ".join(answer.split())[:100] for answer in answers[:3]]}


def outside_mass_probe(tokens, targets, device):
    """probe(model, record): the mean outside mass over 32 training examples, under the model as it is."""
    sample = torch.arange(0, len(tokens), max(1, len(tokens) // 32))[:32]
    x, y, rows = tokens[sample], targets[sample], scored_rows(targets)(sample)

    @torch.no_grad()
    def probe(model, record):
        hidden, _ = scored_hidden(model, x, y, device)
        return outside_mass(hidden @ model.embedding.weight.T, record.select(rows)).mean().item()
    return probe


# -------------------------------- a learner may stop here: below is what the experiment is made of. 4. model and base
def rotary(x, turn):
    """Rotate the pairs (x_i, x_i+h) of every head by position x frequency: attention sees relative positions."""
    a, b = x.chunk(2, -1)
    cos, sin = turn
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x, turn, past):
        B, T, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotary(q, turn), rotary(k, turn)
        if past:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        x = x + self.out(attended.transpose(1, 2).reshape(B, T, width))
        return x + self.mlp(self.norm2(x)), (k, v)


class Model(nn.Module):
    """A pre-norm causal transformer with tied embeddings; returns hidden states, the losses apply the head."""

    def __init__(self, size=Size()):
        super().__init__()
        self.size, width = size, size.width
        self.embedding, self.previous = nn.Embedding(size.vocab_size, width), nn.Linear(width, width, bias=False)
        self.blocks = nn.ModuleList(Block(width, size.heads) for _ in range(size.layers))
        self.norm = nn.LayerNorm(width)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens, past=None):
        """tokens (B, T) -> hidden (B, T, d). `past`: a dict, {} at first; keeps what the tokens after these need."""
        past = {} if past is None else past
        start = past[0][0].shape[2] if past else 0
        half = self.size.width // self.size.heads // 2
        angle = torch.outer(torch.arange(start, start + tokens.shape[1], device=tokens.device),
                            1e3 ** -(torch.arange(half, device=tokens.device) / half))
        x = self.embedding(tokens)
        turn = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        # each position also gets the token before it: so a single layer can look up "what followed this last time?"
        before = past.get("last", torch.zeros_like(x[:, :1]))
        past["last"] = x[:, -1:]
        x = x + self.previous(torch.cat([before, x[:, :-1]], 1))
        for i, block in enumerate(self.blocks):
            x, past[i] = block(x, turn, past.get(i))
        return self.norm(x)


def batches(streams, settings, context):
    """Batches (B, context + 1) of random windows, an equal share from each token stream."""
    generator = torch.Generator().manual_seed(settings["seed"])
    share, span = settings["batch"] // len(streams), context + 1
    while True:
        yield torch.cat([stream.unfold(0, span, 1)[torch.randint(len(stream) - span, (share,), generator=generator)]
                         for stream in streams])


def warmup_then_linear(optimizer, steps):
    """Learning rate: up over the first tenth, then down to zero at the last step."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / (steps / 10), (steps - i) / (steps * 0.9), 1))


def pretrain(streams, settings, device, size=Size()):
    """Next-token prediction on the streams; returns the state dict, on the CPU."""
    torch.manual_seed(settings["seed"])
    model = Model(size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), settings["lr"], weight_decay=0.01)
    schedule = warmup_then_linear(optimizer, settings["steps"])
    steps = tqdm(range(settings["steps"]), "pretraining the base", disable=None)
    for _, tokens in zip(steps, batches(streams, settings, size.context)):
        tokens = tokens.to(device)
        hidden = model(tokens[:, :-1])
        loss = F.linear_cross_entropy(hidden.flatten(0, 1), model.embedding.weight, tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return {name: value.cpu() for name, value in model.state_dict().items()}


# -------------------------------------------------------------------------------------------------------------- 5. text
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


def general_documents():
    """English prose in every CPython: the language reference topics, and each standard-library module's docstrings."""
    from pydoc_data.topics import topics
    documents = {f"topic {name}": text for name, text in topics.items()}
    root = Path(ast.__file__).parent
    skipped = {"test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "pydoc_data", "encodings"}
    files = {path for depth in ("*", "*/*", "*/*/*") for path in root.glob(f"{depth}.py")
             if not skipped & set(path.relative_to(root).parts)}
    nodes = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for path in tqdm(sorted(files), "harvesting docstrings", disable=None, leave=False):
        with contextlib.suppress(SyntaxError, ValueError):
            tree = ast.walk(ast.parse(path.read_bytes()))
            text = "\n\n".join(filter(None, (ast.get_docstring(node) for node in tree if isinstance(node, nodes))))
            if len(text) > 200:
                documents[str(path.relative_to(root))] = text
    return documents


# ------------------------------------------------------------------------------------------------------------ 6. domain
# FORMS: SQL -> its questions; OPERATORS, AGGREGATES, ORDERS, SPOKEN: a piece of SQL or a name -> how people say it;
# TELECOM: table -> column -> its values: list (text; the first column is the row's name), range (numbers) or reference
FORMS, OPERATORS, AGGREGATES, ORDERS, SPOKEN, TELECOM = json.loads(
    (Path(__file__).parent / "experiments/telecom.json").read_text(),
    object_hook=lambda entry: range(*entry["range"]) if "range" in entry else entry).values()


def ask(rng, sql, schema, spoken):
    """One (question, SQL) pair of the form `sql` over the schema."""
    words = {**spoken, **OPERATORS, **AGGREGATES, **ORDERS}
    joins = {t: (c, *v.split(".")) for t, columns in schema.items() for c, v in columns.items() if isinstance(v, str)}
    columns = lambda table, kind: [c for c, v in list(schema[table].items())[1:] if isinstance(v, kind)]
    # the slots: t table, i its name column, c = 'v' and u.e = 'w' text column and value, n number column, x y numbers,
    # k a small one, o operator, g aggregate, s sort order, f and j what a join needs; in upper case: as people say it
    t = rng.choice([t for t in schema if t in joins or "{u}" not in sql])
    f, u, j = joins.get(t, (None, t, None))
    c, e, n = rng.choice(columns(t, list)), rng.choice(columns(u, list)), rng.choice(columns(t, range))
    x, y = sorted(rng.sample(schema[t][n], 2))
    o, g, s = rng.choice(list(OPERATORS)), rng.choice(list(AGGREGATES)), rng.choice(list(ORDERS))
    slots = dict(t=t, i=next(iter(schema[t])), c=c, v=rng.choice(schema[t][c]), n=n, x=x, y=y, k=rng.randint(2, 9), o=o,
                 g=g, s=s, f=f, u=u, j=j, e=e, w=rng.choice(schema[u][e]))
    slots |= {slot.upper(): rng.choice(words.get(slots[slot], [slots[slot]])) for slot in "tucenogs"}
    return rng.choice(FORMS[sql]).format(**slots), sql.format(**slots)


def random_schema(rng, words):
    """A schema like the domain's with other names: two tables, the second one refers to the first."""
    first, key, a, b, c, d, second, key2, e, f, g, _ = rng.sample(words, 12)
    values = lambda: rng.sample(words, 8)
    return {first: {key: values(), a: values(), b: values(), c: range(1, 100), d: range(1900, 2025)},
            second: {key2: values(), first: f"{first}.{key}", e: values(), f: range(10, 1000), g: range(1, 50)}}


def schema_questions(rng, words, schemas, count, seen=()):
    """`count` (question, SQL) pairs, none of them in `seen`, over random schemas; equal pairs may be among them."""
    schemas = [random_schema(rng, words) for _ in range(schemas)]
    asked = (ask(rng, rng.choice(list(FORMS)), rng.choice(schemas), {}) for _ in itertools.count())
    return list(itertools.islice((pair for pair in asked if pair not in seen), count))


class Database:
    """The telecom tables in memory. The SQL that runs on it comes from a model: reading only, few steps, few rows."""

    def __init__(self, rng):
        self.connection = sqlite3.connect(":memory:")
        for t, columns in TELECOM.items():
            names, *pools = (TELECOM[v.split(".")[0]][v.split(".")[1]] if isinstance(v, str) else v
                             for v in columns.values())
            rows = [[name, *map(rng.choice, pools)] for name in names]
            self.connection.execute(f"CREATE TABLE {t} ({', '.join(columns)})")
            self.connection.executemany(f"INSERT INTO {t} VALUES ({', '.join('?' * len(columns))})", rows)
        allowed = {(sqlite3.SQLITE_FUNCTION, name) for name in ("count", "sum", "avg", "min", "max")}
        self.connection.set_authorizer(lambda action, _, name, *more: sqlite3.SQLITE_OK if (action, name) in allowed or
                                       action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ) else sqlite3.SQLITE_DENY)

    def rows(self, sql):
        """The rows of a query, at most 1000 of them; None if it fails."""
        thousands = itertools.count(1)  # of virtual-machine steps: stop after a million
        self.connection.set_progress_handler(lambda: next(thousands) > 1000, 1000)
        with contextlib.suppress(sqlite3.Error, sqlite3.Warning, ValueError):
            return self.connection.execute(sql).fetchmany(1000)

    def agrees(self, sql, gold):
        """Do both queries return the same rows, in the same order where the gold query asks for one?"""
        mine, right = self.rows(sql), self.rows(gold)
        order = list if "ORDER BY" in gold else collections.Counter
        return mine is not None and order(mine) == order(right)


def domain_split(rng, database, per_form):
    """(train, validation, test): distinct (question, SQL) with answers; a held-out part has an eighth of every form."""
    parts = [], [], []
    for form in FORMS:
        asked = dict(ask(rng, form, TELECOM, SPOKEN) for _ in range(20 * per_form))
        answered = (pair for pair in asked.items() if database.rows(pair[1]) not in ([], [(0,)], [(None,)]))
        pairs = list(itertools.islice(answered, per_form))
        n = max(1, len(pairs) // 8)
        for part, members in zip(parts, (pairs[2 * n:], pairs[n:2 * n], pairs[:n])):
            part += members
    for part in parts:
        rng.shuffle(part)
    return parts


# ----------------------------------------------------------------------------------------------------------- 7. the run
def prepare(settings, per_form, size=Size(), windows=200):
    """All data; documents, questions and schemas are for training, for validation or for the test, never for two.

    general_*: `windows` windows of prose; other_*: as many questions and their SQL over schemas that nothing else has.
    """
    rng = random.Random(settings["seed"])
    documents = [text for _, text in sorted(general_documents().items())]
    rng.shuffle(documents)
    n = len(documents) // 20
    general = {"test": documents[:n], "validation": documents[n:2 * n], "train": documents[2 * n:]}
    general = {part: "\n\n".join(texts) for part, texts in general.items()}
    counts = collections.Counter(re.findall(r"\b[a-z]{4,9}\b", general["train"]))
    common = [word for word, _ in counts.most_common(100)]
    words = {*common, *re.findall(r"[A-Za-z]{3,}", f"{TELECOM} {SPOKEN}")}
    seen = schema_questions(rng, sorted(words), settings["schemas"], settings["sql_examples"])
    database = Database(rng)
    domain = dict(zip(("train", "validation", "test"), domain_split(rng, database, per_form)))
    rng = random.Random(f"other schemas {settings['seed']}")  # on its own: whatever it draws, the rest stays as it is
    other = {part: schema_questions(rng, common, 20, windows, set(seen)) for part in ("validation", "test")}
    tokenizer = Tokenizer(general["train"] + "".join(f"{prompt(q)} {sql}" for q, sql in seen), size.vocab_size)
    ids = {part: torch.tensor(tokenizer.encode(text)) for part, text in general.items()}
    held_out = {part: ids[part].unfold(0, size.context + 1, size.context)[:windows] for part in other}
    sql = torch.tensor([i for q, sql in seen for i in tokenizer.encode(f"{prompt(q)} {sql}") + [tokenizer.end]])
    return SimpleNamespace(
        tokenizer=tokenizer, database=database, prompt=prompt, context=size.context, size=size,
        streams=[ids["train"], sql, sql], fingerprint=fingerprint({"prose": ids["train"], "sql": sql}), **domain,
        **{f"domain_{part}": encode_domain(tokenizer, pairs, size.context) for part, pairs in domain.items()},
        **{f"other_{part}": encode_domain(tokenizer, pairs, size.context) for part, pairs in other.items()},
        **{f"general_{part}": (x[:, :-1], x[:, 1:]) for part, x in held_out.items()})


def load_base(data, settings, out, device):
    """(state dict, key): from the cache if everything that shaped it is unchanged, else pretrained and cached."""
    code = map(inspect.getsource, (Tokenizer, rotary, Block, Model, batches, warmup_then_linear, pretrain))
    shaped_by = f"{settings} {data.size} {torch.__version__} {data.fingerprint} {''.join(code)}"
    key = hashlib.sha256(shaped_by.encode()).hexdigest()[:16]
    path = out / f"base-{key}.pt"
    if not path.exists():
        say(f"pretraining the base: {settings['steps']} steps, {path}", settings["steps"] * settings["batch"] * 15e-3)
        state = pretrain(data.streams, settings, device, data.size)
        write_atomically(path, lambda file: torch.save(state, file))
    return torch.load(path, weights_only=True), key


def fingerprint(state):
    """What tells one base from another: two machines may round differently and make two from one seed."""
    return hashlib.sha256(b"".join(value.cpu().numpy().tobytes() for value in state.values())).hexdigest()[:16]


def say(text, seconds=None):
    """One line, at once, also where the output is no terminal and progress bars stay silent; seconds: roughly."""
    print(f"{text}: about {5 * math.ceil(seconds / 5)} s on 2 cores" if seconds else text, flush=True)


def record_bytes(record):
    """Bytes that a position takes, all tensors of the record together."""
    return sum(x.nbytes for x in vars(record).values() if isinstance(x, torch.Tensor)) / len(record)


def print_table(base, runs):
    """One row a run. Lost: forgetting of prose and of SQL over other schemas, in nats."""
    columns = {"accuracy": ("domain_accuracy", ".1%"), "prose lost": ("forgetting", ".3f"),
               "SQL lost": ("forgetting_sql", ".3f"), "domain NLL": ("domain_nll", ".3f"),
               "outside mass": ("outside_mass_end", ".4f"), "ms/step": ("step_ms", ".0f"),
               "Stage 0 s": ("stage0_s", ".1f"), "total s": ("total_s", ".1f"),
               "angle, °": ("angle_mean_deg", ".0f"), "clipped": ("clip_fraction", ".0%")}
    print(f"{'method':14}" + "".join(f"  {title}" for title in columns))
    for run in [base, *runs]:
        cells = ("-" if run.get(key) is None else format(run[key], form) for key, form in columns.values())
        print(f"{run['method']:14}" + "".join(f"{cell:>{len(title) + 2}}" for cell, title in zip(cells, columns)))


def arguments():
    options = {  # default, least and largest value, what it is
        "tau": (0.9, 1e-6, 1, "coverage of the recorded subsets"),
        "tail": (256, 0, math.inf, "tokens that a tail method samples for each batch"),
        "anchor": (120, 0, math.inf, "windows of text for the anchor methods; 0 leaves them out"),
        "anchor-weight": (0.3, 0, 1e6, "of the anchor's loss beside the tail's"),
        "max-angle": (90.0, 0, 180, "MoClip's cap, in degrees"),
        "steps": (200, 1, math.inf, "fine-tuning steps"),
        "batch": (32, 1, math.inf, "examples a step"),
        "lr": (1.2e-3, 0, 1, "learning rate of the fine-tuning"),
        "base-seed": (BASE["seed"], 0, 2**31 - 1, "seed of the data and of the base")}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, (default, least, most, what) in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{what} ({default})")
    parser.add_argument("--device", default=torch.accelerator.current_accelerator(check_available=True) or "cpu")
    parser.add_argument("--anchor-text", default="own", choices=("own", "given"), help="by the base, or prose and SQL")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the fine-tuning")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the cached base and of results.json")
    parser.add_argument("--quick", action="store_true", help="a smoke run: tiny base, few steps, one seed")
    args = parser.parse_args()
    given = [(name, getattr(args, name.replace("-", "_")), *row[1:3]) for name, row in options.items()]
    for name, value, least, most in given + [("seeds", seed, 0, 2**31 - 1) for seed in args.seeds]:
        if not least <= value <= most:
            parser.error(f"--{name} must lie in [{least}, {most}]")
    args.per_form, args.windows, args.anchor_step, base = 120, 200, 2, BASE
    if args.quick:
        args.steps, args.seeds, args.per_form, args.windows, base = 5, [0], 12, 20, QUICK_BASE
        args.anchor, args.out = min(args.anchor, 8), args.out / "quick"
    args.base = dict(base, seed=args.base_seed)
    args.methods = [method for method in args.methods if args.anchor or not method.startswith("anchor")]
    return args


def main():
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    say("building the corpora", 10)
    data = prepare(args.base, args.per_form, windows=args.windows)
    say(f"prose: {len(data.streams[0]):,} tokens; SQL: {len(data.streams[1]):,}; domain: {len(data.train)} questions")
    state, key = load_base(data, args.base, args.out, device)
    base_model = Model(data.size).to(device)
    base_model.load_state_dict(state)
    base = {"method": "base", "key": key, "fingerprint": fingerprint(state), "questions": data.test[:3],
            "parameters": sum(p.numel() for p in base_model.parameters()), **evaluate(base_model, data, device)}

    say(f"Stage 0: recording {len(data.train)} examples", len(data.train) * 5e-3)
    start = clock(device)
    record = stage0(base_model, *data.domain_train, args.tau, device)
    seconds = clock(device) - start
    stage0_s, anchor = {"full": 0.0, "replay": seconds, "tail": seconds}, None
    say(f"Stage 0: {record.subset_sizes.float().mean():.0f} tokens in {record_bytes(record):.0f} bytes a position, of "
        f"{len(record):,} positions; the float32 logits of one would take {4 * data.size.vocab_size}")
    if any(method.startswith("anchor") for method in args.methods):
        say(f"Stage 0: {args.anchor} windows for the anchor, {args.anchor_text} text", args.anchor * 50e-3)
        start = clock(device)
        text = write_text(base_model, data.tokenizer.end, args.anchor, device) if args.anchor_text == "own" else \
            next(batches(data.streams[:2], dict(batch=args.anchor + 1, seed=0), data.context))
        anchor = record_anchor(base_model, text, device)
        stage0_s["anchor"] = seconds + clock(device) - start
        say(f"Stage 0: {record_bytes(anchor.record):.0f} bytes a position; the first window and the last:")
        print(*(f"  {data.tokenizer.decode(ids.tolist())!r}" for ids in (text[0], text[-1])), sep="\n")

    probe, runs = outside_mass_probe(*data.domain_train, device), []
    config = vars(args) | {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for seed, method in itertools.product(args.seeds, args.methods):
        say(f"Stage 1: {method}, seed {seed}, {args.steps} steps", args.steps * args.batch * 5e-3)
        model = copy.deepcopy(base_model)
        run = {"method": method, "seed": seed, "base": base["fingerprint"], "stage0_s": stage0_s[method.split("+")[0]]}
        run |= finetune(model, method, data.domain_train, record, probe, args, seed, device, anchor)
        run |= evaluate(model, data, device)
        run |= {"total_s": run["stage0_s"] + run["steps_s"], "forgetting": run["general_nll"] - base["general_nll"],
                "forgetting_sql": run["other_nll"] - base["other_nll"]}
        runs.append(run)
        results = json.dumps({"config": config, "base": base, "runs": runs}, indent=1, default=str)
        write_atomically(args.out / "results.json", lambda file: file.write(results.encode()))

    print()
    print_table(base, runs)
    for i, (question, gold) in enumerate(base["questions"]):  # what the first seed's models wrote
        print(f"\n{question}?\n  {'gold':14}{gold}")
        for run in [base, *runs[:len(args.methods)]]:
            print(f"  {run['method']:14}{run['samples'][i]}")


if __name__ == "__main__":
    main()
