"""DenseCRF against brute force; nothing but the repository and a CPU is needed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from crf import DenseCRF, unary_from_labels, unary_from_softmax

SMALL = {"sxy_gaussian": 2.0, "sxy_bilateral": 12.0, "srgb": 20.0}


def case(b=1, labels=2, h=20, w=28, channels=3):
    """Smooth random unary (B, L, H, W) and image (B, C, H, W) of whole grey levels."""
    random = torch.rand(b, labels + channels, 5, 6, generator=torch.Generator().manual_seed(h))
    smooth = F.interpolate(random, (h, w), mode="bilinear")
    return 4 * smooth[:, :labels], (255 * smooth[:, labels:]).round()


def brute_force(unary, image, iterations, sg, wg, sb, srgb, wb):
    """Mean field in float64 on one image, (L, H, W) and (C, H, W), with full N x N matrices."""
    u, rgb = (t.double().flatten(1).numpy() for t in (unary, image))
    yx, pairwise, q = np.indices(unary.shape[1:]).reshape(2, -1), 0 * u.T @ u, 0 * u
    for weight, f in ((wg, yx / sg), (wb, np.concatenate([yx / sb, rgb / srgb]))):
        k = np.exp(-0.5 * ((f[:, :, None] - f[:, None]) ** 2).sum(0))
        pairwise += weight * k / np.sqrt(np.outer(k.sum(0), k.sum(0)))
    for _ in range(1 + iterations):  # the first gives softmax(-unary)
        q = np.exp(-u + q @ pairwise)
        q /= q.sum(0)
    return torch.from_numpy(q).view(unary.shape).float()


@pytest.mark.parametrize("c, n, wg, wb", [(1, 5, 2, 3), (3, 3, 2, 0), (3, 1, 0, 3), (3, 9, 0, 0)])
def test_exact_equals_brute_force(c, n, wg, wb):
    unary, image = case(labels=3, channels=c)
    q = DenseCRF(n, 2.0, wg, 12.0, 20.0, wb, kernel="exact")(unary, image)[0]
    expected = brute_force(unary[0], image[0], n, 2.0, wg, 12.0, 20.0, wb)
    torch.testing.assert_close(q, expected, atol=2e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:a single label")
@pytest.mark.parametrize("labels, h, w", [(1, 1, 33), (2, 40, 56), (5, 33, 21), (3, 1, 1)])
def test_lattice_is_near_exact(labels, h, w):
    unary, image = case(2, labels, h, w)
    q0, near, far = F.softmax(-unary, 1), DenseCRF(**SMALL), DenseCRF(kernel="exact", **SMALL)
    (_, a), (_, b) = near.messages(image)[1], far.messages(image)[1]
    assert (a(q0) - b(q0)).norm() < 0.03 * b(q0).norm()
    assert (near(unary, image) - far(unary, image)).abs().mean() < 0.015
    torch.testing.assert_close(near(unary, image).sum(1), torch.ones(2, h, w))


@pytest.mark.parametrize("kernel, dtype", [("lattice", torch.half), ("exact", torch.bfloat16)])
def test_batch_types_and_autocast(kernel, dtype):
    crf, (unary, image) = DenseCRF(kernel=kernel, **SMALL), case(3, 3, 11, 17)
    q, single = crf(unary, image), [crf(unary[k : k + 1], image[k : k + 1]) for k in range(3)]
    torch.testing.assert_close(q, torch.cat(single), atol=1e-4, rtol=0)
    torch.testing.assert_close(q, crf(unary, image.byte()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = crf(unary.to(dtype), image)
    torch.testing.assert_close(q, crf(unary.to(dtype).float(), image))  # compares dtypes too


@pytest.mark.parametrize("kernel", ["lattice", "exact"])
def test_gradients_equal_finite_differences(kernel):
    unary, image = (t.double() for t in case(2, 2, 4, 5))
    crf = DenseCRF(2, compat_gaussian=0, kernel=kernel, trainable=True, **SMALL)

    def q(unary, gaussian, bilateral):
        weights = {"compat_gaussian": gaussian, "compat_bilateral": bilateral}
        return torch.func.functional_call(crf, weights, (unary, image))

    assert torch.autograd.gradcheck(q, (unary.requires_grad_(), *crf.double().parameters()))


def test_helpers():
    p = torch.tensor([0.0, 0.25, 1.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(unary_from_softmax(p.half(), 1e-3), -p.clamp(min=1e-3).log())
    p = (-unary_from_labels(torch.tensor([[[2, 255, -1]]]), 3, confidence=0.8)).exp()
    assert p[0, :, 0].T.flatten().tolist() == pytest.approx([0.1, 0.1, 0.8] + 6 * [1 / 3])


@pytest.mark.parametrize("labels, scale, words", [(2, 255, r"\[0, 1\]"), (1, 1, "single label")])
def test_likely_mistakes_are_warned_of(labels, scale, words):
    unary, image = case(labels=labels)
    with pytest.warns(UserWarning, match=words):
        DenseCRF()(unary, image / scale)


def test_bad_arguments_are_named():
    (u, i), crf = case(), DenseCRF()
    calls = [("kernel", DenseCRF, 5, 3, 3, 80, 13, 10, "fast"), ("iterations", DenseCRF, -1)]
    calls += [("sxy_gaussian", DenseCRF, 5, 0), ("srgb", DenseCRF, 5, 3, 3, 80, -13)]
    calls += [("H, W", crf, u, i[0]), ("H, W", crf, u, i[..., 1:]), ("255", crf, u, i - 256)]
    calls += [("unary", crf, u.where(u > 1, torch.nan), i), ("int", unary_from_labels, u, 2)]
    calls += [("logits", unary_from_softmax, u), ("conf", unary_from_labels, u[0].int(), 2, 1.0)]
    for match, function, *args in calls:
        with pytest.raises(ValueError, match=match):
            function(*args)
