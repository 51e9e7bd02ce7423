"""Every command on a tiny model: what it does, and that its JSON is the whole of stdout."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
import torch
import typer
from transformers import MambaConfig, MambaForCausalLM

import effk as package
from cli.tiny import byte_tokenizer
from effk import isa
from effk.cli import bench
from effk.compress import NetworkPlan, Plan
from effk.nn import DyadLowRank

LLM_MQ = ("--calib-length", "64", "--calib-sequences", "4", "--set", "score_sequences=2")


def test_info_names_the_kernel_that_the_active_tier_uses(effk: Callable) -> None:
    record = effk("info", "--json").json
    assert record["isa"]["supported"] == isa.supported() and record["isa"]["active"] == isa.active()
    assert record["build"]["version"] == package.__version__
    with isa.use("scalar"):
        assert effk("info", "--json").json["kernels"]["wq_linear"] == {"int8": "scalar:int8", "fp32": "scalar:fp32"}
    text = effk("info")
    assert text.status == 0 and isa.active() in text.stdout


def test_compress_writes_a_model_with_plan_and_report(tiny: Path, effk: Callable, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "model"
    options = ("--bits", 3.4, "--compute", "int8", "--embedding-bits", 8, *LLM_MQ)
    ran = effk("compress", tiny, "--out", out, "--json", *options)
    assert ran.status == 0, ran.stderr
    record = ran.json
    assert record["recipe"]["name"] == "llm-mq" and record["recipe"]["score_sequences"] == 2
    assert 3.0 < record["report"]["nominal_bits"] <= 3.4
    assert json.loads((out / "report.json").read_text()) == record["report"]
    plan = Plan.load(out / "plan.json")
    assert {name: entry.bits for name, entry in plan.layers.items()} == {
        name: layer["bits"] for name, layer in record["report"]["layers"].items()
    }
    model = package.load(out)
    assert model.dtype == torch.bfloat16  # as the model on disk was
    assert (out / "tokenizer.json").is_file()


def test_an_edited_plan_is_applied(tiny: Path, effk: Callable, tmp_path: Path) -> None:
    planned = effk("compress", tiny, "--recipe", "rtn", "--bits", 4, "--plan-only", "--out", tmp_path / "plan")
    assert planned.status == 0, planned.stderr
    assert [path.name for path in (tmp_path / "plan").iterdir()] == ["plan.json"]
    layer = "model.layers.1.mlp.down_proj"
    edited = Plan.load(tmp_path / "plan" / "plan.json").edit(layer, bits=2)
    edited.save(tmp_path / "edited.json")
    ran = effk("compress", tiny, "--plan", tmp_path / "edited.json", "--out", tmp_path / "model", "--json")
    bits = {name: entry["bits"] for name, entry in ran.json["report"]["layers"].items()}
    assert bits.pop(layer) == 2 and set(bits.values()) == {4}


def test_outlier_columns_are_planned_and_logged(tiny: Path, effk: Callable, tmp_path: Path) -> None:
    options = ("--recipe", "quik", "--set", "outliers=8", "--calib-length", 32, "--calib-sequences", 4)
    table = effk("compress", tiny, *options, "--plan-only", "--out", tmp_path / "plan")
    assert table.status == 0 and "8 columns" in table.stdout and "8, x 8" in table.stdout, table.stderr
    ran = effk("compress", tiny, "--plan", tmp_path / "plan" / "plan.json", "--calib-length", 32, "--calib-sequences", 4,
               "--out", tmp_path / "model", "--json")  # fmt: skip
    assert ran.status == 0, ran.stderr
    columns = {name: entry["outlier_columns"] for name, entry in ran.json["report"]["layers"].items()}
    assert {c for name, c in columns.items() if not name.endswith("down_proj")} == {8}
    model = package.load(tmp_path / "model")
    assert all(model.get_submodule(name).outliers == count for name, count in columns.items())


def test_feed_forward_networks_become_dyad_layers(tiny: Path, effk: Callable, tmp_path: Path) -> None:
    options = ("--recipe", "dyad", "--set", "n=8", "--set", "variant=dt", "--calib-length", 32, "--calib-sequences", 16)
    table = effk("compress", tiny, *options, "--plan-only", "--out", tmp_path / "plan")
    assert table.status == 0 and "model.layers.0.mlp" in table.stdout, table.stderr
    path = tmp_path / "plan" / "plan.json"
    plan = NetworkPlan.from_json(path.read_text())
    assert plan.networks["model.layers.1.mlp"] == {"n": 8, "variant": "dt", "rank": 0, "bits": 0}
    path.write_text(
        dataclasses.replace(
            plan, networks={"model.layers.1.mlp": {"n": 4, "variant": "it", "rank": 2, "bits": 0}}
        ).to_json()
    )
    ran = effk("compress", tiny, "--plan", path, *options[6:], "--out", tmp_path / "model", "--json")
    assert ran.status == 0, ran.stderr
    report = ran.json["report"]
    assert list(report["networks"]) == ["model.layers.1.mlp"] and report["held_out"] == 2
    assert report["perplexity_before"] > 1 and report["perplexity_after"] > 1
    assert json.loads((tmp_path / "model" / "report.json").read_text()) == report
    layer = package.load(tmp_path / "model").model.layers[1].mlp.down_proj
    assert isinstance(layer, DyadLowRank) and layer.dyad.n_dyad == 4 and layer.a.dtype == torch.bfloat16
    refused = effk("compress", tiny, *options[:2], "--set", "n=5", *options[6:], "--out", tmp_path / "no")
    assert refused.status != 0 and "n: expected a divisor of both" in refused.stderr and not (tmp_path / "no").exists()


def test_plan_only_prints_a_plan_that_can_be_read_back(tiny: Path, effk: Callable) -> None:
    plain = effk("compress", tiny, "--recipe", "finequant", "--bits", 3, "--plan-only")
    as_json = effk("compress", tiny, "--recipe", "finequant", "--bits", 3, "--plan-only", "--json")
    assert Plan.from_json(plain.stdout).layers.keys() == as_json.json["plan"]["layers"].keys()


def test_calibration_files_change_the_result(tiny: Path, effk: Callable, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("zzz " * 500, encoding="utf-8")
    errors = []
    for extra in ((), ("--calib", text)):
        ran = effk("compress", tiny, "--bits", 2, "--out", tmp_path / "model", "--json", *LLM_MQ, *extra)
        errors.append([layer["error"] for layer in ran.json["report"]["layers"].values()])
    assert errors[0] != errors[1]


def test_eval_states_its_definition_and_matches_the_dense_model(tiny: Path, compressed: Path, effk: Callable) -> None:
    options = ("--context", 64, "--windows", 2)
    dense = effk("eval", tiny, "--json", "--dtype", "fp32", *options).json
    record = effk("eval", compressed, "--json", "--dtype", "fp32", *options).json
    assert "2 non-overlapping windows of 64 tokens" in record["definition"] and record["scored_tokens"] == 126
    # A random model's log-perplexity hardly moves under 8-bit weights: their relative error is below 1 %.
    assert abs(math.log(record["perplexity"] / dense["perplexity"])) < 0.01
    text = effk("eval", compressed, *options)
    assert record["definition"] in text.stdout and "perplexity" in text.stdout


def test_generate_is_greedy_and_repeatable(compressed: Path, effk: Callable) -> None:
    runs = [effk("generate", compressed, "--prompt", "hello", "--max-new-tokens", 5, "--json").json for _ in range(2)]
    assert runs[0]["text"] == runs[1]["text"]
    assert runs[0]["prompt_tokens"] == 5 and 1 <= runs[0]["new_tokens"] <= 5
    piped = effk("generate", compressed, "--prompt", "-", "--max-new-tokens", 5, "--json", stdin="hello")
    assert piped.json["text"] == runs[0]["text"]
    sampled = effk("generate", compressed, "--prompt", "hello", "--temperature", 50, "--seed", 1, "--json").json
    assert sampled["text"] != runs[0]["text"]


def test_generate_prints_text_as_it_comes_and_guesses_change_nothing(compressed: Path, effk: Callable) -> None:
    options = ("generate", compressed, "--prompt", "abcabcabc", "--max-new-tokens", 30, "--dtype", "fp32")
    plain = effk(*options, "--json").json
    assert plain["finish"] in ("stop", "length") and plain["decoded_tokens_per_second"] > 0
    shown = effk(*options, "--threads", 1)
    assert shown.stdout == plain["text"] + "\n" and "a second" in shown.stderr
    for kind in ("ngram", "exit:1"):
        guessed = effk(*options, "--json", "--speculate", kind).json
        assert guessed["text"] == plain["text"]
        assert guessed["drafted"] >= guessed["accepted"] >= 0
    stop = plain["text"][2:4]
    cut = effk(*options, "--json", "--stop", stop).json
    assert cut["text"] == plain["text"][: plain["text"].index(stop)] and cut["finish"] == "stop"
    sampled = [effk(*options, "--json", "--temperature", 2, "--top-k", 20, "--seed", seed).json for seed in (1, 1, 2)]
    assert sampled[0]["text"] == sampled[1]["text"] != sampled[2]["text"]


def test_generate_leaves_models_without_keys_and_values_to_transformers(effk: Callable, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4, eos_token_id=0)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ran = effk("generate", tmp_path, "--prompt", "hello", "--max-new-tokens", 4, "--json")
    assert ran.json["new_tokens"] >= 1 and "transformers generates" in ran.stderr


def test_serve_answers_and_stops_when_told(compressed: Path) -> None:
    command = [sys.executable, "-m", "effk", "serve", str(compressed), "--port", "0", "--rows", "2", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = next(line.split()[-1] for line in process.stderr if line.startswith("serving"))
            body = {"prompt": "abc", "max_tokens": 3, "model": compressed.name}
            for _ in range(300):  # the socket is bound before the server accepts
                try:
                    answer = httpx2.post(f"{url}/completions", json=body, timeout=60)
                    break
                except httpx2.ConnectError:
                    time.sleep(0.1)
            assert answer.status_code == 200 and answer.json()["usage"]["prompt_tokens"] == 3
            process.send_signal(signal.SIGTERM)
            assert process.stderr.read().strip() == "stopped" and process.wait(60) == 0
        finally:
            process.kill()


def test_the_small_benchmark_measures_every_width_and_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SHAPE", (64, 256))
    monkeypatch.setattr(bench, "ROTATION", 1 << 16)
    rows = bench.kernel_rows()
    assert [(row["weights"], row["form"]) for row in rows] == [("bf16", "torch")] + [
        (f"{bits} bits", form) for bits in (8, 4, 3, 2) for form in ("int8", "float")
    ]
    assert all(row["us"] > 0 and row["vs_bf16"] > 0 for row in rows)


def test_the_program_and_the_module_are_the_same_command() -> None:
    for command in ([str(Path(sys.executable).with_name("effk"))], [sys.executable, "-m", "effk"]):
        ran = subprocess.run([*command, "info", "--json"], capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stderr
        assert json.loads(ran.stdout)["build"]["version"] == package.__version__


def test_bench_passes_options_on_and_returns_the_rows(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "bench"
    folder.mkdir()
    (folder / "__main__.py").write_text(
        "import json, sys\n"
        "print('a table')\n"
        "target = sys.argv[sys.argv.index('--json') + 1]\n"
        "open(target, 'w').write(json.dumps({'op': sys.argv[2]}) + '\\n')\n",
        encoding="utf-8",
    )
    with pytest.raises(typer.Exit) as ended:
        bench._full(tmp_path, ["--op", "wq_linear"], True)
    assert ended.value.exit_code == 0
    output = capfd.readouterr()
    assert json.loads(output.out) == [{"op": "wq_linear"}] and "a table" in output.err
