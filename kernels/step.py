"""The bookkeeping of a decode step: what it reads from the tables, and how it updates them after the draw.

A table has a column for each slot. Rows of whole numbers: token, position, drawn, ended, limit, then others that only
`sample` knows. One launch before the model and one after it; written with PyTorch's operations they are 29, and at B=1
a launch takes longer than all the bytes.

    python -m pytest tests/kernels/test_step.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from minem.kernels.backend import jit, pick, tl

ENDED = 3  # the row of the flag; a sequence that has ended stays as it is


def begin_step(
    ints: Tensor, floats: Tensor, rotation: Tensor, slots: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The columns of these slots, and the rotation at their positions.

    ints int64 [I, columns], floats [F, columns], rotation [2, P, C/2]: cos and sin of every position below P; slots
    int64 [B]. backend: "eager", "triton" or None (by device).

    Returns copies: [I, B] of ints, [F, B] of floats, [2, B, C/2] of rotation.
    """
    if pick(backend, ints) == "eager":
        state = ints[:, slots]
        return state, floats[:, slots], rotation[:, state[1]]
    (rows, columns), batch, (_, positions, half) = ints.shape, len(slots), rotation.shape
    state, real = ints.new_empty(rows, batch), floats.new_empty(len(floats), batch)
    turn = rotation.new_empty(2, batch, half)
    _begin_kernel[(batch,)](
        ints, floats, rotation, slots, state, real, turn, rows, len(floats), columns, positions, half,
        ROWS=1 << (rows - 1).bit_length(), HALF_BLOCK=max(16, 1 << (half - 1).bit_length()), num_warps=1,
    )  # fmt: skip
    return state, real, turn


def end_step(
    ints: Tensor, slots: Tensor, draws: tuple[Tensor, Tensor, Tensor], stop_ids: Tensor, *, backend: str | None = None
) -> Tensor:
    """Write what was drawn to the table. A sequence goes on unless it draws a stop token, its last, or has ended.

    ints int64 [I, columns], slots int64 [S]. draws: tokens int64 [S] and two floating [S]; stop_ids int64 [K].
    backend: "eager", "triton" or None (by device).

    Returns the draws as float64 [3, S].
    """
    tokens = draws[0]
    if pick(backend, ints) == "eager":
        _, position, drawn, ended, limit = ints[: ENDED + 2, slots]
        ends = (tokens.unsqueeze(1) == stop_ids).any(1) | (drawn + 1 >= limit) | (ended != 0)
        on = (~ends).long()
        ints[: ENDED + 1, slots] = torch.stack((tokens, position + on, drawn + on, 1 - on))
        return torch.stack([x.double() for x in draws])
    result = torch.empty(3, len(slots), dtype=torch.float64, device=ints.device)
    _end_kernel[(len(slots),)](ints, slots, *draws, stop_ids, result, ints.shape[1], len(stop_ids), num_warps=1)
    return result


@jit
def _begin_kernel(  # type: ignore[no-untyped-def]
    ints_ptr, floats_ptr, rotation_ptr, slots_ptr, state_ptr, real_ptr, turn_ptr, rows, reals, columns, positions, half,
    ROWS: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    sequence, batch = tl.program_id(0), tl.num_programs(0)
    slot = tl.load(slots_ptr + sequence)
    row = tl.arange(0, ROWS)
    column = tl.load(ints_ptr + row * columns + slot, mask=row < rows, other=0)
    tl.store(state_ptr + row * batch + sequence, column, mask=row < rows)
    real = tl.load(floats_ptr + row * columns + slot, mask=row < reals, other=0.0)
    tl.store(real_ptr + row * batch + sequence, real, mask=row < reals)
    position = tl.load(ints_ptr + columns + slot)
    channel = tl.arange(0, HALF_BLOCK)
    for part in range(0, 2):
        value = tl.load(rotation_ptr + (part * positions + position) * half + channel, mask=channel < half, other=0.0)
        tl.store(turn_ptr + (part * batch + sequence) * half + channel, value, mask=channel < half)


@jit
def _end_kernel(  # type: ignore[no-untyped-def]
    ints_ptr, slots_ptr, tokens_ptr, logprobs_ptr, proposals_ptr, stop_ids_ptr, result_ptr, columns, stops
):
    sequence, sequences = tl.program_id(0), tl.num_programs(0)
    token = tl.load(tokens_ptr + sequence)
    tl.store(result_ptr + sequence, token.to(tl.float64))
    tl.store(result_ptr + sequences + sequence, tl.load(logprobs_ptr + sequence).to(tl.float64))
    tl.store(result_ptr + 2 * sequences + sequence, tl.load(proposals_ptr + sequence).to(tl.float64))
    column = ints_ptr + tl.load(slots_ptr + sequence)
    position, drawn = tl.load(column + columns), tl.load(column + 2 * columns)
    ends = (drawn + 1 >= tl.load(column + 4 * columns)) | (tl.load(column + 3 * columns) != 0)
    for i in range(0, stops):
        ends = ends | (token == tl.load(stop_ids_ptr + i))
    on = 1 - ends.to(tl.int64)
    tl.store(column, token)
    tl.store(column + columns, position + on)
    tl.store(column + 2 * columns, drawn + on)
    tl.store(column + 3 * columns, 1 - on)
