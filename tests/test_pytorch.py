"""At home in PyTorch: compilation, mixed precision, accumulation, checkpointing, and several processes."""

import contextlib
import copy
import datetime
import functools
import math
import warnings

import plain_reference
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from logits_replay import ReplayRecord, linear_replay_cross_entropy, record_topk, replay_cross_entropy, sample_tail
from moclip import MoClip

EPS = 2.0**-52


def gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


# ---------------------------------------------------------------------------------------------------- the optimizer

@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_the_step_compiles_without_a_graph_break(scope, lr):
    torch.manual_seed(0)
    torch._dynamo.reset()
    plain = [nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,), ())]
    others = copy.deepcopy(plain)
    options = dict(lr=lr, max_angle=0.9, weight_decay=0.1, scope=scope)
    one, two = MoClip(plain, **options), MoClip(others, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own deprecations
        step = torch.compile(two.step, fullgraph=True, backend="eager")
        for seed in range(4):
            gradients(plain, seed), gradients(others, seed)
            one.step(), step()
            for a, b in zip([*plain, one.last_angle], [*others, two.last_angle]):
                # fused arithmetic: the last bits of entries near 1
                torch.testing.assert_close(a, b, rtol=0, atol=8 * 2.0**-23)
            assert torch.equal(one.last_clipped, two.last_clipped)
    assert one.last_clipped.any()


def test_frozen_parameters_rest_and_come_back():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = MoClip([a, b], lr=0.1, scope="tensor")
    optimizer.step()  # nobody has a gradient
    assert not optimizer.state
    gradients([a, b], 0)
    optimizer.step()
    b.requires_grad_(False)
    optimizer.zero_grad(set_to_none=True)
    rest, state = b.detach().clone(), copy.deepcopy(optimizer.state[b])
    (a ** 2).sum().backward()
    optimizer.step()
    assert torch.equal(b, rest) and all(torch.equal(optimizer.state[b][key], x) for key, x in state.items())
    assert optimizer.last_angle.shape == (1,)
    b.requires_grad_(True)
    gradients([a, b], 1)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in (a, b)] == [3, 2] and not torch.equal(b, rest)


def test_accumulated_gradients_are_one_gradient():
    torch.manual_seed(0)
    x = torch.randn(8, 4, dtype=torch.float64)
    model = nn.Linear(4, 2).double()
    other = copy.deepcopy(model)
    one, two = MoClip(model.parameters(), lr=0.1), MoClip(other.parameters(), lr=0.1)
    for _ in range(3):
        one.zero_grad(), two.zero_grad()
        (model(x) ** 2).mean().backward()
        for part in x.split(2):
            (other(part) ** 2).mean().div(4).backward()
        one.step(), two.step()
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=2**8 * EPS)  # a different order of addition, three steps of 0.1


def test_grad_scaler_skips_infinite_gradients_and_hides_its_scale():
    w, plain = nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer, unscaled = MoClip([w], lr=0.1), MoClip([plain], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad(), unscaled.zero_grad()
        scaler.scale((w ** 2).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor == 1.0:
            (plain ** 2).sum().backward()
            unscaled.step()
        assert torch.equal(w, plain)
    assert optimizer.state[w]["step"] == 2


# -------------------------------------------------------------------------------------------------------- the losses

def head(dtype=torch.float32, B=2, T=5, d=8, V=30):
    torch.manual_seed(0)
    h, W, y = (torch.randn(B, T, d, dtype=dtype, requires_grad=True),
               torch.randn(V, d, dtype=dtype, requires_grad=True), torch.randint(V, (B, T)))
    y[0, :2] = -100
    return h, W, y, record_topk((h @ W.T).detach(), y, 0.8)


def test_losses_under_autocast_are_float32():
    h, W, y, record = head()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = F.linear(h, torch.eye(8))
        assert hidden.dtype == torch.bfloat16
        linear, dense = (linear_replay_cross_entropy(hidden, W, y, record),
                         replay_cross_entropy(F.linear(hidden, W), y, record))
    assert linear.dtype == dense.dtype == torch.float32
    exact = linear_replay_cross_entropy(hidden.double(), W.double(), y, record)
    # the head itself is not rounded to bfloat16
    torch.testing.assert_close(linear.double(), exact, rtol=2**-18, atol=0)
    linear.backward()
    assert h.grad.dtype == W.grad.dtype == torch.float32


@pytest.mark.parametrize("size", [None, 3])
def test_losses_compile_and_checkpoint_to_the_same_result(size):
    torch._dynamo.reset()
    h, W, y, record = head()
    tail = None if size is None else sample_tail(y, len(W), size)
    function = lambda h, W: linear_replay_cross_entropy(h.tanh(), W, y, record, tail=tail)
    plain = function(h, W)
    expected = [plain, *torch.autograd.grad(plain, (h, W))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo breaks the graph at the checks, and says so
        compiled = torch.compile(function, backend="eager")(h, W)
        checkpointed = torch.utils.checkpoint.checkpoint(function, h, W, use_reentrant=False)
    for loss in (compiled, checkpointed):
        for a, b in zip([loss, *torch.autograd.grad(loss, (h, W))], expected):
            assert torch.equal(a, b)


def test_a_tied_embedding_gets_both_gradients():
    torch.manual_seed(0)
    E, tokens = nn.Embedding(30, 8).double(), torch.randint(30, (2, 6))
    x, y = tokens[:, :-1], tokens[:, 1:]
    record = record_topk(E(x) @ E.weight.T, y, 1.0)  # the whole vocabulary: then it is the dense loss
    dense = F.cross_entropy((E(x) @ E.weight.T).flatten(0, 1), y.flatten())
    a, = torch.autograd.grad(linear_replay_cross_entropy(E(x), E.weight, y, record), E.weight)
    b, = torch.autograd.grad(dense, E.weight)
    torch.testing.assert_close(a, b, rtol=0, atol=2**8 * EPS)


# -------------------------------------------------------------------------------------------------- several processes

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 3)).double()


def one_tensor():
    torch.manual_seed(0)
    return nn.Linear(6, 3, bias=False).double()


def fit(model, scope, share=slice(None), make=MoClip):
    """Angles and parameters after five steps on this process's share of every batch."""
    generator = torch.Generator().manual_seed(1)
    optimizer, angles = make(model.parameters(), lr=0.05, max_angle=1.0, weight_decay=0.1, scope=scope), []
    for _ in range(5):
        x, y = (torch.randn(8, n, generator=generator, dtype=torch.float64)[share] for n in (6, 3))
        optimizer.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        for p in model.parameters():
            if getattr(p, "left_to_us", False):
                dist.all_reduce(p.grad.div_(2))
        optimizer.step()
        angles.append(getattr(optimizer, "optim", optimizer).last_angle)  # ZeroRedundancyOptimizer's is inside
    whole = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x
    with getattr(type(model), "summon_full_params", contextlib.nullcontext)(model):  # FSDP1's
        return [whole(x.detach()).clone() for x in (*angles, *model.parameters())]


def process(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/meeting")
    share = slice(4 * rank, 4 * rank + 4)
    results = {}
    for scope in ("global", "tensor"):
        results["ddp", scope] = fit(nn.parallel.DistributedDataParallel(network()), scope, share)
        model = network()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        assert all(isinstance(p, DTensor) for p in model.parameters())
        results["fsdp", scope] = fit(model, scope, share)
    h, W, y, _ = head()
    record_topk((h @ W.T)[rank], y[rank], 0.8).save(f"{folder}/shard-{rank}.npz")
    torch.save(results, f"{folder}/results-{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_two_processes_take_the_steps_of_one_under_ddp_and_fsdp(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        for (engine, scope), result in torch.load(tmp_path / f"results-{rank}").items():
            for mine, alone in zip(result, fit(network(), scope)):
                # sums over two halves: rounded in another order, through five steps of curvature about 1
                torch.testing.assert_close(mine, alone, rtol=2**10 * EPS, atol=2**10 * EPS,
                                           msg=f"{engine} {scope} rank {rank}")
    h, W, y, record = head()
    joined = ReplayRecord.concat([ReplayRecord.load(tmp_path / f"shard-{rank}.npz") for rank in range(2)])
    assert all(torch.equal(getattr(joined, name), getattr(record, name))
               for name in ("token_ids", "offsets", "outside_mass"))


def sharded(rank, folder):
    """Optimizers that see a part of the parameters, or tensors that cannot be added."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/meeting",
                            timeout=datetime.timedelta(minutes=2))  # a process that waits for another in vain fails
    share, ddp, results = slice(4 * rank, 4 * rank + 4), nn.parallel.DistributedDataParallel, {}
    one_angle = functools.partial(MoClip, shard_group=dist.group.WORLD)
    zero = functools.partial(ZeroRedundancyOptimizer, optimizer_class=one_angle)
    results["zero", "global"] = fit(ddp(network()), "global", share, zero)
    results["zero", "tensor"] = fit(
        ddp(network()), "tensor", share, functools.partial(ZeroRedundancyOptimizer, optimizer_class=MoClip))
    results["zero, one tensor", "global"] = fit(ddp(one_tensor()), "global", share, zero)  # one process has none
    for flat in (True, False):
        model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=not flat)
        results[f"fsdp1, flat {flat}", "global"] = fit(model, "global", share, one_angle)
    for scope in ("global", "tensor"):
        model = network()
        fully_shard(model[0], mesh=init_device_mesh("cpu", (2,)))
        fully_shard(model[2], mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))["b"])
        for p in model[1].parameters():
            p.left_to_us = True
        assert len({getattr(p, "device_mesh", None) for p in model.parameters()}) == 3
        results["plain tensors and two meshes", scope] = fit(model, scope, share)
    torch.save(results, f"{folder}/results-{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_the_angle_is_one_over_shards_and_meshes_and_plain_tensors(tmp_path):
    torch.multiprocessing.spawn(sharded, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"results-{rank}") for rank in range(2)]
    assert len(results[0]) == len(results[1]) == 7
    for engine, scope in results[0]:
        model = one_tensor() if "one tensor" in engine else network()
        alone = fit(model, scope)
        if (engine, scope) == ("zero", "tensor"):  # each process reports the angles of its own tensors
            alone = alone[5:]
        for rank in range(2):
            for mine, expected in zip(results[rank][engine, scope][-len(alone):], alone, strict=True):
                # sums over two halves: rounded in another order, through five steps of curvature about 1
                torch.testing.assert_close(mine, expected, rtol=2**10 * EPS, atol=2**10 * EPS,
                                           msg=f"{engine} {scope} rank {rank}")


# --------------------------------- what PyTorch's test_optim.py asks of every optimizer, where the code here has a say
# Without torch.testing._internal.common_optimizers: it needs expecttest, and its import cuts Hypothesis to 10 examples
# everywhere.

CONFIGURATIONS = [{}, dict(lr=0.0), dict(lr=torch.tensor(0.02)), dict(weight_decay=0.1), dict(betas=(0.0, 0.5)),
                  dict(a=1.0, b=2.0), dict(max_angle=0.0), dict(max_angle=math.pi), dict(scope="tensor"),
                  dict(lr=0.1, max_angle=0.7, scope="tensor")]


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_a_step_takes_any_layout_and_no_dimension_and_no_entry(options):
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(1, dtype=torch.float64)
    layouts = [x.to(memory_format=torch.channels_last), x.mT.contiguous().mT, torch.stack([x, x], -1)[..., 0],
               y[0], x[:0]]
    odd, plain = [nn.Parameter(w) for w in layouts], [nn.Parameter(w.clone()) for w in (x, x, x, y)]
    one, two = MoClip(odd, **options), MoClip(plain, **options)
    for seed in range(4):
        gradients(odd, seed), gradients(plain, seed), one.step(), two.step()
        # sums in another order, four steps, weights below 4
        for a, b in zip([one.last_angle, *odd], [two.last_angle, *plain]):
            torch.testing.assert_close(a.reshape(-1)[:b.numel()], b.reshape(-1), rtol=0, atol=2**6 * EPS)
    assert one.last_angle.isfinite().all() and one.state[odd[-1]]["step"] == 4


@pytest.mark.parametrize("distributed", [False, True][:1 + dist.is_available()],
                         ids=["file", "distributed"][:1 + dist.is_available()])
@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_every_configuration_continues_from_a_checkpoint(options, distributed, tmp_path):
    weights = dict(a=torch.ones(3), b=torch.ones(2, 2).bfloat16(), c=torch.tensor(1.0).double(), d=torch.ones(0))
    old, new = (nn.ParameterDict(copy.deepcopy(weights)) for _ in range(2))
    one, two = MoClip(old.named_parameters(), **options), MoClip(new.named_parameters(), lr=1.0)
    for seed in range(3):
        gradients(old.values(), seed), one.step()
    if distributed:
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
        state = copy.deepcopy(get_state_dict(old, one))
        # takes a step with lr 0 and gradients 0 first
        set_state_dict(new, two, model_state_dict=state[0], optim_state_dict=state[1])
    else:
        torch.save([old.state_dict(), one.state_dict()], tmp_path / "state")
        for target, state in zip((new, two), torch.load(tmp_path / "state")):
            target.load_state_dict(state)
    gradients(old.values(), 3), gradients(new.values(), 3), one.step(), two.step()
    assert all(torch.equal(a, b) for a, b in zip([one.last_angle, *old.values()], [two.last_angle, *new.values()]))
    assert repr(one) == repr(two)


@pytest.mark.parametrize("lr", [0.125, torch.tensor(0.125, dtype=torch.float64)], ids=["float", "tensor"])
def test_a_schedule_steers_the_step_and_the_momentum(lr):
    w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = MoClip([w], lr=copy.deepcopy(lr))
    schedule, group, expected, rest = (torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, 12),
                                       optimizer.param_groups[0], 0.0, 1.0)
    for t in range(1, 11):
        w.grad = torch.ones_like(w)  # then m = 1 - rest, rest = the product of the beta1 so far, and v = 1 - beta2^t
        rest *= group["betas"][0]
        expected -= float(group["lr"]) * 4 / math.pi * math.atan((1 - rest) / (1 - group["betas"][0]**t))
        optimizer.step(), schedule.step()
        # 1 - 0.999 has 2^10 times the relative error of 0.999
        assert w.tolist() == pytest.approx([expected] * 3, rel=2**10 * EPS)
    assert type(group["lr"]) is type(lr)


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_parameters_of_several_dtypes_share_one_angle(first):
    weights = [nn.Parameter(torch.ones(40, dtype=dtype))
               for dtype in (first, torch.float32, torch.bfloat16, torch.float64)]
    optimizer = MoClip(weights, max_angle=1.2)
    momentum = lambda: torch.cat([optimizer.state[w]["exp_avg"].double() for w in weights])
    gradients(weights, 0), optimizer.step()
    m, _ = momentum(), gradients(weights, 1)
    g = torch.cat([w.grad.double() for w in weights])
    optimizer.step()
    rotated, theta, *_ = plain_reference.clip_angle(g.tolist(), m.tolist(), 1.2)
    expected = torch.tensor(theta).double(), m.lerp(torch.tensor(rotated).double(), 0.1)
    # float32, entries below 4
    torch.testing.assert_close((optimizer.last_angle, momentum()), expected, rtol=0, atol=2.0**-21)
    assert optimizer.last_clipped


def test_a_group_that_torch_refuses_takes_no_other_with_it():
    w = nn.Parameter(torch.ones(2))
    optimizer = MoClip([("w", w)])
    for params, message in (([("again", w)], "more than one"), ([nn.Parameter(torch.ones(1))], "names"),
                            ([("w2", w * 1)], "non-leaf")):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(dict(params=params))
    assert [group["param_names"] for group in optimizer.param_groups] == [["w"]]


@pytest.mark.parametrize("dtype, device", [
    (torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")], ids=str)
def test_default_dtype_and_device_are_not_those_of_the_step_count(dtype, device):
    w = nn.Parameter(torch.ones(2))
    optimizer, before = MoClip([w]), torch.get_default_dtype()
    w.grad = torch.ones(2)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            for _ in range(260):
                optimizer.step()
    finally:
        torch.set_default_dtype(before)
    # 256 + 1 = 256 in bfloat16
    assert optimizer.state[w]["step"].dtype == torch.float32 and optimizer.state[w]["step"] == 260


def test_hooks_of_load_state_dict_have_their_say_and_nothing_is_shared():
    w, v = nn.Parameter(torch.ones(2).bfloat16()), nn.Parameter(torch.ones(2).bfloat16())
    one, two, seen = MoClip([w]), MoClip([v]), []
    gradients([w], 0), one.step()
    scaled = {key: x * 3 for key, x in one.state[w].items()}
    two.register_load_state_dict_pre_hook(lambda _, state: dict(state, state={0: scaled}))
    two.register_load_state_dict_post_hook(lambda o: seen.append(o.state[v]["exp_avg"].dtype))
    two.register_load_state_dict_post_hook(lambda o: o.state[v].update(exp_avg_sq=torch.full((2,), 7.0)))
    two.load_state_dict(one.state_dict())
    assert (seen == [torch.float32] and two.state[v]["step"] == 3
            and torch.equal(two.state[v]["exp_avg"], scaled["exp_avg"]))
    assert torch.equal(two.state[v]["exp_avg_sq"], torch.full((2,), 7.0))
    gradients([v], 1), two.step()
    assert scaled["step"] == 3


@pytest.mark.parametrize("order", [1, -1])
def test_an_antiparallel_gradient_in_float32_restarts_beside_float64(order):
    a, b = nn.Parameter(torch.zeros(1000)), nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = MoClip([a, b][::order])
    for factor in (1.0, 1.3, 0.7, -1.0):
        gradients([a, b], 0)
        a.grad *= factor
        b.grad *= factor
        optimizer.step()
    torch.testing.assert_close(optimizer.state[a]["exp_avg"], 0.1 * a.grad, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("options", [
    dict(betas=0.9), dict(lr=torch.ones(2)), dict(lr=torch.ones(1)), dict(lr=None), dict(a="1")], ids=str)
def test_whatever_the_error_a_refused_group_is_not_added(options):
    optimizer = MoClip([nn.Parameter(torch.ones(()))])
    with pytest.raises((ValueError, TypeError)):
        optimizer.add_param_group(dict(params=[nn.Parameter(torch.ones(1))], **options))
    assert len(optimizer.param_groups) == 1
