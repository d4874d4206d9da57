"""The processes that train together, and what they say to each other.

    rank 0, the leader       talks to actors, holds the buffer, computes advantages
        │ orders (`Order`): a batch with its advantages, weights or state to gather, the end
        ▼
    ranks 1, 2, ...          carry out the same steps on their own rows and shards

All compute the same plan from the same batch, so that only rows differ between them: nobody has to
be told which are its own. Orders go over connections of their own on which a follower waits for as
long as the leader waits for its actors; everything else has a deadline. What travels is tensors.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from enum import IntEnum
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from protocol.errors import AsyncGdpoError, ConfigError, TrainingError

_PATIENCE = timedelta(days=365)
"""For orders: a leader that is gone is noticed by its connection, a silent one by its pulse."""


class Order(IntEnum):
    """What the leader has all others do with it."""

    LOAD = 0
    """The model, as the configuration in the payload says."""
    TRAIN = 1
    """On the batch in the payload."""
    GATHER_WEIGHTS = 2
    GATHER_STATE = 3
    LEAVE = 4


class Doctor(Protocol):
    """Who knows how the other processes are."""

    def check(self) -> None:
        """Raise `TrainingError` if another rank is lost."""

    def explain(self, error: Exception) -> Exception:
        """Say of an error in a call to all whose fault it was, if it was another rank's."""

    def when_lost(self, call: Callable[[AsyncGdpoError], None]) -> None:
        """Have ``call`` called once another rank is lost."""


class _NoDoctor:
    def check(self) -> None:
        pass

    def when_lost(self, call: Callable[[AsyncGdpoError], None]) -> None:
        pass

    def explain(self, error: Exception) -> Exception:
        return error


class Ranks:
    """This process among those that train together; alone, every method does nothing."""

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        doctor: Doctor | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        """Of more than one, `torch.distributed` must have been initialised before.

        ``timeout_s`` is how long the leader waits for one that takes no orders.
        """
        self.rank = rank
        self.size = size
        self.doctor = doctor or _NoDoctor()
        self._out_of_step = False
        """Whether a call broke off, so that nobody knows where the others are."""
        self._orders: Any = None
        self._meetings: Any = None
        if size > 1:
            patience = timedelta(seconds=timeout_s) if self.leads else _PATIENCE
            with self.explained():
                self._orders = dist.new_group(backend="gloo", timeout=patience)
                self._meetings = dist.new_group(backend="gloo", timeout=_PATIENCE)

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def are_whole(self) -> bool:
        """Whether all of them take part still, as far as this one knows."""
        try:
            self.doctor.check()
        except TrainingError:
            return False
        return not self._out_of_step

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Around whatever waits for other ranks: if it fails, the error names who was at fault."""
        try:
            yield
        except TrainingError:
            # It is about numbers, which are the same everywhere; or this was explained already.
            raise
        except Exception as error:
            self._out_of_step = True
            explained = self.doctor.explain(error)
            if explained is error:
                raise
            raise explained from error

    def order(self, order: Order, payload: Sequence[Tensor] = ()) -> None:
        """Tell all others, as the leader, what comes next; raises `TrainingError`."""
        if self.size == 1:
            return
        self.doctor.check()
        if self._out_of_step:
            raise TrainingError("the ranks of the learner are out of step")
        sizes = [tensor.numel() * tensor.element_size() for tensor in payload]
        head = torch.tensor([order, sum(sizes)])
        with self.explained():
            dist.broadcast(head, 0, group=self._orders)
            if sum(sizes):
                whole = torch.cat(
                    [tensor.contiguous().view(-1).view(torch.uint8) for tensor in payload]
                )
                dist.broadcast(whole, 0, group=self._orders)

    def dismiss(self) -> None:
        """Let all others go, if they can still be told."""
        with suppress(TrainingError):
            self.order(Order.LEAVE)

    def next_order(self) -> tuple[Order, Tensor]:
        """Wait, as a follower, for what the leader says; the payload is uint8 [bytes]."""
        head = torch.empty(2, dtype=torch.int64)
        with self.explained():
            dist.broadcast(head, 0, group=self._orders)
            order, num_bytes = head.tolist()
            payload = torch.empty(num_bytes, dtype=torch.uint8)
            if num_bytes:
                dist.broadcast(payload, 0, group=self._orders)
        return Order(order), payload

    def meet(self) -> None:
        """Wait until all others are here too, however long they take."""
        if self.size > 1:
            with self.explained():
                dist.barrier(group=self._meetings)

    def sum(self, value: Tensor) -> Tensor:
        """Add a 0-dim tensor up over all ranks, in place."""
        if self.size > 1:
            with self.explained():
                dist.all_reduce(value)
        return value

    def smallest(self, number: int) -> int:
        """Agree on the smallest of each rank's number."""
        if self.size == 1:
            return number
        value = torch.tensor(number)
        with self.explained():
            dist.all_reduce(value, op=dist.ReduceOp.MIN, group=self._meetings)
        return int(value)

    def check_equal(self, what: str, text: str) -> None:
        """Raise `ConfigError` if ``text`` is not the same on all ranks."""
        if self.size > 1:
            number = zlib.crc32(text.encode())
            if self.smallest(number) != -self.smallest(-number):
                raise ConfigError(
                    f"{what} is not the same on all ranks (here {text}): start them with the same "
                    "software and on devices of one kind"
                )

    def join(self, columns_FN: Tensor) -> list[Tensor]:
        """Everyone's [F, N], by rank; their N may differ."""
        if self.size == 1:
            return [columns_FN]
        num_fields, num_columns = columns_FN.shape
        numbers = [torch.empty_like(_number(columns_FN)) for _ in range(self.size)]
        with self.explained():
            dist.all_gather(numbers, _number(columns_FN))
            most = max(int(number) for number in numbers)
            padded = columns_FN.new_zeros(num_fields, most)
            padded[:, :num_columns] = columns_FN
            received = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(received, padded)
        return [each[:, : int(n)] for each, n in zip(received, numbers, strict=True)]


def _number(columns_FN: Tensor) -> Tensor:
    return torch.tensor([columns_FN.shape[1]], device=columns_FN.device)


ALONE = Ranks()
"""The one process of a learner that is not started by torchrun."""
