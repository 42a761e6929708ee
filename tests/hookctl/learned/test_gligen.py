from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionGLIGENPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file

import hookctl
from hookctl.errors import InputError
from hookctl.learned.files import Checkpoint
from hookctl.learned.gligen import GLIGEN, GLIGENNetwork, build
from hookctl.learned.gligen_stem import Inpainting, Stem
from hookctl.learned.grounding import Fade, Layout
from hookctl.learned.loading import load
from hookctl.learned.modules.convnext import ConvNeXt
from hookctl.learned.modules.gated_attention import GatedSelfAttention
from hookctl.learned.modules.gligen_tokens import (
    BoxText,
    BoxTextImage,
    Downsampler,
    Keypoints,
    SpatialMap,
)
from hookctl.loop.images import encode
from tests.families.subjects import error
from tests.hookctl.drawing import SD15, TWO, draw
from tests.hookctl.learned.gated_models import WIDTH, fusers_in, fusers_of, gated_unet, network_of
from tests.hookctl.learned.literal_grounding import randomise

BOXES = [(0.1, 0.2, 0.5, 0.6), (0.5, 0.4, 0.9, 1.0)]
PHRASES = ["a red cat", "a blue dog"]
STEPS = 5


@cache
def gated():
    return gated_unet()


def objects(**options):
    given = {"boxes": BOXES, "phrases": PHRASES, "stop": 1.0} | options
    return GLIGEN(network_of(gated()), **given)


def reference(prompt, boxes, phrases, beta, seed=0):
    """The latents of diffusers' own pipeline."""
    parts = SD15.make().components | {"unet": gated()}
    del parts["image_encoder"]
    pipe = StableDiffusionGLIGENPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt,
        negative_prompt="blurry",
        guidance_scale=4.0,
        gligen_boxes=[list(box) for box in boxes],
        gligen_phrases=phrases,
        gligen_scheduled_sampling_beta=beta,
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(seed)],
        output_type="latent",
    ).images


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_a_run_is_that_of_diffusers_own_pipeline(beta):
    want = reference(TWO[0], BOXES, PHRASES, beta)
    pipe = SD15.make()
    with hookctl.control(pipe, objects(stop=beta)):
        got = SD15.run(pipe, TWO[:1], steps=STEPS)
    assert error(got, want) < 1e-5
    assert error(SD15.run(pipe, TWO[:1], steps=STEPS), want) > 1e-2


@pytest.mark.slow
def test_each_prompt_of_a_batch_has_its_own_layout():
    layouts = [BOXES[:1], BOXES[::-1]]
    phrases = [PHRASES[:1], PHRASES]
    got = draw(SD15, SD15.make(), objects(boxes=layouts, phrases=phrases), steps=STEPS)
    for i in range(2):
        want = reference(TWO[i], layouts[i], phrases[i], 1.0, seed=i)
        assert error(got[i : i + 1], want) < 1e-5


def test_a_call_is_that_of_diffusers_gated_unet_in_double_precision():
    net = gated_unet().double()
    pipe = SD15.make()
    pipe.unet.double()
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 16, 16, generator=generator, dtype=torch.float64)
    text = torch.randn(1, 7, WIDTH, generator=generator, dtype=torch.float64)
    phrases = torch.randn(2, WIDTH, generator=generator, dtype=torch.float64)
    slots = torch.zeros(1, 30, 4, dtype=torch.float64)
    slots[0, :2] = torch.tensor(BOXES)
    features = torch.zeros(1, 30, WIDTH, dtype=torch.float64)
    features[0, :2] = phrases
    masks = torch.zeros(1, 30, dtype=torch.float64)
    masks[0, :2] = 1
    slots[0, :2] = torch.tensor(BOXES, dtype=torch.float64)
    given = {"boxes": slots, "masks": masks, "positive_embeddings": features}
    want = net(sample, 500, text, cross_attention_kwargs={"gligen": given}).sample
    network = network_of(net)
    for module in (network.tokenizer, *network.fusers.values()):
        module.double()
    network.tokenizer.load_state_dict(net.position_net.state_dict())
    for path, layer in network.fusers.items():
        layer.load_state_dict(net.get_submodule(f"{path}.fuser").state_dict())
    edit = GLIGEN(network, boxes=BOXES, phrases=list(phrases), stop=1.0)
    with torch.no_grad(), hookctl.control(pipe.unet, edit, rows=["cond"]):
        got = pipe.unet(sample, 500, text).sample
    assert error(got, want) < 1e-8  # diffusers has its frequencies in single precision


@pytest.mark.slow
def test_no_strength_is_bit_identical():
    plain = SD15.run(SD15.make(), TWO)
    assert torch.equal(draw(SD15, SD15.make(), objects(strength=0.0)), plain)
    assert torch.equal(draw(SD15, SD15.make(), objects(blocks={"self": 0.0})), plain)


@pytest.mark.slow
def test_closed_gates_are_bit_identical():
    network = network_of(gated())
    for layer in network.fusers.values():
        layer.alpha_attn.data.zero_()
        layer.alpha_dense.data.zero_()
    edit = GLIGEN(network, boxes=BOXES, phrases=PHRASES, stop=1.0)
    assert edit.neutral()
    assert torch.equal(draw(SD15, SD15.make(), edit), SD15.run(SD15.make(), TWO))


@pytest.mark.slow
def test_strengths_of_rows_and_blocks():
    plain = SD15.run(SD15.make(), TWO)
    both = draw(SD15, SD15.make(), objects())
    first = draw(SD15, SD15.make(), objects(strength=[1.0, 0.0]))
    assert error(first[:1], both[:1]) < 1e-5 and torch.equal(first[1:], plain[1:])
    up = draw(SD15, SD15.make(), objects(blocks={"down": 0.0, "mid": 0.0}))
    only_up = draw(SD15, SD15.make(), objects(sites="self up"))
    assert torch.equal(up, only_up) and error(up, both) > 1e-3
    half = draw(SD15, SD15.make(), objects(blocks={"up": 0.5, "self": 0.5}))
    assert not torch.equal(half, both) and not torch.equal(half, plain)


@pytest.mark.slow
def test_on_off_and_on_again_over_the_schedule():
    seen = {}

    class Watched(GLIGEN):
        def _strengths(self, call):
            found = super()._strengths(call)
            seen[call.clock.step] = found[0]
            return found

    edit = Watched(network_of(gated()), boxes=BOXES, phrases=PHRASES, stop=0.2, decay=0.4, back=0.9)
    draw(SD15, SD15.make(), edit, steps=10)
    assert [seen[step] for step in range(10)] == pytest.approx(
        [1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 1]
    )


@pytest.mark.slow
def test_null_tokens_are_in_unconditional_rows():
    """A prompt without objects has the tokens of an empty layout, as its unconditional row has; it
    is not the plain model."""
    layouts, phrases = [BOXES, []], [PHRASES, []]
    got = draw(SD15, SD15.make(), objects(boxes=layouts, phrases=phrases))
    plain = SD15.run(SD15.make(), TWO)
    assert error(got[1:], plain[1:]) > 1e-3


@pytest.mark.parametrize(
    "options,message",
    [
        ({"boxes": None}, "boxes is missing"),
        ({"phrases": None}, "phrases is missing; this checkpoint reads boxes with phrases"),
        ({"phrases": ["a cat"]}, "phrases has 1 items and boxes has 2 items"),
        ({"phrases": ["a cat", " "]}, r"phrases\[1\]=' '"),
        ({"boxes": [(0.1, 0.2, 0.5, 0.6), (0.5, 0.4, 1.9, 1.0)]}, r"boxes\[1\]"),
        ({"boxes": [(0.5, 0.4, 0.1, 0.6)] * 2}, "x0 < x1"),
        ({"boxes": [BOXES[0]] * 31, "phrases": ["a cat"] * 31}, "31 boxes of a prompt"),
        ({"boxes": [], "phrases": []}, "give at least one"),
        ({"maps": Image.new("RGB", (8, 8))}, "maps is given"),
        ({"images": [None, None]}, "images is given"),
        ({"strength": -1.0}, "strength"),
        ({"stop": 0.8, "decay": 0.4}, r"stop \+ decay <= back"),
        ({"stop": 0.8, "back": 0.4}, r"stop \+ decay <= back"),
    ],
)
def test_what_can_not_be_meant_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        objects(**options)


@pytest.mark.slow
def test_lists_for_other_numbers_of_prompts_are_refused():
    pipe = SD15.make()
    three = {"boxes": [BOXES] * 3, "phrases": [PHRASES] * 3}
    for options in (three, {"strength": [1.0, 1.0, 1.0]}):
        with pytest.raises(InputError, match="the pipeline draws 2"):
            draw(SD15, pipe, objects(**options))
    with pytest.raises(InputError, match="has 12 features and the checkpoint was trained with 32"):
        draw(SD15, pipe, objects(phrases=[torch.zeros(12), "a dog"]))
    with pytest.raises(InputError, match="tokens; give one of"):
        draw(SD15, pipe, objects(phrases=["a cat " * 100, "a dog"]))


@pytest.mark.slow
def test_layers_of_another_model_are_refused():
    network = network_of(gated())
    path, layer = next(iter(network.fusers.items()))
    for fusers, message in (
        ({"down_blocks.7.attentions.0.transformer_blocks.0": layer}, "no such transformer block"),
        ({**network.fusers, "down_blocks.7.attn": layer}, "no such transformer block"),
        ({"mid_block.attentions.0.transformer_blocks.0": layer}, "for 16 channels"),
    ):
        edit = GLIGEN(GLIGENNetwork(network.tokenizer, fusers), boxes=BOXES, phrases=PHRASES)
        with pytest.raises(InputError, match=message):
            draw(SD15, SD15.make(), edit)


# -- other inputs ----------------------------------------------------------------------------------


def check_sees_its_inputs(edit, other):
    """The run is not the plain one, and depends on what the edit is given."""
    plain = SD15.run(SD15.make(), TWO)
    first, second = (draw(SD15, SD15.make(), one) for one in (edit, other))
    assert error(first, plain) > 1e-3 and not torch.equal(first, second)


@pytest.mark.slow
def test_joints_of_persons():
    net = randomise(Keypoints(3, 17, 32, 16, WIDTH), 5)
    network = GLIGENNetwork(net, fusers_of(gated()))
    person = [(i / 20, 0.5) if i % 3 else None for i in range(17)]
    check_sees_its_inputs(
        GLIGEN(network, keypoints=[person], stop=1.0),
        GLIGEN(network, keypoints=[[person], [person, person]], stop=1.0),
    )
    edit = GLIGEN(network, keypoints=[person])
    points, masks = edit.inputs.arguments(Layout(0), torch.zeros(()))
    assert points.shape == (1, 51, 2) and masks[0, :17].tolist() == [
        float(i % 3 > 0) for i in range(17)
    ]
    assert not masks[0, 17:].any()
    for given, message in (
        ([person[:16]], "17 joints"),
        ([person] * 4, "4 persons"),
        ([[(0.5, 1.5), *person[1:]]], r"keypoints\[0\]\[0\]"),
    ):
        with pytest.raises(InputError, match=message):
            GLIGEN(network, keypoints=given)


@pytest.mark.slow
def test_boxes_with_images_and_a_style():
    net = randomise(BoxTextImage(WIDTH, 16, WIDTH), 5)
    network = GLIGENNetwork(net, fusers_of(gated()))
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(12, WIDTH, generator=generator)
    image = torch.randn(12, generator=generator)
    given = {
        "boxes": BOXES,
        "phrases": ["a cat", None],
        "images": [None, image],
        "clip": projection,
    }
    edit = GLIGEN(network, **given)
    styled = GLIGEN(network, **given, style=image)
    check_sees_its_inputs(edit, styled)
    styled.inputs.begin(SD15.make())
    boxes, masks, _, images, texts, pictures = styled.inputs.arguments(Layout(0), torch.zeros(()))
    assert masks[0, :4].tolist() == [1, 1, 1, 0] and boxes[0, 2].tolist() == [0, 1, 0, 1]
    assert texts[0, :4].tolist() == [1, 0, 0, 0] and pictures[0, :4].tolist() == [0, 1, 1, 0]
    want = projection.T @ image
    torch.testing.assert_close(images[0, 1], 28.7 * want / want.norm())
    with pytest.raises(InputError, match="no phrase and no image"):
        GLIGEN(network, boxes=BOXES, phrases=["a cat", None])
    with pytest.raises(InputError, match="images need clip="):
        GLIGEN(network, boxes=BOXES[:1], images=[image])


def spatial(further=3, classes=None, **options):
    backbone = ConvNeXt((1, 1), (4, 6))
    net = SpatialMap(backbone, tokens=4, features=6, hidden=8, out=WIDTH, classes=classes)
    generator = torch.Generator().manual_seed(4)
    stem = Stem(0.2 * torch.randn(16, 4 + further, 3, 3, generator=generator))
    return GLIGENNetwork(randomise(net, 5), fusers_of(gated()), stem, **options)


def picture(seed, mode="RGB", high=256):
    channels = (3,) if mode == "RGB" else ()
    pixels = torch.randint(high, (32, 32, *channels), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy(), mode)


@pytest.mark.slow
def test_maps_of_edges():
    network = spatial(3, downsampler=randomise(Downsampler(1, 2, 3), 6))
    assert network.share == 0.9
    one, two = picture(0), picture(1)
    check_sees_its_inputs(GLIGEN(network, maps=one), GLIGEN(network, maps=[one, two]))
    of_hed = spatial(1)
    check_sees_its_inputs(GLIGEN(of_hed, maps=one), GLIGEN(of_hed, maps=two))


@pytest.mark.slow
def test_maps_of_classes():
    network = spatial(3, 5, downsampler=randomise(Downsampler(5, 4, 3), 6))
    assert network.share == 0.7
    one, two = picture(0, "L", 5), picture(1, "L", 5)
    check_sees_its_inputs(GLIGEN(network, maps=one), GLIGEN(network, maps=two))
    with pytest.raises(InputError, match="class numbers"):
        GLIGEN(network, maps=picture(0, "L", 9))


def test_maps_of_files(tmp_path):
    path = tmp_path / "map.png"
    for network, image in (
        (spatial(1), picture(0)),
        (spatial(3, 5, downsampler=randomise(Downsampler(5, 4, 3), 6)), picture(0, "L", 5)),
    ):
        image.save(path)
        read, given = (GLIGEN(network, maps=one).inputs.of(0) for one in (str(path), image))
        assert torch.equal(read, given)
        with pytest.raises(InputError, match="maps"):
            GLIGEN(network, maps=tmp_path / "none.png")


@pytest.mark.slow
def test_without_strength_maps_leave_the_stem_as_it_is():
    network = spatial(3, downsampler=randomise(Downsampler(1, 2, 3), 6))
    plain = SD15.run(SD15.make(), TWO)
    edit = GLIGEN(network, maps=picture(0), strength=0.0)
    assert torch.equal(draw(SD15, SD15.make(), edit), plain)
    one = GLIGEN(network, maps=picture(0), strength=[0.0, 1.0])
    assert torch.equal(draw(SD15, SD15.make(), one)[:1], plain[:1])


def test_a_stem_for_other_channels_is_refused():
    network = spatial(2, downsampler=randomise(Downsampler(1, 2, 3), 6))
    with pytest.raises(InputError, match="takes 2 channels beside the latents, and 3 are made"):
        draw(SD15, SD15.make(), GLIGEN(network, maps=picture(0)))


def test_the_noise_of_inpainting_does_not_depend_on_images_beside():
    edit = Inpainting("GLIGEN", Image.new("RGB", (128, 128), (200, 30, 90)), objects().inputs, 3)
    put = []

    class Put(hookctl.Editor):
        def begin(self, state):
            edit.begin(state)

        def before(self, state):
            edit.put(state, state.images)
            put.append(state.latents)

    pipe = SD15.make()
    for prompts in (TWO[1:], TWO):
        with hookctl.control(pipe, Put()):
            SD15.run(pipe, prompts, steps=2)
    for alone, beside in zip(put[:2], put[2:], strict=True):
        assert torch.equal(alone[0, :, 0, 0], beside[1, :, 0, 0])  # a cell in no box


@pytest.mark.slow
def test_inpainting_is_a_call_of_diffusers_nine_channel_unet():
    """The known part of the latents is put in before each step, and shown in further channels."""
    net = gated_unet(9)
    network = network_of(net, stem=Stem(net.conv_in.weight, net.conv_in.bias))
    assert network.share == 1.0
    pipe = SD15.make()
    side = 16 * 8
    image = Image.new("RGB", (side, side), (200, 30, 90))
    edit = GLIGEN(network, boxes=BOXES, phrases=PHRASES, inpaint=image, seed=3)
    calls = []

    class Probe(hookctl.Editor):
        def denoise(self, state, proceed):
            out = proceed()
            calls.append((state, state.kwargs["sample"].clone(), out[0].clone()))
            return out

    with hookctl.control(pipe, edit, Probe()):
        SD15.run(pipe, TWO[:1], steps=2)
    known = encode(pipe, image)
    mask = torch.ones(1, 1, 16, 16)
    for x0, y0, x1, y1 in BOXES:
        mask[..., int(y0 * 16) : int(y1 * 16), int(x0 * 16) : int(x1 * 16)] = 0
    features = edit.inputs
    features.begin(pipe)
    assert len(calls) == 2
    for state, sample, got in calls:
        boxes, masks, phrases = (
            torch.cat(
                [
                    features.arguments(layout, torch.zeros(()))[i]
                    for layout in (Layout(None), Layout(0))
                ]
            )
            for i in range(3)
        )
        given = {"boxes": boxes, "masks": masks, "positive_embeddings": phrases}
        nine = torch.cat(
            [sample, (known * mask).expand(2, -1, -1, -1), mask.expand(2, -1, -1, -1)], 1
        )
        with torch.no_grad():
            want = net(
                nine,
                state.kwargs["timestep"],
                state.kwargs["encoder_hidden_states"],
                cross_attention_kwargs={"gligen": given},
            ).sample
        assert error(got, want) < 1e-5
    # Nearly without noise, what is known is the image's.
    last = calls[-1][1][:1]
    noise = (last - known) * mask
    assert noise.abs().mean() < (calls[0][1][:1] - known).abs().mean()


def test_an_image_of_another_size_is_refused():
    net = gated_unet(9)
    network = network_of(net, stem=Stem(net.conv_in.weight, net.conv_in.bias))
    edit = GLIGEN(network, boxes=BOXES, phrases=PHRASES, inpaint=Image.new("RGB", (64, 64)))
    with pytest.raises(InputError, match="64 x 64 px, which is not the size"):
        draw(SD15, SD15.make(), edit)


# -- checkpoints -----------------------------------------------------------------------------------


def held(network):
    tensors = {f"position_net.{k}": v for k, v in network.tokenizer.state_dict().items()}
    for path, layer in network.fusers.items():
        tensors |= {f"{path}.fuser.{k}": v for k, v in layer.state_dict().items()}
    if network.stem is not None:
        tensors["conv_in.weight"] = network.stem.weight
    if network.downsampler is not None:
        below = network.downsampler.state_dict()
        tensors |= {f"downsample_net.{k}": v for k, v in below.items()}
    return Checkpoint(Path("weights.bin"), tensors)


@pytest.mark.slow
def test_a_checkpoint_becomes_the_editor():
    pipe = SD15.make()
    given = {"boxes": BOXES, "phrases": PHRASES, "stop": 1.0}
    got = draw(SD15, pipe, build(held(network_of(gated())), pipe, **given))
    assert torch.equal(got, draw(SD15, SD15.make(), objects()))


@pytest.mark.parametrize(
    "network,given",
    [
        (lambda: GLIGENNetwork(randomise(Keypoints(3, 2, 32, 16, WIDTH), 5), fusers_of(gated())),
         {"keypoints": [[(0.1, 0.1), None]]}),
        (lambda: GLIGENNetwork(randomise(BoxTextImage(WIDTH, 16, WIDTH), 5), fusers_of(gated())),
         {"boxes": BOXES, "phrases": PHRASES}),
        (lambda: spatial(3, downsampler=randomise(Downsampler(1, 2, 3), 6)),
         {"maps": picture(0)}),
        (lambda: spatial(3, 5, downsampler=randomise(Downsampler(5, 4, 3), 6)),
         {"maps": picture(0, "L", 5)}),
    ],
)  # fmt: skip
def test_the_tokenizer_is_told_by_the_names(network, given):
    made = network()
    editor = build(held(made), SD15.make(), **given)
    assert type(editor.network.tokenizer) is type(made.tokenizer)
    with_maps = made.downsampler is not None
    assert (
        (editor.network.stem is not None) == (editor.network.downsampler is not None) == with_maps
    )
    own = editor.network.tokenizer.state_dict()
    for name, value in made.tokenizer.state_dict().items():
        assert torch.equal(own[name], value)


def test_a_file_of_other_widths_than_the_official(tmp_path):
    """A small model's own GLIGEN loads as the published ones do."""
    pipe, path = SD15.make(), tmp_path / "tiny.safetensors"
    save_file(held(network_of(gated())).tensors, path)
    editor = load(path, pipe, boxes=BOXES, phrases=PHRASES)
    assert editor.tokenizer.module.linears[0].in_features not in (832, 800, 768)
    got, want = editor.tokenizer.module.state_dict(), gated().position_net.state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("steps", [2, 3])
def test_a_share_that_holds_no_step_is_told_before_the_first(steps):
    """Of the published share, 0.3, nothing is left in three steps: it is rounded down."""
    pipe, ran = SD15.make(), []
    pipe.unet.conv_in.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(InputError, match=rf"stop=0.3 hold none of the run's {steps} steps; give"):
        with hookctl.control(pipe, objects(stop=None)):
            SD15.run(pipe, TWO[:1], steps=steps)
    assert not ran
    Fade(0.0, 0.3).check_steps(4, "GLIGEN")
    Fade(0.0, 0.3, decay=0.7).check_steps(3, "GLIGEN")
    Fade(0.0, 0.0, back=0.5).check_steps(2, "GLIGEN")


def test_the_options_of_a_checkpoint_are_the_editors():
    given = list(inspect.signature(build).parameters)
    assert given[:2] == ["checkpoint", "pipe"] and {"boxes", "phrases", "strength"} < set(given)


@pytest.mark.slow
def test_official_names_are_those_of_diffusers_at_full_size():
    with torch.device("meta"):
        net = UNet2DConditionModel(
            cross_attention_dim=768, attention_head_dim=8, attention_type="gated"
        )
        boxes = BoxText()
    theirs = fusers_in(net)
    assert len(theirs) == 16
    ours = fusers_of_shapes(net)
    for path, module in theirs.items():
        assert shapes_of(ours[path]) == shapes_of(module)
    assert shapes_of(boxes) == shapes_of(net.position_net)


def fusers_of_shapes(net):
    with torch.device("meta"):
        return {
            path: GatedSelfAttention(
                module.norm1.normalized_shape[0], 768, net.get_submodule(path).attn1.heads
            )
            for path, module in fusers_in(net).items()
        }


def shapes_of(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.slow
def test_in_half_precision_the_stream_stays_half():
    pipe = SD15.make()
    pipe.unet.to(torch.bfloat16)
    pipe.text_encoder.to(torch.bfloat16)
    half = draw(SD15, pipe, objects())
    whole = draw(SD15, SD15.make(), objects())
    assert half.dtype == torch.bfloat16
    assert error(half.float(), whole) < 0.1 < error(SD15.run(SD15.make(), TWO), whole)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.full((3, 4, 4), 255.0), "give values from -1 to 1; its largest is 255"),
        (torch.full((3, 4, 4), torch.nan), r"maps=a tensor \(3, 4, 4\) holds NaN"),
        (torch.zeros(3, 0, 4), r"maps=a tensor \(3, 0, 4\); give some"),
    ],
)
def test_maps_out_of_range_are_refused(given, said):
    with pytest.raises(InputError, match=said):
        GLIGEN(spatial(1), maps=given)


def test_odd_phrases_persons_and_clip_are_refused():
    persons = GLIGENNetwork(randomise(Keypoints(3, 17, 32, 16, WIDTH), 5), fusers_of(gated()))
    with pytest.raises(InputError, match=r"keypoints=\[\]; give at least one person"):
        GLIGEN(persons, keypoints=[])
    images = GLIGENNetwork(randomise(BoxTextImage(WIDTH, 16, WIDTH), 5), fusers_of(gated()))
    with pytest.raises(InputError, match=r"phrases\[0\]=a tensor .* holds NaN"):
        GLIGEN(images, boxes=BOXES[:1], phrases=[torch.full((WIDTH,), torch.nan)])
    with pytest.raises(InputError, match="clip='vit'; give a transformers CLIPModel"):
        GLIGEN(images, boxes=BOXES[:1], images=[torch.ones(12)], clip="vit")
    bad, matrix = torch.full((12,), torch.nan), torch.ones(12, WIDTH)
    with pytest.raises(InputError, match="zeros, NaN or infinity in the CLIP embedding"):
        GLIGEN(images, boxes=BOXES[:1], images=[bad], clip=matrix)
