"""Random rows: does a port record the same tokens as the plain reference, from the same probabilities?"""

import numpy as np

import plain_reference
from vectors import calls


def failures(port, dtypes, n=10_000):
    """The rows, n in each dtype, of which the port records other tokens: a list of sentences."""
    rng, found = np.random.default_rng(0), []
    for dtype in dtypes:
        for i in range(n):
            V = 1500 if i % 50 == 49 else int(rng.choice([1, 2, 64, 64, 64, 65, 300]))
            z = rng.standard_normal((1, V)).astype(dtype) * rng.choice([0, 1, 5, 8])
            z = (np.round(4 * z) / 4 if i % 4 == 0 else z).astype(dtype)  # quarters: ties
            which, place, gold, cap = (int(rng.integers(*bounds)) for bounds in ((8,), (V,), (V,), (1, 81)))
            try:  # whatever a port does, the next row is tried
                p = np.asarray(port.softmax(z)).ravel().tolist()
                covered = np.cumsum(sorted(p, reverse=True))[place]  # K tokens exactly; the next number, K + 1
                tau = [0.125, 0.5, 0.9, 0.99, 1.0, covered, covered, np.nextafter(covered, 2)][which]
                tau, max_size = min(float(tau), 1.0), None if i % 3 else cap
                got = calls.lists(port.record_topk(z, np.array([gold]), tau, max_size, -100)[0])
            except Exception as error:
                found.append(f"fuzz {dtype} {i}: {type(error).__name__}, {error}")
                continue
            want = plain_reference.record_topk([p], [gold], tau, max_size)[0]
            if got != want:
                found.append(f"fuzz {dtype} {i}: {got}, not {want}")
    return found
