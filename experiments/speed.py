"""Speed and memory as ratios, measured side by side in one run (7 minutes on 2 cores):

    python experiments/speed.py [--device cuda] [--only head large growth recording file optimizer training]

prints one table, and writes it to experiments/results/speed.json. Two things that are compared take turns, so that a
noisy machine slows both; the figure is the median over the turns. Peak memory is measured in a process of its own.
"floor" is the time that the operands' bytes need at the rate of a large copy, or the products at the rate of a large
matrix product, whichever is longer, both measured in the same run: no implementation on this machine can beat it.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_small as script  # noqa: E402  (its folder is on the path only now)
from logits_replay import ReplayRecord, linear_replay_cross_entropy, record_topk, sample_tail  # noqa: E402
from moclip import MoClip  # noqa: E402

RESULTS, TAU = ROOT / "experiments/results/speed.json", 0.9
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


def machine_rates(device):
    """(bytes a second of a large copy, floating-point operations a second of a large product)."""
    x, a = torch.randn(2**26, device=device), torch.randn(2048, 2048, device=device)
    y, b = torch.empty_like(x), torch.empty_like(a)
    t = medians(device, 5, copy=lambda: y.copy_(x), product=lambda: torch.mm(a, a, out=b))
    return 8 * 2**26 / t["copy"], 2 * 2048**3 / t["product"]


# ------------------------------------------------------------------------------------------------------------- head

def head(device, N=2048, d=256, V=50304, size=32):
    """Hidden states, head, targets and a record of about `size` tokens a row, ids Zipf-distributed (exponent 1)."""
    generator = torch.Generator().manual_seed(0)
    h, W = torch.randn(N, d, generator=generator), torch.randn(V, d, generator=generator) / d**0.5
    zipf = lambda shape: torch.exp(torch.rand(shape, generator=generator) * \
                                   torch.log(torch.tensor(float(V)))).long() - 1
    y, rows_of_ids = zipf((N,)), []
    for gold in y.tolist():
        rows_of_ids.append(sorted(list(dict.fromkeys([gold, *zipf((4 * size,)).tolist()]))[:size]))
    offsets = torch.tensor([0, *map(len, rows_of_ids)]).cumsum(0)
    record = ReplayRecord(torch.tensor([i for row in rows_of_ids for i in row],
                          dtype=torch.int32), offsets, torch.zeros(N), V, 0.9)
    return (h.to(device).requires_grad_(), W.to(device).requires_grad_(), y.to(device), record.to(device))


def head_losses(h, W, y, record):
    """Forward and backward of every form of the head."""
    def both(loss):
        h.grad = W.grad = None
        loss().backward()
    return {"dense": lambda: both(lambda: F.cross_entropy(h @ W.T, y)),
            "linear_cross_entropy": lambda: both(lambda: F.linear_cross_entropy(h, W, y)),
            "chunked": lambda: both(
                lambda: F.linear_cross_entropy(h, W, y, options=torch.nn.LinearCrossEntropyOptions())),
            "replay": lambda: both(lambda: linear_replay_cross_entropy(h, W, y, record)),
            "tail": lambda: both(
                lambda: linear_replay_cross_entropy(h, W, y, record, tail=sample_tail(y, len(W), 256)))}


def peak_of(name, queue, device, options):
    h, W, y, record = head(device, **options)
    function = head_losses(h, W, y, record)[name]
    gradients = h.nbytes + W.nbytes  # every form returns them: they are not extra
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        queue.put(torch.cuda.max_memory_allocated() - before - gradients)
    else:
        status = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
        before = status("VmRSS")
        function()
        queue.put(1024 * (status("VmHWM") - before) - gradients)


def peak_memory(name, device, **options):
    """Bytes that the loss, forward and backward, needs beside its inputs and the gradients."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=peak_of, args=(name, queue, device, options))
    child.start()
    peak = queue.get()
    child.join()
    return peak


def measure_head(device, copy_rate, product_rate):
    for size in (32, 512, 2048):
        h, W, y, record = head(device, size=size)
        t = medians(device, 3, **head_losses(h, W, y, record))
        best = min(t["dense"], t["linear_cross_entropy"], t["chunked"])
        nnz, (N, d), V = len(record.token_ids), h.shape, len(W)
        # rows of W and entries of dL/dW are read and written once for each recorded token, and dL/dW is zeroed once
        floor = max(6 * nnz * d / product_rate, 4 * d * (4 * nnz + V) / copy_rate)
        report(f"head, {nnz / N:.0f} tokens a row: faster than the fastest dense form", f"{best / t['replay']:.1f}x",
               {32: ">= 25x", 512: "> 1x"}.get(size, ""), seconds=t, floor_seconds=floor,
               above_floor=t["replay"] / floor)
        if size == 32:
            M = len(sample_tail(y, V, 256).token_ids)
            report(f"the same with a tail of 256 and the golds (M = {M}), its sampling included",
                   f"{best / t['tail']:.1f}x", ">= 15x", seconds=t)
    peaks = {name: peak_memory(name, device) for name in ("dense", "linear_cross_entropy", "chunked", "replay", "tail")}
    least = min(peaks["dense"], peaks["linear_cross_entropy"])
    for name, target in (("replay", "<= 0.1"), ("tail", "<= 0.2"), ("chunked", "")):
        report(f"head, 32 tokens a row, {name}: peak memory, part of the leaner dense form's",
               f"{peaks[name] / least:.2f}", target, megabytes={k: round(v / 1e6, 1) for k, v in peaks.items()})


def measure_large(device, *_):
    """A large batch has thousands of golds: N = 16384 of V = 131072. The dense form at a quarter of N, times four."""
    large, quarter = dict(N=16384, V=131072), dict(N=4096, V=131072)
    peaks = {"tail": peak_memory("tail", device, **large), "dense": 4 * peak_memory("dense", device, **quarter)}
    h, W, y, record = head(device, **quarter)
    dense = 4 * medians(device, 1, dense=head_losses(h, W, y, record)["dense"])["dense"]
    h, W, y, record = head(device, **large)
    t = medians(device, 1, **{name: head_losses(h, W, y, record)[name] for name in ("replay", "tail")})
    M = len(sample_tail(y, len(W), 256).token_ids)
    report("head, N = 16384, V = 131072, 32 tokens a row, tail of 256 and the golds "
           f"(M = {M}): faster than the dense form", f"{dense / t['tail']:.1f}x", "", seconds={**t, "dense": dense})
    report("the same: peak memory, part of the dense form's", f"{peaks['tail'] / peaks['dense']:.2f}", "<= 0.2",
           megabytes={k: round(v / 1e6, 1) for k, v in peaks.items()})


def measure_growth(device, *_):
    frozen, whole, gradient = [], [], []
    for V in (8192, 32768, 131072, 262144):
        h, W, y, record = head(device, V=V)
        def without(W=W.detach(), h=h, y=y, record=record):
            h.grad = None
            linear_replay_cross_entropy(h, W, y, record).backward()
        t = medians(device, 7, frozen=without, whole=head_losses(h, W, y, record)
                    ["replay"], zeros=lambda: torch.zeros_like(W).add_(0))
        frozen.append(t["frozen"]), whole.append(t["whole"]), gradient.append(t["zeros"])
    report("head, V from 8k to 256k (32x), head frozen: slower by",
           f"{frozen[-1] / frozen[0]:.1f}x", "flat", seconds=frozen)
    report("the same with the dense gradient of the head: slower by", f"{whole[-1] / whole[0]:.1f}x", "", seconds=whole,
           seconds_to_write_a_dense_gradient=gradient)


# -------------------------------------------------------------------------------------------------------- recording

def measure_recording(device, copy_rate, product_rate, N=1024, V=50304):
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(V, (N,), generator=generator).to(device)
    ranks = -torch.log(torch.arange(1, V + 1.0))
    slopes = torch.empty(N).uniform_(1.4, 4, generator=generator)
    models = {"confident": torch.stack([s * ranks[torch.randperm(V, generator=generator)] for s in slopes]),
              "flat": torch.randn(N, V, generator=generator)}
    for name, z in models.items():
        z = z.to(device)
        sizes = record_topk(z, y, 0.9).subset_sizes.float()
        t = medians(device, 3, record=lambda: record_topk(z, y, 0.9), log_softmax=lambda: z.log_softmax(-1),
                    sort=lambda: z.sort(dim=-1, descending=True, stable=True))
        details = dict(seconds=t, mean_size=sizes.mean().item(), median_size=sizes.median().item())
        # the logits are read once, the ids written once
        details["floor_seconds"] = 4 * (N * V + sizes.sum().item()) / copy_rate
        details["above_floor"] = t["record"] / details["floor_seconds"]
        report(f"recording, {name} (mean {sizes.mean():.0f} tokens): faster than one full sort",
               f"{t['sort'] / t['record']:.1f}x", ">= 8x", **details)
        report(f"recording, {name}: times one log_softmax",
               f"{t['record'] / t['log_softmax']:.1f}x", "<= 2x" * (name == "confident"))


def measure_file(device, *_):
    N, size = 2**22, 60
    ids = (torch.arange(N * size) % size).int()  # 1 GB
    record = ReplayRecord(ids, torch.arange(N + 1) * size, torch.zeros(N), 50304, 0.9)
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        path, raw = Path(folder) / "record.npz", Path(folder) / "raw"
        data = ids.numpy().tobytes()

        def write():
            with open(raw, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        t = medians(torch.device("cpu"), 3, save=lambda: record.save(path), write=write,
                    load=lambda: ReplayRecord.load(path),
                    read=lambda: raw.read_bytes())
    report("saving a 1 GB record: times writing its bytes", f"{t['save'] / t['write']:.1f}x", "<= 3x", seconds=t)
    report("loading it, every invariant checked: times reading its bytes", f"{t['load'] / t['read']:.1f}x", "<= 3x")


# -------------------------------------------------------------------------------------------------------- optimizer

def measure_optimizer(device, copy_rate, product_rate):
    compact = [torch.nn.Parameter(p.detach().to(device)) for p in script.Model().parameters()]
    large = [torch.nn.Parameter(torch.randn(1000, 1000, device=device)) for _ in range(100)]
    for name, params, turns in (("the compact model", compact, 25), ("100 tensors of 1M", large, 5)):
        for p in params:
            p.grad = torch.randn_like(p)
        theirs, mine = torch.optim.AdamW(params, 1e-9, foreach=True), MoClip(params, 1e-9)
        single = torch.optim.AdamW(params, 1e-9, foreach=False)
        x, y = torch.randn(10**6, device=device), torch.rand(10**6, device=device)
        t = medians(device, turns, moclip=mine.step, adamw_foreach=theirs.step,
                    adamw_loop=single.step, atan2=lambda: torch.atan2(x, y))
        entries = sum(p.numel() for p in params)
        # g, m twice; w, m, v read and written; or arctan2
        floor = max(4 * 9 * entries / copy_rate, t["atan2"] * entries / 1e6)
        same = sum(s.numel() for state in mine.state.values() for s in state.values()) == sum(
            s.numel() for state in theirs.state.values() for s in state.values())
        report(f"MoClip.step, {name}: times AdamW(foreach=True)", f"{t['moclip'] / t['adamw_foreach']:.2f}x", "<= 1.5x",
               seconds=t,
               same_state=same, floor_seconds=floor, above_floor=t["moclip"] / floor)


# --------------------------------------------------------------------------------------------------------- training

def measure_training(device, copy_rate, product_rate):
    """The default run of train_small.py, in batches of 32 and 128, and at larger vocabularies, which only add rows."""
    settings = dict(lr=1e-9, max_angle=90.0, tail=256)
    data = script.prepare(script.BASE, 120)
    (ROOT / "runs").mkdir(exist_ok=True)
    state, _ = script.load_base(data, script.BASE, ROOT / "runs", device)
    tokens, targets = data.domain_train
    default, scored = script.V, int((targets != script.IGNORE).sum())
    for V, batch in ((default, 32), (default, 128), (2 * default, 32), (4 * default, 32)):
        script.V = V
        model = script.Model().to(device)
        weight = torch.full((V, script.WIDTH), 0.0)
        weight[:default] = state["embedding.weight"]
        model.load_state_dict({**state, "embedding.weight": weight})
        name = f"V = {V}, batches of {batch}"
        if (V, batch) == (default, 32):
            stage0 = 1e3 * medians(device, 2, stage0=lambda: script.stage0(model,
                                   tokens, targets, TAU, device))["stage0"]
            record = script.stage0(model, tokens, targets, TAU, device)
            size = sum(x.nbytes for x in (record.token_ids, record.offsets, record.outside_mass)) / len(record)
            report(f"record, bytes a position (float32 logits: {4 * V})", f"{size:.0f}")
        elif V != default:  # the same subsets: what changes is the head
            record = ReplayRecord(record.token_ids, record.offsets, record.outside_mass, V, record.tau)
        out = {}
        for turn in range(3):
            for method in script.METHODS:
                args = SimpleNamespace(**settings, steps=20 * 32 // batch, batch=batch)
                measured = script.finetune(model, method, data.domain_train, record, lambda *_: 0.0, args, 0, device)
                out.setdefault(method, []).append(measured)
        ms = {m: {k: statistics.median(r[k] for r in runs) for k in ("step_ms", "head_ms")} for m, runs in out.items()}
        dense = ms["full+adamw"]
        targets_of = {"replay+adamw": "", "replay+moclip": "", "tail+adamw": ">= 40%", "tail+moclip": ">= 35%"}
        for method, target in targets_of.items():
            step = ms[method]["step_ms"]
            report(f"training step, {name}: {method} below full+adamw by", f"{1 - step / dense['step_ms']:.0%}",
                   target * ((V, batch) == (default, 32)), milliseconds=ms[method], full=dense)
            report("its head: part of full+adamw's", f"{ms[method]['head_ms'] / dense['head_ms']:.2f}",
                   "<= 0.35" * ("tail" in method and (V, batch) == (default, 32)))
            if V == default and "tail" in method:
                steps = 200 if batch == 32 else 100  # 3.5 and 7 epochs, as in the study
                whole = 1 - (steps * step + stage0) / (steps * dense["step_ms"])
                report(f"the whole run of {steps} steps, Stage 0 counted in, {name}: {method} below full+adamw by",
                       f"{whole:.0%}", {32: ">= 25%", 128: ">= 45%"}[batch], stage0_ms=stage0)
        # operations: the head sees the scored positions only, the body also the prompts before them
        prompts = int((targets != script.IGNORE).int().argmax(1).sum())
        head_work, body = scored * V * script.WIDTH, sum(p.numel() for p in model.parameters()) - V * script.WIDTH
        share = head_work / (head_work + (prompts + scored) * body)
        kappa = ms["tail+adamw"]["head_ms"] / dense["head_ms"]
        report(f"tail+adamw, {name}: R8 predicts {share * (1 - kappa):.0%} (the head's share of the operations: "
               f"{share:.0%}), measured",
               f"{1 - ms['tail+adamw']['step_ms'] / dense['step_ms']:.0%}", "", kappa=kappa)
    script.V = default
    positions = torch.randint(len(record), (2048,))
    t = medians(device, 20, select=lambda: record.select(positions),
                sample=lambda: sample_tail(positions % default, default, 256))
    report("select of 2048 random rows and the sampling of a tail, ms",
           f"{1e3 * t['select']:.1f}, {1e3 * t['sample']:.1f}", "", seconds=t)


MEASURES = {"head": measure_head, "large": measure_large, "growth": measure_growth, "recording": measure_recording,
            "file": measure_file,
            "optimizer": measure_optimizer, "training": measure_training}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    args = parser.parse_args()
    device = torch.device(args.device)
    rates = machine_rates(device)
    print("| what | measured | target |\n|---|---|---|")
    for name in args.only:
        MEASURES[name](device, *rates)
    RESULTS.parent.mkdir(exist_ok=True)
    kind = torch.cuda.get_device_name(
    ) if device.type == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    found = {"device": kind, "torch": torch.__version__,
        "copy_bytes_per_second": rates[0], "product_flops": rates[1], "rows": rows}
    script.write_atomically(RESULTS, lambda temporary: temporary.write_text(json.dumps(found, indent=1) + "\n"))


if __name__ == "__main__":
    main()
