"""Files in, files out: what the three scripts share beside the CRF.

Files in: data sets as small uint8 tensors, decoded once, cached beside the data, indexed in memory.

    train = load_segmentation("isic2018", "data", "train", size=(96, 128))  # a SegmentationSet
    x = train.images[torch.randint(len(train), (24,))].float() / 255        # (24, 3, 96, 128)
    birds = load_classification("cub200", "data", "train", size=(256, 256))  # a ClassificationSet
    labelled, unlabelled = label_split(birds.labels, per_class=4, seed=0)   # indices, stratified

Files out: flags that a checkpoint remembers, checkpoints, result.json, sheets of pictures.
"""

import argparse
import contextlib
import functools
import hashlib
import http.client
import itertools
import json
import math
import os
import shlex
import shutil
import sys
import tarfile
import tempfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock  # comes with torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, ImageStat
from torchvision import datasets
from tqdm import tqdm

ISIC_URL = "https://isic-challenge-data.s3.amazonaws.com/2018"
CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files"
ISIC_SPLITS = {"train": "Training", "val": "Validation", "test": "Test"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
Image.MAX_IMAGE_PIXELS = 200_000_000  # Pillow refuses files of more than twice as many
CACHE_FORMAT = 3  # count up when decoding changes: caches of another format are built anew
SPLIT_SEED = 2018  # of the splits drawn for a folder that has none; not the run's seed
SYNTHETIC_COUNTS = {"train": 600, "val": 64, "test": 128}
BIRDS_COUNTS = {"train": 1000, "test": 600}
# Flags that may differ from those in a checkpoint; every other flag must agree with it.
FREE = {"device", "num_workers", "out", "resume", "eval_only", "checkpoint", "predict", "command"}


class DataError(ValueError):
    """For the user, a line each: which file or flag, what is wrong with it, what to do."""


# ==================================================================================================
# 1. Command line
# ==================================================================================================


def number(low, high=math.inf, kind=float):
    """argparse type: a finite number from low to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            most = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} must be at least {low}{most}")
        return value

    parse.__name__ = "number" if kind is float else "whole number"  # for argparse's own message
    return parse


whole = functools.partial(number, kind=int)  # argparse type: a whole number from low to high


def parse_size(text):
    """argparse type: "64" -> (64, 64), "64x48" (width x height) -> (48, 64) = (height, width)."""
    sides = [int(n) if n.isdecimal() else 0 for n in text.lower().split("x")]
    if len(sides) > 2 or any(n < 16 or n % 8 for n in sides):
        why = "give N or WIDTHxHEIGHT, multiples of 8 and at least 16, as in 64x48"
        raise argparse.ArgumentTypeError(f"size {text!r}: {why}")
    return sides[-1], sides[0]


def parse_device(text):
    """argparse type: auto, cpu, cuda or cuda:N, tried at once; auto is a GPU if there is one."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.empty(1, device=text).device.type not in ("cpu", "cuda"):
            raise RuntimeError(text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text} is not usable here; take cpu") from error
    return text


def _absolute(text):
    """argparse type: a path that means the same from every directory."""
    return str(Path(text).resolve())


def bf16_is_fast(device):
    """Whether the device computes in bfloat16 itself and does not only emulate it."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older torch: not known
    return device == "cpu" and bool(capabilities.get("avx512_bf16"))


def make_parser(script, doc):
    """An argument parser with the flags that all scripts share; each adds its own."""
    parser = argparse.ArgumentParser(script, description=doc.split("\n")[0])
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    where = "folder that holds, or will receive, the data set"
    add("--data-root", type=_absolute, default="data", help=where)
    add("--seed", type=whole(0, 2**32 - 1), default=0, help="seed of all that is drawn at random")
    add("--device", type=parse_device, default="auto", help="auto, cpu, cuda or cuda:N")
    add("--amp", choices=["on", "off"], help="bf16 autocast [on where it is fast]")
    add("--compile", action="store_true", help="torch.compile the networks in training")
    add("--num-workers", type=whole(1), default=8, help="threads that decode images, once")
    add("--out", default="out", help="results go to OUT/method/data/seedK")
    add("--checkpoint", metavar="FILE", help="best.pt elsewhere, for --eval-only and --predict")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--resume", action="store_true", help="go on from the last checkpoint, exactly")
    one("--eval-only", action="store_true", help="no training: the table again, from best.pt")
    one("--predict", nargs="+", metavar="PATH", help="apply it to images or folders of images")
    add("--quick", action="store_true", help="a few steps on a few images: does it run at all?")
    add("--save-every", type=whole(1), default=100, help="steps between checkpoints")
    return parser


def parse_flags(parser, argv, method):
    """Parse argv; with --resume, --eval-only and --predict all flags but FREE are the checkpoint's.

    Returns the flags and, as `command`, the command line that trains or trained. Raises DataError
    if the checkpoint cannot be used or a given flag differs from it: that would be another run.
    But data may lie elsewhere now, and --predict takes --amp from its own device.
    """

    def parse():
        args = parser.parse_args(argv)
        args.amp = args.amp or ("on" if bf16_is_fast(args.device) else "off")
        return args

    args = parse()
    if args.checkpoint and not (args.eval_only or args.predict):
        parser.error("--checkpoint goes with --eval-only or --predict; to go on, take --resume")
    args.command = shlex.join(["python", parser.prog, *(sys.argv[1:] if argv is None else argv)])
    folder = run_folder(method, args)
    path = args.checkpoint or folder / "best.pt"
    if args.resume:
        found = sorted(folder.glob("*.pt"))
        if not found:
            raise DataError(f"{folder}: no checkpoint to go on from; leave --resume out")
        path = found[0]
    elif not (args.eval_only or args.predict):
        return args
    saved = load_checkpoint(path, method)
    if "nets" not in saved and not args.resume:
        raise DataError(f"{path} is not the best.pt of a finished run; name that, or --resume it")
    saved = saved["args"]
    free = FREE | {"amp"} if args.predict else FREE
    kept = {name: value for name, value in saved.items() if name not in free}
    parser.set_defaults(**kept)
    args = parse()
    args.command = saved["command"]
    for name, was in kept.items():
        now = getattr(args, name)
        if now != was and name != "data_root":  # the data's fingerprint is compared instead
            if name == "size":
                was, now = (f"{w}x{h}" for h, w in (was, now))
            flag = name.replace("_", "-")
            raise DataError(f"{path} was trained with --{flag} {was}, not {now}; leave it out")
    return args


def run_folder(method, args):
    """The folder of a run, OUT/method/DATA/seedK[-exemplar][-quick]; that of --checkpoint."""
    if args.eval_only and args.checkpoint:
        return Path(args.checkpoint).parent
    data = Path(args.data_root).name if args.data == "folder" else args.data
    parts = [f"seed{args.seed}", getattr(args, "exemplar", ""), "quick" * args.quick]
    parts.append("validate" * getattr(args, "validate", False))
    return Path(args.out, method, data, "-".join(filter(None, parts)).replace(":", ""))


def fresh_folder(folder, args):
    """Make the folder of a run; an earlier run's checkpoints and tables in it are removed.

    Raises DataError if that was of another data set in a folder of the same name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note, source = folder / "data.txt", args.data_root if args.data == "folder" else args.data
    if note.exists() and note.read_text() != source:
        raise DataError(f"{folder} has a run of {note.read_text()}, which would go; give an --out")
    note.write_text(source)
    for file in folder.iterdir():
        if file.suffix in (".pt", ".csv", ".json"):
            file.unlink()


@contextlib.contextmanager
def one_line_errors(script):
    """Around a whole run: foreseeable errors become one line each and exit status 2."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"{script}: stopped; --resume goes on from what was saved", file=sys.stderr)
        raise SystemExit(130) from None
    except (DataError, OSError, torch.cuda.OutOfMemoryError) as error:
        why = str(error) or repr(error)
        if isinstance(error, torch.cuda.OutOfMemoryError):
            why = "the GPU's memory is full: lower --batch-size or --size"
        for line in why.splitlines():
            print(f"{script}: error: {line}", file=sys.stderr)
        raise SystemExit(2) from None


# ==================================================================================================
# 2. Checkpoints and results
# ==================================================================================================


def fingerprint(*things):
    """A short hash of lists, numbers and strings: are these the same data as then?"""
    return hashlib.sha256(repr(things).encode()).hexdigest()[:16]


def save_checkpoint(path, method, args, data, parts=None, **more):
    """Write flags, fingerprint of the data and more; returns what was written.

    parts {name: network, optimiser ...}: their states too and the random generators', for resume.
    """
    state = {"method": method, "args": vars(args), "data": data, **more}
    if parts:
        gpu = torch.cuda.get_rng_state(args.device) if args.device.startswith("cuda") else None
        state["rng"] = {"cpu": torch.get_rng_state(), "gpu": gpu}
        state |= {name: part.state_dict() for name, part in parts.items()}
    _save(state, path)
    return state


def _save(state, path):
    """torch.save so that either the old file or the whole new one is there, never half."""
    temp = path.with_suffix(f".{os.getpid()}")
    try:
        torch.save(state, temp)
        os.replace(temp, path)
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
        raise DataError(f"cannot write {path} ({error}); older files are intact") from error
    finally:
        temp.unlink(missing_ok=True)


def load_checkpoint(path, method, data=None):
    """Read a checkpoint onto the CPU; data: the fingerprint of the run's data as they are now.

    Raises DataError if it is missing, broken, another method's or of other data.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        todo = "train to the end first (--resume), or name one by --checkpoint"
        raise DataError(f"no checkpoint {path}: {todo}") from None
    except Exception as error:  # torch and zipfile raise all kinds
        raise DataError(f"{path} is not a readable checkpoint; name a best.pt") from error
    if not isinstance(state, dict) or state.get("method") != method:
        raise DataError(f"{path} is a checkpoint of something else, not of {method}")
    if data not in (None, state["data"]):
        raise DataError(f"{path}: the data changed since; train again")
    return state


def resume(path, method, args, data, parts):
    """Restore parts and random generators from what save_checkpoint wrote; returns all of that.

    {} without --resume, or if there is no file. On another device a GPU keeps its own generator.
    """
    if not (args.resume and path.exists()):
        return {}
    state = load_checkpoint(path, method, data)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["rng"]["cpu"])
    if args.device.startswith("cuda") and state["rng"]["gpu"] is not None:
        torch.cuda.set_rng_state(state["rng"]["gpu"], args.device)
    return state


def write_result(path, method, args, rows, **more):
    """Write result.json, whole or not at all: what ran, on what, and rows {row: {metric: x}}."""
    result = {"method": method, "data": args.data, "split": "test", "seed": args.seed}
    result |= {"size": f"{args.size[1]}x{args.size[0]}", "steps": args.steps, **more}
    result |= {"device": args.device, "torch": torch.__version__, "command": args.command}
    temp = path.with_suffix(".tmp")
    temp.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")
    os.replace(temp, path)


def print_table(rows):
    """Print rows {row: {metric: x}}."""
    metrics = list(next(iter(rows.values())))
    print(f"\n{'':24}" + "".join(f"{m.replace('thresholded_', 'thr. '):>14}" for m in metrics))
    for row, values in rows.items():
        print(f"{row:24}" + "".join(f"{values[m]:14.3f}" for m in metrics))


# ==================================================================================================
# 3. Pictures
# ==================================================================================================


def colour_map(x):
    """Map x (H, W) in [0, 1] to colours uint8 (H, W, 3), black over violet and orange to white."""
    stops = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 200]])
    channels = [np.interp(x, np.linspace(0, 1, 5), levels) for levels in stops.T]
    return np.stack(channels, -1).astype(np.uint8)


def outline(img, mask, colour=(0, 255, 160)):
    """Draw the border of mask (H, W) bool on img uint8 (H, W, 3); returns a new array."""
    m = F.pad(torch.as_tensor(mask).float()[None, None], (1, 1, 1, 1))  # the image's border too
    edge = (F.max_pool2d(m, 3, 1, 1) != m)[0, 0, 1:-1, 1:-1].numpy()
    return np.where(edge[..., None], np.array(colour, dtype=np.uint8), img)


def save_png(pixels, path):
    """Write an array uint8 (H, W) or (H, W, 3) as PNG; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def draw_sheet(titles, rows, path):
    """Write a picture of pictures: titles, then rows (label, [(uint8 (H, W, 3), caption), ...])."""
    height, width = rows[0][1][0][0].shape[:2]
    scale = max(1, round(128 / width))  # by whole numbers, so that pixels stay pixels
    w, h, top, bar = width * scale + 4, height * scale + 16, 16, 58
    sheet = Image.new("RGB", (bar + w * len(titles), top + h * len(rows)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for c, text in enumerate(titles):
        pen.text((bar + c * w + 2, 1), text, "black", font=font)
    for y, (label, tiles) in zip(range(top, sheet.height, h), rows, strict=True):
        pen.text((2, y + 4), label, "black", font=font)
        for x, (tile, caption) in zip(range(bar, sheet.width, w), tiles, strict=True):
            sheet.paste(Image.fromarray(tile).resize((w - 4, h - 16), 0), (x, y))
            while font.getlength(caption) > w - 4:
                caption = caption[:-1]
            pen.text((x + 2, y + h - 16), caption, "black", font=font)
    save_png(np.asarray(sheet), path)


class Photo(NamedTuple):
    """An image to predict on, as it is and as the network gets it."""

    path: Path
    name: str  # unique among the images: for the names of files
    img: torch.Tensor  # uint8 (3, h, w)
    small: torch.Tensor  # uint8 (3, H, W), squeezed to the network's size as in training


def images_to_predict(paths, size):
    """Read images, and those in folders and their folders, for a network of size (H, W): Photos.

    What lies in a folder "predictions" in them is left out: an earlier run wrote it.
    A file that cannot be used does not stop the others: one DataError, a line each, comes last.
    """
    files, errors, names = [], [], set()
    for path in map(Path, paths):
        found = find_images(path) if path.is_dir() else [path]
        found = [file for file in found if "predictions" not in file.relative_to(path).parts]
        if not found:
            errors.append(f"--predict {path}: no image in this folder")
        files += found
    for path in tqdm(files, "predict", unit="image", disable=None):
        try:
            img, small = read_image(path), read_image(path, size)
            if min(img.shape[1:]) < 8:
                raise DataError(f"{path}: {img.shape[2]} x {img.shape[1]} px, smaller than 8 x 8")
        except DataError as error:
            errors.append(str(error))
            continue
        name = path.stem
        while name in names:
            name += "_2"
        names.add(name)
        yield Photo(path, name, img, small)
    if errors:
        raise DataError("\n".join(errors))


def enlarge(x, photo):
    """Bring maps x, float (N, H, W) at the network's size, to the photo's own pixels (N, h, w)."""
    return F.interpolate(x[None], photo.img.shape[1:], mode="bilinear")[0]


# ==================================================================================================
# 4. Reading image files
# ==================================================================================================


def is_image(path):
    """Whether a path is named like an image file and not hidden (._photo.jpg is no photo)."""
    return path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."


def find_images(folder):
    """Image files in a folder and its folders, sorted; other files are counted on stderr.

    Nothing hidden counts, nor what lies in a hidden folder.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [p for p in files if not any(x[0] == "." for x in p.relative_to(folder).parts)]
    others = [path for path in files if not is_image(path)]
    if others:
        what = f"{len(others)} of {len(files)} files left out, as {others[0].name}"
        _say_once(f"{folder}: {what}: no images that can be read")
    return [path for path in files if is_image(path)]


@functools.cache
def _say_once(text):
    """Print on stderr what a run would else say each time that it lists a folder."""
    print(text, file=sys.stderr)


def _open(path, size=None, paper="white"):
    """Open an image upright, transparency laid on paper; size lets JPEGs be decoded smaller."""
    try:
        with Image.open(path) as img:
            if size:  # JPEG only: decodes at 1/2, 1/4 or 1/8, never below the size asked for
                img.draft(None, (max(size), max(size)))
            img = ImageOps.exif_transpose(img)
            if img.mode[0] in "IF":  # to 8 bits: whole numbers by 65535, others by their brightest
                grey = np.nan_to_num(np.asarray(img, np.float32)).clip(0)
                top = 65535 if img.mode[0] == "I" and paper == "white" else 1e-9
                img = Image.fromarray((grey * (255 / max(grey.max(), top)) + 0.5).astype(np.uint8))
            elif img.has_transparency_data:
                img = img.convert("RGBA")
                img = Image.alpha_composite(Image.new("RGBA", img.size, paper), img)
            return img.convert("RGB")
    except Exception as error:  # Pillow's readers raise all kinds
        raise DataError(f"{path}: cannot be used ({error}); replace or remove it") from error


def read_image(path, size=None):
    """Read any image file as uint8 (3, H, W); size = (H, W) squeezes it to that, antialiased.

    Converts grey, palette, CMYK, 16-bit and transparent (on white) images, applies EXIF rotation.
    Raises DataError if the file is unreadable, truncated or above 400 million pixels.
    """
    img = _open(path, size)
    if size:
        img = img.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(img)).permute(2, 0, 1).contiguous()  # (3, H, W)


def read_mask(path, image, size=None):
    """Read a mask file as uint8 (1, H, W) in {0, 1}; size = (H, W) resizes by area, then at half.

    Two values on black: 0/1, 0/255, one colour, a palette and anti-aliased edges are fine. Image
    and mask are each turned by their own EXIF tag, if any. Raises DataError if there are more
    values (class labels) or the sizes differ.
    """
    mask = _open(path, paper="black")
    with Image.open(image) as img:  # reads no pixels
        lies = img.getexif().get(ExifTags.Base.Orientation, 1) > 4  # 5 to 8: turned by a quarter
        upright = img.size[::-1] if lies else img.size
    if mask.size != upright:
        why = f"its size {mask.size} differs from that of its image {image}, {upright}"
        raise DataError(f"{path}: {why}; save both upright")
    level = np.asarray(mask).max(2)  # (H, W), so that a pure colour counts as much as white
    top = float(level.max())
    mid = (level > 0.1 * top) & (level < 0.9 * top)
    flat = mid[1:, 1:] & (level[1:, 1:] == level[:-1, 1:]) & (level[1:, 1:] == level[1:, :-1])
    spread = ImageStat.Stat(mask, Image.fromarray(level >= 0.9 * top)).stddev  # (3,) of its colour
    # Class labels are small numbers; a third class is a flat grey or another colour.
    third = flat.sum() > 0.01 * level.size or max(spread) > 0.1 * top
    if 2 <= top < 32 or third or mid.mean() > 0.1:
        raise DataError(f"{path}: not a mask of two values on black; save it as 0 and 255")
    img = Image.fromarray((level > top / 2).astype(np.uint8) * 255)
    img = img.resize((size[1], size[0]), Image.Resampling.BOX) if size else img
    return torch.from_numpy((np.asarray(img) >= 128).astype(np.uint8))[None]  # (1, H, W)


# ==================================================================================================
# 5. Data sets
# ==================================================================================================


def _existing(root):
    """root as a path; one that is neither there nor the default is a typo: nothing is fetched."""
    root = Path(root).resolve()
    if not root.is_dir() and root != Path("data").resolve():
        raise DataError(f"{root}: this folder does not exist; create it or correct --data-root")
    return root


def _store(key, sources, decode, root, workers):
    """Decode sources (tuples of paths) in threads: tensor (len(sources), ...) and the files' state.

    The state is [path relative to root, bytes, time of change] of each. The cache, one file
    `<root>/.cache/<key>.pt`, counts while it is the same.
    """
    cache, state = root / ".cache" / f"{key}.pt", []
    for path in itertools.chain(*sources):
        stat = path.stat()
        state.append([os.path.relpath(path, root), stat.st_size, stat.st_mtime_ns])
    listing = [CACHE_FORMAT, *state]
    with contextlib.suppress(Exception):  # none there, or broken (torch raises all kinds): build it
        saved = torch.load(cache, mmap=True, weights_only=True)
        if saved["listing"] == listing:
            return saved["stacked"], state
    with ThreadPoolExecutor(workers) as pool:
        decoded = pool.map(lambda paths: decode(*paths), sources)
        bar = tqdm(decoded, f"decoding {key}", len(sources), unit="image", disable=None)
        for i, x in enumerate(bar):
            if i == 0:  # filled one by one: a list of all images would take their memory twice
                stacked = x.new_empty(len(sources), *x.shape)
            stacked[i] = x
    try:
        cache.parent.mkdir(exist_ok=True)
        _save({"listing": listing, "stacked": stacked}, cache)
    except (DataError, OSError) as error:  # a read-only place, a full disk
        print(f"warning: {error}; it decodes again next time", file=sys.stderr)
    return stacked, state


@dataclass
class SegmentationSet:
    name: str
    ids: list[str]
    images: torch.Tensor  # uint8 (N, 3, H, W)
    masks: torch.Tensor  # uint8 (N, R, H, W) in {0, 1}, R raters; R = 0 if the masks were not read
    listing: str  # fingerprint of the files

    def __len__(self):
        return len(self.ids)


def load_segmentation(name, root, split, size, limit=None, images_only=False, workers=8):
    """Load a split of isic2018 | folder | synthetic at size = (H, W) as a SegmentationSet.

    limit: at most the first n images. images_only: no mask is opened or looked for, R = 0.
    workers: threads that decode. Raises DataError for bad data.
    """
    if name == "synthetic":
        n = min(limit or math.inf, SYNTHETIC_COUNTS[split])
        images, masks = synthetic_dermoscopy(n, size, seed=SYNTHETIC_COUNTS[split])
        ids = [f"{name}_{split}_{i:04d}" for i in range(n)]
        masks = masks[:, : 0 if images_only else None]
        return SegmentationSet(name, ids, images, masks, fingerprint(ids, size))
    root = _existing(root)
    sources = _pairs(name, root, split, [] if images_only else None)[:limit]

    def decode(image, *masks):
        return torch.cat([read_mask(path, image, size) for path in masks])  # (R, H, W)

    key = f"{name}-{split}-{size[1]}x{size[0]}-{len(sources)}"
    first = [paths[:1] for paths in sources]
    images, files = _store(f"{key}-images", first, lambda x: read_image(x, size), root, workers)
    masks = images.new_empty(len(sources), 0, *size)
    if not images_only:
        masks, files = _store(f"{key}-masks", sources, decode, root, workers)
    ids = [image.stem for image, *_ in sources]
    return SegmentationSet(name, ids, images, masks, fingerprint(files))


def load_mask(name, root, split, stem, size):
    """Load the mask of one image as bool (1, H, W) and open no other, for who may see only that.

    Of several raters it is the majority. Raises DataError if it is missing, broken or empty.
    """
    if name == "synthetic":
        drawn = load_segmentation(name, root, split, size)
        return drawn.masks[drawn.ids.index(stem)].float().mean(0, keepdim=True) >= 0.5
    pairs = _pairs(name, Path(root), split, [stem])
    image, *paths = next(paths for paths in pairs if paths[0].stem == stem)
    masks = torch.stack([read_mask(path, image, size) for path in paths])  # (R, 1, H, W)
    mask = masks.float().mean(0) >= 0.5
    if not mask.any():
        raise DataError(f"{paths[0]}: this mask is empty; name another image")
    return mask


def _pairs(name, root, split, masked=None):
    """[(image, mask of each rater)] paths sorted by stem; masked: stems that need masks; None: all.

    folder: <root>/<split>/{images,masks}, for several raters masks_1, masks_2 ...; without val, a
    tenth of train; without splits, 80/10/10. isic2018: the official folders, fetched if missing.
    """
    drawn = []  # the splits to draw
    if name == "isic2018":
        kind = ISIC_SPLITS[split]
        folder = root / f"ISIC2018_Task1-2_{kind}_Input"
        folder = folder if folder.is_dir() else root / "isic2018" / folder.name
        raters = [folder.with_name(f"ISIC2018_Task1_{kind}_GroundTruth")]
        for part in [folder] if masked == [] else [folder, *raters]:
            _fetch(f"{ISIC_URL}/{part.name}.zip", part, "all of ISIC 2018 Task 1: 13 GB")
    else:
        there = [s for s in ISIC_SPLITS if (root / s).is_dir()]
        if not there or ("val" not in there and split != "test"):
            drawn = ["val"] if there else ["val", "test"]
        base = root / ("train" if drawn else split) if there else root
        folder, raters = base / "images", sorted(p for p in base.glob("masks_[0-9]*") if p.is_dir())
        raters = raters or [base / "masks"]
    images = _by_stem(folder)
    raters = [_by_stem(rater) for rater in raters] if masked != [] else []
    for rater in raters:
        odd = images.keys() ^ rater.keys() if masked is None else set(masked) - rater.keys()
        for stem in sorted(odd):
            path, lacks = (images[stem], "mask") if stem in images else (rater[stem], "image")
            raise DataError(f"{path}: has no {lacks}; add it or remove this file")
    pairs = [(images[stem], *(rater.get(stem) for rater in raters)) for stem in sorted(images)]
    if drawn:
        order = np.random.RandomState(SPLIT_SEED).permutation(len(pairs)).tolist()
        k = max(1, round(len(pairs) / 10))
        parts = {"val": order[:k], "test": order[k : 2 * k], "train": order[len(drawn) * k :]}
        if not parts["train"]:
            raise DataError(f"{folder}: {len(pairs)} images are too few to split; add some")
        pairs = [pairs[i] for i in sorted(parts[split])]
    return pairs


def _by_stem(folder):
    """{stem without _segmentation: path} of the image files in a folder."""
    found = {}
    for path in find_images(folder):
        stem = path.stem.removesuffix("_segmentation")
        if stem in found:
            raise DataError(f"{path}: another file here has this name too; rename or remove one")
        found[stem] = path
    if not found:
        raise DataError(f"{folder}: no image file here; fill it or correct --data-root")
    return found


def augment(images, masks, flips=True):
    """Per-sample flips, rotation, scale, shift (reflecting) and mild colour, on the images' device.

    images: float (B, 3, H, W) in [0, 1]; masks: float (B, R, H, W), sampled nearest.
    flips: whether both sides may be mirrored; anatomy is not turned over.
    The random numbers are drawn on the CPU, so that a resumed run repeats them on any device.
    """
    b, _, h, w = images.shape
    z = (2 * torch.rand(b, 11) - 1).to(images.device)  # (B, 11) in [-1, 1]
    cos, sin = torch.cos(0.26 * z[:, 0]), torch.sin(0.26 * z[:, 0])  # up to 15 degrees
    affine = [cos, -sin * h / w, 0.1 * z[:, 4], sin * w / h, cos, 0.1 * z[:, 5]]
    affine = torch.stack(affine, 1).view(b, 2, 3)
    flip = torch.where(z[:, 2:4] < 0, -1, 1) if flips else 1
    affine[:, :, :2] *= (flip * torch.exp(0.15 * z[:, 1:2]))[:, :, None]
    grid = F.affine_grid(affine, (b, 1, h, w), align_corners=False)  # (B, H, W, 2)
    images = F.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)
    masks = F.grid_sample(masks, grid, "nearest", "reflection", align_corners=False)
    mean, contrast = images.mean((1, 2, 3), keepdim=True), 1 + 0.15 * z[:, 6].view(b, 1, 1, 1)
    tint = (0.1 * z[:, 7:8] + 0.04 * z[:, 8:11])[:, :, None, None]  # (B, 3, 1, 1)
    return (mean + (images - mean) * contrast + tint).clamp(0, 1), masks


@dataclass
class ClassificationSet:
    split: str
    images: torch.Tensor  # uint8 (N, 3, H, W)
    labels: torch.Tensor  # int64 (N,) in 0..len(classes) - 1
    classes: list[str]
    listing: str  # fingerprint of the files and labels


def load_classification(name, root, split, size, limit=None, workers=8):
    """Load "train" or "test" at size = (H, W), whatever the image's shape, as a ClassificationSet.

    name: synthetic | folder | cub200 | aircraft | flowers102 | pets. limit: about so many images,
    evenly spaced in the list. Raises DataError for bad data and failed downloads.
    """
    if name == "synthetic":
        n = BIRDS_COUNTS[split]
        images, labels = synthetic_birds(n, size, seed=n)
        step = max(1, n // (limit or n))
        images, labels, listing = images[::step], labels[::step], fingerprint(n, step, size)
        return ClassificationSet(split, images, labels, BIRD_CLASSES, listing)
    root = _existing(root)
    find = {"folder": _class_folders, "cub200": _cub200}.get(name, _torchvision)
    sources, classes = find(name, root, split)
    if len(classes) < 2:
        raise DataError(f"{name} in {root}: only one class, {classes[0]}; at least two are needed")
    sources = sources[:: max(1, len(sources) // (limit or len(sources)))]
    paths, labels = zip(*sources, strict=True)
    key = f"{name}-{split}-{size[1]}x{size[0]}-{len(paths)}-classes"
    one = [(path,) for path in paths]
    images, files = _store(key, one, lambda path: read_image(path, size), root, workers)
    listing = fingerprint(files, labels, classes)
    return ClassificationSet(split, images, torch.tensor(labels), classes, listing)


def _class_folders(name, root, split):
    """[(path, label)] and class names of <root>/<train|test>/<class>/*; no class may be empty.

    <root>/unlabelled/*, if there are such, belong to train with the label -1.
    """
    found = []
    for part in ("train", split):
        folders = sorted(_existing(root / part).iterdir())
        found.append([p.name for p in folders if p.is_dir() and p.name[0] != "."])
    train, classes = found
    for odd in sorted(set(train) ^ set(classes)):
        raise DataError(f"{root}: class {odd} is not in both train and {split}; add or remove it")
    sources = []
    for path in find_images(root / split):
        folder, *inside = path.relative_to(root / split).parts
        if not inside:
            raise DataError(f"{path}: lies in no folder of a class; move it into one")
        sources.append((path, classes.index(folder)))
    for label in sorted(set(range(len(classes))) - {label for _, label in sources}):
        raise DataError(f"{root / split / classes[label]}: no image here; add one")
    if split == "train":
        sources += [(path, -1) for path in find_images(root / "unlabelled")]
    return sources, classes


def _cub200(name, root, split):
    """[(path, label)] and class names of CUB-200-2011 with its official split; fetches it first."""
    folder = root / "CUB_200_2011"
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
    loader, *parts = {
        "aircraft": (datasets.FGVCAircraft, "trainval"),
        "flowers102": (datasets.Flowers102, "train", "val"),
        "pets": (datasets.OxfordIIITPet, "trainval"),
    }[name]
    parts = parts if split == "train" else ["test"]
    root.mkdir(exist_ok=True)
    try:
        with FileLock(root / f"{name}.lock"):  # of two runs that download it, one waits
            sets = [loader(root, split=part, download=True) for part in parts]
    except Exception as error:  # of the network, the archive or a missing scipy: all kinds
        why = " ".join(str(error).split())
        raise DataError(f"{name} in {root}: {why}; check the network and run again") from error
    sources = []
    for part in sets:
        files = getattr(part, "_image_files", None) or part._images
        sources += zip(map(Path, files), part._labels, strict=True)
    numbered = [f"class {k + 1}" for k in sorted({label for _, label in sources})]
    return sources, getattr(sets[0], "classes", numbered)  # flowers102: not before torchvision 0.22


def label_split(labels, fraction=None, per_class=None, seed=0):
    """Choose the labelled images, stratified: (labelled, unlabelled) sorted int64 indices.

    labels (N,) int64. If some are unknown (-1), all others are labelled; else a fraction in (0, 1]
    of the whole, at least one image a class, or a number per class. Raises DataError if a class has
    fewer images.
    """
    if (labels < 0).any():
        return (labels >= 0).nonzero()[:, 0], (labels < 0).nonzero()[:, 0]
    counts = labels.bincount()
    if per_class:
        take = per_class * (counts > 0)
    else:  # whole numbers; what is missing to the fraction goes to the largest rests
        share = fraction * counts.double()
        take = torch.maximum(share.long(), (counts > 0).long())
        missing = max(0, round(fraction * len(labels)) - int(take.sum()))
        take[(share - take).argsort(descending=True, stable=True)[:missing]] += 1
    g, labelled = torch.Generator().manual_seed(seed), torch.zeros(len(labels), dtype=torch.bool)
    for c in counts.nonzero()[:, 0].tolist():
        mine = (labels == c).nonzero()[:, 0]
        if take[c] > len(mine):
            raise DataError(f"class {c} has {len(mine)} training images, not {take[c]}; label less")
        labelled[mine[torch.randperm(len(mine), generator=g)[: take[c]]]] = True
    return labelled.nonzero()[:, 0], (~labelled).nonzero()[:, 0]


# ==================================================================================================
# 6. Download
# ==================================================================================================


def _fetch(url, folder, note):
    """Download an archive and unpack its folder of the same name, if that is not there.

    Folder and archive are whole or absent; of two runs that need the same one, one waits.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    archive = folder.with_name(url.split("/")[-1])
    with FileLock(f"{archive}.lock"), tempfile.TemporaryDirectory(dir=folder.parent) as temp:
        if folder.is_dir():  # the other run is done
            return
        try:
            if not archive.exists():
                print(f"downloading {url} ({note})", file=sys.stderr)
                torch.hub.download_url_to_file(url, str(archive))
        except (OSError, http.client.HTTPException) as error:
            todo = f"check the network and run again, or save it as {archive} by other means"
            raise DataError(f"{url}: download failed ({error}); {todo}") from error
        broken = shutil.ReadError, zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError
        try:
            shutil.unpack_archive(archive, temp)
        except broken as error:
            archive.unlink()
            raise DataError(f"{archive}: corrupt ({error}), now deleted; run it again") from error
        os.replace(Path(temp, folder.name), folder)
        archive.unlink()


# ==================================================================================================
# 7. Synthetic images
# ==================================================================================================


def _in_chunks(draw, b, n, size, seed):
    """Draw n images in chunks of b, each with its seed: the first images are those of any n."""
    parts = [draw(b, size, seed + 9973 * i) for i in range(0, n, b)]
    return tuple(torch.cat(x)[:n] for x in zip(*parts, strict=True))


def _canvas(b, size, seed):
    """What both draw b images with: the generator and, by it, uniform numbers and smooth noise."""
    (h, w), g = size, torch.Generator().manual_seed(seed)

    def u(lo, hi, *shape):  # uniform; one number per image unless a shape is given
        return lo + (hi - lo) * torch.rand(b, *(shape or (1, 1, 1)), generator=g)

    def field(rows, columns=None, channels=1):  # smooth noise (B, channels, H, W), sd about 1
        z = 1.3 * torch.randn(b, channels, rows, columns or rows * 4 // 3, generator=g)
        return F.interpolate(z, (h, w), mode="bicubic", align_corners=True)

    return g, u, field


def _coordinates(size):
    """Width of a pixel and coordinates y (H, 1), x (W,) of pixels: the short side spans -1..1."""
    (h, w), px = size, 2 / min(size)
    y, x = (torch.arange(h) - h / 2 + 0.5)[:, None] * px, (torch.arange(w) - w / 2 + 0.5) * px
    return px, y, x


def synthetic_dermoscopy(n, size, seed):
    """Draw images uint8 (n, 3, H, W) and four raters' masks uint8 (n, 4, H, W) in {0, 1}.

    Raters: tight, loose, polygonal, smooth. Skin and lesion are layers of melanin and blood that
    absorb light; over them hairs, ink, stickers, rulers; last the lamp, the lens and the sensor.
    """
    return _in_chunks(_dermoscopy, 50, n, size, seed)


def _dermoscopy(b, size, seed):
    (g, u, field), (px, y, x) = _canvas(b, size, seed), _coordinates(size)

    def rgb(r, g, b):
        return torch.tensor([r, g, b]).view(3, 1, 1)

    # Outline: log radius as a Fourier series of the angle, frayed by noise; level > 0 is inside.
    z = torch.randn(b, 1, 1, 1, generator=g)
    area = 0.13 * torch.exp(torch.where(z < 0, 1.12 * z, 0.76 * z)).clamp(0.1, 6.5)  # of the image
    r0 = torch.sqrt(area * size[0] * size[1] / math.pi) * px
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
    return (img.clamp(0, 1) * 255).round().to(torch.uint8), masks


# Colours of (bill, crown, wing bar, tail); two classes differ in three of the four parts.
BIRD_PALETTE = [
    [(0.95, 0.75, 0.1), (0.1, 0.1, 0.12), (0.85, 0.2, 0.15)],
    [(0.8, 0.1, 0.1), (0.08, 0.08, 0.1), (0.95, 0.95, 0.9)],
    [(0.95, 0.95, 0.95), (0.95, 0.8, 0.2), (0.1, 0.1, 0.12)],
    [(0.9, 0.5, 0.15), (0.1, 0.15, 0.45), (0.92, 0.92, 0.9)],
]
BIRD_CODES = [(a, b, (a + b) % 3, (a + 2 * b) % 3) for a in range(3) for b in range(3)]
BIRD_CLASSES = ["bird " + "".join(map(str, code)) for code in BIRD_CODES]


def synthetic_birds(n, size, seed):
    """Draw fine-grained birds: images uint8 (n, 3, H, W) and labels int64 (n,).

    Classes share one body; bill, crown, wing bar and tail, each under 5 % of the area, tell them
    apart. Pose, size, tint and background vary freely; blobs of the same colours lie about.
    """
    return _in_chunks(_birds, 100, n, size, seed)


def _birds(b, size, seed):
    (g, u, field), (px, y, x) = _canvas(b, size, seed), _coordinates(size)
    labels = torch.randint(len(BIRD_CODES), (b,), generator=g)
    code = torch.tensor(BIRD_CODES)[labels]  # (B, 4)
    colour = torch.tensor(BIRD_PALETTE)[torch.arange(4), code]  # (B, 4, 3)
    colour = (colour + u(-0.08, 0.08, 4, 3))[..., None, None]  # (B, 4, 3, 1, 1)
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
    img = u(0.15, 0.85, 3, 1, 1) + u(0.05, 0.2) * field(4, 4, 3) + 0.05 * field(12, 12, 3)
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
    return (img.clamp(0, 1) * 255).round().to(torch.uint8), labels
