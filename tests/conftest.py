"""What the tests share: tiny runs of the three scripts, and small data sets in folders."""

import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import caudo_diff
import data
import diffseg
import pepl

SIZE = (16, 24)
Y, X = np.mgrid[:32, :48]
DISC = ((Y - 12) ** 2 + (X - 16) ** 2 < 81).astype(np.uint8)  # (32, 48) in {0, 1}
NOISE = np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), dtype=np.uint8)
QUICK = ["--quick", "--device", "cpu", "--save-every", "4"]
LATE = ["--unlabelled-start", "0.3"]
TINY = {  # flags of a run of seconds with all that a script has
    diffseg: [*QUICK, "--size", "32x16", "--width", "16", "--method", *diffseg.STAGES],
    pepl: [*QUICK, "--size", "16", "--amp", "off", *LATE, "--method", *pepl.METHODS],
    caudo_diff: [*QUICK, "--size", "32x16", "--rounds", "1"],
}


def run(script, *argv):
    """Call a script's command line in this process; returns its exit status."""
    try:
        script.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code
    return 0


def error_lines(capsys):
    """The lines on stderr that say what was wrong."""
    return [line for line in capsys.readouterr().err.splitlines() if ".py: error: " in line]


@pytest.fixture(autouse=True)
def empty_working_folder(tmp_path, monkeypatch):
    """No test sees the user's own runs in out/."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """trained(script): where the results of its TINY run are; a script is trained once."""

    @functools.cache
    def train(script):
        out = tmp_path_factory.mktemp(script.__name__)
        assert run(script, *TINY[script], "--out", out) == 0
        return out

    return train


def best(out):
    """The path of the only best.pt under out."""
    (path,) = Path(out).rglob("best.pt")
    return path


def result(out):
    return json.loads(best(out).with_name("result.json").read_text())


def same_weights(*outs):
    """Whether the networks that two runs of a script share are equal, bit for bit."""
    a, b = (torch.load(best(out), weights_only=True)["nets"] for out in outs)
    return all(torch.equal(a[s][k], b[s][k]) for s in a.keys() & b.keys() for k in a[s])


def segmentation_folder(root, n, raters=1):
    """Three equal splits of n images, img0 and so on; returns root."""
    images, masks = data.synthetic_dermoscopy(n, (48, 64), seed=3)
    for split, i in itertools.product(("train", "val", "test"), range(n)):
        data.save_png(images[i].permute(1, 2, 0).numpy(), root / split / f"images/img{i}.png")
        for r in range(raters):
            data.save_png(masks[i, r].numpy() * 255, root / split / f"masks_{r}/img{i}.png")
    return root


def class_folder(root):
    """Two classes, a and b, each of six images in train and in test; returns root."""
    for split, k, i in itertools.product(("train", "test"), (0, 1), range(6)):
        pixels = np.full((24, 20, 3), 90 * k + i, np.uint8)
        data.save_png(pixels, root / split / "ab"[k] / f"{i}.png")
    return root


def save(path, pixels, turn=1):
    """Save an array or image, with an EXIF orientation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (exif := Image.Exif())[0x0112] = turn
    img = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    img.save(path, exif=exif)
    return path


def make_set(folder, names="abc", masks=("masks",)):
    """Images of noise and masks of a disc in folder/images and folder/masks."""
    for name, pixels in zip(names, NOISE, strict=False):
        save(folder / "images" / f"{name}.jpg", pixels)
        for kind in masks:
            save(folder / kind / f"{name}_segmentation.png", DISC * 255)
    return folder


def load(root, split="val", name="folder", **options):
    return data.load_segmentation(name, root, split, SIZE, **options)
