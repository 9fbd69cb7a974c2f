"""M1 to M11 of THEORY.md: for each statement the property, a tight case, and what fails without an assumption.

Everything is float64 and goes through the project's functions; the other side of each equation is computed here (M7's
and M8's steady state and M11's ratios in experiments/theory.py).
Tolerances are multiples of EPS with the reason beside them; simulations are seeded.
"""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_theory_map import section, table_rows

from experiments.theory import batch_cosine, batch_ratio, orbit_radius, steady_ratio, steady_turn
from moclip import MoClip, angle_between, clip_angle

EPS = float(np.finfo(np.float64).eps)
HALF_PI = math.pi / 2

angles = st.just(0.0) | st.floats(1e-6, math.pi)  # between, the square of a rotated gradient may underflow


def decays(largest):
    """A beta: 0 or at least 0.01, so that its powers do not underflow within a dozen steps."""
    return st.just(0.0) | st.floats(0.01, largest)


def unit(x):
    return x / np.linalg.norm(x)


def plane_angle(u, v):
    """atan2(component of v orthogonal to u, component along u): not the formula of the code under test."""
    along = unit(u) @ v
    return math.atan2(np.linalg.norm(v - along * unit(u)), along)


@st.composite
def pairs(draw, theta=st.floats(1e-3, math.pi - 1e-3)):
    """(g, m, theta) in 2 to 6 dimensions at a known angle, norms from 1e-6 to 1e6."""
    n = draw(st.integers(2, 6))
    basis = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).normal(size=(2, n))
    m_hat, angle = unit(basis[0]), draw(theta)
    u = unit(basis[1] - basis[1] @ m_hat * m_hat)
    u = unit(u - u @ m_hat * m_hat)  # once more: orthogonal to rounding
    norms = draw(st.tuples(*[st.sampled_from([1e-6, 0.3, 1.0, 7.0, 1e6])] * 2))
    return norms[0] * (math.cos(angle) * m_hat + math.sin(angle) * u), norms[1] * m_hat, angle


def clip(g, m, max_angle):
    return clip_angle(torch.tensor(g), torch.tensor(m), max_angle).numpy()


def run(gradients, cuts=(), **options):
    """Feed gradients (T, n) to MoClip at w = 0: (updates (T, n), momenta (T, n), optimizer). Without weight decay the
    updates depend on the gradients alone, and w = 0 before each step lets them be read without rounding.
    cuts: where to cut each gradient into the tensors of one scope; none: one tensor."""
    ws = [torch.nn.Parameter(torch.tensor(x)) for x in np.split(np.zeros(len(gradients[0])), cuts)]
    optimizer, updates, momenta = MoClip(ws, **options), [], []
    for g in gradients:
        for w, x in zip(ws, np.split(np.asarray(g, dtype=np.float64), cuts)):
            w.data.zero_()
            w.grad = torch.tensor(x)
        optimizer.step()
        updates.append(-torch.cat([w.detach() for w in ws]).numpy())
        momenta.append(torch.cat([optimizer.state[w]["exp_avg"] for w in ws]).numpy())
    return np.array(updates), np.array(momenta), optimizer


def several_tensors(n):
    """Where to cut n numbers into one, two or n tensors (n = 1: one)."""
    return st.sampled_from([(), (1,), tuple(range(1, n))]) if n > 1 else st.just(())


def entries(low, high):
    """Numbers whose squares do not underflow: nothing below 1e-6 but 0."""
    return st.floats(low, high).map(lambda x: 0.0 if abs(x) < 1e-6 else x)


gradient_sequences = st.tuples(st.integers(1, 12), st.integers(1, 4)).flatmap(
    lambda shape: hnp.arrays(np.float64, shape, elements=entries(-1, 1)))


# -- M1, M2: the rotation --------------------------------------------------------------------------------------------

@given(pairs(), angles)
def test_m1_rotation_caps_the_angle_and_keeps_the_norm(pair, max_angle):
    g, m, theta = pair
    rotated = clip(g, m, max_angle)
    tol = 16 * EPS / math.sin(theta)  # the direction u is known to eps / sin(theta): it survives a subtraction
    assert plane_angle(m, rotated) == pytest.approx(min(theta, max_angle), abs=tol)
    assert float(angle_between(torch.tensor(rotated), torch.tensor(m))) == pytest.approx(min(theta, max_angle), abs=tol)
    assert np.linalg.norm(rotated) == pytest.approx(np.linalg.norm(g), rel=tol, abs=0)
    assert np.linalg.matrix_rank(np.stack([unit(g), unit(m), unit(rotated)]), tol=tol) <= 2  # stays in the plane
    if theta < max_angle - tol:
        assert (rotated == g).all()  # entry by entry, -0 and +0 being equal


@given(pairs(), angles, st.data())
def test_m1_holds_for_the_gradient_that_enters_the_momentum_of_MoClip(pair, max_angle, data):
    g, m, theta = pair
    beta1, cuts = 0.5, data.draw(several_tensors(len(g)))  # one global scope, however many tensors it is cut into
    _, momenta, optimizer = run([2 * m, g], cuts, betas=(beta1, 0.9), max_angle=max_angle)  # after step 1: momentum m
    entered = (momenta[1] - beta1 * momenta[0]) / (1 - beta1)
    tol = 16 * EPS * (1 + np.linalg.norm(m) / np.linalg.norm(g)) / math.sin(theta)  # g~ is recovered by a subtraction
    if tol < 1e-3:
        assert plane_angle(m, entered) == pytest.approx(min(theta, max_angle), abs=tol)
        assert np.linalg.norm(entered) == pytest.approx(np.linalg.norm(g), rel=tol, abs=0)
        excess = max(theta - max_angle, 0)  # M2: nothing of that norm within the cap is closer to g
        assert plane_angle(g, entered) == pytest.approx(excess, abs=tol)
        assert np.linalg.norm(entered - g) <= (2 * math.sin(excess / 2) + 2 * tol) * np.linalg.norm(g)
    assert float(optimizer.last_angle) == pytest.approx(theta, abs=16 * EPS)
    if abs(theta - max_angle) > 16 * EPS:
        assert bool(optimizer.last_clipped) == (theta > max_angle)


@pytest.mark.parametrize("dtype, digits", [(torch.float64, 2.0**-26), (torch.float32, 2.0**-11.5)])  # sqrt(eps)
@pytest.mark.parametrize("max_angle", [0.0, 0.5, HALF_PI, 3.0])
def test_m1_antiparallel_begins_where_the_sine_is_the_square_root_of_eps(dtype, digits, max_angle):
    m = torch.tensor([1.0, 0.0], dtype=dtype)
    for sine, passes in ((digits * 0.99, True), (digits * 1.01, False)):
        g = torch.tensor([-1.0, sine], dtype=dtype)
        rotated = clip_angle(g, m, max_angle)
        w = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
        optimizer = MoClip([w], betas=(0.5, 0.9), max_angle=max_angle)
        for x in (2 * m, g):
            w.grad = x.clone()
            optimizer.step()
        momentum = optimizer.state[w]["exp_avg"]
        if passes:
            assert torch.equal(rotated, g) and torch.equal(momentum, g / 2)  # as it is; the momentum restarts
        else:  # half of the digits of the plane are left
            np.testing.assert_allclose(rotated, [math.cos(max_angle), math.sin(max_angle)], rtol=0, atol=2 * digits)
            np.testing.assert_allclose(momentum, (m + rotated) / 2, rtol=0, atol=2 * digits)
    # and nothing near zero is antiparallel: parallel vectors are rotated to a cap of 0
    g = torch.tensor([1.0, digits / 2], dtype=dtype)
    assert clip_angle(g, m, 0.0)[1] < digits / 1000


@given(st.floats(0.1, 10), st.floats(0, 3.1), st.floats(0.1, 10), several_tensors(3))
def test_m1_false_for_antiparallel_vectors_which_pass_and_restart_the_momentum(size, max_angle, momentum, cuts):
    direction = np.array([1.0, -0.5, 2.0])
    m, g = momentum * direction, -size * direction
    assert (clip(g, m, max_angle) == g).all()  # still at pi: the cap is broken, no plane to rotate in
    _, momenta, _ = run([m, g], cuts, betas=(0.9, 0.9), max_angle=max_angle)  # all tensors of the scope restart
    np.testing.assert_allclose(momenta[1], (1 - 0.9) * g, rtol=2 * EPS)  # no trace of m: nothing to hold an angle with


@given(pairs(), angles, st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_m2_rotated_gradient_is_the_best_vector_of_its_norm_in_the_cone(pair, max_angle, fraction, seed):
    g, m, theta = pair
    rotated, size, m_hat = clip(g, m, max_angle), np.linalg.norm(g), unit(m)
    tol = 16 * EPS / math.sin(theta)
    excess = max(theta - max_angle, 0)
    assert plane_angle(g, rotated) == pytest.approx(excess, abs=tol)
    assert rotated @ g / size**2 == pytest.approx(math.cos(excess), abs=tol)
    other = np.random.default_rng([seed, 1]).normal(size=len(g))  # [.., 1]: not the stream that made g and m
    other = unit(other - other @ m_hat * m_hat)
    rival = size * (math.cos(fraction * max_angle) * m_hat + math.sin(fraction * max_angle) * other)
    assert rival @ g <= rotated @ g + tol * size**2


@given(st.floats(0.1, 3), st.floats(0, 2 * math.pi))
def test_m2_not_unique_for_antiparallel_vectors(max_angle, azimuth):
    g, m_hat = np.array([-1.0, 0.0, 0.0]), np.array([1.0, 0.0, 0.0])
    around = np.array([0.0, math.cos(azimuth), math.sin(azimuth)])
    rival = math.cos(max_angle) * m_hat + math.sin(max_angle) * around
    assert rival @ g == pytest.approx(math.cos(math.pi - max_angle), abs=4 * EPS)  # every azimuth is equally good
    assert (clip(g, m_hat, max_angle) == g).all()  # so none is chosen


# -- M3: turning -----------------------------------------------------------------------------------------------------

@given(pairs(), angles, st.floats(0.01, 0.99), st.data())
def test_m3_momentum_turns_by_the_stated_angle_and_no_more_than_the_cap(pair, max_angle, beta1, data):
    g, m, theta = pair
    cuts = data.draw(several_tensors(len(g)))
    _, momenta, _ = run([m / (1 - beta1), g], cuts, betas=(beta1, 0.9), max_angle=max_angle)
    phi, old, new = min(theta, max_angle), beta1 * np.linalg.norm(m), (1 - beta1) * np.linalg.norm(g)
    turn = plane_angle(momenta[0], momenta[1])
    length = math.hypot(new * math.sin(phi), old + new * math.cos(phi))
    tol = 64 * EPS / math.sin(theta) * (old + new) / length  # as M1, worse where the two parts of m cancel
    assert turn == pytest.approx(math.atan2(new * math.sin(phi), old + new * math.cos(phi)), abs=tol)
    assert turn <= phi + tol
    if new < old:
        assert turn <= math.asin(new / old) + tol  # however far the gradient turned, cap or no cap


@given(st.floats(0.05, 1.5))
def test_m3_tight_turning_by_pi_takes_ceil_pi_over_max_angle_steps(max_angle):
    assume(abs(math.pi / max_angle - round(math.pi / max_angle)) > 1e-6)  # where ceil is not decided by rounding
    target, needed = np.array([math.cos(math.pi - 1e-7), math.sin(math.pi - 1e-7)]), math.ceil(math.pi / max_angle)
    start = np.array([1.0, 0.0])
    _, momenta, _ = run([start] + [target] * needed, betas=(0.0, 0.9), max_angle=max_angle)
    turned = [plane_angle(start, m) for m in momenta[1:]]
    for k, angle in enumerate(turned, start=1):  # beta1 = 0: every step turns by the cap exactly
        assert angle == pytest.approx(min(k * max_angle, math.pi - 1e-7), abs=1e-8)  # eps / 1e-7, the first sin(theta)


@pytest.mark.parametrize("cap, turn", [(math.pi, 6.4), (math.radians(30), 2.9), (math.radians(10), 1.0)])
def test_m3_tight_the_largest_turn_of_the_momentum_at_equal_lengths_is_that_of_the_text(cap, turn):
    most = 0.0
    for theta in np.linspace(0.01, 3.1, 400):
        g = np.array([math.cos(theta), math.sin(theta)])
        momenta = run([[10.0, 0.0], g], betas=(0.9, 0.99), max_angle=cap)[1]  # |m| = 1 after the first
        most = max(most, math.degrees(plane_angle(momenta[0], momenta[1])))
    assert most == pytest.approx(turn, abs=0.05)
    assert most <= math.degrees(math.asin(0.1 / 0.9)) and (cap < 3 or most > math.degrees(math.asin(0.1 / 0.9)) - 1e-3)


def test_m3_false_through_a_restart_or_a_vanished_momentum():
    _, momenta, _ = run([[1.0], [-1.0]], betas=(0.5, 0.9), max_angle=0.1)
    assert momenta[0] > 0 > momenta[1]  # turned by pi in one step: antiparallel, restarted
    _, momenta, _ = run([[1.0, 0.0], [0.0, 0.0], [-1.0, 1.0]], betas=(0.0, 0.9), max_angle=0.1)
    assert plane_angle(momenta[0], momenta[2]) > 2  # the zero gradient emptied the momentum: nothing to turn from


def test_m3_false_for_a_group_with_its_own_betas_or_a_parameter_left_out():
    def turn(betas, *gradients):
        ps = [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in betas]
        optimizer = MoClip([dict(params=[p], betas=(beta, 0.9)) for p, beta in zip(ps, betas)], max_angle=0.05)
        for gs in gradients:
            for p, g in zip(ps, gs):
                p.grad = None if g is None else torch.tensor([g], dtype=torch.float64)
            before = [optimizer.state[p]["exp_avg"].clone() for p in ps if optimizer.state[p]]
            optimizer.step()
        assert not optimizer.last_clipped  # nothing to rotate
        return plane_angle(torch.cat(before).numpy(), torch.cat([optimizer.state[p]["exp_avg"] for p in ps]).numpy())

    second = [0.01, 0.001]  # parallel to the momentum (1, 0.1) of two betas, 0 and 0.9
    assert turn((0.0, 0.9), [1.0, 1.0], second) > 1
    assert turn((0.5, 0.5), [1.0, 1.0], [1.0, None]) > 0.1
    assert turn((0.5, 0.5), [1.0, 0.1], second) < 4 * EPS  # one beta, all there


def test_m3_the_step_may_turn_where_the_momentum_hardly_does():
    updates, momenta, optimizer = run([[1.0, 0.01], [1.0, -0.01]], betas=(0.0, 0.0), max_angle=0.05)
    assert not optimizer.last_clipped
    assert plane_angle(momenta[0], momenta[1]) < 0.021
    assert plane_angle(updates[0], updates[1]) == pytest.approx(HALF_PI, abs=4 * EPS)  # signs: (1, 1), then (1, -1)


# -- M4: bounded updates ---------------------------------------------------------------------------------------------

def weights(beta, t):
    """Bias-corrected weights of gradients 1 ... t in a moving average."""
    k = np.arange(t - 1, -1, -1)
    return (1 - beta) * beta**k / (1 - beta**t)


def C_squared(beta1, beta2, t):
    """sum of w_k^2 / s_k, written with one power per term so that nothing underflows to 0 / 0."""
    scale = (1 - beta1)**2 * (1 - beta2**t) / ((1 - beta2) * (1 - beta1**t)**2)
    return float(scale * ((beta1**2 / beta2)**np.arange(t)).sum())


def C_squared_limit(beta1, beta2):
    return (1 - beta1)**2 * beta2 / ((1 - beta2) * (beta2 - beta1**2))


def rounding(betas, t):
    """Relative error of C_t and of an update: t-fold products, and 1 - beta^t loses the digits of 1 / (1 - beta)."""
    return (64 * t + 4 / (1 - max(betas))) * EPS


betas_pairs = st.tuples(decays(0.99), st.floats(0.1, 0.9999))


@given(gradient_sequences, betas_pairs, angles, st.floats(0.1, 10), st.floats(0.1, 10))
def test_m4_no_update_exceeds_the_bounds_whatever_the_gradients(gradients, betas, max_angle, a, b):
    updates, _, _ = run(gradients, lr=0.1, betas=betas, max_angle=max_angle, a=a, b=b)
    for t, update in enumerate(updates, start=1):
        sharp = 0.1 * a * math.atan(math.sqrt(C_squared(*betas, t)) / b)
        assert abs(update).max() <= sharp * (1 + rounding(betas, t))
        assert sharp <= 0.1 * a * HALF_PI
        if betas[0]**2 < betas[1] * 0.999:
            assert C_squared(*betas, t) <= C_squared_limit(*betas) * (1 + 1e-9)  # 1 - beta1^2 / beta2 loses digits


@given(betas_pairs, angles, st.integers(1, 15), st.floats(0.2, 5), st.lists(st.floats(0.1, 3), min_size=1, max_size=3),
       st.lists(st.sampled_from([-1.0, 1.0]), min_size=3, max_size=3))
def test_m4_tight_gradients_proportional_to_the_weight_ratio_reach_the_bound(betas, max_angle, t, b, sizes, signs):
    assume(betas[0] == 0 and t == 1 or betas[0] > 0.05)  # w_i / s_i must not underflow
    profile = weights(betas[0], t) / weights(betas[1], t)  # one ray: parallel gradients are never clipped
    updates, _, optimizer = run(np.outer(profile, np.array(sizes) * signs[:len(sizes)]), lr=0.1, betas=betas,
                                max_angle=max(max_angle, 1e-6), a=1.0, b=b)
    bound = 0.1 * math.atan(math.sqrt(C_squared(*betas, t)) / b)
    np.testing.assert_allclose(abs(updates[-1]), bound, rtol=rounding(betas, t))
    assert not optimizer.last_clipped


@given(angles)
def test_m4_tight_the_arctangent_bound_is_approached_when_beta1_squared_exceeds_beta2(max_angle):
    beta1, beta2 = 0.9, 0.5  # beta1^2 > beta2: C_t grows without bound, and the update towards lr a pi / 2
    t = 60
    profile = weights(beta1, t) / weights(beta2, t)
    updates, _, _ = run((profile / profile.max())[:, None], lr=1.0, betas=(beta1, beta2), max_angle=max_angle, a=1.0)
    assert HALF_PI - 1e-4 < updates[-1, 0] < HALF_PI
    updates, *_ = run([[1.0], [0.0]], lr=1.0, betas=(0.9, 0.0), max_angle=max_angle, a=1.0)
    assert updates[-1, 0] == HALF_PI  # beta2 = 0: v has forgotten what m remembers


@given(st.floats(-30, 30), st.floats(-30, 30), st.floats(0, 1))
def test_m4_the_function_behind_monotonicity_is_convex_and_the_slope_of_log_one_minus_exp(u, v, weight):
    def phi(x):
        return 1.0 if x == 0 else x / math.expm1(x)
    chord = weight * phi(u) + (1 - weight) * phi(v)
    assert phi(weight * u + (1 - weight) * v) <= chord + 64 * EPS * (1 + abs(u) + abs(v))
    if 0.01 < abs(u) < 5:  # d/dt log |1 - e^(-x t)| = phi(x t) / t, at t = 1, by a central difference
        f = lambda t: math.log(abs(math.expm1(-u * t)))  # noqa: E731
        assert (f(1 + 1e-5) - f(1 - 1e-5)) / 2e-5 == pytest.approx(phi(u), rel=1e-4, abs=1e-9)


@given(betas_pairs, st.integers(1, 60))
def test_m4_C_is_the_ratio_of_weights_and_never_decreases(betas, t):
    assume(betas[0] == 0 and t == 1 or betas[0] > 0.05)  # the weights must not underflow
    C2, w, s = C_squared(*betas, t), weights(betas[0], t), weights(betas[1], t)
    assert C2 == pytest.approx((w**2 / s).sum(), rel=rounding(betas, t), abs=0)
    assert C2 == pytest.approx(1 + ((w - s)**2 / s).sum(), rel=rounding(betas, t), abs=0)  # 1 + chi-squared distance
    assert C_squared(*betas, t + 1) >= C2 * (1 - rounding(betas, t))


def test_m4_C_is_bounded_iff_beta1_squared_is_below_beta2_and_one_iff_the_betas_agree():
    for beta1, beta2 in ((0.9, 0.999), (0.5, 0.3), (0.3, 0.1), (0.0, 0.9), (0.95, 0.999)):
        assert C_squared(beta1, beta2, 30_000) == pytest.approx(C_squared_limit(beta1, beta2), rel=1e-9)
    for t in (1, 10, 1000):  # at beta1^2 = beta2 it grows like t, above it like a power
        assert C_squared(0.5, 0.25, t) == pytest.approx(t / 3 * (1 + 0.5**t) / (1 - 0.5**t), rel=64 * EPS, abs=0)
    assert C_squared(0.9, 0.8, 1000) > 1000 * C_squared(0.9, 0.8, 300) > 1000 * 100
    assert C_squared(0.97, 0.97, 50) == pytest.approx(1, rel=64 * EPS, abs=0) and C_squared(0.96, 0.97, 50) > 1.001
    C = math.sqrt(C_squared_limit(0.9, 0.999))
    assert C == pytest.approx(7.270, abs=5e-4)
    assert 4 / math.pi * math.atan(C) == pytest.approx(1.826, abs=5e-4)  # the defaults: 1.826 lr at most, not 2 lr
    profile = (0.9 / 0.999)**np.arange(499, -1, -1)  # and MoClip with its defaults goes there
    assert run(profile[:, None], lr=1.0)[0][-1, 0] == pytest.approx(
        4 / math.pi * math.atan(math.sqrt(C_squared(0.9, 0.999, 500))), rel=500 * 64 * EPS, abs=0)


@given(gradient_sequences, decays(0.99))
def test_m4_equal_betas_never_move_a_coordinate_by_more_than_lr(gradients, beta):
    updates, _, _ = run(gradients, lr=0.1, betas=(beta, beta))
    assert abs(updates).max() <= 0.1 * (1 + 256 * EPS)


def test_m4_false_for_betas_that_change_between_steps():
    w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = MoClip([w], lr=1.0, betas=(0.9, 0.9))
    for g, beta in ((1.0, 0.9), (0.0, 0.99)):  # equal at each step, so lr would be the bound
        optimizer.param_groups[0]["betas"], before = (beta, beta), w.item()
        w.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
    expected = 4 / math.pi * math.atan(math.sqrt(0.1 * 0.99 / (1 - 0.99**2)))
    assert before - w.item() == pytest.approx(expected, rel=256 * EPS) and expected > 1.46


def test_m4_a_restart_only_drops_terms_and_makes_the_step_after_it_small_at_constant_gradient_size():
    beta1, beta2, t = 0.9, 0.999, 20
    updates, _, optimizer = run([[1.0]] * (t - 1) + [[-1.0]], lr=1.0, betas=(beta1, beta2), a=1.0, max_angle=1.0)
    assert optimizer.last_clipped
    kept = (1 - beta1) / (1 - beta1**t)  # the weight of the one gradient left; t is not reset, v-hat is 1
    assert updates[-1, 0] == pytest.approx(-math.atan(kept), rel=256 * EPS, abs=0)
    assert abs(updates[-1, 0]) < math.atan(math.sqrt(C_squared(beta1, beta2, t)))
    updates, *_ = run([[1e-3]] * 1999 + [[-1.0]], lr=1.0, a=1.0, max_angle=1.0)  # but large after a small history
    s = (1 - 0.999) / (1 - 0.999**2000)
    expected = -math.atan((1 - 0.9) / (1 - 0.9**2000) / math.sqrt(s + (1 - s) * 1e-6))
    assert updates[-1, 0] == pytest.approx(expected, rel=1e-9) and expected < -1.2


# -- M5: scale -------------------------------------------------------------------------------------------------------

scopes = st.sampled_from(["global", "tensor"])


def trajectory(gradients, **options):
    """Two tensors of two entries that start at 1: their weights after each step and the angles of the last one."""
    ps, out = [torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)], []
    optimizer = MoClip(ps, lr=0.1, weight_decay=0.1, a=0.7, **options)
    for g in gradients:
        for p, x in zip(ps, np.split(g, 2)):
            p.grad = torch.tensor(x)
        optimizer.step()
        out.append(torch.cat([p.detach() for p in ps]).numpy().copy())
    return np.array(out), optimizer.last_angle.numpy()


@given(gradient_sequences, st.integers(-30, 30), angles, st.sampled_from([0.3, 1.0, 4.0]), scopes)
def test_m5_scaling_all_gradients_by_a_power_of_two_changes_no_bit(gradients, exponent, max_angle, b, scope):
    gradients, options = np.resize(gradients, (len(gradients), 4)), dict(max_angle=max_angle, b=b, scope=scope)
    plain, scaled = trajectory(gradients, **options), trajectory(2.0**exponent * gradients, **options)
    assert (plain[0] == scaled[0]).all() and (plain[1] == scaled[1]).all()
    gradients = np.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, -0.5], [0.0] * 4])  # neither scope nor decay is idle
    together, apart = (trajectory(gradients, max_angle=0.5, scope=scope)[0] for scope in ("global", "tensor"))
    assert abs(together - apart).max() > 0.001
    assert (trajectory(0 * gradients)[0][-1] < 0.98).all()  # 0.99^3: decay alone


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e6), st.floats(0.3, math.pi))
def test_m5_scaling_all_gradients_changes_updates_by_rounding_only(seed, c, max_angle):
    gradients = np.random.default_rng(seed).normal(size=(8, 6))
    plain, scaled = run(gradients, max_angle=max_angle)[0], run(c * gradients, max_angle=max_angle)[0]
    # rounding, amplified by 1 / sin(theta) in each of 7 rotations; random vectors in 6 dimensions stay clear of pi
    np.testing.assert_allclose(plain, scaled, rtol=0, atol=1e-3 * 2**20 * EPS)


def test_m5_false_for_a_varying_factor_and_where_squares_underflow():
    gradients = np.array([[1.0], [1.0]])
    varying = run(gradients * [[1.0], [3.0]], lr=0.1)[0][1]
    assert abs(varying - run(gradients, lr=0.1)[0][1]) > 0.001
    tiny = run(1e-200 * gradients, lr=0.1)[0]  # g^2 = 1e-400 is 0 in float64
    np.testing.assert_allclose(tiny, 0.2, rtol=4 * EPS)  # atan2(m, 0): the full lr a pi / 2 instead of lr


def test_m5_tensor_scope_ignores_a_factor_per_tensor_and_global_scope_does_not():
    def updates(scope, factor):
        p, q = (torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
        optimizer = MoClip([p, q], lr=0.1, max_angle=0.5, scope=scope)
        for gp, gq in (([1.0, 0.0], [0.0, 1.0]), ([1.0, 1.0], [1.0, -0.5])):
            p.grad, q.grad = (torch.tensor(x, dtype=torch.float64) for x in (gp, gq))
            q.grad *= factor
            optimizer.step()
        return torch.cat([p.detach(), q.detach()])

    assert torch.equal(updates("tensor", 1.0), updates("tensor", 64.0))
    assert (updates("global", 1.0) - updates("global", 64.0)).abs().max() > 0.001


# -- M6: limits ------------------------------------------------------------------------------------------------------

@given(gradient_sequences, betas_pairs, st.floats(0.2, 5))
def test_m6_max_angle_pi_is_adam_atan2(gradients, betas, b):
    updates, _, optimizer = run(gradients, lr=0.1, betas=betas, max_angle=math.pi, a=1.5, b=b)
    m, v = np.zeros(gradients.shape[1]), np.zeros(gradients.shape[1])
    for t, g in enumerate(gradients, start=1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        expected = 0.15 * np.arctan2(m / (1 - betas[0]**t), b * np.sqrt(v / (1 - betas[1]**t)))
        # m may cancel: its error is eps of the largest gradient; then / sqrt(v) >= sqrt(1 - beta2) |g| > 1e-8 of it
        scale = 1 + np.divide(abs(gradients[:t]).max(0), np.sqrt(v), out=np.zeros_like(v), where=v > 0)
        np.testing.assert_array_less(abs(updates[t - 1] - expected), 64 * t * EPS * scale / b + 1e-300)
    assert not optimizer.last_clipped


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e2, 1e3, 1e4]))
def test_m6_large_a_equal_to_b_is_adam_without_eps(seed, a):
    gradients, lr, betas = np.random.default_rng(seed).normal(size=(10, 3)), 0.1, (0.9, 0.99)
    updates = run(gradients, lr=lr, betas=betas, max_angle=math.pi, a=a, b=a)[0]
    w = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    adam = torch.optim.Adam([w], lr=lr, betas=betas, eps=0.0)
    for t, g in enumerate(gradients, start=1):
        w.data.zero_()
        w.grad = torch.tensor(g)
        adam.step()
        step = -w.detach().numpy() / lr  # m-hat / sqrt(v-hat)
        error = abs(updates[t - 1] / lr - step)
        assert (error <= abs(step)**3 / (3 * a**2) + 1e-12).all()  # 1e-12: a few thousand eps from cancellation in m
        if abs(step).max() > 0.3 and a == 1e2:
            assert error.max() > abs(step).max()**3 / (4 * a**2)  # the cubic term is really there


@given(gradient_sequences, st.floats(0.2, 5))
def test_m6_zero_betas_are_sign_descent(gradients, b):
    updates = run(gradients, lr=0.1, betas=(0.0, 0.0), max_angle=math.pi, a=1.5, b=b)[0]
    np.testing.assert_allclose(updates, 0.15 * math.atan(1 / b) * np.sign(gradients), rtol=8 * EPS)
    gradients = np.random.default_rng(0).normal(size=(20, 3))  # with a cap: of the rotated gradient, which is m
    updates, momenta, _ = run(gradients, lr=0.1, betas=(0.0, 0.0), max_angle=0.4, a=1.5, b=b)
    for old, new, g in zip(momenta, momenta[1:], gradients[1:]):
        np.testing.assert_allclose(new, clip(g, old, 0.4), atol=64 * EPS)
    np.testing.assert_allclose(updates, 0.15 * math.atan(1 / b) * np.sign(momenta), rtol=8 * EPS)
    assert (np.sign(updates) != np.sign(gradients)).any()


@given(st.integers(0, 2**32 - 1))
def test_m6_max_angle_zero_freezes_the_direction_until_the_momentum_vanishes(seed):
    gradients = np.random.default_rng(seed).normal(size=(20, 3))
    _, momenta, _ = run(gradients, max_angle=0.0)
    for m in momenta:
        assert plane_angle(gradients[0], m) <= 256 * EPS  # never moves, whatever the gradients say
    gradients[1] = 0
    momenta = run(gradients[:3], betas=(0.0, 0.9), max_angle=0.0)[1]
    assert (momenta[2] == gradients[2]).all()  # beta1 = 0: the zero gradient emptied the momentum


# -- M7: descent and circling ----------------------------------------------------------------------------------------

@given(pairs(), st.floats(HALF_PI, math.pi))
def test_m7_rotated_gradient_never_ascends_from_pi_over_2_on(pair, max_angle):
    g, m, theta = pair
    inner = clip(g, m, max_angle) @ g / (g @ g)
    tol = 16 * EPS / math.sin(theta)
    assert inner == pytest.approx(math.cos(max(theta - max_angle, 0)), abs=tol)
    assert inner > 0  # 1e-3, the distance of theta from pi, is far above rounding
    assert clip(-m, m, max_angle) @ -m > 0  # antiparallel: passes


@given(st.floats(0, HALF_PI - 0.02), st.floats(0.01, 0.99), st.floats(0.1, 10))
def test_m7_false_below_pi_over_2_gradients_far_from_the_momentum_become_ascent(max_angle, fraction, size):
    theta = max_angle + HALF_PI + fraction * (HALF_PI - max_angle - 0.005)  # between max_angle + pi / 2 and pi
    g, m = size * np.array([math.cos(theta), math.sin(theta)]), np.array([1.0, 0.0])
    assert clip(g, m, max_angle) @ g < 0


def test_m7_momentum_itself_and_the_step_may_ascend_at_any_cap():
    for max_angle in (HALF_PI, math.pi):  # a property of momentum, not of the cap
        g = np.array([-1.0, 0.1])
        updates, momenta, _ = run([[1.0, 0.0]] * 5 + [g], max_angle=max_angle)
        assert momenta[-1] @ g < 0 and updates[-1] @ g < 0  # the step is minus the update


@given(gradient_sequences, st.floats(0, HALF_PI), decays(0.95))
def test_m7_without_restart_momentum_is_at_least_cos_max_angle_times_the_average_gradient_norm(
        gradients, max_angle, beta1):
    assume(gradients.shape[1] > 1)
    momenta, average = run(gradients, betas=(beta1, 0.9), max_angle=max_angle)[1], 0.0
    for g, old, momentum in zip(gradients, [0 * gradients[0], *momenta], momenta):
        norm = np.linalg.norm(g)
        restarted = old.any() and norm > 0 and plane_angle(old, g) > math.pi - 1e-7
        average = 0.0 if restarted else beta1 * average
        average += (1 - beta1) * norm
        assert np.linalg.norm(momentum) >= math.cos(max_angle) * average * (1 - 1e-7)  # eps / sin(theta) down to 1e-8
        if not restarted:  # and it brakes no faster than beta1 per step
            assert np.linalg.norm(momentum) >= beta1 * np.linalg.norm(old) * (1 - 1e-7)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1.5), st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.0, 0.99]))
def test_m7_steps_under_constant_gradient_norm_never_shrink_below_atan_cos_max_angle(seed, max_angle, beta1, beta2):
    gradients = np.random.default_rng(seed).normal(size=(30, 5))
    gradients /= np.linalg.norm(gradients, axis=1, keepdims=True)
    updates = run(gradients, lr=1.0, a=1.0, b=1.0, betas=(beta1, beta2), max_angle=max_angle)[0]
    assert (abs(updates).max(1) >= math.atan(math.cos(max_angle)) * (1 - 1e-9)).all()


def test_m7_false_for_groups_with_their_own_betas_a_step_is_smaller_than_the_cap_allows():
    ps = [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2)]
    optimizer = MoClip([dict(params=[p], betas=(beta, 0.9)) for p, beta in zip(ps, (0.0, 0.9))], lr=1.0, a=1.0,
                       max_angle=math.pi / 3)
    for angle in [0.05] * 299 + [math.pi / 3 + 0.05 - 1e-6]:  # all of norm 1, the last one at the cap
        for p, g in zip(ps, (math.cos(angle), math.sin(angle))):
            p.data.zero_()
            p.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
    assert not optimizer.last_clipped and max(abs(p.item()) for p in ps) < 0.96 * math.atan(math.cos(math.pi / 3))


def test_m7_false_without_constant_norm_the_steps_shrink_to_nothing():
    gradients = 0.99**np.arange(1, 1001)[:, None] * np.array([1.0, 0.5])
    updates = run(gradients, lr=1.0, max_angle=math.pi / 3)[0]
    assert abs(updates[0]).max() == pytest.approx(1) and abs(updates[-1]).max() == pytest.approx(3.5e-4, rel=0.01)


@given(st.floats(0.05, 3.0), decays(0.98), st.sampled_from([1.0, -1.0]))
def test_m7_exact_circular_orbit_under_steps_of_constant_length_along_the_momentum(max_angle, beta1, side):
    psi, h = steady_turn(max_angle, beta1), 0.1
    R = h / (2 * math.sin(psi / 2))
    assert R >= h / (2 * math.sin(max_angle / 2)) * (1 - 1e-12)  # M3: psi <= max_angle
    w = np.array([R, 0.0])  # at polar angle 0 the last chord pointed along pi/2 - psi/2, and m against it
    along = HALF_PI - psi / 2
    m = -steady_ratio(max_angle, beta1) * R * np.array([math.cos(along), side * math.sin(along)])
    for k in range(1, 7):  # f = |w|^2 / 2, so g = w; a few steps show invariance, many would test stability
        assert plane_angle(m, w) == pytest.approx(HALF_PI + psi / 2, abs=2**14 * EPS)  # beyond max_angle: clipped
        m = beta1 * m + (1 - beta1) * clip(w, m, max_angle)
        w = w - h * unit(m)
        expected = R * np.array([math.cos(k * psi), side * math.sin(k * psi)])
        np.testing.assert_allclose(w, expected, rtol=0, atol=2**14 * EPS * R)  # 1 / sin(3.0), times R / h up to 400


def iterates(max_angle, steps, lr=0.01, start=(1.0, 0.4), betas=(0.9, 0.99), A=None):
    """w_t of MoClip on f = w'Aw / 2, A = 1 by default. beta2 = 0.99 settles ten times sooner than 0.999."""
    w = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer, path = MoClip([w], lr=lr, betas=betas, max_angle=max_angle), []
    for _ in range(steps):
        w.grad = w.detach().clone() if A is None else A @ w.detach()
        optimizer.step()
        path.append(w.detach().numpy().copy())
    return np.array(path)


def circle(*args, **options):
    return np.linalg.norm(iterates(*args, **options), axis=1)


def test_m7_simulated_orbits_and_estimated_radii_are_those_of_the_table():
    degrees, simulated, estimated = ([float(x.strip("° ")) for x in row.split("|")] for row in
                                     table_rows("M7", r"^\| (?:max_angle|simulated|estimate) \| (.*) \|$"))
    assert len(degrees) == 7
    for D, radius, estimate in zip(np.radians(degrees), simulated, estimated):
        radii = circle(D, 2500)[-500:] / 0.01
        assert radii.min() > 0.9 * radii.max()  # a circle, not an excursion
        assert radii.mean() == pytest.approx(radius, rel=1e-3, abs=0.005)  # printed with two decimals
        assert orbit_radius(D, 0.9) == pytest.approx(estimate, abs=0.005)
        assert radius == pytest.approx(estimate, rel=0.02)


@pytest.mark.parametrize("start", [(1.0, 0.9), (-0.3, 1.0), (1.0, 1.0), (1.0, 0.0)])
def test_m7_starts_off_the_axes_and_diagonals_end_on_that_circle_and_those_on_them_restart(start):
    radii = circle(math.radians(45), 2500, start=start)[-500:]
    if 0 in start or start[0] == start[1]:
        assert radii.max() < 0.2 * 0.01
    else:
        assert radii.mean() == pytest.approx(0.01 * orbit_radius(math.radians(45), 0.9), rel=0.02)


def test_m7_from_pi_over_2_on_the_iterates_end_within_about_one_step_and_at_small_caps_tens_of_steps_away():
    assert circle(0.3, 2500)[-500:].mean() > 40 * 0.01
    assert circle(HALF_PI, 2500)[-500:].mean() < 1.1 * 0.01
    assert circle(math.pi, 2500)[-500:].max() < 0.5 * 0.01


@given(st.floats(0.2, math.pi), st.integers(-4, 4))
def test_m7_on_a_quadratic_all_lengths_are_proportional_to_lr(max_angle, exponent):
    A = torch.tensor([[2.0, 0.5, -0.3], [0.5, 1.0, 0.7], [-0.3, 0.7, 3.0]], dtype=torch.float64)
    start, c = np.array([1.0, 0.4, -0.7]), 2.0**exponent
    scaled = iterates(max_angle, 40, lr=0.01 * c, start=c * start, A=A)
    assert (c * iterates(max_angle, 40, start=start, A=A) == scaled).all()  # to the last bit: powers of two


def test_m7_max_angle_zero_walks_away_from_the_minimum_for_ever_unless_it_restarts():
    radii = circle(0.0, 1000, start=(1.0, 0.4))
    assert radii[-1] > 5 and (np.diff(radii[500:]) > 0).all()
    for start in ((1.0, 1.0), (1.0,)):  # straight at it, always so in one dimension: antiparallel at each crossing
        assert circle(0.0, 1000, start=start)[-300:].max() < 0.01  # from 1100 steps on their squares underflow


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(0.0, 0.0), (0.5, 0.3), (0.9, 0.99)]), st.integers(2, 4))
def test_m7_max_angle_zero_without_restart_stays_on_one_ray_and_passes_every_distance(seed, betas, n):
    rng = np.random.default_rng(seed)
    root, start = rng.normal(size=(n, n)), rng.normal(size=n)
    A = torch.tensor(root @ root.T + np.eye(n))
    ray = -np.sign(A.numpy() @ start)
    path = iterates(0.0, 200, lr=0.05, start=start, betas=betas, A=A)
    assume(plane_angle(ray, -start) > 0.01)  # off the line through the minimum
    reached = (path - start) @ ray / n
    np.testing.assert_allclose(path - start, np.outer(reached, ray), rtol=0, atol=1e-10)  # 200 steps of rounding
    assert (np.diff(reached) > 1e-3 * 0.05).all()  # one way only, and steps do not shrink to 0


# -- M8: noise amplification -----------------------------------------------------------------------------------------

@given(st.floats(0, HALF_PI), decays(0.99), st.just(0.0) | st.floats(1e-6, 5))
def test_m8_fixed_point_recursion_contracts_by_beta1_to_the_stated_root(max_angle, beta1, x):
    c, start = math.cos(max_angle), x
    root = steady_ratio(max_angle, beta1)
    quadratic = (1 - beta1**2) * root**2 - 2 * beta1 * (1 - beta1) * c * root - (1 - beta1)**2
    assert quadratic == pytest.approx(0, abs=16 * EPS)
    assert c - 8 * EPS <= root <= 1 + 8 * EPS
    for k in range(1, 30):
        m, g = np.array([x, 0.0]), np.array([math.cos(2.5), math.sin(2.5)])  # any g beyond the cap, of norm 1
        x = math.hypot(*(beta1 * m + (1 - beta1) * clip(g, m, max_angle)))
        assert abs(x - root) <= beta1**k * abs(start - root) + 64 * EPS


@given(st.integers(0, 2**32 - 1), st.floats(0.2, 1.2), st.floats(0.1, 0.95))
def test_m8_momentum_follows_the_recursion_exactly_while_every_step_is_clipped(seed, max_angle, beta1):
    rng = np.random.default_rng(seed)
    x, w = 0.0, torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    optimizer = MoClip([w], betas=(beta1, 0.99), max_angle=max_angle)
    for t in range(25):
        g = rng.normal(size=6)
        m = optimizer.state[w]["exp_avg"].numpy() if t else np.zeros(6)
        if t:  # reflect into the half space away from m and off the axis: the angle lies in (max_angle, pi - 0.01)
            g -= max(0.0, g @ unit(m)) * 2 * unit(m)
            assume(plane_angle(m, g) < math.pi - 0.01)
        w.grad = torch.tensor(unit(g))
        before = m.copy()
        optimizer.step()
        assert bool(optimizer.last_clipped) == (t > 0)
        c = math.cos(max_angle)
        x = math.sqrt(beta1**2 * x**2 + 2 * beta1 * (1 - beta1) * c * x + (1 - beta1)**2)
        now = optimizer.state[w]["exp_avg"].numpy()
        assert np.linalg.norm(now) == pytest.approx(x, rel=1e-11)  # 25 steps, eps / sin(theta) each
        if t:
            turn = math.atan2((1 - beta1) * math.sin(max_angle),
                              beta1 * np.linalg.norm(before) + (1 - beta1) * math.cos(max_angle))
            assert plane_angle(before, now) == pytest.approx(turn, abs=1e-11)


def noise_run(max_angle, beta1, dimensions, steps, seed=0):
    """(|m| / |g| at the end, mean cosine of successive m, |sum of m|^2 / steps, were all steps but one clipped)."""
    rng = np.random.default_rng(seed)
    w = torch.nn.Parameter(torch.zeros(dimensions, dtype=torch.float64))
    optimizer = MoClip([w], betas=(beta1, 0.99), max_angle=max_angle)
    total, cosines, clipped, previous, burn_in = np.zeros(dimensions), [], True, None, 300
    for t in range(burn_in + steps):
        w.grad = torch.tensor(unit(rng.normal(size=dimensions)))
        optimizer.step()
        m = optimizer.state[w]["exp_avg"].numpy().copy()
        clipped &= t == 0 or bool(optimizer.last_clipped)
        if t >= burn_in:
            total += m
            cosines.append(unit(previous) @ unit(m))
        previous = m
    return np.linalg.norm(m), np.mean(cosines), total @ total / steps, clipped


@pytest.mark.parametrize("degrees", [45, 60])
def test_m8_isotropic_noise_keeps_the_momentum_at_the_stated_length_and_lets_it_persist(degrees):
    D, beta1, steps = math.radians(degrees), 0.9, 1000
    length, cosine, diffusion, clipped = noise_run(D, beta1, 4000, steps)
    x = steady_ratio(D, beta1)
    assert clipped  # so the recursion is exact, noise or not
    assert length == pytest.approx(x, rel=1e-9)
    cos_psi = beta1 + (1 - beta1) * math.cos(D) / x
    assert cosine == pytest.approx(cos_psi, rel=1e-9)
    finite = x**2 * ((1 + cos_psi) / (1 - cos_psi) - 2 * cos_psi * (1 - cos_psi**steps) / (1 - cos_psi)**2 / steps)
    assert diffusion == pytest.approx(finite, rel=0.2)  # about five standard deviations of a 4000-dimensional square


def test_m8_table_follows_from_the_formulas():
    rows = table_rows("M8", r"^\| (\d+°|none) \| ([\d.]+) \| ([\d.]+)° \| (\d+) steps \| ([\d.]+) \|$")
    assert len(rows) == 6
    for cap, length, turn, memory, diffusion in rows:
        D = math.radians(float(cap.strip("°"))) if cap != "none" else HALF_PI
        x, psi = steady_ratio(D, 0.9), steady_turn(D, 0.9)
        c = math.cos(psi)
        for printed, exact in ((length, x), (turn, math.degrees(psi)), (memory, 1 / (1 - c)),
                               (diffusion, x**2 * (1 + c) / (1 - c))):
            digits = len(printed.partition(".")[2])
            assert printed == f"{exact:.{digits}f}"


def cone_share(n, D, points=20_000):
    """P(angle <= D) of a uniform direction in n dimensions: sin^(n-2), integrated by the midpoint rule."""
    x = (np.arange(points) + 0.5) / points
    return float((D * np.sin(D * x)**(n - 2)).sum() / (math.pi * np.sin(math.pi * x)**(n - 2)).sum())


@given(st.integers(2, 3000), st.floats(0.01, 1) | st.floats(0.9, 1))
def test_m8_unclipped_share_is_at_most_half_the_sine_to_the_power_n_minus_1(n, fraction):
    D = fraction * HALF_PI
    assert cone_share(n, D) <= math.sin(D)**(n - 1) / 2 * (1 + 1e-5) + 1e-300  # midpoint rule; 0 <= 0 below the range
    if n == 3:
        assert cone_share(n, D) == pytest.approx((1 - math.cos(D)) / 2, rel=1e-5)
    assert math.sin(D)**(n - 1) <= min(1, 1 / (n * math.cos(D)**2)) * (1 + 1e-12)  # sharper than Markov's inequality


@pytest.mark.parametrize("n, max_angle, share",
                         [(2, 1.0, 1 / math.pi), (3, 1.0, (1 - math.cos(1.0)) / 2), (30, 1.35, None)])
def test_m8_share_of_unclipped_steps_is_that_of_the_cone_and_within_the_bound(n, max_angle, share):
    rng, steps, unclipped = np.random.default_rng(0), 3000, 0
    w = torch.nn.Parameter(torch.zeros(n, dtype=torch.float64))
    optimizer = MoClip([w], betas=(0.9, 0.99), max_angle=max_angle)
    for t in range(steps + 1):
        w.grad = torch.tensor(unit(rng.normal(size=n)))
        optimizer.step()
        unclipped += t > 0 and not optimizer.last_clipped
    exact, bound = cone_share(n, max_angle), math.sin(max_angle)**(n - 1) / 2
    assert share is None or exact == pytest.approx(share, rel=1e-6)
    assert unclipped / steps == pytest.approx(exact, abs=4 * math.sqrt(exact / steps))  # four standard deviations
    assert 0.25 * bound < exact < bound  # loose by sqrt(pi n / 2) at small caps, exact at 90 degrees


def test_m8_without_the_cap_noise_momentum_settles_at_the_ema_value():
    length, cosine, diffusion, _ = noise_run(math.pi, 0.9, 4000, 1000)
    assert length == pytest.approx(math.sqrt((1 - 0.9) / (1 + 0.9)), rel=0.15)  # about 5 / sqrt(dimensions / 10)
    assert cosine == pytest.approx(0.9, abs=0.01)
    assert diffusion == pytest.approx(1, rel=0.15)
    at_default, *_ = noise_run(HALF_PI, 0.9, 4000, 100)
    assert at_default == pytest.approx(length, rel=0.15)


def test_m8_false_in_few_dimensions_where_noise_is_not_orthogonal():
    lengths = [noise_run(HALF_PI, 0.9, 2, 100, seed)[0] for seed in range(8)]
    # in 2-D half of the steps point along m by 2 / pi of their length on average: the default cap amplifies there
    assert np.mean(lengths) > 1.5 * math.sqrt((1 - 0.9) / (1 + 0.9))


# -- M9: neighbourhood of convergence --------------------------------------------------------------------------------

def sign_noise(B, h, L):
    """N of M9(a), L the L_i: what the bias and the length of a step keep of the gradient."""
    return 2 * B + h / 2 * np.sum(L)


def sign_mean_bound(f0, h, steps, N):
    """M9(a): the most that the mean of |grad f|_1 over the first steps can be."""
    return f0 / (h * steps) + N


def sign_level(h, N, mu):
    """F of M9(c): the level that is never left."""
    return max(h * N, N**2 / (2 * mu))


def sign_steps(f0, level, h, N, mu):
    """M9(c): from this step on f - f_min is at most `level`, which lies between F and f0."""
    s0, s1 = (math.sqrt(2 * mu * f) for f in (f0, level))
    return (s0 - s1 + N * math.log((s0 - N) / (s1 - N))) / (h * mu)


def no_bias(gradient, t):
    return 0 * gradient


def descend(L, start, steps, bias, lr, betas=(0.0, 0.0), max_angle=math.pi, b=1.0):
    """MoClip on f = sum L_i w_i^2 / 2, gradient L w + bias(L w, t): (true gradients (T, d), biases, optimizer)."""
    w = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = MoClip([w], lr=lr, betas=betas, max_angle=max_angle, b=b)
    true, errors = [], []
    for t in range(steps):
        gradient = L * w.detach().numpy()
        e = bias(gradient, t)
        w.grad = torch.tensor(gradient + e)
        optimizer.step()
        true.append(gradient)
        errors.append(e)
    return np.array(true), np.array(errors), optimizer


@given(hnp.arrays(np.float64, 3, elements=st.floats(0.1, 4)), hnp.arrays(np.float64, 3, elements=entries(-2, 2)),
       entries(0, 2), st.floats(0.001, 0.3), st.floats(0.3, 3), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_m9_sign_limit_reaches_the_stated_neighbourhood_under_any_bias(L, start, B, lr, b, steps, seed):
    rng = np.random.default_rng(seed)

    def bias(gradient, t):  # half random, half hostile: cancel the smallest coordinates while the budget lasts
        if t % 2:
            e = rng.normal(size=3)
            return B * e / abs(e).sum()
        e, left = np.zeros(3), B
        for i in np.argsort(abs(gradient)):
            e[i] = -np.sign(gradient[i]) * min(1.001 * abs(gradient[i]), left)
            left -= abs(e[i])
        return e

    true, _, _ = descend(L, start, steps, bias, lr, b=b)
    h = lr * 4 / math.pi * math.atan(1 / b)
    f = (true**2 / L).sum(1) / 2
    N = sign_noise(B, h, L)
    assert abs(true).sum(1).mean() <= sign_mean_bound(f[0], h, steps, N) * (1 + 1e-12)  # the mean, not only the least
    # (c): a quadratic has |grad f|_1^2 >= |grad f|_2^2 >= 2 mu f with mu the smallest L_i
    near = sign_level(h, N, L.min())
    assert (f[1:] <= np.maximum(f[:-1], near) * (1 + 1e-12)).all()  # outside it falls, and what is inside stays


@settings(max_examples=25)
@given(st.floats(0.5, 4), st.floats(0, 0.5), st.floats(0.03, 0.3), st.integers(0, 2**32 - 1))
def test_m9_iterates_reach_the_stated_level_in_the_stated_number_of_steps_and_stay(L, B, h, seed):
    rng, N, mu = np.random.default_rng(seed), sign_noise(B, h, [L, L]), L
    near, f0 = 1.1 * sign_level(h, N, mu), 2 * L
    assume(near < f0)
    steps = math.ceil(sign_steps(f0, near, h, N, mu))

    def bias(gradient, t):
        e = np.where(rng.random(2) < 0.5, -1.001 * gradient, rng.normal(size=2))
        return e * min(1, B / max(abs(e).sum(), 1e-9))

    true, _, _ = descend(np.array([L, L]), [math.sqrt(2.0), math.sqrt(2.0)], steps + 30, bias, h)
    assert ((true[steps:]**2 / L).sum(1) / 2 <= near * (1 + 1e-12)).all()


@given(st.floats(0.3, 4), st.floats(0.01, 0.3))
def test_m9_tight_one_dimension_without_bias_comes_back_to_the_level_h_N(L, h):
    delta = 1e-3 * h
    true, _, _ = descend(np.array([L]), [delta], 20, no_bias, h)
    N = sign_noise(0, h, L)
    level = sign_level(h, N, L)
    assert level == h * N  # and not N^2 / (2 mu), which is half of it
    assert (1 - 3e-3) * level < (true[1::2]**2 / L / 2).min() and (true**2 / L / 2).max() <= level * (1 + 1e-12)


@given(st.floats(0.3, 4), st.floats(0.1, 2), st.floats(0.001, 0.1))
def test_m9_tight_a_bias_that_turns_one_sign_keeps_the_level_and_for_short_steps_it_is_the_bound(c, B, h):
    w, start = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)), B / c * (1 - 1e-9)
    # f = c (w1 + w2)^2 / 2: both slopes are c (w1 + w2), so mu = 4 c, L_1 = L_2 = 2 c, N = 2 B + 2 c h
    w.data[0] = start
    optimizer = MoClip([w], lr=h, betas=(0.0, 0.0), max_angle=math.pi)
    for t in range(50):
        slope = c * w.detach().sum()
        w.grad = torch.stack([slope, slope - B])
        optimizer.step()
    N, level = sign_noise(B, h, [2 * c, 2 * c]), c * float(w.detach().sum())**2 / 2
    bound = sign_level(h, N, 4 * c)
    assume(bound > h * N)
    assert level == pytest.approx(B**2 / (2 * c), rel=1e-6)  # no step has changed it
    assert level < bound <= level * (1 + c * h / B)**2 * (1 + 1e-6)


@pytest.mark.parametrize("L, low", [(0.5, 0.1), (1.0, 0.5), (4.0, 0.02)])
def test_m9_tight_the_level_is_reached_no_sooner_than_stated_without_bias(L, low):
    h = 0.001  # one dimension: |grad f|^2 = 2 L f, and f falls by h (|grad f| - N) exactly
    w = abs(descend(np.array([L]), [1.0], 1001, no_bias, h)[0][:, 0]) / L
    steps = sign_steps(L / 2, L * low**2 / 2, h, sign_noise(0, h, L), L)
    assert steps - 1 - math.log(1 / low) <= np.argmax(w <= low) <= math.ceil(steps)


def test_m9_tight_the_level_is_reached_no_sooner_than_stated_under_a_hostile_bias():
    # f = c (w_1 + ... + w_d)^2 / 2: all slopes are s = c (sum of w), mu = c d^2, and a bias of B turns B / s of d signs
    d, c, B, h = 400, 1.0, 1.0, 2e-7
    N, mu = sign_noise(B, h, [c * d] * d), c * d**2
    level, start, t = 1.5 * sign_level(h, N, mu), 8 * N / d / c, 0
    w = torch.nn.Parameter(torch.zeros(d, dtype=torch.float64))
    w.data[0], optimizer = start, MoClip([w], lr=h, betas=(0.0, 0.0), max_angle=math.pi)
    while c * w.detach().sum().item()**2 / 2 > level:
        slope = c * w.detach().sum().item()
        w.grad = torch.full_like(w, slope)
        w.grad[:int(B / slope / 1.001)] *= -1e-3
        optimizer.step()
        t += 1
    assert 0.985 <= t / sign_steps(c * start**2 / 2, level, h, N, mu) <= 1


def test_m9_false_if_a_parameter_is_left_out_of_a_step():
    ws = [torch.nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2)]
    optimizer, norms, h, steps = MoClip(ws, lr=0.01, betas=(0.0, 0.0), max_angle=math.pi), [], 0.01, 5000
    for t in range(steps):
        norms.append(sum(abs(w.item()) for w in ws))
        ws[0].grad, ws[1].grad = ws[0].detach().clone(), ws[1].detach().clone() if t == 0 else None
        optimizer.step()
    assert min(norms) >= 0.99 - 1e-9 and 1 / (h * steps) + 2 * h / 2 < 0.031  # f_0 = 1, no bias


@given(st.floats(0.01, 2), st.floats(0.25, 4), st.floats(0.01, 0.5))
def test_m9_tight_a_hostile_bias_holds_the_gradient_at_2B_plus_Lhd_over_2_for_ever(B, L, h):
    hostile = 1 + 1e-9

    def bias(gradient, t):  # turn the sign of the smaller coordinate, at a cost of B (1 + 1e-9)
        e = np.zeros(2)
        i = int(np.argmin(abs(gradient)))
        e[i] = -hostile * gradient[i]
        return e

    start = [(B + L * h) / L, B / L]
    true, errors, _ = descend(np.array([L, L]), start, 30, bias, h)
    bound = sign_noise(B, h, [L, L])
    np.testing.assert_allclose(abs(true).sum(1), bound, rtol=1e-9)  # never better than the bias and stability terms
    assert abs(errors).sum(1).max() <= B * (1 + 1e-8)


def test_m9_tight_without_bias_the_iterates_oscillate_at_the_stability_term():
    L, h = np.array([1.0, 2.0, 4.0]), 0.125
    true, _, _ = descend(L, np.full(3, h / 2), 20, no_bias, h)
    np.testing.assert_allclose(abs(true).sum(1), sign_noise(0, h, L), rtol=1e-12)


def test_m9_false_for_a_bias_that_is_not_bounded_in_the_one_norm():
    flip = lambda gradient, t: -2 * gradient  # noqa: E731
    true, _, _ = descend(np.ones(2), np.ones(2), 50, flip, 0.1)
    assert (np.diff(abs(true).sum(1)) > 0).all()  # ascends for ever


def momentum_bound(L, start, steps, bias, lr, beta1, beta2=0.99, b=1.0, max_angle=math.pi):
    """(mean |grad f|^2, the terms of M9(b)'s bound with B, G measured, largest angle) on f = sum L_i w_i^2 / 2.
    The bound is the sum of the terms. bias(gradient, t) as in `descend`."""
    d, w = len(L), torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = MoClip([w], lr=lr, betas=(beta1, beta2), max_angle=max_angle, b=b)
    true, entered, m, largest = [], [], np.zeros(d), 0.0
    for t in range(steps):
        gradient = L * w.detach().numpy()
        w.grad = torch.tensor(gradient + bias(gradient, t))
        optimizer.step()
        now = optimizer.state[w]["exp_avg"].numpy().copy()
        entered.append((now - beta1 * m) / (1 - beta1))
        true.append(gradient)
        m, largest = now, max(largest, float(optimizer.last_angle))
    true, entered, h = np.array(true), np.array(entered), lr * 4 / math.pi * math.atan(1 / b)
    H = lr * 4 / math.pi * math.atan(math.sqrt(C_squared(beta1, beta2, steps)) / b)
    G = max(abs(true).max(), abs(entered).max())
    B = abs(entered - true).sum(1).max()  # bias, noise, rotation
    lag = d * L.max() * H * beta1 / (1 - beta1)
    f0 = (true[0]**2 / L).sum() / 2
    terms = {"start": G * f0 / (h * steps), "stability": G * L.max() * d * H**2 / (2 * h),
             "bias": G * B, "lag": G * lag,
             "bias of turned coordinates": G * H / h * B, "lag of turned coordinates": G * H / h * lag}
    return (true**2).sum(1).mean(), terms, largest


@given(decays(0.95), st.floats(0.5, 0.999), st.floats(0.3, 3), st.floats(0.0, 0.5), st.floats(0.002, 0.05),
       st.sampled_from([0.3, 1.2, 2.0, math.pi]), st.integers(0, 2**32 - 1))
def test_m9_with_momentum_the_conditional_bound_holds_with_measured_constants(beta1, beta2, b, B, lr, max_angle, seed):
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(60, 3))
    noise *= B / abs(noise).sum(1, keepdims=True)
    mean, terms, largest = momentum_bound(np.array([1.0, 0.5, 2.0]), rng.normal(size=3), 60,
                                          lambda gradient, t: noise[t], lr, beta1, beta2, b, max_angle)
    assume(max_angle == math.pi or largest < math.pi - 1e-6)  # no restart
    assert mean <= sum(terms.values()) * (1 + 1e-9)


def turn_the_smaller(gradient, t):
    """M9(a)'s hostile bias: it turns the sign of the smaller of two coordinates, at a cost of 1.001 times itself."""
    return np.where(abs(gradient) == abs(gradient).min(), -1.001 * gradient, 0)


HOSTILE = dict(L=np.ones(2), start=[1.01, 1.0], steps=4000, bias=turn_the_smaller, lr=0.01, beta1=0.0, beta2=1e-10)
# each is a run that the bound without the named terms would rule out: no term can be dropped
NEEDED = [
    (["start"], dict(L=np.ones(3), start=np.ones(3), steps=10, bias=no_bias, lr=0.01, beta1=0.5)),
    (["stability"],
     dict(L=np.full(3, 2.0), start=np.full(3, 1 / 16), steps=2000, bias=no_bias, lr=1 / 8, beta1=0.0, beta2=1e-3)),
    (["bias"], HOSTILE),
    (["bias of turned coordinates"], HOSTILE),
    (["lag", "lag of turned coordinates"],
     dict(L=np.ones(2), start=np.full(2, 0.04), steps=3000, bias=no_bias, lr=0.01, beta1=0.99, b=1e-3))]


@pytest.mark.parametrize("names, case", NEEDED, ids=[names[0] for names, _ in NEEDED])
def test_m9_no_term_of_the_momentum_bound_can_be_dropped(names, case):
    mean, terms, _ = momentum_bound(**case)
    assert mean <= sum(terms.values()) * (1 + 1e-9)
    assert mean > 1.1 * sum(value for name, value in terms.items() if name not in names)
    if names != ["start"] and "lag" not in names:  # and the constants of these are the best possible
        assert mean > 0.97 * sum(terms.values())


@given(gradient_sequences, st.floats(-1, 1), betas_pairs, st.floats(0.3, 3))
def test_m9_one_coordinate_moves_downhill_but_for_the_error_of_its_momentum(gradients, slope, betas, b):
    t = len(gradients)
    updates, momenta, _ = run(gradients, lr=0.1, a=1.0, betas=betas, b=b, max_angle=math.pi)
    h, H = 0.1 * math.atan(1 / b), 0.1 * math.atan(math.sqrt(C_squared(*betas, t)) / b)
    G, error = max(1.0, abs(gradients).max()), abs(momenta[-1] / (1 - betas[0]**t) - slope)
    assert (updates[-1] * slope >= h / G * slope**2 - (H + h) * error - rounding(betas, t)).all()


@given(betas_pairs, st.integers(1, 12), st.floats(0.3, 3))
def test_m9_tight_an_extremal_sequence_against_a_slope_needs_both_h_and_H(betas, t, b):
    assume(betas[0] == 0 and t == 1 or betas[0] > 0.05)
    profile = weights(betas[0], t) / weights(betas[1], t)  # M4(b): the step is H, though the gradients are tiny
    tiny = -1e-4 * (profile / profile.max())[:, None]
    updates, momenta, _ = run(tiny, lr=0.1, a=1.0, betas=betas, b=b, max_angle=math.pi)
    h, H = 0.1 * math.atan(1 / b), 0.1 * math.atan(math.sqrt(C_squared(*betas, t)) / b)
    G = slope = 1.0
    error = abs(momenta[-1, 0] / (1 - betas[0]**t) - slope)
    gained = updates[-1, 0] * slope
    bound = h / G * slope**2 - (H + h) * error
    assert bound - rounding(betas, t) <= gained <= bound + 2e-4 * (H + h)
    assert gained < min(h - H * error, h - h * error) - 0.3 * h  # neither h nor H is enough


@pytest.mark.parametrize("d, L", [(1, 1.0), (3, 2.0)])
def test_m9_tight_lag_and_stability_terms_of_the_momentum_bound(d, L):
    lr, beta, lag = 0.01, 0.9, 0.0  # a long slope: every step has length lr, the momentum is as late as it can be
    w = torch.nn.Parameter(torch.full((d,), 100.0, dtype=torch.float64))
    optimizer = MoClip([w], lr=lr, betas=(beta, beta), max_angle=math.pi)
    for t in range(1, 201):
        w.grad = L * w.detach().clone()
        optimizer.step()
        lag = max(lag, float((optimizer.state[w]["exp_avg"] / (1 - beta**t) - w.grad).abs().sum()))
    assert 0.999 < lag / (d * L * lr * beta / (1 - beta)) <= 1 + 1e-9


# -- M11: max_angle from the batch size ------------------------------------------------------------------------------

def noisy_run(ratio, beta1, max_angle, n, steps, seed=0, skip=100, spread=1.0):
    """(mean last_angle, share clipped) of MoClip on mu + noise, |mu|^2 = ratio E |noise|^2, after the first steps.
    spread: of the noise's standard deviations, largest to smallest."""
    rng, w = np.random.default_rng(seed), torch.nn.Parameter(torch.zeros(n, dtype=torch.float64))
    optimizer, angles_, clipped = MoClip([w], betas=(beta1, 0.99), max_angle=max_angle), [], []
    mu, scale = np.full(n, math.sqrt(ratio / n)), np.geomspace(1, spread, n)
    for t in range(skip + steps):
        w.grad = torch.tensor(mu + rng.normal(size=n) * scale / np.linalg.norm(scale))
        optimizer.step()
        angles_.append(float(optimizer.last_angle))
        clipped.append(bool(optimizer.last_clipped))
    return np.mean(angles_[skip:]), np.mean(clipped[skip:])


@pytest.mark.parametrize("beta1", [0.5, 0.9])
@pytest.mark.parametrize("ratio", [0.02, 0.4, 3.0])
@pytest.mark.parametrize("n, spread", [(2000, 1.0), (8000, 30.0)])  # effective dimensions of 2000 and about 1200
def test_m11_uncapped_angle_is_that_of_the_ratio_of_signal_to_noise(n, spread, ratio, beta1):
    angle, _ = noisy_run(ratio, beta1, math.pi, n, 60, spread=spread)
    assert angle == pytest.approx(math.acos(batch_cosine(ratio, beta1)), abs=0.02)  # 1 / sqrt(2000), mean of 60 steps
    assert batch_ratio(angle, beta1) == pytest.approx(ratio, rel=0.1, abs=0.005)  # and back


@pytest.mark.parametrize("degrees", [30, 45, 60, 75])
def test_m11_cap_idles_above_the_stated_ratio_and_acts_below(degrees):
    least = batch_ratio(math.radians(degrees), 0.9)
    assert batch_cosine(least, 0.9) == pytest.approx(math.cos(math.radians(degrees)), rel=64 * EPS)
    shares = [noisy_run(factor * least, 0.9, math.radians(degrees), 4000, 40)[1] for factor in (0.7, 1.4)]
    assert shares[0] > 0.9 and shares[1] < 0.1


def test_m11_numbers_of_the_text_follow_from_the_formula_and_90_degrees_never_idles():
    text = " ".join(section("M11").split())
    degrees, ratios = re.search(r"caps of ([\d, ]+) degrees \S+ is ([\d., ]+)\.", text).groups()
    degrees, ratios = degrees.split(", "), ratios.split(", ")
    assert len(degrees) == len(ratios) == 5
    for D, ratio in zip(degrees, ratios):
        assert ratio == f"{batch_ratio(math.radians(float(D)), 0.9):.{len(ratio.partition('.')[2])}f}"
    ratio, *factors = re.search(r"82 degrees is \S+=([\d.]+)\$; a cap of 75 degrees needs ([\d.]+) times that batch, "
                                r"one of 60 degrees ([\d.]+) times", text).groups()
    measured = batch_ratio(math.radians(82), 0.9)
    assert ratio == f"{measured:.4f}"
    for D, factor in zip((75, 60), factors):
        assert factor == f"{1.4 * batch_ratio(math.radians(D), 0.9) / measured:.1f}"
    ratios = np.geomspace(1e-4, 1e3, 50)
    cosines = [batch_cosine(x, 0.9) for x in ratios]
    assert (np.diff(cosines) > 0).all() and batch_cosine(1e-12, 0.9) < 1e-5  # so any batch is enough at 90 degrees


@settings(max_examples=20)
@given(st.floats(0.01, 30), decays(0.99), st.integers(0, 2**32 - 1))
def test_m11_moments_of_inner_product_and_norms_are_exact(ratio, beta1, seed):
    # m = mu + sum of omega_i noise_i; the noise is +-1 in one of n directions, equally likely: means can be counted
    n = 3
    mu = unit(np.random.default_rng(seed).normal(size=n)) * math.sqrt(ratio)
    noises = [sign * np.eye(n)[i] for i in range(n) for sign in (-1, 1)]
    w = weights(beta1, 2)
    inner, g2, m2 = 0.0, 0.0, 0.0
    for x, y in ((x, y) for x in noises for y in noises):
        momentum = run([mu + x, mu + y], betas=(beta1, 0.9), max_angle=math.pi)[1][1] / (1 - beta1**2)
        inner += sum((mu + z) @ momentum for z in noises) / len(noises)**3
        m2 += momentum @ momentum / len(noises)**2
    g2 = np.mean([(mu + x) @ (mu + x) for x in noises])
    assert inner == pytest.approx(ratio, rel=1e-9)
    assert g2 == pytest.approx(ratio + 1, rel=1e-9)
    assert m2 == pytest.approx(ratio + (w**2).sum(), rel=1e-9)
    kappa = (1 - beta1) / (1 + beta1) * (1 + beta1**2) / (1 - beta1**2)  # at t = 2; the factor tends to 1
    assert (w**2).sum() == pytest.approx(kappa, rel=1e-12)


# -- M10: scopes -----------------------------------------------------------------------------------------------------

def two_steps(first, second, **options):
    """(last_angle of the second step, the whole momentum after each) for two lists of gradients, one a tensor."""
    ps = [torch.nn.Parameter(torch.zeros(len(x), dtype=torch.float64)) for x in first]
    optimizer, momenta = MoClip(ps, **options), []
    for gradients in (first, second):
        for p, x in zip(ps, gradients):
            p.grad = torch.tensor(np.asarray(x, dtype=np.float64))
        optimizer.step()
        momenta.append(np.concatenate([optimizer.state[p]["exp_avg"].numpy() for p in ps]))
    return optimizer.last_angle, momenta


def scope_angles(gradients, momenta, scope):
    """last_angle after a second step whose momenta are proportional to `momenta` (one per tensor)."""
    return two_steps(momenta, gradients, scope=scope, max_angle=math.pi)[0]


def test_m10_tensor_angles_of_zero_leave_a_global_angle_near_pi_over_2():
    momenta, gradients = ([1.0], [0.001]), ([0.001], [1.0])
    assert float(scope_angles(gradients, momenta, "tensor").max()) <= 4 * EPS
    expected = math.acos(0.002 / (1 + 1e-6))
    assert float(scope_angles(gradients, momenta, "global")) == pytest.approx(expected, abs=8 * EPS)


@given(st.floats(HALF_PI, math.pi - 1e-3), st.floats(0.1, 10), st.floats(0.1, 10))
def test_m10_tight_pieces_at_one_angle_with_proportional_lengths(theta, length, ratio):
    momenta = [1.0, 0.0], [length, 0.0]
    gradients = [[ratio * m[0] * math.cos(theta), ratio * m[0] * math.sin(theta)] for m in momenta]
    assert float(scope_angles(gradients, momenta, "global")) == pytest.approx(theta, abs=8 * EPS)


def test_m10_false_if_a_tensor_is_antiparallel():
    for scope, turn in (("tensor", 126.82), ("global", 57.40)):  # by the definition of the step; the cap is 90 degrees
        _, momenta = two_steps(([1.0], [0.1]), ([-1.0], [1.0]), scope=scope)
        assert math.degrees(plane_angle(*momenta)) == pytest.approx(turn, abs=0.01)


def test_m10_small_global_angle_leaves_a_tensor_angle_of_pi():
    momenta, gradients = ([1.0], [0.001]), ([1.0], [-0.001])
    assert float(scope_angles(gradients, momenta, "global")) == pytest.approx(2 * math.atan(0.001), abs=8 * EPS)
    np.testing.assert_allclose(scope_angles(gradients, momenta, "tensor"), [0, math.pi], atol=4 * EPS)


@given(st.lists(pairs(), min_size=1, max_size=4))
def test_m10_tensor_angles_bound_the_global_angle_by_the_larger_of_theirs_and_pi_over_2(tensors):
    gradients, momenta, thetas = zip(*tensors)
    overall = float(scope_angles(gradients, momenta, "global"))
    np.testing.assert_allclose(scope_angles(gradients, momenta, "tensor"), thetas, atol=16 * EPS)
    assert overall <= max(max(thetas), HALF_PI) + 16 * EPS


@given(st.floats(HALF_PI, math.pi - 0.01), st.integers(0, 2**32 - 1))
def test_m10_tensor_scope_at_the_default_cap_also_caps_the_global_angle(max_angle, seed):
    rng = np.random.default_rng(seed)
    ps = [torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (2, 3)]
    optimizer, beta1 = MoClip(ps, scope="tensor", max_angle=max_angle, betas=(0.5, 0.9)), 0.5
    for t in range(6):
        old = np.concatenate([optimizer.state[p]["exp_avg"].numpy() if t else np.zeros(len(p)) for p in ps])
        for p in ps:
            p.grad = torch.tensor(rng.normal(size=len(p)) - (2 * old[:len(p)] if len(p) == 2 else 2 * old[-len(p):]))
        optimizer.step()
        assume((optimizer.last_angle < math.pi - 1e-3).all())
        new = np.concatenate([optimizer.state[p]["exp_avg"].numpy() for p in ps])
        if t:
            assert plane_angle(old, (new - beta1 * old) / (1 - beta1)) <= max_angle + 1e-11  # eps / 1e-3
