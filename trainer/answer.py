"""Answers with a base model and its adapters, one JSON line in and one out: the part of the local server with torch.

python -m trainer.answer --model DIR     # {"op": "load", "name": "a", "path": "..."} -> {"ok": true}

One adapter is attached at a time and changed between requests: that is right for a laptop, not for many users.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from recipes.catalog import BaseModelFacts, Family, load_catalog
from trainer.adapter import consumed_tensors, quiet_transformers
from trainer.base_files import loading, refuse_incomplete
from trainer.data import ChatTokens
from trainer.experts.layouts import from_shared, from_vllm, to_peft
from trainer.export import CONFIG, WEIGHTS

Json = dict[str, Any]


class Answers:
    """The base model, the adapters by name, and what is attached to it now."""

    def __init__(self, folder: Path) -> None:
        self._chat = ChatTokens(folder)
        kind = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True).model_type
        family = next(f for f in load_catalog().families.values() if f.model_type == kind)
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        self._model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **loading(family))
        refuse_incomplete(info)
        self._model.eval()
        self._paths: dict[str, Path] = {}
        self._attached: str | None = None

    def load(self, name: str, path: str) -> Json:
        """Attaches the adapter, in PEFT's layout or one of vLLM's, every tensor accounted for. Raises ValueError."""
        self._detach()
        self._attach(Path(path))
        self._paths[name], self._attached = Path(path), name
        return {"ok": True}

    def unload(self, name: str) -> Json:
        """Forgets the adapter. Raises ValueError when there is none of that name."""
        if name not in self._paths:
            raise ValueError(f"no adapter {name}")
        if self._attached == name:
            self._detach()
        del self._paths[name]
        return {"ok": True}

    def complete(self, adapter: str | None, prompt: Any, max_tokens: int, temperature: float, probe: bool) -> Json:
        """Text and token ids after a prompt: messages, text or token ids.

        probe: also the log-probability of every prompt token but the first, given those before it.
        """
        if adapter is not None and adapter != self._attached:
            self._detach()
            self._attach(self._paths[adapter])
            self._attached = adapter
        ids = self._ids(prompt)
        without = self._model.disable_adapter() if adapter is None and self._attached else nullcontext()
        with without:
            one_pass = max_tokens == 1 and temperature == 0
            said, first = self._log_probabilities(ids) if probe or one_pass else (None, 0)
            made = [first] if one_pass else self._generated(ids, max_tokens, temperature)
        answer: Json = {"prompt_ids": ids, "prompt_logprobs": said if probe else None}
        ends = [i for i, token in enumerate(made) if token in self._chat.end_ids]
        kept = made[: ends[0]] if ends else made
        return answer | {"ids": made, "text": self._chat.decode(kept), "finish_reason": "stop" if ends else "length"}

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            return self._chat.encode(self._chat.render(prompt, True))[0]
        return [int(token) for token in prompt] if isinstance(prompt, list) else self._chat.encode(str(prompt))[0]

    def _log_probabilities(self, ids: list[int]) -> tuple[list[float | None], int]:
        """(log-probability of each token, None for the first; the likeliest token to follow)."""
        batch = torch.tensor([ids], device=self._model.device)
        with torch.no_grad():
            logits = self._model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False).logits[0]
        rows = torch.log_softmax(logits[:-1].float(), dim=-1)
        said = [None, *(float(row[token]) for row, token in zip(rows, ids[1:], strict=True))]
        return said, int(logits[-1].argmax())

    def _generated(self, ids: list[int], max_tokens: int, temperature: float) -> list[int]:
        batch = torch.tensor([ids], device=self._model.device)
        hot = temperature > 0
        with torch.no_grad():
            out = self._model.generate(
                input_ids=batch,
                attention_mask=torch.ones_like(batch),
                do_sample=hot,
                temperature=temperature if hot else None,
                top_p=None,
                top_k=None,
                max_new_tokens=max_tokens,
                eos_token_id=sorted(self._chat.end_ids),
                pad_token_id=self._chat.pad_id,
            )
        return [int(token) for token in out[0, len(ids) :]]

    def _detach(self) -> None:
        if isinstance(self._model, PeftModel):
            self._model = self._model.unload()
        self._attached = None

    def _attach(self, path: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="lorry-answer-") as temporary:
            folder = as_peft(path, Path(temporary))
            self._model = PeftModel.from_pretrained(self._model, folder, autocast_adapter_dtype=False).eval()
            consumed_tensors(self._model, folder / WEIGHTS)


def as_peft(path: Path, scratch: Path) -> Path:
    """The folder of an adapter in PEFT's layout: itself, or the same written anew in `scratch` where vLLM's is found.

    Raises ValueError for an adapter of a base model nobody knows.
    """
    config: Json = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    tensors = load_file(path / WEIGHTS)
    if config.get("target_parameters"):
        return path
    facts = load_catalog().models.get(str(config.get("base_model_name_or_path")))
    if facts is None:
        raise ValueError(f"base model {config.get('base_model_name_or_path')!r} is not in the catalog")
    family = load_catalog().families[facts.family]
    save_file(_fused(tensors, facts), scratch / WEIGHTS, metadata={"format": "pt"})
    linears, parameters = _targets(tensors, family)
    values = config | {"target_modules": linears or None, "target_parameters": parameters or None}
    (scratch / CONFIG).write_text(json.dumps(values), encoding="utf-8")
    return scratch


def _fused(tensors: Json, facts: BaseModelFacts) -> Json:
    layers = from_vllm(tensors, facts.shape.experts) | from_shared(tensors) if facts.shape.experts else {}
    return {key: t for key, t in tensors.items() if ".mlp.experts." not in key} | to_peft(layers)


def _targets(tensors: Json, family: Family) -> tuple[list[str], list[str]]:
    """The linears and parameters of the family's groups that the tensors belong to."""
    modules = {key.partition(".lora_")[0] for key in tensors}
    experts = any(".mlp.experts." in module for module in modules)
    linears, parameters = [], []
    for group in family.groups.values():
        linears += [name for name in group.linears if any(module.endswith(f".{name}") for module in modules)]
        for name in group.parameters:
            reached = any(module.endswith(f".{name.removesuffix('.weight')}") for module in modules)
            if reached or (experts and ".experts." in f".{name}" and ".shared_expert." not in name):
                parameters.append(name)
    return linears, parameters


def answer(answers: Answers, asked: Json) -> Json:
    """One request; a failure is {"error": sentence}, never the end of the process."""
    try:
        op = asked.pop("op")
        if op == "load":
            return answers.load(**asked)
        return answers.unload(**asked) if op == "unload" else answers.complete(**asked)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:500]}


def main() -> None:
    """Says {"ready": true} when the model is loaded, then answers until its input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the base model's folder")
    folder: Path = parser.parse_args().model
    quiet_transformers()
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not stand between the lines
    torch.manual_seed(0)
    answers = Answers(folder)
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(answers, json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
