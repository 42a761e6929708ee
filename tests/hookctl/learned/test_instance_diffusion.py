from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import fourier_filter

import hookctl
from hookctl import COND, Row, recipes
from hookctl.errors import ConflictError, InputError
from hookctl.kernels.fourier_gain import reference as low_frequencies
from hookctl.learned import locations
from hookctl.learned.files import Checkpoint
from hookctl.learned.grounding import Layout
from hookctl.learned.instance_diffusion import InstanceDiffusion, InstanceNetwork, build
from hookctl.learned.instances import Instance
from hookctl.learned.modules.convnext import ConvNeXt
from hookctl.learned.modules.scale_u import ScaleU
from hookctl.learned.modules.unifusion import UniFusion
from hookctl.recipes import MultiInstanceSampler
from tests.families.subjects import error
from tests.hookctl.drawing import SD15, TWO, draw
from tests.hookctl.learned import literal_grounding as literal
from tests.hookctl.learned.gated_models import WIDTH, fusers_of, gated_unet

SLOTS, K = 3, 2
BOX = (0.1, 0.2, 0.5, 0.6)
CAT, DOG = Instance("a red cat", box=BOX), Instance("a blue dog", point=(0.7, 0.8))
CONCATS = (32, 32, 32, 32, 32, 16, 16, 16)


def tokenizer():
    net = UniFusion(
        ConvNeXt((1, 1), (4, 6)), text=WIDTH, hidden=16, out=WIDTH, slots=SLOTS, frequencies=K,
        scribble_points=2, mask_points=4, raster_tokens=4, features=6,
    )  # fmt: skip
    return literal.randomise(net, 0)


@cache
def parts():
    return tokenizer(), fusers_of(gated_unet())


def network(scaled=False):
    gains = ScaleU(CONCATS)
    return InstanceNetwork(*parts(), literal.randomise(gains, 1) if scaled else gains)


def edit(instances=(CAT, DOG), scaled=False, **options):
    return InstanceDiffusion(network(scaled), list(instances), **{"stop": 1.0} | options)


def tokens_of(editor, layout, like=None):
    editor._encoded = {"a red cat": torch.ones(WIDTH), "a blue dog": -torch.ones(WIDTH)}
    return editor._tokens(layout, torch.zeros(()) if like is None else like)


# -- tokens ----------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_formula():
    """An instance by its box alone and one by its point alone: points are shown of both."""
    got = tokens_of(edit(), Layout(0))
    slots = [
        {
            "phrase": torch.ones(WIDTH),
            "box": torch.tensor(BOX),
            "point": torch.tensor([0.3, 0.4]),
            "scribble": None,
            "mask": None,
        },
        {
            "phrase": -torch.ones(WIDTH),
            "box": torch.zeros(4),
            "point": torch.tensor([0.7, 0.8]),
            "scribble": None,
            "mask": None,
        },
        {},
    ]
    w, raster = parts()[0].state_dict(), torch.zeros(SLOTS, 32, 32)
    want = literal.unifusion(w, slots, {"box", "point"}, raster, K)
    null = literal.unifusion(w, slots, {"point"}, raster, K)
    want[1] = null[1]  # the second has no box
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_a_mask_gives_box_point_outline_and_raster():
    mask = np.zeros((32, 32))
    mask[8:16, 4:20] = 1
    one = edit([Instance("a red cat", mask=mask)])
    got = tokens_of(one, Layout(0))
    set_pixels = mask.astype(bool)
    slot = {
        "phrase": torch.ones(WIDTH),
        "box": torch.tensor([4 / 32, 8 / 32, 20 / 32, 16 / 32]),
        "point": torch.tensor([12 / 32, 12 / 32]),
        "scribble": None,
        "mask": torch.from_numpy(locations.points_of_mask(set_pixels, 4)).float(),
    }
    raster = torch.zeros(SLOTS, 32, 32)
    raster[0] = torch.from_numpy(mask)
    w = parts()[0].state_dict()
    want = literal.unifusion(w, [slot, {}, {}], {"box", "point", "mask"}, raster, K)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_instances_may_be_tables_of_a_file():
    table = {"caption": "a red cat", "box": list(BOX)}
    found = tokens_of(edit([table, {"caption": "a blue dog", "point": [0.7, 0.8]}]), Layout(0))
    assert torch.equal(found, tokens_of(edit(), Layout(0)))


@pytest.mark.parametrize(
    "given,shown",
    [
        ({"point": (0.5, 0.5)}, ("point",)),
        ({"box": BOX}, ("box", "point")),
        ({"mask": np.eye(32)}, ("box", "point", "mask")),
        ({"scribble": [(0.1, 0.1), (0.9, 0.9)]}, ("box", "point", "scribble", "mask")),
    ],
)
def test_the_published_formats_follow_from_what_is_given(given, shown):
    one = [Instance("a red cat", **given)]
    chosen = tokens_of(edit(one), Layout(0))
    assert torch.equal(chosen, tokens_of(edit(one, formats=shown), Layout(0)))
    other = "box" if shown == ("point",) else "point"
    assert not torch.equal(chosen, tokens_of(edit(one, formats=(other,)), Layout(0)))


@pytest.mark.parametrize(
    "instances,options,message",
    [
        ([], {}, "give at least one"),
        ([CAT] * 4, {}, "4 instances of a prompt; the checkpoint was trained with 3"),
        ([Instance("a red cat")], {}, r"instances\[0\] is nowhere"),
        ([Instance("  ", box=BOX)], {}, r"instances\[0\]\.caption"),
        ([CAT, Instance("a dog", point=(1.5, 0))], {}, r"instances\[1\]\.point"),
        ([CAT, Instance("a dog", box=(0.5, 0, 0.1, 1))], {}, r"instances\[1\]\.box"),
        ([CAT, Instance("a dog", scribble=[(0.1, 0.1)])], {}, r"instances\[1\]\.scribble"),
        ([CAT, Instance("a dog", mask=np.zeros((2, 4, 4)))], {}, r"instances\[1\]\.mask"),
        ([[CAT], [Instance("", box=BOX)]], {}, r"instances\[1\]\[0\]\.caption"),
        ([CAT, "a dog"], {}, r"instances\[1\]"),
        ([CAT, {"box": BOX}], {}, r"instances\[1\].*or a table of caption, box"),
        ([{"caption": "a cat", "bocks": BOX}], {}, r"instances\[0\]"),
        ([CAT], {"formats": ("boxes",)}, "formats"),
        ([CAT, DOG], {"masked": True}, "neither box nor mask"),
    ],
)
def test_what_can_not_be_meant_is_refused(instances, options, message):
    with pytest.raises(InputError, match=message):
        edit(instances, **options)


# -- runs ------------------------------------------------------------------------------------------


class Tokens(hookctl.Editor):
    """Puts given tokens before given layers, by hooks of torch's own."""

    def __init__(self, rows):
        self.rows = rows

    def denoise(self, state, proceed):
        handles = []
        for path, layer in parts()[1].items():
            block = state.denoiser.get_submodule(path)
            stream = {}
            handles += [
                block.register_forward_pre_hook(lambda _, a, s=stream: s.update(x=a[0])),
                block.attn1.register_forward_hook(
                    lambda _, a, o, s=stream, f=layer: f(o + s["x"], self.rows) - s["x"]
                ),
            ]
        try:
            return proceed()
        finally:
            for handle in handles:
                handle.remove()


@pytest.mark.slow
def test_a_run_is_that_of_hooks_by_hand():
    """With null tokens in the unconditional rows, and a layout for each prompt."""
    layouts = [[CAT, DOG], [DOG]]
    pipe = SD15.make()
    encoded = pipe.text_encoder(
        pipe.tokenizer(
            ["a red cat", "a blue dog"], padding="max_length", return_tensors="pt"
        ).input_ids
    ).pooler_output
    editor = edit(layouts)
    editor._encoded = dict(zip(["a red cat", "a blue dog"], encoded, strict=True))
    null, first, second = (editor._tokens(Layout(p), torch.zeros(())) for p in (None, 0, 1))
    want = draw(SD15, pipe, Tokens(torch.stack([null, null, first, second])))
    got = draw(SD15, SD15.make(), editor)
    assert error(got, want) < 1e-5 and error(got, SD15.run(SD15.make(), TWO)) > 1e-3


@pytest.mark.slow
def test_no_strength_is_the_model_with_its_gains():
    plain = SD15.run(SD15.make(), TWO)
    assert torch.equal(draw(SD15, SD15.make(), edit(strength=0.0)), plain)
    editor = edit(scaled=True, strength=0.0)
    assert not editor.neutral()

    class Gains(hookctl.Editor):
        def features(self, call):
            w = network(True).gains.state_dict()
            b, s = w[f"scaleu_b_{call.order}"], w[f"scaleu_s_{call.order}"]
            call.backbone = call.backbone * (1 + torch.tanh(b))[:, None, None]
            call.skip = low_frequencies.fourier_gain(call.skip, 1 + float(torch.tanh(s)))

    got = draw(SD15, SD15.make(), editor)
    assert error(got, draw(SD15, SD15.make(), Gains())) < 1e-5 and error(got, plain) > 1e-3
    late = edit(scaled=True, stop=0.5)
    assert late.start == 0.0 and late.stop == 1.0  # gains in every step


@pytest.mark.parametrize("other", [lambda: recipes.ScaleU([0.3]), lambda: edit(scaled=True)])
def test_gains_are_not_applied_twice(other):
    pipe = SD15.make()
    with pytest.raises(ConflictError, match="InstanceDiffusion both claim the gains of ScaleU"):
        with hookctl.control(pipe, other(), edit(scaled=True)):
            pass
    twice = [recipes.ScaleU([0.3]), recipes.ScaleU([0.2])]
    with hookctl.control(pipe, edit(), edit(), *twice, strict=False):
        pass  # without gains of their own
    with hookctl.control(pipe, recipes.ScaleU([0.0]), edit(scaled=True), strict=False):
        pass


def test_gains_at_zero_are_exactly_the_identity():
    gains = ScaleU(CONCATS)
    assert gains.neutral
    for dtype in (torch.float32, torch.bfloat16):
        h, skip = (torch.randn(2, 32, 5, 7).to(dtype) for _ in range(2))
        found = gains(0, h, skip)
        assert torch.equal(found[0], h) and torch.equal(found[1], skip)


def test_gains_are_those_of_a_fourier_filter():
    gains, generator = literal.randomise(ScaleU(CONCATS), 1), torch.Generator().manual_seed(0)
    w = gains.state_dict()
    for order, width in enumerate(CONCATS):
        h, skip = (torch.randn(2, n, 8, 12, generator=generator) for n in (width, 4))
        found = gains(order, h, skip)
        want = h * (1 + torch.tanh(w[f"scaleu_b_{order}"]))[:, None, None]
        torch.testing.assert_close(found[0], want)
        scale = 1 + float(torch.tanh(w[f"scaleu_s_{order}"]))
        torch.testing.assert_close(found[1], fourier_filter(skip, 1, scale), rtol=0, atol=1e-5)


def test_official_names_and_shapes_of_the_gains():
    shapes = {name: tuple(value.shape) for name, value in ScaleU().state_dict().items()}
    widths = [1280] * 7 + [640] * 3 + [320] * 2
    want = {f"scaleu_b_{i}": (width,) for i, width in enumerate(widths)}
    assert shapes == want | {f"scaleu_s_{i}": (1,) for i in range(12)}
    assert sum(p.numel() for p in ScaleU().parameters()) == 11532
    again = ScaleU.of_shapes(shapes)
    assert again.widths == tuple(widths)


def test_gains_of_another_model_are_refused():
    editor = InstanceDiffusion(InstanceNetwork(*parts(), ScaleU((8, 8))), [CAT])
    with pytest.raises(InputError, match="decoder concats of"):
        draw(SD15, SD15.make(), editor)


@pytest.mark.slow
def test_an_instance_drawn_alone_is_grounded_by_itself():
    """The images of `MultiInstanceSampler` have the tokens of their own instance."""
    seen = {}

    class Watched(InstanceDiffusion):
        def _batch(self, layouts, x):
            for layout in layouts:
                seen[layout] = None
            return super()._batch(layouts, x)

    sampler = MultiInstanceSampler(["a red cat", "a blue dog"], ["full", "full"], share=0.5)
    editor = Watched(network(), [CAT, DOG], stop=1.0)
    draw(SD15, SD15.make(), editor, sampler)
    assert set(seen) == {
        Layout(), Layout(0), Layout(1),
        *(Layout(p, i) for p in (0, 1) for i in (0, 1)),
    }  # fmt: skip
    alone, one = tokens_of(edit([CAT, DOG]), Layout(0, 1)), tokens_of(edit([DOG]), Layout(0))
    assert torch.equal(alone, one)


def test_instances_do_not_see_each_other():
    left = np.zeros((32, 32))
    left[:, :12] = 1
    right = Instance("a blue dog", box=(0.5, 0.0, 1.0, 1.0))
    editor = edit([Instance("a red cat", mask=left), right], masked=True)
    seen = editor._mask_of(Layout(0), 8, 8)
    assert seen.shape == (64, 64 + 4 * SLOTS + 4)
    column = torch.arange(64) % 8
    group = torch.where(column < 3, 0, torch.where(column >= 4, 1, 2))
    assert torch.equal(seen[:, :64], group[:, None] == group)
    boxes, points, scribbles, outlines = (
        seen[:, 64 + i * SLOTS : 64 + (i + 1) * SLOTS] for i in range(4)
    )
    for tokens in (boxes, outlines):
        assert torch.equal(tokens[:, 0], group == 0) and torch.equal(tokens[:, 1], group == 1)
        assert not tokens[:, 2].any()
    assert points.all() and scribbles.all() and seen[:, 64 + 4 * SLOTS :].all()
    assert editor._mask_of(Layout(), 8, 8).all()


@pytest.mark.slow
def test_masks_act_at_the_finest_resolution_alone():
    both = [CAT, Instance("a blue dog", box=(0.6, 0.2, 0.9, 0.9))]
    asked = []

    class Watched(InstanceDiffusion):
        def _mask(self, layouts, call):
            found = super()._mask(layouts, call)
            asked.append((call.site.resolution == 1, found is not None))
            return found

    editor = Watched(network(), both, masked=True, stop=1.0)
    masked = draw(SD15, SD15.make(), editor)
    assert set(asked) == {(True, True), (False, False)}
    assert error(masked, draw(SD15, SD15.make(), edit(both))) > 1e-4


# -- checkpoints -----------------------------------------------------------------------------------


def a_checkpoint(tensors):
    return Checkpoint(Path("weights.pth"), tensors)


def held(scaled=True):
    tensors = {f"position_net.{k}": v for k, v in parts()[0].state_dict().items()}
    for path, layer in parts()[1].items():
        tensors |= {f"{path}.fuser.{k}": v for k, v in layer.state_dict().items()}
    if scaled:
        tensors |= network(True).gains.state_dict()
    return tensors


@pytest.mark.slow
def test_a_checkpoint_becomes_the_editor():
    pipe = SD15.make()
    editor = build(a_checkpoint(held()), pipe, instances=[CAT, DOG], stop=1.0)
    got = draw(SD15, pipe, editor)
    assert torch.equal(got, draw(SD15, SD15.make(), edit(scaled=True)))
    assert build(a_checkpoint(held(False)), pipe, instances=[CAT]).gains is None


def test_checkpoints_that_do_not_fit_are_refused():
    pipe, tensors = SD15.make(), held()
    lost = {k: v for k, v in tensors.items() if "to_q" not in k}
    with pytest.raises(InputError, match="attn.to_q.weight"):
        build(a_checkpoint(lost), pipe, instances=[CAT])
    moved = {k.replace("mid_block", "other_block"): v for k, v in tensors.items()}
    with pytest.raises(InputError, match="other_block.*has no such block"):
        build(a_checkpoint(moved), pipe, instances=[CAT])
    wrong = tensors | {"position_net.linears_list.2.4.weight": torch.zeros(3, 3)}
    with pytest.raises(InputError, match="linears_list.2.4.weight"):
        build(a_checkpoint(wrong), pipe, instances=[CAT])


def test_the_rows_of_a_batch_have_layouts_by_their_branch():
    assert Layout.of(Row(0, COND, 1, 0)) == Layout(1)
    assert Layout.of(Row(0, "uncond", 1, 0)) == Layout()
    assert Layout.of(Row(0, "perturbed", 1, 0, COND)) == Layout(1)
    assert Layout.of(Row(0, "instance 3", 1, 0)) == Layout(1, 3)
    assert Layout.of(Row(0, "instance 3 uncond", 1, 0)) == Layout()


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        (torch.full((WIDTH,), torch.nan), r"caption=a tensor \(32,\) holds NaN"),
        (torch.ones(WIDTH, dtype=torch.bool), "real numbers, not torch.bool"),
        (torch.ones(WIDTH, dtype=torch.complex64), "real numbers, not torch.complex64"),
    ],
)
def test_features_of_captions_are_finite_numbers(caption, said):
    with pytest.raises(InputError, match=said):
        edit([Instance(caption, box=BOX)])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decay": -0.5}, "decay=-0.5; give a number from 0 to 1"),
        ({"back": 2.0}, "back=2.0; give a number from 0 to 1"),
        ({"formats": 3}, "formats=3; give some of"),
        ({"formats": [["box"]]}, r"formats=\[\['box'\]\]; give some of"),
        ({"formats": torch.zeros(2, 3)}, "formats=a tensor"),
    ],
)
def test_odd_options_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        edit(**options)


def test_a_tensor_for_instances_is_not_printed():
    with pytest.raises(InputError, match=r"instances=a tensor \(50, 50\); give a list"):
        InstanceDiffusion(network(), torch.zeros(50, 50))


def test_an_array_is_no_box():
    with pytest.raises(InputError, match=r"box=an array \(4,\); give a box"):
        edit([Instance("a cat", box=np.array(BOX))])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"blocks": {"nowhere": 0.5}}, "InstanceDiffusion: blocks: sites='nowhere' matches none"),
        ({"blocks": {"cross": 0.5}}, "InstanceDiffusion: blocks: sites='cross' matches none"),
        ({"sites": "nowhere"}, "InstanceDiffusion: sites='nowhere' matches none"),
        ({"sites": "cross"}, "sites='cross' holds none of the self-attention"),
    ],
)
def test_selectors_that_match_nothing_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        edit(**options).attach(SD15.make())


def test_features_of_another_width_are_refused_before_the_first_step():
    """Also where the layers act late, or not at all."""
    pipe, steps = SD15.make(), []
    wide = edit([Instance(torch.ones(WIDTH + 1), box=BOX)], start=0.5)
    handle = pipe.unet.register_forward_hook(lambda *_: steps.append(1))
    with pytest.raises(InputError, match="33 features and the checkpoint was trained with 32"):
        with hookctl.control(pipe, wide):
            SD15.run(pipe, TWO)
    handle.remove()
    assert not steps
