"""AUROC and average precision of 14 findings on 25,596 images, in resamples of the patients: resamples a second.

    python resamples.py                     ours, 1,000 resamples
    python resamples.py --of scikit-learn   its two functions in a loop with weights, a resample or two

The same labels, scores and patients, in the shares of NIH's official test list.
"""

import argparse
import time

import numpy as np
import pandas as pd
from party import serve
from sklearn import metrics

from workbench.analysis import resampling

IMAGES, PATIENTS, FINDINGS = 25_596, 2_797, 14


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--of", default="ours", choices=("ours", "scikit-learn"))
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    shares = np.linspace(0.003, 0.24, FINDINGS)
    labels = pd.DataFrame(rng.random((IMAGES, FINDINGS)) < shares).astype("uint8")
    scores = pd.DataFrame(1 / (1 + np.exp(2 - rng.normal(size=labels.shape) - labels.to_numpy()))).astype("float32")
    patients = pd.Series(np.sort(rng.integers(PATIENTS, size=IMAGES)))

    def ours() -> float:
        began = time.perf_counter()
        resampling.bootstrap_areas(labels, scores, patients, resamples=1000)
        return 1000 / (time.perf_counter() - began)

    def theirs() -> float:
        began = time.perf_counter()
        weight = np.bincount(rng.integers(PATIENTS, size=PATIENTS), minlength=PATIENTS)[patients]
        for finding in labels:
            metrics.roc_auc_score(labels[finding], scores[finding], sample_weight=weight)
            metrics.average_precision_score(labels[finding], scores[finding], sample_weight=weight)
        return 1 / (time.perf_counter() - began)

    serve(ours if options.of == "ours" else theirs)


if __name__ == "__main__":
    main()
