"""A page in the browser: drop an image, see what the model says of it, click a patch and see what it attends to."""

import os
import socket

import numpy as np

from tnt_jax.config import InputError
from tnt_jax.inference import inference_model
from tnt_jax.models.variants import Model
from tnt_jax.storage.description import description_of
from tnt_jax.tasks.table import TASKS
from tnt_jax.visualize.attention import inner_attention, outer_attention
from tnt_jax.visualize.canvas import preprocess
from tnt_jax.visualize.why import why

SHOWN = 448  # pixels of the shorter side of the image that is clicked
INSTALL = (
    "pip install gradio==6.31.0 && pip install 'pillow>=13,<14' "
    "(the second one because Gradio asks for an older Pillow, and works with this one)"
)


def make_page(model: Model, name: str):
    """The page as a `gradio.Blocks`, whose `launch` serves it. Nothing of it comes from another host.

    Raises:
        InputError: Gradio is not installed, or the model has no classes.
    """
    gradio = _gradio()
    description = description_of(model)
    if not description.config.num_classes:
        raise InputError(f"{name} was made with num_classes=0: it has features, and no classes to show")
    task = TASKS[description.outputs.task]
    height, width = description.config.image_size
    scale = max(1, round(SHOWN / min(height, width)))
    size = description.config.patch_size

    def dropped(image: np.ndarray | None):
        """The model's answer, and the image as it sees it."""
        if image is None:
            return None, None, None, None, None, None
        try:
            said = task.shown(inference_model(model, image), description.class_names)
            pixels = preprocess(model, image).pixels
        except InputError as error:
            raise gradio.Error(str(error)) from error
        pixels = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
        return said, pixels.repeat(scale, 0).repeat(scale, 1), None, None, None, None

    def clicked(image: np.ndarray, place: gradio.SelectData):
        """The attention of the patch at a place, x and y in pixels of the enlarged image."""
        x, y = (min(int(value) // scale, side - 1) for value, side in zip(place.index, (width, height), strict=True))
        patch = (min(y // size, height // size - 1), min(x // size, width // size - 1))
        title = f"### Patch in row {patch[0]}, column {patch[1]}"
        return title, inner_attention(model, image, patch=patch), outer_attention(model, image, patch=patch)

    def asked(image: np.ndarray, chosen: gradio.SelectData):
        """The explanation of the class that was clicked."""
        name = chosen.value.removeprefix("✓ ")
        return why(model, image, classes=[name], methods=("rollout", "integrated-gradients"))

    # Gradio's own theme asks Google for its fonts.
    fonts = {"font": ("Helvetica", "Arial", "sans-serif"), "font_mono": ("monospace",)}
    with gradio.Blocks(title=f"tnt_jax: {name}", analytics_enabled=False) as page:
        gradio.Markdown(f"# {name}\nDrop an image on the left, click a patch in the middle, or a class on the right.")
        # Labels and buttons would lie over the picture that is clicked, and over the titles of the plots.
        plain = {"show_label": False}
        with gradio.Row():
            image = gradio.Image(type="numpy", sources=["upload", "clipboard"], elem_id="image", **plain)
            seen = gradio.Image(interactive=False, buttons=[], elem_id="seen", **plain)
            classes = gradio.Label(num_top_classes=5, elem_id="classes", **plain)
        reasons = gradio.Plot(elem_id="why", **plain)
        patch = gradio.Markdown(elem_id="patch")
        with gradio.Row():
            inner = gradio.Plot(elem_id="inner", **plain)
            outer = gradio.Plot(elem_id="outer", **plain)
        image.change(dropped, image, [classes, seen, patch, inner, outer, reasons])
        classes.select(asked, image, reasons)
        seen.select(clicked, image, [patch, inner, outer])
    page.theme_without_fonts = gradio.themes.Default(**fonts)
    return page


def serve_page(model: Model, name: str, port: int, host: str = "127.0.0.1") -> None:
    """Serves the page at an address of this machine until Ctrl-C.

    Raises:
        InputError: as `make_page`, or the port is in use.
    """
    check_port(port, host)
    page = make_page(model, name)
    print(f"http://{host}:{port} shows {name}; Ctrl-C ends it", flush=True)
    page.launch(server_name=host, server_port=port, quiet=True, theme=page.theme_without_fonts, footer_links=[])


def check_port(port: int, host: str = "127.0.0.1") -> None:
    """Raises InputError unless this machine can be listened to at a port of an address."""
    if not 1 <= port <= 65535:
        raise InputError(f"--port is {port}, and must lie between 1 and 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"port {port} of {host} cannot be used ({error.strerror}); choose another one with --port, or --host"
            ) from error


def _gradio():
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise InputError(f"the page needs {error.name}, which is not installed: {INSTALL}") from error
    return gradio
