"""The arguments of a denoiser call: further text for every row, and some rows of everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hookctl import Editor
from hookctl.address.clock import Clock
from hookctl.address.rows import Row, Rows
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.arguments import take_rows, widen
from hookctl.loop.state import State
from tests import zoo
from tests.families.subjects import error
from tests.hookctl.drawing import SD15, TWO, draw, editor

# -- context ---------------------------------------------------------------------------------------


def text_of(pipe: Any, prompt: str) -> Tensor:
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0]


@pytest.mark.parametrize("name", ["sd15", "sdxl", "animatediff"])
def test_text_that_nobody_attends_to(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe = case.make()
    width = pipe.unet.config.cross_attention_dim
    extra = torch.randn(1, 20, width)
    edited = draw(case, pipe, editor(context=lambda state: {"other": extra}))
    # One product over more keys may sum in another order.
    assert error(edited, case.run(pipe, TWO)) < 1e-5


def test_another_prompt_through_the_models_own_projections() -> None:
    """All attention given to the extra text is drawing the extra text's prompt."""
    pipe = SD15.make()
    extra = text_of(pipe, "a green bird")

    class Instead(Editor):
        sites = "cross"

        def context(self, state: Any) -> Any:
            return {"bird": extra}

        def attention(self, call: Any) -> None:
            k, v = call.context("bird")
            assert k.shape[-2] == 77 and call.k.shape[-2] == 77
            for row in call.rows.where(branch="cond"):
                own_k, own_v = k[row.index], v[row.index]
                call.add(row, own_k, own_v)
                call.route(row, None, gain=0.0)

    edited = draw(SD15, pipe, Instead())
    expected = SD15.run(pipe, ["a green bird", "a green bird"])
    assert error(edited, expected) < 1e-4


def test_a_context_of_a_wrong_shape() -> None:
    with pytest.raises(InputError, match="context 'other' is"):
        draw(SD15, SD15.make(), editor(context=lambda state: {"other": torch.randn(1, 5, 7)}))


def test_masked_text_is_widened_with_its_mask() -> None:
    case = zoo.PIPELINES["pixart"]
    pipe = case.make()
    extra = torch.randn(1, 9, 32)
    edited = draw(case, pipe, editor(context=lambda state: {"other": extra}))
    assert error(edited, case.run(pipe, TWO)) < 1e-5


# -- rows ------------------------------------------------------------------------------------------


def test_conditions_beside_the_text_are_copied() -> None:
    """ControlNet's residuals and an adapter's embeddings, whatever holds them."""
    state = type("State", (), {})()
    state.rows, state.grid, state.sample, state.text = [0, 1], (4, 4), "sample", None
    state.kwargs = {
        "sample": torch.arange(2.0)[:, None],
        "timestep": torch.tensor(3),
        "added_cond_kwargs": {"image_embeds": [torch.arange(2.0)[:, None]], "scale": 0.5},
        "down_block_additional_residuals": (torch.arange(2.0)[:, None],),
        "class_labels": torch.tensor([5, 6]),
        "img_shapes": [[(1, 2, 2)], [(1, 2, 4)]],
        "img_ids": torch.zeros(2, 3),
        "cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(2, 1, 4, 4)]},
    }
    taken = take_rows(state, [(0, 2), (1, 2)])
    expected = torch.tensor([[0.0], [1.0], [1.0]])
    assert torch.equal(taken["sample"], expected)
    assert torch.equal(taken["added_cond_kwargs"]["image_embeds"][0], expected)
    assert torch.equal(taken["down_block_additional_residuals"][0], expected)
    assert taken["class_labels"].tolist() == [5, 6, 6]
    assert taken["img_shapes"] == [[(1, 2, 2)], [(1, 2, 4)], [(1, 2, 4)]]
    for name in ("timestep", "img_ids"):
        assert taken[name] is state.kwargs[name]
    assert taken["cross_attention_kwargs"]["ip_adapter_masks"][0].shape[0] == 2
    assert taken["added_cond_kwargs"]["scale"] == 0.5


# -- texts that can't be widened -------------------------------------------------------------------


def call_of(name: str, **kwargs: Any) -> State:
    """The state of a call of a denoiser of this class, of one row."""
    model = type(name, (torch.nn.Module,), {})()
    return State(
        denoiser=model,
        pipe=None,
        rows=Rows([Row(0, "cond", 0, 0)]),
        clock=Clock(0, 1, 1.0),
        kwargs={"hidden_states": torch.zeros(1, 4, 8, 8), **kwargs},
        sample="hidden_states",
        text="encoder_hidden_states",
        own_text=5,
    )


def test_a_second_text_or_a_pooled_one_is_refused() -> None:
    text, extra = torch.zeros(1, 5, 8), {"more": torch.zeros(1, 2, 8)}
    second = {"encoder_hidden_states": text, "encoder_hidden_states_t5": text}
    with pytest.raises(UnsupportedError, match="joins a second text .encoder_hidden_states_t5"):
        widen(call_of("HunyuanDiT2DModel", **second), extra)
    with pytest.raises(UnsupportedError, match="LuminaNextDiT2DModel pools its text"):
        widen(call_of("LuminaNextDiT2DModel", encoder_hidden_states=text), extra)
    # What is no text does not count, and a mask by another name is widened too.
    given = {"encoder_hidden_states": text, "encoder_hidden_states_image": text}
    state = call_of("WanTransformer3DModel", **given, encoder_mask=torch.ones(1, 5))
    widen(state, extra)
    assert state.kwargs["encoder_hidden_states"].shape == (1, 7, 8)
    assert state.kwargs["encoder_mask"].tolist() == [[1] * 7]


# -- arguments that all rows share -----------------------------------------------------------------


def test_what_all_rows_share_stays_as_it_is() -> None:
    state = call_of(
        "CosmosTransformer3DModel",
        padding_mask=torch.ones(1, 1, 8, 8),
        encoder_hidden_states=torch.zeros(1, 5, 8),
        control_hidden_states_scale=torch.ones(1),
        skip_layers=[7],
    )
    taken = take_rows(state, [(0, 1), (0, 1)])
    assert taken["skip_layers"] == [7]  # as many layers as rows
    assert taken["padding_mask"].shape[0] == taken["control_hidden_states_scale"].shape[0] == 1
    assert taken["encoder_hidden_states"].shape[0] == 2


def test_texts_of_many_layers_have_their_rows_in_the_second_axis() -> None:
    layers = torch.arange(6.0).reshape(3, 2, 1, 1).expand(3, 2, 4, 8)
    state = call_of("HiDreamImageTransformer2DModel", encoder_hidden_states_llama3=layers)
    state.rows = Rows([Row(0, "uncond", 0, 0), Row(1, "cond", 0, 0)])
    state.kwargs["hidden_states"] = torch.zeros(2, 4, 8, 8)
    taken = take_rows(state, [(0, 2), (1, 2)])["encoder_hidden_states_llama3"]
    assert taken[:, :, 0, 0].tolist() == [[0, 1, 1], [2, 3, 3], [4, 5, 5]]


def test_several_entries_for_each_row_go_with_their_row() -> None:
    state = call_of("UNet2DConditionModel", two=torch.zeros(4, 3), many=torch.zeros(9, 3))
    state.rows = Rows([Row(0, "uncond", 0, 0), Row(1, "cond", 0, 0)])
    state.kwargs["hidden_states"] = torch.zeros(2, 4, 8, 8)
    with pytest.raises(UnsupportedError, match=r"two \(4, 3\) has 2 entries for each of 2 rows"):
        take_rows(state, [(0, 2), (1, 2)])


@pytest.mark.parametrize("batch", [1, 2])
def test_first_and_last_images_go_with_their_row(batch: int) -> None:
    pairs = torch.arange(2.0 * batch).reshape(-1, 1, 1).expand(-1, 3, 8)
    state = call_of("WanTransformer3DModel", encoder_hidden_states_image=pairs)
    state.rows = Rows([Row(i, "cond", i, 0) for i in range(batch)])
    state.kwargs["hidden_states"] = torch.zeros(batch, 4, 8, 8)
    taken = take_rows(state, [(0, batch), (batch - 1, batch)])["encoder_hidden_states_image"]
    last = 2 * batch - 2
    assert taken[:, 0, 0].tolist() == [*range(2 * batch), last, last + 1]


def test_lists_of_images_and_texts_are_of_rows() -> None:
    """Whose channels are as many as the rows; a list of what all rows share stays."""
    images, texts = (
        [torch.full((2, 1, 4, 4), float(i)) for i in range(2)],
        list(torch.rand(2, 3, 5)),
    )
    state = type("State", (), {})()
    state.rows, state.grid, state.sample, state.text = [0, 1], (4, 4), "x", "cap_feats"
    both = [torch.arange(2.0)[:, None]] * 2
    state.kwargs = {"x": images, "cap_feats": texts, "t": torch.arange(2.0), "residuals": both}
    taken = take_rows(state, [(0, 2), (1, 2)])
    assert [float(one.mean()) for one in taken["x"]] == [0, 1, 1]
    assert [one.shape for one in taken["x"]] == [(2, 1, 4, 4)] * 3
    assert len(taken["cap_feats"]) == 3 and taken["cap_feats"][2] is texts[1]
    assert taken["t"].tolist() == [0, 1, 1]
    assert [one.flatten().tolist() for one in taken["residuals"]] == [[0, 1, 1]] * 2
