"""Deep feature reweighting (Kirichenko et al., arXiv 2204.02937)."""

import numpy as np
import torch
from torch import nn

from hf_uib.inference import head_of, observe

from ..registry import Budget, grid, register_method


@register_method("dfr", "DFR (head alone)", group="debiasing", grid=grid(inverse=[0.01, 0.1, 1, 10]), one_shot=True)
def dfr(model: nn.Module, task, budget: Budget, inverse: float = 1.0) -> nn.Module:
    """Only the head is fitted anew, by logistic regression on retained features (with an L2 penalty of inverse strength
    ``inverse``, where the paper has L1)."""
    from sklearn.linear_model import LogisticRegression

    seen = observe(model, task.sets["retain"], task.processing_class)
    x = seen.features["head"].astype(np.float64)
    mean, spread = x.mean(0), x.std(0) + 1e-8
    fitted = LogisticRegression(C=inverse, max_iter=1000).fit((x - mean) / spread, seen.labels)
    coefficients, intercept = fitted.coef_, fitted.intercept_
    if len(fitted.classes_) == 2:
        coefficients, intercept = np.concatenate([-coefficients, coefficients]) / 2, np.r_[-intercept, intercept] / 2
    head = head_of(model)
    weight, bias = torch.zeros_like(head.weight), torch.full_like(head.bias, -30.0)  # classes without rows
    weight[fitted.classes_] = torch.as_tensor(coefficients / spread).to(weight)
    bias[fitted.classes_] = torch.as_tensor(intercept - (coefficients / spread) @ mean).to(bias)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return model.eval()
