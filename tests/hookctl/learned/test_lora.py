"""LoRAs of files in several layouts, in a region and at words, against explicit layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import hookctl
from hookctl import control
from hookctl.address.families import linears
from hookctl.address.regions import region_of
from hookctl.address.text import TextLayout
from hookctl.errors import HookctlWarning, InputError, WordError
from hookctl.learned import LoRA
from hookctl.learned.lora_files import LoraFile, read_lora
from tests import zoo
from tests.zoo.wild import WILD

PROMPT, LEFT = "a red cat above a blue square", (0, 0, 0.5, 1)
RANK, ALPHA = 2, 3.0
Factors = dict[str, tuple[Tensor, Tensor]]


def factors_of(model: nn.Module, wanted: Callable[[str], bool]) -> Factors:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for path, layer in linears(model):
        if wanted(path):
            weight: Any = layer.weight
            outputs, inputs, *kernel = weight.shape
            down = torch.randn(RANK, inputs, *kernel, generator=generator) * inputs**-0.5
            up = torch.randn(outputs, RANK, *[1] * len(kernel), generator=generator) * 0.5
            found[path] = down, up
    return found


def of_attention(path: str) -> bool:
    return path.endswith(("to_q", "to_k", "to_v", "to_out.0", "proj_in", "net.2"))


def peft(prefix: str, found: Factors) -> dict[str, Tensor]:
    return {
        f"{prefix}.{path}.lora_{side}.weight": x.clone()
        for path, pair in found.items()
        for side, x in zip("AB", pair, strict=True)
    }


def diffusers(prefix: str, found: Factors) -> dict[str, Tensor]:
    return {
        f"{prefix}.{path}.lora.{side}.weight": x.clone()
        for path, pair in found.items()
        for side, x in zip(("down", "up"), pair, strict=True)
    }


def kohya(prefix: str, found: Factors) -> dict[str, Tensor]:
    """Underscores for dots, and alphas."""
    out = {}
    for path, (down, up) in found.items():
        name = f"lora_{prefix}_{path.replace('.', '_')}"
        out |= {f"{name}.lora_down.weight": down.clone(), f"{name}.lora_up.weight": up.clone()}
        out[f"{name}.alpha"] = torch.tensor(ALPHA)
    return out


@pytest.mark.parametrize("layout", [peft, diffusers, kohya])
def test_layouts(layout: Any, tmp_path: Path) -> None:
    """All are read alike, and as the pipeline itself reads them."""
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    found = factors_of(pipe.unet, of_attention)
    save_file(layout("unet", found), tmp_path / "one.safetensors")
    read = read_lora(tmp_path / "one.safetensors", pipe)
    assert set(read.deltas) == set(found)
    scale = ALPHA / RANK if layout is kohya else 1.0
    for path, (down, up) in found.items():
        delta = read.deltas[path]
        assert delta.scale == pytest.approx(scale)
        assert torch.equal(delta.down, down) and torch.equal(delta.up, up)
    with control(pipe, LoRA(tmp_path / "one.safetensors", strength=0.7)):
        everywhere = case.run(pipe, [PROMPT])
    theirs = case.make()
    theirs.load_lora_weights(str(tmp_path), weight_name="one.safetensors", adapter_name="one")
    theirs.set_adapters(["one"], [0.7])
    wanted = case.run(theirs, [PROMPT])
    assert (everywhere - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (case.run(pipe, [PROMPT]) - wanted).abs().max() > 1e-3 * wanted.abs().max()


@contextmanager
def hooked(model: nn.Module, found: Factors, told: Callable[..., Tensor | None]) -> Iterator[None]:
    """told(path, input, change) is what is added to a layer's output, None for nothing."""
    modules, handles = dict(model.named_modules()), []
    for path, (down, up) in found.items():

        def add(
            module: Any, args: Any, out: Tensor, path: str = path, down: Tensor = down,
            up: Tensor = up,
        ) -> Tensor:  # fmt: skip
            x = args[0]
            if down.dim() == 4:
                change = F.conv2d(F.conv2d(x, down), up)
            else:
                change = x @ down.T @ up.T
            added = told(path, x, change)
            return out if added is None else out + added

        handles.append(modules[path].register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def made(found: Factors) -> LoraFile:
    from hookctl.learned.lora_files import Delta

    return LoraFile({path: Delta(down, up, 1.0) for path, (down, up) in found.items()})


def shares(tokens: int) -> Tensor:
    side = int(tokens**0.5)
    return region_of(LEFT).coverage(side, side).flatten()


@pytest.mark.parametrize("strength", [0.6, -1.0])
def test_a_region_of_a_unet(strength: float) -> None:
    """Image tokens by their share; the text's keys and values in two attentions, mixed by place."""
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    found = factors_of(pipe.unet, of_attention)
    texts = {p.rpartition(".")[0] for p in found if "attn2.to_k" in p}
    kept: dict[str, dict[str, Tensor]] = {path: {} for path in texts}

    def told(path: str, x: Tensor, change: Tensor) -> Tensor | None:
        site, _, name = path.rpartition(".")
        if site in texts and name in ("to_k", "to_v"):
            kept[site][name] = strength * change
            return None
        if x.dim() == 4:
            return strength * change * region_of(LEFT).coverage(*x.shape[-2:])
        return strength * change * shares(x.shape[1])[:, None]

    sdpa, sites = F.scaled_dot_product_attention, iter(())
    running: list[str] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        plain = sdpa(q, k, v, **rest)
        if not running:
            return plain
        of_heads = {
            name: x.unflatten(-1, (k.shape[1], k.shape[-1])).transpose(1, 2)
            for name, x in kept[running[-1]].items()
        }
        changed = sdpa(q, k + of_heads["to_k"], v + of_heads["to_v"], **rest)
        c = shares(q.shape[-2])[:, None]
        return c * changed + (1 - c) * plain

    modules = dict(pipe.unet.named_modules())
    handles: list[Any] = []
    for path in texts:
        handles.append(
            modules[path].register_forward_pre_hook(lambda *_, path=path: running.append(path))
        )
        handles.append(modules[path].register_forward_hook(lambda *_: running.pop() and None))
    F.scaled_dot_product_attention = attend
    try:
        with hooked(pipe.unet, found, told):
            wanted = case.run(pipe, [PROMPT])
    finally:
        F.scaled_dot_product_attention = sdpa
        for handle in handles:
            handle.remove()
    plain = case.run(pipe, [PROMPT])
    with control(pipe, LoRA(made(found), region=LEFT, strength=strength)) as session:
        ours = case.run(pipe, [PROMPT])
    close = 1e-4 * wanted.abs().max()
    assert (ours - wanted).abs().max() < close < (plain - wanted).abs().max()
    assert "LoRA" in session.report() and list(sites) == []


@pytest.mark.parametrize("name", [n for n in ("flux", "flux2_klein") if n in zoo.PIPELINES])
@pytest.mark.parametrize("at", ["region", "words"])
def test_a_joint_model(name: str, at: str) -> None:
    """In double blocks image and text have layers of their own, in single ones they share them."""
    case = zoo.PIPELINES[name]
    pipe = case.make()
    wanted_layers = ("to_q", "to_k", "to_v", "add_k_proj", "proj_mlp", "to_qkv_mlp_proj")
    found = factors_of(pipe.transformer, lambda path: path.endswith(wanted_layers))
    text = 16 if name == "flux" else 32
    words = TextLayout(pipe).read(PROMPT, text).find("cat")

    def told(path: str, x: Tensor, change: Tensor) -> Tensor | None:
        n = x.shape[1]
        weight = torch.zeros(n)
        own_text = "add_" in path
        if at == "region" and not own_text:
            weight[n - 64 :] = shares(64)
        if at == "words" and (own_text or n > 64):
            weight[list(words)] = 1
        return change * weight[:, None]

    with hooked(pipe.transformer, found, told):
        wanted = case.run(pipe, [PROMPT], guidance=1.0)
    plain = case.run(pipe, [PROMPT], guidance=1.0)
    given: Any = {"region": LEFT} if at == "region" else {"words": "cat"}
    with control(pipe, LoRA(made(found), **given)):
        ours = case.run(pipe, [PROMPT], guidance=1.0)
    close = 1e-4 * wanted.abs().max()
    assert (ours - wanted).abs().max() < close < (plain - wanted).abs().max()


def test_a_word_of_a_unet() -> None:
    """The word's keys and values alone, in the rows that see it."""
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    found = factors_of(pipe.unet, lambda path: path.endswith(("attn2.to_k", "attn2.to_v")))
    words = list(TextLayout(pipe).read(PROMPT, 77).find("cat"))

    def told(path: str, x: Tensor, change: Tensor) -> Tensor:
        weight = torch.zeros(len(x), x.shape[1], 1)
        weight[1, words] = 1  # the unconditional row is the first
        return change * weight

    with hooked(pipe.unet, found, told):
        wanted = case.run(pipe, [PROMPT])
    with control(pipe, LoRA(made(found), words="cat")):
        ours = case.run(pipe, [PROMPT])
    close = 1e-4 * wanted.abs().max()
    assert (ours - wanted).abs().max() < close
    assert (case.run(pipe, [PROMPT]) - wanted).abs().max() > close


@pytest.mark.parametrize(
    "name",
    [n for n in ("sd15", "flux", "pixart", "wan", "qwen_image", "z_image") if n in zoo.PIPELINES],
)
def test_zero_is_bit_identical_and_all_of_it_is_everywhere(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe = case.make()
    model = case.denoiser_of(pipe)
    lora = made(factors_of(model, lambda path: path.endswith(("to_q", "to_k", "to_v"))))
    plain = case.run(pipe, [PROMPT])
    for given in ({"region": LEFT}, {"words": "cat"}, {}):
        edit: Any = LoRA(lora, strength=0.0, **given)
        with control(pipe, edit):
            assert torch.equal(case.run(pipe, [PROMPT]), plain)
    drawn = []
    for region in (None, (0, 0, 1, 1), LEFT):
        with control(pipe, LoRA(lora, region=region)):
            drawn.append(case.run(pipe, [PROMPT]))
    assert all((x - plain).abs().max() > 1e-4 * plain.abs().max() for x in drawn)
    if name in ("sd15", "pixart", "wan"):  # the text is not changed by itself
        assert (drawn[0] - drawn[1]).abs().max() < 1e-4 * plain.abs().max()
    assert torch.equal(case.run(pipe, [PROMPT]), plain)


def test_they_stack() -> None:
    """Two regions that lie apart, with a word, beside another editor and a LoRA of the pipeline."""
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    one = made(factors_of(pipe.unet, of_attention))
    other = made({p: (-d, u) for p, (d, u) in factors_of(pipe.unet, of_attention).items()})
    edits = [
        LoRA(one, region=LEFT),
        LoRA(other, region=(0.5, 0, 1, 1)),
        LoRA(one, words="cat", prompts=[0]),
        hookctl.recipes.FreeU(),
    ]
    with control(pipe, *edits):
        every = case.run(pipe, [PROMPT])
    for left in edits:
        with control(pipe, *(edit for edit in edits if edit is not left)):
            assert (case.run(pipe, [PROMPT]) - every).abs().max() > 1e-5


def test_layers_without_tokens_are_told_of() -> None:
    case = zoo.PIPELINES["flux"]
    pipe = case.make()
    layers = ("norm1.linear", "to_q")
    lora = made(factors_of(pipe.transformer, lambda path: path.endswith(layers)))
    with pytest.warns(HookctlWarning, match="2 of the file's 6 layers act on no tokens"):
        with control(pipe, LoRA(lora, region=LEFT)):
            case.run(pipe, [PROMPT])


@pytest.mark.parametrize("where", [{}, {"region": LEFT}, {"words": "cat"}])
def test_of_two_denoisers_the_first_is_changed(where: dict[str, Any]) -> None:
    """The second one has LoRAs of its own."""
    case = WILD["WanPipeline of two denoisers"]
    pipe = case.make()
    lora = LoRA(made(factors_of(pipe.transformer, of_attention)), **where)
    plain = case.draw(pipe, ["a red cat"], [""], [0]).frames
    away: dict[str, list[Tensor]] = {"transformer": [], "transformer_2": []}
    with control(pipe, lora):
        handles = []
        for name, found in away.items():
            layer = getattr(pipe, name).blocks[0].attn1.to_q

            def keep(layer: Any, x: Any, y: Tensor, found: list[Tensor] = found) -> None:
                found.append((F.linear(x[0], layer.weight, layer.bias) - y).abs().max())

            handles.append(layer.register_forward_hook(keep))
        changed = case.draw(pipe, ["a red cat"], [""], [0]).frames
        for handle in handles:
            handle.remove()
    assert (changed - plain).abs().max() > 1e-6
    assert max(away["transformer_2"]) < 1e-6
    assert max(away["transformer"]) > 1e-3 or "words" in where  # a query is of no word


# -- errors ----------------------------------------------------------------------------------------


def test_files_that_are_none(tmp_path: Path) -> None:
    pipe = zoo.PIPELINES["sd15"].make()
    found = factors_of(pipe.unet, lambda path: path.endswith("attn1.to_q"))
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        LoRA(tmp_path / "none.safetensors")
    (tmp_path / "one.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="is no safetensors file"):
        LoRA(tmp_path / "one.bin")

    def saved(tensors: dict[str, Tensor]) -> Path:
        save_file(tensors, tmp_path / "one.safetensors")
        return tmp_path / "one.safetensors"

    with pytest.raises(InputError, match="one.safetensors"):
        control(pipe, LoRA(saved({"weight": torch.ones(2)}))).__enter__()
    path = next(iter(found))
    elsewhere = {"down_blocks.9.attn1.to_q": found[path]}
    with pytest.raises(InputError, match="does not have"):
        control(pipe, LoRA(saved(peft("unet", elsewhere)))).__enter__()
    wide = {path: (torch.randn(RANK, 5), found[path][1])}
    with pytest.raises(InputError, match="it is for another model"):
        control(pipe, LoRA(saved(peft("unet", wide)))).__enter__()
    dora = peft("unet", found) | {f"unet.{path}.lora_magnitude_vector": torch.ones(4)}
    with pytest.raises(InputError, match="one.safetensors"):
        control(pipe, LoRA(saved(dora))).__enter__()


def test_bad_arguments() -> None:
    lora = LoraFile({})
    for given, text in (
        ({"words": [3]}, "words"),
        ({"words": 0.5}, "LoRA: words=0.5"),
        ({"words": []}, r"LoRA: words=\[\]"),
        ({"prompts": 0}, "LoRA: prompts=0"),
        ({"prompts": []}, r"LoRA: prompts=\[\]"),
        ({"region": "circle:1"}, "region"),
        ({"strength": float("nan")}, "strength"),
        ({"prompts": ["a"]}, "prompts"),
    ):
        with pytest.raises(InputError, match=text):
            LoRA(lora, **given)  # type: ignore[arg-type]
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    found = made(factors_of(pipe.unet, of_attention))
    with control(pipe, LoRA(found, words="horse")), pytest.raises(WordError, match="'horse'"):
        case.run(pipe, [PROMPT])
    with control(pipe, LoRA(found, words="references[0]")), pytest.raises(InputError, match="sees"):
        case.run(pipe, [PROMPT])
