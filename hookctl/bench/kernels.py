"""Cases of the kernels beside attention: maps with gradients, mixtures of latents, filters."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hookctl.address.rows import COND
from hookctl.address.sites import Site
from hookctl.bench.calls import CHECKED, READ, Bench, Shape, call_of
from hookctl.bench.edits import TEXT, guided, probabilities, rows_of, sampled, weigh
from hookctl.bench.measure import OURS, Case, Form
from hookctl.evaluate import plan
from hookctl.kernels.common.launch import available, interpreting
from hookctl.kernels.fourier_gain import fourier_gain
from hookctl.kernels.latent_mixing import (
    local_blend,
    merge_instances,
    mix_predictions,
    update_difference,
)

GROUP = "kernel"
MAPS: tuple[tuple[Shape, bool], ...] = (((1024, 20, 64), False), ((1024, 20, 64), True))
SIDES = (64, 128)  # of latents
FEATURES = ((1280, 32), (640, 64))  # channels, side: FreeU's backbone features of SDXL
LONG: tuple[Shape, ...] = ((4096, 10, 64), (4096, 24, 128))
GAIN, RATE = 0.9, 0.1
QUICK_MAPS: tuple[tuple[Shape, bool], ...] = (((256, 8, 40), False), ((1024, 8, 40), True))


def cases(bench: Bench, quick: bool) -> Iterator[Case]:
    """Every kernel of this kind at a few shapes."""
    for shape, of_self in QUICK_MAPS if quick else MAPS:
        yield map_gradient(bench, shape, of_self)
    if available(bench.device) is None and not interpreting():
        yield from (long_keys(bench, shape) for shape in LONG)
    for side in SIDES[:1] if quick else SIDES:
        yield from mixing(bench, side)
    for channels, side in FEATURES[:1] if quick else FEATURES:
        yield gain(bench, channels, side)


def map_gradient(bench: Bench, shape: Shape, of_self: bool) -> Case:
    """The gradient of an energy of two keys' maps, to q and k: what training-free methods take.

    eager: autograd through the explicit probabilities of all rows.
    """
    n, heads, d = shape
    m = n if of_self else TEXT
    rows = rows_of()
    q, k, v = bench.given(len(rows), n, m, heads, d)
    here = guided(q)
    site = Site("site", "self" if of_self else "cross", "down", 0, 0)
    read = torch.tensor(READ, device=q.device)

    def by_engine(q: Tensor, k: Tensor) -> Tensor:
        call, found = call_of(site, q, k, v.to(q), rows), list[Tensor]()
        call.read(rows.where(branch=COND), READ, lambda row, values: found.append(values[0]))
        plan.read_only(call)
        return torch.stack(found)

    def explicit(q: Tensor, k: Tensor) -> Tensor:
        return probabilities(q, k)[here].mean(1)[..., read]

    def by_kernel(q: Tensor, k: Tensor) -> Tensor:
        from hookctl.kernels.map_readout import map_readout

        return map_readout(q[here], k[here], read)

    forms = {OURS: _gradient(by_engine, q, k), "eager": _gradient(explicit, q, k)}
    if available(bench.device) is None and not interpreting():
        forms["kernel"] = _gradient(by_kernel, q, k)
    count = (here.stop - here.start) * heads
    return Case(
        GROUP, "map gradient", {"tokens": n, "keys": m, "heads": heads, "channels": d}, forms,
        _gradient(explicit, q.double(), k.double()), tolerance=4 * bench.tolerance,
        flops=6.0 * count * n * m * d,  # scores, dq and dk
        traffic=2.0 * q.element_size() * count * d * (n + m),
    )  # fmt: skip


def long_keys(bench: Bench, shape: Shape) -> Case:
    """The sum of terms where every row has one, over long keys: a plain call, by its kernel."""
    from hookctl.kernels.sum_of_terms import Stretch, sum_of_terms

    n, heads, d = shape
    rows = len(rows_of())
    q, k, v = bench.given(rows, n, n, heads, d)
    of_q, of_k, of_v = ([x.unsqueeze(1)] for x in (q, k, v))
    terms = [Stretch(row, row, row, row) for row in range(rows)]
    places = sampled(n, CHECKED).to(q.device)

    def by_kernel() -> Tensor:
        return sum_of_terms(of_q, of_k, of_v, terms, d**-0.5)[0].flatten(0, 1)

    def truth() -> Tensor:
        return weigh(probabilities(q[:, :, places].double(), k.double()), v.double())

    forms: dict[str, Form] = {
        OURS: by_kernel,
        "sdpa": lambda: scaled_dot_product_attention(q, k, v),
    }
    return Case(
        GROUP, "one term, long keys", {"tokens": n, "heads": heads, "channels": d}, forms, truth,
        lambda out: out[:, :, places], bench.tolerance, flops=4.0 * rows * heads * n * n * d,
        traffic=4.0 * q.numel() * q.element_size(),
    )  # fmt: skip


def _gradient(maps: Callable[[Tensor, Tensor], Tensor], q: Tensor, k: Tensor) -> Form:
    """[elements of q and of k]: of the mean square of the maps, scaled to the size of a map."""

    def run() -> Tensor:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k)]
            energy = (k.shape[2] * maps(*leaves)).square().mean()
            found = torch.autograd.grad(energy * q.shape[2], leaves)
        return torch.cat([g.flatten() for g in found])

    return run


def mixing(bench: Bench, side: int) -> Iterator[Case]:
    """Local blend, the merge of instances and RealCompo's mixture, against the official forms."""
    generator = torch.Generator().manual_seed(side)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, side, side, generator=generator).to(bench.device, bench.dtype)

    x, a, b = random(8, 4), random(2, 4), random(2, 4)
    masks = (random(7) > 0).to(bench.dtype)
    soft, d = random(8).sigmoid(), random(2)
    sources = torch.zeros(8, dtype=torch.long, device=bench.device)

    def pasted(x: Tensor) -> Tensor:
        out = x[0]
        for one, mask in zip(x[1:], masks.to(x), strict=True):
            out = out * (1 - mask) + one * mask
        return out

    def mixed(a: Tensor, b: Tensor) -> Tensor:
        """By a softmax over both maps, as the paper has it."""
        both = torch.stack([d.to(a) / 2, -d.to(a) / 2]).softmax(0)
        return both[0][:, None] * a + both[1][:, None] * b

    yield _elementwise(
        bench, "local blend", side, lambda x: local_blend(x, sources, soft),
        lambda x: x[:1] + soft.to(x)[:, None] * (x - x[:1]), x, moved=[x, x, soft],
    )  # fmt: skip
    yield _elementwise(
        bench, "merge by paste", side, lambda x: merge_instances(x, masks), pasted, x,
        moved=[x, masks, x[0]],
    )  # fmt: skip
    yield _elementwise(
        bench, "merge by mean", side, merge_instances, lambda x: x.mean(0), x, moved=[x, x[0]]
    )

    def updated(a: Tensor, b: Tensor) -> Tensor:
        share = d.to(a).sigmoid()
        return d.to(a) - RATE * 2 * share * (1 - share) * (a * (a - b)).sum(1)

    yield _elementwise(
        bench, "RealCompo update", side, lambda a, b: update_difference(d, a, a, b, RATE), updated,
        a, b, moved=[a, b, a, d, d],
    )  # fmt: skip
    yield _elementwise(
        bench, "RealCompo mixture", side, lambda a, b: mix_predictions(a, b, d), mixed, a, b,
        moved=[a, b, d, a],
    )  # fmt: skip


def gain(bench: Bench, channels: int, side: int) -> Case:
    """The gain of the lowest frequencies, against the published form by FFT."""
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(4, channels, side, side, generator=generator).to(bench.device, bench.dtype)

    def by_fft(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        spectrum = torch.fft.fftshift(torch.fft.fftn(wide, dim=(-2, -1)), dim=(-2, -1))
        mask = torch.ones_like(spectrum.real)
        middle = side // 2
        mask[..., middle - 1 : middle + 1, middle - 1 : middle + 1] = GAIN
        back = torch.fft.ifftshift(spectrum * mask, dim=(-2, -1))
        return torch.fft.ifftn(back, dim=(-2, -1)).real.to(x.dtype)

    products = 4.0 * 7 * x.numel()  # with seven waves, and their sum
    return _elementwise(
        bench, "Fourier gain", side, lambda x: fourier_gain(x, GAIN), by_fft, x,
        moved=[x, x], flops=products, channels=channels,
    )  # fmt: skip


def _elementwise(
    bench: Bench,
    name: str,
    side: int,
    ours: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    *given: Tensor,
    moved: list[Tensor],
    flops: float = 0.0,
    **more: int,
) -> Case:
    """moved: tensors as large as what must be read and written."""
    shape = {"side": side, "rows": len(given[0]), **more}
    forms: dict[str, Form] = {OURS: lambda: ours(*given), "eager": lambda: eager(*given)}
    return Case(
        GROUP, name, shape, forms, lambda: eager(*(x.double() for x in given)),
        tolerance=bench.tolerance, flops=flops,
        traffic=float(sum(x.numel() * x.element_size() for x in moved)),
    )  # fmt: skip
