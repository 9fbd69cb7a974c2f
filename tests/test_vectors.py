"""The golden vectors: the files are what the generator makes, and the two modules match them in float64 and float32."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import plain_reference
from logits_replay import (ReplayRecord, Tail, linear_replay_cross_entropy, linear_replay_kl_div, outside_mass,
                           record_topk, replay_cross_entropy, replay_kl_div, sample_tail)
from moclip import MoClip, angle_between, clip_angle
from vectors import calls, check_holes, compare, fuzz, generate, run_port

FOLDER = Path(__file__).parent / "vectors"
STORED = {name: json.loads((FOLDER / name).read_text()) for name in generate.INPUTS}


def assert_same(a, b, where):
    """Equal, but for the last bits of floats: another platform's exp, log and atan2 may round another way."""
    assert type(a) is type(b), where
    if isinstance(a, float):
        assert math.isclose(a, b, rel_tol=1e-14, abs_tol=1e-300), where
    elif isinstance(a, (list, dict)):
        assert len(a) == len(b), where
        keys = a if isinstance(a, dict) else range(len(a))
        for key in keys:
            assert_same(a[key], b[key], f"{where}/{key}")
    else:
        assert a == b, where


@pytest.mark.parametrize("name", STORED)
def test_the_file_is_what_the_generator_makes(name):
    assert_same(STORED[name], generate.make(name), name)


def test_the_files_are_small_and_no_other_is_there():
    assert {path.name for path in FOLDER.glob("*.json")} == set(STORED) == set(calls.FILES) == set(run_port.NEEDS)
    assert sum(path.stat().st_size for path in FOLDER.glob("*.json")) < 1.3e6


@pytest.mark.parametrize("name", STORED)
def test_inputs_are_exact_in_float32(name):
    """But for those that a port holds in float64: tau, angles, options and learning rates."""
    held_wide = {"tau", "max_angle", "betas", "a", "b", "weight_decay", "lr", "expected", "on_the_way"}

    def walk(x, where):
        for key, value in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
            if key not in held_wide:
                walk(value, f"{where}/{key}")
        if isinstance(x, float):
            assert generate.float32(x) == x, where

    for case in STORED[name]:
        if case.get("dtype") != "float64":
            walk(case, f"{name}/{case['name']}")


def test_the_readme_names_every_key_and_counts_the_variants():
    text = (FOLDER / "README.md").read_text()

    def keys(x):
        if isinstance(x, dict):
            yield from x
        for value in x.values() if isinstance(x, dict) else x if isinstance(x, list) else ():
            yield from keys(value)

    assert {key for cases in STORED.values() for key in keys(cases) if f"`{key}`" not in text} == set()
    assert f"lists {sum(map(len, check_holes.VARIANTS.values()))} wrong variants" in text


def test_the_comparison_sees_what_differs():
    in_float32, record = [1e-20 * (1 + 2.0**-24)], {"token_ids": [[2]], "outside_mass": [1e-20], "log_weight": [1.0]}
    want = {"n": 3, "loss": None, "outside_mass": [1e-20], "outside_mass_at_the_end": [1e-20],
            "exp_avg": [1e-9, 2.0], "x": [0.0], "on": [True], "record": record}
    assert compare.differences(want, want, 2.0**-52) == []
    rounded = {**record, "outside_mass": in_float32, "log_weight": [1 + 2.0**-24]}
    assert compare.differences({**want, "loss": math.nan, "x": [2.0**-43], "record": rounded}, want, 2.0**-52) == []
    for change in ({"n": 4}, {"loss": 0.0}, {"outside_mass": in_float32}, {"exp_avg": [1.001e-9, 2.0]},
                   {"outside_mass_at_the_end": in_float32},
                   {"record": {**record, "outside_mass": [1e-20 * (1 + 2.0**-22)]}},
                   {"record": {**record, "log_weight": [1 + 2.0**-21]}},
                   {"x": [2.0**-41]}, {"x": [math.nan]}, {"x": []}, {"x": 0.0}, {"on": [False]}, {"x": [None]}):
        assert len(compare.differences({**want, **change}, want, 2.0**-52)) == 1, change
    assert compare.differences({key: want[key] for key in want if key != "n"}, want, 2.0**-52) == ["/n: missing, not 3"]


# ----------------------------------------------------------------------------------------------------- the two modules

def record_of(token_ids, V, log_probs=None):
    if log_probs is not None and [*map(len, log_probs)] != [*map(len, token_ids)]:  # a flat record has no such rows
        raise ValueError("log_probs must hold one for each recorded token")
    tensor = lambda rows, dtype: torch.tensor([x for row in rows for x in row], dtype=dtype)
    log_probs = None if log_probs is None else tensor(log_probs, torch.float32)
    return ReplayRecord(tensor(token_ids, torch.int32), torch.tensor([0, *map(len, token_ids)]).cumsum(0),
                        torch.zeros(len(token_ids)), V, 0.5, log_probs)


class Torch:
    """This project as a port."""

    def record_topk(self, logits, target, tau, max_size, ignore_index):
        record = record_topk(torch.tensor(logits), torch.tensor(target), tau, max_size=max_size,
                             ignore_index=ignore_index, keep_log_probs=True)
        rows = lambda x: [row.tolist() for row in x.split(record.subset_sizes.tolist())]
        return rows(record.token_ids), record.outside_mass, rows(record.log_probs)

    def softmax(self, logits):
        return torch.tensor(logits).softmax(1)

    def outside_mass(self, logits, token_ids):
        return outside_mass(torch.tensor(logits), record_of(token_ids, logits.shape[1]))

    def differentiated(self, loss, incoming, *arrays):
        """The loss of these arrays, some of them None, and its derivative by each."""
        leaves = [None if x is None else torch.tensor(x, requires_grad=True) for x in arrays]
        value, given = loss(*leaves), [x for x in leaves if x is not None]
        gradients = iter(torch.autograd.grad(value, given, torch.tensor(incoming, dtype=value.dtype)))
        return value.detach(), *(None if x is None else next(gradients) for x in leaves)

    def replay_cross_entropy(self, logits, target, token_ids, ignore_index, reduction, incoming):
        loss = lambda z: replay_cross_entropy(z, torch.tensor(target), record_of(token_ids, logits.shape[1]),
                                              ignore_index=ignore_index, reduction=reduction)
        return self.differentiated(loss, incoming, logits)

    def linear_replay_cross_entropy(self, input, linear_weight, linear_bias, target, token_ids, ignore_index, tail,
                                    reduction, incoming):
        target, record = torch.tensor(target), record_of(token_ids, len(linear_weight))
        tail = None if tail is None else Tail(*map(torch.as_tensor, tail))
        loss = lambda h, W, bias: self.cross_entropy(h, W, bias, target, record, tail=tail, ignore_index=ignore_index,
                                                     reduction=reduction)
        return self.differentiated(loss, incoming, input, linear_weight, linear_bias)

    def cross_entropy(self, h, W, bias, *rest, **options):
        return linear_replay_cross_entropy(h, W, *rest, linear_bias=bias, **options)

    def kl_div(self, h, W, bias, *rest, **options):
        return linear_replay_kl_div(h, W, *rest, linear_bias=bias, **options)

    def replay_kl_div(self, logits, token_ids, log_probs, positions, reduction, incoming):
        record = record_of(token_ids, logits.shape[1], log_probs).select(positions)
        return self.differentiated(lambda z: replay_kl_div(z, record, reduction=reduction), incoming, logits)

    def linear_replay_kl_div(self, input, linear_weight, linear_bias, token_ids, log_probs, positions, reduction,
                             incoming):
        record = record_of(token_ids, len(linear_weight), log_probs).select(positions)
        loss = lambda h, W, bias: self.kl_div(h, W, bias, record, reduction=reduction)
        return self.differentiated(loss, incoming, input, linear_weight, linear_bias)

    def sample_tail(self, chosen, target, vocab_size, ignore_index):
        """Drawn again and again, until the chosen tokens come."""
        generator, golds = torch.Generator().manual_seed(0), {*target.tolist()} - {ignore_index}
        for _ in range(10**5):
            tail = sample_tail(torch.tensor(target), vocab_size, len(chosen), ignore_index=ignore_index,
                               generator=generator)
            if {*tail.token_ids.tolist()} - golds == {*chosen} - golds:
                return tail
        raise AssertionError(chosen)

    def angle_between(self, u, v):
        return angle_between(torch.tensor(u), torch.tensor(v))

    def clip_angle(self, grad, momentum, max_angle):
        return clip_angle(torch.tensor(grad), torch.tensor(momentum), max_angle)

    def moclip(self, groups, max_angle, scope):
        options = ("betas", "a", "b", "weight_decay")
        groups = [{key: group[key] for key in options} | {"params": [torch.nn.Parameter(torch.tensor(p))
                  for p in group["parameters"]]} for group in groups]
        optimizer, params = MoClip(groups, max_angle=max_angle, scope=scope), [p for g in groups for p in g["params"]]

        def step(gradients, lrs):
            for group, lr in zip(optimizer.param_groups, lrs):
                group["lr"] = lr
            for p, g in zip(params, gradients):
                p.grad = None if g is None else torch.as_tensor(g).clone()
            before = [optimizer.last_angle, optimizer.last_clipped]
            optimizer.step()
            report = [optimizer.last_angle, optimizer.last_clipped]
            if all(g is None for g in gradients):  # nothing happened, and the report stays that of the step before
                assert all(map(torch.equal, report, before))
                report = [torch.zeros(0)] * 2
            names = "step", "exp_avg", "exp_avg_sq"
            state = [[optimizer.state[p].get(name, torch.zeros_like(p) if name != "step" else torch.zeros(())).clone()
                      for name in names] for p in params]
            return ([p.detach().clone() for p in params], *(x.flatten() for x in report), state)
        return step


class Dense(Torch):
    """The linear forms replaced by those that take logits."""

    def of_logits(self, loss, h, W, bias, *rest, **options):
        try:
            return loss(h @ W.T + (0 if bias is None else bias), *rest, **options)
        except ValueError as error:
            raise ValueError(str(error).replace("logits", "input @ linear_weight.T + linear_bias")) from error

    def cross_entropy(self, *rest, **options):
        return self.of_logits(replay_cross_entropy, *rest, **options)

    def kl_div(self, *rest, **options):
        return self.of_logits(replay_kl_div, *rest, **options)


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("port", [generate.Plain, Torch, Dense])
def test_every_case_passes(port, name):
    # the dense forms look at every logit, the linear ones at those that they compute
    unseen = [case["name"] for case in STORED[name]
              if port is Dense and "-inf" in (case.get("linear_bias") or []) and "error" not in case["expected"]]
    tried = [one for one in run_port.cases(name, port()) if one[0]["name"] not in unseen]
    assert len(tried) >= len(STORED[name]) - len(unseen)
    assert [(case["name"], dtype, wrong) for case, dtype, chunk in tried
            if (wrong := run_port.failures(name, port(), case, dtype, chunk))] == []


# ----------------------------------------------------------------------------------------------------------- the runner

class DropsTheLastChunk(generate.Plain):
    """Right with the default chunk, wrong where the last one is not full."""

    def linear_replay_cross_entropy(self, input, *rest, chunk=None):
        result = super().linear_replay_cross_entropy(input, *rest)
        if chunk and len(input) % chunk:
            result[1][-1] = [0.0] * len(input[0])
        return result


def test_the_runner_tries_small_chunks_where_a_port_has_them(capsys):
    assert run_port.main(generate.Plain())
    out = capsys.readouterr().out
    assert "3_linear_loss.json" in out and "chunk" not in out
    assert not run_port.main(DropsTheLastChunk())
    wrong = [line for line in capsys.readouterr().out.splitlines() if "chunk" in line]
    assert {name for name in STORED if any(line.startswith(name) for line in wrong)} == {
        "3_linear_loss.json", "7_tail.json"}
    assert not any("{'chunk': 1}" in line for line in wrong)


def test_the_runner_says_what_is_missing_and_leaves_out_what_cannot_be(capsys):
    class Begun:
        angle_between, EPS = generate.Plain().angle_between, {"float32": 2.0**-23}

    assert run_port.main(Begun())
    assert "1_recording.json waits for record_topk" in (out := capsys.readouterr().out)
    angles = sum(case["dtype"] != "float64" for case in STORED["4_angle.json"])
    assert f"4_angle.json {angles} of {angles} pass" in out
    port = generate.Plain()
    everything = len(list(run_port.cases("2_loss.json", port)))
    port.REFUSES = False
    refusals = sum("error" in case["expected"] for case in STORED["2_loss.json"])
    assert len(list(run_port.cases("2_loss.json", port))) == everything - 2 * refusals


def test_the_runner_tells_a_refusal_from_an_error_and_from_silence():
    case = next(case for case in STORED["2_loss.json"] if case["expected"].get("error") == "target")
    for raised, wrong in ((ValueError("target 7"), False), (ValueError("math domain error"), True),
                          (KeyError("target"), True), (None, True)):
        class Port:
            def replay_cross_entropy(self, logits, *_):
                if raised:
                    raise raised
                return 0.0, logits

            outside_mass = replay_cross_entropy

        assert bool(run_port.failures("2_loss.json", Port(), case, "float64", {})) == wrong


def test_the_runner_takes_files_dtypes_and_fuzz(capsys, monkeypatch):
    fuzzed = []
    monkeypatch.setattr(fuzz, "failures", lambda port, dtypes: fuzzed.append(dtypes) or ["wrong"] * 20)

    def ran(*arguments):
        right = run_port.main(generate.Plain(), *arguments)
        out = capsys.readouterr().out
        assert right == ("fuzz" not in arguments) and out.count("wrong") == (0 if right else 10)
        return {name[0]: int(count) for name, count in re.findall(r"(\w+\.json) \d+ of (\d+) pass in \d+\.\d s", out)}

    of = lambda number, *dtypes: sum(number in name and dtype in dtypes for name in STORED
                                     for _, dtype, _ in run_port.cases(name, generate.Plain()))
    assert ran("4", "5") == {"4": of("4_", *compare.EPS), "5": of("5_", *compare.EPS)}
    assert ran("float32", "4") == {"4": of("4_", "float32")} and fuzzed == []
    assert ran("4", "fuzz", "float64") == {"4": of("4_", "float64")}
    assert ran("fuzz") == {} and fuzzed == [["float64"], ["float64", "float32"]]
    for unknown in "10", "float16", "fuz":
        with pytest.raises(ValueError, match=unknown):
            ran("4", unknown)


def test_the_runner_gives_every_call_of_a_case_its_own_inputs(capsys):
    """A port that overwrites lists and arrays is told so, and the next case has what is in the file."""
    class Overwrites(generate.Plain):
        def replay_cross_entropy(self, logits, target, token_ids, *rest):
            result = super().replay_cross_entropy(logits, target, token_ids, *rest)
            target[0] = 0 if lists else target[0]
            token_ids[-1].append(0) if lists else logits.fill(0)
            return result

    for lists, message in ((True, "overwrote a list"), (False, "overwrote an array of shape (4, 7)")):
        for case, dtype, chunk in run_port.cases("2_loss.json", Overwrites()):
            lines = run_port.failures("2_loss.json", Overwrites(), case, dtype, chunk)
            assert lines or "error" in case["expected"]
            assert case in STORED["2_loss.json"]
        assert not run_port.main(Overwrites(), "2") and message in capsys.readouterr().out


@pytest.mark.parametrize("port", [generate.Plain, Torch])
def test_the_fuzz_finds_a_running_sum_that_is_off_by_a_bit(port):
    assert fuzz.failures(port(), compare.EPS, 300) == []

    class Excluded(port):
        def record_topk(self, logits, target, tau, max_size, ignore_index):
            """cumsum - p < tau, which is not the sum before p."""
            p = np.array(calls.lists(self.softmax(logits))[0])
            order = (-p).argsort(kind="stable")
            taken = order[(p[order].cumsum() - p[order] < tau)][:max_size].tolist()
            gold = int(target[0])
            return [sorted(taken if gold in taken else [*taken[:(max_size or len(p) + 1) - 1], gold])], [], []

    assert 0 < len(fuzz.failures(Excluded(), compare.EPS, 3000)) < 60


def test_the_fuzz_reports_a_port_that_raises():
    class Raises(generate.Plain):
        def record_topk(self, logits, *rest):
            if logits.shape[1] == 65:
                raise KeyError("sixty-five")
            return super().record_topk(logits, *rest)

    found = fuzz.failures(Raises(), ["float32"], 60)
    assert 0 < len(found) < 30 and all("KeyError, 'sixty-five'" in line for line in found)
    assert "softmax" in fuzz.failures(object(), ["float64"], 1)[0]


# -------------------------------------------------------------------------------------------- what the vectors can see

def test_every_wrong_variant_is_caught():
    lines = check_holes.main()
    assert len(lines) > 500 and all(": caught by " in line for line in lines)


def test_a_variant_that_no_vector_sees_is_an_error(monkeypatch):
    same = ("a variant that changes nothing", check_holes.BOTH, "import math", "import math  # here")
    monkeypatch.setattr(check_holes, "VARIANTS", {"4_angle.json": [same]})
    with pytest.raises(AssertionError, match="a variant that changes nothing: caught in {}"):
        check_holes.main()


def test_the_plain_reference_is_linear_in_the_vocabulary():
    """Counted, not timed: looks at a row by softmax, Stage 0 and the loss, for twice the tokens."""
    def looks(V):
        count = 0

        class Row(list):
            def __getitem__(self, j):
                nonlocal count
                count += 1
                return super().__getitem__(j)

            def __iter__(self):
                nonlocal count
                for x in super().__iter__():
                    count += 1
                    yield x

        plain_reference.softmax(Row([0.0] * V))
        rows, _ = plain_reference.record_topk([Row([1 / V] * V)], [V - 1], 1.0)
        plain_reference.replay_cross_entropy([Row([0.0] * V)], [V - 1], [Row(rows[0])])
        return count

    assert looks(2000) <= 2.01 * looks(1000)
