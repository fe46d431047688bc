"""Package metadata; the exact versions that are tested stand in requirements.lock."""

from setuptools import find_packages, setup

setup(
    name="ldm-dkdm",
    version="0.1.0",
    description="Data-free knowledge distillation of latent diffusion models into any architecture",
    license="MIT",
    packages=find_packages(include=["ldm_dkdm", "ldm_dkdm.*"]),
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.9",
        "lightning>=2.6,<3",
        "taming-transformers-rom1504>=0.0.6",
        "einops>=0.7",
        "omegaconf>=2.3",
        "pyyaml>=6",
        "safetensors>=0.5",
        "numpy>=1.26",
        "pillow>=10.1",
        "scipy>=1.11",
        "tqdm>=4.66",
    ],
    extras_require={
        "first-stage": ["torchvision>=0.24", "kornia>=0.8", "lpips>=0.1.4"],
        "test": [
            "diffusers>=0.35",
            "hypothesis>=6.100",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "ruff>=0.12",
            "scikit-learn>=1.5",
        ],
    },
)
