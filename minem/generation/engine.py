"""The device side of generation: for a fixed number of slots the KV cache, the sampling parameters and the decode step.

    engine = Engine(model, stop_ids, slots=64, prefix=256, suffix=1024)
    engine.prefill([prompt], {prompt: row})       # keys and values of the prompt without its last token
    engine.admit([slot], [request])               # the slot starts from that last token
    engine.start([slot], [row], [prompt], 1).read()    # one token for each slot; each further start draws the next one

A step reads and updates tokens, positions and what has ended in tables on the device, so the host may start the next
step before it knows what this one drew. On a GPU a step is a CUDA graph, one for each of a few batch sizes, captured on
first use; weights, cache and tables keep their places in memory, so a graph stays valid when the model is trained in
place. On the CPU the same function runs eagerly.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minem.generation.kv_cache import MIN_ROWS, Decode, Groups, KVCache, Prefill
from minem.generation.request import Request
from minem.generation.sharing import Part, Prompt, alike, waves
from minem.kernels import sample
from minem.kernels.step import ENDED, begin_step, end_step
from minem.model.decoder import Model, upload

PREFILL_TOKENS = 8192  # prompts are prefilled in packs of about this many tokens

# The tables have a column for each slot. Whole numbers: token, position, drawn, ended, limit, top-k, seed, least
# tokens. Others: temperature, top-p, min-p.
MIN_P = 2


class Step(NamedTuple):
    """What a step draws, on its way to the host: float64 [3, S or more], and the event after which it is there."""

    drawn: Tensor
    arrived: torch.cuda.Event | None

    def read(self) -> list[list[float]]:
        """Tokens, raw log-probabilities and log-probabilities as drawn, in the order of the slots, then padding."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.drawn.tolist()


@dataclass
class _Graph:
    """A captured step, the memory that it writes its draws to, and the memory that it reads its sequences from."""

    replay: Callable[[], None]
    drawn: Tensor
    groups: Groups
    composition: Any = None  # the slots, rows and prompts in `groups`


class Engine:
    """The slots of one generator.

    stop_ids: the tokens that end a sequence.
    prefix, suffix: the longest prompt without its last token, and the most new tokens.
    """

    def __init__(self, model: Model, stop_ids: Sequence[int], slots: int, prefix: int, suffix: int):
        device = model.device
        self.model = model
        self.cache = KVCache(model.config, slots, prefix, suffix, device, model.dtype)
        self.ints = torch.zeros(8, slots + 1, dtype=torch.int64, device=device)
        self.floats = torch.ones(3, slots + 1, device=device)
        self.ints[ENDED] = 1
        self.floats[MIN_P] = 0  # else drawing padding would take another pass over its logits
        positions = torch.arange(self.cache.prefix + self.cache.suffix, device=device)
        self.rotation = torch.stack(model.rotation(positions))  # cos and sin at all that the cache has room for
        self.stop_ids = upload(stop_ids, device)
        gpu = device.type == "cuda"
        self.graphs: dict[int, _Graph] | None = {} if gpu else None  # by batch size; None: run eagerly
        # A stream of this engine's own: cuBLAS's workspace for a stream is freed with a graph captured on it, which
        # other engines would still use. A pool of its own: no capture can use one whose graphs are all gone.
        self._stream = torch.cuda.Stream(device) if gpu else None
        self._pool = torch.cuda.graph_pool_handle() if gpu else None
        self._composition: Any = None  # of the eager steps' groups
        self._groups: Groups
        self._alike = (0, 0)

    def prefill(self, new: Container[Prompt], rows: Mapping[Prompt, int]) -> int:
        """Write all but the last token of each new prompt to its row of the cache.

        rows: of the prompts in the cache, then of the new ones. Returns how many tokens went through the model.
        """
        packs = [pack for wave in waves(rows, new) for pack in _packs(wave)]
        for pack in packs:
            for prompt, source, start in pack:
                for x in (self.cache.prefix_k, self.cache.prefix_v):
                    x[:, rows[prompt], :, :start] = x[:, rows[source], :, :start]
            ids = [i for part in pack for i in part.ids]
            ids += [0] * (MIN_ROWS - len(ids))  # padding, if there are fewer
            spans = {rows[part.prompt]: range(part.start, len(part.prompt) - 1) for part in pack}
            attend = Prefill(self.cache, spans, len(ids))
            self.model.hidden(upload(ids, self.model.device), tuple(self.rotation[:, attend.positions]), attend)
        return sum(len(part.ids) for pack in packs for part in pack)

    def admit(self, slots: Sequence[int], requests: Sequence[Request]) -> None:
        """Let these slots start from these requests, whose prompts are in the cache."""
        ints, floats = [], []
        for request in requests:
            ids, p = request.prompt_ids, request.params
            ints.append([ids[-1], len(ids) - 1, 0, 0, p.max_new_tokens, p.top_k, request.seed, p.min_new_tokens])
            floats.append([p.temperature, p.top_p, p.min_p])
        device = self.model.device
        index = upload(slots, device)
        self.ints[:, index] = upload(ints, device).T
        self.floats[:, index] = upload(floats, device, torch.float32).T

    def start(self, slots: list[int], rows: list[int], prompts: list[list[int]], longest_suffix: int) -> Step:
        """Start a step for these slots, whose prompts are in these rows; none reads beyond the longest positions."""
        composition = slots, rows, prompts
        if self.graphs is None:
            if composition != self._composition:
                self._groups, self._composition = Groups.compact(self.cache, slots, rows), composition
                self._alike = rows[0], alike(prompts)
            longest = max(map(len, prompts)), longest_suffix
            return Step(self._decode(self._groups, longest, self._alike), None)
        batch = _bucket(len(slots), self.cache.padding_slot)
        if batch not in self.graphs:  # recorded on padding alone, which changes nothing
            groups = Groups.fixed(self.cache, batch, [], [])
            step = partial(self._decode, groups, (self.cache.prefix, self.cache.suffix))
            self.graphs[batch] = _Graph(*record(step, self._pool, self._stream), groups)
        graph = self.graphs[batch]
        if composition != graph.composition:
            graph.groups.copy_(Groups.fixed(self.cache, batch, slots, rows))
            graph.composition = composition
        graph.replay()
        return copy_to_host(graph.drawn)

    def _decode(self, groups: Groups, longest: tuple[int, int], alike: tuple[int, int] = (0, 0)) -> Tensor:
        """The whole step: the model, its head, the draw, and the update of the table. Returns `Step.drawn`."""
        state, floats, (cos, sin) = begin_step(self.ints, self.floats, self.rotation, groups.slots)
        token, _, drawn = state[:3]
        attend = Decode(self.cache, groups, drawn, longest, alike)
        n = len(groups.sibling_index)
        hidden = self.model.hidden(token, (cos[:n], sin[:n]), attend)
        state, (temperature, top_p, min_p) = state[:, :n], floats[:, :n]
        _, _, drawn, _, _, top_k, seeds, min_tokens = state
        draws = sample(
            self.model.head(hidden)[:n], temperature, top_k, top_p, min_p, seeds, drawn, stop_ids=self.stop_ids,
            min_tokens=min_tokens,
        )  # fmt: skip
        return end_step(self.ints, groups.slots[:n], draws, self.stop_ids)


def _packs(parts: Iterable[Part]) -> list[list[Part]]:
    """The prompts in packs of about PREFILL_TOKENS. Those of similar length share a pack: attention is cheaper."""
    packs: list[list[Part]] = []
    for part in sorted(parts, key=lambda part: len(part.ids)):
        if not packs or sum(len(p.ids) for p in packs[-1]) + len(part.ids) > PREFILL_TOKENS:
            packs.append([])
        packs[-1].append(part)
    return packs


def record(function: Callable[[], Tensor], pool: Any, stream: Any) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of the function's work on the GPU: how to replay it, and the memory that holds the result."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles kernels and makes cuBLAS's workspaces, which a capture must not
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream), torch.cuda.graph(graph, pool=pool, stream=stream):
            result = function()
    except RuntimeError as error:
        # Where memory runs out the capture may fail to end, too, in other words and without leaving its stream.
        raise error.__context__ or error from None
    return graph.replay, result


def copy_to_host(drawn: Tensor) -> Step:
    """Start to copy a result to the host, because the next replay writes to the same memory."""
    host = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=True)
    host.copy_(drawn, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return Step(host, arrived)


def _bucket(sequences: int, slots: int) -> int:
    """The batch size of the graph for N sequences: 1, 2, 4, 8, 16, 24 ... 64, 80 ... 128, 160 ..., at most `slots`."""
    above = 1 << (sequences - 1).bit_length()  # the next power of two
    step = above if above <= 8 else max(8, above // 8)
    return min(slots, -(-sequences // step) * step)
