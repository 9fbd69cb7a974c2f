"""What does it cost? Time and memory as ratios, measured side by side in one run: README's sentences about speed.

    python -m experiments.speed [--device cuda] [--only head anchor recording training]

prints one table, and writes it to experiments/results/speed_cpu.json or speed_cuda.json; ten minutes on 2 cores.
Things that are compared take turns, so that a noisy machine slows all of them; a figure is the median over the turns.
Peak memory is measured in a process of its own. The device is an accelerator where there is one, for "training" always:
it takes base 0 of the study from runs/, or pretrains it; its times of the arms are those of report.py's tables.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from experiments import sweep
from experiments.sweep import script
from logits_replay import ReplayRecord, linear_replay_cross_entropy, linear_replay_kl_div, record_topk, sample_tail

rows = []


def report(what, value, target="", **details):
    rows.append({"what": what, "value": value, "target": target, **details})
    print(f"| {what} | {value} | {target} |", flush=True)


def medians(device, turns, **functions):
    """Median seconds of each function; they take turns, the first turn is not counted."""
    times = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name, function in functions.items():
            start = script.clock(device)
            function()
            times[name].append(script.clock(device) - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def head(device, N=2048, d=256, V=50304, size=32):
    """Hidden states, head, targets and a record of `size` tokens a row, ids Zipf-distributed (exponent 1)."""
    generator = torch.Generator().manual_seed(0)
    h, W = torch.randn(N, d, generator=generator), torch.randn(V, d, generator=generator) / d**0.5
    zipf = lambda shape: (torch.rand(shape, generator=generator) * torch.tensor(float(V)).log()).exp().long() - 1
    y = zipf((N,))
    ids = [sorted(list(dict.fromkeys([gold, *zipf((4 * size,)).tolist()]))[:size]) for gold in y.tolist()]
    offsets = torch.tensor([0, *map(len, ids)]).cumsum(0)
    ids = torch.tensor([i for row in ids for i in row], dtype=torch.int32)
    log_probs = torch.full((len(ids),), 0.5 / size).log()  # half of the probability, evenly
    record = ReplayRecord(ids, offsets, torch.full((N,), 0.5), V, 0.5, log_probs)
    return h.to(device).requires_grad_(), W.to(device).requires_grad_(), y.to(device), record.to(device)


def both(h, W, loss):
    """Forward and backward."""
    h.grad = W.grad = None
    loss().backward()


def head_losses(h, W, y, record):
    """Forward and backward of every form of the head."""
    losses = {
        "dense": lambda: F.cross_entropy(h @ W.T, y),
        "linear_cross_entropy": lambda: F.linear_cross_entropy(h, W, y),
        "chunked": lambda: F.linear_cross_entropy(h, W, y, options=torch.nn.LinearCrossEntropyOptions()),
        "replay": lambda: linear_replay_cross_entropy(h, W, y, record),
        "tail": lambda: linear_replay_cross_entropy(h, W, y, record, tail=sample_tail(y, len(W), 256))}
    return {name: lambda loss=loss: both(h, W, loss) for name, loss in losses.items()}


def peak_memory(name, device, queue):
    """Puts the bytes that the loss, forward and backward, needs beside its inputs and the gradients."""
    h, W, y, record = head(device)
    function, cuda = head_losses(h, W, y, record)[name], device.type == "cuda"
    status = lambda key: 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
    if not cuda:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
    before = torch.cuda.memory_allocated() if cuda else status("VmRSS")
    function()
    after = torch.cuda.max_memory_allocated() if cuda else status("VmHWM")
    queue.put(after - before - h.nbytes - W.nbytes)  # every form returns the gradients: they are not extra


def measure_head(device):
    for size, replay, tail in ((32, ">= 25x", ">= 15x"), (512, "> 1x", "")):
        h, W, y, record = head(device, size=size)
        t = medians(device, 3, **head_losses(h, W, y, record))
        best = min(t["dense"], t["linear_cross_entropy"], t["chunked"])
        for name, target in (("replay", replay), ("tail", tail)):
            report(f"head, {size} tokens a row, {name}: faster than the fastest dense form", f"{best / t[name]:.1f}x",
                   target, seconds=t)
    context, peaks = multiprocessing.get_context("spawn"), {}
    queue = context.SimpleQueue()
    for name in head_losses(h, W, y, record):
        child = context.Process(target=peak_memory, args=(name, device, queue))
        child.start()
        peaks[name] = queue.get()
        child.join()
    least = min(peaks["dense"], peaks["linear_cross_entropy"])
    for name, target in (("replay", "<= 0.1"), ("tail", "<= 0.2")):
        report(f"head, 32 tokens a row, {name}: peak memory, part of the leaner dense form's",
               f"{peaks[name] / least:.2f}", target, megabytes={k: round(v / 1e6, 1) for k, v in peaks.items()})


def measure_anchor(device):
    """The anchor's loss against the dense one, whose reference is given: the base's forward pass is not counted."""
    h, W, _, record = head(device, N=320)
    said = torch.randn(320, len(W), generator=torch.Generator().manual_seed(0)).log_softmax(-1).to(device)
    dense = lambda: F.kl_div((h @ W.T).log_softmax(-1), said, reduction="batchmean", log_target=True)
    t = medians(device, 5, dense=lambda: both(h, W, dense),
                anchor=lambda: both(h, W, lambda: linear_replay_kl_div(h, W, record)))
    report("KL of 320 positions, V = 50304, 32 tokens a row: faster than the dense one",
           f"{t['dense'] / t['anchor']:.1f}x", ">= 10x", seconds=t)


def measure_recording(device, N=1024, V=50304):
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(V, (N,), generator=generator).to(device)
    ranks = -torch.log(torch.arange(1, V + 1.0))
    slopes = torch.empty(N).uniform_(1.4, 4, generator=generator)
    models = {"confident": torch.stack([s * ranks[torch.randperm(V, generator=generator)] for s in slopes]),
              "flat": torch.randn(N, V, generator=generator)}
    for name, z in models.items():
        z = z.to(device)
        t = medians(device, 3, record=lambda: record_topk(z, y, 0.9), log_softmax=lambda: z.log_softmax(-1),
                    sort=lambda: z.sort(dim=-1, descending=True, stable=True))
        size = record_topk(z, y, 0.9).subset_sizes.float().mean()
        report(f"recording, {name} (mean {size:.0f} tokens): faster than one full sort; times one log_softmax",
               f"{t['sort'] / t['record']:.1f}x; {t['record'] / t['log_softmax']:.1f}x",
               ">= 5x; <= 2x" * (name == "confident"), seconds=t)


def watched(score, head_ms):
    """The loss with a stopwatch: milliseconds from its forward pass until its gradient reaches the hidden states."""
    def timed(hidden, *inputs):
        start = time.perf_counter()
        hidden.register_hook(lambda _: head_ms.append(1e3 * (time.perf_counter() - start)))
        return score(hidden, *inputs)
    return timed


def measure_training(_):
    """Every arm of the study on the default model, in turns of 20 steps; and the default run's whole Stage 0."""
    base = sweep.prepared(0)
    more = {f"anchor+adamw, windows a step: {n}": dict(sweep.ANCHOR, anchor_step=n) for n in (1, 4)}
    arms = [{"name": name, "settings": arm, "turns": []} for name, arm in {**sweep.ALL, **more}.items()]
    for arm in 3 * arms:
        s = SimpleNamespace(**{**sweep.DEFAULT, "lr": 1e-9, "steps": 20, **arm["settings"]})
        _, out = sweep.train(base, s)
        arm["turns"].append(out["step_ms"])
        arm |= {"step_ms": statistics.median(arm["turns"]), "stage0_s": out["stage0_s"]}
    tail, anchor = (f"{arms[i]['step_ms'] / arms[0]['step_ms']:.2f}" for i in (1, 3))
    report("a step of tail+adamw, of anchor+adamw: part of full+adamw's", f"{tail}; {anchor}", "<= 0.6; <= 0.75",
           arms=arms)
    for factor in (1, 2, 4) if sweep.DEVICE.type == "cpu" else ():  # its stopwatch is the processor's
        measure_share(base, base.stored[sweep.DEFAULT["tau"]][0], factor)


def measure_share(base, record, factor):
    """R8 at a vocabulary `factor` times as large: what of the head's time and of a step's a tail saves."""
    (tokens, targets), state = base.data.domain_train, base.model.state_dict()
    size = script.Size()._replace(vocab_size=factor * record.vocab_size)
    V, model = size.vocab_size, script.Model(size)
    added = torch.zeros(V - record.vocab_size, size.width)  # rows of the head: tokens that are never gold
    model.load_state_dict({**state, "embedding.weight": torch.cat([state["embedding.weight"], added])})
    record = ReplayRecord(record.token_ids, record.offsets, record.outside_mass, V, record.tau)  # the same subsets
    s, found = SimpleNamespace(**{**sweep.DEFAULT, "lr": 1e-9, "steps": 20}), {"full+adamw": [], "tail+adamw": []}
    for method in 3 * list(found):
        head_ms = []
        score = watched(script.scorer(method, record, s, torch.Generator().manual_seed(0)), head_ms)
        out = script.finetune(model, method, (tokens, targets), record, lambda *_: 0.0, s, 0, sweep.DEVICE, None, score)
        found[method].append((statistics.median(head_ms), out["step_ms"]))
    full, tail = (tuple(map(statistics.median, zip(*turns))) for turns in found.values())
    head, step = (1 - b / a for a, b in zip(full, tail))
    # operations: the head sees the scored positions only, the body also the prompts before them
    scored, prompts = (targets != script.IGNORE).sum().item(), (targets != script.IGNORE).int().argmax(1).sum().item()
    work, body = scored * V * size.width, sum(p.numel() for p in model.parameters()) - V * size.width
    predicted = head * work / (work + (prompts + scored) * body)
    report(f"tail+adamw, V = {V}: saved of the head's time; of a step's; by R8",
           f"{head:.0%}; {step:.0%}; {predicted:.0%}", ">= 65%", milliseconds=found)


MEASURES = dict(head=measure_head, anchor=measure_anchor, recording=measure_recording, training=measure_training)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default=sweep.DEVICE, type=torch.device)
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    args = parser.parse_args()
    print("| what | measured | aim |\n|---|---|---|")
    for name in args.only:
        MEASURES[name](args.device)
    found = {"device": f"{args.device}, {platform.machine()}, {torch.get_num_threads()} threads",
             "torch": torch.__version__, "rows": rows}
    path = sweep.RESULTS.with_name(f"speed_{args.device.type}.json")
    script.write_atomically(path, lambda file: file.write((json.dumps(found, indent=1) + "\n").encode()))


if __name__ == "__main__":
    main()
