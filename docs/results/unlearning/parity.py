"""Every metric of `ceu-rl tofu-eval` beside that of open-unlearning's own code, on the same models and rows.

    git clone https://github.com/locuslab/open-unlearning ../open-unlearning
    pip install omegaconf
    kept=retain_perturbed+real_authors_perturbed+world_facts_perturbed
    for part in full:forget01+$kept retain:$kept; do
        ceu-rl sft --config recipes/tofu/tiny/full.yaml --dataset_name TOFU --dataset_config ${part#*:} \
            --max_steps 300 --output_dir runs/parity/${part%:*}
    done
    python docs/results/unlearning/parity.py ../open-unlearning TOFU docs/results/unlearning/parity.json \
        runs/parity/full:runs/parity/retain:8 builtin:smollm2::2

A model is FOLDER:RETAIN:ROWS, the retain model may be left out, and ROWS are taken from each set, evenly. `peer_cut` is
the peer's code on the same tokens without what follows the first end token of an answer. The files of the peer that
were run are named with their git blob hash, which `git ls-tree -r COMMIT` shows for any of its commits.
"""

import hashlib
import importlib
import json
import shlex
import sys
import tempfile
import types
from pathlib import Path

import torch
from datasets import disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer

from ceu_rl import UnlearnConfig, UnlearnTrainer
from ceu_rl.models import resolve_model
from ceu_rl.run.provenance import environment, write_json
from ceu_rl.tofu import load_tofu, to_prompt_completion
from ceu_rl.tofu.evaluate import evaluate
from ceu_rl.tofu.metrics import forget_truth_ratio

SETS = {
    "forget": "forget01_perturbed",
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}
BATCH, NEW_TOKENS = 8, 16
PEER_METRICS = ("memorization", "privacy", "utility")
ATTACKS = {
    "loss": "LOSSAttack",
    "zlib": "ZLIBAttack",
    "min_k": "MinKProbAttack",
    "min_k_plus_plus": "MinKPlusPlusAttack",
}


class Peer:
    """open-unlearning's functions, without its packages' imports of every trainer and benchmark."""

    def __init__(self, checkout):
        source = Path(checkout, "src")
        for name in ("data", "evals", "evals.metrics", "evals.metrics.mia", "trainer", "trainer.unlearn"):
            package = types.ModuleType(name)
            package.__path__ = [str(source / name.replace(".", "/"))]
            sys.modules[name] = package
        sys.modules["data"].get_datasets = sys.modules["data"].get_collators = None
        sys.modules["trainer.unlearn.base"] = types.SimpleNamespace(UnlearnTrainer=object)
        load = importlib.import_module
        self.qa, self.collators, self.ceu = load("data.qa"), load("data.collators"), load("trainer.unlearn.ceu")
        self.metrics = {}
        for module in PEER_METRICS:
            self.metrics |= {
                metric.name: metric
                for metric in vars(load(f"evals.metrics.{module}")).values()
                if type(metric).__name__ == "UnlearningMetric"
            }
        self.attacks = {name: getattr(load(f"evals.metrics.mia.{name}"), attack) for name, attack in ATTACKS.items()}
        self.files = {
            str(Path(module.__file__).relative_to(checkout)): blob_hash(module.__file__)
            for name, module in sorted(sys.modules.items())
            if name.partition(".")[0] in ("data", "evals", "trainer") and getattr(module, "__file__", None)
        }

    def dataset(self, folder, config, tokenizer, cut, **settings):
        kind = self.qa.QADataset
        if cut:
            kind = type("CutDataset", (kind,), {"_process_sample": cut_sample})
        file = {"path": "json", "data_files": str(folder / f"{config}.json"), "split": "train"}
        return kind(file, {"apply_chat_template": True}, tokenizer, **settings)

    def collator(self, tokenizer, side="right"):
        return self.collators.DataCollatorForSupervisedDataset(tokenizer, padding_side=side, index="index")

    def run(self, name, model, **settings):
        return self.metrics[name].evaluate_metric(model, name, batch_size=BATCH, **settings)


def cut_sample(self, *args, **kwargs):
    """A sample of the peer up to its first end token."""
    item = super(type(self), self)._process_sample(*args, **kwargs)
    ends = (item["labels"] == self.tokenizer.eos_token_id).nonzero()
    if self.predict_with_generate or not len(ends):
        return item
    stop = int(ends[0]) + 1
    return {key: value[:stop] if torch.is_tensor(value) else value for key, value in item.items()}


def blob_hash(path):
    """What git calls the contents of a file."""
    data = Path(path).read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def peer_summary(peer, model, tokenizer, folder, whole=None):
    """The peer's metrics under our names, and its truth ratios of the forget set; `whole` are those without a cut."""
    right = peer.collator(tokenizer)
    cut, summary, truth = whole is not None, {}, {}
    for name, config in SETS.items():

        def probability(key, config=config):
            data = peer.dataset(folder, config, tokenizer, cut, answer_key=key)
            return peer.run("probability", model, data=data, collators=right)

        answer, wrong = probability("answer"), probability("perturbed_answer")
        options = name in ("real_authors", "world_facts")
        true = answer if options else probability("paraphrased_answer")
        found = {"correct": true, "wrong": wrong}
        aggregator = "closer_to_1_better" if name == "forget" else "true_better"
        truth[name] = peer.run("truth_ratio", model, pre_compute=found, aggregator=aggregator)
        summary[f"{name}_truth_ratio"] = truth[name]["agg_value"]
        if options:
            answer = peer.run("probability_w_options", model, pre_compute=found)
        summary[f"{name}_probability"] = answer["agg_value"]
        summary[f"{name}_rouge_l_recall"] = (
            whole[f"{name}_rouge_l_recall"] if cut else peer_rouge(peer, model, tokenizer, folder, config)
        )
    utility = {key: {"agg_value": value} for key, value in summary.items() if not key.startswith("forget")}
    summary["model_utility"] = peer.run("hm_aggregate", model, pre_compute=utility)["agg_value"]
    rows = peer.dataset(folder, SETS["forget"], tokenizer, cut)
    for name in ("exact_memorization", "extraction_strength"):
        summary[f"forget_{name}"] = peer.run(name, model, data=rows, collators=right)["agg_value"]
    for name, attack in peer.attacks.items():
        given = {"tokenizer": tokenizer} if name == "zlib" else {"k": 0.4} if name.startswith("min_k") else {}
        summary[f"forget_{name}"] = attack(model, rows, right, BATCH, **given).attack()["agg_value"]
    batch = right([rows[place] for place in range(len(rows))])
    batch.pop("index")
    with torch.no_grad():
        summary["ceu_loss"] = float(peer.ceu.compute_batch_ceu(model, batch)[0])
    return summary, truth["forget"]


def peer_rouge(peer, model, tokenizer, folder, config):
    from omegaconf import OmegaConf

    asked = peer.dataset(folder, config, tokenizer, False, predict_with_generate=True)
    generation = OmegaConf.create({"max_new_tokens": NEW_TOKENS, "do_sample": False, "use_cache": True})
    settings = {"tokenizer": tokenizer, "generation_args": generation, "rouge_type": "rougeL_recall"}
    return peer.run("rouge", model, data=asked, collators=peer.collator(tokenizer, "left"), **settings)["agg_value"]


def our_summary(model, tokenizer, folder):
    """The same by this package, and the result of `tofu-eval`."""
    result = evaluate(
        model, tokenizer, str(folder), "forget01", batch_size=BATCH, max_new_tokens=NEW_TOKENS, use_vllm=False
    )
    summary = {key: value for key, value in result["summary"].items() if not key.startswith("membership")}
    items = result["items"][SETS["forget"]]
    for name in ATTACKS:
        summary[f"forget_{name}"] = sum(item[name] for item in items) / len(items)
    summary["forget_truth_ratio"] = sum(forget_truth_ratio(item["truth_ratio"]) for item in items) / len(items)
    rows = load_tofu(str(folder), SETS["forget"])
    with tempfile.TemporaryDirectory() as scratch:
        args = UnlearnConfig(
            scratch,
            max_steps=1,
            learning_rate=0.0,
            per_device_train_batch_size=len(rows),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
        )
        forget = to_prompt_completion(rows, tokenizer)
        trainer = UnlearnTrainer(model, args, forget, processing_class=tokenizer)
        trainer.train()
    summary["ceu_loss"] = trainer.state.log_history[0]["forget_loss"]
    return summary, result


def some_rows(tofu, folder, count):
    """A few rows of each set, evenly, in TOFU's layout."""
    for config in SETS.values():
        rows = load_tofu(tofu, config)
        rows = rows.select(range(0, len(rows), max(1, len(rows) // count))).select(range(count))
        kept = [column for column in rows.column_names if not column.startswith("paraphrased_q")]
        Path(folder, f"{config}.json").write_text("".join(json.dumps({k: row[k] for k in kept}) + "\n" for row in rows))


def compare(peer, tofu, name, retain, count):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        some_rows(tofu, folder, count)
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(name))
        found = {}
        for which in filter(None, (retain, name)):
            model = AutoModelForCausalLM.from_pretrained(resolve_model(which)).eval()
            runs = {"peer": peer_summary(peer, model, tokenizer, folder)}
            runs["peer_cut"] = peer_summary(peer, model, tokenizer, folder, whole=runs["peer"][0])
            runs["ours"] = our_summary(model, tokenizer, folder)
            if which == name and retain:
                from ceu_rl.tofu.evaluate import add_retain

                add_retain(runs["ours"][1], found["ours"][1], "retain")
                runs["ours"][0]["forget_quality"] = runs["ours"][1]["summary"]["forget_quality"]
                for each in ("peer", "peer_cut"):
                    logs = {"retain_model_logs": {"retain": found[each][1]}}
                    given = {"pre_compute": {"forget": runs[each][1]}, "reference_logs": logs}
                    runs[each][0]["forget_quality"] = peer.run("ks_test", model, **given)["agg_value"]
            found = runs
    metrics = {key: {each: float(runs[each][0][key]) for each in runs} for key in runs["ours"][0]}
    return {"model": Path(name).name, "rows_of_each_set": count, "metrics": metrics}


def main(checkout, tofu, output, *models):
    disable_progress_bars()
    provenance = environment()
    peer = Peer(checkout)
    compared = [compare(peer, tofu, *model.rsplit(":", 2)[:2], int(model.rsplit(":", 1)[1])) for model in models]
    command = shlex.join(["python", "docs/results/unlearning/parity.py", "OPEN_UNLEARNING", "TOFU", output, *models])
    write_json(
        Path(output),
        {
            "command": command,
            "seed": 0,
            "max_new_tokens": NEW_TOKENS,
            "models": compared,
            "peer_files": peer.files,
            **provenance,
        },
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
