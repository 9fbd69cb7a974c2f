"""Writes the golden vectors from tests/plain_reference.py alone: python tests/vectors/generate.py

Gradients, logits and starting points are exact in float32, and every decision (is tau reached? is the angle above the
cap?) is either exact or clear by more than MARGIN, so that float32 and float64 ports decide alike.
"""

import json
import math
import random
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

import plain_reference as reference  # noqa: E402  (its folder is on the path only now)

MARGIN = 1e-4
DEGREE = math.pi / 180


def normal(rng, n, scale=1.0):
    return [round(rng.gauss(0, scale) * 1024) / 1024 for _ in range(n)]


def recording():
    rng = random.Random(0)
    spread = [normal(rng, 12, 2.0) for _ in range(4)]
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
        ("a tiny tau takes the most probable token", spread, [1, 1, 1, 1], 2.0**-20, None, -100),
        ("max_size, gold inside", [[4.0, 3.0, 2.0, 1.0, 0.0]], [1], 0.999, 3, -100),
        ("max_size, gold displaces the last token", [[4.0, 3.0, 2.0, 1.0, 0.0]], [4], 0.999, 3, -100),
        ("max_size = 1 keeps gold alone", [[4.0, 3.0, 2.0, 1.0, 0.0]], [2], 0.999, 1, -100),
        ("max_size larger than needed changes nothing", [[4.0, 3.0, 2.0, 1.0, 0.0]], [4], 0.5, 3, -100),
        ("max_size cuts a tie", [[0.0] * 8], [5], 1.0, 3, -100),
        ("ignored rows are empty", spread, [-100, 2, -100, 4], 0.9, None, -100),
        ("another ignore_index, itself a token", spread, [0, 2, 0, 4], 0.9, None, 0),
        ("only ignored rows", spread[:2], [-100, -100], 0.9, None, -100),
        ("a vocabulary of one token", [[3.0], [-7.0]], [0, -100], 0.7, None, -100),
        ("huge logits", [[1e4, -1e4, 9999.0, 0.0]], [1], 0.9, None, -100),
    ]
    for name, logits, target, tau, max_size, ignore_index in cases:
        probabilities = [reference.softmax(z) for z in logits]
        for p in probabilities:
            covered = 0.0
            for x in sorted(p, reverse=True):
                covered += x
                assert covered == tau or abs(covered - tau) > MARGIN or x == 0 or tau < min(p), name
        rows, outside = reference.record_topk(probabilities, target, tau, max_size, ignore_index)
        yield {"name": name, "logits": logits, "target": target, "tau": tau, "max_size": max_size, "ignore_index": ignore_index,
               "probabilities": probabilities, "token_ids": rows, "outside_mass": outside}


def losses():
    rng = random.Random(1)
    def case(name, logits, target, rows, ignore_index=-100):
        loss, gradient = reference.replay_cross_entropy(logits, target, rows, ignore_index)
        counted = sum(y != ignore_index for y in target)
        return {"name": name, "logits": logits, "target": target, "token_ids": rows, "ignore_index": ignore_index,
                "loss_none": loss, "loss_sum": math.fsum(loss), "loss_mean": math.fsum(loss) / counted if counted else None,
                "gradient_of_sum": gradient, "outside_mass": reference.outside_mass(logits, rows)}
    logits = [normal(rng, 7, 2.0) for _ in range(4)]
    rows = [[0, 2, 5], [6], [0, 1, 2, 3, 4, 5, 6], [1, 4]]
    yield case("one token, some and all tokens a row", logits, [2, 6, 3, 1], rows)
    yield case("ignored rows", logits, [2, -100, -100, 1], [rows[0], [], [], rows[3]])
    yield case("only ignored rows: mean is 0/0", logits[:2], [-100, -100], [[], []])
    yield case("another ignore_index", logits, [2, 0, 3, 1], [rows[0], [], rows[2], rows[3]], 0)
    yield case("huge logits", [[1e4, -1e4, 9999.0, 0.0], [-1e4, -1e4, -1e4, 1e4]], [1, 2], [[0, 1, 2], [0, 1, 2]])
    yield case("all mass outside", [[0.0, 0.0, 0.0, 100.0]], [0], [[0, 1]])


def linear_losses():
    rng = random.Random(2)
    for name, N, V, d, with_bias in (("without bias", 4, 9, 3, False), ("with bias", 3, 6, 5, True)):
        h, W = [normal(rng, d) for _ in range(N)], [normal(rng, d) for _ in range(V)]
        bias = normal(rng, V) if with_bias else None
        rows = [sorted(rng.sample(range(V), rng.randint(1, V))) for _ in range(N - 1)] + [[]]
        target = [rng.choice(row) for row in rows[:-1]] + [-100]
        logits = reference.linear(h, W, bias)
        loss, gradient = reference.replay_cross_entropy(logits, target, rows)
        scaled = [[x / (N - 1) for x in row] for row in gradient]
        d_input, d_weight, d_bias = reference.linear_gradients(h, W, scaled)
        yield {"name": name, "input": h, "linear_weight": W, "linear_bias": bias, "target": target, "token_ids": rows,
               "loss_none": loss, "loss_mean": math.fsum(loss) / (N - 1), "d_mean_d_input": d_input,
               "d_mean_d_weight": d_weight, "d_mean_d_bias": d_bias if with_bias else None}


def pairs():
    rng = random.Random(3)
    u, w = normal(rng, 5), normal(rng, 5)
    tiny = [x / 2**7 for x in w]
    return [("any", u, w), ("zero gradient", [0.0] * 5, u), ("zero momentum", u, [0.0] * 5), ("equal", u, u),
            ("parallel", u, [2 * x for x in u]), ("antiparallel", u, [-4 * x for x in u]),
            ("orthogonal", [3.0, 0.0, 0.0], [0.0, 0.5, 0.0]), ("one entry, same sign", [2.0], [3.0]),
            ("one entry, opposite sign", [2.0], [-3.0]), ("nearly parallel", u, [2 * x + y for x, y in zip(u, tiny)]),
            ("nearly antiparallel", u, [y - 2 * x for x, y in zip(u, tiny)]),
            ("60 degrees in the plane, almost", [0.5, 0.875], [1.0, 0.0]), ("far apart in length", [x * 2**30 for x in u], w)]


def angles():
    for name, u, v in pairs():
        yield {"name": name, "u": u, "v": v, "angle": reference.angle_between(u, v)}


def rotations():
    for name, g, m in pairs():
        theta = reference.angle_between(g, m)
        caps = [("no cap", math.pi), ("90 degrees", math.pi / 2), ("30 degrees", 30 * DEGREE), ("cap 0", 0.0)]
        if 2 * MARGIN < theta < math.pi - 2 * MARGIN:
            caps += [("just below the cap", theta + 2 * MARGIN), ("just beyond the cap", theta - 2 * MARGIN)]
        for cap, max_angle in caps:
            if theta == max_angle or abs(theta - max_angle) > MARGIN:
                rotated, _, clipped, antiparallel = reference.clip_angle(g, m, max_angle)
                yield {"name": f"{name}, {cap}", "grad": g, "momentum": m, "max_angle": max_angle, "rotated": rotated,
                       "angle": theta, "clipped": clipped, "antiparallel": antiparallel}


def trajectories():
    usual = dict(lr=0.0625, betas=[0.9, 0.999], a=4 / math.pi, b=1.0, weight_decay=0.0)
    drift = lambda rng, n: [round((0.5 + rng.gauss(0, 1)) * 1024) / 1024 for _ in range(n)]
    cases = [("cap of 90 degrees", "global", math.pi / 2, [(usual, [3, 2])], {}),
             ("cap of 45 degrees", "global", math.pi / 4, [(usual, [3, 2])], {}),
             ("one angle a parameter", "tensor", math.pi / 4, [(usual, [3, 2, 1])], {}),
             ("no cap: Adam-atan2", "global", math.pi, [(usual, [4])], {}),
             ("cap 0: the first direction for ever", "global", 0.0, [(usual, [4])], {}),
             ("two groups, weight decay, other scales", "global", math.pi / 3,
              [(dict(usual, weight_decay=0.1), [3]), (dict(lr=0.5, betas=[0.5, 0.75], a=1.0, b=2.0, weight_decay=0.0), [2, 1])], {}),
             ("two groups, one angle a parameter", "tensor", math.pi / 3,
              [(dict(usual, weight_decay=0.1), [3]), (dict(lr=0.5, betas=[0.5, 0.75], a=1.0, b=2.0, weight_decay=0.0), [2, 2])], {}),
             ("a restart: step 8 is antiparallel to the momentum", "global", math.pi / 2, [(usual, [2, 2])], {"restart": 8}),
             ("a restart of one parameter", "tensor", math.pi / 2, [(usual, [1, 3])], {"restart": 8}),
             ("extreme gradients", "global", math.pi / 2, [(usual, [3])], {"scales": [1.0, 2.0**40, 2.0**-40, 0.0]}),
             ("a parameter without gradient every third step", "global", math.pi / 2, [(usual, [2, 2])], {"missing": 3})]
    for name, scope, max_angle, groups, special in cases:
        rng = random.Random(name)
        parameters = [{"w": normal(rng, n), "m": [0.0] * n, "v": [0.0] * n, "step": 0} for _, sizes in groups for n in sizes]
        per_parameter = [dict(o, beta1=o["betas"][0], beta2=o["betas"][1]) for o, sizes in groups for _ in sizes]
        case = {"name": name, "scope": scope, "max_angle": max_angle,
                "groups": [dict(o, parameters=[p["w"][:] for p in parameters[start:start + len(sizes)]])
                           for start, (o, sizes) in zip((0, len(groups[0][1])), groups)], "steps": []}
        for t in range(1, 25):
            for i, p in enumerate(parameters):
                scale = special.get("scales", [1.0])[t % len(special.get("scales", [1.0]))]
                p["grad"] = [scale * x for x in drift(rng, len(p["w"]))]
                if t < special.get("restart", 0):  # along one axis until then, so that the opposite is exactly antiparallel
                    p["grad"] = [abs(p["grad"][0]) + 1] + [0.0] * (len(p["w"]) - 1) if i == 0 else [0.0] * len(p["w"])
                if t == special.get("restart"):
                    p["grad"] = [-2.0] + [0.0] * (len(p["w"]) - 1) if i == 0 else [0.0] * len(p["w"])
                if special.get("missing") and i == 1 and t % special["missing"] == 0:
                    p["grad"] = None
            gradients = [p["grad"] for p in parameters]
            reports = reference.moclip_step(parameters, per_parameter, max_angle, scope)
            assert all(abs(theta - max_angle) > MARGIN or theta in (0, max_angle, math.pi) for theta, _ in reports), (name, t)
            case["steps"].append({"gradients": gradients, "angle": [theta for theta, _ in reports],
                                  "clipped": [clipped for _, clipped in reports], "parameters": [p["w"][:] for p in parameters]})
        case["final"] = [{"step": p["step"], "exp_avg": p["m"], "exp_avg_sq": p["v"]} for p in parameters]
        yield case


FILES = {"1_recording.json": recording, "2_loss.json": losses, "3_linear_loss.json": linear_losses,
         "4_angle.json": angles, "5_rotation.json": rotations, "6_moclip.json": trajectories}

if __name__ == "__main__":
    for name, make in FILES.items():
        lines = ",\n".join(json.dumps(case, allow_nan=False) for case in make())
        (FOLDER / name).write_text(f"[\n{lines}\n]\n")
