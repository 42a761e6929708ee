"""One denoiser step of a UNet of SD1.5's size under Prompt-to-Prompt, against eager control.

    python -m tests.benchmarks.p2p_unet_step [--size full|small] [--rounds N] [--json FILE]

Random weights, four rows (source and edit, guided), self- and cross-replacement active. The eager
form is what the official code does: every site forms its matrix, edited in place. Prints medians
of interleaved rounds and the largest tensor that each form made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hookctl
from hookctl.attention.call import AttentionCall, Routing

ROWS = ("uncond", "cond")
TOKENS = 77


class SwapWords(hookctl.Editor):
    """Self- and cross-replacement of row (cond, 1) by row (cond, 0), at every site."""

    def __init__(self, token_map: Tensor) -> None:
        self.routing = Routing.of(TOKENS, token_map)

    def attention(self, call: AttentionCall) -> None:
        for row in call.rows.where(branch="cond", prompt=1):
            source = call.rows.twin(row, prompt=0)
            if call.site.kind == "self":
                call.borrow(row, q=source, k=source)
            else:
                call.route_by(row, source, self.routing)


class EagerSwapWords:
    """The same edit as the official code makes it: on the probabilities, in place."""

    def __init__(self, token_map: Tensor) -> None:
        self.token_map = token_map

    def __call__(
        self, attn: Any, hidden: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        text = hidden if encoder_hidden_states is None else encoder_hidden_states
        q = attn.head_to_batch_dim(attn.to_q(hidden))
        k, v = (attn.head_to_batch_dim(to(text)) for to in (attn.to_k, attn.to_v))
        p = torch.baddbmm(
            q.new_empty(q.shape[0], q.shape[1], k.shape[1]), q, k.mT, beta=0, alpha=attn.scale
        ).softmax(-1)
        rows = p.view(4, attn.heads, *p.shape[1:])
        if encoder_hidden_states is None:
            rows[3] = rows[2]
        else:
            rows[3] = rows[2] @ self.token_map
        out = attn.batch_to_head_dim(torch.bmm(p, v))
        return attn.to_out[0](out)


class Largest(TorchDispatchMode):
    """Remembers the most elements that any tensor made under it has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def unet_of(size: str) -> tuple[UNet2DConditionModel, int]:
    """A random UNet and the side of its latent."""
    if size == "full":
        return UNet2DConditionModel(cross_attention_dim=768, sample_size=64), 64
    small = UNet2DConditionModel(
        block_out_channels=(64, 128, 256, 256),
        cross_attention_dim=256,
        attention_head_dim=4,
        norm_num_groups=16,
        sample_size=64,
    )
    return small, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("full", "small"), default="small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    unet, side = unet_of(options.size)
    unet.eval().requires_grad_(False)
    sample = torch.randn(4, 4, side, side)
    text = torch.randn(4, TOKENS, unet.config.cross_attention_dim)
    token_map = torch.eye(TOKENS)[:, torch.randperm(TOKENS)]
    processors = dict(unet.attn_processors)

    def plain() -> Tensor:
        return unet(sample, 500, text).sample

    def edited() -> Tensor:
        with hookctl.control(unet, SwapWords(token_map), rows=ROWS):
            return unet(sample, 500, text).sample

    def eager() -> Tensor:
        unet.set_attn_processor(EagerSwapWords(token_map))
        try:
            return unet(sample, 500, text).sample
        finally:
            unet.set_attn_processor(dict(processors))

    forms: dict[str, Callable[[], Tensor]] = {"plain": plain, "hookctl": edited, "eager": eager}
    with torch.no_grad():
        largest = {}
        outputs = {}
        for name, form in forms.items():
            with Largest() as seen:
                outputs[name] = form()
            largest[name] = seen.numel
        error = float((outputs["hookctl"] - outputs["eager"]).abs().max())
        if error > 1e-3 * float(outputs["eager"].abs().max()):
            raise SystemExit(f"the two forms of the edit disagree by {error}: no figures")
        times: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(options.rounds):
            for name, form in forms.items():
                begun = time.process_time()
                form()
                times[name].append(time.process_time() - begun)
    medians = {name: statistics.median(values) for name, values in times.items()}
    report = {
        "size": options.size,
        "seconds": {name: round(value, 3) for name, value in medians.items()},
        "spread": {n: [round(min(t), 3), round(max(t), 3)] for n, t in times.items()},
        "eager_over_hookctl": round(medians["eager"] / medians["hookctl"], 3),
        "hookctl_over_plain": round(medians["hookctl"] / medians["plain"], 3),
        "largest_tensor": largest,
        "tokens_squared": side**4,
        "max_difference": error,
    }
    print(json.dumps(report, indent=2))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    main()
