"""The device's side of generation: for a fixed number of slots, the KV cache, what each slot samples, and the step.

    engine = Engine(model, stop_ids, slots=64, prefix=256, suffix=1024)
    engine.prefill({prompt: row})          # keys and values of the prompt, but for its last token
    engine.admit([slot], [request])        # the slot starts from that last token
    engine.start([slot], [row]).read()     # one token for each slot; start again, and it goes on from there

A step feeds itself: tokens, positions and what has ended are in a table on the device, which the step reads and
changes, so the host may start the next one before it knows what this one drew. On a GPU a step is a CUDA graph, one for
each of a few batch sizes, captured when it is first needed; weights, cache and table keep their places in memory, so a
graph stays valid when the model is trained in place. On the CPU the same function runs eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from minem.generation.kv_cache import MIN_ROWS, Decode, Groups, KVCache, Prefill, group_width
from minem.kernels import sample
from minem.model.decoder import Model, upload

if TYPE_CHECKING:
    from minem.generation.request import Request

PREFILL_TOKENS = 8192  # prompts are prefilled in packs of about this many tokens

# The rows of the table: the token that enters next, its position, tokens drawn so far, whether the sequence has ended
# (it then stays as it is), the most tokens, and how to sample.
TOKEN, POSITION, DRAWN, ENDED, LIMIT, TOP_K, SEED, MIN_TOKENS = range(8)
TEMPERATURE, TOP_P, MIN_P = range(3)


class Step(NamedTuple):
    """What a step draws, on its way to the host: float64 [3, S or more], and the event after which it is there."""

    drawn: Tensor
    arrived: torch.cuda.Event | None

    def read(self) -> list[list[float]]:
        """Tokens, raw log-probabilities and log-probabilities as drawn, in the order of the slots, then padding."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.drawn.tolist()


class _Graph(NamedTuple):
    """A captured step, the memory it reads its sequences from, and the memory it leaves its draws in."""

    replay: Callable[[], None]
    groups: Groups
    drawn: Tensor


class Engine:
    """See the head of this file.

    Args:
        model: its weights are used in place.
        stop_ids: the tokens that end a sequence.
        slots: the most sequences at once.
        prefix, suffix: the longest prompt but for its last token, and the most new tokens.
    """

    def __init__(self, model: Model, stop_ids: Sequence[int], slots: int, prefix: int, suffix: int):
        device = model.device
        self.model = model
        self.cache = KVCache(model.config, slots, prefix, suffix, device, model.dtype)
        self.whole = torch.zeros(8, slots + 1, dtype=torch.int64, device=device)  # TOKEN ... MIN_TOKENS of each slot
        self.real = torch.ones(3, slots + 1, device=device)  # TEMPERATURE, TOP_P, MIN_P
        self.whole[ENDED] = 1
        self.real[MIN_P] = 0  # else the draw of padding would take an extra pass over its logits
        self.stop_ids = upload(stop_ids, device)
        self.graphs: dict[int, _Graph] | None = {} if device.type == "cuda" else None  # None: run eagerly
        # Graphs are captured on a stream that is this engine's alone: cuBLAS keeps a workspace for each stream, which
        # goes when a graph that was captured there does, and would be missing from another engine's.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._drop_graphs()
        self._composition: tuple[list[int], list[int]] = ([], [])
        self._groups: Groups | None = None  # of that composition

    def grow(self, prefix: int, suffix: int) -> None:
        """Make room for longer prompts and suffixes; what is in the cache stays, the graphs are captured anew."""
        self.cache.grow(prefix, suffix)
        self._drop_graphs()

    def _drop_graphs(self) -> None:
        """Forget all graphs; those to come share a new memory pool: one whose last graph is gone cannot be used again.

        They may share one because they run one after the other, and only results outlive a replay.
        """
        if self.graphs is not None:
            self.graphs.clear()
        self._last: _Graph | None = None  # the graph that was told of the composition
        self._pool = torch.cuda.graph_pool_handle() if self._stream is not None else None

    def prefill(self, prompts: Mapping[tuple[int, ...], int]) -> int:
        """Write the prompts, all but their last tokens, to their rows of the cache; returns the tokens that it took."""
        packs: list[list[tuple[int, ...]]] = []
        size = PREFILL_TOKENS
        # Prompts of similar length share a pack, whose attention is the cheaper the more alike they are.
        for prompt in sorted(prompts, key=len):
            if size + len(prompt) > PREFILL_TOKENS:
                packs.append([])
                size = 0
            packs[-1].append(prompt)
            size += len(prompt)
        for pack in packs:
            texts = [prompt[:-1] for prompt in pack]
            missing = MIN_ROWS - sum(map(len, texts))
            if missing > 0:
                texts.append((0,) * missing)
            attend = Prefill(self.cache, [prompts[p] for p in pack], [len(text) for text in texts])
            ids = upload([i for text in texts for i in text], self.model.device)
            self.model.hidden(ids, attend.positions, attend)
        return sum(len(prompt) - 1 for prompt in prompts)

    def admit(self, slots: Sequence[int], requests: Sequence[Request]) -> None:
        """Let these slots start from these requests, whose prompts are in the cache."""
        whole, real = [], []
        for request in requests:
            ids, p = request.prompt_ids, request.params
            whole.append([ids[-1], len(ids) - 1, 0, 0, p.max_new_tokens, p.top_k, request.seed, p.min_new_tokens])
            real.append([p.temperature, p.top_p, p.min_p])
        device = self.model.device
        index = upload(slots, device)
        self.whole[:, index] = upload(whole, device).T
        self.real[:, index] = upload(real, device, torch.float32).T

    def start(self, slots: list[int], rows: list[int], longest_prefix: int, longest_suffix: int) -> Step:
        """Start a step for these slots, whose prompts are in these rows; none reads beyond the longest positions."""
        cache, device = self.cache, self.model.device
        changed = self._composition != (slots, rows)
        self._composition = (slots, rows)
        if self.graphs is None:
            if changed or self._groups is None:
                self._groups = Groups.compact(slots, rows, cache.spare, device)
            return Step(self._decode(self._groups, longest_prefix, longest_suffix), None)
        batch = _bucket(len(slots), cache.spare)
        graph = self.graphs.get(batch) or self._capture(batch)
        if changed or graph is not self._last:
            graph.groups.copy_(Groups.fixed(batch, group_width(self.model.config), slots, rows, cache.spare, device))
            self._last = graph
        graph.replay()
        return _bring(graph.drawn)

    def _decode(self, groups: Groups, longest_prefix: int, longest_suffix: int) -> Tensor:
        """The whole step: the model, its head, the draw, and what the table says afterwards. Returns `Step.drawn`."""
        attended = groups.slots[: len(groups.sibling_index)]
        state, knobs = self.whole[:, groups.slots], self.real[:, attended]
        attend = Decode(self.cache, groups, state[DRAWN], longest_prefix, longest_suffix)
        hidden = self.model.hidden(state[TOKEN], state[POSITION], attend)
        state = state[:, : len(attended)]
        tokens, logprobs, proposal_logprobs = sample(
            self.model.head(hidden)[: len(attended)],
            knobs[TEMPERATURE],
            state[TOP_K],
            knobs[TOP_P],
            knobs[MIN_P],
            state[SEED],
            state[DRAWN],
            stop_ids=self.stop_ids,
            min_tokens=state[MIN_TOKENS],
        )
        ended = (tokens.unsqueeze(1) == self.stop_ids).any(1) | (state[DRAWN] + 1 >= state[LIMIT]) | (state[ENDED] != 0)
        on = (~ended).long()
        self.whole[: ENDED + 1, attended] = torch.stack((tokens, state[POSITION] + on, state[DRAWN] + on, 1 - on))
        return torch.stack((tokens.double(), logprobs.double(), proposal_logprobs.double()))

    def _capture(self, batch: int) -> _Graph:
        """The step for `batch` sequences as a graph, recorded on padding alone, which changes nothing."""
        assert self.graphs is not None
        groups = Groups.fixed(batch, group_width(self.model.config), [], [], self.cache.spare, self.model.device)
        step = partial(self._decode, groups, self.cache.prefix, self.cache.suffix)
        replay, drawn = record(step, self._pool, self._stream)
        self.graphs[batch] = _Graph(replay, groups, drawn)
        return self.graphs[batch]


def record(function: Callable[[], Tensor], pool: Any, stream: Any) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of what the function does on the GPU: how to do it again, and the memory that the result is in."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles kernels and makes cuBLAS's workspaces, which a capture must not
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        result = function()
    return graph.replay, result


def _bring(drawn: Tensor) -> Step:
    """Copy a result to the host, without waiting for it: the next replay writes to the same memory."""
    if not drawn.is_cuda:
        return Step(drawn.clone(), None)
    host = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=True)
    host.copy_(drawn, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return Step(host, arrived)


def _bucket(sequences: int, slots: int) -> int:
    """The size of the graph that decodes so many: 1, 2, 4, 8, 16, 24 ... 64, 80 ... 128, 160 ..., at most `slots`."""
    above = 1 << (sequences - 1).bit_length()  # the next power of two
    step = above if above <= 8 else max(8, above // 8)
    return min(slots, -(-sequences // step) * step)
