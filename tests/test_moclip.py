"""Angle, rotation and optimizer against the plain-loop reference, and MoClip as a citizen of torch.optim."""

import copy
import math
import pickle

import plain_reference as reference
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import vector_pairs
from torch.utils._python_dispatch import TorchDispatchMode

from moclip import MoClip, angle_between, clip_angle

EPS32, EPS64 = 2.0**-23, 2.0**-52
max_angles = st.one_of(st.sampled_from([0.0, math.pi / 4, math.pi / 2, math.pi]), st.floats(0, math.pi))


# ------------------------------------------------------------------------------------------------- angle and rotation

@pytest.mark.parametrize("dtype, eps, scales", [(torch.float64, EPS64, (-150, 150)), (torch.float32, EPS32, (-30, 30))])
@given(data=st.data())
def test_angle_equals_the_reference_at_any_scale(dtype, eps, scales, data):
    u, v = data.draw(vector_pairs(dtype, scales=scales))
    theta = angle_between(u, v)
    assert theta.dtype == dtype and theta.shape == ()
    # a few roundings of vectors of largest entry 1, plus those of n <= 8 terms
    assert theta.item() == pytest.approx(reference.angle_between(u.tolist(), v.tolist()), abs=8 * eps)


@given(st.floats(1e-300, 1e-3), st.booleans())
def test_angle_keeps_its_digits_near_zero_and_pi(delta, opposite):
    u = torch.tensor([1.0, 0.0], dtype=torch.float64)
    v = torch.tensor([-1.0 if opposite else 1.0, math.tan(delta)], dtype=torch.float64)
    expected = math.pi - delta if opposite else delta
    assert angle_between(u, v).item() == pytest.approx(expected, abs=2 * EPS64 * (math.pi if opposite else 1))


def test_angle_of_many_entries_does_not_lose_digits():
    """torch's own float32 norm of 10^7 entries is off by 1e-4: the ratio would be wrong by that much."""
    u = torch.linspace(0.5, 1.5, 10**7).reshape(1000, -1)
    v = u.clone()
    v[::2] *= -1
    u64, v64 = u.double(), v.double()
    expected = math.acos((u64 * v64).sum() / (u64.norm() * v64.norm()))  # near pi/2: accurate there
    assert angle_between(u, v).item() == pytest.approx(expected, abs=16 * EPS32)


def test_zero_vectors_turn_nothing():
    zero, u = torch.zeros(3), torch.tensor([1.0, -2.0, 3.0])
    assert angle_between(zero, u) == angle_between(u, zero) == angle_between(zero, zero) == 0
    assert torch.equal(clip_angle(u, zero, 0.1), u) and torch.equal(clip_angle(zero, u, 0.1), zero)


@pytest.mark.parametrize("dtype, eps", [(torch.float64, EPS64), (torch.float32, EPS32)])
@given(data=st.data(), max_angle=max_angles)
def test_rotation_equals_the_reference(dtype, eps, data, max_angle):
    g, m = data.draw(vector_pairs(dtype))
    expected, theta, clipped, antiparallel = reference.clip_angle(g.tolist(), m.tolist(), max_angle, eps)
    sine = abs(math.sin(theta))
    assume(abs(theta - max_angle) > 16 * eps or not (g.any() and m.any()))  # on one side of the cap for both
    assume(abs(sine - math.sqrt(eps)) > 64 * eps)  # and of the threshold
    mine = clip_angle(g, m, max_angle)
    if not clipped or antiparallel:
        assert torch.equal(mine, g)
    else:  # the orthogonal part of g has relative error eps / sin(theta)
        tolerance = 32 * eps / sine * reference.norm(g.tolist())
        assert mine.tolist() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("scale_g, scale_m", [(1e30, 1.0), (1e-30, 1.0), (1.0, 1e30), (1.0, 1e-30)])
def test_rotation_where_float32_has_no_squares(scale_g, scale_m):
    g, m = torch.tensor([0.0, 2.0]) * scale_g, torch.tensor([1.0, 0.0]) * scale_m
    assert (clip_angle(g, m, math.pi / 6) / scale_g).tolist() == pytest.approx([math.sqrt(3), 1], rel=4 * EPS32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rotated_in_float32(dtype):
    g, m = torch.tensor([0.0, 2.0], dtype=dtype), torch.tensor([1.0, 0.0], dtype=dtype)
    assert clip_angle(g, m, math.pi / 6).dtype == dtype and angle_between(g, m).dtype == torch.float32
    assert torch.equal(clip_angle(g, m, math.pi / 6), torch.tensor([3.0**0.5, 1.0]).to(dtype))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_the_coarser_dtype_decides_what_is_antiparallel(dtypes):
    g, m = (torch.tensor(x, dtype=dtype) for x, dtype in zip(([-1.0, 1e-5], [1.0, 0.0]), dtypes))
    assert torch.equal(clip_angle(g, m, 1.0), g)


@pytest.mark.parametrize("g, m, max_angle, message", [
    (torch.ones(2), torch.ones(3), 1.0, "grad and momentum must have the same shape"),
    (torch.ones(2).long(), torch.ones(2), 1.0, "grad must be a real"),
    (torch.ones(2), torch.ones(2) * 1j, 1.0, "momentum must be a real"),
    (torch.ones(2), torch.ones(2), 3.2, r"max_angle must lie in \[0, pi\]"),
    (torch.ones(2), torch.ones(2), -0.1, "max_angle"), (torch.ones(2), torch.ones(2), math.nan, "max_angle")])
def test_bad_input_to_the_rotation_and_to_the_angle_names_the_argument(g, m, max_angle, message):
    with pytest.raises(ValueError, match="^" + message):
        clip_angle(g, m, max_angle)
    if not message.startswith("max_angle"):
        with pytest.raises(ValueError, match="^" + message.replace("grad", "u").replace("momentum", "v")):
            angle_between(g, m)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_angle_with_a_vector_that_is_not_finite_is_nan_and_rotates_nothing(bad):
    u, v = torch.tensor([bad, 1.0]), torch.tensor([0.0, 1.0])
    assert angle_between(u, v).isnan() and angle_between(v, u).isnan() and angle_between(u, 0 * v).isnan()
    assert torch.equal(clip_angle(u, -v, 0.1).nan_to_num(7.0), u.nan_to_num(7.0))


def test_empty_tensors_have_the_angle_0():
    for empty in torch.zeros(0), torch.zeros(0, 2):
        assert angle_between(empty, empty) == 0 and clip_angle(empty, empty, 0.1).shape == empty.shape


# ----------------------------------------------------------------------------------------------------------- the step

class Pair:
    """The same parameters stepped by MoClip and by the reference."""

    def __init__(self, sizes, groups, max_angle, scope, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.weights = [torch.nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64)) for n in sizes]
        options = [dict(lr=0.01, betas=(0.9, 0.999), a=4 / math.pi, b=1.0, weight_decay=0.0) | group
                   for group in groups]
        halves = [self.weights[i::len(options)] for i in range(len(options))]
        self.optimizer = MoClip([dict(params=half, **option) for half, option in zip(halves, options)],
                                max_angle=max_angle, scope=scope)
        order = [i for k in range(len(options)) for i in range(len(sizes))[k::len(options)]]
        self.order, self.scope, self.max_angle = order, scope, max_angle
        self.plain = [dict(parameter=self.weights[i].tolist(), exp_avg=[0.0] * sizes[i], exp_avg_sq=[0.0] * sizes[i],
                           step=0) for i in order]
        self.options = [o for k, o in enumerate(options) for _ in halves[k]]

    def step(self, grads):
        for i, plain in zip(self.order, self.plain):
            self.weights[i].grad = None if grads[i] is None else torch.tensor(grads[i], dtype=torch.float64)
            plain["gradient"] = grads[i]
        self.optimizer.step()
        reports = reference.moclip_step(self.plain, self.options, self.max_angle, self.scope)
        if reports:
            angles, clipped = zip(*reports)
            assert self.optimizer.last_angle.reshape(-1).tolist() == pytest.approx(angles, abs=1e-13)
            assert self.optimizer.last_clipped.reshape(-1).tolist() == list(clipped)
        for i, plain in zip(self.order, self.plain):
            # each step adds a few eps, of weights near 1 and steps of 0.02
            assert self.weights[i].tolist() == pytest.approx(plain["parameter"], abs=1e-13)
            for key in ("exp_avg", "exp_avg_sq") if plain["step"] else ():
                assert self.optimizer.state[self.weights[i]][key].tolist() == pytest.approx(
                    plain[key], rel=1e-12, abs=1e-13)
        return reports


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("max_angle", [0.3, math.pi / 4, math.pi / 2, math.pi])
@pytest.mark.parametrize("groups", [
    [{}], [dict(weight_decay=0.1)],
    [dict(lr=0.03, betas=(0.5, 0.9)), dict(b=2.0, a=1.0, betas=(0.0, 0.99))]])
def test_trajectory_equals_the_reference(scope, max_angle, groups):
    pair = Pair([3, 1, 4, 2], groups, max_angle, scope)
    generator = torch.Generator().manual_seed(1)
    draw = lambda n, scale: (scale * torch.randn(n, generator=generator, dtype=torch.float64)).tolist()
    seen = []
    for t in range(30):
        grads = [draw(n, 10.0 ** (t % 5 - 2)) for n in (3, 1, 4, 2)]
        if t % 7 == 3:
            grads[0] = None  # no gradient: neither stepped nor part of the angle
        if t % 11 == 5:
            grads[2] = [0.0] * 4
        if t < 4:
            grads[1] = None  # frozen, unfrozen later: its own step count
        seen += pair.step(grads)
    assert max_angle == math.pi or any(clipped for _, clipped in seen)
    assert any(not clipped for _, clipped in seen)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_an_antiparallel_gradient_restarts_the_momentum(scope):
    pair = Pair([1, 1] if scope == "tensor" else [1], [{}], math.pi / 2, scope)
    ones = [[1.0], [1.0]][:len(pair.weights)]
    for _ in range(5):
        pair.step(ones)
    pair.step([[-2.0], *ones[1:]])
    state = pair.optimizer.state[pair.weights[0]]
    # (1 - beta1) g: nothing is left of before
    assert state["exp_avg"].item() == pytest.approx(-0.2) and state["step"] == 6
    assert pair.optimizer.last_clipped.reshape(-1)[0] and pair.optimizer.last_angle.reshape(-1)[0] == math.pi
    if scope == "tensor":
        # the other scope goes on
        assert pair.optimizer.state[pair.weights[1]]["exp_avg"].item() == pytest.approx(1 - 0.9**6)


def test_every_group_has_its_own_cap_in_tensor_scope():
    groups = [dict(params=[torch.nn.Parameter(torch.zeros(2))], max_angle=cap) for cap in (1.0, 0.5)]
    optimizer = MoClip(groups, scope="tensor", betas=(0.5, 0.9))
    for g in torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0]):  # 45 degrees from the momentum (1, 0)
        for group in groups:
            group["params"][0].grad = g.clone()
        optimizer.step()
    assert optimizer.last_clipped.tolist() == [False, True]


def train(optimizer, weights, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for w in weights:
            w.grad = torch.randn(w.shape, generator=generator).to(w.dtype)
        optimizer.step()


def test_defaults_are_those_of_the_docstring():
    assert MoClip([torch.zeros(1)]).defaults == dict(lr=1e-3, betas=(0.9, 0.999), max_angle=math.pi / 2,
                                                     a=4 / math.pi, b=1.0, weight_decay=0.0, scope="global")


def test_the_first_step_reports_no_angle_and_moves_by_lr():
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = MoClip([w], lr=0.125)
    w.grad = torch.tensor([1e-3, -1e3])
    optimizer.step()
    assert torch.equal(w, torch.tensor([0.875, 2.125])) and optimizer.last_angle == 0 and not optimizer.last_clipped


@pytest.mark.parametrize("size_g, size_m, seen", [(1e-18, 1.0, True), (1e-25, 1.0, False), (1e-25, 1e-15, False),
                                                  (1.0, 1e-22, False), (1e25, 1.0, False)])
def test_a_vector_whose_square_float32_lacks_has_no_angle_and_restarts_nothing(size_g, size_m, seen):
    w = torch.nn.Parameter(torch.zeros(2))
    optimizer = MoClip([w], betas=(0.5, 0.9), max_angle=1.0)
    for g in torch.tensor([2 * size_m, 0.0]), torch.tensor([-size_g, 2 * size_g]):
        m, w.grad = size_m * torch.tensor([1.0, 0.0]), g
        optimizer.step()
    assert optimizer.last_angle.item() == pytest.approx(math.atan2(2, -1) * seen, abs=8 * EPS32)
    assert optimizer.last_clipped == seen and (seen or torch.equal(optimizer.state[w]["exp_avg"], (m + g) / 2))


def test_in_one_scope_the_coarser_dtype_decides_which_squares_are_lost():
    weights = [torch.nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    optimizer = MoClip(weights)
    for g in [1e-25, 0.0], [0.0, 1e-25]:
        for w in weights:
            w.grad = torch.tensor(g, dtype=w.dtype)
        optimizer.step()
    assert optimizer.last_angle == 0  # of two halves of one vector one has no square in float32


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("first", [True, False])
def test_once_a_gradient_was_not_finite_the_angle_is_nan_at_every_later_step(bad, scope, first):
    hit, other = weights = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    optimizer = MoClip(weights, max_angle=0.5, scope=scope)
    if not first:
        train(optimizer, weights, 3)
        assert not optimizer.last_angle.isnan().any()
    for steps in range(4):
        for w in weights:
            w.grad = torch.ones_like(w)
        if steps == 0:
            hit.grad[0] = bad
        optimizer.step()
        # one angle over both, or that of `hit` alone
        expected = [True] if scope == "global" else [True, False]
        assert optimizer.last_angle.isnan().reshape(-1).tolist() == expected
        assert not optimizer.last_clipped.reshape(-1)[0]
    assert not optimizer.state[hit]["exp_avg"].isfinite().all() and other.isfinite().all()
    assert hit[1].isfinite()  # as in Adam, coordinate by coordinate


def test_what_is_antiparallel_is_decided_in_the_precision_of_the_arithmetic_not_of_the_gradient():
    """177 degrees: less than sqrt(eps) of bfloat16 away from pi, but the rotation is computed in float32."""
    w = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = MoClip([w], betas=(0.5, 0.9))
    for g in [2.0, 0.0], [-1.0, 0.05]:
        w.grad = torch.tensor(g, dtype=torch.bfloat16)
        optimizer.step()
    # m = (1, 0), then half of it and half of |g| (0, 1); a restart would leave half of g, (-0.5, 0.025)
    expected = [0.5, 0.5 * w.grad.float().norm().item()]
    assert optimizer.state[w]["exp_avg"].tolist() == pytest.approx(expected, abs=8 * EPS32)


@pytest.mark.parametrize("dtype, state_dtype", [
    (torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_state_is_adams_and_wide(dtype, state_dtype):
    w = torch.nn.Parameter(torch.ones(2, 3, dtype=dtype))
    optimizer = MoClip([w])
    train(optimizer, [w], 2)
    assert {key: (x.dtype, x.shape) for key, x in optimizer.state[w].items()} == {
        "step": (torch.float32, ()), "exp_avg": (state_dtype, w.shape), "exp_avg_sq": (state_dtype, w.shape)}
    assert w.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_half_precision_parameters_take_the_float32_step_rounded_once(dtype, weight_decay):
    wide, half = torch.nn.Parameter(torch.ones(64)), torch.nn.Parameter(torch.ones(64, dtype=dtype))
    options = dict(lr=1 / 17, weight_decay=weight_decay, max_angle=1.2)
    first, second = MoClip([wide], **options), MoClip([half], **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        half.grad = torch.randn(64, generator=generator).to(dtype)
        wide.data, wide.grad = half.detach().float(), half.grad.float()  # from the same weights
        first.step(), second.step()
        assert torch.equal(wide.to(dtype), half)
        assert all(torch.equal(first.state[wide][key], x) for key, x in second.state[half].items())
    assert first.last_clipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copy_optimizer", [
    lambda optimizer, weights: copy.deepcopy(optimizer),
    lambda optimizer, weights: pickle.loads(pickle.dumps(optimizer)),
    lambda optimizer, weights: restored(optimizer, weights)], ids=["deepcopy", "pickle", "state_dict"])
def test_a_copy_continues_bit_for_bit(dtype, copy_optimizer):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(3, dtype=dtype)), torch.nn.Parameter(torch.randn(2, 2, dtype=dtype))]
    optimizer = MoClip(weights, lr=0.1, max_angle=0.7, scope="tensor", weight_decay=0.1)
    train(optimizer, weights, 5)
    other = copy_optimizer(optimizer, weights)
    others = [p for group in other.param_groups for p in group["params"]]
    train(optimizer, weights, 5, seed=1)
    train(other, others, 5, seed=1)
    assert all(torch.equal(a, b) and a is not b for a, b in zip(weights, others))
    assert (torch.equal(optimizer.last_angle, other.last_angle)
            and torch.equal(optimizer.last_clipped, other.last_clipped))


def restored(optimizer, weights):
    clones = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    other = MoClip(clones, scope="tensor")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other


def test_loading_copies_the_moments_and_takes_a_parameter_without_state():
    a, b = weights = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))]
    optimizer = MoClip(weights, lr=0.1)
    train(optimizer, [a], 2)  # b has no state yet
    saved = optimizer.state_dict()
    moment = saved["state"][0]["exp_avg"].clone()
    other = MoClip([torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))])
    other.load_state_dict(saved)
    first, second = other.param_groups[0]["params"]
    train(other, [first, second], 1)
    assert torch.equal(saved["state"][0]["exp_avg"], moment)  # the step of `other` is not felt in `optimizer`
    assert [other.state[p]["step"].item() for p in (first, second)] == [3, 1]


@pytest.mark.parametrize("step", [5, 5.0, torch.tensor(5), torch.tensor(5.0, dtype=torch.float64)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_of_adamw_is_one_of_moclip_and_back(dtype, step):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(3).to(dtype)), torch.nn.Parameter(torch.randn(2, 2).to(dtype))]
    adamw = torch.optim.AdamW([dict(params=weights[:1], lr=0.3), dict(params=weights[1:], betas=(0.5, 0.75))])
    train(adamw, weights, 5)
    saved = copy.deepcopy(adamw.state_dict())
    for state in saved["state"].values():
        state["step"] = step
    optimizer = MoClip([dict(params=weights[:1], a=0.5), dict(params=weights[1:])], max_angle=0.25)
    optimizer.load_state_dict(saved)
    # AdamW's options where it has one, else MoClip's own, of the group
    assert [[group[name] for name in ("lr", "betas", "weight_decay", "max_angle", "a", "b", "scope")]
            for group in optimizer.param_groups] == [[0.3, (0.9, 0.999), 0.01, 0.25, 0.5, 1.0, "global"],
                                                     [1e-3, (0.5, 0.75), 0.01, 0.25, 4 / math.pi, 1.0, "global"]]
    for w in weights:
        ours, theirs = optimizer.state[w], adamw.state[w]
        assert ours["step"].dtype == ours["exp_avg"].dtype == ours["exp_avg_sq"].dtype == torch.float32
        assert ours["step"] == 5
        assert all(torch.equal(ours[key], theirs[key].float()) for key in ("exp_avg", "exp_avg_sq"))
    train(optimizer, weights, 1)
    back = torch.optim.AdamW([dict(params=weights[:1]), dict(params=weights[1:])])
    back.load_state_dict(optimizer.state_dict() | {"param_groups": back.state_dict()["param_groups"]})
    assert all(torch.equal(back.state[w][key], optimizer.state[w][key].to(dtype)) and back.state[w]["step"] == 6
               for w in weights for key in ("exp_avg", "exp_avg_sq"))
    train(back, weights, 1)


@pytest.mark.parametrize("other, message", [
    (lambda ws: torch.optim.SGD(ws, momentum=0.9), "state of parameter 0 must have 'step'"),
    (lambda ws: torch.optim.Adagrad(ws), "state of parameter 0 must have 'exp_avg'"),
    (lambda ws: torch.optim.Adamax(ws), "state of parameter 0 must have 'exp_avg_sq'"),
    (lambda ws: torch.optim.AdamW([torch.nn.Parameter(torch.ones(2)), ws[1]]), "state of parameter 0 must have 'exp_a"),
    (lambda ws: torch.optim.AdamW(ws, maximize=True), "maximize must be False"),
    (lambda ws: torch.optim.AdamW([dict(params=[w]) for w in ws]), "loaded state dict has a different number"),
    (lambda ws: MoClip(ws, scope="tensor"), 'scope must be "global" with a shard_group')])
def test_another_state_is_refused_by_name_on_loading_and_nothing_has_changed(other, message):
    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    optimizer = MoClip(weights)
    train(optimizer, weights, 1)
    if "shard_group" in message:
        optimizer.shard_group = object()  # no process group is asked for anything before a step
    before = copy.deepcopy(optimizer.state_dict())
    theirs = other(weights)
    train(theirs, [p for group in theirs.param_groups for p in group["params"]], 1)
    with pytest.raises(ValueError, match="^" + message):
        optimizer.load_state_dict(theirs.state_dict())
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"] and all(
        torch.equal(before["state"][i][key], x) for i in (0, 1) for key, x in after["state"][i].items())


def test_schedulers_closures_and_added_groups():
    w, late = torch.nn.Parameter(torch.tensor([1.0])), torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = MoClip([w], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.add_param_group(dict(params=[late], lr=0.4))

    def closure():
        optimizer.zero_grad(set_to_none=True)
        loss = (w + late).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2.0
    assert w.item() == pytest.approx(0.9) and late.item() == pytest.approx(0.6)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("options, message", [
    (dict(lr=-1.0), "lr must"), (dict(lr=math.nan), "lr must"), (dict(lr=math.inf), "lr must"),
    (dict(lr=torch.ones(1)), "lr must be one finite number >= 0, got tensor"),
    (dict(weight_decay=-0.1), "weight_decay must"), (dict(weight_decay=math.inf), "weight_decay must"),
    (dict(a=0.0), "a must"), (dict(b=math.inf), "b must"),
    (dict(betas=(0.9, 1.0)), "betas must"), (dict(betas=(-0.1, 0.9)), "betas must"), (dict(betas=(0.9,)), "betas must"),
    (dict(max_angle=90), "max_angle must lie in"), (dict(max_angle=-0.1), "max_angle"),
    (dict(scope="layer"), "scope must be")])
def test_bad_hyperparameters(options, message):
    with pytest.raises(ValueError, match="^" + message):
        MoClip([torch.nn.Parameter(torch.ones(1))], **options)


@pytest.mark.parametrize("group, message", [
    (dict(lr=-1), "lr"), (dict(scope="tensor"), "scope must be one for all"),
    (dict(max_angle=0.1), r'max_angle must be one for all if scope="global", got 0\.1$')])
def test_a_refused_group_leaves_the_optimizer_as_it_was(group, message):
    optimizer = MoClip([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="^" + message):
        optimizer.add_param_group(dict(params=[torch.nn.Parameter(torch.ones(1))], **group))
    assert len(optimizer.param_groups) == 1
    MoClip([dict(params=[torch.nn.Parameter(torch.ones(1))], max_angle=x) for x in (0.1, 0.2)],  # own caps
           scope="tensor")


def test_complex_and_sparse_are_refused():
    with pytest.raises(ValueError, match="^params must be real, got a complex parameter$"):
        MoClip([torch.nn.Parameter(torch.ones(1, dtype=torch.complex64))])
    w = torch.nn.Parameter(torch.ones(3))
    w.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=False)
    optimizer = MoClip([w])
    with pytest.raises(ValueError, match="^gradients must be dense, got a sparse one$"):
        optimizer.step()
    assert not optimizer.state[w] and torch.equal(w, torch.ones(3))


class NoSync(TorchDispatchMode):
    """Fails on what waits for the device: reading a value on the host, or a shape that depends on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.__name__.split(".")[0] not in (
            "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("lr", [1e-3, torch.tensor(1e-3)], ids=["float", "tensor"])
def test_a_step_never_reads_a_value_on_the_host(scope, lr):
    weights = [torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2, 2))]
    optimizer = MoClip(weights, lr=lr, max_angle=0.2, weight_decay=0.1, scope=scope)
    with NoSync():
        train(optimizer, weights, 3)
    assert optimizer.last_clipped.any()
