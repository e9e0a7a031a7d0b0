"""Every part in docs/parts.md works when copied with the names and imports of its row."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

HOME = Path(__file__).parents[1]
ROWS = [
    row.split("|")[1:-1]
    for row in (HOME / "docs/parts.md").read_text("utf-8").splitlines()
    if "`" in row and row[0] == "|"
]
PARTS = {names[0]: names for names in ([cell.strip("` ") for cell in row] for row in ROWS)}


def source(tree, name):
    """The definition of a function, class or constant at the top level of a file."""
    for node in tree.body:
        targets = [x for target in getattr(node, "targets", []) for x in ast.walk(target)]
        if name in [getattr(node, "name", None), *(getattr(x, "id", None) for x in targets)]:
            return ast.unparse(node)
    raise KeyError(name)


def calls(part, tmp_path):
    """Call a part on small tensors; returns whether the result is as it should be."""
    img = torch.rand(2, 3, 16, 24)
    masks = (torch.rand(2, 4, 16, 24) > 0.5).float()
    if part.__name__ == "DenseCRF":
        q = part(2)(-torch.rand(2, 3, 16, 24).log(), 255 * img)
        return torch.allclose(q.sum(1), torch.ones(2, 16, 24))
    if part.__name__ == "UNet":
        return part(4, width=16)(img, torch.tensor([0, 9]), torch.tensor([0, 1])).shape[1] == 4
    if part.__name__ == "add_noise":
        return (part(img, torch.tensor([0, 999]), masks[:, :3])[1] - masks[1, :3]).abs().max() < 0.1
    if part.__name__ == "diffusion_difference":
        return part(img, img.flip(0)).shape == (2, 1, 16, 24)
    if part.__name__ == "diffseg_maps":
        difference, blend = part(lambda x, t, y: torch.cat([x, x[:, :1]], 1), img, 3, seed=0)
        return difference.max() == 0 and blend.shape == difference.shape == (2, 3, 16, 24)
    if part.__name__ == "ambiguity":
        return torch.equal(part(masks[:, :2]), 0.25 * (masks[:, 0] != masks[:, 1]))
    if part.__name__ == "fit_threshold":
        logits = torch.arange(-2.0, 2, 0.25).view(16, 1).expand(1, 16, 16)
        tiles = torch.tensor([[[0, 0, 1, 0.5], [0, 0.5, 1, 0.5]]])  # upper half, lower half
        return abs(part(logits, tiles, torch.tensor([[0, 2]]))) < 0.3
    if part.__name__ == "ged":
        return torch.allclose(part(masks, masks), torch.zeros(2), atol=1e-6)
    q, y = torch.tensor([[0.6, 0.4], [0.2, 0.8]]), torch.tensor([0, 1])
    if part.__name__ == "strong_augment":
        return part(img).shape == img.shape
    if part.__name__ == "update_thresholds":
        tau, p = part(0.5, torch.tensor([0.5, 0.5]), q, beta=0.5)
        return torch.allclose(tau, torch.tensor(0.6)) and p.allclose(torch.tensor([0.45, 0.55]))
    if part.__name__ == "class_thresholds":
        return part(0.8, torch.tensor([0.25, 0.75])).allclose(torch.tensor([0.8 / 3, 0.8]))
    if part.__name__ == "pseudo_label":
        labels, keep = part(q, torch.tensor([0.5, 0.9]))
        return torch.equal(labels, y) and keep.tolist() == [True, False]
    if part.__name__ == "align":
        return part(q, q.mean(0), torch.tensor([0.5, 0.5])).sum(1).allclose(torch.ones(2))
    if part.__name__ == "cam":
        return part(img, torch.eye(3), y, (32, 48), stride=2).shape == (2, 32, 48)
    if part.__name__ == "percent_map":
        return part(img[:, 0]).sum((1, 2)).allclose(torch.ones(2))
    if part.__name__ == "semantic_mix":
        boxes, maps = torch.tensor([[0, 0, 12, 8]]).expand(2, 4), torch.full((2, 16, 24), 1 / 384)
        mixed, rho_a, rho_b = part(img, img.flip(0), maps, maps, boxes, boxes)
        return mixed.shape == img.shape and (rho_a + rho_b).allclose(torch.ones(2))
    if part.__name__ == "hybrid_loss":
        ones = torch.ones(2)
        return part(q.log(), y, y, ones, 0 * ones).allclose(-q.amax(1).log())
    if part.__name__ == "propagate":
        return part(q.repeat(4, 1), torch.rand(8, 5), k=3).shape == (8, 2)
    if part.__name__ == "ddim_step":
        return torch.allclose(part(part(img, img / 2, 100, 400), img / 2, 400, 100), img, atol=1e-4)
    if part.__name__ == "Denoiser":
        z, c = torch.rand(2, 8, 4, 6), torch.rand(2, 69, 4, 6)
        return part([9, 1, 2, 2, 9])(z, 400, c).shape == z.shape
    if part.__name__ == "calibrate":
        autoencoder = SimpleNamespace(encode=torch.logit, decode=lambda z: z)
        p = 0.2 + 0.6 * img[:, :1]
        # a denoiser that finds the true mask, img, in the guide
        states = part(autoencoder, lambda z, t, c: c[:, :1].where(c.any(), z), p, torch.logit(img))
        return states.allclose(img[:, :1].expand(2, 4, -1, -1), atol=0.02)
    if part.__name__ == "Expansion":
        images = (255 * img.repeat(2, 1, 1, 1)).byte()
        x, m = part(images[0], masks[0, :1] > 0, images, anatomy=False, device="cpu")(6)
        return x.shape == (6, 3, 16, 24) and m.shape == (6, 1, 16, 24)
    if part.__name__ == "follow_colour_edges":
        return part(img, img[:, :1]).shape == (2, 1, 16, 24)
    if part.__name__ == "convex_piece":
        return part(torch.ones(2, 1, 16, 24)).all()
    if part.__name__ == "augment":
        return [x.shape for x in part(img, masks)] == [img.shape, masks.shape]
    if part.__name__ == "efficientnet_lite0":
        return part(pretrained=False)(img[:, :, :, :16].repeat(1, 1, 2, 2)).shape == (2, 1000)
    part(["title"], [("row", [(np.zeros((8, 8, 3), np.uint8), "caption")])], tmp_path / "sheet.png")
    return (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize("name", PARTS)
def test_a_part_works_alone(name, tmp_path):
    _, file, what, others, imports = PARTS[name]
    tree, namespace = ast.parse((HOME / file).read_text("utf-8")), {}
    others = re.findall(r"\w+", others)
    code = [source(tree, x) for x in (*others, name)]
    assert what and sum(x.islower() or x[-1].islower() for x in others) <= 5  # easy to copy
    assert not re.search(r"\bargs\b", code[-1])  # it takes tensors and numbers, not flags
    assert all(re.search(rf"\b{x}\b", "".join(code[i + 1 :])) for i, x in enumerate(others))
    exec("\n".join([*re.split("`, `", imports), *code]), namespace)
    assert calls(namespace[name], tmp_path)
