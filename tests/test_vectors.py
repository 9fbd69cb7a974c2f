"""The golden vectors: the files are what the generator makes, and the two modules match them in float64 and float32."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

import plain_reference
from logits_replay import (ReplayRecord, Tail, linear_replay_cross_entropy, outside_mass, record_topk,
                           replay_cross_entropy, sample_tail)
from moclip import MoClip, angle_between, clip_angle

FOLDER = Path(__file__).parent / "vectors"
sys.path.insert(0, str(FOLDER))
import check_holes  # noqa: E402  (their folder is on the path only now)
import compare  # noqa: E402
import generate  # noqa: E402

STORED = {name: json.loads((FOLDER / name).read_text()) for name in generate.FILES}


def cases(name):
    """Every case of a file in every dtype that it is meant for."""
    return pytest.mark.parametrize("case, dtype", [
        pytest.param(case, getattr(torch, dtype), id=f"{case['name']}-{dtype}")
        for case in STORED[name] for dtype in generate.EPS if case.get("dtype") in (None, dtype)])


def check(got, case, dtype):
    assert compare.differences(got, case["expected"], torch.finfo(dtype).eps * case.get("amplification", 1)) == []


def lists(**tensors):
    return {name: x if x is None else x.tolist() for name, x in tensors.items()}


def record_of(token_ids, V):
    flat = torch.tensor([j for row in token_ids for j in row], dtype=torch.int32)
    offsets = torch.tensor([0, *map(len, token_ids)]).cumsum(0)
    return ReplayRecord(flat, offsets, torch.zeros(len(token_ids)), V, 0.5)


def rows_of(record):
    return [ids.tolist() for ids in record.token_ids.split(record.subset_sizes.tolist())]


def assert_same(a, b, where):
    """Equal, but for the last bits of floats: another platform's exp, log and atan2 may round another way."""
    assert type(a) is type(b), where
    if isinstance(a, float):
        assert math.isclose(a, b, rel_tol=1e-14, abs_tol=1e-300), where
    elif isinstance(a, (list, dict)):
        assert len(a) == len(b), where
        keys = a if isinstance(a, dict) else range(len(a))
        for key in keys:
            assert_same(a[key], b[key], f"{where}/{key}")
    else:
        assert a == b, where


@pytest.mark.parametrize("name", generate.FILES)
def test_the_file_is_what_the_generator_makes(name):
    assert_same(STORED[name], generate.make(name), name)


def test_the_files_are_small_and_no_other_is_there():
    assert {path.name for path in FOLDER.glob("*.json")} == set(generate.FILES)
    assert sum(path.stat().st_size for path in FOLDER.glob("*.json")) < 10**6


@pytest.mark.parametrize("name", generate.FILES)
def test_inputs_are_exact_in_float32(name):
    """But for those that a port holds in float64: tau, angles, options and learning rates."""
    held_wide = {"tau", "max_angle", "betas", "a", "b", "weight_decay", "lr", "expected", "on_the_way"}

    def walk(x, where):
        for key, value in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
            if key not in held_wide:
                walk(value, f"{where}/{key}")
        if isinstance(x, float):
            assert generate.float32(x) == x, where

    for case in STORED[name]:
        if case.get("dtype") != "float64":
            walk(case, f"{name}/{case['name']}")


def test_the_readme_names_every_key_and_counts_the_variants():
    text = (FOLDER / "README.md").read_text()

    def keys(x):
        if isinstance(x, dict):
            yield from x
        for value in x.values() if isinstance(x, dict) else x if isinstance(x, list) else ():
            yield from keys(value)

    assert {key for cases in STORED.values() for key in keys(cases) if f"`{key}`" not in text} == set()
    assert f"lists {sum(map(len, check_holes.VARIANTS.values()))} wrong variants" in text


def test_the_comparison_sees_what_differs():
    want = {"n": 3, "loss": None, "outside_mass": [1e-20], "outside_mass_at_the_end": [1e-20],
            "exp_avg": [1e-9, 2.0], "x": [0.0], "on": [True]}
    assert compare.differences(want, want, 2.0**-52) == []
    in_float32 = [1e-20 * (1 + 2.0**-24)]
    assert compare.differences({**want, "loss": math.nan, "x": [2.0**-43], "outside_mass": in_float32}, want,
                               2.0**-52) == []
    for change in ({"n": 4}, {"loss": 0.0}, {"outside_mass": [1.001e-20]}, {"exp_avg": [1.001e-9, 2.0]},
                   {"outside_mass_at_the_end": in_float32},
                   {"x": [2.0**-41]}, {"x": [math.nan]}, {"x": []}, {"x": 0.0}, {"on": [False]}, {"x": [None]}):
        assert len(compare.differences({**want, **change}, want, 2.0**-52)) == 1, change
    assert compare.differences({key: want[key] for key in want if key != "n"}, want, 2.0**-52) == ["/n: missing, not 3"]


# ------------------------------------------------------------------------------------ the two modules, file after file

@cases("1_recording.json")
def test_recording(case, dtype):
    call = lambda: record_topk(torch.tensor(case["logits"], dtype=dtype), torch.tensor(case["target"]), case["tau"],
                               max_size=case["max_size"], ignore_index=case["ignore_index"])
    if "error" in case["expected"]:
        with pytest.raises(ValueError, match=case["expected"]["error"]):
            call()
        return
    record = call()
    check({"token_ids": rows_of(record), **lists(outside_mass=record.outside_mass)}, case, dtype)


@cases("2_loss.json")
def test_loss(case, dtype):
    logits, target = torch.tensor(case["logits"], dtype=dtype, requires_grad=True), torch.tensor(case["target"])
    record = record_of(case["token_ids"], logits.shape[1])
    loss = lambda reduction: replay_cross_entropy(logits, target, record, ignore_index=case["ignore_index"],
                                                  reduction=reduction)
    if "error" in case["expected"]:
        with pytest.raises(ValueError, match=case["expected"]["error"]):
            loss("none")
        return
    gradient = lambda reduction, *incoming: torch.autograd.grad(loss(reduction), logits, *incoming)[0]
    check(lists(loss_none=loss("none"), loss_sum=loss("sum"), loss_mean=loss("mean"), gradient_of_sum=gradient("sum"),
                gradient_of_mean=gradient("mean"),
                gradient_of_weighted=gradient("none", torch.tensor(case["incoming"], dtype=dtype)),
                outside_mass=outside_mass(logits.detach(), record)), case, dtype)


def linear_outputs(case, dtype, dense=False, **options):
    """What the linear form, or `replay_cross_entropy` of the dense logits, makes of a case of file 3 or 7."""
    names = ["input", "linear_weight"] + ["linear_bias"] * (case["linear_bias"] is not None)
    h, W, *bias = leaves = [torch.tensor(case[name], dtype=dtype, requires_grad=True) for name in names]
    target, record = torch.tensor(case["target"]), record_of(case["token_ids"], len(W))
    options |= dict(ignore_index=case["ignore_index"])

    def loss(reduction):
        if dense:
            return replay_cross_entropy(h @ W.T + sum(bias), target, record, reduction=reduction, **options)
        return linear_replay_cross_entropy(h, W, target, record, linear_bias=bias[0] if bias else None,
                                           reduction=reduction, **options)

    got = lists(loss_none=loss("none"), loss_sum=loss("sum"), loss_mean=loss("mean"))
    weighted = (loss("none") * torch.tensor(case["incoming"], dtype=dtype)).sum()
    for reduction, value in (("mean", loss("mean")), ("weighted", weighted)):
        gradients = [*torch.autograd.grad(value, leaves), None]
        for name, gradient in zip(("input", "weight", "bias"), gradients):
            got |= lists(**{f"d_{reduction}_d_{name}": gradient})
    return got


@cases("3_linear_loss.json")
def test_linear_loss(case, dtype):
    check(linear_outputs(case, dtype), case, dtype)
    check(linear_outputs(case, dtype, dense=True), case, dtype)


@cases("4_angle.json")
def test_angle(case, dtype):
    u, v = torch.tensor(case["u"], dtype=dtype), torch.tensor(case["v"], dtype=dtype)
    check(lists(angle=angle_between(u, v)), case, dtype)


@cases("5_rotation.json")
def test_rotation(case, dtype):
    g, m = torch.tensor(case["grad"], dtype=dtype), torch.tensor(case["momentum"], dtype=dtype)
    check(lists(rotated=clip_angle(g, m, case["max_angle"])), case, dtype)


@cases("6_moclip.json")
def test_moclip(case, dtype):
    groups = [{**group, "params": [torch.nn.Parameter(torch.tensor(w, dtype=dtype)) for w in group["parameters"]]}
              for group in case["groups"]]
    params = [p for group in groups for p in group["params"]]
    optimizer = MoClip([{key: value for key, value in group.items() if key != "parameters"} for group in groups],
                       max_angle=case["max_angle"], scope=case["scope"])
    steps = []
    for step in case["steps"]:
        for group, lr in zip(optimizer.param_groups, step["lr"]):
            group["lr"] = lr
        for p, g in zip(params, step["gradients"]):
            p.grad = None if g is None else torch.tensor(g, dtype=dtype)
        before = [optimizer.last_angle, optimizer.last_clipped]
        optimizer.step()
        report = [optimizer.last_angle, optimizer.last_clipped]
        if all(g is None for g in step["gradients"]):  # nothing happened, and the report stays that of the step before
            assert all(map(torch.equal, report, before))
            report = [torch.zeros(0)] * 2
        steps.append({**lists(angle=report[0].flatten(), clipped=report[1].flatten()),
                      "parameters": [p.tolist() for p in params]})
    final = [{key: optimizer.state[p][key].tolist() for key in ("step", "exp_avg", "exp_avg_sq")} for p in params]
    check({"steps": steps, "final": final}, case, dtype)


def drawn_tail(chosen, target, V, ignore_index):
    """`sample_tail`, again and again, until it draws the chosen tokens."""
    generator, golds = torch.Generator().manual_seed(0), set(target) - {ignore_index}
    for _ in range(10**5):
        tail = sample_tail(torch.tensor(target), V, len(chosen), ignore_index=ignore_index, generator=generator)
        if sorted(set(tail.token_ids.tolist()) - golds) == chosen:
            return tail
    raise AssertionError(chosen)


@cases("7_tail.json")
def test_tail(case, dtype):
    if case["tail"] is None:
        tail = drawn_tail(case["chosen"], case["target"], len(case["linear_weight"]), case["ignore_index"])
    else:
        tail = Tail(torch.tensor(case["tail"]["token_ids"]), torch.tensor(case["tail"]["log_weight"]))
    for dense in (False, True):
        check({**linear_outputs(case, dtype, dense, tail=tail), "tail": lists(**tail._asdict())}, case, dtype)


@cases("8_end_to_end.json")
def test_end_to_end(case, dtype):
    x, target = torch.tensor(case["input"], dtype=dtype), torch.tensor(case["target"])
    ignore_index = case["ignore_index"]
    params = {name: torch.nn.Parameter(torch.tensor(case[name], dtype=dtype)) for name in ("body", "head", "bias")}
    body, head, bias = params.values()
    options = {name: case[name] for name in ("max_angle", "scope", "betas", "a", "b", "weight_decay")}
    optimizer = MoClip([body, head, bias], **options)
    logits = lambda: (x @ body.T @ head.T + bias).detach()
    record, steps = record_topk(logits(), target, case["tau"], ignore_index=ignore_index), []
    for step in case["steps"]:
        optimizer.param_groups[0]["lr"] = step["lr"]
        tail = None
        if step["chosen"] is not None:
            tail = drawn_tail(step["chosen"], case["target"], len(head), ignore_index)
        loss = linear_replay_cross_entropy(x @ body.T, head, target, record, linear_bias=bias, tail=tail,
                                           ignore_index=ignore_index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report = lists(loss=loss, angle=optimizer.last_angle.reshape(-1), clipped=optimizer.last_clipped.reshape(-1))
        steps.append({**report, **lists(**params), "tail": tail and lists(**tail._asdict())})
    masses = lists(outside_mass=record.outside_mass, outside_mass_at_the_end=outside_mass(logits(), record))
    check({"token_ids": rows_of(record), "steps": steps, **masses}, case, dtype)


# -------------------------------------------------------------------------------------------- what the vectors can see

def test_every_wrong_variant_is_caught():
    lines = check_holes.main()
    assert len(lines) > 150 and all(": caught by " in line for line in lines)


def test_a_variant_that_no_vector_sees_is_an_error(monkeypatch):
    same = ("a variant that changes nothing", check_holes.BOTH, "import math", "import math  # here")
    monkeypatch.setattr(check_holes, "VARIANTS", {"4_angle.json": [same]})
    with pytest.raises(AssertionError, match="a variant that changes nothing: caught in {}"):
        check_holes.main()


def test_the_plain_reference_is_linear_in_the_vocabulary():
    """Counted, not timed: looks at a row by softmax, Stage 0 and the loss, for twice the tokens."""
    def looks(V):
        count = 0

        class Row(list):
            def __getitem__(self, j):
                nonlocal count
                count += 1
                return super().__getitem__(j)

            def __iter__(self):
                nonlocal count
                for x in super().__iter__():
                    count += 1
                    yield x

        plain_reference.softmax(Row([0.0] * V))
        rows, _ = plain_reference.record_topk([Row([1 / V] * V)], [V - 1], 1.0)
        plain_reference.replay_cross_entropy([Row([0.0] * V)], [V - 1], [Row(rows[0])])
        return count

    assert looks(2000) <= 2.01 * looks(1000)
