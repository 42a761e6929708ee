"""An LDM UNet written out over the tensors of its file. Nothing here is shared with the library."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = Mapping[str, Tensor]


class Literal:
    """tensors: by LDM's names; heads, groups: of attention and norms."""

    def __init__(self, tensors: Tensors, heads: int, groups: int) -> None:
        self.tensors, self.heads, self.groups = tensors, heads, groups

    def __call__(self, x: Tensor, t: float, context: Tensor) -> Tensor:
        width = self.tensors["time_embed.0.weight"].shape[1]
        waves = t * torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))  # float32
        e = torch.cat([waves.cos(), waves.sin()]).to(x)[None].expand(len(x), -1)
        e = self.linear("time_embed.2", F.silu(self.linear("time_embed.0", e)))
        skips, n = [], 0
        while any(key.startswith(f"input_blocks.{n}.") for key in self.tensors):
            x = self.block(f"input_blocks.{n}", x, e, context)
            skips.append(x)
            n += 1
        x = self.block("middle_block", x, e, context)
        for k in range(n):
            x = self.block(f"output_blocks.{k}", torch.cat([x, skips.pop()], 1), e, context)
        return self.conv("out.2", F.silu(self.norm("out.0", x, 1e-5)))

    def block(self, name: str, x: Tensor, e: Tensor, context: Tensor) -> Tensor:
        for slot in range(3):
            place = f"{name}.{slot}"
            if f"{place}.in_layers.0.weight" in self.tensors:
                x = self.resnet(place, x, e)
            elif f"{place}.proj_in.weight" in self.tensors:
                x = self.transformer(place, x, context)
            elif f"{place}.op.weight" in self.tensors:
                x = self.conv(f"{place}.op", x, stride=2)
            elif f"{place}.conv.weight" in self.tensors:
                x = self.conv(f"{place}.conv", F.interpolate(x, scale_factor=2, mode="nearest"))
            elif f"{place}.weight" in self.tensors:
                x = self.conv(place, x)
        return x

    def resnet(self, name: str, x: Tensor, e: Tensor) -> Tensor:
        h = self.conv(f"{name}.in_layers.2", F.silu(self.norm(f"{name}.in_layers.0", x, 1e-5)))
        h = h + self.linear(f"{name}.emb_layers.1", F.silu(e))[..., None, None]
        h = self.conv(f"{name}.out_layers.3", F.silu(self.norm(f"{name}.out_layers.0", h, 1e-5)))
        skip = f"{name}.skip_connection"
        return h + (self.conv(skip, x, edge=0) if f"{skip}.weight" in self.tensors else x)

    def transformer(self, name: str, x: Tensor, context: Tensor) -> Tensor:
        h = self.conv(f"{name}.proj_in", self.norm(f"{name}.norm", x, 1e-6), edge=0)
        rows, width, height, _ = h.shape
        h = h.flatten(2).transpose(1, 2)
        k = 0
        while f"{name}.transformer_blocks.{k}.norm1.weight" in self.tensors:
            block = f"{name}.transformer_blocks.{k}"
            normed = self.layer_norm(f"{block}.norm1", h)
            h = h + self.attention(f"{block}.attn1", normed, normed)
            h = h + self.attention(f"{block}.attn2", self.layer_norm(f"{block}.norm2", h), context)
            f = self.linear(f"{block}.ff.net.0.proj", self.layer_norm(f"{block}.norm3", h))
            value, gate = f.chunk(2, -1)
            h = h + self.linear(f"{block}.ff.net.2", value * F.gelu(gate))
            k += 1
        h = h.transpose(1, 2).reshape(rows, width, height, -1)
        return x + self.conv(f"{name}.proj_out", h, edge=0)

    def attention(self, name: str, x: Tensor, context: Tensor) -> Tensor:
        def split(part: str, of: Tensor) -> Tensor:
            y = of @ self.tensors[f"{name}.to_{part}.weight"].T
            return y.reshape(len(y), y.shape[1], self.heads, -1).transpose(1, 2)

        q, k, v = split("q", x), split("k", context), split("v", context)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.linear(f"{name}.to_out.0", out)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def conv(self, name: str, x: Tensor, stride: int = 1, edge: int = 1) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return F.conv2d(x, weight, bias, stride, edge)

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return F.group_norm(x, self.groups, weight, bias, eps)

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias)
