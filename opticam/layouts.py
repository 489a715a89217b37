"""How the output of a layer becomes feature maps (B,K,h,w): known by what its module is, said by the user, or refused.

Nothing is guessed from a shape. What is known comes from the class of the module, from the class of the network around
it, and from the records that libraries keep, such as timm's `feature_info`, `num_prefix_tokens` and `grid_size`, or the
configuration of a network of the package transformers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from opticam.classifier import as_classifier, bare
from opticam.state import class_of

Layout = Callable[[Tensor], Tensor]


def channels_first(output: Tensor) -> Tensor:
    """The layout of convolutional networks: maps (B,K,h,w), as they are."""
    return output


def channels_last(output: Tensor) -> Tensor:
    """The layout of Swin transformers: (B,h,w,K), as maps (B,K,h,w). ValueError: not four axes."""
    if output.ndim != 4:
        raise ValueError(f"layer: wanted maps (B,h,w,K), got shape {tuple(output.shape)}")
    return output.permute(0, 3, 1, 2)


class Tokens(NamedTuple):
    """The layout of plain vision transformers: tokens (B, prefix + rows * columns, K), row by row.

    Attributes:
        rows: of the grid of patches.
        columns: of the grid of patches.
        prefix: number of tokens before the patches, such as a class token and registers.
    """

    rows: int
    columns: int
    prefix: int = 0

    def __call__(self, output: Tensor) -> Tensor:
        """Maps (B,K,rows,columns), a view. ValueError: not that many tokens."""
        if output.ndim != 3 or output.shape[1] != self.prefix + self.rows * self.columns:
            wanted = f"(B,{self.prefix}+{self.rows}*{self.columns},K)"
            raise ValueError(f"layer: wanted tokens {wanted}, got shape {tuple(output.shape)}")
        return output[:, self.prefix :].transpose(1, 2).unflatten(2, (self.rows, self.columns))


def told_layout(model: nn.Module) -> Layout | None:
    """The layout that the user has said of a `Classifier`."""
    classifier = as_classifier(model)
    return None if classifier is None else classifier.layout


def find_layout(model: nn.Module, layer: nn.Module, output: Tensor, size: Sequence[int]) -> Layout:
    """The function from the output of a layer to feature maps (B,K,h,w).

    A `Classifier` whose layout the user has said has that one. Otherwise maps (B,K,h,w) are known from convolutions,
    batch norms, pooling and what is built of them; channels-last maps from Swin transformers and timm's records; tokens
    from transformers and mixers of timm, torchvision and transformers whose order of tokens is the reading order.

    Args:
        model: any network.
        layer: a module of it.
        output: of the layer.
        size: (H,W) of the images.

    Raises:
        ValueError: the layout is not known.
    """
    if (told := told_layout(model)) is not None:
        return told
    if output.ndim not in (3, 4):
        raise ValueError(f"layer: wanted feature maps (B,K,h,w) or tokens (B,N,K), got shape {tuple(output.shape)}")
    path = path_to(bare(model), layer)
    layout = _layout_of_maps(path, output, size) if output.ndim == 4 else _layout_of_tokens(path, output, size)
    if layout is None:
        raise ValueError(
            f"layer: where the cells of {type(layer).__name__}'s output {tuple(output.shape)} lie in the image is not "
            f"known; wanted another layer of {type(bare(model)).__name__}, or opticam.wrap(network, layer, layout=...) "
            "with channels_first, channels_last, Tokens(rows, columns, prefix) or a function to (B,K,h,w)"
        )
    return layout


def check_patches(model: nn.Module, size: Sequence[int], told: Sequence[int]) -> None:
    """Refuse as many cells as the first convolution cuts patches, in other rows, if patches do not overlap."""
    first = next((module for module in bare(model).modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None and first.kernel_size == first.stride:
        rows, columns = (side // step for side, step in zip(size, first.stride, strict=True))
        if math.prod(told) == rows * columns and told[0] != rows:
            patches = f"{rows}x{columns}, the patches that {type(bare(model)).__name__} cuts"
            raise ValueError(f"layout: wanted {patches}, got {told[0]}x{told[1]} cells")


def check_cells(size: Sequence[int], cells: Sequence[int]) -> None:
    """Refuse cells that by their shape lie in another order than the pixels: in one row, or upright in a wide image."""
    (height, width), (rows, columns) = size, cells
    high, wide = height / rows, width / columns
    strip = 1 in cells and rows != columns and 1 not in size and max(high, wide) > 4 * min(high, wide)
    if strip or (rows - columns) * (height - width) < 0:
        raise ValueError(
            f"layout: {rows}x{columns} cells of images {height}x{width} may lie in another order than the pixels; "
            "wanted opticam.wrap(network, layer, layout=channels_first) where they do not, else another layout"
        )


def class_token_grid(model: nn.Module, size: Sequence[int]) -> Tokens | None:
    """The tokens of a network that is one plain sequence headed by a class token that its head reads, or None.

    Args:
        model: any network; the transformer may lie inside it. Of a `Classifier` with `layout=Tokens(...)`, these, if
            they have a prefix.
        size: (H,W) of the images.
    """
    told = told_layout(model)
    if told is not None:
        if not (isinstance(told, Tokens) and told.prefix):
            return None
        check_patches(model, size, told[:2])
        return told
    transformer = plain_transformer(model)
    return None if transformer is None else token_grid(transformer, size)


def plain_transformer(model: nn.Module, pooled: bool = False) -> nn.Module | None:
    """The only transformer in the model, of those known as one plain sequence, or None.

    Args:
        model: any network.
        pooled: also one whose head does not read a class token, but pools.
    """
    found = [module for module in model.modules() if _name(module) in _CLASS_TOKEN]
    if len(found) != 1:
        return None
    (transformer,) = found
    has_class_token = getattr(transformer, "cls_token", getattr(transformer, "class_token", None)) is not None
    reads_it = has_class_token and getattr(transformer, "global_pool", "token") == "token"
    return transformer if pooled or reads_it else None


def parts_of_transformer(transformer: Any) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The blocks of a plain transformer, and the function from the tokens after a block to its logits."""
    if _name(transformer).startswith("torchvision."):
        encoder = transformer.encoder
        return encoder.layers, lambda tokens: transformer.heads(encoder.ln(tokens)[:, 0])
    return transformer.blocks, lambda tokens: transformer.forward_head(transformer.norm(tokens))


# tokens in reading order, after `num_prefix_tokens` others, on the grid of the network's embedding
_CLASS_TOKEN = {
    "timm.models.vision_transformer.VisionTransformer",
    "timm.models.deit.VisionTransformerDistilled",
    "timm.models.vision_transformer_relpos.VisionTransformerRelPos",
    "timm.models.beit.Beit",
    "timm.models.eva.Eva",
    "torchvision.models.vision_transformer.VisionTransformer",
}
_READING_ORDER = _CLASS_TOKEN | {
    "timm.models.cait.Cait",
    "timm.models.convit.ConVit",
    "timm.models.mlp_mixer.MlpMixer",
    "timm.models.tnt.TNT",
    "timm.models.xcit.Xcit",
    "transformers.models.beit.modeling_beit.BeitModel",
    "transformers.models.clip.modeling_clip.CLIPVisionModel",
    "transformers.models.data2vec.modeling_data2vec_vision.Data2VecVisionModel",
    "transformers.models.deit.modeling_deit.DeiTModel",
    "transformers.models.dinov2.modeling_dinov2.Dinov2Model",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersModel",
    "transformers.models.ijepa.modeling_ijepa.IJepaModel",
    "transformers.models.metaclip_2.modeling_metaclip_2.MetaClip2VisionModel",
    "transformers.models.siglip.modeling_siglip.SiglipVisionModel",
    "transformers.models.vit.modeling_vit.ViTModel",
    "transformers.models.vit_msn.modeling_vit_msn.ViTMSNModel",
}
# parameters of their embeddings: (1,n,K), or (K,) for one token
_PREFIX_OF_TRANSFORMERS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
# tokens in reading order, on the grid of their stage
_STAGES_OF_TOKENS = {
    "timm.models.levit.Levit",
    "timm.models.levit.LevitDistilled",
    "timm.models.mvitv2.MultiScaleVit",
    "timm.models.efficientformer.EfficientFormer",
    "transformers.models.swin.modeling_swin.SwinModel",
    "transformers.models.swinv2.modeling_swinv2.Swinv2Model",
}
# all maps but those of convolutions are channels-last
_SWIN = {
    "torchvision.models.swin_transformer.SwinTransformer",
    "timm.models.swin_transformer.SwinTransformer",
    "timm.models.swin_transformer_v2.SwinTransformerV2",
}
# maps (B,K,h,w) come out of them, whatever happens inside
_BLOCKS = {
    "torchvision.models.convnext.CNBlock",
    "torchvision.models.maxvit.MaxVitBlock",
    "torchvision.models.maxvit.MaxVitLayer",
    "timm.models.convnext.ConvNeXtBlock",
    "transformers.models.convnext.modeling_convnext.ConvNextStage",
    "transformers.models.convnextv2.modeling_convnextv2.ConvNextV2Stage",
}
_CONVOLUTIONAL = (
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    nn.InstanceNorm2d,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Upsample,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.Dropout2d,
)
_ELEMENTWISE = (
    "torch.nn.modules.activation",
    "torch.nn.modules.dropout",
    "timm.layers.activations",
    "timm.layers.drop",
)


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def path_to(network: nn.Module, layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules from the network down to the layer, each with its own name."""
    return [("", network), *(_path_below(network, layer, {network}) or [])]


def _path_below(network: nn.Module, layer: nn.Module, seen: set[nn.Module]) -> list[tuple[str, nn.Module]] | None:
    for name, module in network._modules.items():
        if module is layer:
            return [(name, layer)]
        if module is not None and module not in seen:
            seen.add(module)
            below = _path_below(module, layer, seen) if module._modules else None
            if below is not None:
                return [(name, module), *below]
    return None


def _record(path: list[tuple[str, nn.Module]]) -> tuple[nn.Module, str]:
    """The innermost network of a known library around the layer, and the layer's name in it."""
    for depth in reversed(range(len(path))):
        module = path[depth][1]
        if _is_of_timm(module) or _name(module) in _READING_ORDER | _STAGES_OF_TOKENS | _SWIN:
            return module, ".".join(name for name, _ in path[depth + 1 :])
    return path[0][1], ".".join(name for name, _ in path[1:])


def _is_of_timm(module: nn.Module) -> bool:
    return _name(module).startswith("timm.models.") and isinstance(getattr(module, "feature_info", None), list)


def _layout_of_tokens(path: list[tuple[str, nn.Module]], output: Tensor, size: Sequence[int]) -> Layout | None:
    network, name = _record(path)
    tokens = output.shape[1]
    if _name(network) == "timm.models.hiera.Hiera" and name in {info["module"] for info in network.feature_info}:  # type: ignore[union-attr]
        index = int(name.rpartition(".")[2])
        return lambda output: network.reroll(output, index).permute(0, 3, 1, 2)  # type: ignore[operator]
    if _name(network) in _STAGES_OF_TOKENS:
        stages = _reductions(network)
        if name in stages:
            grid = Tokens(*(-(-side // stages[name]) for side in size))
            return grid if tokens == grid.rows * grid.columns else None  # type: ignore[return-value]
    if _name(network) not in _READING_ORDER or "tokens" in name.replace("blocks_token", "") or "gate" in name:
        return None  # a mixer's parts see the tokens as channels
    grid = token_grid(network, size)
    extra = tokens - grid.rows * grid.columns
    return grid._replace(prefix=extra) if extra in (0, grid.prefix) else None  # type: ignore[return-value]


def _reductions(network: Any) -> dict[str, int]:
    """How many pixels a cell of a stage is wide, by the stage's name."""
    if _name(network).startswith("transformers."):
        patch = network.config.patch_size
        return {"layernorm": patch * 2 ** (len(network.config.depths) - 1)} if isinstance(patch, int) else {}
    stages = {info["module"]: info["reduction"] for info in network.feature_info}
    return stages | {"norm": network.feature_info[-1]["reduction"]}


def token_grid(network: Any, size: Sequence[int]) -> Tokens:
    """Rows, columns and prefix by the network's own records."""
    if _name(network).startswith("transformers."):
        rows, columns = (side // step for side, step in zip(size, _pair(network.config.patch_size), strict=True))
        prefix = [getattr(network.embeddings, name, None) for name in _PREFIX_OF_TRANSFORMERS]
        return Tokens(rows, columns, sum(tokens.shape[:-1].numel() for tokens in prefix if tokens is not None))
    if _name(network).startswith("torchvision."):
        side = network.image_size // network.patch_size
        return Tokens(side, side, 1)
    names = ("pixel_embed", "patch_embed", "stem")
    embedding = next(getattr(network, name) for name in names if isinstance(getattr(network, name, None), nn.Module))
    if not _name(embedding).startswith("timm."):  # of one's own: nothing says where its patches lie
        raise ValueError(
            f"layer: the order of the patches of {type(embedding).__name__} is not known; wanted "
            "opticam.wrap(network, layer, layout=Tokens(rows, columns, prefix))"
        )
    if hasattr(embedding, "grid_size") and getattr(embedding, "strict_img_size", True):
        rows, columns = embedding.grid_size
    elif hasattr(embedding, "dynamic_feat_size"):
        rows, columns = embedding.dynamic_feat_size(tuple(size))
    else:
        patch = embedding.patch_size
        rows, columns = (side // step for side, step in zip(size, _pair(patch), strict=True))
    return Tokens(int(rows), int(columns), getattr(network, "num_prefix_tokens", 0))


def _pair(value: Any) -> Sequence[int]:
    return value if isinstance(value, tuple | list) else (value, value)


def _layout_of_maps(path: list[tuple[str, nn.Module]], output: Tensor, size: Sequence[int]) -> Layout | None:
    if any(is_attention(module) for _, module in path[1:-1]):
        return None  # axes may be heads, windows or keys
    network, name = _record(path)
    layer = path[-1][1]
    if _is_convolutional(layer):
        return channels_first
    for info in network.feature_info if _is_of_timm(network) else ():  # type: ignore[union-attr]
        if info["module"] == name:
            last = getattr(network, "output_fmt", "NCHW") == "NHWC" or _name(network) == "timm.models.volo.VOLO"
            if output.shape[3 if last else 1] != info["num_chs"]:
                return None
            return channels_last if last else channels_first
    if _name(network) in _READING_ORDER | _STAGES_OF_TOKENS:
        return None
    if _name(layer) == "torchvision.ops.misc.Permute":
        return {(0, 2, 3, 1): channels_last, (0, 3, 1, 2): channels_first}.get(tuple(layer.dims))  # type: ignore[arg-type]
    if _name(layer) in _BLOCKS:
        return channels_first
    if _is_row(layer):
        name, child = list(layer.named_children())[-1]
        return _layout_of_maps([*path, (name, child)], output, size)
    siblings = list(path[-2][1].named_children()) if len(path) > 1 and _is_row(path[-2][1]) else []
    place = next((index for index, (_, module) in enumerate(siblings) if module is layer), 0)
    elementwise = isinstance(layer, nn.Identity) or _name(layer).startswith(_ELEMENTWISE)
    if place and (elementwise or _name(layer).endswith(".StochasticDepth")):
        return _layout_of_maps([*path[:-1], siblings[place - 1]], output, size)
    if _name(network) in _SWIN:
        return channels_last
    return _layout_by_contents(path, output, size)


def _layout_by_contents(path: list[tuple[str, nn.Module]], output: Tensor, size: Sequence[int]) -> Layout | None:
    """Maps (B,K,h,w) where the smallest module around that has convolutions has nothing that wants channels last.

    Without convolutions only where the axes cannot be read in another way.
    """
    layer = path[-1][1]
    own = len(path) - 1 if next(layer.children(), None) is not None else len(path) - 2
    for _, module in reversed(path[: own + 1]):
        inner = list(module.modules())
        if any(_wants_channels_last(part) for part in inner):
            return None
        convolutional = any(isinstance(part, nn.Conv2d) for part in inner)
        if convolutional:
            break
    # a module of one's own may still permute: then its third axis is no width, or its channels are nobody's
    (a, b, c), (height, width) = output.shape[1:], size
    first = abs(b * width - c * height) < max(height, width)
    last = abs(a * width - b * height) < max(height, width)
    if first and not last:
        return channels_first
    if not convolutional:
        return None
    network = path[0][1]
    named = ("in_channels", "out_channels", "num_features", "in_features", "out_features")
    numbers = (getattr(module, name, None) for module in network.modules() for name in named)
    known = {number for number in numbers if isinstance(number, int)}
    if not (first or last) and not (a in known and c not in known):
        return None
    first, last = first and (a in known or c not in known), last and (c in known or a not in known)
    childless = next(layer.children(), None) is None
    mixed = any(_wants_channels_last(part) for part in network.modules())
    return None if (last and (childless or not first)) or (mixed and not first) else channels_first


def is_attention(module: nn.Module) -> bool:
    """Whether a module is attention, by the name of its class."""
    name = type(module).__name__.lower()
    whole = "block" in name or name.endswith(("net", "model", "classifier"))
    return any(word in name for word in ("attention", "attn", "mhsa", "gpsa", "xca")) and not whole


def _is_row(module: nn.Module) -> bool:
    """Whether a module is its children one after the other, and no more."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and len(module) > 0


def _is_convolutional(module: nn.Module) -> bool:
    if isinstance(module, _CONVOLUTIONAL) and any(type(module).forward is kind.forward for kind in _CONVOLUTIONAL):
        return True
    kind = class_of(module)
    of_library = kind.__module__.startswith(("torch.nn.", "timm.layers.", "torchvision."))
    return of_library and (isinstance(module, _CONVOLUTIONAL) or kind.__name__.endswith("2d"))


def _wants_channels_last(module: nn.Module) -> bool:
    name = type(module).__name__
    norm = ("LayerNorm" in name or "RMSNorm" in name or "RmsNorm" in name) and not _is_convolutional(module)
    return norm or isinstance(module, nn.MultiheadAttention) or _name(module) == "torchvision.ops.misc.Permute"
