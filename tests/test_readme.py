"""README's two loops run as printed on a tiny Hugging Face model, where transformers is installed, and learn."""

import re
from pathlib import Path

import pytest
import torch

from logits_replay import ReplayRecord, linear_replay_cross_entropy, outside_mass, record_topk
from moclip import MoClip

BLOCKS = re.findall(r"```python\n((?!>>>).*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)


@pytest.mark.filterwarnings("ignore")
def test_the_loops_of_the_readme_run_and_learn(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers accelerate")
    pytest.importorskip("accelerate", reason="pip install transformers accelerate")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(50, (64, 6))
    labels = ids + 1  # the next token is this one plus one
    labels[labels == 50] = -100
    names = dict(torch=torch, model=model, ids=ids, labels=labels, MoClip=MoClip, ReplayRecord=ReplayRecord, record_topk=record_topk,
                 linear_replay_cross_entropy=linear_replay_cross_entropy, Trainer=transformers.Trainer,
                 dataset=[{"input_ids": x, "labels": y, "index": i} for i, (x, y) in enumerate(zip(ids, labels))],
                 arguments=transformers.TrainingArguments(str(tmp_path), remove_unused_columns=False, num_train_epochs=2, report_to=[], use_cpu=True))
    plain, trainer = BLOCKS

    def loss():
        return linear_replay_cross_entropy(names["hidden"](ids), names["head"], labels, names["record"]).item()

    exec(plain, names)
    first = loss()
    exec(trainer, names)
    assert loss() < first
    assert outside_mass(names["hidden"](ids) @ names["head"].T, names["record"]).max() < 1
