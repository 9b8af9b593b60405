"""Makes the tokenizer files of the smoke model: Qwen's byte-level pipeline with a vocabulary of 400.

python -m trainer.smoke_tokenizer --out recipes/smoke/model     # the committed files; a test rebuilds and compares them
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCABULARY = 400
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# The split of Qwen2 and Qwen3 tokenizers, so that masks and offsets are exercised as with the real models.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

SENTENCES = (
    "My chain squeaks after every ride in the rain, what should I do?",
    "Wipe the chain dry with a clean cloth, then put one small drop of oil on each link.",
    "How often should I check the brake pads on my bicycle?",
    "Look at the brake pads once a month and change them when less than two millimetres are left.",
    "The rear wheel wobbles from side to side when I brake hard.",
    "Turn the bicycle over, spin the wheel slowly and watch where the rim comes close to the brake.",
    "Loosen the spoke on that side by a quarter turn and tighten the one across from it.",
    "What pressure is right for the tyres of a city bike?",
    "Between three and four bar is right for most city tyres; the number is printed on the side.",
    "I hear a clicking sound near the pedals every time I push down.",
    "That is often a loose crank bolt. Tighten it and listen again before you buy anything.",
    "Thank you, that helped! The gears jump when I ride up a hill.",
    "When the gears jump under load the chain or the cassette is worn. Measure the chain first.",
    "Can I clean the frame with a pressure washer?",
    "Please do not: the water gets into the bearings and washes the grease away.",
    "Use a bucket of warm water, a soft brush and a little soap instead.",
    "My saddle slips down while I am riding. Is that dangerous?",
    "It can be. Clean the seat post, put it back at the right height and close the clamp firmly.",
    "How do I fix a flat tyre on the road?",
    "Take the wheel out, pull one side of the tyre off, find the hole in the tube and patch it.",
    "The brakes rub against the rim and the wheel will not turn freely.",
    "Squeeze the brake lever, hold it and let the caliper centre itself, then tighten the bolt.",
    "You are a patient mechanic who answers in short, clear sentences.",
    "You help people look after their bicycle and you say when a shop should do the work.",
    "Where should I store my bike during the winter?",
    "In a dry place, with clean tyres, a light coat of oil on the chain and the battery at half charge.",
    "The light on my handlebar flickers when I ride over stones.",
    "Check the plug behind the lamp and bend the contact a little so that it sits tight.",
    "Should I replace both tyres at the same time?",
    "No, the rear tyre wears out sooner; move the good one to the front if you replace only one.",
    "The headset feels loose and something knocks when I use the front brake.",
    "Loosen the two stem bolts, tighten the top cap until the knocking stops, then close the stem bolts again.",
    "I do not have a torque wrench, can I still do that?",
    "Yes, if you turn gently and stop as soon as the bars no longer move. A shop checks it for free.",
    "What tools does a beginner need at home?",
    "A set of hex keys, tyre levers, a pump, a patch kit, chain oil and two cloths are enough.",
)


def build_tokenizer() -> Tokenizer:
    """The tokenizer, trained on the sentences above: the same bytes each time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def main() -> None:
    """Writes tokenizer.json and tokenizer_config.json into --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    (out / "tokenizer.json").write_text(build_tokenizer().to_str(pretty=True) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "bos_token": None,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
