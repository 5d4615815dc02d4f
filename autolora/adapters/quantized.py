r"""Frozen linear maps whose weights are stored as small codes: what quantised backbones are made of.

Codes and kernels are those of bitsandbytes, so that an adapter finds the same weights in a model that transformers has
quantised with it:

* ``int8``: :math:`\hat W_{ij} = q_{ij} \, s_i / 127` with q in -127..127 and s_i the largest magnitude of row i, of W
  rounded to float16 (Dettmers et al., arXiv 2208.07339, section 2.1, on weights alone).
* ``nf4``: :math:`\hat W_{ij} = c_{q_{ij}} \, s_b` with 16 levels c, quantiles of a normal distribution, two codes a
  byte, and s_b the largest magnitude in each block b of 64 entries, in the order of rows (Dettmers et al., arXiv
  2305.14314, section 3; the scales are not quantised a second time).

The product is ours, and the same in training and evaluation: :math:`y = x \hat W^T + b`, with
:math:`\partial x = \partial y \, \hat W`. bitsandbytes' own modules (0.50) do something else at evaluation, on a CPU:
activations are rounded to int8 too, and nf4 weights change for good to a layout with scales in bfloat16, through which
no gradient flows any more.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autolora.adapters.linear_like import is_conv1d, site_of
from autolora.errors import BackboneError

Kind = Literal["int8", "nf4"]
BLOCK = 64
"""Entries of a weight that share a scale in ``nf4``."""

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Which kernels one could download: said on every import of bitsandbytes, by PEFT too.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class QuantizedLinear(nn.Linear):
    """A frozen linear map with a quantised weight, and a bias as it was.

    ``weight`` holds the codes, as in bitsandbytes' own modules, and ``scales`` the scales: parameters without gradient,
    which move and are saved like any. What wants to add to the weight, such as merging in PEFT, fails at their dtype.

    Args:
        base: an ``nn.Linear`` or GPT-2's ``Conv1D``; its bias is taken over, not copied.
        kind: how the weight is stored.

    Raises:
        BackboneError: if bitsandbytes is not installed, or a weight is not finite.
    """

    def __init__(self, base: nn.Module, kind: Kind) -> None:
        nn.Module.__init__(self)
        site = site_of(base)
        assert site is not None
        self.in_features, self.out_features = site.in_features, site.out_features
        self.kind, self.conv1d = kind, is_conv1d(base)
        weight: Tensor = base.weight.detach()  # type: ignore[operator]
        if not bool(weight.isfinite().all()):
            raise BackboneError(f"backbone.quantization={kind}: expected finite weights, got NaN or infinite ones")
        codes, scales = _quantized((weight.t() if self.conv1d else weight).contiguous(), kind)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        bias = base.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        self.register_parameter("bias", bias)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map to ``x`` of shape ``(..., in)``; gives ``(..., out)``, in autocast's dtype where that is on."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for, shape ``(out, in)``: a copy, made anew at every call."""
        kernel = dtype if dtype in _KERNEL_DTYPES else torch.float32
        if self.kind == "int8":
            weight = self.weight.to(kernel).mul_(self.scales.float().unsqueeze(1).mul(1.0 / 127.0))
        else:
            weight = self._from_nf4(kernel)
        return weight.to(dtype)

    def _from_nf4(self, dtype: torch.dtype) -> Tensor:
        """Codes run over all rows, so rows of an odd length are read as one, of an even length."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        shape, count = (self.out_features, self.in_features), self.out_features * self.in_features
        read = torch.Size(shape if self.in_features % 2 == 0 else (1, count + count % 2))
        state = QuantState(self.scales.float(), shape=read, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
        weight: Tensor = dequantize_4bit(self.weight, state)
        return weight.flatten()[:count].view(shape)

    def restored(self) -> nn.Module:
        """A module of the kind that was quantised, with the weight that the codes stand for in float32."""
        if self.conv1d:
            from transformers.pytorch_utils import Conv1D

            module: nn.Module = Conv1D(self.out_features, self.in_features)
            module.weight = nn.Parameter(self.dequantized().t().contiguous(), requires_grad=False)
        else:
            module = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, bias=self.bias is not None)
            module.weight = nn.Parameter(self.dequantized(), requires_grad=False)
        module.bias = self.bias
        return module.train(self.training)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{super().extra_repr()}, kind={self.kind}"


class _Product(torch.autograd.Function):
    """``x @ W.T``; W is made anew for the gradient, so that a training step never holds more than one of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: QuantizedLinear) -> Tensor:
        ctx.module = module
        return F.linear(x, module.dequantized(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.module.dequantized(gradient.dtype), None


def _quantized(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight ``(out, in)``, by bitsandbytes."""
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise BackboneError(
            f"backbone.quantization={kind}: bitsandbytes cannot be imported ({error}): "
            "pip install 'autolora[quantization]'"
        ) from None
    if kind == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return codes, scales
    codes, state = functional.quantize_4bit(weight.float(), blocksize=BLOCK, quant_type="nf4")
    return codes, state.absmax


def quantized_modules(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantised modules of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def count_weights(model: nn.Module) -> int:
    """The parameters of a model, where a quantised module counts as many as it had before."""
    stored = sum(p.numel() for p in model.parameters())
    return stored + sum(
        module.in_features * module.out_features - module.weight.numel() - module.scales.numel()
        for module in quantized_modules(model).values()
    )


def check_device(model: nn.Module, device: torch.device) -> None:
    """Try on a device a weight of each kind that the model has.

    Raises:
        BackboneError: if its kernels are missing there.
    """
    for kind in sorted({module.kind for module in quantized_modules(model).values()}):
        probe = QuantizedLinear(nn.Linear(2 * BLOCK, 2), kind)
        try:
            probe.to(device)(torch.zeros(1, 2 * BLOCK, device=device))
        except (NotImplementedError, RuntimeError, AssertionError) as error:
            raise BackboneError(
                f"backbone.quantization={kind}: bitsandbytes cannot do this on {device} "
                f"({str(error).splitlines()[0]}): use trainer.accelerator=cpu, or backbone.quantization=none"
            ) from None
