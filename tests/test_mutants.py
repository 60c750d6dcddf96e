"""Faults that the tests must find: each is put into a copy of the package, and the tests of its file must fail."""

# ruff: noqa: E501
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# file, what stands there, what is put there, and the tests that must fail
MUTANTS = [
    ("losses.py", "loss = (entropy - F.logsigmoid", "loss = (-F.logsigmoid", "test_losses.py::test_equals_the_naive_expression_in_float64"),
    ("losses.py", "(inverse_odds / scale + 1.0 / max_weight)", "(inverse_odds * scale + 1.0 / max_weight)", "test_losses.py::test_descent_weight_is_the_formula"),
    ("losses.py", "anchor_log_ratio(log_probs, anchor_log_probs).clamp(max=0).exp()", "anchor_log_ratio(log_probs, anchor_log_probs).clamp(max=1).exp()", "test_route.py::test_each_rule_against_its_formula_in_float64"),
    ("losses.py", "(log_probs - ref_log_probs).masked_fill(ruled_out, 0.0)", "(log_probs - ref_log_probs)", "test_losses.py::test_a_token_that_both_models_rule_out_has_no_ratio"),
    ("losses.py", "math.log(mixture) - math.log1p(-mixture)", "math.log(mixture)", "test_route.py::test_each_rule_against_its_formula_in_float64"),
    ("losses.py", "nanquantile(0.1,", "nanquantile(0.9,", "test_route.py::test_each_rule_against_its_formula_in_float64"),
    ("route.py", "descending = (grad > 0) & mask", "descending = (grad < 0) & mask", "test_route.py::test_the_rule_against_plain_logits_in_float64"),
    ("route.py", "(1.0 - self.coef) + self.coef * weights", "self.coef * weights", "test_route.py::test_the_rule_against_plain_logits_in_float64"),
    ("route.py", "or (self._forwards is None and not self.always)", "", "test_dpo.py::test_trainers_of_one_model_leave_each_other_alone"),
    ("route.py", "(log_probs.size(-1) - values.size(-1), 0)", "(0, log_probs.size(-1) - values.size(-1))", "test_route.py::test_where_an_anchor_is_not_known_the_weight_is_one"),
    ("dpo.py", "policy.anchor = references[0].log_probs if anchor is None", "policy.anchor = policy.log_probs if anchor is None", "test_dpo.py::test_the_anchor_is_the_references_probability_of_the_same_token"),
    ("dpo.py", "tokens[_first(mask.sum(dim=1), tokens.size(1))]", "tokens.flip(1)[_first(mask.sum(dim=1), tokens.size(1))]", "test_dpo.py::test_the_anchor_is_the_references_probability_of_the_same_token"),
    ("dpo.py", "self.accelerator.gather_for_metrics(scores).cpu()", "self.accelerator.gather_for_metrics(scores.flip(1)).cpu()", "test_dpo.py::test_each_held_out_pair_is_kept"),
    ("grpo.py", "policy.log_importance = log_weight", "policy.log_importance = -log_weight", "test_grpo.py::test_an_anchored_rule_takes_the_place_of_trls_importance_weight"),
    ("grpo.py", 'inputs["importance_sampling_ratio"].log()', "0.0", "test_grpo.py::test_an_anchored_rule_takes_the_place_of_trls_importance_weight"),
    ("fused.py", "-F.logsigmoid(_signs(log_odds, here) * log_odds)", "-F.logsigmoid(log_odds)", "test_fused.py::test_equals_the_losses_on_logits"),
    ("stability/table.py", "gaps = (ours - theirs)", "gaps = (pd.DataFrame(np.sort(ours, axis=0), ours.index, ours.columns) - theirs)", "test_stability_table.py::test_without_rows_seeds_are_paired_and_one_seed_has_no_interval"),
    ("stability/table.py", "gaps = (ours - theirs)", "gaps = (ours.mean() - theirs.mean()).to_frame().T", "test_stability_table.py::test_differences_are_paired_by_row_and_seed"),
    ("stability/table.py", "True if interval and interval[0] >= 0", "True if interval and interval[1] >= 0", "test_stability_table.py::test_a_score_is_kept_if_its_interval_excludes_a_loss_of_five_percent"),
    ("stability/table.py", "(margin > 0) + 0.5 * (margin == 0)", "(margin >= 0)", "test_stability_table.py::test_margin_accuracy_and_loss_of_pairs"),
    ("tofu/metrics.py", "(retain_auc - auc) / (1.0 - retain_auc + 1e-10)", "(auc - retain_auc) / (1.0 - retain_auc + 1e-10)", "test_tofu_metrics.py::test_privacy_leakage_by_hand"),
    ("data/rows.py", "max(max_length - len(row[\"prompt_ids\"]), 0)", "max_length", "test_data_load.py::test_what_tokenized_rows_tell"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("file", "found", "mutant", "tests"), MUTANTS, ids=[f"{m[0]}:{m[2]}" for m in MUTANTS])
def test_a_fault_is_found(tmp_path, file, found, mutant, tests):
    shutil.copytree(ROOT / "ceu_rl", tmp_path / "ceu_rl")
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "ceu_rl" / file
    assert path.read_text().count(found) == 1
    path.write_text(path.read_text().replace(found, mutant))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{tests}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, result.stdout[-2000:]
