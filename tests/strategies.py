"""Hypothesis strategies for the domain: logits with ties and spikes, and pairs of vectors at every kind of angle."""

import numpy as np
import torch
from hypothesis import strategies as st

taus = st.one_of(st.sampled_from([0.125, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0]), st.floats(1e-6, 1.0))
"""Coverages: dyadic ones, at which uniform rows reach tau exactly, usual ones, 1, and any."""


@st.composite
def logits_and_targets(draw, dtype=torch.float32, max_rows=5, sizes=(1, 2, 3, 8, 40, 64, 65, 200, 1500)):
    """(logits (N, V), target (N,)). Rows are flat, rounded (many ties), Gaussian, spiked, or spread over +-1e4."""
    N, V = draw(st.integers(1, max_rows)), draw(st.sampled_from(sizes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = []
    kinds = st.sampled_from(["flat", "ties", "normal", "sharp", "spike", "spread"])
    for kind in draw(st.lists(kinds, min_size=N, max_size=N)):
        z = {"flat": lambda: np.zeros(V), "ties": lambda: np.round(rng.normal(size=V)),
             "normal": lambda: rng.normal(size=V), "sharp": lambda: 5 * rng.normal(size=V),
             "spread": lambda: rng.uniform(-1e4, 1e4, size=V),
             "spike": lambda: np.where(np.arange(V) == rng.integers(V), 30.0, rng.normal(size=V))}[kind]()
        rows.append(z)
    target = rng.integers(V, size=N)
    target[rng.random(N) < 0.2] = -100
    return torch.tensor(np.array(rows)).to(dtype), torch.tensor(target)


@st.composite
def vector_pairs(draw, dtype=torch.float64, max_size=8, scales=(-8, 8)):
    """(u, v) of one shape: random, zero, parallel, orthogonal, antiparallel and nearly so, from tiny to huge."""
    n = draw(st.integers(1, max_size))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    u, w = rng.normal(size=n), rng.normal(size=n)
    kind = draw(st.sampled_from(["any", "any", "zero", "parallel", "orthogonal", "antiparallel", "nearly"]))
    if kind == "any":
        v = w
    elif kind == "zero":
        v = np.zeros(n)
    elif kind == "parallel":
        v = 2 * u
    elif kind == "antiparallel":
        v = -2 * u
    elif kind == "orthogonal":
        v = w - (w @ u) / (u @ u) * u
    else:
        v = rng.choice([-1, 1]) * u + 10.0 ** rng.integers(-8, 0) * w
    u, v = u * 10.0 ** draw(st.integers(*scales)), v * 10.0 ** draw(st.integers(*scales))
    return (torch.tensor(u, dtype=dtype), torch.tensor(v, dtype=dtype))[:: draw(st.sampled_from([1, -1]))]


@st.composite
def sampled_tails(draw, max_V=7):
    """(z, S, y, golds, m): one position, the gold tokens of its batch, y among them, and how many others to sample."""
    V = draw(st.integers(3, max_V))
    z = np.array(draw(st.lists(st.floats(-4, 4, width=32), min_size=V, max_size=V)))
    S = draw(st.sets(st.integers(0, V - 1), min_size=1, max_size=V - 1))
    y = draw(st.sampled_from(sorted(S)))
    golds = {y} | draw(st.sets(st.integers(0, V - 1), max_size=V - 2))
    if len(golds) == V:
        golds.remove(max(golds - {y}))
    return z, sorted(S), y, sorted(golds), draw(st.integers(1, V - len(golds)))
