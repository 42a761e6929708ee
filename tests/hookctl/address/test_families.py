"""Facts per family: rows, kinds, spans and words of pipelines that once were guessed wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from hookctl import AttentionCall, Editor, control
from hookctl.address import families, pipelines
from hookctl.address.rows import ALONE, BATCHED, SEQUENTIAL, Layout, branch_of, resolve_rows
from hookctl.address.sites import Grid, ImageTokens, Site, select
from hookctl.address.text import TextLayout, align
from hookctl.attention.spans import spans_of
from hookctl.errors import LayoutError, UnsupportedError
from tests import zoo
from tests.zoo.wild import WILD


class Seen(Editor):
    """Changes nothing; keeps the rows of every denoiser call and every attention call."""

    def __init__(self, sites: Any = None) -> None:
        self.sites = sites
        self.rows: list[list[str]] = []
        self.calls: list[AttentionCall] = []

    def denoise(self, state: Any, proceed: Any) -> Any:
        self.rows.append([f"{row.branch}{row.prompt}" for row in state.rows])
        return proceed()

    def attention(self, call: AttentionCall) -> None:
        self.calls.append(call)


def seen(name: str, sites: Any = None, prompts: int = 1) -> Seen:
    """What an editor sees of a run of a pipeline."""
    pipe, editor = WILD[name].make(), Seen(sites)
    with control(pipe, editor, strict=False):
        texts = ["a red cat", "a blue dog"][:prompts]
        WILD[name].draw(pipe, texts, ["blurry"] * prompts, list(range(prompts)))
    return editor


# -- rows ------------------------------------------------------------------------------------------


def test_every_denoiser_of_a_pipeline() -> None:
    pipe = WILD["WanPipeline of two denoisers"].make()
    assert [name for name, _ in families.denoisers_of(pipe)] == ["", "transformer_2"]
    assert families.denoiser_of(pipe) is pipe.transformer
    for module in (pipe.transformer, pipe.transformer_2):
        assert pipelines.layout_of(pipe, module) is SEQUENTIAL
    pipe.transformer = None
    assert families.denoisers_of(pipe) == (("", pipe.transformer_2),)


@pytest.mark.parametrize(
    "name", ["Lumina2Pipeline", "ChronoEditPipeline", "HunyuanSkyreelsImageToVideoPipeline"]
)
def test_the_negative_call_is_told(name: str) -> None:
    assert seen(name, "blocks0").rows[:2] == [["cond0"], ["uncond0"]]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("DreamLitePipeline", ["uncond0", "cond0"]),
        ("AnimateDiffPipeline", ["uncond0", "cond0"]),
        ("LuminaPipeline", ["cond0", "uncond0"]),
        ("StableCascadePriorPipeline", ["cond0", "uncond0"]),
    ],
)
def test_rows_of_one_call(name: str, rows: list[str]) -> None:
    assert seen(name, "self, joint").rows[0] == rows


def test_texts_of_frames_are_no_prompts() -> None:
    """FreeNoise encodes a text for each of several frames of one video."""
    case = zoo.PIPELINES["animatediff"]
    pipe, editor = case.make(), Seen("self")
    pipe.enable_free_noise(context_length=2, context_stride=1)
    with control(pipe, editor, strict=False):
        pipe(
            {0: "a red cat", 2: "a blue dog"},
            negative_prompt="blurry",
            num_frames=3,
            num_inference_steps=1,
            height=64,
            width=64,
            output_type="latent",
        )
    assert editor.rows[0] == ["uncond0", "cond0"]


def test_nothing_is_conditional_by_default() -> None:
    with pytest.raises(LayoutError, match="with guidance"):
        resolve_rows(2, BATCHED, prompts=2, guided=True)
    with pytest.raises(LayoutError, match="unknown"):
        resolve_rows(2, BATCHED)
    with pytest.raises(LayoutError, match="'pred_odd'"):
        branch_of("pred_odd")
    assert [r.branch for r in resolve_rows(2, ALONE)] == ["cond", "cond"]
    assert [r.branch for r in resolve_rows(2, BATCHED, guided=True)] == ["uncond", "cond"]
    assert Layout({1: ("cond",)}).known(True) == {1: ("cond",)}


def test_a_pipeline_that_is_not_declared() -> None:
    """Its rows are refused, and taken as they are given; a class derived from one is known."""
    made = zoo.PIPELINES["sd15"].make()

    class Odd:
        unet, scheduler = made.unet, made.scheduler

    class Derived(type(made)):  # type: ignore[misc]
        pass

    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 32)
    editor = Seen("self")
    with control(Odd(), editor), pytest.raises(LayoutError, match="Odd is no pipeline"):
        made.unet(sample, 500, text)
    with control(Odd(), editor, rows=("uncond", "cond")):
        made.unet(sample, 500, text)
    assert editor.rows == [["uncond0", "cond0"]]
    with control(made.unet, editor), pytest.raises(LayoutError, match="bare denoiser"):
        made.unet(sample, 500, text)
    assert pipelines.layout_of(Derived(**made.components)) is BATCHED


# -- kinds -----------------------------------------------------------------------------------------


def kinds(name: str) -> dict[str, int]:
    found = [s.kind for s, _ in families.describe_sites(families.denoiser_of(WILD[name].make()))]
    return {kind: found.count(kind) for kind in sorted(set(found))}


@pytest.mark.slow
def test_kinds_that_modules_do_not_show() -> None:
    found = kinds("Kandinsky3Pipeline")
    assert found["self"] == 3 and found["text"] == 1 and set(found) == {"cross", "self", "text"}
    for name in ("EasyAnimatePipeline", "NucleusMoEImagePipeline", "KandinskyV22Pipeline"):
        assert set(kinds(name)) == {"joint"}


def test_text_and_image_among_the_keys_of_one_call() -> None:
    call = seen("KandinskyV22Pipeline", "joint").calls[0]
    assert call.spans.text_keys == (0, 32)
    assert call.spans.image_keys == (32, 288) and call.spans.image_queries == (0, 256)
    assert tuple(call.require_grid("a test")) == (16, 16)
    call = seen("NucleusMoEImagePipeline", "joint").calls[0]
    assert call.spans.image_queries == call.spans.image_keys == (0, 16)
    assert call.spans.text_keys == (16, 32)


@pytest.mark.parametrize(
    "name",
    [
        *("Kandinsky5T2IPipeline", "Kandinsky6TI2VAPipeline"),
        *("Krea2Pipeline", "HunyuanVideoPipeline", "Lumina2Pipeline"),
    ],
)
def test_what_prepares_the_text_is_picked_by_name_alone(name: str) -> None:
    denoiser = families.denoiser_of(WILD[name].make())
    sites = [site for site, _ in families.describe_sites(denoiser)]
    refiners = {site.path for site in sites if site.kind == "text"}
    assert refiners and not families.softmax_free(denoiser)
    for selector in (None, "all", "self, joint", "!cross", "@1/2, blocks, other", ["all"]):
        try:
            picked = {site.path for site in select(sites, selector)}
        except Exception:  # none of such resolution
            continue
        assert not picked & refiners
    assert {site.path for site in select(sites, "text")} == refiners
    assert {site.path for site in select(sites, min(refiners))} == {min(refiners)}


def test_attention_for_a_module_without_a_processor() -> None:
    """Of SANA-WM's blocks some attend by a recurrence, which no edit can reach."""
    denoiser = families.denoiser_of(WILD["SanaWMPipeline"].make())
    sites = families.sites_of(denoiser)
    assert [(site.path, site.kind) for site in sites] == [
        ("blocks.0.cross_attn", "cross"),
        ("blocks.1.attn.attn", "self"),
        ("blocks.1.attn.cam_attn", "self"),
        ("blocks.1.cross_attn", "cross"),
    ]
    linear = ("blocks.0.attn.attn", "blocks.0.attn.cam_attn")
    assert families.softmax_free(denoiser) == linear
    assert [*families.blocks_of(denoiser, sites)] == ["blocks.1"]


# -- edit models -----------------------------------------------------------------------------------


def test_target_and_reference_of_kontext() -> None:
    call = seen("FluxKontextPipeline", "joint").calls[0]
    target, [reference] = call.spans.image_keys, call.references
    assert target == call.spans.image_queries and target[1] == reference.keys[0]
    assert tuple(call.grid) == (4, 4) and reference.grid.tokens == 256
    assert reference.keys[1] == call.k.shape[-2]


def test_target_and_references_of_flux2_klein() -> None:
    case = zoo.PIPELINES["flux2_klein"]
    pipe, editor = case.make(), Seen("joint")
    images = [Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 128), "blue")]
    with control(pipe, editor):
        case.run(pipe, "a red cat", image=images, steps=1)
    call = editor.calls[0]
    assert tuple(call.grid) == (8, 8)
    assert [tuple(r.grid) for r in call.references] == [(4, 4), (8, 4)]
    start, stop = call.spans.image_keys
    assert [r.keys for r in call.references] == [(stop, stop + 16), (stop + 16, stop + 48)]


def test_images_of_one_sequence() -> None:
    site = Site("x", "joint", "blocks", 0, 0)
    images = ImageTokens((Grid(8, 8), Grid(2, 2)), target=1)
    spans = spans_of(site, 7 + 4, 7 + 64 + 4, 7, "text_image", images)
    assert spans.text_keys == (0, 7) and spans.references == ((7, 71),)
    assert spans.image_keys == (71, 75) and spans.image_queries == (7, 11)


# -- words -----------------------------------------------------------------------------------------


def test_a_text_that_is_padded_on_the_left() -> None:
    pipe = WILD["CogView4Pipeline"].make()
    assert TextLayout(pipe).read("a red cat", 16).find("cat") == (15,)


def test_words_that_no_token_stands_for() -> None:
    class AudioLDM2Pipeline:
        tokenizer = object()

    with pytest.raises(UnsupportedError, match="tokens that a language model made"):
        TextLayout(AudioLDM2Pipeline())


def test_a_list_of_prompts_stays_as_it_was_given() -> None:
    """Z-Image writes its template into the list that it is given."""
    case, prompts = zoo.PIPELINES["z_image"], ["a red cat"]
    pipe = case.make()
    with control(pipe, Seen("joint")):
        pipe(prompts, num_inference_steps=1, height=128, width=128, output_type="latent")
    assert prompts == ["a red cat"]


def test_an_encoder_of_many_tokens_costs_no_square_of_them() -> None:
    pipe = zoo.PIPELINES["z_image"].make()
    pipe.tokenizer.model_max_length = 131_072
    texts = [TextLayout(pipe).read(prompt) for prompt in ("a red cat", "a blue dog")]
    token_map, _ = align(*texts, "replace")
    assert token_map.numel() < 1_000_000


def test_an_embedding_before_the_text() -> None:
    """Kandinsky 2.1: ten tokens of an image stand before the text, in the same keys."""
    call = seen("KandinskyPipeline", "joint").calls[0]
    keys, queries = call.k.shape[-2], call.q.shape[-2]
    assert call.spans.image_queries == (0, queries)
    assert call.spans.image_keys == (keys - queries, keys)
    assert call.spans.text_keys == (0, keys - queries) and keys - queries == 87
    text = TextLayout(WILD["KandinskyPipeline"].make()).read("a red cat")
    assert min(text.find("a")) >= 10
