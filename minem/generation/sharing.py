"""Prompts that begin alike, as those with worked examples do, are computed once up to where they part.

    python -c "from minem.generation.sharing import waves; p = (7,) * 40; print(waves(*[{(*p, 1, 2), (*p, 3)}] * 2))"

What is shared depends on the prompts and their order alone, so the same schedule shares the same tokens.
"""

from collections.abc import Container, Iterable
from itertools import takewhile
from typing import NamedTuple

Prompt = tuple[int, ...]

SHARED = 32  # tokens: prompts that part earlier share nothing


class Part(NamedTuple):
    """A prompt whose keys and values before position `start` are those of another prompt."""

    prompt: Prompt
    source: Prompt
    start: int


def waves(prompts: Iterable[Prompt], new: Container[Prompt]) -> list[list[Part]]:
    """The new prompts in waves: each continues from a prompt in the cache or of a wave before.

    prompts: those in the cache, then the new ones. The last token of a prompt is not prefilled, so none shares it.
    """
    owners: dict[Prompt, Prompt] = {}  # first SHARED, 2 SHARED, ... tokens: the first prompt that begins with them
    depth: dict[Prompt, int] = {}
    found: list[list[Part]] = []
    for prompt in prompts:
        source = prompt
        for end in reversed(range(SHARED, len(prompt), SHARED)):
            source = owners.setdefault(prompt[:end], prompt)
            if source is not prompt:  # which owns the shorter ones as well, or knows who does
                break
        depth[prompt] = depth.get(source, 0) + 1 if prompt in new else 0
        if prompt in new:
            if depth[prompt] > len(found):
                found.append([])
            pairs = zip(prompt[:-1], source[:-1], strict=False) if source is not prompt else ()
            start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            found[depth[prompt] - 1].append(Part(prompt, source, start))
    return found
