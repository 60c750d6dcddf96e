"""vLLM rollouts on the real engine, on CPU: weight sync, training in one process and in two, and what is refused."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from ceu_rl.rollouts import ReloadingVLLMGeneration, RolloutError

from .trainers import SETTINGS

vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (make install)"),
]


def generation(mode, **given):
    """TRL's vLLM generation without an engine or a server."""
    made = object.__new__(ReloadingVLLMGeneration)
    vars(made).update(mode=mode, _weight_metadata=None, **given)
    return made


@pytest.mark.parametrize("is_main", [True, False])
def test_a_server_is_sent_weights_in_its_own_dtype(tiny_model, is_main):
    """A policy that is trained in float32 would take twice the bytes of a server in bfloat16."""
    sent, model = [], tiny_model()
    client = SimpleNamespace(
        get_server_info=lambda: {"model_config": {"dtype": "torch.bfloat16"}},
        update_named_params=lambda metadata, named: sent.append((metadata, list(named))),
        reset_prefix_cache=lambda: None,
    )
    server = generation(
        "server",
        model=model,
        accelerator=SimpleNamespace(is_main_process=is_main, device=torch.device("cpu")),
        _dist=SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: contextlib.nullcontext()),
        **({"vllm_client": client} if is_main else {}),  # as TRL has it
    )
    server.sync_weights()
    assert len(sent) == is_main
    for metadata, named in sent:
        assert {dtype for _, dtype, _ in metadata} == {"bfloat16"}
        assert [name for name, _ in named] == [name for name, *_ in metadata] == list(dict(model.named_parameters()))
        for name, parameter in named:
            assert torch.equal(parameter, model.get_parameter(name).bfloat16())


def test_an_engine_ends_once_every_process_has_come_unless_this_one_failed():
    """It takes torch's groups of processes along, in which the others may still wait for this one."""
    done = []
    core = SimpleNamespace(shutdown=lambda: done.append("end"))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core))
    engine = generation("colocate", llm=llm, accelerator=SimpleNamespace(wait_for_everyone=lambda: done.append("wait")))
    engine.shutdown()
    assert done == ["wait", "end"]
    with pytest.raises(RolloutError), contextlib.ExitStack() as stack:
        stack.callback(engine.shutdown)
        raise RolloutError
    try:
        raise RolloutError
    except RolloutError:
        engine.shutdown()
    assert done == ["wait", "end", "end", "end"]


SYNC = """
import json, sys
import torch
from datasets import Dataset
from peft import LoraConfig
from vllm import SamplingParams
from ceu_rl import CEUGRPOConfig, CEUGRPOTrainer
from ceu_rl.tasks.addition import accuracy

folder, lora = sys.argv[1], sys.argv[2] == "lora"
rows = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(100, 108) for b in range(100, 108)])
args = CEUGRPOConfig(f"{folder}/{sys.argv[2]}", use_vllm=True, vllm_mode="colocate", vllm_max_model_length=64,
                     per_device_train_batch_size=8, max_completion_length=8, use_cpu=True, bf16=False,
                     gradient_checkpointing=False, report_to="none")
peft_config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM") if lora else None
trainer = CEUGRPOTrainer(f"{folder}/model", accuracy, args, train_dataset=rows, peft_config=peft_config)
ids = [trainer.processing_class("100+200=7+5+0=12 2+9+1=12 8+6+1=15 1522")["input_ids"]]

def of_model():
    with torch.no_grad():
        logits = trainer.model.eval()(torch.tensor(ids)).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[0, 1:, None])[:, 0]

def of_vllm():
    (output,) = trainer.vllm_generation.llm.generate(
        [{"prompt_token_ids": ids[0]}], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    return torch.tensor([step[token].logprob for step, token in zip(output.prompt_logprobs[1:], ids[0][1:])])

def difference(first, second):
    return (first - second).abs().mean().item()

trainer.vllm_generation.sync_weights()
start, found = of_model(), {}
found["before"] = difference(start, of_vllm())
optimizer = torch.optim.SGD([p for p in trainer.model.parameters() if p.requires_grad], lr=1.0)
for _ in range(5):
    trainer.model(torch.tensor(ids), labels=torch.tensor(ids), fused_lm_head=True).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
found["moved"] = difference(start, of_model())
found["stale"] = difference(of_model(), of_vllm())
trainer.vllm_generation.sync_weights()
found["after"] = difference(of_model(), of_vllm())
open(f"{folder}/{sys.argv[2]}.json", "w").write(json.dumps(found))
"""


def run(command, cwd=None):
    settings = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **settings})


class TestEngine:
    pytestmark = vllm

    @pytest.fixture
    def model(self, tiny_model, tokenizer, tmp_path):
        # vLLM on CPU wants heads of at least 32
        tiny_model(hidden_size=64, num_attention_heads=2).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    @pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
    def test_vllm_holds_the_weights_of_the_model_after_each_sync(self, model, tmp_path, kind):
        (tmp_path / "sync.py").write_text(SYNC)
        result = run([sys.executable, tmp_path / "sync.py", tmp_path, kind])
        assert result.returncode == 0, result.stderr[-3000:]
        found = json.loads((tmp_path / f"{kind}.json").read_text())
        assert found["before"] <= 0.02 and found["after"] <= 0.02
        assert found["moved"] > 0.2 and found["stale"] > 0.2  # the step changed much more than that

    @pytest.fixture
    def recipe(self, model, tmp_path):
        """A GRPO recipe on the built-in task, rewarded for writing digits, which a random model learns in 30 steps."""
        (tmp_path / "my_rewards.py").write_text(REWARDS)

        def write(**fields):
            settings = {
                **SETTINGS,
                "model_name_or_path": model,
                "dataset_name": "builtin:addition",
                "reward_funcs": ["my_rewards.digits"],
                "output_dir": str(tmp_path / "out"),
                "max_steps": 30,
                "learning_rate": 3e-3,
                "num_generations": 8,
                "per_device_train_batch_size": 32,
                "max_completion_length": 8,
                "use_vllm": True,
                "vllm_mode": "colocate",
                "vllm_max_model_length": 64,
                "save_strategy": "steps",
                "save_steps": 2,
                **fields,
            }
            (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
            return tmp_path / "recipe.yaml"

        return write

    def train(self, recipe, *launch):
        """Run the recipe in its folder, and check that no process is left behind."""
        command = [sys.executable, *launch, "-m", "ceu_rl.cli", "grpo", "--config", recipe]
        result = run(command, cwd=recipe.parent)
        left = [p.pid for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(recipe.parent)]
        assert left == []
        return result

    @pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
    def test_the_reward_rises(self, recipe, tmp_path, processes):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
        lag = {1: 1, 2: 3}[processes]  # in two processes with weights that lag
        result = self.train(recipe(per_device_train_batch_size=32 // processes, weight_sync_steps=lag), *launch)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "Traceback" not in result.stderr and "Invalid process group" not in result.stderr
        log = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
        rewards = [entry["reward"] for entry in log if "reward" in entry]
        assert len(rewards) == 30
        assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3
        differences = [entry["sampling/sampling_logp_difference/mean"] for entry in log[:-1]]
        assert max(differences[::lag]) < 0.02
        ratios = [entry["sampling/importance_sampling_ratio/mean"] for entry in log[:-1]]
        assert all(abs(ratio - 1) < 0.02 for ratio in ratios[::lag])
        for age in range(1, lag):  # what TRL's correction corrects for grows with the lag
            assert sum(differences[age::lag]) > 5 * sum(differences[::lag])
        assert all("ceu/weight_mean" in entry for entry in log[:-1])
        assert json.loads((tmp_path / "out" / "result.json").read_text())["processes"] == processes

    def test_an_engine_that_dies_is_named_and_the_checkpoint_kept(self, recipe, tmp_path):
        result = self.train(recipe(reward_funcs=["my_rewards.engine_dies_at_the_fourth_call"]))
        assert result.returncode == 1
        assert "ceu-rl grpo: error: vLLM, while taking the new weights, raised AttributeError" in result.stderr
        assert "what was saved is intact: start again with --resume_from_checkpoint true." in result.stderr
        assert "Traceback" not in result.stderr
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-4")

    def test_a_process_that_is_killed_takes_the_others_along_and_keeps_the_checkpoint(self, recipe, tmp_path):
        two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        settings = {"reward_funcs": ["my_rewards.killed_at_the_fourth_call"], "per_device_train_batch_size": 16}
        result = self.train(recipe(**settings), *two)
        assert result.returncode != 0 and "SIGKILL" in result.stderr
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-2")


REWARDS = """
import inspect, os, signal

calls = 0

def digits(completions, **kwargs):
    texts = [completion[0]["content"] for completion in completions]
    return [sum(character.isdigit() for character in text) / 8 for text in texts]

def engine_dies_at_the_fourth_call(completions, **kwargs):
    global calls
    calls += 1
    if calls == 4:
        frames = (each.frame.f_locals.get("self") for each in inspect.stack())
        trainer = next(each for each in frames if hasattr(each, "vllm_generation"))
        trainer.vllm_generation.llm.llm_engine.engine_core.shutdown()
    return digits(completions)

def killed_at_the_fourth_call(completions, **kwargs):
    global calls
    calls += 1
    if calls == 4 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return digits(completions)
"""
