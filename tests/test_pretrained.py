"""What needs transformers: README's loop on models of several kinds, and experiments/pretrained.py. Else skipped."""

import re

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers", reason="these tests need: pip install transformers accelerate peft")
peft = pytest.importorskip("peft", reason="these tests need: pip install transformers accelerate peft")

import logits_replay  # noqa: E402  (below the skip, as all that follows)
from moclip import MoClip  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::peft")
LOOP = r"""hidden = lambda x: model(x, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
head, T = model.get_output_embeddings(), ids.shape[1]
model.eval()
with torch.no_grad():                                                      # Stage 0, once
    assert type(head) is torch.nn.Linear and (head(hidden(ids[:1])) - model(ids[:1]).logits).abs().max() < 1e-3, \
        "the model's logits are not hidden @ weight.T + bias of a plain linear head: see the table below the loop"
    record = ReplayRecord.concat([record_topk(head(hidden(x)), y, tau=0.9)
                                  for x, y in zip(ids.split(8), labels.split(8))])
    begin = torch.randint(len(head.weight), (120, 1))                      # the anchor: the model writes 120 windows,
    begin[::2] = model.config.bos_token_id                                 # every other from the beginning of a text
    text = model.generate(begin, attention_mask=torch.ones_like(begin), do_sample=True, temperature=1.0, top_k=0,
                          top_p=1.0, repetition_penalty=1.0, eos_token_id=None, max_new_tokens=96)
    anchor = ReplayRecord.concat([record_topk(head(hidden(x[:, :-1])), x[:, 1:], tau=0.98, max_size=32,
                                              keep_log_probs=True) for x in text.split(8)])
model.train()
optimizer = MoClip(model.parameters(), lr=1e-4)                            # or AdamW
for step, batch in enumerate(torch.randperm(len(ids)).split(16)):          # Stage 1
    window = step % len(text)
    said = anchor.select(torch.arange(96) + 96 * window)                   # rows are numbered row-major, as recorded
    linear_replay_kl_div(hidden(text[window, None, :-1]), head.weight, said, linear_bias=head.bias).backward()
    for part in batch.split(8):                                            # micro-batches: their gradients add up
        y, rows = labels[part], torch.arange(T) + T * part[:, None]
        loss = linear_replay_cross_entropy(hidden(ids[part]), head.weight, y, record.select(rows), reduction="sum",
                                           linear_bias=head.bias, tail=sample_tail(y, len(head.weight), 256))
        (loss / (labels[batch] != -100).sum()).backward()                  # by the scored positions of all of them
    optimizer.step()
    optimizer.zero_grad()
"""  # as README prints it
V, B, T = 64, 16, 7


def tiny(kind, **options):
    """A randomly initialized model of two layers whose logits are large enough for caps and scales to matter."""
    torch.manual_seed(0)
    config = dict(vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                  num_key_value_heads=2, max_position_embeddings=128, pad_token_id=1, bos_token_id=1, eos_token_id=2)
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
    labels[torch.rand(B * steps, T) < torch.linspace(0, 0.9, B * steps)[:, None]] = -100  # so micro-batches score unequal counts
    names = {**vars(logits_replay), "torch": torch, "model": model, "ids": ids, "labels": labels, "MoClip": optimizer}
    exec(loop, names)
    return names


WAYS = [*[(kind, LOOP) for kind in AS_PRINTED], *[(kind, scaled(kind)) for kind in SCALED],
        *[(kind, logits_form()) for kind in MODELS]]


@pytest.mark.parametrize("kind, loop", WAYS, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(WAYS)])
def test_a_step_of_the_loop_is_that_of_the_cross_entropy_of_the_models_own_logits(kind, loop):
    # a tail of 256 is the whole vocabulary here, so the loss is full cross-entropy; and the anchor's gradient is zero
    # at the first step, since the model still says what was recorded, to the rounding of its float32 log-probabilities
    model = MODELS[kind]()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sgd = lambda parameters, lr: torch.optim.SGD(parameters, 1.0)
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
    with pytest.raises(AssertionError, match="see the table below"):
        run(LOOP, MODELS[kind]())


def test_the_loop_learns_and_holds_what_the_model_said():
    stage1 = LOOP[LOOP.index("optimizer ="):].replace("lr=1e-4", "lr=1e-2")
    changed = []
    for loop in stage1, re.sub(r"    linear_replay_kl_div.*\n", "", stage1):
        model = tiny("Llama")
        names = run(LOOP, model)
        loss = lambda: F.cross_entropy(model(names["ids"]).logits.flatten(0, 1), names["labels"].flatten()).item()
        before = loss()
        for epoch in range(5):
            exec(loop, names)
        assert loss() < before - 0.1
        changed.append(logits_replay.replay_kl_div(model(names["text"][:, :-1]).logits, names["anchor"]).item())
    assert 0 < changed[0] < 0.7 * changed[1]


def test_the_loop_lets_the_model_write_plain_samples_of_full_length():
    # whatever its generation config asks for: the surprise -log p(next) has the entropy as its mean, so the sum of the
    # differences over N positions is within four of its standard deviations of zero; greedy text is far below
    model = tiny("Llama")
    model.generation_config.update(temperature=0.3, top_k=5, top_p=0.5, repetition_penalty=1.5, do_sample=True)
    names = run(LOOP, model, lambda parameters, lr: torch.optim.SGD(parameters, 0.0), steps=2)
    text, window = names["text"], names["window"]
    assert text.shape == (120, 97) and (text[::2, 0] == 1).all() and len(text[1::2, 0].unique()) > 30
    with torch.no_grad():
        log_p = model(text[:, :-1]).logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    variance = (log_p.exp() * log_p**2).sum(-1) - entropy**2
    surprise = -log_p.gather(-1, text[:, 1:, None]).squeeze(-1)
    assert (surprise - entropy).sum().abs() < 4 * variance.sum().sqrt()
    after_the_end = text[:, 1:][(text == 2)[:, :-1]]  # it goes on after the end-of-text token, and is not padded
    assert len(after_the_end) > 20 and len(after_the_end.unique()) > 3
    # nothing has moved, so the record of the second step's window is what the model says there
    kl = logits_replay.replay_kl_div(model(text[window, :-1]).logits, names["said"])
    assert window == 1 and abs(kl) < 1e-6
