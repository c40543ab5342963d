"""The messages between ranks: every one is counted, and none waits for ever."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from regard.errors import InputError, RegardError

from .schemes import Shape

TIMEOUT = 120.0


class RankLost(RegardError):
    """A rank ended or is stuck, so that a message did not arrive in time."""


@contextmanager
def started(timeout: float = TIMEOUT, ranks: int | None = None) -> Iterator[None]:
    """The process group of a run under torchrun: NCCL where each rank has a GPU, else gloo.

    Args:
        timeout: seconds after which a silent rank counts as lost.
        ranks: how many ranks the user asked for; another number is refused.

    A group that exists already is used and left open.
    """
    expect(ranks)
    if dist.is_initialized():
        yield
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available() and local < torch.cuda.device_count()
    if cuda:
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
    except (RuntimeError, dist.DistError) as error:
        raise RankLost(
            f"rank {os.environ['RANK']} could not meet the other ranks within {timeout:g} s: start "
            f"all of them with one torchrun command ({_first_line(error)})"
        ) from None
    try:
        yield
    finally:
        dist.destroy_process_group()


def expect(ranks: int | None = None) -> None:
    """Refuse to go on without the processes of torchrun, or with another number than `ranks`.

    Raises:
        InputError: with the command to start.
    """
    if dist.is_initialized():
        running = dist.get_world_size()
    elif "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        running = int(os.environ["WORLD_SIZE"])
    else:
        raise InputError(
            "context parallelism runs in several processes: start it with "
            f"torchrun --nproc-per-node {ranks or 4} -m regard ..."
        )
    if ranks is not None and ranks != running:
        raise InputError(
            f"{ranks} ranks were asked for, but {running} run: start with "
            f"torchrun --nproc-per-node {ranks}"
        )


def device() -> torch.device:
    """Where this rank computes: its GPU under NCCL, else the CPU."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class Pending:
    """A message on its way; `wait()` gives what arrived."""

    def __init__(self, comm: Comm, works: list[Any], arrived: Tensor, what: str, kept: Any) -> None:
        self._comm, self._works, self._arrived, self._what = comm, works, arrived, what
        self._kept = kept  # what is being sent must live until it has left

    def wait(self) -> Tensor:
        self._comm._wait(self._works, self._what)
        return self._arrived


class Comm:
    """The ranks of a run as a grid `[ring, ulysses]`, and the messages a scheme needs.

    Attributes:
        sent: bytes this rank has sent so far, by what they carried.
        mesh: the grid as a torch `DeviceMesh` with dimensions "ring" and "ulysses"; None for one
            rank.

    Without a process group it stands for a single rank, so that the same code runs alone.
    """

    def __init__(self, grid: Shape, timeout: float = TIMEOUT) -> None:
        alone = not dist.is_initialized()
        self.rank = 0 if alone else dist.get_rank()
        self.size = 1 if alone else dist.get_world_size()
        if self.size != grid.ranks:
            raise ValueError(
                f"the grid of {grid.name} has {grid.ranks} ranks, but {self.size} run: start as "
                "many processes as the grid has ranks"
            )
        self.grid, self.timeout = grid, timeout
        self.place, self.member = divmod(self.rank, grid.ulysses)
        self.sent: Counter[str] = Counter()
        self.mesh: Any = None
        self._groups: dict[str, Any] = {}
        if not alone and self.size > 1:
            self._connect()

    def _connect(self) -> None:
        from torch.distributed.device_mesh import DeviceMesh

        # torch gives the groups of a mesh its own half hour of patience; these have ours
        table = torch.arange(self.size).view(self.grid.ring, self.grid.ulysses)
        limit = timedelta(seconds=self.timeout)
        with self._naming("meeting the other ranks"):
            for name, rows in (("ring", table.T), ("ulysses", table), ("all", table.view(1, -1))):
                for ranks in rows.tolist():
                    group = dist.new_group(ranks, timeout=limit)
                    if self.rank in ranks:
                        self._groups[name] = group
            self.mesh = DeviceMesh.from_group(
                [self._groups["ring"], self._groups["ulysses"]],
                device().type,
                mesh=table,
                mesh_dim_names=("ring", "ulysses"),
            )

    # -- between the places of the ring ------------------------------------------------------------
    def hop(self, x: Tensor, to: int, source: int, label: str, tag: int = 0) -> Pending:
        """Send `x` to place `to` of the ring while another of its shape comes from `source`."""
        x = x.contiguous()
        arrived = torch.empty_like(x)
        what = f"a hop of {label} to rank {self._global(to)} and from rank {self._global(source)}"
        group = self._groups["ring"]
        with self._naming(what):
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, x, self._global(to), group, tag),
                    dist.P2POp(dist.irecv, arrived, self._global(source), group, tag),
                ]
            )
        self.sent[label] += x.numel() * x.element_size()
        return Pending(self, works, arrived, what, x)

    def gather(self, x: Tensor, label: str) -> list[Tensor]:
        """The `x` of every place of the ring, in order."""
        x = x.contiguous()
        blocks = [torch.empty_like(x) for _ in range(self.grid.ring)]
        with self._naming(f"gathering {label}"):
            work = dist.all_gather(blocks, x, group=self._groups["ring"], async_op=True)
        self._wait([work], f"gathering {label}")
        self.sent[label] += x.numel() * x.element_size() * (self.grid.ring - 1)
        return blocks

    def scatter_sum(self, parts: Tensor, label: str) -> Tensor:
        """`parts` `[ring, ...]`, one for each place; the sum of those meant for this one."""
        return self._exchange(parts, "ring", label).sum(0)

    # -- within a group: rows for heads ------------------------------------------------------------
    def to_heads(self, x: Tensor, label: str = "heads") -> Tensor:
        """`[batch, heads, rows, ...]` of own rows to `[batch, heads / U, rows * U, ...]`."""
        u = self.grid.ulysses
        if u == 1:
            return x
        parts = x.unflatten(1, (u, -1)).movedim(1, 0)
        return self._exchange(parts, "ulysses", label).movedim(0, 2).flatten(2, 3)

    def to_rows(self, x: Tensor, label: str = "heads") -> Tensor:
        """The way back: `[batch, heads / U, rows * U, ...]` to `[batch, heads, rows, ...]`."""
        u = self.grid.ulysses
        if u == 1:
            return x
        parts = x.unflatten(2, (u, -1)).movedim(2, 0)
        return self._exchange(parts, "ulysses", label).movedim(0, 1).flatten(1, 2)

    def _exchange(self, parts: Tensor, name: str, label: str) -> Tensor:
        parts = parts.contiguous()
        arrived = torch.empty_like(parts)
        what = f"exchanging {label}"
        with self._naming(what):
            work = dist.all_to_all_single(arrived, parts, group=self._groups[name], async_op=True)
        self._wait([work], what)
        count = len(parts)
        self.sent[label] += parts.numel() * parts.element_size() * (count - 1) // count
        return arrived

    # -- between all ranks -------------------------------------------------------------------------
    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over all ranks, on every rank; may change `x`."""
        if self.size > 1:
            x = x.contiguous()
            with self._naming("summing over ranks"):
                work = dist.all_reduce(x, group=self._groups["all"], async_op=True)
            self._wait([work], "summing over ranks")
        return x

    def gather_all(self, x: Tensor) -> list[Tensor]:
        """The `x` of every rank, in order."""
        if self.size == 1:
            return [x]
        x = x.contiguous()
        blocks = [torch.empty_like(x) for _ in range(self.size)]
        with self._naming("gathering results"):
            work = dist.all_gather(blocks, x, group=self._groups["all"], async_op=True)
        self._wait([work], "gathering results")
        return blocks

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.sum(torch.zeros(1, device=device()))

    def close(self) -> None:
        """Give the groups back; the process group of the run stays."""
        for group in self._groups.values():
            dist.destroy_process_group(group)
        self._groups = {}

    # -- failure -----------------------------------------------------------------------------------
    def _global(self, place: int) -> int:
        return place * self.grid.ulysses + self.member

    def _wait(self, works: list[Any], what: str) -> None:
        # on a GPU waiting with a limit would stop the processor; there NCCL's own watchdog ends it
        limits = (timedelta(seconds=self.timeout),) if device().type == "cpu" else ()
        with self._naming(what):
            for work in works:
                work.wait(*limits)

    @contextmanager
    def _naming(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, RankLost):
                raise
            raise RankLost(
                f"rank {self.rank} of {self.size}: {what} failed or took longer than "
                f"{self.timeout:g} s: another rank has ended or is stuck; look at its message, "
                f"then start all ranks again ({_first_line(error)})"
            ) from None


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) < 160 else line[:157] + "..."
