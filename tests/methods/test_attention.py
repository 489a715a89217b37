import numpy as np
import pytest
import references
import torch
from conftest import TinyCNN, TinyViT
from torchvision.models import VisionTransformer

from opticam import METHODS
from opticam.features import attention_maps

NAMES = ["raw_attention", "attention_rollout", "gradient_rollout"]


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return TinyViT().double()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_loop_version(vit, images, class_idx, name, fused):
    for block in vit.network.blocks:
        block.attn.fused_attn = fused
    saliency = METHODS[name](vit, images, class_idx)
    assert all(block.attn.fused_attn == fused for block in vit.network.blocks)
    attention, gradients, _ = attention_maps(vit, images, class_idx)
    for b in range(5):
        lists = [[maps[b].numpy() for maps in attention], [slope[b].numpy() for slope in gradients]]
        row = getattr(references, name)(*lists[: 2 if name == "gradient_rollout" else 1])
        expected = references.finish(row[1:].reshape(3, 4), 24, 32)  # the first token is the class token
        np.testing.assert_allclose(saliency[b, 0], expected, rtol=0, atol=1e-10)


def test_attention_of_the_first_block_by_hand(vit, images, class_idx):
    attention, _, logits = attention_maps(vit, images, class_idx)
    torch.testing.assert_close(logits, vit(images).detach(), rtol=0, atol=1e-12)
    network, x = vit.network, 4 * images
    tokens = network._pos_embed(network.patch_embed(x))
    block = network.blocks[0]
    q, k, _ = block.attn.qkv(block.norm1(tokens)).detach().numpy().reshape(5, 13, 3, 2, 6).transpose(2, 0, 3, 1, 4)
    for b, head, i in ((0, 0, 0), (4, 1, 12), (2, 1, 5)):
        row = references.softmax(np.array([q[b, head, i] @ k[b, head, j] for j in range(13)]) / 6**0.5)
        np.testing.assert_allclose(attention[0][b, head, i], row, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", [0, 1])
def test_gradients_agree_with_differences(vit, images, class_idx, block):
    gradients = attention_maps(vit, images, class_idx)[1][block]
    vit.eval()
    vit.network.blocks[block].attn.fused_attn = False
    for b, head, i, j in ((0, 0, 0, 3), (3, 1, 0, 7), (2, 0, 5, 5)):
        values = []
        for step in (1e-6, -1e-6):
            nudge = torch.zeros_like(gradients)
            nudge[b, head, i, j] = step
            handle = vit.network.blocks[block].attn.attn_drop.register_forward_hook(lambda m, a, out, n=nudge: out + n)
            values.append(vit(images)[b, class_idx[b]].item())
            handle.remove()
        assert gradients[b, head, i, j].item() == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_and_timm_agree_given_the_same_weights(vit, images, class_idx, name):
    square = images[:, :, :, :24]
    torch.manual_seed(0)
    vit = TinyViT(img_size=24).double()
    twin = VisionTransformer(
        image_size=24, patch_size=8, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=48, num_classes=5
    ).double()
    ours = vit.network.state_dict()
    renamed = {
        "class_token": ours["cls_token"],
        "encoder.pos_embedding": ours["pos_embed"],
        "conv_proj.weight": ours["patch_embed.proj.weight"],
        "conv_proj.bias": ours["patch_embed.proj.bias"],
        "encoder.ln.weight": ours["norm.weight"],
        "encoder.ln.bias": ours["norm.bias"],
        "heads.head.weight": ours["head.weight"],
        "heads.head.bias": ours["head.bias"],
    }
    parts = {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.proj": "self_attention.out_proj",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.3",
    }
    for block in range(2):
        for kind in ("weight", "bias"):
            there = f"encoder.layers.encoder_layer_{block}"
            renamed[f"{there}.self_attention.in_proj_{kind}"] = ours[f"blocks.{block}.attn.qkv.{kind}"]
            for here, name_there in parts.items():
                renamed[f"{there}.{name_there}.{kind}"] = ours[f"blocks.{block}.{here}.{kind}"]
    twin.load_state_dict(renamed)
    torch.testing.assert_close(twin.eval()(4 * square), vit.eval()(square), rtol=0, atol=1e-5)  # eps of LayerNorm
    expected = METHODS[name](vit, square, class_idx)
    torch.testing.assert_close(METHODS[name](twin, 4 * square, class_idx), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_without_attention_or_class_token_is_refused(tiny, images, class_idx, name):
    with pytest.raises(ValueError, match="model: no attention in TinyCNN; wanted a ViT or DeiT"):
        METHODS[name](tiny, images, class_idx)
    assert isinstance(tiny, TinyCNN)
    pooled = TinyViT(class_token=False, global_pool="avg").double()
    with pytest.raises(ValueError, match="model: TinyViT has no class token"):
        METHODS[name](pooled, images, class_idx)


def test_class_out_of_range(vit, images):
    with pytest.raises(ValueError, match=r"class_idx: wanted indices in 0\.\.4, got 7"):
        METHODS["raw_attention"](vit, images, torch.tensor([0, 1, 2, 3, 7]))
