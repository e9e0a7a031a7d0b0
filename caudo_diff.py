"""Caudo-Diff: medical segmentation from one labelled image, by diffusion-calibrated pseudo-labels.

Paper: Caudo-Diff, https://doi.org/10.1016/j.patcog.2025.112007; only its abstract was available to
us. It says: one labelled image, the exemplar, is the only supervision. A segmenter's pseudo-labels
of the other images are unreliable. A deterministic diffusion model in a guided latent space
calibrates them, guided by the initial labels and the features of the segmenter, and so improves
the segmentation. How this is done here is our interpretation (D1 to D5).

    exemplar --> augmented pairs --> segmenter --> p0, masks predicted for the unlabelled images
                                         ^                |
                             fine-tune   |                |  E, G: mask autoencoder
                              on p1      |                v
                                      p1 = G(z) <-- DDIM: z = E(p0) up to t = 400, unguided, and
                                                    down to t = 0, guided by the image, p0 and
                                                    pretrained features

    python caudo_diff.py                                       synthetic images on a CPU, minutes
    python caudo_diff.py --data folder --data-root mine --exemplar img_017
    python caudo_diff.py --data isic2018 --exemplar ISIC_0009947             downloads 13 GB first
    python caudo_diff.py --predict photo.jpg --checkpoint out/caudo_diff/mine/seed0-img_017/best.pt

mine/ holds train/images/*, train/masks/img_017.png and, for a table, test/{images,masks}/*.

Test Dice on ISIC (300 images, our own split, 128 x 96 px, mean of three exemplars, seed 0):
Caudo-Diff 0.722. The control, self-training without the diffusion, 0.737. With our image prior in
labels and masks: Caudo-Diff 0.864, the prior without the diffusion 0.862. All masks 0.882, with the
prior 0.891.

Our interpretation (D), and our additions (A):
D1  The pairs are warped and recoloured copies of the exemplar, and its object pasted on parts of
    other images.
D2  The diffusion is trained once, on the exemplar's pairs. Its guide holds the first segmenter's
    prediction for a recoloured copy; half of these predictions get artificial errors.
D3  The features are those of the segmenter's frozen ImageNet encoder. With --encoder scratch there
    are none.
D4  The segmenter is fine-tuned in three rounds, each on new labels. One mask leaves none for
    validation, so the number of steps is fixed, and EMA weights are used. We chose constants with
    masks of training and validation images: in this respect it is not strictly one-shot.
D5  The latent space is that of a mask autoencoder, trained on the exemplar's masks. Calibration
    goes up to t = 400 without the guide, and down with it.
A1  An image prior (section 9) corrects labels without training: rows prior_only, caudo_diff_prior.
A2  A dense CRF in place of the prior refines the final masks: row caudo_diff_crf.
"""

import copy
import itertools
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads stall a busy CPU 10-50 x

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

import data
from crf import DenseCRF, unary_from_softmax
from data import DataError, number, whole

METHOD = "caudo_diff"
PSEUDO_LABELLED = ["self_training", "caudo_diff", "prior_only", "caudo_diff_prior"]
CALIBRATED = ["caudo_diff", "caudo_diff_prior"]  # the diffusion calibrates their labels
WITH_PRIOR = ["prior_only", "caudo_diff_prior"]  # the image prior corrects their labels
TRAINED = ["exemplar_only", *PSEUDO_LABELLED, "full_supervision"]  # rows with their own segmenter
ROWS = [*TRAINED[:-1], "caudo_diff_crf", "full_supervision"]
# "Eq. n": our numbering, as in docs/caudo_diff.md.
T = 1000  # diffusion steps: t runs from 0 (nearly clean) to T - 1 (nearly pure noise)
TIMES = [0, 100, 200, 300, 400]  # of the diffusion in calibration, up to t* and back
PATCH = 4  # side in pixels of the square that one position of the latent covers
LATENT_CHANNELS = 8
POOL = 600  # largest number of images that are labelled in a round

# ==================================================================================================
# 1. Command line
# ==================================================================================================


def parse_args(argv=None):
    """Parse and check the command line."""
    p = data.make_parser("caudo_diff.py", __doc__)
    add = p.add_argument
    add("--data", default="synthetic", choices=["synthetic", "isic2018", "folder"], help="data set")
    size = "network input: N or WIDTHxHEIGHT; by default 64x48 on synthetic images, else 128x96"
    add("--size", type=data.parse_size, help=size)
    steps = "training steps of the first segmenter and the denoiser; autoencoder: twice as many"
    add("--steps", type=whole(1), default=300, help=steps)
    add("--batch-size", type=whole(8), default=24, help="images in a training step")
    add("--lr", type=number(1e-9, 10), default=2e-3, help="peak learning rate of AdamW")
    exemplar = "id of the labelled image; auto: the training image with the most typical colours"
    add("--exemplar", default="auto", metavar="ID", help=exemplar)
    encoder = "scratch, efficientnet_lite0 (default on photographs), resnet18, resnet34 or resnet50"
    choices = ["scratch", "efficientnet_lite0", "resnet18", "resnet34", "resnet50"]
    add("--encoder", choices=choices, metavar="NAME", help=encoder)
    add("--rounds", type=whole(1), default=3, help="rounds of labelling and training")
    add("--round-steps", type=whole(1), default=100, help="training steps of a round")
    anatomy = "the object has a fixed place: small rotations and shifts, no mirroring, no pasting"
    add("--anatomy", action="store_true", help=anatomy)
    method = "rows to train and compare: " + ", ".join(ROWS)
    method += "; default: all, full_supervision only if the training images have masks"
    add("--method", nargs="+", choices=ROWS, metavar="ROW", help=method)
    args = p.parse_args(argv)
    if args.data == "synthetic":
        p.set_defaults(size="64x48", encoder="scratch")
    else:
        p.set_defaults(size="128x96", encoder="efficientnet_lite0")
    has_masks = data.has_masks(args.data, args.data_root, "train")
    p.set_defaults(method=ROWS if has_masks else ROWS[:-1])
    if args.quick:
        p.set_defaults(steps=6, round_steps=6, batch_size=8)
    args = data.parse_flags(p, argv, METHOD)
    if not (has_masks or args.predict or args.eval_only):
        if "full_supervision" in args.method:
            p.error("--method full_supervision: most training images have no mask; leave it out")
        if args.exemplar == "auto":
            p.error("--exemplar auto: most training images have no mask; name one that has a mask")
    if "caudo_diff_crf" in args.method and "caudo_diff_prior" not in args.method:
        p.error("--method caudo_diff_crf needs caudo_diff_prior; name both")
    return args


# ==================================================================================================
# 2. The exemplar, and training pairs made from it
# ==================================================================================================


def choose_exemplar(train_set, wanted):
    """Index of the exemplar by its id; auto: the image with the most typical colours."""
    if wanted in train_set.ids:
        return train_set.ids.index(wanted)
    if wanted != "auto":
        known = f"{len(train_set)} training images, such as {train_set.ids[0]} (without suffix)"
        raise DataError(f"--exemplar {wanted} is not one of the {known}")
    x = train_set.images.flatten(2)  # (N, 3, H W)
    colours = torch.stack([torch.cat([i.float().mean(1), i.float().std(1)]) for i in x])  # (N, 6)
    z = (colours - colours.mean(0)) / (colours.std(0) + 1e-6)
    return z.square().sum(1).argmin().item()


def uniform(low, high, b, like, channels=1):
    """Random numbers in [low, high], (b, channels, 1, 1), on the device of `like`."""
    return (low + (high - low) * torch.rand(b, channels, 1, 1)).to(like)


def smooth_noise(b, cells, like):
    """Smooth random images (b, 1, H, W) with a std of about 1, from a grid of cells x cells."""
    z = 1.3 * torch.randn(b, 1, cells, cells).to(like)
    return F.interpolate(z, like.shape[2:], mode="bicubic", align_corners=True)


def log_colours(x):
    """Log colours (B, 3, H, W) of x in [0, 1]: more light adds about the same to all pixels."""
    return (x + 0.05).log()  # 0.05: black is not minus infinity


class Expansion:
    """Draws random training pairs made from the exemplar and the unlabelled images.

    img: the exemplar, uint8 (3, H, W). mask: bool (1, H, W). images: unlabelled, uint8
    (N, 3, H, W).
    """

    def __init__(self, img, mask, images, anatomy, device):
        self.images = images
        self.mask = mask[None].to(device).float()  # (1, 1, H, W)
        self.img = img[None].to(device).float() / 255  # (1, 3, H, W)
        self.anatomy = anatomy
        h, w = mask.shape[1:]
        y, x = mask[0].nonzero().float().mean(0).tolist()
        self.centre = torch.tensor([(2 * x + 1) / w - 1, (2 * y + 1) / h - 1])  # in [-1, 1]
        self.radius = math.sqrt(mask.float().mean() / math.pi)  # of a disc of its area, in sides
        # mean log colour of the pixels 2 to 7 px away from the object
        ring = F.max_pool2d(self.mask, 15, 1, 7) - F.max_pool2d(self.mask, 3, 1, 1)
        self.around = (log_colours(self.img) * ring).sum((2, 3), keepdim=True) / (ring.sum() + 1e-6)

    def warp(self, scale, spread, padding, elastic):
        """Rotated, stretched and elastically deformed copies, enlarged by scale (n,).

        An object is placed at most `spread` from the centre of the image or, with --anatomy, from
        its own place; 1 is half of a side. padding: see F.grid_sample. elastic: strength of the
        deformation. Returns images (n, 3, H, W) and masks (n, 1, H, W).
        """
        n, (h, w) = len(scale), self.img.shape[2:]
        turn = (0.26 if self.anatomy else math.pi) * (2 * torch.rand(n) - 1)
        mirror = 1 if self.anatomy else 2 * torch.randint(0, 2, (n,)) - 1
        squeeze = torch.exp(0.2 * torch.randn(n))  # narrower and higher by 22 % (std)
        cos, sin, ratio = turn.cos() / scale, turn.sin() / scale, w / h
        upper = [cos * squeeze * mirror, -sin / ratio / squeeze]
        lower = [sin * ratio * squeeze * mirror, cos / squeeze]
        matrix = torch.stack([*upper, *lower], 1).view(n, 2, 2)
        centre = self.centre if self.anatomy else torch.zeros(2)
        centre = centre[:, None] + spread * (2 * torch.rand(n, 2, 1) - 1)  # of the copy's object
        theta = torch.cat([matrix, self.centre[:, None] - matrix @ centre], 2).to(self.img)
        grid = F.affine_grid(theta, (n, 1, h, w), align_corners=False)  # (n, H, W, 2)
        # Random shifts on grids of 4 x 4 and 7 x 7, of up to 8 % and 4 % of a side (std) at
        # elastic = 1; they are not enlarged with the object.
        for cells, size in ((4, 0.16), (7, 0.08)):
            z = torch.randn(n, 2, cells, cells) * (size * elastic * torch.rand(n, 1, 1, 1))
            z = (z / scale.clamp(min=0.5).view(n, 1, 1, 1)).to(self.img)
            grid = grid + F.interpolate(z, (h, w), mode="bicubic").permute(0, 2, 3, 1)
        copies = torch.cat([self.img, self.mask], 1).expand(n, -1, -1, -1)
        copies = F.grid_sample(copies, grid, "bilinear", padding, align_corners=False)
        return copies[:, :3], copies[:, 3:]

    def warped(self, n):
        """Warps of the whole exemplar: log colours (n, 3, H, W) and masks (n, 1, H, W)."""
        low, high, spread = (0.78, 1.28, 0.3) if self.anatomy else (0.9, 1.82, 0.5)
        x, m = self.warp(low * (high / low) ** torch.rand(n), spread, "reflection", elastic=1)
        return log_colours(x.clamp(0, 1)), m

    def pasted(self, n):
        """Warps of the object alone, on parts of unlabelled images: as warped()."""
        radius = 0.1 * 4.2 ** torch.rand(n)  # of the object: 0.1 to 0.42 of the side
        x, m = self.warp(radius / self.radius, 0.6, "zeros", elastic=1.5)
        # The background is a window at the border of a random image, where an object is unlikely.
        side = 0.25 + 0.2 * torch.rand(n, 1)  # of the window, in sides of the image
        # A random point on the frame of [-1, 1] x [-1, 1] tells where at the border.
        place = 2.0 * torch.randint(0, 2, (n, 2)) - 1
        place[torch.arange(n), torch.randint(0, 2, (n,))] = 2 * torch.rand(n) - 1
        theta = torch.cat([torch.eye(2) * side[:, :, None], (place * (1 - side))[:, :, None]], 2)
        grid = F.affine_grid(theta.to(x), (n, 1, *m.shape[2:]), align_corners=False)
        j = torch.randint(len(self.images), (n,)).to(self.images.device)
        background = F.grid_sample(self.images[j].to(x) / 255, grid, align_corners=False)
        return log_colours(background) + m * (log_colours(x) - self.around), m

    def __call__(self, b):
        """Draw images (b, 3, H, W) in [0, 1] and masks (b, 1, H, W) in {0, 1}."""
        n_pasted = 0 if self.anatomy else round(b / 3)
        y, m = self.warped(b - n_pasted)
        if n_pasted:
            y_pasted, m_pasted = self.pasted(n_pasted)
            y, m = torch.cat([y, y_pasted]), torch.cat([m, m_pasted])
        # The contrast of the object to the rest becomes 0.3 to 1.5 times what it is, in each colour
        # +- 0.2 (std), within a border that is between sharp and 5 px wide.
        inside = (y * m).sum((2, 3), keepdim=True) / (m.sum((2, 3), keepdim=True) + 1)
        outside = (y * (1 - m)).sum((2, 3), keepdim=True) / ((1 - m).sum((2, 3), keepdim=True) + 1)
        soft = torch.lerp(m, F.avg_pool2d(m, 5, 1, 2), uniform(0, 1, b, m))
        gain = uniform(-0.7, 0.5, b, m) + 0.2 * torch.randn(b, 3, 1, 1).to(m)
        y = y + soft * gain * (inside - outside)
        # A smooth texture makes it up to 12 % brighter or darker (std).
        y = y + soft * uniform(0, 0.12, b, m) * smooth_noise(b, 7, m)
        return (y.exp() - 0.05).clamp(0, 1), (m > 0.5).float()


def strong_view(x):
    """Strong photometric changes of images x (B, 3, H, W) in [0, 1]: the same shape."""
    b, mean = len(x), x.mean((2, 3), keepdim=True)
    # light: up to 35 % more, 26 % less, in each colour 13 %, and uneven by up to 15 % (std)
    light = torch.exp(uniform(-0.3, 0.3, b, x) + uniform(-0.12, 0.12, b, x, channels=3))
    light = light * (1 + uniform(0, 0.15, b, x) * smooth_noise(b, 3, x))
    # contrast 0.6 to 1.5, gamma 0.74 to 1.35, noise up to 3 % (std)
    x = (mean + (x - mean) * torch.exp(uniform(-0.5, 0.4, b, x))) * light
    x = x.clamp(0, 1) ** torch.exp(uniform(-0.3, 0.3, b, x))
    return (x + torch.randn_like(x) * uniform(0, 0.03, b, x)).clamp(0, 1)


# ==================================================================================================
# 3. Segmenter
# ==================================================================================================


class Encoder(nn.Module):
    """A frozen ImageNet network: x (B, 3, H, W) in [0, 1] -> features of the strides 2, 4 ... 32.

    "scratch" is no network and has no features. Raises DataError if weights cannot be loaded.
    """

    def __init__(self, name, pretrained=True):
        super().__init__()
        self.mean, self.std = 0.449, 0.226  # torchvision's, averaged over the channels
        stages = []
        if name == "efficientnet_lite0":
            f = data.efficientnet_lite0(pretrained).features
            stages = [f[:2], f[2:3], f[3:4], f[4:6], f[6:8]]
            self.mean, self.std = 0.5, 0.5
        elif name != "scratch":
            try:
                net = models.get_model(name, weights="DEFAULT" if pretrained else None)
            except Exception as error:  # of the download, the hash check or the file: of any type
                why = f"ImageNet weights could not be loaded ({error})"
                raise DataError(f"--encoder {name}: {why}; or use --encoder scratch") from error
            stem = nn.Sequential(net.conv1, net.bn1, net.relu)
            first = nn.Sequential(net.maxpool, net.layer1)
            stages = [stem, first, net.layer2, net.layer3, net.layer4]
        self.stages = nn.ModuleList(stages)
        self.eval().requires_grad_(False)
        self.channels = [h.shape[1] for h in self(torch.zeros(1, 3, 32, 32))]

    def forward(self, x):
        h, features = (x - self.mean) / self.std, []
        for stage in self.stages:
            h = stage(h)
            features.append(h)
        return features


def convolutions(c_in, c_out, stride=1):
    """Two 3 x 3 convolutions, each with GroupNorm and SiLU; the first one has the stride."""
    layers = []
    for c, s in ((c_in, stride), (c_out, 1)):
        layers += [nn.Conv2d(c, c_out, 3, s, padding=1), nn.GroupNorm(8, c_out), nn.SiLU()]
    return nn.Sequential(*layers)


class Segmenter(nn.Module):
    """f: images x (B, 3, H, W) in [0, 1] and their features -> logits (B, 1, H, W).

    channels: of the features of a frozen encoder; [] if the segmenter has to learn its own.
    """

    def __init__(self, channels):
        super().__init__()
        self.down = nn.ModuleList()
        if not channels:
            channels = [16, 24, 32, 48]  # at the strides 2, 4, 8, 16
            self.down.append(convolutions(12, 16))
            self.down.extend(convolutions(a, b, 2) for a, b in itertools.pairwise(channels))
        *skips, c = channels
        self.up = nn.ModuleList()
        for skip, width in zip(reversed(skips), [64, 48, 32, 24][-len(skips) :], strict=True):
            self.up.append(convolutions(c + skip, width))
            c = width
        self.head = nn.Conv2d(c, 4, 3, padding=1)

    def forward(self, x, features):
        if self.down:
            h, features = F.pixel_unshuffle(4 * x - 2, 2), []  # (B, 12, H/2, W/2)
            for layer in self.down:
                h = layer(h)
                features.append(h)
        *skips, h = features
        for up, skip in zip(self.up, reversed(skips), strict=True):
            h = up(torch.cat([F.interpolate(h, skip.shape[2:]), skip], 1))
        return F.pixel_shuffle(self.head(h), 2).float()


def segmenter_loss(net, x, features, mask):
    """Cross-entropy plus soft Dice of masks (B, 1, H, W)."""
    logits = net(x, features)
    p = logits.sigmoid()
    overlap = (2 * (p * mask).sum((1, 2, 3)) + 1) / (p.sum((1, 2, 3)) + mask.sum((1, 2, 3)) + 1)
    return F.binary_cross_entropy_with_logits(logits, mask) + 1 - overlap.mean()


@torch.no_grad()
def segment(nets, stage, img, args):
    """Probabilities (B, 1, H, W) of images uint8 (B, 3, H, W) by the segmenter of a stage."""
    x = img.float() / 255
    features = nets["encoder"](x)  # in float32
    with autocast(args):
        return nets[stage](x, features).sigmoid()


# ==================================================================================================
# 4. Mask autoencoder
# ==================================================================================================


class Autoencoder(nn.Module):
    """Mask encoder E: (B, 1, H, W) in [0, 1] -> latent (B, 8, H/4, W/4); decoder G: to logits."""

    def __init__(self, width=48):
        super().__init__()
        conv, act, c = partial(nn.Conv2d, kernel_size=3, padding=1), nn.SiLU(), PATCH**2
        down, up = nn.PixelUnshuffle(PATCH), nn.PixelShuffle(PATCH)
        self.encoder = nn.Sequential(down, conv(c, width), act, conv(width, LATENT_CHANNELS))
        layers = conv(LATENT_CHANNELS, width), act, conv(width, width), act, conv(width, c), up
        self.decoder = nn.Sequential(*layers)

    def encode(self, mask):
        return self.encoder(2 * mask - 1).float()

    def decode(self, z):
        return self.decoder(z).float()

    def forward(self, mask):
        """The latent, and the logits decoded from it after adding noise; for training."""
        z = self.encode(mask)
        return z, self.decode(z + 0.05 * torch.randn_like(z))


def autoencoder_loss(net, mask):
    """Reconstruct masks (B, 1, H, W) from noisy latents of about zero mean and unit variance."""
    z, logits = net(mask)
    unit = z.mean().square() + (z.std() - 1).square()
    return F.binary_cross_entropy_with_logits(logits, mask) + 0.1 * unit


def corrupt(p):
    """Give masks p (B, 1, H, W) in [0, 1] the errors of a bad segmenter."""
    b, blur = len(p), nn.AvgPool2d(7, 1, 3, count_include_pad=False)
    # The mask is blurred to a slope, 13 px wide, from 1 inside to -1 outside. Shifting the slope
    # moves the border: evenly by up to 3 px, and in waves by up to 3 and 2 px (std). A shift
    # beyond 1 or -1 adds or erases whole regions.
    shift = uniform(-0.7, 0.7, b, p) + uniform(0, 0.6, b, p) * smooth_noise(b, 4, p)
    shift = shift + uniform(0, 0.45, b, p) * smooth_noise(b, 8, p)
    slope = 2 * blur(blur(p)) - 1 + shift
    # More false blobs, in up to 29 % of the masks, and holes, in up to 33 %.
    blobs = uniform(-3, 1.2, b, p).clamp(min=0) * (1.3 * smooth_noise(b, 6, p) - 0.8)
    holes = uniform(-3, 1.5, b, p).clamp(min=0) * (1.3 * smooth_noise(b, 5, p) - 0.6)
    slope = torch.where(blobs > 0, torch.maximum(slope, blobs), slope)
    slope = torch.where(holes > 0, torch.minimum(slope, -holes), slope)
    return torch.sigmoid(slope * uniform(2, 12, b, p))  # from unsure to nearly hard


# ==================================================================================================
# 5. Guided denoiser
# ==================================================================================================

# Linear betas 1e-4 .. 0.02; ALPHA_BAR[t] is the share of signal variance left after step t.
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0).float()


def add_noise(x0, t, eps):
    """Add noise eps to x0, both (B, C, H, W), at step t, int64 (B,) in 0..T-1. Returns xt."""
    a = ALPHA_BAR.to(x0.device)[t][:, None, None, None]  # (B, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * eps  # Eq. 1 [Ho 2020]


class Block(nn.Module):
    """Two 3 x 3 convolutions with a skip connection, modulated by an embedding (B, c_emb)."""

    def __init__(self, c_in, c_out, c_emb, dropout=0.1):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.film = nn.Linear(c_emb, 2 * c_out)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # at the start, a block is nearly its skip

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)  # (B, C, 1, 1) each
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.skip(x) + self.conv2(self.dropout(h))


def make_guide(x, p, features):
    """The guide c (B, C', h, w) of images x (B, 3, H, W) in [0, 1] and their labels p (B, 1, H, W).

    It holds both, and the features of strides 4, 8 and 16; those of each stride are normalised to
    mean 0 and std 1 in each image.
    """
    # The pixels of a patch become the channels of the latent that lies there.
    parts = [F.pixel_unshuffle(torch.cat([4 * x - 2, 2 * p - 1], 1), PATCH)]  # (B, 64, h, w)
    for h in features[1:4]:
        h = F.interpolate(h, parts[0].shape[2:], mode="bilinear")
        parts.append(F.group_norm(h, 1))
    return torch.cat(parts, 1).float()


class Denoiser(nn.Module):
    """g(zt, t, c) -> x0_hat: noisy latents (B, C, h, w), t (B,) or a number, the guide c or zeros.

    channels: of the encoder's features; see make_guide.
    """

    def __init__(self, channels, width=32):
        super().__init__()
        c_emb, c_guide = 4 * width, 4 * PATCH**2 + sum(channels[1:4])
        self.time = nn.Sequential(nn.Linear(64, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.stem = nn.Conv2d(LATENT_CHANNELS + c_guide, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width, width, c_emb) for _ in range(4))
        self.norm = nn.GroupNorm(8, width)
        self.head = nn.Conv2d(width, LATENT_CHANNELS, 3, padding=1)
        nn.init.zeros_(self.head.weight)

    def forward(self, zt, t, c):
        t = torch.as_tensor(t, device=zt.device).expand(len(zt))
        freq = torch.exp(-math.log(1e4) * torch.arange(32, device=zt.device) / 32)
        phase = t.float()[:, None] * freq  # (B, 32)
        emb = F.silu(self.time(torch.cat([phase.sin(), phase.cos()], 1)))
        h = self.stem(torch.cat([zt, c], 1))
        for block in self.blocks:
            h = block(h, emb)  # (B, width, h, w)
        v = self.head(F.silu(self.norm(h))).float()
        a = ALPHA_BAR.to(zt.device)[t][:, None, None, None]
        # The network predicts v, so x0_hat tends to zt as t goes to 0, where calibration starts.
        return a.sqrt() * zt - (1 - a).sqrt() * v  # Eq. 2 [Salimans and Ho 2022]


def denoiser_loss(net, zt, t, c, z0):
    """Squared error of z0, weighted nearly to that of v (Eq. 2); 0.02 limits it near t = 0."""
    a = ALPHA_BAR.to(z0.device)[t][:, None, None, None]
    return ((net(zt, t, c) - z0).square() / (1 - a + 0.02)).mean()  # Eq. 3 [ours]


# ==================================================================================================
# 6. Calibration of pseudo-labels
# ==================================================================================================


def ddim_step(zt, x0_hat, t, t_next):
    """One deterministic DDIM step of latents zt (B, C, h, w) from t up or down to t_next, ints."""
    a, a_next = ALPHA_BAR[t].item(), ALPHA_BAR[t_next].item()
    eps_hat = (zt - math.sqrt(a) * x0_hat) / math.sqrt(1 - a)
    return math.sqrt(a_next) * x0_hat + math.sqrt(1 - a_next) * eps_hat  # Eq. 4 [Song 2021]


@torch.no_grad()
def calibrate(autoencoder, denoiser, p0, c):
    """Calibrate labels p0 (B, 1, H, W) by the diffusion, guided by c (B, C', h, w).

    Returns (B, 4, H, W): x0_hat, decoded, at the times 400, 300 and 200, and p1.
    """
    z, unguided, states = autoencoder.encode(p0), torch.zeros_like(c), []  # z (B, C, h, w)
    for t, t_next in itertools.pairwise(TIMES):  # up: DDIM inversion
        z = ddim_step(z, denoiser(z, t, unguided), t, t_next)
    for t, t_next in itertools.pairwise(TIMES[::-1]):  # and down
        x0_hat = denoiser(z, t, c)
        z = ddim_step(z, x0_hat, t, t_next)
        states.append(x0_hat if t_next else z)
    return torch.cat([autoencoder.decode(z).sigmoid() for z in states], 1)


def calibrate_labels(nets, img, p0, args):
    """calibrate() for labels p0 of images uint8 (B, 3, H, W)."""
    x = img.float() / 255
    c = make_guide(x, p0, nets["encoder"](x))
    with autocast(args):
        return calibrate(nets["autoencoder"], nets["denoiser"], p0, c)


# ==================================================================================================
# 7. Training
# ==================================================================================================


class Shared(NamedTuple):
    """What all training stages share. A stage is the training of one network."""

    folder: Path
    fingerprints: dict  # of the data and the exemplar
    nets: dict  # {stage: network}, and the encoder
    seconds: dict  # {stage: seconds}


def autocast(args):
    """bfloat16 autocast on the run's device if --amp is on."""
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.amp == "on")


@torch.no_grad()
def update_ema(ema, net, decay):
    """Move the weights of ema towards net's; buffers, such as running means, are copied."""
    for old, new in zip(ema.parameters(), net.parameters(), strict=True):
        old.lerp_(new, 1 - decay)
    for old, new in zip(ema.buffers(), net.buffers(), strict=True):
        old.copy_(new)


def make_network(stage, encoder, device):
    """A new network for a stage."""
    if stage == "autoencoder":
        net = Autoencoder()
    elif stage == "denoiser":
        net = Denoiser(encoder.channels)
    else:
        net = Segmenter(encoder.channels)
    return net.to(device, memory_format=torch.channels_last)


def learning_rate(step, steps):
    """Share of the peak rate at a step: a linear warm-up over a tenth of the steps, at most 100,
    then half a cosine."""
    warm_up = min(100, max(1, steps // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))


def train(shared, stage, steps, sample, loss_function, args, start=None):
    """Train a new network, or a copy of start, and put its EMA into shared.nets.

    sample() returns a batch, and loss_function(net, *batch) its loss. last_<stage>.pt is all that
    --resume needs. Each stage has its own seed, so that it does not depend on what ran before it.
    """
    file = shared.folder / f"last_{stage}.pt"
    torch.manual_seed(int(data.fingerprint(args.seed, stage)[:8], 16))
    encoder = shared.nets["encoder"]
    net = copy.deepcopy(start) if start else make_network(stage, encoder, args.device)
    net.train()
    ema = copy.deepcopy(net).eval()
    opt = torch.optim.AdamW(net.parameters(), args.lr, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, partial(learning_rate, steps=steps))
    parts = {"net": net, "ema": ema, "opt": opt, "scheduler": scheduler}
    state = {"step": 0, "seconds": 0.0}
    state |= data.resume(file, METHOD, args, shared.fingerprints, parts)
    forward = torch.compile(net) if args.compile else net
    began = time.time() - state["seconds"]
    bar = data.progress(range(state["step"], steps), stage, steps, state["step"])
    for step in bar:
        batch = sample()  # in float32: bf16 would round the grids by up to a quarter pixel
        with autocast(args):
            loss = loss_function(forward, *batch)
        if not loss.isfinite():
            raise DataError(f"{stage}: loss is {loss:g} at step {step}: lower --lr, or --amp off")
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        scheduler.step()
        update_ema(ema, net, min(0.99, (step + 1) / (step + 11)))  # the first steps average less
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            state = {"step": step + 1, "seconds": time.time() - began}
            data.save_checkpoint(file, METHOD, args, shared.fingerprints, parts, **state)
    shared.nets[stage] = ema
    shared.seconds[stage] = round(state["seconds"], 1)


def sample_pairs(expansion, encoder, args, pool=None):
    """A batch for a segmenter: images, their features and masks (B, 1, H, W).

    pool: unlabelled images uint8 (N, 3, H, W) and their pseudo-labels (N, 1, H, W); if given, only
    about a sixth of the batch is made from the exemplar.
    """
    n = args.batch_size * 5 // 6 if pool else 0
    x, m = expansion(args.batch_size - n)
    if pool:
        images, labels = pool
        i = torch.randint(len(images), (n,)).to(images.device)
        x_u, m_u = data.augment(images[i].to(x) / 255, labels[i].to(x), flips=not args.anatomy)
        x, m = torch.cat([x, x_u]), torch.cat([m, m_u])
    x = strong_view(x)
    return x, encoder(x), m


def sample_masks(expansion, b):
    """A batch for the autoencoder: masks (2 b, 1, H, W), half of them corrupted."""
    _, m = expansion(b)
    return [torch.cat([m, corrupt(m)])]


@torch.no_grad()
def sample_latents(expansion, nets, args):
    """A batch for the denoiser: zt (B, 8, h, w), t (B,), the guide c, and its target z0."""
    b = args.batch_size
    x, m = expansion(b)
    x = strong_view(x)
    # On the pairs that it was trained on, the segmenter is too accurate: change the colours more.
    changed = strong_view(strong_view(x))
    changed_features = nets["encoder"](changed)
    with autocast(args):
        p = nets["first_segmenter"](changed, changed_features).sigmoid()
        z0 = nets["autoencoder"].encode(m)
    p = torch.where(uniform(0, 1, b, x) < 0.5, p, corrupt(p))
    c = make_guide(x, p, nets["encoder"](x))
    c = c * (uniform(0, 1, b, x) > 0.15)  # 15 % unguided, as in DDIM inversion
    t = torch.randint(T, (b,)).to(x.device)
    return add_noise(z0, t, torch.randn_like(z0)), t, c, z0


def make_labels(row, nets, stage, prior, img, args):
    """Pseudo-labels of a row (B, 1, H, W) in [0, 1] for images uint8 (B, 3, H, W).

    stage: of the segmenter that predicts p0. prior: an ImagePrior; it moves masks to the colour
    edges of their images and makes them convex (section 9).
    """
    p = segment(nets, stage, img, args)  # p0
    if row in CALIBRATED:
        p = calibrate_labels(nets, img, p, args)[:, -1:]  # p1
    return apply_prior(prior, img, p) if row in WITH_PRIOR else p


def train_rows(shared, expansion, true_masks, prior, args):
    """Train the segmenters of --method, in rounds of labelling and training.

    All start from the same segmenter and take equally many steps. true_masks: of the unlabelled
    images, (N, 1, H, W), for full_supervision, or None. Returns the pseudo-labels of the first
    round, {row: (n, 1, H, W)}, of the images of pool_index.
    """
    nets, images, first_labels = shared.nets, expansion.images, {}
    for row in [row for row in TRAINED if row in args.method]:
        stage, pool = "first_segmenter", None
        for r in range(1, args.rounds + 1):
            if row in PSEUDO_LABELLED:
                index = pool_index(len(images), r, args.seed)
                label = partial(make_labels, row, nets, stage, prior, args=args)
                labels = batched(label, args.device, images[index])
                pool = images[index], (labels > 0.5).to(images.device)
                first_labels.setdefault(row, labels)
            if row == "full_supervision":
                pool = images, true_masks.to(images.device)
            net = nets[stage]
            stage = row if r == args.rounds else f"{row}_{r}"
            sample = partial(sample_pairs, expansion, nets["encoder"], args, pool)
            train(shared, stage, args.round_steps, sample, segmenter_loss, args, net)
    return first_labels


def pool_index(n, r, seed):
    """Indices of the images, of n, that are labelled in round r, drawn anew in each round."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + r))[:POOL]


def batched(function, device, *tensors):
    """Apply a function to chunks of tensors (N, ...) on a device; its outputs, on the CPU."""
    chunks = zip(*(x.split(64) for x in tensors), strict=True)
    return torch.cat([function(*(x.to(device) for x in chunk)).cpu() for chunk in chunks])


# ==================================================================================================
# 8. Evaluation, prediction and figure
# ==================================================================================================


def overlap_metrics(pred, mask):
    """Metrics of binary pred and mask (B, 1, H, W): {metric: (B,)}; 1 if both are empty."""
    pred, mask = pred.flatten(1).float(), mask.flatten(1).float()
    inter, p, m = (pred * mask).sum(1), pred.sum(1), mask.sum(1)

    def ratio(x, y):
        return torch.where(y > 0, x / y.clamp(min=1), (p + m == 0).float())

    out = {"dice": ratio(2 * inter, p + m), "iou": ratio(inter, p + m - inter)}
    return out | {"precision": ratio(inter, p), "recall": ratio(inter, m)}


def consensus(masks):
    """Majority of raters, (B, R, H, W) -> (B, 1, H, W) bool; a tie counts as lesion."""
    return masks.float().mean(1, keepdim=True) >= 0.5


def crf_refine(p, img):
    """Refine probabilities p (B, 1, H, W) of images uint8 (B, 3, H, W) by the dense CRF."""
    sxy = 10 * img.shape[3] / 64  # the bilateral kernel alone; its widths and weight are ours
    crf = DenseCRF(sxy_bilateral=sxy, srgb=8, compat_bilateral=3, compat_gaussian=0)
    return crf(unary_from_softmax(torch.cat([1 - p, p], 1)), img)[:, 1:]


def dice(pred, mask):
    """Dice (B,) of binary pred and mask (B, 1, H, W)."""
    return overlap_metrics(pred, mask)["dice"]


def evaluate(nets, test, prior, args):
    """Test rows {row: {metric: number}} and final masks {row: (N, 1, H, W) bool}.

    dice_prior: Dice with the image prior applied to the mask. All other metrics are without it. The
    final masks are with the prior if the row uses it.
    """
    truth, rows, masks = consensus(test.masks), {}, {}
    for row in [row for row in ROWS if row in args.method]:
        stage = "caudo_diff_prior" if row == "caudo_diff_crf" else row
        p = batched(partial(segment, nets, stage, args=args), args.device, test.images)
        if row == "caudo_diff_crf":
            p = batched(crf_refine, args.device, p, test.images)
        with_prior = batched(partial(apply_prior, prior), args.device, test.images, p) > 0.5
        metrics = {name: v.mean().item() for name, v in overlap_metrics(p > 0.5, truth).items()}
        dice_prior = dice(with_prior, truth).mean().item()
        rows[row] = {"dice": metrics["dice"], "dice_prior": dice_prior, **metrics}
        masks[row] = with_prior if row in WITH_PRIOR else p > 0.5
    return rows, masks


def draw_calibration(nets, test, row, pred, args, path):
    """Draw the best, median and worst two test images by Dice of pred, the final masks of row.

    p0, the trajectory and p1, if row is calibrated, are those of the first round.
    """
    truth = consensus(test.masks)
    order = dice(pred, truth).argsort(descending=True).tolist()
    half = (len(order) - 1) // 2
    picks = [("best", i) for i in order[:2]]
    picks += [("median", i) for i in order[half : half + 2]]
    picks += [("worst", i) for i in order[-2:]]
    rows, titles = [], ["image and truth", "p0"]
    if row in CALIBRATED:
        titles += [*(f"x0_hat, t = {t}" for t in reversed(TIMES[2:])), "p1"]
    for name, i in picks:
        img, photo = test.images[i, None].to(args.device), test.images[i].permute(1, 2, 0).numpy()
        maps = segment(nets, "first_segmenter", img, args)  # p0 (1, 1, H, W)
        if row in CALIBRATED:
            maps = torch.cat([maps, calibrate_labels(nets, img, maps, args)], 1)
        maps = maps[0].cpu()  # (1 or 5, H, W)
        pictures = [data.outline(photo, truth[i, 0]), *(data.colour_map(p) for p in maps)]
        pictures.append(data.outline(photo, pred[i, 0], (255, 230, 0)))
        masks = torch.cat([maps[:, None] > 0.5, pred[i, None]])  # (2 or 6, 1, H, W)
        captions = ["", *(f"Dice {d:.2f}" for d in dice(masks, truth[i, None]))]
        rows.append((f"{name}\n{test.ids[i][-7:]}", list(zip(pictures, captions, strict=True))))
    data.draw_sheet([*titles, "final mask"], rows, path)


def segment_photo(photo, nets, row, prior, args):
    """Segment a photo: pictures of its own size, and the share of it that the mask covers."""
    img = photo.small[None].to(args.device)
    p = segment(nets, row, img, args)  # (1, 1, H, W)
    mask = apply_prior(prior, img, p) if row in WITH_PRIOR else p
    p, mask = data.enlarge(torch.cat([p, mask], 1)[0].cpu(), photo)  # (h, w) each
    mask = mask > 0.5
    pictures = {
        "mask": mask.byte().numpy() * 255,
        "overlay": data.outline(photo.img.permute(1, 2, 0).numpy(), mask, (255, 230, 0)),
        "probability": data.colour_map(p),
    }
    return pictures, {"share of the image": f"{mask.float().mean():.4f}"}


# ==================================================================================================
# 9. Beyond the paper: the image prior
# ==================================================================================================
# Two assumptions about a mask that need no training: its outline follows colour edges of its image,
# and it is one convex piece. Each is used only if the exemplar and the first labels satisfy it.


class ImagePrior(NamedTuple):
    """Which parts of the prior are used."""

    colour_edges: bool
    convex_piece: bool


def contrast_map(x, p):
    """Contrast of each pixel of x (B, 3, H, W): is its colour that inside the mask p or outside?

    Fisher's linear discriminant of the colours inside and outside of p (B, 1, H, W), fitted to each
    image: (B, 1, H, W) in -3..3, about 1 at the mean colour inside and -1 at that outside.
    """
    y, inside = log_colours(x.float()).flatten(2), p.float().flatten(2)  # (B, 3, N), (B, 1, N)
    means, cov = [], 1e-3 * torch.eye(3, device=y.device)  # 3 % noise, for grey images
    for w in (inside + 1e-4, 1 - inside + 1e-4):
        mean = (y * w).sum(2, keepdim=True) / w.sum(2, keepdim=True)  # (B, 3, 1)
        d = (y - mean) * w.sqrt()
        cov = cov + (d[:, :, None] * d[:, None]).mean(3)  # (B, 3, 3) within the classes
        means.append(mean)
    normal = torch.linalg.solve(cov, means[0] - means[1])  # (B, 3, 1)
    distance = ((means[0] - means[1]) * normal).sum(1, keepdim=True)  # Mahalanobis, squared
    score = (normal * (y - (means[0] + means[1]) / 2)).sum(1, keepdim=True)  # (B, 1, N)
    score = 2 * score / (distance + 0.3)  # Eq. 5 [Fisher 1936]; 0.3: near 0 if both are alike
    return score.clamp(-3, 3).view_as(p)


def follow_colour_edges(x, p):
    """Move masks p (B, 1, H, W) to the colour edges of images x (B, 3, H, W); all in [0, 1]."""
    contrast = F.avg_pool2d(contrast_map(x, p), 3, 1, 1, count_include_pad=False)
    logits = torch.logit(p.float(), 1e-4).clamp(-6, 6)
    return torch.sigmoid(logits + 4 * contrast)  # Eq. 6 [ours]; 4 * contrast: within +-12


def convex_piece(p):
    """Convex hull of the connected component of p > 1/2 that is thickest near the centre.

    p (B, 1, H, W) in [0, 1] -> (B, 1, H, W) bool. 24 half-planes make up the hull.
    """
    h, w = p.shape[2:]
    y = torch.linspace(-1, 1, h, device=p.device)[:, None]
    x = torch.linspace(-1, 1, w, device=p.device)
    mask, near = (p > 0.5).float(), torch.exp(-x * x - y * y)  # near the centre; 1/e at the sides
    thick = F.avg_pool2d(p, w // 24 * 2 + 1, 1, w // 24)  # in a window of a 12th of the width
    start = F.one_hot((thick * near * mask).flatten(1).argmax(1), h * w)
    piece, before = start.view_as(mask) * mask, torch.zeros_like(mask)
    while not piece.equal(before):  # it grows from its start as far as the mask does
        before, piece = piece, F.max_pool2d(piece, 3, 1, 1) * mask
    hull = torch.ones_like(mask, dtype=torch.bool)
    for angle in torch.arange(24) * (math.pi / 12):
        along = angle.cos() * x * (w / h) + angle.sin() * y  # (H, W)
        # (B, 1, 1, 1); if p is empty, -inf, and the hull is empty too
        reach = along.where(piece > 0, -math.inf).amax((2, 3), keepdim=True)
        hull = hull & (along <= reach)  # Eq. 7 [ours]
    return hull


def apply_prior(prior, img, p):
    """Apply the prior to masks p (B, 1, H, W) in [0, 1] of images uint8 (B, 3, H, W)."""
    if prior.colour_edges:
        x = img.float() / 255
        p = follow_colour_edges(x, follow_colour_edges(x, p))
    return convex_piece(p).float() if prior.convex_piece else p


def choose_prior(img, mask, images, labels, device):
    """Enable each part of the prior that changes the exemplar's mask and the first labels little.

    img: uint8 (3, H, W). mask: bool (1, H, W). images: uint8 (N, 3, H, W). labels: predicted by
    the first segmenter, (N, 1, H, W) in [0, 1].
    """
    enabled = []
    for prior in (ImagePrior(True, False), ImagePrior(False, True)):
        apply = partial(batched, partial(apply_prior, prior), device)
        on_exemplar = dice(apply(img[None], mask[None].float()) > 0.5, mask[None])
        on_labels = dice(apply(images, labels) > 0.5, labels > 0.5)
        # Chosen so that colour edges are on for lesions, and off for lungs, polyps and ultrasound.
        enabled.append(on_exemplar.item() > 0.85 and on_labels.median().item() > 0.8)
    return ImagePrior(*enabled)


# ==================================================================================================
# 10. Main
# ==================================================================================================


def load(split, args, images_only=False):
    """A split at --size, with --quick its first 24 images."""
    root, limit = args.data_root, 24 if args.quick else None
    more = {"images_only": images_only, "workers": args.num_workers}
    return data.load_segmentation(args.data, root, split, args.size, limit, **more)


def load_test(args):
    """The test images; None if they have no masks."""
    return load("test", args) if data.has_masks(args.data, args.data_root, "test") else None


def train_all(test, args, folder):
    """Choose the exemplar and train all stages; writes best.pt."""
    has_masks = data.has_masks(args.data, args.data_root, "train")
    train_set = load("train", args, images_only=not has_masks)
    if len(train_set) < 2:
        raise DataError(f"{args.data_root}: no unlabelled image beside the exemplar; add some")
    i = choose_exemplar(train_set, args.exemplar)
    exemplar, others = train_set.ids[i], [k for k in range(len(train_set)) if k != i]
    mask = data.load_mask(args.data, args.data_root, "train", exemplar, args.size)  # (1, H, W)
    if mask.float().mean() > 0.9:
        why = "its mask covers over 90 % of it; is it inverted? The object is white"
        raise DataError(f"--exemplar {exemplar}: {why}")
    fingerprints = {"train": train_set.fingerprint}
    fingerprints["exemplar"] = data.fingerprint(exemplar, mask.tolist())
    if test:
        fingerprints["test"] = test.fingerprint
    encoder = Encoder(args.encoder).to(args.device, memory_format=torch.channels_last)
    if not args.resume:
        data.prepare_folder(folder)
    shared = Shared(folder, fingerprints, {"encoder": encoder}, {})
    images = data.to_device_if_it_fits(train_set.images[others], args.device)
    expansion = Expansion(train_set.images[i], mask, images, args.anatomy, args.device)

    sample = partial(sample_pairs, expansion, encoder, args)
    train(shared, "first_segmenter", args.steps, sample, segmenter_loss, args)
    index = pool_index(len(others), 1, args.seed)
    label = partial(segment, shared.nets, "first_segmenter", args=args)
    first = batched(label, args.device, images[index])
    prior = choose_prior(train_set.images[i], mask, images[index], first, args.device)
    for part, enabled in prior._asdict().items():
        print(f"image prior: {part.replace('_', ' ')} {'on' if enabled else 'off'}")
    if any(row in CALIBRATED for row in args.method):
        sample = partial(sample_masks, expansion, args.batch_size)
        train(shared, "autoencoder", 2 * args.steps, sample, autoencoder_loss, args)
        sample = partial(sample_latents, expansion, shared.nets, args)
        train(shared, "denoiser", args.steps, sample, denoiser_loss, args)
    truth = consensus(train_set.masks[others]) if has_masks else None
    labels = train_rows(shared, expansion, truth, prior, args)

    more = {"exemplar": exemplar, "n_unlabelled": len(others), "prior": prior._asdict()}
    if has_masks:
        scores = {row: dice(p > 0.5, truth[index]).mean().item() for row, p in labels.items()}
        more["pseudo_labels"] = {row: {"dice": score} for row, score in scores.items()}
    kept = ["encoder", "first_segmenter", "autoencoder", "denoiser", *TRAINED]  # of the last round
    nets = shared.nets
    more["nets"] = {stage: nets[stage].state_dict() for stage in kept if stage in nets}
    more["seconds"] = shared.seconds
    data.save_checkpoint(folder / "best.pt", METHOD, args, fingerprints, **more)


def load_networks(weights, args):
    """The networks of a checkpoint, {stage: network}, and the encoder."""
    encoder = Encoder(args.encoder, pretrained=False)
    nets = {"encoder": encoder.to(args.device, memory_format=torch.channels_last)}
    for stage, state in weights.items():
        if stage != "encoder":
            nets[stage] = make_network(stage, encoder, args.device).eval()
        nets[stage].load_state_dict(state)
    return nets


def run(args):
    """Train, then evaluate and draw; or only evaluate; or predict."""
    folder = data.run_folder(METHOD, args)
    best = args.checkpoint or folder / "best.pt"
    test = None if args.predict else load_test(args)
    if not (args.predict or args.eval_only):
        train_all(test, args, folder)
    state = data.load_checkpoint(best, METHOD, {"test": test.fingerprint} if test else None)
    nets = load_networks(state["nets"], args)
    prior = ImagePrior(**state["prior"])
    chosen = [row for row in TRAINED if row in args.method and row != "full_supervision"]
    row = chosen[-1] if chosen else "full_supervision"
    if args.predict:
        print(f"predictions of {row} go to {folder / 'predictions'}")
        segment_one = partial(segment_photo, nets=nets, row=row, prior=prior, args=args)
        data.predict_images(args.predict, args.size, folder / "predictions", best, segment_one)
        return
    if not test:
        print(f"{args.data_root}: no masks of test images, so there is no table.")
        print(f"To segment images: --predict PATH --checkpoint {best}")
        return
    rows, masks = evaluate(nets, test, prior, args)
    data.print_table(rows)
    names = ["exemplar", "n_unlabelled", "prior", "seconds", "pseudo_labels"]
    more = {"n_images": len(test)} | {name: state[name] for name in names if name in state}
    data.write_result(folder / "result.json", METHOD, args, rows, **more)
    figure = folder / "calibration.png"
    draw_calibration(nets, test, row, masks[row], args, figure)
    print(f"\n{len(test)} test images, exemplar {state['exemplar']}. Open {figure}")


def main(argv=None):
    """Run the command line; every foreseeable error is one line and exit status 2."""
    with data.one_line_errors("caudo_diff.py"):
        run(parse_args(argv))


if __name__ == "__main__":
    main()
