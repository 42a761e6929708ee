"""`LoRA`: a low-rank change of a model, kept to a region of the image or to words of the prompt.

Hu et al., "LoRA", arXiv 2106.09685: y = W x + s B A x. Here each token has a share c of the change,

    y_n = W x_n + s c(n) B A x_n

of an image token how much of it lies in the region, of a text token whether it is of the words.
Where the image attends to a text apart (UNets, PixArt, Wan), places of the region see keys and
values of the text that the LoRA has changed, and the others the model's own:

    out(n) = c(n) Attn(q_n, k', v') + (1 - c(n)) Attn(q_n, k, v)
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hookctl.address.families import denoisers_of, joint_order, linears, sites_of
from hookctl.address.references import check_references, reference_index
from hookctl.address.regions import Region, RegionLike, region_of
from hookctl.address.rows import COND, Row
from hookctl.address.sites import Grid, Selector
from hookctl.address.text import TextLayout
from hookctl.arguments import checked, is_list, is_text, number, refusal, share, whole
from hookctl.attention.call import AttentionCall
from hookctl.editor import TEXTS, WHOLE_IMAGE, WORDS, Claim, Editor
from hookctl.errors import HookctlWarning, InputError
from hookctl.learned.files import Checkpoint
from hookctl.learned.lora_files import Delta, LoraFile, check_path, read_lora
from hookctl.learned.token_spans import over_images, token_spans
from hookctl.loop.inserting import LinearCall
from hookctl.loop.state import State
from hookctl.run_state import RunState

_KEYS = re.compile(r"(.+)\.to_([kv])$")


class LoRA(Editor):
    """A LoRA of a file, in a region or at words alone; without both, everywhere.

        edit = LoRA("style.safetensors", region="box:0,0,0.5,1")
        with hookctl.control(pipe, edit, LoRA("face.safetensors", words="cat")):
            pipe("a cat and a dog")

    file: safetensors in any layout that `pipe.load_lora_weights` reads; of it, what changes the
        denoiser, of two the first. Several stack, as do those that the pipeline carries itself;
        where regions of several overlap, a text that stands apart is that of the last.
    region: where in the image; a `hookctl.Region`, a box (x0, y0, x1, y1), a mask, or a text such
        as "box:0,0,0.5,1". edge: width of its soft border, a fraction of the shorter side.
    words: words or phrases of the prompt, whose tokens alone are changed, in the rows that see it;
        "references[0]" is a reference image of an edit model.
    strength: s, 1 as trained; prompts: indices of the prompts whose images it is for, None: all;
    start, stop: fractions of the schedule.

    Layers that act on no tokens (modulation by time) can't be kept to places: with a region or
    words they are left out, and a warning says how many. In models that hold text and image in one
    sequence the text's own stream is changed at words only. A strength of 0 leaves a run bit for
    bit as it was. Raises what `lora_files.read_lora` does, on entering `control`, and WordError for
    words that a prompt lacks.
    """

    sites: RunState[Selector] = RunState(None)
    _deltas: RunState[Mapping[str, Delta]] = RunState(factory=dict)
    _layout: RunState[TextLayout | None] = RunState(None)
    _joint: RunState[str | None] = RunState(None)
    _cross: RunState[dict[str, nn.Module]] = RunState(factory=dict)
    _changed: RunState[dict[str, dict[str, Tensor]]] = RunState(factory=dict)
    _others: RunState[frozenset[int]] = RunState(frozenset())
    _prompts: RunState[tuple[str, ...]] = RunState(())
    _left_out: RunState[dict[str, None]] = RunState(factory=dict)
    _shares: RunState[dict[Grid, Tensor]] = RunState(factory=dict)
    _weights: RunState[dict[Any, tuple[Tensor, Tensor]]] = RunState(factory=dict)

    @checked(own=("file", "words", "prompts"))
    def __init__(
        self,
        file: Path | str | LoraFile,
        *,
        region: RegionLike | None = None,
        words: str | Sequence[str] | None = None,
        strength: float = 1.0,
        edge: float = 0.0,
        prompts: Sequence[int] | None = None,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        self.strength = number(strength, f"{self.name}: strength")
        self.edge = share(edge, f"{self.name}: edge")
        given: Any = [words] if isinstance(words, str) else [] if words is None else words
        named = is_list(given) and all(is_text(word) and word.strip() for word in given)
        if not named or (words is not None and not given):
            raise refusal(f"{self.name}: words", words, "words of the prompt, such as 'cat'")
        self.references = [i for word in given if (i := reference_index(word)) is not None]
        self.words = [word for word in given if reference_index(word) is None]
        self.region: Region | None = None
        if region is not None:
            self.region = region_of(region, f"{self.name}: region")
        self.everywhere = region is None and not given
        self.prompts: set[int] | None = None
        if prompts is not None:
            if not is_list(prompts) or not prompts:
                raise refusal(f"{self.name}: prompts", prompts, "indices of prompts, such as [0]")
            self.prompts = {whole(prompt, f"{self.name}: prompts") for prompt in prompts}
        self.start, self.stop = start, stop
        if not isinstance(file, LoraFile | str | Path):
            raise refusal(f"{self.name}: file", file, "the path of a LoRA in safetensors")
        self.file = file if isinstance(file, LoraFile) else check_path(file)

    def neutral(self) -> bool:
        return self.strength == 0

    def claims(self) -> Sequence[Claim]:
        claimed = [WHOLE_IMAGE] if self.region is not None else []
        claimed += [WORDS, TEXTS] if self.words else []
        return [Claim(what, window=self.window(), shared=True) for what in claimed]

    def attach(self, target: Any) -> None:
        given = self.file
        self._deltas = (
            given.deltas if isinstance(given, LoraFile) else read_lora(given, target).deltas
        )
        self._layout = TextLayout(target) if self.words else None
        (_, model), *others = denoisers_of(target)
        self._joint = joint_order(model)
        # Those of the same path in a second denoiser, which has LoRAs of its own.
        self._others = frozenset(id(layer) for _, one in others for _, layer in linears(one))
        self._cross = {
            site.path: model.get_submodule(site.path)
            for site in sites_of(model)
            if site.kind == "cross"
        }
        self.sites = "cross" if self._cross else None

    def begin(self, state: State) -> None:
        self._changed, self._left_out, self._shares, self._weights = {}, {}, {}, {}
        self._prompts = state.prompts
        model = type(state.denoiser).__name__
        check_references(self.name, self.references, state.images_in_sequence, model)
        if self.words and not state.prompts:
            raise InputError(
                f"{self.name}: the pipeline was called without text prompts, so its words can't be "
                "found; call it with prompt=, or control(..., texts=)"
            )
        for index, prompt in enumerate(state.prompts):
            if self.prompts is None or index in self.prompts:
                self._tokens(prompt, state.own_text)

    # -- layers --------------------------------------------------------------------------------

    def linears(self, path: str) -> bool:
        return path in self._deltas

    def linear(self, call: LinearCall) -> None:
        if self.neutral() or id(call.layer) in self._others:
            return
        delta = self._deltas[call.name]
        key = (call.name, call.input.device, call.input.dtype)
        if key not in self._weights:
            self._weights[key] = delta.down.to(call.input), delta.up.to(call.input)
        down, up = self._weights[key]
        scale = self.strength * delta.scale
        rows = [r for r in call.rows if self.prompts is None or r.prompt in self.prompts]
        chosen = None if len(rows) == len(call.rows) else rows
        match = _KEYS.fullmatch(call.name)
        of_keys = match is not None and match[1] in self._cross
        if self.everywhere:
            call.add(down, up, scale, rows=chosen)
        elif call.output.dim() == 4 and not of_keys:
            self._convolve(call, down, up, scale, chosen)
        elif call.input.dim() != 3:
            self._left_out[call.name] = None
        elif of_keys and call.text == call.input.shape[-2]:
            assert match is not None
            if self.region is not None:
                kept = self._changed.setdefault(match[1], {})
                change = F.linear(F.linear(call.input, down), up) * scale
                # What others change of the output is in the call's keys, unless a norm follows.
                normed = self._norm(match[1], match[2]) is not None
                kept[match[2]] = call.output + change if normed else change
            self._add_words(call, down, up, scale, rows, 0)
        else:
            self._by_tokens(call, down, up, scale, rows)

    def _convolve(
        self, call: LinearCall, down: Tensor, up: Tensor, scale: float, rows: list[Row] | None
    ) -> None:
        if self.region is not None:
            height, width = call.output.shape[-2:]
            call.add(down, up, scale, rows=rows, tokens=self._share(Grid(height, width))[0])

    def _by_tokens(
        self, call: LinearCall, down: Tensor, up: Tensor, scale: float, rows: list[Row]
    ) -> None:
        """Of a layer whose input is tokens of the image, of the text, or of both."""
        image, text = token_spans(call, self._joint)
        if image is None and text is None:
            self._left_out[call.name] = None
            return
        if image is not None and (self.region is not None or self.references):
            of_drawn = None if self.region is None else self._share
            weight = over_images(call.input.shape[-2], image, of_drawn, self.references)
            if weight.any():
                call.add(down, up, scale, rows=rows, tokens=weight)
        if text is not None:
            self._add_words(call, down, up, scale, rows, text)

    def _add_words(
        self, call: LinearCall, down: Tensor, up: Tensor, scale: float, rows: list[Row], first: int
    ) -> None:
        """At the tokens of the words of each prompt; first: where the text begins."""
        for prompt in dict.fromkeys(row.prompt for row in rows) if self.words else ():
            weight = torch.zeros(call.input.shape[-2])
            weight[[first + p for p in self._tokens(self._prompts[prompt], call.own_text)]] = 1
            seen = [row for row in rows if row.prompt == prompt and row.role == COND]
            call.add(down, up, scale, rows=seen, tokens=weight)

    def _tokens(self, prompt: str, tokens: int | None) -> list[int]:
        """Positions of the words in the pipeline's own text."""
        if self._layout is None:
            return []
        text = self._layout.read(prompt, tokens)
        return sorted({p for word in self.words for p in text.find(word)})

    def _share(self, grid: Grid) -> Tensor:
        """How much of each token lies in the region, [frames, height, width]."""
        assert self.region is not None  # the callers asked
        if grid not in self._shares:
            one = self.region.feathered(grid.height, grid.width, self.edge)
            self._shares[grid] = one.expand(grid.frames, -1, -1)
        return self._shares[grid]

    # -- texts that stand apart ----------------------------------------------------------------

    def attention(self, call: AttentionCall) -> None:
        """Places of the region see what the LoRA makes of the text's keys and values."""
        changed = self._changed.pop(call.site.path, None) if call.index == 0 else None
        if not changed or self.region is None:
            return
        grid = call.require_grid(self.name)
        rows = [r for r in call.rows if self.prompts is None or r.prompt in self.prompts]
        where = self._share(grid).flatten()
        own = {"k": call.k, "v": call.v}
        heads = {name: self._heads(call, name, x, own[name]) for name, x in changed.items()}
        for row in rows:
            call.replace(row, **{n: x[row.index] for n, x in heads.items()}, where=where)

    def _heads(self, call: AttentionCall, name: str, x: Tensor, own: Tensor) -> Tensor:
        """Changed keys or values as the attention has them, of the change alone or, where they are
        normalised, of all, [batch, tokens, heads * channels]."""
        rows, sub, heads, tokens, channels = own.shape
        norm = self._norm(call.site.path, name)
        whole = norm is not None and getattr(norm, "weight", own).shape[-1] == x.shape[-1]
        x = norm(x) if norm is not None and whole else x
        x = x[:, :tokens].unflatten(-1, (heads, channels))
        x = norm(x) if norm is not None and not whole else x
        x = x.transpose(1, 2).unflatten(0, (rows, sub)).to(own.dtype)
        return own + x if norm is None else x

    def _norm(self, path: str, name: str) -> Any:
        """What normalises the keys (k) or values (v) of an attention, None for nothing."""
        return getattr(self._cross[path], f"norm_{name}", None)

    def after(self, state: State) -> None:
        if self._left_out and state.clock.step == 0:
            names = list(self._left_out)
            warnings.warn(
                f"{self.name}: {len(names)} of the file's {len(self._deltas)} layers act on no "
                f"tokens (such as {names[0]}), so they can't be kept to places and are left out",
                HookctlWarning,
                stacklevel=2,
            )


def from_checkpoint(
    checkpoint: Checkpoint,
    pipe: Any,
    *,
    region: RegionLike | None = None,
    words: str | Sequence[str] | None = None,
    strength: float = 1.0,
    edge: float = 0.0,
    start: float = 0.0,
    stop: float = 1.0,
) -> LoRA:
    """The editor of a file; what of the file has no place in the image is warned of."""
    file = read_lora(checkpoint.path, pipe)
    for note in file.notes:
        warnings.warn(f"{checkpoint.path}: {note}", HookctlWarning, stacklevel=2)
    return LoRA(
        file, region=region, words=words, strength=strength, edge=edge, start=start, stop=stop
    )
