"""The numbers of a comparison in sentences: the first is the verdict, the rest is what else has to be known.

The form of a sentence does not depend on who wins: the better one stands first.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .summary import FORGET_QUALITY

UNTOLD = "how many times as far, these rates do not show"


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """One sentence for each arm and score against the baseline, the first arm's first score in front."""
    baseline, *others = summary["arms"] or [""]
    sentences = _tofu(summary["tofu"]) if summary["tofu"] else []
    first = [_at(each["setting"], say) for each in summary["frontier"] for say in _frontier(each, baseline)]
    for score in summary["base"]:
        for arm in others or [baseline]:
            for kind, say in (("ranges", _range), ("differences", _difference)):
                for entry in summary[kind]:
                    if (entry["score"], entry["arm"]) == (score, arm):
                        sentences.append(_at(entry["setting"], say(entry, baseline)))
    sentences = first + sorted(sentences, key=lambda sentence: "No comparison of" in sentence)
    if not sentences:
        sentences.append(_nothing(summary))
    return sentences + _best(summary) + _differ(summary["differ"]) + _left_out(summary["runs"])


def _differ(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    told = [
        f"{name} ({', '.join(f'{arm} {value}' for arm, value in values.items())})" for name, values in found.items()
    ]
    if not told:
        return []
    return [f"The arms do not share {_join(told, 'and')}: a difference between them may come from that."]


def _frontier(found: Mapping[str, Any], baseline: str) -> list[str]:
    """What each arm's reward costs in divergence, then each arm at its best."""
    arms = _unique(point["arm"] for point in found["points"])
    whole = {arm: [p for p in found["points"] if p["arm"] == arm and not p["diverged"]] for arm in arms}
    best = [max(points, key=lambda point: point["reward"]) for points in whole.values() if points]
    equal = [_at_equal_reward(entry, found, baseline) for entry in found["equal"]]
    broken = [f"{arm} has no setting at which every seed finished." for arm in arms if not whole[arm]]
    return equal + [_at_best(point, found["score"]) for point in best] + broken


def _at_equal_reward(entry: Mapping[str, Any], found: Mapping[str, Any], baseline: str) -> str:
    arm, score, reward = entry["arm"], found["score"], number(entry["reward"])
    if entry["ratio"] is None:
        against = f", which is not above the base's {number(found['base'])}" if found["base"] is not None else ""
        return f"No comparison of {arm} in divergence at equal {score}: both reach {reward}{against}."
    ends = [(arm, entry["divergence"], entry["setting"])]
    ends.append((baseline, entry["baseline_divergence"], entry["baseline_setting"]))
    ratio, interval = entry["ratio"], entry["interval"]
    if ratio > 1:
        ends, ratio = ends[::-1], 1 / ratio
        interval = interval and [1 / each if each else 0.0 for each in reversed(interval)]
    near, far = (f"{name} is {number(end)} {{}}from the start ({setting_name(at)})" for name, end, at in ends)
    spread = _interval(interval, entry["seeds"])
    unsure = "; 1 lies within it" if interval and interval[0] <= 1 <= interval[1] else ""
    return (
        f"At a {score} of at least {reward}, which both reach, {near.format('nats per token ')}, {far.format('')}: "
        f"{ends[0][0]} goes {number(ratio, 2)} times as far ({spread}{unsure})."
    )


def _at_best(point: Mapping[str, Any], score: str) -> str:
    seeds = len(point["seeds"])
    reward, far = (_value_and_interval(point[key], point[f"{key}_interval"]) for key in ("reward", "divergence"))
    count = _seeds(seeds) if seeds > 1 else "1 seed: no interval"
    told = [f"{score} {reward}", f"divergence {far}"]
    told += [f"{name} {number(value)}" for name, value in list(point["passes"].items())[-1:]]
    if point["entropy_change"] is not None:
        told.append(f"entropy {point['entropy_change']:+.3g}")
    return f"{point['arm']} at its best ({setting_name(point['setting'])}): {', '.join(told)} ({count})."


def _value_and_interval(value: float, interval: Sequence[float] | None) -> str:
    return number(value) if interval is None else f"{number(value)} ({number(interval[0])} to {number(interval[1])})"


def rate(value: float) -> str:
    """A learning rate as people write it: 3e-05 is 3e-5."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: three significant digits, without an exponent where it is readable so; none for None."""
    if value is None:
        return "none"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        shown = f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
        return f"{float(shown):g}" if abs(value) < 1000 else shown
    return f"{value:.2g}"


def setting_name(setting: Mapping[str, str], none: str = "as in the recipe") -> str:
    """A setting in words, such as "learning rate 3e-5, beta 0.5"."""
    if not setting:
        return none
    return ", ".join(f"{name.replace('_', ' ')} {_value(name, value)}" for name, value in setting.items())


def _value(name: str, value: str) -> str:
    return rate(float(value)) if name == "learning_rate" else value


def _at(setting: Mapping[str, str], sentence: str) -> str:
    return f"With {setting_name(setting)}: {sentence}" if setting else sentence


def _range(entry: Mapping[str, Any], baseline: str) -> str:
    arm, score, ratio = entry["arm"], entry["score"], entry["ratio"]
    if not entry["seeds"]:
        return f"No comparison of {arm} in {score}: no seed has an outcome at every learning rate."
    if arm == baseline:
        reach, seeds = _reach(entry["range"], entry["rates"]), _seeds(len(entry["seeds"]))
        reach += _but(entry["lost_below"])
        return f"{arm} keeps 95 % of the base's {score} {reach} ({seeds})."
    if ratio is None:
        return f"No comparison of {arm} in {score}: {baseline} has no outcome."
    pairs = [(arm, entry["range"], entry["rates"]), (baseline, entry["baseline_range"], entry["baseline_rates"])]
    interval = entry["interval"]
    if ratio < 1 or (ratio == 1 and entry["range"] is None and entry["baseline_range"]):
        pairs, ratio, interval = pairs[::-1], 1 / ratio, interval and [1 / interval[1], 1 / interval[0]]
    first, second = pairs[0][0], pairs[1][0]
    lost = {arm: _but(entry["lost_below"]), baseline: _but(entry["baseline_lost_below"])}
    keeps = (
        f"{first} keeps 95 % of the base's {score} {_reach(*pairs[0][1:])}{lost[first]}, "
        f"{second} {_reach(*pairs[1][1:], '')}{lost[second]}"
    )
    spread = _interval(interval, len(entry["seeds"]))
    if ratio == 1:
        return f"{keeps}: {_same(entry, spread)}."
    bound = _bound(entry)
    if bound is None:
        return f"{keeps}: {UNTOLD}."
    unsure = "; 1 lies within it" if interval and interval[0] <= 1 <= interval[1] else ""
    return f"{keeps}: {bound}{number(ratio, 2)} times as far ({spread}{unsure})."


def _reach(reach: float | None, rates: Sequence[float], unit: str = "a learning rate of ") -> str:
    if reach is None:
        return f"at none tried (below {rate(min(rates))})"
    if reach == max(rates):
        return f"up to at least {unit}{rate(reach)} (the largest tried)"
    return f"up to {unit}{rate(reach)}"


def _but(lost: Sequence[float]) -> str:
    return f" (but not at {', '.join(map(rate, lost))})" if lost else ""


def _bound(entry: Mapping[str, Any]) -> str | None:
    """How the ratio is bounded by ranges that end outside the rates tried; None where it can be any.

    A winner that is stable at the largest rate, or a loser that is stable at none, makes it at least what it is; a
    loser that is stable at the largest rate, or a winner that is stable at none, makes it at most that.
    """
    ours, theirs = entry["range"], entry["baseline_range"]
    tops = ours == max(entry["rates"]), theirs == max(entry["baseline_rates"])
    belows = ours is None, theirs is None
    winner, loser = (0, 1) if entry["ratio"] > 1 else (1, 0)
    at_least, at_most = tops[winner] or belows[loser], tops[loser] or belows[winner]
    if at_least and at_most:
        return None
    return "at least " if at_least else "at most " if at_most else ""


def _same(entry: Mapping[str, Any], spread: str) -> str:
    """What a ratio of 1 says; that of ranges that end outside the rates tried is no measurement."""
    ours, theirs = entry["range"], entry["baseline_range"]
    if ours == theirs and ours is not None and ours < max(entry["rates"]):
        return f"the same range ({spread})"
    if ours == theirs:
        return "these rates cannot tell them apart"
    return UNTOLD


def _difference(entry: Mapping[str, Any], baseline: str) -> str:
    arm, score, gap = entry["arm"], entry["score"], entry["difference"]
    final, other = entry["final"], entry["baseline_final"]
    if arm == baseline:
        if final is None:
            return f"{arm} has no final {score}: every seed diverged."
        return f"{arm} ends with a {score} of {number(final)} ({_seeds(entry['seeds'])})."
    lost = _diverged(arm, baseline, entry["diverged"])
    if gap is None:
        known = [
            f"{name} ends with {number(end)}" for name, end in ((arm, final), (baseline, other)) if end is not None
        ]
        return f"No comparison of {arm} in {score}: {'; '.join([*lost, *known]) or 'no seed finished in both arms'}."
    spread, interval = _interval(entry["interval"], entry["seeds"]), entry["interval"]
    unsure = "; 0 lies within it" if gap and interval and interval[0] <= 0 <= interval[1] else ""
    verb = "the same" if gap == 0 else f"{number(abs(gap))} {'higher' if gap > 0 else 'lower'}"
    also = f" {' and '.join(lost)}." if lost else ""
    ends = f"{arm} ends with a {score} of {number(final)}, {baseline} with {number(other)}"
    return f"{ends}: {verb} ({spread}{unsure}).{also}"


def _diverged(arm: str, baseline: str, counts: Sequence[int]) -> list[str]:
    return [f"{_seeds(count)} of {name} diverged" for name, count in zip((arm, baseline), counts, strict=True) if count]


def _interval(interval: Sequence[float] | None, seeds: int) -> str:
    if interval is None:
        return "one seed: no interval"
    return f"95 % interval over {seeds} seeds {number(interval[0])} to {number(interval[1])}"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _tofu(found: Mapping[str, Any]) -> list[str]:
    base = (found["base"] or {}).get("model_utility")
    points = found["points"]
    sentences = []
    if base is None:
        sentences.append(
            "The model utility before unlearning is not known, so that no share of it can be asked for: evaluate the "
            "model that the runs start from with ceu-rl tofu-eval."
        )
    elif len(found["retains"]) > 1:
        models = _join([str(each) for each in found["retains"]], "and")
        sentences.append(
            f"The runs were held against different retain models ({models}), so that their forget qualities do not "
            "compare; --retain holds all of them against one."
        )
    elif points:
        sentences.append(
            _reached(
                points,
                f"a forget quality above {FORGET_QUALITY} at a model utility within 10 % of the base's {number(base)}",
            )
        )
    known = (found["base"] or {}).get("forget_quality")
    if points and known is not None and known > FORGET_QUALITY / 10:
        sentences.append(_hardly_told_apart(found, known))
    if front := [f"{p['arm']} ({setting_name(p['setting'])})" for p in points if p["front"]]:
        sentences.append(f"On the Pareto front of forget quality and model utility: {', '.join(front)}.")
    if dead := [
        f"{p['arm']} ({setting_name(p['setting'])}; {p['collapsed']} of {_seeds(len(p['seeds']))})"
        for p in points
        if p["collapsed"]
    ]:
        sentences.append(
            "Collapsed, with a model utility below a tenth of the base's, so that the forget quality says nothing: "
            f"{', '.join(dead)}."
        )
    if found["not_placed"]:
        arms = _join(found["not_placed"], "and")
        sentences.append(f"Runs without a forget quality, for want of an evaluation or of a retain model: {arms}.")
    return sentences


def _hardly_told_apart(found: Mapping[str, Any], quality: float) -> str:
    key = "forget_probability"
    parts = (("before unlearning", found["base"]), ("of the retain model", found["retain"]))
    probabilities = [f"{number(model[key])} {name}" for name, model in parts if model and model.get(key) is not None]
    beside = f": {_join(probabilities, 'and')}" if probabilities else ""
    return (
        f"The model before unlearning has a forget quality of {number(quality)} already, so that it hardly tells "
        f"models apart, as where few answers are to be forgotten; the forget probability says more{beside}."
    )


def _reached(points: Sequence[Mapping[str, Any]], goal: str) -> str:
    arms = _unique(point["arm"] for point in points)
    there = {arm: [p for p in points if p["arm"] == arm and p["reached"]] for arm in arms}
    seeds = sorted({len(point["seeds"]) + point["diverged"] for point in points})
    count = f"each with {seeds[0]}" if len(seeds) == 1 else f"with {seeds[0]} to {seeds[-1]}"
    count += " seed, so without an interval" if seeds == [1] else " seeds, all of which count"
    reach = [f"{arm} ({'; '.join(setting_name(p['setting']) for p in there[arm])})" for arm in arms if there[arm]]
    not_there = [arm for arm in arms if not there[arm]]
    if not reach:
        return f"No arm reaches {goal} ({count}): not {_join(not_there, 'or')}."
    rest = f"; {_join(not_there, 'and')} at no setting tried" if not_there else ""
    return f"{_join(reach, 'and')} reach{'es'[: 2 * (len(reach) == 1)]} {goal}{rest} ({count})."


def _best(summary: Mapping[str, Any]) -> list[str]:
    """Each arm at its own best setting, where it had several: a wide range alone says nothing of how far it got."""
    sentences = []
    told = {found["score"] for found in summary["frontier"]}
    for score in summary["base"]:
        found = [entry for entry in summary["best"] if entry["score"] == score]
        if score not in told and any(entry["settings"] > 1 for entry in found):
            ends = [f"{e['arm']} {number(e['mean'])} ({setting_name(e['setting'])})" for e in found]
            sentences.append(
                f"Mean final {score} of each arm at its own best setting, of those where every seed finished: "
                f"{', '.join(ends)}."
            )
    return sentences


def _left_out(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The runs that do not count, or count as lost, each kind by its number in each arm."""
    kinds = {
        "diverged, which counts as having lost the score": [r for r in runs if r["status"] == "diverged"],
        "failed and {be} left out": [r for r in runs if r["status"] == "failed"],
        "{be} missing and {be} left out": [r for r in runs if r["status"] == "missing"],
    }
    for score in dict.fromkeys(name for run in runs for name in run["final"]):
        without = [r for r in runs if r["status"] == "finished" and r["final"][score] is None]
        kinds[f"finished without a {score} and {{be}} left out of it"] = without
    sentences = []
    for kind, found in kinds.items():
        if found:
            outcome = kind.format(be="is" if len(found) == 1 else "are")
            sentences.append(f"{len(found)} of {len(runs)} runs {outcome}: {_by_arm(found, runs)}.")
    if broken := [run for run in runs if run["log_problem"]]:
        sentences.append(f"{len(broken)} of {len(runs)} runs have log lines that could not be read and are left out.")
    return sentences


def _by_arm(found: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> str:
    names = [run["arm"] for run in found]
    return _join([f"{names.count(a)} of {a}" for a in _unique(run["arm"] for run in runs) if a in names], "and")


def _nothing(summary: Mapping[str, Any]) -> str:
    if not summary["runs"]:
        return "There are no runs to compare."
    if not any(run["status"] == "finished" for run in summary["runs"]):
        return "No run has finished, so that there is nothing to compare yet."
    if not summary["base"]:
        return "No run logged an evaluation, so that there is no score: set eval_strategy and eval_on_start."
    if not any(summary["bases"].values()):
        return "There is no score before training to hold the runs against: set eval_on_start."
    known = ", ".join(f"{name} {number(base)}" for name, base in summary["base"].items())
    return f"There is no share of the base's score to keep ({known}), so that no range is given."


def _join(items: Sequence[str], word: str) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {word} {items[-1]}" if items else ""


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))
