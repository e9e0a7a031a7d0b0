"""data.py: checkpoints, bad files, caches, pixel formats, splits, downloads, pictures."""

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
from conftest import class_folder
from PIL import Image

import data
import diffseg

HOME = Path(data.__file__).parent
SIZE = (16, 24)
NAMES = [f"ISIC2018_{x}" for x in ("Task1-2_Validation_Input", "Task1_Validation_GroundTruth")]
Y, X = np.mgrid[:32, :48]
DISC = ((Y - 12) ** 2 + (X - 16) ** 2 < 81).astype(np.uint8)  # (32, 48) in {0, 1}
NOISE = np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), dtype=np.uint8)
RGB = Image.new("RGB", (48, 32), (200, 80, 40))


def save(path, pixels, turn=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    (exif := Image.Exif())[0x0112] = turn
    img = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    img.save(path, exif=exif)
    return path


def make_set(folder, names="abc", masks=("masks",)):
    for name, pixels in zip(names, NOISE, strict=False):
        save(folder / "images" / f"{name}.jpg", pixels)
        for kind in masks:
            save(folder / kind / f"{name}_segmentation.png", DISC * 255)
    return folder


def load(root, split="val", name="folder", **options):
    return data.load_segmentation(name, root, split, SIZE, **options)


def test_checkpoints_describe_themselves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, method = diffseg.parse_args, diffseg.METHOD
    args = flags(["--lr", "3", "--size", "32x16", "--amp", "on"])
    folder = data.run_folder(method, args)
    assert folder == Path("out/diffseg/synthetic/seed0")
    assert folder != data.run_folder(method, flags(["--quick"]))  # which has one of its own
    with pytest.raises(data.DataError, match="no checkpoint to go on from"):
        flags(["--resume"])
    folder.mkdir(parents=True)
    data.save_checkpoint(folder / "best.pt", method, args, "d", nets={})
    away = ["--out", "elsewhere", "--device", "cpu", "--checkpoint", str(folder / "best.pt")]
    assert data.run_folder(method, flags(["--eval-only", *away])) == folder
    for given in (["--resume"], ["--eval-only"]):
        found = flags(given)
        assert (found.lr, found.size, found.amp) == (3, (16, 32), "on")
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
    data.save_checkpoint(folder / "last_unet.pt", method, args, "d")
    with pytest.raises(data.DataError, match=r"last_unet\.pt is not the best"):
        flags(["--predict", "a.png", *away])


def test_a_run_does_not_replace_that_of_another_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    roots = ("a/mine", "b/mine")
    a, b = (diffseg.parse_args(["--data", "folder", "--data-root", root]) for root in roots)
    folder = data.run_folder(diffseg.METHOD, a)
    assert folder == data.run_folder(diffseg.METHOD, b)
    data.fresh_folder(folder, a)
    data.fresh_folder(folder, a)
    with pytest.raises(data.DataError, match="a/mine, which would go; give an --out"):
        data.fresh_folder(folder, b)


def test_bf16_only_where_it_is_not_emulated_and_cpu_checkpoints_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert not data.bf16_is_fast("cuda")
    args = SimpleNamespace(device="cpu", resume=True)
    data.save_checkpoint(path := tmp_path / "a.pt", "m", args, "d", {"net": torch.nn.Linear(1, 1)})
    args.device = "cuda"
    monkeypatch.setattr(torch.cuda, "set_rng_state", None)  # must not be called
    assert data.resume(path, "m", args, "d", {})["args"]["device"] == "cpu"


def test_unusable_checkpoints_are_named(tmp_path):
    data.save_checkpoint(tmp_path / "best.pt", "m", SimpleNamespace(), "d")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "best.pt").read_bytes()[:500])
    cases = [("best", "n", "not of n"), ("cut", "m", "cut.pt is not"), ("no", "m", "no checkpoint")]
    for name, method, words in cases:
        with pytest.raises(data.DataError, match=words):
            data.load_checkpoint(tmp_path / f"{name}.pt", method)


def test_full_disk_leaves_the_earlier_checkpoint_intact(tmp_path, monkeypatch):
    data.save_checkpoint(path := tmp_path / "a.pt", "m", SimpleNamespace(), "d")
    before = path.read_bytes()

    def full(state, path):
        path.write_bytes(b"half of it")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(data.DataError, match="No space left"):
        data.save_checkpoint(path, "m", SimpleNamespace(), "d")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_images_to_predict(tmp_path):
    disc = np.stack([DISC * 255] * 3, -1)
    save(tmp_path / "in/a.jpg", disc)
    save(tmp_path / "in/deep/a.png", np.ascontiguousarray(disc.swapaxes(0, 1)))  # upright
    (tmp_path / "in/._a.jpg").write_text("of a Mac")
    (tmp_path / "in/b.jpg").write_text("no image")
    save(tmp_path / "in/dot.png", NOISE[0][:2, :2])
    save(tmp_path / "in/predictions/a_mask.png", DISC)  # of an earlier run
    (tmp_path / "empty").mkdir()
    found, bad = [], [tmp_path / x for x in ("empty", "in/b.jpg", "in/dot.png", "none.png")]
    with pytest.raises(data.DataError) as error:
        for photo in data.images_to_predict([bad[0], tmp_path / "in", bad[-1]], SIZE):
            found.append(photo)  # the good ones all come before the bad ones are named
    for line, path in zip(str(error.value).splitlines(), bad, strict=True):
        assert str(path) in line
    assert [photo.name for photo in found] == ["a", "a_2"]
    assert torch.equal(found[0].small, data.read_image(found[0].path, SIZE))  # as in training
    for photo in found:  # what is enlarged lies in its place
        back = data.enlarge(photo.small.float(), photo)
        assert ((back > 127) == (photo.img > 127)).float().mean() > 0.97


def test_tables_of_all_pages_equal_the_records(tmp_path):
    tables = runpy.run_path(str(HOME / "docs/results/tables.py"))
    for page in (HOME / "README.md", *HOME.glob("docs/*.md")):
        assert tables["fill"](page.read_text()) == page.read_text(), page
    for dice in (0.25, 0.75):
        (tmp_path / f"{dice}.json").write_text(json.dumps({"rows": {"unet": {"dice": dice}}}))
    last = tables["table"](sorted(tmp_path.iterdir())).splitlines()[-1]
    assert last == "| U-Net, all masks | 0.500 ± 0.250 |"


BAD = {  # the error's words: what happens to a sound set (r, its image x and mask y "b")
    "root: .* does not exist": lambda r, x, y: shutil.rmtree(r),
    "images: .*no image": lambda r, x, y: [p.unlink() for p in r.glob("*/images/*")],
    r"b\.jpg: has no mask": lambda r, x, y: y.unlink(),
    "b_segmentation.png: has no image": lambda r, x, y: x.unlink(),
    r"b_segmentation.png: .*48\D+32.*\D32\D+48": lambda r, x, y: save(x, NOISE[0], turn=6),
    r"b\.(jpg|png): another": lambda r, x, y: shutil.copy(x, x.with_suffix(".png")),
    r"b\.jpg: .*truncated": lambda r, x, y: x.write_bytes(x.read_bytes()[:900]),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_data_gets_one_line(words, tmp_path):
    make_set(val := tmp_path / "root/val")
    BAD[words](tmp_path / "root", val / "images/b.jpg", val / "masks/b_segmentation.png")
    with pytest.raises(data.DataError, match=rf"\A[^\n]*{words}[^\n]*\Z"):
        load(tmp_path / "root")


def test_files_that_are_left_out_are_counted(tmp_path, capsys):
    make_set(val := tmp_path / "set/val")
    classes = class_folder(tmp_path / "classes")
    (val / "images/deep").mkdir()
    for path in (val / "images/x.heic", val / "images/deep/y.HEIC", classes / "train/a/z.heic"):
        path.write_text("of a telephone")
    (classes / "train/.ipynb_checkpoints").mkdir()  # no class
    for path in (val / "images/.DS_Store", val / "images/.hidden/d.jpg"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("of a Mac")
    (val / "images/c.jpg").rename(val / "images/deep/c.jpg")  # a folder in the folder is read
    assert load(tmp_path / "set").ids == ["a", "b", "c"]
    data.load_classification("folder", classes, "train", SIZE)
    two, one = (line for line in capsys.readouterr().err.splitlines() if "left out" in line)
    assert "images: 2 of 5 files" in two and "train: 1 of 13 files" in one


def test_cache_is_used_and_rebuilt(tmp_path, monkeypatch):
    make_set(tmp_path / "set/val")
    first, seen, read = load(tmp_path / "set", images_only=True), [], data.read_image
    image = tmp_path / "set/val/images/b.jpg"
    assert first.ids == ["a", "b", "c"] and torch.equal(first.images[1], read(image, SIZE))
    monkeypatch.setattr(data, "read_image", lambda *a: seen.append(a) or read(*a))
    monkeypatch.chdir(tmp_path)
    again = load("set")  # with masks too no image is decoded twice
    assert not seen and torch.equal(again.images, first.images) and again.masks.any()
    assert len(load("set", limit=2)) == len(seen) == 2  # and no more than asked for
    save(image, NOISE[7])
    changed = load("set")
    assert len(seen) == 5 and not torch.equal(changed.images[1], first.images[1])
    assert changed.listing != again.listing
    cache = tmp_path / "set/.cache/folder-val-24x16-3-images.pt"
    whole = cache.read_bytes()
    cache.unlink()  # not in place: the old file is still mapped
    cache.write_bytes(whole[:-500])
    assert torch.equal(load("set").images, changed.images) and len(seen) == 8
    monkeypatch.setattr(data, "CACHE_FORMAT", 0)  # of another version of the code
    assert load("set").ids and len(seen) == 11


@pytest.mark.parametrize(("tag", "turns"), [(3, 2), (6, 1), (8, -1)])
def test_exif_turns_image_and_mask(tag, turns, tmp_path):
    stored = np.ascontiguousarray(np.rot90(DISC, turns))
    image = save(tmp_path / "i.png", np.stack([stored * 255] * 3, -1), tag)
    for pixels, of_mask in ((DISC, 1), (stored, tag)):  # drawn upright, or turned as the image is
        y = data.read_mask(save(tmp_path / "m.png", pixels, of_mask), image)
        assert (y[0].numpy() == DISC).all() and torch.equal(data.read_image(image)[:1] // 255, y)


def test_pixel_formats_and_binary_masks(tmp_path):
    for name, image, colour in (
        ("16.png", Image.fromarray(np.full((32, 48), 120 * 257, np.uint16)), (120, 120, 120)),
        ("rgba.png", Image.new("RGBA", (48, 32), (200, 80, 40, 0)), (255, 255, 255)),  # on white
        ("palette.png", RGB.quantize(8), (200, 80, 40)),
        ("grey.jpg", Image.new("L", (48, 32), 90), (90, 90, 90)),
        ("cmyk.jpg", RGB.convert("CMYK"), (200, 80, 40)),
    ):
        image.save(tmp_path / name)
        x = data.read_image(tmp_path / name, SIZE)
        assert x.dtype == torch.uint8 and x.shape == (3, *SIZE), name
        assert (x.float().mean((1, 2)) - torch.tensor(colour)).abs().max() < 4, name
    blue = np.stack([0 * DISC, 0 * DISC, DISC * 255], -1)
    palette = Image.fromarray(DISC).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    for mask in (DISC, DISC * 255, DISC * np.uint16(65535), blue, palette):
        for size in (SIZE, (56, 40), None):
            y = data.read_mask(save(tmp_path / "m.png", mask), tmp_path / "16.png", size)
            assert y.shape == (1, *(size or DISC.shape)) and y.unique().tolist() == [0, 1]
    assert (y[0].numpy() == DISC).all()
    two_colours = np.stack([DISC * 255, DISC * (X > 16) * np.uint8(255), 0 * DISC], -1)
    for bad in (NOISE[0, ..., 0], DISC * 2, two_colours):  # DISC * 2: class labels
        with pytest.raises(data.DataError, match="two values"):
            data.read_mask(save(tmp_path / "m.png", bad), tmp_path / "16.png")


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


def test_folder_splits_raters_and_images_only(tmp_path, monkeypatch):
    make_set(tmp_path, letters := "abcdefghijklmnopqrst", ("masks_1", "masks_2"))
    save(tmp_path / "masks_2/b_segmentation.png", DISC * 0)
    (tmp_path / "masks_old").mkdir()  # no rater's
    sets = [load(tmp_path, split) for split in data.SYNTHETIC_COUNTS]
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


def fails(root, words):
    with pytest.raises(data.DataError, match=f"{NAMES[0]}.zip.*{words}"):
        load(root, name="isic2018", images_only=True)
    assert not list((root / "isic2018").glob("*[!k]"))  # nothing half there but the lock


def test_download_once_of_what_is_needed(tmp_path, site, capsys):
    assert len(load(tmp_path, name="isic2018", images_only=True)) == 3
    mask = data.load_mask("isic2018", tmp_path, "val", "b", SIZE)
    found = load(tmp_path, name="isic2018")
    assert mask.shape == (1, *SIZE) and found.masks.shape == (3, 1, *SIZE)
    assert capsys.readouterr().err.count("downloading") == 2
    assert sorted(p.name for p in (tmp_path / "isic2018").glob("*[!k]")) == NAMES


def test_two_processes_download_an_archive_once(tmp_path, site):
    code = "import data, sys; data.ISIC_URL = sys.argv[2]; "
    code += "data.load_segmentation('isic2018', sys.argv[1], 'val', (16, 24))"
    command = [sys.executable, "-c", code, str(tmp_path), data.ISIC_URL]
    options = {"cwd": HOME, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, **options) for _ in range(2)]
    said = "".join(run.communicate(timeout=60)[1] for run in runs)
    assert [run.returncode for run in runs] == [0, 0] and said.count("downloading") == 2


def test_missing_and_corrupt_archives_and_one_saved_by_hand(tmp_path, site, capsys):
    archive = site / f"{NAMES[0]}.zip"
    sound = archive.read_bytes()
    archive.unlink()
    fails(tmp_path, f"No such file.*save it as .*{archive.name}")
    at = len(sound) * 2 // 3
    for bad in (sound[:at], sound[:at] + bytes(9) + sound[at + 9 :], b"<html>"):
        archive.write_bytes(bad)
        fails(tmp_path, "corrupt.*now deleted")
    capsys.readouterr()
    (tmp_path / "isic2018" / archive.name).write_bytes(sound)
    assert len(load(tmp_path, name="isic2018", images_only=True)) == 3
    assert "downloading" not in capsys.readouterr().err


def cub_archive(root):
    classes = ["001.Black_footed_Albatross", "002.Crow"]
    names = [f"{c}/{i}.jpg" for c in classes for i in range(3)]
    columns = {"images": names, "classes": classes, "image_class_labels": [1, 1, 1, 2, 2, 2]}
    columns["train_test_split"] = [1, 1, 0, 1, 1, 0]
    for name in names:
        save(root / "CUB_200_2011/images" / name, RGB)
    for file, column in columns.items():
        lines = [f"{i} {x}\n" for i, x in enumerate(column, 1)]
        (root / f"CUB_200_2011/{file}.txt").write_text("".join(lines))
    return Path(shutil.make_archive(root, "gztar", root)).read_bytes()


def test_cub200_download(tmp_path, site):
    sound, root, archive = (
        cub_archive(tmp_path / "cub"),
        tmp_path / "data",
        site / "CUB_200_2011.tgz",
    )
    root.mkdir()
    tar = gzip.decompress(sound)
    half = gzip.compress(tar[: tar.index(b"\xff\xd8") + 9])  # ends within a picture
    for bad in (sound[:-400], half):
        archive.write_bytes(bad)
        with pytest.raises(data.DataError, match=r"corrupt.*now deleted"):
            data.load_classification("cub200", root, "train", (16, 16))
    archive.write_bytes(sound)
    train, test = (data.load_classification("cub200", root, s, (16, 16)) for s in ("train", "test"))
    assert train.classes == ["Black footed Albatross", "Crow"]
    assert train.labels.tolist() == [0, 0, 1, 1] and test.labels.tolist() == [0, 1]


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
    many = torch.arange(200).repeat_interleave(30)[:5994]  # of CUB: 4.5 a class
    counts = many[data.label_split(many, fraction=0.15)[0]].bincount()
    assert counts.sum() == round(0.15 * 5994) and set(counts.tolist()) == {4, 5}


BAD_CLASSES = {  # the error's words: what is done to a sound set
    "only one class": lambda r: [shutil.rmtree(p) for p in r.glob("*/b")],
    "train/b/0.png": lambda r: (r / "train/b/0.png").write_text("no image"),
    "train/b: no image": lambda r: [p.unlink() for p in r.glob("train/b/*")],
    "class b is not in both": lambda r: (r / "test/b").rename(r / "b"),
    "train/x.png: lies in no folder": lambda r: save(r / "train/x.png", NOISE[0]),
    "does not exist": lambda r: (r / "train").rename(r / "tain"),
}


@pytest.mark.parametrize("words", BAD_CLASSES)
def test_bad_class_folders_get_one_line(words, tmp_path):
    BAD_CLASSES[words](root := class_folder(tmp_path / "set"))
    with pytest.raises(data.DataError, match=words):
        for split in ("train", "test"):
            data.load_classification("folder", root, split, SIZE)


def test_class_folders_and_torchvision_sets(tmp_path, monkeypatch):
    found = data.load_classification("folder", class_folder(tmp_path / "set"), "train", SIZE)
    assert found.images.shape == (12, 3, *SIZE) and found.labels.tolist() == [0] * 6 + [1] * 6
    assert found.classes == ["a", "b"]
    pets = tmp_path / "oxford-iiit-pet"
    for name in ("Pug_1", "Bengal_2"):
        save(pets / f"images/{name}.jpg", RGB)
    (pets / "annotations").mkdir()
    (pets / "annotations/trainval.txt").write_text("Bengal_2 1 1 1\nPug_1 2 2 1\n")
    found = data.load_classification("pets", tmp_path, "train", SIZE)
    assert found.classes == ["Bengal", "Pug"] and found.labels.tolist() == [0, 1]

    # as in torchvision 0.21: without names of its classes
    flowers = SimpleNamespace(_image_files=sorted(pets.glob("images/*")), _labels=[0, 1])
    monkeypatch.setattr("torchvision.datasets.Flowers102", lambda *_, **__: flowers)
    found = data.load_classification("flowers102", tmp_path, "train", SIZE)
    assert found.classes == ["class 1", "class 2"] and found.labels.tolist() == [0, 1, 0, 1]
