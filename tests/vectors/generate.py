"""Writes the golden vectors from plain_reference.py alone: cd tests && python -m vectors.generate

Each file has a function that makes the inputs of its cases, a choice of numbers: exact in float32, and such that every
decision (is tau reached? is the angle above the cap?) is exact or clear by MARGIN, so that float32 and float64 ports
decide alike. What is expected of them is what the plain reference, taken as a port, makes of them.
"""

import json
import math
import operator
import random
import struct
from pathlib import Path

import numpy as np

import plain_reference
from vectors import calls
from vectors.compare import EPS

FOLDER = Path(__file__).parent
MARGIN = 1e-4
FAR, FURTHER = -2.0**40, -2.0**110
LONG = 1040  # tokens; no gradient with an entry for each of them is expected, to keep the files short
MANY = 37  # rows: more than 32, and in no blocks of 8, 16 or 32
SMALL = [3.25, 1.5, -0.75, 0.125, -6.5]
INCOMING = [0.5, -2.0, 3.0, 0.25, 1.0, -1.0, 2.0] * 6
DEGREE = math.pi / 180


def float32(x):
    return struct.unpack("f", struct.pack("f", x))[0]


def normal(rng, n, scale=1.0):
    return [round(rng.gauss(0, scale) * 1024) / 1024 for _ in range(n)]


def in_order(terms):
    """Their sum, one after the other, without the compensation of Python's own from 3.12 on."""
    total = 0.0
    for x in terms:
        total += x
    return total


def flat(x):
    """The numbers of a nested list, row-major; a number alone is a 0-dimensional parameter."""
    return [y for row in x for y in flat(row)] if isinstance(x, list) else [x]


def shaped(values, like):
    """A flat list in the shape of another: the inverse of `flat`."""
    values = iter(values)
    fill = lambda x: [fill(row) for row in x] if isinstance(x, list) else next(values)
    return fill(like)


# ----------------------------------------------------------------------------------------------------------- recording

def clear(logits, tau, max_size=None):
    """Is it met exactly, or far from any doubt, at which token each row reaches tau, if the cap leaves it a choice?"""
    # the probabilities of equal tokens are as exact as a division: there a hundredth of a token is enough
    margin = MARGIN if len(logits[0]) < 5000 else 2e-5
    for p in map(plain_reference.softmax, logits):
        covered = 0.0
        for x in sorted(p, reverse=True)[:max_size and max_size - 1]:
            covered += x
            if not (covered == tau or x < 1e-80 or tau < min(p) or abs(covered - tau) > margin):
                return False
    return True


def crowd(V):
    """Logits of many rows, no two alike in a block."""
    return [[(5 * t + 3 * j) % 11 / 4 + t / 32 * (j == 1) for j in range(V)] for t in range(MANY)]


def recording_inputs():
    rng = random.Random(0)
    spread = [normal(rng, 12, 2.0) for _ in range(4)]
    five = [4.0, 3.0, 2.0, 1.0, 0.0]
    cases = [
        ("one row, gold inside", spread[:1], [max(range(12), key=spread[0].__getitem__)], 0.9, None, -100),
        ("gold outside is added", spread[:1], [min(range(12), key=spread[0].__getitem__)], 0.5, None, -100),
        ("several rows", spread, [3, 0, 11, 7], 0.8, None, -100),
        ("several rows, nearly all mass", spread, [3, 0, 11, 7], 0.97, None, -100),
        ("ties go to the lowest ids", [[0.0, 1.0, 1.0, 0.0, 1.0, 1.0, -1.0]], [6], 0.5, None, -100),
        ("tau is met exactly: 2 of 4 equal tokens cover 0.5", [[0.0] * 4], [0], 0.5, None, -100),
        ("tau is met exactly, gold outside", [[0.0] * 8], [7], 0.25, None, -100),
        ("tau = 1 takes what is needed to reach 1", [[0.0, -200.0, 0.0, -200.0]], [0], 1.0, None, -100),
        ("tau = 1 of equal tokens takes all", [[0.0] * 16], [5], 1.0, None, -100),
        ("tau = 1 is never reached, all are taken: 29 times the rounded 1/29 is < 1, but not if added in float32",
         [[-200.0, *[0.0] * 29, -200.0]], [7], 1.0, None, -100),
        ("tau = 1 is reached by 12 times the rounded 1/12, but not if added in float32",
         [[-200.0, *[0.0] * 12, -200.0]], [7], 1.0, None, -100),
        ("a tiny tau takes the most probable token", spread, [1, 1, 1, 1], 2.0**-20, None, -100),
        ("more than 16 tokens, more than 64", [[-(j % 97) / 64 for j in range(200)]], [199], 0.7, None, -100),
        ("5000 equal tokens: a float32 running sum is behind by a third of one", [[0.0] * 5000], [0], 4998.85 / 5000,
         None, -100),
        ("an outside mass of which 1 - inside has no digit", [[0.0, -35.0, -36.0, -40.0]], [0], 0.5, None, -100),
        ("max_size, gold inside", [five], [1], 0.999, 3, -100),
        ("max_size, gold displaces the last token", [five], [4], 0.999, 3, -100),
        ("max_size = 1 keeps gold alone", [five], [2], 0.999, 1, -100),
        ("max_size larger than needed changes nothing", [five], [4], 0.5, 3, -100),
        ("max_size cuts a tie", [[0.0] * 8], [5], 1.0, 3, -100),
        ("max_size above the vocabulary", [five], [2], 1.0, 9, -100),
        ("ignored rows are empty", spread, [-100, 2, -100, 4], 0.9, None, -100),
        ("another ignore_index, itself a token", spread, [0, 2, 0, 4], 0.9, None, 0),
        ("only ignored rows", spread[:2], [-100, -100], 0.9, None, -100),
        ("a vocabulary of one token", [[3.0], [-7.0]], [0, -100], 0.7, None, -100),
        ("huge logits", [[1e4, -1e4, 9999.0, 0.0]], [1], 0.9, None, -100),
        ("refused: a negative target that is not ignore_index", spread[:2], [3, -1], 0.9, None, -100),
        ("refused: -100 where ignore_index is another", spread[:2], [3, -100], 0.9, None, -1),
        ("refused: a target beyond the vocabulary", spread[:2], [3, 12], 0.9, None, -100),
        ("refused: tau = 0", spread[:1], [3], 0.0, None, -100),
        ("refused: tau above 1", spread[:1], [3], 1.5, None, -100),
        ("refused: max_size = 0", spread[:1], [3], 0.9, 0, -100),
        # to be ranked are the probabilities: of equal logits, up to 2^-40, in float32, but not in float64
        ("a softmax in float32 makes equal what its logits are not", [[0.0, 2.0**-40, -3.0]], [2], 0.1, None, -100,
         "float32"),
        ("a softmax in float64 does not", [[0.0, 2.0**-40, -3.0]], [2], 0.1, None, -100, "float64"),
        ("8 times the rounded 0.1, one after the other, is < 0.8", [[0.0] * 10], [0], 0.8, None, -100, "float64"),
        ("17 of 18 equal tokens, if added one after the other", [[0.0] * 18], [0], in_order([1 / 18] * 17), None, -100,
         "float64"),
        ("tau is met exactly, which its rounding to float32 would not be", [[0.0] * 10], [0], 0.1 + 0.1 + 0.1, None,
         -100, "float64"),
        ("tau is met exactly, which its rounding to float32 would not be", [[0.0] * 10], [0], 3 * float32(0.1), None,
         -100, "float32"),
        ("rows of very different height: the maximum is each row's own", [five, [x - 1e4 for x in five]], [4, 4], 0.9,
         None, -100),
        ("many tokens are outside", [[-(j % 97) / 64 for j in range(200)]], [199], 0.25, None, -100),
        ("probabilities that are equal in half precision", [[0.0, 2.0**-16, -3.0]], [2], 0.1, None, -100),
        ("refused: tau below 0", spread[:1], [3], -0.5, None, -100),
        ("refused: a negative max_size", spread[:1], [3], 0.9, -1, -100),
        ("small probabilities that are equal in seven decimals", [[9.0, 0.0, 2.0**-14]], [0], 1.0, 2, -100),
        ("tau = 0.5, rounded up to the next float64: 3 of 4 equal tokens", [[0.0] * 4], [0], math.nextafter(0.5, 1),
         None, -100),
        ("an outside mass that the rest without gold, less p of gold, does not have", [[0.0, -1.0, -40.0, -40.0]], [1],
         0.5, None, -100),
        *(("to be ranked are the probabilities: their logarithms are equal", [[0.0] * 62 + [z, z + step]], [0], 1.0, 63,
           -100, dtype) for z, step, dtype in ((-1.75, 2.0**-23, "float32"), (-1.4375, 2.0**-52, "float64"))),
        ("540 of 600 equal tokens, if added one after the other and not by blocks", [[0.0] * 600], [0],
         in_order([1 / 600] * 540), None, -100, "float64"),
        ("a small outside mass of large logits", [[x + 1e5 for x in SMALL]], [0], 0.9, None, -100),
        ("refused: a logit of -inf", [five, ["-inf", *five[1:]]], [4, 4], 0.5, None, -100),
        ("refused: a logit of -inf in an ignored row", [five, ["-inf", *five[1:]]], [4, -100], 0.5, None, -100),
        ("an ignore_index beyond the vocabulary", spread, [3, 12, 0, 12], 0.9, None, 12),
        ("37 rows", crowd(4), [t % 4 for t in range(MANY)], 0.75, None, -100),
        ("logits that float32 does not tell apart", [[1.0, 1.0 + 2.0**-40, -3.0]], [2], 0.1, None, -100, "float64"),
        ("max_size is what tau needs, gold displaces the last token", [[0.0] * 4], [3], 0.5, 2, -100),
    ]
    for name, logits, target, tau, max_size, ignore_index, *dtype in cases:
        assert "rounded" in name or "-inf" in name or dtype or clear(logits, tau, max_size), name
        yield dict(name=name, logits=logits, target=target, tau=tau, max_size=max_size, ignore_index=ignore_index,
                   **only(dtype))


# -------------------------------------------------------------------------------------------------------------- losses

def loss_inputs():
    rng = random.Random(1)
    logits = [normal(rng, 7, 2.0) for _ in range(4)]
    widest, *rest = long_rows(LONG, 1030, 1000)
    rows = [[0, 2, 5], [6], [0, 1, 2, 3, 4, 5, 6], [1, 4]]
    cases = [
        ("one token, some and all tokens a row", logits, [2, 6, 3, 1], rows, -100),
        ("ignored rows", logits, [2, -100, -100, 1], [rows[0], [], [], rows[3]], -100),
        ("only ignored rows: the mean is 0/0, its gradient 0", logits[:2], [-100, -100], [[], []], -100),
        ("another ignore_index", logits, [2, 0, 3, 1], [rows[0], [], rows[2], rows[3]], 0),
        ("ignored targets with rows that are not empty", logits, [2, -100, 3, -100], rows, -100),
        ("huge logits", [[1e4, -1e4, 9999.0, 0.0], [-1e4, -1e4, -1e4, 1e4]], [1, 2], [[0, 1, 2], [0, 1, 2]], -100),
        ("all mass outside", [[0.0, 0.0, 0.0, 100.0]], [0], [[0, 1]], -100),
        ("hardly any mass outside", [[0.0, 1.0, -36.0, -37.0]], [0], [[0, 1]], -100),
        ("refused: gold outside its row", logits[:2], [2, 5], rows[:2], -100),
        ("refused: -100 where ignore_index is another", logits[:2], [2, -100], [rows[0], []], 0),
        # where short rows are filled up, the filling must be less than any logit, and no token
        ("a row of logits far below any filling, beside a longer one", [[0.0, 1.0, 2.0, 3.0], [FAR, FAR, 0.0, 0.0]],
         [0, 0], [[0, 1, 2, 3], [0, 1]], -100),
        ("large logits: their difference is exact, minus log-sum-exp it is not", [[2.0**20] * 3 + [0.0]], [1],
         [[0, 1, 2]], -100),
        ("refused: gold is token 0, outside a row that is filled up", logits[:2], [0, 0], [[1, 2], [0, 1, 2]], -100),
        ("refused: gold is the last token, outside a row that is filled up", logits[:2], [6, 0], [[1, 2], [0, 1, 2]],
         -100),
        ("refused: a target beyond the vocabulary", logits[:2], [2, 7], rows[:2], -100),
        ("refused: a negative target, the last token if counted from the end", logits[:2], [2, -1], rows[:2], -100),
        ("a logit below -10^30, beside a longer row", [[0.0, 1.0, 2.0, 3.0], [FURTHER, 0.0, 0.0, 0.0]], [0, 0],
         [[0, 1, 2, 3], [0]], -100),
        ("a small outside mass of large logits", [[x + 1e5 for x in SMALL]], [0], [[0, 1]], -100),
        ("refused: a logit of -inf that is not gold's", [logits[0], [*logits[1][:4], "-inf", *logits[1][5:]]], [2, 1],
         [rows[0], [1, 4]], -100),
        ("a row of 300 tokens", [[j * 5 % 24 / 8 for j in range(310)]], [7], [[*range(5, 305)]], -100),
        ("rows of 1030, 35 and 3 tokens", logits_of(widest), *rest, -100),
        ("refused: an empty row whose target is not ignored", logits[:2], [2, 0], [rows[0], []], -100),
        ("refused: a logit of -inf that is not recorded", [[*logits[0][:4], "-inf", *logits[0][5:]], logits[1]],
         [2, 1], [rows[0], [1, 4]], -100),
        ("refused: a logit of -inf in an ignored row", [logits[0], [*logits[1][:4], "-inf", *logits[1][5:]]],
         [2, -100], [rows[0], []], -100),
        ("an ignore_index beyond the vocabulary", logits, [2, 7, 3, 7], [rows[0], [], rows[2], rows[3]], 7),
        ("37 rows", crowd(3), *crowd_rows(3), -100),
        ("outside masses of 10^-4 and less", [[*SMALL[:2], -z, -z - 0.375] for z in (6.0, 7.5, 8.125, 9.0)], [0] * 4,
         [[0, 1]] * 4, -100),
        ("all digits of float64", [wide_numbers(7), wide_numbers(7)], [2, 3], [rows[0], rows[2]], -100, "float64"),
    ]
    for name, logits, target, rows, ignore_index, *dtype in cases:
        alone = {"alone": "replay_cross_entropy"} if "-inf" in name and "gold" not in name else {}
        yield dict(name=name, logits=logits, target=target, token_ids=rows, ignore_index=ignore_index, **alone,
                   incoming=wide_numbers(2) if dtype else INCOMING[:len(target)], **only(dtype))
    yield dict(name="refused: a logit of -inf, by the outside mass", alone="outside_mass",
               logits=[[0.0, "-inf", 1.0]], token_ids=[[0, 2]])


def only(dtype):
    """For a case of one dtype alone."""
    return {"dtype": dtype[0]} if dtype else {}


def wide_numbers(n, scale=1.0):
    """Numbers that float32 does not have."""
    rng = random.Random(n)
    return [rng.gauss(0, scale) for _ in range(n)]


def crowd_rows(V):
    """Targets and rows for `crowd`."""
    rows = [sorted({t % V, (t * 2 + 1) % V}) for t in range(MANY)]
    return [row[-1] for row in rows], rows


def random_head(rng, N, V, d, with_bias):
    return dict(input=[normal(rng, d) for _ in range(N)], linear_weight=[normal(rng, d) for _ in range(V)],
                linear_bias=normal(rng, V) if with_bias else None)


def linear_inputs():
    rng = random.Random(2)
    cases = [("without bias", 4, 9, 3, False, -100), ("with bias", 3, 6, 5, True, -100),
             ("another ignore_index, itself a token", 4, 6, 2, True, 5)]
    for name, N, V, d, with_bias, ignore_index in cases:
        head = random_head(rng, N, V, d, with_bias)
        rows = [sorted(rng.sample(range(V - 1), rng.randint(1, V - 1))) for _ in range(N - 1)] + [[]]
        yield dict(name=name, **head, target=[rng.choice(row) for row in rows[:-1]] + [ignore_index], token_ids=rows,
                   ignore_index=ignore_index, incoming=INCOMING[:N])
    head, target, rows = seven(rng)
    cases = [
        ("seven rows, four of them empty, the last one full", head, target, rows),
        ("a logit far below any filling, beside a longer row", *far_below()),
        ("large logits: their difference is exact, minus log-sum-exp it is not", equal_but_one(4), [1], [[0, 1, 2]]),
        ("refused: gold outside its row", head, [1, *target[1:]], rows),
        ("refused: gold is token 0, outside a row that is filled up", head, [0, *target[1:]], rows),
        ("refused: gold is the last token, outside a row that is filled up", head, [5, *target[1:]], rows),
        ("refused: a target beyond the vocabulary", head, [*target[:-1], 6], rows),
        ("refused: a negative target, the last token if counted from the end", head, [*target[:-1], -1], rows),
        ("only ignored rows: the mean is 0/0, its gradient 0", head, [-100] * 7, [[]] * 7),
        ("ignored targets with rows that are not empty", head, [2, *[-100] * 6], rows),
        ("all digits of float32: products of two have those of float64", every_digit(), [2, 0], [[0, 2], [0, 1, 3]]),
    ]
    cases = [(*case, -100) for case in cases]
    cases.append(("the shapes of cases above, another record and ignore_index", head, [3, 2, 5, 4, 0, 1, 4],
                  [[1, 3], [0, 1, 2, 3], [5], [], [0, 5], [1, 2, 3], []], 4))
    cases += [("a logit below -10^30, beside a longer row", *far_below(FURTHER), -100),
              ("refused: a logit of -inf that is not gold's", without_end(head), target, rows, -100),
              ("rows of 300, 250 and 3 tokens, 500 distinct ones", *long_rows(505), -100),
              ("rows of 1030, 35 and 3 tokens, 1035 distinct ones", *long_rows(LONG, 1030, 1000), -100),
              ("refused: an empty row whose target is not ignored", head, [2, 0, 3, *target[3:]], rows, -100),
              ("a logit of -inf that is not recorded", without_end(random_head(rng, 2, 6, 3, True)), [1, 3],
               [[0, 1, 5], [3]], -100),
              ("an ignore_index beyond the vocabulary", head, [2, 0, 6, 6, 6, 6, 5], rows, 6),
              ("37 rows, 4144 tokens in all", *crowded_head(), -100),
              ("a logit of -inf of token 0, which may fill up short rows",
               without_end(random_head(rng, 2, 5, 3, True), 0), [1, 4], [[1, 2, 3], [4]], -100),
              ("refused: a logit of -inf that is recorded and never gold", without_end(head), [4, *target[1:]], rows,
               -100),
              ("67 entries of a hidden state", random_head(rng, 2, 3, 67, True), [1, 2], [[0, 1], [0, 1, 2]], -100),
              ("all digits of float64", wide_head(), [2, 3], [[1, 2], [0, 2, 3]], -100, "float64")]
    for name, head, target, rows, ignore_index, *dtype in cases:
        yield dict(name=name, **head, target=target, token_ids=rows, ignore_index=ignore_index,
                   incoming=wide_numbers(2) if dtype else INCOMING[:len(target)], **only(dtype))


def crowded_head():
    """Many rows of 112 of 120 tokens, so of more than 4096 in all."""
    head = dict(input=[[t % 9 / 4, t / 16] for t in range(MANY)], linear_bias=None,
                linear_weight=[[j % 7 / 4, j % 5 / 8] for j in range(120)])
    return head, [t + 8 for t in range(MANY)], [[*range(t % 8, t % 8 + 112)] for t in range(MANY)]


def wide_head():
    """Two hidden states and a head of numbers that float32 does not have."""
    weight = wide_numbers(12)
    return dict(input=[wide_numbers(3), weight[4:7]], linear_weight=[weight[i:i + 3] for i in (0, 3, 6, 9)],
                linear_bias=wide_numbers(4))


def seven(rng):
    """Rows in chunks of 1, 2 or 3: some have no token, and the last one is not full."""
    return (random_head(rng, 7, 6, 3, True), [2, 0, -100, -100, -100, -100, 5],
            [[2, 4], [0, 1, 3], [], [], [], [], [0, 1, 2, 3, 4, 5]])


def every_digit():
    """Hidden states and a head of float32 numbers that are not rounded to a few digits."""
    rng = random.Random(11)
    draw = lambda n: [float32(rng.gauss(0, 1)) for _ in range(n)]
    return dict(input=[draw(4), draw(4)], linear_weight=[draw(4) for _ in range(5)], linear_bias=draw(5))


def without_end(head, token=2):
    """A head whose bias for a token is -inf, in JSON as a string."""
    return head | {"linear_bias": [x if j != token else "-inf" for j, x in enumerate(head["linear_bias"])]}


def long_rows(V, end=300, begin=250):
    """Rows beyond any fixed width, of more distinct tokens than any of them has; all numbers are eighths.

    Beyond token 1023 are the largest logits: a maximum that is kept over blocks of tokens has to change there.
    """
    head = dict(input=[[1.0, 0.0], [0.0, 1.0], [0.5, 0.0]], linear_bias=None,
                linear_weight=[[(j * 5 % 24 + j // 1024 * 40) / 8, j * 7 % 16 / 8] for j in range(V)])
    return head, [7, V - 6, 3], [[*range(end)], [*range(begin, V - 5)], [3, 150, V - 6]]


def logits_of(head):
    return [[sum(map(operator.mul, h, w)) for w in head["linear_weight"]] for h in head["input"]]


def far_below(far=FAR):
    """Logits 0, 1, 2, 3 and a row of one token: far, whose gradient is exactly 0 however large its weights are."""
    head = dict(input=[[1.0, 0.0], [0.0, 1.0]], linear_weight=[[0.0, far], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0]],
                linear_bias=None)
    return head, [0, 0], [[0, 1, 2, 3], [0]]


def equal_but_one(V):
    """Logits of 2^20 and a last one of 0."""
    return dict(input=[[2.0**20]], linear_weight=[[1.0]] * (V - 1) + [[0.0]], linear_bias=None)


# ---------------------------------------------------------------------------------------------------------- the angle

def pairs():
    rng = random.Random(3)
    u, w = normal(rng, 5), normal(rng, 5)
    tiny = [x / 2**7 for x in w]
    times = lambda exponent, x: [math.ldexp(y, exponent) for y in x]
    both = [("any", u, w), ("zero gradient", [0.0] * 5, u), ("zero momentum", u, [0.0] * 5), ("equal", u, u),
            ("parallel", u, times(1, u)), ("antiparallel", u, [-4 * x for x in u]),
            ("orthogonal", [3.0, 0.0, 0.0], [0.0, 0.5, 0.0]), ("one entry, same sign", [2.0], [3.0]),
            ("one entry, opposite sign", [2.0], [-3.0]), ("nearly parallel", u, [2 * x + y for x, y in zip(u, tiny)]),
            ("nearly antiparallel", u, [y - 2 * x for x, y in zip(u, tiny)]),
            ("60 degrees in the plane, almost", [0.5, 0.875], [1.0, 0.0]), ("far apart in length", times(30, u), w),
            ("tiny entries: their squares underflow in float32", times(-100, u), times(-100, w)),
            ("huge entries: their squares overflow in float32", times(100, u), times(100, w)),
            ("tiny and huge", times(-100, u), times(100, w))]
    wide = [("tiny entries: their squares underflow in float64", times(-600, u), times(-600, w)),
            ("huge entries: their squares overflow in float64", times(600, u), times(600, w))]
    return [(*pair, None) for pair in both] + [(*pair, "float64") for pair in wide]


# found among 400 000: an arccos of the cosine is off by 2.5 tolerances in either dtype, at 4.6e-4
HARD_FOR_COSINES = [
    ([0.625, -0.875, -0.25], [0.6250852942466736, -0.87480628490448, -0.2504647672176361]),
    ([-0.875, 1.75, 0.75], [-0.8744516372680664, 1.7499324083328247, 0.7507975101470947]),
    ([0.25, -0.25, -1.0], [0.2500634789466858, -0.2504923343658447, -0.9998610615730286])]


def angle_inputs():
    for name, u, v, dtype in pairs():
        yield dict(name=name, dtype=dtype, u=u, v=v)
    yield dict(name="entries near the smallest of float32", dtype=None, u=[3 * 2.0**-120, 0.0], v=[2.0**-120] * 2)
    for exponent in (-7, -12, -17, -30):
        yield dict(name=f"2^{exponent} from parallel", dtype=None, u=[1.0, 0.0], v=[1.0, 2.0**exponent])
        yield dict(name=f"2^{exponent} from antiparallel", dtype=None, u=[1.0, 0.0], v=[-1.0, 2.0**exponent])
    yield dict(name="all digits of float64", dtype="float64", u=wide_numbers(5), v=wide_numbers(6)[1:])
    for v in ([-1.0], [-1.0, -2.0]):  # their products are -0, whose arctan2 is pi
        yield dict(name=f"zero against {len(v)} negative", dtype=None, u=[0.0] * len(v), v=v)
    for count, (u, v) in enumerate(HARD_FOR_COSINES):
        yield dict(name=f"a small angle whose cosine has lost its digits, {count}", dtype=None, u=u, v=v)


# -------------------------------------------------------------------------------------------------------- the rotation

def rotation_inputs():
    few = ("30 degrees", "just below the cap", "cap 0")  # enough where only the lengths differ from another pair's
    for name, g, m, dtype in pairs():
        theta = plain_reference.angle_between(g, m)
        caps = [("no cap", math.pi), ("90 degrees", math.pi / 2), ("30 degrees", 30 * DEGREE), ("cap 0", 0.0)]
        if 2 * MARGIN < theta < math.pi - 2 * MARGIN:
            caps += [("just below the cap", theta + 2 * MARGIN), ("just beyond the cap", theta - 2 * MARGIN)]
        for cap, max_angle in caps:
            if theta == max_angle or abs(theta - max_angle) > MARGIN:
                if cap in few or not any(word in name for word in ("tiny", "huge", "far apart", "zero")):
                    yield dict(name=f"{name}, {cap}", dtype=dtype, grad=g, momentum=m, max_angle=max_angle)
    # antiparallel is what has a sine of at most sqrt(eps): 2^-26 in float64, 2^-11.5 in float32
    for exponent, dtypes in ((-10, [None]), (-14, EPS), (-22, EPS), (-30, [None])):
        for dtype in dtypes:
            case = dict(name=f"sine of 2^{exponent} from antiparallel" + f", {dtype}" * bool(dtype), dtype=dtype,
                        grad=[-1.0, 2.0**exponent], momentum=[1.0, 0.0], max_angle=math.pi / 2)
            if 2.0**exponent > EPS[dtype or "float32"]**0.5:  # it is rotated; a rounding of the angle grows by 1/sine
                case["amplification"] = 2.0**-exponent
            yield case
    for sine in (1.25 * 2.0**-12, 2.0**-30):
        yield dict(name=f"a sine of {sine:.2g} from parallel is not antiparallel, cap 0", dtype=None,
                   grad=[1.0, sine], momentum=[1.0, 0.0], max_angle=0.0)
    for exponent, dtype in ((-11, "float32"), (-12, "float32"), (-25, "float64"), (-27, "float64")):
        case = dict(name=f"sine of 2^{exponent} from antiparallel, {dtype}", dtype=dtype, grad=[-1.0, 2.0**exponent],
                    momentum=[1.0, 0.0], max_angle=math.pi / 2)
        yield {**case, "amplification": 2.0**-exponent} if exponent in (-11, -25) else case
    for dtype, below, above, amplification in (("float32", 21 * 2.0**-16, 24 * 2.0**-16, 2.0**12),
                                               ("float64", 15 * 2.0**-30, 17 * 2.0**-30, 2.0**26)):
        case = dict(dtype=dtype, momentum=[1.0, 0.0], max_angle=math.pi / 2)
        yield dict(name=f"a sine that is barely antiparallel, {dtype}", grad=[-1.0, below], **case)
        yield dict(name=f"a sine that is barely not antiparallel, {dtype}", grad=[-1.0, above], **case,
                   amplification=amplification)
    for name, beyond in (("just below the cap", -2.0**-20), ("just beyond the cap", 2.0**-20)):
        yield dict(name=f"{name}, by 2^-20", dtype="float64", grad=[0.5, 0.875], momentum=[1.0, 0.0],
                   max_angle=plain_reference.angle_between([0.5, 0.875], [1.0, 0.0]) - beyond)
    yield dict(name="all digits of float64", dtype="float64", grad=wide_numbers(5), momentum=wide_numbers(6)[1:],
               max_angle=45 * DEGREE)
    yield dict(name="a length that float32 does not have", dtype="float32", grad=[2.0**127] * 4,
               momentum=[*[1.0] * 3, 0.0], max_angle=0.25)


# ----------------------------------------------------------------------------------------------------------- MoClip

USUAL = dict(betas=[0.9, 0.999], a=4 / math.pi, b=1.0, weight_decay=0.0)
OTHER = dict(betas=[0.5, 0.75], a=1.0, b=2.0, weight_decay=0.0)
DECAY = dict(USUAL, weight_decay=0.1)


def missing(every):
    """Parameter 1 has no gradient every so many steps."""
    return lambda t, i, g: None if i == 1 and t % every == 0 else g


def restart(t, i, g):
    """One direction until step 8, whose gradient is exactly opposite to it; parameter 2 then has none."""
    if t < 8:  # multiplied by a power of two the direction stays what it is, to the last bit
        return [x * 2.0**(t % 3) for x in ([1.0, -0.5], [2.0, 0.75], [0.25, 1.5])[i]]
    return None if t == 8 and i == 2 else [-2.0 * x for x in ([1.0, -0.5], [2.0, 0.75])[i]] if t == 8 else g


def restart_of_the_first(t, i, g):
    return ([1.0 + abs(g[0])] if t < 8 else [-2.0]) if i == 0 and t <= 8 else g


def scaled(exponents):
    """The gradients of step t times 2^exponent; None: zero."""
    def change(t, i, g):
        exponent = exponents(t)
        return shaped([0.0 if exponent is None else math.ldexp(x, exponent) for x in flat(g)], g)
    return change


def moclip_inputs():
    unchanged, constant = lambda t, i, g: g, lambda t: [0.0625, 0.5]
    odd = [[[1.0] * 3] * 2, 1.0, [], [1.0]]  # the shapes of a matrix, a number, an empty parameter and a vector
    one, two, three = [1.0], [1.0] * 2, [1.0] * 3
    cases = [
        ("cap of 90 degrees", "global", 90, [(USUAL, [three, two])], unchanged, constant),
        ("cap of 45 degrees", "global", 45, [(USUAL, [three, two])], unchanged, constant),
        ("one angle a parameter", "tensor", 45, [(USUAL, [three, two, one])], unchanged, constant),
        ("no cap: Adam-atan2", "global", 180, [(USUAL, [two * 2])], unchanged, constant),
        ("no cap: an antiparallel gradient is neither clipped nor a restart", "tensor", 180, [(USUAL, [one, three])],
         restart_of_the_first, constant),
        ("cap 0: the first direction for ever", "global", 0, [(USUAL, [two * 2])], unchanged, constant),
        ("two groups, weight decay, other scales", "global", 60, [(DECAY, [three]), (OTHER, [two, one])], unchanged,
         constant),
        ("two groups, one angle a parameter", "tensor", 60, [(DECAY, [three]), (OTHER, [two, two])], unchanged,
         constant),
        ("two groups, both decay, each by its own lr", "global", 90,
         [(DECAY, [two]), (dict(OTHER, weight_decay=0.25), [two])], unchanged, constant),
        ("a learning rate that changes, with weight decay", "global", 90, [(DECAY, [two]), (USUAL, [two])], unchanged,
         lambda t: [0.0 if t == 6 else 0.125 / t, 2.0**-(t % 4) / 16]),
        ("a matrix, a number, an empty parameter", "global", 75, [(DECAY, odd)], unchanged, constant),
        ("a matrix, a number, an empty parameter, one angle each", "tensor", 75, [(DECAY, odd)], unchanged, constant),
        ("a restart, all momenta non-zero, one parameter without gradient", "global", 90, [(USUAL, [two, two, two])],
         restart, constant),
        ("a restart of one parameter", "tensor", 90, [(USUAL, [one, three])], restart_of_the_first, constant),
        ("extreme gradients", "global", 90, [(USUAL, [three])], scaled(lambda t: [0, 40, -40, None][t % 4]), constant),
        ("tiny gradients first: there is no epsilon", "global", 90, [(USUAL, [three])],
         scaled(lambda t: min(4 * t - 54, 0)), constant),
        ("a slow second moment: 1 - beta2 and 1 - beta2^t in more than float32", "global", 90,
         [(dict(USUAL, betas=[0.9, 0.99999]), [three])], unchanged, lambda t: [1.0]),
        ("a parameter without gradient every third step", "global", 90, [(DECAY, [two, two])], missing(3), constant),
        ("a parameter without gradient every third step, one angle a parameter", "tensor", 90, [(DECAY, [two, two])],
         missing(3), constant),
        ("a step in which no parameter has a gradient", "global", 90, [(DECAY, [two, two])],
         lambda t, i, g: None if t in (1, 5) else g, constant),
        ("groups of other options, no gradient in the first one every third step", "global", 90,
         [(DECAY, [two, three]), (OTHER, [two, one])], missing(3), constant),
        ("groups of other options, no gradient in the first one every third step, one angle a parameter", "tensor", 90,
         [(DECAY, [two, three]), (OTHER, [two, one])], missing(3), constant),
        ("the whole first group has no gradient every other step", "global", 90, [(OTHER, [two]), (DECAY, [two, one])],
         lambda t, i, g: None if i == 0 and t % 2 == 0 else g, constant),
        ("a restart of two groups", "global", 90, [(USUAL, [two]), (DECAY, [two])], restart, constant),
        ("gradients whose squares only float64 has", "global", 90, [(USUAL, [two])], scaled(lambda t: 8 * t - 300),
         constant),
        ("beta1 = 0: the momentum is the gradient before", "global", 90,
         [(dict(USUAL, betas=[0.0, 0.999]), [two, one])], unchanged, constant),
        ("beta2 = 0 and now and then no gradient but zeros: v = 0, m is not", "global", 90,
         [(dict(USUAL, betas=[0.5, 0.0]), [two])], scaled(lambda t: None if t % 4 == 3 else 0), constant),
        ("an angle that is the cap exactly is not clipped", "global", 90, [(USUAL, [two])],
         lambda t, i, g: [[1.0, 0.0], [0.0, 1.0]][t - 1] if t < 3 else g, constant),
        ("a first gradient where others are clipped, one parameter that never has any", "global", 45,
         [(USUAL, [two, two, two])], lambda t, i, g: None if i == 1 and t < 6 or i == 2 else g, constant),
        ("the same, one angle a parameter", "tensor", 45, [(USUAL, [two, two, two])],
         lambda t, i, g: None if i == 1 and t < 6 or i == 2 else g, constant),
        ("zero gradients against negative momenta", "tensor", 90, [(USUAL, [one, two])],
         lambda t, i, g: [0.0] * len(g) if t % 3 == 0 else [-1.0 - abs(x) for x in g], constant),
        ("a group of no parameter before another", "global", 60, [(OTHER, []), (DECAY, [two])], unchanged, constant),
        ("all digits of float64", "global", 60, [(DECAY, [two])], unchanged, constant)]
    for name, scope, degrees, groups, change, lr in cases:
        rng = random.Random(name)
        scale = math.pi / 3 if "all digits" in name else 1.0
        draw = lambda like, mean: shaped([mean + scale * x for x in normal(rng, len(flat(like)))], like)
        groups = [{**options, "parameters": [draw(like, 0.0) for like in shapes]} for options, shapes in groups]
        shapes = [p for group in groups for p in group["parameters"]]
        gradients = lambda t: [change(t, i, draw(like, 0.5)) for i, like in enumerate(shapes)]
        steps = [{"lr": lr(t)[:len(groups)], "gradients": gradients(t)} for t in range(1, 25)]
        # in float64 1 - 0.99999^t itself has lost five digits, and which ones depends on the formula
        dtype = "float32" if "slow" in name else "float64" if "float64" in name else None
        case = dict(name=name, dtype=dtype, scope=scope, max_angle=degrees * DEGREE, groups=groups, steps=steps)
        for step in expected("6_moclip.json", case, "float64")["steps"]:
            for theta in step["angle"]:
                assert abs(theta - case["max_angle"]) > MARGIN or theta in (0, case["max_angle"]), name
                # far from antiparallel, or exactly so
                assert theta < math.pi - 100 * MARGIN or theta > math.pi - 1e-12, name
        yield case


# ------------------------------------------------------------------------------------------------------------ the tail

def tail_inputs():
    rng = random.Random(7)
    V, target, rows = 12, [3, 7, 3, 0], [[0, 3, 5], [7], [2, 3, 9, 10], [0, 1]]
    a, b, c = (random_head(rng, 4, V, 3, with_bias) for with_bias in (True, False, True))
    large = dict(input=[[100.0], [-100.0]], linear_weight=[[0.0], [1.0], [100.0], [-100.0], [-1.0]], linear_bias=None)
    many = dict(input=[[1.0], [0.5]], linear_weight=[[j * 5 % 24 / 8] for j in range(310)], linear_bias=None)
    everything = [list(range(V)), [], [3], [0, 11]]
    cases = [
        ("a sample, in part recorded", a, target, rows, -100, [1, 4, 5, 8, 11]),
        ("the same without bias", b, target, rows, -100, [1, 4, 5, 8, 11]),
        ("one token stands for all others", a, target, rows, -100, [6]),
        ("golds only", a, target, rows, -100, []),
        ("all other tokens: the full cross-entropy", c, target, rows, -100, [1, 2, 4, 5, 6, 8, 9, 10, 11]),
        ("ignored rows: no gold in R, no loss, no gradient", a, [3, -100, 3, -100], [rows[0], [], rows[2], [0, 1]],
         -100, [0, 4, 7, 8]),
        ("another ignore_index, itself a token, in R too", b, [3, 11, 11, 0], [rows[0], [], [], rows[3]], 11, [2, 11]),
        ("only ignored rows: the mean is 0/0, its gradient 0", c, [-100] * 4, [[], [], [], []], -100, [2, 5]),
        ("a row of all tokens, a row of gold", c, [5, -100, 3, 11], everything, -100, [1, 6]),
        ("the largest logit is in the tail", large, [0, 1], [[0, 4], [0, 1]], -100, [2, 3]),
        ("a tail of one's own, any weights", a, target, rows, -100, None),
        ("chosen in another order", a, target, rows, -100, [8, 1, 11, 4]),
        ("golds are all tokens", random_head(random.Random(12), 4, 3, 2, True), [1, 0, 2, 1],
         [[1], [0, 2], [2], [0, 1]], -100, []),
        ("an ignore_index beyond the vocabulary", b, [3, V, V, 0], [rows[0], [], [], rows[3]], V, [2, 11]),
    ]
    own = {"token_ids": [2, 4, 5, 9], "log_weight": [-1.5, 0.25, 3.0, 0.0]}
    head, few, short = seven(rng)
    given = [
        ("seven rows, four of them empty, the last one full", head, few, short, [0, 3, 4], [0.25, 1.5, -0.75]),
        ("a logit far below any filling, all of the tail recorded", *far_below(), [0], [0.5]),
        ("large logits: their difference is exact, minus log-sum-exp it is not", equal_but_one(5), [1], [[0, 1]],
         [2, 3], [0.5, 0.25]),
        ("a tail of no token", a, target, rows, [], []),
        ("refused: gold outside its row, but in the tail", a, [3, 7, 4, 0], rows, [2, 4], [1.0, 0.5]),
        ("refused: tail out of order", a, target, rows, [4, 2], [1.0, 0.5]),
        ("refused: a token of the tail twice", a, target, rows, [2, 4, 4], [1.0, 0.5, 0.5]),
        ("refused: a token of the tail beyond the vocabulary", a, target, rows, [2, V], [1.0, 0.5]),
        ("refused: a negative token of the tail", a, target, rows, [-1, 2], [1.0, 0.5]),
        ("refused: gold is token 0, outside a row that is filled up", head, [0, *few[1:]], short, [3], [0.5]),
        ("refused: gold is the last token, outside a row that is filled up", head, [5, *few[1:]], short, [3], [0.5]),
        ("refused: a target beyond the vocabulary", head, [*few[:-1], 6], short, [3], [0.5]),
        ("refused: a negative target, the last token if counted from the end", head, [*few[:-1], -1], short, [3],
         [0.5]),
        ("all digits of float32: products of two have those of float64", every_digit(), [2, 0], [[0, 2], [0, 1, 3]],
         [1, 4], [0.5, 1.0]),
        ("weights of e^-9990 and of e^9990, of which only the logarithms are numbers", large, [0, 1], [[0, 4], [0, 1]],
         [2, 3], [-9990.0, 9990.0]),
        ("a logit below -10^30, all of the tail recorded", *far_below(FURTHER), [0], [0.5]),
        ("refused: a logit of -inf in the tail alone", without_end(head), [4, *few[1:]],
         [[3, 4], *short[1:-1], [0, 1, 3, 4, 5]], [2, 3], [0.25, 0.5]),
        ("a row of 300 tokens, a tail of 284", many, [7, 3], [[*range(5, 305)], [3, 150]],
         [j for j in range(310) if j % 12], [j % 8 / 4 for j in range(284)]),
        ("rows of 1030, 35 and 3 tokens, a tail of 1025", *long_rows(LONG, 1030, 1000), [*range(15, LONG)],
         [j % 8 / 4 for j in range(15, LONG)]),
        ("refused: an empty row whose target is not ignored", head, [2, 0, 3, *few[3:]], short, [3], [0.5]),
        ("a logit of -inf that is neither recorded nor in the tail", without_end(random_head(rng, 2, 6, 3, True)),
         [1, 3], [[0, 1, 5], [3]], [0, 3], [0.5, 0.25]),
        ("37 rows, 4144 tokens in all", *crowded_head(), [3, 50, 119], [0.5, 1.25, -0.5]),
        ("a logit of -inf of token 0, which may fill up short rows", without_end(random_head(rng, 2, 5, 3, True), 0),
         [1, 4], [[1, 2, 3], [4]], [2], [0.5]),
        ("67 entries of a hidden state", random_head(rng, 2, 3, 67, True), [1, 2], [[0, 1], [1, 2]], [0], [0.5]),
        ("a recorded token of the tail, of a weight of e^1000", large, [0, 1], [[0, 4], [0, 1]], [0, 3], [1000.0, 0.5]),
        ("all digits of float64", wide_head(), [2, 3], [[1, 2], [0, 2, 3]], [0, 1], [0.5, 1.25], "float64"),
    ]
    cases = [(*case, own if case[-1] is None else None) for case in cases]
    cases += [(*case[:4], -100, None, dict(zip(("token_ids", "log_weight"), case[4:])), *case[6:]) for case in given]
    for name, head, target, rows, ignore_index, chosen, tail, *dtype in cases:
        yield dict(name=name, **head, target=target, token_ids=rows, ignore_index=ignore_index, chosen=chosen,
                   tail=tail, incoming=wide_numbers(2) if dtype else INCOMING[:len(target)], **only(dtype))
    for y in (-1, V):
        yield dict(name=f"refused: a target of {y}, by the drawing", alone="sample_tail", target=[3, y, 7],
                   vocab_size=V, ignore_index=-100, chosen=[1, 4])


# ----------------------------------------------------------------------------------------------------------- end to end

def end_to_end_inputs():
    for scope in ("global", "tensor"):
        for with_tail in (False, True):
            rng = random.Random(8)
            V, N = 12, 6
            matrix = lambda n, width: [normal(rng, width) for _ in range(n)]
            case = dict(name=f"{scope}, {'with' if with_tail else 'without'} a tail",
                        input=matrix(N, 4), body=matrix(3, 4), head=matrix(V, 3), bias=normal(rng, V),
                        target=[rng.randrange(V) for _ in range(N - 1)] + [-100], tau=0.75, ignore_index=-100,
                        scope=scope, max_angle=75 * DEGREE, **DECAY, steps=[])
            others = [j for j in range(V) if j not in case["target"]]
            chosen = lambda: sorted(rng.sample(others, 3)) if with_tail else None
            case["steps"] = [{"lr": (20 - t) / 320, "chosen": chosen()} for t in range(20)]
            yield case


# ----------------------------------------------------------------------------------------------------------- the anchor

UP_TO_THE_LIMIT, BEYOND_IT = [-1401 / 2048] * 2, [-1398 / 2048] * 2  # log-probabilities of 1.0091, of 1.0106


def anchor_inputs():
    rng = random.Random(9)
    V, rows = 7, [[0, 2, 5], [6], [0, 1, 2, 3, 4, 5, 6], [1, 4]]
    base, model = ([normal(rng, V, 2.0) for _ in range(4)] for _ in range(2))
    said = lambda logits, rows: [[float32(x) for x in row]
                                 for row in plain_reference.recorded_log_probs(logits, rows)]
    records = [
        ("the record: log-probabilities by ascending id, of the softmax of all tokens", base, [2, 6, 3, 1], 0.6, None),
        ("the record: max_size, ignored rows", base, [0, -100, 3, -100], 0.95, 2),
        ("the record: a logarithm of what is 0 as a probability", [[0.0, -1000.0, 1.0, -2000.0]], [1], 0.7, None),
        ("the record: a logarithm of what has few digits in float32", [[0.0, -103.0, -95.5]], [1], 0.5, None),
        ("the record: large logits", [[2.0**17, 2.0**17 + 0.5, 2.0**17 - 0.75]], [0], 1.0, None),
        ("the record: large logits of float64", [[2.0**40, 2.0**40 + 0.5, 2.0**40 - 0.75]], [0], 1.0, None, "float64"),
        ("the record: 37 rows", crowd(4), [t % 4 for t in range(MANY)], 0.75, None),
    ]
    for name, logits, target, tau, max_size, *dtype in records:
        assert clear(logits, tau) or tau == 1, name
        yield dict(name=name, logits=logits, target=target, tau=tau, max_size=max_size, ignore_index=-100,
                   **only(dtype))
    gaps, log_p, mixed = [rows[0], [], [], rows[3]], said(base, rows), [t * 3 % 4 for t in range(MANY)]
    even = lambda rows, x: [[x - j % 8 / 8 for j in row] for row in rows]
    (widest, _, longest), (crowded, _, full) = long_rows(LONG, 1030, 1000), crowded_head()
    spread = [[0.0, 1.0, 2.0, 3.0], [FAR, FAR + 2.0**18, 0.0, 0.0]]
    below = [[-1.5, -2.0, -3.0, -1.0], [-20000.0, -20001.0]]
    cases = [
        ("one token, some and all tokens a row", model, rows, log_p, None),
        ("the recording model itself: 0", base, rows, log_p, None),
        ("empty rows: the mean is over the others", model, gaps, said(base, gaps), None),
        ("only empty rows: the mean is 0/0, its gradient 0", model[:2], [[], []], [[], []], None),
        ("a batch of some rows, in another order", model[:2], rows, log_p, [3, 0]),
        ("a batch with repeats and an empty row", model, gaps, said(base, gaps), [3, 1, 0, 3]),
        ("huge logits, the largest outside the row", [[1e4, -1e4, 9999.0, 0.0], [0.0, 1.0, 0.5, 1e4]],
         [[0, 1, 2], [0, 1]], [[-1.5, -2.0, -0.5], [-1.0, -3.0]], None),
        ("a recorded probability of 0 adds 0", [[2.0, 1.0, 0.0]], [[0, 1]], [[0.0, -1000.0]], None),
        ("recorded probabilities that are all 0 in float32", [[2.0, 1.0, 0.0]], [[0, 1, 2]], [[-151.0, -150.0, -152.0]],
         None),
        ("logits and log-probabilities far below any filling, beside a longer row", spread, [[0, 1, 2, 3], [0, 1]],
         below, None),
        ("large logits: their difference is exact, minus log-sum-exp it is not", [[2.0**20] * 3 + [0.0]], [[0, 1, 2]],
         [[-1.0, -2.0, -3.0]], None),
        ("refused: a positive log-probability", model, rows, [log_p[0], [0.5], *log_p[2:]], None),
        ("refused: probabilities of a row that add up to more than 1", model, rows, [[-0.5, -1.0, -0.5], *log_p[1:]],
         None),
        ("refused: a record without log-probabilities", model, rows, None, None),
        ("refused: a row with fewer log-probabilities than tokens", model, rows, [[-1.0, -1.5], *log_p[1:]], None),
        ("refused: a row with more log-probabilities than tokens", model, rows, [[*log_p[0], -9.0], *log_p[1:]], None),
        ("refused: probabilities of a row that add up to 1.05", model, rows, [[-1.046875] * 3, *log_p[1:]], None),
        ("refused: a row that is not in the batch, of probabilities that add up to more than 1", model[:2], rows,
         [*log_p[:3], [-0.5, -0.5]], [2, 0]),
        ("refused: a row that is not in the batch, with fewer log-probabilities than tokens", model[:2], rows,
         [log_p[0], [], *log_p[2:]], [2, 0]),
        ("a logit and a log-probability below -10^30, beside a longer row",
         [[0.0, 1.0, 2.0, 3.0], [FURTHER, 0.0, 0.0, 0.0]], [[0, 1, 2, 3], [0]], [below[0], [FURTHER]], None),
        ("probabilities of a row that add up to 1.006", model, rows, [*log_p[:3], [-0.6875] * 2], None),
        ("refused: a logit of -inf", [*model[:3], [*model[3][:4], "-inf", *model[3][5:]]], rows, log_p, None),
        ("probabilities of a row that add up to 1.009", model, rows, [*log_p[:3], UP_TO_THE_LIMIT], None),
        ("refused: probabilities of a row that add up to 1.011", model, rows, [*log_p[:3], BEYOND_IT], None),
        ("rows of 1030, 35 and 3 tokens", logits_of(widest), longest, even(longest, -8.0), None),
        ("refused: a positive log-probability, of a sum of 1.008", model, rows, [log_p[0], [2.0**-7], *log_p[2:]],
         None),
        ("refused: as many log-probabilities as tokens, but not row by row", model, rows,
         [[*log_p[0], -9.0], [], *log_p[2:]], None),
        ("refused: a logit of -inf that is not recorded", [[*model[0][:4], "-inf", *model[0][5:]], *model[1:]], rows,
         log_p, None),
        ("37 rows", crowd(7), rows, log_p, mixed),
        ("a row of 300 tokens", [[j * 5 % 24 / 8 for j in range(310)]], [[*range(5, 305)]],
         even([range(5, 305)], -6.0), None),
        ("all digits of float64", [wide_numbers(7), wide_numbers(7)], rows, log_p, [2, 0], "float64"),
    ]
    for name, logits, token_ids, log_probs, positions, *dtype in cases:
        yield anchor_case(name, dict(logits=logits), len(logits), token_ids, log_probs, positions, *dtype)
    near, head, token_ids, log_probs = nearly_equal()
    close = "a divergence that rounding hides, perhaps below 0, and a gradient that it does not"
    yield anchor_case(close, near, 12, token_ids, log_probs, None) | {"incoming": [64.0] * 12}
    yield anchor_case(f"the linear form, {close}", head, 12, token_ids, log_probs, None) | {"incoming": [64.0] * 12}
    with_bias, without = random_head(rng, 4, V, 3, True), random_head(rng, 4, V, 3, False)
    many, _, short = seven(rng)
    few = random_head(random.Random(10), 2, V, 3, True)
    far, _, beside = far_below()
    wide, _, longer = long_rows(310)
    lengths, ones = [[0], [], [0, 1, 2, 3, 4, 5], [5], [], [2, 3], [3]], [[0], [5], [2], [0], [4], [5], [1]]
    steep = dict(input=[[1.0], [20.0]], linear_weight=[[1.0], [0.0], [10.0]], linear_bias=None)
    cases = [
        ("the linear form", with_bias, rows, log_p, None),
        ("the linear form without bias, some rows, repeats", without, gaps, said(base, gaps), [3, 1, 0, 3]),
        ("the linear form, seven rows, four of them empty, the last one full", many, short,
         [[-1.0, -1.5], [-2.0, -0.5, -3.0], [], [], [], [], [-2.0] * 3 + [-1.75] * 3], None),
        ("the linear form, a logit far below any filling, beside a longer row", far, beside, [below[0], [-20000.0]],
         None),
        ("the linear form, refused: probabilities of a row that add up to more than 1", with_bias, rows,
         [[-0.5, -1.0, -0.5], *log_p[1:]], None),
        ("the linear form, refused: a record without log-probabilities", with_bias, rows, None, None),
        ("the linear form, rows of one token beside one of all and empty ones", many, lengths,
         said([normal(rng, 6, 2.0) for _ in lengths], lengths), None),
        ("the linear form, only rows of one token: 0", many, ones, [[-0.5]] * 7, None),
        ("the linear form, only empty rows: the mean is 0/0, its gradient 0", many, [[]] * 7, [[]] * 7, None),
        ("the linear form, a recorded probability of 0 adds 0, one of today is e^-200", steep, [[0, 1], [1, 2]],
         [[0.0, -1000.0], [-1.0, -2.0]], None),
        ("the linear form, large logits: their difference is exact, minus log-sum-exp it is not", equal_but_one(4),
         [[0, 1, 2]], [[-1.0, -2.0, -3.0]], None),
        ("the linear form, all digits of float32: products of two have those of float64", every_digit(),
         [[0, 2], [0, 1, 3]], [[-1.0, -2.0], [-3.0, -1.0, -0.75]], None),
        ("the linear form, refused: a positive log-probability", with_bias, rows, [log_p[0], [0.5], *log_p[2:]], None),
        ("the linear form, refused: a row with fewer log-probabilities than tokens", with_bias, rows,
         [[-1.0, -1.5], *log_p[1:]], None),
        ("the linear form, refused: a row that is not in the batch, of probabilities that add up to more than 1",
         few, rows, [*log_p[:3], [-0.5, -0.5]], [2, 0]),
        ("the linear form, refused: a row that is not in the batch, with fewer log-probabilities than tokens", few,
         rows, [log_p[0], [], *log_p[2:]], [2, 0]),
        ("the linear form, a logit and a log-probability below -10^30, beside a longer row", far_below(FURTHER)[0],
         beside, [below[0], [FURTHER]], None),
        ("the linear form, probabilities of a row that add up to 1.006", with_bias, rows,
         [*log_p[:3], [-0.6875] * 2], None),
        ("the linear form, refused: a logit of -inf", without_end(with_bias), rows, log_p, None),
        ("the linear form, rows of 300, 55 and 3 tokens, 305 distinct ones", wide, longer, even(longer, -6.0), None),
        ("the linear form, probabilities of a row that add up to 1.009", with_bias, rows,
         [*log_p[:3], UP_TO_THE_LIMIT], None),
        ("the linear form, refused: probabilities of a row that add up to 1.011", with_bias, rows,
         [*log_p[:3], BEYOND_IT], None),
        ("the linear form, rows of 1030, 35 and 3 tokens, 1035 distinct ones", widest, longest, even(longest, -8.0),
         None),
        ("the linear form, refused: a positive log-probability, of a sum of 1.008", with_bias, rows,
         [log_p[0], [2.0**-7], *log_p[2:]], None),
        ("the linear form, refused: as many log-probabilities as tokens, but not row by row", with_bias, rows,
         [[*log_p[0], -9.0], [], *log_p[2:]], None),
        ("the linear form, a logit of -inf that is not recorded", without_end(random_head(rng, 2, V, 3, True)),
         [[0, 1], [4, 5, 6]], [[-1.0, -1.5], [-1.5, -2.0, -1.0]], None),
        ("the linear form, a logit of -inf of token 0, which may fill up short rows",
         without_end(random_head(rng, 2, V, 3, True), 0), [[1, 2, 3], [4]], [[-1.0, -1.5, -2.0], [-0.5]], None),
        ("the linear form, 37 rows, 4144 tokens in all", crowded, full[:5], even(full[:5], -5.0),
         [t * 3 % 5 for t in range(MANY)]),
        ("the linear form, 67 entries of a hidden state", random_head(rng, 2, 3, 67, True), [[0, 1], [0, 1, 2]],
         [[-1.0, -1.5], [-1.5, -2.0, -1.0]], None),
        ("the linear form, all digits of float64", wide_head(), [[1, 2], [0, 2, 3]],
         [[-1.0, -1.5], [-1.5, -2.0, -1.0]], None, "float64"),
    ]
    for name, head, token_ids, log_probs, positions, *dtype in cases:
        yield anchor_case(name, head, len(head["input"]), token_ids, log_probs, positions, *dtype)


def nearly_equal():
    """A model that differs by little from the recording one: dense, linear, the record's rows and log-probabilities."""
    z, log_probs = [0.0, -0.5, -3.0, 0.75, 0.0], []
    steps = [2.0**-12, -2.0**-13, 2.0**-29, -2.0**-30]  # token 0's logit is up by one of them
    token_ids = [row for row in ([0, 4], [0, 1, 2], [0, 3]) for _ in steps]
    for row in token_ids:
        log_probs.append([z[j] - 2.0 for j in row])
    dense = dict(logits=[[step, *z[1:]] for step in steps * 3])
    head = dict(input=[[1.0, step] for step in steps * 3], linear_weight=[[x, 0.0] for x in z], linear_bias=None)
    head["linear_weight"][0][1] = 1.0
    return dense, head, token_ids, log_probs


def anchor_case(name, inputs, N, token_ids, log_probs, positions, *dtype):
    return dict(name=name, **inputs, token_ids=token_ids, log_probs=log_probs, **only(dtype),
                incoming=wide_numbers(N) if dtype else INCOMING[:N],
                positions=list(range(N)) if positions is None else positions)


# ------------------------------------------------------------------------------------------- the reference as a port

class Plain:
    """plain_reference, or a module like it, as a port: in float64, but with a float32 port's thresholds and softmax."""

    def __init__(self, reference=plain_reference):
        self.reference = reference

    def matmul(self, a, b):
        """With sums that are rounded once, as everywhere in the reference."""
        return np.array(self.reference.linear(a.tolist(), b.T.tolist()))

    def softmax(self, logits):
        p = [self.reference.softmax(z) for z in logits.tolist()]
        return p if logits.dtype == "float64" else [[float32(x) for x in row] for row in p]

    def finite(self, logits, used, name="logits"):
        if not all(math.isfinite(x) for z, row in zip(logits, used) for j, x in enumerate(z) if j in row):
            raise ValueError(f"{name} must be finite")

    def all_finite(self, logits):
        self.finite(logits, [range(len(z)) for z in logits])

    def record_topk(self, logits, target, tau, max_size, ignore_index):
        self.all_finite(logits)
        rows, outside = self.reference.record_topk(self.softmax(logits), target.tolist(), tau, max_size, ignore_index)
        log_probs = self.reference.recorded_log_probs(logits.tolist(), rows)
        return rows, outside, [[float32(x) for x in row] for row in log_probs]

    def outside_mass(self, logits, token_ids):
        self.all_finite(logits)
        return self.reference.outside_mass(logits.tolist(), token_ids)

    def reduced(self, losses, gradients, counted, reduction, incoming):
        if reduction == "none":
            return losses, self.reference.weighted_sum(losses, gradients, incoming.tolist())[1]
        value, gradients = (self.reference.mean(losses, gradients, counted) if reduction == "mean" else
                            self.reference.weighted_sum(losses, gradients, [1.0] * len(losses)))
        return value, [[incoming * x for x in row] for row in gradients]

    def replay_cross_entropy(self, logits, *rest):
        self.all_finite(logits)
        return self.cross_entropy(logits, *rest)

    def cross_entropy(self, logits, target, token_ids, ignore_index, reduction, incoming, tail=((), ())):
        result = self.reference.replay_cross_entropy(logits.tolist(), target.tolist(), token_ids, ignore_index, tail)
        return self.reduced(*result, [y != ignore_index for y in target.tolist()], reduction, incoming)

    def linear_replay_cross_entropy(self, input, linear_weight, linear_bias, target, token_ids, ignore_index, tail,
                                    reduction, incoming):
        tail = ((), ()) if tail is None else calls.lists(tail)
        used = [{*row, *tail[0]} for row in token_ids]
        return self.by_head(self.cross_entropy, used, input, linear_weight, linear_bias, target, token_ids,
                            ignore_index, reduction, incoming, tail)

    def by_head(self, loss, used, input, linear_weight, linear_bias, *rest):
        h, W, bias = calls.lists([input, linear_weight, linear_bias])
        logits = self.reference.linear(h, W, bias)
        self.finite(logits, used, "input @ linear_weight.T + linear_bias")
        value, gradients = loss(np.array(logits), *rest)
        d_input, d_weight, d_bias = self.reference.linear_gradients(h, W, gradients)
        return value, d_input, d_weight, None if bias is None else d_bias

    def sample_tail(self, chosen, target, vocab_size, ignore_index):
        """With float32 log-weights, as they are stored."""
        if not all(y == ignore_index or 0 <= y < vocab_size for y in target.tolist()):
            raise ValueError("target must lie in [0, V) or be ignore_index")
        ids, log_weight = self.reference.sample_tail(chosen, target.tolist(), vocab_size, ignore_index)
        return ids, [float32(x) for x in log_weight]

    def angle_between(self, u, v):
        return self.reference.angle_between(u.tolist(), v.tolist())

    def clip_angle(self, grad, momentum, max_angle):
        return self.reference.clip_angle(grad.tolist(), momentum.tolist(), max_angle, EPS[str(grad.dtype)])[0]

    def moclip(self, groups, max_angle, scope):
        eps = EPS[str(next(p for group in groups for p in group["parameters"]).dtype)]
        shapes = calls.lists([p for group in groups for p in group["parameters"]])
        zeros = lambda p: [0.0] * len(flat(p))
        state = [{"parameter": flat(p), "exp_avg": zeros(p), "exp_avg_sq": zeros(p), "step": 0} for p in shapes]

        def step(gradients, lrs):
            options = [dict(group, lr=lr) for group, lr in zip(groups, lrs) for _ in group["parameters"]]
            for p, gradient in zip(state, gradients):
                p["gradient"] = None if gradient is None else flat(gradient.tolist())
            reports = self.reference.moclip_step(state, options, max_angle, scope, eps)
            of = lambda key: [shaped(p[key], like) for p, like in zip(state, shapes)]
            return (of("parameter"), [theta for theta, _ in reports], [clipped for _, clipped in reports],
                    [*zip([p["step"] for p in state], of("exp_avg"), of("exp_avg_sq"))])
        return step

    def replay_kl_div(self, logits, *rest):
        self.all_finite(logits)
        return self.kl_div(logits, *rest)

    def kl_div(self, logits, token_ids, log_probs, positions, reduction, incoming):
        token_ids, log_probs = self.reference.select(token_ids, log_probs, positions)
        result = self.reference.replay_kl_div(logits.tolist(), token_ids, log_probs)
        return self.reduced(*result, [len(row) > 0 for row in token_ids], reduction, incoming)

    def linear_replay_kl_div(self, input, linear_weight, linear_bias, token_ids, log_probs, positions, *rest):
        used = [{*row} for row in self.reference.select(token_ids, log_probs, positions)[0]]
        return self.by_head(self.kl_div, used, input, linear_weight, linear_bias, token_ids, log_probs,
                            positions, *rest)


INPUTS = {"1_recording.json": recording_inputs, "2_loss.json": loss_inputs, "3_linear_loss.json": linear_inputs,
          "4_angle.json": angle_inputs, "5_rotation.json": rotation_inputs, "6_moclip.json": moclip_inputs,
          "7_tail.json": tail_inputs, "8_end_to_end.json": end_to_end_inputs, "9_anchor.json": anchor_inputs}


def on_the_way(name, case, dtype):
    if "tau" in case and "logits" in case:
        return {"on_the_way": {"probabilities": Plain().softmax(np.array(case["logits"], dtype))}}
    if name == "5_rotation.json":
        names = ("angle", "clipped", "antiparallel")
        results = plain_reference.clip_angle(case["grad"], case["momentum"], case["max_angle"], EPS[dtype])[1:]
        return {"on_the_way": dict(zip(names, results))}
    return {}


def expected(name, case, dtype):
    """What to expect of a port. null is "not a number"; of the gradients of a linear form two reductions are enough."""
    try:
        got = calls.outputs(name, Plain(), case, dtype)
    except ValueError as error:
        return {"error": str(error).split()[0]}  # the argument at fault
    if name == "1_recording.json":
        del got["log_probs"]  # they wait for file 9
    long = lambda key, x: key.startswith(("gradient", "d_")) and LONG in np.shape(x)
    return {key: None if isinstance(x, float) and math.isnan(x) else x for key, x in got.items()
            if not (key.startswith("d_sum") or long(key, x))}


def make(name):
    cases = []
    for case in INPUTS[name]():
        dtype = case.get("dtype") or "float64"
        wanted = expected(name, case, dtype)
        cases.append({**case, **({} if "error" in wanted else on_the_way(name, case, dtype)), "expected": wanted})
    return cases


if __name__ == "__main__":
    for name in INPUTS:
        lines = ",\n".join(json.dumps(case, allow_nan=False) for case in make(name))
        (FOLDER / name).write_text(f"[\n{lines}\n]\n")
