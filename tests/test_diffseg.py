"""DiffSeg: its mathematics against independent references, and what it may see."""

import numpy as np
import pytest
import torch
from conftest import TINY, error_lines, result, run, same_weights, segmentation_folder

import crf
import data
import diffseg


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("t", [0, 20, 400, 999])
def test_noise_and_difference_are_those_of_the_papers_pseudo_noises(t):
    x0, eps, healthy, lesion = random(4, 2, 3, 4, 4)
    xt = diffseg.add_noise(x0, torch.full((2,), t), eps).double()
    a = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: t + 1])
    assert torch.allclose(xt, np.sqrt(a) * x0.double() + np.sqrt(1 - a) * eps, atol=1e-5)
    pseudo = [(xt - np.sqrt(a) * x0_hat) / np.sqrt(1 - a) for x0_hat in (healthy, lesion)]
    expected = ((pseudo[1] - pseudo[0]) * np.sqrt(1 - a) / np.sqrt(a)).mean(1).clamp(min=0)
    low, high = expected.amin((1, 2), keepdim=True), expected.amax((1, 2), keepdim=True)
    found = diffseg.diffusion_difference(healthy, lesion)[:, 0].double()
    assert torch.allclose(found, (expected - low) / (high - low), atol=1e-4)


def test_ged_ambiguity_and_correlation_by_explicit_loops():
    s, y = random(3, 5, 6, 7) > 0.5, random(3, 2, 6, 7, seed=1) > 0.4
    s[0, 0] = s[0, 1] = y[0, 0] = False  # empty against empty and against full

    def mean(a, b):
        pairs = [((p & q).sum().item(), (p | q).sum().item()) for p in a for q in b]
        return np.mean([1 - inter / union if union else 0.0 for inter, union in pairs])

    expected = [2 * mean(a, b) - mean(a, a) - mean(b, b) for a, b in zip(s, y, strict=True)]
    assert diffseg.ged(s, y).tolist() == pytest.approx(expected, abs=1e-5)
    a, b = diffseg.ambiguity(s), diffseg.ambiguity(y)
    assert np.allclose(a, s.numpy().var(1), atol=1e-6)
    expected = [np.corrcoef(p.ravel(), q.ravel())[0, 1] for p, q in zip(a, b, strict=True)]
    assert diffseg.correlation(a, b).tolist() == pytest.approx(expected, abs=1e-5)
    assert diffseg.correlation(a, torch.zeros_like(b)).tolist() == [0, 0, 0]


def test_overlap_metrics_by_hand_and_empty_masks():
    pred = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).view(4, 1, 2, 2)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]).view(4, 1, 2, 2)
    expected = {"dice": [2 / 3, 1, 0, 6 / 7], "iou": [0.5, 1, 0, 0.75]}
    expected |= {"precision": [2 / 3, 1, 0, 0.75], "recall": [2 / 3, 1, 0, 1]}
    metrics = diffseg.overlap_metrics(pred, mask)
    assert diffseg.thresholded_jaccard(metrics["iou"]).tolist() == [0, 1, 0, 0.75]
    for metric, found in metrics.items():
        assert found.tolist() == pytest.approx(expected[metric])


def test_otsu_minimises_the_variance_within_the_two_classes():
    x = torch.cat([random(60) * 0.4, 0.5 + 0.4 * random(30, seed=1)])

    def within(cut):
        return sum(len(part) * part.var() for part in (x[x <= cut], x[x > cut]))

    found = diffseg.otsu_threshold(x[None])[0]
    assert within(found) <= 1.02 * min(map(within, np.arange(0.1, 0.8, 0.01)))


def test_tags_known_pixels_and_the_level_that_fits_them():
    n, mask = 8, torch.zeros(8, 1, 96, 128).byte()
    mask[:, :, 30:70, 40:90] = 1
    split = data.SegmentationSet("", [], mask.expand(-1, 3, -1, -1), mask, "")
    tiles = diffseg.Tiles(split, diffseg.parse_args(["--device", "cpu"]))
    known, healthy = tiles.known(torch.arange(n)), torch.zeros(n, 96, 128)
    for i, k in np.ndindex(n, diffseg.TAGS):
        x, y, w, h = tiles.windows[i, k].tolist()
        share, tag = mask[i, 0, y : y + h, x : x + w].float().mean(), tiles.tags[i, k]
        assert x >= 0 and y >= 0 and x + w <= 128 and y + h <= 96
        assert (share == 0) == (tag == diffseg.HEALTHY)
        assert (share >= 0.9) == (tag == diffseg.LESION)
        healthy[i, y : y + h, x : x + w] += tag == diffseg.HEALTHY
    assert torch.equal(known[:, 1] > 0, healthy > 0)
    assert known[:, 0].any() and known.sum(1).max() == 1
    # From a ramp that falls from its centre the tags' level gives the mask back.
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    ramp = -torch.maximum((y - 24.5).abs() / 10, (x - 32).abs() / 12.5)
    found = ramp > diffseg.fit_level(ramp, tiles.windows[0], tiles.tags[0])
    assert diffseg.overlap_metrics(found[None, None], mask[:1, :, ::2, ::2])["dice"] > 0.9


def test_implants_change_nothing_outside_their_blob():
    args = diffseg.parse_args(["--size", "32x16", "--device", "cpu"])
    split = data.load_segmentation("synthetic", "", "train", (32, 64), limit=30)
    torch.manual_seed(0)
    implanted, healthy, blob = diffseg.Tiles(split, args).implant(16)
    difference = (implanted - healthy).abs().amax(1, keepdim=True)
    assert difference[blob < 1e-3].max() < 0.01 < difference[blob > 0.9].mean()


def test_thresholds_have_the_best_dice_and_their_spread_the_lowest_ged(monkeypatch):
    args = diffseg.parse_args(TINY[diffseg])
    ramp = torch.linspace(0.02, 0.98, 32).expand(4, args.outputs, *args.size)
    monkeypatch.setattr(diffseg, "outputs", lambda *_: torch.logit(ramp))
    raters = ramp[:, :3] > torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    for masks, wide in ((raters, True), (raters[:, 1:2], False)):
        val = data.SegmentationSet("", [], (ramp[:, :3] * 255).to(torch.uint8), masks, "")
        thresholds = diffseg.calibrate("diffseg", None, val, args)
        assert diffseg.mask_dice(torch.logit(ramp) - thresholds, masks).tolist() == [1] * 4
        assert (thresholds.max() > thresholds.min()) == wide


def test_large_images_in_parts_have_the_same_gradients():
    args = diffseg.parse_args(["--size", "4096", "--width", "16"])  # large: parts of 8 images
    net, x = diffseg.build("diffseg", args).eval(), 2 * random(10, 3, 16, 16) - 1
    torch.nn.init.normal_(net.head[-1].weight)
    t, y = torch.arange(10), torch.arange(10) % 2
    grads = []
    for out in (net(x, t, y), diffseg.in_parts(net, x, t, y, args)):
        grads.append(torch.autograd.grad(out.square().mean(), list(net.parameters())))
    assert all(torch.allclose(a, b, 1e-4, 1e-4) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(("size", "width"), [((24, 64), 5.0), ((16, 128), 10.0)])
def test_crfs_share_one_lattice_equal_crf_py_and_follow_the_size(size, width, monkeypatch):
    args = diffseg.parse_args(["--size", f"{size[1]}x{size[0]}"])
    img, p = (random(2, 3, *size) * 255).to(torch.uint8), random(2, 4, *size, seed=1)
    reference = crf.DenseCRF(5, 3, 0, width, diffseg.CRF_SRGB, diffseg.CRF_WEIGHT)
    q = p.mean(1)  # of all outputs, as there are as many as a CRF takes
    expected = reference(crf.unary_from_softmax(torch.stack([1 - q, q], 1)), img)[:, 1:]
    built, lattice = [], crf._Lattice
    monkeypatch.setattr(crf, "_Lattice", lambda f: built.append(len(f)) or lattice(f))
    found = diffseg.crf_integrate(torch.logit(p), img, args) + 0.5
    assert built == [2] and found.shape[1] == diffseg.CRF_ROUNDS
    assert torch.allclose(found, expected.expand_as(found), atol=1e-4)


def test_a_folder_with_several_raters_without_the_baseline(tmp_path, capsys):
    flags = ["--data", "folder", "--data-root", segmentation_folder(tmp_path, n=8, raters=2)]
    assert run(diffseg, *TINY[diffseg], *flags, "--no-compare", "--out", tmp_path) == 0
    rows, ambiguity = (result(tmp_path)[key] for key in ("rows", "ambiguity"))
    assert "unet" not in rows and list(ambiguity) == list(rows)[1:]
    assert all("correlation" in row for row in ambiguity.values())
    assert result(tmp_path)["predict"] in list(rows)[2:]  # the row that --predict uses
    (tmp_path / "test/images/img0.png").rename(tmp_path / "test/images/new.png")
    for path in tmp_path.glob("test/masks_*/img0.png"):
        path.rename(path.with_name("new.png"))
    assert run(diffseg, *TINY[diffseg], *flags, "--eval-only", "--out", tmp_path) == 2
    assert "data changed" in error_lines(capsys)[0]


def test_training_masks_serve_the_tags_alone(trained, tmp_path, monkeypatch):
    tag_tiles = diffseg.tag_tiles

    def tag_and_erase(masks, seed):
        tagged = tag_tiles(masks, seed)
        masks.zero_()
        return tagged

    whole = trained(diffseg)
    monkeypatch.setattr(diffseg, "tag_tiles", tag_and_erase)
    assert run(diffseg, *TINY[diffseg], "--no-compare", "--out", tmp_path) == 0
    assert same_weights(whole, tmp_path)
