from pathlib import Path

from setuptools import find_packages, setup


README = Path(__file__).resolve().parent / "README.md"
ASSET_TYPES = ("json", "safetensors", "txt", "png", "md")

setup(
    name="diffusers_ctrl",
    version="0.1.0",
    description="Gives pre-trained diffusion models new labels by KL-regularised RL (CTRL), and says in nats how far it got.",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["diffusers_ctrl*"]),
    package_data={"diffusers_ctrl": [f"assets/**/*.{suffix}" for suffix in ASSET_TYPES]},
    install_requires=[
        "torch>=2.4",
        "diffusers>=0.42,<0.44",  # tested with 0.42.1
        "transformers>=5.0",
        "peft>=0.21",
        "accelerate>=1.10",
        "huggingface-hub>=1.0",
        "safetensors>=0.4",
        "numpy",
        "pillow",
        "tqdm",
    ],
    extras_require={
        "train": ["datasets>=4.0", "scikit-learn>=1.5", "matplotlib>=3.8", "tensorboard>=2.14", "pyyaml"],
        "test": ["pytest>=8", "pytest-xdist>=3.7", "ruff"],
    },
)
