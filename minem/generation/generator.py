"""The generator: many draws at once from a KV cache whose slots refill as sequences finish.

    minem generate --prompt "..." --n 4              # or from Python:

    generator = minem.Generator(model, tokenizer)
    for draws in generator.generate(["..."], minem.SamplingParams(n=4, temperature=0.8)):
        print([completion.text for completion in draws])

A draw does not depend on what else is in the batch: it has a random stream of its own, keyed by its request and counted
by its tokens (`minem.kernels.sample`). Scheduling depends on tokens only, never on the clock, so the same start gives
the same schedule. The device side is minem/generation/engine.py.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from minem.device import free_memory, out_of_memory, release_cached_memory
from minem.errors import GuardError, Interrupted, UserError
from minem.generation.engine import Engine, Step
from minem.generation.kv_cache import cache_bytes, fitting_slots
from minem.generation.request import Completion, Request, SamplingParams, stream_seed
from minem.generation.sharing import Prompt
from minem.model.decoder import Model
from minem.model.tokenizer import Tokenizer

DEFAULT_SLOTS = {"cpu": 96, "cuda": 256}
REFILL = 32  # free slots are refilled once 1 in REFILL is free, or enough for all that wait


@dataclass(eq=False)
class _Sequence:
    """A request in flight: its slot, the row of its prompt, and what it has drawn."""

    request: Request
    slot: int = -1
    row: int = -1
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    proposal_logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "cancelled"] | None = None
    stop_text: str | None = None  # the text before a stop text, once one is found


class Generator:
    """Draws completions from a model, whose weights it uses in place: train them, and the next draws are from the new.

    slots: the most sequences decoded at once; 96 on the CPU, 256 on a GPU by default. Fewer are taken, and `on_note`
    is called with a sentence, if the cache for them does not fit into free memory.
    max_length: the longest prompt plus completion in tokens; the model's number of positions by default.
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
        if slots is not None and slots < 1:
            raise UserError(f"slots = {slots} must be at least 1")
        if max_length is not None and not 2 <= max_length <= limit:
            raise UserError(f"max_length = {max_length} must be between 2 and the model's {limit} positions")
        self.model = model
        self.tokenizer = tokenizer
        self.slots = slots or DEFAULT_SLOTS[model.device.type]
        self.max_length = max_length or limit
        self.on_note = on_note
        self.prefill_tokens = 0  # prompt tokens that went through the model so far
        self._lag = 1 if model.device.type == "cuda" else 0  # steps started before the oldest is read
        self._waiting: deque[Request] = deque()
        self._active: list[_Sequence] = []  # in the order of their slots
        self._started: deque[tuple[list[_Sequence], Step]] = deque()  # steps that are not read yet, oldest first
        self._finished: list[Completion] = []
        self._room = (1, 1)  # the longest prompt without its last token, and the most new tokens, of all requests
        self._engine: Engine | None = None  # made when it is first needed
        self._rows: dict[Prompt, int] = {}  # prompts in the cache, and their rows

    def generate(
        self, prompts: Sequence[str | list[int]], params: SamplingParams | None = None
    ) -> list[list[Completion]]:
        """Draw `params.n` completions for each prompt, in order.

        prompts: token ids, used as given, or texts, encoded with exactly one BOS if the tokenizer has one.
        The draws depend on the seed and the prompt alone, not on its place in the list; a prompt that is listed twice
        gets further draws, not the same ones again.
        Raises UserError if a prompt is empty or does not fit max_length together with max_new_tokens; nothing is drawn.
        """
        params = params or SamplingParams()
        seen: Counter[tuple[int, ...]] = Counter()
        requests = []
        for number, prompt in enumerate(prompts, start=1):
            try:
                ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
                self._check(Request(ids, params))
            except UserError as error:
                place = f"prompt {number} of {len(prompts)}: " if len(prompts) > 1 else ""
                raise UserError(f"{place}{error}") from error
            first = seen[tuple(ids)]
            seen[tuple(ids)] += params.n
            requests.append([Request(ids, params, stream_seed(params.seed, ids, first + k)) for k in range(params.n)])
        for request in (request for group in requests for request in group):  # all prompts are valid
            self.submit(request)
        done = {completion.request: completion for completion in self}
        drawn = [[done.pop(request) for request in group] for group in requests]
        self._finished = list(done.values())  # of requests that were submitted before
        return drawn

    def submit(self, request: Request, first: bool = False) -> None:
        """Queue one draw, ahead of all waiting ones if `first`, or raise UserError as `generate`."""
        self._check(request)
        prefix, suffix = self._room
        self._room = max(prefix, len(request.prompt_ids) - 1), max(suffix, request.params.max_new_tokens)
        (self._waiting.appendleft if first else self._waiting.append)(request)

    def cancel(self, request: Request) -> None:
        """Stop a draw; its completion, with the tokens drawn so far, comes next with finish_reason "cancelled"."""
        if request in self._waiting:
            self._waiting.remove(request)
            self._finished.append(self._complete(_Sequence(request, finish_reason="cancelled")))
        for sequence in self._active:
            if sequence.request is request and sequence.finish_reason is None:
                sequence.finish_reason = "cancelled"

    @property
    def idle_slots(self) -> int:
        """Slots that would be empty in the next step."""
        busy = sum(sequence.finish_reason is None for sequence in self._active)
        return max(0, self.slots - busy - len(self._waiting))

    def __iter__(self) -> Iterator[Completion]:
        """Completions as they finish, until nothing is left; more requests may be submitted meanwhile."""
        while self._waiting or self._active or self._finished:
            self._finished = self.step()
            while self._finished:  # one by one: a caller that leaves the loop early finds the others next time
                yield self._finished.pop(0)

    def step(self) -> list[Completion]:
        """Decode one token for every active slot, and return what finished. Without requests: an empty list.

        Any exception drops all requests in flight or waiting; the generator is then empty and may be used again.

        Raises Interrupted if memory runs out, GuardError if the model's logits are not finite, and UserError if not
        even one sequence fits into memory.
        """
        try:
            with torch.cuda.device_of(self.model.embed.weight):  # Triton, events and streams are the current device's
                self._advance()
        except BaseException as error:
            self._active, self._finished, self._room = [], [], (1, 1)
            self._waiting.clear()
            self.release()
            if not out_of_memory(error):
                raise
            lower = "continue with a lower run.slots, or start again with a lower sampler.max_new_tokens"
            raise Interrupted(f"out of memory while drawing in {self.slots} slots; {lower}") from error
        finished, self._finished = self._finished, []
        return finished

    def reserve(self, prompt: int, new: int) -> str:
        """Make room now for prompts of `prompt` tokens with `new` drawn ones, or raise UserError; the plan in words."""
        self._room = max(self._room[0], prompt - 1), max(self._room[1], new)
        cache, free = self._make_room().cache, free_memory(self.model.device)
        memory = f"{cache.bytes / 1e9:.2f} GB of cache, {free / 1e9:.1f} GB free beside it"
        return f"{self.slots} slots of {cache.prefix} + {cache.suffix} positions, {memory}"

    def release(self) -> None:
        """Free the cache and the graphs; the next request makes them again."""
        assert not self._active, "draws are in flight"
        self._engine = None
        self._rows.clear()
        self._started.clear()
        release_cached_memory(self.model.device)

    def _make_room(self) -> Engine:
        """The engine, made again if it lacks room for a request, with as many slots as fit into free memory."""
        if self._engine is not None and self._engine.cache.holds(*self._room):
            return self._engine
        self.release()  # the old cache must be free before the new one is planned
        config, dtype, free = self.model.config, self.model.dtype, free_memory(self.model.device)

        def need(slots: int) -> str:
            size = cache_bytes(config, dtype, slots, *self._room) / 1e9
            lengths = f"prompts of {self._room[0] + 1} and completions of {self._room[1]} tokens"
            return f"{slots} slot(s) for {lengths} need {size:.1f} GB of cache and {free / 1e9:.1f} GB are free"

        slots = fitting_slots(config, dtype, self.slots, *self._room, free)
        if cache_bytes(config, dtype, slots, *self._room) > free:
            raise UserError(f"{need(slots)}; lower max_new_tokens, or use a smaller model")
        if slots < self.slots:
            self.on_note(f"{need(self.slots)}: taking {slots} slot(s)")
            self.slots = slots
        self._engine = Engine(self.model, sorted(self.tokenizer.eos_ids), self.slots, *self._room)
        return self._engine

    def _check(self, request: Request) -> None:
        length, new = len(request.prompt_ids), request.params.max_new_tokens
        if not length:
            raise UserError("a prompt is empty; it needs at least one token")
        if length + new > self.max_length:
            limit = f"max_length = {self.max_length}"
            raise UserError(f"a prompt of {length} tokens and max_new_tokens = {new} do not fit {limit}")
        vocabulary = self.model.config.vocab_size
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < vocabulary:
            raise UserError(f"a prompt holds a token id outside the model's vocabulary of {vocabulary}")

    @torch.no_grad()
    def _advance(self) -> None:
        self._retire()
        if not self._active:
            self._started.clear()  # steps beyond the end of all sequences
            self._rows.clear()  # queue drained: weights may change, so cached prompts are stale
            if not self._waiting:
                return
            self._make_room()
        engine = self._engine
        assert engine is not None
        if engine.cache.holds(*self._room):  # else requests wait for the slots to empty: then the cache is made again
            self._admit(engine)
        slots, rows = [s.slot for s in self._active], [s.row for s in self._active]
        prompts = [s.request.prompt_ids for s in self._active]
        longest_suffix = max(len(s.token_ids) for s in self._active) + 1 + len(self._started)
        self._started.append((self._active, engine.start(slots, rows, prompts, longest_suffix)))
        if len(self._started) > self._lag:
            self._read(*self._started.popleft())
        self._retire()

    def _retire(self) -> None:
        """Turn finished sequences into completions."""
        self._finished += [self._complete(s) for s in self._active if s.finish_reason is not None]
        self._active = [s for s in self._active if s.finish_reason is None]

    def _complete(self, s: _Sequence) -> Completion:
        assert s.finish_reason is not None
        text = self.tokenizer.decode(s.token_ids) if s.stop_text is None else s.stop_text
        return Completion(s.token_ids, text, s.logprobs, s.finish_reason, s.proposal_logprobs, s.request)

    def _admit(self, engine: Engine) -> None:
        """Move waiting requests into free slots; cached prompts that no slot needs make room for new ones."""
        # Several at once: one prompt takes about as long to prefill as a few, and empty slots cost little meanwhile.
        enough = min(len(self._waiting), max(1, self.slots // REFILL))
        if not enough or self.slots - len(self._active) < enough:
            return
        free = sorted(set(range(self.slots)) - {sequence.slot for sequence in self._active})
        admitted = [_Sequence(self._waiting.popleft(), slot) for slot in free[: len(self._waiting)]]
        self.prefill_tokens += engine.prefill(self._take_rows(admitted), self._rows)
        engine.admit([sequence.slot for sequence in admitted], [sequence.request for sequence in admitted])
        self._active = sorted([*self._active, *admitted], key=lambda sequence: sequence.slot)

    def _take_rows(self, admitted: Sequence[_Sequence]) -> set[Prompt]:
        """Give each new sequence the row of its prompt. Returns the prompts that are new: the last ones of `_rows`."""
        used = {sequence.row for sequence in self._active}
        wanted = {tuple(sequence.request.prompt_ids) for sequence in admitted}
        self._rows = {prompt: row for prompt, row in self._rows.items() if row in used or prompt in wanted}
        free = iter(sorted(set(range(self.slots)) - set(self._rows.values())))
        new = wanted - self._rows.keys()
        for sequence in admitted:
            prompt = tuple(sequence.request.prompt_ids)
            if prompt not in self._rows:
                self._rows[prompt] = next(free)
            sequence.row = self._rows[prompt]
        return new

    def _read(self, sequences: Sequence[_Sequence], step: Step) -> None:
        """Append what a step drew, except for sequences that had finished before it was known; see which end by it."""
        for sequence, token, logprob, proposal in zip(sequences, *step.read(), strict=False):  # padding follows
            if sequence.finish_reason is not None:
                continue
            if not math.isfinite(logprob + proposal):
                raise GuardError("the model's logits are not finite, so nothing can be drawn: are its weights intact?")
            sequence.token_ids.append(int(token))
            sequence.logprobs.append(logprob)
            sequence.proposal_logprobs.append(proposal)
            params, drawn = sequence.request.params, len(sequence.token_ids)
            ended = sequence.token_ids[-1] in self.tokenizer.eos_ids
            if params.stop and not ended and drawn >= params.min_new_tokens:
                text = self.tokenizer.decode(sequence.token_ids)
                found = [text.index(stop) for stop in params.stop if stop in text]
                sequence.stop_text = text[: min(found)] if found else None
            if ended or sequence.stop_text is not None:
                sequence.finish_reason = "stop"
            elif drawn >= params.max_new_tokens:
                sequence.finish_reason = "length"
