"""How the demo looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr


def theme() -> Any:
    """Indigo, with fonts that no browser has to fetch."""
    fonts: Sequence[str] = ("system-ui", "sans-serif")
    return gr.themes.Soft(
        primary_hue="indigo", neutral_hue="slate", font=fonts, font_mono=("monospace",)
    )


HEADER = """
<div class="accel-header"><b>accel</b> diffusers pipelines, faster: what is computed,
what is reused, and what it costs in quality, measured as you watch</div>
"""
EMPTY = (
    '<div class="accel-heat accel-empty">Each step of the accelerated run appears here: computed, '
    "reused or forecast.</div>"
)
CSS = """
.accel-header {font-size: 1rem; opacity: .85; padding: .2rem 0}
.accel-header b {font-size: 1.5rem; margin-right: .6rem; color: #4f46e5}
.accel-status {font-size: .95rem; padding: .3rem 0; min-height: 2.4rem}
.accel-bar {height: 6px; border-radius: 3px; margin-top: .4rem; background: #8883}
.accel-bar i {display: block; height: 100%; border-radius: 3px; background: #4f46e5}
#history .grid-container {grid-template-columns: repeat(6, 1fr) !important}
#history .grid-wrap {min-height: 0} #history .thumbnail-item {max-width: 140px}
.accel-heat {padding: .4rem 0}
.accel-scroll {overflow-x: auto}
.accel-empty {opacity: .6; font-size: .9rem}
.accel-legend {display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .8rem; opacity: .85}
.accel-legend i {display: inline-block; width: 11px; height: 11px; border-radius: 3px;
  margin-right: .35rem; vertical-align: -1px}
.accel-tiles {display: grid; gap: .5rem;
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr))}
.accel-tile {border: 1px solid #8883; border-radius: 8px; padding: .5rem .7rem; display: flex;
  flex-direction: column}
.accel-tile small {opacity: .7} .accel-tile b {font-size: 1.3rem; line-height: 1.5rem}
.accel-tile span {font-size: .72rem; opacity: .6}
.accel-warning {color: #b45309; margin-top: .5rem}
#video video, #stream-in img, #stream-out img {image-rendering: pixelated}
"""
