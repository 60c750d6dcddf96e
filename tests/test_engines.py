"""One process, data parallel, FSDP2 and DeepSpeed train the same weights, and say so where they cannot."""

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy

from ceu_rl.run import engines
from ceu_rl.run.checkpoints import check_resumes

from .engines import CASES

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "accelerate"
CORE = ["dpo", "unlearn-ceu", "unlearn-npo", "grpo-generate"]
BFLOAT16 = ["dpo-long", "grpo-old"]
START = ["dpo-start", "dpo-lora-start", "grpo-start"]
FAST = [*CORE, *BFLOAT16, *START]  # trained together: most of the time is the start of a process
REST = [case for case in CASES if case not in FAST]
deepspeed = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
ENGINES = ["ddp", "fsdp2", pytest.param("zero2", marks=deepspeed), pytest.param("zero3", marks=deepspeed)]
# Means over the batch of each process, which TRL weighs alike, and of an odd last batch from its first rows alone
BY_PROCESS = ("logits/", "mean_token_accuracy", "entropy", "num_tokens", "kl")
CLOCK = ("runtime", "per_second", "step_time", "flos")


def launcher(engine, folder):
    if engine == "one":
        return []
    config = RECIPES / f"{engine.partition('-')[0].replace('zero2', 'zero3')}_cpu.yaml"
    text = config.read_text().replace("zero_stage: 3", f"zero_stage: {engine[4:5]}")
    if engine.endswith("bf16"):
        text = text.replace('mixed_precision: "no"', "mixed_precision: bf16")
    if engine.endswith("sharded"):
        text = text.replace("FULL_STATE_DICT", "SHARDED_STATE_DICT")
    if engine.endswith("efficient"):
        text = text.replace("cpu_ram_efficient_loading: false", "cpu_ram_efficient_loading: true")
    (folder / f"{engine}.yaml").write_text(text)
    return ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file", folder / f"{engine}.yaml"]


@pytest.fixture(scope="module")
def launch(tmp_path_factory, tokenizer):
    """Train cases under an engine, each once, and give the folder of the runs and what was printed as errors."""
    from ceu_rl.models import build_model

    from .conftest import TINY

    folder = tmp_path_factory.mktemp("engines")
    build_model(tokenizer, seed=1, **TINY).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    @functools.cache
    def run(engine, *cases):
        result = subprocess.run(
            [sys.executable, *launcher(engine, folder), "-m", "tests.engines", folder, engine, *cases],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TRL_EXPERIMENTAL_SILENCE": "1"},
            cwd=ROOT,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return folder, result.stderr

    return run


def read(folder):
    weights = load_file(next(folder.glob("*.safetensors")))
    return json.loads((folder / "log.json").read_text()), weights


def assert_same_weights(one, other, start):
    """Each weight moved alike. Adam shows the rounding of an element of hardly any gradient: its tensor is measured."""
    assert one.keys() == other.keys()
    moves = {name: one[name] - start.get(name, 0) for name in one}
    most = max(move.abs().max() for move in moves.values())
    assert most > 4e-3
    for name, move in moves.items():
        assert (other[name] - one[name]).abs().max() <= 5e-3 * most, name
        assert (other[name] - one[name]).norm() <= 5e-4 * move.norm(), name


def compare(folder, engine, cases):
    start = load_file(folder / "model" / "model.safetensors")
    for case in cases:
        (one, weights), (two, theirs) = read(folder / "one" / case), read(folder / engine / case)
        assert two["processes"] == 2
        assert two["sharded"] == (engine in ("fsdp2", "zero3", "fsdp2-efficient"))
        assert len(one["log"]) == 6 + case.startswith("dpo")  # five steps and the summary, and what is logged alone
        for first, second in zip(one["log"], two["log"], strict=True):
            step = first["step"]
            assert first.keys() == second.keys()
            for key, value in first.items():
                if any(part in key for part in CLOCK) or (step >= 3 and key.startswith(BY_PROCESS)):
                    continue
                assert float(second[key]) == pytest.approx(float(value), rel=1e-3, abs=2e-6), (engine, case, step, key)
        assert_same_weights(weights, theirs, start)


@pytest.mark.parametrize(("cases", "compared"), [(FAST, CORE), pytest.param(REST, REST, marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_trains_what_one_process_trains(launch, engine, cases, compared):
    """Loss, metrics and weights, with gradient accumulation, clipping and a last batch of one row."""
    folder, _ = launch("one", *cases)
    launch(engine, *cases)
    compare(folder, engine, compared)


@pytest.mark.parametrize(
    "engine",
    ["fsdp2-bf16", pytest.param("ddp-bf16", marks=pytest.mark.slow), pytest.param("zero3-bf16", marks=deepspeed)],
)
def test_bfloat16_keeps_log_probabilities_and_ratios(launch, engine):
    """FSDP2 would round what the model returns to bfloat16: sums of -370 nats to a grid of two, and GRPO's ratios."""
    folder, _ = launch("ddp", *FAST)
    launch(engine, *BFLOAT16)
    first, second = ([read(folder / one / case)[0]["log"] for case in BFLOAT16] for one in ("ddp", engine))
    for key in ("logps/chosen", "logps/rejected"):
        assert first[0][0][key] < -360
        assert second[0][0][key] == pytest.approx(first[0][0][key], abs=0.04)  # a mean of four sums
    of_float32, of_bfloat16 = first[1][1]["drift"], second[1][1]["drift"]  # the second step uses the first's rollouts
    assert of_float32 > 0.05 and of_bfloat16 == pytest.approx(of_float32, abs=5e-3)


@pytest.mark.parametrize(
    "engine",
    [
        *("fsdp2", *ENGINES[2:]),
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("ddp", "fsdp2-bf16")),
        pytest.param("zero2-bf16", marks=deepspeed),
    ],
)
def test_evaluations_compare_with_the_start_under_every_engine(launch, engine):
    """The trainer's reference (dpo), the policy without its adapter, and a model that is loaded for it (grpo)."""
    folder, _ = launch("one", *FAST)
    launch(engine, *(START if engine.endswith("bf16") else FAST))
    for case in START:
        logs = (read(folder / which / case)[0]["log"] for which in ("one", engine))
        one, two = ([entry["eval_kl"] for entry in log if "eval_kl" in entry] for log in logs)
        assert one[0] == two[0] == 0.0
        assert min(one[1], two[1]) > 1e-5
        assert engine.endswith("bf16") or two[1] == pytest.approx(one[1], rel=1e-2)


@pytest.mark.slow
def test_weights_that_one_process_reads_for_all(launch):
    """With fsdp_cpu_ram_efficient_loading a reference would be empty on all processes but the first, and is refused."""
    refused, trained = ["dpo", "unlearn-npo", "unlearn-undial", "grpo"], ["dpo-lora", "unlearn-ceu", "grpo-generate"]
    folder, _ = launch("one", *FAST)
    launch("one", *REST)
    _, printed = launch("fsdp2-efficient", *refused, *trained)
    for case in refused:
        assert f"fsdp2-efficient {case}: fsdp_cpu_ram_efficient_loading is true" in printed
        assert not (folder / "fsdp2-efficient" / case / "log.json").exists()
    compare(folder, "fsdp2-efficient", trained)


SAVED = ["dpo+3", "dpo-lora+3"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ("one", "ddp"),
        ("ddp", "one"),
        ("fsdp2", "fsdp2"),
        ("fsdp2-sharded", "fsdp2-sharded"),
        pytest.param("zero2", "zero2", marks=deepspeed),
        pytest.param("zero3", "zero3", marks=deepspeed),
    ],
)
def test_a_checkpoint_goes_on_under_an_engine_of_its_kind(launch, saved, resumed):
    folder, _ = launch("one", *FAST)
    launch("one", *REST)
    launch(saved, *SAVED)
    goes_on = [f"{case}+5@{saved}/{case}+3" for case in ("dpo", "dpo-lora")]
    launch(resumed, *goes_on)
    start = load_file(folder / "model" / "model.safetensors")
    for case, name in zip(("dpo", "dpo-lora"), goes_on, strict=True):
        (_, weights), (_, theirs) = read(folder / "one" / case), read(folder / resumed / name.replace("/", "-"))
        assert_same_weights(weights, theirs, start)


@pytest.mark.parametrize(
    ("files", "engines"),
    [
        (["optimizer.pt", "scheduler.pt"], {"NO", "MULTI_CPU", "MULTI_GPU"}),
        (["optimizer.pt"], set()),  # of save_only_model
        (["pytorch_model_fsdp_0", "scheduler.pt"], {"FSDP"}),
        (["global_step3"], {"DEEPSPEED"}),
    ],
)
def test_a_checkpoint_is_resumed_by_the_kind_of_engine_that_saved_it(tmp_path, files, engines):
    for name in files:
        (tmp_path / name).touch()
    for name in ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED"):
        refusal = pytest.raises(ValueError, match=f"lacks .* run under {name} resumes")
        with contextlib.nullcontext() if name in engines else refusal:
            check_resumes(tmp_path, DistributedType[name])


STUBS = {
    "scontrol": "echo 127.0.0.1",
    # srun starts one task on each of two machines, both of them this one
    "srun": 'shift; SLURM_NODEID=0 "$@" & SLURM_NODEID=1 "$@" & wait -n && wait -n',
}


def test_a_slurm_job_of_two_machines_is_one_run_of_two_processes(recipe, tmp_path):
    """The batch file and multi_node.yaml as they are, but for the precision; Slurm's own commands are stand-ins."""
    for name, line in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    config = tmp_path / "multi_node.yaml"
    config.write_text((RECIPES / "multi_node.yaml").read_text().replace("bf16", '"no"'))
    slurm = {"SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2"}
    slurm |= {"SLURM_GPUS_ON_NODE": "1", "SLURM_NTASKS": "2"}
    slurm |= {"PATH": f"{tmp_path}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    slurm |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    batch = ["bash", RECIPES / "slurm.sbatch", config, "dpo", "--config", recipe(max_steps=1)]
    result = subprocess.run(batch, capture_output=True, text=True, env={**os.environ, **slurm}, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["processes"] == 2 and result["peak_host_memory_gib"] > 0.1
    assert result["tokens_per_second_per_process"] == pytest.approx(result["tokens_per_second"] / 2, abs=0.1)


def test_fsdp2_returns_what_the_model_computed_and_sums_gradients_in_float32():
    class Trainer:
        def create_accelerator_and_postprocess(self):
            self.accelerator = SimpleNamespace(state=state)

    class Ours(engines.Float32Outputs, Trainer):
        pass

    half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.bfloat16}
    policy = MixedPrecisionPolicy(**half, output_dtype=torch.bfloat16)
    plugin = SimpleNamespace(fsdp_version=2, mixed_precision_policy=policy)
    state = SimpleNamespace(fsdp_plugin=plugin)
    Ours().create_accelerator_and_postprocess()
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(torch.bfloat16, torch.float32, None)
    first = SimpleNamespace(fsdp_version=1, mixed_precision_policy=MixedPrecision(**half))
    for other in (first, SimpleNamespace(fsdp_version=2, mixed_precision_policy=None), None):
        before, state.fsdp_plugin = vars(other).copy() if other else None, other
        Ours().create_accelerator_and_postprocess()
        assert other is None or vars(other) == before


def started(processes, n_gpu=0, **given):
    return SimpleNamespace(world_size=processes, n_gpu=n_gpu, model_init_kwargs=given or None)


class TestWhatWasAskedFor:
    @pytest.fixture(autouse=True)
    def environment(self, monkeypatch):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        self.set = monkeypatch.setenv

    def test_processes_that_would_each_train_alone_are_refused(self):
        self.set("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="2 processes were started and each would train alone"):
            engines.check_processes(started(1))
        engines.check_processes(started(2))

    @pytest.mark.parametrize("given", [{}, {"dtype": "bfloat16"}])
    def test_one_process_that_sees_several_gpus_is_refused(self, given):
        """transformers would split each batch over them, or TRL the model."""
        with pytest.raises(ValueError, match=r"4 GPUs are visible.*CUDA_VISIBLE_DEVICES=0.*ddp.yaml --num_processes 4"):
            engines.check_processes(started(1, n_gpu=4, **given))
        engines.check_processes(started(1, n_gpu=4, device_map="auto"))  # split as asked for
        engines.check_processes(started(1, n_gpu=1, **given))

    @pytest.mark.parametrize(("processes", "what"), [(1, "rows"), (8, "rows"), (8, "completions")])
    def test_the_global_batch_is_said(self, caplog, processes, what):
        caplog.set_level("INFO")
        args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "world_size": processes}
        args |= {"num_generations": 8} if what == "completions" else {}
        engines.note_batch(SimpleNamespace(**args))
        assert f"Each step takes {8 * processes} {what}: 2 (per_device_train_batch_size) on {processes}" in caplog.text

    @pytest.mark.parametrize(("name", "way_out"), [("FSDP", "engines_on_cpu"), ("DEEPSPEED", "set use_cpu to false")])
    def test_an_engine_that_is_not_used_is_refused(self, name, way_out):
        class Accelerator:
            distributed_type = DistributedType.MULTI_CPU

        engines.check_engine(Accelerator())
        self.set(f"ACCELERATE_USE_{name}", "true")
        with pytest.raises(ValueError, match=f"accelerate was asked for {name} and uses MULTI_CPU.*{way_out}"):
            engines.check_engine(Accelerator())
        Accelerator.distributed_type = DistributedType(name)
        engines.check_engine(Accelerator())
