"""What the models said: answers of several policies to one prompt, and critiques beside the scores they led to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from mmrlhf_jax.data.rewards import GroupReward
from mmrlhf_jax.groups import Group
from mmrlhf_jax.report.answers import AnswersFile, Key, Prompt, Said
from mmrlhf_jax.report.charts import details
from mmrlhf_jax.report.datasets import Judged
from mmrlhf_jax.report.markup import Markup, element, fragment
from mmrlhf_jax.report.pictures import Album, pictures_of, turns_of
from mmrlhf_jax.report.scales import MINUS, figure

LONGEST = 1500  # characters of a text that are shown
WRONGEST = 3  # groups in which a reward model disagrees most with the annotators


def drawn(keys: Sequence[tuple[str, str]], wanted: int) -> list[tuple[str, str]]:
    """`wanted` of `keys` in their order, those whose hashes are smallest: the same each time, chosen by nothing that
    was said, and blind to how kinds of prompts take turns."""
    chosen = set(sorted(keys, key=lambda key: hashlib.sha256(repr(key).encode()).digest())[:wanted])
    return [key for key in keys if key in chosen]


def answer_examples(files: Sequence[AnswersFile], keys: Sequence[Key], album: Album) -> list[Markup]:
    """The answers of all files to each prompt, beside its pictures."""
    return [_answers_to(files, key, album) for key in keys]


def _answers_to(files: Sequence[AnswersFile], key: Key, album: Album) -> Markup:
    prompt = files[0].answers[key].prompt
    columns = []
    for file in files:
        answered = file.answers[key]
        of = f"best of {len(answered.responses)}" if len(answered.responses) > 1 else None
        columns.append(
            element(
                "div",
                element("h4", file.label, element("span", of, class_="quiet") if of else None),
                _said(answered.shown),
                class_="answer",
            )
        )
    return element(
        "article",
        element("div", album.pictures(key[0], prompt) or None, class_="pictures"),
        element("div", _question(key[0], prompt), element("div", columns, class_="answers"), class_="words"),
        class_="example",
    )


def _question(name: str, prompt: Prompt) -> Markup:
    turns = [
        element("p", element("b", f"{role}: ") if len(prompt) > 1 else None, _plain(text), class_="prompt", dir="auto")
        for role, text in prompt
    ]
    return fragment(element("h3", name, class_="name"), turns)


def _said(said: Said) -> Markup:
    notes = []
    if said.missing:
        notes.append("Not said: " + ", ".join(said.missing) + ".")
    if said.wrong is not None:
        notes.append(_count(said))
    if not said.ended:
        notes.append("Cut off at its longest.")
    if said.score is not None:
        notes.append(f"Score {figure(said.score)}.")
    return fragment(
        element("p", marked(said), class_="text", dir="auto"),
        element("p", " ".join(notes), class_="remark") if notes else None,
        [element("blockquote", _plain(text), dir="auto") for text in said.critiques[:1] if text],
    )


def _count(said: Said) -> str:
    if not said.faults:
        return "No wrong claim." if said.claims is None else f"None of {said.claims} claims wrong."
    if said.claims is None:
        return "1 wrong claim." if said.faults == 1 else f"{said.faults} wrong claims."
    return f"{said.faults} of {said.claims} claims wrong."


def marked(said: Said) -> Markup:
    """The text with its wrong claims marked, for eyes and for ears, and what is right behind each."""
    parts: list[Markup | str] = []
    at = 0
    for wrong in said.wrong or ():
        if wrong.end > LONGEST:
            break
        parts.append(said.text[at : wrong.start])
        parts.append(
            element(
                "mark",
                element("span", "wrong: ", class_="heard"),
                said.text[wrong.start : wrong.end],
                title=f"right: {wrong.right}" if wrong.right else None,
            )
        )
        if wrong.right:
            parts.append(element("ins", element("span", " right: ", class_="heard"), wrong.right))
        at = wrong.end
    rest = said.text[at:]
    if len(said.text) > LONGEST:
        rest = f"{said.text[at:LONGEST]} … and {len(said.text) - LONGEST:,} more characters"
    return fragment(parts, rest)


def _plain(text: str) -> Markup:
    return marked(Said(text))


def wrong_share(file: AnswersFile, keys: Sequence[Key]) -> tuple[int, int, int]:
    """(wrong or missing claims, claims, answers) over the answers that say both."""
    told = [said for key in keys if (said := file.answers[key].shown).wrong is not None and said.claims is not None]
    return sum(said.faults for said in told), sum(said.claims or 0 for said in told), len(told)


def critique_examples(scored: Judged, groups: Sequence[Group], shown: int) -> list[tuple[str, list[Markup]]]:
    """(why they are shown, groups with critique and score of each response): some drawn blindly, and those where the
    scores contradict the annotators most."""
    worst = sorted((least, row) for row, reward in scored.rewards.items() if (least := _least(groups[row], reward)) < 0)
    wrong = [row for _, row in worst[:WRONGEST]]
    others = sorted(set(scored.rewards) - set(wrong))
    names = {(groups[row].id, str(row)): row for row in others}
    typical = [names[key] for key in drawn(list(names), max(shown - len(wrong), 0))]
    made = [
        (f"{len(typical)} of {len(scored.rewards):,} groups, drawn by a hash of their names", typical),
        ("where the scores contradict the annotators most", wrong),
    ]
    return [(why, [_group(scored, groups[row], row) for row in rows]) for why, rows in made if rows]


def _least(group: Group, reward: GroupReward) -> float:
    """The least difference of scores among the annotated pairs, 0 where there is none."""
    score = reward.score
    return min((score[pair.chosen] - score[pair.rejected] for pair in group.pairs), default=0.0)


def _group(scored: Judged, group: Group, row: int) -> Markup:
    reward = scored.rewards[row]
    order = sorted(range(len(group.responses)), key=lambda k: -reward.score[k])
    head = [element("th", text, scope="col") for text in ("score", "rank", "answer", "critique")]
    rows = [_response(group, reward, k) for k in order]
    return element(
        "article",
        element("div", list(pictures_of(scored.dataset.with_media(row))) or None, class_="pictures"),
        element(
            "div",
            _question(group.id, turns_of(group)),
            element(
                "div",
                element("table", element("thead", element("tr", head)), element("tbody", rows), class_="critiques"),
                class_="scroll",
                tabindex=0,
                role="region",
                aria_label=f"Scores and critiques of {group.id}",
            ),
            class_="words",
        ),
        class_="example",
    )


def _response(group: Group, reward: GroupReward, k: int) -> Markup:
    response, critiques = group.responses[k], [text for text in reward.critiques[k] if text]
    more = f"The first of {len(critiques)}; the score is their mean." if len(critiques) > 1 else None
    asked = element("p", _plain(response.question), class_="remark") if response.question is not None else None
    human = details("the annotator's", element("p", _plain(response.reason))) if response.reason else None
    return element(
        "tr",
        element("td", f"{reward.score[k]:.2f}".replace("-", MINUS), class_="number"),
        element("td", str(response.rank + 1), class_="number"),
        element("td", asked, _plain(response.text), dir="auto"),
        element(
            "td",
            [_plain(text) for text in critiques[:1]] or element("span", "none", class_="quiet"),
            element("p", more, class_="remark") if more else None,
            human,
            dir="auto",
        ),
    )
