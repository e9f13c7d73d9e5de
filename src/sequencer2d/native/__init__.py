"""The blocks of Sequencer on the CPU, in kernels of our own: all LSTMs of a layer at once, and what stands around them.

Where the package was installed without them, or a tensor is none of theirs, PyTorch's `nn.LSTM` computes the same.
Modules: `library` finds the kernels, `op` makes them an operation of PyTorch, `weights` brings parameters into the
order that they want, `layer` and `block` are what the model calls, `inference` for a block at once, `stem` for what
stands before the blocks, `matmul` its products, `int8` the quantised model's layers, `choice` decides when;
`kernels/` is the C++.
"""

from sequencer2d.native.block import linear, mlp, residual_norm
from sequencer2d.native.choice import Backend, backends, check_backend, serves
from sequencer2d.native.inference import infer_block
from sequencer2d.native.layer import bilstm2d
from sequencer2d.native.library import available
from sequencer2d.native.stem import convolution, convolves, max_pool, norm_gelu, norms, pools

__all__ = [
    "Backend",
    "available",
    "backends",
    "bilstm2d",
    "check_backend",
    "convolution",
    "convolves",
    "infer_block",
    "linear",
    "max_pool",
    "mlp",
    "norm_gelu",
    "norms",
    "pools",
    "residual_norm",
    "serves",
]
