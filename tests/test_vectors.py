"""The golden vectors: the files are what the generator makes, and the two modules match them in float64 and float32."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from logits_replay import ReplayRecord, linear_replay_cross_entropy, outside_mass, record_topk, replay_cross_entropy
from moclip import MoClip, angle_between, clip_angle

FOLDER = Path(__file__).parent / "vectors"
sys.path.insert(0, str(FOLDER))
import generate  # noqa: E402  (its folder is on the path only now)

DTYPES = [torch.float64, torch.float32]


def cases(name):
    return [pytest.param(case, id=case["name"]) for case in json.loads((FOLDER / name).read_text())]


def close(actual, expected, scale=1.0):
    """Equal to within the tolerances of vectors/README.md: 2^10 eps of the dtype, absolute and relative to `scale`."""
    expected = torch.tensor(expected, dtype=torch.float64)
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=2**10 * eps, atol=2**10 * eps * scale)


def record_of(token_ids, V):
    flat = torch.tensor([j for row in token_ids for j in row], dtype=torch.int32)
    offsets = torch.tensor([0, *map(len, token_ids)]).cumsum(0)
    return ReplayRecord(flat, offsets, torch.zeros(len(token_ids)), V, 0.5)


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
    assert_same(json.loads((FOLDER / name).read_text()), list(generate.FILES[name]()), name)


def test_the_files_are_small_and_no_other_is_there():
    assert {path.name for path in FOLDER.glob("*.json")} == set(generate.FILES)
    assert sum(path.stat().st_size for path in FOLDER.glob("*.json")) < 2**20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("1_recording.json"))
def test_recording(case, dtype):
    record = record_topk(torch.tensor(case["logits"], dtype=dtype), torch.tensor(case["target"]), case["tau"],
                         max_size=case["max_size"], ignore_index=case["ignore_index"])
    assert [ids.tolist() for ids in record.token_ids.split(record.subset_sizes.tolist())] == case["token_ids"]
    close(record.outside_mass, case["outside_mass"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("2_loss.json"))
def test_loss(case, dtype):
    logits, target = torch.tensor(case["logits"], dtype=dtype, requires_grad=True), torch.tensor(case["target"])
    record = record_of(case["token_ids"], logits.shape[1])
    loss = lambda reduction: replay_cross_entropy(logits, target, record, ignore_index=case["ignore_index"], reduction=reduction)
    close(loss("none"), case["loss_none"])
    close(loss("sum"), case["loss_sum"])
    assert loss("mean").isnan() if case["loss_mean"] is None else close(loss("mean"), case["loss_mean"]) is None
    close(torch.autograd.grad(loss("sum"), logits)[0], case["gradient_of_sum"])
    close(outside_mass(logits.detach(), record), case["outside_mass"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("3_linear_loss.json"))
def test_linear_loss(case, dtype):
    names = ["input", "linear_weight"] + ["linear_bias"] * (case["linear_bias"] is not None)
    h, W, *bias = (torch.tensor(case[name], dtype=dtype, requires_grad=True) for name in names)
    target, record = torch.tensor(case["target"]), record_of(case["token_ids"], len(W))
    loss = lambda reduction: linear_replay_cross_entropy(h, W, target, record, linear_bias=bias[0] if bias else None,
                                                         reduction=reduction)
    close(loss("none"), case["loss_none"])
    close(loss("mean"), case["loss_mean"])
    for name, gradient in zip(names, torch.autograd.grad(loss("mean"), [h, W, *bias])):
        close(gradient, case[f"d_mean_d_{name.removeprefix('linear_')}"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("4_angle.json"))
def test_angle(case, dtype):
    close(angle_between(torch.tensor(case["u"], dtype=dtype), torch.tensor(case["v"], dtype=dtype)), case["angle"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("5_rotation.json"))
def test_rotation(case, dtype):
    g, m = torch.tensor(case["grad"], dtype=dtype), torch.tensor(case["momentum"], dtype=dtype)
    close(clip_angle(g, m, case["max_angle"]), case["rotated"], scale=math.hypot(*case["grad"]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("6_moclip.json"))
def test_moclip(case, dtype):
    groups = [{**group, "params": [torch.nn.Parameter(torch.tensor(w, dtype=dtype)) for w in group["parameters"]]}
              for group in case["groups"]]
    params = [p for group in groups for p in group["params"]]
    optimizer = MoClip([{key: value for key, value in group.items() if key != "parameters"} for group in groups],
                       max_angle=case["max_angle"], scope=case["scope"])
    for step in case["steps"]:
        for p, g in zip(params, step["gradients"]):
            p.grad = None if g is None else torch.tensor(g, dtype=dtype)
        optimizer.step()
        close(optimizer.last_angle.flatten().to(dtype), step["angle"])
        assert optimizer.last_clipped.flatten().tolist() == step["clipped"]
        for p, w in zip(params, step["parameters"]):
            close(p.detach(), w)
    for p, final in zip(params, case["final"]):
        assert optimizer.state[p]["step"] == final["step"]
        for key in ("exp_avg", "exp_avg_sq"):
            close(optimizer.state[p][key], final[key], scale=max(map(abs, final[key])))
