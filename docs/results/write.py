"""Write the pages and the figures of the results from the JSON beside them.

    make results        (python docs/results/write.py)

A page is `<question>.md.jinja`: its prose, and calls of the functions of [`Page`], which make the tables and figures
from the files in `<question>/`. Numbers come from there alone; the Markdown and the SVG are never edited by hand.
"""

import json
import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from ceu_rl.stability import figures
from ceu_rl.stability.runs import Run
from ceu_rl.stability.summary import COLLAPSED, GREEDY, PREFERENCE, Score, arms, condition, conditions, find_scores
from ceu_rl.stability.verdict import number, rate, setting_name

RESULTS = Path(__file__).parent
QUESTIONS = ("dpo", "dpo-real-model", "grpo", "unlearning", "speed")
UNTOLD = "not told apart"
KEPT_AND_LEARNED = (GREEDY, PREFERENCE)
GAP, TITLE, LINE = 14, 18, 16  # of a sheet of figures, in its units


def main() -> None:
    for path, text in written().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path.relative_to(RESULTS.parents[1]))


def written() -> dict[Path, str]:
    """Every page and figure by its path."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(RESULTS),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found: dict[Path, str] = {}
    answers = {}
    for question in QUESTIONS:
        page = Page(question)
        text = environment.get_template(f"{question}.md.jinja").render(page=page, rate=rate, number=number)
        found |= {RESULTS / f"{question}.md": text, **page.drawn}
        title, answer = re.findall(r"\A# (.+)\n\n((?:.+\n)+)", text)[0]
        answers[question] = {"title": title, "answer": answer}
    found[RESULTS / "README.md"] = environment.get_template("README.md.jinja").render(answers=answers)
    return found | pictures()


# Reading what was measured


@cache
def report(name: str) -> dict[str, Any]:
    """What `ceu-rl compare` wrote as `report.json`."""
    return json.loads((RESULTS / f"{name}.json").read_text())


@dataclass(frozen=True)
class Recorded(Run):
    """A run as a report keeps it: its evaluations by step, and how it ended."""

    entries: Sequence[Mapping[str, Any]]
    outcome: str
    tokens: Mapping[str, float]

    @property
    def log(self) -> list[dict[str, Any]]:
        return [dict(entry) for entry in self.entries]

    @property
    def status(self) -> str:  # type: ignore[override]
        return self.outcome

    @property
    def result(self) -> dict[str, Any]:
        return {"eval_tokens": dict(self.tokens)}

    @property
    def failure(self) -> None:
        return None


def recorded(name: str) -> list[Recorded]:
    """The runs of a report."""
    runs = []
    for record in report(name)["runs"]:
        steps = range(len(record["curves"].get("step", [])))
        entries = [{key: values[place] for key, values in record["curves"].items()} for place in steps]
        folder, tokens = RESULTS / name / record["arm"] / str(len(runs)), report(name)["tokens"]
        given = record["arm"], record["setting"], record["seed"], folder
        runs.append(Recorded(*given, entries, record["status"], tokens.get(record["arm"], tokens)))
    return runs


def single_runs(name: str) -> list[dict[str, Any]]:
    """The runs of a file that was merged from single results, each as it was written."""
    found = json.loads((RESULTS / f"{name}.json").read_text())

    def whole(part: Any) -> Any:
        if not isinstance(part, dict) or "origin" not in part:
            return part
        return {**{key: value for key, value in part.items() if key != "origin"}, **found["origins"][part["origin"]]}

    return [whole({key: whole(value) for key, value in run.items()}) for run in found["runs"]]


def demo() -> list[Run]:
    return [Run(arm, {}, 0, RESULTS / "dpo" / "demo" / arm) for arm in ("stock", "ceu", "paper")]


# Tables


class Page:
    """What the template of one question can call."""

    def __init__(self, question: str) -> None:
        self.question = question
        self.drawn: dict[Path, str] = {}

    def base(self, name: str) -> str:
        """The scores before training."""
        return ", ".join(
            f"{score.removesuffix(' accuracy')} {value:.3f}" for score, value in report(name)["base"].items()
        )

    def reach(self, name: str, arm: str, score: str) -> str:
        """The largest learning rate at which every seed of an arm keeps 95 % of the base's score."""
        return reach(_range(name, arm, score))

    def times(self, name: str, arm: str, score: str) -> str:
        """How many times as far as the baseline's that is, with the interval."""
        return times(_range(name, arm, score))

    def ranges(self, name: str) -> str:
        """The stable range of each arm, its ratio to the first arm's, and the arm's best mean score."""
        found, scores = report(name), list(report(name)["base"])
        header = ["arm"]
        for score in scores:
            short = score.removesuffix(" accuracy")
            header += [f"{short}: stable up to", "times the first arm's", f"best {short}"]
        lines = []
        for rest in _unique(entry["setting"] for entry in found["ranges"]):
            for arm in _unique(entry["arm"] for entry in found["ranges"]):
                cells = [arm + (f", {setting_name(rest)}" if rest else "")]
                for score in scores:
                    entry = _range(name, arm, score, rest)
                    cells += [reach(entry), times(entry), _best(name, arm, score, rest)]
                lines.append(cells)
        return table(header, lines)

    def groups(self, name: str) -> str:
        """Each arm at each setting over its seeds."""
        found = report(name)
        varied = [key for key in found["groups"][0]["setting"] if key != "learning_rate"]
        header = ["arm", "learning rate", *(key.replace("_", " ") for key in varied)]
        if found["tofu"]:
            header += [heading for heading, _, _ in TOFU_COLUMNS]
        else:
            preferences = any(group["depth"] is not None for group in found["groups"])
            # with the gradient of rare tokens in the log, which is there since rollouts may be stale
            stale = not preferences and any(group.get("gradient_rare") is not None for group in found["groups"])
            columns = [column for column in COLUMNS if preferences or column[1] not in ("displacement", "depth")]
            if stale:
                columns.append(("gradient of rare tokens", "gradient_rare", ".3f"))
            columns = [
                column for column in columns if any(group.get(column[1]) is not None for group in found["groups"])
            ]
            scores = [score for score in found["base"] if score != PREFERENCE.name]
            header += [
                *scores,
                *(["preference accuracy"] if preferences else []),
                *(["largest fall of greedy"] if stale else []),
                *([_most_tries(name)] if _most_tries(name) else []),
                *(heading for heading, _, _ in columns),
            ]
        lines = []
        for group in found["groups"]:
            cells = [group["arm"], rate(group["learning_rate"]), *(group["setting"][key] for key in varied)]
            if found["tofu"]:
                cells += [_over_seeds(name, group, key, form) for _, key, form in TOFU_COLUMNS]
            else:
                cells += [_spread(group["final"][score]) for score in scores]
                cells += [_preference(name, group)] if preferences else []
                cells += [_fall(name, group)] if stale else []
                cells += [_in_tries(name, group)] if _most_tries(name) else []
                cells += [_format(group.get(key), form) for _, key, form in columns]
            lines.append(cells)
        return table(header, lines)

    def single(self, name: str) -> str:
        """One line for each single run of GRPO."""
        runs = single_runs(name)
        parts = [GRPO_NAME.match(run["name"]).groups() for run in runs]  # type: ignore[union-attr]
        columns = [place for place in range(4) if len({part[place] for part in parts}) > 1]
        header = [("task", "base", "variant", "arm")[place] for place in columns]
        header += [
            "learning rate",
            "iterations",
            "seed",
            "greedy accuracy",
            "sampled accuracy",
            "largest gradient norm",
        ]
        lines = []
        for run, part in zip(runs, parts, strict=True):
            overrides = run["settings"]["overrides"]
            given = dict(zip(overrides[::2], overrides[1::2], strict=True))
            cells = [part[place] or "" for place in columns]
            cells += [given["--learning_rate"], given["--num_iterations"], str(run["seed"])]
            cells += [f"{run['metrics'][f'eval_{kind}_accuracy']:.3f}" for kind in ("greedy", "sampled")]
            lines.append([*cells, f"{max(run['grad_norm']):.2f}"])
        order = {arm: place for place, arm in enumerate(GRPO_ARMS)}
        at = len(columns) - 1

        def key(cells: Sequence[str]) -> tuple[Any, ...]:
            return *cells[:at], float(cells[at + 1]), cells[at + 2], order[cells[at]], cells[at + 3]

        return table(header, sorted(lines, key=key))

    def first_to_last(self) -> str:
        """The table of `make demo`: first evaluation → last."""
        from ceu_rl.stability.report import table_rows

        header, *lines = table_rows(demo())
        return table(header, lines)

    def earlier_demo(self) -> str:
        """The scores that an earlier run of `make demo` ended with."""
        folder = RESULTS / "dpo" / "demo" / "earlier"
        ends = {arm: json.loads((folder / f"{arm}.json").read_text())["metrics"] for arm in ("stock", "ceu", "paper")}
        lines = [
            [f"{name} accuracy", *(f"{end[f'eval_{name}_accuracy']:.3f}" for end in ends.values())]
            for name in ("greedy", "sampled")
        ]
        return table(["at the end", *ends], lines)

    def command(self, name: str) -> str:
        """The command that made a comparison, with line breaks for people."""
        words = report(name)["command"]
        for lay, called in (("../shared/tofu", "FOLDER"), ("../shared/gsm8k/", "gsm8k-")):
            words = words.replace(lay, called)
        return code(words)

    def tofu_models(self, name: str) -> str:
        header = ["model", "forget quality", "model utility", "forget ROUGE-L", "forget probability"]
        header += ["retain probability", "seconds per step", "peak memory (GiB)"]
        lines = []
        for model in single_runs(name):
            summary, training = model["evaluation"]["summary"], model["training"]
            quality = f"{summary['forget_quality']:.1e}" if "forget_quality" in summary else ""
            kept = ("model_utility", "forget_rouge_l_recall", "forget_probability", "retain_probability")
            values = [f"{summary[key]:.3f}" for key in kept]
            pace = training["metrics"]["train_runtime"] / training["steps"]
            lines.append([model["name"], quality, *values, f"{pace:.2f}", f"{training['peak_memory_gib']:.2f}"])
        return table(header, lines)

    def lora(self) -> str:
        """Memory and pace of unlearning through LoRA and of all weights."""
        header = ["trained", "peak memory (GiB)", "seconds per step"]
        lines = []
        for run in single_runs("unlearning/lora"):
            pace = run["metrics"]["train_runtime"] / run["steps"]
            lines.append([run["name"], f"{run['peak_memory_gib']:.2f}", f"{pace:.1f}"])
        return table(header, lines)

    def tofu_parts(self, name: str) -> str:
        """The nine metrics of the model utility, a column for each model."""
        runs = {run["name"]: run["evaluation"]["summary"] for run in single_runs(name)}
        parts = [
            f"{config}_{metric}"
            for config in ("retain", "real_authors", "world_facts")
            for metric in ("probability", "rouge_l_recall", "truth_ratio")
        ]
        lines = [
            [part.replace("_", " "), *(f"{summary[part]:.3f}" for summary in runs.values())]
            for part in (*parts, "model_utility")
        ]
        return table(["metric", *runs], lines)

    def generation(self) -> str:
        """The seconds that the answers of an evaluation take by each way."""
        found = report("unlearning/generation")
        lines = [[way, f"{found['seconds'][way]:.0f}"] for way in ("transformers", "vllm")]
        lines[1][0] = "vLLM, with its start"
        return table(["answers by", f"seconds for {found['questions']}"], lines)

    def tofu_earlier(self) -> str:
        lines = []
        for run in single_runs("unlearning/earlier"):
            arm, _, given = run["name"].partition("-")
            summary = run["evaluation"]["summary"]
            quality = f"{summary['forget_quality']:.1e}" if "forget_quality" in summary else ""
            lines.append([arm, given, quality, f"{summary['model_utility']:.3f}"])
        return table(["arm", "learning rate", "forget quality", "model utility"], lines)

    def tofu_aim(self, name: str) -> str:
        """The utility within a tenth of the base's."""
        return f"{0.9 * report(name)['tofu']['base']['model_utility']:.4f}"

    def base_quality(self, name: str) -> str:
        """The forget quality of the model before unlearning."""
        return f"{report(name)['tofu']['base']['forget_quality']:.2g}"

    def tofu_best(self, name: str) -> str:
        """Of each arm's rates, the one of the highest forget quality at a utility within a tenth of the base's."""
        tofu = report(name)["tofu"]
        lines = []
        for arm in _unique(point["arm"] for point in tofu["points"]):
            aim = 0.9 * tofu["base"]["model_utility"]
            useful = [p for p in tofu["points"] if p["arm"] == arm and p["model_utility"] >= aim]
            best = max(useful, key=lambda point: point["forget_quality"], default=None)
            values = (
                [rate(best["learning_rate"]), f"{best['forget_quality']:.1e}", f"{best['model_utility']:.3f}"]
                if best
                else ["none", "", ""]
            )
            lines.append([arm, *values])
        return table(["arm", "learning rate", "forget quality", "model utility"], lines)

    def parity(self, name: str) -> str:
        """Every metric by this package and by open-unlearning's code, for each model."""
        models = report(name)["models"]
        ways = {"ours": "ours", "peer": "theirs", "peer_cut": "theirs, cut"}
        header = [
            "metric",
            *(
                f"{model['model']}, {model['rows_of_each_set']} rows: {title}"
                for model in models
                for title in ways.values()
            ),
        ]
        lines = []
        for metric in models[0]["metrics"]:
            found = [model["metrics"].get(metric) for model in models]
            cells = [f"{each[way]:.6g}" if each else "" for each in found for way in ways]
            lines.append([metric.replace("_", " "), *cells])
        return table(header, lines)

    def tofu_front(self, name: str) -> str:
        """The points of the Pareto front of forget quality and model utility."""
        points = [point for point in report(name)["tofu"]["points"] if point["front"]]
        return ", ".join(f"{point['arm']} ({setting_name(point['setting'])})" for point in points)

    def fused(self) -> str:
        memory, seconds = (report(f"fused/{kind}-cpu-float32")["rows"] for kind in ("memory", "time"))
        tokens = sorted({row["tokens"] for row in memory})
        peaks = {(row["method"], row["tokens"]): f"{row['peak_above_start_gib']:.3f}" for row in memory}
        header = ["method", *(f"peak at {each} tokens (GiB)" for each in tokens)]
        lines = []
        for row in seconds:
            cells = [row["method"], *(peaks.get((row["method"], each), "") for each in tokens)]
            if row["method"] == "products":  # they are no loss
                cells = ["products", *([""] * len(tokens))]
            lines.append([*cells, f"{row['median_s']:.3f}", f"{row['times_fused']:g}"])
        return table([*header, f"median time at {seconds[0]['tokens']} tokens (s)", "time over ours"], lines)

    def steps(self) -> str:
        """A step of training with CE-U beside one of TRL's own trainer."""
        header = ["method", "model", "tokens of a sequence", "processes"]
        lines = []
        for row in benchmark("dpo", "grpo"):
            stock = row["ratios"]["stock"]
            cells = [row["subject"].upper(), MODELS[row["model"]], row["tokens"], row["ranks"], *spread(stock)]
            lines.append([*map(str, cells), f"{stock['memory']:.4f}"])
        return table([*header, "time, CE-U / stock", "quartiles", "peak memory, CE-U / stock"], lines)

    def cpu_steps(self) -> str:
        """A step of SmolLM2 under what could make it shorter."""
        found = report("speed/cpu")
        lines = [
            [arm, f"{s:.2f}", f"{found['over_first'][arm]:.2f}", f"{found['peak_memory_gib'][arm]:.2f}"]
            for arm, s in found["median_step_s"].items()
        ]
        return table(["a step of 4 pairs", "seconds", "over the first", "peak of the process (GiB)"], lines)

    def growth(self) -> str:
        """The fused loss beside the others, by tokens and vocabulary."""
        rows = benchmark("fused")
        others = list(rows[0]["ratios"])
        header = ["tokens", "vocabulary", *(f"time over {other}'s" for other in others)]
        lines = []
        for row in rows:
            ratios = row["ratios"]
            times_ = [f"{ratios[other]['time']:.2f}" for other in others]
            peaks = [f"{ratios[other]['memory']:.3f}" for other in others if other != "products"]
            lines.append([str(row["tokens"]), f"{row['vocabulary']:,}", *times_, *peaks])
        return table([*header, *(f"peak over {other}'s" for other in others if other != "products")], lines)

    def evaluation(self) -> str:
        header = ["split", "seconds, one pass", "seconds, a loop for each metric", "ratio", "quartiles"]
        lines = []
        for row in benchmark("tofu"):
            seconds = [f"{value:.2f}" for value in row["seconds"].values()]
            lines.append([row["split"], *seconds, *spread(*row["ratios"].values())])
        return table(header, lines)

    def weight_sync(self) -> str:
        found = report("grpo-time/weight_sync")["sizes"].values()
        keys = [f"{key} (s a step)" for key in next(iter(found))["step_s"]]
        header = ["model", "completions of tokens", "a sync (s)", *keys, "ratio"]
        lines = []
        for size in found:
            work = f"{size['completions_per_step']} of {size['tokens_per_completion']}"
            seconds = [size["sync_s"], *size["step_s"].values()]
            cells = [f"{size['parameters'] / 1e6:.1f} M", work, *(f"{each:.2f}" for each in seconds)]
            lines.append([*cells, str(size["step_time_16_over_1"])])
        return table(header, lines)

    def grpo_time(self) -> str:
        header = ["model", "completions of tokens", "step, vLLM / generate", "tokens/s, vLLM", "tokens/s, generate"]
        lines = []
        for size in ("tiny", "small"):
            found = report(f"grpo-time/{size}")
            speed = found["median_tokens_per_s"]
            work = f"{found['completions_per_step']} of {found['tokens_per_completion']}"
            cells = [f"{found['parameters'] / 1e6:.1f} M", work, found["step_time_vllm_over_generate"]]
            lines.append([*map(str, [*cells, speed["vllm-ceu"], speed["generate-ceu"]])])
        return table(header, lines)

    def killed(self) -> str:
        found = json.loads((RESULTS / "faults" / "sigkill.json").read_text())["sigkill"]
        keys = ("tries", "killed", "half_written_skipped", "lost", "processes_left_behind")
        header = [
            "method",
            "tries",
            "killed before the end",
            "half-written checkpoints skipped",
            "lost",
            "processes left behind",
        ]
        return table(header, [[method, *(str(counts[key]) for key in keys)] for method, counts in found.items()])

    def fused_figure(self) -> str:
        """Bars of the peak memory and the time of each way to compute the loss."""
        memory, seconds = (report(f"fused/{kind}-cpu-float32")["rows"] for kind in ("memory", "time"))
        tokens = seconds[0]["tokens"]
        peaks = {row["method"]: row["peak_above_start_gib"] for row in memory if row["tokens"] == tokens}
        times_ = {row["method"]: row["median_s"] for row in seconds}
        return self.figure(
            "fused.svg",
            sheet([[bars(peaks, "peak memory (GiB)"), bars(times_, "time (s)")]], {}),
            "peak memory and time of the loss",
        )

    def figure(self, file: str, svg: str, alt: str) -> str:
        """Keep a figure, and link to it."""
        self.drawn[RESULTS / self.question / file] = svg
        return f"![{alt}]({self.question}/{file})"

    def final_scores(self, *names: str, preference: bool = False) -> str:
        """One figure: final score against learning rate, a row for each study and setting beside the rate.

        With `preference` the held-out preference accuracy beside the greedy one.
        """
        svg = final_scores(*names, scores=KEPT_AND_LEARNED if preference else ())
        return self.figure("final.svg", svg, "final accuracy against learning rate")

    def over_steps(self, name: str, *keys: str) -> str:
        """The held-out metrics of a study over its steps."""
        svg = curves(recorded(name), keys)
        return self.figure(f"{Path(name).name}.svg", svg, f"{Path(name).name} over steps")

    def demo_curves(self) -> str:
        keys = ("eval_greedy_accuracy", "eval_sampled_accuracy", "eval_logps/chosen", "grad_norm")
        return self.figure("demo.svg", curves(demo(), keys), "curves of the three arms of make demo")

    def frontier(self, name: str) -> str:
        """Reward against divergence from the start, as in the report."""
        found = report(name)
        looks, drawn = figures.styles(found["arms"], found["arms"]), found["frontier"][0]
        svg = sheet([[("", figures.frontier_plot(drawn, looks, name.replace("/", "-")))]], looks)
        return self.figure(f"{Path(name).name}.svg", svg, f"{drawn['score']} against divergence from the start")

    def plane(self, *names: str) -> str:
        """The plane of each study, beside each other."""
        drawn = []
        for name in names:
            looks = figures.styles(report(name)["arms"], report(name)["arms"])
            tofu = report(name)["tofu"]
            dead = COLLAPSED * tofu["base"]["model_utility"]
            points = [{**p, "collapsed": sum(utility < dead for utility, _ in p["seeds"])} for p in tofu["points"]]
            svg = figures.tofu_plane({**tofu, "points": points}, looks, name.replace("/", "-"))
            drawn.append((Path(name).name if len(names) > 1 else "", svg))
        return self.figure("plane.svg", sheet([drawn], looks), "forget quality against model utility")


COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("chosen", "displacement", ".3f"),
    ("depth of rejected", "depth", ".3f"),
    ("KL", "kl", ".3f"),
    ("KL on solutions", "solutions_kl", ".3f"),
    ("entropy", "entropy_change", "+.3f"),
    ("gradient spikes", "grad_norm_spikes", "d"),
    ("largest gradient norm", "grad_norm_largest", ".2f"),
)
TOFU_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("forget quality", "forget_quality", ".1e"),
    ("model utility", "model_utility", ".3f"),
    ("seconds per step", "seconds_per_step", ".2f"),
    ("peak memory (GiB)", "peak_memory_gib", ".2f"),
)
MODELS = {"tiny": "tiny Llama", "smollm2": "SmolLM2-135M"}
GRPO_NAME = re.compile(r"(?:(addition|maze)-)?(base\d*)-(?:([a-z_]+)-)?(stock|paper|c[\d.]+(?:s\d+)?)-")
GRPO_ARMS = ("stock", "c0.3", "c0.5", "c1", "c1s10", "paper")


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def benchmark(*subjects: str) -> list[dict[str, Any]]:
    """What `tests/benchmarks` measured of these subjects."""
    return [row for row in report("speed/ratios")["rows"] if row["subject"] in subjects]


def spread(ratio: Mapping[str, Any]) -> list[str]:
    """A ratio of times and its quartiles over the rounds."""
    first, third = ratio["time_quartiles"]
    return [f"{ratio['time']:.3f}", f"{first:.3f} to {third:.3f}"]


def code(command: str) -> str:
    lines = textwrap.wrap(command, 110, break_long_words=False, break_on_hyphens=False)
    return "\n".join(["    " + " \\\n        ".join(lines)])


def reach(entry: Mapping[str, Any]) -> str:
    """A stable range; one that ends outside the rates tried is a bound."""
    if entry["range"] is None:
        return f"< {rate(min(entry['rates']))}"
    return ("≥ " if entry["at_most_tried"] else "") + rate(entry["range"])


def times(entry: Mapping[str, Any]) -> str:
    """A ratio of stable ranges with its interval; nothing for the baseline itself."""
    ratio, ours, theirs = entry["ratio"], entry["range"], entry["baseline_range"]
    if ratio is None:
        return ""
    at_least = ours == max(entry["rates"]) or theirs is None
    at_most = theirs == max(entry["baseline_rates"]) or ours is None
    if at_least and at_most:
        return UNTOLD
    if ratio == 1 and (at_least or at_most):
        return UNTOLD
    sign = "≥ " if at_least else "≤ " if at_most else ""
    interval = entry["interval"]
    spread = f" ({number(interval[0], 2)} to {number(interval[1], 2)})" if interval else " (one seed)"
    return f"{sign}{number(ratio, 2)}{spread}"


def _range(name: str, arm: str, score: str, rest: Mapping[str, str] | None = None) -> Mapping[str, Any]:
    entries = report(name)["ranges"]
    return next(e for e in entries if (e["arm"], e["score"], e["setting"]) == (arm, score, rest or {}))


def _best(name: str, arm: str, score: str, rest: Mapping[str, str]) -> str:
    """The best mean over seeds of an arm, of the settings at which every seed finished, and its learning rate."""
    groups = [
        group
        for group in report(name)["groups"]
        if group["arm"] == arm
        and {key: value for key, value in group["setting"].items() if key != "learning_rate"} == rest
        and group["final"][score]
        and sum(group["seeds"].values()) == group["seeds"]["finished"]
    ]
    best = max(groups, key=lambda group: group["final"][score]["mean"], default=None)
    return f"{best['final'][score]['mean']:.3f} at {rate(best['learning_rate'])}" if best else "none"


def _preference(name: str, group: Mapping[str, Any]) -> str:
    """The held-out preference accuracy at the end, over seeds."""
    return f"{statistics.fmean(run['curves']['eval_rewards/accuracies'][-1] for run in _runs(name, group)):.3f}"


def _fall(name: str, group: Mapping[str, Any]) -> str:
    """How far the greedy accuracy fell at most from its best so far: mean, least and most over seeds."""
    return _spread(_over([run["measures"]["drawdown"] for run in _runs(name, group)]))


def _over_seeds(name: str, group: Mapping[str, Any], key: str, form: str) -> str:
    """The median of a measure over seeds, with its ends for the two that are the result."""
    values = [run["measures"][key] for run in _runs(name, group) if run["measures"][key] is not None]
    text = _format(group[key], form)
    if len(values) < 2 or key not in ("forget_quality", "model_utility"):
        return text
    return f"{text} ({min(values):{form}} to {max(values):{form}})"


def _most_tries(name: str) -> str | None:
    """The pass@k of the most tries that was logged."""
    keys = [key.removeprefix("eval_") for key in report(name)["runs"][0]["curves"] if key.startswith("eval_pass@")]
    return max(keys, key=lambda key: int(key.removeprefix("pass@")), default=None)


def _in_tries(name: str, group: Mapping[str, Any]) -> str:
    """That pass@k at the end, over seeds."""
    return _spread(_over([run["curves"][f"eval_{_most_tries(name)}"][-1] for run in _runs(name, group)]))


def _over(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values), "seeds": len(values)}


def _runs(name: str, group: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [run for run in report(name)["runs"] if (run["arm"], run["setting"]) == (group["arm"], group["setting"])]


def _spread(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "none"
    ends = f" ({score['min']:.3f} to {score['max']:.3f})" if score["seeds"] > 1 else ""
    return f"{score['mean']:.3f}{ends}"


def _format(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


def _unique(items: Any) -> list[Any]:
    found: list[Any] = []
    for item in items:
        if item not in found:
            found.append(item)
    return found


# Figures


def final_scores(*names: str, scores: Sequence[Score] = ()) -> str:
    """Final score against learning rate: a row for each study and setting beside the rate, a column for each score.

    Those are `scores`, or what the report ranks the arms by.
    """
    rows, looks = [], {}
    for name in names:
        runs = recorded(name)
        looks = figures.styles(arms(runs), arms(runs))
        for place, rest in enumerate(conditions(runs)):
            members = [run for run in runs if condition(run) == rest]
            row = []
            for score in scores or find_scores(runs):
                title = f"{Path(name).name}: {score.name}" + (f", {setting_name(rest)}" if rest else "")
                prefix = f"{name.replace('/', '-')}-{score.key}-{place}"
                base = report(name)["base"].get(score.name)
                bases = {} if base is None else dict.fromkeys(arms(members), base)
                row.append((title, figures.range_plot(members, score, bases, looks, prefix)))
            rows.append(row)
    return sheet(rows, looks)


def curves(runs: Sequence[Run], keys: Sequence[str], titles: Mapping[str, str] | None = None) -> str:
    """Metrics over steps, two in a row."""
    looks = figures.styles(arms(runs), arms(runs))
    panels = {panel.key: panel for panel in figures.panels(runs)}
    drawn = []
    for place, key in enumerate(keys):
        panel = panels[key]
        limits = figures.shared_limits(runs, panel)
        drawn.append(("", figures.curve(runs, panel, looks, f"curve{place}", panel.title, limits, (4.6, 2.7))))
    return sheet([drawn[place : place + 2] for place in range(0, len(drawn), 2)], looks)


def pictures() -> dict[Path, str]:
    """The pictures of docs/reading-metrics.md, from runs that are committed."""

    def of(name: str, arms_: Sequence[str], **setting: str) -> list[Recorded]:
        runs = [run for run in recorded(name) if run.arm in arms_]
        return [run for run in runs if all(run.setting[key] == value for key, value in setting.items())]

    def renamed(runs: Sequence[Recorded], key: str) -> list[Recorded]:
        """The same with a setting in the place of the arm, such as "num iterations 4"."""
        return [replace(run, arm=setting_name({key: run.setting[key]}), setting={}) for run in runs]

    stale = sorted(of("grpo/addition", ["stock"], learning_rate="3e-4"), key=lambda run: run.setting["num_iterations"])
    drawn = {
        "displacement": (
            demo()[:2],
            ("eval_logps/chosen", "eval_logps/rejected", "eval_sampled_accuracy", "grad_norm"),
        ),
        "flattening": (
            of("dpo/addition", ["stock", "ceu", "paper"], learning_rate="1e-4"),
            ("eval_greedy_accuracy", "eval_sampled_accuracy", "eval_sampled_entropy", "eval_kl"),
        ),
        "entropy": (
            of("grpo/maze", ["stock", "ceu", "ceu-1"], learning_rate="3e-4", num_iterations="1"),
            ("eval_greedy_accuracy", "eval_sampled_accuracy", "eval_sampled_entropy", "eval_kl"),
        ),
        "staleness": (
            renamed(stale, "num_iterations"),
            ("eval_greedy_accuracy", "eval_sampled_accuracy", "eval_sampled_entropy", "eval_kl"),
        ),
    }
    return {RESULTS / "reading" / f"{name}.svg": curves(runs, keys) for name, (runs, keys) in drawn.items()}


def bars(values: Mapping[str, float], title: str) -> tuple[str, str]:
    """Horizontal bars with their values, ours in colour."""

    def draw(axes: Any) -> None:
        colours = [figures.COLOURS[0] if name == "fused" else "#b0b0b0" for name in values]
        axes.bar_label(axes.barh(list(values), list(values.values()), color=colours), fmt="%.3g", padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.grid(axis="y", visible=False)

    spoken = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
    return title, figures._svg(draw, (4.2, 2.0), title.split()[0], f"{title}: {spoken}.")


def sheet(rows: Sequence[Sequence[tuple[str, str]]], looks: Mapping[str, figures.Style]) -> str:
    """One SVG of several figures with their titles, and a legend below; white behind it, for pages that are dark."""
    parts: list[str] = []
    spoken: list[str] = []
    top = width = 0.0
    for row in rows:
        left, tallest, titled = 0.0, 0.0, any(title for title, _ in row)
        for title, svg in row:
            size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
            label = re.search(r'aria-label="([^"]*)"', svg)
            assert size and label
            wide, high = map(float, size.groups())
            spoken.append(f"{title}: {label[1]}" if title else label[1])
            if title:
                parts.append(_text(left + wide / 2, top + 13, title, 'text-anchor="middle" font-size="11"'))
            box = f'<svg x="{left:g}" y="{top + TITLE * titled:g}" {_size(wide, high)}'
            parts.append(re.sub(r'<svg role="img" aria-label="[^"]*" viewBox="[^"]*"', box, svg, count=1))
            left, tallest = left + wide + GAP, max(tallest, high)
        width, top = max(width, left - GAP), top + tallest + TITLE * titled + GAP
    for line in _legend(looks, width):
        parts.append(_text(8, top + 10, line, 'font-size="11"', escape=False))
        top += LINE
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    head += f'{_size(width, top + 8)} role="img" aria-label="{" ".join(spoken)}">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *parts, "</svg>"]) + "\n"


def _size(width: float, height: float) -> str:
    return f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'


def _legend(looks: Mapping[str, figures.Style], width: float) -> list[str]:
    """The names in the colours of their arms, in as many lines as they need."""
    lines, used = [""], 0.0
    for name, look in looks.items():
        needed = 7 * (len(name) + 4)
        if used and used + needed > width:
            lines, used = [*lines, ""], 0.0
        shift = ' dx="14"' if used else ""
        lines[-1] += f'<tspan fill="{look.colour}"{shift}>{look.symbol} {_escape(name)}</tspan>'
        used += needed
    return lines if looks else []


def _text(x: float, y: float, text: str, more: str, escape: bool = True) -> str:
    body = _escape(text) if escape else text
    return f'<text x="{x:g}" y="{y:g}" font-family="DejaVu Sans, Verdana, sans-serif" {more}>{body}</text>'


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


if __name__ == "__main__":
    main()
