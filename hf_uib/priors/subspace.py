"""Where the change in the distribution lives: the contrast C_l and its subspace V_l (method, section 3a)."""

from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bound import margin

DENSE_BUDGET = 2**26  # entries of C_l kept dense over all layers and halves; 256 MB in float32


@dataclass
class LayerStatistics:
    """Sums of one adapted layer over both samples; every entry is additive over batches and processes.

    Attributes:
        contrast: ``[2, rows, d_in]``, the sum of ``dm/dW`` of the forget set minus that of the retained set, each divided
            by its own number of examples, for the two halves of the samples. ``rows`` is ``d_out``, or the number of rows of
            ``sketch [rows, d_out]``, which is then applied from the left.
        range: in the second pass of a wide layer, ``C_l @ basis``: ``[d_out, rows]``.
        inputs: ``[d_in]``, sum of the layer's inputs; `outputs`: sum of squares of W x; `tokens`: how many inputs.
    """

    contrast: Tensor
    inputs: Tensor
    outputs: Tensor
    tokens: Tensor
    sketch: Tensor | None = None
    basis: Tensor | None = None
    range: Tensor | None = None
    bias: Tensor | None = field(default=None, repr=False)

    def tensors(self) -> list[Tensor]:
        """The additive entries."""
        return [t for t in (self.contrast, self.range, self.inputs, self.outputs, self.tokens) if t is not None]

    def mean_input(self) -> Tensor:
        """``[d_in]``."""
        return self.inputs / self.tokens

    def signal(self) -> Tensor:
        """rms of W x per output, without the bias."""
        return (self.outputs / self.tokens / self.range_rows).sqrt()

    range_rows: int = 1  # d_out


def new_statistics(layers: dict[str, nn.Module], rank: int, seed: int = 0) -> dict[str, LayerStatistics]:
    """Empty statistics for linear ``layers``; the widest are sketched until the dense ones fit `DENSE_BUDGET`.

    A sketch has ``2 k + 8`` rows (Halko, Martinsson and Tropp, 2011), and a second pass then gives ``C_l`` on its range.
    """
    entries = sum(2 * layer.weight.numel() for layer in layers.values())
    statistics = {}
    for index, (name, layer) in enumerate(layers.items()):
        d_out, d_in = layer.weight.flatten(1).shape
        device, rows, sketch = layer.weight.device, d_out, None
        if entries > DENSE_BUDGET and d_out > 4 * rank + 16:
            rows = 2 * rank + 8
            generator = torch.Generator().manual_seed(seed + index)
            sketch = (torch.randn(rows, d_out, generator=generator) / rows**0.5).to(device)
        statistics[name] = LayerStatistics(
            contrast=torch.zeros(2, rows, d_in, device=device),
            inputs=torch.zeros(d_in, device=device, dtype=torch.float64),
            outputs=torch.zeros((), device=device, dtype=torch.float64),
            tokens=torch.zeros((), device=device, dtype=torch.float64),
            sketch=sketch,
            bias=layer.bias,
            range_rows=d_out,
        )
    return statistics


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """The inputs of a linear layer, or of a convolution seen as a linear layer on patches, one a row: ``[tokens, d_in]``."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    if isinstance(base, nn.Conv2d):
        return F.unfold(x, base.kernel_size, base.dilation, base.padding, base.stride).transpose(1, 2).flatten(0, 1)
    return x.flatten(0, -2)


def output_rows(y: Tensor) -> Tensor:
    """Outputs or their gradients, one a row: ``[tokens, d_out]``. Four dimensions are a convolution's channels and places."""
    return y.flatten(2).transpose(1, 2).flatten(0, 1) if y.ndim == 4 else y.flatten(0, -2)


@contextmanager
def _recording(modules: dict[str, nn.Module], statistics: dict[str, LayerStatistics], weight: float, half: int):
    """Hooks that add ``weight * sum_t g_t x_t'`` of a backward pass to the statistics of each module."""

    def hook_of(stats: LayerStatistics):
        def hook(module, inputs, output):
            x = input_rows(module, inputs[0].detach()).float()
            signal = output_rows(output.detach()).float()
            if stats.bias is not None:
                signal = signal - stats.bias.detach().float()
            if stats.basis is None:
                stats.inputs += x.sum(0)
                stats.outputs += signal.square().sum()
                stats.tokens += len(x)

            def on_gradient(gradient):
                g = output_rows(gradient).float()
                if stats.basis is not None:
                    stats.range += weight * (g.T @ (x @ stats.basis))
                else:
                    g = g if stats.sketch is None else g @ stats.sketch.T
                    stats.contrast[half] += weight * (g.T @ x)

            output.register_hook(on_gradient)

        return hook

    handles = [modules[name].register_forward_hook(hook_of(stats)) for name, stats in statistics.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def accumulate(
    model: nn.Module,
    modules: dict[str, nn.Module],
    statistics: dict[str, LayerStatistics],
    batches: Iterable[tuple[dict[str, Tensor], float, int]],
) -> None:
    """Add the margin gradients of ``batches`` to ``statistics``.

    Args:
        model: the classifier; call in eval mode.
        modules: the adapted layers, whose outputs must require grad.
        statistics: from `new_statistics`; changed in place.
        batches: ``(inputs with labels, weight, half)``. The weight is ``+1/n`` for a forget and ``-1/n`` for a retained
            example, ``half`` (0 or 1) the half of the sample it belongs to.
    """
    for inputs, weight, half in batches:
        with _recording(modules, statistics, weight, half):
            labels = inputs["labels"]
            logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
            torch.autograd.backward(margin(logits, labels).sum(), inputs=_leaves(model))


def _leaves(model: nn.Module) -> list[nn.Parameter]:
    # The gradient hooks fire on the way to the earliest trainable weight; gradients left there are cleared by the caller.
    return [p for p in model.parameters() if p.requires_grad]


def subspace(stats: LayerStatistics, rank: int) -> Tensor:
    """V_l: the top right singular vectors of C_l, made orthogonal to the layer's mean input.

    Noise along the mean input would only be a random bias, so that direction is projected out of ``C_l`` first.

    Returns:
        ``[rank, d_in]`` with orthonormal rows; zero rows where ``d_in`` leaves no further direction.
    """
    rows = (stats.contrast.sum(0) if stats.range is None else stats.range @ stats.basis.T).double()
    d_in = rows.shape[1]
    mean = stats.mean_input().double()
    if mean.norm() > 0:
        mean = mean / mean.norm()
        rows = rows - torch.outer(rows @ mean, mean)
        # The mean comes first, by far the longest: every other singular vector is then orthogonal to it, those that only
        # fill up a contrast of low rank included.
        rows = torch.cat([mean[None] * (2 * rows.norm() + 1), rows])
        found = top_right_singular_vectors(rows, rank + 1)[1:]
    else:
        found = top_right_singular_vectors(rows, rank)
    return torch.cat([found, found.new_zeros(rank - len(found), d_in)]).float()


def top_right_singular_vectors(matrix: Tensor, count: int) -> Tensor:
    """``[min(count, columns), columns]`` orthonormal rows, in order of falling singular value.

    Large matrices go through the eigenvectors of the smaller Gram matrix, an order faster and as good for the top ones.
    """
    rows, columns = matrix.shape
    count = min(count, columns)
    if min(rows, columns) > 256:
        if rows < columns:
            vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)[:, :count].T @ matrix
        else:
            vectors = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)[:, :count].T
        return torch.linalg.qr(vectors.T).Q.T
    if rows < count:
        matrix = torch.cat([matrix, matrix.new_zeros(count - rows, columns)])
    return torch.linalg.svd(matrix, full_matrices=False).Vh[:count]


def begin_second_pass(statistics: dict[str, LayerStatistics], rank: int) -> bool:
    """Turn the sketches into bases for the second pass; False when no layer was sketched."""
    sketched = [stats for stats in statistics.values() if stats.sketch is not None]
    for stats in sketched:
        stats.basis = torch.linalg.qr(stats.contrast.sum(0).T.double()).Q.float()
        stats.range = torch.zeros(stats.range_rows, stats.basis.shape[1], device=stats.basis.device)
    return bool(sketched)


def reliability(statistics: dict[str, LayerStatistics]) -> float:
    """How much of the contrast is signal: cosine between the contrasts of the two halves of the samples, over all layers.

    Near 1 for a systematic pattern, near 0 where the forget set is a random draw and C_l is sampling noise. Halves are
    scaled to the same size, so by Spearman-Brown ``2 c / (1 + c)`` is the reliability of the whole sample; the plain cosine
    is returned. A sketch keeps inner products in expectation, so wide layers count alike.
    """
    products = [(s.contrast[0] * s.contrast[1]).sum().double() for s in statistics.values()]
    lengths = [s.contrast[i].square().sum().double() for s in statistics.values() for i in (0, 1)]
    first, second = sum(lengths[::2]), sum(lengths[1::2])
    return (sum(products) / (first * second).sqrt().clamp_min(1e-300)).item()


def energy(stats: LayerStatistics) -> float:
    """|C_l|, the length of the contrast: nats of margin per unit of weight."""
    return stats.contrast.sum(0).norm().item()
