"""The method without a framework: plain loops over Python floats (float64), `math` and nothing else.

To read after `logits_replay.py` and `moclip.py`, which the tests compare with it, or, for a port, after
tests/vectors/README.md. Every function does what its docstring says, in that order.

Vectors are lists, matrices lists of rows, a record is `token_ids`: for each position the ascending ids of its subset
S_t. Names are those of the golden vectors (tests/vectors/README.md). `record_topk` starts from probabilities, so that a
port can be compared token for token on its own softmax. ValueError names the argument that breaks a rule.
"""

import math


def require(condition, message):
    if not condition:
        raise ValueError(message)


# ------------------------------------------------------------------------------------------------- Stage 0: recording

def softmax(z):
    """exp z_j / sum of exp z_i, after subtracting the largest logit."""
    largest = max(z)
    exponentials = [math.exp(x - largest) for x in z]
    total = math.fsum(exponentials)
    return [x / total for x in exponentials]


def record_topk(probabilities, target, tau, max_size=None, ignore_index=-100):
    """(token_ids, outside_mass): for each position the ascending ids of its subset, and the probability outside of it.

    1. Rank tokens by probability, descending; equal probabilities by id, ascending.
    2. Take tokens in that order until their running float64 sum is >= tau.
    3. With max_size, stop at max_size tokens.
    4. If the gold token is not among them, add it; if that makes max_size + 1, leave out the last one taken.
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


def mass_outside(p, subset):
    """Sum of p_j over j not in the subset: not 1 minus the sum inside, which loses the digits of a small result."""
    inside = set(subset)
    return math.fsum(x for j, x in enumerate(p) if j not in inside)


def outside_mass(logits, token_ids):
    """rho_t, the softmax probability of the tokens that a row does not hold; 0 for an empty row."""
    return [mass_outside(softmax(z), subset) if subset else 0.0 for z, subset in zip(logits, token_ids)]


# ------------------------------------------------------------------------------------------------ Stage 1: the losses

def tail(chosen, target, vocab_size, ignore_index=-100):
    """(R, log w): the sampled tail of a batch; `chosen`, distinct, are drawn uniformly from tokens that are not gold.

    R holds the golds of all positions, with w = 1 (they are taken with certainty), and the chosen, each with
    w = M0 / size: of the M0 = V - #golds others `size` were chosen. So w is 1 / (probability to be in R).
    """
    golds = {y for y in target if y != ignore_index}
    R = sorted(golds | set(chosen))
    return R, [0.0 if j in golds else math.log((vocab_size - len(golds)) / len(chosen)) for j in R]


def replay_cross_entropy(logits, target, token_ids, ignore_index=-100, tail=((), ())):
    r"""(losses, gradients): for each position L_t, and its derivative by the logits; both 0 for an ignored one.

        L_t = log( sum over S_t of exp z_j + sum over R \ S_t of w_j exp z_j ) - z_y,   tail = (R, log w)

    So without a tail -log(exp z_y / sum over S_t of exp z_j); with one, a token in S_t and R counts once, in S_t.
    dL_t/dz_j = q_j - [j = y] for j in S_t or R, where q_j is j's share of the sum, and 0 elsewhere.
    """
    losses, gradients = [], []
    for z, y, subset in zip(logits, target, token_ids):
        loss, gradient = 0.0, [0.0] * len(z)
        if y != ignore_index:
            require(y in subset, "target must be in its recorded row")
            x = {j: z[j] for j in subset}  # the terms of the sum are exp x_j
            for j, log_weight in zip(*tail):
                if j not in x:
                    x[j] = z[j] + log_weight
            largest = max(x.values())  # a constant, subtracted so that exp cannot overflow
            total = math.fsum(math.exp(x[j] - largest) for j in x)
            loss = (largest - z[y]) + math.log(total)
            for j in x:
                gradient[j] = math.exp(x[j] - largest) / total - (j == y)
        losses.append(loss)
        gradients.append(gradient)
    return losses, gradients


def mean(losses, gradients, target, ignore_index=-100):
    """(value, derivative by the logits) of the mean over the targets that are not ignored; (nan, zeros) if all are."""
    counted = sum(y != ignore_index for y in target)
    if counted == 0:
        return math.nan, gradients
    return math.fsum(losses) / counted, [[x / counted for x in row] for row in gradients]


def weighted_sum(losses, gradients, weights):
    """(value, derivative by the logits) of sum over t of weights_t L_t. Any backward pass is one of these."""
    return (math.fsum(w * loss for w, loss in zip(weights, losses)),
            [[w * x for x in row] for w, row in zip(weights, gradients)])


def linear(input, linear_weight, linear_bias=None):
    """Logits z_tj = <h_t, W_j> + bias_j, with h = input (N, d) and W = linear_weight (V, d)."""
    bias = linear_bias or [0.0] * len(linear_weight)
    return [[math.fsum(a * b for a, b in zip(h, w)) + c for w, c in zip(linear_weight, bias)] for h in input]


def linear_gradients(input, linear_weight, d_logits):
    """From dL/dz: dL/dh_t = sum_j dz_tj W_j,  dL/dW_j = sum_t dz_tj h_t,  dL/dbias_j = sum_t dz_tj."""
    columns, width = list(zip(*d_logits)), range(len(linear_weight[0]))
    d_input = [[math.fsum(x * w[i] for x, w in zip(dz, linear_weight)) for i in width] for dz in d_logits]
    d_weight = [[math.fsum(x * h[i] for x, h in zip(dz, input)) for i in width] for dz in columns]
    return d_input, d_weight, [math.fsum(dz) for dz in columns]


# --------------------------------------------------------------------------------------------------- MoClip: the step

def norm(x):
    return math.hypot(*x)  # which scales first: squares of 1e-200 or 1e200 do not exist in float64


def angle_between(u, v):
    """atan2(|r|, c) in [0, pi], where u/|u| = c v/|v| + r with r orthogonal to v; 0 if one vector is zero."""
    if norm(u) == 0 or norm(v) == 0:
        return 0.0
    u, v = [x / norm(u) for x in u], [x / norm(v) for x in v]
    c = math.fsum(a * b for a, b in zip(u, v))
    return math.atan2(norm([a - c * b for a, b in zip(u, v)]), c)


def clip_angle(grad, momentum, max_angle, eps=2.0**-52):
    """(g~, theta, clipped, antiparallel): g = grad, rotated towards m = momentum if their angle theta is > max_angle.

        g~ = |g| (cos(max_angle) m/|m| + sin(max_angle) n)   if clipped and not antiparallel, g otherwise

    clipped: theta > max_angle. n: unit vector of g's component orthogonal to m. antiparallel: that component is 0 up to
    rounding; tested as clipped, theta > pi/2 and sin(theta) <= sqrt(eps), with eps that of the arithmetic.
    """
    theta = angle_between(grad, momentum)
    clipped = theta > max_angle
    antiparallel = clipped and theta > math.pi / 2 and math.sin(theta) <= math.sqrt(eps)
    if not clipped or antiparallel:
        return list(grad), theta, clipped, antiparallel
    length, m_length = norm(grad), norm(momentum)
    g_hat, m_hat = [x / length for x in grad], [x / m_length for x in momentum]
    c = math.fsum(a * b for a, b in zip(g_hat, m_hat))
    r = [a - c * b for a, b in zip(g_hat, m_hat)]
    r_length = norm(r)
    rotated = [length * (math.cos(max_angle) * b + math.sin(max_angle) * (x / r_length)) for b, x in zip(m_hat, r)]
    return rotated, theta, clipped, antiparallel


def moclip_step(parameters, options, max_angle, scope, eps=2.0**-52):
    """One MoClip step in place; returns [(theta, clipped)], one for scope "global", one a parameter for "tensor".

    parameters: dicts of "parameter", "gradient", "exp_avg", "exp_avg_sq" (flat lists of one length) and "step" (int).
    A parameter whose "gradient" is None is left alone, moments and count included; if all are, nothing happens.
    options: for each parameter a dict of lr, betas, a, b, weight_decay.
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
