"""InstantID: people by one picture of their face, and by where their eyes, nose and mouth are.

Wang et al., "InstantID", arXiv 2401.07519. A resampler makes tokens of a face's embedding, which
the denoiser reads as an IP-Adapter's. IdentityNet, a ControlNet, reads them too, in place of the
text, and a picture of five points (`keypoints`); what it finds is added to the encoder. Both see
the tokens of a zero embedding in rows without the prompt; the points are there in all.

Of several people, each with a region, IdentityNet is asked about one after the other, and what it
finds counts in the region:

    skip_k = skip_k + s sum_j M_j * R_k(z_t, points_j; tokens_j)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hookctl.address.clock import Window
from hookctl.address.families import denoiser_of, uncompiled
from hookctl.address.rows import Row
from hookctl.arguments import flag, number, refusal, shown
from hookctl.editor import WHOLE_IMAGE, Claim
from hookctl.errors import InputError, UnsupportedError
from hookctl.learned.adapter import Adapter, fitting
from hookctl.learned.faces import check_length
from hookctl.learned.image_prompts import ImagePrompt, Part
from hookctl.learned.ip_adapter import IPAdapter, is_unguided
from hookctl.learned.keypoints import draw_keypoints
from hookctl.learned.modules.resampler import Resampler
from hookctl.learned.people import Person, people_of, points_of
from hookctl.learned.weights import Weights
from hookctl.loop.arguments import take_rows
from hookctl.loop.residuals import Residuals
from hookctl.loop.state import State
from hookctl.run_state import RunState


@dataclass(frozen=True, eq=False)
class _Placed(ImagePrompt):
    """A face with its five points, [5, 2]; None leaves its place free."""

    points: Tensor | None = None


class InstantID(IPAdapter):
    """Draw people whose faces are known.

        face = find_face(picture, face_analysis("~/insightface"))
        person = Person(face.embedding, face.keypoints)
        edit = hookctl.learned.load("ip-adapter.bin", pipe, people=person, identity_net=folder)

    adapter: the trained modules, with a `Resampler`. people: a `Person`, a list of them, or a list
    of lists, one for each prompt of the run. identity_net: diffusers' ControlNetModel, which is
    frozen, or None for the tokens alone. scale: of the tokens, at every site or by site
    (`IPAdapter`). control_scale: of IdentityNet; control_start, control_stop: when it acts, inside
    of start and stop. guess: IdentityNet adds to the rows with the prompt alone, and the less the
    finer the level (diffusers' guess_mode). The other options are `IPAdapter`'s.
    """

    argument = "people"

    _hints: RunState[dict[Any, Tensor]] = RunState(factory=dict)

    def __init__(
        self,
        adapter: Adapter,
        people: Any,
        identity_net: nn.Module | None = None,
        *,
        scale: float | Mapping[str, float] = 0.8,
        control_scale: float = 0.8,
        control_start: float = 0.0,
        control_stop: float = 1.0,
        guess: bool = False,
        **options: Any,
    ) -> None:
        if not isinstance(adapter, Adapter):
            raise refusal(f"{self.name}: adapter", adapter, "an Adapter (hookctl.learned.load)")
        if identity_net is not None and not isinstance(identity_net, nn.Module):
            wanted = "a ControlNetModel, or None; hookctl.learned.load reads its folder, too"
            raise refusal(f"{self.name}: identity_net", identity_net, wanted)
        if not isinstance(adapter.image_proj, Resampler):
            raise InputError(
                f"{self.name}: the adapter has a {type(adapter.image_proj).__name__}; InstantID's "
                "has a Resampler (ip-adapter.bin of InstantID)"
            )
        adapter.image_proj.reads = ("face",)
        self.control_scale = number(control_scale, f"{self.name}: control_scale")
        self.control = Window.of(
            (control_start, control_stop), f"{self.name}: control_start, control_stop"
        )
        self.guess = flag(guess, f"{self.name}: guess")
        super().__init__(adapter, people, scale=scale, **options)
        self._check_regions()
        self.identity_net = identity_net
        self._net = None if identity_net is None else Weights(identity_net)

    def _read(self, given: Any, name: str) -> ImagePrompt:
        if not isinstance(given, Person):
            raise refusal(name, given, "a Person(embedding, keypoints, region)")
        points = points_of(given.keypoints, f"{name}.keypoints")
        face = _Placed(face=given.embedding, region=given.region, scale=given.scale, points=points)
        prompt = super()._read(face, name)
        check_length(given.embedding, name, normalised=False)
        return prompt

    def _check_regions(self) -> None:
        for own in self.prompts:
            for name, prompt in own:
                if len(own) > 1 and prompt.region is None:
                    raise InputError(
                        f"{name} has no region, and there are {len(own)} people in one image; give "
                        "each Person(..., region=...), such as Face.region()"
                    )

    @property
    def controls(self) -> bool:
        """Whether IdentityNet adds anything."""
        return self._net is not None and self.control_scale != 0.0 and any(self.prompts)

    def neutral(self) -> bool:
        return super().neutral() and not self.controls

    def claims(self) -> Sequence[Claim]:
        if not self.controls:
            return super().claims()
        return [Claim(WHOLE_IMAGE, window=self.window(), shared=True)]  # points have places

    def attach(self, target: Any) -> None:
        super().attach(target)
        if self._net is not None:
            _check_net(self._net.module, uncompiled(denoiser_of(target)), self.name)

    # -- IdentityNet ---------------------------------------------------------------------------

    def residuals(self, state: State) -> Residuals | None:
        if not self.controls or not self.control.holds(state.clock):
            return None
        total: Residuals | None = None
        for j in range(max(map(len, self.parts))):
            found = self._found_of(j, state)
            if found is not None:
                total = found if total is None else total + found
        return total

    def _found_of(self, j: int, state: State) -> Residuals | None:
        """What IdentityNet finds of person j of every row's prompt, None if there is none in any.

        It is asked about the rows that have one, in guess mode about those with the prompt alone.
        """
        assert self._net is not None  # `controls` looked
        people: dict[int, Part] = {}
        for i, row in enumerate(state.rows):
            part = self._person(row, j)
            if part is not None and not (self.guess and is_unguided(row)):
                people[i] = part
        if not people:
            return None
        every = len(people) == len(state.rows)
        kwargs = state.kwargs if every else take_rows(state, [(i, i + 1) for i in people])
        sample: Tensor = kwargs[state.sample]
        net: Any = self._net.like(sample)
        channels = net.config.in_channels
        context = [
            self.tokens(sample, None if is_unguided(state.rows[i]) else part)
            for i, part in people.items()
        ]
        height, width = state.grid[-2:]
        factor = 2 ** (len(net.config.conditioning_embedding_out_channels) - 1)
        size = height * factor, width * factor
        hints = [self._hint(part, *size, sample) for part in people.values()]
        optional = ("class_labels", "timestep_cond", "added_cond_kwargs")
        skips, middle = net(
            sample[:, :channels],
            kwargs["timestep"],
            encoder_hidden_states=torch.cat(context),
            controlnet_cond=torch.stack(hints),
            conditioning_scale=self.control_scale,
            guess_mode=self.guess,
            return_dict=False,
            **{name: kwargs[name] for name in optional if kwargs.get(name) is not None},
        )
        skips, middle = [self._within(x, people) for x in skips], self._within(middle, people)
        if not every:
            skips = [_spread(x, people, len(state.rows)) for x in skips]
            middle = _spread(middle, people, len(state.rows))
        return Residuals(skips, middle)

    def _person(self, row: Row, j: int) -> Part | None:
        parts = self.parts[self.prompt_of(row)]
        return parts[j] if j < len(parts) else None

    def _hint(self, part: Part, height: int, width: int, like: Tensor) -> Tensor:
        """The picture of a person's points, [3, height, width] from 0 to 1."""
        key = id(part), height, width, like.device, like.dtype
        if key not in self._hints:
            points = getattr(part.prompts[0][1], "points", None)
            size = torch.tensor([width, height], dtype=torch.float64)
            faces = [] if points is None else [(points * size).tolist()]
            picture = np.array(draw_keypoints(faces, width, height))
            with torch.inference_mode(False):
                drawn = torch.from_numpy(picture).permute(2, 0, 1).double() / 255
                self._hints[key] = drawn.to(like)
        return self._hints[key]

    def _within(self, x: Tensor, people: Mapping[int, Part]) -> Tensor:
        """Residuals [rows, channels, height, width] where each row's person is."""
        if all(part.place is None for part in people.values()):
            return x
        shares = []
        for part in people.values():
            if part.place is None:
                shares.append(torch.ones(x.shape[-2:]))
            else:
                shares.append(self._share_on(part.place, x.shape[-2], x.shape[-1]))
        return x * torch.stack(shares).to(x)[:, None]


def _spread(x: Tensor, rows: Iterable[int], count: int) -> Tensor:
    """Residuals of some rows among all of a call, with zeros for the others."""
    at = torch.tensor(list(rows), device=x.device)
    return x.new_zeros(count, *x.shape[1:]).index_copy(0, at, x)


def _check_net(net: nn.Module, denoiser: nn.Module, who: str) -> None:
    """Raise InputError unless a ControlNet is of a model like this one."""
    own: Any = getattr(net, "config", None)
    wanted: Any = getattr(denoiser, "config", None)
    if own is None or not hasattr(net, "controlnet_down_blocks"):
        raise UnsupportedError(
            f"{who}: identity_net is a {type(net).__name__}; give diffusers' ControlNetModel"
        )
    for name in ("cross_attention_dim", "block_out_channels", "layers_per_block"):
        if _plain(own[name]) != _plain(wanted[name]):
            raise InputError(
                f"{who}: identity_net has {name}={own[name]}, but the model has {wanted[name]}; "
                "give the ControlNetModel that was trained for this base model"
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def from_checkpoint(
    checkpoint: Any,
    pipe: Any,
    *,
    people: Any,
    identity_net: nn.Module | str | Path | None = None,
    analysis: Any = None,
    **options: Any,
) -> InstantID:
    """The editor of a file (ip-adapter.bin).

    people: also tables of a file (`people.people_of`), whose pictures analysis finds the faces in:
    the folder of insightface's models, or what is made of it. identity_net: the folder of
    IdentityNet (ControlNetModel), or the model. options: of `InstantID`. Raises InputError if one
    of them does not fit.
    """
    people = people_of(people, analysis, f"{InstantID.__name__}: people")
    adapter = fitting(checkpoint, pipe, InstantID.__name__)
    if isinstance(identity_net, str | Path):
        identity_net = _loaded(identity_net, uncompiled(denoiser_of(pipe)))
    return InstantID(adapter, people, identity_net, **options)


def _loaded(folder: str | Path, denoiser: nn.Module) -> nn.Module:
    """A ControlNetModel from a folder, or a repository's name, by safetensors alone."""
    from diffusers import ControlNetModel

    dtype = next(denoiser.parameters()).dtype
    try:
        net: nn.Module = ControlNetModel.from_pretrained(
            str(folder), torch_dtype=dtype, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"InstantID: identity_net={str(folder)!r}: {shown(str(error))}; give the folder "
            "ControlNetModel, with config.json and diffusion_pytorch_model.safetensors"
        ) from None
    return net
