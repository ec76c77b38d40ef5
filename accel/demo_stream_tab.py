"""The demo's second tab (Gradio): a stream of frames, redrawn while one watches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from accel import demo_forms as forms
from accel import demo_view as view
from accel.demo_stream import MODEL, Run, Shown, Streams
from accel.frame_sources import SUFFIXES
from accel.method import AccelError

REDRAW = 0.1
"""Least seconds between two drawings."""
STOPPED = "Stopped the stream."
LONGEST = 300
"""Characters of a prompt; the text encoder reads fewer."""


class StreamTab:
    """The components of the tab and what they do."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._runs: dict[str | None, Run] = {}
        self._loading: set[str | None] = set()
        """Visitors whose stream is about to begin, unless they leave."""

    def build(self) -> None:
        """Lay the tab out and connect it."""
        with gr.Row():
            with gr.Column(scale=4, min_width=340):
                self._build_controls()
            with gr.Column(scale=7, min_width=460):
                self.status = gr.HTML(view.message("Ready to stream."), elem_id="stream-status")
                with gr.Row():
                    shown: dict[str, Any] = {"height": 340, "interactive": False, "format": "png"}
                    self.entered = gr.Image(label="what enters", elem_id="stream-in", **shown)
                    self.drawn = gr.Image(label="redrawn", elem_id="stream-out", **shown)
                self.figures = gr.HTML(elem_id="stream-figures")
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
        made = self.go.click(
            self._watch,
            [self.prompt, self.files, self.similarity],
            [self.entered, self.drawn, self.status, self.figures],
            show_progress="hidden",
            api_name="stream",
            concurrency_id="device",
        )
        self.prompt.submit(self._reprompt, self.prompt, None, **quick)
        self.change.click(self._reprompt, self.prompt, None, **quick)
        self.halt.click(self._stop, None, self.status, cancels=[made], **quick)

    def _build_controls(self) -> None:
        first = forms.prompts(forms.ZOO + MODEL)[0]
        self.prompt = gr.Textbox(first, label="What to draw", elem_id="stream-prompt")
        self.change = gr.Button("Use these words from now on", size="sm", elem_id="stream-change")
        self.files = gr.File(
            label="Video or pictures; none: a camera",
            file_count="multiple",
            file_types=["video", *sorted(SUFFIXES)],
            height=150,
            elem_id="stream-files",
        )
        self.similarity = gr.Slider(
            0.9, 1, value=0.98, step=0.005, label="Likeness of frames left out"
        )
        with gr.Row():
            self.go = gr.Button("Stream", variant="primary", elem_id="stream-go")
            self.halt = gr.Button("Stop", variant="stop", elem_id="stream-stop")

    def left(self, visitor: str | None) -> None:
        """End the stream of a visitor, if there is one or about to be one."""
        self._loading.discard(visitor)
        run = self._runs.pop(visitor, None)
        if run is not None:
            run.stop()

    def _watch(
        self, prompt: str, files: list[str] | None, similarity: float, request: gr.Request
    ) -> Iterator[tuple[Any, Any, str, str]]:
        visitor = request.session_hash
        yield gr.skip(), gr.skip(), view.message("loading the model"), ""
        self.left(visitor)
        self._loading.add(visitor)
        run = None
        try:
            paths = [Path(file) for file in files or []]
            run = self._streams.start(_short(prompt), paths, similarity)
            self._runs[visitor] = run
            if visitor not in self._loading:
                self.left(visitor)
            self._loading.discard(visitor)
            drawn, last = 0.0, None
            for last in run:
                if time.monotonic() - drawn > REDRAW:
                    drawn = time.monotonic()
                    yield (
                        *_looks(last),
                        view.message(f"Streaming: frame {last.taken}"),
                        _tiles(last),
                    )
        except AccelError as error:
            raise gr.Error(str(error), duration=None) from error
        finally:
            self._loading.discard(visitor)
            if run is not None and self._runs.get(visitor) is run:
                del self._runs[visitor]
        if run.stopped:
            yield gr.skip(), gr.skip(), view.message(STOPPED), gr.skip()
        elif last is not None:
            yield *_looks(last), view.message(f"Ended after {last.taken} frames."), _tiles(last)

    def _reprompt(self, prompt: str, request: gr.Request) -> None:
        run = self._runs.get(request.session_hash)
        if run is None:
            return
        try:
            run.prompt(_short(prompt))
        except AccelError as error:
            raise gr.Error(str(error)) from error

    def _stop(self, request: gr.Request) -> str:
        """The stream says itself that it was stopped, too: after all that it still had to show."""
        visitor = request.session_hash
        stopped = visitor in self._loading or visitor in self._runs
        self.left(visitor)
        return view.message(STOPPED if stopped else "Nothing is streaming.")


def _short(prompt: str) -> str:
    if len(prompt) > LONGEST:
        raise AccelError(f"the prompt must have at most {LONGEST} characters")
    return prompt


def _looks(shown: Shown) -> tuple[Any, Any]:
    return view.enlarge(shown.entered), view.enlarge(shown.picture)


def _tiles(shown: Shown) -> str:
    return view.cards(
        [
            ("frames a second", f"{shown.rate:.1f}", "drawn and repeated"),
            ("left out", f"{shown.share_left_out:.0%}", "too alike: the last picture again"),
            ("frames", f"{shown.taken}", "of this stream"),
        ]
    )
