"""TOFU, the Task of Fictitious Unlearning (Maini et al. 2024, arXiv 2401.06121): its data, metrics and evaluation."""

from .data import load_tofu, to_prompt_completion

__all__ = ["load_tofu", "to_prompt_completion"]
