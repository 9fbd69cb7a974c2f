"""One real row of Stage 0, for the figure: before training, and after it with the paper's loss and with the tail.

    python experiments/row.py        # three minutes on 2 cores; writes experiments/results/row.json

Base 0 of the study at its default setting. Of the training positions that recorded 3 to 8 tokens, gold the least
probable of them, the one whose outside mass rose most under the paper's loss: an extreme, to show what can happen.
"""

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import sweep  # noqa: E402  (its folder is on the path only now)
from sweep import CPU, DEFAULT, script  # noqa: E402


def main():
    base, s = sweep.prepared(DEFAULT["base"], DEFAULT["width"]), SimpleNamespace(**DEFAULT)
    tokens, targets = base.data.domain_train
    record = script.stage0(base.model, tokens, targets, s.tau, CPU)
    gold = targets[targets != script.IGNORE]

    @torch.no_grad()
    def probabilities(model):
        model.eval()
        parts = [script.scored_hidden(model, x, y, CPU)[0] for x, y in zip(tokens.split(64), targets.split(64))]
        return [(h @ model.embedding.weight.T).softmax(-1) for h in parts]

    def outside(parts):
        rows = torch.arange(len(record)).split([len(p) for p in parts])
        sums = []
        for p, mine in zip(parts, rows):
            chosen = record.select(mine)
            sums.append(p.index_put((chosen.rows, chosen.token_ids.long()), torch.zeros(())).sum(1))
        return torch.cat(sums)

    parts, trained = {"base": probabilities(base.model)}, {}
    for method in ("replay+adamw", "tail+adamw"):
        trained[method] = copy.deepcopy(base.model)
        script.finetune(trained[method], method, base.data.domain_train, record, lambda *_: 0.0, s, s.seed, CPU)
        parts[method] = probabilities(trained[method])
    before, after = outside(parts["base"]), outside(parts["replay+adamw"])
    p_gold = torch.cat(parts["base"])[torch.arange(len(gold)), gold]
    others = [ids[ids != y].long() for ids, y in zip(record.token_ids.split(record.subset_sizes.tolist()), gold)]
    smallest = torch.tensor([p[ids].min() if len(ids) else 0.0 for p, ids in zip(torch.cat(parts["base"]), others)])
    fits = (record.subset_sizes >= 3) & (record.subset_sizes <= 8) & (p_gold < smallest)
    row = int(torch.where(fits, after - before, -1).argmax())
    p = {name: torch.cat(part)[row] for name, part in parts.items()}
    ids = record.select([row]).token_ids.tolist()
    top = [set(p[name].topk(count).indices.tolist()) for name, count in (("base", 12), ("replay+adamw", 4))]
    shown = sorted(set(ids).union(*top), key=lambda j: -p["base"][j].item())
    example = int(torch.searchsorted((targets != script.IGNORE).sum(1).cumsum(0), row, right=True))
    at = (targets[example] != script.IGNORE).nonzero()[row - int((targets[:example] != script.IGNORE).sum())].item()
    found = {"context": base.data.tokenizer.decode(tokens[example, :at + 1].tolist()), "tau": s.tau,
             "base": base.fingerprint,
             "tokens": [{"text": base.data.tokenizer.decode([j]), "recorded": j in ids, "gold": j == int(gold[row]),
                         **{name: p[name][j].item() for name in p}} for j in shown],
             "outside_mass": {name: outside(part)[row].item() for name, part in parts.items()}}
    path = sweep.RESULTS.with_name("row.json")
    script.write_atomically(path, lambda temporary: temporary.write_text(json.dumps(found, indent=1) + "\n"))


if __name__ == "__main__":
    main()
