"""The user's ways in: Generator, and model.generate with transformers' arguments."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import effk
from cli.tiny import byte_tokenizer, write_tiny
from effk.compress.passes.rtn import Rtn
from effk.runtime.attached import attach
from effk.runtime.generate import Generator
from small_models import VOCABULARY, small_model

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model with its tokenizer."""
    plain = write_tiny(tmp_path_factory.mktemp("plain"))
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    effk.compress(model, Rtn(bits=8, compute="float"))
    return effk.save(model, tmp_path_factory.mktemp("saved") / "model", TOKENIZER)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> PreTrainedModel:
    return effk.load(folder)


def same_model() -> tuple[PreTrainedModel, PreTrainedModel]:
    """transformers' own, and one with the runtime attached."""
    return small_model("llama"), attach(small_model("llama"))


IDS = torch.randint(3, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_new_tokens": 5},
        {"max_length": 20},
        {"max_new_tokens": 12, "eos_token_id": [30, 40, 50, 60, 70]},
        {"max_new_tokens": 12, "eos_token_id": 40, "min_new_tokens": 9, "pad_token_id": 1},
        {"max_new_tokens": 9, "repetition_penalty": 1.5},
        {"max_new_tokens": 6, "num_beams": 2},
        {"max_new_tokens": 6, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 6, "do_sample": True, "top_k": 1, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_generate_gives_what_transformers_gives(options: dict[str, Any]) -> None:
    theirs, ours = same_model()
    options = {"attention_mask": torch.ones_like(IDS), "pad_token_id": 0} | options
    assert torch.equal(ours.generate(IDS, **options), theirs.generate(IDS, **options))


def test_padded_prompts() -> None:
    theirs, ours = same_model()
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, :3], mask[0, :3] = 0, 0
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours.generate(ids, attention_mask=mask, max_new_tokens=6), expected)
    assert torch.equal(ours.generate(input_ids=ids, max_new_tokens=6), expected)  # the padding token says it as well
    config = copy.deepcopy(ours.generation_config)
    config.max_new_tokens = 6
    assert torch.equal(ours.generate(ids, config, attention_mask=mask), expected)


def test_streamers_get_the_prompt_and_every_token() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.got: list[list[int]] = []

        def put(self, value: torch.Tensor) -> None:
            self.got.append(value.flatten().tolist())

        def end(self) -> None:
            self.got.append([-1])

    theirs, ours = same_model()
    seen = []
    for model in (theirs, ours):
        streamer = Streamer()
        model.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), max_new_tokens=5, streamer=streamer)
        seen.append(streamer.got)
    assert seen[0] == seen[1]
    with pytest.raises(ValueError, match="streamer"):
        ours.generate(IDS, max_new_tokens=5, streamer=Streamer())


def test_sampling_follows_the_seed_of_torch() -> None:
    _, ours = same_model()

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return ours.generate(IDS, max_new_tokens=8, do_sample=True, temperature=2.0, num_return_sequences=2)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    assert run(1).shape == (6, 16)


def test_changed_weights_are_noticed_and_copies_stand_alone() -> None:
    theirs, ours = same_model()
    ours.generate(IDS, max_new_tokens=3)
    for model in (theirs, ours):
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(-3)
    expected = theirs.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False)
    assert torch.equal(ours.generate(IDS, max_new_tokens=6), expected)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin.generate(IDS, max_new_tokens=6, attention_mask=torch.ones_like(IDS)), expected)
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        ours.lm_head.weight.zero_()
    assert torch.equal(twin.generate(IDS, max_new_tokens=6), expected)


def test_loaded_models_use_the_runtime_and_transformers_ones_do_not(folder: Path, loaded: PreTrainedModel) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert "generate" not in vars(plain) and type(plain) is type(loaded)
    ids = TOKENIZER("hello there", return_tensors="pt")
    expected = plain.generate(**ids, max_new_tokens=10, do_sample=False)
    assert torch.equal(loaded.generate(**ids, max_new_tokens=10, do_sample=False), expected)
    text = TOKENIZER.decode(expected[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    generator = Generator(loaded, TOKENIZER)
    assert generator.decoder is loaded.generate.decoder
    assert generator.complete(["hello there"], max_new_tokens=10)[0].text == text
    stopped = loaded.generate(**ids, max_new_tokens=10, stop_strings=text[3:5], tokenizer=TOKENIZER)
    assert stopped.shape[1] < expected.shape[1]


def test_streams_are_the_completion_in_pieces(loaded: PreTrainedModel) -> None:
    generator = Generator(loaded, TOKENIZER)
    whole = generator.complete(["once upon"], max_new_tokens=30, temperature=1.0, seed=4, stop_ids=frozenset())[0]
    stream = generator.stream("once upon", max_new_tokens=30, temperature=1.0, seed=4, stop_ids=frozenset())
    pieces = list(stream)
    assert len(pieces) > 3 and "".join(pieces) == whole.text == stream.text
    assert stream.sequence.tokens == whole.tokens and whole.finish == "length"
    assert TOKENIZER.decode(whole.tokens) == whole.text


def test_leaving_a_stream_ends_it(loaded: PreTrainedModel) -> None:
    stream = Generator(loaded, TOKENIZER).stream("once", max_new_tokens=50, temperature=1.0, seed=1)
    pieces = iter(stream)
    next(pieces)
    pieces.close()
    assert stream.sequence.finish == "cancelled" and len(stream.sequence.tokens) < 50


def test_stop_strings_and_log_probabilities(loaded: PreTrainedModel) -> None:
    generator = Generator(loaded, TOKENIZER)
    options = {"max_new_tokens": 40, "temperature": 1.0, "seed": 2, "stop_ids": frozenset()}
    whole = generator.complete(["a b c"], **options)[0]
    stop = whole.text[10:12]
    cut = generator.complete(["a b c"], stop=stop, top=2, **options)[0]
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish == "stop"
    assert len(cut.logprobs) == len(cut.tokens)
    with torch.inference_mode():
        logits = loaded(torch.tensor([TOKENIZER("a b c")["input_ids"]])).logits[0, -1]
    value, best = cut.logprobs[0]
    # 64 products in bf16 are rounded differently for one and several tokens
    assert value == pytest.approx(logits.log_softmax(-1)[cut.tokens[0]].item(), abs=0.05) and len(best) == 2


def test_chats_need_a_template(loaded: PreTrainedModel) -> None:
    tokenizer = byte_tokenizer()
    chat = [{"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match="template"):
        Generator(loaded, tokenizer).encode(chat)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert Generator(loaded, tokenizer).encode(chat) == tokenizer("user: hi\n")["input_ids"]
    with pytest.raises(ValueError, match="messages"):
        tokenizer.chat_template = "{{ raise_exception('no') }}"
        Generator(loaded, tokenizer).encode(chat)


@pytest.mark.parametrize(
    "options, message",
    [({"max_new_tokens": 400}, "positions"), ({"temperature": -1}, "temperature"), ({"stop": ""}, "stop")],
)
def test_options_out_of_range_are_refused(loaded: PreTrainedModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Generator(loaded, TOKENIZER).complete(["x"], **options)
    with pytest.raises(TypeError, match="beams"):
        Generator(loaded, TOKENIZER).complete(["x"], beams=2)
