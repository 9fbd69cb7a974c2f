"""Runs a port through the golden vectors, file by file and case by case; it needs numpy and nothing else.

Write my_port.py beside plain_reference.py, with as many of these functions as you have, in order, and start there

    python -m vectors.run_port my_port

    file  function                                                                   returns
    1     record_topk(logits, target, tau, max_size, ignore_index)                   token_ids, outside_mass, log_probs
    2     replay_cross_entropy(logits, target, token_ids, ignore_index,
                               reduction, incoming)                                  loss, d_logits
    2     outside_mass(logits, token_ids)                                            outside_mass
    3     linear_replay_cross_entropy(input, linear_weight, linear_bias, target,
                                      token_ids, ignore_index, tail,
                                      reduction, incoming)                           loss, d_input, d_weight, d_bias
    4     angle_between(u, v)                                                        angle
    5     clip_angle(grad, momentum, max_angle)                                      rotated
    6     moclip(groups, max_angle, scope)                                           step: a function, below
    7     sample_tail(chosen, target, vocab_size, ignore_index)                      token_ids, log_weight: the `tail`
    9     replay_kl_div(logits, token_ids, log_probs, positions,
                        reduction, incoming)                                         loss, d_logits
    9     linear_replay_kl_div(input, linear_weight, linear_bias, token_ids,
                               log_probs, positions, reduction, incoming)            loss, d_input, d_weight, d_bias

Data comes as numpy arrays in the dtype under test, targets and positions as int64, a record's rows as lists of lists,
options as Python numbers, "nothing" as None. Return arrays, lists or numbers; log_probs and d_bias may be None.
`incoming` is the gradient that comes back to the loss, (N,) for reduction "none", else a number, and d_x the derivative
of sum(incoming * loss) by x: what jax.vjp, mlx.core.vjp or torch.autograd.grad computes.
`step(gradients, lr)` gets a list of gradients, None where one is missing, and an lr for each group. It returns the
parameters, the angles, what is clipped, and for each parameter (step, exp_avg, exp_avg_sq). `lr` is not in `groups`.
`positions` are the record's rows that make the batch. File 8 is made of the other functions.

Refuse by a ValueError whose message names the argument; REFUSES = False, where compiled code cannot, leaves that out.
EPS = {"float32": 2**-23} if there is no other dtype. A linear form that takes its rows in chunks gets a last argument
`chunk=None`, and is tried with chunks of 1, 2 and 3 rows, too. With softmax(logits), whose result record_topk ranks,
`python -m vectors.run_port my_port fuzz` compares 10 000 rows of each dtype with the plain reference.
"""

import importlib
import inspect
import json
import sys
from pathlib import Path

import numpy as np

from vectors import calls, compare

FOLDER = Path(__file__).parent
NEEDS = {"1_recording.json": ["record_topk"], "2_loss.json": ["replay_cross_entropy", "outside_mass"],
         "3_linear_loss.json": ["linear_replay_cross_entropy"], "4_angle.json": ["angle_between"],
         "5_rotation.json": ["clip_angle"], "6_moclip.json": ["moclip"],
         "7_tail.json": ["linear_replay_cross_entropy", "sample_tail"],
         "8_end_to_end.json": ["record_topk", "linear_replay_cross_entropy", "moclip", "sample_tail", "outside_mass"],
         "9_anchor.json": ["record_topk", "replay_kl_div", "linear_replay_kl_div"]}


def eps_of(port):
    return getattr(port, "EPS", compare.EPS)


def cases(name, port):
    """(case, dtype, options) for every case of a file that concerns the port."""
    chunked = any("chunk" in inspect.signature(getattr(port, function)).parameters for function in NEEDS[name])
    for case in json.loads((FOLDER / name).read_text()):
        for dtype in eps_of(port):
            refused = "error" in case["expected"] and not getattr(port, "REFUSES", True)
            if case.get("dtype") in (None, dtype) and not refused:
                for chunk in [{}, *({"chunk": n} for n in (1, 2, 3) if chunked and "linear_weight" in case)]:
                    yield case, dtype, chunk


def failures(name, port, case, dtype, chunk):
    """What is wrong with a case: a list of sentences, empty if it passes."""
    expected = case["expected"]
    try:
        got = calls.outputs(name, port, case, dtype, **chunk)
    except Exception as error:  # whatever a port does, the next case is run
        if isinstance(error, ValueError) and "error" in expected and expected["error"] in str(error):
            return []
        return [f"{type(error).__name__}, {error}"]
    return compare.differences(got, expected, eps_of(port)[dtype] * case.get("amplification", 1))


def fuzz(port, n=10_000):
    """Rows of which the port records other tokens than the plain reference does from the same probabilities."""
    import plain_reference
    rng, found = np.random.default_rng(0), []
    for dtype in eps_of(port):
        for i in range(n):
            V = int(rng.choice([1, 2, 64, 64, 64, 65, 300]))
            z = rng.standard_normal((1, V)).astype(dtype) * rng.choice([0, 1, 5, 8])
            z = (np.round(4 * z) / 4 if i % 4 == 0 else z).astype(dtype)  # quarters: ties
            p = np.asarray(port.softmax(z)).ravel().tolist()
            covered = np.cumsum(sorted(p, reverse=True))[rng.integers(V)]  # K tokens exactly; the next number, K + 1
            tau = float(rng.choice([0.125, 0.5, 0.9, 0.99, 1.0, covered, covered, np.nextafter(covered, 2)]))
            gold, max_size = int(rng.integers(V)), None if i % 3 else int(rng.integers(1, 81))
            if 0 < tau <= 1:
                got = calls.lists(port.record_topk(z, np.array([gold]), tau, max_size, -100)[0])
                want = plain_reference.record_topk([p], [gold], tau, max_size)[0]
                found += [f"fuzz {dtype} {i}: {got}, not {want}"] if got != want else []
    return found


def main(port, *arguments):
    wrong = fuzz(port) if "fuzz" in arguments else []
    for name, functions in NEEDS.items():
        missing = [function for function in functions if not hasattr(port, function)]
        tried = [] if missing else list(cases(name, port))
        failed = [f"{name}, {case['name']}, {dtype} {chunk or ''}: {lines[0]}" for case, dtype, chunk in tried
                  if (lines := failures(name, port, case, dtype, chunk))]
        print(name, f"waits for {missing[0]}" if missing else f"{len(tried) - len(failed)} of {len(tried)} pass")
        wrong += failed
    print(*wrong, sep="\n")
    return not wrong


if __name__ == "__main__":
    sys.exit(not main(importlib.import_module(sys.argv[1]), *sys.argv[2:]))
