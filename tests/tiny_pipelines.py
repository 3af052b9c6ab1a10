"""Five of diffusers' pipelines, small and random, with real schedulers: nothing is downloaded.

`pipeline(name)` builds one; `run` makes images with it, from prompt embeddings in place of a prompt; `by_hand` makes
the same images without the pipeline's loop. `planned` compiles its transformer; `using` puts another one in its place.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import tcc
from tcc.driver.stand_in import StandIn
from tests.tiny_models import fill, noise, wan_model


def _image_vae(channels: int) -> nn.Module:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=2,
        layers_per_block=1,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def dit() -> Any:
    """Class labels, guidance as a doubled batch, DPM-Solver++."""
    from diffusers import DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler

    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    return DiTPipeline(fill(model), _image_vae(4), DPMSolverMultistepScheduler())


def pixart() -> Any:
    """Text by cross attention with a mask, guidance as a doubled batch, DPM-Solver++."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=32,
        caption_channels=24,
        use_additional_conditions=False,
    )
    return PixArtAlphaPipeline(None, None, _image_vae(4), fill(model), DPMSolverMultistepScheduler())


def sd3() -> Any:
    """Two streams, guidance as a doubled batch, rectified flow."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(fill(model), scheduler, _image_vae(4), None, None, None, None, None, None)


def flux() -> Any:
    """Two streams and then one, distilled guidance, true guidance under `cache_context`, rectified flow."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return FluxPipeline(scheduler, _image_vae(4), None, None, None, None, fill(model))


def wan() -> Any:
    """A video, guidance under `cache_context`, UniPC."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(None, None, vae, scheduler, wan_model())


BUILDERS: dict[str, Callable[[], Any]] = {"dit": dit, "pixart": pixart, "sd3": sd3, "flux": flux, "wan": wan}
NAMES = list(BUILDERS)


def arguments(name: str, tokens: int = 7) -> dict[str, Any]:
    """What the pipeline is called with besides steps, seed and output: two conditions, guidance on."""
    text, negative = noise(1, tokens, 24, seed=8), noise(1, tokens, 24, seed=9)
    pooled = {"pooled_prompt_embeds": noise(1, 16, seed=10), "negative_pooled_prompt_embeds": noise(1, 16, seed=11)}
    embeds = {"prompt_embeds": text, "negative_prompt_embeds": negative}
    mask = torch.ones(1, tokens, dtype=torch.int64)
    return {
        "dit": {"class_labels": [3], "guidance_scale": 4.0},
        "pixart": embeds
        | {"negative_prompt": None, "guidance_scale": 4.5, "height": 16, "width": 16, "use_resolution_binning": False}
        | {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask * (torch.arange(tokens) < 4)},
        "sd3": embeds | pooled | {"guidance_scale": 4.5, "height": 16, "width": 16},
        "flux": embeds | pooled | {"guidance_scale": 3.5, "true_cfg_scale": 2.0, "height": 16, "width": 16},
        "wan": embeds | {"guidance_scale": 5.0, "height": 32, "width": 32, "num_frames": 5},
    }[name]


def run(
    pipe: Any, name: str, *, steps: int, seed: int = 0, given: dict[str, Any] | None = None, **changes: Any
) -> Tensor:
    """What the pipeline makes, decoded, as one tensor; of the arguments of that name unless others are given."""
    given = (arguments(name) if given is None else given) | changes
    made = pipe(
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        return_dict=False,
        **given,
    )[0]
    assert isinstance(made, Tensor)
    return made


@functools.cache
def pipeline(name: str) -> Any:
    """The pipeline of that name, built once."""
    pipe = BUILDERS[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_hand(pipe: Any, name: str, *, steps: int, seed: int) -> Tensor:
    """What `run` makes, without the pipeline's loop: its parts are called one after the other."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "dit": _dit_by_hand,
        "pixart": _pixart_by_hand,
        "sd3": _sd3_by_hand,
        "flux": _flux_by_hand,
        "wan": _wan_by_hand,
    }[name](pipe, arguments(name), steps, generator)


def _guided(both: Tensor, scale: float) -> Tensor:
    negative, positive = both.chunk(2)
    return negative + scale * (positive - negative)


def _image(pipe: Any, latents: Tensor) -> Tensor:
    with torch.no_grad():
        image: Tensor = pipe.vae.decode(latents).sample
    return (image * 0.5 + 0.5).clamp(0, 1)


def _dit_by_hand(pipe: Any, given: dict[str, Any], steps: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(1, 4, 8, 8, generator=generator)
    labels = torch.tensor([*given["class_labels"], 1000])
    pipe.scheduler.set_timesteps(steps)
    for t in pipe.scheduler.timesteps:
        out = pipe.transformer(torch.cat([x, x]), timestep=t.expand(2), class_labels=labels).sample[:, :4]
        noise_ = _guided(out.flip(0), given["guidance_scale"])  # this pipeline has the null class last
        x = pipe.scheduler.step(noise_, t, x).prev_sample
    return _image(pipe, 1 / pipe.vae.config.scaling_factor * x)


def _pixart_by_hand(pipe: Any, given: dict[str, Any], steps: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(1, 4, 8, 8, generator=generator)
    text = torch.cat([given["negative_prompt_embeds"], given["prompt_embeds"]])
    mask = torch.cat([given["negative_prompt_attention_mask"], given["prompt_attention_mask"]])
    pipe.scheduler.set_timesteps(steps)
    for t in pipe.scheduler.timesteps:
        out = pipe.transformer(
            torch.cat([x, x]),
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=t.expand(2),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        x = pipe.scheduler.step(_guided(out, given["guidance_scale"])[:, :4], t, x).prev_sample
    return _image(pipe, x / pipe.vae.config.scaling_factor)


def _sd3_by_hand(pipe: Any, given: dict[str, Any], steps: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(1, 4, 8, 8, generator=generator)
    text = torch.cat([given["negative_prompt_embeds"], given["prompt_embeds"]])
    pooled = torch.cat([given["negative_pooled_prompt_embeds"], given["pooled_prompt_embeds"]])
    pipe.scheduler.set_timesteps(steps)
    for t in pipe.scheduler.timesteps:
        out = pipe.transformer(torch.cat([x, x]), text, pooled, t.expand(2), return_dict=False)[0]
        x = pipe.scheduler.step(_guided(out, given["guidance_scale"]), t, x).prev_sample
    return _image(pipe, x / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor)


def _flux_by_hand(pipe: Any, given: dict[str, Any], steps: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(1, 4, 8, 8, generator=generator)
    x = x.view(1, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 16, 16)  # 2 x 2 patches are the tokens
    ids = torch.zeros(4, 4, 3)
    ids[..., 1], ids[..., 2] = torch.arange(4)[:, None], torch.arange(4)
    pipe.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=_flux_shift(pipe, 16))
    for t in pipe.scheduler.timesteps:
        out = {}
        for context, prefix in (("cond", ""), ("uncond", "negative_")):
            with pipe.transformer.cache_context(context):
                out[context] = pipe.transformer(
                    x,
                    encoder_hidden_states=given[f"{prefix}prompt_embeds"],
                    pooled_projections=given[f"{prefix}pooled_prompt_embeds"],
                    timestep=t.expand(1) / 1000,
                    img_ids=ids.view(16, 3),
                    txt_ids=torch.zeros(7, 3),
                    guidance=torch.tensor([given["guidance_scale"]]),
                    joint_attention_kwargs={},
                    return_dict=False,
                )[0]
        noise_ = out["uncond"] + given["true_cfg_scale"] * (out["cond"] - out["uncond"])
        x = pipe.scheduler.step(noise_, t, x).prev_sample
    x = x.view(1, 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(1, 4, 8, 8)
    return _image(pipe, x / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor)


def _flux_shift(pipe: Any, tokens: int) -> float:
    """The schedule's shift: linear in the number of tokens."""
    config = pipe.scheduler.config
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return float(tokens * slope + (config.base_shift - slope * config.base_image_seq_len))


def _wan_by_hand(pipe: Any, given: dict[str, Any], steps: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(1, 4, 2, 4, 4, generator=generator)
    pipe.scheduler.set_timesteps(steps)
    for t in pipe.scheduler.timesteps:
        out = {}
        for context, text in (("cond", given["prompt_embeds"]), ("uncond", given["negative_prompt_embeds"])):
            with pipe.transformer.cache_context(context):
                out[context] = pipe.transformer(x, t.expand(1), text, return_dict=False)[0]
        noise_ = out["uncond"] + given["guidance_scale"] * (out["cond"] - out["uncond"])
        x = pipe.scheduler.step(noise_, t, x).prev_sample
    return _image(pipe, x).transpose(1, 2)


STEPS = 5
POLICIES: dict[str, Any] = {
    "full": functools.partial(tcc.plans.full, num_steps=STEPS),
    "fora": functools.partial(tcc.plans.fora, num_steps=STEPS, interval=2),
    "taylorseer": functools.partial(tcc.plans.taylorseer, num_steps=STEPS, interval=2, order=1),
    "tokens": functools.partial(
        tcc.plans.tprr, num_steps=STEPS, k1=1, k2=1, keep=0.5, tokens="uniform", attention="cached", level="branch"
    ),
}


class Oracle(StandIn):
    """The reference interpreter in a pipeline: one run per context, and a new one for each image."""

    def __init__(self, model: nn.Module, plan: tcc.CachePlan, info: tcc.ModelInfo) -> None:
        super().__init__(model)
        self.plan, self.inspected, self.context = plan, info, ""
        self.runs: dict[str, tcc.Reference] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The next step of the context's run."""
        run = self.runs.setdefault(self.context, tcc.Reference(self._model[0], self.plan, self.inspected))
        return run(*args, **kwargs)

    @contextlib.contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """Calls inside belong to the run `name`."""
        self.context = name
        yield
        self.context = ""

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        self.runs.clear()


@functools.cache
def captured(name: str) -> tcc.CompiledModel:
    """The pipeline's model, uncached, with a backend that compiles nothing."""
    return tcc.compile(pipeline(name).transformer, POLICIES["full"], backend="eager")


@functools.cache
def planned(name: str, policy: str) -> tcc.CompiledModel:
    """The pipeline's model under a policy."""
    return captured(name).with_plan(POLICIES[policy])


@contextlib.contextmanager
def using(name: str, model: nn.Module) -> Iterator[Any]:
    """The pipeline with another transformer, which begins an image."""
    pipe = pipeline(name)
    if isinstance(model, tcc.CompiledModel):
        model.reset()
    before, pipe.transformer = pipe.transformer, model
    try:
        yield pipe
    finally:
        pipe.transformer = before
