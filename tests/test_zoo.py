"""The zoo: one small network per family of timm and torchvision, with random weights.

For each of them, Opti-CAM and Grad-CAM run at the default layer and the layout check confirms every cell, or one
sentence refuses. The page docs/networks.md is what this finds; `python tests/test_zoo.py` writes it anew.
"""

import opticam  # noqa: F401  # isort: skip  (before timm)

import re
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from torch import nn

from opticam import grad_cam, opti_cam, wrap
from opticam.probe import check_layout, default_layer

from torchvision import models  # isort: skip  (after opticam)

PAGE = Path(__file__).parents[1] / "docs" / "networks.md"


class Family(NamedTuple):
    name: str
    network: str  # library/NAME
    size: int = 128
    options: dict = {}  # noqa: RUF012
    num_changes: int = 1
    taps: float = 0.05  # weight of all but the middle ones

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        library, _, name = self.network.partition("/")
        source = timm.models if library == "timm" else models
        build = getattr(source, name) if library != "timm" or name[0].isupper() else partial(timm.create_model, name)
        network = build(num_classes=20, **self.options).eval()
        with torch.no_grad():  # a layout does not depend on the weights: these let the places stand out
            for name, parameter in network.named_parameters():
                if parameter.ndim == 4 and min(parameter.shape[2:]) > 2:
                    middle = parameter[:, :, parameter.shape[2] // 2, parameter.shape[3] // 2].clone()
                    parameter *= self.taps
                    parameter[:, :, parameter.shape[2] // 2, parameter.shape[3] // 2] = middle
                elif name.endswith("attention_biases"):
                    parameter[:, 0] = 4.0
            if self.name.startswith(("LeViT", "MobileViT", "RepVGG")):  # some begin with zeros, or nearly
                for module in network.modules():
                    if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                        module.weight.fill_(1.0)
        return network


def sized(size: int, **options: object) -> tuple[int, dict]:
    return size, {"img_size": size, **options}


FAMILIES = [
    Family("AlexNet", "torchvision/alexnet"),
    Family("VGG", "torchvision/vgg11", 64),
    Family("ResNet", "torchvision/resnet18"),
    Family("Wide ResNet", "torchvision/wide_resnet50_2", 96),
    Family("SqueezeNet", "torchvision/squeezenet1_1", 64),
    Family("DenseNet", "torchvision/densenet121", 96),
    Family("GoogLeNet", "torchvision/googlenet", 96, {"init_weights": False}),
    Family("Inception v3", "torchvision/inception_v3", 155, {"init_weights": False}),
    Family("ShuffleNet v2", "torchvision/shufflenet_v2_x0_5"),
    Family("MobileNet v2", "torchvision/mobilenet_v2", 96),
    Family("MobileNet v3", "torchvision/mobilenet_v3_small"),
    Family("MNASNet", "torchvision/mnasnet0_5"),
    Family("EfficientNet", "torchvision/efficientnet_b0", 96),
    Family("RegNet", "torchvision/regnet_x_400mf", 96),
    Family("ConvNeXt (torchvision)", "torchvision/convnext_tiny", 96),
    Family("Swin (torchvision)", "torchvision/swin_t", 96),
    Family("Swin v2 (torchvision)", "torchvision/swin_v2_t", 96),
    Family(
        "MaxViT (torchvision)",
        "torchvision/MaxVit",
        96,
        {
            "input_size": (96, 96),
            "stem_channels": 16,
            "partition_size": 3,
            "block_channels": [16, 32, 64, 128],
            "block_layers": [1, 1, 1, 1],
            "head_dim": 16,
            "stochastic_depth_prob": 0.0,
        },
    ),
    Family(
        "ViT (torchvision)",
        "torchvision/VisionTransformer",
        96,
        {"image_size": 96, "patch_size": 32, "num_layers": 4, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768},
    ),
    Family("ResNet-D", "timm/resnet10t"),
    Family("ResNeXt", "timm/resnext26ts"),
    Family("SE-ResNet", "timm/legacy_seresnet18"),
    Family("SKNet", "timm/skresnet18"),
    Family("Res2Net", "timm/res2net50_14w_8s", 96),
    Family("ResNeSt", "timm/resnest14d", 96),
    Family("ResNet v2", "timm/resnetv2_50", 96),
    Family("ReXNet", "timm/rexnet_100", 96),
    Family("RegNetZ", "timm/regnetz_005", 96),
    Family("DPN", "timm/dpn48b", 96),
    Family("DLA", "timm/dla46_c", 96),
    Family("HRNet", "timm/hrnet_w18_small", 96),
    Family("Inception v4", "timm/inception_v4", 155),
    Family("Xception", "timm/xception41", 96),
    Family("MobileNet v1", "timm/mobilenetv1_100", 96),
    Family("MobileNet v4", "timm/mobilenetv4_conv_small_050"),
    Family("EfficientNet-Lite", "timm/tf_efficientnet_lite0", 96),
    Family("EfficientNet v2", "timm/tf_efficientnetv2_b0", 96),
    Family("FBNet", "timm/fbnetc_100", 96),
    Family("TinyNet", "timm/tinynet_e"),
    Family("GhostNet", "timm/ghostnet_050"),
    Family("RepGhost", "timm/repghostnet_050"),
    Family("HardCoRe-NAS", "timm/hardcorenas_a", 96),
    Family("LCNet", "timm/lcnet_035"),
    Family("HGNet", "timm/hgnetv2_b0", 96),
    Family("VoVNet", "timm/ese_vovnet19b_slim_dw", 96),
    Family("SelecSLS", "timm/selecsls42", 192),
    Family("TResNet", "timm/tresnet_m", 96),
    Family("CSPNet", "timm/cspresnet50", 96),
    Family("NFNet", "timm/nf_regnet_b0", 96),
    Family("RepVGG", "timm/repvgg_a0", 96),
    Family("MobileOne", "timm/mobileone_s0", 96),
    Family("LambdaResNet", "timm/lambda_resnet26t", 128),
    Family("ConvNeXt", "timm/convnext_atto", 96),
    Family("ConvNeXt v2", "timm/convnextv2_atto", 96),
    Family("InceptionNeXt", "timm/inception_next_atto", 96),
    Family("ConvMixer", "timm/ConvMixer", 56, {"dim": 64, "depth": 4, "kernel_size": 9, "patch_size": 14}),
    Family("EdgeNeXt", "timm/edgenext_xx_small", 96),
    Family("FastViT", "timm/fastvit_t8", 96),
    Family("RepViT", "timm/repvit_m0_9", 96, taps=0.5),
    Family("StarNet", "timm/starnet_s1", 96),
    Family("FasterNet", "timm/fasternet_t0", 96),
    Family("MambaOut", "timm/mambaout_femto", 96),
    Family("RDNet", "timm/rdnet_tiny", 96),
    Family("PoolFormer", "timm/poolformer_s12", 96),
    Family("CAFormer", "timm/caformer_s18", 96),
    Family("EfficientFormer", "timm/efficientformer_l1", 224),
    Family("EfficientFormer v2", "timm/efficientformerv2_s0", *sized(128)),
    Family("EfficientViT (MIT)", "timm/efficientvit_b0", num_changes=4, taps=1.0),
    Family("EfficientViT (MSRA)", "timm/efficientvit_m0", 224),
    Family("MobileViT", "timm/mobilevit_xxs", num_changes=4, taps=1.0),
    Family("MobileViT v2", "timm/mobilevitv2_050", num_changes=4, taps=1.0),
    Family("MaxViT", "timm/maxvit_rmlp_pico_rw_256", *sized(128)),
    Family("CoAtNet", "timm/coatnet_nano_rw_224", *sized(128)),
    Family("Swin", "timm/swin_tiny_patch4_window7_224", *sized(128, window_size=4, depths=(1, 1, 1, 1))),
    Family("Swin v2", "timm/swinv2_tiny_window8_256", *sized(128, window_size=4, depths=(1, 1, 1, 1))),
    Family("Swin v2 CR", "timm/swinv2_cr_tiny_ns_224", *sized(128, depths=(1, 1, 1, 1))),
    Family("Swin S3", "timm/swin_s3_tiny_224", *sized(128, window_size=4)),
    Family("FocalNet", "timm/focalnet_tiny_srf", 96),
    Family("GC ViT", "timm/gcvit_xxtiny", *sized(128)),
    Family("DaViT", "timm/davit_tiny", 96),
    Family("NesT", "timm/nest_tiny", *sized(64)),
    Family("Twins-PCPVT", "timm/twins_pcpvt_small", *sized(96)),
    Family("Twins-SVT", "timm/twins_svt_small", *sized(96)),
    Family("PVT v2", "timm/pvt_v2_b0", 96),
    Family("NextViT", "timm/nextvit_small", 96),
    Family("MViT v2", "timm/mvitv2_tiny", *sized(96)),
    Family("LeViT", "timm/levit_128s", 224),
    Family("LeViT (convolutions)", "timm/levit_conv_128s", 224),
    Family("TinyViT", "timm/tiny_vit_5m_224", 128),
    Family("Visformer", "timm/visformer_tiny", *sized(96)),
    Family("SHViT", "timm/shvit_s1", 256, num_changes=4, taps=1.0),
    Family("SwiftFormer", "timm/swiftformer_xs", 224),
    Family("CoaT", "timm/coat_lite_tiny", *sized(96)),
    Family("ViT", "timm/vit_tiny_patch16_224", *sized(64, depth=4)),
    Family("DeiT", "timm/deit_tiny_patch16_224", *sized(64, depth=4)),
    Family("DeiT distilled", "timm/deit_tiny_distilled_patch16_224", *sized(64, depth=4)),
    Family("DeiT III", "timm/deit3_small_patch16_224", *sized(64, depth=4)),
    Family("ViT with registers", "timm/vit_small_patch14_reg4_dinov2", *sized(56, depth=4)),
    Family("ViT pooled", "timm/vit_small_patch16_rope_224", *sized(64, depth=4)),
    Family("SigLIP", "timm/vit_base_patch16_siglip_224", *sized(64, depth=2)),
    Family("FlexiViT", "timm/flexivit_small", *sized(64, depth=2)),
    Family("BEiT", "timm/beit_base_patch16_224", *sized(64, depth=2)),
    Family("EVA-02", "timm/eva02_tiny_patch14_224", *sized(56, depth=4)),
    Family("ViT with relative positions", "timm/vit_relpos_small_patch16_224", *sized(64, depth=4)),
    Family("ViT on ResNet", "timm/vit_tiny_r_s16_p8_224", *sized(128, depth=4)),
    Family("ViT of SAM", "timm/samvit_base_patch16_224", *sized(64, depth=2)),
    Family("CaiT", "timm/cait_xxs24_224", *sized(64, depth=4)),
    Family("XCiT", "timm/xcit_nano_12_p16_224", *sized(64, depth=4)),
    Family("ConViT", "timm/convit_tiny", *sized(64)),
    Family("TNT", "timm/tnt_s_legacy_patch16_224", *sized(64, depth=4)),
    Family("CrossViT", "timm/crossvit_tiny_240", 240),
    Family("PiT", "timm/pit_ti_224", *sized(224)),
    Family("VOLO", "timm/volo_d1_224", *sized(64)),
    Family("Sequencer", "timm/sequencer2d_s", 64),
    Family("Hiera", "timm/hiera_tiny_224", *sized(128)),
    Family("Hiera of SAM 2", "timm/sam2_hiera_tiny", 128),
    Family("Mixer", "timm/mixer_s32_224", *sized(128), num_changes=4, taps=1.0),
    Family("ResMLP", "timm/resmlp_12_224", *sized(64)),
    Family("gMLP", "timm/gmlp_s16_224", *sized(64)),
]


def judge(family: Family) -> tuple[str, str, str]:
    """Layer, grid and verdict: "right", "wrong", or the sentence of the refusal."""
    network = family.build()
    images = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = nn.functional.interpolate(images, size=(family.size, family.size), mode="bilinear")
    class_idx = torch.tensor([1])
    layer, grid = "", ""
    try:
        layer = default_layer(network, family.size)
        model = wrap(network, layer, input_size=family.size)
        answers = check_layout(model, images, num_changes=family.num_changes)
        grid = "x".join(map(str, answers.shape))
        maps = [grad_cam(model, images, class_idx), opti_cam(model, images, class_idx, num_steps=1).saliency]
    except (ValueError, TypeError) as error:
        return layer, grid, f"refused: {error}"
    drawn = all(S.shape == (1, 1, family.size, family.size) and S.min() >= 0 and S.max() <= 1 for S in maps)
    return layer, grid, "right" if drawn and answers.all() else "wrong"


def row(family: Family, layer: str, grid: str, verdict: str) -> str:
    return f"| {family.name} | `{family.network}` | {f'`{layer}`' if layer else ''} | {grid} | {verdict} |"


HEADING = """# Networks that were tried

One small network per family was built with random weights. To make places stand out, the middle weight of each kernel
is the largest. Weights that a library sets to zero or nearly, and attention biases, are filled. Five families, whose
code says so, have kernels of equal weights and are tried four times; in RepViT the other weights are halved. The
settings were found by trying. So a verdict says only that a right layout can be recognised, and a wrong one found.

- *Layer* is what `default_layer` finds.
- *Grid* is that of its maps, for the small image of the test.
- *Right* means that Opti-CAM and Grad-CAM run there, and that by experiment every cell of the maps answers to its own
  place in the image (`check_layout`).
- *Refused* means that one sentence says what is wanted instead. Such networks can still be explained with a layer and a
  layout of your own, `opticam.wrap(network, layer, layout=...)`.

Made by `python tests/test_zoo.py`; the test compares.

| family | network | layer | grid | verdict |
| --- | --- | --- | --- | --- |
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=[family.network for family in FAMILIES])
def test_a_family_is_right_or_refused_as_the_page_says(family):
    assert row(family, *judge(family)) in PAGE.read_text().splitlines()


def test_the_page_lists_the_families_and_none_is_wrong():
    rows = re.findall(r"^\| (.+?) \| `.*\| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == [family.name for family in FAMILIES]
    assert sum(verdict == "right" for _, verdict in rows) >= 60
    assert all(verdict == "right" or verdict.startswith("refused: ") for _, verdict in rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    lines = []
    for one in FAMILIES:
        lines.append(row(one, *judge(one)))
        print(lines[-1], file=sys.stderr, flush=True)
    PAGE.write_text(HEADING + "\n".join(lines) + "\n")
