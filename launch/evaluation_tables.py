"""What is printed of a report, by `evaluate`, its `--watch` and `run status`.

A report is that of `evaluation.report_on`: of `--protocol head` the fields of `Measures`, else those of `ProbeReport`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from launch.question import EvaluateFlags
from vitscale.config import SOLVER_SETTING
from vitscale.metrics import counted

# What an interval covers: only accuracies whose intervals cover the same may be compared by them
_DRAWS = "Student's t of other draws of shots, on these test samples"
_SAMPLES = "Wilson's of other test samples"
_FIGURES = {  # of a line: fields of a report, or of a probe's result
    "top1": ("top-1", ".2%"),
    "top5": ("top-5", ".2%"),
    "loss": ("loss", ".4f"),
    "real_top1": ("ReaL top-1", ".2%"),
    "mean_average_precision": ("mean average precision", ".2%"),
}
_PROBED = {"fewshot": ("shots", "shot"), "linear": ("solver", "linear head"), "knn": ("k", "neighbour")}  # what tells results apart


def asked_of(report: Mapping[str, Any], flags: EvaluateFlags) -> dict[str, Any]:
    """The report without those tables that were not asked for."""
    kept = dict(report)
    if "classes" in kept and not flags.per_class:
        del kept["classes"]
    if "confusions" in kept:
        kept["confusions"] = kept["confusions"][: flags.confusions]
        if not flags.confusions:
            del kept["confusions"]
    return kept


def summary(report: Mapping[str, Any]) -> str:
    """What a report says in one line, or a line of evaluations.jsonl, of which what it lacks or has not as a number is left out."""
    if report.get("protocol") not in _PROBED:
        return _figures(report)
    results = report.get("results")
    which, _ = _PROBED[report["protocol"]]
    found = [of for of in results if isinstance(of, Mapping) and which in of] if isinstance(results, Sequence) else []
    return "; ".join(f"{_probed(report['protocol'], result)}: {_figures(result)}" for result in found) or "no figure"


def _figures(found: Mapping[str, Any]) -> str:
    told = [f"{name} {found[field]:{form}}" for field, (name, form) in _FIGURES.items() if isinstance(found.get(field), int | float)]
    return ", ".join(told) or "no figure"


def _probed(protocol: str, result: Mapping[str, Any]) -> str:
    """Which of a probe's results one is."""
    field, noun = _PROBED[protocol]
    value = result[field]
    return counted(value, noun) if isinstance(value, int) else f"{noun} by {value}"


def report_lines(report: Mapping[str, Any], flags: EvaluateFlags) -> list[str]:
    """What is printed of a report."""
    if report["protocol"] != "head":
        return [*_probe_heading(report), *(line for result in report["results"] for line in _probe_lines(report["protocol"], result))]
    skipped = f" ({report['skipped']:,} more could not be read)" if report["skipped"] else ""
    skipped += f" (its overlays remove {report['removed']:,})" if report["removed"] else ""
    of = f"{report['checkpoint']} on {report['samples']:,} samples of {report['data']}{skipped}"
    lines = [
        f"{of}, by the {report['eval_protocol']} protocol:",
        _figures({name: report[name] for name in ("top1", "top5", "loss")}),
        f"95% of another such draw of samples: top-1 {_span(report['top1_interval'])}, top-5 {_span(report['top5_interval'])}",
        f"calibration error {report['calibration_error']:.2%}",
    ]
    if report["real_top1"] is not None:
        lines.append(f"ReaL top-1 {report['real_top1']:.2%} ({_span(report['real_interval'])}) of {report['real_samples']:,} samples")
    if report["mean_average_precision"] is not None:
        interval = report["mean_average_precision_interval"]
        within = f" ({_span(interval)} of {flags.bootstrap:,} resamples)" if interval else ""
        lines.append(
            f"mean average precision {report['mean_average_precision']:.2%}{within} over {report['classes_with_samples']:,} classes"
        )
    if flags.per_class:
        precision = report["mean_average_precision"] is not None
        rows = [("class", "samples", "right", "accuracy", *["average precision"] * precision, "most confused with")]
        for of_class in report["classes"]:
            worst = f"{of_class['confused_with']} ({of_class['confused']:,})" if of_class["confused"] else ""
            measured = (of_class["accuracy"], *[of_class["average_precision"]] * precision)
            shares = [f"{share:.2%}" if share is not None else "" for share in measured]
            rows.append((of_class["name"], f"{of_class['samples']:,}", f"{of_class['right']:,}", *shares, worst))
        lines += ["", *_columns(rows)]
    if flags.confusions:
        pairs = [(of["name"], of["guess_name"], f"{of['samples']:,}") for of in report["confusions"][: flags.confusions]]
        lines += ["", *(_columns([("class", "taken for", "samples"), *pairs]) if pairs else ["no class is taken for another"])]
    return lines


def _probe_heading(report: Mapping[str, Any]) -> list[str]:
    draws = {len(result.get("top1_of_seeds", ())) for result in report["results"]}
    by_seed = max(draws) > 1
    alone = f"; where all samples are drawn, {_SAMPLES}" if by_seed and 1 in draws else ""
    left_out = f", {report['skipped']:,} more could not be read" if report["skipped"] else ""
    left_out += f", overlays remove {report['removed']:,}" if report["removed"] else ""
    return [
        f"{report['checkpoint']} by {report['protocol']} on {report['data']}, the {report['eval_protocol']} protocol:",
        f"{report['width']:,} features of {report['train_samples']:,} training and {report['test_samples']:,} test samples of "
        f"{report['num_classes']:,} classes{left_out}; in brackets 95% intervals, {_DRAWS if by_seed else _SAMPLES}{alone}:",
    ]


def _probe_lines(protocol: str, result: Mapping[str, Any]) -> list[str]:
    top1, which = f"top-1 {result['top1']:.2%} [{result['low']:.2%}, {result['high']:.2%}]", _probed(protocol, result)
    if protocol == "knn":
        return [f"{which:>14}: {top1}, top-5 {result['top5']:.2%}"]
    if protocol == "fewshot":
        of_seeds, short = result["top1_of_seeds"], result["short_classes"]
        by_seed = f", by seed {', '.join(f'{of:.2%}' for of in of_seeds)}" if len(of_seeds) > 1 else ""
        all_there_are = f" (all there are of {counted(short, 'class')} with fewer samples)" if short else ""
        return [f"{which:>9}: {top1}{by_seed}{all_there_are}"]
    best = max(top1 for _, top1 in result["grid"])
    edge = "; it ends the grid: one beyond may be better" if result["at_edge"] else ""
    chosen = f"{SOLVER_SETTING[result['solver']]} {result['chosen']:g}, the best of {len(result['grid'])}"
    return [
        f"{which}: {top1}, top-5 {result['top5']:.2%}",
        f"{chosen} on {counted(result['held_out'], 'training sample')} held out ({best:.2%}){edge}",
    ]


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.2%} to {interval[1]:.2%}"


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
