"""Logits Replay: record the tokens that matter once, then train on the softmax over only those.

The two stages of *Logits Replay + MoClip* (Qiu, Li, Zhou, Huang, Qiu, Sun; arXiv:2510.09152): "In Stage 0, we record
dynamic Top-K token subsets that cover a probability threshold, always including the gold label. In Stage 1, we replay
these compact subsets to compute exact renormalized losses, avoiding full softmax". And a `Tail`, this project's own,
which keeps one Stage 0 good. What is guaranteed is proved in THEORY.md (R1 to R12); choices of ours are in README.md.

    symbol   code           meaning
    N                       token positions: a batch of sequences, flattened row-major
    V        vocab_size     vocabulary size
    d                       width of the hidden state that enters the LM head
    z, p     logits         logits of one position, p = softmax(z)
    y        target         gold token
    tau      tau            coverage threshold, 0 < tau <= 1
    K_t                     smallest K whose K most probable tokens have total probability >= tau
    S_t      token_ids      row t of the record: the top-K_t tokens, plus y_t
    rho_t    outside_mass   probability outside S_t
    nnz                     sum over t of |S_t|
    R, w     tail           tokens that every position scores beside its S_t, and their weights;  M = |R|

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
>>> S, record.token_ids.tolist()
([0, 2, 9], [0, 2, 9])
>>> torch.allclose(loss, replay_cross_entropy(z, torch.tensor(y), record))     # Stage 1
True

Not here: several processes (each records its shard, then `ReplayRecord.concat`), compression, cached hidden states.
"""

import math
import os
import warnings
import zipfile
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

# ------------------------------------------------------------------------------------------------ what Stage 0 records

@dataclass(frozen=True, eq=False)
class ReplayRecord:
    """The recorded subsets of N positions, as ragged rows in compressed (CSR-style) form.

    token_ids     (nnz,)  int32    row t is token_ids[offsets[t]:offsets[t + 1]]: ascending, no duplicates, in [0, V)
    offsets       (N+1,)  int64    0 first, nnz last, never decreasing
    outside_mass  (N,)    float32  rho_t under the recording model, 0 for an ignored row (which is empty)
    vocab_size    int              V
    tau           float            the coverage asked for

    All tensors on one device. Raises ValueError if a field breaks its line above, however the record was made.
    """

    token_ids: Tensor
    offsets: Tensor
    outside_mass: Tensor
    vocab_size: int
    tau: float

    def __post_init__(self):
        _check_record(self)
        _leave_inference_mode(self)

    def __len__(self) -> int:
        return len(self.outside_mass)

    @property
    def subset_sizes(self) -> Tensor:
        """|S_t|, (N,) int64."""
        return self.offsets.diff()

    @property
    def rows(self) -> Tensor:
        """The row t of every recorded token, (nnz,) int64."""
        t = torch.arange(len(self), device=self.offsets.device)
        return t.repeat_interleave(self.subset_sizes, output_size=len(self.token_ids))  # else it waits for the device

    def select(self, positions) -> "ReplayRecord":
        """The rows at `positions` (integers in [0, N), of any shape), in the order asked for, repeats allowed."""
        positions = _check_positions(positions, self)
        sizes = self.subset_sizes[positions]
        offsets = _offsets(sizes)
        moved = (self.offsets[positions] - offsets[:-1]).repeat_interleave(sizes)  # from a token's new place to its old
        token_ids = self.token_ids[torch.arange(len(moved), device=moved.device) + moved]
        return ReplayRecord(token_ids, offsets, self.outside_mass[positions], self.vocab_size, self.tau)

    def to(self, device) -> "ReplayRecord":
        return ReplayRecord(self.token_ids.to(device), self.offsets.to(device), self.outside_mass.to(device),
                            self.vocab_size, self.tau)

    @staticmethod
    def concat(records) -> "ReplayRecord":
        """The rows of all records, in order; ValueError for no records and for unequal vocab_size or tau."""
        return _concat(list(records))

    def save(self, path) -> None:
        """Write an uncompressed .npz (an array a field, no pickle); a crash leaves the old file or the new one."""
        _save(self, path)

    @staticmethod
    def load(path) -> "ReplayRecord":
        """Read what `save` wrote, on the CPU, executing nothing from it; ValueError if its CRCs or invariants fail."""
        return _load(path)


# ------------------------------------------------------------------------------------------------------------- Stage 0

@torch.no_grad()
def record_topk(logits: Tensor, target: Tensor, tau: float, *, max_size=None, ignore_index=-100) -> ReplayRecord:
    """Stage 0: the smallest set of most probable tokens that covers tau, and the gold token, for every position.

        K_t = min {K : p_(1) + ... + p_(K) >= tau},   S_t = {the K_t most probable tokens} + {y_t},
        rho_t = sum of p_j over j not in S_t

    p_(k) is the k-th in rank: by probability, descending, equal ones by id, ascending: S_t is unique. p is the float32
    softmax (float64 for float64 logits), the running sum float64. tau = 1 takes every token that is needed for the
    rounded sum to reach 1, all V if it never does.

    logits: (..., V), finite; float16, bfloat16, float32, float64.   target: (...), integers in [0, V) or ignore_index.
    tau: in (0, 1].   max_size: if given, an explicit cap >= 1 on |S_t|, gold included, whatever tau asks for.
    Returns the record of the N = prod(...) positions. Raises ValueError naming the argument, the row and the rule.
    Source: arXiv:2510.09152, abstract (Stage 0). Ties, arithmetic and max_size are this project's decisions.
    """
    logits, target = _check_stage0(logits, target, tau, max_size, ignore_index)
    (N, V), device = logits.shape, logits.device
    if device.type == "mps":  # it has no float64 for the running sum
        return record_topk(logits.cpu(), target.cpu(), tau, max_size=max_size, ignore_index=ignore_index).to(device)
    token_ids, sizes = [], torch.zeros(N, dtype=torch.int64, device=device)
    rho = torch.zeros(N, dtype=torch.float32, device=device)
    # a few rows at a time: on a CPU a million logits, which its cache holds, elsewhere enough to keep it busy
    n = 2**(20 if device.type == "cpu" else 26) // V + 1
    for t, z, y in zip(torch.arange(N, device=device).split(n), logits.split(n), target.split(n)):
        scored = y != ignore_index
        if not scored.all():
            t, z, y = t[scored], z[scored], y[scored]
        p = z.softmax(1, dtype=_wide_dtype(logits))
        # S_t of these rows, as (row, token) pairs in order: sort p, keep the first K whose sum is >= tau, add gold;
        # the four lines at the top, made fast in _cover, below
        row, token, rho[t] = _cover(p, y[:, None], tau, max_size)
        token_ids.append(token.int())
        sizes[t] = row.bincount(minlength=len(t))
    return ReplayRecord(torch.cat(token_ids), _offsets(sizes), rho, V, float(tau))


# ------------------------------------------------------------------------------------------------------------- Stage 1

def replay_cross_entropy(logits: Tensor, target: Tensor, record: ReplayRecord, *, tail=None,
                         ignore_index=-100, reduction="mean") -> Tensor:
    """Stage 1: cross-entropy under the softmax renormalized to the recorded subset, from logits that are there anyway.

        L_t = log( sum over j in S_t of exp z_j ) - z_y                                      the paper's: tail=None
        L_t = log( sum over j in S_t of exp z_j + sum over j in R, not in S_t, of w_j exp z_j ) - z_y

    Mirrors `F.cross_entropy`: logits (..., V), target (...), "mean" divides by the number of targets that are not
    ignored; the result is float32 (float64 for float64 logits), in nats, shaped like target for "none". Without tail it
    never exceeds `F.cross_entropy` (THEORY.md R2), and its gradient is exactly zero outside S_t (R3): nothing holds the
    outside mass down (R7). With a `Tail`, see `sample_tail`, something does (R9).
    Raises ValueError for non-finite logits, a target outside [0, V) or not in its recorded row, N or V that disagree,
    a tail whose ids leave [0, V) or do not ascend, whose weights are not finite, or that is on another device.
    Source: arXiv:2510.09152, abstract (Stage 1, "exact renormalized losses").

    >>> logits, target = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
    >>> record = record_topk(logits, target, tau=0.9)                    # keeps tokens 0 and 1
    >>> replay_cross_entropy(logits, target, record)                     # log(1 + exp(-1))
    tensor(0.3133)
    >>> replay_cross_entropy(logits, target, record, tail=Tail(torch.tensor([2]), torch.tensor([0.0])))  # + exp(-2)
    tensor(0.4076)
    """
    _check_shapes("logits", logits.shape[:-1], target)
    flat = _flat_logits(logits)
    _check_fit("logits", *flat.shape, record)
    y, dtype = _flat_target(target, record.vocab_size, ignore_index, tail), _wide_dtype(flat)
    z = flat[record.rows, record.token_ids].to(dtype)
    z_tail = None if tail is None else flat[:, tail.token_ids].to(dtype)
    return _reduce(_nll(z, z_tail, y, record, tail, ignore_index), y != ignore_index, target.shape, reduction)


def linear_replay_cross_entropy(input: Tensor, linear_weight: Tensor, target: Tensor, record: ReplayRecord, *,
                                linear_bias=None, tail=None, ignore_index=-100, reduction="mean") -> Tensor:
    """Stage 1, fast: `replay_cross_entropy` of logits = input @ linear_weight.T + linear_bias, never formed.

        z_tj = <input_t, weight_j> + bias_j,   for j in S_t, and for j in R where there is a tail

    Mirrors `F.linear_cross_entropy`: input (..., d), linear_weight (V, d), target (...), linear_bias (V,) or None.
    O(nnz d) operations instead of O(N V d) (THEORY.md R8), and O(N M d) for a tail: one dense product for all rows.
    float16 and bfloat16 are accumulated, and their loss returned, in float32, under autocast too. Uses
    `torch.sparse.sampled_addmm` on CPU and CUDA, which have it, and gathers rows elsewhere.
    Raises ValueError as `replay_cross_entropy` does, for those non-finite logits that it computes.
    Source: arXiv:2510.09152, abstract ("avoiding full softmax computation").

    >>> h, W, y = torch.randn(5, 8), torch.randn(100, 8), torch.arange(5)
    >>> record = record_topk(h @ W.T, y, tau=0.9)
    >>> loss = linear_replay_cross_entropy(h, W, y, record)
    >>> torch.allclose(loss, replay_cross_entropy(h @ W.T, y, record))
    True
    """
    _check_linear(input, linear_weight, linear_bias, target)
    dtype, rows, ids = _wide_dtype(input, linear_weight), record.rows, record.token_ids
    h, W = input.reshape(-1, input.shape[-1]).to(dtype), linear_weight.to(dtype)
    _check_fit("input @ linear_weight.T", len(h), len(W), record)
    y = _flat_target(target, record.vocab_size, ignore_index, tail)
    if tail is not None:  # an ignored row may hold anything, even nan: the product of all rows must not spread it
        h = h.masked_fill((y == ignore_index)[:, None], 0)
    # z (nnz,) = (h[rows] * W[ids]).sum(1),   z_tail (N, M) = h @ W[R].T or None
    logits_of = _SampledLogits.apply if h.device.type in SAMPLED_ON else _gathered_logits
    z, z_tail = logits_of(h, W, rows, record.offsets.int(), ids, None if tail is None else tail.token_ids)
    if linear_bias is not None:
        z = z + linear_bias[ids]
        z_tail = None if tail is None else z_tail + linear_bias[tail.token_ids]
    _check_finite(z, z_tail, rows)
    return _reduce(_nll(z, z_tail, y, record, tail, ignore_index), y != ignore_index, target.shape, reduction)


def _nll(z: Tensor, z_tail, y: Tensor, record: ReplayRecord, tail, ignore_index: int) -> Tensor:
    """L_t (N,) from z (nnz,), the logits of the recorded tokens, and z_tail (N, M), the tail's. Consumes z_tail."""
    rows, zeros = record.rows, z.new_zeros(len(record))
    counted, is_gold = y != ignore_index, record.token_ids == y[rows]
    has_gold = zeros.index_add(0, rows, is_gold.to(z.dtype)) > 0
    _require((has_gold | ~counted, "target must be in its recorded row: is this the record of this batch?"))
    z_gold = zeros.index_add(0, rows, z.where(is_gold, 0))
    z_max = zeros.scatter_reduce(0, rows, z.detach(), "amax", include_self=False)
    with_tail = z_tail is not None and z_tail.numel()
    if with_tail:
        # w_j exp z_j = exp(z_j + log w_j); a token of both R and S_t counts once, in S_t.
        # In place: (N, M) is large, and autograd needs only what exp returns
        z_tail = z_tail.add_(tail.log_weight).masked_fill_(_in_subset(tail.token_ids, record, rows), -math.inf)
        z_max = z_max.maximum(z_tail.detach().amax(1))
    # L_t = (max - z_y) + log(sum of exp(z_j - max)); the maximum, a constant, keeps exp from overflowing
    total = zeros.index_add(0, rows, (z - z_max[rows]).exp())
    if with_tail:
        total = total + z_tail.sub_(z_max[:, None]).exp_().sum(1)
    return torch.where(counted, (z_max - z_gold) + total.where(counted, 1).log(), 0)


# -------------------------------------------------------------------------- the tail: a sample of what S_t leaves out

class Tail(NamedTuple):
    """Tokens R that every position scores beside its recorded ones, each with weight w = 1 / inclusion probability.

    token_ids   (M,) int64          ascending, no duplicates, in [0, V)
    log_weight  (M,) floating point; log w_j
    """

    token_ids: Tensor
    log_weight: Tensor


@torch.inference_mode(False)  # also inside it: autograd saves these tensors, and refuses those made under it
def sample_tail(target: Tensor, vocab_size: int, size: int, *, ignore_index=-100, generator=None) -> Tail:
    """A random tail for one batch: its distinct gold tokens, surely, and `size` of the M0 others, uniformly.

        w_j = 1 for a gold token,   w_j = M0 / size for each of the `size` drawn,   M0 = V - number of distinct golds

    With size >= 1, P(j in R) w_j = 1: the sum of w_j exp z_j over R without S_t is an unbiased estimate of the sum of
    exp z_j over all that S_t leaves out (Horvitz and Thompson 1952; THEORY.md R9). The golds are always in R: training
    raises them at every position (shared parameters), and no heavy token may be left to chance. Draw one every step.

    target: (...), integers in [0, V) or ignore_index.   vocab_size: V.   generator: a torch.Generator, on any device.
    size: >= 0. M0 or more takes all of them with weight 1 (the loss is `F.cross_entropy`), 0 takes the golds only.
    Returns a `Tail` on the device of the target. Raises ValueError for a bad target, vocab_size or size.
    Source: this project, in the spirit of sampled softmax (Bengio and Senecal 2003; Jean et al. 2015) and of
    importance-sampled logits (arXiv:2503.16870).

    >>> tail = sample_tail(torch.tensor([5, 2, 5, -100]), vocab_size=10, size=4)
    >>> len(tail.token_ids), tail.log_weight.exp().sum().round()          # 2 of weight 1 and 4 of weight 8 / 4
    (6, tensor(10.))
    """
    if size < 0:
        raise ValueError(f"size must be at least 0, got {size}")
    _check_vocab_size(vocab_size)
    target = _flat_target(target, vocab_size, ignore_index)
    is_gold = torch.zeros(vocab_size, dtype=torch.bool, device=target.device)
    is_gold[target[target != ignore_index]] = True
    others, device = (~is_gold).nonzero()[:, 0], target.device if generator is None else generator.device
    drawn = others[torch.randperm(len(others), generator=generator, device=device)[:size].to(target.device)]
    token_ids = torch.cat([is_gold.nonzero()[:, 0], drawn]).sort().values
    log_weight = math.log(len(others) / len(drawn)) if len(drawn) else 0.0
    return Tail(token_ids, torch.full_like(token_ids, log_weight, dtype=torch.float32).where(~is_gold[token_ids], 0))


def outside_mass(logits: Tensor, record: ReplayRecord) -> Tensor:
    """The probability outside each recorded subset, under these logits (its field `outside_mass`: at recording time).

        rho_t = sum of softmax(z_t)_j over j not in S_t

    logits: (..., V), finite. Returns (N,), float64 for float64 logits, else float32; 0 for an empty (ignored) row.
    Differentiable. L_full - L_S = -log(1 - rho_t), and the gradient of L_S does not hold it down (R2, R7): watch it.
    Raises ValueError if logits are not finite or disagree with the record on N or V.

    >>> record = record_topk(torch.zeros(1, 4), torch.tensor([0]), tau=0.5)
    >>> outside_mass(torch.tensor([[0.0, 0.0, 0.0, 100.0]]), record)     # the model moved: all mass is outside now
    tensor([1.])
    """
    flat = _flat_logits(logits)
    _check_fit("logits", *flat.shape, record)
    p = flat.softmax(1, dtype=_wide_dtype(flat))
    p = p.index_put((record.rows, record.token_ids), p.new_zeros(()))
    return p.sum(1).clamp(max=1) * (record.subset_sizes > 0)


# ------------------------------------------------- a learner may stop here: below are fast paths, checks and the file

def _offsets(sizes: Tensor) -> Tensor:
    """(n,) sizes of rows -> (n + 1,), where each starts and the last one ends."""
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def _wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of softmax and loss: float64 if a tensor is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _reduce(nll: Tensor, counted: Tensor, shape, reduction: str) -> Tensor:
    """The reduction of `F.cross_entropy` over L_t (N,): "mean" over those that are counted, (N,) bool."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if reduction == "none":
        return nll.reshape(shape)
    return nll.sum() / counted.sum() if reduction == "mean" else nll.sum()


# --------------------------------------------------------------------------------------------- fast paths: the subset

def _cover(p: Tensor, y: Tensor, tau: float, max_size):
    """S_t of the rows p (n, V) with gold y (n, 1), as (row, token) pairs in order, and rho_t (n,). Consumes p.

    The 64 most probable tokens are tried first: they decide a confident row at a tenth of the price of a sort. The
    other rows are covered by a histogram of their probabilities or, where that could err and where V is small, by rank
    over the whole row.
    """
    V = p.shape[1]
    limit = min(max_size or V, V)
    # under a cap one more than it allows, so that a tie at the edge shows
    row, token, rho, decided = _cover_by_rank(p, y, tau, min(V, 64 if max_size is None else limit + 1), limit)
    if decided.all():
        return row, token, rho
    wide = (~decided).nonzero()[:, 0]
    # the histogram reads the bits of a float32, and at small V its bins outweigh the row
    clear = max_size is None and p.dtype == torch.float32 and V > 2048
    if clear:
        wide_row, wide_token, rho[wide], clear = _cover_by_histogram(p[wide], y[wide], tau)
    if not clear:
        wide_row, wide_token, rho[wide], _ = _cover_by_rank(p[wide], y[wide], tau, V, limit)
    row, order = torch.cat([row, wide[wide_row]]).sort(stable=True)  # rows of both kinds: back in order
    return row, torch.cat([token, wide_token])[order], rho


def _cover_by_rank(p: Tensor, y: Tensor, tau: float, k: int, limit: int):
    """S_t of the rows p (n, V) that their k most probable tokens decide, at most `limit` tokens each. Consumes p.

    Returns (row, token), the pairs of the decided rows in order; rho_t (n,); decided (n,) bool.
    """
    V = p.shape[1]
    ids = p.topk(k).indices.sort(1).values  # topk promises no order among equals: order by id, then stably by p
    top, order = p.gather(1, ids).sort(dim=1, descending=True, stable=True)
    ids, rank = ids.gather(1, order), torch.arange(k, device=p.device)
    # K_t = min {K : p_(1) + ... + p_(K) >= tau}; k + 1 means "not among these k" (a CPU adds in order, CUDA by a scan)
    K = (1 + (top.cumsum(1, dtype=torch.float64) < tau).sum(1, keepdim=True)).clamp(max=limit)
    # decided, if the K_t-th token is here and none that is as probable as it can be missing
    decided = (K <= k) & ((k == V) | (top.gather(1, K.clamp(max=k) - 1) > top[:, -1:]))
    # S_t = the first K_t and y_t, which displaces the K_t-th only where the cap leaves no room
    has_gold = ((ids == y) & (rank < K)).any(1, keepdim=True)
    K = torch.where(has_gold, K, K.clamp(max=limit - 1))
    S = torch.cat([ids.masked_fill(rank >= K, V), y.masked_fill(has_gold, V)], 1)  # V: not in S_t
    S = S.masked_fill(~decided, V).sort(1).values
    row, column = (S < V).nonzero(as_tuple=True)
    token = S[row, column]
    # rho_t = sum of p_j over j not in S_t: summing what is outside keeps the digits of a small rho
    p[row, token] = 0
    return row, token, p.sum(1).float().clamp(max=1), decided[:, 0]


def _cover_by_histogram(p: Tensor, y: Tensor, tau: float):
    """The same at any K_t, for float32 rows p (n, V): the pairs (row, token) and rho_t (n,). Consumes p.

    A histogram finds the bin of probabilities in which tau is reached; only that one is sorted.
    """
    # the upper 16 bits of a non-negative float32 order it as the float does, 128 bins for each power of two
    highest = 0x3F80  # the bin of p = 1
    bins = (p.view(torch.int32) >> 16).long()
    mass = p.new_zeros(len(p), highest + 1, dtype=torch.float64).scatter_add_(1, bins, p.double())
    above = pad(mass.flip(1).cumsum(1), (1, 0))  # above[:, i]: the mass of the i highest bins
    i = (above[:, 1:] < tau).sum(1, keepdim=True)
    S, inside = bins > highest - i, bins == highest - i
    # the tokens of that bin, a row each, padded with -1 and ranked
    row, token = inside.nonzero(as_tuple=True)
    counts = inside.sum(1)
    column = torch.arange(len(row), device=p.device) - _offsets(counts)[row]
    candidates = p.new_full((len(p), int(counts.max())), -1.0)
    candidates[row, column] = p[row, token]
    top, order = candidates.sort(dim=1, descending=True, stable=True)
    sums = above.gather(1, i) + pad(top.cumsum(1, dtype=torch.float64), (1, 0))
    # added in another order than by rank: clear, if no sum is so near to tau that rounding may decide
    clear = ((sums - tau).abs() > p.shape[1] * 2.0**-51).all()
    needed = torch.zeros_like(candidates, dtype=torch.bool).scatter_(1, order, sums[:, :-1] < tau)
    S[row, token] = needed[row, column]
    S.scatter_(1, y, True)
    return *S.nonzero(as_tuple=True), p.masked_fill_(S, 0).sum(1).float().clamp(max=1), clear


# --------------------------------------------------------------------------------------------- fast paths: the logits

SAMPLED_ON = ("cpu", "cuda")  # the devices on which torch has sampled_addmm

with warnings.catch_warnings():  # torch warns once that CSR tensors are in beta: here that is known
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1))


def _gathered_logits(h: Tensor, W: Tensor, rows: Tensor, offsets: Tensor, ids: Tensor, tail_ids):
    """z (nnz,) and z_tail (N, M) by gathering: (nnz, d) memory, but any device, any dtype, any order of derivative."""
    with torch.autocast(h.device.type, enabled=False):
        return (h[rows] * W[ids]).sum(1), None if tail_ids is None else h @ W[tail_ids].t()


def _csr(offsets: Tensor, ids: Tensor, values: Tensor, size) -> Tensor:
    """The sparse matrix with these rows; `device` is given because a default device would override the values'."""
    return torch.sparse_csr_tensor(offsets, ids, values, size, device=values.device, check_invariants=False)


class _SampledLogits(torch.autograd.Function):
    """The same by `sampled_addmm`: nnz d multiplications, forward and backward, beside the tail's N M d.

    `sampled_addmm` has its own backward; this one does the same two products without its copies, in half the time, and
    adds the tail's part of dL/dW to that result in place, where autograd would make a second dense (V, d) gradient.
    """

    @staticmethod
    def forward(h, W, rows, offsets, ids, tail_ids):
        pattern = _csr(offsets, ids, h.new_zeros(len(ids)), (len(h), len(W)))
        with torch.autocast(h.device.type, enabled=False):
            # detached from the sparse tensor that it is a view of: torch.compile looks for strides there
            z = torch.sparse.sampled_addmm(pattern, h, W.t(), beta=0).values().detach()
            return z, None if tail_ids is None else h @ W[tail_ids].t()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        h, W, rows, offsets, ids, tail_ids = ctx.saved_tensors
        with torch.autocast(h.device.type, enabled=False):  # as in forward: the sparse products lack bfloat16
            if torch.is_grad_enabled():  # a second derivative is wanted: differentiate the plain formula
                forms = 1 if tail_ids is None else 2
                plain = lambda h, W: _gathered_logits(h, W, rows, offsets, ids, tail_ids)[:forms]
                return *torch.func.vjp(plain, h, W)[1](grads[:forms]), None, None, None, None
            G = _csr(offsets, ids, grads[0].contiguous(), (len(h), len(W)))
            # dL/dh = G W,   dL/dW = G' h,   with G the (N, V) sparse matrix of dL/dz; and the same with dL/dz_tail
            grad_h = G @ W if ctx.needs_input_grad[0] else None
            grad_W = G.t() @ h if ctx.needs_input_grad[1] else None
            if tail_ids is not None and grad_h is not None:
                grad_h.addmm_(grads[1], W[tail_ids])
            if tail_ids is not None and grad_W is not None:
                grad_W.index_add_(0, tail_ids, grads[1].t() @ h)
            return grad_h, grad_W, None, None, None, None


def _in_subset(token_ids: Tensor, record: ReplayRecord, rows: Tensor) -> Tensor:
    """(N, M) bool: is token_ids[j], (M,) ascending, in row t of the record? It does not wait for the device."""
    M, ids = len(token_ids), record.token_ids.long()
    column = torch.searchsorted(token_ids, ids).clamp(max=M - 1)
    found = torch.zeros(len(record), M + 1, dtype=torch.bool, device=ids.device)
    found[rows, torch.where(token_ids[column] == ids, column, M)] = True  # column M: those that are not there
    return found[:, :M]


# ------------------------------------------------------------------------------------------------------------- checks

def _require(*rules) -> None:
    """Raise ValueError for the first broken rule (ok, message), naming the first row t where ok[t] is false.

    Waits for the device once, however many rules there are.
    """
    if torch.stack([ok.all() for ok, _ in rules]).all():
        return
    ok, message = next((ok, message) for ok, message in rules if not ok.all())
    raise ValueError(f"{message} (row {int((~ok).nonzero()[0])})")


def _check_tau(tau: float) -> None:
    if not 0 < tau <= 1:
        raise ValueError(f"tau must lie in (0, 1], got {tau}")


def _check_vocab_size(vocab_size: int) -> None:
    if not 0 < vocab_size < 2**31:
        raise ValueError(f"vocab_size must lie in [1, 2**31), got {vocab_size}")


def _ascending(ids: Tensor) -> Tensor:
    """(n,) bool: is the entry larger than the one before it? True for the first."""
    return torch.cat([ids.new_ones(min(len(ids), 1), dtype=torch.bool), ids[1:] > ids[:-1]])


def _check_record(record: ReplayRecord) -> None:
    for name, dtype in DTYPES.items():
        x = getattr(record, name)
        if x.dtype != dtype or x.dim() != 1:
            raise ValueError(f"{name} must be one-dimensional {dtype}, got {x.dtype} of shape {tuple(x.shape)}")
    _check_tau(record.tau)
    _check_vocab_size(record.vocab_size)
    ids, offsets, rho = record.token_ids, record.offsets, record.outside_mass
    if len(offsets) != len(rho) + 1 or offsets[0] != 0 or offsets[-1] != len(ids):
        raise ValueError(f"offsets must hold {len(rho) + 1} entries from 0 to {len(ids)}")
    _require((offsets.diff() >= 0, "offsets must never decrease"),
             ((rho >= 0) & (rho <= 1), "outside_mass must lie in [0, 1]"))
    if len(ids) and not 0 <= int(ids.amin()) <= int(ids.amax()) < record.vocab_size:
        raise ValueError(f"token_ids must lie in [0, {record.vocab_size})")
    ascending = torch.cat([_ascending(ids), ids.new_ones(1, dtype=torch.bool)])
    ascending[offsets] = True  # the order starts anew where a row does
    if not ascending.all():
        row = int(torch.searchsorted(offsets, (~ascending).nonzero()[0], right=True)) - 1
        raise ValueError(f"token_ids must be ascending without duplicates (row {row})")


def _leave_inference_mode(record: ReplayRecord) -> None:
    """The losses save a record's tensors for backward, and autograd refuses those made in inference mode: copy them."""
    with torch.inference_mode(False):
        for name in DTYPES:
            if getattr(record, name).is_inference():
                object.__setattr__(record, name, getattr(record, name).clone())  # the record is frozen


def _check_positions(positions, record: ReplayRecord) -> Tensor:
    positions = torch.as_tensor(positions, device=record.offsets.device).flatten()
    if len(positions) and (positions.is_floating_point() or positions.dtype == torch.bool):
        raise ValueError(f"positions must be integers, got {positions.dtype}")
    positions = positions.long()
    _require(((positions >= 0) & (positions < len(record)), f"positions must lie in [0, {len(record)})"))
    return positions


def _check_stage0(logits: Tensor, target: Tensor, tau: float, max_size, ignore_index: int):
    """Logits (N, V) and target (N,), flattened and checked."""
    _check_tau(tau)
    if max_size is not None and max_size < 1:
        raise ValueError(f"max_size must be at least 1, got {max_size}")
    _check_shapes("logits", logits.shape[:-1], target)
    logits = _flat_logits(logits)
    return logits, _flat_target(target, logits.shape[1], ignore_index)


def _flat_target(target: Tensor, vocab_size: int, ignore_index: int, tail=None) -> Tensor:
    """(N,) int64; ValueError for an entry that is neither a token nor ignore_index, and for a bad tail."""
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(f"target must hold integers, got {target.dtype}")
    target = target.flatten().long()
    _require(((target == ignore_index) | ((target >= 0) & (target < vocab_size)),
              f"target must lie in [0, {vocab_size}) or be ignore_index={ignore_index}"),
             *(() if tail is None else _tail_rules(tail, vocab_size, target.device)))
    return target


def _tail_rules(tail: Tail, vocab_size: int, device) -> list:
    ids, weight = tail
    if ids.dtype != torch.int64 or ids.dim() != 1 or weight.shape != ids.shape or not weight.is_floating_point():
        raise ValueError("tail must hold token_ids (M,) int64 and log_weight (M,) floating point, got "
                         f"{ids.dtype} {tuple(ids.shape)} and {weight.dtype} {tuple(weight.shape)}")
    if not ids.device == weight.device == device:
        raise ValueError(f"tail must be on the target's device, {device}, got {ids.device} and {weight.device}")
    return [((ids >= 0) & (ids < vocab_size), f"tail.token_ids must lie in [0, {vocab_size})"),
            (_ascending(ids), "tail.token_ids must be ascending without duplicates"),
            (weight.isfinite(), "tail.log_weight must be finite")]


def _flat_logits(logits: Tensor) -> Tensor:
    """(N, V); ValueError for a row that is not finite."""
    if not logits.is_floating_point() or not logits.dim() or not logits.shape[-1]:
        raise ValueError(f"logits must be floating point of shape (..., V), got {logits.dtype} {tuple(logits.shape)}")
    logits = logits.reshape(-1, logits.shape[-1])
    ok = logits.detach().sum(1).isfinite()  # fast; but finite terms can have an infinite sum, so look closer there
    _require((ok.index_put((~ok,), logits[~ok].isfinite().all(1)), "logits must be finite"))
    return logits


def _check_finite(z: Tensor, z_tail, rows: Tensor) -> None:
    """ValueError for a position of which a computed logit, z (nnz,) or z_tail (N, M), is not finite."""
    finite, tails = z.detach().isfinite(), z.new_zeros(1, 0) if z_tail is None else z_tail.detach()
    if not (finite.all() & tails.sum(1).isfinite().all()):  # one wait; then, as above, look closer
        bad = torch.cat([rows[~finite], (~tails.isfinite().all(1)).nonzero()[:, 0]])
        if len(bad):
            raise ValueError(f"input @ linear_weight.T + linear_bias must be finite (row {int(bad.min())})")


def _check_linear(input: Tensor, linear_weight: Tensor, linear_bias, target: Tensor) -> None:
    if not input.dim():
        raise ValueError("input must have shape (..., d), got a number")
    for name, x in (("input", input), ("linear_weight", linear_weight)):
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
    _check_shapes("input", input.shape[:-1], target)
    if linear_weight.dim() != 2 or input.shape[-1:] != linear_weight.shape[1:]:
        raise ValueError(f"linear_weight must have shape (V, {input.shape[-1]}), got {tuple(linear_weight.shape)}")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise ValueError(f"linear_bias must have shape ({len(linear_weight)},), got {tuple(linear_bias.shape)}")


def _check_fit(name: str, N: int, V: int, record: ReplayRecord) -> None:
    if (N, V) != (len(record), record.vocab_size):
        raise ValueError(f"{name} of N = {N} positions and V = {V} tokens does not fit the record "
                         f"of N = {len(record)} and V = {record.vocab_size}")


def _check_shapes(name: str, leading, target: Tensor) -> None:
    if tuple(leading) != tuple(target.shape):
        raise ValueError(f"{name} of leading shape {tuple(leading)} does not fit target of shape {tuple(target.shape)}")


# ------------------------------------------------------------------------------------------------ joining and the file

DTYPES = {"token_ids": torch.int32, "offsets": torch.int64, "outside_mass": torch.float32}


def _concat(records: list) -> ReplayRecord:
    if not records:
        raise ValueError("records must hold at least one record")
    first = records[0]
    for i, record in enumerate(records):
        if (record.vocab_size, record.tau) != (first.vocab_size, first.tau):
            raise ValueError(f"records[{i}] has vocab_size {record.vocab_size} and tau {record.tau}, "
                             f"records[0] has {first.vocab_size} and {first.tau}")
    token_ids, sizes, outside_mass = (torch.cat([getattr(r, name) for r in records])
                                      for name in ("token_ids", "subset_sizes", "outside_mass"))
    return ReplayRecord(token_ids, _offsets(sizes), outside_mass, first.vocab_size, first.tau)


def _save(record: ReplayRecord, path) -> None:
    temporary = f"{os.fsdecode(path)}.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            np.savez(file, vocab_size=record.vocab_size, tau=record.tau,
                     **{name: getattr(record, name).numpy(force=True) for name in DTYPES})
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _load(path) -> ReplayRecord:
    with open(path, "rb") as file:
        try:
            arrays = {}
            with zipfile.ZipFile(file) as archive:
                for field in fields(ReplayRecord):
                    # zipfile compares the CRC at a member's end; a damaged header that stops earlier breaks a rule
                    with archive.open(field.name + ".npy") as member:
                        arrays[field.name] = np.lib.format.read_array(member, allow_pickle=False)
            tensors = {name: torch.from_numpy(arrays[name]) for name in DTYPES}
            return ReplayRecord(**tensors, vocab_size=int(arrays["vocab_size"]), tau=float(arrays["tau"]))
        except Exception as error:  # zipfile and numpy raise a dozen types on damaged input
            raise ValueError(f"{path} is not a complete, undamaged record: {error}") from error
