"""Offline GRPO: from a dataset that brings its completions and rewards, for several epochs.

    prompt       text, or messages
    completions  num_generations answers to it: texts, assistant messages, or token ids
    rewards      a number for each, or None for one that was not judged
    log_probs    for each the log-probabilities of its tokens under what wrote it, temperature included (if known)

Where TRL's trainer would generate, this one answers from the row. Where `log_probs` are known, importance ratios are
those to what wrote the completions; where they are not, every ratio is 1.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from trl import GRPOTrainer

from .data.rows import is_empty, plain_content
from .grpo import CEUGRPOConfig, CEUGRPOTrainer
from .run.errors import note

PREFIX = "logged_"  # TRL hands reward functions an argument `completions` of its own
LARGEST = 1e18  # of rewards, whose squares are summed in float32
LEAST = -100.0  # of log-probabilities: what is less likely than exp(-100) is never written
COLUMNS = {  # and what each has for one completion
    "completions": "a text, one assistant message, or token ids",
    "rewards": "a number of usual size, or None",
    "log_probs": f"a log-probability from {LEAST:g} to 0 for each token",
}


class OfflineGRPOTrainer(CEUGRPOTrainer):
    """`CEUGRPOTrainer` that learns from the completions and rewards of its train dataset, and generates none.

    `reward_funcs` score evaluations on prompts alone, and may be left out. `reward_weights` begins with the weight of
    the logged rewards. Where the rows have `log_probs`, TRL's
    importance ratios and clip are relative to them, and so is the anchor of a rule; a rule that measures against it
    replaces both. Where they have none, every ratio is 1.

    Raises:
        ValueError: as `CEUGRPOTrainer`, and with row and column for completions, rewards or log-probabilities that
            cannot be learned from, or for settings that ask for other rollouts.
    """

    num_generations: int
    num_generations_eval: int
    max_completion_length: int
    chat_template_kwargs: dict[str, Any]

    @functools.wraps(GRPOTrainer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(GRPOTrainer.__init__).bind(self, *args, **kwargs)
        given = bound.arguments
        given["args"] = CEUGRPOConfig.given(given.get("args"), given["model"])
        self._rows: list[dict[str, Any]] = []  # those that are being answered
        _check_offline(given)
        rewards = given.get("reward_funcs") or []
        given["reward_funcs"] = [logged, *(rewards if isinstance(rewards, list) else [rewards])]
        if isinstance(given.get("reward_processing_classes"), list):
            given["reward_processing_classes"] = [None, *given["reward_processing_classes"]]
        super().__init__(*bound.args[1:], **bound.kwargs)
        held_out = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for name, dataset in {"train": self.train_dataset, **held_out}.items():
            if _is_logged(dataset):
                self._check_tokens(dataset, name)

    def _check_rows(self, dataset: Any, name: str, config: CEUGRPOConfig, prompted: bool) -> Any:
        generations = config.num_generations if name == "train" else config.num_generations_eval
        dataset = take_logged(dataset, name, generations or config.num_generations or 1)
        return super()._check_rows(dataset, name, config, prompted)

    @staticmethod
    def _knows_behaviour(given: dict[str, Any]) -> bool:
        return _has_log_probs(given["train_dataset"])

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
        generations = self.num_generations if self._is_training else self.num_generations_eval
        first = self.accelerator.process_index * len(self._rows)  # a group may lie on several processes
        completions, log_probs = [], []
        for place, (row, ids) in enumerate(zip(self._rows, prompt_ids, strict=True), start=first):
            which = place % generations
            tokens = self._completion_ids(row["prompt"], ids, row[PREFIX + "completions"][which])
            if known := row.get(PREFIX + "log_probs"):
                tokens = tokens[: len(known[which])]  # without the end where what wrote them was cut off before it
                log_probs.append(known[which][: self.max_completion_length])
            completions.append(tokens[: self.max_completion_length])
            row["logged_reward"] = row[PREFIX + "rewards"][which]  # what `logged` gets
        return completions, log_probs or None

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        given: list[Any] = self.reward_funcs
        if _is_logged(self._rows):  # logged completions have their rewards
            self.reward_funcs = [logged, *[_no_rewards] * (len(given) - 1)]
        try:
            return super()._calculate_rewards(*args, **kwargs)
        finally:
            self.reward_funcs = given

    def _check_tokens(self, dataset: Dataset, name: str) -> None:
        """Look at the tokens of logged completions, and say how many are longer than what is learned.

        Raises:
            ValueError: for the first row with a token outside the vocabulary, or log-probabilities that are not as many
                as the tokens of a completion; an end which no token id stands for needs none.
        """
        model: Any = self.model
        vocabulary, longest, cut = model.get_input_embeddings().num_embeddings, self.max_completion_length, 0
        for index, row in enumerate(dataset):
            where = f"Row {index} of the {name} dataset has"
            (ids,), _, _ = self._tokenize_prompts([row["prompt"]])
            for which, completion in enumerate(row[PREFIX + "completions"]):
                tokens = self._completion_ids(row["prompt"], ids, completion)
                cut += len(tokens) > longest
                if max(tokens, default=0) >= vocabulary:
                    raise ValueError(
                        f"{where} the token id {max(tokens)} in completion {which}, and the model has {vocabulary} "
                        "tokens; use the tokenizer of the model."
                    )
                if not (known := row.get(PREFIX + "log_probs")):
                    continue
                count = len(known[which])
                without_end = tokens != completion and bool(tokens) and tokens[-1] in self.eos_token_ids
                if count == 0 or count not in (len(tokens), len(tokens) - without_end):
                    end = " with its end" if without_end else ""
                    raise ValueError(
                        f"{where} {count} 'log_probs' for completion {which}, which has {len(tokens)} tokens{end}; "
                        "give one for each token, or the completion as token ids."
                    )
        if cut:
            count = len(dataset) * len(dataset[0][PREFIX + "completions"])
            note(
                f"{cut} of the {count} completions of the {name} dataset are cut at {longest} tokens "
                "(max_completion_length); their rewards were given to the whole."
            )

    def _completion_ids(self, prompt: Any, prompt_ids: list[int], completion: Any) -> list[int]:
        """The tokens of a completion, as generation would have left them: with the end token, and nothing after it.

        Raises:
            ValueError: for a chat template that writes the prompt differently once there is an answer.
        """
        if isinstance(completion, list) and isinstance(completion[0], int):
            return completion
        tokenizer: Any = self.processing_class
        if isinstance(prompt, str):
            text = completion if isinstance(completion, str) else _content(completion)
            ids = tokenizer(text=text, add_special_tokens=False)["input_ids"]
            return ids if ids and ids[-1] in self.eos_token_ids else [*ids, self._tokenizer.eos_token_id]
        messages = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        whole = tokenizer.apply_chat_template(
            conversation=[*prompt, *plain_content(messages)],
            chat_template=self.chat_template,
            tokenize=True,
            return_dict=True,
            **self.chat_template_kwargs,
        )["input_ids"]
        if whole[: len(prompt_ids)] != prompt_ids:
            raise ValueError(
                "The chat template writes the prompt differently once there is an answer, so the tokens of logged "
                f"completions are not known; give them as token ids (prompt: {prompt!s:.80})."
            )
        ids = whole[len(prompt_ids) :]
        ends = [place for place, token in enumerate(ids) if token in self.eos_token_ids]
        return ids[: ends[-1] + 1] if ends else ids


def logged(prompts: list[Any], logged_reward: list[float | None] | None = None, **kwargs: Any) -> list[float | None]:
    """The reward function of logged completions; none of completions that were generated."""
    return [None] * len(prompts) if logged_reward is None else logged_reward


def _no_rewards(prompts: list[Any], **kwargs: Any) -> list[float | None]:
    return [None] * len(prompts)


def _check_offline(given: dict[str, Any]) -> None:
    """Refuse what cannot be honoured where completions are logged."""
    config, held_out = given["args"], given.get("eval_dataset")
    columns = getattr(given.get("train_dataset"), "column_names", None) or []
    for name in ("rollout_func", "environment_factory", "tools"):
        if given.get(name):
            raise ValueError(f"{name} is given, and the train dataset brings its completions; leave one of them out.")
    if config.use_vllm:
        raise ValueError(
            "use_vllm is True, and the train dataset brings its completions, so nothing is generated; set it to False."
        )
    if "completions" not in columns:
        raise ValueError(
            f"The train dataset has no column 'completions' among {sorted(columns)}; add them, or use CEUGRPOTrainer."
        )
    sets = list(held_out.values()) if isinstance(held_out, dict) else [held_out]
    scored = all(rows is None or "completions" in (getattr(rows, "column_names", None) or []) for rows in sets)
    if not given.get("reward_funcs") and not scored:
        raise ValueError(
            "The eval dataset has no 'completions', so they are generated, and nothing scores them; give reward_funcs, "
            "or completions and rewards."
        )
    if config.off_policy_mask_threshold is not None and "log_probs" not in columns:
        raise ValueError(
            f"off_policy_mask_threshold is {config.off_policy_mask_threshold}, and the train dataset has no "
            "'log_probs', without which it is not known how far the policy has moved; add them, or leave it out."
        )


def take_logged(dataset: Any, name: str, generations: int) -> Any:
    """Check the logged completions of a dataset, and put them in columns whose names TRL does not use itself.

    A dataset without a column `completions` is returned as it is. Each row has `generations` (num_generations) of them.

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
    if taken := [column for column in columns if column.removeprefix(PREFIX) in COLUMNS and column not in COLUMNS]:
        raise ValueError(f"The {name} dataset has a column {taken[0]!r}, a name that the trainer uses; rename it.")
    rows = dataset.select_columns([column for column in COLUMNS if column in columns])
    known = len(dataset) > 0 and rows[0].get("log_probs") is not None
    for index, row in enumerate(rows):
        if (row.get("log_probs") is not None) != known:
            raise ValueError(
                f"Row {index} of the {name} dataset has 'log_probs' where row 0 has none, or the reverse; give them "
                "for all rows or for none."
            )
        for column in ("completions", "rewards", *["log_probs"] * known):
            cells = row[column]
            if not isinstance(cells, list) or len(cells) != generations:
                count = len(cells) if isinstance(cells, list) else f"{cells!r:.80} as"
                raise ValueError(
                    f"Row {index} of the {name} dataset has {count} {column!r} for {generations} completions "
                    "(num_generations); give one for each."
                )
            for place, cell in enumerate(cells):
                for wrong in _wrong(column, cell):
                    raise ValueError(
                        f"Row {index} of the {name} dataset has {wrong!r:.80} in {column!r} of completion {place}; "
                        f"give {COLUMNS[column]}."
                    )
    if name == "train" and len(dataset) and all(len({*row["rewards"]} - {None}) < 2 for row in rows):
        raise ValueError(
            "The train dataset has no row whose completions have different 'rewards', so that every advantage is 0 and "
            "nothing is learned; judge the completions of a prompt apart."
        )
    return dataset.rename_columns({column: PREFIX + column for column in rows.column_names})


def _wrong(column: str, cell: Any) -> list[Any]:
    """What cannot be learned from in a cell for one completion."""
    if column == "completions":
        return [] if _is_completion(cell) else [cell]
    if column == "rewards":
        return [] if cell is None or (isinstance(cell, int | float) and abs(cell) < LARGEST) else [cell]
    values = cell if isinstance(cell, list) else [cell]
    return [value for value in values if not (type(value) in (int, float) and LEAST <= value <= 1e-3)]


def _is_completion(value: Any) -> bool:
    if isinstance(value, str):
        return True
    if not isinstance(value, list) or not value:
        return False
    if isinstance(value[0], Mapping):
        message = plain_content(value)[0]
        said = isinstance(message.get("content"), str) or (message.get("content") is None and not is_empty(message))
        return len(value) == 1 and message.get("role") == "assistant" and said
    return all(type(token) is int and token >= 0 for token in value)


def _content(completion: list[Mapping[str, Any]]) -> str:
    """The text of a message that answers a text, which no template writes."""
    message = plain_content(completion)[0]
    if not is_empty({**message, "content": None}):
        raise ValueError(
            f"A logged completion of a text prompt has more than content ({message!s:.80}), which only a chat template "
            "writes; give its 'prompt' as messages."
        )
    return message["content"] or ""


def _is_logged(rows: Any) -> bool:
    """Whether a dataset, or the rows of a batch, bring completions that `take_logged` has checked."""
    names = rows[0] if isinstance(rows, list) else getattr(rows, "column_names", None) or []
    return PREFIX + "completions" in names


def _has_log_probs(dataset: Dataset) -> bool:
    """Whether the log-probabilities of logged completions are known."""
    column = PREFIX + "log_probs"
    return column in dataset.column_names and dataset[0][column] is not None
