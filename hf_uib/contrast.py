"""Where the change in the distribution lives: the contrast C_l and its subspace V_l (method, section 3a)."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .lora import base_of, matrix_shape
from .objective import margin, wide_dtype
from .sharding import whole

PROBE_ROWS = 32  # of the forget set, for the length of the pattern's code
TINY = 1e-6  # no division by zero
NULL = 1e-6  # singular values under this share of the largest are rounding
CHUNKS = 6  # of each look at the samples, in the test of `pattern_z`


@dataclass
class LayerStatistics:
    """Sums of one adapted layer over samples of both sets, additive over batches and processes.

    Attributes:
        contrast: C_l so far, ``[rows, d_in]``: the mean of ``dm/dW`` on the forget set minus that on the retained set.
            ``rows`` is ``d_out``, or that of ``sketch [rows, d_out]``, which is then applied from the left.
        chunk: what the chunk of the samples in hand adds to it.
        direction: the contrast of the chunks before, of length 1: what this chunk's scores are taken along.
        inputs: ``[d_in]``, sum of the layer's inputs; outputs: sum of squares of W x; tokens: how many inputs.
        reached: how many gradients came back to the layer.
        reads_with: the first of the layers that read this one's input (queries, keys and values read one).
    """

    contrast: Tensor
    chunk: Tensor
    inputs: Tensor
    outputs: Tensor
    tokens: Tensor
    reached: Tensor
    d_out: int
    bias: Tensor | None = field(repr=False, default=None)
    sketch: Tensor | None = None
    direction: Tensor | None = None
    reads_with: str | None = None

    def take_chunk(self) -> None:
        """Add the chunk to the contrast and aim the next one's scores along the result."""
        self.contrast += self.chunk
        self.chunk.zero_()
        self.direction = self.contrast / self.contrast.norm().clamp_min(1e-30)

    def mean_input(self) -> Tensor:
        """``[d_in]``."""
        return self.inputs / self.tokens.clamp_min(1)

    def signal(self) -> Tensor:
        """rms of W x per output, without the bias."""
        return (self.outputs / self.tokens.clamp_min(1) / self.d_out).sqrt()


def new_statistics(layers: dict[str, Any], rank: int, seed: int = 0) -> dict[str, LayerStatistics]:
    """Empty statistics for linear ``layers``. Of wide ones a random sketch of ``2 k + 8`` rows is kept (Halko, Martinsson and
    Tropp, 2011): its right singular vectors are nearly those of ``C_l``, and its products are thin.
    """
    statistics = {}
    for index, (name, layer) in enumerate(layers.items()):
        d_out, d_in = matrix_shape(layer)
        device, rows, sketch = layer.weight.device, d_out, None
        if d_out > 4 * rank + 16:
            rows = 2 * rank + 8
            generator = torch.Generator().manual_seed(seed + index)
            sketch = (torch.randn(rows, d_out, generator=generator) / rows**0.5).to(device)
        statistics[name] = LayerStatistics(
            contrast=torch.zeros(rows, d_in, device=device),
            chunk=torch.zeros(rows, d_in, device=device),
            inputs=torch.zeros(d_in, device=device, dtype=wide_dtype(device)),
            outputs=torch.zeros((), device=device, dtype=wide_dtype(device)),
            tokens=torch.zeros((), device=device, dtype=wide_dtype(device)),
            reached=torch.zeros((), device=device),
            d_out=d_out,
            bias=None if layer.bias is None else whole(layer.bias.detach()),
            sketch=sketch,
        )
    return statistics


def in_double(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (tensor if wide_dtype(tensor.device) == torch.float64 else tensor.cpu()).double()


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """The inputs of a linear layer, or of a convolution seen as a linear layer on patches, one a row: ``[tokens, d_in]``."""
    base = base_of(module)
    if isinstance(base, nn.Conv2d):
        return (
            F.unfold(x, base.kernel_size, base.dilation, cast(tuple[int, ...], base.padding), base.stride)
            .transpose(1, 2)
            .flatten(0, 1)
        )
    return x.flatten(0, -2)


def output_rows(module: nn.Module, y: Tensor) -> Tensor:
    """Its outputs or their gradients, one a row: ``[tokens, d_out]``."""
    return y.flatten(2).transpose(1, 2).flatten(0, 1) if isinstance(base_of(module), nn.Conv2d) else y.flatten(0, -2)


class _Kept(torch.autograd.Function):
    """Keeps a tensor as autograd does: in a block that is computed again on the way back it is too."""

    @staticmethod
    def forward(ctx, leaf: Tensor, x: Tensor) -> Tensor:
        """Of a leaf that requires grad."""
        ctx.save_for_backward(x)
        return leaf.clone()


class _Recording:
    """Hooks that add ``weight * sum_t g_t x_t'`` of a backward pass to the statistics of each module, for a ``with`` block.

    Args:
        blocks: of which the input alone is kept for the way back, where they are computed again (gradient checkpointing).
    """

    def __init__(
        self, modules: dict[str, Any], statistics: dict[str, LayerStatistics], weight: float, scores, blocks=()
    ):
        self.modules, self.statistics, self.weight, self.scores = modules, statistics, weight, scores
        self.blocks, self.again = blocks, False
        self.leaf = torch.zeros((), requires_grad=True)
        self.last: tuple[str, Tensor | None] = "", None  # a layer, and the input that it and those after it read

    def __enter__(self) -> None:
        self.handles = [
            self.modules[name].register_forward_hook(partial(self._on_forward, name)) for name in self.statistics
        ]
        self.forwards = [(block, vars(block).get("forward")) for block in self.blocks]
        self.on_gradients: list[Any] = []
        for block in self.blocks:
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, context_fn=lambda: (nullcontext(), self._once_more())
            )

    def __exit__(self, *error) -> None:
        for block, forward in self.forwards:
            del block.forward
            if forward is not None:
                block.forward = forward
        # A hook on an output that leads back to that output would keep all of the pass in memory
        for handle in self.handles + self.on_gradients:
            handle.remove()

    @contextmanager
    def _once_more(self):
        self.again = True
        try:
            yield
        finally:
            self.again = False

    def _on_forward(self, name: str, module, inputs, output) -> Tensor | None:
        begins = torch.is_grad_enabled() and not output.requires_grad
        if begins:  # a layer before which nothing is trained: gradients go as far as here
            output = output.detach().requires_grad_().clone()
        # As it came: in float32 it would be a copy
        kept = _Kept.apply(self.leaf, inputs[0].detach()) if output.requires_grad else None
        if not self.again:
            stats = self.statistics[name]
            patches = isinstance(base_of(module), nn.Conv2d)
            if patches or inputs[0] is not self.last[1]:
                self.last = name, None if patches else inputs[0]
            stats.reads_with = self.last[0]
            x = input_rows(module, inputs[0].detach()).float()
            signal = output_rows(module, output.detach()).float()
            if stats.bias is not None:
                signal = signal - stats.bias.detach().float()
            stats.inputs += x.sum(0)
            stats.outputs += torch.linalg.vector_norm(signal).square()
            stats.tokens += len(x)
            if kept is not None:
                self.on_gradients.append(output.register_hook(partial(self._on_gradient, stats, module, kept)))
        return output if begins else None

    def _on_gradient(self, stats: LayerStatistics, module, kept, gradient: Tensor) -> None:
        given = kept.grad_fn.saved_tensors[0]
        x = input_rows(module, given).float()
        stats.reached += 1
        g = output_rows(module, gradient).float()
        g = g if stats.sketch is None else g @ stats.sketch.T
        stats.chunk += self.weight * (g.T @ x)
        if stats.direction is not None and len(given) % len(self.scores) == 0:  # else what all examples share
            self.scores.add_((g * (x @ stats.direction.T)).sum(1).view(len(self.scores), -1).sum(1))


def accumulate(
    model: nn.Module,
    modules: dict[str, Any],
    statistics: dict[str, LayerStatistics],
    batches: Iterable[tuple[dict[str, Tensor], float]],
    margin: Callable[[Tensor, Tensor], Tensor] = margin,
    blocks: Collection[nn.Module] = (),
) -> Tensor:
    """Add the margin gradients of ``batches`` to ``statistics``.

    Args:
        model: the classifier; call in eval mode.
        modules: the adapted layers.
        statistics: from `new_statistics`; changed in place.
        batches: ``(inputs with labels, weight)``; the weight is ``+1/n`` for a forget and ``-1/n`` for a retained example.
        margin: of logits and labels, ``[n]`` in nats.

    Returns:
        ``[2, 3]``: count, sum and sum of squares of the examples' scores along `LayerStatistics.direction`, for forget and
        retained rows; see `pattern_z`.
    """
    moments = torch.zeros(2, 3, dtype=torch.float64)
    for inputs, weight in batches:
        labels = inputs["labels"]
        scores = torch.zeros(len(labels), device=labels.device)
        with _Recording(modules, statistics, weight, scores, blocks):
            logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
            margin(logits, labels).sum().backward()  # gradients of weights are cleared by the caller
        s = scores.cpu().double()
        moments[int(weight < 0)] += torch.stack(
            [torch.tensor(float(len(s)), dtype=torch.float64), s.sum(), s.square().sum()]
        )
    return moments


def subspace(layers: list[LayerStatistics], rank: int) -> Tensor:
    """V_l: the top right singular vectors of C_l, made orthogonal to the layer's mean input.

    Noise along the mean input would only be a random bias, so that direction is projected out of ``C_l`` first.

    Args:
        layers: those that read one input, as one layer: their contrasts are rows of one matrix.

    Returns:
        ``[rank, d_in]`` with orthonormal rows; zero rows where ``d_in`` leaves no further direction.
    """
    rows = torch.cat([layer.contrast for layer in layers])
    device, d_in = rows.device, rows.shape[1]
    rows, mean = in_double(rows), in_double(layers[0].mean_input())
    if mean.norm() > 0:
        mean = mean / mean.norm()
        rows = rows - torch.outer(rows @ mean, mean)
        # The mean comes first, by far the longest: every other singular vector is then orthogonal to it, those that only
        # fill up a contrast of low rank included.
        rows = torch.cat([mean[None] * (2 * rows.norm() + 1), rows])
        found = top_right_singular_vectors(rows, rank + 1)[1:]
    else:
        found = top_right_singular_vectors(rows, rank)
    return torch.cat([found, found.new_zeros(rank - len(found), d_in)]).float().to(device)


def top_right_singular_vectors(matrix: Tensor, count: int) -> Tensor:
    """``[min(count, columns), columns]`` orthonormal rows, in order of falling singular value.

    Large matrices go through the eigenvectors of the smaller Gram matrix, an order faster and as good for the top ones. What a
    decomposition leaves open is settled: the largest entry of a row is positive, and where the matrix has a lower rank the rows
    are filled up with directions that do not depend on it.
    """
    rows, columns = matrix.shape
    count = min(count, columns)
    if min(rows, columns) > 256:
        small = matrix @ matrix.T if rows < columns else matrix.T @ matrix
        squares, vectors = torch.linalg.eigh(small)
        values, vectors = squares.clamp_min(0).sqrt().flip(0)[:count], vectors.flip(1)[:, :count].T
        if rows < columns:
            vectors = vectors @ matrix
    else:
        _, values, vectors = torch.linalg.svd(matrix, full_matrices=False)
        values, vectors = values[:count], vectors[:count]
    vectors = vectors[values > NULL * values.max()] if values.max() > 0 else vectors[:0]
    vectors = vectors * vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
    fill = torch.randn(
        count - len(vectors), columns, generator=torch.Generator().manual_seed(count), dtype=vectors.dtype
    )
    return _orthonormal(torch.cat([vectors, fill.to(vectors.device)]))


def _orthonormal(rows: Tensor) -> Tensor:
    """Gram and Schmidt's rows: the first one stays, each later one loses what the earlier ones have."""
    q, r = torch.linalg.qr(rows.T)
    return (q * r.diagonal().sign()).T


def pattern_z(moments: Tensor) -> float:
    """Is the contrast a pattern, or chance? A z-value: about standard normal where the forget set is a random draw.

    A row's score is the derivative of its margin along the contrast of the chunks before its own (layers alike). Where
    forget and retained rows are exchangeable their mean scores agree, chunk by chunk; under a pattern those of the forget
    set are higher, and z grows with the square root of the sample.

    Args:
        moments: ``[chunks, 2, 3]``, those of `accumulate` for each chunk, summed over processes.
    """
    moments = moments.double()
    moments = moments[(moments[:, :, 0] >= 2).all(1)]
    if not len(moments):
        return 0.0
    count, total, squares = moments.unbind(2)
    mean = total / count
    variance = (squares / count - mean**2).clamp_min(0) / (count - 1)
    difference = (mean[:, 0] - mean[:, 1]).sum()
    return (difference / variance.sum().sqrt().clamp_min(1e-300)).item()


@dataclass(frozen=True)
class ContrastStatistics:
    """What the statistics pass says of every adapted layer, by name.

    Attributes:
        subspaces: V_l, ``[k, d_in]``, orthonormal (or zero) rows; one tensor for layers that read one input.
        output_scales: what one unit of ``V_l x`` is multiplied with to be as large as the layer's output; scalars.
        norms: ``|C_l|``, the length of the contrast, in nats of margin per unit of weight.
        pattern_z: see `pattern_z`; 0 where forget and retained rows were not compared.
        unreached: layers to which no gradient came: never called, or their output is not used.
    """

    subspaces: dict[str, Tensor]
    output_scales: dict[str, Tensor]
    norms: dict[str, float]
    pattern_z: float
    unreached: list[str]


def measure_contrast(
    model: nn.Module,
    layers: dict[str, Any],
    batches: Callable[[int], Iterable[tuple[dict[str, Tensor], float]]],
    forward_forget_rows: Callable[[], object],
    *,
    rank: int,
    compared: bool,
    margin: Callable[[Tensor, Tensor], Tensor] = margin,
    random: bool = False,
    seed: int = 0,
    min_relative_scale: float = 1e-3,
    blocks: Collection[nn.Module] = (),
    looks: int = 1,
    undecided: Callable[[float], bool] = lambda z: False,
    sum_over_processes: Callable[[Iterable[Tensor]], None] = lambda tensors: None,
) -> ContrastStatistics:
    """One pass over samples of both sets, and a short one over forget rows.

    Args:
        model: with its adapter; its mode is restored.
        layers: the adapted layers.
        batches: gives this process's ``(inputs with labels, weight)`` of a chunk of the samples, numbered through all looks; the
            weights are those of one look; see `accumulate`.
        forward_forget_rows: passes some forget rows through the model.
        rank: k.
        compared: whether forget and retained rows are among the batches.
        margin: of logits and labels, ``[n]`` in nats.
        random: take random subspaces instead, for comparison.
        min_relative_scale: what is smaller, relative to the mean input or the usual output scale, counts as zero.
        blocks: see `accumulate`.
        looks: how many times there are further samples to look at.
        undecided: of ``pattern_z`` so far, whether to take the next ones.

    Raises:
        ValueError: a statistic is NaN or infinite.
    """
    training = model.training
    model.eval()
    stats = new_statistics({name: base_of(layer) for name, layer in layers.items()}, rank, seed)
    moments: list[Tensor] = []
    z = 0.0
    for look in range(1, looks + 1):
        for chunk in range(len(moments), look * CHUNKS):
            moments.append(accumulate(model, layers, stats, batches(chunk), margin, blocks))
            sum_over_processes([moments[-1], *(layer.chunk for layer in stats.values())])
            for layer in stats.values():
                layer.take_chunk()
        z = pattern_z(torch.stack(moments[1:])) if compared else 0.0
        if not undecided(z):
            break
    for layer in stats.values():
        layer.contrast /= len(moments) // CHUNKS
    sum_over_processes(
        t for layer in stats.values() for t in (layer.inputs, layer.outputs, layer.tokens, layer.reached)
    )
    model.zero_grad()
    if not all(torch.isfinite(t).all() for s in stats.values() for t in (s.contrast, s.inputs, s.outputs)):
        raise ValueError(
            "The contrast of forget and retained data is not finite; check the inputs for NaN or infinite values."
        )
    generator = torch.Generator().manual_seed(seed)
    subspaces: dict[str, Tensor] = {}
    if random:
        for layer in stats.values():
            layer.contrast = torch.randn(layer.contrast.shape, generator=generator).to(layer.contrast)
    readers = defaultdict(list)
    for name, layer in stats.items():
        readers[layer.reads_with or name].append(name)
    for names in readers.values():
        subspaces |= dict.fromkeys(names, subspace([stats[name] for name in names], rank))
    code_rms = _code_rms(layers, subspaces, forward_forget_rows, sum_over_processes)
    model.train(training)
    return ContrastStatistics(
        subspaces=subspaces,
        output_scales=_output_scales(stats, code_rms, min_relative_scale),
        norms={name: layer.contrast.norm().item() for name, layer in stats.items()},
        pattern_z=z,
        unreached=[name for name, layer in stats.items() if not layer.reached],
    )


def _code_rms(layers, subspaces, forward_forget_rows, sum_over_processes) -> dict[str, Tensor]:
    """rms of ``|V_l x|`` over some forget rows, by layer."""
    sums = {name: torch.zeros(2, device=v.device, dtype=wide_dtype(v.device)) for name, v in subspaces.items()}

    def hook_of(name: str):
        def hook(module, inputs):
            code = F.linear(input_rows(module, inputs[0]).float(), subspaces[name])
            sums[name] += torch.stack([code.square().sum(), code.new_tensor(float(len(code)))])

        return hook

    handles = [layer.register_forward_pre_hook(hook_of(name)) for name, layer in layers.items()]
    with torch.no_grad():
        forward_forget_rows()
    for handle in handles:
        handle.remove()
    sum_over_processes(sums.values())
    return {name: (value[0] / value[1]).sqrt().float() for name, value in sums.items()}


def _output_scales(
    stats: dict[str, LayerStatistics], code_rms: dict[str, Tensor], min_relative_scale: float
) -> dict[str, Tensor]:
    """rms of W x over rms of |V x|, by layer.

    Where hardly anything but the mean enters a layer there is no channel to speak of, and the mean takes the code's place. Where
    nothing comes out, the other layers' median does.
    """
    scales = {}
    for name, layer in stats.items():
        mean = layer.mean_input().float().norm()
        code = torch.where(code_rms[name] > min_relative_scale * mean, code_rms[name], mean)
        scales[name] = layer.signal().float() / code.clamp_min(TINY)
    usual = torch.stack(list(scales.values())).median()
    return {name: torch.where(scale > min_relative_scale * usual, scale, usual) for name, scale in scales.items()}
