"""Logits Replay + MoClip without a framework: plain loops over Python floats, `math` and nothing else. Read this first.

Fine-tuning teaches a language model one domain, lets it forget others, and computes at each step a softmax over the
whole vocabulary. The method changes three things. Stage 0, before training, asks the model once what it expects at
every position of the text, and records the few most probable tokens. Stage 1, the training, computes its loss from the
recorded tokens alone. And its optimizer, MoClip, limits how far a gradient may turn from those before it. Two additions
are our own: the tail, a sample of all others, and the anchor, which replays what the model said about other text.

Read from top to bottom; the line above each function says which formula it is. A position has V logits z, one for each
token of the vocabulary, and a gold token y, the one that the text has there. Losses are in nats. Vectors are lists,
matrices lists of rows, a record is `token_ids`: for each position t the ascending ids of its subset S_t. Names are as
in the modules and in the golden vectors (tests/vectors). A ValueError names the argument that breaks a rule.
"""

import math


def require(condition, message):
    if not condition:
        raise ValueError(message)


# ------------------------------------------------------------------------------------------------- Stage 0: recording

# 1. The probabilities of all tokens: p_j = exp z_j / sum over i of exp z_i.
def softmax(z):
    largest = max(z)  # subtracted, so that exp cannot overflow: the quotient stays what it is
    exponentials = [math.exp(x - largest) for x in z]
    total = math.fsum(exponentials)
    return [x / total for x in exponentials]


# 2. The record: S_t = {the K most probable tokens} + {y}, with the smallest K whose probabilities add up to tau.
#    From probabilities, not from logits, so that a port can be compared token for token on its own softmax.
def record_topk(probabilities, target, tau, max_size=None, ignore_index=-100):
    """(token_ids, outside_mass): for each position the ascending ids of its subset, and the probability outside of it.

    1. Rank tokens by probability, descending; equal probabilities by id, ascending.
    2. Take tokens in that order until their running float64 sum is >= tau, or max_size of them are taken.
    3. If the gold token is not among them, add it; if that makes max_size + 1, leave out the last one taken.
    """
    require(0 < tau <= 1, "tau must lie in (0, 1]")
    require(max_size is None or max_size >= 1, "max_size must be at least 1")
    token_ids, outside = [], []
    for p, y in zip(probabilities, target):
        if y == ignore_index:
            token_ids.append([])
            outside.append(0.0)
            continue
        require(0 <= y < len(p), "target must lie in [0, V) or be ignore_index")
        subset, covered = [], 0.0
        for j in sorted(range(len(p)), key=lambda j: (-p[j], j)):
            if covered >= tau or len(subset) == max_size:
                break
            subset.append(j)
            covered += p[j]
        if y not in subset:
            if len(subset) == max_size:
                subset.pop()
            subset.append(y)
        token_ids.append(sorted(subset))
        outside.append(mass_outside(p, subset))
    return token_ids, outside


# 3. The outside mass: rho_t = sum of p_j over j not in S_t. Not 1 - inside, which loses the digits of a small result.
def mass_outside(p, subset):
    inside = set(subset)
    return math.fsum(x for j, x in enumerate(p) if j not in inside)


# The same under the logits of any model, such as one that has been trained for a while; 0 for an empty row.
def outside_mass(logits, token_ids):
    return [mass_outside(softmax(z), subset) if subset else 0.0 for z, subset in zip(logits, token_ids)]


# ------------------------------------------------------------------------------------------------ Stage 1: the losses

# 4. The loss: cross-entropy under the softmax of the recorded tokens, L_t = -log(exp z_y / sum over S_t of exp z_j).
def replay_cross_entropy(logits, target, token_ids, ignore_index=-100, tail=((), ())):
    r"""(losses, gradients): for each position L_t, and its derivative by the logits; both 0 for an ignored one.

        L_t = log( sum over S_t of exp z_j + sum over R \ S_t of w_j exp z_j ) - z_y,   tail = (R, log w) of formula 5

    A token of both counts once, in S_t. dL_t/dz_j = q_j - [j = y] for j in S_t or R, q_j its share of the sum; else 0.
    """
    losses, gradients = [], []
    for z, y, subset in zip(logits, target, token_ids):
        require(list(tail[0]) == sorted({j for j in tail[0] if 0 <= j < len(z)}), "tail must hold ids that ascend")
        loss, gradient = 0.0, [0.0] * len(z)
        if y != ignore_index:
            require(y in subset, "target must be in its recorded row")
            x = {j: z[j] for j in subset}  # the terms of the sum are exp x_j
            for j, log_weight in zip(*tail):
                if j not in x:
                    x[j] = z[j] + log_weight
            largest = max(x.values())
            total = math.fsum(math.exp(x[j] - largest) for j in x)
            loss = (largest - z[y]) + math.log(total)
            for j in x:
                gradient[j] = math.exp(x[j] - largest) / total - (j == y)
        losses.append(loss)
        gradients.append(gradient)
    return losses, gradients


# 5. The tail: tokens R that every position of a batch scores beside its S_t, with w = 1 / (probability to be in R).
def sample_tail(chosen, target, vocab_size, ignore_index=-100):
    """(R, log w). R holds the golds of all positions, so w = 1, and `chosen`: so many (size) of the M0 = V - #golds
    other tokens, drawn uniformly without replacement, so w = M0 / size."""
    golds = {y for y in target if y != ignore_index}
    R = sorted(golds | set(chosen))
    return R, [0.0 if j in golds else math.log((vocab_size - len(golds)) / len(chosen)) for j in R]


# 6. The mean over the positions that count (those with a row that is used), and its derivative; (nan, zeros) for none.
def mean(losses, gradients, counted):
    count = sum(counted)
    if count == 0:
        return math.nan, gradients
    return math.fsum(losses) / count, [[x / count for x in row] for row in gradients]


# The sum over t of weights_t L_t, and its derivative. Any backward pass is one of these.
def weighted_sum(losses, gradients, weights):
    return (math.fsum(w * loss for w, loss in zip(weights, losses)),
            [[w * x for x in row] for w, row in zip(weights, gradients)])


# 7. The logits of a language model's head: z_tj = <h_t, W_j> + bias_j, with h = input (N, d), W = linear_weight (V, d).
def linear(input, linear_weight, linear_bias=None):
    bias = linear_bias or [0.0] * len(linear_weight)
    return [[math.fsum(a * b for a, b in zip(h, w)) + c for w, c in zip(linear_weight, bias)] for h in input]


# Its backward pass, from dL/dz: dL/dh_t = sum_j dz_tj W_j,  dL/dW_j = sum_t dz_tj h_t,  dL/dbias_j = sum_t dz_tj.
def linear_gradients(input, linear_weight, d_logits):
    columns, width = list(zip(*d_logits)), range(len(linear_weight[0]))
    d_input = [[math.fsum(x * w[i] for x, w in zip(dz, linear_weight)) for i in width] for dz in d_logits]
    d_weight = [[math.fsum(x * h[i] for x, h in zip(dz, input)) for i in width] for dz in columns]
    return d_input, d_weight, [math.fsum(dz) for dz in columns]


# ---------------------------------------------------------------------------- the anchor: what the base said elsewhere

# 8. The logarithm of formula 1, but not of a p that rounds to 0: log p_j = (z_j - max) - log sum of exp(z_i - max).
def log_softmax(z):
    largest = max(z, default=0.0)
    total = math.fsum(math.exp(x - largest) for x in z)
    return [(x - largest) - math.log(total) for x in z]


# What an anchor's record keeps beside the ids: log p of each recorded token, p under the softmax of all V tokens.
def recorded_log_probs(logits, token_ids):
    return [[log_p[j] for j in subset] for log_p, subset in zip(map(log_softmax, logits), token_ids)]


# The rows of a batch: those at `positions`, in that order. All rows of the record must be right, not only these.
def select(token_ids, log_probs, positions):
    require(log_probs is not None, "log_probs must be in the record")
    require([*map(len, log_probs)] == [*map(len, token_ids)], "log_probs must hold one for each recorded token")
    require(all(x <= 0 for row in log_probs for x in row), "log_probs must be at most 0")
    require(all(math.fsum(map(math.exp, row)) <= 1.01 for row in log_probs), "log_probs must add up to log 1 at most")
    return [token_ids[t] for t in positions], [log_probs[t] for t in positions]


# 9. The anchor: A_t = sum over S_t of q0_j (log q0_j - log q1_j). It is never negative, and 0 where q1 = q0.
def replay_kl_div(logits, token_ids, log_probs):
    """(losses, gradients): for each position A_t, and its derivative by the logits; both 0 for an empty row.

    q0, q1: softmax of the recording model and of the logits, renormalized to S_t. dA_t/dz_j = q1_j - q0_j in S_t, or 0.
    """
    losses, gradients = [], []
    for z, subset, log_p0 in zip(logits, token_ids, log_probs):
        log_q0, log_q1 = log_softmax(log_p0), log_softmax([z[j] for j in subset])  # which renormalizes both
        losses.append(math.fsum(math.exp(a) * (a - b) for a, b in zip(log_q0, log_q1)))
        gradients.append([0.0] * len(z))
        for j, a, b in zip(subset, log_q0, log_q1):
            gradients[-1][j] = math.exp(b) - math.exp(a)
    return losses, gradients


# --------------------------------------------------------------------------------------------------- MoClip: the step

# 10. The length of a vector. `hypot` scales first: squares of 1e-200 or 1e200 do not exist in float64.
def norm(x):
    return math.hypot(*x)


# 11. The angle: theta = atan2(|r|, c) in [0, pi], where u/|u| = c v/|v| + r, r orthogonal to v; 0 for a zero vector.
def angle_between(u, v):
    if norm(u) == 0 or norm(v) == 0:
        return 0.0
    u, v = [x / norm(u) for x in u], [x / norm(v) for x in v]
    c = math.fsum(a * b for a, b in zip(u, v))
    return math.atan2(norm([a - c * b for a, b in zip(u, v)]), c)


# 12. The rotation of a gradient g towards the momentum m: g~ = |g| (cos(max_angle) m/|m| + sin(max_angle) n).
def clip_angle(grad, momentum, max_angle, eps=2.0**-52):
    """(g~, theta, clipped, antiparallel): g~ is as above if clipped and not antiparallel, and g otherwise.

    clipped: their angle theta is > max_angle. n: unit vector of g's component orthogonal to m. antiparallel: that
    component is 0 up to rounding; tested as clipped, theta > pi/2 and sin(theta) <= sqrt(eps), eps of the arithmetic.
    """
    theta = angle_between(grad, momentum)
    clipped = theta > max_angle
    antiparallel = clipped and theta > math.pi / 2 and math.sin(theta) <= math.sqrt(eps)
    if not clipped or antiparallel:
        return list(grad), theta, clipped, antiparallel
    length, m_length = norm(grad), norm(momentum)
    g_hat, m_hat = [x / length for x in grad], [x / m_length for x in momentum]
    c = math.fsum(a * b for a, b in zip(g_hat, m_hat))
    r = [a - c * b for a, b in zip(g_hat, m_hat)]  # n = r / |r|
    r_length = norm(r)
    rotated = [length * (math.cos(max_angle) * b + math.sin(max_angle) * (x / r_length)) for b, x in zip(m_hat, r)]
    return rotated, theta, clipped, antiparallel


# 13. The step: m = beta1 m + (1 - beta1) g~,  v = beta2 v + (1 - beta2) g~^2,
#     w = (1 - lr weight_decay) w - lr a atan2(m / (1 - beta1^t), b sqrt(v / (1 - beta2^t))).
def moclip_step(parameters, options, max_angle, scope, eps=2.0**-52):
    """One MoClip step in place; returns [(theta, clipped)], one for scope "global", one a parameter for "tensor".

    parameters: dicts of "parameter", "gradient", "exp_avg" (m), "exp_avg_sq" (v), flat lists of one length, and "step".
    options: for each a dict of lr, betas, a, b, weight_decay. Without "gradient" (None) a parameter is left alone.
    """
    active = [(p, o) for p, o in zip(parameters, options) if p["gradient"] is not None]
    scopes = [[one] for one in active] if scope == "tensor" else [active] if active else []
    reports = []
    for members in scopes:
        g = [x for p, _ in members for x in p["gradient"]]
        m = [x for p, _ in members for x in p["exp_avg"]]  # the momentum BEFORE this step
        g, theta, clipped, antiparallel = clip_angle(g, m, max_angle, eps)
        reports.append((theta, clipped))
        rotated = iter(g)
        for p, o in members:
            w, m, v = p["parameter"], p["exp_avg"], p["exp_avg_sq"]
            beta1, beta2 = o["betas"]
            p["step"] += 1
            c1, c2 = 1 - beta1 ** p["step"], 1 - beta2 ** p["step"]
            decay = 1 - o["lr"] * o["weight_decay"]
            for k in range(len(w)):
                x = next(rotated)
                before = 0.0 if antiparallel else m[k]  # the momentum restarts at zero; the count goes on
                m[k] = beta1 * before + (1 - beta1) * x
                v[k] = beta2 * v[k] + (1 - beta2) * x * x
                update = o["a"] * math.atan2(m[k] / c1, o["b"] * math.sqrt(v[k] / c2))
                w[k] = decay * w[k] - o["lr"] * update
    return reports
