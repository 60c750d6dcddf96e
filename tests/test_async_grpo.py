"""CE-U under TRL's asynchronous GRPO, on a CPU: the test's own worker generates from a copy of the policy that lags."""

import queue
import types

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import scaled_dot_product_attention
from trl.experimental import async_grpo
from trl.experimental.async_grpo.async_grpo_trainer import DataCollatorForRollout
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample
from trl.experimental.async_grpo.packing import TreeRow

from ceu_rl import CEUAsyncGRPOTrainer

from .reference import keep_log_probs
from .trainers import build, losses, same, save_model

PROMPTS = [{"prompt": f"{a}+{b}="} for a in range(4) for b in range(4)]


def varlen_attention(query, key, value, starts_q, starts_k, longest_q, longest_k, softmax_scale, causal, **kwargs):
    """The kernel that TRL's trie calls, in plain torch: segments of queries, each with the keys of its own path."""
    groups = query.shape[1] // key.shape[1]
    out = torch.empty_like(query)
    for i in range(len(starts_q) - 1):
        q = query[starts_q[i] : starts_q[i + 1]].transpose(0, 1)
        k, v = (x[starts_k[i] : starts_k[i + 1]].transpose(0, 1).repeat_interleave(groups, 0) for x in (key, value))
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        part = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=softmax_scale)
        out[starts_q[i] : starts_q[i + 1]] = part.transpose(0, 1)
    return out


class Worker:
    """A rollout worker and the weight transfer in one: rollouts of a copy that takes the weights it is sent."""

    def __init__(self, model, tokenizer, generations=4):
        self.model, self.tokenizer, self.generations = model, tokenizer, generations
        self.version, self.syncs, self.next_group = 0, 0, 0
        self.rollout_buffer, self.metrics_queue = self, queue.Queue()
        self.ready = []

    def get(self, timeout=None):
        if not self.ready:
            prompt = PROMPTS[self.next_group % len(PROMPTS)]["prompt"]
            ids = torch.tensor(self.tokenizer([prompt] * self.generations)["input_ids"])
            with torch.no_grad():
                whole = self.model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=True, top_k=0)
                log_probs = self.model(whole).logits[:, :-1].log_softmax(-1).gather(-1, whole[:, 1:, None])[..., 0]
            texts = self.tokenizer.batch_decode(whole[:, ids.shape[1] :])
            rewards = np.array([sum(map(str.isdigit, text)) for text in texts], dtype=float)
            for tokens, values, advantage in zip(whole, log_probs, rewards - rewards.mean(), strict=True):
                mask = np.arange(len(tokens)) >= ids.shape[1]
                old = np.concatenate([[0.0], values.numpy()]) * mask
                self.ready.append(
                    RolloutSample(
                        prompt=[],
                        completion=[],
                        input_ids=tokens.numpy(),
                        completion_mask=mask.astype(int),
                        old_log_probs=old.astype(np.float32),
                        advantage=float(advantage),
                        model_version=self.version,
                        group_id=self.next_group,
                        metrics={"reward": 0.0},
                    )
                )
            self.next_group += 1
        return self.ready.pop(0)

    def qsize(self):
        return len(self.ready)

    def update_model_version(self, version):
        self.version = version

    def send_weights(self, iterator):
        self.syncs += 1
        self.model.load_state_dict({name: value.clone() for name, value in iterator}, strict=False)

    def start(self, *args, **kwargs):
        pass

    stop = check_health = init_weight_transfer = pause = resume = destroy = start


@pytest.fixture
def run(tiny_model, tokenizer, tmp_path, monkeypatch):
    """Train a few steps; returns the trainer and the worker."""
    from trl.experimental.async_grpo import async_grpo_trainer, packing

    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *args: None)  # which asks for CUDA
    monkeypatch.setattr(packing, "_flash_attn", lambda: types.SimpleNamespace(flash_attn_varlen_func=varlen_attention))
    model = save_model(tiny_model(1), tokenizer, tmp_path / "model")

    def run(trainer_class=CEUAsyncGRPOTrainer, **settings):
        worker = Worker(tiny_model(1), tokenizer)
        given = {"model": model, "train_dataset": Dataset.from_list(PROMPTS), "token_budget": -1}
        given |= {"rollout_worker": worker, "weight_transfer": worker, "weight_sync_steps": 2, "max_staleness": 8}
        given |= {"max_steps": 4, "num_generations": 4, "gradient_accumulation_steps": 1, "learning_rate": 1e-2}
        torch.manual_seed(0)
        trainer = build(trainer_class, tmp_path, **{**given, **settings})
        trainer.train()
        return trainer, worker

    return run


def test_coef_zero_equals_stock_bit_for_bit_and_the_default_does_not(run):
    stock, worker = run(async_grpo.AsyncGRPOTrainer)
    ours, routed = run(ceu_coef=0.0)[0], run()[0]
    assert same(stock, ours) and not same(stock, routed)
    assert worker.syncs == 3  # at the start, and after steps 2 and 4
    log, our_log, routed_log = map(losses, (stock, ours, routed))
    assert [entry["ratio"] for entry in our_log] == [entry["ratio"] for entry in log]
    assert abs(log[0]["ratio"] - 1) < 1e-3 < abs(log[1]["ratio"] - 1)  # rollouts lag
    assert routed_log[0]["loss"] == log[0]["loss"]
    assert all(0 < entry["ceu/descending_fraction"] < 1 for entry in routed_log)


def test_the_route_weighs_the_net_gradient_of_a_token_that_completions_share(run):
    """Two completions share their first token, with advantages 2 and -1: net it rises, and keeps stock's gradient."""
    trainer, _ = run(max_steps=1, ceu_coef=1.0)
    trainer.descent_route.pop_metrics()
    kept = keep_log_probs(trainer)
    for advantages, fraction in (((2.0, -1.0), 1 / 3), ((1.0, -2.0), 2 / 3)):
        row = TreeRow()
        for tokens, advantage in zip(([9, 10, 11, 12], [9, 10, 11, 13]), advantages, strict=True):
            mask = np.array([0, 0, 1, 1])
            sample = {"input_ids": np.array(tokens), "completion_mask": mask, "old_log_probs": np.zeros(4, np.float32)}
            row.add({**sample, "advantage": advantage, "group_id": 0, "metrics": {}})
        batch = DataCollatorForRollout(0)([[row]])
        trainer.compute_loss(trainer.model, batch)
        # The policy's own log-probabilities of the targets, so that the ratio is 1
        batch["old_log_probs"] = kept["log_probs"].detach().flatten()[batch["token_index"]]
        trainer.compute_loss(trainer.model, batch).backward()
        assert trainer.descent_route.pop_metrics()["ceu/descending_fraction"] == pytest.approx(fraction)


def test_a_step_that_is_not_finite_ends_the_run(run):
    with pytest.raises(FloatingPointError, match="met a non-finite"):
        run(learning_rate=1e30)
