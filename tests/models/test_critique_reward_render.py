"""How a reward model sees a group: every conversation as it would be alone, what they share stored once."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from tiny import write_tiny_directory

from mmrlhf_jax.groups import Group, Media, Origin, Response, Turn
from mmrlhf_jax.models.critique_reward import config as reward_config
from mmrlhf_jax.models.critique_reward.config import RewardSettings, fill, read_settings, read_template
from mmrlhf_jax.models.critique_reward.render import (
    RewardRenderer,
    check_facts,
    load_reward_renderer,
    renderer_with,
    settings_for_training,
    shows_facts,
    without_critiques,
)
from mmrlhf_jax.models.llava_onevision.render import load_renderer

RELEASED_FRAME = "Judge.\n\n[Question]: {question}\n[LMM Response]: {answer}\n\n[Evaluation]:"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("assets")
    write_tiny_directory(path)
    return path


@pytest.fixture(scope="module")
def renderer(directory):
    return RewardRenderer(load_renderer(str(directory)), read_template(""))


def group(*responses: Response, media: tuple[Media, ...] = (Media("image", "a.png", ((100, 60),)),)) -> Group:
    return Group("q", (Turn("user", "How many cats?"),), media, responses, (), (Origin("made.jsonl", 3),))


def pixels(sizes):
    """A decoder of pictures: any bytes are noise of the next size."""
    waiting = iter(sizes)
    rng = np.random.default_rng(0)

    def decode(_: bytes) -> np.ndarray:
        width, height = next(waiting)
        return rng.integers(0, 256, (height, width, 3)).astype(np.uint8)

    return decode


def with_bytes(bare: Group) -> Group:
    media = tuple(dataclasses.replace(m, encoded=(b"x",) * len(m.sizes)) for m in bare.media)
    return dataclasses.replace(bare, media=media)


def rendered(renderer: RewardRenderer, bare: Group):
    return renderer.render(with_bytes(bare), pixels([size for m in bare.media for size in m.sizes]))


TWO = (Response("Two cats.", reason="Right: two cats."), Response("Two dogs.", reason="They are cats."))


def test_prompt_and_branch_are_the_conversation_token_for_token(renderer):
    asked = group(*TWO)
    whole = rendered(renderer, asked)
    for response, branch in zip(asked.responses, whole.branches, strict=True):
        text = fill(renderer.template, "How many cats?", response.text)
        alone = dataclasses.replace(asked, prompt=(Turn("user", text),), responses=(Response(response.reason),))
        expected = renderer.policy.render(with_bytes(alone), pixels([(100, 60)]))
        ids = np.concatenate([expected.prompt, expected.branches[0].token])
        np.testing.assert_array_equal(np.concatenate([whole.prompt, branch.token]), ids)
        np.testing.assert_array_equal(whole.tap_weight, expected.tap_weight[: len(whole.prompt)])


def test_what_is_shared_is_the_longest_common_beginning(renderer):
    whole = rendered(renderer, group(*TWO))
    firsts = {int(branch.token[0]) for branch in whole.branches}
    assert len(firsts) == 2
    text = renderer.policy.tokenizer.decode(whole.prompt[np.flatnonzero(whole.tap_weight.any(1))[-1] + 1 :])
    assert text.startswith("\n" + renderer.template.split("{question}")[0])
    assert text.endswith("[LMM Response]: Two ")  # both answers begin so; a byte is a token here


def test_critique_and_closing_are_scored_and_the_answer_is_not(renderer):
    whole = rendered(renderer, group(*TWO))
    for response, branch in zip(TWO, whole.branches, strict=True):
        scored = branch.token[branch.loss_weight > 0]
        np.testing.assert_array_equal(scored, renderer.policy.response_ids(response.reason))
        assert branch.loss_weight[-len(scored) :].all()


def test_without_a_critique_a_branch_ends_where_one_would_begin(renderer):
    asked = without_critiques(group(*TWO))
    whole = rendered(renderer, asked)
    for branch in whole.branches:
        assert not branch.loss_weight.any()
        assert renderer.policy.tokenizer.decode(branch.token).endswith("<|im_start|>assistant\n")


def test_critiques_do_not_move_what_is_shared(renderer):
    with_reasons, without = rendered(renderer, group(*TWO)), rendered(renderer, without_critiques(group(*TWO)))
    np.testing.assert_array_equal(with_reasons.prompt, without.prompt)


@pytest.mark.parametrize("answers", [("Two.",), ("Two.", "Two."), ("Two", "Two cats"), ("", "x")])
def test_every_branch_keeps_a_token(renderer, answers):
    whole = rendered(renderer, group(*(Response(text) for text in answers)))
    assert min(len(branch.token) for branch in whole.branches) >= 1
    assert len(whole.branches) == len(answers)


def test_measuring_is_rendering_without_pixels(renderer):
    rng = np.random.default_rng(0)
    for n in range(40):
        media = tuple(Media("image", f"{i}", (tuple(rng.integers(20, 200, 2).tolist()),)) for i in range(n % 3))
        if n % 5 == 4:
            media = (Media("video", "v", ((40, 30),) * int(rng.integers(1, 14))),)
        responses = tuple(
            Response("cat " * int(rng.integers(1, 9)) + str(i), reason="right " * i if rng.random() < 0.7 else None)
            for i in range(int(rng.integers(1, 6)))
        )
        bare = group(*responses, media=media)
        assert renderer.measure(bare) == rendered(renderer, bare).lengths


def test_control_tokens_and_braces_in_texts_are_text(renderer):
    answer = "<|im_end|> {question} <image> {answer}"
    whole = rendered(renderer, group(Response(answer, reason="<|im_end|>"), Response("Two.")))
    special = renderer.policy.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [(branch.token == special).sum() for branch in whole.branches] == [2, 1]  # the user's turn, the critique's
    assert answer in renderer.policy.tokenizer.decode(np.concatenate([whole.prompt[-80:], whole.branches[0].token]))


def test_earlier_turns_stay_and_the_last_is_the_question(renderer):
    turns = (Turn("user", "Look.", 1), Turn("assistant", "I do."), Turn("user", "How many cats?"))
    asked = dataclasses.replace(group(*TWO), prompt=turns)
    text = renderer.policy.tokenizer.decode(rendered(renderer, asked).prompt)
    assert text.index("Look.") < text.index("I do.") < text.index("[Question]: How many cats?")
    with pytest.raises(ValueError, match=r"made.jsonl:3: the prompt does not end with a user turn"):
        renderer.measure(dataclasses.replace(asked, prompt=turns[:2]))


def test_the_fingerprint_hangs_on_template_and_policy_rendering(renderer):
    other = RewardRenderer(renderer.policy, RELEASED_FRAME)
    assert len({other.fingerprint, renderer.fingerprint, renderer.policy.fingerprint}) == 3


# --- templates and settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RELEASED_FRAME.replace("{answer}", ""), "holds '{answer}' once, this one 0 times"),
        (RELEASED_FRAME + " {question}", "holds '{question}' once, this one 2 times"),
        (RELEASED_FRAME.replace("[Evaluation]:", "Evaluation:"), r"holds '\[Evaluation\]:' once"),
        ("[LMM Response]: {answer}\n[Question]: {question}\n[Evaluation]:", "stand in this order"),
    ],
)
def test_a_template_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_template(str(tmp_path / "t.txt"))
    with pytest.raises(FileNotFoundError, match="no such template file"):
        read_template(str(tmp_path / "absent.txt"))


def test_a_last_newline_of_an_editor_is_no_part_of_a_template(tmp_path):
    (tmp_path / "t.txt").write_text(RELEASED_FRAME + "\n")
    assert read_template(str(tmp_path / "t.txt")) == RELEASED_FRAME


def test_the_released_model_s_template_is_brought_by_its_user_and_checked(directory, tmp_path, monkeypatch):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    RewardSettings("tanh", True, None, "You are a helpful assistant.").write(tmp_path)
    with pytest.raises(ValueError, match=f"sha256 {reward_config.RELEASED_SHA256}, 434 characters"):
        load_reward_renderer(str(tmp_path))
    brought = tmp_path / "t.txt"
    brought.write_text(RELEASED_FRAME)
    with pytest.raises(ValueError, match=f"but the template .* has {reward_config.RELEASED_SHA256}"):
        load_reward_renderer(str(tmp_path), template=str(brought))
    sha256 = reward_config.template_sha256(RELEASED_FRAME)
    monkeypatch.setattr("mmrlhf_jax.models.critique_reward.render.RELEASED_SHA256", sha256)
    found = load_reward_renderer(str(tmp_path), template=str(brought))
    assert found.template == RELEASED_FRAME
    ids = found.policy.prompt_ids(group(*TWO, media=()))
    assert found.policy.tokenizer.decode(ids).startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")


def test_a_model_with_its_own_template_takes_no_other(directory, tmp_path):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    RewardSettings("linear", True, RELEASED_FRAME).write(tmp_path)
    assert load_reward_renderer(str(tmp_path)).template == RELEASED_FRAME
    (tmp_path / "t.txt").write_text(RELEASED_FRAME.replace("Judge", "Weigh"))
    with pytest.raises(ValueError, match="is not the template"):
        load_reward_renderer(str(tmp_path), template=str(tmp_path / "t.txt"))


def test_a_scalar_model_reads_plain_answers(directory, tmp_path):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    RewardSettings("linear", critique=False).write(tmp_path)
    found, plain = load_reward_renderer(str(tmp_path)), load_renderer(str(tmp_path))
    assert found.measure(group(*TWO)) == plain.measure(group(*TWO))
    with pytest.raises(ValueError, match="a scalar reward model reads plain answers"):
        load_reward_renderer(str(tmp_path), template="t.txt")


def test_a_policy_is_no_reward_model(directory):
    with pytest.raises(ValueError, match="a policy; a reward model is asked for"):
        load_reward_renderer(str(directory))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("{", "not the settings of a reward model"),
        ('{"heads": "linear"}', "not the settings of a reward model"),
        ('{"head": "cubic"}', "head is 'linear' or 'tanh'"),
        ('{"critique": 1}', "critique true or false"),
        ('{"template": 3}', "template and system are texts or null"),
        ('{"template": "Judge it."}', "holds '{question}' once"),
    ],
)
def test_damaged_settings_are_named(tmp_path, raw, message):
    (tmp_path / "reward.json").write_text(raw)
    with pytest.raises(ValueError, match=message) as error:
        read_settings(tmp_path)
    assert "reward.json" in str(error.value)


def test_settings_come_back_as_they_were_written(tmp_path):
    settings = RewardSettings("tanh", True, RELEASED_FRAME, "Be fair.")
    settings.write(tmp_path)
    assert read_settings(tmp_path) == settings
    assert json.loads((tmp_path / "reward.json").read_text())["head"] == "tanh"


def test_training_on_keeps_what_the_model_was_trained_with(directory, tmp_path):
    assert settings_for_training(directory, "tanh", True, "") == RewardSettings("tanh", True, read_template(""))
    assert settings_for_training(directory, "linear", False, "") == RewardSettings("linear", False, None)
    RewardSettings("tanh", True, RELEASED_FRAME, "Be fair.").write(tmp_path)
    assert settings_for_training(tmp_path, "tanh", True, "").template == RELEASED_FRAME
    with pytest.raises(ValueError, match="its head is 'tanh', the recipe asks for 'linear'"):
        settings_for_training(tmp_path, "linear", True, "")
    RewardSettings("tanh", True, None, "Be fair.").write(tmp_path)
    with pytest.raises(ValueError, match=r"brings no template: set reward.template"):
        settings_for_training(tmp_path, "tanh", True, "")


# --- facts -----------------------------------------------------------------------------------------------------------


def known(*facts: str) -> Group:
    return dataclasses.replace(group(*TWO), facts=facts, media=())


@pytest.mark.parametrize("critique", [True, False])
def test_facts_stand_behind_the_question_and_nowhere_else(directory, critique):
    template = read_template("") if critique else None
    shown, plain = (
        renderer_with(RewardSettings("linear", critique, template, facts=f), directory) for f in (True, False)
    )
    assert shows_facts(shown)
    assert not shows_facts(plain)
    facts = known("A cat on a mat.", "Options: A cat, B dog.")
    last = facts.prompt[-1]
    asked = dataclasses.replace(last, text=f"{last.text}\n[Facts]: A cat on a mat.\nOptions: A cat, B dog.")
    expected = plain.render(dataclasses.replace(facts, prompt=(*facts.prompt[:-1], asked)), lambda data: data)
    found = shown.render(facts, lambda data: data)
    np.testing.assert_array_equal(found.prompt, expected.prompt)
    for one, other in zip(found.branches, expected.branches, strict=True):
        np.testing.assert_array_equal(one.token, other.token)
    assert shown.measure(facts) == found.lengths
    assert plain.measure(facts) == plain.measure(known())  # who is not shown them does not see them
    assert shown.fingerprint != plain.fingerprint


def test_a_group_without_facts_is_refused_and_counted(directory):
    shown = renderer_with(RewardSettings("linear", False, facts=True), directory)
    for call in (shown.measure, lambda asked: shown.render(asked, lambda data: data)):
        with pytest.raises(
            ValueError, match=r"no facts, and this reward model is shown them: prepare with .*facts=FIELD"
        ):
            call(known())
    assert check_facts([known("a", "b"), known("c")]) == "3 facts of 2 groups are shown to the reward model"
    with pytest.raises(ValueError, match=r"2 of 3 groups have no facts \(.*\), and this reward model"):
        check_facts([known("a"), known(), known()])


def test_that_facts_are_shown_stands_in_the_settings(directory, tmp_path):
    settings = settings_for_training(directory, "linear", False, "", facts=True)
    settings.write(tmp_path)
    assert read_settings(tmp_path) == settings == RewardSettings("linear", False, facts=True)
    with pytest.raises(ValueError, match=r"its facts are True, the recipe asks for False: set reward\.facts"):
        settings_for_training(tmp_path, "linear", False, "")
    (tmp_path / "reward.json").write_text('{"critique": false, "facts": 1}')
    with pytest.raises(ValueError, match="facts is true or false"):
        read_settings(tmp_path)
