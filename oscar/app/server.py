"""Serving the page: from this machine alone unless said otherwise, without telemetry, and with no file left behind."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from oscar.app.coding import Model
from oscar.app.page import THEME, build, read
from oscar.app.uploads import MAX_BYTES

if TYPE_CHECKING:
    from oscar.codec import OscarCodec

HOST, PORT = "127.0.0.1", 7860


def serve(
    codecs: Mapping[str, OscarCodec],
    host: str = HOST,
    port: int = PORT,
    started: Callable[[str], None] = lambda url: None,
    stop: threading.Event | None = None,
) -> None:
    """Serve the page until it is interrupted.

    Args:
        codecs: by the names under which the page has them; both directions loaded.
        host: address to listen at; 0.0.0.0 is every one of this machine.
        port: TCP port.
        started: is called with the page's address.
        stop: ends the serving when it is set.

    Raises:
        OSError: if the port cannot be had.
    """
    blocks = None
    # A folder of its own, since Gradio serves what lies in there, and its usual one is shared with other pages.
    with (
        tempfile.TemporaryDirectory(prefix="oscar-app-") as folder,
        mock.patch.dict(os.environ, {"GRADIO_TEMP_DIR": folder, "GRADIO_ALLOWED_PATHS": ""}),
    ):
        try:
            blocks, _ = build({name: Model(name, codec) for name, codec in codecs.items()}, Path(folder))
            _, url, _ = blocks.launch(
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                allowed_paths=[],
                max_file_size=MAX_BYTES,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                theme=THEME,
                css=read("page.css"),
            )
            started(url)
            (stop or threading.Event()).wait()
        finally:
            if blocks is not None:
                blocks.close(verbose=False)
