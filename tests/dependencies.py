"""What the project depends on, as installed here, and under which licences.

python tests/dependencies.py        prints the table of .ci/licences.md
"""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

# families of licences that ask for nothing but notices, or, the MPL, for the source of changes to its own files
ALLOWED = {
    "Apache-2.0": r"apache",
    "MIT": r"\bmit\b|\bmit-cmu\b|\bmit-0\b",
    "BSD": r"\bbsd\b|[023]-clause|bsd-",
    "ISC": r"\bisc\b",
    "PSF": r"\bpsf\b|python software foundation|\bcnri\b",
    "MPL-2.0": r"mpl|mozilla public",
    "HPND": r"hpnd|historical permission",
    "Zlib": r"\bzlib\b",
}
REFUSED = re.compile(r"gpl|general public|sspl|business source|non-?commercial|proprietary", re.IGNORECASE)
# not open; extras that only who wants TPUs installs, and the tests that compile for one
EXCEPTIONS = {"libtpu": "Google Cloud Platform Terms of Service"}


def requirements(*extras: str) -> list[Requirement]:
    """Of pyproject.toml, with those of these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = list(project["dependencies"])
    for extra in extras:
        texts += project["optional-dependencies"][extra]
    return [Requirement(text) for text in texts]


def all_requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return requirements(*project["optional-dependencies"])


def closure(roots: list[Requirement]) -> dict[str, metadata.Distribution]:
    """Every installed distribution that `roots` lead to, by canonical name."""
    found: dict[str, metadata.Distribution] = {}
    done, open_ = set(), list(roots)
    while open_:
        requirement = open_.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in done:
            continue
        done.add(key)
        try:
            distribution = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            continue  # of an extra that is not installed here
        found[key[0]] = distribution
        for text in distribution.requires or []:
            inner = Requirement(text)
            extras = requirement.extras or {""}
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                open_.append(inner)
    return found


def stated_licence(distribution: metadata.Distribution) -> str:
    """As the metadata has it: an SPDX expression, else classifiers, else the first line of a text."""
    meta = distribution.metadata
    if expression := meta.get("License-Expression"):
        return expression
    classifiers = [line for line in meta.get_all("Classifier") or [] if line.startswith("License :: OSI Approved ::")]
    if classifiers:
        return "; ".join(line.rpartition(":: ")[2] for line in classifiers)
    lines = [line.strip() for line in (meta.get("License") or "").splitlines() if line.strip()]
    return lines[0] if lines else ""


def families(name: str, distribution: metadata.Distribution) -> list[str]:
    """The families of ALLOWED its licence is of; none: not allowed, or not known."""
    stated = stated_licence(distribution)
    if EXCEPTIONS.get(name) == stated:
        return ["exception"]
    if REFUSED.search(stated):
        return []
    return [family for family, pattern in ALLOWED.items() if re.search(pattern, stated, re.IGNORECASE)]


if __name__ == "__main__":
    print("| package | licence |\n|---|---|")
    for name, distribution in sorted(closure(all_requirements()).items()):
        print(f"| {name} | {stated_licence(distribution)[:80]} |")
