from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from mmrlhf_jax.command import CommandError, UsageError, one_line, progress_line, run_command


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (CommandError("no luck"), 1),
        (CommandError("no luck", status=75), 75),
        (UsageError("no luck"), 2),
        (ValueError("no luck"), 1),
        (FileNotFoundError("no luck"), 1),
    ],
)
def test_a_failure_is_an_exit_code_and_one_line(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        run_command(raising(error))
    assert left.value.code == status
    assert capsys.readouterr().err == "error: no luck\n"


def test_a_pipe_that_breaks_elsewhere_is_a_failure_like_any_other(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run_command(raising(BrokenPipeError("to a child")))
    assert left.value.code == 1
    assert capfd.readouterr().err == "error: to a child\n"


def test_who_stops_reading_our_output_is_told_nothing() -> None:
    program = "from mmrlhf_jax.command import run_command; run_command(lambda: [print('x' * 99) for _ in range(99999)])"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_the_keyboard_stops_with_75() -> None:
    with pytest.raises(SystemExit) as left:
        run_command(raising(KeyboardInterrupt()))
    assert left.value.code == 75


def test_success_returns_and_a_defect_keeps_its_traceback() -> None:
    run_command(lambda: None)
    with pytest.raises(KeyError):
        run_command(raising(KeyError("defect")))


def test_a_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MMRLHF_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        run_command(raising(ValueError("no luck")))
    assert "Traceback" in capsys.readouterr().err


def test_text_from_data_cannot_steer_the_terminal() -> None:
    assert one_line("a\r\nb\x1b[2J\u202ec\x07\ud800é") == "a b[2Jcé"


def test_a_log_gets_a_line_at_most_every_half_minute(capsys):
    """Standard error is no terminal here: what a terminal would see redrawn ten times a second is
    drawn at both ends."""
    with progress_line(total=400, desc="work") as bar:
        for _ in range(400):
            time.sleep(0.001)
            bar.update()
    drawn = capsys.readouterr().err.split("\r")
    assert len([line for line in drawn if "work" in line]) == 2
    assert "400/400" in drawn[-1]
