"""Caudo-Diff: its mathematics, the one mask it may read, and its real command lines."""

import inspect
import json
import os
import signal
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

SCRIPT = Path(caudo_diff.__file__)
TINY = ["--quick", "--size", "32x16", "--width", "16", "--device", "cpu"]
TWINS = ["add_noise", "overlap_metrics", "Block", "consensus", "autocast", "batched", "colour_map"]
TWINS += ["outline", "save_checkpoint", "load_checkpoint", "draw_sheet", "positive"]


def run(*argv):
    """Call the command line in this process; returns its exit status."""
    try:
        caudo_diff.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code
    return 0


def make_folder(root, n=6, seed=0, noise=False, size=(24, 40)):
    """A folder data set of dark squares; noise: all masks but those of img0 and test are noise."""
    rng = np.random.default_rng(seed)
    for split in ("train", "test"):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for i in range(n if split == "train" else 2):
            y, x = 4 + rng.integers(8), 4 + rng.integers(20)
            img, mask = np.full((*size, 3), 200), np.zeros(size, bool)
            mask[y : y + 9, x : x + 12] = True
            img[mask] = 90
            img = (img + rng.integers(-9, 9, img.shape)).astype(np.uint8)
            if noise and split == "train" and i:
                mask = np.zeros(size, bool)
                mask[:: i + 1] = True
            Image.fromarray(img).save(root / split / "images" / f"img{i}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"img{i}.png")
    return root


def trained_weights(out):
    files = sorted(Path(out).rglob("*.pt"))
    return {f.name: torch.load(f, weights_only=True)["ema"] for f in files}


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[f][k], b[f][k]) for f in a for k in a[f])


@pytest.mark.parametrize("name", TWINS)
def test_twins_of_diffseg_are_verbatim(name):
    twin, own = getattr(diffseg, name), getattr(caudo_diff, name)
    assert inspect.getsource(own) == inspect.getsource(twin)


@pytest.mark.parametrize("name", ["autocast", "colour_map", "save_checkpoint"])
def test_twins_of_pepl_are_verbatim(name):
    assert inspect.getsource(getattr(pepl, name)) == inspect.getsource(getattr(diffseg, name))


def test_ddim_inverts_itself_and_its_error_falls_with_the_number_of_steps():
    torch.manual_seed(0)
    g = caudo_diff.Denoiser(4, 32).eval().requires_grad_(False)
    for p in g.head.parameters():
        torch.nn.init.normal_(p, std=0.02)
    z, c = torch.randn(4, 8, 6, 8), 0.5 * torch.randn(4, g.stem.in_channels - 8, 6, 8)

    def x0(zt, t):
        return g(zt, torch.full((4,), t), c)

    errors = []
    for steps in (5, 20, 80):
        times = torch.linspace(0, 500, steps + 1).round().long().tolist()
        way = caudo_diff.there_and_back(z, x0, x0, times)
        assert all(map(torch.equal, way, caudo_diff.there_and_back(z, x0, x0, times)))
        errors.append((way[-1] - z).square().mean().sqrt().item())
    assert errors[2] < 0.3 * errors[1] < 0.1 * errors[0] and errors[2] < 0.05


def test_calibration_is_deterministic_and_keeps_the_shape():
    torch.manual_seed(0)
    args = caudo_diff.parse_args([*TINY])
    nets = caudo_diff.Autoencoder(4).eval(), caudo_diff.Denoiser(4, 32).eval(), 4.0
    img = torch.randint(0, 256, (3, 3, 16, 32), dtype=torch.uint8)
    p0, h = torch.rand(3, 1, 16, 32), torch.randn(3, 32, 2, 4)
    a, b = (caudo_diff.calibrate(nets, img, p0, h, args) for _ in range(2))
    assert torch.equal(a, b) and a.shape == p0.shape and 0 <= a.min() <= a.max() <= 1
    way = caudo_diff.calibrate(nets, img, p0, h, args, whole_way=True)
    assert way.shape == (3, args.ddim_steps + 1, 16, 32) and torch.equal(way[:, -1:], a)


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
    for name, noise in (("true", False), ("noise", True)):
        root = make_folder(tmp_path / name, noise=noise)
        assert run(*options, "--data-root", root, "--out", tmp_path / f"out_{name}") == 0
    a, b = (trained_weights(tmp_path / f"out_{name}") for name in ("true", "noise"))
    assert len(a) > 4 and same(a, b)
    for file in (tmp_path / "noise" / "train" / "masks").glob("img[1-9].png"):
        file.unlink()  # one mask is enough
    assert run(*options, "--data-root", tmp_path / "noise", "--out", tmp_path / "out_one") == 0
    assert same(a, trained_weights(tmp_path / "out_one"))


def test_bare_command_compares_draws_and_predicts(tmp_path, capsys):
    out = ["--out", tmp_path]
    assert run(*TINY, *out, "--exemplar", "auto:2", "--rounds", 2) == 0
    folder = tmp_path / "caudo_diff" / "synthetic" / "seed0"
    result = json.loads((folder / "result.json").read_text())
    assert list(result["rows"]) == list(caudo_diff.ROWS)
    assert all(set(row) == set(caudo_diff.METRICS) for row in result["rows"].values())
    assert set(result["pseudo_labels"]) == {"initial", "calibrated"}
    assert len(result["exemplars"]) == 2 and "calibration.png" in capsys.readouterr().out
    for name in ("expansion", "calibration"):
        assert len(list(folder.rglob(f"{name}.png"))) == 2
    before = trained_weights(tmp_path)
    steps = {f.name: torch.load(f, weights_only=True).get("step") for f in folder.rglob("*.pt")}
    assert steps["full_supervision.pt"] == steps["exemplar.pt"] + 2 * steps["caudo_diff_2.pt"]
    assert run(*TINY, *out, "--latent-factor", 8, "--eval-only") == 2
    assert run(*TINY, *out, "--exemplar", "auto:2", "--rounds", 2, "--eval-only") == 0
    assert json.loads((folder / "result.json").read_text())["rows"] == result["rows"]
    assert same(before, trained_weights(tmp_path))
    Image.new("RGB", (50, 30)).save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no image")
    assert run(*TINY, *out, "--predict", tmp_path / "a.png", tmp_path / "text.png") == 2
    assert "text.png" in capsys.readouterr().err
    assert Image.open(folder / "predictions" / "a_mask.png").size == (50, 30)


@pytest.mark.parametrize(
    ("how", "when"), [(signal.SIGINT, "exemplar.pt"), (signal.SIGKILL, "caudo_diff_1.pt")]
)
def test_resume_after_a_signal_equals_an_unbroken_run(tmp_path, how, when):
    command = [*TINY, "--no-compare", "--max-steps", "12", "--save-every", "3", "--rounds", "2"]
    assert run(*command, "--out", tmp_path / "whole") == 0
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *command, "--out", tmp_path / "cut"], env=env, stderr=-1
    )
    deadline = time.time() + 60
    while not list(tmp_path.glob(f"cut/**/{when}")) and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    err = process.communicate()[1].decode()
    assert how == signal.SIGKILL or (process.returncode == 130 and "--resume" in err)
    assert not list(tmp_path.glob("cut/**/best.pt"))
    assert run(*command, "--out", tmp_path / "cut", "--resume") == 0
    assert same(trained_weights(tmp_path / "whole"), trained_weights(tmp_path / "cut"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--size", "7"], "--size"),
        (["--exemplar", "img99"], "img99"),
        (["--exemplar", "auto:x"], "auto:x"),
        (["--exemplar", "empty"], "empty"),
        (["--t-star", "1000"], "--t-star"),
        (["--rounds", "0"], "--rounds"),
        (["--exemplar", "auto:0"], "auto:0"),
        (["--srgb", "0"], "CRF"),
        (["--kappa", "nan"], "--kappa"),
        (["--checkpoint", "best.pt"], "--checkpoint"),
        (["--width", "20"], "--width"),
        (["--device", "tpu7"], "--device"),
        (["--data-root", "nowhere"], "nowhere"),
        (["--data-root", "single"], "unlabelled"),
        (["--eval-only"], "no checkpoint"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "mine")
    make_folder(tmp_path / "single", n=2)  # one of which is for validation
    for kind, size in (("images", (90, 33)), ("masks", (90, 33))):  # images may differ in size
        Image.new("L", size).save(tmp_path / "mine" / "train" / kind / "empty.png")
    base = [*TINY, "--data", "folder", "--exemplar", "img0", "--data-root", "mine"]
    assert run(*base, "--out", "out", *flags) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert words in err[-1] and "Traceback" not in "".join(err)
