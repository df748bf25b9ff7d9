"""Top-1 and top-5 accuracy as a metric module of `evaluate`, which works offline: `evaluate.load("…/accuracy.py")`."""

from typing import Any

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """\
Share of the images, in [0, 1], whose label is the class with the highest score (`top1_accuracy`), or one of the five
classes with the highest scores (`top5_accuracy`, where there are scores of more than five classes).
"""
_INPUTS = """\
predictions: for each image its scores for all classes, or only the predicted class; with `ranked=True` its classes
from the likeliest on. references: the labels. Of equal scores the lower class counts first.
"""
_CITATION = ""


class TopKAccuracy(evaluate.Metric):
    """See `_DESCRIPTION`."""

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        scores = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": scores, "references": label}),
                datasets.Features({"predictions": label, "references": label}),
            ],
        )

    def _compute(self, predictions: Any, references: Any, ranked: bool = False) -> dict[str, float]:
        predicted, labels = np.asarray(predictions), np.asarray(references)
        if predicted.ndim == 1:
            return {"top1_accuracy": float((predicted == labels).mean())}
        classes = predicted if ranked else np.argsort(-predicted, axis=1, kind="stable")
        hits = classes[:, :5] == labels[:, None]
        results = {"top1_accuracy": float(hits[:, 0].mean())}
        if predicted.shape[1] > 5:
            results["top5_accuracy"] = float(hits.any(axis=1).mean())
        return results
