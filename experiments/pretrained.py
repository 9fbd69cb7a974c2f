"""A pretrained Hugging Face causal LM on the domain of train_small.py or of calls.py, by the Trainer.

    pip install transformers accelerate                        # and gguf for a GGUF file, peft for LoRA
    python -m experiments.pretrained --model NAME_OR_DIR [--gguf FILE] [--lr 2e-4 4e-4] [--seeds 0 1 2]
    torchrun --nproc_per_node 2 -m experiments.pretrained --model NAME_OR_DIR

Stage 0, losses, evaluation and schedule are train_small.py's own functions, the rivals those of rivals.py; model and
tokenizer are put into the shape that they expect. A row also says what is left of a chat model: on the base's answers
to a dozen everyday questions the mean KL from the base and how often both prefer the same token, and one own answer.

Under torchrun every process records its shard of the corpus and the Trainer wraps the model in DDP (FSDP would shard
the head, which the losses apply). A finished run is a row of experiments/results/pretrained.json, and not run again.
"""

import argparse
import collections
import copy
import itertools
import json
import random
import re
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

import train_small as script
from experiments import calls, rivals
from logits_replay import ReplayRecord

try:
    import transformers
except ImportError as error:
    raise SystemExit("this needs: pip install transformers accelerate (gguf for a GGUF file, peft for LoRA)") from error

CONTEXT = 96  # tokens of a window, and of the longest example
QUESTIONS = """Give me three tips for sleeping better. | How do I boil an egg? | What is the capital of Italy? |
Write two sentences about a dog at the sea. | Why is the sky blue? | What could I cook from rice and tomatoes? |
Explain to a child what money is. | I feel lonely today. What can I do? | How do plants drink water? |
Suggest a name for a small bakery. | What should I pack for the mountains? | Write a thank-you note to a neighbour.
""".strip().replace("\n", " ").split(" | ")


class Hidden(torch.nn.Module):
    """A Hugging Face model as train_small.py's `Model`: hidden states out, the head's weight as `embedding.weight`."""

    def __init__(self, model):
        super().__init__()
        self.body, self.embedding = model.base_model, model.get_output_embeddings()

    def forward(self, tokens, past=None):
        out = self.body(input_ids=tokens, use_cache=past is not None, **(past or {}))
        if past is not None:  # keeps the cache under its name, which changes with the version of transformers
            past.update((name, value) for name, value in out.items() if name != "last_hidden_state")
        return out.last_hidden_state


@torch.no_grad()
def check_head(model):
    """The losses apply the head themselves: ValueError if the model's logits are not hidden @ weight.T."""
    ids = torch.arange(8, device=model.device)[None]
    mine, head = Hidden(model.eval()), model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or not (mine(ids) @ head.weight.T - model(ids).logits).abs().max() < 1e-3:
        raise ValueError("--model: its logits are not hidden @ weight.T (a bias, a softcap, a scale, an adapter on the "
                         "head?); README's \"In your own loop\" has the form that is right for it")


class ReplayTrainer(transformers.Trainer):
    """Trains on `score`, train_small.py's or a rival's: mean nats of hidden states, head, golds and the record's rows.

    The labels are shifted already: labels[b, t] is the token that follows input_ids[b, t]. Micro-batches and processes
    count by the positions that they score: accumulation changes nothing but rounding.
    """

    score = rows_of = None
    loss_is_scaled_for_ga = True  # by compute_loss: the Trainer leaves it as it is

    def _get_num_items_in_batch(self, batch_samples, device):
        """The scored positions of a step, of all its micro-batches and processes (the Trainer's own would shift)."""
        count = sum((batch["labels"] != script.IGNORE).sum() for batch in batch_samples)
        return self.accelerator.gather(count.to(device)).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # padding is on the right: no attention mask needed
        hidden = lambda ids: model(input_ids=ids, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
        labels = inputs["labels"]
        h, y = script.scored_hidden(hidden, inputs["input_ids"], labels, labels.device)
        loss = self.score(h, self.model.get_output_embeddings().weight, y, self.rows_of(inputs["index"].cpu()))
        if num_items_in_batch is not None:
            # mean over the step = sum over micro-batches of n / N mean; and DDP divides by the number of processes
            loss = loss * len(y) * self.accelerator.num_processes / num_items_in_batch
        return (loss, None) if return_outputs else loss


def record_shards(model, tokens, targets, tau, device):
    """Stage 0: every process records its contiguous share of the corpus; `concat` joins them in order."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    share = [part.tensor_split(world)[rank] for part in (tokens, targets)]
    shards = [script.stage0(model, *share, tau, device).to("cpu")] * world
    if world > 1:
        dist.all_gather_object(shards, shards[rank])
    return ReplayRecord.concat(shards).to(device)


@torch.no_grad()
def write_text(model, count, seed):
    """train_small.py's `write_text`, (count, CONTEXT + 1), by `generate`: unfiltered whatever its config says, going
    on after the end of a text; the first half begins with the beginning-of-text token."""
    torch.manual_seed(seed)
    begin, first = torch.randint(model.config.vocab_size, (count, 1), device=model.device), model.config.bos_token_id
    begin[:count // 2] = model.config.eos_token_id if first is None else first
    return model.eval().generate(begin, attention_mask=torch.ones_like(begin), do_sample=True, temperature=1.0, top_k=0,
                                 top_p=1.0, repetition_penalty=1.0, eos_token_id=None, max_new_tokens=CONTEXT)


@torch.no_grad()
def answer(model, tokenizer, question):
    """(ids (1, T), where the answer begins in them): greedy, in the tokenizer's chat template where it has one."""
    if tokenizer.chat_template:
        question = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                                 add_generation_prompt=True)
    ids = tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
    return model.eval().generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, repetition_penalty=1.0,
                                 max_new_tokens=64), ids.shape[1]


@torch.no_grad()
def chat_left(model, base, answers):
    """Over all tokens of the base's answers: mean KL(base, model) in nats, and how often both prefer the same one."""
    kl, same = [], []
    for ids, start in answers:
        said, says = (m.eval()(ids).logits[0, start - 1:-1].log_softmax(-1) for m in (base, model))
        kl.append((said.exp() * (said - says)).sum(-1))
        same.append((said.argmax(-1) == says.argmax(-1)).float())
    return {"chat_kl": torch.cat(kl).mean().item(), "chat_same": torch.cat(same).mean().item()}


def lora(c):
    """LoRA of rank 16 (peft's defaults but for alpha = 2 rank) on all linear layers; the head stays the base's."""
    import peft
    peft.inject_adapter_in_model(peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), c.model.body)
    c.model.embedding.requires_grad_(False)
    return None, script.make_optimizer(c.method, [p for p in c.model.parameters() if p.requires_grad], c.args)


VARIANTS = {**rivals.VARIANTS, "LoRA 16": lora}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="name or folder of a causal LM")
    parser.add_argument("--gguf", help="GGUF file in that folder")
    parser.add_argument("--methods", nargs="+", default=list(script.METHODS), choices=script.METHODS)
    parser.add_argument("--variant", default="", choices=VARIANTS, help="a rival or a control, built on the methods")
    parser.add_argument("--domain", default="sql", choices=("sql", "calls"), help="train_small.py's, or calls.py's")
    parser.add_argument("--tau", type=float, default=0.95)
    parser.add_argument("--tail", type=int, default=256, help="tokens that a tail method samples for each batch")
    parser.add_argument("--anchor", type=int, default=120, help="windows of text for the anchor and the rivals on text")
    parser.add_argument("--anchor-text", default="own", choices=("own", "given"), help="the base's own, or prose")
    parser.add_argument("--anchor-step", type=int, default=1, help="windows a step and process")
    parser.add_argument("--anchor-weight", type=float, default=0.3)
    parser.add_argument("--max-angle", type=float, default=90, help="MoClip's cap, in degrees")
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-4], dest="rates")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16, help="examples a step and process")
    parser.add_argument("--train", type=int, default=480, help="training examples")
    parser.add_argument("--test", type=int, default=105, help="questions, and windows of prose, of a held-out part")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of own text, order of examples, tails")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results/pretrained.json")
    return parser.parse_args()


def prepare(args, tokens):
    """The domain, prose and SQL over other schemas, in the shape of train_small.py's `prepare`."""
    documents = script.general_documents()
    if args.domain == "sql":
        rng, prompt = random.Random(0), script.prompt
        database = script.Database(rng)
        train, *held_out = script.domain_split(rng, database, 120)
    else:
        database, prompt, pairs = calls, calls.prompt, calls.pairs(0, args.train + 2 * args.test)
        train, *held_out = pairs[:args.train], pairs[args.train:-args.test], pairs[-args.test:]
    data = SimpleNamespace(tokenizer=tokens, database=database, prompt=prompt, context=CONTEXT)
    data.domain_train = script.encode_domain(tokens, train[:args.train], CONTEXT, prompt)
    counts = collections.Counter(re.findall(r"\b[a-z]{4,9}\b", "\n".join(map(documents.get, sorted(documents)))))
    common = [word for word, _ in counts.most_common(100)]
    for part, questions in zip(("test", "validation"), reversed(held_out)):
        prose = "\n\n".join(documents.pop(name) for name in random.Random(part).sample(sorted(documents), 40))
        windows = torch.tensor(tokens.encode(prose)).unfold(0, CONTEXT + 1, CONTEXT)[:args.test]
        other = script.schema_questions(random.Random(f"other {part}"), common, 20, args.test)
        setattr(data, part, questions[:args.test])
        setattr(data, f"domain_{part}", script.encode_domain(tokens, questions[:args.test], CONTEXT, prompt))
        setattr(data, f"general_{part}", (windows[:, :-1], windows[:, 1:]))
        setattr(data, f"other_{part}", script.encode_domain(tokens, other, CONTEXT))
    data.streams = [torch.tensor(tokens.encode("\n\n".join(map(documents.get, sorted(documents)))))]
    return data


def main():
    args = arguments()
    source = {"gguf_file": args.gguf} if args.gguf else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, **source)
    train_arguments = transformers.TrainingArguments(
        tempfile.mkdtemp(), max_steps=args.steps, per_device_train_batch_size=args.batch, max_grad_norm=0.0,
        save_strategy="no", logging_strategy="no", report_to=[], remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available())
    device, main_process = train_arguments.device, train_arguments.process_index == 0  # starts the processes' group
    base = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **source).to(device)
    base.is_quantized = False  # the weights of a GGUF file are float32 by now; the flag still says otherwise
    check_head(base)
    data = prepare(args, SimpleNamespace(end=tokenizer.eos_token_id, decode=tokenizer.decode,
                                         encode=lambda text: tokenizer.encode(text, add_special_tokens=False)))
    ids, labels = data.domain_train
    dataset = [{"input_ids": x, "labels": y, "index": i} for i, (x, y) in enumerate(zip(ids, labels))]
    answers = [answer(base, tokenizer, question) for question in QUESTIONS]

    def measured(model, name):
        """On test questions, on validation questions, by which a setting is chosen, and on what a chat model says."""
        row, chosen = (script.evaluate(Hidden(model), data, device, part) for part in ("test", "validation"))
        said = [tokenizer.decode(ids[0, start:], skip_special_tokens=True) for ids, start in
                (answer(model, tokenizer, question) for question in QUESTIONS[:3])]
        if main_process:
            script.say("\n".join(f"{name}: {question}\n    {text!r}" for question, text in zip(QUESTIONS, said)))
        return {**row, **{f"{key}_validation": value for key, value in chosen.items() if key != "samples"},
                **chat_left(model, base, answers), "chat_answer": said[0]}

    machine = {"world": train_arguments.world_size, "device": torch.cuda.get_device_name() if torch.cuda.is_available()
               else "cpu", "transformers": transformers.__version__, "torch": torch.__version__}
    asked = {k: v for k, v in vars(args).items() if k not in ("methods", "rates", "seeds", "results")} | machine
    asked["model"] = Path(args.model).name
    rows = json.loads(args.results.read_text()) if args.results.exists() else []

    def kept(**settings):
        """The row with these settings, if there is one."""
        return next((row for row in rows if settings.items() <= row.items()), None)

    def keep(row):
        rows.append(row)
        if main_process:
            text = "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"
            script.write_atomically(args.results, lambda file: file.write(text.encode()))

    of_base = {k: asked[k] for k in ("model", "gguf", "domain", "test")} | machine | {"method": "base"}
    if not kept(**of_base):
        keep(of_base | measured(base, "base"))
    at_first, made = kept(**of_base), []
    for lr, seed, method in itertools.product(args.rates, args.seeds, args.methods):
        settings = {**asked, "method": method, "lr": lr, "seed": seed}
        if kept(**settings):
            continue
        model, record, text, anchor, start = copy.deepcopy(base), None, None, None, time.perf_counter()
        if not method.startswith("full") and args.variant not in rivals.UNRECORDED:
            record = record_shards(Hidden(base), ids, labels, args.tau, device)
        if method.startswith("anchor") or args.variant in rivals.ON_TEXT:
            text = (write_text(base, args.anchor, seed) if args.anchor_text == "own" else
                    next(script.batches(data.streams, dict(batch=args.anchor, seed=seed), CONTEXT)).to(device))
        if method.startswith("anchor"):
            # eight windows at a time: their logits are large
            tokens, records = zip(*(script.record_anchor(Hidden(base), part, device) for part in text.split(8)))
            anchor = script.Anchor(torch.cat(tokens), ReplayRecord.concat(records))
        stage0_s, train_arguments.seed = time.perf_counter() - start, seed
        c = SimpleNamespace(model=Hidden(model), base=Hidden(base), data=data, record=record, anchor=anchor, text=text,
                            args=SimpleNamespace(**settings), method=method,
                            generator=torch.Generator(device).manual_seed(2**31 + seed))
        score, optimizer = VARIANTS[args.variant](c)
        optimizer = optimizer or script.make_optimizer(method, model.parameters(), c.args)
        schedule = script.warmup_then_linear(optimizer, args.steps)
        trainer = ReplayTrainer(model, train_arguments, train_dataset=dataset, optimizers=(optimizer, schedule))
        trainer.rows_of, trainer.score = script.scored_rows(labels), score or rivals.own(c)
        seconds = trainer.train().metrics["train_runtime"]
        run = {"step_ms": 1e3 * seconds / args.steps, "stage0_s": stage0_s, "total_s": seconds + stage0_s,
               **measured(model, f"{method} {args.variant}".strip())}
        for lost, nll in ("forgetting", "general_nll"), ("forgetting_sql", "other_nll"):
            run |= {f"{lost}{part}": run[nll + part] - at_first[nll + part] for part in ("", "_validation")}
        if record is not None:
            probe = script.outside_mass_probe(ids, labels, device)
            run |= {"outside_mass_start": record.outside_mass.mean().item(),
                    "outside_mass_end": probe(Hidden(model), record),
                    "subset_size_mean": record.subset_sizes.float().mean().item(),
                    "record_bytes_per_position": script.record_bytes(record)}
        if anchor is not None:
            run["anchor_bytes_per_position"] = script.record_bytes(anchor.record)
        made.append(settings | run)
        keep(made[-1])
    if main_process:
        script.print_table(at_first, made)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
