"""accuracy.png: what EM did to a run's accuracy, iteration by iteration.

minem train            # ends by drawing runs/.../accuracy.png
"""

from __future__ import annotations

from pathlib import Path

from minem.run import RunDirectory


def plot_accuracy(run: RunDirectory, path: Path) -> None:
    """Validation accuracy per iteration with its 95 % Wilson band, and test accuracy of the base and the last model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    last = run.config.run.iterations
    iterations = list(range(last + 1))
    validation = [run.result(f"iter-{i:02d}/eval.validation") for i in iterations]
    test = {i: run.result(f"iter-{i:02d}/eval.test") for i in (0, last)}
    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), dpi=150)
    low, high = ([100 * v[bound] for v in validation] for bound in ("low", "high"))
    axes.fill_between(iterations, low, high, alpha=0.2, linewidth=0, label="95 % interval (Wilson)")
    axes.plot(iterations, [100 * v["accuracy"] for v in validation], marker="o", label="validation, greedy")
    if all(v["sampled"] is not None for v in validation):
        sampled = [100 * v["sampled"] for v in validation]
        axes.plot(iterations, sampled, linestyle="--", marker=".", label="validation, temperature 1")
    axes.errorbar(
        list(test),
        [100 * t["accuracy"] for t in test.values()],
        [
            [100 * (t["accuracy"] - t["low"]) for t in test.values()],
            [100 * (t["high"] - t["accuracy"]) for t in test.values()],
        ],
        fmt="s",
        capsize=4,
        color="black",
        label="test, greedy",
    )
    sampler = run.config.sampler
    axes.set_title(f"{run.config.task.name}: {sampler.name}, budget {sampler.budget}", parse_math=False)
    axes.set_xlabel("EM iteration (0: base model)")
    axes.set_ylabel("accuracy in %")
    axes.set_xticks(iterations)
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, format="png", metadata={"Software": None})
    pyplot.close(figure)
