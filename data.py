"""Data sets as small uint8 tensors: decoded once, cached beside the data, indexed in memory.

train = load_segmentation("isic2018", "data", "train", size=(96, 128))  # a SegmentationSet
x = train.images[torch.randint(len(train), (24,))].float() / 255        # (24, 3, 96, 128)
birds = load_classification("cub200", "data", "train", size=(256, 256))  # a ClassificationSet
labelled, unlabelled = label_split(birds.labels, per_class=4, seed=0)   # indices, stratified
"""

import argparse
import contextlib
import gzip
import math
import os
import shutil
import sys
import tarfile
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

ISIC_URL = os.environ.get("ISIC_URL", "https://isic-challenge-data.s3.amazonaws.com/2018")
CUB_URL = os.environ.get("CUB_URL", "https://data.caltech.edu/records/65de6-vp158/files")
ISIC_SPLITS = {"train": "Training", "val": "Validation", "test": "Test"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
MAX_PIXELS = 400_000_000  # 20,000 x 20,000, 1.2 GB once decoded: a larger file gets a DataError
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow's own limit warns from 89 million on
EXIF_TURN = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation -> Image.Transpose
SPLIT_SEED = 2018  # of the splits drawn for a folder that has none; not the run's seed
SYNTHETIC_COUNTS = {"train": 600, "val": 64, "test": 128}
BIRDS_COUNTS = {"train": 1000, "test": 600}


class DataError(ValueError):
    """One line for the user: which file, what is wrong with it, what to do."""


def parse_size(text):
    """argparse type: "64" -> (64, 64), "64x48" (width x height) -> (48, 64) = (height, width)."""
    sides = [int(n) if n.isdecimal() else 0 for n in text.lower().split("x")]
    if len(sides) > 2 or any(n < 16 or n % 8 for n in sides):
        why = "give N or WIDTHxHEIGHT, multiples of 8 and at least 16, as in 64x48"
        raise argparse.ArgumentTypeError(f"size {text!r}: {why}")
    return sides[-1], sides[0]


def _open(path, size=None, twin=None, paper="white"):
    """Open an image upright, transparency laid on paper; twin: the image that path is a mask of."""
    try:
        with Image.open(path) as img, Image.open(twin or path) as other:
            if img.width * img.height > MAX_PIXELS:
                raise ValueError(f"{img.width} x {img.height} px; the limit is {MAX_PIXELS:,} px")
            turn, twin_turn = (x.getexif().get(0x0112, 1) for x in (img, other))
            turn = twin_turn if turn == 1 and img.size == other.size else turn
            a, b = img.size[:: -1 if turn > 4 else 1], other.size[:: -1 if twin_turn > 4 else 1]
            if a != b:
                raise ValueError(
                    f"its size {a} differs from that of its image {other.filename}, {b}"
                )
            if size:  # JPEG only: decodes at 1/2, 1/4 or 1/8, never below the size asked for
                img.draft(None, (max(size), max(size)))
            if img.mode[0] in "IF":  # 16 or 32 bits: to 8 by the range; a mask's is its brightest
                grey = np.nan_to_num(np.asarray(img, np.float32)).clip(0)
                top = 65535 if img.mode[0] == "I" and paper == "white" else 1e-9
                img = Image.fromarray((grey * (255 / max(grey.max(), top)) + 0.5).astype(np.uint8))
            elif img.has_transparency_data:
                img = img.convert("RGBA")
                img = Image.alpha_composite(Image.new("RGBA", img.size, paper), img)
            img.load()
            return img.transpose(EXIF_TURN[turn]) if turn in EXIF_TURN else img
    except Exception as error:  # Pillow's readers raise all kinds
        raise DataError(f"{path}: cannot be used ({error}); replace or remove it") from error


def read_image(path, size=None):
    """Read any image file as uint8 (3, H, W); size = (H, W) resizes it, antialiased.
    Converts grey, palette, CMYK, 16-bit and transparent (on white) images, applies EXIF rotation.
    Raises DataError if the file is unreadable, truncated or above MAX_PIXELS.
    """
    img = _open(path, size).convert("RGB")
    img = img.resize((size[1], size[0]), Image.Resampling.BICUBIC) if size else img
    return torch.from_numpy(np.array(img)).permute(2, 0, 1).contiguous()  # (3, H, W)


def read_mask(path, size=None, exif_from=None):
    """Read a mask file as uint8 (1, H, W) in {0, 1}; size = (H, W) resizes by area, then at half.
    Levels count relative to the brightest: 0/1, 0/255 and anti-aliased masks are fine. DataError if
    the brightest is 2..31 (class labels), over 10 % of the pixels lie within 10..90 % of it, or
    over 1 % do so in flat 2 x 2 patches (a third class). exif_from: the image; a mask without EXIF
    rotation, of the image's stored size, is rotated as the image is; upright sizes must agree.
    """
    grey = np.asarray(_open(path, twin=exif_from, paper="black").convert("L"))
    top = float(grey.max())
    mid = (grey > 0.1 * top) & (grey < 0.9 * top)
    flat = mid[1:, 1:] & (grey[1:, 1:] == grey[:-1, 1:]) & (grey[1:, 1:] == grey[1:, :-1])
    if 2 <= top < 32 or mid.mean() > 0.1 or flat.sum() > 0.01 * grey.size:
        raise DataError(f"{path}: a mask with more than two values; save it as 0 and 255")
    img = Image.fromarray((grey > top / 2).astype(np.uint8) * 255)
    img = img.resize((size[1], size[0]), Image.Resampling.BOX) if size else img
    return torch.from_numpy((np.asarray(img) >= 128).astype(np.uint8))[None]  # (1, H, W)


def _store(key, sources, decode, root, workers=8):
    """Decode sources (tuples of arguments) in threads, or load their cache; a list of tensors.
    decode returns a tuple of tensors, stacked to (len(sources), ...). The cache, one file
    `<root>/.cache/<key>.pt`, counts while the (path, bytes, mtime) of all sources are as they were.
    """
    cache, listing, columns = Path(root, ".cache", f"{key}.pt"), [], []
    for item in (item for source in sources for item in source):
        stat = item.stat() if isinstance(item, Path) else None  # else it is a label
        listing.append([str(item), stat and stat.st_size, stat and stat.st_mtime_ns])
    with contextlib.suppress(Exception):  # none there, or broken (torch raises all kinds): build it
        saved = torch.load(cache, mmap=True, weights_only=True)
        if saved["listing"] == listing:
            return saved["columns"]
    with ThreadPoolExecutor(workers) as pool:
        rows = pool.map(lambda source: decode(*source), sources)
        for i, row in enumerate(tqdm(rows, f"decoding {key}", len(sources), unit="image")):
            columns = columns or [x.new_empty(len(sources), *x.shape) for x in row]
            for column, x in zip(columns, row, strict=True):
                column[i] = x
    temp = cache.with_name(f"{key}.{os.getpid()}")
    try:
        cache.parent.mkdir(exist_ok=True)
        torch.save({"listing": listing, "columns": columns}, temp)
        os.replace(temp, cache)
    except (OSError, RuntimeError) as error:  # a read-only place, a full disk
        print(f"warning: no cache, {cache}: {error}; it decodes again next time", file=sys.stderr)
        if temp.is_file():
            temp.unlink()
    return columns


@dataclass
class SegmentationSet:
    name: str
    split: str
    ids: list[str]
    images: torch.Tensor  # uint8 (N, 3, H, W)
    masks: torch.Tensor  # uint8 (N, R, H, W) in {0, 1}, R raters; R = 0 if the masks were not read

    def __len__(self):
        return len(self.ids)


def load_segmentation(name, root, split, size, limit=None, images_only=False, workers=8):
    """Load a split of isic2018 | folder | synthetic at size = (H, W) as a SegmentationSet.
    limit: the first n images only. images_only: no mask is opened or looked for, R = 0. workers:
    threads that decode. Raises DataError for bad data, also if there are fewer than limit images.
    """
    root = Path(root)
    if name == "synthetic":
        sources = [(f"{name}_{split}_{i:04d}",) for i in range(SYNTHETIC_COUNTS[split])]
    elif root.is_dir() or (name, root) == ("isic2018", Path("data")):
        sources = _pairs(name, root, split, images_only)
    else:  # also for isic2018: a typo must not start a download of 13 GB
        raise DataError(f"{root}: this folder does not exist; create it or correct --data-root")
    n = len(sources) if limit is None else limit
    if not 1 <= n <= len(sources):
        raise DataError(
            f"{name} {split} in {root} has {len(sources)} images, not {n}; ask for fewer"
        )

    def decode(image, *mask):
        return read_image(image, size), *(read_mask(m, size, exif_from=image) for m in mask)

    if name == "synthetic":
        images, *masks = synthetic_dermoscopy(n, size, seed=SYNTHETIC_COUNTS[split])
    else:
        key = f"{name}-{split}-{size[1]}x{size[0]}-{n}{'-images' * images_only}"
        images, *masks = _store(key, sources[:n], decode, root, workers)
    masks = images.new_empty(n, 0, *size) if images_only else masks[0]
    return SegmentationSet(name, split, [Path(s[0]).stem for s in sources[:n]], images, masks)


def load_mask(name, root, split, stem, size):
    """Load the mask of one image as bool (1, H, W) and open no other, for who may see only that.
    name: isic2018 | folder. Raises DataError if it is missing, broken or empty.
    """
    pairs = _pairs(name, Path(root), split, images_only=True)
    image = next(path for (path,) in pairs if path.stem == stem)
    folder = image.parent.with_name("masks")
    if name == "isic2018":
        folder = image.parent.with_name(f"ISIC2018_Task1_{ISIC_SPLITS[split]}_GroundTruth")
        if not folder.is_dir():  # comes whole
            _fetch(f"{ISIC_URL}/{folder.name}.zip", folder, "of which one mask is read")
    files = [p for p in sorted(folder.glob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
    found = [p for p in files if p.stem.removesuffix("_segmentation") == stem and p.name[0] != "."]
    if not found:
        raise DataError(f"{folder}: no mask of {stem}; add it or name another image")
    mask = read_mask(found[0], size, exif_from=image).bool()
    if not mask.any():
        raise DataError(f"{found[0]}: this mask is empty; name another image")
    return mask


def _pairs(name, root, split, images_only):
    """[(image, mask)] paths sorted by stem, [(image,)] if images_only; fetches missing ISIC parts.
    folder: <root>/<split>/{images,masks}; without val, a tenth of train; without splits, 80/10/10.
    """
    drawn = []  # the splits to draw
    if name == "isic2018":
        kind = ISIC_SPLITS[split]
        folders = [f"ISIC2018_Task1-2_{kind}_Input", f"ISIC2018_Task1_{kind}_GroundTruth"]
        folders = [root / f if (root / f).is_dir() else root / "isic2018" / f for f in folders]
    else:
        there = [s for s in ISIC_SPLITS if (root / s).is_dir()]
        if not there or ("val" not in there and split != "test"):
            drawn = ["val"] if there else ["val", "test"]
        base = root / ("train" if drawn else split) if there else root
        folders = [base / "images", base / "masks"]
    found = []
    for folder in folders[: 1 if images_only else 2]:
        if name == "isic2018" and not folder.is_dir():
            _fetch(f"{ISIC_URL}/{folder.name}.zip", folder, "the whole of ISIC 2018 Task 1: 13 GB")
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        files = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != "."]
        if not files:
            raise DataError(f"{folder}: no image file here; fill it or correct --data-root")
        found.append({p.stem.removesuffix("_segmentation"): p for p in files})
        for p in files:
            if found[-1][p.stem.removesuffix("_segmentation")] != p:
                raise DataError(f"{p}: another file here has this name too; rename or remove one")
    for have, lack, what in ((found[0], found[-1], "mask"), (found[-1], found[0], "image")):
        for stem in sorted(set(have) - set(lack)):
            raise DataError(f"{have[stem]}: has no {what}; add it or remove this file")
    pairs = [tuple(x[stem] for x in found) for stem in sorted(found[0])]
    if drawn:
        order = np.random.RandomState(SPLIT_SEED).permutation(len(pairs)).tolist()
        k = max(1, round(len(pairs) / 10))
        parts = {"val": order[:k], "test": order[k : 2 * k], "train": order[len(drawn) * k :]}
        pairs = [pairs[i] for i in sorted(parts[split])]
    return pairs


def _fetch(url, folder, note):
    """Download an archive, resuming what is there, and unpack it: folder is whole or absent."""
    part, temp = folder.with_name(f"{url.split('/')[-1]}.part"), folder.with_name(f".{folder.name}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    print(f"downloading {url} ({note})", file=sys.stderr)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            start = start if response.status == 206 else 0  # no Range here: from the beginning
            total = start + int(response.headers.get("Content-Length", 0))
            bar = tqdm(desc=folder.name, total=total, initial=start, unit="B", unit_scale=True)
            with open(part, "ab" if start else "wb") as file, bar:
                while chunk := response.read(1 << 20):
                    bar.update(file.write(chunk))
        if part.stat().st_size < total:
            raise OSError(f"broken off at {part.stat().st_size:,} of {total:,} bytes")
    except Exception as error:
        if getattr(error, "code", 0) != 416:  # 416: the part is whole already
            todo = f"check the network and run again: it resumes from what is in {part}"
            raise DataError(f"{url}: download failed ({error}); {todo}") from error
    try:
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir()
        os.replace(_unpack(part, temp), folder)
        part.unlink()
    except OSError as error:  # the archive is good and stays
        raise DataError(f"{part}: cannot be unpacked ({error}); make room, run again") from error
    except Exception as error:
        part.unlink()
        raise DataError(f"{part}: corrupt ({error}), now deleted; run it again") from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _unpack(part, temp):
    """Unpack a .zip's images without its folders, or a .tgz's first folder; returns the folder."""
    if part.name.endswith(".zip.part"):
        with zipfile.ZipFile(part) as archive:
            if archive.testzip():
                raise zipfile.BadZipFile(f"{archive.testzip()} is damaged")
            for entry in archive.namelist():
                name = Path(entry.replace("\\", "/")).name  # no folders: nothing can escape
                if Path(name).suffix.lower() in IMAGE_SUFFIXES and name[0] != ".":
                    (temp / name).write_bytes(archive.read(entry))
        return temp
    try:
        with gzip.open(part) as file, open(os.devnull, "wb") as nowhere:
            shutil.copyfileobj(file, nowhere)  # to its end, where the check sum is
        with tarfile.open(part) as archive:
            archive.extractall(temp, filter="data")  # refuses paths that leave temp
    except gzip.BadGzipFile as error:  # an OSError, but no trouble with the disk
        raise tarfile.ReadError(error) from error
    return next(path for path in sorted(temp.iterdir()) if path.is_dir())


def synthetic_dermoscopy(n, size, seed, chunk=50):
    """Draw images uint8 (n, 3, H, W) and four raters' masks uint8 (n, 4, H, W) in {0, 1}.
    Raters: tight, loose, polygonal, smooth. Skin and lesion are layers of melanin and blood that
    absorb light; over them hairs, ink, stickers, rulers; last the lamp, the lens and the sensor.
    """
    if n > chunk:  # to bound memory; each chunk has its seed
        rest = range(0, n, chunk)
        parts = [synthetic_dermoscopy(min(chunk, n - i), size, seed + 9973 * i) for i in rest]
        return tuple(torch.cat(x) for x in zip(*parts, strict=True))
    (h, w), g, b = size, torch.Generator().manual_seed(seed), chunk  # drawn whole: n never matters

    def u(lo, hi, *shape):  # uniform; one number per image unless a shape is given
        return lo + (hi - lo) * torch.rand(b, *(shape or (1, 1, 1)), generator=g)

    def field(cells):  # smooth noise (B, 1, H, W), standard deviation about 1
        z = 1.3 * torch.randn(b, 1, cells, cells * 4 // 3, generator=g)
        return F.interpolate(z, (h, w), mode="bicubic", align_corners=True)

    def rgb(r, g, b):
        return torch.tensor([r, g, b]).view(3, 1, 1)

    px = 2 / min(h, w)  # the short side spans -1..1
    y, x = (torch.arange(h) - h / 2 + 0.5)[:, None] * px, (torch.arange(w) - w / 2 + 0.5) * px
    # Outline: log radius as a Fourier series of the angle, frayed by noise; level > 0 is inside.
    z = torch.randn(b, 1, 1, 1, generator=g)
    area = 0.13 * torch.exp(torch.where(z < 0, 1.12 * z, 0.76 * z)).clamp(0.1, 6.5)  # of the image
    r0 = torch.sqrt(area * h * w / math.pi) * px
    room = (1.2 - r0).clamp(0, 1)
    dy, dx = y - u(-0.4, 0.4) * room, x - u(-0.5, 0.5) * room
    base, theta = torch.log(r0 / torch.hypot(dy, dx).clamp(min=px / 9)), torch.atan2(dy, dx)
    order = torch.arange(1, 9)
    amp = torch.randn(b, 8, 1, 1, generator=g) * u(0.06, 0.22) / order.view(8, 1, 1) ** 1.1
    phase = u(0, 2 * math.pi, 8, 1, 1)

    def wave(angle, k=8):  # (B, 1, H, W) -> the same
        return (amp * torch.cos(angle * order.view(8, 1, 1) + phase))[:, :k].sum(1, keepdim=True)

    plain = base + wave(theta) + 0.07 * field(7)
    level = plain + u(0.2, 1) * (0.07 * field(15) + 0.05 * field(36))
    # Raters. The polygon joins 9 points of the outline: its chords in polar coordinates.
    step, turn = 2 * math.pi / 9, u(0, 2 * math.pi)
    r = (wave(turn + step * torch.arange(9)) + u(-0.03, 0.08, 1, 1, 9)).exp().flatten(1)  # (B, 9)
    pos = torch.remainder(theta - turn, 2 * math.pi) / step
    i = pos.long().clamp(max=8)
    r1, r2 = (r.gather(1, (j % 9).flatten(1)).view_as(theta) for j in (i, i + 1))
    f = (pos - i) * step
    chord = r1 * r2 * math.sin(step) / (r1 * torch.sin(f) + r2 * torch.sin(step - f))
    loose, smooth = plain + 0.04 * field(5) + u(0.03, 0.11), base + wave(theta, 3) + u(-0.03, 0.06)
    raters = torch.cat([level - u(0.02, 0.1), loose, base + torch.log(chord), smooth], 1)
    masks = ((raters > 0) | (base > torch.log(r0 / px / 0.8))).to(torch.uint8)  # never empty
    # Skin and lesion, by absorption; 1.5 % of the lesions are paler than the skin.
    soft = u(0.03, 0.2) * (1 + 0.4 * field(4)).clamp(0.3, 2)
    lesion = torch.sigmoid(1.5 * level / soft)
    texture = (1 + 0.3 * field(4) + 0.2 * field(12) + 0.15 * field(40)).clamp(0.1, 2.5)
    mole = u(0.35, 1.7) * torch.where(u(0, 1) < 0.015, -0.3, 1) * texture
    brown = u(0.05, 0.5) + 0.02 * field(30) + 0.02 * field(6) + lesion * mole
    pink = u(0.08, 0.45) + 0.05 * field(4) + 0.02 * field(30)
    pink = pink + lesion * (u(0, 0.3) + 0.6 * (u(0, 1) < 0.15) * texture)
    img = torch.exp(-brown * rgb(0.35, 0.62, 0.9) - pink * rgb(0.06, 0.5, 0.4))
    # Things on the skin: (share of images, cover (B, 1, H, W) in [0, 1], colour).
    angle, bend, wide = u(0, 6.3, 14, 1, 1), u(-0.5, 0.5, 14, 1, 1), u(0.006, 0.02, 14, 1, 1)
    p = torch.cos(angle) * x + torch.sin(angle) * y - u(-0.8, 0.8, 14, 1, 1)
    q = torch.cos(angle) * y - torch.sin(angle) * x - u(-1.3, 1.3, 14, 1, 1) - bend * p**2
    hair = torch.exp(-((q / wide.clamp(min=px / 2)) ** 2)) * (wide / px * 2).clamp(max=1)
    hair = hair * (p.abs() < u(0.1, 1.3, 14, 1, 1)) * (u(0, 1, 14, 1, 1) < u(0, 1))
    ring = torch.sigmoid((0.15 - (level + u(0.5, 0.9)).abs()) / 0.04)  # drawn round the lesion
    ink = ring * torch.sigmoid((field(14) - 0.9) * 8)
    side = u(0, 6.3)
    p, q = torch.cos(side) * x + torch.sin(side) * y, torch.cos(side) * y - torch.sin(side) * x
    sticker = torch.sigmoid((u(0.3, 0.6) - torch.hypot(p - u(1.2, 1.6), q)) / px * 3)
    p, q = x + u(-0.2, 0.2) * y + u(-0.5, 0.5), y + u(-0.2, 0.2) * x - u(0.7, 0.9)
    tick = (torch.remainder(p, 0.14) < 0.025) * (q > -0.08) * (q < 0)
    ruler = torch.maximum(torch.exp(-((q / px * 1.4) ** 2)), tick * 0.8) * (p.abs() < u(0.4, 0.7))
    hue = 0.5 + 0.45 * torch.cos(u(0, 6.3) + rgb(0.0, 2.1, 4.2))
    for share, cover, colour in (
        (0.15, ink * u(0.3, 0.9), rgb(0.35, 0.2, 0.55)),
        (0.08, sticker, hue),
        (0.25, ruler * u(0.5, 0.9), rgb(0.25, 0.22, 0.22)),
        (0.5, hair.amax(1, keepdim=True) * u(0.4, 0.9), u(0.05, 0.35) * rgb(1.0, 0.8, 0.65)),
    ):
        img = img + (u(0, 1) < share) * cover * (colour - img)
    # Lamp, vignette, dark corners, white balance, noise.
    far, way = torch.hypot(x - u(-0.2, 0.2), y - u(-0.15, 0.15)), u(0, 6.3)
    light = 1 + u(0, 0.12) * (torch.cos(way) * x + torch.sin(way) * y) - u(0, 0.15) * far**2
    corner = torch.sigmoid((far - u(1.5, 1.75)) / u(0.01, 0.06)) * (u(0, 1) < 0.3)
    img = img * light * u(0.8, 1.08) * u(0.95, 1.05, 3, 1, 1) * (1 - 0.95 * corner)
    img = img + torch.randn(img.shape, generator=g) * u(0.002, 0.012)
    return (img[:n].clamp(0, 1) * 255).round().to(torch.uint8), masks[:n]


def augment(images, masks, generator=None):
    """Per-sample flips, rotation, scale, shift (reflecting) and mild colour, on the images' device.
    images: float (B, 3, H, W) in [0, 1]; masks: float (B, R, H, W) in {0, 1}, sampled nearest.
    The random numbers are drawn on the CPU, so that a resumed run repeats them on any device.
    """
    b, _, h, w = images.shape
    z = (2 * torch.rand(b, 11, generator=generator) - 1).to(images.device)  # (B, 11) in [-1, 1]
    cos, sin = torch.cos(0.26 * z[:, 0]), torch.sin(0.26 * z[:, 0])  # up to 15 degrees
    affine = [cos, -sin * h / w, 0.1 * z[:, 4], sin * w / h, cos, 0.1 * z[:, 5]]
    affine = torch.stack(affine, 1).view(b, 2, 3)
    flip = torch.where(z[:, 2:4] < 0, -1, 1)
    affine[:, :, :2] *= (flip * torch.exp(0.15 * z[:, 1:2]))[:, :, None]
    grid = F.affine_grid(affine, (b, 1, h, w), align_corners=False)  # (B, H, W, 2)
    images = F.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)
    masks = F.grid_sample(masks, grid, "nearest", "reflection", align_corners=False)
    mean, contrast = images.mean((1, 2, 3), keepdim=True), 1 + 0.15 * z[:, 6].view(b, 1, 1, 1)
    tint = (0.1 * z[:, 7:8] + 0.04 * z[:, 8:11])[:, :, None, None]  # (B, 3, 1, 1)
    return (mean + (images - mean) * contrast + tint).clamp(0, 1), masks


@dataclass
class ClassificationSet:
    name: str
    split: str
    ids: list[str]  # paths relative to the root
    images: torch.Tensor  # uint8 (N, 3, H, W)
    labels: torch.Tensor  # int64 (N,) in 0..len(classes) - 1
    classes: list[str]

    def __len__(self):
        return len(self.ids)


def load_classification(name, root, split, size, limit=None, workers=8):
    """Load "train" or "test" at size = (H, W), whatever the image's shape, as a ClassificationSet.
    name: synthetic | folder | cub200 | cars | aircraft | flowers102 | pets. limit: about so many
    images, evenly spaced in the list. Raises DataError for bad data and failed downloads.
    """
    root = Path(root)
    if name == "synthetic":
        n = BIRDS_COUNTS[split]
        images, labels = synthetic_birds(n, size, seed=n)
        step = max(1, n // (limit or n))
        ids = [f"{split}_{i:04d}" for i in range(0, n, step)]
        return ClassificationSet(name, split, ids, images[::step], labels[::step], BIRD_CLASSES)
    if not root.is_dir() and root != Path("data"):  # a typo must not start a download
        raise DataError(f"{root}: this folder does not exist; create it or correct --data-root")
    listing = {"folder": _class_folders, "cub200": _cub200}.get(name, _torchvision)
    sources, classes = listing(name, root, split)
    if len(classes) < 2:
        raise DataError(f"{name} in {root}: only one class, {classes[0]}; at least two are needed")
    sources = sources[:: max(1, len(sources) // (limit or len(sources)))]

    def decode(path, label):
        return read_image(path, size), torch.tensor(label)

    key = f"{name}-{split}-{size[1]}x{size[0]}-{len(sources)}-classes"
    images, labels = _store(key, sources, decode, root, workers)
    ids = [os.path.relpath(path, root) for path, _ in sources]
    return ClassificationSet(name, split, ids, images, labels, classes)


def _class_folders(name, root, split):
    """[(path, label)] and class names of <root>/<train|test>/<class>/*; no class may be empty."""
    parts = {}
    for part in ("train", split):
        if not (root / part).is_dir():
            raise DataError(f"{root / part}: this folder does not exist; it holds a folder a class")
        folders = sorted(p.name for p in (root / part).iterdir() if p.is_dir())
        parts[part] = [name for name in folders if name[0] != "."]
    classes = parts["train"]
    for odd in sorted(set(classes) ^ set(parts[split])):
        raise DataError(f"{root}: class {odd} is not in both train and {split}; add or remove it")
    if not classes:
        raise DataError(f"{root / 'train'}: no class folder here; give each class a folder")
    sources = []
    for label, c in enumerate(classes):
        files = sorted((root / split / c).iterdir())
        files = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != "."]
        if not files:
            raise DataError(f"{root / split / c}: a class with no image; fill or remove the folder")
        sources += [(path, label) for path in files]
    return sources, classes


def _cub200(name, root, split):
    """[(path, label)] and class names of CUB-200-2011 with its official split; fetches it first."""
    folder = root / "CUB_200_2011"
    if not folder.is_dir():
        _fetch(f"{CUB_URL}/CUB_200_2011.tgz", folder, "1.2 GB")

    def column(file):
        return [line.split(maxsplit=1)[1] for line in (folder / file).read_text().splitlines()]

    columns = map(column, ("images.txt", "image_class_labels.txt", "train_test_split.txt"))
    wanted = {"train": "1", "test": "0"}[split]
    rows = [row for row in zip(*columns, strict=True) if row[2] == wanted]
    sources = [(folder / "images" / path, int(c) - 1) for path, c, _ in rows]
    return sources, [c.split(".")[-1].replace("_", " ") for c in column("classes.txt")]


def _torchvision(name, root, split):
    """[(path, label)] and class names by torchvision; flowers102 trains on its train and val."""
    from torchvision import datasets  # here: the segmentation scripts do without it

    loader, train_parts = {
        "cars": (datasets.StanfordCars, ["train"]),
        "aircraft": (datasets.FGVCAircraft, ["trainval"]),
        "flowers102": (datasets.Flowers102, ["train", "val"]),
        "pets": (datasets.OxfordIIITPet, ["trainval"]),
    }[name]
    todo = "check the network and run again"
    if name == "cars":  # its address is dead
        todo = "it cannot be downloaded any more: put cars_train/, cars_test/, devkit/ and "
        todo += f"cars_test_annos_withlabels.mat into {root / 'stanford_cars'}"
    try:
        parts = train_parts if split == "train" else ["test"]
        sets = [loader(root, split=part, download=name != "cars") for part in parts]
    except Exception as error:  # of the network, the archive or a missing scipy: all kinds
        raise DataError(f"{name} in {root}: {' '.join(str(error).split())}; {todo}") from error
    sources = []
    for part in sets:
        if name == "cars":
            files, labels = zip(*part._samples, strict=True)
        else:
            files, labels = getattr(part, "_image_files", None) or part._images, part._labels
        sources += zip(map(Path, files), labels, strict=True)
    return sources, list(sets[0].classes)


def label_split(labels, fraction=None, per_class=None, seed=0):
    """Choose the labelled images, stratified: (labelled, unlabelled) sorted int64 indices.
    labels (N,) int64; either a fraction in (0, 1], at least one image a class, or a number per
    class. Raises DataError if a class has fewer images.
    """
    g, chosen = torch.Generator().manual_seed(seed), []
    for c in labels.unique().tolist():
        mine = (labels == c).nonzero()[:, 0]
        k = per_class or max(1, round(fraction * len(mine)))
        if k > len(mine):
            raise DataError(f"class {c} has {len(mine)} training images, not {k}; label fewer")
        chosen.append(mine[torch.randperm(len(mine), generator=g)[:k]])
    labelled = torch.zeros(len(labels), dtype=torch.bool)
    labelled[torch.cat(chosen)] = True
    return labelled.nonzero()[:, 0], (~labelled).nonzero()[:, 0]


# Colours of (bill, crown, wing bar, tail); two classes differ in at least two of the four parts.
BIRD_PALETTE = [
    [(0.95, 0.75, 0.1), (0.1, 0.1, 0.12), (0.85, 0.2, 0.15)],
    [(0.8, 0.1, 0.1), (0.08, 0.08, 0.1), (0.95, 0.95, 0.9)],
    [(0.95, 0.95, 0.95), (0.95, 0.8, 0.2), (0.1, 0.1, 0.12)],
    [(0.9, 0.5, 0.15), (0.1, 0.15, 0.45), (0.92, 0.92, 0.9)],
]
BIRD_CODES = [(a, b, (a + b) % 3, (a + 2 * b) % 3) for a in range(3) for b in range(3)]
BIRD_CLASSES = ["bird " + "".join(map(str, code)) for code in BIRD_CODES]


def synthetic_birds(n, size, seed, chunk=100):
    """Draw fine-grained birds: images uint8 (n, 3, H, W) and labels int64 (n,).
    Classes share one body; bill, crown, wing bar and tail, each under 5 % of the area, tell them
    apart. Pose, size, tint and background vary freely; blobs of the same colours lie about.
    """
    if n > chunk:  # to bound memory; each chunk has its seed
        rest = range(0, n, chunk)
        parts = [synthetic_birds(min(chunk, n - i), size, seed + 9973 * i) for i in rest]
        return tuple(torch.cat(x) for x in zip(*parts, strict=True))
    (h, w), g, b = size, torch.Generator().manual_seed(seed), chunk  # drawn whole: n never matters

    def u(lo, hi, *shape):  # uniform; one number per image unless a shape is given
        return lo + (hi - lo) * torch.rand(b, *(shape or (1, 1, 1)), generator=g)

    def field(cells):  # smooth noise (B, 3, H, W), standard deviation about 1
        z = 1.3 * torch.randn(b, 3, cells, cells, generator=g)
        return F.interpolate(z, (h, w), mode="bicubic", align_corners=True)

    labels = torch.randint(len(BIRD_CODES), (b,), generator=g)
    code = torch.tensor(BIRD_CODES)[labels]  # (B, 4)
    colour = torch.tensor(BIRD_PALETTE)[torch.arange(4), code]  # (B, 4, 3)
    colour = (colour + u(-0.08, 0.08, 4, 3))[..., None, None]  # (B, 4, 3, 1, 1)
    px = 2 / min(h, w)  # the short side spans -1..1
    y, x = (torch.arange(h) - h / 2 + 0.5)[:, None] * px, (torch.arange(w) - w / 2 + 0.5) * px
    # The bird's frame: p along the body to the bill, q down.
    turn, scale = u(-0.45, 0.45), u(0.85, 1.2)
    dx, dy = x - u(-0.2, 0.2), y - u(-0.2, 0.2)
    p = (turn.cos() * dx + turn.sin() * dy) / scale * torch.where(u(0, 1) < 0.5, -1, 1)
    q = (turn.cos() * dy - turn.sin() * dx) / scale

    def ellipse(cp, cq, rp, rq, tilt=0.0, at=(p, q)):  # cover (B, 1, H, W) in [0, 1]
        a, c = at[0] - cp, at[1] - cq
        a, c = a * math.cos(tilt) + c * math.sin(tilt), c * math.cos(tilt) - a * math.sin(tilt)
        inside = (1 - torch.hypot(a / rp, c / rq)) * torch.as_tensor(min(rp, rq)) / px
        return torch.sigmoid(4 * inside)

    tint = u(0.2, 0.75) + u(-0.15, 0.15, 3, 1, 1)  # of the body: (B, 3, 1, 1)
    img = u(0.15, 0.85, 3, 1, 1) + u(0.05, 0.2) * field(4) + 0.05 * field(12)
    palette = torch.tensor(BIRD_PALETTE).flatten(0, 1)  # (12, 3)
    stray = palette[torch.randint(len(palette), (b, 8), generator=g)][..., None, None]
    for k in range(8):
        blob = ellipse(u(-1, 1), u(-1, 1), 0.08 + 0.06 * (k % 3), 0.06 + 0.04 * (k % 2), k, (x, y))
        img = img + blob * (stray[:, k] - img)
    for cover, paint in (
        (ellipse(-0.62, 0.24, 0.32, 0.1, -0.35), colour[:, 3]),
        (ellipse(0, 0.08, 0.46, 0.29), tint),
        (ellipse(0.36, -0.25, 0.22, 0.2), tint * 1.05),
        (ellipse(0.66, -0.22, 0.17, 0.07, 0.1), colour[:, 0]),
        (ellipse(0.34, -0.37, 0.19, 0.1, 0.1), colour[:, 1]),
        (ellipse(0.43, -0.24, 0.05, 0.05), torch.tensor(0.05)),
        (ellipse(-0.12, 0.06, 0.33, 0.17, -0.15), tint * 0.7),
        (ellipse(-0.05, 0.08, 0.08, 0.18, 0.3), colour[:, 2]),
    ):
        img = img + cover * (paint - img)
    light = u(0.75, 1.1) + u(-0.15, 0.15) * x + u(-0.15, 0.15) * y
    img = img * light + torch.randn(img.shape, generator=g) * u(0.01, 0.04)
    return (img[:n].clamp(0, 1) * 255).round().to(torch.uint8), labels[:n]
