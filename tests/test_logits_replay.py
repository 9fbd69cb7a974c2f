"""Recording and loss against the plain-loop reference, against torch, and at every boundary where input can be bad."""

import io
import itertools
import math
import os
import pickle
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import plain_reference as reference
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import logits_and_targets, taus
from torch.utils._python_dispatch import TorchDispatchMode

import logits_replay
from logits_replay import (ReplayRecord, Tail, linear_replay_cross_entropy, linear_replay_kl_div, outside_mass,
                           record_topk, replay_cross_entropy, replay_kl_div, sample_tail, write_atomically)

EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23, torch.float64: 2.0**-52}
Z, Y = torch.tensor([[3.0, 2.0, 0.0, 1.0], [0.0, 9.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]), torch.tensor([2, 1, -100])
RECORD = record_topk(Z, Y, 0.8)


def rows_of(record):
    return [record.token_ids[a:b].tolist() for a, b in zip(record.offsets[:-1], record.offsets[1:])]


def probabilities(logits):
    """What torch takes for the softmax: the reference ranks and adds these very numbers."""
    return logits.softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32).tolist()


# ------------------------------------------------------------------------------------------------------------ record

@pytest.mark.parametrize("dtype", EPS)
@given(data=st.data(), tau=taus, max_size=st.one_of(st.none(), st.integers(1, 80)))
def test_record_equals_the_reference_token_for_token(dtype, data, tau, max_size):
    # 5000: wide enough for the histogram
    logits, target = data.draw(logits_and_targets(dtype, sizes=(1, 2, 3, 8, 40, 64, 65, 200, 5000)))
    record = record_topk(logits, target, tau, max_size=max_size)
    rows, outside = reference.record_topk(probabilities(logits), target.tolist(), tau, max_size)
    assert rows_of(record) == rows
    # a float32 sum of at most V <= 5000 terms of total <= 1, added pairwise: under 16 roundings each
    assert record.outside_mass.tolist() == pytest.approx(outside, rel=16 * EPS[torch.float32], abs=1e-38)
    assert (record.vocab_size, record.tau, len(record)) == (logits.shape[1], tau, len(target))
    assert record.subset_sizes.tolist() == [len(row) for row in rows]


def test_the_last_bit_of_the_running_sum_decides_at_tau_1():
    """Float64 sums reach 1 or not by their order: here that of the ranks, which only a CPU adds in order."""
    V = 2100  # float32 rows as wide go by the histogram
    logits = 5 * torch.randn(100, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, _ = reference.record_topk(probabilities(logits), [0] * 100, 1.0, None)
    assert 10 < sum(len(row) == V for row in rows) < 90
    assert rows_of(record_topk(logits, torch.zeros(100, dtype=torch.long), 1.0)) == rows


@pytest.mark.parametrize("V", [8, 64, 256, 4096, 8192])
def test_uniform_row_reaches_a_dyadic_tau_exactly(V):
    record = record_topk(torch.zeros(1, V), torch.tensor([0]), 0.5)
    assert rows_of(record) == [list(range(V // 2))] and record.outside_mass.tolist() == [0.5]


@pytest.mark.parametrize("V", [64, 65, 66, 1024, 1025, 5000])
@pytest.mark.parametrize("K", [1, 2, 63, 64, 65, 66])
def test_ties_at_the_edge_of_the_top_64_go_to_the_lowest_ids(V, K):
    K = min(K, V)  # of V equally probable tokens, K are needed
    record = record_topk(torch.zeros(1, V), torch.tensor([V - 1]), (K - 0.5) / V)
    assert rows_of(record) == [sorted({*range(K), V - 1})]


def test_tau_one_takes_all_that_is_needed_and_no_more():
    z = torch.tensor([[0.0, -200.0, 0.0, -200.0]])  # exp(-200) is 0 in float32: the two others reach 1
    assert rows_of(record_topk(z, torch.tensor([0]), 1.0)) == [[0, 2]]
    assert rows_of(record_topk(z.double(), torch.tensor([0]), 1.0)) == [[0, 2]]
    thirds = torch.zeros(1, 3).double()  # three times the rounded 1/3 is 1, two times is not
    assert rows_of(record_topk(thirds, torch.tensor([0]), 1.0)) == [[0, 1, 2]]


def test_max_size_counts_gold_which_displaces_the_last_token():
    z, y = torch.tensor([[5.0, 4.0, 3.0, 0.0]]), torch.tensor([3])
    assert rows_of(record_topk(z, y, 0.99, max_size=2)) == [[0, 3]]
    assert rows_of(record_topk(z, y, 0.99, max_size=1)) == [[3]]
    assert rows_of(record_topk(z, y, 0.99, max_size=9)) == [[0, 1, 2, 3]]
    assert rows_of(record_topk(z, torch.tensor([1]), 0.99, max_size=2)) == [[0, 1]]


@given(st.integers(0, 10**6), st.sampled_from([2, 30, 64, 65, 400, 5000]), st.booleans())
def test_the_running_sum_tells_tau_from_the_next_number(seed, V, above):
    p = torch.randn(1, V, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    sums = np.cumsum(np.sort(p.log().softmax(-1)[0].numpy())[::-1].astype(np.float64))
    K = 1 + seed % (V - 1)
    tau = np.nextafter(sums[K - 1], 2.0) if above else sums[K - 1]  # float32 has no number between the two
    row, = rows_of(record_topk(p.log(), p.argmax(-1), float(tau)))
    assert len(row) == K + above


@pytest.mark.parametrize("K", [500, 1500, 2000])
def test_added_in_another_order_a_sum_may_differ_but_not_the_subset(K):
    z = 10 * torch.randn(1, 2049, generator=torch.Generator().manual_seed(18))  # terms below the sum's rounding
    tau = z.softmax(1).sort(descending=True).values.double().cumsum(1)[0, K - 1].item()
    expected, _ = reference.record_topk(z.softmax(1).tolist(), [0], tau)
    assert rows_of(record_topk(z, torch.tensor([0]), tau)) == expected


def test_a_single_position_needs_no_leading_dimension():
    assert rows_of(record_topk(Z[0], Y[0], 0.8)) == rows_of(RECORD)[:1]


def test_the_rows_of_every_chunk_are_those_recorded_alone():
    V, N = 2**18, 17  # 5 rows a chunk: two have an ignored row, one nothing else, the last is short
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(N, V, generator=generator) * torch.tensor([0.1, 5.0]).repeat(N)[:N, None]  # wide and narrow rows
    y = torch.randint(V, (N,), generator=generator)
    y[[3, 7, *range(10, 15)]] = -100
    record = record_topk(z, y, 0.5)
    alone = ReplayRecord.concat(record_topk(z[t:t + 1], y[t:t + 1], 0.5) for t in range(N))
    assert rows_of(record) == rows_of(alone)
    torch.testing.assert_close(record.outside_mass, alone.outside_mass, rtol=16 * EPS[torch.float32], atol=0)


@given(logits_and_targets(), st.data())
def test_outside_mass_equals_the_reference_under_another_model(case, data):
    logits, target = case
    record = record_topk(logits, target, 0.6)
    other = logits + torch.tensor(
        np.random.default_rng(data.draw(st.integers(0, 99))).normal(size=logits.shape)).float()
    expected = reference.outside_mass(other.tolist(), rows_of(record))
    # z - max is exact where exp of it is large: a few eps, and 16 roundings of the sum
    assert outside_mass(other, record).tolist() == pytest.approx(expected, rel=128 * EPS[torch.float32], abs=1e-37)


def test_outside_mass_is_differentiable_and_keeps_small_values():
    z = torch.tensor([[30.0, 0.0, 0.0]], requires_grad=True)
    record = record_topk(z, torch.tensor([0]), 0.5)
    rho = outside_mass(z, record)
    assert rho.item() == pytest.approx(2 * math.exp(-30), rel=1e-5)
    rho.sum().backward()  # d rho / d z_0 = -rho (1 - rho)
    assert z.grad[0, 0].item() == pytest.approx(-rho.item(), rel=1e-5)


# -------------------------------------------------------------------------------------------------------------- loss

def both_forms(z, target, record, bias=None, **options):
    """The loss from logits, and by the linear form of them as hidden states and an identity head."""
    yield z, replay_cross_entropy(z if bias is None else z + bias, target, record, **options)
    eye = torch.eye(z.shape[1], dtype=z.dtype)
    yield z, linear_replay_cross_entropy(z, eye, target, record, linear_bias=bias, **options)


def everything(V, dtype=torch.float32):
    return Tail(torch.arange(V), torch.zeros(V, dtype=dtype))


@st.composite
def tails(draw, V):
    """Any tail: ids that meet the subsets or not, none or all of V, weights from e^-5 to e^20."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = np.flatnonzero(rng.random(V) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])))
    return Tail(torch.tensor(ids, dtype=torch.int64), torch.tensor(rng.uniform(-5, 20, size=len(ids))))


@given(st.data(), taus)
def test_loss_and_gradient_equal_the_reference(data, tau):
    logits, target = data.draw(logits_and_targets(torch.float64, sizes=(1, 2, 3, 8, 40, 70)))
    record, tail = record_topk(logits, target, tau), data.draw(st.none() | tails(logits.shape[1]))
    plain = {} if tail is None else dict(tail=[x.tolist() for x in tail])
    losses, gradients = reference.replay_cross_entropy(logits.tolist(), target.tolist(), rows_of(record), **plain)
    scored = torch.zeros_like(logits, dtype=torch.bool)
    scored[record.rows, record.token_ids] = True
    if tail is not None:
        scored[target != -100] |= torch.zeros(logits.shape[1], dtype=torch.bool).index_fill(0, tail.token_ids, True)
    # exp(z + log w) has the relative error eps |z + log w|, row by row
    tolerance = 8 * EPS[torch.float64] * ((1 if tail is None else 20) + logits.abs().amax(1).numpy())
    for z, loss in both_forms(logits.clone().requires_grad_(), target, record, tail=tail, reduction="none"):
        gradient, = torch.autograd.grad(loss.sum(), z)
        assert (abs(loss.detach().numpy() - losses) <= tolerance + 1e-15 * abs(np.array(losses))).all()
        assert (abs(gradient.numpy() - gradients) <= tolerance[:, None]).all()
        assert not gradient[~scored].any()  # exactly zero


@given(st.data())
def test_linear_form_equals_the_reference_in_every_argument(data):
    z, y = data.draw(logits_and_targets(torch.float64, sizes=(2, 5, 30)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    (N, V), d = z.shape, 3
    h, W, bias = (torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
                  for shape in ((N, d), (V, d), (V,)))
    record, tail = record_topk(z, y, 0.8), data.draw(st.none() | tails(V))
    loss = linear_replay_cross_entropy(h, W, y, record, linear_bias=bias, tail=tail, reduction="sum")
    losses, gradients = reference.replay_cross_entropy(
        reference.linear(h.tolist(), W.tolist(), bias.tolist()), y.tolist(), rows_of(record),
        **({} if tail is None else dict(tail=[x.tolist() for x in tail])))
    assert loss.item() == pytest.approx(math.fsum(losses), abs=1e-13)  # logits of size 10 and log-weights of 20
    for mine, expected in zip(torch.autograd.grad(loss, (h, W, bias)),
                              reference.linear_gradients(h.tolist(), W.tolist(), gradients)):
        assert mine.numpy() == pytest.approx(np.array(expected), abs=1e-13)  # N d + V terms of size 10 at most


@given(logits_and_targets(torch.float64), taus, st.sampled_from(["mean", "sum", "none"]))
def test_on_the_whole_vocabulary_it_is_cross_entropy(case, tau, reduction):
    logits, target = case
    V, record = logits.shape[1], record_topk(logits, target, tau)
    counted = target != -100
    full = ReplayRecord(torch.arange(V, dtype=torch.int32).repeat(int(counted.sum())),
                        torch.cat([torch.zeros(1, dtype=torch.int64), (counted * V).cumsum(0)]),
                        torch.zeros(len(target)), V, 1.0)
    expected = F.cross_entropy(logits, target, reduction=reduction)  # nan for "mean" where all are ignored
    # the record holds it or, whatever the record, the tail; a sample of all that are not gold is everything
    for rows, tail in ((full, None), (record, everything(V)), (record, sample_tail(target, V, V)),
                       (record, sample_tail(target, V, V - len(set(target.tolist()) - {-100})))):
        assert tail is None or tail.token_ids.tolist() == list(range(V)) and not tail.log_weight.any()
        for _, loss in both_forms(logits, target, rows, tail=tail, reduction=reduction):
            torch.testing.assert_close(loss, expected, equal_nan=True, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_only_ignored_rows_give_what_cross_entropy_gives_and_no_gradient(reduction):
    z, y = torch.randn(3, 5, requires_grad=True), torch.full((3,), -100)
    for leaf, loss in both_forms(z, y, record_topk(z, y, 0.9), reduction=reduction):
        torch.testing.assert_close(loss, F.cross_entropy(z, y, reduction=reduction), equal_nan=True)
        assert not torch.autograd.grad(loss.sum(), leaf)[0].any()


def test_shapes_ignore_index_and_reductions_are_those_of_cross_entropy():
    z, y = torch.randn(2, 3, 7), torch.randint(7, (2, 3))
    y[0, 1] = 4
    record = record_topk(z, y, 0.9, ignore_index=4)
    losses = replay_cross_entropy(z, y, record, ignore_index=4, reduction="none")
    assert losses.shape == (2, 3) and losses[y == 4].eq(0).all()
    assert torch.equal(replay_cross_entropy(z, y, record, ignore_index=4), losses.sum() / (y != 4).sum())
    for tail in None, sample_tail(y, 7, 2, ignore_index=4):  # and of the linear form, here with the head z_j = h_j
        options = dict(ignore_index=4, reduction="none", tail=tail)
        linear = linear_replay_cross_entropy(z, torch.eye(7), y, record, **options)
        torch.testing.assert_close(linear, replay_cross_entropy(z, y, record, **options))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_strides_leading_dimensions_and_the_kind_of_integers_change_nothing(dtype):
    torch.manual_seed(0)
    z, ids, h, W = torch.randn(2, 6, 9), torch.randint(9, (2, 6)), torch.randn(2, 4, 5), torch.randn(4, 9)
    odd = z[:, :-1], ids.to(dtype)[:, 1:], h.mT, W.T, torch.randn(1).expand(9)  # shifted, transposed, expanded
    plain = *(x.flatten(0, 1) for x in (odd[0], odd[1].long(), odd[2])), odd[3].contiguous(), odd[4].contiguous()

    def everything_there_is(z, y, h, W, bias):
        record = record_topk(z, y, 0.7)
        tail = sample_tail(y, 9, 2, generator=torch.Generator().manual_seed(0))
        leaves = [x.detach().requires_grad_() for x in (z, h, W)]
        losses = [f for t in (None, tail) for f in (
            replay_cross_entropy(leaves[0], y, record, tail=t),
            linear_replay_cross_entropy(*leaves[1:], y, record, linear_bias=bias, tail=t))]
        return [record.token_ids, tail.token_ids, outside_mass(z, record), *losses,
                *torch.autograd.grad(sum(losses), leaves)]

    for a, b in zip(everything_there_is(*odd), everything_there_is(*plain), strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=0, atol=8 * EPS[torch.float32])  # sums in another order


@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize("form", [0, 1])
def test_derivatives_and_second_derivatives(form, size):
    torch.manual_seed(0)
    h, W, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 4), (20, 4), (20,)))
    y = torch.tensor([3, 19, -100, 0, 7, 7])
    record, tail = record_topk(h @ W.T + b, y, 0.9 if size is None else 0.5), size and sample_tail(y, 20, size)
    function = (lambda h, W, b: replay_cross_entropy(h @ W.T + b, y, record, tail=tail),
                lambda h, W, b: linear_replay_cross_entropy(h, W, y, record, linear_bias=b, tail=tail))[form]
    assert torch.autograd.gradcheck(function, (h, W, b))
    if form == 0:
        assert torch.autograd.gradgradcheck(function, (h, W, b))
        torch.testing.assert_close(torch.func.grad(function, (0, 1, 2))(h, W, b),
                                   torch.autograd.grad(function(h, W, b), (h, W, b)), rtol=0, atol=1e-14)
    else:  # refused, not wrong
        with pytest.raises(ValueError, match="first derivative only"):
            torch.autograd.grad(function(h, W, b), h, create_graph=True)


class Watch(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned, and counts the products of matrices with entries."""

    def __init__(self):
        super().__init__()
        self.elements = self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += "mm" in str(function) and all(x.numel() for x in args if isinstance(x, torch.Tensor))
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel() if x.layout == torch.strided else x._nnz())
        return result


@pytest.mark.parametrize("size", [None, 5])
def test_no_gradient_is_computed_for_a_frozen_head_or_body(size):
    y = torch.arange(3)
    for h, W in itertools.product((torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)),
                                  (torch.randn(9, 4), torch.randn(9, 4, requires_grad=True))):
        tail = size and sample_tail(y, 9, size)
        loss = linear_replay_cross_entropy(h, W, y, record_topk(h @ W.T, y, 0.5), tail=tail)
        if loss.requires_grad:
            with Watch() as seen:
                loss.backward()
            # one product for each, and one more for the tail's part
            assert seen.products == (2 if tail else 1) * (h.requires_grad + W.requires_grad)
        assert (h.grad is not None, W.grad is not None) == (h.requires_grad, W.requires_grad)


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("tail", [None, everything(3)], ids=["none", "tail"])
def test_huge_logits_stay_finite(size, tail):
    z = torch.tensor([[size, 0.0, -size], [-size, size, 0.0]], requires_grad=True)
    y = torch.tensor([2, 1])
    record = record_topk(z, y, 1.0) if tail is None else ReplayRecord(
        torch.tensor([2, 1], dtype=torch.int32), torch.arange(3), torch.zeros(2), 3, 0.5)
    for leaf, loss in both_forms(z, y, record, tail=tail, reduction="none"):
        assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), leaf)[0].isfinite().all()
        assert torch.equal(loss, F.cross_entropy(z, y, reduction="none"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("size", [None, 100])
def test_half_precision_is_accumulated_in_float32_under_autocast_too(dtype, autocast, size):
    torch.manual_seed(0)
    h, W, bias, y = (torch.randn(8, 64).to(dtype), torch.randn(500, 64).to(dtype) / 8, torch.randn(500).to(dtype),
                     torch.randint(500, (8,)))
    record, options = record_topk(h @ W.T, y, 0.5), dict(tail=size and sample_tail(y, 500, size))
    loss = lambda h, W, bias: linear_replay_cross_entropy(h, W, y, record, linear_bias=bias, **options)
    exact = loss(h.double(), W.double(), bias.double())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        mine = loss(h.requires_grad_(), W.requires_grad_(), bias.requires_grad_())
        mine.backward()
    assert mine.dtype == torch.float32 and mine.item() == pytest.approx(exact.item(), rel=64 * 2.0**-23)  # 64 products
    assert h.grad.dtype == W.grad.dtype == bias.grad.dtype == dtype
    for wide, eps in ((torch.float32, 2.0**-23), (torch.float64, 2.0**-52)):  # one wide argument is enough
        for wider in ((h.to(wide), W, bias), (h, W.to(wide), bias)):
            assert loss(*wider).item() == pytest.approx(exact.item(), rel=64 * eps)
    logits = (h @ W.T).detach()
    dense, exact = (replay_cross_entropy(x, y, record, **options) for x in (logits, logits.double()))
    assert dense.dtype == torch.float32 and dense.item() == pytest.approx(exact.item(), rel=16 * 2.0**-23)


def test_recording_makes_no_tensor_many_times_larger_than_the_logits():
    N, V = 1000, 500
    z, y = torch.randn(N, V), torch.randint(V, (N,))  # 64 tokens decide no row
    with Watch() as seen:
        record = record_topk(z, y, 0.9)
    assert record.subset_sizes.min() > 64 and seen.elements <= 2 * N * V


@pytest.mark.parametrize("size", [None, 50])
def test_the_linear_form_never_makes_an_N_by_V_tensor(size):
    N, V, d = 300, 5000, 4
    h, W, y = torch.randn(N, d, requires_grad=True), torch.randn(V, d, requires_grad=True), torch.randint(40, (N,))
    record, tail = ReplayRecord(y.int(), torch.arange(N + 1), torch.zeros(N), V, 0.5), size and sample_tail(y, V, size)
    with Watch() as seen:
        linear_replay_cross_entropy(h, W, y, record, tail=tail).backward()
    # dL/dW, and (N, M) with one column to spare
    assert seen.elements <= max(V * d, N * (len(tail.token_ids) + 1) if tail else 0)


def test_outside_mass_never_rounds_to_more_than_one():
    torch.manual_seed(0)
    z, y = torch.randn(500, 50), torch.zeros(500, dtype=torch.int64)
    z[:, 0] = -100  # all mass is outside; one row in seven adds up to more than 1
    record = record_topk(z, y, 0.9, max_size=1)
    assert ((z.softmax(-1).sum(-1) > 1).any() and (record.outside_mass <= 1).all()
            and (outside_mass(z, record) <= 1).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outside_mass_of_half_precision_logits_is_that_of_their_float32_values(dtype):
    torch.manual_seed(0)
    z, y = torch.randn(4, 300).to(dtype), torch.randint(300, (4,))
    record = record_topk(z, y, 0.9)
    assert torch.equal(outside_mass(z, record), outside_mass(z.float(), record))
    assert torch.equal(record_topk(z.float(), y, 0.9).token_ids, record.token_ids)


# -------------------------------------------------------------------------------------------------------------- tail

@given(logits_and_targets(), taus)
def test_an_empty_tail_is_no_tail_to_the_last_bit(case, tau):
    record = record_topk(*case, tau)
    for (_, without), (_, empty) in zip(
            both_forms(*case, record, reduction="none"),
            both_forms(*case, record, reduction="none", tail=Tail(torch.arange(0), torch.zeros(0)))):
        assert torch.equal(without, empty)


@pytest.mark.parametrize("tail", [None, everything(8)], ids=["none", "tail"])
def test_a_constant_on_all_logits_changes_no_bit(tail):
    z, y = torch.arange(-12.0, 12.0).reshape(3, 8) / 8, torch.tensor([7, 0, 3])  # 2^19 + z is exact in float32
    record = record_topk(z, y, 0.8)
    for (_, a), (_, b) in zip(*(both_forms(x, y, record, tail=tail, reduction="none") for x in (z, z + 2.0**19))):
        assert torch.equal(a, b)


@given(st.data())
def test_a_sample_holds_every_gold_surely_and_others_with_the_inverse_of_their_probability(data):
    _, target = data.draw(logits_and_targets(max_rows=8, sizes=(1, 2, 3, 8, 40)))
    V, size = data.draw(st.integers(max(1, target.max().item() + 1), 60)), data.draw(st.integers(0, 70))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    tail, golds = sample_tail(target, V, size, generator=generator), set(target.tolist()) - {-100}
    M0 = V - len(golds)
    ids = tail.token_ids.tolist()
    assert ids == sorted(set(ids)) and golds <= set(ids) <= set(range(V)) and len(ids) == len(golds) + min(size, M0)
    assert (tail.token_ids.dtype, tail.log_weight.dtype) == (torch.int64, torch.float32)
    expected = reference.sample_tail([j for j in ids if j not in golds], target.tolist(), V)
    assert (ids, tail.log_weight.tolist()) == (expected[0], pytest.approx(expected[1], rel=EPS[torch.float32]))
    again = sample_tail(target, V, size, generator=generator.manual_seed(generator.initial_seed()))
    assert all(torch.equal(a, b) for a, b in zip(tail, again))


def test_sample_tail_ignores_a_token_id():
    tail = sample_tail(torch.tensor([4, 2, 4]), 7, 0, ignore_index=4)
    assert tail.token_ids.tolist() == [2]


def test_the_mean_of_the_estimate_over_all_samples_is_what_the_subset_leaves_out():
    """Over all samples of 2 of the 6 others, which sample_tail draws equally often (R9's test counts them)."""
    V, target = 8, torch.tensor([0, 3])
    z = torch.randn(2, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    record = record_topk(z, target, 0.5)
    generator = torch.Generator().manual_seed(0)
    tails = [sample_tail(target, V, 2, generator=generator) for _ in range(300)]
    pairs = {tuple(tail.token_ids.tolist()): tail for tail in tails}.values()
    assert len(pairs) == 15  # all of them
    losses = torch.stack([replay_cross_entropy(z, target, record, tail=tail, reduction="none") for tail in pairs])
    gold = z[torch.arange(2), target]
    # exp(L + z_y) = A + B': its mean is the whole partition function, to the rounding of log w in float32
    assert (losses + gold).exp().mean(0).tolist() == pytest.approx(z.exp().sum(1).tolist(), rel=8 * EPS[torch.float32])
    assert losses.mean(0).le(F.cross_entropy(z, target, reduction="none")).all()  # R9(b)


class Reads(TorchDispatchMode):
    """Counts the operations that wait for the device: those whose result's value or shape the host needs."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masked = function is torch.ops.aten.index.Tensor and any(
            i is not None and i.dtype == torch.bool for i in args[1])
        reads = ("_local_scalar_dense", "nonzero", "repeat_interleave", "unique")
        self.count += masked or any(name in str(function) for name in reads)
        return function(*args, **(kwargs or {}))


def test_a_tail_adds_no_wait_for_the_device():
    torch.manual_seed(0)
    h, W, y = (torch.randn(6, 4, requires_grad=True), torch.randn(20, 4, requires_grad=True),
               torch.tensor([3, 1, -100, 0, 7, 7]))
    record, counts = record_topk(h @ W.T, y, 0.5), []
    for tail in (None, sample_tail(y, 20, 4)):
        with Reads() as reads:
            linear_replay_cross_entropy(h, W, y, record, tail=tail).backward()
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_ignored_row_takes_no_part_whatever_it_holds(reduction, size):
    torch.manual_seed(0)
    h, W, y = torch.randn(3, 4), torch.randn(9, 4, requires_grad=True), torch.tensor([1, -100, 2])
    record, tail = record_topk(h @ W.T, y, 0.5), size and sample_tail(y, 9, size)
    h[1] = math.nan
    h.requires_grad_()
    loss = linear_replay_cross_entropy(h, W, y, record, tail=tail, reduction=reduction)
    kept = linear_replay_cross_entropy(h[::2], W, y[::2], record.select([0, 2]), tail=tail, reduction=reduction)
    torch.testing.assert_close(loss[::2] if reduction == "none" else loss, kept)
    (dh, dW), (dh_kept, dW_kept) = (torch.autograd.grad(x.sum(), (h, W)) for x in (loss, kept))
    torch.testing.assert_close((dh, dW), (dh_kept, dW_kept), rtol=0, atol=8 * EPS[torch.float32] * 4)
    assert not dh[1].any()


def test_a_row_that_was_recorded_may_be_ignored_later():
    z, y = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).requires_grad_(), torch.tensor([1, 2, 3])
    record, later = record_topk(z, y, 0.5), torch.tensor([1, -100, 3])
    for tail in None, everything(7):
        for leaf, loss in both_forms(z, later, record, tail=tail, reduction="none"):
            assert loss[1] == 0 and loss[0] > 0 and not torch.autograd.grad(loss.sum(), leaf)[0][1].any()


def test_an_ignored_row_whose_tail_is_out_of_the_range_of_exp_has_no_gradient():
    z, y = torch.tensor([[0.0, 0.0], [-1e4, -1e4]], requires_grad=True), torch.tensor([0, -100])
    for leaf, loss in both_forms(z, y, record_topk(z, y, 0.5), tail=everything(2), reduction="none"):
        assert torch.autograd.grad(loss.sum(), leaf)[0].tolist() == [[-0.5, 0.5], [0.0, 0.0]]


IDS, WEIGHTS = torch.tensor([0, 2]), torch.zeros(2)


@pytest.mark.parametrize("tail, message", [
    ((torch.tensor([0, 4]), WEIGHTS), r"tail.token_ids must lie in \[0, 4\) \(row 1\)"),
    ((torch.tensor([-1, 2]), WEIGHTS), r"tail.token_ids must lie in \[0, 4\) \(row 0\)"),
    ((torch.tensor([2, 2]), WEIGHTS), r"tail.token_ids must be ascending without duplicates \(row 1\)"),
    ((torch.tensor([2, 0]), WEIGHTS), r"tail.token_ids must be ascending without duplicates \(row 1\)"),
    ((IDS, torch.tensor([0.0, math.nan])), r"tail.log_weight must be finite \(row 1\)"),
    ((IDS, torch.tensor([-math.inf, 0.0])), r"tail.log_weight must be finite \(row 0\)"),
    ((IDS, torch.zeros(3)), r"tail must hold int64 token_ids \(\|R\|,\)"),
    ((IDS.int(), WEIGHTS), "tail must hold"), ((IDS[None], WEIGHTS[None]), "tail must hold"),
    ((IDS.to("meta"), WEIGHTS), "tail must hold .* on cpu"),
    ((IDS, WEIGHTS.to("meta")), "tail must hold"),
])
def test_bad_tails_are_refused_by_both_forms(tail, message):
    for form in (lambda: replay_cross_entropy(Z, Y, RECORD, tail=Tail(*tail)),
                 lambda: linear_replay_cross_entropy(Z, torch.eye(4), Y, RECORD, tail=Tail(*tail))):
        with pytest.raises(ValueError, match="^" + message):
            form()


@pytest.mark.parametrize("change, message", [
    (dict(size=-1), "size must be at least 0"), (dict(vocab_size=0), r"target must lie in \[0, 0\)"),
    (dict(target=torch.tensor([2, 4, 0])), r"target must lie in \[0, 4\).*row 1"),
    (dict(target=torch.tensor([2, 1, -1])), r"target.*row 2"),
    (dict(target=torch.tensor([2.0])), "target must hold integers")])
def test_bad_input_to_sample_tail(change, message):
    with pytest.raises(ValueError, match="^" + message):
        sample_tail(**{**dict(target=Y, vocab_size=4, size=1), **change})


def test_the_maximum_that_keeps_exp_from_overflowing_counts_a_tail_s_weights():
    z, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
    record = ReplayRecord(torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, 2]), torch.zeros(1), 3, 0.5)
    for _, loss in both_forms(z, y, record, tail=Tail(torch.tensor([2]), torch.tensor([100.0]))):
        assert loss.item() == pytest.approx(98.0, rel=2.0**-22)  # log(exp 2 + exp 1 + exp 100) - 2


def test_a_tail_token_whose_logit_is_not_finite_is_refused_by_row():
    W = torch.eye(4)
    W[3] = math.inf  # not recorded for row 1; 0 * inf is nan there
    tail = Tail(torch.tensor([3]), torch.zeros(1))
    with pytest.raises(ValueError, match=r"must be finite \(row 0\)"):
        linear_replay_cross_entropy(Z, W, Y, RECORD, tail=tail)
    huge = torch.full((1, 2), 3e38)  # finite, but their sum is not
    record = ReplayRecord(torch.tensor([0], dtype=torch.int32), torch.arange(2), torch.zeros(1), 2, 0.5)
    assert linear_replay_cross_entropy(huge, torch.eye(2), torch.tensor([0]), record, tail=everything(2)).isfinite()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tail", [None, everything(4)], ids=["none", "tail"])
def test_a_scored_row_that_is_not_finite_is_refused_with_a_tail_too(bad, tail):
    z = Z * torch.tensor([[1.0], [bad], [1.0]])
    with pytest.raises(ValueError, match=r"must be finite \(row 1\)"):
        replay_cross_entropy(z, Y, RECORD, tail=tail)
    with pytest.raises(ValueError, match=r"must be finite \(row 1\)"):
        linear_replay_cross_entropy(z, torch.eye(4), Y, RECORD, tail=tail)


def test_what_is_recorded_and_sampled_under_inference_mode_can_be_trained_on():
    torch.manual_seed(0)
    h, W, y = torch.randn(6, 4, requires_grad=True), torch.randn(20, 4, requires_grad=True), torch.arange(6)
    with torch.inference_mode():
        records = [ReplayRecord.concat(record_topk(z, t, 0.7) for z, t in zip((h @ W.T).split(4), y.split(4)))]
        records += [records[0].select(y), records[0].to("cpu")]
        tail = sample_tail(y, 20, 3)
    for sample, record in itertools.product((None, tail), records):
        for loss in linear_replay_cross_entropy(h, W, y, record, tail=sample), \
                replay_cross_entropy(h @ W.T, y, record, tail=sample):
            loss.backward()


# ---------------------------------------------------------------------------------------------------------- the anchor

def kl_by_loops(log_probs, logits, rows):
    """[A_t] and [[dA_t/dz_j]] by plain loops: both sides renormalized to the row, 0 for an empty one."""
    values, gradients, log_probs = [], [], iter(log_probs)
    for z, ids in zip(logits, rows):
        then = [next(log_probs) for _ in ids]
        now = [z[j] for j in ids]
        q0, q1 = ([math.exp(x - max(xs)) / math.fsum(math.exp(y - max(xs)) for y in xs) for x in xs]
                  for xs in (then, now))
        log_q1 = [x - max(now) - math.log(math.fsum(math.exp(y - max(now)) for y in now)) for x in now]
        values.append(math.fsum(a * (math.log(a) - b) for a, b in zip(q0, log_q1) if a > 0))
        gradients.append([0.0] * len(z))
        for j, a, b in zip(ids, q0, q1):
            gradients[-1][j] = b - a
    return values, gradients


@given(logits_and_targets(sizes=(1, 2, 3, 8, 40, 70)), taus, st.none() | st.integers(1, 8), st.integers(0, 2**32 - 1),
       st.sampled_from([0.0, 1e-3, 1.0, 1e4]))
def test_the_anchor_and_its_gradient_equal_plain_loops(case, tau, max_size, seed, moved):
    logits, target = case
    record = record_topk(logits, target, tau, max_size=max_size, keep_log_probs=True)
    z = logits.double() + moved * torch.tensor(np.random.default_rng(seed).normal(size=logits.shape))
    values, gradients = kl_by_loops(record.log_probs.tolist(), z.tolist(), rows_of(record))
    # the terms are as large as the logits and the log-probabilities, and each is rounded
    scale = 1 + z.abs().amax(1) + torch.zeros(len(z)).scatter_reduce(0, record.rows, -record.log_probs, "amax")
    tolerance = 16 * EPS[torch.float64] * scale.numpy()
    eye = torch.eye(z.shape[1], dtype=torch.float64)
    for form in lambda x, **how: replay_kl_div(x, record, **how), \
            lambda x, **how: linear_replay_kl_div(x, eye, record, **how):
        x = z.clone().requires_grad_()
        loss = form(x, reduction="none")
        gradient, = torch.autograd.grad(loss.sum(), x)
        assert (abs(loss.detach().numpy() - values) <= tolerance).all() and (loss.detach().numpy() >= -tolerance).all()
        assert (abs(gradient.numpy() - gradients) <= tolerance[:, None]).all()
        filled = (record.subset_sizes > 0).sum().item()
        assert form(x, reduction="sum").item() == loss.sum().item()
        mean = loss.sum().item() / filled if filled else math.nan
        assert form(x).item() == pytest.approx(mean, rel=1e-15, nan_ok=True)


@given(logits_and_targets(), taus)
def test_the_anchor_is_zero_for_the_recording_model_and_in_rows_of_one_token(case, tau):
    logits, target = case
    record = record_topk(logits, target, tau, keep_log_probs=True)
    loss, single = replay_kl_div(logits, record, reduction="none"), record.subset_sizes == 1
    # log p and z are rounded to float32 at the size of the logits, and q0 sums what differs
    assert (loss.abs() <= 8 * EPS[torch.float32] * (1 + logits.abs().amax(1))).all()
    assert not loss[single].any() and not replay_kl_div(-3 * logits, record, reduction="none")[single].any()


def test_the_linear_anchor_has_every_argument_s_gradient_in_any_dtype_and_under_autocast():
    torch.manual_seed(0)
    h, W, bias, y = torch.randn(2, 4, 8), torch.randn(300, 8), torch.randn(300), torch.randint(300, (2, 4))
    y[0, 1] = -100
    record = record_topk(h @ W.T + bias, y, 0.5, keep_log_probs=True)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        leaves = [(x + x.roll(1, 0)).to(dtype).requires_grad_() for x in (h, W, bias)]
        wide = [x.detach().double().requires_grad_() for x in leaves]
        exact = replay_kl_div(wide[0] @ wide[1].T + wide[2], record)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float64):
            loss = linear_replay_kl_div(*leaves[:2], record, linear_bias=leaves[2])
        eps = EPS[torch.promote_types(dtype, torch.float32)]
        assert loss.dtype == torch.promote_types(dtype, torch.float32) and exact > 1
        assert loss.item() == pytest.approx(exact.item(), rel=64 * eps)  # 8 products a logit, logits of size 20
        for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(exact, wide)):
            assert a.dtype == dtype
            torch.testing.assert_close(a.double(), b, rtol=0, atol=(64 * eps + EPS[dtype]) * b.abs().max().item())
        assert linear_replay_kl_div(*leaves[:2], record, linear_bias=leaves[2], reduction="none").shape == (2, 4)


def test_the_anchor_makes_no_N_by_V_tensor_and_waits_no_oftener_than_the_loss():
    torch.manual_seed(0)
    h, W, y = torch.randn(300, 4, requires_grad=True), torch.randn(5000, 4, requires_grad=True), torch.zeros(300).long()
    record = record_topk(h @ W.T, y, 0.9, max_size=8, keep_log_probs=True)
    with Watch() as seen:
        linear_replay_kl_div(h, W, record).backward()
    assert seen.elements <= 5000 * 4
    counts = []
    for loss in lambda: linear_replay_kl_div(h, W, record), lambda: linear_replay_cross_entropy(h, W, y, record):
        with Reads() as reads:
            loss().backward()
        counts.append(reads.count)
    assert 0 < counts[0] <= counts[1]


def test_log_probs_are_those_of_the_softmax_and_travel_with_their_tokens(tmp_path):
    torch.manual_seed(0)
    z, y = 3 * torch.randn(5, 100), torch.tensor([3, -100, 0, 99, 7])
    record = record_topk(z, y, 0.7, keep_log_probs=True)
    assert record_topk(z, y, 0.7).log_probs is None
    expected = {(t, j): z.double().log_softmax(1)[t, j].item() for t, ids in enumerate(rows_of(record)) for j in ids}
    joined = ReplayRecord.concat([record.select([4, 4]), record.to("cpu"), record.select([])])
    joined.save(tmp_path / "r.npz")
    for other, rows in ((record, range(5)), (ReplayRecord.load(tmp_path / "r.npz"), [4, 4, 0, 1, 2, 3, 4])):
        wanted = [expected[t, j] for t in rows for j in rows_of(record)[t]]
        assert other.log_probs.tolist() == pytest.approx(wanted, abs=16 * 2.0**-23)  # log p of size 16 at most
    without = record_topk(z, y, 0.7)
    with pytest.raises(ValueError, match=r"^records\[1\] has .*log_probs False"):
        ReplayRecord.concat([record, without])
    without.save(tmp_path / "old.npz")  # a file as every version wrote it
    assert same(ReplayRecord.load(tmp_path / "old.npz"), without)
    with pytest.raises(ValueError, match="^record must have log_probs: record it with keep_log_probs=True"):
        replay_kl_div(z, without)
    huge = record_topk(torch.tensor([[1e4, -1e4, 9999.0]]), torch.tensor([1]), 1.0, keep_log_probs=True)
    assert huge.log_probs.tolist() == pytest.approx([-0.3133, -20000.3133, -1.3133], abs=2e-3)  # 2e4 to its last bit


@pytest.mark.parametrize("log_probs, message", [
    (torch.tensor([-0.5, math.nan, -1.0]), r"log_probs must be finite.*row 1"),
    (torch.tensor([-0.5, -1.0, -math.inf]), r"log_probs must be finite.*row 1"),
    (torch.tensor([0.001, -1.0, -1.0]), r"log_probs must be finite, at most 0.*row 0"),  # a logit, or not a logarithm
    (torch.tensor([-0.5, -0.5, -0.5]), r"log_probs must be.*add up to 1.*row 1"),
    (torch.tensor([-0.5, -1.0]), "log_probs must have the 3 entries of token_ids"),
    (torch.zeros(3, dtype=torch.float64) - 2, "log_probs must be one-dimensional torch.float32")])
def test_log_probs_that_are_none_are_refused(log_probs, message):
    fields = torch.tensor([1, 0, 2], dtype=torch.int32), torch.tensor([0, 1, 3]), torch.zeros(2), 4, 0.5
    with pytest.raises(ValueError, match=message):
        ReplayRecord(*fields, log_probs)


def test_bad_input_to_the_anchor_names_the_argument():
    record = record_topk(Z, Y, 0.8, keep_log_probs=True)
    for logits, message in ((Z[:2], "logits of N = 2"), (Z[:, :3], "logits of N = 3 positions and V = 3"),
                            (Z.log(), "logits must be finite"), (Z.long(), "logits must be floating point")):
        with pytest.raises(ValueError, match="^" + message):
            replay_kl_div(logits, record)
    for h, options, message in ((Z[:2], {}, "input @ linear_weight.T of N = 2"),
                                (Z, dict(reduction="avg"), "reduction must be"),
                                (Z / 0, {}, r"input @ linear_weight.T \+ linear_bias must be finite"),
                                (Z, dict(linear_bias=torch.zeros(3)), "linear_bias must have shape")):
        with pytest.raises(ValueError, match="^" + message):
            linear_replay_kl_div(h, torch.eye(4), record, **options)


# --------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("change, message", [
    (dict(tau=0.0), r"tau must lie in \(0, 1\]"), (dict(tau=1.01), "tau must"), (dict(tau=math.nan), "tau must"),
    (dict(max_size=0), "max_size must be at least 1"),
    (dict(target=torch.tensor([2, 4, 0])), r"target must lie in \[0, 4\).*row 1"),
    (dict(target=torch.tensor([2, 1, -1])), r"target.*row 2"),
    (dict(target=torch.tensor([2.0, 1.0, 0.0])), "target must hold integers"),
    (dict(target=torch.tensor([True, True, False])), "target must hold integers"),
    (dict(target=torch.tensor([2j, 1, 0])), "target must hold integers"),
    (dict(target=torch.tensor([2, 1])), "logits of leading shape"),
    (dict(logits=torch.tensor(1.0), target=torch.tensor(0)), r"logits must be floating point of shape \(\.\.\., V\)"),
    (dict(logits=torch.zeros(3, 0)), r"logits must be floating point of shape \(\.\.\., V\)"),
    (dict(logits=torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, math.inf, 0.0, 0.0], [0.0] * 4])),
     r"logits must be finite \(row 1\)"),
    (dict(logits=torch.tensor([[0.0] * 4, [0.0] * 4, [0.0, -math.inf, 0.0, 0.0]])), r"logits must be finite \(row 2\)"),
    (dict(logits=torch.tensor([[math.nan] + [0.0] * 3] + [[0.0] * 4] * 2)), r"logits must be finite \(row 0\)"),
    (dict(logits=torch.zeros(3, 4, dtype=torch.int64)), "logits must be floating point"),
])
def test_bad_input_to_record_topk(change, message):
    with pytest.raises(ValueError, match="^" + message):
        record_topk(**{**dict(logits=Z, target=Y, tau=0.9), **change})


def test_finite_logits_with_an_infinite_sum_are_not_refused():
    assert rows_of(record_topk(torch.full((1, 4), 3e38), torch.tensor([0]), 0.25)) == [[0]]
    # and the row that is named is the one that is not finite
    with pytest.raises(ValueError, match=r"finite \(row 1\)"):
        record_topk(torch.tensor([[3e38, 3e38], [math.inf, 0.0]]), torch.tensor([0, 0]), 0.25)


@pytest.mark.parametrize("logits, target, record, options, message", [
    (Z[:2], Y[:2], RECORD, {},
     "{product} of N = 2 positions and V = 4 tokens does not fit the record of N = 3 and V = 4"),
    (Z[:, :3], Y, RECORD, {}, "{product} of N = 3 positions and V = 3 tokens"),
    (Z, torch.tensor([2, 0, -100]), RECORD, {}, r"target must be in its recorded row.*row 1"),
    (Z, torch.tensor([2, 1, 0]), RECORD, {}, r"target must be in its recorded row.*row 2"),
    (Z, torch.tensor([2, 9, -100]), RECORD, {}, r"target must lie in \[0, 4\).*row 1"),
    (Z * torch.tensor([[1.0], [math.nan], [1.0]]), Y, RECORD, {}, "{sum} must be finite.*row 1"),
    (Z, Y[:2], RECORD, {}, "{product} of leading shape"), (Z, Y, RECORD, dict(reduction="avg"), "reduction must be"),
])
def test_bad_input_to_both_losses_names_the_argument(logits, target, record, options, message):
    def expected(product, sum):
        return pytest.raises(ValueError, match="^" + message.replace(
            "{product}", re.escape(product)).replace("{sum}", re.escape(sum)))

    with expected("logits", "logits"):
        replay_cross_entropy(logits, target, record, **options)
    with expected("input @ linear_weight.T", "input @ linear_weight.T + linear_bias"):
        linear_replay_cross_entropy(logits, torch.eye(4)[:logits.shape[1], :logits.shape[1]], target, record, **options)


def test_bad_shapes_to_the_linear_form_and_to_outside_mass():
    with pytest.raises(RuntimeError, match="shape"):  # torch's own message names the two widths
        linear_replay_cross_entropy(Z, torch.ones(4, 3), Y, RECORD)
    with pytest.raises(ValueError, match=r"linear_bias must have shape \(V,\)"):
        linear_replay_cross_entropy(Z, torch.eye(4), Y, RECORD, linear_bias=torch.zeros(3))
    for logits, message in ((Z[:2], "logits of N = 2"), (Z[:, :3], "logits of N = 3 positions and V = 3"),
                            (Z.log(), "logits must be finite")):
        with pytest.raises(ValueError, match="^" + message):
            outside_mass(logits, RECORD)


# --------------------------------------------------------------------------------------------------- the record itself

@given(logits_and_targets(), st.lists(st.integers(0, 10**6), max_size=12))
def test_select_takes_rows_in_order_and_repeats_them(case, positions):
    record = record_topk(*case, 0.8)
    positions = [i % len(record) for i in positions]
    chosen = record.select(positions)
    assert rows_of(chosen) == [rows_of(record)[i] for i in positions]
    assert chosen.outside_mass.tolist() == [record.outside_mass[i] for i in positions]


@pytest.mark.parametrize("positions", [[3], [-1], [0.5], [True, False, True]])
def test_positions_outside_the_record_are_refused(positions):
    with pytest.raises(ValueError, match="positions must"):
        RECORD.select(positions)


def test_concat_joins_in_order_and_refuses_what_differs():
    joined = ReplayRecord.concat(iter([RECORD, RECORD.select([1]), RECORD.select([])]))
    assert same(joined, RECORD.select([0, 1, 2, 1]))
    with pytest.raises(ValueError, match=r"records\[1\]"):
        ReplayRecord.concat([RECORD, record_topk(Z, Y, 0.9)])
    with pytest.raises(ValueError, match="^records must hold at least one record$"):
        ReplayRecord.concat([])


FIELDS = dict(token_ids=RECORD.token_ids, offsets=RECORD.offsets, outside_mass=RECORD.outside_mass,
              vocab_size=4, tau=0.8)


@pytest.mark.parametrize("change, message", [
    (dict(token_ids=torch.tensor([0, 1, 2, 1])), "token_ids must be one-dimensional torch.int32"),
    (dict(token_ids=torch.tensor([0, 2, 1, 1], dtype=torch.int32)), r"token_ids.* without duplicates \(row 0\)"),
    (dict(token_ids=torch.tensor([0, 1, 1, 1], dtype=torch.int32)), r"token_ids.* without duplicates \(row 0\)"),
    (dict(token_ids=torch.tensor([0, 3, 2, 1], dtype=torch.int32), offsets=torch.tensor([0, 1, 3, 4])),
     r"token_ids must be ascending without duplicates \(row 1\)"),
    (dict(token_ids=torch.tensor([0, 1, 4, 1], dtype=torch.int32)), r"token_ids must lie in \[0, 4\)"),
    (dict(token_ids=torch.tensor([-1, 1, 2, 1], dtype=torch.int32)), "token_ids must lie"),
    (dict(offsets=torch.tensor([0, 3, 4])), "offsets must hold 4"),
    (dict(offsets=torch.tensor([1, 3, 4, 4])), "offsets must hold"),
    (dict(offsets=torch.tensor([0, 3, 4, 5])), "offsets must hold"),
    (dict(offsets=torch.tensor([0, 4, 3, 4])), r"offsets must never decrease \(row 1\)"),
    (dict(outside_mass=torch.tensor([0.1, -0.1, 0.0])), r"outside_mass.*row 1"),
    (dict(outside_mass=torch.tensor([1.0, 0.1, 1.0000001])), r"outside_mass.*row 2"),
    (dict(outside_mass=torch.tensor([0.1, 0.1, math.nan])), r"outside_mass.*row 2"),
    (dict(outside_mass=torch.zeros(3, 1)), "outside_mass must be"),
    (dict(vocab_size=0), "vocab_size"), (dict(vocab_size=2**31), "vocab_size"),
    (dict(tau=0.0), "tau"), (dict(tau=1.5), "tau"),
])
def test_a_record_that_breaks_an_invariant_cannot_be_made(change, message):
    with pytest.raises(ValueError, match="^" + message):
        ReplayRecord(**{**FIELDS, **change})


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(),
                                                                reason="needs a CUDA device"))]


@pytest.mark.parametrize("device", DEVICES)
def test_a_record_moves_with_all_its_fields(device):
    moved = RECORD.to(device)
    tensors = [x for x in vars(moved).values() if isinstance(x, torch.Tensor)]
    assert {x.device.type for x in tensors} == {device} and same(moved.to("cpu"), RECORD)
    assert same(moved.select([2, 0]).to("cpu"), RECORD.select([2, 0])) and torch.equal(moved.rows.cpu(), RECORD.rows)


def same(a, b):
    one, other = ({name: x for name, x in vars(record).items() if isinstance(x, torch.Tensor)} for record in (a, b))
    return (a.vocab_size, a.tau, *one) == (b.vocab_size, b.tau, *other) and all(
        torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_default_device_and_dtype_change_nothing(dtype, tmp_path):
    torch.manual_seed(0)
    h, W, bias, y = torch.randn(6, 8), torch.randn(400, 8), torch.randn(400), torch.randint(400, (6,))

    def everything_there_is():
        generator = torch.Generator("cpu").manual_seed(0)
        record = ReplayRecord.concat([record_topk(h @ W.T + bias, y, tau) for tau in (0.9, 0.9)]).select(range(6))
        record.save(tmp_path / "r.npz")
        record, tail = ReplayRecord.load(tmp_path / "r.npz").to("cpu"), sample_tail(y, 400, 20, generator=generator)
        leaves = [x.clone().requires_grad_() for x in (h, W, bias)]
        losses = []
        for sample in None, tail:
            linear = linear_replay_cross_entropy(*leaves[:2], y, record, linear_bias=leaves[2], tail=sample)
            losses += [linear, replay_cross_entropy(h @ W.T + bias, y, record, tail=sample)]
        return [record.token_ids, outside_mass(h @ W.T, record), tail.log_weight, *losses,
                *torch.autograd.grad(sum(losses), leaves), record_topk(0 * h @ W.T, y, 0.9).offsets]

    expected = everything_there_is()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            found = everything_there_is()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_no_position_at_all_is_an_empty_record():
    h, W, y = torch.zeros(0, 3), torch.ones(5, 3), torch.zeros(0, dtype=torch.int64)
    record = record_topk(h @ W.T, y, 0.9)
    assert len(record) == len(record.token_ids) == 0 and len(outside_mass(h @ W.T, record)) == 0
    for tail in None, sample_tail(y, 5, 2):
        assert linear_replay_cross_entropy(h, W, y, record, tail=tail, reduction="sum") == 0
        assert replay_cross_entropy(h @ W.T, y, record, tail=tail, reduction="none").shape == (0,)


@given(logits_and_targets())
def test_a_file_gives_back_the_record(tmp_path_factory, case):
    path = tmp_path_factory.mktemp("record") / "record"  # no suffix is added
    record = record_topk(*case, 0.7)
    record.save(path)
    assert same(ReplayRecord.load(path), record)
    record.select([0]).save(path)
    assert len(ReplayRecord.load(path)) == 1 and os.listdir(path.parent) == ["record"]


def test_a_damaged_file_loads_identically_or_raises_value_error(tmp_path):
    path, record = tmp_path / "record.npz", record_topk(Z, Y, 0.3)
    record.save(path)
    data = path.read_bytes()
    damaged = [data[:n] for n in range(len(data))] + [data.replace(b"<f8", b"<f4")]  # half of 0.3 is 4e-8
    for i in range(len(data)):
        damaged += [data[:i] + bytes([data[i] ^ mask]) + data[i + 1:] for mask in (0x01, 0x80, 0xFF)]
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            assert same(ReplayRecord.load(path), record)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > len(damaged) / 2


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_loading_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("record.npz", "w") as archive:
        for name in FIELDS:
            member = io.BytesIO()
            np.lib.format.write_array(member, np.array([Bomb()], dtype=object), allow_pickle=True)
            archive.writestr(name + ".npy", member.getvalue())
    with pytest.raises(ValueError):
        ReplayRecord.load("record.npz")
    (tmp_path / "plain").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError):
        ReplayRecord.load("plain")
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(FileNotFoundError):
        ReplayRecord.load("nowhere")


def test_a_crash_while_saving_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "record.npz"
    RECORD.save(path)
    before = path.read_bytes()
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # as readable for others as any file
    (tmp_path / "plain").unlink()

    def crash(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", crash)
    with pytest.raises(OSError, match="disk full"):
        RECORD.select([0]).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["record.npz"]


def test_writers_at_one_time_leave_one_of_their_files_whole(tmp_path):
    path, files = tmp_path / "file", [bytes([i]) * 100_000 for i in range(8)]

    def slowly(data):
        def write(file):
            for part in range(0, len(data), 1000):
                file.write(data[part:part + 1000])
                file.flush()
        return write

    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            list(pool.map(lambda data: write_atomically(path, slowly(data)), files))
            assert path.read_bytes() in files and os.listdir(tmp_path) == ["file"]
