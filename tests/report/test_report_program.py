"""launch/report.py as a user starts it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_samples import answer, write_dataset, write_lines, write_run, write_scores
from small_world import ROOT

from mmrlhf_jax import storage
from mmrlhf_jax.command import run_command
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.rewards import stored_scores
from mmrlhf_jax.objectives import DPO, MMDPO, MMDPOReleasedBatch, ScalarReward, Supervised
from mmrlhf_jax.training.data import scores_fingerprint

RunReport = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def main() -> Callable[[], None]:
    spec = importlib.util.spec_from_file_location("launch_report", ROOT / "launch" / "report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["launch_report"] = module  # where tyro looks the types of flags up
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def report(main, monkeypatch, capsys, tmp_path) -> RunReport:
    """Runs the program in this process; -> exit code, the page it wrote (else what it printed), stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        given = [str(each) for each in arguments]
        if "--output" not in given:
            given += ["--output", str(tmp_path / "report.html")]
        monkeypatch.setattr(sys, "argv", ["report.py", *given])
        status = 0
        try:
            run_command(main)
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        output, error = capsys.readouterr()
        page = storage.to_path(given[given.index("--output") + 1])
        return status, page.read_bytes().decode() if status == 0 else output, error

    return run


class Page(HTMLParser):
    """The text and the tags of a page; fails where elements do not close in order."""

    VOID = ("meta", "img", "br", "wbr", "col")

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.parts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def data(tmp_path):
    return write_dataset(tmp_path / "world")


def test_a_preference_run_has_its_curves_map_recipe_and_data(report, data, tmp_path):
    status, html, _ = report(write_run(tmp_path / "run", MMDPO(beta=0.2), dataset=data))
    assert status == 0
    page = Page(html)
    charts = [svg["aria-label"] for svg in page.named("svg")]
    for title in ("Loss", "Reward accuracy", "Reward margin", "Log-probs", "Length", "Throughput", "Data wait"):
        assert any(chart.startswith(f"{title} by step") for chart in charts), title
    assert any("held-out: from 0.7000 at step 0" in chart for chart in charts)
    (beta,) = [chart for chart in charts if "β = 0.2 (1 + 0.5 (1 − exp(−0.5 d)))" in chart]
    assert "18 pairs with margins from 1 to 2" in beta  # three pairs of six groups: 1, 1 and 2 apart
    assert "objective.beta" in page.text
    assert data.fingerprint[:20] in page.text


def test_the_page_loads_nothing_and_runs_nothing(report, data, tmp_path):
    _, html, _ = report(write_run(tmp_path / "run", dataset=data))
    page = Page(html)
    (policy,) = [meta["content"] for meta in page.named("meta") if meta.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        assert attributes.get("href", "#").startswith("#")
        assert attributes.get("src", "data:").startswith("data:")
    assert "url(" not in html
    assert "@import" not in html


def test_runs_side_by_side_share_their_charts_and_differ_where_it_is_marked(report, data, tmp_path):
    first = write_run(tmp_path / "a" / "run", MMDPO(), dataset=data)
    second = write_run(tmp_path / "b" / "run", DPO(beta=0.3), steps=400, dataset=data, seed=7)
    status, html, _ = report(first, second)
    assert status == 0
    page = Page(html)
    assert "a/run" in page.text
    assert "b/run" in page.text
    assert "mean of 3 steps of B" in page.text
    assert "Runs differ in length: a/run 40 steps, b/run 400 steps." in page.text
    assert "β = 0.3 for every pair" in page.text
    marked = [
        i for i, (tag, attributes) in enumerate(page.tags) if (tag, attributes.get("class")) == ("mark", "differs")
    ]
    assert marked
    assert re.search(r'<th scope="row">seed</th><td><code>0</code></td><td><mark class="differs"><code>7', html)


@pytest.mark.parametrize(
    "objective", [Supervised(), ScalarReward(), MMDPOReleasedBatch()], ids=lambda o: type(o).__name__
)
def test_any_run_is_reported(report, tmp_path, objective):
    status, html, _ = report(write_run(tmp_path / "run", objective))
    assert status == 0
    text = Page(html).text
    assert type(objective).__name__ in text
    assert ("no pair's margin decides it" in text) == isinstance(objective, MMDPOReleasedBatch)


def test_what_is_missing_is_a_sentence_with_its_command(report, data, tmp_path):
    _, html, _ = report(write_run(tmp_path / "run", dataset=data))
    text = Page(html).text
    assert f"launch/annotate.py --dataset {data.path} --model REWARD_MODEL --with reward" in text
    assert f"launch/generate.py --model {tmp_path / 'run'} --dataset DATASET" in text
    assert "Calibration of the reward model" not in text
    shutil.rmtree(data.path)
    _, html, _ = report(tmp_path / "run")
    assert f"The training data of run, {data.path}, is not here: name where it is with --dataset." in Page(html).text


def test_a_dataset_that_moved_is_known_by_its_fingerprint_and_another_is_not_taken_for_it(report, data, tmp_path):
    run = write_run(tmp_path / "run", dataset=data)
    moved = shutil.move(data.path, tmp_path / "moved")
    _, html, _ = report(run, "--dataset", moved)
    assert "pairs with margins from 1 to 2" in html
    other = write_dataset(tmp_path / "other", ["Who?"])
    shutil.move(other.path, data.path)
    _, html, _ = report(run)
    assert "is another one by now" in html
    assert "pairs with margins" not in html


def test_scores_beside_the_data_are_calibrated_and_shown_with_their_critiques(report, data, tmp_path):
    run = write_run(tmp_path / "run", ScalarReward(), dataset=data)
    write_scores(data, [0.0, 1.0, -1.0], "the cat is no cat", model=str(run))
    _, html, _ = report(run)
    page = Page(html)
    (chart,) = [svg["aria-label"] for svg in page.named("svg") if "annotators agree" in svg["aria-label"]]
    # of 0 - 1, 0 + 1 and 1 + 1 the first contradicts the annotators
    assert "18 pairs: right in 66.7%" in chart
    assert "Of 12 pairs at 73.1% annotators agree in 50.0%." in chart
    assert "Of 6 pairs at 88.1% annotators agree in 100.0%." in chart
    assert page.text.count("the cat is no cat") == 18
    assert "It was trained on this data" in page.text
    assert "Where the scores contradict the annotators most" in page.text
    policy = write_run(tmp_path / "policy", MMDPO(), dataset=data)  # beside whose report the judge need not be named
    assert "It was trained on this data" in report(policy)[1]
    shutil.rmtree(run)
    assert "Whether it was trained on this data, of which it would be too sure, is not known" in report(policy)[1]


def test_a_judge_of_a_mixture_saw_its_parts(report, data, tmp_path):
    other = write_dataset(tmp_path / "other", ["Who?"] * 6)
    parts = [{"dataset": str(each.path), "weight": 1} for each in (data, other)]
    (tmp_path / "mixture.json").write_text(json.dumps({"seed": 0, "parts": parts}))
    judge = write_run(tmp_path / "judge", ScalarReward(), dataset=open_dataset(str(tmp_path / "mixture.json")))
    write_scores(data, [0.0, 1.0, -1.0], "the cat is no cat", model=str(judge))
    run = write_run(tmp_path / "policy", MMDPO(), dataset=data)
    assert "It was trained on this data" in report(run)[1]
    stranger = write_run(tmp_path / "stranger", ScalarReward(), dataset=data)
    write_scores(other, [0.0, 1.0, -1.0], "no", model=str(stranger))
    _, html, _ = report(write_run(tmp_path / "elsewhere", MMDPO(), dataset=other))
    assert "trained on this data" not in html


def test_scorings_of_two_datasets_are_told_apart_by_their_titles(report, data, tmp_path):
    other = write_dataset(tmp_path / "other", ["Who?"] * 6)
    for each in (data, other):
        write_scores(each, [0.0, 1.0, 2.0], "")
    _, html, _ = report(write_run(tmp_path / "run", dataset=data), "--dataset", other.path)
    titles = re.findall(r"<figcaption><b>(Behind[^<]*)</b>", html)
    assert [title.rsplit(": ")[-1] for title in titles] == ["other/data", "world/data"]


def test_scores_of_what_the_data_was_before_cost_only_themselves(report, data, tmp_path):
    run = write_run(tmp_path / "run", dataset=data)
    write_scores(data, [0.0, 1.0, 2.0], "")
    other = write_dataset(tmp_path / "other", ["Who?"] * 6)
    shutil.copytree(Path(data.path) / "annotations", Path(other.path) / "annotations")
    status, html, _ = report(run, "--dataset", other.path)
    assert status == 0
    assert "was computed for other content" in Page(html).text
    assert "ECE" in Page(html).text


def test_margins_of_a_reward_model_are_those_it_was_trained_on(report, data, tmp_path):
    write_scores(data, [3.0, 1.0, 0.0], "")
    scores = stored_scores(data, "reward", "")
    run = write_run(tmp_path / "run", dataset=data, margins="reward")
    start = json.loads((run / "start.json").read_text())
    (run / "start.json").write_text(json.dumps({**start, "margins": scores_fingerprint(scores)}))
    _, html, _ = report(run)
    assert "18 pairs with margins from 1 to 3" in html
    (run / "start.json").write_text(json.dumps({**start, "margins": "f" * 64}))
    _, html, _ = report(run)
    assert "are others than those run was trained on" in Page(html).text
    assert "pairs with margins" not in html


def test_scores_of_a_mixture_are_those_of_its_parts(report, data, tmp_path):
    write_scores(data, [3.0, 1.0, 0.0], "fine")
    mixture = tmp_path / "mixture.json"
    mixture.write_text(json.dumps({"parts": [{"dataset": data.path, "weight": 2.0}]}))
    status, html, _ = report(write_run(tmp_path / "run", dataset=open_dataset(mixture)))
    assert status == 0
    assert "36 pairs with margins" in html  # every row twice
    assert html.count("18 pairs: right in 100.0%") == 2  # scored once; said in the remark and in words


def test_eight_runs_are_told_apart_and_laid_over_each_other(report, tmp_path):
    runs = [write_run(tmp_path / f"run{i}", steps=3 + i) for i in range(8)]
    status, html, _ = report(*runs)
    assert status == 0
    (loss,) = [svg["aria-label"] for svg in Page(html).named("svg") if svg["aria-label"].startswith("Loss by step")]
    assert all(f"{key}: from" in loss for key in "ABCDEFGH")


def test_answers_stand_beside_their_picture_with_wrong_claims_marked(report, data, tmp_path):
    before = write_lines(tmp_path / "sft.jsonl", [answer(data, 0, text="a dog", wrong=[[2, 5, "cat"]], claims=1)])
    after = write_lines(tmp_path / "dpo.jsonl", [answer(data, 0, text="a cat", wrong=[], claims=1)])
    run = write_run(tmp_path / "run", dataset=data)
    _, html, _ = report(run, "--answers", f"before={before}", f"after={after}")
    page = Page(html)
    (image,) = page.named("img")
    assert image["src"].startswith("data:image/png;base64,")
    assert image["alt"] == "Picture of the prompt q0: a.png"
    assert '<span class="heard">wrong: </span>dog</mark>' in html
    assert "1 of 1 claims wrong." in page.text
    assert '<th scope="row">before</th><td>100.0%</td>' in html
    assert '<th scope="row">after</th><td>0.0%</td>' in html


def test_pictures_of_a_file_of_prompts_are_shown_too(report, data, tmp_path):
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"id": "q0", "prompt": "What is it?", "image": "a.png"}])
    given = {"id": "q0", "line": 1, "prompt": "What is it?", "responses": [{"text": "a cat"}]}
    answers = write_lines(tmp_path / "answers.jsonl", [given])
    run = write_run(tmp_path / "run")
    _, html, _ = report(run, "--answers", answers)
    assert "--input FILE --media DIR" in Page(html).text
    assert "field wrong of a response does" in Page(html).text
    _, html, _ = report(run, "--answers", answers, "--input", prompts, "--media", tmp_path / "world" / "media")
    assert len(Page(html).named("img")) == 1
    (tmp_path / "empty").mkdir()
    status, _, error = report(run, "--answers", answers, "--input", prompts, "--media", tmp_path / "empty")
    assert status == 1
    assert "prompts.jsonl: 1 of its rows cannot be shown" in error
    assert "prompts.jsonl:1: " in error


def test_numbers_that_are_not_finite_are_gaps_and_are_told(report, tmp_path):
    broken = {5: {"loss": float("nan")}, 6: {"loss": float("inf")}, 9: {"loss": None}}
    _, html, _ = report(write_run(tmp_path / "run", more=broken))
    text = Page(html).text
    assert "3 values are NaN, infinite or beyond 1e100, the first at step 5." in text
    assert "nan" not in re.sub(r"NaN", "", html)


def test_a_number_nobody_drew_before_is_drawn_under_its_own_name(report, tmp_path):
    steps = {step: {"surprise/<i>": step} for step in range(1, 41)}
    _, html, _ = report(write_run(tmp_path / "run", more=steps))
    assert "surprise/&lt;i&gt;" in html
    assert "surprise/<i>" not in html


def test_a_run_that_has_logged_nothing_and_one_killed_within_a_line_are_reported(report, tmp_path):
    run = write_run(tmp_path / "run")
    (run / "complete.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    _, html, _ = report(run)
    assert "not finished: 40 steps logged" in Page(html).text
    for file in ("metrics.jsonl", "evaluation.jsonl"):
        (run / file).unlink()
    _, html, _ = report(run)
    text = Page(html).text
    assert "it has logged no step yet" in text
    assert "--evaluation.share" in text


def test_an_environment_is_shown_where_the_run_recorded_one(report, tmp_path):
    run = write_run(tmp_path / "run")
    start = {"step": 0, "device": "TPU v5e", "devices": 8, "backend": "tpu", "packages": {"jax": "0.10.2"}}
    write_lines(run / "environment.jsonl", [start, {**start, "step": 20}])
    _, html, _ = report(run)
    text = Page(html).text
    assert "8 × TPU v5e (tpu)" in text
    assert "2 times, at steps 0, 20" in text


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics.jsonl", '{"step": 1}\n{"step": 1}\n', "metrics.jsonl:2: step 1 follows step 1"),
        ("metrics.jsonl", '{"step": 1}\n{"step": 2, "loss": "low"}\n', 'metrics.jsonl:2: loss is "low", not a number'),
        ("metrics.jsonl", '{"step": 1, "lo\n{"step": 2}\n', "metrics.jsonl:1: not JSON"),
        ("metrics.jsonl", '{"step": "one"}\n', "metrics.jsonl:1: step 'one'"),
        ("metrics.jsonl", '{"step": 1, "loss": 1' + "0" * 400 + "}\n", "metrics.jsonl:1: loss is too large"),
        ("evaluation.jsonl", "[]\n", "evaluation.jsonl:1: not a JSON object"),
        ("recipe.json", "{", "recipe.json: not JSON"),
        ("recipe.json", '{"objective": "Magic"}', "recipe.json: objective 'Magic'"),
        ("recipe.json", '{"objective": "DPO", "objective.beta": -1}', "recipe.json: objective DPO: DPO: beta"),
        ("metrics.jsonl", b"\xff\n", "metrics.jsonl is not UTF-8"),
    ],
)
def test_a_run_that_is_damaged_is_refused_by_file_and_line(report, tmp_path, file, text, message):
    run = write_run(tmp_path / "run")
    (run / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    status, printed, error = report(run)
    assert (status, printed) == (1, "")
    assert error.startswith(f"error: {run}/{message}")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        ([], 2, "name a RUN"),
        (["run", "run/"], 2, "run is named twice"),
        ([f"run{i}" for i in range(9)], 2, "at most 8"),
        (["run", "--shown", 0], 2, "--shown"),
        (["run", "--media", "m"], 2, "--media is for --input"),
        (["run", "--input", "p"], 2, "--input has the prompts of --answers"),
        (["nowhere"], 1, "nowhere is no RUN: it does not exist"),
        (["."], 1, "has no recipe.json"),
        (["run", "--dataset", "nowhere"], 1, "nowhere does not exist"),
    ],
)
def test_a_command_line_that_cannot_be_followed_is_one_message(report, tmp_path, monkeypatch, more, status, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    found, printed, error = report(*more)
    assert (found, printed) == (status, "")
    assert message in error


def test_only_an_earlier_report_is_replaced(report, tmp_path):
    run = write_run(tmp_path / "run")
    assert report(run)[0] == report(run)[0] == 0
    (tmp_path / "thesis.html").write_text("<html>mine</html>")
    status, _, error = report(run, "--output", tmp_path / "thesis.html")
    assert status == 1
    assert "is no report: choose another --output" in error
    assert (tmp_path / "thesis.html").read_text() == "<html>mine</html>"
    assert report(run, "--output", tmp_path)[0] == 1


def test_runs_and_report_may_lie_in_a_bucket(report, gs, tmp_path):
    for file in write_run(tmp_path / "run").iterdir():
        storage.write_whole(storage.to_path(f"{gs}/run/{file.name}"), file.read_bytes())
    status, html, _ = report(f"{gs}/run", "--output", f"{gs}/report.html")
    assert status == 0
    assert "Reward accuracy by step" in html
    assert report(f"{gs}/run", "--output", f"{gs}/report.html")[0] == 0  # an earlier report is replaced there too


def test_the_program_starts_no_jax_backend(data, tmp_path):
    run = write_run(tmp_path / "run", dataset=data)
    write_scores(data, [0.0, 1.0, 2.0], "fine")
    code = (
        "import runpy, sys; sys.argv[0] = 'report.py'; runpy.run_path('launch/report.py', run_name='__main__');"
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run), "--output", str(tmp_path / "r.html")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wrote {tmp_path / 'r.html'}: 1 run")
    assert json.loads((run / "complete.json").read_text()) == {"steps": 40, "planned": 40}
