"""What a small max_angle does, simulated beside the formulas of THEORY.md: circling on f = |w|^2 / 2 (M7), and momentum
that lives on gradients that are nothing but isotropic noise (M8).

    python -m experiments.theory

Seeded, float64, under a minute on one core. And settings for a model, each with the statement it follows from:

    python -m experiments.theory --advise --vocab 151936 --width 896 --layers 24 --epochs 3 --batch 32
        [--parameters 494032768] [--record FILE.npz] [--angles 82 79 85 ...] [--lr 1e-5]

parameters: all that are multiplied, head included (R8); without it 12 d^2 a layer. record: what `ReplayRecord.save`
wrote; one with log_probs is an anchor's. angles: `last_angle` in degrees, of steps with max_angle=math.pi.
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import torch

from logits_replay import ReplayRecord, linear_replay_kl_div
from moclip import MoClip

DEGREES = (5, 10, 20, 30, 45, 60, 75, 85, 90, 120, 150, 180)


def steady_ratio(max_angle, beta1):
    """x = |m| / |g|, the positive root of (1 - beta1^2) x^2 - 2 beta1 (1 - beta1) cos(D) x - (1 - beta1)^2 = 0."""
    return (beta1 * math.cos(max_angle) + math.sqrt(1 - (beta1 * math.sin(max_angle))**2)) / (1 + beta1)


def steady_turn(max_angle, beta1):
    """psi, the angle by which m turns in a step at that ratio."""
    x = steady_ratio(max_angle, beta1)
    return math.atan2((1 - beta1) * math.sin(max_angle), beta1 * x + (1 - beta1) * math.cos(max_angle))


def orbit_radius(max_angle, beta1):
    """R / lr = h / (2 sin(psi / 2)), h the mean over all directions of |a atan(sqrt(2) x (cos, sin))|, a = 4 / pi."""
    x, n = steady_ratio(max_angle, beta1), 720
    h = sum(4 / math.pi * math.hypot(math.atan(math.sqrt(2) * x * math.cos(2 * math.pi * k / n)),
                                     math.atan(math.sqrt(2) * x * math.sin(2 * math.pi * k / n))) for k in range(n)) / n
    return h / (2 * math.sin(steady_turn(max_angle, beta1) / 2))


def batch_cosine(ratio, beta1):
    """M11: cos(theta) without a cap, zeta / sqrt((1 + zeta) (zeta + chi)), of zeta = batch |mu|^2 / tr Sigma."""
    return ratio / math.sqrt((1 + ratio) * (ratio + (1 - beta1) / (1 + beta1)))


def batch_ratio(angle, beta1):
    """M11: the zeta of that angle, `angle` < pi/2: the positive root of zeta^2 = cos^2 (1 + zeta) (zeta + chi)."""
    chi, c, s = (1 - beta1) / (1 + beta1), math.cos(angle)**2, math.sin(angle)**2
    return (c * (1 + chi) + math.sqrt(c**2 * (1 + chi)**2 + 4 * s * c * chi)) / (2 * s)


def guaranteed_steps(tau, lr, h_norm, rho_max=0.5, betas=(0.9, 0.999), a=4 / math.pi, b=1.0):
    """R11: steps of a linear head on a frozen body, |h|_1 = h_norm, for which a record at tau keeps rho <= rho_max."""
    C = (1 - betas[0]) * math.sqrt(betas[1] / ((1 - betas[1]) * (betas[1] - betas[0]**2)))
    rise = math.log(rho_max / (1 - rho_max) * tau / (1 - tau))
    return rise / (2 * h_norm * lr * a * math.atan(C / b))


def circle(max_angle, steps=5000, lr=0.01, betas=(0.9, 0.99)):
    """(mean, max) of |w| / lr over the last 1000 steps, and the share of them that was clipped."""
    w = torch.nn.Parameter(torch.tensor([1.0, 0.4], dtype=torch.float64))
    optimizer, radii, clipped = MoClip([w], lr=lr, betas=betas, max_angle=max_angle), [], []
    for _ in range(steps):
        w.grad = w.detach().clone()
        optimizer.step()
        radii.append(w.detach().norm())
        clipped.append(optimizer.last_clipped)
    radii = torch.stack(radii[-1000:]) / lr
    return radii.mean().item(), radii.max().item(), torch.stack(clipped[-1000:]).double().mean().item()


def noise(max_angle, dimensions=4000, steps=2000, beta1=0.9):
    """(|m|, mean cosine of successive momenta, |sum of m|^2 / steps) under unit-norm isotropic noise."""
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.zeros(dimensions, dtype=torch.float64))
    optimizer, total, cosines, lengths = MoClip([w], betas=(beta1, 0.99), max_angle=max_angle), 0, [], []
    for t in range(300 + steps):
        g = torch.randn(dimensions, dtype=torch.float64, generator=generator)
        w.grad = g / g.norm()
        previous = optimizer.state[w]["exp_avg"].clone() if t else None
        optimizer.step()
        if t >= 300:
            m = optimizer.state[w]["exp_avg"]
            total = total + m
            lengths.append(m.norm())
            cosines.append(torch.nn.functional.cosine_similarity(previous, m, dim=0))
    return torch.stack(lengths).mean().item(), torch.stack(cosines).mean().item(), (total @ total).item() / steps


def anchor_ms(record, width):
    """Milliseconds of the anchor, forward and backward, on that record and a random head: the median of 9."""
    h, W = (torch.randn(n, width, requires_grad=True) for n in (len(record), record.vocab_size))
    def step():
        start = time.perf_counter()
        torch.autograd.grad(linear_replay_kl_div(h, W, record), (h, W))
        return 1000 * (time.perf_counter() - start)
    return statistics.median(step() for _ in range(9))


def advise(vocab, width, layers, epochs, batch, parameters=None, record=None, angles=(), lr=None, beta1=0.9):
    """Lines of advice, each with the statement of THEORY.md that it follows from."""
    share = vocab * width / (parameters or vocab * width + 12 * layers * width**2)
    yield f"head share: s = {share:.1%} of the operations{'' if parameters else ', at 12 d^2 parameters a layer'} (R8)"
    kappa = 1 / 50  # the tail's, and the record's, if it is known
    yield (f"tail: V/50 = {vocab // 50} tokens beside the golds of the batch, from the first step on: rho rises within"
           f" tens of steps; {share / 50:.1%} of all operations, and the golds' part (R7, R9)")
    if record is not None:
        if record.vocab_size != vocab:
            raise ValueError(f"the record is one of vocab_size {record.vocab_size}, not of {vocab}")
        scored = record.subset_sizes > 0  # an ignored position has an empty row
        sizes, rho = record.subset_sizes[scored].double(), record.outside_mass[scored].double().mean().item()
        if record.log_probs is not None:
            step, blind = record.select(torch.arange(min(len(record), 320))), (sizes == 1).double().mean().item()
            stored = sum(x.nbytes for x in vars(record).values() if isinstance(x, torch.Tensor)) / len(record)
            yield (f"anchor: of the base's KL it sees the part inside, weighted {1 - rho:.1%}, and nothing at the"
                   f" {blind:.1%} of positions with one token{': ask for a larger tau' if blind > 0.1 else ''} (R13)")
            yield (f"its price: {stored:.0f} bytes a position; {anchor_ms(step, width):.2f} ms in the head for"
                   f" {len(step)} positions a step, measured here and now, and their way through the body (R8)")
            record = None  # the one to train on is another
    if record is None:
        yield (f"tau: 0.9 with that tail; without one expect to lose accuracy, and start at 0.98: higher while the mean"
               f" subset stays below V/10 = {vocab // 10} tokens (R1, R3, R7)")
    else:
        part = sizes.mean().item() / vocab
        room = "there is room for a larger tau" if part < 0.1 else "a smaller tau would make it cheaper"
        yield (f"tau: {record.tau:g} keeps {part * vocab:.0f} tokens a row, {part:.2%} of the dense head: {room} (R8);"
               f" the gradient's bias was {2 * rho:.4f} when it was recorded (R3)")
        kappa += part
    saved, one = share * (1 - kappa), 1 / (3 * epochs)  # by replay in all epochs; by one Stage 0, lost
    yield (f"recordings: {math.floor(saved / one)} at most pay for themselves; one saves {saved - one:.1%} of all"
           f" operations, one at every epoch {saved - 1 / 3:.1%} (R8 at kappa = {kappa:.1%})")
    cap = 90
    if angles:
        theta = math.radians(max(statistics.median(angles), 0.1))  # at 0 no batch is too small
        ratio = batch_ratio(theta, beta1) if theta < math.pi / 2 else 0.0
        for degrees in (75, 60, 45):
            needed = 1.4 * batch * batch_ratio(math.radians(degrees), beta1) / ratio if ratio else math.inf
            cap = degrees if needed <= batch else cap
            least = math.ceil(needed) if ratio else "no size"
            yield f"a cap of {degrees} degrees idles on noise from a batch of {least} on (M11)"
    yield f"max_angle: {cap} degrees ({'M11' if angles else 'M7, M8; with --angles: M11'})"
    if lr is not None:
        tau = record.tau if record else 0.9
        steps = math.floor(guaranteed_steps(tau, lr, width)) if tau < 1 else math.inf
        yield (f"lr: no weight moves by more than {1.826 * lr:.3g} a step (M4); if the head alone moves and |h|_1 <= d,"
               f" a record at tau {tau:g} guarantees rho <= 1/2 for {steps} steps (R11): measure outside_mass")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--advise", action="store_true", help="print settings instead of simulating")
    names = "vocab", "width", "layers", "epochs", "batch"
    for name in (*names, "parameters"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--angles", type=float, nargs="+", default=[], metavar="DEG")
    parser.add_argument("--lr", type=float)
    args = parser.parse_args(argv)
    if args.advise:
        if min(values := [getattr(args, name) for name in names]) <= 0:
            parser.error("--advise needs positive " + ", ".join(f"--{name}" for name in names))
        record = ReplayRecord.load(args.record) if args.record else None
        print(*(f"- {line}" for line in advise(*values, args.parameters, record, args.angles, args.lr)), sep="\n")
        return
    torch.set_num_threads(1)
    print("M7: radius / lr on f = |w|^2 / 2, betas (0.9, 0.99)")
    print("max_angle   simulated mean    max   clipped   formula")
    for degrees in DEGREES:
        D = math.radians(degrees)
        mean, largest, clipped = circle(D)
        print(f"{degrees:7d} deg {mean:14.2f} {largest:8.2f} {clipped:8.0%} {orbit_radius(D, 0.9):9.2f}")
    print("\nM8: isotropic noise in 4000 dimensions, beta1 = 0.9 (above 90 degrees the formula is that of 90)")
    print("max_angle   |m|/|g| simulated  formula   cos(psi) simulated  formula   diffusion simulated  formula")
    for degrees in DEGREES:
        D = math.radians(min(degrees, 90))
        x, cosine = steady_ratio(D, 0.9), 0.9 + 0.1 * math.cos(D) / steady_ratio(D, 0.9)
        diffusion = x**2 * ((1 + cosine) / (1 - cosine) - 2 * cosine * (1 - cosine**2000) / (1 - cosine)**2 / 2000)
        length, mean, walk = noise(math.radians(degrees))
        print(f"{degrees:7d} deg {length:19.4f} {x:8.4f} {mean:20.5f} {cosine:8.5f} {walk:21.2f} {diffusion:8.2f}")


if __name__ == "__main__":
    main()
