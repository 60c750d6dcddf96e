"""What counts as a checkpoint: one that every process has written to its end."""

import pytest
from datasets import Dataset

from ceu_rl import CEUDPOConfig, CEUDPOTrainer
from ceu_rl.run.checkpoints import WholeCheckpoints, saved_checkpoints

from .conftest import SMALL

SAVED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
ROWS = Dataset.from_list([{"prompt": f"{a}+1=", "chosen": f"{a + 1}", "rejected": f"{a}"} for a in range(8)])


@pytest.mark.parametrize("written", [None, "", '{"global_step": 4, "log_his', '{"global_step": 4}'])
def test_a_half_written_checkpoint_is_skipped(tmp_path, written):
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").touch()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text('{"global_step": 2}')
    if written is not None:
        (tmp_path / "checkpoint-4" / "trainer_state.json").write_text(written)
    whole = written == '{"global_step": 4}'
    assert [step for step, _ in saved_checkpoints(tmp_path)] == ([2, 4] if whole else [2])


def test_what_has_no_step_in_its_name_is_nobodys_checkpoint(tmp_path):
    for name in ("checkpoint-2", "checkpoint-best", "checkpoint-²", "checkpoint-"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    assert saved_checkpoints(tmp_path) == [(2, tmp_path / "checkpoint-2")]


@pytest.fixture
def make_trainer(base, tmp_path):
    def make(**given):
        args = CEUDPOConfig(str(tmp_path / "out"), **{**SMALL, **SAVED, **given})
        return CEUDPOTrainer(str(base), args=args, train_dataset=ROWS)

    return make


class Killed(BaseException):
    pass


def test_a_checkpoint_that_is_written_again_counts_once_it_is_whole_again(make_trainer, tmp_path, monkeypatch):
    """A run that goes on from checkpoint-2 writes checkpoint-4 over what an earlier run left there."""
    make_trainer().train()
    assert [step for step, _ in saved_checkpoints(tmp_path / "out")] == [2, 4]
    trainer = make_trainer()

    def killed(*args, **kwargs):
        raise Killed

    monkeypatch.setattr(trainer, "_save", killed)
    with pytest.raises(Killed):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert [step for step, _ in saved_checkpoints(tmp_path / "out")] == [2]


def test_the_state_waits_for_what_every_process_writes():
    """The first process may not say that a checkpoint is whole while another still writes its random state."""
    done = []

    class Parent:
        def _save_rng_state(self, output_dir):
            done.append(f"rng state in {output_dir}")

    class Trainer(WholeCheckpoints, Parent):
        class accelerator:
            @staticmethod
            def wait_for_everyone():
                done.append("waited")

    Trainer()._save_rng_state("checkpoint-2")
    assert done == ["rng state in checkpoint-2", "waited"]
