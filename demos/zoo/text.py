"""Tokenizers that know exactly the words of the captions, and caption token tables."""

from __future__ import annotations

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
    """A CLIP tokenizer whose merges build the words of the captions (most are one piece)."""
    specials = ["<|startoftext|>", "<|endoftext|>"]
    letters = sorted({letter for word in WORDS for letter in word})
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
            parts = [parts[0] + parts[1], *parts[2:]]
            if parts[0] not in pieces:
                pieces.append(parts[0])
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *specials])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def encode(text: str, length: int) -> list[int]:
    """Ids of a caption as the T5 tokenizer gives them, padded to `length`."""
    ids = [3 + WORDS.index(word) for word in text.split()] + [1]
    return ids + [0] * (length - len(ids))


def empty(length: int) -> Tensor:
    """Ids of the empty prompt, (length,)."""
    return torch.tensor(encode("", length))


def token_table(with_motion: bool, length: int = 16) -> Tensor:
    """Ids of every caption: (names, colours, motions, length), or without the motions axis."""
    motions: list[str | None] = [*data.MOTION_NAMES] if with_motion else [None]
    table = torch.tensor(
        [
            [[encode(data.caption(n, c, m), length) for m in motions] for c in data.COLOUR_NAMES]
            for n in data.NAMES
        ]
    )
    return table if with_motion else table[:, :, 0]


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
