"""The page, in Gradio: what stands where, and what happens on what."""

from __future__ import annotations

import contextlib
import importlib.resources
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from oscar.app.coding import Model, Scale
from oscar.app.sessions import SIZE, Session, Sessions, Wish, image_url
from oscar.utils.errors import first_line, is_out_of_memory

_EXPECTED = (ValueError, OSError, RuntimeError, MemoryError)  # of uploads; `_complaint` lets other RuntimeErrors go
_FORGOTTEN = "This page was forgotten, since others came. Drop the image again."
_REPORT = "oscar.benchmark.report"  # whose stage is the viewer's too
_SHARE = "Preview: first % of the file"
THEME = gr.themes.Base(
    primary_hue="orange",
    neutral_hue="stone",
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],  # none is fetched from elsewhere
    font_mono=["ui-monospace", "monospace"],
)


def read(name: str, package: str = "oscar.app") -> str:
    """A file of a package."""
    return (importlib.resources.files(package) / name).read_text(encoding="utf-8")


def build(models: Mapping[str, Model], uploads: Path) -> tuple[gr.Blocks, Sessions]:
    """The page, and what it remembers of its visitors.

    Args:
        models: by name; the first is chosen at first.
        uploads: folder in which Gradio puts what visitors send. Nothing else is read.
    """
    sessions, names = Sessions(models), list(models)
    with gr.Blocks(title="OSCAR", analytics_enabled=False, delete_cache=(600, 600)) as blocks:
        gr.HTML(read("header.html"))
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=290):
                drop = gr.File(label="Image or .oscar file", height=160, elem_id="drop")
                line = _from_js("line.js", "<p id='line' role='status'></p>")
                model = gr.Radio(names, value=names[0], label="Model", elem_id="model", visible=len(names) > 1)
                aim = gr.Radio(_aims(models[names[0]]), value=SIZE, label="Choose by", visible=False, elem_id="aim")
                amount = gr.Slider(0, 1, 0, visible=False, buttons=[], elem_id="amount")
                share = gr.Slider(0, 100, 100, step=5, label=_SHARE, visible=False, buttons=[], elem_id="share")
            with gr.Column(scale=3, min_width=320):
                original = _from_js("original.js", "<i></i>", elem_id="original")
                view = gr.HTML(
                    html_template=read("viewer.html"),
                    css_template=read("stage.css", _REPORT) + read("viewer.css"),
                    js_on_load=read("stage.js", _REPORT) + read("viewer.js"),
                    apply_default_css=False,
                )

        def open_upload(file: dict, model_: str, aim_: str, request: gr.Request) -> Iterator[dict[Any, Any]]:
            session, name = sessions.of(_key(request)), str(file["orig_name"])
            yield {line: _message(f"{name} …")}
            try:
                scale = session.open(_take(Path(file["path"]), uploads), name, model_, aim_)
            except _EXPECTED as error:
                yield {drop: None, line: _complaint(error)}
                return
            opened = {drop: None, line: _about(session, "…"), share: gr.update(value=100, visible=False), view: None}
            if scale is None:
                yield {**opened, **dict.fromkeys((model, aim, amount), gr.update(visible=False)), original: ""}
                return
            choices = {model: gr.update(visible=len(names) > 1), aim: gr.update(visible=True), amount: _slider(scale)}
            yield {**opened, **choices, original: image_url(session.original)}

        def choose(model_: str, aim_: str, number: float, request: gr.Request) -> dict[Any, Any]:
            session, aims = sessions.of(_key(request)), _aims(models[model_])
            aim_ = aim_ if aim_ in aims else aims[-1]
            changes = {aim: gr.update(choices=aims, value=aim_)}
            if session.original is None:  # nothing is open, or a file that has its model
                return changes
            return {**changes, amount: _slider(session.choose(model_, aim_, number))}

        def ask(model_: str, aim_: str, number: float, request: gr.Request) -> dict[Any, Any]:
            session = sessions.of(_key(request))
            if session.original is None:
                return {line: _message(_FORGOTTEN, wrong=True)}
            session.ask(Wish(model_, aim_, number))
            return {line: _about(session, "…" if session.served < session.asked else "")}

        def serve(request: gr.Request) -> Iterator[dict[Any, Any]]:
            session, shown = sessions.of(_key(request)), None
            yield {view: gr.skip()}  # of what yields nothing Gradio would empty the outputs
            try:
                for shown in session.serve():
                    update = {view: shown.as_json()}
                    if len(shown.coded) == 1:
                        update[share] = gr.update(value=100, visible=session.has_previews)
                    yield update
            except _EXPECTED as error:
                yield {line: _complaint(error)}
            else:
                if shown is not None:
                    yield {line: _about(session, "…" if session.served < session.asked else "")}

        def preview(percent: float, request: gr.Request) -> dict[Any, Any]:
            try:
                shown = sessions.of(_key(request)).preview(percent / 100)
            except _EXPECTED as error:
                return {line: _complaint(error)}
            return {view: shown.as_json()} if shown else {line: _message(_FORGOTTEN, wrong=True)}

        quick = {"api_visibility": "private", "show_progress": "hidden", "trigger_mode": "multiple"}
        coding = {
            **quick,
            "concurrency_id": "coding",
            "concurrency_limit": 1,
        }  # one image at a time goes through the models
        wishes, shown = [model, aim, amount], [line, view, share]
        opens = [drop, line, model, aim, amount, share, original, view]
        # What Gradio makes of an upload by itself leaves an empty file behind.
        drop.upload(open_upload, [drop, model, aim], opens, preprocess=False, **coding).then(
            serve, None, shown, **coding
        )
        gr.on([model.input, aim.input], choose, wishes, [aim, amount], **coding).then(serve, None, shown, **coding)
        amount.release(ask, wishes, line, queue=False, **quick).then(serve, None, shown, **coding)
        share.release(preview, share, [view, line], **{**coding, "trigger_mode": "always_last"})

        def leave(request: gr.Request) -> None:
            sessions.end(_key(request))

        blocks.unload(leave)
    blocks.queue(api_open=False, max_size=2 * sessions.capacity)
    return blocks, sessions


def _key(request: gr.Request) -> str:
    return str(request.session_hash)


def _take(path: Path, uploads: Path) -> bytes:
    """The content of an upload, which has a folder of its own; from then on it is in memory alone."""
    path = path.resolve()
    if path.parent.parent != uploads.resolve():
        raise ValueError(f"{path.name}: is no upload")
    try:
        return path.read_bytes()
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
            path.parent.rmdir()


def _from_js(script: str, template: str, **options: Any) -> gr.HTML:
    """An element whose script shows its value as text or hands it on; so nothing that visitors send becomes HTML."""
    return gr.HTML(html_template=template, js_on_load=read(script), apply_default_css=False, **options)


def _aims(model: Model) -> list[str]:
    return [SIZE, model.point_name.capitalize()]


def _slider(scale: Scale) -> dict[str, Any]:
    if scale.low == scale.high:  # nothing to choose
        return gr.update(visible=False)
    return gr.update(
        minimum=scale.low, maximum=scale.high, value=scale.start, step=scale.step, label=scale.label, visible=True
    )


def _message(text: str, wrong: bool = False) -> dict[str, Any]:
    return {"text": text, "wrong": wrong}


def _complaint(error: BaseException) -> dict[str, Any]:
    if is_out_of_memory(error):
        return _message("There is not enough memory for this image.", wrong=True)
    if isinstance(error, RuntimeError):
        raise error
    return _message(first_line(error), wrong=True)


def _about(session: Session, more: str = "") -> dict[str, Any]:
    """What is open, in a line."""
    upload = session.upload
    assert upload is not None
    what = (
        f"{len(upload.data):,} bytes"
        if upload.image is None
        else f"{upload.image.width} × {upload.image.height} pixels"
    )
    note = f" ({upload.note})" if upload.note else ""
    return _message(f"{upload.name}, {what}{note} {more}".strip())
