"""PEPL: semi-supervised fine-grained classification with CAM-refined pseudo-labels.

Paper: PEPL, https://arxiv.org/abs/2409.03192. The idea in five lines: a few images are labelled;
the network labels the others itself and learns from the labels it is sure of. First (phase I) as
they are; later (phase II) a box of one image is pasted into another, and each of the two labels
weighs as much as the class activation map says of its object is still to be seen, so that the
label of the mix keeps the detail on which fine-grained classes differ.

    image a --weak--> EMA net --> label a, map S_a --+-- box of b into a --strong--> net --> Q
    image b --weak--> EMA net --> label b, map S_b --+-- rho_a, rho_b: share of S that is visible
                         |
                         +--> confidence >= tau_t(c)?      loss = rho_a CE(Q, a) + rho_b CE(Q, b)

Commands:
    python pepl.py                                        synthetic birds on a CPU, minutes
    python pepl.py --data folder --data-root mine         mine/<train|test>/<class>/*
    python pepl.py --data cub200 --arch resnet50 --pretrained --method pepl      (downloads; a GPU)
    python pepl.py --data folder --data-root mine --predict photo.jpg holiday/   (after training)

Results: accuracy 96.4 % (PEPL), 94.5 (FreeMatch), 93.6 (FixMatch), 78.4 (supervised) on synthetic
    birds, 100 of 1,000 images labelled, mean of seeds 0-2, 600 test images, 1,200 steps, torch
    2.15; `python pepl.py` takes 5 minutes on two CPU cores. On flowers17, from scratch, it is not
    the best: 65.5, 66.3, 68.6, 67.6 % of 170 test images, in this order; see README.md.

Deviations from the paper (D), whose code is not public, with reasons:
D1  Pseudo-labels and maps come from the EMA network: steadier than the network itself.
D2  First the mix, then the strong augmentation: map and picture agree, whatever turns the picture.
D3  Training starts on the labelled images alone (--warm-up): from scratch the first pseudo-labels
    are chance, and thresholds that start at 1/C keep all of them.
D4  beta = 0.99, not 0.999, and --tau-floor: our runs have a thousand steps, not a hundred thousand.
D5  A partner is always a kept image; images that are not kept count as 0 in the mean of Eq. 7.
D6  Labelled images are mixed only if asked (Eq. 8's flag, --mix-labelled), and then from the first
    step, as their labels are true; phase II for the others starts at half of the steps: our small
    network, trained from scratch, learns more slowly from mixed images.
D7  FreeMatch is Eqs. 3-5 with phase I for ever, without its fairness term, which PEPL lacks too.
D8  No checkpoint is selected: the EMA weights of the last step count, for every method.
D9  --align adds the distribution alignment of ReMixMatch to every semi-supervised method, off by
    default; the learning rate rises over the first 100 steps, then falls along a cosine.
"""

import argparse
import contextlib
import copy
import csv
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads stall a busy CPU 10-50 x

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

from data import IMAGE_SUFFIXES, DataError, label_split, load_classification, parse_size, read_image

DATA_SETS = ["synthetic", "folder", "cub200", "cars", "aircraft", "flowers102", "pets"]
LOG_COLUMNS = ["step", "loss", "pseudo_accuracy", "kept_accuracy", "coverage", "tau"]
# What --eval-only and --resume must find as it was: another value would make another run of it.
EVALUATED = ["data", "steps", "labels", "labels_per_class", "validate", "quick"]
RESUMED = [*EVALUATED, "batch_size", "mu", "lr", "lr_backbone", "weight_decay", "beta", "tau",
           "lambda_u", "gamma", "alpha", "warm_up", "tau_floor", "mix_start", "mix_share",
           "mix_labelled", "align", "ema", "bf16"]  # fmt: skip
RESNETS = torchvision.models.list_models(torchvision.models, include="*resne[tx]*")
METHODS = ["supervised", "fixmatch", "freematch", "pepl"]

# ==================================================================================================
# 1. Command line
# ==================================================================================================


def parse_args(argv=None):
    """Parse and check the command line; the defaults reproduce the results table."""
    p = argparse.ArgumentParser(
        description="PEPL: semi-supervised fine-grained classification",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = p.add_argument
    add("--data", default="synthetic", choices=DATA_SETS, help="data set")
    add("--data-root", default="data", help="folder that holds, or will receive, the data set")
    add("--labels", type=float, default=0.1, help="share of the training images that is labelled")
    add("--labels-per-class", type=int, help="instead of --labels: labelled images of each class")
    three = ["supervised", "freematch", "pepl"]
    add("--method", nargs="+", default=three, choices=METHODS, help="train and compare these")
    add("--ablate", action="store_true", help="train and compare all four methods")
    add("--arch", default="tiny", help="tiny or a torchvision ResNet, such as resnet50 (paper)")
    add("--pretrained", action="store_true", help="ImageNet weights (paper); not for tiny")
    add("--size", type=parse_size, help="network input; tiny 48, others 448 (ours)")
    add("--epochs", type=int, default=150, help="passes over the training set, both streams")
    add("--max-steps", type=int, help="at most this many steps; the schedule fits")
    add("--batch-size", type=int, default=32, help="labelled images in a step")
    add("--mu", type=int, default=3, help="unlabelled images in a step, times --batch-size")
    add("--lr", type=float, help="of the head, SGD, cosine; tiny 0.05, others 0.01 (ours)")
    add("--lr-backbone", type=float, help="--lr; with --pretrained a tenth of it (ours)")
    add("--weight-decay", type=float, default=5e-4, help="of SGD (ours)")
    add("--beta", type=float, default=0.99, help="EMA of the thresholds (paper: 0.999)")
    add("--tau", type=float, default=0.95, help="FixMatch's fixed threshold")
    add("--lambda-u", type=float, default=1.0, help="weight of the unlabelled loss (ours)")
    add("--gamma", type=float, default=1.0, help="weight of the labelled loss (ours)")
    add("--alpha", type=float, default=5.0, help="boxes: lambda ~ Beta(alpha, alpha) (ours)")
    add("--warm-up", type=float, default=0.2, help="share of steps on labelled images alone (ours)")
    add("--tau-floor", type=float, default=0.8, help="no class threshold lies below (ours)")
    add("--mix-start", type=float, default=0.5, help="share of steps before mixing starts (ours)")
    add("--mix-share", type=float, default=0.5, help="share of images mixed in phase II (ours)")
    add("--mix-labelled", default="none", choices=["none", "pepl", "all"],
        help="which methods also mix their labelled images")  # fmt: skip
    add(
        "--align",
        action="store_true",
        help="distribution alignment, in all semi-supervised methods",
    )
    add("--ema", type=float, default=0.995, help="decay of the EMA network (ours)")
    add("--seed", type=int, default=0, help="seed of label split, weights and batches")
    add("--seeds", type=int, nargs="+", help="several seeds: their mean and deviation")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--amp", default="auto", choices=["auto", "on", "off"], help="bf16 autocast")
    add("--compile", action="store_true", help="torch.compile the network in training")
    add("--num-workers", type=int, default=8, help="threads that decode images, first run only")
    add("--out", default="out", help="results go to OUT/pepl/DATA/seedK")
    add("--resume", action="store_true", help="go on from the last checkpoints, exactly")
    add("--eval-only", action="store_true", help="no training: evaluate the last checkpoints")
    add("--checkpoint", help="file for --eval-only and --predict [last.pt of the last --method]")
    add("--predict", nargs="+", metavar="PATH", help="classify these images or folders of images")
    add("--validate", action="store_true", help="for choosing flags: a fifth of train is the test")
    add("--save-every", type=int, default=100, help="steps between checkpoints and log lines")
    add("--quick", action="store_true", help="a few steps on a few images: does it run at all?")
    args = p.parse_args(argv)
    args.method = METHODS if args.ablate else list(dict.fromkeys(args.method))
    args.seeds = list(dict.fromkeys(args.seeds or [args.seed]))
    args.size = args.size or ((48, 48) if args.arch == "tiny" else (448, 448))
    if args.lr is None:
        args.lr = 0.05 if args.arch == "tiny" else 0.01
    if args.lr_backbone is None:
        args.lr_backbone = 0.1 * args.lr if args.pretrained else args.lr
    if args.quick:  # no floor, or nothing would be kept in so few steps
        args.max_steps = 6 if args.max_steps is None else args.max_steps
        args.batch_size, args.tau_floor = min(8, args.batch_size), 0.0
        args.save_every = min(2, args.save_every)
    whole = ("epochs", "batch_size", "mu", "save_every", "max_steps", "labels_per_class")
    for name in (*whole, "num_workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("beta", "tau", "tau_floor", "warm_up", "mix_start", "mix_share", "ema"):
        if not 0 <= getattr(args, name) <= 1:
            p.error(f"--{name.replace('_', '-')} must be within 0 and 1")
    if not 0 < args.labels <= 1:
        p.error(f"--labels {args.labels} is a share: above 0, at most 1 (or --labels-per-class N)")
    if not all(0 < x < math.inf for x in (args.lr, args.lr_backbone, args.alpha)):
        p.error("--lr, --lr-backbone and --alpha must be positive")
    if not min(args.weight_decay, args.lambda_u, args.gamma) >= 0:
        p.error("--weight-decay, --lambda-u and --gamma must not be negative")
    if not all(0 <= seed < 2**32 for seed in args.seeds):
        p.error("--seed and --seeds must be within 0 and 2^32 - 1")
    if args.checkpoint and not args.predict and len(args.method) * len(args.seeds) > 1:
        p.error("--checkpoint is one network: name one --method and one seed with it")
    if args.checkpoint and not (args.predict or args.eval_only):
        p.error("--checkpoint goes with --predict or --eval-only; to go on training, --resume")
    if args.arch != "tiny" and args.arch not in RESNETS:
        p.error(f"--arch {args.arch} is neither tiny nor a ResNet of torchvision")
    if args.arch == "tiny" and args.pretrained:
        p.error("--pretrained: there are no ImageNet weights for tiny; take --arch resnet50")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError):
        p.error(f"--device {args.device} is not usable here; take --device cpu")
    bf16_cpu = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    fast = args.device.startswith("cuda") or bf16_cpu
    args.bf16 = args.amp == "on" or (args.amp == "auto" and fast)
    return args


# ==================================================================================================
# 2. The method's mathematics: pure functions on tensors (G: given by the paper, O: ours)
# ==================================================================================================


def cam(features, weight, y, size):
    """Class activation maps (B, H, W) of classes y (B,): features (B, K, h, w), weight (C, K)."""
    maps = torch.einsum("bkhw,bk->bhw", F.relu(features.float()), weight[y].float())  # Eq. 1 [G]
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def percent_map(maps):
    """Semantic percent map S of maps (B, H, W): not negative, each image's sum is 1."""
    maps = maps - maps.amin((1, 2), keepdim=True) + 1e-12  # a constant map becomes uniform
    return maps / maps.sum((1, 2), keepdim=True)  # Eq. 2 [G]


def update_thresholds(tau, p, q, beta):
    """One step of the global threshold tau () and the class expectation p (C,), from q (B, C)."""
    tau = beta * tau + (1 - beta) * q.amax(1).mean()  # Eq. 3 [G]
    return tau, beta * p + (1 - beta) * q.mean(0)  # Eq. 4 [G]


def class_thresholds(tau, p, floor=0.0):
    """The threshold of each class, (C,): the best learned class has the global one."""
    return (tau * p / p.max()).clamp(min=floor)  # Eq. 5 [G; floor O]


def align(q, p, prior):
    """Distribution alignment [ReMixMatch]: q (B, C) of mean p (C,) gets the mean prior (C,).

    A class that is predicted too seldom gains, so that early mistakes do not feed themselves.
    """
    q = q * prior / p
    return q / q.sum(1, keepdim=True)


def random_boxes(b, size, alpha):
    """b boxes (b, 4) = left, top, right, bottom in whole pixels, clipped: maybe empty."""
    lam = torch.distributions.Beta(alpha, alpha).sample((b, 1))
    side = torch.tensor([size[1], size[0]])  # (W, H)
    half, centre = (1 - lam).sqrt() * side / 2, torch.rand(b, 2) * side  # Eq. 6 [G]
    boxes = torch.cat([centre - half, centre + half], 1).round().long()
    return boxes.clamp(min=0).minimum(side.repeat(2))


def box_mask(boxes, size):
    """Pixels inside boxes (B, 4): (B, H, W) bool."""
    y, x = (torch.arange(n, device=boxes.device) for n in size)
    left, top, right, bottom = boxes[..., None, None].unbind(1)  # (B, 1, 1) each
    return (x >= left) & (x < right) & (y[:, None] >= top) & (y[:, None] < bottom)


def semantic_mix(x, maps, partner, box1, box2):
    """Paste box2 of the partner's image, resized, into box1 of each image.

    x (B, 3, H, W), percent maps (B, H, W), partner (B,) int64, boxes (B, 4) in pixels. Returns the
    mix, rho_a and rho_b (B,): how much of either object is visible. They need not sum to one.
    """
    size = x.shape[2:]
    inside1, inside2 = box_mask(box1, size), box_mask(box2, size)
    valid = (inside1.any(2).any(1) & inside2.any(2).any(1))[:, None, None]  # neither box is empty
    inside1, inside2 = inside1 & valid, inside2 & valid
    # The affine map, in coordinates from -1 to 1, that takes box1 to box2.
    corners = 2 * torch.stack([box1, box2]) / torch.tensor(size, device=x.device).flip(0).repeat(2)
    (low1, low2), (high1, high2) = (corners - 1).chunk(2, 2)  # (B, 2) each
    scale = (high2 - low2) / (high1 - low1).clamp(min=1e-6)
    theta = torch.cat([torch.diag_embed(scale), (low2 - low1 * scale)[..., None]], 2)  # (B, 2, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=False)  # (B, H, W, 2)
    pasted = F.grid_sample(x[partner], grid, padding_mode="border", align_corners=False)
    rho_a = 1 - (maps * inside1).sum((1, 2))  # Eq. 6 [G]
    rho_b = (maps[partner] * inside2).sum((1, 2))
    return torch.where(inside1[:, None], pasted, x), rho_a, rho_b


def hybrid_loss(logits, y_a, y_b, rho_a, rho_b, keep):
    """Hybrid semantic pseudo-label loss of logits (B, C); y, rho, keep (B,) or numbers: a scalar.

    Not kept images count as 0 in the mean, as in FixMatch. rho = (1, 0) is plain pseudo-labelling.
    """
    loss = rho_a * F.cross_entropy(logits, y_a, reduction="none")
    loss = loss + rho_b * F.cross_entropy(logits, y_b, reduction="none")
    return (keep * loss).mean()  # Eq. 7 [G]


# ==================================================================================================
# 3. Augmentation: whole batches on the device, each image with its own random numbers
# ==================================================================================================


def uniform(b, n, device):
    """Random (n, b, 1, 1, 1) in [-1, 1], drawn on the CPU: a resumed run repeats it anywhere."""
    return (2 * torch.rand(n, b, 1, 1, 1) - 1).to(device)


def warp(x, rows, size):
    """Sample x (B, 3, H, W) by the six affine coefficients rows, each (B, 1, 1, 1) or a number."""
    theta = torch.stack([torch.zeros_like(rows[0]) + r for r in rows], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, (len(x), 3, *size), align_corners=False)  # (B, H, W, 2)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def weak_augment(images, size):
    """Random crop, scale and flip: uint8 (B, 3, H0, W0) -> float (B, 3, H, W) in [0, 1]."""
    z = uniform(len(images), 4, images.device)
    x = images.float() / 255
    part = size[0] / x.shape[2] * (1 - 0.1 * z[3].abs())  # of the image's side, at most 7/8
    flip = torch.where(z[0] < 0, -part, part)
    return warp(x, [flip, 0, z[1] * (1 - part), 0, part, z[2] * (1 - part)], size)


def strong_augment(x):
    """RandAugment-like: affine; colour, blur and cutout, each on a random half of the images.

    x float (B, 3, H, W) in [0, 1] -> the same.
    """
    b, _, h, w = x.shape
    z, on = uniform(b, 12, x.device), uniform(b, 6, x.device) > 0  # the sixth coin is not used
    turn, scale = 0.4 * z[0], torch.exp(0.2 * z[1])
    cos, sin, shear = turn.cos() * scale, turn.sin() * scale, 0.2 * z[2]
    rows = [cos, (shear - sin) * (h / w), 0.2 * z[3], sin * (w / h), cos, 0.2 * z[4]]
    x = warp(x, rows, (h, w))
    mean = x.mean((1, 2, 3), keepdim=True)
    x = torch.where(on[0], mean + (x - mean) * (1 + 0.5 * z[5]) + 0.2 * z[6], x)  # contrast, light
    grey = x.mean(1, keepdim=True)
    x = torch.where(on[1], grey + (x - grey) * (1 + 0.5 * z[7]), x).clamp(0, 1)  # saturation
    levels = (10 + 6 * z[8]).round()
    x = torch.where(on[2], (x * levels).round() / levels, x)  # posterise
    blur = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    x = torch.where(on[3], (x + z[9] * (x - blur)).clamp(0, 1), x)  # sharpen or blur
    y, x0 = (torch.linspace(-1, 1, n, device=x.device) for n in (h, w))
    hole = ((x0 - z[10]).abs() < 0.35) & ((y[:, None] - z[11]).abs() < 0.35)
    return torch.where(on[4] & hole, torch.full_like(x, 0.5), x)  # cutout


# ==================================================================================================
# 4. Model
# ==================================================================================================


class Residual(nn.Module):
    """Two 3 x 3 convolutions with batch norm and a skip."""

    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(c_out), nn.BatchNorm2d(c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1, stride) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.skip(x) + h)


class Classifier(nn.Module):
    """Backbone, global average pooling and one linear layer, as CAMs need it.

    x (B, 3, H, W) in [0, 1] -> logits (B, C) float32 and features (B, K, h, w).
    """

    def __init__(self, arch, n_classes, pretrained=False):
        super().__init__()
        if arch == "tiny":  # features of a sixth of the input's side
            stem = [nn.Conv2d(3, 32, 5, 3, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
            blocks = [Residual(32, 32), Residual(32, 64, stride=2), Residual(64, 128)]
            self.backbone, width = nn.Sequential(*stem, *blocks), 128
        else:
            try:
                net = torchvision.models.get_model(arch, weights="DEFAULT" if pretrained else None)
            except Exception as error:  # of urllib, of the hash check, of the file: all kinds
                why = f"{arch}: ImageNet weights could not be loaded ({error})"
                raise DataError(f"{why}; check the network or leave --pretrained out") from error
            self.backbone, width = nn.Sequential(*list(net.children())[:-2]), net.fc.in_features
        self.head = nn.Linear(width, n_classes)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, x):
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        features = self.backbone(x)  # (B, K, h, w)
        return self.head(features.mean((2, 3))).float(), features


# ==================================================================================================
# 5. Inference
# ==================================================================================================


def autocast(args):
    """bf16 autocast on the run's device where --amp says so."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)


def stored_size(args):
    """Images are kept at 8/7 of the network's input, of which crops are cut."""
    return tuple(round(n * 8 / 7) for n in args.size)


def centre_crop(images, size):
    """The middle of images (N, 3, H0, W0): (N, 3, H, W)."""
    top, left = ((n - s) // 2 for n, s in zip(images.shape[2:], size, strict=True))
    return images[:, :, top : top + size[0], left : left + size[1]]


@torch.no_grad()
def classify(net, images, args, maps_of=None, batch=128):
    """Centre crops of uint8 images (N, 3, H0, W0): probabilities (N, C), and maps (N, H, W).

    The maps are the CAMs of classes maps_of (N,), or of the predicted ones for "predicted"; without
    it there are none. All on the CPU.
    """
    net.eval()
    probs, maps = [], [torch.empty(0, *args.size)]
    for i in range(0, len(images), batch):
        x = centre_crop(images[i : i + batch].to(args.device), args.size).float() / 255
        with autocast(args):
            logits, features = net(x)
        probs.append(logits.softmax(1).cpu())
        if maps_of is not None:
            y = logits.argmax(1) if maps_of == "predicted" else maps_of[i : i + batch]
            maps.append(cam(features, net.head.weight, y.to(args.device), args.size).cpu())
    return torch.cat(probs), torch.cat(maps)


def predict(net, classes, args, folder):
    """Classify --predict files: probabilities.csv and, per image, the CAM laid over it (PNG).

    A file that cannot be read is reported and the others go on; returns the list of those errors.
    """
    rows, errors, files = [], [], []
    for path in map(Path, args.predict):
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        found = [f for f in inside if f.suffix.lower() in IMAGE_SUFFIXES and f.name[0] != "."]
        found = found if path.is_dir() else [path]
        files += found
        if not found:
            errors.append(f"--predict {path}: no image in this folder")
    folder.mkdir(parents=True, exist_ok=True)
    for n, path in enumerate(tqdm(files, "predict", unit="image", disable=None)):
        try:
            img = read_image(path)  # uint8 (3, H, W)
            small = read_image(path, stored_size(args))[None]
            probs, maps = classify(net, small, args, "predicted")
        except DataError as error:
            errors.append(str(error))
            continue
        (h, w), inner = img.shape[1:], [n * 7 // 8 for n in img.shape[1:]]  # the crop's part
        maps = F.interpolate(maps[None], inner, mode="bilinear", align_corners=False)[0, 0]
        top, left = (h - inner[0]) // 2, (w - inner[1]) // 2
        whole = torch.full((h, w), maps.min().item())
        whole[top : top + inner[0], left : left + inner[1]] = maps
        name = f"{n:04d}_{path.stem}_cam.png"
        Image.fromarray(overlay(img, whole)).save(folder / name)
        shares = [f"{x:.6f}" for x in probs[0].tolist()]
        rows.append([path, name, classes[probs[0].argmax()], *shares])
    if rows:
        with open(folder / "probabilities.csv", "w", newline="") as file:
            csv.writer(file).writerows([["file", "overlay", "prediction", *classes], *rows])
    return errors


# ==================================================================================================
# 6. Evaluation and figures
# ==================================================================================================


def colour_map(x):
    """Map x (H, W) in [0, 1] to colours uint8 (H, W, 3), black over violet and orange to white."""
    stops = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 200]])
    table = [np.interp(np.linspace(0, 4, 256), np.arange(5), stops[:, c]) for c in range(3)]
    index = (np.asarray(x, dtype=np.float32).clip(0, 1) * 255).round().astype(np.uint8)
    return np.stack(table, -1).astype(np.uint8)[index]


def overlay(img, maps):
    """Lay a map (H, W), scaled to [0, 1], over img uint8 (3, H, W): uint8 (H, W, 3)."""
    maps = maps - maps.min()
    colours = colour_map(maps / maps.max().clamp(min=1e-12))
    img = Image.fromarray(img.permute(1, 2, 0).numpy())
    return np.asarray(Image.blend(img, Image.fromarray(colours), 0.55))


def draw_sheet(columns, path, side=112):
    """Write a sheet: columns of (caption, picture uint8 (H, W, 3) or None) from top to bottom."""
    rows, (h, w) = max(map(len, columns)), columns[0][0][1].shape[:2]
    tall = round(side * h / w)
    sheet = Image.new("RGB", ((side + 6) * len(columns), (tall + 18) * rows), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for c, column in enumerate(columns):
        for r, (caption, picture) in enumerate(column):
            x, y = c * (side + 6), r * (tall + 18)
            pen.text((x + 2, y + 1), caption[: side // 6], "black", font=font)
            if picture is not None:
                sheet.paste(Image.fromarray(picture).resize((side, tall), 0), (x, y + 16))
    sheet.save(path)


def draw_cams(net, test, guess, args, path, n=6):
    """CAMs of test images: n that are classified right and n wrong, evenly spaced in the list.

    guess (N,): the predicted classes of all test images.
    """
    columns = []
    for mark, chosen in (("right", guess == test.labels), ("wrong", guess != test.labels)):
        pick = chosen.nonzero()[:: max(1, int(chosen.sum()) // n), 0][:n]
        img = centre_crop(test.images[pick], args.size)
        maps, true_maps = (
            classify(net, test.images[pick], args, y[pick])[1] for y in (guess, test.labels)
        )
        for k, i in enumerate(pick.tolist()):
            said, true = test.classes[guess[i]], test.classes[test.labels[i]]
            column = [
                (mark, img[k].permute(1, 2, 0).numpy()),
                (f"says {said}", overlay(img[k], maps[k])),
            ]
            column.append(
                (f"true {true}", overlay(img[k], true_maps[k]) if mark == "wrong" else None)
            )
            columns.append(column)
    draw_sheet(columns, path)


def draw_mixes(net, test, args, path, n=3):
    """What a semantic mix is: image a, its map and box; image b, its map and box; the mix."""
    torch.manual_seed(args.seed)
    pick = torch.randperm(len(test))[: 2 * n]
    img = centre_crop(test.images[pick], args.size)
    probs, maps = classify(net, test.images[pick], args, "predicted")
    boxes = [random_boxes(len(pick), args.size, args.alpha) for _ in range(2)]
    partner = torch.arange(len(pick)).roll(max(1, len(pick) // 2))
    mix, *rho = semantic_mix(img.float() / 255, percent_map(maps), partner, *boxes)
    names, columns = [test.classes[k] for k in probs.argmax(1).tolist()], [[] for _ in range(5)]
    for a, b in enumerate(partner[:n].tolist()):
        for k, (i, box) in enumerate(((a, boxes[0][a]), (b, boxes[1][a]))):
            drawn = Image.fromarray(overlay(img[i], maps[i]))
            corners = (box - torch.tensor([0, 0, 1, 1])).tolist()  # the last pixels inside
            if corners[0] <= corners[2] and corners[1] <= corners[3]:
                ImageDraw.Draw(drawn).rectangle(corners, outline="cyan")
            columns[2 * k].append((f"{'ab'[k]}: {names[i]}", img[i].permute(1, 2, 0).numpy()))
            columns[2 * k + 1].append((f"map and box of {'ab'[k]}", np.asarray(drawn)))
        mixed = (mix[a] * 255).byte().permute(1, 2, 0).numpy()
        columns[4].append((f"{rho[0][a]:.2f} a + {rho[1][a]:.2f} b", mixed))
    draw_sheet(columns, path)


def draw_curves(logs, path):
    """Pseudo-label accuracy and coverage against steps; logs: {method: rows of log.csv}."""
    titles = ["accuracy of all pseudo-labels", "accuracy of the kept ones", "coverage: share kept"]
    colours = ["#777777", "#1f77b4", "#e08214", "#c51b3a"]
    w, h, left, top = 330, 230, 42, 34
    sheet = Image.new("RGB", (3 * w, h + 46), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    last = max((row[0] for rows in logs.values() for row in rows), default=1)
    for k, title in enumerate(titles):

        def place(step, value, x0=k * w + left):
            return x0 + (w - 60) * step / last, top + (h - 60) * (1 - value)

        pen.text(place(0, 1.14), title, "black", font=font)
        for tick in range(6):
            (x, floor), y = place(last * tick / 5, 0), place(0, tick / 5)[1]
            pen.line([place(0, tick / 5), place(last, tick / 5)], "#dddddd")
            pen.text((k * w + 6, y - 7), f"{20 * tick} %", "black", font=font)
            pen.text((x - 10, floor + 5), str(round(last * tick / 5)), "black", font=font)
        for method, rows in logs.items():
            points = [place(row[0], row[2 + k]) for row in rows if row[2 + k] == row[2 + k]]
            pen.line(points, colours[METHODS.index(method)], 2)
    for k, method in enumerate(logs):
        x, y = left + 130 * k, h + 26
        pen.line([(x, y), (x + 20, y)], colours[METHODS.index(method)], 3)
        pen.text((x + 26, y - 7), method, "black", font=font)
    pen.text((3 * w - 120, h + 19), "training steps", "black", font=font)
    sheet.save(path)


# ==================================================================================================
# 7. Training
# ==================================================================================================


def save_checkpoint(state, path):
    """Write state to path so that either the old file or the whole new one is there, never half."""
    temp = path.with_suffix(".tmp")
    try:
        torch.save(state, temp)
        os.replace(temp, path)
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
        with contextlib.suppress(OSError):
            temp.unlink()
        raise DataError(f"cannot write {path} ({error}); older files are intact") from error


def load_checkpoint(path, args, fixed=()):
    """Read a checkpoint, trained with the flags --arch, --size and `fixed` as they are now.

    Raises DataError if it is missing, broken, another script's or trained with other flags.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"no checkpoint {path}: train first, or name one by --checkpoint") from None
    except Exception as error:  # torch and zipfile raise all kinds
        raise DataError(f"{path} is not a readable checkpoint; train again") from error
    if not isinstance(state, dict) or state.get("script") != "pepl":
        raise DataError(f"{path} is a checkpoint of something else, not of pepl.py")
    for name in ("arch", "size", *fixed):
        was, now = state.get("args", {}).get(name), getattr(args, name)
        if was != (list(now) if isinstance(now, tuple) else now):
            was, now = (f"{x[1]}x{x[0]}" if name == "size" and x else x for x in (was, now))
            name = {"steps": "epochs or --max-steps", "bf16": "amp"}.get(name, name)
            raise DataError(f"{path}: --{name.replace('_', '-')} was {was}, now {now}; keep it")
    return state


def mix_batch(x, y, keep, features, net, args):
    """Mix a share of x (B, 3, H, W) with partners whose labels are kept: (mix, y_b, rho_a, rho_b).

    y (B,) labels, keep (B,) bool, features (B, K, h, w) that net gave for x.
    """
    b, kept = len(x), keep.nonzero()[:, 0]
    if not len(kept):
        return x, y, 1.0, 0.0
    partner = kept[torch.randint(len(kept), (b,)).to(kept.device)]
    box1, box2 = (random_boxes(b, args.size, args.alpha) for _ in range(2))
    box1[torch.rand(b) >= args.mix_share] = 0  # an empty box: not mixed
    maps = percent_map(cam(features, net.head.weight, y, args.size))
    mix, rho_a, rho_b = semantic_mix(x, maps, partner, box1.to(x.device), box2.to(x.device))
    return mix, y[partner], rho_a, rho_b


def train(method, train_set, labelled, unlabelled, args, folder):
    """Train one method, the loop of all four: returns (EMA network, rows of log.csv, seconds).

    labelled, unlabelled: indices into train_set. Nothing is selected: the last EMA weights count.
    last.pt holds all that --resume needs.
    """
    torch.manual_seed(args.seed)
    device, b, n_classes = args.device, args.batch_size, len(train_set.classes)
    last = folder / "last.pt"
    old = args.eval_only or (args.resume and last.exists())  # trained, or at least begun
    net = Classifier(args.arch, n_classes, args.pretrained and not old)
    net = net.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    groups = [{"params": net.backbone.parameters(), "peak": args.lr_backbone}]
    groups.append({"params": net.head.parameters(), "peak": args.lr})
    opt = torch.optim.SGD(groups, args.lr, 0.9, weight_decay=args.weight_decay, nesterov=True)
    images, labels = train_set.images.to(device), train_set.labels.to(device)
    prior = labels[labelled].bincount(minlength=n_classes) / len(labelled)  # (C,)
    tau = torch.tensor(1 / n_classes, device=device)  # 1 would reject nearly all for very long
    p = torch.full((n_classes,), 1 / n_classes, device=device)
    watched = unlabelled if len(unlabelled) else labelled  # the log's pseudo-labels are of these
    watched = watched[:: max(1, len(watched) // 512)]  # half a thousand of them will do
    step, seconds, log, smooth = 0, 0.0, [], None
    folder.mkdir(parents=True, exist_ok=True)
    if old:
        path = (args.eval_only and args.checkpoint) or last
        state = load_checkpoint(path, args, EVALUATED if args.eval_only else RESUMED)
        if state["classes"] != train_set.classes:
            raise DataError(f"{path} was trained for other classes: {state['classes'][:3]} ...")
        net.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        opt.load_state_dict(state["opt"])
        tau, p = state["tau"].to(device), state["p"].to(device)
        step, seconds, log, smooth = (state[k] for k in ("step", "seconds", "log", "smooth"))
        torch.set_rng_state(state["rng"])
        if args.eval_only and step < args.steps:
            raise DataError(f"{path} stopped at step {step} of {args.steps}; --resume first")
    forward = torch.compile(net) if args.compile else net
    stop = []  # filled by Ctrl-C: the running step is finished first, so that the state is whole
    handler = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    start = time.time() - seconds
    per_step = b if method == "supervised" else b * (1 + args.mu)
    bar = tqdm(total=args.steps, initial=step, desc=f"train {method}", smoothing=0.05,
               unit="img", unit_scale=per_step,
               disable=args.eval_only or step >= args.steps)  # fmt: skip
    while step < args.steps and not args.eval_only:
        net.train()
        ramp, cosine = min(1, (step + 1) / 100), 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
        for group in opt.param_groups:
            group["lr"] = group["peak"] * ramp * cosine
        phase_two = step >= args.mix_start * args.steps

        i = labelled[torch.randint(len(labelled), (b,))].to(device)
        x_l, y_l = weak_augment(images[i], args.size), labels[i]  # (B, 3, H, W), (B,)
        target_l = y_l, y_l, 1.0, 0.0, 1.0  # y_a, y_b, rho_a, rho_b, keep
        if args.mix_labelled in ("all", method):
            with torch.no_grad(), autocast(args):
                _, features = ema(x_l)
            x_l, *mixed = mix_batch(x_l, y_l, torch.ones_like(y_l), features, ema, args)
            target_l = y_l, *mixed, 1.0
        x = [strong_augment(x_l)]

        semi = method != "supervised" and step >= args.warm_up * args.steps
        if semi:
            i = unlabelled[torch.randint(len(unlabelled), (args.mu * b,))].to(device)
            x_w = weak_augment(images[i], args.size)  # (mu B, 3, H, W)
            with torch.no_grad(), autocast(args):
                logits, features = ema(x_w)
            q = logits.softmax(1)  # (mu B, C)
            tau, p = update_thresholds(tau, p, q, args.beta)
            confidence, y_u = (align(q, p, prior) if args.align else q).max(1)
            limits = class_thresholds(tau, p, args.tau_floor)  # (C,)
            keep = confidence >= (args.tau if method == "fixmatch" else limits[y_u])
            y_b, rho_a, rho_b = y_u, 1.0, 0.0  # phase I: the image as it is
            if phase_two and method == "pepl":
                x_w, y_b, rho_a, rho_b = mix_batch(x_w, y_u, keep, features, ema, args)
            x.append(strong_augment(x_w))

        with autocast(args):
            logits, _ = forward(torch.cat(x))  # labelled and unlabelled share batch statistics
        loss = args.gamma * hybrid_loss(logits[:b], *target_l)  # Eq. 8 [G]
        if semi:
            loss = loss + args.lambda_u * hybrid_loss(logits[b:], y_u, y_b, rho_a, rho_b, keep)
        value = loss.item()
        if not math.isfinite(value):
            raise DataError(f"loss is {value} at step {step}: try a third of --lr, or --amp off")
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        step += 1
        with torch.no_grad():
            decay = min(args.ema, step / (step + 10))  # short memory first: the start is forgotten
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
            for old, new in zip(ema.buffers(), net.buffers(), strict=True):
                old.copy_(new)
        smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
        bar.update()
        bar.set_postfix(loss=f"{smooth:.3f}")
        if step % args.save_every and step < args.steps and not stop:
            continue
        if step % args.save_every == 0 or step == args.steps:
            q = classify(ema, train_set.images[watched], args)[0]  # (N, C)
            if args.align and method != "supervised":
                q = align(q, p.cpu(), prior.cpu())
            confidence, guess = q.max(1)
            limits = class_thresholds(tau, p, args.tau_floor).cpu()[guess]
            kept = confidence >= (limits if method in ("freematch", "pepl") else args.tau)
            right = (guess == train_set.labels[watched]).float()  # of no influence on the training
            row = [right.mean(), right[kept].mean(), kept.float().mean(), tau]
            log.append([step, smooth, *(x.item() for x in row)])
            with open(folder / "log.csv", "w", newline="") as file:
                csv.writer(file).writerows([LOG_COLUMNS, *log])
        seconds = time.time() - start
        save_checkpoint({
            "script": "pepl", "net": net.state_dict(), "ema": ema.state_dict(), "tau": tau, "p": p,
            "opt": opt.state_dict(), "step": step, "rng": torch.get_rng_state(), "log": log,
            "smooth": smooth, "seconds": seconds, "classes": train_set.classes,
            "args": {k: list(v) if isinstance(v, tuple) else v for k, v in vars(args).items()},
        }, last)  # fmt: skip
        if stop:
            bar.close()
            print(f"stopped at step {step}; add --resume to go on", file=sys.stderr)
            raise SystemExit(130)
    bar.close()
    signal.signal(signal.SIGINT, handler)
    return ema, log, seconds


# ==================================================================================================
# 8. Main
# ==================================================================================================


def subset(data, indices):
    """The images of a ClassificationSet at indices (N,)."""
    ids = [data.ids[i] for i in indices]
    return replace(data, ids=ids, images=data.images[indices], labels=data.labels[indices])


def run_seed(args, seed, folder):
    """Train and evaluate all methods of one seed: ({method: accuracy}, record of the run)."""
    args.seed = seed
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    more = stored_size(args), 64 if args.quick else None, args.num_workers
    train_set = load_classification(args.data, args.data_root, "train", *more)
    if args.validate:
        held_out, rest = label_split(train_set.labels, 0.2, seed=2018)
        test = replace(subset(train_set, held_out), split="validation")
        train_set = subset(train_set, rest)
    else:
        test = load_classification(args.data, args.data_root, "test", *more)
    labelled, unlabelled = label_split(train_set.labels, args.labels, args.labels_per_class, seed)
    if not len(unlabelled) and args.method != ["supervised"]:
        raise DataError("every training image is labelled: lower --labels or --method supervised")
    args.steps = args.epochs * math.ceil(len(train_set) / (args.batch_size * (1 + args.mu)))
    args.steps = min(args.steps, args.max_steps or args.steps)
    if not args.eval_only and not (args.resume and (folder / "split.json").exists()):
        for method in args.method:  # of an earlier run: not to be resumed
            (folder / method / "last.pt").unlink(missing_ok=True)
        (folder / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
        split = {"labelled": labelled.tolist(), "unlabelled": unlabelled.tolist()}
        split = {name: [train_set.ids[i] for i in part] for name, part in split.items()}
        (folder / "split.json").write_text(json.dumps(split, indent=1) + "\n")
    rows, logs, seconds = {}, {}, {}
    for method in args.method:
        done = train(method, train_set, labelled, unlabelled, args, folder / method)
        net, logs[method], seconds[method] = done
        guess = classify(net, test.images, args)[0].argmax(1)
        rows[method] = (guess == test.labels).float().mean().item()
        draw_cams(net, test, guess, args, folder / "figures" / f"cams_{method}.png")
    draw_mixes(net, test, args, folder / "figures" / "mix.png")
    draw_curves(logs, folder / "figures" / "curves.png")
    record = {"split": test.split, "n_images": len(test), "n_labelled": len(labelled),
              "n_train": len(train_set), "steps": args.steps, "bf16": args.bf16,
              "seconds": seconds}  # fmt: skip
    return rows, record


def run(args):
    """All seeds, or --predict; prints the table and writes result.json; returns the exit status."""
    base = Path(args.out) / "pepl" / args.data
    if args.predict:
        folder = base / f"seed{args.seeds[0]}"
        state = load_checkpoint(args.checkpoint or folder / args.method[-1] / "last.pt", args)
        net = Classifier(args.arch, len(state["classes"])).to(args.device)
        net.load_state_dict(state["ema"])
        errors = predict(net, state["classes"], args, folder / "predictions")
        print(f"predictions in {folder / 'predictions'}")
        for error in errors:
            print(f"pepl.py: error: {error}", file=sys.stderr)
        return 2 if errors else 0
    commit, per_seed, seconds = "", [], {}
    with contextlib.suppress(OSError):  # git is not installed
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    for seed in args.seeds:
        rows, record = run_seed(args, seed, base / f"seed{seed}")
        per_seed.append(rows)
        seconds[seed] = record.pop("seconds")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB of main memory
        if args.device.startswith("cuda"):
            peak = torch.cuda.max_memory_allocated() / 2**20
        table = {}
        for method in rows:  # the deviation is that of seeds; of one seed, that of right and wrong
            v = np.array([r[method] for r in per_seed])
            std = v.std() if len(v) > 1 else (v * (1 - v)).item() ** 0.5
            table[method] = {"mean": v.mean(), "std": std, "seeds": v.tolist()}
        result = {"method": "pepl", "data": args.data} | record | {
            "seeds": args.seeds[: len(per_seed)], "seconds": seconds, "device": args.device,
            "peak_memory_mib": round(peak), "torch": torch.__version__, "git": commit or None,
            "command": " ".join(["python pepl.py", *args.argv]),
            "rows": {m: {"accuracy": row} for m, row in table.items()},
        }  # fmt: skip
        where = base / (f"seed{seed}" if len(args.seeds) == 1 else "")
        (where / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{'':12}{'accuracy':>10}{'std':>8}   each seed")
    for method, row in table.items():
        each = " ".join(f"{v:.3f}" for v in row["seeds"])
        print(f"{method:12}{row['mean']:10.3f}{row['std']:8.3f}   {each}")
    labelled = f"{record['n_labelled']} of {record['n_train']} training images labelled"
    print(f"\n{record['n_images']} {record['split']} images of {args.data}; {labelled}.")
    print(f"Open {base / f'seed{seed}' / 'figures' / 'mix.png'}")
    return 0


def main(argv=None):
    """Run the command line; every foreseeable error is one line and exit status 2."""
    args, previous = parse_args(argv), signal.getsignal(signal.SIGINT)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        status = run(args)
    except (DataError, OSError) as error:
        print(f"pepl.py: error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:  # outside the training loop, which ends its step and saves first
        print("interrupted; what was trained is saved, --resume goes on", file=sys.stderr)
        status = 130
    finally:
        signal.signal(signal.SIGINT, previous)
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    main()
