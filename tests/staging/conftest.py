"""Toy base models of every family, as their makers publish them: one tensor per expert and projection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from tests.experts.families import TOKENS, tiny

FAMILIES = ("qwen3_next", "qwen3_moe", "qwen3_5_moe", "qwen3")


def toy(family: str, **changes: Any) -> Any:
    """Two layers in fp32."""
    if family != "qwen3":
        return tiny(family, **changes)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(Qwen3Config(**(sizes | changes)), dtype=torch.float32)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small products: several threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """base("qwen3_next"): its folder, made once per family and size."""
    made: dict[Any, Path] = {}

    def make(family: str, **changes: Any) -> Path:
        key = (family, *sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("bases") / family
            toy(family, **changes).save_pretrained(made[key])
            (made[key] / "tokenizer.json").write_text("{}")
            (made[key] / "chat_template.jinja").write_text("{{ messages }}")
        return made[key]

    return make


def logits(model: Any) -> torch.Tensor:
    """What a model says to the usual tokens."""
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits
