"""Data sets as small uint8 tensors: decoded once, cached beside the data, indexed in memory.

    train = load_segmentation("isic2018", "data", "train", size=(96, 128))  # a SegmentationSet
    x = train.images[torch.randint(len(train), (24,))].float() / 255        # (24, 3, 96, 128)

Sets: `isic2018` (official folders, downloaded where missing), `folder` (your own images and masks)
and `synthetic` (dermoscopy drawn by this file, four raters per image; needs no data at all).
Whatever is wrong with the data is said in one line: `DataError`.
"""

import argparse
import hashlib
import http.client
import math
import os
import random
import shutil
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

ISIC_URL = os.environ.get("ISIC_URL", "https://isic-challenge-data.s3.amazonaws.com/2018")
ISIC_SPLITS = {"train": "Training", "val": "Validation", "test": "Test"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
MAX_PIXELS = 400_000_000  # 20,000 x 20,000: 1.2 GB once decoded; a larger file gets a DataError
SPLIT_SEED = 2018  # of the splits drawn for a folder without them; not the run's seed
SYNTHETIC_COUNTS = {"train": 600, "val": 64, "test": 128}
SYNTHETIC_SEEDS = {"train": 11, "val": 12, "test": 13}
SPLITS = ("train", "val", "test")
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow's own limit warns from 89 million on


class DataError(ValueError):
    """One line for the user: which file, what is wrong with it, what to do."""


def parse_size(text):
    """argparse type: "64" -> (64, 64), "64x48" (width x height) -> (48, 64) = (height, width)."""
    try:
        width, height = map(
            int, (text.lower().split("x") * 2)[:2] if "x" not in text else text.lower().split("x")
        )
    except ValueError:
        raise argparse.ArgumentTypeError(f"size {text!r} is neither N nor WIDTHxHEIGHT") from None
    if any(n < 16 or n % 8 for n in (height, width)):
        raise argparse.ArgumentTypeError(f"size {text!r}: both sides must be multiples of 8, >= 16")
    return height, width


# ---------------------------------------------------------------- reading files


def _open(path, mask=False, size=None):
    """Open, orient by EXIF and flatten an image to "RGB", or to grey levels (numpy) for a mask."""
    with Image.open(path) as img:
        if img.width * img.height > MAX_PIXELS:
            raise ValueError(f"{img.width} x {img.height} px, the limit is {MAX_PIXELS:,} px")
        if size is not None:  # JPEG only: decode at 1/2, 1/4 or 1/8, never below the size asked for
            img.draft(None, (max(size), max(size)))
        img = ImageOps.exif_transpose(img)
        if img.mode[0] in "IF":  # 16 and 32 bits per pixel
            grey = np.nan_to_num(np.asarray(img, dtype=np.float32)).clip(0)
            if mask:
                return grey
            tops = (1, 255, 65535, 2**32) if img.mode == "F" else (65535, 2**32)
            top = next(t for t in tops if grey.max(initial=0) <= t)
            img = Image.fromarray((grey * (255 / top) + 0.5).astype(np.uint8))
        if "A" in img.mode or "a" in img.mode or "transparency" in img.info:
            img = img.convert("RGBA")
            img = Image.alpha_composite(
                Image.new("RGBA", img.size, "black" if mask else "white"), img
            )
        return np.asarray(img.convert("L")) if mask else img.convert("RGB")


def read_image(path, size=None):
    """Read any image file as uint8 (3, H, W); size = (H, W) resizes it, antialiased.

    EXIF rotation is applied; grey, palette, CMYK and 16-bit images are converted, transparency is
    laid on white. Raises DataError for a file that is unreadable, truncated or above MAX_PIXELS.
    """
    try:
        img = _open(path, size=size)
    except Exception as error:  # Pillow's readers raise all kinds
        raise DataError(f"{path}: unreadable image ({error}); replace or remove it") from error
    if size is not None:
        img = img.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(img)).permute(2, 0, 1).contiguous()  # (3, H, W)


def read_mask(path, size=None, exif_from=None):
    """Read a mask file as uint8 (1, H, W) in {0, 1}; size = (H, W) resizes by area, then at half.

    Levels count relative to the brightest (0/1, 0/255, anti-aliased). It is many-valued, DataError,
    if the brightest is 2..31 (class labels), or if over 10 % of the pixels lie within 10..90 %, or
    over 1 % do in flat 2 x 2 patches (a third class). exif_from = the image: a mask without EXIF
    of its own, stored in the image's stored size, is rotated as the image; the sizes must agree.
    """
    try:
        grey = _open(path, mask=True)
        if exif_from is not None:
            with Image.open(exif_from) as img, Image.open(path) as raw:
                turn = img.getexif().get(0x0112, 1)
                own, same = raw.getexif().get(0x0112, 1), raw.size == img.size
                upright = img.size[:: -1 if turn >= 5 else 1]
    except Exception as error:
        raise DataError(f"{path}: unreadable mask ({error}); replace or remove it") from error
    if exif_from is not None:
        if turn > 1 and own == 1 and same:
            tag = Image.Exif()
            tag[0x0112] = turn
            img = Image.fromarray(grey)
            img.info["exif"] = tag.tobytes()
            grey = np.asarray(ImageOps.exif_transpose(img))
        if grey.shape[::-1] != upright:
            raise DataError(
                f"{path}: {grey.shape[1]} x {grey.shape[0]} px, but its image {exif_from} is {upright[0]} x {upright[1]}; export it in the image's size"
            )
    top = float(grey.max())
    mid = (grey > 0.1 * top) & (grey < 0.9 * top)
    flat = mid[1:, 1:] & (grey[1:, 1:] == grey[:-1, 1:]) & (grey[1:, 1:] == grey[1:, :-1])
    if 2 <= top < 32 or mid.mean() > 0.1 or flat.mean() > 0.01:
        raise DataError(
            f"{path}: a mask with more than two values; save it as 0 (background) and 255 (lesion)"
        )
    img = Image.fromarray((grey > top / 2).astype(np.uint8) * 255)
    if size is not None:
        img = img.resize((size[1], size[0]), Image.Resampling.BOX)
    return torch.from_numpy((np.asarray(img) >= 128).astype(np.uint8))[None]  # (1, H, W)


# ---------------------------------------------------------------- the store


def _store(key, sources, decode, root):
    """Decode sources in threads, or load the cache: a list of tensors, one row per source.

    key: file name of the cache; sources: tuples whose Paths are read (other items, as labels, count
    in the cache's key too); decode(*source) -> tuple of tensors. The cache, `<root>/.cache/<key>.pt`,
    is valid for the listing (path, bytes, mtime) it was built from.
    """
    listing = hashlib.sha256(b"v1")
    for item in (item for source in sources for item in source):
        stat = item.stat() if isinstance(item, Path) else None
        listing.update(repr((str(item), stat and (stat.st_size, stat.st_mtime_ns))).encode())
    cache = Path(root) / ".cache" / f"{key}.pt"
    try:
        saved = torch.load(cache, mmap=True, weights_only=True)
        if saved["listing"] == listing.hexdigest():
            return saved["columns"]
    except Exception:  # none yet, or broken: torch raises all kinds; it is built anew
        pass
    columns = []
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        rows = pool.map(lambda source: decode(*source), sources)
        for i, row in enumerate(tqdm(rows, f"{key}: decoding", len(sources), unit="image")):
            columns = columns or [x.new_empty(len(sources), *x.shape) for x in row]
            for column, x in zip(columns, row, strict=True):
                column[i] = x
    temp = cache.with_name(f"{cache.name}.{os.getpid()}")
    try:
        cache.parent.mkdir(exist_ok=True)
        torch.save({"listing": listing.hexdigest(), "columns": columns}, temp)
        os.replace(temp, cache)
    except (OSError, RuntimeError) as error:  # read-only place, disk full
        print(f"warning: no cache at {cache} ({error}): decoding again next time", file=sys.stderr)
        if temp.is_file():
            temp.unlink()
    return columns


# ---------------------------------------------------------------- segmentation sets


@dataclass
class SegmentationSet:
    """images uint8 (N, 3, H, W); masks uint8 (N, R, H, W) in {0, 1}, R raters (0: images only)."""

    name: str
    split: str
    ids: list[str]
    images: torch.Tensor
    masks: torch.Tensor

    def __len__(self):
        return len(self.ids)


def load_segmentation(name, root, split, size, limit=None, images_only=False):
    """Load one split of isic2018 | folder | synthetic, size = (H, W), as a SegmentationSet.

    limit: only the first n images. images_only: no mask file is opened or even looked for.
    Raises DataError for whatever is wrong with the data, and if there are fewer images than limit.
    """
    if name not in ("isic2018", "folder", "synthetic") or split not in SPLITS:
        raise DataError(f"no segmentation set {name!r} with a split {split!r}")
    root = Path(root)
    if name == "synthetic":
        pairs = [(f"synthetic_{split}_{i:04d}",) for i in range(SYNTHETIC_COUNTS[split])]
    elif name == "isic2018":
        pairs = _isic_pairs(root, split, images_only)
    else:
        pairs = _folder_pairs(root, split, images_only)
    if limit is not None and not 1 <= limit <= len(pairs):
        raise DataError(f"{name} {split} ({root}) has {len(pairs)} images, {limit} were asked for")
    pairs = pairs[:limit]
    if name == "synthetic":
        images, masks = synthetic_dermoscopy(len(pairs), size, SYNTHETIC_SEEDS[split])
        masks = masks[:, :0] if images_only else masks
        return SegmentationSet(name, split, [p[0] for p in pairs], images, masks)

    def decode(image, mask=None):
        x = read_image(image, size)
        return (x,) if mask is None else (x, read_mask(mask, size, exif_from=image))

    part = f"{len(pairs)}{'-images' if images_only else ''}"
    key = f"{name}-{split}-{size[1]}x{size[0]}-{part}"
    images, *masks = _store(key, pairs, decode, root)
    masks = masks[0] if masks else images.new_empty(len(images), 0, *size)
    return SegmentationSet(name, split, [p[0].stem for p in pairs], images, masks)


def _pairs(images, masks, images_only=False):
    """Sorted [(image, mask)] paths of two folders, matched by stem; [(image,)] if images_only."""

    def listing(folder):
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        files = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != "."]
        if not files:
            what = "has no image in it" if folder.is_dir() else "does not exist"
            raise DataError(
                f"{folder}: this folder {what}; put the images there or check --data-root"
            )
        return {p.stem.removesuffix("_segmentation"): p for p in files}

    x = listing(images)
    if images_only:
        return [(x[stem],) for stem in sorted(x)]
    y = listing(masks)
    for have, lack, what, folder in ((x, y, "mask", masks), (y, x, "image", images)):
        odd = sorted(set(have) - set(lack))
        if odd:
            more = f" (nor have {len(odd) - 1} more)" if odd[1:] else ""
            raise DataError(
                f"{have[odd[0]]}: has no {what} in {folder}{more}; add it or remove the file"
            )
    return [(x[stem], y[stem]) for stem in sorted(x)]


def _folder_pairs(root, split, images_only):
    """`<root>/<split>/{images,masks}`, or a seeded split: train 90/10 if no val, else 80/10/10."""
    if not root.is_dir():
        raise DataError(f"{root}: this folder does not exist; check --data-root")
    if split == "test" or (root / "val").is_dir():
        if (root / "train").is_dir() or (root / split).is_dir():
            return _pairs(root / split / "images", root / split / "masks", images_only)
    where, test_share = (root / "train", 0) if (root / "train").is_dir() else (root, 0.1)
    pairs = _pairs(where / "images", where / "masks", images_only)
    order = random.Random(SPLIT_SEED).sample(range(len(pairs)), len(pairs))
    n_test, n_val = (
        max(1, round(share * len(pairs))) if share else 0 for share in (test_share, 0.1)
    )
    part = {"test": order[:n_test], "val": order[n_test:][:n_val], "train": order[n_test + n_val :]}
    if not part[split]:
        raise DataError(f"{where}: {len(pairs)} images are too few to split; add some")
    return [pairs[i] for i in sorted(part[split])]


def _isic_pairs(root, split, images_only):
    """The pairs of ISIC 2018 Task 1; a folder found in neither <root>/isic2018 nor <root> is fetched."""
    if not root.is_dir() and root != Path("data"):
        raise DataError(
            f"{root}: this folder does not exist; create it to download ISIC 2018 there"
        )
    names = [f"ISIC2018_Task1-2_{ISIC_SPLITS[split]}_Input"]
    names += [] if images_only else [f"ISIC2018_Task1_{ISIC_SPLITS[split]}_GroundTruth"]
    folders = []
    for name in names:
        places = [root / "isic2018" / name, root / name]
        folders.append(next((p for p in places if p.is_dir()), places[0]))
        if not folders[-1].is_dir():
            _fetch_zip(f"{ISIC_URL}/{name}.zip", folders[-1])
    return _pairs(folders[0], folders[-1], images_only)


def _fetch_zip(url, folder):
    """Download a zip and unpack its images into folder, which appears only once it is complete."""
    archive, temp = folder.with_name(f"{folder.name}.zip"), folder.with_name(f".{folder.name}.tmp")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not archive.exists():
        print(f"downloading {url} (all of ISIC 2018 Task 1: about 13 GB)", file=sys.stderr)
        _download(url, archive)
    try:
        with zipfile.ZipFile(archive) as z:
            if z.testzip():
                raise zipfile.BadZipFile(f"bad entry {z.testzip()}")
            shutil.rmtree(temp, ignore_errors=True)
            temp.mkdir()
            for entry in z.infolist():
                name = Path(entry.filename.replace("\\", "/")).name  # flat: nothing can escape
                if Path(name).suffix.lower() in IMAGE_SUFFIXES and name[0] != ".":
                    with z.open(entry) as source, open(temp / name, "wb") as target:
                        shutil.copyfileobj(source, target)
        os.replace(temp, folder)
        archive.unlink()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        archive.unlink()
        raise DataError(
            f"{archive}: corrupt zip ({error}), now deleted; run again to download it"
        ) from error
    except OSError as error:
        shutil.rmtree(temp, ignore_errors=True)
        raise DataError(
            f"{archive}: cannot be unpacked ({error}); make room and run again"
        ) from error


def _download(url, path):
    """Stream url to `<path>.part`, resuming what is there; rename it to path once it is whole."""
    part = path.with_name(f"{path.name}.part")
    start = part.stat().st_size if part.exists() else 0
    advice = f"check the network or fetch it by hand to {path}; {part.name} is kept, the next run resumes"
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        with urllib.request.urlopen(request, timeout=60) as response:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                start = 0  # this server does not resume: from the beginning
            total = start + int(response.headers.get("Content-Length", 0))
            bar = tqdm(None, path.name, total, initial=start, unit="B", unit_scale=True)
            with open(part, "ab" if start else "wb") as file, bar:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
        if total and part.stat().st_size != total:
            raise OSError(f"broken off at {part.stat().st_size:,} of {total:,} bytes")
    except (
        OSError,
        http.client.HTTPException,
    ) as error:  # OSError: also HTTP status, timeout, disk
        if (
            getattr(error, "code", 0) == 416 and part.exists()
        ):  # .part is as long as the file, or longer
            whole = error.headers.get("Content-Range", "").endswith(f"/{start}")
            if not whole:
                part.unlink()
                return _download(url, path)
        else:
            raise DataError(f"{url}: download failed ({error}); {advice}") from error
    os.replace(part, path)


# ---------------------------------------------------------------- synthetic dermoscopy


def synthetic_dermoscopy(n, size, seed):
    """Draw n images uint8 (n, 3, H, W) and four raters' masks uint8 (n, 4, H, W) in {0, 1}.

    Raters: tight, loose, polygonal, smooth. The first k of n images do not depend on n.
    """
    chunk = 50
    parts = [_draw_lesions(chunk, size, 1000 * seed + i) for i in range(math.ceil(n / chunk))]
    images, masks = (torch.cat(x)[:n] for x in zip(*parts, strict=True))
    return images, masks


def _draw_lesions(b, size, seed):
    h, w = size
    g = torch.Generator().manual_seed(seed)

    def u(lo, hi, *shape):  # uniform, per image
        return lo + (hi - lo) * torch.rand(b, *(shape or (1, 1, 1)), generator=g)

    def some(share):  # 1 in that share of the images, else 0
        return (u(0, 1) < share).float()

    def field(cells, channels=1):  # smooth noise, std about 1
        z = torch.randn(b, channels, cells, cells + 1, generator=g)
        return F.interpolate(z, (h, w), mode="bicubic", align_corners=True) * 1.3

    short = min(h, w)
    y = (torch.arange(h) + 0.5 - h / 2)[:, None].mul(2 / short).expand(h, w)
    x = (torch.arange(w) + 0.5 - w / 2)[None].mul(2 / short).expand(h, w)  # short side: -1..1
    px = 2 / short

    # outline: log radius as a Fourier series of the angle, warped by noise; level > 0 inside
    z = torch.randn(b, 1, 1, 1, generator=g)
    area = (0.13 * torch.exp(torch.where(z < 0, 1.15 * z, 0.78 * z))).clamp(0.01, 0.8)
    r0 = torch.sqrt(area * (h * w * px * px) / math.pi)
    cy, cx = u(-0.3, 0.3) * (1.2 - r0).clamp(0, 1), u(-0.4, 0.4) * (1.2 - r0).clamp(0, 1)
    dy, dx = y - cy, x - cx
    rho, theta = torch.sqrt(dx**2 + dy**2).clamp(min=1e-4), torch.atan2(dy, dx)
    k = torch.arange(1, 9).float()
    amp = torch.randn(b, 8, generator=g) * u(0.05, 0.2, 1) / k**0.9
    phase = u(0, 2 * math.pi, 8)

    def log_radius(angle, order):  # angle (B, 1, ...) -> the same shape
        wave = torch.cos(angle[..., None] * k[:order] + phase[:, None, None, None, :order])
        return (wave * amp[:, None, None, None, :order]).sum(-1)

    base = torch.log(r0 / rho)
    warp = 0.06 * field(9) + 0.03 * field(18)
    level = base + log_radius(theta, 8) + warp
    soft = u(0.03, 0.22)
    alpha = torch.sigmoid(level / (soft * (1 + 0.4 * field(4)).clamp(0.3, 2)) * 1.5)

    # raters
    corners = 9
    turn = u(0, 2 * math.pi)
    step = 2 * math.pi / corners
    at = turn + step * torch.arange(corners).float()[None, None, None]  # (B,1,1,K)
    rad = torch.exp(log_radius(at, 8) + u(-0.02, 0.07, 1, 1, corners)).flatten(1)
    pos = torch.remainder(theta - turn, 2 * math.pi) / step
    i = pos.long().clamp(0, corners - 1)
    r1 = rad.gather(1, i.flatten(1)).view_as(theta)
    r2 = rad.gather(1, ((i + 1) % corners).flatten(1)).view_as(theta)
    f = (pos - i) * step
    chord = r1 * r2 * math.sin(step) / (r1 * torch.sin(f) + r2 * torch.sin(step - f))
    levels = [
        level - u(0.02, 0.09),
        level + 0.05 * field(7) + u(0.03, 0.12),
        base + torch.log(chord),
        base + log_radius(theta, 3) + u(-0.03, 0.05),
    ]
    masks = (torch.cat(levels, 1) > 0).to(torch.uint8)

    # colours by absorption (red, green, blue) of melanin and blood
    melanin = torch.tensor([0.35, 0.62, 0.9]).view(3, 1, 1)
    blood = torch.tensor([0.06, 0.5, 0.4]).view(3, 1, 1)
    mole = u(0.2, 1.5) * (1 - 1.4 * some(0.02))
    texture = (1 + 0.35 * field(4) + 0.25 * field(12) + 0.15 * field(40)).clamp(0.1, 2.5)
    red = u(0, 0.3) + 0.6 * some(0.12)
    dens = (u(0.1, 0.6) + 0.04 * field(30)) * melanin + (u(0.1, 0.5) + 0.08 * field(4)) * blood
    dens = dens + alpha * mole * texture * melanin + alpha * (red + 0.15 * field(5)) * blood
    img = u(0.9, 1.0) * torch.exp(-dens)

    def paint(cover, colour):
        nonlocal img
        img = img + cover * (colour - img)

    # hairs
    n_hair = 14
    ang, off, bend = (
        u(0, math.pi, n_hair, 1, 1),
        u(-1.4, 1.4, n_hair, 1, 1),
        u(-0.5, 0.5, n_hair, 1, 1),
    )
    across = torch.cos(ang) * x + torch.sin(ang) * y - off
    along = torch.cos(ang) * y - torch.sin(ang) * x - u(-0.8, 0.8, n_hair, 1, 1)
    wide = u(0.006, 0.022, n_hair, 1, 1)
    line = torch.exp(-(((across - bend * along**2) / wide.clamp(min=px * 0.5)) ** 2))
    line = line * (wide / (px * 0.5)).clamp(max=1) * (along.abs() < u(0.3, 1.4, n_hair, 1, 1))
    count = some(0.45) * u(1, n_hair)
    line = line * (torch.arange(n_hair).view(-1, 1, 1) < count)
    paint(
        line.amax(1, keepdim=True) * u(0.4, 0.9),
        u(0.05, 0.4) * torch.tensor([1.0, 0.8, 0.65]).view(3, 1, 1),
    )

    # light
    slope, way = u(0, 0.2), u(0, 2 * math.pi)
    light = 1 + slope * (torch.cos(way) * x + torch.sin(way) * y)
    r_img = torch.sqrt((x - u(-0.2, 0.2)) ** 2 + (y - u(-0.15, 0.15)) ** 2)
    light = light * (1 - u(0, 0.25) * r_img**2)
    rim = u(1.05, 1.6)
    aperture = torch.sigmoid((rim - r_img) / u(0.01, 0.05))
    light = light * (1 - some(0.3) * (1 - aperture) * 0.95)
    img = img * light * u(0.93, 1.07, 3, 1, 1)
    img = img + torch.randn(img.shape, generator=g) * u(0.004, 0.02)
    return (img.clamp(0, 1) * 255).round().to(torch.uint8), masks


def augment(images, masks, generator=None):
    """Per-sample random flips, rotation, scale, shift and mild colour, on the images' device.

    images: float (B, 3, H, W) in [0, 1]; masks: float (B, R, H, W) in {0, 1}, sampled nearest.
    Random numbers come from the CPU generator, so that a resumed run repeats them on any device.
    """
    b, _, h, w = images.shape
    z = (2 * torch.rand(b, 12, generator=generator) - 1).to(images.device)  # (B, 12) in [-1, 1]
    angle, scale = z[:, 0] * math.pi / 12, torch.exp(0.15 * z[:, 1])
    flip_x, flip_y = z[:, 2].sign() * scale, z[:, 3].sign() * scale
    cos, sin = torch.cos(angle), torch.sin(angle)
    row_x = torch.stack([cos * flip_x, -sin * flip_x * h / w, 0.1 * z[:, 4]], 1)
    row_y = torch.stack([sin * flip_y * w / h, cos * flip_y, 0.1 * z[:, 5]], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), (b, 1, h, w), align_corners=False)
    options = {"padding_mode": "reflection", "align_corners": False}
    images = F.grid_sample(images, grid.to(images), mode="bilinear", **options)
    masks = F.grid_sample(masks, grid.to(masks), mode="nearest", **options)
    contrast, gain = 1 + 0.15 * z[:, 6, None], 0.1 * z[:, 7, None] + 0.04 * z[:, 8:11]
    mean = images.mean((1, 2, 3))[:, None]
    images = (images - mean[:, :, None, None]) * contrast[..., None, None] + (mean + gain)[
        ..., None, None
    ]
    return images.clamp(0, 1), masks
