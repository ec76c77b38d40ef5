"""Serves the demo, on this machine alone unless visitors log in."""

from __future__ import annotations

import ipaddress
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accel.demo_engine import Engine
from accel.loading import Loading
from accel.method import AccelError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How the demo is served.

    `models` are offered beside the zoo's; `extra` are more arguments of each pipeline call;
    `auth` holds (user, password) pairs and is needed unless `host` is this machine's own address.
    `queue_size` visitors may wait; those after them are told that the queue is full.
    """

    models: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int | None = None
    auth: tuple[tuple[str, str], ...] = ()
    queue_size: int = 8
    extra: dict[str, Any] = field(default_factory=dict)
    loading: Loading = field(default_factory=Loading)


def serve(options: Options, wait: bool = True) -> Any:
    """Start the server; with `wait` until it is interrupted. Raises `AccelError` when not safe."""
    check_host(options)
    try:
        from accel import demo_style
        from accel.demo_page import Page
    except ImportError as error:
        raise AccelError("the demo needs Gradio: pip install 'diffusers-accel[demo]'") from error
    page = Page(Engine(options.loading), options.models, options.extra).build()
    page.queue(max_size=options.queue_size, default_concurrency_limit=1)
    _, url, _ = page.launch(
        server_name=options.host,
        server_port=options.port,
        auth=list(options.auth) or None,
        share=False,
        quiet=True,
        ssr_mode=False,
        max_file_size="16mb",
        footer_links=[],
        theme=demo_style.theme(),
        css=demo_style.CSS,
        prevent_thread_lock=True,
    )
    logger.info("accel demo: %s", url)
    if wait:
        page.block_thread()
    return page


def check_host(options: Options) -> None:
    """Refuse an address that others can reach when nobody has to log in."""
    try:
        loopback = ipaddress.ip_address(options.host).is_loopback
    except ValueError:
        loopback = options.host == "localhost"
    if not loopback and not options.auth:
        raise AccelError(
            f"host {options.host!r} can be reached by others: give --auth FILE with "
            "user:password lines, or serve on 127.0.0.1"
        )


def read_auth(file: Path) -> tuple[tuple[str, str], ...]:
    """(user, password) pairs of a file with user:password lines."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AccelError(f"--auth {file}: cannot be read ({error})") from error
    pairs = [line.partition(":") for line in lines if line.strip()]
    if not pairs or not all(user and colon and password for user, colon, password in pairs):
        raise AccelError(f"--auth {file}: every line must be user:password")
    return tuple((user, password) for user, _, password in pairs)
