"""DiffSeg: its mathematics against independent references, and its real command lines."""

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

import diffseg

SCRIPT = Path(diffseg.__file__)
METRICS = {"dice", "iou", "precision", "recall", "thresholded_jaccard", "ged"}
TINY = ["--quick", "--size", "32x16", "--width", "16", "--device", "cpu", "--no-compare"]


def run(*argv):
    """Call the command line in this process; returns its exit status."""
    try:
        diffseg.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code
    return 0


def weights(folder, kind="diffseg"):
    path = Path(folder) / "diffseg" / "synthetic" / "seed0" / f"last_{kind}.pt"
    return torch.load(path, weights_only=True)["ema"]


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_noise_schedule_at_both_ends():
    x0, eps = torch.ones(2, 3, 4, 4), torch.full((2, 3, 4, 4), 2.0)
    t = torch.tensor([0, diffseg.T - 1])
    xt = diffseg.add_noise(x0, t, eps)
    betas = np.linspace(1e-4, 0.02, 1000)
    for row, a in enumerate((1 - betas[0], np.prod(1 - betas))):
        assert xt[row].mean().item() == pytest.approx(np.sqrt(a) + 2 * np.sqrt(1 - a), rel=1e-4)


@pytest.mark.parametrize("t", [1, 20, 400, 999])
def test_difference_equals_that_of_the_papers_scaled_pseudo_noises(t):
    g = torch.Generator().manual_seed(0)
    x0, eps, healthy, lesion = (torch.randn(2, 3, 4, 4, generator=g) for _ in range(4))
    xt = diffseg.add_noise(x0, torch.full((2,), t), eps).double()
    a = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: t + 1])
    pseudo = [(xt - np.sqrt(a) * x0_hat) / np.sqrt(1 - a) for x0_hat in (healthy, lesion)]
    expected = (pseudo[1] - pseudo[0]) * np.sqrt(1 - a) / np.sqrt(a)
    found = diffseg.diffusion_difference(healthy, lesion).double()
    assert torch.allclose(found, expected, atol=1e-4)


def test_ged_and_distances_by_explicit_loops():
    g = torch.Generator().manual_seed(1)
    s = torch.rand(3, 5, 6, 7, generator=g) > 0.5
    y = torch.rand(3, 2, 6, 7, generator=g) > 0.4
    s[0, 0] = s[0, 1] = y[0, 0] = False  # empty against empty and against full

    def d(a, b):
        union = (a | b).sum().item()
        return 1 - (a & b).sum().item() / union if union else 0.0

    def mean(a, b):
        return np.mean([d(p, q) for p in a for q in b])

    expected = [2 * mean(a, b) - mean(a, a) - mean(b, b) for a, b in zip(s, y, strict=True)]
    assert diffseg.ged(s, y).tolist() == pytest.approx(expected, abs=1e-5)
    assert diffseg.ged(s, s).abs().max() < 1e-6
    assert diffseg.iou_distance(s[:1], y[:1])[0, 0].tolist() == [0.0, 1.0]


def test_overlap_metrics_by_hand_and_empty_masks():
    pred = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).view(4, 1, 2, 2)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]).view(4, 1, 2, 2)
    m = diffseg.overlap_metrics(pred, mask)
    assert m["dice"].tolist() == pytest.approx([4 / 6, 1, 0, 6 / 7])
    assert m["iou"].tolist() == pytest.approx([0.5, 1, 0, 0.75])
    assert m["precision"].tolist() == pytest.approx([2 / 3, 1, 0, 0.75])
    assert m["recall"].tolist() == pytest.approx([2 / 3, 1, 0, 1])
    assert m["thresholded_jaccard"].tolist() == pytest.approx([0, 1, 0, 0.75])


def test_otsu_minimises_the_variance_within_the_two_classes():
    g = torch.Generator().manual_seed(2)
    x = torch.cat(
        [torch.rand(4, 60, generator=g) * 0.4, 0.5 + 0.4 * torch.rand(4, 30, generator=g)], 1
    )
    found = diffseg.otsu_threshold(x)
    for row, th in zip(x.numpy(), found[:, 0].tolist(), strict=True):

        def within(cut, row=row):
            parts = [row[row <= cut], row[row > cut]]
            return sum(len(p) * p.var() for p in parts if len(p))

        best = min(within(c) for c in np.linspace(0.01, 0.89, 400))
        assert within(th) <= best * 1.02


@pytest.mark.parametrize("supervision", ["tags", "border"])
def test_tile_tags_say_what_the_tiles_hold(supervision):
    mask = torch.zeros(6, 1, 96, 128, dtype=torch.uint8)
    mask[:, :, 30:70, 40:90] = 1
    given = mask if supervision == "tags" else None  # border supervision reads no mask at all
    windows, tags = diffseg.tag_tiles(given, 6, (96, 128), supervision, seed=0, per_image=200)
    for tag, low, high in ((diffseg.HEALTHY, 0.0, 0.0), (diffseg.LESION, 0.899, 1.0)):
        chosen = windows[tags == tag].tolist()
        assert len(chosen) > 5
        for (x, y, w, h), i in zip(chosen, (tags == tag).nonzero()[:, 0].tolist(), strict=True):
            share = mask[i, 0, y : y + h, x : x + w].float().mean().item()
            assert (low <= share <= high) or supervision == "border"
            assert x >= 0 and y >= 0 and x + w <= 128 and y + h <= 96


def test_implants_change_nothing_outside_their_blob():
    args = diffseg.parse_args(["--size", "32x16", "--device", "cpu"])
    data = diffseg.load_segmentation("synthetic", "", "train", (32, 64), limit=30)
    torch.manual_seed(0)
    implanted, healthy, blob = diffseg.Tiles(data, args).implant(16)
    difference = (implanted - healthy).abs().amax(1, keepdim=True)
    assert difference[blob < 1e-3].max() < 0.01 < difference[blob > 0.9].mean()


def test_score_does_not_depend_on_the_batch():
    args = diffseg.parse_args([*TINY])
    net = diffseg.build("diffseg", args).eval()
    torch.nn.init.normal_(net.head[-1].weight)
    img = torch.randint(0, 256, (3, 3, 16, 32), dtype=torch.uint8)
    together = diffseg.lesion_scores(net, img, args)
    alone = diffseg.lesion_scores(net, img[1:2], args)
    assert together.shape == (3, args.outputs, 16, 32)
    assert torch.allclose(together[1:2], alone, atol=0.02)  # bf16 sums in another order


def test_threshold_has_the_best_dice_and_spread_the_lowest_ged(monkeypatch):
    args = diffseg.parse_args([*TINY])
    ramp = torch.linspace(0.02, 0.98, 32).expand(4, 8, 16, 32)
    monkeypatch.setitem(diffseg.SCORES, "diffseg", lambda *_: ramp)
    raters = ramp[:, :3] > torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    for masks, wide in ((raters, True), (raters[:, 1:2], False)):
        val = diffseg.load_segmentation("synthetic", "", "val", (16, 32), limit=4)
        val.masks = masks
        (threshold, spread), dice = diffseg.calibrate("diffseg", None, val, args)
        assert dice == 1 and 0.46 < threshold < 0.54 and (spread > 0) == wide
    middle = diffseg.relative(ramp[:, :1], (0.3, 2.0))  # a single output has no spread
    assert torch.equal(middle > 0, ramp[:, :1] > 0.3)


def test_crf_integration_keeps_a_clear_lesion_and_is_seeded():
    args = diffseg.parse_args([*TINY])
    img = torch.full((1, 3, 16, 32), 200, dtype=torch.uint8)
    img[..., 4:12, 8:24] = 80
    logits = torch.where(img[:, :1] < 100, 2.0, -2.0).expand(1, 4, -1, -1)
    a, b = (diffseg.crf_integrate(logits, img, args) for _ in range(2))
    assert torch.equal(a, b) and a.shape == (1, args.crf_rounds, 16, 32)
    assert torch.equal(a[0, 0] > 0.5, img[0, 0] < 100)


def test_bare_command_writes_all_results_and_two_runs_agree(tmp_path, capsys):
    for name in "ab":
        assert run("--quick", "--size", "32x16", "--width", 16, "--out", tmp_path / name) == 0
    folder = tmp_path / "a" / "diffseg" / "synthetic" / "seed0"
    for name in ("log_unet.csv", "log_diffseg.csv", "last_diffseg.pt", "best_unet.pt"):
        assert (folder / name).stat().st_size
    rows = json.loads((folder / "result.json").read_text())["rows"]
    assert list(rows) == ["otsu", "unet", "diffseg", "diffseg_crf"]
    assert all(set(row) == METRICS for row in rows.values())
    assert "panel.png" in capsys.readouterr().out
    assert Image.open(folder / "figures" / "panel.png").width > 500
    other = tmp_path / "b" / "diffseg" / "synthetic" / "seed0"
    assert json.loads((other / "result.json").read_text())["rows"] == rows
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert (
        run("--quick", "--size", "32x16", "--width", 16, "--out", tmp_path / "a", "--eval-only")
        == 0
    )
    assert json.loads((folder / "result.json").read_text())["rows"] == rows


def test_official_pair_and_border_supervision_train(tmp_path):
    assert run(*TINY, "--pair", "official", "--map", "signed", "--out", tmp_path) == 0
    assert run(*TINY, "--supervision", "border", "--out", tmp_path / "border") == 0


@pytest.mark.parametrize(("how", "stage"), [(signal.SIGINT, "diffseg"), (signal.SIGKILL, "unet")])
def test_resume_after_a_signal_equals_an_unbroken_run(tmp_path, how, stage):
    command = [*TINY, "--compare", "--max-steps", "40", "--save-every", "10", "--out"]
    assert run(*command, tmp_path / "whole") == 0
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *command, tmp_path / "cut"], env=env, stderr=subprocess.PIPE
    )
    last = tmp_path / "cut" / "diffseg" / "synthetic" / "seed0" / f"last_{stage}.pt"
    deadline = time.time() + 60
    while not last.exists() and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    err = process.communicate()[1].decode()
    if how == signal.SIGINT:
        assert process.returncode == 130 and "--resume" in err
    assert torch.load(last, weights_only=True)["step"] < 40
    assert run(*command, tmp_path / "cut", "--resume") == 0
    for kind in ("diffseg", "unet"):
        assert same(weights(tmp_path / "whole", kind), weights(tmp_path / "cut", kind))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    assert run(*TINY, "--out", out) == 0
    return out


def test_predict_writes_masks_in_the_images_own_size(trained, tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).convert("RGBA").save(tmp_path / "b.png")
    Image.fromarray(rng.integers(0, 65535, (40, 60)).astype(np.uint16)).save(tmp_path / "c.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, shown upright
    Image.fromarray(pixels).save(tmp_path / "d.jpg", exif=exif)
    assert run(*TINY, "--out", trained, "--predict", tmp_path, tmp_path / "a.png") == 0
    done = trained / "diffseg" / "synthetic" / "seed0" / "predictions"
    for stem, size in {"a": (60, 40), "a_2": (60, 40), "c": (60, 40), "d": (40, 60)}.items():
        for name in ("mask", "overlay", "coherence", "ambiguity"):
            assert Image.open(done / f"{stem}_{name}.png").size == size
        assert set(np.unique(Image.open(done / f"{stem}_mask.png"))) <= {0, 255}
        assert json.loads((done / f"{stem}.json").read_text())["width"] == size[0]


def test_bad_files_to_predict_are_named_and_the_good_ones_done(trained, tmp_path, capsys):
    Image.new("RGB", (20, 20)).save(tmp_path / "good.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    bad = [tmp_path / "dot.png", tmp_path / "text.png", tmp_path / "empty", tmp_path / "none.png"]
    assert run(*TINY, "--out", trained, "--predict", *bad, tmp_path / "good.png") == 2
    err = capsys.readouterr().err
    assert all(str(path) in err for path in bad)
    assert (trained / "diffseg/synthetic/seed0/predictions/good_mask.png").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--size", "7"], "--size"),
        (["--t-infer", "5", "1000"], "--t-infer"),
        (["--width", "20"], "--width"),
        (["--batch-size", "2"], "--batch-size"),
        (["--crf-rounds", "0"], "--crf-rounds"),
        (["--device", "tpu7"], "--device"),
        (["--data", "isic2018", "--data-root", "nowhere"], "nowhere"),
        (["--data", "folder", "--data-root", "nowhere"], "nowhere"),
        (["--eval-only", "--checkpoint", "nothing.pt"], "nothing.pt"),
        (["--out", os.devnull], "null"),
    ],
)
def test_bad_flags_get_one_line_and_status_2(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    assert run(*TINY, *flags) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert words in err[-1] and "Traceback" not in "".join(err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu(capsys):
    assert run(*TINY, "--device", "cuda") == 2
    assert "--device cpu" in capsys.readouterr().err


def test_foreign_checkpoints_are_refused(trained, tmp_path, capsys):
    best = trained / "diffseg" / "synthetic" / "seed0" / "best_diffseg.pt"
    base = [*TINY, "--out", trained, "--eval-only", "--checkpoint"]
    torch.save({"method": "pepl"}, tmp_path / "pepl.pt")
    (tmp_path / "broken.pt").write_bytes(best.read_bytes()[:1000])
    for name in ("pepl.pt", "broken.pt"):
        assert run(*base, tmp_path / name) == 2
        assert name in capsys.readouterr().err
    assert run(*base, best, "--width", "32") == 2
    assert "--width 16, not 32" in capsys.readouterr().err


def test_full_disk_leaves_the_earlier_checkpoint_intact(trained, monkeypatch, capsys):
    last = trained / "diffseg" / "synthetic" / "seed0" / "last_diffseg.pt"
    before = last.read_bytes()

    def full(state, path):
        path.write_bytes(b"half of it")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert run(*TINY, "--out", trained) == 2
    assert "No space left" in capsys.readouterr().err
    assert last.read_bytes() == before and not list(last.parent.glob("*.tmp"))


def test_nan_loss_stops_with_a_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(diffseg, "diffseg_loss", lambda *_: torch.tensor(float("nan")))
    assert run(*TINY, "--out", tmp_path) == 2
    assert "loss is nan" in capsys.readouterr().err
