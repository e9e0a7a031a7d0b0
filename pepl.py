"""PEPL: semi-supervised fine-grained classification with CAM-refined pseudo-labels.

Paper: PEPL, https://arxiv.org/abs/2409.03192. The idea: each image shows one class,
a few are labelled with theirs; the network labels the others itself (here with their neighbours'
help, D11) and learns from the labels it is sure of. First (phase I) as they are; later (phase II)
also with a box of one image pasted into another: each of the two labels weighs as much as the class
activation map says of its object is still to be seen, so that the details count on which
fine-grained classes differ.

    all images -------------------> EMA net --> q, spread among neighbours --> class y of each
    image a ----------------weak--> EMA net --> map S_a of class y_a; S_b likewise
    image a --------------strong--> net --> Q   CE(Q, y_a) if y_a is sure enough
    a, a box of b in it --strong--> net --> Q'  rho_a CE(Q', y_a) + rho_b CE(Q', y_b)
    rho_a: share of S_a outside the box in a; rho_b: share of S_b in the box that is cut from b

    python pepl.py                                        synthetic birds on a CPU, minutes
    python pepl.py --data folder --data-root mine --labels-per-class 4 --pretrained
    python pepl.py --predict photo.jpg --checkpoint out/pepl/mine/seed0/best.pt

mine/ holds <train|test>/<class>/* and perhaps unlabelled/*; without that, --labels hides labels of
train. docs/pepl.md has the results and a command for a GPU.

Deviations from the paper (D), whose code is not public:
D1  Pseudo-labels and maps come from the EMA network: steadier than the network itself.
D2  First the mix, then the strong augmentation: map and picture agree, whatever turns the picture.
D3  Training starts on the labelled images alone (--warm-up): the first pseudo-labels are chance.
D4  Eqs. 3 and 4 start at means over some 512 unlabelled images, not at 1/C, which would keep
    every label for long; beta = 0.99, as training is short.
D5  q gets the labelled images' class shares [ReMixMatch], for FixMatch too. They are then p in
    Eq. 5: with as many labels of each class all classes have the global threshold.
D6  Images that are not kept count as 0 in the mean of Eq. 7 and are left out of batch and mixing.
D7  FreeMatch is phase I for ever, with neither neighbours nor its fairness term; unmixed is PEPL's
    phase I for ever; CutMix has areas for semantic shares.
D8  No checkpoint is selected: the EMA weights of the last step count, for every method.
D9  Labelled images are augmented as strongly as the others.
D10 Phase II sees an image in two views, the second mixed for --mix-share of the images: from the
    mixes alone pretrained networks learned less.
D11 With --pretrained, what the network says of all images, and the true labels, spread among images
    of like features (our Eq. 9), anew after every twentieth of the steps. Not for FixMatch and
    FreeMatch, nor from scratch, where features know too little: labels come from a weak view.
"""

import copy
import csv
import math
import os
import time
from functools import partial
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads stall a busy CPU 10-50 x

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.efficientnet import EfficientNet
from torchvision.models.resnet import BasicBlock

import data
from data import DataError, number, whole

METHOD = "pepl"
METHODS = ["supervised", "fixmatch", "freematch", "unmixed", "cutmix", "pepl"]
NETWORKS = torchvision.models.list_models(include=["resne*t*", "wide_resnet*", "efficientnet*"])
NETWORKS = ["tiny", "efficientnet_lite0", *NETWORKS]
SHARES = ["accuracy", "accuracy of kept", "share kept"]  # of pseudo-labels, for the log
MIXING = ["cutmix", "pepl"]  # the methods that have a phase II
NEIGHBOURS = ["unmixed", *MIXING]  # those that ask the neighbours of an image
BETA, EMA = 0.99, 0.995  # what thresholds and the EMA network keep of themselves at a step
TAU = 0.95  # FixMatch's fixed threshold

# ==================================================================================================
# 1. Command line
# ==================================================================================================


def parse_args(argv=None):
    """Flags; the defaults follow --arch, --pretrained and --quick, or a checkpoint's flags."""
    p = data.make_parser("pepl.py", __doc__)
    add, share = p.add_argument, number(0, 1)
    add("--data", default="synthetic", choices=["synthetic", "folder", "cub200"], help="data set")
    size = "network input: N or WIDTHxHEIGHT, pixels; by default 48 with --arch tiny, else 112"
    add("--size", type=data.parse_size, help=size)
    steps = "training steps of each method; by default 1200, with --pretrained 2100"
    add("--steps", type=whole(1), help=steps)
    batch = "labelled images in a training step; by default 32 with --arch tiny, else 16"
    add("--batch-size", type=whole(2), help=batch)
    add("--mu", type=whole(1), default=3, help="unlabelled images in a step, times --batch-size")
    lr = "peak learning rate of the linear layer; by default 0.05 with --arch tiny, else 0.03"
    add("--lr", type=number(1e-9, 10), help=lr)
    lr = "that of all other layers; by default 0.01 with --pretrained, else the default of --lr"
    add("--lr-backbone", type=number(1e-9, 10), help=lr)
    add("--labels", type=number(1e-6, 1), default=0.1, help="share of the images that is labelled")
    add("--labels-per-class", type=whole(1), help="instead: labelled images of each class")
    default = ["supervised", "freematch", "pepl"]
    add("--method", nargs="+", default=default, choices=METHODS, help="train and compare these")
    arch = "tiny, efficientnet_lite0 (default with --pretrained), or of torchvision: resnet50 ..."
    add("--arch", choices=NETWORKS, metavar="NAME", help=arch)
    add("--pretrained", action="store_true", help="start from ImageNet weights")
    freeze = "K freezes the stem and K stages, 0 nothing; by default 0, with --pretrained 5 for an "
    freeze += "EfficientNet and 3 for a ResNet"
    add("--freeze", type=whole(0), help=freeze)
    add("--stride", type=int, default=16, choices=[16, 32], help="px a cell of the maps; tiny: 6")
    add("--warm-up", type=share, default=0.4, help="share of steps on labelled images alone")
    neighbours = "nearest neighbours in label propagation; by default 8 with --pretrained, else 0"
    add("--neighbours", type=whole(0), help=neighbours)
    add("--mix-start", type=share, default=0.6, help="share of steps before mixing starts")
    add("--mix-share", type=share, default=0.5, help="share of second views that are then mixed")
    args = p.parse_args(argv)
    args.arch = args.arch or ("efficientnet_lite0" if args.pretrained else "tiny")
    p.set_defaults(arch=args.arch, steps=1200, freeze=0, neighbours=0)
    if args.arch == "tiny":
        p.set_defaults(size="48", batch_size=32, lr=0.05, lr_backbone=0.05)
    else:
        p.set_defaults(size="112", batch_size=16, lr=0.03, lr_backbone=0.03)
    if args.pretrained:  # chosen on training images of 100 species of CUB
        stages = 5 if args.arch.startswith("eff") else 3  # all before the last that halves
        p.set_defaults(steps=2100, lr_backbone=0.01, freeze=stages, neighbours=8)
    if args.quick:
        p.set_defaults(steps=6, batch_size=8, save_every=2)
    args = data.parse_flags(p, argv, METHOD)
    if args.pretrained and args.arch == "tiny":
        p.error("--pretrained: tiny has no ImageNet weights; take --arch efficientnet_lite0")
    return args


# ==================================================================================================
# 2. The method's mathematics: pure functions on tensors ([G]: given by the paper)
# ==================================================================================================


class Target(NamedTuple):
    """The two classes of each image and how much of each is visible."""

    y_a: torch.Tensor  # (B,) int64
    y_b: torch.Tensor
    rho_a: torch.Tensor  # (B,) float
    rho_b: torch.Tensor


def cam(features, weight, y, size):
    """Class activation maps (B, H, W) of classes y (B,): features (B, K, h, w), weight (C, K)."""
    maps = torch.einsum("bkhw,bk->bhw", F.relu(features.float()), weight[y].float())  # Eq. 1 [G]
    # Strided convolutions centre cell i on pixel stride * i. Enlarged as usual, a map would lie
    # half a cell, less half a pixel, too far right and down.
    shift = [1 / cells - 1 / pixels for cells, pixels in zip(maps.shape[1:], size, strict=True)]
    theta = torch.tensor([[1, 0, shift[1]], [0, 1, shift[0]]], device=maps.device)
    grid = F.affine_grid(theta.expand(len(y), 2, 3), (len(y), 1, *size), align_corners=False)
    return F.grid_sample(maps[:, None], grid, padding_mode="border", align_corners=False)[:, 0]


def percent_map(maps):
    """Semantic percent map S of maps (B, H, W): not negative, each image's sum is 1."""
    maps = maps - maps.amin((1, 2), keepdim=True) + 1e-12  # a constant map becomes uniform
    return maps / maps.sum((1, 2), keepdim=True)  # Eq. 2 [G]


def update_thresholds(tau, p, q, beta):
    """One step of the global threshold tau () and the class expectation p (C,), from q (B, C)."""
    tau = beta * tau + (1 - beta) * q.amax(1).mean()  # Eq. 3 [G]
    return tau, beta * p + (1 - beta) * q.mean(0)  # Eq. 4 [G]


def class_thresholds(tau, p):
    """The threshold of each class, (C,): the class expected most has the global one."""
    return tau * p / p.max()  # Eq. 5 [G]


def align(q, p, prior):
    """Distribution alignment [ReMixMatch]: q (B, C) of mean p (C,) gets the mean prior (C,)."""
    q = q * prior / p.clamp(min=1e-12)  # not 0 / 0, without a labelled image
    return q / q.sum(1, keepdim=True)


def propagate(q, features, k, own=0.1, times=10):
    """What each image and its k nearest say together, (N, C): label propagation, as [Iscen 2019].

    q (N, C): what is said of each image by itself. features (N, K): pooled, not negative.
    """
    z = features.sqrt()  # no single strong feature decides who is near
    z = F.normalize(z - z.mean(0), dim=1)
    k = min(k, len(z) - 1)
    near = torch.cat([(z_b @ z.T).topk(k + 1).indices[:, 1:] for z_b in z.split(1024)])  # (N, k)
    together = q
    for _ in range(times):
        together = own * q + (1 - own) * together[near].mean(1)  # Eq. 9, ours
    return together


def random_boxes(b, size, alpha=5.0):
    """b boxes (b, 4) = left, top, right, bottom in whole pixels, clipped to the image."""
    lam = torch.distributions.Beta(alpha, alpha).sample((b, 1))  # ours: alpha; 0.2 to 0.8, mostly
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
    h, w = x.shape[2:]
    inside1, inside2 = box_mask(box1, (h, w)), box_mask(box2, (h, w))
    both = inside1.any((1, 2), True) & inside2.any((1, 2), True)  # an empty box: nothing is pasted
    inside1, inside2 = inside1 & both, inside2 & both
    # Where in box2 does a pixel of box1 lie? In grid_sample's coordinates, from -1 to 1.
    sides = torch.tensor([w, h, w, h], device=x.device)
    low1, high1 = (2 * box1 / sides - 1).chunk(2, 1)  # (B, 2) each: (left, top), (right, bottom)
    low2, high2 = (2 * box2 / sides - 1).chunk(2, 1)
    scale = (high2 - low2) / (high1 - low1).clamp(min=1e-6)
    shift = low2 - scale * low1
    theta = torch.cat([torch.diag_embed(scale), shift[..., None]], 2)  # (B, 2, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=False)  # (B, H, W, 2)
    pasted = F.grid_sample(x[partner], grid, padding_mode="border", align_corners=False)
    rho_a = 1 - (maps * inside1).sum((1, 2))  # Eq. 6 [G]
    rho_b = (maps[partner] * inside2).sum((1, 2))
    return torch.where(inside1[:, None], pasted, x), rho_a, rho_b


def hybrid_loss(logits, target, n):
    """Hybrid semantic loss of logits (B, C): a mean over n views, those not kept count as 0."""
    loss = target.rho_a * F.cross_entropy(logits, target.y_a, reduction="none")
    loss = loss + target.rho_b * F.cross_entropy(logits, target.y_b, reduction="none")
    return loss.sum() / n  # Eq. 7 [G]


# ==================================================================================================
# 3. Model
# ==================================================================================================


class Depthwise(nn.Conv2d):
    """A depthwise convolution in float32: on CPUs its gradient is four times slower in bf16."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def make_backbone(arch, pretrained):
    """The stem and the stages of a network, as nn.Sequential, and the width K of its features.

    Raises DataError if its ImageNet weights cannot be had.
    """
    if arch == "tiny":  # features of a sixth of the input's side
        stem = nn.Sequential(nn.Conv2d(3, 32, 5, 3, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        stages = [stem, BasicBlock(32, 32), BasicBlock(32, 64, stride=2)]
        stages[2].downsample = nn.Conv2d(32, 64, 1, 2)
        stages.append(BasicBlock(64, 128))
        stages[3].downsample = nn.Conv2d(64, 128, 1)
        return nn.Sequential(*stages), 128
    if arch == "efficientnet_lite0":
        return data.efficientnet_lite0(pretrained).features, 1280
    try:
        net = torchvision.models.get_model(arch, weights="DEFAULT" if pretrained else None)
    except Exception as error:  # of urllib, of the hash check, of the file: all kinds
        why = f"{arch}: ImageNet weights could not be loaded ({error})"
        raise DataError(f"{why}; check the network or leave --pretrained out") from error
    if isinstance(net, EfficientNet):
        return net.features, net.classifier[-1].in_features
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    return nn.Sequential(stem, net.layer1, net.layer2, net.layer3, net.layer4), net.fc.in_features


class Classifier(nn.Module):
    """Backbone, global average pooling and one linear layer, as CAMs need it.

    x (B, 3, H, W) in [0, 1] -> logits (B, C) float32 and features (B, K, h, w).
    """

    def __init__(self, args, n_classes, pretrained=False):
        super().__init__()
        self.backbone, width = make_backbone(args.arch, pretrained)
        self.head = nn.Linear(width, n_classes)
        self.frozen = args.freeze + 1 if args.freeze else 0
        self.backbone[: self.frozen].requires_grad_(False)
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's
        if args.arch == "efficientnet_lite0":
            mean, std = [0.5] * 3, [0.5] * 3
        self.normalise = torchvision.transforms.Normalize(mean, std)
        for module in self.backbone.modules():
            if isinstance(module, nn.Conv2d) and module.groups == module.in_channels:
                module.__class__ = Depthwise
        if args.stride == 16:  # maps of four times as many cells
            last = self.backbone[:7][-1]  # the last to halve: a ResNet's 5th, an EfficientNet's 7th
            for module in last.modules():
                if getattr(module, "stride", None) == (2, 2):
                    module.stride = (1, 1)

    def train(self, mode=True):
        super().train(mode)
        self.backbone[: self.frozen].eval()  # batch norm keeps ImageNet's means
        return self

    def forward(self, x):
        x = self.normalise(x).contiguous(memory_format=torch.channels_last)
        features = self.backbone(x)  # (B, K, h, w)
        return self.head(features.mean((2, 3))).float(), features


# ==================================================================================================
# 4. Inference and figures
# ==================================================================================================


def autocast(args):
    """bfloat16 autocast on the run's device if --amp is on."""
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.amp == "on")


def stored_size(args):
    """Images are kept at 8/7 of --size, of which crops are cut."""
    return tuple(round(n * 8 / 7) for n in args.size)


@torch.no_grad()
def look(net, x, args):
    """Probabilities (B, C) and features (B, K, h, w) of x (B, 3, H, W) in [0, 1]."""
    with autocast(args):
        logits, features = net(x)
    return logits.softmax(1), features


def describe(net, images, args):
    """Probabilities (N, C) and pooled features (N, K) of the middle of uint8 (N, 3, H0, W0)."""
    top, left = ((n - m) // 2 for n, m in zip(images.shape[2:], args.size, strict=True))
    images = images[:, :, top : top + args.size[0], left : left + args.size[1]]  # (N, 3, H, W)
    batches = (look(net, x.to(args.device).float() / 255, args) for x in images.split(128))
    pairs = [(q, F.relu(features.float()).mean((2, 3))) for q, features in batches]
    return tuple(map(torch.cat, zip(*pairs, strict=True)))


def classify(net, images, args):
    """Probabilities (N, C), on the CPU, of the middle of uint8 images (N, 3, H0, W0)."""
    return describe(net, images, args)[0].cpu()


@torch.no_grad()
def class_maps(net, images, y, args):
    """CAMs (B, H, W), on the CPU, of classes y (B,) in whole images uint8 (B, 3, H, W)."""
    _, features = look(net, images.to(args.device).float() / 255, args)
    return cam(features, net.head.weight, y.to(args.device), images.shape[2:]).cpu()


def overlay(img, heat):
    """Lay a map (H, W), whatever its range, over an image uint8 (3, H, W): uint8 (H, W, 3)."""
    low, high = heat.aminmax()
    colours = data.colour_map((heat - low) / (high - low).clamp(min=1e-12))
    return (0.45 * img.permute(1, 2, 0).numpy() + 0.55 * colours).astype("uint8")


def classify_photo(photo, net, classes, args):
    """Classify a photo: the CAM laid over it, the predicted class and all probabilities."""
    probs = classify(net, photo.small[None], args)  # (1, C)
    maps = class_maps(net, photo.small[None], probs.argmax(1), args)
    findings = {"prediction": classes[probs.argmax()]}
    for name, p in zip(classes, probs[0].tolist(), strict=True):
        findings[f"probability of {name}"] = f"{p:.6f}"
    return {"cam": overlay(photo.img, data.enlarge(maps, photo)[0])}, findings


def predict(args):
    """Classify the files of --predict by the last method of --method."""
    folder = data.run_folder(METHOD, args)
    best, predictions = args.checkpoint or folder / "best.pt", folder / "predictions"
    state = data.load_checkpoint(best, METHOD)
    method, classes = args.method[-1], state["classes"]
    net = Classifier(args, len(classes)).to(args.device).eval()
    net.load_state_dict(state["nets"][method])
    print(f"The predictions of {method} go to {predictions}")
    classify_one = partial(classify_photo, net=net, classes=classes, args=args)
    data.predict_images(args.predict, stored_size(args), predictions, best, classify_one)


def draw_mixes(net, test, guess, args, figure, n=4):
    """Draw semantic mixes: image a, its map and box; image b, its map and box; the mix.

    guess (N,): predicted classes. The a are right and the b wrong, if there are such.
    """
    torch.manual_seed(args.seed)
    order = torch.randperm(len(guess))
    order = order[(guess != test.labels)[order].int().argsort(stable=True)]  # the right ones first
    pick = torch.cat([order[:n], order[-n:]])  # all a, then all b
    n, images, size = len(pick) // 2, test.images[pick], test.images.shape[2:]
    box1, box2 = (random_boxes(2 * n, size) for _ in range(2))
    maps, partner = class_maps(net, images, guess[pick], args), torch.arange(2 * n).roll(n)
    mix, rho_a, rho_b = semantic_mix(images.float() / 255, percent_map(maps), partner, box1, box2)
    boxes = box_mask(torch.cat([box1[:n], box2[:n]]), size)
    tiles = []
    for i, img, heat, box in zip(pick, images, maps, boxes, strict=True):
        true, said = test.classes[test.labels[i]], test.classes[guess[i]]
        boxed = data.outline(overlay(img, heat), box)
        tiles.append([(img.permute(1, 2, 0).numpy(), f"is {true}"), (boxed, f"says {said}")])
    rows = []
    for k in range(n):
        mixed = (mix[k] * 255).byte().permute(1, 2, 0).numpy()
        caption = f"{rho_a[k]:.2f} a + {rho_b[k]:.2f} b"
        rows.append(("", [*tiles[k], *tiles[k + n], (mixed, caption)]))
    data.draw_sheet(["image a", "its map, a box", "image b", "its map, a box", "mix"], rows, figure)


# ==================================================================================================
# 5. Batches and training
# ==================================================================================================


def uniform(n, x):
    """Random (n, B, 1, 1, 1) in [-1, 1], drawn on the CPU: a resumed run repeats it anywhere."""
    return (2 * torch.rand(n, len(x), 1, 1, 1) - 1).to(x.device)


def warp(x, rows, size):
    """Sample x (B, 3, H0, W0) at size (H, W); rows: six affine coefficients, (B, 1, 1, 1) or 0."""
    theta = torch.stack([torch.zeros_like(rows[0]) + r for r in rows], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, (len(x), 3, *size), align_corners=False)  # (B, H, W, 2)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def weak_augment(images, size):
    """Random crop, scale and flip: uint8 (B, 3, H0, W0) -> float (B, 3, H, W) in [0, 1]."""
    flip, right, down, closer = uniform(4, images)
    part = size[0] / images.shape[2] * (1 - 0.1 * closer.abs())  # of the image's side, up to 7/8
    across, right, down = torch.where(flip < 0, -part, part), right * (1 - part), down * (1 - part)
    return warp(images.float() / 255, [across, 0, right, 0, part, down], size)


def strong_augment(x):
    """RandAugment-like, x in [0, 1]: affine; colour, sharpness, cutout on a random half each."""
    h, w = x.shape[2:]
    z, on = uniform(12, x), uniform(6, x) > 0  # on: coins; the sixth is a spare
    turn, scale = 0.4 * z[0], torch.exp(0.2 * z[1])  # up to 23 degrees; 0.8 to 1.2
    cos, sin, shear = turn.cos() * scale, turn.sin() * scale, 0.2 * z[2]
    rows = [cos, (shear - sin) * (h / w), 0.2 * z[3], sin * (w / h), cos, 0.2 * z[4]]
    x = warp(x, rows, (h, w))
    mean = x.mean((1, 2, 3), keepdim=True)
    x = torch.where(on[0], mean + (x - mean) * (1 + 0.5 * z[5]) + 0.2 * z[6], x)  # contrast, light
    grey = x.mean(1, keepdim=True)
    x = torch.where(on[1], grey + (x - grey) * (1 + 0.5 * z[7]), x).clamp(0, 1)  # saturation
    levels = (10 + 6 * z[8]).round()
    x = torch.where(on[2], (x * levels).round() / levels, x)  # posterise: 5 to 17 levels
    blur = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    x = torch.where(on[3], (x + z[9] * (x - blur)).clamp(0, 1), x)  # sharpen or blur
    row, column = (torch.linspace(-1, 1, n, device=x.device) for n in (h, w))
    hole = ((column - z[10]).abs() < 0.35) & ((row[:, None] - z[11]).abs() < 0.35)
    return torch.where(on[4] & hole, torch.full_like(x, 0.5), x)  # cutout: a third of the side


def pseudo_label(method, q, tau, p, prior):
    """Phase I: labels (B,) int64 from q (B, C); which of them to keep (B,)."""
    if method != "supervised":
        q, p = align(q, p, prior), prior  # ours: prior is what q is expected to be now, see D5
    confidence, y = q.max(1)
    limits = TAU if method in ("supervised", "fixmatch") else class_thresholds(tau, p)[y]
    return y, confidence >= limits


def ask_neighbours(net, images, labels, split, prior, args):
    """Probabilities (N, C) of all training images after asking their neighbours, see D11."""
    labelled, unlabelled = split
    q, features = describe(net, images, args)
    q = align(q, q[unlabelled].mean(0), prior)
    q[labelled] = F.one_hot(labels[labelled], len(prior)).float()
    q = propagate(q, features, args.neighbours)
    q = align(q, q[unlabelled].mean(0), prior) ** 3  # sharper, a mean of many is never sure
    return q / q.sum(1, keepdim=True)


def say(net, images, i, spread, args):
    """What neighbours said of training images i or, unasked, the network says: (B, C)."""
    return spread[i] if len(spread) else describe(net, images[i], args)[0]


def mix_batch(method, x, y, net, args):
    """Phase II: mix a share of x (B, 3, H, W), labels y (B,), by maps of net: (views, Target)."""
    b = len(x)
    partner = torch.arange(b, device=x.device).roll(1)
    box1, box2 = (random_boxes(b, args.size) for _ in range(2))
    box1[torch.rand(b) >= args.mix_share] = 0  # an empty box: not mixed
    if method == "cutmix":  # every pixel counts alike: labels weigh as much as their area
        maps = x.new_full((b, *args.size), 1 / (args.size[0] * args.size[1]))
    else:
        _, features = look(net, x, args)  # (B, K, h, w)
        maps = percent_map(cam(features, net.head.weight, y, args.size))
    mix, rho_a, rho_b = semantic_mix(x, maps, partner, box1.to(x.device), box2.to(x.device))
    return mix, Target(y, y[partner], rho_a, rho_b)


@torch.no_grad()
def update_ema(ema, net, decay):
    """Move the weights of ema towards net's; buffers, such as running means, are copied."""
    for old, new in zip(ema.parameters(), net.parameters(), strict=True):
        old.lerp_(new, 1 - decay)
    for old, new in zip(ema.buffers(), net.buffers(), strict=True):
        old.copy_(new)


def build(args, n_classes, pretrained):
    """A network, its optimiser and the schedule of the learning rates."""
    net = Classifier(args, n_classes, pretrained).train()
    net = net.to(args.device, memory_format=torch.channels_last)
    opt = torch.optim.SGD(net.head.parameters(), args.lr, 0.9, weight_decay=5e-4, nesterov=True)
    opt.add_param_group({"params": net.backbone.parameters(), "lr": args.lr_backbone})

    def rate(k):  # up over 100 steps, down along a cosine
        return min(1, (k + 1) / 100) * math.cos(math.pi / 2 * k / args.steps) ** 2

    return net, opt, torch.optim.lr_scheduler.LambdaLR(opt, rate)


def try_step(args, n_classes):
    """Load weights, go forward and back on a full batch: what does not work fails at once."""
    net = Classifier(args, n_classes, args.pretrained).to(args.device)
    views = max((m != "supervised") + (m in MIXING) for m in args.method)
    n = args.batch_size * (1 + views * args.mu)
    with autocast(args):
        logits, _ = net(torch.zeros(n, 3, *args.size, device=args.device))
    logits.sum().backward()


def label_shares(y, keep, truth):
    """How good labels are, given the true classes (B,), for the log alone: SHARES, (3,)."""
    right, keep = (y == truth).float(), keep.float()
    right[truth < 0] = math.nan  # nobody knows
    kept = (right * keep).sum() / keep.sum().clamp(min=1)
    return torch.stack([right.mean(), kept, keep.mean()])


def train(method, train_set, split, args, folder, fingerprints):
    """Train one method, the loop of all; returns its last checkpoint, all that --resume needs.

    split: indices of train_set, labelled and unlabelled. fingerprints: of the data.
    """
    torch.manual_seed(args.seed)
    b, n_classes, last = args.batch_size, len(train_set.classes), folder / f"last_{method}.pt"
    net, opt, rates = build(args, n_classes, args.pretrained and not last.exists())
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    parts = {"net": net, "ema": ema, "opt": opt, "rates": rates}
    p = torch.full((n_classes,), 1 / n_classes)  # (C,)
    state = {"step": 0, "seconds": 0.0, "log": [], "tau": p[0], "p": p, "spread": p[:0]}
    state |= data.resume(last, METHOD, args, fingerprints, parts)
    tau, p, log = state["tau"].to(args.device), state["p"].to(args.device), state["log"]
    spread = state["spread"].to(args.device)  # what neighbours said, (N, C), or empty
    images, labels = train_set.images.to(args.device), train_set.labels.to(args.device)
    labelled, unlabelled = (i.to(args.device) for i in split)
    prior = labels[labelled].bincount(minlength=n_classes) / len(labelled)  # (C,)
    watched = unlabelled if len(unlabelled) else labelled
    watched = watched[:: max(1, len(watched) // 512)]  # 512 or some more
    forward = torch.compile(net) if args.compile else net
    first = math.ceil(args.warm_up * args.steps)  # step of phase I
    asks = method in NEIGHBOURS and args.neighbours > 0
    renew = max(3, args.steps // 20)  # steps until neighbours are asked again: 3 in very short runs
    begin, steps = time.time() - state["seconds"], range(state["step"], args.steps)
    bar = data.progress(steps, f"train {method}", args.steps, state["step"])
    for step in bar:
        i = labelled[torch.randint(len(labelled), (b,)).to(args.device)]
        x = [strong_augment(weak_augment(images[i], args.size))]  # (B, 3, H, W)
        y_l = labels[i]
        if asks and step >= first and (step - first) % renew == 0:  # see D11
            spread = ask_neighbours(ema, images, labels, (labelled, unlabelled), prior, args)
        if step == first:  # what is said now is where Eqs. 3 and 4 start, see D4
            tau, p = update_thresholds(tau, p, say(ema, images, watched, spread, args), beta=0)
        kept = False
        if method != "supervised" and step >= first:
            i = unlabelled[torch.randint(len(unlabelled), (args.mu * b,)).to(args.device)]
            x_u = weak_augment(images[i], args.size)  # (mu B, 3, H, W)
            q = spread[i] if len(spread) else look(ema, x_u, args)[0]  # (mu B, C)
            tau, p = update_thresholds(tau, p, q, BETA)
            y, keep = pseudo_label(method, q, tau, p, prior)
            kept = keep.any()
        if kept:  # the others teach nothing
            x_u, y = x_u[keep], y[keep]
            x.append(strong_augment(x_u))
            target_u = Target(y, y, torch.ones_like(q[keep, 0]), torch.zeros_like(q[keep, 0]))
            if method in MIXING and step >= args.mix_start * args.steps:  # see D10
                mix, mixed = mix_batch(method, x_u, y, ema, args)
                x.append(strong_augment(mix))
                target_u = Target(*map(torch.cat, zip(target_u, mixed, strict=True)))
        with autocast(args):
            logits, _ = forward(torch.cat(x))  # labelled and unlabelled share batch statistics
        loss = F.cross_entropy(logits[:b], y_l)
        if kept:  # an image has one view, in phase II two; both weights of Eq. 8 are 1
            loss = loss + hybrid_loss(logits[b:], target_u, args.mu * b * (len(x) - 1))  # Eq. 8 [G]
        if not loss.isfinite():
            todo = "try a third of --lr and --lr-backbone, or --amp off"
            raise DataError(f"{method}: loss is {loss:g} at step {step}: {todo}")
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        rates.step()
        update_ema(ema, net, min(EMA, (step + 1) / (step + 11)))  # forgets the start
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            q = say(ema, images, watched, spread, args)
            y, keep = pseudo_label(method, q, tau, p, prior)
            keep &= step >= first  # before that nothing is
            row = [loss, *label_shares(y, keep, labels[watched]), tau]
            log.append([step + 1, *(round(x.item(), 4) for x in row)])
            more = {"step": step + 1, "seconds": time.time() - begin, "log": log}
            more |= {"tau": tau, "p": p, "spread": spread}
            state = data.save_checkpoint(last, METHOD, args, fingerprints, parts, **more)
            with open(folder / f"log_{method}.csv", "w", newline="", **data.TEXT) as file:
                csv.writer(file).writerows([["step", "loss", *SHARES, "tau"], *log])
    return state


# ==================================================================================================
# 6. Main
# ==================================================================================================


def load(split, args):
    """The training or test images."""
    few = 400 if args.quick else None  # two images a class and more, of up to 200 classes
    size, workers = stored_size(args), args.num_workers
    return data.load_classification(args.data, args.data_root, split, size, few, workers)


def train_all(train_set, test, args, folder):
    """Train all methods of --method; writes best.pt."""
    labels, classes = train_set.labels, train_set.classes
    split = data.label_split(labels, args.labels, args.labels_per_class, args.seed, classes)
    if not len(split[1]) and args.method != ["supervised"]:
        raise DataError("every training image is labelled: lower --labels or --method supervised")
    fingerprints = {"train": train_set.fingerprint, "test": test.fingerprint}
    if not args.resume:
        try_step(args, len(classes))
        data.prepare_folder(folder)
    done = {m: train(m, train_set, split, args, folder, fingerprints) for m in args.method}
    more = {"classes": classes, "n_train": len(labels), "n_labelled": len(split[0])}
    more["nets"] = {m: state["ema"] for m, state in done.items()}
    more["logs"] = {m: state["log"] for m, state in done.items()}
    more["seconds"] = {m: round(state["seconds"]) for m, state in done.items()}
    data.save_checkpoint(folder / "best.pt", METHOD, args, fingerprints, **more)


def run(args):
    """Train all methods and compare them; or only evaluate; or predict."""
    if args.predict:
        return predict(args)
    folder, test = data.run_folder(METHOD, args), load("test", args)
    if not args.eval_only:
        train_all(load("train", args), test, args, folder)
    best = args.checkpoint or folder / "best.pt"
    state = data.load_checkpoint(best, METHOD, {"test": test.fingerprint})
    rows, pseudo_labels = {}, {}
    for method, weights in state["nets"].items():
        net = Classifier(args, len(test.classes)).to(args.device).eval()
        net.load_state_dict(weights)
        guess = classify(net, test.images, args).argmax(1)  # (N,)
        rows[method] = {"accuracy": (guess == test.labels).float().mean().item()}
        log = state["logs"][method]
        for k in (1, 2, 3, 4):  # quarters of the training
            step, _, *shares, _ = log[max(0, len(log) * k // 4 - 1)]
            known = {name: x for name, x in zip(SHARES, shares, strict=True) if x == x}  # not NaN
            pseudo_labels[f"{method}, step {step}"] = known
    more = {name: state[name] for name in ("n_labelled", "n_train", "seconds")}
    more |= {"n_images": len(test.labels), "pseudo_labels": pseudo_labels}
    data.write_result(folder / "result.json", METHOD, args, rows, **more)
    data.print_table(rows)
    draw_mixes(net, test, guess, args, folder / "mix.png")  # of the last method
    print(f"\n{len(test.labels)} test images. Open {folder / 'mix.png'}")


def main(argv=None):
    """Run the command line; foreseeable errors become one line and exit status 2."""
    with data.one_line_errors("pepl.py"):
        run(parse_args(argv))


if __name__ == "__main__":
    main()
