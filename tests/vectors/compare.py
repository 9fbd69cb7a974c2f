"""Compares what a port computed with what a golden vector expects, by the tolerances of README.md."""

import math

EPS = {"float64": 2.0**-52, "float32": 2.0**-23}
# |got - want| <= 2^10 eps (scale + |want|), where scale is 1 but for these
SMALL = {"outside_mass", "outside_mass_at_the_end"}  # 2^-100: judged relatively
OF_THE_LIST = {"rotated", "exp_avg", "exp_avg_sq"}  # the largest entry
# Beside `token_ids`, so in a record or in a tail, these are stored in float32: a rounding of 2^-24 |want| is right in
# float64, too, and eps is at least 2^-33, so that |got - want| <= 2^-23 (scale + |want|)
STORED_IN_FLOAT32 = {"outside_mass", "log_weight"}


def numbers(x):
    return [y for entry in x for y in numbers(entry)] if isinstance(x, list) else [x]


def differences(got, want, eps, where="", scale=1.0):
    """Where a result differs from the expected one: a list of sentences, empty if nowhere.

    got: what json.loads could return (dicts, lists, numbers, no arrays).   eps: the port's, times the `amplification`.
    """
    if isinstance(want, dict):
        if not isinstance(got, dict):
            return [f"{where}: {got}, not {want}"]
        out = []
        for key, value in want.items():
            scale = 2.0**-100 if key in SMALL else 1.0
            if key in OF_THE_LIST:
                scale = max((abs(x) for x in numbers(value)), default=0.0)
            key_eps = max(eps, 2.0**-33) if key in STORED_IN_FLOAT32 and "token_ids" in want else eps
            out += differences(got.get(key, "missing"), value, key_eps, f"{where}/{key}", scale)
        return out
    if isinstance(want, list):
        if not isinstance(got, list) or len(got) != len(want):
            return [f"{where}: {got}, not {want}"]
        return [line for i, (a, b) in enumerate(zip(got, want))
                for line in differences(a, b, eps, f"{where}[{i}]", scale)]
    if isinstance(want, float) and isinstance(got, (int, float)):
        ok = abs(got - want) <= 2**10 * eps * (scale + abs(want))
    elif want is None:  # not a number, or not there
        ok = got is None or isinstance(got, float) and math.isnan(got)
    else:
        ok = got == want
    return [] if ok else [f"{where}: {got}, not {want}"]
