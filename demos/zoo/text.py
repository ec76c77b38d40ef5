"""Tokenizers that know exactly the words of the captions, and caption token tables."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

from demos.zoo import data

_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"
WORDS: list[str] = data.VOCABULARY
VOCABULARY_SIZE = 3 + len(WORDS)


def t5_tokenizer(length: int) -> T5Tokenizer:
    """A T5 tokenizer with one piece a word."""
    pieces = [(_PAD, 0.0), (_END, 0.0), (_UNKNOWN, 0.0), *(("▁" + w, -1.0) for w in WORDS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def clip_tokenizer(length: int) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges make every word of the captions one piece.

    Each word is split by the merges found so far, and the pieces left are merged from the left;
    later merges come last, so they cannot part an earlier word.
    """
    letters = sorted({letter for word in WORDS for letter in word})
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    ranks: dict[tuple[str, str], int] = {}
    for word in WORDS:
        parts = _merged([*word[:-1], word[-1] + "</w>"], ranks)
        while len(parts) > 1:
            ranks[parts[0], parts[1]] = len(ranks)
            pieces.append(parts[0] + parts[1])
            parts = _merged(parts, ranks)
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=list(ranks), model_max_length=length)


def _merged(parts: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding: the pair of the lowest rank first, wherever it stands."""
    while known := [pair for pair in itertools.pairwise(parts) if pair in ranks]:
        first, second = min(known, key=ranks.__getitem__)
        merged, index = [], 0
        while index < len(parts):
            pair = parts[index : index + 2] == [first, second]
            merged.append(first + second if pair else parts[index])
            index += 2 if pair else 1
        parts = merged
    return parts


def known_names(pipe: Any) -> list[str]:
    """The names that a pipeline was trained on: those that are one piece for its tokenizer."""
    pieces = pipe.tokenizer.get_vocab()
    return [name for name in data.NAMES if f"{name}</w>" in pieces or f"▁{name}" in pieces]


def encode(text: str, length: int) -> list[int]:
    """Ids of a caption as the T5 tokenizer gives them, padded to `length`."""
    ids = [3 + WORDS.index(word) for word in text.split()] + [1]
    return ids + [0] * (length - len(ids))


def empty(length: int) -> Tensor:
    """Ids of the empty prompt, (length,)."""
    return torch.tensor(encode("", length))


def t5_ids(captions: list[str], length: int) -> Tensor:
    """Ids of captions, (n, length)."""
    return torch.tensor([encode(caption, length) for caption in captions])


def token_table(length: int = 16) -> Tensor:
    """Ids of every caption of a clip: (names, colours, motions, length)."""
    return torch.stack(
        [
            torch.stack(
                [
                    t5_ids([data.caption(name, colour, m) for m in data.MOTION_NAMES], length)
                    for colour in data.COLOUR_NAMES
                ]
            )
            for name in data.NAMES
        ]
    )


def sheet_prompts(video: bool, count: int = 9) -> list[str]:
    """A few held-out captions, one for each motion in turn, for contact sheets."""
    held = data.combinations(video=video, held=True)
    if not video:
        return [data.caption(*entry) for entry in held[:: max(len(held) // count, 1)][:count]]
    chosen = []
    for index in range(count):
        motion = data.MOTION_NAMES[index % len(data.MOTION_NAMES)]
        entries = [entry for entry in held if entry[2] == motion]
        chosen.append(data.caption(*entries[(7 * index + 3) % len(entries)]))
    return chosen
