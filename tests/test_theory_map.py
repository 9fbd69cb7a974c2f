"""THEORY.md and tests/test_theory_*.py name each other: no statement without a test, no test without a statement."""

import ast
import re
from pathlib import Path

import pytest
import torch

from experiments import theory
from logits_replay import record_topk

ROOT = Path(__file__).parent.parent
STATEMENTS = [f"R{i}" for i in range(1, 13)] + [f"M{i}" for i in range(1, 12)]


def sections(text):
    """{number: section text} of the numbered statements, headings of the form '## R1 Name'."""
    parts = re.split(r"^#{1,2} (?=\S)", text, flags=re.M)[1:]
    found = [(re.match(r"([RM]\d+) \S", part), part) for part in parts]
    numbers = [match[1] for match, _ in found if match]
    assert len(numbers) == len(set(numbers)), "a statement has two sections"
    return {match[1]: part for match, part in found if match}


def table_rows(number, pattern):
    """The rows of that statement's section of THEORY.md that match, as strings or tuples of strings."""
    return re.findall(pattern, sections((ROOT / "THEORY.md").read_text(encoding="utf-8"))[number], re.M)


def references(text):
    return set(re.findall(r"`(tests/test_\w+\.py::test_\w+)`", text))


def functions(path, source):
    return {f"tests/{path}::{node.name}" for node in ast.parse(source).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def complaints(text, tests):
    """What is missing or dangling, as a list of sentences; `tests` are the existing test functions."""
    found = sections(text)
    out = [f"{number} has no section" for number in STATEMENTS if number not in found]
    out += [f"{number} is not in the map" for number in STATEMENTS if not re.search(rf"^\| {number} \|", text, re.M)]
    for number, section in found.items():
        own = {test for test in references(section) if f"::test_{number.lower()}_" in test}
        out += [] if own else [f"{number} names no test of its own"]
        out += [f"{number} names {test}, which does not exist" for test in sorted(references(section) - tests)]
        out += [f"{number} lacks its '{word}'" for word in ("Assumptions.", "Statement.", "Proof.", "Status:", "Tests:")
                if f"**{word}" not in section]
    out += [f"{test} is named by no statement" for test in sorted(tests - references(text))]
    return out


@pytest.fixture(scope="module")
def text():
    return (ROOT / "THEORY.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tests():
    files = [ROOT / "tests" / f"test_theory_{name}.py" for name in ("replay", "moclip")]
    return set().union(*(functions(file.name, file.read_text(encoding="utf-8")) for file in files))


def test_every_statement_names_existing_tests_and_every_theory_test_is_named(text, tests):
    assert complaints(text, tests) == []


def test_the_check_itself_finds_each_kind_of_gap(text, tests):
    victim = min(t for t in tests if "::test_m4_" in t)
    assert f"{victim} is named by no statement" in complaints(text.replace(f"`{victim}`", ""), tests)
    assert any("does not exist" in c and "M4" in c for c in complaints(text, tests - {victim}))
    assert "tests/x.py::test_new is named by no statement" in complaints(text, tests | {"tests/x.py::test_new"})
    assert "R5 has no section" in complaints(text.replace("\n## R5 ", "\n## "), tests)
    assert "M10 names no test of its own" in complaints(text.replace("::test_m10_", "::test_m1_"), tests)
    assert "R2 is not in the map" in complaints(text.replace("| R2 |", "| |"), tests)


def advice(capsys, *options):
    theory.main(["--advise", *options])
    return capsys.readouterr().out


def test_advice_is_the_text_s_with_the_numbers_put_in(capsys):
    # s = 60000 / (60000 + 12 * 10 * 500) = 1/2, and R8 with a tail of V/50 and 4 epochs: 0.49 - 1/12 and 0.49 - 1/3
    options = "--vocab", "60000", "--width", "500", "--layers", "10", "--epochs", "4", "--batch", "32"
    lines = advice(capsys, *options)
    for expected in ("s = 50.0%", "recordings: 5 at most", "one saves 40.7%", "every epoch 15.7%", "V/50 = 1200 tokens",
                     "steps; 1.0% of all", "V/10 = 6000 tokens", "max_angle: 90 degrees"):
        assert expected in lines
    # M11: cos(60 deg) = 1/2 is zeta = 0.395; 75 degrees need 1.4 * 0.110, so 32 * 1.4 * 0.110 / 0.395 = 12.5: they idle
    # already; 45 degrees need 32 * 1.4 * 1.10 / 0.395 = 124.7, 60 degrees 1.4 times the batch
    lines = advice(capsys, *options, "--angles", "10", "60", "90", "--lr", "4e-4")
    for expected in ("75 degrees idles on noise from a batch of 13 on", "max_angle: 75 degrees", "0.00073 a step",
                     "60 degrees idles on noise from a batch of 45 on",
                     "45 degrees idles on noise from a batch of 125 on", "for 3 steps"):
        assert expected in lines
    assert "max_angle: 90 degrees" in advice(capsys, *options, "--angles", "91")
    assert "max_angle: 45 degrees" in advice(capsys, *options, "--angles", "0")
    assert "s = 25.0% of the operations (R8)" in advice(capsys, *options, "--parameters", "120000000")
    for line in lines.splitlines():  # and each says what it follows from
        assert re.search(r"\([RM]\d+|M7, M8", line), line


def test_advice_reads_a_record_and_leaves_ignored_rows_out(capsys, tmp_path):
    record = record_topk(torch.zeros(3, 10), torch.tensor([0, -100, 9]), 0.5)  # 5 and 6 tokens; rho 0.5 and 0.4
    record.save(tmp_path / "r.npz")
    options = "--width", "5", "--layers", "1", "--epochs", "1", "--batch", "1", "--record", str(tmp_path / "r.npz")
    lines = advice(capsys, "--vocab", "10", *options)
    for expected in ("0.5 keeps 6 tokens a row, 55.00%", "at kappa = 57.0%", "bias was 0.9000", "smaller tau"):
        assert expected in lines
    with pytest.raises(ValueError, match="vocab_size 10, not of 11"):
        advice(capsys, "--vocab", "11", *options)
    with pytest.raises(SystemExit):
        advice(capsys, "--vocab", "10")
