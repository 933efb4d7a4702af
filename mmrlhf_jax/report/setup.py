"""What the runs were: recipes and where they differ, what they ran on, and what data they saw."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mmrlhf_jax.data.datasets import Dataset
from mmrlhf_jax.groups import Group
from mmrlhf_jax.report.charts import details
from mmrlhf_jax.report.markup import Children, Markup, element, fragment
from mmrlhf_jax.report.metrics import key_of
from mmrlhf_jax.report.runs import Run, defaults, resolved


def recipes(runs: Sequence[Run]) -> Markup:
    """What sets the runs apart, or one run from a plain recipe, marked; and everything else on demand."""
    return _one_recipe(runs[0]) if len(runs) == 1 else _several_recipes(runs)


def _one_recipe(run: Run) -> Markup:
    plain, chosen = defaults(run), resolved(run)
    changed = [name for name in chosen if chosen[name] != plain.get(name)]
    rows = [(name, [_mark(chosen[name]), _value(plain.get(name))]) for name in changed]
    rest = [(name, [_value(chosen[name])]) for name in chosen if name not in changed]
    return fragment(
        element("p", f"{len(changed)} of {len(chosen)} fields differ from a plain {run.kind} recipe.", class_="lead"),
        _box("Fields that were chosen", table(("field", "this run", "plain recipe"), rows)),
        details(f"The {len(rest)} fields that are as a recipe has them", table(("field", "value"), rest)),
    )


def _several_recipes(runs: Sequence[Run]) -> Markup:
    whole = [resolved(run) for run in runs]
    names = list(dict.fromkeys(name for recipe in whole for name in recipe))
    differ = [name for name in names if len({_json(recipe.get(name)) for recipe in whole}) > 1]
    rows = [(name, _differing([recipe.get(name, _ABSENT) for recipe in whole])) for name in differ]
    rest = [(name, [_value(whole[0][name])]) for name in names if name not in differ]
    said = f"{len(differ)} of {len(names)} fields differ; marked is what is not as in {key_of(0)}."
    heads: list[Children] = ["field", *(_head(run, hue) for hue, run in enumerate(runs))]
    return fragment(
        element("p", said if differ else f"All {len(names)} fields are the same.", class_="lead"),
        _box("Fields that differ", table(heads, rows)) if rows else None,
        details(f"The {len(rest)} fields that are the same", table(("field", "value"), rest)),
    )


_ABSENT = object()


def _differing(values: Sequence[Any]) -> list[Children]:
    return [_mark(value) if _json(value) != _json(values[0]) else _value(value) for value in values]


def _json(value: Any) -> str:
    return "" if value is _ABSENT else json.dumps(value, sort_keys=True)


def _value(value: Any) -> Markup:
    if value is _ABSENT:
        return element("code", "–")
    return element("code", value if isinstance(value, str) and value else json.dumps(value))


def _mark(value: Any) -> Markup:
    return element("mark", _value(value), class_="differs")


def _head(run: Run, hue: int) -> Markup:
    return fragment(element("span", key_of(hue), class_=f"key r{hue}"), " ", run.name)


def table(heads: Sequence[Children], rows: Sequence[tuple[Children, Sequence[Children]]]) -> Markup:
    """A table whose rows have a head each."""
    head = element("tr", [element("th", text, scope="col") for text in heads])
    body = [
        element("tr", element("th", name, scope="row"), [element("td", value) for value in values])
        for name, values in rows
    ]
    return element("table", element("thead", head), element("tbody", body))


def _box(name: str, content: Markup) -> Markup:
    return element("div", content, class_="scroll", tabindex=0, role="region", aria_label=name)


def environments(runs: Sequence[Run]) -> Markup | None:
    """What each run ran on, a column a run; of one that was resumed the newest start. None where no run says."""
    stated = [_environment(run) for run in runs]
    names = list(dict.fromkeys(name for each in stated for name in each))
    if not names:
        return None
    rows = [(name, [_text(each.get(name)) for each in stated]) for name in names]
    heads = ("", *(_head(run, hue) if len(runs) > 1 else run.name for hue, run in enumerate(runs)))
    return _box("Environment", table(heads, rows))


def _environment(run: Run) -> dict[str, str]:
    if not run.starts:
        return {}
    newest = run.starts[-1]
    packages = newest.get("packages")
    found = {
        "device": f"{newest.get('devices')} × {newest.get('device')} ({newest.get('backend')})",
        "processes": str(newest.get("processes")),
        "mesh": _pairs(newest.get("mesh")),
        "platform": str(newest.get("platform")),
        "python": str(newest.get("python")),
        **{str(name): str(version) for name, version in (packages.items() if isinstance(packages, dict) else ())},
    }
    if len(run.starts) > 1:
        steps = ", ".join(str(each.get("step")) for each in run.starts)
        found["started"] = f"{len(run.starts)} times, at steps {steps}"
    return found


def _pairs(value: Any) -> str:
    return ", ".join(f"{name} {size}" for name, size in value.items()) if isinstance(value, Mapping) else str(value)


def _text(value: str | None) -> Markup:
    return element("code", value or "–")


FINGERPRINT_DIGITS = 20
_HEX = re.compile(r"[0-9a-f-]{32,}")
FINGERPRINTS = {
    "dataset": "training data",
    "evaluation": "held-out data",
    "margins": "rewards behind the margins",
    "model": "starting model",
    "renderer": "rendering",
    "base": "starting model is at",
}


def fingerprints(runs: Sequence[Run]) -> Markup:
    """What each run started from, by the first digits of its fingerprint; equal ones are the same bytes."""
    rows = [
        (said, [_text(_short(run.start.get(name))) for run in runs])
        for name, said in FINGERPRINTS.items()
        if any(run.start.get(name) for run in runs)
    ]
    heads = ("", *(_head(run, hue) if len(runs) > 1 else run.name for hue, run in enumerate(runs)))
    return _box("Fingerprints", table(heads, rows))


def _short(value: Any) -> str | None:
    """A path as it stands; of a fingerprint its first digits, enough to tell two apart."""
    if not isinstance(value, str):
        return None
    return f"{value[:FINGERPRINT_DIGITS]}…" if _HEX.fullmatch(value) else value


def datasets(found: Mapping[str, Dataset], runs: Sequence[Run]) -> Markup | None:
    """What is in each dataset. None where there is none."""
    if not found:
        return None
    counts = [_counts(dataset, list(dataset.groups()), fingerprint, runs) for fingerprint, dataset in found.items()]
    names = list(dict.fromkeys(name for each in counts for name in each))
    rows = [(name, [element("span", each.get(name, "–")) for each in counts]) for name in names]
    heads: list[Children] = ["", *(element("code", dataset.path) for dataset in found.values())]
    return _box("Datasets", table(heads, rows))


def _counts(dataset: Dataset, groups: Sequence[Group], fingerprint: str, runs: Sequence[Run]) -> dict[str, str]:
    sizes = Counter(len(group.responses) for group in groups)
    users = [
        f"{run.name} ({role})"
        for run in runs
        for start, role in (("dataset", "training"), ("evaluation", "held-out"))
        if run.start.get(start) == fingerprint
    ]
    pictures = sum(media.kind == "image" for group in groups for media in group.media)
    videos = sum(media.kind == "video" for group in groups for media in group.media)
    return {
        "used by": ", ".join(users) or "no run here",
        "groups": f"{len(dataset):,}",
        "responses a group": ", ".join(f"{k}: {n:,}" for k, n in sorted(sizes.items())),
        "annotated pairs": f"{sum(len(group.pairs) for group in groups):,}",
        "pictures": f"{pictures:,}",
        **({"videos": f"{videos:,}"} if videos else {}),
        "fingerprint": _short(fingerprint) or "–",
    }
