"""Offline GRPO: from a dataset that brings its completions and rewards, for several epochs.

    prompt       text, or messages
    completions  num_generations answers to it: texts or token ids
    rewards      a number for each, or None for one that was not judged
    log_probs    for each the log-probabilities of its tokens under what wrote it, temperature included (if known)

Where TRL's trainer would generate, this one answers from the row. Where `log_probs` are known, importance ratios are
those to what wrote the completions; where they are not, every ratio is 1.
"""

import math
from typing import Any

import torch
from datasets import Dataset

from .grpo import CEUGRPOTrainer
from .run.errors import note

PREFIX = "logged_"  # TRL hands reward functions an argument `completions` of its own
LARGEST = 1e18  # of rewards, whose squares are summed in float32
LEAST = -100.0  # of log-probabilities: what is less likely than exp(-100) is never written
COLUMNS = {  # and what each has for one completion
    "completions": "a text or token ids",
    "rewards": "a number of usual size, or None",
    "log_probs": f"a log-probability from {LEAST:g} to 0 for each token",
}


class OfflineGRPOTrainer(CEUGRPOTrainer):
    """`CEUGRPOTrainer` that learns from the completions and rewards of its train dataset, and generates none.

    `reward_funcs` score evaluations on prompts alone, and may be left out. `reward_weights` begins with the weight of
    the logged rewards. Where the rows have `log_probs`, TRL's importance ratios and clip are relative to them, and so
    is the anchor of a rule; a rule that measures against it replaces both. Where they have none, every ratio is 1.

    Raises:
        ValueError: as `CEUGRPOTrainer`, and with row and column for completions, rewards or log-probabilities that
            cannot be learned from, or for settings that ask for other rollouts.
    """

    num_generations: int
    num_generations_eval: int
    max_completion_length: int
    chat_template_kwargs: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._rows: list[dict[str, Any]] = []  # those that are being answered
        self._rewards: list[float | None] = []  # of their answers
        super().__init__(*args, **kwargs)
        self.train_dataset = self._tokenized(self.train_dataset, "train")
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._tokenized(dataset, name) for name, dataset in self.eval_dataset.items()}
        else:
            self.eval_dataset = self._tokenized(self.eval_dataset, "eval")

    def check_given(self, given: dict[str, Any]) -> None:
        _check_offline(given)
        rewards = given.get("reward_funcs") or []
        given["reward_funcs"] = [logged, *(rewards if isinstance(rewards, list) else [rewards])]
        if isinstance(given.get("reward_processing_classes"), list):
            given["reward_processing_classes"] = [None, *given["reward_processing_classes"]]
        super().check_given(given)

    def _check_rows(self, dataset: Any, name: str, given: dict[str, Any]) -> Any:
        config = given["args"]
        generations = config.num_generations if name == "train" else config.num_generations_eval
        dataset = _take_logged(dataset, name, generations or config.num_generations or 1)
        return super()._check_rows(dataset, name, given)

    @staticmethod
    def _knows_behaviour(given: dict[str, Any]) -> bool:
        return PREFIX + "log_probs" in given["train_dataset"].column_names

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns or []
        self._signature_columns: Any = [*columns, *({PREFIX + column for column in COLUMNS} - set(columns))]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        self._rows = inputs
        outputs = super()._generate_and_score_completions(inputs)
        if _is_logged(inputs):
            # The ratio is to what wrote the completions, and 1 where that is not known or a rule replaces it
            outputs.pop("old_per_token_logps", None)
            if "sampling_per_token_logps" in outputs and not self.args.is_anchored:
                outputs["old_per_token_logps"] = outputs["sampling_per_token_logps"]
        return outputs

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if not _is_logged(self._rows):  # an evaluation by generating
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        model: Any = self.model
        generations = self.num_generations if model.training else self.num_generations_eval
        first = self.accelerator.process_index * len(self._rows)  # a group may lie on several processes
        answers = [(row, place % generations) for place, row in enumerate(self._rows, start=first)]
        self._rewards = [row[PREFIX + "rewards"][which] for row, which in answers]
        known = PREFIX + "log_probs" in self._rows[0]
        log_probs = [row[PREFIX + "log_probs"][which][: self.max_completion_length] for row, which in answers if known]
        return [row[PREFIX + "completions"][which] for row, which in answers], log_probs or None

    def _calculate_rewards(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_logged(inputs):
            return super()._calculate_rewards(inputs, *args, **kwargs)
        rewards = torch.full((len(inputs), len(self.reward_funcs)), math.nan, device=self.accelerator.device)
        rewards[:, 0] = rewards.new_tensor([math.nan if reward is None else reward for reward in self._rewards])
        return self.accelerator.gather(rewards)

    def _tokenized(self, dataset: Any, name: str) -> Any:
        """A dataset with the token ids of its logged completions, cut at `max_completion_length`.

        Raises:
            ValueError: for log-probabilities that are not as many as the tokens of a completion; an end which no token
                id stands for needs none.
        """
        if not _is_logged(dataset):
            return dataset
        column, longest, cut = PREFIX + "completions", self.max_completion_length, 0
        found: list[list[list[int]]] = []
        for index, row in enumerate(dataset):
            (ids,), _, _ = self._tokenize_prompts([row["prompt"]])
            answers = [self._completion_ids(row["prompt"], ids, completion) for completion in row[column]]
            cut += sum(len(tokens) > longest for tokens in answers)
            for which, known in enumerate(row.get(PREFIX + "log_probs") or ()):
                tokens, count = answers[which], len(known)
                # What wrote it may have been cut off before the end
                ended = tokens != row[column][which] and bool(tokens) and tokens[-1] in self.eos_token_ids
                if count == 0 or count not in (len(tokens), len(tokens) - ended):
                    raise ValueError(
                        f"Row {index} of the {name} dataset has {count} 'log_probs' for completion {which}, which has "
                        f"{len(tokens)} tokens; give one for each, or the completion as token ids."
                    )
                answers[which] = tokens[:count]
            found.append([tokens[:longest] for tokens in answers])
        if cut:
            note(
                f"{name} dataset: {cut} of {sum(map(len, found))} completions cut at max_completion_length ({longest})."
            )
        return dataset.remove_columns(column).add_column(column, found)

    def _completion_ids(self, prompt: Any, prompt_ids: list[int], completion: Any) -> list[int]:
        """The tokens of a completion, as generation would have left them: with the end token, and nothing after it."""
        if isinstance(completion, list):
            return completion
        tokenizer: Any = self.processing_class
        if isinstance(prompt, str):
            ids = tokenizer(text=completion, add_special_tokens=False)["input_ids"]
            return ids if ids and ids[-1] in self.eos_token_ids else [*ids, self._tokenizer.eos_token_id]
        whole = tokenizer.apply_chat_template(
            conversation=[*prompt, {"role": "assistant", "content": completion}],
            chat_template=self.chat_template,
            tokenize=True,
            return_dict=True,
            **self.chat_template_kwargs,
        )["input_ids"]
        if whole[: len(prompt_ids)] != prompt_ids:
            raise ValueError(
                f"The chat template changes the prompt {prompt!s:.40} before an answer; give completions as token ids."
            )
        ids = whole[len(prompt_ids) :]
        ends = [place for place, token in enumerate(ids) if token in self.eos_token_ids]
        return ids[: ends[-1] + 1] if ends else ids


def logged(prompts: list[Any], **kwargs: Any) -> list[float | None]:
    """The name of the logged rewards among the reward functions; a completion that was generated has none."""
    return [None] * len(prompts)


def _check_offline(given: dict[str, Any]) -> None:
    """Refuse what cannot be honoured where completions are logged."""
    config = given["args"]
    columns = getattr(given.get("train_dataset"), "column_names", None) or []
    for name in ("rollout_func", "environment_factory", "tools", "use_vllm"):
        if given.get(name) or getattr(config, name, False):
            raise ValueError(f"{name} is given, and the train dataset brings its completions; leave one of them out.")
    if "completions" not in columns:
        raise ValueError(f"The train dataset has no 'completions' among {columns}; add it, or use CEUGRPOTrainer.")
    if config.off_policy_mask_threshold is not None and "log_probs" not in columns:
        raise ValueError(
            f"off_policy_mask_threshold is {config.off_policy_mask_threshold}, and there are no 'log_probs'; add them."
        )


def _take_logged(dataset: Any, name: str, generations: int) -> Any:
    """Check the logged completions of a dataset, and put them in columns whose names TRL does not use itself.

    Raises:
        ValueError: with row and column, for completions, rewards or log-probabilities that cannot be learned from.
    """
    columns = getattr(dataset, "column_names", None) or []
    if "completions" not in columns:
        return dataset
    if not isinstance(dataset, Dataset):
        raise ValueError(f"The {name} dataset is a stream with logged completions; load it without streaming.")
    if "rewards" not in columns:
        raise ValueError(f"The {name} dataset has 'completions' and no column 'rewards'; add one reward for each.")
    if "log_probs" in columns and all(cells is None for cells in dataset["log_probs"]):
        dataset = dataset.remove_columns("log_probs")
    rows = dataset.select_columns([column for column in COLUMNS if column in dataset.column_names])
    for index, row in enumerate(rows):
        for column, cells in row.items():
            where = f"Row {index} of the {name} dataset has"
            if not isinstance(cells, list) or len(cells) != generations:
                count = len(cells) if isinstance(cells, list) else f"{cells!r:.80} as"
                raise ValueError(f"{where} {count} {column!r} for {generations} completions; give num_generations.")
            for place, cell in enumerate(cells):
                for value in cell if column == "log_probs" and isinstance(cell, list) else [cell]:
                    if not _is_usable(column, value):
                        wanted = COLUMNS[column]
                        raise ValueError(f"{where} {value!r:.80} in {column!r} of completion {place}; give {wanted}.")
    return dataset.rename_columns({column: PREFIX + column for column in rows.column_names})


def _is_usable(column: str, value: Any) -> bool:
    """Whether a completion, a reward or one log-probability can be learned from."""
    if column == "rewards":
        return value is None or (isinstance(value, int | float) and abs(value) < LARGEST)
    if column == "log_probs":
        return type(value) in (int, float) and LEAST <= value <= 1e-3
    ids = isinstance(value, list) and bool(value) and all(type(token) is int and token >= 0 for token in value)
    return ids or isinstance(value, str)


def _is_logged(rows: Any) -> bool:
    """Whether a dataset, or the rows of a batch, bring completions that `_take_logged` has checked."""
    names = rows[0] if isinstance(rows, list) else getattr(rows, "column_names", None) or []
    return PREFIX + "completions" in names
