"""The arms that the six methods of train_small.py are compared with, and the controls that take one part away.

Each is a function of `c`, a namespace with the model, the base (frozen), data, record, args, seed and generator of a
run; it returns (score, optimizer) as `train_small.finetune` takes them, None for the method's own. Mean nats.

    python experiments/rivals.py        # what a step costs with general text, a minute; writes results/rivals.json
"""

import copy
import itertools
import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_small as script  # noqa: E402  (its folder is on the path only now)
from logits_replay import ReplayRecord, Tail, linear_replay_cross_entropy, sample_tail  # noqa: E402
from moclip import MoClip  # noqa: E402

GENERAL = 0.1  # weight of the general text in `mixed`: 10 % of the loss, on 3 windows of 80 tokens a batch


def own(c):
    return script.scorer(c.method, c.record, c.args, c.generator)


def head_frozen(c):
    """The head (tied: the embedding too) stays that of the base."""
    c.model.embedding.weight.requires_grad_(False)
    return None, None


def head_rows_of_the_batch(c):
    """The method's loss, but the head's gradient is zeroed outside the batch's recorded tokens and golds (R10)."""
    score = own(c)

    def restricted(hidden, head, gold, rows):
        keep = torch.zeros(len(head), 1, dtype=torch.bool)
        keep[c.record.select(rows).token_ids.long()] = True
        view = head.view_as(head)
        view.register_hook(lambda gradient: gradient * keep)
        return score(hidden, view, gold, rows)
    return restricted, None


def general_windows(c, count=3):
    """A function that returns `count` random windows of the general training text, (count, T + 1)."""
    prose, generator = c.data.streams[0], torch.Generator().manual_seed(c.seed)
    windows = prose.unfold(0, script.CONTEXT + 1, 1)
    return lambda: windows[torch.randint(len(windows), (count,), generator=generator)]


def mixed(c):
    """General text mixed into the batches: (1 - GENERAL) L + GENERAL (cross-entropy on general text)."""
    score, windows = own(c), general_windows(c)

    def with_text(hidden, head, gold, rows):
        x = windows()
        general = F.linear_cross_entropy(c.model(x[:, :-1]).flatten(0, 1), head, x[:, 1:].flatten())
        return (1 - GENERAL) * score(hidden, head, gold, rows) + GENERAL * general
    return with_text, None


def kl_to_base(every=1):
    """Domain self-constraint: L + KL(base, model) on general text, at every step or at each that `every` divides."""
    def build(c):
        score, windows, steps = own(c), general_windows(c), itertools.count()

        def constrained(hidden, head, gold, rows):
            loss = score(hidden, head, gold, rows)
            if next(steps) % every:
                return loss
            x = windows()[:, :-1]
            with torch.no_grad():
                reference = (c.base(x) @ c.base.embedding.weight.T).log_softmax(-1).flatten(0, 1)
            mine = (c.model(x) @ head.T).log_softmax(-1).flatten(0, 1)
            return loss + F.kl_div(mine, reference, reduction="batchmean", log_target=True)
        return constrained, None
    return build


def interpolated(alpha):
    """After the last step: base + alpha (model - base), all weights (WiSE-FT, arXiv:2109.01903). It needs no text."""
    def build(c):
        optimizer, steps = script.make_optimizer(c.method, c.model.parameters(), c.args), itertools.count(1)

        @torch.no_grad()
        def back(*_):
            if next(steps) == c.args.steps:
                for p, start in zip(c.model.parameters(), c.base.parameters()):
                    p.lerp_(start, 1 - alpha)
        optimizer.register_step_post_hook(back)
        return None, optimizer
    return build


def large_eps(eps, head=True, body=True):
    """AdamW whose eps takes the normalization off rows with gradients below it (its default: 1e-8); of a part alone."""
    def build(c):
        weight, default = c.model.embedding.weight, 1e-8
        groups = [{"params": [weight], "eps": eps if head else default},
                  {"params": [p for p in c.model.parameters() if p is not weight], "eps": eps if body else default}]
        return None, torch.optim.AdamW(groups, c.args.lr, weight_decay=0.0)
    return build


class MatchedAdamW(torch.optim.AdamW):
    """AdamW's direction with the length of the step that MoClip would take from the same point."""

    def __init__(self, params, args):
        super().__init__(params, args.lr, weight_decay=0.0)
        self.params = self.param_groups[0]["params"]
        self.shadow = [torch.nn.Parameter(p.detach().clone()) for p in self.params]
        self.moclip = MoClip(self.shadow, args.lr)

    @torch.no_grad()
    def step(self, closure=None):
        start = [p.clone() for p in self.params]
        for p, q in zip(self.params, self.shadow):
            q.copy_(p)
            q.grad = p.grad
        self.moclip.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.moclip.step()
        super().step()
        length = lambda ends: torch.stack([(end - p).norm() for end, p in zip(ends, start)]).norm()
        scale = length(self.shadow) / length(self.params).clamp(min=1e-30)
        for p, p0 in zip(self.params, start):
            p.copy_(p0 + scale * (p - p0))


def matched_norm(c):
    return None, MatchedAdamW(c.model.parameters(), c.args)


class TorqueAdamW(torch.optim.Optimizer):
    """Torque-aware momentum (arXiv:2412.18790) in AdamW, the cap's soft relative: m takes d g, d = (1 + s) / 2, where s
    is the running mean of cos(g, m); v takes g. betas (0.9, 0.999), running mean 0.9, no weight decay."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))
        self.cosine, self.steps = torch.zeros(()), 0

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p] = {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}
        dot = lambda xs, ys: sum((x * y).sum() for x, y in zip(xs, ys))
        g, m = [p.grad for p in params], [self.state[p]["m"] for p in params]
        cosine = dot(g, m) / (dot(g, g) * dot(m, m)).sqrt().clamp(min=1e-30)
        self.steps, self.cosine = self.steps + 1, 0.9 * self.cosine + 0.1 * cosine
        for p in params:
            m, v = self.state[p]["m"].mul_(0.9), self.state[p]["v"].mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
            m.add_(0.1 * (1 + self.cosine) / 2 * p.grad)
            p -= self.param_groups[0]["lr"] * (m / (1 - 0.9**self.steps)) / \
                                               ((v / (1 - 0.999**self.steps)).sqrt() + 1e-8)


def torque_aware(c):
    return None, TorqueAdamW(c.model.parameters(), c.args.lr)


def gold_record(gold, V):
    """What is recorded without a Stage 0: S_t = {y_t}. Its outside mass is not known, and 0 here."""
    return ReplayRecord(gold.int(), torch.arange(len(gold) + 1), torch.zeros(len(gold)), V, 1.0)


def gold_only(c):
    """No record at all: {y_t}, and the tail. No Stage 0."""
    def score(hidden, head, gold, rows):
        record = gold_record(gold, len(head))
        tail = sample_tail(gold, len(head), c.args.tail, generator=c.generator)
        return linear_replay_cross_entropy(hidden, head, gold, record, tail=tail)
    return score, None


def uniform_only(c):
    """A tail without the golds: size of V tokens uniformly, each with weight V / size."""
    def score(hidden, head, gold, rows):
        V, size = len(head), c.args.tail
        tail = Tail(torch.randperm(V, generator=c.generator)[:size].sort().values, torch.full((size,), V / size).log())
        return linear_replay_cross_entropy(hidden, head, gold, c.record.select(rows), tail=tail)
    return score, None


def frozen_sum(c):
    """A ghost token: what the base's logits add up to outside S_t stays in the sum, as a constant."""
    ghosts = []
    with torch.no_grad():
        tokens, targets = c.data.domain_train
        for x, y, rows in zip(*(part.split(64) for part in (tokens, targets, script.record_rows(targets)))):
            hidden, _ = script.scored_hidden(c.base, x, y, torch.device("cpu"))
            z, record = hidden @ c.base.embedding.weight.T, c.record.select(rows[y != script.IGNORE])
            ghosts.append(z.index_put((record.rows, record.token_ids.long()), torch.tensor(-torch.inf)).logsumexp(1))
    ghosts = torch.cat(ghosts)

    def score(hidden, head, gold, rows):
        loss = linear_replay_cross_entropy(hidden, head, gold, c.record.select(rows), reduction="none")
        log_inside = loss + (hidden * head[gold]).sum(1)  # log of the sum over S_t
        return (loss + F.softplus(ghosts[rows] - log_inside)).mean()
    return score, None


def recorded_at(steps):
    """Stage 0 late, or again: before these steps, with the model as it is then; the full softmax before the first."""
    def build(c):
        count, record = 0, None

        def score(hidden, head, gold, rows):
            nonlocal count, record
            if count in steps:
                record = script.stage0(c.model, *c.data.domain_train, c.args.tau, torch.device("cpu"))
                c.model.train()
            count += 1
            if record is None:
                return F.linear_cross_entropy(hidden, head, gold)
            return linear_replay_cross_entropy(hidden, head, gold, record.select(rows))
        return score, None
    return build


def bfloat16(c):
    c.model.bfloat16()
    return None, None


def spikes(c):
    """Every 20th gradient is a thousand times too large."""
    score, count = own(c), 0

    def spiked(*args):
        nonlocal count
        count += 1
        loss = score(*args)
        return loss + 999 * (loss - loss.detach()) if count % 20 == 0 else loss
    return spiked, None


VARIANTS = {"": lambda c: (None, None), "head frozen": head_frozen, "head rows of the batch": head_rows_of_the_batch,
            "mixed": mixed, "KL to base": kl_to_base(), "KL every 5th step": kl_to_base(5),
            "matched norm": matched_norm, "torque-aware": torque_aware,
            **{f"interpolated, {alpha}": interpolated(alpha) for alpha in (0.5, 0.75)},
            **{f"eps {eps:g}": large_eps(eps) for eps in (1e-6, 1e-5, 1e-4, 1e-3)},
            "eps 0.0001, head": large_eps(1e-4, body=False), "eps 0.0001, body": large_eps(1e-4, head=False),
            "gold only": gold_only, "uniform only": uniform_only, "frozen sum": frozen_sum,
            "recorded at 40": recorded_at({40}), "recorded every epoch": recorded_at({0, 58, 116, 174}),
            "bfloat16": bfloat16, "spikes": spikes}


def main():
    """What a step costs with a rival: all arms take the same 60 batches in turn; medians of the ratio to full+adamw."""
    import sweep  # it imports this module
    base, s = sweep.prepared(0, script.WIDTH), SimpleNamespace(**sweep.DEFAULT)
    (tokens, targets), cpu = base.data.domain_train, torch.device("cpu")
    record, row_of = script.stage0(base.model, tokens, targets, s.tau, cpu), script.record_rows(targets)
    arms, times = {}, {}
    for method in ("full+adamw", "tail+adamw"):
        for variant in ("", "mixed", "KL to base"):
            model = copy.deepcopy(base.model)
            c = SimpleNamespace(model=model, base=base.model, data=base.data, record=record, args=s, method=method,
                                seed=0, generator=torch.Generator().manual_seed(0))
            score = VARIANTS[variant](c)[0] or own(c)
            optimizer = script.make_optimizer(method, model.parameters(), s)
            arms[f"{method}, {variant}".strip(", ")] = model, score, optimizer
    for batch, _ in zip(script.domain_batches(targets, s.batch, 0), range(60)):
        for name, (model, score, optimizer) in arms.items():
            start = script.clock(cpu)
            hidden, gold = script.scored_hidden(model, tokens[batch], targets[batch], cpu)
            loss = score(hidden, model.embedding.weight, gold, row_of[batch][targets[batch] != script.IGNORE])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            times.setdefault(name, []).append(script.clock(cpu) - start)
    plain = times["full+adamw"]
    found = {name: statistics.median(t / p for t, p in zip(values, plain)) for name, values in times.items()}
    path = sweep.RESULTS.with_name("rivals.json")
    script.write_atomically(path, lambda temporary: temporary.write_text(json.dumps(found, indent=1) + "\n"))
    print(found)


if __name__ == "__main__":
    main()
