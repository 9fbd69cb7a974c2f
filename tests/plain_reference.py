"""The method without a framework: plain loops over Python floats (float64), to test against and to port from.

Matrices are lists of rows. Nothing here is fast; every function does what its first line says, in the order it says it.
`record_topk` starts from probabilities, so that a port can be checked bit for bit against its own softmax.
"""

import math


def softmax(z):
    """exp z_j / sum of exp z_i, after subtracting the largest logit."""
    exponentials = [math.exp(x - max(z)) for x in z]
    total = math.fsum(exponentials)
    return [e / total for e in exponentials]


def record_topk(probabilities, target, tau, max_size=None, ignore_index=-100):
    """(rows, outside_mass): for each position the ascending ids of its subset, and the probability outside of it.

    1. Rank tokens by probability, descending; equal probabilities by id, ascending.
    2. Take tokens in that order until their running float64 sum is >= tau.
    3. With max_size, stop at max_size tokens.
    4. If the gold token is not among them, add it; if that makes max_size + 1, leave out the last one taken.
    """
    rows, outside = [], []
    for p, y in zip(probabilities, target):
        if y == ignore_index:
            rows.append([])
            outside.append(0.0)
            continue
        ranked = sorted(range(len(p)), key=lambda j: (-p[j], j))
        subset, covered = [], 0.0
        for j in ranked:
            if covered >= tau or len(subset) == max_size:
                break
            subset.append(j)
            covered += p[j]
        if y not in subset:
            if len(subset) == max_size:
                subset.pop()
            subset.append(y)
        rows.append(sorted(subset))
        outside.append(math.fsum(p[j] for j in range(len(p)) if j not in set(subset)))
    return rows, outside


def outside_mass(logits, rows):
    """Softmax probability of the tokens that a row does not hold; 0 for an empty row."""
    return [math.fsum(p for j, p in enumerate(softmax(z)) if j not in set(row)) if row else 0.0 for z, row in zip(logits, rows)]


def replay_cross_entropy(logits, target, rows, ignore_index=-100):
    """(losses, gradients): per position -log(exp z_y / sum over its row of exp z_j), and its derivative by the logits.

    The derivative by z_j is q_j - [j = y] for j in the row, where q is the softmax over the row, and 0 elsewhere.
    """
    losses, gradients = [], []
    for z, y, row in zip(logits, target, rows):
        gradient = [0.0] * len(z)
        loss = 0.0
        if y != ignore_index:
            q = dict(zip(row, softmax([z[j] for j in row])))
            largest = max(z[j] for j in row)
            loss = (largest - z[y]) + math.log(math.fsum(math.exp(z[j] - largest) for j in row))
            for j in row:
                gradient[j] = q[j] - (j == y)
        losses.append(loss)
        gradients.append(gradient)
    return losses, gradients


def linear(h, W, bias=None):
    """Logits z_tj = <h_t, W_j> + bias_j."""
    return [[math.fsum(a * b for a, b in zip(row, w)) + (bias[j] if bias else 0.0) for j, w in enumerate(W)] for row in h]


def linear_gradients(h, W, gradients):
    """From dL/dz: dL/dh_t = sum_j dz_tj W_j,  dL/dW_j = sum_t dz_tj h_t,  dL/dbias_j = sum_t dz_tj."""
    N, V, d = len(h), len(W), len(W[0])
    dh = [[math.fsum(gradients[t][j] * W[j][i] for j in range(V)) for i in range(d)] for t in range(N)]
    dW = [[math.fsum(gradients[t][j] * h[t][i] for t in range(N)) for i in range(d)] for j in range(V)]
    db = [math.fsum(gradients[t][j] for t in range(N)) for j in range(V)]
    return dh, dW, db


def norm(x):
    return math.hypot(*x)


def angle_between(u, v):
    """atan2(length of v's component orthogonal to u, component along u), radians in [0, pi]; 0 if one vector is zero."""
    if norm(u) == 0 or norm(v) == 0:
        return 0.0
    u, v = [x / norm(u) for x in u], [x / norm(v) for x in v]
    along = math.fsum(a * b for a, b in zip(u, v))
    return math.atan2(norm([b - along * a for a, b in zip(u, v)]), along)


def clip_angle(g, m, max_angle, eps=2.0**-52):
    """(g~, theta, clipped, antiparallel). g~ = |g| (cos(max_angle) m/|m| + sin(max_angle) u) if theta > max_angle,
    with u the unit vector of g's component orthogonal to m; g itself otherwise, and where g is antiparallel to m:
    theta > pi/2 and sin(theta) <= sqrt(eps), eps that of the arithmetic."""
    theta = angle_between(m, g)
    clipped = theta > max_angle
    antiparallel = clipped and theta > math.pi / 2 and math.sin(theta) <= math.sqrt(eps)
    if not clipped or antiparallel:
        return list(g), theta, clipped, antiparallel
    m_hat = [x / norm(m) for x in m]
    g_hat = [x / norm(g) for x in g]
    along = math.fsum(a * b for a, b in zip(g_hat, m_hat))
    u = [a - along * b for a, b in zip(g_hat, m_hat)]
    u = [x / norm(u) for x in u]
    return ([norm(g) * (math.cos(max_angle) * b + math.sin(max_angle) * c) for b, c in zip(m_hat, u)], theta, True, False)


def moclip_step(parameters, options, max_angle, scope, eps=2.0**-52):
    """One MoClip step in place; returns [(theta, clipped)], one for scope "global", one a parameter for "tensor".

    parameters: list of dicts with "w", "grad", "m", "v" (equally long lists) and "step" (int); "grad" None: left alone.
    options: for each parameter a dict with lr, beta1, beta2, a, b, weight_decay.
    """
    active = [i for i, p in enumerate(parameters) if p["grad"] is not None]
    scopes = [active] if scope == "global" else [[i] for i in active]
    reports = []
    for members in scopes:
        if not members:
            continue
        g = [x for i in members for x in parameters[i]["grad"]]
        m = [x for i in members for x in parameters[i]["m"]]  # the momentum BEFORE this step
        g, theta, clipped, antiparallel = clip_angle(g, m, max_angle, eps)
        reports.append((theta, clipped))
        start = 0
        for i in members:
            p, o = parameters[i], options[i]
            rotated = g[start:start + len(p["w"])]
            start += len(p["w"])
            p["step"] += 1
            for k, x in enumerate(rotated):
                before = 0.0 if antiparallel else p["m"][k]
                p["m"][k] = o["beta1"] * before + (1 - o["beta1"]) * x
                p["v"][k] = o["beta2"] * p["v"][k] + (1 - o["beta2"]) * x * x
                m_hat = p["m"][k] / (1 - o["beta1"] ** p["step"])
                v_hat = p["v"][k] / (1 - o["beta2"] ** p["step"])
                p["w"][k] = ((1 - o["lr"] * o["weight_decay"]) * p["w"][k]
                             - o["lr"] * o["a"] * math.atan2(m_hat, o["b"] * math.sqrt(v_hat)))
    return reports
