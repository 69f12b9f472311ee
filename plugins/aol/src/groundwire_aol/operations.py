"""Which operations are of which kind, and what to use instead of those that have no rule."""

from __future__ import annotations

from torch import nn

from groundwire_aol import constants

#: Linear, without negative entries, at most moving, copying, dropping or averaging entries: the Schur test bounds them.
NONNEGATIVE = frozenset((
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "swapaxes", "movedim", "moveaxis", "squeeze",
    "unsqueeze", "expand", "repeat", "repeat_interleave", "tile", "getitem", "select", "narrow", "index_select",
    "split", "chunk",
    "unbind", "flip", "roll", "pad", "mean", "sum", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "interpolate", "upsample", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "unfold", "fold", "view_as", "reshape_as", "expand_as", "T", "mT", "to", "type_as", "diagonal",
    "tensor_split",
    "rot90", "cumsum",
))  # fmt: skip
NONNEGATIVE_LAYERS = (
    nn.Flatten, nn.Unflatten, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Unfold, nn.Fold,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ReflectionPad1d,
    nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.CircularPad1d,
    nn.CircularPad2d, nn.CircularPad3d, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d,
)  # fmt: skip
#: Modes of interpolation without negative weights.
INTERPOLATIONS = ("nearest", "nearest-exact", "linear", "bilinear", "trilinear", "area")
MAX_POOLS = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
#: Of the input only these facts may be used as numbers.
FACTS = frozenset(
    ("shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "dtype", "device", "len", "is_floating_point")
)
#: May be computed from constants alone: always the same result.
PURE = frozenset((
    *NONNEGATIVE, *constants.FUNCTIONS, *FACTS, "add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow",
    "sqrt", "rsqrt",
    "exp", "log", "square", "reciprocal", "softmax", "softplus", "norm", "max", "min", "maximum", "minimum", "cat",
    "stack", "matmul", "mm",
    "zeros", "ones", "full", "eye", "arange", "linspace", "tensor", "as_tensor", "where", "prod", "sign", "getattr",
    "item",
    "zeros_like", "ones_like", "transpose", "floor", "ceil", "int", "eq", "ne", "lt", "gt", "le", "ge", "and_", "or_",
    "not_", "normalize",
))  # fmt: skip

HINTS: dict[str, str] = {
    "LayerNorm": "use groundwire_aol.BatchCentering: dividing by a deviation has slopes up to 1 / sqrt(eps), about 316",
    "GroupNorm": "use groundwire_aol.BatchCentering: dividing by a deviation has slopes up to 1 / sqrt(eps), about 316",
    "InstanceNorm1d": "use groundwire_aol.BatchCentering", "InstanceNorm2d": "use groundwire_aol.BatchCentering",
    "InstanceNorm3d": "use groundwire_aol.BatchCentering", "RMSNorm": "use groundwire_aol.BatchCentering",
    "LocalResponseNorm": "use groundwire_aol.BatchCentering",
    "MultiheadAttention": "dot-product attention is not Lipschitz; use convolutions or dense layers",
    "Softmax": "return the scores before it: certificates are margins of scores",
    "LogSoftmax": "return the scores before it: certificates are margins of scores",
    "softmax": "return the scores before it: certificates are margins of scores",
    "log_softmax": "return the scores before it: certificates are margins of scores",
    "Embedding": "certify the part behind it, with respect to embeddings",
    "embedding": "certify the part behind it, with respect to embeddings",
    "mul": "a product of two activations is not Lipschitz; multiply by a constant, or add",
    "truediv": "dividing by an activation is not Lipschitz; divide by a constant",
    "div": "dividing by an activation is not Lipschitz; divide by a constant",
    "pow": "powers are not Lipschitz; use an activation",
    "square": "powers are not Lipschitz; use an activation",
    "normalize": "dividing by a norm is not Lipschitz; divide by a constant",
    "scaled_dot_product_attention": "dot-product attention is not Lipschitz",
    "dropout": "pass training=self.training, or use nn.Dropout",
    "LSTM": "recurrent layers multiply activations", "GRU": "recurrent layers multiply activations",
}  # fmt: skip


def hint(name: str) -> str:
    """What to use instead of an operation without a rule."""
    return HINTS.get(name, "replace it, or exclude this part and certify the rest")
