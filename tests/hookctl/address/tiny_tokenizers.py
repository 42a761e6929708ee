"""Tokenizers of CLIP's and T5's kind, built in memory."""

from __future__ import annotations

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, T5Tokenizer

KNOWN = "a the cat dog sits on grass red blue circle square and above with".split()


def clip_tokenizer(length: int = 24) -> CLIPTokenizer:
    """Known words are one token each, any other word one token per byte."""
    letters = sorted(ByteLevel.alphabet())
    entries = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in KNOWN:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.append((pieces[-2], pieces[-1]))
            pieces[-2:] = [pieces[-2] + pieces[-1]]
            entries.append(pieces[-1])
    entries += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    unique = list(dict.fromkeys(merges))
    return CLIPTokenizer(vocab=vocab, merges=unique, model_max_length=length)


def t5_tokenizer(length: int = 16) -> T5Tokenizer:
    """Some words, letters, no beginning token, and <unk> for the rest."""
    words = [("▁" + word, -2.0) for word in KNOWN]
    letters = [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz,."]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    return T5Tokenizer(vocab=[*special, *words, *letters], extra_ids=0, model_max_length=length)
