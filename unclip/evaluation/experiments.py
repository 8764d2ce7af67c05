"""The paper's experiments by name, each a function of a model and a request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from unclip.evaluation.findings import Findings
from unclip.evaluation.guidance import compare_guidance
from unclip.evaluation.priors import compare_priors
from unclip.evaluation.probes import binding, linear, pca, typography
from unclip.evaluation.reranking import reranking
from unclip.evaluation.samplers import compare_samplers
from unclip.evaluation.setting import Request
from unclip.pipeline import UnCLIP

Experiment = Callable[[UnCLIP, str, Request, Path], Findings]
EXPERIMENTS: dict[str, Experiment] = {
    "priors": compare_priors,
    "guidance": compare_guidance,
    "samplers": compare_samplers,
    "reranking": reranking,
    "pca": pca,
    "binding": binding,
    "typography": typography,
    "linear": linear,
}
