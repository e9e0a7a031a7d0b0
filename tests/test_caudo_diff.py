"""Caudo-Diff: its mathematics, the one mask it may read, the encoder that it keeps."""

import inspect
import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, best, result, run, same_weights, segmentation_folder

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


@pytest.mark.parametrize("flags", [["--anatomy"], []])
def test_expansion_of_anatomy_leaves_it_in_its_place(flags):
    args, images = caudo_diff.parse_args(flags), torch.randint(0, 256, (4, 3, 48, 64)).byte()
    images[0, :, :, :32], images[0, :, :, 32:] = 50, 200
    mask = torch.zeros(1, 48, 64, dtype=torch.bool)
    mask[:, 12:36, 20:44] = True
    torch.manual_seed(0)
    x, m = caudo_diff.Expansion(images[0], mask, images, args)(32)
    assert x.shape == (32, 3, 48, 64) and x.min() >= 0 and x.max() <= 1
    assert m.shape == (32, 1, 48, 64) and m.unique().tolist() == [0, 1]
    dice = caudo_diff.overlap_metrics(m > 0.5, mask.expand_as(m))["dice"]
    assert (dice > 0.15).all() == bool(flags)
    left, right = (half.mean((1, 2, 3)) for half in (x[..., :24], x[..., 40:]))
    assert (left < right).all() == bool(flags)  # nothing is mirrored


def test_reliability_is_high_where_labels_agree_and_are_sure():
    p0 = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]).view(2, 1, 2, 2)
    p1 = torch.tensor([[1.0, 0.75, 0.0, 0.5], [1.0, 0.0, 1.0, 0.0]]).view(2, 1, 2, 2)
    w = caudo_diff.reliability(p0, p1).flatten(1)
    assert w[0].tolist() == pytest.approx([1, 0.75 * 0.5, 1, 0])
    assert w[1].tolist() == pytest.approx([1 / 64, 0, 0, 1 / 64])  # Dice of the masks 1/2


def test_the_label_that_calibration_changes_least_counts(monkeypatch):
    def dark(ctx, stage, img):
        return (img[:, :1] < 128).float()

    def calibrate(ctx, img, p0):  # moves all but what is 32 px wide, half of the image's width
        return p0 if img.shape[3] == 32 else p0.roll(8, 3)

    monkeypatch.setattr(caudo_diff, "segment", dark)
    monkeypatch.setattr(caudo_diff, "calibrate", calibrate)
    img = torch.full((2, 3, 48, 64), 255, dtype=torch.uint8)
    img[0, :, 16:32, 16:32] = 0  # in the other image nothing is found, at any size
    args, encoder = SimpleNamespace(anatomy=False), SimpleNamespace(layers=[])
    ctx = SimpleNamespace(args=args, encoder=encoder)
    way = caudo_diff.label_sizes(ctx, img)
    torch.testing.assert_close((way[:, -1:] > 0.5).float(), dark(ctx, "exemplar", img))


def test_the_level_is_the_lowest_that_explains_nearly_as_much_as_the_best(monkeypatch):
    torch.manual_seed(0)
    ramp = torch.linspace(-8, 8, 64).expand(2, 1, 48, 64)
    img = (torch.where(ramp > 1, 60, 180) + 9 * torch.randn(2, 3, 48, 64)).round().to(torch.uint8)
    x, mask = img.float() / 255, ramp > 1
    y = caudo_diff.opponent(x)
    left, right = (y[..., part].flatten(2) for part in (~mask[0, 0, 0], mask[0, 0, 0]))
    between = y.flatten(2).var(2, unbiased=False).sum(1)
    for part in (left, right):
        between = between - part.var(2, unbiased=False).sum(1) * part.shape[2] / (48 * 64)
    expected = between / y.flatten(2).var(2, unbiased=False).sum(1)
    torch.testing.assert_close(caudo_diff.variance_explained(x, mask), expected)
    assert caudo_diff.variance_explained(x, ramp > 9).tolist() == [0, 0]
    monkeypatch.setattr(caudo_diff, "segment", lambda ctx, stage, img: ramp.sigmoid())
    ctx = SimpleNamespace(levels={}, args=SimpleNamespace(device="cpu"))
    caudo_diff.choose_level(ctx, "caudo_diff_3", img)
    assert 0 < ctx.levels["caudo_diff_3"] <= 1


def test_one_object_is_the_hull_of_the_central_piece():
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    far = (x - 38).hypot(y - 22)
    disc, rival, freckle = far < 10, (x - 9).hypot(y - 36) < 11, (x - 24).hypot(y - 28) < 1
    ring = disc & (far > 5) & ((x > 38) | ((y - 22).abs() > 3))  # its middle and a part missing
    triangle = (x > 20) & (y > 15) & (x - 20 + y - 15 < 20)
    edges = triangle & ((x < 22) | (y < 17))  # two of its sides; their hull is all of it
    p = torch.stack([ring | rival | freckle, edges, rival, disc & rival])[:, None] * 0.9
    hulls = torch.stack([disc, triangle, rival, disc & rival])[:, None]  # the last one is empty
    found = caudo_diff.one_object(p)
    assert (caudo_diff.overlap_metrics(found, hulls)["dice"] > 0.97).all()
    assert (found[1:] | ~hulls[1:]).all()  # 24 half-planes hold the hull


@pytest.mark.parametrize("convex", [True, False])
def test_rows_of_a_convex_exemplar_are_convex(convex, monkeypatch):
    ring = torch.zeros(1, 1, 48, 64, dtype=torch.bool)
    ring[..., 14:34, 20:44], ring[..., 20:28, 28:36] = True, False
    monkeypatch.setattr(caudo_diff, "segment", lambda ctx, stage, img: ring * 0.9)
    nets = {"self_training_1": None, "caudo_diff_1": None, "full_supervision": None}
    ctx = SimpleNamespace(args=SimpleNamespace(rounds=1), nets=nets, convex=convex)
    test = SimpleNamespace(images=torch.zeros(1, 3, 48, 64, dtype=torch.uint8), masks=ring)
    rows, pred = caudo_diff.evaluate(ctx, test, ring[0])
    same = {row: values["dice"] == 1 for row, values in rows.items()}
    assert same["exemplar_copied"] and same["full_supervision"]
    assert same["self_training"] == same["caudo_diff"] == (not convex)
    assert pred[0, 0, 24, 32] == convex


def test_other_masks_are_never_read_in_training(tmp_path):
    root = segmentation_folder(tmp_path / "set", n=6)
    flags = ["--data", "folder", "--data-root", root, "--exemplar", "img0", "--no-compare", "--out"]
    assert run(caudo_diff, *TINY[caudo_diff], *flags, tmp_path / "six") == 0
    for path in (root / "train/masks_0").glob("img[1-5].png"):
        path.unlink()
    assert run(caudo_diff, *TINY[caudo_diff], *flags, tmp_path / "one") == 0
    assert same_weights(tmp_path / "six", tmp_path / "one")
    assert torch.load(best(tmp_path / "one"), weights_only=True)["convex"]


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_a_checkpoint_holds_its_encoder(name, tmp_path, monkeypatch):
    whole, asked = caudo_diff.Encoder, []

    def encoder(name, size, pretrained=True):
        asked.append(pretrained)
        return whole(name, size, pretrained=False)  # random weights instead of a download

    monkeypatch.setattr(caudo_diff, "Encoder", encoder)
    flags = [*TINY[caudo_diff], "--no-compare", "--encoder", name, "--out", tmp_path]
    assert run(caudo_diff, *flags) == 0
    before = result(tmp_path)
    assert run(caudo_diff, *flags, "--eval-only") == 0
    assert result(tmp_path) == before and asked == [True, False, False]
