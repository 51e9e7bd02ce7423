"""The page of results: notes once, and times of disturbed runs marked."""

from __future__ import annotations

from pathlib import Path

from bench import results
from bench.measure import FIRST, FOREIGN
from bench.report import Row, write_jsonl


def run(m: int, foreign: str, note: str) -> list[Row]:
    """The rows of one run, as `python -m bench` writes them."""
    limit = Row("machine", FIRST, {}, "", "", 1, "CPU", "", None, None, 40.0 + m, None, None, None, None)
    said = [
        Row("machine", text, {}, "", "", 1, "CPU", "", *[None] * 7)
        for text in (f"{FOREIGN}: median 0.0%, worst block {foreign} of a core", note)
    ]
    shape = {"M": m, "N": 64, "K": 64, "bits": 4, "group": 128, "outliers": 0.0}
    row = Row("wq_linear", "int8, cold", shape, "bf16", "avx2", 1, "effk", "", 10.0 + m, 0.1, 1.0, 1.0, 0.5, None, 0.1)
    return [limit, *said, row]


def test_notes_come_once_and_disturbed_rows_are_marked(tmp_path: Path) -> None:
    file = tmp_path / "some_t1.json"
    write_jsonl(
        file, run(1, "0.0%", "faults: a 1, b 2") + run(2, "99.2%", "faults: a 1, c 3") + run(4, "19.9%", "x: y")
    )
    target = tmp_path / "README.md"
    results.write([file], target)
    text = target.read_text()
    assert "medians of 3 runs: DRAM read, before 42." in text
    assert text.count("faults:") == 1 and "- faults: a 1, b 2, c 3." in text and "- x: y." in text
    assert (
        f"- {FOREIGN} in the worst block of a run, % of a core: 0 to 99.2; above 20 in `some_t1.json` (1 of 3 runs)"
        in text
    )
    assert "| 11 |" in text and "| 12* |" in text and "| 14 |" in text
