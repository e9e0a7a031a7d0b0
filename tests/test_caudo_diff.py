"""Caudo-Diff: its mathematics, the one mask it may read, the encoder that it keeps."""

import inspect
import itertools
import shutil

import pytest
import torch
from conftest import TINY, result, run, same_weights, segmentation_folder

import caudo_diff
import diffseg
import pepl

TWINS = ["autocast", "add_noise", "overlap_metrics", "consensus", "Block", "update_ema"]


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


def test_contrast_map_finds_what_half_a_mask_marks():
    img = torch.full((1, 3, 20, 30), 0.7)
    img[:, :, 5:15, 5:25] = torch.tensor([0.5, 0.3, 0.3]).view(3, 1, 1)
    truth = (img[:, :1] < 0.6).float()
    half = truth.clone()
    half[..., 15:] = 0  # the right half of the object was missed
    found = caudo_diff.contrast_map(img + 0.02 * torch.randn(img.shape), half) > 0
    assert caudo_diff.overlap_metrics(half, truth)["dice"] < 0.7
    assert caudo_diff.overlap_metrics(found, truth)["dice"] > 0.95


@pytest.mark.parametrize("anatomy", [True, False])
def test_expansion_of_anatomy_leaves_it_in_its_place(anatomy):
    images = torch.randint(0, 256, (4, 3, 48, 64)).byte()
    images[0, :, :, :32], images[0, :, :, 32:] = 50, 200
    mask = torch.zeros(1, 48, 64, dtype=torch.bool)
    mask[:, 12:36, 20:44] = True
    torch.manual_seed(0)
    x, m = caudo_diff.Expansion(images[0], mask, images, anatomy, "cpu")(32)
    assert x.shape == (32, 3, 48, 64) and x.min() >= 0 and x.max() <= 1
    assert m.shape == (32, 1, 48, 64) and m.unique().tolist() == [0, 1]
    dice = caudo_diff.dice(m > 0.5, mask.expand_as(m))
    assert (dice > 0.15).all() == anatomy
    left, right = (half.mean((1, 2, 3)) for half in (x[..., :24], x[..., 40:]))
    assert (left < right).all() == anatomy  # nothing is mirrored


def test_convex_piece_is_the_hull_of_the_central_piece():
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    far = (x - 38).hypot(y - 22)
    disc, rival, freckle = far < 10, (x - 9).hypot(y - 36) < 11, (x - 24).hypot(y - 28) < 1
    ring = disc & (far > 5) & ((x > 38) | ((y - 22).abs() > 3))  # its middle and a part missing
    triangle = (x > 20) & (y > 15) & (x - 20 + y - 15 < 20)
    edges = triangle & ((x < 22) | (y < 17))  # two of its sides; their hull is all of it
    p = torch.stack([ring | rival | freckle, edges, rival, disc & rival])[:, None] * 0.9
    hulls = torch.stack([disc, triangle, rival, disc & rival])[:, None]  # the last one is empty
    found = caudo_diff.convex_piece(p)
    assert (caudo_diff.overlap_metrics(found, hulls)["dice"] > 0.97).all()
    assert (found[1:] | ~hulls[1:]).all()  # 24 half-planes hold the hull


def test_a_prior_is_used_if_it_leaves_the_exemplar_and_the_first_labels_as_they_are():
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    disc = (x - 32).hypot(y - 24) < 12
    ring = disc & ((x - 32).hypot(y - 24) > 8)
    noise = 5 * torch.randn(3, 48, 64)

    def chosen(mask, coloured):
        img = torch.where(coloured, 60.0, 180.0).add(noise).byte()
        images, labels = img.expand(3, -1, -1, -1), 0.9 * mask.expand(3, 1, -1, -1)
        return caudo_diff.choose_prior(img, mask[None], images, labels, "cpu")

    assert chosen(disc, disc) == caudo_diff.ImagePrior(colour_edges=True, convex_piece=True)
    assert chosen(ring, ring) == caudo_diff.ImagePrior(colour_edges=True, convex_piece=False)
    assert chosen(disc, x < 32) == caudo_diff.ImagePrior(colour_edges=False, convex_piece=True)


def test_one_mask_is_enough_and_others_change_nothing(tmp_path, capsys):
    root = segmentation_folder(tmp_path / "set", n=6)
    flags = ["--data", "folder", "--data-root", root, "--exemplar", "img0", "--encoder", "scratch"]
    flags += ["--method", "caudo_diff_prior", "--out"]
    assert run(caudo_diff, *TINY[caudo_diff], *flags, tmp_path / "six") == 0
    for path in (root / "train/masks_0").glob("img[1-5].png"):
        path.unlink()
    shutil.rmtree(root / "test")
    capsys.readouterr()
    assert run(caudo_diff, *TINY[caudo_diff], *flags, tmp_path / "one") == 0
    assert "no masks of test images" in capsys.readouterr().out
    assert same_weights(tmp_path / "six", tmp_path / "one")


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_a_checkpoint_holds_its_encoder(name, tmp_path, monkeypatch):
    whole, asked = caudo_diff.Encoder, []

    def encoder(name, pretrained=True):
        asked.append(pretrained)
        return whole(name, pretrained=False)  # random weights instead of a download

    monkeypatch.setattr(caudo_diff, "Encoder", encoder)
    flags = [*TINY[caudo_diff], "--method", "self_training", "--encoder", name, "--out", tmp_path]
    assert run(caudo_diff, *flags) == 0
    before = result(tmp_path)
    assert run(caudo_diff, *flags, "--eval-only") == 0
    assert result(tmp_path) == before and asked == [True, False, False]
