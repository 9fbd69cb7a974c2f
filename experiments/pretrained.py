"""A pretrained Hugging Face causal LM on the domain of train_small.py or of calls.py, by the Trainer.

    pip install transformers accelerate                        # and gguf, for a model in a GGUF file
    python experiments/pretrained.py --model NAME_OR_DIR [--gguf FILE] [--seeds 0 1 2]
    torchrun --nproc_per_node 2 experiments/pretrained.py --model NAME_OR_DIR

Stage 0, evaluation and schedule are train_small.py's own functions; model and tokenizer are put into the shape that
they expect. Under torchrun every process records its shard of the corpus and the Trainer wraps the model in DDP (FSDP
would shard the head, which is applied here outside the model's forward: keep it whole). Each run starts from the
pretrained weights; what is measured goes to experiments/results/pretrained.json as soon as it is. With --checkpoints a
run that was interrupted goes on from the Trainer's last checkpoint, with the record that lies beside it.
"""

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import calls  # noqa: E402  (its folder is on the path only now)
import rivals  # noqa: E402
import train_small as script  # noqa: E402
from logits_replay import ReplayRecord, outside_mass  # noqa: E402

try:
    import accelerate  # noqa: F401  (the Trainer needs it)
    import transformers
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as error:
    raise SystemExit("this experiment needs: pip install transformers accelerate (and gguf for a GGUF file)") from error


class Tokens:
    """A Hugging Face tokenizer with the three names that train_small.py uses."""

    def __init__(self, tokenizer):
        self.tokenizer, self.end = tokenizer, tokenizer.eos_token_id

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids):
        return self.tokenizer.decode(ids)


class Hidden(torch.nn.Module):
    """A Hugging Face model as train_small.py's `Model`: hidden states out, the head's weight as `embedding.weight`."""

    def __init__(self, model):
        super().__init__()
        self.body, self.embedding = model.base_model, model.get_output_embeddings()

    def forward(self, tokens, past=None):
        keep = past is not None
        out = self.body(input_ids=tokens, past_key_values=past.get("cache") if keep else None, use_cache=keep)
        if keep:
            past["cache"] = out.past_key_values
        return out.last_hidden_state


class ReplayTrainer(transformers.Trainer):
    """Scores the positions that have a target with train_small.py's `scorer`; `row_of` are their rows of the record."""

    score = row_of = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        def hidden(ids):  # padding is on the right: no attention mask needed
            return model(input_ids=ids, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]

        labels = inputs["labels"]
        h, y = script.scored_hidden(hidden, inputs["input_ids"], labels, labels.device)
        rows = self.row_of[inputs["index"].cpu()][labels.cpu() != script.IGNORE]
        loss = self.score(h, self.model.get_output_embeddings().weight, y, rows)
        return (loss, None) if return_outputs else loss


def record_shards(model, tokens, targets, tau, device):
    """Stage 0: every process records its contiguous share of the corpus; `concat` joins them in order."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    mine = script.stage0(model, tokens.tensor_split(world)[rank],
                         targets.tensor_split(world)[rank], tau, device).to("cpu")
    if world == 1:
        return mine
    shards = [None] * world
    dist.all_gather_object(shards, mine)
    return ReplayRecord.concat(shards)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="name or folder of a causal LM")
    parser.add_argument("--gguf", help="GGUF file in that folder")
    parser.add_argument("--methods", nargs="+", default=list(script.METHODS), choices=script.METHODS)
    parser.add_argument("--variant", default="",
                        choices=("", "gold only", "head frozen", "mixed", "KL to base", "eps 0.0001"),
                        help="a rival or a control of rivals.py, built on the methods (frozen: with a tied embedding)")
    parser.add_argument("--domain", default="sql", choices=("sql", "calls"), help="train_small.py's, or calls.py's")
    parser.add_argument("--tau", type=float, default=0.95)
    parser.add_argument("--tail", type=int, default=256, help="tokens that a tail method samples for each batch")
    parser.add_argument("--max-angle", type=float, default=90, help="MoClip's cap, in degrees")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16, help="examples a step and process")
    parser.add_argument("--train", type=int, default=480, help="training examples")
    parser.add_argument("--test", type=int, default=105,
                        help="questions, and windows of general text, of the validation and of the test part")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the order of the examples and the tails")
    parser.add_argument("--checkpoints", type=Path,
                        help="folder for the Trainer's checkpoints, three a run (default: none)")
    parser.add_argument("--results", type=Path, default=ROOT / "experiments/results/pretrained.json")
    args = parser.parse_args()

    source = {"gguf_file": args.gguf} if args.gguf else {}
    tokens = Tokens(transformers.AutoTokenizer.from_pretrained(args.model, **source))
    arguments = transformers.TrainingArguments(
        tempfile.mkdtemp(), max_steps=args.steps, per_device_train_batch_size=args.batch, remove_unused_columns=False,
        max_grad_norm=0.0,
        save_strategy="steps" if args.checkpoints else "no", save_steps=-(-args.steps // 3), report_to=[],
        logging_strategy="no", use_cpu=not torch.cuda.is_available())
    device, main_process = arguments.device, arguments.process_index == 0  # this also starts the processes' group

    def measured(model):
        """On test questions, and on validation questions, by which a setting is chosen."""
        chosen = script.evaluate(Hidden(model), data, device, "validation")
        return {**script.evaluate(Hidden(model), data, device),
                **{f"{key}_validation": value for key, value in chosen.items() if key != "samples"}}

    def fresh():
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **source)
        model.is_quantized = False  # the weights of a GGUF file are float32 by now; the flag still says otherwise
        return model.to(device)

    if args.domain == "sql":
        rng = random.Random(0)
        database = script.Database(rng)
        train, *held_out = script.domain_split(rng, database, 120)
    else:
        database, script.prompt, pairs = calls, calls.prompt, calls.pairs(0, args.train + 2 * args.test)
        train, *held_out = pairs[:args.train], pairs[args.train:-args.test], pairs[-args.test:]
    documents, script.CONTEXT = script.general_documents(), 96
    data = SimpleNamespace(tokenizer=tokens, database=database)
    for part, questions in zip(("test", "validation"), reversed(held_out)):
        prose = "\n\n".join(documents.pop(name) for name in random.Random(part).sample(sorted(documents), 40))
        windows = torch.tensor(tokens.encode(prose)).unfold(0, script.CONTEXT + 1, script.CONTEXT)[:args.test]
        setattr(data, part, questions[:args.test])
        setattr(data, f"domain_{part}", script.encode_domain(tokens, questions[:args.test]))
        setattr(data, f"general_{part}", (windows[:, :-1], windows[:, 1:]))
    data.streams = [torch.tensor(tokens.encode("\n\n".join(map(documents.get, sorted(documents)))), device=device)]
    ids, labels = script.encode_domain(tokens, train[:args.train])
    dataset = [{"input_ids": x, "labels": y, "index": i} for i, (x, y) in enumerate(zip(ids, labels))]
    row_of = script.record_rows(labels)

    aside = {"methods", "seeds", "results", "checkpoints"}
    config = {k: str(v) for k, v in vars(args).items() if k not in aside}
    config |= {"model": Path(args.model).name, "world": arguments.world_size, "transformers": transformers.__version__,
               "torch": torch.__version__}
    studies = json.loads(args.results.read_text()) if args.results.exists() else []
    done = next((study for study in studies if study["config"] == config), None)
    if done is None:
        done = {"config": config, "runs": []}
        studies.append(done)

    def keep(row):
        done["runs"].append(row)
        if main_process:
            args.results.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(studies, indent=1) + "\n"
            script.write_atomically(args.results, lambda temporary: temporary.write_text(text))

    if not done["runs"]:
        keep({"method": "base", **measured(fresh())})
    for seed, method in itertools.product(args.seeds, args.methods):
        if any((run["method"], run.get("seed")) == (method, seed) for run in done["runs"]):
            continue
        model, arguments.seed, last = fresh(), seed, None
        if args.checkpoints:
            arguments.output_dir = str(args.checkpoints / f"{method}-{seed}")
            last = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).exists() else None
        path, record, start = Path(arguments.output_dir) / "record.npz", None, time.perf_counter()
        if not method.startswith("full") and args.variant != "gold only":
            if last and path.exists():
                record = ReplayRecord.load(path).to(device)
            else:
                record = record_shards(Hidden(model), ids, labels, args.tau, device).to(device)
            if args.checkpoints and main_process:
                path.parent.mkdir(parents=True, exist_ok=True)
                record.save(path)
        stage0_s = time.perf_counter() - start
        c = SimpleNamespace(model=Hidden(model), base=Hidden(fresh()), data=data, record=record, args=args,
                            method=method, seed=seed, generator=torch.Generator().manual_seed(2**31 + seed))
        score, optimizer = rivals.VARIANTS[args.variant](c)
        optimizer = optimizer or script.make_optimizer(method, model.parameters(), args)
        schedule = script.warmup_then_linear(optimizer, args.steps)
        trainer = ReplayTrainer(model, arguments, train_dataset=dataset, optimizers=(optimizer, schedule))
        trainer.row_of, trainer.score = row_of, score or rivals.own(c)
        seconds = trainer.train(resume_from_checkpoint=last).metrics["train_runtime"]
        steps = args.steps - (int(last.rsplit("-")[-1]) if last else 0)
        run = {"method": method, "seed": seed, "step_ms": 1e3 * seconds / steps, "stage0_s": stage0_s,
               "total_s": None if last else seconds + stage0_s, **measured(model)}
        run["forgetting"] = run["general_nll"] - done["runs"][0]["general_nll"]
        if record is not None:
            with torch.no_grad():  # on one training example in fifteen
                hidden, _ = script.scored_hidden(Hidden(model), ids[::15], labels[::15], device)
                z, rows = hidden @ model.get_output_embeddings().weight.T, row_of[::15][labels[::15] != script.IGNORE]
                run["outside_mass_end"] = outside_mass(z, record.select(rows)).mean().item()
            sizes = record.subset_sizes.float()
            size = sum(x.nbytes for x in (record.token_ids, record.offsets, record.outside_mass)) / len(record)
            run |= {"subset_size_mean": sizes.mean().item(), "subset_size_median": sizes.median().item(),
                    "outside_mass_start": record.outside_mass.mean().item(),
                    "record_bytes_per_position": size}
        keep(run)
    if main_process:
        print(json.dumps(config))
        script.print_table(done["runs"][0], done["runs"][1:])
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
