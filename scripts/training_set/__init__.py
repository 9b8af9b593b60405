"""Turns a training set of any supported form into canonical train.jsonl and valid.jsonl, before a cent is spent.

report = prepare(Path("examples/bicycle-care.jsonl"), Path("data"), Data(), seed=1, tokenizer=None)
"""

from scripts.training_set.prepare import prepare

__all__ = ["prepare"]
