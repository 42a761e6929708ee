"""Classes of denoisers: which kind their sites are of, and how text and image share a sequence.

Classes that attend to the text separately and whose modules say so themselves need no record of
kinds; they are named so that they count as known.
"""

from __future__ import annotations

from hookctl.address.families.record import Model, declare_models

_JOINT = (("*", "joint"),)

# -- text and image apart --------------------------------------------------------------------------

declare_models(
    Model(),
    """
    UNet2DModel UNet1DModel I2VGenXLUNet UVit2DModel
    DiTTransformer2DModel HunyuanDiT2DModel Transformer2DModel
    DreamLiteTransformer2DModel AllegroTransformer3DModel
    LTXVideoTransformer3DModel CosmosTransformer3DModel
    WanVACETransformer3DModel WanAnimateTransformer3DModel SkyReelsV2Transformer3DModel
    ChronoEditTransformer3DModel LatteTransformer3DModel StableAudioDiTModel
    AudioLDM2UNet2DConditionModel
    """,
)
declare_models(Model(counts_up=True, hides_padding="encoder_mask"), "LuminaNextDiT2DModel")
declare_models(Model(axes="bfchw"), "UNetSpatioTemporalConditionModel AnyFlowTransformer3DModel")
declare_models(
    Model(texts_apart=True),
    """
    UNet2DConditionModel UNet3DConditionModel UNetMotionModel PixArtTransformer2DModel
    WanTransformer3DModel
    """,
)
_DRAWN_BEFORE = "frames that were drawn before stand in one sequence with the latents"
declare_models(Model(placeless=_DRAWN_BEFORE), "HeliosTransformer3DModel")
declare_models(Model(axes="bfchw", placeless=_DRAWN_BEFORE), "AnyFlowFARTransformer3DModel")
declare_models(
    Model(placeless="texts and videos are packed into one sequence without rows"),
    "Cosmos3OmniTransformer",
)
declare_models(Model(placeless="learned tokens stand before the sound"), "StableAudio3DiTModel")
declare_models(
    Model(placeless="the image to edit stands beside the target, in one canvas"),
    "DreamLiteUNetModel",
)
declare_models(
    Model(
        kinds=(
            ("add_time_condition.*", "text"),
            ("*_blocks.*.attentions.0.attention", "self"),
            ("*", "cross"),
        )
    ),
    "Kandinsky3UNet",
)
_LINEAR = ("*.attn1",)
declare_models(Model(softmax_free=_LINEAR), "SanaTransformer2DModel SanaVideoTransformer3DModel")
declare_models(  # most blocks attend by a recurrence; the second one knows the camera's rays
    Model(
        kinds=(("*.attn", "self"), ("*.cam_attn", "self"), ("*.cross_attn", "cross")),
        attending=("*.attn.attn", "*.attn.cam_attn"),
    ),
    "SanaWMTransformer3DModel",
)
declare_models(
    Model(
        kinds=(
            ("*text_transformer_blocks.*", "text"),
            ("*self_attention", "self"),
            ("*cross_attention", "cross"),
        ),
        axes="bfhwc",
    ),
    "Kandinsky5Transformer3DModel",
)
declare_models(  # the sound's own sites, and those between sound and image
    Model(
        kinds=(
            ("*text_transformer_blocks.*", "text"),
            ("*.video_dec_block.self_attention", "self"),
            ("*.video_dec_block.cross_attention", "cross"),
            ("*", "gated"),
        ),
        axes="bfhwc",
    ),
    "Kandinsky6Transformer3DModel",
)
declare_models(
    Model(axes="bfhwc", placeless="its tokens stand in blocks of 8 by 8"),
    "Kandinsky6SRTransformer3DModel",
)
declare_models(  # as in Kandinsky 6
    Model(kinds=(("*audio*", "gated"), ("*.attn1", "self"), ("*.attn2", "cross"))),
    "LTX2VideoTransformer3DModel",
)
declare_models(
    Model(kinds=(("*.self_attn", "self"), ("*.cross_attn", "cross"))),
    "AceStepTransformer1DModel LongCatAudioDiTTransformer",
)

# -- one sequence, the text before the image -------------------------------------------------------

declare_models(
    Model("text_image", _JOINT, parts="img_ids", target=0, widens=True, loose_text=True),
    "FluxTransformer2DModel",
)
declare_models(
    Model("text_image", _JOINT, parts="img_ids"),
    """
    ChromaTransformer2DModel BriaTransformer2DModel LongCatImageTransformer2DModel
    OvisImageTransformer2DModel BriaFiboTransformer2DModel BriaFibo2Transformer2DModel
    """,
)
declare_models(Model("text_image", _JOINT, parts="img_ids", widens=True), "Flux2Transformer2DModel")
declare_models(
    Model(
        "text_image",
        _JOINT,
        parts="img_shapes",
        hides_padding="encoder_hidden_states_mask",
        widens=True,
        rotations="pos_embed",
    ),
    "QwenImageTransformer2DModel",
)
declare_models(Model("text_image", _JOINT), "QwenImage21Transformer2DModel")
declare_models(
    Model(
        "text_image",
        _JOINT,
        placeless="the call does not say where its text ends",
        counts_up=True,
    ),
    "Ideogram4Transformer2DModel",
)
declare_models(
    Model("text_image", _JOINT),
    """
    AuraFlowTransformer2DModel CogView3PlusTransformer2DModel CogView4Transformer2DModel
    GlmImageTransformer2DModel PRXTransformer2DModel EasyAnimateTransformer3DModel
    PriorTransformer
    """,
)
declare_models(
    Model("text_image", _JOINT, axes="bfchw"),
    "CogVideoXTransformer3DModel ConsisIDTransformer3DModel",
)
declare_models(  # the images to edit stand in the text, the time's token behind it
    Model("text_image", _JOINT, several_texts=True), "OmniGenTransformer2DModel"
)
declare_models(Model("text_image", (("text_fusion.*", "text"), *_JOINT)), "Krea2Transformer2DModel")
declare_models(
    Model(
        "text_image",
        (("noise_refiner.*", "self"), ("context_refiner.*", "text"), *_JOINT),
        text_masked=True,
        counts_up=True,
    ),
    "Lumina2Transformer2DModel",
)

# -- one sequence, the image before the text -------------------------------------------------------

declare_models(
    Model("image_text", (("*.attn2", "self"), *_JOINT), widens=True, loose_text=True),
    "SD3Transformer2DModel",
)
declare_models(
    Model("image_text", _JOINT),
    """
    ErnieImageTransformer2DModel MotifVideoTransformer3DModel
    """,
)
declare_models(
    Model("image_text", _JOINT, parts="img_shapes", hides_padding="encoder_hidden_states_mask"),
    "NucleusMoEImageTransformer2DModel",
)
declare_models(
    Model("image_text", _JOINT, several_texts=True),
    "HiDreamImageTransformer2DModel StableCascadeUNet",
)
_REFINED = (("context_embedder*", "text"), *_JOINT)
declare_models(
    Model("image_text", _REFINED, text_rows=True, hides_padding="encoder_attention_mask"),
    "HunyuanVideoTransformer3DModel",
)
declare_models(
    Model("image_text", _REFINED, several_texts=True),
    "HunyuanVideo15Transformer3DModel HunyuanImageTransformer2DModel",
)
declare_models(
    Model(
        "image_text",
        (("context_embedder*", "text"), *_JOINT),
        placeless=_DRAWN_BEFORE,
    ),
    "HunyuanVideoFramepackTransformer3DModel",
)
declare_models(
    Model("image_text", (("time_embed.pooler", "text"), *_JOINT)), "MochiTransformer3DModel"
)
declare_models(
    Model(
        "image_text",
        (
            ("noise_refiner.*", "self"),
            ("context_refiner.*", "text"),
            ("siglip_refiner.*", "text"),
            *_JOINT,
        ),
        text_block=32,
        text_rows=True,
        text_moves_image=True,
        counts_up=True,
        as_videos=True,
    ),
    "ZImageTransformer2DModel",
)
declare_models(Model("image_text", _JOINT), "JoyImageEditTransformer3DModel")
declare_models(
    Model("image_text", _JOINT, placeless="each image of the sequence has a size of its own"),
    "JoyImageEditPlusTransformer3DModel",
)
