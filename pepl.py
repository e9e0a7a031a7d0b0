"""PEPL: semi-supervised fine-grained classification by pseudo-labels and semantic mixing.

Paper: PEPL, https://arxiv.org/abs/2409.03192 (ICASSP 2025); its code was not available. The classes
differ only in details, such as the colour of a bird's bill. Each image belongs to one class; a few
images are labelled. Phase I: the network labels the other images itself (pseudo-labels) and learns
from those it is confident of. Phase II: it also learns from mixes, where a box of one image is
pasted into another. A class activation map (CAM) tells how much each part of an image contributes
to the score of its class, and the label of each image is weighted by the share of its map that is
visible in the mix. Phase I alone is FreeMatch; the maps and boxes are those of SnapMix.

    unlabelled image --weak view---> EMA network --> pseudo-label y, kept if confident; map S
                     --strong view-> network --> Q: CE(Q, y)                            phase I
    image a with a box of image b -> network --> Q: rho_a CE(Q, y_a) + rho_b CE(Q, y_b)  phase II

    Q: predicted probabilities. CE: cross-entropy. S: CAM, of sum 1.
    rho_a: share of S_a outside the box in a. rho_b: share of S_b inside the box cut out of b.

    python pepl.py                                        synthetic birds on a CPU, minutes
    python pepl.py --data folder --data-root mine --labels-per-class 4 --pretrained
    python pepl.py --predict photo.jpg --checkpoint out/pepl/mine/seed0/best.pt

mine/ holds <train|test>/<class>/* and perhaps unlabelled/*. Without unlabelled/, only a few
training images keep their labels. docs/pepl.md has the results and a command for a GPU.

Main deviations from the paper (D; its equations are listed in docs/pepl.md):
D1  Pseudo-labels and maps come from an exponential moving average (EMA) of the network.
D2  The weak views are mixed, and the mix is then strongly augmented: rho ignores what the
    augmentation hides or moves out of the picture. Labelled images are strongly augmented too.
D3  Early pseudo-labels are no better than chance, so training starts on labelled images only.
    After that every step has both phases: half of the kept images are mixed with each other, and
    the others get a strong view.
D4  tau and p (Eqs. 1, 2) start as plain running means; from FreeMatch's 1 / number of classes,
    almost every pseudo-label would be kept for a long time.
D5  Images that are not kept add no loss, but count in the denominator of Eq. 8.
D6  Distribution alignment [ReMixMatch]: pseudo-labels get the class shares of the labelled images,
    for all methods. If the shares are equal, the thresholds of Eq. 3 hardly differ.
D7  Augmentations are our own and run on whole batches. The last stage with stride 2 has stride 1.
The control `freematch` has no fairness term. The control `cutmix` makes PEPL's mixes and weights
labels by the areas of the boxes; the original CutMix has one box for both images.
"""

import copy
import math
import os
import time
from functools import partial
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow a busy CPU 10-50 x

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.efficientnet import EfficientNet
from torchvision.models.resnet import BasicBlock

import data
from data import DataError, number, whole


class Method(NamedTuple):
    """What a method uses besides the labelled images."""

    pseudo_labels: bool = True
    adaptive: bool = True  # the thresholds of Eqs. 1-3, not FixMatch's fixed one
    mixing: bool = False
    semantic: bool = False  # the labels of a mix are weighted by CAMs, not by areas
    propagation: bool = False  # the pseudo-labels come from label propagation


# "Eq. n" is numbered as in docs/pepl.md. [paper]: as in the paper. [ours]: added by us.
METHOD = "pepl"
METHODS = {
    "supervised": Method(pseudo_labels=False),
    "fixmatch": Method(adaptive=False),
    "freematch": Method(),
    "cutmix": Method(mixing=True),
    "pepl": Method(mixing=True, semantic=True),
    "freematch_propagation": Method(propagation=True),
    "pepl_propagation": Method(mixing=True, semantic=True, propagation=True),
}
FIXED_THRESHOLD = 0.95  # of FixMatch
BETA = 0.99  # decay of Eqs. 1 and 2
EMA = 0.995  # decay of the EMA network
NEIGHBOURS = 8  # in label propagation
NETWORKS = torchvision.models.list_models(include=["resne[tx]*", "wide_resnet*", "efficientnet*"])
NETWORKS = ["tiny", "efficientnet_lite0", *NETWORKS]

# ==================================================================================================
# 1. Command line
# ==================================================================================================


def parse_args(argv=None):
    """Parse and check the command line."""
    p = data.make_parser("pepl.py", __doc__)
    add = p.add_argument
    add("--data", default="synthetic", choices=["synthetic", "folder", "cub200"], help="data set")
    size = "network input: N or WIDTHxHEIGHT, pixels; by default 48 with --arch tiny, else 112"
    add("--size", type=data.parse_size, help=size)
    steps = "training steps of each method; by default 1200, with --pretrained 1050"
    add("--steps", type=whole(1), help=steps)
    batch = "labelled images in a training step; by default 32 with --arch tiny, else 16"
    add("--batch-size", type=whole(2), help=batch)
    add("--mu", type=whole(1), default=3, help="unlabelled images per labelled image in a step")
    lr = "peak learning rate of the linear layer; by default 0.05 with --arch tiny, else 0.03"
    add("--lr", type=number(1e-9, 10), help=lr)
    lr = "the same for the other layers; by default 0.01 with --pretrained, else as --lr"
    add("--lr-backbone", type=number(1e-9, 10), help=lr)
    labels = "labelled images of each class; by default 4, on synthetic images 6"
    add("--labels-per-class", type=whole(1), help=labels)
    method = "train and compare these; by default supervised freematch pepl, with --pretrained "
    add("--method", nargs="+", choices=METHODS, help=method + "also pepl_propagation")
    arch = "tiny, efficientnet_lite0 (default with --pretrained), or a ResNet, ResNeXt or "
    arch += "EfficientNet of torchvision, such as resnet50"
    add("--arch", choices=NETWORKS, metavar="NAME", help=arch)
    add("--pretrained", action="store_true", help="start from ImageNet weights")
    freeze = "K freezes the stem and K stages, 0 nothing; by default 0, with --pretrained 3 for an "
    freeze += "EfficientNet and 2 for a ResNet"
    add("--freeze", type=whole(0), metavar="K", help=freeze)
    start = "share of the steps before unlabelled images are used"
    add("--unlabelled-start", type=number(0, 0.99), default=0.3, help=start)
    args = p.parse_args(argv)
    args.arch = args.arch or ("efficientnet_lite0" if args.pretrained else "tiny")
    method = ["supervised", "freematch", "pepl"] + args.pretrained * ["pepl_propagation"]
    p.set_defaults(arch=args.arch, steps=1200, freeze=0, method=method)
    p.set_defaults(labels_per_class=6 if args.data == "synthetic" else 4)
    if args.arch == "tiny":
        p.set_defaults(size="48", batch_size=32, lr=0.05, lr_backbone=0.05)
    else:
        p.set_defaults(size="112", batch_size=16, lr=0.03, lr_backbone=0.03)
    if args.pretrained:
        stages = 3 if args.arch.startswith("eff") else 2  # down to 1/8 of the input's resolution
        p.set_defaults(steps=1050, lr_backbone=0.01, freeze=stages)
    if args.quick:
        p.set_defaults(steps=6, batch_size=8, save_every=2, labels_per_class=1)
    args = data.parse_flags(p, argv, METHOD)
    if args.freeze and not args.pretrained:
        p.error("--freeze: the frozen layers would be random; add --pretrained")
    if len(set(args.method)) < len(args.method):
        p.error(f"--method {' '.join(args.method)}: name each method once")
    if args.pretrained and args.arch == "tiny":
        p.error("--pretrained: tiny has no ImageNet weights; use --arch efficientnet_lite0")
    return args


# ==================================================================================================
# 2. Views of an image
# ==================================================================================================
# A pseudo-label is predicted on a weak view of an image, which is lightly augmented, and learned on
# a strong view, which is heavily augmented.


def uniform(n, x):
    """n random numbers in [-1, 1] for each image of x, (n, B, 1, 1, 1), on the device of x.

    They are drawn on the CPU, so that a seed gives the same numbers on any device.
    """
    return (2 * torch.rand(n, len(x), 1, 1, 1) - 1).to(x.device)


def warp(x, rows, size):
    """Sample x (B, C, H0, W0) at size (H, W), mirrored beyond its edges.

    rows: the six entries of a 2 x 3 affine matrix, each (B, 1, 1, 1) or a number, which maps
    output to input coordinates in [-1, 1].
    """
    theta = torch.stack([torch.zeros_like(rows[0]) + r for r in rows], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, (*x.shape[:2], *size), align_corners=False)  # (B, H, W, 2)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def weak_augment(images, size):
    """Randomly crop and mirror uint8 (B, 3, H0, W0): float (B, 3, H, W) in [0, 1]."""
    mirror, right, down, zoom = uniform(4, images)
    side = size[0] / images.shape[2] * (1 - 0.1 * zoom.abs())  # of the crop; about 7/8 at most
    width = torch.where(mirror < 0, -side, side)
    rows = [width, 0, right * (1 - side), 0, side, down * (1 - side)]
    return warp(images.float() / 255, rows, size)


def strong_augment(x):
    """Heavily augment x (B, 3, H, W) in [0, 1], each image differently, similar to RandAugment.

    A random affine warp, then five changes, each of a random half of the images: contrast and
    brightness, saturation, posterization, blur or sharpening, cutout.
    """
    h, w = x.shape[2:]
    angle, zoom, shear, right, down = uniform(5, x)
    angle = 0.4 * angle  # up to 23 degrees
    cos, sin = angle.cos() * torch.exp(0.2 * zoom), angle.sin() * torch.exp(0.2 * zoom)
    upper = [cos, (0.2 * shear - sin) * (h / w), 0.2 * right]
    x = warp(x, [*upper, sin * (w / h), cos, 0.2 * down], (h, w))

    changed = uniform(5, x) > 0  # (5, B, 1, 1, 1)
    contrast, brightness, saturation, levels, sharpness, column, row = uniform(7, x)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = torch.where(changed[0], mean + (x - mean) * (1 + 0.5 * contrast) + 0.2 * brightness, x)
    grey = x.mean(1, keepdim=True)
    x = torch.where(changed[1], grey + (x - grey) * (1 + 0.5 * saturation), x).clamp(0, 1)
    levels = (10 + 6 * levels).round()
    x = torch.where(changed[2], (x * levels).round() / levels, x)
    blurred = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    x = torch.where(changed[3], (x + sharpness * (x - blurred)).clamp(0, 1), x)
    columns, rows = (torch.linspace(-1, 1, n, device=x.device) for n in (w, h))
    # a hole with sides of a third of the image's
    hole = ((columns - column).abs() < 0.35) & ((rows[:, None] - row).abs() < 0.35)
    return torch.where(changed[4] & hole, torch.full_like(x, 0.5), x)


# ==================================================================================================
# 3. Pseudo-labels and their thresholds
# ==================================================================================================
# q: the probabilities of the EMA network on weak views. A pseudo-label is the most probable class
# of the aligned q; it is kept if its probability reaches the threshold of that class.


def align(q, mean, prior):
    """Distribution alignment [ReMixMatch]: rescale q (B, C) from its mean (C,) towards prior."""
    q = q * prior / mean.clamp(min=1e-12)  # not 0 / 0 for a class that has no labelled image
    return q / q.sum(1, keepdim=True)


def update_thresholds(tau, p, q, beta):
    """Update the global threshold tau () and the mean class probabilities p (C,) by q (B, C).

    beta: the decay of these running means, in [0, 1).
    """
    tau = beta * tau + (1 - beta) * q.amax(1).mean()  # Eq. 1 [paper]
    p = beta * p + (1 - beta) * q.mean(0)  # Eq. 2 [paper]
    return tau, p


def class_thresholds(tau, p):
    """The threshold of each class, (C,); it is tau for the class with the highest mean."""
    return tau * p / p.max()  # Eq. 3 [paper]


def pseudo_label(q, thresholds):
    """Pseudo-labels (B,) int64 from q (B, C), and which of them to keep, (B,) bool."""
    confidence, y = q.max(1)
    return y, confidence >= thresholds[y]


# ==================================================================================================
# 4. Class activation maps and semantic mixing
# ==================================================================================================


def cam(features, weight, y, size, stride):
    """Class activation maps, (B, H, W), of the classes y (B,).

    features: (B, K, h, w), before global average pooling. weight: (C, K), of the linear layer.
    size: (H, W), of the image. stride: pixels from one cell of the features to the next.
    """
    features, weight = F.relu(features.float()), weight[y].float()  # (B, K, h, w), (B, K)
    maps = torch.einsum("bkhw,bk->bhw", features, weight)  # Eq. 4 [paper]
    # Cell i of a strided convolution is centred at pixel stride * i. F.interpolate assumes another
    # place, so the grid is made by hand: in it, cell i of n lies at (2 i + 1) / n - 1.
    cells = (torch.arange(n, device=maps.device) / stride for n in size)  # of pixel rows, columns
    y, x = ((2 * i + 1) / n - 1 for i, n in zip(cells, maps.shape[1:], strict=True))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), 2).expand(len(maps), -1, -1, -1)
    return F.grid_sample(maps[:, None], grid, padding_mode="border", align_corners=False)[:, 0]


def percent_map(maps):
    """Semantic percent maps of CAMs (B, H, W): not negative, with a sum of 1 in each image."""
    maps = maps - maps.amin((1, 2), keepdim=True) + 1e-12  # a constant map becomes uniform
    return maps / maps.sum((1, 2), keepdim=True)  # Eq. 5 [paper]


def random_boxes(b, size, alpha=5.0):
    """b random boxes (b, 4) in an image of size (H, W): left, top, right, bottom, whole pixels."""
    lam = torch.distributions.Beta(alpha, alpha).sample((b, 1))  # mostly 0.2 to 0.8; as in SnapMix
    side = torch.tensor([size[1], size[0]])  # (W, H)
    half, centre = (1 - lam).sqrt() * side / 2, torch.rand(b, 2) * side  # Eq. 6 [paper]
    low = (centre - half).round().clamp(min=0).minimum(side - 1)  # at least one pixel
    high = (centre + half).round().minimum(side).maximum(low + 1)
    return torch.cat([low, high], 1).long()


def box_mask(boxes, size):
    """Pixels inside boxes (B, 4): (B, H, W) bool."""
    y, x = (torch.arange(n, device=boxes.device) for n in size)
    left, top, right, bottom = boxes[..., None, None].unbind(1)  # (B, 1, 1) each
    return (x >= left) & (x < right) & (y[:, None] >= top) & (y[:, None] < bottom)


def semantic_mix(x_a, x_b, maps_a, maps_b, box_a, box_b):
    """Paste box_b of each image b, resized, into box_a of the image a.

    x_a, x_b: (B, 3, H, W). maps_a, maps_b: their percent maps (B, H, W). Boxes: (B, 4), see
    random_boxes. Returns the mixed images, and rho_a and rho_b (B,) in [0, 1]: how much of either
    map is visible in the mix. They need not sum to 1: both objects can be visible, or neither.
    """
    h, w = x_a.shape[2:]
    # An affine map takes box_a to box_b, in the coordinates of grid_sample, -1 to 1.
    sides = torch.tensor([w, h, w, h], device=x_a.device)
    low_a, high_a = (2 * box_a / sides - 1).chunk(2, 1)  # (B, 2) each: (left, top), (right, bottom)
    low_b, high_b = (2 * box_b / sides - 1).chunk(2, 1)
    scale = (high_b - low_b) / (high_a - low_a)
    shift = low_b - scale * low_a
    theta = torch.cat([torch.diag_embed(scale), shift[..., None]], 2)  # (B, 2, 3)
    grid = F.affine_grid(theta, x_a.shape, align_corners=False)  # (B, H, W, 2)
    pasted = F.grid_sample(x_b, grid, padding_mode="border", align_corners=False)
    inside_a, inside_b = box_mask(box_a, (h, w)), box_mask(box_b, (h, w))
    rho_a = 1 - (maps_a * inside_a).sum((1, 2))  # Eq. 6 [paper]
    rho_b = (maps_b * inside_b).sum((1, 2))
    return torch.where(inside_a[:, None], pasted, x_a), rho_a, rho_b


def mix_batch(x, y, maps):
    """Mix each image of x (B, 3, H, W), as image a, with the one before it, as image b.

    y: classes (B,). maps: percent maps (B, H, W); uniform ones weight the labels by areas. Returns
    the mixed images and what hybrid_loss needs: y_a, y_b, rho_a, rho_b, each (B,).
    """
    box_a, box_b = (random_boxes(len(x), x.shape[2:]).to(x.device) for _ in range(2))
    mixed, rho_a, rho_b = semantic_mix(x, x.roll(1, 0), maps, maps.roll(1, 0), box_a, box_b)
    return mixed, y, y.roll(1), rho_a, rho_b


# ==================================================================================================
# 5. Loss
# ==================================================================================================


def hybrid_loss(logits, y_a, y_b, rho_a, rho_b):
    """Hybrid semantic loss, (B,), of logits (B, C).

    y_a, y_b: classes (B,). rho_a, rho_b: their weights (B,).
    """
    loss_a = F.cross_entropy(logits, y_a, reduction="none")  # (B,)
    loss_b = F.cross_entropy(logits, y_b, reduction="none")
    return rho_a * loss_a + rho_b * loss_b  # Eq. 7 [paper]


# ==================================================================================================
# 6. Network
# ==================================================================================================


def make_backbone(arch, pretrained):
    """The stem and the stages of a network, as nn.Sequential, and the width K of its features.

    Raises DataError if its ImageNet weights cannot be loaded.
    """
    if arch == "tiny":  # the side of its feature map is a sixth of the input's
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
    except Exception as error:  # of the download, the hash or the file: any type
        why = f"{arch}: ImageNet weights could not be loaded ({error})"
        raise DataError(f"{why}; check the connection or leave --pretrained out") from error
    if isinstance(net, EfficientNet):
        return net.features, net.classifier[-1].in_features
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    return nn.Sequential(stem, net.layer1, net.layer2, net.layer3, net.layer4), net.fc.in_features


class Classifier(nn.Module):
    """Backbone, global average pooling and one linear layer, the structure that CAMs require.

    x (B, 3, H, W) in [0, 1] -> logits (B, C) float32 and features (B, K, h, w). freeze: number of
    stages that are frozen, with the stem; 0 freezes nothing.
    """

    def __init__(self, arch, freeze, n_classes, pretrained=False):
        super().__init__()
        self.backbone, width = make_backbone(arch, pretrained)
        self.head = nn.Linear(width, n_classes)
        if freeze >= len(self.backbone):
            raise DataError(f"--freeze {freeze}: {arch} has {len(self.backbone) - 1} stages")
        self.n_frozen = freeze + 1 if freeze else 0
        self.backbone[: self.n_frozen].requires_grad_(False)
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet
        if arch in ("efficientnet_lite0", "efficientnet_v2_l"):
            mean, std = [0.5] * 3, [0.5] * 3
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        self.stride = 6 if arch == "tiny" else 16  # pixels from a cell of the features to the next
        if arch != "tiny":
            last = 4 if len(self.backbone) == 5 else 6  # last stage with a stride; 5: a ResNet
            for module in self.backbone[last].modules():
                if getattr(module, "stride", None) == (2, 2):
                    module.stride = (1, 1)  # 16, not 32: maps have four times as many cells

    def train(self, mode=True):
        super().train(mode)
        self.backbone[: self.n_frozen].eval()  # batch norm keeps the statistics of ImageNet
        return self

    def forward(self, x):
        features = self.backbone((x - self.mean) / self.std)  # (B, K, h, w)
        return self.head(features.mean((2, 3))).float(), features


# ==================================================================================================
# 7. Training
# ==================================================================================================


def autocast(args):
    """bfloat16 autocast on the run's device if --amp is on."""
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.amp == "on")


def learning_rate(step, steps):
    """Learning-rate multiplier: a linear warm-up over a tenth of the steps, at most 100, and then
    FixMatch's cosine, which ends at a fifth."""
    warm_up = min(100, max(1, steps // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    return math.cos(7 / 16 * math.pi * (step - warm_up) / max(1, steps - warm_up))


def make_optimizer(net, args):
    """SGD with the two learning rates of --lr and --lr-backbone, and its schedule."""
    opt = torch.optim.SGD(net.head.parameters(), args.lr, 0.9, weight_decay=5e-4, nesterov=True)
    opt.add_param_group({"params": net.backbone.parameters(), "lr": args.lr_backbone})
    schedule = partial(learning_rate, steps=args.steps)
    return opt, torch.optim.lr_scheduler.LambdaLR(opt, schedule)


@torch.no_grad()
def update_ema(ema, net, decay):
    """Move the weights of ema towards net's; buffers, such as running means, are copied."""
    for old, new in zip(ema.parameters(), net.parameters(), strict=True):
        old.lerp_(new, 1 - decay)
    for old, new in zip(ema.buffers(), net.buffers(), strict=True):
        old.copy_(new)


@torch.no_grad()
def predict_batch(net, x, args):
    """Probabilities (B, C) and features (B, K, h, w) of x (B, 3, H, W) in [0, 1]."""
    with autocast(args):
        logits, features = net(x)
    return logits.softmax(1), features


def predict_all(net, images, args):
    """Probabilities (N, C) and pooled features (N, K) of centre crops of uint8 (N, 3, H0, W0)."""
    top, left = ((n - m) // 2 for n, m in zip(images.shape[2:], args.size, strict=True))
    images = images[:, :, top : top + args.size[0], left : left + args.size[1]]  # (N, 3, H, W)
    batches = (predict_batch(net, x.to(args.device).float() / 255, args) for x in images.split(128))
    pairs = [(q, F.relu(features.float()).mean((2, 3))) for q, features in batches]
    return tuple(map(torch.cat, zip(*pairs, strict=True)))


def sample(indices, n):
    """n random elements of indices with replacement, drawn on the CPU."""
    return indices[torch.randint(len(indices), (n,)).to(indices.device)]


def take(images, indices, args):
    """Some of the images, on the run's device."""
    return images[indices.to(images.device)].to(args.device)


def label_quality(y, keep, truth):
    """How good pseudo-labels y (N,) are, {name: share}; accuracies only if all labels are known."""
    quality = {"share kept": keep.float().mean().item()}
    if (truth >= 0).all():
        quality["accuracy"] = (y == truth).float().mean().item()
        if keep.any():
            quality["accuracy of kept"] = (y == truth)[keep].float().mean().item()
    return quality


def train(name, train_set, split, args, folder, fingerprints):
    """Train one method; the loop is the same for all. Returns EMA weights, seconds, label quality.

    split: indices of the labelled and the unlabelled images. fingerprints: of the data.
    """
    method = METHODS[name]
    torch.manual_seed(args.seed)
    n_u, n_classes = args.mu * args.batch_size, len(train_set.classes)
    last = folder / f"last_{name}.pt"
    net = Classifier(args.arch, args.freeze, n_classes, args.pretrained and not last.exists())
    net = net.to(args.device, memory_format=torch.channels_last).train()  # faster convolutions
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    opt, scheduler = make_optimizer(net, args)
    parts = {"net": net, "ema": ema, "opt": opt, "scheduler": scheduler}
    state = {"step": 0, "seconds": 0.0, "propagated": None}
    state |= {"tau": torch.tensor(0.0), "p": torch.zeros(n_classes), "mean": torch.zeros(n_classes)}
    state |= data.resume(last, METHOD, args, fingerprints, parts)
    tau, p, mean = (state[key].to(args.device) for key in ("tau", "p", "mean"))
    propagated = state["propagated"]  # by label propagation: q of all images (N, C), or None
    if propagated is not None:
        propagated = propagated.to(args.device)
    images = data.to_device_if_it_fits(train_set.images, args.device)
    labels = train_set.labels.to(args.device)
    labelled, unlabelled = (i.to(args.device) for i in split)
    prior = labels[labelled].bincount(minlength=n_classes) / len(labelled)  # (C,)
    thresholds = torch.full_like(prior, FIXED_THRESHOLD)
    first = int(args.unlabelled_start * args.steps)
    every = max(3, args.steps // 20)  # steps between two label propagations
    forward = torch.compile(net) if args.compile else net
    began = time.time() - state["seconds"]
    steps = range(state["step"], args.steps)
    bar = data.progress(steps, f"train {name}", args.steps, state["step"])
    for step in bar:
        i = sample(labelled, args.batch_size)
        y_l = labels[i]
        x_l = weak_augment(take(images, i, args), args.size)  # labelled (B, 3, H, W)
        views = [strong_augment(x_l)]

        if method.pseudo_labels and step >= first:
            if method.propagation and (step - first) % every == 0:
                propagated = propagate_labels(ema, images, labels, split, prior, args)
            i = sample(unlabelled, n_u)
            x_w = weak_augment(take(images, i, args), args.size)  # weak view (mu B, 3, H, W)
            q, features = predict_batch(ema, x_w, args)
            if method.propagation:
                q = propagated[i]
            beta = min(BETA, 1 - 1 / (step - first + 1))  # see D4
            mean = beta * mean + (1 - beta) * q.mean(0)
            q = align(q, mean, prior)  # see D6
            tau, p = update_thresholds(tau, p, q, beta)
            if method.adaptive:
                thresholds = class_thresholds(tau, p)
            y, keep = pseudo_label(q, thresholds)
            kept = keep.nonzero()[:, 0]  # once, as the CPU waits here for the GPU
            n_mixed = len(kept) // 2 if method.mixing else 0
            mixed, unmixed = kept[:n_mixed], kept[n_mixed:]
            if len(unmixed):
                views.append(strong_augment(x_w[unmixed]))  # strong view
            if n_mixed:
                maps = torch.full_like(x_w[mixed, 0], 1 / (args.size[0] * args.size[1]))
                if method.semantic:
                    maps = cam(features[mixed], ema.head.weight, y[mixed], args.size, ema.stride)
                    maps = percent_map(maps)
                x_m, *targets = mix_batch(x_w[mixed], y[mixed], maps)
                views.append(strong_augment(x_m))  # mixed view

        with autocast(args):
            logits, _ = forward(torch.cat(views))  # all views share the statistics of batch norm
        logits = logits.split([len(x) for x in views])
        loss = F.cross_entropy(logits[0], y_l)
        if len(views) > 1:
            loss += F.cross_entropy(logits[1], y[unmixed], reduction="sum") / n_u  # Eq. 8 [paper]
        if len(views) > 2:
            loss += hybrid_loss(logits[2], *targets).sum() / n_u
        if not loss.isfinite():
            todo = "try a third of --lr and --lr-backbone, or --amp off"
            raise DataError(f"{name}: loss is {loss:g} at step {step}: {todo}")
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        scheduler.step()
        update_ema(ema, net, min(EMA, (step + 1) / (step + 11)))  # shorter average at first
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            more = {"step": step + 1, "seconds": time.time() - began}
            more |= {"tau": tau, "p": p, "mean": mean, "propagated": propagated}
            if step + 1 == args.steps and method.pseudo_labels:
                q = propagated if method.propagation else predict_all(ema, images, args)[0]
                y, keep = pseudo_label(align(q, q[unlabelled].mean(0), prior), thresholds)
                more["quality"] = label_quality(y[unlabelled], keep[unlabelled], labels[unlabelled])
            state = data.save_checkpoint(last, METHOD, args, fingerprints, parts, **more)
    return state["ema"], state["seconds"], state.get("quality")


# ==================================================================================================
# 8. Evaluation, prediction and figure
# ==================================================================================================


def overlay(img, heat):
    """Lay a map (H, W) of any range over an image uint8 (3, H, W): uint8 (H, W, 3)."""
    low, high = heat.aminmax()
    colours = data.colour_map((heat - low) / (high - low).clamp(min=1e-12))
    return (0.45 * img.permute(1, 2, 0).numpy() + 0.55 * colours).astype("uint8")


@torch.no_grad()
def predict_maps(net, images, y, args):
    """Percent maps (B, H, W), on the CPU, of the classes y (B,) in uint8 (B, 3, H, W)."""
    _, features = predict_batch(net, images.to(args.device).float() / 255, args)
    maps = cam(features, net.head.weight, y.to(args.device), images.shape[2:], net.stride)
    return percent_map(maps).cpu()


def draw_mixes(net, test, predicted, args, path, n=5):
    """Draw n semantic mixes of test images; those that are classified correctly come first.

    predicted: classes (N,).
    """
    torch.manual_seed(args.seed)
    order = torch.randperm(len(predicted))
    is_wrong = (predicted != test.labels)[order]
    n = min(n, len(predicted) // 2)
    chosen = order[is_wrong.int().argsort(stable=True)][: 2 * n]  # n images a, then n images b
    images, size = test.images[chosen], test.images.shape[2:]  # uint8 (2n, 3, H, W)
    maps, boxes = predict_maps(net, images, predicted[chosen], args), random_boxes(2 * n, size)
    inside = box_mask(boxes, size)  # (2n, H, W)
    parts = [part for x in (images.float() / 255, maps, boxes) for part in x.chunk(2)]
    mixed, rho_a, rho_b = semantic_mix(*parts)
    rho, area = torch.cat([rho_a, rho_b]), inside.float().mean((1, 2))
    area[:n] = 1 - area[:n]
    tiles = []
    for k, photo in enumerate(images):
        heat = data.outline(overlay(photo, maps[k]), inside[k])
        name = test.classes[predicted[chosen[k]]]
        tiles.append([(photo.permute(1, 2, 0).numpy(), name)])
        tiles[k].append((heat, f"rho {rho[k]:.2f}, area {area[k]:.2f}"))
    mixed = (mixed * 255).byte().permute(0, 2, 3, 1).numpy()  # (n, H, W, 3)
    rows = [("", [*tiles[k], *tiles[n + k], (mixed[k], "")]) for k in range(n)]
    titles = ["image a", "map of a and box", "image b", "map of b and box", "mix"]
    data.draw_sheet(titles, rows, path)


def classify_photo(photo, net, classes, args):
    """Classify a photo: its CAM laid over it, the predicted class and all probabilities."""
    q, _ = predict_all(net, photo.small[None], args)  # (1, C)
    y = q.argmax(1)
    maps = predict_maps(net, photo.small[None], y, args)  # of the whole photo, not of its centre
    findings = {"prediction": classes[y]}
    for name, p in zip(classes, q[0].tolist(), strict=True):
        findings[f"probability of {name}"] = f"{p:.6f}"
    return {"cam": overlay(photo.img, data.enlarge(maps, photo)[0])}, findings


# ==================================================================================================
# 9. Beyond the paper: label propagation
# ==================================================================================================
# Pretrained features find similar images more reliably than a classifier that has seen few labels.
# Here the pseudo-labels of all images, and the true labels of the labelled ones, are averaged over
# the nearest neighbours of each image: a wrong one is outvoted if most neighbours are right.


def propagate(q, features, k, own=0.1, rounds=10):
    """Label propagation, as [Iscen 2019]: q (N, C) averaged over k nearest neighbours, (N, C).

    features: (N, D), not negative. own: the weight of the image's own q in each of the rounds.
    """
    z = features.sqrt()  # so that no single strong feature decides which images are alike
    z = F.normalize(z - z.mean(0), dim=1)
    k = min(k, len(z) - 1)
    near = torch.cat([(z_b @ z.T).topk(k + 1).indices[:, 1:] for z_b in z.split(1024)])  # (N, k)
    propagated = q
    for _ in range(rounds):
        propagated = own * q + (1 - own) * propagated[near].mean(1)  # Eq. 9 [ours]
    return propagated


def propagate_labels(ema, images, labels, split, prior, args):
    """Probabilities (N, C) of all training images by label propagation."""
    labelled, unlabelled = split
    q, features = predict_all(ema, images, args)
    q = align(q, q[unlabelled].mean(0), prior)
    q[labelled] = F.one_hot(labels[labelled], len(prior)).float()
    q = propagate(q, features, NEIGHBOURS)
    q = align(q, q[unlabelled].mean(0), prior) ** 3  # sharpen: averages are rarely confident
    return q / q.sum(1, keepdim=True)


# ==================================================================================================
# 10. Main
# ==================================================================================================


def stored_size(args):
    """The size at which images are stored, 8/7 of --size: crops of --size are cut from them."""
    return tuple(round(n * 8 / 7) for n in args.size)


def load(split, args):
    """The training or test images."""
    few = 400 if args.quick else None  # about two images for each of 200 classes
    size, workers = stored_size(args), args.num_workers
    return data.load_classification(args.data, args.data_root, split, size, few, workers)


def make_network(args, n_classes, weights):
    """The network of a checkpoint, for inference."""
    net = Classifier(args.arch, args.freeze, n_classes).to(args.device).eval()
    net.load_state_dict(weights)
    return net


def try_step(args, n_classes):
    """Load the ImageNet weights and run a full batch forward and backward, to fail early."""
    net = Classifier(args.arch, args.freeze, n_classes, args.pretrained).to(args.device)
    views = 1 + args.mu if any(METHODS[m].pseudo_labels for m in args.method) else 1
    with autocast(args):
        logits, _ = net(torch.zeros(views * args.batch_size, 3, *args.size, device=args.device))
    logits.sum().backward()


def train_all(train_set, test, args, folder):
    """Train the methods of --method; writes best.pt."""
    labels, classes = train_set.labels, train_set.classes
    split = data.label_split(labels, args.labels_per_class, args.seed)
    labelled, unlabelled = split
    if not len(unlabelled) and args.method != ["supervised"]:
        raise DataError(
            "every training image is labelled: lower --labels-per-class or use --method supervised"
        )
    fingerprints = {"train": train_set.fingerprint, "test": test.fingerprint}
    if not args.resume:
        try_step(args, len(classes))
        data.prepare_folder(folder)
    more = {"classes": classes, "n_train": len(labels), "n_labelled": len(labelled)}
    more |= {"nets": {}, "seconds": {}, "pseudo_labels": {}}
    for method in args.method:
        ema, seconds, quality = train(method, train_set, split, args, folder, fingerprints)
        more["nets"][method], more["seconds"][method] = ema, round(seconds)
        if quality:
            more["pseudo_labels"][method] = quality
    data.save_checkpoint(folder / "best.pt", METHOD, args, fingerprints, **more)


def predict(args):
    """Classify the images of --predict by the last method of --method."""
    folder = data.run_folder(METHOD, args)
    best, predictions = args.checkpoint or folder / "best.pt", folder / "predictions"
    state = data.load_checkpoint(best, METHOD)
    method, classes = args.method[-1], state["classes"]
    net = make_network(args, len(classes), state["nets"][method])
    print(f"predictions of {method} go to {predictions}")
    classify_one = partial(classify_photo, net=net, classes=classes, args=args)
    data.predict_images(args.predict, stored_size(args), predictions, best, classify_one)


def run(args):
    """Train all methods and compare them; or only evaluate; or predict."""
    if args.predict:
        return predict(args)
    folder, test = data.run_folder(METHOD, args), load("test", args)
    if not args.eval_only:
        train_all(load("train", args), test, args, folder)
    best = args.checkpoint or folder / "best.pt"
    state = data.load_checkpoint(best, METHOD, {"test": test.fingerprint})
    rows = {}
    for method, weights in state["nets"].items():
        net = make_network(args, len(test.classes), weights)
        predicted = predict_all(net, test.images, args)[0].argmax(1).cpu()  # (N,)
        rows[method] = {"accuracy": (predicted == test.labels).float().mean().item()}
    names = ("n_labelled", "n_train", "seconds", "pseudo_labels")
    more = {"n_images": len(test.labels)} | {name: state[name] for name in names}
    data.write_result(folder / "result.json", METHOD, args, rows, **more)
    data.print_table(rows)
    draw_mixes(net, test, predicted, args, folder / "mix.png")  # of the last method
    print(f"\n{len(test.labels)} test images. Open {folder / 'mix.png'}")


def main(argv=None):
    """Run the command line; foreseeable errors become one line and exit status 2."""
    with data.one_line_errors("pepl.py"):
        run(parse_args(argv))


if __name__ == "__main__":
    main()
