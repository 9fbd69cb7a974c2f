"""What needs transformers: README's loop on models of several kinds, and experiments/pretrained.py. Else skipped."""

import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import logits_replay
import train_small as script
from moclip import MoClip

NEEDED = dict(reason="these tests need: pip install transformers accelerate peft")
transformers, peft, _, tokenizers = (pytest.importorskip(name, **NEEDED)
                                     for name in ("transformers", "peft", "accelerate", "tokenizers"))
pretrained = pytest.importorskip("experiments.pretrained", **NEEDED)

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::peft")
LOOP, = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
LOOP = LOOP.replace("torch.optim.AdamW", "MoClip")  # a name that the tests give a meaning of their own
V, B, T = 64, 16, 7


def tiny(kind, **options):
    """A randomly initialized model of two layers whose logits are large enough for caps and scales to matter."""
    torch.manual_seed(0)
    config = dict(vocab_size=options.pop("vocab_size", V), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                  num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=1,
                  bos_token_id=1, eos_token_id=2)
    if kind == "Gemma2":
        config |= dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=64)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**config, **options))
    model = model.double()
    with torch.no_grad():
        model.get_output_embeddings().weight *= 30
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_()
    return model


def adapted(**options):
    """A PEFT model whose adapters already do something."""
    model = peft.get_peft_model(tiny("Llama"), peft.LoraConfig(r=4, **options)).double()
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


MODELS = {
    "Llama": lambda: tiny("Llama"),
    "Phi, a bias": lambda: tiny("Phi"),
    "Granite, a scale": lambda: tiny("Granite", logits_scaling=8.0),
    "Cohere, a scale": lambda: tiny("Cohere", logit_scale=0.25),
    "Gemma2, a softcap": lambda: tiny("Gemma2", final_logit_softcapping=3.0),
    "LoRA": lambda: adapted(target_modules=["q_proj", "v_proj", "down_proj"]),
    "LoRA on the head": lambda: adapted(target_modules=["q_proj", "lm_head"]),
    "head trained beside LoRA": lambda: adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}
AS_PRINTED = ("Llama", "Phi, a bias", "LoRA")
SCALED = {"Granite, a scale": "/ model.config.logits_scaling", "Cohere, a scale": "* model.config.logit_scale"}


def scaled(kind):
    """The loop, with the hidden states of a model that scales its logits."""
    return LOOP.replace(".hidden_states[-1]", f".hidden_states[-1] {SCALED[kind]}")


def logits_form():
    """The loop, on the logits that the model itself returns."""
    loop, count = re.subn(r"    assert .*\n.*\n", "", LOOP)
    for old, new, times in ((r"head\(hidden\((.+?)\)\)", r"model(\1).logits", 2), (r", linear_bias=head.bias", "", 1),
                            (r"linear_bias=head.bias, ", "", 1),
                            (r"linear_(replay_\w+)\(hidden\((.+?)\), head.weight", r"\1(model(\2).logits", 2)):
        loop, found = re.subn(old, new, loop)
        assert found == times, old
    return loop.replace("len(head.weight)", "model.config.vocab_size")


def run(loop, model, optimizer=MoClip, steps=1):
    """Executes the loop on as many examples as make these steps; returns its names."""
    torch.manual_seed(1)
    ids, labels = torch.randint(V, (2, B * steps, T))
    labels[torch.rand(B * steps, T) < torch.linspace(0, 0.9, B * steps)[:, None]] = -100  # unequal counts
    names = {**vars(logits_replay), "torch": torch, "model": model, "ids": ids, "labels": labels, "MoClip": optimizer}
    exec(loop, names)
    return names


WAYS = [*[(kind, LOOP) for kind in AS_PRINTED], *[(kind, scaled(kind)) for kind in SCALED],
        *[(kind, logits_form()) for kind in MODELS]]


@pytest.mark.parametrize("kind, loop", WAYS, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(WAYS)])
def test_a_step_of_the_loop_is_that_of_the_cross_entropy_of_the_models_own_logits(kind, loop):
    # a tail of 1024 is the whole vocabulary here, so the loss is full cross-entropy; and the anchor's gradient is zero
    # at the first step, since the model still says what was recorded, to the rounding of its float32 log-probabilities
    model = MODELS[kind]()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sgd = lambda parameters, **_: torch.optim.SGD(parameters, 1.0)
    names = run(loop, model, sgd)
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])
    F.cross_entropy(model(names["ids"]).logits.flatten(0, 1), names["labels"].flatten()).backward()
    moved = 0
    for name, p in model.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(before[name] - after[name], expected, rtol=1e-5, atol=1e-6)
        moved += p.grad is not None and bool(p.grad.any())
    assert moved >= 4


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in AS_PRINTED])
def test_the_loop_refuses_a_model_whose_logits_are_not_those_of_its_head(kind):
    with pytest.raises(AssertionError, match="below the loop"):
        run(LOOP, MODELS[kind]())


def test_the_loop_learns_and_holds_what_the_model_said():
    stage1 = LOOP[LOOP.index("optimizer ="):].replace("lr=1e-4", "lr=1e-2")
    changed = []
    for loop in stage1, re.sub(r".*linear_replay_kl_div.*\n", "", stage1):
        model = tiny("Llama")
        names = run(LOOP, model)
        loss = lambda: F.cross_entropy(model(names["ids"]).logits.flatten(0, 1), names["labels"].flatten()).item()
        before = loss()
        for epoch in range(5):
            exec(loop, names)
        assert loss() < before - 0.1
        changed.append(logits_replay.replay_kl_div(model(names["text"][:, :-1]).logits, names["anchor"]).item())
    assert 0 < changed[0] < 0.7 * changed[1]


@torch.no_grad()
def plainly_sampled(model, text):
    """Is the text drawn from the model's own softmax, and goes it on after the end-of-text token?

    The surprise -log p(next) has the entropy as its mean: the sum of their differences over all positions is within
    four of its standard deviations of zero. Cut, sharpened or padded text is ten and more away.
    """
    log_p = model(text[:, :-1]).logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    variance = (log_p.exp() * log_p**2).sum(-1) - entropy**2
    surprise = -log_p.gather(-1, text[:, 1:, None]).squeeze(-1)
    after_the_end = text[:, 1:][(text == 2)[:, :-1]]
    return (surprise - entropy).sum().abs() < 4 * variance.sum().sqrt() and len(after_the_end.unique()) > 3


def test_the_loop_lets_the_model_write_plain_samples_of_full_length():
    model = tiny("Llama")
    model.generation_config.update(temperature=0.3, top_k=5, top_p=0.5, repetition_penalty=1.5, do_sample=True)
    names = run(LOOP, model, lambda parameters, **_: torch.optim.SGD(parameters, 0.0), steps=2)
    text, window = names["text"], names["window"]
    assert text.shape == (120, 97) and (text[::2, 0] == 1).all() and len(text[1::2, 0].unique()) > 30
    assert plainly_sampled(model, text)
    # nothing has moved, so the record of the second step's window is what the model says there
    kl = logits_replay.replay_kl_div(model(text[window, None, :-1]).logits, names["said"])
    assert window == 1 and abs(kl) < 1e-6


# ------------------------------------------------------------------------------------------- experiments/pretrained.py

def trained(tokens, targets, optimizer, batch, accumulate, score):
    """A tiny model after one step of ReplayTrainer on all examples."""
    model = tiny("Llama")
    arguments = transformers.TrainingArguments(
        "unused", max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, use_cpu=True,
        remove_unused_columns=False, max_grad_norm=0.0, save_strategy="no", report_to=[], logging_strategy="no")
    data = [{"input_ids": x, "labels": y, "index": i} for i, (x, y) in enumerate(zip(tokens, targets))]
    optimizer = optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = pretrained.ReplayTrainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))
    trainer.score, trainer.rows_of = score, script.scored_rows(targets)
    trainer.train()
    return model


@settings(max_examples=5)
@given(seed=st.integers(0, 2**31 - 1), method=st.sampled_from(["full", "replay"]))
def test_two_micro_batches_of_four_move_the_model_as_one_batch_of_eight(seed, method):
    torch.manual_seed(seed)
    tokens, targets = torch.randint(V, (2, 8, T))
    targets[torch.rand(8, T) < torch.rand(8, 1)] = -100
    targets[:, 0] = torch.randint(V, (8,))  # in every example, also where the Trainer's own count would not look
    record = script.stage0(pretrained.Hidden(tiny("Llama")), tokens, targets, 0.8, torch.device("cpu"))
    score = script.scorer(method, record, None, None)
    sgd = lambda parameters: torch.optim.SGD(parameters, 0.5)
    accumulated, at_once = (trained(tokens, targets, sgd, size, 8 // size, score) for size in (4, 8))
    base = tiny("Llama")
    hidden, gold = script.scored_hidden(pretrained.Hidden(base), tokens, targets, torch.device("cpu"))
    score(hidden, base.get_output_embeddings().weight, gold, torch.arange(len(gold))).backward()
    for a, b, p in zip(accumulated.parameters(), at_once.parameters(), base.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(b, p.detach() - 0.5 * p.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in ("Llama", "LoRA")])
def test_a_model_whose_logits_are_not_hidden_times_weight_is_refused(kind):
    pretrained.check_head(tiny("Llama"))
    with pytest.raises(ValueError, match="its logits are not hidden"):
        pretrained.check_head(MODELS[kind]())


def test_the_base_writes_plain_samples_whatever_its_generation_config_says():
    model = tiny("Llama")
    model.generation_config.update(temperature=0.3, top_k=5, top_p=0.5, repetition_penalty=1.5, do_sample=True)
    text = pretrained.write_text(model, 120, seed=3)
    assert torch.equal(text, pretrained.write_text(model, 120, seed=3))
    assert text.shape == (120, pretrained.CONTEXT + 1) and (text[:60, 0] == 1).all() and len(text[60:, 0].unique()) > 30
    assert plainly_sampled(model, text)


def test_what_is_left_of_a_chat_is_that_of_plain_loops():
    base, model, answers = tiny("Llama"), tiny("Llama"), []
    assert (base.get_output_embeddings().weight == model.get_output_embeddings().weight).all()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p) * p.abs().mean()
    for length, start in ((9, 4), (6, 5), (12, 2)):
        answers.append((torch.randint(V, (1, length)), start))
    kl, same = [], []
    for ids, start in answers:
        for t in range(start, ids.shape[1]):  # token t is of the answer: predicted from all before it
            p0, p1 = (m(ids[:, :t]).logits[0, -1].softmax(-1).tolist() for m in (base, model))
            kl.append(sum(a * math.log(a / b) for a, b in zip(p0, p1)))
            same.append(p0.index(max(p0)) == p1.index(max(p1)))
    found = pretrained.chat_left(model, base, answers)
    assert 0 < sum(same) < len(same)
    assert found == {"chat_kl": pytest.approx(sum(kl) / len(kl)), "chat_same": pytest.approx(sum(same) / len(same))}
    assert pretrained.chat_left(base, base, answers) == {"chat_kl": 0.0, "chat_same": 1.0}


def test_lora_starts_at_the_base_and_moves_its_adapters_alone():
    model, ids = tiny("Llama").float(), torch.randint(V, (2, T))
    before, names = model(ids).logits, {name for name, _ in model.named_parameters()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    c = SimpleNamespace(model=pretrained.Hidden(model), method="full+adamw", args=SimpleNamespace(lr=0.1))
    _, optimizer = pretrained.VARIANTS["LoRA 16"](c)
    torch.testing.assert_close(model(ids).logits, before)
    for step in range(2):  # in the first one the gradient of A is zero, for B is
        optimizer.zero_grad()
        F.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
    after = {name.replace("base_layer.", ""): p for name, p in model.named_parameters()}
    assert all(torch.equal(weights[name], after[name]) for name in names)
    adapters = {name: p for name, p in after.items() if name not in names}
    assert len(adapters) == 2 * 2 * 7 and all(16 in p.shape and p.grad.any() for p in adapters.values())


WORDS = "river stone little water garden window summer winter island bread paper music silver north".split()


def test_a_study_is_written_as_it_goes_and_not_measured_again(tmp_path, monkeypatch, capsys):
    rng = random.Random(0)
    asked = [f"{script.prompt(q)} {sql}" for q, sql in script.domain_split(rng, script.Database(rng), 16)[0]]
    documents = {f"{i}": " ".join(rng.choices(WORDS, k=60))
                 for i in range(90)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=2000, special_tokens=["<begin>", "<end>"], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([*asked, *documents.values()], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<begin>", eos_token="<end>",
                                         pad_token="<end>").save_pretrained(tmp_path)
    tiny("Llama", vocab_size=tokenizer.get_vocab_size()).float().save_pretrained(tmp_path)
    monkeypatch.setattr(script, "general_documents", lambda: dict(documents))
    monkeypatch.setattr(pretrained, "QUESTIONS", pretrained.QUESTIONS[:3])
    results = tmp_path / "results.json"

    def study(*options):
        monkeypatch.setattr("sys.argv", ["pretrained", "--model", str(tmp_path), "--steps", "2", "--batch", "4",
                                         "--train", "8", "--test", "3", "--anchor", "4", "--results", str(results),
                                         *options])
        pretrained.main()
        return json.loads(results.read_text())

    first = study("--methods", "full+adamw", "anchor+adamw")
    base, full, anchored = first
    assert [run["method"] for run in first] == ["base", "full+adamw", "anchor+adamw"]
    assert base["chat_kl"] == 0 and full["chat_kl"] > 0 and anchored["anchor_bytes_per_position"] > 100
    assert full["forgetting_validation"] == full["general_nll_validation"] - base["general_nll_validation"]
    assert all(key in full for key in ("chat_same", "chat_answer", "forgetting", "forgetting_sql", "domain_accuracy",
                                       "domain_nll_validation", "step_ms"))
    assert "anchor+adamw: Give me three tips" in capsys.readouterr().out
    assert study("--methods", "full+adamw", "anchor+adamw") == first
    *again, faster, dense = study("--methods", "full+adamw", "--lr", "1e-3") + study(
        "--methods", "full+adamw", "--variant", "KL to base")[-1:]
    assert again == first and faster["lr"] == 1e-3 and full["lr"] == 1e-4
    assert len({run["domain_nll"] for run in (full, faster, dense)}) == 3
