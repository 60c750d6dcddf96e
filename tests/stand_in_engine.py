"""Stand-ins for `vllm.LLM` and for TRL's client of a vLLM server: lagging copies of the policy, without an engine."""

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
        settings = {"max_new_tokens": sampling_params.max_tokens, "do_sample": True, "top_k": 0}
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        log_probs = self.model(out).logits[:, :-1].log_softmax(-1).gather(-1, out[:, 1:, None])[..., 0]
        found, end = [], self.model.generation_config.eos_token_id
        for row, tokens, values in zip(prompts, out[:, ids.shape[1] :], log_probs[:, ids.shape[1] - 1 :], strict=True):
            length = [*tokens.tolist(), end].index(end) + 1
            of_token = zip(tokens.tolist(), values.tolist(), strict=True)
            scored = [{token: types.SimpleNamespace(logprob=value, rank=1)} for token, value in of_token]
            completion = types.SimpleNamespace(token_ids=tokens[:length].tolist(), logprobs=scored[:length])
            found.append(types.SimpleNamespace(prompt_token_ids=row["prompt_token_ids"], outputs=[completion]))
        return found


class StandInClient(StandInEngine):
    """As much of `trl.generation.vllm_client.VLLMClient` as TRL's server mode calls."""

    def init_communicator(self, device):
        pass

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs", "dtype": "torch.float32"}}

    def update_named_params(self, metadata, parameters):
        weights = dict(parameters)
        assert [(name, str(w.dtype).removeprefix("torch."), list(w.shape)) for name, w in weights.items()] == metadata
        self.collective_rpc("reload_weights", {"weights_iterator": weights.items()})

    def generate(self, prompts, n, max_tokens, **settings):
        rows = [{"prompt_token_ids": ids} for ids in prompts for _ in range(n)]
        found = super().generate(rows, types.SimpleNamespace(max_tokens=max_tokens), use_tqdm=False)
        completions = [output.outputs[0] for output in found]
        scored = [[next(iter(place.items())) for place in completion.logprobs] for completion in completions]
        return {
            "prompt_ids": prompts,
            "completion_ids": [completion.token_ids for completion in completions],
            "logprobs": [[[each.logprob] for _, each in row] for row in scored],
            "logprob_token_ids": [[[token] for token, _ in row] for row in scored],
        }
