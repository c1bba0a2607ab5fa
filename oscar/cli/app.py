"""`oscar app`: a page to try models on, in the browser."""

from __future__ import annotations

import socket
from typing import Annotated

import typer

from oscar.cli.loading import SHIPPED, Device, load_codec
from oscar.cli.messages import CommandError, print_note
from oscar.utils.extras import need


def app(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...", help="Model folders or hub ids to choose from, beside those in the package."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to serve at; 0.0.0.0 lets other machines in, without any password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve at.")] = 7860,
    device: Device = "cpu",
) -> None:
    """Serve a page to compress images on, and see them beside AVIF, WebP and JPEG in as many bytes."""
    need("gradio")
    _check_address(host, port)
    from oscar.app import server  # before any model is loaded, so that nothing is hidden from its imports

    codecs = {name: load_codec(name, device, None) for name in dict.fromkeys([*(models or ()), *SHIPPED.values()])}
    server.serve(codecs, host, port, lambda url: print_note(f"open {url} in a browser; Ctrl-C ends it"))


def _check_address(host: str, port: int) -> None:
    """Refuse an address at which nothing can be served, before models are loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = error.strerror or error
        raise CommandError(f"cannot serve at --host {host} --port {port}: {reason}; allowed: another one") from error
