"""What would one use instead of the anchor, and how well does it do? The arms beside train_small.py's eight methods.

README's sentences about rivals rest on them: LoRA, L2-SP, a larger eps, a KL to the live base, text mixed in, and the
base's own text as plain tokens. Each is a function of `c`, a namespace with the model, the base (frozen), data, record,
anchor, text, args, method and generator of a run; it returns (score, optimizer) as `train_small.finetune` takes them,
None for the method's own. All losses are in mean nats a position.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import train_small as script
from logits_replay import ReplayRecord, linear_replay_cross_entropy, sample_tail

ON_TEXT = ("KL to base", "own tokens")  # they read the windows of the anchor's text, and need no record of them
UNRECORDED = ("full softmax", "gold only", "gold only, anchor")  # they need no record of the domain


def own(c):
    """The method's own loss."""
    return script.scorer(c.method, c.record, c.args, c.generator, c.model, c.anchor)


def drawn(c):
    """The numbers of this step's windows, as the anchor draws them."""
    return torch.randperm(len(c.text), generator=c.generator, device=c.generator.device)[:c.args.anchor_step]


class LowRank(nn.Module):
    """W + B A, W frozen, B (out, rank) zero at first: LoRA (arXiv:2106.09685) with alpha = rank, so a scaling of 1."""

    def __init__(self, weight, rank, generator):
        super().__init__()
        self.A = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.B = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.A, a=5**0.5, generator=generator)  # as nn.Linear

    def forward(self, weight):
        return weight + self.B @ self.A


def lora(rank):
    """Only the low-rank parts of the linear layers learn; the tied embedding, norms and biases stay the base's."""
    def build(c):
        c.model.requires_grad_(False)
        linear = [module for module in c.model.modules()
                  if isinstance(module, nn.Linear) and module.weight is not c.model.embedding.weight]
        for module in linear:
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank, c.generator))
        learning = [p for p in c.model.parameters() if p.requires_grad]
        return None, script.make_optimizer(c.method, learning, c.args)
    return build


def l2_sp(strength):
    """L + strength / 2 |w - w0|^2, over all weights, w0 the base's: L2-SP (arXiv:1802.01483)."""
    def build(c):
        score, pairs = own(c), list(zip(c.model.parameters(), c.base.parameters()))

        def pulled(*inputs):
            return score(*inputs) + strength / 2 * sum((w - w0.detach()).square().sum() for w, w0 in pairs)
        return pulled, None
    return build


def large_eps(c):
    """AdamW with eps = 1e-4 (default 1e-8): it takes the normalization off coordinates with gradients below it."""
    return None, torch.optim.AdamW(c.model.parameters(), c.args.lr, eps=1e-4, weight_decay=0.0)


def beside(c, loss, extra):
    """L + weight * extra(head)."""
    return lambda hidden, head, *inputs: loss(hidden, head, *inputs) + c.args.anchor_weight * extra(head), None


def kl_to_base(c):
    """L + weight * KL(base, model) on the anchor's windows: both softmaxes dense, the base runs at every step."""
    def kl(head):
        tokens = c.text[drawn(c), :-1].to(head.device)
        with torch.no_grad():
            said = (c.base(tokens) @ c.base.embedding.weight.T).log_softmax(-1).flatten(0, 1)
        says = (c.model(tokens) @ head.T).log_softmax(-1).flatten(0, 1)
        return F.kl_div(says, said, reduction="batchmean", log_target=True)
    return beside(c, own(c), kl)


def plain(c, head, text):
    """Cross-entropy on all tokens of the text (B, T + 1)."""
    text = text.to(head.device)
    return F.linear_cross_entropy(c.model(text[:, :-1]).flatten(0, 1), head, text[:, 1:].flatten())


def own_tokens(c):
    """L + weight * (cross-entropy on the windows' tokens, without their logits). Its expected gradient is the KL's."""
    return beside(c, own(c), lambda head: plain(c, head, c.text[drawn(c)]))


def mixed(c):
    """New windows of what the base was pretrained on, prose and SQL in turn, as further examples of the batch."""
    score, T = own(c), c.data.context
    windows = script.batches(c.data.streams[:2], dict(batch=c.args.anchor_step, seed=c.args.seed), T)

    def with_text(hidden, head, *inputs):
        text = next(windows)
        share = T * len(text) / (T * len(text) + len(hidden))  # of the positions of the step
        return (1 - share) * score(hidden, head, *inputs) + share * plain(c, head, text)
    return with_text, None


def gold_only(c):
    """The tail with nothing recorded, S_t = {y_t}: plain sampled softmax, no Stage 0."""
    def score(hidden, head, gold, rows):
        N = len(gold)
        record = ReplayRecord(gold.int(), torch.arange(N + 1, device=gold.device), hidden.new_zeros(N), len(head), 1.0)
        tail = sample_tail(gold, len(head), c.args.tail, generator=c.generator)
        return linear_replay_cross_entropy(hidden, head, gold, record, tail=tail)
    return score


def with_anchor(loss):
    """The anchor beside another loss than the tail's, which needs no record of the domain."""
    def build(c):
        T = c.anchor.tokens.shape[1]

        def said(head):
            w = drawn(c)
            record = c.anchor.record.select(T * w[:, None] + torch.arange(T, device=w.device))
            return script.linear_replay_kl_div(c.model(c.anchor.tokens[w]).flatten(0, 1), head, record)
        return beside(c, loss(c), said)
    return build


VARIANTS = {"": lambda c: (None, None),  # name -> function of `c`; "" is the method itself
            **{f"LoRA {rank}": lora(rank) for rank in (8, 32)},
            **{f"L2-SP {strength:g}": l2_sp(strength) for strength in (1e-3, 1e-2, 3e-2)},
            "eps 0.0001": large_eps, "KL to base": kl_to_base, "own tokens": own_tokens, "mixed": mixed,
            "full softmax": with_anchor(lambda c: script.scorer("full", None, c.args, None)),
            "gold only": lambda c: (gold_only(c), None), "gold only, anchor": with_anchor(gold_only)}
