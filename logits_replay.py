"""Logits Replay: record the tokens that matter once, then train on the softmax over only those.

The two stages of *Logits Replay + MoClip* (Qiu, Li, Zhou, Huang, Qiu, Sun; arXiv:2510.09152): "In Stage 0, we record
dynamic Top-K token subsets that cover a probability threshold, always including the gold label. In Stage 1, we replay
these compact subsets to compute exact renormalized losses, avoiding full softmax". The tail, which estimates what the
subsets leave out, and the anchor, which keeps the model from forgetting, are this project's. THEORY.md has the proofs
(R1 to R14) and all decisions that are ours.

    symbol   code           meaning
    N                       token positions: a batch of sequences, flattened row-major
    V        vocab_size     vocabulary size
    d                       width of the hidden state that enters the LM head
    z, p     logits         logits of one position, p = softmax(z)
    y        target         gold token
    tau      tau            coverage threshold, 0 < tau <= 1
    K_t                     smallest K whose K most probable tokens have total probability >= tau
    S_t      token_ids      row t of the record: the top-K_t tokens, plus y_t, by ascending id
    rho_t    outside_mass   probability outside S_t
    nnz      rows           sum over t of |S_t|: all recorded tokens, row after row; record.rows: the t of each
    R, w     tail           tokens that every position scores beside its S_t, and their weights
    q                       p renormalized to S_t; q0: the recording model's, q1: the current one's

One row, tau = 0.8, the gold token marked by a star:

    token           9     2     4     0*    7
    p             .60   .25   .08   .04   .03
    running sum   .60   .85                         0.8 is reached with two tokens: K = 2
    S               9     2           0             the top K and gold; in the record 0, 2, 9
    rho                       .08  +        .03     = 0.11 is outside; Stage 1 gives 0, 2 and 9 all of the softmax

The definition in four lines, and what `record_topk` and `replay_cross_entropy` make of the same row:

>>> p = torch.tensor([.04, 0, .25, 0, .08, 0, 0, .03, 0, .60]); z = p.clamp(min=1e-30).log(); y, tau = 0, 0.8
>>> order = p.argsort(descending=True, stable=True)
>>> K = 1 + int((p[order].cumsum(0, dtype=torch.float64) < tau).sum())
>>> S = sorted({*order[:K].tolist(), y}); loss = z[S].logsumexp(0) - z[y]
>>> record = record_topk(z, torch.tensor(y), tau)                        # Stage 0
>>> S, record.token_ids.tolist(), torch.allclose(loss, replay_cross_entropy(z, torch.tensor(y), record))     # Stage 1
([0, 2, 9], [0, 2, 9], True)

Losses are in nats, in float32 at least, on CPU or CUDA. Bad input is a ValueError that names argument, row and rule.
"""

from __future__ import annotations

import math
import os
import secrets
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

# ------------------------------------------------------------------------------------------------------------- Stage 0
@torch.no_grad()
def record_topk(logits: Tensor, target: Tensor, tau: float, *, max_size=None, ignore_index=-100,
                keep_log_probs=False) -> ReplayRecord:
    """Stage 0: the smallest set of most probable tokens that covers tau, and the gold token, for every position.

        K_t = min {K : p_(1) + ... + p_(K) >= tau},   S_t = {the K_t most probable tokens} + {y_t},
        rho_t = sum of p_j over j not in S_t

    p_(k) is the k-th in rank: by probability, descending, equal ones by id, ascending, so S_t is unique. p is the
    float32 softmax (float64 for float64 logits); its sum runs in rank order, in float64; all V if it never reaches tau.

    logits: (..., V), finite, of any float dtype.   target: (...), integers in [0, V) or ignore_index (an empty row).
    max_size: a cap on |S_t|, in which gold displaces the last in rank.   keep_log_probs: log p on S_t, for the anchor,
    in nats; they and rho are float32. Source: arXiv:2510.09152, abstract (Stage 0); ties, arithmetic, max_size: ours.
    """
    _require(0 < tau <= 1, f"tau must lie in (0, 1], got {tau}")
    _require(max_size is None or max_size >= 1, f"max_size must be at least 1, got {max_size}")
    flat = _flat_logits(logits, target)
    (N, V), device, gold = flat.shape, flat.device, _flat_target(target, flat.shape[1], ignore_index)
    sizes, rho = torch.zeros_like(gold), torch.zeros(N, device=device, dtype=torch.float32)
    limit, token_ids, log_probs = min(max_size or V, V), [], []

    def rank(top):
        # formula: (K_t, p_(K_t)), (n,) each, from the first k in rank, (n, k); K = k + 1 where these k do not decide it
        K = (1 + (top.cumsum(1, dtype=torch.float64) < tau).sum(1)).clamp(max=limit)
        return K, top.gather(1, (K - 1).clamp(max=top.shape[1] - 1)[:, None])[:, 0]

    # fast: a few rows at a time, on a CPU a million logits, which its cache holds, elsewhere 64 million, to fill it
    for t in (gold != ignore_index).nonzero()[:, 0].split(2**(20 if device.type == "cpu" else 26) // V + 1):
        z, y = flat[t], gold[t, None]
        p = z.softmax(1, dtype=torch.promote_types(z.dtype, torch.float32))
        # formula: K, edge = rank(p.sort(1, descending=True).values), that is K_t and p_(K_t); fast: from the 64 most
        # probable, from all where those do not decide, and by numpy, as torch's sort carries the indices along
        K, edge = rank(p.topk(min(64, V)).values)
        if (wide := K > 64).any():
            top = torch.from_numpy(np.sort(p[wide].numpy(), 1)).flip(1) if device.type == "cpu" else \
                p[wide].sort(1, descending=True).values
            K[wide], edge[wide] = rank(top)
        # formula: S_t is gold, what is above the edge, and at the edge the K - |above| tokens of the lowest ids; fast:
        # (row, token) pairs, in order, in place of masks (n, V); `place` counts those at the edge, from 1 in every row
        row, token = (p >= edge[:, None]).scatter_(1, y, True).nonzero(as_tuple=True)
        above, level, is_gold = p[row, token] > edge[row], p[row, token] == edge[row], token == y[row, 0]
        count = lambda pairs: row[pairs].bincount(minlength=len(t))
        room, place = K - count(above), level.cumsum(0) - (count(level).cumsum(0) - count(level))[row]
        # formula: gold is always in; where the cap leaves no room it displaces the last in rank
        has_gold = count(is_gold & (above | level & (place <= room[row]))) > 0
        room = room - (~has_gold & (K == limit)).long()
        inside = above | level & (place <= room[row]) | is_gold
        sizes[t], row, token = count(inside), row[inside], token[inside]
        token_ids.append(token.int())
        if keep_log_probs:
            log_probs.append(z.log_softmax(1, dtype=p.dtype)[row, token].float())
        # formula: rho_t = sum of p_j over j not in S_t; 1 minus the sum inside would lose the digits of a small rho
        p[row, token] = 0
        rho[t] = p.sum(1).float().clamp(max=1)
    return ReplayRecord(torch.cat(token_ids), pad(sizes.cumsum(0), (1, 0)), rho, V, float(tau),
                        torch.cat(log_probs) if keep_log_probs else None)


# ------------------------------------------------------------------------------- Stage 1: one softmax over ragged rows
def _log_softmax(z: Tensor, record: ReplayRecord, tail=None, z_tail=None) -> Tensor:
    """log q of every recorded token, (nnz,), from their logits z, (nnz,), and the tail's, z_tail (N, |R|), if any.

        log q_j = z_j - log( sum over i in S_t of exp z_i + sum over i in R, not in S_t, of w_i exp z_i ),   j in S_t

    The numeric core of all losses. Overwrites z_tail: it is large, and autograd needs only what exp returns.
    """
    rows, zeros = record.rows, z.new_zeros(len(record))
    largest = zeros.scatter_reduce(0, rows, z.detach(), "amax", include_self=False)
    if with_tail := z_tail is not None and z_tail.numel():
        # a token of both R and S_t counts once, in S_t; a recorded token that is not in R has the last column
        R = tail.token_ids
        column = R.new_full((record.vocab_size,), len(R)).scatter(0, R, torch.arange(len(R), device=R.device))
        in_subset = torch.zeros(len(record), len(R) + 1, dtype=torch.bool, device=R.device)
        in_subset[rows, column[record.token_ids]] = True
        # w_i exp z_i = exp(z_i + log w_i)
        z_tail = z_tail.add_(tail.log_weight).masked_fill_(in_subset[:, :-1], -math.inf)
        largest = largest.maximum(z_tail.detach().amax(1))
    # the largest is subtracted first, which changes nothing but keeps exp from overflowing
    z = z - largest[rows]
    empty = record.subset_sizes == 0  # nobody asks for the sum of a row without tokens, but log 0 has no derivative
    total = empty.to(z.dtype).index_add(0, rows, z.exp())
    if with_tail:
        total = total + z_tail.sub_(largest[:, None]).exp_().sum(1)
    return z - total.log()[rows]


def replay_cross_entropy(logits: Tensor, target: Tensor, record: ReplayRecord, *, tail=None,
                         ignore_index=-100, reduction="mean") -> Tensor:
    """Stage 1: cross-entropy under the softmax renormalized to the recorded subset, from logits that are there anyway.

        L_t = log( sum over j in S_t of exp z_j ) - z_y                                      the paper's: tail=None
        L_t = log( sum over j in S_t of exp z_j + sum over j in R, not in S_t, of w_j exp z_j ) - z_y

    Mirrors `F.cross_entropy`: logits (..., V), target (...), "mean" is over the targets that are not ignored, and over
    none it is nan, its gradient 0. Without tail it never exceeds `F.cross_entropy` (THEORY.md R2); its gradient by z_j
    is q_j - [j = y] on S_t, exactly 0 outside (R3), so that nothing holds the outside mass down (R7). A `Tail` does, by
    w_j exp(z_j - L_t - z_y) on R (R9). Source: arXiv:2510.09152, abstract ("exact renormalized losses").

    >>> logits, target = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
    >>> record = record_topk(logits, target, tau=0.9)                    # keeps tokens 0 and 1
    >>> replay_cross_entropy(logits, target, record)                     # log(1 + exp(-1))
    tensor(0.3133)
    >>> replay_cross_entropy(logits, target, record, tail=Tail(torch.tensor([2]), torch.tensor([0.0])))  # + exp(-2)
    tensor(0.4076)
    """
    flat = _flat_logits(logits, target, record)
    y, dtype = _flat_target(target, flat.shape[1], ignore_index, tail), torch.promote_types(flat.dtype, torch.float32)
    z_tail = None if tail is None else flat[:, tail.token_ids].to(dtype)
    return _cross_entropy(flat[record.rows, record.token_ids].to(dtype), z_tail, y, record, tail, ignore_index,
                          target.shape, reduction)


def linear_replay_cross_entropy(input: Tensor, linear_weight: Tensor, target: Tensor, record: ReplayRecord, *,
                                linear_bias=None, tail=None, ignore_index=-100, reduction="mean") -> Tensor:
    """Stage 1, fast: `replay_cross_entropy` of logits = input @ linear_weight.T + linear_bias, never formed.

        z_tj = <input_t, weight_j> + bias_j,   for j in S_t, and for j in R where there is a tail

    Mirrors `F.linear_cross_entropy`, also over no target: input (..., d), linear_weight (V, d), target (...),
    linear_bias (V,) or None. O(nnz d) operations, not O(N V d) (THEORY.md R8), and O(N |R| d), densely, for a tail.
    Half precision is accumulated in float32, under autocast too. Source: as above ("avoiding full softmax").

    >>> h, W, y = torch.randn(5, 8), torch.randn(100, 8), torch.arange(5)
    >>> record = record_topk(h @ W.T, y, tau=0.9)
    >>> torch.allclose(linear_replay_cross_entropy(h, W, y, record), replay_cross_entropy(h @ W.T, y, record))
    True
    """
    y = _flat_target(target, record.vocab_size, ignore_index, tail)
    z, z_tail = _linear_logits(input, linear_weight, linear_bias, record, target, tail)
    return _cross_entropy(z, z_tail, y, record, tail, ignore_index, target.shape, reduction)


def _cross_entropy(z, z_tail, y: Tensor, record: ReplayRecord, tail, ignore_index, shape, reduction) -> Tensor:
    rows, counted, zeros = record.rows, y != ignore_index, z.new_zeros(len(record))
    is_gold = (record.token_ids == y[rows]) & counted[rows]
    has_gold = zeros.index_add(0, rows, is_gold.to(z.dtype)) > 0
    _require(has_gold | ~counted, "target must be in its recorded row: is this the record of this batch?")
    # L_t = -log q_y, gold's entry of the log-softmax; 0 for an ignored target. `_reduce`: the mean of those counted
    log_q = _log_softmax(z, record, tail, z_tail)
    return _reduce(zeros.index_add(0, rows, log_q.where(is_gold, 0), alpha=-1), counted, shape, reduction)


class Tail(NamedTuple):
    """Tokens R that every position scores beside its recorded ones, each with weight w = 1 / inclusion probability."""
    token_ids: Tensor   # (|R|,) int64: ascending, no duplicates, in [0, V)
    log_weight: Tensor  # (|R|,) floating point: log w


@torch.inference_mode(False)  # also inside it: autograd saves these tensors, and refuses those made under it
def sample_tail(target: Tensor, vocab_size: int, size: int, *, ignore_index=-100, generator=None) -> Tail:
    """A random tail for one batch: its distinct gold tokens, surely, and `size` of the M0 others, uniformly.

        w_j = 1 for a gold token,   w_j = M0 / size for each of the `size` drawn,   M0 = V - number of distinct golds

    P(j in R) w_j = 1: the sum of w_j exp z_j over R without S_t is an unbiased estimate of the sum of exp z_j over all
    that S_t leaves out (Horvitz and Thompson 1952; THEORY.md R9). The golds are in R: training raises them at every
    position (shared parameters), and no heavy token may be left to chance. A `Tail` of your own may lack one: L_t is
    still defined, as y_t is in S_t, but only the positions that recorded it hold it down. Draw a new tail every step.

    size: >= 0; M0 or more takes all, with weight 1: the loss is `F.cross_entropy`.   generator: on any device.
    Source: this project, in the spirit of sampled softmax (Bengio and Senecal 2003) and of arXiv:2503.16870.

    >>> tail = sample_tail(torch.tensor([5, 2, 5, -100]), vocab_size=10, size=4)
    >>> len(tail.token_ids), tail.log_weight.exp().sum().round()          # 2 of weight 1 and 4 of weight 8 / 4
    (6, tensor(10.))
    """
    _require(size >= 0, f"size must be at least 0, got {size}")
    target = _flat_target(target, vocab_size, ignore_index)
    is_gold = torch.zeros(vocab_size, dtype=torch.bool, device=target.device)
    is_gold[target[target != ignore_index]] = True
    others, device = (~is_gold).nonzero()[:, 0], target.device if generator is None else generator.device
    drawn = others[torch.randperm(len(others), generator=generator, device=device)[:size].to(target.device)]
    token_ids = torch.cat([is_gold.nonzero()[:, 0], drawn]).sort().values
    log_weight = math.log(len(others) / len(drawn)) if len(drawn) else 0.0
    return Tail(token_ids, torch.full_like(token_ids, log_weight, dtype=torch.float32).where(~is_gold[token_ids], 0))


def replay_kl_div(logits: Tensor, record: ReplayRecord, *, reduction="mean") -> Tensor:
    """The anchor: KL from the recording model to this one, on the recorded tokens of text that is to be kept.

        A_t = sum over j in S_t of q0_j (log q0_j - log q1_j),   q0, q1: p then and now, both renormalized to S_t

    Record text that the base wrote itself, or that is at hand, with `keep_log_probs`; add this to the domain's loss.
    Its gradient by the logits is q1 - q0 on S_t, 0 outside. (1 - rho_t) A_t is a part of the full KL, so a lower bound
    (THEORY.md R13), on the base's own text that of whole sequences (R14). It is blind to what moves in or out of S_t as
    a whole, so in a row of one token to all: take a large tau under a cap (.98, max_size=32), not a small tau.

    logits: (..., V), of the N positions of `record`; "mean": over rows that are not empty; of none nan, gradient 0.
    Source: this project; the paper's summary mentions a "domain self-constraint" and does not say what it is. KL to the
    live base: arXiv:2412.15270; self-generated text: arXiv:2605.26097.

    >>> record = record_topk(torch.tensor([[2.0, 1.0, 0.0, -9.0]]), torch.tensor([0]), 0.9, keep_log_probs=True)
    >>> q0, q1 = torch.tensor([2.0, 1.0]).softmax(0), torch.tensor([0.5, 0.5])      # the record keeps tokens 0 and 1
    >>> (q0 * (q0 / q1).log()).sum(), replay_kl_div(torch.zeros(1, 4), record)
    (tensor(0.1109), tensor(0.1109))
    """
    z = _flat_logits(logits, record=record)[record.rows, record.token_ids]
    return _kl_div(z.to(torch.promote_types(z.dtype, torch.float32)), record, logits.shape[:-1], reduction)


def linear_replay_kl_div(input: Tensor, linear_weight: Tensor, record: ReplayRecord, *, linear_bias=None,
                         reduction="mean") -> Tensor:
    """The anchor, fast: `replay_kl_div` of input @ linear_weight.T + linear_bias, as `linear_replay_cross_entropy`."""
    z, _ = _linear_logits(input, linear_weight, linear_bias, record)
    return _kl_div(z, record, input.shape[:-1], reduction)


def _kl_div(z: Tensor, record: ReplayRecord, shape, reduction: str) -> Tensor:
    _require(record.log_probs is not None, "record must have log_probs: record it with keep_log_probs=True")
    log_q0, log_q1 = _log_softmax(record.log_probs.to(z.dtype), record), _log_softmax(z, record)
    # A_t = sum over j in S_t of q0_j (log q0_j - log q1_j)
    A = z.new_zeros(len(record)).index_add(0, record.rows, log_q0.exp() * (log_q0 - log_q1))
    return _reduce(A, record.subset_sizes > 0, shape, reduction)


def outside_mass(logits: Tensor, record: ReplayRecord) -> Tensor:
    """The probability outside each recorded subset, under these logits (its field `outside_mass`: at recording time).

        rho_t = sum of softmax(z_t)_j over j not in S_t

    logits: (..., V), finite. Returns (N,), 0 for an empty (ignored) row; differentiable. L_full - L_S is
    -log(1 - rho_t) (R2), and the gradient of L_S does not hold rho down (R7): watch it.

    >>> record = record_topk(torch.zeros(1, 4), torch.tensor([0]), tau=0.5)
    >>> outside_mass(torch.tensor([[0.0, 0.0, 0.0, 100.0]]), record)     # the model moved: all mass is outside now
    tensor([1.])
    """
    p = _flat_logits(logits, record=record).softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))
    p = p.index_put((record.rows, record.token_ids), p.new_zeros(()))
    return p.sum(1).clamp(max=1) * (record.subset_sizes > 0)


# ---------------------------------------------- a learner may stop here: below are the record, a fast path and checks

INTEGERS = torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8
DTYPES = {"token_ids": torch.int32, "offsets": torch.int64, "outside_mass": torch.float32, "log_probs": torch.float32}
with warnings.catch_warnings():  # torch warns once that CSR tensors are in beta: here that is known
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1))


@dataclass(frozen=True, eq=False)
class ReplayRecord:
    """The recorded subsets of N positions, as ragged rows in compressed (CSR-style) form, all on one device."""
    token_ids: Tensor                # (nnz,) int32: row t is token_ids[offsets[t]:offsets[t + 1]], ascending, in [0, V)
    offsets: Tensor                  # (N+1,) int64: 0 first, nnz last, never decreasing
    outside_mass: Tensor             # (N,) float32: rho_t under the recording model; 0 for an ignored, so empty row
    vocab_size: int                  # V
    tau: float                       # the coverage asked for
    log_probs: Tensor | None = None  # (nnz,) float32: log p of each recorded token then, nats; None if not kept

    @torch.inference_mode(False)  # as `sample_tail`
    def __post_init__(self):
        for name, x in self._tensors().items():
            _require(x.dtype == DTYPES[name] and x.dim() == 1, f"{name} must be one-dimensional {DTYPES[name]}")
            object.__setattr__(self, name, x.clone() if x.is_inference() else x)
        ids, offsets, rho, log_p, V = *(getattr(self, name) for name in DTYPES), self.vocab_size
        _require(0 < self.tau <= 1, f"tau must lie in (0, 1], got {self.tau}")
        _require(0 < V < 2**31, f"vocab_size must lie in [1, 2**31), got {V}")
        _require(len(offsets) == len(rho) + 1 and offsets[[0, -1]].tolist() == [0, len(ids)],
                 f"offsets must hold {len(rho) + 1} entries from 0 to {len(ids)}")
        _require(offsets.diff() >= 0, "offsets must never decrease")
        _require((rho >= 0) & (rho <= 1), "outside_mass must lie in [0, 1]")
        _require(not len(ids) or 0 <= int(ids.amin()) <= int(ids.amax()) < V, f"token_ids must lie in [0, {V})")
        ascending = pad(ids.diff() > 0, (1, 1), value=True)
        ascending[offsets] = True  # the order starts anew where a row does
        _require(ascending, "token_ids must be ascending without duplicates", offsets)
        if log_p is not None:
            _require(len(log_p) == len(ids), f"log_probs must have the {len(ids)} entries of token_ids")
            total = torch.zeros_like(rho).index_add(0, self.rows, log_p.where(log_p <= 0, math.nan).exp() + 0 * log_p)
            _require(total <= 1.01, "log_probs must be finite, at most 0, of probabilities that add up to 1 at most")

    def __len__(self) -> int:
        return len(self.outside_mass)

    @property
    def subset_sizes(self) -> Tensor:  # |S_t|, (N,) int64
        return self.offsets.diff()

    @property
    def rows(self) -> Tensor:  # the row t of every recorded token, (nnz,) int64; without output_size the host waits
        t = torch.arange(len(self), device=self.offsets.device)
        return t.repeat_interleave(self.subset_sizes, output_size=len(self.token_ids))

    def _tensors(self) -> dict:
        return {name: getattr(self, name) for name in DTYPES if getattr(self, name) is not None}

    def select(self, positions) -> ReplayRecord:
        """The rows at `positions` (integers in [0, N), of any shape), in the order asked for, repeats allowed."""
        t = torch.as_tensor(positions, device=self.offsets.device).flatten()
        _require(not len(t) or t.dtype in INTEGERS, f"positions must be integers, got {t.dtype}")
        t = t.long()
        _require((t >= 0) & (t < len(self)), f"positions must lie in [0, {len(self)})")
        sizes = self.subset_sizes[t]
        offsets = pad(sizes.cumsum(0), (1, 0))
        moved = (self.offsets[t] - offsets[:-1]).repeat_interleave(sizes)  # from a token's new place to its old
        old = torch.arange(len(moved), device=moved.device) + moved
        return replace(self, token_ids=self.token_ids[old], offsets=offsets, outside_mass=self.outside_mass[t],
                       log_probs=None if self.log_probs is None else self.log_probs[old])

    def to(self, device) -> ReplayRecord:
        return replace(self, **{name: x.to(device) for name, x in self._tensors().items()})

    @staticmethod
    def concat(records) -> ReplayRecord:
        """The rows of all records, in order, such as a shard from each of several processes, recorded in one way."""
        records = list(records)
        _require(records, "records must hold at least one record")
        kinds = [f"vocab_size {r.vocab_size}, tau {r.tau}, log_probs {r.log_probs is not None}" for r in records]
        for i, kind in enumerate(kinds):
            _require(kind == kinds[0], f"records[{i}] has {kind}, records[0] {kinds[0]}")
        joined = {name: torch.cat([getattr(r, name) for r in records]) for name in records[0]._tensors()}
        joined["offsets"] = pad(torch.cat([r.subset_sizes for r in records]).cumsum(0), (1, 0))
        return replace(records[0], **joined)

    def save(self, path) -> None:
        """Write an uncompressed .npz (an array a field, no pickle); a crash leaves the old file or the new one."""
        arrays = {name: x.numpy(force=True) for name, x in self._tensors().items()}
        write_atomically(path, lambda file: np.savez(file, vocab_size=self.vocab_size, tau=self.tau, **arrays))

    @staticmethod
    def load(path) -> ReplayRecord:
        """Read what `save` wrote, on the CPU, executing nothing from it; ValueError if its CRCs or invariants fail."""
        with open(path, "rb") as file:
            try:
                return ReplayRecord(**{name: torch.from_numpy(x) if x.ndim else x.item()
                                       for name, x in np.load(file, allow_pickle=False).items()})
            except Exception as error:  # zipfile and numpy raise a dozen types on damaged input
                raise ValueError(f"{path} is not a complete, undamaged record: {error}") from error


def write_atomically(path, write) -> None:
    """`write(file)` beside `path`, then rename: a crash leaves the old file or the new, two writers one of theirs."""
    temporary = Path(f"{os.fsdecode(path)}.{secrets.token_hex(8)}")  # which no thread, process or container shares
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _linear_logits(input: Tensor, linear_weight: Tensor, linear_bias, record: ReplayRecord, target=None, tail=None):
    """The logits input @ linear_weight.T + linear_bias of the recorded tokens, (nnz,), and of the tail, (N, |R|)."""
    h = _flat(input, len(linear_weight), "input @ linear_weight.T", target, record)
    _require(linear_bias is None or linear_bias.shape == (record.vocab_size,), "linear_bias must have shape (V,)")
    dtype = torch.promote_types(torch.promote_types(input.dtype, linear_weight.dtype), torch.float32)
    h, W, R = h.to(dtype), linear_weight.to(dtype), record.token_ids[:0] if tail is None else tail.token_ids
    if len(R):  # an empty row may hold anything, even nan: the product of all rows must not spread it
        h = h.masked_fill((record.subset_sizes == 0)[:, None], 0)
    z, z_tail = _SampledLogits.apply(h, W, record.offsets.int(), record.token_ids, R)
    if linear_bias is not None:
        z, z_tail = z + linear_bias[record.token_ids], z_tail + linear_bias[R]
    # 0 times what is not finite is nan; one wait for both kinds of logits
    spread = z.new_zeros(len(h)).index_add(0, record.rows, z.detach() * 0) + (z_tail.detach() * 0).sum(1)
    _require(spread == 0, "input @ linear_weight.T + linear_bias must be finite")
    return z, z_tail


class _SampledLogits(torch.autograd.Function):
    """(h[rows] * W[ids]).sum(1) and h @ W[R].T: no (nnz, d) memory, no copies as by autograd, half the time."""

    @staticmethod
    def forward(ctx, h, W, offsets, ids, R):
        ctx.save_for_backward(h, W, offsets, ids, R)
        with torch.autocast(h.device.type, enabled=False):  # the sparse products lack bfloat16
            z = torch.sparse.sampled_addmm(_csr(offsets, ids, h.new_zeros(len(ids)), h, W), h, W.t(), beta=0).values()
            return z.detach(), h @ W[R].t()  # torch.compile looks for strides in the sparse tensor that z is a view of

    @staticmethod
    def backward(ctx, dz, dz_tail):
        _require(not torch.is_grad_enabled(), "linear forms have a first derivative only, those of logits have all")
        h, W, offsets, ids, R = ctx.saved_tensors
        with torch.autocast(h.device.type, enabled=False):
            # dL/dh = G W,   dL/dW = G' h,   with G the (N, V) sparse matrix of dL/dz; and the same with dL/dz_tail
            G = _csr(offsets, ids, dz.contiguous(), h, W)
            grad_h = (G @ W).addmm_(dz_tail, W[R]) if ctx.needs_input_grad[0] else None
            grad_W = (G.t() @ h).index_add_(0, R, dz_tail.t() @ h) if ctx.needs_input_grad[1] else None
            return grad_h, grad_W, None, None, None


def _csr(offsets: Tensor, ids: Tensor, values: Tensor, h: Tensor, W: Tensor) -> Tensor:
    # (N, V); the device is named because a default device would override the values'
    return torch.sparse_csr_tensor(offsets, ids, values, (len(h), len(W)), device=h.device, check_invariants=False)


def _reduce(values: Tensor, counted: Tensor, shape, reduction: str) -> Tensor:
    _require(reduction in ("mean", "sum", "none"), f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if reduction == "none":
        return values.reshape(shape)
    return values.sum() / counted.sum() if reduction == "mean" else values.sum()


def _require(ok, message: str, offsets=None) -> None:
    """ValueError unless ok: a bool, or one a row (with offsets: one a token), whose first broken row is named."""
    if not (ok.all() if isinstance(ok, Tensor) else ok):
        if isinstance(ok, Tensor):
            first = (~ok).nonzero()[0]
            message += f" (row {int(first if offsets is None else torch.searchsorted(offsets, first, right=True) - 1)})"
        raise ValueError(message)


def _flat_target(target: Tensor, vocab_size: int, ignore_index: int, tail=None) -> Tensor:
    """(N,) int64; ValueError for an entry that is neither a token nor ignore_index, and for a bad tail beside it."""
    _require(target.dtype in INTEGERS, f"target must hold integers, got {target.dtype}")
    target = target.flatten().long()
    rules = [((target == ignore_index) | ((target >= 0) & (target < vocab_size)),
              f"target must lie in [0, {vocab_size}) or be ignore_index={ignore_index}")]
    if tail is not None:
        ids, w = tail
        fits = ids.dtype == torch.int64 and ids.dim() == 1 and w.shape == ids.shape
        _require(fits and ids.device == w.device == target.device,
                 f"tail must hold int64 token_ids (|R|,) and log_weight (|R|,), both on {target.device}")
        rules += [((ids >= 0) & (ids < vocab_size), f"tail.token_ids must lie in [0, {vocab_size})"),
                  (pad(ids.diff() > 0, (1, 0), value=True), "tail.token_ids must be ascending without duplicates"),
                  (w.isfinite(), "tail.log_weight must be finite")]
    if not torch.stack([ok.all() for ok, _ in rules]).all():  # one wait for all rules, target's and tail's
        for rule in rules:
            _require(*rule)
    return target


def _flat_logits(logits: Tensor, target=None, record=None) -> Tensor:
    """(N, V); ValueError for a row that is not finite, and for a target or a record that does not fit."""
    _require(logits.is_floating_point() and logits.dim(), "logits must be floating point of shape (..., V)")
    flat = _flat(logits, logits.shape[-1], "logits", target, record)
    ok = flat.detach().sum(1).isfinite()  # fast; but finite terms can have an infinite sum, so look closer there
    _require(ok.index_put((~ok,), flat[~ok].isfinite().all(1)), "logits must be finite")
    return flat


def _flat(x: Tensor, V: int, name: str, target, record) -> Tensor:
    """x as (N, width); ValueError if `name`, (..., V) of the leading shape of x, does not fit target or record."""
    flat, lead = x.reshape(-1, x.shape[-1]), tuple(x.shape[:-1])
    _require(target is None or lead == target.shape, f"{name} of leading shape {lead} does not fit the target's")
    _require(record is None or (len(flat), V) == (len(record), record.vocab_size),
             f"{name} of N = {len(flat)} positions and V = {V} tokens does not fit the record's N and vocab_size")
    return flat
