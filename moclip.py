r"""MoClip: Adam-atan2 whose gradient may not turn further than max_angle away from the momentum.

The optimizer of *Logits Replay + MoClip* (Qiu, Li, Zhou, Huang, Qiu, Sun; arXiv:2510.09152), in three pieces:
`angle_between` (how far), `clip_angle` (the cap, a rotation), `MoClip` (the cap inside Adam-atan2). Angles are radians.
THEORY.md proves what that guarantees (M1 to M11) and lists what is chosen where the paper's summary is silent.

    symbol   code                  meaning
    g        grad                  gradient of this step
    m, v     exp_avg, exp_avg_sq   first moment (the momentum) and second moment, as in torch.optim.Adam
    theta    last_angle            angle between g and the momentum BEFORE this step, in [0, pi]
    Delta    max_angle             the cap on theta
    g~       rotated               g, rotated to the cap where theta exceeds it
    w, t     p, step               a parameter, and the number of steps that it has taken

     g   . - - >   g~        theta, the angle from m to g, exceeds Delta: g turns towards m, in their plane,
      \           /          until its angle is Delta. |g~| = |g|: rotated, not shortened.
       \         /           theta <= Delta or m = 0: g~ = g.
        \       / Delta      theta > Delta and g opposite to m: they span no plane;
         +-----------> m     g~ = g, and m restarts at zero.
"""

import math

import torch
from torch import Tensor


def angle_between(u: Tensor, v: Tensor) -> Tensor:
    """Angle between two tensors of one shape, read as vectors: a 0-dim tensor, radians in [0, pi].

        theta = atan2(|u - c v|, c |v|),   c = <u, v> / <v, v>

    Accurate also near 0 and pi, where arccos loses half of the digits; 0 if a vector is zero, as nothing is there to
    turn away from. Raises ValueError for unequal shapes and for tensors that are not real floating point.
    """
    (u, v), _ = _scaled(u=u, v=v)  # each divided by its largest |entry|, so that no square leaves the dtype's range
    theta, *_ = _rotation([u], [v])
    return theta.to(torch.promote_types(u.dtype, v.dtype))


def clip_angle(grad: Tensor, momentum: Tensor, max_angle: float) -> Tensor:
    """Rotate `grad` towards `momentum` until the angle between them is at most `max_angle` (radians in [0, pi]).

        g~ = g                                       if theta <= Delta or m = 0
           = g, and `MoClip` restarts m at zero      if antiparallel: theta > max(Delta, pi/2), sin(theta) <= sqrt(eps)
           = |g| (cos(Delta) m/|m| + sin(Delta) n)   otherwise, n = unit vector of g - <g, m/|m|> m/|m|

    eps is float32's, so that theta is within 3.5e-4 of pi, and float64's if both are float64: antiparallel vectors span
    no plane. Keeps the shape, norm and dtype of `grad` and stays in the plane of both (THEORY.md M1, M2). The formula
    is this project's reading of "caps gradient-momentum rotation" in the paper's abstract. Bad input is a ValueError.

    >>> g, m = torch.tensor([0.0, 2.0]), torch.tensor([3.0, 0.0])
    >>> angle_between(g, m), clip_angle(g, m, math.pi / 6)       # pi/2; then 2 (cos 30 degrees, sin 30 degrees)
    (tensor(1.5708), tensor([1.7321, 1.0000]))
    """
    (g, m), (scale, _) = _scaled(grad=grad, momentum=momentum)
    _require(0 <= max_angle <= math.pi, "max_angle must lie in [0, pi] radians", max_angle)
    _, A, B, _ = _rotation([g], [m], max_angle)
    return (A * _wide(grad) + B * scale * m).to(grad.dtype)


def _rotation(grads, momenta, max_angle=math.pi, group=None):
    """(theta, A, B, keep), 0-dim, of g and m in pieces: lists of tensors, grads[k] shaped as momenta[k].
    theta is their angle, but 0 where |g|^2 or |m|^2 is no normal number of the dtype (1e-38 to 1e38 for float32), as v
    is none there either, and NaN where <g, m> overflows. `clip_angle` is A g + B m; keep is 0 at a restart, else 1.
    """
    # `_total` adds up the pieces, in float64; `sum` works in pairs, torch's float32 dot of 10^8 entries is percents off
    gm = _total(((g * m).sum() for g, m in zip(grads, momenta)), group)
    mm = _total(((m * m).sum() for m in momenta), group)
    along = gm / mm  # g = along m + rest, rest orthogonal to m
    rest_squared = _total((g.addcmul(m, along, value=-1).square_().sum() for g, m in zip(grads, momenta)), group)
    across = rest_squared / mm  # |rest|^2 in units of |m|^2, as along is <g, m> in the same units
    ratio = (across + along * along).sqrt()  # |g|/|m|
    # m = 0 gives 0/0; a tiny vector's squares lose their digits, and then its part across m; the coarsest dtype decides
    single = any(x.dtype == torch.float32 for x in (*grads, *momenta))  # of the arithmetic, not p.grad's bfloat16
    finfo = torch.finfo(torch.float32 if single else torch.float64)
    ratio = torch.where(ratio.isfinite() & (mm >= finfo.tiny) & (ratio * ratio * mm >= finfo.tiny), ratio, 0)
    # gm - gm is 0, or NaN if g or m is not finite: a bad gradient stays visible
    theta = torch.where(ratio > 0, torch.atan2(across.sqrt(), along), gm - gm)
    clipped = theta > max_angle
    # sin(theta) <= sqrt(eps): of n's digits less than half survive the subtraction g - <g, m/|m|> m/|m|
    antiparallel = clipped & (theta > math.pi / 2) & (theta.sin() <= math.sqrt(finfo.eps))
    turned = clipped & ~antiparallel
    # spherical interpolation: g~/|g| = (sin(Delta) g/|g| + sin(theta - Delta) m/|m|) / sin(theta)
    A = torch.where(turned, math.sin(max_angle) / theta.sin(), 1)
    B = torch.where(turned, (theta - max_angle).sin() / theta.sin() * ratio, 0)
    return theta, A, B, (~antiparallel).to(theta.dtype)


def _wide(x: Tensor) -> Tensor:  # float16 and bfloat16 are too coarse for moments and angles
    return x.to(torch.promote_types(x.dtype, torch.float32))


class MoClip(torch.optim.Optimizer):
    """Momentum-clipped Adam-atan2: a cap on the gradient's angle, arctan2 in place of Adam's division.

        theta = angle(g, m)                                               # m is the momentum BEFORE this step
        g~    = clip_angle(g, m, Delta)                                   # m = 0 first, if clipped and antiparallel
        m     = beta1 m + (1 - beta1) g~
        v     = beta2 v + (1 - beta2) g~^2
        w     = (1 - lr weight_decay) w - lr a atan2(m / (1 - beta1^t), b sqrt(v / (1 - beta2^t)))

    All but the first two lines is Adam-atan2 (Everett et al., arXiv:2407.05872, section 4.3). With a = 4/pi and b = 1 a
    step with m = sqrt(v) is exactly lr, as in Adam, and no coordinate moves by more than lr a pi/2 = 2 lr, decay apart
    (M4). No epsilon is needed, as atan2(0, 0) = 0, so scaling the loss changes nothing (M5); what goes with it: R10(e).

    lr: >= 0, a number or 0-dim tensor.   betas: (beta1, beta2), each in [0, 1).   a, b: > 0.   weight_decay: >= 0.
    max_angle: radians in [0, pi]; pi is no cap. Below pi/2, -g~ can point uphill and noise adds up in m (M7, M8).
    scope: "global" takes one angle over all parameters that have a gradient, the literal reading of the paper's vector
        notation, "tensor" one per parameter (M10). Groups may differ in all but scope, and in "global" max_angle.
    shard_group: process group over which "global" takes its angle where processes step different parameters: FSDP1,
        ZeroRedundancyOptimizer. Without it each silently takes its own. DDP and DTensors need none.

    State: `step`, `exp_avg`, `exp_avg_sq`, float32 at least, as AdamW's, whose state dict can be loaded. A step never
    waits for the device; then `last_angle` and `last_clipped` are theta and theta > Delta: 0-dim for "global", an entry
    per parameter with a gradient for "tensor". If none has one they stay, at first 0 and False; with a shard_group they
    are 0 and False. A NaN or infinite gradient stays in m and v, and from then on `last_angle` is NaN and nothing of
    its scope is capped: skip such a step. ValueError for bad options or state, complex parameters, sparse gradients.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), *, max_angle=math.pi / 2,
                 a=4 / math.pi, b=1.0, weight_decay=0.0, scope="global", shard_group=None):
        self.shard_group = shard_group
        self._last = {"angle": torch.zeros(()), "clipped": torch.zeros((), dtype=torch.bool)}
        super().__init__(params, dict(lr=lr, betas=betas, max_angle=max_angle, a=a, b=b,
                                      weight_decay=weight_decay, scope=scope))

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        entries = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for _, p in entries:
            _require(not p.grad.is_sparse, "gradients must be dense", "a sparse one")
            if not self.state[p]:
                self.state[p] = {"step": torch.tensor(0.0, dtype=torch.float32, device="cpu"),
                                 "exp_avg": torch.zeros_like(_wide(p)), "exp_avg_sq": torch.zeros_like(_wide(p))}
        if self.param_groups[0]["scope"] == "tensor":
            reports = [self._step_scope([entry], entry[0]["max_angle"]) for entry in entries]
            if reports:
                self._last["angle"], self._last["clipped"] = map(torch.stack, zip(*reports))
        elif entries or self.shard_group is not None:  # the other processes wait for this one's part, though empty
            self._last["angle"], self._last["clipped"] = self._step_scope(entries, self.param_groups[0]["max_angle"])
        return loss

    def _step_scope(self, entries, max_angle):
        """Step the (group, parameter) pairs that share one angle; gradients stay. Returns (theta, clipped), 0-dim."""
        device = next((p.device for group in self.param_groups for p in group["params"]), None)
        grads = [_wide(p.grad) for _, p in entries] or [torch.zeros(0, dtype=torch.float32, device=device)]
        momenta = [self.state[p]["exp_avg"] for _, p in entries] or grads
        theta, A, B, keep = _rotation(grads, momenta, max_angle, self.shard_group)
        for (group, p), g, m in zip(entries, grads, momenta):
            (beta1, beta2), lr, a, b = group["betas"], group["lr"], group["a"], group["b"]
            v, step = self.state[p]["exp_avg_sq"], self.state[p]["step"]
            step += 1
            # g~ = A g + B m; unclipped A = 1 and B = 0, so g passes unchanged to the last bit
            rotated = (g * A).addcmul_(m, B)
            # m = beta1 m + (1 - beta1) g~, from m = 0 where the plane of the rotation is undefined
            m.mul_(beta1 * keep).add_(rotated, alpha=1 - beta1)
            # v = beta2 v + (1 - beta2) g~^2
            v.mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
            # w = (1 - lr weight_decay) w - lr a atan2(m / c1, b sqrt(v / c2)),   c1 = 1 - beta1^t,   c2 = 1 - beta2^t
            c1, c2 = (1 - beta**step.double() for beta in (beta1, beta2))  # 1 - 0.999^t loses 4 digits in float32
            # atan2(m / c1, y) = atan2(m, c1 y), c1 y = sqrt(v (c1 b)^2 / c2); rotated, denominator, update: one buffer
            denominator = torch.mul(v, (c1 * b)**2 / c2, out=rotated).sqrt_()
            update = torch.atan2(m, denominator, out=denominator).mul_(lr * a)
            if group["weight_decay"]:
                update += lr * group["weight_decay"] * _wide(p)
            p -= update
        return theta, theta > max_angle

    # -------------------------------------------------------------------------------------- a learner may stop here
    # Below: reports (in a dict: torch.compile drops attributes that a compiled step assigns), copies, loading, checks.

    last_angle = property(lambda self: self._last["angle"])
    last_clipped = property(lambda self: self._last["clipped"])

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups.pop()  # stays out if it is refused
        _check_group(group, (self.param_groups or [group])[0], self.shard_group)
        self.param_groups.append(group)

    def load_state_dict(self, state_dict):  # or AdamW's; the way back: AdamW's own "param_groups" put into MoClip's
        def own(p, name, saved):  # p's copy; torch, which would cast it to p's dtype, is given this function instead
            for key in "step", "exp_avg", "exp_avg_sq":
                good = key in saved and (key == "step" or saved[key].shape == p.shape)
                _require(good, f"state of parameter {name!r} must have {key!r}, of its shape", sorted(saved))
            move = lambda x: x.to(p.device, torch.promote_types(p.dtype, torch.float32), copy=True)
            return saved | {"step": torch.tensor(float(saved["step"]), dtype=torch.float32, device="cpu"),
                            "exp_avg": move(saved["exp_avg"]), "exp_avg_sq": move(saved["exp_avg_sq"])}
        hide = lambda _, saved: saved | {"state": {
            name: lambda p, x=(name, entry): own(p, *x) for name, entry in saved["state"].items() if entry}}
        with self.register_load_state_dict_pre_hook(hide):
            super().load_state_dict(state_dict)

    def __setstate__(self, state):  # where torch's load_state_dict ends: if this raises, nothing has changed
        for i, own in enumerate(getattr(self, "param_groups", [])):
            state["param_groups"][i] = own | state["param_groups"][i]  # options that AdamW's lacks stay
            _check_group(state["param_groups"][i], state["param_groups"][0], self.shard_group)
        state["state"].update({p: entry(p) for p, entry in state["state"].items() if callable(entry)})
        super().__setstate__(state)

    def __getstate__(self):  # for copies and pickles, which a process group refuses
        return super().__getstate__() | {"_last": self._last, "shard_group": self.shard_group}


def _require(holds, rule, value):
    if not holds:
        raise ValueError(f"{rule}, got {value}")


def _total(terms, group) -> Tensor:
    """The sum of 0-dim tensors, also over the processes of `group`, as float64: ratios of squares leave float32."""
    # group: for parameters of one dtype; ZeroRedundancyOptimizer takes functools.partial(MoClip, shard_group=group)
    sums = {}  # DTensors add up within their mesh before they meet others
    for term in terms:
        mesh = getattr(term, "device_mesh", None)
        sums[mesh] = sums[mesh] + term if mesh in sums else term
    total = sum(term if mesh is None else term.full_tensor() for mesh, term in sums.items())
    total = total if total.device.type == "mps" else total.double()  # MPS has no float64
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
    return total


def _scaled(**pair):  # so that entries of 1e-30 or 1e30 have squares in float32
    shapes = [tuple(x.shape) for x in pair.values()]
    _require(shapes[0] == shapes[1], f"{' and '.join(pair)} must have the same shape", shapes)
    for name, x in pair.items():
        _require(x.is_floating_point(), f"{name} must be a real floating-point tensor", x.dtype)
    wide = [_wide(x) for x in pair.values()]
    largest = [x.abs().amax() if x.numel() else x.new_zeros(()) for x in wide]
    scales = [torch.where((x > 0) & x.isfinite(), x, 1) for x in largest]
    return [x / scale for x, scale in zip(wide, scales)], scales


def _check_group(group, first, shard_group):
    betas, scope, cap = group["betas"], group["scope"], group["max_angle"]
    for name, x in ("lr", group["lr"]), ("weight_decay", group["weight_decay"]):
        _require(getattr(x, "ndim", 0) == 0 and 0 <= x < math.inf, f"{name} must be one finite number >= 0", x)
    for name in "a", "b":
        _require(0 < group[name] < math.inf, f"{name} must be finite and > 0", group[name])
    _require(len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "betas must be two numbers in [0, 1)", betas)
    _require(scope == first["scope"] in ("global", "tensor"), 'scope must be one for all, "global" or "tensor"', scope)
    _require(scope == "global" or shard_group is None, 'scope must be "global" with a shard_group', scope)
    _require(0 <= cap <= math.pi, "max_angle must lie in [0, pi] radians", cap)
    _require(scope == "tensor" or cap == first["max_angle"], 'max_angle must be one for all if scope="global"', cap)
    _require(not group.get("maximize"), "maximize must be False", True)
    _require(not any(p.is_complex() for p in group["params"]), "params must be real", "a complex parameter")
