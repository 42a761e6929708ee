"""Muon: momentum whose matrices are orthogonalised (K. Jordan et al., 2024), shared by processes.

Each process orthogonalises its own share of the matrices; one all-reduce gives everyone the rest.
Vectors and the first and last layers go through Adam.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def orthogonalise(g: Tensor, steps: int = 5, half: bool = False) -> Tensor:
    """About the nearest semi-orthogonal matrices, by a quintic Newton-Schulz iteration.

    Receives: matrices [..., m, n]; whether to work in bfloat16, which is enough (K. Jordan), and
    done on a GPU in any case. Returns: float32 [..., m, n].
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.float() / (torch.linalg.matrix_norm(g.float(), keepdim=True) + 1e-7)
    x = x.bfloat16() if half or g.is_cuda else x
    tall = x.shape[-2] > x.shape[-1]
    shape, x = g.shape, (x.mT if tall else x).reshape(-1, *sorted(x.shape[-2:]))
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(shape).float()


class Muon:
    """Muon for hidden matrices and kernels, AdamW for the rest, one learning rate for both."""

    def __init__(
        self,
        model: nn.Module,
        others: tuple[str, ...],
        momentum: float = 0.95,
        decay: float = 0.01,
        half: bool = False,
    ) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        hidden = [p for n, p in named if p.ndim >= 2 and not n.startswith(others)]
        chosen = {id(p) for p in hidden}
        rest = [p for _, p in named if id(p) not in chosen]
        self.matrices: list[Tensor] = sorted(hidden, key=lambda p: -p.numel())
        self.momentum, self.decay, self.half = momentum, decay, half
        self.buffers = [torch.zeros_like(p) for p in self.matrices]
        self.adam = torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.99), weight_decay=decay)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Apply one update with learning rate `rate` to all parameters."""
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        # What is not learned yet has no gradient, and costs nothing.
        learned = [
            (p, p.grad, m)
            for p, m in zip(self.matrices, self.buffers, strict=True)
            if p.grad is not None
        ]
        if not learned:
            return
        matrices, grads, buffers = zip(*learned, strict=True)
        torch._foreach_lerp_(buffers, grads, 1.0 - self.momentum)
        looks = [
            torch.lerp(g, m, self.momentum).flatten(1) for g, m in zip(grads, buffers, strict=True)
        ]
        updates = [torch.zeros_like(p) for p in matrices]
        alike: dict[torch.Size, list[int]] = {}
        for i in range(rank, len(looks), ranks):
            alike.setdefault(looks[i].shape, []).append(i)
        for shape, which in alike.items():  # small products cost less in a batch
            made = orthogonalise(torch.stack([looks[i] for i in which]), half=self.half)
            for i, update in zip(which, made * 0.2 * max(shape) ** 0.5, strict=True):
                updates[i] = update.view_as(matrices[i])
        if ranks > 1:
            flat = torch.cat([u.flatten() for u in updates])
            dist.all_reduce(flat)
            parts = flat.split([p.numel() for p in matrices])
            updates = [f.view_as(p) for f, p in zip(parts, matrices, strict=True)]
        torch._foreach_mul_(matrices, 1.0 - rate * self.decay)
        torch._foreach_add_(matrices, updates, alpha=-rate)

    def state_dict(self) -> dict[str, object]:
        """Everything needed to go on."""
        return {"buffers": self.buffers, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from `state_dict`."""
        for mine, theirs in zip(self.buffers, state["buffers"], strict=True):  # type: ignore[call-overload]
            mine.copy_(theirs)
        self.adam.load_state_dict(state["adam"])  # type: ignore[arg-type]
