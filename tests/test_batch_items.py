"""Prompt files become items; what is wrong in a line stays in that line."""

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel import AccelError, batch_items
from accel.batch_items import Item


def write(folder, name: str, content: str | bytes):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_text_lines_take_inline_flags(tmp_path) -> None:
    text = '# note\n\na cat --w 64 --h 32 --d 7 --s 9 --l 2.5 --n blurry, dark --f cat\r\na "dog"\n'
    first, second = batch_items.read(write(tmp_path, "p.txt", text), base_seed=10)
    assert first == Item(
        index=0,
        line=3,
        prompt="a cat",
        seed=7,
        negative_prompt="blurry, dark",
        call={"width": 64, "height": 32, "num_inference_steps": 9, "guidance_scale": 2.5},
        name="cat",
    )
    assert (second.prompt, second.seed, second.line) == ('a "dog"', 11, 4)


def test_jsonl_and_csv_say_the_same(tmp_path) -> None:
    rows = '{"prompt": "é 红", "seed": 3, "steps": 4}\n{"prompt": "b", "num_frames": 5}\n'
    table = '\ufeffprompt,seed,steps,num_frames\né 红,3,4,\n"b",,,5\n'
    from_json = batch_items.read(write(tmp_path, "p.jsonl", rows))
    for ends in ("\n", "\r\n", "\r"):
        from_csv = batch_items.read(write(tmp_path, "p.csv", table.replace("\n", ends)))
        for a, b in zip(from_json, from_csv, strict=True):
            assert (a.prompt, a.seed, a.call) == (b.prompt, b.seed, b.call)
    assert from_json[0].call == {"num_inference_steps": 4}


def test_standard_input_takes_text_and_json_lines(monkeypatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b'a cat --d 4\n{"prompt": "dog", "seed": 5}\n'))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert [(i.prompt, i.seed) for i in batch_items.read("-")] == [("a cat", 4), ("dog", 5)]


def test_seeds_multiply_prompts_but_not_those_with_their_own(tmp_path) -> None:
    items = batch_items.read(write(tmp_path, "p.txt", "a\nb --d 9\n"), seeds=(0, 5))
    assert [(i.index, i.prompt, i.seed, i.take) for i in items] == [
        (0, "a", 0, 0),
        (1, "a", 5, 1),
        (2, "b", 9, 0),
    ]
    assert batch_items.seed_list("0-3,7") == (0, 1, 2, 3, 7)
    for wrong in ("", "a", "3-1", "1,1", "-1"):
        with pytest.raises(AccelError, match="--seeds"):
            batch_items.seed_list(wrong)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("p.jsonl", "{", "line 2"),
        ("p.jsonl", "[1]", "not a JSON object"),
        ("p.jsonl", '{"prompt": ""}', "no prompt"),
        ("p.jsonl", '{"prompt": "a", "colour": 1}', "unknown colour"),
        ("p.jsonl", '{"prompt": "a", "steps": 2.5}', "steps must be"),
        ("p.jsonl", '{"prompt": "a", "steps": true}', "steps must be"),
        ("p.jsonl", '{"prompt": "a", "seed": -1}', "seed must be"),
        ("p.jsonl", '{"prompt": "a \\ud83d"}', "surrogates not allowed"),
        ("p.jsonl", '{"prompt": "a", "\\ud83d": 1}', "surrogates not allowed"),
        ("p.jsonl", '{"prompt": "a", "guidance_scale": NaN}', "guidance_scale must be"),
        ("p.txt", "a --w x", "width must be a number"),
        ("p.txt", "a --q 1", "unknown flag --q"),
        ("p.txt", "a\0b", "NUL"),
        ("p.txt", "a" * 70_000, "longer than"),
    ],
)
def test_a_wrong_line_is_an_item_with_an_error(tmp_path, name, line, message) -> None:
    good = '{"prompt": "good"}' if name.endswith("l") else "good"
    items = batch_items.read(write(tmp_path, name, f"{good}\n{line}\n{good}\n"))
    assert [bool(item.error) for item in items] == [False, True, False]
    assert message in items[1].error
    assert "line 2" in items[1].error


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"a\n\xff\xfe", r"not UTF-8 \(line 2, byte 2\)"),
        ("p.txt", b"# only notes\n", "no prompt in it"),
        ("p.doc", b"a", r"accepted are \.txt"),
        ("p.csv", b"text\na\n", "a column prompt"),
        ("p.csv", b"prompt,colour\na,b\n", "unknown column colour"),
        ("p.csv", b'prompt\n"a\nb\n', "not CSV"),
        ("p.csv", b'prompt\n"a\n' + b"a dog runs\n" * 14_000, "not CSV"),
    ],
)
def test_wrong_files_are_refused_whole(tmp_path, name, content, message) -> None:
    with pytest.raises(AccelError, match=message):
        batch_items.read(write(tmp_path, name, content))


def test_names_follow_the_template_and_never_collide(tmp_path) -> None:
    items = [Item(0, 1, "A cat!", 7), Item(1, 2, "a cat", 7), Item(2, 3, "x", 1, name="../up")]
    names = batch_items.named(items, "{slug}_{seed}")
    assert names[0].name == "a-cat_7"
    assert "that of item 0 too" in names[1].error
    assert "cannot be a file name" in names[2].error
    assert [i.name for i in batch_items.named(items[:2])] == ["00000_7_a-cat", "00001_7_a-cat"]
    assert batch_items.named(items[:1], vbench=True)[0].name == "A cat!-0"
    for wrong in ("{prompt}", "{index", "{index.__class__}", "{0}"):
        with pytest.raises(AccelError, match="--name-template"):
            batch_items.named(items, wrong)


def test_prompts_without_ascii_letters_have_names_of_their_own() -> None:
    prompts = ["猫", "犬", "🚀", "Die Katze 猫", "Die Katze 犬", "Äpfel", "", "die katze"]
    found = [batch_items.slug(each) for each in prompts]
    assert len(set(found)) == len(prompts)
    assert found[-2:] == ["untitled", "die-katze"]
    assert all(each.isascii() for each in found)
    assert batch_items.slug("猫") == found[0]


def test_items_with_an_error_have_names_of_their_own(tmp_path) -> None:
    text = "a?\nb?\na --w x\nb --w x\nc\nc --d 9\nitem 0\n"
    items = batch_items.read(write(tmp_path, "p.txt", text), seeds=(0, 1))
    for options in ({"vbench": True}, {"template": "{slug}"}):
        named = batch_items.named(items, **options)
        assert len({item.name for item in named}) == len(items)
    assert named[-2].name == "item-0"
    assert batch_items.named(items, vbench=True)[-2].name == "item 0-0"


def test_bare_prompts_are_read_and_checked_as_well(tmp_path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffa --w\r\n\n é \nc\n".encode())
    assert batch_items.prompt_lines(file, 2) == ["a --w", "é"]
    file.write_bytes(b"a\ncaf\xe9\n")
    with pytest.raises(AccelError, match=r"p\.txt: not UTF-8 \(line 2, byte 5\)"):
        batch_items.prompt_lines(file, 1)


@given(prompt=st.text(min_size=1), name=st.none() | st.text(), vbench=st.booleans())
def test_no_name_leaves_the_folder(prompt, name, vbench) -> None:
    (item,) = batch_items.named([Item(0, 1, prompt, 0, name=name)], vbench=vbench)
    if item.error is None:
        assert item.name
        assert not set(item.name) & set("/\\\0\n:")
        assert item.name[0] != "."
        assert len(item.name.encode()) <= batch_items.LONGEST_NAME
