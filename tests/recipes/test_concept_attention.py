"""ConceptAttention: its maps by the published lines, and an image that stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

import hookctl
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.prompts import encode
from hookctl.recipes import PAG, ConceptAttention
from tests import zoo
from tests.families.fingerprint import differences, fingerprint
from tests.families.subjects import error
from tests.recipes.runs import TWO, draw_two, made

CONCEPTS = ["cat", "an old bird", "background"]


def literal(pipe: Any, run: Any) -> Tensor:
    """Concepts through the text's weights of FLUX's double blocks, step by step.

    Each block's image tokens are those of the plain run. Returns the mean map,
    [concepts, prompts, tokens].
    """
    model = pipe.transformer
    seen: list[dict[str, Any]] = []
    handles = [
        block.register_forward_pre_hook(
            lambda module, args, kwargs, b=b: seen.append({"block": b, **kwargs}), with_kwargs=True
        )
        for b, block in enumerate(model.transformer_blocks)
    ]
    run()
    for handle in handles:
        handle.remove()
    texts = encode(pipe, CONCEPTS, {"max_sequence_length": 16}).sequence
    texts = texts[None, :, 0]  # the first T5 token of each
    first = model.context_embedder(texts.to(seen[0]["hidden_states"]))
    concepts, found = first, []
    for one in seen:
        block, image = model.transformer_blocks[one["block"]], one["hidden_states"]
        attn, temb = block.attn, one["temb"]
        rows = len(image)
        if one["block"] == 0:
            concepts = first.expand(rows, -1, -1)
        n = concepts.shape[1]
        x = block.norm1(image, emb=temb)[0]
        y, gate, shift, scale, gate_mlp = block.norm1_context(concepts, emb=temb)

        def heads(z: Tensor, count: int = attn.heads) -> Tensor:
            return z.unflatten(-1, (count, -1))

        q = attn.norm_added_q(heads(attn.add_q_proj(y)))
        k = torch.cat(
            [attn.norm_added_k(heads(attn.add_k_proj(y))), attn.norm_k(heads(attn.to_k(x)))], 1
        )
        v = torch.cat([heads(attn.add_v_proj(y)), heads(attn.to_v(x))], 1)
        cos, sin = one["image_rotary_emb"]
        text = len(cos) - x.shape[1]
        at = [0] * n + list(range(text, len(cos)))  # concepts stand at position 0
        k = apply_rotary_emb(k, (cos[at], sin[at]), sequence_dim=1)
        q = apply_rotary_emb(q, (cos[[0] * n], sin[[0] * n]), sequence_dim=1)
        p = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        out = torch.einsum("bhqk,bkhd->bqhd", p.softmax(-1), v).flatten(2)
        found.append(out)
        after = concepts + gate[:, None] * attn.to_add_out(out)
        ff = block.norm2_context(after) * (1 + scale[:, None]) + shift[:, None]
        concepts = after + gate_mlp[:, None] * block.ff_context(ff)
    return torch.stack(found)


@pytest.mark.slow
@torch.no_grad()
def test_as_published() -> None:
    """On FLUX, in float64: concepts' outputs and the image's, and the shares made of them."""
    case, pipe = zoo.PIPELINES["flux"], made("flux", torch.float64)
    plain = case.run(pipe, TWO, guidance=1.0)
    blocks = len(pipe.transformer.transformer_blocks)
    images: list[Tensor] = []
    handles = [
        block.attn.to_out[0].register_forward_pre_hook(lambda module, args: images.append(args[0]))
        for block in pipe.transformer.transformer_blocks
    ]
    concepts = literal(pipe, lambda: case.run(pipe, TWO, guidance=1.0))
    for handle in handles:
        handle.remove()
    scores = torch.einsum("sbcd,sbnd->sbcn", concepts, torch.stack(images))
    double = [f"transformer_blocks.{b}.attn" for b in range(blocks)]
    editor = ConceptAttention(CONCEPTS, paper=True, sites=double)
    with hookctl.control(pipe, editor):
        assert torch.equal(case.run(pipe, TWO, guidance=1.0), plain)
    want = scores.softmax(2).mean(0)
    assert len(scores) == 2 * blocks
    for c, concept in enumerate(CONCEPTS):
        got = editor.maps[concept]
        assert error(got.flatten(1), want[:, c]) < 1e-12
    assert F.cosine_similarity(want[0, 0], want[1, 0], dim=0) < 1  # images of their own


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "sd3"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_image_stays(name: str, guidance: float) -> None:
    """Bit for bit, under other editors too; the maps of all concepts share out each place."""
    case = zoo.PIPELINES[name]
    pipe, editor = case.make(), ConceptAttention(CONCEPTS)
    plain, before = case.run(pipe, TWO, guidance=guidance), fingerprint(pipe)
    with hookctl.control(pipe, editor) as session:
        assert torch.equal(case.run(pipe, TWO, guidance=guidance), plain)
        assert "ConceptAttention" in session.report() and "read" in session.report()
    assert not differences(before, fingerprint(pipe))
    maps = editor.maps
    assert list(maps) == CONCEPTS
    assert all(one.shape == (2, 8, 8) for one in maps.values())
    assert error(torch.stack(list(maps.values())).sum(0), torch.ones(2, 8, 8)) < 1e-6
    assert error(maps["cat"][0], maps["cat"][1]) > 1e-4
    if guidance > 1:
        pag = PAG(sites="joint")
        alone = draw_two(case, pipe, pag, guidance=guidance)
        again = ConceptAttention(CONCEPTS)
        assert torch.equal(draw_two(case, pipe, pag, again, guidance=guidance), alone)


def test_windows_cost_nothing_outside() -> None:
    case, pipe, calls = zoo.PIPELINES["sd3"], made("sd3"), []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    draw_two(case, pipe, ConceptAttention(CONCEPTS, start=0.5), steps=4)
    handle.remove()
    assert len(calls) == 4 + 2


def test_what_is_refused() -> None:
    for concepts in (["cat"], ["cat", "cat"], ["cat", " "], []):
        with pytest.raises(InputError, match="ConceptAttention: concepts=.*two or more"):
            ConceptAttention(concepts)
    with pytest.raises(InputError, match="nothing was drawn yet"):
        _ = ConceptAttention(CONCEPTS).maps
    for name, match in (
        ("sd15", "ConceptAttention: the text of StableDiffusionPipeline asks nothing"),
        ("wan", "ConceptAttention: the text of WanPipeline asks nothing"),
        ("qwen_image", "ConceptAttention widens the text.*SD3 and Flux"),
    ):
        pipe = zoo.PIPELINES[name].make()
        with pytest.raises(UnsupportedError, match=match):
            draw_two(zoo.PIPELINES[name], pipe, ConceptAttention(CONCEPTS))
    with pytest.raises(InputError, match="ConceptAttention: sites='self' holds"):
        draw_two(zoo.PIPELINES["sd3"], made("sd3"), ConceptAttention(CONCEPTS, sites="self"))
