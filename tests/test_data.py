"""data.py, segmentation: bad files, cache, pixel formats, synthetic images, download."""

import shutil
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

import data

SIZE = (16, 24)
NAMES = [f"ISIC2018_{x}" for x in ("Task1-2_Validation_Input", "Task1_Validation_GroundTruth")]
Y, X = np.mgrid[:32, :48]
DISC = ((Y - 12) ** 2 + (X - 16) ** 2 < 81).astype(np.uint8)  # (32, 48) in {0, 1}
NOISE = np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), dtype=np.uint8)
RGB = Image.new("RGB", (48, 32), (200, 80, 40))


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def make_set(folder, names="abc"):
    for name, pixels in zip(names, NOISE, strict=False):
        save(folder / "images" / f"{name}.jpg", pixels)
        save(folder / "masks" / f"{name}_segmentation.png", DISC * 255)


def load(root, split="val", name="folder", **options):
    return data.load_segmentation(name, root, split, SIZE, **options)


BAD = {  # the error's words: what happens to a sound set (r, its image x and mask y "b")
    "root: .* does not exist": lambda r, x, y: shutil.rmtree(r),
    "images: .*no image": lambda r, x, y: [p.unlink() for p in r.glob("*/images/*")],
    r"b\.jpg: has no mask": lambda r, x, y: y.unlink(),
    "b_segmentation.png: has no image": lambda r, x, y: x.unlink(),
    r"b_segmentation.png: .*48\D+32.*\D40\D+32": lambda r, x, y: save(x, NOISE[0][:, :40]),
    "b_segmentation.png: .*than two values": lambda r, x, y: save(y, NOISE[0, ..., 0]),
    "_segmentation.png: .*two values": lambda r, x, y: save(y, DISC * 2),  # class labels
    r"b\.jpg: (unreadable|cannot be used)": lambda r, x, y: x.write_text("hello"),
    r"b\.(jpg|png): another": lambda r, x, y: shutil.copy(x, x.with_suffix(".png")),
    r"b\.jpg: .*truncated": lambda r, x, y: x.write_bytes(x.read_bytes()[:900]),
    "has 3 images, .*9": lambda r, x, y: None,
}


@pytest.mark.parametrize("words", BAD)
def test_bad_data_gets_one_line(words, tmp_path):
    make_set(val := tmp_path / "root/val")
    BAD[words](tmp_path / "root", val / "images/b.jpg", val / "masks/b_segmentation.png")
    with pytest.raises(data.DataError, match=rf"\A[^\n]*{words}[^\n]*\Z"):
        load(tmp_path / "root", limit=9 if "9" in words else None)


def test_cache_is_used_and_rebuilt(tmp_path, monkeypatch):
    make_set(tmp_path / "val")
    first, seen, read = load(tmp_path, workers=1), [], data.read_image
    image = tmp_path / "val/images/b.jpg"
    assert first.ids == ["a", "b", "c"] and torch.equal(first.images[1], read(image, SIZE))
    monkeypatch.setattr(data, "read_image", lambda *a: seen.append(a) or read(*a))
    again = load(tmp_path)
    assert not seen and torch.equal(again.images, first.images)
    assert torch.equal(again.masks, first.masks)
    save(image, NOISE[7])
    changed = load(tmp_path).images
    assert len(seen) == 3 and not torch.equal(changed[1], first.images[1])
    (cache,) = (tmp_path / ".cache").iterdir()
    for n, corrupt in enumerate((b"", b"junk", cache.read_bytes()[:-500])):
        cache.unlink()  # not in place: the old file is still mapped
        cache.write_bytes(corrupt)
        assert torch.equal(load(tmp_path).images, changed) and len(seen) == 6 + 3 * n


@pytest.mark.parametrize(("tag", "turns"), [(3, 2), (6, 1), (8, -1)])
@pytest.mark.parametrize("kind", ["as stored", "tagged", "upright"])
def test_exif_turns_image_and_mask_alike(kind, tag, turns, tmp_path):
    (exif := Image.Exif())[0x0112] = tag
    stored = np.ascontiguousarray(np.rot90(DISC, turns))
    image = save(tmp_path / "i.png", np.stack([stored * 255] * 3, -1), exif=exif)
    pixels = DISC if kind == "upright" and tag != 3 else stored  # a half turn keeps the size
    mask = save(tmp_path / "m.png", pixels, exif=exif if kind == "tagged" else Image.Exif())
    y = data.read_mask(mask, exif_from=image)
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
    for depth in (DISC, DISC * 255, DISC * np.uint16(65535)):
        for size in (SIZE, (56, 40)):
            y = data.read_mask(save(tmp_path / "m.png", depth), size)
            assert y.shape == (1, *size) and y.unique().tolist() == [0, 1]


def test_augment_is_seeded_and_per_sample():
    masks = torch.from_numpy(DISC).float().expand(8, 1, 32, 48)
    (x, y), again, other = (
        data.augment(masks.repeat(1, 3, 1, 1), masks, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and not torch.equal(y, other[1])
    assert len({tuple(m.flatten().tolist()) for m in y}) == 8 and y.unique().tolist() == [0, 1]
    level = x.mean(1, keepdim=True)  # the image moves with its mask
    assert ((level > level.amax((2, 3), keepdim=True) / 2) == y).float().mean() > 0.97


def test_folder_splits_and_images_only(tmp_path, monkeypatch):
    make_set(tmp_path, letters := "abcdefghijklmnopqrst")
    ids = {split: load(tmp_path, split).ids for split in data.SYNTHETIC_COUNTS}
    assert [len(i) for i in ids.values()] == [16, 2, 2] and ids["val"] != list("ab")
    assert sorted(i for part in ids.values() for i in part) == list(letters)
    shutil.rmtree(tmp_path / "masks")
    monkeypatch.setattr(data, "read_mask", None)
    found = load(tmp_path, images_only=True)
    assert found.ids == ids["val"] and found.masks.shape == (2, 0, *SIZE)


def test_synthetic():
    images, masks = data.synthetic_dermoscopy(12, (32, 40), seed=3)
    assert images.shape == (12, 3, 32, 40) and masks.shape == (12, 4, 32, 40)
    assert images.dtype == masks.dtype == torch.uint8 and masks.unique().tolist() == [0, 1]
    again, other = (data.synthetic_dermoscopy(5, (32, 40), s)[0] for s in (3, 4))
    assert torch.equal(again, images[:5]) and not torch.equal(other, images[:5])
    for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        a, b = masks[:, i].bool(), masks[:, j].bool()
        assert 0.5 < (a & b).sum() / (a | b).sum() < 0.99
    sets = [load("-", s, "synthetic", limit=4).images for s in data.SYNTHETIC_COUNTS]
    assert len({x.sum().item() for x in sets}) == 3


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, body = self.server, self.server.files.get(self.path[1:])
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        server.log.append((self.path[1:], start))
        if body is None:
            return self.send_error(404)
        start = 0 if server.mode == "no range" else start
        self.send_response(416 if start >= len(body) else 206 if start else 200)
        span = f"{start}-{len(body) - 1}" if start < len(body) else "*"
        self.send_header("Content-Range", f"bytes {span}/{len(body)}") if start else None
        self.send_header("Content-Length", str(max(0, len(body) - start)))
        self.end_headers()
        self.wfile.write(body[start : len(body) // 2 if server.mode == "break" else None])


@pytest.fixture
def server(tmp_path, monkeypatch):
    make_set(tmp_path / "src")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.log, server.mode, server.files = [], "sound", {}
        for name, kind in zip(NAMES, ("images", "masks"), strict=True):
            with zipfile.ZipFile(tmp_path / "src/z", "w") as z:
                for p in (tmp_path / "src" / kind).iterdir():
                    z.write(p, f"{name}/{p.name}")
            server.files[f"{name}.zip"] = (tmp_path / "src/z").read_bytes()
        monkeypatch.setattr(data, "ISIC_URL", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def fails(root, words):
    with pytest.raises(data.DataError, match=f"{NAMES[0]}.zip.*{words}"):
        load(root, name="isic2018", images_only=True)
    assert not any(p.is_dir() for p in (root / "isic2018").iterdir())  # nothing half-unpacked


@pytest.mark.parametrize("then", ["sound", "no range"])
def test_download_resumes_and_runs_once(then, tmp_path, server):
    server.mode = "break"
    fails(tmp_path, "broken off at")
    server.mode, half = then, len(server.files[f"{NAMES[0]}.zip"]) // 2
    found = load(tmp_path, name="isic2018")
    assert found.ids == ["a", "b", "c"] and found.masks.shape == (3, 1, *SIZE)
    assert load(tmp_path, name="isic2018", limit=2).ids == ["a", "b"]
    assert server.log == [(f"{NAMES[i]}.zip", at) for i, at in ((0, 0), (0, half), (1, 0))]
    assert sorted(p.name for p in (tmp_path / "isic2018").iterdir()) == NAMES


def test_404_corrupt_zip_and_whole_part(tmp_path, server):
    sound = server.files.pop(zip_name := f"{NAMES[0]}.zip")
    fails(tmp_path, "404")
    at = len(sound) * 2 // 3
    for server.files[zip_name] in (sound[:at] + bytes(9) + sound[at + 9 :], sound[:at], b"<html>"):
        fails(tmp_path, "corrupt.*now deleted")
    server.files[zip_name], n = sound, len(server.log) + 1
    (tmp_path / "isic2018" / f"{zip_name}.part").write_bytes(sound)  # 416: it is whole already
    assert len(load(tmp_path, name="isic2018", images_only=True)) == 3 and len(server.log) == n


def test_one_mask_is_fetched_and_opened_alone(tmp_path, server):
    load(tmp_path, name="isic2018", images_only=True)
    mask = data.load_mask("isic2018", tmp_path, "val", "b", SIZE)
    assert server.log[-1] == (f"{NAMES[1]}.zip", 0)
    for p in (tmp_path / "isic2018" / NAMES[1]).glob("[ac]*"):
        p.write_text("no image")
    assert torch.equal(mask, data.load_mask("isic2018", tmp_path, "val", "b", SIZE))
    with pytest.raises(data.DataError, match="a_segmentation"):
        data.load_mask("isic2018", tmp_path, "val", "a", SIZE)
