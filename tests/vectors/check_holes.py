"""Do the vectors see what can go wrong? Wrong variants of tests/plain_reference.py, each of which a vector must catch.

    cd tests && python -m vectors.check_holes        prints, for each variant, the first case that catches it

A variant is the reference, or the port that is made of it (`Plain` in generate.py), with a few pieces of its text
replaced; f32(x) in it rounds to float32. It is computed in float64 and judged by the tolerances of a float64 and of a
float32 port; a few errors only one of the two can see.
"""

import inspect
import json
import math
import struct
import types
from pathlib import Path

from vectors import calls, compare, generate, run_port

FOLDER = Path(__file__).parent
SOURCE = (FOLDER.parent / "plain_reference.py").read_text() + "\n\n" + inspect.getsource(generate.Plain)
# the shortest cases first: most variants need no other
STORED = {name: sorted(json.loads((FOLDER / name).read_text()), key=lambda case: len(str(case)))
          for name in calls.FILES}

# pieces of the reference that several variants change
BREAK = "if covered >= tau or len(subset) == max_size:"
START = "subset, covered = [], 0.0"
POP = "            if len(subset) == max_size:\n                subset.pop()\n"
VALID = "require(0 <= y < len(p)"
MASS = "outside.append(mass_outside(p, subset))"
OUTSIDE = "return math.fsum(x for j, x in enumerate(p) if j not in inside)"
SCORED = "if y != ignore_index:\n            require"
ROW = "x = {j: z[j] for j in subset}"
LOSS = "loss = (largest - z[y]) + math.log(total)"
LARGEST = "largest = max(x.values())"
TOTAL = "total = math.fsum(math.exp(x[j] - largest) for j in x)"
IN_ROW = "require(y in subset, "
EMPTY = "loss, gradient = 0.0, [0.0] * len(z)"
TAIL_IDS = "require(list(tail[0]) == sorted({j for j in tail[0] if 0 <= j < len(z)})"
LOSSES = "    losses, gradients = [], []\n    for z, y, subset in"
SEEN = LOSSES, "    global seen\n    seen = target\n" + LOSSES  # by `mean`
GRADIENT = "gradient[j] = math.exp(x[j] - largest) / total - (j == y)"
COUNTED = "count = sum(counted)"
NOTHING = "return math.nan, gradients"
MEAN = "return math.fsum(losses) / count, [[x / count for x in row] for row in gradients]"
ANGLE = "return math.atan2(norm([a - c * b for a, b in zip(u, v)]), c)"
NORM = "return math.hypot(*x)"
ZERO = "== 0:\n        return 0.0"
ANTIPARALLEL = "clipped and theta > math.pi / 2 and math.sin(theta) <= math.sqrt(eps)"
UNTURNED = "if not clipped or antiparallel:"
ROTATED = "rotated = [length * (math.cos(max_angle) * b + math.sin(max_angle) * (x / r_length))"
ACTIVE = 'if p["gradient"] is not None]'
LOOP = "    for members in scopes:\n"
G = '        g = [x for p, _ in members for x in p["gradient"]]\n'
M = '        m = [x for p, _ in members for x in p["exp_avg"]]'
ITER = "        rotated = iter(g)\n"
RAW = ITER + '        raw = iter([x for p, _ in members for x in p["gradient"]])\n'
FILL = '        for p, _ in members:\n            p["gradient"] = p["gradient"] or [0.0] * len(p["parameter"])\n' + G
BEFORE = "before = 0.0 if antiparallel else m[k]"
C1C2 = 'c1, c2 = 1 - beta1 ** p["step"], 1 - beta2 ** p["step"]'
V = "v[k] = beta2 * v[k] + (1 - beta2) * x * x"
DECAY = 'decay = 1 - o["lr"] * o["weight_decay"]'
LOG_Q = "log_q0, log_q1 = log_softmax(log_p0), log_softmax([z[j] for j in subset])"
KL = "losses.append(math.fsum(math.exp(a) * (a - b) for a, b in zip(log_q0, log_q1)))"
IN_FLOAT32 = (LOG_Q, LOG_Q + "\n        log_q0, log_q1 = [f32(a) for a in log_q0], [f32(b) for b in log_q1]",
              KL, "losses.append(f32(math.fsum(f32(math.exp(a)) * f32(a - b) for a, b in zip(log_q0, log_q1))))")
KL_GRADIENT = "gradients[-1][j] = math.exp(b) - math.exp(a)"
KL_ROW = "gradients.append([0.0] * len(z))"
KL_LOOP = "    losses, gradients = [], []\n    for z, subset, log_p0 in"
KL_SEEN = KL_LOOP, "    global seen\n    seen = token_ids\n" + KL_LOOP  # by `mean`
LOG_SOFTMAX = "return [(x - largest) - math.log(total) for x in z]"
SUMS = "require(all(math.fsum(map(math.exp, row)) <= 1.01 for row in log_probs)"
LENGTHS = "require([*map(len, log_probs)] == [*map(len, token_ids)]"
RECORDED = "[[log_p[j] for j in subset]"
PICKED = "return [token_ids[t] for t in positions], [log_probs[t] for t in positions]"
UPDATE = 'math.atan2(m[k] / c1, o["b"] * math.sqrt(v[k] / c2))'
REPORT = "reports.append((theta, clipped))"
M_NEXT = "m[k] = beta1 * before + (1 - beta1) * x"
R_LENGTH = "r_length = norm(r)"
GOLDS = "golds = {y for y in target if y != ignore_index}"
UNION = "R = sorted(golds | set(chosen))"
LOG_WEIGHT = "math.log((vocab_size - len(golds)) / len(chosen))"
D_WEIGHT = "math.fsum(x * h[i] for x, h in zip(dz, input))"
LOGITS_IN_FLOAT32 = ("return [[math.fsum(a * b for a, b in zip(h, w)) + c",
                     "return [[f32(math.fsum(a * b for a, b in zip(h, w)) + c)")
TERMS = "if j not in x:\n                    x[j] = z[j] + log_weight"
OF_MODEL = "return [mass_outside(softmax(z), subset) if"
FROM_LOGARITHMS = "return [math.exp(log_sum([x for j, x in enumerate(z) if j not in subset]) - log_sum(z)) if"
LAST_LOGITS = ("import math", "import math\nseen = []", "largest = max(z)", "seen.append(z)\n    largest = max(z)",
               "for p, y in zip(probabilities, target):",
               "for p, y, z in zip(probabilities, target, seen[-len(target):]):")
LOG_SUM = ("# 3. The outside mass", """\
def log_sum(z):
    return max(z) + math.log(math.fsum(math.exp(x - max(z)) for x in z)) if z else -math.inf


# 3. The outside mass""")
BLOCKWISE = """\
def blockwise(z, subset):
    largest, total, outside = -math.inf, 0.0, 0.0
    for k in range(0, len(z), 1024):
        before, largest = largest, max([largest, *z[k:k + 1024]])
        total = total * math.exp(before - largest) + math.fsum(math.exp(x - largest) for x in z[k:k + 1024])
        outside += math.fsum(math.exp(x - largest) for j, x in enumerate(z) if k <= j < k + 1024 and j not in subset)
    return outside / total


# 3. The outside mass"""
# and of the port
UNRECORDED = "    def all_finite", """\
    def some_finite(self, logits, token_ids, positions):
        self.finite(logits, [token_ids[t] for t in positions])

    def all_finite"""
SELECTED = "token_ids, log_probs = self.reference.select(token_ids, log_probs, positions)"
FINITE = "if not all(math.isfinite(x)"
LIVE = "for p in shapes]\n\n        def step", "for p in shapes]\n        live = []\n\n        def step"
TOPK = "rows, outside = self.reference.record_topk("
RECORD = "log_probs = self.reference.recorded_log_probs(logits.tolist(), rows)"
CROSS_ENTROPY = "result = self.reference.replay_cross_entropy(logits.tolist(), target.tolist(), token_ids, " \
                "ignore_index, tail)"
HEAD_FINITE = 'self.finite(logits, used, "input @ linear_weight.T + linear_bias")'
HEAD_GRADIENTS = "d_input, d_weight, d_bias = self.reference.linear_gradients(h, W, gradients)"
HEAD = "h, W, bias = calls.lists([input, linear_weight, linear_bias])"
STEPPED = "reports = self.reference.moclip_step(state, options, max_angle, scope, eps)"
RETURNED = "of = lambda key: [shaped(p[key], like) for p, like in zip(state, shapes)]"
STATE = '[*zip([p["step"] for p in state], of("exp_avg"), of("exp_avg_sq"))]'
TAIL = "((), ()) if tail is None else calls.lists(tail)"


def within(piece, old, new):
    return piece, piece.replace(old, new)


def then(piece, statement):
    """A statement of the port's after another, which is often one that overwrites what the port was given."""
    return piece, f"{piece}\n        {statement}"


def then_kl(statement):
    """A statement of the anchor's after a row's loss, before its gradient."""
    return KL_ROW, f"{KL_ROW}{statement}"


def traced(piece, name, key):
    """An argument that keeps the value of the first call with such shapes, as if it were compiled in."""
    return piece, f'{name} = self.__dict__.setdefault("{name}", {{}}).setdefault({key}, {name})\n        {piece}'


def clear(condition):
    """Moments of parameters set to zero before a step."""
    return ITER, ITER + f"        for p in parameters if {condition} else []:\n" \
                        '            p["exp_avg"][:] = [0.0] * len(p["exp_avg"])\n'


def filled(value):
    """Short rows filled up to the longest with tokens of that logit."""
    return (LARGEST, f"pad = [{value}] * (max(map(len, token_ids)) - len(subset))\n"
                     "            largest = max([*x.values(), *pad])",
            TOTAL, TOTAL + " + math.fsum(math.exp(x - largest) for x in pad)")


def chunks(n):
    """The last rows, too few for a chunk of n, are dropped."""
    return within(SCORED, "y != ignore_index", f"y != ignore_index and len(losses) < len(logits) // {n} * {n}")


def blocks(n):
    """The running sum goes on from the sum of a block of n tokens, which starts at zero."""
    return (START, START + "\n        carry = block = 0.0", "covered += p[j]", f"""\
carry, block = (covered, p[j]) if len(subset) % {n} == 1 else (carry, block + p[j])
            covered = carry + block""")


def cut(n):
    """Rows cut at n tokens, in the loss alone, as by a static width."""
    return within(ROW, "in subset", f"in subset[:{n}]")


def distinct(n):
    """A batch's distinct tokens beyond the n-th get that one's row of the head, as by unique(size=n)."""
    return then(HEAD, f"""\
known = sorted({{j for row in used for j in row}})[:{n}]
        W = [W[min(j, known[-1])] if known else W[j] for j in range(len(W))]""")


WIDTHS = 128, 256, 1024  # static ones, as a port may have
BOTH, WIDE, NARROW = ("float64", "float32"), ("float64",), ("float32",)

# of each of the three losses that read targets
OF_TARGETS = [
    ("log-sum-exp minus the gold logit", WIDE, LOSS, "loss = (largest + math.log(total)) - z[y]"),
    ("log-sum-exp minus the gold logit, in float32", BOTH, LOSS,
     "loss = f32(f32(largest + f32(math.log(total))) - z[y])"),
    ("short rows filled up with logits of -10^4", BOTH, *filled("-1e4")),
    ("short rows filled up with logits of -10^9", BOTH, *filled("-1e9")),
    ("short rows filled up with logits of -10^30", BOTH, *filled("-1e30")),
    ("a logit of -inf taken", BOTH, FINITE, "if not all(x < math.inf"),
    ("gold outside its row taken", BOTH, IN_ROW, "require(True, "),
    ("the record of the first call with these shapes", BOTH, *traced(CROSS_ENTROPY, "token_ids", "logits.shape")),
    ("ignore_index of the first call with these shapes", BOTH, *traced(CROSS_ENTROPY, "ignore_index", "logits.shape")),
    ("backward ignores the incoming gradient", BOTH,
     "[[w * x for x in row] for w, row in zip(weights, gradients)]", "gradients"),
    ("incoming gradient of the first position for all", BOTH, "[[w * x for x", "[[weights[0] * x for x"),
    ("mean with the sum's gradient", BOTH, *within(MEAN, "x / count", "x")),
    ("mean is the sum", BOTH, *within(MEAN, "math.fsum(losses) / count", "math.fsum(losses)")),
    ("mean over all targets", BOTH, COUNTED, "count = len(counted)"),
    ("mean of nothing is 0", BOTH, *within(NOTHING, "math.nan", "0.0")),
    ("mean over targets that are not -100", BOTH, *SEEN, COUNTED, "count = sum(y != -100 for y in seen)"),
    ("the gradient of 0/0 is not a number", BOTH,
     *within(NOTHING, "gradients", "[[math.nan] * len(x) for x in gradients]")),
    ("ignore_index fixed at -100", BOTH, *within(SCORED, "ignore_index", "-100")),
    ("negative targets always ignored", BOTH, *within(SCORED, "ignore_index", "ignore_index and y >= 0")),
    ("only empty rows are ignored", BOTH, *within(SCORED, "y != ignore_index", "subset")),
    ("gold 0 is found in the filling of a short row", BOTH, IN_ROW,
     "require(y in subset or y == 0 and len(subset) < max(map(len, token_ids)), "),
    ("the last token is found in the filling of a short row", BOTH, IN_ROW,
     "require(y in subset or y == len(z) - 1 and len(subset) < max(map(len, token_ids)), "),
    ("a target beyond the vocabulary is clamped", BOTH, IN_ROW, "y = min(y, len(z) - 1)\n            " + IN_ROW),
    ("negative targets count from the end", BOTH, IN_ROW, "y = y % len(z)\n            " + IN_ROW),
    ("an empty row is ignored, whatever its target", BOTH, *within(SCORED, "y != ignore_index",
                                                                   "y != ignore_index and subset")),
    ("an ignore_index beyond the vocabulary is a wrong target", BOTH, *within(
        SCORED, "y != ignore_index", "y != ignore_index or y >= len(z)")),
    ("the incoming gradient in float32", WIDE, "self.reference.weighted_sum(losses, gradients, incoming.tolist())",
     "self.reference.weighted_sum(losses, gradients, [f32(x) for x in incoming.tolist()])"),
    ("rows in blocks of 16, the last one too early", BOTH, *then(CROSS_ENTROPY, "result = [*map(clamped, result)]")),
]
NO_LOSS_INFINITE = ("a logit of -inf that makes no loss infinite taken", BOTH, HEAD_FINITE, "pass", HEAD_GRADIENTS,
                    'self.finite([np.atleast_1d(np.where(np.isinf(value), value, 0))], [range(99)], "input")\n        '
                    + HEAD_GRADIENTS)
# of the linear forms
OF_HEADS = [
    ("hidden states overwritten", BOTH, *then(HEAD, "input *= 2")),
    ("the head's weights overwritten", BOTH, *then(HEAD, "linear_weight += 1")),
    ("the head's bias overwritten", BOTH, *then(HEAD, "if bias: linear_bias -= 1")),
    ("head's gradient of the last two rows only", BOTH, "zip(dz, input)", "[*zip(dz, input)][(len(dz) - 1) // 2 * 2:]"),
    ("hidden states in float32", WIDE, *then(HEAD, "h = [[f32(x) for x in row] for row in h]")),
    ("the head's weights in float32", WIDE, *then(HEAD, "W = [[f32(x) for x in row] for row in W]")),
    ("the head's bias in float32", WIDE, *then(HEAD, "bias = bias and [f32(x) for x in bias]")),
    ("all of the bias must be finite", BOTH, *then(HEAD, "self.finite([bias or []], [range(len(W))], 'input')")),
    ("logits of places that are filled up with token 0 must be finite", BOTH, *within(
        HEAD_FINITE, "used", "[{*row, 0} if len(row) < max(map(len, used)) else row for row in used]")),
    ("products in tiles of 64, what is beyond the last full one is lost", BOTH,
     "zip(h, w)) + c", "zip(h[:len(h) // 64 * 64 or 64], w)) + c"),
    ("the head's gradient of the first 4096 tokens only", BOTH, HEAD_GRADIENTS, f"""\
{HEAD_GRADIENTS}
        past = [sum(map(len, used[:t])) < 4096 - len(row) for t, row in enumerate(used)]
        d_weight = self.reference.linear_gradients(
            h, W, [[x * keep for x in row] for row, keep in zip(gradients, past)])[1]"""),
    ("bias's gradient of the last two rows only", BOTH, "[math.fsum(dz) for",
     "[math.fsum(dz[(len(dz) - 1) // 2 * 2:]) for"),
]
# of those of which a batch has many tokens
OF_LONG_ROWS = [
    (f"of more than {n} distinct tokens the last rows of the head are missing", BOTH, *distinct(n))
    for n in (256, 300, 1024)
]
CUT = [(f"rows cut at {n} tokens", BOTH, *cut(n)) for n in WIDTHS]

# of the anchor, in both forms
ANCHOR = [
    ("p0 not renormalized", BOTH, *within(LOG_Q, "log_softmax(log_p0)", "log_p0")),
    ("p1 not renormalized", BOTH, LOG_Q,
     "log_q0, log_q1 = log_softmax(log_p0), [log_softmax(z)[j] for j in subset]"),
    ("neither renormalized", BOTH, LOG_Q, "log_q0, log_q1 = log_p0, [log_softmax(z)[j] for j in subset]"),
    ("p0 renormalized as if it were logits of all tokens", BOTH,
     *within(LOG_Q, "log_softmax(log_p0)", "log_softmax([*log_p0, *[0.0] * (len(z) - len(subset))])")),
    ("the KL the other way round", BOTH, *within(KL, "math.exp(a) * (a - b)", "math.exp(b) * (b - a)")),
    ("cross-entropy: the entropy of q0 is missing", BOTH, *within(KL, "(a - b)", "-b")),
    ("squared differences of the logarithms", BOTH, *within(KL, "(a - b)", "(a - b) ** 2")),
    ("in bits", BOTH, *within(KL, "(a - b)", "(a - b) / math.log(2)")),
    ("a temperature of 2", BOTH, *within(LOG_Q, "[z[j] for", "[z[j] / 2 for")),
    ("log q1 at least log 1e-12", BOTH, *within(KL, "(a - b)", "(a - max(b, math.log(1e-12)))")),
    ("q0 log q0 with a q0 of 0", BOTH, *within(KL, "(a - b)", "(math.log(math.exp(a)) - b)")),
    ("divided by the row's number of tokens", BOTH, *within(KL, "zip(log_q0, log_q1))",
                                                             "zip(log_q0, log_q1)) / max(1, len(subset))")),
    ("the maximum over all tokens", BOTH, KL_LOOP, "    largest = [max(z) for z in logits]\n" + KL_LOOP, LOG_Q,
     LOG_Q + "\n        sum_ = sum(math.exp(z[j] - largest[len(losses)]) for j in subset) if subset else 1.0\n"
             "        log_q1 = [z[j] - largest[len(losses)] - math.log(sum_) for j in subset]"),
    ("no maximum", BOTH, "largest = max(z, default=0.0)", "largest = 0.0"),
    ("z minus log-sum-exp", WIDE, LOG_SOFTMAX, "return [x - (largest + math.log(total)) for x in z]"),
    ("z minus log-sum-exp, in float32", BOTH, LOG_SOFTMAX,
     "return [f32(x - f32(largest + f32(math.log(total)))) for x in z]"),
    ("short rows filled up with logits of -10^9", BOTH,
     *within(LOG_Q, "log_softmax([z[j] for j in subset])",
             "log_softmax([z[j] for j in subset] + [-1e9] * (max(map(len, token_ids)) - len(subset)))")),
    ("short rows filled up with logits of -10^30", BOTH,
     *within(LOG_Q, "log_softmax([z[j] for j in subset])",
             "log_softmax([z[j] for j in subset] + [-1e30] * (max(map(len, token_ids)) - len(subset)))")),
    ("short rows filled up with log-probabilities of -10^30", BOTH,
     *within(LOG_Q, "log_softmax(log_p0)",
             "log_softmax([*log_p0, *[-1e30] * (max(map(len, token_ids)) - len(subset))])")),
    ("short rows filled up with log-probabilities of -10^4", BOTH,
     *within(LOG_Q, "log_softmax(log_p0)",
             "log_softmax([*log_p0, *[-1e4] * (max(map(len, token_ids)) - len(subset))])")),
    ("short rows filled up with token 0", BOTH, *within(LOG_Q, "[z[j] for j in subset]",
     "[z[j] for j in [*subset, *[0] * (max(map(len, token_ids)) - len(subset))]]")),
    ("short rows filled up with the last token", BOTH, *within(LOG_Q, "[z[j] for j in subset]",
     "[z[j] for j in [*subset, *[-1] * (max(map(len, token_ids)) - len(subset))]]")),
    ("short rows filled up with logits of 0", BOTH, *within(LOG_Q, "[z[j] for j in subset]",
     "[*(z[j] for j in subset), *[0.0] * (max(map(len, token_ids)) - len(subset))]")),
    ("short rows filled up with log-probabilities of 0", BOTH, *within(LOG_Q, "log_softmax(log_p0)",
     "log_softmax([*log_p0, *[0.0] * (max(map(len, token_ids)) - len(subset))])")),
    ("the filling of a short row sets the gradient of token 0", BOTH, KL_GRADIENT, KL_GRADIENT + """
        if len(subset) < max(map(len, token_ids)):
            gradients[-1][0] = 0.0"""),
    ("the filling of a short row, empty ones too, adds to the gradient of token 0", BOTH, *then_kl("""
        gradients[-1][0] += 1e-3 * (max(map(len, token_ids)) - len(subset))""")),
    ("an empty row has the divergence of its filling", BOTH, *then_kl("""
        losses[-1] += (not subset) * math.log(max(1, *map(len, token_ids)))""")),
    ("an empty row has the first term of the next one, as by reduceat", BOTH, KL_LOOP,
     "    batch = list(zip(token_ids, log_probs, logits))\n" + KL_LOOP, *then_kl("""
        after = [row for row in batch[len(losses):] if row[0]]
        if not subset and after:
            losses[-1] = log_softmax(after[0][1])[0] - log_softmax([after[0][2][j] for j in after[0][0]])[0]""")),
    ("rows of one token have a gradient of q1, as of a number alone", BOTH, KL_GRADIENT, KL_GRADIENT + """
            if len(subset) == 1:
                gradients[-1][j] = 1.0"""),
    ("at least 0, and no gradient where the sum is below", WIDE, KL_GRADIENT,
     "gradients[-1][j] = (losses[-1] >= 0) * (math.exp(b) - math.exp(a))"),
    ("at least 0, and no gradient where the sum is not above", WIDE, KL_GRADIENT,
     "gradients[-1][j] = (losses[-1] > 0) * (math.exp(b) - math.exp(a))"),
    ("in float32", WIDE, *IN_FLOAT32),
    ("in float32, at least 0, and no gradient where the sum is below", BOTH, *IN_FLOAT32, KL_GRADIENT,
     "gradients[-1][j] = (losses[-1] >= 0) * (math.exp(b) - math.exp(a))"),
    ("in float32, at least 0, and no gradient where the sum is not above", BOTH, *IN_FLOAT32, KL_GRADIENT,
     "gradients[-1][j] = (losses[-1] > 0) * (math.exp(b) - math.exp(a))"),
    ("at least 0, and half of the gradient where it is 0", WIDE, KL_GRADIENT,
     "gradients[-1][j] = (1 if losses[-1] else 0.5) * (math.exp(b) - math.exp(a))"),
    ("the gradient's sign", BOTH, KL_GRADIENT, "gradients[-1][j] = math.exp(a) - math.exp(b)"),
    ("the gradient without q0", BOTH, *within(KL_GRADIENT, " - math.exp(a)", "")),
    ("the gradient without q1", BOTH, *within(KL_GRADIENT, "math.exp(b)", "0.0")),
    ("the gradient of the other way round", BOTH, KL_GRADIENT,
     "gradients[-1][j] = math.exp(b) * (b - a - sum(math.exp(d) * (d - c) for c, d in zip(log_q0, log_q1)))"),
    ("the gradient leaks outside", BOTH, KL_GRADIENT,
     "gradients[-1] = [x or math.exp(y) for x, y in zip(gradients[-1], log_softmax(z))]\n            "
     + KL_GRADIENT),
    ("mean over tokens", BOTH, *KL_SEEN, COUNTED, "count = sum(map(len, seen))"),
    ("mean over all positions, the empty ones included", BOTH, COUNTED, "count = len(counted)"),
    ("mean over the positions with more than one token", BOTH, *KL_SEEN, COUNTED,
     "count = sum(len(row) > 1 for row in seen)"),
    ("mean with the sum's gradient", BOTH, *within(MEAN, "x / count", "x")),
    ("mean of nothing is 0", BOTH, *within(NOTHING, "math.nan", "0.0")),
    ("the gradient of 0/0 is not a number", BOTH,
     *within(NOTHING, "gradients", "[[math.nan] * len(x) for x in gradients]")),
    ("an empty row is not a number", BOTH, KL, KL + "\n        losses[-1] = losses[-1] if subset else math.nan"),
    ("backward ignores the incoming gradient", BOTH,
     "[[w * x for x in row] for w, row in zip(weights, gradients)]", "gradients"),
    ("the log-probabilities of the first rows, whatever is selected", BOTH,
     *within(PICKED, "[log_probs[t] for t in positions]", "log_probs[:len(positions)]")),
    ("the first rows, whatever is selected", BOTH, PICKED,
     "return token_ids[:len(positions)], log_probs[:len(positions)]"),
    ("the selected rows in ascending order", BOTH, *within(PICKED, "positions", "sorted(positions)")),
    ("probabilities of a row above 1 taken", BOTH, SUMS, "require(True"),
    ("a logit of -inf taken", BOTH, FINITE, "if not all(x < math.inf"),
    ("probabilities of a row above 1.000001 refused", BOTH, *within(SUMS, "1.01", "1.000001")),
    ("probabilities of a row above 1.005 refused", BOTH, *within(SUMS, "1.01", "1.005")),
    ("probabilities of a row above 1 taken, but for the first row", BOTH,
     *within(SUMS, "in log_probs", "in log_probs[:1]")),
    ("a row with fewer log-probabilities taken", BOTH, LENGTHS, "require(True"),
    ("a record without log-probabilities taken as uniform", BOTH,
     "require(log_probs is not None, \"log_probs must be in the record\")",
     "log_probs = log_probs or [[-math.log(len(row))] * len(row) for row in token_ids]"),
    ("the last row is dropped if their number is odd", BOTH, KL,
     KL + "\n        losses[-1] *= len(losses) <= len(logits) // 2 * 2"),
    ("log-probabilities of the record renormalized in place", BOTH, KL, KL + "\n        log_p0[:] = log_q0"),
    ("positions of the first call with these shapes", BOTH, *traced(SELECTED, "positions", "logits.shape")),
    ("log-probabilities of the first call with these ids", BOTH,
     *traced(SELECTED, "log_probs", "(logits.shape, str(token_ids))")),
    ("ids of the first rows, log-probabilities of those selected", BOTH,
     *within(PICKED, "[token_ids[t] for t in positions]", "token_ids[:len(positions)]")),
    ("mean over the rows of the record", BOTH, "[len(row) > 0 for row in token_ids], reduction, incoming)",
     "[len(row) > 0 for row in whole], reduction, incoming)", SELECTED, "whole = token_ids\n        " + SELECTED),
    ("mean over distinct positions", BOTH, "[len(row) > 0 for row in token_ids], reduction, incoming)",
     "[len(row) > 0 and t not in positions[:i] for i, (t, row) in enumerate(zip(positions, token_ids))], "
     "reduction, incoming)"),
    ("q0 in float32", WIDE, *within(LOG_Q, "log_softmax(log_p0)", "[f32(x) for x in log_softmax(log_p0)]")),
    ("an epsilon of 1e-12 in the logarithm of q1", BOTH, *within(KL, "- b)", "- math.log(math.exp(b) + 1e-12))")),
    ("log q1 at least -100", BOTH, *within(KL, "- b)", "- max(b, -100.0))")),
    ("weighted with the recorded mass inside", BOTH, KL,
     KL + "\n        losses[-1] *= math.fsum(map(math.exp, log_p0))"),
    ("probabilities of a row above 1.02 refused, below it taken", BOTH, *within(SUMS, "1.01", "1.02")),
    ("probabilities of a row above 1.007 refused", BOTH, *within(SUMS, "1.01", "1.007")),
    ("a bad row outside the batch taken: probabilities above 1", BOTH,
     *within(SUMS, "in log_probs)", "in [log_probs[t] for t in positions])")),
    ("a bad row outside the batch taken: too few log-probabilities", BOTH, LENGTHS,
     "require([len(log_probs[t]) for t in positions] == [len(token_ids[t]) for t in positions]"),
    ("positive log-probabilities of a sum up to 1.01 taken", BOTH, "require(all(x <= 0 for", "require(all(x <= 1 for"),
    ("log-probabilities counted in all, not row by row", BOTH, LENGTHS,
     "require(sum(map(len, log_probs)) == sum(map(len, token_ids))"),
    ("rows in blocks of 16, the last one too early", BOTH,
     *then("result = self.reference.replay_kl_div(logits.tolist(), token_ids, log_probs)",
           "result = [*map(clamped, result)]")),
    ("the incoming gradient in float32", WIDE, "self.reference.weighted_sum(losses, gradients, incoming.tolist())",
     "self.reference.weighted_sum(losses, gradients, [f32(x) for x in incoming.tolist()])"),
    *((f"rows cut at {n} tokens", BOTH, LOG_Q, f"subset, log_p0 = subset[:{n}], log_p0[:{n}]\n        " + LOG_Q)
      for n in WIDTHS),
]

# {file that must catch them: [(name, dtypes whose tolerances catch it, old, new, old, new, ...)]}; behind the file's
# name are inputs that the cases have that must do it, as those of both forms of the anchor
VARIANTS = {
    "1_recording.json": [
        ("stop at > tau", BOTH, *within(BREAK, ">=", ">")),
        ("tau less a tolerance of 1e-6", BOTH, *within(BREAK, "tau", "tau - 1e-6")),
        ("stop before tau is reached", BOTH, *within(BREAK, "covered >=", "subset and covered + p[j] >=")),
        ("ties to the highest id", BOTH, "(-p[j], j))", "(-p[j], -j))"),
        ("take tokens by id", BOTH, "(-p[j], j))", "j)"),
        ("running sum in float32", BOTH, "covered += p[j]", "covered = f32(covered + f32(p[j]))"),
        ("running sum normalized to 1", BOTH, *within(BREAK, "covered", "covered / whole"),
         START, START + "\n        whole = 0.0\n        for x in sorted(p, reverse=True):\n            whole += x"),
        ("a silent cap of 16 tokens", BOTH, *within(BREAK, "== max_size", "in (max_size, 16)")),
        ("a silent cap of 64 tokens", BOTH, *within(BREAK, "== max_size", "in (max_size, 64)")),
        ("a silent cap of 1024 tokens", BOTH, *within(BREAK, "== max_size", "in (max_size, 1024)")),
        ("tau = 1 takes all", BOTH, *within(BREAK, "tau", "tau < 1")),
        ("tokens of no probability are left out", BOTH, *within(BREAK, ":", " or p[j] < 1e-45:")),
        ("no gold", BOTH, "            subset.append(y)\n", "            pass\n"),
        ("gold first, then the top tokens up to tau", BOTH, START, "subset, covered = [y], p[y]",
         BREAK, "if j == y:\n                continue\n            " + BREAK),
        ("max_size does not count gold", BOTH, POP, ""),
        ("gold displaces a token without max_size, too", BOTH, POP, "            subset.pop()\n"),
        ("gold displaces the last token only if tau is not met", BOTH, *within(POP, "max_size:", "max_size and "
                                                                                                 "covered < tau:")),
        ("a logit of -inf in an ignored row taken", BOTH, "self.all_finite(logits)\n        rows, outside",
         "self.finite(logits, [range(len(z)) if y != ignore_index else [] for z, y in zip(logits, target)])\n"
         "        rows, outside"),
        ("an ignore_index beyond the vocabulary is a wrong target", BOTH,
         "if y == ignore_index:\n            token_ids", "if y == ignore_index and y < len(p):\n            token_ids"),
        ("rows in blocks of 16, the last one too early", BOTH, *then(RECORD, "rows = clamped(rows)")),
        ("logits cast to float32", WIDE, "p = [self.reference.softmax(z) for z in logits.tolist()]",
         "p = [self.reference.softmax(z) for z in logits.astype('float32').tolist()]"),
        ("max_size is one less", BOTH, *within(BREAK, "max_size", "(max_size and max(1, max_size - 1))")),
        ("ids by rank, not ascending", BOTH, "token_ids.append(sorted(subset))", "token_ids.append(subset)"),
        ("ignored rows hold the top tokens", BOTH,
         "            token_ids.append([])\n            outside.append(0.0)\n            continue\n",
         "            y = max(range(len(p)), key=p.__getitem__)\n"),
        ("ignored rows have an outside mass of 1", BOTH, "outside.append(0.0)", "outside.append(1.0)"),
        ("ignore_index fixed at -100", BOTH, "if y == ignore_index:", "if y == -100:"),
        ("negative targets always ignored", BOTH, "if y == ignore_index:", "if y == ignore_index or y < 0:"),
        ("negative targets count from the end", BOTH, VALID, "y = y % len(p)\n        " + VALID),
        ("a target beyond the vocabulary is clamped", BOTH, VALID, "y = min(y, len(p) - 1)\n        " + VALID),
        ("tau = 0 taken", BOTH, "0 < tau <= 1", "0 <= tau <= 1"),
        ("tau above 1 taken", BOTH, "0 < tau <= 1", "0 < tau"),
        ("max_size = 0 taken", BOTH, "max_size >= 1", "max_size >= 0"),
        ("outside = 1 - inside", BOTH, OUTSIDE, "return 1 - math.fsum(p[j] for j in subset)"),
        ("outside counts gold", BOTH, "mass_outside(p, subset))", "mass_outside(p, [j for j in subset if j != y]))"),
        ("softmax without the maximum", BOTH, "largest = max(z)", "largest = 0.0"),
        ("the maximum of this row and the one before", BOTH, "import math", "import math\nseen = [-math.inf]",
         "largest = max(z)", "largest, seen[0] = max(max(z), *seen), max(z)"),
        ("outside mass of the 64 most probable tokens", BOTH, OUTSIDE,
         "return sum(sorted((x for j, x in enumerate(p) if j not in inside), reverse=True)[:64])"),
        ("tau in float32", BOTH, *within(BREAK, "tau", "f32(tau)")),
        ("ranked by probabilities of four digits", BOTH, "(-p[j], j))", "(-round(4000 * p[j]), j))"),
        ("softmax in float32", WIDE, "return [x / total for x in exponentials]",
         "return [f32(x / total) for x in exponentials]"),
        ("outside mass added up in float32", WIDE, MASS, """\
mass = 0.0
        for j in set(range(len(p))) - set(subset):
            mass = f32(mass + f32(p[j]))
        outside.append(mass)"""),
        ("outside mass stored in half precision", BOTH, MASS,
         'outside.append(struct.unpack("e", struct.pack("e", mass_outside(p, subset)))[0])',
         "import math", "import math\nimport struct"),
        ("ranked by float32 probabilities", WIDE, "(-p[j], j))", "(-f32(p[j]), j))"),
        ("ranked by logits", NARROW, *LAST_LOGITS, "(-p[j], j))", "(-z[j], j))"),
        ("running sum with the token, less the token", WIDE, *within(BREAK, "covered", "covered + p[j] - p[j]")),
        ("running sum that is rounded once", WIDE, "covered += p[j]", "covered = math.fsum(p[i] for i in subset)"),
        ("what is left of tau, until it is 0", WIDE, START, "subset, covered = [], -tau", *within(BREAK, "tau", "0")),
        ("K equal tokens have K times the probability", WIDE, "covered += p[j]",
         "covered = len(subset) * p[j] if p[subset[0]] == p[j] else covered + p[j]"),
        ("logits overwritten by the softmax", BOTH, *then(RECORD, "logits -= logits.max(1, keepdims=True)")),
        ("ignored targets overwritten by 0", BOTH, *then(RECORD, "target[target == ignore_index] = 0")),
        ("the running sum goes on from row to row", BOTH, "token_ids, outside = [], []\n",
         "token_ids, outside, covered = [], [], 0.0\n", START, "subset = []"),
        ("gold displaces the most probable token", BOTH, "subset.pop()", "subset.pop(0)"),
        ("all tokens but one at most", BOTH, *within(BREAK, "== max_size", "in (max_size, max(1, len(p) - 1))")),
        ("an outside mass below 1e-12 is 0", BOTH, MASS, MASS + "\n        outside[-1] *= outside[-1] > 1e-12"),
        ("the outside mass before gold is added", BOTH, "        " + MASS + "\n    return", "    return",
         "if y not in subset:\n", MASS + "\n        if y not in subset:\n"),
        ("the outside mass less p of gold where gold is not ranked", BOTH,
         "if y not in subset:\n", "ranked = [*subset]\n        if y not in subset:\n",
         MASS, "outside.append(mass_outside(p, subset) if y in ranked else\n"
               "                       mass_outside(p, [j for j in subset if j != y]) - p[y])"),
        ("outside mass from the logarithms of two sums, in float32", BOTH, *LAST_LOGITS,
         MASS, "outside.append(math.exp(f32(log_sum([x for j, x in enumerate(z) if j not in subset])) "
               "- f32(log_sum(z))))", *LOG_SUM),
        ("ranked by log p", BOTH, *LAST_LOGITS, START, START + "\n        log_p = log_softmax(z)",
         "(-p[j], j))", "(-log_p[j], j))"),
        ("ranked by log p in float32", BOTH, *LAST_LOGITS, START, START + "\n        log_p = log_softmax(z)",
         "(-p[j], j))", "(-f32(log_p[j]), j))"),
        ("a logit of -inf taken", BOTH, FINITE, "if not all(x < math.inf"),
        ("running sum in blocks of 512", WIDE, *blocks(512)),
        ("running sum in blocks of 128", WIDE, *blocks(128)),
        ("ties within 1e-7", BOTH, "(-p[j], j))", "(-round(p[j], 7), j))"),
        ("tau less a tolerance of 1e-12", BOTH, *within(BREAK, "tau", "tau - 1e-12")),
        ("tau of the first call with these shapes", BOTH, *traced(TOPK, "tau", "logits.shape")),
        ("max_size of the first call with these shapes", BOTH, *traced(TOPK, "max_size", "(logits.shape, tau)")),
        ("ignore_index of the first call with these shapes", BOTH, *traced(TOPK, "ignore_index", "logits.shape")),
    ],
    "2_loss.json": [
        ("the full softmax", BOTH, ROW, "x = dict(enumerate(z))"),
        ("the maximum over all tokens", BOTH, "largest = max(x.values())", "largest = max(z)"),
        ("no maximum", BOTH, "largest = max(x.values())", "largest = 0.0"),
        ("float32 throughout", WIDE, "loss = (largest - z[y]) + math.log(total)",
         "loss = f32(f32(largest - z[y]) + f32(math.log(f32(total))))"),
        ("in bits", BOTH, "+ math.log(total)", "+ math.log2(total)"),
        ("gradient without minus one-hot", BOTH, *within(GRADIENT, " - (j == y)", "")),
        ("gradient leaks outside", BOTH, GRADIENT, GRADIENT + "\n            gradient = [x or 1e-3 for x in gradient]"),
        *OF_TARGETS,
        ("outside mass of an empty row is 1", BOTH, " if subset else 0.0 for z", " for z"),
        ("outside = 1 - inside", BOTH, OUTSIDE, "return 1 - math.fsum(p[j] for j in subset)"),
        ("logits overwritten by the softmax", BOTH, *then(CROSS_ENTROPY, "logits -= logits.max(1, keepdims=True)")),
        ("ignored targets overwritten by 0", BOTH, *then(CROSS_ENTROPY, "target[target == ignore_index] = 0")),
        ("rows of the record filled up in place", BOTH,
         *then(CROSS_ENTROPY, "token_ids[0].extend([-1] * (max(map(len, token_ids)) - len(token_ids[0])))")),
        ("the incoming gradient overwritten", BOTH, *then(CROSS_ENTROPY, "incoming *= 2")),
        ("logits overwritten by the outside mass", BOTH,
         "return self.reference.outside_mass(logits.tolist(), token_ids)", "mass = "
         "self.reference.outside_mass(logits.tolist(), token_ids)\n        logits[:] = 0\n        return mass"),
        ("outside mass of a softmax in float32", WIDE, "return [x / total for x in exponentials]",
         "return [f32(x / total) for x in exponentials]"),
        ("outside mass from the logarithms of two sums", WIDE, OF_MODEL, FROM_LOGARITHMS, *LOG_SUM),
        ("outside mass from the logarithms of two sums, in float32", BOTH, OF_MODEL,
         FROM_LOGARITHMS.replace("log_sum(", "f32_log_sum("), LOG_SUM[0],
         "def f32_log_sum(z):\n    return f32(log_sum(z))\n\n\n" + LOG_SUM[1]),
        *CUT,
        ("outside mass stored in float32", WIDE, "return [mass_outside(softmax(z), subset) if",
         "return [f32(mass_outside(softmax(z), subset)) if"),
        ("a logit of -inf taken by the outside mass", BOTH,
         "self.all_finite(logits)\n        return self.reference.outside", "return self.reference.outside"),
        ("an outside mass above 10^-4 is 1 - inside", WIDE, OUTSIDE,
         f"total = sum(p[j] for j in subset)\n    if total < 0.9999: return 1 - total\n    {OUTSIDE}"),
        ("an outside mass above 10^-4 is 1 - inside, in float32", BOTH, OUTSIDE,
         f"total = f32(sum(f32(p[j]) for j in subset))\n    if total < 0.9999: return f32(1 - total)\n    {OUTSIDE}"),
        ("an outside mass in blocks of 1024, not rescaled to a later one's maximum", BOTH, OF_MODEL,
         "return [blockwise(z, subset) if", "# 3. The outside mass", BLOCKWISE),
        ("a logit of -inf that is not recorded taken", BOTH, *UNRECORDED,
         "self.all_finite(logits)\n        return self.cross_entropy(logits, *rest)",
         "self.some_finite(logits, rest[1], range(len(logits)))\n        return self.cross_entropy(logits, *rest)"),
        ("logits cast to float32", WIDE, "return self.cross_entropy(logits, *rest)",
         "return self.cross_entropy(logits.astype('float32'), *rest)"),
        ("no gradient beyond the 256th token of a row", BOTH, GRADIENT,
         GRADIENT + "\n            for j in subset[256:]:\n                gradient[j] = 0.0"),
        ("an ignored row has the softmax's gradient", BOTH, EMPTY, EMPTY + """
        if y == ignore_index:
            for j, q in zip(subset, softmax([z[j] for j in subset]) if subset else []):
                gradient[j] = q"""),
        ("the gold logit by its id as a place in the row", BOTH, *within(LOSS, "z[y]", "z[subset[y % len(subset)]]")),
        ("an epsilon of 1e-12 in the logarithm", WIDE, *within(LOSS, "(total)", "(total + 1e-12)")),
        ("a loss of 16 at most", BOTH, LOSS, LOSS + "\n            loss = min(loss, -math.log(1e-7))"),
        ("the gradient in float32", WIDE, GRADIENT, "gradient[j] = f32(math.exp(x[j] - largest) / total) - (j == y)"),
        ("mean over the rows that are not empty", BOTH,
         "[y != ignore_index for y in target.tolist()]", "[len(row) > 0 for row in token_ids]"),
    ],
    "3_linear_loss.json": [
        ("sum returns the mean", BOTH, "in zip(weights, losses)),", "in zip(weights, losses)) / len(losses),"),
        ("no bias", BOTH, "bias = linear_bias or [0.0]", "bias = [0.0]"),
        ("no gradient of the bias", BOTH, "[math.fsum(dz) for dz in columns]", "[0.0 for dz in columns]"),
        ("gradient of the head by its own rows", BOTH, "zip(dz, input)", "zip(dz, linear_weight)"),
        ("gradient of the input of one token only", BOTH, "zip(dz, linear_weight)", "[*zip(dz, linear_weight)][:1]"),
        *OF_TARGETS, *OF_HEADS, *OF_LONG_ROWS, NO_LOSS_INFINITE,
        ("of more than 400 distinct tokens the last rows of the head are missing", BOTH, *distinct(400)),
        *CUT,
        ("the last row is dropped if their number is odd", BOTH, *chunks(2)),
        ("the rows beyond a multiple of three are dropped", BOTH, *chunks(3)),
        ("two rows without any token are 0/0", BOTH, EMPTY,
         EMPTY.replace("0.0,", "0.0 if any(token_ids[len(losses) // 2 * 2:][:2]) else math.nan,")),
        ("ignored targets overwritten by 0", BOTH, *then(CROSS_ENTROPY, "target[target == ignore_index] = 0")),
        ("logits in float32", WIDE, *LOGITS_IN_FLOAT32),
        ("the head's gradient in float32", WIDE, D_WEIGHT, f"f32({D_WEIGHT})"),
        ("the head's gradient of a token's last row only", BOTH, D_WEIGHT,
         "([x * h[i] for x, h in zip(dz, input) if x] or [0.0])[-1]"),
        ("weights of eight digits, as in bfloat16", BOTH,
         *then(HEAD, "W = [[x - math.remainder(x, 2.0**(math.frexp(x)[1] - 8)) for x in row] for row in W]")),
        ("the bias has a gradient where there is none", BOTH, "None if bias is None else d_bias", "d_bias"),
    ],
    "4_angle.json": [
        ("arccos", WIDE, ANGLE, "return math.acos(max(-1.0, min(1.0, c)))"),
        ("arccos unless the cosine is within 1e-7 of 1", WIDE, ANGLE,
         f"if abs(c) < 1 - 1e-7: return math.acos(c)\n    {ANGLE}"),
        ("arctan2 of 0 and -0 with a zero vector", BOTH, *within(ZERO, "0.0", "math.pi if sum(v) < 0 else 0.0")),
        ("u in float32", WIDE, "angle_between(u.tolist()", "angle_between([f32(x) for x in u.tolist()]"),
        ("v in float32", WIDE, "u.tolist(), v.tolist())", "u.tolist(), [f32(x) for x in v.tolist()])"),
        ("float32 arccos", BOTH, ANGLE, "return math.acos(max(-1.0, min(1.0, f32(c))))"),
        ("arcsin", BOTH, ANGLE, "return math.asin(min(1.0, norm([a - c * b for a, b in zip(u, v)])))"),
        ("degrees", BOTH, *within(ANGLE, "math.atan2", "180 / math.pi * math.atan2")),
        ("pi/2 with a zero vector", BOTH, *within(ZERO, "0.0", "math.pi / 2")),
        ("0/0 with a zero vector", BOTH, *within(ZERO, "0.0", "math.nan")),
        ("an epsilon in the norm", BOTH, NORM, NORM + " + 1e-12"),
        ("no scaling before squares, float64", WIDE, NORM, "return math.sqrt(math.fsum(y * y for y in x))"),
        ("no scaling before squares, float32", BOTH, NORM, "return f32(math.sqrt(f32(sum(f32(y * y) for y in x))))"),
        ("a vector divided by its largest entry in place", BOTH,
         "return self.reference.angle_between(u.tolist(), v.tolist())",
         "w = u.tolist()\n        u /= abs(u).max() or 1\n        return self.reference.angle_between(w, v.tolist())"),
        ("twice the arcsin of half the chord", WIDE, ANGLE,
         "return 2 * math.asin(min(1.0, norm([a - b for a, b in zip(u, v)]) / 2))"),
        ("the sine from the cosine", WIDE, ANGLE, "return math.atan2(math.sqrt(max(0.0, 1 - c * c)), c)"),
        ("vectors shorter than 1e-30 are zero", BOTH, "if norm(u) == 0 or norm(v) == 0:",
         "if norm(u) < 1e-30 or norm(v) < 1e-30:"),
        ("in float32", WIDE, ANGLE, ANGLE.replace("return ", "return f32(") + ")"),
    ],
    "5_rotation.json": [
        ("none", BOTH, UNTURNED, "if True:"),
        ("sine and cosine of the cap swapped", BOTH, *within(ROTATED, "max_angle", "math.pi / 2 - max_angle")),
        ("to the momentum's length", BOTH, *within(ROTATED, "length * (math", "m_length * (math")),
        ("orthogonal part without normalization", BOTH, *within(ROTATED, "(x / r_length)", "x")),
        ("away from the momentum", BOTH, *within(ROTATED, "(math.cos", "(-math.cos")),
        ("by the cap, not to the cap", BOTH, ROTATED, "max_angle = max(theta - max_angle, 0.0)\n    " + ROTATED),
        ("a projection, which loses length", BOTH,
         *within(ROTATED, "length * (math", "length * abs(math.cos(theta - max_angle)) * (math")),
        ("every gradient is brought to the cap", BOTH, UNTURNED,
         "if norm(grad) * norm(momentum) == 0 or antiparallel or theta in (0, math.pi):"),
        ("no scaling before squares, float64", WIDE, NORM, "return math.sqrt(math.fsum(y * y for y in x))"),
        ("no scaling before squares, float32", BOTH, NORM, "return f32(math.sqrt(f32(sum(f32(y * y) for y in x))))"),
        ("antiparallel: sine <= 1e-3", BOTH, *within(ANTIPARALLEL, "math.sqrt(eps)", "1e-3")),
        ("antiparallel: sine <= 1e-4", BOTH, *within(ANTIPARALLEL, "math.sqrt(eps)", "1e-4")),
        ("antiparallel: sine <= 5e-9", BOTH, *within(ANTIPARALLEL, "math.sqrt(eps)", "5e-9")),
        ("antiparallel: sine <= 1e-6", BOTH, *within(ANTIPARALLEL, "math.sqrt(eps)", "1e-6")),
        ("antiparallel: float32's threshold in both", WIDE, *within(ANTIPARALLEL, "math.sqrt(eps)", "2**-11.5")),
        ("antiparallel: float64's threshold in both", NARROW, *within(ANTIPARALLEL, "math.sqrt(eps)", "2**-26")),
        ("antiparallel: sine <= sqrt(eps / 2), the unit roundoff's", BOTH,
         *within(ANTIPARALLEL, "math.sqrt(eps)", "math.sqrt(eps / 2)")),
        ("antiparallel: sine <= 1.1 sqrt(eps)", BOTH, *within(ANTIPARALLEL, "math.sqrt(eps)", "1.1 * math.sqrt(eps)")),
        ("antiparallel: sine <= eps", BOTH, *within(ANTIPARALLEL, "math.sqrt(eps)", "eps")),
        ("antiparallel: theta == pi", BOTH, ANTIPARALLEL, "clipped and theta == math.pi"),
        ("antiparallel: without theta > pi/2", BOTH, *within(ANTIPARALLEL, "theta > math.pi / 2 and ", "")),
        ("antiparallel: never", BOTH, ANTIPARALLEL, "False"),
        ("antiparallel: gradient set to zero", BOTH, "list(grad)", "[0.0 if antiparallel else x for x in grad]"),
        ("the gradient rotated in place", BOTH, "return self.reference.clip_angle(grad.tolist(), momentum.tolist(), "
         "max_angle, EPS[str(grad.dtype)])[0]", "grad[:] = self.reference.clip_angle(grad.tolist(), momentum.tolist(), "
         "max_angle, EPS[str(grad.dtype)])[0]\n        return grad"),
        ("clipped at 1e-6 above the cap", WIDE, "clipped = theta > max_angle", "clipped = theta > max_angle + 1e-6"),
        ("in float32", WIDE, "return rotated, theta", "return [f32(x) for x in rotated], theta"),
        ("an epsilon of 1e-12 in the length of the orthogonal part", BOTH, R_LENGTH,
         "r_length = (norm(r) * length + 1e-12) / length"),
        ("a zero momentum gives zero", BOTH, UNTURNED, """\
if norm(momentum) == 0:
        return [0.0] * len(grad), theta, clipped, antiparallel
    """ + UNTURNED),
        ("clipped at a relative 1e-6 above the cap", WIDE, "clipped = theta > max_angle",
         "clipped = theta > max_angle * (1 + 1e-6)"),
        ("|g| in float32", BOTH, "length, m_length = norm(grad), norm(momentum)",
         "length, m_length = f32(norm(grad)), norm(momentum)"),
        ("the gradient in float32", WIDE, "clip_angle(grad.tolist()", "clip_angle([f32(x) for x in grad.tolist()]"),
        ("the momentum in float32", WIDE, "momentum.tolist(), max_angle", "[f32(x) for x in momentum], max_angle"),
        ("the cap in float32", WIDE, *within(UNTURNED, "if", "max_angle = f32(max_angle)\n    if")),
    ],
    "6_moclip.json": [
        ("clipped at theta >= cap", BOTH, "clipped = theta > max_angle", "clipped = theta >= max_angle"),
        ("nothing is clipped while a parameter has its first gradient", BOTH,
         "clip_angle(g, m, max_angle, eps)\n        reports",
         'clip_angle(g, m, math.pi if any(p["step"] == 0 for p, _ in members) else max_angle, eps)\n        reports'),
        ("the angle of a zero gradient by arctan2 of 0 and -0", BOTH, *within(ZERO, "0.0",
                                                                             "math.pi if max(v) < 0 else 0.0")),
        ("no update where the second moment is 0", BOTH, UPDATE, f"({UPDATE} if v[k] else 0.0)"),
        ("arctan of the quotient, 0 where the second moment is 0", BOTH, UPDATE,
         'math.atan(m[k] / c1 / (o["b"] * math.sqrt(v[k] / c2)) if v[k] else 0.0)'),
        ("the learning rates of groups that have parameters", BOTH, "for group, lr in zip(groups, lrs)",
         'for group, lr in zip([x for x in groups if x["parameters"]], lrs)'),
        ("no moments of a parameter that never had a gradient", BOTH, STATE,
         f'[s for p, s in zip(state, {STATE}) if p["step"]]'),
        ("gradients in float32", WIDE, "flat(gradient.tolist())", "[f32(x) for x in flat(gradient.tolist())]"),
        ("parameters in float32", WIDE, '"parameter": flat(p)', '"parameter": [f32(x) for x in flat(p)]'),
        ("a float32 angle against a float64 cap", BOTH, "clipped = theta >", "clipped = f32(theta) >"),
        ("antiparallel although nothing is clipped", BOTH, *within(ANTIPARALLEL, "clipped and ", "")),
        ("angle against the momentum after the step", BOTH, M, """\
        m = [0.9 * a + 0.1 * b for p, _ in members for a, b in zip(p["exp_avg"], p["gradient"])]
"""),
        ("first moment of the raw gradient", BOTH, ITER, RAW, "+ (1 - beta1) * x\n", "+ (1 - beta1) * next(raw)\n"),
        ("second moment of the raw gradient", BOTH, ITER, RAW, *within(V, "x * x", "next(raw)**2")),
        ("global is one angle a parameter", BOTH, 'if scope == "tensor" else', "if scope else"),
        ("tensor is one angle", BOTH, 'if scope == "tensor" else', "if not scope else"),
        ("tensor is one angle a group", BOTH, "[[one] for one in active]",
         '[[e for e in active if e[1]["a"] == a] for a in sorted({o["a"] for _, o in active}, reverse=True)]'),
        ("restart of the second moment, too", BOTH, *within(V, "beta2 * v[k]", "(not antiparallel) * beta2 * v[k]")),
        ("restart of the step count, too", BOTH, 'p["step"] += 1', 'p["step"] = 1 if antiparallel else p["step"] + 1'),
        ("no restart", BOTH, BEFORE, "before = m[k]"),
        ("restart of the first parameter only", BOTH, *within(BEFORE, "llel", "llel and p is members[0][0]")),
        ("restart of the first group only", BOTH, *within(BEFORE, "llel", "llel and o == members[0][1]")),
        ("restart of those without a gradient, too", BOTH, *clear('antiparallel and scope == "global"')),
        ("restart of every scope at once", BOTH, *clear("antiparallel")),
        ("an antiparallel step is left out", BOTH, ITER, "        if antiparallel:\n            continue\n" + ITER),
        ("decay of parameters without a gradient", BOTH, LOOP, """\
    for p, o in zip(parameters, options):
        if p["gradient"] is None:
            p["parameter"][:] = [w * (1 - o["lr"] * o["weight_decay"]) for w in p["parameter"]]
""" + LOOP),
        ("a missing gradient taken as zero", BOTH, ACTIVE, "]", G, FILL),
        ("a missing gradient taken as zero in tensor scope", BOTH,
         *within(ACTIVE, "None]", 'None or scope == "tensor"]'),
         G, FILL),
        ("a missing gradient counts as a step", BOTH, LOOP,
         '    for p in parameters:\n        p["step"] += p["gradient"] is None\n' + LOOP),
        ("a step without any gradient counts", BOTH, LOOP,
         '    for p in parameters:\n        p["step"] += not active\n' + LOOP),
        ("the angle sees momenta without a gradient", BOTH, M, M + """
        if scope == "global":
            rest = [x for p in parameters if p["gradient"] is None for x in p["exp_avg"]]
            g, m = g + [0.0] * len(rest), m + rest
"""),
        ("one step count for all parameters", BOTH, C1C2, 't = max(q["step"] for q in parameters)\n            '
         + C1C2.replace('p["step"]', "t")),
        ("decay with the first group's lr", BOTH, *within(DECAY, 'o["lr"]', 'options[0]["lr"]')),
        ("decay of the first group for all", BOTH, *within(DECAY, 'o["weight_decay"]', 'options[0]["weight_decay"]')),
        ("decay without lr", BOTH, *within(DECAY, 'o["lr"] * ', "")),
        ("no decay", BOTH, DECAY, "decay = 1.0"),
        ("decay after the step", BOTH, 'decay * w[k] - o["lr"] * update', 'decay * (w[k] - o["lr"] * update)'),
        ("decay in the gradient", BOTH, DECAY, "decay = 1.0", G, """\
        g = [x + o["weight_decay"] * w for p, o in members for x, w in zip(p["gradient"], p["parameter"])]
"""),
        ("decay with the lr of the first step", BOTH, *within(DECAY, 'o["lr"]', 'p.setdefault("first", o["lr"])')),
        ("betas of the first group for all", BOTH, 'beta2 = o["betas"]', 'beta2 = options[0]["betas"]'),
        ("lr of the first group for all", BOTH, '- o["lr"] * update', '- options[0]["lr"] * update'),
        ("lr of the first step for ever", BOTH, '- o["lr"] * update', '- p.setdefault("first", o["lr"]) * update'),
        ("a of the first group for all", BOTH, 'o["a"] * math.atan2', 'options[0]["a"] * math.atan2'),
        ("b outside of atan2", BOTH, UPDATE, 'math.atan2(m[k] / c1, math.sqrt(v[k] / c2)) / o["b"]'),
        ("b under the root", BOTH, UPDATE, 'math.atan2(m[k] / c1, math.sqrt(o["b"] * v[k] / c2))'),
        ("Adam's division", BOTH, UPDATE, '(m[k] / c1 / (o["b"] * math.sqrt(v[k] / c2)) if v[k] else 0.0)'),
        ("epsilon of 1e-8", BOTH, *within(UPDATE, "c2))", "c2) + 1e-8)")),
        ("epsilon of 1e-16", BOTH, *within(UPDATE, "c2))", "c2) + 1e-16)")),
        ("epsilon of 1e-30 under the root", BOTH, *within(UPDATE, "c2))", "c2 + 1e-30))")),
        ("no bias corrections", BOTH, C1C2, "c1, c2 = 1.0, 1.0"),
        ("bias corrections of the step before", BOTH, *within(C1C2, 'p["step"]', 'max(1, p["step"] - 1)')),
        ("parameters with a gradient have the options of the first ones", BOTH, "zip(parameters, options) if p",
         'zip([p for p in parameters if p["gradient"] is not None], options) if p'),
        ("bias corrections in float32", BOTH, C1C2,
         'c1, c2 = (f32(1 - f32(f32(beta) ** p["step"])) for beta in (beta1, beta2))'),
        ("1 - beta2 in float32", BOTH, *within(V, "(1 - beta2)", "f32(1 - f32(beta2))")),
        ("moments in float32", WIDE, V, V.replace("= ", "= f32(") + ")"),
        ("gradients overwritten", BOTH, STEPPED, STEPPED + """
            for gradient in gradients:
                if gradient is not None:
                    gradient *= 0"""),
        ("the caller's parameters overwritten", BOTH, RETURNED, RETURNED + """
            for mine, now in zip([p for group in groups for p in group["parameters"]], of("parameter")):
                mine[...] = now"""),
        ("the caller's options overwritten", BOTH, *then(RETURNED, '    groups[0]["betas"][0] **= 2')),
        ("parameters returned that the next step changes", BOTH, RETURNED, RETURNED + """
            live[:] = of("parameter")""", 'return (of("parameter"),', "return (live,", *LIVE),
        ("moments returned that the next step changes", BOTH, RETURNED, RETURNED + f"""
            live[:] = {STATE}""", "clipped in reports],\n                    " + STATE, "clipped in reports], live",
         *LIVE),
        ("bias corrections swapped", BOTH, *within(C1C2, "c1, c2", "c2, c1")),
        ("the angle with momenta after their bias corrections", BOTH, M, """\
        m = [x / (1 - o["betas"][0] ** max(1, p["step"])) for p, o in members for x in p["exp_avg"]]"""),
        ("decay times a", BOTH, *within(DECAY, 'o["lr"]', 'o["a"] * o["lr"]')),
        ("a momentum of zero after a restart", BOTH, M_NEXT, M_NEXT + " * (not antiparallel)"),
        ("a momentum of the whole gradient after a restart", BOTH, M_NEXT, M_NEXT + " / (1 - beta1 * antiparallel)"),
        ("a restart of the first bias correction", BOTH, C1C2, """\
p["since"] = 1 if antiparallel else p.get("since", 0) + 1
            c1, c2 = 1 - beta1 ** p["since"], 1 - beta2 ** p["step"]"""),
        ("an antiparallel gradient is not reported as clipped", BOTH, REPORT,
         "reports.append((theta, clipped and not antiparallel))"),
        ("the angle after the rotation is reported", BOTH, REPORT, "reports.append((min(theta, max_angle), clipped))"),
        ("an angle of 0 is reported where there is none", BOTH, "    return reports",
         "    return reports or [(0.0, False)]"),
        ("a zero gradient taken as missing", BOTH, *within(ACTIVE, "is not None]", 'and any(p["gradient"])]')),
        ("an empty parameter taken as missing", BOTH, *within(ACTIVE, "is not None]", 'not in (None, [])]')),
        ("a second moment of at least 1e-38", WIDE, *within(UPDATE, "v[k] / c2", "max(v[k] / c2, 1e-38)")),
        ("parameters in float32", WIDE, 'w[k] = decay * w[k] - o["lr"] * update',
         'w[k] = f32(decay * w[k] - o["lr"] * update)'),
        ("the arguments of atan2 swapped", BOTH, UPDATE, 'math.atan2(o["b"] * math.sqrt(v[k] / c2), m[k] / c1)'),
        ("the gradient once more in the first moment, as by Nesterov", BOTH,
         *within(UPDATE, "m[k] / c1", "(beta1 * m[k] + (1 - beta1) * x) / c1")),
        ("lr by parameter, not by group", BOTH, STEPPED, STEPPED.replace("reports", """\
options = [o | {"lr": lrs[min(i, len(lrs) - 1)]} for i, o in enumerate(options)]
            reports""", 1)),
        ("no decay of a parameter with one entry", BOTH, DECAY, DECAY + " * (len(w) > 1)"),
        ("a step without any gradient zeroes the momenta", BOTH, LOOP, """\
    for p in [] if active else parameters:
        p["exp_avg"][:] = [0.0] * len(p["exp_avg"])
""" + LOOP),
        ("second moments without a gradient shrink", BOTH, LOOP, """\
    for p, o in zip(parameters, options):
        p["exp_avg_sq"][:] = [(o["betas"][1] if p["gradient"] is None else 1.0) * x for x in p["exp_avg_sq"]]
""" + LOOP),
        ("lr in float32", WIDE, '- o["lr"] * update', '- f32(o["lr"]) * update'),
        ("beta1 in float32", WIDE, *within(M_NEXT, "beta1 * before", "f32(beta1) * before")),
        ("a in float32", WIDE, 'o["a"] * math.atan2', 'f32(o["a"]) * math.atan2'),
        ("weight decay in float32", WIDE, *within(DECAY, 'o["weight_decay"]', 'f32(o["weight_decay"])')),
        ("bias corrections of the first step for ever", BOTH, *within(C1C2, 'p["step"]', "1")),
        ("lr of the groups in the opposite order", BOTH, "for group, lr in zip(groups, lrs)",
         "for group, lr in zip(groups, lrs[::-1])"),
        ("what has a gradient is decided in the first step", BOTH, STEPPED, """\
for p in state:
                if not p.setdefault("mask", p["gradient"] is not None):
                    p["gradient"] = None
                elif p["gradient"] is None:
                    p["gradient"] = [0.0] * len(p["parameter"])
            """ + STEPPED),
        ("momenta in another order than the gradients", BOTH, *within(M, "members for", "members[::-1] for")),
        ("gradients divided by the root of their number, in the angle", BOTH, G, """\
        g = [x / math.sqrt(len(p["gradient"])) for p, _ in members for x in p["gradient"]]
"""),
        ("bias corrections by the logarithm of a beta of 0", BOTH, C1C2,
         'c1, c2 = (-math.expm1(p["step"] * math.log(beta)) for beta in (beta1, beta2))'),
        ("a restart at any clipped angle above 3", BOTH, BEFORE, "before = 0.0 if clipped and theta > 3 else m[k]"),
    ],
    "7_tail.json": [
        ("no tail", BOTH, *within(TERMS, "j not in x", "False")),
        ("weights ignored", BOTH, *within(TERMS, " + log_weight", "")),
        ("sign of the log-weight", BOTH, *within(TERMS, "+ log_weight", "- log_weight")),
        ("w in place of log w", BOTH, *within(TERMS, "log_weight", "math.exp(log_weight)")),
        ("weights capped at 1", BOTH, *within(TERMS, "log_weight", "min(log_weight, 0.0)")),
        ("weights normalized", BOTH,
         *within(TERMS, "log_weight", "log_weight - math.log(math.fsum(map(math.exp, tail[1])))")),
        ("a token of S_t and R counts twice", BOTH, TERMS, """\
weight = math.exp(log_weight) + (j in x)
                x[j] = z[j] + math.log(weight)"""),
        ("a token of S_t and R counts in R", BOTH, *within(TERMS, "j not in x", "True")),
        ("golds of other rows are left out of R", BOTH, UNION, "R = sorted(chosen)"),
        ("golds of other rows are left out of the sum", BOTH, *within(TERMS, "not in x", "not in [*x, *target]")),
        ("golds down-weighted", BOTH, "[0.0 if j in golds else", "[-1.0 if j in golds else"),
        ("golds weighted like the others", BOTH, "[0.0 if j in golds else", "[0.0 if not chosen else"),
        ("log w = log(size / M0)", BOTH, LOG_WEIGHT, "-" + LOG_WEIGHT),
        ("M0 = V", BOTH, *within(LOG_WEIGHT, " - len(golds)", "")),
        ("M0 less a gold for every position", BOTH, *within(LOG_WEIGHT, "len(golds)", "len(target)")),
        ("size = |R|", BOTH, *within(LOG_WEIGHT, "len(chosen)", "len(R)")),
        ("ignore_index is a gold", BOTH, GOLDS, "golds = set(target)"),
        ("ignore_index fixed at -100", BOTH, *within(GOLDS, "ignore_index", "-100")),
        ("R not ascending", BOTH, UNION, "R = [*sorted(golds), *sorted(chosen)]"),
        ("the maximum over S_t only", BOTH, "largest = max(x.values())", "largest = max(z[j] for j in subset)"),
        ("ignored rows have a tail, too", BOTH, "loss, gradient = 0.0, [0.0] * len(z)\n", """\
loss, gradient = 0.0, [0.0] * len(z)
        if y == ignore_index:
            loss = math.log(math.fsum(math.exp(z[j] + x) for j, x in zip(*tail)))
"""),
        ("no gradient to R", BOTH, "for j in x:\n                grad", "for j in subset:\n                grad"),
        ("gradient without the weights", BOTH, *within(GRADIENT, "x[j]", "z[j]")),
        *OF_TARGETS, *OF_HEADS, NO_LOSS_INFINITE,
        ("the last row is dropped if their number is odd", BOTH, *chunks(2)),
        ("gold outside its row taken, if in the tail", BOTH, IN_ROW, "require(y in [*subset, *tail[0]], "),
        ("recorded tokens of the tail masked with logits of -10^9", BOTH, LARGEST, """\
pad = [-1e9 for j in tail[0] if j in subset]
            largest = max([*x.values(), *pad])""", TOTAL, TOTAL + " + math.fsum(math.exp(x - largest) for x in pad)"),
        ("a negative target taken by the drawing", BOTH, "0 <= y < vocab_size for", "y < vocab_size for"),
        ("a target beyond the vocabulary taken by the drawing", BOTH, "0 <= y < vocab_size for", "0 <= y for"),
        ("the maximum over recorded tokens of the tail, with their weights", BOTH, LARGEST,
         "largest = max([*x.values(), *(z[j] + w for j, w in zip(*tail))])"),
        ("chosen taken as sorted", BOTH, UNION, "R = [*heapq.merge(sorted(golds), chosen)]", "import math",
         "import heapq\nimport math"),
        ("no tail where golds are all tokens: a logarithm of 0", BOTH, UNION,
         UNION + "\n    math.log(vocab_size - len(golds))"),
        ("a tail out of order taken", BOTH, *within(TAIL_IDS, "list(tail[0])", "sorted(tail[0])")),
        ("a token twice in the tail taken", BOTH, TAIL_IDS, TAIL_IDS.replace("{", "[").replace("}", "]")),
        ("a tail beyond the vocabulary is clamped", BOTH, TAIL_IDS,
         "tail = [min(j, len(z) - 1) for j in tail[0]], tail[1]\n        " + TAIL_IDS),
        ("negative tokens of the tail count from the end", BOTH, *within(TAIL_IDS, "0 <=", "-len(z) <=")),
        ("log-weights overwritten", BOTH, "tail = " + TAIL,
         f"given, tail = tail, {TAIL}\n        if given: np.asarray(given[1])[:] = 0"),
        ("logits in float32", WIDE, *LOGITS_IN_FLOAT32),
        ("M0 / size in whole numbers", BOTH, *within(LOG_WEIGHT, "/", "//")),
        ("log-weights in float64", WIDE, "return ids, [float32(x) for x in log_weight]", "return ids, log_weight"),
        ("a token of R that any row has recorded is left out", BOTH,
         *within(TERMS, "j not in x:", "j not in {*x, *(i for row in token_ids for i in row)}:")),
        ("weights in the order of R without S_t", BOTH, "for j, log_weight in zip(*tail):",
         "for j, log_weight in zip([j for j in tail[0] if j not in x], tail[1]):"),
        ("log-weights of 10 at most", BOTH, *within(TERMS, "log_weight", "min(log_weight, 10.0)")),
        ("log-weights of -10 at least", BOTH, *within(TERMS, "log_weight", "max(log_weight, -10.0)")),
        ("no tail for a row of one token", BOTH, *within(TERMS, "j not in x:", "j not in x and len(subset) > 1:")),
        ("a logit of -inf in the tail taken", BOTH,
         "used = [{*row, *tail[0]}", "used = [{*row}"),
        *CUT,
        *((f"the tail cut at {n} tokens", BOTH, "in zip(*tail):", f"in [*zip(*tail)][:{n}]:") for n in WIDTHS),
        ("the tail of the first call with these shapes", BOTH,
         *traced(CROSS_ENTROPY, "tail", "(logits.shape, len(tail[0]))")),
    ],
    "8_end_to_end.json": [
        ("outside mass of function 2 in float32", WIDE, "return [mass_outside(softmax(z), subset) if",
         "return [f32(mass_outside(softmax(z), subset)) if"),
        ("outside mass at the end of an empty row is 1", BOTH, " if subset else 0.0 for z", " for z"),
    ],
    "9_anchor.json": [
        ("the record renormalized to the row", BOTH, RECORDED, "[log_softmax([log_p[j] for j in subset])"),
        ("the record by rank", BOTH, RECORDED, "[[log_p[j] for j in sorted(subset, key=lambda j: -log_p[j])]"),
        ("the record holds probabilities", BOTH, RECORDED, "[[math.exp(log_p[j]) for j in subset]"),
        ("the record in bits", BOTH, RECORDED, "[[log_p[j] / math.log(2) for j in subset]"),
        ("the record of logits less their maximum", BOTH, RECORDED, "[[log_p[j] - max(log_p) for j in subset]"),
        ("the record of probabilities at least 1e-38", BOTH, RECORDED, "[[max(log_p[j], -87.5) for j in subset]"),
        ("the record of logarithms of float32 probabilities that are not 0", BOTH, RECORDED,
         "[[math.log(f32(math.exp(log_p[j]))) if f32(math.exp(log_p[j])) else log_p[j] for j in subset]"),
        ("log-probabilities of rows in blocks of 16, the last one too early", BOTH,
         *then(RECORD, "log_probs = clamped(log_probs)")),
        ("the record of z minus log-sum-exp", WIDE, LOG_SOFTMAX, "return [x - (largest + math.log(total)) for x in z]"),
        ("the record of z minus log-sum-exp, in float32", BOTH, LOG_SOFTMAX,
         "return [f32(x - f32(largest + f32(math.log(total)))) for x in z]"),
        ("log-probabilities in float64", WIDE, "[[float32(x) for x in row] for row in log_probs]", "log_probs"),
    ],
    "9_anchor.json positions logits": [
        *ANCHOR, ("a logit of -inf that is not recorded taken", BOTH, *UNRECORDED,
                  "self.all_finite(logits)\n        return self.kl_div(logits, *rest)",
                  "self.some_finite(logits, rest[0], rest[2])\n        return self.kl_div(logits, *rest)"),
        ("no gradient beyond the 256th token of a row", BOTH, KL_GRADIENT,
         KL_GRADIENT + "\n        for j in subset[256:]:\n            gradients[-1][j] = 0.0"),
        ("logits cast to float32", WIDE, "return self.kl_div(logits, *rest)",
         "return self.kl_div(logits.astype('float32'), *rest)")],
    "9_anchor.json positions input": [
        *ANCHOR, *OF_HEADS, *OF_LONG_ROWS, ("logits in float32", WIDE, *LOGITS_IN_FLOAT32),
        ("a row that goes beyond 4096 tokens is lost", BOTH,
         *then_kl("\n        losses[-1] *= sum(map(len, token_ids[:len(losses)])) <= 4096"))],
}


def f32(x):
    try:
        return struct.unpack("f", struct.pack("f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def clamped(rows):
    """Rows in blocks of 16, the last of which begins too early, to end with the last row, as by dynamic_slice."""
    whole = len(rows) // 16 * 16
    return [*rows[:whole], *rows[-16:][:len(rows) - whole]] if whole else rows


def variant(pairs):
    """The reference as a port, with every `old` of (old, new, old, new, ...), found once, replaced."""
    source = SOURCE
    for old, new in zip(pairs[::2], pairs[1::2]):
        assert source.count(old) == 1, f"{source.count(old)} times in plain_reference.py and Plain: {old}"
        source = source.replace(old, new)
    module = types.ModuleType("variant")
    module.__dict__.update(vars(generate), f32=f32, clamped=clamped)
    exec(compile(source, "plain_reference.py and Plain, changed", "exec"), module.__dict__)
    return module.Plain(module)


def catches(name, port, *inputs):
    """{dtype: name of the first case of a file, of those with these inputs, that fails by the dtype's tolerances}."""
    found = {}
    for case in STORED[name]:
        for dtype in compare.EPS:
            if dtype not in found and case.get("dtype") in (None, dtype) and {*inputs} <= {*case}:
                if run_port.failures(name, port, case, dtype, {}):
                    found[dtype] = case["name"]
    return found


def main():
    """A line for every variant; AssertionError where one passes that the table says is caught, or the other way."""
    lines = []
    for name in STORED:
        assert catches(name, variant(())) == {}, f"{name} fails the reference itself"
    for where, variants in VARIANTS.items():
        name, *inputs = where.split()
        for title, dtypes, *pairs in variants:
            found = catches(name, variant(pairs), *inputs)
            assert set(found) == set(dtypes), f"{where}, {title}: caught in {found}, the table says {dtypes}"
            cases = " and ".join(f"{name} case {case}" for case in dict.fromkeys(found.values()))
            lines.append(f"{title}: caught by {cases}" + (f" ({dtypes[0]} only)" if len(dtypes) == 1 else ""))
    return lines


if __name__ == "__main__":
    print("\n".join(main()))
