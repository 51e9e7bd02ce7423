"""Whatever stops a save, the directory holds one whole model: the old or the new."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import effk
from effk.hub import atomic
from effk.hub.checkpoint import check_file
from small_models import Nearest, small_model, token_batches

IDS = token_batches(1)[0]
SEED = 2026


def compressed(bits: int) -> torch.nn.Module:
    model = small_model("llama")
    effk.compress(model, Nearest(bits=bits, embedding_bits=8))
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


class Saver:
    """The other process (see ``saving_process.py``) and the directory it writes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        script = Path(__file__).parent / "saving_process.py"
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, script, directory],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def __call__(self, command: str) -> str:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def saver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saver]:
    saver = Saver(tmp_path_factory.mktemp("saved") / "model")
    yield saver
    saver.stop()


def test_kill_at_fifty_random_moments(saver: Saver) -> None:
    models = {bits: compressed(bits) for bits in (2, 4)}
    expected = {bits: logits(model) for bits, model in models.items()}
    start = time.perf_counter()
    for _ in range(3):
        effk.save(models[4], saver.directory)
    span = (time.perf_counter() - start) / 3
    random.seed(SEED)
    seen: list[int] = []
    for _ in range(50):
        pid = int(saver("loop"))
        time.sleep(random.uniform(0, 3 * span))
        os.kill(pid, signal.SIGKILL)
        assert saver("reap") == "reaped"
        got = logits(effk.load(saver.directory))
        seen += [bits for bits in (2, 4) if torch.equal(got, expected[bits])]
    assert len(seen) == 50, f"seed {SEED}: a load gave neither model"
    assert set(seen) == {2, 4}, "the kills must fall into both saves, or they show nothing"


def test_vanish_before_every_file_operation(saver: Saver) -> None:
    old, new = compressed(4), compressed(2)
    expected = {"old": logits(old), "new": logits(new)}
    outcomes: list[str] = []
    for step in range(1, 100):
        effk.save(old, saver.directory)
        status = saver(f"step {step}")
        got = logits(effk.load(saver.directory))
        outcomes += [name for name in expected if torch.equal(got, expected[name])]
        assert len(outcomes) == step, f"step {step}: neither the old nor the new model"
        if status == "0":
            break
        assert status == "9"
    assert status == "0" and step > 8, "the save has at least a write, two renames and a removal"
    assert outcomes == sorted(outcomes, reverse=True), "old until the one switch, new from then on"
    assert set(outcomes) == {"old", "new"}
    effk.save(new, saver.directory)
    leftovers = [path.name for path in saver.directory.iterdir() if path.name.endswith(atomic.TEMPORARY_SUFFIX)]
    assert not leftovers and len(list(saver.directory.glob("*.safetensors"))) == 1, "the next save cleans up"


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Writes beyond ``size`` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 5_000, 20_000])
def test_a_full_disk_leaves_the_old_model(size: int, tmp_path: Path) -> None:
    old, new = compressed(4), compressed(2)
    effk.save(old, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with files_limited_to(size), pytest.raises(OSError, match="expected to write a file, got: .*nothing was replaced"):
        effk.save(new, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert torch.equal(logits(effk.load(tmp_path)), logits(old))


def test_a_failing_config_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step before the switch fails: new weights lie there, nobody names them, the old model loads."""
    old, new = compressed(4), compressed(2)
    effk.save(old, tmp_path)

    def refuse(temporary: Path, final: Path) -> None:
        if final.name == "config.json":
            raise OSError("No space left on device")
        os.replace(temporary, final)

    monkeypatch.setattr("effk.hub.checkpoint.publish", refuse)
    with pytest.raises(OSError, match="No space left"):
        effk.save(new, tmp_path)
    monkeypatch.undo()
    assert torch.equal(logits(effk.load(tmp_path)), logits(old))
    effk.save(new, tmp_path)
    assert torch.equal(logits(effk.load(tmp_path)), logits(new))


def header_positions(weights: Path) -> range:
    return range(8 + int.from_bytes(weights.read_bytes()[:8], "little"))


def test_every_header_byte_is_guarded(tmp_path: Path) -> None:
    effk.save(compressed(4), tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["weights"]
    data = weights.read_bytes()
    random.seed(SEED)
    for position in header_positions(weights):
        flipped = bytearray(data)
        flipped[position] ^= 1 << random.randrange(8)
        weights.write_bytes(flipped)
        with pytest.raises(ValueError, match="the file is damaged"):
            check_file(weights, entry)
        if position % 200 == 0:  # the whole road, which builds a model first
            with pytest.raises(ValueError, match="the file is damaged"):
                effk.load(tmp_path)


def test_header_flips_without_a_hash_give_an_error_or_the_same_model(tmp_path: Path) -> None:
    """The checks behind the hash: ``save_pretrained`` of transformers writes files without one."""
    model = compressed(4)
    model.save_pretrained(tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["weights"] is None
    data, expected = weights.read_bytes(), logits(effk.load(tmp_path))
    random.seed(SEED)
    refused = 0
    positions = header_positions(weights)
    sample = [*range(16), *random.sample(positions[16:], 150)]
    for position in sample:
        flipped = bytearray(data)
        flipped[position] ^= 1 << random.randrange(8)
        weights.write_bytes(flipped)
        try:
            loaded = effk.load(tmp_path)
        except (ValueError, OSError, RuntimeError) as error:
            refused += 1
            assert str(error), position
        else:
            assert torch.equal(logits(loaded), expected), f"byte {position} (seed {SEED}) changed the model in silence"
    assert refused > len(sample) // 2
