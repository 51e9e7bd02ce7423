"""The speed bars are judged as they are written, on made-up rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.bars import Verdict, judge
from bench.report import Row, write_jsonl

SHAPES = ((4096, 4096), (576, 1536))


def linear(
    backend: str,
    us: float,
    *,
    m: int = 1,
    bits: int = 4,
    shape: tuple[int, int] = SHAPES[0],
    case: str = "int8, cold",
    isa: str = "avx512vnni",
    roofline: float = 0.9,
    outliers: float = 0.0,
    threads: int = 1,
    match: float = 0.5,
) -> Row:
    n, k = shape
    keys = {"M": m, "N": n, "K": k, "bits": bits, "group": 128, "outliers": outliers}
    return Row(
        "wq_linear",
        case,
        keys,
        "float32",
        isa,
        threads,
        backend,
        "1",
        us,
        0.0,
        1.0,
        2e-3 * m * n * k / us,
        roofline,
        None,
        match,
    )


def verdicts(rows: list[Row], threads: int = 1) -> dict[str, Verdict]:
    return {v.name: v for v in judge(rows) if v.threads == threads}


def find(rows: list[Row], part: str, threads: int = 1) -> Verdict:
    (verdict,) = [v for name, v in verdicts(rows, threads).items() if part in name]
    return verdict


def test_the_worst_shape_decides() -> None:
    rows = [linear("effk", 100.0, roofline=0.95), linear("effk", 10.0, shape=SHAPES[1], roofline=0.84)]
    verdict = find(rows, "int8 4-bit: share of the DRAM")
    assert (verdict.outcome, verdict.worst.value, verdict.least) == ("fail", 0.84, 0.85)
    assert verdict.worst.where == "576x1536 M=1 4b"
    rows[1].roofline = 0.85
    assert find(rows, "int8 4-bit: share of the DRAM").outcome == "pass"


def test_two_threads_have_their_own_bar() -> None:
    rows = [linear("effk", 100.0, bits=2, roofline=0.89, threads=2)]
    assert find(rows, "int8 2-bit: share of the DRAM", threads=2).outcome == "fail"


def test_a_bar_without_rows_is_open_and_a_wrong_row_is_no_row() -> None:
    assert find([linear("effk", 1.0, match=1.2)], "int8 4-bit: share of the DRAM").outcome == "open"
    assert find([linear("effk", 1.0)], "int8 4-bit: x fastest competitor").outcome == "open"


def test_against_the_fastest_competitor() -> None:
    rows = [linear("effk", 100.0), linear("x", 120.0), linear("y", 114.0)]
    assert find(rows, "M=1 int8 4-bit: x fastest competitor").outcome == "fail"
    assert find(rows, "never slower than a competitor").outcome == "pass"
    rows[2].us = 115.0
    assert find(rows, "M=1 int8 4-bit: x fastest competitor").outcome == "pass"


def test_the_headline_tier_is_judged_and_avx2_is_reported() -> None:
    rows = [linear("effk", 100.0, roofline=0.9), linear("effk", 300.0, isa="avx2", roofline=0.3)]
    assert find(rows, "int8 4-bit: share of the DRAM").outcome == "pass"
    assert find(rows, "AVX2 tier reported").outcome == "pass"
    assert find(rows[:1], "AVX2 tier reported").outcome == "open"


def test_float_form_against_torch_int4() -> None:
    rows = [
        linear("effk", 100.0, m=32, case="float, cold"),
        linear("torch int4pack", 199.0, m=32, case="float, g128, cold"),
    ]
    assert find(rows, "M=32 float 4-bit").outcome == "fail"
    rows[1].us = 200.0
    assert find(rows, "M=32 float 4-bit").outcome == "pass"


def test_share_of_the_measured_peak() -> None:
    row = linear("effk", 1000.0, m=32)
    peak = Row(
        "machine", "int8 peak", {}, "", "avx512vnni", 1, "cpu", "", None, None, None, row.gflops / 0.7, None, None, None
    )
    assert find([row, peak], "share of the int8 peak").outcome == "pass"
    peak.gflops *= 1.01
    assert find([row, peak], "share of the int8 peak").outcome == "fail"


def test_plain_int8_linear() -> None:
    rows = [linear("effk", 100.0, m=16), linear("torch dynamic int8 onednn", 99.0, m=16, bits=8, case="int8, t, cold")]
    assert find(rows, "x plain int8 linear").outcome == "fail"


def test_outliers_cost_less_than_15_percent() -> None:
    rows = [linear("effk", 100.0), linear("effk", 114.0, case="int8, 0.5% outliers, cold", outliers=0.005)]
    assert find(rows, "0.5 % outliers").outcome == "pass"
    rows[1].us = 116.0
    assert find(rows, "0.5 % outliers").outcome == "fail"


def test_fewer_bits_are_faster() -> None:
    rows = [linear("effk", us, bits=bits) for bits, us in ((2, 10.0), (3, 11.0), (4, 12.0), (8, 13.0))]
    assert find(rows, "time of the next width").outcome == "pass"
    rows[1].us = 12.5
    verdict = find(rows, "time of the next width")
    assert (verdict.outcome, verdict.worst.where) == ("fail", "4096x4096 M=1 3b")


def test_whole_model() -> None:
    def row(case: str, us: float, backend: str = "effk") -> Row:
        return Row(
            "runtime", case, {"model": "m"}, "float32", "avx2", 1, backend, "1", us, 0.0, None, None, 0.7, None, 0.1
        )

    rows = [
        row("decode, bf16", 30.0, "torch eager"),
        row("decode, Q4_0", 4.0, "llama.cpp"),
        row("decode, rtn 4.00 bits, int8", 3.0),
        row("step, rtn 4.00 bits, int8", 2.8),
        row("batch, rtn 4.00 bits, int8", 0.8),
        row("decode, rtn 4.00 bits, float", 4.5),
        row("decode, llm-mq 4.00 bits, int8", 3.0),
        row("decode, llm-mq 3.00 bits, int8", 2.5),
        row("prefill, bf16", 3.0, "torch eager"),
        row("prefill, Q4_0", 2.0, "llama.cpp"),
        row("prefill, rtn 4.00 bits, int8", 1.25),
    ]
    for name, value in (
        ("4 bits int8: x llama", 4 / 3),
        ("4 bits float: x llama", 4 / 4.5),
        ("prompt of 512", 1.6),
        ("decode, llm-mq: x PyTorch", 10),
        ("time at 4 bits / at 3 bits", 1.2),
        ("share of the operation", 2.8 / 3),
        ("share of the measured bandwidth", 0.7),
        ("8 sequences", 3.75),
    ):
        verdict = find(rows, name)
        assert verdict.worst.value == pytest.approx(value), name
        assert verdict.outcome == ("pass" if verdict.worst.value >= verdict.least else "fail")
    assert find(rows, "8 sequences").outcome == "fail"


@pytest.mark.parametrize(("roofline", "code"), [(0.99, 0), (0.1, 1)])
def test_command(tmp_path: Path, roofline: float, code: int) -> None:
    write_jsonl(tmp_path / "rows.json", [linear("effk", 100.0, roofline=roofline)])
    result = CliRunner().invoke(app, ["--bars", str(tmp_path / "rows.json")])
    assert result.exit_code == code, result.output
    assert "bars hold" in result.output
