"""A second domain, for pretrained weights: requests to the tools of a telecom operator, and the call, as JSON.

Times, numbers and durations are words in a request and digits in its call: "mute the alarms of C15 for half an hour"
=> {"call": "mute", "cell": "C15", "minutes": 30}. An answer is right if it is the call, to the letter.
"""

import random

# requests => call; an indented line continues the one above. A lower-case slot is what its upper-case one stands for.
FORMS = """
restart {c} at {T} | at {T} cell {c} has to be restarted | please reboot cell {c}, {T} sharp
    => {"call": "restart", "cell": "{c}", "at": "{t}"}
mute the alarms of {c} for {M} | no alarms from cell {c} for the next {M} | silence {c} for {M}, we are working there
    => {"call": "mute", "cell": "{c}", "minutes": {m}}
set the power of {c} to {N} percent | run cell {c} at {N} percent of its power | {N} percent power is enough for {c}
    => {"call": "power", "cell": "{c}", "percent": {n}}
send somebody to {s} on {D} at {T} | {s} needs a visit on {D}, {T} | on {D} at {T} a technician should be at {s}
    => {"call": "visit", "site": "{s}", "day": {d}, "at": "{t}"}
move {N} users from {c} to {e} | cell {e} should take {N} users over from {c} | {c} is full, give {N} users to {e}
    => {"call": "move", "from": "{c}", "to": "{e}", "users": {n}}
lock {s} from {T} for {M} | keep {s} locked for {M}, beginning at {T} | nobody enters {s} for {M} after {T}
    => {"call": "lock", "site": "{s}", "from": "{t}", "minutes": {m}}
open a {L} {k} ticket for {c} | cell {c} has a {k} fault, {L} | report a {L} fault of {c}, it is the {k}
    => {"call": "ticket", "cell": "{c}", "kind": "{k}", "level": {l}}
compare {c} with {e} over {M} | how did {c} and {e} differ in the last {M} | plot {c} against {e} for {M}
    => {"call": "compare", "cells": ["{c}", "{e}"], "minutes": {m}}
every {D} at {T} send me the {k} report | I want a {k} report on each {D}, {T} | {k} reports go out on {D} at {T}
    => {"call": "report", "kind": "{k}", "day": {d}, "at": "{t}"}
"""
FORMS = [form.split(" => ") for form in FORMS.replace("\n    =>", " =>").strip().splitlines()]
ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MINUTES = {"half an hour": 30, "a quarter of an hour": 15, "half a day": 720, "a day": 1440, "an hour and a half": 90}


def words(n):
    """0 <= n < 100 as people say it."""
    return ONES[n] if n < 20 else TENS[n // 10 - 2] + (f"-{ONES[n % 10]}" if n % 10 else "")


def slots(rng):
    """One value for every slot, as it is said (upper case) and as a call has it."""
    hour, quarter, n, hours, day = (rng.randrange(k) for k in (24, 4, 98, 46, 7))
    spoken = words(((hour + quarter // 3) % 24 - 1) % 12 + 1)
    part = "morning" if hour < 12 else "afternoon" if hour < 18 else "evening"
    lengths = {**MINUTES, f"{words(hours + 2)} hours": 60 * (hours + 2), f"{words(n + 2)} minutes": n + 2}
    length, (c, e) = rng.choice(list(lengths)), rng.sample(range(120), 2)
    cell = lambda i: f"{'ABCDEFGHJK'[i // 12]}{10 + i % 12}"
    level = rng.randrange(3)
    return {"T": f"{['', 'quarter past ', 'half past ', 'quarter to '][quarter]}{spoken} in the {part}",
            "t": f"{hour:02}:{15 * quarter:02}", "M": length, "m": lengths[length], "N": words(n + 1), "n": n + 1,
            "D": DAYS[day], "d": day + 1, "c": cell(c), "e": cell(e),
            "s": f"{rng.choice(['North', 'South', 'Upper', 'Old'])} {rng.choice(['Hill', 'Bridge', 'Park', 'Lake'])}",
            "k": rng.choice(["power", "link", "clock", "heat", "fan", "door"]),
            "L": ["minor", "major", "critical"][level], "l": level + 1}


def pairs(seed, count):
    """`count` distinct (request, call)."""
    rng, out = random.Random(seed), {}
    while len(out) < count:
        (requests, call), values = rng.choice(FORMS), slots(rng)
        request = rng.choice(requests.split(" | ")).format(**values)
        for name, value in values.items():
            call = call.replace(f"{{{name}}}", str(value))
        out[request] = call
    return list(out.items())


def prompt(request):
    return f"Request: {request}.\nCall:"


def agrees(answer, call):
    return answer == call
