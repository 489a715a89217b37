import numpy as np
import pytest
import references
import torch

from opticam import fake_cam, grad_cam
from opticam.saliency import combine, saliency_map


@pytest.mark.parametrize("depth", [1, 4])
def test_grad_cam_agrees_with_the_loop_version(tiny, images, class_idx, depth):
    # after one convolution the gradient differs from place to place, and the maps have both signs
    saliency = grad_cam(tiny, images, class_idx, layer="features.0" if depth == 1 else "features")

    def head(features):
        return tiny.fc(tiny.features[depth:](features).mean((2, 3)))

    for b in range(2):
        features = tiny.features[:depth](images[b : b + 1])[0].detach().numpy()
        expected = references.grad_cam(features, head, int(class_idx[b]), 24, 32)
        np.testing.assert_allclose(saliency[b, 0], expected, rtol=0, atol=1e-8)


def test_grad_cam_of_pooling_and_a_linear_layer_has_the_weights_of_that_layer(tiny, images, class_idx):
    # y_c = sum_k W_ck mean A_k + b_c, so the mean gradient is W_ck/(h w): class activation maps by Zhou et al. 2016
    features = tiny.features(images)
    expected = saliency_map(combine(features, tiny.fc.weight[class_idx]), images.shape[-2:])
    saliency = grad_cam(tiny, images, class_idx, layer="features")
    torch.testing.assert_close(saliency, expected, rtol=0, atol=1e-12)


def test_grad_cam_without_positive_evidence_is_zero(tiny, images, class_idx):
    with torch.no_grad():
        tiny.fc.weight.copy_(-tiny.fc.weight.abs())
    assert (grad_cam(tiny, images, class_idx, layer="features") == 0).all()


def test_fake_cam_hides_one_pixel(tiny, images, class_idx):
    saliency = fake_cam(tiny, images, class_idx)
    assert saliency.shape == (5, 1, 24, 32)
    assert (saliency[:, 0, 0, 0] == 0).all()
    assert saliency.sum() == 5 * (24 * 32 - 1)
