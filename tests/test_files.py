"""Files of the real world are read correctly, or rejected with a line that names them."""

import os
import shutil
import struct
import unicodedata
import zlib

import numpy as np
import pytest
import torch
from conftest import DISC, NOISE, SIZE, X, Y, class_folder, load, make_set, save
from PIL import Image

import data

RGB = Image.new("RGB", (48, 32), (200, 80, 40))
RAMP = np.arange(32 * 48, dtype=np.uint16).reshape(32, 48)  # 0..1535
INNER = ((Y - 12) ** 2 + (X - 16) ** 2 < 36).astype(np.uint8)


def refused(words, function, *args):
    with pytest.raises(data.DataError, match=words):
        function(*args)


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_orientation_of_image_and_mask(tag, square, suffix, tmp_path):
    disc = DISC[:, :32] if square else DISC
    image = save(tmp_path / f"i.{suffix}", np.stack([disc * 255] * 3, -1), tag)
    upright = (data.read_image(image)[0].numpy() > 127).astype(np.uint8)
    kinds = {"turned alike": (disc, tag), "upright": (upright, 1), "stored": (disc, 1)}
    for kind, (pixels, of_mask) in kinds.items():
        mask = save(tmp_path / "m.png", pixels * 255, of_mask)
        told = kind == "turned alike" or tag == 1 or (kind == "upright" and tag > 4 and not square)
        if told:
            assert (data.read_mask(mask, image)[0].numpy() == upright).mean() > 0.99
        else:  # both readings are possible, or the sizes differ
            refused(f"m.png: .*{image.name}.*save both upright", data.read_mask, mask, image)


def png16(pixels):
    """The bytes of a PNG of 16-bit colours, which Pillow cannot write."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_pixel_formats(tmp_path):
    for name, image, colour in (
        ("16.png", Image.fromarray(np.full((32, 48), 150 * 257, np.uint16)), (150, 150, 150)),
        ("black.png", Image.fromarray(0 * RAMP), (0, 0, 0)),
        ("rgba.png", Image.new("RGBA", (48, 32), (0, 0, 0, 128)), (127, 127, 127)),  # on white
        ("palette.png", RGB.quantize(8), (200, 80, 40)),
        ("grey.jpg", Image.new("L", (48, 32), 90), (90, 90, 90)),
        ("cmyk.jpg", RGB.convert("CMYK"), (200, 80, 40)),
    ):
        image.save(tmp_path / name)
        x = data.read_image(tmp_path / name, SIZE)
        assert x.dtype == torch.uint8 and x.shape == (3, *SIZE), name
        assert (x.float().mean((1, 2)) - torch.tensor(colour)).abs().max() < 4, name


def test_images_that_could_be_read_in_two_ways_are_refused(tmp_path):
    white_is_zero = {"tiffinfo": {262: 0}}
    for words, image, options in (
        ("levels 0 to 1535, .*which one is white", Image.fromarray(RAMP), {}),
        ("which one is white", Image.fromarray(RAMP.astype(np.float32)), {}),
        ("which one is white", Image.fromarray(RAMP.astype(np.int32) - 700), {}),
        ("white is stored as 0", Image.fromarray(RAMP * 40), white_is_zero),
        ("transparent", Image.new("RGBA", (48, 32), (200, 80, 40, 0)), {}),
        ("7 x 20 pixels", Image.new("RGB", (7, 20)), {}),
        ("2 frames", RGB, {"save_all": True, "append_images": [RGB]}),
    ):
        image.save(path := tmp_path / "x.tif", **options)
        refused(f"x.tif: .*{words}", data.read_image, path)
    deep = tmp_path / "deep.png"
    deep.write_bytes(png16(np.stack([RAMP * 40] * 3, -1)))
    assert data.read_image(deep).max() > 230
    deep.write_bytes(png16(np.stack([RAMP] * 3, -1)))
    refused("deep.png: 16-bit colours", data.read_image, deep)
    (deep := tmp_path / "deep.ppm").write_bytes(
        b"P6 48 32 65535\n" + np.stack([RAMP] * 3, -1).astype(">u2").tobytes()
    )
    refused("deep.ppm: 16-bit colours", data.read_image, deep)
    for mask in (deep, deep.with_suffix(".png")):
        refused("deep.*: has 16-bit colours", data.read_mask, mask, deep)


def palette(pixels, *colours):
    image = Image.fromarray(pixels).convert("P")
    image.putpalette(sum(colours, ()))
    return image


MASKS = {  # two values on black
    "0 and 1": DISC,
    "0 and 255": DISC * 255,
    "16 bits": DISC * np.uint16(65535),
    "1 bit": Image.fromarray(DISC.astype(bool)),
    "a colour": np.stack([0 * DISC, 0 * DISC, DISC * 255], -1),
    "a palette": palette(DISC, (0, 0, 0), (128, 0, 0)),
    "white on transparent": np.stack([DISC * 0 + 255] * 3 + [DISC * 255], -1),
    "soft edges": Image.fromarray(np.kron(DISC * 255, np.ones((4, 4), np.uint8))).resize((48, 32)),
}
NO_MASKS = {
    "class labels": DISC + INNER,
    "one label of several": DISC * 2,
    "255 is ignore": INNER + 255 * (DISC - INNER),
    "no black": 100 + 155 * DISC,
    "a third grey": DISC * 128 + INNER * 127,
    "a small third grey": DISC * 255 - (Y < 2) * (X < 2) * np.uint8(100),
    "near black and near white": np.choose(DISC + INNER + 2 * (Y > 25), [0, 1, 254, 255, 0]).astype(
        np.uint8
    ),
    "two colours": np.stack([INNER * 255, (DISC - INNER) * 255, 0 * DISC], -1),
    "a photograph": NOISE[0],
    "black on transparent": np.stack([0 * DISC] * 3 + [DISC * 255], -1),
    "a black palette": palette(DISC, (0, 0, 0), (0, 0, 0)),
    "negative numbers": -DISC.astype(np.int32),
}


def test_masks_of_two_values_and_others(tmp_path):
    image = save(tmp_path / "i.png", NOISE[0])
    for name, pixels in MASKS.items():
        y = data.read_mask(save(tmp_path / f"{name}.png", pixels), image)
        assert y.shape == (1, 32, 48) and (y[0].numpy() == DISC).mean() > 0.98, name
    for quality in (50, 75, 95):
        Image.fromarray(DISC * 255).save(path := tmp_path / "m.jpg", quality=quality)
        save(tmp_path / "m.png", np.asarray(Image.open(path)))
        for mask in (path, path.with_suffix(".png")):
            assert (data.read_mask(mask, image)[0].numpy() == DISC).all()
    for name, pixels in NO_MASKS.items():
        suffix = "tif" if name == "negative numbers" else "png"
        mask = save(tmp_path / f"{name}.{suffix}", pixels)
        refused(f"{name}.*save the object as 255", data.read_mask, mask, image)


def test_objects_that_vanish_are_counted(tmp_path, capsys):
    make_set(val := tmp_path / "set/val", "abcd")
    for name in "bc":
        save(val / f"masks/{name}_segmentation.png", ((Y == 5) & (X == 5)) * np.uint8(255))
    save(val / "masks/d_segmentation.png", 0 * DISC)  # is empty in the file already
    load(tmp_path / "set")
    assert "b_segmentation.png: 2 of 4 masks become empty at 24x16" in capsys.readouterr().err
    mask = data.load_mask, "folder", tmp_path / "set", "val"
    refused("b_segmentation.png: its object is too small", *mask, "b", SIZE)
    refused("d_segmentation.png: it is empty", *mask, "d", SIZE)


BAD = {  # the error's words: what happens to a sound set (r, its image x and mask y "b")
    "root: .* does not exist": lambda r, x, y: shutil.rmtree(r),
    "images: no image": lambda r, x, y: [p.unlink() for p in r.glob("*/images/*")],
    "masks: No such file": lambda r, x, y: shutil.rmtree(y.parent),
    r"b\.jpg: has no mask; add .*/masks/b\.png": lambda r, x, y: y.unlink(),
    "b_segmentation.png: has no image": lambda r, x, y: x.unlink(),
    r"b_segmentation.png: .*48\D+32.*\D32\D+48": lambda r, x, y: save(x, NOISE[0], turn=6),
    r"b\.png: has the same name as .*b\.jpg": lambda r, x, y: shutil.copy(x, x.with_suffix(".png")),
    r"b\.jpg: .*truncated": lambda r, x, y: x.write_bytes(x.read_bytes()[:900]),
    r"c\.jpg: cannot be read": lambda r, x, y: (
        x.with_name("c.jpg").unlink(),
        x.with_name("c.jpg").symlink_to("nowhere"),
    ),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_data_gets_one_line(words, tmp_path):
    make_set(val := tmp_path / "root/val")
    BAD[words](tmp_path / "root", val / "images/b.jpg", val / "masks/b_segmentation.png")
    refused(rf"\A{tmp_path}[^\n]*{words}[^\n]*\Z", load, tmp_path / "root")


def test_all_broken_and_all_missing_files_are_named(tmp_path):
    make_set(val := tmp_path / "set/val", "abcdefghijklmnopqrst")
    for name in "bd":
        (val / f"images/{name}.jpg").write_text("no image")
    refused(r"b\.jpg.*\n.*d\.jpg", load, tmp_path / "set")
    for path in (val / "masks").glob("[e-h]*"):
        path.unlink()
    refused(r"e\.jpg.*\n.*f\.jpg.*\n.*g\.jpg.*\n.*h\.jpg", load, tmp_path / "set")


def test_files_that_are_left_out_are_counted(tmp_path, capsys):
    make_set(val := tmp_path / "set/val")
    classes = class_folder(tmp_path / "classes")
    (val / "images/deep").mkdir()
    for path in (val / "images/x.heic", val / "images/deep/y.HEIC", classes / "train/a/z.heic"):
        path.write_text("of a telephone")
    (classes / "train/.ipynb_checkpoints").mkdir()  # no class
    (classes / "train/__MACOSX").mkdir()
    for path in (val / "images/.DS_Store", val / "images/.hidden/d.jpg"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("of a Mac")
    (val / "images/c.jpg").rename(val / "images/deep/c.jpg")  # a folder in the folder is read
    assert load(tmp_path / "set").ids == ["a", "b", "c"]
    data.load_classification("folder", classes, "train", SIZE)
    two, one = (line for line in capsys.readouterr().err.splitlines() if "skipped" in line)
    assert "images: skipped 2 of 5 files" in two and "train: skipped 1 of 13 files" in one


def test_folders_that_are_not_read_are_named(tmp_path, capsys):
    make_set(tmp_path / "set/val", masks=("masks", "masks_1"))
    make_set(tmp_path / "set/Validation")
    load(tmp_path / "set")
    root = class_folder(tmp_path / "classes")
    (root / "unlabeled").mkdir()
    data.load_classification("folder", root, "train", SIZE)
    said = capsys.readouterr().err
    for folder, name in (("set", "Validation"), ("set/val", "masks"), ("classes", "unlabeled")):
        assert f"{tmp_path / folder}: ignored: {name} (expected: " in said


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path):
    elsewhere = make_set(tmp_path / "elsewhere")
    (val := tmp_path / "set/val").mkdir(parents=True)
    for kind in ("images", "masks"):
        (val / kind).symlink_to(elsewhere / kind)
    (elsewhere / "images/again").symlink_to(val / "images")
    assert load(tmp_path / "set").ids == ["a", "b", "c"]


def test_names_are_compared_without_case_and_unicode_form(tmp_path):
    make_set(tmp_path / "set/val", [unicodedata.normalize("NFC", "é"), "IMG_2"])
    masks = tmp_path / "set/val/masks"
    accent = unicodedata.normalize("NFD", "é")
    next(masks.glob("?_seg*")).rename(masks / f"{accent}_segmentation.png")
    (masks / "IMG_2_segmentation.png").rename(masks / "img_2_segmentation.PNG")
    assert len(load(tmp_path / "set").masks) == 2


def test_names_that_repeat_in_subfolders(tmp_path):
    for patient in ("p1", "p2"):
        make_set(tmp_path / patient, "ab")
        for kind in ("images", "masks"):
            (tmp_path / "set/val" / kind).mkdir(parents=True, exist_ok=True)
            (tmp_path / patient / kind).rename(tmp_path / "set/val" / kind / patient)
    assert load(tmp_path / "set").ids == ["p1/a", "p1/b", "p2/a", "p2/b"]
    refused(
        "p1/a.jpg: has no mask",
        lambda: [
            (tmp_path / "set/val/masks/p1/a_segmentation.png").unlink(),
            load(tmp_path / "set"),
        ],
    )


BAD_CLASSES = {  # the error's words: what is done to a sound set
    "only one class": lambda r: [shutil.rmtree(p) for p in r.glob("*/b")],
    "train/b/0.png": lambda r: (r / "train/b/0.png").write_text("no image"),
    "train/b: 0 images": lambda r: [p.unlink() for p in r.glob("train/b/*")],
    "train/b: this class is not in both": lambda r: (r / "test/b").rename(r / "b"),
    "test/b: this class is not in both": lambda r: (r / "train/b").rename(r / "b"),
    "train/x.png: is not in a class folder": lambda r: save(r / "train/x.png", NOISE[0]),
    "train: No such file": lambda r: (r / "train").rename(r / "tain"),
    "has the same name as": lambda r: shutil.copytree(r / "train/b", r / "train/B"),
    "b: 1 images, but each class needs 2": lambda r: (
        shutil.rmtree(r / "test"),
        [p.unlink() for p in r.glob("train/b/[1-9].png")],
    ),
}


@pytest.mark.parametrize("words", BAD_CLASSES)
def test_bad_class_folders_get_one_line(words, tmp_path):
    BAD_CLASSES[words](root := class_folder(tmp_path / "set"))
    refused(
        words,
        lambda: [data.load_classification("folder", root, s, SIZE) for s in ("train", "test")],
    )


def test_class_folders_with_and_without_a_test_set(tmp_path, capsys):
    root = class_folder(tmp_path / "set")
    found = data.load_classification("folder", root, "train", SIZE)
    assert found.images.shape == (12, 3, *SIZE) and found.labels.tolist() == [0] * 6 + [1] * 6
    assert found.classes == ["a", "b"]
    (root / "test/b").rename(root / "test/B")  # the same class
    assert data.load_classification("folder", root, "test", SIZE).labels.sum() == 6
    shutil.rmtree(root / "test")
    train, test = (data.load_classification("folder", root, s, SIZE) for s in ("train", "test"))
    assert test.labels.tolist() == [0, 1] and len(train.labels) == 10
    assert "(2 of 12 images) is used for testing" in capsys.readouterr().err
    (root / "unlabelled").mkdir()
    save(root / "unlabelled/x.png", NOISE[0])
    assert data.load_classification("folder", root, "train", SIZE).labels.tolist()[-1] == -1


def predict(*paths, folder, network="best.pt"):
    (checkpoint := folder.parent / network).write_text(network)

    def dark(photo):
        return {"mask": photo.img[0].numpy()}, {
            "dark": round(255 - photo.img.float().mean().item())
        }

    data.predict_images([str(p) for p in paths], SIZE, folder, checkpoint, dark)
    with open(folder / "predictions.csv", newline="", **data.TEXT) as file:
        return list(data.csv.DictReader(file))


def test_predictions_never_overwrite_another_picture(tmp_path, capsys):
    out = tmp_path / "predictions"
    for k, place in enumerate(("x/A", "y/A", "y/A/sub", "y/A/SUB")):
        save(tmp_path / place / "1.png", NOISE[k])
    save(tmp_path / "x/A/1.tif", NOISE[4])
    save(tmp_path / "A.png", NOISE[5])
    predict(tmp_path / "x/A", folder=out)
    for _ in range(2):  # again: in the same places
        rows = predict(tmp_path / "y/A", tmp_path / "A.png", folder=out)
    (tmp_path / "y/A/1.png").rename(tmp_path / "y/A/2.png")
    rows = predict(tmp_path / "y/A", folder=out)
    assert len({row["mask"].casefold() for row in rows}) == len(rows) == 7
    for row in rows:
        source = row["file"].replace("y/A/1.png", "y/A/2.png")
        assert (
            np.asarray(Image.open(out / row["mask"])) == np.asarray(Image.open(source))[..., 0]
        ).all()
    masks = {os.path.relpath(row["file"], tmp_path): row["mask"] for row in rows}
    assert masks["x/A/1.png"] == "A/1_mask.png" and masks["y/A/SUB/1.png"] == "A_2/SUB/1_mask.png"
    assert masks["y/A/sub/1.png"] == "A_2/sub/1_2_mask.png"
    assert masks["A.png"] == "A_3_mask.png" and masks["y/A/2.png"] == "A_2/2_mask.png"
    assert len(predict(tmp_path, folder=out)) == 13  # not of the predictions
    assert "skipped the pictures of earlier predictions" in capsys.readouterr().err
    rows = predict(tmp_path / "A.png", folder=out, network="other.pt")
    assert rows[-1]["mask"] == "A_4_mask.png" and rows[-1]["file"] == str(tmp_path / "A.png")
    head = "name,file,checkpoint,mask,dark\n"
    for text in ("hello", "name;file\n1;2\n", f"{head}x,y\n", f"{head},,,,\n"):
        (out / "predictions.csv").write_text(text)
        refused("predictions.csv: was changed", lambda: predict(tmp_path / "A.png", folder=out))
    (out / "predictions.csv").write_text("name,file,checkpoint,mask\nx,y,z,x_mask.png\n")
    refused("predictions.csv: has other columns", lambda: predict(tmp_path / "A.png", folder=out))
    (out / "predictions.csv").unlink()  # its pictures stay
    before = set(out.rglob("*.png"))
    assert not before & {out / row["mask"] for row in predict(tmp_path / "x/A", folder=out)}


def test_predictions_skip_bad_files_and_keep_names_that_are_not_utf8(tmp_path):
    names = ["a.jpg", "b, c.png", os.fsdecode(b"caf\xe9.png"), "\u0436.png"]
    for name in names:
        save(tmp_path / "in" / name, NOISE[0])
    (tmp_path / "in/bad.jpg").write_text("no image")
    (tmp_path / "empty").mkdir()
    words = rf"{tmp_path}/empty.*\n{tmp_path}/none.png.*\n.*bad.jpg"
    refused(
        words,
        lambda: predict(
            tmp_path / "empty", tmp_path / "none.png", tmp_path / "in", folder=tmp_path / "out"
        ),
    )
    rows = predict(tmp_path / "in/a.jpg", folder=tmp_path / "out")
    assert sorted(os.path.basename(row["file"]) for row in rows[:4]) == sorted(names)
    assert all((tmp_path / "out" / row["mask"]).exists() for row in rows)


def test_enlarge_keeps_positions(tmp_path):
    path = save(tmp_path / "a.png", np.stack([DISC * 255] * 3, -1))
    photo = data.Photo(data.read_image(path), data.read_image(path, SIZE))
    back = data.enlarge(photo.small.float(), photo)
    assert ((back > 127) == (photo.img > 127)).float().mean() > 0.97
