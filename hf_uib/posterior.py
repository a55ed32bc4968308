"""The posterior over the adapter: its mean, the channel noise along the subspace, and the divergence from the prior.

Docs: docs/method.md, sections 2 and 3a.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contrast import ContrastStatistics
from .divergence import outside
from .lora import AdaptedLayer, is_fresh, weight_matrix
from .pattern_tokens import PatternTokens
from .schedule import noise_scale
from .settings import ChannelSettings
from .short_texts import ShortTexts


class LayerTensors(nn.Module):
    """Buffers by layer name; in a state dict the dots of the names are slashes."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        self.names = list(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "/"), tensor.detach().clone())

    def __getitem__(self, name: str) -> Tensor:
        return self.get_buffer(name.replace(".", "/"))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def items(self) -> list[tuple[str, Tensor]]:
        """Names and tensors."""
        return [(name, self[name]) for name in self.names]


@dataclass(frozen=True)
class LayersAlike:
    """m layers whose factors have the same shapes.

    Attributes:
        names: of the layers.
        subspaces: V_l, ``[m, k, d_in]``; scalings: LoRA's s, ``[m]``.
    """

    names: list[str]
    subspaces: Tensor
    scalings: Tensor


class ChannelPosterior(nn.Module):
    r"""``q(dW_l) = N(s B_l A_l, (kappa^2 / k) M_l M_l' (x) V_l' V_l + floor^2 I)``, with ``M_l = (W_l + s B_l A_l) V_l'``.

    The mean is the LoRA adapter in the model; its channel noise is drawn in training forwards (see `ChannelNoise`). Everything else
    that a resumed run needs is in buffers, so that `state_dict` is the state.

    Args:
        layers: adapted layers, by name.
        adapter: the adapter's name.
        subspaces: V_l ``[k, d_in]``, by name.
        output_scales: see `ContrastStatistics`.
        a_spans_subspace: whether ``lora_A`` is a multiple of V_l, and frozen.
        settings: of the channel.
        seed: of the noise.
        unreached: layers to which no gradient comes.
        tokens: the channel at the model's input.
    """

    noise_to_signal: Tensor
    swap_fraction: Tensor
    cumulative_kl: Tensor
    a_spans_subspace: Tensor
    reached: Tensor

    def __init__(
        self,
        layers: dict[str, AdaptedLayer],
        adapter: str,
        subspaces: Mapping[str, Tensor],
        output_scales: Mapping[str, Tensor],
        a_spans_subspace: bool,
        settings: ChannelSettings,
        seed: int = 0,
        unreached: Collection[str] = (),
        tokens: PatternTokens | None = None,
    ):
        super().__init__()
        self.tokens = tokens
        self.short_texts = None if tokens is None or settings.short_texts == 0 else ShortTexts()
        self.layers, self.adapter, self.settings, self.seed = layers, adapter, settings, seed
        self.subspaces = LayerTensors({name: subspaces[name] for name in layers})
        self.output_scales = LayerTensors({name: output_scales[name] for name in layers})
        self.register_buffer("noise_to_signal", torch.tensor(0.0, dtype=torch.float64))  # kappa of the first step
        self.register_buffer("swap_fraction", torch.tensor(0.0))  # of the retained rows of a step
        self.register_buffer("cumulative_kl", torch.zeros(len(layers), dtype=torch.float64))  # of the refreshes so far
        self.register_buffer("a_spans_subspace", torch.tensor(a_spans_subspace))
        self.register_buffer("reached", torch.tensor([name not in unreached for name in layers]))
        self._spans = a_spans_subspace
        self.gains = (
            {name: code_gain(output_scales[name], settings).item() for name in layers} if a_spans_subspace else {}
        )
        self.groups = self._layers_alike()
        self.floors = torch.stack([settings.floor * scale for _, scale in self.output_scales.items()])
        order = [list(layers).index(name) for group in self.groups for name in group.names]
        grouped = torch.tensor(order, device=self.floors.device)  # numbers of the layers, in the groups' order
        self._ungrouped, self._floors = grouped.argsort(), self.floors[grouped]
        # What narrows reads what the layer before it has disturbed; keys and values of few heads read what the queries read
        first = first_with_same(dict(self.subspaces.items()))
        wide = {
            first[name]
            for name, layer in layers.items()
            if len(layer.lora_B[adapter].weight) >= subspaces[name].shape[1]
        }
        noisy = [name for name in layers if first[name] in wide] or list(layers)
        in_lora_units = {
            name: weight_matrix(layers[name]).detach().float() @ self.subspaces[name].T / self._unit(name)
            for name in (noisy if a_spans_subspace else ())
        }
        self.noise = ChannelNoise(
            {name: layers[name] for name in noisy},
            {name: self.subspaces[name] for name in noisy},
            adapter,
            {name: first[name] for name in noisy},
            in_lora_units or None,
        )
        self.set_prior_mean()

    @classmethod
    def from_contrast(
        cls,
        layers: dict[str, AdaptedLayer],
        adapter: str,
        contrast: ContrastStatistics,
        train_a: bool,
        settings: ChannelSettings,
        seed: int = 0,
        tokens: PatternTokens | None = None,
    ) -> "ChannelPosterior":
        """The posterior of a run that begins. Where B alone is trained, a new adapter gets a multiple of V_l as its A; where both
        are, A is left as PEFT drew it."""
        fits = {
            name: layer.lora_A[adapter].weight.flatten(1).shape == contrast.subspaces[name].shape
            for name, layer in layers.items()
        }
        to_subspace = not train_a and is_fresh(layers, adapter)
        if to_subspace:
            for name, layer in layers.items():
                factor = layer.lora_A[adapter].weight
                if fits[name]:
                    gain = code_gain(contrast.output_scales[name], settings)
                    factor.data.copy_((contrast.subspaces[name] * gain).view_as(factor))
        spans = to_subspace and all(fits.values())
        scales = contrast.output_scales
        return cls(layers, adapter, contrast.subspaces, scales, spans, settings, seed, contrast.unreached, tokens)

    @classmethod
    def from_state(
        cls,
        layers: dict[str, AdaptedLayer],
        adapter: str,
        state: dict[str, Tensor],
        settings: ChannelSettings,
        seed: int = 0,
        tokens: PatternTokens | None = None,
    ) -> "ChannelPosterior":
        """The posterior of a run that is resumed, from `state_dict`."""

        def of_layers(kind: str) -> dict[str, Tensor]:
            return {name: state[f"{kind}.{name.replace('.', '/')}"] for name in layers}

        spans = bool(state["a_spans_subspace"])
        scales = of_layers("output_scales")
        posterior = cls(layers, adapter, of_layers("subspaces"), scales, spans, settings, seed, tokens=tokens)
        if tokens is not None and "tokens.positions" in state:
            tokens.positions = state["tokens.positions"]
            tokens.donors, tokens.weights = state["tokens.donors"].cpu(), state["tokens.weights"].cpu()
        means_a, means_b = of_layers("prior_means_a"), of_layers("prior_means_b")
        posterior.set_prior_mean({name: (means_a[name], means_b[name]) for name in layers})
        posterior.noise_to_signal.copy_(state["noise_to_signal"])
        if "swap_fraction" in state:
            posterior.swap_fraction.copy_(state["swap_fraction"])
        posterior.cumulative_kl.copy_(state["cumulative_kl"])
        if "reached" in state:
            posterior.reached.copy_(state["reached"])
        return posterior

    @property
    def unreached(self) -> list[str]:
        """Layers to which no gradient comes, and which are left untrained."""
        return [name for name, reached in zip(self.layers, self.reached.tolist(), strict=True) if not reached]

    @property
    def along_is_free(self) -> bool:
        """Whether the prior is flat along V_l: where there is noise along it, unless all that is trained lies along it."""
        return not self._spans and self.noise_to_signal.item() > 0

    # ---- The mean ----

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A ``[r, d_in]`` and B ``[d_out, r]`` of a layer; a convolution's kernel counts as inputs."""
        layer = self.layers[name]
        return layer.lora_A[self.adapter].weight.flatten(1), layer.lora_B[self.adapter].weight.flatten(1)

    def _unit(self, name: str) -> float:
        return self.layers[name].scaling[self.adapter] * self.gains.get(name, 1.0)

    def _layers_alike(self) -> list["LayersAlike"]:
        """The layers by the shapes of their factors: those of one shape are multiplied together."""
        groups: dict[tuple, list[str]] = {}
        for name in self.layers:
            groups.setdefault(tuple((factor.shape, factor.dtype) for factor in self.factors(name)), []).append(name)
        return [
            LayersAlike(
                names,
                subspaces := torch.stack([self.subspaces[name] for name in names]),
                torch.tensor([self.layers[name].scaling[self.adapter] for name in names], device=subspaces.device),
            )
            for names in groups.values()
        ]

    def _stacked(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """A and B of all layers, group by group."""
        return [
            (
                torch.stack([factors[name][0] for name in group.names]),
                torch.stack([factors[name][1] for name in group.names]),
            )
            for group in self.groups
        ]

    # ---- The noise ----

    def draw(self, step: int, total: int) -> None:
        """Draw the channel noise of an optimizer step. It stays until the next draw, so that gradient checkpointing, which runs
        forwards again in the backward pass, finds it."""
        scale = self.noise_to_signal.item() * noise_scale(step, total)
        if scale > 0:
            self.noise.draw(scale, self.seed, step)
        else:
            self.noise.silence()
        if self.tokens is not None:
            self.tokens.draw(self.swap_fraction.item(), self.seed, step)
        if self.short_texts is not None:
            self.short_texts.draw(self.seed, step)

    def set_batch(self, rows: Tensor, retained: int, attention_mask: Tensor | None) -> None:
        """What the next forward gets: each row's position in the epoch, how many are retained rows (they come first), the mask."""
        self.noise.set_rows(rows)
        if self.tokens is not None:
            self.tokens.rows, self.tokens.retained, self.tokens.attention_mask = rows, retained, attention_mask

    @property
    def replaced(self) -> Tensor | None:
        """Which tokens of the last forward came from forget rows, ``[n, tokens]``; None where none could."""
        return None if self.tokens is None else self.tokens.replaced

    def silence(self) -> None:
        """Neither noise nor tokens until the next draw."""
        self.noise.silence()
        if self.tokens is not None:
            self.tokens.silence()
        if self.short_texts is not None:
            self.short_texts.silence()

    def remove(self) -> None:
        """Take the hooks off the model."""
        self.noise.remove()
        if self.tokens is not None:
            self.tokens.silence()

    # ---- The divergence from the prior ----

    def set_prior_mean(self, factors: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> None:
        """The prior's mean: that of the posterior as it is now, or the given A and B by layer."""
        if factors is None:
            factors = {name: self.factors(name) for name in self.layers}
        self.prior_means_a = LayerTensors({name: a for name, (a, _) in factors.items()})
        self.prior_means_b = LayerTensors({name: b for name, (_, b) in factors.items()})
        self._prior = self._stacked(
            {name: (self.prior_means_a[name], self.prior_means_b[name]) for name in self.layers}
        )

    def kl_per_layer(self) -> Tensor:
        """R^(l) of section 3(a), ``[layers]``, in nats."""
        stacked = self._stacked({name: self.factors(name) for name in self.layers})
        free = self.along_is_free
        with torch.autocast(self.floors.device.type, enabled=False):
            moved = [
                outside(*own, *prior, group.subspaces if free else None, group.scalings)
                for group, own, prior in zip(self.groups, stacked, self._prior, strict=True)
            ]
            return (torch.cat(moved) / (2 * self._floors**2))[self._ungrouped]

    def move_prior(self) -> None:
        """Chain rule of (2): the divergence so far is added up, and the prior's mean becomes the posterior's."""
        self.cumulative_kl += self.kl_per_layer().detach().cpu().double()
        self.set_prior_mean()


def code_gain(output_scale: Tensor, settings: ChannelSettings) -> Tensor:
    """The factor between ``lora_A`` and V_l: B is then counted in units of the channel, whatever the layer."""
    return output_scale / settings.code_scale


def first_with_same(subspaces: Mapping[str, Tensor]) -> dict[str, str]:
    """The first layer with the same subspace, by name: that of the same input."""
    first: dict[str, str] = {}
    for name, subspace in subspaces.items():
        same = (other for other in dict.fromkeys(first.values()) if torch.equal(subspaces[other], subspace))
        first[name] = next(same, name)
    return first


class ChannelNoise:
    """The channel noise: what a layer gets of the pattern is mixed at random, ``x -> x + kappa V' G V x``.

    ``G [k, k]`` has independent entries of variance 1/k, so that kappa is the noise-to-signal ratio of the channel. In weights
    it is ``(W + dW) V' kappa G V``: noise as large as what the layer makes of the pattern, and none where it ignores it.

    Layers that read one input have one subspace and one draw: what is disturbed is that input, once for all of them.
    A step has `DRAWS` draws for each, a function of (seed, step, place in the model) alone, the same on every process; the row at
    position i of an epoch takes draw ``i mod DRAWS``. Only training forwards are disturbed: in eval mode, when saving and
    when merging, the mean is used.

    Args:
        layers: adapted layers, by name.
        subspaces: V_l ``[k, d_in]``, by name.
        adapter: the adapter's name.
        first: the first layer that reads the same input, by name (`first_with_same`).
        projected_weight: where ``lora_A`` is a multiple of V_l: what the base layer makes of its output, in LoRA's units
            ``[d_out, k]``, by name. The noise then goes through LoRA's own factors, at one thin product a layer; otherwise it
            is added to the layer's input, at two.
    """

    DRAWS = 16

    def __init__(
        self,
        layers: dict[str, AdaptedLayer],
        subspaces: dict[str, Tensor],
        adapter: str,
        first: dict[str, str],
        projected_weight: dict[str, Tensor] | None = None,
    ):
        self.subspaces, self.projected_weight = subspaces, projected_weight
        self.device = next(iter(subspaces.values())).device
        self.first = first
        self.drawn = list(dict.fromkeys(self.first.values()))  # one for each subspace
        self.noise: Tensor | None = None  # of this step, [subspaces, draws, k, k]
        self.taken: dict[int, dict[str, Tensor]] = {}  # of the rows of this forward, by how many
        self.positions: Tensor | None = None  # of the rows of the next forward, [n]; None: one after the other
        self.mixed: dict[str, Tensor] = {}
        # Whose input was disturbed last, that input, and what became of it
        self.disturbed: tuple[str, Tensor, Tensor] | None = None
        self.on_patches = {name: isinstance(layer.get_base_layer(), nn.Conv2d) for name, layer in layers.items()}
        self.handles = []
        for name, layer in layers.items():
            if projected_weight is None:
                self.handles.append(layer.register_forward_pre_hook(self._on_input(name)))
            else:
                self.handles.append(layer.lora_A[adapter].register_forward_hook(self._on_code(name)))
                self.handles.append(layer.lora_B[adapter].register_forward_hook(self._on_output(name)))

    def _off(self, module: nn.Module) -> bool:
        return self.noise is None or not module.training

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
            weight = self.projected_weight[name].to(mixed.dtype)
            if self.on_patches[name]:
                return output + F.conv2d(mixed, weight[:, :, None, None])
            if mixed.ndim == 3:  # in place: an output is a large thing to copy
                return output.baddbmm_(mixed, weight.T.expand(len(mixed), *weight.T.shape))
            return torch.addmm(output.flatten(0, -2), mixed.flatten(0, -2), weight.T).view(output.shape)

        return hook

    def _on_input(self, name: str):
        def hook(module, inputs):
            if self._off(module):
                return None
            (x, *rest), base = inputs, module.get_base_layer()
            subspace = self.subspaces[name].to(x.dtype)
            if not self.on_patches[name]:
                whose, given, moved = self.disturbed or ("", None, None)
                if whose != self.first[name] or given is not x:
                    mixed = self._mix(name, F.linear(x, subspace))
                    moved = torch.addmm(x.flatten(0, -2), mixed.flatten(0, -2), subspace).view(x.shape)
                    self.disturbed = self.first[name], x, moved
                return moved, *rest
            kernel = subspace.view(len(subspace), *base.weight.shape[1:])
            mixed = self._mix(name, F.conv2d(x, kernel, None, base.stride, 0, base.dilation))
            back = F.conv_transpose2d(mixed, kernel, None, base.stride, 0, 0, 1, base.dilation)
            return x + F.pad(back, (0, x.shape[-1] - back.shape[-1], 0, x.shape[-2] - back.shape[-2])), *rest

        return hook

    def _mix(self, name: str, code: Tensor) -> Tensor:
        """``kappa G`` of each row's draw applied to its codes, ``[n, ..., k]`` or, on patches, ``[n, k, h, w]``."""
        noise = self._noise_of(code)[self.first[name]].to(code.dtype)
        if self.on_patches[name]:
            return torch.bmm(code.flatten(2).mT, noise).mT.reshape(code.shape)
        return torch.bmm(code.reshape(len(code), -1, code.shape[-1]), noise).view(code.shape)

    def _noise_of(self, x: Tensor) -> dict[str, Tensor]:
        """``kappa G`` of the rows of ``x``, ``[n, k, k]``, for each subspace; taken once for all layers that get the same rows."""
        if len(x) not in self.taken:
            noise = cast(Tensor, self.noise)
            self.taken[len(x)] = dict(zip(self.drawn, noise[:, self._draws(x)].unbind(), strict=True))
        return self.taken[len(x)]

    def _draws(self, x: Tensor) -> Tensor:
        rows = torch.arange(len(x), device=x.device) if self.positions is None else self.positions
        if len(x) % len(rows):  # no examples, but something all of them share: a table of relative positions
            rows = torch.arange(len(x), device=x.device)
        elif len(rows) != len(x):  # windows of a picture, one after the other
            rows = rows.repeat_interleave(len(x) // len(rows))
        return rows % self.DRAWS

    def draw(self, kappa: float, seed: int, step: int) -> None:
        """Draw ``kappa G`` of a step."""
        device = self.device
        generator = torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)
        k = len(next(iter(self.subspaces.values())))
        shape = (len(self.drawn), self.DRAWS, k, k)
        self.noise = torch.randn(shape, generator=generator, device=device) * (kappa / k**0.5)
        self.taken, self.disturbed = {}, None

    def set_rows(self, positions: Tensor) -> None:
        """Positions in the epoch of the rows of the next forward, ``[n]``."""
        self.positions, self.taken, self.disturbed = positions, {}, None

    def silence(self) -> None:
        """No noise until the next draw."""
        self.noise, self.taken, self.positions, self.mixed = None, {}, None, {}
        self.disturbed = None

    def remove(self) -> None:
        """Take the hooks off the model."""
        self.silence()
        for handle in self.handles:
            handle.remove()
