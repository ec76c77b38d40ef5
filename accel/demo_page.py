"""The demo's page (Gradio): controls, live view, comparison, history."""

from __future__ import annotations

import collections
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from accel import demo_forms as forms
from accel import demo_view as view
from accel import media, model_zoo
from accel.demo_engine import Engine, Outcome, Progress, Run, Wish
from accel.demo_stream import Streams
from accel.demo_stream_tab import StreamTab
from accel.demo_style import EMPTY, HEADER
from accel.generate import Job
from accel.method import AccelError
from accel.recipe import FILE_NAME, Recipe

MAX_STEPS, MAX_PROMPT, HISTORY, KEPT_FILES = 100, 1000, 12, 50
REDRAW = 0.25
"""Least seconds between two drawings: they take time from the run that is being measured."""


class Page:
    """The components and what they do."""

    def __init__(self, engine: Engine, models: Sequence[str], extra: dict[str, Any]) -> None:
        """`models` are offered before the zoo's; `extra` are more arguments of each call."""
        self._engine, self._extra = engine, extra
        self._models = [*models, *(f"{forms.ZOO}{name}" for name in model_zoo.names())]
        self._runs: dict[str | None, Run] = {}
        self._stream = StreamTab(Streams())
        self._folder = tempfile.TemporaryDirectory(prefix="accel-demo-")
        self._files: collections.deque[Path] = collections.deque()

    def build(self) -> gr.Blocks:
        """Lay the page out and connect it."""
        with gr.Blocks(
            title="accel", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)
        ) as page:
            gr.HTML(HEADER)
            with gr.Tab("Generate"), gr.Row():
                with gr.Column(scale=4, min_width=340):
                    self._build_controls()
                with gr.Column(scale=7, min_width=460):
                    self._build_results()
            with gr.Tab("Stream"):
                self._stream.build()
            self._connect(page)
        return page  # type: ignore[no-any-return]

    # --- layout ------------------------------------------------------------------------------

    def _build_controls(self) -> None:
        first = self._models[0]
        presets = forms.presets(first)
        self.model = gr.Dropdown(self._models, value=first, label="Model")
        self.prompt = gr.Textbox(forms.prompts(first)[0], label="Prompt", lines=2)
        self.random = gr.Button("Another prompt", size="sm", variant="secondary")
        with gr.Row():
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=90)
            self.steps = gr.Slider(2, MAX_STEPS, value=50, step=1, label="Steps", min_width=180)
        self.preset = gr.Dropdown(list(presets), value=next(iter(presets)), label="Preset")
        self.compare = gr.Checkbox(True, label="Compare with the untouched pipeline")
        with gr.Row():
            self.go = gr.Button("Generate", variant="primary", elem_id="generate")
            self.halt = gr.Button("Stop", variant="stop", elem_id="stop")
        with gr.Accordion("Choose a method", open=False):
            self._build_panel()
        with gr.Accordion("Recipe: what the next run uses", open=False):
            text = forms.write(next(iter(presets.values())))
            self.recipe = gr.Code(
                text, language="json", lines=8, max_lines=16, show_label=False, elem_id="recipe"
            )
            self.verdict = gr.Markdown()
            with gr.Row():
                self.load = gr.UploadButton(
                    "Load", file_types=[".json"], type="binary", size="sm", elem_id="load"
                )
                self.save = gr.DownloadButton(
                    "Save", value=self._saved(text), size="sm", elem_id="save"
                )

    def _build_panel(self) -> None:
        """A form for whichever method is chosen; every change writes the recipe."""
        self.method = gr.Dropdown(
            forms.methods(guidance=False), value=None, label="Method", elem_id="method"
        )
        self.trial = gr.Dropdown([], label="Settings to try, mild to strong", visible=False)
        self.guidance = gr.Dropdown(
            ["none", *forms.methods(guidance=True)], value="none", label="Guidance policy beside it"
        )

        @gr.render(inputs=[self.method, self.guidance])  # type: ignore[untyped-decorator]
        def form(method: str | None, guidance: str) -> None:
            names = [name for name in (method, guidance) if name and name != "none"]
            inputs = [[_component(name, item) for item in forms.fields(name)] for name in names]

            def entered(*values: Any) -> str:
                left = iter(values)
                entries = [
                    forms.filled(name, [next(left) for _ in group])
                    for name, group in zip(names, inputs, strict=True)
                ]
                return _told(lambda: forms.write(Recipe.read({"entries": entries})))

            flat = [each for group in inputs for each in group]
            for each in flat:
                each.change(entered, flat, self.recipe, queue=False, show_progress="hidden")

    def _build_results(self) -> None:
        self.status = gr.HTML(view.message("Ready."), elem_id="status")
        self.slider = gr.ImageSlider(
            label="untouched | accelerated", elem_id="slider", max_height=view.SHOWN, visible=False
        )
        self.picture = gr.Image(label="result", elem_id="picture", height=420, visible=False)
        self.video = gr.Video(
            label="result", elem_id="video", height=340, autoplay=True, loop=True, visible=False
        )
        self.figures = gr.HTML(elem_id="figures")
        self.heat = gr.HTML(EMPTY, elem_id="heat")
        gr.HTML('<div class="accel-status">History: click to look again</div>')
        self.gallery = gr.Gallery(
            show_label=False,
            columns=6,
            height=180,
            elem_id="history",
            allow_preview=False,
            interactive=False,
            object_fit="contain",
        )
        self.history = gr.State([])

    # --- behaviour ---------------------------------------------------------------------------

    def _connect(self, page: gr.Blocks) -> None:
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
        self.model.change(
            self._model_changed, self.model, [self.prompt, self.preset, self.recipe], **quick
        )
        self.random.click(lambda m: random.choice(forms.prompts(m)), self.model, self.prompt)
        self.preset.input(
            lambda model, name: forms.write(forms.presets(model)[name]),
            [self.model, self.preset],
            self.recipe,
            **quick,
        )
        for part in (self.method, self.guidance):
            part.input(
                _method_chosen, [self.method, self.guidance], [self.trial, self.recipe], **quick
            )
        self.trial.input(
            lambda method, words: forms.write(forms.trials(method)[words]),
            [self.method, self.trial],
            self.recipe,
            **quick,
        )
        self.recipe.change(self._checked, self.recipe, [self.verdict, self.save], **quick)
        self.load.upload(_loaded, self.load, self.recipe, **quick)
        made = self.go.click(
            self._generate,
            [
                *(self.model, self.prompt, self.seed, self.steps),
                *(self.compare, self.recipe, self.history),
            ],
            [*self._shown_in(), self.status, self.history, self.gallery, self.recipe],
            show_progress="hidden",
            show_progress_on=[self.status],
            api_name="generate",
            concurrency_id="device",
        )
        self.halt.click(self._stop, None, self.status, cancels=[made], **quick)
        self.gallery.select(self._look_again, self.history, self._shown_in(), **quick)
        page.unload(self._left)

    def _shown_in(self) -> list[Any]:
        return [self.slider, self.picture, self.video, self.figures, self.heat]

    def _generate(
        self,
        model: str,
        prompt: str,
        seed: int | None,
        steps: int | None,
        compare: bool,
        recipe: str,
        history: list[Outcome],
        request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:
        visitor, run = request.session_hash, None
        try:
            wish = self._wish(model, prompt, seed, steps, compare, recipe)
            run = self._runs[visitor] = self._engine.start(wish)
            drawn = 0.0
            for news in run:
                if isinstance(news, Outcome):
                    history = [news, *history][:HISTORY]
                    yield self._done(news, history)
                elif time.monotonic() - drawn > REDRAW:
                    drawn = time.monotonic()
                    yield self._going_on(news)
        except AccelError as error:
            raise gr.Error(str(error), duration=None) from error
        finally:
            if run is not None and self._runs.get(visitor) is run:
                del self._runs[visitor]
        if run.outcome is None:
            yield {self.status: _stopped(run)}

    def _wish(
        self,
        model: str,
        prompt: str,
        seed: int | None,
        steps: int | None,
        compare: bool,
        recipe: str,
    ) -> Wish:
        """Checked here too: others than our page can call the server."""
        if model not in self._models:
            raise AccelError(f"unknown model {model!r}; accepted: {', '.join(self._models)}")
        if steps is None or not 2 <= steps <= MAX_STEPS:
            raise AccelError(f"steps={steps}: accepted are 2 to {MAX_STEPS}")
        if seed is None or not 0 <= seed < 2**63:
            raise AccelError(f"seed={seed}: accepted are 0 to 2**63 - 1")
        if not prompt.strip() or len(prompt) > MAX_PROMPT:
            raise AccelError(f"the prompt must have 1 to {MAX_PROMPT} characters")
        job = Job(
            model=model, prompt=prompt, seed=int(seed), steps=int(steps), extra=dict(self._extra)
        )
        wanted = forms.read(recipe)
        forms.refuse_places(wanted)
        return Wish(job, wanted, compare)

    def _going_on(self, at: Progress) -> dict[Any, Any]:
        shown: dict[Any, Any] = {self.status: view.progress(at)}
        if at.report is not None:
            shown[self.heat] = view.heat_map(at.report.rows, at.total)
        return shown

    def _done(self, outcome: Outcome, history: list[Outcome]) -> dict[Any, Any]:
        text = "Done." if outcome.speedup is None else f"Done: {outcome.speedup:.2f}× faster."
        return {
            **dict(zip(self._shown_in(), self._shown(outcome), strict=True)),
            self.status: view.message(text),
            self.history: history,
            self.gallery: [(view.thumbnail(it), view.caption(it)) for it in history],
            self.recipe: forms.write(outcome.recipe),
        }

    def _shown(self, outcome: Outcome) -> list[Any]:
        """Values of `_shown_in`."""
        video = outcome.fast.ndim == 4
        pair = outcome.untouched is not None
        slider, picture, film = None, None, None
        if video:
            film = str(self._film(outcome))
        elif outcome.untouched is not None:
            slider = (view.enlarge(outcome.untouched), view.enlarge(outcome.fast))
        else:
            picture = view.enlarge(outcome.fast)
        label = "untouched (left) | accelerated (right)" if pair else "result"
        heat = view.heat_map(outcome.report.rows, outcome.total) if outcome.report.rows else EMPTY
        return [
            gr.ImageSlider(slider, visible=slider is not None),
            gr.Image(picture, visible=picture is not None),
            gr.Video(film, visible=video, label=label),
            view.figures(outcome),
            heat,
        ]

    def _look_again(self, history: list[Outcome], event: gr.SelectData) -> list[Any]:
        return self._shown(history[event.index])

    def _stop(self, request: gr.Request) -> str:
        run = self._runs.pop(request.session_hash, None)
        if run is None:
            return view.message("Nothing is running.")
        run.stop()
        return _stopped(run)

    def _left(self, request: gr.Request) -> None:
        """The visitor closed the page."""
        self._stream.left(request.session_hash)
        run = self._runs.pop(request.session_hash, None)
        if run is not None:
            run.stop()

    def _model_changed(self, model: str) -> tuple[Any, Any, str]:
        presets = forms.presets(model)
        first = next(iter(presets))
        preset = gr.Dropdown(list(presets), value=first)
        return forms.prompts(model)[0], preset, forms.write(presets[first])

    def _checked(self, text: str) -> tuple[str, Any]:
        """Say what is wrong with an edited recipe; one that is right can be saved."""
        try:
            forms.read(text)
        except AccelError as error:
            return f"⚠️ {error}", gr.DownloadButton(interactive=False)
        return "", gr.DownloadButton(value=self._saved(text), interactive=True)

    # --- files -------------------------------------------------------------------------------

    def _saved(self, text: str) -> str:
        path = self._path(FILE_NAME)
        path.write_text(text + "\n", encoding="utf-8")
        return str(path)

    def _film(self, outcome: Outcome) -> Path:
        about = {"prompt": outcome.wish.job.prompt, "seed": outcome.wish.job.seed}
        about["recipe"] = outcome.recipe.model_dump(mode="json")
        frames = view.beside_each_other(outcome)
        return media.save_video(self._path("result.mp4"), frames, outcome.fps, about)

    def _path(self, name: str) -> Path:
        """A new file; the oldest ones go, long after Gradio took its copy."""
        while len(self._files) >= KEPT_FILES:
            old = self._files.popleft()
            shutil.rmtree(old.parent, ignore_errors=True)
        path = Path(tempfile.mkdtemp(dir=self._folder.name)) / name
        self._files.append(path)
        return path


def _component(method: str, item: forms.Field) -> Any:
    label = f"{method} · {item.name}"
    if item.kind == "bool":
        return gr.Checkbox(item.default, label=label, interactive=True)
    if item.kind == "forecast":
        return gr.Dropdown(forms.forecasts(), value=item.default, label=label, interactive=True)
    if item.kind == "json":
        return gr.Textbox(item.default, label=label, interactive=True)
    precision = 0 if item.kind == "int" else None
    return gr.Number(item.default, label=label, precision=precision, step=0.01, interactive=True)


def _method_chosen(method: str | None, guidance: str) -> tuple[Any, str]:
    names = [name for name in (method, guidance) if name and name != "none"]
    recipe = Recipe.read({"entries": [{"name": name} for name in names]})
    tries = list(forms.trials(method)) if method else []
    return gr.Dropdown(tries, value=None, visible=bool(tries)), forms.write(recipe)


def _loaded(content: bytes) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise gr.Error(f"recipe: not UTF-8 ({error})") from error
    return _told(lambda: forms.write(forms.read(text)))


def _told(make: Any) -> str:
    """What `make` gives; what it refuses is shown to the visitor."""
    try:
        return str(make())
    except AccelError as error:
        raise gr.Error(str(error)) from error


def _stopped(run: Run) -> str:
    at = run.last
    where = f"after step {at.step} of {at.total} ({at.stage})" if at.total else f"while {at.stage}"
    return view.message(f"Stopped {where}; nothing is kept in memory for it.")
