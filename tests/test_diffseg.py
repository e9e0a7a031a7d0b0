"""DiffSeg: its mathematics against independent references, and its real command lines."""

import json
import subprocess
import sys
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

    def d(a, b):
        union = (a | b).sum().item()
        return 1 - (a & b).sum().item() / union if union else 0.0

    def mean(a, b):
        return np.mean([d(p, q) for p in a for q in b])

    expected = [2 * mean(a, b) - mean(a, a) - mean(b, b) for a, b in zip(s, y, strict=True)]
    assert diffseg.ged(s, y).tolist() == pytest.approx(expected, abs=1e-5)
    assert diffseg.ged(s, s).abs().max() < 1e-6
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
    x = torch.cat([random(4, 60) * 0.4, 0.5 + 0.4 * random(4, 30, seed=1)], 1)
    found = diffseg.otsu_threshold(x)[:, 0].tolist()
    for row, threshold in zip(x.numpy(), found, strict=True):

        def within(cut, row=row):
            return sum(len(p) * p.var() for p in (row[row <= cut], row[row > cut]) if len(p))

        assert within(threshold) <= 1.02 * min(within(c) for c in np.linspace(0.01, 0.89, 400))


def test_tags_say_what_the_tiles_hold_and_known_pixels_follow():
    mask = torch.zeros(8, 1, 96, 128, dtype=torch.uint8)
    mask[:, :, 30:70, 40:90] = 1
    windows, tags = diffseg.tag_tiles(mask, seed=0)
    for tag, low, high in ((diffseg.HEALTHY, 0, 0), (diffseg.LESION, 0.899, 1)):
        chosen, images = windows[tags == tag].tolist(), (tags == tag).nonzero()[:, 0].tolist()
        assert len(chosen) > 5
        for (x, y, w, h), i in zip(chosen, images, strict=True):
            assert x >= 0 and y >= 0 and x + w <= 128 and y + h <= 96
            assert low <= mask[i, 0, y : y + h, x : x + w].float().mean() <= high
    split = data.SegmentationSet("", "", [], mask.expand(-1, 3, -1, -1), mask, "")
    tiles = diffseg.Tiles(split, diffseg.parse_args(["--device", "cpu"]))
    known, by_hand = tiles.known(torch.arange(8)), torch.zeros(8, 96, 128)
    for i, k in (tiles.tags == diffseg.HEALTHY).nonzero().tolist():
        x, y, w, h = tiles.windows[i, k].tolist()
        by_hand[i, y : y + h, x : x + w] = 1
    assert torch.equal(known[:, 1], by_hand) and known[:, 0].any() and not (known.sum(1) > 1).any()
    # From a ramp that falls from its centre the level that these tags ask for gives the mask back.
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    ramp = -torch.maximum((y - 24.5).abs() / 10, (x - 32).abs() / 12.5)
    level = diffseg.fit_level(ramp, tiles.windows[0], tiles.tags[0])
    found = (ramp > level)[None, None]
    assert diffseg.overlap_metrics(found, mask[:1, :, ::2, ::2])["dice"] > 0.9


def test_tagging_takes_no_memory_of_all_images():
    code = """if True:
        import resource, torch, diffseg
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        masks, before = torch.zeros(1, 1, 1, 1, dtype=torch.uint8), peak()
        diffseg.tag_tiles(masks.expand(2000, 1, 192, 256), seed=0)
        print(peak() - before)"""
    pytest.importorskip("resource")
    out = subprocess.check_output([sys.executable, "-c", code], cwd=Path(diffseg.__file__).parent)
    assert float(out) < 200  # MiB; a float64 of each pixel would be 750


def test_implants_change_nothing_outside_their_blob():
    args = diffseg.parse_args(["--size", "32x16", "--device", "cpu"])
    split = data.load_segmentation("synthetic", "", "train", (32, 64), limit=30)
    torch.manual_seed(0)
    implanted, healthy, blob = diffseg.Tiles(split, args).implant(16)
    difference = (implanted - healthy).abs().amax(1, keepdim=True)
    assert difference[blob < 1e-3].max() < 0.01 < difference[blob > 0.9].mean()


def test_outputs_do_not_depend_on_the_batch_and_chunks_shrink_with_the_size():
    args = diffseg.parse_args([*TINY, "--amp", "off"])
    net = diffseg.build("diffseg", args).eval()
    torch.nn.init.normal_(net.head[-1].weight)
    img = (random(3, 3, 16, 32) * 255).to(torch.uint8)
    together, alone = (diffseg.outputs("diffseg", net, x, 4, args) for x in (img, img[1:2]))
    assert together.shape == (3, 4, 16, 32) and torch.allclose(together[1:2], alone, atol=1e-3)
    assert [diffseg.chunk(diffseg.parse_args(["--size", s])) for s in ("64", "512x384")] == [48, 1]


def test_thresholds_have_the_best_dice_and_their_spread_the_lowest_ged(monkeypatch):
    args = diffseg.parse_args([*TINY, "--outputs", "8"])
    ramp = torch.linspace(0.02, 0.98, 32).expand(4, 8, 16, 32)
    monkeypatch.setattr(diffseg, "outputs", lambda *_: torch.logit(ramp))
    raters = ramp[:, :3] > torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    for masks, wide in ((raters, True), (raters[:, 1:2], False)):
        val = data.load_segmentation("synthetic", "", "val", (16, 32), limit=4)
        val.masks = masks
        thresholds = diffseg.calibrate("diffseg", None, val, args)
        margin = torch.logit(ramp) - thresholds
        assert diffseg.mask_dice(margin, masks).tolist() == [1] * 4
        assert (thresholds.max() > thresholds.min()) == wide


@pytest.mark.parametrize(("size", "width"), [((48, 64), 5.0), ((96, 128), 10.0)])
def test_crfs_of_one_image_share_one_lattice_that_follows_the_size(monkeypatch, size, width):
    args = diffseg.parse_args(["--size", f"{size[1]}x{size[0]}"])
    img, logits = (random(2, 3, *size) * 255).to(torch.uint8), 3 * random(2, 3, *size, seed=1) - 1
    reference = crf.DenseCRF(
        compat_gaussian=0, sxy_bilateral=width, srgb=diffseg.CRF_SRGB, compat_bilateral=2
    )
    p, built, lattice = logits.sigmoid(), [], crf._Lattice
    expected = [
        reference(crf.unary_from_softmax(torch.stack([1 - q, q], 1)), img)[:, 1]
        for q in p.unbind(1)
    ]
    monkeypatch.setattr(crf, "_Lattice", lambda f: built.append(len(f)) or lattice(f))
    found = diffseg.crf_refine(logits, img, args)
    assert built == [2] and torch.allclose(found + 0.5, torch.stack(expected, 1), atol=1e-4)


def test_a_run_writes_all_results_and_repeats_them(trained, capsys):
    folder = folder_of(trained)
    result = json.loads((folder / "result.json").read_text())
    assert list(result["rows"]) == ["otsu", "unet", *OURS]
    assert all(list(row) == list(diffseg.METRICS) for row in result["rows"].values())
    assert list(result["ambiguity"]) == ["unet", *OURS]
    assert all("correlation" in row for row in result["ambiguity"].values())
    assert Image.open(folder / "figures" / "panel.png").width > 500
    assert run("--eval-only", "--checkpoint", folder / "best.pt") == 0
    assert json.loads((folder / "result.json").read_text()) == result
    assert "panel.png" in capsys.readouterr().out
    assert run("--eval-only", "--checkpoint", folder / "best.pt", "--outputs", 2) == 2
    assert "--outputs" in capsys.readouterr().err
    assert json.loads((folder / "result.json").read_text()) == result


def test_resume_is_exact_and_a_new_run_leaves_nothing_of_an_earlier_one(
    trained, tmp_path, monkeypatch
):
    whole, calls = diffseg.mixed_tile_loss, []
    command = [*TINY, "--out", tmp_path, "--save-every", 4]

    def interrupted(*a):
        calls.append(a)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return whole(*a)

    folder_of(tmp_path).mkdir(parents=True)
    (folder_of(tmp_path) / "best.pt").write_text("an earlier run's")
    monkeypatch.setattr(diffseg, "mixed_tile_loss", interrupted)
    assert run(*command) == 130 and not (folder_of(tmp_path) / "best.pt").exists()
    assert run(*command, "--resume") == 0 and len(calls) == 8  # steps 5 and 6 once more
    assert same_weights(trained, tmp_path)


def test_a_folder_with_several_raters_and_without_the_baseline(tmp_path):
    images, masks = data.synthetic_dermoscopy(8, (48, 64), seed=3)
    for split in ("train", "val", "test"):
        for i, img in enumerate(images):
            data.save_png(img.permute(1, 2, 0).numpy(), tmp_path / "my" / split / f"images/{i}.png")
            for r in (0, 1):
                mask = masks[i, r].numpy() * 255
                data.save_png(mask, tmp_path / "my" / split / f"masks_{r + 1}/{i}.png")
    root = ["--data", "folder", "--data-root", tmp_path / "my", "--num-workers", 1]
    assert run(*TINY, *root, "--no-compare", "--out", tmp_path) == 0
    result = json.loads((folder_of(tmp_path, "my") / "result.json").read_text())
    assert list(result["ambiguity"]) == OURS == list(result["rows"])[1:]
    assert all("correlation" in row for row in result["ambiguity"].values())


def test_training_masks_serve_the_tags_alone(tmp_path, monkeypatch):
    load, changed = data.load_segmentation, []

    def other_masks(name, root, split, *rest, **more):
        found = load(name, root, split, *rest, **more)
        if split == "train":
            tags, n = diffseg.tag_tiles(found.masks, 0)[1], len(found)
            for k in range(40):  # a few pixels of each image, where no tag notices
                other = found.masks ^ (random(n, 1, 32, 64, seed=k) > 0.999)
                equal = (diffseg.tag_tiles(other, 0)[1] == tags).all(1)
                changed.append(equal.sum().item())
                found.masks = torch.where(equal[:, None, None, None], other, found.masks)
        return found

    command = [*TINY, "--no-compare", "--out"]
    assert run(*command, tmp_path / "a") == 0
    monkeypatch.setattr(data, "load_segmentation", other_masks)
    assert run(*command, tmp_path / "b") == 0
    assert sum(changed) > 5 and same_weights(tmp_path / "a", tmp_path / "b")


def test_predict_uses_the_chosen_row_and_the_images_own_size(trained, tmp_path, capsys):
    pixels = (random(40, 60, 3).numpy() * 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    best = folder_of(trained) / "best.pt"
    assert run("--predict", tmp_path, "--checkpoint", best, "--out", tmp_path) == 0
    row = torch.load(best, weights_only=True)["row"]
    assert row in OURS[1:] and row in capsys.readouterr().out
    done = folder_of(tmp_path) / "predictions"
    for name in ("mask", "overlay", "coherence", "ambiguity"):
        assert Image.open(done / f"a_{name}.png").size == (60, 40)
    assert set(np.unique(Image.open(done / "a_mask.png"))) <= {0, 255}


def test_a_loss_that_is_not_finite_stops_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(diffseg, "diffseg_loss", lambda *_: torch.tensor(float("nan")))
    assert run(*TINY, "--no-compare", "--out", tmp_path) == 2
    assert "loss is nan" in capsys.readouterr().err
