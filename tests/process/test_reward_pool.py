"""Reward functions in processes of their own: whatever they do, the actor goes on."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.rewards.pool import RewardFailure, RewardPool
from protocol.config import RewardConfig
from tests.integration.processes import children_of, is_alive, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

LIMIT_S = 1.5
"""A call may take as long: a call that does nothing must not come near it on a busy machine."""
ROW = {"prompt": "2 + 2"}

MISBEHAVING = """
import ctypes, os, re, resource, signal, subprocess, sys, time

def good(completions, **_): return [1.0] * len(completions)
def sleeps(**_): time.sleep(1000)
async def sleeps_async(**_):
    import asyncio
    await asyncio.sleep(1000)
def holds_the_lock(**_): re.match(r"(a+)+$", "a" * 40 + "b")
def ignores_signals(**_):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(1000)
def stops_itself(**_): os.kill(os.getpid(), signal.SIGSTOP)
def exits(**_): os._exit(3)
def exits_well(**_): os._exit(0)
def segfaults(**_): ctypes.string_at(0)
def is_killed(**_): os.kill(os.getpid(), signal.SIGKILL)
def kills_its_guard(**_):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)
def raises(**_): raise KeyError("answer")
def too_short(**_): return []
def too_long(**_): return [1.0] * 10_000_000
def no_number(**_): return [float("nan")]
def eats_memory(**_):
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    return [len(bytearray(1 << 31))]
def writes_into_the_channel(**_):
    for fd in range(3, 20):
        try: os.write(fd, b"\\x04\\0\\0\\0junk")
        except OSError: pass
    return [1.0]

def pids(**_): return [os.getpid()]
def priority(**_): return [int(open("/proc/self/oom_score_adj").read())]
def threads(**_): return [int(os.environ["OMP_NUM_THREADS"])]
def heavy(**_): return [len({"torch", "transformers", "numpy", "pydantic"} & {*sys.modules})]
def prints(**_):
    print("a line of the function")
    os.write(1, b"a line below it\\n")
    subprocess.run(["echo", "a line of its child"])
    return [float(sys.stdin.read() == "")]
def leaves_children(completions, **_):
    child = subprocess.Popen(["sleep", "1000"])
    hidden = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    if (fork := os.fork()) == 0:
        if os.fork() == 0:
            os.setsid()
            with open("pids", "a") as file: print(os.getpid(), file=file)
            time.sleep(1000)
        os._exit(0)
    os.waitpid(fork, 0)
    with open("pids", "a") as file: print(child.pid, hidden.pid, file=file)
    while len(open("pids").read().split()) < 3: time.sleep(0.001)
    if completions == ["hang"]: time.sleep(1000)
    return [1.0]
def returns_twice(**_): return [float(os.fork() == 0)]
"""


@asynccontextmanager
async def make_pool(
    folder: Path, *names: str, source: str = MISBEHAVING, **settings: Any
) -> AsyncIterator[RewardPool]:
    (folder / "my_rewards.py").write_text(source)
    pool = RewardPool(
        [RewardConfig(name=name, function=f"my_rewards:{name}") for name in names],
        allowed_modules=(),
        folder=folder,
        **{"timeout_s": LIMIT_S, "processes": 2, **settings},
    )
    try:
        await pool.start()
        yield pool
    finally:
        await pool.close()


async def call(pool: RewardPool, name: str, completion: str = "a") -> list[float | None]:
    return await pool.call(name, ROW, [completion], [[1]], ["stop"])


async def failure(pool: RewardPool, name: str, completion: str = "a") -> RewardFailure:
    with pytest.raises(RewardFailure) as caught:
        await call(pool, name, completion)
    assert caught.value.reward == name
    return caught.value


def guards() -> list[int]:
    """The processes that pools of this process started; other tests have helpers of their own."""
    return [
        pid
        for pid in children_of(os.getpid())
        if is_alive(pid) and b"rewards.guard" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {*guards()}
    yield
    assert {*guards()} <= before


@pytest.mark.parametrize(
    ("name", "kind", "problem"),
    [
        ("sleeps", "timeout", "took longer than 1.5 s and was killed (my_rewards:sleeps)"),
        ("sleeps_async", "timeout", "took longer than 1.5 s"),
        ("holds_the_lock", "timeout", "took longer than 1.5 s"),
        ("ignores_signals", "timeout", "took longer than 1.5 s"),
        ("stops_itself", "timeout", "took longer than 1.5 s"),
        ("exits", "died", "ended its process: exit code 3 (my_rewards:exits)"),
        ("exits_well", "died", "ended its process: exit code 0"),
        ("segfaults", "died", "ended its process: killed by SIGSEGV"),
        ("is_killed", "died", "ended its process: killed by SIGKILL, maybe for its memory"),
        ("kills_its_guard", "died", "ended its process: killed by SIGKILL"),
        ("raises", "raised", "raised KeyError: 'answer' (my_rewards.py, line "),
        ("eats_memory", "raised", "raised MemoryError"),
        ("too_short", "invalid", "returned a list of 0 instead of a list of 1"),
        ("too_long", "invalid", "returned a list of 10000000 instead of a list of 1"),
        ("no_number", "invalid", "returned nan; return None where"),
        ("writes_into_the_channel", "invalid", "wrote into the channel of its process"),
    ],
)
async def test_a_function_that_misbehaves_fails_its_call_and_no_other(
    tmp_path, name, kind, problem
):
    async with make_pool(tmp_path, name, "good") as pool:
        misbehaving = asyncio.create_task(failure(pool, name))
        started = time.monotonic()
        num_good = 0
        while not misbehaving.done():
            num_good += len(await call(pool, "good"))
        error = await misbehaving
        assert time.monotonic() - started < LIMIT_S + 1
        assert num_good > 0
        assert error.kind == kind
        assert str(error).startswith(f"reward {name!r} {problem}")
        assert await asyncio.gather(*(call(pool, "good") for _ in range(3))) == [[1.0]] * 3


async def test_the_event_loop_is_not_held_up(tmp_path):
    async with make_pool(tmp_path, "holds_the_lock") as pool:
        hanging = asyncio.create_task(failure(pool, "holds_the_lock"))
        longest = 0.0
        while not hanging.done():
            before = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - before)
        await hanging
    assert longest < 0.2


async def test_processes_are_started_when_all_are_busy_and_never_more_than_allowed(tmp_path):
    async with make_pool(tmp_path, "sleeps", "pids", processes=3) as pool:
        before = guards()
        first, second = await call(pool, "pids"), await call(pool, "pids")
        assert first == second
        assert len(before) == 1
        calls = [asyncio.create_task(failure(pool, "sleeps")) for _ in range(5)]
        most = 0
        while not all(done.done() for done in calls):
            most = max(most, len(guards()))
            await asyncio.sleep(0.005)
        assert most == 3
        await asyncio.gather(*calls)


async def test_a_cancelled_call_is_killed_and_gives_its_place_back(tmp_path):
    async with make_pool(tmp_path, "sleeps", "good", processes=1, timeout_s=60) as pool:
        [guard] = guards()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(call(pool, "sleeps"), 0.05)
        assert await call(pool, "good") == [1.0]
        assert not is_alive(guard)


async def test_a_process_that_dies_while_it_is_idle_is_nobodys_failure(tmp_path):
    async with make_pool(tmp_path, "good", "pids") as pool:
        [[worker]] = [await call(pool, "pids")]
        os.kill(int(worker or 0), signal.SIGKILL)
        [guard] = guards()
        while is_alive(guard):
            await asyncio.sleep(0.005)
        # On a busy machine the end of the channel is seen a little after that of the process.
        await asyncio.sleep(0.1)
        assert await call(pool, "good") == [1.0]


async def test_what_functions_print_goes_to_standard_error(tmp_path, capfd):
    async with make_pool(tmp_path, "prints") as pool:
        assert await call(pool, "prints") == [1.0]
    out, err = capfd.readouterr()
    assert out == ""
    for line in ("a line of the function\n", "a line below it\n", "a line of its child\n"):
        assert line in err


async def test_a_fork_that_returns_too_does_not_answer(tmp_path):
    async with make_pool(tmp_path, "returns_twice", processes=1) as pool:
        assert [await call(pool, "returns_twice") for _ in range(3)] == [[0.0]] * 3


async def test_a_process_is_light_single_threaded_and_the_first_to_go_without_memory(tmp_path):
    async with make_pool(tmp_path, "heavy", "threads", "priority") as pool:
        assert await call(pool, "heavy") == [0.0]
        assert await call(pool, "threads") == [1.0]
        assert await call(pool, "priority") == [1000.0]


async def test_a_large_row_and_many_tokens_arrive_whole(tmp_path):
    source = "def f(completion_ids, c, **_): return [len(c[0]) + sum(i) for i in completion_ids]"
    async with make_pool(tmp_path, "f", source=source) as pool:
        ids = [[1] * 4096] * 16
        row = {**ROW, "c": "x" * 1_000_000}
        assert (
            await pool.call("f", row, ["a" * 20_000] * 16, ids, ["stop"] * 16) == [1_004_096.0] * 16
        )


# ---- The end -----------------------------------------------------------------------------------


def left_behind(folder: Path) -> list[int]:
    """Children that `leaves_children` started."""
    path = folder / "pids"
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


async def test_what_a_function_started_dies_with_its_process(tmp_path):
    async with make_pool(tmp_path, "leaves_children") as pool:
        error = await failure(pool, "leaves_children", "hang")
        assert error.kind == "timeout"
    assert len(left_behind(tmp_path)) == 3
    assert not any(map(is_alive, left_behind(tmp_path)))


async def test_closing_takes_less_than_a_second_in_the_middle_of_calls(tmp_path):
    async with make_pool(tmp_path, "leaves_children", "holds_the_lock", timeout_s=60) as pool:
        assert await call(pool, "leaves_children") == [1.0]
        assert all(map(is_alive, left_behind(tmp_path)))
        calls = [asyncio.create_task(failure(pool, "holds_the_lock")) for _ in range(2)]
        while len(guards()) < 2:
            await asyncio.sleep(0.005)
        started = time.monotonic()
        await pool.close()
        assert time.monotonic() - started < 1
        assert guards() == []
        assert {error.kind for error in await asyncio.gather(*calls)} == {"died"}
    assert not any(map(is_alive, left_behind(tmp_path)))


async def test_a_guard_that_does_not_answer_is_killed_with_its_worker(tmp_path):
    async with make_pool(tmp_path, "pids") as pool:
        [worker] = await call(pool, "pids")
        [guard] = guards()
        os.kill(guard, signal.SIGSTOP)
    wait_for(lambda: not is_alive(int(worker or 0)), "the worker's end", 2)


ACTOR = """
import asyncio, pathlib
from tests.process.test_reward_pool import call, make_pool
names = "leaves_children", "holds_the_lock"
async def main():
    async with make_pool(pathlib.Path.cwd(), *names, timeout_s=60) as pool:
        await call(pool, "leaves_children")
        print("ready", flush=True)
        await call(pool, "holds_the_lock")
asyncio.run(main())
"""


def test_nothing_outlives_an_actor_that_is_killed(tmp_path):
    actor = subprocess.Popen(
        [sys.executable, "-c", ACTOR],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
    )
    assert actor.stdout is not None
    assert actor.stdout.readline() == b"ready\n"
    [guard] = children_of(actor.pid)
    [worker] = set(children_of(guard)) - {*left_behind(tmp_path)}
    everything = [guard, worker, *left_behind(tmp_path)]
    assert len(everything) == 5
    assert all(map(is_alive, everything))
    actor.kill()
    actor.wait()
    actor.stdout.close()
    wait_for(lambda: not any(map(is_alive, everything)), "the end of all", 2)


# ---- Imports -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "limit_s", "kind", "problem"),
    [
        (
            "1 / 0",
            30,
            "raised",
            "my_rewards:f does not import: ZeroDivisionError: division by zero",
        ),
        ("import sys; sys.exit(1)", 30, "raised", "my_rewards:f does not import: SystemExit: 1"),
        ("g = 1", 30, "raised", "my_rewards defines no function f"),
        ("import os; os._exit(5)", 30, "died", "the import of reward 'f' ended its process: exit"),
        ("while True: pass", 0.5, "timeout", "the import of reward 'f' took longer than 0.5 s"),
    ],
)
async def test_a_function_that_does_not_import_fails_the_start(
    tmp_path, source, limit_s, kind, problem
):
    with pytest.raises(RewardFailure) as caught:
        async with make_pool(tmp_path, "f", source=source, import_timeout_s=limit_s):
            pass
    assert problem in str(caught.value)
    assert (caught.value.reward, caught.value.kind) == ("f", kind)


async def test_a_slow_import_does_not_count_as_a_slow_call(tmp_path):
    source = "import time; time.sleep(2)\ndef f(**_): return [1.0]"
    async with make_pool(tmp_path, "f", source=source) as pool:
        assert [*await asyncio.gather(call(pool, "f"), call(pool, "f"))] == [[1.0]] * 2
