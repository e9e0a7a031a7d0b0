"""pepl.py and the classification half of data.py: mathematics, splits, files, command lines."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms

import data
import pepl

SCRIPT = str(Path(pepl.__file__))
TINY = ["--quick", "--size", "16", "--device", "cpu", "--method", "pepl", "--mix-start", "0.3"]


def run(*argv):
    """The exit status of a command line."""
    try:
        pepl.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code
    return 0


def folder_set(root, n=6, classes="ab", mode="RGB"):
    for split in ("train", "test"):
        for k, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                img = Image.new("RGB", (20, 24), (200 * k, 90, 10 * i)).convert(mode)
                img.save(root / split / name / f"{i}.jpg")
    return root


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
    assert pepl.class_thresholds(tau, p).max() == pytest.approx(want_tau, abs=1e-5)


def test_alignment_moves_the_mean_prediction_to_the_prior():
    q = torch.tensor([[0.8, 0.2], [0.6, 0.4]])
    aligned = pepl.align(q, torch.tensor([0.7, 0.3]), torch.tensor([0.5, 0.5]))
    by_hand = [[0.8 / 0.7 / (0.8 / 0.7 + 0.2 / 0.3)], [0.6 / 0.7 / (0.6 / 0.7 + 0.4 / 0.3)]]
    torch.testing.assert_close(aligned[:, :1], torch.tensor(by_hand))
    torch.testing.assert_close(aligned.sum(1), torch.ones(2))
    q = torch.full((4, 3), 1 / 3)  # what is as frequent as the prior stays as it is
    torch.testing.assert_close(pepl.align(q, q[0], q[0]), q)


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


def test_mixing_a_batch_leaves_labels_alone_and_takes_kept_partners():
    args = pepl.parse_args([*TINY, "--mix-share", "0.5"])
    torch.manual_seed(0)
    x, y, net = torch.rand(64, 3, 16, 16), torch.arange(64) % 9, pepl.Classifier("tiny", 9)
    before, keep = (x.clone(), y.clone()), torch.arange(64) < 3
    mix, y_b, rho_a, rho_b = pepl.mix_batch(x, y, keep, net(x)[1], net, args)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1]) and y_b.max() == 2
    same = (mix == x).flatten(1).all(1)
    assert 10 < same.sum() < 54 and (rho_a[same] == 1).all() and (rho_b[~same] > 0).all()
    assert pepl.mix_batch(x, y, keep & False, None, net, args)[2:] == (1.0, 0.0)


def test_hybrid_loss_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    log_q = [[-0.126928, -2.126928], [-1.313262, -0.313262]]
    y_a, y_b = torch.tensor([0, 1]), torch.tensor([1, 1])
    rho_a, rho_b = torch.tensor([0.7, 0.5]), torch.tensor([0.4, 0.2])
    want = [-0.7 * log_q[0][0] - 0.4 * log_q[0][1], -(0.5 + 0.2) * log_q[1][1]]
    for keep in ([True, True], [True, False], [False, False]):
        loss = pepl.hybrid_loss(logits, y_a, y_b, rho_a, rho_b, torch.tensor(keep))
        assert loss.item() == pytest.approx(
            sum(w for w, k in zip(want, keep, strict=True) if k) / 2, abs=1e-5
        )
    plain = pepl.hybrid_loss(logits, y_a, y_b, 1.0, 0.0, torch.ones(2))
    assert plain.item() == pytest.approx(F.cross_entropy(logits, y_a).item())


# ---- augmentation


def test_augmentation_is_per_image_and_faster_than_pil():
    images = data.synthetic_birds(96, (55, 55), 0)[0]
    torch.manual_seed(0)
    x = pepl.weak_augment(images[:1].expand(8, -1, -1, -1), (48, 48))
    s = pepl.strong_augment(x[:1].expand(8, -1, -1, -1))
    for y in (x, s):
        assert y.shape == (8, 3, 48, 48) and y.min() >= 0 and y.max() <= 1
        assert len(y.flatten(1).unique(dim=0)) == 8
    pil = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images]
    same_work = [
        transforms.RandomResizedCrop(48, (0.6, 0.77), (1, 1)),
        transforms.RandomHorizontalFlip(),
        transforms.RandomAffine(23, (0.1, 0.1), (0.8, 1.2), 11),
        transforms.RandomApply([transforms.ColorJitter(0.2, 0.5, 0.5)]),
        transforms.RandomPosterize(3),
        transforms.RandomAdjustSharpness(2),
        transforms.ToTensor(),
        transforms.RandomErasing(0.5),
    ]
    pil_augment = transforms.Compose(same_work)

    def seconds(function):
        function()  # to warm up
        start = time.process_time()  # of all threads, so that a busy machine does not matter
        for _ in range(3):
            function()
        return time.process_time() - start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waiting threads spin, and their time would count as work
    ours = seconds(lambda: pepl.strong_augment(pepl.weak_augment(images, (48, 48))))
    theirs = seconds(lambda: torch.stack([pil_augment(i) for i in pil]))
    torch.set_num_threads(threads)
    print(f"augmentation: {288 / ours:.0f} images/s, PIL {288 / theirs:.0f}: {theirs / ours:.1f} x")
    assert ours < theirs


# ---- data.py: splits, folders, download


def test_label_split_is_stratified_and_seeded():
    labels = torch.tensor([0] * 40 + [1] * 10 + [2] * 3)
    labelled, rest = data.label_split(labels, fraction=0.1, seed=1)
    assert labels[labelled].bincount().tolist() == [4, 1, 1]  # at least one
    assert sorted(labelled.tolist() + rest.tolist()) == list(range(53))
    assert torch.equal(labelled, data.label_split(labels, fraction=0.1, seed=1)[0])
    assert not torch.equal(labelled, data.label_split(labels, fraction=0.1, seed=2)[0])
    assert labels[data.label_split(labels, per_class=3)[0]].bincount().tolist() == [3, 3, 3]
    with pytest.raises(data.DataError, match=r"class 2 has 3 .*not 4"):
        data.label_split(labels, per_class=4)


def test_synthetic_birds():
    images, labels = data.synthetic_birds(12, (24, 32), seed=3)
    assert images.shape == (12, 3, 24, 32) and images.dtype == torch.uint8
    again, other = (data.synthetic_birds(5, (24, 32), s)[0] for s in (3, 4))
    assert torch.equal(again, images[:5]) and not torch.equal(other, images[:5])
    assert labels.min() >= 0 and labels.max() < len(data.BIRD_CLASSES)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_folder_of_any_mode(mode, tmp_path):
    found = data.load_classification("folder", folder_set(tmp_path, mode=mode), "train", (16, 24))
    assert found.images.shape == (12, 3, 16, 24) and found.labels.tolist() == [0] * 6 + [1] * 6
    assert found.classes == ["a", "b"] and found.ids[7] == "train/b/1.jpg"
    for path in tmp_path.glob("train/b/[1-9].jpg"):  # one image is left, and gets the label
        path.unlink()
    assert run(*TINY, "--data", "folder", "--data-root", tmp_path, "--out", tmp_path) == 0
    split = json.loads((tmp_path / "pepl/folder/seed0/split.json").read_text())
    assert "train/b/0.jpg" in split["labelled"] and len(split["unlabelled"]) == 5


BAD_FOLDERS = {  # the error's words: what is done to a sound set
    "only one class": lambda r: [shutil.rmtree(p) for p in r.glob("*/b")],
    "train/b/0.jpg": lambda r: (r / "train/b/0.jpg").write_text("no image"),
    "a class with no image": lambda r: [p.unlink() for p in r.glob("train/b/*")],
    "class b is not in both": lambda r: (r / "test/b").rename(r / "b"),
    "does not exist": lambda r: (r / "train").rename(r / "tain"),
    "class 1 has 1 training images, not 3": lambda r: [
        p.unlink() for p in r.glob("train/b/[1-9]*")
    ],
}


@pytest.mark.parametrize("words", BAD_FOLDERS)
def test_bad_folders_get_one_line(words, tmp_path, capsys):
    BAD_FOLDERS[words](root := folder_set(tmp_path / "set"))
    flags = ["--data", "folder", "--data-root", root, "--out", tmp_path, "--labels-per-class", 3]
    assert run(*TINY, *flags) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("pepl.py: error")]
    assert words in line


def cub_archive():
    names = [f"{c}/{i}.jpg" for c in ("001.Black_footed_Albatross", "002.Crow") for i in range(3)]
    Image.new("RGB", (30, 20), "red").save(picture := io.BytesIO(), "JPEG")
    files = {f"images/{name}": picture.getvalue() for name in names}
    files["classes.txt"] = b"1 001.Black_footed_Albatross\n2 002.Crow\n"
    for file, column in (
        ("images", names),
        ("image_class_labels", [1, 1, 1, 2, 2, 2]),
        ("train_test_split", [1, 1, 0, 1, 1, 0]),
    ):
        files[f"{file}.txt"] = "".join(f"{i} {x}\n" for i, x in enumerate(column, 1)).encode()
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w:gz") as archive:
        for name, body in files.items():
            entry = tarfile.TarInfo(f"CUB_200_2011/{name}")
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
    return buffer.getvalue()


def test_cub200_download(tmp_path, monkeypatch):
    sound = cub_archive()
    bodies = [sound[:200] + bytes(60) + sound[260:], sound]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = bodies.pop(0)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setattr(data, "CUB_URL", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with pytest.raises(data.DataError, match=r"corrupt.*now deleted"):
            data.load_classification("cub200", tmp_path, "train", (16, 16))
        assert not list(tmp_path.iterdir())
        train = data.load_classification("cub200", tmp_path, "train", (16, 16))
        test = data.load_classification("cub200", tmp_path, "test", (16, 16))  # no download
        server.shutdown()
    assert train.classes == ["Black footed Albatross", "Crow"] and not bodies
    assert train.labels.tolist() == [0, 0, 1, 1] and test.labels.tolist() == [0, 1]
    assert [Path(p).name for p in test.ids] == ["2.jpg", "2.jpg"]


def test_torchvision_sets(tmp_path):
    base = tmp_path / "oxford-iiit-pet"
    (base / "images").mkdir(parents=True)
    (base / "annotations").mkdir()
    Image.new("RGB", (30, 20), "red").save(base / "images/Pug_1.jpg")
    Image.new("RGB", (30, 20), "blue").save(base / "images/Bengal_2.jpg")
    (base / "annotations/trainval.txt").write_text("Bengal_2 1 1 1\nPug_1 2 2 1\n")
    pets = data.load_classification("pets", tmp_path, "train", (16, 16))
    assert pets.classes == ["Bengal", "Pug"] and pets.labels.tolist() == [0, 1]
    with pytest.raises(data.DataError, match=r"cannot be downloaded any more: put .*stanford_cars"):
        data.load_classification("cars", tmp_path, "train", (16, 16))


# ---- command lines


def outputs(out):
    """The EMA weights and result rows of a run."""
    folder = out / "pepl/synthetic/seed0"
    state = torch.load(folder / "pepl/last.pt", weights_only=True)
    return state["ema"], json.loads((folder / "result.json").read_text())["rows"]


def same(a, b):
    return a[1] == b[1] and all(torch.equal(x, b[0][k]) for k, x in a[0].items())


def test_bare_quick_run_writes_everything_and_repeats(tmp_path, capsys):
    for name in "ab":
        assert run("--quick", "--ablate", "--mix-labelled", "pepl", "--out", tmp_path / name) == 0
    folder = tmp_path / "a/pepl/synthetic/seed0"
    assert list(outputs(tmp_path / "a")[1]) == pepl.METHODS
    for name in ("mix", "curves", "cams_pepl", "cams_supervised"):
        assert Image.open(folder / f"figures/{name}.png").width > 500
    assert (folder / "pepl/log.csv").read_text().startswith("step,loss,pseudo_accuracy")
    assert same(outputs(tmp_path / "a"), outputs(tmp_path / "b"))
    assert "figures" in capsys.readouterr().out
    rows = outputs(tmp_path / "a")[1]
    assert run("--quick", "--ablate", "--eval-only", "--out", tmp_path / "a") == 0
    assert outputs(tmp_path / "a")[1] == rows
    split = (folder / "split.json").read_text()
    for other in (["--labels", "0.5"], ["--max-steps", "5"], ["--validate"]):  # of other runs
        for how in ("--eval-only", "--resume"):
            assert run("--quick", "--ablate", how, *other, "--out", tmp_path / "a") == 2
    assert (folder / "split.json").read_text() == split and outputs(tmp_path / "a")[1] == rows
    assert run(*TINY, "--method", "supervised", "--labels", 1, "--out", tmp_path) == 0
    assert run(*TINY, "--seeds", 0, 1, "--validate", "--out", tmp_path) == 0
    result = json.loads((tmp_path / "pepl/synthetic/result.json").read_text())
    assert result["split"] == "validation" and len(result["rows"]["pepl"]["accuracy"]["seeds"]) == 2


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_resume_after_a_signal_equals_an_unbroken_run(tmp_path, how):
    command = [*TINY, "--max-steps", "24", "--save-every", "4", "--mix-labelled", "all", "--out"]
    assert run(*command, tmp_path / "whole") == 0
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *command, tmp_path / "cut"], env=env, stderr=subprocess.PIPE
    )
    last = tmp_path / "cut/pepl/synthetic/seed0/pepl/last.pt"
    deadline = time.time() + 60
    while not last.exists() and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    err = process.communicate()[1].decode()
    assert how == signal.SIGKILL or (process.returncode == 130 and "--resume" in err)
    assert torch.load(last, weights_only=True)["step"] < 24
    assert run(*command, tmp_path / "cut", "--eval-only") == 2  # not trained to its end
    assert run(*command, tmp_path / "cut", "--resume") == 0
    assert same(outputs(tmp_path / "whole"), outputs(tmp_path / "cut"))


def test_predict_on_own_photographs(tmp_path, capsys):
    assert run(*TINY, "--out", tmp_path) == 0
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(photos / "a.png")
    Image.new("L", (30, 50), 7).save(photos / "b.jpg")
    Image.new("CMYK", (30, 50)).save(photos / "c.jpg")
    (photos / "d.png").write_text("no image")
    assert run(*TINY, "--out", tmp_path, "--predict", photos, tmp_path / "none.png") == 2
    err = capsys.readouterr().err
    assert "d.png" in err and "none.png" in err
    done = tmp_path / "pepl/synthetic/seed0/predictions"
    assert run(*TINY, "--out", tmp_path, "--predict", tmp_path / "none.png") == 2  # loses nothing
    header, *rows = [x.split(",") for x in (done / "probabilities.csv").read_text().splitlines()]
    assert len(rows) == 3 and header[3:] == data.BIRD_CLASSES
    for row, size in zip(rows, [(60, 40), (30, 50), (30, 50)], strict=True):
        assert sum(map(float, row[3:])) == pytest.approx(1, abs=1e-4)
        assert Image.open(done / row[1]).size == size


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--labels", "0"], "--labels"),
        (["--labels", "2"], "--labels"),
        (["--labels", "1"], "--labels"),
        (["--labels-per-class", "0"], "--labels-per-class"),
        (["--arch", "vgg16"], "--arch"),
        (["--pretrained"], "--pretrained"),
        (["--device", "tpu7"], "--device"),
        (["--data", "cub200", "--data-root", "nowhere"], "nowhere"),
        (["--lr", "0"], "--lr"),
        (["--weight-decay", "-1"], "--weight-decay"),
        (["--num-workers", "0"], "--num-workers"),
        (["--seed", "-1"], "--seed"),
        (["--max-steps", "0"], "--max-steps"),
        (["--checkpoint", "a.pt"], "--checkpoint"),
        (["--eval-only"], "last.pt"),
        (["--predict", "x.png", "--checkpoint", "nothing.pt"], "nothing.pt"),
        (["--out", os.devnull], "null"),
    ],
)
def test_bad_flags_get_one_line_and_status_2(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    assert run(*TINY, *flags) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert words in err[-1] and "Traceback" not in "".join(err)


def test_weights_that_cannot_be_downloaded_are_never_replaced_by_chance(
    tmp_path, monkeypatch, capsys
):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    flags = ["--arch", "resnet18", "--pretrained", "--size", "32", "--out", tmp_path]
    assert run(*TINY, *flags) == 2
    assert "ImageNet weights could not be loaded" in capsys.readouterr().err
    assert run(*[f for f in map(str, (*TINY, *flags)) if f != "--pretrained"]) == 0
