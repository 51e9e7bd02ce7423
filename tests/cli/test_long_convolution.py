"""The long-convolution example at sizes that take seconds."""

from __future__ import annotations

import torch

from effk.demo.long_convolution import ByteModel, Settings, run, table

TINY = Settings(
    width=16,
    blocks=2,
    length=96,
    batch=2,
    steps=12,
    windows=2,
    calib_windows=2,
    errors=(0.05,),
    losses=(0.01,),
    decode=40,
    recompute=4,
)


def test_the_example_runs_and_reports() -> None:
    outcome = run(TINY)
    names = [version["name"] for version in outcome.versions]
    assert names[0] == "dense" and len(names) == 5
    dense = outcome.versions[0]
    assert all(
        version["loss"] < 5.6 and version["filter_bytes"] <= 1.1 * dense["filter_bytes"] for version in outcome.versions
    )
    assert outcome.decoding["agreement"] == 1.0 and outcome.decoding["with_state_per_second"] > 0
    lines = "\n".join(table(outcome))
    assert all(f"| {name} |" in lines for name in names) and "with state" in lines


def test_decoding_gives_what_reading_gives() -> None:
    torch.manual_seed(0)
    model = ByteModel(TINY).eval().requires_grad_(False)
    ids = torch.randint(256, (2, 60))
    whole = model(ids)
    logits, states = model.prefill(ids[:, :20], 40)
    torch.testing.assert_close(logits, whole[:, 19], rtol=1e-4, atol=1e-4)
    for t in range(20, 60):
        logits = model.step(ids[:, t], states)
        torch.testing.assert_close(logits, whole[:, t], rtol=1e-4, atol=1e-4)
