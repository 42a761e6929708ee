"""Which of a module's attention calls are shown to editors, and as which rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.clock import Clock
from hookctl.address.rows import Row, Rows
from hookctl.address.sites import Site
from hookctl.attention.call import AttentionCall
from hookctl.attention.sdpa_call import SDPACall
from hookctl.evaluate.one_call import EditedSite, stack_mask
from tests.hookctl.attention.calls import random

ROWS = Rows([Row(0, "uncond", 0, 0), Row(1, "cond", 0, 0), Row(2, "cond", 1, 0)])


class Double:
    """Doubles the values of every call that it is shown, and keeps its rows."""

    name = "Double"

    def __init__(self) -> None:
        self.rows: list[list[tuple[str, int, int]]] = []

    def attention(self, call: AttentionCall) -> None:
        self.rows.append([(row.branch, row.prompt, row.index) for row in call.rows])
        for row in call.rows:
            call.replace(row, v=2 * call.v[row.index])


def shown(editor: Double, q: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """(the output, the model's own) of a module's call of that index, over its own keys."""
    attached = SimpleNamespace(
        editor=editor, backend="auto", note=lambda *_: None, sees=lambda path: True
    )
    state: Any = SimpleNamespace(
        rows=ROWS,
        clock=Clock(0, 10, 1.0),
        grid=(3, 4),
        part=False,
        prompts=(),
        own_text=None,
        images_in_sequence=None,
        extra_text={},
        text_rows=None,
        reader=None,
    )
    site = EditedSite(Site("a.site", "self", "up", 1, 0), [attached])
    call = SDPACall(q, q, q)
    return site.output(call, None, state, index=index, repeated=False), call.attend()


def test_calls_of_an_adapter_are_the_models() -> None:
    """A further call of the whole batch is not the module's own attention."""
    editor, q = Double(), random(3, 2, 12, 8)
    out, own = shown(editor, q, 0)
    torch.testing.assert_close(out, 2 * own)
    out, own = shown(editor, q, 1)
    assert torch.equal(out, own)
    assert len(editor.rows) == 1


def test_a_model_that_loops_over_its_samples() -> None:
    """Each call of one sample is a row of its own."""
    editor = Double()
    for index in range(3):
        out, own = shown(editor, random(1, 2, 12, 8, seed=index), index)
        torch.testing.assert_close(out, 2 * own)
    assert editor.rows == [[("uncond", 0, 0)], [("cond", 0, 0)], [("cond", 1, 0)]]


def test_a_mask_of_heads_is_no_mask_of_rows() -> None:
    """Torch broadcasts [heads, N, M] from the right, whatever number of rows there is."""
    q, k = random(2, 4, 3, 8, seed=1), random(2, 4, 3, 8, seed=2)
    mask = random(4, 3, 3, seed=3)
    stack = stack_mask(mask, 2)
    assert stack is not None
    own = F.scaled_dot_product_attention(q, k, k, mask)
    each = [F.scaled_dot_product_attention(q[i], k[i], k[i], stack[0, 0]) for i in range(2)]
    torch.testing.assert_close(torch.stack(each), own)
