"""Tokenizers and text encoders made on the spot.

The words of WORDS are one token each, "squirrel" and "spaceship" are two, every other word falls
into characters.
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = (
    *("a", "the", "of", "on", "and", "with", "in", "above", "below", "photo", "painting"),
    *("cat", "dog", "bird", "circle", "square", "red", "green", "blue", "blurry"),
)
MORE = (*WORDS, "sits", "grass")  # for texts alone: a pipeline's weights depend on their number
PIECES = (("squir", "rel"), ("space", "ship"))
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def _letters(text: str, end: str) -> list[str]:
    return [*text[:-1], text[-1] + end]


def _merges(known: tuple[str, ...]) -> list[tuple[str, str]]:
    """Left to right, letter by letter, each word of the vocabulary grows to one token."""
    merges: dict[tuple[str, str], None] = {}
    words = [_letters(word, "</w>") for word in known]
    for head, tail in PIECES:
        words += [_letters(head, ""), _letters(tail, "</w>")]
    for word in words:
        # As the encoder would, apply the merges that are there before adding new ones.
        for pair in merges:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == pair:
                    word[i : i + 2] = [word[i] + word[i + 1]]
                i += 1
        while len(word) > 1:
            merges[word[0], word[1]] = None
            word[:2] = [word[0] + word[1]]
    return list(merges)


@cache
def _clip_files(known: tuple[str, ...] = WORDS) -> tuple[str, str, int, int]:
    """vocab.json, merges.txt and the ids of the first and the last token."""
    merges = _merges(known)
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [chr(256 + i) for i in range(256 - len(plain))]  # byte-level stand-ins
    symbols = [*map(chr, plain), *rest]
    entries = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges), BOS, EOS]
    vocab = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    return json.dumps(vocab), "\n".join(lines) + "\n", vocab[BOS], vocab[EOS]


def clip_tokenizer(
    pad: str = EOS, length: int = 77, known: tuple[str, ...] = WORDS
) -> CLIPTokenizer:
    """A CLIP tokenizer of so many positions; SDXL's and SD3's second one pads with "!"."""
    vocab, merges, _, _ = _clip_files(known)
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": EOS,
        "pad_token": pad,
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(vocab, "utf-8")
        Path(folder, "merges.txt").write_text(merges, "utf-8")
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer


def clip_encoder(width: int = 32, pooled: int | None = None) -> Any:
    """A CLIP text encoder, with a projection of its pooled output where `pooled` says its size."""
    _, _, bos, eos = _clip_files()
    config = CLIPTextConfig(
        vocab_size=len(json.loads(_clip_files()[0])),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=pooled or width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    model = CLIPTextModel(config) if pooled is None else CLIPTextModelWithProjection(config)
    return model.eval()


def _t5_vocabulary(known: tuple[str, ...] = WORDS) -> list[tuple[str, float]]:
    letters = "".join(map(chr, range(33, 127)))
    pieces = [(f"▁{head}", tail) for head, tail in PIECES]
    return [
        *(("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -12.0)),
        *((f"▁{word}", -4.0) for word in known),
        *((piece, -5.0) for pair in pieces for piece in pair),
        *((letter, -10.0) for letter in letters),
    ]


def t5_tokenizer(length: int = 512, known: tuple[str, ...] = WORDS) -> Any:
    """A T5 tokenizer: Unigram with a space mark, </s> at the end, no <s> in front."""
    tokenizer = Tokenizer(Unigram(_t5_vocabulary(known), unk_id=2, byte_fallback=False))
    space = {"replacement": "▁", "prepend_scheme": "always"}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**space)]
    )
    tokenizer.decoder = decoders.Metaspace(**space)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    config = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": length,
        "extra_ids": 0,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(str(Path(folder, "tokenizer.json")))
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
        return T5TokenizerFast.from_pretrained(folder)


def t5_encoder(width: int = 32, multilingual: bool = False) -> Any:
    """A T5 encoder, or the UMT5 of the Wan models."""
    sizes = {
        "vocab_size": len(_t5_vocabulary()),
        "d_model": width,
        "d_kv": width // 2,
        "d_ff": 2 * width,
        "num_layers": 2,
        "num_heads": 2,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    if multilingual:
        return UMT5EncoderModel(UMT5Config(**sizes)).eval()
    return T5EncoderModel(T5Config(**sizes)).eval()
