"""THEORY.md and its tests: no statement without tests that bear its number, no theory test without a statement."""

import ast
import re
from pathlib import Path

import pytest
import torch

from experiments import theory
from logits_replay import ReplayRecord, record_topk

ROOT = Path(__file__).parent.parent
STATEMENTS = [f"R{i}" for i in range(1, 15)] + [f"M{i}" for i in range(1, 12)]


def sections(text):
    """{number: section text} of the numbered statements, headings of the form '## R1 Name'."""
    parts = re.split(r"^#{1,2} (?=\S)", text, flags=re.M)[1:]
    found = [(re.match(r"([RM]\d+) \S", part), part) for part in parts]
    numbers = [match[1] for match, _ in found if match]
    assert len(numbers) == len(set(numbers)), "a statement has two sections"
    return {match[1]: part for match, part in found if match}


def section(number):
    """That statement's section of THEORY.md."""
    return sections((ROOT / "THEORY.md").read_text(encoding="utf-8"))[number]


def table_rows(number, pattern):
    """The lines of that section that match, as strings or tuples of strings."""
    return re.findall(pattern, section(number), re.M)


def functions(path):
    """Names of the test functions of a file."""
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def complaints(text, tests, others=frozenset()):
    """What is missing or dangling, as a list of sentences. tests: those of the theory; others: all the rest."""
    found = sections(text)
    out = [f"{number} has no section" for number in STATEMENTS if number not in found]
    out += [f"{number} is not in the map" for number in STATEMENTS
            if not re.search(rf"^\| {number} \| [^|]+ \| \S", text, re.M)]
    for number, section in found.items():
        out += [] if any(test.startswith(f"test_{number.lower()}_") for test in tests) else [f"{number} has no test"]
        out += [f"{number} lacks its '{word}'" for word in ("Assumptions.", "Statement.", "Proof.")
                if f"**{word}" not in section]
    numbers = {number.lower() for number in found}
    out += [f"{test} belongs to no statement" for test in sorted(tests) if test.split("_")[1] not in numbers]
    named = set(re.findall(r"`(test_\w+)`", text))
    return out + [f"{test} is named, but does not exist" for test in sorted(named - tests - others)]


@pytest.fixture(scope="module")
def text():
    return (ROOT / "THEORY.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tests():
    return set().union(*(functions(ROOT / "tests" / f"test_theory_{name}.py") for name in ("replay", "moclip")))


@pytest.fixture(scope="module")
def others():
    return set().union(*map(functions, (ROOT / "tests").glob("test_*.py")))


def test_every_statement_has_tests_every_theory_test_a_statement_and_the_decisions_name_existing_tests(
        text, tests, others):
    assert complaints(text, tests, others) == []
    rows = text.split("\n## Decisions\n")[1].count("\n| ") - 1  # less the heading
    assert rows == 17 and len(re.findall(r"^\| .* \| `test_\w+` \|$", text, re.M)) == rows


def test_the_check_itself_finds_each_kind_of_gap(text, tests, others):
    without_m4 = {test for test in tests if not test.startswith("test_m4_")}
    assert complaints(text, without_m4, others) == ["M4 has no test"]
    assert complaints(text, tests | {"test_r15_new"}, others) == ["test_r15_new belongs to no statement"]
    assert "test_state_is_adams_and_wide is named, but does not exist" in complaints(text, tests)
    assert "R5 has no section" in complaints(text.replace("\n## R5 ", "\n## "), tests, others)
    assert complaints(text.replace("| R2 |", "| |"), tests, others) == ["R2 is not in the map"]
    assert "R3 lacks its 'Proof.'" in complaints(text.replace("**Proof.", "**Why."), tests, others)


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
    assert "anchor" not in lines  # it has no log_probs
    with pytest.raises(ValueError, match="vocab_size 10, not of 11"):
        advice(capsys, "--vocab", "11", *options)
    with pytest.raises(SystemExit):
        advice(capsys, "--vocab", "10")


def test_advice_says_what_an_anchor_sees_and_costs(capsys, tmp_path):
    # four scored positions: one token each of probability about 1 in two of them, 2 of 4 equal ones in the others
    logits = torch.zeros(5, 4)
    logits[:2, 0] = 30
    record = record_topk(logits, torch.tensor([0, 0, 0, 1, -100]), 0.5, keep_log_probs=True)
    assert record.subset_sizes.tolist() == [1, 1, 2, 2, 0]
    record.save(tmp_path / "r.npz")
    options = "--vocab", "4", "--width", "5", "--layers", "1", "--epochs", "1", "--batch", "1"
    lines = advice(capsys, *options, "--record", str(tmp_path / "r.npz"))
    assert "weighted 75.0%, and nothing at the 50.0% of positions with one token: ask for a larger tau (R13)" in lines
    # 6 tokens of 4 + 4 bytes, 6 offsets of 8, 5 outside masses of 4: 116 bytes for 5 positions
    price, = re.findall(r"its price: 23 bytes a position; ([\d.]+) ms in the head for 5 positions a step", lines)
    assert 0 < float(price) < 1e4
    assert lines.count("\n") == advice(capsys, *options).count("\n") + 2  # else as without a record: that is another
    once = ReplayRecord.load(tmp_path / "r.npz").select([2, 3])
    once.save(tmp_path / "r.npz")
    assert "nothing at the 0.0% of positions with one token (R13)" in advice(
        capsys, *options, "--record", str(tmp_path / "r.npz"))
