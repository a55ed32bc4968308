"""The posterior over the adapter: its mean, and the channel noise along the subspace (method, section 2)."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NoiseChannel:
    """The channel noise: what a layer reads of the pattern is mixed at random, ``x -> x + kappa V' G V x``.

    ``G [k, k]`` has independent entries of variance 1/k, so that kappa is the noise-to-signal ratio of the channel. In weights
    it is ``(W + dW) V' kappa G V``: noise as large as what the layer makes of the pattern, and none where it ignores it.

    A step has `DRAWS` draws for each layer, a function of (seed, step, layer) alone, the same on every process; the row at
    position i of an epoch takes draw ``i mod DRAWS``. Only training forwards are disturbed: in eval mode, when saving and
    when merging, the mean is used.

    Args:
        layers: adapted layers, by name.
        subspaces: V_l ``[k, d_in]``, by name.
        adapter: the adapter's name.
        projected_weight: where ``lora_A`` is V_l but for a factor: what the base layer makes of its output, in LoRA's units ``[d_out, k]``, by
            name. The noise then goes through LoRA's own factors, at one thin product a layer; otherwise it is added to the
            layer's input, at two.
    """

    DRAWS = 16

    def __init__(
        self,
        layers: dict[str, nn.Module],
        subspaces: dict[str, Tensor],
        adapter: str,
        projected_weight: dict[str, Tensor] | None = None,
    ):
        self.subspaces, self.projected_weight = subspaces, projected_weight
        self.probing = False
        self.noise: dict[str, Tensor] = {}
        self.positions: Tensor | None = None  # of the rows of the next forward, [n]; None: one after the other
        self.mixed: dict[str, Tensor] = {}
        self.on_patches = {name: isinstance(layer.get_base_layer(), nn.Conv2d) for name, layer in layers.items()}
        self.handles = []
        for name, layer in layers.items():
            if projected_weight is None:
                self.handles.append(layer.register_forward_pre_hook(self._on_input(name)))
            else:
                self.handles.append(layer.lora_A[adapter].register_forward_hook(self._on_code(name)))
                self.handles.append(layer.lora_B[adapter].register_forward_hook(self._on_output(name)))

    def _off(self, module: nn.Module) -> bool:
        return not self.noise or not (module.training or self.probing)

    def _on_code(self, name: str):
        def hook(module, inputs, code):
            if self._off(module):
                return None
            self.mixed[name] = self._mix(name, code)
            return code + self.mixed[name]

        return hook

    def _on_output(self, name: str):
        def hook(module, inputs, output):
            if self._off(module):
                return None
            mixed = self.mixed.pop(name)
            read = self.projected_weight[name].to(mixed.dtype)
            if self.on_patches[name]:
                return output + F.conv2d(mixed, read[:, :, None, None])
            if mixed.ndim == 3:  # in place: an output is a large thing to copy
                return output.baddbmm_(mixed, read.T.expand(len(mixed), *read.T.shape))
            return torch.addmm(output.flatten(0, -2), mixed.flatten(0, -2), read.T).view(output.shape)

        return hook

    def _on_input(self, name: str):
        def hook(module, inputs):
            if self._off(module):
                return None
            (x, *rest), base = inputs, module.get_base_layer()
            subspace = self.subspaces[name].to(x.dtype)
            if not self.on_patches[name]:
                return x + self._mix(name, F.linear(x, subspace)) @ subspace, *rest
            kernel = subspace.view(len(subspace), *base.weight.shape[1:])
            mixed = self._mix(name, F.conv2d(x, kernel, None, base.stride, 0, base.dilation))
            back = F.conv_transpose2d(mixed, kernel, None, base.stride, 0, 0, 1, base.dilation)
            return x + F.pad(back, (0, x.shape[-1] - back.shape[-1], 0, x.shape[-2] - back.shape[-2])), *rest

        return hook

    def _mix(self, name: str, code: Tensor) -> Tensor:
        """``kappa G`` of each row's draw applied to its codes, ``[n, ..., k]`` or, on patches, ``[n, k, h, w]``."""
        noise = self.noise[name][self._draws(code)].to(code.dtype)
        if self.on_patches[name]:
            return torch.bmm(code.flatten(2).mT, noise).mT.reshape(code.shape)
        return torch.bmm(code.reshape(len(code), -1, code.shape[-1]), noise).view(code.shape)

    def _draws(self, x: Tensor) -> Tensor:
        rows = torch.arange(len(x), device=x.device) if self.positions is None else self.positions
        if len(x) % len(rows):  # no examples, but something all of them share: a table of relative positions
            rows = torch.arange(len(x), device=x.device)
        elif len(rows) != len(x):  # windows of a picture, one after the other
            rows = rows.repeat_interleave(len(x) // len(rows))
        return rows % self.DRAWS

    @contextmanager
    def in_eval_mode(self):
        """Disturb forwards in eval mode too, to measure what the noise does; none is left afterwards."""
        self.probing = True
        try:
            yield
        finally:
            self.probing = False
            self.silence()

    def draw(self, kappa: float, seed: int, step: int, device: torch.device) -> None:
        """Draw ``kappa G`` of a step."""
        generator = torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)
        k = len(next(iter(self.subspaces.values())))
        shape = (len(self.subspaces), self.DRAWS, k, k)
        draws = torch.randn(shape, generator=generator, device=device) * (kappa / k**0.5)
        self.noise = dict(zip(self.subspaces, draws.unbind(), strict=True))

    def silence(self) -> None:
        """No noise until the next draw."""
        self.noise, self.positions, self.mixed = {}, None, {}

    def remove(self) -> None:
        """Take the hooks off the model."""
        self.silence()
        for handle in self.handles:
            handle.remove()
