"""The demo without a browser: the engine, the forms and who may reach the server."""

import dataclasses
import json
import threading
from types import SimpleNamespace

import pytest
from tiny_pipelines import TINY

import accel
from accel import demo_forms, demo_server, demo_view, registry
from accel.demo_engine import Engine, Outcome, Progress, Wish
from accel.generate import Job
from accel.recipe import Recipe, Validity

TINY_CALL = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    TINY["wan21"]().pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine()


def wish(model: str, *methods, **changes) -> Wish:
    job = Job(model=model, prompt="a cat", steps=8, extra=TINY_CALL)
    return Wish(**{"job": job, "recipe": Recipe.of(methods), **changes})


def last(run) -> Outcome:
    *_, outcome = run
    assert isinstance(outcome, Outcome)
    return outcome


def test_a_run_tells_every_step_and_measures_the_pair(engine, model) -> None:
    seen = list(engine.start(wish(model, accel.PlainCycle(interval=2))))
    outcome = seen.pop()
    steps = [at.step for at in seen if isinstance(at, Progress) and at.stage == "accelerated"]
    assert steps == list(range(9))
    assert [len(at.report.rows) for at in seen if at.stage == "accelerated"][1:] == [
        2 * step for step in range(1, 9)
    ]
    assert outcome.report.hit_rate == 0.5
    assert outcome.speedup == outcome.untouched_seconds / outcome.seconds
    assert 0 < outcome.ssim <= 1 and outcome.psnr > 5
    assert outcome.fast.shape == outcome.untouched.shape
    page = demo_view.figures(outcome)
    assert "speed-up" in page and "PSNR" in page and "50%" in page
    assert "Nothing was skipped" not in page


def test_stopping_ends_at_the_next_step_and_leaves_nothing_behind(engine, model) -> None:
    wanted = last(engine.start(wish(model, accel.PlainCycle(interval=2)))).fast
    run = engine.start(wish(model, accel.PlainCycle(interval=2)))
    for at in run:
        if at.stage == "accelerated" and at.step == 3:
            break  # as when a browser's tab is closed: the generator is closed
    run.stop()
    assert run.outcome is None
    assert run.last.stage == "accelerated" and run.last.step < 8
    pipe = engine._loaded[0]
    with pytest.raises(accel.AccelError, match="is not patched"):
        accel.stats(pipe)
    assert not [thread for thread in threading.enumerate() if thread is run._thread]
    again = last(engine.start(wish(model, accel.PlainCycle(interval=2)))).fast
    assert (again == wanted).all()


def test_a_model_is_warmed_up_once_even_if_the_first_run_was_stopped(model) -> None:
    engine = Engine()
    first = engine.start(wish(model, accel.PlainCycle(interval=2)))
    next(iter(first))  # loading
    first.stop()

    def stages() -> set[str]:
        run = engine.start(wish(model, accel.PlainCycle(interval=2), compare=False))
        return {each.stage for each in run if isinstance(each, Progress)}

    assert "warming up" in stages()
    assert "warming up" not in stages()


def test_a_recipe_that_does_not_hold_gives_way(engine, model) -> None:
    held = Recipe.of((accel.PlainCycle(interval=4),), valid_for=Validity(steps=(50, 50)))
    outcome = last(engine.start(wish(model, recipe=held, compare=False)))
    assert outcome.report.methods == ("EasyCache",)


def test_stop_after_the_end_says_that_nothing_runs(engine, model) -> None:
    pytest.importorskip("gradio")
    from accel.demo_page import Page

    page, visitor = Page(engine, [model], TINY_CALL), SimpleNamespace(session_hash="one")
    page.build()
    recipe = json.dumps({"entries": [{"name": "EasyCache"}]})
    seen = list(page._generate(model, "a cat", 0, 8, False, recipe, [], visitor))
    assert "Done" in seen[-1][page.status]
    assert "Nothing is running" in page._stop(visitor)


def test_without_methods_the_result_is_the_untouched_one(engine, model) -> None:
    plain = last(engine.start(wish(model)))
    assert plain.untouched is None and not plain.report.rows
    compared = last(engine.start(wish(model, accel.PlainCycle(interval=1))))
    assert (compared.untouched == plain.fast).all()
    assert compared.psnr == float("inf")
    assert "equal" in demo_view.figures(compared)
    assert "Nothing was skipped" in demo_view.figures(compared)


def test_a_method_that_must_measure_first_says_so(engine, model) -> None:
    seen = list(engine.start(wish(model, accel.MagCache(retention=0.0))))
    assert any(at.stage == "measuring the model once" for at in seen[:-1])
    assert seen[-1].recipe.entries[0].settings["ratios"]


def test_errors_of_the_work_reach_the_visitor(engine, model) -> None:
    with pytest.raises(accel.AccelError, match="needs a U-Net"):
        list(engine.start(wish(model, accel.DeepCache())))
    with pytest.raises(accel.AccelError, match="WanPipeline takes no colour"):
        job = Job(model=model, prompt="a cat", steps=8, extra={"colour": 1})
        list(engine.start(wish(model, job=job)))
    assert last(engine.start(wish(model))).seconds > 0


def test_the_heat_map_has_a_cell_for_every_step(engine, model) -> None:
    rows = last(engine.start(wish(model, accel.PlainCycle(interval=4)))).report.rows
    drawn = demo_view.heat_map(rows, 8)
    assert drawn.count("<title>") == 16
    assert drawn.count("computed, 100% of the work") == 4
    assert drawn.count("reused, 0% of the work") == 12
    half_way = demo_view.heat_map(rows[:4], 8)
    assert half_way.count("<title>") == 4 and half_way.count('fill="none"') == 12


@pytest.mark.parametrize("name", [place.split(":")[1] for place in registry.METHODS.values()])
def test_the_panel_fits_every_registered_method(name) -> None:
    fields = demo_forms.fields(name)
    entry = demo_forms.filled(name, [field.default for field in fields])
    assert entry == {"name": name, "settings": {}}
    assert len(fields) == len(dataclasses.fields(registry.method(name)))
    for recipe in demo_forms.trials(name).values():
        assert demo_forms.read(demo_forms.write(recipe)).methods == recipe.methods


def test_a_filled_form_becomes_a_recipe() -> None:
    fields = demo_forms.fields("PlainCycle")
    values = {field.name: field.default for field in fields} | {"interval": 4.0, "reuse": "Taylor"}
    entry = demo_forms.filled("PlainCycle", list(values.values()))
    recipe = accel.Recipe.read({"entries": [entry]})
    assert recipe.methods == (accel.PlainCycle(interval=4, reuse=accel.Taylor()),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "must be a JSON object"),
        ('{"entries": [{"name": "NoCache"}]}', "unknown method"),
        ('{"entries": [], "colour": 1}', "colour"),
    ],
)
def test_wrong_recipes_are_named(text, message) -> None:
    with pytest.raises(accel.AccelError, match=message):
        demo_forms.read(text)


def test_the_best_known_recipe_is_the_first_preset(model) -> None:
    for name in ("zoo:emoji-video", "zoo:emoji-image", "zoo:emoji-unet"):
        first = next(iter(demo_forms.presets(name).values()))
        file = demo_forms.model_zoo.path(name.removeprefix("zoo:")) / "accel_recipe.json"
        known = accel.Recipe.load(file)
        for recipe in [first, *demo_forms.presets(name).values()][: 1 + len(known.front)]:
            assert recipe.valid_for == known.valid_for, "outside of it an online method runs"
        assert first.entries == known.entries
    first = next(iter(demo_forms.presets(model).values()))
    assert first.methods == (accel.EasyCache(),)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.7", "::", "example.org"])
def test_others_must_log_in(host) -> None:
    with pytest.raises(accel.AccelError, match="can be reached by others: give --auth"):
        demo_server.serve(demo_server.Options(host=host))
    demo_server.check_host(demo_server.Options(host=host, auth=(("me", "secret"),)))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_this_machine_needs_no_password(host) -> None:
    demo_server.check_host(demo_server.Options(host=host))


def test_passwords_are_read_from_a_file(tmp_path) -> None:
    file = tmp_path / "auth"
    file.write_text("me:se:cret\n\nyou:other\n")
    assert demo_server.read_auth(file) == (("me", "se:cret"), ("you", "other"))
    for wrong in ("", "me\n", ":x\n", "me:\n"):
        file.write_text(wrong)
        with pytest.raises(accel.AccelError, match="every line must be user:password"):
            demo_server.read_auth(file)
    with pytest.raises(accel.AccelError, match="cannot be read"):
        demo_server.read_auth(tmp_path / "none")


def test_the_server_checks_what_it_is_asked(engine, model) -> None:
    pytest.importorskip("gradio")
    from accel.demo_page import MAX_PROMPT, MAX_STEPS, Page

    page = Page(engine, [model], TINY_CALL)
    asked = (model, "a cat", 0, 8, True, json.dumps({"entries": []}))
    assert page._wish(*asked).recipe == Recipe(entries=())
    for place, value, message in (
        (0, "/etc/passwd", "unknown model"),
        (1, "x" * (MAX_PROMPT + 1), "characters"),
        (1, "  ", "characters"),
        (3, MAX_STEPS + 1, "steps=101"),
        (2, None, "seed=None: accepted"),
        (2, 2**70, "accepted are 0 to"),
        (3, None, "steps=None"),
        (5, "{", "not JSON"),
        (5, '{"entries": [{"name": "AGD", "settings": {"adapters": "/etc"}}]}', "in the demo"),
    ):
        wrong = [*asked]
        wrong[place] = value
        with pytest.raises(accel.AccelError, match=message):
            page._wish(*wrong)
