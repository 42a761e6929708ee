from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from hookctl.errors import InputError, UnsupportedError
from hookctl.learned.clip_features import image_feature, phrase_features
from tests.hookctl.drawing import SD15


@pytest.fixture(scope="module")
def clip():
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = CLIPConfig(
        text_config={**small, "num_attention_heads": 2, "vocab_size": 50},
        vision_config={**small, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIPModel(config).eval()


def test_phrases_are_the_end_tokens_before_projection():
    pipe = SD15.make()
    found = phrase_features(pipe, ["a red cat", "a dog", "a red cat"], "GLIGEN")
    assert list(found) == ["a red cat", "a dog"]
    for text, feature in found.items():
        ids = pipe.tokenizer(text, return_tensors="pt").input_ids
        want = pipe.text_encoder(ids).pooler_output[0]
        torch.testing.assert_close(feature, want)
        torch.testing.assert_close(want, pipe.text_encoder(ids).last_hidden_state[0, -1])


def test_what_encodes_no_phrases_is_refused():
    with pytest.raises(UnsupportedError, match="a bare denoiser has no text encoder"):
        phrase_features(None, ["a cat"], "GLIGEN")
    assert phrase_features(None, [], "GLIGEN") == {}
    with pytest.raises(InputError, match="GLIGEN: the phrase .* tokens; give one of"):
        phrase_features(SD15.make(), ["a cat " * 90], "GLIGEN")


def test_an_image_is_squashed_embedded_and_brought_among_phrases(clip):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 24, 3), np.uint8)
    image = Image.fromarray(pixels)
    square = {"height": 32, "width": 32}
    prepare = CLIPImageProcessor(size=square, do_center_crop=False)
    with torch.no_grad():
        seen = clip.vision_model(**prepare(image, return_tensors="pt")).pooler_output
        embedding = clip.visual_projection(seen)[0]
    want = clip.text_projection.weight.detach().T @ embedding
    want = 28.7 * want / want.norm()
    torch.testing.assert_close(image_feature(image, clip, "images[0]"), want, rtol=0, atol=2e-2)
    for reader in (clip, clip.text_projection.weight):
        torch.testing.assert_close(image_feature(embedding, reader, "images[0]"), want)
    unit = embedding / embedding.norm()
    torch.testing.assert_close(image_feature(unit, clip, "images[0]"), want)


def test_images_that_can_not_be_read_are_refused(clip):
    image, matrix = Image.new("RGB", (8, 8)), clip.text_projection.weight
    for given, reader, message in (
        (image, None, "need clip="),
        (image, matrix, "clip= is a matrix"),
        (torch.zeros(5), clip, r"embedding \[12\]"),
        ("cat.png", clip, r"embedding \[12\]"),
    ):
        with pytest.raises(InputError, match=rf"images\[0\].*{message}"):
            image_feature(given, reader, "images[0]")
