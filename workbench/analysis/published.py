"""The figures that others published, with their sources: what ours are shown beside.

Figures only; nothing is measured or drawn here. They hold for NIH ChestX-ray14 alone, and a figure from a
random split must not be compared with one from NIH's official split: the same code scores about 0.03 higher
on a random split of patients (0.843 against 0.814 for the DenseNet-121 below).

    from workbench.analysis import published

    published.published_auroc().mean()
    published.SOURCES["CheXNet v3"]["split"]        # "random"
    published.published_scaling()
"""

import pandas as pd

# The kinds of split that figures come from. Those of different kinds do not compare.
KINDS: dict[str, str] = {
    "official": "NIH's official lists: no patient on two sides, and a test set with more findings than training",
    "random": "patients drawn at random: no patient on two sides, all sides alike; about 0.03 higher",
    "leaky": "images drawn at random: patients on both sides, so the score is too high to compare with anything",
}

SOURCES: dict[str, dict[str, str]] = {
    "Wang 2017": {
        "reference": "Wang, Peng, Lu, Lu, Bagheri, Summers: ChestX-ray8: Hospital-scale Chest X-ray Database "
        "and Benchmarks on Weakly-Supervised Classification and Localization of Common Thorax Diseases, "
        "CVPR 2017.",
        "split": "random",
        "note": "ResNet-50. Figures for the 14 findings as the CheXNet article quotes them.",
    },
    "Yao 2017": {
        "reference": "Yao, Poblenz, Dagunts, Covington, Bernard, Lyman: Learning to diagnose from scratch by "
        "exploiting dependencies among labels, arXiv:1710.10501, 2017.",
        "split": "random",
        "note": "DenseNet with an LSTM over the labels.",
    },
    "CheXNet v3": {
        "reference": "Rajpurkar, Irvin, Zhu and others: CheXNet: Radiologist-Level Pneumonia Detection on "
        "Chest X-Rays with Deep Learning, arXiv:1711.05225v3, 2017.",
        "split": "random",
        "note": "DenseNet-121; patients split at random, about 70 % training, 10 % validation, 20 % test.",
    },
    "DenseNet-121, official split (gathierry)": {
        "reference": "github.com/gathierry/CheXNet-PyTorch: CheXNet reproduced on NIH's official lists.",
        "split": "official",
        "note": "The same code reaches a mean of 0.843 on a random split of patients.",
    },
    "Dell EMC (article's repository, names corrected)": {
        "reference": "Dell EMC, HPC & AI Innovation Lab: CheXNet trained with Horovod on V100 GPUs, "
        "knowledge base article 000124388, 2019-2021, and its authors' repository.",
        "split": "leaky",
        "note": "On validation images, about 80 % of them of patients that are also in training, so too high "
        "to compare. Known are two findings, published under each other's names, and the mean of 14, 0.8038.",
    },
}

_FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip

_AUROC = {
    "Wang 2017": (
        0.716, 0.807, 0.784, 0.609, 0.706, 0.671, 0.633, 0.806, 0.708, 0.835, 0.815, 0.769, 0.708, 0.767,
    ),
    "Yao 2017": (
        0.772, 0.904, 0.859, 0.695, 0.792, 0.717, 0.713, 0.841, 0.788, 0.882, 0.829, 0.767, 0.765, 0.914,
    ),
    "CheXNet v3": (
        0.8094, 0.9248, 0.8638, 0.7345, 0.8676, 0.7802, 0.7680, 0.8887, 0.7901, 0.8878, 0.9371, 0.8047,
        0.8062, 0.9164,
    ),
    "DenseNet-121, official split (gathierry)": (
        0.7761, 0.8762, 0.8264, 0.7008, 0.8244, 0.7606, 0.7279, 0.8565, 0.7588, 0.8461, 0.9137, 0.8164,
        0.7762, 0.9299,
    ),
}  # fmt: skip

# Read under its neighbour's name in the article: the class names had not travelled with the labels.
_DELL = {"Pneumonia": 0.6950, "Pneumothorax": 0.8328}

# GPUs, images per second, seconds for 10 epochs: as the authors' repository has them; the article rounds
# the times to 70 and 6.7 minutes.
_ARTICLE = (
    (1, 185.12, 4206.58),
    (2, 315.26, 2470.08),
    (3, 421.85, 1845.96),
    (4, 589.36, 1321.29),
    (8, 1116.99, 697.15),
    (12, 1527.60, 509.76),
    (16, 1912.82, 407.1),
)

ARTICLE_BATCH = 64  # images per GPU and step
ARTICLE_EPOCHS = 10
ARTICLE_GRADIENT_BYTES = 28e6  # DenseNet-121 with 14 outputs: 7.0 million float32
ARTICLE_FABRIC = "4 V100, EDR InfiniBand"  # in `scaling_model.FABRICS`; the servers are those of article 000124384


def published_auroc() -> pd.DataFrame:
    """The published areas under the ROC curve on ChestX-ray14.

    Returns:
        Index `finding`, one column per key of `SOURCES`; NaN where a source gives no figure.
    """
    table = pd.DataFrame(_AUROC, index=pd.Index(_FINDINGS, name="finding"))
    return table.assign(**{name: pd.Series(_DELL) for name in SOURCES if name.startswith("Dell EMC")})


def published_scaling() -> pd.DataFrame:
    """The article's own scaling figures: 1 to 16 V100 GPUs, four to a node, 256 x 256 images, float32.

    Returns:
        `workers`, `images_per_second`, `seconds` (for 10 epochs), `speed_up` and `efficiency` (0 to 1).
    """
    table = pd.DataFrame(_ARTICLE, columns=["workers", "images_per_second", "seconds"])
    table["speed_up"] = table["images_per_second"] / table["images_per_second"].iloc[0]
    table["efficiency"] = table["speed_up"] / table["workers"]
    return table
