"""The training script's parts: lossless tokenizer, disjoint splits, guarded SQL, cached decoding, runs that survive."""

import copy
import itertools
import json
import math
import random
import re
import sys

import pytest
import torch
from hypothesis import given, strategies as st

import train_small as script

TOKENIZER = script.Tokenizer(
    " SELECT name FROM site WHERE city = 'Oslo' AND height > 30 how many sites are there\n" * 3, 300)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def database():
    return script.Database(random.Random(0))


@pytest.fixture(scope="module")
def split(database):
    return script.domain_split(random.Random(1), database, 40)


@given(st.text(st.characters(codec=None)))
def test_tokenizer_is_lossless(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.lists(st.integers(0, script.V - 1)))
def test_whatever_a_model_generates_decodes(ids):
    TOKENIZER.decode(ids).encode(errors="surrogatepass")


def test_frequent_words_are_single_tokens():
    assert len(TOKENIZER.encode(" SELECT name")) == 2


def test_no_question_stands_in_two_parts(split):
    assert all(len(part) >= len(script.FORMS) for part in split)
    assert len({question for part in split for question, _ in part}) == sum(map(len, split))


@pytest.mark.parametrize("sql", script.FORMS)
def test_of_every_form_one_question_in_eight_is_for_validation_and_one_for_the_test(sql, database, monkeypatch):
    monkeypatch.setattr(script, "FORMS", {sql: script.FORMS[sql]})
    train, validation, test = map(len, script.domain_split(random.Random(0), database, 40))
    total = train + validation + test
    assert 24 <= total <= 40 and validation == test == total // 8


@pytest.mark.parametrize("sql", script.FORMS)
def test_every_form_has_enough_distinct_questions_to_be_split(sql, database):
    rng = random.Random(0)
    pairs = dict(script.ask(rng, sql, script.TELECOM, script.SPOKEN) for _ in range(600))
    assert len(pairs) >= 40
    for gold in list(pairs.values())[:20]:
        assert database.rows(gold) is not None


@pytest.mark.parametrize("sql", [
    "DROP TABLE site", "DELETE FROM site", "INSERT INTO site SELECT * FROM site", "UPDATE site SET city = 'x'",
    "CREATE TABLE x (y)", "ATTACH DATABASE '/tmp/x.db' AS x", "PRAGMA writable_schema = 1", "VACUUM INTO '/tmp/x.db'",
    "SELECT load_extension('x')", "SELECT randomblob(1000000000)", "SELECT name FROM site; DROP TABLE site", "nonsense",
    "", "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT COUNT(*) FROM r",
    "SELECT COUNT(*) FROM alarm a, alarm b, alarm c, alarm d, alarm e", "SELECT 'a\0b"])
def test_sql_that_writes_or_runs_away_is_stopped(sql, database):
    before = database.rows("SELECT * FROM site")
    assert not database.rows(sql)
    assert database.rows("SELECT * FROM site") == before and len(before) == 40


def test_rows_are_capped(database):
    assert len(database.rows("SELECT 1 FROM alarm a, alarm b")) == 1000


def test_agreement_is_about_rows_and_about_order_only_where_asked(database):
    assert database.agrees("SELECT name FROM site ORDER BY name DESC", "SELECT name FROM site")
    assert not database.agrees("SELECT name FROM site ORDER BY name DESC", "SELECT name FROM site ORDER BY name ASC")
    assert not database.agrees("SELECT DISTINCT city FROM site", "SELECT city FROM site")
    assert not database.agrees("SELECT nothing FROM nowhere", "SELECT name FROM site")


def test_only_the_sql_and_its_end_are_scored():
    tokens, targets = script.encode_domain(TOKENIZER, [("how many", "SELECT name"), ("x", "SELECT name FROM site")])
    for row, (question, sql) in zip(range(2), [("how many", "SELECT name"), ("x", "SELECT name FROM site")]):
        scored = targets[row][targets[row] != script.IGNORE].tolist()
        assert TOKENIZER.decode(scored[:-1]) == " " + sql and scored[-1] == TOKENIZER.end
        first = (targets[row] != script.IGNORE).nonzero()[0, 0]
        assert TOKENIZER.decode(tokens[row, :first + 1].tolist()) == script.prompt(question)
        assert torch.equal(tokens[row, first + 1:first + len(scored)], targets[row, first:first + len(scored) - 1])


def test_decoding_with_kept_keys_equals_decoding_from_scratch():
    torch.manual_seed(0)
    model, questions = script.Model(), ["how many sites", "city", "how many Oslo"]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # sharper logits: no near-ties for rounding to decide
    for question, answer in zip(questions, script.generate(model, TOKENIZER, questions, CPU)):
        ids = TOKENIZER.encode(script.prompt(question))
        start = len(ids)
        while len(ids) < script.CONTEXT and TOKENIZER.end not in ids[start:]:
            with torch.no_grad():
                ids.append(int((model(torch.tensor([ids]))[0, -1] @ model.embedding.weight.T).argmax()))
        assert answer == TOKENIZER.decode([i for i in ids[start:] if i != TOKENIZER.end]).strip()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The whole script on a base of 600 tokens and two steps and on three forms, as if called with --quick."""
    monkeypatch.setattr(script, "V", 600)
    monkeypatch.setattr(script, "QUICK_BASE", dict(script.BASE, steps=2, batch=3, schemas=3, sql_examples=50))
    monkeypatch.setattr(script, "FORMS", dict(list(script.FORMS.items())[:3]))
    plain = " ".join(q + " " + sql for sql, questions in script.FORMS.items() for q in questions)
    spoken = f"{script.SPOKEN} {script.TELECOM} {script.OPERATORS} {script.AGGREGATES}"
    names = " ".join(re.findall("[A-Za-z]+", spoken))
    documents = {f"d{i}": f"Document {i}: {plain} {names} " * 3 for i in range(20)}
    monkeypatch.setattr(script, "general_documents", lambda: documents)
    options = "train_small.py --quick --device cpu --tau 0.1 --tail 8 --out".split()
    monkeypatch.setattr(sys, "argv", [*options, str(tmp_path)])
    return tmp_path / "quick"


def test_runs_are_kept_across_an_interruption_and_reused(tiny, monkeypatch, capsys):
    finetune, calls, starts = script.finetune, [], set()

    def interrupted(model, method, *rest):
        calls.append(method)
        starts.add(script.fingerprint(model.state_dict()))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return finetune(model, method, *rest)

    monkeypatch.setattr(script, "finetune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.main()
    script.main()
    assert calls == [*script.METHODS[:3], *script.METHODS[2:]]  # the third was interrupted: it ran again
    script.main()
    assert len(calls) == len(script.METHODS) + 1
    results = json.loads((tiny / "results.json").read_text())
    assert starts == {results["base"]["fingerprint"]}  # all start from one base
    assert set(results) == {"config", "base", "runs"}
    assert [run["method"] for run in results["runs"]] == list(script.METHODS)
    assert {"method", "seed", "base", "domain_nll", "domain_accuracy", "general_nll", "forgetting", "step_ms",
            "head_ms", "stage0_s", "total_s", "subset_size_mean", "outside_mass_start", "outside_mass_end",
            "angle_mean_deg", "clip_fraction"} <= set(results["runs"][0])
    for run in results["runs"]:
        assert run["forgetting"] == run["general_nll"] - results["base"]["general_nll"]
        assert run["base"] == results["base"]["fingerprint"] and len(run["base"]) == 16
        assert (run["stage0_s"] == 0) == run["method"].startswith("full")  # one Stage 0, paid for by those that use it
        assert (run["angle_mean_deg"] is None) == run["method"].endswith("adamw")
    table = capsys.readouterr().out.rsplit("\nmethod", 1)[1]
    assert "\nreplay+moclip  " in table and max(map(len, table.splitlines())) <= 120
    for method in ("gold", "base", *script.METHODS):
        assert table.count(f"\n  {method:14}") == 3  # three questions, answered by each


def test_what_happens_is_said_before_it_happens_also_where_output_is_no_terminal(tiny, monkeypatch, capsys):
    said = []

    def noting(name):
        function = getattr(script, name)

        def called(*args, **kwargs):
            said.append((name, capsys.readouterr().out.splitlines()[-1]))
            return function(*args, **kwargs)
        monkeypatch.setattr(script, name, called)

    for name in ("prepare", "pretrain", "stage0", "finetune"):
        noting(name)
    measured = {"general_nll": 0.0, "samples": ["", "", ""]}
    monkeypatch.setattr(script, "evaluate", lambda model, data, device: measured)
    script.main()
    notices = dict(said)
    assert [name for name, _ in said] == ["prepare", "pretrain", "stage0"] + ["finetune"] * 6
    assert "corpora" in notices["prepare"] and "pretraining the base: 2 steps" in notices["pretrain"]
    assert "recording" in notices["stage0"] and "tail+moclip, seed 0, 5 steps" in notices["finetune"]
    assert all(re.search(r"about \d+ (s|minutes) on 2 cores", notice) for _, notice in said)


def test_the_base_seed_shapes_data_and_base(tiny, monkeypatch):
    evaluated, arguments = [], [*sys.argv, "--methods", "full+adamw", "--base-seed"]
    measured = {"general_nll": 0.0, "domain_nll": 0.0, "domain_accuracy": 0.0, "samples": ["", "", ""]}
    monkeypatch.setattr(script, "evaluate", lambda model, data, device: evaluated.append(data) or dict(measured))
    bases = []
    for seed in ("0", "1"):
        monkeypatch.setattr(sys, "argv", [*arguments, seed])
        script.main()
        results = json.loads((tiny / "results.json").read_text())
        assert results["config"]["base"] == dict(script.QUICK_BASE, seed=int(seed))
        bases.append(results["base"])
    assert bases[0]["key"] != bases[1]["key"] and bases[0]["fingerprint"] != bases[1]["fingerprint"]
    first, last = evaluated[0], evaluated[-1]
    assert first.test != last.test
    assert first.database.rows("SELECT * FROM site") != last.database.rows("SELECT * FROM site")
    # every document of the general text is in one part: for training, for choices or for the report
    parts = [set(re.findall(r"Document (\d+)", first.tokenizer.decode(ids.flatten().tolist())))
             for ids in (first.streams[0], first.general_validation[0], first.general_test[0])]
    assert all(parts) and sum(map(len, parts)) == len(set.union(*parts)) == 20


def test_each_part_is_evaluated_on_its_own_questions_and_text(database, monkeypatch):
    data = script.SimpleNamespace(tokenizer=None, database=database, **{
        part: [(part, f"SELECT COUNT(*) FROM {table}")] for part, table in (("validation", "site"), ("test", "cell"))})
    for part in ("validation", "test"):
        for kind in ("domain", "general"):
            setattr(data, f"{kind}_{part}", (f"{kind} {part}", None))
    monkeypatch.setattr(script, "generate", lambda model, tokenizer, questions, device: [
        "SELECT COUNT(*) FROM site" if q == "validation" else "SELECT 1" for q in questions])
    monkeypatch.setattr(script, "nll", lambda model, tokens, targets, device: tokens)
    for part, accuracy in (("validation", 1.0), ("test", 0.0)):
        found = script.evaluate(None, data, CPU, part)
        assert found["domain_accuracy"] == accuracy
        assert (found["domain_nll"], found["general_nll"]) == (f"domain {part}", f"general {part}")
    assert script.evaluate(None, data, CPU)["domain_nll"] == "domain test"


def test_the_table_fits_a_terminal_and_shows_the_spread_below_the_mean(capsys):
    base = {"method": "base", "domain_accuracy": 0.001, "domain_nll": 4.25}
    wide = {"domain_accuracy": 1.0, "forgetting": -10.125, "domain_nll": 10.25, "outside_mass_end": 0.5,
            "step_ms": 12345.0, "head_ms": 12345.0, "stage0_s": 1234.5, "total_s": 12345.5,
            "angle_mean_deg": 180.0, "clip_fraction": 1.0}
    runs = [{**wide, "method": method, "seed": seed, "domain_nll": 10.25 + seed}
            for seed in (0, 2) for method in script.METHODS]
    script.print_table(base, runs)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120 and len(lines) == 2 + 2 * len(script.METHODS)
    assert lines[1].split() == ["base", "0.1%", "-", "4.250", *"-------"]
    assert lines[2].split()[:4] == ["full+adamw", "100.0%", "-10.125", "11.250"]
    assert lines[3].split()[:5] == ["±", "sd", "0.0%", "0.000", "1.414"]  # of 10.25 and 12.25: sqrt(2)


@pytest.fixture
def training(split):
    """A fresh model, eight examples and their record, and options of five small steps."""
    torch.manual_seed(0)
    model = script.Model()
    data = script.encode_domain(TOKENIZER, [(q[:20], sql[:10]) for q, sql in split[0][:8]])
    record = script.stage0(model, *data, 0.1, CPU)
    return model, data, record, script.SimpleNamespace(lr=1e-2, max_angle=90.0, steps=5, batch=4, tail=16)


def rows_by_hand(targets, batch):
    """The record's rows of a batch, counted one position at a time."""
    row_of, scored = {}, 0
    for i, t in itertools.product(*map(range, targets.shape)):
        if targets[i, t] != script.IGNORE:
            row_of[i, t], scored = scored, scored + 1
    return [row_of[i, t] for i in batch for t in range(targets.shape[1]) if (i, t) in row_of]


@pytest.mark.parametrize("method", script.METHODS)
def test_a_method_scores_its_batch_against_the_rows_of_its_record(method, training, monkeypatch):
    model, data, record, args = training
    batches = list(itertools.islice(script.domain_batches(data[1], args.batch, 3), args.steps))
    replay_loss, full_loss, seen = script.linear_replay_cross_entropy, script.F.linear_cross_entropy, []

    def replaying(hidden, head, gold, subsets, *, tail=None):
        seen.append((gold, subsets, tail))
        return replay_loss(hidden, head, gold, subsets, **({} if tail is None else {"tail": tail}))

    def full(hidden, head, gold):
        seen.append((gold, None, None))
        return full_loss(hidden, head, gold)

    monkeypatch.setattr(script, "linear_replay_cross_entropy", replaying)
    monkeypatch.setattr(script.F, "linear_cross_entropy", full)
    probed = []
    out = script.finetune(model, method, data, record, lambda *now: probed.append(now) or 0.25, args, 3, CPU)
    assert len(seen) == args.steps
    for batch, (gold, subsets, tail) in zip(batches, seen):
        rows = rows_by_hand(data[1], batch.tolist())
        assert gold.tolist() == [y for i in batch for y in data[1][i].tolist() if y != script.IGNORE]
        assert (subsets is None) == method.startswith("full") and (tail is not None) == method.startswith("tail")
        if subsets is not None:
            ids = [record.token_ids[record.offsets[t]:record.offsets[t + 1]].tolist() for t in rows]
            assert subsets.token_ids.tolist() == sum(ids, [])
    assert len(probed) == args.steps + 1 and all(now == (model, record) for now in probed)
    assert out["outside_mass_log"] == [[step, 0.25] for step in range(args.steps + 1)]
    sizes = record.subset_sizes.float().mean().item()
    assert out["subset_size_mean"] == (script.V if method.startswith("full") else sizes)
    assert (out["clip_fraction"] is not None) == method.endswith("moclip")


@pytest.mark.parametrize("method, optimizer", [
    ("full+adamw", lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.0)),
    ("full+moclip", lambda p: script.MoClip(p, 1e-2, max_angle=math.pi / 3))])
def test_finetuning_is_the_plain_loop(method, optimizer, training):
    model, (tokens, targets), record, args = training
    by_hand, args.max_angle = copy.deepcopy(model), 60.0
    script.finetune(model, method, (tokens, targets), record, lambda *now: 0.0, args, 3, CPU)
    optimizer, batches = optimizer(by_hand.parameters()), script.domain_batches(targets, args.batch, 3)
    for rate in (1, 4 / 4.5, 3 / 4.5, 2 / 4.5, 1 / 4.5):  # the warm-up is over at once
        optimizer.param_groups[0]["lr"], batch = 1e-2 * rate, next(batches)
        optimizer.zero_grad()
        logits = by_hand(tokens[batch]) @ by_hand.embedding.weight.T
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[batch].flatten()).backward()
        optimizer.step()
    for a, b in zip(model.parameters(), by_hand.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)  # of a step of 1e-2; sums in another order


def test_an_epoch_holds_every_example_once_in_another_order_each_time():
    targets = torch.full((50, 60), script.IGNORE)
    for i in range(50):
        targets[i, i // 2:i + 1] = 0  # of growing length
    batches = script.domain_batches(targets, 4, 0)
    epochs = [[next(batches).tolist() for _ in range(13)] for _ in range(2)]  # of 4, from 32 and 18 examples
    for epoch in epochs:
        assert sorted(sum(epoch, [])) == list(range(50)) and all(batch == sorted(batch) for batch in epoch)
    assert epochs[0] != epochs[1]


def test_what_is_measured_is_what_its_name_says(training):
    model, (tokens, targets), record, _ = training
    scored = targets != script.IGNORE
    with torch.no_grad():
        p = (model(tokens)[scored] @ model.embedding.weight.T).softmax(1)
    nll = -p[torch.arange(len(p)), targets[scored]].log().mean().item()
    assert script.nll(model, tokens, targets, CPU) == pytest.approx(nll, rel=1e-5)
    for t, ids in enumerate(record.token_ids.split(record.subset_sizes.tolist())):
        p[t, ids] = 0
    outside = p.sum(1).mean().item()
    assert script.outside_mass_probe(tokens, targets, CPU)(model, record) == pytest.approx(outside, rel=1e-5)
    assert (record.tau, len(record)) == (0.1, scored.sum())


def test_a_tail_method_draws_a_new_sample_every_step_the_same_for_the_same_seed(training, monkeypatch):
    model, data, record, args = training
    sample_tail, drawn = script.sample_tail, []

    def sampling(gold, vocab_size, size, **options):
        assert (vocab_size, size) == (script.V, args.tail)
        tail = sample_tail(torch.zeros_like(gold), vocab_size, size, **options)  # equal golds: only chance differs
        drawn[-1].append(tail.token_ids.tolist())
        return tail

    monkeypatch.setattr(script, "sample_tail", sampling)
    for seed in (3, 3, 4):
        drawn.append([])
        torch.rand(1)  # the global generator has no say
        script.finetune(copy.deepcopy(model), "tail+adamw", data, record, lambda *now: 0.0, args, seed, CPU)
    first, again, other = drawn
    assert first == again and len(set(map(tuple, first))) == args.steps
    assert not set(map(tuple, first)) & set(map(tuple, other))


def test_a_rival_brings_its_own_loss_and_optimizer(training):
    model, data, record, args = training
    calls, weight = [], model.norm.bias

    def score(hidden, head, gold, rows):
        calls.append((head is model.embedding.weight, len(hidden) == len(gold) == len(rows)))
        return hidden[:, 0].sum()

    before = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], 1.0)
    args.steps = 1
    out = script.finetune(model, "replay+moclip", data, record, lambda *now: 0.0, args, 0, CPU, score, optimizer)
    assert calls == [(True, True)] and out["angle_mean_deg"] is None
    moved = before - weight.detach()  # hidden = norm(x) + bias: only the first entry of the bias has a gradient
    assert moved[0] > 0 and not moved[1:].any()


def test_the_time_in_the_head_ends_after_its_own_gradient_and_before_the_body_s(training):
    model, data, record, args = training
    watch, order = script.Stopwatch(CPU), []
    hidden, gold = script.scored_hidden(model, *data, CPU)

    def score(hidden, head, gold, rows):
        W = head[torch.arange(0, script.V, 2)]  # a node of its own, made after `hidden`, as a sampled tail makes one
        W.grad_fn.register_hook(lambda *_: order.append(("head", len(watch.head_ms))))
        return (hidden @ W.T).logsumexp(1).mean() + F_linear(hidden, head, gold)

    F_linear = script.F.linear_cross_entropy
    model.norm.bias.register_hook(lambda _: order.append(("body", len(watch.head_ms))))
    with watch.step():
        watch.head(score)(hidden, model.embedding.weight, gold, None).backward()
    assert order == [("head", 0), ("body", 1)]
    assert 0 < watch.head_ms[0] < watch.step_ms[0]


@pytest.mark.parametrize("method", ["full+adamw", "replay+moclip"])
def test_every_step_is_timed(method, training, monkeypatch):
    model, data, record, args = training
    watches, Stopwatch = [], script.Stopwatch
    monkeypatch.setattr(script, "Stopwatch", lambda device: watches.append(Stopwatch(device)) or watches[-1])
    out = script.finetune(model, method, data, record, lambda *now: 0.0, args, 0, CPU)
    watch, = watches
    assert len(watch.step_ms) == len(watch.head_ms) == args.steps
    assert all(0 < head < step for head, step in zip(watch.head_ms, watch.step_ms))
    assert out["head_ms"] == sorted(watch.head_ms)[2] and out["step_ms"] == sorted(watch.step_ms)[2]
    assert out["steps_s"] == pytest.approx(sum(watch.step_ms) / 1e3)


@pytest.mark.parametrize("option, value", [
    ("--tau", "1.5"), ("--tail", "-1"), ("--max-angle", "181"), ("--lr", "nan"), ("--steps", "0"), ("--batch", "0"),
    ("--seeds", "-1"), ("--base-seed", "-1"), ("--base-seed", "2147483648"), ("--base-seed", "x"), ("--tail", "0.5")])
def test_bad_options_are_refused_before_anything_is_computed(option, value, monkeypatch, capsys):
    monkeypatch.setattr(script, "prepare", None)
    monkeypatch.setattr(sys, "argv", ["train_small.py", option, value])
    with pytest.raises(SystemExit):
        script.main()
    assert re.search(f"error: .*{option}[: ]", capsys.readouterr().err)
