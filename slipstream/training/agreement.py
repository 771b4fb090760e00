"""Whether the ranks of a run agree: what each has of its own must be the same, bit for bit.

At reports, evaluations and checkpoints every rank compares the order of its batches, the network,
its copies of the hot rows, and how often gradients that were sent have arrived (`compare`); in the
step before a report every update of a row is done again by every rank, out of all ranks' gradients
(`check_step`). A difference ends the run with a line that names the ranks: results of such a run
would be nobody's.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from slipstream.tools.ranks import Ranks
from slipstream.training.batching import CHECKED_INPUTS, EpochPlan
from slipstream.training.rows import step_rows

Pairs = tuple[Tensor, Tensor]  # numbers of rows (n,) int64, and gradients (n, dim)
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}  # of as many bits
TOLERANCE = 1e-5  # relative, of what CUDA adds up in any order
LEAST = 1e-4  # of a gradient, relative: what rounding may lose


def packed(numbers: Tensor, values: Tensor) -> Tensor:
    """Values (n, k) with the bits of their rows' numbers (n,) behind them: one message."""
    bits = numbers.to(values.device, INTEGERS[values.dtype]).view(values.dtype)
    return torch.cat([values, bits.unsqueeze(1)], 1)


def unpacked(message: Tensor) -> tuple[Tensor, Tensor]:
    """What `packed` took."""
    bits = message[:, -1].contiguous().view(INTEGERS[message.dtype])
    return bits.long(), message[:, :-1].contiguous()


def hash_of(values: Tensor) -> int:
    """Of a tensor's bits and the order of its rows: two sums of integers, at memory speed."""
    if not values.numel():
        return 0
    bits = values.detach().contiguous()
    if values.dtype in INTEGERS:
        bits = bits.view(INTEGERS[values.dtype])
    else:
        bits = bits.reshape(-1).view(torch.uint8)
    by_row = bits.reshape(len(bits) if bits.ndim else 1, -1).sum(1, dtype=torch.int64)
    place = torch.arange(1, len(by_row) + 1, device=by_row.device)
    return int((by_row * place).sum())


def plan_hash(plan: EpochPlan | None, order_check: Sequence[int], step: int) -> int:
    """Of the batches to come and the place among them."""
    if plan is None:
        return step
    values, arrays = plan.state()
    found = zlib.crc32(json.dumps([values, list(order_check), step]).encode())
    for array in arrays.values():
        found = zlib.crc32(array[:CHECKED_INPUTS].tobytes(), found)
    return found


def compare(ranks: Ranks, known: Mapping[str, int], step: int) -> None:
    """Raise `ValueError` on every rank where one's numbers, by what they are of, are not all
    others'; it names the ranks that differ from most.
    """
    mine = torch.tensor(list(known.values()), dtype=torch.int64)
    for what, values in zip(known, ranks.gather(mine).unbind(1), strict=True):
        kinds, counts = values.unique(return_counts=True)
        if len(kinds) == 1:
            continue
        usual = kinds[counts.argmax()] if int(counts.max()) > 1 else values[0]
        other = " and ".join(
            f"rank {rank}" for rank in np.flatnonzero(values.numpy() != int(usual))
        )
        raise ValueError(
            f"step {step}: {other} has another {what} than the others: started with other flags, "
            "another version, or damaged memory? The last checkpoint is from before"
        )


def check_messages(ranks: Ranks, sent: Tensor, received: Tensor, step: int) -> None:
    """Raise `ValueError` where gradients that a rank sent another, (W,) sums of all their bits,
    are not those it received.
    """
    both = ranks.gather(torch.stack([sent, received]).cpu())  # (rank, sent or received, rank)
    wrong = (both[:, 0] != both[:, 1].t()).nonzero().tolist()
    if wrong:
        pairs = ", ".join(f"from rank {source} to rank {target}" for source, target in wrong)
        raise ValueError(f"step {step}: gradients of rows were lost or changed on the way {pairs}")


def check_step(
    ranks: Ranks,
    optimizer: str,
    given: Pairs,
    own: Tensor,
    before: Sequence[Tensor],
    after: Tensor,
    rate: float | Tensor,
) -> None:
    """Do again what the rows' owners did with all ranks' gradients, and compare.

    Args:
        ranks: of the run.
        optimizer: of the rows.
        given: this rank's gradients for any rows.
        own: numbers (n,) of the rows that this rank stepped.
        before: weights (n, dim) before, and the optimizer's sums (n,) where it has any.
        after: weights (n, dim) after.
        rate: the learning rate.

    Raises `ValueError`, which names the owners that did otherwise.
    """
    numbers, gradients = unpacked(torch.cat(ranks.gather_rows(packed(*given), "audit")).cpu())
    columns = [before[0], after, *(sums.unsqueeze(1) for sums in before[1:])]
    parts = ranks.gather_rows(packed(own, torch.cat(columns, 1)), "audit")
    dim, wrong = after.shape[1], []
    for rank, part in enumerate(parts):
        rows, values = unpacked(part.cpu())
        if not len(rows):
            continue
        ordered, order = rows.sort()
        place = torch.searchsorted(ordered, numbers).clamp(max=len(rows) - 1)
        is_of = ordered[place] == numbers
        sums = values.new_zeros((len(rows), dim))
        sums.index_add_(0, order[place[is_of]], gradients[is_of])
        weight, expected = values[:, :dim].clone(), values[:, dim : 2 * dim]
        kept = values[:, 2 * dim].clone() if len(before) > 1 else None
        step_rows(optimizer, weight, kept, torch.arange(len(rows)), sums, float(rate))
        same = torch.equal(weight, expected)
        if not same and after.device.type == "cuda":
            step = (expected - values[:, :dim]).abs().max()
            same = torch.allclose(weight, expected, rtol=TOLERANCE, atol=TOLERANCE * float(step))
        if not same:
            wrong.append(f"rank {rank}")
    if wrong:
        raise ValueError(
            f"{' and '.join(wrong)}: rows are not what the sum of all ranks' gradients, in the "
            "order of the ranks, makes of them"
        )


class Joined:
    """The network's gradients and the loss of all ranks' parts of a batch, added up in one message.

    Beside them travel what each rank wants all to know (`flags`, numbers that are added up), how
    many inputs it trained, and the sum of its gradients, by which a lost one is found.
    """

    def __init__(self, ranks: Ranks, parameters: Sequence[Tensor], num_flags: int) -> None:
        self.ranks, self._parameters = ranks, parameters
        self.flags = [0.0] * num_flags  # of this rank, to be told with the next step
        self.told = [0.0] * num_flags  # of all ranks, added up, by the last step
        self.lost = 0.0  # largest share of a step's gradients that was lost so far

    def begin(self, loss_sum: Tensor, num_inputs: int) -> Callable[[int], Tensor]:
        """Add up, with this part's gradients in the parameters; the returned function waits, puts
        the sums there, and returns the loss's, given the inputs of the whole batch.
        """
        parts = [
            parameter.new_zeros(parameter.numel()) if parameter.grad is None
            else parameter.grad.reshape(-1)
            for parameter in self._parameters
        ]  # fmt: skip
        num_values = sum(map(len, parts))
        used = [float(parameter.grad is not None) for parameter in self._parameters]
        mine = torch.stack([part.sum() for part in parts]).sum() if parts else loss_sum * 0
        size = torch.stack([part.abs().sum() for part in parts]).sum() if parts else mine
        said = loss_sum.new_tensor([*used, float(num_inputs), *self.flags])
        flat = torch.cat([*parts, said, loss_sum.reshape(1), mine.reshape(1), size.reshape(1)])
        wait = self.ranks.start_sum(flat, "network")

        def finish(num_joined: int) -> Tensor:
            wait()
            told = flat[num_values:-3].tolist()
            if round(told[len(used)]) != num_joined:
                raise ValueError(
                    f"the ranks trained {told[len(used)]:g} inputs of a batch of {num_joined}: one "
                    "left its part out"
                )
            self.told = told[len(used) + 1 :]
            values = flat[:num_values]
            lost = (values.sum() - flat[-2]).abs() / flat[-1].clamp(min=1e-30)
            self.lost = max(self.lost, float(lost))
            start = 0
            for parameter, is_used in zip(self._parameters, told, strict=False):
                part = values[start : start + parameter.numel()]
                start += parameter.numel()
                parameter.grad = part.view_as(parameter).to(parameter.dtype) if is_used else None
            return flat[-3]

        return finish

    def check(self, step: int) -> None:
        """Raise `ValueError` where gradients were lost since the last call."""
        lost, self.lost = self.lost, 0.0
        if not lost < LEAST:
            raise ValueError(f"step {step}: gradients of the network were lost on the way")
