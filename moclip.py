r"""MoClip: Adam-atan2 whose gradient may not turn further than max_angle away from the momentum.

The optimizer of *Logits Replay + MoClip* (Qiu, Li, Zhou, Huang, Qiu, Sun; arXiv:2510.09152), which
"caps gradient-momentum rotation and applies an arctan2-based rescaling of updates". Read it as three pieces:
`angle_between` (how far), `clip_angle` (the cap, a rotation), `MoClip` (the cap inside Adam-atan2).

    symbol   code                  meaning
    w        p                     parameters
    g        grad                  gradient of this step
    m, v     exp_avg, exp_avg_sq   first moment (the momentum) and second moment, as in torch.optim.Adam
    theta    last_angle            angle between g and the momentum BEFORE this step, in [0, pi]
    Delta    max_angle             the cap on theta
    g~       rotated               g, rotated to the cap where theta exceeds it
    t        step                  number of steps taken by a parameter

     g   . - - >   g~        theta, the angle from m to g, exceeds Delta: g turns towards m, in their plane,
      \           /          until its angle is Delta. |g~| = |g|: rotated, not shortened.
       \         /
        \       / Delta      theta <= Delta or m = 0: g~ = g.
         \     /             theta > Delta and g opposite to m, sin(theta) <= sqrt(eps) of the dtype: they span
          +----------> m     no plane; g~ = g, and m restarts at zero.

Angles are radians throughout. The published summary of the paper gives no formula for the rotation, its scope, or the
antiparallel case; what is chosen here, and why, stands where it happens and in README.md, what that guarantees in
THEORY.md (M1 to M11).
Not here: fused kernels, AMSGrad, `maximize`, sparse or complex gradients.
"""

import math

import torch
from torch import Tensor


def angle_between(u: Tensor, v: Tensor) -> Tensor:
    """Angle between two tensors of one shape, read as vectors: a 0-dim tensor, radians in [0, pi].

        theta = atan2(|u - c v|, c |v|),   c = <u, v> / <v, v>

    Accurate to a few machine epsilons at every angle, near 0 and pi too, where arccos loses half of the digits. The
    angle with a zero vector is 0 here: nothing is there to turn away from.
    Raises ValueError for unequal shapes and for tensors that are not real floating point.

    >>> round(math.degrees(angle_between(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]))), 4)
    45.0
    """
    _check_pair("u", u, "v", v)
    u, v = _wide(u), _wide(v)
    theta, _ = _angle([u / _largest(u)], [v / _largest(v)])
    return theta.to(torch.promote_types(u.dtype, v.dtype))


def clip_angle(grad: Tensor, momentum: Tensor, max_angle: float) -> Tensor:
    """Rotate `grad` towards `momentum` until the angle between them is at most `max_angle` (radians in [0, pi]).

        g~ = g                                              if theta <= Delta or m = 0
           = |g| (cos(Delta) m/|m| + sin(Delta) n)          otherwise, n = unit vector of g - <g, m/|m|> m/|m|

    Keeps the shape, norm and dtype of `grad` and stays in the plane of both (THEORY.md M1, M2). Antiparallel vectors
    span no plane (see `_rotation`): `grad` is returned as it is, and `MoClip` restarts the momentum at zero.
    Raises ValueError for unequal shapes, non-real dtypes and max_angle outside [0, pi].
    Source: "caps gradient-momentum rotation", arXiv:2510.09152, abstract; the formula is this project's reading.

    >>> g, m, Delta = torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 0.0]), math.pi / 6   # 117 degrees, down to 30
    >>> direction = m / m.norm()
    >>> n = g - (g @ direction) * direction
    >>> g.norm() * (math.cos(Delta) * direction + math.sin(Delta) * n / n.norm())        # the definition
    tensor([1.9365, 1.1180])
    >>> clip_angle(g, m, Delta)
    tensor([1.9365, 1.1180])
    """
    _check_pair("grad", grad, "momentum", momentum)
    _check_max_angle(max_angle)
    g, m = _wide(grad), _wide(momentum)
    m = m / _largest(m)
    theta, ratio = _angle([g / _largest(g)], [m])  # ratio: |g|/|m| of these two
    # the same g~ without n: A g + B m |g|/|m|,   A = sin(Delta) / sin(theta),   B = sin(theta - Delta) / sin(theta)
    A, B, _, _ = _rotation(theta, max_angle, max(torch.finfo(x.dtype).eps for x in (g, m)))
    return (A * g).add_(m * (B * ratio * _largest(g))).to(grad.dtype)


class MoClip(torch.optim.Optimizer):
    """Momentum-clipped Adam-atan2: a cap on the gradient's angle, arctan2 in place of Adam's division.

        theta = angle(g, m)                                               # m is the momentum BEFORE this step
        g~    = clip_angle(g, m, Delta)                                   # m = 0 first, if clipped and antiparallel
        m     = beta1 m + (1 - beta1) g~
        v     = beta2 v + (1 - beta2) g~^2
        w     = (1 - lr weight_decay) w - lr a atan2(m / (1 - beta1^t), b sqrt(v / (1 - beta2^t)))

    Everything after the first two lines is Adam-atan2 (Everett et al., arXiv:2407.05872, section 4.3); the cap is
    arXiv:2510.09152's. a = 4/pi and b = 1 make a step with m = sqrt(v) exactly lr, as in Adam, and no coordinate ever
    moves by more than lr a pi/2 = 2 lr, decay apart (M4; 1.826 lr at the default betas). atan2(0, 0) = 0, so Adam's
    epsilon in the denominator is not needed, and without it scaling the loss by a constant changes nothing (M5); what
    a large epsilon does and this cannot do: R10(e).

    Args:
        params: parameters or parameter groups; every option below but `scope` may differ between groups
            (`max_angle` may not where scope="global": there is only one angle).
        lr: step size, >= 0, a number or a 0-dim tensor.   betas: (beta1, beta2), decay of m and v, each in [0, 1).
        max_angle: the cap in radians, in [0, pi]. pi turns it off (Adam-atan2). Below pi/2 a step
            along -g~ can go uphill and momentum feeds on noise (M7, M8): hence the default.
        a, b: > 0, output and input scale of atan2.   weight_decay: decoupled, >= 0.
        scope: "global" takes one angle over all parameters that have a gradient, the literal reading of the paper's
            vector notation; "tensor" takes one per parameter. A cap kept in one need not be in the other (M10).

    State of a parameter: `step` (a float32 tensor on the CPU), `exp_avg`, `exp_avg_sq` (shaped as the parameter,
    float32 at least, also for bfloat16). After `step()`, `last_angle` and `last_clipped` hold theta and theta > Delta:
    0-dim for "global", one entry per parameter with a gradient for "tensor". `step()` never waits for the device.
    Raises ValueError for bad hyperparameters and complex parameters, RuntimeError for sparse gradients.

    >>> p = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer, w, m, v = MoClip([p], lr=0.1), 1.0, 0.0, 0.0
    >>> for t, g in (1, 3.0), (2, 0.5):                 # by hand; both gradients > 0, so theta = 0 and g~ = g
    ...     m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    ...     w -= 0.1 * 4 / math.pi * math.atan2(m / (1 - 0.9**t), math.sqrt(v / (1 - 0.999**t)))
    ...     p.grad = torch.tensor([g])
    ...     optimizer.step()
    ...     print(round(w, 4), round(p.item(), 4))      # the first step is lr, whatever |g|
    0.9 0.9
    0.8154 0.8154
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), *, max_angle=math.pi / 2,
                 a=4 / math.pi, b=1.0, weight_decay=0.0, scope="global"):
        super().__init__(params, dict(lr=lr, betas=betas, max_angle=max_angle, a=a, b=b,
                                      weight_decay=weight_decay, scope=scope))
        self._report = {}  # not attributes: torch.compile drops those that a compiled step assigns

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; `closure`, if given, recomputes and returns the loss, as for every torch optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        entries = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for _, p in entries:
            if p.grad.is_sparse:
                raise RuntimeError("MoClip does not support sparse gradients")
            if not self.state[p]:
                self.state[p] = {"step": torch.tensor(0.0, dtype=torch.float32, device="cpu"),
                                 "exp_avg": torch.zeros_like(_wide(p)), "exp_avg_sq": torch.zeros_like(_wide(p))}
        if entries:
            one_scope = self.param_groups[0]["scope"] == "global"
            reports = [self._step_scope(scope) for scope in ([entries] if one_scope else [[e] for e in entries])]
            angles, clipped = zip(*reports)
            self._report["angle"] = angles[0] if one_scope else torch.stack(angles)
            self._report["clipped"] = clipped[0] if one_scope else torch.stack(clipped)
        return loss

    def _step_scope(self, entries):
        """Step the (group, parameter) pairs that share one angle, overwriting parameters and state, not gradients.
        Returns (theta, clipped), 0-dim."""
        grads = [_wide(p.grad) for _, p in entries]
        momenta = [self.state[p]["exp_avg"] for _, p in entries]
        # not by calling clip_angle: one angle spans all tensors, and its rescaling would be one more pass over each
        theta, ratio = _angle(grads, momenta)  # ratio = |g|/|m|
        eps = max(torch.finfo(x.dtype).eps for x in (*grads, *momenta))  # the coarsest decides, see _rotation
        A, B, clipped, antiparallel = _rotation(theta, entries[0][0]["max_angle"], eps)
        turn, kept = B * ratio, (~antiparallel).to(theta.dtype)
        for (group, p), g, m in zip(entries, grads, momenta):
            (beta1, beta2), lr, a, b = group["betas"], group["lr"], group["a"], group["b"]
            state, v = self.state[p], self.state[p]["exp_avg_sq"]
            state["step"] += 1
            # g~ = A g + B m |g|/|m|; unclipped A = 1 and B = 0, so g passes unchanged to the last bit
            rotated = (g * A).addcmul_(m, turn)
            # m = beta1 m + (1 - beta1) g~, from m = 0 where the plane of the rotation is undefined
            m.mul_(beta1 * kept).add_(rotated, alpha=1 - beta1)
            # v = beta2 v + (1 - beta2) g~^2
            v.mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
            # w = (1 - lr weight_decay) w - lr a atan2(m / c1, b sqrt(v / c2)),   c1 = 1 - beta1^t,   c2 = 1 - beta2^t
            t = state["step"].double()  # in float32, 1 - 0.999^t would lose four digits
            c1, c2 = 1 - beta1**t, 1 - beta2**t
            # atan2(m / c1, y) = atan2(m, c1 y), and c1 y = sqrt(v (c1 b)^2 / c2); both overwrite g~, needed no more
            denominator = torch.mul(v, (c1 * b)**2 / c2, out=rotated).sqrt_()
            update = torch.atan2(m, denominator, out=denominator).mul_(lr * a)
            if group["weight_decay"]:
                update += lr * group["weight_decay"] * _wide(p)
            p -= update
        return theta, clipped

    # -------------------------------------------------------------------------------------- a learner may stop here
    # Below: what the last step reports, checks, loading of state; then the numerics of the angle.

    @property
    def last_angle(self) -> Tensor:
        return self._report.get("angle", torch.zeros(()))

    @property
    def last_clipped(self) -> Tensor:
        return self._report.get("clipped", torch.zeros((), dtype=torch.bool))

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1], self.param_groups[0])
        except Exception:  # whatever it is, the refused group does not stay
            self.param_groups.pop()
            raise

    def __setstate__(self, state):  # torch pickles and copies neither what is not state nor a group
        super().__setstate__(state)
        self._report = {}

    def load_state_dict(self, state_dict):
        """As torch's, but moments keep their dtype (torch casts them to the parameter's) and no tensor is shared."""
        loaded = {}

        def restore(_):
            names = [name for group in loaded["param_groups"] for name in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            for name, p in zip(names, params):
                for key, saved in loaded["state"].get(name, {}).items():
                    self.state[p][key] = saved.clone() if key == "step" else saved.to(p.device, copy=True)

        # after the other pre-hooks, which may replace what is loaded; before the other post-hooks, which may change it
        hooks = [self.register_load_state_dict_pre_hook(lambda _, final: loaded.update(final)),
                 self.register_load_state_dict_post_hook(restore, prepend=True)]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least: the arithmetic of float16 and bfloat16 is too coarse for moments and angles. Any shape."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _largest(x: Tensor) -> Tensor:
    """max |x_i|, 0-dim; 1 for a zero or empty vector. Divided by it, entries of 1e-30 or 1e30 have float32 squares."""
    largest = x.abs().amax() if x.numel() else x.new_zeros(())
    return torch.where(largest > 0, largest, 1)


def _total(terms) -> Tensor:
    """The sum of 0-dim tensors, as float64: products and ratios of squared norms leave the range of float32."""
    total = sum(terms)
    return total if total.device.type == "mps" else total.double()  # MPS has no float64


def _angle(grads, momenta):
    """(theta, |g|/|m|), 0-dim, of g and m in pieces: lists of tensors, grads[k] shaped as momenta[k]. (0, 0) if one
    is zero or its square not a normal number of the dtype (1e-38 to 1e38 for float32), where v = g^2 is lost, too.

        g = along m + rest, rest orthogonal to m:   theta = atan2(|rest|, along |m|),   |g|^2 = |rest|^2 + along^2 |m|^2
    """
    # `sum` adds in pairs; torch's float32 dot products and norms of 10^8 entries are off by percents
    gm = _total((g * m).sum() for g, m in zip(grads, momenta))
    mm = _total((m * m).sum() for m in momenta)
    along = gm / mm
    rest_squared = _total(g.addcmul(m, along, value=-1).square_().sum() for g, m in zip(grads, momenta))
    across = rest_squared / mm  # |rest|^2 in units of |m|^2, as along is <g, m> in the same units
    ratio = (across + along * along).sqrt()
    # m = 0 gives 0/0; the squares of a tiny vector lose their digits, and then its part across m, or all of it
    tiny = max(torch.finfo(m.dtype).tiny for m in momenta)
    ratio = torch.where(ratio.isfinite() & (mm >= tiny) & (ratio * ratio * mm >= tiny), ratio, 0)
    # arccos(<g, m> / |g||m|) would lose half of the digits near 0 and near pi
    return torch.where(ratio > 0, torch.atan2(across.sqrt(), along), 0), ratio


def _rotation(theta: Tensor, max_angle: float, eps: float):
    """g~ = A g + B m |g|/|m|: returns (A, B, clipped, antiparallel), 0-dim. A = 1 and B = 0 where nothing is rotated.

    In the plane of g and m the unit vector at angle Delta from m is the spherical interpolation
        g~/|g| = (sin(Delta) g/|g| + sin(theta - Delta) m/|m|) / sin(theta),
    which equals cos(Delta) m/|m| + sin(Delta) n, n as in `clip_angle`. Antiparallel: beyond pi/2, sin(theta) <=
    sqrt(eps), eps the machine epsilon; of n's digits less than half survive the subtraction g - <g, m/|m|> m/|m|.
    """
    clipped = theta > max_angle
    antiparallel = clipped & (theta > math.pi / 2) & (theta.sin() <= math.sqrt(eps))
    turned = clipped & ~antiparallel
    A = torch.where(turned, math.sin(max_angle) / theta.sin(), 1)
    B = torch.where(turned, (theta - max_angle).sin() / theta.sin(), 0)
    return A, B, clipped, antiparallel


def _check_pair(name_u, u, name_v, v):
    if u.shape != v.shape:
        raise ValueError(f"{name_u} and {name_v} must have the same shape, got {tuple(u.shape)} and {tuple(v.shape)}")
    for name, x in ((name_u, u), (name_v, v)):
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a real floating-point tensor, got {x.dtype}")


def _check_max_angle(max_angle):
    if not 0 <= max_angle <= math.pi:
        raise ValueError(f"max_angle must lie in [0, pi] radians, got {max_angle}")


def _check_group(group, first):
    _check_max_angle(group["max_angle"])
    if isinstance(group["lr"], Tensor) and group["lr"].dim():
        raise ValueError(f"lr must be a number or a 0-dim tensor, got the shape {tuple(group['lr'].shape)}")
    for name in ("lr", "weight_decay"):
        if not 0 <= group[name] < math.inf:
            raise ValueError(f"{name} must be finite and >= 0, got {group[name]}")
    for name in ("a", "b"):
        if not 0 < group[name] < math.inf:
            raise ValueError(f"{name} must be finite and > 0, got {group[name]}")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']}")
    if group["scope"] not in ("global", "tensor"):
        raise ValueError(f'scope must be "global" or "tensor", got {group["scope"]!r}')
    if group["scope"] != first["scope"]:
        raise ValueError(f"scope must be the same for all parameter groups, got {group['scope']!r}")
    if group["scope"] == "global" and group["max_angle"] != first["max_angle"]:
        raise ValueError('max_angle must be the same for all parameter groups when scope="global": '
                         f"got {group['max_angle']} beside {first['max_angle']}")
    if any(p.is_complex() for p in group["params"]):
        raise ValueError("params must be real, got a complex parameter")
