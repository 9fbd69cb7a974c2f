"""What a record takes off the tail's noise: THEORY.md R9 on a real batch, with a record and without one.

    python experiments/variance.py        # five minutes on one core; writes experiments/results/variance.json

Base 0 of the study, before training and after it (tail+adamw at the default setting). For a batch, a record and a tail
size the loss L_R and its gradient are drawn 32 times, over two batches, and compared with the full softmax's:

    sum       root mean square, over positions and draws, of (A + B') / (A + B) - 1: rho times the CV of R9
    bias      L_full - mean of L_R, nats
    noise     standard deviation of L_R over the draws, nats
    body      root mean square of |grad L_R - grad L_full| / |grad L_full|, all parameters but the tied head
    head      the same, of the head
"""

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))

import sweep  # noqa: E402  (its folder is on the path only now)
from logits_replay import linear_replay_cross_entropy, sample_tail  # noqa: E402
from rivals import gold_record  # noqa: E402
from sweep import CPU, DEFAULT, script  # noqa: E402

DRAWS, BATCHES = 32, 2
ARMS = [(batch, record, tail) for batch, tails in ((32, (16, 256, 1024)), (8, (256,)), (128, (256,)))
        for tail in tails for record in ("gold only", "top 1 and gold", "tau = 0.9", "tau = 0.98")]


def measure(model, data, record, size, batch):
    """One arm: {measure: value}. `record`: the whole corpus's, or None for {gold}."""
    tokens, targets = data
    row_of, head = script.record_rows(targets), model.embedding.weight
    body = [p for p in model.parameters() if p is not head]
    generator, found = torch.Generator().manual_seed(0), []
    for examples, _ in zip(script.domain_batches(targets, batch, 0), range(BATCHES)):
        hidden, gold = script.scored_hidden(model, tokens[examples], targets[examples], CPU)
        rows = row_of[examples][targets[examples] != script.IGNORE]
        mine = gold_record(gold, script.V) if record is None else record.select(rows)

        def gradients(loss):
            grads = torch.autograd.grad(loss, [head, *body], retain_graph=True)
            return grads[0].flatten(), torch.cat([g.flatten() for g in grads[1:]])

        exact = F.linear_cross_entropy(hidden, head, gold, reduction="none")
        g_exact = gradients(exact.mean())
        for _ in range(DRAWS):
            tail = sample_tail(gold, script.V, size, generator=generator)
            loss = linear_replay_cross_entropy(hidden, head, gold, mine, tail=tail, reduction="none")
            errors = [((a - b).norm() / b.norm()).item() for a, b in zip(gradients(loss.mean()), g_exact)]
            found.append([((loss - exact).exp() - 1).square().mean().item(), (exact - loss).mean().item(),
                          *errors])
    sums, gaps, heads, bodies = torch.tensor(found, dtype=torch.float64).T
    rms = lambda x: x.square().mean().sqrt().item()
    noise = gaps.view(BATCHES, DRAWS).std(1).mean().item()  # L_full is a constant of the batch
    return {"sum": sums.mean().sqrt().item(), "bias": gaps.mean().item(), "noise": noise, "body": rms(bodies),
            "head": rms(heads)}


def main():
    base, s = sweep.prepared(DEFAULT["base"], DEFAULT["width"]), SimpleNamespace(**DEFAULT)
    data = base.data.domain_train
    records = {"gold only": None} | {name: script.stage0(base.model, *data, tau, CPU) for name, tau in
                                     (("top 1 and gold", 0.01), ("tau = 0.9", 0.9), ("tau = 0.98", 0.98))}
    trained = copy.deepcopy(base.model)
    script.finetune(trained, "tail+adamw", data, records["tau = 0.9"], lambda *_: 0.0, s, s.seed, CPU)
    rows = [{"model": name, "batch": batch, "record": record, "tail": tail,
             **measure(model.eval(), data, records[record], tail, batch)}
            for name, model in (("before training", base.model), ("after it", trained))
            for batch, record, tail in ARMS]
    text = json.dumps({"base": base.fingerprint, "rows": rows}, indent=1) + "\n"
    script.write_atomically(sweep.RESULTS.with_name("variance.json"), lambda temporary: temporary.write_text(text))


if __name__ == "__main__":
    main()
