"""One rank of a cell of benchmarks/plan_cells.py: `guardtrain.train`, its tensors counted until the fourth step ends."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from guardtrain.bench.account import TensorAccount
from guardtrain.cli import train_main
from guardtrain.train.trainer import PackTrainer

COUNTED_STEPS = 4


class StopCounting(TrainerCallback):  # type: ignore[misc]
    """Ends the counting after the fourth step, so that later steps run at their own speed, and writes what was found."""

    def __init__(self, account: TensorAccount, loaded: int) -> None:
        self.account, self.loaded = account, loaded

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has stepped."""
        if state.global_step == COUNTED_STEPS:
            self.account.__exit__(None, None, None)
            found = {"loading_peak": self.loaded, "training_peak": self.account.peak}
            (Path(os.environ["PLAN_CELL"]) / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))


def main() -> None:
    """Count from before the model is loaded."""
    account = TensorAccount()
    account.__enter__()
    train = PackTrainer.train

    def counted(self: PackTrainer, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(StopCounting(account, account.peak))
        account.reset_peak()
        return train(self, *args, **kwargs)

    PackTrainer.train = counted  # type: ignore[method-assign]
    train_main()


if __name__ == "__main__":
    main()
