"""Text for the joint transformer: the embedded pipeline's encoder, as a stock SD3 pipeline asks it.

SD3 reads the states before the last layer, and a projection of the pooled one. So the encoder gets
one more layer, which changes nothing, and the identity as projection; it stands for both CLIPs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ..text import Words


@torch.no_grad()
def with_projection(encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """A copy whose `hidden_states[-2]` are the encoder's before its last norm, and whose
    `text_embeds` are its pooled ones; frozen."""
    layers = encoder.config.num_hidden_layers
    config = CLIPTextConfig(**(encoder.config.to_dict() | {"num_hidden_layers": layers + 1}))
    made = CLIPTextModelWithProjection(config)
    # transformers 4 has the first part in the names of one, 5 in neither.
    state = {name.removeprefix("text_model."): v for name, v in encoder.state_dict().items()}
    missing, unknown = made.text_model.load_state_dict(state, strict=False)
    new = f"encoder.layers.{layers}."
    if unknown or not all(n.startswith(new) or n.endswith("position_ids") for n in missing):
        raise ValueError(f"the encoder is of another kind: {(unknown or missing)[0]}")
    last = made.text_model.encoder.layers[-1]
    for out in (last.self_attn.out_proj, last.mlp.fc2):
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
    nn.init.eye_(made.text_projection.weight)
    return made.eval().requires_grad_(False)


@dataclass
class Prompts:
    """Texts as the pipeline gives them to the transformer."""

    encoder: CLIPTextModelWithProjection
    words: Words

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """States [texts, 32 + 1, 256], the last one the zero token, and pooled [texts, 256]."""
        said = self.encoder(
            self.words(texts).to(self.encoder.device), output_hidden_states=True, return_dict=True
        )
        states = torch.cat([said.hidden_states[-2]] * 2, dim=-1)
        return nn.functional.pad(states, (0, 0, 0, 1)), torch.cat([said.text_embeds] * 2, dim=-1)
