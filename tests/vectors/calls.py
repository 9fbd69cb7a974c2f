"""Which functions of a port each file calls, and with what: `outputs`. The functions are listed in run_port.py."""

import json
from functools import partial

import numpy as np


def lists(x):
    """Arrays, numbers and tuples as what json.loads could return."""
    if isinstance(x, dict):
        return {key: lists(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [lists(value) for value in x]
    return x if x is None or isinstance(x, (bool, int, float)) else np.asarray(x).tolist()


def reductions(loss, incoming, *names):
    """The value and the gradients of a loss in each reduction; `names`: their keys, with {} for the reduction."""
    none, total, mean = loss("none", incoming), loss("sum", -2.0), loss("mean", -2.0)
    values = {"loss_none": none[0], "loss_sum": total[0], "loss_mean": mean[0]}
    # an incoming gradient of 1 would not show a port that ignores it; -1/2 takes -2 off again, exactly
    for reduction, scale, (_, *gradients) in (("sum", -0.5, total), ("mean", -0.5, mean), ("weighted", 1, none)):
        values |= {name.format(reduction): None if gradient is None else scale * np.asarray(gradient)
                   for name, gradient in zip(names, gradients)}
    return values


def recording(port, case, array):
    record = port.record_topk(array(case["logits"]), array(case["target"], int), case["tau"], case["max_size"],
                              case["ignore_index"])
    return dict(zip(("token_ids", "outside_mass", "log_probs"), record))


def of_logits(function, case, array, *rest):
    return reductions(partial(function, array(case["logits"]), *rest), array(case["incoming"]), "gradient_of_{}")


def of_head(function, case, array, *rest, **chunk):
    head = (None if case[name] is None else array(case[name]) for name in ("input", "linear_weight", "linear_bias"))
    return reductions(partial(function, *head, *rest, **chunk), array(case["incoming"]),
                      "d_{}_d_input", "d_{}_d_weight", "d_{}_d_bias")


def loss(port, case, array):
    if case.get("alone") == "outside_mass":
        return {"outside_mass": port.outside_mass(array(case["logits"]), case["token_ids"])}
    rest = array(case["target"], int), case["token_ids"], case["ignore_index"]
    losses = of_logits(port.replay_cross_entropy, case, array, *rest)
    return losses if "alone" in case else {
        **losses, "outside_mass": port.outside_mass(array(case["logits"]), case["token_ids"])}


def linear_loss(port, case, array, tail=None, **chunk):
    rest = array(case["target"], int), case["token_ids"], case["ignore_index"], tail
    return of_head(port.linear_replay_cross_entropy, case, array, *rest, **chunk)


def named(tail):
    return None if tail is None else dict(zip(("token_ids", "log_weight"), tail))


def tail_loss(port, case, array, **chunk):
    if "alone" in case:
        return {"tail": named(port.sample_tail(case["chosen"], array(case["target"], int), case["vocab_size"],
                                               case["ignore_index"]))}
    if case["tail"] is None:
        V = len(case["linear_weight"])
        tail = port.sample_tail(case["chosen"], array(case["target"], int), V, case["ignore_index"])
    else:
        tail = array(case["tail"]["token_ids"], int), array(case["tail"]["log_weight"], "float32")
    return {"tail": named(tail), **linear_loss(port, case, array, tail, **chunk)}


def anchor(port, case, array, **chunk):
    if "tau" in case:
        return recording(port, case, array)
    rest = case["token_ids"], case["log_probs"], array(case["positions"], int)
    if "logits" in case:
        return of_logits(port.replay_kl_div, case, array, *rest)
    return of_head(port.linear_replay_kl_div, case, array, *rest, **chunk)


def angle(port, case, array):
    return {"angle": port.angle_between(array(case["u"]), array(case["v"]))}


def rotation(port, case, array):
    return {"rotated": port.clip_angle(array(case["grad"]), array(case["momentum"]), case["max_angle"])}


def moclip(port, case, array):
    groups = [group | {"parameters": [array(p) for p in group["parameters"]]} for group in case["groups"]]
    step, returned, copies = port.moclip(groups, case["max_angle"], case["scope"]), [], []
    for now in case["steps"]:
        returned.append(step([g if g is None else array(g) for g in now["gradients"]], now["lr"]))
        copies.append(lists(returned[-1]))
    if repr(lists(returned)) != repr(copies):  # as text, in which nan equals nan
        raise RuntimeError("a later step overwrote what step had returned")
    steps = [{"angle": angle, "clipped": clipped, "parameters": parameters} for parameters, angle, clipped, _ in copies]
    return {"steps": steps,
            "final": [dict(zip(("step", "exp_avg", "exp_avg_sq"), each)) for each in copies[-1][3]]}


def end_to_end(port, case, array):
    names, V, ignore_index = ("body", "head", "bias"), len(case["head"]), case["ignore_index"]
    x, target, parameters = array(case["input"]), array(case["target"], int), [array(case[name]) for name in names]
    matmul = getattr(port, "matmul", np.matmul)  # the plain reference has its own
    logits = lambda body, head, bias: matmul(matmul(x, body.T), head.T) + bias
    step, steps = port.moclip([case | {"parameters": parameters}], case["max_angle"], case["scope"]), []
    # Stage 0, once; then the mean loss, its gradients, a step
    token_ids, recorded, *_ = port.record_topk(logits(*parameters), target, case["tau"], None, ignore_index)
    for now in case["steps"]:
        body, head, bias = parameters
        tail = None if now["chosen"] is None else port.sample_tail(now["chosen"], target, V, ignore_index)
        loss, d_hidden, *d_head = port.linear_replay_cross_entropy(matmul(x, body.T), head, bias, target, token_ids,
                                                                   ignore_index, tail, "mean", 1.0)
        d_body = matmul(array(lists(d_hidden)).T, x)
        parameters, angle, clipped, _ = step([d_body, *(array(lists(d)) for d in d_head)], [now["lr"]])
        parameters = [array(lists(p)) for p in parameters]
        steps.append(lists({"tail": named(tail), "loss": loss, "angle": angle, "clipped": clipped,
                            **dict(zip(names, parameters))}))
    return {"token_ids": token_ids, "outside_mass": recorded, "steps": steps,
            "outside_mass_at_the_end": port.outside_mass(logits(*parameters), token_ids)}


FILES = {"1_recording.json": recording, "2_loss.json": loss, "3_linear_loss.json": linear_loss, "4_angle.json": angle,
         "5_rotation.json": rotation, "6_moclip.json": moclip, "7_tail.json": tail_loss,
         "8_end_to_end.json": end_to_end, "9_anchor.json": anchor}


def outputs(name, port, case, dtype, **chunk):
    """What a port makes of a case of a file, in the form of `expected`; it may have more keys."""
    before = json.dumps(case)
    given, arrays = json.loads(before), []  # all that the port gets, to see whether it overwrites any of it

    def array(x, dtype=dtype):
        x = np.array(x, dtype)
        arrays.append((x, x.tobytes()))
        return x

    got = lists(FILES[name](port, given, array, **chunk))
    if json.dumps(given) != before:
        raise RuntimeError("the port overwrote a list that it was given")
    for x, content in arrays:
        if x.tobytes() != content:
            raise RuntimeError(f"the port overwrote an array of shape {x.shape} that it was given")
    return got
