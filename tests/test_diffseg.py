"""DiffSeg: its mathematics against independent references, and what it may see."""

import re
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    NOISE,
    TINY,
    best,
    error_lines,
    result,
    run,
    same_weights,
    save,
    segmentation_folder,
)

import crf
import data
import diffseg

FLAGS = TINY[diffseg][: -1 - len(diffseg.STAGES)]  # without --method


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


def test_ged_and_ambiguity_by_explicit_loops():
    s, y = random(3, 5, 6, 7) > 0.5, random(3, 2, 6, 7, seed=1) > 0.4
    s[0, 0] = s[0, 1] = y[0, 0] = False  # empty against empty and against full

    def mean(a, b):
        pairs = [((p & q).sum().item(), (p | q).sum().item()) for p in a for q in b]
        return np.mean([1 - inter / union if union else 0.0 for inter, union in pairs])

    expected = [2 * mean(a, b) - mean(a, a) - mean(b, b) for a, b in zip(s, y, strict=True)]
    assert diffseg.ged(s, y).tolist() == pytest.approx(expected, abs=1e-5)
    assert np.allclose(diffseg.ambiguity(s), s.numpy().var(1), atol=1e-6)


def test_overlap_metrics_by_hand_and_empty_masks():
    pred = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).view(4, 1, 2, 2)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]).view(4, 1, 2, 2)
    expected = {"dice": [2 / 3, 1, 0, 6 / 7], "iou": [0.5, 1, 0, 0.75]}
    expected |= {"precision": [2 / 3, 1, 0, 0.75], "recall": [2 / 3, 1, 0, 1]}
    for metric, found in diffseg.overlap_metrics(pred, mask).items():
        assert found.tolist() == pytest.approx(expected[metric])


def disc_set(n=8):
    """n images of noise, uint8 (n, 3, 96, 128), with a lesion at one place, and their tags."""
    mask = torch.zeros(n, 1, 96, 128).byte()
    mask[:, :, 30:70, 40:90] = 1
    img = (random(n, 3, 96, 128) * 255).byte()
    return diffseg.TaggedImages(img, *diffseg.tag_tiles(mask, diffseg.TILES, seed=0)), mask


def test_tags_and_the_pixels_of_their_tiles():
    tagged, mask = disc_set()
    healthy = torch.zeros(len(mask), 96, 128)
    for i, k in np.ndindex(*tagged.tags.shape):
        x, y, w, h = (tagged.tiles[i, k] * torch.tensor([128, 96, 128, 96])).round().int().tolist()
        share, tag = mask[i, 0, y : y + h, x : x + w].float().mean(), tagged.tags[i, k]
        assert x >= 0 and y >= 0 and x + w <= 128 and y + h <= 96
        assert (share == 0) == (tag == diffseg.HEALTHY)
        assert (share >= 0.9) == (tag == diffseg.LESION)
        healthy[i, y : y + h, x : x + w] += tag == diffseg.HEALTHY
    lesion, found = diffseg.tile_masks(tagged.tiles, tagged.tags, (96, 128))
    assert torch.equal(found[:, 0] > 0, healthy > 0)
    assert lesion.any() and not (lesion * found).any()
    fewer = diffseg.tag_tiles(mask, 4, seed=0)
    assert torch.equal(fewer[0], tagged.tiles[:, :4]) and torch.equal(fewer[1], tagged.tags[:, :4])


def test_the_threshold_that_fits_the_tags_gives_the_mask_back():
    tagged, mask = disc_set()
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    ramp = -torch.maximum((y - 24.5).abs() / 10, (x - 32).abs() / 12.5).expand(8, -1, -1)
    threshold = diffseg.fit_threshold(ramp, tagged.tiles, tagged.tags)
    for level in (threshold, diffseg.thresholds_from_tags(ramp[:, None], *tagged[1:]).mean()):
        found = ramp > level.view(-1, 1, 1)
        metrics = diffseg.overlap_metrics(found[:, None], mask[:, :, ::2, ::2])
        assert metrics["dice"].min() > 0.9
    no_tags = torch.full_like(tagged.tags, diffseg.NO_TAG)
    assert diffseg.contradicted_tags(ramp, tagged.tiles, no_tags).sum() == 0


def test_a_batch_has_implants_that_differ_within_their_blob_and_images_known_in_tiles():
    tagged, _ = disc_set()
    torch.manual_seed(0)
    implants = diffseg.implant_batch(tagged, 16, "cpu")
    difference = (implants.x - implants.target).abs().amax(1, keepdim=True)
    assert (
        difference[implants.lesion < 1e-3].max() < 0.01 < difference[implants.lesion > 0.9].mean()
    )
    images = diffseg.image_batch(tagged, 16, "cpu")
    assert torch.equal(images.target, images.x)
    assert torch.equal(images.known, images.lesion_known * (1 - images.lesion))
    batch = diffseg.diffseg_batch(tagged, 24, "cpu")
    as_it_is = batch.y == diffseg.AS_IT_IS
    assert as_it_is.any() and (batch.known[as_it_is] == 1).all()
    assert torch.equal(batch.x[as_it_is], batch.target[as_it_is])


def test_thresholds_have_the_best_dice_and_their_spread_the_lowest_ged():
    ramp = torch.linspace(0.02, 0.98, 32).expand(4, 6, 16, 32)
    raters = ramp[:, :3] > torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    for masks, wide in ((raters, True), (raters[:, 1:2], False)):
        thresholds = diffseg.choose_thresholds(torch.logit(ramp), masks)
        one = diffseg.one_mask(torch.logit(ramp) - thresholds)
        assert diffseg.overlap_metrics(one, masks[:, -2:-1] if wide else masks)["dice"].min() > 0.99
        assert (thresholds.max() > thresholds.min()) == wide


def test_learning_rate_rises_for_a_tenth_of_the_steps_then_falls():
    rates = [diffseg.learning_rate(step, 200) for step in range(200)]
    assert rates[:20] == pytest.approx(np.arange(1, 21) / 20) and rates[20] == 1
    assert all(np.diff(rates[20:]) < 0) and rates[-1] < 0.001
    assert diffseg.learning_rate(99, 5000) == 1 > diffseg.learning_rate(98, 5000)


@pytest.mark.parametrize(("size", "width"), [((24, 64), 5.0), ((16, 128), 10.0)])
def test_crf_has_no_spatial_kernel_and_follows_the_size(size, width):
    img, p = (random(2, 3, *size) * 255).to(torch.uint8), random(2, 4, *size, seed=1)
    reference = crf.DenseCRF(5, 3, 0, width, diffseg.CRF_SRGB, diffseg.CRF_WEIGHT)
    q = p.mean(1)  # of all outputs, as there are as many as a CRF takes
    expected = reference(crf.unary_from_softmax(torch.stack([1 - q, q], 1)), img)[:, 1:]
    found = diffseg.crf_integrate(torch.logit(p), img, seed=0) + 0.5
    assert found.shape[1] == diffseg.CRF_RESULTS
    assert torch.allclose(found, expected.expand_as(found), atol=1e-5)


def folder_flags(root, out):
    return [*FLAGS, "--data", "folder", "--data-root", root, "--out", out]


def test_a_folder_with_several_raters_and_changed_test_images(tmp_path, capsys):
    flags = folder_flags(segmentation_folder(tmp_path, n=8, raters=2), tmp_path)
    assert run(diffseg, *flags, "--method", "tags_unet") == 0
    assert list(result(tmp_path)["rows"]) == ["tags_unet", "tags_unet_crf"]
    assert result(tmp_path)["predict"] in result(tmp_path)["rows"]
    (tmp_path / "test/images/img0.png").rename(tmp_path / "test/images/new.png")
    for path in tmp_path.glob("test/masks_*/img0.png"):
        path.rename(path.with_name("new.png"))
    assert run(diffseg, *flags, "--eval-only") == 2
    assert "data changed" in error_lines(capsys)[0]


def test_resume_adds_rows(tmp_path, trained):
    flags = [*FLAGS, "--out", tmp_path]
    assert run(diffseg, *flags, "--method", "tags_unet") == 0
    assert run(diffseg, *flags, "--resume", "--method", "diffseg_student", "tags_unet") == 0
    assert same_weights(trained(diffseg), tmp_path)
    found = result(tmp_path)
    assert {"tags_unet", "diffseg_student"} < found["rows"].keys() and " && " in found["command"]


def test_tags_in_a_file_replace_the_masks(tmp_path, capsys):
    root = segmentation_folder(tmp_path / "mine", n=12)
    flags = folder_flags(root, tmp_path / "out")
    methods = ["--method", "diffseg_student"]
    assert run(diffseg, *flags, *methods) == 0
    tags = root / "train/tags.csv"
    assert run(diffseg, *flags, "--write-tags", tags) == 0
    assert run(diffseg, *flags, "--write-tags", tags) == 2 and "exists" in error_lines(capsys)[0]
    (root / "train/masks_0").rename(tmp_path / "train_masks")
    assert run(diffseg, *flags, *methods, "--out", tmp_path / "tags") == 0
    assert same_weights(tmp_path / "out", tmp_path / "tags")
    assert result(tmp_path / "out")["rows"] == result(tmp_path / "tags")["rows"]
    assert run(diffseg, *flags, "--method", "unet") == 2 and "masks" in error_lines(capsys)[0]
    # Without any masks: thresholds from the tags, no table, but predictions.
    shutil.rmtree(root / "val/masks_0")
    shutil.rmtree(root / "test")
    tags.write_text("\n".join(tags.read_text().splitlines()[:-12]))  # the last image has none
    assert run(diffseg, *flags, "--out", tmp_path / "no") == 0
    assert {"no masks", "1 of 12 images"} <= set(
        re.findall("no masks|1 of 12 images", capsys.readouterr().out)
    )
    state = torch.load(path := best(tmp_path / "no"), weights_only=True)
    assert state["row"] == "diffseg_student" and not path.with_name("result.json").exists()
    assert run(diffseg, "--predict", root / "train", "--checkpoint", path, "--out", tmp_path) == 0
    assert len(list(tmp_path.rglob("*_mask.png"))) == 12


@pytest.mark.parametrize(
    "line, words",
    [
        ("img9.png,0,0,10,10,healthy", "'img9.png' is no image in"),
        ("img0.png,0,0,10,10,sick", "the tag is 'sick', not one of healthy, mixed, lesion"),
        (
            "img0.png,60,0,10,10,lesion",
            "is no rectangle inside the image, which has (64, 48) pixels",
        ),
        ("img0.png,0,0,nan,10,lesion", "no rectangle"),
        ("img0.png,0.1,0.1,0.5,0.5,lesion", "no rectangle"),  # shares of the image
        ('"img0.png,0,0,10,10,lesion', "correct the quotation marks"),
        ("img0.png,0,5,10,10,10,lesion", "has 7 cells for 6 columns"),  # a decimal comma
        ("img0.png,0,0,10", "has 4 cells for 6 columns"),
        ("img0.png,0,0,10,10,healthy", "no tile of 1 training images is tagged lesion"),
    ],
)
def test_wrong_tags_get_one_line(line, words, tmp_path, capsys):
    root = segmentation_folder(tmp_path, n=3)
    (root / "train/tags.csv").write_text(f"image,left,top,width,height,tag\n{line}\n")
    assert run(diffseg, *folder_flags(root, tmp_path)) == 2
    (found,) = error_lines(capsys)
    assert "tags.csv" in found and words in found


def test_tags_csv_of_a_spreadsheet_for_turned_images_behind_a_link(tmp_path):
    for k, name in enumerate(["one.tif", "two.png", "three.jpg"]):
        save(tmp_path / "mine/train/images/sub" / name, NOISE[k], turn=6)  # upright 32 x 48
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    tags = data.find_tags("folder", tmp_path / "link") or tmp_path / "mine/train/tags.csv"
    files = sorted((tmp_path / "mine/train/images/sub").iterdir())
    rows = [f"sub/{file.name.upper()};8;12;16;24;Lesion" for file in files]
    text = "\ufeffImage;left;top;width;height;tag\r\n" + "\r\n".join(rows) + "\r\n;;;;;\r\n"
    tags.write_text(text, "utf-8")
    assert data.find_tags("folder", tmp_path / "link") == tags.resolve()
    tiles, found = data.read_tags(tags.resolve(), files, diffseg.TAG_NAMES)
    assert (tiles == torch.tensor([0.25, 0.25, 0.5, 0.5])).all() and (found == 2).all()
    data.write_tags(tags, tags.with_name("images"), files, tiles, found, diffseg.TAG_NAMES)
    assert torch.equal(data.read_tags(tags, files, diffseg.TAG_NAMES)[0], tiles)
    tags.rename(tmp_path / "mine/tags.csv")
    with pytest.raises(data.DataError, match="move it to"):
        data.find_tags("folder", tmp_path / "mine")


def test_masks_that_are_added_later(tmp_path, capsys):
    root = segmentation_folder(tmp_path, n=8) / "train"  # a set without split folders
    flags = folder_flags(root, tmp_path / "out")
    assert run(diffseg, *flags, "--write-tags", tmp_path / "tags.csv") == 0
    (tmp_path / "tags.csv").rename(root / "tags.csv")
    (root / "masks_0").rename(tmp_path / "masks_0")
    assert run(diffseg, *flags, "--method", "tags_unet") == 0
    (tmp_path / "masks_0").rename(root / "masks_0")
    assert run(diffseg, *flags, "--eval-only") == 2  # all images were used for training
    assert "drawn for testing" in error_lines(capsys)[0]
    assert run(diffseg, *flags, "--overwrite", "--method", "tags_unet") == 0
    assert run(diffseg, *flags, "--resume", "--method", "tags_unet", "unet") == 0
    assert "unet" in result(tmp_path / "out")["rows"]
    tags = root / "tags.csv"
    tags.write_text(tags.read_text().replace("mixed", "healthy", 1))
    methods = ["tags_unet", "unet", "diffseg"]
    assert run(diffseg, *flags, "--resume", "--method", *methods) == 2  # before training diffseg
    assert "data changed" in error_lines(capsys)[0]
    assert not list((tmp_path / "out").rglob("last_diffseg.pt"))


def test_training_masks_serve_the_tags_alone(trained, tmp_path, monkeypatch):
    tag_tiles = diffseg.tag_tiles

    def tag_and_erase(masks, *args):
        tagged = tag_tiles(masks, *args)
        masks.zero_()
        return tagged

    monkeypatch.setattr(diffseg, "tag_tiles", tag_and_erase)
    students = ["--method", "tags_student", "diffseg_student"]
    assert run(diffseg, *FLAGS, *students, "--out", tmp_path) == 0
    assert same_weights(trained(diffseg), tmp_path)
