"""Promises for a model in another configuration: adapters, processors, backends, offloading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import (
    AttnProcessor,
    SD3IPAdapterJointAttnProcessor2_0,
)
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from torch import Tensor

from tests.families.promises import check, need
from tests.families.subjects import Subject, error

# Families whose attention modules take processors of their own alone.
OWN_PROCESSORS = ("sd3", "flux", "wan", "z_image", "qwen_image", "flux2_klein")


def with_lora(subject: Subject) -> None:
    """The edited values are those that the adapter made."""
    from peft import LoraConfig, inject_adapter_in_model

    plain = subject.run(subject.make())

    def prepare(subject: Subject, target: Any) -> None:
        names = ["to_q", "to_k", "to_v", "qkv", "to_qkv_mlp_proj"]
        config = LoraConfig(r=2, target_modules=names, init_lora_weights=False)
        torch.manual_seed(0)
        denoiser = subject.denoiser(target)
        if hasattr(denoiser, "add_adapter"):
            denoiser.add_adapter(config)
        else:
            inject_adapter_in_model(config, denoiser)
        assert error(subject.run(target), plain) > 1e-3

    check(subject, prepare)


def with_ip_adapter(subject: Subject) -> None:
    """The text's attention is edited, the adapter's is left alone."""
    without = ("pixart", "wan", "svd", "z_image", "qwen_image", "flux2_klein")
    need(subject.name not in without, "diffusers has no IP-Adapter for it")
    need(subject.is_pipeline, "diffusers has no IP-Adapter for it")
    need(subject.name != "instruct_pix2pix", "diffusers' pipeline drops the embeddings given")
    if subject.name == "sd3":
        check(subject, add_to_sd3, by_hand=borrowed_at_the_first_kernel)
    else:
        check(subject, add_to_flux if subject.name == "flux" else add_to_unet)


@contextmanager
def borrowed_at_the_first_kernel(subject: Subject, target: Any) -> Iterator[None]:
    """The edit by hand where a second kernel call shares the values: SD3's adapter does."""
    rows, first = subject.calls[0], []
    order = [rows.index(row.replace("2", "1")) for row in rows]
    modules = [m for m in subject.denoiser(target).modules() if hasattr(m, "to_v")]
    handles = [m.register_forward_pre_hook(lambda *_: first.append(True)) for m in modules]
    real = F.scaled_dot_product_attention

    def sdpa(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if first:
            first.clear()
            v = v[order]
        return real(q, k, v, *args, **kwargs)

    F.scaled_dot_product_attention = sdpa
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real
        for handle in handles:
            handle.remove()


def add_to_sd3(subject: Subject, target: Any) -> None:
    """A random IP-Adapter; its image projection has an attention module that is no site."""
    model, width, heads = target.transformer, 8, 2
    torch.manual_seed(0)
    model.image_proj = IPAdapterTimeImageProjection(
        embed_dim=width,
        output_dim=model.inner_dim,
        hidden_dim=16,
        depth=1,
        dim_head=8,
        heads=heads,
        num_queries=4,
        timestep_in_dim=16,
    ).eval()
    model.set_attn_processor(
        {
            name: SD3IPAdapterJointAttnProcessor2_0(
                hidden_size=model.inner_dim,
                ip_hidden_states_dim=model.inner_dim,
                head_dim=model.config.attention_head_dim,
                timesteps_emb_dim=16,
            ).eval()
            for name in model.attn_processors
        }
    )
    plain = subject.run(target)
    _always_with(target, ip_adapter_image_embeds=torch.randn(2, 3, width))
    assert error(subject.run(target), plain) > 1e-3


def add_to_flux(subject: Subject, target: Any) -> None:
    """A random IP-Adapter on the double blocks."""
    model, width = target.transformer, 8
    torch.manual_seed(0)
    dim, inner = model.config.joint_attention_dim, model.inner_dim
    adapter: dict[str, Tensor] = {}
    for i in range(model.config.num_layers):
        for part in ("to_k_ip", "to_v_ip"):
            adapter[f"{i}.{part}.weight"] = torch.randn(inner, dim) * 0.2
            adapter[f"{i}.{part}.bias"] = torch.zeros(inner)
    state = {"image_proj": _projection(dim, width), "ip_adapter": adapter}
    model._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    embeds = torch.randn(2, 2, 1, width)  # for each image drawn
    _always_with(
        target,
        ip_adapter_image_embeds=[embeds[0]],
        negative_ip_adapter_image_embeds=[embeds[1]],
    )


def _projection(dim: int, width: int) -> dict[str, Tensor]:
    return {
        "proj.weight": torch.randn(4 * dim, width) * 0.2,
        "proj.bias": torch.zeros(4 * dim),
        "norm.weight": torch.ones(dim),
        "norm.bias": torch.zeros(dim),
    }


def add_to_unet(subject: Subject, target: Any) -> None:
    """A random IP-Adapter, its image embedding given with every call."""
    unet = target.unet
    torch.manual_seed(0)
    dim, width = unet.config.cross_attention_dim, 8
    state: dict[str, dict[str, Tensor]] = {
        "image_proj": _projection(dim, width),
        "ip_adapter": {},
    }
    place = 1
    for name in unet.attn_processors:
        if name.endswith("attn1.processor") or "motion_modules" in name:
            continue
        module = unet.get_submodule(name.removesuffix(".processor"))
        for part in ("to_k_ip", "to_v_ip"):
            shape = (module.inner_dim, dim)
            state["ip_adapter"][f"{place}.{part}.weight"] = torch.randn(shape) * 0.2
        place += 2
    unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    target.set_ip_adapter_scale(0.8)
    # [negative | positive] for each image drawn
    embeds = torch.cat([torch.zeros(1, 1, width), torch.randn(1, 1, width)])
    _always_with(target, ip_adapter_image_embeds=[embeds])


def _always_with(target: Any, **given: Any) -> None:
    """Give a pipeline further arguments at every call."""
    kind = type(target)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.__call__(self, *args, **kwargs, **given)

    target.__class__ = type(kind.__name__, (kind,), {"__call__": call})


def with_fused_projections(subject: Subject) -> None:
    """One projection for q, k and v."""
    need(subject.is_pipeline, "no fusing outside diffusers")
    denoiser = subject.denoiser(subject.make())
    need(hasattr(denoiser, "fuse_qkv_projections"), "has no fuse_qkv_projections")
    need(subject.name != "sd3", "diffusers can't fuse its dual attention")
    check(subject, lambda subject, target: subject.denoiser(target).fuse_qkv_projections())


def with_sliced_attention(subject: Subject) -> None:
    """Untouched calls stay sliced."""
    need(subject.is_pipeline, "no slicing outside diffusers")
    denoiser = subject.denoiser(subject.make())
    need(hasattr(denoiser, "set_attention_slice"), "has no set_attention_slice")
    check(subject, lambda subject, target: subject.denoiser(target).set_attention_slice(1))


def with_eager_processors(subject: Subject) -> None:
    """Processors that form the matrix."""
    _with_processors(subject, AttnProcessor)


def _with_processors(subject: Subject, kind: type[AttnProcessor]) -> None:
    need(subject.is_pipeline, "compvis is the eager one among the modules")
    need(subject.name not in OWN_PROCESSORS, "its attention takes no such processor")
    need(subject.name != "sd15_pag", "sets its own processors on the middle block")

    def prepare(subject: Subject, target: Any) -> None:
        for module in subject.denoiser(target).modules():
            if hasattr(module, "to_q"):
                module.set_processor(kind())

    check(subject, prepare)


class _Unknown(AttnProcessor):
    """A processor of unknown making that forms the matrix."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states=None,  # type: ignore[no-untyped-def]
                 attention_mask=None) -> Tensor:  # fmt: skip
        rows, residual = len(hidden_states), hidden_states
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], rows)
        parts = (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        q, k, v = (attn.head_to_batch_dim(part) for part in parts)
        p = attn.get_attention_scores(q, k, attention_mask)
        out = attn.to_out[0](attn.batch_to_head_dim(torch.bmm(p, v)))
        return out + residual if attn.residual_connection else out


def with_unknown_processors(subject: Subject) -> None:
    """Processors of somebody else's that form the matrix are followed."""
    _with_processors(subject, _Unknown)


def _with_backend(subject: Subject, backend: str) -> None:
    need(subject.is_pipeline, "no backends outside diffusers")
    denoiser = subject.denoiser(subject.make())
    need(hasattr(denoiser, "set_attention_backend"), "has no set_attention_backend")
    found = _AttentionBackendRegistry._active_backend
    try:
        check(subject, lambda s, target: s.denoiser(target).set_attention_backend(backend))
    finally:
        _AttentionBackendRegistry._active_backend = found


def with_flex_backend(subject: Subject) -> None:
    """A backend that never calls SDPA."""
    _with_backend(subject, "flex")


def with_math_backend(subject: Subject) -> None:
    """A backend that is SDPA restricted to one kernel."""
    _with_backend(subject, "_native_math")


def with_model_offload(subject: Subject) -> None:
    """The model comes and goes as a whole, its hooks renewed at every call."""
    from accelerate import cpu_offload_with_hook

    check(subject, lambda s, target: cpu_offload_with_hook(s.denoiser(target), "cpu") and None)


def with_sequential_offload(subject: Subject) -> None:
    """Parameters are on the meta device until a layer runs."""
    from accelerate import cpu_offload

    def prepare(subject: Subject, target: Any) -> None:
        denoiser = subject.denoiser(target)
        cpu_offload(denoiser, torch.device("cpu"), offload_buffers=True)
        assert any(p.device.type == "meta" for p in denoiser.parameters())

    check(subject, prepare)
