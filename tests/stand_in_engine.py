"""A stand-in for `vllm.LLM` that generates with a copy of the policy: a lagging engine, without an engine."""

import copy
import types

import torch


class StandInEngine:
    """As much of `vllm.LLM` as TRL's colocated mode calls. `StandInEngine.policy` is the model whose copy it runs."""

    policy = None

    def __init__(self, **settings):
        self.model, self.syncs, self.is_shut = copy.deepcopy(self.policy), [], False
        core = types.SimpleNamespace(shutdown=lambda: setattr(self, "is_shut", True))
        self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=64), engine_core=core)

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        weights = {name: parameter.clone() for name, parameter in kwargs["weights_iterator"]}
        self.syncs.append(weights)
        self.model.load_state_dict(weights, strict=False)

    def reset_prefix_cache(self):
        pass

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm):
        ids = torch.tensor([row["prompt_token_ids"] for row in prompts])  # of one length, as the tests' prompts are
        out = self.model.generate(
            ids, max_new_tokens=sampling_params.max_tokens, do_sample=True, top_k=0, attention_mask=torch.ones_like(ids)
        )
        log_probs = self.model(out).logits[:, :-1].log_softmax(-1).gather(-1, out[:, 1:, None])[..., 0]
        found, end = [], self.model.generation_config.eos_token_id
        for row, tokens, values in zip(prompts, out[:, ids.shape[1] :], log_probs[:, ids.shape[1] - 1 :], strict=True):
            length = [*tokens.tolist(), end].index(end) + 1
            scored = [
                {token: types.SimpleNamespace(logprob=value, rank=1)}
                for token, value in zip(tokens.tolist(), values.tolist(), strict=True)
            ]
            completion = types.SimpleNamespace(token_ids=tokens[:length].tolist(), logprobs=scored[:length])
            found.append(types.SimpleNamespace(prompt_token_ids=row["prompt_token_ids"], outputs=[completion]))
        return found
