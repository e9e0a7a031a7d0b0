"""DiffSeg: its mathematics against independent references, and its real command lines."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import crf
import data
import diffseg

TINY = ["--quick", "--size", "32x16", "--width", "16", "--device", "cpu"]
OURS = ["diffseg", "diffseg_crf", "diffseg_student", "diffseg_student_crf"]


def run(*argv):
    """Call the command line in this process; returns its exit status."""
    try:
        diffseg.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code
    return 0


def folder_of(out, name="synthetic"):
    return Path(out, "diffseg", name, "seed0-quick")


def same_weights(*outs):
    a, b = (torch.load(folder_of(out) / "best.pt", weights_only=True)["nets"] for out in outs)
    return list(a) == list(b) and all(torch.equal(a[s][k], b[s][k]) for s in a for k in a[s])


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    assert run(*TINY, "--out", out) == 0
    return out


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
    expected |= {"thresholded_jaccard": [0, 1, 0, 0.75]}
    for metric, found in diffseg.overlap_metrics(pred, mask).items():
        assert found.tolist() == pytest.approx(expected[metric])


def test_otsu_minimises_the_variance_within_the_two_classes():
    x = torch.cat([random(60) * 0.4, 0.5 + 0.4 * random(30, seed=1)])
    within = [
        sum(len(p) * p.var() for p in (x[x <= c], x[x > c])) for c in np.arange(0.1, 0.8, 0.01)
    ]
    cut = diffseg.otsu_threshold(x[None])
    assert sum(len(p) * p.var() for p in (x[x <= cut[0]], x[x > cut[0]])) <= 1.02 * min(within)


def test_tags_known_pixels_and_the_level_that_fits_them(monkeypatch):
    mask, n, summed, whole = torch.zeros(8, 1, 96, 128).byte(), 8, [], diffseg.consensus
    mask[:, :, 30:70, 40:90] = 1
    monkeypatch.setattr(diffseg, "consensus", lambda m: summed.append(len(m)) or whole(m))
    split = data.SegmentationSet("", "", [], mask.expand(-1, 3, -1, -1), mask, "")
    tiles = diffseg.Tiles(split, diffseg.parse_args(["--device", "cpu"]))
    assert summed == [1] * n  # never float64 sums of all images at once
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
    args, ramp = diffseg.parse_args(TINY), torch.linspace(0.02, 0.98, 32).expand(4, 6, 16, 32)
    monkeypatch.setattr(diffseg, "outputs", lambda *_: torch.logit(ramp))
    raters = ramp[:, :3] > torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    for masks, wide in ((raters, True), (raters[:, 1:2], False)):
        val = data.SegmentationSet("", "", [], (ramp[:, :3] * 255).to(torch.uint8), masks, "")
        thresholds = diffseg.calibrate("diffseg", None, val, args)
        assert diffseg.mask_dice(torch.logit(ramp) - thresholds, masks).tolist() == [1] * 4
        assert (thresholds.max() > thresholds.min()) == wide


@pytest.mark.parametrize(("size", "width"), [((24, 64), 5.0), ((16, 128), 10.0)])
def test_crfs_of_one_image_share_one_lattice_that_follows_the_size(monkeypatch, size, width):
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


def test_a_run_writes_all_results_and_repeats_them(trained, capsys):
    folder = folder_of(trained)
    result = json.loads((folder / "result.json").read_text())
    assert list(result["rows"]) == ["otsu", "unet", *OURS]
    assert all(list(row) == list(diffseg.METRICS) for row in result["rows"].values())
    assert list(result["ambiguity"]) == ["unet", *OURS]
    assert Image.open(folder / "figures" / "panel.png").width > 500
    again = ["--eval-only", "--checkpoint", folder / "best.pt"]
    assert run(*again) == 0 and "panel.png" in capsys.readouterr().out
    assert run(*again, "--outputs", 2) == 2 and "--outputs" in capsys.readouterr().err
    assert json.loads((folder / "result.json").read_text()) == result


def test_resume_is_exact_and_nothing_is_left_of_an_earlier_run(trained, tmp_path, monkeypatch):
    whole, calls = diffseg.blend_loss, []
    command = [*TINY, "--out", tmp_path, "--save-every", 4]

    def interrupted(*a):
        calls.append(a)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return whole(*a)

    folder_of(tmp_path).mkdir(parents=True)
    (folder_of(tmp_path) / "best.pt").write_text("an earlier run's")
    monkeypatch.setattr(diffseg, "blend_loss", interrupted)
    assert run(*command) == 130 and not (folder_of(tmp_path) / "best.pt").exists()
    assert run(*command, "--resume") == 0 and len(calls) == 8  # steps 5 and 6 once more
    assert same_weights(trained, tmp_path)


def test_a_folder_with_several_raters_without_the_baseline(tmp_path):
    images, masks = data.synthetic_dermoscopy(8, (48, 64), seed=3)
    for part in (tmp_path / "my" / split for split in ("train", "val", "test")):
        for i in range(8):
            data.save_png(images[i].permute(1, 2, 0).numpy(), part / f"images/{i}.png")
            data.save_png(masks[i, 0].numpy() * 255, part / f"masks_1/{i}.png")
            data.save_png(masks[i, 1].numpy() * 255, part / f"masks_2/{i}.png")
    root = ["--data", "folder", "--data-root", tmp_path / "my", "--out", tmp_path]
    assert run(*TINY, *root, "--no-compare") == 0
    result = json.loads((folder_of(tmp_path, "my") / "result.json").read_text())
    assert list(result["ambiguity"]) == OURS == list(result["rows"])[1:]
    assert all("correlation" in row for row in result["ambiguity"].values())


def test_training_masks_serve_the_tags_alone(tmp_path, monkeypatch):
    load, changed = data.load_segmentation, []

    def other_masks(name, root, split, *rest, **more):
        found = load(name, root, split, *rest, **more)
        tags = diffseg.tag_tiles(found.masks, 0)[1]
        for k in range(40 if split == "train" else 0):  # a pixel or two, where no tag notices
            other = found.masks ^ (random(len(found), 1, 32, 64, seed=k) > 0.999)
            equal = (diffseg.tag_tiles(other, 0)[1] == tags).all(1)
            changed.append(equal.sum().item())
            found.masks = torch.where(equal[:, None, None, None], other, found.masks)
        return found

    assert run(*TINY, "--no-compare", "--out", tmp_path / "a") == 0
    monkeypatch.setattr(data, "load_segmentation", other_masks)
    assert run(*TINY, "--no-compare", "--out", tmp_path / "b") == 0
    assert sum(changed) > 5 and same_weights(tmp_path / "a", tmp_path / "b")


def test_predict_uses_the_chosen_row_and_the_images_own_size(trained, tmp_path, capsys):
    data.save_png((random(40, 60, 3).numpy() * 255).astype(np.uint8), tmp_path / "a.png")
    best = folder_of(trained) / "best.pt"
    assert run("--predict", tmp_path, "--checkpoint", best, "--out", tmp_path) == 0
    row = torch.load(best, weights_only=True)["row"]
    assert row in OURS[1:] and row in capsys.readouterr().out
    for name in ("mask", "overlay", "coherence", "ambiguity"):
        done = Image.open(folder_of(tmp_path) / "predictions" / f"a_{name}.png")
        assert done.size == (60, 40) and (name != "mask" or np.isin(done, (0, 255)).all())


def test_a_loss_that_is_not_finite_stops_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(diffseg, "diffseg_loss", lambda *_, **__: torch.tensor(float("nan")))
    assert run(*TINY, "--no-compare", "--out", tmp_path) == 2
    assert "loss is nan" in capsys.readouterr().err
