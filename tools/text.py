"""Real English with code in it, on every machine: the language reference that CPython ships for `help()`.

    train, held_out = blocks(tokenizer, length=128, seed=0)         # int64 tensors (n, length)

Some 465 000 characters in 79 topics. Topics quote each other ("compound" holds all of "if", "for", "try"), so topics
that share a paragraph are held out together or not at all: nothing in `held_out` was seen in training.
"""

import random
from pydoc_data.topics import topics

import torch

HELD_OUT = 0.1  # of all characters, at least; no group that would take it beyond twice that
PARAGRAPH = 60  # characters; shorter ones (headings, "Example:") are shared by chance


def blocks(tokenizer, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token blocks of equal length: (train, held_out), train in random order. The same for the same seed."""
    train, held_out = split(seed)
    train, held_out = cut(tokenizer, train, length), cut(tokenizer, held_out, length)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return train[order], held_out


def split(seed: int = 0) -> tuple[list[str], list[str]]:
    """Topic names: (train, held_out)."""
    size = {name: len(text) for name, text in topics.items()}
    wanted = HELD_OUT * sum(size.values())
    train, held_out, held = [], [], 0
    groups = related()
    random.Random(seed).shuffle(groups)
    for group in groups:
        characters = sum(size[name] for name in group)
        if held < wanted and held + characters <= 2 * wanted:
            held_out += group
            held += characters
        else:
            train += group
    return train, held_out


def related() -> list[list[str]]:
    """Topic names grouped so that no paragraph occurs in two groups."""
    group_of: dict[str, list[str]] = {}
    first_with: dict[str, str] = {}
    for name in sorted(topics):
        group_of[name] = [name]
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) < PARAGRAPH:
                continue
            mine, other = group_of[name], group_of[first_with.setdefault(words, name)]
            if mine is not other:
                mine += other
                group_of |= dict.fromkeys(other, mine)
    return sorted(sorted(group) for group in {id(group): group for group in group_of.values()}.values())


def cut(tokenizer, names: list[str], length: int) -> torch.Tensor:
    """The topics' tokens, an end-of-text token after each, in blocks; the rest that fills no block is left out."""
    tokens = []
    for name in names:
        tokens += tokenizer(topics[name], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    n = len(tokens) // length
    return torch.tensor(tokens[: n * length], dtype=torch.int64).view(n, length)
