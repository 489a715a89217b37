import copy

import numpy as np
import pytest
import references
import timm
import torch
from conftest import TinyCNN, TinyViT
from torch import nn
from torchvision.models import VisionTransformer

from opticam import METHODS, wrap
from opticam.features import attention_maps
from opticam.layouts import Tokens
from opticam.methods.attention import legrad

NAMES = ["raw_attention", "attention_rollout", "gradient_rollout"]  # of the class token


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


@pytest.mark.parametrize("name", [*NAMES, "legrad"])
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


@pytest.mark.parametrize("name", [*NAMES, "legrad"])
def test_a_network_without_attention_or_class_token_is_refused(tiny, images, class_idx, name):
    with pytest.raises(ValueError, match="model: TinyCNN has no attention over one plain sequence"):
        METHODS[name](tiny, images, class_idx)
    assert isinstance(tiny, TinyCNN)
    pooled = TinyViT(class_token=False, global_pool="avg").double()
    if name == "legrad":  # does not need a class token
        assert METHODS[name](pooled, images, class_idx).amax((1, 2, 3)).eq(1).all()
    else:
        with pytest.raises(ValueError, match="has no attention over one plain sequence with a class token"):
            METHODS[name](pooled, images, class_idx)


UNFIT = {
    "cait_xxs24_224": {"img_size": 64, "depth": 2},
    "pvt_v2_b0": {},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2, "depths": (1, 1), "num_heads": (2, 2)},
    "xcit_nano_12_p16_224": {"img_size": 64, "depth": 2},
    "mvitv2_tiny": {"img_size": 64},
    "convit_tiny": {"img_size": 64},
    "beit_base_patch16_224": {"img_size": 64, "depth": 1},  # its head pools the patches
}


@pytest.mark.slow
@pytest.mark.parametrize("unfit", UNFIT)
def test_attention_that_is_not_one_plain_sequence_is_refused(unfit):
    model = timm.create_model(unfit, num_classes=3, **UNFIT[unfit]).eval()
    for name in [*NAMES, "legrad"][: 3 if unfit.startswith("beit") else 4]:
        with pytest.raises(ValueError, match="has no attention over one plain sequence"):
            METHODS[name](model, torch.rand(1, 3, 64, 64), torch.tensor([1]))


class Own(nn.Module):
    """A transformer of one's own, whose class token lies first, built of a given ViT's parts."""

    def __init__(self, vit):
        super().__init__()
        self.vit = nn.ModuleDict({"blocks": vit.blocks, "norm": vit.norm, "head": vit.head, "embed": vit.patch_embed})
        self.token, self.position = vit.cls_token, vit.pos_embed

    def forward(self, images):
        x = self.vit["embed"](4 * images)
        x = self.vit["blocks"](torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position)
        return self.vit["head"](self.vit["norm"](x)[:, 0])


@pytest.mark.parametrize("name", NAMES)
def test_a_transformer_of_ones_own_is_told(vit, images, class_idx, name):
    own = Own(vit.network)
    with pytest.raises(ValueError, match="model: Own has no attention over one plain sequence"):
        METHODS[name](own, images, class_idx)
    told = wrap(own, "vit.norm", layout=Tokens(3, 4, 1)).double()
    torch.testing.assert_close(METHODS[name](told, images, class_idx), METHODS[name](vit, images, class_idx))
    wrong = wrap(own, "vit.norm", layout=Tokens(3, 4, 0)).double()
    with pytest.raises(ValueError, match="has no attention over one plain sequence"):
        METHODS[name](wrong, images, class_idx)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["one on two views", "two"])
def test_two_sequences_in_a_network_are_refused_also_where_tokens_are_told(images, class_idx, kind, name):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = TinyViT()
            self.second = self.first if kind == "one on two views" else TinyViT()

        def forward(self, x):
            return self.first(x) + self.second(x.flip(3))

    network = wrap(Views().double().eval(), "first.network.blocks.0", layout=Tokens(3, 4, 1))
    with pytest.raises(ValueError, match=r"^model: Views has no attention over one plain sequence with a class token"):
        METHODS[name](network, images, class_idx)


class Head(nn.Module):
    """Reads other tokens of a ViT than the first alone."""

    def __init__(self, reads, **options):
        super().__init__()
        self.vit = TinyViT(**options).double().eval().network
        self.fc = nn.Linear(12, 5).double()
        self.reads = reads

    def forward(self, x):
        return self.fc(self.reads(self.vit.forward_features(x)))


def test_attention_itself_needs_no_gradients(images, class_idx):
    class Hidden(Head):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    for name in ("raw_attention", "attention_rollout"):
        METHODS[name](Hidden(lambda t: t[:, 0]), images, class_idx)


def test_a_head_is_looked_at_again_once_it_is_trained(images, class_idx):
    model = Head(lambda t: t[:, 1:].mean(1))
    nn.init.zeros_(model.fc.weight)
    METHODS["raw_attention"](model, images, class_idx)  # nothing shows yet what is read
    nn.init.normal_(model.fc.weight)
    with pytest.raises(ValueError, match="does not read the first token alone"):
        METHODS["raw_attention"](model, images, class_idx)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "reads",
    [lambda t: t[:, 1:].mean(1), lambda t: t[:, 0] + t.mean(1), lambda t: t[:, 1]],
    ids=["the patches", "all", "a register"],
)
def test_a_head_that_does_not_read_the_first_token_alone_is_refused(images, class_idx, reads, name):
    model = Head(reads, reg_tokens=1)
    for told in (model, wrap(model, "vit.blocks.1.norm1", layout=Tokens(3, 4, 2))):
        with pytest.raises(ValueError, match="model: the head of Head does not read the first token alone"):
            METHODS[name](told, images, class_idx)
    METHODS[name](Head(lambda t: t[:, 0], reg_tokens=1), images, class_idx)


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("name", [*NAMES, "legrad"])
@pytest.mark.parametrize("place", ["network", "network.blocks.1.attn", "all"])
def test_a_forward_that_a_function_wraps(vit, images, class_idx, name, number, place):
    x, c = images[:number], class_idx[:number]
    expected = METHODS[name](copy.deepcopy(vit), x, c)
    part = vit if place == "all" else vit.get_submodule(place)
    old = part.forward
    part.forward = lambda *args, **options: old(*args, **options)
    for _ in range(2):
        assert torch.equal(METHODS[name](vit, x, c), expected)


class Casting(nn.Module):
    """Casts to bfloat16 by itself, as networks trained in mixed precision may."""

    def __init__(self, network, dtype=torch.float32):
        super().__init__()
        self.vit, self.dtype = network, dtype

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.vit(x).to(self.dtype)


def test_the_caller_s_autocast_is_that_of_the_passes_alone(vit, images, class_idx):
    inner = vit.float().network
    for name in ("attention_rollout", "gradient_rollout"):
        with torch.autocast("cpu", torch.bfloat16):
            found = METHODS[name](inner, images.float(), class_idx)
        expected = METHODS[name](Casting(inner), images.float(), class_idx)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_legrad_of_a_network_that_casts_by_itself(vit, images, class_idx, dtype):
    inner = vit.float().network
    found, exact = (legrad(network, images.float(), class_idx) for network in (Casting(inner, dtype), inner))
    assert 0 < (found - exact).abs().max() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}], ids=["class token", "pooled"])
def test_legrad_agrees_with_differences(images, class_idx, options):
    """Every attention probability of every block is nudged by hand, and the block's own class score watched."""
    torch.manual_seed(1)
    vit = TinyViT(**options).double().eval()
    network, prefix = vit.network, 0 if options else 1
    b, c = 2, class_idx[2]
    saliency = legrad(vit, images, class_idx)
    blocks = []
    with torch.no_grad():
        tokens = network.norm_pre(network._pos_embed(network.patch_embed(4 * images[b : b + 1])))
        for block in network.blocks:
            attention = block.attn
            attention.fused_attn = False
            maps = []
            handle = attention.attn_drop.register_forward_hook(lambda m, a, out, maps=maps: maps.append(out))
            following = block(tokens)
            handle.remove()

            def score(changed, block=block, tokens=tokens):
                changed = torch.from_numpy(changed)[None]
                handle = block.attn.attn_drop.register_forward_hook(lambda m, a, out: changed)
                value = network.forward_head(network.norm(block(tokens)))[0, c].item()
                handle.remove()
                return value

            blocks.append((score, maps[0][0].numpy()))
            tokens = following
        expected = references.legrad(blocks, prefix)
    expected = references.finish(expected.reshape(3, 4), 24, 32)
    np.testing.assert_allclose(saliency[b, 0], expected, rtol=0, atol=1e-6)


def test_legrad_leaves_the_network_as_it_was_and_takes_images_one_by_one(vit, images, class_idx):
    vit.train()
    flags = [parameter.requires_grad for parameter in vit.parameters()]
    together = legrad(vit, images, class_idx)
    for b in range(5):
        torch.testing.assert_close(legrad(vit, images[b : b + 1], class_idx[b : b + 1]), together[b : b + 1])
    assert vit.training
    assert [parameter.requires_grad for parameter in vit.parameters()] == flags
    assert all(parameter.grad is None for parameter in vit.parameters())
    assert not any(module._forward_hooks for module in vit.modules())
    assert all(block.attn.fused_attn for block in vit.network.blocks)


def test_legrad_refuses_a_network_with_a_further_head(vit, images, class_idx):
    model = nn.Sequential(vit, nn.Linear(5, 5).double())
    with pytest.raises(ValueError, match="model: wanted logits that are those of the head of its VisionTransformer"):
        legrad(model, images, class_idx)


@pytest.mark.parametrize("name", [*NAMES, "legrad", "grad_cam"])
def test_checkpointing_changes_nothing(vit, images, class_idx, name):
    options = {"layer": "network.blocks.1.norm1"} if name == "grad_cam" else {}
    expected = METHODS[name](vit, images, class_idx, **options)
    vit.network.set_grad_checkpointing(True)
    torch.testing.assert_close(METHODS[name](vit, images, class_idx, **options), expected)


def test_class_out_of_range(vit, images):
    with pytest.raises(ValueError, match=r"class_idx: wanted indices in 0\.\.4, got 7"):
        METHODS["raw_attention"](vit, images, torch.tensor([0, 1, 2, 3, 7]))
