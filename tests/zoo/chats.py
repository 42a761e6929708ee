"""Image pipelines whose text encoder is a chat model: Z-Image, Qwen-Image, FLUX.2 klein."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from .case import Asked, Case, Rows, labels, of_text, two_calls
from .text import WORDS
from .transformers import CAUSAL_VAE, SHIFTED_VAE
from .unets import PIXELS, autoencoder

TOKENS = 32  # that prompts are padded to
WIDTH = 16
SIZE = {"height": PIXELS, "width": PIXELS}
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a chat template; the words of WORDS are one token each."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    known = (*WORDS, "user", "assistant", "think")
    tokenizer.train_from_iterator([w for word in known for w in (word, f" {word}")], trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (START, END, PAD)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=131_072
    )
    made.chat_template = CHAT
    return made


def chat_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config).eval()


def assembled(
    kind: type[Any], transformer: nn.Module, vae: nn.Module, tokenizer: PreTrainedTokenizerFast
) -> Any:
    """A pipeline of these parts, a chat model and a flow-matching scheduler."""
    return kind(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=chat_model(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )


def build_z_image() -> ZImagePipeline:
    """A refiner of the image alone, one of the text alone, then two joint blocks."""
    tokenizer = chat_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 64, 64],
    )
    return assembled(ZImagePipeline, transformer, autoencoder(**SHIFTED_VAE), tokenizer)


def build_qwen_image() -> QwenImagePipeline:
    tokenizer = chat_tokenizer()
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(**CAUSAL_VAE)
    pipe = assembled(QwenImagePipeline, transformer, vae, tokenizer)
    # The published number is that of the published tokenizer: all but the prompt's own message.
    before = pipe.prompt_template_encode.split("{}")[0]
    pipe.prompt_template_encode_start_idx = len(tokenizer(before).input_ids)
    return pipe


def build_flux2_klein() -> Flux2KleinPipeline:
    tokenizer = chat_tokenizer()
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=PIXELS,
    )
    return assembled(Flux2KleinPipeline, transformer, vae, tokenizer)


def positive_first(prompts: int, n: int, guided: bool) -> Rows:
    """One call, the conditional rows before the unconditional ones."""
    return [[*labels("P", prompts, n), *(labels("N", prompts, n) if guided else [])]]


def of_z_image(asked: Asked) -> dict[str, Any]:
    """Guidance is counted from 0 here: cond + g (cond - uncond)."""
    guidance = {"guidance_scale": asked.guidance - 1}
    return {**of_text(asked), **guidance, **SIZE, "max_sequence_length": TOKENS}


def of_qwen_image(asked: Asked) -> dict[str, Any]:
    given = of_text(asked)
    return {"true_cfg_scale": given.pop("guidance_scale"), **given, **SIZE}


def of_flux2_klein(asked: Asked) -> dict[str, Any]:
    """It takes no negative prompts: they are empty."""
    return {
        "prompt": asked.prompts,
        "guidance_scale": asked.guidance,
        "max_sequence_length": TOKENS,
        "text_encoder_out_layers": (1, 2, 3),
        **SIZE,
    }


CASES = (
    Case(
        "z_image",
        build_z_image,
        of_z_image,
        sites={"joint": 2, "self": 1},
        examples={"noise_refiner.0.attention": "self", "layers.1.attention": "joint"},
        rows=positive_first,
        denoiser="transformer",
        aside="context_refiner",
        notes="tokens: image 64, then the text in a multiple of 32; images come as a list",
    ),
    Case(
        "qwen_image",
        build_qwen_image,
        of_qwen_image,
        sites={"joint": 2},
        examples={"transformer_blocks.1.attn": "joint"},
        rows=two_calls,
        denoiser="transformer",
        notes="tokens: text as long as the longest prompt, then image 64",
    ),
    Case(
        "flux2_klein",
        build_flux2_klein,
        of_flux2_klein,
        sites={"joint": 4},
        examples={
            "transformer_blocks.1.attn": "joint",
            "single_transformer_blocks.0.attn": "joint",
        },
        rows=two_calls,
        denoiser="transformer",
        notes="tokens: text 32, then image 64; the single blocks project everything at once",
    ),
)
