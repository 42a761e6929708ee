"""A LoRA for the embedded pipeline: every object that a prompt names is drawn striped.

Nothing is trained. With c the text of a prompt and c' that of the same prompt whose objects are
all striped, token by token, the keys and values of cross-attention get the change of rank r that is
nearest to

    D = argmin sum ||(W + D) c - W c'||^2 + ||D c'||^2,

in closed form (as Orgad et al., arXiv 2303.08084, and Gandikota et al., arXiv 2308.14761, edit
models), c' being left as it is. Rank is cut by singular values.

    python -m hookctl.demos.striped demos/presets/striped.safetensors    # as it comes along
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hookctl
from hookctl.demos.shapes.captions import describe
from hookctl.demos.shapes.world import (
    BACKGROUND_NAMES,
    COLOUR_NAMES,
    RELATIONS,
    SHAPES,
    SIZE_NAMES,
    Thing,
)

RANK, PROMPTS, DAMPING = 16, 200, 1e-3
PATTERN = "striped"

State = dict[str, Tensor]  # "unet.<path>.lora_A.weight" -> factor, as diffusers stores LoRAs


def prompts(count: int, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Sentences about plain objects, and the same with all of them striped."""
    plain, striped = list[str](), list[str]()
    for i in range(count):
        shapes = rng.choice(SHAPES, 1 + i % 2, replace=False)
        said = [
            (str(s), str(rng.choice(COLOUR_NAMES)), str(rng.choice(SIZE_NAMES))) for s in shapes
        ]
        link, background = f" {rng.choice((*RELATIONS, 'and'))} ", ""
        if rng.random() < 0.7:
            background = f" on a {rng.choice(BACKGROUND_NAMES)} background"
        for texts, pattern in ((plain, "plain"), (striped, PATTERN)):
            things = (describe(Thing(s, colour, pattern, size)) for s, colour, size in said)
            texts.append(link.join(things) + background)
    return plain, striped


@torch.no_grad()
def pairs(pipe: Any, plain: Sequence[str], striped: Sequence[str]) -> tuple[Tensor, Tensor]:
    """c and c', [tokens of all prompts, channels]: padding beside padding, words beside words."""
    word = pipe.tokenizer(PATTERN, add_special_tokens=False).input_ids
    texts, ids = [], []
    for some in (plain, striped):
        given = pipe.tokenizer(
            list(some),
            padding="max_length",
            max_length=pipe.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        ids.append(given)
        texts.append(pipe.text_encoder(given)[0].float())
    kept = [torch.tensor([t not in word for t in row.tolist()]) for row in ids[1]]
    found = [(a[: int(k.sum())], b[k]) for a, b, k in zip(*texts, kept, strict=True)]
    return torch.cat([a for a, _ in found]), torch.cat([b for _, b in found])


def change(weight: Tensor, c: Tensor, wanted: Tensor, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """(A, B) of the change of a weight [outputs, channels]: that of the formula, cut to a rank."""
    c, wanted, weight = c.double(), wanted.double(), weight.double()
    gram = c.T @ c + wanted.T @ wanted
    gram += DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    whole = torch.linalg.solve(gram, c.T @ (wanted - c)).T
    u, s, v = torch.linalg.svd(weight @ whole, full_matrices=False)
    root = s[:rank].sqrt()
    return (root[:, None] * v[:rank]).float(), (u[:, :rank] * root).float()


def lora(pipe: Any, seed: int = 0, rank: int = RANK) -> State:
    """The adapter, for `pipe.load_lora_weights`."""
    c, wanted = pairs(pipe, *prompts(PROMPTS, np.random.default_rng([seed, 19])))
    state: State = {}
    for path, module in pipe.unet.named_modules():
        if path.endswith(("attn2.to_k", "attn2.to_v")):
            a, b = change(module.weight.detach().cpu(), c.cpu(), wanted.cpu(), rank)
            state[f"unet.{path}.lora_A.weight"] = a.contiguous()
            state[f"unet.{path}.lora_B.weight"] = b.contiguous()
    return state


def main(arguments: Sequence[str] | None = None) -> int:
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(prog="python -m hookctl.demos.striped", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("path", type=Path)
    path = parser.parse_args(arguments).path
    save_file({name: x.half() for name, x in lora(hookctl.load_shapes()).items()}, path)
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
