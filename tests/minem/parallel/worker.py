"""One of the processes that the tests of `launch` start.

python -m tests.minem.parallel.worker exchange FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from minem.errors import GuardError, MinemError, UserError
from minem.parallel.launch import joined
from minem.parallel.ranks import Ranks
from minem.parallel.signals import Stop

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def exchange(ranks: Ranks, stop: Stop, folder: Path) -> None:
    """All collectives, and an M-step of which a signal ends in a checkpoint."""
    found = {
        "total": ranks.total([1, ranks.rank / 4]),
        "any": [ranks.any(ranks.rank == 1), ranks.any(False)],
        "gather": ranks.gather({"rank": ranks.rank, "text": "x" * (1 + 5000 * ranks.rank)}),
        "broadcast": ranks.broadcast(["of", ranks.rank, None]),
        "listening": listening(os.getpid()) + listening(os.getppid()),
    }
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found))
    check_sharding(ranks)
    train(ranks, stop, folder)


def usage(ranks: Ranks, stop: Stop, folder: Path) -> None:
    raise UserError("found by all")


def listening(process: int) -> list[str]:
    """The addresses of a process's listening sockets, as /proc has them."""
    links = [link for link in Path(f"/proc/{process}/fd").iterdir() if link.is_symlink()]
    inodes = {os.readlink(link).removeprefix("socket:[").removesuffix("]") for link in links if link.exists()}
    lines = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()]
    return [line[1] for line in lines if line[3] == "0A" and line[9] in inodes]


def check_sharding(ranks: Ranks) -> None:
    import torch

    from minem.model.decoder import Model
    from minem.model.hf_config import ModelConfig
    from minem.parallel import sharding

    def loss(model: Model, rank: int) -> torch.Tensor:
        noise = torch.Generator().manual_seed(rank)
        ids, targets = torch.randint(64, (2, 9), generator=noise)
        return model(ids, lengths=[5, 4], rows=torch.arange(9), targets=targets)[0]

    torch.manual_seed(0)
    model = Model(ModelConfig.from_dict(CONFIG))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    sum(loss(model, rank) for rank in range(ranks.size)).backward()  # type: ignore[union-attr]
    size = sum(p.numel() for p in model.parameters())
    for replicate in (True, False):
        sharded = sharding.sharded_copy(model, ranks, replicate)
        assert sum(sharding.local(p).numel() for p in sharded.parameters()) == (size if replicate else size // 2)
        loss(sharded, ranks.rank).backward()
        for one, full in zip(sharded.parameters(), model.parameters(), strict=True):
            assert torch.equal(sharding.complete(one), full)
            torch.testing.assert_close(sharding.complete(one.grad), full.grad, rtol=1e-5, atol=1e-5)

    model.bfloat16().norm.requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    sharded = sharding.sharded_copy(model, ranks, replicate=False)
    for one, full in zip(sharded.parameters(), model.parameters(), strict=True):
        assert one.dtype == (torch.float32 if full.requires_grad else torch.bfloat16)
        sharding.assign(one.detach(), full.detach().float() + 1)
    sharding.gather_weights(sharded, model)
    for old, full in zip(before, model.parameters(), strict=True):
        assert torch.equal(full, (old.float() + 1).bfloat16() if full.requires_grad else old)
    sharding.scatter(model, sharded)
    assert all(
        torch.equal(sharding.complete(p), q) for p, q in zip(sharded.parameters(), model.parameters(), strict=True)
    )


def train(ranks: Ranks, stop: Stop, folder: Path) -> None:
    """Steps in lockstep until a signal; then the first process writes a checkpoint, which takes a while."""
    ready(ranks, folder)
    while not ranks.any(bool(stop)):
        time.sleep(0.02)
    if ranks.first:
        time.sleep(0.5)
        (folder / "checkpoint").touch()
    ranks.broadcast(None)
    stop.check("the M-step")


def sample(ranks: Ranks, stop: Stop, folder: Path) -> None:
    """The first process has finished its share and waits for the other."""
    ready(ranks, folder)
    if not ranks.first:
        work(stop)
    ranks.gather(None)


def guard(ranks: Ranks, stop: Stop, folder: Path) -> None:
    if not ranks.first:
        raise GuardError("found by one")
    ranks.gather(None)


def bug(ranks: Ranks, stop: Stop, folder: Path) -> None:
    if not ranks.first:
        raise KeyError("a bug of one")
    work(stop)


def killed(ranks: Ranks, stop: Stop, folder: Path) -> None:
    if not ranks.first:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.gather(None)


def stuck(ranks: Ranks, stop: Stop, folder: Path) -> None:
    """Does not look at the note of a signal."""
    ready(ranks, folder)
    time.sleep(100)


def ready(ranks: Ranks, folder: Path) -> None:
    ranks.any(True)
    (folder / f"{ranks.rank}.ready").write_text(str(os.getpid()))


def work(stop: Stop) -> None:
    while True:
        stop.check("the E-step")
        time.sleep(0.02)


def main(mode: str, folder: str) -> None:
    stop, code = Stop(), 0
    try:
        stop.at_work = True
        with stop.listening(), joined("cpu") as ranks:
            globals()[mode](ranks, stop, Path(folder))
    except (MinemError, KeyboardInterrupt) as error:
        print(f"minem: {str(error) or 'stopped'}", file=sys.stderr, flush=True)
        code = getattr(error, "exit_code", 3)
    sys.stdout.flush()
    os._exit(code)  # as minem/__main__.py does


if __name__ == "__main__":
    main(*sys.argv[1:])
