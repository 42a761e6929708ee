"""Trains the embedded pipeline, from nothing or further, and writes it in the diffusers layout.

    python -m hookctl.demos.shapes.train --out out/shapes --minutes 90
    python -m hookctl.demos.shapes.train --out out/shapes --start demos/shapes/weights  # go on

Tokenizer, text encoder, latent basis, autoencoder and denoiser are made in turn and kept in
`--out`, where `--resume` finds them; the pipeline itself is written to `--out`/weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from .denoiser import CPU_FURTHER, CPU_STAGES, GPU_STAGES, Plan, Stage, Trainer, build_scheduler
from .latents import Basis, fit_basis, train_vae
from .render import render
from .text import Words, train_text
from .tokenizer import write_tokenizer
from .world import sample_scene


def log(text: str) -> None:
    """One line with the time of day."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def prepare_text(out: Path, seed: int, steps: int) -> None:
    """Make tokenizer and text encoder unless they are there."""
    if (out / "text" / "config.json").exists():
        return
    train_text(write_tokenizer(out / "tokenizer"), seed, steps, log).save_pretrained(out / "text")


def prepare_vae(out: Path, seed: int, minutes: float, device: str, refine: bool = False) -> None:
    """Make the autoencoder unless it is there; with `refine`, go on with the one that is."""
    there = (out / "vae" / "config.json").exists()
    if there and not refine:
        return
    start = AutoencoderKL.from_pretrained(out / "vae") if there else None
    crops = [(0.0, 64, 12), (0.6, 128, 4)] if device == "cpu" else [(0.0, 128, 64)]
    if there and device == "cpu":
        crops = [(0.0, 128, 4)]
    vae = train_vae(fit_basis(seed), seed, minutes, log, device, crops, start)
    vae.save_pretrained(out / "vae.tmp")
    publish(out / "vae.tmp", out / "vae")


def take_over(start: Path, out: Path) -> None:
    """Make the parts of a finished pipeline the ones to go on with."""
    if not (start / "model_index.json").exists():
        raise SystemExit(f"--start {start}: holds no pipeline (no model_index.json)")
    shutil.copytree(start / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    CLIPTextModel.from_pretrained(start / "text_encoder").save_pretrained(out / "text")
    AutoencoderKL.from_pretrained(start / "vae").float().save_pretrained(out / "vae")


def fit_or_refuse(options: argparse.Namespace) -> Basis:
    """The latent basis of the seed; with --start it must be the one of that autoencoder."""
    basis = fit_basis(options.seed)
    if options.start:
        vae = AutoencoderKL.from_pretrained(options.start / "vae").float()
        rng = np.random.default_rng(options.seed)
        images = render([sample_scene(rng) for _ in range(16)])
        with torch.no_grad():
            apart = F.mse_loss(vae.encode(images).latent_dist.mode(), basis.encode(images))
        if apart > 0.02:
            raise SystemExit(
                f"--start {options.start}: its latents are not those of this world (mean squared "
                f"difference {apart:.3f}); train without --start, or with the --seed it was made by"
            )
    return basis


TEXT_PREFIX = "text_model."


def export(out: Path, unet: UNet2DConditionModel) -> Path:
    """Write the pipeline to `out`/weights."""
    tokenizer = CLIPTokenizer.from_pretrained(str(out / "tokenizer"))
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(out / "vae"), tokenizer=tokenizer, unet=unet,
        text_encoder=CLIPTextModel.from_pretrained(out / "text"), scheduler=build_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return write_half(pipe, out)


def write_half(pipe: Any, out: Path) -> Path:
    """Write a pipeline as fp16 safetensors to `out`/weights; replaced file by file.

    Receives: a pipeline of this world, which is left in fp16. Returns: the folder.
    """
    made, final = out / "weights.tmp", out / "weights"
    shutil.rmtree(made, ignore_errors=True)
    pipe.to(dtype=torch.float16).save_pretrained(made, safe_serialization=True)
    for path in made.glob("text_encoder*"):
        config = path / "config.json"  # its dtype is what a plain load would use
        config.write_text(config.read_text("utf-8").replace('"float16"', '"float32"'), "utf-8")
        as_every_version_reads(path / "model.safetensors")
    for config in made.glob("*/config.json"):  # whence the parts came is nobody's business
        said = json.loads(config.read_text("utf-8"))
        said.pop("_name_or_path", None)
        config.write_text(json.dumps(said, indent=2) + "\n", "utf-8")
    for path in list(made.glob("tokenizer*")):
        shutil.rmtree(path)
        write_tokenizer(path)
    publish(made, final)
    return final


def as_every_version_reads(path: Path) -> None:
    """The text encoder's weights under their full names.

    transformers 5 leaves the first part out. It reads both; transformers 4 finds none of the short
    ones, says so in a log, and goes on with random weights.
    """
    held = load_file(path)
    full = {_full(name): value for name, value in held.items()}
    save_file(full, path, metadata={"format": "pt"})


def _full(name: str) -> str:
    bare = name.removeprefix(TEXT_PREFIX)
    return bare if bare.startswith("text_projection") else f"{TEXT_PREFIX}{bare}"


def publish(made: Path, final: Path) -> None:
    """Move each file of `made` over its namesake in `final`, so that no reader sees half a file."""
    for path in sorted(p for p in made.rglob("*") if p.is_file()):
        target = final / path.relative_to(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.chmod(0o644)
        path.replace(target)
    shutil.rmtree(made)


def _denoise(rank: int, ranks: int, options: argparse.Namespace) -> None:
    out: Path = options.out
    if ranks > 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(options.port))
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
        torch.set_num_threads(1)
    basis = Basis(**torch.load(out / "basis.pt"))
    text = CLIPTextModel.from_pretrained(out / "text").eval().requires_grad_(False)
    words = Words(CLIPTokenizer.from_pretrained(str(out / "tokenizer")))
    stages: tuple[Stage, ...] = CPU_STAGES if options.device == "cpu" else GPU_STAGES
    if options.start and options.device == "cpu":
        stages = CPU_FURTHER
    plan = Plan(options.minutes, out, options.seed, options.rate, device=options.device,
                stages=stages, log=log)  # fmt: skip
    trainer = Trainer(plan, basis, text, words)
    if options.resume and (out / "denoiser.pt").exists():
        trainer.resume()
    elif options.start:
        trainer.start(UNet2DConditionModel.from_pretrained(options.start / "unet"))

    def save(unet: UNet2DConditionModel) -> None:
        if (out / "vae" / "config.json").exists():
            log(f"exported {export(out, unet)}")

    trainer.run(save if rank == 0 else None)
    if rank == 0:
        prepare_vae(out, options.seed, options.vae_minutes, options.device)
        log(f"exported {export(out, trainer.averaged())}")
    if ranks > 1:
        dist.destroy_process_group()


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--minutes", type=float, default=90.0, help="wall clock of the denoiser")
    parser.add_argument("--vae-minutes", type=float, default=6.0, help="wall clock of the VAE")
    parser.add_argument("--text-steps", type=int, default=500)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--start", type=Path, help="folder of a trained pipeline to go on with")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from what --out holds")
    parser.add_argument("--processes", type=int, default=0, help="0: one per core, at most 4")
    parser.add_argument("--port", type=int, default=29641, help="local port of the processes")
    parser.add_argument(
        "--only", choices=("vae", "denoiser"), help="this part alone; vae: refine it"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.resume:
        for name in ("text", "vae", "tokenizer"):
            shutil.rmtree(options.out / name, ignore_errors=True)
        if options.start:
            take_over(options.start, options.out)
    prepare_text(options.out, options.seed, options.text_steps)
    torch.save(vars(fit_or_refuse(options)), options.out / "basis.pt")
    if options.only != "denoiser":
        refine = options.only == "vae"
        prepare_vae(options.out, options.seed, options.vae_minutes, options.device, refine)
    if options.only == "vae":
        return
    ranks = (options.processes or min(os.cpu_count() or 1, 4)) if options.device == "cpu" else 1
    if ranks > 1:
        mp.spawn(_denoise, args=(ranks, options), nprocs=ranks)
    else:
        _denoise(0, 1, options)


if __name__ == "__main__":
    main()
