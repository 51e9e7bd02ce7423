"""The mixture example at sizes that take seconds."""

from __future__ import annotations

import pytest

from effk.demo.moqe import SHAPES, Settings, recipes, run, table

TINY = Settings(width=32, hidden=48, experts=4, blocks=2, length=32, batch=4, steps=8, windows=4, new_bytes=4)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_example_runs_and_reports(shape: str) -> None:
    outcome = run(TINY, shapes=(shape,))
    versions = outcome.versions[shape]
    assert list(versions) == ["bf16", *recipes(shape)]
    four, three, two = (versions[f"experts {bits} bits"] for bits in (4, 3, 2))
    assert four.touched == three.touched == two.touched > versions["attention 2 bits"].touched > 0
    assert two.megabytes < three.megabytes < four.megabytes < versions["bf16"].megabytes
    assert 0 < versions["bf16"].nats < 5.7 and all(v.bytes_per_second > 0 for v in versions.values())
    if shape != "mixtral":  # the parts are disjoint
        dense = versions["dense feed-forward 2 bits"].touched
        assert dense > 0 and dense + four.touched + versions["attention 2 bits"].touched < 1
    assert all(f"| {shape} | {name} |" in "\n".join(table(outcome)) for name in versions)
