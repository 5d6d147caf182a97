"""The Fréchet distance of folders of pictures, and what is said of how it was taken."""

import numpy as np
import pytest
from PIL import Image

from megadual.errors import UserError
from megadual.evaluate.fid import fid

pytest.importorskip("efficientnet_lite_pytorch")


def write(folder, count: int, side: int, shift: int = 0, suffix: str = "png"):
    folder.mkdir(parents=True)
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 200, (4, 4, 3), dtype=np.uint8) + shift
        Image.fromarray(noise.astype(np.uint8)).resize((side, side)).save(folder / f"{i}.{suffix}")
    return folder


def test_distance_of_folders(tmp_path):
    """Nothing from itself, whatever the sizes' order; more from others; formats of both sides are told."""
    real = write(tmp_path / "real" / "art", 5, 32).parent
    write(real / "food", 4, 40)
    bright, jpeg = write(tmp_path / "bright", 9, 32, 55), write(tmp_path / "jpeg", 9, 32, suffix="jpg")
    same = fid(real, real, None, None, "cpu")
    assert abs(same["value"]) < 1e-4 * fid(bright, real, None, None, "cpu")["value"]
    assert same["drawn"]["images"] == 9 and same["drawn"]["sizes"] == {"32 x 32": 5, "40 x 40": 4}
    if same["measure"] != "fid":
        assert "Inception" in same["not_fid_because"] and "not FID" in same["features"]
    other = fid(jpeg, real, None, 24, "cpu")
    assert other["drawn"]["formats"] == {"JPEG": 9} and other["reference"]["formats"] == {"PNG": 9}
    assert other["resizing"].startswith("shortest side to 24 px")


def test_a_folder_without_images_is_told(tmp_path):
    with pytest.raises(UserError, match="--reference '.*nowhere' holds 0 images"):
        fid(write(tmp_path / "a", 2, 16), tmp_path / "nowhere", None, None, "cpu")
