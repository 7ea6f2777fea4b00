"""Supported ranges, extras and console scripts. The version ranges come from the matrix in ``hstu/_matrix.py``."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
matrix = runpy.run_path(str(HERE / "hstu" / "_matrix.py"))
supported = matrix["supported_range"]
LEAST_PYTHON, MOST_PYTHON = matrix["MIN_PYTHON"], matrix["MAX_PYTHON"]

TRITON = f"triton{supported('triton')}; platform_system == 'Linux'"
# torchrec's own metadata asks for the CUDA wheel of fbgemm. On a machine without CUDA install torchrec with
# --no-deps beside the "cpu" extra (or use requirements/cpu.txt, which does so).
TORCHREC_NEEDS = ["tensordict", "torchmetrics==1.0.3", "tqdm", "pyre-extensions", "iopath"]

EXTRAS = {
    "cpu": [f"fbgemm-gpu-cpu{supported('fbgemm')}", TRITON, *TORCHREC_NEEDS],
    "cuda": [f"fbgemm-gpu{supported('fbgemm')}", f"torchrec{supported('torchrec')}", TRITON, *TORCHREC_NEEDS],
    "prepare": ["polars>=1.30,<3"],
    "tensorboard": ["tensorboard>=2.16", "setuptools"],
    "loggers": ["tensorboard>=2.16", "setuptools", "wandb>=0.17", "mlflow>=2.14"],
    "plot": ["matplotlib>=3.8"],
    "export": ["polars>=1.30,<3", "safetensors>=0.4.3"],
    "faiss": ["faiss-cpu>=1.8"],
    "baselines": ["scikit-learn>=1.5", "scipy>=1.11"],
    "dev": [
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.6",
        "mypy>=1.11",
        "torchmetrics>=1.0",
        "scikit-learn>=1.5",
    ],
}
EXTRAS["all"] = sorted(
    {need for name in ("prepare", "tensorboard", "plot", "baselines", "export") for need in EXTRAS[name]}
)

PACKAGES = [p for name in ("hstu", "kernels", "benchmarks") for p in (name, f"{name}.*")]

setup(
    name="hstu",
    version="0.1.0",
    description="Train, evaluate and serve HSTU-style generative recommenders",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=f">={LEAST_PYTHON[0]}.{LEAST_PYTHON[1]},<{MOST_PYTHON[0]}.{MOST_PYTHON[1] + 1}",
    packages=[*find_packages(include=PACKAGES), "hstu.conf"],
    package_dir={"hstu.conf": "conf"},
    package_data={"hstu.conf": ["*.yaml", "**/*.yaml"], "hstu": ["py.typed"], "kernels": ["py.typed"]},
    install_requires=[
        f"torch{supported('torch')}",
        "numpy>=1.26",
        "hydra-core>=1.3,<1.4",
        "omegaconf>=2.3,<2.4",
        "rich>=13",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "hstu-train = hstu.train:main",
            "hstu-stream = hstu.stream_train:main",
            "hstu-prepare = hstu.prepare:main",
            "hstu-evaluate = hstu.evaluate:main",
            "hstu-recommend = hstu.recommend:main",
            "hstu-export = hstu.export:main",
            "hstu-doctor = hstu.doctor:main",
            "hstu-bench = benchmarks.bench:main",
            "hstu-plan = hstu.plan:main",
        ]
    },
)
