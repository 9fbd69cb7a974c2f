"""R1 to R14 of THEORY.md: for each statement the property, a tight case, and what fails without an assumption.

Everything is float64 and goes through the project's functions; the other side of each equation is computed here, from
plain numpy softmaxes or from torch's own cross-entropy. Each bound is one function, which the property and the tight
cases share. Tolerances are multiples of EPS with the reason beside them.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.theory import guaranteed_steps
from logits_replay import (ReplayRecord, Tail, linear_replay_cross_entropy, outside_mass, record_topk,
                           replay_cross_entropy, replay_kl_div, sample_tail)
from moclip import MoClip
from strategies import sampled_tails, taus
from test_theory_map import section, table_rows

EPS = float(np.finfo(np.float64).eps)
EPS32 = float(np.finfo(np.float32).eps)
HALF_PI = math.pi / 2


# -- the other side: softmax, q, r and records by hand ---------------------------------------------------------------

def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(z):
    return z - z.max() - math.log(np.exp(z - z.max()).sum())


def split(p, S):
    """(rho, q, r) with p = (1 - rho) q + rho r, q on S, r off S (r = 0 where there is no outside)."""
    inside = np.zeros(len(p), dtype=bool)
    inside[list(S)] = True
    q, r = np.where(inside, p, 0), np.where(inside, 0, p)
    rho = r.sum()
    return rho, q / q.sum(), r / rho if rho > 0 else r


def record_of(*rows, V):
    """A record with the given token sets, whatever a model would have recorded."""
    ids = [j for row in rows for j in sorted(row)]
    offsets = np.cumsum([0] + [len(row) for row in rows])
    return ReplayRecord(torch.tensor(ids, dtype=torch.int32), torch.tensor(offsets), torch.zeros(len(rows)), V, 1.0)


def row_of(record, t=0):
    return record.token_ids[record.offsets[t]:record.offsets[t + 1]].tolist()


def one_hot(y, V):
    return np.eye(V)[y]


def replay_gradient(z, S, y):
    """(L_S, grad_z L_S) of one position, through the function under test."""
    leaf = torch.tensor(z, requires_grad=True)
    loss = replay_cross_entropy(leaf[None], torch.tensor([y]), record_of(S, V=len(z)))
    loss.backward()
    return loss.item(), leaf.grad.numpy()


def full_gradient(z, y):
    leaf = torch.tensor(z, requires_grad=True)
    loss = F.cross_entropy(leaf[None], torch.tensor([y]))
    loss.backward()
    return loss.item(), leaf.grad.numpy()


@st.composite
def positions(draw, outside=1, max_V=12):
    """(z, S, y): logits in [-8, 8], a token set that lacks at least `outside` tokens, and holds the gold token."""
    V = draw(st.integers(1 + outside, max_V))
    z = draw(hnp.arrays(np.float64, V, elements=st.floats(-8, 8, width=32)))
    S = draw(st.sets(st.integers(0, V - 1), min_size=1, max_size=V - outside))
    return z, sorted(S), draw(st.sampled_from(sorted(S)))


logit_rows = st.integers(2, 24).flatmap(lambda V: hnp.arrays(np.float64, V, elements=st.floats(-8, 8, width=32)))


# -- R1: coverage and minimality -------------------------------------------------------------------------------------

# wider than the 64 tokens that are tried first; the last as wide as it takes for a histogram
wide_rows = st.tuples(st.sampled_from([65, 300, 2500]), st.floats(0.1, 3), st.integers(0, 2**32 - 1)).map(
    lambda drawn: drawn[1] * np.random.default_rng(drawn[2]).normal(size=drawn[0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(z=logit_rows | wide_rows, tau=taus, data=st.data())
def test_r1_recorded_set_covers_tau_with_the_fewest_tokens(dtype, z, tau, data):
    y, logits = data.draw(st.integers(0, len(z) - 1)), torch.tensor(z, dtype=dtype)
    S = row_of(record_topk(logits[None], torch.tensor([y]), tau))
    p = softmax(z) if dtype == torch.float64 else logits.softmax(0).double().numpy()  # the very numbers that are added
    total = 1 if dtype == torch.float64 else p.sum()
    tol = 2 * len(z) * EPS  # V additions in either order
    rho = p[[j for j in range(len(p)) if j not in S]].sum()
    assert y in S
    assert rho <= max(total - tau, 0) + tol
    # K = the fewest tokens that can cover tau at all: the K - 1 largest do not, so no K - 1 tokens do
    K = 1 + int((np.cumsum(np.sort(p)[::-1])[:-1] < tau - tol).sum())
    K_if_rounded_up = 1 + int((np.cumsum(np.sort(p)[::-1])[:-1] < tau + tol).sum())
    # S, or what it is without gold, is a set of so many most probable tokens, and one token fewer would not cover tau
    cores = [core for core in (S, [j for j in S if j != y]) if K <= len(core) <= K_if_rounded_up]
    assert any(np.delete(p, core).max(initial=0) <= p[core].min() + tol and p[core].sum() - p[core].min() < tau + tol
               for core in cores)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(V=st.sampled_from([2, 4, 8, 16, 64, 128, 1024]), data=st.data())
def test_r1_tight_uniform_model_reaches_both_bounds(dtype, V, data):
    k = data.draw(st.integers(1, V))
    record = record_topk(torch.zeros(1, V, dtype=dtype), torch.tensor([0]), k / V)  # ties: token 0 ranks first
    assert len(row_of(record)) == k  # ceil(tau V), the largest K_t can be
    assert float(record.outside_mass) == 1 - k / V  # exact: dyadic probabilities


@given(logit_rows, st.floats(0.05, 0.95))
def test_r1_gold_inclusion_lowers_rho_by_its_probability_and_costs_at_most_one_minus_tau_tokens(z, tau):
    V, p = len(z), softmax(z)
    record = record_topk(torch.tensor(np.tile(z, (V, 1))), torch.arange(V), tau)  # every token as gold, once
    smallest = int(record.subset_sizes.argmin())  # a row whose gold token is in the top-K: S is the top-K
    core, rho_core = row_of(record, smallest), float(record.outside_mass[smallest])
    assert len(core) <= math.ceil(tau * V + 2 * V * V * EPS)  # K, and never more than for the uniform model
    for y in range(V):
        gain = 0 if y in core else p[y]
        assert float(record.outside_mass[y]) == pytest.approx(rho_core - gain, abs=2 * EPS32)  # stored in float32
    expected_size = float((p * record.subset_sizes.numpy()).sum())  # gold drawn from p
    missed = p[[j for j in range(V) if j not in core]].sum()
    assert expected_size == pytest.approx(len(core) + missed, rel=4 * V * EPS, abs=0)
    assert expected_size <= len(core) + 1 - tau + 4 * V * V * EPS  # sizes up to V, V terms


def test_r1_false_with_max_size_the_cap_gives_up_coverage():
    record = record_topk(torch.zeros(1, 8, dtype=torch.float64), torch.tensor([0]), 0.75, max_size=2)
    assert float(record.outside_mass) == 0.75 > 1 - 0.75


# -- R2: the loss gap ------------------------------------------------------------------------------------------------

@given(positions())
def test_r2_full_loss_minus_replay_loss_is_minus_log_inside_mass(position):
    z, S, y = position
    replay, full = replay_gradient(z, S, y)[0], full_gradient(z, y)[0]
    log_p = log_softmax(z)
    rho, q, _ = split(softmax(z), S)
    gap = -math.log(np.exp(log_p[S]).sum())  # -log(1 - rho) without the subtraction
    tol = 64 * EPS * (1 + abs(z).max())  # log-sum-exp of logits up to 8: relative to the logits
    assert full - replay == pytest.approx(gap, abs=tol)
    # the same gap is KL(q || p)
    assert gap == pytest.approx(sum(q[j] * (math.log(q[j]) - log_p[j]) for j in S), abs=tol)
    reported = float(outside_mass(torch.tensor(z[None]), record_of(S, V=len(z))))
    assert reported == pytest.approx(rho, abs=16 * EPS)


@given(positions(), st.data())
def test_r2_replay_loss_grows_with_the_set_up_to_the_full_loss(position, data):
    z, S, y = position
    larger = sorted(set(S) | data.draw(st.sets(st.integers(0, len(z) - 1))))
    tol = 64 * EPS * (1 + abs(z).max())
    small, large = replay_gradient(z, S, y)[0], replay_gradient(z, larger, y)[0]
    assert 0 <= small <= large + tol
    assert large <= full_gradient(z, y)[0] + tol


@given(logit_rows, st.data())
def test_r2_tight_whole_vocabulary_is_cross_entropy_and_tau_bounds_the_gap(z, data):
    V, y = len(z), data.draw(st.integers(0, len(z) - 1))
    tol = 64 * EPS * (1 + abs(z).max())
    assert replay_gradient(z, range(V), y)[0] == pytest.approx(full_gradient(z, y)[0], abs=tol)
    k = data.draw(st.integers(1, 16))
    logits, gold = torch.tensor(z[None]), torch.tensor([y])
    recorded = replay_cross_entropy(logits, gold, record_topk(logits, gold, k / 16))
    assert float(F.cross_entropy(logits, gold) - recorded) <= math.log(16 / k) + 64 * EPS * (1 + abs(z).max())
    uniform, target = torch.zeros(1, 16, dtype=torch.float64), torch.tensor([0])
    record = record_topk(uniform, target, k / 16)
    gap = float(F.cross_entropy(uniform, target) - replay_cross_entropy(uniform, target, record))
    assert gap == pytest.approx(math.log(16 / k), abs=16 * EPS)  # log(1 / tau): the recording-time bound, reached


# -- R3: the logit-gradient bias -------------------------------------------------------------------------------------

@given(positions())
def test_r3_bias_is_rho_times_q_minus_r_with_exact_norms(position):
    z, S, y = position
    rho, q, r = split(softmax(z), S)
    replay, full = replay_gradient(z, S, y)[1], full_gradient(z, y)[1]
    bias, tol = replay - full, 32 * EPS  # differences of probabilities, each a few eps of at most 1
    np.testing.assert_allclose(bias, rho * (q - r), rtol=0, atol=tol)
    assert abs(bias).sum() == pytest.approx(2 * rho, abs=len(z) * tol)
    assert np.linalg.norm(bias) == pytest.approx(rho * math.sqrt((q**2).sum() + (r**2).sum()), abs=4 * tol)
    assert np.linalg.norm(bias) <= math.sqrt(2) * rho + 4 * tol
    assert (replay[[j for j in range(len(z)) if j not in S]] == 0).all()  # exactly: those logits are never read


@given(st.floats(-20, 20))
def test_r3_tight_two_tokens_reach_sqrt_two_rho(gap):
    z = np.array([0.0, gap])
    rho = 1 / (1 + math.exp(-gap))
    bias = replay_gradient(z, [0], 0)[1] - full_gradient(z, 0)[1]
    assert abs(np.linalg.norm(bias) - math.sqrt(2) * rho) <= 4 * EPS  # p_y - 1: one rounding of p_y


@given(positions())
def test_r3_replay_gradient_never_opposes_the_full_gradient_in_logit_space(position):
    z, S, y = position
    rho, q, _ = split(softmax(z), S)
    inner = replay_gradient(z, S, y)[1] @ full_gradient(z, y)[1]
    expected = (1 - rho) * ((q - one_hot(y, len(z)))**2).sum() + rho * (1 - q[y])
    assert inner == pytest.approx(expected, abs=32 * EPS)
    assert inner >= -32 * EPS


def test_r3_false_with_the_recorded_rho_once_the_model_has_moved():
    recorded = np.array([4.0, 0.0, 0.0])
    record = record_topk(torch.tensor(recorded[None]), torch.tensor([0]), 0.9)
    moved = np.array([4.0, 0.0, 6.0])
    bias = replay_gradient(moved, row_of(record), 0)[1] - full_gradient(moved, 0)[1]
    assert abs(bias).sum() > 20 * 2 * float(record.outside_mass)
    now = float(outside_mass(torch.tensor(moved[None]), record))
    assert abs(bias).sum() == pytest.approx(2 * now, rel=16 * EPS, abs=0)


# -- R4 and R5: the parameter-gradient bias, on a transformer --------------------------------------------------------

class TinyTransformer(nn.Module):
    """A causal transformer of one block, float64: the real thing, small enough for whole Jacobians."""

    def __init__(self, V=11, d=8, length=5):
        super().__init__()
        self.token, self.position = nn.Embedding(V, d), nn.Parameter(torch.randn(length, d))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = nn.MultiheadAttention(d, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
        self.head = nn.Linear(d, V)
        self.double()

    def hidden(self, tokens):
        x = self.token(tokens) + self.position
        mask = torch.ones(len(self.position), len(self.position), dtype=torch.bool).triu(1)
        n = self.norm1(x)
        x = x + self.attention(n, n, n, attn_mask=mask, need_weights=False)[0]
        return self.norm3(x + self.mlp(self.norm2(x)))

    def forward(self, tokens):
        return self.head(self.hidden(tokens))


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    model = TinyTransformer()
    tokens = torch.randint(0, 11, (3, 6))
    logits, target = model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    target[[1, 5, 6]] = -100  # ignored positions, as padding and prompts are
    record = record_topk(logits.detach(), target, 0.8)
    assert (record.subset_sizes < 11).all()
    return model, logits, target, record


def flat_gradient(loss, model):
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, grads)]).numpy()


def parameter_bias(model, logits, target, record):
    return (flat_gradient(replay_cross_entropy(logits, target, record), model)
            - flat_gradient(F.cross_entropy(logits, target), model))


def bias_bound(rho, D):
    """R4(b), and of arrays R5's: the mean over positions of rho_t D_t."""
    return np.mean(np.multiply(rho, D))


def jacobian(model, z):
    """(V, parameters): J_j = gradient of logit j."""
    return np.stack([flat_gradient(z[j], model) for j in range(len(z))])


def test_r4_transformer_bias_is_rho_times_difference_of_mean_jacobians(transformer):
    model, logits, target, record = transformer
    for t in (0, 7, 14):
        S, z = row_of(record, t), logits[t]
        rho, q, r = split(softmax(z.detach().numpy()), S)
        bias, J = parameter_bias(model, z[None], target[t:t + 1], record_of(S, V=11)), jacobian(model, z)
        np.testing.assert_allclose(bias, rho * (q @ J - r @ J), rtol=0, atol=256 * EPS * abs(J).max())  # backward pass
        outside = [j for j in range(11) if j not in S]
        diameter = max(np.linalg.norm(J[i] - J[j]) for i in S for j in outside)
        assert 0.01 < np.linalg.norm(bias) <= bias_bound(rho, diameter)


def test_r4_transformer_bias_is_collinear_and_exactly_linear_in_rho(transformer):
    model, logits, target, record = transformer
    z, y, S = logits[3:4], target[3:4], record.select([3])
    outside = torch.ones(1, 11, dtype=torch.float64)
    outside[0, row_of(record, 3)] = 0
    biases, rhos = [], []
    for shift in (-4.0, -2.0, 0.0, 2.0, 4.0):  # a constant on all outside logits moves rho and leaves q, r and J alone
        shifted = z + shift * outside
        biases.append(parameter_bias(model, shifted, y, S))
        rhos.append(split(softmax(shifted.detach().numpy()[0]), row_of(record, 3))[0])
    assert max(rhos) > 10 * min(rhos)
    reference = biases[2] / rhos[2]
    for bias, rho in zip(biases, rhos):  # same vector up to the factor rho; gradients are sums of O(1) terms
        np.testing.assert_allclose(bias, rho * reference, rtol=0, atol=256 * EPS * abs(reference).max())


def test_r4_false_when_q_changes_too_the_bias_turns(transformer):
    model, logits, target, record = transformer
    z, y, S = logits[3:4], target[3:4], record.select([3])
    inside = torch.zeros(1, 11, dtype=torch.float64)
    inside[0, row_of(record, 3)[0]] = 2.0
    u, v = parameter_bias(model, z, y, S), parameter_bias(model, z + inside, y, S)
    assert u @ v / np.linalg.norm(u) / np.linalg.norm(v) < 0.99


def test_r4_tight_point_masses_reach_rho_times_diameter():
    torch.manual_seed(1)
    model = TinyTransformer(V=2)
    z = model(torch.tensor([[0, 1, 1, 0, 1]]))[0, -1]
    bias, J = parameter_bias(model, z[None], torch.tensor([1]), record_of([1], V=2)), jacobian(model, z)
    rho = split(softmax(z.detach().numpy()), [1])[0]
    assert np.linalg.norm(bias) == pytest.approx(bias_bound(rho, np.linalg.norm(J[0] - J[1])), rel=256 * EPS, abs=0)


@given(positions(), st.integers(0, 2**32 - 1))
def test_r4_linear_head_bias_is_rank_one_and_exact(position, seed):
    z, S, y = position
    rng = np.random.default_rng(seed)
    h, W = rng.normal(size=4), rng.normal(size=(len(z), 4))
    c = z - W @ h  # so that the logits are z
    leaves = [torch.tensor(x, requires_grad=True) for x in (h, W, c)]
    target, record = torch.tensor([y]), record_of(S, V=len(z))
    replay = linear_replay_cross_entropy(leaves[0][None], leaves[1], target, record, linear_bias=leaves[2])
    full = F.cross_entropy(leaves[0][None] @ leaves[1].T + leaves[2], target)
    gradients = torch.autograd.grad(replay, leaves), torch.autograd.grad(full, leaves)
    g_h, g_W, g_c = ((a - b).numpy() for a, b in zip(*gradients))
    rho, q, r = split(softmax(z), S)
    tol = 256 * EPS * (1 + abs(W).max() + abs(h).max()) * (1 + abs(c).max())  # z is rebuilt from W h + c, c large
    np.testing.assert_allclose(g_c, rho * (q - r), rtol=0, atol=tol)
    np.testing.assert_allclose(g_h, rho * W.T @ (q - r), rtol=0, atol=tol * len(z))
    np.testing.assert_allclose(g_W, rho * np.outer(q - r, h), rtol=0, atol=tol)
    norm = rho * math.sqrt((q**2).sum() + (r**2).sum()) * np.linalg.norm(h)
    assert np.linalg.norm(g_W) == pytest.approx(norm, abs=tol * len(z))


def test_r5_batch_bias_is_the_mean_and_bounded_by_mean_rho_times_diameter(transformer):
    model, logits, target, record = transformer
    mean_bias = parameter_bias(model, logits, target, record)
    scored = [t for t in range(len(record)) if target[t] != -100]
    assert 0 < len(scored) < len(record)  # the mean is over the positions that have a target
    expected, rhos, diameters = np.zeros_like(mean_bias), [], []
    for t in scored:
        S, J = row_of(record, t), jacobian(model, logits[t])
        rho, q, r = split(softmax(logits[t].detach().numpy()), S)
        expected += rho * (q @ J - r @ J) / len(scored)
        rhos.append(rho)
        diameters.append(max(np.linalg.norm(J[i] - J[j]) for i in S for j in range(11) if j not in S))
    np.testing.assert_allclose(mean_bias, expected, rtol=0, atol=256 * EPS * abs(J).max())
    assert np.linalg.norm(mean_bias) <= bias_bound(rhos, diameters) <= (1 - record.tau) * np.mean(diameters)


@given(st.floats(-5, 5), st.integers(1, 6))
def test_r5_tight_equal_positions_reach_the_bound_and_opposite_ones_cancel(gap, copies):
    def bias(targets):  # the parameter is one logit vector (0, gap) that all positions share; S = {y}
        z = torch.tensor([0.0, gap], dtype=torch.float64, requires_grad=True)
        logits, target = z.expand(len(targets), 2), torch.tensor(targets)
        replay = replay_cross_entropy(logits, target, record_of(*[[y] for y in targets], V=2))
        return (torch.autograd.grad(replay, z)[0] - torch.autograd.grad(F.cross_entropy(logits, target), z)[0]).numpy()

    rho = 1 / (1 + math.exp(-gap))
    bound = bias_bound([rho] * copies, [math.sqrt(2)] * copies)  # D_t = sqrt(2)
    assert np.linalg.norm(bias([0] * copies)) == pytest.approx(bound, abs=8 * EPS)
    mixed = bias([0, 1] * copies)  # rho (1, -1) and (1 - rho) (-1, 1), averaged
    np.testing.assert_allclose(mixed, (2 * rho - 1) / 2 * np.array([1, -1]), rtol=0, atol=64 * EPS)


# -- R6: drift of rho ------------------------------------------------------------------------------------------------

def kl(p, q):
    return float((p * (np.log(p) - np.log(q))).sum())


def binary_kl(a, b):
    return kl(np.array([a, 1 - a]), np.array([b, 1 - b]))


def pinsker(divergence):
    """The most by which the probabilities of any event differ; KL may be rounded below 0."""
    return math.sqrt(max(0.0, divergence) / 2)


@given(positions(), st.data())
def test_r6_rho_of_the_current_model_is_bounded_by_its_distance_from_the_recording_model(position, data):
    z0, S, _ = position
    z1 = data.draw(hnp.arrays(np.float64, len(z0), elements=st.floats(-8, 8, width=32)))
    record = record_of(S, V=len(z0))
    rho0, rho1 = (float(outside_mass(torch.tensor(z[None]), record)) for z in (z0, z1))
    p0, p1 = softmax(z0), softmax(z1)
    tol = 16 * len(z0) * EPS
    total_variation = abs(p1 - p0).sum() / 2
    assert abs(rho1 - rho0) <= total_variation + tol
    assert rho1 <= rho0 + pinsker(min(kl(p0, p1), kl(p1, p0))) + math.sqrt(tol)  # sqrt near KL = 0
    assume(1e-6 < min(rho0, rho1) and max(rho0, rho1) < 1 - 1e-6)  # 1 - rho must keep its digits below
    tol = 1e-6 * 1e-3  # eps over the smallest mass, a few times
    assert binary_kl(rho0, rho1) <= kl(p0, p1) + tol
    assert binary_kl(rho1, rho0) <= kl(p1, p0) + tol
    change = abs(z1 - z0).max()
    assert math.log(rho1 / (1 - rho1)) <= math.log(rho0 / (1 - rho0)) + 2 * change + tol


@given(positions(), st.floats(0.01, 3))
def test_r6_tight_moving_the_outside_logits_together_reaches_every_bound(position, size):
    z0, S, _ = position
    inside = np.isin(np.arange(len(z0)), S)
    z1 = z0 + np.where(inside, -size, size)  # |change| = size everywhere; q and r stay
    record = record_of(S, V=len(z0))
    rho0, rho1 = (float(outside_mass(torch.tensor(z[None]), record)) for z in (z0, z1))
    assume(1e-6 < rho0 and rho1 < 1 - 1e-6)
    p0, p1 = softmax(z0), softmax(z1)
    tol = 1e-9  # eps over the smallest mass 1e-6, a few times
    assert rho1 - rho0 == pytest.approx(abs(p1 - p0).sum() / 2, abs=16 * len(z0) * EPS)
    assert binary_kl(rho0, rho1) == pytest.approx(kl(p0, p1), abs=tol)
    assert math.log(rho1 / (1 - rho1)) - math.log(rho0 / (1 - rho0)) == pytest.approx(2 * size, abs=tol)


@given(st.floats(0.01, 0.1), st.booleans())
def test_r6_tight_two_equal_tokens_that_move_a_little_reach_pinskers_constant(size, back):
    p0, p1 = (softmax(np.array(z)) for z in ((0.0, 0.0), (-size, size)))
    record = record_of([0], V=2)
    rho0, rho1 = (float(outside_mass(torch.tensor(p).log()[None], record)) for p in (p0, p1))
    bound = pinsker(kl(p1, p0) if back else kl(p0, p1))
    assert bound * (1 - size**2) <= rho1 - rho0 <= bound * (1 + 1e-9)  # KL is of second order: eps / size^2


def test_r6_false_for_the_recorded_rho_tau_bounds_nothing_after_the_model_moved():
    z = torch.tensor([[5.0, 0.0, 0.0]], dtype=torch.float64)
    record = record_topk(z, torch.tensor([0]), 0.95)
    assert float(record.outside_mass) <= 1 - 0.95
    assert float(outside_mass(z + torch.tensor([0.0, 0.0, 30.0]), record)) > 1 - 1e-10


# -- R7: the replay loss does not control rho ------------------------------------------------------------------------

def log_odds_outside(z, S):
    inside = np.isin(np.arange(len(z)), S)
    def lse(x):
        return x.max() + math.log(np.exp(x - x.max()).sum())
    return lse(z[~inside]) - lse(z[inside])


@pytest.mark.parametrize("step_size, replay_end, rho_end, full_end",
                         [(0.1, 0.1, 0.99, 5), (1, 0.01, 0.9999, 8), (10, 0.001, 0.9999, 8)])
def test_r7_replay_loss_can_vanish_while_rho_goes_to_one_and_the_full_loss_grows(
        step_size, replay_end, rho_end, full_end):
    W = torch.tensor([[1.0], [0.0], [3.0]], dtype=torch.float64)  # token 2, outside, shares the gold token's feature
    h = torch.tensor([[-4.0]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0])
    record, history = record_of([0, 1], V=3), []
    for _ in range(200):  # gradient descent on the replay loss in the only parameter, h
        loss = linear_replay_cross_entropy(h, W, target, record)
        logits = (h @ W.T).detach()
        history.append((loss.item(), float(outside_mass(logits, record)), float(F.cross_entropy(logits, target))))
        h = (h - step_size * torch.autograd.grad(loss, h)[0]).detach().requires_grad_()
    replay, rho, full = map(np.array, zip(*history))
    assert (np.diff(replay) < 0).all() and (np.diff(rho) > 0).all()
    assert rho[0] < 1e-4 and replay[-1] < replay_end and rho[-1] > rho_end and full[-1] > full_end


@pytest.mark.parametrize("c, rho_end", [(0.5, 0), (1.0, 0.5), (1.5, 1)])
def test_r7_false_unless_an_outside_logit_rises_faster_than_the_gold_one(c, rho_end):
    W = torch.tensor([[1.0], [0.0], [c]], dtype=torch.float64)
    h = torch.tensor([[-4.0]], dtype=torch.float64, requires_grad=True)
    target, record = torch.tensor([0]), record_of([0, 1], V=3)
    for _ in range(400):  # descent by steps of 0.05: with a fixed step size h grows like the logarithm of their number
        loss = linear_replay_cross_entropy(h, W, target, record)
        slope = torch.autograd.grad(loss, h)[0]
        h = (h - 0.05 * slope / slope.abs()).detach().requires_grad_()
    assert h > 15 and loss < 1e-6
    assert float(outside_mass((h @ W.T).detach(), record)) == pytest.approx(rho_end, abs=1e-3)  # exp(-0.5 h) at h = 16


@given(positions(outside=2))
def test_r7_first_order_change_of_rho_has_the_stated_rate(position):
    z, S, y = position
    rho, q, r = split(softmax(z), S)
    leaf = torch.tensor(z[None], requires_grad=True)
    slope = torch.autograd.grad(outside_mass(leaf, record_of(S, V=len(z))).sum(), leaf)[0].numpy()[0]
    rate_replay = -slope @ replay_gradient(z, S, y)[1]
    assert rate_replay == pytest.approx(rho * (1 - rho) * ((q**2).sum() - q[y]), abs=32 * EPS)
    rate_full = -slope @ full_gradient(z, y)[1]  # the full loss has a restoring force that the replay loss lacks
    assert rate_replay - rate_full == pytest.approx(rho**2 * (1 - rho) * ((q**2).sum() + (r**2).sum()), abs=32 * EPS)


@given(positions(), st.floats(0, 8))
def test_r7_a_finite_step_raises_the_log_odds_by_at_most_its_first_order_term(position, eta):
    z, S, y = position
    q = split(softmax(z), S)[1]
    rise = log_odds_outside(z - eta * replay_gradient(z, S, y)[1], S) - log_odds_outside(z, S)
    exact = -math.log(sum(q[j] * math.exp(-eta * (q[j] - (j == y))) for j in S))
    tol = 128 * EPS * (1 + eta) * (1 + abs(z).max())
    assert rise == pytest.approx(exact, abs=tol)
    assert rise <= eta * ((q**2).sum() - q[y]) + tol <= eta + tol


@given(positions(), st.floats(0, 100))
def test_r7_in_logit_space_no_step_of_any_size_raises_the_full_loss(position, eta):
    z, S, y = position
    moved, q = z - eta * replay_gradient(z, S, y)[1], split(softmax(z), S)[1]
    tol = 64 * EPS * (1 + eta) * (1 + abs(z).max())
    for j in range(len(z)):  # L_full grows with each z_j - z_y, and none of them rises
        change = (moved[j] - moved[y]) - (z[j] - z[y])
        assert change == pytest.approx(0 if j == y else -eta * (1 - q[y] + q[j]), abs=tol)
    assert full_gradient(moved, y)[0] <= full_gradient(z, y)[0] + tol


@given(positions(), st.floats(0, 8))
def test_r7_calibrated_gold_inside_a_fixed_set_never_raises_the_expected_log_odds(position, eta):
    z, S, _ = position
    q, before = split(softmax(z), S)[1], log_odds_outside(z, S)
    rises = [log_odds_outside(z - eta * replay_gradient(z, S, y)[1], S) - before for y in S]
    assert sum(q[y] * rise for y, rise in zip(S, rises)) <= 128 * EPS * (1 + eta) * (1 + abs(z).max())


@given(logit_rows, st.floats(0.1, 0.9))
def test_r7_gold_inclusion_adds_an_upward_drift_of_at_most_the_uncovered_mass(z, tau):
    V, p = len(z), softmax(z)
    record = record_topk(torch.tensor(np.tile(z, (V, 1))), torch.arange(V), tau)  # gold drawn from p: calibrated
    core = row_of(record, int(record.subset_sizes.argmin()))  # S without an added gold token
    drift = 0.0
    for y in range(V):
        S = row_of(record, y)
        if len(S) < V:
            _, q, r = split(p, S)
            g = replay_gradient(z, S, y)[1]
            drift += p[y] * -(r @ g - q @ g)  # d log-odds / d eta = E_r[-g] - E_q[-g]
    tol = 32 * V * EPS
    assert -tol <= drift <= 1 - p[core].sum() + tol <= 1 - tau + 2 * tol


def test_r7_tight_calibrated_model_with_gold_outside_drifts_up_by_almost_the_uncovered_mass():
    def drift(p, tau):  # of the log-odds: E_q[g] - E_r[g], and g is 0 outside S
        total = 0.0
        for y in range(3):
            z = np.log(p)
            S = row_of(record_topk(torch.tensor(z[None]), torch.tensor([y]), tau))
            total += p[y] * split(p, S)[1] @ replay_gradient(z, S, y)[1]
        return total

    for e in (0.1, 0.01, 0.001):  # T is token 0; gold 1 or 2, e each, is added when drawn
        a, ratio = e / (1 - e), drift(np.array([1 - 2 * e, e, e]), 1 - 2 * e - 1e-9) / (2 * e)  # 1e-9: the rounded sum
        assert ratio == pytest.approx((1 - a) * (1 - 2 * a), rel=64 * EPS, abs=0)
    assert ratio > 0.99
    assert drift(np.full(3, 1 / 3), 0.3) == pytest.approx(0, abs=4 * EPS)  # the lower end: the uniform model


def test_r7_false_beyond_first_order_a_larger_step_turns_the_drift_of_a_calibrated_model_round():
    p, V = np.arange(1, 1001)**-1.1, 1000
    p /= p.sum()
    record = record_topk(torch.tensor(np.log(np.tile(p, (V, 1)))), torch.arange(V), 0.98)

    def drift(eta):  # expected rise of the log-odds per unit of step size, by (c), which is exact
        total = 0.0
        for y in range(V):
            S = np.array(row_of(record, y))
            q = p[S] / p[S].sum()
            total += p[y] * -math.log((q * np.exp(-eta * (q - (S == y)))).sum())
        return total / eta

    assert drift(1e-5) == pytest.approx(0.00099, abs=5e-6)
    assert drift(0.1) == pytest.approx(-0.00093, abs=5e-6)


# -- R8: the cost model ----------------------------------------------------------------------------------------------

class CountFlops(TorchDispatchMode):
    """Adds up the multiply-adds (2 operations each) of the matrix products that run; finds the largest output."""

    flops = 0
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "sparse_sampled_addmm":  # nnz inner products of length d
            self.flops += 2 * args[0]._nnz() * args[1].shape[1]
        elif name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            terms = left._nnz() if left.layout != torch.strided else left.numel()
            self.flops += 2 * terms * right.shape[1]
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                stored = x.numel() if x.layout == torch.strided else x._nnz()
                self.largest = max(self.largest, stored)
        return out


def largest_tensor(nnz, N, V, d, M=None):
    return max(nnz, N * d, V * d, N + 1, 0 if M is None else N * (M + 1))


@given(st.integers(2, 12), st.integers(2, 40), st.integers(1, 8), st.floats(0.1, 0.6), st.integers(0, 2**32 - 1))
def test_r8_head_work_is_6_d_times_nnz_and_N_M_and_no_tensor_is_larger_than_nnz_or_the_inputs(N, V, d, tau, seed):
    torch.manual_seed(seed)
    h, W, target = torch.randn(N, d), torch.randn(V, d), torch.randint(0, V, (N,))
    h, W = (x.double().requires_grad_() for x in (h, W))
    record = record_topk((h @ W.T).detach(), target, tau)
    nnz = len(record.token_ids)
    with CountFlops() as dense:
        F.cross_entropy(h @ W.T, target).backward()
    with CountFlops() as ragged:
        linear_replay_cross_entropy(h, W, target, record).backward()
    assert dense.flops == 6 * N * V * d and dense.largest >= N * V
    assert ragged.flops == 6 * nnz * d
    assert ragged.largest <= largest_tensor(nnz, N, V, d)
    assert ragged.largest < N * V or d >= min(N, V) or nnz == N * V
    tail = sample_tail(target, V, 3)
    M = len(tail.token_ids)
    with CountFlops() as tailed:
        linear_replay_cross_entropy(h, W, target, record, tail=tail).backward()
    assert tailed.flops == 6 * nnz * d + 6 * N * M * d
    assert tailed.largest <= largest_tensor(nnz, N, V, d, M)


@pytest.mark.parametrize("N, V, d, everything, tail_size, most", [
    (12, 2, 1, False, None, "N + 1"), (12, 2, 8, False, None, "N d"), (3, 40, 8, False, None, "V d"),
    (12, 9, 1, True, None, "nnz"), (12, 9, 1, False, 5, "N (M + 1)")])
def test_r8_tight_each_term_is_the_largest_tensor_somewhere(N, V, d, everything, tail_size, most):
    h, W = (torch.randn(n, d, dtype=torch.float64, requires_grad=True) for n in (N, V))
    target = torch.zeros(N, dtype=torch.int64)
    record = record_of(*[range(V) if everything else [0]] * N, V=V)
    tail = None if tail_size is None else sample_tail(target, V, tail_size)
    with CountFlops() as run:
        linear_replay_cross_entropy(h, W, target, record, tail=tail).backward()
    sizes = {"N + 1": N + 1, "N d": N * d, "V d": V * d, "nnz": len(record.token_ids), "N (M + 1)": N * 7}
    assert max(sizes, key=lambda name: sizes[name] if tail or "M" not in name else 0) == most
    assert run.largest == largest_tensor(len(record.token_ids), N, V, d, None if tail is None else len(tail.token_ids))


# family, layers, heads, key-value heads, width of a head, width of the MLP (learned positions), tied
ARCHITECTURES = {
    "Gemma-3-270M": ("gemma3", 18, 4, 1, 256, 2048, True), "Gemma-2-2B": ("gemma2", 26, 8, 4, 256, 9216, True),
    "Pythia-70M": ("neox", 6, 8, 8, 64, 2048, False), "Pythia-160M": ("neox", 12, 12, 12, 64, 3072, False),
    "Pythia-1B": ("neox", 16, 8, 8, 256, 8192, False), "GPT-2-124M": ("gpt2", 12, 12, 12, 64, 3072, True),
    "GPT-2-1.5B": ("gpt2", 48, 25, 25, 64, 6400, True), "Qwen2.5-0.5B": ("qwen2", 24, 14, 2, 64, 4864, True),
    "Qwen2.5-7B": ("qwen2", 28, 28, 4, 128, 18944, False), "Llama-3.2-1B": ("llama", 16, 32, 8, 64, 8192, True),
    "Llama-3.1-8B": ("llama", 32, 32, 8, 128, 14336, False), "Llama-2-7B": ("llama", 32, 32, 32, 128, 11008, False),
    "SmolLM2-135M": ("llama", 30, 9, 3, 64, 1536, True), "SmolLM2-360M": ("llama", 32, 15, 5, 64, 2560, True),
    "SmolLM2-1.7B": ("llama", 24, 32, 32, 64, 8192, True)}


SIZES = {  # V, d
    "Gemma-3-270M": (262144, 640), "Gemma-2-2B": (256000, 2304), "Pythia-70M": (50304, 512),
    "Pythia-160M": (50304, 768), "Pythia-1B": (50304, 2048), "GPT-2-124M": (50257, 768), "GPT-2-1.5B": (50257, 1600),
    "Qwen2.5-0.5B": (151936, 896), "Qwen2.5-7B": (152064, 3584), "Llama-3.2-1B": (128256, 2048),
    "Llama-3.1-8B": (128256, 4096), "Llama-2-7B": (32000, 4096), "SmolLM2-135M": (49152, 576),
    "SmolLM2-360M": (49152, 960), "SmolLM2-1.7B": (49152, 2048)}


def count_parameters(V, d, family, layers, heads, kv_heads, head_width, mlp, tied):
    """(all parameters, those that are read and not multiplied)."""
    q, kv = heads * head_width, kv_heads * head_width
    weights = d * q + 2 * d * kv + q * d + (2 if family in ("neox", "gpt2") else 3) * d * mlp  # gated MLPs have 3
    biases = {"neox": q + 2 * kv + d + mlp + d, "gpt2": q + 2 * kv + d + mlp + d, "qwen2": q + 2 * kv}.get(family, 0)
    norm = 2 * d if family in ("neox", "gpt2") else d  # LayerNorm has a bias, RMSNorm none
    norms = {"gemma2": 4 * norm, "gemma3": 4 * norm + 2 * head_width}.get(family, 2 * norm)
    positions_ = 1024 * d if family == "gpt2" else 0
    total = V * d * (1 if tied else 2) + positions_ + layers * (weights + biases + norms) + norm
    return total, positions_ + (0 if tied else V * d)


def head_share_table():
    row = r"^\| (\S+) \| ([\d ]+) \| ([\d ]+) \| ([\d ]+) \| ([\d ]+) \| ([\d.]+) % \| (\S+) \|$"
    return [(name, *(int(x.replace(" ", "")) for x in numbers[:4]), float(numbers[4]), numbers[5])
            for name, *numbers in table_rows("R8", row)]


def test_r8_table_of_head_shares_follows_from_the_architectures():
    table = head_share_table()
    assert len(table) == 4
    for name, V, d, parameters, looked_up, percent, epochs in table:
        assert (V, d) == SIZES[name]
        assert (parameters, looked_up) == count_parameters(V, d, *ARCHITECTURES[name]), name
        share = V * d / (parameters - looked_up)  # looked_up: embeddings that are read, not multiplied
        assert percent == pytest.approx(100 * share, abs=0.05), name
        # the head alone reaches 40 % from E = 1 / (3 (share - 0.4)) epochs on, if ever
        expected = f"{1 / (3 * (share - 0.4)):.1f}" if share > 0.4 else "never"
        assert epochs == expected, name
    counted = {name: count_parameters(*SIZES[name], *ARCHITECTURES[name]) for name in ARCHITECTURES}
    shares = {name: math.prod(SIZES[name]) / (total - read) for name, (total, read) in counted.items()}
    below_a_third = sum(share < 1 / 3 for share in shares.values())
    assert (below_a_third, len(shares)) == (13, 15)  # where recording at every epoch costs more than a free head saves
    assert {name for name, share in shares.items() if share > 0.4} == {"Pythia-70M", "Gemma-3-270M"}
    share, text = 100 * shares["Gemma-3-270M"], " ".join(section("R8").split())
    assert f"Gemma-3-270M ({share:.1f} %, from {100 / (3 * (share - 40)):.1f} epochs on)" in text


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 3) | st.none(), st.floats(0.1, 0.9),
       st.integers(0, 2**32 - 1))
def test_r8_saving_is_that_of_the_products_a_whole_training_runs(epochs, recordings, tail_size, tau, seed):
    torch.manual_seed(seed)
    N, V, d = 6, 20, 5
    x = torch.randn(N, d, dtype=torch.float64, requires_grad=True)  # embeddings, trained
    target = torch.randint(0, V, (N,))
    body = nn.Sequential(nn.Linear(d, 4 * d, bias=False), nn.ReLU(), nn.Linear(4 * d, d, bias=False)).double()
    W = torch.randn(V, d, dtype=torch.float64, requires_grad=True)
    multiplied = sum(p.numel() for p in body.parameters()) + W.numel()
    record = record_topk((body(x) @ W.T).detach(), target, tau)
    tail = None if tail_size is None else sample_tail(target, V, tail_size)
    with CountFlops() as full:
        for _ in range(epochs):
            F.cross_entropy(body(x) @ W.T, target).backward()
    with CountFlops() as replay:
        for _ in range(recordings):  # Stage 0: one forward pass, head included
            with torch.no_grad():
                record = record_topk(body(x) @ W.T, target, tau)
        for _ in range(epochs):
            linear_replay_cross_entropy(body(x), W, target, record, tail=tail).backward()
    share = V * d / multiplied
    kappa = len(record.token_ids) / (N * V) + (len(tail.token_ids) / V if tail else 0)
    saving = 1 - replay.flops / full.flops
    assert saving == pytest.approx(share * (1 - kappa) - recordings / (3 * epochs), abs=8 * EPS)
    assert saving < share


# -- R9: the sampled tail --------------------------------------------------------------------------------------------

def tail_gradient(z, S, y, R, weights):
    """(L_R, grad_z L_R) of one position, through the function under test."""
    leaf = torch.tensor(z, requires_grad=True)
    tail = Tail(torch.tensor(R, dtype=torch.int64), torch.tensor(weights, dtype=torch.float64).log())
    loss = replay_cross_entropy(leaf[None], torch.tensor([y]), record_of(S, V=len(z)), tail=tail)
    loss.backward()
    return loss.item(), leaf.grad.numpy()


def every_sample(V, golds, m):
    """All equally likely samples (R, weights): the golds with weight 1, m of the others with weight M / m."""
    others = [j for j in range(V) if j not in golds]
    for drawn in itertools.combinations(others, m):
        R = sorted([*golds, *drawn])
        yield R, [1.0 if j in golds else len(others) / m for j in R]


def B_of(z, S, R, weights):
    """B': the weighted sum of exp z_j over the sampled tokens that S lacks."""
    return sum(w * math.exp(z[j]) for j, w in zip(R, weights) if j not in S)


def cv_squared(z, S, golds, m):
    B = sum(math.exp(z[j]) for j in range(len(z)) if j not in S)
    return np.mean([(B_of(z, S, *sample) / B - 1)**2 for sample in every_sample(len(z), golds, m)])


def expected_step(z, S, y, golds, m):
    """(E L_R, E grad_z L_R, E |grad_z L_R - grad_z L_full|^2), every sample once."""
    losses, gradients = zip(*(tail_gradient(z, S, y, *sample) for sample in every_sample(len(z), golds, m)))
    error = np.array(gradients) - full_gradient(z, y)[1]
    return np.mean(losses), np.mean(gradients, 0), (error**2).sum(1).mean()


def loss_gap_bound(rho, cv2):
    return (-cv2 * math.log1p(-rho) - math.log1p(rho * cv2)) / (1 + cv2)


def inside_bias_bound(rho, cv2):
    return rho**2 * cv2 / (1 + rho * cv2)


def outside_bias_bound(rho, cv2):
    return rho**2 * math.sqrt(cv2 * (1 + (1 - rho)**2 * cv2))


def noise_bound(p, rho, cv2, sampled, pi):
    """`sampled`: the tokens outside S that chance decides, each with probability pi."""
    return (math.sqrt((p[sampled]**2).sum() * (1 / pi - 1)) + np.linalg.norm(p) * rho * math.sqrt(cv2)) / (1 - rho)


TAIL_TOL = 256 * EPS  # losses below 16 nats and gradients below 1, a few roundings each


@given(sampled_tails())
def test_r9_sampled_sum_is_unbiased_and_lies_between_replay_and_everything(case):
    z, S, y, golds, m = case
    A, B = (sum(math.exp(z[j]) for j in range(len(z)) if (j in S) == inside) for inside in (True, False))
    sums = []
    for R, weights in every_sample(len(z), golds, m):
        loss = tail_gradient(z, S, y, R, weights)[0]
        assert loss >= replay_gradient(z, S, y)[0] - TAIL_TOL
        sums.append(math.exp(loss + z[y]) - A)
        assert sums[-1] == pytest.approx(B_of(z, S, R, weights), abs=TAIL_TOL * (A + sums[-1]))
    assert np.mean(sums) == pytest.approx(B, abs=TAIL_TOL * (A + max(sums)))
    everything = tail_gradient(z, S, y, range(len(z)), [1.0] * len(z))
    assert everything[0] == pytest.approx(full_gradient(z, y)[0], abs=TAIL_TOL)
    np.testing.assert_allclose(everything[1], full_gradient(z, y)[1], rtol=0, atol=TAIL_TOL)


def test_r9_sample_tail_draws_this_design_every_sample_equally_often():
    target, draws = torch.tensor([3, 0, 3, -100]), 3000
    design = {tuple(R): weights for R, weights in every_sample(6, [0, 3], 2)}
    counts, generator = dict.fromkeys(design, 0), torch.Generator().manual_seed(0)
    for _ in range(draws):
        tail = sample_tail(target, 6, 2, generator=generator)
        R = tuple(tail.token_ids.tolist())
        counts[R] += 1
        np.testing.assert_allclose(tail.log_weight.exp(), design[R], rtol=4 * EPS32)
    assert all(abs(n - draws / 6) < 4 * math.sqrt(draws / 6) for n in counts.values())  # four standard deviations


@given(sampled_tails())
def test_r9_expected_loss_falls_short_by_at_most_the_stated_multiple_of_cv_squared(case):
    z, S, y, golds, m = case
    rho, cv2 = split(softmax(z), S)[0], cv_squared(z, S, golds, m)
    gap = full_gradient(z, y)[0] - expected_step(z, S, y, golds, m)[0]
    assert -TAIL_TOL <= gap <= loss_gap_bound(rho, cv2) + TAIL_TOL


@given(sampled_tails())
def test_r9_expected_gradient_is_biased_in_second_order_of_rho_only(case):
    z, S, y, golds, m = case
    rho, cv2 = split(softmax(z), S)[0], cv_squared(z, S, golds, m)
    bias = expected_step(z, S, y, golds, m)[1] - full_gradient(z, y)[1]
    inside = np.isin(np.arange(len(z)), S)
    assert abs(bias[inside]).sum() <= inside_bias_bound(rho, cv2) + TAIL_TOL
    assert abs(bias[~inside]).sum() <= outside_bias_bound(rho, cv2) + TAIL_TOL


@given(st.floats(-6, 6), st.integers(8, 12))
def test_r9_tight_one_of_two_nearly_equal_outside_tokens_is_sampled(gap, digits):
    z, S, golds = np.array([0.0, gap + 2.0**-digits, gap]), [0], [0]
    rho, cv2 = split(softmax(z), S)[0], cv_squared(z, S, golds, 1)
    bias = expected_step(z, S, 0, golds, 1)[1] - full_gradient(z, 0)[1]
    assert abs(bias[1:]).sum() == pytest.approx(outside_bias_bound(rho, cv2), rel=4 * cv2, abs=TAIL_TOL)


@given(sampled_tails())
def test_r9_restoring_force_is_back_up_to_the_bias_of_the_gradient(case):
    z, S, y, golds, m = case
    rho, q, r = split(softmax(z), S)
    cv2, gradient = cv_squared(z, S, golds, m), expected_step(z, S, y, golds, m)[1]
    bias = gradient - full_gradient(z, y)[1]
    assert abs(bias).sum() <= inside_bias_bound(rho, cv2) + outside_bias_bound(rho, cv2) + TAIL_TOL  # (d)
    rise = (q - r) @ gradient  # d log-odds / d eta = E_r[-g] - E_q[-g]
    wanted = (q**2).sum() - q[y] - rho * ((q**2).sum() + (r**2).sum())  # R7(b): the full loss
    # so it is off by at most the L1 norm of the bias: no entry of q - r exceeds 1
    assert rise - wanted == pytest.approx((q - r) @ bias, abs=TAIL_TOL)


@given(sampled_tails())
def test_r9_noise_of_a_small_sample_is_at_most_the_stated_size(case):
    z, S, y, golds, m = case
    p = softmax(z)
    rho, cv2, M = split(p, S)[0], cv_squared(z, S, golds, m), len(z) - len(golds)
    sampled = [j for j in range(len(z)) if j not in S and j not in golds]
    squares = []  # of (p^ - x p) / x, the proof's
    for R, weights in every_sample(len(z), golds, m):
        W = np.zeros(len(z))
        W[R], W[S] = weights, 1
        squares.append(((p * W / (p @ W) - p)**2).sum())
    noise = math.sqrt(expected_step(z, S, y, golds, m)[2])
    assert noise == pytest.approx(math.sqrt(np.mean(squares)), abs=TAIL_TOL)
    assert noise <= noise_bound(p, rho, cv2, sampled, m / M) + TAIL_TOL


@given(st.floats(-3, 1))
def test_r9_tight_many_outside_tokens_are_sampled_together_or_not_at_all(gap):
    n, pi = 10_000, 0.999
    z, R = np.array([0.0, *[gap - math.log(n)] * n]), np.arange(n + 1)
    p = softmax(z)
    errors = [((tail_gradient(z, [0], 0, *draw)[1] - full_gradient(z, 0)[1])**2).sum()
              for draw in (([0], [1.0]), (R, [1.0, *[1 / pi] * n]))]
    noise, bound = math.sqrt((1 - pi) * errors[0] + pi * errors[1]), noise_bound(p, p[1:].sum(), 1 / pi - 1, R[1:], pi)
    assert noise <= bound <= 1.05 * noise  # the first term is at most 1 / (100 p_0) of the second


@given(sampled_tails())
def test_r9_cv_of_golds_and_a_uniform_sample_follows_from_the_share_and_the_spread_of_the_others(case):
    z, S, _, golds, m = case
    e = np.where(np.isin(np.arange(len(z)), S), 0, np.exp(z))
    others = e[[j for j in range(len(z)) if j not in golds]]
    M, share = len(others), others.sum() / e.sum()
    assume(M > 1 and others.sum() > 0)
    r = others / others.sum()
    expected = share**2 * (1 / m - 1 / M) * M / (M - 1) * (M * (r**2).sum() - 1)
    assert cv_squared(z, S, golds, m) == pytest.approx(expected, rel=256 * EPS, abs=64 * EPS)


@given(st.floats(-6, 6), st.floats(0.01, 1))
def test_r9_tight_one_outside_token_sampled_with_any_probability(gap, pi):
    z = np.array([0.0, gap])
    rho, cv2 = split(softmax(z), [0])[0], (1 - pi) / pi
    missed, sampled = (tail_gradient(z, [0], 0, *draw) for draw in (([0], [1.0]), ([0, 1], [1.0, 1 / pi])))
    (loss, gradient), tol = full_gradient(z, 0), TAIL_TOL / pi
    assert loss - ((1 - pi) * missed[0] + pi * sampled[0]) == pytest.approx(loss_gap_bound(rho, cv2), abs=tol)
    bias = (1 - pi) * missed[1] + pi * sampled[1] - gradient
    assert abs(bias[0]) == pytest.approx(inside_bias_bound(rho, cv2), abs=tol)


@given(st.floats(0.1, 3))
def test_r9_tight_one_of_two_outside_tokens_of_a_small_share_is_sampled(cv):
    rho, s = 1e-3, math.sin(math.atan(1 / cv) / 2)**2  # tan(2 phi) = 1 / CV; s: the chance of the first
    r1 = s + cv * math.sqrt(s * (1 - s))
    z = np.log([1 - rho, rho * r1, rho * (1 - r1)])
    draws = (([0, 1], [1.0, 1 / s]), ([0, 2], [1.0, 1 / (1 - s)]))
    assert s * (r1 / s)**2 + (1 - s) * ((1 - r1) / (1 - s))**2 - 1 == pytest.approx(cv**2)
    gradients = [tail_gradient(z, [0], 0, *draw)[1] for draw in draws]
    bias = s * gradients[0] + (1 - s) * gradients[1] - full_gradient(z, 0)[1]
    bound = outside_bias_bound(rho, cv**2)
    assert bound * (1 - rho * r1 / s) <= abs(bias[1:]).sum() <= bound  # x is 1 as rho goes to 0, here up to this more


def test_r9_false_for_weights_that_are_not_inverse_probabilities_and_useless_where_the_heavy_token_is_left_to_chance():
    z, S = np.array([2.0, 0.0, 0.0, 0.0, 0.0]), [0]
    samples = [[0, j] for j in range(1, 5)]
    unweighted = np.mean([tail_gradient(z, S, 0, R, [1.0, 1.0])[0] for R in samples])
    weighted = expected_step(z, S, 0, [0], 1)[0]
    full, replay = full_gradient(z, 0)[0], replay_gradient(z, S, 0)[0]
    assert full - weighted == pytest.approx(0, abs=8 * EPS)  # equal others: no variance at all
    assert full - unweighted > 0.6 * (full - replay)
    # all that is outside sits on one of M = 9999 other tokens, and m = 10 are sampled
    z, pi = np.full(10_000, -40.0), 10 / 9_999
    z[:2] = 2.0, 0.0
    expected = (1 - pi) * tail_gradient(z, S, 0, [0], [1.0])[0] + pi * tail_gradient(z, S, 0, [0, 1], [1.0, 1 / pi])[0]
    full, replay = full_gradient(z, 0)[0], replay_gradient(z, S, 0)[0]
    assert full - expected > 0.95 * (full - replay)  # no better than no tail
    assert tail_gradient(z, S, 0, [0, 1], [1.0, 1.0])[0] == pytest.approx(full, abs=1e-10)  # with certainty: all of it


# -- R10: which rows of the head move --------------------------------------------------------------------------------

def largest_step(lr, betas=(0.9, 0.999), a=4 / math.pi, b=1.0):
    """M4(d): lr a arctan(C / b), C = C_infinity."""
    beta1, beta2 = betas
    return lr * a * math.atan((1 - beta1) * math.sqrt(beta2 / ((1 - beta2) * (beta2 - beta1**2))) / b)


def head_travel_bound(steps, lr, d, rows, betas=(0.9, 0.999)):
    """R10(c): the most by which |W - W0|_F can grow when `rows` rows of width d move."""
    return steps * largest_step(lr, betas) * math.sqrt(d * rows)


def eps_bound(lr, eps, asked):
    """R10(e): asked (steps, V, d), the means over each batch so far of p_tj |h_ti|."""
    return lr / eps * np.max(asked, 0)


def head_losses(h, W, target, record, tail):
    return {"full": F.cross_entropy(h @ W.T, target), "replay": linear_replay_cross_entropy(h, W, target, record),
            "tail": linear_replay_cross_entropy(h, W, target, record, tail=tail)}


def rows_with_a_gradient(record, tail, V):
    sets = [row_of(record, t) for t in range(len(record))]
    replay = set().union(*(S for S in sets if len(S) > 1))  # a gold token alone has probability 1 already
    return {"full": set(range(V)), "replay": replay, "tail": set().union(*sets, tail.token_ids.tolist())}


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 0.6), st.sampled_from([1.0, 5.0]), st.sampled_from(["moclip", "adam"]))
def test_r10_first_step_moves_exactly_the_rows_in_the_loss_each_coordinate_by_lr(seed, tau, sharpness, name):
    torch.manual_seed(seed)
    N, V, d, lr = 4, 60, 3, 0.01
    h, W0 = torch.randn(N, d).double(), sharpness * torch.randn(V, d).double()
    target = torch.randint(0, V, (N,))
    target[0] = -100
    record = record_topk(h @ W0.T, target, tau)
    tail = sample_tail(target, V, 5)
    rows = rows_with_a_gradient(record, tail, V)
    assert tau > 0.3 or len(rows["replay"]) < len(rows["tail"]) < V
    for loss_name, members in rows.items():
        W = W0.clone().requires_grad_()
        optimizer = MoClip([W], lr=lr) if name == "moclip" else torch.optim.Adam([W], lr=lr, eps=1e-150)
        head_losses(h, W, target, record, tail)[loss_name].backward()
        optimizer.step()
        moved = abs(W.detach() - W0).numpy()
        inside = np.isin(np.arange(V), sorted(members))
        tol = 64 * EPS * (1 + abs(W0).max())
        np.testing.assert_allclose(moved[inside], lr, rtol=0, atol=tol)  # however small p_j is
        assert (moved[~inside] == 0).all()
        size = lr * math.sqrt(len(members) * d)
        assert np.linalg.norm(moved) == pytest.approx(size, rel=1e-9, abs=0)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.3, HALF_PI]))
def test_r10_rows_outside_the_union_of_the_record_never_move_under_any_cap(seed, max_angle):
    torch.manual_seed(seed)
    V, d, steps, lr = 60, 3, 12, 0.01
    W0 = torch.randn(V, d).double()
    h, target = torch.randn(8, d).double(), torch.randint(0, V, (8,))
    record = record_topk(h @ W0.T, target, 0.4)
    union = np.isin(np.arange(V), record.token_ids)
    for loss_name in ("replay", "full"):
        W = W0.clone().requires_grad_()
        optimizer = MoClip([W], lr=lr, max_angle=max_angle)
        for _ in range(steps):
            rows = torch.randperm(8)[:3]  # batches of 3: between its batches a row moves on with its momentum
            W.grad = None
            head_losses(h[rows], W, target[rows], record.select(rows), None)[loss_name].backward()
            optimizer.step()
        moved = abs(W.detach() - W0).numpy()
        assert (moved[~union] == 0).all() if loss_name == "replay" else (moved[~union] > 0).all()
        assert np.linalg.norm(moved) <= head_travel_bound(steps, lr, d, union.sum() if loss_name == "replay" else V)


@pytest.mark.parametrize("betas, steps, share", [((0.9, 0.9), 1, 1 - 1e-6), ((0.5, 0.9), 60, 0.95)])
def test_r10_tight_gradients_that_grow_like_the_ratio_of_the_betas_move_the_rows_as_far_as_stated(betas, steps, share):
    torch.manual_seed(0)
    V, d, lr = 9, 3, 1e-7  # so small that the gradient keeps its direction: M4(b)'s sequence, from step to step
    W0, h, target = torch.randn(V, d).double(), torch.randn(2, d).double(), torch.tensor([1, 2])
    record, W = record_of([1, 4], [2, 3, 7], V=V), W0.clone().requires_grad_()
    optimizer = MoClip([W], lr=lr, betas=betas)
    for t in range(steps):
        optimizer.zero_grad()
        (linear_replay_cross_entropy(h, W, target, record) * (betas[1] / betas[0])**t).backward()
        optimizer.step()
    bound = head_travel_bound(steps, lr, d, 5, betas)
    assert share * bound <= np.linalg.norm((W - W0).detach()) <= bound * (1 + 1e-6)  # W - W0 to eps / lr


def test_r10_false_with_weight_decay_or_a_tied_embedding():
    torch.manual_seed(0)
    W0, x, target = torch.randn(9, 4).double(), torch.tensor([5, 6]), torch.tensor([1, 2])
    record = record_of([1, 4], [2, 3], V=9)
    for decay, tied, expected in ((0.1, False, set(range(9))), (0.0, True, {1, 2, 3, 4, 5, 6}),
                                  (0.0, False, {1, 2, 3, 4})):
        W = W0.clone().requires_grad_()
        optimizer = MoClip([W], lr=0.01, weight_decay=decay)
        h = torch.tanh(W[x] if tied else W0[x])
        linear_replay_cross_entropy(h, W, target, record).backward()
        optimizer.step()
        assert set((W != W0).any(1).nonzero()[:, 0].tolist()) == expected


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 0.1), st.floats(0.5, 6.0), st.sampled_from(["adam", "moclip"]))
def test_r10_a_large_eps_moves_a_row_by_no_more_than_its_probability_asks_for(seed, eps, sharpness, name):
    torch.manual_seed(seed)
    V, d, lr = 60, 3, 0.01
    h, W0, target = torch.randn(8, d).double(), sharpness * torch.randn(V, d).double(), torch.randint(0, 5, (8,))
    W, asked, tol = W0.clone().requires_grad_(), [], 4 * EPS * abs(W0).max().item()
    optimizer = torch.optim.Adam([W], lr=lr, eps=eps) if name == "adam" else MoClip([W], lr=lr)
    for step in range(5):
        before = W.detach().clone()
        asked.append(((h @ before.T).softmax(1).T @ abs(h) / len(h)).numpy())  # the mean over positions of p_tj |h_ti|
        optimizer.zero_grad()
        F.cross_entropy(h @ W.T, target).backward()
        optimizer.step()
        moved, g = abs(W.detach() - before).numpy(), abs(W.grad).numpy()
        if name == "adam":
            assert (moved <= eps_bound(lr, eps, asked) * (1 + 1e-9) + tol)[5:].all()  # rows that are nobody's gold
        if step == 0:  # arctan2 knows no eps: the least probable row moves as far as any
            np.testing.assert_allclose(moved, lr * (g / (g + eps) if name == "adam" else 1), rtol=1e-9, atol=tol)


def test_r10_with_eps_a_row_moves_on_after_its_gradient_and_its_bound_is_that_of_all_batches_so_far():
    torch.manual_seed(0)
    V, d, lr, eps = 20, 3, 0.01, 0.1
    W, h, target = torch.randn(V, d).double().requires_grad_(), torch.randn(8, d).double(), torch.zeros(8).long()
    optimizer, asked = torch.optim.Adam([W], lr=lr, eps=eps), []
    for scale in (1, 0):  # the second batch has no gradient, and asks for nothing
        before, x = W.detach().clone(), scale * h
        asked.append(((x @ before.T).softmax(1).T @ abs(x) / len(x)).numpy())
        optimizer.zero_grad()
        F.cross_entropy(x @ W.T, target).backward()
        optimizer.step()
    moved = abs(W.detach() - before).numpy()[1:]
    assert (asked[1] == 0).all() and moved.max() > 0.1 * lr
    assert (moved <= eps_bound(lr, eps, asked)[1:]).all()


def test_r10_tight_the_first_step_of_an_improbable_row_is_what_its_probability_asks_for():
    W, h = torch.zeros(50, 1, dtype=torch.float64, requires_grad=True), torch.full((2, 1), 1e-3, dtype=torch.float64)
    optimizer = torch.optim.Adam([W], lr=0.01, eps=0.1)
    F.cross_entropy(h @ W.T, torch.tensor([0, 0])).backward()
    optimizer.step()
    assert W[1].item() == pytest.approx(-eps_bound(0.01, 0.1, np.full((1, 1), 1e-3 / 50))[0], rel=1e-3)  # |g| << eps


@pytest.mark.parametrize("betas, b, first, total", [((0.9, 0.999), 1.0, 10**6, 26.57), ((0.9, 0.9), 1.0, 10**6, 7.758),
                                                    ((0.9, 0.999), 0.5, 40, None)])
def test_r10_one_isolated_gradient_moves_a_coordinate_by_the_stated_total(betas, b, first, total):
    W = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer, expected = MoClip([W], lr=1.0, betas=betas, b=b, max_angle=math.pi), 0.0
    for k in range(600):
        W.grad = torch.tensor([0.0, 3.0 if k == 0 else 0.0], dtype=torch.float64)
        if k == 1:
            optimizer.state[W]["step"].fill_(first)  # below
        elif k == 0:
            optimizer.state[W] = {"step": torch.tensor(first - 1.0), "exp_avg": torch.zeros(2, dtype=torch.float64),
                                  "exp_avg_sq": torch.zeros(2, dtype=torch.float64)}
        optimizer.step()
        t, (beta1, beta2) = first + k, betas
        ratio = (1 - beta1) * beta1**k / (1 - beta1**t) / math.sqrt((1 - beta2) * beta2**k / (1 - beta2**t))
        expected += 4 / math.pi * math.atan(ratio / b)
    assert W[0] == 0
    assert -W[1].item() == pytest.approx(expected, rel=1e-12)
    assert total is None or expected == pytest.approx(total, abs=0.005)


# -- R11: when a record is too old -----------------------------------------------------------------------------------

def log_odds_bound(steps, lr, D, betas=(0.9, 0.999)):
    """R11(a): the most by which the log-odds of the outside can change."""
    return steps * largest_step(lr, betas) * D


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.01, 0.1]), st.sampled_from(["replay", "hostile"]), st.booleans())
def test_r11_log_odds_of_the_outside_move_by_at_most_the_stated_amount_a_step(seed, lr, loss_name, frozen):
    torch.manual_seed(seed)
    N, V, d = 3, 12, 4
    h, W = torch.randn(N, d).double(), torch.randn(V, d).double().requires_grad_()
    h.requires_grad_(not frozen)
    target = torch.randint(0, V, (N,))
    record = record_topk((h @ W.T).detach(), target, 0.7)
    sets = [row_of(record, t) for t in range(N)]
    assume(all(len(S) < V for S in sets))
    optimizer = MoClip([W] if frozen else [W, h], lr=lr)

    def state():  # per position: the log-odds; the largest |J_i - J_j|_1 = 2 |h|_1, plus |W_i - W_j|_1 if h is trained
        z, w, x = ((a.detach().numpy()) for a in (h @ W.T, W, h))
        apart = [max(abs(w[i] - w[j]).sum() for i in S for j in range(V) if j not in S) for S in sets]
        D = [2 * abs(x[t]).sum() + (0 if frozen else apart[t]) for t in range(N)]
        return np.array([log_odds_outside(z[t], S) for t, S in enumerate(sets)]), np.array(D)

    start, D = state()
    for step in range(1, 11):
        optimizer.zero_grad()
        if loss_name == "replay":
            linear_replay_cross_entropy(h, W, target, record).backward()
        else:  # whatever raises the mass outside fastest
            outside_mass(h @ W.T, record).log().sum().neg().backward()
        optimizer.step()
        now, D_now = state()
        D = np.maximum(D, D_now)  # norms are convex: between two iterates they are no larger than at one of them
        assert (abs(now - start) <= log_odds_bound(step, lr, D) + 1e-12).all()


@given(st.integers(0, 2**32 - 1))
def test_r11_the_difference_of_the_mean_jacobians_on_the_path_is_enough(seed):
    torch.manual_seed(seed)
    V, d, S, lr = 8, 4, [1, 3, 5], 1e-4
    h, W = torch.randn(1, d).double().requires_grad_(), torch.randn(V, d).double().requires_grad_()
    optimizer, odds, D = MoClip([W, h], lr=lr), [], []
    for _ in range(21):
        z = h @ W.T
        _, q, r = split(softmax(z[0].detach().numpy()), S)
        odds.append(log_odds_outside(z[0].detach().numpy(), S))
        D.append(2 * abs(h).sum().item() + abs((q - r) @ W.detach().numpy()).sum())  # |E_q J - E_r J|_1, of W and of h
        optimizer.zero_grad()
        outside_mass(z, record_of(S, V=V)).log().sum().neg().backward()
        optimizer.step()
    assert odds[-1] - odds[0] <= log_odds_bound(20, lr, max(D)) * (1 + 0.01)  # between iterates D changes by less


def test_r11_tight_gradients_that_grow_like_the_ratio_of_the_betas_come_near_to_the_bound():
    h, W = torch.tensor([[0.5, -1.0, 2.0]]).double(), torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    betas, lr, steps = (0.5, 0.9), 0.01, 60
    optimizer = MoClip([W], lr=lr, betas=betas)
    for t in range(steps):
        optimizer.zero_grad()
        z = (h @ W.T)[0]
        ((z[0] - z[1]) * (betas[1] / betas[0])**t).backward()
        optimizer.step()
    moved, bound = log_odds_outside((h @ W.T).detach().numpy()[0], [0]), log_odds_bound(steps, lr, 2 * 3.5, betas)
    assert 0.955 * bound <= moved <= bound


@given(st.floats(0.01, 0.3), hnp.arrays(np.float64, 3, elements=st.floats(0.1, 2)), st.integers(1, 8))
def test_r11_tight_a_frozen_body_and_zero_betas_move_the_log_odds_by_two_lr_times_the_norm_of_h(lr, h, steps):
    x, W = torch.tensor(h[None]), torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    optimizer = MoClip([W], lr=lr, betas=(0.0, 0.0))
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(x @ W.T, torch.tensor([1])).backward()  # its gold token is the outside one, S = {0}
        optimizer.step()
    z = (x @ W.T).detach().numpy()[0]
    assert log_odds_outside(z, [0]) == pytest.approx(2 * lr * steps * abs(h).sum(), rel=64 * EPS, abs=0)


def test_r11_steps_that_a_record_is_guaranteed_are_those_of_the_text():
    assert guaranteed_steps(0.98, 4e-4, 256) == pytest.approx(10.4, abs=0.05)
    # one step fewer keeps the odds (1 - tau) / tau * e^(rise a step) at 1 or less, one more does not
    rise = log_odds_bound(1, 4e-4, 2 * 256)
    odds = [(1 - 0.98) / 0.98 * math.exp(T * rise) for T in (10, 11)]
    assert odds[0] <= 1 < odds[1]
    assert rise == pytest.approx(3.652 * 4e-4 * 256, rel=1e-3)
    # and at other settings: as many steps as raise the odds from (1 - tau) / tau to rho_max / (1 - rho_max)
    steps = guaranteed_steps(0.9, 1e-3, 16, rho_max=0.3, betas=(0.8, 0.99), a=1.0, b=2.0)
    C = (1 - 0.8) * math.sqrt(0.99 / (0.01 * (0.99 - 0.64)))
    odds = 0.1 / 0.9 * math.exp(steps * 2 * 16 * 1e-3 * math.atan(C / 2.0))
    assert odds == pytest.approx(0.3 / 0.7, rel=1e-12)


# -- R12: an unbiased mixture ----------------------------------------------------------------------------------------

@given(positions(), st.floats(0.05, 1))
def test_r12_mixture_with_the_dense_gradient_is_unbiased_with_the_stated_variance(position, pi):
    z, S, y = position
    rho, q, r = split(softmax(z), S)
    replay, full = replay_gradient(z, S, y)[1], full_gradient(z, y)[1]
    outcomes = [(1 - pi, replay), (pi, replay + (full - replay) / pi)]
    mean = sum(chance * g for chance, g in outcomes)
    variance = sum(chance * ((g - full)**2).sum() for chance, g in outcomes)
    np.testing.assert_allclose(mean, full, rtol=0, atol=16 * EPS / pi)
    assert variance == pytest.approx((1 - pi) / pi * rho**2 * ((q**2).sum() + (r**2).sum()), abs=64 * EPS / pi)


# -- R13: what the anchor holds --------------------------------------------------------------------------------------

def recorded(z0, S):
    """(p0, record): the record holds float32 log-probabilities, so p0 is made the model that it records to the last
    digit: those numbers inside S, and what they leave to 1 spread outside as softmax(z0) is."""
    p0, log_probs = softmax(z0), log_softmax(z0)[S].astype(np.float32)
    inside = np.isin(np.arange(len(z0)), S)
    p0[inside] = np.exp(log_probs.astype(np.float64))
    p0[~inside] *= (1 - p0[inside].sum()) / p0[~inside].sum()
    return p0, replace(record_of(S, V=len(z0)), log_probs=torch.tensor(log_probs))


def anchor(z1, record):
    """(the anchor, its gradient by z1) of one position, through the function under test."""
    leaf = torch.tensor(z1, requires_grad=True)
    value = replay_kl_div(leaf[None], record)
    value.backward()
    return value.item(), leaf.grad.numpy()


def tv(p, q):
    return abs(p - q).sum() / 2


def tv_bound(rho0, rho1, tv_q, tv_r=1.0):
    """R13(e), first half; without TV(r0, r1), which is at most 1."""
    return max(rho0, rho1) - min(rho0, rho1) + (1 - max(rho0, rho1)) * tv_q + min(rho0, rho1) * tv_r


def tilt_bounds(omega):
    """R13(f): what (KL, TV) of r0 and r1 are at most when no two logits' moves differ by more than omega."""
    return omega**2 / 8, math.tanh(omega / 4)


def binary_bounds(rho0, change):
    """R13(f): two bounds of kl(rho0, rho1), given the change of the log-odds."""
    return change**2 / 8, rho0 * (math.expm1(change) - change)


def lumped(rho0, rho1, eps):
    """R13(g): the anchor with the outside counted as one more token."""
    return binary_kl(rho0, rho1) + (1 - rho0) * eps


def lumped_tv_bound(rho0, rho1, eps):
    return pinsker(lumped(rho0, rho1, eps)) + min(rho0, rho1)


@st.composite
def anchored(draw):
    """(z0, z1, S): two models of one position, logits in [-4, 4]: rho far above the rounding of a float32 record."""
    V = draw(st.integers(2, 9))
    z0, z1 = (draw(hnp.arrays(np.float64, V, elements=st.floats(-4, 4, width=32))) for _ in range(2))
    if draw(st.booleans()):
        z1 = z0 + z1 / 16  # a small move
    return z0, z1, sorted(draw(st.sets(st.integers(0, V - 1), min_size=1, max_size=V - 1)))


ANCHOR_TOL = 1e-11  # sums of a dozen terms below 10, divided by a rho of 1e-4 at the least


@given(anchored(), st.floats(0.05, 0.95), st.data())
def test_r13_the_anchor_is_its_part_of_the_divergence_and_a_lower_bound(case, tau, data):
    z0, z1, S = case
    p0, record = recorded(z0, S)
    (rho0, q0, r0), (rho1, q1, r1) = split(p0, S), split(softmax(z1), S)
    out, eps = [j for j in range(len(z0)) if j not in S], anchor(z1, record)[0]
    parts = binary_kl(rho0, rho1), (1 - rho0) * eps, rho0 * kl(r0[out], r1[out])
    assert kl(p0, softmax(z1)) == pytest.approx(sum(parts), abs=ANCHOR_TOL)
    assert min(parts) >= -ANCHOR_TOL and kl(p0, softmax(z1)) >= (1 - rho0) * eps - ANCHOR_TOL
    move = z1 - np.log(p0)  # the recorded model's logits are log p0, up to a constant
    change = log_odds_outside(z1, S) - log_odds_outside(np.log(p0), S)
    assert change == pytest.approx(r0 @ move - q0 @ move + kl(r0[out], r1[out]) - eps, abs=ANCHOR_TOL)
    # as `record_topk` records it, without a cap: at least tau of the anchor is certified
    target = torch.tensor([data.draw(st.integers(0, len(z0) - 1))])
    record = record_topk(torch.tensor(z0[None]), target, tau, keep_log_probs=True)
    assert tau * anchor(z1, record)[0] <= kl(softmax(z0), softmax(z1)) + 64 * EPS32  # log_probs are float32


@given(anchored())
def test_r13_tight_inside_moves_at_a_fixed_rho_are_all_of_the_divergence(case):
    z0, z1, S = case
    p0, record = recorded(z0, S)
    p1 = np.where(np.isin(np.arange(len(z0)), S), (1 - split(p0, S)[0]) * split(softmax(z1), S)[1], p0)
    assert kl(p0, p1) == pytest.approx((1 - split(p0, S)[0]) * anchor(np.log(p1), record)[0], abs=ANCHOR_TOL)


@given(anchored())
def test_r13_gradient_is_q1_minus_q0_inside_and_exactly_zero_outside(case):
    z0, z1, S = case
    p0, record = recorded(z0, S)
    gradient = anchor(z1, record)[1]
    np.testing.assert_allclose(gradient, split(softmax(z1), S)[1] - split(p0, S)[1], rtol=0, atol=32 * EPS)
    assert (gradient[[j for j in range(len(z0)) if j not in S]] == 0).all()


@given(anchored(), st.floats(-50, 50), st.data())
def test_r13_blind_to_all_that_moves_outside_and_to_everything_where_one_token_is_recorded(case, shift, data):
    z0, z1, S = case
    p0, record = recorded(z0, S)
    moved = np.where(np.isin(np.arange(len(z0)), S), np.log(p0) + shift, z1)  # q1 = q0, rho1 and r1 anything
    assert anchor(moved, record)[0] == pytest.approx(0, abs=ANCHOR_TOL)
    y = data.draw(st.sampled_from(S))
    p0, record = recorded(z0, [y])
    value, gradient = anchor(z1, record)
    assert value == 0 and (gradient == 0).all()
    far = np.where(np.arange(len(z0)) == y, -400.0, z1)
    assert anchor(far, record)[0] == 0 and kl(p0, np.maximum(softmax(far), 1e-300)) > 100 * p0[y]  # unbounded


@given(anchored())
def test_r13_distance_is_bounded_by_the_anchor_once_the_outside_masses_are_known(case):
    z0, z1, S = case
    p0, record = recorded(z0, S)
    p1, eps = softmax(z1), anchor(z1, record)[0]
    (rho0, q0, r0), (rho1, q1, r1) = split(p0, S), split(p1, S)
    tol, distance = math.sqrt(ANCHOR_TOL), tv(p0, p1)  # a square root near 0
    assert distance <= tv_bound(rho0, rho1, tv(q0, q1), tv(r0, r1)) + ANCHOR_TOL
    assert distance <= tv_bound(rho0, rho1, pinsker(eps)) + tol
    assert distance <= lumped_tv_bound(rho0, rho1, eps) + tol
    out = [j for j in range(len(z0)) if j not in S]
    most_kl, most_tv = tilt_bounds(np.ptp((z1 - np.log(p0))[out]))
    assert kl(r0[out], r1[out]) <= most_kl + ANCHOR_TOL and tv(r0, r1) <= most_tv + ANCHOR_TOL
    change = log_odds_outside(z1, S) - log_odds_outside(np.log(p0), S)
    assert binary_kl(rho0, rho1) <= min(binary_bounds(rho0, change)) + ANCHOR_TOL
    # soft targets q0 in the tail's loss need no rho1, but pull the base itself
    inside = np.isin(np.arange(len(z0)), S)
    assert distance <= rho0 + pinsker(kl(q0[S], p1[S])) + tol
    leaf = torch.tensor(np.log(p0), requires_grad=True)
    F.cross_entropy(leaf, torch.tensor(q0)).backward()
    assert abs(leaf.grad).sum().item() == pytest.approx(2 * rho0, abs=64 * EPS)
    # the outside as one more token has a gradient outside
    leaf = torch.tensor(z1, requires_grad=True)
    log_p = leaf.log_softmax(0)
    terms = torch.cat([log_p[inside], log_p[~inside].logsumexp(0)[None]])
    (-terms @ torch.tensor([*p0[inside], rho0])).backward()
    np.testing.assert_allclose(leaf.grad[~inside], (rho1 - rho0) * r1[~inside], rtol=0, atol=64 * EPS)


@given(st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_r13_tight_disjoint_outsides_and_a_point_mass_reach_the_bound_of_the_distance(one, other, d):
    rho0, rho1 = sorted((one, other))
    none = 1e-13  # in place of 0, for logits are finite
    p0 = np.array([1 - rho0 - 2 * none, none, rho0, none])
    p1 = np.array([(1 - rho1) * (1 - d), (1 - rho1) * d, none, rho1])
    p1 /= p1.sum()
    (_, q0, r0), (_, q1, r1) = split(p0, [0, 1]), split(p1, [0, 1])
    for bound in (tv_bound(rho0, rho1, tv(q0, q1), tv(r0, r1)), tv_bound(rho0, rho1, tv(q0, q1))):
        assert tv(p0, p1) == pytest.approx(bound, abs=1e-11)
    # one token: the anchor sees nothing, and the distance is the larger outside mass
    assert tv(np.array([1 - rho0, rho0, 0]), np.array([1 - rho1, 0, rho1])) == pytest.approx(tv_bound(rho0, rho1, 0))
    # r0 = r1: the outside adds no more than the difference of its masses
    same = np.array([1 - rho0, 0, rho0]), np.array([(1 - rho1) * (1 - d), (1 - rho1) * d, rho1])
    assert tv(*same) == pytest.approx(tv_bound(rho0, rho1, d, 0), abs=8 * EPS)


@given(st.floats(0.01, 0.9), st.floats(0.01, 0.05))
def test_r13_tight_two_equal_tokens_that_move_a_little_need_all_of_the_square_root(rho, size):
    z0 = np.log([(1 - rho) / 2, (1 - rho) / 2, rho, 1e-13])
    _, record = recorded(z0, [0, 1])
    q1 = softmax(np.array([-size, size]))
    p1 = np.array([*(1 - rho) * q1, 1e-13, rho])  # the outside changes places
    p1 /= p1.sum()
    eps, distance = anchor(np.log(p1), record)[0], tv(softmax(z0), p1)
    assert distance - rho == pytest.approx((1 - rho) * pinsker(eps), rel=size)  # KL's next order; float32 log_probs
    assert tv_bound(rho, rho, pinsker(eps)) == pytest.approx(distance, rel=size)
    if rho < 0.05:  # (g), where the outside hardly counts
        assert lumped_tv_bound(rho, rho, eps) - rho == pytest.approx(distance - rho, rel=size + rho)
    one = np.array([1 - rho, rho, 1e-13]), np.array([1 - rho, 1e-13, rho])  # disjoint outsides, nothing else moved
    assert tv(*one) == pytest.approx(lumped_tv_bound(rho, rho, 0.0), abs=1e-11)


@given(st.floats(0.01, 0.1), st.floats(0.1, 4))
def test_r13_tight_bounds_of_the_outside_s_parts_are_reached_by_two_tokens(small, omega):
    r0, r1 = np.array([0.5, 0.5]), softmax(np.array([0, small]))
    assert tilt_bounds(small)[0] == pytest.approx(kl(r0, r1), rel=small)
    apart = softmax(np.array([0, -omega / 2])), softmax(np.array([0, omega / 2]))
    assert tilt_bounds(omega)[1] == pytest.approx(tv(*apart), abs=8 * EPS)
    for rho0, change, which in ((0.5, small, 0), (1e-4, omega, 1), (1e-4, -omega, 1)):
        rho1 = 1 / (1 + (1 - rho0) / rho0 * math.exp(-change))
        rel = small if which == 0 else 1e-4 * math.exp(omega)  # the next order
        assert binary_bounds(rho0, change)[which] == pytest.approx(binary_kl(rho0, rho1), rel=rel)


@pytest.mark.parametrize("weight", [0.0, 10.0, 1000.0])
def test_r13_false_without_rho1_an_anchor_of_any_weight_stays_zero_while_the_model_goes_elsewhere(weight):
    z = torch.tensor([0.0, 0.0, -4.0], dtype=torch.float64, requires_grad=True)  # the only parameters: biases
    p0 = z.detach().softmax(0)
    record = replace(record_of([0, 1], V=3), log_probs=p0[:2].log().float())
    optimizer = MoClip([z], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        held = replay_kl_div(z[None], record)
        assert held.item() == 0
        (F.cross_entropy(z[None], torch.tensor([2])) + weight * held).backward()
        optimizer.step()
    p1 = z.detach().softmax(0)
    assert p0[2].item() == pytest.approx(0.0091, abs=5e-5) and p1[2].item() == pytest.approx(0.993, abs=5e-4)
    assert tv(p0, p1).item() == pytest.approx(0.984, abs=5e-4)


# -- R14: the base's own text ----------------------------------------------------------------------------------------

def law(tables, V, T):
    """{window: probability}: x_0 uniform, x_t drawn from softmax(tables[x_0 ... x_(t-1)])."""
    windows = {}
    for x in itertools.product(range(V), repeat=T + 1):
        windows[x] = math.prod(softmax(tables[x[:t]])[x[t]] for t in range(1, T + 1)) / V
    return windows


@settings(max_examples=25)
@given(st.integers(2, 3), st.integers(1, 3), st.sampled_from([0.03, 1.0]), st.integers(0, 2**32 - 1))
def test_r14_the_sum_over_positions_is_the_divergence_of_the_laws_of_windows(V, T, size, seed):
    rng = np.random.default_rng(seed)
    prefixes = [x for t in range(1, T + 1) for x in itertools.product(range(V), repeat=t)]
    base = {x: 2 * rng.normal(size=V) for x in prefixes}
    model = {x: z + size * rng.normal(size=V) for x, z in base.items()}
    P0, P1 = law(base, V, T), law(model, V, T)
    divergence = sum(p * math.log(p / P1[x]) for x, p in P0.items())
    sums, certified, rise, means = 0.0, 0.0, 0.0, {x: 0.0 for x in prefixes}
    for x, p in P0.items():  # every window that the base can write, as often as it writes it
        for t in range(1, T + 1):
            z0, z1 = base[x[:t]], model[x[:t]]
            sums += p * kl(softmax(z0), softmax(z1))
            ratio = log_softmax(z0)[x[t]] - log_softmax(z1)[x[t]]
            rise += p * ratio
            means[x[:t]] += p * ratio / sum(P0[w] for w in P0 if w[:t] == x[:t])
            record = record_topk(torch.tensor(z0[None]), torch.tensor([x[t]]), 0.7, keep_log_probs=True)
            certified += p * (1 - float(record.outside_mass)) * anchor(z1, record)[0]
    assert sums == pytest.approx(divergence, abs=1024 * EPS) and rise == pytest.approx(divergence, abs=1024 * EPS)
    assert certified <= divergence + 64 * T * EPS32  # log_probs and rho are float32
    for x, mean in means.items():  # what a drawn token says, on average, the recorded distribution says at once
        assert mean == pytest.approx(kl(softmax(base[x]), softmax(model[x])), abs=1024 * EPS)
    measures = [rng.random(len(P0)), np.array([P0[x] > P1[x] for x in P0])]  # any, and the event that differs most
    for f in measures:
        assert abs(sum(v * (P0[x] - P1[x]) for v, x in zip(f, P0))) <= pinsker(divergence) + 1e-9


@given(st.floats(0.01, 0.1))
def test_r14_tight_an_event_of_probability_one_half_and_a_small_move(size):
    P0, P1 = (law({(x,): np.array(z) for x in (0, 1)}, 2, 1) for z in ((0.0, 0.0), (0.0, size)))
    divergence = sum(p * math.log(p / P1[x]) for x, p in P0.items())
    assert sum(P1[x] - P0[x] for x in P0 if x[1] == 1) == pytest.approx(pinsker(divergence), rel=size**2)


@given(st.floats(1, 50), st.floats(1e-9, 0.1))
def test_r14_false_for_other_text_its_loss_may_rise_by_any_amount_at_any_small_divergence(n, eta):
    p0 = np.array([1 - eta, eta])
    p1 = np.array([1 - eta * math.exp(-n), eta * math.exp(-n)])
    assert kl(p0, p1) <= eta * n
    assert math.log(p0[1] / p1[1]) == pytest.approx(n, rel=64 * EPS)  # the loss of text that is all token 1
