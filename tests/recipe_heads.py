"""What the heads of shipped recipes say, and what starts them: held by tests/unit/plan/test_recipes.py.

python tests/recipe_heads.py        writes the planner's figures into the heads, and the golden files anew; look at the diff
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from guardtrain.distributed.launch import ROOT, Cluster, plan_start
from guardtrain.overrides import load_recipe
from guardtrain.plan.geometry import read_geometry
from guardtrain.plan.hardware import GIB, parse_cluster
from guardtrain.plan.search import Candidate, as_asked
from guardtrain.plan.workload import workload_of

RECIPES = Path(__file__).parents[1] / "guardtrain" / "recipes"
GOLDEN = Path(__file__).parent / "golden" / "recipes"
ROWS = 10_000
# Recipes that run on any machine, whatever its size, and say in their heads what was measured.
MEASURED = ("guard", "instruct", "quickstart")
CLUSTER = r"\d+x\d+x[A-Z][\w-]+"


def planned_recipes() -> list[str]:
    """Names of the recipes whose figures are the planner's."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem not in MEASURED)


def head(recipe: str) -> dict[str, str]:
    """The lines of a recipe's head comment by their first word."""
    lines = (RECIPES / f"{recipe}.yaml").read_text("utf-8").splitlines()
    words = (re.match(r"#   (\w+) +(.*)", line) for line in lines)
    return {match[1]: match[2] for match in words if match}


def clusters(recipe: str) -> list[str]:
    """The clusters that a recipe's head names, the one of its command first."""
    return re.findall(CLUSTER, head(recipe)["hardware"])


def planned(recipe: str, cluster: str) -> Candidate:
    """The recipe as it stands on a cluster, for ROWS rows of the usual length."""
    loaded = load_recipe(recipe)
    return as_asked(loaded, read_geometry(loaded.model.name), workload_of(loaded, rows=ROWS), parse_cluster(cluster))


def figures(recipe: str) -> dict[str, str]:
    """What the head should say of memory and time."""
    loaded, found = load_recipe(recipe), planned(recipe, clusters(recipe)[0])
    epochs = loaded.train.epochs
    steps = workload_of(loaded, rows=ROWS).steps(found.setup.pack.budget, found.packs_per_step)
    minutes = max(1, round(steps * found.time.total / 60))
    return {
        "memory": f"predicted: {found.device_bytes / GIB:.1f} GiB a GPU, {found.host.total / GIB:.0f} GiB a host",
        "time": f"predicted: {minutes} minutes for {epochs:g} epochs of {ROWS:,} rows",
    }


def dry_run(recipe: str) -> str:
    """What `guardtrain launch --dry-run` prints for the command in a recipe's head; `guardtrain train` is one rank of it."""
    _, _, *arguments = shlex.split(head(recipe)["command"])
    cluster = {"nodes": 1, "gpus_per_node": 1, "slurm": "--slurm" in arguments}
    for option in ("--nodes", "--gpus-per-node"):
        if option in arguments:
            cluster[option.strip("-").replace("-", "_")] = int(arguments[arguments.index(option) + 1])
    given = [argument for argument in arguments if "=" in argument]
    shown = plan_start(load_recipe(recipe, given), [recipe, *given], Cluster(**cluster)).shown()
    return shown.replace(str(ROOT), "REPOSITORY")


def main() -> None:
    """Write everything anew."""
    GOLDEN.mkdir(exist_ok=True)
    for recipe in planned_recipes():
        path = RECIPES / f"{recipe}.yaml"
        text = path.read_text("utf-8")
        for word, figure in figures(recipe).items():
            text = re.sub(rf"^(#   {word} +).*", lambda found, figure=figure: found[1] + figure, text, flags=re.MULTILINE)
        path.write_text(text, "utf-8")
        (GOLDEN / f"{recipe}.txt").write_text(dry_run(recipe), "utf-8")


if __name__ == "__main__":
    main()
