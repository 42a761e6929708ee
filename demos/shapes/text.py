"""The text encoder: a small CLIPTextModel taught to read captions before any image is seen.

Linear heads ask each noun token for its object's attributes and relation, and the last token for
the whole scene. The causal mask then makes a noun carry its adjectives, so that cross-attention
finds an object under its noun.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .captions import parse, sample
from .tokenizer import POSITIONS
from .world import BACKGROUND_NAMES, COLOUR_NAMES, RELATIONS, SHAPES, WORDS

WIDTH = 128
# asked of a noun token: shape, colour, striped, size said, order, relation to the noun before
NOUN_CLASSES = (len(SHAPES), len(COLOUR_NAMES), 2, 3, 3, 1 + len(RELATIONS))
PAIRS = len(SHAPES) * len(COLOUR_NAMES)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A fresh encoder: token ids [batch, 32] -> states [batch, 32, 128]."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=384,
            num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=POSITIONS,
            projection_dim=WIDTH, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


class Words:
    """A fast whitespace tokenizer for captions of the world, equal to the real one on them."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self.ids = {word: tokenizer(word)["input_ids"][1] for word in WORDS}
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def __call__(self, texts: list[str]) -> Tensor:
        """Token ids, int64 [batch, 32], padded with eos."""
        out = torch.full((len(texts), POSITIONS), self.eos)
        for i, text in enumerate(texts):
            ids = [self.ids[w] for w in text.replace(",", " ,").split()]
            out[i, : len(ids) + 1] = torch.tensor([self.bos, *ids])
        return out


@dataclass
class Reading:
    """What a caption says: nouns [objects, 1 + 6] (token position and classes), background (3 when
    unsaid), and multi-hot [3 * pairs]: (shape, colour) is there, striped, second of a relation."""

    nouns: list[tuple[int, ...]]
    background: int
    pairs: Tensor


def read(text: str) -> Reading:
    """Parse a caption of the world into the targets of the heads."""
    request = parse(text)
    said = request.background
    background = BACKGROUND_NAMES.index(said) if said else len(BACKGROUND_NAMES)
    nouns: list[tuple[int, ...]] = []
    pairs = torch.zeros(3, PAIRS)
    for order, (m, relation) in enumerate(zip(request.mentions, request.relations, strict=True)):
        shape, colour = SHAPES.index(m.shape), COLOUR_NAMES.index(m.colour)
        striped = int(m.pattern == "striped")
        link = RELATIONS.index(relation) + 1 if relation else 0
        size = ("medium", "small", "large").index(m.size)
        nouns.append((m.index + 1, shape, colour, striped, size, order, link))
        pair = shape * len(COLOUR_NAMES) + colour
        pairs[:, pair] = torch.tensor([1.0, striped, link > 0])
    return Reading(nouns, background, pairs.flatten())


class Heads(nn.Module):
    """Linear questions to the states of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.noun = nn.Linear(WIDTH, sum(NOUN_CLASSES))
        self.scene = nn.Linear(WIDTH, len(BACKGROUND_NAMES) + 1 + len(RELATIONS) + 1 + 3 * PAIRS)

    def forward(self, states: Tensor, readings: list[Reading]) -> tuple[Tensor, float]:
        """States [batch, 32, 128] -> the loss and the share of nouns read without any mistake."""
        rows = torch.tensor([(b, *n) for b, r in enumerate(readings) for n in r.nouns])
        answers = self.noun(states[rows[:, 0], rows[:, 1]]).split(NOUN_CLASSES, dim=1)
        errors = [F.cross_entropy(a, rows[:, 2 + k]) for k, a in enumerate(answers)]
        loss = torch.stack(errors).sum()
        right = torch.stack([a.argmax(1) == rows[:, 2 + k] for k, a in enumerate(answers)])
        background = torch.tensor([r.background for r in readings])
        link = torch.tensor([max(n[-1] for n in r.nouns) for r in readings])
        pairs = torch.stack([r.pairs for r in readings])
        for at in (-1, -4):  # pads: whole-scene summary anywhere behind the sentence
            g, k, p = self.scene(states[:, at]).split((4, 5, 3 * PAIRS), dim=1)
            loss = loss + F.cross_entropy(g, background) + F.cross_entropy(k, link)
            loss = loss + 10.0 * F.binary_cross_entropy_with_logits(p, pairs)
        return loss, float(right.all(0).float().mean())


def train_text(
    tokenizer: CLIPTokenizer, seed: int, steps: int, log: Callable[[str], None]
) -> CLIPTextModel:
    """Teach a fresh encoder on captions alone (CPU, about two minutes for 500 steps)."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    encoder, heads, words = build_text_encoder(tokenizer), Heads(), Words(tokenizer)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.08)
    began = time.time()
    for step in range(steps):
        texts = [sample(rng, counts=(0.2, 0.4, 0.4))[1] for _ in range(64)]
        states = encoder(words(texts)).last_hidden_state
        loss, right = heads(states, [read(t) for t in texts])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            spent = time.time() - began
            log(f"text {step + 1}/{steps} loss {loss:.3f} nouns {right:.3f} {spent:.0f} s")
    return encoder.eval().requires_grad_(False)
