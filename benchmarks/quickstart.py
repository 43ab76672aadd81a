"""The quickstart and its longer form, as a newcomer runs them, with what they measured.

python benchmarks/quickstart.py --out benchmarks/results/quickstart.json [KEY=VALUE …]
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from rich.console import Console

from guardtrain.environment import describe_environment
from guardtrain.overrides import load_recipe, recipe_to_tree
from guardtrain.train.quickstart import run_quickstart


def main() -> None:
    """Run, show, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="for example train.epochs=3 data.max_rows=null")
    args = parser.parse_args()
    recipe = load_recipe("quickstart", args.overrides)
    report = run_quickstart(recipe, console=Console(stderr=True))
    report.show(Console())
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": describe_environment(),
        "recipe": recipe_to_tree(recipe),
        **report.to_json(),
    }
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
