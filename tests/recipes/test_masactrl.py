"""MasaCtrl against the official code's matrices, in float64, and what must hold of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hookctl
from hookctl import control
from hookctl.address.regions import Region
from hookctl.editor import Editor
from hookctl.errors import ConflictError, InputError
from hookctl.recipes import MasaCtrl, PromptToPrompt
from tests import zoo
from tests.recipes import runs
from tests.recipes.literal_appearance import Call, Literal
from tests.recipes.runs import made, relative

STEPS = 3
CAT = "a red cat above a blue square"
DOG = "a red cat on a green square"
BIRD = "a red bird above a red cat"
FAMILIES = ["sd15", "sdxl", "sd3", "flux", "pixart", "animatediff", "wan"]


draw = partial(runs.draw, steps=STEPS)


def plain(name: str, prompts: list[str], dtype: Any = torch.float32, **call: Any) -> Tensor:
    return runs.plain(name, MasaCtrl(prompts), dtype=dtype, **{"steps": STEPS, **call})


# -- the official formulas ---------------------------------------------------------------------


FINE = "up_blocks.2 up_blocks.3"


class Mutual:
    """The controllers of the official repository, for one or more edits of row 0 of each half.

    tokens: of the source's and the edit's word for masks from maps, else none; masks: of the
    source and the edits, [rows, height, width].
    """

    def __init__(
        self,
        first: int = 1,
        sites: str = FINE,
        union: bool = False,
        masks: Tensor | None = None,
        tokens: list[list[int]] | None = None,
        threshold: float = 0.1,
    ) -> None:
        self.first, self.sites, self.union = first, tuple(sites.split()), union
        self.masks, self.tokens, self.threshold = masks, tokens, threshold
        self.maps: list[Tensor] = []
        self.step = -1

    def __call__(self, call: Call) -> Tensor:
        if call.step != self.step:
            self.step, self.maps = call.step, []
        if call.cross:
            p = call.probabilities(call.q, call.k)
            if p.shape[2] == 16**2:
                self.maps.append(p.chunk(2)[1].mean(1))
            return p @ call.v
        if call.step < self.first or not call.path.startswith(self.sites):
            return call.plain()
        return call.halves(lambda q, k, v: self.half(call, q, k, v))

    def half(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k0, v0 = k[:1].expand_as(k), v[:1].expand_as(v)
        if self.union:
            p = call.probabilities(q[1:], torch.cat([k, k0], 2)[1:])
            return torch.cat(
                [call.probabilities(q[:1], k[:1]) @ v[:1], p @ torch.cat([v, v0], 2)[1:]]
            )
        out = call.probabilities(q, k0) @ v0
        masks = self.mask_of(len(q), q.shape[2])
        if masks is None:
            return out
        inside = masks[:1, None, None]  # [1, 1, 1, keys]
        fore, background = (
            call.probabilities(q, k0, (~m).to(q) * torch.finfo(q.dtype).min) @ v0
            for m in (inside, ~inside)
        )
        mixed = torch.where(masks[:, None, :, None], fore, background)
        return torch.cat([out[:1], mixed[1:]])

    def mask_of(self, rows: int, tokens: int) -> Tensor | None:
        """[rows, tokens] of a site."""
        side = int(tokens**0.5)
        masks = self.masks
        if self.tokens is not None:
            if not self.maps:
                return None
            maps = torch.stack(self.maps).mean(0)
            maps = torch.stack([m[:, t].sum(-1) for m, t in zip(maps, self.tokens, strict=True)])
            low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
            masks = ((maps - low) / (high - low) >= self.threshold).unflatten(1, (16, 16))
        if masks is None:
            return None
        return F.interpolate(masks[:, None].double(), size=(side, side))[:, 0].flatten(1) > 0.5


LEFT, RIGHT = Region.box(0.0, 0.0, 0.5, 1.0), Region.box(0.25, 0.5, 1.0, 1.0)
PLACES = torch.stack([region.tokens(16, 16).unflatten(0, (16, 16)) for region in (LEFT, RIGHT)])
# Of pixels: 100 for 16 cells, so that no cell's first pixel is at its centre; the last is nowhere.
PIXELS = torch.rand(3, 100, 100, generator=torch.Generator().manual_seed(0)) > 0.5
PIXELS[2] = False
PIXELS[2, 1, 1] = True
EVERY = "down_blocks mid_block up_blocks"
CASES: dict[str, tuple[list[str], dict[str, Any], dict[str, Any]]] = {
    "mutual": ([CAT, DOG], {}, {}),
    "mutual, several edits": ([CAT, DOG, BIRD], {}, {}),
    "later": ([CAT, DOG], {"start": 0.67}, {"first": 2}),
    "everywhere": ([CAT, DOG], {"sites": "self"}, {"sites": EVERY}),
    "union": ([CAT, DOG, BIRD], {"union": True}, {"union": True}),
    "masks": ([CAT, DOG], {"source_mask": LEFT, "target_mask": RIGHT}, {"masks": PLACES}),
    "masks of several edits": (
        [CAT, DOG, BIRD],
        {"source_mask": LEFT, "target_mask": [RIGHT, LEFT]},
        {"masks": PLACES[[0, 1, 0]]},
    ),
    "masks of pixels": (
        [CAT, DOG, BIRD],
        {"source_mask": PIXELS[0], "target_mask": list(PIXELS[[1, 0]]), "paper": True},
        {"masks": PIXELS[[0, 1, 0]]},
    ),
    "no source": (
        [CAT, DOG],
        {"source_mask": PIXELS[2], "target_mask": PIXELS[0], "paper": True},
        {"masks": PIXELS[[2, 0]]},
    ),
    "no background": (
        [CAT, DOG],
        {"source_mask": Region.full(), "target_mask": PIXELS[0], "paper": True},
        {"masks": torch.stack([PIXELS[0] | True, PIXELS[0]])},
    ),
    "words": (
        [CAT, BIRD],
        {"words": "cat", "threshold": 0.5},
        {"tokens": [[3], [7]], "threshold": 0.5},
    ),
    "words, several": (
        [CAT, DOG],
        {"words": [("red", "cat"), "red cat"], "threshold": 0.4},
        {"tokens": [[2, 3], [2, 3]], "threshold": 0.4},
    ),
    "words, encoder too": (
        [CAT, DOG],
        {"words": "cat", "threshold": 0.3, "sites": "self @>=1/2", "paper": True},
        {"tokens": [[3], [3]], "threshold": 0.3, "sites": "down_blocks.0 down_blocks.1 " + FINE},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow  # float64 runs against the literal code
def test_equals_the_official_matrices(case: str) -> None:
    prompts, ours, theirs = CASES[case]
    edit = MasaCtrl(prompts, **{"start": 0.34, **ours})
    pipe, generator = made("sd15", torch.float64), edit.generators()
    with Literal(Mutual(**theirs)).instead(pipe.unet):
        want = zoo.PIPELINES["sd15"].run(pipe, prompts, steps=STEPS, generator=generator)
    got = draw("sd15", edit, dtype=torch.float64)
    assert relative(got, want) < 1e-9  # float64
    assert relative(got[1:], plain("sd15", prompts, torch.float64)[1:]) > 1e-6


@pytest.mark.slow
def test_sites_before_the_first_map_use_the_last_steps() -> None:
    """The official code has none for them, and edits them without masks."""
    options = {"words": "cat", "threshold": 0.5, "sites": "self down0", "start": 0.0}
    ours, official = (MasaCtrl([CAT, DOG], paper=p, **options) for p in (False, True))
    unmasked = MasaCtrl([CAT, DOG], sites="self down0", start=0.0)
    assert torch.equal(draw("sd15", official), draw("sd15", unmasked))
    assert torch.equal(draw("sd15", ours, steps=1), draw("sd15", unmasked, steps=1))
    assert relative(draw("sd15", ours), draw("sd15", unmasked)) > 1e-4


# -- laws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_on_every_family(family: str) -> None:
    """Without strength no bit changes; with it every edit moves, and the source does not."""
    before = plain(family, [CAT, DOG], steps=2)
    assert torch.equal(draw(family, MasaCtrl([CAT, DOG], start=1.0), steps=2), before)
    after = draw(family, MasaCtrl([CAT, DOG], start=0.0), steps=2)
    assert torch.equal(after[0], before[0])
    assert relative(after[1], before[1]) > 1e-4


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("options", [{"union": True}, {"words": "cat", "threshold": 0.5}])
def test_every_form_leaves_the_source(family: str, options: dict[str, Any]) -> None:
    """With words alone, reading their maps changes nothing; without guidance half the rows are
    missing."""
    before = plain(family, [CAT, DOG], guidance=1.0, steps=2)
    none = MasaCtrl([CAT, DOG], start=1.0, **options)
    assert torch.equal(draw(family, none, guidance=1.0, steps=2), before)
    after = draw(family, MasaCtrl([CAT, DOG], start=0.0, **options), guidance=1.0, steps=2)
    assert torch.equal(after[0], before[0])
    assert relative(after[1], before[1]) > 1e-4


def test_before_the_start_nothing_changes() -> None:
    """One step of two: after the first the latents are the plain ones."""
    seen: dict[str, list[Tensor]] = {"plain": [], "edit": []}

    class Record(Editor):
        def __init__(self, name: str) -> None:
            self.key = name

        def after(self, state: Any) -> None:
            seen[self.key].append(state.latents.clone())

    draw("sd15", MasaCtrl([CAT, DOG], start=1.0), Record("plain"), steps=2)
    draw("sd15", MasaCtrl([CAT, DOG], start=0.5), Record("edit"), steps=2)
    first, second = zip(seen["plain"], seen["edit"], strict=True)
    assert torch.equal(*first) and not torch.equal(*second)


def test_an_edit_that_is_its_source_stays_it() -> None:
    for options in ({}, {"union": True}, {"words": "cat"}):
        out = draw("sd15", MasaCtrl([CAT, CAT], start=0.0, **options), dtype=torch.float64)
        # Words: each side sees itself alone, so the source's own form is another.
        if "words" not in options:
            assert relative(out[1], out[0]) < 1e-12


def test_several_images_of_a_prompt() -> None:
    """Image j of an edit reads image j of the source."""
    edit = MasaCtrl([CAT, DOG], start=0.0)
    both = draw("sd15", edit, n=2, generator=edit.generators(images=2))
    for j in range(2):
        one = draw("sd15", edit, generator=edit.generators(seed=j))
        assert relative(both[j::2], one) < 1e-5


def test_a_mask_without_keys_parts_nothing() -> None:
    """Softmax over forbidden keys alone would be even attention; the official code's is."""
    small = Region.box(0.1, 0.1, 0.6, 0.6)
    edit = MasaCtrl([CAT, DOG], start=0.0, source_mask=Region.full(), target_mask=small)
    assert torch.equal(draw("sd15", edit), draw("sd15", MasaCtrl([CAT, DOG], start=0.0)))


def test_one_denoiser_call_per_step() -> None:
    calls: list[int] = []
    edit = MasaCtrl([CAT, DOG], words="cat")
    handle = made("sd15", torch.float32).unet.conv_in.register_forward_hook(
        lambda m, a, out: calls.append(len(out))
    )
    try:
        draw("sd15", edit)
    finally:
        handle.remove()
    assert calls == [4] * STEPS  # source and edit, with and without the prompt


# -- a pinned source ---------------------------------------------------------------------------


def test_the_source_follows_its_path() -> None:
    """Before every step; the edits start from its noise and then go their own way."""
    path = torch.randn(STEPS + 1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    seen: list[Tensor] = []

    class Record(Editor):
        def before(self, state: Any) -> None:
            seen.append(state.latents.clone())

    for options in ({}, {"start": 1.0}):
        seen.clear()
        edit = MasaCtrl([CAT, DOG], path=path, **options)
        draw("sd15", edit, Record())
        assert torch.equal(torch.stack([x[0] for x in seen]), path[:STEPS])
        assert torch.equal(seen[0][1], path[0]) and not torch.equal(seen[1][1], path[1])


def test_a_path_that_is_the_plain_one_changes_nothing() -> None:
    seen: list[Tensor] = []

    class Record(Editor):
        def before(self, state: Any) -> None:
            seen.append(state.latents[0].clone())

    edit = MasaCtrl([CAT, DOG])
    want = draw("sd15", edit, Record())
    assert torch.equal(draw("sd15", MasaCtrl([CAT, DOG], path=seen)), want)


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 1.2}, "start=1.2; give a fraction of the schedule"),
        ({"threshold": 0.0, "words": "cat"}, r"threshold=0.0; give a share"),
        ({"words": ["cat", None]}, r"words=.*; give a word of its own thing for every prompt"),
        ({"words": ["cat"]}, r"words=.* has 1 entries for 2 prompts"),
        ({"words": "cat", "union": True}, r"give one of source_mask with target_mask, words"),
        ({"source_mask": LEFT}, r"give source_mask and target_mask, both or neither"),
        ({"source_mask": LEFT, "target_mask": [LEFT, LEFT]}, r"has 2 entries for 1 edits"),
        ({"source_mask": (0.5, 0, 0.2, 1), "target_mask": LEFT}, r"source_mask: box: 0.5"),
        ({"path": []}, r"path holds no latents"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MasaCtrl([CAT, DOG], **options)


def test_wrong_for_the_model() -> None:
    for options, message in (
        ({"words": "horse"}, "'horse' is not in the prompt"),
        ({"sites": "cross up"}, "holds up_blocks.* a cross site; give sites where the image"),
        ({"path": torch.zeros(2, 4, 16, 16)}, "path has 2 levels and this run 3"),
        ({"path": torch.zeros(4, 4, 8, 8)}, r"is of latents \(4, 8, 8\); this run draws"),
    ):
        with pytest.raises(InputError, match=message):
            draw("sd15", MasaCtrl([CAT, DOG], **options))
    with (
        pytest.raises(InputError, match="the pipeline was called with"),
        control(made("sd15", torch.float32), MasaCtrl([CAT, DOG])),
    ):
        zoo.PIPELINES["sd15"].run(made("sd15", torch.float32), [DOG, CAT])


def test_not_with_self_replacement() -> None:
    """Together they would return the source row's output; windows that do not meet are fine."""
    edit = MasaCtrl([CAT, DOG], sites="self", start=0.2)
    with pytest.raises(ConflictError, match="MasaCtrl and PromptToPrompt both claim the subst"):
        draw("sd15", edit, PromptToPrompt([CAT, DOG], self_replace=0.4))
    draw("sd15", edit, PromptToPrompt([CAT, DOG], self_replace=0.2))
    draw("sd15", MasaCtrl([CAT, DOG], union=True), PromptToPrompt([CAT, DOG]))


def test_run() -> None:
    edit = MasaCtrl([CAT, DOG])
    call = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}
    got = edit.run(made("sd15", torch.float32), hookctl.Maps("cat"), seed=0, **call)
    assert torch.equal(got, draw("sd15", edit, steps=2, negatives=""))
