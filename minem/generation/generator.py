"""The generator: many draws at once from a KV cache whose slots refill as sequences finish.

    python -m minem generate --prompt "..."          # or from Python:

    generator = minem.Generator(model, tokenizer)
    for draws in generator.generate(["..."], minem.SamplingParams(n=4, temperature=0.8)):
        print([completion.text for completion in draws])

One `step` is: admit waiting requests into free slots (prefilling prompts that are not in the cache yet), start the
decoding of one token for every active slot, and read what an earlier step drew. What runs on the device is
`minem.generation.engine`; the host keeps one step behind a GPU, and never waits for the step that it has just started.

Which tokens come out does not depend on who shares the batch: each draw has a random stream of its own, keyed by its
request and counted by its tokens (`minem.kernels.sample`). Scheduling depends on tokens only, never on the clock, so
the same start gives the same schedule.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from minem.device import free_memory, give_back, out_of_memory
from minem.errors import GuardError, UserError
from minem.generation.engine import Engine, Step
from minem.generation.kv_cache import MEMORY_SHARE, cache_bytes, fitting_slots
from minem.generation.request import Completion, Request, SamplingParams, stream_seed
from minem.model.decoder import Model
from minem.model.tokenizer import Tokenizer

MAX_SLOTS = 65_536
DEFAULT_SLOTS = {"cpu": 96, "cuda": 256}
REFILL = 32  # free slots are filled when they are one in so many, or enough for all that wait


@dataclass(eq=False)
class _Slot:
    """A request in flight: which slot it has, the row of its prompt, and what it has drawn."""

    request: Request
    index: int = -1
    row: int = -1
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    proposal_logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "cancelled"] | None = None
    stop_text: str | None = None  # the text up to a stop text that was found


class Generator:
    """Draws completions from a model; see the head of this file.

    Args:
        model, tokenizer: as `minem.load` returns them. The model's weights are used in place: train it between two
            uses and the next draws come from the new weights.
        slots: the most sequences decoded at once; 96 on the CPU, 256 on a GPU by default. `reserve` takes fewer where
            memory does not hold so many.
        max_length: the longest prompt plus completion in tokens; what the model was made for by default.
        on_note: told, in a sentence each, what had to be changed for want of memory.

    Attributes:
        slots: sequences decoded at once by now.
        prefill_tokens: prompt tokens that went through the model so far.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        slots: int | None = None,
        max_length: int | None = None,
        on_note: Callable[[str], None] = lambda note: None,
    ):
        limit = model.config.max_position_embeddings
        if slots is not None and not 1 <= slots <= MAX_SLOTS:
            raise UserError(f"slots = {slots} must be between 1 and {MAX_SLOTS}")
        if max_length is not None and not 2 <= max_length <= limit:
            raise UserError(f"max_length = {max_length} must be between 2 and the model's {limit} positions")
        self.model = model
        self.tokenizer = tokenizer
        self.slots = slots or DEFAULT_SLOTS[model.device.type]
        self.max_length = max_length or limit
        self.on_note = on_note
        self.prefill_tokens = 0
        self._lag = 1 if model.device.type == "cuda" else 0  # steps whose results are still to be read
        self._waiting: deque[Request] = deque()
        self._active: list[_Slot] = []  # in the order of their slots
        self._running: deque[tuple[list[_Slot], Step]] = deque()  # started and not read, oldest first
        self._finished: list[Completion] = []
        self._room = (1, 1)  # the longest prompt but for its last token, and the most new tokens, submitted so far
        self._engine: Engine | None = None  # made by the first request, or by `reserve`
        self._rows: dict[tuple[int, ...], int] = {}  # prompts in the cache, and their rows

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
            UserError: a prompt is empty, or does not fit max_length together with max_new_tokens; it says which one.
        """
        params = params or SamplingParams()
        seen: Counter[tuple[int, ...]] = Counter()
        requests: list[list[Request]] = []
        asked: Sequence[str | list[int]] = prompts
        for number, prompt in enumerate(asked, start=1):
            try:  # all of them before any is drawn
                ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
                self._check(Request(ids, params))
            except UserError as error:
                where = f"prompt {number} of {len(prompts)}: " if len(prompts) > 1 else ""
                raise UserError(f"{where}{error}") from error
            first = seen[tuple(ids)]
            seen[tuple(ids)] += params.n
            seeds = [stream_seed(params.seed, ids, first + k) for k in range(params.n)]
            requests.append([Request(ids, params, seed) for seed in seeds])
        own = {request for group in requests for request in group}
        done: dict[Request | None, Completion] = {}
        try:
            for group in requests:
                for request in group:
                    self.submit(request)
            for completion in self:
                done[completion.request] = completion
        finally:  # where this is interrupted, nobody will ask for the rest
            self._waiting = deque(request for request in self._waiting if request not in own)
            self._active = [slot for slot in self._active if slot.request not in own]
            # Those of requests that were submitted before are still to be handed out.
            self._finished = [c for c in (*done.values(), *self._finished) if c.request not in own]
        return [[done[request] for request in group] for group in requests]

    # ---------------------------------------------------------------------------------------------- streaming form

    def submit(self, request: Request, first: bool = False) -> None:
        """Queue one draw, before all waiting ones if `first`. Its completion comes out of `step` or iteration.

        Raises:
            UserError: the prompt is empty, or does not fit max_length together with max_new_tokens, or the two need
                more memory than there is.
        """
        self._room = self._check(request)
        if first:
            self._waiting.appendleft(request)
        else:
            self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Stop a draw; its completion, with what it had drawn, comes next with finish_reason "cancelled"."""
        if request in self._waiting:
            self._waiting.remove(request)
            self._finished.append(self._complete(_Slot(request, finish_reason="cancelled")))
        for slot in self._active:
            if slot.request is request and slot.finish_reason is None:
                slot.finish_reason = "cancelled"

    @property
    def idle_slots(self) -> int:
        """Slots that would stand empty in the next step."""
        busy = sum(slot.finish_reason is None for slot in self._active)
        return max(0, self.slots - busy - len(self._waiting))

    def __iter__(self) -> Iterator[Completion]:
        """Completions as they finish, until nothing is left; more may be submitted on the way."""
        while self._waiting or self._active or self._finished:
            self._finished = self.step()
            while self._finished:  # one by one: who leaves the loop early finds the others next time
                yield self._finished.pop(0)

    def step(self) -> list[Completion]:
        """Decode one token for every active slot, and return what finished. Nothing to do: an empty list.

        Whatever it raises, the draws in flight are not lost: they begin anew, and come out the same, in later steps.

        Raises:
            GuardError: the model's logits are not finite.
            UserError: not even one sequence fits into memory.
        """
        exhausted = False
        try:
            self._advance()
        except BaseException as error:
            exhausted = out_of_memory(error)
            if not exhausted:
                self._restart()
                raise
        if exhausted:  # and the error, which holds on to the memory of where it arose, is gone
            self._back_off()
        self._release()
        finished, self._finished = self._finished, []
        return finished

    # ------------------------------------------------------------------------------------------------------ memory

    def reserve(self, prompt: int, new: int) -> str:
        """Make room for prompts of `prompt` tokens with `new` drawn ones, in as many slots as memory holds.

        Requests make their own room; called before any, this says at start-up what a run will have.

        Returns:
            the plan in words: slots, positions, and bytes of the cache and of what is free.
        Raises:
            UserError: not even one such sequence fits.
        """
        self._room = self._fitting(prompt - 1, new)
        cache = self._ready().cache
        free = free_memory(self.model.device)
        return (
            f"{self.slots} slots of {cache.prefix} + {cache.suffix} positions, "
            f"{cache.bytes / 1e9:.2f} GB of cache, {free / 1e9:.1f} GB free beside it"
        )

    def release(self) -> int:
        """Give the cache and the graphs back, and say how many bytes they were; the next request makes them anew.

        Raises:
            RuntimeError: draws are in flight.
        """
        if self._active:
            raise RuntimeError("the generator cannot release its cache while draws are in flight")
        size = self._held()
        self._forget()
        return size

    def _ready(self) -> Engine:
        """The engine, with room for all that was submitted, and with fewer slots where memory is short."""
        engine, (prefix, suffix) = self._engine, self._room
        if engine is not None and prefix <= engine.cache.prefix and suffix <= engine.cache.suffix:
            return engine
        if engine is not None and self._cache_bytes(self.slots) <= MEMORY_SHARE * free_memory(self.model.device):
            engine.grow(prefix, suffix)
            return engine
        del engine  # what it holds must be free before the new one is planned
        self._restart()
        self._fit_slots()
        self._engine = Engine(self.model, sorted(self.tokenizer.eos_ids), self.slots, prefix, suffix)
        return self._engine

    def _fit_slots(self) -> None:
        free = free_memory(self.model.device)
        slots = fitting_slots(self.model.config, self.model.dtype, self.slots, *self._room, free)
        if slots < self.slots:
            self.on_note(
                f"{self.slots} slots for prompts of {self._room[0] + 1} and completions of {self._room[1]} tokens need "
                f"{self._cache_bytes(self.slots) / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: taking {slots} slots"
            )
            self.slots = slots

    def _held(self) -> int:
        return self._engine.cache.bytes if self._engine is not None else 0

    def _cache_bytes(self, slots: int, room: tuple[int, int] | None = None) -> int:
        return cache_bytes(self.model.config, self.model.dtype, slots, *(room or self._room))

    def _fitting(self, prefix: int, suffix: int) -> tuple[int, int]:
        """The room that is needed with these many positions, too. UserError: a slot of it is more than there is."""
        room = max(self._room[0], prefix), max(self._room[1], suffix)
        if room != self._room:  # else it has been seen to fit
            needed, free = self._cache_bytes(1, room), free_memory(self.model.device) + self._held()
            if needed > free:
                raise UserError(
                    f"a prompt of {prefix + 1} tokens and max_new_tokens = {suffix} need {needed / 1e9:.1f} GB of "
                    f"cache and {free / 1e9:.1f} GB are free; lower max_new_tokens, or take a smaller model"
                )
        return room

    def _restart(self) -> None:
        """Give the cache back, and put the draws in flight before all waiting ones: nothing is lost but time."""
        self._waiting.extendleft(slot.request for slot in reversed(self._active) if slot.finish_reason is None)
        self._active = [slot for slot in self._active if slot.finish_reason is not None]
        self._forget()

    def _forget(self) -> None:
        self._engine = None
        self._rows.clear()
        self._running.clear()
        give_back(self.model.device)

    def _back_off(self) -> None:
        """Memory ran out on the way: go on with half the slots.

        Raises:
            UserError: there was but one.
        """
        self._restart()
        if self.slots == 1:
            raise UserError(
                f"out of memory with one sequence at a time, a prompt of {self._room[0] + 1} and {self._room[1]} new "
                "tokens at most; lower max_new_tokens, or take a smaller model"
            )
        self.slots //= 2
        self.on_note(f"memory ran out; going on with {self.slots} slots, and what was in flight is drawn again")

    # ---------------------------------------------------------------------------------------------------- the parts

    def _check(self, request: Request) -> tuple[int, int]:
        """The room that is needed by now with this request. Raises UserError where it cannot be served."""
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
        return self._fitting(length - 1, new)

    @torch.no_grad()
    def _advance(self) -> None:
        self._release()
        if not self._active:
            self._running.clear()  # steps beyond the end of all draws
            self._rows.clear()  # whoever runs the generator dry may have changed the weights since
        if not self._active and not self._waiting:
            return
        engine = self._ready()
        self._admit(engine)
        self._running.append((self._active, self._start(engine)))
        if len(self._running) > self._lag:
            self._read(*self._running.popleft())

    def _release(self) -> None:
        """Turn finished slots into completions."""
        done = [slot for slot in self._active if slot.finish_reason is not None]
        if done:
            self._active = [slot for slot in self._active if slot.finish_reason is None]
            self._finished += map(self._complete, done)

    def _complete(self, slot: _Slot) -> Completion:
        text = slot.stop_text
        if text is None:
            text = self.tokenizer.decode(slot.token_ids)
        assert slot.finish_reason is not None
        return Completion(slot.token_ids, text, slot.logprobs, slot.finish_reason, slot.proposal_logprobs, slot.request)

    def _admit(self, engine: Engine) -> None:
        """Move waiting requests into free slots; prompts that no slot needs make room for new ones."""
        # Several at once: one prompt takes about as long to prefill as a few, and empty slots cost little meanwhile.
        enough = min(len(self._waiting), max(1, self.slots // REFILL))
        if not enough or self.slots - len(self._active) < enough:
            return
        free = sorted(set(range(self.slots)) - {slot.index for slot in self._active})
        admitted = [_Slot(self._waiting.popleft(), index) for index in free[: len(self._waiting)]]
        used = {slot.row for slot in self._active}
        # Before anything can run out of memory: what was taken from the queue must not be lost.
        self._active = sorted([*self._active, *admitted], key=lambda slot: slot.index)
        self.prefill_tokens += engine.prefill(self._take_rows(admitted, used))
        engine.admit([slot.index for slot in admitted], [slot.request for slot in admitted])

    def _take_rows(self, admitted: Sequence[_Slot], used: set[int]) -> dict[tuple[int, ...], int]:
        """Give each new request the row of its prompt. Returns the prompts that are not in the cache yet."""
        wanted = {tuple(slot.request.prompt_ids) for slot in admitted}
        self._rows = {prompt: row for prompt, row in self._rows.items() if row in used or prompt in wanted}
        free = iter(sorted(set(range(self.slots)) - set(self._rows.values())))
        new = {}
        for slot in admitted:
            prompt = tuple(slot.request.prompt_ids)
            if prompt not in self._rows:
                new[prompt] = self._rows[prompt] = next(free)
            slot.row = self._rows[prompt]
        return new

    def _start(self, engine: Engine) -> Step:
        """Have one token decoded for every active slot."""
        longest_prompt = max(len(slot.request.prompt_ids) for slot in self._active)
        longest_suffix = max(len(slot.token_ids) for slot in self._active) + 1 + len(self._running)
        slots, rows = [slot.index for slot in self._active], [slot.row for slot in self._active]
        return engine.start(slots, rows, longest_prompt, longest_suffix)

    def _read(self, slots: Sequence[_Slot], step: Step) -> None:
        """Take what a step drew, but for the slots that had finished before it was known."""
        for slot, token, logprob, proposal in zip(slots, *step.read(), strict=False):  # padding follows
            if slot.finish_reason is not None:
                continue
            if not math.isfinite(logprob + proposal):
                raise GuardError("the model's logits are not finite, so nothing can be drawn: are its weights intact?")
            slot.token_ids.append(int(token))
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
