"""README's loop runs as printed and learns, its tables are those of the result files, its counts those of the files."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import logits_replay
from experiments import report
from moclip import MoClip

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


class CausalLM(nn.Module):
    """What the loop uses of a Hugging Face model: two layers, which write tokens at random."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(300, 16), nn.Linear(16, 300, bias=False)
        self.config = SimpleNamespace(bos_token_id=0)
        self.get_output_embeddings = lambda: self.head

    def forward(self, ids, **options):
        hidden = self.embedding(ids)
        return SimpleNamespace(logits=self.head(hidden), hidden_states=[hidden])

    def generate(self, begin, max_new_tokens, **options):
        return torch.cat([begin, torch.randint(300, (len(begin), max_new_tokens))], 1)


def test_the_loop_of_the_readme_runs_and_learns():
    torch.manual_seed(0)
    model, ids = CausalLM(), torch.randint(50, (64, 6))
    labels = ids + 1  # the next token is this one plus one
    labels[labels == 50] = -100
    names = {**vars(logits_replay), "MoClip": MoClip, "torch": torch, "model": model, "ids": ids, "labels": labels}
    full = lambda: nn.functional.cross_entropy(model.head(model.embedding(ids)).flatten(0, 1), labels.flatten())
    before = full()
    loop, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(loop, names)
    assert full() < before
    wrong = CausalLM()
    wrong.forward = lambda ids, **options: SimpleNamespace(logits=wrong.head(wrong.embedding(ids)).tanh(),
                                                           hidden_states=[wrong.embedding(ids)])
    with pytest.raises(AssertionError, match="logits are not hidden"):
        exec(loop, {**names, "model": wrong})


@pytest.mark.parametrize("path", report.READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_tables_are_those_of_the_result_files(path):
    text = path.read_text()
    assert text.count("<!-- table ") == text.count("<!-- end -->") > 0
    assert report.fill(text, report.load()) == text


@pytest.mark.parametrize("path", report.READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(path):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()) if not link.startswith("http")]
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor:  # as GitHub names a heading
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], link


def test_the_reading_order_counts_lines_as_they_are():
    rows = re.findall(r"^\| \[`([\w/]+\.py)`\]\(.+?\) \| (\d+) \|", README, re.MULTILINE)
    assert len(rows) == 4
    for name, lines in rows:
        text = (ROOT / name).read_text().splitlines()
        assert int(lines) == next(
            (i for i, line in enumerate(text, 1) if "a learner may stop here" in line), len(text)), name
