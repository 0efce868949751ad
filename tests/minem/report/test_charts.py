"""accuracy.png, comparison.png and the SVG of a comparison; the charts of the report are tested with its page."""

from __future__ import annotations

import re
import xml.etree.ElementTree

from minem.report.charts import plot_accuracy, plot_spent, svg_spent
from tests.minem.made_runs import answer, make_run


def test_pictures_of_a_run_and_of_a_comparison(tmp_path):
    run = make_run(tmp_path / "run", base=[answer("a", "wrong")], last=[answer("a", "accepted")])
    pictures = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    plot_accuracy(run, pictures[0])
    spent = [
        {"task": task, "sampler": sampler, "curve": [(0, 0.5), (1000 + seed, 0.75)]}
        for task in ("toy <b>", "gsm8k")
        for sampler in ("rsm:8", "star:2")
        for seed in (0, 1)
    ]
    for path in pictures[1:]:
        path.write_bytes(plot_spent(spent))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert pictures[1].read_bytes() == pictures[2].read_bytes()  # the same picture, the same bytes
    svgs = svg_spent(spent)
    assert [one["title"] for one in svgs] == [f"{task}: accuracy against tokens spent" for task in ("toy <b>", "gsm8k")]
    for one in svgs:
        assert xml.etree.ElementTree.fromstring(one["svg"]).get("aria-label") == one["title"]
        assert "stroke: currentColor" in one["svg"]
        assert "#" not in re.sub(r'"#c|\(#c', "", one["svg"])  # no colour that a theme does not change
