"""The page of `oscar app` as a Space of Hugging Face, or on any host that runs one Python file."""

from oscar.app.server import PORT, serve
from oscar.inference.load import load

if __name__ == "__main__":
    models = ("nano", "nano-vq")  # folders beside this file, or hub ids, go here too
    serve({name: load(name) for name in models}, host="0.0.0.0", port=PORT)
