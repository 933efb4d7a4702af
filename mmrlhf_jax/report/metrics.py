"""Which of a run's numbers are drawn, in what order and how; and the table that compares where runs ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmrlhf_jax.objectives import Supervised
from mmrlhf_jax.report.charts import Chart, Line, line_chart
from mmrlhf_jax.report.curves import curve
from mmrlhf_jax.report.markup import Markup, element
from mmrlhf_jax.report.runs import Log, Run, Series
from mmrlhf_jax.report.scales import MISSING, figure

EVALUATED = "eval/"
LAST_SHARE = 0.1  # of a run's steps, whose mean stands for its end: single steps are noisy


@dataclass(frozen=True)
class Spec:
    """A chart of one or two logged numbers. `sides` name the two: the first is drawn solid, the second dashed."""

    title: str
    names: tuple[str, ...]
    sides: tuple[str, ...] = ("",)
    note: str = ""
    percent: bool = False
    log: bool = False
    mark: tuple[float, str] | None = None
    within: tuple[float, ...] = ()


BOTH = ("chosen", "rejected")
SPECS: dict[str, tuple[Spec, ...]] = {
    "Learning": (
        Spec("Loss", ("loss",), log=True),
        Spec("Reward accuracy", ("rewards/accuracies",), percent=True, mark=(0.5, "chance"), within=(0, 1)),
        Spec("Reward margin", ("rewards/margins",), note="Chosen less rejected."),
        Spec("Preference loss", ("loss/preference",), note="The objective's own, without the NLL beside it."),
        Spec("Bradley-Terry loss", ("loss/bradley_terry",), mark=(0.6931471805599453, "log 2: undecided")),
        Spec("NLL of a token", ("loss/nll",), note="Of the chosen responses, where there are others."),
        Spec("NLL of the critiques", ("loss/critique",), note="A token's, mean.", log=True),
        Spec("Rewards", ("rewards/chosen", "rewards/rejected"), BOTH),
        Spec("Log-probs", ("logps/chosen", "logps/rejected"), BOTH, note="Summed over a response."),
        Spec("Length", ("length/chosen", "length/rejected"), BOTH, note="Tokens of a response.", within=(0,)),
        Spec("β", ("beta/mean",), note="Mean over pairs."),
        Spec("Annotated margin", ("margin/mean",), note="Mean over the pairs of a step: what β follows."),
        Spec("Centring", ("loss/centre",), note="(s₁ + s₂)², mean over pairs."),
        Spec("Ties", ("loss/tie",), note="(s₁ − s₂)², mean over tied pairs."),
        Spec("Entropy", ("entropy",), note="Of the next token, in nats.", within=(0,)),
    ),
    "Optimizer and speed": (
        Spec("Gradient norm", ("grad_norm",), note="Before clipping.", log=True),
        Spec("Learning rate", ("learning_rate",), within=(0,)),
        Spec("Throughput", ("tokens_per_second",), note="Tokens a second.", within=(0,)),
        Spec("Step time", ("seconds",), note="Seconds; the first steps compile.", log=True),
        Spec("Data wait", ("data_wait_share",), note="Of the step's time.", percent=True, within=(0,)),
        Spec("Model FLOP utilisation", ("mfu",), percent=True, within=(0,)),
    ),
}
UNDRAWN = {  # what another chart says too, or what is of use as a sum
    "groups_per_second", "logps/token", "model_tflops_per_second", "pairs_per_second", "response_tokens_per_second",
    "seconds/compile", "seconds/data_wait", "update_norm",
}  # fmt: skip


def derived(log: Log) -> Log:
    """The log with the share of each step that went into waiting for data."""
    if not {"seconds", "seconds/data_wait"} <= log.series.keys():
        return log
    whole, waited = log.series["seconds"], log.series["seconds/data_wait"]
    if not np.array_equal(whole.step, waited.step):
        return log
    share = np.divide(waited.value, whole.value, out=np.full(len(whole.value), np.nan), where=whole.value > 0)
    return Log(log.step, {**log.series, "data_wait_share": Series(whole.step, share)})


def curve_grids(runs: Sequence[Run]) -> list[tuple[str, list[Markup]]]:
    """(heading, charts) of everything the runs logged; a number that none has is left out, one we do not know is drawn
    under its own name. Of supervised fine-tuning the NLL is the loss, and drawn once."""
    logs = [derived(run.steps) for run in runs]
    if all(isinstance(run.objective, Supervised) for run in runs):
        logs = [Log(log.step, {name: log.series[name] for name in log.series if name != "loss/nll"}) for log in logs]
    known = {name for specs in SPECS.values() for spec in specs for name in spec.names} | UNDRAWN
    found = {name for log in logs for name in log.series} - known
    groups = {**SPECS, "Other numbers": tuple(Spec(name, (name,)) for name in sorted(found))}
    drawn = []
    for heading, specs in groups.items():
        charts = [chart for spec in specs if (chart := _chart(spec, runs, logs))]
        if charts:
            drawn.append((heading, [line_chart(chart) for chart in charts]))
    return drawn


def binned_in_words(runs: Sequence[Run]) -> str:
    """How the curves of long runs are drawn; empty where every step has its point."""
    curves = {
        key_of(hue): found.per_point
        for hue, run in enumerate(runs)
        if "loss" in run.steps.series and (found := curve(run.steps.series["loss"])) and found.per_point > 1
    }
    if not curves:
        return ""
    of = " and ".join(f"{steps} steps" + (f" of {key}" if len(runs) > 1 else "") for key, steps in curves.items())
    return f"A point of a curve is the mean of {of}; the band behind it spans their least and greatest value."


def _chart(spec: Spec, runs: Sequence[Run], logs: Sequence[Log]) -> Chart | None:
    several = len(runs) > 1
    lines: list[Line] = []
    for hue, (run, log) in enumerate(zip(runs, logs, strict=True)):
        for side, (name, said) in enumerate(zip(spec.names, spec.sides, strict=True)):
            trained, evaluated = log.series.get(name), run.evaluations.series.get(EVALUATED + name)
            label = " ".join(filter(None, (key_of(hue) if several else "", said)))
            tag, colour = (key_of(hue), hue) if several else (said, side)
            if trained is not None and (shown := curve(trained)):
                lines.append(Line(label, tag, colour, shown, dashed=side == 1))
            if evaluated is not None and (shown := curve(evaluated)):
                lines.append(Line(f"{label} held-out".strip(), "", colour, shown, dots=True))
    if not lines:
        return None
    if several and len(spec.names) > 1:
        lines = [Line(x.label, "" if x.dashed else x.tag, x.hue, x.curve, x.dashed, x.dots) for x in lines]
    return Chart(spec.title, lines, _note(spec, lines, several), spec.percent, spec.log, spec.mark, spec.within)


def _note(spec: Spec, lines: Sequence[Line], several: bool) -> str:
    notes = [spec.note]
    if several and len(spec.names) > 1:
        notes.append(f"Solid: {spec.sides[0]}, dashed: {spec.sides[1]}.")
    if any(line.dots for line in lines):
        notes.append("Circles: held-out groups.")
    return " ".join(filter(None, notes))


def key_of(hue: int) -> str:
    """The letter that stands for a run."""
    return "ABCDEFGH"[hue]


def ended(log: Log, name: str) -> float:
    """The mean of the finite values over the last tenth of a log's steps, NaN where there is none."""
    series = log.series.get(name)
    if series is None or not len(log):
        return float("nan")
    recent = log.step[-max(1, round(len(log) * LAST_SHARE)) :]
    values = series.value[(series.step >= recent[0]) & np.isfinite(series.value)]
    return float(values.mean()) if len(values) else float("nan")


FINAL = (
    ("Loss", "loss", False),
    ("Reward accuracy", "rewards/accuracies", True),
    ("Reward margin", "rewards/margins", False),
    ("Log-prob, chosen", "logps/chosen", False),
    ("Log-prob, rejected", "logps/rejected", False),
    ("β", "beta/mean", False),
    ("NLL of a token", "loss/nll", False),
    ("NLL of the critiques", "loss/critique", False),
    ("Tokens a second", "tokens_per_second", False),
    ("Groups a second", "groups_per_second", False),
    ("Step time, s", "seconds", False),
    ("Data wait", "data_wait_share", True),
    ("MFU", "mfu", True),
)


def final_table(runs: Sequence[Run]) -> Markup | None:
    """Where every run ended: the mean over training's last tenth and, of runs that have them, the held-out groups'
    first and last figures. None where nothing was logged."""
    logs = [derived(run.steps) for run in runs]
    columns = [
        [(logs[hue], _ended), *([(run.evaluations, _course)] * bool(len(run.evaluations)))]
        for hue, run in enumerate(runs)
    ]
    flat = [column for each in columns for column in each]
    rows = [(title, [said(log, name, percent) for log, said in flat]) for title, name, percent in FINAL]
    rows = [(title, values) for title, values in rows if any(value != MISSING for value in values)]
    if not rows:
        return None
    names = [
        element("th", _run_head(run, hue, len(runs)), scope="colgroup", colspan=len(each))
        for hue, (run, each) in enumerate(zip(runs, columns, strict=True))
    ]
    kinds = [element("th", ("training", "held-out")[i], scope="col") for each in columns for i in range(len(each))]
    head = [element("tr", element("td", ""), names)]
    if len(flat) > len(runs):
        head.append(element("tr", element("td", ""), kinds))
    body = [
        element("tr", element("th", title, scope="row"), [element("td", value) for value in values])
        for title, values in rows
    ]
    return element("table", element("thead", head), element("tbody", body), class_="figures")


def _ended(log: Log, name: str, percent: bool) -> str:
    return figure(ended(log, name), percent=percent)


def _course(evaluations: Log, name: str, percent: bool) -> str:
    values = evaluations.values(EVALUATED + name)
    if not len(values):
        return MISSING
    first, last = (figure(float(value), percent=percent) for value in (values[0], values[-1]))
    return f"{first} → {last}"


def _run_head(run: Run, hue: int, count: int) -> Markup:
    key = element("span", key_of(hue), class_=f"key r{hue}") if count > 1 else None
    return element("span", key, " ", run.name)
