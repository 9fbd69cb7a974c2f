r"""MoClip: Adam-atan2 whose gradient may not turn further than max_angle away from the momentum.

The optimizer of *Logits Replay + MoClip* (Qiu, Li, Zhou, Huang, Qiu, Sun; arXiv:2510.09152), in three pieces:
`angle_between` (how far), `clip_angle` (the cap, a rotation), `MoClip` (the cap inside Adam-atan2). Angles are radians.

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

README.md lists what is chosen where the paper's summary is silent, THEORY.md (M1 to M11) what that guarantees.
"""

import math

import torch
from torch import Tensor


def angle_between(u: Tensor, v: Tensor) -> Tensor:
    """Angle between two tensors of one shape, read as vectors: a 0-dim tensor, radians in [0, pi].

        theta = atan2(|u - c v|, c |v|),   c = <u, v> / <v, v>

    Accurate also near 0 and pi, where arccos loses half of the digits; 0 if a vector is zero, as nothing is there to
    turn away from. Raises ValueError for unequal shapes and for tensors that are not real floating point.

    >>> round(math.degrees(angle_between(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]))), 4)
    45.0
    """
    _check_pair(u=u, v=v)
    u, v = _wide(u), _wide(v)
    theta, *_ = _rotation([u / _largest(u)], [v / _largest(v)])
    return theta.to(torch.promote_types(u.dtype, v.dtype))


def clip_angle(grad: Tensor, momentum: Tensor, max_angle: float) -> Tensor:
    """Rotate `grad` towards `momentum` until the angle between them is at most `max_angle` (radians in [0, pi]).

        g~ = g                                              if theta <= Delta or m = 0
           = |g| (cos(Delta) m/|m| + sin(Delta) n)          otherwise, n = unit vector of g - <g, m/|m|> m/|m|

    Keeps the shape, norm and dtype of `grad` and stays in the plane of both (THEORY.md M1, M2). Antiparallel vectors
    span no plane: `grad` is returned as it is, and `MoClip` restarts the momentum at zero. The formula is this
    project's reading of "caps gradient-momentum rotation" (arXiv:2510.09152, abstract). Raises ValueError for unequal
    shapes, non-real dtypes and max_angle outside [0, pi].

    >>> clip_angle(torch.tensor([0.0, 2.0]), torch.tensor([3.0, 0.0]), math.pi / 6)      # 2 (cos 30, sin 30 degrees)
    tensor([1.7321, 1.0000])
    """
    _check_pair(grad=grad, momentum=momentum)
    _require(0 <= max_angle <= math.pi, "max_angle must lie in [0, pi] radians", max_angle)
    g, m = _wide(grad), _wide(momentum)
    m = m / _largest(m)
    _, A, B, _ = _rotation([g / _largest(g)], [m], max_angle)
    return (A * g + B * _largest(g) * m).to(grad.dtype)


def _rotation(grads, momenta, max_angle=math.pi, group=None):
    """(theta, A, B, keep), 0-dim, of g and m in pieces: lists of tensors, grads[k] shaped as momenta[k].

    `angle_between` is theta, but 0 where the square of g or m is not a normal number of the dtype (1e-38 to 1e38 for
    float32): there v = g^2 is lost, too. `clip_angle` is A g + B m; keep is 0 where the momentum restarts, else 1.
    """
    # `sum` adds in pairs; torch's float32 dot products and norms of 10^8 entries are off by percents
    gm = _total(((g * m).sum() for g, m in zip(grads, momenta)), group)
    mm = _total(((m * m).sum() for m in momenta), group)
    along = gm / mm  # g = along m + rest, rest orthogonal to m
    rest_squared = _total((g.addcmul(m, along, value=-1).square_().sum() for g, m in zip(grads, momenta)), group)
    across = rest_squared / mm  # |rest|^2 in units of |m|^2, as along is <g, m> in the same units
    ratio = (across + along * along).sqrt()  # |g|/|m|
    # m = 0 gives 0/0; the squares of a tiny vector lose their digits, and then its part across m, or all of it
    single = any(x.dtype == torch.float32 for x in (*grads, *momenta))  # the coarsest dtype of the arithmetic decides
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


def _total(terms, group) -> Tensor:
    """The sum of 0-dim tensors, also over the processes of `group`, as float64: ratios of squares leave float32."""
    sums = {}  # DTensors add up within their mesh before they meet others
    for term in terms:
        mesh = getattr(term, "device_mesh", None)
        sums[mesh] = sums[mesh] + term if mesh in sums else term
    total = sum(term if mesh is None else term.full_tensor() for mesh, term in sums.items())
    total = total if total.device.type == "mps" else total.double()  # MPS has no float64
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
    return total


def _wide(x: Tensor) -> Tensor:
    """In float32 at least: the arithmetic of float16 and bfloat16 is too coarse for moments and angles."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class MoClip(torch.optim.Optimizer):
    """Momentum-clipped Adam-atan2: a cap on the gradient's angle, arctan2 in place of Adam's division.

        theta = angle(g, m)                                               # m is the momentum BEFORE this step
        g~    = clip_angle(g, m, Delta)                                   # m = 0 first, if clipped and antiparallel
        m     = beta1 m + (1 - beta1) g~
        v     = beta2 v + (1 - beta2) g~^2
        w     = (1 - lr weight_decay) w - lr a atan2(m / (1 - beta1^t), b sqrt(v / (1 - beta2^t)))

    All but the first two lines is Adam-atan2 (Everett et al., arXiv:2407.05872, section 4.3). With a = 4/pi, b = 1 a
    step with m = sqrt(v) is exactly lr, as in Adam, and no coordinate moves by more than lr a pi/2 = 2 lr, decay apart
    (M4). atan2(0, 0) = 0, so no epsilon is needed, and without it scaling the loss by a constant changes nothing (M5);
    what a large epsilon does and this cannot do: R10(e).

    lr: step size, >= 0, a number or a 0-dim tensor.   betas: (beta1, beta2), decay of m and v, each in [0, 1).
    max_angle: the cap in radians, in [0, pi]; pi turns it off (Adam-atan2). Below pi/2 a step along -g~ can go uphill
        and momentum feeds on noise (M7, M8): hence the default.
    a, b: > 0, output and input scale of atan2.   weight_decay: decoupled, >= 0.
    scope: "global" takes one angle over all parameters that have a gradient, the literal reading of the paper's vector
        notation; "tensor" takes one per parameter. A cap kept in one need not be in the other (M10).
    Parameter groups may differ in all of these but scope, and where that is "global" max_angle.
    shard_group: the torch.distributed process group over which "global" takes its angle, if its processes step
        different parameters (of one dtype): FSDP1, pipelines, or ZeroRedundancyOptimizer with
        optimizer_class=functools.partial(MoClip, shard_group=group). Without it each silently takes an angle of its
        own, as "tensor" does for a shard of a tensor under FSDP1. DDP and DTensors (FSDP2, tensor parallel) need none.

    State of a parameter: `step`, `exp_avg`, `exp_avg_sq`, float32 at least, with AdamW's meaning: AdamW's state dict can
    be loaded (options that it lacks stay); for the way back, put AdamW's own "param_groups" into MoClip's. `step()`
    never waits for the device; then `last_angle` and `last_clipped` are theta and theta > Delta: 0-dim for "global", an
    entry per parameter with a gradient for "tensor". A NaN or infinite gradient stays in m and v, as in Adam, and from
    then on `last_angle` is NaN and nothing of its scope is capped: skip such a step, as torch's GradScaler does.
    Raises ValueError for bad options and state and for complex parameters, RuntimeError for sparse gradients.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), *, max_angle=math.pi / 2,
                 a=4 / math.pi, b=1.0, weight_decay=0.0, scope="global", shard_group=None):
        self.shard_group = shard_group
        self._last = {"angle": torch.zeros(()), "clipped": torch.zeros((), dtype=torch.bool)}
        super().__init__(params, dict(lr=lr, betas=betas, max_angle=max_angle, a=a, b=b,
                                      weight_decay=weight_decay, scope=scope))

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; `closure`, if given, recomputes and returns the loss, as for every torch optimizer."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        entries = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for _, p in entries:
            if p.grad.is_sparse:
                raise RuntimeError("MoClip does not support sparse gradients")
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
            t = step.double()  # in float32, 1 - 0.999^t would lose four digits
            c1, c2 = 1 - beta1**t, 1 - beta2**t
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

    def load_state_dict(self, state_dict):
        # torch casts tensors to the parameter's dtype: after all other pre-hooks, hand it functions instead
        hide = lambda _, saved: saved | {"state": {
            name: lambda p, x=(name, entry): _own_state(p, *x) for name, entry in saved["state"].items() if entry}}
        with self.register_load_state_dict_pre_hook(hide):
            super().load_state_dict(state_dict)

    def __setstate__(self, state):  # where torch's load_state_dict ends: if this raises, nothing has changed
        groups, entries = state["param_groups"], state["state"]
        for i, own in enumerate(getattr(self, "param_groups", [])):
            groups[i] = own | groups[i]
            _check_group(groups[i], groups[0], self.shard_group)
        entries.update({p: entry(p) for p, entry in entries.items() if callable(entry)})
        super().__setstate__(state)

    def __getstate__(self):  # for copies and pickles, which a process group refuses
        return super().__getstate__() | {"_last": self._last, "shard_group": self.shard_group}


def _own_state(p, name, saved):
    for key in "step", "exp_avg", "exp_avg_sq":
        good = key in saved and (key == "step" or saved[key].shape == p.shape)
        _require(good, f"state of parameter {name!r} must have {key!r}, of its shape", sorted(saved))
    move = lambda x: x.to(p.device, torch.promote_types(p.dtype, torch.float32), copy=True)
    return saved | {"step": torch.tensor(float(saved["step"]), dtype=torch.float32, device="cpu"),
                    "exp_avg": move(saved["exp_avg"]), "exp_avg_sq": move(saved["exp_avg_sq"])}


def _largest(x):  # 1 for a zero vector; divided by it, entries of 1e-30 or 1e30 have float32 squares
    largest = x.abs().amax() if x.numel() else x.new_zeros(())
    return torch.where((largest > 0) & largest.isfinite(), largest, 1)


def _require(holds, rule, value):
    if not holds:
        raise ValueError(f"{rule}, got {value}")


def _check_pair(**pair):
    shapes = [tuple(x.shape) for x in pair.values()]
    _require(shapes[0] == shapes[1], f"{' and '.join(pair)} must have the same shape", shapes)
    for name, x in pair.items():
        _require(x.is_floating_point(), f"{name} must be a real floating-point tensor", x.dtype)


def _check_group(group, first, shard_group):
    lr, betas, scope, max_angle = group["lr"], group["betas"], group["scope"], group["max_angle"]
    for name, holds, rule in (
            ("lr", getattr(lr, "ndim", 0) == 0 and 0 <= lr < math.inf, "be a number or 0-dim tensor, finite and >= 0"),
            ("weight_decay", 0 <= group["weight_decay"] < math.inf, "be finite and >= 0"),
            ("a", 0 < group["a"] < math.inf, "be finite and > 0"),
            ("b", 0 < group["b"] < math.inf, "be finite and > 0"),
            ("betas", len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "be two numbers in [0, 1)"),
            ("scope", scope in ("global", "tensor"), 'be "global" or "tensor"'),
            ("scope", scope == first["scope"], "be the same for all parameter groups"),
            ("scope", scope == "global" or shard_group is None, 'be "global" with a shard_group'),
            ("max_angle", 0 <= max_angle <= math.pi, "lie in [0, pi] radians"),
            ("max_angle", scope == "tensor" or max_angle == first["max_angle"],
             'be the same for all parameter groups when scope="global"'),
            ("maximize", not group.get("maximize"), "be False")):
        _require(holds, f"{name} must {rule}", group.get(name))
    _require(not any(p.is_complex() for p in group["params"]), "params must be real", "a complex parameter")
