"""Every part in docs/parts.md works when copied with the names and imports of its row."""

import ast
import re
from pathlib import Path

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
