"""Digits pasted into scenes, each pixel with its class, each digit with its box: data that anybody can make.

    python benchmarks/scenes.py data/scenes

writes images/ and masks/ for training (4,000 scenes), validation (300) and test (300), classes.txt, and the boxes as
COCO has them in annotations/. A scene is 64 x 64 pixels of dark noise; in two to four of its quarters stands one of
scikit-learn's digits, 24 to 32 pixels large.
The digits of one split are in no scene of another.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIDE = 64
NAMES = ("background", *map(str, range(10)))
COUNTS = {"train": 4000, "val": 300, "test": 300}
SHARES = {"train": slice(0, 1237), "val": slice(1237, 1437), "test": slice(1437, 1797)}
"""Of the 1,797 digits, in a random order."""


def scene(rng, images, labels):
    """An image and its mask, both uint8 (64, 64), and left, top, width, height and digit of each of its boxes."""
    image, mask = rng.integers(0, 60, (SIDE, SIDE)).astype(np.uint8), np.zeros((SIDE, SIDE), np.uint8)
    boxes = []
    for quarter in rng.permutation(4)[: rng.integers(2, 5)]:
        side, chosen = int(rng.integers(24, SIDE // 2 + 1)), rng.integers(len(images))
        top, left = rng.integers(0, SIDE // 2 - side + 1, 2) + SIDE // 2 * np.array(divmod(int(quarter), 2))
        place = slice(top, top + side), slice(left, left + side)
        ink = np.asarray(Image.fromarray(images[chosen]).resize((side, side), Image.Resampling.BILINEAR))
        image[place] = np.maximum(image[place], ink)
        mask[place][ink > 64] = labels[chosen] + 1
        boxes.append((int(left), int(top), side, side, int(labels[chosen])))
    return image, mask, boxes


def scenes(split, count):
    """Images and masks of a split, uint8 (count, 64, 64) each, and the boxes of each image."""
    digits = load_digits()
    chosen = np.random.default_rng(0).permutation(len(digits.images))[SHARES[split]]
    images = (digits.images[chosen] / 16 * 255).astype(np.uint8)
    rng = np.random.default_rng((1, list(SHARES).index(split)))
    pixels, masks, boxes = zip(*(scene(rng, images, digits.target[chosen]) for _ in range(count)), strict=True)
    return np.stack(pixels), np.stack(masks), boxes


def coco(boxes):
    """Boxes of each image as COCO's JSON has them."""
    images = [
        {"id": index, "file_name": f"{index:04}.png", "width": SIDE, "height": SIDE} for index in range(len(boxes))
    ]
    annotations = [
        {
            "image_id": index,
            "category_id": digit,
            "bbox": [left, top, width, height],
            "area": width * height,
            "iscrowd": 0,
        }
        for index, of_image in enumerate(boxes)
        for left, top, width, height, digit in of_image
    ]
    annotations = [{"id": number} | each for number, each in enumerate(annotations, start=1)]
    categories = [{"id": digit, "name": str(digit)} for digit in range(10)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(folder, counts=COUNTS):
    """The scenes of every split as `masks:FOLDER` and `coco:FOLDER` read them."""
    folder = Path(folder)
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        *both, boxes = scenes(split, count)
        for kind, pixels in zip(("images", "masks"), both, strict=True):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
            for index, each in enumerate(pixels):
                Image.fromarray(each).save(folder / split / kind / f"{index:04}.png")
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco(boxes)))
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    write(parser.parse_args().folder)
