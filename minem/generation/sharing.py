"""Prompts that begin alike, as those with worked examples do, are computed once up to where they part.

python -c "from minem.generation.sharing import waves; p = (7,) * 40; print(waves(*[{(*p, 1, 2), (*p, 3)}] * 2))"
"""

from collections.abc import Container, Iterable, Sequence
from itertools import takewhile
from typing import NamedTuple

Prompt = tuple[int, ...]

SHARED = 32  # tokens: prompts that part earlier share nothing


class Part(NamedTuple):
    """A prompt whose keys and values before position `start` are those of another prompt, or of none if that is 0."""

    prompt: Prompt
    source: Prompt
    start: int

    @property
    def ids(self) -> Prompt:
        """The tokens to compute: without the last one, which is decoded."""
        return self.prompt[self.start : -1]


def waves(prompts: Iterable[Prompt], new: Container[Prompt]) -> list[list[Part]]:
    """The new prompts in waves: each continues from a prompt in the cache or of a wave before, by their order alone.
    prompts: those in the cache, then the new ones."""
    owners: dict[Prompt, Prompt] = {}  # first SHARED, 2 SHARED, ... tokens: the first prompt that begins with them
    depth: dict[Prompt, int] = {}
    found: dict[int, list[Part]] = {}
    for prompt in prompts:
        source = prompt
        for end in reversed(range(SHARED, len(prompt), SHARED)):
            source = owners.setdefault(prompt[:end], prompt)
            if source is not prompt:  # then the shorter ones have an owner, too
                break
        depth[prompt] = depth.get(source, 0) + 1 if prompt in new else 0
        if prompt in new:
            start = _same(prompt, source) if source is not prompt else 0
            found.setdefault(depth[prompt], []).append(Part(prompt, source, start))
    return [found[number] for number in sorted(found)]


def alike(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with, without the last token of any, in whole steps of SHARED."""
    return _same(min(prompts), max(prompts)) // SHARED * SHARED


def _same(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a[:-1], b[:-1], strict=False)))
