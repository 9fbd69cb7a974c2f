"""The training script's parts: lossless tokenizer, disjoint splits, guarded SQL, cached decoding, the anchor."""

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
CPU, SIZE = torch.device("cpu"), script.Size()


@pytest.fixture(scope="module")
def database():
    return script.Database(random.Random(0))


@pytest.fixture(scope="module")
def split(database):
    return script.domain_split(random.Random(1), database, 40)


@given(st.text(st.characters(codec=None)))
def test_tokenizer_is_lossless(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.lists(st.integers(0, SIZE.vocab_size - 1)))
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
    pairs = [("how many", "SELECT name"), ("x", "SELECT name FROM site")]
    tokens, targets = script.encode_domain(TOKENIZER, pairs, SIZE.context)
    for row, (question, sql) in zip(range(2), pairs):
        scored = targets[row][targets[row] != script.IGNORE].tolist()
        assert TOKENIZER.decode(scored[:-1]) == " " + sql and scored[-1] == TOKENIZER.end
        first = (targets[row] != script.IGNORE).nonzero()[0, 0]
        assert TOKENIZER.decode(tokens[row, :first + 1].tolist()) == script.prompt(question)
        assert torch.equal(tokens[row, first + 1:first + len(scored)], targets[row, first:first + len(scored) - 1])


def test_a_prompt_of_one_s_own_and_a_context_that_is_too_small():
    tokens, targets = script.encode_domain(TOKENIZER, [("x", "SELECT")], 10, "Ask {}:".format)
    assert TOKENIZER.decode(tokens[0, :(targets[0] == script.IGNORE).sum() + 1].tolist()) == "Ask x:"
    with pytest.raises(ValueError, match="pairs: an example of .* tokens does not fit the context of 3"):
        script.encode_domain(TOKENIZER, [("x", "SELECT")], 3)


def sharp_model(size=SIZE):
    """Weights three times as large: no near-ties for rounding to decide, no next token by mere luck."""
    torch.manual_seed(0)
    model = script.Model(size)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model.eval()


def from_scratch(model, ids):
    """The next token's probabilities (B, V) after `ids` (B, T), with nothing kept from one position to the next."""
    with torch.no_grad():
        return (model(ids)[:, -1] @ model.embedding.weight.T).softmax(-1)


def test_decoding_with_kept_keys_equals_decoding_from_scratch():
    model, questions = sharp_model(), ["how many sites", "city", "how many Oslo"]
    data = script.SimpleNamespace(tokenizer=TOKENIZER, prompt="Q {}:".format, context=30)
    for question, answer in zip(questions, script.generate(model, data, questions, CPU)):
        ids = TOKENIZER.encode(f"Q {question}:")
        start = len(ids)
        while len(ids) < 30 and TOKENIZER.end not in ids[start:]:
            ids.append(int(from_scratch(model, torch.tensor([ids])).argmax()))
        assert answer == TOKENIZER.decode([i for i in ids[start:] if i != TOKENIZER.end]).strip()


SMALL = script.Size(vocab_size=300, width=16, layers=2, heads=2, context=6)


def test_written_text_is_sampled_from_the_whole_softmax_with_nothing_cut_and_nothing_forgotten():
    model, draw, seen = sharp_model(SMALL), torch.multinomial, []

    def multinomial(p, count, **options):
        seen.append((p, draw(p, count, **options)))
        return seen[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        text = script.write_text(model, 256, 8, CPU)
    assert text.shape == (8, SMALL.context + 1) and text.dtype == torch.int64 and len(seen) == SMALL.context
    for t, (p, new) in enumerate(seen, 1):
        # the same as from scratch: two float32 sums of SMALL.width terms in another order, and the softmax of them
        torch.testing.assert_close(p, from_scratch(model, text[:, :t]), rtol=100 * torch.finfo().eps, atol=0)
        assert torch.equal(new, text[:, t:t + 1])


def test_the_next_token_is_drawn_as_often_as_the_softmax_says():
    size, n = SMALL._replace(vocab_size=260, context=1), 40000
    model = sharp_model(size)
    with torch.no_grad():
        model.embedding.weight.mul_(4)  # probabilities from 1e-4 to 0.1: neither uniform nor certain
    text = script.write_text(model, 256, 2 * n, CPU)
    p = from_scratch(model, torch.tensor([[256]]))[0].double()
    assert p.max() > 4 / 260
    counts = text[:n, 1].bincount(minlength=260)
    chi2 = ((counts - n * p) ** 2 / (n * p)).sum().item()  # mean 259, variance about 2 x 259
    assert abs(chi2 - 259) < 6 * math.sqrt(2 * 259)


def test_half_of_the_windows_begin_with_the_end_of_text_and_half_with_any_token():
    model = sharp_model(SMALL._replace(context=1))
    text = script.write_text(model, 256, 6000, CPU)
    assert (text[:3000, 0] == 256).all()
    counts = text[3000:, 0].bincount(minlength=300)  # 10 expected of each
    assert len(counts) == 300 and abs(((counts - 10) ** 2 / 10).sum().item() - 299) < 6 * math.sqrt(2 * 299)
    torch.rand(1)  # the global generator has no say
    assert torch.equal(text, script.write_text(model, 256, 6000, CPU))
    assert not torch.equal(text, script.write_text(model, 256, 6000, CPU, seed=1))


MEASURED = {"general_nll": 0.0, "other_nll": 0.0, "domain_nll": 0.0, "domain_accuracy": 0.0, "samples": ["", "", ""]}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The whole script on a base of 600 tokens and two steps and on three forms, as if called with --quick."""
    prepare, size = script.prepare, script.Size(vocab_size=600)
    monkeypatch.setattr(script, "prepare", lambda *rest, windows: prepare(*rest, size, windows))
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


def test_the_whole_run(tiny, monkeypatch, capsys):
    starts, finetune, seconds = set(), script.finetune, itertools.count()

    def started(model, *rest):
        starts.add(script.fingerprint(model.state_dict()))
        return finetune(model, *rest)

    monkeypatch.setattr(script, "finetune", started)
    monkeypatch.setattr(script, "clock", lambda device: next(seconds))  # each reading a second after the one before
    script.main()
    results = json.loads((tiny / "results.json").read_text())
    assert starts == {results["base"]["fingerprint"]}  # all start from one base
    assert set(results) == {"config", "base", "runs"}
    assert [run["method"] for run in results["runs"]] == list(script.METHODS)
    assert {"method", "seed", "base", "domain_nll", "domain_accuracy", "general_nll", "other_nll", "forgetting",
            "forgetting_sql", "step_ms", "stage0_s", "total_s", "subset_size_mean", "outside_mass_start",
            "outside_mass_end", "angle_mean_deg", "clip_fraction"} <= set(results["runs"][0])
    for run in results["runs"]:
        assert run["forgetting"] == run["general_nll"] - results["base"]["general_nll"]
        assert run["forgetting_sql"] == run["other_nll"] - results["base"]["other_nll"]
        assert run["base"] == results["base"]["fingerprint"] and len(run["base"]) == 16
        # one Stage 0, paid for by those that use it; the anchor's comes on top
        assert run["stage0_s"] == {"full": 0, "replay": 1, "tail": 1, "anchor": 2}[run["method"].split("+")[0]]
        assert run["total_s"] == run["stage0_s"] + run["steps_s"] and run["steps_s"] == results["config"]["steps"]
        assert (run["angle_mean_deg"] is None) == run["method"].endswith("adamw")
    table = capsys.readouterr().out.rsplit("\nmethod", 1)[1]
    assert "\nreplay+moclip " in table and max(map(len, table.splitlines())) <= 120
    for method in ("gold", "base", *script.METHODS):
        assert table.count(f"\n  {method:14}") == 3  # three questions, answered by each


def test_finished_runs_survive_an_interruption_and_the_base_is_not_pretrained_again(tiny, monkeypatch):
    pretrain, calls, bases = script.pretrain, [], []

    def interrupted(model, method, *rest):
        calls.append(method)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"steps_s": 0.0}

    monkeypatch.setattr(script, "finetune", interrupted)
    monkeypatch.setattr(script, "print_table", lambda *rest: None)
    monkeypatch.setattr(script, "evaluate", lambda model, data, device: dict(MEASURED))
    monkeypatch.setattr(script, "pretrain", lambda *rest: bases.append(1) or pretrain(*rest))
    with pytest.raises(KeyboardInterrupt):
        script.main()
    assert [run["method"] for run in json.loads((tiny / "results.json").read_text())["runs"]] == calls[:2]
    script.main()
    assert len(bases) == 1 and len(list(tiny.iterdir())) == 2  # the base and the results, no leftovers


@pytest.mark.parametrize("kind", ["own", "given"])
def test_the_anchor_s_text_is_shown_and_recorded_in_stage_0(kind, tiny, monkeypatch, capsys):
    prepared, anchors = [], []
    prepare, record_anchor = script.prepare, script.record_anchor
    monkeypatch.setattr(script, "prepare", lambda *a, **k: prepared.append(prepare(*a, **k)) or prepared[0])
    monkeypatch.setattr(script, "record_anchor", lambda model, text, device: anchors.append(
        (text, record_anchor(model, text, device))) or anchors[0][1])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--methods", "anchor+adamw", "--anchor-text", kind])
    monkeypatch.setattr(script, "finetune", lambda model, method, *rest: {"steps_s": 0.0})
    monkeypatch.setattr(script, "evaluate", lambda model, data, device: dict(MEASURED))
    script.main()
    (text, (tokens, record)), data = anchors[0], prepared[0]
    assert text.shape == (8, SIZE.context + 1) and torch.equal(tokens, text[:, :-1])
    assert (len(record), record.tau) == (8 * SIZE.context, 0.98) and record.subset_sizes.max() == 32
    for ids, gold in zip(record.token_ids.split(record.subset_sizes.tolist()), text[:, 1:].flatten().tolist()):
        assert gold in ids
    shown = capsys.readouterr().out.splitlines()
    assert all(f"  {data.tokenizer.decode(ids.tolist())!r}" in shown for ids in (text[0], text[-1]))
    if kind == "own":
        assert torch.equal(text[:4, 0], torch.full((4,), data.tokenizer.end))
    else:  # windows of the streams of the pretraining: half prose, half SQL over other schemas
        for windows, stream in ((text[:4], data.streams[0]), (text[4:], data.streams[1])):
            there = stream.unfold(0, SIZE.context + 1, 1)
            assert all((there == window).all(1).any() for window in windows)


def test_without_windows_there_are_no_anchor_methods(tiny, monkeypatch):
    monkeypatch.setattr(script, "record_anchor", None)
    monkeypatch.setattr(script, "finetune", lambda model, method, *rest: {"steps_s": 0.0})
    monkeypatch.setattr(script, "evaluate", lambda model, data, device: dict(MEASURED))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--anchor", "0"])
    script.main()
    runs = json.loads((tiny / "results.json").read_text())["runs"]
    assert [run["method"] for run in runs] == list(script.METHODS[:6])


def test_what_happens_is_said_before_it_happens_also_where_output_is_no_terminal(tiny, monkeypatch, capsys):
    said = []

    def noting(name):
        function = getattr(script, name)

        def called(*args, **kwargs):
            said.append((name, capsys.readouterr().out.splitlines()[-1]))
            return function(*args, **kwargs)
        monkeypatch.setattr(script, name, called)

    for name in ("prepare", "pretrain", "stage0", "write_text", "finetune"):
        noting(name)
    monkeypatch.setattr(script, "evaluate", lambda model, data, device: dict(MEASURED))
    monkeypatch.setattr(script, "record_bytes", lambda record: 0)
    monkeypatch.setattr(script, "record_anchor", lambda *rest: script.SimpleNamespace(record=None))
    monkeypatch.setattr(script, "scorer", lambda *rest: lambda hidden, head, gold, rows: hidden.sum() + head.sum())
    script.main()
    notices = dict(said)
    assert [name for name, _ in said] == ["prepare", "pretrain", "stage0", "write_text"] + ["finetune"] * 8
    assert "corpora" in notices["prepare"] and "pretraining the base: 2 steps" in notices["pretrain"]
    assert "recording" in notices["stage0"] and "8 windows for the anchor, own text" in notices["write_text"]
    assert "anchor+moclip, seed 0, 5 steps" in notices["finetune"]
    assert all(re.search(r"about \d+ (s|minutes) on 2 cores", notice) for _, notice in said)


def test_the_base_seed_shapes_data_and_base(tiny, monkeypatch):
    evaluated, arguments = [], [*sys.argv, "--methods", "full+adamw", "--base-seed"]
    monkeypatch.setattr(script, "evaluate", lambda model, data, device: evaluated.append(data) or dict(MEASURED))
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


def test_other_schemas_are_those_of_nothing_else(tiny, monkeypatch):
    schemas, random_schema = [], script.random_schema
    monkeypatch.setattr(script, "random_schema", lambda *rest: schemas.append(random_schema(*rest)) or schemas[-1])
    # questions in so few words that many would be asked by chance over another schema as well
    monkeypatch.setattr(script, "FORMS", dict(list(script.FORMS.items())[:1]))
    data = script.prepare(script.QUICK_BASE, 8, windows=60)
    decode = lambda ids: data.tokenizer.decode(ids.tolist())
    seen = [text.partition("?\nSQL: ")[::2] for text in decode(data.streams[1]).split("Question: ")[1:]]
    assert len(seen) == 50
    parts = []
    for tokens, targets in (data.other_validation, data.other_test):
        scored = [decode(y[y != script.IGNORE]).strip() for y in targets]
        questions = [re.match(r"Question: (.*)\?\nSQL:", decode(x))[1] for x in tokens]
        parts.append(set(zip(questions, scored)))
        assert len(tokens) == 60 and not parts[-1] & set(seen)
    keys = [str(schema) for schema in schemas]
    assert len(keys) == 3 + 20 + 20 == len(set(keys))  # pretraining, validation, test: no schema in two of them
    tables = [{table for schema in part for table in schema} for part in (schemas[3:23], schemas[23:])]
    for pairs, names in zip(parts, tables):
        assert {sql.split()[-1] for _, sql in pairs} <= names
    assert not tables[0] >= tables[1] and not tables[1] >= tables[0]


def test_what_is_drawn_for_other_schemas_changes_nothing_else(tiny, monkeypatch):
    data = [script.prepare(script.QUICK_BASE, 8, windows=windows) for windows in (5, 40)]
    assert len(data[0].other_test[0]) == 5 and len(data[1].other_test[0]) == 40
    first, second = data
    assert first.fingerprint == second.fingerprint and first.test == second.test and first.train == second.train
    assert first.database.rows("SELECT * FROM cell") == second.database.rows("SELECT * FROM cell")


def test_each_part_is_evaluated_on_its_own_questions_and_text(database, monkeypatch):
    data = script.SimpleNamespace(tokenizer=None, database=database, **{
        part: [(part, f"SELECT COUNT(*) FROM {table}")] for part, table in (("validation", "site"), ("test", "cell"))})
    for part in ("validation", "test"):
        for kind in ("domain", "general", "other"):
            setattr(data, f"{kind}_{part}", (f"{kind} {part}", None))
    monkeypatch.setattr(script, "generate", lambda model, data, questions, device: [
        "SELECT COUNT(*) FROM site" if q == "validation" else "SELECT 1" for q in questions])
    monkeypatch.setattr(script, "nll", lambda model, tokens, targets, device: tokens)
    for part, accuracy in (("validation", 1.0), ("test", 0.0)):
        found = script.evaluate(torch.nn.Module(), data, CPU, part)
        assert found["domain_accuracy"] == accuracy
        assert all(found[f"{kind}_nll"] == f"{kind} {part}" for kind in ("domain", "general", "other"))
    assert script.evaluate(torch.nn.Module(), data, CPU)["domain_nll"] == "domain test"


def test_the_table_fits_a_terminal_and_has_a_row_for_every_run(capsys):
    base = {"method": "base", "domain_accuracy": 0.001, "domain_nll": 4.25}
    wide = {"domain_accuracy": 1.0, "forgetting": -10.125, "forgetting_sql": -10.25, "domain_nll": 10.25,
            "outside_mass_end": 0.5, "step_ms": 12345.0, "stage0_s": 1234.5, "total_s": 12345.5,
            "angle_mean_deg": 180.0, "clip_fraction": 1.0}
    runs = [{**wide, "method": method, "seed": seed} for seed in (0, 2) for method in script.METHODS]
    script.print_table(base, runs)
    lines = capsys.readouterr().out.splitlines()
    assert len(set(map(len, lines))) == 1 and len(lines[0]) <= 120 and len(lines) == 2 + 2 * len(script.METHODS)
    assert lines[1].split() == ["base", "0.1%", "-", "-", "4.250", *"------"]
    assert lines[2].split()[:5] == ["full+adamw", "100.0%", "-10.125", "-10.250", "10.250"]


@pytest.fixture
def training(split):
    """A fresh model, eight examples and their record, and options of five small steps."""
    torch.manual_seed(0)
    model = script.Model(script.Size(vocab_size=2000))
    data = script.encode_domain(TOKENIZER, [(q[:20], sql[:10]) for q, sql in split[0][:8]], SIZE.context)
    record = script.stage0(model, *data, 0.1, CPU)
    return model, data, record, script.SimpleNamespace(lr=1e-2, max_angle=90.0, steps=5, batch=4, tail=16,
                                                       anchor_step=2, anchor_weight=0.25)


@pytest.fixture
def anchor(training):
    """Five windows of seven tokens, and what the model of `training` says there."""
    return script.record_anchor(training[0], torch.randint(2000, (5, 8)), CPU)


def rows_by_hand(targets, batch):
    """The record's rows of a batch, counted one position at a time."""
    row_of, scored = {}, 0
    for i, t in itertools.product(*map(range, targets.shape)):
        if targets[i, t] != script.IGNORE:
            row_of[i, t], scored = scored, scored + 1
    return [row_of[i, t] for i in batch for t in range(targets.shape[1]) if (i, t) in row_of]


@pytest.mark.parametrize("method", script.METHODS)
def test_a_method_scores_its_batch_against_the_rows_of_its_record(method, training, anchor, monkeypatch):
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
    out = script.finetune(model, method, data, record, lambda *now: probed.append(now) or 0.25, args, 3, CPU, anchor)
    assert len(seen) == args.steps
    for batch, (gold, subsets, tail) in zip(batches, seen):
        rows = rows_by_hand(data[1], batch.tolist())
        assert gold.tolist() == [y for i in batch for y in data[1][i].tolist() if y != script.IGNORE]
        assert (subsets is None) == method.startswith("full")
        assert (tail is not None) == method.startswith(("tail", "anchor"))
        if subsets is not None:
            ids = [record.token_ids[record.offsets[t]:record.offsets[t + 1]].tolist() for t in rows]
            assert subsets.token_ids.tolist() == sum(ids, [])
    assert len(probed) == args.steps + 1 and all(now == (model, record) for now in probed)
    assert out["outside_mass_log"] == [[step, 0.25] for step in range(args.steps + 1)]
    sizes = record.subset_sizes.float().mean().item()
    assert out["subset_size_mean"] == (2000 if method.startswith("full") else sizes)
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
        assert (vocab_size, size) == (2000, args.tail)
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
    out = script.finetune(model, "replay+moclip", data, record, lambda *now: 0.0, args, 0, CPU, None, score, optimizer)
    assert calls == [(True, True)] and out["angle_mean_deg"] is None
    moved = before - weight.detach()  # hidden = norm(x) + bias: only the first entry of the bias has a gradient
    assert moved[0] > 0 and not moved[1:].any()


@pytest.mark.parametrize("method", ["full+adamw", "replay+moclip"])
def test_every_step_is_timed_and_nothing_but_the_steps(method, training, monkeypatch):
    model, data, record, args = training
    readings = iter([1, 1.5, 9, 9.25, 20, 21, 30, 30.125, 40, 42])  # seconds, at the start and the end of each step
    monkeypatch.setattr(script, "clock", lambda device: next(readings))
    out = script.finetune(model, method, data, record, lambda *now: 0.0, args, 0, CPU)
    assert next(readings, None) is None
    assert out["step_ms"] == 500 and out["steps_s"] == 0.5 + 0.25 + 1 + 0.125 + 2


def test_the_anchor_adds_its_weighted_kl_on_random_windows_to_the_tail_s_loss(training, anchor, monkeypatch):
    model, (tokens, targets), record, args = training
    kl, windows, said = script.linear_replay_kl_div, [], []

    def replaying(hidden, head, subsets):
        out = kl(hidden, head, subsets)
        said.append((hidden, subsets, out))
        return out

    monkeypatch.setattr(script, "linear_replay_kl_div", replaying)
    sample = script.sample_tail(torch.arange(20), 2000, args.tail)  # one for both methods: only the anchor differs
    monkeypatch.setattr(script, "sample_tail", lambda *rest, generator: sample)
    hidden, gold = script.scored_hidden(model, tokens, targets, CPU)
    head, rows = model.embedding.weight, torch.arange(len(record))
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(0.02 * torch.randn_like(p))
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        loss = script.scorer("anchor+adamw", record, args, generator, moved, anchor)(hidden, head, gold, rows)
        tail = script.scorer("tail+adamw", record, args, generator)(hidden, head, gold, rows)
        h, subsets, a = said[-1]
        assert loss.item() == pytest.approx((tail + 0.25 * a).item(), rel=1e-6) and a > 0
        # two distinct windows, read by the model of now, beside the rows that were recorded at their positions
        mine = moved(anchor.tokens).detach()
        two = [w for i in range(2) for w in range(5) if torch.allclose(h[7 * i:7 * i + 7], mine[w], atol=1e-5)]
        assert len(set(two)) == 2 and len(h) == 14
        kept = anchor.record.token_ids.split(anchor.record.subset_sizes.tolist())
        assert subsets.token_ids.tolist() == torch.cat([kept[7 * w + t] for w in two for t in range(7)]).tolist()
        windows += two
    assert set(windows) == set(range(5))


def test_the_anchor_s_loss_is_the_kl_on_the_recorded_tokens_and_zero_for_the_base(training, anchor):
    model, _, _, args = training
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(0.02 * torch.randn_like(p))
        z0, z1 = (m(anchor.tokens).flatten(0, 1) @ m.embedding.weight.T for m in (model, moved))
        kl = 0.0
        for t, ids in enumerate(anchor.record.token_ids.split(anchor.record.subset_sizes.tolist())):
            q0, q1 = z0[t, ids].double().log_softmax(0), z1[t, ids].double().log_softmax(0)
            kl += (q0.exp() * (q0 - q1)).sum().item() / len(z0)
        args.anchor_step = 5  # all of them
        for m, expected in ((moved, kl), (model, 0.0)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(script, "sample_tail", lambda *_, **__: None)
                patch.setattr(script, "linear_replay_cross_entropy", lambda *_, **__: 0.0)
                record = script.SimpleNamespace(select=lambda rows: None)
                score = script.scorer("anchor+adamw", record, args, torch.Generator(), m, anchor)
                found = score(None, m.embedding.weight, None, None)
            assert found.item() == pytest.approx(0.25 * expected, rel=1e-4, abs=1e-6)


def test_the_bytes_of_a_position_count_every_tensor(training, anchor):
    for record, each in ((training[2], 4), (anchor.record, 8)):  # an id, and where it is kept a log-probability
        size = (each * len(record.token_ids) + 8 * (len(record) + 1) + 4 * len(record)) / len(record)
        assert script.record_bytes(record) == size


@pytest.mark.parametrize("option, value", [
    ("--tau", "1.5"), ("--tau", "0"), ("--tail", "-1"), ("--anchor", "-1"), ("--anchor-weight", "nan"),
    ("--max-angle", "181"), ("--anchor-text", "x"), ("--lr", "nan"), ("--steps", "0"), ("--batch", "0"),
    ("--seeds", "-1"), ("--base-seed", "-1"), ("--base-seed", "2147483648"), ("--base-seed", "x"), ("--tail", "0.5")])
def test_bad_options_are_refused_before_anything_is_computed(option, value, monkeypatch, capsys):
    monkeypatch.setattr(script, "prepare", None)
    monkeypatch.setattr(sys, "argv", ["train_small.py", option, value])
    with pytest.raises(SystemExit):
        script.main()
    assert re.search(f"error: .*{option}[: ]", capsys.readouterr().err)
