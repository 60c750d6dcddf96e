"""The comparison: its grid, real runs through the command line, and what survives a kill."""

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from ceu_rl.cli import main
from ceu_rl.stability import grid, job, launch, report
from ceu_rl.stability.grid import folder_name, make_jobs, parse
from ceu_rl.stability.runs import Run

from .conftest import SMALL

ROOT = Path(__file__).parents[1]


# The grid


def test_hyphens_are_underscores_and_every_other_option_is_a_field():
    words = ["a.yaml", "b.yaml", "--output-dir", "D", "--dry-run", "--accelerate-config=c-d.yaml"]
    words += ["--learning-rate", "1e-5", "-3", "--seed=0", "1", "--dataset", "a", "--model=c", "--use_vllm", "false"]
    args, recipes, fields = parse(words)
    assert (args.output_dir, args.dry_run, args.accelerate_config) == (Path("D"), True, Path("c-d.yaml"))
    assert recipes == [Path("a.yaml"), Path("b.yaml")]
    given = {"learning_rate": ["1e-5", "-3"], "seed": ["0", "1"], "use_vllm": ["false"]}
    assert fields == {**given, "dataset_name": ["a"], "model_name_or_path": ["c"]}
    assert parse(["--jobs", "2", "a.yaml", "b.yaml", "--seed", "1"])[1] == recipes


@pytest.fixture
def two_recipes(tmp_path):
    (tmp_path / "dpo").mkdir()
    paths = [tmp_path / "dpo" / f"{arm}.yaml" for arm in ("stock", "ceu")]
    for path in paths:
        path.write_text("method: dpo\nseed: 7\nmax_steps: 20\ndataset_name: builtin:addition\n")
    (tmp_path / "dpo" / "field.yaml").write_text("method: dpo\nlearning_rte: 1\n")
    (tmp_path / "dpo" / "method.yaml").write_text("method: sleep\n")
    return paths


def test_the_grid_is_recipes_times_values_times_seeds(two_recipes, tmp_path):
    fields = {"learning_rate": ["1e-5", "3e-5"], "beta": ["0.1"], "seed": ["0", "1"]}
    made = make_jobs(two_recipes, fields, tmp_path / "runs")
    assert [(job.run.arm, job.run.setting["learning_rate"], job.run.seed) for job in made] == [
        (arm, rate, seed) for arm in ("stock", "ceu") for rate in (1e-5, 3e-5) for seed in (0, 1)
    ]
    job = made[-1]
    assert job.folder == tmp_path / "runs" / "ceu" / "learning_rate=3e-5" / "1"
    assert job.run.setting == {"learning_rate": 3e-5}  # beta tells no run from another
    assert not job.evaluation
    said = f"dpo --config {two_recipes[1]} --learning_rate 3e-5 --beta 0.1 --seed 1 --output_dir {job.folder}"
    assert " ".join(job.words) == f"{said} --disable_tqdm true"
    assert (job.settings["learning_rate"], job.settings["beta"], job.settings["seed"]) == (3e-5, 0.1, 1)
    assert len({job.folder for job in made}) == 8


def test_without_fields_there_is_one_run_a_recipe_with_its_seed(two_recipes, tmp_path):
    # One with a byte order mark is read too
    two_recipes[0].write_bytes(b"\xef\xbb\xbfmethod: dpo\nseed: 3\nlearning-rate: 1e-4\n")
    first, second = make_jobs(two_recipes, {}, tmp_path)
    assert (first.run.seed, second.run.seed, first.settings["learning_rate"]) == (3, 7, 1e-4)
    assert first.folder == tmp_path / "stock" / "recipe" / "3" and first.run.setting == {}


def test_a_folder_has_a_short_and_safe_name(two_recipes, tmp_path):
    """Only what varies is in it, whatever and however much that is; a name that was too long ended every later call."""
    long = ["x" * 300, "x" * 299 + "y"]
    fields = {"run_name": long, "learning_rate": ["1e-5"], "loss_type": ["ipo"], "dataset_config": ["a/b c", "a/b:c"]}
    fields |= {name: ["1", "2"] for name in ("beta", "max_grad_norm", "warmup_steps", "weight_decay")}
    folders = {job.folder for job in make_jobs(two_recipes[:1], fields, tmp_path)}
    assert len(folders) == 64 and all(len(folder.parent.name) <= 80 for folder in folders)
    assert all(re.fullmatch(r"[\w.+=,-]+", folder.parent.name) for folder in folders)
    assert folder_name({"learning_rate": 3e-5, "beta": 0.5}) == "learning_rate=3e-5,beta=0.5"
    one, other, *_ = make_jobs(two_recipes, {"model_name_or_path": ["runs/a", "runs:a"]}, tmp_path)
    assert one.folder.parents[2] == tmp_path and one.folder != other.folder and "runs/a" in one.words


def test_a_grid_that_grows_keeps_its_folders(quick):
    assert len(quick("--beta", "0.1")[2]) == 2
    status, out, began = quick("--beta", "0.1", "0.5")
    assert status == 0 and len(began) == 2 and "2 done earlier and kept" in out, out
    assert {run.setting["beta"] for run in runs_of(Path("runs"))} == {0.1, 0.5}


def test_an_accelerate_config_launches_each_run(two_recipes, tmp_path):
    config = ROOT / "recipes" / "accelerate" / "fsdp2_cpu.yaml"
    job = make_jobs(two_recipes, {}, tmp_path, accelerate_config=config)[0]
    assert job.launcher[-4:] == ["accelerate.commands.launch", "--config_file", str(config), "-m"]
    with pytest.raises(ValueError, match=r"missing.yaml is no file"):
        make_jobs(two_recipes, {}, tmp_path, accelerate_config=tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("path", "method", "evaluation"),
    [
        ("tofu/smollm2/npo", "unlearn", "tofu-eval"),
        ("muse/articles/ceu_retain", "unlearn", "muse-eval"),
        ("dpo/addition/base", "sft", None),
    ],
)
def test_the_method_is_the_field_of_the_recipe(tmp_path, path, method, evaluation):
    """The folder decided before: an SFT recipe of TOFU became an unlearning run, and MUSE recipes failed."""
    (tmp_path / "retain.json").write_text("{}")
    (job,) = make_jobs([ROOT / "recipes" / f"{path}.yaml"], {}, tmp_path, retain=tmp_path / "retain.json")
    assert job.run.planned["method"] == job.words[0] == method
    assert job.evaluation[:1] == ([evaluation] if evaluation else [])
    if evaluation == "tofu-eval":
        words = ["--dataset", "locuslab/TOFU", "--split", "forget01", "--retain", str(tmp_path / "retain.json")]
        assert job.evaluation[1:] == ["--model", str(job.folder), *words]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{stock}", "{stock}"], "Two recipes have one name"),
        (["{stock}", "{folder}/field.yaml"], "field.yaml: There is no field 'learning_rte'; did you mean "),
        (["{stock}", "{folder}/method.yaml"], "method is 'sleep'; write one of dpo, grpo, sft, unlearn"),
        (["{stock}", "--output_dir", ""], "--output_dir is ''; give a folder."),
        (["{stock}", "--jobs", "0"], "--jobs is 0; use at least 1."),
        (["{stock}", "--beta"], "--beta has no value"),
        (["no/dpo/such.yaml"], "no/dpo/such.yaml is no file; check its name."),
        (["{stock}", "--output-dir", "{stock}"], "stock.yaml is a file; choose a folder."),
        (["{stock}", "--retain", "no/such.json"], "no/such.json is no file"),
        (["{stock}", "--retain", "{stock}"], "stock.yaml is empty, cut short or no record"),
        ([], "No recipe is given"),
        (["{folder}"], "dpo is a folder; name a file in it."),
        (["{stock}", "--learning_rte", "1e-5", "3e-5"], "did you mean learning_rate?"),
        (["{stock}", "--seed", "a"], "argument --seed: invalid int value: 'a'"),
        (["{stock}", "--learning_rate", "1e-4", "0.0001"], "--learning_rate has a value twice (1e-4 0.0001)"),
        (["{stock}", "--learning_rate", "1e-5", "nan"], "learning_rate is nan; use a finite number."),
        (["{stock}", "--resume-from-checkpoint", "true"], "--resume_from_checkpoint is given"),
        (["{stock}", "--learning_rate", "1", "--learning-rate", "2"], "--learning_rate is given twice"),
        (["{stock}", "--dataset", "a", "--dataset_name", "b"], "--dataset_name is given twice"),
        (["{stock}", "--learning_rate", "0", "1e-5"], "learning_rate is 0, which trains nothing"),
        (["{stock}", "--launcher_config", "{stock}"], "--launcher local takes no options, but"),
        (["{stock}", "--model_name_or_path", "/no/such/model"], "model_name_or_path /no/such/model is no folder"),
    ],
)
def test_bad_input_is_one_sentence(two_recipes, tmp_path, capsys, words, message):
    words = [word.format(stock=two_recipes[0], folder=tmp_path / "dpo") for word in words]
    assert main(["compare", "--output-dir", str(tmp_path / "runs"), *words]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1
    assert not list(tmp_path.glob("runs/*"))


# Real runs


@pytest.fixture
def recipes(tmp_path, base, preferences, monkeypatch):
    """Write DPO recipes with an evaluation at each step."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "rows").mkdir()
    for split in ("train", "test"):
        preferences.select(range(16)).to_json(tmp_path / "rows" / f"{split}.jsonl")

    def write(arm, **fields):
        where = {"model_name_or_path": str(base), "dataset_name": str(tmp_path / "rows")}
        evaluated = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
        settings = {"method": "dpo", **where, **SMALL, "max_steps": 2, "seed": 0, **evaluated, **fields}
        (tmp_path / f"{arm}.yaml").write_text(yaml.safe_dump(settings))
        return str(tmp_path / f"{arm}.yaml")

    return write


def test_compare_runs_keeps_and_names(recipes, tmp_path, tiny_model, capsys):
    out = tmp_path / "runs"
    broken_model = tiny_model()
    with torch.no_grad():
        broken_model.lm_head.weight.fill_(float("nan"))
    shutil.copytree(tmp_path / "base", tmp_path / "nan")
    broken_model.save_pretrained(tmp_path / "nan")
    good, bad = recipes("stock", ceu_coef=0), recipes("broken", max_length=1)
    diverges = recipes("wild", model_name_or_path=str(tmp_path / "nan"), eval_strategy="no", eval_on_start=False)
    command = ["compare", good, bad, diverges, "--jobs", "2", "--output_dir", str(out)]
    assert main(command) == 1
    runs = json.loads((out / "report.json").read_text())["runs"]
    assert [run["status"] for run in runs] == ["finished", "failed", "diverged"]
    assert (out / "report.html").stat().st_size > 10_000
    failure, wild = (json.loads((out / arm / "recipe/0/failure.json").read_text()) for arm in ("broken", "wild"))
    assert failure["status"] == 2 and "max_length" in failure["reason"] and failure["log_tail"]
    assert failure["versions"]["trl"] and failure["method"] == "dpo"
    assert wild["diverged"] and wild["reason"].startswith("Step 1 met a non-finite loss (nan)")
    assert "broken/recipe/0: failed: " in capsys.readouterr().out

    # Again, with what failed mended: the finished and the diverged run are kept, and not started again
    logs = [out / arm / "recipe" / "0" / "log.txt" for arm in ("stock", "wild")]
    kept = [path.read_text() for path in logs]
    recipes("broken")
    assert main(command) == 0
    assert "2 done earlier and kept, 1 to do" in capsys.readouterr().out
    assert kept == [path.read_text() for path in logs]
    assert not (out / "broken" / "recipe" / "0" / "failure.json").exists()


# The ways of a comparison with runs that take no time: a stand-in for the command line


QUICK = """
import json, os, pathlib, sys, yaml
with open(pathlib.Path(__file__).with_name("started"), "a") as file:
    if "--results" in sys.argv:
        path, retain = (sys.argv[sys.argv.index(name) + 1] for name in ("--results", "--retain"))
        file.write(f"compared with {retain}\\n")
        found = json.loads(pathlib.Path(path).read_text())
        pathlib.Path(path).write_text(json.dumps({**found, "retain": retain}))
        sys.exit()
    file.write(f"{sys.argv[sys.argv.index('--output_dir' if '--output_dir' in sys.argv else '--model') + 1]}\\n")
if "tofu-eval" in sys.argv:
    folder = pathlib.Path(sys.argv[sys.argv.index("--model") + 1])
    if "FAIL" in os.environ:
        sys.exit("ceu-rl tofu-eval: error: no memory")
    (folder / "tofu_eval.json").write_text('{"summary": {"model_utility": 0.5, "forget_quality": 0.1}}')
    sys.exit()
folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
settings = yaml.safe_load(pathlib.Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
method = settings.pop("method")
for path in os.environ.get("EDIT", "").split():
    pathlib.Path(path).write_text("seed: 7\\nlearning_rate: 9.0\\n")
(folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5}) + "\\n")
(folder / "result.json").write_text(json.dumps({"method": method, "settings": settings, "steps": 1}))
"""


class Inside:
    """Does a job in this process, at once."""

    def __init__(self, job, at_once, slots):
        self.outcome = launch.run_job(job)

    def done(self):
        return True

    def result(self):
        return self.outcome


@pytest.fixture
def quick(two_recipes, tmp_path, monkeypatch, capsys):
    """Compare the two recipes by runs that only record their settings; returns the status, output and what started."""
    (tmp_path / "quick.py").write_text(QUICK)
    for module in (grid, job):
        monkeypatch.setattr(module, "MODULE", [sys.executable, str(tmp_path / "quick.py")])
    monkeypatch.setattr(launch, "POLL", 0.02)
    monkeypatch.setattr(launch, "Worker", Inside)
    monkeypatch.setattr(report, "_html", lambda *args: "a page")
    monkeypatch.chdir(tmp_path)

    def call(*words, out="runs"):
        began = tmp_path / "started"
        began.write_text("")
        status = main(["compare", *map(str, two_recipes), *words, "--output_dir", str(out)])
        read = capsys.readouterr()
        return status, read.out + read.err, began.read_text().splitlines()

    return call


def test_what_happens_to_a_recipe_meanwhile_changes_nothing(quick, two_recipes, monkeypatch, tmp_path):
    monkeypatch.setenv("EDIT", " ".join(map(str, two_recipes)))
    status, _, began = quick("--learning-rate", "1e-4", "--seed", "0", "1")
    assert status == 0 and len(began) == 4
    recorded = [json.loads(path.read_text())["settings"] for path in results(tmp_path)]
    assert {(settings["learning_rate"], settings["max_steps"]) for settings in recorded} == {(1e-4, 20)}
    assert sorted(settings["seed"] for settings in recorded) == [0, 0, 1, 1] and "output_dir" not in recorded[0]


def test_a_value_is_the_same_however_it_is_written(quick):
    assert len(quick("--learning_rate", "1e-4", "3e-4", "--bf16", "true")[2]) == 4
    for written in ("1.0e-4", "0.0001", "1E-04"):
        status, out, began = quick("--bf16", "True", "--learning-rate", written, "0.0003")
        assert status == 0 and began == [] and "4 done earlier and kept, 0 to do" in out


def test_a_recipe_that_says_the_same_is_the_same_and_another_one_is_refused(quick, two_recipes, tmp_path):
    assert len(quick()[2]) == 2
    fields = "method: dpo\nseed: 7\nmax-steps: 20\ndataset_name: builtin:addition\n"
    two_recipes[0].write_text(fields + "output_dir: elsewhere\nresume_from_checkpoint: true\n")
    assert quick()[2] == []
    two_recipes[0].write_text(fields + "beta: 0.3\n")
    folder = tmp_path / "runs" / "stock" / "recipe" / "7"
    for name in ("result.json", "run.json"):  # finished, then interrupted
        status, out, began = quick()
        assert status == 2 and began == [] and f"{name} was made with other settings (beta: None, now 0.3)" in out
        (folder / "result.json").unlink(missing_ok=True)
    # One that failed starts again, beside what it left
    (folder / "failure.json").write_text(json.dumps({"settings": {}, "reason": "no memory", "status": 1}))
    status, _, began = quick()
    assert status == 0 and began == ["runs/stock/recipe/7"]
    assert all((folder.with_name("7-interrupted-1") / name).is_file() for name in ("failure.json", "metrics.jsonl"))


def test_a_comparison_that_was_moved_goes_on(quick, tmp_path):
    assert len(quick("--seed", "0", "1")[2]) == 4
    shutil.copytree(tmp_path / "runs", tmp_path / "copy")
    (tmp_path / "copy" / "ceu" / "recipe" / "1" / "result.json").unlink()
    assert quick("--seed", "0", "1", out=tmp_path / "copy")[::2] == (0, [f"{tmp_path}/copy/ceu/recipe/1"])


@pytest.mark.parametrize("name", ["result.json", "failure.json", "run.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"", b"[" * 100_000], ids=["", "deep"])
def test_a_broken_outcome_costs_its_run_and_nothing_else(quick, tmp_path, name, content):
    quick()
    (tmp_path / "runs" / "ceu" / "recipe" / "7" / name).write_bytes(content)
    report_only = quick("--report_only")[0]
    (run,) = (run for run in json.loads(Path("runs/report.json").read_text())["runs"] if run["arm"] == "ceu")
    if name == "metrics.jsonl":
        assert report_only == 0 and run["status"] == "finished"
        return
    assert report_only == 1 and run["status"] == "failed" and f"ceu/recipe/7/{name}" in run["reason"]
    status, _, began = quick()  # with another file broken the result is whole
    assert status == 0 and began == ["runs/ceu/recipe/7"] * (name == "result.json")
    assert {run.status for run in runs_of(tmp_path / "runs")} == {"finished"}


def test_what_an_evaluation_lacks_is_evaluated_and_not_trained_again(quick, two_recipes, tmp_path, monkeypatch):
    for path in two_recipes:
        path.write_text("method: unlearn\ndataset_name: builtin:authors\nseed: 7\n")
    monkeypatch.setenv("FAIL", "1")
    status, out, began = quick()
    assert status == 1 and began == ["runs/stock/recipe/7"] * 2 + ["runs/ceu/recipe/7"] * 2
    assert "ceu/recipe/7: failed: no memory" in out
    monkeypatch.delenv("FAIL")
    assert quick()[::2] == (0, ["runs/stock/recipe/7", "runs/ceu/recipe/7"])
    (tmp_path / "runs/ceu/recipe/7/tofu_eval.json").write_text('{"summary": {"model_ut')
    assert quick()[::2] == (0, ["runs/ceu/recipe/7"]) and not list(tmp_path.glob("runs/*/*/*-interrupted*"))


def test_a_retain_model_that_comes_later_is_compared_with_and_nothing_is_trained(quick, two_recipes, tmp_path):
    for path in two_recipes:
        path.write_text("method: unlearn\ndataset_name: builtin:authors\nseed: 7\n")
    assert quick()[0] == 0
    for name in ("one.json", "other.json"):
        (tmp_path / name).write_text('{"summary": {"model_utility": 0.5}}')
        given = ["--retain", str(tmp_path / name)]
        assert quick(*given)[::2] == (0, [f"compared with {tmp_path / name}"] * 2)
        assert quick(*given)[::2] == (0, []) == quick()[::2]


@pytest.mark.parametrize("states", [("trainer_state.json", "optimizer.pt", "scheduler.pt"), ()])
def test_what_cannot_be_continued_is_moved_aside(quick, tmp_path, states):
    """A checkpoint of a run without recorded settings, and one that a kill cut short."""
    quick()
    folder = tmp_path / "runs" / "stock" / "recipe" / "7"
    for name in ("result.json", *["run.json"] * bool(states)):
        (folder / name).unlink()
    (folder / "checkpoint-2").mkdir()
    for name in states:
        (folder / "checkpoint-2" / name).write_text("{}")
    assert quick()[::2] == (0, ["runs/stock/recipe/7"])
    assert (folder.with_name("7-interrupted-1") / "checkpoint-2").is_dir() and not (folder / "checkpoint-2").exists()


def test_a_disk_that_fills_costs_its_run_and_the_report_stays_whole(quick, tmp_path, monkeypatch):
    """The recipe of one run and the failure of another cannot be written; later the report cannot either."""
    write = Path.write_text

    def full(path, *args, **kwargs):
        if path.match(os.environ["FULL"]):
            path.touch()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, *args, **kwargs)

    monkeypatch.setenv("FULL", "*/ceu/recipe/7/recipe.yaml.part")
    monkeypatch.setattr(Path, "write_text", full)
    status, out, began = quick()
    assert status == 1 and began == ["runs/stock/recipe/7"]
    assert "ceu/recipe/7: failed: runs/ceu/recipe/7/recipe.yaml.part cannot be written (No space left on device)" in out
    before = (tmp_path / "runs" / "report.html").read_bytes()
    monkeypatch.setenv("FULL", "*/report.html.part")
    status, out, began = quick()
    assert status == 2 and began == ["runs/ceu/recipe/7"]
    assert "error: [Errno 28] No space left on device: 'runs/report.html.part'" in out
    assert (tmp_path / "runs" / "report.html").read_bytes() == before
    assert not list((tmp_path / "runs").glob("*.part"))


def test_dry_run_prints_commands_that_a_shell_takes_and_writes_nothing(quick, two_recipes, tmp_path):
    status, out, began = quick("--learning-rate", "1e-4", "--reward_model_path", "a b", "--dry-run")
    assert status == 2  # and the field is refused as in a run
    status, out, began = quick("--learning-rate", "1e-4", "--run_name", "a b", "--dry-run", out="new runs")
    assert status == 0 and began == [] and not (tmp_path / "new runs").exists()
    lines = [shlex.split(line) for line in out.splitlines()]
    assert len(lines) == 2 and lines[0][-12:] == [
        *("--config", str(two_recipes[0]), "--learning_rate", "1e-4", "--run_name", "a b", "--seed", "7"),
        *("--output_dir", "new runs/stock/learning_rate=1e-4/7", "--disable_tqdm", "true"),
    ]
    quick()
    assert all(line.startswith("# done: ") for line in quick("--dry_run")[1].splitlines())


def test_report_only_draws_what_lies_there_and_names_what_is_missing(quick, tmp_path, capsys):
    quick("--seed", "0")
    status, out, began = quick("--seed", "0", "1", "--report_only")
    assert status == 1 and began == [] and "2 of 4 runs finished" in " ".join(out.split())
    assert main(["compare", "--report-only", "--output-dir", "runs"]) == 2
    assert "No recipe is given" in capsys.readouterr().err


# What survives a kill


DRIVER = """
import signal, sys
from ceu_rl.stability import grid, report
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell's background job starts
grid.MODULE = [sys.executable, "-m", "tests.stand_in_run"]
report.write_report = lambda *args: None
sys.exit(grid.main(sys.argv[1:]))
"""


@pytest.fixture
def comparison(two_recipes, tmp_path):
    """Start a comparison of 2 recipes with 2 rates and 2 seeds, four at a time."""
    words = [*map(str, two_recipes), "--learning_rate", "1e-5", "3e-5", "--seed", "0", "1", "--jobs", "4"]
    running = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, *words, "--output_dir", "runs"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()


def runs_of(folder):
    """The runs of a folder by their arm, with the setting of each."""
    found = [(path.parent, json.loads(path.read_text())) for path in Path(folder).glob("*/*/*/run.json")]
    found = [(path, record) for path, record in found if path.name.isdecimal()]
    return [Run(record["arm"], record["overrides"], record["seed"], path) for path, record in found]


def results(tmp_path):
    return list((tmp_path / "runs").glob("*/*/*/result.json"))


def started(tmp_path):
    """For each start of a run its folder, its process, and whether it continued from a checkpoint."""
    lines = [(path, line.split()) for path in (tmp_path / "runs").glob("*/*/*.started") for line in path.open()]
    return [(path.with_suffix(""), int(words[0]), "--resume_from_checkpoint" in words) for path, words in lines]


def wait_until(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(process.stdout.read())
        time.sleep(0.02)


@pytest.mark.parametrize("machine", [False, True], ids=["the comparison", "the machine"])
def test_what_is_killed_half_way_leaves_no_run_undone_and_does_none_twice(comparison, tmp_path, machine):
    """Without the comparison what it started continues, and is waited for; a machine takes its runs with it."""
    process = comparison()
    wait_until(lambda: len(results(tmp_path)) >= 2, process)
    (tmp_path / "hold").touch()
    time.sleep(1)  # from here on none ends
    wait_until(lambda: len(started(tmp_path)) == len(results(tmp_path)) + 4, process)
    process.kill()
    process.wait()
    before = {path.parent for path in results(tmp_path)}
    cut_short = {folder: number for folder, number, _ in started(tmp_path) if folder not in before}
    for number in cut_short.values() if machine else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    again = comparison()
    assert f"8 runs in runs: {len(before)} done earlier and kept" in again.stdout.readline()
    time.sleep(0 if machine else 2)  # it finds what is still training
    (tmp_path / "hold").unlink()
    out, _ = again.communicate(timeout=300)
    assert again.returncode == 0, out
    runs = started(tmp_path)
    assert len(results(tmp_path)) == len({folder for folder, *_ in runs}) == 8 and len(cut_short) == 4
    assert {folder for folder, _, resumed in runs if resumed} == ({*cut_short} if machine else set())
    assert len(runs) == 8 + machine * 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_runs_with_a_checkpoint_and_says_how_to_go_on(comparison, tmp_path, number):
    process = comparison()
    wait_until(lambda: len(started(tmp_path)) >= 4, process)
    (tmp_path / "hold").touch()
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in out
    assert "Ending the runs after their step, with a checkpoint" in out
    assert out.splitlines()[-1] == "ceu-rl compare: interrupted; the same command continues where it stopped."
    ended = [path.parent for path in (tmp_path / "runs").glob("*/*/*/saved")]
    assert ended and not any((folder / "failure.json").exists() for folder in ended)
    assert_none_is_left(tmp_path)


def test_a_second_ctrl_c_ends_the_runs_at_once(comparison, tmp_path):
    process = comparison()
    wait_until(lambda: len(started(tmp_path)) >= 4, process)
    for name in ("hold", "slow"):
        (tmp_path / name).touch()
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in out and not list(tmp_path.glob("runs/*/*/*/saved"))
    assert_none_is_left(tmp_path)


def assert_none_is_left(tmp_path):
    for _, number, _ in started(tmp_path):
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)
