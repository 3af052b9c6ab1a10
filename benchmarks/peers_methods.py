"""The peers of `benchmarks/peers.py`, as data: how each package's cache is attached to a model.

Every peer is attached by its package's own functions, to a copy of the model that is its alone, and called as its
documentation says: diffusers' hooks inside a cache context, cache-dit's with a context that is new for every run.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import peers_plans
import torch
from peers_models import HiddenStates, Target
from peers_plans import Twin
from torch import Tensor, nn

Model = Callable[[Tensor, Tensor, Tensor], Tensor]
MODULES = r"^(transformer_)?blocks\.\d+\.(block\.)?(attn\d?|mlp|ff)$"  # all that a block adds to its stream


class NotApplicable(Exception):  # noqa: N818 # no fault: a peer is not made for the model
    """A peer cannot be attached to a model; says why."""


@dataclass(frozen=True)
class Attached:
    """A peer on its copy of the model.

    Attributes:
        reset: forgets the run before.
        around: makes the model, or what `torch.compile` made of it, into what the sampler calls.
    """

    reset: Callable[[], None]
    around: Callable[[Model], Model]


@dataclass(frozen=True)
class Peer:
    """A cache of another package with its settings.

    Attributes:
        name: its name in the table.
        family: what it counts as in the plot: the method.
        package: whose it is, as it is imported.
        attach: puts it on a copy of the model; raises `NotApplicable` or what the package raises.
        settings: the compiler settings that its documentation asks for, in force while it is compiled.
        twin: the plan of tcc that repeats its decisions, where there is one.
    """

    name: str
    family: str
    package: str
    attach: Callable[[Target], Attached]
    settings: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    twin: Twin | None = None


class Clock:
    """The timestep that a pipeline is at, for caches that ask for it; a tensor, as in pipelines."""

    now: Tensor = torch.tensor(0)


def first_block(target: Target, threshold: float) -> Attached:
    """Diffusers' FirstBlockCache."""
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    _register(target)
    apply_first_block_cache(target.denoiser, FirstBlockCacheConfig(threshold=threshold))
    return _hooked(target)


def taylorseer(target: Target, interval: int, order: int, modules: str | None) -> Attached:
    """Diffusers' TaylorSeer, on its default modules (attention) or those that match; factors in float32."""
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=None if modules is None else [modules],
    )
    apply_taylorseer_cache(target.denoiser, config)
    return _hooked(target)


def mag(target: Target, threshold: float, max_skip: int) -> Attached:
    """Diffusers' MagCache, with the ratios that its calibration prints for this model and number of steps."""
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    _register(target)
    steps, printed = target.steps, io.StringIO()
    apply_mag_cache(target.denoiser, MagCacheConfig(calibrate=True, num_inference_steps=steps))
    attached = _hooked(target)
    attached.reset()
    with contextlib.redirect_stdout(printed):
        target.draw(attached.around(target.model))
    ratios = json.loads(next(line for line in printed.getvalue().splitlines() if line.startswith("[") and "," in line))
    config = MagCacheConfig(
        threshold=threshold, max_skip_steps=max_skip, num_inference_steps=steps, mag_ratios=torch.tensor(ratios)
    )
    apply_mag_cache(target.denoiser, config)  # takes the place of the hooks that calibrated
    return _hooked(target)


def pyramid(target: Target, interval: int, cross: int | None = None) -> Attached:
    """Diffusers' PyramidAttentionBroadcast: self-attention every `interval` steps, cross-attention every `cross`."""
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    clock = Clock()
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=interval,
        cross_attention_block_skip_range=cross,
        current_timestep_callback=lambda: clock.now,
    )
    apply_pyramid_attention_broadcast(target.denoiser, config)
    return _hooked(target, clock)


def faster(target: Target) -> Attached:
    """Diffusers' FasterCache, with its defaults; it takes the first half of the batch for the unconditional one."""
    from diffusers.hooks import FasterCacheConfig, apply_faster_cache

    clock = Clock()
    config = FasterCacheConfig(
        tensor_format="BCHW", attention_weight_callback=lambda _: 0.5, current_timestep_callback=lambda: clock.now
    )
    attention = [name for name, module in target.denoiser.named_modules() if _is_diffusers_attention(module)]
    if not attention:
        raise NotApplicable("it hooks diffusers' attention classes, and the model has none")
    apply_faster_cache(target.denoiser, config)
    attached = _hooked(target, clock)

    def around(model: Model) -> Model:
        inner = attached.around(model)

        def call(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return _swapped(inner(_swapped(x), _swapped(t), _swapped(y)))

        return call

    return Attached(attached.reset, around)


def dual_block(target: Target, threshold: float, first: int = 1, warmup: int = 4, order: int | None = None) -> Attached:
    """cache-dit's DBCache: `first` blocks are always computed; with `order`, the rest is forecast by TaylorSeer."""
    import cache_dit

    adapter = cache_dit.BlockAdapter(
        transformer=target.denoiser, blocks=target.blocks, forward_pattern=cache_dit.ForwardPattern.Pattern_3
    )
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=first,
        max_warmup_steps=warmup,
        residual_diff_threshold=threshold,
        enable_separate_cfg=False,  # both halves are one batch
        num_inference_steps=target.steps,
    )
    calibrator = None if order is None else cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
    cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)
    return Attached(functools.partial(cache_dit.refresh_context, target.denoiser), lambda model: model)


@contextlib.contextmanager
def cache_dit_settings() -> Iterator[None]:
    """What `cache_dit.set_compile_configs` sets, taken back afterwards."""
    import cache_dit
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    before = [(config, config.get_config_copy()) for config in (dynamo, inductor)]
    cache_dit.set_compile_configs()
    try:
        yield
    finally:
        for config, values in before:
            now = config.get_config_copy()
            for name in (name for name, value in values.items() if now[name] != value):
                setattr(config, name, values[name])


def _register(target: Target) -> None:
    """Tell diffusers what a block returns, where it does not know the class."""
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    if isinstance(target.blocks[0], HiddenStates):
        TransformerBlockRegistry.register(HiddenStates, TransformerBlockMetadata(return_hidden_states_index=0))


def _hooked(target: Target, clock: Clock | None = None) -> Attached:
    """A model with diffusers' hooks, called in a cache context.

    Raises:
        NotApplicable: no module has a hook.
    """
    from diffusers.hooks import HookRegistry
    from diffusers.models.cache_utils import CacheMixin

    denoiser = target.denoiser
    registries = [module._diffusers_hook for module in denoiser.modules() if hasattr(module, "_diffusers_hook")]
    if not any(registry.hooks for registry in registries):
        raise NotApplicable("its rules match no module of the model, so it would change nothing")
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)

    def around(model: Model) -> Model:
        def call(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            if clock is not None:
                clock.now = t[0]
            with CacheMixin.cache_context(denoiser, "cond_uncond"):
                return model(x, t, y)

        return call

    return Attached(registry.reset_stateful_hooks, around)


def _is_diffusers_attention(module: nn.Module) -> bool:
    from diffusers.hooks._common import _ATTENTION_CLASSES

    return isinstance(module, _ATTENTION_CLASSES)


def _swapped(tensor: Tensor) -> Tensor:
    """The halves of a batch in the other order."""
    return torch.cat(tensor.chunk(2)[::-1])


def _peer(
    name: str, family: str, package: str, attach: Callable[..., Attached], *, twin: Twin | None = None, **options: Any
) -> Peer:
    settings = {"settings": cache_dit_settings} if package == "cache_dit" else {}
    return Peer(name, family, package, functools.partial(attach, **options), **settings, twin=twin)


#: Every peer with its settings: the package's defaults or its documentation's, and a cheaper one.
PEERS: tuple[Peer, ...] = (
    *(
        _peer(f"FirstBlockCache {threshold:g}", "FirstBlockCache", "diffusers", first_block, threshold=threshold,
              twin=functools.partial(peers_plans.blocks, first=1))
        for threshold in (0.05, 0.1, 0.2)
    ),
    *(
        _peer(f"TaylorSeer{what} N={interval} O={order}", "TaylorSeer (diffusers)", "diffusers", taylorseer,
              interval=interval, order=order, modules=modules,
              twin=functools.partial(peers_plans.taylorseer, order=order, attention=modules is None))
        for what, modules in ((" attention", None), ("", MODULES))
        for interval, order in ((5, 1), (3, 2))
    ),
    *(
        _peer(f"MagCache {threshold:g} K={skip}", "MagCache", "diffusers", mag, threshold=threshold, max_skip=skip,
              twin=functools.partial(peers_plans.blocks, first=0))
        for threshold, skip in ((0.06, 3), (0.24, 5))
    ),
    *(
        _peer(f"PyramidAttentionBroadcast N={interval}{f', cross {cross}' if cross else ''}",
              "PyramidAttentionBroadcast", "diffusers", pyramid, interval=interval, cross=cross,
              twin=functools.partial(peers_plans.broadcast, interval=interval, cross=cross))
        for interval, cross in ((2, None), (4, 6))
    ),
    _peer("FasterCache", "FasterCache", "diffusers", faster),
    *(
        _peer(f"DBCache F1B0 {threshold:g}", "DBCache", "cache_dit", dual_block, threshold=threshold,
              twin=functools.partial(peers_plans.blocks, first=1))
        for threshold in (0.08, 0.24)
    ),
    *(
        _peer(f"DBCache F1B0 {threshold:g} + TaylorSeer O=1", "DBCache + TaylorSeer", "cache_dit", dual_block,
              threshold=threshold, order=1, twin=functools.partial(peers_plans.blocks, first=1, order=1))
        for threshold in (0.08, 0.24)
    ),
)  # fmt: skip
