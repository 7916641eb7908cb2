"""A model as a folder that any static server serves: a page, the ONNX file, and onnxruntime-web beside it."""

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Array, UInt8

from tnt_jax.config import InputError
from tnt_jax.evaluation.attribution import places_of
from tnt_jax.evaluation.capture import ObservedAttention, blocks_of
from tnt_jax.export.files import Exported, check_difference, describe_file
from tnt_jax.export.formats import FORMATS, Samples, logits_of, of_equations, output_name, to_onnx
from tnt_jax.models.variants import Model
from tnt_jax.storage.description import description_of
from tnt_jax.storage.files import write_whole
from tnt_jax.tasks.table import TASKS

PAGE = Path(__file__).with_name("page.html")
PACKAGE = "onnxruntime-web@1.30.0"
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def export_web(
    model: Model,
    folder: str | os.PathLike,
    *,
    images: UInt8[np.ndarray, "batch height width channels"] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes the folder, after its ONNX file has given the model's logits.

    Raises:
        InputError: the folder exists, npm is not installed or does not get the runtime, the model takes neither grey
            nor colours, or as `export_model`. Nothing is written then.
    """
    folder, channels = Path(folder), model.config.in_channels
    if channels not in (1, 3):
        raise InputError(f"a page shows images of 1 or 3 channels, and the model takes {channels}")
    if TASKS[task := description_of(model).outputs.task].dense:
        raise InputError(f"a page shows predictions of whole images, and the task of the model is {task}: export onnx")
    if Samples.of(model, images).white is not None:
        raise InputError("a page shows images of 8 bits, and the model was trained on others; export it as onnx")
    if folder.exists() and not (overwrite and (folder / "model.onnx").is_file()):
        raise InputError(f"{folder} exists; choose another folder, or overwrite a page (--overwrite, overwrite=True)")
    with tempfile.TemporaryDirectory() as downloaded:
        runtime = fetch_runtime(Path(downloaded))
        plain = of_equations(model, "float32")
        outputs = (output_name(model), "attention")
        content, run = to_onnx(plain, with_attention(plain), outputs)
        difference = check_difference(model, plain, run, images, "onnx")
        about = describe_file(model, logits_of(plain), "onnx") | {"attention": _caption(model)}

        def write(unfinished: Path) -> None:
            unfinished.mkdir()
            shutil.copy(PAGE, unfinished / "index.html")
            for name in RUNTIME:
                shutil.copy(runtime / name, unfinished / name)
            (unfinished / "model.onnx").write_bytes(content)
            (unfinished / "model.json").write_text(json.dumps(about, indent=2, ensure_ascii=False), encoding="utf-8")

        write_whole(folder, write)
    size = sum(path.stat().st_size for path in folder.iterdir())
    return Exported(str(folder), size, difference, FORMATS["onnx"].limits)


def with_attention(model: Model) -> Callable[[Array], tuple[Array, Array]]:
    """uint8 pixels to what is exported, and what the head's token attends to in the last block, mean over the heads.

    Of a PyramidTNT, which has no such token, what its last sentences attend to on average: (batch, rows, columns).
    """
    place, prefix = places_of(model)[-1], model.num_prefix_tokens

    def outputs(pixels: Array) -> tuple[Array, Array]:
        seen: dict[str, Array] = {}

        def tell(name: str, weights: Array) -> Array:
            seen[name] = weights.mean(axis=1)
            return weights

        def observe(model: Model) -> None:
            layer = blocks_of(model)[-1].outer
            layer.attn = ObservedAttention(layer.attn, "outer", tell)

        logits = logits_of(model, observe)(pixels)
        weights = seen["outer"][:, 0, prefix:] if prefix else seen["outer"].mean(axis=1)
        return logits, weights.reshape(-1, *place.keys)

    return outputs


def _caption(model: Model) -> str:
    if model.num_prefix_tokens:
        return "what the class token attends to in the last block"
    return "what the last sentences attend to, on average"


def fetch_runtime(folder: Path) -> Path:
    """onnxruntime-web from the npm registry, as npm checks and keeps it; the folder with its files.

    Raises:
        InputError: npm is not installed, or cannot get the package.
    """
    if not shutil.which("npm"):
        raise InputError(f"--format web gets {PACKAGE} with npm, which is not installed: https://nodejs.org")
    done = subprocess.run(
        ["npm", "pack", PACKAGE, "--silent", "--prefer-offline"], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        raise InputError(f"npm cannot get {PACKAGE}: {(done.stderr or done.stdout).strip()[-300:]}")
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, [packed.getmember(f"package/dist/{name}") for name in RUNTIME], filter="data")
    return folder / "package/dist"
