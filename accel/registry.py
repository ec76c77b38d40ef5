"""Two tables: method name → class, denoiser class name → family. Imports only when asked."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

from accel.family import Family, detect
from accel.method import AccelError

METHODS: dict[str, str] = {
    "magcache": "accel.caches.mag_cache:MagCache",
    "firstblockcache": "accel.caches.first_block_cache:FirstBlockCache",
    "easycache": "accel.caches.easy_cache:EasyCache",
    "teacache": "accel.caches.tea_cache:TeaCache",
    "plaincycle": "accel.caches.plain_cycle:PlainCycle",
    "blockcaching": "accel.caches.block_caching:BlockCaching",
    "foresight": "accel.caches.foresight:Foresight",
    "dicache": "accel.caches.di_cache:DiCache",
    "dpcache": "accel.caches.dp_cache:DPCache",
    "fitcache": "accel.caches.fit_cache:FitCache",
    "deltadit": "accel.caches.delta_dit:DeltaDiT",
    "deepcache": "accel.caches.deep_cache:DeepCache",
    "spectrum": "accel.caches.spectrum:Spectrum",
    "stepmask": "accel.caches.step_mask:StepMask",
    "fora": "accel.caches.fora:FORA",
    "taylorseer": "accel.caches.taylor_seer:TaylorSeer",
    "pyramidattentionbroadcast": (
        "accel.caches.pyramid_attention_broadcast:PyramidAttentionBroadcast"
    ),
    "fastercache": "accel.caches.faster_cache:FasterCache",
    "smoothcache": "accel.caches.smooth_cache:SmoothCache",
    "adacache": "accel.caches.ada_cache:AdaCache",
    "bac": "accel.caches.bac:BAC",
    "unicp": "accel.caches.uni_cp:UniCP",
    "speca": "accel.caches.spe_ca:SpeCa",
    "seacache": "accel.caches.sea_cache:SeaCache",
    "toca": "accel.caches.to_ca:ToCa",
    "ertacache": "accel.caches.erta_cache:ERTACache",
    "textcache": "accel.caches.text_cache:TextCache",
    "tokenmerging": "accel.caches.token_merging:TokenMerging",
    "guidanceinterval": "accel.samplers.guidance_interval:GuidanceInterval",
    "adaptiveguidance": "accel.samplers.adaptive_guidance:AdaptiveGuidance",
    "cfgcache": "accel.samplers.cfg_cache:CfgCache",
    "cfgzerostar": "accel.samplers.cfg_zero_star:CfgZeroStar",
    "tgate": "accel.samplers.t_gate:TGate",
    "agd": "accel.samplers.agd:AGD",
    "rcfg": "accel.samplers.r_cfg:RCFG",
    "linearag": "accel.samplers.adaptive_guidance:LinearAG",
    "cachedmultilora": "accel.caches.cached_multi_lora:CachedMultiLoRA",
    "clusca": "accel.caches.clus_ca:ClusCa",
    "speedupnet": "accel.samplers.speed_up_net:SpeedUpNet",
    "attention": "accel.kernels.attention:Attention",
    "linear": "accel.kernels.linear:Linear",
    "nabla": "accel.kernels.nabla:NABLA",
    "spargeattention": "accel.kernels.sparge_attention:SpargeAttention",
    "radialattention": "accel.kernels.radial_attention:RadialAttention",
    "sparsevideogen": "accel.kernels.sparse_video_gen:SparseVideoGen",
    "principalattention": "accel.kernels.principal_attention:PrincipalAttention",
    "bottlenecksampling": "accel.samplers.bottleneck_sampling:BottleneckSampling",
    "progressive": "accel.samplers.progressive:Progressive",
    "lssgen": "accel.samplers.lssgen:LSSGen",
    "ralu": "accel.samplers.ralu:RALU",
    "vgdfr": "accel.samplers.vgdfr:VGDFR",
}

APPROXIMATORS: dict[str, str] = {
    "holdresidual": "accel.caches.approximators:HoldResidual",
    "taylor": "accel.caches.approximators:Taylor",
    "newton": "accel.caches.approximators:Newton",
    "hicache": "accel.caches.approximators:HiCache",
    "aligned": "accel.caches.approximators:Aligned",
    "growingline": "accel.caches.approximators:GrowingLine",
    "foca": "accel.caches.approximators:FoCa",
    "chebyshev": "accel.caches.approximators:Chebyshev",
}

FAMILIES: dict[str, str] = {
    "FluxTransformer2DModel": "flux",
    "SD3Transformer2DModel": "sd3",
    "PixArtTransformer2DModel": "pixart",
    "WanTransformer3DModel": "wan",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "CogVideoXTransformer3DModel": "cogvideox",
    "LTXVideoTransformer3DModel": "ltx",
    "QwenImageTransformer2DModel": "qwen_image",
    "MochiTransformer3DModel": "mochi",
    "LatteTransformer3DModel": "latte",
    "DiTTransformer2DModel": "dit",
    "UNet2DConditionModel": "unet",
}


PIPELINES: dict[str, str] = {
    "stream": "accel.pipelines.stream:StreamPipeline",
}


def _load(table: dict[str, str], name: str, kind: str) -> Any:
    key = name.lower().replace("_", "").replace("-", "")
    if key not in table:
        accepted = ", ".join(sorted(table))
        raise AccelError(f"unknown {kind} {name!r}; accepted: {accepted}")
    module, attribute = table[key].split(":")
    return getattr(importlib.import_module(module), attribute)


def method(name: str) -> Any:
    """The class of a method by its published name, in any case, `_` and `-` ignored."""
    return _load(METHODS, name, "method")


def approximator(name: str) -> Any:
    """The class of an approximator by its name."""
    return _load(APPROXIMATORS, name, "approximator")


def pipeline(name: str) -> Any:
    """The class of a pipeline of our own by its name."""
    return _load(PIPELINES, name, "pipeline")


def family(denoiser: Any) -> Family:
    """The family of a denoiser by its class or a base of it; else described by its structure."""
    module = getattr(denoiser, "_orig_mod", denoiser)
    for base in type(module).__mro__:
        if base.__name__ in FAMILIES:
            found = importlib.import_module(f"accel.pipelines.{FAMILIES[base.__name__]}")
            return found.FAMILY  # type: ignore[no-any-return]
    told = importlib.import_module("accel.pipelines.by_structure").TOLD
    return replace(detect(module), **told.get(type(module).__name__, {}))
