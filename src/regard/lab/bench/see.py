"""What watching attention costs, against the fused model, the eager route and a peer."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from regard.errors import InputError, nearest
from regard.zoo.options import Loading

from . import record
from .page import page, table
from .peers import PEERS
from .record import Cell, Result, resume
from .verdicts import TARGETS, judge, key_of

__all__ = ["run", "plan", "table", "page", "judge", "Step"]

GIB = 2**30
MAIN = "received + entropy"  # the row that the targets are about
Job = dict[str, Any]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Step:
    """One cell to measure: a row of the table at one length.

    `job["logits"]` is "all" (the whole forward) or "last" (only the last position's, so that the
    vocabulary matrix hides nothing); `pairs` is how often row and plain model are timed in turn, 0
    for memory alone; `shared` cells of one length use the same two processes, one after the other.
    """

    key: str
    job: Job
    pairs: int = 0
    peer: str | None = None
    shared: bool = False


def rows(facts: Sequence[str] | None = None) -> dict[str, Job]:
    """Rows of the table that run the model under regard: name -> job.

    >>> list(rows(["received", "entropy"]))
    ['received', 'received + entropy', 'all facts', 'entropy']
    """
    names = _facts(facts)
    groups = {
        "received": ["received"],
        "received + entropy": ["received", "entropy"],
        "all facts": names,
    }
    groups |= {name: [name] for name in names if name != "received"}
    return {row: {"do": "forward", "route": "watch", "facts": f} for row, f in groups.items()}


def plan(
    lengths: Sequence[int],
    *,
    facts: Sequence[str] | None = None,
    repeats: int = 3,
    peer: str | None = None,
    growth: Sequence[int] | None = None,
    kernel: bool = True,
) -> list[Step]:
    """The cells of a run, those that decide the targets first.

    >>> [s.key for s in plan([64], facts=["entropy"], kernel=False)][:3]
    ['64/all/plain', '64/all/received + entropy', '64/all/eager']
    """
    steps: list[Step] = []
    jobs = rows(facts)
    if kernel:
        steps += [
            Step(f"{n}/kernel", {"do": "kernel", "tokens": n, "facts": _facts(facts)})
            for n in lengths
            if n >= 2048 or max(lengths) < 2048
        ]
    middle = [n for n in lengths if n == 4096]
    ordered = [*middle, *sorted(n for n in lengths if n not in middle)]
    plain = {"do": "forward", "route": "plain"}
    usual = {
        "eager": {"do": "forward", "route": "eager"},
        "eager, layer by layer": {"do": "forward", "route": "eager_lean"},
    }
    if peer:
        usual[peer] = {"do": "forward", "route": "peer", "peer": peer}

    def add(
        n: int, row: str, job: Job, pairs: int, logits: str = "all", shared: bool = False
    ) -> None:
        full = {**job, "tokens": n, "logits": logits}
        steps.append(Step(key_of(n, row, logits), full, pairs, job.get("peer"), shared))

    for n in ordered:
        add(n, "plain", plain, 0, shared=True)
        # the row and length that targets are about: enough pairs for a median on a busy machine
        add(n, MAIN, jobs[MAIN], 2 * repeats + 1 if n == 4096 else repeats, shared=True)
        if n == (middle or [max(lengths)])[0]:
            for row, job in usual.items():
                add(n, row, job, repeats)
    for n in sorted(growth if growth is not None else lengths):
        add(n, "plain", plain, 0, "last", True)
        add(n, MAIN, jobs[MAIN], repeats if n == 4096 else 0, "last", True)
    have = {s.key for s in steps}
    for n in sorted(lengths):
        for row, job in usual.items():
            if key_of(n, row) not in have:
                add(n, row, job, repeats)
    for n in sorted(lengths):
        for row, job in jobs.items():
            if row != MAIN:
                add(n, row, job, 1 if n >= 4096 else repeats, shared=True)
    return steps


def run(
    lengths: Sequence[int] = (1024, 2048, 4096, 8192),
    model: str | os.PathLike[str] = "smollm2-135m",
    *,
    facts: Sequence[str] | None = None,
    repeats: int = 3,
    loading: Loading | None = None,
    out: str | Path | None = None,
    peer: str | None = None,
    peer_python: str | None = None,
    memory_limit: int = 8 * GIB,
    growth: Sequence[int] | None = None,
    kernel: bool = True,
    threads: int | None = None,
    seed: int = 0,
    patience: float = 60.0,
    pair_seconds: float = 60.0,
    timeout: float = 1200.0,
    spare: int = GIB,
    progress: Progress | None = record.show_progress,
) -> Result:
    """Measure every row at every length, memory and time in processes apart; returns the result.

    Args:
        lengths: tokens of the input.
        model: a name of `regard.models()`, a checkpoint folder or a hub id.
        facts: what "all facts" and the single-fact rows hold; all that need no settings when None.
        loading: dtype and revision of the model, on the CPU.
        repeats: pairs (plain, row) timed in turn; fewer where three would take over `pair_seconds`.
        out: JSON file, written after every cell; a run of the same settings goes on there.
        peer, peer_python: "nnsight" or "transformer_lens", and the Python that has it installed.
        memory_limit: bytes; the table says which lengths fit.
        growth: lengths for the memory fit (last logits only); `lengths` when None.
        kernel: also time attention calls on random tensors from 2k on.
        patience: seconds to wait before a cell while other processes keep the machine busy.
        timeout: seconds after which a cell is stopped and recorded as timed out.
        spare: bytes of memory the machine keeps: a cell that takes them is stopped and recorded.

    Raises:
        InputError: a length, fact, peer or file that cannot be used.
    """
    lengths = sorted({int(n) for n in lengths})
    growth = None if growth is None else sorted({int(n) for n in growth})
    if not lengths or min([*lengths, *(growth or [])]) < 16:
        raise InputError("lengths are in tokens and at least 16, for example 1024")
    if repeats < 1:
        raise InputError("repeats is at least 1")
    if peer is not None and peer not in PEERS:
        raise InputError(f"unknown peer {peer!r}.{nearest(peer, PEERS)}")
    if peer_python is not None:
        if peer is None:
            raise InputError("--peer-python is the Python of a peer library: name it with --peer")
        if not os.access(peer_python, os.X_OK) or os.path.isdir(peer_python):
            raise InputError(f"--peer-python is a program that runs, and {peer_python} is none")
    if not isinstance(model, (str, os.PathLike)):
        raise InputError("the model is loaded in processes apart: pass its name or folder")
    loading = loading or Loading()
    if loading.device not in (None, "cpu") or loading.device_map:
        raise InputError(
            "memory is counted from the process, on the CPU: write --device cpu, no --device-map"
        )
    chosen = {n: getattr(loading, n) for n in ("revision", "trust_remote_code", "allow_pickle")}
    chosen["dtype"] = loading.dtype or "float32"
    _needs_psutil()
    threads = threads or _cores()
    result = resume(
        out,
        Result(
            "see",
            {
                "model": Path(model).name,
                "repeats": repeats,
                "seed": seed,
                "dtype": chosen["dtype"],
                "facts": _facts(facts),
                "memory_limit": memory_limit,
            },
            record.environment(threads),
            [dict(t) for t in TARGETS],
        ),
        __name__,
        f"{__package__}.worker",
    )
    steps = plan(lengths, facts=facts, repeats=repeats, peer=peer, growth=growth, kernel=kernel)
    longest = max([*lengths, *(growth or [])])
    say = progress or (lambda line: None)
    with tempfile.TemporaryDirectory(prefix="regard-bench-") as folder:
        runner = _Runner(
            os.fspath(model), chosen, threads, seed, peer_python, timeout, spare, Path(folder)
        )
        todo = [s for s in steps if not result.settled(s.key)]
        if len(todo) < len(steps):
            say(f"{len(steps) - len(todo)} of {len(steps)} cells are there already")
        if todo:
            runner.describe(result, longest)
            result.save(out)  # settings and targets stand in the file before the first number
        with contextlib.closing(runner):
            for number, step in enumerate(todo, 1):
                busy = _wait_for_calm(patience)
                cell = runner.measure(step, pair_seconds, result)
                cell.values["others_busy"] = round(busy, 3)
                result.cells[step.key] = cell
                result.save(out)
                say(f"[{number}/{len(todo)}] {step.key}: {_short(cell)}")
    return result


class _Runner:
    """Starts the measuring processes and turns their answers into a Cell."""

    def __init__(
        self,
        model: str,
        loading: Job,
        threads: int,
        seed: int,
        peer_python: str | None,
        timeout: float,
        spare: int,
        folder: Path,
    ) -> None:
        self.setup: Job = {"model": model, "loading": loading, "threads": threads, "seed": seed}
        self.setup["own"] = True
        self.path, self.peer_python = model, peer_python
        self.timeout, self.spare, self.folder = timeout, spare, folder
        self.about: Job = {}
        self.kept: dict[tuple[str, int, str, str | None], _Worker] = {}

    def describe(self, result: Result, longest: int) -> None:
        """Ask one process for the model's shape, where it lies, and the token ids."""
        with self._worker(None) as worker:
            about = worker.ask({"do": "about", "tokens": longest})
        if about["outcome"] != record.MEASURED:
            raise InputError(f"the model cannot be measured: {about['reason']}")
        self.path = about.pop("path")
        ids = self.folder / "ids.json"
        ids.write_text(json.dumps(about.pop("ids")), encoding="ascii")
        self.setup["ids"] = str(ids)
        about.pop("outcome")
        self.about = about
        result.settings["shape"] = about

    def measure(self, step: Step, pair_seconds: float, result: Result) -> Cell:
        """One cell: its memory in one process, its time in another."""
        if step.job["do"] == "kernel":
            self.close()
            shape = {k: self.about[k] for k in ("heads", "kv_heads")}
            more = {**shape, "head_dim": 64, "repeats": 5 * result.settings["repeats"]}
            with self._worker(None) as worker:
                answer = worker.ask({**step.job, **more})
            return _cell({**step.job, **more}, answer, {"seconds": answer.get("seconds")})
        if not step.shared:
            self.close()
        first = self._use("memory", step).ask({**step.job, "memory": True})
        if first["outcome"] != record.MEASURED:
            return _cell(step.job, first, {})
        kept = ("growth", "total", "peer_version")
        values: dict[str, Any] = {k: first[k] for k in kept if k in first}
        if not step.pairs:
            return _cell(step.job, first, values)
        if not step.shared:
            self.close()
        return self._pairs(self._use("time", step), step, pair_seconds, values)

    def _pairs(
        self, worker: _Worker, step: Step, pair_seconds: float, values: dict[str, Any]
    ) -> Cell:
        """Plain and row in turn."""
        base = {**{k: step.job[k] for k in ("do", "tokens", "logits")}, "route": "plain"}
        pairs: list[list[float]] = []
        start = time.monotonic()
        budget = pair_seconds * max(1.0, step.pairs / 3)
        while len(pairs) < step.pairs:
            plain, watched = worker.ask(base), worker.ask(step.job)
            for part in (plain, watched):
                if part["outcome"] != record.MEASURED:
                    return _cell(step.job, part, values)
            pairs.append([plain["seconds"], watched["seconds"]])
            spent = time.monotonic() - start
            if spent + spent / len(pairs) > budget:
                break
        values["pairs"] = pairs  # [plain, row] seconds, one after the other
        values["ratio"] = dict(record.spread([b / a for a, b in pairs]))
        return _cell(step.job, {"outcome": record.MEASURED}, values)

    def _use(self, purpose: str, step: Step) -> _Worker:
        """The process for memory or time at this length; started and warmed where there is none."""
        tokens, logits = step.job["tokens"], step.job["logits"]
        name = (purpose, tokens, logits, step.peer)
        if name not in self.kept or not self.kept[name].alive:
            if any(k[1:] != name[1:] for k in self.kept) or name in self.kept:
                self.close()
            worker = self._worker(step.peer, returning=purpose == "memory").__enter__()
            self.kept[name] = worker
            # the first forward also pays for what is made once
            worker.ask({"do": "forward", "route": "plain", "tokens": tokens, "logits": logits})
        worker = self.kept[name]
        worker.deadline = time.monotonic() + self.timeout
        return worker

    def close(self) -> None:
        """End the processes that are kept for further cells."""
        while self.kept:
            self.kept.popitem()[1].__exit__(None, None, None)

    def _worker(self, peer: str | None, returning: bool = False) -> _Worker:
        setup = self.setup if peer is None else {**self.setup, "model": self.path, "own": False}
        python = sys.executable if peer is None else self.peer_python or sys.executable
        return _Worker(python, setup, self.timeout, self.spare, returning)


class _Worker:
    """A measuring process, stopped when it takes too long or the machine's last memory.

    `returning`: freed memory goes back to the system at once (glibc), so that a peak counts tensors
    and not what the heap happens to hold; slower, so never for times.
    """

    def __init__(
        self, python: str, setup: Job, timeout: float, spare: int, returning: bool = False
    ) -> None:
        self.python, self.setup, self.returning = python, setup, returning
        self.deadline, self.timeout, self.spare = time.monotonic() + timeout, timeout, spare
        self.stopped: tuple[str, str] | None = None
        self.problem: str | None = None
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> _Worker:
        package = str(Path(__file__).resolve().parents[3])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"PYTHONPATH": os.pathsep.join(paths)} if self.setup["own"] else {}
        threads = str(self.setup["threads"])
        env = {
            **os.environ,
            **environment,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self.returning:
            env |= {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        script = str(Path(__file__).with_name("worker.py"))
        try:
            self.process = subprocess.Popen(
                [self.python, script, json.dumps(self.setup)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
                encoding="utf-8",
                env=env,
                start_new_session=True,  # a scheduling group of its own, see worker.main
            )
        except OSError as problem:
            self.problem = f"{Path(self.python).name} cannot be started: {problem.strerror}"
            return self
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process is not None:
            if kind is not None:
                self.process.kill()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # it died with a job half-read
                        pipe.close()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.watcher.join()
        self.errors.close()

    @property
    def alive(self) -> bool:
        """Whether it can take another job."""
        return self.process is not None and self.process.poll() is None

    def ask(self, job: Job) -> Job:
        """The answer to one job; a process that is gone answers with how it ended."""
        if self.process is None:
            return {"outcome": record.NOT_INSTALLED, "reason": self.problem}
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except (BrokenPipeError, OSError):
            line = ""
        if line:
            answer: Job = json.loads(line)
            return answer
        code = self.process.wait()
        if self.stopped is not None:
            return {"outcome": self.stopped[0], "reason": self.stopped[1]}
        if code == -9:
            reason = "the system ended the process, most likely for its memory"
            return {"outcome": record.NO_MEMORY, "reason": reason}
        self.errors.seek(0)
        last = (self.errors.read().strip().splitlines() or ["no message"])[-1]
        return {"outcome": record.FAILED, "reason": f"the process ended with {code}: {last[:300]}"}

    def _watch(self) -> None:
        import psutil

        assert self.process is not None
        while self.process.poll() is None:
            if time.monotonic() > self.deadline:
                self.stopped = (record.TIMED_OUT, f"stopped after {self.timeout:g} s")
            elif psutil.virtual_memory().available < self.spare:
                try:
                    held = psutil.Process(self.process.pid).memory_info().rss / GIB
                except psutil.Error:
                    continue
                self.stopped = (
                    record.NO_MEMORY,
                    f"stopped at {held:.1f} GiB, when the machine had less than "
                    f"{self.spare / GIB:g} GiB left",
                )
            if self.stopped is not None:
                self.process.kill()
                return
            time.sleep(0.02)


def _cell(job: Job, answer: Job, values: dict[str, Any]) -> Cell:
    return Cell(job, answer["outcome"], answer.get("reason", ""), values)


def _facts(facts: Sequence[str] | None) -> list[str]:
    from regard.core import FACTS

    if facts is None:
        return list(_by_name(FACTS))
    for name in facts:
        if name not in FACTS:
            raise InputError(f"unknown fact {name!r}.{nearest(name, FACTS)}")
    if not facts:
        raise InputError("name at least one fact, or none for all")
    return list(facts)


def _by_name(facts: dict[str, Any]) -> Iterator[str]:
    for name, kind in facts.items():
        try:
            kind()
        except ValueError:  # needs settings, such as the segments of "mass"
            continue
        yield name


def _short(cell: Cell) -> str:
    if not cell.ok:
        return f"{cell.outcome} ({cell.reason})"
    parts = []
    if ratio := cell.values.get("ratio"):
        parts.append(f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})")
    if "growth" in cell.values:
        parts.append(f"forward takes {cell.values['growth'] / 2**20:.0f} MiB")
    return ", ".join(parts) or "done"


def _cores() -> int:
    import psutil

    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def _needs_psutil() -> None:
    try:
        import psutil  # noqa: F401
    except ImportError:
        raise InputError('the bench needs psutil: pip install "regard[bench]"') from None


def _wait_for_calm(patience: float, calm: float = 0.15) -> float:
    """Wait, `patience` seconds at most, while others use `calm` of the machine; their share."""
    import psutil

    end = time.monotonic() + patience
    while True:
        busy = float(psutil.cpu_percent(interval=min(1.0, max(patience, 0.05)))) / 100
        if busy < calm or time.monotonic() >= end:
            return busy
