"""What counts as a checkpoint: one that every process has written to its end."""

import pytest

from ceu_rl import CEUDPOConfig, CEUDPOTrainer
from ceu_rl.run.checkpoints import WholeCheckpoints, saved_checkpoints

from .conftest import SMALL


@pytest.mark.parametrize("written", [None, "", '{"global_step": 4, "log_his', '{"global_step": 4}'])
def test_a_half_written_checkpoint_is_skipped(tmp_path, written):
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").touch()
    for name in ("checkpoint-2", "checkpoint-best", "checkpoint-²", "checkpoint-"):  # the others have no step
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "trainer_state.json").write_text('{"global_step": 2}')
    if written is not None:
        (tmp_path / "checkpoint-4" / "trainer_state.json").write_text(written)
    whole = written == '{"global_step": 4}'
    assert [step for step, _ in saved_checkpoints(tmp_path)] == ([2, 4] if whole else [2])


class Killed(BaseException):
    pass


def test_a_checkpoint_that_is_written_again_counts_once_it_is_whole_again(base, preferences, tmp_path, monkeypatch):
    """A run that goes on from checkpoint-2 writes checkpoint-4 over what an earlier run left there."""
    args = CEUDPOConfig(str(tmp_path / "out"), **SMALL | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2})
    trainer = CEUDPOTrainer(str(base), args=args, train_dataset=preferences)
    trainer.train()
    assert [step for step, _ in saved_checkpoints(tmp_path / "out")] == [2, 4]

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
