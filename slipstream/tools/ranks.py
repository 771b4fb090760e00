"""The processes (*ranks*) of one run: what they exchange, by torch.distributed.

All collectives come from the main thread, in one order on every rank: two threads' can wait for
each other for ever. Tensors on the CPU travel by gloo, those on CUDA by what the group was made
with. Where one fails, because a rank ended or does not answer, `RankLost` is raised; what becomes
of it: `slipstream.tools.processes`.

Some work is rank 0's alone: files, judging, choosing. `led` runs it there; what it needs of the
others meanwhile it asks for by name (`ask`), and every rank answers with its handler of that name.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

Arrays = Mapping[str, np.ndarray]


class RankLost(Exception):
    """A collective failed: another rank has ended, or does not answer."""


class Ranks:
    """The `size` ranks of the process group, which is initialised, as one of them sees them.

    Attributes:
        rank, size: its number, and how many there are; at least 2.
        local_size: ranks on this machine.
        handlers: what rank 0 may `ask` for, by name.
        is_lost: whether a collective failed.
        seconds, num_bytes: that collectives took and brought here so far, by kind; see
            `count_while`.
    """

    def __init__(self, local_size: int) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_size = local_size
        self.is_lost = False
        self.handlers: dict[str, Callable[..., Any]] = {}
        self._is_counted: Callable[[], bool] = lambda: True
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.num_bytes: Counter[str] = Counter()
        self._leads = False

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which speaks and writes for all."""
        return self.rank == 0

    def part(self, num_inputs: int) -> slice:
        """Which inputs of a joined batch are this rank's: [n r / W, n (r + 1) / W)."""
        parts = self.parts(num_inputs)
        before = sum(parts[: self.rank])
        return slice(before, before + parts[self.rank])

    def parts(self, num_inputs: int) -> list[int]:
        """How many inputs of a joined batch each rank has."""
        ends = [num_inputs * rank // self.size for rank in range(self.size + 1)]
        return [end - start for start, end in itertools.pairwise(ends)]

    def count_while(self, is_counted: Callable[[], bool]) -> None:
        """From now on count the collectives that end while this is so, from 0."""
        self._is_counted = is_counted
        self.seconds.clear()
        self.num_bytes.clear()

    @contextmanager
    def _collective(self, kind: str, num_bytes: int) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            self.is_lost = True
            raise RankLost(f"{kind}: {error}") from error
        if self._is_counted():
            self.seconds[kind] += time.perf_counter() - start
            self.num_bytes[kind] += num_bytes

    def start_sum(self, values: Tensor, kind: str) -> Callable[[], None]:
        """Begin to add up `values` over the ranks, in place, to the same bits on each; the returned
        function waits for it.
        """
        # Of a ring: all parts but one's own, summed, and those of the others to sum.
        share = 2 * values.nbytes * (self.size - 1) // self.size
        with self._collective(kind, share):
            work = dist.all_reduce(values, async_op=True)

        def wait() -> None:
            with self._collective(kind, 0):
                work.wait()

        return wait

    def any_of(self, flags: Tensor, kind: str = "control") -> None:
        """Set each of `flags`, uint8, to the largest that any rank has, in place."""
        with self._collective(kind, flags.nbytes):
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)

    def is_any(self, flag: bool) -> bool:
        """Whether any rank has the flag."""
        flags = torch.tensor([flag], dtype=torch.uint8)
        self.any_of(flags)
        return bool(flags)

    def gather(self, values: Tensor, kind: str = "control") -> Tensor:
        """Every rank's `values`, all of one shape: (size, *shape), to all."""
        values = values.contiguous()
        found = values.new_empty((self.size, *values.shape))
        with self._collective(kind, (self.size - 1) * values.nbytes):
            dist.all_gather(list(found.unbind(0)), values)
        return found

    def gather_rows(
        self, values: Tensor, kind: str, counts: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Every rank's `values` (counts[rank], ...), to all; without `counts` these are asked."""
        if counts is None:
            counts = self.gather(torch.tensor([len(values)])).flatten().tolist()
        padded = values.new_zeros((max(counts), *values.shape[1:]))
        padded[: len(values)] = values
        return [part[:count] for part, count in zip(self.gather(padded, kind), counts, strict=True)]

    def start_exchange(
        self, values: Tensor, sent: Sequence[int], received: Sequence[int], kind: str
    ) -> Callable[[], Tensor]:
        """Begin to send `values` (n, ...), the first sent[0] rows to rank 0 and so on; the returned
        function waits for what arrives, by source.
        """
        found = values.new_empty((sum(received), *values.shape[1:]))
        of_others = found.nbytes // max(len(found), 1) * (sum(received) - received[self.rank])
        values = values.contiguous()
        with self._collective(kind, of_others):
            work = dist.all_to_all_single(found, values, list(received), list(sent), async_op=True)

        def wait() -> Tensor:
            with self._collective(kind, 0):
                work.wait()
            return found

        return wait

    def exchange(
        self, values: Tensor, sent: Sequence[int], received: Sequence[int], kind: str
    ) -> Tensor:
        """As `start_exchange`, waited for."""
        return self.start_exchange(values, sent, received, kind)()

    def add_up_integers(self, values: Tensor, kind: str) -> None:
        """Add integers up over the ranks, in place, on rank 0 alone."""
        with self._collective(kind, values.nbytes if self.is_first else 0):
            dist.reduce(values, 0)

    def share(self, value: Any = None, arrays: Arrays | None = None) -> tuple[Any, Arrays]:
        """Rank 0's `value`, of JSON, and `arrays`, on every rank; others' are not looked at."""
        if self.is_first:
            # PyTorch takes no memory that it may not write to, as a mapped file's.
            given = {
                name: np.require(a, requirements=["C", "W"]) for name, a in (arrays or {}).items()
            }
            specs = {name: [array.dtype.str, array.shape] for name, array in given.items()}
            head = np.frombuffer(json.dumps([value, specs]).encode(), np.uint8)
            self._broadcast(torch.tensor([len(head)]))
            self._broadcast(torch.from_numpy(head.copy()))
            for array in given.values():
                self._broadcast(torch.from_numpy(array.reshape(-1).view(np.uint8)))
            return value, given
        size = torch.zeros(1, dtype=torch.int64)
        self._broadcast(size)
        text = torch.empty(int(size), dtype=torch.uint8)
        self._broadcast(text)
        value, specs = json.loads(text.numpy().tobytes())
        found = {}
        for name, (dtype, shape) in specs.items():
            found[name] = np.empty(shape, np.dtype(dtype))
            self._broadcast(torch.from_numpy(found[name].reshape(-1).view(np.uint8)))
        return value, found

    def _broadcast(self, values: Tensor) -> None:
        if not values.numel():
            return
        with self._collective("control", 0 if self.is_first else values.nbytes):
            dist.broadcast(values, 0)

    def led(self, act: Callable[[], Any]) -> Any:
        """Run `act` on rank 0, with what the others do for it; its result, of JSON, to all."""
        if self.is_first:
            self._leads = True
            try:
                result = act()
            finally:
                self._leads = False
            return self.share({"end": result})[0]["end"]
        while True:
            said, arrays = self.share()
            if "end" in said:
                return said["end"]
            self.handlers[said["do"]](**said["with"], **arrays)

    def ask(self, name: str, arrays: Arrays | None = None, **values: Any) -> Any:
        """From within `led`: every rank's handler of a name, with these; returns rank 0's."""
        if not self._leads:
            raise AssertionError(f"{name}: asked for outside `led`")
        self.share({"do": name, "with": values}, arrays)
        return self.handlers[name](**values, **(arrays or {}))
