"""The layers of a transformer without which it draws another image.

Avrahami et al., "Stable Flow", arXiv 2411.14430, section 3.2: a few images are drawn with one block
left out at a time, its input going on as it is, and compared with those of the whole model. The
layers whose images are least alike are the vital ones. The paper compares by DINOv2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address import families
from hookctl.arguments import checked, is_list, is_text, refusal, whole
from hookctl.editor import Editor
from hookctl.errors import UnsupportedError
from hookctl.loop.inserting import BlockCall
from hookctl.session import control

Similarity = Callable[[Tensor, Tensor], float]  # of images [images, ..., 3, height, width], 0..1
_SIDE = 32  # of the images that are compared by themselves


class _WithoutBlock(Editor):
    """Every row passes a block by."""

    def __init__(self, site: str) -> None:
        self.sites = [site]

    def block(self, call: BlockCall) -> None:
        call.skip(call.rows)


@checked(own=("prompts", "similarity"))
def layer_similarities(
    pipe: Any,
    prompts: Sequence[str],
    *,
    similarity: Similarity | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **arguments: Any,
) -> dict[str, float]:
    """How much what a model draws without a block is like what it draws with all, by block.

    prompts: of the images that are drawn, 64 in the paper; similarity: of two batches of images,
        such as the mean cosine of their DINOv2 features; by default the correlation of their
        colours at 32 px, which tells layouts but not contents. seed: of the noise. progress: called
        with (blocks done, blocks in all). arguments: of the pipeline's call, such as
        num_inference_steps=15.

    Costs a run for each block, and one more. Raises UnsupportedError for a model without
    transformer blocks.
    """
    if not is_list(prompts) or not prompts or not all(map(is_text, prompts)):
        raise refusal("layer_similarities: prompts", prompts, "a list of texts")
    if similarity is not None and not callable(similarity):
        wanted = "a function of two batches of images, or None"
        raise refusal("layer_similarities: similarity", similarity, wanted)
    blocks = _blocks(pipe)

    def drawn() -> Tensor:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        given = {**arguments, "output_type": "pt", "return_dict": False}
        images: Tensor = pipe(prompt=list(prompts), generator=generators, **given)[0]
        return images.float().cpu()

    alike, whole_model, found = similarity or correlation, drawn(), dict[str, float]()
    for i, path in enumerate(blocks):
        with control(pipe, _WithoutBlock(path)):
            found[path] = float(alike(whole_model, drawn()))
        if progress is not None:
            progress(i + 1, len(blocks))
    return found


def vital_sites(
    pipe: Any, prompts: Sequence[str], *, count: int | None = None, **options: Any
) -> list[str]:
    """The attention sites of the most vital blocks, in model order, for `sites=`.

    count: how many, by default a sixth of all, as the paper's 9 of 57. options: as of
    `layer_similarities`.
    """
    layers = len(_blocks(pipe))
    wanted = max(1, round(layers * 9 / 57)) if count is None else count
    wanted = whole(wanted, "vital_sites: count", 1, layers)
    found = layer_similarities(pipe, prompts, **options)
    vital = set(sorted(found, key=lambda path: found[path])[:wanted])
    return [path for path in found if path in vital]


def _blocks(pipe: Any) -> list[str]:
    """The attention site of every transformer block."""
    found = [
        f"{name}.{block.site.path}" if name else block.site.path
        for name, model in families.denoisers_of(pipe)
        for block in families.blocks_of(model, families.sites_of(model)).values()
    ]
    if not found:
        raise UnsupportedError(f"vital layers: {type(pipe).__name__} has no blocks to leave out")
    return found


def correlation(a: Tensor, b: Tensor) -> float:
    """Of the colours of two batches of images, [images, ..., 3, height, width], at 32 px, -1 to
    1; the mean over the images."""

    def centred(x: Tensor) -> Tensor:
        small = F.adaptive_avg_pool2d(x.flatten(0, -4), (_SIDE, _SIDE)).flatten(1)
        return small - small.mean(1, keepdim=True)

    return float(F.cosine_similarity(centred(a), centred(b), dim=1).mean())
