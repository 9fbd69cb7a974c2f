"""The training script's parts: lossless tokenizer, disjoint splits, guarded SQL, cached decoding, runs that survive."""

import json
import random
import re
import sys

import pytest
import torch
from hypothesis import given, strategies as st

import train_small as script

TOKENIZER = script.Tokenizer(" SELECT name FROM site WHERE city = 'Oslo' AND height > 30 how many sites are there\n" * 3, 300)


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


def test_every_form_stands_in_both_splits_and_no_question_in_two(split):
    train, test = split
    assert not {q for q, _ in train} & {q for q, _ in test}
    assert len({q for q, _ in train + test}) == len(train) + len(test)
    shapes = [{sql.split("'")[0].split(" > ")[0].split(" < ")[0].split()[1] for _, sql in part} for part in split]
    assert shapes[0] >= shapes[1] and len(test) >= len(script.FORMS)


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
    "SELECT load_extension('x')", "SELECT randomblob(1000000000)", "SELECT name FROM site; DROP TABLE site", "nonsense", "",
    "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT COUNT(*) FROM r",
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
    for question, answer in zip(questions, script.generate(model, TOKENIZER, questions, torch.device("cpu"))):
        ids = TOKENIZER.encode(script.prompt(question))
        start = len(ids)
        while len(ids) < script.CONTEXT and TOKENIZER.end not in ids[start:]:
            with torch.no_grad():
                ids.append(int((model(torch.tensor([ids]))[0, -1] @ model.embedding.weight.T).argmax()))
        assert answer == TOKENIZER.decode([i for i in ids[start:] if i != TOKENIZER.end]).strip()


def test_runs_are_kept_across_an_interruption_and_reused(tmp_path, monkeypatch, capsys):
    tiny = dict(script.BASE, steps=2, batch=3, schemas=3, sql_examples=50)
    monkeypatch.setattr(script, "QUICK_BASE", tiny)
    monkeypatch.setattr(script, "FORMS", dict(list(script.FORMS.items())[:3]))
    plain = " ".join(q + " " + sql for sql, questions in script.FORMS.items() for q in questions)
    names = " ".join(re.findall("[A-Za-z]+", f"{script.SPOKEN} {script.TELECOM} {script.OPERATORS} {script.AGGREGATES}"))
    documents = {f"d{i}": f"Question: {plain} {names} " * 3 for i in range(20)}
    monkeypatch.setattr(script, "general_documents", lambda: documents)
    monkeypatch.setattr(sys, "argv", ["train_small.py", "--quick", "--device", "cpu", "--tau", "0.5", "--out", str(tmp_path)])
    finetune, calls = script.finetune, []

    def interrupted(model, method, *rest):
        calls.append(method)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return finetune(model, method, *rest)

    monkeypatch.setattr(script, "finetune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.main()
    script.main()
    assert calls == [*script.METHODS[:3], *script.METHODS[2:]]  # the third was interrupted: it and the fourth ran again
    script.main()
    assert len(calls) == 5
    results = json.loads((tmp_path / "quick" / "results.json").read_text())
    assert set(results) == {"config", "base", "runs"} and [run["method"] for run in results["runs"]] == list(script.METHODS)
    assert {"method", "seed", "domain_nll", "domain_accuracy", "general_nll", "forgetting", "step_ms", "head_ms", "stage0_s", "total_s",
            "subset_size_mean", "outside_mass_start", "outside_mass_end", "angle_mean_deg", "clip_fraction"} <= set(results["runs"][0])
    for run in results["runs"]:
        assert run["forgetting"] == run["general_nll"] - results["base"]["general_nll"]
    assert "| replay+moclip |" in capsys.readouterr().out


@pytest.mark.parametrize("method, record_at, recorded_at, replayed", [
    ("replay+adamw", [0, 2, 4], [2, 4], 5), ("replay+moclip", [3], [3], 2), ("replay+adamw", [0], [], 5), ("full+moclip", [0, 2], [], 0)])
def test_stage_0_runs_where_it_is_asked_for(method, record_at, recorded_at, replayed, split, monkeypatch):
    torch.manual_seed(0)
    model = script.Model()
    data = script.encode_domain(TOKENIZER, [(q[:20], sql[:10]) for q, sql in split[0][:8]])
    stage0, replay_loss, events = script.stage0, script.linear_replay_cross_entropy, []
    first = stage0(model, *data, 0.5, torch.device("cpu"))

    def recording(*args):
        events.append(stage0(*args))
        return events[-1]

    def replaying(*args):
        events.append("replay")
        return replay_loss(*args)

    monkeypatch.setattr(script, "stage0", recording)
    monkeypatch.setattr(script, "linear_replay_cross_entropy", replaying)
    args = script.SimpleNamespace(lr=1e-2, max_angle=90.0, steps=5, batch=4, tau=0.5, record_at=record_at)
    probed = []
    out = script.finetune(model, method, data, first, lambda model, record: probed.append(record) or 0.0, args, 0, torch.device("cpu"))
    assert events.count("replay") == replayed
    records = [event for event in events if event != "replay"]
    # the steps before a recording are those that are not left after it
    assert [5 - events[events.index(r):].count("replay") for r in records] == recorded_at and (out["stage0_s"] > 0) == bool(records)
    last = records[-1] if records else first
    assert probed[0] is first and probed[-1] is last  # the outside mass is that of the record in use
    assert not any(torch.equal(record.token_ids, first.token_ids) for record in records)  # of the model as it was then
    assert out["subset_size_mean"] == (last.subset_sizes.float().mean().item() if method[0] == "r" else script.V)


@pytest.mark.parametrize("option, value", [("--tau", "1.5"), ("--max-angle", "181"), ("--lr", "nan"), ("--steps", "0"), ("--batch", "0"), ("--record-at", "200")])
def test_bad_options_are_refused_before_anything_is_computed(option, value, monkeypatch, capsys):
    monkeypatch.setattr(script, "prepare", None)
    monkeypatch.setattr(sys, "argv", ["train_small.py", option, value])
    with pytest.raises(SystemExit):
        script.main()
    assert re.search(f"error: .*{option} ", capsys.readouterr().err)
