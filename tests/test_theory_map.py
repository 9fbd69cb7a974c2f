"""THEORY.md and tests/test_theory_*.py name each other: no statement without a test, no test without a statement."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STATEMENTS = [f"R{i}" for i in range(1, 9)] + [f"M{i}" for i in range(1, 11)]


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
