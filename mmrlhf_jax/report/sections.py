"""The sections of a report, each left out, with a sentence on how to get it, where there is nothing to show."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from mmrlhf_jax.groups import Group
from mmrlhf_jax.objectives import RewardObjective
from mmrlhf_jax.report import setup
from mmrlhf_jax.report.answers import AnswersFile, in_all
from mmrlhf_jax.report.beta_map import Rule, beta_chart, beta_of, rule_in_words
from mmrlhf_jax.report.calibration import calibrate, calibration_chart, differences_of
from mmrlhf_jax.report.datasets import Found, Judged, annotate_command, judged, margins_of, was_trained_on
from mmrlhf_jax.report.examples import answer_examples, critique_examples, drawn, wrong_share
from mmrlhf_jax.report.markup import Children, Markup, element, fragment
from mmrlhf_jax.report.metrics import binned_in_words, curve_grids, final_table, key_of
from mmrlhf_jax.report.pictures import Album
from mmrlhf_jax.report.runs import Run, short_names
from mmrlhf_jax.report.scales import drawable, figure
from mmrlhf_jax.training.model import absolute

MOST_SCORINGS = 8


@dataclass(frozen=True)
class Material:
    """Everything a report is made of. `shown`: prompts of each kind of example at most."""

    runs: Sequence[Run]
    found: Found
    answers: Sequence[AnswersFile] = ()
    album: Album = field(default_factory=lambda: Album({}))
    shown: int = 12

    @cached_property
    def _judged(self) -> tuple[list[Judged], list[str]]:
        return judged(self.found)

    @property
    def scorings(self) -> list[Judged]:
        """What lies beside the datasets, as far as it can be read."""
        return self._judged[0]

    @property
    def unread(self) -> list[str]:
        """What is wrong with the rest."""
        return self._judged[1]

    @cached_property
    def groups(self) -> dict[str, list[Group]]:
        """The groups of every dataset that was scored, by its path."""
        return {scored.dataset.path: list(scored.dataset.groups()) for scored in self.scorings}


@dataclass(frozen=True)
class Section:
    """`body` None: there is nothing to show. `absent` are sentences on what is not shown and how to get it."""

    anchor: str
    title: str
    body: Markup | None
    absent: tuple[Children, ...] = ()


def sections_of(material: Material) -> list[Section]:
    """All of them, in their order."""
    return [
        _curves(material),
        _beta(material),
        _calibration(material),
        _answers(material),
        _critiques(material),
        _recipes(material),
        _environment(material),
    ]


def _command(text: str) -> Markup:
    return element("code", text)


def _curves(material: Material) -> Section:
    runs, grids = material.runs, curve_grids(material.runs)
    absent: list[Children] = [
        fragment(f"Curves of {run.name}: it has logged no step yet; ", _command("launch/train.py"), " goes on with it.")
        for run in runs
        if not len(run.steps)
    ]
    if not any(len(run.evaluations) for run in runs):
        flags = "--evaluation.every N --evaluation.share 0.05"
        absent.append(fragment("Held-out groups: train with ", _command(flags), " (or --evaluation.dataset DATASET)."))
    if not grids:
        return Section("curves", "Curves", None, tuple(absent))
    table = final_table(runs)
    ends = fragment(
        element("h3", "Where training ended"),
        element(
            "p",
            "Training: means over the last tenth of the steps. Held-out: all held-out groups, first and last time.",
            class_="lead",
        ),
        element("div", table, class_="scroll", tabindex=0, role="region", aria_label="Final numbers"),
    )
    charts = [
        fragment(element("h3", heading), element("div", drawn, class_="grid-of-charts")) for heading, drawn in grids
    ]
    said = " ".join(filter(None, (_lengths_in_words(runs), binned_in_words(runs))))
    lead = element("p", said, class_="lead") if said else None
    return Section("curves", "Curves", fragment(ends if table else None, lead, charts), tuple(absent))


def _lengths_in_words(runs: Sequence[Run]) -> str:
    """A curve that ends early is one of a shorter run, not of one that failed."""
    lengths = {run.name: int(run.steps.step[-1]) for run in runs if len(run.steps)}
    if len(set(lengths.values())) < 2:
        return ""
    return "Runs differ in length: " + ", ".join(f"{name} {steps:,} steps" for name, steps in lengths.items()) + "."


def _beta(material: Material) -> Section:
    """One chart for each set of margins, with the rules of all runs that read it."""
    absent: list[Children] = []
    charted: dict[tuple[str, str], tuple[list[Rule], np.ndarray]] = {}
    words: list[Children] = []
    for hue, run in enumerate(material.runs):
        rule = rule_in_words(run.objective)
        if rule is None:
            continue
        words.append(element("li", _key(material, hue), rule, "."))
        if beta_of(run.objective, np.zeros(1)) is None:
            continue
        name = str(run.start.get("dataset"))
        dataset = material.found.datasets.get(name)
        if dataset is None:  # which is said once for everything that is made of it
            continue
        try:
            margins = margins_of(run, dataset)
            margins = margins[drawable(margins)]
        except ValueError as error:
            absent.append(f"Margins of {run.name}: {error}.")
            continue
        if len(margins):
            margin_key = (name, str(run.recipe.get("margins", "data")))
            charted.setdefault(margin_key, ([], margins))[0].append(Rule(hue, run.objective))
        elif run.objective.needs_margin:
            absent.append(
                fragment(
                    f"Margins of {run.name}: its data has none; MM-DPO reads them after ",
                    _command(annotate_command([dataset])),
                    ".",
                )
            )
    if not words:
        return Section("beta", "β", None)
    charts = [
        beta_chart(rules, margins, "β of a pair, over the margins in the data") for rules, margins in charted.values()
    ]
    rules = element("ul", words, class_="rules")
    body = fragment(rules, element("div", charts, class_="wide-charts") if charts else None)
    return Section("beta", "From margin to β", body, tuple(absent))


def _key(material: Material, hue: int) -> Markup | None:
    if len(material.runs) == 1:
        return None
    return fragment(element("span", key_of(hue), class_=f"key r{hue}"), " ")


def _calibration(material: Material) -> Section:
    missing: list[Children] = [*material.found.missing, *material.unread]
    datasets = list(material.found.datasets.values())
    if not material.scorings:
        missing.append(
            fragment(
                "Calibration of a reward model, and critiques: no scores lie beside the data; ",
                _command(annotate_command(datasets)),
                " makes them.",
            )
        )
        return Section("calibration", "Calibration", None, tuple(missing))
    charts, shown = [], material.scorings[:MOST_SCORINGS]
    manners = Counter(scored.manner for scored in shown)
    paths = list(dict.fromkeys(scored.dataset.path for scored in shown))
    short = dict(zip(paths, short_names(paths), strict=True))
    for scored in shown:
        differences, tied = differences_of(scored, material.groups[scored.dataset.path])
        finite = differences[np.isfinite(differences)]
        if not len(finite):
            missing.append(f"Calibration of {scored.name}: none of the groups it scored has an annotated pair.")
            continue
        found, about = calibrate(finite), _about(scored, tied)
        title = f"{scored.manner}: {short[scored.dataset.path]}" if manners[scored.manner] > 1 else scored.manner
        charts.append(calibration_chart(found, title, _last_name(scored.model), about, _judge(material, scored) or 0))
    if len(material.scorings) > MOST_SCORINGS:
        missing.append(f"Calibration of {len(material.scorings) - MOST_SCORINGS} more scorings beside the data.")
    lead = (
        "How sure the reward model is that the response it scores higher is preferred, σ(score difference), against "
        "how often the annotators agree. On the diagonal it is as sure as it is right; below, too sure. "
        "ECE: mean distance from it. Annotators err too: with rankings that contradict each other no model agrees, and "
        "one may be right more often than it agrees."
    )
    body = fragment(element("p", lead, class_="lead"), element("div", charts, class_="grid-of-charts spaced"))
    return Section("calibration", "Calibration of the reward model", body if charts else None, tuple(missing))


def _last_name(path: str) -> str:
    return path.rstrip("/").split("/")[-1]


def _about(scored: Judged, tied: int) -> str:
    ties = f" {tied:,} pairs that annotators ranked equal are left out." if tied else ""
    seen = {
        True: " It was trained on this data, of which it may be too sure.",
        False: "",
        None: " Whether it was trained on this data, of which it would be too sure, is not known.",
    }[was_trained_on(scored)]
    return f"{len(scored.rewards):,} groups of {scored.dataset.path}.{seen}{ties} Scores: {scored.name}."


def _judge(material: Material, scored: Judged) -> int | None:
    """The number of the run that scored, None where it is none of them."""
    name = scored.model.split("@")[0]
    return next((hue for hue, run in enumerate(material.runs) if absolute(run.path) == name), None)


def _answers(material: Material) -> Section:
    files = material.answers
    if not files:
        if all(isinstance(run.objective, RewardObjective) for run in material.runs):
            return Section("answers", "Answers", None)
        run = shlex.quote(material.runs[0].path)
        command = _command(f"python launch/generate.py --model {run} --dataset DATASET --output FILE")
        said = fragment("Answers before and after: ", command, ", then ", _command("--answers FILE ..."), ".")
        return Section("answers", "Answers", None, (said,))
    keys = in_all(files)
    chosen = drawn(keys, material.shown)
    absent: list[Children] = []
    if not any(file.answers[key].shown.wrong is not None for file in files for key in keys):
        absent.append(
            fragment(
                "Wrong claims: no answer says which of its claims are wrong; the field ",
                _command("wrong"),
                " of a response does, see ",
                _command("python launch/report.py --help"),
                ".",
            )
        )
    if not any((key[0], files[0].answers[key].prompt) in material.album.places for key in chosen):
        absent.append(
            fragment(
                "Pictures of the prompts: name where they are with ",
                _command("--dataset DATASET"),
                " or ",
                _command("--input FILE --media DIR"),
                ".",
            )
        )
    lead = f"{len(chosen)} of {len(keys):,} prompts, drawn by a hash of their names, not picked by what was answered."
    body = fragment(
        element("p", lead, class_="lead"),
        _wrong_table(files, keys),
        answer_examples(files, chosen, material.album),
    )
    return Section("answers", "Answers", body, tuple(absent))


def _wrong_table(files: Sequence[AnswersFile], keys: Sequence[tuple[str, str]]) -> Markup | None:
    shares = [(file.label, *wrong_share(file, keys)) for file in files]
    rows: list[tuple[Children, Sequence[Children]]] = [
        (label, [figure(wrong / claims, percent=True), f"{wrong:,}", f"{claims:,}", f"{answers:,}"])
        for label, wrong, claims, answers in shares
        if claims
    ]
    if not rows:
        return None
    table = setup.table(("", "wrong claims", "wrong", "claims", "answers"), rows)
    return element("div", table, class_="scroll figures", tabindex=0, role="region", aria_label="Wrong claims")


def _critiques(material: Material) -> Section:
    written = [each for each in material.scorings if each.store.key["critiques"] == "generated"]
    if not written:
        if not material.scorings:
            return Section("critiques", "Critiques", None)  # one sentence speaks of both
        datasets = list(material.found.datasets.values())
        command = f"{annotate_command(datasets)} --critiques generated"
        return Section("critiques", "Critiques", None, (fragment("Critiques beside scores: ", _command(command), "."),))
    scored = min(written, key=lambda each: each.store.key["samples"])  # a score of its own beside each critique
    examples = critique_examples(scored, material.groups[scored.dataset.path], max(2, material.shown // 2))
    lead = f"{_last_name(scored.model)} on {scored.dataset.path}. {scored.manner}. Rank 1 is the annotators' best."
    body = fragment(
        element("p", lead, class_="lead"),
        [fragment(element("h3", why[:1].upper() + why[1:]), groups) for why, groups in examples],
    )
    return Section("critiques", "Critiques beside scores", body)


def _recipes(material: Material) -> Section:
    return Section("recipe", "Recipe", setup.recipes(material.runs))


def _environment(material: Material) -> Section:
    machines = setup.environments(material.runs)
    absent: tuple[Children, ...] = ()
    if machines is None:
        absent = ("Environment: the runs were begun by a version that did not record it.",)
    held = setup.datasets(material.found.datasets, material.runs)
    body = fragment(
        fragment(element("h3", "Environment"), machines) if machines else None,
        fragment(element("h3", "Data"), held) if held else None,
        element("h3", "What the runs started from"),
        setup.fingerprints(material.runs),
    )
    return Section("environment", "Environment and data", body, absent)
