"""Denoisers that the engine describes by their structure, and what their structure does not tell.

Fields of `accel.family.Family` that replace those of `accel.family.detect`. Whoever is not here
(Sana, HiDream, Allegro, HunyuanDiT, CogView3+, ...) has batched guidance, the
unconditional half first. Read from diffusers' pipelines; what was run is in docs/families.md.
"""

from __future__ import annotations

from typing import Any

from accel.family import HIDDEN, Stack

TWO_CALLS: dict[str, Any] = {"guidance": "sequential"}
TOLD: dict[str, dict[str, Any]] = {
    "Flux2Transformer2DModel": TWO_CALLS,
    "ChromaTransformer2DModel": TWO_CALLS,
    "HunyuanVideo15Transformer3DModel": TWO_CALLS,
    "HunyuanImageTransformer2DModel": TWO_CALLS,
    "Kandinsky5Transformer3DModel": TWO_CALLS,
    "CogView4Transformer2DModel": {**TWO_CALLS, "text": "first"},
    "AuraFlowTransformer2DModel": {"text": "first"},
    "Lumina2Transformer2DModel": TWO_CALLS,
    "SkyReelsV2Transformer3DModel": TWO_CALLS,
    "WanVACETransformer3DModel": TWO_CALLS,
    "WanAnimateTransformer3DModel": TWO_CALLS,
    "ChronoEditTransformer3DModel": TWO_CALLS,
    "CosmosTransformer3DModel": TWO_CALLS,
    "HeliosTransformer3DModel": TWO_CALLS,
    "Krea2Transformer2DModel": TWO_CALLS,
    "LongCatImageTransformer2DModel": TWO_CALLS,
    "OvisImageTransformer2DModel": TWO_CALLS,
    "ZImageTransformer2DModel": {"cond_first": True},
    "LTX2VideoTransformer3DModel": {
        "stacks": (Stack("transformer_blocks", (HIDDEN, "audio_hidden_states")),),
        "predictions": 2,
    },
}
