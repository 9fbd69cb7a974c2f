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

Data comes as numpy arrays in the dtype under test, targets and positions as int64, a record's rows and `chosen`, token
ids, as lists, options as Python numbers, "nothing" as None. Return arrays, lists or numbers; log_probs and d_bias may
be None. Nothing that is given may be overwritten, nor what was returned: `step` returns copies.
`incoming` is the gradient that comes back to the loss, (N,) for reduction "none", else a number, and d_x the derivative
of sum(incoming * loss) by x: what jax.vjp, mlx.core.vjp or torch.autograd.grad computes.
`step(gradients, lr)` gets a list of gradients, None where one is missing, and an lr for each group. It returns the
parameters, `angle` and `clipped`, two lists with an entry for each angle that was taken, so empty if there is none, and
for each parameter (step, exp_avg, exp_avg_sq). `lr` is not in `groups`.
`positions` are the record's rows that make the batch. File 8 is made of the other functions.

Refuse by a ValueError whose message names the argument; REFUSES = False, where compiled code cannot, leaves that out.
EPS = {"float32": 2**-23} if there is no other dtype. A linear form that takes its rows in chunks gets a last argument
`chunk=None`, and is tried with chunks of 1, 2 and 3 rows, too. `python -m vectors.run_port my_port 3 9 float32` runs
files 3 and 9 in float32. `fuzz`, alone or beside files, compares 10 000 rows of each dtype with the plain reference; it
needs softmax(logits), whose result record_topk ranks.
"""

import importlib
import inspect
import json
import sys
import time
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


def main(port, *arguments):
    """Runs the files of these numbers in these dtypes, all if none is named, and `fuzz`; True if nothing is wrong."""
    unknown = {*arguments} - {"fuzz", *eps_of(port), *(name[0] for name in NEEDS)}
    if unknown:
        raise ValueError(f"{sorted(unknown)} are neither numbers of files nor dtypes of the port nor fuzz")
    dtypes = [dtype for dtype in eps_of(port) if dtype in arguments] or [*eps_of(port)]
    files = [name for name in NEEDS if name[0] in arguments] or [name for name in NEEDS if "fuzz" not in arguments]
    wrong = []
    for name in files:
        begin, missing = time.perf_counter(), [function for function in NEEDS[name] if not hasattr(port, function)]
        tried = [] if missing else [one for one in cases(name, port) if one[1] in dtypes]
        failed = [f"{name}, {case['name']}, {dtype} {chunk or ''}: {lines[0]}" for case, dtype, chunk in tried
                  if (lines := failures(name, port, case, dtype, chunk))]
        print(name, f"waits for {missing[0]}" if missing else f"{len(tried) - len(failed)} of {len(tried)} pass",
              f"in {time.perf_counter() - begin:.1f} s")
        wrong += failed
    if "fuzz" in arguments:
        from vectors import fuzz  # which alone needs plain_reference.py
        failed = fuzz.failures(port, dtypes)
        print(f"fuzz: {len(failed)} rows fail; at most ten are shown")
        wrong += failed[:10]
    print(*wrong, sep="\n")
    return not wrong


if __name__ == "__main__":
    sys.exit(not main(importlib.import_module(sys.argv[1]), *sys.argv[2:]))
