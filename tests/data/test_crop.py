import numpy as np
import published
import pytest
from PIL import Image

from tnt_jax.data.crop import evaluation_crop
from tnt_jax.data.decode import read_image

CROPS, MANIFEST = published.record("timm_evaluation_crop")


@pytest.mark.parametrize("case", range(len(MANIFEST["cases"])))
def test_evaluation_crop_is_timms_pixel_for_pixel(case):
    size, crop = MANIFEST["cases"][case]["size"], MANIFEST["cases"][case]["crop"]
    result = evaluation_crop(Image.fromarray(CROPS[f"image{case:02}"]), tuple(size), crop)
    np.testing.assert_array_equal(result, CROPS[f"result{case:02}"])


def test_a_grey_image_keeps_one_channel():
    image = read_image(np.arange(64, dtype=np.uint8).reshape(8, 8), channels=1)
    result = evaluation_crop(image, (8, 8), 1.0)
    np.testing.assert_array_equal(result[..., 0], np.arange(64).reshape(8, 8))
