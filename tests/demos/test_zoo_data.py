"""Captions, motions and prompt files of the zoo; the pictures are replaced by drawn shapes."""

import pytest
import torch

from demos.zoo import data, evaluate, prompts, text


def shapes(count: int) -> torch.Tensor:
    """Stand-ins for the emoji: lop-sided white shapes, premultiplied RGBA, (count, 4, 64, 64)."""
    pictures = torch.zeros(count, 4, 64, 64)
    pictures[:, :, 8:56, 20:36] = 1
    pictures[:, :, 8:24, 20:56] = 1
    return pictures


def test_captions_parse_back_and_hold_known_words_only() -> None:
    for name, colour, motion in data.combinations(video=True, held=True):
        caption = data.caption(name, colour, motion)
        assert data.parse(caption) == (name, colour, motion)
        assert set(caption.split()) <= set(data.VOCABULARY)


def test_held_out_combinations_are_disjoint_and_about_an_eighth() -> None:
    for video in (True, False):
        seen = set(data.combinations(video, held=False))
        unseen = set(data.combinations(video, held=True))
        assert not seen & unseen
        assert 0.08 < len(unseen) / len(seen | unseen) < 0.17


@pytest.mark.parametrize("video", [True, False])
def test_committed_prompt_files_are_those_of_the_script(video) -> None:
    from accel import model_zoo

    suffix = "" if video else "_image"
    written = prompts.lines(video)
    for part, lines in written.items():
        file = model_zoo.folder() / f"prompts_{part}{suffix}.txt"
        assert file.read_text().splitlines() == lines
    assert not set(written["train"]) & {*written["heldout"], *written["final"]}
    assert not set(written["heldout"]) & set(written["final"])
    assert len(written["heldout"]) + len(written["final"]) >= 64
    assert len(written["final"]) >= 32


def test_tokenizers_give_the_tables_that_training_uses() -> None:
    caption = data.caption("apple", "blue", "spin")
    tokenizer = text.t5_tokenizer(16)
    assert tokenizer(caption, padding="max_length").input_ids == text.encode(caption, 16)
    clip = text.clip_tokenizer(16)
    for name, colour, _ in data.combinations(video=False, held=True):
        ids = clip(data.caption(name, colour)).input_ids
        assert len(ids) <= 16
        assert clip.decode(ids, skip_special_tokens=True).strip() == data.caption(name, colour)


@pytest.mark.parametrize("motion", data.MOTION_NAMES)
def test_every_motion_is_recognised_by_its_formula(motion) -> None:
    generator = torch.Generator().manual_seed(0)
    count = 16
    colours = torch.tensor([data.COLOUR_NAMES.index("blue")] * count)
    motions = torch.tensor([data.MOTION_NAMES.index(motion)] * count)
    clips = data.render_videos(
        shapes(count), torch.arange(count), colours, motions, data.even_times(9), 32, generator
    )
    found = [evaluate.motion_of(clip) for clip in (clips.transpose(1, 2) + 1) / 2]
    assert found.count(motion) >= 0.9 * count, found


def test_still_clips_show_no_motion() -> None:
    generator = torch.Generator().manual_seed(0)
    image = data.render_images(shapes(1), torch.tensor([0]), torch.tensor([4]), 32, generator)
    assert evaluate.motion_of(((image + 1) / 2).expand(9, -1, -1, -1)) == "none"


@pytest.mark.parametrize("colour", data.COLOUR_NAMES)
def test_every_ground_is_recognised(colour) -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.tensor([data.COLOUR_NAMES.index(colour)])
    image = data.render_images(shapes(1), torch.tensor([0]), index, 64, generator)
    assert evaluate.colour_of((image + 1) / 2) == colour


def test_rendering_is_deterministic() -> None:
    def once() -> torch.Tensor:
        generator = torch.Generator().manual_seed(4)
        picked = torch.tensor([0, 1])
        times = data.even_times(5)
        return data.render_videos(shapes(2), picked, picked, picked, times, 32, generator)

    assert torch.equal(once(), once())
    assert once().shape == (2, 3, 5, 32, 32)
    assert once().abs().max() <= 1


def test_blur_lowers_contrast() -> None:
    clips = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(clips.flatten(0, 1), 3, 1, 1).unflatten(0, (2, 3))
    assert (evaluate.contrast(blurred) < 0.5 * evaluate.contrast(clips)).all()
    assert evaluate.contrast(torch.ones(2, 1, 3, 8, 8)).tolist() == [0, 0]
