"""The nearest of a few levels: the definition, and a faster way to the same result on CPU.

The middles between levels cut [-1, 1] into intervals; a number exactly on a middle (as float32) belongs to the lower
level, as in bitsandbytes (`codebook.Book` moves the middles where it does not). The definition searches the middles.
On CPU a search costs 15 times a multiplication, so [-1, 1] is cut into equal cells, small enough that none holds two
middles: one table gives a cell's middle, a comparison gives the side, and a second table gives the answer. Both ways
are bit-identical, since a number's cell is monotonic.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def nearest(scaled: Tensor, middles: tuple[float, ...], answers: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """For each number, the answer of the interval that it lies in.

    scaled   float32 in [-1, 1], contiguous
    middles  ascending, float32 numbers in [-1, 1]: the ends of the intervals, each of which belongs to the lower one
    answers  one an interval: the levels themselves, or their codes
    dtype    of the answers: float32 (then NaN gives NaN) or uint8
    """
    if scaled.device.type != "cpu" or type(scaled) is not Tensor or not bool(scaled.sum().isfinite()):
        return _by_search(scaled, middles, answers, dtype)
    middle_of_cell, answer_of_side, cells = _tables(middles, answers, dtype)
    position = torch.mul(scaled, cells).add_(cells + 1).view(-1)
    cell = position.to(torch.int32)
    distance = torch.index_select(middle_of_cell, 0, cell, out=position).sub_(scaled.view(-1))
    above = distance.view(torch.int32).bitwise_right_shift_(31)  # -1 where scaled > middle, else 0
    return torch.index_select(answer_of_side, 0, above.add_(cell, alpha=2)).view(scaled.shape)


def _by_search(scaled: Tensor, middles: tuple[float, ...], answers: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    index = torch.bucketize(scaled, torch.tensor(middles, dtype=torch.float32, device=scaled.device))
    answer = torch.tensor(answers, dtype=dtype, device=scaled.device)[index]
    return answer.add_(scaled - scaled) if dtype.is_floating_point else answer


@lru_cache(maxsize=16)
def _tables(middles: tuple[float, ...], answers: tuple[float, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Middle of each cell (infinity if it holds none); answers at 2 * cell (below) and 2 * cell - 1 (above); scale."""
    with torch.inference_mode(False), torch.device("cpu"):
        middle = torch.tensor(middles, dtype=torch.float32)
        cells = 16
        while True:
            cell_of_middle = (middle * cells).add_(cells + 1).to(torch.int32)
            if bool((cell_of_middle.diff() > 0).all()):
                break
            cells *= 2
        every_cell = torch.arange(2 * cells + 2, dtype=torch.int32)
        below = torch.bucketize(every_cell, cell_of_middle)
        middle_of_cell = torch.full((2 * cells + 2,), torch.inf)
        middle_of_cell[cell_of_middle] = middle
        index = torch.stack([below, below], dim=1).view(-1)
        index[2 * cell_of_middle - 1] = torch.arange(1, len(answers))
        # Only a cell with a middle is ever asked for its upper side, so the neighbour's entry there is never read.
        return middle_of_cell, torch.tensor(answers, dtype=dtype)[index], float(cells)
