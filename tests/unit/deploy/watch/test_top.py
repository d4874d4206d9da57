"""`gdpo top`: what it shows of a learner's status, and what it makes of one that is not there."""

import copy
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any, cast

import pytest
from rich.console import Console

from deploy.cli import main
from deploy.watch.http import MAX_ANSWER_BYTES
from deploy.watch.status import TIMEOUT_S, read_status
from deploy.watch.top import Answer, Questions, View, Watched, watch
from deploy.watch.top_picture import Picture
from protocol.errors import BadMessage, ConfigError, PeerLost
from tests.unit.record_examples import SUMMARY
from tests.unit.status_examples import (
    ACTORS,
    EARLY,
    WATCHED,
    WEIGHTS,
    StatusServer,
    status_servers,
)

ROOT = Path(__file__).parents[4]
GONE = PeerLost("nothing answers at http://127.0.0.1:9400/status: Connection refused")


def text_of(status: dict[str, Any], *, width: int = 100, **options: Any) -> str:
    console = Console(file=(file := io.StringIO()), width=width)
    console.print(Picture(read_status(status), **options))
    return file.getvalue()


def rows_of(text: str, title: str) -> list[str]:
    """The lines of a panel, without its frame and its head."""
    lines = iter(text.splitlines())
    next(line for line in lines if f" {title}" in line and line.startswith("╭"))
    rows: list[str] = []
    for line in lines:
        if line.startswith("╰"):
            return rows[1:]
        rows.append(line.strip("│ "))
    raise AssertionError(text)


# ---- The picture -------------------------------------------------------------------------------

SHOWN = """
╭────────────────────────────────────────── gdpo · tiny ───────────────────────────────────────────╮
│ phase        training                                                                            │
│ step         40 of 100, 1:02:05 left                                                             │
│              ━━━━━━━━━━━━━━━━                                                                    │
│ format       0.512                                                                               │
│ correctness  -0.250                                                                              │
│ tokens       12,346 generated, 999 trained a second                                              │
│ staleness    0.8 on average, 2 at most (limit 2)                                                 │
│ length       1,234.6 tokens on average, 3 to 2,048; 6.2% cut off                                 │
│ policy       entropy 0.988, learning rate 2.5e-06                                                │
│ dead groups  12.5%, without any signal                                                           │
│ heldout      version 20: format 0.750, correctness -                                             │
│ greedy       version 20: format 1.000, correctness 0.500, pass@1 0.625                           │
│ evaluating   version 40: 12 of 256 prompts                                                       │
│ buffer       17 groups, 1.5 MB (a batch takes 32)                                                │
│ actors       3 live, 3 would do                                                                  │
│ idle         actors 5%, learner 40%                                                              │
│ bottleneck   the actors (the learner waits for groups: add actors)                               │
╰──────────────────────────────────────────────────────────────────────────────────────────────────╯
╭───────────────────────────────────────────── actors ─────────────────────────────────────────────╮
│ actor host             version behind route      leases groups idle stalled silent               │
│     1 gpu1                  40      0 collective      8    612   5%      1% 100 ms               │
│     6 gpu7.example.org      36      4 stream          2      9  50%     25%  3.2 s               │
│     7 gpu8                none                        0      0              200 ms               │
╰──────────────────────────────────────────────────────────────────────────────────────────────────╯
╭──────────────────────────────────────────── weights ─────────────────────────────────────────────╮
│ backend   gloo                                                                                   │
│ epoch     7: actors 1-4, 9, since version 34                                                     │
│ pushes    40, of 1.2 MB each, every step                                                         │
│ streamed  123.5 kB for 400.0 kB of weights, in 0.3% of the learner's time                        │
│ evicted   3 late, 2 gone                                                                         │
╰──────────────────────────────────────────────────────────────────────────────────────────────────╯
╭────────────────────────────────────────── last pushes ───────────────────────────────────────────╮
│ version epoch routes                   took  pack join broadcast confirm evicted  behind         │
│      40     7 3 collective           210 ms 10 ms         100 ms  100 ms                         │
│      39     7 3 collective, 1 stream  2.2 s 10 ms 0 ms     2.1 s  100 ms 4 silent 6-7            │
╰──────────────────────────────────────────────────────────────────────────────────────────────────╯
╭───────────────────────────────────────────── epochs ─────────────────────────────────────────────╮
│ epoch backend members since version pushes formed in ended                                       │
│     7 gloo    1-4, 9             34      6     1.2 s                                             │
│     6 gloo    1, 4-5             20     14     30 ms actor 5 late                                │
╰──────────────────────────────────────────────────────────────────────────────────────────────────╯
"""


def test_a_run_with_its_actors_and_weights_looks_like_this():
    assert text_of(WATCHED) == SHOWN.lstrip("\n")


def test_before_the_first_step_nothing_is_made_up():
    nothing_yet = {"pushes": 0, "epochs": [], "last_pushes": [], "evictions": {}}
    text = text_of(EARLY | {"weights": WEIGHTS | nothing_yet | {"stream_bytes": 0}})
    assert "0, of 1.2 MB each, every step" in text
    assert "streamed  nothing" in text
    assert "evicted   nobody" in text
    for unknown in ("None", "last pushes", "epoch", "staleness"):
        assert unknown not in text


def test_an_epoch_that_has_ended_says_why():
    ended = [WEIGHTS["epochs"][0]]
    text = text_of(WATCHED | {"weights": WEIGHTS | {"epochs": ended, "push_every": 4}})
    assert "none; the last one, 6, ended: actor 5 late" in text
    assert "every 4 steps" in text


def test_an_actor_that_is_behind_because_it_evaluates_is_marked():
    actors = [ACTORS[0], ACTORS[1] | {"evaluates": True}]
    assert "4, evaluates" in text_of(WATCHED | {"actors": actors})


def test_an_actor_that_is_ahead_of_the_status_is_not_behind():
    actors = [ACTORS[0] | {"version": 41}]
    [row] = rows_of(text_of(WATCHED | {"actors": actors}), "actors")
    assert row.split() == [
        "1",
        "gpu1",
        "41",
        "0",
        "collective",
        "8",
        "612",
        "5%",
        "1%",
        "100",
        "ms",
    ]


def test_on_a_screen_the_actors_that_have_no_room_are_those_that_are_not_behind():
    actors = [ACTORS[0] | {"number": n, "version": n % 40} for n in range(64)]
    text = text_of(WATCHED | {"actors": actors}, height=50)
    assert len(text.splitlines()) <= 50
    rows = rows_of(text, "actors: the")
    assert f"the {len(rows)} furthest behind of 64" in text
    # Versions 0, 0, 1, 1, 2, 2 ... of actors 0, 40, 1, 41, 2, 42 ...
    half = len(rows) // 2
    numbers = [int(row.split()[0]) for row in rows]
    assert numbers == [*range(len(rows) - half), *range(40, 40 + half)]


def test_on_a_screen_the_newest_pushes_and_epochs_stay():
    pushes = [WEIGHTS["last_pushes"][1] | {"version": n} for n in range(20)]
    epochs = [WEIGHTS["epochs"][1] | {"epoch": n} for n in range(20)]
    status = WATCHED | {"weights": WEIGHTS | {"last_pushes": pushes, "epochs": epochs}}
    everything, some = text_of(status), text_of(status, height=50)
    for title in ("last pushes", "epochs"):
        assert len(rows_of(everything, title)) == 20
        rows = rows_of(some, title)
        assert 2 <= len(rows) < 20
        assert [int(row.split()[0]) for row in rows] == list(range(19, 19 - len(rows), -1))


@pytest.mark.parametrize("height", [1, 10, 24])
def test_on_a_low_screen_every_table_has_two_rows_still(height):
    weights = {name: WEIGHTS[name] * 5 for name in ("last_pushes", "epochs")}
    status = WATCHED | {"actors": ACTORS * 5, "weights": WEIGHTS | weights}
    text = text_of(status, height=height)
    for title in ("actors: the 2 furthest", "last pushes", "epochs"):
        assert len(rows_of(text, title)) == 2


def test_a_narrow_terminal_cuts_words_and_no_numbers():
    text = text_of(WATCHED, width=80)
    _, far, _ = rows_of(text, "actors")
    assert far.split() == [
        "6",
        "gpu7.exam…",
        "36",
        "4",
        "stream",
        "2",
        "9",
        "50%",
        "25%",
        "3.2",
        "s",
    ]
    assert rows_of(text, "last pushes")[1].split()[:6] == ["39", "7", "3", "collect…", "2.2", "s"]


def test_on_the_narrowest_terminal_a_row_is_a_line_still():
    assert len(rows_of(text_of(WATCHED, width=20), "actors")) == len(ACTORS)


# ---- What answers may be anything --------------------------------------------------------------

ODD: tuple[Any, ...] = (
    None,
    "",
    "[red]\x1b[2J:smile:[/]",
    -2,
    2**63,
    10**400,
    float("nan"),
    float("inf"),
    -1e308,
)
ODD += (1e308, True, [], {}, [[]], {"[/]\n": "\x9b"}, [{}], "x" * 10_000, "\ud800")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of everything within."""
    yield path
    inner: Any = value.items() if isinstance(value, dict) else ()
    for key, part in enumerate(value) if isinstance(value, list) else inner:
        yield from places(part, (*path, key))


def with_odd(path: tuple[Any, ...], odd: Any) -> Any:
    if not path:
        return odd
    status = copy.deepcopy(WATCHED)
    part: Any = status
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = odd
    return status


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:20])
def test_an_odd_value_anywhere_is_refused_or_shown_and_never_obeyed(odd):
    shown = 0
    for path in places(WATCHED):
        try:
            status = read_status(with_odd(path, odd))
        except BadMessage as error:
            assert str(error).isprintable()
            continue
        file = io.StringIO()
        console = Console(file=file, width=300, force_terminal=True, color_system=None)
        console.print(Picture(status, height=60))
        text = file.getvalue()
        assert all(line.isprintable() for line in text.splitlines()), path
        shown += 1
    # Those that nobody reads, if none else.
    assert shown >= len(ACTORS)


@pytest.mark.parametrize("field", sorted(EARLY))
def test_a_status_that_lacks_a_field_is_none(field):
    with pytest.raises(BadMessage, match=f"no status of a learner: {field}: Field required"):
        read_status({name: value for name, value in EARLY.items() if name != field})


@pytest.mark.parametrize("step", ["40", True, 40.0])
def test_what_only_looks_like_a_number_is_none(step):
    with pytest.raises(BadMessage, match="step: Input should be a valid integer"):
        read_status(WATCHED | {"step": step})


def test_a_name_from_the_network_is_no_markup():
    status = WATCHED | {"run": "[red]a", "actors": [ACTORS[0] | {"host": "[blink]:smile:\x1b[2J"}]}
    text = text_of(status)
    assert "gdpo · [red]a" in text
    assert r"[blink]:smile:\x1b[2J" in text


@pytest.fixture
def start() -> Iterator[Callable[..., StatusServer]]:
    with status_servers() as start:
        yield start


@pytest.mark.parametrize(
    ("body", "code", "problem"),
    [
        (b"", 200, "something else answers"),
        (b"<html>", 200, "something else answers"),
        (b"[]", 200, "something else answers"),
        (b'{"run": "\xff"}', 200, "something else answers"),
        (b"[" * 100_000, 200, "something else answers"),
        (b"9" * 10_000, 200, "something else answers"),
        (b" " * (MAX_ANSWER_BYTES + 1), 200, "something else answers"),
        (b"{}", 200, "no status of a learner: run: Field required"),
        (b"not here", 404, "answers 404"),
        (b'{"error": "\\u001b[2J"}', 503, r"\x1b[2J"),
        (b"[" * 100_000, 500, "answers 500"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_strange_answer_is_one_line(start, capsys, body, code, problem):
    learner = start(body, code)
    assert main(["top", learner.address, "--once"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = printed.err.splitlines()
    assert line.startswith("gdpo: error: no learner to watch: ")
    assert problem in line


def test_an_answer_that_never_ends_is_none(capsys, monkeypatch):
    monkeypatch.setattr("deploy.watch.top.FIRST_ANSWER_S", 0.1)
    never = Event()
    monkeypatch.setattr("deploy.watch.top.fetch_status", lambda address: never.wait(20))
    assert main(["top"]) == 2
    never.set()
    assert capsys.readouterr().err == ("gdpo: error: no learner to watch: no answer in 0.1 s\n")


def test_an_error_of_ours_keeps_its_stack_trace(monkeypatch):
    monkeypatch.setattr("deploy.watch.top.fetch_status", lambda address: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["top"])


# ---- Which learner -----------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["", "/", "/metrics", "/status"])
def test_without_a_terminal_it_is_printed_once(start, capsys, monkeypatch, page):
    monkeypatch.setenv("COLUMNS", "100")
    learner = start()
    assert main(["top", learner.address + page]) == 0
    assert capsys.readouterr().out == text_of(WATCHED)
    assert learner.paths == ["/status"]


def test_no_learner_at_an_address_is_an_error_of_the_user(start, capsys):
    learner = start()
    learner.close()
    assert main(["top", learner.address]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"gdpo: error: no learner to watch: nothing answers at {learner.address}"
    )


def make_folder(path: Path, address: str, *, name: str = "tiny") -> Path:
    folder = path / name
    folder.mkdir()
    endpoints = {"learner": "tcp://127.0.0.1:5555", "metrics": f"{address}/metrics"}
    (folder / "endpoints.json").write_text(json.dumps(endpoints))
    return folder


def test_a_run_folder_knows_its_learner(start, tmp_path, capsys):
    folder = make_folder(tmp_path, start().address)
    (tmp_path / "latest").symlink_to(folder)
    for path in (folder, tmp_path / "latest"):
        assert main(["top", str(path)]) == 0
        assert "gdpo · tiny" in capsys.readouterr().out


def test_another_run_at_the_address_of_a_lost_learner_is_not_taken_for_it(start, tmp_path, capsys):
    learner = start()
    folder = make_folder(tmp_path, learner.address, name="lost")
    assert main(["top", str(folder)]) == 2
    assert (
        f"the learner of {folder} is gone; where it was is that of the run tiny, "
        f"see gdpo top {learner.address}"
    ) in capsys.readouterr().err


def test_a_folder_of_a_run_that_is_over_says_how_it_ended(start, tmp_path, capsys):
    learner = start()
    learner.close()
    folder = make_folder(tmp_path, learner.address)
    (folder / "summary.json").write_text(
        json.dumps(SUMMARY | {"ended_because": "all steps done\x1b"})
    )
    assert main(["top", str(folder)]) == 2
    assert capsys.readouterr().err == (
        f"gdpo: error: the run in {folder} is over: all steps done\\x1b\n"
    )


@pytest.mark.parametrize(
    ("endpoints", "problem"),
    [
        (None, "No such file or directory; is it a run folder, and its learner up?"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "is damaged"),
        ('{"learner": "tcp://h:1", "metrics": 1}', "is damaged"),
        ('{"learner": "tcp://h:1", "metrics": "file:///etc/passwd"}', "is damaged"),
        ('{"learner": "tcp://h:1", "metrics": "\xff"}', "is damaged"),
    ],
)
def test_a_folder_without_an_address_is_an_error_of_the_user(tmp_path, capsys, endpoints, problem):
    if endpoints is not None:
        (tmp_path / "endpoints.json").write_bytes(endpoints.encode("latin-1"))
    assert main(["top", str(tmp_path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert problem in line


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf", "soon"])
def test_an_interval_that_is_none_is_refused(capsys, interval):
    with pytest.raises(SystemExit) as caught:
        main(["top", "--interval", interval])
    assert caught.value.code == 2
    assert "--interval" in capsys.readouterr().err


# ---- Watching ----------------------------------------------------------------------------------


class Script:
    """Answers in this order; then the user presses Ctrl-C."""

    def __init__(self, *answers: dict[str, Any] | Exception | None) -> None:
        self._answers = list(answers)

    def next(self, timeout_s: float) -> Answer | None:
        if not self._answers:
            raise KeyboardInterrupt
        answer = self._answers.pop(0)
        return read_status(answer) if isinstance(answer, dict) else answer


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def play(
    *answers: dict[str, Any] | Exception | None, target: str = "http://h:1"
) -> tuple[str, str]:
    """What is on the terminal in the course of a script, and how it ended."""
    file = io.StringIO()
    console = Console(file=file, width=100, height=60, force_terminal=True, color_system=None)
    view = View(read_status(WATCHED), interval_s=1.0, clock=Clock())
    questions = cast(Questions, Script(*answers))
    return watch(view, questions, Watched(target), console), file.getvalue()


def test_each_answer_is_drawn():
    _, drawn = play(WATCHED | {"step": 41}, WATCHED | {"step": 42})
    for step in (40, 41, 42):
        assert f"{step} of 100" in drawn


def test_a_learner_that_goes_away_stays_on_the_screen_until_it_is_back():
    ended, drawn = play(GONE, GONE, WATCHED | {"step": 41})
    assert ended == ""
    _, first, second, third = drawn.split("\x1b[H")[2:]
    # The clock goes on by a second at every look.
    assert "no answer for 2 s: nothing answers at http://127.0.0.1:9400/status" in first
    assert "40 of 100" in first
    assert "no answer for 3 s" in second
    assert "no answer" not in third
    assert "41 of 100" in third


def test_the_time_without_an_answer_begins_with_the_last_one():
    clock = Clock()
    view = View(read_status(WATCHED), interval_s=1.0, clock=clock)
    clock.now += 100
    view.note(read_status(WATCHED))
    view.note(GONE)
    assert view.draw().note.startswith("no answer for 1 s: ")


def test_an_error_of_ours_ends_the_view_with_its_stack_trace():
    with pytest.raises(ZeroDivisionError):
        play(ZeroDivisionError())


def test_what_is_drawn_is_as_high_as_the_terminal():
    _, drawn = play(WATCHED | {"actors": ACTORS * 20})
    assert "furthest behind of 60" in drawn


def test_an_answer_that_takes_long_is_told_of_when_it_is_late():
    clock = Clock()
    view = View(read_status(WATCHED), interval_s=1.0, clock=clock)
    clock.now += 1.0 + 2 * TIMEOUT_S - 1
    assert view.draw().note == ""
    assert view.draw().note == "no answer for 6 s"


@pytest.mark.parametrize(
    "last",
    [
        {"phase": "saving"},
        {"phase": "leaving, waiting for an actor"},
        {"phase": "evaluating after", "step": 100},
    ],
)
def test_a_learner_that_was_at_the_end_is_not_waited_for(last):
    ended, _ = play(WATCHED | last, GONE)
    assert ended == f"The learner has left, after step {last.get('step', 40)} of 100."


def test_a_learner_that_is_leaving_is_shown_as_long_as_it_answers():
    ended, drawn = play(WATCHED | {"phase": "leaving"}, None, WATCHED | {"phase": "leaving"})
    assert ended == ""
    assert "leaving" in drawn


def test_a_run_whose_folder_has_a_summary_is_over(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY | {"ended_because": "SIGTERM"}))
    assert play(GONE, target=str(tmp_path))[0] == "The run is over: SIGTERM"


def test_a_run_that_is_resumed_at_another_address_is_found_again(start, tmp_path):
    folder = make_folder(tmp_path, start().address)
    target = Watched(str(folder))
    assert target.fetch().step == 40
    (folder / "endpoints.json").unlink()
    with pytest.raises(ConfigError):
        target.fetch()
    resumed = start(WATCHED | {"step": 50})
    endpoints = {"learner": "tcp://127.0.0.1:5556", "metrics": f"{resumed.address}/metrics"}
    (folder / "endpoints.json").write_text(json.dumps(endpoints))
    assert target.fetch().step == 50
