"""Captions, motions and prompt files of the zoo; the pictures are replaced by drawn shapes."""

from unittest import mock

import pytest
import torch

from demos.zoo import data, evaluate, evaluate_pairs, images, prompts, text


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


def test_captions_of_two_objects_parse_back() -> None:
    generator = torch.Generator().manual_seed(0)
    for row in images.pairs(200, generator):
        words = images.pair_words(row)
        assert data.parse_pair(data.pair_caption(*words)) == words
        assert words[0] != words[2] and not data.held_out(*words)
    assert data.parse_pair(data.caption("apple", "blue")) is None
    for caption in prompts.pair_lines():
        assert set(caption.split()) <= set(data.VOCABULARY)
        assert data.held_out(*(data.parse_pair(caption) or ()))


@pytest.mark.parametrize("relation", data.RELATIONS)
def test_two_objects_lie_as_the_caption_says(relation) -> None:
    """Seen by the parts that the judge looks at: the first is white, the second black."""
    pictures = shapes(2)
    pictures[1, :3] = 0
    index = torch.tensor([list(data.RELATIONS).index(relation)] * 8)
    gray = torch.tensor([data.COLOUR_NAMES.index("gray")] * 8)
    generator = torch.Generator().manual_seed(0)
    firsts, seconds = torch.zeros(8, dtype=torch.long), torch.ones(8, dtype=torch.long)
    drawn = data.render_pairs(pictures, firsts, index, seconds, gray, 64, generator)
    for picture in (drawn + 1) / 2:
        assert evaluate.colour_of(picture[None]) == "gray"
        first, second = evaluate_pairs.parts(picture, relation)
        assert (first > 0.9).float().mean() > 4 * (first < 0.1).float().mean()
        assert (second < 0.1).float().mean() > 4 * (second > 0.9).float().mean()


def test_pair_scores_tell_places_apart() -> None:
    """A judge that names white parts apple and black ones banana."""

    class Judge:
        names = ("apple", "banana")

        def scores(self, features: torch.Tensor) -> torch.Tensor:
            return torch.stack((features.mean(1), -features.mean(1)), 1)

    halves = torch.cat((torch.ones(3, 64, 32), -torch.ones(3, 64, 32)), 2)[None]
    captions = ["apple left of a banana on a gray background"]
    with mock.patch.object(evaluate_pairs.metrics, "lite0_features", lambda x: x.flatten(1)):
        right = evaluate_pairs.pair_scores(halves, captions, Judge())
        wrong = evaluate_pairs.pair_scores(halves.flip(3), captions, Judge())
    assert (right["first"], right["second"], right["both"], right["swapped"]) == (1, 1, 1, 0)
    assert (wrong["first"], wrong["second"], wrong["both"], wrong["swapped"]) == (0, 0, 0, 1)


def test_held_out_combinations_are_disjoint_and_about_an_eighth() -> None:
    for video in (True, False):
        seen = set(data.combinations(video, held=False))
        unseen = set(data.combinations(video, held=True))
        assert not seen & unseen
        assert 0.08 < len(unseen) / len(seen | unseen) < 0.17


def test_committed_prompt_files_are_those_of_the_script() -> None:
    from accel import model_zoo

    for name, lines in prompts.files().items():
        assert (model_zoo.folder() / name).read_text().splitlines() == lines


@pytest.mark.parametrize("names", [data.FIRST_NAMES, data.NAMES], ids=["first", "all"])
@pytest.mark.parametrize("video", [True, False])
def test_prompt_files_are_disjoint(video, names) -> None:
    written = prompts.lines(video, names)
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
        assert len(ids) == 2 + len(data.caption(name, colour).split())
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
