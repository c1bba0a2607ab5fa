"""The page that `oscar app` serves: try a model on one's own images, beside AVIF, WebP and JPEG at equal bytes.

`uploads`, `coding` and `sessions` are what it does, `page` is what it looks like (Gradio), `server` starts it.
"""
