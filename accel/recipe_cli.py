"""`accel recipe`: look at recipe files, compare them, and exchange them through the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accel.method import AccelError

if TYPE_CHECKING:
    from accel.recipe import Recipe

app = typer.Typer(no_args_is_help=True, help="Recipe files.", rich_markup_mode=None)

Source = Annotated[str, typer.Argument(help="a file, zoo:NAME or published:NAME")]
Revision = Annotated[str | None, typer.Option(help="branch, tag or commit; printed as a commit")]


def read(source: str) -> Recipe:
    """The recipe of a file, of a zoo model, or that authors published."""
    from accel import model_zoo
    from accel.recipe import FILE_NAME, Recipe

    if source.startswith("zoo:"):
        return Recipe.load(model_zoo.path(source.removeprefix("zoo:")) / FILE_NAME)
    return Recipe.read(source)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Leaves of nested JSON by their dotted path."""
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {name: value}
    found: dict[str, Any] = {}
    for key, item in items:
        found |= flat(item, f"{name}.{key}" if name else str(key))
    return found


def _comparable(recipe: Recipe) -> dict[str, Any]:
    """A recipe's leaves; tensors by their content, wherever they lie."""
    leaves = flat(recipe.model_dump(mode="json", exclude={"tensors"}))
    return {
        key: recipe.tensors.get(Path(value).name, value) if isinstance(value, str) else value
        for key, value in leaves.items()
    }


@app.command("list")
def list_recipes() -> None:
    """Recipes that come with this package."""
    from accel import model_zoo
    from accel.recipe import FILE_NAME, published_names

    for name in model_zoo.names():
        if (model_zoo.path(name) / FILE_NAME).is_file():
            recipe = read(f"zoo:{name}")
            print(f"zoo:{name:<40} {_methods(recipe)}  measured: {len(recipe.measured)} rows")
    for name in published_names():
        recipe = read(f"published:{name}")
        print(f"published:{name:<34} {_methods(recipe)}  not measured here")


@app.command()
def show(source: Source) -> None:
    """Print a recipe as JSON."""
    print(read(source).model_dump_json(indent=2))


@app.command()
def validate(files: list[Path]) -> None:
    """Check recipe files; the first wrong one is named with what is wrong."""
    from accel.recipe import Recipe

    for file in files:
        print(f"{file}: {_methods(Recipe.load(file))}")


@app.command()
def diff(old: Source, new: Source) -> None:
    """Print what differs, a line each; exit code 1 when something does."""
    before, after = (_comparable(read(each)) for each in (old, new))
    changed = [key for key in before | after if before.get(key) != after.get(key)]
    for key in changed:
        print(f"{key}: {json.dumps(before.get(key))} -> {json.dumps(after.get(key))}")
    if changed:
        raise typer.Exit(1)


@app.command()
def pull(
    repository: Annotated[str, typer.Argument(help="owner/name on the Hugging Face hub")],
    output: Annotated[Path, typer.Option("-o", "--output")],
    revision: Revision = None,
) -> None:
    """Fetch a model's recipe, check it and write it; prints the commit it came from."""
    from huggingface_hub import HfApi, hf_hub_download

    from accel.recipe import FILE_NAME, Recipe

    with _hub_errors(repository):
        commit = HfApi().model_info(repository, revision=revision).sha
        file = hf_hub_download(repository, FILE_NAME, revision=commit)
        for name in _tensors(Path(file)):
            hf_hub_download(repository, name, revision=commit)
    Recipe.load(file).save(output)
    print(f"{repository}@{commit}: {output}")


@app.command()
def push(
    file: Path,
    repository: Annotated[str, typer.Argument(help="owner/name on the Hugging Face hub")],
    revision: Revision = None,
    pull_request: Annotated[bool, typer.Option("--pull-request", help="propose it")] = False,
) -> None:
    """Check a recipe and upload it beside a model's weights."""
    from huggingface_hub import CommitOperationAdd, HfApi

    from accel.recipe import FILE_NAME, Recipe

    parts = {FILE_NAME: file, **{name: file.parent / name for name in Recipe.load(file).tensors}}
    with _hub_errors(repository):
        done = HfApi().create_commit(
            repository,
            [CommitOperationAdd(name, str(path)) for name, path in parts.items()],
            commit_message="accel recipe",
            revision=revision,
            create_pr=pull_request,
        )
    print(f"{repository}@{done.oid}: {done.commit_url}")


def _tensors(file: Path) -> list[str]:
    """The bare names of the tensors that a recipe's file lists; the rest is checked on loading."""
    try:
        names = json.loads(file.read_text(encoding="utf-8-sig")).get("tensors", {})
        return [name for name in names if name == Path(name).name]
    except (ValueError, AttributeError, TypeError):
        return []


class _hub_errors:  # noqa: N801 (reads like a statement)
    """What the hub says becomes one message that names the repository."""

    def __init__(self, repository: str) -> None:
        self.repository = repository

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

        if isinstance(error, HfHubHTTPError | HFValidationError | OfflineModeIsEnabled | OSError):
            first = str(error).strip().splitlines()[0]
            raise AccelError(f"{self.repository}: {first}") from error


def _methods(recipe: Recipe) -> str:
    return " + ".join(entry.name for entry in recipe.entries)
