"""What a Sequencer costs, in closed form: parameters, multiply-accumulates with the LSTMs counted, activations.

FLOP counters skip recurrent layers and report 4.96 G of the 8.36 G multiply-accumulates of S. The rule here is simple:
every element of a matrix or kernel is used once per place of the output, and the places are the tokens of a stage. So a
token of a block costs `16·(D·C + D²)` in its LSTMs (4 gates × 2 directions × 2 axes), `4·D·C` in the fusing linear
layer and `2·r·C²` in the MLP. Norms count as in fvcore, from which published figures come: 5 per value of a layer norm,
2 of a batch norm. Biases, activations and gates are not counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import nn

from sequencer2d.model import Sequencer2D, SequencerConfig

_LAYER_NORM, _BATCH_NORM = 5, 2  # multiply-accumulates per value


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of one image through a model. Activations are numbers of values: 4 bytes each in fp32, 2 in bf16."""

    parameters: int
    macs: int
    """Multiply-accumulates of the forward pass."""
    training_activations: int
    """Values kept between the forward and the backward pass."""
    inference_activations: int
    """Most values alive at once in the forward pass."""


@dataclass(frozen=True, kw_only=True)
class MixerCosts:
    """Of one image of `tokens` tokens through one layer that mixes them, without the norm before it."""

    macs: int
    training_activations: int


def costs(config: SequencerConfig, image_size: int | tuple[int, int]) -> Costs:
    """What one image costs.

    Example: `round(costs(get_config("sequencer2d_s"), 224).macs / 1e9, 2) == 8.36`

    Args:
        config: The architecture.
        image_size: Side of a square image, or height and width, in pixels. What the strides do not divide counts as
            padded, as the model pads it.

    Raises:
        ValueError: It is no size.
    """
    height, width = _height_width(image_size)
    with torch.device("meta"):
        model = Sequencer2D(config)
    macs = kept = peak = 0
    patch = config.patch_sizes[0]
    if config.stem_widths:
        height, width = (config.tokens_along(side, patch) * patch for side in (height, width))
        channels = config.in_chans
        kept += height * width * channels
        # Of every convolution, itself, its norm and GELU are kept; of pooling, its output and an index of two values.
        # Alive at once are the input and either a convolution's norm's input and output, or pooling's and the index.
        steps = [(dim, depth, True) for dim, depth in zip(config.stem_widths, config.all_stem_depths, strict=True)]
        if config.stem_widths[-1] != config.embed_dims[0]:
            steps.append((config.embed_dims[0], 1, False))
        for dim, depth, halves in steps:
            for number in range(depth):
                pixels, pools = height * width, halves and number == 0
                if pools:
                    kept += pixels * dim + pixels // 4 * 2 * dim
                    height, width = height // 2, width // 2
                peak = max(peak, pixels * (channels + dim) + height * width * (3 if pools else 1) * dim)
                macs += pixels * 9 * channels * dim + height * width * _BATCH_NORM * dim
                kept += height * width * 3 * dim
                channels = dim
    else:
        height, width = config.tokens_along(height, patch), config.tokens_along(width, patch)
        macs += height * width * _matrix_elements(model.stem)
        kept += height * width * patch**2 * config.in_chans
    for i, stage in enumerate(model.stages):
        if i:
            patch = config.patch_sizes[i]
            kept += height * width * config.embed_dims[i - 1]
            height, width = config.tokens_along(height, patch), config.tokens_along(width, patch)
        tokens = height * width
        macs += tokens * (_matrix_elements(stage) + config.layers[i] * 2 * _LAYER_NORM * config.embed_dims[i])
        dim, hidden = config.embed_dims[i], int(config.embed_dims[i] * config.mlp_ratios[i])
        mixer = stage.get_submodule("blocks.0.rnn_tokens")
        # Norms keep their inputs and two numbers a token; the MLP its input, and its hidden layer around GELU.
        block = 2 * (dim + 2) + _mixer_values(mixer, dim) + dim + 2 * hidden
        kept += config.layers[i] * tokens * block
        # Input of the block, residual and norm, beside the MLP's hidden layer before and after GELU, or the mixer.
        peak = max(peak, tokens * (3 * dim + max(2 * hidden, _mixer_peak(mixer))))
    kept += height * width * (config.embed_dims[-1] + 2) + config.embed_dims[-1]
    macs += height * width * _LAYER_NORM * config.embed_dims[-1] + _matrix_elements(model.head)
    return Costs(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=macs,
        training_activations=kept,
        inference_activations=peak,
    )


def _height_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    sides = tuple(image_size) if isinstance(image_size, Iterable) and len(image_size) == 2 else (image_size, image_size)
    if not all(isinstance(side, Integral) and not isinstance(side, bool) and side > 0 for side in sides):
        raise ValueError(
            f"image_size={image_size!r} must be a side in pixels, such as 224, or height and width, such as (448, 320)"
        )
    return int(sides[0]), int(sides[1])


def bilstm2d_costs(tokens: int, dim: int, hidden_size: int) -> MixerCosts:
    """Of a BiLSTM2D: both grow in proportion to the number of tokens."""
    return MixerCosts(
        macs=tokens * (16 * (dim * hidden_size + hidden_size**2) + 4 * hidden_size * dim),
        training_activations=tokens * (2 * dim + 4 * 7 * hidden_size),
    )


def attention_costs(tokens: int, dim: int, num_heads: int, *, fused: bool) -> MixerCosts:
    """Of multi-head self-attention (query, key, value and output projections): both grow with the tokens' square.

    Args:
        tokens: Length of the sequence.
        dim: Channels.
        num_heads: Each keeps a matrix of attention weights.
        fused: Without these matrices, as FlashAttention does: the backward pass computes them again.
    """
    weights = 0 if fused else num_heads * tokens**2
    return MixerCosts(
        macs=tokens * 4 * dim**2 + 2 * tokens**2 * dim,
        training_activations=tokens * (dim + 3 * dim + dim) + weights,
    )


def _matrix_elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)


def _mixer_values(mixer: nn.Module, dim: int) -> int:
    """Values per token that a mixer keeps for its backward pass."""
    layers = [module for module in mixer.modules() if isinstance(module, nn.RNNBase)]
    # Per layer its input (columns need a copy), per direction gates, cell and output; the linear layer's input.
    values = 0
    for layer in layers:
        gates, cell = {"LSTM": (4, 1), "GRU": (4, 0)}.get(layer.mode, (1, 0))
        values += dim + (2 if layer.bidirectional else 1) * layer.hidden_size * (gates + cell + 1)
    return values + sum(module.in_features for module in mixer.modules() if isinstance(module, nn.Linear))


def _mixer_peak(mixer: nn.Module) -> int:
    """Values per token that are alive at once inside a mixer: one layer's gates, and the outputs of all."""
    layers = [module for module in mixer.modules() if isinstance(module, nn.RNNBase)]
    directions = {layer: 2 if layer.bidirectional else 1 for layer in layers}
    outputs = sum(directions[layer] * layer.hidden_size for layer in layers)
    gates = max(4 * directions[layer] * layer.hidden_size for layer in layers)
    return max(outputs + gates, 2 * outputs)
