"""Makes tests/golden/version_COMMIT.zip by the code of a commit, which a worktree of it has, and no other:

git worktree add OLD COMMIT
PYTHONPATH=OLD:OLD/tests python -P tests/golden_version.py tests/golden/version_COMMIT.zip
"""

import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from small_runs import tiny_run

import tnt_jax
from tnt_jax.training.loop import train


def main(destination: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        train(tiny_run("run", epochs=1))
        tnt_jax.save_model(tnt_jax.load_model("run"), "model", class_names=[f"digit {number}" for number in range(10)])
        images = np.random.default_rng(0).standard_normal((3, 16, 16, 1)).astype(np.float32)
        models = {name: tnt_jax.load_model("run", weights=name) for name in ("ema", "raw")}
        models["model"] = tnt_jax.load_model("model")
        logits = {name: np.asarray(model(images)).tolist() for name, model in models.items()}
        Path("logits.json").write_text(json.dumps(logits))
        with zipfile.ZipFile(destination, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(Path().rglob("*")):
                if path.is_file() and "tensorboard" not in path.parts and path.name != "run.lock":
                    archive.write(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
