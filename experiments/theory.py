"""Two consequences of a small max_angle, simulated beside the formulas of THEORY.md: circling (M7) and noise (M8).

    python experiments/theory.py

Seeded, float64, under a minute on one core.
M7: MoClip on f = |w|^2 / 2 in the plane; radius = mean |w| over the last steps, in units of lr.
M8: gradients that are nothing but isotropic noise of norm 1; |m| and what it does to a random walk.
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from moclip import MoClip  # noqa: E402  (the repository root must be on the path first)

DEGREES = (5, 10, 20, 30, 45, 60, 75, 85, 90, 120, 150, 180)


def steady_ratio(max_angle, beta1):
    """x = |m| / |g|, the positive root of (1 - beta1^2) x^2 - 2 beta1 (1 - beta1) cos(D) x - (1 - beta1)^2 = 0."""
    return (beta1 * math.cos(max_angle) + math.sqrt(1 - (beta1 * math.sin(max_angle))**2)) / (1 + beta1)


def steady_turn(max_angle, beta1):
    """psi, the angle by which m turns in a step at that ratio."""
    x = steady_ratio(max_angle, beta1)
    return math.atan2((1 - beta1) * math.sin(max_angle), beta1 * x + (1 - beta1) * math.cos(max_angle))


def orbit_radius(max_angle, beta1, a=4 / math.pi, b=1.0):
    """R / lr = h / (2 sin(psi / 2)), h the mean over all directions of |a atan(sqrt(2) x (cos, sin) / b)|."""
    x, n = steady_ratio(max_angle, beta1), 720
    h = sum(a * math.hypot(math.atan(math.sqrt(2) * x * math.cos(2 * math.pi * k / n) / b),
                           math.atan(math.sqrt(2) * x * math.sin(2 * math.pi * k / n) / b)) for k in range(n)) / n
    return h / (2 * math.sin(steady_turn(max_angle, beta1) / 2))


def batch_cosine(ratio, beta1):
    """M11: cos(theta) without a cap, r / sqrt((1 + r) (r + kappa)), r = batch |mu|^2 / tr Sigma, kappa = (1 - beta1) / (1 + beta1)."""
    return ratio / math.sqrt((1 + ratio) * (ratio + (1 - beta1) / (1 + beta1)))


def batch_ratio(angle, beta1):
    """M11: the r at which that angle is `angle` < pi/2, the positive root of r^2 = cos^2 (1 + r) (r + kappa)."""
    kappa, c, s = (1 - beta1) / (1 + beta1), math.cos(angle)**2, math.sin(angle)**2
    return (c * (1 + kappa) + math.sqrt(c**2 * (1 + kappa)**2 + 4 * s * c * kappa)) / (2 * s)


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


def main():
    torch.set_num_threads(1)
    print("M7: radius / lr on f = |w|^2 / 2, betas (0.9, 0.99)")
    print("max_angle   simulated mean    max   clipped   formula")
    for degrees in DEGREES:
        D = math.radians(degrees)
        mean, largest, clipped = circle(D)
        print(f"{degrees:7d} deg {mean:14.2f} {largest:8.2f} {clipped:8.0%} {orbit_radius(D, 0.9):9.2f}")
    print("\nM8: isotropic noise in 4000 dimensions, beta1 = 0.9 (formula above 90 degrees: that of 90, the cap is idle)")
    print("max_angle   |m|/|g| simulated  formula   cos(psi) simulated  formula   diffusion simulated  formula")
    for degrees in DEGREES:
        D = math.radians(min(degrees, 90))
        x, cosine = steady_ratio(D, 0.9), 0.9 + 0.1 * math.cos(D) / steady_ratio(D, 0.9)
        T = 2000
        diffusion = x**2 * ((1 + cosine) / (1 - cosine) - 2 * cosine * (1 - cosine**T) / (1 - cosine)**2 / T)
        length, mean_cosine, walk = noise(math.radians(degrees))
        print(f"{degrees:7d} deg {length:19.4f} {x:8.4f} {mean_cosine:20.5f} {cosine:8.5f} {walk:21.2f} {diffusion:8.2f}")


if __name__ == "__main__":
    main()
