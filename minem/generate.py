"""The generator: many draws at once from a KV cache whose slots refill as sequences finish.

    python -m minem generate --prompt "..."          # or from Python:

    generator = minem.Generator(model, tokenizer)
    for draws in generator.generate(["..."], minem.SamplingParams(n=4, temperature=0.8)):
        print([completion.text for completion in draws])

One `step` is: finish and cancel, admit waiting requests into free slots (prefilling prompts that are not in the cache
yet), and decode one token for every active slot. Which tokens come out does not depend on who shares the batch: each
draw has a random stream of its own, keyed by its request and counted by its tokens (`minem.kernels.sample`).
Scheduling depends on tokens only, never on the clock, so the same start gives the same schedule.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from minem.cache import Decode, KVCache, Prefill
from minem.errors import GuardError, UserError
from minem.kernels import sample
from minem.model import Model
from minem.tokenizer import Tokenizer

PREFILL_TOKENS = 8192  # prompts are prefilled in packs of about this many tokens
MAX_SLOTS = 65_536
MIN_ROWS = 8  # below 8 rows the CPU's matrix products round differently for each number of rows


@dataclass(frozen=True)
class SamplingParams:
    """How to draw. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch those filters off.

    EOS is not drawn, and stop texts are not looked for, before min_new_tokens.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        rules = [
            ("n", self.n >= 1, "at least 1"),
            ("temperature", self.temperature == 0 or 1e-3 <= self.temperature <= 1e3, "0 (greedy) or 0.001 to 1000"),
            ("top_k", 0 <= self.top_k < 2**31, "0 (off) or a positive whole number below 2^31"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "between 0 and max_new_tokens"),
            ("stop", all(self.stop), "texts of at least one character"),
        ]
        for name, holds, right in rules:
            if not holds:
                raise UserError(f"{name} = {getattr(self, name)!r} must be {right}")


@dataclass(eq=False)
class Request:
    """One draw from one prompt, whatever `params.n` and `params.seed` say: those are for `Generator.generate`.

    `seed` keys the draw's random stream (`stream_seed`); `tag` is the caller's own and comes back untouched.
    """

    prompt_ids: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    tag: Any = None


@dataclass(frozen=True)
class Completion:
    """One finished draw."""

    token_ids: list[int]  # includes the final EOS
    text: str  # without special tokens, cut before a stop text
    logprobs: list[float]  # of the raw model, at temperature 1, before any mask
    finish_reason: Literal["stop", "length", "cancelled"]
    proposal_logprobs: list[float] = field(default_factory=list, repr=False)  # as drawn: tempered and truncated
    request: Request | None = field(default=None, repr=False)


def stream_seed(*parts: object) -> int:
    """A stable 63-bit seed for one draw's random stream, from whatever identifies the draw."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(eq=False)
class _Slot:
    """A request in flight: where its prompt is cached and what it has drawn."""

    request: Request
    row: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    proposal_logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "cancelled"] | None = None
    stop_text: str | None = None  # the text up to a stop text that was found

    @property
    def suffix(self) -> int:
        """Suffix positions in the cache: the last prompt token is there once the first token is drawn."""
        return len(self.token_ids)


class Generator:
    """Draws completions from a model; see the head of this file.

    Args:
        model, tokenizer: as `minem.load` returns them. The model's weights are used in place: train it between two
            uses and the next draws come from the new weights.
        slots: sequences decoded at once; 64 on the CPU, 256 on a GPU by default.
        max_length: the longest prompt plus completion in tokens; what the model was made for by default.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, slots: int | None = None, max_length: int | None = None):
        limit = model.config.max_position_embeddings
        if slots is not None and not 1 <= slots <= MAX_SLOTS:
            raise UserError(f"slots = {slots} must be between 1 and {MAX_SLOTS}")
        if max_length is not None and not 2 <= max_length <= limit:
            raise UserError(f"max_length = {max_length} must be between 2 and the model's {limit} positions")
        self.model = model
        self.tokenizer = tokenizer
        self.slots = slots or (64 if model.device.type == "cpu" else 256)
        self.max_length = max_length or limit
        self._cache = KVCache(model.config, self.slots, model.device, model.dtype)
        self._stop_ids = torch.tensor(sorted(tokenizer.eos_ids), dtype=torch.int64, device=model.device)
        self._waiting: deque[Request] = deque()
        self._active: list[_Slot] = []  # position in this list = slot in the cache
        self._prompts: list[tuple[int, ...]] = []  # position in this list = prefix row in the cache
        self._finished: list[Completion] = []
        self._sampling: _SamplingTensors | None = None  # of the active slots; None when they changed

    # -------------------------------------------------------------------------------------------- whole batches

    def generate(
        self, prompts: Sequence[str] | Sequence[list[int]], params: SamplingParams | None = None
    ) -> list[list[Completion]]:
        """Draw `params.n` completions for each prompt.

        Args:
            prompts: token ids, used as given, or texts, encoded with exactly one BOS where the tokenizer has one.
            params: the same for all.
        Returns:
            for each prompt its n completions, in order. They depend on the seed and the prompt alone, not on its
            place in the list; a prompt that is listed twice gets further draws, not the same ones again.
        Raises:
            UserError: a prompt is empty, or does not fit max_length together with max_new_tokens.
        """
        params = params or SamplingParams()
        encoded = [self.tokenizer.encode(p) if isinstance(p, str) else [int(i) for i in p] for p in prompts]
        seen: Counter[tuple[int, ...]] = Counter()
        requests: list[list[Request]] = []
        for ids in encoded:
            first = seen[tuple(ids)]
            seen[tuple(ids)] += params.n
            seeds = [stream_seed(params.seed, ids, first + k) for k in range(params.n)]
            requests.append([Request(ids, params, seed) for seed in seeds])
        for request in (r for group in requests for r in group):
            self._check(request)  # all of them before any is drawn
        for request in (r for group in requests for r in group):
            self.submit(request)
        done = {completion.request: completion for completion in self}
        drawn = [[done.pop(request) for request in group] for group in requests]
        self._finished += done.values()  # of requests that were submitted before: still to be handed out
        return drawn

    # ---------------------------------------------------------------------------------------------- streaming form

    def submit(self, request: Request, first: bool = False) -> None:
        """Queue one draw, before all waiting ones if `first`. Its completion comes out of `step` or iteration.

        Raises:
            UserError: the prompt is empty, or does not fit max_length together with max_new_tokens.
        """
        self._check(request)
        if first:
            self._waiting.appendleft(request)
        else:
            self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Stop a draw; its completion, with what it had drawn, comes next with finish_reason "cancelled"."""
        if request in self._waiting:
            self._waiting.remove(request)
            self._finished.append(self._complete(_Slot(request, row=-1, finish_reason="cancelled")))
        for slot in self._active:
            if slot.request is request:
                slot.finish_reason = "cancelled"

    @property
    def idle_slots(self) -> int:
        """Slots that would stand empty in the next step."""
        busy = sum(slot.finish_reason is None for slot in self._active)
        return max(0, self.slots - busy - len(self._waiting))

    def __iter__(self) -> Iterator[Completion]:
        """Completions as they finish, until nothing is left; more may be submitted on the way."""
        while self._waiting or self._active or self._finished:
            yield from self.step()

    def step(self) -> list[Completion]:
        """Decode one token for every active slot, and return what finished. Nothing to do: an empty list."""
        with torch.no_grad():
            self._release()
            self._admit()
            if self._active:
                self._decode()
        self._release()
        finished, self._finished = self._finished, []
        return finished

    # ---------------------------------------------------------------------------------------------------- the parts

    def _check(self, request: Request) -> None:
        length, new = len(request.prompt_ids), request.params.max_new_tokens
        if not length:
            raise UserError("a prompt is empty; it needs at least one token")
        if length + new > self.max_length:
            raise UserError(
                f"a prompt of {length} tokens and max_new_tokens = {new} do not fit max_length = {self.max_length}"
            )
        vocabulary = self.model.config.vocab_size
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < vocabulary:
            raise UserError(f"a prompt holds a token id outside the model's vocabulary of {vocabulary}")

    def _release(self) -> None:
        """Turn finished slots into completions and close the gaps, so that active slots stay at the front."""
        for index in reversed(range(len(self._active))):
            slot = self._active[index]
            if slot.finish_reason is None:
                continue
            self._finished.append(self._complete(slot))
            last = self._active.pop()
            if last is not slot:
                self._active[index] = last
                self._cache.move_suffix(len(self._active), index, last.suffix)
            self._sampling = None

    def _complete(self, slot: _Slot) -> Completion:
        text = slot.stop_text
        if text is None:
            text = self.tokenizer.decode(slot.token_ids)
        assert slot.finish_reason is not None
        return Completion(slot.token_ids, text, slot.logprobs, slot.finish_reason, slot.proposal_logprobs, slot.request)

    def _admit(self) -> None:
        """Move waiting requests into free slots; prompts that no active slot needs make room for new ones."""
        free = self.slots - len(self._active)
        admitted = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        if not self._active:
            self._prompts.clear()  # whoever runs the generator dry may have changed the weights since
        if not admitted and self._sampling is not None:
            return  # the slots are as they were in the last step
        self._keep_prompts({slot.row for slot in self._active}, {tuple(r.prompt_ids) for r in admitted})
        if not admitted:
            return
        longest_prompt = max(len(r.prompt_ids) for r in admitted)
        self._cache.reserve(longest_prompt, max(r.params.max_new_tokens for r in admitted))
        rows = {prompt: row for row, prompt in enumerate(self._prompts)}
        new = []
        for request in admitted:
            prompt = tuple(request.prompt_ids)
            if prompt not in rows:
                rows[prompt] = len(self._prompts)
                self._prompts.append(prompt)
                new.append(rows[prompt])
            self._active.append(_Slot(request, rows[prompt]))
        self._sampling = None
        self._prefill([row for row in new if len(self._prompts[row]) > 1])

    def _keep_prompts(self, used_rows: set[int], wanted: set[tuple[int, ...]]) -> None:
        """Drop the prompts that are neither in use nor about to be; the others close up to the front."""
        keep = [row for row, prompt in enumerate(self._prompts) if row in used_rows or prompt in wanted]
        if len(keep) == len(self._prompts):
            return
        holes = sorted(set(range(len(keep))) - set(keep))
        moved = dict(zip((row for row in keep if row >= len(keep)), holes, strict=True))
        for source, target in moved.items():
            self._cache.move_prefix(source, target, len(self._prompts[source]) - 1)
            self._prompts[target] = self._prompts[source]
        del self._prompts[len(keep) :]
        for slot in self._active:
            slot.row = moved.get(slot.row, slot.row)

    def _prefill(self, rows: list[int]) -> None:
        """Write the prompts of these rows, all but their last tokens, in packs of about PREFILL_TOKENS."""
        packs: list[list[int]] = []
        size = PREFILL_TOKENS
        for row in rows:
            length = len(self._prompts[row]) - 1
            if size + length > PREFILL_TOKENS:
                packs.append([])
                size = 0
            packs[-1].append(row)
            size += length
        for pack in packs:
            prompts = [self._prompts[row][:-1] for row in pack]
            lengths = [len(p) for p in prompts]
            if sum(lengths) < MIN_ROWS:
                prompts.append((0,) * (MIN_ROWS - sum(lengths)))
                lengths.append(len(prompts[-1]))
            ids = torch.tensor([i for p in prompts for i in p], device=self.model.device)
            positions = torch.cat([torch.arange(n) for n in lengths]).to(self.model.device)
            self.model.hidden(ids, positions, Prefill(self._cache, pack, lengths, self.model.device))

    def _decode(self) -> None:
        """One token for every active slot: the model, the head, the draw, and who is finished by it."""
        active, device = self._active, self.model.device
        last = [s.token_ids[-1] if s.token_ids else s.request.prompt_ids[-1] for s in active]
        positions = [len(s.request.prompt_ids) - 1 + s.suffix for s in active]
        padding = [0] * max(0, MIN_ROWS - len(active))
        ids, at = torch.tensor([last + padding, positions + padding], device=device)
        attend = Decode(
            self._cache,
            prefix_rows=[s.row for s in active],
            prefix_lengths=[len(p) - 1 for p in self._prompts],
            drawn=[s.suffix for s in active],
            padding=len(padding),
        )
        logits = self.model.head(self.model.hidden(ids, at, attend))[: len(active)]
        if self._sampling is None:
            self._sampling = _SamplingTensors([s.request for s in active], device)
        drawn = self._sampling.draw(logits, [s.suffix for s in active], self._stop_ids)
        tokens, logprobs, proposal_logprobs = (x.tolist() for x in drawn)
        if not math.isfinite(sum(logprobs) + sum(proposal_logprobs)):
            raise GuardError("the model's logits are not finite, so nothing can be drawn: are its weights intact?")
        for slot, token, logprob, proposal in zip(active, tokens, logprobs, proposal_logprobs, strict=True):
            slot.token_ids.append(token)
            slot.logprobs.append(logprob)
            slot.proposal_logprobs.append(proposal)
            self._finish(slot)

    def _finish(self, slot: _Slot) -> None:
        params, drawn = slot.request.params, len(slot.token_ids)
        ended = slot.token_ids[-1] in self.tokenizer.eos_ids
        if ended or (params.stop and drawn >= params.min_new_tokens and self._stopped_by_text(slot)):
            slot.finish_reason = "stop"
        elif drawn >= params.max_new_tokens:
            slot.finish_reason = "length"

    def _stopped_by_text(self, slot: _Slot) -> bool:
        text = self.tokenizer.decode(slot.token_ids)
        found = [text.index(stop) for stop in slot.request.params.stop if stop in text]
        if found:
            slot.stop_text = text[: min(found)]
        return bool(found)


class _SamplingTensors:
    """The sampling parameters of the active slots as tensors, rebuilt when the slots change."""

    def __init__(self, requests: Sequence[Request], device: torch.device):
        def column(values: list[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        params = [r.params for r in requests]
        self.temperature = column([p.temperature for p in params], torch.float32)
        self.top_k = column([p.top_k for p in params], torch.int64)
        self.top_p = column([p.top_p for p in params], torch.float32)
        self.min_p = column([p.min_p for p in params], torch.float32)
        self.min_tokens = column([p.min_new_tokens for p in params], torch.int64)
        self.seeds = column([r.seed for r in requests], torch.int64)
        self.masks_eos = any(p.min_new_tokens for p in params)

    def draw(self, logits: Tensor, positions: list[int], stop_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, raw log-probabilities, log-probabilities as drawn), each [S]; positions count tokens drawn."""
        return sample(
            logits,
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.seeds,
            torch.tensor(positions, device=logits.device),
            stop_ids=stop_ids if self.masks_eos else None,
            min_tokens=self.min_tokens if self.masks_eos else None,
        )
