"""The engine as a child: started, watched, ended as a whole, restarted with back-off.

The child leads a process group of its own, so that what it started ends with it. Its output is
passed on unchanged and read for the stage it is in. Where the all-reduce of two cards ended it, the
next life has another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import os
import resource
import signal
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from serve.allreduce_tier import Failure, Tiers
from serve.evidence import group_members
from serve.faults import FaultKind, Faults
from serve.http_errors import Refusal
from serve.log import event
from serve.relay import end_quietly
from serve.stages import START_STAGES, WAITING, Lines, Progress, Stage, read_line

PR_SET_PDEATHSIG = 1
READ_BYTES = 2**16
TAIL_LINES = 2000
OUTPUT_S = 5.0  # for what a dead engine printed to be read
LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Limits:
    """When the supervisor gives up, and how long it waits. All in seconds but max_ends."""

    # Unasked ends within window_s, those aside after which a tier was demoted; the last is final.
    max_ends: int = 3
    window_s: float = 900.0
    back_off_s: float = 1.0  # doubled with each end within the window
    max_back_off_s: float = 60.0
    stop_s: float = 10.0  # from TERM to KILL
    die_s: float = 30.0  # from KILL to the end; a process that waits in a driver may not die
    poll_s: float = 0.25
    max_retry_after_s: int = 120


@dataclass(frozen=True)
class End:
    """One unasked end of the engine.

    counts: towards max_ends. in_start: that life was never ready.
    """

    at_unix_s: float
    reason: str
    report: Path | None = None  # what was dumped before it was ended
    counts: bool = True
    in_start: bool = False


@dataclass(frozen=True)
class Stall:
    """Why an engine was ended that made no progress, and where it stood.

    starting: it was not ready. reading: weights, which each rank does by itself.
    """

    reason: str
    starting: bool
    reading: bool


def in_child(parent: int) -> None:
    """Runs in the child of `parent` before it becomes the engine."""
    # The engine must not outlive us, not even when we are killed; it ends its own children on TERM.
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # killed before that: no signal comes
        os._exit(1)
    # A wedged engine is aborted for its stacks; 90 GB of core file are not wanted.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def write_to_stdout(data: bytes) -> None:
    """Pass on the engine's output, all of it."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(1, rest) :]


def signal_group(group: int, number: signal.Signals) -> bool:
    """Signal a process group; whether there was one."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def signal_name(number: int) -> str:
    """Such as SIGKILL; real-time signals have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Supervisor:
    """Runs the engine's command until it is told to stop.

    Args:
        command, environment: of the engine.
        socket_path: where the engine will listen.
        on_ready: called in a thread when a life is ready; what it raises is logged.
        echo: takes the engine's output as it comes, in a thread.
        tiers: of the all-reduce; None: a fault of one is an end as any.
    """

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        socket_path: Path,
        limits: Limits | None = None,
        on_ready: Callable[[], None] = lambda: None,
        echo: Callable[[bytes], object] | None = None,
        faults: Faults | None = None,
        tiers: Tiers | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.socket_path = socket_path
        self.stage, self.progress = Stage.STARTING, None  # type: Stage, Progress | None
        self.stage_since_s = self.life_since_s = time.monotonic()
        self.num_signs = 0  # lines of this life that show progress
        self.ends: list[End] = []
        self.num_lives = 0
        self.failure = ""
        self.pid = 0
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)  # of this life's output
        self.all_read = asyncio.Event()  # the whole of it is in `tail`
        self.dump: Callable[[str], Awaitable[Path | None]] | None = None  # takes the reason
        self._command, self._environment = command, environment
        self._on_ready = on_ready
        self._faults = faults or Faults()
        self._tiers = tiers
        self._echo = echo or write_to_stdout
        self._stop = asyncio.Event()
        self._closing = False  # no new work is to be taken
        self._bar_since_s = self._restart_at_s = 0.0
        self._stalled: asyncio.Future[Stall] | None = None
        self._ready_unix_s, self._ready_life = 0.0, 0  # when an engine last became ready, and which

    @property
    def ready(self) -> bool:
        return self.stage is Stage.READY

    @property
    def starting(self) -> bool:
        """Whether an engine is on its way to be ready."""
        return self.stage in START_STAGES

    @property
    def counting(self) -> bool:
        """Whether the engine is between two steps that it counts: shards, graphs."""
        return self.progress is not None and self.progress.done < self.progress.total

    @property
    def serving(self) -> bool:
        """Whether the engine works on requests, old ones at least."""
        return self.stage in (Stage.READY, Stage.DRAINING)

    def report_stall(self, reason: str) -> None:
        """Ask for the end of an engine that makes no progress; `run` dumps, ends, restarts it."""
        if self._stalled is not None and not self._stalled.done():
            reading = self.stage is Stage.LOADING and self.counting
            self._stalled.set_result(Stall(reason, self.starting, reading))

    def drain(self) -> None:
        """Take no new work from now on."""
        self._closing = True
        if self.stage is Stage.READY:
            self._enter(Stage.DRAINING)

    def stop(self) -> None:
        """End the engine and `run`."""
        self._stop.set()

    def refusal(self) -> Refusal:
        """What a request is told while the engine takes none."""
        if self.stage is Stage.FAILED:
            return Refusal(503, f"the engine failed and is not restarted: {self.failure}")
        if self._closing or self.stage in (Stage.DRAINING, Stage.STOPPED):
            return Refusal(503, "the server is shutting down", 10)
        return Refusal(503, f"the engine is not ready: {self.describe()}", self.retry_after_s())

    def lost(self) -> Refusal:
        """What a request is told that the engine dropped."""
        wait_s = self.retry_after_s() if self.stage is not Stage.FAILED else None
        return Refusal(503, "the engine ended while it worked on this request", wait_s)

    def describe(self) -> str:
        """The stage and its progress in words."""
        if self.progress is None:
            return self.stage.value
        return (
            f"{self.stage.value}, {self.progress.what} {self.progress.done}/{self.progress.total}"
        )

    def retry_after_s(self) -> int:
        """Seconds until asking again makes sense: the rest of the stage at its rate so far."""
        seconds = 5.0
        if self.stage is Stage.RESTARTING:
            seconds += max(0.0, self._restart_at_s - time.monotonic())
        if self.progress and 0 < self.progress.done < self.progress.total:
            spent = time.monotonic() - self._bar_since_s
            seconds = spent / self.progress.done * (self.progress.total - self.progress.done)
        return max(1, min(self.limits.max_retry_after_s, round(seconds)))

    async def run(self) -> None:
        """Keep the engine running; returns after `stop`, with nothing of it left."""
        while not self._stop.is_set():
            reason, report = await self._live()
            if self.pid:
                await self._give_up(f"{reason}; process {self.pid} does not die: reboot")
                break
            if self._stop.is_set():
                break
            stall = self._stalled.result() if self._stalled and self._stalled.done() else None
            kind = FaultKind.ENGINE_STALLED if stall else FaultKind.ENGINE_ENDED
            self._faults.once(kind, reason)
            failure = self._change_tier(stall)
            if failure:
                reason += f"; all-reduce: {failure.said}"
            counts = failure is None or failure.choice is None
            in_start = self._ready_life != self.num_lives
            self.ends.append(End(time.time(), reason, report, counts, in_start))
            since = time.time() - self.limits.window_s
            recent = [end for end in self.ends if end.counts and self._is_recent(end, since)]
            if len(recent) >= self.limits.max_ends:
                within = f"within {self.limits.window_s / 60:.0f} minutes"
                if recent[0].at_unix_s <= since:
                    within = "without a ready engine between them"
                await self._give_up(f"{len(recent)} ends {within}; the last: {reason}")
                break
            wait_s = self.limits.back_off_s * 2 ** max(0, len(recent) - 1)
            wait_s = min(wait_s, self.limits.max_back_off_s)
            self._restart_at_s = time.monotonic() + wait_s
            self._enter(Stage.RESTARTING)
            self.say(f"{reason}; restart in {wait_s:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), wait_s)
        self._enter(Stage.STOPPED)

    async def _give_up(self, why: str) -> None:
        """Start no other engine; returns after `stop`."""
        self.failure = why
        self._enter(Stage.FAILED)
        self._faults.begin(FaultKind.ENGINE_FAILED, why)
        self.say(f"not restarted: {why}")
        await self._stop.wait()

    def _is_recent(self, end: End, since_unix_s: float) -> bool:
        """A start takes minutes to fail, three of them more than the window: until an engine is
        ready again, such an end stays recent.
        """
        return end.at_unix_s > since_unix_s or (end.in_start and end.at_unix_s > self._ready_unix_s)

    def _change_tier(self, stall: Stall | None) -> Failure | None:
        """What the all-reduce had to do with the end; the next life starts with its answer."""
        if self._tiers is None:
            return None
        blamed = stall is not None and not stall.reading
        failure = self._tiers.all_reduce.after_end(
            self.tail, stall.reason if blamed else "", blamed and stall.starting
        )
        if failure:
            self._faults.once(FaultKind.ALL_REDUCE_FAILED, failure.said)
        if failure and failure.choice:
            self._command, self._environment = self._tiers.start(failure.choice)
        return failure

    async def _live(self) -> tuple[str, Path | None]:
        """One life of the engine. Returns why it ended, and a report when it was ended for that."""
        self.num_lives += 1
        self.life_since_s = time.monotonic()
        self._enter(Stage.STARTING)
        self.socket_path.unlink(missing_ok=True)
        self._stalled = asyncio.get_running_loop().create_future()
        self.tail, self.num_signs = deque(maxlen=TAIL_LINES), 0
        self.all_read = asyncio.Event()
        process = await self._spawn()
        self.pid = process.pid
        ended = asyncio.create_task(process.wait())
        stopping = asyncio.create_task(self._stop.wait())
        probe = asyncio.create_task(self._wait_until_ready())
        report = None
        try:
            await asyncio.wait(
                (ended, stopping, self._stalled), return_when=asyncio.FIRST_COMPLETED
            )
            probe.cancel()  # before anything else: what is to end must not become ready
            if ended.done():
                self._enter(Stage.RESTARTING)
                number = process.returncode
                reason = f"the engine ended with exit status {number}"
                if number < 0:
                    reason = f"the engine was ended by {signal_name(-number)}"
            elif stopping.done():
                reason = "stopped"
                await self._end_gently(process, ended)
            else:
                reason = self._stalled.result().reason
                self._enter(Stage.RESTARTING)
                self.say(f"{reason}; it is ended")
                report = await self._dump(reason)
        finally:
            signal_group(process.pid, signal.SIGKILL)  # also what a dead leader left behind
            await asyncio.wait((ended, probe), timeout=self.limits.die_s)
            if ended.done():
                self.pid = 0
                await self._until_group_ended(process.pid)
            else:
                ended.cancel()
            # With a limit: a process outside the group may hold the output open.
            reading = asyncio.create_task(self.all_read.wait())
            await asyncio.wait(
                (reading, stopping), timeout=OUTPUT_S, return_when=asyncio.FIRST_COMPLETED
            )
            await end_quietly(reading)
            await end_quietly(stopping)
        return reason, report

    async def _until_group_ended(self, group: int) -> None:
        """Wait for what the leader left: it holds the memory that the next life needs."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.limits.die_s):
                while group_members(group):
                    await asyncio.sleep(self.limits.poll_s)

    async def _dump(self, reason: str) -> Path | None:
        """What is known of an engine that is to end; that it cannot be had stops nothing."""
        if self.dump is None:
            return None
        try:
            return await self.dump(reason)
        except Exception as error:  # noqa: BLE001 (whatever it is, the engine must be ended)
            self.say(f"nothing was learnt of the stalled engine: {error!r}")
            return None

    async def _spawn(self) -> asyncio.subprocess.Process:
        """The engine's process; `all_read` is set when all of its output is in `tail`."""
        read_end, write_end = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                env=self._environment,
                start_new_session=True,
                preexec_fn=functools.partial(in_child, os.getpid()),
            )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        # In a thread: where our own output is blocked, only the engine's waits, not the gateway.
        arguments = (read_end, asyncio.get_running_loop(), self.tail, self.all_read)
        threading.Thread(target=self._pump, args=arguments, daemon=True).start()
        return process

    def _pump(
        self,
        read_end: int,
        loop: asyncio.AbstractEventLoop,
        tail: deque[str],
        all_read: asyncio.Event,
    ) -> None:
        lines = Lines()
        with open(read_end, "rb", buffering=0) as output:  # noqa: PTH123 (a descriptor)
            while data := output.read(READ_BYTES):
                with contextlib.suppress(OSError):
                    self._echo(data)
                if whole := lines.feed(data):
                    with contextlib.suppress(RuntimeError):  # the loop is closed
                        loop.call_soon_threadsafe(self._read, whole, tail)
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(all_read.set)

    def _read(self, lines: list[str], tail: deque[str]) -> None:
        tail.extend(lines)
        if tail is not self.tail:  # of an earlier life: it says nothing of this one's stage
            return
        for line in lines:
            self.num_signs += WAITING not in line
            if self.stage in (Stage.READY, Stage.DRAINING, Stage.RESTARTING, Stage.FAILED):
                continue
            if seen := read_line(line):
                stage, progress = seen
                self._enter(stage, progress)

    def _enter(self, stage: Stage, progress: Progress | None = None) -> None:
        now = time.monotonic()
        if stage is not self.stage:
            self.stage_since_s = self._bar_since_s = now
        elif progress and self.progress and progress.done < self.progress.done:
            self._bar_since_s = now  # another bar of the same stage
        self.stage, self.progress = stage, progress

    async def _wait_until_ready(self) -> None:
        connector = aiohttp.UnixConnector(str(self.socket_path), force_close=True)
        timeout = aiohttp.ClientTimeout(total=5)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                    async with session.get("http://engine/health") as response:
                        if response.status == 200:
                            break
                await asyncio.sleep(self.limits.poll_s)
        if self._closing or (self._stalled and self._stalled.done()):
            return  # it is to end
        self._enter(Stage.READY)
        self._ready_unix_s, self._ready_life = time.time(), self.num_lives
        # In a thread that nobody waits for: it may write where nobody reads.
        threading.Thread(target=self._tell_ready, daemon=True).start()

    def _tell_ready(self) -> None:
        try:
            self._on_ready()
        except Exception as error:  # noqa: BLE001 (the engine serves all the same)
            self.say(f"after it became ready: {error!r}")

    async def _end_gently(
        self, process: asyncio.subprocess.Process, ended: asyncio.Task[int]
    ) -> None:
        """TERM to the leader, which ends its children, and time for it; `_live` kills the rest."""
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await asyncio.wait((ended,), timeout=self.limits.stop_s)

    def say(self, text: str) -> None:
        """Tell the log."""
        event("engine", text, stage=self.stage.value, life=self.num_lives)
