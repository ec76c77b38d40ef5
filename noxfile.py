"""Sessions of the project: `nox` runs lint, types and tests in the current environment."""

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests"]


@nox.session
def lint(session: nox.Session) -> None:
    """Style."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types, strictly."""
    session.run("bash", "tools/types")


@nox.session
def tests(session: nox.Session) -> None:
    """The whole suite; arguments go to pytest."""
    session.run("pytest", *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """What needs a CUDA device."""
    session.run("pytest", "-m", "gpu", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Wheel and sdist."""
    session.run("python", "-m", "build")
