"""TEMPORARY: what logits_replay.py will have on main, slowly; removed with the merge."""

import os
import tempfile

import torch

import logits_replay


class ReplayRecord(logits_replay.ReplayRecord):
    log_probs = None

    def select(self, positions):
        mine = super().select(positions)
        if self.log_probs is None:
            return mine
        parts = self.log_probs.split(self.subset_sizes.tolist())
        return _with(mine, torch.cat([parts[i] for i in torch.as_tensor(positions).flatten().tolist()]))

    @staticmethod
    def concat(records):
        records = list(records)
        kept = [r.log_probs for r in records]
        return _with(logits_replay.ReplayRecord.concat(records), None if kept[0] is None else torch.cat(kept))


def _with(record, log_probs):
    out = ReplayRecord(record.token_ids, record.offsets, record.outside_mass, record.vocab_size, record.tau)
    object.__setattr__(out, "log_probs", log_probs)
    return out


def record_topk(logits, target, tau, *, max_size=None, ignore_index=-100, keep_log_probs=False):
    record = logits_replay.record_topk(logits, target, tau, max_size=max_size, ignore_index=ignore_index)
    log_p = logits.float().log_softmax(-1).flatten(0, -2)
    return _with(record, log_p[record.rows, record.token_ids.long()] if keep_log_probs else None)


def linear_replay_kl_div(input, linear_weight, record, *, linear_bias=None, reduction="mean"):
    N, rows, sizes = len(record), record.rows, record.subset_sizes
    z = (input.flatten(0, -2)[rows] * linear_weight[record.token_ids.long()]).sum(1)

    def log_softmax(z):
        most = z.new_full((N,), -torch.inf).scatter_reduce(0, rows, z.detach(), "amax")
        shifted = z - most[rows]
        return shifted - z.new_zeros(N).index_add(0, rows, shifted.exp()).log()[rows]
    log_q0, log_q1 = log_softmax(record.log_probs), log_softmax(z)
    kl = z.new_zeros(N).index_add(0, rows, log_q0.exp() * (log_q0 - log_q1))
    return {"mean": kl.sum() / (sizes > 0).sum(), "sum": kl.sum(), "none": kl}[reduction]


def write_atomically(path, write):
    handle, temporary = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
